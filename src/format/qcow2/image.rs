//! An open image: its state, its errors, and how its tables are read and written.
//!
//! All state is behind `RefCell`s that are never borrowed across an await; whoever has waited looks again.

use std::cell::{Cell, OnceCell, RefCell};
use std::rc::Rc;

use blockferry_ring::op::Fallocate;
use blockferry_ring::sync::{Notify, join_all};
use blockferry_ring::{Buf, Errno, Ring, SharedBuf};

use super::cache::{PAGE_BYTES_MAX, Page};
use super::compress::Packing;
use super::geometry::Geometry;
use super::header::Header;
use super::meta::{Damage, Meta};
use crate::base::range::ByteRange;
use crate::block::pin::Epochs;
use crate::block::serial::Serial;
use crate::block::{BlockError, Child, NoMemory, Node, Operation, Reserve, WriteFlags};

/// Pages that are written at the same time.
const PAGES_AT_ONCE: usize = 16;
/// Slices that are read at once where tables are gone through in order.
const AHEAD_SLICES: u64 = 4;

/// What went wrong inside.
#[derive(Clone, Debug)]
pub(super) enum Fault {
    /// A file said no.
    Io(BlockError),
    /// The image contradicts itself.
    Damage(String),
    /// It cannot be done; the text says why.
    Refused(Errno, String),
}

impl From<BlockError> for Fault {
    fn from(error: BlockError) -> Fault {
        Fault::Io(error)
    }
}

impl From<NoMemory> for Fault {
    fn from(why: NoMemory) -> Fault {
        Fault::Refused(why.into(), format!("It cannot go on: {why}."))
    }
}

impl From<Damage> for Fault {
    fn from(Damage(why): Damage) -> Fault {
        Fault::Damage(why)
    }
}

/// A thing that only one may do at a time.
#[derive(Debug)]
pub(super) struct Turn {
    taken: Cell<bool>,
    free: Notify,
}

/// The turn; it ends when this is dropped.
#[derive(Debug)]
pub(super) struct MyTurn<'a>(&'a Turn);

impl Turn {
    pub(super) fn new(ring: &Ring) -> Turn {
        Turn { taken: Cell::new(false), free: ring.notify() }
    }

    pub(super) async fn take(&self) -> MyTurn<'_> {
        self.free.until(|| (!self.taken.replace(true)).then_some(())).await;
        MyTurn(self)
    }
}

impl Drop for MyTurn<'_> {
    fn drop(&mut self) {
        self.0.taken.set(false);
        self.0.free.notify();
    }
}

/// How requests went, for those who measure.
#[derive(Debug, Default)]
pub(super) struct Counters {
    /// Reads that became one operation of a file at once.
    pub(super) resolved: Cell<u64>,
    /// Reads that took the long way.
    pub(super) asked: Cell<u64>,
    /// Of those: all parts became operations of files at once.
    pub(super) gathered: Cell<u64>,
    /// Slices of tables that were read.
    pub(super) loads: Cell<u64>,
    /// Write-backs of tables.
    pub(super) syncs: Cell<u64>,
}

/// How requests went so far, for those who measure.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Reads that became one operation of a file, or zeroes, at once.
    pub resolved: u64,
    /// Reads that took the driver's own way.
    pub asked: u64,
    /// Of those: reads of several places, all of which became operations of files, or zeroes, at once.
    pub gathered: u64,
    /// Times that slices of tables were read.
    pub loads: u64,
    /// Write-backs of tables.
    pub syncs: u64,
}

/// The state of write-backs.
#[derive(Debug, Default)]
pub(super) struct SyncState {
    /// Asked for so far; the one that began with this number or a later one covers who asked.
    pub(super) asked: Cell<u64>,
    pub(super) done: Cell<u64>,
    /// A flush failed: what is on the disk is not known any more.
    pub(super) failed: Cell<Option<Errno>>,
}

/// An open image. It is a [`Driver`]; its own functions are what is special about the format.
pub struct Qcow2 {
    pub(super) ring: Ring,
    pub(super) file: Rc<Child>,
    pub(super) data_file: Option<Rc<Child>>,
    pub(super) backing: RefCell<Option<Rc<Child>>>,
    /// The name of the backing file as it was opened.
    pub(super) backing_name: RefCell<Option<String>>,
    pub(super) name: Rc<str>,
    pub(super) read_only: Cell<bool>,
    pub(super) for_check: bool,
    /// Sizes of everything. How wide refcounts are may change: see [`Qcow2::counting`].
    pub(super) g: Geometry,
    pub(super) refcount_order: Cell<u32>,
    pub(super) header: RefCell<Header>,
    /// The first bytes of the file, as they are there.
    pub(super) head: RefCell<Vec<u8>>,
    pub(super) len: Cell<u64>,
    /// What others see as the length while the disk grows: the new part is not all zeroes yet.
    pub(super) len_before: Cell<Option<u64>>,
    pub(super) meta: RefCell<Meta>,
    pub(super) claims: Serial,
    pub(super) epochs: Rc<Epochs>,
    pub(super) table_memory: Reserve,
    /// There once the image was opened to be written.
    pub(super) copy_memory: OnceCell<Reserve>,
    /// Making an L2 table.
    pub(super) tables: Turn,
    /// Making a refcount block, or a larger refcount table.
    pub(super) growing: Turn,
    /// Making the file longer.
    pub(super) lengthening: Turn,
    /// Writing tables back.
    pub(super) syncing: Turn,
    /// Writing the header.
    pub(super) heading: Turn,
    /// Freeing what nobody looks at any more.
    pub(super) releasing: Turn,
    pub(super) sync: SyncState,
    /// Damage was found: nothing is written any more.
    pub(super) corrupt: Cell<bool>,
    /// The bitmaps that record are marked as out of date, or there are none.
    pub(super) bitmaps_marked: Cell<bool>,
    /// How far a check is.
    pub(super) progress: super::check::CheckProgress,
    /// Data may lie in holes of the file; not known before somebody asks.
    pub(super) preallocated: Cell<Option<bool>>,
    /// What is held of the files.
    pub(super) permissions: Cell<crate::block::Permissions>,
    pub(super) packing: Packing,
    /// Changes of mappings, counted round and round.
    pub(super) changes: Cell<u64>,
    /// Where the slice begins that comes after the one that was loaded last.
    pub(super) load_next: Cell<u64>,
    pub(super) counters: Counters,
}

impl std::fmt::Debug for Qcow2 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Qcow2")
            .field("file", &self.name)
            .field("len", &self.len.get())
            .finish_non_exhaustive()
    }
}

impl Qcow2 {
    /// The fault as the error of a request.
    pub(super) async fn tell(&self, operation: Operation, range: ByteRange, fault: Fault) -> BlockError {
        let at = |errno| BlockError::at(operation, self.name.clone(), range.start(), range.len(), errno);
        match fault {
            // Where in its file is of no use to whoever knows places of the disk.
            Fault::Io(error) if error.name == self.name && error.operation == operation => {
                BlockError { hint: error.hint, is_told: error.is_told, ..at(error.errno) }
            }
            Fault::Io(error) => at(error.errno).because(error.to_string()),
            Fault::Refused(errno, why) => at(errno).because(why),
            Fault::Damage(why) => {
                self.mark_corrupt(&why).await;
                at(Errno::EIO).hint(format!("The image is damaged: {why}. Check it (`blockferry check`)."))
            }
        }
    }

    /// The same for the image as a whole.
    pub(super) async fn tell_whole(&self, operation: Operation, fault: Fault) -> BlockError {
        let mut error = self.tell(operation, ByteRange::EMPTY, fault).await;
        error.place = None;
        error
    }

    /// Damage was found: the image is written no more until it is repaired, and says so.
    async fn mark_corrupt(&self, why: &str) {
        if self.corrupt.replace(true) || self.read_only.get() || self.for_check {
            return;
        }
        tracing::error!(image = %self.name, why, "the image is damaged and is not written any more");
        if self.header.borrow().version >= 3 {
            self.header.borrow_mut().incompatible |= super::header::incompatible::CORRUPT;
            if let Err(fault) = self.write_header().await {
                tracing::error!(image = %self.name, ?fault, "the mark of damage could not be written");
            }
        }
    }

    pub(super) fn check_writable(&self) -> Result<(), Fault> {
        if self.read_only.get() {
            return Err(Fault::Refused(Errno::EROFS, "The image was opened read-only.".into()));
        }
        if self.for_check {
            return Err(Fault::Refused(Errno::EROFS, "The image was opened to be checked.".into()));
        }
        if self.corrupt.get() {
            let why = "The image is damaged; repair it first (`blockferry check --repair all`).";
            return Err(Fault::Refused(Errno::EIO, why.into()));
        }
        Ok(())
    }

    /// Sizes of everything, with refcounts as wide as they are now.
    pub(super) fn counting(&self) -> Geometry {
        Geometry { refcount_order: self.refcount_order.get(), ..self.g }
    }

    /// Where guest data lies.
    pub(super) fn data(&self) -> Rc<Node> {
        self.data_file.as_ref().unwrap_or(&self.file).node()
    }

    pub(super) fn below(&self) -> Option<Rc<Node>> {
        self.backing.borrow().as_ref().map(|child| child.node())
    }

    /// The clusters that a range touches, as a range.
    pub(super) fn clusters_of(&self, range: ByteRange) -> ByteRange {
        range.align_outward(self.g.cluster_size())
    }

    // Tables in the file.

    /// Where the file ends; its last cluster may be there in part.
    pub(super) fn file_end(&self) -> u64 {
        self.file().len().checked_next_multiple_of(self.g.cluster_size()).unwrap_or(u64::MAX)
    }

    /// A table lies in the file. What is not there would read as zeroes, and once it is written the file
    /// would reach as far as an image likes to say.
    pub(super) fn must_be_there(&self, what: &str, at: u64, len: u64) -> Result<(), Fault> {
        if len == 0 || at.checked_add(len).is_some_and(|end| end <= self.file_end()) {
            return Ok(());
        }
        Err(Fault::Damage(format!("{what} at {at:#x} ({len} bytes) lies beyond the end of the file")))
    }

    /// The filesystem says that there is nothing but a hole: zeroes, which nobody need read. What a walk over
    /// tables costs is so bounded by what the file occupies, not by how long it claims to be.
    pub(super) async fn is_hole(&self, at: u64, len: u64) -> Result<bool, Fault> {
        let end = at.saturating_add(len).min(self.file().len());
        if at >= end {
            return Ok(true);
        }
        let extent = self.file().block_status(at, end - at).await?;
        Ok(extent.zero && extent.len >= end - at)
    }

    /// Reads bytes of the file; beyond its end there are zeroes.
    pub(super) async fn read_bytes(&self, offset: u64, len: u64) -> Result<Vec<u8>, Fault> {
        read_bytes(&self.file(), &self.table_memory, offset, len).await
    }

    /// Reads a table that may be long, and mostly a hole.
    pub(super) async fn read_table(&self, offset: u64, len: u64) -> Result<Vec<u8>, Fault> {
        if self.is_hole(offset, len).await? {
            Ok(vec![0; len as usize])
        } else {
            self.read_bytes(offset, len).await
        }
    }

    /// Writes bytes to the file.
    pub(super) async fn write_bytes(&self, offset: u64, bytes: &[u8]) -> Result<(), Fault> {
        write_bytes(&self.file(), &self.table_memory, offset, bytes).await
    }

    pub(super) async fn write_pages(&self, pages: &[Page]) -> Result<(), Fault> {
        for some in pages.chunks(PAGES_AT_ONCE) {
            let writes = some.iter().map(|(at, bytes)| self.ring.boxed(self.write_bytes(*at, bytes)));
            for result in join_all(writes.collect()).await {
                result?;
            }
        }
        Ok(())
    }

    /// Makes a cluster of the file all zeroes: a new table.
    pub(super) async fn zero_host(&self, offset: u64, len: u64) -> Result<(), Fault> {
        let flags = crate::block::ZeroFlags { may_unmap: true, ..Default::default() };
        Ok(self.file().write_zeroes(offset, len, flags).await?)
    }

    /// Makes a cluster of the file all zeroes that becomes a table. Its room is taken at once: where there is none, the
    /// request that needs the table fails, and not the flush that writes it, which would take many others with it.
    pub(super) async fn zero_table(&self, offset: u64, len: u64) -> Result<(), Fault> {
        Ok(self.file().write_zeroes(offset, len, crate::block::ZeroFlags::default()).await?)
    }

    /// Takes the room, for the same reason, of a part of a table that is there already and may lie in a hole of the file.
    /// Where that cannot be asked for it is left to the place.
    pub(super) async fn take_room(&self, offset: u64, len: u64) -> Result<(), Fault> {
        let Some(file) = self.file().local_file().filter(|_| !self.read_only.get() && !self.for_check) else {
            return Ok(());
        };
        // Whole pages: they are what is written.
        let start = offset / PAGE_BYTES_MAX * PAGE_BYTES_MAX;
        let end = (offset + len).next_multiple_of(PAGE_BYTES_MAX).min(self.file().len());
        if start >= end {
            return Ok(());
        }
        match self.ring.fallocate(&file, Fallocate::Allocate, start, end - start).await {
            Err(errno) if errno.is_no_space() => Err(Fault::Io(BlockError::at(
                Operation::Write,
                self.file().driver().name(),
                start,
                end - start,
                errno,
            ))),
            _ => Ok(()),
        }
    }

    /// Loads a slice of an L2 table; more of the table if the one before it was the last to be loaded.
    pub(super) async fn load_l2(&self, at: u64) -> Result<(), Fault> {
        let len = self.meta.borrow().l2.slice_bytes();
        self.counters.loads.set(self.counters.loads.get() + 1);
        let sequential = self.load_next.get() == at;
        let table_end = self.g.cluster_start(at) + self.g.cluster_size();
        let end = if sequential { table_end.min(at + AHEAD_SLICES * len) } else { at + len };
        self.load_next.set(end);
        self.must_be_there("an L2 table", at, end - at)?;
        let bytes = self.read_bytes(at, end - at).await?;
        let mut meta = self.meta.borrow_mut();
        for (i, slice) in bytes.chunks_exact(len as usize).enumerate() {
            meta.l2.insert(at + i as u64 * len, slice.into());
        }
        Ok(())
    }

    /// Loads a slice of a refcount block.
    pub(super) async fn load_refs(&self, at: u64) -> Result<(), Fault> {
        let len = self.meta.borrow().refs.slice_bytes();
        self.counters.loads.set(self.counters.loads.get() + 1);
        self.must_be_there("a refcount block", at, len)?;
        self.take_room(at, len).await?;
        let bytes = self.read_bytes(at, len).await?;
        self.meta.borrow_mut().refs.insert(at, bytes.into());
        Ok(())
    }

    /// Writes the fixed part of the header as it is in memory. All fields that change at run time lie in
    /// one sector, so that a power cut leaves the old ones or the new ones.
    pub(super) async fn write_header(&self) -> Result<(), Fault> {
        let _turn = self.heading.take().await;
        let head = {
            let fixed = self.header.borrow().encode_fixed();
            let mut head = self.head.borrow_mut();
            let len = fixed.len().min(head.len());
            head[..len].copy_from_slice(&fixed[..len]);
            head.clone()
        };
        self.write_bytes(0, &head).await
    }

    /// Makes what was written to the files durable. A failure sticks.
    pub(super) async fn flush_files(&self) -> Result<(), Fault> {
        if let Some(errno) = self.sync.failed.get() {
            let why = "An earlier flush failed, and nobody can tell which of the writes before it are lost. \
                       Flushes of this image go on failing until it is opened anew.";
            return Err(Fault::Refused(errno, why.into()));
        }
        let mut result = self.file().flush().await;
        if let (Ok(()), Some(data_file)) = (&result, &self.data_file) {
            result = data_file.node().flush().await;
        }
        if let Err(error) = result {
            if error.errno != Errno::EAGAIN && error.errno != Errno::EINTR {
                self.sync.failed.set(Some(error.errno));
            }
            return Err(error.into());
        }
        // Tables that are taken for written may be gone: what hangs on them is not known any more.
        let losses = self.data_file.as_ref().map_or(0, |data_file| data_file.node().losses_for_good());
        if self.file().losses_for_good() + losses > 0 {
            self.sync.failed.set(Some(Errno::EIO));
            let why = "The server was lost, and what it had acknowledged and not flushed could not be written again. \
                       Flushes of this image fail until it is opened anew.";
            return Err(Fault::Refused(Errno::EIO, why.into()));
        }
        Ok(())
    }

    // Data.

    /// Reads from a driver what may lie beyond its end: there are zeroes.
    pub(super) async fn get(driver: &Rc<Node>, offset: u64, buf: Buf) -> (Buf, Result<(), Fault>) {
        let there = driver.len().saturating_sub(offset).min(buf.len() as u64) as usize;
        if there == buf.len() {
            let (buf, result) = driver.read(offset, buf).await;
            return (buf, result.map_err(Fault::Io));
        }
        let (left, mut right) = buf.split_at(there);
        right.fill_zero();
        let (left, result) = if left.is_empty() { (left, Ok(())) } else { driver.read(offset, left).await };
        match left.unsplit(right) {
            Ok(buf) => (buf, result.map_err(Fault::Io)),
            Err(_) => unreachable!("the parts of one buffer join again"),
        }
    }

    /// Writes guest data to its place.
    pub(super) async fn put(&self, host: u64, buf: SharedBuf) -> Result<(), Fault> {
        if buf.is_empty() {
            return Ok(());
        }
        self.reach_data(host.saturating_add(buf.len() as u64)).await?;
        Ok(self.data().write(host, buf, WriteFlags::default()).await?)
    }

    /// The place must not be that of a table: an image that says so is damaged, and a guest would write to it.
    pub(super) fn check_place(&self, host: u64, len: u64) -> Result<(), Fault> {
        if self.data_file.is_some() {
            return Ok(());
        }
        self.must_be_there("guest data", host, len)?;
        match self.meta.borrow().table_at(host, host + len) {
            Some(table) => Err(Fault::Damage(format!("guest data at {host:#x} lies on {table}"))),
            None => Ok(()),
        }
    }
}

/// Reads bytes of a file; beyond its end there are zeroes.
pub(super) async fn read_bytes(
    file: &Rc<Node>,
    memory: &Reserve,
    offset: u64,
    len: u64,
) -> Result<Vec<u8>, Fault> {
    let mut out = Vec::with_capacity(len as usize);
    while (out.len() as u64) < len {
        let at = offset + out.len() as u64;
        let wanted = (len - out.len() as u64).min(blockferry_ring::arena::BLOCK_MAX as u64);
        let mut lease = memory.take(wanted as usize).await;
        let n = lease.len();
        lease.fill(0, n, async |buf| Qcow2::get(file, at, buf).await).await?;
        out.extend_from_slice(lease.bytes()?);
    }
    Ok(out)
}

/// Writes bytes to a file.
pub(super) async fn write_bytes(
    file: &Rc<Node>,
    memory: &Reserve,
    offset: u64,
    bytes: &[u8],
) -> Result<(), Fault> {
    let mut done = 0;
    while done < bytes.len() {
        let mut lease = memory.take((bytes.len() - done).min(64 << 10)).await;
        let n = lease.len();
        lease.bytes()?.copy_from_slice(&bytes[done..done + n]);
        let at = offset + done as u64;
        let write = async |buf| Ok(file.write(at, buf, WriteFlags::default()).await?);
        lease.write(0, n, write).await.map_err(|fault: Fault| fault)?;
        done += n;
    }
    Ok(())
}
