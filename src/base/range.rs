//! Half-open byte ranges.
//!
//! Every room speaks about pieces of a disk: a request, a chunk to copy, a lock, a run of zeroes. Here such a piece is
//! one small value whose start is never behind its end, so that nobody above has to ask whether an addition wrapped or
//! which of two offsets is the greater. Numbers that come from a peer or a disk enter through the checked constructors
//! and fail there, once; everything afterwards is total.
//!
//! An empty range keeps its place (`5..5` is not `7..7`) but touches nothing: it overlaps no range, not even itself.

use std::fmt;

/// Bytes from `start` up to, not including, `end`. `start <= end` always holds.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ByteRange {
    start: u64,
    end: u64,
}

/// Why two numbers are not a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// The end lies before the start.
    #[error("range ends at {end}, before its start at {start}")]
    Backwards {
        /// First byte asked for.
        start: u64,
        /// One past the last byte asked for.
        end: u64,
    },
    /// Offset and length add up to more than 64 bits hold.
    #[error("range of {len} bytes at offset {offset} passes the end of the address space")]
    Overflow {
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        len: u64,
    },
}

impl ByteRange {
    /// The empty range at offset 0.
    pub const EMPTY: ByteRange = ByteRange { start: 0, end: 0 };
    /// Everything that 64 bits can address.
    pub const ALL: ByteRange = ByteRange { start: 0, end: u64::MAX };

    /// `start..end`; refused when it runs backwards.
    pub const fn new(start: u64, end: u64) -> Result<ByteRange, RangeError> {
        if start <= end { Ok(ByteRange { start, end }) } else { Err(RangeError::Backwards { start, end }) }
    }

    /// `len` bytes at `offset`; refused when the end does not fit 64 bits.
    pub const fn at(offset: u64, len: u64) -> Result<ByteRange, RangeError> {
        match offset.checked_add(len) {
            Some(end) => Ok(ByteRange { start: offset, end }),
            None => Err(RangeError::Overflow { offset, len }),
        }
    }

    /// `len` bytes at `offset`, cut at the end of the address space. For numbers that were checked before.
    pub const fn at_saturating(offset: u64, len: u64) -> ByteRange {
        ByteRange { start: offset, end: offset.saturating_add(len) }
    }

    /// The first `len` bytes.
    pub const fn first(len: u64) -> ByteRange {
        ByteRange { start: 0, end: len }
    }

    /// Offset of the first byte.
    pub const fn start(self) -> u64 {
        self.start
    }

    /// Offset one past the last byte.
    pub const fn end(self) -> u64 {
        self.end
    }

    /// Bytes covered.
    pub const fn len(self) -> u64 {
        self.end - self.start
    }

    /// Whether no byte is covered.
    pub const fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// Whether the byte at `offset` is covered.
    pub const fn contains(self, offset: u64) -> bool {
        self.start <= offset && offset < self.end
    }

    /// Whether every byte of `other` is covered. An empty `other` is covered by anything.
    pub const fn contains_range(self, other: ByteRange) -> bool {
        other.is_empty() || (self.start <= other.start && other.end <= self.end)
    }

    /// Whether some byte is in both.
    pub const fn overlaps(self, other: ByteRange) -> bool {
        self.start < other.end && other.start < self.end && !self.is_empty() && !other.is_empty()
    }

    /// The bytes in both, or `None` when there are none.
    pub fn intersect(self, other: ByteRange) -> Option<ByteRange> {
        self.overlaps(other)
            .then(|| ByteRange { start: self.start.max(other.start), end: self.end.min(other.end) })
    }

    /// The smallest range whose ends are multiples of `granularity` (any number above 0) and that covers `self`.
    /// An empty range stays empty. An end that would pass 64 bits stops at `u64::MAX`; no disk reaches that far.
    pub const fn align_outward(self, granularity: u64) -> ByteRange {
        let start = self.start - self.start % granularity;
        if self.is_empty() {
            return ByteRange { start, end: start };
        }
        let end = match self.end.checked_next_multiple_of(granularity) {
            Some(end) => end,
            None => u64::MAX,
        };
        ByteRange { start, end }
    }

    /// The largest range whose ends are multiples of `granularity` (any number above 0) inside `self`, or `None` when
    /// not one whole granule is covered.
    pub fn align_inward(self, granularity: u64) -> Option<ByteRange> {
        let start = self.start.checked_next_multiple_of(granularity)?;
        let end = self.end - self.end % granularity;
        (start < end).then_some(ByteRange { start, end })
    }

    /// Whether both ends are multiples of `granularity` (any number above 0).
    pub const fn is_aligned(self, granularity: u64) -> bool {
        self.start.is_multiple_of(granularity) && self.end.is_multiple_of(granularity)
    }

    /// The parts before and from `offset` (an offset in the same space, not in the range). An offset outside leaves one
    /// part empty.
    pub fn split_at(self, offset: u64) -> (ByteRange, ByteRange) {
        let cut = offset.clamp(self.start, self.end);
        (ByteRange { start: self.start, end: cut }, ByteRange { start: cut, end: self.end })
    }

    /// The range cut from its start into pieces of `len_max` bytes (any number above 0); the last may be shorter.
    /// An empty range has no pieces.
    pub fn chunks(self, len_max: u64) -> Chunks {
        debug_assert!(len_max > 0, "pieces of no bytes never end");
        Chunks { rest: self, len_max: len_max.max(1) }
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end)
    }
}

impl fmt::Debug for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end)
    }
}

/// The pieces of [`ByteRange::chunks`], in order.
#[derive(Debug, Clone)]
pub struct Chunks {
    rest: ByteRange,
    len_max: u64,
}

impl Iterator for Chunks {
    type Item = ByteRange;

    fn next(&mut self) -> Option<ByteRange> {
        if self.rest.is_empty() {
            return None;
        }
        let (piece, rest) = self.rest.split_at(self.rest.start.saturating_add(self.len_max));
        self.rest = rest;
        Some(piece)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::rng::Rng;

    fn r(start: u64, end: u64) -> ByteRange {
        ByteRange::new(start, end).expect("test range runs forward")
    }

    #[test]
    fn constructors_refuse_what_is_no_range() {
        assert_eq!(ByteRange::new(5, 4), Err(RangeError::Backwards { start: 5, end: 4 }));
        assert_eq!(ByteRange::at(u64::MAX, 1), Err(RangeError::Overflow { offset: u64::MAX, len: 1 }));
        assert_eq!(ByteRange::at(u64::MAX, 0), Ok(r(u64::MAX, u64::MAX)));
        assert_eq!(ByteRange::at_saturating(u64::MAX - 1, 9), r(u64::MAX - 1, u64::MAX));
        assert_eq!(
            ByteRange::at(u64::MAX, 1).map_err(|e| e.to_string()),
            Err("range of 1 bytes at offset 18446744073709551615 passes the end of the address space".into())
        );
    }

    #[test]
    fn an_empty_range_touches_nothing() {
        assert!(!r(5, 5).overlaps(r(0, 10)));
        assert!(!r(0, 10).overlaps(r(5, 5)));
        assert!(!r(5, 5).overlaps(r(5, 5)));
        assert_eq!(r(5, 5).chunks(4).count(), 0);
        assert_eq!(r(5, 5).align_outward(4), r(4, 4));
        assert_eq!(r(5, 5).align_inward(1), None);
        assert!(r(0, 1).contains_range(r(5, 5)));
    }

    #[test]
    fn alignment_reaches_the_last_byte_without_wrapping() {
        assert_eq!(r(1, u64::MAX).align_outward(512), r(0, u64::MAX));
        assert_eq!(r(u64::MAX - 1, u64::MAX).align_inward(512), None);
        assert_eq!(ByteRange::ALL.align_inward(512), Some(r(0, u64::MAX - 511)));
        assert_eq!(r(3, 9).align_outward(3), r(3, 9));
        assert_eq!(ByteRange::ALL.chunks(1 << 63).count(), 2);
    }

    /// Every answer against the same question asked byte by byte.
    #[test]
    fn agrees_with_a_byte_by_byte_model() {
        let mut rng = Rng::new(1);
        for _ in 0..20_000 {
            let mut pick = || {
                let (a, b) = (rng.below(40), rng.below(40));
                r(a.min(b), a.max(b))
            };
            let (a, b) = (pick(), pick());
            let granularity = 1 + rng.below(9);
            let cut = rng.below(45);
            let both: Vec<u64> = (0..64).filter(|&i| a.contains(i) && b.contains(i)).collect();
            assert_eq!(a.overlaps(b), !both.is_empty());
            let shared: Vec<u64> = a.intersect(b).map_or(vec![], |s| (s.start()..s.end()).collect());
            assert_eq!(shared, both);
            assert_eq!(a.contains_range(b), (b.start()..b.end()).all(|i| a.contains(i)));

            let outward = a.align_outward(granularity);
            assert!(outward.is_aligned(granularity) && outward.contains_range(a));
            assert!(a.is_empty() || outward.len() < a.len() + 2 * granularity);
            let whole = |g: u64| (0..granularity).all(|i| a.contains(g * granularity + i));
            let inside: Vec<u64> = (0..64).filter(|&g| whole(g)).collect();
            let got: Vec<u64> = a.align_inward(granularity).map_or(vec![], |s| {
                assert!(s.is_aligned(granularity));
                (s.start() / granularity..s.end() / granularity).collect()
            });
            assert_eq!(got, inside);

            let (left, right) = a.split_at(cut);
            assert_eq!((left.start(), right.end(), left.end()), (a.start(), a.end(), right.start()));
            assert!(left.is_empty() || left.end() <= cut.max(a.start()));
            assert!(right.is_empty() || right.start() >= cut.min(a.end()));

            let pieces: Vec<ByteRange> = a.chunks(granularity).collect();
            assert_eq!(pieces.iter().map(|p| p.len()).sum::<u64>(), a.len());
            let mut next = a.start();
            for piece in &pieces {
                assert_eq!(piece.start(), next);
                assert!(piece.len() == granularity || piece.end() == a.end());
                next = piece.end();
            }
        }
    }
}
