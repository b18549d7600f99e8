//! The tracker: the filter by which a job knows what its guests change.
//!
//! It owns the map of what differs between source and target: *dirty* chunks, and the ranges that are
//! being *copied*. The job asks it for the next piece and tells it how the copy ended. Guests pass
//! through it with every change.
//!
//! # Why no update is lost
//! * A guest's change marks its chunks dirty after it has ended, whatever its result (a failed write
//!   may have changed something).
//! * [`Tracker::claim`] cleans the bits of a piece *before* it is read. So a change that the read may
//!   have missed ends after the cleaning, and dirties the piece again.
//! * A range that is being copied is not claimed again before that copy has ended: an old copy can
//!   never overtake a newer one.
//! * What a copy did not do goes back as dirty.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use blockferry_ring::Ring;
use blockferry_ring::sync::Notify;

use super::dirty::{DirtyMap, DirtyMapError};
use super::node::{Below, Filter, Mutation};
use crate::base::planted::{Bug, is_planted};
use crate::base::range::ByteRange;
use crate::block::{IoFuture, IoResult};

/// What differs between a job's source and its target.
pub struct Tracker {
    ring: Ring,
    dirty: RefCell<DirtyMap>,
    copying: RefCell<Vec<ByteRange>>,
    guest_bytes: Cell<u64>,
    guest_changes: Cell<u64>,
    /// Told at every change of the map by a guest.
    changed: Notify,
}

impl std::fmt::Debug for Tracker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tracker")
            .field("dirty_bytes", &self.dirty_bytes())
            .field("copying", &self.copying.borrow().len())
            .finish_non_exhaustive()
    }
}

impl Tracker {
    /// A tracker for a disk of `len` bytes, all of it clean.
    pub fn new(
        ring: &Ring,
        len: u64,
        granularity: u64,
        changed: Notify,
    ) -> Result<Rc<Tracker>, DirtyMapError> {
        Ok(Rc::new(Tracker {
            ring: ring.clone(),
            dirty: RefCell::new(DirtyMap::new(len, granularity)?),
            copying: RefCell::new(Vec::with_capacity(64)),
            guest_bytes: Cell::new(0),
            guest_changes: Cell::new(0),
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
        self.copying.borrow().iter().map(|range| range.len()).sum()
    }

    /// Nothing differs and nothing is being copied.
    pub fn is_clean(&self) -> bool {
        self.dirty.borrow().is_clean() && self.copying.borrow().is_empty()
    }

    /// Bytes that guests have changed since the start.
    pub fn guest_bytes(&self) -> u64 {
        self.guest_bytes.get()
    }

    /// Changes by guests since the start.
    pub fn guest_changes(&self) -> u64 {
        self.guest_changes.get()
    }

    /// The next dirty run of at most `len_max` bytes at or after `from`, wrapping round, that no copy is
    /// under way on. Changes nothing.
    pub fn peek(&self, from: u64, len_max: u64) -> Option<ByteRange> {
        let dirty = self.dirty.borrow();
        let len = dirty.len();
        let from = if from >= len { 0 } else { from };
        self.search(&dirty, from, len, len_max).or_else(|| self.search(&dirty, 0, from, len_max))
    }

    fn search(&self, dirty: &DirtyMap, mut from: u64, end: u64, len_max: u64) -> Option<ByteRange> {
        let copying = self.copying.borrow();
        while from < end {
            let run = dirty.next_dirty(from, len_max)?;
            if run.start() >= end {
                return None;
            }
            // The copy that begins first among those in the way decides how much of the run is free.
            let first = copying.iter().filter(|c| c.overlaps(run)).min_by_key(|c| c.start());
            match first {
                None => return Some(run),
                Some(copy) if copy.start() > run.start() => return Some(run.split_at(copy.start()).0),
                Some(copy) => from = copy.end(),
            }
        }
        None
    }

    /// Takes a piece that [`Tracker::peek`] showed: it is being copied from now on, and its bits are clean.
    pub fn claim(&self, range: ByteRange) {
        debug_assert!(!self.copying.borrow().iter().any(|c| c.overlaps(range)), "a piece was claimed twice");
        if !is_planted(Bug::BitClearedAfterRead) {
            self.dirty.borrow_mut().clear(range);
        }
        self.copying.borrow_mut().push(range);
    }

    /// The copy of a claimed piece has ended; what of it was not copied is dirty again.
    pub fn release(&self, range: ByteRange, undone: Option<ByteRange>) {
        self.copying.borrow_mut().retain(|c| *c != range);
        if is_planted(Bug::BitClearedAfterRead) {
            self.dirty.borrow_mut().clear(range);
        }
        if let Some(undone) = undone
            && !is_planted(Bug::CompletionLost)
        {
            self.set(undone);
        }
    }
}

impl Filter for Tracker {
    fn mutate<'a>(&'a self, below: Below<'a>, mutation: Mutation) -> IoFuture<'a, IoResult> {
        self.ring.boxed(async move {
            let range = mutation.range();
            let result = below.mutate(mutation).await;
            self.set(range);
            self.guest_bytes.set(self.guest_bytes.get() + range.len());
            self.guest_changes.set(self.guest_changes.get() + 1);
            self.changed.notify();
            result
        })
    }
}
