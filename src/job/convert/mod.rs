//! Convert: copies a disk that nobody writes to a new image.
//!
//! # Promises
//! * *completed*: the target equals the source, flushed, verified if that was asked for, its mark removed.
//! * *cancelled* or failed: the target may be anything, and its mark says so.
//! * The target is as thin as the source, or thinner: holes are found by asking, zeroes in data by looking.
//!
//! # How it differs from a mirror
//! No guest writes, so there is nothing to track, to drain, or to follow: the disk is walked once, in order, while
//! copies end in any order. Bytes may be copied without being read ([`super::offload`]), clusters may be
//! compressed, and what cannot be read may be left out ([`ConvertOptions::salvage`]).

mod hands;
pub mod machine;

use std::cell::Cell;
use std::rc::Rc;

use blockferry_ring::Ring;

use super::error::JobError;
use super::event::JobType;
use super::lasting::Lasting;
use super::lifecycle::{JobOptions, parse_speed};
use super::mirror::Marker;
use super::offload::{CopyOffload, OffloadPolicy};
use super::runner::{ErrorPolicies, Job};
use crate::base::limits;
use crate::block::{BlockError, IoFuture, IoResult};
use crate::graph::node::{Node, Role};
use hands::{ConvertHands, Parts};
use machine::{Convert, Settings};

pub use hands::Tally;

#[cfg(test)]
mod tests_sim;

/// What is known of the target before anything is written to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TargetState {
    /// It may hold anything.
    #[default]
    Unknown,
    /// It reads as zeroes everywhere: it is new, or the user says so.
    Zero,
    /// It reads as its backing file does where it holds nothing of its own.
    Backed {
        /// Bytes of the source's backing file. Beyond them what the source does not hold is zero.
        source_backing_len: u64,
        /// Both have the same backing file. Where not, what the source does not hold is compared, and copied if it differs.
        is_same: bool,
        /// It holds nothing of its own anywhere.
        is_new: bool,
    },
}

/// Writes compressed clusters to a target that was just made.
pub trait Compressor: std::fmt::Debug {
    /// Bytes of a cluster.
    fn cluster_bytes(&self) -> u64;
    /// Compresses and writes one cluster at a multiple of the cluster size, or what there is up to the end of the
    /// disk. Nothing may have been written there. Several may be under way at once.
    fn write(&self, offset: u64, bytes: Vec<u8>) -> IoFuture<'_, IoResult>;
}

/// How to convert.
#[derive(Debug)]
pub struct ConvertOptions {
    /// The job's id.
    pub id: String,
    /// Copies in flight; `None`: as many as keep source and target busy.
    pub parallel: Option<usize>,
    /// Bytes a second; 0 is no limit.
    pub speed: i64,
    /// What to do about errors.
    pub policies: ErrorPolicies,
    /// Zeroes are looked for in pieces of this size; 0: not at all, and holes are written out, so that the target is
    /// allocated everywhere.
    pub sparse_bytes: u64,
    /// What the target holds.
    pub target_state: TargetState,
    /// Compresses the clusters of the target.
    pub compressor: Option<Rc<dyn Compressor>>,
    /// Ways of copying without reading.
    pub offload: OffloadPolicy,
    /// What cannot be read counts as zeroes.
    pub salvage: bool,
    /// Compare source and target before the end.
    pub verify: bool,
    /// Comparing believes others who claim that there are zeroes.
    pub trust_holes: bool,
    /// Puts the mark of an unfinished copy on the target.
    pub marker: Option<Box<dyn Marker>>,
}

impl ConvertOptions {
    /// The defaults.
    pub fn new(id: impl Into<String>) -> ConvertOptions {
        ConvertOptions {
            id: id.into(),
            parallel: None,
            speed: 0,
            policies: ErrorPolicies::default(),
            sparse_bytes: 4096,
            target_state: TargetState::Unknown,
            compressor: None,
            offload: OffloadPolicy::default(),
            salvage: false,
            verify: false,
            trust_holes: false,
            marker: None,
        }
    }
}

/// Why a conversion could not be started. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// Source and target are the same.
    #[error("Source and target are the same image")]
    Itself,
    /// The target does not hold the source.
    #[error("The target is smaller than the source: {target} of {source_bytes} bytes")]
    TooSmall {
        /// Bytes of the target.
        target: u64,
        /// Bytes of the source.
        source_bytes: u64,
    },
    /// A job option.
    #[error(transparent)]
    Job(#[from] JobError),
    /// A lock or permission.
    #[error(transparent)]
    Block(#[from] BlockError),
}

/// Starts a conversion of `source` to `target`. The tally grows while it runs.
pub async fn start(
    ring: &Ring,
    source: &Rc<Node>,
    target: &Rc<Node>,
    options: ConvertOptions,
) -> Result<(Job, Rc<Tally>), ConvertError> {
    let (from, to) = (source.driver(), target.driver());
    let same = from.identity().is_some() && from.identity() == to.identity();
    if same || Rc::ptr_eq(source, target) || Rc::ptr_eq(from, to) {
        return Err(ConvertError::Itself);
    }
    if to.len() < from.len() {
        return Err(ConvertError::TooSmall { target: to.len(), source_bytes: from.len() });
    }
    let cluster = to.limits().cluster_size.map_or(1, u64::from);
    let packed = options.compressor.as_ref().map(|compressor| compressor.cluster_bytes());
    let mut job_options = JobOptions::new(options.id.clone(), JobType::Convert);
    job_options.speed_bytes_per_sec = parse_speed(options.speed)?;
    let source_use = source.attach_in_time(Role::JobSource("convert")).await?;
    let target_use = target.attach_in_time(Role::JobTarget("convert")).await?;
    let job = Job::new(ring, job_options, options.policies);
    let offload = CopyOffload::new(if packed.is_some() || options.sparse_bytes == 0 {
        OffloadPolicy::Never
    } else {
        options.offload
    });
    let tally = Rc::new(Tally::default());
    let settings = Settings {
        len: from.len(),
        parallel: match options.parallel {
            Some(parallel) => {
                let parallel = parallel.clamp(1, limits::CONVERT_PARALLEL_MAX);
                (parallel, parallel)
            }
            None => (limits::CONVERT_OPERATIONS, limits::CONVERT_OPERATIONS_MAX),
        },
        skip_zeroes: options.target_state == TargetState::Zero && options.sparse_bytes > 0,
        zeroes_cost: !to.capabilities().zero_fast || options.sparse_bytes == 0,
        chunk: limits::CONVERT_CHUNK_BYTES.max(packed.unwrap_or(0)),
        share: offload.is_worth_trying(),
        verify: options.verify,
    };
    let hands = ConvertHands(Rc::new(Parts {
        ring: ring.clone(),
        source: source.clone(),
        target: target.clone(),
        _uses: [source_use, target_use],
        lasting: Lasting::new(to, true),
        marker: options.marker,
        offload,
        unit: cluster.clamp(4096, limits::CONVERT_CHUNK_BYTES).max(packed.unwrap_or(0)),
        sparse_bytes: options.sparse_bytes,
        target_state: options.target_state,
        compressor: options.compressor,
        salvage: options.salvage,
        trust_holes: options.trust_holes,
        tally: tally.clone(),
        target_failed: Cell::new(false),
    }));
    job.start(Convert::new(settings), Rc::new(hands));
    Ok((job, tally))
}
