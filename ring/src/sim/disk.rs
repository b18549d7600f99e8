//! A disk with a volatile write cache.
//!
//! What reads see (live) and what a power cut leaves (durable) are two contents. Every change is made
//! live at once and put on a list of changes that are not durable yet, in the order in which reads saw
//! them. A sync makes all of them durable that had completed before it was submitted; of the others
//! some, as the seed has it. A power cut keeps any of what is left, whole, torn at sectors, or not at all.
//!
//! # Order
//! Changes become durable in any order, but an older one never undoes a newer one: when a change
//! becomes durable, its range is taken out of all older ones on the list, because they are no longer in
//! the cache. Changes of the length are the exception, as in a journal: what came after one is not
//! durable before it.

use std::collections::VecDeque;
use std::ops::Range;
use std::rc::Rc;

use super::pages::Pages;
use crate::rng::Rng;

/// A change of contents.
#[derive(Clone, Debug)]
pub(super) enum Change {
    Write {
        offset: u64,
        data: Rc<[u8]>,
    },
    Zero {
        keep: bool,
    },
    Allocate,
    /// Contents become whatever they become: a discard.
    Scramble {
        seed: u64,
    },
    SetLen(u64),
}

#[derive(Clone, Debug)]
struct Mutation {
    id: u64,
    change: Change,
    /// What is left of its range.
    ranges: Vec<Range<u64>>,
    /// The length that a write gives the file at least, whatever of its bytes has been overwritten.
    len_min: u64,
    /// The event number at which its owner was told that it had ended.
    completed: Option<u64>,
}

/// How a power cut treats what was not durable.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cut {
    /// Changes kept, out of 65536.
    pub(super) keep_chance: u32,
    /// Of those, changes torn, out of 65536.
    pub(super) torn_chance: u32,
    /// The grain at which they tear.
    pub(super) sector_bytes: u64,
}

/// What a power cut did to changes that were not durable.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct CutCounts {
    pub(super) torn: u64,
    pub(super) lost: u64,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Disk {
    len: u64,
    live: Pages,
    durable: Pages,
    durable_len: u64,
    pending: VecDeque<Mutation>,
}

fn apply(pages: &mut Pages, len: &mut u64, change: &Change, range: Range<u64>) {
    match change {
        Change::Write { offset, data } => {
            let from = (range.start - offset) as usize..(range.end - offset) as usize;
            pages.write(range.start, &data[from]);
        }
        Change::Zero { keep } => pages.zero(range, *keep),
        Change::Allocate => pages.allocate(range),
        Change::Scramble { seed } => {
            // By position, so that a part of the range becomes what the whole would have made of it.
            let byte = |at: u64| ((at ^ seed).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8;
            let bytes: Vec<u8> = range.clone().map(byte).collect();
            pages.write(range.start, &bytes);
        }
        Change::SetLen(new) => {
            pages.truncate(*new);
            *len = *new;
        }
    }
}

/// Takes `cut` out of `ranges`.
fn subtract(ranges: &mut Vec<Range<u64>>, cut: &Range<u64>) {
    if ranges.iter().all(|r| r.end <= cut.start || cut.end <= r.start) {
        return;
    }
    *ranges = ranges
        .iter()
        .flat_map(|r| [r.start..r.end.min(cut.start.max(r.start)), r.start.max(cut.end.min(r.end))..r.end])
        .filter(|r| r.start < r.end)
        .collect();
}

impl Disk {
    /// A disk of zeroes.
    pub(super) fn new(len: u64) -> Disk {
        Disk { len, durable_len: len, ..Disk::default() }
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn durable_len(&self) -> u64 {
        self.durable_len
    }

    pub(super) fn live(&self) -> &Pages {
        &self.live
    }

    pub(super) fn durable(&self) -> &Pages {
        &self.durable
    }

    pub(super) fn undurable_changes(&self) -> usize {
        self.pending.len()
    }

    /// Makes a change live; `id` must be larger than all before.
    pub(super) fn change(&mut self, id: u64, change: Change, range: Range<u64>) {
        apply(&mut self.live, &mut self.len, &change, range.clone());
        let len_min = if matches!(change, Change::Write { .. }) { range.end } else { 0 };
        self.len = self.len.max(len_min);
        let range = match change {
            Change::SetLen(len) => len..u64::MAX,
            _ => range,
        };
        self.pending.push_back(Mutation { id, change, ranges: vec![range], len_min, completed: None });
    }

    /// Live and durable at once, past the cache: how a test driver prepares a disk.
    pub(super) fn write_durable(&mut self, offset: u64, bytes: &[u8]) {
        let range = offset..offset + bytes.len() as u64;
        self.settle_lengths();
        self.live.write(offset, bytes);
        self.len = self.len.max(range.end);
        self.durable.write(offset, bytes);
        self.durable_len = self.durable_len.max(range.end);
        for mutation in &mut self.pending {
            if !matches!(mutation.change, Change::SetLen(_)) {
                subtract(&mut mutation.ranges, &range);
            }
        }
    }

    fn find(&mut self, id: u64) -> Option<&mut Mutation> {
        let at = self.pending.partition_point(|m| m.id < id);
        self.pending.get_mut(at).filter(|m| m.id == id)
    }

    /// The owner of a change learns that it has ended.
    pub(super) fn complete(&mut self, id: u64, now: u64) {
        if let Some(mutation) = self.find(id) {
            mutation.completed = Some(now);
        }
    }

    /// Makes one change durable.
    pub(super) fn settle_one(&mut self, id: u64) {
        self.settle(|m| m.id == id);
    }

    /// A sync that was submitted at event `submitted`.
    pub(super) fn sync(&mut self, submitted: u64, rand: &mut Rng) {
        self.settle(|m| m.completed.is_some_and(|at| at < submitted) || rand.chance(32_768));
    }

    /// A sync that fails. Reads go on to see what was to become durable, a later sync may succeed, and
    /// some of it is lost all the same: the kernel forgets pages whose write-back failed. What is in
    /// `apart` makes itself durable or fails for itself. Gives the number of changes lost.
    pub(super) fn sync_failed(&mut self, apart: &[u64], rand: &mut Rng) -> u64 {
        self.settle(|_| rand.chance(16_384));
        let before = self.pending.len();
        self.pending.retain(|m| {
            matches!(m.change, Change::SetLen(_)) || apart.contains(&m.id) || rand.chance(32_768)
        });
        (before - self.pending.len()) as u64
    }

    fn settle(&mut self, mut pick: impl FnMut(&Mutation) -> bool) {
        let pending = std::mem::take(&mut self.pending);
        for mutation in pending {
            if pick(&mutation) {
                self.settle_lengths();
                self.make_durable(&mutation);
            } else {
                self.pending.push_back(mutation);
            }
        }
    }

    /// Changes of the length that are older than what becomes durable next.
    fn settle_lengths(&mut self) {
        while let Some(at) = self.pending.iter().position(|m| matches!(m.change, Change::SetLen(_))) {
            let newer = self.pending.split_off(at + 1);
            if let Some(mutation) = self.pending.pop_back() {
                self.make_durable(&mutation);
            }
            self.pending.extend(newer);
        }
    }

    /// `pending` holds only changes that are older.
    fn make_durable(&mut self, mutation: &Mutation) {
        for range in &mutation.ranges {
            apply(&mut self.durable, &mut self.durable_len, &mutation.change, range.clone());
        }
        self.durable_len = self.durable_len.max(mutation.len_min);
        for older in self.pending.iter_mut().filter(|m| !matches!(m.change, Change::SetLen(_))) {
            mutation.ranges.iter().for_each(|range| subtract(&mut older.ranges, range));
            if let Change::SetLen(len) = mutation.change {
                older.len_min = older.len_min.min(len);
            }
        }
    }

    /// The power goes: live contents are from now on what a disk finds when it comes back. `in_flight`
    /// are writes that had not reached the cache.
    pub(super) fn power_cut(
        &mut self,
        cut: Cut,
        in_flight: Vec<(u64, Rc<[u8]>)>,
        rand: &mut Rng,
    ) -> CutCounts {
        let mut counts = CutCounts::default();
        for (offset, data) in in_flight {
            let ranges = std::iter::once(offset..offset + data.len() as u64).collect();
            let len_min = offset + data.len() as u64;
            let change = Change::Write { offset, data };
            self.pending.push_back(Mutation { id: u64::MAX, change, ranges, len_min, completed: None });
        }
        for mut mutation in std::mem::take(&mut self.pending) {
            if !rand.chance(cut.keep_chance) {
                counts.lost += 1;
                continue;
            }
            if !matches!(mutation.change, Change::SetLen(_)) && rand.chance(cut.torn_chance) {
                counts.torn += 1;
                mutation.ranges = tear(&mutation.ranges, cut.sector_bytes, rand);
                let end = mutation.ranges.last().map_or(0, |range| range.end);
                mutation.len_min = mutation.len_min.min(end);
            }
            self.make_durable(&mutation);
        }
        self.live = self.durable.clone();
        self.len = self.durable_len;
        counts
    }
}

/// Some of the sectors of some ranges. Most tears are one cut between a part that arrived and one that
/// did not; some leave any pattern.
pub(super) fn tear(ranges: &[Range<u64>], sector_bytes: u64, rand: &mut Rng) -> Vec<Range<u64>> {
    let mut torn = Vec::new();
    let pattern = rand.chance(16_384);
    for range in ranges {
        let first = range.start / sector_bytes;
        let last = range.end.div_ceil(sector_bytes);
        let sector = |n: u64| (n * sector_bytes).clamp(range.start, range.end);
        if pattern && last - first <= 4096 {
            let kept = (first..last).filter(|_| rand.chance(32_768)).collect::<Vec<_>>();
            torn.extend(kept.into_iter().map(|n| sector(n)..sector(n + 1)));
        } else {
            let at = sector(rand.range(first..last + 1));
            torn.push(if rand.chance(32_768) { range.start..at } else { at..range.end });
        }
    }
    torn.retain(|range| range.start < range.end);
    torn
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(disk: &mut Disk, id: u64, offset: u64, len: usize, byte: u8) {
        let data: Rc<[u8]> = vec![byte; len].into();
        disk.change(id, Change::Write { offset, data }, offset..offset + len as u64);
    }

    fn bytes(pages: &Pages, offset: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        pages.read(offset, &mut out);
        out
    }

    const NOTHING: Cut = Cut { keep_chance: 0, torn_chance: 0, sector_bytes: 512 };
    const ALL: Cut = Cut { keep_chance: 65_536, torn_chance: 0, sector_bytes: 512 };

    #[test]
    fn a_sync_covers_what_had_completed_and_a_cut_takes_the_rest() {
        let mut rand = Rng::new(1);
        let mut disk = Disk::new(8192);
        write(&mut disk, 1, 0, 512, 1);
        disk.complete(1, 2);
        disk.sync(3, &mut rand);
        write(&mut disk, 4, 512, 512, 2);
        disk.complete(4, 5);
        assert_eq!(bytes(disk.live(), 512, 1), [2]);
        let counts = disk.power_cut(NOTHING, Vec::new(), &mut rand);
        assert_eq!(counts.lost, 1);
        assert_eq!(bytes(disk.live(), 0, 1), [1]);
        assert_eq!(bytes(disk.live(), 512, 1), [0]);
    }

    #[test]
    fn an_older_change_never_undoes_a_newer_one() {
        let mut rand = Rng::new(1);
        let mut disk = Disk::new(8192);
        write(&mut disk, 1, 0, 4096, 1);
        write(&mut disk, 2, 512, 512, 2);
        disk.settle_one(2);
        assert_eq!(bytes(disk.durable(), 0, 1), [0]);
        disk.power_cut(ALL, Vec::new(), &mut rand);
        assert_eq!(bytes(disk.live(), 511, 1), [1]);
        assert_eq!(bytes(disk.live(), 512, 512), [2; 512]);
        assert_eq!(bytes(disk.live(), 1024, 1), [1]);
    }

    #[test]
    fn lengths_become_durable_in_order() {
        let mut rand = Rng::new(1);
        let mut disk = Disk::new(0);
        write(&mut disk, 1, 0, 1000, 1);
        disk.change(2, Change::SetLen(100), 0..0);
        write(&mut disk, 3, 200, 100, 3);
        assert_eq!(disk.len(), 300);
        disk.settle_one(3);
        // The length came along; the older write is cut to it.
        assert_eq!(disk.durable_len(), 300);
        assert_eq!(bytes(disk.durable(), 0, 1), [0]);
        assert_eq!(disk.undurable_changes(), 1);
        disk.power_cut(ALL, Vec::new(), &mut rand);
        assert_eq!(disk.len(), 300);
        assert_eq!(bytes(disk.live(), 99, 3), [1, 0, 0]);
        assert_eq!(bytes(disk.live(), 200, 1), [3]);
    }

    #[test]
    fn a_cut_that_keeps_all_is_what_reads_saw() {
        for seed in 0..200 {
            let mut rand = Rng::new(seed);
            let mut disk = Disk::new(0);
            for id in 1..60 {
                let offset = rand.below(20_000);
                let len = rand.range(1..6_001);
                match rand.below(8) {
                    0 => disk.change(id, Change::SetLen(offset), 0..0),
                    1 => disk.change(id, Change::Zero { keep: rand.chance(32_768) }, offset..offset + len),
                    2 => disk.change(
                        id,
                        Change::Scramble { seed: id },
                        offset..(offset + len).min(disk.len().max(offset)),
                    ),
                    _ => write(&mut disk, id, offset, len as usize, id as u8),
                }
                if rand.chance(20_000) {
                    disk.complete(id, id);
                }
                match rand.below(12) {
                    0 => disk.sync(id, &mut rand),
                    1 => disk.settle_one(rand.below(id)),
                    _ => {}
                }
            }
            let (len, live) = (disk.len(), bytes(disk.live(), 0, 30_000));
            disk.power_cut(ALL, Vec::new(), &mut rand);
            assert_eq!(disk.len(), len, "seed {seed}");
            assert!(bytes(disk.live(), 0, 30_000) == live, "seed {seed}");
        }
    }

    #[test]
    fn tears_stay_within_the_range_and_fall_on_sectors() {
        let mut rand = Rng::new(5);
        for _ in 0..500 {
            let whole = 700..5000;
            for range in tear(std::slice::from_ref(&whole), 512, &mut rand) {
                assert!(range.start >= 700 && range.end <= 5000 && range.start < range.end);
                assert!(range.start == 700 || range.start % 512 == 0);
                assert!(range.end == 5000 || range.end % 512 == 0);
            }
        }
    }
}
