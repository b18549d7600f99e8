//! Runs a job: stands between its body, its hands, its life cycle, and who gives the orders.
//!
//! One task a job. It waits until something happened, steps the body once an event, starts the
//! operations that the body asked for (each a task of its own), and passes reports to the life cycle.
//! All verbs are methods of [`Job`]; they change the life cycle at once and wake the task.
//!
//! # Pauses
//! A held job issues nothing new. When its last operation has ended it stands at a pause point (paused or
//! standby) until nothing holds it any longer.
//!
//! # The end
//! Force-cancel does not wait for operations in flight: they may be stuck in a dead device. Their tasks
//! hold source and target, locks included, until the last one has ended.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

use blockferry_ring::sync::{Notify, either};
use blockferry_ring::{Errno, Nanos, Ring};

use super::body::{Body, Context, Details, Event, Hands, Orders, Report};
use super::error::{JobError, JobFailure};
use super::event::{JobEvent, JobType};
use super::info::JobInfo;
use super::lifecycle::{JobOptions, Lifecycle, Next};
use super::policy::{CopyMode, ErrorAction, IoOperation, OnError};
use super::progress::Progress;
use super::status::Status;
use crate::base::bucket::{BucketGroup, GroupFull, Limiter};
use crate::block::patience::for_job;
use crate::graph::tracker::Tracker;

/// Error policies of a job's two sides.
#[derive(Clone, Copy, Debug, Default)]
pub struct ErrorPolicies {
    /// For reads of the source.
    pub source: OnError,
    /// For writes to the target, and its flush.
    pub target: OnError,
}

struct Shared {
    ring: Ring,
    life: RefCell<Lifecycle>,
    progress: Cell<Progress>,
    limiter: RefCell<Limiter>,
    policies: Cell<ErrorPolicies>,
    details: RefCell<Details>,
    in_flight: Cell<usize>,
    /// Something for the job's task to look at.
    wake: Notify,
    woken: Cell<bool>,
    events: RefCell<VecDeque<JobEvent>>,
    /// Told at every event.
    told: Notify,
    /// Preparing has been asked for.
    finalizing: Cell<bool>,
    copy_mode: Cell<CopyMode>,
    /// What knows of guests' changes, for a job that has it.
    tracker: RefCell<Option<Rc<Tracker>>>,
}

/// A handle of a job; clones are the same job.
#[derive(Clone)]
pub struct Job(Rc<Shared>);

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let life = self.0.life.borrow();
        write!(f, "Job({}, {})", life.id(), life.status())
    }
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// As promised; for a mirror: the target equals the source at a point in time.
    Completed,
    /// Given up; the target may be anything.
    Cancelled,
    /// Failed with this text.
    Failed(String),
}

impl Job {
    /// A job that is made and not started.
    pub fn new(ring: &Ring, options: JobOptions, policies: ErrorPolicies) -> Job {
        let limiter = Limiter::new(ring.now(), options.speed_bytes_per_sec);
        let job = Job(Rc::new(Shared {
            ring: ring.clone(),
            life: RefCell::new(Lifecycle::new(options)),
            progress: Cell::default(),
            limiter: RefCell::new(limiter),
            policies: Cell::new(policies),
            details: RefCell::default(),
            in_flight: Cell::new(0),
            wake: ring.notify(),
            woken: Cell::new(false),
            events: RefCell::default(),
            told: ring.notify(),
            finalizing: Cell::new(false),
            copy_mode: Cell::default(),
            tracker: RefCell::default(),
        }));
        job.0.publish();
        job
    }

    /// The list on which the job's task waits: a tracker notifies it when a guest changed something.
    pub fn waker(&self) -> Notify {
        self.0.wake.clone()
    }

    /// Starts the job's task.
    pub fn start<B, H>(&self, body: B, hands: Rc<H>)
    where
        B: Body + 'static,
        B::Op: 'static,
        H: Hands<B::Op, B::Outcome> + 'static,
    {
        self.0.life.borrow_mut().start();
        self.0.publish();
        let shared = self.0.clone();
        self.0.ring.spawn(run(shared, body, hands));
    }

    /// The making of the job failed after all: it goes without ever having been.
    pub fn abandon(&self) {
        let _ = self.0.life.borrow_mut().creation_failed();
        self.0.publish();
    }

    /// The job's id.
    pub fn id(&self) -> String {
        self.0.life.borrow().id().to_owned()
    }

    /// Where it stands.
    pub fn status(&self) -> Status {
        self.0.life.borrow().status()
    }

    /// The progress meter.
    pub fn progress(&self) -> Progress {
        self.0.progress.get()
    }

    /// What it does, in numbers.
    pub fn details(&self) -> Details {
        self.0.details.borrow().clone()
    }

    /// As `query-block-jobs` shows it.
    pub fn info(&self) -> JobInfo {
        let life = self.0.life.borrow();
        let busy =
            life.status().has_running_body() && !life.status().is_paused() && self.0.in_flight.get() > 0;
        let synced = (life.job_type() == JobType::Mirror).then(|| self.is_actively_synced());
        life.info(self.0.progress.get(), busy, synced)
    }

    /// The next event that nobody has taken.
    pub fn pop_event(&self) -> Option<JobEvent> {
        self.0.events.borrow_mut().pop_front()
    }

    /// Waits for the next event.
    pub async fn next_event(&self) -> JobEvent {
        self.0.told.until(|| self.pop_event()).await
    }

    /// Waits until `condition` gives a value; it is asked after every event.
    pub async fn until<T>(&self, condition: impl FnMut() -> Option<T>) -> T {
        self.0.told.until(condition).await
    }

    /// Waits until the job is ready, or over.
    pub async fn until_ready(&self) -> Status {
        self.until(|| {
            let status = self.status();
            (status.is_ready() || is_over(status)).then_some(status)
        })
        .await
    }

    /// Waits until the job is over.
    pub async fn until_over(&self) -> Ending {
        self.until(|| self.ending()).await
    }

    /// How it ended, if it is over.
    pub fn ending(&self) -> Option<Ending> {
        let life = self.0.life.borrow();
        is_over(life.status()).then(|| match life.failure() {
            None => Ending::Completed,
            Some(_) if life.is_force_cancelled() => Ending::Cancelled,
            Some(failure) => Ending::Failed(failure.to_string()),
        })
    }

    /// Verb `pause`.
    pub fn pause(&self) -> Result<(), JobError> {
        self.verb(Lifecycle::user_pause)
    }

    /// Verb `resume`.
    pub fn resume(&self) -> Result<(), JobError> {
        self.verb(Lifecycle::user_resume)
    }

    /// Verb `set-speed`, bytes a second, 0 for no limit. In force from this turn on.
    pub fn set_speed(&self, speed_bytes_per_sec: i64) -> Result<(), JobError> {
        self.verb(|life| life.set_speed(speed_bytes_per_sec).map(drop))?;
        let speed = self.0.life.borrow().speed_bytes_per_sec();
        self.0.limiter.borrow_mut().set_speed(self.0.ring.now(), speed);
        Ok(())
    }

    /// Comes under a limit that others share, beside its own ([`super::group`]).
    pub(super) fn join(&self, group: &BucketGroup) -> Result<(), GroupFull> {
        self.0.limiter.borrow_mut().join(group)?;
        self.look_again();
        Ok(())
    }

    /// Something changed that the job could not see.
    pub(super) fn look_again(&self) {
        self.0.kick();
    }

    /// Whether both are handles of one job.
    pub fn is_same(&self, other: &Job) -> bool {
        Rc::ptr_eq(&self.0, &other.0)
    }

    /// Verb `change`: how a mirror treats what guests change. In force from the next step on, in both directions.
    pub fn change_copy_mode(&self, mode: CopyMode) -> Result<(), JobError> {
        self.verb(|life| life.check_change())?;
        self.0.copy_mode.set(mode);
        self.0.kick();
        Ok(())
    }

    /// Every change by a guest that is acknowledged is on both sides by then, from now on and until this is false
    /// again.
    pub fn is_actively_synced(&self) -> bool {
        self.0.tracker.borrow().as_ref().is_some_and(|tracker| tracker.is_actively_synced())
    }

    /// How a mirror begins.
    pub(super) fn follows_guests(&self, mode: CopyMode, tracker: &Rc<Tracker>) {
        self.0.copy_mode.set(mode);
        *self.0.tracker.borrow_mut() = Some(tracker.clone());
    }

    /// Verb `complete`: pivot as soon as source and target are alike.
    pub fn complete(&self) -> Result<(), JobError> {
        self.verb(Lifecycle::request_complete)
    }

    /// Verb `cancel`.
    pub fn cancel(&self, force: bool) -> Result<(), JobError> {
        let next = self.0.life.borrow_mut().cancel(force)?;
        self.0.obey(next);
        Ok(())
    }

    /// Gives the job up because the engine ends. A job that is over is left alone.
    pub fn give_up(&self) {
        let next = self.0.life.borrow_mut().give_up();
        self.0.obey(next);
    }

    /// Verb `finalize`.
    pub fn finalize(&self) -> Result<(), JobError> {
        let next = self.0.life.borrow_mut().finalize()?;
        self.0.obey(next);
        Ok(())
    }

    /// Verb `dismiss`.
    pub fn dismiss(&self) -> Result<(), JobError> {
        self.verb(|life| life.dismiss().map(drop))
    }

    fn verb(&self, f: impl FnOnce(&mut Lifecycle) -> Result<(), JobError>) -> Result<(), JobError> {
        let result = f(&mut self.0.life.borrow_mut());
        self.0.publish();
        self.0.kick();
        result
    }
}

/// Nothing more will happen to a job in this state, except that it is forgotten.
fn is_over(status: Status) -> bool {
    matches!(status, Status::Concluded | Status::Null)
}

impl Shared {
    /// Has the job's task look at what changed.
    fn kick(&self) {
        self.woken.set(true);
        self.wake.notify();
    }

    /// Passes events on to those who wait for them.
    fn publish(&self) {
        let mut life = self.life.borrow_mut();
        let mut events = self.events.borrow_mut();
        while let Some(event) = life.pop_event() {
            let data = serde_json::to_string(&event).unwrap_or_default();
            tracing::debug!("Job '{}': {} {data}", life.id(), event.name());
            if events.len() >= crate::base::limits::JOB_EVENTS_KEPT_MAX {
                events.pop_front();
            }
            events.push_back(event);
        }
        self.told.notify();
    }

    /// What the life cycle wants done that the task must see to.
    fn obey(&self, next: Next) {
        match next {
            Next::Prepare => self.finalizing.set(true),
            Next::Continue
            | Next::WindDown
            | Next::AwaitGroup
            | Next::AwaitFinalize
            | Next::StopPreparing
            | Next::CleanUp
            | Next::Concluded
            | Next::Gone => {}
        }
        self.publish();
        self.kick();
    }

    fn orders(&self) -> Orders {
        let life = self.life.borrow();
        let running = life.status().has_running_body();
        Orders {
            hold: running && life.should_pause(),
            complete: life.complete_requested(),
            soft_cancel: life.cancel_requested() && !life.is_force_cancelled(),
            force_cancel: life.is_force_cancelled(),
            finalize: self.finalizing.get(),
            pending: life.status() == Status::Pending,
            copy_mode: self.copy_mode.get(),
        }
    }
}

/// Events that ended operations leave for the task.
struct Inbox<O> {
    events: RefCell<VecDeque<O>>,
}

async fn run<B, H>(shared: Rc<Shared>, mut body: B, hands: Rc<H>)
where
    B: Body + 'static,
    B::Op: 'static,
    H: Hands<B::Op, B::Outcome> + 'static,
{
    let inbox = Rc::new(Inbox { events: RefCell::new(VecDeque::with_capacity(64)) });
    let mut operations: Vec<B::Op> = Vec::with_capacity(64);
    let mut wake_at: Option<Nanos> = None;
    let mut event = Some(Event::Start);
    loop {
        let event = match event.take() {
            Some(event) => event,
            None => next(&shared, &inbox, wake_at.take()).await,
        };
        // A job that was given up while nothing of it ran (created, pending) is told here.
        if shared.life.borrow().status() == Status::Aborting {
            break;
        }
        pause_point(&shared, &body);
        let report = step(&shared, &mut body, event, &mut operations, &mut wake_at);
        for op in operations.drain(..) {
            start(&shared, &inbox, &hands, op);
        }
        shared.in_flight.set(body.in_flight());
        *shared.details.borrow_mut() = body.details();
        if let Some(report) = report {
            let report = match report {
                Report::Prepared(Ok(())) => Report::Prepared(commit(&shared, &*hands).await),
                report => report,
            };
            if tell(&shared, report) {
                break;
            }
        }
        pause_point(&shared, &body);
    }
    let forced = shared.life.borrow().is_force_cancelled();
    hands.clean_up(forced);
    if shared.life.borrow().status() == Status::Aborting {
        let _ = shared.life.borrow_mut().cleaned_up(shared.progress.get());
    }
    shared.publish();
}

/// Waits for an ended operation, a kick, or the time.
async fn next<O>(shared: &Rc<Shared>, inbox: &Rc<Inbox<O>>, wake_at: Option<Nanos>) -> Event<O> {
    let first = shared.wake.until(|| {
        if let Some(outcome) = inbox.events.borrow_mut().pop_front() {
            return Some(Event::Done(outcome));
        }
        shared.woken.take().then_some(Event::Wake)
    });
    // A tracker's notification wakes without a kick: the second poll below sees to it.
    let mut asked = false;
    let notified = std::future::poll_fn(|_| {
        if asked {
            return std::task::Poll::Ready(());
        }
        asked = true;
        shared.wake.register();
        std::task::Poll::Pending
    });
    let any = either(first, notified);
    match wake_at {
        Some(at) => match either(any, shared.ring.sleep_until(at)).await {
            blockferry_ring::sync::Either::First(blockferry_ring::sync::Either::First(event)) => event,
            _ => Event::Wake,
        },
        None => match any.await {
            blockferry_ring::sync::Either::First(event) => event,
            blockferry_ring::sync::Either::Second(()) => Event::Wake,
        },
    }
}

/// Between two steps: a held job with nothing in flight stands still; one that is free goes on.
fn pause_point<B: Body>(shared: &Shared, body: &B) {
    let mut life = shared.life.borrow_mut();
    if life.status().is_paused() {
        life.leave_pause_point();
    } else if body.in_flight() == 0 {
        life.reach_pause_point();
    }
    drop(life);
    shared.publish();
}

fn step<B: Body>(
    shared: &Shared,
    body: &mut B,
    event: Event<B::Outcome>,
    operations: &mut Vec<B::Op>,
    wake_at: &mut Option<Nanos>,
) -> Option<Report> {
    let mut report = None;
    let mut progress = shared.progress.get();
    let policies = shared.policies.get();
    let mut orders = shared.orders();
    orders.hold |= shared.life.borrow().status().is_paused();
    let mut on_error = |operation: IoOperation, errno: Errno| -> ErrorAction {
        let policy = match operation {
            IoOperation::Read => policies.source,
            IoOperation::Write => policies.target,
        };
        shared.life.borrow_mut().io_error(operation, policy, errno)
    };
    let mut limiter = shared.limiter.borrow_mut();
    body.step(
        &mut Context {
            now: shared.ring.now(),
            orders,
            limiter: &mut limiter,
            progress: &mut progress,
            operations,
            wake_at,
            report: &mut report,
            on_error: &mut on_error,
        },
        event,
    );
    drop(limiter);
    shared.progress.set(progress);
    shared.publish();
    report
}

fn start<Op: 'static, O: 'static, H: Hands<Op, O> + 'static>(
    shared: &Rc<Shared>,
    inbox: &Rc<Inbox<O>>,
    hands: &Rc<H>,
    op: Op,
) {
    let work = hands.perform(op);
    let (shared, inbox) = (shared.clone(), inbox.clone());
    let ring = shared.ring.clone();
    ring.spawn(async move {
        let outcome = for_job(work).await;
        inbox.events.borrow_mut().push_back(outcome);
        shared.wake.notify();
    });
}

/// Passes a report to the life cycle; true when the job is over.
fn tell(shared: &Shared, report: Report) -> bool {
    let progress = shared.progress.get();
    let next = match report {
        Report::Ready => {
            shared.life.borrow_mut().ready(progress);
            shared.publish();
            return false;
        }
        Report::Returned(result) => shared.life.borrow_mut().run_returned(result),
        Report::Prepared(result) => shared.life.borrow_mut().prepared(result, progress),
        Report::FailedPending(failure) => shared.life.borrow_mut().fail_pending(failure),
    };
    shared.obey(next);
    match next {
        // Everything is prepared already when finalizing is automatic: the body has drained and flushed.
        Next::Prepare => false,
        Next::CleanUp | Next::Concluded | Next::Gone => true,
        _ => false,
    }
}

/// The last point of a job, and what its end waits for after that.
async fn commit<Op, O, H: Hands<Op, O>>(shared: &Shared, hands: &H) -> Result<(), JobFailure> {
    let pivot = {
        let life = shared.life.borrow();
        life.complete_requested() && !life.cancel_requested()
    };
    hands.commit(pivot)?;
    // Whoever waits for a pivot, and not for the end, sees it before guests go on.
    shared.publish();
    if let Some(rest) = hands.committed() {
        let given_up = shared.wake.until(|| shared.life.borrow().is_force_cancelled().then_some(()));
        either(rest, given_up).await;
    }
    Ok(())
}
