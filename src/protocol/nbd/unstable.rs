//! What a server has acknowledged and may still lose: the changes since the last flush that succeeded.
//!
//! # Situation
//! A server that goes down, and its host with it, may come back without what it had not flushed. To its client that is a
//! connection that was lost and made anew, like one that a cable cost. Whoever then flushes would hear that all is well.
//!
//! # How it is dealt with
//! What NFS clients do with unstable writes: each change is kept, with its bytes, from its acknowledgement until a flush has
//! succeeded that was sent later. After a connection was lost all of them are made again, oldest first, before anything
//! newer, and flushed. Changes of one place keep their order: a batch that is under way at once has none that overlap. A
//! durable write needs no repeat itself, but where older changes are made again it has to come after them, so it is kept as
//! long as there are any.
//!
//! # Bounds
//! The bytes are copies in memory of their own, taken in the order in which they are given back, so that neither the arena
//! nor the allocator sees them come and go. There are at most so many as was said. From half of that on the server is to be
//! flushed ([`Unstable::is_much`]), and earlier for a change that has no room beside what is kept, which waits. What is
//! larger than all of it cannot be kept at all and is flushed at once by its writer.
//!
//! Where nothing is to be kept (a bound of 0), the range of what was changed is noted, to be named when it may be lost. A
//! job's copy would be worth nothing after that, though, so while a job writes, and until what it has written is flushed, as
//! much is kept as usual.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;

use blockferry_ring::sync::{Notify, join_all};
use blockferry_ring::{Errno, Ring, SharedBuf};

use super::client_error::NbdClientError;
use super::connection::Connection;
use super::constants::{CommandFlags, TransmissionFlags};
use crate::base::limits::{NBD_AGAIN_BYTES, NBD_AGAIN_CHANGES, NBD_UNFLUSHED_BYTES, RESERVE_BYTES};
use crate::base::planted::{Bug, is_planted};
use crate::base::range::ByteRange;
use crate::block::Reserve;

/// What a change is counted as besides its bytes.
const CHANGE_BYTES: u64 = 64;
/// Bytes of memory that is taken at once; no change has more.
const CHUNK_BYTES: usize = blockferry_ring::arena::BLOCK_MAX;
/// Chunks that are kept for later while nothing is in them.
const SPARE_CHUNKS: usize = 4;

/// A change, as it was sent.
#[derive(Clone, Copy, Debug)]
pub(super) enum Change<'a> {
    Data(&'a SharedBuf),
    Zeroes(CommandFlags),
    Trim,
}

/// A change that may have to be made again.
#[derive(Clone, Debug)]
struct Entry {
    number: u64,
    range: ByteRange,
    what: What,
}

#[derive(Clone, Copy, Debug)]
enum What {
    /// Bytes of the chunk with this number, from there on.
    Data {
        chunk: u64,
        at: usize,
    },
    Zeroes(CommandFlags),
    Trim,
}

/// See the module's head.
#[derive(Debug)]
pub(super) struct Unstable {
    /// What the user said.
    bytes_said: u64,
    /// Jobs that write.
    jobs: Cell<usize>,
    log: RefCell<Log>,
    /// Bytes that were promised to changes under way.
    promised: Cell<u64>,
    /// Changes that wait for room.
    waiting: Cell<usize>,
    /// Told when there is more room.
    pub(super) room: Notify,
    bounce: Reserve,
}

#[derive(Debug, Default)]
struct Log {
    entries: VecDeque<Entry>,
    /// Number of the next change.
    next: u64,
    bytes: u64,
    chunks: VecDeque<Vec<u8>>,
    /// Number of the first chunk.
    first_chunk: u64,
    /// Memory for further chunks.
    spare: Vec<Vec<u8>>,
    /// Where nothing is kept: around all of what was changed, and the number of the last change.
    changed: Option<(ByteRange, u64)>,
}

/// Room for a change that is under way; given back when it is dropped.
#[derive(Debug)]
pub(super) struct Room<'a> {
    unstable: &'a Unstable,
    bytes: u64,
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        let promised = &self.unstable.promised;
        promised.set(promised.get() - self.bytes);
        if self.bytes > 0 {
            self.unstable.room.notify();
        }
    }
}

/// A change that waits for room.
#[derive(Debug)]
pub(super) struct Waiting<'a>(&'a Unstable);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.set(self.0.waiting.get() - 1);
    }
}

impl Unstable {
    /// Keeps changes up to `bytes_max`. `ENOMEM` when the arena has no memory to make them again.
    pub(super) fn new(ring: &Ring, bytes_max: u64) -> Result<Unstable, Errno> {
        Ok(Unstable {
            bytes_said: bytes_max,
            jobs: Cell::new(0),
            log: RefCell::default(),
            promised: Cell::new(0),
            waiting: Cell::new(0),
            room: ring.notify(),
            bounce: Reserve::new(ring, RESERVE_BYTES)?,
        })
    }

    /// A job begins to write.
    pub(super) fn job_begins(&self) {
        self.jobs.set(self.jobs.get() + 1);
    }

    /// It has ended.
    pub(super) fn job_ends(&self) {
        self.jobs.set(self.jobs.get().saturating_sub(1));
    }

    /// Bytes that are kept at most.
    fn bytes_max(&self) -> u64 {
        let is_for_job = self.jobs.get() > 0 || !self.log.borrow().entries.is_empty();
        if self.bytes_said == 0 && is_for_job { NBD_UNFLUSHED_BYTES } else { self.bytes_said }
    }

    /// Whether a change of so many bytes of data can be kept at all.
    pub(super) fn can_keep(&self, data_bytes: u64) -> bool {
        data_bytes.saturating_add(CHANGE_BYTES) <= self.bytes_max()
    }

    /// Nothing is kept.
    pub(super) fn keeps_nothing(&self) -> bool {
        self.bytes_max() == 0
    }

    /// Something was changed and not kept.
    pub(super) fn has_unkept(&self) -> bool {
        self.log.borrow().changed.is_some()
    }

    /// Room for a change of so many bytes of data, if there is some now.
    pub(super) fn take_room(&self, data_bytes: u64) -> Option<Room<'_>> {
        let bytes = if self.can_keep(data_bytes) { data_bytes + CHANGE_BYTES } else { 0 };
        let taken = self.promised.get() + self.log.borrow().bytes;
        (bytes == 0 || taken + bytes <= self.bytes_max()).then(|| {
            self.promised.set(self.promised.get() + bytes);
            Room { unstable: self, bytes }
        })
    }

    /// So much is kept that the server is to be flushed: half of what may be, or too much for a change that waits.
    pub(super) fn is_much(&self) -> bool {
        let bytes = self.log.borrow().bytes;
        bytes > 0 && (self.waiting.get() > 0 || bytes >= self.bytes_max() / 2)
    }

    /// A change waits for room, as long as this is kept.
    pub(super) fn wait(&self) -> Waiting<'_> {
        self.waiting.set(self.waiting.get() + 1);
        Waiting(self)
    }

    /// Nothing may be lost.
    pub(super) fn is_empty(&self) -> bool {
        let log = self.log.borrow();
        log.entries.is_empty() && log.changed.is_none()
    }

    /// Keeps a change that was acknowledged.
    pub(super) fn keep(&self, room: Room<'_>, range: ByteRange, change: Change<'_>) {
        let mut log = self.log.borrow_mut();
        let number = log.next;
        log.next += 1;
        if room.bytes == 0 {
            let around = log.changed.map_or(range, |(before, _)| hull(before, range));
            log.changed = Some((around, number));
            return;
        }
        let what = match change {
            Change::Data(buf) => log.copy(buf),
            Change::Zeroes(flags) => What::Zeroes(flags),
            Change::Trim => What::Trim,
        };
        log.bytes += room.bytes;
        log.entries.push_back(Entry { number, range, what });
        // What was promised is counted as kept from now on; nobody who waits has more room by that.
        self.promised.set(self.promised.get() - room.bytes);
        std::mem::forget(room);
    }

    /// What a flush that is sent now will cover.
    pub(super) fn mark(&self) -> u64 {
        self.log.borrow().next
    }

    /// A flush that was sent at `mark` has succeeded.
    pub(super) fn flushed(&self, mark: u64) {
        self.log.borrow_mut().drop_before(mark);
        self.room.notify();
    }

    /// Forgets all of it, and says around which range it was.
    pub(super) fn forget(&self) -> Option<ByteRange> {
        let mut log = self.log.borrow_mut();
        let kept = log.entries.iter().map(|entry| entry.range);
        let around = kept.chain(log.changed.map(|(range, _)| range)).reduce(hull);
        let all = log.next;
        log.drop_before(all);
        drop(log);
        self.room.notify();
        around
    }

    /// Changes and bytes of them that would be made again.
    pub(super) fn amount(&self) -> (usize, u64) {
        let log = self.log.borrow();
        (log.entries.len(), log.entries.iter().map(|entry| entry.range.len()).sum())
    }

    /// Makes all of it again, in order. Nobody makes other changes meanwhile.
    pub(super) async fn make_again(
        &self,
        ring: &Ring,
        connection: &Connection,
    ) -> Result<(), NbdClientError> {
        let mut from = 0;
        while !is_planted(Bug::NotWrittenAgain) {
            let batch = self.batch(from);
            let Some(last) = batch.last() else { return Ok(()) };
            from = last.number + 1;
            let again = batch.into_iter().map(|entry| ring.boxed(self.again(connection, entry)));
            join_all(again.collect()).await.into_iter().collect::<Result<(), _>>()?;
        }
        Ok(())
    }

    /// The next changes from number `from` on that do not overlap.
    fn batch(&self, from: u64) -> Vec<Entry> {
        let log = self.log.borrow();
        let begin = log.entries.partition_point(|entry| entry.number < from);
        let mut batch: Vec<Entry> = Vec::new();
        let mut bytes = 0;
        for entry in log.entries.range(begin..) {
            let is_full = batch.len() == NBD_AGAIN_CHANGES || bytes >= NBD_AGAIN_BYTES;
            if is_full || batch.iter().any(|other| other.range.overlaps(entry.range)) {
                break;
            }
            bytes += entry.range.len();
            batch.push(entry.clone());
        }
        batch
    }

    async fn again(&self, connection: &Connection, entry: Entry) -> Result<(), NbdClientError> {
        let Entry { range, what, .. } = entry;
        let offers = |flag| connection.flags().contains(flag);
        match what {
            What::Zeroes(flags) if offers(TransmissionFlags::SEND_WRITE_ZEROES) => {
                let kept =
                    CommandFlags::EMPTY.set(CommandFlags::NO_HOLE, flags.contains(CommandFlags::NO_HOLE));
                return connection.write_zeroes(range.start(), range.len(), kept).await;
            }
            What::Trim if offers(TransmissionFlags::SEND_TRIM) => {
                return connection.trim(range.start(), range.len()).await;
            }
            What::Trim => return Ok(()),
            What::Data { .. } | What::Zeroes(_) => {}
        }
        let payload_max = u64::from(connection.payload_bytes_max());
        let block = u64::from(connection.block_sizes().minimum_bytes.max(1));
        let wanted = range.len().min(payload_max) as usize;
        let mut lease = self.bounce.take(wanted).await;
        let piece_max = (lease.len() as u64 / block * block).max(block).min(lease.len() as u64);
        for piece in range.chunks(piece_max) {
            let len = piece.len() as usize;
            let bytes = &mut lease.bytes()?[..len];
            match what {
                What::Data { chunk, at } => {
                    let from = at + (piece.start() - range.start()) as usize;
                    self.log.borrow().copy_out(chunk, from, bytes);
                }
                _ => bytes.fill(0),
            }
            lease.write(0, len, async |buf| connection.write(piece.start(), buf, false).await).await?;
        }
        Ok(())
    }
}

impl Log {
    /// Copies the bytes behind those that came before.
    fn copy(&mut self, buf: &SharedBuf) -> What {
        let fits = self.chunks.back().is_some_and(|chunk| chunk.len() + buf.len() <= CHUNK_BYTES);
        if !fits {
            let memory = self.spare.pop();
            self.chunks.push_back(memory.unwrap_or_else(|| Vec::with_capacity(CHUNK_BYTES)));
        }
        let number = self.first_chunk + self.chunks.len() as u64 - 1;
        let Some(chunk) = self.chunks.back_mut() else { unreachable!("one was pushed") };
        let at = chunk.len();
        if buf.is_region() {
            chunk.resize(at + buf.len(), 0);
            buf.copy_to(0, &mut chunk[at..]);
        } else {
            chunk.extend_from_slice(buf.as_slice());
        }
        What::Data { chunk: number, at }
    }

    fn copy_out(&self, chunk: u64, at: usize, out: &mut [u8]) {
        let index = chunk.checked_sub(self.first_chunk).map(|index| index as usize);
        let bytes =
            index.and_then(|index| self.chunks.get(index)).and_then(|chunk| chunk.get(at..at + out.len()));
        match bytes {
            Some(bytes) => out.copy_from_slice(bytes),
            None => unreachable!("what is in the log has its bytes"),
        }
    }

    /// Drops what has a number below `mark`.
    fn drop_before(&mut self, mark: u64) {
        while let Some(entry) = self.entries.front().filter(|entry| entry.number < mark) {
            let data = if matches!(entry.what, What::Data { .. }) { entry.range.len() } else { 0 };
            self.bytes -= data + CHANGE_BYTES;
            self.entries.pop_front();
        }
        if self.changed.is_some_and(|(_, last)| last < mark) {
            self.changed = None;
        }
        let needed = self.entries.iter().find_map(|entry| match entry.what {
            What::Data { chunk, .. } => Some(chunk),
            _ => None,
        });
        let end = needed.unwrap_or(self.first_chunk + self.chunks.len() as u64);
        while self.first_chunk < end
            && let Some(mut chunk) = self.chunks.pop_front()
        {
            self.first_chunk += 1;
            chunk.clear();
            self.spare.push(chunk);
        }
        if self.entries.is_empty() {
            self.spare.truncate(SPARE_CHUNKS);
        }
    }
}

/// The range around both.
fn hull(one: ByteRange, other: ByteRange) -> ByteRange {
    let start = one.start().min(other.start());
    ByteRange::at_saturating(start, one.end().max(other.end()) - start)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::rng::Rng;
    use blockferry_ring::Config;

    fn ring() -> Ring {
        Ring::new(&Config { arena_bytes: 4 << 20, ..Config::default() }).expect("a ring")
    }

    fn range(offset: u64, len: u64) -> ByteRange {
        ByteRange::at_saturating(offset, len)
    }

    fn keep(ring: &Ring, unstable: &Unstable, at: u64, len: usize, byte: u8) {
        let mut buf = ring.arena().try_alloc(len).expect("memory");
        buf.as_mut_slice().fill(byte);
        let room = unstable.take_room(len as u64).expect("room");
        unstable.keep(room, range(at, len as u64), Change::Data(&buf.freeze()));
    }

    /// What is made again, with its first byte of data.
    fn all(unstable: &Unstable) -> Vec<(u64, u8)> {
        let (mut from, mut all) = (0, Vec::new());
        loop {
            let batch = unstable.batch(from);
            let Some(last) = batch.last() else { return all };
            from = last.number + 1;
            for (i, entry) in batch.iter().enumerate() {
                assert!(batch[..i].iter().all(|other| !other.range.overlaps(entry.range)));
                let mut byte = [0];
                if let What::Data { chunk, at } = entry.what {
                    unstable.log.borrow().copy_out(chunk, at, &mut byte);
                }
                all.push((entry.range.start(), byte[0]));
            }
        }
    }

    #[test]
    fn a_flush_covers_what_was_there_when_it_was_sent() {
        let ring = ring();
        let unstable = Unstable::new(&ring, 64 << 20).expect("memory");
        let mut rng = Rng::new(3);
        let mut model: Vec<(u64, u8)> = Vec::new();
        let (mut mark, mut marked) = (unstable.mark(), 0);
        for _ in 0..4000 {
            match rng.below(20) {
                0 => (mark, marked) = (unstable.mark(), model.len()),
                1 => {
                    unstable.flushed(mark);
                    model.drain(..std::mem::take(&mut marked));
                    assert_eq!(all(&unstable), model);
                }
                2 => {
                    let room = unstable.take_room(0).expect("room");
                    unstable.keep(room, range(7, 70_000), Change::Zeroes(CommandFlags::EMPTY));
                    model.push((7, 0));
                }
                _ => {
                    let (at, byte) = (rng.below(1 << 20), rng.below(255) as u8 + 1);
                    keep(&ring, &unstable, at, 1 + rng.below(20_000) as usize, byte);
                    model.push((at, byte));
                }
            }
        }
        assert_eq!(all(&unstable), model);
        unstable.flushed(unstable.mark());
        assert!(unstable.is_empty() && unstable.take_room((64 << 20) - CHANGE_BYTES).is_some());
    }

    #[test]
    fn no_more_is_kept_than_was_said() {
        let ring = ring();
        let unstable = Unstable::new(&ring, 100_000).expect("memory");
        assert!(
            !unstable.can_keep(100_000) && unstable.take_room(100_000).is_some(),
            "it is flushed at once"
        );
        let under_way = unstable.take_room(40_000).expect("room");
        keep(&ring, &unstable, 0, 40_000, 1);
        assert!(!unstable.is_much() && unstable.take_room(40_000).is_none());
        let waiting = unstable.wait();
        assert!(unstable.is_much(), "nobody else would make room for it");
        drop(waiting);
        assert!(!unstable.is_much());
        drop(under_way);
        keep(&ring, &unstable, 0, 40_000, 2);
        assert!(unstable.is_much() && unstable.take_room(40_000).is_none());
        assert_eq!(all(&unstable), [(0, 1), (0, 2)]);
        unstable.flushed(1);
        assert_eq!(all(&unstable), [(0, 2)]);
        assert!(!unstable.is_much() && unstable.take_room(40_000).is_some());
    }

    #[test]
    fn where_nothing_is_kept_the_range_is() {
        let ring = ring();
        let unstable = Unstable::new(&ring, 0).expect("memory");
        keep(&ring, &unstable, 4096, 512, 1);
        let mark = unstable.mark();
        keep(&ring, &unstable, 100, 512, 1);
        unstable.flushed(mark);
        assert_eq!(unstable.forget(), Some(range(100, 4508)));
        assert!(unstable.is_empty() && unstable.forget().is_none());
    }

    #[test]
    fn for_a_job_as_much_is_kept_as_usual() {
        let ring = ring();
        let unstable = Unstable::new(&ring, 0).expect("memory");
        keep(&ring, &unstable, 0, 512, 1);
        unstable.job_begins();
        keep(&ring, &unstable, 512, 512, 2);
        assert!(unstable.has_unkept(), "what was there before the job is not there again");
        unstable.flushed(1);
        assert!(!unstable.has_unkept() && all(&unstable) == [(512, 2)]);
        // What it leaves behind would be written over newer changes that were not kept.
        unstable.job_ends();
        keep(&ring, &unstable, 512, 512, 3);
        assert_eq!(all(&unstable), [(512, 2), (512, 3)]);
        unstable.flushed(unstable.mark());
        assert!(unstable.is_empty() && unstable.keeps_nothing());
    }
}
