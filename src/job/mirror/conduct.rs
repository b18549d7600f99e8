//! How a mirror conducts itself towards the guests of its disk: how much it has in flight, whether their
//! changes go to both sides, how fast they may write, and how long they may be kept at a shut door.
//!
//! The machine asks; this gathers what the decisions rest on: the [`Governor`] for the window, [`Depth`] for the number of
//! copies in it, the [`Convergence`] for everything that has to do with coming to an end. Goals that clash are ordered: the
//! safety of data, a deadline that the user set, the guests' latency, speed.

use std::rc::Rc;

use blockferry_ring::Nanos;

use super::converge::{Convergence, OnDivergence, Rates, Sample};
use crate::base::limits;
use crate::graph::node::Node;
use crate::graph::tracker::Tracker;
use crate::job::depth::Depth;
use crate::job::governor::{Governor, GuestFirst, Sight};
use crate::job::policy::CopyMode;

/// What the user wants.
#[derive(Clone, Copy, Debug)]
pub struct ConductSettings {
    /// How much guests' latency counts.
    pub guest_first: GuestFirst,
    /// What to do when guests are faster than the job.
    pub on_divergence: OnDivergence,
    /// The longest time for which the door may be shut; 0 for no bound.
    pub downtime_nanos_max: Nanos,
    /// To be ready within this time from the start on.
    pub deadline_nanos: Option<Nanos>,
    /// Bytes that may be in flight.
    pub window_max: u64,
    /// Bytes of one copy when nobody waits for it.
    pub piece_max: u64,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Conduct {
    settings: ConductSettings,
    /// Whose guests it is about.
    source: Option<Rc<Node>>,
    governor: Governor,
    depth: Depth,
    convergence: Convergence,
    deadline_at: Option<Nanos>,
    /// The job did not gain on its guests.
    diverged: bool,
}

impl Conduct {
    /// Towards the guests of `source`.
    pub fn new(settings: ConductSettings, source: Option<Rc<Node>>, now: Nanos) -> Conduct {
        let before = source.as_ref().map(|node| node.load().recent(now)).unwrap_or_default();
        Conduct {
            settings,
            source,
            governor: Governor::new(settings.guest_first, settings.window_max, &before),
            depth: Depth::new(limits::MIRROR_OPERATIONS, limits::MIRROR_OPERATIONS_MAX),
            convergence: Convergence::default(),
            deadline_at: settings.deadline_nanos.map(|span| now.saturating_add(span)),
            diverged: false,
        }
    }

    /// Somebody could wait for the job.
    pub fn has_guests(&self) -> bool {
        self.source.as_ref().is_some_and(|node| node.client_count() > 0)
    }

    /// Looks at what happened since. `done` and `left` are bytes; while the job does not copy, nothing is learnt about
    /// its speed.
    pub fn look(&mut self, now: Nanos, tracker: &Tracker, done: u64, left: u64, len: u64, copies: bool) {
        if !copies {
            self.convergence.interrupted();
        } else if self.convergence.is_due(now) {
            self.convergence.sample(Sample { now, done, tally: tracker.tally(), left, len });
            self.conclude(now, tracker);
        }
        let Some(source) = &self.source else { return };
        // Every step of the job comes here; the counts are hundreds of bytes.
        if !self.governor.is_due(now) {
            return;
        }
        let is_late = self.is_late(now, left);
        let all = source.load().all();
        self.governor.look(Sight { now, all: &all, has_guests: self.has_guests(), is_late });
    }

    /// A deadline would be missed at the present speed, with a fifth to spare.
    fn is_late(&self, now: Nanos, left: u64) -> bool {
        let Some(at) = self.deadline_at else { return false };
        let needed = self.convergence.rates().eta_nanos(left);
        needed.is_none_or(|needed| now.saturating_add(needed + needed / 5) > at)
    }

    fn conclude(&mut self, now: Nanos, tracker: &Tracker) {
        if self.convergence.verdict() == Some(false) && !self.diverged {
            self.diverged = true;
            let Rates { copied, expected, .. } = self.convergence.rates();
            tracing::info!(
                copied_bytes_per_sec = copied,
                dirtied_bytes_per_sec = expected,
                policy = ?self.settings.on_divergence,
                "guests change the disk too fast for the mirror"
            );
        }
        if self.diverged && self.settings.on_divergence == OnDivergence::Throttle {
            tracker.set_pace(now, self.convergence.pace(tracker.pace()));
        }
    }

    /// The job is alike with its source: guests go at their own pace again, and what was learnt is past.
    pub fn caught_up(&mut self, now: Nanos, tracker: &Tracker) {
        tracker.set_pace(now, 0);
        self.convergence.interrupted();
        if self.settings.on_divergence == OnDivergence::Throttle {
            self.diverged = false;
        }
        self.deadline_at = None;
    }

    /// Whether guests' changes are to go to both sides.
    pub fn wants_blocking(&self, ordered: CopyMode) -> bool {
        ordered == CopyMode::WriteBlocking
            || self.diverged && self.settings.on_divergence == OnDivergence::WriteBlocking
    }

    /// Bytes that may be in flight.
    pub fn window(&self) -> u64 {
        if self.source.is_some() { self.governor.window() } else { self.settings.window_max }
    }

    /// Bytes of one copy.
    pub fn piece(&self) -> u64 {
        match self.source {
            Some(_) => self.governor.piece(self.settings.piece_max),
            None => self.settings.piece_max,
        }
    }

    /// Whether another copy may begin while so many, with so many bytes, are in flight.
    pub fn has_room(&mut self, in_flight: usize, bytes: u64) -> bool {
        self.depth.has_room(in_flight, bytes)
    }

    /// One copy has ended.
    pub fn piece_ended(&mut self, bytes: u64, began: Nanos, now: Nanos) {
        self.governor.own(bytes, now.saturating_sub(began));
        self.governor.wrote(bytes);
        self.depth.ended(began, now);
    }

    /// Whether no other copy is to begin before a flush has ended.
    pub fn waits_for_flush(&self) -> bool {
        self.governor.waits_for_flush()
    }

    /// Whether the target is to be flushed while the job copies.
    pub fn wants_flush(&self) -> bool {
        self.governor.wants_flush()
    }

    /// That flush has begun.
    pub fn flush_began(&mut self, now: Nanos) {
        self.governor.flush_began(now);
    }

    /// It has ended.
    pub fn flush_ended(&mut self, now: Nanos) {
        self.governor.flush_ended(now);
    }

    /// So much may differ when the door is shut, after the job has waited for a better moment for so long: little at
    /// first, in the end what half of the longest downtime suffices for. Nobody waits when there are no guests.
    pub fn closing_bytes(&self, waited: Nanos) -> u64 {
        let most = self.closing_bytes_max();
        if !self.has_guests() {
            return most;
        }
        let steps = (waited / limits::CLOSING_STEP_NANOS).min(32) as u32;
        most.min(limits::CLOSING_BYTES_FIRST << steps)
    }

    /// The most that it will be.
    pub fn closing_bytes_max(&self) -> u64 {
        let speed = self.convergence.rates().copied;
        if self.settings.downtime_nanos_max == 0 || speed == 0 {
            return limits::MIRROR_CLOSING_BYTES_MAX;
        }
        let bytes = u128::from(speed) * u128::from(self.settings.downtime_nanos_max) / 2_000_000_000;
        (bytes.min(u128::from(u64::MAX)) as u64).min(limits::MIRROR_CLOSING_BYTES_MAX)
    }

    /// When a door that was shut at `since` must be open again.
    pub fn open_by(&self, since: Nanos) -> Option<Nanos> {
        let bound = self.settings.downtime_nanos_max;
        (bound > 0 && self.has_guests()).then(|| since.saturating_add(bound))
    }

    /// How long to wait before the door is shut again after so many attempts that took too long.
    pub fn shut_again_after(&self, attempts: u32) -> Nanos {
        (self.settings.downtime_nanos_max << attempts.min(8)).min(limits::DOWNTIME_PAUSE_NANOS_MAX)
    }

    /// What was measured.
    pub fn rates(&self) -> Rates {
        self.convergence.rates()
    }

    /// Whether the job gains on its guests.
    pub fn verdict(&self) -> Option<bool> {
        self.convergence.verdict()
    }

    /// The guests' latency that is not to be exceeded.
    pub fn goal(&self) -> Option<Nanos> {
        self.governor.goal()
    }
}
