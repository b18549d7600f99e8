//! `blockferry measure`: how large a new image would become.

use std::rc::Rc;

use clap::Args;
use serde_json::json;

use super::exit::{Exit, Failure};
use super::image::{GateArgs, parse_format, size};
use super::tool::{OutputArgs, option_pairs, read_options};
use super::{Global, config};
use crate::block::{BlockError, Driver};
use crate::engine::create::NewImage;
use crate::engine::{Engine, Format};
use crate::format::qcow2::{Measured, Qcow2};

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
    gate: GateArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// Runs the command.
pub fn main(global: &Global, args: MeasureArgs) -> Result<Exit, Failure> {
    let engine = Rc::new(Engine::new(&config(global))?);
    let args = Rc::new(args);
    let (e, a) = (engine.clone(), args.clone());
    let measured = engine.run(async move { measure(&e, &a).await })?;
    let value = json!({"required": measured.required, "fully-allocated": measured.fully_allocated});
    if !args.output.print(global, &value) {
        println!("required size: {}", measured.required);
        println!("fully allocated size: {}", measured.fully_allocated);
    }
    Ok(Exit::Done)
}

async fn measure(engine: &Engine, args: &MeasureArgs) -> Result<Measured, Failure> {
    let source = match &args.file {
        Some(file) => {
            let options = read_options(args.format, None, true, &args.gate);
            Some(engine.open(file, &options).await?)
        }
        None => None,
    };
    let len = source.as_ref().map_or(args.size, |source| Some(source.driver().len()));
    let pairs = option_pairs(&args.target_options)?;
    let new = NewImage::parse(args.target_format, &pairs, len).map_err(Failure::text)?;
    match new {
        NewImage::Raw { len, .. } => Ok(Measured { required: len, fully_allocated: len }),
        NewImage::Qcow2(options) => {
            options.check(args.file.as_deref().unwrap_or("the new image"))?;
            let clusters = match &source {
                Some(source) => data_clusters(source.driver(), options.cluster_size.into()).await?,
                None => 0,
            };
            Ok(Qcow2::measure(&options, clusters))
        }
    }
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
