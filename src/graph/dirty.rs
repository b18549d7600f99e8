//! Which parts of a disk still differ.
//!
//! A mirror starts with everything to copy, a backup with what its bitmap says, and then guests write all over a disk
//! that may have 64 TiB. The map divides the disk into chunks of `granularity` bytes (the last one may be shorter) and
//! keeps one bit each, but only where that says something. Chunks are gathered in leaves of 32768; a leaf that is clean
//! throughout or dirty throughout has no bits at all, just its two bits in the summary:
//!
//! | `some` | `full` | leaf |
//! |---|---|---|
//! | 0 | 0 | all clean |
//! | 1 | 0 | some dirty: bits in a box of 4 KiB |
//! | 1 | 1 | all dirty |
//!
//! So an untouched disk and a disk yet to be copied whole cost the same, almost nothing, and searching skips 64 leaves a
//! word in the summary, then 64 chunks a word in the leaf.
//!
//! Dirt is contagious, cleanliness is not: setting marks every chunk that the range touches, clearing only chunks that
//! the range covers whole. What lies beyond the end of the disk is ignored.

use bitvec::prelude::{BitArray, BitVec, Lsb0};

use crate::base::limits::{
    DIRTY_LEAVES_MAX, DIRTY_LEAVES_SPARE, DISK_LEN_MAX, GRANULARITY_BYTES_MAX, GRANULARITY_BYTES_MIN,
};
use crate::base::range::ByteRange;

const LEAF_CHUNKS: u64 = 32768;
const LEAF_WORDS: usize = LEAF_CHUNKS as usize / 64;

/// Why there is no such dirty map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DirtyMapError {
    /// The granularity is no power of two, or none of 512 bytes to 64 MiB.
    #[error("dirty-map granularity of {granularity} bytes is not a power of two from 512 bytes to 64 MiB")]
    Granularity {
        /// Bytes in a chunk, as asked for.
        granularity: u64,
    },
    /// More chunks than a map may have.
    #[error("a disk of {len} bytes is too large for a dirty map with a granularity of {granularity} bytes")]
    TooLarge {
        /// Bytes of the disk.
        len: u64,
        /// Bytes in a chunk.
        granularity: u64,
    },
    /// The maps to merge describe disks of different length.
    #[error("dirty map of a disk of {other} bytes cannot be merged into that of a disk of {own} bytes")]
    OtherLength {
        /// Bytes of the disk whose map was to grow.
        own: u64,
        /// Bytes of the disk whose map was to be added.
        other: u64,
    },
}

/// A leaf with both clean and dirty chunks.
#[derive(Debug, Clone)]
struct Leaf {
    dirty: u32,
    bits: BitArray<[u64; LEAF_WORDS], Lsb0>,
}

impl Leaf {
    fn clean() -> Box<Leaf> {
        Box::new(Leaf { dirty: 0, bits: BitArray::ZERO })
    }

    /// Sets the chunks `from..to` to `value`; returns how many changed.
    fn assign(&mut self, from: usize, to: usize, value: bool) -> u32 {
        let changed = if to - from == 1 {
            u32::from(self.bits.replace(from, value) != value)
        } else {
            let span = &mut self.bits[from..to];
            let ones = span.count_ones();
            span.fill(value);
            (if value { to - from - ones } else { ones }) as u32
        };
        self.dirty = if value { self.dirty + changed } else { self.dirty - changed };
        changed
    }
}

/// The part of an operation that concerns one leaf.
struct Part {
    leaf: usize,
    from: usize,
    to: usize,
    /// Chunks that this leaf has: fewer than the others in the last one.
    chunks: usize,
}

impl Part {
    fn is_whole(&self) -> bool {
        self.to - self.from == self.chunks
    }
}

/// One bit a chunk of a disk; see the module's head.
#[derive(Debug, Clone)]
pub struct DirtyMap {
    len: u64,
    /// Binary logarithm of the granularity.
    shift: u32,
    chunks: u64,
    dirty_chunks: u64,
    some: BitVec<u64, Lsb0>,
    full: BitVec<u64, Lsb0>,
    /// Holds a box exactly where `some` is set and `full` is not.
    leaves: Vec<Option<Box<Leaf>>>,
    /// Boxes without a dirty chunk, for the next leaf that needs one.
    spare: Vec<Box<Leaf>>,
}

/// Finds the first bit of the `wanted` value in `from..to`, a word at a time.
fn find_bit(words: &[u64], from: usize, to: usize, wanted: bool) -> Option<usize> {
    if from >= to {
        return None;
    }
    let flip = if wanted { 0 } else { u64::MAX };
    let mut index = from / 64;
    let mut word = (words[index] ^ flip) & (u64::MAX << (from % 64));
    while word == 0 {
        index += 1;
        if index * 64 >= to {
            return None;
        }
        word = words[index] ^ flip;
    }
    let found = index * 64 + word.trailing_zeros() as usize;
    (found < to).then_some(found)
}

impl DirtyMap {
    /// A clean map for a disk of `len` bytes in chunks of `granularity` bytes (QMP `granularity`: a power of two, 512
    /// bytes to 64 MiB).
    pub fn new(len: u64, granularity: u64) -> Result<DirtyMap, DirtyMapError> {
        let legal = GRANULARITY_BYTES_MIN..=GRANULARITY_BYTES_MAX;
        if !granularity.is_power_of_two() || !legal.contains(&granularity) {
            return Err(DirtyMapError::Granularity { granularity });
        }
        let chunks = len.div_ceil(granularity);
        let leaves = chunks.div_ceil(LEAF_CHUNKS);
        if len > DISK_LEN_MAX || leaves > DIRTY_LEAVES_MAX {
            return Err(DirtyMapError::TooLarge { len, granularity });
        }
        let leaves = leaves as usize;
        Ok(DirtyMap {
            len,
            shift: granularity.trailing_zeros(),
            chunks,
            dirty_chunks: 0,
            some: BitVec::repeat(false, leaves),
            full: BitVec::repeat(false, leaves),
            // Comes as zeroed memory from the system, of which no page is touched yet.
            leaves: vec![None; leaves],
            spare: Vec::new(),
        })
    }

    /// Bytes of the disk.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the disk has no bytes at all. For whether nothing is dirty see [`DirtyMap::is_clean`].
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes in a chunk.
    pub fn granularity(&self) -> u64 {
        1 << self.shift
    }

    /// Whether nothing is dirty.
    pub fn is_clean(&self) -> bool {
        self.dirty_chunks == 0
    }

    /// Chunks that are dirty.
    pub fn dirty_chunks(&self) -> u64 {
        self.dirty_chunks
    }

    /// Bytes of the disk in dirty chunks; the last chunk counts only what the disk has of it. Takes constant time.
    pub fn dirty_bytes(&self) -> u64 {
        let missing_tail = (self.chunks << self.shift) - self.len;
        let tail_is_dirty = missing_tail > 0 && self.get(self.len - 1);
        (self.dirty_chunks << self.shift) - if tail_is_dirty { missing_tail } else { 0 }
    }

    /// Whether the chunk that holds the byte at `offset` is dirty. Beyond the end nothing is.
    pub fn get(&self, offset: u64) -> bool {
        if offset >= self.len {
            return false;
        }
        let chunk = offset >> self.shift;
        let leaf = (chunk / LEAF_CHUNKS) as usize;
        match &self.leaves[leaf] {
            Some(partly) => partly.bits[(chunk % LEAF_CHUNKS) as usize],
            None => self.full[leaf],
        }
    }

    /// Whether any chunk that `range` touches is dirty.
    pub fn any_in(&self, range: ByteRange) -> bool {
        match range.intersect(ByteRange::first(self.len)) {
            Some(range) => {
                let first_after = ((range.end() - 1) >> self.shift) + 1;
                self.find_dirty(range.start() >> self.shift).is_some_and(|chunk| chunk < first_after)
            }
            None => false,
        }
    }

    /// Makes every chunk dirty that `range` touches.
    pub fn set(&mut self, range: ByteRange) {
        let Some(range) = range.intersect(ByteRange::first(self.len)) else { return };
        let (from, to) = (range.start() >> self.shift, ((range.end() - 1) >> self.shift) + 1);
        for part in self.parts(from, to) {
            self.set_part(&part);
        }
    }

    /// Makes every chunk clean that `range` covers whole. The last chunk is whole where the disk ends.
    pub fn clear(&mut self, range: ByteRange) {
        let from = range.start().div_ceil(self.granularity());
        let to = if range.end() >= self.len { self.chunks } else { range.end() >> self.shift };
        for part in self.parts(from, to) {
            self.clear_part(&part);
        }
    }

    /// Makes everything dirty.
    pub fn set_all(&mut self) {
        self.drop_leaves();
        self.some.fill(true);
        self.full.fill(true);
        self.dirty_chunks = self.chunks;
    }

    /// Makes everything clean.
    pub fn clear_all(&mut self) {
        self.drop_leaves();
        self.some.fill(false);
        self.full.fill(false);
        self.dirty_chunks = 0;
    }

    /// The first run of dirty chunks at or after `from`, cut to `len_max` bytes rounded down to whole chunks, but never
    /// to less than one. The chunk that holds `from` counts, and then the run starts where that chunk does. It ends at
    /// the end of the disk at the latest.
    pub fn next_dirty(&self, from: u64, len_max: u64) -> Option<ByteRange> {
        if from >= self.len {
            // Where the disk ends inside its last chunk, that is not the chunk to go on from.
            return None;
        }
        let first = self.find_dirty(from >> self.shift)?;
        let chunks_max = (len_max >> self.shift).max(1);
        let end = self.find_clean(first + 1, first.saturating_add(chunks_max).min(self.chunks));
        Some(ByteRange::first(self.len).split_at(first << self.shift).1.split_at(end << self.shift).0)
    }

    /// The same, and from the start of the disk again when there is nothing up to its end. A run does not go on over the
    /// end.
    pub fn next_dirty_wrapping(&self, from: u64, len_max: u64) -> Option<ByteRange> {
        self.next_dirty(from, len_max).or_else(|| self.next_dirty(0, len_max))
    }

    /// All runs of dirty chunks in order, each as long as it can be.
    pub fn runs(&self) -> Runs<'_> {
        Runs { map: self, from: 0 }
    }

    /// Makes dirty what is dirty in `other`, a map of a disk of the same length. With another granularity every chunk
    /// that a dirty one of `other` touches becomes dirty.
    pub fn merge(&mut self, other: &DirtyMap) -> Result<(), DirtyMapError> {
        if self.len != other.len {
            return Err(DirtyMapError::OtherLength { own: self.len, other: other.len });
        }
        if self.shift != other.shift {
            other.runs().for_each(|run| self.set(run));
            return Ok(());
        }
        for leaf in other.some.iter_ones() {
            let part = self.whole_leaf(leaf);
            match &other.leaves[leaf] {
                None => self.set_part(&part),
                Some(added) => self.merge_leaf(&part, added),
            }
        }
        Ok(())
    }

    /// Bytes of memory that the map has asked for. Of the pointers to leaves, 8 bytes for each 32768 chunks, only pages
    /// that were written to take real memory.
    pub fn heap_bytes(&self) -> usize {
        let summary = (self.some.capacity() + self.full.capacity()) / 8;
        let boxes = self.some.iter_ones().filter(|&leaf| self.leaves[leaf].is_some()).count();
        summary + size_of_val(&*self.leaves) + (boxes + self.spare.len()) * size_of::<Leaf>()
    }

    fn leaf_chunks(&self, leaf: usize) -> usize {
        (self.chunks - leaf as u64 * LEAF_CHUNKS).min(LEAF_CHUNKS) as usize
    }

    fn whole_leaf(&self, leaf: usize) -> Part {
        let chunks = self.leaf_chunks(leaf);
        Part { leaf, from: 0, to: chunks, chunks }
    }

    /// Cuts the chunks `from..to` at the borders of leaves.
    fn parts(&self, from: u64, to: u64) -> impl Iterator<Item = Part> + use<> {
        let (total, mut next) = (self.chunks, from);
        std::iter::from_fn(move || {
            if next >= to {
                return None;
            }
            let leaf = next / LEAF_CHUNKS;
            let base = leaf * LEAF_CHUNKS;
            let part_to = to.min(base + LEAF_CHUNKS);
            let part = Part {
                leaf: leaf as usize,
                from: (next - base) as usize,
                to: (part_to - base) as usize,
                chunks: (total - base).min(LEAF_CHUNKS) as usize,
            };
            next = part_to;
            Some(part)
        })
    }

    fn set_part(&mut self, part: &Part) {
        if self.full[part.leaf] {
            return;
        }
        if part.is_whole() {
            self.dirty_chunks += part.chunks as u64 - self.leaf_dirty(part.leaf);
            self.become_full(part.leaf);
            return;
        }
        let leaf = self.leaves[part.leaf].get_or_insert_with(|| self.spare.pop().unwrap_or_else(Leaf::clean));
        self.dirty_chunks += u64::from(leaf.assign(part.from, part.to, true));
        self.after_growth(part);
    }

    fn merge_leaf(&mut self, part: &Part, added: &Leaf) {
        if self.full[part.leaf] {
            return;
        }
        let leaf = self.leaves[part.leaf].get_or_insert_with(|| self.spare.pop().unwrap_or_else(Leaf::clean));
        let words = leaf.bits.as_raw_mut_slice().iter_mut();
        words.zip(added.bits.as_raw_slice()).for_each(|(own, other)| *own |= other);
        let dirty = leaf.bits.count_ones() as u32;
        self.dirty_chunks += u64::from(dirty - leaf.dirty);
        leaf.dirty = dirty;
        self.after_growth(part);
    }

    /// Brings the summary up to date after chunks of a leaf became dirty.
    fn after_growth(&mut self, part: &Part) {
        self.some.set(part.leaf, true);
        if self.leaf_dirty(part.leaf) == part.chunks as u64 {
            self.become_full(part.leaf);
        }
    }

    fn clear_part(&mut self, part: &Part) {
        if !self.some[part.leaf] {
            return;
        }
        if part.is_whole() {
            self.dirty_chunks -=
                if self.full[part.leaf] { part.chunks as u64 } else { self.leaf_dirty(part.leaf) };
            self.become_clean(part.leaf);
            return;
        }
        if self.full[part.leaf] {
            let mut leaf = self.spare.pop().unwrap_or_else(Leaf::clean);
            leaf.assign(0, part.chunks, true);
            self.leaves[part.leaf] = Some(leaf);
            self.full.set(part.leaf, false);
        }
        if let Some(leaf) = &mut self.leaves[part.leaf] {
            self.dirty_chunks -= u64::from(leaf.assign(part.from, part.to, false));
            if leaf.dirty == 0 {
                self.become_clean(part.leaf);
            }
        }
    }

    /// Dirty chunks of a leaf that is not full.
    fn leaf_dirty(&self, leaf: usize) -> u64 {
        self.leaves[leaf].as_ref().map_or(0, |leaf| u64::from(leaf.dirty))
    }

    fn become_full(&mut self, leaf: usize) {
        self.some.set(leaf, true);
        self.full.set(leaf, true);
        self.retire(leaf);
    }

    fn become_clean(&mut self, leaf: usize) {
        self.some.set(leaf, false);
        self.full.set(leaf, false);
        self.retire(leaf);
    }

    /// Takes the bits from a leaf that no longer needs them, and keeps a few such boxes clean for others.
    fn retire(&mut self, leaf: usize) {
        let Some(mut retired) = self.leaves[leaf].take() else { return };
        if self.spare.len() < DIRTY_LEAVES_SPARE {
            if retired.dirty != 0 {
                *retired = Leaf { dirty: 0, bits: BitArray::ZERO };
            }
            self.spare.push(retired);
        }
    }

    fn drop_leaves(&mut self) {
        let summary = self.some.as_raw_slice().iter().zip(self.full.as_raw_slice());
        for (word, (some, full)) in summary.enumerate() {
            let mut partly = some & !full;
            while partly != 0 {
                self.leaves[word * 64 + partly.trailing_zeros() as usize] = None;
                partly &= partly - 1;
            }
        }
    }

    /// The first dirty chunk at or after chunk `from`.
    fn find_dirty(&self, from: u64) -> Option<u64> {
        if from >= self.chunks {
            return None;
        }
        let mut local = (from % LEAF_CHUNKS) as usize;
        let mut leaf = (from / LEAF_CHUNKS) as usize;
        loop {
            let found = match &self.leaves[leaf] {
                Some(partly) => find_bit(partly.bits.as_raw_slice(), local, self.leaf_chunks(leaf), true),
                None => self.full[leaf].then_some(local),
            };
            if let Some(found) = found {
                return Some(leaf as u64 * LEAF_CHUNKS + found as u64);
            }
            leaf = find_bit(self.some.as_raw_slice(), leaf + 1, self.some.len(), true)?;
            local = 0;
        }
    }

    /// The first clean chunk in `from..to`, or `to`.
    fn find_clean(&self, from: u64, to: u64) -> u64 {
        let mut chunk = from;
        while chunk < to {
            let leaf = (chunk / LEAF_CHUNKS) as usize;
            let base = leaf as u64 * LEAF_CHUNKS;
            match &self.leaves[leaf] {
                Some(partly) => {
                    // Not past `to`: a short piece of a long run must not cost a look at all of it.
                    let (local, end) = ((chunk - base) as usize, (to - base).min(LEAF_CHUNKS) as usize);
                    if let Some(found) = find_bit(partly.bits.as_raw_slice(), local, end, false) {
                        return base + found as u64;
                    }
                    chunk = base + LEAF_CHUNKS;
                }
                None if !self.full[leaf] => return chunk,
                None => {
                    let leaves = to.div_ceil(LEAF_CHUNKS) as usize;
                    let next = find_bit(self.full.as_raw_slice(), leaf + 1, leaves, false);
                    chunk = next.map_or(to, |next| next as u64 * LEAF_CHUNKS);
                }
            }
        }
        to
    }
}

/// The runs of [`DirtyMap::runs`], in order.
#[derive(Debug, Clone)]
pub struct Runs<'a> {
    map: &'a DirtyMap,
    from: u64,
}

impl Iterator for Runs<'_> {
    type Item = ByteRange;

    fn next(&mut self) -> Option<ByteRange> {
        let run = self.map.next_dirty(self.from, u64::MAX)?;
        self.from = run.end();
        Some(run)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::rng::Rng;

    const TIB: u64 = 1 << 40;

    fn r(start: u64, end: u64) -> ByteRange {
        ByteRange::new(start, end).expect("test range runs forward")
    }

    fn map(len: u64, granularity: u64) -> DirtyMap {
        DirtyMap::new(len, granularity).expect("legal shape")
    }

    /// One `bool` a chunk.
    struct Model {
        len: u64,
        granularity: u64,
        chunks: Vec<bool>,
    }

    impl Model {
        fn new(len: u64, granularity: u64) -> Model {
            Model { len, granularity, chunks: vec![false; len.div_ceil(granularity) as usize] }
        }

        fn bytes_of(&self, chunk: usize) -> (u64, u64) {
            let start = chunk as u64 * self.granularity;
            (start, (start + self.granularity).min(self.len))
        }

        fn assign(&mut self, range: ByteRange, value: bool) {
            for chunk in 0..self.chunks.len() {
                let (start, end) = self.bytes_of(chunk);
                let touched = range.start().max(start) < range.end().min(end);
                let whole = range.start() <= start && end <= range.end();
                if if value { touched } else { whole } {
                    self.chunks[chunk] = value;
                }
            }
        }

        fn runs(&self) -> Vec<ByteRange> {
            let mut runs: Vec<ByteRange> = vec![];
            for chunk in (0..self.chunks.len()).filter(|&chunk| self.chunks[chunk]) {
                let (start, end) = self.bytes_of(chunk);
                match runs.last_mut() {
                    Some(last) if last.end() == start => *last = r(last.start(), end),
                    _ => runs.push(r(start, end)),
                }
            }
            runs
        }

        fn next_dirty(&self, runs: &[ByteRange], from: u64, len_max: u64) -> Option<ByteRange> {
            if from >= self.len {
                return None;
            }
            let from = from - from % self.granularity;
            let chunks_max = (len_max / self.granularity).max(1);
            runs.iter().find(|run| run.end() > from).map(|run| {
                let start = run.start().max(from);
                r(start, run.end().min(start.saturating_add(chunks_max.saturating_mul(self.granularity))))
            })
        }
    }

    /// What must hold between the parts of a map, whatever happened to it.
    fn check_invariants(map: &DirtyMap) {
        let mut dirty = 0;
        for leaf in 0..map.leaves.len() {
            match (&map.leaves[leaf], map.some[leaf], map.full[leaf]) {
                (None, false, false) => {}
                (None, true, true) => dirty += map.leaf_chunks(leaf) as u64,
                (Some(partly), true, false) => {
                    assert_eq!(partly.bits.count_ones(), partly.dirty as usize);
                    assert!((1..map.leaf_chunks(leaf)).contains(&(partly.dirty as usize)));
                    dirty += u64::from(partly.dirty);
                }
                other => panic!("leaf {leaf}: {other:?}"),
            }
        }
        assert_eq!(dirty, map.dirty_chunks);
        assert!(map.spare.len() <= DIRTY_LEAVES_SPARE);
        assert!(map.spare.iter().all(|leaf| leaf.dirty == 0 && leaf.bits.not_any()));
    }

    fn check_same(map: &DirtyMap, model: &Model, rng: &mut Rng) {
        check_invariants(map);
        let runs = model.runs();
        assert_eq!(map.runs().collect::<Vec<_>>(), runs);
        assert_eq!(map.dirty_bytes(), runs.iter().map(|run| run.len()).sum::<u64>());
        assert_eq!(map.dirty_chunks(), model.chunks.iter().filter(|&&dirty| dirty).count() as u64);
        assert_eq!(map.is_clean(), runs.is_empty());
        for _ in 0..8 {
            let from = rng.below(model.len + model.granularity * 2);
            let len_max =
                [0, 1, model.granularity * 3, rng.below(model.len + 1), u64::MAX][rng.below(5) as usize];
            let expected = model.next_dirty(&runs, from, len_max);
            assert_eq!(map.next_dirty(from, len_max), expected, "from {from} at most {len_max}");
            let wrapped = expected.or_else(|| model.next_dirty(&runs, 0, len_max));
            assert_eq!(map.next_dirty_wrapping(from, len_max), wrapped);
            let chunk = (from / model.granularity) as usize;
            let dirty = from < model.len && model.chunks[chunk];
            assert_eq!(map.get(from), dirty);
            let span = ByteRange::at_saturating(from, rng.below(model.granularity * 4));
            let aligned = span.align_outward(model.granularity);
            let touches =
                !span.is_empty() && span.start() < model.len && runs.iter().any(|run| run.overlaps(aligned));
            assert_eq!(map.any_in(span), touches, "{span}");
        }
    }

    /// Offsets of every size, and often within a few bytes of where a leaf, a chunk or the disk ends.
    fn random_offset(rng: &mut Rng, len: u64, granularity: u64) -> u64 {
        let near = match rng.below(4) {
            0 => rng.below(4) * LEAF_CHUNKS * granularity,
            1 => rng.below(len / granularity + 2) * granularity,
            2 => len,
            _ => return rng.below(len + 2),
        };
        (near + rng.below(5)).saturating_sub(2)
    }

    fn random_range(rng: &mut Rng, len: u64, granularity: u64) -> ByteRange {
        let (a, b) = (random_offset(rng, len, granularity), random_offset(rng, len, granularity));
        match rng.below(3) {
            0 => r(a.min(b), a.max(b)),
            1 => ByteRange::at_saturating(a, rng.below(granularity * 3)),
            _ => r(a.min(b), a.max(b)).align_outward(granularity),
        }
    }

    fn play(seed: u64, len: u64, granularity: u64, steps: u32) {
        let mut rng = Rng::new(seed);
        let (mut map, mut model) = (map(len, granularity), Model::new(len, granularity));
        for _ in 0..steps {
            match rng.below(20) {
                0 => {
                    map.set_all();
                    model.chunks.fill(true);
                }
                1 => {
                    map.clear_all();
                    model.chunks.fill(false);
                }
                2 => {
                    let other_granularity = granularity << rng.below(2);
                    let mut added = self::map(len, other_granularity);
                    for _ in 0..rng.below(4) {
                        let range = random_range(&mut rng, len, granularity);
                        added.set(range);
                        // A coarser map has marked more than was asked for.
                        if let Some(range) = range.intersect(ByteRange::first(len)) {
                            model.assign(range.align_outward(other_granularity), true);
                        }
                    }
                    assert_eq!(map.merge(&added), Ok(()));
                }
                3..11 => {
                    let range = random_range(&mut rng, len, granularity);
                    map.set(range);
                    model.assign(range, true);
                }
                _ => {
                    let range = random_range(&mut rng, len, granularity);
                    map.clear(range);
                    model.assign(range, false);
                }
            }
            check_same(&map, &model, &mut rng);
        }
    }

    #[test]
    fn agrees_with_one_bool_a_chunk_on_small_disks() {
        for (seed, len) in [0, 1, 511, 512, 513, 1024, 5000, 65536, 100_001].into_iter().enumerate() {
            play(seed as u64, len, 512, 150);
            play(100 + seed as u64, len, 4096, 150);
        }
    }

    #[test]
    fn agrees_with_one_bool_a_chunk_across_leaves() {
        let leaf = LEAF_CHUNKS * 512;
        for (seed, len) in [leaf, leaf - 1, leaf + 1, 2 * leaf + 77_777, 3 * leaf].into_iter().enumerate() {
            play(200 + seed as u64, len, 512, 60);
        }
    }

    #[test]
    fn a_512_byte_disk_under_a_64k_chunk_is_512_bytes() {
        let mut map = map(512, 65536);
        map.set(r(100, 101));
        assert_eq!((map.dirty_bytes(), map.next_dirty(511, 0)), (512, Some(r(0, 512))));
        map.clear(r(1, 512));
        assert_eq!(map.dirty_bytes(), 512);
        map.clear(r(0, 511));
        assert_eq!(map.dirty_bytes(), 512);
        map.clear(r(0, 512));
        assert!(map.is_clean());
        map.set(r(512, 70_000));
        assert!(map.is_clean());
    }

    #[test]
    fn sixty_four_tebibytes_cost_almost_nothing_clean_or_dirty() {
        let mut map = map(64 * TIB + 1, 65536);
        assert!(map.heap_bytes() < 300 << 10, "{}", map.heap_bytes());
        map.set_all();
        assert_eq!(map.dirty_bytes(), 64 * TIB + 1);
        assert_eq!(map.next_dirty(0, u64::MAX), Some(r(0, 64 * TIB + 1)));
        assert!(map.heap_bytes() < 300 << 10, "{}", map.heap_bytes());
        // A copy that works its way through, and guests that write behind and ahead of it.
        for step in 0..20_000 {
            let at = step * (1 << 30);
            map.clear(ByteRange::at_saturating(at, 1 << 30));
            if step % 100 == 0 {
                map.set(ByteRange::at_saturating(step * 7919 % (64 << 30), 4096));
                assert_eq!(map.next_dirty(at + (1 << 30), 1 << 20).map(|run| run.len()), Some(1 << 20));
            }
        }
        check_invariants(&map);
        assert!(map.heap_bytes() < 2 << 20, "{}", map.heap_bytes());
        map.clear(ByteRange::ALL);
        assert!(map.is_clean() && map.next_dirty_wrapping(5, 5).is_none());
        assert!(map.heap_bytes() < 320 << 10, "{}", map.heap_bytes());
    }

    #[test]
    fn a_range_that_goes_back_and_forth_keeps_its_box() {
        let mut map = map(TIB, 65536);
        map.set(r(0, 1));
        let held = map.heap_bytes();
        for _ in 0..10 {
            map.clear(r(0, 65536));
            assert!(map.is_clean());
            map.set(r(0, 1));
            assert_eq!((map.heap_bytes(), map.spare.len()), (held, 0));
        }
    }

    #[test]
    fn impossible_maps_are_refused() {
        for granularity in [0, 1, 256, 513, 3 << 20, 128 << 20] {
            assert_eq!(DirtyMap::new(1, granularity).err(), Some(DirtyMapError::Granularity { granularity }));
        }
        for (len, granularity) in [(u64::MAX, 64 << 20), (DISK_LEN_MAX, 512)] {
            let error = DirtyMapError::TooLarge { len, granularity };
            assert_eq!(DirtyMap::new(len, granularity).err(), Some(error));
        }
        let mut largest = map(DISK_LEN_MAX, 64 << 20);
        largest.set(r(DISK_LEN_MAX - 1, u64::MAX));
        assert_eq!(largest.dirty_bytes(), 64 << 20);
        let mut own = map(512, 512);
        assert_eq!(own.merge(&map(513, 512)), Err(DirtyMapError::OtherLength { own: 512, other: 513 }));
    }
}
