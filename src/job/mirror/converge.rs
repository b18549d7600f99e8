//! Whether a mirror will come to its end: its own speed against that of the guests.
//!
//! A guest that changes what has been copied makes work again. If it makes a part ρ of what the job does in
//! the same time, a disk is copied 1 + ρ + ρ² + … = 1 / (1 - ρ) times, and for ρ ≥ 1 there is no end. So
//! the share is estimated early, while most of the disk still is dirty and changes cost nothing yet:
//! what guests make dirty now is divided by the share of the disk that is clean, but never taken for
//! more than they touch at all.

use blockferry_ring::Nanos;

use crate::graph::tracker::GuestTally;

/// Time between two samples.
pub const SAMPLE_NANOS: Nanos = 20_000_000;
/// Copying for so long before anything is concluded.
const WARM_NANOS: Nanos = 60_000_000;
/// The share of the job's work, in per cent, above which it is said not to converge: at it a disk is copied
/// 1.33 times.
const SHARE_PERCENT_MAX: u64 = 25;

/// What the job does when it will not converge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum OnDivergence {
    /// Guests' changes go to both sides: what is clean stays clean.
    #[default]
    WriteBlocking,
    /// Guests are slowed down, smoothly, until it converges.
    Throttle,
    /// It is shown, no more.
    Report,
}

/// One sample.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// The time.
    pub now: Nanos,
    /// Bytes dealt with since the start.
    pub done: u64,
    /// What guests did since the start.
    pub tally: GuestTally,
    /// Bytes that differ.
    pub left: u64,
    /// Bytes of the disk.
    pub len: u64,
}

/// Rates in bytes a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rates {
    /// What the job deals with.
    pub copied: u64,
    /// What guests make dirty.
    pub dirtied: u64,
    /// What they would make dirty if all were clean.
    pub expected: u64,
}

impl Rates {
    /// The job gains on its guests.
    pub fn converges(&self) -> bool {
        self.expected.saturating_mul(100) <= self.copied.saturating_mul(SHARE_PERCENT_MAX)
    }

    /// Nanoseconds until what is left has been copied, at these rates.
    pub fn eta_nanos(&self, left: u64) -> Option<Nanos> {
        let gain = self.copied.saturating_sub(self.dirtied);
        (gain > 0).then(|| (u128::from(left) * 1_000_000_000 / u128::from(gain)).min(1 << 62) as Nanos)
    }
}

/// The estimator.
#[derive(Clone, Debug, Default)]
pub struct Convergence {
    last: Option<Sample>,
    rates: Rates,
    touched: u64,
    sampled_nanos: Nanos,
}

impl Convergence {
    /// Whether it is time for a sample.
    pub fn is_due(&self, now: Nanos) -> bool {
        self.last.is_none_or(|last| now.saturating_sub(last.now) >= SAMPLE_NANOS)
    }

    /// Takes a sample.
    pub fn sample(&mut self, sample: Sample) {
        let Some(last) = self.last.replace(sample) else { return };
        let span = sample.now.saturating_sub(last.now).max(1);
        let rate = |now: u64, before: u64| {
            let bytes = u128::from(now.saturating_sub(before));
            (bytes * 1_000_000_000 / u128::from(span)).min(u128::from(u64::MAX)) as u64
        };
        let first = self.sampled_nanos == 0;
        let smooth = |old: u64, new: u64| if first { new } else { old - old / 4 + new / 4 };
        self.sampled_nanos = self.sampled_nanos.saturating_add(span);
        self.rates.copied = smooth(self.rates.copied, rate(sample.done, last.done));
        let dirtied = rate(sample.tally.dirtied_bytes, last.tally.dirtied_bytes);
        self.rates.dirtied = smooth(self.rates.dirtied, dirtied);
        self.touched = smooth(self.touched, rate(sample.tally.touched_bytes, last.tally.touched_bytes));
        let clean = sample.len.saturating_sub(sample.left).max(sample.len / 16).max(1);
        let scaled = u128::from(self.rates.dirtied) * u128::from(sample.len) / u128::from(clean);
        self.rates.expected = self.touched.min(scaled.min(u128::from(u64::MAX)) as u64);
    }

    /// The job stood still: what was measured before says nothing about what comes.
    pub fn interrupted(&mut self) {
        self.last = None;
    }

    /// The rates as of the last sample.
    pub fn rates(&self) -> Rates {
        self.rates
    }

    /// Whether the job gains on its guests; `None` while that cannot be told.
    pub fn verdict(&self) -> Option<bool> {
        (self.sampled_nanos >= WARM_NANOS && self.rates.copied > 0).then(|| self.rates.converges())
    }

    /// The pace for guests at which the job converges, coming from `pace` (0: none yet): down quickly, up slowly.
    pub fn pace(&self, pace: u64) -> u64 {
        let most = (self.rates.copied / 100 * SHARE_PERCENT_MAX).max(PACE_MIN);
        match pace {
            0 => self.touched.clamp(PACE_MIN, most.max(self.touched / 2)),
            _ if self.touched > most => (pace - pace / 8).max(most),
            _ => (pace + pace / 32 + 1).min(most),
        }
    }
}

/// Guests are never slowed down below this, in bytes of touched chunks a second.
const PACE_MIN: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A job that copies, and guests that write evenly all over the disk, in rates of MiB a second.
    fn after(copied: u64, touched: u64, seconds_tenth: u64) -> Convergence {
        let len = 4096 * MIB;
        let mut convergence = Convergence::default();
        let (mut done, mut dirtied) = (0_u64, 0_u64);
        for i in 0..=seconds_tenth * 5 {
            let left = len.saturating_sub(done).max(1);
            let clean_share = (len - left) as f64 / len as f64;
            let tally = GuestTally {
                touched_bytes: i * touched * MIB / 50,
                dirtied_bytes: dirtied,
                ..GuestTally::default()
            };
            convergence.sample(Sample { now: i * SAMPLE_NANOS, done, tally, left, len });
            done += copied * MIB / 50;
            dirtied += ((touched * MIB / 50) as f64 * clean_share) as u64;
        }
        convergence
    }

    #[test]
    fn a_slow_guest_is_no_matter_and_a_quick_one_is_seen_early() {
        assert_eq!(after(2000, 100, 3).verdict(), Some(true));
        // After 0.3 of 2 seconds, with 15 % of the disk clean and little dirtied yet.
        assert_eq!(after(2000, 1000, 3).verdict(), Some(false));
        assert_eq!(after(2000, 1000, 0).verdict(), None);
    }

    #[test]
    fn a_guest_that_stays_in_one_place_is_not_taken_for_one_that_writes_everywhere() {
        let mut convergence = Convergence::default();
        // The same few chunks again and again: touched quickly, dirtied slowly.
        for i in 0..20 {
            let tally =
                GuestTally { touched_bytes: i * 100 * MIB, dirtied_bytes: i * MIB, ..GuestTally::default() };
            let sample = Sample {
                now: i * SAMPLE_NANOS,
                done: i * 40 * MIB,
                tally,
                left: 2048 * MIB,
                len: 4096 * MIB,
            };
            convergence.sample(sample);
        }
        assert_eq!(convergence.verdict(), Some(true));
        assert!(convergence.rates().eta_nanos(2048 * MIB).is_some_and(|eta| eta < 3_000_000_000));
    }

    #[test]
    fn guests_are_slowed_until_the_job_gains() {
        let convergence = after(400, 800, 5);
        let mut pace = 0;
        let mut steps = Vec::new();
        for _ in 0..60 {
            pace = convergence.pace(pace);
            steps.push(pace);
        }
        assert!((PACE_MIN..=100 * MIB).contains(&pace), "{pace}");
        assert!(steps.windows(2).all(|two| two[1] >= two[0] - two[0] / 7), "no step is large: {steps:?}");
    }

    #[test]
    fn no_gain_no_eta() {
        let rates = Rates { copied: 5, dirtied: 5, expected: 5 };
        assert_eq!(rates.eta_nanos(100), None);
        assert!(!rates.converges());
        assert!(Rates { copied: 100, dirtied: 0, expected: 0 }.converges());
    }
}
