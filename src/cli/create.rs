//! `blockferry create`: makes an image.

use std::path::Path;
use std::rc::Rc;

use clap::Args;
use serde_json::json;

use super::exit::{Exit, Failure};
use super::image::{parse_format, size};
use super::target::{create_remote, make_file};
use super::tool::{OutputArgs, option_pairs};
use super::{Global, config};
use crate::engine::create::NewImage;
use crate::engine::open::local_path;
use crate::engine::qcow2::{open_backing, recorded_format};
use crate::engine::remote::can_create;
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
    /// The image shows this one where nothing is written to it; relative names are relative to the new image
    #[arg(short, long, value_name = "BACKING_FILE")]
    backing: Option<String>,
    /// Format of the backing file; has to be said
    #[arg(short = 'F', long, value_name = "FORMAT", requires = "backing", value_parser = parse_format)]
    backing_format: Option<Format>,
    /// Do not open the backing file: a size has to be said then
    #[arg(short = 'u', long = "unsafe")]
    no_open: bool,
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
    let path = local_path(&args.file);
    if path.is_none() && !can_create(&args.file) {
        let text = "is neither a file on this machine nor one on a server on which files can be made";
        return Err(Failure::text(format!("'{}' {text}", args.file)));
    }
    let mut pairs = option_pairs(&args.options)?;
    add_backing(&mut pairs, args.backing.as_deref(), args.backing_format);
    let args = Rc::new(args);
    let (e, a) = (engine.clone(), args.clone());
    let new = engine.run(async move {
        let size = match a.size {
            None if !a.no_open => backing_len(&e, &a.file, &pairs).await?,
            size => size,
        };
        let new = NewImage::parse(a.format, &pairs, size).map_err(Failure::text)?;
        if new.has_backing() && !a.no_open {
            backing_len(&e, &a.file, &pairs).await?;
        }
        match &path {
            Some(path) => create(&e, path, &new, a.force).await?,
            None => create_remote(&e, &a.file, &new, a.force).await?,
        }
        Ok::<_, Failure>(new)
    })?;
    let value = json!({
        "filename": args.file, "format": new.format().name(), "virtual-size": new.len(),
    });
    if !args.output.print(global, &value) && !args.quiet {
        println!("Formatting '{}', fmt={} size={}", args.file, new.format(), new.len());
    }
    Ok(Exit::Done)
}

/// Says a backing file by way of the format's own options.
pub fn add_backing(pairs: &mut Vec<(String, String)>, name: Option<&str>, format: Option<Format>) {
    if let Some(name) = name {
        pairs.push(("backing_file".into(), name.into()));
    }
    if let Some(format) = format {
        pairs.push(("backing_fmt".into(), format.name().into()));
    }
}

/// Bytes of the backing file that the options name, which has to be one that can be opened, and of a format that is
/// said: the image will record it, and nobody will have to guess.
pub async fn backing_len(
    engine: &Engine,
    image: &str,
    pairs: &[(String, String)],
) -> Result<Option<u64>, Failure> {
    let last = |name: &str| pairs.iter().rev().find(|(n, _)| n == name).map(|(_, value)| value.as_str());
    let Some(name) = last("backing_file") else { return Ok(None) };
    let Some(format) = last("backing_fmt") else {
        return Err(Failure::text(format!(
            "The format of the backing file '{name}' has to be said (-F FORMAT, or backing_fmt in -o)"
        )));
    };
    let format = recorded_format(Some(format), name)?;
    let options = ImageOptions::read_only();
    let backing = open_backing(engine.ring(), image, name, format, &options).await?;
    Ok(Some(backing.len()))
}

async fn create(engine: &Engine, path: &Path, new: &NewImage, force: bool) -> Result<(), Failure> {
    if force && matches!(engine.ring().lookup(path), Ok(Some(_))) {
        let file = engine.open(&format!("file:{}", path.display()), &ImageOptions::raw()).await?;
        let _lock = file.attach(UseKind::JobTarget("create"))?;
        file.driver().set_len(0).await?;
        return Ok(new.write(engine.ring(), file.driver(), path).await?);
    }
    make_file(engine, path, new, async |_| Ok(())).await
}
