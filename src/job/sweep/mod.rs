//! One pass over a chain that is in use: what commit and stream have in common.
//!
//! Layers of a chain are looked through once, in order; what some of them hold is copied to another layer of the same
//! chain, while guests read and write the disk through all of it. Nothing that guests see changes at any moment: a
//! commit writes below layers that hide it, a stream puts into a layer what is seen through it already. When all is
//! copied and durable, the chain is changed in a drain, in one step.
//!
//! What differs between the two is a [`Direction`]; the rest is here: the [machine], and its hands.

mod hands;
pub mod machine;

use std::cell::Cell;
use std::rc::Rc;

use blockferry_ring::{Ring, SharedBuf};

use super::error::JobError;
use super::governor::GuestFirst;
use super::lasting::Lasting;
use super::lifecycle::{JobOptions, parse_speed};
use super::mirror::MirrorError;
use super::plan::What;
use super::policy::{Failed, IoOperation, OnError};
use super::runner::{ErrorPolicies, Job};
use crate::base::limits;
use crate::base::range::ByteRange;
use crate::block::{BlockError, IoFuture, Reserve};
use crate::graph::node::{Drained, Node};
use crate::graph::peer::ZeroResult;
use hands::{Parts, SweepHands};
use machine::{Settings, Sweep, Wishes};

use super::event::JobType;

/// What the user may say of any such job.
#[derive(Clone, Debug)]
pub struct SweepOptions {
    /// The job's id.
    pub id: String,
    /// Bytes a second; 0 is no limit.
    pub speed: i64,
    /// What to do about errors.
    pub on_error: OnError,
    /// Bytes in flight at most; 0 is 16 MiB.
    pub buf_size: i64,
    /// How much the guests' latency counts.
    pub guest_first: GuestFirst,
    /// What the layer above records as its backing file afterwards; `None`: what is right.
    pub backing_file: Option<String>,
    /// Go from pending on without `finalize`.
    pub auto_finalize: bool,
    /// Forget the job when it is over.
    pub auto_dismiss: bool,
}

impl SweepOptions {
    /// The defaults.
    pub fn new(id: impl Into<String>) -> SweepOptions {
        SweepOptions {
            id: id.into(),
            speed: 0,
            on_error: OnError::Report,
            buf_size: 0,
            guest_first: GuestFirst::Auto,
            backing_file: None,
            auto_finalize: true,
            auto_dismiss: true,
        }
    }
}

/// Why a commit or a stream could not be started. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// A layer that is not one of this disk's.
    #[error("'{0}' is not in this backing file chain")]
    NotInChain(String),
    /// The layer has no backing file: there is nothing to merge.
    #[error("There is no backing file below '{0}'")]
    NoBacking(String),
    /// The two ends are one.
    #[error("Invalid files for merge: top and base are the same")]
    Same,
    /// Above and below are mixed up.
    #[error("'{base}' is not in the backing file chain of '{top}'")]
    Upside {
        /// The lower end.
        base: String,
        /// The upper end.
        top: String,
    },
    /// A name to be recorded where no image records it.
    #[error("'backing-file' specified, but 'top' is the active layer")]
    BackingFileForActive,
    /// A name to be recorded, and nothing left to record it for.
    #[error("backing file specified, but streaming the entire chain")]
    BackingFileForNone,
    /// A negative buffer size.
    #[error("Invalid parameter 'buf-size'")]
    BufSize,
    /// The layer is of a kind that holds no mapping of its own.
    #[error("'{0}' is no layer: its format has no backing files")]
    NoLayer(String),
    /// A job option.
    #[error(transparent)]
    Job(#[from] JobError),
    /// A lock, a permission, or what opening a layer for writing says.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// What a mirror, the engine of an active commit, says.
    #[error(transparent)]
    Mirror(MirrorError),
}

impl From<MirrorError> for ChainError {
    fn from(error: MirrorError) -> ChainError {
        match error {
            MirrorError::Block(error) => ChainError::Block(error),
            MirrorError::Job(error) => ChainError::Job(error),
            MirrorError::BufSize => ChainError::BufSize,
            other => ChainError::Mirror(other),
        }
    }
}

/// Bytes in flight, as the user said.
pub(super) fn window(buf_size: i64) -> Result<u64, ChainError> {
    match u64::try_from(buf_size).map_err(|_| ChainError::BufSize)? {
        0 => Ok(limits::SWEEP_BYTES_IN_FLIGHT),
        bytes => Ok(bytes),
    }
}

/// Where what a sweep finds goes to, and how the chain changes in the end.
pub(super) trait Direction: std::fmt::Debug {
    /// What is to be done from `offset` on, and for how many bytes (1 to `len`).
    fn what(&self, offset: u64, len: u64) -> IoFuture<'_, Result<(u64, What), BlockError>>;

    /// The layer through which the bytes to copy are seen.
    fn source(&self) -> &Rc<Node>;

    /// The layer that is written to.
    fn target(&self) -> &Rc<Node>;

    /// Makes the target ready.
    fn prepare(&self) -> IoFuture<'_, Result<(), BlockError>>;

    /// Puts bytes into the target that the source has just given.
    fn write(&self, offset: u64, buf: SharedBuf) -> IoFuture<'_, Result<(), BlockError>>;

    /// Makes a range zero in the target; an error comes with where it happened.
    fn make_zero(&self, range: ByteRange) -> IoFuture<'_, ZeroResult>;

    /// Changes the chain; on an error it is as it was.
    fn relink(&self) -> IoFuture<'_, Result<(), Failed>>;

    /// Gives back the right to write. The last thing that is done, after a success, too.
    fn restore(&self) -> IoFuture<'_, ()>;
}

/// The guests' requests are over, so that the chain can change; they wait until this is dropped.
pub(super) async fn drained(front: &Rc<Node>) -> Result<Drained, Failed> {
    front.drain(limits::DRAIN_NANOS_MAX).await.map_err(|errno| Failed {
        operation: IoOperation::Write,
        errno,
        text: "Draining the disk timed out: a guest's request does not end".into(),
    })
}

/// What a sweep is made of.
pub(super) struct Plan {
    pub job_type: JobType,
    pub front: Rc<Node>,
    pub len: u64,
    pub direction: Rc<dyn Direction>,
    /// Guests' reads are to be told to the job.
    pub follows_reads: bool,
}

/// Starts a sweep. Uses are attached and the target is writable already.
pub(super) async fn start(ring: &Ring, plan: Plan, options: &SweepOptions) -> Result<Job, ChainError> {
    let window_max = window(options.buf_size)?;
    let mut job_options = JobOptions::new(options.id.clone(), plan.job_type);
    job_options.speed_bytes_per_sec = parse_speed(options.speed)?;
    job_options.auto_finalize = options.auto_finalize;
    job_options.auto_dismiss = options.auto_dismiss;
    let memory = Reserve::empty(ring, limits::RESERVE_BYTES);
    memory.fill().await;
    let job =
        Job::new(ring, job_options, ErrorPolicies { source: options.on_error, target: options.on_error });
    let wishes = plan.follows_reads.then(|| Rc::new(Wishes::new(job.waker())));
    let hearing =
        wishes.clone().map(|wishes| plan.front.tell_reads(Rc::new(move |range| wishes.push(range))));
    let target = plan.direction.target().driver();
    let limits_of_target = target.limits();
    let settings = Settings {
        len: plan.len,
        window_max,
        zeroes_cost: !target.capabilities().zero_fast,
        guest_first: options.guest_first,
        front: Some(plan.front),
        wishes,
    };
    let hands = SweepHands(Rc::new(Parts {
        ring: ring.clone(),
        memory,
        lasting: Lasting::new(target, plan.direction.target().client_count() == 0),
        unit: limits_of_target.cluster_size.map_or(4096, u64::from).clamp(4096, limits::SWEEP_CHUNK_BYTES),
        len: plan.len,
        hearing: Cell::new(hearing),
        direction: plan.direction,
    }));
    job.start(Sweep::new(settings, ring.now()), Rc::new(hands));
    Ok(job)
}
