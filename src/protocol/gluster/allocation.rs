//! Holes and data, as far as GlusterFS can be believed.
//!
//! The library answers by moving the file's cursor to the next data or the next hole. Some servers answer with nonsense,
//! and writes that are still in the client's cache (write-behind does not see questions about holes) are not told of. So an
//! answer that makes no sense is none, what was written here counts as data without asking, and whatever is not known is
//! data.

use blockferry_ring::Errno;

use crate::base::limits::GLUSTER_WRITTEN_RANGES_MAX;
use crate::base::range::ByteRange;

/// Whether the answers at the end of a file say that there is such a thing: a search for data there has to find nothing.
/// Old servers give the offset back, newer ones without support say EINVAL.
pub(super) fn can_tell(data_at_end: Result<u64, Errno>) -> bool {
    data_at_end == Err(Errno::ENXIO)
}

/// The extent at `offset` of a file that ends at `end`, and whether it is data; `None` where nothing is known. `data` is
/// the first data from there on, `hole` asks for the first hole.
pub(super) fn extent_at(
    offset: u64,
    end: u64,
    data: Result<u64, Errno>,
    hole: impl FnOnce() -> Result<u64, Errno>,
) -> Option<(ByteRange, bool)> {
    let extent = |to: u64, is_data| {
        let range = ByteRange::new(offset, to.min(end)).ok().filter(|range| !range.is_empty())?;
        Some((range, is_data))
    };
    match data {
        Err(Errno::ENXIO) => extent(end, false),
        Ok(data) if data > offset => extent(data, false),
        Ok(data) if data == offset => match hole() {
            Ok(hole) if hole > offset => extent(hole, true),
            // Data that ends where it begins, or before, or nowhere: nobody knows.
            _ => None,
        },
        // Before the place that was asked about.
        _ => None,
    }
}

/// Ranges that were written. Too many are joined: more counts as written then, which
/// is never wrong.
#[derive(Clone, Debug, Default)]
pub(super) struct Written {
    /// In order, apart from each other.
    ranges: Vec<ByteRange>,
}

/// What is known of a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Written up to here.
    Written(u64),
    /// Not written up to here.
    Untouched(u64),
}

impl Written {
    pub(super) fn add(&mut self, range: ByteRange) {
        if range.is_empty() {
            return;
        }
        let from = self.ranges.partition_point(|other| other.end() < range.start());
        let to = self.ranges.partition_point(|other| other.start() <= range.end());
        let joined = self.ranges[from..to].iter().fold(range, |all, other| hull(all, *other));
        self.ranges.splice(from..to, [joined]);
        if self.ranges.len() > GLUSTER_WRITTEN_RANGES_MAX {
            self.join_nearest();
        }
    }

    fn join_nearest(&mut self) {
        let gap = |at: &usize| self.ranges[at + 1].start() - self.ranges[*at].end();
        if let Some(at) = (0..self.ranges.len() - 1).min_by_key(gap) {
            let joined = hull(self.ranges[at], self.ranges[at + 1]);
            self.ranges.splice(at..at + 2, [joined]);
        }
    }

    pub(super) fn at(&self, offset: u64) -> Place {
        let next = self.ranges.partition_point(|range| range.end() <= offset);
        match self.ranges.get(next) {
            Some(range) if range.start() <= offset => Place::Written(range.end()),
            Some(range) => Place::Untouched(range.start()),
            None => Place::Untouched(u64::MAX),
        }
    }
}

fn hull(a: ByteRange, b: ByteRange) -> ByteRange {
    let (start, end) = (a.start().min(b.start()), a.end().max(b.end()));
    ByteRange::at_saturating(start, end - start)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::rng::Rng;

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange::new(start, end).unwrap()
    }

    #[test]
    fn only_a_search_that_finds_nothing_at_the_end_proves_support() {
        assert!(can_tell(Err(Errno::ENXIO)));
        for broken in [Ok(4096), Ok(0), Err(Errno::EINVAL), Err(Errno::EIO), Err(Errno::EOPNOTSUPP)] {
            assert!(!can_tell(broken), "{broken:?}");
        }
    }

    #[test]
    fn answers_that_make_no_sense_are_none() {
        let asked_for_nothing = || -> Result<u64, Errno> { panic!("nobody asks for a hole behind a hole") };
        let end = 1000;
        for (data, hole, extent) in [
            (Ok(100), Ok(300), Some((range(100, 300), true))),
            (Ok(100), Ok(5000), Some((range(100, 1000), true))),
            // A hole at once behind data at once, a hole before, no answer.
            (Ok(100), Ok(100), None),
            (Ok(100), Ok(50), None),
            (Ok(100), Err(Errno::EIO), None),
            (Ok(100), Err(Errno::ENXIO), None),
        ] {
            assert_eq!(extent_at(100, end, data, || hole), extent, "{data:?}");
        }
        for (data, extent) in [
            (Err(Errno::ENXIO), Some((range(100, 1000), false))),
            (Ok(400), Some((range(100, 400), false))),
            (Ok(4000), Some((range(100, 1000), false))),
            // Data before the place that was asked about, and errors.
            (Ok(99), None),
            (Ok(0), None),
            (Err(Errno::EINVAL), None),
            (Err(Errno::ENOTCONN), None),
        ] {
            assert_eq!(extent_at(100, end, data, asked_for_nothing), extent, "{data:?}");
        }
        assert_eq!(extent_at(1000, end, Err(Errno::ENXIO), || Ok(0)), None);
    }

    #[test]
    fn what_was_written_is_never_taken_for_untouched() {
        let mut rng = Rng::new(1);
        for _ in 0..50 {
            let (mut set, mut model) = (Written::default(), vec![false; 4000]);
            for _ in 0..200 {
                let start = rng.below(3990);
                let end = start + 1 + rng.below(10);
                set.add(range(start, end));
                model[start as usize..end as usize].fill(true);
                assert!(set.ranges.len() <= GLUSTER_WRITTEN_RANGES_MAX);
                assert!(set.ranges.windows(2).all(|pair| pair[0].end() < pair[1].start()));
            }
            for (at, &written) in model.iter().enumerate() {
                match set.at(at as u64) {
                    Place::Written(end) => assert!(end > at as u64),
                    Place::Untouched(end) => {
                        assert!(!written && end > at as u64);
                        let until = model.len().min(end as usize);
                        assert!(model[at..until].iter().all(|written| !written));
                    }
                }
            }
        }
        // Few ranges are exact.
        let mut set = Written::default();
        set.add(range(10, 20));
        set.add(range(30, 40));
        set.add(range(20, 25));
        let places = [set.at(0), set.at(24), set.at(25), set.at(40)];
        use Place::Untouched;
        assert_eq!(places, [Untouched(10), Place::Written(25), Untouched(30), Untouched(u64::MAX)]);
    }
}
