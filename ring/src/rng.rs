//! The project's own random numbers.
//!
//! A failure found under a seed must come back under that seed next year, on another machine, after every dependency
//! was upgraded. So the generator is written out here and its stream is **frozen**: xoshiro256** (Blackman and Vigna)
//! whose state is filled by splitmix64 from a 64-bit seed. The tests pin published vectors of both, and the derived
//! draws (`below`, `range`, `chance`, `fill`, `shuffle`) as first released. A change to any of them makes recorded
//! seeds worthless and is a new type, not an edit.
//!
//! It is for simulation, workloads and jitter. It is not for secrets.

use std::ops::Range;

/// A seeded generator. Clones continue the same stream independently.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rng {
    state: [u64; 4],
}

/// One step of splitmix64: advances `state` and returns a mixed 64-bit value.
fn splitmix64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Rng {
    /// The stream that belongs to `seed`. Every seed is good, 0 too.
    pub fn new(seed: u64) -> Rng {
        let mut mixer = seed;
        Rng { state: std::array::from_fn(|_| splitmix64(&mut mixer)) }
    }

    /// A generator of its own stream, seeded by one draw from this one. What is drawn from the child later does not move
    /// the parent, so that one actor's appetite for numbers does not change another's fate.
    pub fn fork(&mut self) -> Rng {
        Rng::new(self.next_u64())
    }

    /// 64 uniform bits.
    pub fn next_u64(&mut self) -> u64 {
        let s = &mut self.state;
        let result = s[1].wrapping_mul(5).rotate_left(7).wrapping_mul(9);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        result
    }

    /// A uniform number in `0..bound`, without bias. A `bound` of 0 gives 0 and draws nothing.
    pub fn below(&mut self, bound: u64) -> u64 {
        if bound == 0 {
            return 0;
        }
        // The high half of draw * bound is the answer; draws whose low half falls into the uneven first part are redrawn.
        let uneven = bound.wrapping_neg() % bound;
        loop {
            let wide = u128::from(self.next_u64()) * u128::from(bound);
            if wide as u64 >= uneven {
                return (wide >> 64) as u64;
            }
        }
    }

    /// A uniform number in the half-open `range`; its start when the range is empty.
    pub fn range(&mut self, range: Range<u64>) -> u64 {
        range.start + self.below(range.end.saturating_sub(range.start))
    }

    /// True in `per_65536` of 65536 cases on average: 0 never, 65536 and above always. Draws one number every time.
    pub fn chance(&mut self, per_65536: u32) -> bool {
        (self.next_u64() >> 48) < u64::from(per_65536)
    }

    /// Fills `buf` with uniform bytes: draws in little-endian order, the last one cut.
    pub fn fill(&mut self, buf: &mut [u8]) {
        let mut words = buf.chunks_exact_mut(8);
        for word in &mut words {
            word.copy_from_slice(&self.next_u64().to_le_bytes());
        }
        let rest = words.into_remainder();
        if !rest.is_empty() {
            let len = rest.len();
            rest.copy_from_slice(&self.next_u64().to_le_bytes()[..len]);
        }
    }

    /// Puts `items` into a uniformly random order (Fisher and Yates, from the back).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let other = self.below(last as u64 + 1) as usize;
            items.swap(last, other);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The vectors that the two algorithms' authors and other implementations publish.
    #[test]
    fn matches_published_vectors() {
        let mut zero = 0;
        let seeded: [u64; 3] = std::array::from_fn(|_| splitmix64(&mut zero));
        assert_eq!(seeded, [0xe220_a839_7b1d_cdaf, 0x6e78_9e6a_a1b9_65f4, 0x06c4_5d18_8009_454f]);
        let mut rng = Rng { state: [1, 2, 3, 4] };
        let first: [u64; 6] = std::array::from_fn(|_| rng.next_u64());
        assert_eq!(
            first,
            [
                11520,
                0,
                1_509_978_240,
                1_215_971_899_390_074_240,
                1_216_172_134_540_287_360,
                607_988_272_756_665_600
            ]
        );
    }

    #[test]
    fn bounds_hold_and_every_value_comes() {
        let mut rng = Rng::new(7);
        for bound in [1, 2, 3, 7, 100] {
            let mut seen = vec![0u32; bound as usize];
            for _ in 0..bound * 400 {
                seen[rng.below(bound) as usize] += 1;
            }
            assert!(seen.iter().all(|&n| (250..600).contains(&n)), "bound {bound}: {seen:?}");
        }
        assert_eq!(rng.below(0), 0);
        assert!((0..1000).all(|_| (10..13).contains(&rng.range(10..13))));
        assert_eq!(rng.range(9..9), 9);
        // Four draws share three values here; without redrawing every third value would come twice as often.
        let bound = 3 << 62;
        let mut residues = [0u32; 3];
        for _ in 0..3000 {
            let value = rng.below(bound);
            assert!(value < bound);
            residues[(value % 3) as usize] += 1;
        }
        assert!(residues.iter().all(|n| (850..1150).contains(n)), "{residues:?}");
    }

    #[test]
    fn chance_is_never_always_and_about_right() {
        let mut rng = Rng::new(8);
        assert!((0..5000).all(|_| !rng.chance(0)));
        assert!((0..5000).all(|_| rng.chance(65536)));
        let hits = (0..65536).filter(|_| rng.chance(6554)).count();
        assert!((6000..7100).contains(&hits), "{hits}");
    }

    #[test]
    fn shuffle_keeps_the_items() {
        let mut rng = Rng::new(9);
        let mut items: Vec<u32> = (0..100).collect();
        rng.shuffle(&mut items);
        assert_ne!(items, (0..100).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..100).collect::<Vec<_>>());
        rng.shuffle::<u8>(&mut []);
    }

    #[test]
    fn a_fork_does_not_follow_its_parent() {
        let mut parent = Rng::new(10);
        let mut untouched = parent.clone();
        let mut child = parent.fork();
        let _ = untouched.next_u64();
        let _ = child.next_u64();
        assert_eq!(parent, untouched);
        assert_ne!(child.next_u64(), parent.next_u64());
    }

    /// The frozen stream as users of it see it. If this fails, the change is wrong, not the numbers.
    #[test]
    fn the_stream_is_frozen() {
        let mut rng = Rng::new(42);
        assert_eq!(rng.next_u64(), FROZEN.0);
        assert_eq!(std::array::from_fn::<u64, 6, _>(|_| rng.below(1000)), FROZEN.1);
        assert_eq!(std::array::from_fn::<bool, 8, _>(|_| rng.chance(32768)), FROZEN.2);
        let mut bytes = [0u8; 11];
        rng.fill(&mut bytes);
        assert_eq!(bytes, FROZEN.3);
        let mut items = [0, 1, 2, 3, 4, 5, 6, 7];
        rng.shuffle(&mut items);
        assert_eq!(items, FROZEN.4);
    }

    // Computed by a second implementation, written apart from this one.
    const FROZEN: (u64, [u64; 6], [bool; 8], [u8; 11], [u8; 8]) = (
        1_546_998_764_402_558_742,
        [378, 680, 924, 991, 769, 719],
        [false, false, false, false, true, false, true, false],
        [250, 119, 102, 185, 104, 90, 181, 224, 149, 239, 156],
        [3, 2, 1, 5, 0, 7, 4, 6],
    );
}
