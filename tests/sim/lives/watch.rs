//! What must be true when a job ends, and of what a power cut would leave at any time.
//!
//! # The instant
//! A job's last act happens behind a shut door: nothing of a guest is in flight. The task that waits for the
//! job's end, or for its pivot, after which the job has to mark the old disk before it ends, is woken in the
//! turn in which the job opens the door, and runs in that same turn. Tasks take no
//! virtual time and operations take effect only when the ring enters, at the end of the turn. So what the
//! disks hold when [`watch`] runs is exactly what they held in the instant of the drain, and can be compared
//! byte for byte, with guests at the door.

use std::rc::Rc;

use blockferry::graph::node::Root;
use blockferry::job::runner::{Ending, Job};
use blockferry_ring::sim::World;

use super::disk::{Disk, is_marked};
use super::rig::{Images, Rig, Venture};

/// Waits for the end of a job and compares.
pub async fn watch(rig: Rc<Rig>, job: Job) {
    let pivoted = || has_pivoted(&rig, &job).then_some(Ending::Completed);
    let ending = job.until(|| job.ending().or_else(pivoted)).await;
    let parked: u32 = rig.roots().iter().map(Root::parked).sum();
    rig.counts.borrow_mut().add_many("guests: requests that waited at the door", parked.into());
    let result = match &ending {
        Ending::Completed => completed(&rig, &job),
        Ending::Cancelled => {
            rig.count("endings: cancelled");
            not_completed(&rig)
        }
        Ending::Failed(why) => {
            rig.count("endings: failed");
            if why.contains("Draining the source timed out") {
                rig.count("drains that timed out");
            }
            if !rig.guests_may_fail() && !rig.has_hung.get() {
                rig.fail(format!("a job failed in a healthy world: {why}"));
            }
            not_completed(&rig)
        }
    };
    if let Err(what) = result {
        rig.fail(format!("when a job had ended ({ending:?}): {what}"));
    }
    let told = job.until_over().await;
    if told != ending {
        rig.fail(format!("a job that had pivoted ended so: {told:?}"));
    }
}

/// Guests are on the target of this job.
fn has_pivoted(rig: &Rig, job: &Job) -> bool {
    let (venture, roots) = (rig.venture.borrow(), rig.roots());
    let Some(venture) = venture.as_ref().filter(|v| v.job.as_ref().is_some_and(|j| j.is_same(job))) else {
        return false;
    };
    !roots.is_empty() && roots.iter().all(|root| Rc::ptr_eq(&root.node(), &venture.target.node))
}

fn completed(rig: &Rc<Rig>, job: &Job) -> Result<(), String> {
    rig.count("endings: completed");
    let mut venture = rig.venture.borrow_mut();
    let Some(venture) = &mut *venture else { return Err("nothing is known of it".into()) };
    let images = Images { source: rig.live(&venture.source), target: rig.live(&venture.target) };
    compare(rig, venture, &images)?;
    if let Err(wrong) = rig.model.borrow_mut().check_live(&images.source) {
        return Err(format!("the source holds what nobody wrote: {wrong}"));
    }
    if let Some(at) = first_difference(&images.target, &rig.durable(&venture.target)) {
        return Err(format!("the target is not durable at offset {at}"));
    }
    let after = rig.world.fork_after_power_cut(rig.plan.seed);
    if is_marked(&after, &venture.target) {
        return Err("a completed target is still marked".into());
    }
    let progress = job.progress();
    if progress.offset() != progress.len() {
        return Err(format!("its progress is {} of {}", progress.offset(), progress.len()));
    }
    let roots = rig.roots();
    if roots.iter().any(|root| Some(root.features()) != rig.features.get()) {
        return Err("the guests' disk has other features now".into());
    }
    let pivoted = roots.iter().all(|root| Rc::ptr_eq(&root.node(), &venture.target.node));
    if pivoted != (venture.asked_complete && !venture.asked_end) {
        return Err(format!("pivoted: {pivoted}; told to: {}", venture.asked_complete));
    }
    if pivoted {
        rig.count("pivots");
        let left_behind = rig.durable(&venture.source);
        if let Some(at) = first_difference(&images.source, &left_behind)
            && !rig.guests_may_fail()
            && !rig.has_hung.get()
        {
            return Err(format!("the disk that the pivot left behind is not durable at offset {at}"));
        }
        if venture.target.path.as_ref() == super::world::FIRST {
            rig.count("pivots back");
        }
        rig.model.borrow_mut().all_durable();
        *rig.current.borrow_mut() = venture.target.clone();
        *rig.retired.borrow_mut() = Some((venture.source.clone(), images.source.clone()));
    } else if !roots.iter().all(|root| Rc::ptr_eq(&root.node(), &venture.source.node)) {
        return Err("the guests' roots point to different disks, or to none".into());
    }
    venture.pivoted = pivoted;
    Ok(())
}

/// The mark is about to go: source and target must be alike by now, and the target durable.
pub fn settle(rig: &Rig) {
    let mut venture = rig.venture.borrow_mut();
    let Some(venture) = &mut *venture else { return };
    let images = Images { source: rig.live(&venture.source), target: rig.live(&venture.target) };
    venture.settled = None;
    if let Err(what) = compare(rig, venture, &images) {
        rig.fail(format!("when the mark is about to go: {what}"));
    }
    venture.settled = Some((images.target, rig.model.borrow_mut().next()));
}

/// The target equals the source; where only changes are copied, in every chunk that was changed.
fn compare(rig: &Rig, venture: &Venture, images: &Images) -> Result<(), String> {
    if venture.whole {
        return match first_difference(&images.source, &images.target) {
            Some(at) => Err(format!("source and target differ at offset {at}")),
            None => Ok(()),
        };
    }
    let cell = rig.plan.cell;
    // A discard that is refused ends without the ring: it may have come in by the door that was just opened.
    let until = venture.settled.as_ref().map_or(u64::MAX, |(_, at)| *at);
    let touched = rig.model.borrow().touched(venture.since..until).collect::<Vec<_>>();
    for (index, touched) in touched.into_iter().enumerate() {
        let part = index * cell..(index + 1) * cell;
        let (source, target) = (&images.source[part.clone()], &images.target[part.clone()]);
        if source == target || (!touched && *target == venture.target_before[part.clone()]) {
            continue;
        }
        return Err(format!("source and target differ at offset {} (touched: {touched})", part.start));
    }
    Ok(())
}

fn first_difference(a: &[u8], b: &[u8]) -> Option<usize> {
    if a == b {
        return None;
    }
    Some(a.iter().zip(b).position(|(x, y)| x != y).unwrap_or(a.len().min(b.len())))
}

/// A job that did not complete leaves guests where they are, and a target that does not claim anything.
fn not_completed(rig: &Rig) -> Result<(), String> {
    let venture = rig.venture.borrow();
    let Some(venture) = &*venture else { return Err("nothing is known of it".into()) };
    if rig.roots().iter().any(|root| !Rc::ptr_eq(&root.node(), &venture.source.node)) {
        return Err("a root of the guests does not point to the source any more".into());
    }
    judge_target(rig, venture, &rig.world.fork_after_power_cut(rig.plan.seed))?;
    Ok(())
}

/// While a job says that it is actively synced, both disks hold every write that was acknowledged, at each moment:
/// whatever ends the job now.
pub fn check_synced(rig: &Rig, cells: std::ops::Range<usize>, begun: u64) {
    let venture = rig.venture.borrow();
    let Some(venture) = venture.as_ref().filter(|venture| !venture.pivoted) else { return };
    // Where only changes are copied, what a client hears of late may have happened before the job.
    let concerns = venture.whole || begun >= venture.since;
    if !concerns || !venture.job.as_ref().is_some_and(Job::is_actively_synced) {
        return;
    }
    rig.count("writes acknowledged while actively synced");
    let size = rig.plan.cell;
    for cell in cells {
        if !rig.model.borrow().is_quiet(cell) {
            continue;
        }
        let read = |disk: &Disk| rig.world.read_live(&*disk.path, (cell * size) as u64, size);
        if read(&venture.source) != read(&venture.target) {
            rig.fail(format!("actively synced, and the disks differ at offset {}", cell * size));
            return;
        }
    }
}

/// The same for the whole disk.
pub fn check_all_synced(rig: &Rig) {
    if rig.venture.borrow().as_ref().is_some_and(|venture| venture.whole) {
        check_synced(rig, 0..rig.len() / rig.plan.cell, u64::MAX);
    }
}

/// A disk that guests were moved away from is not written any more.
pub fn check_retired(rig: &Rig) {
    if let Some((disk, image)) = rig.retired.borrow_mut().take()
        && let Some(at) = first_difference(&image, &rig.live(&disk))
    {
        rig.fail(format!("{} was written at offset {at} after the pivot", disk.path));
    }
}

/// Looks at what would be left if the power went now.
pub fn look(rig: &Rig) {
    rig.count("power cuts looked at");
    check_all_synced(rig);
    let seed = rig.fork_rng().next_u64();
    judge_power_cut(rig, &rig.world.fork_after_power_cut(seed));
}

/// What a power cut left must be what was promised.
pub fn judge_power_cut(rig: &Rig, after: &World) {
    let current = rig.current.borrow().path.clone();
    let found = after.read_live(&*current, 0, rig.len());
    if let Err(wrong) = rig.model.borrow().check_durable(&found) {
        rig.fail(format!("after a power cut {current} holds what it must not: {wrong}"));
    }
    let venture = rig.venture.borrow();
    let Some(venture) = venture.as_ref().filter(|venture| !venture.pivoted) else { return };
    if let Err(what) = judge_target(rig, venture, after) {
        rig.fail(format!("after a power cut: {what}"));
    }
}

/// A target without a mark holds what it held before, or the source as it was when the mark went.
fn judge_target(rig: &Rig, venture: &Venture, after: &World) -> Result<(), String> {
    if is_marked(after, &venture.target) {
        rig.count("power cuts with an unfinished target");
        return Ok(());
    }
    let found = after.read_live(&*venture.target.path, 0, rig.len());
    if found == venture.target_before || venture.settled.as_ref().is_some_and(|(image, _)| *image == found) {
        return Ok(());
    }
    Err("the target says that it is complete, and is not".into())
}
