//! An open file or block device: what `file` and `host_device` share.
//!
//! # Blocks
//! With O_DIRECT the kernel takes only whole blocks at aligned addresses. What fits goes straight through.
//! What does not is bounced ([`super::rewrite`]): reads by reading the blocks around, writes of parts of
//! blocks by read-modify-write, which is ordered against every other change ([`super::rewrite`]).
//!
//! # The tail
//! The last block of a file whose length is no multiple of the block cannot be written with O_DIRECT
//! without changing the length. Requests at the end of such a file go through a second, buffered handle.
//! A page that is written both ways at once can lose one of the writes, so the border lies on a boundary
//! that is a page boundary on every machine ([`TAIL_BYTES`]), and each side has one way only.
//!
//! # The end
//! A file is as long as is remembered here: what lies beyond is not read. So a change behind the end lengthens the file
//! first ([`Leaf::reach`]), while nothing else changes it, because the border moves. A device that has been made larger
//! is looked at again; one that has not, and a file that may not grow, refuse.
//!
//! # Durability
//! A flush that failed has lost data that nobody can name, and the kernel reports it once. So the
//! failure sticks: every later flush of this leaf fails as well. Of two flushes at once only one is told;
//! so a flush that went well waits for those beside it before it says so.
//!
//! # Capabilities
//! What a filesystem or device can do is found out by asking. A refusal takes the capability away, and
//! the request goes on by the next best means.

use std::cell::{Cell, RefCell};
use std::path::PathBuf;
use std::rc::Rc;

use blockferry_ring::arena::BLOCK_MAX;
use blockferry_ring::backend::OpenHow;
use blockferry_ring::op::Fallocate;
use blockferry_ring::sync::{Notify, join};
use blockferry_ring::{Aside, Buf, CopyRange, Errno, File, FileExtent, FileInfo, FileKind, Ring, SharedBuf};

use super::allocation::Allocation;
use super::length::Length;
use super::open;
use super::rewrite::{Blocks, Source, kind_of_change};
use crate::base::limits;
use crate::base::os_name;
use crate::base::planted::{Bug, is_planted};
use crate::base::range::ByteRange;
use crate::block::serial::{Claim, Serial};
use crate::block::{
    BlockError, Capabilities, CopyFrom, Extent, IoFuture, IoResult, Limits, Operation, Reserve, Resolved,
    Word, WriteFlags, ZeroFlags,
};

/// Pages are this large or smaller on every machine: the tail of a file starts at a multiple of it.
const TAIL_BYTES: u64 = 64 << 10;
/// The kernel may write zeroes out on a device that cannot do better; one such call is bounded.
const DEVICE_ZERO_STEP_BYTES: u64 = 128 << 20;
/// Buffered files take anything, but whole filesystem blocks are what they zero and give back.
const FILE_BLOCK_BYTES: u32 = 4096;

/// No file is longer.
const LEN_MAX: u64 = i64::MAX as u64;

/// The largest block of a leaf that is used with O_DIRECT.
pub(super) const ALIGN_MAX: u32 = limits::RESERVE_BYTES as u32;

/// An open file or block device.
#[derive(Debug)]
pub(super) struct Leaf {
    ring: Ring,
    name: Rc<str>,
    path: PathBuf,
    /// Another handle takes its place when the access changes ([`Leaf::reopen`]).
    file: RefCell<File>,
    /// How it was opened.
    how: RefCell<OpenHow>,
    info: FileInfo,
    len: Length,
    /// The buffered handle for the tail, where there is one.
    tail: RefCell<Option<File>>,
    capabilities: Cell<Capabilities>,
    /// Changes under way, by whole blocks.
    changes: Serial,
    bounce: Reserve,
    flush_failed: Cell<Option<Errno>>,
    /// Calls under way that may be told of a loss, by number; the next number; told when one ends.
    tellers: RefCell<Vec<u64>>,
    teller_next: Cell<u64>,
    teller_ended: Notify,
    /// What is known of holes and data.
    allocation: RefCell<Allocation>,
    /// Somebody looks; told when that ends.
    looking: Cell<bool>,
    looked: Notify,
}

/// One side of the border to the tail.
struct Side {
    file: File,
    align: u64,
    mem_align: usize,
}

/// Nobody else does the same while this lives.
struct Looking<'a>(&'a Cell<bool>, &'a Notify);

impl Drop for Looking<'_> {
    fn drop(&mut self) {
        self.0.set(false);
        self.1.notify();
    }
}

/// What can be done through such a handle, until something is refused.
fn capabilities(how: &OpenHow, info: &FileInfo) -> Capabilities {
    Capabilities {
        fua: how.write,
        discard: how.write,
        zero_fast: how.write,
        zero_unmap: how.write,
        status: info.kind == FileKind::Regular,
    }
}

/// Whether `errno` says that the operation is not to be had here. Some filesystems say EINVAL.
fn is_refusal(errno: Errno) -> bool {
    errno.is_unsupported() || errno == Errno::EINVAL
}

impl Leaf {
    /// Wraps an open file. Its block must not be larger than [`ALIGN_MAX`].
    pub(super) async fn new(
        ring: &Ring,
        aside: &Aside,
        path: PathBuf,
        file: File,
        info: FileInfo,
        how: OpenHow,
    ) -> Result<Leaf, BlockError> {
        let name: Rc<str> = os_name::from_path(&path).into();
        let bounce = Reserve::new(ring, limits::RESERVE_BYTES).map_err(|errno| {
            BlockError::new(Operation::Open, name.clone(), errno)
                .hint("All memory for I/O is in use; give the engine more of it.")
        })?;
        let leaf = Leaf {
            ring: ring.clone(),
            name,
            path,
            file: RefCell::new(file),
            capabilities: Cell::new(capabilities(&how, &info)),
            how: RefCell::new(how),
            info,
            len: Length::new(ring, info.len),
            tail: RefCell::default(),
            changes: Serial::new(ring),
            bounce,
            flush_failed: Cell::new(None),
            tellers: RefCell::default(),
            teller_next: Cell::new(0),
            teller_ended: ring.notify(),
            allocation: RefCell::default(),
            looking: Cell::new(false),
            looked: ring.notify(),
        };
        leaf.open_tail(aside, info.len)
            .await
            .map_err(|errno| BlockError::new(Operation::Open, leaf.name.clone(), errno))?;
        Ok(leaf)
    }

    pub(super) fn ring(&self) -> &Ring {
        &self.ring
    }

    pub(super) fn name(&self) -> &Rc<str> {
        &self.name
    }

    pub(super) fn file(&self) -> File {
        self.file.borrow().clone()
    }

    pub(super) fn info(&self) -> &FileInfo {
        &self.info
    }

    pub(super) fn len(&self) -> u64 {
        self.len.get()
    }

    pub(super) fn path(&self) -> &std::path::Path {
        &self.path
    }

    pub(super) fn is_read_only(&self) -> bool {
        !self.how.borrow().write
    }

    /// Goes over to reading only, or to writing too, by another handle of the same file. `ready` is given the new one
    /// before it takes the place of the old one. Nothing that changes the file is under way; reads may be.
    ///
    /// # Errors
    /// What opening says; `ESTALE` if the path leads to another file by now. Nothing has changed then.
    pub(super) async fn reopen(
        &self,
        read_only: bool,
        ready: impl FnOnce(&File) -> Result<(), BlockError>,
    ) -> IoResult {
        if read_only == self.is_read_only() {
            return Ok(());
        }
        let is_device = self.is_device();
        let old = self.how.borrow().clone();
        let how = OpenHow { write: !read_only, exclusive_device: is_device && !read_only, ..old };
        let fail = |errno| open::fail(Operation::Open, &self.path, errno);
        let aside = self.ring.aside();
        let file = aside.open(&self.path, &how).await.map_err(fail)?;
        let info = aside.info(&file).await.map_err(fail)?;
        if info.identity != self.info.identity {
            return Err(fail(Errno::ESTALE).hint(
                "Another file has taken the place of the one that is open. Move it back, or open the image anew.",
            ));
        }
        let has_tail = self.tail.borrow().is_some();
        let tail = match has_tail || !info.len.is_multiple_of(self.align()) {
            true => Some(self.tail_handle(&aside, !read_only).await.map_err(fail)?),
            false => None,
        };
        ready(&file)?;
        self.len.found(info.len);
        self.file.replace(file);
        self.tail.replace(tail);
        self.capabilities.set(capabilities(&how, &self.info));
        self.how.replace(how);
        self.forget_all();
        Ok(())
    }

    pub(super) fn capabilities(&self) -> Capabilities {
        self.capabilities.get()
    }

    pub(super) fn lose(&self, what: &'static str, change: impl FnOnce(&mut Capabilities)) {
        let before = self.capabilities.get();
        let mut after = before;
        change(&mut after);
        if after != before {
            tracing::info!(image = %self.name, "{what} is not to be had here; going on without");
            self.capabilities.set(after);
        }
    }

    pub(super) fn limits(&self) -> Limits {
        let block = if self.is_device() { self.info.offset_align } else { FILE_BLOCK_BYTES };
        Limits {
            request_align: self.info.offset_align.max(1),
            mem_align: self.info.mem_align.max(1),
            zero_align: block.max(self.info.offset_align).max(1),
            discard_align: block.max(self.info.offset_align).max(1),
            ..Limits::default()
        }
    }

    pub(super) fn allocated_bytes(&self) -> Option<u64> {
        self.ring.info(&self.file()).ok().map(|info| info.allocated)
    }

    pub(super) fn error(&self, operation: Operation, range: ByteRange, errno: Errno) -> BlockError {
        BlockError::at(operation, self.name.clone(), range.start(), range.len(), errno)
    }

    /// Holes and data of the file from `range`'s start on, at least one extent and at most `extents_max`, to `out`.
    /// `is_alone`: nobody else writes the file, so that holes may be remembered.
    pub(super) async fn extents(
        &self,
        range: ByteRange,
        extents_max: usize,
        is_alone: impl Fn() -> bool,
        out: &mut Vec<Extent>,
    ) {
        let word = if self.info.is_local { Word::Filesystem } else { Word::Claim };
        let mut tell = |found: &mut dyn Iterator<Item = FileExtent>| {
            let extent = |e: FileExtent| match e.is_hole {
                true => Extent::hole(e.end - e.start).on(word),
                false => Extent::data(e.end - e.start),
            };
            let before = out.len();
            out.extend(found.take(extents_max.max(1)).map(extent));
            out.len() > before
        };
        if !self.capabilities.get().status {
            out.push(Extent::data(range.len()));
            return;
        }
        if tell(&mut self.allocation.borrow().from(range.start(), range.end())) {
            return;
        }
        // One look at a file at a time: whoever comes meanwhile mostly finds the answer, and however many ask, others
        // have the rest of the pool.
        self.looked.until(|| (!self.looking.replace(true)).then_some(())).await;
        let _looking = Looking(&self.looking, &self.looked);
        if tell(&mut self.allocation.borrow().from(range.start(), range.end())) {
            return;
        }
        // Who asks for one extent after the other is answered from one look, who asks here and there does not pay for it.
        let goes_on = self.allocation.borrow().ends_at(range.start());
        let end = if is_alone() { self.len() } else { range.end().min(self.len()) };
        let count =
            if goes_on { limits::ALLOCATION_LOOK } else { limits::ALLOCATION_LOOK_FIRST.max(extents_max) };
        self.allocation.borrow_mut().begin();
        let found = self.ring.aside().extents(&self.file(), range.start(), end, count).await;
        self.allocation.borrow_mut().end(found.as_deref().unwrap_or_default(), is_alone());
        if let Err(errno) = found
            && is_refusal(errno)
        {
            self.lose("telling holes from data", |c| c.status = false);
        }
        let inside = |e: &FileExtent| e.start < range.end();
        let cut = |e: FileExtent| FileExtent { end: e.end.min(range.end()), ..e };
        if !tell(&mut found.unwrap_or_default().into_iter().take_while(inside).map(cut)) {
            out.push(Extent::data(range.len()));
        }
    }

    /// What is known of holes and data may no longer be believed.
    pub(super) fn forget_all(&self) {
        self.allocation.borrow_mut().clear();
    }

    /// After a change, well or badly ended, and before it is acknowledged: what was known there is not any more.
    fn forget(&self, range: ByteRange) {
        self.allocation.borrow_mut().changed(range);
    }

    fn is_device(&self) -> bool {
        self.info.kind == FileKind::Block
    }

    fn align(&self) -> u64 {
        u64::from(self.info.offset_align.max(1))
    }

    // The tail.

    /// Where the tail starts; beyond all offsets when there is none.
    fn border(&self) -> u64 {
        let len = self.len.get();
        if len.is_multiple_of(self.align()) { u64::MAX } else { len - len % TAIL_BYTES }
    }

    async fn open_tail(&self, aside: &Aside, len: u64) -> Result<(), Errno> {
        if len.is_multiple_of(self.align()) || self.tail.borrow().is_some() {
            return Ok(());
        }
        let tail = self.tail_handle(aside, !self.is_read_only()).await?;
        self.tail.replace(Some(tail));
        Ok(())
    }

    async fn tail_handle(&self, aside: &Aside, write: bool) -> Result<File, Errno> {
        let tail = aside.open(&self.path, &OpenHow { write, ..OpenHow::default() }).await?;
        if aside.info(&tail).await?.identity != self.info.identity {
            // Somebody has put another file in its place.
            return Err(Errno::ENOENT);
        }
        Ok(tail)
    }

    fn sides(&self, range: ByteRange) -> [(ByteRange, Side); 2] {
        let (left, right) = range.split_at(self.border());
        let tail = self.tail.borrow().clone().unwrap_or_else(|| self.file());
        [
            (
                left,
                Side {
                    file: self.file(),
                    align: self.align(),
                    mem_align: self.info.mem_align.max(1) as usize,
                },
            ),
            (right, Side { file: tail, align: 1, mem_align: 1 }),
        ]
    }

    /// Whether the request goes to the main handle as it is.
    fn fits(&self, range: ByteRange, aligned: bool) -> bool {
        aligned && range.is_aligned(self.align()) && range.end() <= self.border()
    }

    /// Waits until a change of `range` may go on ([`super::rewrite`]); it ends when what this gives is dropped.
    async fn enter(&self, range: ByteRange, rewrite: bool) -> Option<Claim<'_>> {
        if self.align() == 1 {
            return None;
        }
        Some(self.changes.enter(range.align_outward(self.align()), kind_of_change(rewrite)).await)
    }

    // Reading.

    pub(super) fn resolve(&self, offset: u64, len: u64) -> Resolved {
        let range = ByteRange::at_saturating(offset, len);
        if self.fits(range, true) && range.end() <= self.len.get() {
            Resolved::File { file: self.file(), offset, pin: None }
        } else {
            Resolved::Ask
        }
    }

    pub(super) fn read(&self, offset: u64, buf: Buf) -> IoFuture<'_, (Buf, IoResult)> {
        let range = ByteRange::at_saturating(offset, buf.len() as u64);
        if self.fits(range, buf.is_aligned(self.info.mem_align.max(1) as usize)) {
            self.ring.boxed(async move {
                let (buf, result) = self.get(&self.file(), offset, buf).await;
                (buf, result.map_err(|errno| self.error(Operation::Read, range, errno)))
            })
        } else {
            self.ring.boxed(self.read_parts(range, buf))
        }
    }

    async fn read_parts(&self, range: ByteRange, buf: Buf) -> (Buf, IoResult) {
        let [(left, main), (right, tail)] = self.sides(range);
        let (buf, rest) = buf.split_at(left.len() as usize);
        let (buf, first) = self.read_side(&main, left, buf).await;
        let (rest, second) = self.read_side(&tail, right, rest).await;
        let Ok(buf) = buf.unsplit(rest) else { unreachable!("the parts of one buffer join again") };
        let result = first.and(second);
        (buf, result.map_err(|errno| self.error(Operation::Read, range, errno)))
    }

    async fn read_side(&self, side: &Side, range: ByteRange, buf: Buf) -> (Buf, Result<(), Errno>) {
        if range.is_empty() {
            return (buf, Ok(()));
        }
        if range.is_aligned(side.align) && buf.is_aligned(side.mem_align) {
            return self.get(&side.file, range.start(), buf).await;
        }
        let get = async |at: u64, part: Buf| self.get(&side.file, at, part).await;
        self.blocks(side).read(range.align_outward(side.align), range, buf, get).await
    }

    fn blocks(&self, side: &Side) -> Blocks<'_> {
        Blocks { memory: &self.bounce, block: side.align, bytes_max: BLOCK_MAX as u64 }
    }

    /// Reads straight into `buf`; beyond the end of a file there are zeroes.
    async fn get(&self, file: &File, offset: u64, buf: Buf) -> (Buf, Result<(), Errno>) {
        let wanted = buf.len();
        if wanted == 0 {
            return (buf, Ok(()));
        }
        match self.ring.read(file, offset, buf).await {
            (buf, Ok(n)) if n as usize == wanted => (buf, Ok(())),
            (mut buf, Ok(n)) => {
                buf.fill_zero_from(n as usize);
                (buf, self.check_short(n as usize, wanted))
            }
            (buf, Err(errno)) => (buf, Err(errno)),
        }
    }

    /// A file may end early: zeroes follow. A device does not end within its length.
    fn check_short(&self, came: usize, wanted: usize) -> Result<(), Errno> {
        if came < wanted && self.is_device() { Err(Errno::EIO) } else { Ok(()) }
    }

    // Writing.

    pub(super) fn write(&self, offset: u64, buf: SharedBuf, flags: WriteFlags) -> IoFuture<'_, IoResult> {
        let range = ByteRange::at_saturating(offset, buf.len() as u64);
        let whole = self.fits(range, buf.is_aligned(self.info.mem_align.max(1) as usize));
        if whole && !self.is_read_only() && !range.is_empty() && range.end() <= self.len.get() {
            self.ring.boxed(async move {
                let change = self.enter(range, false).await;
                let result = self.put(&self.file(), offset, buf, flags.fua).await;
                self.forget(range);
                drop(change);
                result.map_err(|errno| self.error(Operation::Write, range, errno))
            })
        } else {
            self.ring.boxed(self.write_parts(range, buf, flags))
        }
    }

    async fn write_parts(&self, range: ByteRange, buf: SharedBuf, flags: WriteFlags) -> IoResult {
        self.check_writable(Operation::Write, range)?;
        if range.is_empty() {
            return Ok(());
        }
        self.reach(Operation::Write, range).await?;
        let rewrite = self.rewrites(range);
        let change = self.enter(range, rewrite).await;
        let result = self.put_parts(range, Source::Buf(&buf), flags.fua).await;
        self.forget(range);
        drop(change);
        result.map_err(|errno| self.error(Operation::Write, range, errno))
    }

    /// Whether writing the range means to rewrite part of a block.
    fn rewrites(&self, range: ByteRange) -> bool {
        let (left, _) = range.split_at(self.border());
        !left.is_empty() && !left.is_aligned(self.align())
    }

    /// Writes any range, on both sides of the border. The change is registered already.
    async fn put_parts(&self, range: ByteRange, source: Source<'_>, fua: bool) -> Result<(), Errno> {
        for (part, side) in self.sides(range) {
            if part.is_empty() {
                continue;
            }
            let skipped = (part.start() - range.start()) as usize;
            let whole = part.is_aligned(side.align);
            match source {
                Source::Buf(buf) => {
                    let buf = buf.slice(skipped, part.len() as usize);
                    if whole && buf.is_aligned(side.mem_align) {
                        self.put(&side.file, part.start(), buf, fua).await?;
                    } else {
                        self.rewrite(&side, part, Source::Buf(&buf), fua).await?;
                    }
                }
                Source::Zeroes => self.rewrite(&side, part, source, fua).await?,
            }
        }
        Ok(())
    }

    /// Writes a range by way of bounce memory, reading first what belongs to others in its first and last block.
    async fn rewrite(
        &self,
        side: &Side,
        range: ByteRange,
        source: Source<'_>,
        fua: bool,
    ) -> Result<(), Errno> {
        let get = async |at: u64, part: Buf| self.get(&side.file, at, part).await;
        let put = async |at: u64, buf: SharedBuf| self.put(&side.file, at, buf, fua).await;
        self.blocks(side).rewrite(range.align_outward(side.align), range, source, get, put).await
    }

    /// Writes `buf` as it is. Where single writes cannot be made durable, a flush follows.
    async fn put(&self, file: &File, offset: u64, buf: SharedBuf, fua: bool) -> Result<(), Errno> {
        if !fua {
            return self.ring.write(file, offset, buf, false).await.map(drop);
        }
        if self.capabilities.get().fua {
            let write = self.ring.write(file, offset, buf.clone(), true);
            let result = if self.align() == 1 {
                // The kernel may tell us here, once, of a page that an earlier write left behind.
                self.told(write, |errno| errno == Errno::EIO).await
            } else {
                write.await
            };
            match result {
                Err(errno) if errno.is_unsupported() => {
                    self.lose("a durable single write", |c| c.fua = false);
                }
                result => return result.map(drop),
            }
        }
        self.ring.write(file, offset, buf, false).await?;
        self.sync().await
    }

    fn check_writable(&self, operation: Operation, range: ByteRange) -> IoResult {
        if self.is_read_only() {
            return Err(self
                .error(operation, range, Errno::EROFS)
                .because("The image was opened read-only."));
        }
        Ok(())
    }

    // Copying without reading.

    /// See [`crate::block::Driver::copy_range`].
    pub(super) async fn copy_range(&self, from: CopyFrom, offset: u64) -> IoResult {
        let range = ByteRange::at_saturating(offset, from.len);
        self.check_writable(Operation::Write, range)?;
        if range.is_empty() {
            return Ok(());
        }
        self.reach(Operation::Write, range).await?;
        let change = self.enter(range, false).await;
        let (from_offset, len) = (from.offset, from.len);
        let place = CopyRange { from_offset, to_offset: offset, len };
        let result = self.ring.copy_range(&from.file, &self.file(), place, from.how).await;
        self.forget(range);
        drop(change);
        match result {
            Ok(n) if n == len => Ok(()),
            // The file that is read is shorter than whoever asked thought.
            Ok(_) => Err(self.error(Operation::Write, range, Errno::EIO)),
            Err(errno) => Err(self.error(Operation::Write, range, errno)),
        }
    }

    // Flushing.

    pub(super) async fn flush(&self) -> IoResult {
        if self.is_read_only() {
            return Ok(());
        }
        self.sync().await.map_err(|errno| {
            let error = BlockError::new(Operation::Flush, self.name.clone(), errno);
            match self.flush_failed.get() {
                Some(_) => error.hint(
                    "Once a flush has failed, nobody can tell which of the writes since the last good flush \
                     are lost. Flushes of this image go on failing until it is opened anew.",
                ),
                None => error,
            }
        })
    }

    async fn sync(&self) -> Result<(), Errno> {
        if let Some(errno) = self.flush_failed.get() {
            return Err(errno);
        }
        let tail = self.tail.borrow().clone();
        let main = self.ring.sync(&self.file(), true);
        let both = async {
            match tail {
                Some(tail) => {
                    let (first, second) = join(main, self.ring.sync(&tail, true)).await;
                    first.and(second)
                }
                None => main.await,
            }
        };
        // These did not get as far as the disk.
        let passes = |errno| errno == Errno::EAGAIN || errno == Errno::EINTR;
        self.told(both, |errno| !passes(errno)).await.map(drop)
    }

    /// A call by which the kernel may tell of a loss; `is_loss` says which of its errors do. The kernel tells one
    /// of those that ask at the same time, and the others hear that all is well. So whoever hears that waits for all
    /// that were under way by then.
    async fn told<T>(
        &self,
        call: impl Future<Output = Result<T, Errno>>,
        is_loss: impl Fn(Errno) -> bool,
    ) -> Result<T, Errno> {
        let number = self.teller_next.get();
        self.teller_next.set(number + 1);
        self.tellers.borrow_mut().push(number);
        let result = call.await;
        if let Err(errno) = result
            && is_loss(errno)
        {
            self.flush_failed.set(Some(errno));
        }
        self.tellers.borrow_mut().retain(|other| *other != number);
        self.teller_ended.notify();
        let value = result?;
        let before = self.teller_next.get();
        let all_told = || self.tellers.borrow().iter().all(|other| *other >= before).then_some(());
        self.teller_ended.until(all_told).await;
        self.flush_failed.get().map_or(Ok(value), Err)
    }

    // Zeroes and discards.

    pub(super) async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> IoResult {
        let range = ByteRange::at_saturating(offset, len);
        self.check_writable(Operation::WriteZeroes, range)?;
        if range.is_empty() {
            return Ok(());
        }
        self.reach(Operation::WriteZeroes, range).await?;
        let middle = self.whole_blocks(range);
        let change = self.enter(range, middle != Some(range)).await;
        let result = self.zero(range, middle, flags).await;
        self.forget(range);
        drop(change);
        result.map_err(|errno| self.error(Operation::WriteZeroes, range, errno))
    }

    async fn zero(&self, range: ByteRange, middle: Option<ByteRange>, flags: ZeroFlags) -> Result<(), Errno> {
        match middle {
            Some(middle) => {
                // The part that may be refused comes first.
                self.zero_blocks(middle, flags).await?;
                let (head, rest) = range.split_at(middle.start());
                let (_, tail) = rest.split_at(middle.end());
                self.put_parts(head, Source::Zeroes, false).await?;
                self.put_parts(tail, Source::Zeroes, false).await?;
            }
            None => self.put_parts(range, Source::Zeroes, false).await?,
        }
        if flags.fua { self.sync().await } else { Ok(()) }
    }

    /// The part of `range` that consists of whole blocks; the end of a file ends its last block.
    fn whole_blocks(&self, range: ByteRange) -> Option<ByteRange> {
        let end = if range.end() == self.len.get() {
            range.end()
        } else {
            range.end() - range.end() % self.align()
        };
        let start = range.start().next_multiple_of(self.align());
        ByteRange::new(start, end).ok().filter(|r| !r.is_empty())
    }

    async fn zero_blocks(&self, range: ByteRange, flags: ZeroFlags) -> Result<(), Errno> {
        let step = if self.is_device() { DEVICE_ZERO_STEP_BYTES } else { u64::MAX };
        for piece in range.chunks(step) {
            if flags.may_unmap && self.capabilities.get().zero_unmap {
                match self.fallocate(Fallocate::PunchHole, piece).await {
                    Err(errno) if is_refusal(errno) => {
                        self.lose("zeroing by giving space back", |c| c.zero_unmap = false);
                    }
                    result => {
                        result?;
                        continue;
                    }
                }
            }
            // A device that cannot zero has the kernel write the zeroes out: no good where that is ruled out.
            if self.capabilities.get().zero_fast && !(self.is_device() && flags.no_fallback) {
                match self.fallocate(Fallocate::ZeroRange, piece).await {
                    Err(errno) if is_refusal(errno) => {
                        self.lose("zeroing without writing", |c| c.zero_fast = false);
                    }
                    result => {
                        result?;
                        continue;
                    }
                }
            }
            if flags.no_fallback {
                return Err(Errno::EOPNOTSUPP);
            }
            self.put_parts(piece, Source::Zeroes, false).await?;
        }
        Ok(())
    }

    async fn fallocate(&self, mode: Fallocate, range: ByteRange) -> Result<(), Errno> {
        self.ring.fallocate(&self.file(), mode, range.start(), range.len()).await.map(drop)
    }

    pub(super) async fn discard(&self, offset: u64, len: u64) -> IoResult {
        let range = ByteRange::at_saturating(offset, len);
        self.check_writable(Operation::Discard, range)?;
        // Behind the end there is nothing to give back.
        let (range, _) = range.split_at(self.len.get());
        let Some(range) = self.whole_blocks(range) else { return Ok(()) };
        let change = self.enter(range, false).await;
        let result = self.give_back(range).await;
        self.forget(range);
        drop(change);
        result.map_err(|errno| self.error(Operation::Discard, range, errno))
    }

    async fn give_back(&self, range: ByteRange) -> Result<(), Errno> {
        if self.is_device() && self.capabilities.get().discard {
            match self.ring.discard(&self.file(), range.start(), range.len()).await {
                Err(errno) if is_refusal(errno) => self.lose("discard", |c| c.discard = false),
                result => return result.map(drop),
            }
        }
        if self.capabilities.get().zero_unmap {
            match self.fallocate(Fallocate::PunchHole, range).await {
                Err(errno) if is_refusal(errno) => self.lose("giving space back", |c| {
                    (c.discard, c.zero_unmap) = (false, false);
                }),
                result => return result,
            }
        }
        Ok(())
    }

    // Length.

    pub(super) async fn set_len(&self, len: u64) -> IoResult {
        let whole = ByteRange::first(len);
        self.check_writable(Operation::Resize, whole)?;
        let changing = self.len.change().await;
        if len == self.len.get() {
            return Ok(());
        }
        let fail = |errno| BlockError::new(Operation::Resize, self.name.clone(), errno);
        if self.is_device() {
            // It may have been made larger; whoever asked looks whether that is enough.
            changing.set(self.ring.info(&self.file()).map_err(fail)?.len);
            return Err(fail(Errno::EOPNOTSUPP).because("A block device has the length that it has."));
        }
        let aside = self.ring.aside();
        self.open_tail(&aside, len).await.map_err(fail)?;
        aside.set_len(&self.file(), len).await.map_err(fail)?;
        changing.set(len);
        self.forget_all();
        Ok(())
    }

    /// Before `range` is changed: the file reaches to its end.
    async fn reach(&self, operation: Operation, range: ByteRange) -> IoResult {
        if range.end() <= self.len.get() || is_planted(Bug::LengthNotFollowed) {
            return Ok(());
        }
        // What is under way by the old border ends first, and what comes now waits for the new one.
        let _alone = self.enter(ByteRange::first(LEN_MAX), true).await;
        let changing = self.len.change().await;
        let known = self.len.get();
        if range.end() <= known {
            return Ok(());
        }
        let fail = |errno| self.error(operation, range, errno);
        // What others have made longer is not cut off.
        let aside = self.ring.aside();
        let found = aside.info(&self.file()).await.map_err(fail)?.len;
        if range.end() <= found {
            tracing::info!(image = %self.name, known, found, "it has been made longer");
            self.open_tail(&aside, found).await.map_err(fail)?;
            changing.set(found);
            self.forget_all();
            return Ok(());
        }
        if self.is_device() {
            return Err(fail(Errno::ENOSPC).because(format!("The device ends at {found}; make it larger.")));
        }
        let Some(len) = range.end().checked_next_multiple_of(self.align()).filter(|len| *len <= LEN_MAX)
        else {
            return Err(fail(Errno::EFBIG));
        };
        aside.set_len(&self.file(), len).await.map_err(fail)?;
        changing.set(len);
        self.forget_all();
        Ok(())
    }
}
