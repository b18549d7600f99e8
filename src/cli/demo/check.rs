//! The independent reader: every byte of the copy, read with plain file reads and compared with what has to be there.
//!
//! Nothing of the engine takes part: no ring, no node, no driver. What has to be there follows from what was on the disk
//! at first and from the load generators' logs of acknowledged writes, the newest log first: a block holds what its last
//! acknowledged write stored, or what raced with that; where a log leaves open whether it changed a block at all, the
//! older logs, and at last the first content, are right as well. Every sector is compared whole, noise included.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use super::super::bench::ack_log::AckLog;
use super::super::bench::pattern::{Content, SECTOR, identify};
use super::disk::{Disk, GENERATION};

/// Bytes of one read.
const READ_BYTES: usize = 1 << 20;
/// Parts of a disk that are read side by side: one thread does not keep a disk busy.
pub const PARTS: u64 = 4;
/// Differences that are told one by one.
const TOLD_MAX: usize = 8;

/// What has to be on a disk.
#[derive(Debug)]
pub struct Expectation {
    /// At first.
    pub disk: Disk,
    /// What was acknowledged since, oldest log first. All have the same blocks, from the start of the disk on.
    pub logs: Vec<AckLog>,
}

/// What the reader found.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct CheckReport {
    /// Bytes that were read and compared.
    pub bytes: u64,
    /// Blocks that hold a write of a client.
    pub blocks_written: u64,
    /// Blocks that hold what was there at first.
    pub blocks_first: u64,
    /// Blocks that were holes at first and read as zeroes.
    pub blocks_zero: u64,
    /// Blocks that hold something else.
    pub blocks_wrong: u64,
    /// The first differences, in words.
    pub differences: Vec<String>,
}

impl CheckReport {
    /// Adds what the reader of another part found.
    pub fn merge(&mut self, other: CheckReport) {
        self.bytes += other.bytes;
        self.blocks_written += other.blocks_written;
        self.blocks_first += other.blocks_first;
        self.blocks_zero += other.blocks_zero;
        self.blocks_wrong += other.blocks_wrong;
        self.differences.extend(other.differences);
        self.differences.truncate(TOLD_MAX);
    }

    /// Whether every byte is right.
    pub fn is_good(&self) -> bool {
        self.blocks_wrong == 0
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Written,
    First,
    Zero,
}

/// What a block may hold.
struct Allowed {
    /// Seeds and generations.
    stamps: Vec<(u64, u64)>,
    /// The first content, too.
    first: bool,
}

impl Expectation {
    fn allowed(&self, block: u64) -> Allowed {
        let mut allowed = Allowed { stamps: Vec::new(), first: true };
        for log in self.logs.iter().rev() {
            let candidates = log.expected(block);
            let seed = log.header().seed;
            let written = candidates.generations().iter().filter(|&&generation| generation != 0);
            allowed.stamps.extend(written.map(|&generation| (seed, generation)));
            if !candidates.is_anything() {
                allowed.first = false;
                break;
            }
        }
        allowed
    }

    /// Bytes of a block.
    fn block_bytes(&self) -> u64 {
        self.logs.first().map_or(4096, |log| log.header().block_bytes.into())
    }

    /// Judges the block at `offset`; a difference comes back as its sentence.
    fn judge(&self, offset: u64, bytes: &[u8]) -> Result<Verdict, String> {
        let allowed = self.allowed(offset / self.block_bytes());
        let mut verdict = Verdict::Zero;
        for (sector, at) in bytes.chunks(SECTOR).zip((offset..).step_by(SECTOR)) {
            let content = identify(sector);
            let right = match content {
                Content::Stamped(stamp) if stamp.offset == at => {
                    let first = (self.disk.seed, GENERATION);
                    let write = (stamp.seed, stamp.generation);
                    let written = allowed.stamps.contains(&write);
                    let is_first = write == first && allowed.first && !self.disk.is_hole(at);
                    verdict = if written { Verdict::Written } else { Verdict::First };
                    written || is_first
                }
                Content::Zeroes => allowed.first && self.disk.is_hole(at),
                _ => false,
            };
            if !right {
                return Err(format!("At offset {at} lies {content}, which should not be there."));
            }
        }
        Ok(verdict)
    }
}

/// Reads one of [`PARTS`] parts of the file and compares; together they are all of it. Gives up early, with an error,
/// when `stop` is set.
pub fn check(
    path: &Path,
    expectation: &Expectation,
    part: u64,
    stop: &AtomicBool,
) -> std::io::Result<CheckReport> {
    let file = std::fs::File::open(path)?;
    let disk = expectation.disk;
    let mut report = CheckReport::default();
    let len = file.metadata()?.len();
    if part == 0 && len != disk.bytes {
        report.blocks_wrong += 1;
        report.differences.push(format!("The copy has {len} bytes, the disk {}.", disk.bytes));
    }
    let block_bytes = expectation.block_bytes() as usize;
    let mut buf = vec![0; READ_BYTES.next_multiple_of(block_bytes)];
    let part_bytes = disk.bytes.div_ceil(PARTS).next_multiple_of(buf.len() as u64);
    let mut offset = part * part_bytes;
    let end = (offset + part_bytes).min(disk.bytes).min(len);
    while offset < end {
        if stop.load(Ordering::Relaxed) {
            return Err(std::io::ErrorKind::Interrupted.into());
        }
        let wanted = (buf.len() as u64).min(end - offset) as usize;
        file.read_exact_at(&mut buf[..wanted], offset)?;
        report.bytes += wanted as u64;
        for block in buf[..wanted].chunks(block_bytes) {
            match expectation.judge(offset, block) {
                Ok(Verdict::Written) => report.blocks_written += 1,
                Ok(Verdict::First) => report.blocks_first += 1,
                Ok(Verdict::Zero) => report.blocks_zero += 1,
                Err(difference) => {
                    report.blocks_wrong += 1;
                    if report.differences.len() < TOLD_MAX {
                        report.differences.push(difference);
                    }
                }
            }
            offset += block.len() as u64;
        }
    }
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::super::super::bench::model::Survival;
    use super::super::super::bench::pattern::fill;
    use super::*;

    const BLOCK: u64 = 4096;
    const DISK: Disk = Disk { bytes: 32 << 20, seed: 5 };

    fn log(seed: u64, records: &str) -> AckLog {
        let header = format!(
            r#"{{"log":"blockferry-bench","version":1,"seed":{seed},"offset":0,"block_bytes":4096,"blocks":8192}}"#
        );
        AckLog::read(format!("{header}\n{records}").as_bytes(), "a log", Survival::Everything).unwrap()
    }

    fn block(seed: u64, number: u64, generation: u64) -> Vec<u8> {
        let mut bytes = vec![0; BLOCK as usize];
        fill(&mut bytes, seed, number * BLOCK, generation);
        bytes
    }

    #[test]
    fn a_block_holds_its_last_write() {
        let hole = 3 << 10;
        let expectation = Expectation {
            disk: DISK,
            logs: vec![
                log(7, "[\"write\",1,1]\n[\"ack\",1]\n[\"write\",2,2]\n[\"ack\",2]\n[\"end\"]\n"),
                log(8, "[\"write\",2,1]\n[\"ack\",1]\n[\"write\",4,2]\n[\"fail\",2]\n[\"end\"]\n"),
            ],
        };
        let judge = |number: u64, bytes: &[u8]| expectation.judge(number * BLOCK, bytes);
        assert_eq!(judge(0, &block(5, 0, 1)), Ok(Verdict::First));
        assert_eq!(judge(1, &block(7, 1, 1)), Ok(Verdict::Written));
        assert_eq!(judge(2, &block(8, 2, 1)), Ok(Verdict::Written));
        assert_eq!(judge(hole, &[0; BLOCK as usize]), Ok(Verdict::Zero));
        // Whether the failed write landed is open.
        assert_eq!(judge(4, &block(8, 4, 2)), Ok(Verdict::Written));
        assert_eq!(judge(4, &block(5, 4, 1)), Ok(Verdict::First));
        for (number, wrong, what) in [
            (1, block(5, 1, 1), "a lost write"),
            (2, block(7, 2, 2), "an older write"),
            (0, block(5, 1, 1), "another block"),
            (0, block(7, 0, 1), "a write that nobody sent"),
            (0, vec![0; BLOCK as usize], "zeroes for data"),
            (hole, block(5, hole, 1), "data for a hole"),
        ] {
            assert!(judge(number, &wrong).is_err(), "{what}");
        }
        let mut torn = block(7, 1, 1);
        torn[600] ^= 1;
        assert!(judge(1, &torn).unwrap_err().contains("damaged remains"), "no lone bit goes unseen");
    }

    #[test]
    fn a_whole_file_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("copy");
        let mut bytes = vec![0; DISK.bytes as usize];
        for (number, chunk) in bytes.chunks_mut(BLOCK as usize).enumerate() {
            if !DISK.is_hole(number as u64 * BLOCK) {
                fill(chunk, DISK.seed, number as u64 * BLOCK, GENERATION);
            }
        }
        let expectation = Expectation { disk: DISK, logs: vec![log(7, "[\"end\"]\n")] };
        let go_on = AtomicBool::new(false);
        let look = || {
            (0..PARTS).fold(CheckReport::default(), |mut sum, part| {
                sum.merge(check(&path, &expectation, part, &go_on).unwrap());
                sum
            })
        };
        std::fs::write(&path, &bytes).unwrap();
        let good = look();
        assert!(good.is_good(), "{good:?}");
        assert_eq!((good.bytes, good.blocks_first, good.blocks_zero), (DISK.bytes, 6144, 2048));
        bytes[DISK.bytes as usize - 1] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(look().blocks_wrong, 1);
        std::fs::write(&path, &bytes[..bytes.len() - 512]).unwrap();
        assert_eq!(look().blocks_wrong, 1, "cut short");
        assert!(check(&path, &expectation, 1, &AtomicBool::new(true)).is_err());
    }
}
