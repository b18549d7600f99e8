//! The shape that every kind of job has: a state machine without I/O, and hands that do what it asks.
//!
//! A [`Body`] is stepped with one [`Event`] at a time. It answers by queueing operations of its own kind
//! and, when the time has come, a [`Report`] to the life cycle. It never waits, owns no buffers, and can
//! be tested by feeding it events. Its [`Hands`] carry the operations out; the runner
//! ([`super::runner`]) stands between the two, and between them and the people who give orders.

use blockferry_ring::{Errno, Nanos, PooledFuture};

use super::error::JobFailure;
use super::policy::{CopyMode, ErrorAction, IoOperation};
use super::progress::Progress;
use crate::base::bucket::Limiter;

/// What a body is told.
#[derive(Debug)]
pub enum Event<O> {
    /// Begin.
    Start,
    /// Something changed: a guest wrote, a command came, the time asked for has come.
    Wake,
    /// An operation ended.
    Done(O),
}

/// What orders the users gave, as the body must know them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Orders {
    /// Issue nothing new: the job is paused, or about to be.
    pub hold: bool,
    /// Told to complete: pivot at the end.
    pub complete: bool,
    /// Told to end without pivot once ready.
    pub soft_cancel: bool,
    /// Told to end at once, whatever that means for the target.
    pub force_cancel: bool,
    /// Pending, and told to finalize (or finalizing is automatic).
    pub finalize: bool,
    /// The body has returned and waits to be finalized.
    pub pending: bool,
    /// A mirror: how guests' changes are treated, as ordered last.
    pub copy_mode: CopyMode,
}

/// What a body tells the life cycle. At most one a step.
#[derive(Debug)]
pub enum Report {
    /// Source and target are alike for the first time.
    Ready,
    /// The body is over. With success, and nothing prepared, the job may become pending.
    Returned(Result<(), JobFailure>),
    /// The last part, asked for by [`Orders::finalize`], is over.
    Prepared(Result<(), JobFailure>),
    /// An error that the policy does not forgive, while pending.
    FailedPending(JobFailure),
}

/// What a step may look at and do.
#[allow(missing_debug_implementations)] // It is handed down one call; its parts print themselves.
pub struct Context<'a, Op> {
    /// The time.
    pub now: Nanos,
    /// What was ordered.
    pub orders: Orders,
    /// The speed limit.
    pub limiter: &'a mut Limiter,
    /// The progress meter.
    pub progress: &'a mut Progress,
    /// Operations to carry out, in order.
    pub operations: &'a mut Vec<Op>,
    /// Step again at this time.
    pub wake_at: &'a mut Option<Nanos>,
    /// What to tell the life cycle.
    pub report: &'a mut Option<Report>,
    /// Asks the error policy what to do about a failed request; the event is sent.
    pub on_error: &'a mut dyn FnMut(IoOperation, Errno) -> ErrorAction,
}

impl<Op> Context<'_, Op> {
    /// Steps again at `at` at the latest.
    pub fn wake_by(&mut self, at: Nanos) {
        *self.wake_at = Some(self.wake_at.map_or(at, |old| old.min(at)));
    }
}

/// What the job's user sees of it beside the life cycle.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Details {
    /// What it is doing, in a word.
    pub phase: &'static str,
    /// Bytes written to the target as data.
    pub bytes_copied: u64,
    /// Bytes made zero in the target.
    pub bytes_zeroed: u64,
    /// Bytes that were alike already: holes and known zeroes.
    pub bytes_skipped: u64,
    /// Bytes that both sides' files share: copied without reading or writing them.
    pub bytes_shared: u64,
    /// Bytes known to differ.
    pub bytes_dirty: u64,
    /// Bytes that guests changed since the job began.
    pub bytes_guest: u64,
    /// Requests that failed.
    pub errors: u64,
    /// What failed last, in words.
    pub last_error: Option<String>,
    /// Source and target are alike at this moment.
    pub in_sync: bool,
    /// Every change by a guest is on both sides before the guest is answered.
    pub actively_synced: bool,
    /// How guests' changes are treated now.
    pub copy_mode: CopyMode,
    /// Bytes that guests' changes sent to the target.
    pub bytes_mirrored: u64,
    /// How long the job has copied: the time that the rate of `bytes_copied` is about.
    #[serde(rename = "copy-ns")]
    pub copy_nanos: Nanos,
    /// Bytes a second: what the job deals with.
    pub copy_bytes_per_sec: u64,
    /// Bytes a second: what guests make dirty.
    pub dirty_bytes_per_sec: u64,
    /// Whether the job gains on its guests; `None` while that cannot be told.
    pub converges: Option<bool>,
    /// Nanoseconds until source and target are alike at these rates.
    #[serde(rename = "eta-ns")]
    pub eta_nanos: Option<Nanos>,
    /// Bytes that the job may have in flight now.
    pub window_bytes: u64,
    /// The guests' latency that is not to be exceeded.
    #[serde(rename = "goal-ns")]
    pub goal_nanos: Option<Nanos>,
    /// Bytes of touched chunks a second that guests are held to; 0 is no limit.
    pub pace_bytes_per_sec: u64,
    /// How long guests stood at a shut door at most, because of the job.
    #[serde(rename = "downtime-ns")]
    pub downtime_nanos: Nanos,
}

/// The state machine of one kind of job.
pub trait Body {
    /// What it asks to be done.
    type Op;
    /// What came of it.
    type Outcome: 'static;

    /// One step.
    fn step(&mut self, cx: &mut Context<'_, Self::Op>, event: Event<Self::Outcome>);

    /// Operations asked for that have not ended and that a pause must wait for.
    fn in_flight(&self) -> usize;

    /// What users see.
    fn details(&self) -> Details;
}

/// Carries out what a body asks for.
pub trait Hands<Op, Outcome> {
    /// Does it. The future owns all that it needs.
    fn perform(&self, op: Op) -> PooledFuture<'static, Outcome>;

    /// The job has reached its last point before its result is told, drained: the pivot, or nothing. It
    /// happens entirely or not at all.
    fn commit(&self, pivot: bool) -> Result<(), JobFailure>;

    /// That point is behind it, and nobody can take it back: lets guests go on, and gives what the end of the job waits for
    /// besides, if anything. It has a bound of its own; a force-cancel does not wait for it.
    fn committed(&self) -> Option<PooledFuture<'static, ()>> {
        None
    }

    /// The job is over: everything that it made is undone (filters, uses, drains).
    fn clean_up(&self, forced: bool);
}
