//! `blockferry compare`: whether two images hold the same.

use std::rc::Rc;

use blockferry_ring::sync::{Either, either};
use clap::Args;
use serde_json::json;

use super::exit::{Exit, Failure};
use super::image::{CacheMode, GateArgs, NamingArgs, ServerArgs, parse_format};
use super::print::{product, say};
use super::progress::{INTERVAL_NANOS, Progress};
use super::service::at_once;
use super::signals::{Signal, Signals, begin};
use super::tool::{OutputArgs, cache, read_options, with_code};
use super::{Global, config, stats};
use crate::base::units::fmt_bytes;
use crate::block::patience::for_job;
use crate::engine::{Engine, Format};
use crate::graph::node::{Node, Role};
use crate::job::compare::Comparer;
use crate::job::grounds::Grounds;

/// Compare two images; exit code 0: the same, 1: different, 2 and above: it could not be told
#[derive(Debug, Args)]
pub struct CompareArgs {
    /// One image
    #[arg(value_name = "FILE1")]
    first: String,
    /// The other image
    #[arg(value_name = "FILE2")]
    second: String,
    /// Format of the first image
    #[arg(short = 'f', long = "a-format", value_name = "FORMAT", value_parser = parse_format)]
    first_format: Option<Format>,
    /// Format of the second image
    #[arg(short = 'F', long = "b-format", value_name = "FORMAT", value_parser = parse_format)]
    second_format: Option<Format>,
    /// Images that differ in length, or in what they call zero, differ
    #[arg(short, long)]
    strict: bool,
    /// Cache mode: none and directsync go past the page cache, the others through it [default: none]
    #[arg(short = 'T', long = "source-cache", visible_alias = "cache", value_name = "CACHE", value_parser = cache)]
    cache: Option<CacheMode>,
    /// Open the images though others may be writing them: no locks
    #[arg(short = 'U', long)]
    force_share: bool,
    /// Believe servers and remote filesystems that claim to hold zeroes: where both images do, nothing is read
    #[arg(long)]
    trust_holes: bool,
    /// Show progress (on a terminal it is shown anyway)
    #[arg(short, long)]
    progress: bool,
    /// No output but errors
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    server: ServerArgs,
    #[command(flatten)]
    gate: GateArgs,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    naming: NamingArgs,
}

/// What came of it.
enum Verdict {
    Same { sizes_differ: bool },
    Different(String, Option<u64>),
    Stopped,
}

/// Runs the command.
pub fn main(global: &Global, args: &CompareArgs) -> Result<Exit, Failure> {
    with_code(global, 2, compare(global, args))
}

fn compare(global: &Global, args: &CompareArgs) -> Result<Exit, Failure> {
    let engine = Rc::new(Engine::new(&config(global))?);
    let signals = Signals::new(engine.ring())?;
    let first = read_options(args.first_format, args.cache, args.force_share, &args.server, &args.gate);
    let second = read_options(args.second_format, args.cache, args.force_share, &args.server, &args.gate);
    let names = (
        args.naming.read(&args.first, args.first_format)?,
        args.naming.read(&args.second, args.second_format)?,
    );
    let (strict, quiet, global_options) = (args.strict, args.quiet, global.clone());
    let trust = args.trust_holes;
    let e = engine.clone();
    let (verdict, compared) = engine.run(async move {
        let a = e.open(&names.0, &first).await?;
        let b = e.open(&names.1, &second).await?;
        let _uses = (
            a.attach_in_time(Role::JobSource("compare")).await?,
            b.attach_in_time(Role::JobSource("compare")).await?,
        );
        begin();
        // A disk that is counted in sectors is no other disk for that, as long as the rest of the sector is zero.
        let sectors = |node: &Node| node.driver().len().div_ceil(512);
        let sizes_differ = sectors(&a) != sectors(&b);
        if strict && sizes_differ {
            return Ok((
                Verdict::Different("Strict mode: Image size mismatch!".into(), None),
                Grounds::default(),
            ));
        }
        let comparer =
            Rc::new(Comparer::new(e.ring(), a.driver(), b.driver()).strict(strict).trusting(trust));
        let mut progress = Progress::new(&global_options, quiet, e.ring().clock());
        let running = {
            let comparer = comparer.clone();
            e.ring().spawn_with_result(for_job(async move { comparer.run().await }))
        };
        let result = loop {
            let ended = async { running.take().await };
            match either(either(ended, signals.next()), e.ring().sleep(INTERVAL_NANOS)).await {
                Either::First(Either::First(result)) => break result,
                Either::First(Either::Second(Signal::Report)) => {
                    progress.report_of("compare", comparer.compared(), comparer.len(), e.ring().clock());
                }
                Either::First(Either::Second(_)) if comparer.is_stopped() => at_once(Exit::Code(3)),
                Either::First(Either::Second(_)) => comparer.stop(),
                Either::Second(()) => {
                    let (done, read) = (comparer.compared(), comparer.grounds().bytes_read);
                    progress.show_work("compare", done, comparer.len(), read, e.ring().clock());
                }
            }
        };
        progress.finish();
        let verdict = match result? {
            Some(offset) => Verdict::Different(format!("Content mismatch at offset {offset}!"), Some(offset)),
            None => match comparer.status_mismatch() {
                Some(offset) => Verdict::Different(
                    format!("Strict mode: Offset {offset} block status mismatch!"),
                    Some(offset),
                ),
                None if comparer.is_stopped() => Verdict::Stopped,
                None => Verdict::Same { sizes_differ },
            },
        };
        Ok::<_, Failure>((verdict, comparer.grounds()))
    })?;
    stats::print(global, engine.ring());
    let (word, text, offset, exit) = match verdict {
        Verdict::Same { sizes_differ } => {
            if sizes_differ && !args.quiet && !args.output.is_json(global) {
                product!("Warning: Image size mismatch!");
            }
            ("same", "Images are identical.".to_owned(), None, Exit::Done)
        }
        Verdict::Different(text, offset) => ("different", text, offset, Exit::Code(1)),
        Verdict::Stopped => ("stopped", "Stopped before the end".to_owned(), None, Exit::Code(3)),
    };
    let value = json!({
        "event": "end",
        "exit-code": exit.code(),
        "result": word,
        "message": text,
        "offset": offset,
        "bytes-compared": compared.total(),
        "bytes-read": compared.bytes_read,
        "bytes-by-tables": compared.bytes_by_tables,
        "bytes-by-filesystem": compared.bytes_by_filesystem,
        "bytes-on-trust": compared.bytes_on_trust,
    });
    if !args.output.print(global, &value) && !args.quiet {
        product!("{text}");
        if word == "same" {
            say!("{} compared: {compared}", fmt_bytes(compared.total()));
        }
    }
    Ok(exit)
}
