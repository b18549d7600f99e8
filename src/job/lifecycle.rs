//! The life of one job, from its making to its dismissal, without any I/O.
//!
//! A [`Lifecycle`] knows where a job stands, who holds it, whether it was told to complete or to cancel, and what
//! must be told to the world in which order. It does not know what the job does. Its owner drives it from two
//! sides: commands come in through the verbs (refused with QEMU's texts where the table says no), and the job's
//! body reports what happened to it; where the owner must act next, the answer is a [`Next`].
//!
//! ```text
//! new ── start ── body runs ── run_returned(Ok) ── [finalize] ── prepare ── prepared(Ok) ── concluded
//!           ready, pause points       │ Err, cancel                  │ Err
//!                                     └────────────── clean up ── cleaned_up ───────────── concluded
//! ```
//!
//! Three things differ from the naive picture.
//!
//! *Pausing counts.* A job is held while any of these hold it: it was not started, a user (or the `stop` policy)
//! paused it, a drain of one of its nodes. Only the user's hold has texts; drains are internal. A hold shows as a
//! change of state only when the body reaches a pause point.
//!
//! *Cancel has two meanings.* While the job is ready, a soft cancel says "finish what you have, then end without
//! the pivot": the job ends completed. Everywhere else, and always with `force`, cancel means that the job is given
//! up. Measured on QEMU 10.0.2, that includes a soft cancel of a pending mirror.
//!
//! *Pending is no dead time.* QEMU keeps the guest stopped from the end of the body until `finalize`. Here the body
//! of a mirror keeps following the guest while the job is pending; [`finalize`](Lifecycle::finalize) only begins the
//! preparing (last drain, flush, pivot), which takes time and ends with [`prepared`](Lifecycle::prepared). So a
//! pending job can still meet errors ([`fail_pending`](Lifecycle::fail_pending)), and a cancel can arrive while it
//! prepares: the owner then stops if it still can, and what `prepared` is told decides.

use blockferry_ring::Errno;

use super::error::{JobError, JobFailure};
use super::event::{EventQueue, JobEvent, JobPosition, JobType};
use super::info::JobInfo;
use super::policy::{ErrorAction, IoOperation, IoStatus, OnError};
use super::progress::Progress;
use super::status::{Status, Verb};

/// What a job is made with.
#[derive(Debug, Clone)]
pub struct JobOptions {
    /// A well-formed id that no other job has (`Registry::check_new_id`).
    pub id: String,
    /// What clients see the job as.
    pub job_type: JobType,
    /// Whether the job can be told to complete: a mirror and an active commit can.
    pub completable: bool,
    /// The limit to begin with, bytes a second; 0 is none.
    pub speed_bytes_per_sec: u64,
    /// Go from pending to concluded without a `finalize`.
    pub auto_finalize: bool,
    /// Go from concluded to null without a `dismiss`.
    pub auto_dismiss: bool,
    /// Wait for the other members of a transaction before pending.
    pub grouped: bool,
}

impl JobOptions {
    /// The defaults of the QMP commands: no limit, everything automatic, on its own.
    pub fn new(id: impl Into<String>, job_type: JobType) -> Self {
        Self {
            id: id.into(),
            job_type,
            completable: job_type == JobType::Mirror,
            speed_bytes_per_sec: 0,
            auto_finalize: true,
            auto_dismiss: true,
            grouped: false,
        }
    }
}

/// What the owner of a job has to do after it told the life cycle something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Next {
    /// Nothing.
    Continue,
    /// Let the body notice `cancel_requested` or `is_force_cancelled`, end it, and call `run_returned`.
    WindDown,
    /// Wait until all members of the group wait, then call `group_is_waiting` on each.
    AwaitGroup,
    /// Wait for `finalize`; a mirror keeps following its source meanwhile.
    AwaitFinalize,
    /// Prepare (last drain, flush, pivot), then call `prepared`.
    Prepare,
    /// Give up preparing if that is still possible, then call `prepared` with what came of it.
    StopPreparing,
    /// Undo what the job made (filters, bitmaps, links), then call `cleaned_up`.
    CleanUp,
    /// Nothing; the job stays listed until `dismiss`.
    Concluded,
    /// Forget the job.
    Gone,
}

/// The state of one job. See the module's documentation.
#[derive(Debug)]
pub struct Lifecycle {
    options: JobOptions,
    status: Status,
    io_status: IoStatus,
    started: bool,
    user_paused: bool,
    drains: u32,
    cancelled: bool,
    force_cancelled: bool,
    complete_requested: bool,
    preparing: bool,
    failure: Option<JobFailure>,
    events: EventQueue,
}

impl Lifecycle {
    /// A job that is made and not started. The first event says so.
    pub fn new(options: JobOptions) -> Self {
        let mut job = Self {
            options,
            status: Status::Undefined,
            io_status: IoStatus::Ok,
            started: false,
            user_paused: false,
            drains: 0,
            cancelled: false,
            force_cancelled: false,
            complete_requested: false,
            preparing: false,
            failure: None,
            events: EventQueue::default(),
        };
        job.enter(Status::Created);
        job
    }

    // What is known.

    /// The job's id.
    pub fn id(&self) -> &str {
        &self.options.id
    }

    /// What clients see the job as.
    pub fn job_type(&self) -> JobType {
        self.options.job_type
    }

    /// Where the job stands.
    pub fn status(&self) -> Status {
        self.status
    }

    /// The limit in bytes a second; 0 is none.
    pub fn speed_bytes_per_sec(&self) -> u64 {
        self.options.speed_bytes_per_sec
    }

    /// Whether an error has stopped the job. A mirror issues nothing new while this is not `Ok`.
    pub fn io_status(&self) -> IoStatus {
        self.io_status
    }

    /// How many hold the job: its being unstarted, its user, and drains.
    pub fn pause_count(&self) -> u32 {
        u32::from(!self.started) + u32::from(self.user_paused) + self.drains
    }

    /// Whether the body has to stop at its next pause point. A job that was given up is not held by anything.
    pub fn should_pause(&self) -> bool {
        self.pause_count() > 0 && !self.force_cancelled
    }

    /// Whether a user, or the `stop` policy, paused the job.
    pub fn is_user_paused(&self) -> bool {
        self.user_paused
    }

    /// Cancelled in either way: the job must not pivot.
    pub fn cancel_requested(&self) -> bool {
        self.cancelled
    }

    /// Given up: the job must end without finishing what it has.
    pub fn is_force_cancelled(&self) -> bool {
        self.force_cancelled
    }

    /// Told to complete.
    pub fn complete_requested(&self) -> bool {
        self.complete_requested
    }

    /// Why the job failed, if it did.
    pub fn failure(&self) -> Option<&JobFailure> {
        self.failure.as_ref()
    }

    /// The item that `query-block-jobs` shows. `actively_synced` is a mirror's; others pass `None`.
    pub fn info(&self, progress: Progress, busy: bool, actively_synced: Option<bool>) -> JobInfo {
        JobInfo {
            auto_finalize: self.options.auto_finalize,
            io_status: self.io_status,
            device: self.options.id.clone(),
            auto_dismiss: self.options.auto_dismiss,
            busy,
            len: progress.len(),
            offset: progress.offset(),
            status: self.status,
            paused: self.pause_count() > 0,
            speed: self.options.speed_bytes_per_sec,
            ready: self.status.is_ready(),
            job_type: self.options.job_type,
            actively_synced,
            error: self.failure.as_ref().map(ToString::to_string),
        }
    }

    /// The oldest event that was not taken yet.
    pub fn pop_event(&mut self) -> Option<JobEvent> {
        self.events.pop()
    }

    /// How many error events were counted instead of queued because nobody took them out.
    pub fn error_events_suppressed(&self) -> u64 {
        self.events.errors_suppressed()
    }

    // What users say.

    /// `pause`: hold the job at its next pause point.
    pub fn user_pause(&mut self) -> Result<(), JobError> {
        self.check_verb(Verb::Pause)?;
        if self.user_paused {
            return Err(JobError::AlreadyPaused);
        }
        self.user_paused = true;
        Ok(())
    }

    /// `resume`: take back the user's pause, and with it the error that caused it.
    pub fn user_resume(&mut self) -> Result<(), JobError> {
        if !self.user_paused {
            return Err(JobError::NotPaused);
        }
        self.check_verb(Verb::Resume)?;
        self.clear_user_pause();
        Ok(())
    }

    /// `set-speed`, in bytes a second; 0 is no limit. True when a job that sleeps on its limit should look again
    /// at once: a lower limit waits for the sleep to end.
    pub fn set_speed(&mut self, speed_bytes_per_sec: i64) -> Result<bool, JobError> {
        self.check_verb(Verb::SetSpeed)?;
        let new = parse_speed(speed_bytes_per_sec)?;
        let old = std::mem::replace(&mut self.options.speed_bytes_per_sec, new);
        Ok(new == 0 || new > old)
    }

    /// `change`: whether the job may be changed now. What is changed is the job's own business.
    pub fn check_change(&self) -> Result<(), JobError> {
        self.check_verb(Verb::Change)?;
        if self.options.job_type != JobType::Mirror {
            return Err(JobError::ChangeNotSupported);
        }
        Ok(())
    }

    /// `complete`: the body may end and the job pivot. Saying it twice is no error; while the job is held, it takes
    /// effect when the job goes on.
    pub fn request_complete(&mut self) -> Result<(), JobError> {
        self.check_verb(Verb::Complete)?;
        if self.cancelled || !self.options.completable {
            return Err(JobError::CannotComplete { id: self.options.id.clone() });
        }
        self.complete_requested = true;
        Ok(())
    }

    /// `cancel`. Without `force`, a job that its user paused refuses, and a ready job ends completed, without pivot.
    pub fn cancel(&mut self, force: bool) -> Result<Next, JobError> {
        if self.user_paused && !force {
            return Err(JobError::CurrentlyPaused { id: self.options.id.clone() });
        }
        self.check_verb(Verb::Cancel)?;
        Ok(self.cancel_now(force))
    }

    /// Gives the job up without asking the verb table: the engine ends, or another member of the group failed. A job
    /// that is over already is left alone.
    pub fn give_up(&mut self) -> Next {
        if self.status.accepts(Verb::Cancel) { self.cancel_now(true) } else { Next::Continue }
    }

    /// `finalize`: begin to prepare. A job that already prepares refuses a second one.
    pub fn finalize(&mut self) -> Result<Next, JobError> {
        self.check_verb(Verb::Finalize)?;
        if self.preparing {
            return Err(self.refusal(Verb::Finalize));
        }
        Ok(self.begin_prepare())
    }

    /// `dismiss`: forget a concluded job.
    pub fn dismiss(&mut self) -> Result<Next, JobError> {
        self.check_verb(Verb::Dismiss)?;
        self.enter(Status::Null);
        Ok(Next::Gone)
    }

    // What the owner does.

    /// The making failed after all (a name, a permission): the job goes without ever having been.
    pub fn creation_failed(&mut self) -> Next {
        self.enter(Status::Null);
        Next::Gone
    }

    /// Starts the body, whose first act is to reach a pause point.
    pub fn start(&mut self) {
        self.enter(Status::Running);
        self.started = true;
    }

    /// A drain of one of the job's nodes begins.
    pub fn drain_pause(&mut self) {
        self.drains += 1;
    }

    /// A drain of one of the job's nodes ends.
    pub fn drain_resume(&mut self) {
        debug_assert!(self.drains > 0, "job '{}': a drain ended that never began", self.id());
        self.drains = self.drains.saturating_sub(1);
    }

    /// All members of the group have their bodies behind them. Their owner finalizes them together.
    pub fn group_is_waiting(&mut self) {
        self.enter(Status::Pending);
        if !self.options.auto_finalize {
            let (job_type, id) = (self.options.job_type, self.options.id.clone());
            self.events.push(JobEvent::Pending { job_type, id });
        }
    }

    /// Begins to prepare a pending job: `finalize` of another member of its group, or of nobody.
    pub fn begin_prepare(&mut self) -> Next {
        debug_assert_eq!(self.status, Status::Pending);
        self.preparing = true;
        Next::Prepare
    }

    /// A pending job that does not prepare yet met an error that its policy does not forgive.
    pub fn fail_pending(&mut self, failure: JobFailure) -> Next {
        debug_assert!(!self.preparing, "job '{}': a preparing job fails by `prepared`", self.id());
        self.abort(failure)
    }

    /// The preparing is over. With success the pivot has happened and no cancel can take it back.
    pub fn prepared(&mut self, result: Result<(), JobFailure>, progress: Progress) -> Next {
        debug_assert!(self.preparing, "job '{}' was not preparing", self.id());
        self.preparing = false;
        match result {
            Ok(()) => {
                let position = self.position(progress);
                self.events.push(JobEvent::Completed { position, error: None });
                self.conclude()
            }
            Err(failure) => self.abort(failure),
        }
    }

    /// What an aborted job had made is undone.
    pub fn cleaned_up(&mut self, progress: Progress) -> Next {
        // A job that never started is not spoken of.
        if self.started {
            let position = self.position(progress);
            self.events.push(if self.force_cancelled {
                JobEvent::Cancelled(position)
            } else {
                let error = self.failure.as_ref().map(ToString::to_string);
                JobEvent::Completed { position, error }
            });
        }
        self.conclude()
    }

    // What the body reports.

    /// The body stands between two steps. True when it must stay there.
    pub fn reach_pause_point(&mut self) -> bool {
        if self.should_pause() {
            match self.status {
                Status::Running => self.enter(Status::Paused),
                Status::Ready => self.enter(Status::Standby),
                _ => {}
            }
        }
        self.status.is_paused()
    }

    /// The body goes on if nothing holds it any longer. True when it may.
    pub fn leave_pause_point(&mut self) -> bool {
        if !self.should_pause() {
            self.leave_pause();
        }
        !self.status.is_paused()
    }

    /// Source and target are alike.
    pub fn ready(&mut self, progress: Progress) {
        self.enter(Status::Ready);
        let position = self.position(progress);
        self.events.push(JobEvent::Ready(position));
    }

    /// A request failed with `errno` (positive). The answer is what the body has to do about it.
    ///
    /// Once the body is over no verb can resume a job. So a pending job does not stop: the range stays dirty and is
    /// tried again, and the last drain tells whether that helped.
    pub fn io_error(&mut self, operation: IoOperation, policy: OnError, errno: Errno) -> ErrorAction {
        let action = match policy.action(errno) {
            ErrorAction::Stop if !self.status.accepts(Verb::Resume) => ErrorAction::Ignore,
            action => action,
        };
        self.events.push(JobEvent::Error { device: self.options.id.clone(), operation, action });
        if action == ErrorAction::Stop {
            self.user_paused = true;
            self.io_status = self.io_status.stopped_by(errno);
        }
        action
    }

    /// The body is over. A job that was given up meanwhile fails, whatever its body says. A user's pause that came
    /// too late for the body's last pause point is void, since nothing could resume it any more.
    pub fn run_returned(&mut self, result: Result<(), JobFailure>) -> Next {
        self.leave_pause();
        self.clear_user_pause();
        match result {
            Err(failure) => self.abort(failure),
            Ok(()) if self.force_cancelled => self.abort(JobFailure::cancelled()),
            Ok(()) => {
                self.enter(Status::Waiting);
                if self.options.grouped {
                    return Next::AwaitGroup;
                }
                self.group_is_waiting();
                if self.options.auto_finalize { self.begin_prepare() } else { Next::AwaitFinalize }
            }
        }
    }

    // How it is done.

    fn cancel_now(&mut self, force: bool) -> Next {
        // Only a ready job has something worth finishing.
        let force = force || !self.status.is_ready();
        self.clear_user_pause();
        self.cancelled = true;
        self.force_cancelled |= force;
        if self.status.has_running_body() {
            Next::WindDown
        } else if self.preparing {
            Next::StopPreparing
        } else {
            self.abort(JobFailure::cancelled())
        }
    }

    fn clear_user_pause(&mut self) {
        if self.user_paused {
            self.user_paused = false;
            self.io_status = IoStatus::Ok;
        }
    }

    fn leave_pause(&mut self) {
        match self.status {
            Status::Paused => self.enter(Status::Running),
            Status::Standby => self.enter(Status::Ready),
            _ => {}
        }
    }

    fn abort(&mut self, failure: JobFailure) -> Next {
        self.failure = Some(failure);
        self.enter(Status::Aborting);
        Next::CleanUp
    }

    fn conclude(&mut self) -> Next {
        self.enter(Status::Concluded);
        if self.options.auto_dismiss || !self.started {
            self.enter(Status::Null);
            return Next::Gone;
        }
        Next::Concluded
    }

    /// The one place where the state changes. A step that the table forbids is a defect of the caller: it stops a
    /// test, and elsewhere it is refused, so that clients never see an arrow that does not exist.
    fn enter(&mut self, to: Status) {
        let from = self.status;
        debug_assert!(from.may_become(to), "job '{}' may not go from {from} to {to}", self.id());
        if !from.may_become(to) {
            tracing::error!(job = self.id(), %from, %to, "a job may not make this step");
            return;
        }
        self.status = to;
        if from != to {
            self.events.push(JobEvent::StatusChange { status: to, id: self.options.id.clone() });
        }
    }

    fn check_verb(&self, verb: Verb) -> Result<(), JobError> {
        if self.status.accepts(verb) { Ok(()) } else { Err(self.refusal(verb)) }
    }

    fn refusal(&self, verb: Verb) -> JobError {
        JobError::VerbNotAccepted { id: self.options.id.clone(), status: self.status, verb }
    }

    fn position(&self, progress: Progress) -> JobPosition {
        let speed_bytes_per_sec = self.options.speed_bytes_per_sec;
        JobPosition::new(&self.options.id, progress, speed_bytes_per_sec, self.options.job_type)
    }
}

/// Reads a limit as a client gives it, in bytes a second.
pub fn parse_speed(speed_bytes_per_sec: i64) -> Result<u64, JobError> {
    u64::try_from(speed_bytes_per_sec).map_err(|_| JobError::NegativeSpeed)
}

#[cfg(test)]
mod tests;
