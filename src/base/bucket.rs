//! Rate limits.
//!
//! A job has a speed in bytes per second, and the user expects any second to hold to it. A request is not cut to fit:
//! it may start whenever the balance is above zero, is then charged whole, and a balance below zero is paid back by
//! waiting. So over any window of time the bytes started stay below `speed * window + burst + one request`, and no
//! longer run drifts, because the balance is kept exactly: in billionths of a byte, of which one nanosecond at one byte
//! per second adds one.
//!
//! Nobody polls. A refusal names the nanosecond at which the balance is above zero again; that instant becomes a timer.
//! A changed speed counts from the moment of the change, up or down, and what was owed stays owed. Whoever waits has to
//! ask again after a change, since the instant it was given belongs to the old speed.
//!
//! Guest writes that a write-blocking mirror copies are charged and never delayed ([`TokenBucket::charge_debt`]): the
//! job's own copying makes room for them.
//!
//! Several jobs can share one limit ([`BucketGroup`]). Among those who wait, the one that got the fewest bytes goes first;
//! the others stand back for a moment, and only for a moment, so that a member that went away holds up nobody.
//!
//! Time is the caller's, in nanoseconds; should it step back, it stands still here until it has caught up.

use std::cell::RefCell;
use std::rc::Rc;

use super::limits::{BUCKET_GROUP_MEMBERS_MAX, BURST_BYTES_MAX, BURST_NS};
use super::units::NS_PER_SEC;

/// Balance units in a byte: one nanosecond at one byte per second earns one unit.
const UNITS_PER_BYTE: i128 = NS_PER_SEC as i128;

/// Longest time for which a group member stands back, in nanoseconds. The reactor turns more often than that.
const STAND_BACK_NS_MAX: u64 = 1_000_000;
/// Shortest such time: the others are woken in the same turn.
const STAND_BACK_NS_MIN: u64 = 1_000;

/// One rate limit. See the module's head for what it promises.
#[derive(Debug, Clone)]
pub struct TokenBucket {
    /// 0 means unlimited.
    speed_bytes_per_sec: u64,
    burst_ns: u64,
    burst_bytes_max: u64,
    /// Balance at `settled_at_ns`, in units; below zero while something is owed.
    balance: i128,
    settled_at_ns: u64,
}

impl TokenBucket {
    /// A limit that starts now with its burst saved up. A speed of 0 limits nothing.
    pub fn new(now_ns: u64, speed_bytes_per_sec: u64) -> TokenBucket {
        TokenBucket::with_burst(now_ns, speed_bytes_per_sec, BURST_NS, BURST_BYTES_MAX)
    }

    /// The same with a burst of its own: what `burst_ns` earn, at most `burst_bytes_max` bytes.
    pub fn with_burst(
        now_ns: u64,
        speed_bytes_per_sec: u64,
        burst_ns: u64,
        burst_bytes_max: u64,
    ) -> TokenBucket {
        let mut bucket =
            TokenBucket { speed_bytes_per_sec, burst_ns, burst_bytes_max, balance: 0, settled_at_ns: now_ns };
        bucket.balance = bucket.burst();
        bucket
    }

    /// Bytes per second, 0 for no limit.
    pub fn speed(&self) -> u64 {
        self.speed_bytes_per_sec
    }

    /// When a request may start: `None` for now, else the nanosecond from which on it may, if nothing else is charged
    /// and the speed stays.
    pub fn ready_at(&self, now_ns: u64) -> Option<u64> {
        if self.speed_bytes_per_sec == 0 || self.balance > 0 {
            return None;
        }
        let missing = self.balance.unsigned_abs().saturating_add(1);
        let wait_ns =
            u64::try_from(missing.div_ceil(u128::from(self.speed_bytes_per_sec))).unwrap_or(u64::MAX);
        let ready_at_ns = self.settled_at_ns.saturating_add(wait_ns);
        (ready_at_ns > now_ns).then_some(ready_at_ns)
    }

    /// Starts a request of `bytes` and charges it whole, or tells the nanosecond at which to ask again.
    pub fn try_take(&mut self, now_ns: u64, bytes: u64) -> Result<(), u64> {
        if let Some(ready_at_ns) = self.ready_at(now_ns) {
            return Err(ready_at_ns);
        }
        self.charge_debt(now_ns, bytes);
        Ok(())
    }

    /// Charges `bytes` that start whatever the balance is.
    pub fn charge_debt(&mut self, now_ns: u64, bytes: u64) {
        self.settle(now_ns);
        if self.speed_bytes_per_sec != 0 {
            self.balance = self.balance.saturating_sub(i128::from(bytes) * UNITS_PER_BYTE);
        }
    }

    /// Changes the speed from now on. Debts stay, unless the new speed is 0, which forgives them; savings shrink to what
    /// the new speed allows, and time without a limit saves nothing.
    pub fn set_speed(&mut self, now_ns: u64, speed_bytes_per_sec: u64) {
        self.settle(now_ns);
        self.speed_bytes_per_sec = speed_bytes_per_sec;
        self.balance = if speed_bytes_per_sec == 0 { 0 } else { self.balance.min(self.burst()) };
    }

    /// Most that is saved up, in units; above zero, or nothing could ever start.
    fn burst(&self) -> i128 {
        let earned = i128::try_from(u128::from(self.speed_bytes_per_sec) * u128::from(self.burst_ns));
        earned.unwrap_or(i128::MAX).min(i128::from(self.burst_bytes_max) * UNITS_PER_BYTE).max(1)
    }

    /// Adds what was earned since the last look.
    fn settle(&mut self, now_ns: u64) {
        let elapsed_ns = now_ns.saturating_sub(self.settled_at_ns);
        self.settled_at_ns = self.settled_at_ns.max(now_ns);
        if self.speed_bytes_per_sec != 0 {
            let earned = i128::try_from(u128::from(elapsed_ns) * u128::from(self.speed_bytes_per_sec));
            self.balance = self.balance.saturating_add(earned.unwrap_or(i128::MAX)).min(self.burst());
        }
    }
}

/// One limit that several [`Limiter`]s share. Clones are handles to the same limit.
#[derive(Debug, Clone)]
pub struct BucketGroup {
    state: Rc<RefCell<GroupState>>,
}

#[derive(Debug)]
struct GroupState {
    bucket: TokenBucket,
    members: Vec<Member>,
    next_id: u64,
    /// Where the fair order stands: the place of the request that started last.
    place_bytes: u64,
    /// Requests started, to see whether anything happened since.
    started: u64,
}

#[derive(Debug)]
struct Member {
    id: u64,
    /// Place of its next request in the fair order: the bytes it got, counted from where the others were when it came.
    place_bytes: u64,
    /// It was refused and has not been let in since.
    waits: bool,
    /// It stands back for others since the group's count of started requests was this.
    stood_back_at: Option<u64>,
}

/// A group has as many members as it may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the rate limit is shared by {BUCKET_GROUP_MEMBERS_MAX} jobs already")]
pub struct GroupFull;

impl BucketGroup {
    /// A shared limit without members. A speed of 0 limits nothing.
    pub fn new(now_ns: u64, speed_bytes_per_sec: u64) -> BucketGroup {
        let state = GroupState {
            bucket: TokenBucket::new(now_ns, speed_bytes_per_sec),
            members: Vec::new(),
            next_id: 0,
            place_bytes: 0,
            started: 0,
        };
        BucketGroup { state: Rc::new(RefCell::new(state)) }
    }

    /// Bytes per second of all members together, 0 for no limit.
    pub fn speed(&self) -> u64 {
        self.state.borrow().bucket.speed()
    }

    /// Changes the shared speed from now on; see [`TokenBucket::set_speed`].
    pub fn set_speed(&self, now_ns: u64, speed_bytes_per_sec: u64) {
        self.state.borrow_mut().bucket.set_speed(now_ns, speed_bytes_per_sec);
    }
}

impl GroupState {
    fn join(&mut self) -> Result<u64, GroupFull> {
        if self.members.len() >= BUCKET_GROUP_MEMBERS_MAX {
            return Err(GroupFull);
        }
        let id = self.next_id;
        self.next_id += 1;
        self.members.push(Member { id, place_bytes: self.place_bytes, waits: false, stood_back_at: None });
        Ok(id)
    }

    /// The place of a member that stayed away does not lag behind: absence earns no bytes.
    fn place_of(&self, id: u64) -> u64 {
        let member = self.members.iter().find(|m| m.id == id);
        member.map_or(0, |m| m.place_bytes).max(self.place_bytes)
    }

    fn member(&mut self, id: u64) -> Option<&mut Member> {
        self.members.iter_mut().find(|m| m.id == id)
    }

    fn try_take(&mut self, id: u64, now_ns: u64, bytes: u64) -> Result<(), u64> {
        let verdict = match self.bucket.ready_at(now_ns) {
            Some(ready_at_ns) => Err(ready_at_ns),
            None if self.stands_back(id) => Err(now_ns.saturating_add(self.stand_back_ns(bytes))),
            None => Ok(()),
        };
        if let Some(member) = self.member(id) {
            member.waits = verdict.is_err();
        }
        verdict?;
        self.started += 1;
        self.charge(id, now_ns, bytes);
        Ok(())
    }

    /// Whether `id` lets somebody who waits go first. Those who let it come back without having started anything have
    /// lost their claim: they may have gone for good.
    fn stands_back(&mut self, id: u64) -> bool {
        let (own_place, current, started) = (self.place_of(id), self.place_bytes, self.started);
        let goes_first =
            |other: &Member| other.id != id && other.waits && other.place_bytes.max(current) < own_place;
        let wanted = self.bucket.speed() != 0 && self.members.iter().any(goes_first);
        let in_vain = self.member(id).is_some_and(|member| member.stood_back_at == Some(started));
        if in_vain {
            self.members.iter_mut().filter(|other| goes_first(other)).for_each(|other| other.waits = false);
        }
        let stands_back = wanted && !in_vain;
        if let Some(member) = self.member(id) {
            member.stood_back_at = stands_back.then_some(started);
        }
        stands_back
    }

    /// As long as a request like this one would keep the bucket busy, within bounds.
    fn stand_back_ns(&self, bytes: u64) -> u64 {
        let busy_ns = u128::from(bytes) * u128::from(NS_PER_SEC) / u128::from(self.bucket.speed().max(1));
        u64::try_from(busy_ns).unwrap_or(u64::MAX).clamp(STAND_BACK_NS_MIN, STAND_BACK_NS_MAX)
    }

    fn charge(&mut self, id: u64, now_ns: u64, bytes: u64) {
        self.bucket.charge_debt(now_ns, bytes);
        let place_bytes = self.place_of(id);
        self.place_bytes = place_bytes;
        if let Some(member) = self.member(id) {
            member.place_bytes = place_bytes.saturating_add(bytes);
        }
    }
}

/// The limit of one job: its own speed and, if it has joined a group, the group's as well. Leaves the group on drop.
#[derive(Debug)]
pub struct Limiter {
    own: TokenBucket,
    group: Option<(BucketGroup, u64)>,
}

impl Limiter {
    /// A limit of its own in no group. A speed of 0 limits nothing.
    pub fn new(now_ns: u64, speed_bytes_per_sec: u64) -> Limiter {
        Limiter { own: TokenBucket::new(now_ns, speed_bytes_per_sec), group: None }
    }

    /// Comes under `group`'s limit too, and leaves the group it was in.
    pub fn join(&mut self, group: &BucketGroup) -> Result<(), GroupFull> {
        self.leave();
        let id = group.state.borrow_mut().join()?;
        self.group = Some((group.clone(), id));
        Ok(())
    }

    /// Leaves its group. What it owes there stays owed.
    pub fn leave(&mut self) {
        if let Some((group, id)) = self.group.take() {
            group.state.borrow_mut().members.retain(|m| m.id != id);
        }
    }

    /// Own bytes per second, 0 for no limit.
    pub fn speed(&self) -> u64 {
        self.own.speed()
    }

    /// Changes the own speed from now on; see [`TokenBucket::set_speed`].
    pub fn set_speed(&mut self, now_ns: u64, speed_bytes_per_sec: u64) {
        self.own.set_speed(now_ns, speed_bytes_per_sec);
    }

    /// The nanosecond before which no request can start, `None` when one may be tried now. In a group another member may
    /// still be let in first.
    pub fn ready_at(&self, now_ns: u64) -> Option<u64> {
        let group = self.group.as_ref().and_then(|(group, _)| group.state.borrow().bucket.ready_at(now_ns));
        self.own.ready_at(now_ns).max(group)
    }

    /// Starts a request of `bytes` and charges it everywhere, or charges nothing and tells the nanosecond at which to
    /// ask again.
    pub fn try_take(&mut self, now_ns: u64, bytes: u64) -> Result<(), u64> {
        if let Some(ready_at_ns) = self.own.ready_at(now_ns) {
            return Err(ready_at_ns);
        }
        if let Some((group, id)) = &self.group {
            group.state.borrow_mut().try_take(*id, now_ns, bytes)?;
        }
        self.own.charge_debt(now_ns, bytes);
        Ok(())
    }

    /// Charges `bytes` that start whatever the balances are.
    pub fn charge_debt(&mut self, now_ns: u64, bytes: u64) {
        self.own.charge_debt(now_ns, bytes);
        if let Some((group, id)) = &self.group {
            group.state.borrow_mut().charge(*id, now_ns, bytes);
        }
    }
}

impl Drop for Limiter {
    fn drop(&mut self) {
        self.leave();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::rng::Rng;

    const MIB: u64 = 1 << 20;

    /// A bucket that walks through time nanosecond by nanosecond.
    struct Walker {
        speed: i128,
        burst_ns: i128,
        burst_bytes: i128,
        balance: i128,
    }

    impl Walker {
        fn cap(&self) -> i128 {
            (self.speed * self.burst_ns).min(self.burst_bytes * 1_000_000_000)
        }

        fn tick(&mut self) {
            if self.speed > 0 {
                self.balance = (self.balance + self.speed).min(self.cap());
            }
        }

        fn set_speed(&mut self, speed: i128) {
            self.speed = speed;
            self.balance = if speed == 0 { 0 } else { self.balance.min(self.cap()) };
        }
    }

    /// Same verdict at every nanosecond, and every announced instant is the first at which the walker agrees.
    #[test]
    fn agrees_with_a_walk_through_every_nanosecond() {
        for seed in 0..300 {
            let mut rng = Rng::new(seed);
            let pick_speed = |rng: &mut Rng| rng.below(4) * (1 + rng.below(3_000_000_000));
            let (speed, burst_ns, burst_bytes) =
                (pick_speed(&mut rng), 1 + rng.below(60), 1 + rng.below(100));
            let start = if rng.chance(32768) { 0 } else { u64::MAX - 10_000 };
            let mut bucket = TokenBucket::with_burst(start, speed, burst_ns, burst_bytes);
            let mut walker = Walker {
                speed: speed.into(),
                burst_ns: burst_ns.into(),
                burst_bytes: burst_bytes.into(),
                balance: 0,
            };
            walker.balance = walker.cap().max(1);
            let mut promised = None;
            for now in start..start + 1500 {
                let may_start = walker.speed == 0 || walker.balance > 0;
                assert_eq!(bucket.ready_at(now).is_none(), may_start, "seed {seed} at {now}");
                if let Some(at) = promised {
                    assert_eq!(now >= at, may_start, "seed {seed}: promised {at}, now {now}");
                }
                if may_start {
                    promised = None;
                }
                if rng.chance(9000) {
                    let bytes = rng.below(200);
                    let verdict = bucket.try_take(now, bytes);
                    assert_eq!(verdict.is_ok(), may_start);
                    match verdict {
                        Ok(()) if walker.speed > 0 => walker.balance -= i128::from(bytes) * 1_000_000_000,
                        Ok(()) => {}
                        Err(at) => promised = Some(at),
                    }
                }
                if rng.chance(600) {
                    let bytes = rng.below(100);
                    bucket.charge_debt(now, bytes);
                    if walker.speed > 0 {
                        walker.balance -= i128::from(bytes) * 1_000_000_000;
                    }
                    promised = None;
                }
                if rng.chance(600) {
                    let speed = pick_speed(&mut rng);
                    bucket.set_speed(now, speed);
                    walker.set_speed(speed.into());
                    promised = None;
                }
                walker.tick();
            }
        }
    }

    /// A greedy job that sleeps to every announced instant, and sometimes oversleeps.
    #[test]
    fn no_second_holds_more_than_it_may_and_no_byte_is_lost() {
        for seed in 0..40 {
            let mut rng = Rng::new(seed);
            let magnitude = rng.range(10..35);
            let speed = 1 + rng.below(1 << magnitude);
            let request_max = 1 + rng.below(4 * MIB);
            let burst = (speed / 10).min(BURST_BYTES_MAX);
            let mut bucket = TokenBucket::new(0, speed);
            let (mut now, mut started, mut total) = (0u64, vec![], 0u64);
            for _ in 0..2000 {
                let bytes = 1 + rng.below(request_max);
                while let Err(at) = bucket.try_take(now, bytes) {
                    assert!(at > now);
                    now = if rng.chance(8000) { at + rng.below(50_000_000) } else { at };
                }
                started.push((now, bytes));
                total += bytes;
            }
            let (mut first, mut in_window) = (0, 0u64);
            for &(at, bytes) in &started {
                in_window += bytes;
                while started[first].0 + NS_PER_SEC <= at {
                    in_window -= started[first].1;
                    first += 1;
                }
                assert!(in_window <= speed + burst + 1 + request_max, "seed {seed}: {in_window} in a second");
            }
            // Sleeping late by less than the burst's time costs nothing: the whole run is as fast as it may be.
            let due_ns = u128::from(total) * u128::from(NS_PER_SEC) / u128::from(speed);
            if speed / 10 < BURST_BYTES_MAX {
                assert!(u128::from(now) <= due_ns + 1, "seed {seed}: {now} against {due_ns}");
            }
        }
    }

    #[test]
    fn a_first_request_overshoots_and_is_slept_off() {
        let mut bucket = TokenBucket::new(0, 65536);
        assert_eq!(bucket.try_take(0, 512 << 10), Ok(()));
        // 512 KiB at 64 KiB/s are 8 s, of which the burst had saved 100 ms; one more nanosecond puts it above zero.
        assert_eq!(bucket.try_take(0, 1), Err(7_900_000_001));
        assert_eq!(bucket.try_take(7_900_000_000, 1), Err(7_900_000_001));
        assert_eq!(bucket.try_take(7_900_000_001, 1), Ok(()));
    }

    #[test]
    fn a_changed_speed_counts_at_once() {
        let mut bucket = TokenBucket::with_burst(0, 1000, 1, 1);
        assert_eq!(bucket.try_take(0, 1000), Ok(()));
        assert_eq!(bucket.ready_at(0), Some(1_000_000_000));
        bucket.set_speed(500_000_000, 250);
        assert_eq!(bucket.ready_at(500_000_000), Some(2_499_999_997));
        bucket.set_speed(500_000_000, 500_000);
        assert_eq!(bucket.ready_at(500_000_000), Some(501_000_000));
        bucket.set_speed(500_000_000, 0);
        assert_eq!(bucket.try_take(500_000_000, u64::MAX), Ok(()));
        assert_eq!(bucket.ready_at(0), None);
        bucket.set_speed(600_000_000, 1000);
        assert_eq!(bucket.ready_at(600_000_000), Some(600_000_001));
    }

    #[test]
    fn lowering_and_raising_in_turn_mints_nothing() {
        let mut bucket = TokenBucket::new(0, 1000 * MIB);
        bucket.set_speed(0, 10);
        bucket.set_speed(0, 1000 * MIB);
        // One second of 10 B/s had saved one byte.
        assert_eq!(bucket.try_take(0, 1), Ok(()));
        assert_eq!(bucket.try_take(0, 1), Err(1));
    }

    #[test]
    fn extremes_neither_wrap_nor_hang() {
        let mut bucket = TokenBucket::new(u64::MAX - 5, 1);
        assert_eq!(bucket.try_take(u64::MAX - 5, u64::MAX), Ok(()));
        assert_eq!(bucket.try_take(u64::MAX - 1, 1), Err(u64::MAX));
        let mut fast = TokenBucket::new(0, u64::MAX);
        assert_eq!(fast.try_take(u64::MAX, u64::MAX), Ok(()));
        let mut back = TokenBucket::new(1000, 1_000_000_000);
        assert_eq!(back.try_take(1000, 200_000_000), Ok(()));
        let ready = back.ready_at(1000);
        assert_eq!(back.ready_at(0), ready);
        back.charge_debt(0, 0);
        assert_eq!(back.ready_at(1000), ready);
        // No burst at all still lets one request after the other through.
        let mut strict = TokenBucket::with_burst(0, 10, 0, 0);
        assert_eq!(strict.try_take(0, 10), Ok(()));
        assert!(strict.ready_at(0).is_some_and(|at| strict.try_take(at, 10).is_ok()));
    }

    /// Runs members against each other in one timeline; returns the bytes that each got.
    fn compete(speed: u64, sizes: &[u64], until_ns: u64, leaves: Option<(usize, u64)>) -> Vec<u64> {
        let group = BucketGroup::new(0, speed);
        let mut limiters: Vec<Limiter> = sizes.iter().map(|_| Limiter::new(0, 0)).collect();
        for limiter in &mut limiters {
            assert_eq!(limiter.join(&group), Ok(()));
        }
        let mut got = vec![0; sizes.len()];
        let mut wake = vec![0; sizes.len()];
        while let Some(now) = wake.iter().copied().min().filter(|&now| now < until_ns) {
            // Always in the same order, as a reactor that steps its jobs in a list does.
            for i in 0..sizes.len() {
                if leaves.is_some_and(|(who, at)| who == i && now >= at) {
                    wake[i] = u64::MAX;
                }
                while wake[i] <= now {
                    match limiters[i].try_take(now, sizes[i]) {
                        Ok(()) => got[i] += sizes[i],
                        Err(at) => wake[i] = at,
                    }
                }
            }
        }
        got
    }

    #[test]
    fn members_share_evenly_whatever_their_request_size() {
        for speed in [MIB, 50 * MIB, 2000 * MIB] {
            let got = compete(speed, &[MIB, 64 << 10, 256 << 10], 20 * NS_PER_SEC, None);
            let total: u64 = got.iter().sum();
            assert!(total >= speed / 10 * 199, "{speed}: {got:?}");
            assert!(total <= speed * 20 + speed / 10 + MIB, "{speed}: {got:?}");
            for &bytes in &got {
                assert!(bytes > total / 3 * 4 / 5 && bytes < total / 3 * 6 / 5, "{speed}: {got:?}");
            }
        }
    }

    #[test]
    fn a_member_that_stops_asking_holds_up_nobody() {
        let got = compete(50 * MIB, &[MIB, MIB], 20 * NS_PER_SEC, Some((1, 5 * NS_PER_SEC)));
        let total: u64 = got.iter().sum();
        assert!(total >= 995 * MIB, "{got:?}");
        assert!(got[1] < 140 * MIB, "{got:?}");
    }

    #[test]
    fn one_stands_back_for_a_claim_once_and_not_again_in_vain() {
        // 1000 B/s and requests of 1000 bytes: one second each, after the 100 ms that were saved.
        let group = BucketGroup::new(0, 1000);
        let (mut greedy, mut gone) = (Limiter::new(0, 0), Limiter::new(0, 0));
        assert_eq!((greedy.join(&group), gone.join(&group)), (Ok(()), Ok(())));
        assert_eq!(greedy.try_take(0, 1000), Ok(()));
        let ready = 900_000_001;
        assert_eq!((greedy.try_take(0, 1000), gone.try_take(0, 1000)), (Err(ready), Err(ready)));
        assert_eq!(greedy.try_take(ready, 1000), Err(ready + STAND_BACK_NS_MAX));
        assert_eq!(greedy.try_take(ready + STAND_BACK_NS_MAX, 1000), Ok(()));
        let again = ready + 1_000_000_000;
        assert_eq!(greedy.try_take(ready + STAND_BACK_NS_MAX, 1000), Err(again));
        assert_eq!(greedy.try_take(again, 1000), Ok(()));
        // Coming back, the other one has its claim again.
        let ready = again + 1_000_000_000;
        assert_eq!(gone.try_take(again, 1000), Err(ready));
        assert_eq!(greedy.try_take(ready, 1000), Err(ready + STAND_BACK_NS_MAX));
        assert_eq!(gone.try_take(ready, 1000), Ok(()));
    }

    #[test]
    fn both_limits_hold_and_leaving_lifts_one() {
        let group = BucketGroup::new(0, 1000);
        let mut limiter = Limiter::new(0, 100);
        assert_eq!(limiter.join(&group), Ok(()));
        limiter.charge_debt(0, 210);
        assert_eq!(limiter.ready_at(0), Some(2_000_000_001));
        let mut other = Limiter::new(0, 0);
        assert_eq!(other.join(&group), Ok(()));
        assert_eq!(other.try_take(0, 1), Err(110_000_001));
        group.set_speed(0, 0);
        assert_eq!(other.try_take(0, 1), Ok(()));
        group.set_speed(0, 1);
        assert_eq!(group.speed(), 1);
        limiter.set_speed(0, 0);
        assert_eq!(limiter.ready_at(0), Some(1));
        limiter.leave();
        assert_eq!(limiter.ready_at(0), None);
    }

    #[test]
    fn a_group_has_room_for_so_many_and_takes_leavers_back() {
        let group = BucketGroup::new(0, 1);
        let mut limiters: Vec<Limiter> = (0..=BUCKET_GROUP_MEMBERS_MAX).map(|_| Limiter::new(0, 0)).collect();
        let results: Vec<_> = limiters.iter_mut().map(|limiter| limiter.join(&group)).collect();
        assert!(results[..BUCKET_GROUP_MEMBERS_MAX].iter().all(Result::is_ok));
        assert_eq!(results[BUCKET_GROUP_MEMBERS_MAX], Err(GroupFull));
        limiters.remove(0);
        assert_eq!(limiters.last_mut().map(|limiter| limiter.join(&group)), Some(Ok(())));
    }
}
