//! Mirror: copies a disk to a new image while its user goes on writing.
//!
//! # Promises
//! * *ready*: the target equalled the source at a point in time, and everything since is tracked;
//!   `offset` equals `len`.
//! * *completed*: the target equals the source at a point in time, flushed, its mark removed. After
//!   `complete` the source's users use the target from exactly that point on.
//! * *cancelled* or failed: the target may be anything, and its mark says so.
//! * A target that cannot show what the source shows is no copy: where only the uppermost layer is copied, it must have
//!   the layers below ([`SyncMode::Top`]); where only new writes are, its mark stays and says so ([`SyncMode::None`]).
//! * A target that somebody removes, replaces or cuts, and a source that is cut, are noticed before *ready*, at the end,
//!   and once a minute meanwhile: the job fails.
//! * After a pivot the old disk carries a mark that says by what it was superseded.
//! * Whatever ends the job, no filter, drain or lock of it is left behind, except that operations stuck
//!   in a dead device keep source and target locked until they end.
//!
//! Semantics: QEMU's `blockdev-mirror` (qapi/block-core.json), with three deliberate differences: a
//! pending job follows its source instead of stopping its guests, the speed limit holds in every phase,
//! and a target larger than its source is possible when allowed.

pub mod conduct;
pub mod converge;
mod hands;
pub mod layers;
pub mod machine;
mod stage;
pub mod verify;

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use blockferry_ring::{Nanos, Ring};

use super::event::JobType;
use super::governor::GuestFirst;
use super::lasting::Lasting;
use super::lifecycle::{JobOptions, parse_speed};
use super::offload::{CopyOffload, OffloadPolicy};
use super::policy::CopyMode;
use super::runner::{ErrorPolicies, Job};
use super::tail::tail_of;
use super::writable::Writable;
use crate::base::limits;
use crate::block::{BlockError, Driver, Reserve};
use crate::graph::node::{Child, Filter, Node, Role};
use crate::graph::peer::{Peer, PeerOptions};
use crate::graph::tracker::Tracker;
use crate::protocol::mark::{self, MarkInfo, TargetMark};
use conduct::{Conduct, ConductSettings};
use converge::OnDivergence;
pub use hands::Marker;
use hands::{MirrorHands, Parts};
use machine::{Mirror, Settings};
use verify::Verifier;

/// What is copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SyncMode {
    /// The whole disk.
    #[default]
    Full,
    /// What is allocated above the backing file; the whole disk where there is none.
    Top,
    /// Only what is written from now on.
    None,
}

/// How to mirror.
#[derive(Debug)]
pub struct MirrorOptions {
    /// The job's id.
    pub id: String,
    /// What is copied.
    pub sync: SyncMode,
    /// Bytes in a chunk of the dirty map: a power of two, 512 B to 64 MiB. `None`: the target's cluster
    /// size between 4 KiB and 64 KiB, or 64 KiB.
    pub granularity: Option<u64>,
    /// Bytes in flight; 0 is 16 MiB.
    pub buf_size: i64,
    /// Bytes a second; 0 is no limit.
    pub speed: i64,
    /// What to do about errors.
    pub policies: ErrorPolicies,
    /// Go from pending on without `finalize`.
    pub auto_finalize: bool,
    /// Forget the job when it is over.
    pub auto_dismiss: bool,
    /// Look for zeroes in data and keep them out of the target.
    pub detect_zeroes: bool,
    /// Zeroing may give the target's space back.
    pub may_unmap: bool,
    /// All of the target reads as zeroes.
    pub target_is_zero: bool,
    /// By which means the bytes of a source at rest may be copied without reading them.
    pub offload: OffloadPolicy,
    /// Allow a target that is larger than the source.
    pub allow_larger_target: bool,
    /// Puts the mark of an unfinished copy on the target. `None`: the usual one, where the target can carry it itself; for
    /// one that cannot, give a [`TargetMark`] with a state directory.
    pub marker: Option<Box<dyn Marker>>,
    /// The target carries no mark: for those who know of unfinished targets by other means.
    pub unmarked: bool,
    /// Says on the source, after a pivot, that it is old. `None`: the usual mark, where the source can carry it itself.
    pub old_marker: Option<TargetMark>,
    /// Compares source and target before the job ends.
    pub verifier: Option<Rc<Verifier>>,
    /// How guests' changes are treated at first.
    pub copy_mode: CopyMode,
    /// How much the guests' latency counts.
    pub guest_first: GuestFirst,
    /// What to do when guests are faster than the job.
    pub on_divergence: OnDivergence,
    /// The longest time for which guests stand at a shut door, in nanoseconds; 0 for no bound.
    pub downtime_nanos_max: Nanos,
    /// Be ready within this time, in nanoseconds, even if guests notice.
    pub deadline_nanos: Option<Nanos>,
}

impl MirrorOptions {
    /// The defaults.
    pub fn new(id: impl Into<String>) -> MirrorOptions {
        MirrorOptions {
            id: id.into(),
            sync: SyncMode::Full,
            granularity: None,
            buf_size: 0,
            speed: 0,
            policies: ErrorPolicies::default(),
            auto_finalize: true,
            auto_dismiss: true,
            detect_zeroes: true,
            may_unmap: true,
            target_is_zero: false,
            offload: OffloadPolicy::default(),
            allow_larger_target: false,
            marker: None,
            unmarked: false,
            old_marker: None,
            verifier: None,
            copy_mode: CopyMode::Background,
            guest_first: GuestFirst::Auto,
            on_divergence: OnDivergence::WriteBlocking,
            downtime_nanos_max: limits::DOWNTIME_NANOS_DEFAULT,
            deadline_nanos: None,
        }
    }
}

/// Why a mirror could not be started. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
pub enum MirrorError {
    /// The granularity is out of range.
    #[error("Parameter 'granularity' expects a value in range [512B, 64MB]")]
    GranularityRange,
    /// The granularity is no power of two.
    #[error("Parameter 'granularity' expects a power of 2")]
    GranularityPower,
    /// A negative buffer size.
    #[error("Invalid parameter 'buf-size'")]
    BufSize,
    /// Source and target are the same.
    #[error("Can't mirror node into itself")]
    Itself,
    /// Only what is above the backing file would be copied, to a target that does not show what is below.
    #[error(
        "Only what '{source_name}' has above its backing file '{backing}' would be copied, and {why}. Give the target that \
         backing file, or copy all (--sync full)"
    )]
    NotShown {
        /// The source.
        source_name: String,
        /// Its backing file.
        backing: String,
        /// What the target has instead.
        why: String,
    },
    /// Comparing what is no copy.
    #[error("With --sync none only new writes are copied: there is no copy that could be verified")]
    NothingToVerify,
    /// A job option.
    #[error(transparent)]
    Job(#[from] super::error::JobError),
    /// A lock or permission.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// The guests' requests did not end in time, so that tracking could not begin safely.
    #[error("The source '{0}' could not be drained: a request on it does not end")]
    Drain(String),
    /// The disk is too large for the granularity.
    #[error(transparent)]
    DirtyMap(#[from] crate::graph::dirty::DirtyMapError),
}

/// Whether changes can be tracked in pieces of this size.
pub fn check_granularity(bytes: u64) -> Result<(), MirrorError> {
    match bytes {
        g if !(512..=64 << 20).contains(&g) => Err(MirrorError::GranularityRange),
        g if !g.is_power_of_two() => Err(MirrorError::GranularityPower),
        _ => Ok(()),
    }
}

/// The granularity in use: as asked for, or by QEMU's rule.
pub(super) fn granularity(asked: Option<u64>, target: &Node) -> Result<u64, MirrorError> {
    match asked {
        Some(g) => check_granularity(g).map(|()| g),
        None => {
            let cluster = target.driver().limits().cluster_size.map(u64::from);
            Ok(cluster.map_or(65_536, |c| c.next_power_of_two().clamp(4096, 65_536)))
        }
    }
}

/// Starts a mirror of `source` to `target`.
///
/// The source is drained for a moment, so that no write is under way when tracking begins.
pub async fn start(
    ring: &Ring,
    source: &Rc<Node>,
    target: &Rc<Node>,
    options: MirrorOptions,
) -> Result<Job, MirrorError> {
    let (from, to) = (source.driver(), target.driver());
    let same = from.identity().is_some() && from.identity() == to.identity();
    if same || Rc::ptr_eq(source, target) || Rc::ptr_eq(from, to) {
        return Err(MirrorError::Itself);
    }
    let mut settled = settle(&options, target, JobType::Mirror)?;
    match options.sync {
        SyncMode::Full => {}
        SyncMode::Top => {
            let shown = layers::below(to);
            layers::check_shown(from, to.name(), shown.as_ref(), options.verifier.is_some())?;
        }
        SyncMode::None if options.verifier.is_some() => return Err(MirrorError::NothingToVerify),
        // Its target is no copy: nobody can be put on it.
        SyncMode::None => settled.job.completable = false,
    }
    let mut options = options;
    if options.marker.is_none() && !options.unmarked {
        options.marker = usual_mark(ring, from, to, options.sync);
    }
    if options.old_marker.is_none() && !options.unmarked {
        options.old_marker = old_mark(ring, "mirror", from, to);
    }
    // Without a layer below, the uppermost one is the whole disk.
    let layers =
        if options.sync == SyncMode::Top && from.has_backing() { vec![source.clone()] } else { Vec::new() };
    let source_use = source.attach_in_time(Role::JobSource("mirror")).await?;
    let target_use = target.attach_in_time(Role::JobTarget("mirror")).await?;
    let ends = Ends { source_use, target_use, layers, base: None };
    begin(ring, source, target, ends, options, settled).await
}

/// The mark of an unfinished copy, where the target can carry it itself.
fn usual_mark(
    ring: &Ring,
    from: &Rc<dyn Driver>,
    to: &Rc<dyn Driver>,
    sync: SyncMode,
) -> Option<Box<dyn Marker>> {
    if TargetMark::needs_state_dir(ring, to) {
        tracing::info!(
            target = to.name(),
            "the target cannot carry a mark, and no state directory was given"
        );
        return None;
    }
    let info = MarkInfo::incomplete("mirror", from.name()).started(ring.unix_secs()).about(
        mark::identity_of(ring, from),
        from.len(),
        to.format(),
    );
    let at_end = (sync == SyncMode::None).then(|| info.clone().partial());
    Some(Box::new(TargetMark::new(ring, to.clone(), None, info).ending_as(at_end)))
}

/// The mark of a disk that clients have left by a pivot, where it can carry it itself.
fn old_mark(ring: &Ring, job: &str, from: &Rc<dyn Driver>, to: &Rc<dyn Driver>) -> Option<TargetMark> {
    if TargetMark::needs_state_dir(ring, from) {
        return None;
    }
    let info = MarkInfo::superseded(ring, job, from.name(), to.name());
    Some(TargetMark::new(ring, from.clone(), None, info))
}

/// Starts an active commit: a mirror of what `layers`, the chain of `source` down to and without `base`, hold, to `base`.
pub(super) async fn start_commit(
    ring: &Ring,
    source: &Rc<Node>,
    layers: Vec<Rc<Node>>,
    base: &Rc<Node>,
    options: MirrorOptions,
) -> Result<Job, MirrorError> {
    let settled = settle(&options, base, JobType::Commit)?;
    let old_marker = old_mark(ring, "commit", source.driver(), base.driver());
    let options = MirrorOptions { old_marker, ..options };
    let source_use = source.attach_in_time(Role::JobSource("commit")).await?;
    // After a pivot clients write the base below layers that are of no interest any more.
    let lowest = layers.last().and_then(|layer| layer.driver().as_layer()?.backing());
    let lenient = lowest.map(|above| above.lenient());
    let mut uses = Vec::new();
    for layer in layers.iter().skip(1) {
        uses.push(layer.attach_in_chain(Role::JobLayer("commit"), source).await?);
    }
    let target_use = base.attach_in_chain(Role::JobBase("commit"), source).await?;
    // Writing ends after the job's use of it.
    uses.push(base.attach_in_time(Role::Editor).await?);
    let writable = Writable::hold(ring, base, uses, lenient).await?;
    if let Err(error) = writable.grow(source, source.driver().len()).await {
        writable.release().await;
        return Err(error.into());
    }
    let ends = Ends { source_use, target_use, layers, base: Some(writable) };
    let options = MirrorOptions { allow_larger_target: true, ..options };
    begin(ring, source, base, ends, options, settled).await
}

/// What was read out of the options.
struct Settled {
    granularity: u64,
    buf_size: u64,
    job: JobOptions,
}

fn settle(options: &MirrorOptions, target: &Node, job_type: JobType) -> Result<Settled, MirrorError> {
    let granularity = granularity(options.granularity, target)?;
    let buf_size = match u64::try_from(options.buf_size).map_err(|_| MirrorError::BufSize)? {
        0 => limits::MIRROR_BUF_SIZE,
        n => n,
    }
    .next_multiple_of(granularity);
    let mut job = JobOptions::new(options.id.clone(), job_type);
    job.completable = true;
    job.speed_bytes_per_sec = parse_speed(options.speed)?;
    job.auto_finalize = options.auto_finalize;
    job.auto_dismiss = options.auto_dismiss;
    Ok(Settled { granularity, buf_size, job })
}

/// What a job has of its two ends.
struct Ends {
    source_use: Rc<Child>,
    target_use: Rc<Child>,
    /// The layers whose data is copied, if not all of the source's.
    layers: Vec<Rc<Node>>,
    /// The target is the base of the source.
    base: Option<Writable>,
}

async fn begin(
    ring: &Ring,
    source: &Rc<Node>,
    target: &Rc<Node>,
    ends: Ends,
    options: MirrorOptions,
    settled: Settled,
) -> Result<Job, MirrorError> {
    let (from, to) = (source.driver(), target.driver());
    let Settled { granularity, buf_size, job: job_options } = settled;
    let memory = Reserve::empty(ring, limits::RESERVE_BYTES);
    memory.fill().await;
    if let Some(verifier) = &options.verifier {
        verifier.reserve().await;
    }
    let job = Job::new(ring, job_options, options.policies);
    let len = from.len();
    let target_use = Rc::new(RefCell::new(Some(ends.target_use)));
    let peer = PeerOptions { granularity, is_zero: options.target_is_zero, may_unmap: options.may_unmap };
    let peer = Rc::new(Peer::new(to.clone(), to.len(), target_use.clone(), peer)?);
    let tracker = Tracker::new(ring, len, granularity, Some(peer.clone()), job.waker())?;
    job.follows_guests(options.copy_mode, &tracker);
    let scans = !ends.layers.is_empty();
    if options.sync != SyncMode::None && !scans {
        tracker.set_all();
    }
    let filter: Rc<dyn Filter> = tracker.clone();
    match source.drain(limits::DRAIN_NANOS_MAX).await {
        Ok(drained) => {
            source.add_filter(filter.clone(), &drained);
            if let Some(verifier) = &options.verifier {
                source.add_filter(verifier.filter(), &drained);
            }
        }
        Err(_) => {
            job.abandon();
            return Err(MirrorError::Drain(from.name().to_owned()));
        }
    }
    let sizes_differ = if options.allow_larger_target {
        to.len() < len
    } else {
        to.len() < len || tail_of(len, to.len()) > 0
    };
    let settings = Settings {
        len,
        buf_size,
        zeroes_cost: !to.capabilities().zero_fast,
        auto_finalize: options.auto_finalize,
        scans,
        verify: options.verifier.is_some(),
        sizes_differ,
    };
    let hands = MirrorHands(Rc::new(Parts {
        ring: ring.clone(),
        memory,
        source: ends.source_use,
        source_node: source.clone(),
        target: target_use,
        target_node: target.clone(),
        tracker: tracker.clone(),
        peer,
        lasting: Lasting::new(to, true),
        offload: CopyOffload::new(options.offload),
        filter,
        drained: RefCell::new(None),
        over: Cell::new(false),
        marker: options.marker,
        old_marker: RefCell::new(options.old_marker),
        pivoted: Cell::new(false),
        verifier: options.verifier,
        detect_zeroes: options.detect_zeroes,
        granularity,
        layers: ends.layers,
        base: ends.base,
    }));
    let conduct = ConductSettings {
        guest_first: options.guest_first,
        on_divergence: options.on_divergence,
        downtime_nanos_max: options.downtime_nanos_max,
        deadline_nanos: options.deadline_nanos,
        window_max: buf_size,
        piece_max: from.limits().transfer_best.max(to.limits().transfer_best).into(),
    };
    let conduct = Conduct::new(conduct, Some(source.clone()), ring.now());
    job.start(Mirror::new(settings, tracker, conduct), Rc::new(hands));
    Ok(job)
}

#[cfg(all(test, debug_assertions))]
mod tests_sim;
