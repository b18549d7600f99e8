//! `blockferry amend`: changes what a qcow2 image is, in place.

use std::rc::Rc;

use clap::Args;
use serde_json::json;

use super::exit::{Exit, Failure};
use super::image::{CacheMode, GateArgs, NamingArgs, parse_format, refused};
use super::print::note;
use super::tool::{OutputArgs, PlanArgs, asks_for_help, cache, option_pairs, print_options, with_code};
use super::{Global, config};
use crate::block::Driver;
use crate::engine::admit::Admission;
use crate::engine::open::said_by_header;
use crate::engine::qcow2::qcow2;
use crate::engine::{Engine, Format, ImageOptions};
use crate::format::qcow2::{Amendment, Compat, CreateOptions, Info, Qcow2};
use crate::graph::node::Role;

/// What can be said; the others of new images cannot be changed.
const NAMES: [(&str, &str); 8] = [
    ("backing_file", "Cannot be changed here, only be as it is: see `rebase`"),
    ("backing_fmt", "Cannot be changed here, only be as it is: see `rebase`"),
    ("compat", "Compatibility level (v2 [0.10] or v3 [1.1])"),
    ("data_file", "File name of the external data file; the data itself stays where it is"),
    ("data_file_raw", "The external data file stays valid as a raw image; can be switched off only"),
    ("lazy_refcounts", "Postpone refcount updates"),
    ("refcount_bits", "Width of a reference count entry in bits"),
    ("size", "Virtual disk size"),
];

const AFTER: &str = "\
Examples:
  Make an image of version 2 one of version 3, with reference counts that may be written late:
      blockferry amend -o compat=1.1,lazy_refcounts=on disk.qcow2

  What can be changed:
      blockferry amend -f qcow2 -o help

  Reference counts that leave room for more snapshots (made anew next to the old ones):
      blockferry amend -o refcount_bits=32 disk.qcow2

Each change is decided by one write of the header: a power cut leaves the image as it was or as it is to be, and clusters
that nobody uses at worst. A size grows after that; `blockferry resize --shrink` makes it smaller.";

/// Change what a qcow2 image is, in place
#[derive(Debug, Args)]
#[command(after_help = AFTER)]
pub struct AmendArgs {
    /// The image
    #[arg(value_name = "FILE", default_value = "", hide_default_value = true)]
    file: String,
    /// What is to be different, as NAME=VALUE,NAME=VALUE (may be said more than once); `-o help` lists what can be
    #[arg(short, long, value_name = "OPTIONS", required = true)]
    options: Vec<String>,
    /// Its format, if its header should not be asked
    #[arg(short, long, value_name = "FORMAT", value_parser = parse_format)]
    format: Option<Format>,
    /// Cache mode: none and directsync go past the page cache, the others through it [default: none]
    #[arg(short = 't', long, value_name = "CACHE", value_parser = cache)]
    cache: Option<CacheMode>,
    /// Accepted for its name: nothing that can be changed here is unsafe
    #[arg(long)]
    force: bool,
    /// Accepted for its name
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
pub fn main(global: &Global, mut args: AmendArgs) -> Result<Exit, Failure> {
    let asks = asks_for_help(&args.options)?;
    if args.file.is_empty() && !(asks && args.format.is_some()) {
        let more = if asks { ", or a format (-f)" } else { "" };
        return with_code(global, 2, Err(Failure::text(format!("Say which image is to be amended{more}"))));
    }
    args.file = args.naming.read(&args.file, args.format)?;
    let engine = Rc::new(Engine::new(&config(global))?);
    if asks {
        return tell_options(&engine, &args);
    }
    let args = Rc::new(args);
    let (e, a, g) = (engine.clone(), args.clone(), global.clone());
    let Some(info) = engine.run(async move { amend(&g, &e, &a).await })? else { return Ok(Exit::Done) };
    let value = json!({
        "filename": args.file,
        "compat": info.compat.name(),
        "lazy-refcounts": info.lazy_refcounts,
        "virtual-size": info.virtual_size,
    });
    if !args.output.note(global, &value) && !args.quiet {
        note!("Image amended.");
    }
    Ok(Exit::Done)
}

/// What can be changed of images of the format that was said, or that the image has.
fn tell_options(engine: &Rc<Engine>, args: &AmendArgs) -> Result<Exit, Failure> {
    let format = match args.format {
        Some(format) => format,
        None => {
            let (ring, name) = (engine.ring().clone(), args.file.clone());
            let look = ImageOptions { lock: false, gate: args.gate.gate(), ..ImageOptions::read_only() };
            engine.run(async move { said_by_header(&ring, &name, &look).await })?
        }
    };
    if format == Format::Raw {
        return Err(Failure::text("A raw image has nothing that could be amended"));
    }
    print_options(format, "Options of images", &NAMES);
    Ok(Exit::Done)
}

/// What it is afterwards; `None`: it was a dry run.
async fn amend(global: &Global, engine: &Engine, args: &AmendArgs) -> Result<Option<Info>, Failure> {
    let options = ImageOptions {
        format: args.format,
        cache: args.cache.unwrap_or_default().into(),
        gate: args.gate.gate(),
        read_only: args.plan.dry_run,
        marks: args.gate.marks().warned(),
        ..ImageOptions::default()
    };
    let node = engine.open(&args.file, &options).await?;
    let mut admission = Admission::new(engine.ring(), "amend");
    admission.changes("image", &node, Role::JobTarget("amend")).await;
    let Some(image) = qcow2(node.driver()) else {
        return Err(Failure::text(format!(
            "'{}' is a raw image: it has nothing that could be amended",
            args.file
        )));
    };
    let wanted = judge(image, &option_pairs(&args.options)?).await?;
    if let Some(len) = wanted.len.filter(|len| *len > node.driver().len()) {
        admission.grows(&node, len);
    }
    if args.plan.ends(global, &admission.judge().0)? {
        return Ok(None);
    }
    let _lock = node.attach_in_time(Role::JobTarget("amend")).await?;
    image.amend(&wanted).await?;
    image.flush().await?;
    Ok(Some(image.info().await?))
}

/// What is asked of an image, all of which can be done.
async fn judge(image: &Qcow2, pairs: &[(String, String)]) -> Result<Amendment, Failure> {
    let info = image.info().await?;
    let wanted = understand(&info, pairs).map_err(Failure::Usage)?;
    if let Some(len) = wanted.len.filter(|len| *len < info.virtual_size) {
        return Err(Failure::text(format!(
            "The disk has {} bytes, and what lies beyond {len} would be lost: use `blockferry resize --shrink`",
            info.virtual_size
        )));
    }
    image.check_amend(&wanted).await.map_err(|error| refused("The image", error))?;
    Ok(wanted)
}

fn understand(info: &Info, pairs: &[(String, String)]) -> Result<Amendment, String> {
    let (mut wanted, mut said) = (Amendment::default(), CreateOptions::default());
    for (name, value) in pairs {
        if !NAMES.iter().any(|(known, _)| known == name) {
            return Err(match CreateOptions::NAMES.iter().any(|(known, _)| known == name) {
                true => format!("The option '{name}' is for new images: convert the image to change it"),
                false => format!("Unknown option '{name}'"),
            });
        }
        said.set(name, value)?;
        match name.as_str() {
            "compat" => wanted.compat = Some(said.compat),
            "lazy_refcounts" => wanted.lazy_refcounts = Some(said.lazy_refcounts),
            "size" => wanted.len = Some(said.size),
            "refcount_bits" => wanted.refcount_bits = Some(said.refcount_bits),
            "data_file" => wanted.data_file = said.data_file.clone(),
            _ => {}
        }
    }
    let is_said = |name: &str| pairs.iter().any(|(said, _)| said == name);
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    let kept = [
        (
            "backing_file",
            text(&said.backing_file) == text(&info.backing_filename),
            "`blockferry rebase` does that",
        ),
        (
            "backing_fmt",
            text(&said.backing_fmt) == text(&info.backing_format),
            "`blockferry rebase` does that",
        ),
        (
            "data_file_raw",
            !said.data_file_raw || info.data_file_raw,
            "whatever was written without it may not be there",
        ),
    ];
    match kept.into_iter().find(|(name, is_as_it_is, _)| is_said(name) && !is_as_it_is) {
        Some((name, _, cure)) => {
            Err(format!("The option '{name}' of an image that is there cannot be changed here: {cure}"))
        }
        None => {
            wanted.data_file_not_raw = is_said("data_file_raw") && !said.data_file_raw;
            // Lazy reference counts go away with the version that has them.
            let to_v2 = wanted.compat == Some(Compat::V2);
            if to_v2 && wanted.lazy_refcounts == Some(true) {
                return Err("Lazy refcounts need compatibility level 1.1 or above (compat=1.1)".into());
            }
            Ok(wanted)
        }
    }
}
