//! `blockferry snapshot`: internal snapshots of an image.

use std::rc::Rc;

use clap::Args;
use serde_json::{Value, json};

use super::exit::{Exit, Failure};
use super::image::{GateArgs, NamingArgs, parse_format};
use super::print::{self, note};
use super::tool::{OutputArgs, PlanArgs, human_size};
use super::{Global, config};
use crate::base::shown::shown;
use crate::engine::admit::{Admission, Refusal};
use crate::engine::qcow2::qcow2;
use crate::engine::{Engine, Format, ImageOptions};
use crate::format::qcow2::{Qcow2, SnapshotInfo};
use crate::graph::node::Role;

/// List, take, apply or delete snapshots inside an image
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("what").required(false).multiple(false))]
pub struct SnapshotArgs {
    /// The image
    #[arg(value_name = "FILE")]
    file: String,
    /// List them (also what happens when nothing is said)
    #[arg(short, long, group = "what")]
    list: bool,
    /// Take one
    #[arg(short, long, value_name = "NAME", group = "what")]
    create: Option<String>,
    /// Make the disk what it was; what it is now is lost
    #[arg(short, long, value_name = "ID_OR_NAME", group = "what")]
    apply: Option<String>,
    /// Delete one
    #[arg(short, long, value_name = "ID_OR_NAME", group = "what")]
    delete: Option<String>,
    /// Format of the image, if its header should not be asked
    #[arg(short, long, value_name = "FORMAT", value_parser = parse_format)]
    format: Option<Format>,
    /// List though others may be writing the image
    #[arg(short = 'U', long)]
    force_share: bool,
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
pub fn main(global: &Global, mut args: SnapshotArgs) -> Result<Exit, Failure> {
    args.file = args.naming.read(&args.file, args.format)?;
    let engine = Rc::new(Engine::new(&config(global))?);
    let args = Rc::new(args);
    let (e, a) = (engine.clone(), args.clone());
    let g = global.clone();
    let list = engine.run(async move { snapshot(&g, &e, &a).await })?;
    let Some(list) = list else { return Ok(Exit::Done) };
    let value = Value::Array(list.iter().map(to_json).collect());
    if !args.output.print(global, &value) && !list.is_empty() {
        print::write_product(&table(&list));
    }
    Ok(Exit::Done)
}

/// The list, where that was asked for.
async fn snapshot(
    global: &Global,
    engine: &Engine,
    args: &SnapshotArgs,
) -> Result<Option<Vec<SnapshotInfo>>, Failure> {
    let lists = args.create.is_none() && args.apply.is_none() && args.delete.is_none();
    let look = ImageOptions {
        format: args.format,
        lock: false,
        gate: args.gate.gate(),
        marks: args.gate.marks().warned(),
        no_backing: true,
        ..ImageOptions::read_only()
    };
    let node = engine.open(&args.file, &look).await?;
    let Some(image) = qcow2(node.driver()) else {
        if lists {
            return Ok(Some(Vec::new()));
        }
        let text = format!("'{}' is a raw image, which has no snapshots", args.file);
        return Err(Failure::text(text));
    };
    if lists {
        return Ok(Some(image.info().await?.snapshots));
    }
    let wanted = args.apply.as_ref().or(args.delete.as_ref());
    let list = image.info().await?.snapshots;
    drop(node);
    let options = ImageOptions {
        format: Some(Format::Qcow2),
        read_only: args.plan.dry_run,
        lock: !args.force_share,
        no_backing: false,
        ..look
    };
    let node = engine.open(&args.file, &options).await?;
    let mut admission = Admission::new(engine.ring(), "snapshot");
    admission.changes("image", &node, Role::JobTarget("snapshot")).await;
    if let Some(name) = wanted.filter(|name| !list.iter().any(|s| s.id == **name || s.name == **name)) {
        admission.refuse(Refusal::Said(format!("There is no snapshot '{name}' in '{}'", args.file)));
    }
    if args.plan.ends(global, &admission.judge().0)? {
        return Ok(None);
    }
    let _lock = node.attach_in_time(Role::JobTarget("snapshot")).await?;
    if let Some(image) = qcow2(node.driver()) {
        change(args, image).await?;
        if !args.output.is_json(global) && !args.quiet {
            note!("{}", done(args));
        }
    }
    Ok(None)
}

async fn change(args: &SnapshotArgs, image: &Qcow2) -> Result<(), Failure> {
    if let Some(name) = &args.create {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let date = (u32::try_from(now.as_secs()).unwrap_or(u32::MAX), now.subsec_nanos());
        image.snapshot_create(name, date).await?;
    } else if let Some(name) = &args.apply {
        image.snapshot_apply(name).await?;
    } else if let Some(name) = &args.delete {
        image.snapshot_delete(name).await?;
    }
    Ok(())
}

/// What was done, as a sentence.
fn done(args: &SnapshotArgs) -> String {
    match (&args.create, &args.apply, &args.delete) {
        (Some(name), ..) => format!("Snapshot '{name}' taken."),
        (_, Some(name), _) => format!("Snapshot '{name}' applied."),
        (.., Some(name)) => format!("Snapshot '{name}' deleted."),
        _ => String::new(),
    }
}

/// A snapshot with the names of `qemu-img info --output=json`.
pub fn to_json(snapshot: &SnapshotInfo) -> Value {
    const SEC: u64 = 1_000_000_000;
    let mut value = json!({
        "id": snapshot.id,
        "name": snapshot.name,
        "vm-state-size": snapshot.vm_state_size,
        "date-sec": snapshot.date_sec,
        "date-nsec": snapshot.date_nsec,
        "vm-clock-sec": snapshot.vm_clock_nsec / SEC,
        "vm-clock-nsec": snapshot.vm_clock_nsec % SEC,
    });
    if let (Some(icount), Some(object)) = (snapshot.icount, value.as_object_mut()) {
        object.insert("icount".into(), icount.into());
    }
    value
}

/// The table that people read.
pub fn table(list: &[SnapshotInfo]) -> String {
    let mut text = format!(
        "Snapshot list:\n{:<7} {:<16} {:>8} {:>20} {:>16}\n",
        "ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK"
    );
    for s in list {
        let date = std::time::UNIX_EPOCH + std::time::Duration::from_secs(s.date_sec.into());
        let date = humantime::format_rfc3339_seconds(date).to_string();
        let ms = s.vm_clock_nsec / 1_000_000;
        let clock =
            format!("{:04}:{:02}:{:02}.{:03}", ms / 3_600_000, ms / 60_000 % 60, ms / 1000 % 60, ms % 1000);
        text += &format!(
            "{:<7} {:<16} {:>8} {date:>20} {clock:>16}\n",
            shown(&s.id),
            shown(&s.name),
            human_size(s.vm_state_size)
        );
    }
    text
}
