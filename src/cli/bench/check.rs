//! Reading back what was written, and judging it.
//!
//! Blocks that were written are read in order, neighbours together, several reads in flight; each sector must be of a
//! generation that the model allows. What no model can judge (a block that perhaps was never written, because its only
//! write failed) is counted apart, so that "nothing wrong" never means "nothing looked at".

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use blockferry_ring::Ring;
use serde::Serialize;

use super::ack_log::AckLog;
use super::model::Model;
use super::pattern::find_stranger;
use super::target::Target;

/// Bytes read at once.
const READ_BYTES: u64 = 256 << 10;
/// Reads in flight.
const READS_IN_FLIGHT: u64 = 8;
/// Mismatches and failures that are told one by one.
const TOLD_MAX: usize = 16;

/// A place that holds something else than it may.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Mismatch {
    /// Offset of the sector on the disk, in bytes.
    pub offset: u64,
    /// What it holds.
    pub found: String,
    /// What it may hold.
    pub expected: String,
}

impl std::fmt::Display for Mismatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "At offset {}: {}; expected {}.", self.offset, self.found, self.expected)
    }
}

/// Mismatches, the first ones in full.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Mismatches {
    /// How many blocks were wrong.
    pub count: u64,
    /// The first ones.
    pub first: Vec<Mismatch>,
}

impl Mismatches {
    pub(super) fn add(&mut self, mismatch: Mismatch) {
        self.count += 1;
        if self.first.len() < TOLD_MAX {
            self.first.push(mismatch);
        }
    }
}

/// Errors, the first ones in full.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Failures {
    /// How many requests failed.
    pub count: u64,
    /// The first messages.
    pub first: Vec<String>,
}

impl Failures {
    pub(super) fn add(&mut self, message: String) {
        self.count += 1;
        if self.first.len() < TOLD_MAX {
            self.first.push(message);
        }
    }
}

/// What reading back found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct CheckReport {
    /// Blocks that hold what they may.
    pub verified: u64,
    /// Blocks of which nothing is known, because no write to them is certain to have happened.
    pub unknown: u64,
    /// Blocks that hold something else.
    pub mismatches: Mismatches,
    /// Reads that failed.
    pub failures: Failures,
}

impl CheckReport {
    /// Whether every block that was to be judged is right.
    pub fn is_good(&self) -> bool {
        self.mismatches.count == 0 && self.failures.count == 0
    }
}

/// What to read back, and how to judge it.
#[derive(Clone, Debug)]
pub struct Expectation {
    /// What each block may hold.
    pub model: Rc<Model>,
    /// Seed of the patterns.
    pub seed: u64,
    /// Offset of block 0 on the disk, in bytes.
    pub offset: u64,
    /// Bytes of a block.
    pub block_bytes: u32,
    /// The model may not know the latest writes: generations above its last are right, too.
    pub later_writes: bool,
}

impl Expectation {
    /// What a log promises.
    pub fn of_log(log: &AckLog) -> Expectation {
        let header = log.header();
        Expectation {
            model: Rc::new(log.model().clone()),
            seed: header.seed,
            offset: header.offset,
            block_bytes: header.block_bytes,
            later_writes: !log.is_complete(),
        }
    }

    fn place(&self, block: u64) -> u64 {
        self.offset + block * u64::from(self.block_bytes)
    }

    /// One past the last byte that is expected to exist.
    fn end(&self) -> u64 {
        self.place(self.model.blocks())
    }

    fn judge(&self, block: u64, bytes: &[u8]) -> Verdict {
        let candidates = self.model.candidates(block);
        if candidates.is_anything() {
            return Verdict::Unknown;
        }
        let last = self.model.last_generation();
        let allowed =
            |generation| candidates.contains(generation) || (self.later_writes && generation > last);
        match find_stranger(bytes, self.seed, self.place(block), allowed) {
            None => Verdict::Good,
            Some((offset, found)) => Verdict::Wrong(Mismatch {
                offset,
                found: found.to_string(),
                expected: expected(candidates.generations(), self.seed),
            }),
        }
    }
}

enum Verdict {
    Good,
    Unknown,
    Wrong(Mismatch),
}

/// The generations that are right, in words.
pub(super) fn expected(generations: &[u64], seed: u64) -> String {
    let mut generations = generations.to_vec();
    generations.sort_unstable();
    let list: Vec<String> = generations.iter().map(u64::to_string).collect();
    format!("write {} of the run with seed {seed}", list.join(" or "))
}

struct Check {
    expectation: Expectation,
    target: Target,
    next: Cell<u64>,
    report: RefCell<CheckReport>,
}

/// Reads every block to which a write was sent, and judges it.
pub async fn check_on(ring: &Ring, target: &Target, expectation: Expectation) -> CheckReport {
    let mut report = CheckReport::default();
    if target.len() < expectation.end() {
        report.failures.add(format!(
            "'{}' has {} bytes; the blocks to be checked reach up to {}.",
            target.name(),
            target.len(),
            expectation.end()
        ));
        return report;
    }
    let check = Rc::new(Check {
        expectation,
        target: target.clone(),
        next: Cell::new(0),
        report: RefCell::new(report),
    });
    let readers: Vec<_> = (0..READS_IN_FLIGHT)
        .map(|lane| ring.spawn_with_result(read_back(ring.clone(), check.clone(), lane as usize)))
        .collect();
    for reader in readers {
        reader.take().await;
    }
    check.report.take()
}

impl Check {
    /// The next blocks to read: the first, and how many.
    fn next(&self) -> Option<(u64, u64)> {
        let model = &self.expectation.model;
        let first = model.next_written(self.next.get())?;
        let most = (READ_BYTES / u64::from(self.expectation.block_bytes)).max(1);
        let mut count = 1;
        while count < most && model.next_written(first + count) == Some(first + count) {
            count += 1;
        }
        self.next.set(first + count);
        Some((first, count))
    }
}

async fn read_back(ring: Ring, check: Rc<Check>, lane: usize) {
    let lanes = check.target.lanes();
    let lane = &lanes[lane % lanes.len()];
    let block_bytes = check.expectation.block_bytes as usize;
    while let Some((first, count)) = check.next() {
        if lane.is_lost() {
            check.report.borrow_mut().failures.add("The connection is lost.".to_owned());
            return;
        }
        let buf = ring.alloc(count as usize * block_bytes).await;
        let (buf, result) = lane.driver().read(check.expectation.place(first), buf).await;
        let mut report = check.report.borrow_mut();
        if let Err(error) = result {
            report.failures.add(error.to_string());
            continue;
        }
        for (block, bytes) in (first..).zip(buf.as_slice().chunks_exact(block_bytes)) {
            match check.expectation.judge(block, bytes) {
                Verdict::Good => report.verified += 1,
                Verdict::Unknown => report.unknown += 1,
                Verdict::Wrong(mismatch) => report.mismatches.add(mismatch),
            }
        }
    }
}
