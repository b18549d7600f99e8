//! Tables in memory: slices of L2 tables or of refcount blocks, as many as there is room for.
//!
//! A slice is what is read at once, a page what is written at once. Changed pages stay until they are
//! written: [`TableCache::take_dirty`] gives copies of them, taken at one instant, and what is changed after
//! that is for the next time. Slices with changes, or with a copy under way, are never dropped; of the others, one
//! that was not used since a hand that goes round in the order of the file last came by (the clock algorithm): which
//! one that is costs a few steps, however many there are.

use std::collections::BTreeMap;

/// Largest slice.
pub(super) const SLICE_BYTES_MAX: u64 = 16 << 10;
/// Largest page.
pub(super) const PAGE_BYTES_MAX: u64 = 4 << 10;

/// Slices by their offset in the file.
#[derive(Debug)]
pub(super) struct TableCache {
    slices: BTreeMap<u64, Slice>,
    slice_bytes: u64,
    page_bytes: u64,
    slices_max: usize,
    /// Slices before this one have been passed by in this round.
    hand: u64,
    dirty: usize,
}

#[derive(Debug)]
struct Slice {
    bytes: Box<[u8]>,
    /// A bit a page.
    dirty: u64,
    /// Copies are on their way to the file.
    writing: bool,
    /// Since the hand came by.
    used: bool,
}

/// Changed bytes: where in the file, and what.
pub(super) type Page = (u64, Vec<u8>);

impl TableCache {
    /// For tables of `table_bytes` (a cluster) in at most `bytes_max` of memory.
    pub(super) fn new(table_bytes: u64, bytes_max: u64) -> TableCache {
        let slice_bytes = table_bytes.min(SLICE_BYTES_MAX);
        TableCache {
            slices: BTreeMap::new(),
            slice_bytes,
            page_bytes: slice_bytes.min(PAGE_BYTES_MAX),
            slices_max: (bytes_max / slice_bytes).max(4) as usize,
            hand: 0,
            dirty: 0,
        }
    }

    /// Bytes of a slice.
    pub(super) fn slice_bytes(&self) -> u64 {
        self.slice_bytes
    }

    /// Where the slice with the byte at `offset` begins.
    pub(super) fn slice_of(&self, offset: u64) -> u64 {
        offset - offset % self.slice_bytes
    }

    /// The slice at `at`, if it is here.
    pub(super) fn get(&mut self, at: u64) -> Option<&[u8]> {
        let slice = self.slices.get_mut(&at)?;
        slice.used = true;
        Some(&slice.bytes)
    }

    #[cfg(test)]
    pub(super) fn has(&self, at: u64) -> bool {
        self.slices.contains_key(&at)
    }

    /// Changes `len` bytes at `offset` of the file, all in one page, if their slice is here.
    pub(super) fn change(&mut self, offset: u64, len: u64, change: impl FnOnce(&mut [u8])) -> bool {
        let at = self.slice_of(offset);
        let Some(slice) = self.slices.get_mut(&at) else { return false };
        let inside = offset - at;
        change(&mut slice.bytes[inside as usize..(inside + len) as usize]);
        self.dirty += usize::from(slice.dirty == 0);
        slice.dirty |= 1 << (inside / self.page_bytes);
        true
    }

    /// Puts a slice in, unless one is there already; makes room for it.
    pub(super) fn insert(&mut self, at: u64, bytes: Box<[u8]>) {
        debug_assert_eq!(bytes.len() as u64, self.slice_bytes);
        if self.slices.contains_key(&at) {
            return;
        }
        if self.slices.len() >= self.slices_max {
            self.drop_one();
        }
        self.slices.insert(at, Slice { bytes, dirty: 0, writing: false, used: true });
    }

    /// Drops a slice that has not been used lately, unless there is none that may be dropped.
    fn drop_one(&mut self) {
        // Once round takes the marks of use off, as far as need be: the second time finds one.
        for from in [self.hand, 0, 0] {
            let found = self.slices.range_mut(from..).find_map(|(at, slice)| {
                let may_go = slice.dirty == 0 && !slice.writing;
                (may_go && !std::mem::take(&mut slice.used)).then_some(*at)
            });
            if let Some(at) = found {
                self.slices.remove(&at);
                self.hand = at + 1;
                return;
            }
        }
    }

    #[cfg(test)]
    pub(super) fn dirty(&self) -> usize {
        self.dirty
    }

    /// So much is changed that it should be written.
    pub(super) fn is_crowded(&self) -> bool {
        self.dirty * 2 >= self.slices_max
    }

    /// Copies of all changed pages; neighbours in one slice in one piece. They count as clean, until
    /// [`TableCache::failed`] says otherwise, and stay here until [`TableCache::written`].
    pub(super) fn take_dirty(&mut self) -> Vec<Page> {
        let mut pages = Vec::new();
        if self.dirty == 0 {
            return pages;
        }
        let page_bytes = self.page_bytes as usize;
        for (at, slice) in self.slices.iter_mut().filter(|(_, s)| s.dirty != 0) {
            let mut dirty = std::mem::take(&mut slice.dirty);
            slice.writing = true;
            while dirty != 0 {
                let first = dirty.trailing_zeros() as usize;
                let run = (dirty >> first).trailing_ones() as usize;
                let range = first * page_bytes..(first + run) * page_bytes;
                pages.push((at + range.start as u64, slice.bytes[range].to_vec()));
                dirty &= if first + run >= 64 { 0 } else { u64::MAX << (first + run) };
            }
        }
        self.dirty = 0;
        pages
    }

    /// The copies have reached the file, or never will.
    pub(super) fn written(&mut self) {
        self.slices.values_mut().for_each(|slice| slice.writing = false);
    }

    /// The copies have not reached the file: their pages are changed as before.
    pub(super) fn failed(&mut self, pages: &[Page]) {
        for (offset, bytes) in pages {
            let at = self.slice_of(*offset);
            if let Some(slice) = self.slices.get_mut(&at) {
                let first = (offset - at) / self.page_bytes;
                let count = bytes.len() as u64 / self.page_bytes;
                self.dirty += usize::from(slice.dirty == 0);
                (first..first + count).for_each(|page| slice.dirty |= 1 << page);
            }
        }
        self.written();
    }

    /// Forgets what lies in `from..to` of the file: it is no table any more.
    pub(super) fn forget(&mut self, from: u64, to: u64) {
        let gone: Vec<u64> = self.slices.range(from..to).map(|(at, _)| *at).collect();
        for at in gone {
            if let Some(slice) = self.slices.remove(&at) {
                self.dirty -= usize::from(slice.dirty != 0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slice(value: u8) -> Box<[u8]> {
        vec![value; 16 << 10].into()
    }

    #[test]
    fn changes_are_taken_once_and_come_back_when_they_failed() {
        let mut cache = TableCache::new(65_536, 1 << 20);
        cache.insert(0, slice(1));
        cache.insert(16 << 10, slice(2));
        assert!(cache.change(8, 8, |b| b.fill(9)) && cache.change(5000, 8, |b| b.fill(9)));
        assert!(cache.change(12 << 10, 8, |b| b.fill(8)) && !cache.change(1 << 20, 8, |_| ()));
        assert_eq!(cache.dirty(), 1);
        let pages = cache.take_dirty();
        assert_eq!(
            pages.iter().map(|(at, b)| (*at, b.len())).collect::<Vec<_>>(),
            [(0, 16 << 10)].map(|_| (0, 8192)).into_iter().chain([(12_288, 4096)]).collect::<Vec<_>>()
        );
        assert!(cache.take_dirty().is_empty());
        cache.change(16, 8, |b| b.fill(7));
        cache.failed(&pages);
        let again = cache.take_dirty();
        assert_eq!(again.len(), 2);
        assert_eq!((again[0].1[8], again[0].1[16], again[0].1[24]), (9, 7, 1));
    }

    #[test]
    fn what_is_changed_or_under_way_is_not_dropped() {
        let mut cache = TableCache::new(65_536, 64 << 10);
        for i in 0..4u64 {
            cache.insert(i << 14, slice(i as u8));
        }
        cache.change(0, 8, |b| b.fill(9));
        let _pages = cache.take_dirty();
        cache.change(1 << 14, 8, |b| b.fill(9));
        // All have been used: the hand goes round once, and takes the first that may go.
        cache.insert(4 << 14, slice(4));
        assert!(cache.has(0) && cache.has(1 << 14) && !cache.has(2 << 14) && cache.has(3 << 14));
        // The one that came since is passed by.
        cache.insert(5 << 14, slice(5));
        assert!(cache.has(0) && cache.has(1 << 14) && !cache.has(3 << 14) && cache.has(4 << 14));
        cache.written();
        (6..10).for_each(|i| cache.insert(i << 14, slice(i as u8)));
        assert!(!cache.has(0) && cache.has(1 << 14), "one is written, one is changed");
        cache.forget(0, 1 << 20);
        assert_eq!((cache.dirty(), cache.has(1 << 14)), (0, false));
    }
}
