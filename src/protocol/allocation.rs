//! What is known of a file's holes and data, and for how long that is believed.
//!
//! A look at the filesystem tells of many extents at once, and takes time: it is made on another thread while files are
//! being served. The extents of the latest look are kept. A change that touches one of them makes it unknown when it
//! ends, before it is acknowledged: whoever asks after that has the filesystem looked at again. A change that ends while
//! a look is under way may have been seen by it or not, so what the look says of such places is used to answer those who
//! asked before, and not kept.

use blockferry_ring::FileExtent;

use crate::base::limits::ALLOCATION_CHANGES;
use crate::base::range::ByteRange;

/// See the module's head.
#[derive(Debug, Default)]
pub(super) struct Allocation {
    /// In their order; there may be gaps.
    extents: Vec<FileExtent>,
    /// Where the latest look ended.
    end: u64,
    /// A look is under way.
    looking: bool,
    /// Changes that have ended since it began.
    changes: Vec<ByteRange>,
    /// What that look finds is not kept.
    stale: bool,
}

impl Allocation {
    /// The extents that are known without a gap from `offset` on, up to `end`, the first of them cut off at `offset`.
    pub(super) fn from(&self, offset: u64, end: u64) -> impl Iterator<Item = FileExtent> {
        let first = self.extents.partition_point(|extent| extent.end <= offset);
        let mut at = offset;
        self.extents[first..].iter().map_while(move |extent| {
            let follows = at < end && extent.start <= at;
            let cut = FileExtent { start: at, end: extent.end.min(end), ..*extent };
            at = extent.end;
            follows.then_some(cut)
        })
    }

    /// The latest look ended there.
    pub(super) fn ends_at(&self, offset: u64) -> bool {
        self.end == offset && offset > 0
    }

    /// A look begins; there is one at a time.
    pub(super) fn begin(&mut self) {
        self.looking = true;
        self.stale = false;
        self.changes.clear();
    }

    /// It has found this. Holes are kept only if nobody else can write the file.
    pub(super) fn end(&mut self, found: &[FileExtent], keep_holes: bool) {
        let changes = std::mem::take(&mut self.changes);
        let is_kept = |extent: &&FileExtent| {
            (keep_holes || !extent.is_hole) && !changes.iter().any(|change| overlaps(extent, *change))
        };
        if self.looking && !self.stale && !found.is_empty() {
            self.extents.clear();
            self.extents.extend(found.iter().filter(is_kept).copied());
            self.end = found.last().map_or(0, |extent| extent.end);
        }
        self.looking = false;
    }

    /// A change of this range has ended.
    pub(super) fn changed(&mut self, range: ByteRange) {
        if self.looking && self.changes.len() < ALLOCATION_CHANGES {
            self.changes.push(range);
        } else {
            self.stale = true;
        }
        let first = self.extents.partition_point(|extent| extent.end <= range.start());
        let count = self.extents[first..].iter().take_while(|extent| overlaps(extent, range)).count();
        self.extents.drain(first..first + count);
    }

    /// Nothing is known any more.
    pub(super) fn clear(&mut self) {
        self.extents.clear();
        self.stale = true;
    }
}

fn overlaps(extent: &FileExtent, range: ByteRange) -> bool {
    extent.start < range.end() && range.start() < extent.end
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(start: u64, end: u64, is_hole: bool) -> FileExtent {
        FileExtent { start, end, is_hole }
    }

    fn found() -> [FileExtent; 4] {
        [extent(0, 10, false), extent(10, 20, true), extent(20, 30, false), extent(30, 40, true)]
    }

    fn known(allocation: &Allocation, offset: u64, end: u64) -> Vec<FileExtent> {
        allocation.from(offset, end).collect()
    }

    #[test]
    fn extents_are_told_until_the_first_gap() {
        let mut allocation = Allocation::default();
        allocation.begin();
        allocation.end(&found(), true);
        assert_eq!(
            known(&allocation, 5, 25),
            [extent(5, 10, false), extent(10, 20, true), extent(20, 25, false)]
        );
        allocation.changed(ByteRange::at_saturating(22, 1));
        assert_eq!(known(&allocation, 5, 40), [extent(5, 10, false), extent(10, 20, true)]);
        assert_eq!(known(&allocation, 20, 40), []);
        assert_eq!(known(&allocation, 35, 40), [extent(35, 40, true)]);
        assert_eq!(known(&allocation, 40, 50), []);
        allocation.clear();
        assert_eq!(known(&allocation, 0, 40), []);
    }

    #[test]
    fn where_others_write_only_data_is_believed() {
        let mut allocation = Allocation::default();
        allocation.begin();
        allocation.end(&found(), false);
        assert_eq!(known(&allocation, 0, 40), [extent(0, 10, false)]);
        assert_eq!(known(&allocation, 12, 40), []);
    }

    #[test]
    fn what_changes_during_a_look_is_not_kept() {
        let mut allocation = Allocation::default();
        allocation.begin();
        allocation.changed(ByteRange::at_saturating(15, 2));
        allocation.end(&found(), true);
        assert_eq!(known(&allocation, 0, 40), [extent(0, 10, false)]);
        assert_eq!(known(&allocation, 30, 40), [extent(30, 40, true)]);
        allocation.begin();
        for _ in 0..=ALLOCATION_CHANGES {
            allocation.changed(ByteRange::at_saturating(100, 2));
        }
        allocation.end(&[extent(0, 90, true)], true);
        assert_eq!(known(&allocation, 40, 90), [], "too many changes to know them");
        allocation.begin();
        allocation.clear();
        allocation.end(&found(), true);
        assert_eq!(known(&allocation, 0, 40), [], "others may have written by then");
    }
}
