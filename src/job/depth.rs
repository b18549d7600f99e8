//! How many copies a job keeps in flight, found out from how they go.
//!
//! # Situation
//! What keeps a path busy is its throughput times the time that one copy takes on it. A device near by needs few copies
//! at once; a server that is 5 ms away needs a hundred, and what is in flight beyond that only waits in a queue. No
//! number is right for both, and how far away a target is, nobody says.
//!
//! # How it decides
//! A pure function of copies that have ended. The *rate* is measured over one window's worth of them, the *least time* of
//! one copy is that of a path without a queue. Their product is what the path holds; twice as many are allowed, so that a
//! path that holds more is found out: as long as it is not full, the rate grows with the window, and the window doubles.
//! Once it is full, the rate stays and so does the window. (The idea is that of the BBR congestion control, RFC draft
//! `draft-ietf-ccwg-bbr`; a job has the same question as a sender.)
//!
//! Copies that wait in a queue say nothing about the path without one. So every [`DEPTH_PROBE_NANOS`] the window shrinks
//! to its minimum for a moment, and the least time is taken anew.
//!
//! A window that was not full says nothing about what the path could hold: a limit, the source, or the end of the work
//! kept it from that. Then all stays as it is.

use blockferry_ring::Nanos;

use crate::base::limits::{DEPTH_PROBE_NANOS, DEPTH_SMALL_BYTES};

/// So many times what the path holds may be in flight.
const GAIN: u64 = 2;
/// So many times as many copies may be in flight while they are small.
const SMALL_TIMES: usize = 4;
/// The window shrinks by such a part at once.
const SHRINK_DIVISOR: u64 = 8;

/// See the module's head.
#[derive(Clone, Debug)]
pub struct Depth {
    min: usize,
    max: usize,
    now: usize,
    /// Least time of one copy.
    least: Option<Nanos>,
    least_at: Nanos,
    probe: Option<Probe>,
    epoch: Epoch,
}

/// The window is small for a moment.
#[derive(Clone, Copy, Debug)]
struct Probe {
    since: Nanos,
    /// Copies that began since, and ended.
    ended: usize,
    least: Nanos,
}

/// One window's worth of copies.
#[derive(Clone, Copy, Debug, Default)]
struct Epoch {
    began: Option<Nanos>,
    ended: usize,
    /// The window was full at some time.
    was_full: bool,
}

impl Depth {
    /// From `min` to `max` copies.
    pub fn new(min: usize, max: usize) -> Depth {
        let min = min.max(1);
        Depth {
            min,
            max: max.max(min),
            now: min,
            least: None,
            least_at: 0,
            probe: None,
            epoch: Epoch::default(),
        }
    }

    /// Copies that may be in flight, whatever their size.
    pub fn depth(&self) -> usize {
        if self.probe.is_some() { self.min } else { self.now }
    }

    /// Whether one who has so many copies of so many bytes in flight, and more to copy, may begin another one. Small
    /// copies cost little: of them there may be a few times as many.
    pub fn has_room(&mut self, in_flight: usize, bytes: u64) -> bool {
        let is_small = bytes < DEPTH_SMALL_BYTES && self.probe.is_none();
        let depth = if is_small { (self.now * SMALL_TIMES).min(self.max) } else { self.depth() };
        let has_room = in_flight < depth;
        self.epoch.was_full |= !has_room;
        has_room
    }

    /// A copy that began at `began` has ended.
    pub fn ended(&mut self, began: Nanos, now: Nanos) {
        let took = now.saturating_sub(began).max(1);
        if self.probing(began, took, now) {
            return;
        }
        if self.least.is_none_or(|least| took <= least) {
            (self.least, self.least_at) = (Some(took), now);
        }
        let since = *self.epoch.began.get_or_insert(now);
        if since == now {
            // Those that end with the first one began before the epoch.
            return;
        }
        self.epoch.ended += 1;
        if self.epoch.ended >= self.now {
            self.judge(now - since);
            self.epoch = Epoch { began: Some(now), ..Epoch::default() };
        }
        if now.saturating_sub(self.least_at) >= DEPTH_PROBE_NANOS {
            if self.now > self.min {
                self.probe = Some(Probe { since: now, ended: 0, least: Nanos::MAX });
            } else {
                // As small as can be: the copies that follow tell.
                (self.least, self.least_at) = (None, now);
            }
        }
    }

    /// Counts a copy while the window is small; false when it is not.
    fn probing(&mut self, began: Nanos, took: Nanos, now: Nanos) -> bool {
        let Some(probe) = &mut self.probe else { return false };
        if began >= probe.since {
            probe.ended += 1;
            probe.least = probe.least.min(took);
        }
        if probe.ended >= self.min {
            (self.least, self.least_at) = (Some(probe.least), now);
            self.probe = None;
            self.epoch = Epoch::default();
        }
        true
    }

    fn judge(&mut self, span: Nanos) {
        let Some(least) = self.least.filter(|_| self.epoch.was_full) else { return };
        let holds = self.epoch.ended as u128 * u128::from(least) / u128::from(span.max(1));
        let wanted = (holds.min(1 << 20) as u64 * GAIN) as usize;
        let shrunk = self.now - self.now / SHRINK_DIVISOR as usize;
        self.now = wanted.clamp(shrunk, self.now * 2).clamp(self.min, self.max);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BinaryHeap;

    const MILLI: Nanos = 1_000_000;

    /// A path that takes `latency` for each copy and begins one every `interval`, at most `parallel` at once.
    struct Path {
        depth: Depth,
        now: Nanos,
        latency: Nanos,
        interval: Nanos,
        next: Nanos,
        /// Ends and beginnings, the earliest first.
        in_flight: BinaryHeap<std::cmp::Reverse<(Nanos, Nanos)>>,
    }

    impl Path {
        fn new(latency: Nanos, interval: Nanos) -> Path {
            let depth = Depth::new(16, 256);
            Path { depth, now: 0, latency, interval, next: 0, in_flight: BinaryHeap::new() }
        }

        /// Copies so many; gives copies a second.
        fn copy(&mut self, count: usize) -> u64 {
            let begin = self.now;
            for _ in 0..count {
                while self.depth.has_room(self.in_flight.len(), u64::MAX) {
                    self.next = self.next.max(self.now) + self.interval;
                    self.in_flight.push(std::cmp::Reverse((self.next + self.latency, self.now)));
                }
                let std::cmp::Reverse((end, began)) = self.in_flight.pop().unwrap();
                self.now = end;
                self.depth.ended(began, self.now);
            }
            count as u64 * 1_000_000_000 / (self.now - begin).max(1)
        }
    }

    #[test]
    fn a_path_that_holds_many_is_filled() {
        // 20,000 a second at 5 ms: a hundred.
        let mut path = Path::new(5 * MILLI, 50_000);
        path.copy(2_000);
        let rate = path.copy(10_000);
        assert!((190..=256).contains(&path.depth.depth()), "{}", path.depth.depth());
        assert!(rate > 19_000, "{rate} a second");
    }

    #[test]
    fn a_path_that_holds_few_is_not_flooded() {
        let mut path = Path::new(100_000, 50_000);
        path.copy(10_000);
        assert_eq!(path.depth.depth(), 16);
    }

    #[test]
    fn the_window_has_its_limits() {
        let mut path = Path::new(500 * MILLI, 1_000);
        path.copy(20_000);
        assert_eq!(path.depth.depth(), 256);
    }

    #[test]
    fn a_path_that_changes_is_followed_both_ways() {
        let mut path = Path::new(MILLI, 50_000);
        path.copy(5_000);
        assert!((16..=44).contains(&path.depth.depth()), "{}", path.depth.depth());
        // It is led round the world.
        path.latency = 5 * MILLI;
        path.copy(300_000);
        let rate = path.copy(10_000);
        assert!(path.depth.depth() >= 150 && rate > 19_000, "{} {rate}", path.depth.depth());
        // And back, with a server that is slower.
        (path.latency, path.interval) = (MILLI, 500_000);
        path.copy(60_000);
        assert!(path.depth.depth() <= 32, "{}", path.depth.depth());
    }

    #[test]
    fn of_small_copies_there_may_be_more() {
        let mut depth = Depth::new(8, 64);
        assert!(depth.has_room(31, 31 * 65_536) && !depth.has_room(32, 31 * 65_536));
        assert!(depth.has_room(7, 7 << 20) && !depth.has_room(8, 8 << 20));
        // Who was told a number gets that number.
        let mut depth = Depth::new(2, 2);
        assert!(depth.has_room(1, 0) && !depth.has_room(2, 0));
    }

    #[test]
    fn who_is_not_kept_waiting_learns_nothing() {
        let mut depth = Depth::new(8, 64);
        for i in 0..1000 {
            // One at a time, far apart: a speed limit.
            depth.ended(i * 100 * MILLI, i * 100 * MILLI + 5 * MILLI);
        }
        assert_eq!(depth.depth(), 8);
    }
}
