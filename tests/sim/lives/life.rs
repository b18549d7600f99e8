//! Runs one seed: a life until it is over or the power goes, and after a power cut a second one.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

use blockferry::base::planted::{Bug, plant};
use blockferry::base::rng::Rng;
use blockferry::graph::node::Root;
use blockferry_ring::sim::World;
use blockferry_ring::{Config, Ring};

use super::director;
use super::disk::Disk;
use super::model::Model;
use super::plan::{Ending, Join, Plan, SECOND};
use super::rig::{self, Rig};
use super::watch;
use super::world;
use crate::counts::Counts;

/// No life takes more turns: one that does runs in circles.
const TURNS_MAX: u64 = 200_000;
/// Nor more virtual time.
const NANOS_MAX: u64 = 100_000 * SECOND;

/// What came of a seed.
pub struct Outcome {
    pub counts: Counts,
    /// Of everything that happened.
    pub hash: u64,
    pub turns: u64,
    pub failure: Option<String>,
}

/// How a life ended.
enum End {
    /// In peace.
    Over,
    /// The power went; the disk that was in use.
    Cut(Rc<str>),
    Failed(String),
}

struct Machine {
    world: World,
    rng: Rng,
    counts: Counts,
    turns: u64,
}

/// Runs a seed, with a bug planted or none.
pub fn run(plan: Plan, bug: Option<Bug>) -> Outcome {
    plant(bug);
    let mut rng = Rng::new(plan.seed ^ 0x5EED_0F11_FE00_0000);
    let (world, model) = world::make(&plan, &mut rng);
    let mut machine = Machine { world, rng, counts: Counts::default(), turns: 0 };
    let (end, model) = machine.live(plan.clone(), model, world::FIRST);
    let failure = match end {
        End::Over => None,
        End::Failed(what) => Some(what),
        End::Cut(path) => {
            machine.counts.add("power cuts");
            machine.second_life(plan, model, &path)
        }
    };
    let faults = machine.world.fault_counts();
    let device = [
        ("device: agains", faults.agains),
        ("delays", faults.delays),
        ("device: errors", faults.errors),
        ("device: hangs", faults.hangs),
        ("device: no space", faults.no_space),
        ("device: shorts", faults.shorts),
        ("streams: half closes", faults.half_closes),
        ("streams: resets", faults.resets),
        ("device: torn writes of power cuts", faults.torn),
    ];
    for (what, n) in device {
        machine.counts.add_many(what, n);
    }
    plant(None);
    let hash = machine.world.trace_hash() ^ machine.counts.hash().rotate_left(17);
    if failure.is_some() && rig::is_watched() {
        for line in machine.world.trace_tail() {
            println!("{line}");
        }
    }
    Outcome { counts: machine.counts, hash, turns: machine.turns, failure }
}

impl Machine {
    /// A life from opening the disk at `path` on.
    fn live(&mut self, plan: Plan, model: Model, path: &str) -> (End, Model) {
        let config = Config { arena_bytes: plan.arena_bytes, ..Config::default() };
        let ring = match Ring::with_backend(self.world.backend(), &config) {
            Ok(ring) => ring,
            Err(error) => return (End::Failed(format!("no ring: {error}")), model),
        };
        let opened = Disk::open(&ring, path, plan.buffered);
        let disk = match opened {
            Ok(disk) => disk,
            Err(error) => return (End::Failed(format!("the disk does not open: {error}")), model),
        };
        let cut_at = plan.power_cut.map(|span| self.world.now() + span);
        let rig = Rig::new(plan, self.world.clone(), ring.clone(), model, disk.clone(), self.rng.fork());
        match Root::new(&disk.node, false) {
            Ok(root) => {
                rig.features.set(Some(root.features()));
                if rig.plan.two_roots {
                    *rig.second_root.borrow_mut() = Root::new(&disk.node, false).ok();
                }
                *rig.root.borrow_mut() = Some(root);
            }
            Err(error) => rig.fail(format!("the disk cannot be used: {error}")),
        }
        drop(disk);
        let end = self.turn(&rig, &ring, cut_at);
        self.counts.merge(&rig.counts.take());
        let model = rig.model.borrow().clone();
        if let End::Failed(_) = end {
            // Whatever broke may break again while it is cleaned up: let it be.
            std::mem::forget((rig, ring));
            return (end, model);
        }
        let path = rig.current.borrow().path.clone();
        let is_cut = matches!(end, End::Cut(_));
        let tasks = ring.task_count();
        if is_cut {
            let _ = ring.shutdown(SECOND);
        }
        let left = Rc::strong_count(&rig);
        drop(rig);
        let used = ring.arena().bytes_used();
        if !is_cut && (tasks > 0 || left > 1 || used > 0) {
            let what =
                format!("at the end {tasks} tasks, {left} rigs and {used} bytes of the arena are left");
            std::mem::forget(ring);
            return (End::Failed(what), model);
        }
        if !is_cut && ring.shutdown(SECOND).leaked > 0 {
            return (End::Failed("operations are left at the end".into()), model);
        }
        (if is_cut { End::Cut(path) } else { End::Over }, model)
    }

    fn turn(&mut self, rig: &Rc<Rig>, ring: &Ring, cut_at: Option<u64>) -> End {
        ring.spawn(director::direct(rig.clone()));
        if let Some(at) = cut_at {
            let ring2 = ring.clone();
            ring.spawn(async move { ring2.sleep_until(at).await });
        }
        let started = self.world.now();
        let mut turns = 0;
        let mut over = 0;
        loop {
            let turned = catch_unwind(AssertUnwindSafe(|| ring.turn_blocking()));
            turns += 1;
            self.turns += 1;
            if let Err(panic) = turned {
                let what = panic.downcast_ref::<String>().map(String::as_str);
                let what = what.or(panic.downcast_ref::<&str>().copied()).unwrap_or("no words");
                return End::Failed(format!("it panicked: {what}"));
            }
            if let Some(what) = rig.failure.borrow_mut().take() {
                return End::Failed(what);
            }
            if cut_at.is_some_and(|at| self.world.now() >= at) {
                return self.cut(rig);
            }
            if rig.done.get() {
                // Tasks that only wait for a time may still be there for a while.
                over += 1;
                if ring.task_count() == 0 || over > 100_000 {
                    return End::Over;
                }
            }
            if turns > TURNS_MAX || self.world.now() - started > NANOS_MAX {
                return End::Failed(format!("no end after {turns} turns, {} ns", self.world.now() - started));
            }
        }
    }

    fn cut(&mut self, rig: &Rc<Rig>) -> End {
        let seed = self.rng.next_u64();
        // What is found must be what was promised before, so it is judged by what is known before.
        let after = rig.world.fork_after_power_cut(seed);
        watch::judge_power_cut(rig, &after);
        if let Some(what) = rig.failure.borrow_mut().take() {
            return End::Failed(what);
        }
        self.world.power_cut_seeded(seed);
        let path = rig.current.borrow().path.clone();
        let (now, forked) = (rig.live(&rig.current.borrow()), after.read_live(&*path, 0, rig.len()));
        if now != forked {
            return End::Failed("a power cut and its forecast differ".into());
        }
        End::Cut(path)
    }

    /// The machine starts again: the disk is opened, used and moved, in a healthy world.
    fn second_life(&mut self, mut plan: Plan, mut model: Model, path: &str) -> Option<String> {
        model.restart(&self.world.read_live(path, 0, plan.len as usize));
        self.world.heal();
        plan.power_cut = None;
        (plan.faults, plan.target_stream) = (Vec::new(), Vec::new());
        plan.jobs.truncate(1);
        for job in &mut plan.jobs {
            (job.verbs, job.ambush) = (Vec::new(), None);
            (job.ending, job.target_room) = (Ending::Complete, None);
        }
        for guest in &mut plan.guests {
            guest.join = Join::Start;
        }
        match self.live(plan, model, path).0 {
            End::Over => None,
            End::Cut(_) => Some("the power went a second time".into()),
            End::Failed(what) => Some(format!("in the second life: {what}")),
        }
    }
}
