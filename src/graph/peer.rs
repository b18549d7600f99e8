//! The other side of a job's source: its target, as copies and guests' changes of both sides meet it.
//!
//! It remembers what of the target is known to be zero, so that nothing is zeroed twice: a target that began
//! as zeroes, what the job zeroed, what its own tables or a local filesystem say is a hole. And it remembers whether a change
//! of the target has ever failed. What a failed change left can be seen there and yet be durable or not,
//! whatever flush follows: from then on nothing is taken for zero because it reads as zero. And one that a server has not
//! answered may still be made, after newer ones: where that can happen has to be looked at in the very end
//! ([`Peer::doubts`]).
//!
//! Two operations on the same bytes exclude each other before they come here
//! ([`super::tracker`]); that is what makes the map true.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

use blockferry_ring::SharedBuf;

use super::dirty::{DirtyMap, DirtyMapError};
use crate::base::limits;
use crate::base::range::ByteRange;
use crate::block::patience::for_job;
use crate::block::{BlockError, Driver, IoResult, WriteFlags, ZeroFlags};

/// What the user said of the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerOptions {
    /// Bytes in a chunk of the map of zeroes.
    pub granularity: u64,
    /// All of it reads as zeroes.
    pub is_zero: bool,
    /// Zeroing may give space back.
    pub may_unmap: bool,
}

/// What came of a zeroing, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Zeroed {
    /// Made zero.
    pub zeroed: u64,
    /// Were zero already.
    pub skipped: u64,
}

/// What was made zero, and, if that failed, from where on and why.
pub type ZeroResult = (Zeroed, Result<(), (u64, BlockError)>);

/// See the module's documentation.
pub struct Peer {
    driver: Rc<dyn Driver>,
    /// Held until the last write has ended, whatever became of the job: its locks on the target.
    _keep: Rc<dyn Any>,
    /// Chunks that are not known to be zero.
    nonzero: RefCell<DirtyMap>,
    may_unmap: bool,
    has_failed: Cell<bool>,
    /// Where changes that failed may still land.
    doubts: RefCell<Vec<ByteRange>>,
}

impl std::fmt::Debug for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Peer")
            .field("driver", &self.driver.name())
            .field("has_failed", &self.has_failed.get())
            .finish_non_exhaustive()
    }
}

impl Peer {
    /// The target `driver`, of which `len` bytes are changed; `keep` is held as long as anything is under way on it.
    pub fn new(
        driver: Rc<dyn Driver>,
        len: u64,
        keep: Rc<dyn Any>,
        options: PeerOptions,
    ) -> Result<Peer, DirtyMapError> {
        let mut nonzero = DirtyMap::new(len, options.granularity)?;
        if !options.is_zero {
            nonzero.set_all();
        }
        Ok(Peer {
            driver,
            _keep: keep,
            nonzero: RefCell::new(nonzero),
            may_unmap: options.may_unmap,
            has_failed: Cell::new(false),
            doubts: RefCell::default(),
        })
    }

    /// The target's driver.
    pub fn driver(&self) -> &Rc<dyn Driver> {
        &self.driver
    }

    /// Writes all of `buf` at `offset`.
    pub async fn write(&self, offset: u64, buf: SharedBuf) -> IoResult {
        let range = ByteRange::at_saturating(offset, buf.len() as u64);
        self.nonzero.borrow_mut().set(range);
        self.changed(range, for_job(self.driver.write(offset, buf, WriteFlags::default())).await)
    }

    /// The range is about to be changed by other means.
    pub fn will_change(&self, range: ByteRange) {
        self.nonzero.borrow_mut().set(range);
    }

    /// Notes whether a change of the range went well.
    pub fn changed<T>(&self, range: ByteRange, result: Result<T, BlockError>) -> Result<T, BlockError> {
        if let Err(error) = &result {
            self.has_failed.set(true);
            if error.may_land_late() {
                self.doubt(range);
            }
        }
        result
    }

    /// Notes whether a flush went well: it may have written tables.
    pub fn flushed(&self, result: Result<(), BlockError>) -> Result<(), BlockError> {
        if self.has_tables() && result.as_ref().is_err_and(BlockError::may_land_late) {
            self.doubt(ByteRange::at_saturating(0, self.driver.len()));
        }
        result
    }

    /// Where changes that failed may still land, after newer ones.
    pub fn doubts(&self) -> Vec<ByteRange> {
        self.doubts.borrow().clone()
    }

    /// What fails may be a change of a table, which says where other data is.
    fn has_tables(&self) -> bool {
        self.driver.as_layer().is_some()
    }

    fn doubt(&self, range: ByteRange) {
        let range = if self.has_tables() { ByteRange::at_saturating(0, self.driver.len()) } else { range };
        let mut doubts = self.doubts.borrow_mut();
        let is_known = |known: &ByteRange| known.start() <= range.start() && range.end() <= known.end();
        if doubts.iter().any(is_known) {
            return;
        }
        doubts.push(range);
        if doubts.len() > limits::DOUBTS_MAX {
            let start = doubts.iter().map(|range| range.start()).min().unwrap_or(0);
            let end = doubts.iter().map(|range| range.end()).max().unwrap_or(0);
            *doubts = ByteRange::new(start, end).into_iter().collect();
        }
    }

    /// Makes a range zero, where it is not known to be so; with `may_unmap` space may be given back, if the user allows
    /// it at all.
    pub async fn make_zero(&self, range: ByteRange, may_unmap: bool) -> ZeroResult {
        let mut done = Zeroed::default();
        let mut at = range.start();
        while at < range.end() {
            let unknown = self.nonzero.borrow().next_dirty(at, range.end() - at);
            let from = unknown.map_or(range.end(), |run| run.start().clamp(at, range.end()));
            done.skipped += from - at;
            at = from;
            let Some(run) = unknown.filter(|_| at < range.end()) else { break };
            match self.zero_unknown(at, run.end().min(range.end()) - at, may_unmap, &mut done).await {
                Ok(len) => at += len,
                Err(error) => return (done, Err((at, error))),
            }
        }
        (done, Ok(()))
    }

    /// A part about which nothing is known: the target is asked, and zeroed unless its own tables or a filesystem here
    /// say that it is a hole; a server may say so of what it has lost sight of.
    async fn zero_unknown(
        &self,
        at: u64,
        left: u64,
        may_unmap: bool,
        done: &mut Zeroed,
    ) -> Result<u64, BlockError> {
        let extent = for_job(self.driver.block_status(at, left)).await?;
        let len = extent.len.clamp(1, left);
        if extent.is_surely_zero() && !self.has_failed.get() {
            done.skipped += len;
        } else {
            let flags = ZeroFlags { may_unmap: may_unmap && self.may_unmap, ..ZeroFlags::default() };
            let range = ByteRange::at_saturating(at, len);
            self.changed(range, for_job(self.driver.write_zeroes(at, len, flags)).await)?;
            done.zeroed += len;
        }
        self.nonzero.borrow_mut().clear(ByteRange::at_saturating(at, len));
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use blockferry_ring::sim::{FileModel, OpKind, World, WorldConfig};
    use blockferry_ring::{Config, Errno, Ring};

    use super::*;
    use crate::protocol::{OpenOptions, open};

    const PATH: &str = "/to";
    const CHUNK: u64 = 65_536;

    /// What a failed change left may be seen and yet not be durable: it is made zero, though it reads as zero.
    #[test]
    fn after_a_failed_change_nothing_is_zero_because_it_reads_so() {
        let world = World::new(WorldConfig::new(1));
        world.add_file(PATH, FileModel { mem_align: 512, ..FileModel::regular(4 * CHUNK) });
        let config = Config { arena_bytes: 1 << 20, ..Config::default() };
        let ring = Ring::with_backend(world.backend(), &config).expect("a ring");
        let r = ring.clone();
        ring.block_on(async move {
            let driver = open(&r, Path::new(PATH), &OpenOptions::default()).expect("a disk");
            let options = PeerOptions { granularity: CHUNK, is_zero: false, may_unmap: true };
            let peer = Peer::new(driver, 4 * CHUNK, Rc::new(()), options).expect("a peer");
            let chunk = |n: u64| ByteRange::at_saturating(n * CHUNK, CHUNK);
            let zero = async |n: u64| {
                let (zeroed, result) = peer.make_zero(chunk(n), true).await;
                result.expect("a zeroing");
                zeroed
            };
            let hole = Zeroed { zeroed: 0, skipped: CHUNK };
            assert_eq!(zero(0).await, hole);
            world.fail_nth(OpKind::Write, PATH, 1, Errno::EIO);
            let mut buf = r.alloc(512).await;
            buf.fill_zero();
            assert!(peer.write(CHUNK, buf.freeze()).await.is_err());
            let made = Zeroed { zeroed: CHUNK, skipped: 0 };
            assert_eq!(zero(1).await, made);
            assert_eq!(zero(2).await, made);
            // Known from before, and from now on.
            assert_eq!(zero(0).await, hole);
            assert_eq!(zero(2).await, hole);
        });
    }
}
