//! Commit: merges layers of a chain down into one of them, under a running disk.
//!
//! The layers from `top` down to `base`, without it, are copied into `base`; then the layer above `top` gets `base` as
//! its backing file, and those between are dropped from the chain. If `top` is the active layer, guests go on writing
//! it: that is a [mirror](super::mirror) of it to `base`, which gets ready, and whose completion lets the guests go on,
//! on `base`; a soft cancel then leaves the overlay where it is.
//!
//! # Promises
//! * What guests see never changes: a write to `base` is hidden by the layer that holds what was written.
//! * *completed*: `base` holds, durably, what `top` showed; the layer above it records it as its backing file. `base` has
//!   grown if `top` was longer, and never shrinks; where `top` was shorter than `base` and the layer above showed zeroes
//!   because of that, they are zeroes in `base`.
//! * *cancelled* or failed: the chain is as it was and shows what it showed. `base` by itself, and the layers between,
//!   may not make sense any more: it holds newer data than they were made over.
//! * Images that were open to be read only are so again afterwards.
//! * The files of the dropped layers are left alone.
//!
//! # A power cut
//! `base` is durable before the layer above records it, which it does in one step: the chain opens as it was, or as it is
//! to be. The job can be run again in either case.
//!
//! Semantics: QEMU's `block-commit` (qapi/block-core.json). What differs: many requests are in flight; zero clusters stay
//! zeroes; if the record cannot be changed the chain is as it was; `ignore` waits between two attempts.

use std::rc::Rc;

use blockferry_ring::{Errno, Ring, SharedBuf};

use super::event::JobType;
use super::mirror::{self, MirrorError, MirrorOptions};
use super::plan::What;
use super::policy::{Failed, IoOperation};
use super::runner::{ErrorPolicies, Job};
use super::sweep::{self, ChainError, Direction, Plan, SweepOptions};
use super::writable::Writable;
use crate::base::range::ByteRange;
use crate::block::{BlockError, Holds, IoFuture};
use crate::graph::chain::{held_by, name_for};
use crate::graph::node::{Drained, Node, Role};
use crate::graph::peer::{Peer, PeerOptions, ZeroResult};

/// The layers from `top` down to, and without, `base`.
fn layers_between(top: &Rc<Node>, base: &Rc<Node>) -> Result<Vec<Rc<Node>>, ChainError> {
    if Rc::ptr_eq(top, base) {
        return Err(ChainError::Same);
    }
    let chain = top.chain();
    match chain.iter().position(|node| Rc::ptr_eq(node, base)) {
        Some(at) => Ok(chain[..at].to_vec()),
        None => Err(ChainError::Upside { base: base.name().to_owned(), top: top.name().to_owned() }),
    }
}

/// What a commit is about: the place of the layer in the chain from which it is merged down (0: the active one), the
/// layers that are merged, and the one that receives them.
#[derive(Debug)]
pub struct Merge {
    /// The place of the uppermost in the chain.
    pub at: usize,
    /// Those that are merged, from above.
    pub layers: Vec<Rc<Node>>,
    /// The one that receives them.
    pub base: Rc<Node>,
}

/// Whether a commit of these layers makes sense; the defaults are those of [`start`].
pub fn judge(
    front: &Rc<Node>,
    top: Option<&Rc<Node>>,
    base: Option<&Rc<Node>>,
    options: &SweepOptions,
) -> Result<Merge, ChainError> {
    let chain = front.chain();
    let top = top.unwrap_or(front);
    let Some(at) = chain.iter().position(|node| Rc::ptr_eq(node, top)) else {
        return Err(ChainError::NotInChain(top.name().to_owned()));
    };
    if top.below().is_none() {
        return Err(ChainError::NoBacking(top.name().to_owned()));
    }
    let base = base.or(chain.last()).unwrap_or(top).clone();
    let layers = layers_between(top, &base)?;
    if at == 0 && options.backing_file.is_some() {
        return Err(ChainError::BackingFileForActive);
    }
    Ok(Merge { at, layers, base })
}

/// Starts a commit on the chain below `front`, the node that guests use. `top` is the active layer when it is `None`,
/// `base` the lowest layer.
///
/// # Errors
/// Nothing has changed then: a job that uses one of the layers (`EBUSY`, with QEMU's text), a base that cannot be
/// written, names and sizes that make no sense.
pub async fn start(
    ring: &Ring,
    front: &Rc<Node>,
    top: Option<&Rc<Node>>,
    base: Option<&Rc<Node>>,
    options: SweepOptions,
) -> Result<Job, ChainError> {
    let Merge { at, layers, base } = judge(front, top, base, &options)?;
    if at == 0 {
        return start_active(ring, front, layers, &base, options).await;
    }
    let top = top.unwrap_or(front);
    let mut uses = Vec::new();
    for layer in &layers {
        uses.push(layer.attach_in_chain(Role::JobLayer("commit"), front).await?);
    }
    uses.push(base.attach_in_chain(Role::JobBase("commit"), front).await?);
    let base = Rc::new(Writable::hold(ring, &base, uses, None).await?);
    let len = top.driver().len();
    let peer = peer(&base, len);
    if peer.is_err() {
        base.release().await;
    }
    let direction = Rc::new(Down {
        ring: ring.clone(),
        front: front.clone(),
        base,
        peer: peer?,
        layers,
        backing_file: options.backing_file.clone(),
    });
    let plan = Plan {
        job_type: JobType::Commit,
        front: front.clone(),
        len,
        direction: direction.clone(),
        follows_reads: false,
    };
    let started = sweep::start(ring, plan, &options).await;
    if started.is_err() {
        direction.restore().await;
    }
    started
}

/// The base, as what is written to. It may still have to grow to `len` bytes.
fn peer(base: &Rc<Writable>, len: u64) -> Result<Peer, MirrorError> {
    let granularity = mirror::granularity(None, base.node())?;
    let options = PeerOptions { granularity, is_zero: false, may_unmap: true };
    let driver = base.node().driver();
    Ok(Peer::new(driver.clone(), driver.len().max(len), base.clone(), options)?)
}

/// The active layer is committed: a mirror to its own base.
async fn start_active(
    ring: &Ring,
    front: &Rc<Node>,
    layers: Vec<Rc<Node>>,
    base: &Rc<Node>,
    options: SweepOptions,
) -> Result<Job, ChainError> {
    let mirror_options = MirrorOptions {
        speed: options.speed,
        buf_size: options.buf_size,
        policies: ErrorPolicies { source: options.on_error, target: options.on_error },
        guest_first: options.guest_first,
        auto_finalize: options.auto_finalize,
        auto_dismiss: options.auto_dismiss,
        ..MirrorOptions::new(options.id)
    };
    Ok(mirror::start_commit(ring, front, layers, base, mirror_options).await?)
}

/// Downwards: what the layers hold goes into the base.
#[derive(Debug)]
struct Down {
    ring: Ring,
    front: Rc<Node>,
    base: Rc<Writable>,
    /// The base, as what is written to.
    peer: Peer,
    layers: Vec<Rc<Node>>,
    backing_file: Option<String>,
}

impl Down {
    /// The layer above the uppermost that is merged, as it is now: a stream may have replaced it.
    fn overlay(&self) -> Option<Rc<Node>> {
        let chain = self.front.chain();
        let at = chain.iter().position(|node| Rc::ptr_eq(node, &self.layers[0]))?;
        chain.get(at.checked_sub(1)?).cloned()
    }

    async fn link(&self) -> Result<(), Failed> {
        let _alone = self.front.relinking().await;
        let Some(overlay) = self.overlay() else {
            let text =
                format!("'{}' is no longer in the chain of '{}'", self.layers[0].name(), self.front.name());
            return Err(Failed { operation: IoOperation::Write, errno: Errno::EPERM, text });
        };
        let editor = overlay.attach_in_time(Role::Editor).await.map_err(Failed::write)?;
        overlay.hold_writable().await.map_err(Failed::write)?;
        let result = self.link_to_base(&overlay).await;
        overlay.release_writable().await;
        drop(editor);
        result
    }

    /// Where the uppermost layer is shorter than the base, the overlay shows zeroes, and must go on to do so. Gives the
    /// drain in which that is true.
    async fn hide_rest(&self, overlay: &Rc<Node>) -> Result<Drained, Failed> {
        let base = self.base.node().driver();
        let mut hidden_to = self.layers[0].driver().len();
        loop {
            let shown_to = overlay.driver().len().min(base.len());
            if shown_to > hidden_to {
                let rest = ByteRange::at_saturating(hidden_to, shown_to - hidden_to);
                let (_, result) = self.peer.make_zero(rest, true).await;
                result.map_err(|(_, error)| Failed::write(error))?;
                base.flush().await.map_err(Failed::write)?;
                hidden_to = shown_to;
            }
            let drained = sweep::drained(&self.front).await?;
            if overlay.driver().len().min(base.len()) <= hidden_to {
                return Ok(drained);
            }
        }
    }

    /// In a drain: the overlay reads from the base, which holds what lay between, and records it, durably.
    async fn link_to_base(&self, overlay: &Rc<Node>) -> Result<(), Failed> {
        let (Some(lowest), Some(layer)) = (self.layers.last(), overlay.driver().as_layer()) else {
            return Ok(());
        };
        let base = self.base.node();
        let name = match &self.backing_file {
            Some(name) => name.clone(),
            None => name_for(overlay, lowest, base),
        };
        let drained = self.hide_rest(overlay).await?;
        // Whoever cannot have the overlay on the base says so before anything is written.
        let before = overlay.below();
        overlay.set_below(Some(base)).map_err(Failed::write)?;
        let recorded = layer.record_backing(Some((&name, base.driver().format()))).await;
        if recorded.is_err() {
            go_back(overlay, before.as_ref());
        }
        drop(drained);
        recorded.map_err(Failed::write)
    }
}

/// What was not recorded does not become true: the layer below is what it was.
pub(super) fn go_back(overlay: &Node, before: Option<&Rc<Node>>) {
    if let Err(error) = overlay.set_below(before) {
        // It reads the same from where it is now.
        tracing::warn!(%error, "a layer could not go back to the backing file that it records");
    }
}

impl Direction for Down {
    fn what(&self, offset: u64, len: u64) -> IoFuture<'_, Result<(u64, What), BlockError>> {
        self.ring.boxed(async move {
            let held = held_by(&self.layers, offset, len).await?;
            let what = match held.holds() {
                Holds::Data => What::Data,
                Holds::Zero => What::Zero,
                Holds::Nothing => What::Skip,
            };
            Ok((held.len, what))
        })
    }

    fn source(&self) -> &Rc<Node> {
        &self.layers[0]
    }

    fn target(&self) -> &Rc<Node> {
        self.base.node()
    }

    fn prepare(&self) -> IoFuture<'_, Result<(), BlockError>> {
        self.ring.boxed(self.base.grow(&self.front, self.layers[0].driver().len()))
    }

    fn write(&self, offset: u64, buf: SharedBuf) -> IoFuture<'_, Result<(), BlockError>> {
        self.ring.boxed(self.peer.write(offset, buf))
    }

    fn make_zero(&self, range: ByteRange) -> IoFuture<'_, ZeroResult> {
        self.ring.boxed(self.peer.make_zero(range, true))
    }

    fn relink(&self) -> IoFuture<'_, Result<(), Failed>> {
        self.ring.boxed(self.link())
    }

    fn restore(&self) -> IoFuture<'_, ()> {
        self.ring.boxed(self.base.release())
    }
}
