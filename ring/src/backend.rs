//! The seam between the reactor and the world: everything a ring asks of a kernel, or of the simulator.
//!
//! Two kinds of calls: *operations* are queued with [`Backend::push`], leave with [`Backend::enter`]
//! and end as completions; *control calls* (open, stat, locks, attributes) are short and answered at
//! once. Results are `-errno` or a non-negative number, as the kernel has them. Short transfers are
//! passed on as they are: finishing them is the ring's business, so both backends exercise it.

use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::Arc;

use crate::Nanos;
use crate::errno::Errno;
use crate::external::Completer;
use crate::op::{CopyHow, FileId, Op};

/// How long an enter may wait.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wait {
    /// Completions to wait for; 0 does not wait.
    pub want: usize,
    /// Wait at least this long for all of `want`, then be content with one (0: no such rule).
    pub min_wait_usec: u32,
    /// Return at this time at the latest.
    pub deadline: Option<Nanos>,
}

/// How to open a file.
#[derive(Clone, Debug, Default)]
pub struct OpenHow {
    /// Open for writing too.
    pub write: bool,
    /// Bypass the page cache. `EINVAL` where the filesystem refuses it.
    pub direct: bool,
    /// Make the file, which must not exist.
    pub create_new: bool,
    /// The permission bits of a file that is made; the process's umask takes its part away. `None`: 0644.
    pub mode: Option<u32>,
    /// Take O_EXCL on a block device: refused while it is mounted or otherwise in use.
    pub exclusive_device: bool,
}

/// What a path leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file.
    Regular,
    /// A block device.
    Block,
    /// A unix socket.
    Socket,
    /// Anything else (directory, character device).
    Other,
}

/// Facts about an open file.
#[derive(Clone, Copy, Debug)]
pub struct FileInfo {
    /// Regular file or block device.
    pub kind: FileKind,
    /// Length in bytes; the size of the medium for a block device.
    pub len: u64,
    /// Bytes allocated (`st_blocks * 512`; the length for a block device).
    pub allocated: u64,
    /// What O_DIRECT needs of memory addresses (1: anything, as for a buffered file).
    pub mem_align: u32,
    /// What O_DIRECT needs of offsets and lengths.
    pub offset_align: u32,
    /// Device and inode: two paths with the same pair are the same file.
    pub identity: (u64, u64),
    /// It lies on a filesystem that this machine's kernel keeps by itself: no server and no program stands behind it.
    pub is_local: bool,
    /// The device number of a block device (major, minor).
    pub device: Option<(u32, u32)>,
    /// Permission bits.
    pub mode: u32,
    /// The group that it belongs to.
    pub group: u32,
    /// Names that lead to it; 0 for a file that has none (any more).
    pub links: u64,
}

/// What an open file is by now, and what its name leads to.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// The open file.
    pub open: FileInfo,
    /// What the name leads to, as in [`FileInfo::identity`]; `None` if there is nothing any more.
    pub named: Option<(u64, u64)>,
}

/// Tells one block device from another that has its name at another time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceIdentity {
    /// Counts the disks that the kernel has seen since it was started.
    pub sequence: Option<u64>,
    /// What the disk says of itself, with the number of the partition where it is one.
    pub serial: Option<String>,
}

/// One byte range of open-file-description locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LockRange {
    /// First byte.
    pub start: u64,
    /// Bytes.
    pub len: u64,
}

/// A socket address for listening and connecting.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SocketAddress {
    /// A unix stream socket.
    Unix(PathBuf),
    /// TCP; the host may be a name only where name look-ups are allowed to block.
    Tcp(std::net::SocketAddr),
}

impl std::fmt::Display for SocketAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            SocketAddress::Unix(path) => write!(f, "unix:{}", path.display()),
            SocketAddress::Tcp(address) => write!(f, "{address}"),
        }
    }
}

/// A blocking call for the offload pool.
pub type Work = Box<dyn FnOnce() + Send>;

/// A range in two files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyRange {
    /// Where it lies in the file that is read.
    pub from_offset: u64,
    /// Where it goes in the file that is written.
    pub to_offset: u64,
    /// Bytes.
    pub len: u64,
}

/// A blocking call that gives a number of bytes.
pub type CopyWork = Box<dyn FnOnce() -> Result<u64, Errno> + Send>;

/// A blocking call that looks where an open file is.
pub type PlaceWork = Box<dyn FnOnce() -> Result<Place, Errno> + Send>;

/// Wakes a sleeping ring from any thread.
#[derive(Clone)]
pub struct RemoteWaker(Arc<dyn Fn() + Send + Sync>);

impl RemoteWaker {
    /// A waker that calls `f`.
    pub fn new(f: impl Fn() + Send + Sync + 'static) -> RemoteWaker {
        RemoteWaker(Arc::new(f))
    }

    /// A waker that does nothing, for rings that never sleep.
    pub fn none() -> RemoteWaker {
        RemoteWaker::new(|| {})
    }

    /// Has the ring's next wait end, or the present one.
    pub fn wake(&self) {
        (self.0)();
    }
}

impl std::fmt::Debug for RemoteWaker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RemoteWaker")
    }
}

/// The world behind a ring.
pub trait Backend {
    /// What was set up and why, a line each: the log and `blockferry doctor` print it.
    fn describe(&self) -> Vec<String>;

    /// The time now.
    fn now(&self) -> Nanos;

    /// Seconds since 1970 (UTC), for people to read.
    fn unix_secs(&self) -> u64;

    /// 64 random bits (seeded in the simulator).
    fn random(&mut self) -> u64;

    /// Queues an operation; false when the queue is full (nothing happened, offer it again).
    fn push(&mut self, user_data: u64, op: &Op) -> bool;

    /// Queues a request to cancel; the operation still completes, one way or the other.
    fn cancel(&mut self, user_data: u64);

    /// Submits what is queued and waits as told; false when there was no need to go anywhere.
    /// `EINTR` and a passed deadline are not errors.
    fn enter(&mut self, wait: Wait) -> Result<bool, Errno>;

    /// Completions wait to be reaped.
    fn has_completions(&mut self) -> bool;

    /// Takes up to `max` completions (`user_data`, result).
    fn reap(&mut self, max: usize, out: &mut Vec<(u64, i32)>);

    /// Calls `work` on the offload pool; ends as a completion of `user_data` with result 0.
    fn offload(&mut self, user_data: u64, work: Work) -> Result<(), Errno>;

    /// What ends `user_data`, which nothing else will, from any thread.
    fn completer(&mut self, user_data: u64) -> Completer;

    /// The call, for the offload pool, that copies a range from one file to another. It holds both files by itself.
    /// `EOPNOTSUPP` where there is no such call.
    fn copy_work(
        &mut self,
        from: FileId,
        to: FileId,
        range: CopyRange,
        how: CopyHow,
    ) -> Result<CopyWork, Errno>;

    /// Threads that the offload pool has started so far.
    fn offload_threads(&self) -> usize;

    /// A handle that wakes this ring.
    fn remote_waker(&self) -> RemoteWaker;

    /// The fd that polls readable when there is work.
    fn fd(&self) -> Option<BorrowedFd<'_>>;

    /// Registers memory; the index for fixed operations, or `None` where that is refused.
    ///
    /// # Safety contract of the caller
    /// The memory stays mapped until [`Backend::unregister_memory`] or the end of the backend.
    fn register_memory(&mut self, base: NonNull<u8>, bytes: usize) -> Result<u16, Errno>;

    /// Forgets registered memory.
    fn unregister_memory(&mut self, index: u16);

    /// Opens a file or block device.
    fn open(&mut self, path: &Path, how: &OpenHow) -> Result<FileId, Errno>;

    /// Adopts a descriptor that somebody else opened (not in the simulator).
    fn adopt(&mut self, fd: std::os::fd::OwnedFd) -> Result<FileId, Errno>;

    /// The files are the kernel's: control calls on them may be made on other threads.
    fn is_kernel(&self) -> bool {
        false
    }

    /// What such calls need of an open file.
    fn handle(&self, _file: FileId) -> Option<Arc<std::os::fd::OwnedFd>> {
        None
    }

    /// Closes a file; operations on it must have ended.
    fn close(&mut self, file: FileId);

    /// Whether operations on the file use the registered file table.
    fn is_fixed_file(&self, file: FileId) -> bool;

    /// Facts about an open file.
    fn info(&mut self, file: FileId) -> Result<FileInfo, Errno>;

    /// The call, for the offload pool, that tells what an open file is by now and what `path` leads to. It holds the file
    /// by itself.
    fn place_work(&mut self, file: FileId, path: &Path) -> Result<PlaceWork, Errno>;

    /// What tells a block device from others.
    fn device_identity(&mut self, file: FileId) -> Result<DeviceIdentity, Errno>;

    /// Sets the length of a regular file.
    fn set_len(&mut self, file: FileId, len: u64) -> Result<(), Errno>;

    /// The first offset at or after `offset` that holds data (`data`) or a hole. `ENXIO` past the end.
    fn seek(&mut self, file: FileId, offset: u64, data: bool) -> Result<u64, Errno>;

    /// Takes a shared lock on each range (open file description locks).
    fn lock_shared(&mut self, file: FileId, range: LockRange) -> Result<(), Errno>;

    /// Gives locks back.
    fn unlock(&mut self, file: FileId, range: LockRange) -> Result<(), Errno>;

    /// Whether somebody else holds a lock in the range.
    fn lock_conflict(&mut self, file: FileId, range: LockRange) -> Result<bool, Errno>;

    /// Processes that hold locks on the file in the range, as far as can be known (pid, name); `None`: nobody was found in
    /// the time that there is.
    fn lock_holders(&mut self, file: FileId, range: LockRange) -> Option<Vec<(u32, String)>>;

    /// Reads an extended attribute.
    fn get_attribute(&mut self, file: FileId, name: &str) -> Result<Option<Vec<u8>>, Errno>;

    /// Sets (`Some`) or removes (`None`) an extended attribute. Durable after a full sync.
    fn set_attribute(&mut self, file: FileId, name: &str, value: Option<&[u8]>) -> Result<(), Errno>;

    /// Removes a directory entry; durable after [`Backend::sync_directory`].
    fn unlink(&mut self, path: &Path) -> Result<(), Errno>;

    /// Renames. With `replace` whatever is there goes; without, what is there is EEXIST.
    fn rename(&mut self, from: &Path, to: &Path, replace: bool) -> Result<(), Errno>;

    /// Makes the entries of a directory durable.
    fn sync_directory(&mut self, path: &Path) -> Result<(), Errno>;

    /// Whether a path exists, and what it is; symbolic links are followed.
    fn lookup(&mut self, path: &Path) -> Result<Option<FileKind>, Errno>;

    /// Listens; `SocketAddress::Tcp` with port 0 takes a free one. The address in use is returned.
    fn listen(&mut self, address: &SocketAddress) -> Result<(FileId, SocketAddress), Errno>;

    /// Connects. Completes at once on loopback and unix sockets; callers that may block offload it.
    fn connect(&mut self, address: &SocketAddress) -> Result<FileId, Errno>;

    /// Makes a socket that [`Op::Connect`] connects to `address`.
    fn socket(&mut self, address: &SocketAddress) -> Result<FileId, Errno>;

    /// Ends both directions of a stream: operations in flight on it complete.
    fn shutdown_stream(&mut self, file: FileId);

    /// Whether it is known that the other side of a stream has gone: it neither sends nor reads any more.
    fn is_peer_gone(&self, file: FileId) -> bool;
}
