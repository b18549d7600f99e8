//! When each request is meant to start, and where it goes.
//!
//! With a rate, requests have intended starts that do not depend on how the disk is doing: at fixed distances, or as a
//! Poisson process. Their latency counts from there. A load that waits for the slow request before it sends the next
//! one measures the disk only when it is well (coordinated omission); this one goes on being late.
//!
//! All arithmetic is on integers, so that a seed means the same load on every machine.

use crate::base::rng::Rng;
use crate::base::units::NS_PER_SEC;

/// How requests are spread over time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// The next one starts when one of `depth` has ended.
    Closed {
        /// Requests in flight.
        depth: usize,
    },
    /// They start when they are due, whatever the others do.
    Open {
        /// Requests that are due in a second, above 0.
        rate_per_sec: u64,
        /// At random moments instead of fixed distances.
        poisson: bool,
        /// Requests in flight at most; what is due beyond that waits, and its latency counts that.
        depth_max: usize,
    },
}

impl Pace {
    /// Requests in flight at most.
    pub fn depth(self) -> usize {
        match self {
            Pace::Closed { depth } => depth,
            Pace::Open { depth_max, .. } => depth_max,
        }
    }
}

/// Intended starts, in nanoseconds since the start of the load.
#[derive(Clone, Debug)]
pub struct Schedule {
    rate_per_sec: u64,
    poisson: bool,
    taken: u64,
    /// Of the Poisson process: the next start, in 2^-32 nanoseconds.
    next_fine: u128,
    rng: Rng,
}

impl Schedule {
    /// The schedule of an open load; `rng` is its own.
    pub fn new(rate_per_sec: u64, poisson: bool, rng: Rng) -> Schedule {
        let mut schedule =
            Schedule { rate_per_sec: rate_per_sec.max(1), poisson, taken: 0, next_fine: 0, rng };
        if poisson {
            schedule.advance();
        }
        schedule
    }

    /// When the next request is due.
    pub fn peek(&self) -> u64 {
        let due = if self.poisson {
            self.next_fine >> 32
        } else {
            u128::from(self.taken) * u128::from(NS_PER_SEC) / u128::from(self.rate_per_sec)
        };
        u64::try_from(due).unwrap_or(u64::MAX)
    }

    /// Takes the next request off the schedule: when it is due.
    pub fn take(&mut self) -> u64 {
        let due = self.peek();
        self.taken += 1;
        if self.poisson {
            self.advance();
        }
        due
    }

    fn advance(&mut self) {
        let distance = u128::from(NS_PER_SEC) << 32;
        let mean_fine = distance / u128::from(self.rate_per_sec);
        // The draw is below 64 in all but one of 10^27 cases, so nothing overflows.
        self.next_fine =
            self.next_fine.saturating_add((mean_fine * u128::from(exponential(&mut self.rng))) >> 32);
    }
}

/// An exponentially distributed number of mean 1, in 2^-32: von Neumann's method, which only compares uniform numbers.
///
/// Draw while each number is below the one before. A run of odd length gives its first number as the fraction, a run
/// of even length adds 1 and starts over.
fn exponential(rng: &mut Rng) -> u64 {
    let mut whole = 0u64;
    loop {
        let first = rng.next_u64();
        let (mut last, mut run) = (first, 1u32);
        loop {
            let next = rng.next_u64();
            if next >= last {
                break;
            }
            (last, run) = (next, run + 1);
        }
        if run % 2 == 1 {
            return (whole << 32).saturating_add(first >> 32);
        }
        whole = (whole + 1).min(1 << 20);
    }
}

/// Which block is next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Any, all alike.
    Random,
    /// One after the other, from the start again at the end.
    Sequential,
}

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It reads.
    Read,
    /// It writes.
    Write,
}

/// Draws requests.
#[derive(Clone, Debug)]
pub struct Dice {
    rng: Rng,
    access: Access,
    blocks: u64,
    read_percent: u8,
    next: u64,
}

impl Dice {
    /// Requests to `blocks` blocks (above 0), of which `read_percent` of 100 read.
    pub fn new(rng: Rng, access: Access, blocks: u64, read_percent: u8) -> Dice {
        Dice { rng, access, blocks: blocks.max(1), read_percent, next: 0 }
    }

    /// The next request: what it does, and to which block.
    pub fn roll(&mut self) -> (Kind, u64) {
        let kind = if self.rng.below(100) < self.read_percent.into() { Kind::Read } else { Kind::Write };
        let block = match self.access {
            Access::Random => self.rng.below(self.blocks),
            Access::Sequential => {
                let block = self.next;
                self.next = (block + 1) % self.blocks;
                block
            }
        };
        (kind, block)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fixed_distances_do_not_drift() {
        let mut schedule = Schedule::new(7, false, Rng::new(0));
        let starts: Vec<u64> = (0..8).map(|_| schedule.take()).collect();
        assert_eq!(starts[0], 0);
        assert_eq!(starts[1], 142_857_142);
        assert_eq!(starts[7], NS_PER_SEC);
        for _ in 0..7 * 86_400 {
            schedule.take();
        }
        assert_eq!(schedule.peek(), NS_PER_SEC * 86_401 + 142_857_142);
    }

    #[test]
    fn a_poisson_process_has_exponential_distances() {
        let mut schedule = Schedule::new(1_000_000, true, Rng::new(5));
        let starts: Vec<u64> = (0..200_000).map(|_| schedule.take()).collect();
        let gaps: Vec<u64> = starts.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let share = |longer_than: u64| {
            gaps.iter().filter(|gap| **gap >= longer_than).count() as f64 / gaps.len() as f64
        };
        // e^-x for x = 0.1, 1, 3, 6 mean distances.
        for (longer_than, expected) in [(100, 0.9048), (1000, 0.3679), (3000, 0.0498), (6000, 0.0025)] {
            let found = share(longer_than);
            assert!((found - expected).abs() < 0.004, "{longer_than} ns: {found}, not {expected}");
        }
        let mean = starts[starts.len() - 1] / starts.len() as u64;
        assert!((990..1010).contains(&mean), "{mean}");
    }

    #[test]
    fn the_mix_and_the_places_are_as_asked() {
        let mut dice = Dice::new(Rng::new(1), Access::Sequential, 3, 100);
        let rolled: Vec<_> = (0..4).map(|_| dice.roll()).collect();
        assert_eq!(rolled, [0, 1, 2, 0].map(|block| (Kind::Read, block)));
        let mut dice = Dice::new(Rng::new(1), Access::Random, 10, 30);
        let rolled: Vec<_> = (0..100_000).map(|_| dice.roll()).collect();
        let reads = rolled.iter().filter(|(kind, _)| *kind == Kind::Read).count();
        assert!((29_000..31_000).contains(&reads), "{reads}");
        for block in 0..10 {
            let hits = rolled.iter().filter(|(_, at)| *at == block).count();
            assert!((9_500..10_500).contains(&hits), "block {block}: {hits}");
        }
        assert!((0..1000).all(|_| Dice::new(Rng::new(2), Access::Random, 1, 0).roll() == (Kind::Write, 0)));
    }
}
