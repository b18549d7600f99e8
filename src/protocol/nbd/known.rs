//! What a server told of the allocation beyond what it was asked, kept for the next question.
//!
//! A question costs a round trip, and an answer tells of thousands of extents. So the rest of an answer is kept, for a
//! second at most, since a server has other clients. What is changed here meanwhile counts as data: that says nothing
//! about its content, and so is true of whatever is there.
//!
//! A change that is made while a question is on its way may be in its answer or not. Those changes are noted and counted
//! as data in the answer, too.

use blockferry_ring::Nanos;

use super::transmission::StatusExtent;
use crate::base::limits::{NBD_STATUS_AGE_NS_MAX, NBD_STATUS_CHANGES, NBD_STATUS_KEPT};
use crate::base::range::ByteRange;

/// Of such extents nothing is known but that they are there.
const DATA: u64 = 0;

/// See the module's head.
#[derive(Debug, Default)]
pub(super) struct Known {
    start: u64,
    /// Where extents end, and what they are; no neighbours are alike.
    extents: Vec<(u64, u64)>,
    /// When it was told.
    at: Nanos,
    /// Questions on their way.
    asked: usize,
    /// Changes since the first of them.
    changes: Vec<ByteRange>,
}

impl Known {
    /// The flags of the extent at `offset` and how far they hold, up to `len` bytes, if that is known.
    pub(super) fn get(&self, offset: u64, len: u64, now: Nanos) -> Option<StatusExtent> {
        if offset < self.start || now > self.at.saturating_add(NBD_STATUS_AGE_NS_MAX) {
            return None;
        }
        let index = self.extents.partition_point(|(end, _)| *end <= offset);
        let (end, flags) = *self.extents.get(index)?;
        let left = end - offset;
        // The last one may go on behind what the reply told.
        let is_last = index + 1 == self.extents.len();
        (!is_last || left >= len).then_some(StatusExtent { length: left.min(len), flags })
    }

    /// Whether a question is on its way.
    pub(super) fn is_asked(&self) -> bool {
        self.asked > 0
    }

    /// A question leaves. It has to be followed by [`Known::answered`].
    pub(super) fn ask(&mut self) {
        self.asked += 1;
    }

    /// Its answer: extents from `start` on, none if it failed. Gives the first one.
    pub(super) fn answered(&mut self, start: u64, told: &[StatusExtent], now: Nanos) -> Option<StatusExtent> {
        self.asked -= 1;
        let mut extents: Vec<(u64, u64)> = Vec::with_capacity(told.len().min(NBD_STATUS_KEPT));
        let mut at = start;
        for extent in told {
            at = at.saturating_add(extent.length);
            let count = extents.len();
            // Neighbours with the same flags are one extent to who asks.
            match extents.last_mut() {
                Some((end, flags)) if *flags == extent.flags => *end = at,
                _ if count == NBD_STATUS_KEPT => break,
                _ => extents.push((at, extent.flags)),
            }
        }
        let first = extents.first().map(|(end, flags)| StatusExtent { length: end - start, flags: *flags });
        if !extents.is_empty() && self.changes.len() < NBD_STATUS_CHANGES {
            let changes = std::mem::take(&mut self.changes);
            (self.start, self.extents, self.at) = (start, extents, now);
            changes.iter().for_each(|range| self.now_data(*range));
            self.changes = changes;
        }
        if self.asked == 0 {
            self.changes.clear();
        }
        first
    }

    /// A range was changed.
    pub(super) fn changed(&mut self, range: ByteRange) {
        if self.asked > 0 && self.changes.len() < NBD_STATUS_CHANGES {
            self.changes.push(range);
        }
        self.now_data(range);
    }

    fn now_data(&mut self, range: ByteRange) {
        let end = self.extents.last().map_or(self.start, |(end, _)| *end);
        let (from, to) = (range.start().max(self.start), range.end().min(end));
        if from >= to {
            return;
        }
        let first = self.extents.partition_point(|(end, _)| *end <= from);
        let last = self.extents.partition_point(|(end, _)| *end < to);
        let begin = if first == 0 { self.start } else { self.extents[first - 1].0 };
        let (tail_end, tail) = self.extents[last];
        let head = self.extents[first].1;
        // What is left of the first extent, the change, what is left of the last one; equal neighbours become one.
        let parts = [(from > begin, (from, head)), (true, (to, DATA)), (tail_end > to, (tail_end, tail))];
        let mut new: Vec<(u64, u64)> = Vec::with_capacity(5);
        let before = first.checked_sub(1).map(|index| self.extents[index]);
        let behind = self.extents.get(last + 1).copied();
        let inside = parts.into_iter().filter(|(is_there, _)| *is_there).map(|(_, part)| part);
        for (end, flags) in before.into_iter().chain(inside).chain(behind) {
            match new.last_mut() {
                Some((last, same)) if *same == flags => *last = end,
                _ => new.push((end, flags)),
            }
        }
        let replaced = first - usize::from(before.is_some())..last + 1 + usize::from(behind.is_some());
        self.extents.splice(replaced, new);
        if self.extents.len() > 2 * NBD_STATUS_KEPT {
            self.extents.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::rng::Rng;

    const HOLE: u64 = 3;
    const LEN: u64 = 400;

    fn told(lengths: &[(u64, u64)]) -> Vec<StatusExtent> {
        lengths.iter().map(|(length, flags)| StatusExtent { length: *length, flags: *flags }).collect()
    }

    fn answer(known: &mut Known, start: u64, lengths: &[(u64, u64)], now: Nanos) {
        known.ask();
        known.answered(start, &told(lengths), now);
    }

    #[test]
    fn an_answer_holds_for_later_questions_and_grows_old() {
        let mut known = Known::default();
        assert_eq!(known.get(0, 1, 0), None);
        answer(&mut known, 100, &[(10, 0), (20, HOLE), (5, HOLE), (50, 0)], 7);
        let get = |offset, len, now| known.get(offset, len, now).map(|e| (e.length, e.flags));
        assert_eq!(get(99, 1, 7), None);
        assert_eq!((get(100, 1000, 7), get(104, 3, 7)), (Some((10, 0)), Some((3, 0))));
        assert_eq!((get(110, 1000, 7), get(134, 1000, 7)), (Some((25, HOLE)), Some((1, HOLE))));
        // The last extent may be longer than was told.
        assert_eq!((get(140, 30, 7), get(140, 46, 7), get(185, 1, 7)), (Some((30, 0)), None, None));
        assert!(get(110, 1, 7 + NBD_STATUS_AGE_NS_MAX).is_some());
        assert_eq!(get(110, 1, 8 + NBD_STATUS_AGE_NS_MAX), None);
    }

    #[test]
    fn changes_while_a_question_is_on_its_way_count_as_data() {
        let mut known = Known::default();
        known.ask();
        known.changed(ByteRange::at_saturating(10, 10));
        known.ask();
        known.answered(0, &[], 0);
        known.answered(0, &told(&[(100, HOLE)]), 0);
        assert_eq!(known.get(5, 100, 0).map(|e| (e.length, e.flags)), Some((5, HOLE)));
        assert_eq!(known.get(12, 100, 0).map(|e| (e.length, e.flags)), Some((8, DATA)));
        // Nobody asks any more: what is changed from now on is noted in the extents alone.
        assert_eq!(known.changes, []);
        // Too many to note them all: the answer is for who asked alone.
        let mut known = Known::default();
        known.ask();
        (0..2000).for_each(|i| known.changed(ByteRange::at_saturating(i * 2, 1)));
        let first = known.answered(0, &told(&[(100_000, HOLE)]), 0);
        assert_eq!((first.map(|e| e.length), known.get(0, 1, 0)), (Some(100_000), None));
        assert!(known.changes.is_empty());
    }

    #[test]
    fn many_changes_agree_with_a_plain_model() {
        for seed in 0..300 {
            let mut rng = Rng::new(seed);
            let (mut known, mut lengths, mut at) = (Known::default(), Vec::new(), 0);
            let mut model = [DATA; LEN as usize];
            while at < LEN {
                let (length, flags) = (1 + rng.below(40.min(LEN - at)), rng.below(2) * HOLE);
                model[at as usize..(at + length) as usize].fill(flags);
                lengths.push((length, flags));
                at += length;
            }
            answer(&mut known, 0, &lengths, 0);
            for _ in 0..40 {
                let start = rng.below(LEN + 10);
                let range = ByteRange::at_saturating(start, rng.below(50));
                known.changed(range);
                let (from, to) = (range.start().min(LEN) as usize, range.end().min(LEN) as usize);
                model[from..to].fill(DATA);
                let mut at = 0;
                while at < LEN as usize {
                    let Some(extent) = known.get(at as u64, 1, 0) else {
                        panic!("seed {seed}: nothing at {at}")
                    };
                    assert_eq!(extent.flags, model[at], "seed {seed} at {at}");
                    at += 1;
                }
                let ends = known.extents.windows(2).all(|two| two[0].0 < two[1].0 && two[0].1 != two[1].1);
                assert!(ends, "seed {seed}: {:?}", known.extents);
            }
        }
    }
}
