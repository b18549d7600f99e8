//! `blockferry rebase`: gives an image another backing file.
//!
//! Safe (the usual way): what the image shows stays the same. Where it holds nothing itself and the two backing files
//! differ, what the old one shows is written into the image first. All of that is durable before the name of the new
//! one is: whatever ends the command, the image shows what it showed, over whichever backing file it then names.
//!
//! Unsafe (`-u`): only the name changes. For a backing file that has moved, or was converted.

use std::rc::Rc;

use clap::Args;
use serde_json::json;

use super::chain::pass_on_mark;
use super::create::warn_of_refusal;
use super::exit::{Exit, Failure};
use super::image::{CacheMode, GateArgs, NamingArgs, parse_format};
use super::print::{note, say};
use super::progress::{INTERVAL_NANOS, Progress};
use super::signals::{Signal, Signals};
use super::tool::{OutputArgs, PlanArgs, cache};
use super::{Global, config};
use crate::block::Driver;
use crate::engine::admit::Admission;
use crate::engine::marks::{refusal, unfinished};
use crate::engine::open::said_by_header;
use crate::engine::qcow2::{open_backing, qcow2};
use crate::engine::rebase::Rebase;
use crate::engine::remote::is_remote;
use crate::engine::{Engine, Format, ImageOptions};
use crate::graph::node::Role;

/// Give an image another backing file
#[derive(Debug, Args)]
pub struct RebaseArgs {
    /// The image
    #[arg(value_name = "FILE")]
    file: String,
    /// The new backing file, relative to the image; empty (''): none, and the image holds everything itself. With -u alone
    /// the name is taken away
    #[arg(short, long, value_name = "BACKING_FILE")]
    backing: Option<String>,
    /// Format of the new backing file; has to be said
    #[arg(short = 'F', long, value_name = "FORMAT", value_parser = parse_format)]
    backing_format: Option<Format>,
    /// Format of the image, if its header should not be asked
    #[arg(short, long, value_name = "FORMAT", value_parser = parse_format)]
    format: Option<Format>,
    /// Change the name only: nothing is compared or copied, and the old backing file need not be there
    #[arg(short = 'u', long = "unsafe", visible_alias = "backing-unsafe")]
    name_only: bool,
    /// Cache mode: none and directsync go past the page cache, the others through it [default: none]
    #[arg(short = 't', long, value_name = "CACHE", value_parser = cache)]
    cache: Option<CacheMode>,
    /// Cache mode of the backing files [default: none]
    #[arg(short = 'T', long, value_name = "CACHE", value_parser = cache)]
    backing_cache: Option<CacheMode>,
    /// Compress the clusters that the image is given, up to those of 1 MiB
    #[arg(short, long)]
    compress: bool,
    /// Open the images though others may be writing them: no locks
    #[arg(short = 'U', long)]
    force_share: bool,
    /// Show progress (on a terminal it is shown anyway)
    #[arg(short, long)]
    progress: bool,
    /// No output but errors
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    gate: GateArgs,
    #[command(flatten)]
    plan: PlanArgs,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    naming: NamingArgs,
}

/// Runs the command.
pub fn main(global: &Global, mut args: RebaseArgs) -> Result<Exit, Failure> {
    args.file = args.naming.read(&args.file, args.format)?;
    let engine = Rc::new(Engine::new(&config(global))?);
    let signals = Signals::new(engine.ring())?;
    let args = Rc::new(args);
    let (e, a, g) = (engine.clone(), args.clone(), global.clone());
    let written = engine.run(async move { rebase(&e, &a, &g, &signals).await })?;
    let written = match written {
        Rebased::Done(written) => written,
        Rebased::Planned => return Ok(Exit::Done),
        Rebased::Cancelled => {
            say!("Cancelled: the image shows what it showed, over its old backing file");
            return Ok(Exit::Cancelled);
        }
    };
    let value = json!({
        "event": "end",
        "exit-code": Exit::Done.code(),
        "filename": args.file,
        "bytes-written": written,
    });
    if !args.output.note(global, &value) && !args.quiet {
        note!("Image rebased.");
    }
    Ok(Exit::Done)
}

/// How it ended.
enum Rebased {
    /// So many bytes were written to the image.
    Done(u64),
    Cancelled,
    /// It was a dry run.
    Planned,
}

async fn rebase(
    engine: &Engine,
    args: &RebaseArgs,
    global: &Global,
    signals: &Signals,
) -> Result<Rebased, Failure> {
    let backing = match (&args.backing, args.name_only) {
        (Some(name), _) => name.as_str(),
        (None, true) => "",
        (None, false) => {
            return Err(Failure::usage(
                "Say the new backing file (-b NAME); -b '' for none, so that the image holds everything itself; or -u to \
                 take only the name of the old one away",
            ));
        }
    };
    let options = ImageOptions {
        format: args.format,
        cache: args.cache.unwrap_or_default().into(),
        gate: args.gate.gate(),
        marks: args.gate.marks().warned(),
        no_backing: args.name_only,
        lock: !args.force_share,
        read_only: args.plan.dry_run,
        ..ImageOptions::default()
    };
    let look = ImageOptions { lock: false, read_only: true, ..options.clone() };
    if args.format.is_none() && said_by_header(engine.ring(), &args.file, &look).await? == Format::Raw {
        return Err(Failure::text(format!("'{}' is a raw image, which has no backing files", args.file)));
    }
    let node = engine.open(&args.file, &options).await?;
    let Some(image) = qcow2(node.driver()) else {
        return Err(Failure::text(format!("'{}' is a raw image, which has no backing files", args.file)));
    };
    if args.compress && image.info().await?.has_data_file {
        return Err(Failure::text("Compressed clusters cannot be in a data file: leave out -c"));
    }
    if !backing.is_empty() && args.backing_format.is_none() {
        return Err(Failure::usage("The format of the new backing file has to be said (-F FORMAT)"));
    }
    let mut admission = Admission::new(engine.ring(), "rebase");
    admission.changes("image", &node, Role::JobTarget("rebase")).await;
    // What is copied of a backing file that is no whole disk makes a disk that is none.
    let read = ImageOptions { marks: args.gate.marks(), ..ImageOptions::read_only() };
    if let Some(below) = image.backing().filter(|_| !args.name_only)
        && let Some(mark) = unfinished(engine.ring(), below.driver(), &read.marks).await
        && let Some(error) = refusal(&mark, below.driver().name(), &read)
    {
        admission.refuse(error);
    }
    let new = match backing {
        "" => None,
        name if args.name_only => {
            admission.keeps(&args.file, name).await;
            // It need not be there; what can be said of it without asking a server is said.
            if !is_remote(name) {
                let format = args.backing_format;
                match open_backing(engine.ring(), &args.file, name, format, &options).await {
                    Ok(new) => {
                        let relation = "is a part of its own new backing chain";
                        admission.stays_whole(new.driver(), relation).await;
                    }
                    Err(error) => tracing::debug!(%error, "the new backing file was not looked at"),
                }
            }
            None
        }
        name => {
            let cache = args.backing_cache.or(args.cache).unwrap_or_default().into();
            let options = ImageOptions { marks: args.gate.marks(), cache, ..options.clone() };
            let new = open_backing(engine.ring(), &args.file, name, args.backing_format, &options).await?;
            admission.reads("new backing file", new.driver()).await;
            Some(new)
        }
    };
    if args.plan.ends(global, &admission.judge().0)? {
        return Ok(Rebased::Planned);
    }
    warn_of_refusal(engine, &args.file, Some(backing)).await;
    let lock = node.attach_in_time(Role::JobTarget("rebase")).await?;
    let mut written = 0;
    if !args.name_only {
        pass_on_mark(engine, &node, &node, "rebase").await?;
        let work = Rebase::new(engine.ring(), node.driver().clone(), new).compressing(args.compress);
        let mut progress = Progress::new(global, args.quiet, engine.ring().clock());
        let mut shown_at = 0;
        let (mut at, len) = (0, image.len());
        while at < len {
            match signals.try_next() {
                None => {}
                Some(Signal::Report) => progress.report_of("rebase", at, len, engine.ring().clock()),
                Some(_) => {
                    progress.finish();
                    return Ok(Rebased::Cancelled);
                }
            }
            let (next, bytes) = work.step(at).await?;
            (at, written) = (next, written + bytes);
            let now = engine.ring().clock();
            if now >= shown_at + INTERVAL_NANOS {
                shown_at = now;
                progress.show("rebase", at, len, now);
            }
        }
        progress.finish();
        image.flush().await?;
    }
    let name = Some(backing).filter(|name| !name.is_empty());
    image.set_backing(name.map(|name| (name, args.backing_format.map(Format::name)))).await?;
    drop(lock);
    Ok(Rebased::Done(written))
}
