//! The world of a seed: its files, what is on them, and what goes wrong with them.

use std::rc::Rc;

use blockferry::base::rng::Rng;
use blockferry_ring::sim::{Fault as SimFault, FaultRule, FileModel, OpKind, OpKinds, World, WorldConfig};
use blockferry_ring::{Errno, FileKind};

use super::disk::{Disk, STATE_DIR};
use super::model::{Model, Words};
use super::nbd;
use super::plan::{Fault, JobPlan, Plan, Side, StreamTrouble, Trouble};
use super::rig::{self, Rig};

/// The path of the disk that guests begin with.
pub const FIRST: &str = "/disk-00.img";

/// A world with the first disk in it, and the model of that disk.
pub fn make(plan: &Plan, rng: &mut Rng) -> (World, Model) {
    let mut config = WorldConfig::new(plan.seed);
    if rig::is_watched() {
        config.trace_tail_lines = 2000;
    }
    let world = World::new(config);
    world.add_file(FIRST, plan.source.clone());
    world.add_directory(STATE_DIR);
    let mut model = Model::new(plan.len, plan.cell);
    fill(&world, FIRST, plan, plan.source_run_bytes, rng, |at, bytes| model.prepare(at, bytes));
    (world, model)
}

/// Puts runs of data on a disk, with holes between.
fn fill(
    world: &World,
    path: &str,
    plan: &Plan,
    run_bytes: u64,
    rng: &mut Rng,
    mut then: impl FnMut(u64, &[u8]),
) {
    if run_bytes == 0 {
        return;
    }
    let words = Model::new(plan.len, plan.cell);
    let cell = plan.cell as u64;
    let draw = |rng: &mut Rng| (1 + rng.below(2 * run_bytes)).next_multiple_of(cell);
    let mut at = if rng.below(2) == 0 { 0 } else { draw(rng) };
    while at < plan.len {
        let mut bytes = vec![0; draw(rng).min(plan.len - at) as usize];
        let kind = if rng.below(4) == 0 { Words::Zero } else { Words::Stamp(rng.next_u64()) };
        words.fill(at, kind, &mut bytes);
        world.write_raw(path, at, &bytes);
        then(at, &bytes);
        at += bytes.len() as u64 + draw(rng);
    }
}

/// The disk that the next job writes to: a new one, or the one of the job before.
pub async fn make_target(rig: &Rc<Rig>, plan: &JobPlan) -> Result<Disk, String> {
    let mut rng = rig.fork_rng();
    let len = rig.current.borrow().node.driver().len();
    let again = rig.other.borrow_mut().take();
    if let Some(disk) = again
        && (rig.plan.to_and_fro || rng.below(2) == 0)
        && disk.node.driver().len() >= len
        // What was on it must be durable, or nobody could say what a power cut leaves.
        && disk.node.driver().flush().await.is_ok()
        && rig.world.undurable_changes(&*disk.path) == 0
    {
        return Ok(disk);
    }
    let free = (1..).map(|n| format!("/disk-{n:02}.img")).find(|path| !rig.world.exists(path));
    let Some(path) = free else { return Err("no path is free".into()) };
    let mut model = FileModel { len, ..rig.plan.target.clone() };
    if plan.larger_target && model.kind == FileKind::Regular {
        model.len += 4096 * (1 + rng.below(16));
    }
    if model.kind == FileKind::Regular {
        model.capacity_bytes = plan.target_room;
    }
    rig.world.add_file(&*path, model);
    if plan.target_room.is_none() {
        fill(&rig.world, &path, &rig.plan, rig.plan.target_run_bytes, &mut rng, |_, _| {});
    }
    if plan.remote_target {
        rig.count("targets over NBD");
        return nbd::open_remote(rig, &path).await.map_err(|what| format!("a target over NBD: {what}"));
    }
    let disk = Disk::open(&rig.ring, &path, rig.plan.buffered);
    disk.map_err(|error| format!("a target could not be opened: {error}"))
}

/// Breaks the disks of a job as the plan has it.
pub fn set_faults(rig: &Rig, source: &Disk, target: &Disk) {
    source.seam.is_target.set(false);
    target.seam.is_target.set(true);
    let rules = rig.plan.faults.iter().flat_map(|fault| {
        let path = match fault.side {
            Side::Source => &*source.path,
            Side::Target => &*target.path,
            Side::Notes => STATE_DIR,
        };
        rules(fault, path)
    });
    let guests = rig.plan.stream.iter().map(|(trouble, chance)| stream_rule(*trouble, *chance, nbd::SOCKET));
    let socket = target.remote.as_ref().map(|(socket, _)| socket);
    let targets = socket.into_iter().flat_map(|socket| {
        let faults = rig.plan.target_stream.iter();
        faults.map(move |(trouble, chance)| stream_rule(*trouble, *chance, socket))
    });
    rig.world.set_faults(rules.chain(guests).chain(targets).collect());
}

fn stream_rule(trouble: StreamTrouble, chance: u32, socket: &str) -> FaultRule {
    let fault = match trouble {
        StreamTrouble::Resets => SimFault::Reset,
        StreamTrouble::HalfCloses => SimFault::HalfClose,
        StreamTrouble::Shorts => SimFault::Short,
        StreamTrouble::Stalls => SimFault::Delay { nanos_min: 100_000, nanos_max: 20_000_000 },
    };
    let kinds = match trouble {
        StreamTrouble::HalfCloses => OpKind::Send.into(),
        _ => OpKind::Send | OpKind::Recv,
    };
    FaultRule::new(kinds, format!("unix:{socket}"), chance, fault)
}

fn rules(fault: &Fault, path: &str) -> Vec<FaultRule> {
    let zeroing = OpKind::PunchHole | OpKind::ZeroRange | OpKind::Discard;
    let transfers = OpKind::Read | OpKind::Write;
    let rule = |kinds: OpKinds, chance: u32, fault: SimFault| FaultRule::new(kinds, path, chance, fault);
    let chance = fault.chance;
    match fault.trouble {
        Trouble::Reads => vec![rule(OpKind::Read.into(), chance, SimFault::Error(Errno::EIO))],
        Trouble::Writes => vec![
            rule(OpKind::Write.into(), chance / 2, SimFault::Error(Errno::EIO)),
            rule(OpKind::Write.into(), chance / 2, SimFault::Error(Errno::ENOSPC)),
        ],
        Trouble::Zeroes => vec![rule(zeroing, chance, SimFault::Error(Errno::EIO))],
        Trouble::Flushes => vec![rule(OpKind::Sync.into(), chance, SimFault::Error(Errno::EIO))],
        Trouble::Shorts => vec![rule(transfers, 2 * chance, SimFault::Short)],
        Trouble::Agains => vec![rule(OpKinds::DISK, chance, SimFault::Again)],
        Trouble::Delays => {
            let fault = SimFault::Delay { nanos_min: 100_000, nanos_max: 50_000_000 };
            vec![rule(OpKinds::DISK, chance, fault)]
        }
    }
}

/// Nothing is wrong any more.
pub fn heal(rig: &Rig, target: &Disk) {
    rig.world.heal();
    rig.world.change_model(&*target.path, |model| model.capacity_bytes = None);
}
