//! What each block of a disk may hold, given the writes that were sent and answered.
//!
//! The promise that a disk makes is small: what was acknowledged stays until something newer replaces it. While writes
//! are in flight several contents are right at once, and so each block has a set of *candidates*, generations of which
//! any may be read:
//!
//! - a write becomes a candidate when it is sent;
//! - when it is acknowledged, it rules out every candidate that had ended before it was sent; what raced with it stays;
//! - a write that failed may have landed or not: it stays a candidate and rules out nothing; one whose answer never
//!   came may even land later, so nothing rules it out;
//! - a read may return whatever was a candidate at some moment between its start and its end.
//!
//! After a power cut less is promised: only what was durable rules anything out, that is a write with FUA when it is
//! acknowledged, any other when a flush that began after its acknowledgement has ended ([`Survival::PowerCut`]).
//!
//! Generation 0 stands for what was there before the run: where it is a candidate, everything is right. The load
//! generator keeps such a model while it runs, and a log of the run ([`super::ack_log`]) is replayed into one.

use std::collections::BTreeMap;

/// Blocks that a model covers at most; each takes 8 bytes once its neighbourhood was written.
pub const MODEL_BLOCKS_MAX: u64 = 1 << 27;
/// Blocks whose settled generations live in one allocation.
const LEAF_BLOCKS: usize = 4096;

/// What the disk has been through since the writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Survival {
    /// It kept running, or was stopped in an orderly way: what was acknowledged is there.
    Everything,
    /// It lost its caches: what was flushed is there.
    PowerCut,
}

/// How a write ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteEnd {
    /// It was acknowledged.
    Acknowledged {
        /// It was to be durable by itself.
        fua: bool,
    },
    /// It was answered with an error.
    Failed,
    /// No answer came, and none will.
    Unanswered,
}

/// What may be read.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Candidates(Vec<u64>);

impl Candidates {
    /// Whether a sector of that generation may be there.
    pub fn contains(&self, generation: u64) -> bool {
        self.0.contains(&generation)
    }

    /// Whether anything at all may be there, because the block was perhaps never written.
    pub fn is_anything(&self) -> bool {
        self.0.contains(&0)
    }

    /// The generations, in no particular order; 0 is what was there before the run.
    pub fn generations(&self) -> &[u64] {
        &self.0
    }
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    generation: u64,
    /// Moment at which it was sent.
    begun: u64,
    /// Moment at which it was answered.
    ended: Option<u64>,
    acknowledged: bool,
    /// It stays, in the sense of the model's [`Survival`].
    kept: bool,
    /// Moment at which another ruled it out; kept here as long as a read is under way that may have seen it.
    ruled_out: Option<u64>,
}

/// A block of which more than one thing is to be known.
#[derive(Clone, Debug, Default)]
struct OpenBlock {
    candidates: Vec<Candidate>,
    readers: u32,
}

/// A read under way.
#[derive(Debug)]
#[must_use = "the model waits for the end of the read"]
pub struct ReadTicket {
    block: u64,
    begun: u64,
}

/// The model of one disk, in blocks counted from 0.
#[derive(Clone, Debug)]
pub struct Model {
    survival: Survival,
    blocks: u64,
    /// The only candidate of each block that is not open, 0 where nothing was written.
    settled: Vec<Option<Box<[u64; LEAF_BLOCKS]>>>,
    open: BTreeMap<u64, OpenBlock>,
    /// Moments: every event has its own.
    now: u64,
    last_generation: u64,
}

impl Model {
    /// A model of `blocks` blocks (at most [`MODEL_BLOCKS_MAX`]; beyond that there is none) of unknown content.
    pub fn new(blocks: u64, survival: Survival) -> Option<Model> {
        if blocks > MODEL_BLOCKS_MAX {
            return None;
        }
        let leaves = (blocks as usize).div_ceil(LEAF_BLOCKS);
        Some(Model {
            survival,
            blocks,
            settled: vec![None; leaves],
            open: BTreeMap::new(),
            now: 0,
            last_generation: 0,
        })
    }

    /// Blocks covered.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// The generation of the write sent last, 0 before the first.
    pub fn last_generation(&self) -> u64 {
        self.last_generation
    }

    /// Blocks to which at least one write was sent, in order.
    pub fn written(&self) -> impl Iterator<Item = u64> + '_ {
        std::iter::successors(self.next_written(0), |block| self.next_written(block + 1))
    }

    /// The first block from `from` on to which at least one write was sent.
    pub fn next_written(&self, from: u64) -> Option<u64> {
        let mut block = from;
        while block < self.blocks {
            let leaf = block as usize / LEAF_BLOCKS;
            let leaf_end = (((leaf + 1) * LEAF_BLOCKS) as u64).min(self.blocks);
            // Whole leaves are skipped, so that a large disk with few writes is walked quickly.
            if self.settled[leaf].is_some() || self.open.range(block..leaf_end).next().is_some() {
                let found = (block..leaf_end).find(|block| self.is_written(*block));
                if found.is_some() {
                    return found;
                }
            }
            block = leaf_end;
        }
        None
    }

    fn is_written(&self, block: u64) -> bool {
        match self.open.get(&block) {
            Some(open) => open.candidates.iter().any(|candidate| candidate.generation != 0),
            None => self.settled_generation(block) != 0,
        }
    }

    /// A write is sent. Its generation is the next one.
    pub fn begin_write(&mut self, block: u64) -> u64 {
        let generation = self.last_generation + 1;
        self.begin_write_as(block, generation);
        generation
    }

    /// A write of a known generation, above all before it, is sent (replay).
    pub fn begin_write_as(&mut self, block: u64, generation: u64) {
        let begun = self.tick();
        self.last_generation = generation;
        self.open_block(block).candidates.push(Candidate {
            generation,
            begun,
            ended: None,
            acknowledged: false,
            kept: false,
            ruled_out: None,
        });
    }

    /// A write has ended.
    pub fn end_write(&mut self, block: u64, generation: u64, end: WriteEnd) {
        let now = self.tick();
        let power_cut = self.survival == Survival::PowerCut;
        let Some(open) = self.open.get_mut(&block) else { return };
        let Some(candidate) = open.candidates.iter_mut().find(|c| c.generation == generation) else { return };
        match end {
            WriteEnd::Unanswered => return,
            WriteEnd::Failed => candidate.ended = Some(now),
            WriteEnd::Acknowledged { fua } => {
                candidate.ended = Some(now);
                candidate.acknowledged = true;
                if fua || !power_cut {
                    open.keep(|c| c.generation == generation, now);
                }
            }
        }
        self.settle(block);
    }

    /// A flush is sent: the moment to give to [`Model::end_flush`].
    pub fn begin_flush(&mut self) -> u64 {
        self.tick()
    }

    /// A flush that was sent at `begun` has succeeded.
    pub fn end_flush(&mut self, begun: u64) {
        let now = self.tick();
        if self.survival == Survival::Everything {
            return;
        }
        let touched: Vec<u64> = self.open.keys().copied().collect();
        for block in touched {
            if let Some(open) = self.open.get_mut(&block) {
                open.keep(|c| c.acknowledged && c.ended.is_some_and(|ended| ended < begun), now);
            }
            self.settle(block);
        }
    }

    /// A read of a block is sent.
    pub fn begin_read(&mut self, block: u64) -> ReadTicket {
        let begun = self.tick();
        self.open_block(block).readers += 1;
        ReadTicket { block, begun }
    }

    /// The read has ended: what it may have seen.
    pub fn end_read(&mut self, ticket: ReadTicket) -> Candidates {
        let Some(open) = self.open.get_mut(&ticket.block) else { return Candidates::default() };
        open.readers -= 1;
        let seen = |c: &&Candidate| c.ruled_out.is_none_or(|moment| moment > ticket.begun);
        let generations = open.candidates.iter().filter(seen).map(|c| c.generation).collect();
        self.settle(ticket.block);
        Candidates(generations)
    }

    /// What a block may hold now.
    pub fn candidates(&self, block: u64) -> Candidates {
        match self.open.get(&block) {
            Some(open) => {
                let current = open.candidates.iter().filter(|c| c.ruled_out.is_none());
                Candidates(current.map(|c| c.generation).collect())
            }
            None => Candidates(vec![self.settled_generation(block)]),
        }
    }

    fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    fn settled_generation(&self, block: u64) -> u64 {
        let leaf = self.settled.get(block as usize / LEAF_BLOCKS);
        leaf.and_then(Option::as_ref).map_or(0, |leaf| leaf[block as usize % LEAF_BLOCKS])
    }

    fn open_block(&mut self, block: u64) -> &mut OpenBlock {
        let generation = self.settled_generation(block);
        self.open.entry(block).or_insert_with(|| OpenBlock {
            candidates: vec![Candidate {
                generation,
                begun: 0,
                ended: Some(0),
                acknowledged: true,
                kept: true,
                ruled_out: None,
            }],
            readers: 0,
        })
    }

    /// Drops what nobody can see any more, and closes the block when one candidate is left that stays.
    fn settle(&mut self, block: u64) {
        let Some(open) = self.open.get_mut(&block) else { return };
        if open.readers > 0 {
            return;
        }
        open.candidates.retain(|c| c.ruled_out.is_none());
        if let [Candidate { generation, kept: true, .. }] = open.candidates[..] {
            self.open.remove(&block);
            // A block that was never written leaves no trace.
            let leaf = &mut self.settled[block as usize / LEAF_BLOCKS];
            if generation != 0 || leaf.is_some() {
                leaf.get_or_insert_with(|| Box::new([0; LEAF_BLOCKS]))[block as usize % LEAF_BLOCKS] =
                    generation;
            }
        }
    }
}

impl OpenBlock {
    /// Those that `which` picks stay; what had ended before one of them was sent is ruled out.
    fn keep(&mut self, which: impl Fn(&Candidate) -> bool, now: u64) {
        let mut newest_begun = 0;
        for candidate in self.candidates.iter_mut().filter(|c| which(c)) {
            candidate.kept = true;
            newest_begun = newest_begun.max(candidate.begun);
        }
        for candidate in &mut self.candidates {
            let over = candidate.ended.is_some_and(|ended| ended < newest_begun);
            if over && candidate.ruled_out.is_none() {
                candidate.ruled_out = Some(now);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::rng::Rng;

    const ACK: WriteEnd = WriteEnd::Acknowledged { fua: false };

    fn sorted(candidates: Candidates) -> Vec<u64> {
        let mut generations = candidates.0;
        generations.sort_unstable();
        generations
    }

    fn model(survival: Survival) -> Model {
        Model::new(10_000, survival).expect("small")
    }

    #[test]
    fn an_acknowledged_write_replaces_what_was_there() {
        let mut model = model(Survival::Everything);
        assert!(model.candidates(3).is_anything());
        let first = model.begin_write(3);
        assert_eq!(sorted(model.candidates(3)), [0, 1]);
        model.end_write(3, first, ACK);
        assert_eq!(sorted(model.candidates(3)), [1]);
        let second = model.begin_write(3);
        model.end_write(3, second, ACK);
        assert_eq!(sorted(model.candidates(3)), [2]);
        assert_eq!(model.written().collect::<Vec<_>>(), [3]);
        assert!(model.open.is_empty());
    }

    #[test]
    fn writes_that_race_may_land_in_either_order() {
        let mut model = model(Survival::Everything);
        let (a, b) = (model.begin_write(0), model.begin_write(0));
        model.end_write(0, b, ACK);
        assert_eq!(sorted(model.candidates(0)), [a, b]);
        model.end_write(0, a, ACK);
        assert_eq!(sorted(model.candidates(0)), [a, b]);
        let c = model.begin_write(0);
        model.end_write(0, c, ACK);
        assert_eq!(sorted(model.candidates(0)), [c]);
    }

    #[test]
    fn failed_and_unanswered_writes_may_be_there() {
        let mut model = model(Survival::Everything);
        let a = model.begin_write(9);
        model.end_write(9, a, ACK);
        let b = model.begin_write(9);
        model.end_write(9, b, WriteEnd::Failed);
        assert_eq!(sorted(model.candidates(9)), [a, b]);
        let c = model.begin_write(9);
        model.end_write(9, c, WriteEnd::Unanswered);
        let d = model.begin_write(9);
        model.end_write(9, d, ACK);
        assert_eq!(sorted(model.candidates(9)), [c, d], "what never ended may land at any time");
    }

    #[test]
    fn a_read_sees_what_was_there_at_some_moment_of_it() {
        let mut model = model(Survival::Everything);
        let a = model.begin_write(1);
        model.end_write(1, a, ACK);
        let early = model.begin_read(1);
        let b = model.begin_write(1);
        model.end_write(1, b, ACK);
        let late = model.begin_read(1);
        assert_eq!(sorted(model.candidates(1)), [b]);
        assert_eq!(sorted(model.end_read(late)), [b]);
        assert_eq!(sorted(model.end_read(early)), [a, b]);
        let quiet = model.begin_read(5);
        assert!(model.end_read(quiet).is_anything());
        assert!(model.open.is_empty());
        assert_eq!(model.written().collect::<Vec<_>>(), [1]);
    }

    #[test]
    fn a_power_cut_leaves_what_was_flushed() {
        let mut model = model(Survival::PowerCut);
        let a = model.begin_write(2);
        model.end_write(2, a, ACK);
        assert_eq!(sorted(model.candidates(2)), [0, a], "in a cache");
        let flush = model.begin_flush();
        let b = model.begin_write(2);
        model.end_write(2, b, ACK);
        model.end_flush(flush);
        assert_eq!(sorted(model.candidates(2)), [a, b], "the flush began before the second write ended");
        let c = model.begin_write(2);
        model.end_write(2, c, WriteEnd::Acknowledged { fua: true });
        assert_eq!(sorted(model.candidates(2)), [c]);
        assert!(model.open.is_empty());
    }

    #[test]
    fn a_disk_too_large_has_no_model() {
        assert!(Model::new(MODEL_BLOCKS_MAX + 1, Survival::Everything).is_none());
        assert!(Model::new(MODEL_BLOCKS_MAX, Survival::Everything).is_some());
    }

    /// A disk that keeps its promises, with writes that take effect at any moment between start and end, is never
    /// accused; and each kind of breach is, sooner or later.
    #[test]
    fn an_honest_disk_is_never_accused_and_a_forgetful_one_is() {
        let run = |seed: u64, forgets: bool| -> bool {
            let mut rng = Rng::new(seed);
            let mut model = Model::new(4, Survival::Everything).expect("small");
            let mut disk = [0u64; 4];
            let mut writes: Vec<(u64, u64, bool)> = Vec::new();
            let mut reads: Vec<(ReadTicket, u64, Option<u64>)> = Vec::new();
            for _ in 0..2000 {
                let block = rng.below(4);
                match rng.below(6) {
                    0 if writes.len() < 5 => writes.push((block, model.begin_write(block), false)),
                    1 if reads.len() < 5 => reads.push((model.begin_read(block), block, None)),
                    2 | 3 if !writes.is_empty() => {
                        let at = rng.below(writes.len() as u64) as usize;
                        if !writes[at].2 {
                            writes[at].2 = true;
                            let lost = forgets && rng.chance(6000);
                            if !lost {
                                disk[writes[at].0 as usize] = writes[at].1;
                            }
                        } else {
                            let (block, generation, _) = writes.swap_remove(at);
                            model.end_write(block, generation, ACK);
                        }
                    }
                    _ if !reads.is_empty() => {
                        let at = rng.below(reads.len() as u64) as usize;
                        if reads[at].2.is_none() {
                            reads[at].2 = Some(disk[reads[at].1 as usize]);
                        } else {
                            let (ticket, _, seen) = reads.swap_remove(at);
                            let allowed = model.end_read(ticket);
                            if !allowed.is_anything() && !allowed.contains(seen.unwrap_or(0)) {
                                return false;
                            }
                        }
                    }
                    _ => {}
                }
            }
            true
        };
        assert!((0..300).all(|seed| run(seed, false)));
        let caught = (0..300).filter(|&seed| !run(seed, true)).count();
        assert!(caught > 250, "{caught} of 300");
    }
}
