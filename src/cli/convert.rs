//! `blockferry convert`: copies an image that nobody writes to a new one, of any format that is known here.
//!
//! Options have the names that `qemu-img convert` gives them. What differs is in docs/tools.md: above all, a target
//! that exists is left alone unless that is said, and one that is not complete says so.

use std::path::PathBuf;
use std::rc::Rc;

use blockferry_ring::Config;
use blockferry_ring::sync::{Either, either};
use clap::Args;
use serde_json::json;

use super::create::{add_backing, open_new_backing, warn_of_refusal};
use super::exit::{Exit, Failure};
use super::image::{
    CacheMode, GateArgs, NamingArgs, OpenArgs, Reflink, ServerArgs, parse_format, size, speed, state_dir,
};
use super::job::{WhatItHolds, copied, disk, keeps_nothing, left_behind};
use super::print::{self, say};
use super::progress::{Holes, INTERVAL_NANOS, Progress};
use super::service::at_once;
use super::signals::{Signal, Signals};
use super::target::{Target, TargetOptions, is_left_by};
use super::tool::{
    OutputArgs, PlanArgs, asks_for_help, cache, option_pairs, print_options, read_options, warn_of_name,
    with_code,
};
use super::{Global, config, stats};
use crate::base::limits;
use crate::base::units::{fmt_bytes, fmt_duration};
use crate::block::{Driver, place};
use crate::engine::admit::{Admission, Below, IfThere, Wish};
use crate::engine::create::NewImage;
use crate::engine::marks::unfinished;
use crate::engine::qcow2::Qcow2Compressor;
use crate::engine::{Engine, Format, ImageOptions, NodeSpec};
use crate::format::JoinedDriver;
use crate::format::qcow2::WhichSnapshot;
use crate::graph::node::{Child, Node, Role};
use crate::job::convert::{ConvertOptions, Tally, TargetState};
use crate::job::event::JobEvent;
use crate::job::mirror::layers::{are_one, below as lies_below};
use crate::job::offload::OffloadPolicy;
use crate::job::runner::{Ending, Job};
use crate::job::tail::tail_of;
use crate::protocol::mark::{MarkInfo, identity_of};

const AFTER: &str = "\
Examples:
  A thin copy, compared with its source before it counts as complete:
      blockferry convert -O raw --verify old.img new.img

  Onto a device that holds zeroes only:
      blockferry convert -n --target-is-zero -O raw old.img /dev/vg/new

While it runs the target carries a mark that says so; `blockferry info` shows it. The mark is gone when, and
only when, the target is complete and flushed.";

/// Copy an image that nobody writes to a new one, thin, in any format
#[derive(Debug, Args)]
#[command(after_help = AFTER)]
pub struct ConvertArgs {
    /// The images to copy, one behind the other if there are several; and last, where to: a new file, or an existing image
    /// with --force or -n
    #[arg(value_name = "SRC... DST")]
    images: Vec<String>,
    /// Format of the source, if its header should not be asked
    #[arg(short = 'f', long = "source-format", value_name = "FORMAT", value_parser = parse_format)]
    source_format: Option<Format>,
    /// The sources are named by QEMU's options: driver=qcow2,file.driver=file,file.filename=a.qcow2
    #[arg(long, alias = "image-opts")]
    source_image_opts: bool,
    /// The target, which has to be there, is named by QEMU's options
    #[arg(long, requires = "no_create")]
    target_image_opts: bool,
    /// Copy the disk as this internal snapshot has it: its id or name, or snapshot.id=ID,snapshot.name=NAME
    #[arg(short = 'l', long = "source-snapshot", value_name = "SNAPSHOT", value_parser = WhichSnapshot::parse)]
    snapshot: Option<WhichSnapshot>,
    /// Format of the target
    #[arg(short = 'O', long = "target-format", value_name = "FORMAT", value_parser = parse_format, default_value = "raw")]
    target_format: Format,
    /// Options of the target's format, as NAME=VALUE,NAME=VALUE (may be said more than once); `-o help` lists them
    #[arg(short = 'o', long = "target-options", value_name = "OPTIONS", conflicts_with = "no_create")]
    options: Vec<String>,
    /// The target shows this image where nothing is written to it: only what the source has above its own backing file
    /// is copied, and what differs below. With -n it has to be the backing file that the target has
    #[arg(short = 'B', long = "backing", value_name = "BACKING_FILE")]
    backing: Option<String>,
    /// Format of the backing file; has to be said, but with -n
    #[arg(short = 'F', long = "backing-format", value_name = "FORMAT", value_parser = parse_format)]
    backing_format: Option<Format>,
    /// Compress the target's clusters (qcow2)
    #[arg(short, long)]
    compress: bool,
    /// Threads that compress [default: as many as there are processors]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
    threads: Option<u8>,
    /// Cache mode of the source: none and directsync go past the page cache, the others through it [default: none]
    #[arg(short = 'T', long = "source-cache", value_name = "CACHE", value_parser = cache)]
    source_cache: Option<CacheMode>,
    /// Cache mode of the target [default: none]
    #[arg(short = 't', long = "target-cache", value_name = "CACHE", value_parser = cache)]
    target_cache: Option<CacheMode>,
    /// Write into an existing image, which is not made anew
    #[arg(short = 'n', long)]
    no_create: bool,
    /// The existing image reads as zeroes: zeroes need not be written to it
    #[arg(long, requires = "no_create")]
    target_is_zero: bool,
    /// Make an existing file anew; what is in it is lost
    #[arg(long, conflicts_with = "no_create")]
    pub(super) force: bool,
    /// Look for zeroes in pieces of this size; 0: do not look, and allocate the target everywhere
    #[arg(short = 'S', long = "sparse-size", value_name = "SIZE", value_parser = size, default_value = "4096",
        conflicts_with = "copy_range")]
    sparse_size: u64,
    /// Copies in flight, 1 to 16 [default: as many as keep source and target busy, however far away they are]
    #[arg(short = 'm', long = "parallel", value_name = "N", value_parser = clap::value_parser!(u8).range(1..=limits::CONVERT_PARALLEL_MAX as i64))]
    parallel: Option<u8>,
    /// Accepted for its name: writes are never kept in order
    #[arg(short = 'W', long = "oob-writes")]
    out_of_order: bool,
    /// Limit the copying, such as 200MiB (a second)
    #[arg(short = 'r', long, visible_alias = "speed", value_name = "RATE", value_parser = speed, default_value = "0")]
    rate: u64,
    /// Share blocks with the source where the filesystem can
    #[arg(long, value_enum, default_value_t = Reflink::Auto, value_name = "WHEN")]
    reflink: Reflink,
    /// Try the kernel's copy_file_range, too, where blocks cannot be shared. What is copied so is not looked at
    #[arg(short = 'C', long = "copy-range-offloading", conflicts_with_all = ["compress", "salvage"])]
    copy_range: bool,
    /// Take what cannot be read for zeroes; exit code 1 if there was any
    #[arg(long)]
    salvage: bool,
    /// Read both images back and compare them before the target counts as complete
    #[arg(long)]
    verify: bool,
    /// When comparing, believe servers and remote filesystems that claim to hold zeroes: where both sides do, nothing is
    /// read
    #[arg(long, requires = "verify")]
    trust_holes: bool,
    /// Open the source though others may be writing it: no locks
    #[arg(short = 'U', long)]
    pub(super) force_share: bool,
    /// Show progress (on a terminal it is shown anyway)
    #[arg(short, long)]
    progress: bool,
    /// No output but errors
    #[arg(short, long)]
    pub(super) quiet: bool,
    /// Where to note unfinished targets that cannot carry a mark themselves (block devices, some filesystems)
    #[arg(long, value_name = "DIR", value_parser = crate::cli::image::path)]
    state_dir: Option<PathBuf>,
    #[command(flatten)]
    pub(super) server: ServerArgs,
    #[command(flatten)]
    pub(super) gate: GateArgs,
    #[command(flatten)]
    pub(super) plan: PlanArgs,
    #[command(flatten)]
    output: OutputArgs,
}

impl ConvertArgs {
    /// A plain copy: what `dd` asks for.
    pub fn plain(source: String, target: String, formats: (Option<Format>, Format)) -> ConvertArgs {
        ConvertArgs {
            images: vec![source, target],
            source_format: formats.0,
            source_image_opts: false,
            target_image_opts: false,
            snapshot: None,
            target_format: formats.1,
            options: Vec::new(),
            backing: None,
            backing_format: None,
            compress: false,
            threads: None,
            source_cache: None,
            target_cache: None,
            no_create: false,
            target_is_zero: false,
            force: false,
            sparse_size: 4096,
            parallel: None,
            out_of_order: false,
            rate: 0,
            reflink: Reflink::Auto,
            copy_range: false,
            salvage: false,
            verify: false,
            trust_holes: false,
            force_share: false,
            progress: false,
            quiet: true,
            state_dir: None,
            server: ServerArgs::default(),
            gate: GateArgs::default(),
            plan: PlanArgs::default(),
            output: OutputArgs::default(),
        }
    }
}

/// Bytes of a disk that are copied.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// From here on.
    pub from: u64,
    /// Up to here at most.
    pub to: u64,
}

/// Runs the command.
pub fn main(global: &Global, args: ConvertArgs) -> Result<Exit, Failure> {
    if asks_for_help(&args.options)? {
        print_options(args.target_format, "Options for new images", NewImage::options(args.target_format));
        return Ok(Exit::Done);
    }
    let [_, .., _] = &*args.images else {
        let text = "Say what to copy, and where to: blockferry convert SRC DST";
        return with_code(global, 2, Err(Failure::text(text)));
    };
    let args = named(args)?;
    run(global, args, None)
}

/// What is named by options, by its name.
fn named(mut args: ConvertArgs) -> Result<ConvertArgs, Failure> {
    let target = args.images.pop().unwrap_or_default();
    let naming = NamingArgs { image_opts: args.source_image_opts };
    let sources = args.images.iter().map(|source| naming.read(source, args.source_format));
    args.images = sources.collect::<Result<_, _>>()?;
    let target = match args.target_image_opts {
        true => {
            let spec = NodeSpec::parse_options(&target)?;
            // Without a format's driver, its bytes are meant.
            args.target_format = spec.format().unwrap_or(Format::Raw);
            spec.to_string()
        }
        false => target,
    };
    args.images.push(target);
    Ok(args)
}

/// Copies what was said, or a window of it.
pub fn run(global: &Global, mut args: ConvertArgs, window: Option<Window>) -> Result<Exit, Failure> {
    let target = args.images.pop().unwrap_or_default();
    let sources = std::mem::take(&mut args.images);
    let source = sources.join("' and '");
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let offload_threads = args.threads.map_or(processors, usize::from);
    let engine = Rc::new(Engine::new(&Config { offload_threads, ..config(global) })?);
    let signals = Signals::new(engine.ring())?;
    // Progress lines belong to --json; --output=json is one document.
    let run = Run {
        global: global.clone(),
        engine: engine.clone(),
        signals,
        args,
        sources,
        source,
        target,
        window,
    };
    engine.run(async move { run.convert().await })
}

struct Run {
    global: Global,
    engine: Rc<Engine>,
    signals: Signals,
    args: ConvertArgs,
    sources: Vec<String>,
    /// All of them, as people are told.
    source: String,
    target: String,
    window: Option<Window>,
}

/// What is copied: a disk, and what keeps the images that it is put together from as they are.
struct Source {
    node: Rc<Node>,
    incomplete: bool,
    _parts: Vec<(Rc<Node>, Rc<Child>)>,
}

impl Run {
    async fn convert(&self) -> Result<Exit, Failure> {
        let (args, engine, ring) = (&self.args, &*self.engine, self.engine.ring());
        let options = ImageOptions {
            marks: args.gate.marks(),
            ..read_options(args.source_format, args.source_cache, args.force_share, &args.server, &args.gate)
        };
        let Source { node: source, incomplete: source_incomplete, _parts } =
            self.open_sources(&options).await?;
        let open = OpenArgs {
            cache: args.target_cache.unwrap_or_default(),
            server: args.server.clone(),
            gate: args.gate.clone(),
            ..OpenArgs::default()
        };
        let Some((target, target_state)) = self.open_target(&source, source_incomplete, &open).await? else {
            return Ok(Exit::Done);
        };
        let began = ring.clock();
        let started = self.start(&source, &target, target_state).await;
        let (job, tally) = match started {
            Ok(started) => started,
            Err(failure) => {
                target.undo(engine).await;
                return Err(failure);
            }
        };
        let mark = target.marker(engine);
        let drivers = [source.driver().clone(), target.node.driver().clone()];
        let holes = Holes::count(ring, &drivers[0], matches!(target_state, TargetState::Backed { .. }));
        drop((source, target));
        let ending = self.follow(&job, &tally, holes).await?;
        if ending != Ending::Completed {
            // A target that is gone, or cannot be written, has no mark that could say it.
            let _ = mark.note(job.progress().offset(), job.progress().len()).await;
        }
        let is_there = place::check(&drivers[1], true).await.is_ok();
        let is_marked = mark.is_set().await.unwrap_or(false);
        let failure = match &ending {
            Ending::Failed(text) => {
                let left = left_behind(&disk(&self.target, &drivers[1]), is_there, is_marked);
                Some(Failure::text(format!("The conversion failed: {}. {left}", text.trim_end_matches('.'))))
            }
            _ => None,
        };
        let told = (&ending, failure.as_ref());
        let exit = self.report(&job, &tally, told, ring.clock() - began, &drivers, source_incomplete);
        stats::print(&self.global, ring);
        match failure {
            Some(failure) if exit == Exit::Failed => Err(failure),
            _ => Ok(exit),
        }
    }

    /// Opens the source; of several, or of a part of one, what is copied is put together from them.
    async fn open_sources(&self, options: &ImageOptions) -> Result<Source, Failure> {
        let (args, engine, ring) = (&self.args, &*self.engine, self.engine.ring());
        let several = self.sources.len() > 1;
        if several && args.snapshot.is_some() {
            return Err(Failure::usage(
                "Snapshots of several images cannot be strung together: name one source",
            ));
        }
        if several && args.backing.is_some() {
            let text = "A backing file makes no sense for several images strung together: name one source";
            return Err(Failure::usage(text));
        }
        let options = ImageOptions { snapshot: args.snapshot.clone(), ..options.clone() };
        let (mut nodes, mut incomplete) = (Vec::new(), false);
        for name in &self.sources {
            let node = engine.open(name, &options).await?;
            incomplete |= unfinished(ring, node.driver(), &args.gate.marks()).await.is_some();
            nodes.push(node);
        }
        if let ([node], None) = (&*nodes, self.window) {
            return Ok(Source { node: node.clone(), incomplete, _parts: Vec::new() });
        }
        let mut parts = Vec::new();
        for node in &nodes {
            parts.push((node.clone(), node.attach_in_time(Role::PromisedSource).await?));
        }
        let joined = match (self.window, &*nodes) {
            (Some(Window { from, to }), [disk]) => {
                if from > disk.len() {
                    tracing::warn!("skip= leads behind the end of '{}': nothing is copied", self.source);
                }
                Some(JoinedDriver::part(ring, disk, from, to.saturating_sub(from)))
            }
            _ => JoinedDriver::new(ring, &nodes),
        };
        let Some(joined) = joined else {
            return Err(Failure::text(format!("'{}' are longer together than a disk can be", self.source)));
        };
        let node = Node::new(ring, self.source.clone(), Rc::new(joined));
        Ok(Source { node, incomplete, _parts: parts })
    }

    /// Settles what can be settled before the target is touched; then it is opened or made. `None`: it was
    /// a dry run.
    async fn open_target(
        &self,
        source: &Rc<Node>,
        source_incomplete: bool,
        open: &OpenArgs,
    ) -> Result<Option<(Target, TargetState)>, Failure> {
        let (args, ring) = (&self.args, self.engine.ring());
        let mark = MarkInfo::incomplete("convert", &self.source).started(ring.unix_secs()).about(
            identity_of(ring, source.driver()),
            source.driver().len(),
            args.target_format.name(),
        );
        if args.compress && args.target_format != Format::Qcow2 {
            let text = format!("Images of the format '{}' cannot be compressed", args.target_format);
            return Err(Failure::usage(text));
        }
        speed_of(args.rate)?;
        let below = self.below_what_is_there()?;
        let mut pairs = option_pairs(&args.options)?;
        if !args.no_create {
            add_backing(&mut pairs, args.backing.as_deref(), args.backing_format);
        }
        let new = NewImage::parse(args.target_format, &pairs, Some(source.driver().len()));
        let new = new.map_err(Failure::usage)?;
        if args.compress && new.data_file().is_some() {
            return Err(Failure::usage(
                "Compressed clusters cannot be in a data file: leave out -c or data_file",
            ));
        }
        let image = open.image(Some(args.target_format), false).overwriting();
        // There is no option to do without.
        let image = ImageOptions { without_locks: None, ..image };
        let mut admission = Admission::new(ring, "convert").counting(args.plan.dry_run);
        admission.source(source).await;
        let new_backing = open_new_backing(&self.engine, &self.target, &pairs, args.gate.marks()).await?;
        if let Some(backing) = &new_backing {
            admission.reads("new backing file", backing.driver()).await;
        }
        let state_dir = state_dir(args.state_dir.as_deref());
        let is_own = is_left_by(&self.engine, &self.target, &mark, state_dir.as_deref()).await;
        let if_there = match (args.no_create, args.force || is_own) {
            (true, _) => IfThere::Overwrite,
            (false, true) => IfThere::Remake,
            (false, false) => IfThere::Refuse,
        };
        let wish = Wish {
            if_there,
            may_make: !args.no_create,
            room_min: if args.sparse_size == 0 && !args.compress { new.len() } else { 0 },
            below,
            ..Wish::copy(&self.target, image.clone(), &new, source)
        };
        admission.target(&wish).await;
        match args.sparse_size {
            0 => admission.plan().bytes_max = Some(new.len()),
            _ => admission.bytes_of(source.driver(), new.has_backing() || below.is_some()).await?,
        }
        let (plan, admitted) = admission.judge();
        if args.plan.ends(&self.global, &plan)? {
            return Ok(None);
        }
        if !args.no_create {
            warn_of_name(&self.target, args.target_format);
        }
        let options = TargetOptions {
            name: &self.target,
            image,
            state_dir,
            at_end: source_incomplete.then(|| mark.clone().of_incomplete()),
            mark,
        };
        if let NewImage::Qcow2(new) = &new {
            warn_of_refusal(&self.engine, &self.target, new.backing_file.as_deref()).await;
        }
        let target = Target::take(&self.engine, admitted, options, &new).await?;
        let new_backing = match below {
            Some(_) => lies_below(target.node.driver()),
            None => new_backing.map(|node| node.driver().clone()),
        };
        let state = match () {
            () if args.target_is_zero => TargetState::Zero,
            () if args.no_create && below.is_none() => TargetState::Unknown,
            () if new.has_backing() || below.is_some() => match lies_below(source.driver()) {
                Some(backing) => TargetState::Backed {
                    source_backing_len: backing.len(),
                    is_same: new_backing.is_some_and(|new| are_one(&new, &backing)),
                    is_new: !args.no_create,
                },
                None => TargetState::Unknown,
            },
            () if target.is_fresh() => TargetState::Zero,
            () => TargetState::Unknown,
        };
        Ok(Some((target, state)))
    }

    /// What the image that is there has to show where it has nothing of its own: with -n, -B does not make it so.
    fn below_what_is_there(&self) -> Result<Option<Below<'_>>, Failure> {
        let args = &self.args;
        let Some(name) = args.backing.as_deref().filter(|_| args.no_create) else { return Ok(None) };
        if args.target_is_zero {
            return Err(Failure::usage(
                "A target with a backing file does not read as zeroes: say -B or --target-is-zero",
            ));
        }
        Ok(Some(Below { name, format: args.backing_format }))
    }

    async fn start(
        &self,
        source: &Rc<Node>,
        target: &Target,
        target_state: TargetState,
    ) -> Result<(Job, Rc<Tally>), Failure> {
        let args = &self.args;
        let mut options = ConvertOptions::new("convert0");
        options.parallel = args.parallel.map(usize::from);
        options.speed = speed_of(args.rate)?;
        options.sparse_bytes = args.sparse_size;
        options.target_state = target_state;
        options.offload = match (args.reflink, args.copy_range) {
            (Reflink::Never, _) => OffloadPolicy::Never,
            (Reflink::Auto, false) => OffloadPolicy::Reflink,
            (Reflink::Auto, true) => OffloadPolicy::Any,
        };
        if args.compress {
            let driver = target.node.driver();
            let Some(compressor) = Qcow2Compressor::new(self.engine.ring(), driver).await? else {
                let text = format!("Images of the format '{}' cannot be compressed", args.target_format);
                return Err(Failure::text(text));
            };
            options.compressor = Some(Rc::new(compressor));
        }
        options.salvage = args.salvage;
        options.verify = args.verify;
        options.trust_holes = args.trust_holes;
        options.marker = Some(Box::new(target.marker(&self.engine)));
        Ok(self.engine.convert(source, &target.node, options).await?)
    }

    /// Watches the job to its end.
    async fn follow(&self, job: &Job, tally: &Tally, holes: Rc<Holes>) -> Result<Ending, Failure> {
        let ring = self.engine.ring();
        let compared = || {
            let verifies = job.details().phase == "verify";
            verifies.then(|| (tally.compared.get().total(), job.progress().len()))
        };
        let mut progress = Progress::new(&self.global, self.args.quiet, ring.clock()).knowing(holes);
        let mut is_given_up = false;
        loop {
            let something = either(job.next_event(), self.signals.next());
            match either(something, ring.sleep(INTERVAL_NANOS)).await {
                Either::First(Either::First(event)) => self.tell(&event),
                Either::First(Either::Second(Signal::Report)) => {
                    progress.report(job, compared(), ring.clock())
                }
                Either::First(Either::Second(_)) if std::mem::replace(&mut is_given_up, true) => {
                    progress.finish();
                    at_once(Exit::Cancelled);
                }
                Either::First(Either::Second(_)) => {
                    progress.say("Cancelling: the target stays incomplete");
                    if let Err(error) = job.cancel(true) {
                        progress.say(&error.to_string());
                    }
                }
                Either::Second(()) => progress.update(job, compared(), ring.clock()),
            }
            if let Some(ending) = job.ending() {
                progress.finish();
                while let Some(event) = job.pop_event() {
                    self.tell(&event);
                }
                return Ok(ending);
            }
        }
    }

    fn tell(&self, event: &JobEvent) {
        if self.global.json {
            print::job_event(event);
        }
    }

    fn report(
        &self,
        job: &Job,
        tally: &Tally,
        (ending, failure): (&Ending, Option<&Failure>),
        elapsed_ns: u64,
        [from, to]: &[Rc<dyn Driver>; 2],
        source_incomplete: bool,
    ) -> Exit {
        let (args, details) = (&self.args, job.details());
        let tail = tail_of(from.len(), to.len());
        let lost = tally.bytes_lost.get();
        let mismatch = tally.mismatch.get();
        let (word, exit) = match ending {
            Ending::Completed if lost > 0 => ("completed-with-losses", Exit::Code(1)),
            Ending::Completed => ("completed", Exit::Done),
            Ending::Cancelled => ("cancelled", Exit::Cancelled),
            Ending::Failed(_) if mismatch.is_some() => ("failed", Exit::Different),
            Ending::Failed(_) => ("failed", Exit::Failed),
        };
        let compared = tally.compared.get();
        let value = json!({
            "event": "end",
            "ending": word,
            "exit-code": exit.code(),
            "message": failure.map(Failure::to_string),
            "elapsed-ns": elapsed_ns,
            "details": details,
            "bytes-shared": tally.bytes_shared.get(),
            "bytes-compressed": tally.bytes_compressed.get(),
            "bytes-lost": lost,
            "bytes-compared": compared.total(),
            "compared": compared,
            "mismatch": mismatch,
            "target-tail-bytes": (tail > 0).then_some(tail),
        });
        if args.output.note(&self.global, &value) || args.quiet && exit == Exit::Done {
            return exit;
        }
        match ending {
            Ending::Completed => {
                let shared = match tally.bytes_shared.get() {
                    0 => String::new(),
                    n => format!(", {} of it by sharing blocks", fmt_bytes(n)),
                };
                say!(
                    "Completed in {}: {}{shared}, {} zeroed, {} skipped",
                    fmt_duration(elapsed_ns),
                    copied(job),
                    fmt_bytes(details.bytes_zeroed),
                    fmt_bytes(details.bytes_skipped),
                );
                if args.verify {
                    say!("Verified: {} compared, no difference ({compared})", fmt_bytes(compared.total()));
                }
                if tail > 0 && args.no_create {
                    say!(
                        "The target is {} larger than the source: what lies behind the source's end holds what it \
                         held before",
                        fmt_bytes(tail)
                    );
                }
                let source = match self.window {
                    Some(window) => {
                        format!(
                            "{} of '{}' from offset {} on",
                            fmt_bytes(from.len()),
                            self.source,
                            window.from
                        )
                    }
                    None => disk(&self.source, from),
                };
                let target = disk(&self.target, to);
                let snapshot = args.snapshot.as_ref().map(WhichSnapshot::to_string);
                let holds = WhatItHolds {
                    source: &source,
                    snapshot: snapshot.as_deref(),
                    len: from.len(),
                    tail,
                    is_incomplete: source_incomplete,
                    as_of: None,
                };
                match lost {
                    _ if keeps_nothing(to) => {
                        say!("{target} was sent what {source} holds, and keeps nothing");
                    }
                    0 => say!("{target} {holds}"),
                    lost => say!(
                        "{target} {holds}, but for {} that could not be read and are zeroes",
                        fmt_bytes(lost)
                    ),
                }
            }
            Ending::Cancelled => {
                say!("Cancelled: {} is incomplete and marked so", disk(&self.target, to));
            }
            Ending::Failed(_) => {
                if let Some(at) = mismatch {
                    say!("Verify: source and target differ at offset {at}");
                }
            }
        }
        exit
    }
}

fn speed_of(rate: u64) -> Result<i64, Failure> {
    i64::try_from(rate).map_err(|_| Failure::usage("--rate is too large"))
}
