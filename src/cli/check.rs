//! `blockferry check`: whether an image's metadata is sound, and its repair.

use std::pin::pin;
use std::rc::Rc;

use blockferry_ring::sync::{Either, either};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::exit::{Exit, Failure};
use super::image::{CacheMode, GateArgs, NamingArgs, parse_format};
use super::print::{self, product, say};
use super::progress::{INTERVAL_NANOS, Progress};
use super::tool::{OutputArgs, PlanArgs, cache};
use super::{Global, config};
use crate::block::patience::for_job;
use crate::engine::admit::Admission;
use crate::engine::qcow2::qcow2;
use crate::engine::{Engine, Format, ImageOptions};
use crate::format::qcow2::{CheckReport, Qcow2, Repair};
use crate::graph::node::Role;

/// The exit code for formats that have nothing to check.
const NOT_SUPPORTED: u8 = 63;

const AFTER: &str = "\
Exit codes, as those of qemu-img:
  0   sound (after the repair, where one was asked for)
  1   the check did not come to its end
  2   corruptions were found
  3   leaked clusters, and nothing worse
  63  images of this format cannot be checked";

/// Check an image, and repair it
#[derive(Debug, Args)]
#[command(after_help = AFTER)]
pub struct CheckArgs {
    /// The image
    #[arg(value_name = "FILE")]
    file: String,
    /// Its format, if its header should not be asked
    #[arg(short, long, value_name = "FORMAT", value_parser = parse_format)]
    format: Option<Format>,
    /// What to repair
    #[arg(short, long, value_name = "WHAT", value_enum)]
    repair: Option<What>,
    /// Cache mode: none and directsync go past the page cache, the others through it [default: none]
    #[arg(short = 'T', long, value_name = "CACHE", value_parser = cache)]
    cache: Option<CacheMode>,
    /// Check though others may be writing the image: what is found then may not be true
    #[arg(short = 'U', long, conflicts_with = "repair")]
    force_share: bool,
    /// No output but what is wrong
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

#[derive(Clone, Copy, Debug, ValueEnum)]
enum What {
    /// Free clusters that nobody uses
    Leaks,
    /// Everything that can be repaired; wrong repairs can make things worse, so have a copy
    All,
    /// The same, and drop snapshots and bitmaps that cannot be read; whoever could still rescue them no longer can
    DropUnreadable,
}

/// Runs the command.
pub fn main(global: &Global, mut args: CheckArgs) -> Result<Exit, Failure> {
    args.file = args.naming.read(&args.file, args.format)?;
    let engine = Rc::new(Engine::new(&config(global))?);
    let args = Rc::new(args);
    let (e, a) = (engine.clone(), args.clone());
    let g = global.clone();
    let (format, report) = match engine.run(for_job(async move { check(&g, &e, &a).await }))? {
        Checked::Done(format, report) => (format, *report),
        Checked::Planned => return Ok(Exit::Done),
        Checked::NotSupported => {
            print::failure_has(NOT_SUPPORTED);
            print::failure(
                global.json,
                &Failure::text(format!("'{}': This image format does not support checks", args.file)),
            );
            return Ok(Exit::Code(NOT_SUPPORTED));
        }
    };
    if !args.output.print(global, &to_json(&args.file, format, &report)) {
        tell(&args, &report);
    }
    Ok(match &report {
        r if r.check_errors > 0 => Exit::Code(1),
        r if r.corruptions > 0 => Exit::Code(2),
        r if r.leaks > 0 => Exit::Code(3),
        _ => Exit::Done,
    })
}

/// How it ended.
enum Checked {
    /// It was looked at.
    Done(Format, Box<CheckReport>),
    NotSupported,
    /// It was a dry run of a repair.
    Planned,
}

async fn check(global: &Global, engine: &Engine, args: &CheckArgs) -> Result<Checked, Failure> {
    let repair = match args.repair {
        None => Repair::None,
        Some(What::Leaks) => Repair::Leaks,
        Some(What::All) => Repair::All,
        Some(What::DropUnreadable) => Repair::DropUnreadable,
    };
    let look = ImageOptions {
        format: args.format,
        cache: args.cache.unwrap_or_default().into(),
        lock: !args.force_share,
        no_backing: true,
        for_check: true,
        gate: args.gate.gate(),
        marks: args.gate.marks().warned(),
        ..ImageOptions::read_only()
    };
    // Read-only first: that a raw image cannot be checked is to be said, and not that its format has to be.
    let mut node = engine.open(&args.file, &look).await?;
    if qcow2(node.driver()).is_none() {
        return Ok(Checked::NotSupported);
    }
    if repair != Repair::None {
        drop(node);
        let options = ImageOptions { format: Some(Format::Qcow2), read_only: args.plan.dry_run, ..look };
        node = engine.open(&args.file, &options).await?;
        let mut admission = Admission::new(engine.ring(), "check");
        admission.changes("image", &node, Role::JobTarget("check")).await;
        if args.plan.ends(global, &admission.judge().0)? {
            return Ok(Checked::Planned);
        }
    }
    let Some(image) = qcow2(node.driver()) else { return Ok(Checked::NotSupported) };
    let kind = match repair {
        Repair::None => Role::JobSource("check"),
        _ => Role::JobTarget("check"),
    };
    let _lock = node.attach_in_time(kind).await?;
    let mut report = shown(global, engine, args, image, repair).await?;
    if report.leaks_fixed > 0 || report.corruptions_fixed > 0 {
        // What is left after a repair is what a second look finds.
        let again = image.check(Repair::None).await?;
        report = CheckReport {
            leaks_fixed: report.leaks_fixed,
            corruptions_fixed: report.corruptions_fixed,
            messages: report.messages,
            ..again
        };
    }
    Ok(Checked::Done(Format::Qcow2, Box::new(report)))
}

/// A repair of a large image takes a while: how far it is is shown meanwhile.
async fn shown(
    global: &Global,
    engine: &Engine,
    args: &CheckArgs,
    image: &Qcow2,
    repair: Repair,
) -> Result<CheckReport, Failure> {
    let ring = engine.ring();
    let mut progress = Progress::new(global, args.quiet || repair == Repair::None, ring.clock());
    let mut work = pin!(image.check(repair));
    loop {
        match either(work.as_mut(), ring.sleep(INTERVAL_NANOS)).await {
            Either::First(found) => {
                progress.finish();
                return Ok(found?);
            }
            Either::Second(_) if repair != Repair::None => {
                let (phase, done, of) = image.check_progress().now();
                progress.show(phase, done, of, ring.clock());
            }
            Either::Second(_) => {}
        }
    }
}

/// What is 0 is left out, as qemu-img does it.
fn to_json(file: &str, format: Format, report: &CheckReport) -> Value {
    let mut value = json!({"filename": file, "format": format.name(), "check-errors": report.check_errors});
    if let Some(object) = value.as_object_mut() {
        for (name, n) in [
            ("image-end-offset", report.image_end_offset),
            ("corruptions", report.corruptions),
            ("leaks", report.leaks),
            ("corruptions-fixed", report.corruptions_fixed),
            ("leaks-fixed", report.leaks_fixed),
            ("total-clusters", report.total_clusters),
            ("allocated-clusters", report.allocated_clusters),
            ("fragmented-clusters", report.fragmented_clusters),
            ("compressed-clusters", report.compressed_clusters),
        ] {
            if n > 0 {
                object.insert(name.into(), n.into());
            }
        }
        if !report.messages.is_empty() {
            object.insert("messages".into(), report.messages.clone().into());
        }
    }
    value
}

fn tell(args: &CheckArgs, report: &CheckReport) {
    for message in &report.messages {
        say!("{message}");
    }
    if args.quiet {
        return;
    }
    if report.leaks_fixed > 0 || report.corruptions_fixed > 0 {
        product!("The following inconsistencies were found and repaired:\n");
        product!("    {} leaked clusters", report.leaks_fixed);
        product!("    {} corruptions\n", report.corruptions_fixed);
    }
    if report.is_clean() {
        product!("No errors were found on the image.");
    } else {
        if report.corruptions > 0 {
            product!("\n{} errors were found on the image.", report.corruptions);
            product!("Data may be corrupted, or further writes to the image may corrupt it.");
        }
        if report.leaks > 0 {
            product!("\n{} leaked clusters were found on the image.", report.leaks);
            match &report.unread {
                None => product!("This means waste of disk space, but no harm to data."),
                Some(what) => product!(
                    "They may be in use: {what} cannot be read. So they are not freed, unless `--repair \
                     drop-unreadable` is said."
                ),
            }
        }
        if report.check_errors > 0 {
            product!("\n{} internal errors have occurred during the check.", report.check_errors);
        }
    }
    if report.total_clusters > 0 && report.allocated_clusters > 0 {
        let share = |n: u64, of: u64| n as f64 * 100.0 / of as f64;
        product!(
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            report.allocated_clusters,
            report.total_clusters,
            share(report.allocated_clusters, report.total_clusters),
            share(report.fragmented_clusters, report.allocated_clusters),
            share(report.compressed_clusters, report.allocated_clusters),
        );
    }
    if report.image_end_offset > 0 {
        product!("Image end offset: {}", report.image_end_offset);
    }
}
