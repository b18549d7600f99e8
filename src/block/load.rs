//! How long the guests of a node wait, as a count for each span of latency.
//!
//! Every request of a guest is counted when it ends, whether a job runs or not: what is normal on this
//! disk must be known before a job disturbs it. Counting costs a few instructions and no memory.
//!
//! A [`LatencyHistogram`](crate::base::latency::LatencyHistogram) is exact and large; here two moments are subtracted
//! from each other hundreds of times a second, which wants few counters.
//!
//! Spans grow by a fifth or so: four to an octave. Counts of the last seconds are kept apart from older ones,
//! so that yesterday's disk is not taken for today's.

use std::cell::{Cell, RefCell};

use blockferry_ring::Nanos;

/// Spans: four to each of 40 octaves of nanoseconds.
const SPANS: usize = 160;
/// How long one period of counts lasts.
const PERIOD_NANOS: Nanos = 2_000_000_000;

/// A count for each span of latency.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts([u32; SPANS]);

impl Default for Counts {
    fn default() -> Counts {
        Counts([0; SPANS])
    }
}

impl Counts {
    /// Counts one request.
    pub fn add(&mut self, nanos: Nanos) {
        let count = &mut self.0[span(nanos)];
        *count = count.wrapping_add(1);
    }

    /// Requests counted.
    pub fn total(&self) -> u64 {
        self.0.iter().map(|count| u64::from(*count)).sum()
    }

    /// What came since `before`.
    pub fn since(&self, before: &Counts) -> Counts {
        Counts(std::array::from_fn(|i| self.0[i].wrapping_sub(before.0[i])))
    }

    /// Both.
    pub fn and(&self, other: &Counts) -> Counts {
        Counts(std::array::from_fn(|i| self.0[i].wrapping_add(other.0[i])))
    }

    /// Requests that took longer than `nanos`, as far as the spans tell (those of its own span not counted).
    pub fn above(&self, nanos: Nanos) -> u64 {
        self.0[span(nanos) + 1..].iter().map(|count| u64::from(*count)).sum()
    }

    /// The latency that `per_mille` of the requests did not exceed; `None` when there were none.
    pub fn quantile(&self, per_mille: u64) -> Option<Nanos> {
        let total = self.total();
        if total == 0 {
            return None;
        }
        let rank = (total * per_mille).div_ceil(1000).max(1);
        let mut sum = 0;
        for (i, count) in self.0.iter().enumerate() {
            sum += u64::from(*count);
            if sum >= rank {
                return Some(upper(i));
            }
        }
        None
    }
}

/// The span of a latency: its octave, and which quarter of it.
fn span(nanos: Nanos) -> usize {
    let nanos = nanos.max(4);
    let octave = nanos.ilog2();
    let quarter = (nanos >> (octave - 2)) & 3;
    ((octave - 2) as usize * 4 + quarter as usize).min(SPANS - 2)
}

/// The longest latency of a span.
fn upper(span: usize) -> Nanos {
    let (octave, quarter) = (span as u32 / 4 + 2, span as u64 % 4);
    (1 << octave) + ((quarter + 1) << (octave - 2)) - 1
}

/// What the guests of one node met with.
#[derive(Debug, Default)]
pub struct Load {
    all: RefCell<Counts>,
    period: RefCell<Counts>,
    period_before: RefCell<Counts>,
    period_began: Cell<Nanos>,
}

impl Load {
    /// A guest's request that came at `began` has ended.
    pub fn ended(&self, began: Nanos, now: Nanos) {
        self.turn_over(now);
        let nanos = now.saturating_sub(began);
        self.all.borrow_mut().add(nanos);
        self.period.borrow_mut().add(nanos);
    }

    fn turn_over(&self, now: Nanos) {
        let periods = now.saturating_sub(self.period_began.get()) / PERIOD_NANOS;
        if periods > 0 {
            let last = std::mem::take(&mut *self.period.borrow_mut());
            *self.period_before.borrow_mut() = if periods == 1 { last } else { Counts::default() };
            self.period_began.set(now);
        }
    }

    /// All requests since the start; only differences mean anything.
    pub fn all(&self) -> Counts {
        *self.all.borrow()
    }

    /// Those of the last seconds.
    pub fn recent(&self, now: Nanos) -> Counts {
        self.turn_over(now);
        self.period.borrow().and(&self.period_before.borrow())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_holds_what_lies_in_it() {
        for nanos in (0..2000).chain([1 << 20, (1 << 20) + 12_345, 1 << 39, u64::MAX]) {
            let at = span(nanos);
            assert!(at < SPANS);
            if (4..1 << 40).contains(&nanos) {
                assert!(nanos <= upper(at), "{nanos}");
                assert!(at == 0 || nanos > upper(at - 1), "{nanos}");
                assert!(upper(at) <= nanos + nanos / 4 + 1, "{nanos}: {}", upper(at));
            }
        }
    }

    #[test]
    fn quantiles_count_requests() {
        let mut counts = Counts::default();
        assert_eq!(counts.quantile(500), None);
        (0..99).for_each(|_| counts.add(100_000));
        counts.add(10_000_000);
        assert_eq!(counts.quantile(500), counts.quantile(990));
        assert!(counts.quantile(990).is_some_and(|p99| (100_000..125_000).contains(&p99)));
        assert!(counts.quantile(1000).is_some_and(|max| max >= 10_000_000));
        assert_eq!((counts.above(1_000_000), counts.above(20_000_000), counts.above(50_000)), (1, 0, 100));
    }

    #[test]
    fn old_periods_are_forgotten() {
        let load = Load::default();
        load.ended(0, 1000);
        assert_eq!(load.recent(PERIOD_NANOS / 2).total(), 1);
        assert_eq!(load.recent(PERIOD_NANOS + 5).total(), 1);
        assert_eq!(load.recent(4 * PERIOD_NANOS).total(), 0);
        assert_eq!(load.all().total(), 1);
    }
}
