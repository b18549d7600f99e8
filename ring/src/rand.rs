//! A small frozen random generator for the simulator and for whoever is handed the ring's context.
//!
//! The stream for a seed never changes: seeds are recorded in bug reports. (xoshiro256**, seeded by
//! splitmix64, both public domain algorithms.)

/// A seeded generator.
#[derive(Clone, Debug)]
pub struct Rand {
    state: [u64; 4],
}

impl Rand {
    /// The generator of `seed`.
    pub fn new(seed: u64) -> Rand {
        let mut x = seed;
        let mut next = || {
            x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut z = x;
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            z ^ (z >> 31)
        };
        Rand { state: [next(), next(), next(), next()] }
    }

    /// The next 64 bits.
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

    /// A number below `n`; 0 when `n` is 0.
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.next_u64()) * u128::from(n)) >> 64) as u64
    }

    /// A number in `low..=high`.
    pub fn range(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high.saturating_sub(low).saturating_add(1))
    }

    /// True `n` times out of 65536.
    pub fn chance(&mut self, n: u32) -> bool {
        self.below(65_536) < u64::from(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_is_frozen() {
        let mut r = Rand::new(1);
        let got = [r.next_u64(), r.next_u64()];
        assert_eq!(got, [0xb3f2_af6d_0fc7_10c5, 0x853b_5596_4736_4cea]);
        assert!((0..1000).all(|_| r.below(7) < 7));
    }
}
