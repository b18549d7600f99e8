//! The load generator: requests to a disk, at a depth or at a rate, timed one by one, verified if asked.
//!
//! A number of workers share one source of requests. With a depth, each takes the next request as soon as its last one
//! has ended. With a rate, each takes the next request off the schedule, waits until it is due, and its latency counts
//! from then, however late the worker was: when all workers wait for a slow disk, the requests that fall due meanwhile
//! are measured with the time that they waited ([`super::schedule`]).
//!
//! With verification every block carries its origin ([`super::pattern`]), a model knows what each may hold
//! ([`super::model`]), every read is judged as it comes, and at the end all that was written is read back. A log of what
//! was acknowledged can be kept for others to judge by ([`super::ack_log`]).
//!
//! The engine takes time and randomness from the ring alone, so it runs in a simulated world as it does here: there, the
//! same seed gives the same load. It knows no files and no terminal; those are the command's.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use blockferry_ring::sync::{Notify, either};
use blockferry_ring::{Buf, Nanos, Ring, SharedBuf};

use super::ack_log::{LogHeader, LogWriter};
use super::check::{Expectation, Failures, Mismatch, Mismatches, check_on, expected};
use super::model::{MODEL_BLOCKS_MAX, Model, Survival, WriteEnd};
use super::pattern::{SECTOR, fill, find_stranger};
use super::report::{KindReport, LoadReport, VerifyReport};
use super::schedule::{Access, Dice, Kind, Pace, Schedule};
use super::target::{Lane, Target, TargetError, TargetOptions};
use crate::base::latency::LatencyHistogram;
use crate::base::range::ByteRange;
use crate::base::rng::Rng;
use crate::base::shown::plain;
use crate::block::{BlockError, WriteFlags};

/// Seeds that are drawn are below this: readers of JSON whose numbers are doubles keep them.
pub const SEED_END: u64 = 1 << 53;
/// Requests in flight of one load at most.
pub const DEPTH_MAX: usize = 1024;
/// Failed requests after which a load gives up.
pub const FAILURES_MAX: u64 = 1000;
/// Largest block, in bytes: one buffer.
pub const BLOCK_BYTES_MAX: u32 = blockferry_ring::arena::BLOCK_MAX as u32;

/// A load.
#[derive(Clone, Debug)]
pub struct LoadConfig {
    /// Bytes of a request; a multiple of 512, at most [`BLOCK_BYTES_MAX`].
    pub block_bytes: u32,
    /// The part of the disk to use; all of it if `None`. A piece at the end that holds no whole block stays unused.
    pub range: Option<ByteRange>,
    /// Which block is next.
    pub access: Access,
    /// Reads among 100 requests.
    pub read_percent: u8,
    /// Depth or rate.
    pub pace: Pace,
    /// Span after which no request starts.
    pub duration_ns: Option<Nanos>,
    /// Requests after which no other starts.
    pub operations: Option<u64>,
    /// Seed of the load and its patterns; drawn from the ring if `None`. A seed that the disk has seen before weakens
    /// verification: what an earlier run left cannot be told from what this one wrote.
    pub seed: Option<u64>,
    /// Judge what is read, and read everything back at the end.
    pub verify: bool,
    /// Have every write be durable when it is acknowledged.
    pub fua: bool,
    /// Flush after this many writes.
    pub flush_every: Option<u64>,
}

impl Default for LoadConfig {
    /// Random writes of 4 KiB, one at a time, until somebody stops them.
    fn default() -> LoadConfig {
        LoadConfig {
            block_bytes: 4096,
            range: None,
            access: Access::Random,
            read_percent: 0,
            pace: Pace::Closed { depth: 1 },
            duration_ns: None,
            operations: None,
            seed: None,
            verify: false,
            fua: false,
            flush_every: None,
        }
    }
}

/// Why a load cannot run.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The disk cannot be reached.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// Blocks of that size make no sense.
    #[error(
        "Blocks of {block_bytes} bytes are not possible: a block is a multiple of 512 bytes, at most {max}."
    )]
    BlockBytes {
        /// What was asked for.
        block_bytes: u32,
        /// The limit: that of the program or of the disk.
        max: u32,
    },
    /// The disk takes only larger blocks.
    #[error("'{name}' takes multiples of {align} bytes; blocks of {block_bytes} bytes are none.")]
    Unaligned {
        /// The disk.
        name: String,
        /// What it takes.
        align: u32,
        /// What was asked for.
        block_bytes: u32,
    },
    /// There is no room for a block.
    #[error(
        "The range from {start} to {end} does not lie on '{name}', which has {len} bytes, or holds no whole block."
    )]
    Range {
        /// The disk.
        name: String,
        /// Its length.
        len: u64,
        /// Start of the range.
        start: u64,
        /// End of the range.
        end: u64,
    },
    /// More blocks than can be kept in mind.
    #[error(
        "Verifying and logging keep {max} blocks in mind at most; the range has {blocks}. Use larger blocks or a \
         smaller range."
    )]
    TooManyBlocks {
        /// Blocks in the range.
        blocks: u64,
        /// The limit.
        max: u64,
    },
    /// A depth or rate of nothing.
    #[error("A load needs between 1 and {max} requests in flight, and a rate above 0.")]
    Pace {
        /// The limit.
        max: usize,
    },
    /// Writes to something that takes none.
    #[error("'{name}' is read-only; use 100 % reads.")]
    ReadOnly {
        /// The disk.
        name: String,
    },
    /// The log could not be written.
    #[error("Writing the log of acknowledged writes failed: {}.", plain(.error))]
    Log {
        /// Why.
        error: std::io::Error,
    },
    /// There is no memory for so many and so large requests.
    #[error("There is no memory for {depth} requests of {block_bytes} bytes: {errno}.")]
    Memory {
        /// Requests in flight.
        depth: usize,
        /// Bytes of each.
        block_bytes: u32,
        /// Why.
        errno: blockferry_ring::Errno,
    },
    /// The ring could not be made.
    #[error(transparent)]
    Setup(#[from] blockferry_ring::SetupError),
}

/// How far a load is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LoadProgress {
    /// Time since the start.
    pub elapsed_ns: Nanos,
    /// Requests that succeeded.
    pub operations: u64,
    /// Bytes that they moved.
    pub bytes: u64,
    /// Requests that failed, or found the wrong content.
    pub errors: u64,
    /// The load is over and what was written is read back.
    pub checking: bool,
}

/// Stops a load and looks at it while it runs. Clones are the same.
#[derive(Clone, Debug)]
pub struct LoadControl(Rc<ControlInner>);

#[derive(Debug)]
struct ControlInner {
    stop: Cell<bool>,
    stopped: Notify,
    progress: Cell<LoadProgress>,
}

impl LoadControl {
    /// For one load.
    pub fn new(ring: &Ring) -> LoadControl {
        LoadControl(Rc::new(ControlInner {
            stop: Cell::new(false),
            stopped: ring.notify(),
            progress: Cell::default(),
        }))
    }

    /// No request starts any more; the load ends when those in flight have ended.
    pub fn stop(&self) {
        self.0.stop.set(true);
        self.0.stopped.notify();
    }

    /// How far it is.
    pub fn progress(&self) -> LoadProgress {
        self.0.progress.get()
    }

    fn is_stopped(&self) -> bool {
        self.0.stop.get()
    }
}

/// What is left of a load.
#[derive(Debug)]
pub struct LoadOutcome {
    /// What it found out.
    pub report: LoadReport,
    /// What each block may hold, for a load that verifies or logs.
    pub expectation: Option<Expectation>,
}

/// One kind of requests, as counted.
#[derive(Debug, Default)]
struct Tally {
    operations: u64,
    errors: u64,
    latency: LatencyHistogram,
}

impl Tally {
    fn report(&self, block_bytes: u64, elapsed_ns: u64) -> KindReport {
        let bytes = self.operations * block_bytes;
        KindReport::new(self.operations, self.errors, bytes, elapsed_ns, &self.latency)
    }
}

/// What changes while the load runs.
#[derive(Debug)]
struct State {
    dice: Dice,
    schedule: Option<Schedule>,
    taken: u64,
    reads: Tally,
    writes: Tally,
    flushes: Tally,
    flushes_sent: u64,
    writes_since_flush: u64,
    generation: u64,
    model: Option<Model>,
    log: Option<LogWriter>,
    reads_verified: u64,
    read_mismatches: Mismatches,
    failures: Failures,
    /// Requests that were due and never sent: how many, and how long they had waited.
    unsent: u64,
    unsent_waits: LatencyHistogram,
    last_end_ns: Nanos,
}

struct Load {
    ring: Ring,
    target: Target,
    config: LoadConfig,
    seed: u64,
    offset: u64,
    blocks: u64,
    start_ns: Nanos,
    control: LoadControl,
    state: RefCell<State>,
}

/// A request off the source.
struct Assignment {
    kind: Kind,
    block: u64,
    /// When it is due, if the load has a rate.
    due_ns: Option<Nanos>,
}

/// Checks what was asked for against the disk: where the range starts, and how many blocks it has. `needs_model`: it is to be
/// known what each block holds, to verify or to log it.
pub fn check(target: &Target, config: &LoadConfig, needs_model: bool) -> Result<(u64, u64), LoadError> {
    let Some(lane) = target.lanes().first() else { return Err(LoadError::Pace { max: DEPTH_MAX }) };
    let (driver, name) = (lane.driver(), target.name().to_owned());
    let (block_bytes, limits) = (config.block_bytes, driver.limits());
    let max = limits.transfer_max.min(BLOCK_BYTES_MAX);
    if block_bytes == 0 || !block_bytes.is_multiple_of(SECTOR as u32) || block_bytes > max {
        return Err(LoadError::BlockBytes { block_bytes, max });
    }
    let depth = config.pace.depth();
    if depth == 0 || depth > DEPTH_MAX || matches!(config.pace, Pace::Open { rate_per_sec: 0, .. }) {
        return Err(LoadError::Pace { max: DEPTH_MAX });
    }
    if driver.is_read_only() && config.read_percent < 100 {
        return Err(LoadError::ReadOnly { name });
    }
    let len = target.len();
    let range = config.range.unwrap_or(ByteRange::first(len));
    let align = limits.request_align.max(if needs_model { SECTOR as u32 } else { 1 });
    if !range.start().is_multiple_of(align.into()) || !block_bytes.is_multiple_of(align) {
        return Err(LoadError::Unaligned { name, align, block_bytes });
    }
    let blocks = range.len() / u64::from(block_bytes);
    if range.end() > len || blocks == 0 {
        return Err(LoadError::Range { name, len, start: range.start(), end: range.end() });
    }
    if needs_model && blocks > MODEL_BLOCKS_MAX {
        return Err(LoadError::TooManyBlocks { blocks, max: MODEL_BLOCKS_MAX });
    }
    Ok((range.start(), blocks))
}

/// Sees to it that every worker gets its buffer, and something is left for others.
fn make_room(ring: &Ring, config: &LoadConfig) -> Result<(), LoadError> {
    const LEFT_BYTES: usize = 8 << 20;
    let depth = config.pace.depth();
    let needed = depth * (config.block_bytes as usize).next_power_of_two();
    let free = ring.arena().bytes().saturating_sub(ring.arena().bytes_used());
    if free >= needed + LEFT_BYTES {
        return Ok(());
    }
    let block_bytes = config.block_bytes;
    ring.grow_arena(needed).map_err(|errno| LoadError::Memory { depth, block_bytes, errno })
}

/// Runs a load on a ring of its own against what a person named, until it ends by itself.
pub fn run(config: &LoadConfig, target: &str, options: &TargetOptions) -> Result<LoadReport, LoadError> {
    let ring = Ring::new(&blockferry_ring::Config::default())?;
    let (handle, config, name, options) = (ring.clone(), config.clone(), target.to_owned(), options.clone());
    let result = ring.block_on(async move {
        let target = Target::open(&handle, &name, &options).await?;
        let control = LoadControl::new(&handle);
        let outcome = run_on(&handle, &target, &config, &control, None).await;
        target.close().await;
        outcome.map(|outcome| outcome.report)
    });
    // What cannot be ended is leaked, and logged by the ring.
    let _ = ring.shutdown(crate::base::units::NS_PER_SEC);
    result
}

/// Runs a load on an existing ring until it ends by itself, or `control` stops it. `log` takes the log of acknowledged
/// writes; its owner buffers it.
pub async fn run_on(
    ring: &Ring,
    target: &Target,
    config: &LoadConfig,
    control: &LoadControl,
    log: Option<Box<dyn std::io::Write>>,
) -> Result<LoadOutcome, LoadError> {
    let needs_model = config.verify || log.is_some();
    let (offset, blocks) = check(target, config, needs_model)?;
    make_room(ring, config)?;
    let seed = config.seed.unwrap_or_else(|| ring.random() % SEED_END);
    let mut rng = Rng::new(seed);
    let dice = Dice::new(rng.fork(), config.access, blocks, config.read_percent);
    let schedule = match config.pace {
        Pace::Open { rate_per_sec, poisson, .. } => Some(Schedule::new(rate_per_sec, poisson, rng.fork())),
        Pace::Closed { .. } => None,
    };
    let header = LogHeader::new(seed, offset, config.block_bytes, blocks);
    let start_ns = ring.clock();
    let state = State {
        dice,
        schedule,
        taken: 0,
        reads: Tally::default(),
        writes: Tally::default(),
        flushes: Tally::default(),
        flushes_sent: 0,
        writes_since_flush: 0,
        generation: 0,
        model: needs_model.then(|| Model::new(blocks, Survival::Everything)).flatten(),
        log: log.map(|out| LogWriter::new(out, &header)),
        reads_verified: 0,
        read_mismatches: Mismatches::default(),
        failures: Failures::default(),
        unsent: 0,
        unsent_waits: LatencyHistogram::new(),
        last_end_ns: start_ns,
    };
    let load = Rc::new(Load {
        ring: ring.clone(),
        target: target.clone(),
        config: config.clone(),
        seed,
        offset,
        blocks,
        start_ns,
        control: control.clone(),
        state: RefCell::new(state),
    });
    let workers: Vec<_> =
        (0..config.pace.depth()).map(|number| ring.spawn_with_result(work(load.clone(), number))).collect();
    for worker in workers {
        worker.take().await;
    }
    load.finish().await
}

/// One worker: requests one after the other.
async fn work(load: Rc<Load>, number: usize) {
    let lanes = load.target.lanes();
    let lane = &lanes[number % lanes.len()];
    let mut memory = load.ring.alloc(load.config.block_bytes as usize).await;
    // Without verification the content never changes but for a stamp; noise it is all the same.
    Rng::new(load.seed ^ number as u64).fill(memory.as_mut_slice());
    // A disk that answers at once would leave nobody else a turn, not even who is to end it.
    let mut stint = load.ring.stint();
    while let Some(assignment) = load.next() {
        stint.step().await;
        if let Some(due_ns) = assignment.due_ns
            && !load.wait_until_due(due_ns).await
        {
            break;
        }
        let start_ns = assignment.due_ns;
        memory = match assignment.kind {
            Kind::Read => load.read(lane, assignment.block, memory, start_ns).await,
            Kind::Write => load.write(lane, assignment.block, memory, start_ns).await,
        };
        if load.flush_is_due() {
            load.flush(lane).await;
        }
        if lane.is_lost() {
            load.control.stop();
        }
    }
}

impl Load {
    fn place(&self, block: u64) -> u64 {
        self.offset + block * u64::from(self.config.block_bytes)
    }

    /// Nanoseconds of the ring's clock after which no request starts.
    fn end_ns(&self) -> Nanos {
        self.config.duration_ns.map_or(Nanos::MAX, |span| self.start_ns.saturating_add(span))
    }

    /// The next request, unless the load is over.
    fn next(&self) -> Option<Assignment> {
        if self.control.is_stopped() || self.ring.clock() >= self.end_ns() {
            return None;
        }
        let mut state = self.state.borrow_mut();
        if self.config.operations.is_some_and(|operations| state.taken >= operations) {
            return None;
        }
        let due_ns = match &mut state.schedule {
            Some(schedule) => {
                let due_ns = self.start_ns.saturating_add(schedule.peek());
                if due_ns >= self.end_ns() {
                    return None;
                }
                schedule.take();
                Some(due_ns)
            }
            None => None,
        };
        state.taken += 1;
        let (kind, block) = state.dice.roll();
        Some(Assignment { kind, block, due_ns })
    }

    /// Waits until a request is due; false if the load was stopped before.
    async fn wait_until_due(&self, due_ns: Nanos) -> bool {
        if self.ring.now() < due_ns {
            let stopped = self.control.0.stopped.until(|| self.control.is_stopped().then_some(()));
            either(self.ring.sleep_until(due_ns), stopped).await;
        }
        if !self.control.is_stopped() {
            return true;
        }
        // It was due already if the workers were all late; then it counts as one that was never sent.
        let now_ns = self.ring.clock();
        let mut state = self.state.borrow_mut();
        state.taken -= 1;
        if due_ns < now_ns {
            state.unsent += 1;
            state.unsent_waits.record(now_ns - due_ns);
        }
        false
    }

    async fn read(&self, lane: &Lane, block: u64, buf: Buf, due_ns: Option<Nanos>) -> Buf {
        let offset = self.place(block);
        let ticket = {
            let mut state = self.state.borrow_mut();
            state.model.as_mut().filter(|_| self.config.verify).map(|model| model.begin_read(block))
        };
        let start_ns = due_ns.unwrap_or_else(|| self.ring.clock());
        let (buf, result) = lane.driver().read(offset, buf).await;
        let end_ns = self.ring.clock();
        let mut state = self.state.borrow_mut();
        let state = &mut *state;
        let candidates = match (ticket, &mut state.model) {
            (Some(ticket), Some(model)) => Some(model.end_read(ticket)),
            _ => None,
        };
        let good = result.is_ok();
        state.reads.count(start_ns, end_ns, result, &mut state.failures);
        if let Some(candidates) = candidates.filter(|candidates| good && !candidates.is_anything()) {
            let allowed = |generation| candidates.contains(generation);
            match find_stranger(buf.as_slice(), self.seed, offset, allowed) {
                None => state.reads_verified += 1,
                Some((offset, found)) => state.read_mismatches.add(Mismatch {
                    offset,
                    found: found.to_string(),
                    expected: expected(candidates.generations(), self.seed),
                }),
            }
        }
        self.ended(state, end_ns);
        buf
    }

    async fn write(&self, lane: &Lane, block: u64, mut buf: Buf, due_ns: Option<Nanos>) -> Buf {
        let (offset, fua) = (self.place(block), self.config.fua);
        let generation = {
            let mut state = self.state.borrow_mut();
            state.generation += 1;
            state.generation
        };
        self.stamp(buf.as_mut_slice(), offset, generation);
        {
            let mut state = self.state.borrow_mut();
            if let Some(model) = &mut state.model {
                model.begin_write_as(block, generation);
            }
            if let Some(log) = &mut state.log {
                log.write(block, generation, fua);
            }
        }
        let buf = buf.freeze();
        let start_ns = due_ns.unwrap_or_else(|| self.ring.clock());
        let result = lane.driver().write(offset, buf.clone(), WriteFlags { fua }).await;
        let end_ns = self.ring.clock();
        {
            let mut state = self.state.borrow_mut();
            let end = match &result {
                Ok(()) => WriteEnd::Acknowledged { fua },
                Err(_) if lane.is_lost() => WriteEnd::Unanswered,
                Err(_) => WriteEnd::Failed,
            };
            if let Some(model) = &mut state.model {
                model.end_write(block, generation, end);
            }
            if let Some(log) = &mut state.log {
                log.answer(generation, end);
            }
            state.writes_since_flush += u64::from(result.is_ok());
            let state = &mut *state;
            state.writes.count(start_ns, end_ns, result, &mut state.failures);
            self.ended(state, end_ns);
        }
        self.thaw(buf).await
    }

    /// Makes the content of a block that of this write.
    fn stamp(&self, bytes: &mut [u8], offset: u64, generation: u64) {
        if self.config.verify || self.state.borrow().log.is_some() {
            return fill(bytes, self.seed, offset, generation);
        }
        // No two blocks alike, so that nobody can store them once.
        for page in bytes.chunks_mut(4096) {
            page[..8].copy_from_slice(&(generation ^ self.seed).to_le_bytes());
            page[8..16].copy_from_slice(&offset.to_le_bytes());
        }
    }

    /// The buffer again; another one if something below still holds it.
    async fn thaw(&self, buf: SharedBuf) -> Buf {
        match buf.try_thaw() {
            Ok(buf) => buf,
            Err(held) => {
                let mut buf = self.ring.alloc(held.len()).await;
                held.copy_to(0, buf.as_mut_slice());
                buf
            }
        }
    }

    fn flush_is_due(&self) -> bool {
        let mut state = self.state.borrow_mut();
        let due = self.config.flush_every.is_some_and(|every| state.writes_since_flush >= every.max(1));
        if due {
            state.writes_since_flush = 0;
        }
        due
    }

    async fn flush(&self, lane: &Lane) {
        let (number, moment) = {
            let mut state = self.state.borrow_mut();
            state.flushes_sent += 1;
            let number = state.flushes_sent;
            if let Some(log) = &mut state.log {
                log.flush(number);
            }
            (number, state.model.as_mut().map(Model::begin_flush))
        };
        let start_ns = self.ring.clock();
        let result = lane.driver().flush().await;
        let end_ns = self.ring.clock();
        let mut state = self.state.borrow_mut();
        if result.is_ok() {
            if let Some(log) = &mut state.log {
                log.flushed(number);
            }
            if let (Some(model), Some(moment)) = (&mut state.model, moment) {
                model.end_flush(moment);
            }
        }
        let state = &mut *state;
        state.flushes.count(start_ns, end_ns, result, &mut state.failures);
        self.ended(state, end_ns);
    }

    /// Bookkeeping after every request.
    fn ended(&self, state: &mut State, end_ns: Nanos) {
        state.last_end_ns = state.last_end_ns.max(end_ns);
        if state.failures.count >= FAILURES_MAX {
            self.control.stop();
        }
        let operations = state.reads.operations + state.writes.operations;
        self.control.0.progress.set(LoadProgress {
            elapsed_ns: end_ns - self.start_ns,
            operations,
            bytes: operations * u64::from(self.config.block_bytes),
            errors: state.failures.count + state.read_mismatches.count,
            checking: false,
        });
    }

    /// Requests that were due when the load ended and that nobody had taken.
    fn count_unsent(&self, state: &mut State, over_ns: Nanos) {
        let over_ns = over_ns.min(self.end_ns());
        let Some(schedule) = &mut state.schedule else { return };
        let left = self.config.operations.map_or(u64::MAX, |operations| operations - state.taken);
        for _ in 0..left {
            let due_ns = self.start_ns.saturating_add(schedule.take());
            if due_ns >= over_ns {
                break;
            }
            state.unsent += 1;
            state.unsent_waits.record(over_ns - due_ns);
        }
    }

    /// After the last worker: reads back, sums up.
    async fn finish(&self) -> Result<LoadOutcome, LoadError> {
        let over_ns = self.ring.clock();
        let lost = self.target.lanes().iter().any(Lane::is_lost);
        let (log, model) = {
            let mut state = self.state.borrow_mut();
            self.count_unsent(&mut state, over_ns);
            (state.log.take(), state.model.take())
        };
        if let Some(log) = log {
            log.finish().map_err(|error| LoadError::Log { error })?;
        }
        let expectation = model.map(|model| Expectation {
            model: Rc::new(model),
            seed: self.seed,
            offset: self.offset,
            block_bytes: self.config.block_bytes,
            later_writes: false,
        });
        let mut at_end = None;
        if let Some(expectation) = expectation.clone().filter(|_| self.config.verify && !lost) {
            let progress = &self.control.0.progress;
            progress.set(LoadProgress { checking: true, ..progress.get() });
            at_end = Some(check_on(&self.ring, &self.target, expectation).await);
        }
        let wrote = self.state.borrow().writes.operations > 0;
        let settled = if wrote { self.target.settle().await } else { Ok(()) };
        let mut state = self.state.borrow_mut();
        if let Err(error) = settled {
            state.failures.add(error.to_string());
        }
        let report = self.report(&mut state, lost, at_end);
        Ok(LoadOutcome { report, expectation })
    }

    fn report(&self, state: &mut State, lost: bool, at_end: Option<super::check::CheckReport>) -> LoadReport {
        let elapsed_ns = state.last_end_ns - self.start_ns;
        let block_bytes = u64::from(self.config.block_bytes);
        let (reads, writes) = (&state.reads, &state.writes);
        let kinds = [("read", &reads.latency), ("write", &writes.latency), ("unsent", &state.unsent_waits)];
        let kinds = kinds.into_iter().filter(|(_, histogram)| histogram.count() > 0);
        let histograms = kinds.map(|(kind, histogram)| (kind, histogram.clone())).collect();
        let mut histogram = reads.latency.clone();
        histogram.merge(&writes.latency);
        histogram.merge(&state.unsent_waits);
        let (operations, errors) = (reads.operations + writes.operations, reads.errors + writes.errors);
        let verify = self.config.verify.then(|| VerifyReport {
            reads_verified: state.reads_verified,
            read_mismatches: std::mem::take(&mut state.read_mismatches),
            at_end,
        });
        LoadReport {
            target: self.target.name().to_owned(),
            seed: self.seed,
            range_offset: self.offset,
            range_bytes: self.blocks * block_bytes,
            block_bytes: self.config.block_bytes,
            depth: self.config.pace.depth(),
            connections: self.target.lanes().len(),
            rate_per_sec: match self.config.pace {
                Pace::Open { rate_per_sec, .. } => Some(rate_per_sec),
                Pace::Closed { .. } => None,
            },
            holes_percent: None,
            elapsed_ns,
            total: KindReport::new(operations, errors, operations * block_bytes, elapsed_ns, &histogram),
            reads: state.reads.report(block_bytes, elapsed_ns),
            writes: state.writes.report(block_bytes, elapsed_ns),
            flushes: state.flushes.report(0, elapsed_ns),
            unsent: state.unsent,
            writes_acknowledged: state.writes.operations,
            failures: std::mem::take(&mut state.failures),
            lost,
            verify,
            histogram,
            histograms,
        }
    }
}

impl Tally {
    fn count(
        &mut self,
        start_ns: Nanos,
        end_ns: Nanos,
        result: Result<(), BlockError>,
        failures: &mut Failures,
    ) {
        match result {
            Ok(()) => {
                self.operations += 1;
                self.latency.record(end_ns.saturating_sub(start_ns));
            }
            Err(error) => {
                self.errors += 1;
                failures.add(error.to_string());
            }
        }
    }
}
