//! `blockferry resize`: changes the length of an image.

use std::rc::Rc;

use clap::Args;
use serde_json::json;

use super::exit::{Exit, Failure};
use super::image::{GateArgs, NamingArgs, parse_format, size};
use super::print::note;
use super::tool::{OutputArgs, PlanArgs};
use super::{Global, config};
use crate::base::range::ByteRange;
use crate::engine::admit::Admission;
use crate::engine::create::{RawPreallocation, preallocate};
use crate::engine::qcow2::qcow2;
use crate::engine::{Engine, Format, ImageOptions};
use crate::format::qcow2::CreateOptions;
use crate::graph::node::Role;

/// Change the length of an image
#[derive(Debug, Args)]
pub struct ResizeArgs {
    /// The image
    #[arg(value_name = "FILE")]
    file: String,
    /// The new length, or by how much it grows (+) or shrinks (-)
    #[arg(value_name = "[+-]SIZE", allow_hyphen_values = true, value_parser = Change::parse)]
    change: Change,
    /// Its format: has to be said if it is raw
    #[arg(short, long, value_name = "FORMAT", value_parser = parse_format)]
    format: Option<Format>,
    /// Allow the image to shrink: what lies beyond its new end is lost
    #[arg(long)]
    shrink: bool,
    /// What is allocated of the part that is added: off, falloc or full (qcow2: metadata, too)
    #[arg(long, value_name = "MODE", default_value = "off")]
    preallocation: String,
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

/// What is to become of a length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    To(u64),
    By(u64),
    LessBy(u64),
}

impl Change {
    fn parse(text: &str) -> Result<Change, String> {
        match text.as_bytes().first() {
            Some(b'+') => size(&text[1..]).map(Change::By),
            Some(b'-') => size(&text[1..]).map(Change::LessBy),
            _ => size(text).map(Change::To),
        }
    }

    fn apply(self, len: u64) -> Option<u64> {
        let new = match self {
            Change::To(new) => Some(new),
            Change::By(more) => len.checked_add(more),
            Change::LessBy(less) => len.checked_sub(less),
        };
        new.filter(|new| *new <= crate::base::limits::DISK_LEN_MAX)
    }
}

/// Runs the command.
pub fn main(global: &Global, mut args: ResizeArgs) -> Result<Exit, Failure> {
    args.file = args.naming.read(&args.file, args.format)?;
    let engine = Rc::new(Engine::new(&config(global))?);
    let args = Rc::new(args);
    let (e, a) = (engine.clone(), args.clone());
    let g = global.clone();
    let Some((old, new)) = engine.run(async move { resize(&g, &e, &a).await })? else {
        return Ok(Exit::Done);
    };
    let value = json!({"filename": args.file, "old-virtual-size": old, "virtual-size": new});
    if !args.output.note(global, &value) && !args.quiet {
        note!("Image resized.");
    }
    Ok(Exit::Done)
}

/// The old and the new length; `None`: it was a dry run.
async fn resize(global: &Global, engine: &Engine, args: &ResizeArgs) -> Result<Option<(u64, u64)>, Failure> {
    let options = ImageOptions {
        format: args.format,
        warns_of_header: args.format == Some(Format::Raw),
        gate: args.gate.gate(),
        read_only: args.plan.dry_run,
        marks: args.gate.marks().warned(),
        ..ImageOptions::default()
    };
    let node = engine.open(&args.file, &options).await?;
    let mut admission = Admission::new(engine.ring(), "resize");
    admission.changes("image", &node, Role::JobTarget("resize")).await;
    let driver = node.driver();
    let old = driver.len();
    let Some(new) = args.change.apply(old) else {
        let text = format!("The new length of '{}' makes no sense: it has {old} bytes", args.file);
        return Err(Failure::text(text));
    };
    if new == 0 {
        return Err(Failure::text(format!(
            "A disk has at least one byte: '{}' cannot be resized to nothing",
            args.file
        )));
    }
    if new < old && !args.shrink {
        return Err(Failure::text(format!(
            "'{}' has {old} bytes, and what lies beyond {new} would be lost. Say --shrink if that is meant",
            args.file
        )));
    }
    if new < old && args.preallocation != "off" {
        return Err(Failure::text("Preallocation can only be used for growing images"));
    }
    let mut mode = CreateOptions::default();
    let mut raw_mode = RawPreallocation::Off;
    match qcow2(driver) {
        Some(image) => {
            mode.set("preallocation", &args.preallocation).map_err(Failure::text)?;
            image.check_resize(new, mode.preallocation).await?;
        }
        None => raw_mode = RawPreallocation::parse(&args.preallocation).map_err(Failure::text)?,
    }
    if new > old {
        admission.grows(&node, new);
        if matches!(args.preallocation.as_str(), "falloc" | "full") {
            admission.needs_room(driver, new - old).await;
        }
    }
    if args.plan.ends(global, &admission.judge().0)? {
        return Ok(None);
    }
    let _lock = node.attach_in_time(Role::JobTarget("resize")).await?;
    match qcow2(driver) {
        Some(image) => image.resize(new, mode.preallocation).await?,
        None => {
            driver.set_len(new).await?;
            if new > old {
                let added = ByteRange::at_saturating(old, new - old);
                preallocate(engine.ring(), &node, added, raw_mode).await?;
            }
        }
    }
    driver.flush().await?;
    Ok(Some((old, new)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_said_in_three_ways() {
        let apply = |text: &str, len| Change::parse(text).unwrap().apply(len);
        assert_eq!(apply("1M", 5), Some(1 << 20));
        assert_eq!(apply("+1k", 5), Some(1029));
        assert_eq!(apply("-5", 5), Some(0));
        assert_eq!(apply("-6", 5), None);
        assert!(Change::parse("x").is_err() && Change::parse("+-1").is_err());
    }
}
