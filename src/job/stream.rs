//! Stream: fills a layer with what it shows of those below, until it needs them no longer.
//!
//! What the layers between `top` and `base`, without both, hold and `top` does not is copied into `top`; then `base` is
//! its backing file, or nothing is. Guests read and write the disk meanwhile. What they read is filled first.
//!
//! # Promises
//! * What guests see never changes: what is put into `top` is what is seen through it, and a guest that has written in the
//!   meantime has its way ([`Layer::populate`](crate::block::Layer::populate)).
//! * *completed*: `top` holds, durably, what it showed of the layers between; it records `base`, or no backing file. If
//!   another job has replaced the base meanwhile, it is the new one.
//! * *cancelled* or failed: the chain is as it was. What has been filled stays, and need not be filled again.
//! * A `top` that was open to be read only is so again afterwards.
//!
//! # A power cut
//! What is in `top` is durable before it records another backing file, which it does in one step.
//!
//! Semantics: QEMU's `block-stream` (qapi/block-core.json). What differs: many requests are in flight; data does not wait
//! in a guest's read: that is answered first, and filled then; `ignore` tries again, with a pause; a top that cannot be
//! written (its filesystem is full) is no failed read.

use std::rc::Rc;

use blockferry_ring::{Ring, SharedBuf};

use super::commit::go_back;
use super::event::JobType;
use super::plan::What;
use super::policy::Failed;
use super::runner::Job;
use super::sweep::{self, ChainError, Direction, Plan, SweepOptions};
use super::writable::Writable;
use crate::base::range::ByteRange;
use crate::block::{BlockError, Fill, Holds, IoFuture, Layer};
use crate::graph::chain::{held_by, name_for};
use crate::graph::node::{Node, Role};
use crate::graph::peer::{ZeroResult, Zeroed};

/// Down to where a stream fills its top.
#[derive(Clone, Debug, Default)]
pub enum Floor {
    /// Everything: no backing file is left.
    #[default]
    Whole,
    /// This layer is the backing file afterwards.
    Base(Rc<Node>),
    /// This layer is the lowest that is copied; what lies below it stays, whatever it is by then.
    Bottom(Rc<Node>),
}

/// Whether a stream makes sense: the places in the chain of the layer that is filled, and of the first that is not copied.
pub fn judge(
    front: &Rc<Node>,
    top: Option<&Rc<Node>>,
    floor: &Floor,
    options: &SweepOptions,
) -> Result<(usize, usize), ChainError> {
    let chain = front.chain();
    let top = top.unwrap_or(front);
    let position = |node: &Rc<Node>| {
        let found = chain.iter().position(|other| Rc::ptr_eq(node, other));
        found.ok_or_else(|| ChainError::NotInChain(node.name().to_owned()))
    };
    let from = position(top)?;
    // The first layer that is not copied.
    let to = match floor {
        Floor::Whole => chain.len(),
        Floor::Base(base) => position(base)?,
        Floor::Bottom(bottom) => position(bottom)? + 1,
    };
    if to <= from {
        let base = chain[to.min(chain.len() - 1)].name().to_owned();
        return Err(ChainError::Upside { base, top: top.name().to_owned() });
    }
    if top.driver().as_layer().is_none() {
        return Err(ChainError::NoLayer(top.name().to_owned()));
    }
    if to == chain.len() && options.backing_file.is_some() {
        return Err(ChainError::BackingFileForNone);
    }
    Ok((from, to))
}

/// Starts a stream into `top`, a layer of the chain below `front`, the node that guests use (`None`: `front` itself).
///
/// # Errors
/// Nothing has changed then: a job that uses one of the layers (`EBUSY`, with QEMU's text), a top that cannot be written,
/// names that make no sense.
pub async fn start(
    ring: &Ring,
    front: &Rc<Node>,
    top: Option<&Rc<Node>>,
    floor: Floor,
    options: SweepOptions,
) -> Result<Job, ChainError> {
    let chain = front.chain();
    let top = top.unwrap_or(front);
    let (from, to) = judge(front, Some(top), &floor, &options)?;
    let mids = chain[from + 1..to].to_vec();
    let mut uses = vec![top.attach_in_time(Role::JobTop("stream")).await?];
    for layer in &mids {
        uses.push(layer.attach_in_time(Role::JobSource("stream")).await?);
    }
    let top = Writable::hold(ring, top, uses, None).await?;
    // With nothing between, there is nothing to look for.
    let len = if mids.is_empty() { 0 } else { top.node().driver().len() };
    let direction = Rc::new(Up {
        ring: ring.clone(),
        front: front.clone(),
        top,
        whole: to == chain.len(),
        mids,
        backing_file: options.backing_file.clone(),
    });
    let plan = Plan {
        job_type: JobType::Stream,
        front: front.clone(),
        len,
        direction: direction.clone(),
        follows_reads: len > 0,
    };
    let started = sweep::start(ring, plan, &options).await;
    if started.is_err() {
        direction.restore().await;
    }
    started
}

/// Upwards: what the layers between hold goes into the top.
#[derive(Debug)]
struct Up {
    ring: Ring,
    front: Rc<Node>,
    top: Writable,
    /// No backing file is left at the end.
    whole: bool,
    mids: Vec<Rc<Node>>,
    backing_file: Option<String>,
}

impl Up {
    fn layer(&self) -> Result<&dyn Layer, BlockError> {
        self.top.node().driver().as_layer().ok_or_else(|| {
            let errno = blockferry_ring::Errno::EOPNOTSUPP;
            BlockError::new(crate::block::Operation::Write, self.top.node().driver().name(), errno)
        })
    }

    async fn look(&self, offset: u64, len: u64) -> Result<(u64, What), BlockError> {
        let own = self.layer()?.holds(offset, len).await?;
        if own.holds() != Holds::Nothing {
            return Ok((own.len, What::Skip));
        }
        let held = held_by(&self.mids, offset, own.len.clamp(1, len)).await?;
        let what = match held.holds() {
            Holds::Data => What::Data,
            // Without a backing file what is not held reads as zeroes.
            Holds::Zero if !self.whole => What::Zero,
            Holds::Zero | Holds::Nothing => What::Skip,
        };
        Ok((held.len, what))
    }

    /// In a drain: the top reads from its new backing file, and records it, durably.
    async fn link(&self) -> Result<(), Failed> {
        let _alone = self.front.relinking().await;
        let Some(bottom) = self.mids.last() else { return Ok(()) };
        let drained = sweep::drained(&self.front).await?;
        // As it is now: a commit may have replaced it.
        let base = if self.whole { None } else { bottom.below() };
        let name = base.as_ref().map(|base| match &self.backing_file {
            Some(name) => name.clone(),
            None => name_for(self.top.node(), bottom, base),
        });
        let record = match (&name, &base) {
            (Some(name), Some(base)) => Some((name.as_str(), base.driver().format())),
            _ => None,
        };
        // Whoever cannot have the top on the base says so before anything is written.
        let (top, before) = (self.top.node(), self.top.node().below());
        top.set_below(base.as_ref()).map_err(Failed::write)?;
        let recorded = self.layer().map_err(Failed::write)?.record_backing(record).await;
        if recorded.is_err() {
            go_back(top, before.as_ref());
        }
        drop(drained);
        recorded.map_err(Failed::write)
    }
}

impl Direction for Up {
    fn what(&self, offset: u64, len: u64) -> IoFuture<'_, Result<(u64, What), BlockError>> {
        self.ring.boxed(self.look(offset, len))
    }

    fn source(&self) -> &Rc<Node> {
        self.top.node()
    }

    fn target(&self) -> &Rc<Node> {
        self.top.node()
    }

    fn prepare(&self) -> IoFuture<'_, Result<(), BlockError>> {
        self.ring.boxed(async { Ok(()) })
    }

    fn write(&self, offset: u64, buf: SharedBuf) -> IoFuture<'_, Result<(), BlockError>> {
        self.ring.boxed(async move { self.layer()?.populate(offset, Fill::Data(buf)).await })
    }

    fn make_zero(&self, range: ByteRange) -> IoFuture<'_, ZeroResult> {
        self.ring.boxed(async move {
            if self.whole {
                return (Zeroed { zeroed: 0, skipped: range.len() }, Ok(()));
            }
            let (start, len) = (range.start(), range.len());
            let filled = async { self.layer()?.populate(start, Fill::Zeroes(len)).await };
            match filled.await {
                Ok(()) => (Zeroed { zeroed: len, skipped: 0 }, Ok(())),
                Err(error) => (Zeroed::default(), Err((start, error))),
            }
        })
    }

    fn relink(&self) -> IoFuture<'_, Result<(), Failed>> {
        self.ring.boxed(self.link())
    }

    fn restore(&self) -> IoFuture<'_, ()> {
        self.ring.boxed(self.top.release())
    }
}
