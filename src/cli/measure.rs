//! `blockferry measure`: how large a new image would become.

use std::rc::Rc;

use clap::Args;
use serde_json::json;

use super::exit::{Exit, Failure};
use super::image::{GateArgs, NamingArgs, ServerArgs, parse_format, refused, size};
use super::print::product;
use super::tool::{OutputArgs, asks_for_help, option_pairs, print_options, read_options};
use super::{Global, config};
use crate::block::patience::for_job;
use crate::block::{BlockError, Driver};
use crate::engine::create::NewImage;
use crate::engine::qcow2::qcow2;
use crate::engine::{Engine, Format, ImageOptions};
use crate::format::qcow2::{Compat, Measured, Qcow2, WhichSnapshot};

/// What an image is called in errors that has no name yet.
const NEW_IMAGE: &str = "the new image";
/// Lengths of disks are multiples of this.
const SECTOR_BYTES: u64 = 512;

/// Tell how much room a copy of an image, or an empty image, would take in another format
#[derive(Debug, Args)]
pub struct MeasureArgs {
    /// The image to be copied
    #[arg(value_name = "FILE", required_unless_present = "size", conflicts_with = "size")]
    file: Option<String>,
    /// Bytes of a new, empty image
    #[arg(short, long, value_name = "SIZE", value_parser = size)]
    size: Option<u64>,
    /// Format of the image, if its header should not be asked
    #[arg(short, long, value_name = "FORMAT", value_parser = parse_format)]
    format: Option<Format>,
    /// The disk as this internal snapshot has it: its id or name, or snapshot.id=ID,snapshot.name=NAME
    #[arg(short = 'l', long, value_name = "SNAPSHOT", value_parser = WhichSnapshot::parse)]
    snapshot: Option<WhichSnapshot>,
    /// Format of the new image
    #[arg(short = 'O', long, value_name = "FORMAT", value_parser = parse_format, default_value = "raw")]
    target_format: Format,
    /// Options of the new image's format, as NAME=VALUE,NAME=VALUE
    #[arg(short = 'o', long, value_name = "OPTIONS")]
    target_options: Vec<String>,
    /// Open the image though others may be writing it (tools that only look never take locks)
    #[arg(short = 'U', long)]
    force_share: bool,
    #[command(flatten)]
    server: ServerArgs,
    #[command(flatten)]
    gate: GateArgs,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    naming: NamingArgs,
}

/// What was measured.
struct Sizes {
    measured: Measured,
    /// What the source's bitmaps would take in the new image, where both could have some.
    bitmaps: Option<u64>,
}

/// Runs the command.
pub fn main(global: &Global, mut args: MeasureArgs) -> Result<Exit, Failure> {
    if asks_for_help(&args.target_options)? {
        print_options(args.target_format, "Options for new images", NewImage::options(args.target_format));
        return Ok(Exit::Done);
    }
    if let Some(file) = &args.file {
        args.file = Some(args.naming.read(file, args.format)?);
    }
    let engine = Rc::new(Engine::new(&config(global))?);
    let args = Rc::new(args);
    let (e, a) = (engine.clone(), args.clone());
    let Sizes { measured, bitmaps } = engine.run(for_job(async move { measure(&e, &a).await }))?;
    let mut value = json!({"required": measured.required, "fully-allocated": measured.fully_allocated});
    if let (Some(bytes), Some(object)) = (bitmaps, value.as_object_mut()) {
        object.insert("bitmaps".into(), bytes.into());
    }
    if !args.output.print(global, &value) {
        product!("required size: {}", measured.required);
        product!("fully allocated size: {}", measured.fully_allocated);
        if let Some(bytes) = bitmaps {
            product!("bitmaps size: {bytes}");
        }
    }
    Ok(Exit::Done)
}

async fn measure(engine: &Engine, args: &MeasureArgs) -> Result<Sizes, Failure> {
    let source = match &args.file {
        Some(file) => {
            let options = read_options(args.format, None, true, &args.server, &args.gate);
            let options = ImageOptions { snapshot: args.snapshot.clone(), ..options };
            Some(engine.open(file, &options).await?)
        }
        None => None,
    };
    let len = source.as_ref().map_or(args.size, |source| Some(source.driver().len()));
    // The length of what is measured counts, and not one among the options.
    let mut pairs = option_pairs(&args.target_options)?;
    pairs.retain(|(name, _)| name != "size");
    let new = NewImage::parse(args.target_format, &pairs, len).map_err(Failure::usage)?;
    new.check(NEW_IMAGE).map_err(|error| refused("Such an image", error))?;
    let options = match new {
        NewImage::Raw { len, .. } => {
            let len = len.next_multiple_of(SECTOR_BYTES);
            let measured = Measured { required: len, fully_allocated: len };
            return Ok(Sizes { measured, bitmaps: None });
        }
        NewImage::Qcow2(options) => options,
    };
    let (mut clusters, mut bitmaps) = (None, None);
    if let Some(source) = &source {
        clusters = Some(data_clusters(source.driver(), options.cluster_size.into()).await?);
        if let Some(image) = qcow2(source.driver()) {
            let info = image.info().await?;
            // Bitmaps that nobody vouches for are not copied.
            let listed = if info.bitmaps_inconsistent { &[][..] } else { &info.bitmaps };
            if info.compat == Compat::V3 && options.compat == Compat::V3 {
                bitmaps = Some(Qcow2::measure_bitmaps(&options, listed));
            }
        }
    }
    Ok(Sizes { measured: Qcow2::measure(&options, clusters), bitmaps })
}

/// Clusters of this size in which not everything is zero for certain.
async fn data_clusters(disk: &Rc<dyn Driver>, cluster: u64) -> Result<u64, BlockError> {
    let (mut at, mut counted, mut next) = (0, 0, 0);
    while at < disk.len() {
        let left = disk.len() - at;
        let extent = disk.block_status(at, left).await?;
        let end = at + extent.len.clamp(1, left);
        if !extent.zero {
            let first = (at / cluster).max(next);
            next = end.div_ceil(cluster).max(next);
            counted += next - first.min(next);
        }
        at = end;
    }
    Ok(counted)
}
