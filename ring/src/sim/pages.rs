//! Contents of a file or disk: sparse pages that copies share until one of them is written.
//!
//! A page is absent (a hole), allocated but unwritten, or has bytes. Everything not in a page with
//! bytes reads as zeroes.

use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

/// Bytes of a page: the grain of holes and of allocation.
pub(super) const PAGE: u64 = 4096;
/// Ranges beyond this are not kept allocated by zeroing or allocating them: bookkeeping a page each
/// would cost more than it shows.
const KEEP_BYTES_MAX: u64 = 1 << 30;

type Page = Rc<[u8; PAGE as usize]>;

#[derive(Clone, Debug, Default)]
pub(super) struct Pages(BTreeMap<u64, Option<Page>>);

/// The pages that a range touches, each with the part of it.
fn parts(range: Range<u64>) -> impl Iterator<Item = (u64, Range<usize>)> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        if at >= range.end {
            return None;
        }
        let (page, start) = (at / PAGE, at % PAGE);
        let end = (range.end - at).saturating_add(start).min(PAGE);
        at += end - start;
        Some((page, start as usize..end as usize))
    })
}

impl Pages {
    pub(super) fn read(&self, offset: u64, out: &mut [u8]) {
        let mut done = 0;
        for (page, part) in parts(offset..offset + out.len() as u64) {
            let to = &mut out[done..done + part.len()];
            done += part.len();
            match self.0.get(&page) {
                Some(Some(bytes)) => to.copy_from_slice(&bytes[part]),
                _ => to.fill(0),
            }
        }
    }

    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) {
        let mut done = 0;
        for (page, part) in parts(offset..offset + bytes.len() as u64) {
            let from = &bytes[done..done + part.len()];
            done += part.len();
            let page = self.0.entry(page).or_default();
            let page = page.get_or_insert_with(|| Rc::new([0; PAGE as usize]));
            Rc::make_mut(page)[part].copy_from_slice(from);
        }
    }

    /// Makes a range read as zeroes. Whole pages become holes, or stay (and become) allocated.
    pub(super) fn zero(&mut self, range: Range<u64>, keep: bool) {
        let first = range.start.div_ceil(PAGE);
        let end = (range.end / PAGE).max(first);
        let head_end = (first * PAGE).min(range.end);
        let tail_start = (end * PAGE).max(head_end);
        for edge in [range.start..head_end, tail_start..range.end] {
            for (page, part) in parts(edge) {
                if let Some(Some(bytes)) = self.0.get_mut(&page) {
                    Rc::make_mut(bytes)[part].fill(0);
                }
            }
        }
        if keep && range.end.saturating_sub(range.start) <= KEEP_BYTES_MAX {
            self.0.extend((first..end).map(|page| (page, None)));
            self.allocate(range);
        } else {
            let gone: Vec<u64> = self.0.range(first..end).map(|(page, _)| *page).collect();
            for page in gone {
                self.0.remove(&page);
            }
        }
    }

    pub(super) fn allocate(&mut self, range: Range<u64>) {
        if range.end.saturating_sub(range.start) <= KEEP_BYTES_MAX {
            for (page, _) in parts(range) {
                self.0.entry(page).or_default();
            }
        }
    }

    /// Forgets everything from `len` on.
    pub(super) fn truncate(&mut self, len: u64) {
        self.zero(len..len.next_multiple_of(PAGE), false);
        self.0.split_off(&len.div_ceil(PAGE));
    }

    /// The first offset in `from..end` with data, or with none; `end` if there is no such.
    pub(super) fn next(&self, from: u64, end: u64, data: bool) -> u64 {
        let is_data = |page: &Option<Page>| page.is_some();
        if data {
            let found = self.0.range(from / PAGE..).find(|(_, page)| is_data(page));
            return found.map_or(end, |(page, _)| (page * PAGE).max(from)).min(end);
        }
        let mut at = from / PAGE;
        for (page, content) in self.0.range(at..) {
            if *page != at || !is_data(content) {
                break;
            }
            at += 1;
        }
        (at * PAGE).max(from).min(end)
    }

    pub(super) fn allocated_bytes(&self) -> u64 {
        self.0.len() as u64 * PAGE
    }

    /// How far a write from `range.start` gets when `pages_free` more pages may be allocated.
    pub(super) fn room(&self, range: Range<u64>, pages_free: u64) -> u64 {
        let mut left = pages_free;
        for (page, part) in parts(range.clone()) {
            if !self.0.contains_key(&page) {
                if left == 0 {
                    return (page * PAGE + part.start as u64) - range.start;
                }
                left -= 1;
            }
        }
        range.end - range.start
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Rng;

    #[test]
    fn they_do_what_a_plain_vector_does() {
        let mut rand = Rng::new(3);
        let size = 8 * PAGE;
        for _ in 0..50 {
            let mut pages = Pages::default();
            let mut plain = vec![0u8; size as usize];
            for _ in 0..40 {
                let start = rand.below(size);
                let end = rand.range(start..size);
                let part = start as usize..end as usize;
                match rand.below(5) {
                    0 | 1 => {
                        let byte = rand.below(255) as u8 + 1;
                        plain[part.clone()].fill(byte);
                        pages.write(start, &vec![byte; part.len()]);
                    }
                    2 => {
                        plain[part].fill(0);
                        pages.zero(start..end, rand.chance(32_768));
                    }
                    3 => pages.allocate(start..end),
                    _ if rand.chance(10_000) => {
                        plain[start as usize..].fill(0);
                        pages.truncate(start);
                    }
                    _ => {}
                }
                let mut got = vec![0xAA; size as usize];
                pages.read(0, &mut got);
                assert!(got == plain);
                // A hole reads as zeroes.
                let hole = pages.next(start, size, false);
                let data = pages.next(hole, size, true);
                assert!(plain[hole as usize..data as usize].iter().all(|b| *b == 0));
            }
        }
    }

    #[test]
    fn holes_allocation_and_room() {
        let mut pages = Pages::default();
        pages.write(PAGE + 10, &[1; 100]);
        pages.allocate(3 * PAGE..4 * PAGE);
        assert_eq!(pages.next(0, 9 * PAGE, true), PAGE);
        assert_eq!(pages.next(PAGE + 50, 9 * PAGE, true), PAGE + 50);
        assert_eq!(pages.next(PAGE + 50, 9 * PAGE, false), 2 * PAGE);
        assert_eq!(pages.next(2 * PAGE, 9 * PAGE, true), 9 * PAGE);
        assert_eq!(pages.allocated_bytes(), 2 * PAGE);
        assert_eq!(pages.room(0..5 * PAGE, 2), 4 * PAGE);
        assert_eq!(pages.room(100..PAGE, 0), 0);
        pages.zero(0..2 * PAGE, true);
        assert_eq!(pages.next(0, 9 * PAGE, true), 9 * PAGE);
        assert_eq!(pages.allocated_bytes(), 3 * PAGE);
        pages.zero(0..9 * PAGE, false);
        assert_eq!(pages.allocated_bytes(), 0);
    }
}
