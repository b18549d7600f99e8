//! The tracker: the filter by which a job knows what its guests change.
//!
//! It owns the map of what differs between source and target: *dirty* chunks, and the ranges that are
//! being *copied*. The job asks it for the next piece and tells it how the copy ended. Guests pass
//! through it with every change, in one of two ways:
//!
//! * *Passing on*: the change goes to the source, and its chunks are dirty when it has ended.
//! * *Blocking* ([`Tracker::set_blocking`]): the change goes to source and target at the same time, and
//!   the guest has its answer after both ([`blocking`]). What is clean stays clean.
//!
//! # Why no update is lost
//! * A change that is passed on marks its chunks dirty after it has ended, whatever its result (a failed
//!   write may have changed something).
//! * [`Tracker::claim`] cleans the bits of a piece *before* it is read. So a change that the read may
//!   have missed ends after the cleaning, and dirties the piece again.
//! * A range that is being copied is not claimed again before that copy has ended: an old copy can
//!   never overtake a newer one.
//! * What a copy did not do goes back as dirty.
//! * A change to both sides and a copy exclude each other, as do two such changes of the same bytes: one
//!   table of range locks serves them all, and each waits only for older ones. Copies do not wait: they
//!   go elsewhere.

mod blocking;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

use blockferry_ring::Ring;
use blockferry_ring::sync::{Notify, either};

use super::dirty::{DirtyMap, DirtyMapError};
use super::node::{Below, Filter, Mutation};
use super::peer::Peer;
use crate::base::bucket::TokenBucket;
use crate::base::limits;
use crate::base::planted::{Bug, is_planted};
use crate::base::range::ByteRange;
use crate::block::serial::{LockId, LockKind, RangeLocks};
use crate::block::{BlockError, IoFuture, IoResult};

/// What guests did, in sums since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestTally {
    /// Changes.
    pub changes: u64,
    /// Bytes that they were about.
    pub bytes: u64,
    /// Bytes of the chunks that they touched, each time anew: what would be dirty if all had been clean.
    pub touched_bytes: u64,
    /// Bytes that were clean and are dirty through them.
    pub dirtied_bytes: u64,
    /// Bytes that went to the target at the same time.
    pub mirrored_bytes: u64,
    /// Bytes that were dirty and are clean through them, without a copy.
    pub cleaned_bytes: u64,
}

/// What differs between a job's source and its target.
pub struct Tracker {
    ring: Ring,
    dirty: RefCell<DirtyMap>,
    /// Copies, and changes to both sides.
    locks: RefCell<RangeLocks>,
    copying: RefCell<Vec<(ByteRange, LockId)>>,
    /// Where changes to both sides go; gone when all is over.
    peer: RefCell<Option<Rc<Peer>>>,
    blocking: Cell<bool>,
    /// Changes under way that go to the source only.
    passing: Cell<u32>,
    tally: Cell<GuestTally>,
    /// Failures of the target that met guests' changes; the job has not seen them yet.
    failures: RefCell<VecDeque<BlockError>>,
    /// Bytes of touched chunks a second that guests may change; 0 is no limit.
    pace: RefCell<TokenBucket>,
    /// Nobody follows any longer.
    over: Cell<bool>,
    /// Told when a lock is released, the pace changes, or all is over.
    moved: Notify,
    /// Told at every change of the map by a guest.
    changed: Notify,
}

impl std::fmt::Debug for Tracker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tracker")
            .field("dirty_bytes", &self.dirty_bytes())
            .field("copying", &self.copying.borrow().len())
            .field("blocking", &self.blocking.get())
            .finish_non_exhaustive()
    }
}

impl Tracker {
    /// A tracker for a disk of `len` bytes, all of it clean. Without a `peer` changes never
    /// go to both sides.
    pub fn new(
        ring: &Ring,
        len: u64,
        granularity: u64,
        peer: Option<Rc<Peer>>,
        changed: Notify,
    ) -> Result<Rc<Tracker>, DirtyMapError> {
        Ok(Rc::new(Tracker {
            ring: ring.clone(),
            dirty: RefCell::new(DirtyMap::new(len, granularity)?),
            locks: RefCell::new(RangeLocks::new(limits::RANGE_LOCKS_MAX)),
            copying: RefCell::new(Vec::with_capacity(64)),
            peer: RefCell::new(peer),
            blocking: Cell::new(false),
            passing: Cell::new(0),
            tally: Cell::default(),
            failures: RefCell::default(),
            pace: RefCell::new(TokenBucket::new(ring.now(), 0)),
            over: Cell::new(false),
            moved: ring.notify(),
            changed,
        }))
    }

    /// Marks the whole disk dirty.
    pub fn set_all(&self) {
        self.dirty.borrow_mut().set_all();
    }

    /// Marks a range dirty.
    pub fn set(&self, range: ByteRange) {
        self.dirty.borrow_mut().set(range);
    }

    /// Bytes in one chunk.
    pub fn granularity(&self) -> u64 {
        self.dirty.borrow().granularity()
    }

    /// Bytes known to differ (those being copied not counted).
    pub fn dirty_bytes(&self) -> u64 {
        self.dirty.borrow().dirty_bytes()
    }

    /// Bytes being copied.
    pub fn copying_bytes(&self) -> u64 {
        self.copying.borrow().iter().map(|(range, _)| range.len()).sum()
    }

    /// Nothing differs and nothing is being copied.
    pub fn is_clean(&self) -> bool {
        self.dirty.borrow().is_clean() && self.copying.borrow().is_empty()
    }

    /// What guests did since the start.
    pub fn tally(&self) -> GuestTally {
        self.tally.get()
    }

    /// From now on changes go to both sides, or only to the source again. Those under way end as they began.
    pub fn set_blocking(&self, blocking: bool) {
        self.blocking.set(blocking && self.peer.borrow().is_some());
    }

    /// Whether new changes go to both sides.
    pub fn is_blocking(&self) -> bool {
        self.blocking.get()
    }

    /// Every change that is acknowledged from now on is on both sides by then, until this is false again.
    pub fn is_actively_synced(&self) -> bool {
        self.blocking.get() && self.passing.get() == 0 && self.is_clean()
    }

    /// The next failure of the target that met a guest's change.
    pub fn pop_failure(&self) -> Option<BlockError> {
        self.failures.borrow_mut().pop_front()
    }

    /// Slows guests' changes down to so many bytes of touched chunks a second; 0 is no limit.
    pub fn set_pace(&self, now: u64, bytes_per_sec: u64) {
        if self.pace.borrow().speed() != bytes_per_sec {
            self.pace.borrow_mut().set_speed(now, bytes_per_sec);
            self.moved.notify();
        }
    }

    /// The pace that guests are held to.
    pub fn pace(&self) -> u64 {
        self.pace.borrow().speed()
    }

    /// Nobody follows any longer: no guest waits for the target, or for its turn.
    pub fn end(&self) {
        self.over.set(true);
        self.peer.borrow_mut().take();
        self.blocking.set(false);
        self.set_pace(self.ring.now(), 0);
        self.moved.notify();
    }

    /// The next dirty run of at most `len_max` bytes at or after `from`, wrapping round, on which nothing is
    /// under way. Changes nothing.
    pub fn peek(&self, from: u64, len_max: u64) -> Option<ByteRange> {
        let dirty = self.dirty.borrow();
        let len = dirty.len();
        let from = if from >= len { 0 } else { from };
        self.search(&dirty, from, len, len_max).or_else(|| self.search(&dirty, 0, from, len_max))
    }

    fn search(&self, dirty: &DirtyMap, mut from: u64, end: u64, len_max: u64) -> Option<ByteRange> {
        let locks = self.locks.borrow();
        let granularity = dirty.granularity();
        while from < end {
            let run = dirty.next_dirty(from, len_max)?;
            if run.start() >= end {
                return None;
            }
            // What begins first among those in the way decides how much of the run is free.
            let Some(busy) = locks.first_overlap(run) else { return Some(run) };
            let busy_from = busy.start() / granularity * granularity;
            if busy_from > run.start() {
                return Some(run.split_at(busy_from).0);
            }
            // Guests' changes end anywhere; copies are made of whole chunks.
            from = busy.end().next_multiple_of(granularity);
        }
        None
    }

    /// Takes a piece that [`Tracker::peek`] showed: it is being copied from now on, and its bits are clean. False, and
    /// nothing has changed, when too much is under way.
    pub fn claim(&self, range: ByteRange) -> bool {
        let lock = self.locks.borrow_mut().try_lock(range, LockKind::Exclusive);
        let Ok(lock) = lock else { return false };
        if !is_planted(Bug::BitClearedAfterRead) {
            self.dirty.borrow_mut().clear(range);
        }
        self.copying.borrow_mut().push((range, lock));
        true
    }

    /// The copy of a claimed piece has ended; what of it was not copied is dirty again.
    pub fn release(&self, range: ByteRange, undone: Option<ByteRange>) {
        let mut copying = self.copying.borrow_mut();
        if let Some(at) = copying.iter().position(|(copied, _)| *copied == range) {
            let (_, lock) = copying.swap_remove(at);
            drop(copying);
            self.unlock(lock);
        }
        if is_planted(Bug::BitClearedAfterRead) {
            self.dirty.borrow_mut().clear(range);
        }
        if let Some(undone) = undone
            && !is_planted(Bug::CompletionLost)
        {
            self.set(undone);
        }
    }

    fn unlock(&self, lock: LockId) {
        let mut locks = self.locks.borrow_mut();
        // For their turn, or for room in the table.
        let others_wait = locks.waiting() > 0 || locks.is_full();
        locks.release(lock, |_| ());
        drop(locks);
        if others_wait {
            self.moved.notify();
        }
    }

    /// The chunks that a range touches.
    fn touched(&self, range: ByteRange) -> u64 {
        let granularity = self.granularity();
        range.end().next_multiple_of(granularity) - range.start() / granularity * granularity
    }

    fn count(&self, add: impl FnOnce(&mut GuestTally)) {
        let mut tally = self.tally.get();
        add(&mut tally);
        self.tally.set(tally);
    }

    /// A guest's change has ended and left `range` different.
    fn dirtied(&self, range: ByteRange) {
        let before = self.dirty_bytes();
        self.set(range);
        let dirtied = self.dirty_bytes() - before;
        self.count(|tally| tally.dirtied_bytes += dirtied);
        self.changed.notify();
    }

    /// Waits until the pace allows a change of `range`.
    async fn keep_pace(&self, range: ByteRange) {
        let cost = self.touched(range);
        loop {
            let asked = self.pace.borrow_mut().try_take(self.ring.now(), cost);
            let Err(at) = asked else { return };
            let speed = self.pace();
            let other = self.moved.until(|| (self.pace() != speed).then_some(()));
            either(other, self.ring.sleep_until(at)).await;
        }
    }

    async fn pass_on(&self, below: Below<'_>, mutation: Mutation) -> IoResult {
        let range = mutation.range();
        let passing = Passing::new(&self.passing);
        let result = below.mutate(mutation).await;
        self.dirtied(range);
        drop(passing);
        result
    }
}

/// One change under way that goes to the source only.
struct Passing<'a>(&'a Cell<u32>);

impl<'a> Passing<'a> {
    fn new(count: &'a Cell<u32>) -> Passing<'a> {
        count.set(count.get() + 1);
        Passing(count)
    }
}

impl Drop for Passing<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

impl Filter for Tracker {
    fn mutate<'a>(&'a self, below: Below<'a>, mutation: Mutation) -> IoFuture<'a, IoResult> {
        self.ring.boxed(async move {
            let range = mutation.range();
            if self.pace() != 0 {
                self.keep_pace(range).await;
            }
            let result = if self.blocking.get() {
                self.change_both(below, mutation).await
            } else {
                self.pass_on(below, mutation).await
            };
            let touched = self.touched(range);
            self.count(|tally| {
                tally.changes += 1;
                tally.bytes += range.len();
                tally.touched_bytes += touched;
            });
            result
        })
    }
}
