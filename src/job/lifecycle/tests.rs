//! Lives of jobs, told as the events that clients hear: each line of the reference's event order, each verb in each
//! state, and random lives that must never take a step that the table forbids.

use super::*;
use crate::base::rng::Rng;

const EIO: Errno = Errno::EIO;
const ENOSPC: Errno = Errno::ENOSPC;

fn options() -> JobOptions {
    JobOptions { auto_finalize: false, auto_dismiss: false, ..JobOptions::new("j", JobType::Mirror) }
}

fn automatic() -> JobOptions {
    JobOptions::new("j", JobType::Mirror)
}

fn progress() -> Progress {
    let mut meter = Progress::new(4096);
    meter.done(4096);
    meter
}

/// A job whose body runs, its first events taken.
fn running(options: JobOptions) -> Lifecycle {
    let mut job = Lifecycle::new(options);
    job.start();
    assert_eq!(heard(&mut job), ["created", "running"]);
    job
}

fn ready(options: JobOptions) -> Lifecycle {
    let mut job = running(options);
    job.ready(progress());
    assert_eq!(heard(&mut job), ["ready", "BLOCK_JOB_READY"]);
    job
}

fn pending() -> Lifecycle {
    let mut job = ready(options());
    job.request_complete().unwrap();
    assert_eq!(job.run_returned(Ok(())), Next::AwaitFinalize);
    assert_eq!(heard(&mut job), ["waiting", "pending", "BLOCK_JOB_PENDING"]);
    job
}

/// Takes all events: a state by its name, anything else by the event's name and what it says of an error.
fn heard(job: &mut Lifecycle) -> Vec<String> {
    std::iter::from_fn(|| job.pop_event())
        .map(|event| match &event {
            JobEvent::StatusChange { status, .. } => status.to_string(),
            JobEvent::Completed { error: Some(error), .. } => format!("{}: {error}", event.name()),
            JobEvent::Error { operation, action, .. } => {
                format!("{}: {operation:?} {action:?}", event.name())
            }
            _ => event.name().to_owned(),
        })
        .collect()
}

fn say(job: &mut Lifecycle, verb: Verb) -> Result<(), JobError> {
    match verb {
        Verb::Cancel => job.cancel(true).map(drop),
        Verb::Pause => job.user_pause(),
        Verb::Resume => job.user_resume(),
        Verb::SetSpeed => job.set_speed(1).map(drop),
        Verb::Change => job.check_change(),
        Verb::Complete => job.request_complete(),
        Verb::Finalize => job.finalize().map(drop),
        Verb::Dismiss => job.dismiss().map(drop),
    }
}

#[test]
fn each_verb_in_each_state_does_what_the_reference_says() {
    // By the initials of the reference: undefined U, created C, running R, paused P, ready Y, standby S,
    // waiting W, pending D, aborting X, concluded E, null N.
    let initials = "UCRPYSWDXEN";
    let accepted = [
        ("cancel", "CRPYSWD"),
        ("pause", "CRPYS"),
        ("resume", "CRPYS"),
        ("set-speed", "CRPYS"),
        ("change", "CRPYS"),
        ("complete", "YS"),
        ("finalize", "D"),
        ("dismiss", "E"),
    ];
    let mut seen = 0;
    for (status, initial) in Status::ALL.into_iter().zip(initials.chars()) {
        for (verb, (name, states)) in Verb::ALL.into_iter().zip(accepted) {
            let mut job = Lifecycle::new(options());
            heard(&mut job);
            job.status = status;
            job.user_paused = verb == Verb::Resume;
            let answer = say(&mut job, verb);
            if states.contains(initial) {
                assert_eq!(answer, Ok(()), "{name} in {status}");
            } else {
                let text = format!("Job 'j' in state '{status}' cannot accept command verb '{name}'");
                assert_eq!(answer.unwrap_err().to_string(), text);
                assert_eq!(job.status(), status);
                assert_eq!(heard(&mut job), [""; 0], "a refused verb leaves no trace");
            }
            seen += 1;
        }
    }
    assert_eq!(seen, 11 * 8);
}

#[test]
fn a_whole_life_in_order() {
    let mut job = ready(automatic());
    job.request_complete().unwrap();
    assert_eq!(job.run_returned(Ok(())), Next::Prepare);
    assert_eq!(heard(&mut job), ["waiting", "pending"]);
    assert_eq!(job.prepared(Ok(()), progress()), Next::Gone);
    assert_eq!(heard(&mut job), ["BLOCK_JOB_COMPLETED", "concluded", "null"]);
}

#[test]
fn a_whole_life_by_hand() {
    let mut job = pending();
    assert_eq!(job.finalize(), Ok(Next::Prepare));
    assert_eq!(
        job.finalize().unwrap_err().to_string(),
        "Job 'j' in state 'pending' cannot accept command verb 'finalize'"
    );
    assert_eq!(heard(&mut job), [""; 0], "nothing is told while the job prepares");
    assert_eq!(job.prepared(Ok(()), progress()), Next::Concluded);
    assert_eq!(heard(&mut job), ["BLOCK_JOB_COMPLETED", "concluded"]);
    assert_eq!(job.dismiss(), Ok(Next::Gone));
    assert_eq!(heard(&mut job), ["null"]);
}

#[test]
fn events_carry_where_the_job_stood() {
    let mut job = Lifecycle::new(JobOptions { speed_bytes_per_sec: 9, ..options() });
    job.start();
    let mut meter = Progress::new(100);
    meter.done(100);
    job.ready(meter);
    let told = std::iter::from_fn(|| job.pop_event()).last();
    assert_eq!(told, Some(JobEvent::Ready(JobPosition::new("j", meter, 9, JobType::Mirror))));
    assert_eq!(job.set_speed(20), Ok(true));
    assert_eq!(job.run_returned(Err(JobFailure::from_errno(EIO))), Next::CleanUp);
    meter.add_remaining(50);
    assert_eq!(job.cleaned_up(meter), Next::Concluded);
    let told: Vec<_> = std::iter::from_fn(|| job.pop_event()).collect();
    let position =
        JobPosition { device: "j".into(), len: 150, offset: 100, speed: 20, job_type: JobType::Mirror };
    assert_eq!(told[1], JobEvent::Completed { position, error: Some("Input/output error".into()) });
}

#[test]
fn a_failing_body_ends_with_its_reason() {
    let mut job = running(options());
    let sizes = JobFailure::with_text(Errno::EINVAL, "Source and target image have different sizes");
    assert_eq!(job.run_returned(Err(sizes)), Next::CleanUp);
    assert_eq!(heard(&mut job), ["aborting"]);
    assert_eq!(job.cleaned_up(progress()), Next::Concluded);
    assert_eq!(
        heard(&mut job),
        ["BLOCK_JOB_COMPLETED: Source and target image have different sizes", "concluded"]
    );
    let info = job.info(progress(), false, None);
    assert_eq!(info.error.as_deref(), Some("Source and target image have different sizes"));
    assert_eq!((info.status, info.ready, info.paused), (Status::Concluded, false, false));
}

#[test]
fn a_failing_pivot_takes_the_job_down() {
    let mut job = pending();
    assert_eq!(job.finalize(), Ok(Next::Prepare));
    assert_eq!(job.prepared(Err(JobFailure::from_errno(Errno::EPERM)), progress()), Next::CleanUp);
    assert_eq!(job.cleaned_up(progress()), Next::Concluded);
    assert_eq!(heard(&mut job), ["aborting", "BLOCK_JOB_COMPLETED: Operation not permitted", "concluded"]);
}

#[test]
fn a_failing_creation_goes_without_a_word_on_its_result() {
    let mut job = Lifecycle::new(options());
    assert_eq!(job.creation_failed(), Next::Gone);
    assert_eq!(heard(&mut job), ["created", "null"]);
}

#[test]
fn cancel_before_ready_is_always_by_force() {
    for force in [false, true] {
        let mut job = running(automatic());
        assert_eq!(job.cancel(force), Ok(Next::WindDown));
        assert!(job.is_force_cancelled());
        assert_eq!(job.run_returned(Ok(())), Next::CleanUp);
        assert_eq!(job.cleaned_up(progress()), Next::Gone);
        assert_eq!(heard(&mut job), ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]);
        assert_eq!(job.failure().unwrap().to_string(), "Operation canceled");
    }
}

#[test]
fn cancel_before_the_start_concludes_without_a_result_event() {
    let mut job = Lifecycle::new(options());
    assert_eq!(job.cancel(false), Ok(Next::CleanUp));
    assert_eq!(job.cleaned_up(progress()), Next::Gone);
    assert_eq!(heard(&mut job), ["created", "aborting", "concluded", "null"]);
}

#[test]
fn a_soft_cancel_of_a_ready_job_completes_without_pivot() {
    let mut job = ready(automatic());
    assert_eq!(job.cancel(false), Ok(Next::WindDown));
    assert!(job.cancel_requested() && !job.is_force_cancelled());
    assert_eq!(
        job.request_complete().unwrap_err().to_string(),
        "The active block job 'j' cannot be completed"
    );
    assert_eq!(job.run_returned(Ok(())), Next::Prepare);
    assert!(job.cancel_requested(), "the owner sees that it must not pivot");
    assert_eq!(job.prepared(Ok(()), progress()), Next::Gone);
    assert_eq!(heard(&mut job), ["waiting", "pending", "BLOCK_JOB_COMPLETED", "concluded", "null"]);
}

#[test]
fn force_outranks_an_earlier_and_a_later_soft_cancel() {
    let mut job = ready(automatic());
    for force in [false, true, false] {
        assert_eq!(job.cancel(force), Ok(Next::WindDown));
    }
    assert!(job.is_force_cancelled());
    assert_eq!(job.run_returned(Err(JobFailure::from_errno(EIO))), Next::CleanUp);
    assert_eq!(job.cleaned_up(progress()), Next::Gone);
    assert_eq!(heard(&mut job), ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]);
}

#[test]
fn cancel_of_a_pending_job_gives_it_up() {
    for force in [false, true] {
        let mut job = pending();
        assert_eq!(job.cancel(force), Ok(Next::CleanUp));
        assert_eq!(job.cleaned_up(progress()), Next::Concluded);
        assert_eq!(heard(&mut job), ["aborting", "BLOCK_JOB_CANCELLED", "concluded"]);
    }
}

#[test]
fn cancel_of_a_preparing_job_leaves_the_word_to_the_pivot() {
    let outcomes = [
        (Ok(()), vec!["BLOCK_JOB_COMPLETED", "concluded"]),
        (Err(JobFailure::cancelled()), vec!["aborting", "BLOCK_JOB_CANCELLED", "concluded"]),
    ];
    for (outcome, told) in outcomes {
        let mut job = pending();
        assert_eq!(job.finalize(), Ok(Next::Prepare));
        assert_eq!(job.cancel(true), Ok(Next::StopPreparing));
        if job.prepared(outcome, progress()) == Next::CleanUp {
            assert_eq!(job.cleaned_up(progress()), Next::Concluded);
        }
        assert_eq!(heard(&mut job), told);
    }
}

#[test]
fn cancel_of_a_paused_job_needs_force_and_lets_it_go_on() {
    let mut job = running(automatic());
    assert_eq!(job.io_error(IoOperation::Read, OnError::Stop, EIO), ErrorAction::Stop);
    assert!(job.reach_pause_point());
    assert_eq!(
        job.cancel(false).unwrap_err().to_string(),
        "The block job for device 'j' is currently paused"
    );
    assert_eq!(job.cancel(true), Ok(Next::WindDown));
    assert_eq!((job.is_user_paused(), job.io_status()), (false, IoStatus::Ok));
    assert!(job.leave_pause_point());
    assert_eq!(job.run_returned(Ok(())), Next::CleanUp);
    assert_eq!(job.cleaned_up(progress()), Next::Gone);
    let told = [
        "BLOCK_JOB_ERROR: Read Stop",
        "paused",
        "running",
        "aborting",
        "BLOCK_JOB_CANCELLED",
        "concluded",
        "null",
    ];
    assert_eq!(heard(&mut job), told);
}

#[test]
fn a_given_up_job_is_not_held_by_a_drain() {
    let mut job = ready(automatic());
    job.drain_pause();
    assert!(job.reach_pause_point());
    assert_eq!(job.cancel(false), Ok(Next::WindDown));
    assert!(!job.leave_pause_point(), "a soft cancel waits for the drain's end");
    assert_eq!(job.cancel(true), Ok(Next::WindDown));
    assert!(job.leave_pause_point());
    assert_eq!(heard(&mut job), ["standby", "ready"]);
}

#[test]
fn giving_up_leaves_what_is_over_alone() {
    let mut job = pending();
    assert_eq!(job.give_up(), Next::CleanUp);
    assert_eq!(job.give_up(), Next::Continue);
    assert_eq!(job.cleaned_up(progress()), Next::Concluded);
    assert_eq!(job.give_up(), Next::Continue);
    let mut paused = ready(automatic());
    paused.user_pause().unwrap();
    assert_eq!(paused.give_up(), Next::WindDown);
    assert!(!paused.should_pause());
}

#[test]
fn pausing_counts_its_holders() {
    let mut job = Lifecycle::new(options());
    assert_eq!(job.pause_count(), 1);
    job.user_pause().unwrap();
    assert_eq!(job.user_pause().unwrap_err().to_string(), "Job is already paused");
    job.start();
    assert_eq!(job.pause_count(), 1, "the start takes back its own hold and no other");
    job.drain_pause();
    job.drain_pause();
    assert!(job.reach_pause_point());
    assert_eq!(job.pause_count(), 3);
    assert!(job.info(progress(), false, None).paused);

    job.user_resume().unwrap();
    let again = job.user_resume().unwrap_err();
    assert_eq!(again.to_string(), "Can't resume a job that was not paused");
    job.drain_resume();
    assert!(!job.leave_pause_point());
    job.drain_resume();
    assert!(job.leave_pause_point());
    assert_eq!(heard(&mut job), ["created", "running", "paused", "running"]);
}

#[test]
fn a_hold_shows_only_at_a_pause_point() {
    let mut job = ready(options());
    job.drain_pause();
    job.drain_resume();
    assert!(!job.reach_pause_point());
    assert_eq!(heard(&mut job), [""; 0]);
    job.drain_pause();
    assert!(job.reach_pause_point() && job.reach_pause_point());
    job.drain_resume();
    assert!(job.leave_pause_point() && job.leave_pause_point());
    assert_eq!(heard(&mut job), ["standby", "ready"]);
}

#[test]
fn complete_while_held_takes_effect_later() {
    let mut job = ready(options());
    job.user_pause().unwrap();
    assert!(job.reach_pause_point());
    job.request_complete().unwrap();
    job.request_complete().unwrap();
    assert!(job.complete_requested() && job.should_pause());
    job.user_resume().unwrap();
    assert!(job.leave_pause_point());
    assert_eq!(job.run_returned(Ok(())), Next::AwaitFinalize);
    let told = ["standby", "ready", "waiting", "pending", "BLOCK_JOB_PENDING"];
    assert_eq!(heard(&mut job), told);
}

#[test]
fn a_type_without_complete_or_change_says_so() {
    let mut job = ready(JobOptions { completable: false, job_type: JobType::Commit, ..options() });
    assert!(matches!(job.request_complete(), Err(JobError::CannotComplete { .. })));
    assert_eq!(job.check_change().unwrap_err().to_string(), "Job type does not support change");
    assert_eq!(ready(options()).check_change(), Ok(()));
}

#[test]
fn a_raised_or_lifted_limit_wakes_a_sleeper() {
    let mut job = running(options());
    assert_eq!(job.set_speed(100), Ok(true));
    assert_eq!(job.set_speed(50), Ok(false));
    assert_eq!(job.set_speed(50), Ok(false));
    assert_eq!(job.set_speed(51), Ok(true));
    assert_eq!(job.set_speed(0), Ok(true));
    let negative = job.set_speed(-1).unwrap_err();
    assert_eq!(negative.to_string(), "Parameter 'speed' expects a non-negative value");
    assert_eq!(job.speed_bytes_per_sec(), 0);
    assert_eq!(job.set_speed(i64::MAX), Ok(true));
}

#[test]
fn stop_pauses_once_and_a_resume_forgets_the_error() {
    let mut job = running(options());
    assert_eq!(job.io_error(IoOperation::Write, OnError::Enospc, ENOSPC), ErrorAction::Stop);
    assert_eq!(job.io_error(IoOperation::Write, OnError::Stop, EIO), ErrorAction::Stop);
    assert_eq!((job.pause_count(), job.io_status()), (1, IoStatus::Nospace));
    assert!(job.reach_pause_point());
    job.user_resume().unwrap();
    assert_eq!((job.pause_count(), job.io_status()), (0, IoStatus::Ok));
    assert!(job.leave_pause_point());
    let stopped = "BLOCK_JOB_ERROR: Write Stop";
    assert_eq!(heard(&mut job), [stopped, stopped, "paused", "running"]);
}

#[test]
fn report_fails_after_its_event() {
    let mut job = running(automatic());
    assert_eq!(job.io_error(IoOperation::Read, OnError::Enospc, EIO), ErrorAction::Report);
    assert_eq!((job.pause_count(), job.io_status()), (0, IoStatus::Ok));
    assert_eq!(job.run_returned(Err(JobFailure::from_errno(EIO))), Next::CleanUp);
    assert_eq!(job.cleaned_up(progress()), Next::Gone);
    let told = [
        "BLOCK_JOB_ERROR: Read Report",
        "aborting",
        "BLOCK_JOB_COMPLETED: Input/output error",
        "concluded",
        "null",
    ];
    assert_eq!(heard(&mut job), told);
}

#[test]
fn a_pending_job_tries_again_instead_of_stopping() {
    let mut job = pending();
    assert_eq!(job.io_error(IoOperation::Write, OnError::Stop, EIO), ErrorAction::Ignore);
    assert_eq!((job.pause_count(), job.io_status()), (0, IoStatus::Ok));
    assert_eq!(job.io_error(IoOperation::Write, OnError::Report, EIO), ErrorAction::Report);
    assert_eq!(job.fail_pending(JobFailure::from_errno(EIO)), Next::CleanUp);
    assert_eq!(job.cleaned_up(progress()), Next::Concluded);
    let told = [
        "BLOCK_JOB_ERROR: Write Ignore",
        "BLOCK_JOB_ERROR: Write Report",
        "aborting",
        "BLOCK_JOB_COMPLETED: Input/output error",
        "concluded",
    ];
    assert_eq!(heard(&mut job), told);
}

#[test]
fn a_pause_that_came_too_late_does_not_linger() {
    let mut job = ready(options());
    job.user_pause().unwrap();
    assert_eq!(job.run_returned(Ok(())), Next::AwaitFinalize);
    assert!(!job.info(progress(), false, None).paused);
}

#[test]
fn members_of_a_group_wait_for_each_other() {
    let grouped = || JobOptions { grouped: true, ..automatic() };
    let mut job = running(grouped());
    assert_eq!(job.run_returned(Ok(())), Next::AwaitGroup);
    assert_eq!(heard(&mut job), ["waiting"]);
    job.group_is_waiting();
    assert_eq!(job.begin_prepare(), Next::Prepare);
    assert_eq!(job.prepared(Ok(()), progress()), Next::Gone);
    assert_eq!(heard(&mut job), ["pending", "BLOCK_JOB_COMPLETED", "concluded", "null"]);

    let mut failed_with_another = running(grouped());
    assert_eq!(failed_with_another.run_returned(Ok(())), Next::AwaitGroup);
    assert_eq!(failed_with_another.give_up(), Next::CleanUp);
    assert_eq!(failed_with_another.cleaned_up(progress()), Next::Gone);
    let told = ["waiting", "aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"];
    assert_eq!(heard(&mut failed_with_another), told);
}

/// What a life draws.
struct Draws(Rng);

impl Draws {
    fn below(&mut self, bound: usize) -> usize {
        self.0.below(bound as u64) as usize
    }

    fn coin(&mut self) -> bool {
        self.below(2) == 0
    }
}

/// One step that the owner or the body may make now, or one verb, welcome or not.
fn random_step(job: &mut Lifecycle, draws: &mut Draws) {
    match draws.below(12) {
        0 | 1 => drop(say(job, Verb::ALL[draws.below(Verb::ALL.len())])),
        2 => drop(job.cancel(false)),
        3 if job.drains < 4 => job.drain_pause(),
        4 if job.drains > 0 => job.drain_resume(),
        5 => random_error(job, draws),
        _ => random_turn(job, draws),
    }
}

/// A failed request of a body, or of a mirror that follows while it is pending.
fn random_error(job: &mut Lifecycle, draws: &mut Draws) {
    let pending = job.status() == Status::Pending && !job.preparing;
    if !pending && !job.status().has_running_body() {
        return;
    }
    let policies = [OnError::Report, OnError::Ignore, OnError::Stop, OnError::Enospc];
    let (policy, errno) = (policies[draws.below(4)], [EIO, ENOSPC][draws.below(2)]);
    if job.io_error(IoOperation::Write, policy, errno) == ErrorAction::Report {
        let failure = JobFailure::from_errno(errno);
        let _ = if pending { job.fail_pending(failure) } else { job.run_returned(Err(failure)) };
    }
}

/// What the owner or the body of a job in this state would do next.
fn random_turn(job: &mut Lifecycle, draws: &mut Draws) {
    let result = if draws.coin() { Ok(()) } else { Err(JobFailure::from_errno(EIO)) };
    let _ = match job.status() {
        Status::Created if draws.below(4) == 0 => job.creation_failed(),
        Status::Created => {
            job.start();
            Next::Continue
        }
        Status::Paused | Status::Standby => {
            job.leave_pause_point();
            Next::Continue
        }
        Status::Running | Status::Ready if job.reach_pause_point() => Next::Continue,
        Status::Running if draws.coin() => {
            job.ready(progress());
            Next::Continue
        }
        Status::Running | Status::Ready if draws.below(4) == 0 => job.run_returned(result),
        Status::Waiting => {
            job.group_is_waiting();
            Next::AwaitGroup
        }
        Status::Pending if job.preparing => job.prepared(result, progress()),
        Status::Pending if job.options.auto_finalize => job.begin_prepare(),
        Status::Aborting => job.cleaned_up(progress()),
        _ => Next::Continue,
    };
}

/// What holds for the events of any life, however it went.
fn check_story(told: &[JobEvent], seed: u64) {
    let mut status = Status::Undefined;
    let mut results = 0;
    for (index, event) in told.iter().enumerate() {
        let expected = match event {
            JobEvent::StatusChange { status: to, .. } => {
                assert!(status.may_become(*to) && status != *to, "seed {seed}: {status} to {to}");
                status = *to;
                status
            }
            JobEvent::Ready(_) => Status::Ready,
            JobEvent::Pending { .. } | JobEvent::Completed { error: None, .. } => Status::Pending,
            JobEvent::Completed { error: Some(_), .. } | JobEvent::Cancelled(_) => Status::Aborting,
            JobEvent::Error { .. } => status,
        };
        assert_eq!(status, expected, "seed {seed}: {}", event.name());
        if matches!(event, JobEvent::Completed { .. } | JobEvent::Cancelled(_)) {
            results += 1;
            let concluded = JobEvent::StatusChange { status: Status::Concluded, id: "j".into() };
            assert_eq!(told.get(index + 1), Some(&concluded), "seed {seed}");
        }
    }
    let started = told.contains(&JobEvent::StatusChange { status: Status::Running, id: "j".into() });
    let over = matches!(status, Status::Concluded | Status::Null);
    assert_eq!(results, usize::from(started && over), "seed {seed}: one result a life");
}

#[test]
fn no_random_life_makes_an_illegal_step() {
    let mut ended = 0;
    let mut states_seen = std::collections::BTreeSet::new();
    for seed in 1..=3000_u64 {
        let mut draws = Draws(Rng::new(seed));
        let mut job = Lifecycle::new(JobOptions {
            auto_finalize: draws.coin(),
            auto_dismiss: draws.coin(),
            completable: draws.coin(),
            grouped: draws.coin(),
            ..automatic()
        });
        let mut told = Vec::new();
        for _ in 0..60 {
            random_step(&mut job, &mut draws);
            states_seen.insert(job.status().name());
            told.extend(std::iter::from_fn(|| job.pop_event()));
        }
        check_story(&told, seed);
        ended += usize::from(job.status() == Status::Null);
    }
    assert_eq!(states_seen.len(), Status::ALL.len() - 1, "{states_seen:?}");
    assert!(ended > 1000, "only {ended} lives came to their end");
}
