//! A guest that never stops: several connections write, each into its own blocks, and remember what was
//! acknowledged.
//!
//! What a block holds is a function of its offset and of the version that was written, so a content tells
//! whether it is the last acknowledged one, an older one, or rubbish. A connection has one request under
//! way, so at any end at most one write a connection has an unknown fate. Every eighth version is zeroes,
//! written as such. Between the writes each connection reads its blocks back and compares.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

use super::PATIENCE;
use super::image::{Dice, difference, pattern};
use super::nbd::Client;

/// Bytes of a block.
pub const BLOCK_BYTES: usize = 4096;
/// What disks write whole.
const SECTOR_BYTES: usize = 512;
/// Versions that are a multiple of this are zeroes.
const ZEROES_EVERY: u64 = 8;

/// What a block holds at `offset` in a version.
fn block(offset: u64, version: u64) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK_BYTES];
    if !version.is_multiple_of(ZEROES_EVERY) {
        pattern(offset, version, &mut bytes);
    }
    bytes
}

/// One write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Write {
    /// Where.
    pub offset: u64,
    /// The version, from 1.
    pub version: u64,
}

/// What one connection did.
#[derive(Clone, Debug, Default)]
pub struct Lane {
    /// Acknowledged, in order.
    pub acked: Vec<Write>,
    /// On its way when the connection was lost.
    pub unanswered: Option<Write>,
}

/// What all connections did.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// One a connection.
    pub lanes: Vec<Lane>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    /// The connections may be cut: that is no failure.
    may_lose: AtomicBool,
    acked: Mutex<u64>,
    grown: Condvar,
}

/// Connections that write.
#[derive(Debug)]
pub struct Writer {
    shared: Arc<Shared>,
    lanes: Vec<JoinHandle<Lane>>,
}

/// How to write.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The server's socket.
    pub socket: PathBuf,
    /// The export.
    pub export: String,
    /// The offsets of the blocks that may be written.
    pub blocks: Vec<u64>,
    /// Connections.
    pub lanes: usize,
    /// For the choice of blocks.
    pub seed: u64,
}

impl Plan {
    /// Four connections that write anywhere in the first `len` bytes.
    pub fn anywhere(socket: &Path, len: u64, seed: u64) -> Plan {
        let blocks = (0..len / BLOCK_BYTES as u64).map(|block| block * BLOCK_BYTES as u64).collect();
        Plan { socket: socket.to_owned(), export: "disk".into(), blocks, lanes: 4, seed }
    }
}

impl Writer {
    /// Connects, then writes on and on. `cut` is true if the server may go away.
    pub fn start(plan: &Plan, may_lose: bool) -> Writer {
        let shared = Arc::new(Shared { may_lose: AtomicBool::new(may_lose), ..Shared::default() });
        let lanes = (0..plan.lanes)
            .map(|lane| {
                let client = Client::connect(&plan.socket, &plan.export).expect("a connection");
                let blocks: Vec<u64> = plan.blocks.iter().copied().skip(lane).step_by(plan.lanes).collect();
                let dice = Dice::new(plan.seed.wrapping_mul(31) + lane as u64);
                let shared = shared.clone();
                std::thread::spawn(move || write_on(client, &blocks, dice, &shared))
            })
            .collect();
        Writer { shared, lanes }
    }

    /// Waits until so many more writes are acknowledged.
    pub fn wait_more(&self, writes: u64) {
        let acked = self.shared.acked.lock().expect("a lock");
        let wanted = *acked + writes;
        let wait = self.shared.grown.wait_timeout_while(acked, PATIENCE, |acked| *acked < wanted);
        let (acked, timeout) = wait.expect("a lock");
        assert!(!timeout.timed_out(), "writes stand still at {acked} of {wanted}");
    }

    /// Ends the writing between two requests, with a flush; or, if the server is gone, at once.
    pub fn stop(self) -> History {
        self.shared.stop.store(true, Ordering::SeqCst);
        let lanes = self.lanes.into_iter().map(|lane| lane.join().expect("a connection's thread"));
        History { lanes: lanes.collect() }
    }

    /// Waits until all connections are cut.
    pub fn cut(self) -> History {
        let lanes = self.lanes.into_iter().map(|lane| lane.join().expect("a connection's thread"));
        History { lanes: lanes.collect() }
    }
}

fn write_on(mut client: Client, blocks: &[u64], mut dice: Dice, shared: &Shared) -> Lane {
    let mut lane = Lane::default();
    let mut last = std::collections::BTreeMap::new();
    let mut version = 0;
    let lost = |error: std::io::Error, doing: &str| {
        let cut = matches!(
            error.kind(),
            ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe
        );
        assert!(cut && shared.may_lose.load(Ordering::SeqCst), "{doing}: {error}");
    };
    while !shared.stop.load(Ordering::SeqCst) {
        let offset = blocks[dice.below(blocks.len() as u64) as usize];
        if dice.below(4) == 0 {
            let Some(version) = last.get(&offset) else { continue };
            let mut bytes = vec![0; BLOCK_BYTES];
            if let Err(error) = client.read(offset, &mut bytes) {
                lost(error, "a read");
                return lane;
            }
            let wrong = difference(&bytes, &block(offset, *version));
            assert!(wrong.is_none(), "block {offset} is not what was acknowledged ({version})");
            continue;
        }
        version += 1;
        let write = Write { offset, version };
        let result = if version.is_multiple_of(ZEROES_EVERY) {
            client.write_zeroes(offset, BLOCK_BYTES as u32)
        } else {
            client.write(offset, &block(offset, version))
        };
        if let Err(error) = result {
            lane.unanswered = Some(write);
            lost(error, "a write");
            return lane;
        }
        last.insert(offset, version);
        lane.acked.push(write);
        *shared.acked.lock().expect("a lock") += 1;
        shared.grown.notify_all();
    }
    match client.flush() {
        Ok(()) => drop(client.disconnect()),
        Err(error) => lost(error, "a flush"),
    }
    lane
}

impl History {
    /// How many writes were acknowledged.
    pub fn acked(&self) -> usize {
        self.lanes.iter().map(|lane| lane.acked.len()).sum()
    }

    /// Applies every acknowledged write to an image.
    pub fn apply(&self, image: &mut [u8]) {
        for lane in &self.lanes {
            for write in &lane.acked {
                put(image, *write);
            }
        }
    }

    /// Applies every acknowledged write to an image in a file.
    pub fn apply_to_file(&self, path: &str) {
        use std::os::unix::fs::FileExt;
        let file = std::fs::OpenOptions::new().write(true).open(path).expect("a model");
        for write in self.lanes.iter().flat_map(|lane| &lane.acked) {
            file.write_all_at(&of(*write), write.offset).expect("a write to a model");
        }
    }

    /// Whether `image` is `base` with every acknowledged write, and with those of unknown fate wholly, partly
    /// or not at all.
    pub fn check(&self, base: &[u8], image: &[u8]) -> Result<(), String> {
        let mut model = base.to_vec();
        self.apply(&mut model);
        for write in self.lanes.iter().filter_map(|lane| lane.unanswered) {
            adopt(&mut model, image, write);
        }
        same(&model, image)
    }

    /// Whether `image` is `base` with, for each connection, all of its writes up to some moment, none after
    /// that: what a disk holds that was left at one instant.
    pub fn check_left(&self, base: &[u8], image: &[u8]) -> Result<(), String> {
        if base.len() != image.len() {
            return Err(format!("{} bytes instead of {}", image.len(), base.len()));
        }
        let mut model = base.to_vec();
        for lane in &self.lanes {
            let writes: Vec<Write> = lane.acked.iter().copied().chain(lane.unanswered).collect();
            // Connections write to blocks of their own, so each can be looked at alone: the model goes through
            // its writes one by one until no block of them differs from the image.
            let mut offsets: Vec<u64> = writes.iter().map(|write| write.offset).collect();
            offsets.sort_unstable();
            offsets.dedup();
            let differs = |model: &[u8], offset| get(model, offset) != get(image, offset);
            let mut different = offsets.iter().filter(|offset| differs(&model, **offset)).count();
            for write in &writes {
                if different == 0 {
                    break;
                }
                different -= usize::from(differs(&model, write.offset));
                put(&mut model, *write);
                different += usize::from(differs(&model, write.offset));
            }
        }
        same(&model, image)
    }
}

fn of(write: Write) -> Vec<u8> {
    block(write.offset, write.version)
}

fn get(image: &[u8], offset: u64) -> &[u8] {
    &image[offset as usize..][..BLOCK_BYTES]
}

fn put(image: &mut [u8], write: Write) {
    image[write.offset as usize..][..BLOCK_BYTES].copy_from_slice(&of(write));
}

/// Takes over from `image` those sectors of a write that were written.
fn adopt(model: &mut [u8], image: &[u8], write: Write) {
    let new = of(write);
    for (i, sector) in new.chunks(SECTOR_BYTES).enumerate() {
        let at = write.offset as usize + i * SECTOR_BYTES;
        if &image[at..at + SECTOR_BYTES] == sector {
            model[at..at + SECTOR_BYTES].copy_from_slice(sector);
        }
    }
}

fn same(model: &[u8], image: &[u8]) -> Result<(), String> {
    match difference(model, image) {
        None => Ok(()),
        Some(at) => Err(format!("differs from the model from offset {at} on (block {})", at / BLOCK_BYTES)),
    }
}
