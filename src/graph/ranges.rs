//! Who may touch which part of a disk now.
//!
//! Copies, guest writes, read-modify-write and copy-before-write all meet on one node, and some of them must not overlap.
//! They share one table of range locks. An operation claims its range in one of two kinds: `Shared` claims overlap each
//! other freely (guest writes: two of them at once are the guest's own affair), an `Exclusive` claim overlaps nothing (a
//! copy, the read and write-back around an unaligned request).
//!
//! # Waiting contract
//!
//! A claim waits only for **older** claims that it conflicts with, whether those are granted or wait themselves. Hence
//! the oldest claim is always granted, no circle of waiting can form, and a stream of shared claims cannot starve an
//! exclusive one. For this to hold an operation makes all its claims at once, or lets go of what it has before it claims
//! anew: it must not hold an old claim while it waits with a younger one.
//!
//! # How it is kept
//!
//! Claims stand in order of age in one small vector; each counts the older ones that it conflicts with. A new claim looks
//! through all of them once, a release through the younger ones once and only if somebody waits. With the bound on
//! requests in flight that is a few hundred comparisons; nothing is allocated unless a release lets somebody in.

use crate::base::range::ByteRange;

/// How a claim gets along with others on the same bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LockKind {
    /// Together with other shared claims.
    Shared,
    /// Alone.
    Exclusive,
}

/// Names one claim; never used again by the same table. A smaller one is older.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LockId(u64);

/// Why a claim was not made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LockError {
    /// It would have to wait, for this one among others.
    #[error("the range is locked by another operation")]
    Busy(LockId),
    /// The table holds as many claims as it may.
    #[error("{0} operations hold or await range locks already")]
    Full(usize),
}

#[derive(Debug, Clone)]
struct Claim {
    range: ByteRange,
    id: LockId,
    /// Older claims in the table that this one conflicts with; granted when there are none.
    blockers: u32,
    kind: LockKind,
}

impl Claim {
    fn conflicts(&self, range: ByteRange, kind: LockKind) -> bool {
        self.range.overlaps(range) && (kind == LockKind::Exclusive || self.kind == LockKind::Exclusive)
    }
}

/// The range locks of one node.
#[derive(Debug, Clone)]
pub struct RangeLocks {
    /// Oldest first, so that ids ascend.
    claims: Vec<Claim>,
    waiting: usize,
    next_id: u64,
    claims_max: usize,
}

impl RangeLocks {
    /// An empty table for at most `claims_max` claims, granted and waiting ones together.
    pub fn new(claims_max: usize) -> RangeLocks {
        RangeLocks { claims: Vec::new(), waiting: 0, next_id: 0, claims_max }
    }

    /// Claims `range` if that is granted at once, and otherwise leaves no trace.
    pub fn try_lock(&mut self, range: ByteRange, kind: LockKind) -> Result<LockId, LockError> {
        match self.claims.iter().find(|claim| claim.conflicts(range, kind)) {
            Some(claim) => Err(LockError::Busy(claim.id)),
            None => self.push(range, kind, 0),
        }
    }

    /// Claims `range`, to be granted once every older conflicting claim is released. Whether it is granted already,
    /// [`RangeLocks::is_granted`] tells; when it comes to be, a [`RangeLocks::release`] does. Refused only when the table
    /// is full.
    pub fn enqueue(&mut self, range: ByteRange, kind: LockKind) -> Result<LockId, LockError> {
        let blockers = self.claims.iter().filter(|claim| claim.conflicts(range, kind)).count();
        self.push(range, kind, blockers as u32)
    }

    /// Whether the claim is in the table and waits for nobody.
    pub fn is_granted(&self, id: LockId) -> bool {
        self.position(id).is_some_and(|at| self.claims[at].blockers == 0)
    }

    /// Withdraws a claim, granted or not, and returns those that are granted now and were not before, oldest first.
    /// An id that is not in the table is the caller's mistake: debug builds stop, others change nothing.
    pub fn release(&mut self, id: LockId) -> Vec<LockId> {
        let mut granted = Vec::new();
        let Some(at) = self.position(id) else {
            debug_assert!(false, "{id:?} was released twice");
            return granted;
        };
        let released = self.claims.remove(at);
        self.waiting -= usize::from(released.blockers > 0);
        if self.waiting == 0 {
            return granted;
        }
        for claim in &mut self.claims[at..] {
            if claim.blockers > 0 && claim.conflicts(released.range, released.kind) {
                claim.blockers -= 1;
                if claim.blockers == 0 {
                    self.waiting -= 1;
                    granted.push(claim.id);
                }
            }
        }
        granted
    }

    /// Whether any claim, granted or waiting, of either kind touches `range`.
    pub fn overlaps(&self, range: ByteRange) -> bool {
        self.claims.iter().any(|claim| claim.range.overlaps(range))
    }

    /// The claim that begins first among those, granted or waiting, that touch `range`.
    pub fn first_overlap(&self, range: ByteRange) -> Option<ByteRange> {
        let touching = self.claims.iter().map(|claim| claim.range).filter(|claim| claim.overlaps(range));
        touching.min_by_key(|claim| claim.start())
    }

    /// The range that a claim in the table covers.
    pub fn range_of(&self, id: LockId) -> Option<ByteRange> {
        self.position(id).map(|at| self.claims[at].range)
    }

    /// Claims in the table, granted and waiting.
    pub fn len(&self) -> usize {
        self.claims.len()
    }

    /// Whether nobody holds or awaits anything.
    pub fn is_empty(&self) -> bool {
        self.claims.is_empty()
    }

    /// Whether no further claim can be made.
    pub fn is_full(&self) -> bool {
        self.claims.len() >= self.claims_max
    }

    /// Claims that are not granted yet.
    pub fn waiting(&self) -> usize {
        self.waiting
    }

    fn position(&self, id: LockId) -> Option<usize> {
        self.claims.binary_search_by_key(&id, |claim| claim.id).ok()
    }

    fn push(&mut self, range: ByteRange, kind: LockKind, blockers: u32) -> Result<LockId, LockError> {
        if self.claims.len() >= self.claims_max {
            return Err(LockError::Full(self.claims_max));
        }
        let id = LockId(self.next_id);
        self.next_id += 1;
        self.waiting += usize::from(blockers > 0);
        self.claims.push(Claim { range, id, blockers, kind });
        Ok(id)
    }
}

#[cfg(test)]
mod tests {
    use super::LockKind::{Exclusive, Shared};
    use super::*;
    use crate::base::rng::Rng;

    fn r(start: u64, end: u64) -> ByteRange {
        ByteRange::new(start, end).expect("test range runs forward")
    }

    fn enqueue(locks: &mut RangeLocks, range: ByteRange, kind: LockKind) -> LockId {
        locks.enqueue(range, kind).expect("room in the table")
    }

    #[test]
    fn shared_claims_meet_and_an_exclusive_one_does_not() {
        let mut locks = RangeLocks::new(9);
        let first = enqueue(&mut locks, r(0, 10), Shared);
        assert!(locks.try_lock(r(5, 15), Shared).is_ok());
        assert_eq!(locks.try_lock(r(9, 10), Exclusive), Err(LockError::Busy(first)));
        assert!(locks.try_lock(r(15, 20), Exclusive).is_ok());
        assert!(locks.overlaps(r(19, 30)) && !locks.overlaps(r(20, 30)));
        assert_eq!((locks.len(), locks.waiting()), (3, 0));
    }

    #[test]
    fn a_stream_of_guest_writes_does_not_starve_a_copy() {
        let mut locks = RangeLocks::new(9);
        let write = enqueue(&mut locks, r(0, 10), Shared);
        let copy = enqueue(&mut locks, r(0, 64), Exclusive);
        let later_write = enqueue(&mut locks, r(0, 10), Shared);
        let beside = enqueue(&mut locks, r(64, 70), Shared);
        assert!(locks.is_granted(write) && locks.is_granted(beside));
        assert!(!locks.is_granted(copy) && !locks.is_granted(later_write));
        assert_eq!(locks.release(write), [copy]);
        assert_eq!(locks.release(copy), [later_write]);
        assert!(!locks.is_granted(copy));
    }

    #[test]
    fn a_withdrawn_waiter_lets_those_behind_it_pass() {
        let mut locks = RangeLocks::new(9);
        let write = enqueue(&mut locks, r(0, 10), Shared);
        let copy = enqueue(&mut locks, r(0, 64), Exclusive);
        let second = enqueue(&mut locks, r(5, 10), Shared);
        let third = enqueue(&mut locks, r(20, 30), Shared);
        assert_eq!(locks.release(copy), [second, third]);
        assert!(locks.is_granted(write) && locks.waiting() == 0);
        assert_eq!((locks.range_of(third), locks.range_of(copy)), (Some(r(20, 30)), None));
    }

    #[test]
    fn the_table_is_bounded_and_an_empty_range_waits_for_nobody() {
        let mut locks = RangeLocks::new(2);
        let whole = enqueue(&mut locks, ByteRange::ALL, Exclusive);
        let empty = enqueue(&mut locks, r(5, 5), Exclusive);
        assert!(locks.is_granted(empty));
        assert_eq!(locks.enqueue(r(0, 1), Shared), Err(LockError::Full(2)));
        assert!(locks.release(whole).is_empty());
        assert!(locks.try_lock(r(0, 1), Shared).is_ok());
    }

    /// A claim of the model, which asks the definition anew each time.
    struct Wanted {
        id: LockId,
        range: ByteRange,
        kind: LockKind,
    }

    fn clash(a: &Wanted, b: &Wanted) -> bool {
        (a.kind == Exclusive || b.kind == Exclusive)
            && a.range.start().max(b.range.start()) < a.range.end().min(b.range.end())
    }

    fn granted_by_definition(wanted: &[Wanted]) -> Vec<LockId> {
        let free = |at: usize| !wanted[..at].iter().any(|older| clash(older, &wanted[at]));
        (0..wanted.len()).filter(|&at| free(at)).map(|at| wanted[at].id).collect()
    }

    fn check(locks: &RangeLocks, wanted: &[Wanted]) {
        let granted: Vec<&Wanted> = wanted.iter().filter(|w| locks.is_granted(w.id)).collect();
        assert_eq!(granted.iter().map(|w| w.id).collect::<Vec<_>>(), granted_by_definition(wanted));
        for (at, one) in granted.iter().enumerate() {
            assert!(granted[at + 1..].iter().all(|other| !clash(one, other)), "two hold the same bytes");
        }
        assert_eq!((locks.len(), locks.waiting()), (wanted.len(), wanted.len() - granted.len()));
        assert!(wanted.first().is_none_or(|oldest| locks.is_granted(oldest.id)), "the oldest always goes on");
    }

    /// Mutual exclusion, order by age, exact wake-ups, and that everything ends.
    #[test]
    fn agrees_with_the_definition() {
        for seed in 0..200 {
            let mut rng = Rng::new(seed);
            let (space, max) = (1 + rng.below(60), 1 + rng.below(40) as usize);
            let mut locks = RangeLocks::new(max);
            let mut wanted: Vec<Wanted> = vec![];
            for _ in 0..400 {
                let before = granted_by_definition(&wanted);
                if rng.chance(36_000) {
                    let range = ByteRange::at_saturating(rng.below(space), rng.below(12));
                    let kind = if rng.chance(32_768) { Shared } else { Exclusive };
                    let tries = rng.chance(20_000);
                    let claim = Wanted { id: LockId(u64::MAX), range, kind };
                    let blocker = wanted.iter().find(|older| clash(older, &claim)).map(|older| older.id);
                    let result = if tries { locks.try_lock(range, kind) } else { locks.enqueue(range, kind) };
                    match (result, blocker) {
                        (Err(LockError::Busy(id)), Some(blocker)) => assert!(tries && id == blocker),
                        (Err(LockError::Full(_)), _) => assert_eq!(wanted.len(), max),
                        (Ok(id), _) => {
                            assert!(wanted.len() < max && !(tries && blocker.is_some()));
                            assert!(wanted.last().is_none_or(|last| last.id < id), "ids tell age");
                            wanted.push(Wanted { id, ..claim });
                        }
                        other => panic!("seed {seed}: {other:?}"),
                    }
                } else if !wanted.is_empty() {
                    // Mostly one that is granted ends; now and then one gives up waiting.
                    let id = if rng.chance(50_000) {
                        before[rng.below(before.len() as u64) as usize]
                    } else {
                        wanted[rng.below(wanted.len() as u64) as usize].id
                    };
                    wanted.retain(|w| w.id != id);
                    let mut expected = granted_by_definition(&wanted);
                    expected.retain(|now| !before.contains(now));
                    assert_eq!(locks.release(id), expected, "seed {seed}");
                }
                check(&locks, &wanted);
            }
            while let Some(&id) = granted_by_definition(&wanted).last() {
                wanted.retain(|w| w.id != id);
                let _ = locks.release(id);
                check(&locks, &wanted);
            }
            assert!(locks.is_empty(), "seed {seed}: somebody waits for ever");
        }
    }
}
