//! The sweep's hands: ask, read, write, relink, and put everything back when it is over.

use std::cell::Cell;
use std::rc::Rc;

use blockferry_ring::arena::BLOCK_MAX;
use blockferry_ring::{Buf, PooledFuture, Ring};

use super::Direction;
use super::machine::{Op, Outcome};
use crate::base::limits;
use crate::base::range::ByteRange;
use crate::base::zero::zero_runs;
use crate::block::{BlockError, Loan, Reserve};
use crate::graph::node::Hearing;
use crate::graph::peer::Zeroed;
use crate::job::body::Hands;
use crate::job::error::JobFailure;
use crate::job::lasting::Lasting;
use crate::job::mirror::machine::Copied;
use crate::job::plan::{What, plan};
use crate::job::policy::{Failed, find, is_displaced};

pub(super) struct Parts {
    pub ring: Ring,
    pub memory: Reserve,
    pub lasting: Lasting,
    /// The target's unit of allocation.
    pub unit: u64,
    pub len: u64,
    /// It hears of guests' reads, while it runs.
    pub hearing: Cell<Option<Hearing>>,
    pub direction: Rc<dyn Direction>,
}

/// The hands of a sweep.
pub(super) struct SweepHands(pub Rc<Parts>);

impl Hands<Op, Outcome> for SweepHands {
    fn perform(&self, op: Op) -> PooledFuture<'static, Outcome> {
        let parts = self.0.clone();
        let ring = self.0.ring.clone();
        // Each has a future of its own: one for all would be as large as the largest.
        match op {
            Op::Copy(range) => ring.boxed(async move {
                let mut done = Copied::default();
                let failed = parts.copy(range, &mut done).await.err();
                Outcome::Piece(range, What::Data, done, failed)
            }),
            Op::Zero(range) => ring.boxed(async move {
                let mut done = Copied::default();
                let failed = parts.make_zero(range, &mut done).await.err();
                Outcome::Piece(range, What::Zero, done, failed)
            }),
            Op::Status(range) => {
                ring.boxed(async move { Outcome::Status(parts.status(range).await.map_err(Failed::read)) })
            }
            other => ring.boxed(async move { parts.perform(other).await }),
        }
    }

    fn commit(&self, _pivot: bool) -> Result<(), JobFailure> {
        Ok(())
    }

    /// The layers are given back when the last operation has ended, which may be stuck: with what it holds.
    fn clean_up(&self, _forced: bool) {
        drop(self.0.hearing.take());
    }
}

impl Parts {
    async fn flush(&self) -> Result<(), Failed> {
        self.lasting.flush().await.map_err(Failed::write)
    }

    async fn perform(&self, op: Op) -> Outcome {
        match op {
            Op::Prepare => Outcome::Prepared(self.direction.prepare().await.map_err(Failed::write)),
            Op::Flush => match self.flush().await {
                Err(failed) => Outcome::Flushed(Err(failed)),
                Ok(()) => {
                    match find(self.direction.source().driver(), self.direction.target().driver()).await {
                        Err(failed) if is_displaced(&failed) => Outcome::Displaced(failed),
                        result => Outcome::Flushed(result),
                    }
                }
            },
            Op::FlushMeanwhile => Outcome::FlushedMeanwhile(self.flush().await),
            Op::Wish(range) => Outcome::Wished(self.wish(range).await),
            Op::Relink => {
                let result = self.direction.relink().await;
                if result.is_ok() {
                    self.direction.restore().await;
                }
                Outcome::Relinked(result)
            }
            Op::Restore => {
                self.direction.restore().await;
                Outcome::Restored
            }
            Op::Status(_) | Op::Copy(_) | Op::Zero(_) => unreachable!("these have futures of their own"),
        }
    }

    /// What is to be done from the start of `range` on.
    async fn status(&self, range: ByteRange) -> Result<Vec<(ByteRange, What)>, BlockError> {
        let mut extents: Vec<(ByteRange, What)> = Vec::new();
        let mut at = range.start();
        while at < range.end() && extents.len() < limits::SWEEP_EXTENTS_PER_QUESTION {
            let left = range.end() - at;
            let (len, what) = self.direction.what(at, left).await?;
            let piece = ByteRange::at_saturating(at, len.clamp(1, left));
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

    async fn copy(&self, range: ByteRange, done: &mut Copied) -> Result<(), (u64, Failed)> {
        let mut at = range.start();
        while at < range.end() {
            let wanted = (range.end() - at).min(BLOCK_MAX as u64) as usize;
            let Loan { buf, of_reserve } = self.memory.lend(wanted).await;
            let piece = ByteRange::at_saturating(at, buf.len() as u64);
            let result = self.copy_piece(piece, buf, done).await;
            self.memory.done(of_reserve).await;
            result.map_err(|failed| (at, failed))?;
            at = piece.end();
        }
        Ok(())
    }

    async fn copy_piece(&self, piece: ByteRange, buf: Buf, done: &mut Copied) -> Result<(), Failed> {
        let source = self.direction.source().driver();
        // Beyond the end of the source there are zeroes.
        let there = source.len().saturating_sub(piece.start()).min(buf.len() as u64) as usize;
        let (inside, mut outside) = buf.split_at(there);
        outside.fill_zero();
        let (inside, result) =
            if inside.is_empty() { (inside, Ok(())) } else { source.read(piece.start(), inside).await };
        result.map_err(Failed::read)?;
        let Ok(buf) = inside.unsplit(outside) else { unreachable!("the parts of one buffer join again") };
        let buf = buf.freeze();
        // A unit of the target is allocated or not: to leave out a part of it saves nothing.
        for run in zero_runs(buf.as_slice(), self.unit as usize) {
            let part = ByteRange::at_saturating(piece.start() + run.offset as u64, run.len as u64);
            if run.is_zero {
                self.make_zero(part, done).await.map_err(|(_, failed)| failed)?;
            } else {
                let bytes = buf.slice(run.offset, run.len);
                let result = self.direction.write(part.start(), bytes).await;
                result.map_err(Failed::write)?;
                done.data += part.len();
            }
        }
        Ok(())
    }

    async fn make_zero(&self, range: ByteRange, done: &mut Copied) -> Result<(), (u64, Failed)> {
        let (Zeroed { zeroed, skipped }, result) = self.direction.make_zero(range).await;
        done.zeroed += zeroed;
        done.skipped += skipped;
        result.map_err(|(at, error)| (at, Failed::write(error)))
    }

    /// What a guest has read is seen to at once, as far as there is something to do about it. Errors are left to the
    /// sweep, which comes by.
    async fn wish(&self, range: ByteRange) -> Copied {
        let mut done = Copied::default();
        let wide = range.align_outward(self.unit).split_at(self.len).0;
        let Ok(parts) = self.status(wide).await else { return done };
        for (part, what) in parts {
            let Some(part) = part.intersect(wide) else { break };
            let result = match what {
                What::Skip => Ok(()),
                What::Zero => self.make_zero(part, &mut done).await,
                What::Data => self.copy(part, &mut done).await,
            };
            if result.is_err() {
                break;
            }
        }
        done
    }
}
