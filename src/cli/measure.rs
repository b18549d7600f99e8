//! `blockferry measure`: how large a new image would become.

use std::rc::Rc;

use clap::Args;
use serde_json::json;

use super::exit::{Exit, Failure};
use super::image::{GateArgs, ServerArgs, parse_format, size};
use super::print::product;
use super::tool::{OutputArgs, option_pairs, read_options};
use super::{Global, config};
use crate::block::patience::for_job;
use crate::block::{BlockError, Driver};
use crate::engine::create::NewImage;
use crate::engine::qcow2::qcow2;
use crate::engine::{Engine, Format};
use crate::format::qcow2::{Compat, Measured, Qcow2};

/// Tell how much room a copy of an image, or an empty image, would take in another format
#[derive(Debug, Args)]
pub struct MeasureArgs {
    /// The image to be copied
    #[arg(value_name = "FILE", required_unless_present = "size", conflicts_with = "size")]
    file: Option<String>,
    /// Bytes of a new, empty image
    #[arg(long, value_name = "SIZE", value_parser = size)]
    size: Option<u64>,
    /// Format of the image, if its header should not be asked
    #[arg(short, long, value_name = "FORMAT", value_parser = parse_format)]
    format: Option<Format>,
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
}

/// What was measured.
struct Sizes {
    measured: Measured,
    /// What the source's bitmaps would take in the new image, where both could have some.
    bitmaps: Option<u64>,
}

/// Runs the command.
pub fn main(global: &Global, args: MeasureArgs) -> Result<Exit, Failure> {
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
            Some(engine.open(file, &options).await?)
        }
        None => None,
    };
    let len = source.as_ref().map_or(args.size, |source| Some(source.driver().len()));
    let pairs = option_pairs(&args.target_options)?;
    let new = NewImage::parse(args.target_format, &pairs, len).map_err(Failure::text)?;
    let options = match new {
        NewImage::Raw { len, .. } => {
            let measured = Measured { required: len, fully_allocated: len };
            return Ok(Sizes { measured, bitmaps: None });
        }
        NewImage::Qcow2(options) => options,
    };
    options.check(args.file.as_deref().unwrap_or("the new image"))?;
    let cluster = u64::from(options.cluster_size);
    let (mut clusters, mut bitmaps) = (0, None);
    if let Some(source) = &source {
        clusters = data_clusters(source.driver(), cluster).await?;
        if let Some(image) = qcow2(source.driver()) {
            let info = image.info().await?;
            let both = info.compat == Compat::V3 && options.compat == Compat::V3;
            // What bitmaps would take is not told where there are some.
            bitmaps = (both && info.bitmaps.is_empty()).then_some(0);
        }
    }
    let all = Qcow2::measure(&options, clusters);
    // As QEMU counts: the tables are those of a full disk, whatever it holds now.
    let tables = all.fully_allocated - options.size.next_multiple_of(cluster).min(all.fully_allocated);
    let measured = Measured { required: tables + clusters * cluster, ..all };
    Ok(Sizes { measured, bitmaps })
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
