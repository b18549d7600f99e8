//! How long things take: a least time, an exponential tail, and now and then something much slower.
//!
//! Integers only. A logarithm from a mathematics library may differ in its last bit between two
//! machines, and then the same seed would tell two histories.

use crate::Nanos;
use crate::rng::Rng;

/// The time an operation takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Latency {
    /// Never less than this.
    pub nanos_min: Nanos,
    /// The mean of the exponential tail on top.
    pub tail_nanos_mean: Nanos,
    /// How often (out of 65536) the slow mode is hit: a garbage collection, a retransmission.
    pub slow_chance: u32,
    /// What the slow mode adds.
    pub slow_nanos: Nanos,
}

impl Latency {
    /// A fast solid-state disk.
    pub const FAST_DISK: Latency =
        Latency { nanos_min: 20_000, tail_nanos_mean: 40_000, slow_chance: 64, slow_nanos: 4_000_000 };
    /// A disk with moving parts.
    pub const SLOW_DISK: Latency =
        Latency { nanos_min: 500_000, tail_nanos_mean: 6_000_000, slow_chance: 655, slow_nanos: 80_000_000 };
    /// A stream on the same machine or in the same rack.
    pub const STREAM: Latency =
        Latency { nanos_min: 5_000, tail_nanos_mean: 30_000, slow_chance: 32, slow_nanos: 40_000_000 };
    /// A call on the offload pool.
    pub const OFFLOAD: Latency =
        Latency { nanos_min: 10_000, tail_nanos_mean: 50_000, slow_chance: 64, slow_nanos: 20_000_000 };

    /// Always the same time.
    pub const fn fixed(nanos: Nanos) -> Latency {
        Latency { nanos_min: nanos, tail_nanos_mean: 0, slow_chance: 0, slow_nanos: 0 }
    }

    /// One sample; at least 1, so that time passes whatever is asked for.
    pub(super) fn draw(&self, rand: &mut Rng) -> Nanos {
        let mut nanos = self.nanos_min.saturating_add(exponential(self.tail_nanos_mean, rand));
        if self.slow_chance > 0 && rand.chance(self.slow_chance) {
            nanos = nanos.saturating_add(self.slow_nanos);
        }
        nanos.max(1)
    }
}

/// Close to an exponential distribution of the given mean: the leading zeroes of a random number are
/// the whole part of its negative binary logarithm, the bits behind them make a straight-line fraction.
fn exponential(mean: Nanos, rand: &mut Rng) -> Nanos {
    if mean == 0 {
        return 0;
    }
    let bits = rand.next_u64() | 1;
    let whole = bits.leading_zeros().min(47);
    let fraction = 0xFFFF - ((bits << whole << 1) >> 48);
    let log2 = (u64::from(whole) << 16) | fraction;
    // ln 2 is 45426 / 65536.
    ((u128::from(mean) * u128::from(log2) * 45_426) >> 32) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mean_is_near_what_was_asked_for() {
        let mut rand = Rng::new(9);
        let n = 20_000;
        let sum: u64 = (0..n).map(|_| exponential(10_000, &mut rand)).sum();
        let mean = sum / n;
        assert!((9_000..11_000).contains(&mean), "{mean}");
        let fixed = Latency::fixed(7);
        assert!((0..100).all(|_| fixed.draw(&mut rand) == 7));
    }
}
