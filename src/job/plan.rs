//! From what the source says of its extents to what is done about them.

use crate::base::range::ByteRange;

/// What is to be done about a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Copy it.
    Data,
    /// Make it zero.
    Zero,
    /// Leave it: the target's backing file shows the same.
    Skip,
}

/// A list of extents that touch each other, in order, put together where neighbours are alike, and cut so that no
/// unit of the target is dealt with in two pieces of which one is data: two copies into one cluster at once would
/// wait for each other. A unit that is partly data is all data. The list ends where it ended, unless that would cut
/// a unit: then up to a unit more or less may be covered, never beyond `end`.
pub fn plan(extents: &[(ByteRange, What)], unit: u64, end: u64) -> Vec<(ByteRange, What)> {
    let mut list: Vec<(u64, u64, What)> = Vec::with_capacity(extents.len());
    // What is dealt with so far.
    let mut at = extents.first().map_or(0, |(range, _)| range.start());
    for (index, &(range, what)) in extents.iter().enumerate() {
        let mut from = range.start().max(at);
        let mut to = range.end();
        if what == What::Data {
            // The units in which data begins and ends belong to the data. Nothing before it was data, or it would
            // have taken its unit whole.
            from = (from - from % unit).max(list.first().map_or(from, |first| first.0));
            to = to.next_multiple_of(unit).min(end);
            while let Some(last) = list.last_mut().filter(|last| last.2 != What::Data && last.1 > from) {
                last.1 = from;
                if last.0 >= last.1 {
                    list.pop();
                }
            }
        } else if index + 1 == extents.len() && to < end {
            // What comes next is not known: whole units only, unless that is nothing.
            let whole = to - to % unit;
            if whole > from {
                to = whole;
            }
        }
        if to <= from {
            continue;
        }
        match list.last_mut() {
            Some(last) if last.2 == what => last.1 = to,
            _ => list.push((from, to, what)),
        }
        at = to;
    }
    list.into_iter().map(|(from, to, what)| (ByteRange::at_saturating(from, to - from), what)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::rng::Rng;

    fn extents(list: &[(u64, u64, What)]) -> Vec<(ByteRange, What)> {
        list.iter().map(|&(from, to, what)| (ByteRange::at_saturating(from, to - from), what)).collect()
    }

    #[test]
    fn neighbours_that_are_alike_become_one() {
        let given = extents(&[(0, 64, What::Data), (64, 128, What::Data), (128, 256, What::Zero)]);
        assert_eq!(plan(&given, 64, 256), extents(&[(0, 128, What::Data), (128, 256, What::Zero)]));
    }

    #[test]
    fn a_unit_that_is_partly_data_is_data() {
        let given = extents(&[(0, 70, What::Zero), (70, 80, What::Data), (80, 300, What::Zero)]);
        assert_eq!(
            plan(&given, 64, 300),
            extents(&[(0, 64, What::Zero), (64, 128, What::Data), (128, 300, What::Zero)])
        );
        // A hole within a unit disappears.
        let given = extents(&[(0, 10, What::Data), (10, 20, What::Zero), (20, 200, What::Data)]);
        assert_eq!(plan(&given, 64, 200), extents(&[(0, 200, What::Data)]));
    }

    #[test]
    fn plans_cover_all_and_never_call_data_anything_else() {
        let mut rng = Rng::new(9);
        for _ in 0..5000 {
            let unit = 1 << rng.below(7);
            let end = 1 + rng.below(2000);
            let start = rng.below(end) / unit * unit;
            let mut list = Vec::new();
            let mut at = start;
            while at < end && list.len() < 8 {
                let to = (at + 1 + rng.below(200)).min(end);
                let what = [What::Data, What::Zero, What::Skip][rng.below(3) as usize];
                list.push((at, to, what));
                at = to;
            }
            let planned = plan(&extents(&list), unit, end);
            let mut next = start;
            for (range, what) in &planned {
                assert_eq!(range.start(), next, "{list:?} {unit}");
                next = range.end();
                if *what != What::Data {
                    for &(from, to, given) in &list {
                        let apart = to <= range.start() || range.end() <= from;
                        assert!(apart || given == *what, "{list:?} {unit} {planned:?}");
                    }
                }
            }
            assert!(next > start && next <= end, "{list:?} {unit} {planned:?}");
            assert!(at < end || next == end, "{list:?} {unit} {planned:?}");
            for pair in planned.windows(2) {
                let border = pair[0].0.end();
                let data = pair[0].1 == What::Data || pair[1].1 == What::Data;
                assert!(!data || border % unit == 0, "{list:?} {unit} {planned:?}");
            }
        }
    }
}
