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
//! When guests are connected and silent, the job's own requests tell how long the queues are: the window
//! keeps their latency near its minimum, so that the first guest's request finds a short queue. Without
//! guests, and with a deadline that would be missed, the window is as large as the user allows.
//!
//! The window never falls below [`WINDOW_MIN`]: a job does not starve.

use blockferry_ring::Nanos;

use crate::graph::load::Counts;

/// How often the governor decides.
pub const LOOK_NANOS: Nanos = 2_000_000;
/// The smallest window, in bytes.
pub const WINDOW_MIN: u64 = 64 << 10;
/// The window with which a job begins beside guests, in bytes.
const WINDOW_FIRST: u64 = 512 << 10;
/// No goal is below this: it would be noise.
const GOAL_NANOS_MIN: Nanos = 100_000;
/// Requests that must have been seen for a quantile to mean something.
const SAMPLES_MIN: u64 = 64;
/// Without a history the goal is so many times the best median.
const GOAL_PER_MEDIAN: u64 = 5;
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
    /// The job's own requests: best latency, and the sum and number of those since the last look.
    own_min: Option<Nanos>,
    own_sum: Nanos,
    own_count: u64,
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
            own_min: None,
            own_sum: 0,
            own_count: 0,
        }
    }

    /// Bytes that the job may have in flight.
    pub fn window(&self) -> u64 {
        if self.guest_first == GuestFirst::Off { self.window_max } else { self.window }
    }

    /// Bytes of one copy that suit the window: a few of them fill it.
    pub fn piece(&self, piece_max: u64) -> u64 {
        let quarter = (self.window() / 4).max(WINDOW_MIN);
        (1 << quarter.ilog2()).min(piece_max)
    }

    /// The latency that is not to be exceeded, once it is known.
    pub fn goal(&self) -> Option<Nanos> {
        self.goal
    }

    /// When it wants to look again.
    pub fn look_at(&self) -> Option<Nanos> {
        self.looked_at.map(|at| at + LOOK_NANOS)
    }

    /// One of the job's own requests has ended.
    pub fn own(&mut self, nanos: Nanos) {
        self.own_min = Some(self.own_min.map_or(nanos, |min| min.min(nanos)));
        self.own_sum = self.own_sum.saturating_add(nanos);
        self.own_count += 1;
    }

    /// Looks, if it is time.
    pub fn look(&mut self, sight: Sight<'_>) {
        if self.guest_first == GuestFirst::Off || self.look_at().is_some_and(|at| sight.now < at) {
            return;
        }
        if self.looked_at.replace(sight.now).is_none() {
            self.seen = *sight.all;
            return;
        }
        let met = sight.all.since(&self.seen);
        self.seen = *sight.all;
        let own = self.own_sum.checked_div(self.own_count);
        (self.own_sum, self.own_count) = (0, 0);
        if !sight.has_guests || sight.is_late {
            self.window = self.window_max;
            return;
        }
        let requests = met.total();
        if requests > 0 {
            self.beside(&met, requests);
        } else if let Some(own) = own {
            let bound = (self.own_min.unwrap_or(own) * OWN_STRETCH).max(OWN_NANOS_MIN);
            if own > bound { self.shrink(9, 10) } else { self.grow() }
        }
    }

    /// Guests were there.
    fn beside(&mut self, met: &Counts, requests: u64) {
        if requests >= 8
            && let Some(median) = met.quantile(500)
        {
            self.median_min = Some(self.median_min.map_or(median, |min| min.min(median)));
        }
        let learnt = self.median_min.map(|median| (median * GOAL_PER_MEDIAN).max(GOAL_NANOS_MIN));
        let Some(goal) = self.goal.or(learnt) else { return };
        let slow = met.above(goal);
        let change = requests.min(1 << 20) as i64 - 100 * slow.min(1 << 20) as i64;
        self.budget = (self.budget + change).clamp(BUDGET_MIN, BUDGET_MAX);
        if slow > 0 && self.budget < 0 {
            self.shrink(3, 4);
        } else if self.budget >= 0 {
            self.grow();
        }
    }

    fn grow(&mut self) {
        self.window = (self.window + self.window / 32 + 1024).min(self.window_max);
    }

    fn shrink(&mut self, times: u64, of: u64) {
        self.window = (self.window * times / of).max(WINDOW_MIN.min(self.window_max));
    }
}
