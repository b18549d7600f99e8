//! Verifying a mirror: both disks are read back and compared, while the source is in use.
//!
//! A map of what has yet to be compared begins full; it is a filter like the job's own tracker, so what
//! guests write is due again. [`Verifier::pass`] compares while guests go on: a difference found then
//! means nothing yet (the write may be on one disk and on its way to the other), the piece is due again.
//! At the end of the job, drained and flushed, what is still due is compared, and there a difference is
//! one. With it comes what was compared and may have changed since on the target alone: where changes were given up,
//! because its server hung, that may have been made after all. So the verdict holds at one instant, that of the drain, for every byte.
//!
//! The checksum is the BLAKE3 of the BLAKE3 of each MiB, so that a piece that was compared again changes
//! it without reading the rest.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use blockferry_ring::sync::join;
use blockferry_ring::{Buf, Errno, Nanos, Ring};

use crate::base::limits;
use crate::base::planted::{Bug, is_planted};
use crate::base::range::ByteRange;
use crate::block::{BlockError, Driver, Extent, Reserve};
use crate::graph::dirty::DirtyMapError;
use crate::graph::node::Filter;
use crate::graph::tracker::Tracker;
use crate::job::grounds::{Grounds, Way, way};
use crate::job::policy::{Failed, IoOperation};

/// Bytes of one piece: what one buffer holds.
const PIECE_BYTES: u64 = 1 << 20;

/// What a verification found.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Report {
    /// Bytes compared, holes included.
    pub bytes_compared: u64,
    /// The same by what was known of them.
    #[serde(flatten)]
    pub grounds: Grounds,
    /// How much of that was compared once more, because it had changed.
    pub bytes_compared_again: u64,
    /// BLAKE3 of the BLAKE3 of each MiB of both disks, in hexadecimal. Empty before the end.
    pub checksum: String,
    /// When it held, by the ring's clock.
    pub instant_ns: Nanos,
    /// Where the disks differ, if they do.
    pub mismatch: Option<u64>,
}

/// Compares source and target.
pub struct Verifier {
    ring: Ring,
    source: Rc<dyn Driver>,
    target: Rc<dyn Driver>,
    due: Rc<Tracker>,
    hashes: RefCell<Vec<blake3::Hash>>,
    cursor: Cell<u64>,
    grounds: Cell<Grounds>,
    /// Others are believed when they claim that there are zeroes.
    trust: Cell<bool>,
    instant_ns: Cell<Nanos>,
    checksum: RefCell<String>,
    mismatch: Cell<Option<u64>>,
    memory: [Reserve; 2],
}

impl std::fmt::Debug for Verifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Verifier").field("due", &self.due).finish_non_exhaustive()
    }
}

impl Verifier {
    /// For a copy of `source` to `target`. Takes 32 bytes of memory a MiB of disk.
    pub fn new(
        ring: &Ring,
        source: &Rc<dyn Driver>,
        target: &Rc<dyn Driver>,
    ) -> Result<Rc<Verifier>, DirtyMapError> {
        let len = source.len();
        let due = Tracker::new(ring, len, PIECE_BYTES, None, ring.notify())?;
        due.set_all();
        let pieces = len.div_ceil(PIECE_BYTES) as usize;
        Ok(Rc::new(Verifier {
            ring: ring.clone(),
            source: source.clone(),
            target: target.clone(),
            due,
            hashes: RefCell::new(vec![blake3::Hash::from_bytes([0; 32]); pieces]),
            cursor: Cell::new(0),
            grounds: Cell::default(),
            trust: Cell::new(false),
            instant_ns: Cell::new(0),
            checksum: RefCell::default(),
            mismatch: Cell::new(None),
            memory: std::array::from_fn(|_| Reserve::empty(ring, limits::RESERVE_BYTES)),
        }))
    }

    /// Believes others who claim that there are zeroes.
    pub fn trust_holes(&self) {
        self.trust.set(true);
    }

    /// Bytes of the disk that are compared, and of how many. What changes meanwhile is due again.
    pub fn progress(&self) -> (u64, u64) {
        let len = self.source.len();
        (len.saturating_sub(self.due.dirty_bytes()), len)
    }

    /// Bytes compared so far, those that were compared again counted again.
    fn compared(&self) -> u64 {
        self.grounds.get().total()
    }

    /// Sets memory aside. A verifier without it may have to wait for guests in the end.
    pub(super) async fn reserve(&self) {
        for memory in &self.memory {
            memory.fill().await;
        }
    }

    /// The filter that makes due what guests write.
    pub(super) fn filter(&self) -> Rc<dyn Filter> {
        self.due.clone()
    }

    /// Compares everything that is due while guests go on, until little is left.
    pub async fn pass(&self) -> Result<(), Failed> {
        // A guest that writes as fast as this reads must not keep it going for ever.
        let most = 2 * self.source.len() + limits::VERIFY_LEFT_BYTES;
        let stop = || self.due.dirty_bytes() <= limits::VERIFY_LEFT_BYTES || self.compared() >= most;
        self.workers(&stop, false).await
    }

    /// There a change that was given up may have landed after all, whenever these ranges were compared.
    pub(super) fn doubt(&self, ranges: &[ByteRange]) {
        if !is_planted(Bug::LateWriteNotCompared) {
            let len = self.source.len();
            let within = |range: &ByteRange| range.intersect(ByteRange::at_saturating(0, len));
            ranges.iter().filter_map(within).for_each(|range| self.due.set(range));
        }
    }

    /// Compares what is still due. The source is drained and the target flushed.
    pub(super) async fn finish(&self) -> Result<(), Failed> {
        self.workers(&|| self.mismatch.get().is_some(), true).await?;
        if let Some(offset) = self.mismatch.get() {
            let text = format!("Verifying failed: source and target differ at offset {offset}");
            return Err(Failed { operation: IoOperation::Write, errno: Errno::EIO, text });
        }
        let mut all = blake3::Hasher::new();
        for hash in self.hashes.borrow().iter() {
            all.update(hash.as_bytes());
        }
        *self.checksum.borrow_mut() = all.finalize().to_hex().to_string();
        self.instant_ns.set(self.ring.clock());
        Ok(())
    }

    /// What was found.
    pub fn report(&self) -> Report {
        Report {
            bytes_compared: self.compared(),
            grounds: self.grounds.get(),
            bytes_compared_again: self.compared().saturating_sub(self.source.len()),
            checksum: self.checksum.borrow().clone(),
            instant_ns: self.instant_ns.get(),
            mismatch: self.mismatch.get(),
        }
    }

    async fn workers(&self, stop: &dyn Fn() -> bool, last: bool) -> Result<(), Failed> {
        let two = join(self.worker(stop, last), self.worker(stop, last));
        let more = join(self.worker(stop, last), self.worker(stop, last));
        let ((a, b), (c, d)) = join(two, more).await;
        a.and(b).and(c).and(d)
    }

    async fn worker(&self, stop: &dyn Fn() -> bool, last: bool) -> Result<(), Failed> {
        while !stop() {
            let Some(piece) = self.due.peek(self.cursor.get(), PIECE_BYTES) else { break };
            self.due.claim(piece);
            self.cursor.set(piece.end());
            let result = self.compare(piece).await;
            let again = match &result {
                Ok(None) => None,
                Ok(Some(offset)) if last => {
                    self.mismatch.set(Some(self.mismatch.get().map_or(*offset, |old| old.min(*offset))));
                    Some(piece)
                }
                _ => Some(piece),
            };
            self.due.release(piece, again);
            result?;
        }
        Ok(())
    }

    /// The first offset at which the disks differ within a piece. Notes the piece's hash.
    async fn compare(&self, piece: ByteRange) -> Result<Option<u64>, Failed> {
        let len = piece.len() as usize;
        let (from, to) = join(self.status(&self.source, piece), self.status(&self.target, piece)).await;
        let way = way([from.map_err(Failed::read)?, to.map_err(Failed::write)?], self.trust.get());
        let mut grounds = self.grounds.get();
        grounds.note(way, piece.len());
        self.grounds.set(grounds);
        if let Way::Known(_) = way {
            let zeroes = blake3::hash(&ZEROES[..len]);
            self.note(piece, zeroes);
            return Ok(None);
        }
        let mut hasher = blake3::Hasher::new();
        let mut at = piece.start();
        while at < piece.end() {
            // Always in this order, so that nobody who has the one waits for somebody who has the other.
            let a = self.memory[0].lend((piece.end() - at) as usize).await;
            let b = self.memory[1].lend(a.buf.len()).await;
            let of_reserve = (a.of_reserve, b.of_reserve);
            let step = b.buf.len() as u64;
            let result = self.compare_step(at, a.buf.split_at(step as usize).0, b.buf, &mut hasher).await;
            self.memory[1].done(of_reserve.1).await;
            self.memory[0].done(of_reserve.0).await;
            if let Some(different) = result? {
                return Ok(Some(different));
            }
            at += step;
        }
        self.note(piece, hasher.finalize());
        Ok(None)
    }

    /// Compares what fits the buffers.
    async fn compare_step(
        &self,
        at: u64,
        a: Buf,
        b: Buf,
        hasher: &mut blake3::Hasher,
    ) -> Result<Option<u64>, Failed> {
        let ((a, from), (b, to)) = join(self.source.read(at, a), self.target.read(at, b)).await;
        from.map_err(Failed::read)?;
        to.map_err(Failed::write)?;
        let (a, b) = (a.as_slice(), b.as_slice());
        hasher.update(a);
        if a == b {
            return Ok(None);
        }
        let different = a.iter().zip(b).position(|(x, y)| x != y).unwrap_or(0);
        Ok(Some(at + different as u64))
    }

    /// What is known of a piece as a whole.
    async fn status(&self, driver: &Rc<dyn Driver>, piece: ByteRange) -> Result<Extent, BlockError> {
        let extent = driver.block_status(piece.start(), piece.len()).await?;
        Ok(if extent.len >= piece.len() { extent } else { Extent::data(piece.len()) })
    }

    fn note(&self, piece: ByteRange, hash: blake3::Hash) {
        if let Some(slot) = self.hashes.borrow_mut().get_mut((piece.start() / PIECE_BYTES) as usize) {
            *slot = hash;
        }
    }
}

static ZEROES: [u8; PIECE_BYTES as usize] = [0; PIECE_BYTES as usize];
