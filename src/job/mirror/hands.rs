//! The mirror's hands: reads the source, writes the target, drains, marks, pivots.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use blockferry_ring::arena::BLOCK_MAX;
use blockferry_ring::sync::{Either, either, join, join_all};
use blockferry_ring::{Buf, Errno, PooledFuture, Ring, SharedBuf};

use super::machine::{Copied, Op, Outcome};
use super::verify::Verifier;
use crate::base::limits;
use crate::base::planted::{Bug, is_planted};
use crate::base::range::ByteRange;
use crate::base::zero::zero_runs;
use crate::block::{BlockError, Driver, Holds, IoFuture, IoResult, Loan, Reserve};
use crate::graph::chain::held_by;
use crate::graph::node::{Child, Drained, Filter, Node};
use crate::graph::peer::Peer;
use crate::graph::tracker::Tracker;
use crate::job::body::Hands;
use crate::job::error::JobFailure;
use crate::job::lasting::Lasting;
use crate::job::offload::CopyOffload;
use crate::job::policy::{Failed, find, is_displaced};
use crate::job::progress::Progress;
use crate::job::tail::zero_rest_of_sector;
use crate::job::writable::Writable;
use crate::protocol::mark::TargetMark;

/// Says on the target that it is not complete, and takes that back.
pub trait Marker: std::fmt::Debug {
    /// Durable when it returns.
    fn mark(&self) -> IoFuture<'_, IoResult>;
    /// What the mark says of a target that is complete: nothing, or that it is no copy. Durable when it returns.
    fn unmark(&self) -> IoFuture<'_, IoResult>;
    /// Notes on a mark that is set how far the job is: `done` bytes of `of`.
    fn note(&self, done: u64, of: u64) -> IoFuture<'_, IoResult>;
}

impl Marker for TargetMark {
    fn mark(&self) -> IoFuture<'_, IoResult> {
        self.ring().boxed(self.set())
    }

    fn unmark(&self) -> IoFuture<'_, IoResult> {
        self.ring().boxed(self.complete())
    }

    fn note(&self, done: u64, of: u64) -> IoFuture<'_, IoResult> {
        self.ring().boxed(TargetMark::note(self, done, of))
    }
}

pub(super) struct Parts {
    pub ring: Ring,
    pub memory: Reserve,
    pub source: Rc<Child>,
    pub source_node: Rc<Node>,
    /// The target's use, for as long as the job has it. Guests' writes to both sides hold on to it as well.
    pub target: Rc<RefCell<Option<Rc<Child>>>>,
    pub target_node: Rc<Node>,
    pub tracker: Rc<Tracker>,
    pub peer: Rc<Peer>,
    pub lasting: Lasting,
    /// Copying without reading, for a source at rest.
    pub offload: CopyOffload,
    pub filter: Rc<dyn Filter>,
    pub drained: RefCell<Option<Drained>>,
    /// The job is over: a drain that succeeds from now on is nobody's.
    pub over: Cell<bool>,
    pub marker: Option<Box<dyn Marker>>,
    /// Says on the source that it is old.
    pub old_marker: RefCell<Option<TargetMark>>,
    /// The source's users use the target.
    pub pivoted: Cell<bool>,
    pub verifier: Option<Rc<Verifier>>,
    pub detect_zeroes: bool,
    pub granularity: u64,
    /// The layers whose data is copied, if not all of the source's.
    pub layers: Vec<Rc<Node>>,
    /// The target is the base of the source.
    pub base: Option<Writable>,
}

/// The hands of a mirror.
pub(super) struct MirrorHands(pub Rc<Parts>);

impl Hands<Op, Outcome> for MirrorHands {
    fn perform(&self, op: Op) -> PooledFuture<'static, Outcome> {
        let parts = self.0.clone();
        let ring = &self.0.ring;
        // Each has a future of its own: one for all would be as large as the largest, many KiB, more than the pool
        // keeps, and would be moved into place for every copy.
        match op {
            Op::Copy(range) => ring.boxed(async move { parts.copy(range).await }),
            Op::Zero(range) => ring.boxed(async move { parts.zero(range).await }),
            Op::Status(range) => ring.boxed(async move { parts.status(range).await }),
            Op::Mark => ring.boxed(async move { parts.mark().await }),
            Op::Unmark => ring.boxed(async move { parts.unmark().await }),
            Op::Scan => ring.boxed(async move { Outcome::Scanned(parts.scan().await.map_err(Failed::read)) }),
            Op::Flush => ring.boxed(async move { parts.flush().await }),
            Op::FlushBoth => ring.boxed(async move {
                let (outcome, ()) = join(parts.flush(), parts.clone().flush_source()).await;
                outcome
            }),
            Op::Find(progress) => ring.boxed(async move { parts.find(progress).await }),
            Op::FlushMeanwhile => ring.boxed(async move {
                let flushed = parts.peer.flushed(parts.lasting.flush().await);
                Outcome::FlushedMeanwhile(flushed.map_err(Failed::write))
            }),
            Op::Drain => ring.boxed(async move { parts.drain().await }),
            Op::Undrain => {
                parts.drained.borrow_mut().take();
                ring.boxed(async { Outcome::Undrained })
            }
            Op::Verify => ring.boxed(async move { parts.verify().await }),
        }
    }

    fn commit(&self, pivot: bool) -> Result<(), JobFailure> {
        if pivot {
            self.0.pivot()?;
            self.0.pivoted.set(true);
        }
        Ok(())
    }

    fn committed(&self) -> Option<PooledFuture<'static, ()>> {
        self.0.leave();
        let marker = self.0.old_marker.borrow_mut().take().filter(|_| self.0.pivoted.get())?;
        Some(self.0.ring.boxed(self.0.clone().mark_as_old(marker)))
    }

    fn clean_up(&self, forced: bool) {
        self.0.leave();
        // A base is read by the guests of the source; after a pivot, which no cancel takes back, they are on the target.
        if forced && self.0.base.is_none() && !self.0.pivoted.get() {
            self.0.target_node.driver().fail_in_flight();
        }
    }
}

impl Parts {
    fn from(&self) -> &Rc<dyn Driver> {
        self.source_node.driver()
    }

    fn to(&self) -> &Rc<dyn Driver> {
        self.target_node.driver()
    }

    async fn mark(&self) -> Outcome {
        let mark = async {
            if let Some(marker) = &self.marker {
                marker.mark().await?;
            }
            zero_rest_of_sector(self.to(), self.from().len()).await
        };
        Outcome::Marked(mark.await.map_err(Failed::write))
    }

    async fn unmark(&self) -> Outcome {
        Outcome::Unmarked(match &self.marker {
            Some(marker) => marker.unmark().await.map_err(Failed::write),
            None => Ok(()),
        })
    }

    /// Flushes the target; what is said after that is about a target that is there, and a source as it was.
    async fn flush(&self) -> Outcome {
        match self.peer.flushed(self.lasting.flush().await) {
            Err(error) => Outcome::Flushed(Err(Failed::write(error))),
            Ok(()) if is_planted(Bug::TargetNotLookedFor) => Outcome::Flushed(Ok(())),
            Ok(()) => match find(self.from(), self.to()).await {
                Err(failed) if is_displaced(&failed) => Outcome::Displaced(failed),
                result => Outcome::Flushed(result),
            },
        }
    }

    async fn find(&self, progress: Option<Progress>) -> Outcome {
        if let Err(error) = self.lasting.check() {
            return Outcome::Displaced(Failed::write(error));
        }
        if let (Some(marker), Some(progress)) = (&self.marker, progress)
            && let Err(error) = marker.note(progress.offset(), progress.len()).await
        {
            tracing::info!(%error, "how far the job is could not be noted on the mark");
        }
        match find(self.from(), self.to()).await {
            Err(failed) if is_displaced(&failed) => Outcome::Displaced(failed),
            // What cannot be told now is asked again in a while, and at the end.
            _ => Outcome::Found,
        }
    }

    async fn drain(&self) -> Outcome {
        match self.source.node().drain(limits::DRAIN_NANOS_MAX).await {
            Ok(drained) => {
                // Given up meanwhile, with operations in flight that hold this: the door must not wait for them.
                if !self.over.get() {
                    self.drained.replace(Some(drained));
                }
                Outcome::Drained(true)
            }
            Err(_) => Outcome::Drained(false),
        }
    }

    /// What guests have written to the source and not flushed is written out, tables of images too: it is left behind as
    /// it is now. A source that fails or hangs keeps nobody from leaving it: that is told, and what hangs goes on by
    /// itself, which keeps the job's use of the source.
    async fn flush_source(self: Rc<Parts>) {
        let ring = self.ring.clone();
        let parts = self.clone();
        let flushed = ring.spawn_with_result(async move {
            if let Err(error) = parts.from().flush().await {
                tracing::warn!(%error, "the disk that is left behind may lack what was written to it last");
            }
        });
        let enough = ring.sleep(limits::OLD_DISK_FLUSH_NANOS_MAX);
        if let Either::Second(()) = either(flushed.take(), enough).await {
            tracing::info!("the flush of the disk that is left behind takes long; nobody waits for it");
        }
    }

    /// Guests of the source, or of the target after a pivot, go on without the job. Done twice, it is done once.
    fn leave(&self) {
        self.tracker.end();
        self.source.node().remove_filter(&self.filter);
        if let Some(verifier) = &self.verifier {
            self.source.node().remove_filter(&verifier.filter());
        }
        self.over.set(true);
        let drained = self.drained.borrow_mut().take();
        drop(drained);
    }

    /// Says on the source, which clients have left, that it is old. The job's use of the source is kept until that can be
    /// seen, so that no other job comes between with a mark of its own; it is made durable after that, by itself. What
    /// hangs is not waited for: it keeps the use.
    async fn mark_as_old(self: Rc<Parts>, marker: TargetMark) {
        let ring = self.ring.clone();
        let seen = ring.one_shot();
        let end = seen.clone();
        ring.spawn(async move {
            let result = marker.set_soon().await;
            drop(self);
            end.give(());
            let result = match result {
                Ok(()) => marker.settle().await,
                error => error,
            };
            if let Err(error) = result {
                tracing::warn!(%error, "the old disk could not be marked: nothing on it says that clients have left it");
            }
        });
        if let Either::Second(()) = either(seen.take(), ring.sleep(limits::OLD_DISK_MARK_NANOS_MAX)).await {
            tracing::warn!(
                "to mark the disk that is left behind takes long; it counts as used until that is done"
            );
        }
    }

    async fn verify(&self) -> Outcome {
        Outcome::Verified(match &self.verifier {
            Some(verifier) => {
                verifier.doubt(&self.peer.doubts());
                verifier.finish().await
            }
            None => Ok(()),
        })
    }

    async fn status(&self, range: ByteRange) -> Outcome {
        let status = self.from().block_status(range.start(), range.len()).await;
        Outcome::Status(range, status.map_err(Failed::read))
    }

    /// Makes dirty what the layers hold, data and zeroes. What guests change meanwhile is dirty by their own doing.
    async fn scan(&self) -> Result<(), BlockError> {
        let len = self.from().len();
        let mut at = 0;
        while at < len && !self.over.get() {
            let held = held_by(&self.layers, at, len - at).await?;
            let range = ByteRange::at_saturating(at, held.len.clamp(1, len - at));
            if held.holds() != Holds::Nothing {
                self.tracker.set(range);
            }
            at = range.end();
            self.ring.yield_now().await;
        }
        Ok(())
    }

    async fn copy(&self, range: ByteRange) -> Outcome {
        let mut done = Copied::default();
        let mut at = range.start();
        if self.source.node().client_count() == 0 && self.offload.is_worth_trying() {
            self.peer.will_change(range);
            let result = self.offload.copy(self.from(), self.to(), range).await;
            match self.peer.changed(range, result) {
                Ok(len) => {
                    done.shared = len;
                    at += len;
                }
                Err(error) => return Outcome::Piece(range, done, Some((at, Some(Failed::write(error))))),
            }
        }
        while at < range.end() {
            let wanted = (range.end() - at).min(BLOCK_MAX as u64) as usize;
            let Loan { buf, of_reserve } = self.memory.lend(wanted).await;
            let piece = ByteRange::at_saturating(at, buf.len() as u64);
            let result = self.copy_piece(piece, buf, &mut done).await;
            self.memory.done(of_reserve).await;
            if let Err(failed) = result {
                return Outcome::Piece(range, done, Some((at, Some(failed))));
            }
            at = piece.end();
        }
        Outcome::Piece(range, done, None)
    }

    async fn copy_piece(&self, piece: ByteRange, buf: Buf, done: &mut Copied) -> Result<(), Failed> {
        let (buf, result) = self.from().read(piece.start(), buf).await;
        result.map_err(Failed::read)?;
        let buf = buf.freeze();
        if !self.detect_zeroes {
            return self.write(piece.start(), buf, done).await;
        }
        let runs = zero_runs(buf.as_slice(), self.granularity.clamp(4096, 65_536) as usize);
        // Data goes out at once: a piece takes as long as one write, however many there are in it.
        let (mut first, mut more) = (None, Vec::new());
        for run in runs {
            let (offset, len) = (piece.start() + run.offset as u64, run.len);
            if run.is_zero {
                let zero = self.make_zero(ByteRange::at_saturating(offset, len as u64), done).await;
                zero.map_err(|(_, failed)| failed)?;
            } else if first.is_none() {
                first = Some((offset, buf.slice(run.offset, len)));
            } else {
                let (data, peer) = (buf.slice(run.offset, len), &self.peer);
                more.push((len as u64, self.ring.boxed(async move { peer.write(offset, data).await })));
            }
        }
        let Some((offset, data)) = first else { return Ok(()) };
        if more.is_empty() {
            return self.write(offset, data, done).await;
        }
        let (lens, writes): (Vec<u64>, Vec<_>) = more.into_iter().unzip();
        let (first, others) = join(self.write(offset, data, done), join_all(writes)).await;
        first?;
        for (len, result) in lens.into_iter().zip(others) {
            result.map_err(Failed::write)?;
            done.data += len;
        }
        Ok(())
    }

    async fn write(&self, offset: u64, buf: SharedBuf, done: &mut Copied) -> Result<(), Failed> {
        let len = buf.len() as u64;
        self.peer.write(offset, buf).await.map_err(Failed::write)?;
        done.data += len;
        Ok(())
    }

    /// Makes a range of the target zero; what is known to be zero, or says so, is left alone.
    async fn make_zero(&self, range: ByteRange, done: &mut Copied) -> Result<(), (u64, Failed)> {
        let (zeroed, result) = self.peer.make_zero(range, true).await;
        done.zeroed += zeroed.zeroed;
        done.skipped += zeroed.skipped;
        result.map_err(|(at, error)| (at, Failed::write(error)))
    }

    async fn zero(&self, range: ByteRange) -> Outcome {
        let mut done = Copied::default();
        let mut at = range.start();
        while at < range.end() {
            let left = range.end() - at;
            // Asked again now that the piece is claimed: a change from here on makes it dirty again.
            let extent = match self.from().block_status(at, left).await {
                Ok(extent) => extent,
                Err(error) => return Outcome::Piece(range, done, Some((at, Some(Failed::read(error))))),
            };
            if !extent.zero {
                return Outcome::Piece(range, done, Some((at, None)));
            }
            let len = extent.len.clamp(1, left);
            if let Err((from, failed)) = self.make_zero(ByteRange::at_saturating(at, len), &mut done).await {
                return Outcome::Piece(range, done, Some((from, Some(failed))));
            }
            at += len;
        }
        Outcome::Piece(range, done, None)
    }

    /// Lets the source's users use the target instead. Locks first; a refusal changes nothing.
    fn pivot(&self) -> Result<(), JobFailure> {
        let refused = |error: BlockError| JobFailure::with_text(error.errno, error.to_string());
        let source = self.source.node();
        let Some(using) = self.target.borrow().clone() else {
            return Err(JobFailure::from_errno(Errno::EPERM));
        };
        let mut drained = self.drained.borrow_mut();
        if drained.is_none() && is_planted(Bug::NoDrainBeforePivot) {
            *drained = Some(source.shut());
        }
        let Some(drained) = &*drained else {
            return Err(JobFailure::with_text(Errno::EPERM, "The source was not drained before the pivot"));
        };
        source.pivot_to(&self.target_node, &using, drained).map_err(refused)?;
        self.base.iter().for_each(Writable::hand_over);
        Ok(())
    }
}
