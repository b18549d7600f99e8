//! The governor: how much a job may have in flight beside the guests of its disk.
//!
//! # Situation
//! What a job has in flight stands before the guests' requests in the queues of the devices, and keeps
//! processors busy. A large window copies little faster than a small one, and guests wait for all of it.
//!
//! # How it decides
//! A pure function of samples. Every few milliseconds ([`LOOK_NANOS`]) it compares what the guests met with
//! since ([`Counts`]) with a *goal*: the latency that 99 of 100 requests must not exceed. The goal is the
//! user's, or it is learnt: twice what 99 of 100 took before the job began, or, if nobody was there then, a
//! multiple of the best median seen beside the job. Each request may use up one in a hundred: a *budget*
//! grows by a hundredth with every request and shrinks by one with each that was too slow. While there is
//! budget the window grows a little; without, it shrinks at once.
//!
//! A window that is too small helps nobody: the queues are empty already, and only the job is slower. So
//! below [`WINDOW_FIRST`] it shrinks only while the job keeps three quarters of the best speed that it had.
//!
//! When guests are connected and silent, the job's own requests tell how long the queues are: the window
//! keeps their latency near its minimum, so that the first guest's request finds a short queue. Without
//! guests, and with a deadline that would be missed, the window is as large as the user allows.
//!
//! The window never falls below [`WINDOW_MIN`]: a job does not starve.
//!
//! What has been written and not flushed is a queue of its own, which guests meet when it is flushed: beside them that is
//! done before it grows long ([`Unflushed`]).

use blockferry_ring::Nanos;

use super::unflushed::Unflushed;
use crate::block::load::Counts;

/// How often the governor decides.
pub const LOOK_NANOS: Nanos = 2_000_000;
/// The smallest window, in bytes.
pub const WINDOW_MIN: u64 = 256 << 10;
/// The window with which a job begins beside guests, in bytes.
const WINDOW_FIRST: u64 = 1 << 20;
/// Bytes of one copy while the window is small; a window of [`PIECE_LARGE_FROM`] has room for larger ones.
const PIECE_SMALL: u64 = 128 << 10;
const PIECE_LARGE_FROM: u64 = 4 << 20;
/// No goal is below this: it would be noise.
const GOAL_NANOS_MIN: Nanos = 100_000;
/// Requests that must have been seen for a quantile to mean something.
const SAMPLES_MIN: u64 = 1000;
/// Without a history the goal is so many times the best median.
const GOAL_PER_MEDIAN: u64 = 4;
/// A small window shrinks once in this time: what the last step did must be seen first.
const SHRINK_NANOS: Nanos = 10_000_000;
/// Budget that can be saved up or owed, in hundredths of a request.
const BUDGET_MAX: i64 = 300;
const BUDGET_MIN: i64 = -300;
/// While guests are silent, the job's own latency may be so many times its minimum, or this much.
const OWN_STRETCH: u64 = 3;
const OWN_NANOS_MIN: Nanos = 500_000;

/// What the user wants for the guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum GuestFirst {
    /// The guests' latency is kept near what it is without the job.
    #[default]
    Auto,
    /// Ninety-nine of a hundred requests are to take no longer than this.
    Goal(Nanos),
    /// The job takes what it can get.
    Off,
}

/// See the module's documentation.
#[derive(Clone, Debug)]
pub struct Governor {
    guest_first: GuestFirst,
    window_max: u64,
    window: u64,
    goal: Option<Nanos>,
    /// The best median of the guests seen beside the job.
    median_min: Option<Nanos>,
    budget: i64,
    seen: Counts,
    looked_at: Option<Nanos>,
    shrunk_at: Nanos,
    /// The job's own requests: best latency, and the sum and number of those since the last look.
    own_min: Option<Nanos>,
    own_sum: Nanos,
    own_count: u64,
    own_bytes: u64,
    /// Bytes a second of the job, smoothed, and the best of it lately.
    speed: u64,
    speed_best: u64,
    unflushed: Unflushed,
    /// Guests come first at the moment.
    is_beside_guests: bool,
}

/// What there is to see at one look.
#[derive(Clone, Copy, Debug)]
pub struct Sight<'a> {
    /// The time.
    pub now: Nanos,
    /// All requests of guests since whenever.
    pub all: &'a Counts,
    /// Somebody could send requests.
    pub has_guests: bool,
    /// A deadline would be missed at the present speed.
    pub is_late: bool,
}

impl Governor {
    /// A governor of a job that may have `window_max` bytes in flight; `before` is what guests met with before it.
    pub fn new(guest_first: GuestFirst, window_max: u64, before: &Counts) -> Governor {
        let learnt = (before.total() >= SAMPLES_MIN).then(|| before.quantile(990)).flatten();
        let goal = match guest_first {
            GuestFirst::Goal(nanos) => Some(nanos),
            GuestFirst::Auto => learnt.map(|p99| (p99 * 7 / 4).max(GOAL_NANOS_MIN)),
            GuestFirst::Off => None,
        };
        Governor {
            guest_first,
            window_max,
            window: WINDOW_FIRST.min(window_max),
            goal,
            median_min: None,
            budget: 0,
            seen: Counts::default(),
            looked_at: None,
            shrunk_at: 0,
            own_min: None,
            own_sum: 0,
            own_count: 0,
            own_bytes: 0,
            speed: 0,
            speed_best: 0,
            unflushed: Unflushed::new(),
            is_beside_guests: false,
        }
    }

    /// Bytes that the job may have in flight.
    pub fn window(&self) -> u64 {
        if self.guest_first == GuestFirst::Off { self.window_max } else { self.window }
    }

    /// Bytes of one copy that suit the window.
    pub fn piece(&self, piece_max: u64) -> u64 {
        if self.window() < PIECE_LARGE_FROM { PIECE_SMALL.min(piece_max) } else { piece_max }
    }

    /// The latency that is not to be exceeded, once it is known.
    pub fn goal(&self) -> Option<Nanos> {
        let learnt = self.median_min.map(|median| (median * GOAL_PER_MEDIAN).max(GOAL_NANOS_MIN));
        self.goal.or(learnt.filter(|_| self.guest_first == GuestFirst::Auto))
    }

    /// Whether it is time to look.
    pub fn is_due(&self, now: Nanos) -> bool {
        self.guest_first != GuestFirst::Off && self.looked_at.is_none_or(|at| now >= at + LOOK_NANOS)
    }

    /// One of the job's own requests has ended.
    pub fn own(&mut self, bytes: u64, nanos: Nanos) {
        self.own_bytes += bytes;
        self.own_min = Some(self.own_min.map_or(nanos, |min| min.min(nanos)));
        self.own_sum = self.own_sum.saturating_add(nanos);
        self.own_count += 1;
    }

    /// The job has written so much.
    pub fn wrote(&mut self, bytes: u64) {
        self.unflushed.wrote(bytes);
    }

    /// Whether nothing more is to be written before the flush under way has ended.
    pub fn waits_for_flush(&self) -> bool {
        self.is_beside_guests && self.unflushed.is_too_much()
    }

    /// Whether so much was written that it is to be flushed now.
    pub fn wants_flush(&self) -> bool {
        self.is_beside_guests && self.unflushed.is_much()
    }

    /// A flush of what was written has begun.
    pub fn flush_began(&mut self, now: Nanos) {
        self.unflushed.began(now);
    }

    /// It has ended.
    pub fn flush_ended(&mut self, now: Nanos) {
        self.unflushed.ended(now);
    }

    /// Looks, if it is time.
    pub fn look(&mut self, sight: Sight<'_>) {
        if !self.is_due(sight.now) {
            return;
        }
        let Some(before) = self.looked_at.replace(sight.now) else {
            self.seen = *sight.all;
            return;
        };
        self.measure(sight.now - before);
        let met = sight.all.since(&self.seen);
        self.seen = *sight.all;
        let own = self.own_sum.checked_div(self.own_count);
        (self.own_sum, self.own_count) = (0, 0);
        self.is_beside_guests = sight.has_guests && !sight.is_late;
        if !self.is_beside_guests {
            self.window = self.window_max;
            return;
        }
        let requests = met.total();
        if requests > 0 {
            self.beside(&met, requests);
        } else if let Some(own) = own {
            let bound = (self.own_min.unwrap_or(own) * OWN_STRETCH).max(OWN_NANOS_MIN);
            if own > bound { self.shrink() } else { self.grow() }
        }
    }

    /// Guests were there.
    fn beside(&mut self, met: &Counts, requests: u64) {
        if requests >= 8
            && let Some(median) = met.quantile(500)
        {
            self.median_min = Some(self.median_min.map_or(median, |min| min.min(median)));
        }
        let Some(goal) = self.goal() else { return };
        let slow = met.above(goal);
        let change = requests.min(1 << 20) as i64 - 100 * slow.min(1 << 20) as i64;
        self.budget = (self.budget + change).clamp(BUDGET_MIN, BUDGET_MAX);
        if slow > 0 && self.budget < 0 {
            self.shrink();
        } else if self.budget >= 0 {
            self.grow();
        }
    }

    fn grow(&mut self) {
        self.window = (self.window + self.window / 32 + 1024).min(self.window_max);
    }

    fn shrink(&mut self) {
        let smaller = self.window - self.window / 8;
        let now = self.looked_at.unwrap_or(0);
        // A user who names a goal has decided what counts more.
        let keeps_speed = matches!(self.guest_first, GuestFirst::Goal(_))
            || self.speed.saturating_mul(4) >= self.speed_best.saturating_mul(3);
        if smaller >= WINDOW_FIRST {
            self.window = smaller;
        } else if !keeps_speed {
            // The last steps cost too much.
            if self.window < WINDOW_FIRST {
                self.grow();
            }
        } else if now.saturating_sub(self.shrunk_at) >= SHRINK_NANOS {
            self.shrunk_at = now;
            self.window = smaller.max(WINDOW_MIN).min(self.window_max);
        }
    }

    fn measure(&mut self, span: Nanos) {
        let speed = u128::from(self.own_bytes) * 1_000_000_000 / u128::from(span.max(1));
        let speed = speed.min(u128::from(u64::MAX >> 3)) as u64;
        self.own_bytes = 0;
        self.speed = if self.speed == 0 { speed } else { self.speed - self.speed / 8 + speed / 8 };
        self.speed_best = (self.speed_best - self.speed_best / 4096).max(self.speed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Nanos = 1_000;

    /// A device that takes requests one after the other: guests wait for what the job has in flight.
    struct Device {
        governor: Governor,
        now: Nanos,
        all: Counts,
    }

    impl Device {
        fn new(guest_first: GuestFirst, before: &Counts) -> Device {
            Device { governor: Governor::new(guest_first, 16 << 20, before), now: 0, all: Counts::default() }
        }

        /// Guests send so many requests a look; a byte of the job takes a quarter of a nanosecond.
        fn run(&mut self, looks: u32, requests: u32, has_guests: bool, is_late: bool) -> u64 {
            for _ in 0..looks {
                self.now += LOOK_NANOS;
                let queue = self.governor.window() / 4;
                for i in 0..requests {
                    // Some come when the queue is short.
                    self.all.add(80 * US + queue * u64::from(i % 8) / 8);
                }
                self.governor.own(LOOK_NANOS * 4, queue.max(100 * US));
                self.governor.look(Sight { now: self.now, all: &self.all, has_guests, is_late });
            }
            self.governor.window()
        }
    }

    fn idle() -> Counts {
        let mut counts = Counts::default();
        (0..5000).for_each(|i| counts.add(if i % 50 == 0 { 200 * US } else { 80 * US }));
        counts
    }

    #[test]
    fn the_window_settles_where_guests_meet_their_goal() {
        let mut device = Device::new(GuestFirst::Auto, &idle());
        let goal = device.governor.goal().expect("learnt before the job");
        assert!((300 * US..500 * US).contains(&goal), "{goal}");
        let window = device.run(2000, 8, true, false);
        // A queue of that length is just about what the goal allows.
        assert!((512 << 10..3 << 20).contains(&window), "{window}");
    }

    #[test]
    fn without_a_history_the_best_median_is_the_measure() {
        let mut device = Device::new(GuestFirst::Auto, &Counts::default());
        assert_eq!(device.governor.goal(), None);
        device.run(50, 16, true, false);
        let goal = device.governor.goal().expect("learnt beside the job");
        assert!((300 * US..1500 * US).contains(&goal), "{goal}");
    }

    #[test]
    fn a_goal_of_the_user_counts_and_off_is_off() {
        let mut device = Device::new(GuestFirst::Goal(120 * US), &idle());
        assert_eq!(device.governor.goal(), Some(120 * US));
        let strict = device.run(2000, 8, true, false);
        let mut device = Device::new(GuestFirst::Goal(2000 * US), &idle());
        let lax = device.run(2000, 8, true, false);
        assert!(strict >= WINDOW_MIN && lax > 4 * strict, "{strict} {lax}");
        let mut device = Device::new(GuestFirst::Off, &idle());
        assert_eq!(device.run(100, 8, true, false), 16 << 20);
    }

    #[test]
    fn nobody_there_or_a_deadline_open_the_window() {
        let mut device = Device::new(GuestFirst::Auto, &idle());
        assert_eq!(device.run(10, 0, false, false), 16 << 20);
        device.run(2000, 8, true, false);
        assert_eq!(device.run(1, 8, true, true), 16 << 20);
    }

    #[test]
    fn silent_guests_find_a_short_queue() {
        let mut device = Device::new(GuestFirst::Auto, &idle());
        let window = device.run(3000, 0, true, false);
        assert!(window / 4 <= 1000 * US, "a queue of {} ns", window / 4);
    }
}
