//! The conversion's hands: ask, read, share, compress, write, flush, mark.

use std::cell::Cell;
use std::rc::Rc;

use blockferry_ring::arena::BLOCK_MAX;
use blockferry_ring::{Buf, PooledFuture, Ring, SharedBuf};

use super::machine::{Op, Outcome};
use super::{Compressor, TargetState};
use crate::base::limits;
use crate::base::range::ByteRange;
use crate::base::zero::{is_zero, zero_runs};
use crate::block::{BlockError, Driver, Extent, Holds, IoResult, WriteFlags, ZeroFlags};
use crate::format::qcow2::Qcow2;
use crate::graph::node::{Child, Node};
use crate::job::body::Hands;
use crate::job::compare::Comparer;
use crate::job::error::JobFailure;
use crate::job::grounds::Grounds;
use crate::job::lasting::Lasting;
use crate::job::mirror::Marker;
use crate::job::mirror::machine::Copied;
use crate::job::offload::CopyOffload;
use crate::job::plan::{What, plan};
use crate::job::policy::{Failed, IoOperation, find, is_displaced};
use crate::job::tail::zero_rest_of_sector;

/// What was done by which means, beside the job's [`crate::job::body::Details`].
#[derive(Debug, Default)]
pub struct Tally {
    /// Bytes that were copied without being read.
    pub bytes_shared: Cell<u64>,
    /// Bytes that could not be read and count as zeroes.
    pub bytes_lost: Cell<u64>,
    /// Bytes of data whose clusters were compressed.
    pub bytes_compressed: Cell<u64>,
    /// Bytes compared, by what was known of them.
    pub compared: Cell<Grounds>,
    /// Where source and target differ, if they were found to.
    pub mismatch: Cell<Option<u64>>,
}

pub(super) struct Parts {
    pub ring: Ring,
    pub source: Rc<Node>,
    pub target: Rc<Node>,
    /// The job's use of both.
    pub _uses: [Rc<Child>; 2],
    pub lasting: Lasting,
    pub marker: Option<Box<dyn Marker>>,
    pub offload: CopyOffload,
    /// The target's unit of allocation.
    pub unit: u64,
    pub sparse_bytes: u64,
    pub target_state: TargetState,
    pub compressor: Option<Rc<dyn Compressor>>,
    pub salvage: bool,
    pub trust_holes: bool,
    pub tally: Rc<Tally>,
    /// A change of the target has failed: from then on nothing is taken for zero because it reads as zero.
    pub target_failed: Cell<bool>,
}

/// The hands of a conversion.
pub(super) struct ConvertHands(pub Rc<Parts>);

impl Hands<Op, Outcome> for ConvertHands {
    fn perform(&self, op: Op) -> PooledFuture<'static, Outcome> {
        let parts = self.0.clone();
        let ring = self.0.ring.clone();
        ring.boxed(async move { parts.perform(op).await })
    }

    fn commit(&self, _pivot: bool) -> Result<(), JobFailure> {
        Ok(())
    }

    fn clean_up(&self, forced: bool) {
        if forced {
            self.0.to().fail_in_flight();
        }
    }
}

fn add(cell: &Cell<u64>, n: u64) {
    cell.set(cell.get() + n);
}

impl Parts {
    fn from(&self) -> &Rc<dyn Driver> {
        self.source.driver()
    }

    fn to(&self) -> &Rc<dyn Driver> {
        self.target.driver()
    }

    async fn perform(&self, op: Op) -> Outcome {
        match op {
            Op::Mark => Outcome::Marked(self.mark().await.map_err(Failed::write)),
            Op::Unmark => Outcome::Unmarked(match &self.marker {
                Some(marker) => marker.unmark().await.map_err(Failed::write),
                None => Ok(()),
            }),
            Op::Status(range) => Outcome::Status(self.status(range).await.map_err(Failed::read)),
            Op::Share(range) => Outcome::Shared(range, self.share(range).await),
            Op::Copy(range) => {
                let mut done = Copied::default();
                let failed = self.copy(range, &mut done).await.err();
                Outcome::Piece(range, What::Data, done, failed)
            }
            Op::Zero(range) => {
                let mut done = Copied::default();
                let failed = self.make_zero(range, &mut done).await.err();
                Outcome::Piece(range, What::Zero, done, failed.map(|failed| (range.start(), failed)))
            }
            Op::Find => match self.lasting.check() {
                Err(error) => Outcome::Displaced(Failed::write(error)),
                Ok(()) => match self.ring.boxed(find(self.from(), self.to())).await {
                    Err(failed) if is_displaced(&failed) => Outcome::Displaced(failed),
                    // What cannot be told now is asked again in a while, and at the end.
                    _ => Outcome::Found,
                },
            },
            Op::Flush => match self.end().await {
                Err(error) => Outcome::Flushed(Err(Failed::write(error))),
                Ok(()) => match self.ring.boxed(find(self.from(), self.to())).await {
                    Err(failed) if is_displaced(&failed) => Outcome::Displaced(failed),
                    result => Outcome::Flushed(result),
                },
            },
            // In a future of its own: copies must not carry its size.
            Op::Verify => Outcome::Verified(self.ring.boxed(self.verify()).await),
        }
    }

    /// All is written: what is durable now is the whole copy, and nothing beside it.
    async fn end(&self) -> IoResult {
        if let Some(image) = self.to().as_any().and_then(|any| any.downcast_ref::<Qcow2>()) {
            image.cut_slack().await?;
        }
        self.lasting.flush().await
    }

    async fn mark(&self) -> IoResult {
        if let Some(marker) = &self.marker {
            marker.mark().await?;
        }
        match self.target_state {
            TargetState::Zero => Ok(()),
            _ => zero_rest_of_sector(self.to(), self.from().len()).await,
        }
    }

    /// What is in the source from the start of `range` on.
    async fn status(&self, range: ByteRange) -> Result<Vec<(ByteRange, What)>, BlockError> {
        let mut extents: Vec<(ByteRange, What)> = Vec::new();
        let mut at = range.start();
        while at < range.end() && extents.len() < limits::CONVERT_EXTENTS_PER_QUESTION {
            let left = range.end() - at;
            let extent = match self.from().block_status(at, left).await {
                Ok(extent) => extent,
                // What cannot even be asked for is read, as far as that goes.
                Err(_) if self.salvage => Extent::data(left.min(limits::CONVERT_CHUNK_BYTES)),
                Err(error) => return Err(error),
            };
            let mut len = extent.len.clamp(1, left);
            let what = match self.target_state {
                TargetState::Backed { source_backing_len, is_same, is_new }
                    if !extent.allocated && at < source_backing_len =>
                {
                    len = len.min(source_backing_len - at);
                    let shows_backing = is_same && (is_new || self.shows_backing(at, &mut len).await?);
                    if !shows_backing {
                        len = len.min(BLOCK_MAX as u64);
                    }
                    if shows_backing || self.shows_same(at, len).await? {
                        What::Skip
                    } else if extent.zero {
                        What::Zero
                    } else {
                        What::Data
                    }
                }
                _ if extent.zero => What::Zero,
                _ => What::Data,
            };
            let piece = ByteRange::at_saturating(at, len);
            at = piece.end();
            match extents.last_mut() {
                Some((last, known)) if *known == what => {
                    *last = ByteRange::at_saturating(last.start(), at - last.start());
                }
                _ => extents.push((piece, what)),
            }
        }
        Ok(plan(&extents, self.unit, range.end()))
    }

    /// Whether the target holds nothing of its own from `offset` on, for `len` bytes or as many of them as are alike.
    async fn shows_backing(&self, offset: u64, len: &mut u64) -> Result<bool, BlockError> {
        let Some(layer) = self.to().as_layer() else { return Ok(false) };
        let held = layer.holds(offset, *len).await?;
        *len = held.len.clamp(1, *len);
        Ok(held.holds() == Holds::Nothing)
    }

    /// Whether the target shows what the source shows already.
    async fn shows_same(&self, offset: u64, len: u64) -> Result<bool, BlockError> {
        let (one, result) = self.from().read(offset, self.ring.alloc(len as usize).await).await;
        match result {
            Ok(()) => {}
            Err(_) if self.salvage => return Ok(false),
            Err(error) => return Err(error),
        }
        let (other, result) = self.to().read(offset, self.ring.alloc(len as usize).await).await;
        result?;
        Ok(one.as_slice() == other.as_slice())
    }

    async fn share(&self, range: ByteRange) -> Result<u64, Failed> {
        let n = self.changed(self.offload.copy(self.from(), self.to(), range).await)?;
        add(&self.tally.bytes_shared, n);
        Ok(range.start() + n)
    }

    async fn copy(&self, range: ByteRange, done: &mut Copied) -> Result<(), (u64, Failed)> {
        if let Some(compressor) = &self.compressor {
            return self.copy_compressed(&**compressor, range, done).await;
        }
        for piece in range.chunks(BLOCK_MAX as u64) {
            let buf = self.ring.alloc(piece.len() as usize).await;
            self.copy_piece(piece, buf, done).await.map_err(|failed| (piece.start(), failed))?;
        }
        Ok(())
    }

    /// Each cluster by itself. The work of compressing is done on other threads, and several pieces are under way.
    async fn copy_compressed(
        &self,
        compressor: &dyn Compressor,
        range: ByteRange,
        done: &mut Copied,
    ) -> Result<(), (u64, Failed)> {
        for cluster in range.chunks(compressor.cluster_bytes()) {
            let at = cluster.start();
            // On the heap: a cluster may be larger than any buffer.
            let mut bytes = vec![0; cluster.len() as usize];
            for piece in cluster.chunks(BLOCK_MAX as u64) {
                let buf = self.ring.alloc(piece.len() as usize).await;
                let buf = self.read(piece, buf).await.map_err(|failed| (at, failed))?;
                let start = (piece.start() - at) as usize;
                buf.copy_to(0, &mut bytes[start..start + piece.len() as usize]);
            }
            // Who says not to look for zeroes has them compressed: they take next to nothing.
            if self.sparse_bytes > 0 && is_zero(&bytes) {
                self.make_zero(cluster, done).await.map_err(|failed| (at, failed))?;
                continue;
            }
            let written = compressor.write(at, bytes).await;
            self.changed(written).map_err(|failed| (at, failed))?;
            done.data += cluster.len();
            add(&self.tally.bytes_compressed, cluster.len());
        }
        Ok(())
    }

    async fn copy_piece(&self, piece: ByteRange, buf: Buf, done: &mut Copied) -> Result<(), Failed> {
        let buf = self.read(piece, buf).await?.freeze();
        if self.sparse_bytes == 0 {
            return self.write(piece.start(), buf, done).await;
        }
        // A unit of the target is allocated or not: to leave out a part of it saves nothing.
        let grain = self.sparse_bytes.max(self.unit).min(BLOCK_MAX as u64) as usize;
        for run in zero_runs(buf.as_slice(), grain) {
            let offset = piece.start() + run.offset as u64;
            if run.is_zero {
                self.make_zero(ByteRange::at_saturating(offset, run.len as u64), done).await?;
            } else {
                self.write(offset, buf.slice(run.offset, run.len), done).await?;
            }
        }
        Ok(())
    }

    /// Reads a piece of the source, or what can be read of it.
    async fn read(&self, piece: ByteRange, buf: Buf) -> Result<Buf, Failed> {
        let (mut buf, result) = self.from().read(piece.start(), buf).await;
        let Err(error) = result else { return Ok(buf) };
        if !self.salvage {
            return Err(Failed::read(error));
        }
        for part in piece.chunks(limits::SALVAGE_BYTES) {
            let small = self.ring.alloc(part.len() as usize).await;
            let (small, result) = self.from().read(part.start(), small).await;
            let at = (part.start() - piece.start()) as usize;
            match result {
                Ok(()) => buf.copy_from(at, small.as_slice()),
                Err(error) => {
                    tracing::warn!(%error, "what cannot be read counts as zeroes");
                    buf.as_mut_slice()[at..at + part.len() as usize].fill(0);
                    add(&self.tally.bytes_lost, part.len());
                }
            }
        }
        Ok(buf)
    }

    async fn write(&self, offset: u64, buf: SharedBuf, done: &mut Copied) -> Result<(), Failed> {
        let len = buf.len() as u64;
        self.changed(self.to().write(offset, buf, WriteFlags::default()).await)?;
        done.data += len;
        Ok(())
    }

    /// Makes a range of the target zero; what reads as zero already is left alone.
    async fn make_zero(&self, range: ByteRange, done: &mut Copied) -> Result<(), Failed> {
        if self.sparse_bytes == 0 {
            return self.write_zeroes_out(range, done).await;
        }
        let has_failed = self.target_failed.get() || self.offload.has_failed();
        if self.target_state == TargetState::Zero && !has_failed {
            done.skipped += range.len();
            return Ok(());
        }
        let mut at = range.start();
        while at < range.end() {
            let left = range.end() - at;
            let extent = self.to().block_status(at, left).await.map_err(Failed::write)?;
            let len = extent.len.clamp(1, left);
            if extent.is_surely_zero() && !has_failed {
                done.skipped += len;
            } else {
                let flags = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
                self.changed(self.to().write_zeroes(at, len, flags).await)?;
                done.zeroed += len;
            }
            at += len;
        }
        Ok(())
    }

    /// For a target that is to be allocated everywhere.
    async fn write_zeroes_out(&self, range: ByteRange, done: &mut Copied) -> Result<(), Failed> {
        if let Some(compressor) = &self.compressor {
            for cluster in range.chunks(compressor.cluster_bytes()) {
                let zeroes = vec![0; cluster.len() as usize];
                self.changed(compressor.write(cluster.start(), zeroes).await)?;
                done.zeroed += cluster.len();
                add(&self.tally.bytes_compressed, cluster.len());
            }
            return Ok(());
        }
        let mut buf = self.ring.alloc(range.len().min(BLOCK_MAX as u64) as usize).await;
        buf.as_mut_slice().fill(0);
        let buf = buf.freeze();
        for piece in range.chunks(BLOCK_MAX as u64) {
            let zeroes = buf.slice(0, piece.len() as usize);
            self.changed(self.to().write(piece.start(), zeroes, WriteFlags::default()).await)?;
            done.zeroed += piece.len();
        }
        Ok(())
    }

    fn changed<T>(&self, result: Result<T, BlockError>) -> Result<T, Failed> {
        result.map_err(|error| {
            self.target_failed.set(true);
            Failed::write(error)
        })
    }

    async fn verify(&self) -> Result<(), Failed> {
        let comparer = Comparer::new(&self.ring, self.from(), self.to());
        let comparer =
            comparer.up_to(self.from().len()).trusting(self.trust_holes).counting(self.tally.clone());
        match comparer.run().await {
            Ok(None) => Ok(()),
            Ok(Some(offset)) => {
                self.tally.mismatch.set(Some(offset));
                let text = format!("Verifying failed: source and target differ at offset {offset}");
                Err(Failed { operation: IoOperation::Write, errno: blockferry_ring::Errno::EIO, text })
            }
            Err(error) if comparer.failed_disk() == Some(1) => Err(Failed::write(error)),
            Err(error) => Err(Failed::read(error)),
        }
    }
}
