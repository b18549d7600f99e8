//! An image on GlusterFS as a driver of the block layer.
//!
//! Reads, writes, flushes, discards and zeroes are asynchronous calls of the library, bounded in number; opening, asking
//! for holes and changing the length block and go to the offload pool. The library takes any offset and length.
//!
//! # Results
//! A call has moved all bytes, or none (a read behind the end of the file, whose memory is zeroed here), or it has failed:
//! one that moved a part counts as an error, unless the file ends there.
//!
//! # Durability
//! A flush that fails has lost data that nobody can name: GlusterFS drops it from the client's cache, and some versions
//! lose the file handle with it. From then on every request of this image fails, until it is opened anew. Flushes go one
//! at a time, and one flush serves all who asked for it before it began, so nobody is told of success while another flush
//! fails. The same holds when the library says that the file's descriptor went bad (`EBADFD`): a brick went down and came
//! back, what it had not flushed may be gone, and a later flush would not say so.
//!
//! # Caches
//! Nothing of an image is in this machine's page cache, whatever cache mode is said. Whether bricks go past theirs is for
//! the volume to say (`performance.strict-o-direct`, `network.remote-dio`): with O_DIRECT from here they would refuse reads
//! of parts of blocks.
//!
//! # Bricks that go away
//! The library fails requests when it loses the last brick that could serve them: at once when the connection breaks, after
//! the volume's `network.ping-timeout` (42 s) when it hangs. It makes connections anew by itself, so requests that are tried
//! again (by an error policy) come through when the brick is back.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;

use blockferry_ring::sync::{Either, Notify, either};
use blockferry_ring::{
    Buf, Completer, Errno, Keep, Nanos, Operation as RingOperation, PlainKind, Ring, SharedBuf,
};

use super::allocation::{Place, Written, extent_at};
use super::api::Api;
use super::connection::Connection;
use super::file::{OpenFile, unlink};
use super::opening::{OpenHow, open_in_time};
use crate::base::limits::{
    COPY_BYTES_REMOTE, DISK_LEN_MAX, GLUSTER_IN_FLIGHT_MAX, GLUSTER_LOOK_NS_MAX, GLUSTER_RANGE_BYTES_MAX,
    GLUSTER_STATUS_AGE_NS_MAX,
};
use crate::base::range::ByteRange;
use crate::block::{
    BlockError, Capabilities, Driver, Extent, IoFuture, IoResult, Limits, Operation, Permissions, Word,
    WriteFlags, ZeroFlags,
};
use crate::protocol::length::{Changing, Length};

/// What bricks allocate and give back in.
const BLOCK_BYTES: u32 = 4096;
/// Zeroes to write where the library does not know how: one piece.
const ZERO_PIECE_BYTES: usize = 64 << 10;

/// An image on a volume.
#[derive(Debug)]
pub struct GlusterNode {
    ring: Ring,
    name: Rc<str>,
    /// How it was opened; nothing is made when it is opened otherwise.
    how: OpenHow,
    api: Option<&'static Api>,
    /// Another one takes its place when the access changes.
    file: RefCell<Option<Arc<OpenFile>>>,
    identity: (u64, u64),
    allocated: Cell<u64>,
    read_only: Cell<bool>,
    len: Length,
    capabilities: Cell<Capabilities>,
    in_flight: Cell<usize>,
    /// Told when a call ends, a flush ends, or the cursor is free.
    changed: Notify,
    flushes: Cell<Flushes>,
    /// A flush failed with this.
    broken: Cell<Option<Errno>>,
    /// The file's cursor is being moved.
    seeking: Cell<bool>,
    /// Since the image was opened. What the bricks say of it is not believed, flushed or not: while a brick was down, holes
    /// were told of where flushed data lay.
    written: RefCell<Written>,
    /// The latest extent that was found, whether it is data, and when.
    known: Cell<Option<(ByteRange, bool, Nanos)>>,
    /// Telling holes from data has failed.
    status_failed: Cell<bool>,
    /// Somebody looks for the image by its name.
    looking: Rc<Cell<bool>>,
    /// Changes that began, to see whether one came between a question and its answer.
    changes: Cell<u64>,
    /// So many of them are durable.
    flushed: Cell<u64>,
}

/// Flushes that have begun, and the number of the latest that went well.
#[derive(Clone, Copy, Debug, Default)]
struct Flushes {
    begun: u64,
    done: u64,
    running: bool,
}

/// Room for one call of the library.
struct Room<'a>(&'a GlusterNode);

impl Drop for Room<'_> {
    fn drop(&mut self) {
        self.0.in_flight.set(self.0.in_flight.get() - 1);
        self.0.changed.notify();
    }
}

/// The file's cursor.
struct Cursor<'a>(&'a GlusterNode);

impl Drop for Cursor<'_> {
    fn drop(&mut self) {
        self.0.seeking.set(false);
        self.0.changed.notify();
    }
}

/// Whether the library or the volume does not do this at all.
fn is_refusal(errno: Errno) -> bool {
    errno.is_unsupported() || errno == Errno::EINVAL
}

/// Whether the library says that the file's descriptor is of no use any more: a brick came back without it.
fn is_bad_descriptor(errno: Errno) -> bool {
    errno == Errno::EBADFD || errno == Errno::EBADF
}

fn capabilities(read_only: bool, can_tell: bool) -> Capabilities {
    Capabilities {
        fua: false,
        discard: !read_only,
        zero_fast: !read_only,
        zero_unmap: !read_only,
        status: can_tell,
    }
}

impl GlusterNode {
    /// Opens an image, or makes one ([`OpenHow::create`]: an empty file).
    pub async fn open(ring: &Ring, how: OpenHow) -> Result<Rc<GlusterNode>, BlockError> {
        GlusterNode::open_with(ring, how, None).await
    }

    pub(super) async fn open_with(
        ring: &Ring,
        how: OpenHow,
        api: Option<&'static Api>,
    ) -> Result<Rc<GlusterNode>, BlockError> {
        let name: Rc<str> = how.image.to_string().into();
        let opened = open_in_time(ring, &name, &how, api).await?;
        Ok(Rc::new(GlusterNode {
            ring: ring.clone(),
            name,
            api,
            identity: opened.facts.identity,
            allocated: Cell::new(opened.facts.allocated),
            read_only: Cell::new(how.read_only),
            len: Length::new(ring, opened.len),
            capabilities: Cell::new(capabilities(how.read_only, opened.can_tell)),
            file: RefCell::new(Some(Arc::new(opened.file))),
            how: OpenHow { create: false, ..how },
            in_flight: Cell::new(0),
            changed: ring.notify(),
            flushes: Cell::default(),
            broken: Cell::new(None),
            seeking: Cell::new(false),
            written: RefCell::default(),
            known: Cell::new(None),
            status_failed: Cell::new(false),
            looking: Rc::default(),
            changes: Cell::new(0),
            flushed: Cell::new(0),
        }))
    }

    /// Removes an image from its volume.
    pub async fn remove(ring: &Ring, how: OpenHow) -> IoResult {
        let name = how.image.to_string();
        let result = ring.offload(move || {
            let api = Api::get().map_err(|_| Errno::ENOSYS)?;
            let connection = Connection::shared(api, &how.image, &how.logging)?;
            unlink(&connection, &how.image.path)
        });
        let result = result.await.and_then(|result| result);
        result.map_err(|errno| {
            BlockError::new(Operation::Create, name, errno).hint("It could not be removed again")
        })
    }

    /// Looks whether the image is on its volume still, and not cut. Others' lengthening is seen late on a volume, and does
    /// no harm. What hangs or is not reachable has not changed as far as anybody knows; requests will tell.
    async fn find(&self, by_name: bool) -> IoResult {
        if self.looking.replace(true) {
            return Ok(());
        }
        let (before, file, path) = (self.len.get(), self.file(), self.how.image.path.clone());
        let (ring, looking, found) = (self.ring.clone(), self.looking.clone(), self.ring.one_shot());
        let told = found.clone();
        self.ring.spawn(async move {
            let look = ring.offload(move || if by_name { file.facts_by_name(&path) } else { file.facts() });
            let facts = look.await.and_then(|facts| facts);
            looking.set(false);
            told.give(facts);
        });
        let facts = match either(found.take(), self.ring.sleep(GLUSTER_LOOK_NS_MAX)).await {
            Either::First(facts) => facts,
            Either::Second(()) => return Ok(()),
        };
        let fail = |errno, hint: &str| Err(self.error(Operation::Find, None, errno).hint(hint));
        match facts {
            Err(Errno::ENOENT) if by_name => {
                fail(Errno::ENOENT, "Somebody has removed it while it was in use.")
            }
            Ok(facts) if facts.identity != self.identity => {
                fail(Errno::ESTALE, "Somebody has put another file in its place while it was in use.")
            }
            Ok(facts) if facts.len < before.min(self.len.get()) => {
                fail(Errno::ESTALE, "Somebody has cut it while it was in use.")
            }
            _ => Ok(()),
        }
    }

    fn error(&self, operation: Operation, range: Option<ByteRange>, errno: Errno) -> BlockError {
        if is_bad_descriptor(errno) && !self.read_only.get() && self.broken.get().is_none() {
            tracing::error!(image = %self.name, %errno, "the file's descriptor went bad: the image is not used any more");
            self.broken.set(Some(errno));
        }
        let place = range.map(|range| (range.start(), range.len()));
        let error = BlockError { place, ..BlockError::new(operation, self.name.clone(), errno) };
        if self.broken.get().is_some() {
            return error.hint(
                "A flush of this image failed, or its descriptor went bad: what was written before may be lost, and \
                 GlusterFS does not say what. The image is not used any more; open it anew",
            );
        }
        match errno {
            Errno::ENOTCONN | Errno::ETIMEDOUT => {
                error.hint("No brick of the volume that could do this is reachable")
            }
            _ => error,
        }
    }

    fn lose(&self, what: &'static str, change: impl FnOnce(&mut Capabilities)) {
        let mut capabilities = self.capabilities.get();
        change(&mut capabilities);
        if capabilities != self.capabilities.replace(capabilities) {
            tracing::info!(image = %self.name, "{what} is not to be had here; going on without");
        }
    }

    // Calls.

    #[cfg(test)]
    pub(super) fn connection_address(&self) -> usize {
        self.file().connection_address()
    }

    fn check_usable(&self) -> Result<(), Errno> {
        match self.broken.get() {
            Some(_) => Err(Errno::EIO),
            None => Ok(()),
        }
    }

    /// Waits for its turn; a flush may have failed meanwhile.
    async fn room(&self) -> Result<Room<'_>, Errno> {
        let has_room = || (self.in_flight.get() < GLUSTER_IN_FLIGHT_MAX).then_some(());
        self.changed.until(has_room).await;
        self.check_usable()?;
        self.in_flight.set(self.in_flight.get() + 1);
        Ok(Room(self))
    }

    fn file(&self) -> Arc<OpenFile> {
        // It is taken only by `drop`.
        match &*self.file.borrow() {
            Some(file) => file.clone(),
            None => unreachable!("the file is there until the image is dropped"),
        }
    }

    fn keep(&self) -> (Arc<OpenFile>, Keep) {
        (self.file(), self.file())
    }

    fn call(&self, start: impl FnOnce(&OpenFile, Completer)) -> RingOperation<PlainKind> {
        let (file, keep) = self.keep();
        self.ring.external(keep, |completer| start(&file, completer))
    }

    async fn read_all(&self, offset: u64, buf: Buf) -> (Buf, Result<(), Errno>) {
        let len = buf.len();
        if len == 0 {
            return (buf, Ok(()));
        }
        let _room = match self.room().await {
            Ok(room) => room,
            Err(errno) => return (buf, Err(errno)),
        };
        let (file, keep) = self.keep();
        let (mut buf, result) = self
            .ring
            .external_read(buf, keep, |mem, completer| file.start_read(offset, mem, completer))
            .await;
        match result {
            Err(errno) => (buf, Err(errno)),
            Ok(n) if n as usize >= len => (buf, Ok(())),
            Ok(0) => {
                buf.fill_zero();
                (buf, Ok(()))
            }
            Ok(n) => self.read_tail(offset, n as usize, buf).await,
        }
    }

    /// A read ended short after `done` bytes: that is right where the file ends, and an error elsewhere.
    async fn read_tail(&self, offset: u64, done: usize, buf: Buf) -> (Buf, Result<(), Errno>) {
        let (head, tail) = buf.split_at(done);
        let (file, keep) = self.keep();
        let from = offset + done as u64;
        let (mut tail, result) =
            self.ring.external_read(tail, keep, |mem, completer| file.start_read(from, mem, completer)).await;
        let result = match result {
            Ok(0) => {
                tail.fill_zero();
                Ok(())
            }
            Ok(_) => Err(Errno::EIO),
            Err(errno) => Err(errno),
        };
        match head.unsplit(tail) {
            Ok(buf) => (buf, result),
            Err(_) => unreachable!("the parts of one buffer join again"),
        }
    }

    /// A change of `range`, with the bookkeeping around it.
    async fn change(
        &self,
        range: ByteRange,
        work: impl Future<Output = Result<(), Errno>>,
    ) -> Result<(), Errno> {
        self.check_usable()?;
        self.touched(range);
        let result = work.await;
        // Once more: a flush in between may not have covered it.
        self.touched(range);
        result
    }

    fn touched(&self, range: ByteRange) {
        self.changes.set(self.changes.get() + 1);
        self.written.borrow_mut().add(range);
        if self.known.get().is_some_and(|(known, ..)| known.overlaps(range)) {
            self.known.set(None);
        }
    }

    async fn write_all(&self, offset: u64, buf: SharedBuf) -> Result<(), Errno> {
        let len = buf.len();
        if len == 0 {
            return Ok(());
        }
        let _room = self.room().await?;
        let (file, keep) = self.keep();
        let write =
            self.ring.external_write(buf, keep, |mem, completer| file.start_write(offset, mem, completer));
        // The reference takes 0 for success here, too. What was not written is not acknowledged in this house.
        if write.await? as usize == len { Ok(()) } else { Err(Errno::EIO) }
    }

    /// Makes what was acknowledged durable: by a flush that begins after this call.
    async fn flush_all(&self) -> Result<(), Errno> {
        let wanted = self.flushes.get().begun + 1;
        loop {
            self.check_usable()?;
            if self.flushes.get().done >= wanted {
                return Ok(());
            }
            if !self.flushes.get().running {
                self.flush_now().await?;
                continue;
            }
            self.changed.until(|| (!self.flushes.get().running).then_some(())).await;
        }
    }

    async fn flush_now(&self) -> Result<(), Errno> {
        let number = self.flushes.get().begun + 1;
        self.flushes.set(Flushes { begun: number, running: true, ..self.flushes.get() });
        let changes = self.changes.get();
        // No room is asked for: flushes go one at a time.
        let result = self.call(|file, completer| file.start_sync(completer)).await;
        let mut flushes = Flushes { running: false, ..self.flushes.get() };
        match result {
            Ok(_) => {
                flushes.done = number;
                self.flushed.set(changes);
            }
            Err(errno) => {
                tracing::error!(image = %self.name, %errno, "a flush failed: the image is not used any more");
                self.broken.set(Some(errno));
            }
        }
        self.flushes.set(flushes);
        self.changed.notify();
        result.map(drop)
    }

    // Zeroes and discards.

    async fn zero_all(&self, range: ByteRange, flags: ZeroFlags) -> Result<(), Errno> {
        for piece in range.chunks(GLUSTER_RANGE_BYTES_MAX) {
            self.zero_piece(piece, flags).await?;
        }
        Ok(())
    }

    async fn zero_piece(&self, range: ByteRange, flags: ZeroFlags) -> Result<(), Errno> {
        let (at, len) = (range.start(), range.len());
        // A discard of GlusterFS punches a hole: what is punched reads as zeroes.
        if flags.may_unmap && self.capabilities.get().zero_unmap {
            match self.call_in_room(|file, completer| file.start_discard(at, len, completer)).await {
                Err(errno) if is_refusal(errno) => self.lose("punching holes", |can| {
                    (can.zero_unmap, can.discard) = (false, false);
                }),
                result => return result,
            }
        }
        if self.capabilities.get().zero_fast {
            match self.call_in_room(|file, completer| file.start_zeroes(at, len, completer)).await {
                Err(errno) if is_refusal(errno) => self.lose("zeroing", |can| can.zero_fast = false),
                result => return result,
            }
        }
        if flags.no_fallback {
            return Err(Errno::EOPNOTSUPP);
        }
        let mut buf = self.ring.alloc(ZERO_PIECE_BYTES).await;
        buf.fill_zero();
        let zeroes = buf.freeze();
        for piece in range.chunks(ZERO_PIECE_BYTES as u64) {
            self.write_all(piece.start(), zeroes.slice(0, piece.len() as usize)).await?;
        }
        Ok(())
    }

    async fn call_in_room(&self, start: impl FnOnce(&OpenFile, Completer)) -> Result<(), Errno> {
        let _room = self.room().await?;
        self.call(start).await.map(drop)
    }

    async fn discard_all(&self, range: ByteRange) -> Result<(), Errno> {
        for piece in range.chunks(GLUSTER_RANGE_BYTES_MAX) {
            if !self.capabilities.get().discard {
                return Ok(());
            }
            let (at, len) = (piece.start(), piece.len());
            match self.call_in_room(|file, completer| file.start_discard(at, len, completer)).await {
                Err(errno) if is_refusal(errno) => self.lose("punching holes", |can| {
                    (can.zero_unmap, can.discard) = (false, false);
                }),
                result => result?,
            }
        }
        Ok(())
    }

    // Allocation.

    async fn status(&self, range: ByteRange) -> Result<Extent, Errno> {
        self.check_usable()?;
        let Some(range) = range.intersect(ByteRange::first(self.len.get())) else {
            return Ok(Extent::data(range.len()));
        };
        if !self.capabilities.get().status {
            return Ok(Extent::data(range.len()));
        }
        // No look is needed, and no turn of the cursor.
        if let Place::Written(end) = self.written.borrow().at(range.start()) {
            return Ok(Extent::data(end.min(range.end()) - range.start()));
        }
        let (found, is_data) = match self.known_at(range.start()) {
            Some(known) => known,
            None => match self.seek(range.start()).await {
                Ok(found) => found,
                // Where holes lie is a help and never a need; what is broken besides, reads and writes will tell.
                Err(errno) => {
                    if !self.status_failed.replace(true) {
                        tracing::warn!(image = self.name(), %errno, "the volume cannot tell where holes are: they count as data");
                    }
                    return Ok(Extent::data(range.len()));
                }
            },
        };
        let len = found.end().min(range.end()) - range.start();
        Ok(if is_data { Extent::data(len) } else { Extent::hole(len).on(Word::Claim) })
    }

    fn known_at(&self, offset: u64) -> Option<(ByteRange, bool)> {
        let (range, is_data, at) = self.known.get()?;
        let is_fresh = self.ring.now() <= at.saturating_add(GLUSTER_STATUS_AGE_NS_MAX);
        (is_fresh && range.contains(offset)).then_some((range, is_data))
    }

    /// The extent at `offset`: data where it was written here, else what the bricks say, up to the next such place.
    async fn seek(&self, offset: u64) -> Result<(ByteRange, bool), Errno> {
        self.changed.until(|| (!self.seeking.get()).then_some(())).await;
        self.seeking.set(true);
        let _cursor = Cursor(self);
        if let Some(known) = self.known_at(offset) {
            return Ok(known);
        }
        let until = match self.written.borrow().at(offset) {
            Place::Written(end) => return Ok((ByteRange::at_saturating(offset, end - offset), true)),
            Place::Untouched(end) => end,
        };
        let (changes, end, file) = (self.changes.get(), self.len.get(), self.file());
        let found = self
            .ring
            .offload(move || {
                let data = file.seek(offset, libc::SEEK_DATA);
                extent_at(offset, end, data, || file.seek(offset, libc::SEEK_HOLE))
            })
            .await?;
        let unknown = (ByteRange::at_saturating(offset, end - offset), true);
        let Some((range, is_data)) = found else { return Ok(unknown) };
        let range = ByteRange::at_saturating(offset, range.end().min(until) - offset);
        if self.changes.get() == changes {
            self.known.set(Some((range, is_data, self.ring.now())));
        }
        Ok((range, is_data))
    }

    fn check_writable(&self, operation: Operation, range: ByteRange) -> IoResult {
        match self.read_only.get() {
            true => Err(self.error(operation, Some(range), Errno::EROFS)),
            false => Ok(()),
        }
    }

    async fn resize(&self, len: u64) -> Result<(), Errno> {
        self.check_usable()?;
        if len > DISK_LEN_MAX {
            return Err(Errno::EFBIG);
        }
        let changing = self.len.change().await;
        self.resize_alone(len, &changing).await
    }

    /// Before something behind its end is changed: the file reaches so far.
    async fn reach(&self, end: u64) -> Result<(), Errno> {
        if end <= self.len.get() {
            return Ok(());
        }
        let changing = self.len.change().await;
        match self.len.get() {
            len if end <= len => Ok(()),
            _ if end > DISK_LEN_MAX => Err(Errno::EFBIG),
            _ => self.resize_alone(end, &changing).await,
        }
    }

    async fn resize_alone(&self, len: u64, changing: &Changing<'_>) -> Result<(), Errno> {
        let file = self.file();
        self.ring.offload(move || file.set_len(len)).await??;
        changing.set(len);
        self.known.set(None);
        self.changes.set(self.changes.get() + 1);
        Ok(())
    }

    /// Goes over to reading only, or to writing too, by another handle of the same file.
    async fn reopen_as(&self, read_only: bool) -> IoResult {
        if read_only == self.read_only.get() {
            return Ok(());
        }
        if read_only {
            self.flush_all().await.map_err(|errno| self.error(Operation::Flush, None, errno))?;
        }
        let how = OpenHow { read_only, ..self.how.clone() };
        let opened = open_in_time(&self.ring, &self.name, &how, self.api).await?;
        if opened.facts.identity != self.identity {
            return Err(BlockError::new(Operation::Open, self.name.clone(), Errno::ESTALE).hint(
                "Another file has taken the place of the one that is open. Move it back, or open the image anew.",
            ));
        }
        let old = self.file.replace(Some(Arc::new(opened.file)));
        self.close(old, false);
        self.read_only.set(read_only);
        self.capabilities.set(capabilities(read_only, opened.can_tell));
        self.len.found(opened.len);
        self.known.set(None);
        Ok(())
    }

    /// Closing blocks: the pool does it, or, when the ring ends with this image, whoever drops the task.
    fn close(&self, file: Option<Arc<OpenFile>>, must_sync: bool) {
        let (ring, name) = (self.ring.clone(), self.name.to_string());
        self.ring.spawn(async move {
            let close = move || {
                // Nobody asked for it, but the library drops what it has not sent when the program ends.
                if must_sync
                    && let Some(file) = &file
                    && let Err(errno) = file.sync()
                {
                    tracing::error!(image = %name, %errno, "what was written since the latest flush may be lost");
                }
                drop(file);
            };
            let _ = ring.offload(close).await;
        });
    }
}

impl Drop for GlusterNode {
    fn drop(&mut self) {
        let is_dirty = self.changes.get() != self.flushed.get();
        let must_sync = is_dirty && !self.read_only.get() && self.broken.get().is_none();
        let file = self.file.take();
        self.close(file, must_sync);
    }
}

impl Driver for GlusterNode {
    fn kind(&self) -> &'static str {
        "gluster"
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> u64 {
        self.len.get()
    }

    fn is_read_only(&self) -> bool {
        self.read_only.get()
    }

    fn limits(&self) -> Limits {
        Limits {
            zero_align: BLOCK_BYTES,
            discard_align: BLOCK_BYTES,
            transfer_best: COPY_BYTES_REMOTE as u32,
            ..Limits::default()
        }
    }

    fn capabilities(&self) -> Capabilities {
        self.capabilities.get()
    }

    fn read(&self, offset: u64, buf: Buf) -> IoFuture<'_, (Buf, IoResult)> {
        self.ring.boxed(async move {
            let range = ByteRange::at_saturating(offset, buf.len() as u64);
            let (buf, result) = self.read_all(offset, buf).await;
            (buf, result.map_err(|errno| self.error(Operation::Read, Some(range), errno)))
        })
    }

    fn write(&self, offset: u64, buf: SharedBuf, flags: WriteFlags) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async move {
            let range = ByteRange::at_saturating(offset, buf.len() as u64);
            self.check_writable(Operation::Write, range)?;
            let write = async {
                self.reach(range.end()).await?;
                self.write_all(offset, buf).await
            };
            let mut result = self.change(range, write).await;
            if result.is_ok() && flags.fua {
                result = self.flush_all().await;
            }
            result.map_err(|errno| self.error(Operation::Write, Some(range), errno))
        })
    }

    fn flush(&self) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async move {
            if self.read_only.get() {
                return Ok(());
            }
            self.flush_all().await.map_err(|errno| self.error(Operation::Flush, None, errno))
        })
    }

    fn discard(&self, offset: u64, len: u64) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async move {
            let range = ByteRange::at_saturating(offset, len);
            self.check_writable(Operation::Discard, range)?;
            let result = self.change(range, self.discard_all(range)).await;
            result.map_err(|errno| self.error(Operation::Discard, Some(range), errno))
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async move {
            let range = ByteRange::at_saturating(offset, len);
            self.check_writable(Operation::WriteZeroes, range)?;
            let zero = async {
                self.reach(range.end()).await?;
                self.zero_all(range, flags).await
            };
            let mut result = self.change(range, zero).await;
            if result.is_ok() && flags.fua {
                result = self.flush_all().await;
            }
            result.map_err(|errno| self.error(Operation::WriteZeroes, Some(range), errno))
        })
    }

    fn block_status(&self, offset: u64, len: u64) -> IoFuture<'_, Result<Extent, BlockError>> {
        self.ring.boxed(async move {
            let range = ByteRange::at_saturating(offset, len);
            let result = self.status(range).await;
            result.map_err(|errno| self.error(Operation::BlockStatus, Some(range), errno))
        })
    }

    fn reopen(&self, read_only: bool) -> Option<IoFuture<'_, IoResult>> {
        Some(self.ring.boxed(self.reopen_as(read_only)))
    }

    fn set_permissions(&self, _: Permissions) -> IoResult {
        // Nobody else looks for locks on GlusterFS; and who is to write opens it anew for that.
        Ok(())
    }

    fn identity(&self) -> Option<(u64, u64)> {
        // Devices of this machine have no such numbers.
        let (volume, inode) = self.identity;
        Some((volume | 1 << 63, inode))
    }

    fn check_place(&self, by_name: bool, _exact: bool) -> Option<IoFuture<'_, IoResult>> {
        Some(self.ring.boxed(self.find(by_name)))
    }

    fn set_len(&self, len: u64) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async move {
            if self.read_only.get() {
                return Err(self.error(Operation::Resize, None, Errno::EROFS));
            }
            self.resize(len).await.map_err(|errno| self.error(Operation::Resize, None, errno))
        })
    }

    fn allocate(&self, offset: u64, len: u64) -> Option<IoFuture<'_, IoResult>> {
        let range = ByteRange::at_saturating(offset, len);
        Some(self.ring.boxed(async move {
            let file = self.file();
            let result =
                self.ring.offload(move || file.allocate(offset, len)).await.and_then(|result| result);
            result.map_err(|errno| self.error(Operation::Resize, Some(range), errno))
        }))
    }

    fn allocated_bytes(&self) -> Option<u64> {
        Some(self.allocated.get())
    }

    fn ask_allocated(&self) -> Option<IoFuture<'_, ()>> {
        let file = self.file.borrow().clone()?;
        Some(self.ring.boxed(async move {
            if let Ok(Ok(facts)) = self.ring.offload(move || file.facts()).await {
                self.allocated.set(facts.allocated);
            }
        }))
    }

    fn as_any(&self) -> Option<&dyn std::any::Any> {
        Some(self)
    }
}
