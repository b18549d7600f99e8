//! The seam between those who use a disk and those who know how it is stored.
//!
//! ```text
//!   export, job            ask for guest bytes
//!        │
//!   graph::Node            filters, drain, in-flight accounting
//!        │
//!   dyn Driver  ◄──────────this module: requests, extents, limits, errors
//!     ├─ format (raw, qcow2): bytes mean something; children are drivers
//!     └─ protocol (file, host_device, mem, null, delay): bytes live somewhere
//! ```
//!
//! # Vocabulary
//! *flush* makes acknowledged writes durable. *discard* gives space back and leaves the contents
//! undefined. *write zeroes* makes a range read as zeroes; with [`ZeroFlags::may_unmap`] it may give
//! space back, with [`ZeroFlags::no_fallback`] it fails rather than write zeroes out.
//!
//! # Memory
//! A read takes an exclusive [`Buf`] and gives it back; a write takes a [`SharedBuf`], so that one
//! buffer can go to two places. The length of the buffer is the length of the request.

pub mod child;
pub mod conflict;
pub mod error;
pub mod extent;
pub mod filter;
pub mod load;
pub mod node;
pub mod patience;
pub mod permission;
pub mod pin;
pub mod place;
pub mod reserve;
pub mod role;
pub mod serial;

pub use child::Child;
pub use error::{BlockError, Operation};
pub use extent::{Extent, Holds, Word};
pub use node::Node;
pub use permission::{Permission, Permissions};
pub use pin::Pin;
pub use reserve::{Loan, NoMemory, Reserve};
pub use role::Role;

use std::rc::Rc;

use blockferry_ring::{Buf, CopyHow, Errno, File, PooledFuture, SharedBuf};

/// What driver calls return: a future in pooled memory.
pub type IoFuture<'a, T> = PooledFuture<'a, T>;

/// The result of a request without data.
pub type IoResult = Result<(), BlockError>;

/// What a driver needs of requests. Powers of two, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Offsets and lengths of reads and writes.
    pub request_align: u32,
    /// Addresses of memory.
    pub mem_align: u32,
    /// Write-zeroes works best on multiples of this.
    pub zero_align: u32,
    /// Discard works on multiples of this.
    pub discard_align: u32,
    /// The natural unit of allocation (a qcow2 cluster, a filesystem block), if known.
    pub cluster_size: Option<u32>,
    /// The largest single read or write.
    pub transfer_max: u32,
    /// Bytes of a read or write that suit one who copies all of it.
    pub transfer_best: u32,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            request_align: 1,
            mem_align: 1,
            zero_align: 1,
            discard_align: 1,
            cluster_size: None,
            transfer_max: blockferry_ring::arena::BLOCK_MAX as u32,
            transfer_best: crate::base::limits::COPY_BYTES as u32,
        }
    }
}

/// What a driver can do at this moment. A capability may be lost at run time: asking for it then falls
/// back without an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Capabilities {
    /// Writes can be made durable one by one.
    pub fua: bool,
    /// Discard gives space back.
    pub discard: bool,
    /// Zeroes can be written without sending them as data.
    pub zero_fast: bool,
    /// Zeroes can be written by giving space back.
    pub zero_unmap: bool,
    /// The driver knows holes from data.
    pub status: bool,
}

/// How to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct WriteFlags {
    /// Durable when acknowledged.
    pub fua: bool,
}

/// How to write zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct ZeroFlags {
    /// Durable when acknowledged.
    pub fua: bool,
    /// The range may be deallocated.
    pub may_unmap: bool,
    /// Fail with `EOPNOTSUPP` rather than write zeroes out as data.
    pub no_fallback: bool,
}

/// Where a read leads without any I/O of metadata: the fast lane.
#[derive(Debug)]
pub enum Resolved {
    /// To these bytes of this file.
    File {
        /// The file, for [`blockferry_ring::Ring::read`].
        file: File,
        /// The offset in it.
        offset: u64,
        /// Held until the read has ended: the bytes stay where they are until then.
        pin: Option<Pin>,
    },
    /// They are zeroes.
    Zero,
    /// Nothing is known at once, or the memory or alignment does not fit: take [`Driver::read`].
    Ask,
}

/// Bytes of a file, to be copied by [`Driver::copy_range`].
#[derive(Clone, Debug)]
pub struct CopyFrom {
    /// The file.
    pub file: File,
    /// The offset in it.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// By which means.
    pub how: CopyHow,
}

/// Whether this error of [`Driver::copy_range`] says that the range cannot be copied that way, and not that something
/// is broken.
pub fn cannot_copy_range(errno: Errno) -> bool {
    errno.is_unsupported()
        || matches!(
            errno,
            Errno::EXDEV | Errno::EINVAL | Errno::EPERM | Errno::EACCES | Errno::EBADF | Errno::EAGAIN
        )
}

/// Bytes for [`Layer::populate`].
#[derive(Clone, Debug)]
pub enum Fill {
    /// These.
    Data(SharedBuf),
    /// So many zeroes.
    Zeroes(u64),
}

impl Fill {
    /// Bytes.
    pub fn len(&self) -> u64 {
        match self {
            Fill::Data(buf) => buf.len() as u64,
            Fill::Zeroes(len) => *len,
        }
    }

    /// No bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What a driver can do that may have a backing file: it is a layer of a chain.
pub trait Layer {
    /// The use of the layer below, where one is open.
    fn backing(&self) -> Option<Rc<Child>>;

    /// The backing file as the image itself records it, and its format.
    fn recorded_backing(&self) -> Option<(String, Option<String>)>;

    /// What this layer holds itself from `offset` on, for at most `len` bytes (above 0): [`Extent::holds`].
    fn holds(&self, offset: u64, len: u64) -> IoFuture<'_, Result<Extent, BlockError>>;

    /// Holds bytes itself from now on where it held nothing; what it holds already stays as it is. They are those that
    /// a read has given since the layers below last changed: nobody who reads notices. Others may write meanwhile.
    fn populate(&self, offset: u64, fill: Fill) -> IoFuture<'_, IoResult>;

    /// Records another backing file and its format, or none; durably, and in one step as far as a power cut can tell.
    /// What is open below stays.
    fn record_backing<'a>(&'a self, backing: Option<(&'a str, &'a str)>) -> IoFuture<'a, IoResult>;

    /// Reads what it does not hold from `backing` from now on. Reads under way end where they began. On an error, such as
    /// a use of `backing` that does not go with it, nothing has changed.
    fn set_backing(&self, backing: Option<&Rc<Node>>) -> IoResult;
}

/// A disk or a layer of one, as stored.
///
/// Ranges lie within [`Driver::len`]: who calls has checked. Reads and writes of any offset and length
/// are accepted whatever [`Limits::request_align`] says (it is advice on what is fast); memory must fit
/// [`Driver::limits`] only to be fast as well.
pub trait Driver: std::fmt::Debug {
    /// The driver's name: `file`, `raw`, ….
    fn kind(&self) -> &'static str;

    /// What a person calls this image: its path or URI.
    fn name(&self) -> &str;

    /// Bytes of the disk.
    fn len(&self) -> u64;

    /// No bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Opened without write access.
    fn is_read_only(&self) -> bool;

    /// What it needs.
    fn limits(&self) -> Limits;

    /// What it can do now.
    fn capabilities(&self) -> Capabilities;

    /// Reads `buf.len()` bytes at `offset`. The buffer comes back in any case.
    fn read(&self, offset: u64, buf: Buf) -> IoFuture<'_, (Buf, IoResult)>;

    /// Writes all of `buf` at `offset`.
    fn write(&self, offset: u64, buf: SharedBuf, flags: WriteFlags) -> IoFuture<'_, IoResult>;

    /// Makes all acknowledged writes durable.
    fn flush(&self) -> IoFuture<'_, IoResult>;

    /// Gives space back; contents of the range are undefined afterwards. Not doing so is no error.
    fn discard(&self, offset: u64, len: u64) -> IoFuture<'_, IoResult>;

    /// Makes a range read as zeroes.
    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> IoFuture<'_, IoResult>;

    /// What is known from `offset` on, for at most `len` bytes (above 0).
    fn block_status(&self, offset: u64, len: u64) -> IoFuture<'_, Result<Extent, BlockError>>;

    /// The same for many extents, at most `extents_max`, that follow each other from `offset` on; they are added to
    /// `out`, at least one. `None`: there is no cheaper way than one question for each.
    fn extents<'a>(
        &'a self,
        _offset: u64,
        _len: u64,
        _extents_max: usize,
        _out: &'a mut Vec<Extent>,
    ) -> Option<IoFuture<'a, IoResult>> {
        None
    }

    /// Copies bytes of a file to `offset` of this disk by the means of the kernel or the filesystem; nothing passes
    /// through this program. Where the bytes of a range of another disk lie is told by its [`Driver::resolve`]; nobody
    /// may write them meanwhile. `None`: this driver has no such means. An error of [`cannot_copy_range`] says that it
    /// does not work for this pair of files or this range: nothing has changed then, and reading and writing will do.
    /// After any other error the range may hold anything.
    fn copy_range(&self, _from: CopyFrom, _offset: u64) -> Option<IoFuture<'_, IoResult>> {
        None
    }

    /// The fast lane of reads, for a range within the disk and memory of `mem_align`.
    fn resolve(&self, _offset: u64, _len: u64) -> Resolved {
        Resolved::Ask
    }

    /// What only a layer of a chain can do; `None` for a driver of a kind that has no backing file.
    fn as_layer(&self) -> Option<&dyn Layer> {
        None
    }

    /// A layer lies below this one and shows where this one holds nothing.
    fn has_backing(&self) -> bool {
        self.as_layer().is_some_and(|layer| layer.backing().is_some())
    }

    /// The name of the format, as an overlay records it.
    fn format(&self) -> &'static str {
        "raw"
    }

    /// Goes over to reading only, or to writing too. Nothing that changes the disk is under way; reads may be.
    /// On an error nothing has changed. `None`: this driver is what it was opened for.
    fn reopen(&self, read_only: bool) -> Option<IoFuture<'_, IoResult>> {
        let node = self.filtered()?.node();
        Some(node.ring().clone().boxed(async move { node.reopen_driver(read_only).await }))
    }

    /// What this one uses.
    fn children(&self) -> Vec<Rc<Child>> {
        self.filtered().into_iter().collect()
    }

    /// The one that this driver passes everything on to, where it is a filter: what it does not say itself is what that one
    /// says.
    fn filtered(&self) -> Option<Rc<Child>> {
        None
    }

    /// Takes and gives back the locks that these permissions need, on this driver and those below.
    /// On an error nothing has changed.
    fn set_permissions(&self, permissions: Permissions) -> IoResult {
        self.filtered().map_or(Ok(()), |child| child.set_permissions(permissions))
    }

    /// The driver itself, for those who know what is special about its kind: `downcast_ref` it.
    fn as_any(&self) -> Option<&dyn std::any::Any> {
        None
    }

    /// The file that holds the image, where it is one on this machine: marks are put on it.
    fn local_file(&self) -> Option<File> {
        self.filtered()?.node().local_file()
    }

    /// Two drivers with the same identity store the same bytes in the same place.
    fn identity(&self) -> Option<(u64, u64)> {
        self.filtered()?.node().identity()
    }

    /// Looks whether what is open still is what its name leads to (if `by_name`), and as long as it was. With `exact` it
    /// must not have grown either. An error says what somebody has done to it. `None`: there is nothing to look at here
    /// (see [`place::check`] for the drivers below).
    fn check_place(&self, _by_name: bool, _exact: bool) -> Option<IoFuture<'_, IoResult>> {
        None
    }

    /// Changes the length. `EOPNOTSUPP` where that makes no sense.
    fn set_len(&self, _len: u64) -> IoFuture<'_, IoResult>;

    /// Sets room aside for a range without changing what it reads as. `None`: this driver has no such means of its own
    /// (a local file's are the kernel's).
    fn allocate(&self, _offset: u64, _len: u64) -> Option<IoFuture<'_, IoResult>> {
        None
    }

    /// Bytes that the image occupies, where that can be told.
    fn allocated_bytes(&self) -> Option<u64> {
        self.filtered()?.node().allocated_bytes()
    }

    /// Asks again what the image occupies, where that takes asking somebody: from then on [`Driver::allocated_bytes`] tells
    /// that.
    fn ask_allocated(&self) -> Option<IoFuture<'_, ()>> {
        let node = self.filtered()?.node();
        Some(node.ring().clone().boxed(async move {
            if let Some(asked) = node.ask_allocated() {
                asked.await;
            }
        }))
    }

    /// How often changes that were acknowledged and not flushed may have been lost for good: a server was lost, and they
    /// could not be written again. Whoever has written and sees this grow has to take his next flush for failed.
    fn losses_for_good(&self) -> u64 {
        self.children().iter().map(|child| child.node().losses_for_good()).sum()
    }

    /// A job writes to it from now on, or (once for each) has ended: what it has written must not get lost with a server,
    /// whatever was said about clients' changes.
    fn set_writing_job(&self, is_there: bool) {
        self.children().iter().for_each(|child| child.node().set_writing_job(is_there));
    }

    /// Has requests fail (`ENOTRECOVERABLE`) once a server was lost so often without a flush between that succeeded;
    /// `None`: they wait for it.
    fn set_lapses_max(&self, lapses_max: Option<u32>) {
        self.children().iter().for_each(|child| child.node().set_lapses_max(lapses_max));
    }

    /// Makes requests in flight fail where that is possible (a socket can be cut, a kernel file cannot).
    fn fail_in_flight(&self) {
        self.children().iter().for_each(|child| child.node().fail_in_flight());
    }

    /// Whether it is known that nothing can be had from the place where the bytes are just now: its server is gone.
    fn is_away(&self) -> bool {
        self.children().iter().any(|child| child.node().is_away())
    }
}
