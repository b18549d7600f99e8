//! Changes that go to source and target at the same time.
//!
//! # Situation
//! A guest writes while its disk is mirrored, and the target must not fall behind. The write leaves for
//! both disks at once; the guest is answered when both have ended. Then what was clean is clean still.
//!
//! # What is not sent
//! A chunk that is dirty anyway will be copied. A write that covers it whole spares that copy; one that
//! covers a part of it would be for nothing. So a range loses the parts of its first and last chunk that
//! lie in dirty chunks. What lies between is covered whole.
//!
//! # When something fails
//! * The source: its guest gets the error, and the range is dirty, because the target may have it.
//! * The target: the range is dirty, the job gets the error, and the guest does not notice.
//! * The job is over: no guest waits for the target any longer.
//!
//! # Memory
//! What a client may still change must not be read twice: memory of an embedder is copied once. When
//! there is no memory for that the change is passed on, and its range is dirty.
//!
//! # Discards
//! What a discard leaves is undefined, and undefined bytes cannot be alike on two disks. So space is
//! given back by zeroing both sides; where the source cannot do that without writing, nothing happens,
//! which a discard may always do.

use std::rc::Rc;

use blockferry_ring::sync::either;
use blockferry_ring::{Errno, SharedBuf};

use super::Tracker;
use crate::base::limits;
use crate::base::planted::{Bug, is_planted};
use crate::base::range::ByteRange;
use crate::block::serial::{LockId, LockKind};
use crate::block::{BlockError, IoResult, ZeroFlags};
use crate::graph::node::{Below, Mutation};
use crate::graph::peer::Peer;

/// A lock on a range; dropping it lets others in.
struct Locked<'a> {
    tracker: &'a Tracker,
    lock: LockId,
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        self.tracker.unlock(self.lock);
        // The job may have found nothing to copy because of this.
        if self.tracker.copying.borrow().is_empty() && !self.tracker.dirty.borrow().is_clean() {
            self.tracker.changed.notify();
        }
    }
}

impl Tracker {
    pub(super) async fn change_both(&self, below: Below<'_>, mutation: Mutation) -> IoResult {
        let range = mutation.range();
        if range.is_empty() {
            return self.pass_on(below, mutation).await;
        }
        let _locked = self.lock(range).await;
        // What was true before the wait need not be true any more.
        let (Some(peer), true) = (self.peer.borrow().clone(), self.blocking.get()) else {
            return self.pass_on(below, mutation).await;
        };
        match mutation {
            Mutation::Write { offset, buf, flags } => {
                let Some(buf) = self.stable(&buf) else {
                    return self.pass_on(below, Mutation::Write { offset, buf, flags }).await;
                };
                let sent = self.to_send(range);
                let part = sent.map(|sent| {
                    let (at, len) = ((sent.start() - offset) as usize, sent.len() as usize);
                    Sent::Write(sent, buf.slice(at, len))
                });
                self.both(below, Mutation::Write { offset, buf, flags }, part, peer).await
            }
            Mutation::Zeroes { offset, len, flags } => {
                let part = self.to_send(range).map(|sent| Sent::Zeroes(sent, flags.may_unmap));
                self.both(below, Mutation::Zeroes { offset, len, flags }, part, peer).await
            }
            Mutation::Discard { offset, len } => {
                let flags = ZeroFlags { fua: false, may_unmap: true, no_fallback: true };
                let part = self.to_send(range).map(|sent| Sent::Zeroes(sent, true));
                let result = self.both(below, Mutation::Zeroes { offset, len, flags }, part, peer).await;
                match result {
                    Err(error) if error.errno == Errno::EOPNOTSUPP => Ok(()),
                    result => result,
                }
            }
        }
    }

    /// Waits for whatever older is under way on the range, unless all is over: copies that were given up never end.
    async fn lock(&self, range: ByteRange) -> Locked<'_> {
        let enqueue = || self.locks.borrow_mut().enqueue(range, LockKind::Exclusive).ok();
        let lock = self.moved.until(enqueue).await;
        let locked = Locked { tracker: self, lock };
        if !is_planted(Bug::WriteNotOrdered) {
            let may_go = || self.over.get() || self.locks.borrow().is_granted(lock);
            self.moved.until(|| may_go().then_some(())).await;
        }
        locked
    }

    /// The bytes in memory that nobody changes until both writes have ended.
    fn stable(&self, buf: &SharedBuf) -> Option<SharedBuf> {
        if !buf.is_region() {
            return Some(buf.clone());
        }
        let mut copy = self.ring.arena().try_alloc(buf.len())?;
        copy.truncate(buf.len());
        buf.copy_to(0, copy.as_mut_slice());
        Some(copy.freeze())
    }

    /// What of a range goes to the target: not those parts of its first and last chunk that are dirty.
    fn to_send(&self, range: ByteRange) -> Option<ByteRange> {
        let dirty = self.dirty.borrow();
        let granularity = dirty.granularity();
        let (mut start, mut end) = (range.start(), range.end());
        let is_partial = |at: u64| {
            let from = at / granularity * granularity;
            range.start() > from || range.end() < (from + granularity).min(dirty.len())
        };
        if is_partial(start) && dirty.get(start) {
            start = (start / granularity + 1) * granularity;
        }
        if end > start && is_partial(end - 1) && dirty.get(end - 1) {
            end = (end - 1) / granularity * granularity;
        }
        ByteRange::new(start, end).ok().filter(|sent| !sent.is_empty())
    }

    /// Cleans the chunks that a range covers whole.
    fn clean_covered(&self, range: ByteRange) {
        let mut dirty = self.dirty.borrow_mut();
        let granularity = dirty.granularity();
        let start = range.start().next_multiple_of(granularity);
        let end =
            if range.end() == dirty.len() { range.end() } else { range.end() / granularity * granularity };
        if let Some(covered) = ByteRange::new(start, end).ok().filter(|covered| !covered.is_empty()) {
            let before = dirty.dirty_bytes();
            dirty.clear(covered);
            let cleaned = before - dirty.dirty_bytes();
            drop(dirty);
            self.count(|tally| tally.cleaned_bytes += cleaned);
        }
    }

    async fn both(
        &self,
        below: Below<'_>,
        mutation: Mutation,
        part: Option<Sent>,
        peer: Rc<Peer>,
    ) -> IoResult {
        let range = mutation.range();
        let Some(part) = part else {
            // All of it is dirty and will be copied.
            return below.mutate(mutation).await;
        };
        let sent = part.range();
        self.clean_covered(sent);
        let at_target = self.ring.spawn_with_result(part.send(peer));
        let result = below.mutate(mutation).await;
        if is_planted(Bug::TargetNotAwaited) {
            return result;
        }
        let over = self.moved.until(|| self.over.get().then_some(()));
        let mirrored = match either(at_target.take(), over).await {
            blockferry_ring::sync::Either::First(mirrored) => mirrored,
            blockferry_ring::sync::Either::Second(()) => return result,
        };
        self.count(|tally| tally.mirrored_bytes += sent.len());
        if let Err(error) = mirrored {
            self.dirtied(sent);
            let mut failures = self.failures.borrow_mut();
            if failures.len() < limits::TRACKER_FAILURES_MAX {
                failures.push_back(error);
            }
            drop(failures);
            self.changed.notify();
        }
        if result.is_err() {
            self.dirtied(range);
        }
        result
    }
}

/// What goes to the target.
enum Sent {
    Write(ByteRange, SharedBuf),
    /// A range, and whether its space may be given back.
    Zeroes(ByteRange, bool),
}

impl Sent {
    fn range(&self) -> ByteRange {
        match self {
            Sent::Write(range, _) | Sent::Zeroes(range, _) => *range,
        }
    }

    async fn send(self, peer: Rc<Peer>) -> Result<(), BlockError> {
        match self {
            Sent::Write(range, buf) => peer.write(range.start(), buf).await,
            Sent::Zeroes(range, may_unmap) => {
                let (_, result) = peer.make_zero(range, may_unmap).await;
                result.map_err(|(_, error)| error)
            }
        }
    }
}
