//! Directs a life: jobs one after the other, what users do to them, and that each comes to its end.
//!
//! A job may be paused, stopped by an error, slowed down or refused at random. What must never happen is that
//! it hangs: when it has not become ready or ended after a while, the world is healed, the limits are lifted
//! and pauses are taken back ([`rescue`]), and then it has to end within bounded virtual time. A force-cancel
//! has to end it at once, healed or not.

use std::rc::Rc;

use blockferry::export::nbd::NbdServer;
use blockferry::graph::node::Role;
use blockferry::job::event::JobEvent;
use blockferry::job::mirror::verify::Verifier;
use blockferry::job::mirror::{self, Marker, MirrorOptions, SyncMode};
use blockferry::job::policy::ErrorAction;
use blockferry::job::runner::{ErrorPolicies, Job};
use blockferry::job::status::Status;
use blockferry::protocol::mark::{MarkInfo, TargetMark};
use blockferry::protocol::nbd::NbdDriver;

use super::disk::{Disk, STATE_DIR, SimMarker};
use super::guest;
use super::nbd;
use super::plan::{Ending, JobPlan, SECOND, Verb, log_range};
use super::rig::{Rig, Venture};
use super::watch;
use super::world;

/// How long a job is left alone before it is helped.
const PATIENCE: u64 = 5 * SECOND;
/// How long it may take when nothing is wrong any more.
const BOUND: u64 = 120 * SECOND;
/// How long a force-cancel may take.
const FORCE_BOUND: u64 = SECOND / 100;

/// The whole life.
pub async fn direct(rig: Rc<Rig>) {
    if rig.plan.has_remote_guests()
        && let Err(what) = nbd::serve(&rig)
    {
        rig.fail(format!("no NBD server: {what}"));
    }
    guest::start_all(&rig);
    for (index, plan) in rig.plan.jobs.clone().into_iter().enumerate() {
        run_job(&rig, index, &plan).await;
    }
    rig.world.heal();
    rig.stop();
    let all_gone = rig.go.until(|| (rig.guests.get() == 0).then_some(()));
    if rig.within(BOUND, all_gone).await.is_none() {
        rig.fail(format!("{} tasks of guests do not end", rig.guests.get()));
    }
    // The guests' server is the first one, if there is one; the others serve targets, perhaps the one in use.
    let servers = rig.servers.take();
    let (guests, targets) = servers.split_at(servers.len().min(rig.plan.has_remote_guests().into()));
    stop(&rig, guests).await;
    rig.lost.settle(&rig);
    watch::check_retired(&rig);
    for root in rig.roots() {
        if rig.world.fault_counts().errors == 0 {
            guest::read_all(&rig, &root).await;
        }
        if root.parked() > 0 {
            rig.fail("requests still wait at an open door");
        }
    }
    stop(&rig, targets).await;
    rig.done.set(true);
}

async fn stop(rig: &Rig, servers: &[NbdServer]) {
    for server in servers {
        if rig.within(BOUND, server.stop()).await.is_none() {
            rig.fail(format!("an NBD server does not stop: {} clients", server.clients()));
        }
    }
}

async fn run_job(rig: &Rc<Rig>, index: usize, plan: &JobPlan) {
    let source = rig.current.borrow().clone();
    watch::check_retired(rig);
    let target = match world::make_target(rig, plan).await {
        Ok(target) => target,
        Err(what) => return rig.fail(what),
    };
    rig.rescued.set(false);
    world::set_faults(rig, &source, &target);
    rig.count("jobs");
    rig.say(|| format!("job {index} from {} to {}", source.path, target.path));
    rig.grant(plan.requests[0]);
    *rig.venture.borrow_mut() = Some(Venture {
        job: None,
        source: source.clone(),
        target: target.clone(),
        target_before: rig.live(&target),
        since: 0,
        whole: plan.sync != SyncMode::None,
        settled: None,
        asked_complete: false,
        asked_end: false,
        verifier: None,
        pivoted: false,
    });
    let options = options(rig, plan, &target);
    if let Some(venture) = &mut *rig.venture.borrow_mut() {
        venture.verifier = options.verifier.clone();
    }
    let job = match mirror::start(&rig.ring, &source.node, &target.node, options).await {
        Ok(job) => job,
        Err(error) => return rig.fail(format!("a mirror did not start: {error}")),
    };
    if let Some(venture) = &mut *rig.venture.borrow_mut() {
        venture.job = Some(job.clone());
        // What begins from now on is tracked for certain.
        venture.since = rig.model.borrow_mut().next();
    }
    let judged = rig.ring.spawn_with_result(watch::watch(rig.clone(), job.clone()));
    rig.ring.spawn(listen(rig.clone(), job.clone()));
    rig.ring.spawn(finalize(rig.clone(), job.clone()));
    for (at, verb) in plan.verbs.iter().copied() {
        let (rig2, job) = (rig.clone(), job.clone());
        rig.ring.spawn(async move {
            rig2.ring.sleep(at).await;
            if !rig2.rescued.get() {
                act(&rig2, &job, verb);
            }
        });
    }
    for at in rig.plan.looks.iter().copied() {
        let rig2 = rig.clone();
        rig.ring.spawn(async move {
            rig2.ring.sleep(at).await;
            watch::look(&rig2);
        });
    }
    see_it_through(rig, plan, &job, &target).await;
    if job.ending().is_none() {
        // That is written down already.
        return;
    }
    judged.take().await;
    clear_up(rig, plan, &job, &source, &target).await;
}

fn options(rig: &Rc<Rig>, plan: &JobPlan, target: &Disk) -> MirrorOptions {
    let mut options = MirrorOptions::new("move");
    options.sync = plan.sync;
    options.granularity = plan.granularity;
    options.buf_size = plan.buf_size;
    options.speed = plan.speed;
    options.detect_zeroes = plan.detect_zeroes;
    options.auto_finalize = plan.auto_finalize;
    options.auto_dismiss = plan.auto_dismiss;
    options.allow_larger_target = true;
    options.copy_mode = plan.copy_mode;
    options.on_divergence = plan.on_divergence;
    options.guest_first = plan.guest_first;
    options.downtime_nanos_max = plan.downtime_nanos_max;
    options.deadline_nanos = plan.deadline_nanos;
    options.policies = ErrorPolicies { source: plan.on_source_error, target: plan.on_target_error };
    let (rig2, ambush) = (rig.clone(), plan.ambush);
    let info = MarkInfo::incomplete("mirror", &rig.current.borrow().path);
    options.marker = Some(Box::new(SimMarker {
        mark: TargetMark::new(&rig.ring, target.node.driver().clone(), Some(STATE_DIR.into()), info),
        before_unmark: Rc::new(move || last_moments(&rig2, ambush)),
    }) as Box<dyn Marker>);
    if plan.verify && plan.sync != SyncMode::None {
        let source = rig.current.borrow().node.driver().clone();
        match Verifier::new(&rig.ring, &source, target.node.driver()) {
            Ok(verifier) => {
                rig.count("verifications");
                options.verifier = Some(verifier);
            }
            Err(error) => rig.fail(format!("no verifier: {error}")),
        }
    }
    options
}

/// The door is shut and the mark is about to go: clients come, users change their minds.
fn last_moments(rig: &Rc<Rig>, ambush: Option<(u64, Verb)>) {
    rig.shut.notify();
    watch::settle(rig);
    let job = rig.venture.borrow().as_ref().and_then(|venture| venture.job.clone());
    if let (Some((after, verb)), Some(job)) = (ambush, job) {
        let rig2 = rig.clone();
        rig.ring.spawn(async move {
            rig2.ring.sleep(after).await;
            if act(&rig2, &job, verb) {
                rig2.count("verbs in a job's last moments");
            }
        });
    }
}

/// Waits until the job is ready, lets it be for a while, ends it as planned.
async fn see_it_through(rig: &Rc<Rig>, plan: &JobPlan, job: &Job, target: &Disk) {
    if rig.within(PATIENCE, job.until_ready()).await.is_none() {
        if gave_up(rig, job, target).await {
            return;
        }
        rescue(rig, job, target);
        if rig.within(BOUND, job.until_ready()).await.is_none() && !gave_up(rig, job, target).await {
            rig.fail(format!("a job does not become ready in a healthy world: {}", state(job)));
            return;
        }
    }
    rig.grant(plan.requests[1]);
    rig.ring.sleep(plan.ready_nanos).await;
    rig.grant(plan.requests[2]);
    // The end comes into the midst of these.
    let wait = rig.fork_rng().below(200_000);
    rig.ring.sleep(wait).await;
    match plan.ending {
        Ending::Complete if plan.sync != SyncMode::None => ask(rig, job, Verb::Complete).await,
        Ending::Complete | Ending::SoftCancel => ask(rig, job, Verb::SoftCancel).await,
        Ending::ForceCancel => ask(rig, job, Verb::ForceCancel).await,
        Ending::Quit => ask(rig, job, Verb::Quit).await,
        Ending::HangAndForceCancel => return hang_and_cancel(rig, job, target).await,
        Ending::HangSourceAndComplete(span) => {
            hang_source(rig, span);
            let whole = plan.sync != SyncMode::None;
            ask(rig, job, if whole { Verb::Complete } else { Verb::SoftCancel }).await;
        }
    }
    let forced = matches!(plan.ending, Ending::ForceCancel | Ending::Quit);
    let patience = match plan.ending {
        _ if forced => FORCE_BOUND,
        // The drain is given up after a minute, and tried again or not.
        Ending::HangSourceAndComplete(span) => PATIENCE + span,
        _ => PATIENCE,
    };
    if rig.within(patience, job.until_over()).await.is_some() {
        return;
    }
    if forced {
        return rig.fail(format!("a job that was given up does not end: {}", state(job)));
    }
    if gave_up(rig, job, target).await {
        return;
    }
    rescue(rig, job, target);
    if rig.within(BOUND, job.until_over()).await.is_none() && !gave_up(rig, job, target).await {
        rig.fail(format!("a job does not end in a healthy world: {}", state(job)));
    }
}

fn state(job: &Job) -> String {
    format!("{}, {:?}, {:?}", job.status(), job.progress(), job.details())
}

/// A verb that may be refused for the moment, because the job is paused.
async fn ask(rig: &Rc<Rig>, job: &Job, verb: Verb) {
    for _ in 0..100 {
        if act(rig, job, verb) || job.ending().is_some() {
            return;
        }
        let _ = job.resume();
        rig.ring.sleep(SECOND / 1000).await;
    }
}

/// A target that no healing helps leaves no end but the force-cancel.
async fn gave_up(rig: &Rc<Rig>, job: &Job, target: &Disk) -> bool {
    if !target.is_beyond_help() {
        return false;
    }
    act(rig, job, Verb::ForceCancel);
    rig.within(FORCE_BOUND, job.until_over()).await.is_some()
}

/// The source's device stops answering for a while, then a user wants to complete. The drain must give up in time.
fn hang_source(rig: &Rc<Rig>, span: u64) {
    rig.has_hung.set(true);
    let path = rig.current.borrow().path.clone();
    rig.world.hang(&path);
    let rig2 = rig.clone();
    rig.ring.spawn(async move {
        rig2.ring.sleep(span).await;
        rig2.world.release(&path);
    });
}

/// The target's device dies. The job must go at once; guests must not notice, before it goes and after.
async fn hang_and_cancel(rig: &Rc<Rig>, job: &Job, target: &Disk) {
    if rig.world.fault_counts().errors == 0 && rig.plan.seed.is_multiple_of(2) {
        // With the last drain under way, or about to be.
        act(rig, job, Verb::Complete);
    }
    rig.world.hang(&target.path);
    let stream = target.remote.as_ref().map(|(socket, _)| format!("unix:{socket}"));
    if let Some(stream) = &stream {
        rig.world.hang(stream);
    }
    let wait = log_range(&mut rig.fork_rng(), 1_000, SECOND / 20);
    rig.ring.sleep(wait).await;
    let given_up = act(rig, job, Verb::ForceCancel);
    if rig.within(FORCE_BOUND, job.until_over()).await.is_none() {
        rig.fail(format!("a job with a dead target does not end when it is given up: {}", state(job)));
    }
    let root = rig.root.borrow().clone();
    let on_target = root.as_ref().is_some_and(|root| Rc::ptr_eq(&root.node(), &target.node));
    if let Some(root) = root.filter(|_| !on_target) {
        let reaches = async {
            let buf = rig.ring.alloc(rig.plan.cell).await;
            root.read(0, buf).await
        };
        if rig.within(BOUND, reaches).await.is_none() {
            rig.fail("guests wait for a job that was given up");
        }
    }
    let Some((_, driver)) = target.remote.as_ref().filter(|_| !on_target) else {
        // A kernel file holds what is in flight.
        return rig.world.release("");
    };
    if given_up {
        // A connection is cut.
        if rig.within(BOUND, is_free(rig, target)).await.is_none() {
            rig.fail("a dead server holds the target of a job that was given up");
        }
    } else {
        hold_while_in_flight(rig, target, driver).await;
    }
    rig.world.release("");
}

/// A job that failed by itself, a moment before its server died, was not given up by anybody: what guests had sent to
/// both sides goes on, may land late, and keeps the target from the next job for exactly as long as it is in flight. (For how
/// long that is, `tests/sim/nbd_node` tells: these connections have no time-out.)
async fn hold_while_in_flight(rig: &Rc<Rig>, target: &Disk, driver: &NbdDriver) {
    let (began, mut was_held) = (rig.ring.clock(), false);
    while rig.ring.clock() < began + BOUND {
        // What has ended lets go in the same turn, or the next one.
        let was_in_flight = driver.connection().in_flight();
        rig.ring.sleep(SECOND / 10).await;
        let held = target.node.attach(Role::JobTarget("probe")).is_err();
        let in_flight = driver.connection().in_flight();
        if held && was_in_flight == 0 {
            return rig.fail("nothing is in flight, and the target of a job that failed is still in use");
        }
        if !held && in_flight > 0 {
            return rig
                .fail(format!("{in_flight} requests of a job that failed go on, and its target is free"));
        }
        if held && !was_held {
            rig.count("dead servers that held the target of a job that failed");
        }
        was_held |= held;
    }
}

/// Waits until nobody uses the disk.
async fn is_free(rig: &Rig, disk: &Disk) {
    loop {
        if let Ok(using) = disk.node.attach(Role::JobTarget("probe")) {
            drop(using);
            return;
        }
        rig.ring.sleep(SECOND / 1000).await;
    }
}

/// What users do. True when it was not refused.
fn act(rig: &Rc<Rig>, job: &Job, verb: Verb) -> bool {
    let was_ready = job.status().is_ready();
    let done = match verb {
        Verb::Pause(span) => {
            let done = job.pause().is_ok();
            if done {
                resume_after(rig, job, span);
            }
            done
        }
        Verb::SetSpeed(speed) => {
            let done = job.set_speed(speed).is_ok();
            if done {
                rig.count("speed changes");
            }
            done
        }
        Verb::ChangeCopyMode(mode) => {
            let done = job.change_copy_mode(mode).is_ok();
            if done {
                rig.count("changes of the copy mode");
            }
            done
        }
        Verb::Complete => {
            let whole = rig.venture.borrow().as_ref().is_some_and(|venture| venture.whole);
            whole && job.complete().is_ok()
        }
        Verb::SoftCancel => job.cancel(false).is_ok(),
        Verb::ForceCancel => {
            // Cut at this step: what is acknowledged must be on both sides, if that was promised.
            watch::check_all_synced(rig);
            job.cancel(true).is_ok()
        }
        Verb::Quit => {
            let alive = job.ending().is_none();
            job.give_up();
            alive
        }
    };
    rig.say(|| format!("{verb:?}: {done}"));
    if done {
        let mut venture = rig.venture.borrow_mut();
        if let Some(venture) = &mut *venture {
            venture.asked_complete |= matches!(verb, Verb::Complete);
            venture.asked_end |= matches!(verb, Verb::SoftCancel | Verb::ForceCancel | Verb::Quit);
        }
        drop(venture);
        match verb {
            Verb::Complete => rig.count_moment(
                "completes asked for",
                "completes asked for with guests' overlapping writes in flight",
            ),
            Verb::SoftCancel if was_ready => {
                rig.count_moment("cancels, soft", "cancels, soft, with guests' overlapping writes in flight");
            }
            Verb::ForceCancel | Verb::SoftCancel => {
                rig.count_moment(
                    "cancels, forced",
                    "cancels, forced, with guests' overlapping writes in flight",
                );
            }
            Verb::Quit => rig.count("quits"),
            Verb::Pause(_) | Verb::SetSpeed(_) | Verb::ChangeCopyMode(_) => {}
        }
    }
    done
}

fn resume_after(rig: &Rc<Rig>, job: &Job, span: u64) {
    let (rig2, job) = (rig.clone(), job.clone());
    rig.ring.spawn(async move {
        rig2.ring.sleep(span).await;
        let node = rig2.current.borrow().node.clone();
        if job.status().is_paused() && node.is_drained() {
            rig2.fail(format!("a paused job keeps guests at the door: {}", state(&job)));
        }
        if job.resume().is_ok() {
            rig2.count("resumes");
        }
    });
}

/// From now on nothing is wrong, and users are eager.
fn rescue(rig: &Rc<Rig>, job: &Job, target: &Disk) {
    rig.rescued.set(true);
    world::heal(rig, target);
    let _ = job.set_speed(0);
    let (rig2, job) = (rig.clone(), job.clone());
    rig.ring.spawn(async move {
        while job.ending().is_none() {
            let _ = job.resume();
            rig2.ring.sleep(SECOND / 20).await;
        }
    });
}

/// Follows a job's events.
async fn listen(rig: Rc<Rig>, job: Job) {
    let mut rng = rig.fork_rng();
    let mut stops = 0;
    loop {
        let event = job.next_event().await;
        rig.say(|| format!("{event:?}"));
        match event {
            JobEvent::Ready(_) => {
                compare_ahead(&rig);
                rig.count_moment("ready", "ready with guests' overlapping writes in flight");
            }
            JobEvent::StatusChange { status, .. } => match status {
                Status::Paused => rig.count("pauses"),
                Status::Standby => rig.count("pauses in ready"),
                Status::Pending => rig.count("pending"),
                Status::Null => return,
                _ => {}
            },
            JobEvent::Error { action: ErrorAction::Stop, .. } => {
                rig.count("stops by an error");
                stops += 1;
                // Users lose patience as well; in the end somebody rescues the job.
                if stops < 20 {
                    resume_after(&rig, &job, log_range(&mut rng, 1_000, SECOND / 20));
                }
            }
            _ => {}
        }
    }
}

/// The verifier begins while guests go on.
fn compare_ahead(rig: &Rc<Rig>) {
    let verifier = rig.venture.borrow().as_ref().and_then(|venture| venture.verifier.clone());
    if let Some(verifier) = verifier {
        // What it could not read is read again in the end.
        rig.ring.spawn(async move { drop(verifier.pass().await) });
    }
}

/// Finalizes a job that waits for it; now and then it is cancelled instead.
async fn finalize(rig: Rc<Rig>, job: Job) {
    let mut rng = rig.fork_rng();
    let waits = || match job.status() {
        Status::Pending if !job.info().auto_finalize => Some(true),
        _ => job.ending().map(|_| false),
    };
    if !job.until(waits).await {
        return;
    }
    rig.grant(8);
    rig.ring.sleep(log_range(&mut rng, 1_000, SECOND / 50)).await;
    if rng.below(8) == 0 {
        act(&rig, &job, Verb::ForceCancel);
    } else if job.finalize().is_ok() {
        rig.count("finalizes");
    }
}

/// After the end nothing of the job is left.
async fn clear_up(rig: &Rc<Rig>, plan: &JobPlan, job: &Job, source: &Disk, target: &Disk) {
    world::heal(rig, target);
    if !plan.auto_dismiss {
        if job.status() != Status::Concluded || job.dismiss().is_err() {
            rig.fail(format!("a job that is over cannot be dismissed: {}", job.status()));
        }
        rig.count("dismissals");
    }
    let (old, new) = if rig.pivoted() { (source, target) } else { (target, source) };
    // What was in flight holds the locks until it has ended, and not longer.
    if rig.within(BOUND, is_free(rig, old)).await.is_none() {
        rig.fail(format!("the disk {} is still in use after the job", old.path));
    }
    match new.node.attach(Role::JobSource("probe")) {
        Ok(using) => drop(using),
        Err(error) => rig.fail(format!("the disk in use still has a job on it: {error}")),
    }
    for disk in [old, new] {
        if disk.node.filter_count() > 0 || disk.node.is_drained() {
            rig.fail(format!("a job left a filter or a shut door on {}", disk.path));
        }
        rig.counts.borrow_mut().merge(&disk.take_counts());
    }
    *rig.other.borrow_mut() = Some(old.clone());
}
