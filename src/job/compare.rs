//! Comparing two disks that nobody writes.
//!
//! One walk asks both disks for holes; where both are known to be zero, nothing is read, and where one is, only the other
//! is read and looked at for anything else. On whose word that is believed, and when not, is [`grounds`](super::grounds)'s
//! business. Several steps are under way at once and end in any order; since they are
//! begun in order, the first difference is known when those below the lowest one found have ended.
//!
//! Where the disks are of different length, the longer one has to be zero beyond the end of the shorter one.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use blockferry_ring::Ring;
use blockferry_ring::sync::{Notify, join};

use super::convert::Tally;
use super::grounds::{Grounds, Way, way};
use crate::base::limits;
use crate::base::range::ByteRange;
use crate::base::zero::is_zero;
use crate::block::extent::status_of;
use crate::block::{BlockError, Driver, Extent};

/// Compares two disks.
#[derive(Debug)]
pub struct Comparer {
    ring: Ring,
    disks: [Rc<dyn Driver>; 2],
    end: u64,
    /// Look at what is zero by the disks' own word, too: QEMU's strict mode.
    strict: bool,
    cursor: Cell<u64>,
    grounds: Cell<Grounds>,
    /// Others are believed when they claim that there are zeroes.
    trust: bool,
    tally: Option<Rc<Tally>>,
    /// Somebody asks for holes; told when that ends.
    asking: Cell<bool>,
    asked: Notify,
    /// The lowest offset at which contents differ.
    found: Cell<Option<u64>>,
    /// The lowest offset at which one disk says zero and the other does not.
    found_status: Cell<Option<u64>>,
    /// Which of the disks has failed, and how.
    failed: RefCell<Option<(usize, BlockError)>>,
    /// Given up from outside.
    stopped: Cell<bool>,
}

/// What there is to do about a piece.
#[derive(Clone, Copy, Debug)]
struct Piece {
    range: ByteRange,
    /// Which of the disks have to be read.
    read: [bool; 2],
}

impl Comparer {
    /// For two disks. Up to the end of the longer one is compared.
    pub fn new(ring: &Ring, a: &Rc<dyn Driver>, b: &Rc<dyn Driver>) -> Comparer {
        Comparer {
            ring: ring.clone(),
            disks: [a.clone(), b.clone()],
            end: a.len().max(b.len()),
            strict: false,
            cursor: Cell::new(0),
            grounds: Cell::default(),
            trust: false,
            tally: None,
            asking: Cell::new(false),
            asked: ring.notify(),
            found: Cell::new(None),
            found_status: Cell::new(None),
            failed: RefCell::new(None),
            stopped: Cell::new(false),
        }
    }

    /// Believes others who claim that there are zeroes.
    pub fn trusting(self, trust: bool) -> Comparer {
        Comparer { trust, ..self }
    }

    /// Compares no further than this.
    pub fn up_to(self, end: u64) -> Comparer {
        Comparer { end: end.min(self.end), ..self }
    }

    /// Looks at what the disks themselves call zero, too.
    pub fn strict(self, strict: bool) -> Comparer {
        Comparer { strict, ..self }
    }

    /// Adds what is compared to a tally as well.
    pub fn counting(self, tally: Rc<Tally>) -> Comparer {
        Comparer { tally: Some(tally), ..self }
    }

    /// Bytes that will be compared.
    pub fn len(&self) -> u64 {
        self.end
    }

    /// Nothing to compare.
    pub fn is_empty(&self) -> bool {
        self.end == 0
    }

    /// Bytes compared so far.
    pub fn compared(&self) -> u64 {
        self.grounds.get().total()
    }

    /// The same by what was known of them.
    pub fn grounds(&self) -> Grounds {
        self.grounds.get()
    }

    /// Where one disk says zero and the other does not, lowest first: only in strict mode.
    pub fn status_mismatch(&self) -> Option<u64> {
        self.found_status.get()
    }

    /// Ends the comparison early.
    pub fn stop(&self) {
        self.stopped.set(true);
    }

    /// Whether it was ended early.
    pub fn is_stopped(&self) -> bool {
        self.stopped.get()
    }

    /// Compares: the lowest offset at which the contents differ, if they do. Ends early at a difference.
    pub async fn run(&self) -> Result<Option<u64>, BlockError> {
        // As many as COMPARE_WORKERS.
        let four = || async { join(join(self.work(), self.work()), join(self.work(), self.work())).await };
        join(four(), four()).await;
        const { assert!(limits::COMPARE_WORKERS == 8) };
        // A difference below the place of an error is one, whatever the error says.
        match &*self.failed.borrow() {
            Some((_, error)) if self.found.get().is_none() => Err(error.clone()),
            _ => Ok(self.found.get()),
        }
    }

    /// Which of the two disks it was that failed, if one did.
    pub fn failed_disk(&self) -> Option<usize> {
        self.failed.borrow().as_ref().map(|(which, _)| *which)
    }

    fn is_over(&self) -> bool {
        self.stopped.get()
            || self.found.get().is_some()
            || self.found_status.get().is_some()
            || self.failed.borrow().is_some()
    }

    async fn work(&self) {
        loop {
            let piece = match self.next().await {
                Ok(Some(piece)) => piece,
                Ok(None) => return,
                Err(error) => return self.fail(error),
            };
            match self.compare(piece).await {
                Ok(None) => self.count(Way::Read(piece.read), piece.range.len()),
                Ok(Some(offset)) => lower(&self.found, offset),
                Err(error) => return self.fail(error),
            }
        }
    }

    fn fail(&self, failed: (usize, BlockError)) {
        self.failed.borrow_mut().get_or_insert(failed);
    }

    fn count(&self, way: Way, bytes: u64) {
        let mut grounds = self.grounds.get();
        grounds.note(way, bytes);
        self.grounds.set(grounds);
        if let Some(tally) = &self.tally {
            tally.compared.set(grounds);
        }
    }

    /// The next piece that has to be looked at.
    async fn next(&self) -> Result<Option<Piece>, (usize, BlockError)> {
        self.asked.until(|| (!self.asking.replace(true)).then_some(())).await;
        let result = self.walk().await;
        self.asking.set(false);
        self.asked.notify();
        result
    }

    async fn walk(&self) -> Result<Option<Piece>, (usize, BlockError)> {
        loop {
            let at = self.cursor.get();
            if at >= self.end || self.is_over() {
                return Ok(None);
            }
            let left = self.end - at;
            let (a, b) = join(self.status(0, at, left), self.status(1, at, left)).await;
            let (a, b) = (a.map_err(|error| (0, error))?, b.map_err(|error| (1, error))?);
            let len = a.len.min(b.len).clamp(1, left);
            let inside = at < self.disks[0].len().min(self.disks[1].len());
            if self.strict && inside && a.zero != b.zero {
                lower(&self.found_status, at);
                return Ok(None);
            }
            let read = match way([a, b], self.trust) {
                Way::Read(read) => read,
                known => {
                    self.cursor.set(at + len);
                    self.count(known, len);
                    continue;
                }
            };
            // Up to the end of a chunk of the disk, so that steps are aligned whatever the extents are.
            let chunk = limits::COMPARE_CHUNK_BYTES;
            let len = len.min(chunk - at % chunk);
            self.cursor.set(at + len);
            let range = ByteRange::at_saturating(at, len);
            return Ok(Some(Piece { range, read }));
        }
    }

    async fn status(&self, which: usize, at: u64, len: u64) -> Result<Extent, BlockError> {
        status_of(&*self.disks[which], at, len).await
    }

    /// The first offset at which the disks differ within a piece.
    async fn compare(&self, piece: Piece) -> Result<Option<u64>, (usize, BlockError)> {
        let (at, len) = (piece.range.start(), piece.range.len() as usize);
        let first = |different: Option<usize>| different.map(|n| at + n as u64);
        let inside = |disk: &Rc<dyn Driver>| at.saturating_add(len as u64) <= disk.len();
        match piece.read {
            [true, true] if self.disks.iter().all(inside) => {
                // One after the other: nobody who has one buffer waits for somebody who has the other.
                let both = self.ring.arena().freed().until(|| {
                    let a = self.ring.arena().try_alloc(len)?;
                    Some((a, self.ring.arena().try_alloc(len)?))
                });
                let (a, b) = both.await;
                let ((a, from), (b, to)) = join(self.disks[0].read(at, a), self.disks[1].read(at, b)).await;
                from.map_err(|error| (0, error))?;
                to.map_err(|error| (1, error))?;
                let (a, b) = (a.as_slice(), b.as_slice());
                if a == b {
                    return Ok(None);
                }
                Ok(first(a.iter().zip(b).position(|(x, y)| x != y)))
            }
            read => {
                // Where one of them has ended only the other is there to be read.
                let which = usize::from(!read[0] || !inside(&self.disks[0]));
                let (buf, result) = self.disks[which].read(at, self.ring.alloc(len).await).await;
                result.map_err(|error| (which, error))?;
                let bytes = buf.as_slice();
                if is_zero(bytes) { Ok(None) } else { Ok(first(bytes.iter().position(|b| *b != 0))) }
            }
        }
    }
}

fn lower(place: &Cell<Option<u64>>, offset: u64) {
    place.set(Some(place.get().map_or(offset, |old| old.min(offset))));
}
