//! `blockferry create`: makes an image.

use std::path::Path;
use std::rc::Rc;

use clap::Args;
use serde_json::json;

use super::exit::{Exit, Failure};
use super::image::{parse_format, size, state_dir};
use super::print::{self, note};
use super::target::{make_file, make_remote, try_length};
use super::tool::{
    OutputArgs, PlanArgs, asks_for_help, option_pairs, print_options, warn_of_name, with_code,
};
use super::{Global, config};
use crate::block::{Driver, Node, WriteFlags};
use crate::engine::admit::{Admission, Admitted, Held, IfThere, Standing, Wish, empty, is_place};
use crate::engine::create::{Beside, NewImage};
use crate::engine::marks::Marks;
use crate::engine::open::local_path;
use crate::engine::qcow2::{open_backing, recorded_format};
use crate::engine::remote::can_create;
use crate::engine::{Engine, Format, ImageOptions, named};
use crate::format::qcow2::gate::GateError;
use crate::format::qcow2::{Gate, Role, Wanted};
use crate::protocol::mark::{MarkInfo, TargetMark};

/// What a raw image is given.
const FIRST_BLOCK_BYTES: u64 = 4096;

/// Make a new image
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Where
    #[arg(value_name = "FILE", default_value = "", hide_default_value = true)]
    file: String,
    /// How large, such as 20G; not needed with a backing file
    #[arg(value_name = "SIZE", value_parser = size)]
    size: Option<u64>,
    /// Its format
    #[arg(short, long, value_name = "FORMAT", value_parser = parse_format, default_value = "raw")]
    format: Format,
    /// Options of the format, as NAME=VALUE,NAME=VALUE (may be said more than once); `-o help` lists them
    #[arg(short, long, value_name = "OPTIONS")]
    options: Vec<String>,
    /// The image shows this one where nothing is written to it; relative names are relative to the new image
    #[arg(short, long, value_name = "BACKING_FILE")]
    backing: Option<String>,
    /// Format of the backing file; has to be said
    #[arg(short = 'F', long, value_name = "FORMAT", value_parser = parse_format)]
    backing_format: Option<Format>,
    /// Do not open the backing file: a size has to be said then
    #[arg(short = 'u', long = "unsafe", visible_alias = "backing-unsafe")]
    no_open: bool,
    /// Make an existing file anew; what is in it is lost
    #[arg(long)]
    force: bool,
    /// Take a backing file that a job has left incomplete
    #[arg(long)]
    allow_incomplete: bool,
    /// No output but errors
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    plan: PlanArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// Runs the command.
pub fn main(global: &Global, args: CreateArgs) -> Result<Exit, Failure> {
    if asks_for_help(&args.options)? {
        print_options(args.format, "Options for new images", NewImage::options(args.format));
        return Ok(Exit::Done);
    }
    if args.file.is_empty() {
        return with_code(global, 2, Err(Failure::text("Say where the image is to be made")));
    }
    let engine = Rc::new(Engine::new(&config(global))?);
    let can_be_made = can_create(&args.file) || is_place(engine.ring(), &args.file);
    if local_path(&args.file).is_none() && !can_be_made {
        let text = "is neither on this machine nor on a server on which images can be made";
        return Err(Failure::text(format!("'{}' {text}", args.file)));
    }
    let mut pairs = option_pairs(&args.options)?;
    add_backing(&mut pairs, args.backing.as_deref(), args.backing_format);
    let args = Rc::new(args);
    let (e, a) = (engine.clone(), args.clone());
    let g = global.clone();
    let Some(new) = engine.run(async move { create(&g, &e, &a, &pairs).await })? else {
        return Ok(Exit::Done);
    };
    let value = json!({
        "filename": args.file, "format": new.format().name(), "virtual-size": new.len(),
    });
    if !args.output.note(global, &value) && !args.quiet {
        note!("Formatting '{}', fmt={} size={}", args.file, new.format(), new.len());
    }
    Ok(Exit::Done)
}

/// What marks mean for a backing file.
fn marks(args: &CreateArgs) -> Marks {
    Marks { allow_incomplete: args.allow_incomplete, state_dir: state_dir(None), ..Marks::default() }
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

/// The backing file that the options name, which has to be one that can be opened, and of a format that is said: the
/// image will record it, and nobody will have to guess.
pub async fn open_new_backing(
    engine: &Engine,
    image: &str,
    pairs: &[(String, String)],
    marks: Marks,
) -> Result<Option<Rc<Node>>, Failure> {
    let Some(name) = last(pairs, "backing_file") else { return Ok(None) };
    let Some(format) = last(pairs, "backing_fmt") else {
        return Err(Failure::usage(format!(
            "The format of the backing file '{name}' has to be said (-F FORMAT, or backing_fmt in -o)"
        )));
    };
    let format = recorded_format(Some(format), name)?;
    let options = ImageOptions { marks, ..ImageOptions::read_only() };
    Ok(Some(open_backing(engine.ring(), image, name, format, &options).await?))
}

/// An image may name any file, but not every file is opened for it: who makes one that needs a word is told at once, quiet or
/// not, because the next command will fail.
pub async fn warn_of_refusal(engine: &Engine, image: &str, backing: Option<&str>) {
    let Some(name) = backing.filter(|name| !name.is_empty()) else { return };
    let wanted = Wanted { role: Role::Backing, name, format: None, image, read_only: true };
    match named::followed(engine.ring(), &Gate::default(), &wanted).await {
        Ok(_) => {}
        Err(error @ (GateError::Outside(_) | GateError::Server(_))) => {
            let error = error.to_string();
            print::warning(&format!(
                "'{image}' will be opened with an option only. {}",
                error.trim_end_matches('.')
            ));
        }
        Err(error) => {
            let error = error.to_string();
            print::warning(&format!(
                "'{image}' will not be opened by Blockferry. {}",
                error.trim_end_matches('.')
            ));
        }
    }
}

/// The value of an option; what is said later counts.
fn last<'a>(pairs: &'a [(String, String)], name: &str) -> Option<&'a str> {
    pairs.iter().rev().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
}

/// Gives a raw image its first block, as `qemu-img` does: of a file without any, nobody can find out which alignment reads
/// past the page cache need.
async fn first_block(engine: &Engine, file: &Rc<dyn Driver>, new: &NewImage) -> Result<(), Failure> {
    if !matches!(new, NewImage::Raw { .. }) || file.kind() != "file" || file.len() < FIRST_BLOCK_BYTES {
        return Ok(());
    }
    let mut zeroes = engine.ring().alloc(FIRST_BLOCK_BYTES as usize).await;
    zeroes.fill_zero();
    file.write(0, zeroes.freeze(), WriteFlags::default()).await?;
    Ok(file.flush().await?)
}

/// Makes it; `None`: it was a dry run.
async fn create(
    global: &Global,
    engine: &Engine,
    args: &CreateArgs,
    pairs: &[(String, String)],
) -> Result<Option<NewImage>, Failure> {
    let mut admission = Admission::new(engine.ring(), "create");
    let mut size = args.size;
    if !args.no_open {
        if let Some(backing) = open_new_backing(engine, &args.file, pairs, marks(args)).await? {
            admission.reads("new backing file", backing.driver()).await;
            size = size.or(Some(backing.len()));
        }
    } else if let Some(name) = last(pairs, "backing_file") {
        admission.keeps(&args.file, name).await;
    }
    if args.size.is_some() && last(pairs, "size").is_some() {
        return Err(Failure::usage("The size of the image is said twice: say it once"));
    }
    let new = NewImage::parse(args.format, pairs, size).map_err(Failure::usage)?;
    let if_there = if args.force { IfThere::Remake } else { IfThere::Refuse };
    let image = ImageOptions { format: Some(args.format), ..ImageOptions::default() }.overwriting();
    admission.target(&Wish { if_there, ..Wish::new(&args.file, image, &new) }).await;
    let (plan, admitted) = admission.judge();
    let backing = last(pairs, "backing_file");
    if args.plan.ends(global, &plan)? {
        return Ok(None);
    }
    warn_of_name(&args.file, args.format);
    warn_of_refusal(engine, &args.file, backing).await;
    let Admitted { target, data_file, mode, .. } = admitted;
    let beside = Beside { data_file: data_file.as_ref().map(Held::bytes), mode: Some(mode) };
    let path = local_path(&args.file);
    match (target, &path) {
        (Some(Standing::Anew(held) | Standing::AsItIs(held)), _) => {
            try_length(held.bytes(), &new).await?;
            empty(held.bytes()).await?;
            let path = path.as_deref().unwrap_or(Path::new(""));
            new.write(engine.ring(), held.bytes(), path, &beside).await?;
            first_block(engine, held.bytes().driver(), &new).await?;
            // What a mark said of the image that was here is not true of this one.
            let no_mark = MarkInfo::incomplete("create", &args.file);
            TargetMark::new(engine.ring(), held.bytes().driver().clone(), state_dir(None), no_mark)
                .clear()
                .await?;
        }
        (_, Some(path)) => {
            let last = async |file: &Rc<dyn Driver>| first_block(engine, file, &new).await;
            make_file(engine, path, &new, &beside, last).await?
        }
        (_, None) => make_remote(engine, &args.file, &new).await?,
    }
    Ok(Some(new))
}
