//! `blockferry create`: makes an image.

use std::path::Path;
use std::rc::Rc;

use clap::Args;
use serde_json::json;

use super::exit::{Exit, Failure};
use super::image::{parse_format, size};
use super::target::make_file;
use super::tool::{OutputArgs, option_pairs};
use super::{Global, config};
use crate::engine::create::NewImage;
use crate::engine::open::local_path;
use crate::engine::{Engine, Format, ImageOptions};
use crate::graph::node::UseKind;

/// Make a new image
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Where
    #[arg(value_name = "FILE")]
    file: String,
    /// How large, such as 20G; not needed with a backing file
    #[arg(value_name = "SIZE", value_parser = size)]
    size: Option<u64>,
    /// Its format
    #[arg(short, long, value_name = "FORMAT", value_parser = parse_format, default_value = "raw")]
    format: Format,
    /// Options of the format, as NAME=VALUE,NAME=VALUE (may be said more than once)
    #[arg(short, long, value_name = "OPTIONS")]
    options: Vec<String>,
    /// Make an existing file anew; what is in it is lost
    #[arg(long)]
    force: bool,
    /// No output but errors
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    output: OutputArgs,
}

/// Runs the command.
pub fn main(global: &Global, args: CreateArgs) -> Result<Exit, Failure> {
    let engine = Rc::new(Engine::new(&config(global))?);
    let pairs = option_pairs(&args.options)?;
    let new = NewImage::parse(args.format, &pairs, args.size).map_err(Failure::text)?;
    let Some(path) = local_path(&args.file) else {
        return Err(Failure::text(format!("'{}' is not a file on this machine", args.file)));
    };
    let (e, image, force) = (engine.clone(), new.clone(), args.force);
    engine.run(async move { create(&e, &path, &image, force).await })?;
    let value = json!({
        "filename": args.file, "format": new.format().name(), "virtual-size": new.len(),
    });
    if !args.output.print(global, &value) && !args.quiet {
        println!("Formatting '{}', fmt={} size={}", args.file, new.format(), new.len());
    }
    Ok(Exit::Done)
}

async fn create(engine: &Engine, path: &Path, new: &NewImage, force: bool) -> Result<(), Failure> {
    if force && matches!(engine.ring().lookup(path), Ok(Some(_))) {
        let file = engine.open(&format!("file:{}", path.display()), &ImageOptions::raw()).await?;
        let _lock = file.attach(UseKind::JobTarget("create"))?;
        file.driver().set_len(0).await?;
        return Ok(new.write(engine.ring(), file.driver()).await?);
    }
    make_file(engine, path, new, async |_| Ok(())).await
}
