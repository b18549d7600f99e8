//! `blockferry mirror`: copies a disk to a new image, at rest or while it is in use.

use std::path::PathBuf;
use std::rc::Rc;

use blockferry_ring::arena::BLOCK_MAX;
use blockferry_ring::sync::{Either, either};
use blockferry_ring::{Nanos, Patience};
use clap::{Args, ValueEnum};
use serde_json::json;

use super::exit::{Exit, Failure};
use super::image::{OpenArgs, Reflink, duration, parse_format, size, speed, state_dir};
use super::progress::{INTERVAL_NANOS, Progress};
use super::serve::{ClientArgs, Exports, export_uri};
use super::signals::{Signal, Signals};
use super::target::{Target, TargetOptions};
use super::tool::option_pairs;
use super::{Global, config, stats};
use crate::base::limits;
use crate::base::units::{fmt_bytes, fmt_duration, fmt_rate};
use crate::engine::create::NewImage;
use crate::engine::qcow2::{format as image_format, qcow2};
use crate::engine::{Engine, Format};
use crate::format::qcow2::Qcow2;
use crate::graph::node::Node;
use crate::job::event::JobEvent;
use crate::job::governor::GuestFirst;
use crate::job::mirror::converge::OnDivergence;
use crate::job::mirror::verify::{Report, Verifier};
use crate::job::mirror::{MirrorOptions, SyncMode};
use crate::job::offload::OffloadPolicy;
use crate::job::policy::{CopyMode, ErrorAction, OnError};
use crate::job::runner::{Ending, ErrorPolicies, Job};
use crate::protocol::mark::MarkInfo;
use crate::protocol::nbd::NbdUri;

const AFTER: &str = "\
Examples:
  Copy a disk that nobody uses, and check the copy byte for byte:
      blockferry mirror --verify old.img new.img

  Serve a disk and copy it while clients write to it; then let them go on, on the copy:
      blockferry mirror -f raw old.img new.img --export 'nbd+unix:///disk?socket=/run/disk.sock' --pivot

  Keep a copy in step until told to stop (Ctrl-C finishes it: the copy is then complete):
      blockferry mirror -f raw disk.img copy.img --export nbd://127.0.0.1/disk --follow --speed 200MiB

While the job runs the target carries a mark that says so; `blockferry info` shows it. The mark is gone
when, and only when, the target equals the source and is flushed. Exit code 3 means that the job was
cancelled before that.";

/// Copy a disk to a new image, at rest or while it is in use
#[derive(Debug, Args)]
#[command(after_help = AFTER)]
pub struct MirrorArgs {
    /// The disk to copy: a file, a block device, nbd://HOST/EXPORT, gluster://HOST/VOLUME/IMAGE, mem:SIZE, null:SIZE or
    /// delay:TIME:NAME
    #[arg(value_name = "SRC")]
    source: String,
    /// Where to: a new file (created with the source's size), or an existing image or NBD export with --force
    #[arg(value_name = "DST")]
    target: String,
    /// Format of the source. Must be said (raw) when clients may write to it
    #[arg(short = 'f', long, value_name = "FORMAT", value_parser = parse_format)]
    format: Option<Format>,
    /// Format of the target. Must be said (raw) for an existing one
    #[arg(short = 'F', long, value_name = "FORMAT", value_parser = parse_format)]
    target_format: Option<Format>,
    /// Options of the target's format if it is made, as NAME=VALUE,NAME=VALUE (may be said more than once)
    #[arg(short, long, value_name = "OPTIONS")]
    options: Vec<String>,
    /// What to copy: all of it; what is above the backing file (all, where there is none); only new writes
    #[arg(long, value_enum, default_value_t = Sync::Full)]
    sync: Sync,
    /// Serve the source's clients meanwhile, at this NBD URI (may be said more than once)
    #[arg(long, value_name = "URI", value_parser = export_uri)]
    export: Vec<NbdUri>,
    /// When source and target are alike, let the clients go on, on the target
    #[arg(long, requires = "export", conflicts_with = "follow")]
    pivot: bool,
    /// Stay in step until SIGINT or SIGTERM, which complete the copy
    #[arg(long)]
    follow: bool,
    /// End when the job ends, even if clients are still connected
    #[arg(long, requires = "export")]
    exit_on_done: bool,
    /// Read both disks back, past the page cache, and compare; what is written meanwhile is compared again
    #[arg(long)]
    verify: bool,
    /// Overwrite an existing target
    #[arg(long)]
    force: bool,
    /// Limit the copying, such as 200MiB (a second); 0 or `unlimited` for no limit
    #[arg(long, value_name = "RATE", value_parser = speed, default_value = "0")]
    speed: u64,
    /// How clients' writes are treated while the job runs: copied later, or sent to both disks at once
    #[arg(long, value_enum, value_name = "MODE", default_value_t = CopyModeArg::Background)]
    copy_mode: CopyModeArg,
    /// What to do when clients write faster than the job copies
    #[arg(long, value_enum, value_name = "POLICY", default_value_t = Divergence::WriteBlocking)]
    on_divergence: Divergence,
    /// Clients' latency while the job runs: `auto` (near what it is without the job), `off`, or a time that 99
    /// of 100 requests shall not exceed, such as 500us
    #[arg(long, value_name = "HOW", value_parser = guest_first, default_value = "auto")]
    guest_first: GuestFirst,
    /// The longest time for which clients wait while the job becomes ready or ends, such as 100ms; 0 for no
    /// bound. (With --verify the comparing that is left comes on top)
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "300ms")]
    max_downtime: u64,
    /// Be ready within this time, such as 10min, even if clients notice
    #[arg(long, value_name = "TIME", value_parser = duration)]
    deadline: Option<u64>,
    /// Track changes in pieces of this size: a power of two from 512 to 64MiB [default: by the target, 64KiB]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    granularity: Option<u64>,
    /// Bytes in flight at most [default: 16MiB]
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "0")]
    buf_size: u64,
    /// Keep zeroes in the source's data out of the target
    #[arg(long, value_enum, default_value_t = DetectZeroes::Unmap)]
    detect_zeroes: DetectZeroes,
    /// All of an existing target reads as zeroes: nothing of it is zeroed
    #[arg(long, requires = "force")]
    target_is_zero: bool,
    /// Let source and target share blocks where the filesystem can, if no client can write meanwhile
    #[arg(long, value_enum, value_name = "WHEN", default_value_t = Reflink::Auto)]
    reflink: Reflink,
    /// Allow a target that is larger than the source; what is behind the source's end stays as it is
    #[arg(long)]
    allow_larger_target: bool,
    /// What to do when reading the source fails
    #[arg(long, value_enum, value_name = "POLICY", default_value_t = Policy::Report)]
    on_source_error: Policy,
    /// What to do when writing the target fails
    #[arg(long, value_enum, value_name = "POLICY", default_value_t = Policy::Report)]
    on_target_error: Policy,
    /// Where to note unfinished targets that cannot carry a mark themselves (block devices, some filesystems)
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// No progress
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    open: OpenArgs,
    #[command(flatten)]
    clients: ClientArgs,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Sync {
    Full,
    Top,
    None,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum DetectZeroes {
    /// Copy zeroes as data
    Off,
    /// Write zeroes by the target's own means; its space stays its own
    On,
    /// The same, and space is given back where that is possible
    Unmap,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum CopyModeArg {
    /// What clients change is copied later
    Background,
    /// Clients' writes go to both disks, and are answered after both
    WriteBlocking,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Divergence {
    /// Go over to write-blocking
    WriteBlocking,
    /// Slow clients' writes down, smoothly, until the job gains on them
    Throttle,
    /// Show it, no more
    Report,
}

fn guest_first(text: &str) -> Result<GuestFirst, String> {
    match text {
        "auto" | "on" => Ok(GuestFirst::Auto),
        "off" => Ok(GuestFirst::Off),
        time => duration(time).map(GuestFirst::Goal),
    }
}

/// The error policies, as clap shows them.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Policy {
    /// End the job with the error
    Report,
    /// Try again, with pauses that grow
    Ignore,
    /// Pause the job
    Stop,
    /// Pause the job when the target is full, otherwise report
    Enospc,
}

impl From<Policy> for OnError {
    fn from(policy: Policy) -> OnError {
        match policy {
            Policy::Report => OnError::Report,
            Policy::Ignore => OnError::Ignore,
            Policy::Stop => OnError::Stop,
            Policy::Enospc => OnError::Enospc,
        }
    }
}

/// Runs the command.
pub fn main(global: &Global, args: &MirrorArgs) -> Result<Exit, Failure> {
    let mut config = config(global);
    if args.export.is_empty() && !args.verify {
        config.arena_bytes = arena_bytes(args.granularity);
    }
    let engine = Engine::new(&config)?;
    let signals = Signals::new(engine.ring())?.with_continue(engine.ring())?;
    let (global, engine) = (global.clone(), Rc::new(engine));
    let run = Run { global, engine: engine.clone(), signals };
    // The arguments outlive the future in the process; the future must own them all the same.
    let args = Rc::new(Settings::new(args)?);
    engine.run(async move { run.mirror(&args).await })
}

/// Memory for a job that shares it with nobody: for all copies that it may have in flight, and something to spare. More
/// would be zeroed and pinned for nothing, which is a good part of the CPU time of a short copy.
fn arena_bytes(granularity: Option<u64>) -> usize {
    let chunk = limits::MIRROR_CHUNK_BYTES.max(granularity.unwrap_or(0)).min(BLOCK_MAX as u64) as usize;
    limits::MIRROR_OPERATIONS_MAX * chunk + (4 << 20)
}

/// What is reported at the end.
struct Outcome<'a> {
    ending: &'a Ending,
    elapsed_ns: u64,
    /// Bytes of the target behind the source's end.
    tail: Option<u64>,
    /// Bytes that source and target occupy.
    allocated: [Option<u64>; 2],
}

/// The arguments, in the library's terms.
struct Settings {
    source: String,
    target: String,
    format: Option<Format>,
    target_format: Option<Format>,
    target_options: Vec<(String, String)>,
    sync: SyncMode,
    export: Vec<NbdUri>,
    pivot: bool,
    follow: bool,
    exit_on_done: bool,
    verify: bool,
    force: bool,
    speed: i64,
    granularity: Option<u64>,
    buf_size: i64,
    copy_mode: CopyMode,
    on_divergence: OnDivergence,
    guest_first: GuestFirst,
    max_downtime: u64,
    deadline: Option<u64>,
    detect_zeroes: bool,
    may_unmap: bool,
    target_is_zero: bool,
    offload: OffloadPolicy,
    allow_larger_target: bool,
    policies: ErrorPolicies,
    state_dir: Option<PathBuf>,
    quiet: bool,
    open: OpenArgs,
    clients: ClientArgs,
}

impl Settings {
    fn new(args: &MirrorArgs) -> Result<Settings, Failure> {
        if args.follow && args.export.is_empty() && args.sync as u8 != Sync::None as u8 {
            tracing::info!(
                "without --export nobody can write through this process: there is nothing to follow"
            );
        }
        let too_large = |name: &str| Failure::text(format!("--{name} is too large"));
        Ok(Settings {
            source: args.source.clone(),
            target: args.target.clone(),
            format: args.format,
            target_format: args.target_format,
            target_options: option_pairs(&args.options)?,
            sync: match args.sync {
                Sync::Full => SyncMode::Full,
                Sync::Top => SyncMode::Top,
                Sync::None => SyncMode::None,
            },
            export: args.export.clone(),
            pivot: args.pivot,
            follow: args.follow,
            exit_on_done: args.exit_on_done,
            verify: args.verify,
            force: args.force,
            speed: i64::try_from(args.speed).map_err(|_| too_large("speed"))?,
            granularity: args.granularity,
            buf_size: i64::try_from(args.buf_size).map_err(|_| too_large("buf-size"))?,
            copy_mode: match args.copy_mode {
                CopyModeArg::Background => CopyMode::Background,
                CopyModeArg::WriteBlocking => CopyMode::WriteBlocking,
            },
            on_divergence: match args.on_divergence {
                Divergence::WriteBlocking => OnDivergence::WriteBlocking,
                Divergence::Throttle => OnDivergence::Throttle,
                Divergence::Report => OnDivergence::Report,
            },
            guest_first: args.guest_first,
            max_downtime: args.max_downtime,
            deadline: args.deadline,
            detect_zeroes: args.detect_zeroes != DetectZeroes::Off,
            may_unmap: args.detect_zeroes != DetectZeroes::On,
            target_is_zero: args.target_is_zero,
            offload: match args.reflink {
                Reflink::Auto => OffloadPolicy::Reflink,
                Reflink::Never => OffloadPolicy::Never,
            },
            allow_larger_target: args.allow_larger_target,
            policies: ErrorPolicies {
                source: args.on_source_error.into(),
                target: args.on_target_error.into(),
            },
            state_dir: args.state_dir.clone(),
            quiet: args.quiet,
            open: args.open.clone(),
            clients: args.clients.clone(),
        })
    }
}

/// As many completions as a job has copies in flight; the time is about what a device with 2 GB/s takes for them.
const BULK: Patience = Patience { completions: limits::MIRROR_OPERATIONS_MAX, wait_usec: 2_000 };

/// What runs once everything is opened.
struct Started {
    exports: Exports,
    job: Job,
    verifier: Option<Rc<Verifier>>,
    began: Nanos,
}

struct Run {
    global: Global,
    engine: Rc<Engine>,
    signals: Signals,
}

impl Run {
    async fn mirror(&self, settings: &Settings) -> Result<Exit, Failure> {
        let ring = self.engine.ring().clone();
        let read_only = settings.export.is_empty();
        let source =
            self.engine.open(&settings.source, &settings.open.image(settings.format, read_only)).await?;
        let options = TargetOptions {
            name: &settings.target,
            format: settings.target_format,
            force: settings.force,
            len: source.driver().len(),
            open: &settings.open,
            state_dir: state_dir(settings.state_dir.as_deref()),
            mark: MarkInfo::incomplete("mirror", &settings.source).started(unix_secs()),
        };
        let target = self.open_target(settings, &source, options).await?;
        let started = self.start(settings, &source, &target).await;
        let Started { exports, job, verifier, began } = match started {
            Ok(started) => started,
            Err(failure) => {
                target.undo(&self.engine).await;
                return Err(failure);
            }
        };
        // With clients, what one of them waits for must not wait for other things.
        let alone = settings.export.is_empty();
        if alone && (is_synchronous(&settings.source) || is_synchronous(&settings.target)) {
            ring.set_patience(Some(BULK));
        }
        let tail = target.node.driver().len().checked_sub(source.driver().len()).filter(|tail| *tail > 0);
        let mark = target.marker(&self.engine);
        // Not the nodes: their uses hold locks.
        let drivers = [source.driver().clone(), target.node.driver().clone()];
        drop((source, target));
        let ending = self.follow(settings, &job, verifier.as_ref()).await?;
        let elapsed_ns = ring.clock() - began;
        let allocated = drivers.map(|driver| driver.allocated_bytes());
        let result = Outcome { ending: &ending, elapsed_ns, tail, allocated };
        let exit = self.report(settings, &job, &result, verifier.as_ref());
        // What cannot be told is not said.
        let is_marked = mark.is_set().await.unwrap_or(false);
        drop(mark);
        if !settings.exit_on_done && exit != Exit::Cancelled {
            exports.serve_until_idle(&self.signals).await;
        }
        exports.stop().await;
        stats::print(&self.global, &ring);
        exit_of(exit, ending, is_marked)
    }

    /// Opens the target, or makes it: raw, or in the format that was said. An overlay of the source's backing file if only
    /// what lies above that is copied.
    async fn open_target(
        &self,
        settings: &Settings,
        source: &Rc<Node>,
        options: TargetOptions<'_>,
    ) -> Result<Target, Failure> {
        let format = options.format.unwrap_or(Format::Raw);
        let mut new = NewImage::parse(format, &settings.target_options, Some(options.len))
            .map_err(|text| Failure::text(format!("The target '{}': {text}", options.name)))?;
        if let NewImage::Qcow2(new) = &mut new
            && settings.sync == SyncMode::Top
            && new.backing_file.is_none()
            && let Some(backing) = qcow2(source.driver()).and_then(Qcow2::backing)
        {
            let name = std::path::absolute(backing.name())
                .map_err(|error| Failure::text(format!("The backing file '{}': {error}", backing.name())))?;
            new.backing_file = Some(name.display().to_string());
            new.backing_fmt = Some(image_format(&backing).name().to_owned());
        }
        Target::open_as(&self.engine, options, &new).await
    }

    /// Opens the exports and starts the job.
    async fn start(
        &self,
        settings: &Settings,
        source: &Rc<Node>,
        target: &Target,
    ) -> Result<Started, Failure> {
        let ring = self.engine.ring();
        let mut exports = Exports::with_limits(ring, &settings.clients);
        for uri in &settings.export {
            exports.add(&self.engine, source, uri, false, &self.global).await?;
        }
        let mut options = MirrorOptions::new("mirror0");
        options.sync = settings.sync;
        options.granularity = settings.granularity;
        options.buf_size = settings.buf_size;
        options.speed = settings.speed;
        options.policies = settings.policies;
        options.copy_mode = settings.copy_mode;
        options.on_divergence = settings.on_divergence;
        options.guest_first = settings.guest_first;
        options.downtime_nanos_max = settings.max_downtime;
        options.deadline_nanos = settings.deadline;
        options.detect_zeroes = settings.detect_zeroes;
        options.may_unmap = settings.may_unmap;
        options.target_is_zero = settings.target_is_zero;
        options.offload = settings.offload;
        options.allow_larger_target = settings.allow_larger_target;
        options.marker = Some(Box::new(target.marker(&self.engine)));
        let verifier = if settings.verify {
            let verifier = Verifier::new(ring, source.driver(), target.node.driver());
            Some(verifier.map_err(super::image::failed)?)
        } else {
            None
        };
        options.verifier = verifier.clone();
        let began = ring.clock();
        let job = self.engine.mirror(source, &target.node, options).await?;
        Ok(Started { exports, job, verifier, began })
    }

    /// Watches the job to its end and gives the orders that the options imply.
    async fn follow(
        &self,
        settings: &Settings,
        job: &Job,
        verifier: Option<&Rc<Verifier>>,
    ) -> Result<Ending, Failure> {
        let ring = self.engine.ring();
        let mut progress = Progress::new(&self.global, settings.quiet, ring.clock());
        let mut passed = None;
        let mut ordered = false;
        let mut asked = false;
        loop {
            let something = either(job.next_event(), self.signals.next());
            match either(something, ring.sleep(INTERVAL_NANOS)).await {
                Either::First(Either::First(event)) => self.tell(&progress, &event),
                Either::First(Either::Second(Signal::Continue)) => match job.resume() {
                    Ok(()) => progress.say("Going on"),
                    Err(error) => progress.say(&error.to_string()),
                },
                Either::First(Either::Second(_)) => {
                    // Before ready this gives the job up; from then on it ends complete, unless somebody who has
                    // waited for that in vain (a server may hang) says it again.
                    let gives_up = !job.status().is_ready() || asked;
                    progress.say(if gives_up {
                        "Cancelling: the target stays incomplete"
                    } else {
                        "Finishing: the target becomes complete; once more gives up"
                    });
                    if let Err(error) = job.cancel(gives_up) {
                        progress.say(&error.to_string());
                    }
                    (ordered, asked) = (true, true);
                }
                Either::Second(()) => progress.update(job, ring.clock()),
            }
            if let Some(ending) = job.ending() {
                progress.finish();
                while let Some(event) = job.pop_event() {
                    self.tell(&progress, &event);
                }
                return Ok(ending);
            }
            if job.status().is_ready() && !ordered {
                // A long pass of comparing comes before the end; the job follows meanwhile.
                if let Some(verifier) = verifier {
                    let verifier = verifier.clone();
                    let pass = passed
                        .get_or_insert_with(|| ring.spawn_with_result(async move { verifier.pass().await }));
                    if !settings.follow && pass.try_take().is_none() {
                        continue;
                    }
                }
                if !settings.follow {
                    ordered = true;
                    if settings.pivot { job.complete()? } else { job.cancel(false)? }
                }
            }
        }
    }

    fn tell(&self, progress: &Progress, event: &JobEvent) {
        if self.global.json {
            println!("{}", json!({"event": event.name(), "data": event}));
        }
        match event {
            JobEvent::Ready(position) => progress.say(&format!(
                "Ready: source and target are alike ({} dealt with)",
                fmt_bytes(position.offset)
            )),
            JobEvent::Error { operation, action, .. } => {
                let what = match action {
                    ErrorAction::Report => "the job ends",
                    ErrorAction::Ignore => "it is tried again",
                    ErrorAction::Stop => "the job is paused; SIGCONT lets it go on, SIGTERM ends it",
                };
                progress.say(&format!("A {} failed: {what}", operation.name()));
            }
            _ => {}
        }
    }

    fn report(
        &self,
        settings: &Settings,
        job: &Job,
        outcome: &Outcome<'_>,
        verifier: Option<&Rc<Verifier>>,
    ) -> Exit {
        let Outcome { ending, elapsed_ns, tail, allocated: [source_allocated, target_allocated] } = *outcome;
        let details = job.details();
        let verified = verifier.map(|verifier| verifier.report());
        let exit = match ending {
            Ending::Completed => Exit::Done,
            Ending::Cancelled => Exit::Cancelled,
            Ending::Failed(_) if verified.as_ref().is_some_and(|v| v.mismatch.is_some()) => Exit::Different,
            Ending::Failed(_) => Exit::Failed,
        };
        if self.global.json {
            println!(
                "{}",
                json!({
                    "event": "end",
                    "ending": match ending {
                        Ending::Completed => "completed",
                        Ending::Cancelled => "cancelled",
                        Ending::Failed(_) => "failed",
                    },
                    "pivot": settings.pivot,
                    "elapsed-ns": elapsed_ns,
                    "details": details,
                    "target-tail-bytes": tail,
                    "source-allocated-bytes": source_allocated,
                    "target-allocated-bytes": target_allocated,
                    "verify": verified,
                })
            );
            return exit;
        }
        if settings.quiet && exit == Exit::Done {
            return exit;
        }
        match ending {
            Ending::Completed => {
                let rate = (details.bytes_copied as f64 * 1e9 / elapsed_ns.max(1) as f64) as u64;
                if let Some(tail) = tail {
                    eprintln!(
                        "The target is {} larger than the source: what lies behind the source's end holds what \
                         it held before",
                        fmt_bytes(tail)
                    );
                }
                eprintln!(
                    "Completed in {}: {} copied ({}), {}{} zeroed, {} skipped{}; '{}' equals '{}'{}",
                    fmt_duration(elapsed_ns),
                    fmt_bytes(details.bytes_copied),
                    fmt_rate(rate),
                    match details.bytes_shared {
                        0 => String::new(),
                        shared => format!("{} shared, ", fmt_bytes(shared)),
                    },
                    fmt_bytes(details.bytes_zeroed),
                    fmt_bytes(details.bytes_skipped),
                    target_allocated.map_or_else(String::new, |bytes| {
                        format!("; the target occupies {}", fmt_bytes(bytes))
                    }),
                    settings.target,
                    settings.source,
                    if settings.pivot { " and is in use now" } else { "" },
                );
            }
            Ending::Cancelled => {
                eprintln!("Cancelled: '{}' is incomplete and marked so", settings.target);
            }
            Ending::Failed(_) => {}
        }
        if let Some(report) = verified {
            say_verified(&report, self.engine.ring().clock());
        }
        exit
    }
}

/// Whether a file or device does its I/O in the call that asks for it: such a one refuses requests that must not wait.
/// io_uring hands its requests to worker threads (zram, tmpfs).
fn is_synchronous(name: &str) -> bool {
    use rustix::fs::{Mode, OFlags};
    let Ok(file) = rustix::fs::open(name, OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC, Mode::empty())
    else {
        return false;
    };
    let mut memory = vec![0; 2 * 4096];
    let start = memory.as_ptr().align_offset(4096);
    let Some(block) = memory.get_mut(start..start + 4096) else { return false };
    let mut parts = [std::io::IoSliceMut::new(block)];
    let result = rustix::io::preadv2(&file, &mut parts, 0, rustix::io::ReadWriteFlags::NOWAIT);
    matches!(result, Err(rustix::io::Errno::OPNOTSUPP))
}

fn say_verified(report: &Report, now_ns: u64) {
    match &report.mismatch {
        None => eprintln!(
            "Verified: {} compared ({} of it again), checksum {} (BLAKE3 of the BLAKE3 of each MiB), as of {}",
            fmt_bytes(report.bytes_compared),
            fmt_bytes(report.bytes_compared_again),
            report.checksum,
            instant(report.instant_ns, now_ns),
        ),
        Some(offset) => eprintln!("Verify: source and target differ at offset {offset}"),
    }
}

fn exit_of(exit: Exit, ending: Ending, is_marked: bool) -> Result<Exit, Failure> {
    match ending {
        Ending::Failed(text) if exit == Exit::Failed => {
            let rest = if is_marked { ". The target is incomplete and marked so" } else { "" };
            Err(Failure::text(format!("The mirror failed: {text}{rest}")))
        }
        _ => Ok(exit),
    }
}

/// A moment of the ring's clock as people write it.
fn instant(at_ns: u64, now_ns: u64) -> String {
    let ago = std::time::Duration::from_nanos(now_ns.saturating_sub(at_ns));
    humantime::format_rfc3339_millis(std::time::SystemTime::now() - ago).to_string()
}

fn unix_secs() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |since| since.as_secs())
}
