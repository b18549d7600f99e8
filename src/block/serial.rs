//! Who may touch which part of a disk now.
//!
//! Copies, guest writes, read-modify-write and changes of where a cluster lies all meet on one disk, and some of them must
//! not overlap. An operation claims its range in one of two kinds: `Shared` claims overlap each other freely (two guest
//! writes at once are the guest's own affair), an `Exclusive` claim overlaps nothing (a copy, the read and write-back around
//! a part of a block, an allocation). Reads claim nothing.
//!
//! # Waiting contract
//!
//! A claim waits only for **older** claims that it conflicts with, whether those are granted or wait themselves. Hence
//! the oldest claim is always granted, no circle of waiting can form, and a stream of shared claims cannot starve an
//! exclusive one. For this to hold an operation makes all its claims at once, or lets go of what it has before it claims
//! anew ([`Claim::upgrade`] does): it must not hold an old claim while it waits with a younger one.
//!
//! # How it is kept
//!
//! Claims stand in order of age in one small vector; each counts the older ones that it conflicts with. A shared claim
//! looks at the others only while there are exclusive ones, a release at the younger ones only if somebody waits. With the
//! bound on requests in flight that is a few hundred comparisons. Whoever waits is woken by the end of the last that it
//! waits for: thousands may wait for one cluster. Nothing is allocated for a claim that is granted at once.
//!
//! [`Serial`] is the table with the waiting; [`RangeLocks`] is the table alone, for those who wait for more than a claim.

use std::cell::RefCell;

use blockferry_ring::Ring;
use blockferry_ring::sync::Notify;

use crate::base::range::ByteRange;

/// What those who wait next are woken by, kept for them.
const SPARE: usize = 64;

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
struct Entry {
    range: ByteRange,
    id: LockId,
    /// Older claims in the table that this one conflicts with; granted when there are none.
    blockers: u32,
    kind: LockKind,
}

impl Entry {
    fn conflicts(&self, range: ByteRange, kind: LockKind) -> bool {
        self.range.overlaps(range) && (kind == LockKind::Exclusive || self.kind == LockKind::Exclusive)
    }
}

/// A table of range locks.
#[derive(Debug, Clone)]
pub struct RangeLocks {
    /// Oldest first, so that ids ascend.
    claims: Vec<Entry>,
    /// Exclusive claims among them: without any, a shared one has nobody to wait for.
    exclusive: usize,
    waiting: usize,
    next_id: u64,
    claims_max: usize,
}

impl RangeLocks {
    /// An empty table for at most `claims_max` claims, granted and waiting ones together.
    pub fn new(claims_max: usize) -> RangeLocks {
        RangeLocks { claims: Vec::new(), exclusive: 0, waiting: 0, next_id: 0, claims_max }
    }

    /// Claims `range` if that is granted at once, and otherwise leaves no trace.
    pub fn try_lock(&mut self, range: ByteRange, kind: LockKind) -> Result<LockId, LockError> {
        match self.claims.iter().find(|claim| claim.conflicts(range, kind)) {
            Some(claim) => Err(LockError::Busy(claim.id)),
            None => self.enqueue(range, kind),
        }
    }

    /// Claims `range`, to be granted once every older conflicting claim is released. Whether it is granted already,
    /// [`RangeLocks::is_granted`] tells; when it comes to be, a [`RangeLocks::release`] does. Refused only when the table
    /// is full.
    pub fn enqueue(&mut self, range: ByteRange, kind: LockKind) -> Result<LockId, LockError> {
        if self.is_full() { Err(LockError::Full(self.claims_max)) } else { Ok(self.claim(range, kind)) }
    }

    fn claim(&mut self, range: ByteRange, kind: LockKind) -> LockId {
        let blockers = match kind {
            LockKind::Shared if self.exclusive == 0 => 0,
            _ => self.claims.iter().filter(|claim| claim.conflicts(range, kind)).count(),
        };
        let id = LockId(self.next_id);
        self.next_id += 1;
        self.exclusive += usize::from(kind == LockKind::Exclusive);
        self.waiting += usize::from(blockers > 0);
        self.claims.push(Entry { range, id, blockers: blockers as u32, kind });
        id
    }

    /// Whether the claim is in the table and waits for nobody.
    pub fn is_granted(&self, id: LockId) -> bool {
        self.position(id).is_some_and(|at| self.claims[at].blockers == 0)
    }

    /// Withdraws a claim, granted or not, and names those that are granted now and were not before, oldest first.
    /// An id that is not in the table is the caller's mistake: debug builds stop, others change nothing.
    pub fn release(&mut self, id: LockId, granted: impl FnMut(LockId)) {
        let Some(at) = self.position(id) else {
            debug_assert!(false, "{id:?} was released twice");
            return;
        };
        let released = self.claims.remove(at);
        self.exclusive -= usize::from(released.kind == LockKind::Exclusive);
        self.waiting -= usize::from(released.blockers > 0);
        self.wait_less(at, |claim| claim.conflicts(released.range, released.kind), granted);
    }

    /// Turns an exclusive claim into a shared one, which those behind it that share no longer wait for; names those that are
    /// granted by that, as [`RangeLocks::release`] does.
    pub fn share(&mut self, id: LockId, granted: impl FnMut(LockId)) {
        let has_it_alone = |claim: &Entry| claim.blockers == 0 && claim.kind == LockKind::Exclusive;
        let Some(at) = self.position(id).filter(|at| has_it_alone(&self.claims[*at])) else { return };
        self.claims[at].kind = LockKind::Shared;
        self.exclusive -= 1;
        let range = self.claims[at].range;
        let shares = |claim: &Entry| claim.kind == LockKind::Shared && claim.range.overlaps(range);
        self.wait_less(at + 1, shares, granted);
    }

    /// Those from position `at` on that waited for a claim which is in nobody's way now wait for one less.
    fn wait_less(&mut self, at: usize, waited: impl Fn(&Entry) -> bool, mut granted: impl FnMut(LockId)) {
        if self.waiting == 0 {
            return;
        }
        for claim in &mut self.claims[at..] {
            if claim.blockers > 0 && waited(claim) {
                claim.blockers -= 1;
                if claim.blockers == 0 {
                    self.waiting -= 1;
                    granted(claim.id);
                }
            }
        }
    }

    /// The claim that begins first among those, granted or waiting, that touch `range`.
    pub fn first_overlap(&self, range: ByteRange) -> Option<ByteRange> {
        let touching = self.claims.iter().map(|claim| claim.range).filter(|claim| claim.overlaps(range));
        touching.min_by_key(|claim| claim.start())
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
}

/// Range locks that are waited for.
#[derive(Debug)]
pub struct Serial {
    ring: Ring,
    locks: RefCell<RangeLocks>,
    waiters: RefCell<Waiters>,
}

/// Those who wait for a claim, by its id, and what others have waited with.
#[derive(Debug, Default)]
struct Waiters {
    /// Oldest first.
    asleep: Vec<(LockId, Notify)>,
    spare: Vec<Notify>,
}

impl Waiters {
    /// Who waits with this claim does so no longer.
    fn remove(&mut self, id: LockId) -> Option<Notify> {
        let at = self.asleep.binary_search_by_key(&id, |(id, _)| *id).ok()?;
        let (_, notify) = self.asleep.remove(at);
        if self.spare.len() < SPARE {
            self.spare.push(notify.clone());
        }
        Some(notify)
    }

    fn wake(&mut self, id: LockId) {
        if let Some(notify) = self.remove(id) {
            notify.notify();
        }
    }
}

/// A claim; it ends when this is dropped.
#[derive(Debug)]
pub struct Claim<'a> {
    serial: &'a Serial,
    range: ByteRange,
    id: LockId,
}

impl Serial {
    /// Nothing is claimed. How many claims there are is up to whoever bounds the requests in flight.
    pub fn new(ring: &Ring) -> Serial {
        Serial {
            ring: ring.clone(),
            locks: RefCell::new(RangeLocks::new(usize::MAX)),
            waiters: RefCell::default(),
        }
    }

    /// Claims `range` and waits for older claims that are in the way.
    pub async fn enter(&self, range: ByteRange, kind: LockKind) -> Claim<'_> {
        let id = self.locks.borrow_mut().claim(range, kind);
        // From here on the guard takes it back, whatever becomes of this future.
        let claim = Claim { serial: self, range, id };
        if !self.locks.borrow().is_granted(id) {
            self.asleep(id).until(|| self.locks.borrow().is_granted(id).then_some(())).await;
        }
        claim
    }

    /// What wakes whoever waits with this claim.
    fn asleep(&self, id: LockId) -> Notify {
        let mut waiters = self.waiters.borrow_mut();
        let notify = waiters.spare.pop().unwrap_or_else(|| self.ring.notify());
        waiters.asleep.push((id, notify.clone()));
        notify
    }

    /// Claims, granted or not.
    #[cfg(test)]
    fn count(&self) -> usize {
        self.locks.borrow().len()
    }
}

impl<'a> Claim<'a> {
    /// Lets those in who share.
    pub fn share(&self) {
        let mut waiters = self.serial.waiters.borrow_mut();
        self.serial.locks.borrow_mut().share(self.id, |granted| waiters.wake(granted));
    }

    /// Has the range alone from now on. It is let go for that and claimed anew, behind those who wait for it already: what
    /// was true of it need not be true any more.
    pub async fn upgrade(self) -> Claim<'a> {
        let (serial, range) = (self.serial, self.range);
        drop(self);
        serial.enter(range, LockKind::Exclusive).await
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut waiters = self.serial.waiters.borrow_mut();
        // One that is dropped while it waits has not been woken.
        waiters.remove(self.id);
        self.serial.locks.borrow_mut().release(self.id, |granted| waiters.wake(granted));
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::LockKind::{Exclusive, Shared};
    use super::*;
    use blockferry_ring::Config;
    use blockferry_ring::sync::at_once;

    use crate::base::rng::Rng;

    fn r(start: u64, end: u64) -> ByteRange {
        ByteRange::new(start, end).expect("test range runs forward")
    }

    fn release(locks: &mut RangeLocks, id: LockId) -> Vec<LockId> {
        let mut granted = Vec::new();
        locks.release(id, |id| granted.push(id));
        granted
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
        assert_eq!((locks.first_overlap(r(12, 30)), locks.first_overlap(r(20, 30))), (Some(r(5, 15)), None));
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
        assert_eq!(release(&mut locks, write), [copy]);
        assert_eq!(release(&mut locks, copy), [later_write]);
        assert!(!locks.is_granted(copy));
    }

    #[test]
    fn a_withdrawn_waiter_lets_those_behind_it_pass() {
        let mut locks = RangeLocks::new(9);
        let write = enqueue(&mut locks, r(0, 10), Shared);
        let copy = enqueue(&mut locks, r(0, 64), Exclusive);
        let second = enqueue(&mut locks, r(5, 10), Shared);
        let third = enqueue(&mut locks, r(20, 30), Shared);
        assert_eq!(release(&mut locks, copy), [second, third]);
        assert!(locks.is_granted(write) && locks.waiting() == 0);
        assert!(locks.is_granted(third) && !locks.is_granted(copy));
    }

    #[test]
    fn the_table_is_bounded_and_an_empty_range_waits_for_nobody() {
        let mut locks = RangeLocks::new(2);
        let whole = enqueue(&mut locks, ByteRange::ALL, Exclusive);
        let empty = enqueue(&mut locks, r(5, 5), Exclusive);
        assert!(locks.is_granted(empty));
        assert_eq!(locks.enqueue(r(0, 1), Shared), Err(LockError::Full(2)));
        assert!(release(&mut locks, whole).is_empty());
        assert!(locks.try_lock(r(0, 1), Shared).is_ok());
    }

    #[test]
    fn one_that_shares_lets_those_in_that_share() {
        let mut locks = RangeLocks::new(9);
        let alone = enqueue(&mut locks, r(0, 64), Exclusive);
        let write = enqueue(&mut locks, r(0, 10), Shared);
        let copy = enqueue(&mut locks, r(20, 30), Exclusive);
        let behind = enqueue(&mut locks, r(25, 40), Shared);
        let mut granted = Vec::new();
        locks.share(write, |id| granted.push(id));
        locks.share(copy, |id| granted.push(id));
        assert!(granted.is_empty(), "these have nothing alone");
        locks.share(alone, |id| granted.push(id));
        assert_eq!(granted, [write]);
        assert_eq!(release(&mut locks, alone), [copy]);
        assert_eq!(release(&mut locks, copy), [behind]);
        assert_eq!((locks.len(), locks.waiting()), (2, 0));
        assert!(locks.try_lock(r(0, 40), Shared).is_ok(), "nobody has anything alone");
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
                    assert_eq!(release(&mut locks, id), expected, "seed {seed}");
                }
                check(&locks, &wanted);
            }
            while let Some(&id) = granted_by_definition(&wanted).last() {
                wanted.retain(|w| w.id != id);
                let _ = release(&mut locks, id);
                check(&locks, &wanted);
            }
            assert!(locks.is_empty(), "seed {seed}: somebody waits for ever");
        }
    }

    /// Claims in order, and says which of them may run; then ends some, and says so again.
    #[test]
    fn only_older_conflicts_are_waited_for() {
        let ring = Ring::new(&Config { arena_bytes: 1 << 20, ..Config::default() }).expect("a ring");
        let world = ring.clone();
        ring.block_on(async move {
            let table = Rc::new(Serial::new(&world));
            let running = Rc::new(RefCell::new(Vec::<usize>::new()));
            let asked = [
                (r(0, 4096), Shared),       // 0: plain
                (r(0, 4096), Shared),       // 1: plain over plain: runs
                (r(0, 512), Exclusive),     // 2: waits for 0 and 1
                (r(512, 1024), Shared),     // 3: beside 2: runs
                (r(0, 1024), Shared),       // 4: waits for 2 alone
                (r(8192, 8704), Exclusive), // 5: alone: runs
                (r(8192, 8704), Exclusive), // 6: waits for 5
                (r(0, 1 << 20), Shared),    // 7: waits for 2, 5, 6
            ];
            let gates: Vec<_> = asked.iter().map(|_| world.one_shot::<()>()).collect();
            for (i, (range, kind)) in asked.into_iter().enumerate() {
                let (table, running, gate) = (table.clone(), running.clone(), gates[i].clone());
                world.spawn(async move {
                    let _claim = table.enter(range, kind).await;
                    running.borrow_mut().push(i);
                    gate.take().await;
                    running.borrow_mut().retain(|&j| j != i);
                });
            }
            let settle = async |end: Option<usize>| {
                if let Some(i) = end {
                    gates[i].give(());
                }
                for _ in 0..8 {
                    world.yield_now().await;
                }
                let mut now = running.borrow().clone();
                now.sort();
                now
            };
            assert_eq!(settle(None).await, [0, 1, 3, 5]);
            assert_eq!(settle(Some(0)).await, [1, 3, 5]);
            assert_eq!(settle(Some(1)).await, [2, 3, 5]);
            assert_eq!(settle(Some(5)).await, [2, 3, 6]);
            assert_eq!(settle(Some(2)).await, [3, 4, 6]);
            assert_eq!(settle(Some(6)).await, [3, 4, 7]);
            for i in [3, 4, 7] {
                settle(Some(i)).await;
            }
            assert_eq!(table.count(), 0);
            // Whoever is to have alone what he shares comes behind those who wait for it.
            let (first, other) = (table.enter(r(0, 512), Shared).await, table.enter(r(0, 512), Shared).await);
            let third = table.enter(r(0, 512), Exclusive);
            let mut third = std::pin::pin!(third);
            assert!(at_once(third.as_mut()).is_none());
            let alone = first.upgrade();
            let mut alone = std::pin::pin!(alone);
            assert!(at_once(alone.as_mut()).is_none());
            drop(other);
            assert!(at_once(alone.as_mut()).is_none());
            let third = at_once(third).expect("it is the oldest");
            third.share();
            assert!(at_once(alone.as_mut()).is_none());
            drop(third);
            let alone = at_once(alone).expect("nobody else is there");
            // One that is dropped while it waits is in nobody's way.
            assert!(at_once(table.enter(r(0, 512), Shared)).is_none());
            drop(alone);
            assert!(at_once(table.enter(r(0, 512), Exclusive)).is_some());
            assert_eq!(table.count(), 0);
        });
    }
}
