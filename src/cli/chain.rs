//! What `blockferry commit` and `blockferry stream` have in common: a chain is opened from its active layer down, served
//! to clients if they are wanted, and changed by a job.
//!
//! The layers below the active one are opened to be read; the job reopens those that it writes. Nothing is written
//! before the job has been started, and what can be refused is refused before that.

use std::rc::Rc;

use blockferry_ring::Ring;
use blockferry_ring::sync::{Either, either};
use clap::Args;
use serde_json::json;

use super::exit::{Exit, Failure};
use super::image::{OpenArgs, parse_format, size, speed, state_dir};
use super::job::{
    AtReady, Policy, Watch, Words, bytes, copied, disk, ending_name, exit_code, guest_first, suit_bulk,
};
use super::print::{self, say};
use super::serve::{ClientArgs, Exports, check_exports, export_uri};
use super::service::{Service, ServiceArgs};
use super::signals::{Asked, Signals};
use super::target::make_state_dir;
use super::tool::PlanArgs;
use super::{Global, config, stats};
use crate::base::limits::STOP_NANOS_MAX;
use crate::base::os_name;
use crate::base::units::{fmt_bytes, fmt_duration};
use crate::engine::admit::place::Ground;
use crate::engine::admit::{Admission, own_leaves};
use crate::engine::marks::{Marks, unfinished};
use crate::engine::open::{local_path, said_by_header};
use crate::engine::qcow2::qcow2;
use crate::engine::{Engine, Format, ImageOptions, named};
use crate::graph::chain::called;
use crate::graph::node::{Node, Role};
use crate::job::governor::GuestFirst;
use crate::job::runner::{Ending, Job};
use crate::job::sweep::{ChainError, SweepOptions};
use crate::protocol::mark::{MarkInfo, TargetMark};
use crate::protocol::nbd::NbdUri;

/// Options of both.
#[derive(Clone, Debug, Args)]
pub struct ChainArgs {
    /// The active layer: the image by which the disk is used
    #[arg(value_name = "IMAGE")]
    pub(super) image: String,
    /// Format of the active layer, if its header should not be asked
    #[arg(short, long, value_name = "FORMAT", value_parser = parse_format)]
    pub(super) format: Option<Format>,
    /// Serve clients meanwhile, at this NBD URI (may be said more than once)
    #[arg(long, value_name = "URI", value_parser = export_uri)]
    export: Vec<NbdUri>,
    /// Limit the copying, such as 200MiB (a second); 0 or `unlimited` for no limit
    #[arg(short = 'r', long, visible_alias = "rate", value_name = "RATE", value_parser = speed, default_value = "0")]
    speed: u64,
    /// What to do when reading or writing fails
    #[arg(long, value_enum, value_name = "POLICY", default_value_t = Policy::Report)]
    on_error: Policy,
    /// Clients' latency while the job runs: `auto` (near what it is without the job), `off`, or a time that 99
    /// of 100 requests shall not exceed, such as 500us
    #[arg(long, value_name = "HOW", value_parser = guest_first, default_value = "auto")]
    guest_first: GuestFirst,
    /// Bytes in flight at most [default: 16MiB]
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "0", hide_default_value = true)]
    buf_size: u64,
    /// Show progress (on a terminal it is shown anyway)
    #[arg(short, long)]
    progress: bool,
    /// No progress
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    pub(super) open: OpenArgs,
    #[command(flatten)]
    service: ServiceArgs,
    #[command(flatten)]
    clients: ClientArgs,
    #[command(flatten)]
    plan: PlanArgs,
}

/// A job on a chain, and what to say of it.
#[allow(missing_debug_implementations)] // What is said is a function.
pub struct Started {
    /// The job.
    pub job: Job,
    /// What is so when it is completed, asked then: a base may have grown.
    pub done: Box<dyn Fn() -> String>,
    /// What is so when it is given up or failed.
    pub undone: String,
    /// Where clients go on afterwards, if they do not stay where they are.
    pub moves_to: Option<Rc<Node>>,
    /// What the active layer holds is taken out of it when the job is completed: the layer below has it.
    pub empties: bool,
}

impl ChainArgs {
    /// Clients are served meanwhile.
    pub fn is_served(&self) -> bool {
        !self.export.is_empty()
    }
}

/// How a command of this kind speaks, and what it does with a job that becomes ready.
#[derive(Clone, Copy, Debug)]
pub struct Manner {
    /// The name of the command.
    pub name: &'static str,
    /// What it says.
    pub words: Words,
    /// What it does.
    pub at_ready: AtReady,
}

/// The layer that is called so: by the name that the layer above it records, by one that leads to it from the directory of
/// a layer, or from here. One that is called so by two layers is none: what is written to the wrong one is lost.
pub async fn layer(ring: &Ring, front: &Rc<Node>, name: &str) -> Result<Rc<Node>, Failure> {
    let chain = front.chain();
    let mut leads_to = Vec::new();
    let from = |node: &Rc<Node>| {
        let front_name = node.driver().name();
        match local_path(front_name) {
            // As a path, whatever it looks like: a user who names a layer means a file by it.
            Some(path) => Some(os_name::from_path(path.parent()?.join(os_name::to_path(name)))),
            None => named::by_user(front_name, name).ok().map(|named| named.name()),
        }
    };
    let mut names: Vec<String> = chain.iter().filter_map(from).chain([name.to_owned()]).collect();
    names.sort();
    names.dedup();
    for name in &names {
        leads_to.extend(Ground::of_name(ring, name).await);
    }
    let mut found = called(front, name);
    for node in &chain {
        let ground = match own_leaves(node.driver()).first() {
            Some(leaf) => Ground::of_leaf(ring, leaf).await,
            None => None,
        };
        let is_it = ground.is_some_and(|ground| leads_to.iter().any(|other| other.is(&ground)));
        if is_it && !found.iter().any(|other| Rc::ptr_eq(other, node)) {
            found.push(node.clone());
        }
    }
    match &*found {
        [] => Err(ChainError::NotInChain(name.to_owned()).into()),
        [only] => Ok(only.clone()),
        [one, other, ..] => Err(Failure::usage(format!(
            "The name '{name}' is that of two layers, '{}' and '{}': say the whole path of the one that is meant",
            one.driver().name(),
            other.driver().name()
        ))),
    }
}

/// What is merged from a disk that is not whole (which has to be allowed) makes what it goes to incomplete, too. The mark,
/// if one was set; it is taken back if the job does not start.
pub async fn pass_on_mark(
    engine: &Engine,
    front: &Rc<Node>,
    to: &Rc<Node>,
    job: &str,
) -> Result<Option<TargetMark>, Failure> {
    let (ring, marks) = (engine.ring(), Marks { state_dir: state_dir(None), ..Marks::default() });
    if unfinished(ring, front.driver(), &marks).await.is_none() {
        return Ok(None);
    }
    let driver = to.driver().clone();
    if let Ok(Some(mark)) = TargetMark::read(ring, &driver, marks.state_dir.as_deref()).await
        && mark.kind().is_unfinished()
    {
        return Ok(None);
    }
    make_state_dir(engine, &driver, marks.state_dir.as_deref())?;
    let info = MarkInfo::incomplete(job, front.driver().name()).started(ring.unix_secs()).of_incomplete();
    let mark = TargetMark::new(ring, driver, marks.state_dir, info);
    mark.set().await?;
    Ok(Some(mark))
}

/// Starts a job with [`pass_on_mark`] around it.
pub async fn with_mark(
    engine: &Engine,
    front: &Rc<Node>,
    to: &Rc<Node>,
    name: &str,
    start: impl Future<Output = Result<Job, ChainError>>,
) -> Result<Job, Failure> {
    let passed = pass_on_mark(engine, front, to, name).await?;
    match start.await {
        Ok(job) => Ok(job),
        Err(error) => {
            if let Some(mark) = passed {
                mark.clear().await?;
            }
            Err(error.into())
        }
    }
}

/// Refuses an image that has no backing files: that is of more use than what would have to be said to open it.
async fn has_layers(ring: &Ring, name: &str, format: Option<Format>, open: &OpenArgs) -> Result<(), Failure> {
    let look = ImageOptions { lock: false, ..open.image(None, true) };
    match format {
        None if said_by_header(ring, name, &look).await? == Format::Raw => {
            Err(Failure::text(format!("'{name}' is a raw image, which has no backing file")))
        }
        _ => Ok(()),
    }
}

/// Runs such a command; `judge` says what the job will have to do with, `start` starts it on the open chain.
pub fn main(
    global: &Global,
    args: ChainArgs,
    backing_file: Option<String>,
    manner: Manner,
    judge: impl AsyncFnOnce(&Rc<Node>, &SweepOptions, &mut Admission) -> Result<(), Failure> + 'static,
    start: impl AsyncFnOnce(&Engine, &Rc<Node>, SweepOptions) -> Result<Started, Failure> + 'static,
) -> Result<Exit, Failure> {
    check_exports(&args.export)?;
    let options = SweepOptions {
        speed: bytes("speed", args.speed)?,
        buf_size: bytes("buf-size", args.buf_size)?,
        on_error: args.on_error.into(),
        guest_first: args.guest_first,
        backing_file,
        ..SweepOptions::new(format!("{}0", manner.name))
    };
    let engine = Rc::new(Engine::new(&config(global))?);
    let signals = Signals::new(engine.ring())?.with_continue(engine.ring())?;
    let run = Run { global: global.clone(), engine: engine.clone(), signals, args, manner };
    engine.run(async move { run.run(options, judge, start).await })
}

struct Run {
    global: Global,
    engine: Rc<Engine>,
    signals: Signals,
    args: ChainArgs,
    manner: Manner,
}

impl Run {
    async fn run(
        &self,
        options: SweepOptions,
        judge: impl AsyncFnOnce(&Rc<Node>, &SweepOptions, &mut Admission) -> Result<(), Failure>,
        start: impl AsyncFnOnce(&Engine, &Rc<Node>, SweepOptions) -> Result<Started, Failure>,
    ) -> Result<Exit, Failure> {
        let (ring, args) = (self.engine.ring(), &self.args);
        has_layers(ring, &args.image, args.format, &args.open).await?;
        let front = self.engine.open(&args.image, &args.open.image(args.format, args.plan.dry_run)).await?;
        // Without clients, too, nobody else is to write the disk or to change its chain.
        let using = front.attach_in_time(Role::Guest).await?;
        let mut admission = Admission::new(ring, self.manner.name).counting(args.plan.dry_run);
        judge(&front, &options, &mut admission).await?;
        if args.plan.ends(&self.global, &admission.judge().0)? {
            return Ok(Exit::Done);
        }
        let mut exports = Exports::with_limits(ring, &args.clients);
        for uri in &args.export {
            exports.add(&self.engine, &front, uri, false, &self.global).await?;
        }
        let layers = front.chain();
        if args.export.is_empty() {
            suit_bulk(ring, layers.iter().map(|node| node.driver().name()));
        }
        let (signals, quiet) = (&self.signals, args.quiet);
        let (global, service) = (&self.global, args.service);
        let clients = Service { global, ring, signals, exports: &exports, quiet, args: service };
        if !clients.first_client().await {
            exports.stop().await?;
            if !global.json {
                say!("Cancelled: no client came, and nothing was changed");
            }
            return Ok(Exit::Cancelled);
        }
        let began = ring.clock();
        let started = start(&self.engine, &front, options).await?;
        let job = &started.job;
        let Manner { words, at_ready, .. } = self.manner;
        let places = layers.iter().map(|layer| layer.driver().clone()).collect();
        let compared = &|| None;
        let watch =
            Watch { global, ring, signals, quiet, words, at_ready, places, compared, holes: Rc::default() };
        let watched = watch.follow(job, || true, || clients.at_once(Exit::Cancelled)).await?;
        let (ending, mut asked) = (watched.ending, watched.asked);
        let elapsed_ns = ring.clock() - began;
        // A job that was given up leaves operations behind, which may be stuck; what they write belongs to the image.
        let settled = async {
            for layer in &layers {
                layer.until_free_of_jobs().await;
            }
        };
        let patience = ring.sleep(STOP_NANOS_MAX);
        if let Either::Second(Either::First(signal)) =
            either(settled, either(signals.next_ending(), patience)).await
        {
            asked = Some(Asked { signal, at_ns: ring.clock() });
        }
        let emptied = match (started.empties && ending == Ending::Completed, qcow2(front.driver())) {
            (true, Some(image)) => image.make_empty().await,
            _ => Ok(()),
        };
        drop(using);
        // A signal may have come between.
        let moved = started.moves_to.as_ref().filter(|layer| layer.client_count() > 0);
        let is_emptied = started.empties && ending == Ending::Completed && emptied.is_ok();
        let failure = match &ending {
            Ending::Failed(text) => {
                let (name, text) = (self.manner.name, text.trim_end_matches('.'));
                Some(Failure::text(format!("The {name} failed: {text}. {}", started.undone)))
            }
            _ => None,
        };
        let told = (&ending, failure.as_ref());
        let exit = self.report(&started, told, &front, moved, elapsed_ns, is_emptied);
        if let Some(failure) = failure {
            // At once, though clients may go on.
            print::failure(global.json, &failure);
        }
        if !service.exit_on_done {
            let stays = ending == Ending::Completed && at_ready != AtReady::Finish;
            clients.go_on(service.persistence(stays), asked).await;
        }
        clients.end(exit).await?;
        let flushed = front.driver().flush().await;
        stats::print(global, ring);
        emptied.and(flushed)?;
        Ok(exit)
    }

    /// Prints it, and gives the exit code.
    fn report(
        &self,
        started: &Started,
        (ending, failure): (&Ending, Option<&Failure>),
        front: &Rc<Node>,
        moved: Option<&Rc<Node>>,
        elapsed_ns: u64,
        is_emptied: bool,
    ) -> Exit {
        let exit = exit_code(ending);
        let details = started.job.details();
        if self.global.json {
            let chain = moved.unwrap_or(front).chain();
            let chain: Vec<_> = chain.iter().map(|node| node.driver().name().to_owned()).collect();
            let end = json!({
                "event": "end",
                "ending": ending_name(ending),
                "message": failure.map(Failure::to_string),
                "pivot": moved.is_some(),
                "emptied": is_emptied,
                "elapsed-ns": elapsed_ns,
                "details": details,
                "chain": chain,
            });
            print::ending(end, exit);
        } else if *ending == Ending::Cancelled {
            say!("Cancelled. {}", started.undone);
        } else if *ending == Ending::Completed && !self.args.quiet {
            say!(
                "Completed in {}: {}, {} zeroed, {} skipped",
                fmt_duration(elapsed_ns),
                copied(&started.job),
                fmt_bytes(details.bytes_zeroed),
                fmt_bytes(details.bytes_skipped),
            );
            let now = match () {
                () if moved.is_some() => ", and is in use now".to_owned(),
                () if is_emptied => format!("; {} is empty now, and shows that", shown(front)),
                () => String::new(),
            };
            say!("{}{now}", (started.done)());
        }
        exit
    }
}

/// A layer as people are told of it.
pub fn shown(node: &Node) -> String {
    format!("'{}'", short_name(node))
}

/// The same with its format and size.
pub fn shown_whole(node: &Node) -> String {
    disk(&short_name(node), node.driver())
}

fn short_name(node: &Node) -> String {
    let name = node.driver().name();
    let path = os_name::to_path(name);
    let file = path.file_name().filter(|_| node.driver().local_file().is_some());
    file.map_or(name.into(), os_name::from_path)
}
