//! What one seed is about, drawn before anything runs.
//!
//! A world in which everything happens a little is always the same world. So each seed draws first which
//! things happen at all, then how much: many seeds have no faults, some have one client and some four, some
//! a job that is paused again and again, some a disk of three sectors.

use blockferry::base::rng::Rng;
use blockferry::job::governor::GuestFirst;
use blockferry::job::mirror::SyncMode;
use blockferry::job::mirror::converge::OnDivergence;
use blockferry::job::policy::{CopyMode, OnError};
use blockferry_ring::sim::{DiscardModel, FileModel, Latency};

/// One second.
pub const SECOND: u64 = 1_000_000_000;

/// When a client connects.
#[derive(Clone, Copy, Debug)]
pub enum Join {
    /// Before anything else.
    Start,
    /// At this time, in nanoseconds after the first job began.
    At(u64),
    /// While a job has the door shut.
    WhenDrained,
}

/// One client of the disk.
#[derive(Clone, Debug)]
pub struct Guest {
    pub join: Join,
    /// It comes over NBD.
    pub remote: bool,
    /// Requests at once.
    pub depth: usize,
    /// Mean pause between an answer and the next request.
    pub think_nanos: u64,
    /// Bytes of the largest request.
    pub request_bytes_max: u64,
    /// Weights of read, write, durable write, zeroes, discard, flush.
    pub mix: [u64; 6],
}

/// Where something goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Source,
    Target,
    /// The directory of the notes about unfinished targets.
    Notes,
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// `EIO` on these operations.
    Reads,
    Writes,
    Zeroes,
    Flushes,
    /// Transfers come short.
    Shorts,
    /// `EAGAIN` and `EINTR`.
    Agains,
    /// Operations take long.
    Delays,
}

/// What goes wrong with a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamTrouble {
    /// It is reset.
    Resets,
    /// One direction ends.
    HalfCloses,
    /// Sends end short, receives get little.
    Shorts,
    /// It stalls.
    Stalls,
}

/// Faults on one disk for as long as a job runs.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    pub side: Side,
    pub trouble: Trouble,
    /// Out of 65536.
    pub chance: u32,
}

/// Something that a user does to a running job.
#[derive(Clone, Copy, Debug)]
pub enum Verb {
    /// Pauses, and resumes after so long.
    Pause(u64),
    SetSpeed(i64),
    ChangeCopyMode(CopyMode),
    SoftCancel,
    ForceCancel,
    Complete,
    Quit,
}

/// How a job is meant to end, should nothing else end it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    Complete,
    SoftCancel,
    ForceCancel,
    Quit,
    /// The target's device stops answering; the job is given up.
    HangAndForceCancel,
    /// The source's device stops answering for so long while the job is told to complete.
    HangSourceAndComplete(u64),
}

/// One job.
#[derive(Clone, Debug)]
pub struct JobPlan {
    pub sync: SyncMode,
    pub granularity: Option<u64>,
    pub buf_size: i64,
    pub speed: i64,
    pub detect_zeroes: bool,
    pub auto_finalize: bool,
    pub auto_dismiss: bool,
    pub verify: bool,
    pub larger_target: bool,
    /// A new target is reached over NBD.
    pub remote_target: bool,
    pub on_source_error: OnError,
    pub on_target_error: OnError,
    pub copy_mode: CopyMode,
    pub on_divergence: OnDivergence,
    pub guest_first: GuestFirst,
    pub downtime_nanos_max: u64,
    pub deadline_nanos: Option<u64>,
    /// What users do, and how long after the start.
    pub verbs: Vec<(u64, Verb)>,
    /// What a user does in the job's last moments, and how long after its mark begins to go.
    pub ambush: Option<(u64, Verb)>,
    /// Guests' requests while the job begins, when it is ready, and while it ends.
    pub requests: [u64; 3],
    /// How long it stays ready.
    pub ready_nanos: u64,
    pub ending: Ending,
    /// Bytes that the target has room for, until room is made.
    pub target_room: Option<u64>,
}

/// One seed.
#[derive(Clone, Debug)]
pub struct Plan {
    pub seed: u64,
    pub len: u64,
    /// Bytes of a cell of the model.
    pub cell: usize,
    pub buffered: bool,
    /// The engine's memory for I/O: guests can use up the smaller ones.
    pub arena_bytes: usize,
    pub source: FileModel,
    pub target: FileModel,
    /// The disks are not empty at the start: mean length of a run, 0 for empty.
    pub source_run_bytes: u64,
    pub target_run_bytes: u64,
    /// Half of the requests go here: first byte and bytes.
    pub hot: (u64, u64),
    pub guests: Vec<Guest>,
    pub faults: Vec<Fault>,
    /// What goes wrong with the streams of guests that come over NBD, and how often, out of 65536.
    pub stream: Vec<(StreamTrouble, u32)>,
    /// The same for the streams to targets.
    pub target_stream: Vec<(StreamTrouble, u32)>,
    pub jobs: Vec<JobPlan>,
    /// Every other client uses a second root of the disk.
    pub two_roots: bool,
    /// Jobs go back to the disk of the job before whenever they can.
    pub to_and_fro: bool,
    /// Times after a job's start at which somebody looks what a power cut would leave.
    pub looks: Vec<u64>,
    /// The power goes at this time after the first job's start.
    pub power_cut: Option<u64>,
}

/// A number between `low` and `high` whose logarithm is drawn evenly.
pub fn log_range(rng: &mut Rng, low: u64, high: u64) -> u64 {
    let octaves = (high / low.max(1)).ilog2();
    let base = low.max(1) << rng.below(u64::from(octaves) + 1);
    (base + rng.below(base)).min(high)
}

fn one_in(rng: &mut Rng, n: u64) -> bool {
    rng.below(n) == 0
}

fn pick<T: Copy>(rng: &mut Rng, choices: &[T]) -> T {
    choices[rng.below(choices.len() as u64) as usize]
}

impl Plan {
    /// Some guest comes over NBD.
    pub fn has_remote_guests(&self) -> bool {
        self.guests.iter().any(|guest| guest.remote)
    }

    /// The plan of a seed.
    pub fn draw(seed: u64) -> Plan {
        let mut rng = Rng::new(seed);
        let rng = &mut rng;
        let cell = if one_in(rng, 4) { 64 } else { 512 };
        let len = len(rng, cell as u64);
        let hot_bytes = log_range(rng, 4 * cell as u64, len.max(4 * cell as u64)).min(len) / cell as u64;
        let hot_bytes = (hot_bytes * cell as u64).max(cell as u64);
        let hot_start = rng.below((len - hot_bytes) / cell as u64 + 1) * cell as u64;
        let run = |rng: &mut Rng| if one_in(rng, 3) { 0 } else { log_range(rng, 1024, 128 << 10) };
        let busy = one_in(rng, 4);
        let jobs = pick(rng, &[1, 1, 1, 2, 3]);
        let has_faults = one_in(rng, 2);
        let remote = one_in(rng, 4);
        let mut plan = Plan {
            seed,
            len,
            cell,
            buffered: one_in(rng, 4),
            arena_bytes: (if one_in(rng, 4) { 2 } else { 8 }) << 20,
            source: file_model(rng, len),
            target: file_model(rng, len),
            source_run_bytes: run(rng),
            target_run_bytes: run(rng),
            hot: (hot_start, hot_bytes),
            guests: (0..1 + rng.below(4)).map(|i| guest(rng, i, busy, remote)).collect(),
            faults: if has_faults { faults(rng) } else { Vec::new() },
            stream: if remote { stream_faults(rng) } else { Vec::new() },
            target_stream: if has_faults { stream_faults(rng) } else { Vec::new() },
            jobs: (0..jobs).map(|_| job(rng, has_faults)).collect(),
            two_roots: one_in(rng, 4),
            to_and_fro: one_in(rng, 2),
            looks: (0..pick(rng, &[0, 0, 1, 3])).map(|_| log_range(rng, 10_000, SECOND / 10)).collect(),
            power_cut: one_in(rng, 8).then(|| log_range(rng, 20_000, SECOND / 5)),
        };
        // Both ends of a connection in one engine: what one holds while it waits, the other must not need.
        if plan.jobs.iter().any(|job| job.remote_target) {
            plan.arena_bytes = 16 << 20;
        } else if plan.has_remote_guests() {
            plan.arena_bytes = plan.arena_bytes.max(4 << 20);
        }
        plan
    }
}

impl Plan {
    /// A disk that is moved to and fro so many times under four busy clients.
    pub fn pendulum(seed: u64, pivots: usize) -> Plan {
        let mut plan = Plan::draw(seed);
        let rng = &mut Rng::new(seed ^ 1);
        let job = JobPlan {
            sync: SyncMode::Full,
            granularity: Some(4096),
            buf_size: 0,
            speed: 0,
            detect_zeroes: true,
            auto_finalize: true,
            auto_dismiss: true,
            verify: false,
            larger_target: false,
            remote_target: false,
            on_source_error: OnError::Report,
            on_target_error: OnError::Report,
            copy_mode: CopyMode::Background,
            on_divergence: OnDivergence::WriteBlocking,
            guest_first: GuestFirst::Auto,
            downtime_nanos_max: 0,
            deadline_nanos: None,
            verbs: Vec::new(),
            ambush: None,
            requests: [1000, 500, 4000],
            ready_nanos: 100_000,
            ending: Ending::Complete,
            target_room: None,
        };
        plan.guests = (0..4).map(|i| guest(rng, i, true, false)).collect();
        for guest in &mut plan.guests {
            (guest.join, guest.depth, guest.mix) = (Join::Start, 16, [30, 50, 5, 8, 4, 3]);
        }
        (plan.len, plan.cell, plan.hot) = (256 << 10, 512, (0, 32 << 10));
        (plan.source, plan.target) = (FileModel::regular(plan.len), FileModel::regular(plan.len));
        (plan.faults, plan.stream, plan.target_stream) = (Vec::new(), Vec::new(), Vec::new());
        (plan.power_cut, plan.looks, plan.to_and_fro) = (None, vec![1_000_000], true);
        plan.jobs = vec![job; pivots];
        plan
    }
}

fn len(rng: &mut Rng, cell: u64) -> u64 {
    let len = match rng.below(20) {
        0 => log_range(rng, 512, 64 << 10),
        1..12 => log_range(rng, 64 << 10, 256 << 10),
        12..19 => log_range(rng, 256 << 10, 1 << 20),
        _ => log_range(rng, 1 << 20, 2 << 20),
    };
    let unit = pick(rng, &[512, 512, 4096, 65_536]);
    len.next_multiple_of(unit).next_multiple_of(cell)
}

fn file_model(rng: &mut Rng, len: u64) -> FileModel {
    let mut model = if one_in(rng, 6) && len.is_multiple_of(4096) {
        FileModel::block(len)
    } else {
        FileModel::regular(len)
    };
    model.discard = pick(rng, &[DiscardModel::Anything, DiscardModel::Zeroes, DiscardModel::Refused]);
    model.direct = !one_in(rng, 4);
    model.offset_align = if len.is_multiple_of(4096) { pick(rng, &[512, 512, 4096]) } else { 512 };
    // Memory never needs more than offsets do: a transfer that comes short could not be continued.
    model.mem_align = pick(rng, &[4, 512, model.offset_align]);
    model.punch_hole = !one_in(rng, 5);
    model.zero_range = !one_in(rng, 5);
    model.zero_range_ends_punch_hole = one_in(rng, 8);
    model.seek &= !one_in(rng, 5);
    model.attributes &= !one_in(rng, 5);
    model.latency = match rng.below(8) {
        0 => Latency::SLOW_DISK,
        1 => Latency::fixed(1_000),
        2 => Latency { tail_nanos_mean: 400_000, ..Latency::FAST_DISK },
        _ => Latency::FAST_DISK,
    };
    model
}

fn guest(rng: &mut Rng, index: u64, busy: bool, remote: bool) -> Guest {
    let join = match rng.below(6) {
        _ if index == 0 => Join::Start,
        0..2 => Join::At(log_range(rng, 1_000, SECOND / 50)),
        2..4 => Join::WhenDrained,
        _ => Join::Start,
    };
    let think_nanos = if busy { 0 } else { pick(rng, &[0, 20_000, 100_000, 500_000, 2_000_000]) };
    let mixes = [
        [30, 40, 5, 8, 5, 3],
        [10, 80, 0, 0, 0, 0],
        [0, 50, 20, 10, 0, 20],
        [5, 20, 5, 40, 20, 5],
        [80, 20, 0, 0, 0, 0],
        [10, 60, 10, 10, 0, 10],
    ];
    Guest {
        join,
        remote: remote && !one_in(rng, 4),
        depth: pick(rng, &[1, 2, 4, 8, 16]),
        think_nanos,
        request_bytes_max: pick(rng, &[512, 4096, 16_384, 32_768]),
        mix: pick(rng, &mixes),
    }
}

fn faults(rng: &mut Rng) -> Vec<Fault> {
    let mut faults = Vec::new();
    for side in [Side::Source, Side::Target, Side::Notes] {
        for (trouble, rarity) in [
            (Trouble::Reads, 4),
            (Trouble::Writes, 4),
            (Trouble::Zeroes, 4),
            (Trouble::Flushes, 12),
            (Trouble::Shorts, 4),
            (Trouble::Agains, 4),
            (Trouble::Delays, 4),
        ] {
            if one_in(rng, rarity) {
                faults.push(Fault { side, trouble, chance: log_range(rng, 256, 16_384) as u32 });
            }
        }
    }
    faults
}

fn stream_faults(rng: &mut Rng) -> Vec<(StreamTrouble, u32)> {
    let all =
        [StreamTrouble::Resets, StreamTrouble::HalfCloses, StreamTrouble::Shorts, StreamTrouble::Stalls];
    let mut faults = Vec::new();
    for trouble in all {
        if one_in(rng, 4) {
            faults.push((trouble, log_range(rng, 64, 2048) as u32));
        }
    }
    faults
}

fn job(rng: &mut Rng, has_faults: bool) -> JobPlan {
    let policies = [OnError::Ignore, OnError::Ignore, OnError::Stop, OnError::Enospc, OnError::Report];
    let mut verbs = Vec::new();
    if one_in(rng, 2) {
        for _ in 0..1 + rng.below(6) {
            let at = log_range(rng, 1_000, SECOND / 10);
            verbs.push((at, verb(rng)));
        }
    }
    let ending = match rng.below(16) {
        0 => Ending::HangSourceAndComplete(log_range(rng, SECOND / 1000, 200 * SECOND)),
        1..8 => Ending::Complete,
        8..12 => Ending::SoftCancel,
        12..14 => Ending::ForceCancel,
        14 => Ending::Quit,
        _ => Ending::HangAndForceCancel,
    };
    JobPlan {
        sync: pick(rng, &[SyncMode::Full, SyncMode::Full, SyncMode::Full, SyncMode::Top, SyncMode::None]),
        granularity: if one_in(rng, 4) { None } else { Some(512 << rng.below(9)) },
        buf_size: if one_in(rng, 2) { 0 } else { log_range(rng, 512, 512 << 10) as i64 },
        speed: if one_in(rng, 3) { speed(rng) } else { 0 },
        detect_zeroes: one_in(rng, 2),
        auto_finalize: !one_in(rng, 4),
        auto_dismiss: !one_in(rng, 4),
        verify: one_in(rng, 8),
        larger_target: one_in(rng, 12),
        remote_target: one_in(rng, 6),
        on_source_error: pick(rng, &policies),
        on_target_error: pick(rng, &policies),
        copy_mode: copy_mode(rng),
        on_divergence: pick(
            rng,
            &[
                OnDivergence::WriteBlocking,
                OnDivergence::WriteBlocking,
                OnDivergence::Throttle,
                OnDivergence::Report,
            ],
        ),
        guest_first: match rng.below(4) {
            0 => GuestFirst::Off,
            1 => GuestFirst::Goal(log_range(rng, 1_000, SECOND / 100)),
            _ => GuestFirst::Auto,
        },
        downtime_nanos_max: if one_in(rng, 2) { 0 } else { log_range(rng, SECOND / 20, SECOND) },
        deadline_nanos: one_in(rng, 6).then(|| log_range(rng, 1_000, SECOND)),
        verbs,
        ambush: one_in(rng, 6).then(|| (rng.below(60_000), verb(rng))),
        requests: std::array::from_fn(|_| if one_in(rng, 4) { 0 } else { log_range(rng, 8, 128) }),
        ready_nanos: if one_in(rng, 3) { 0 } else { log_range(rng, 1_000, SECOND / 50) },
        ending,
        target_room: (has_faults && one_in(rng, 6)).then(|| log_range(rng, 4096, 512 << 10)),
    }
}

fn speed(rng: &mut Rng) -> i64 {
    if one_in(rng, 4) { 0 } else { log_range(rng, 64 << 10, 256 << 20) as i64 }
}

fn copy_mode(rng: &mut Rng) -> CopyMode {
    if one_in(rng, 3) { CopyMode::WriteBlocking } else { CopyMode::Background }
}

fn verb(rng: &mut Rng) -> Verb {
    match rng.below(19) {
        16.. => Verb::ChangeCopyMode(copy_mode(rng)),
        0..7 => Verb::Pause(log_range(rng, 1_000, SECOND / 20)),
        7..11 => Verb::SetSpeed(speed(rng)),
        11..13 => Verb::Complete,
        13 => Verb::SoftCancel,
        14 => Verb::ForceCancel,
        _ => Verb::Quit,
    }
}
