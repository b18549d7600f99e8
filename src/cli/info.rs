//! `blockferry info`: what an image is, and whether it is complete.
//!
//! The JSON has the fields of `qemu-img info`, and some of our own: `driver`, `request-alignment`, `state` and `mark`.
//! Backing files are not opened, unless `--backing-chain` asks for them: each layer is looked at by itself.

use std::rc::Rc;

use clap::Args;
use serde_json::{Map, Value, json};

use super::exit::{Exit, Failure};
use super::image::{GateArgs, NamingArgs, ServerArgs, parse_format, state_dir};
use super::print;
use super::tool::{OutputArgs, human_size};
use super::{Global, config, snapshot, stats};
use crate::base::limits::{BACKING_CHAIN_MAX, SECTOR_BYTES};
use crate::base::process::Fate;
use crate::base::shown::shown;
use crate::block::Driver;
use crate::block::patience::for_job;
use crate::engine::marks::Marks;
use crate::engine::qcow2::{format, qcow2, recorded_format};
use crate::engine::{Engine, Format, ImageOptions, named};
use crate::format::qcow2::Info;
use crate::format::qcow2::gate::{Role, Wanted};
use crate::protocol::mark::{MarkInfo, MarkState, TargetMark};

/// Tell what an image is, and whether a copy to it was left incomplete
#[derive(Debug, Args)]
pub struct InfoArgs {
    /// The image
    #[arg(value_name = "IMAGE")]
    image: String,
    /// Its format, if it should not be guessed
    #[arg(short, long, value_name = "FORMAT", value_parser = parse_format)]
    format: Option<Format>,
    /// Tell of its backing files, too, from the top down
    #[arg(short, long)]
    backing_chain: bool,
    /// Open the image though others may be writing it (tools that only look never take locks)
    #[arg(short = 'U', long)]
    force_share: bool,
    /// Where unfinished targets that cannot carry a mark themselves were noted (as given to `mirror`)
    #[arg(long, value_name = "DIR", value_parser = crate::cli::image::path)]
    state_dir: Option<std::path::PathBuf>,
    #[command(flatten)]
    server: ServerArgs,
    #[command(flatten)]
    gate: GateArgs,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    naming: NamingArgs,
}

/// One layer.
struct Layer {
    name: String,
    driver: Rc<dyn Driver>,
    info: Option<Info>,
    mark: Option<MarkInfo>,
}

/// Runs the command.
pub fn main(global: &Global, mut args: InfoArgs) -> Result<Exit, Failure> {
    args.image = args.naming.read(&args.image, args.format)?;
    let engine = Rc::new(Engine::new(&config(global))?);
    let args = Rc::new(args);
    let (e, a) = (engine.clone(), args.clone());
    let layers = engine.run(for_job(async move { look(&e, &a).await }))?;
    let values: Vec<Value> = layers.iter().map(to_json).collect();
    let value = match args.backing_chain {
        true => Value::Array(values),
        false => values.into_iter().next().unwrap_or_default(),
    };
    if !args.output.print(global, &value) {
        let texts: Vec<String> = layers.iter().map(|layer| to_text(layer, args.backing_chain)).collect();
        print::write_product(&texts.join("\n"));
    }
    stats::print(global, engine.ring());
    Ok(Exit::Done)
}

/// The image, and the layers below it where they are asked for.
async fn look(engine: &Engine, args: &InfoArgs) -> Result<Vec<Layer>, Failure> {
    let marks = state_dir(args.state_dir.as_deref());
    let gate = args.gate.gate();
    let mut options = ImageOptions {
        format: args.format,
        warns_of_header: args.format == Some(Format::Raw),
        lock: false,
        gate: gate.clone(),
        // It tells of the mark itself, and a warning is a second pair of eyes for who reads only some lines.
        marks: Marks { state_dir: marks.clone(), ..args.gate.marks().warned() },
        no_backing: true,
        server: args.server.options(),
        ..ImageOptions::read_only()
    };
    let (mut name, mut layers) = (args.image.clone(), Vec::<Layer>::new());
    loop {
        let driver = engine.open(&name, &options).await?.driver().clone();
        let info = match qcow2(&driver) {
            Some(image) => Some(with_full_name(image.info().await?, &driver)),
            None => None,
        };
        let identity = driver.identity();
        if layers.len() > BACKING_CHAIN_MAX
            || layers.iter().any(|above| identity.is_some() && above.driver.identity() == identity)
        {
            return Err(Failure::text(format!(
                "The backing file '{name}' is in the chain of backing files twice"
            )));
        }
        let mark = TargetMark::read(engine.ring(), &driver, marks.as_deref()).await?;
        let below = info.as_ref().filter(|_| args.backing_chain).and_then(|info| {
            let backing = info.backing_filename.clone()?;
            Some((backing, info.backing_format.clone()))
        });
        let above = driver.name().to_owned();
        layers.push(Layer { name, driver, info, mark });
        let Some((backing, recorded)) = below else { return Ok(layers) };
        let wanted =
            Wanted { role: Role::Backing, name: &backing, format: None, image: &above, read_only: true };
        let named = named::followed(engine.ring(), &gate, &wanted).await;
        let named = named.map_err(|error| Failure::text(error.to_string()))?;
        name = named.name();
        options.format = recorded_format(named.format().or(recorded.as_deref()), &name)?;
    }
}

/// The name that the backing file would be opened by: none is open here.
fn with_full_name(mut info: Info, driver: &Rc<dyn Driver>) -> Info {
    if let (None, Some(name)) = (&info.full_backing_filename, &info.backing_filename) {
        // What leads nowhere is shown as it is written.
        let full = named::by_user(driver.name(), name).map_or_else(|_| name.clone(), |found| found.name());
        info.full_backing_filename = Some(full);
    }
    info
}

/// The driver at the bottom.
fn file_of(driver: &Rc<dyn Driver>) -> Rc<dyn Driver> {
    driver.children().first().map_or_else(|| driver.clone(), |child| child.node().driver().clone())
}

fn to_json(layer: &Layer) -> Value {
    let Layer { name, driver, info, mark } = layer;
    let file = file_of(driver);
    let mut value = json!({
        "children": [{
            "name": "file",
            "info": {
                "children": [],
                // QEMU counts files in sectors.
                "virtual-size": file.len().next_multiple_of(SECTOR_BYTES),
                "filename": name,
                "format": file.kind(),
                "actual-size": file.allocated_bytes(),
                "format-specific": {"type": "file", "data": {}},
                "dirty-flag": false,
            },
        }],
        "virtual-size": driver.len(),
        "filename": name,
        "format": format(driver).name(),
        "actual-size": file.allocated_bytes(),
        "dirty-flag": info.as_ref().is_some_and(|info| info.dirty),
        "driver": driver.kind(),
        "request-alignment": driver.limits().request_align,
        "state": mark.as_ref().map_or("unmarked", |mark| mark.kind().name()),
        "mark": mark.as_ref().map(mark_to_json),
    });
    if let (Some(info), Some(object)) = (info, value.as_object_mut()) {
        add_qcow2(object, info);
    }
    value
}

/// What a mark says, what has become of the process that has put it there, and whether it is about this disk for certain.
fn mark_to_json(mark: &MarkInfo) -> Value {
    let mut value = json!(mark);
    if let Some(object) = value.as_object_mut() {
        object.insert("certain".into(), (!mark.doubtful).into());
        let runs = mark.process.as_ref().map(|process| match process.fate() {
            Fate::Runs => "running",
            Fate::Ended => "ended",
            Fate::Unknown => "unknown",
        });
        object.insert("process-state".into(), runs.into());
    }
    value
}

/// The lines about a mark: what is so, since when, by whom, how far, and what to do.
fn mark_to_text(mark: &MarkInfo) -> Vec<String> {
    let kind = mark.kind();
    let mut lines = vec![match kind {
        MarkState::Superseded => format!("state: SUPERSEDED: clients have left this disk ({mark})"),
        MarkState::Partial => format!("state: PARTIAL: no copy ({mark})"),
        MarkState::Incomplete | MarkState::Unknown => {
            format!("state: INCOMPLETE: target of an unfinished copy ({mark})")
        }
    }];
    let runs = match &mark.process {
        Some(process) => {
            let text = match process.fate() {
                Fate::Runs => "which is running",
                Fate::Ended => "which has ended",
                Fate::Unknown => {
                    "of which nothing is known: the machine was started again since, or it was another one"
                }
            };
            lines.push(format!("    by: process {}, {text}", process.pid));
            process.fate() == Fate::Runs
        }
        None => false,
    };
    if mark.doubtful {
        lines
            .push("    certain: no: it was noted under this name, which may mean another disk by now".into());
    }
    let job = &mark.job;
    lines.push(match kind {
        MarkState::Superseded => "    what to do: use the other disk; to write this one all the same, say --allow-superseded".into(),
        MarkState::Partial => "    what to do: use it for what it is, or copy anew".into(),
        _ if runs => format!("    what to do: wait for the {job} to end"),
        _ => format!(
            "    what to do: run the {job} again, which takes this over and makes it complete; or remove it; or use it all the \
             same with --allow-incomplete"
        ),
    });
    lines
}

fn add_qcow2(object: &mut Map<String, Value>, info: &Info) {
    object.insert("cluster-size".into(), info.cluster_size.into());
    let mut set = |name: &str, text: &Option<String>| {
        if let Some(text) = text {
            object.insert(name.into(), text.as_str().into());
        }
    };
    set("backing-filename", &info.backing_filename);
    set("full-backing-filename", &info.full_backing_filename);
    set("backing-filename-format", &info.backing_format);
    if !info.snapshots.is_empty() {
        let list = info.snapshots.iter().map(snapshot::to_json).collect();
        object.insert("snapshots".into(), Value::Array(list));
    }
    let mut data = json!({
        "compat": info.compat.name(),
        "compression-type": info.compression_type.name(),
        "refcount-bits": info.refcount_bits,
    });
    if let Some(data) = data.as_object_mut() {
        // Version 2 knows nothing of these.
        if info.compat == crate::format::qcow2::Compat::V3 {
            data.insert("lazy-refcounts".into(), info.lazy_refcounts.into());
            data.insert("corrupt".into(), info.corrupt.into());
            data.insert("extended-l2".into(), info.extended_l2.into());
        }
        if info.has_data_file {
            if let Some(name) = &info.data_file {
                data.insert("data-file".into(), name.as_str().into());
            }
            data.insert("data-file-raw".into(), info.data_file_raw.into());
        }
        if !info.bitmaps.is_empty() {
            let list = info.bitmaps.iter().map(|bitmap| {
                let flags: Vec<&str> = [(bitmap.in_use, "in-use"), (bitmap.auto, "auto")]
                    .into_iter()
                    .filter_map(|(set, name)| set.then_some(name))
                    .collect();
                json!({"flags": flags, "name": bitmap.name, "granularity": bitmap.granularity})
            });
            data.insert("bitmaps".into(), list.collect::<Vec<_>>().into());
        }
    }
    object.insert("format-specific".into(), json!({"type": "qcow2", "data": data}));
}

fn to_text(layer: &Layer, chain: bool) -> String {
    let Layer { name, driver, info, mark } = layer;
    let file = file_of(driver);
    let mut lines = vec![
        format!("image: {}", shown(name)),
        format!("file format: {}", format(driver)),
        format!("virtual size: {} ({} bytes)", human_size(driver.len()), driver.len()),
    ];
    if let Some(allocated) = file.allocated_bytes() {
        lines.push(format!("disk size: {}", human_size(allocated)));
    }
    let bool_line = |name: &str, value: bool| format!("    {name}: {value}");
    if let Some(info) = info {
        if info.dirty {
            lines.push("cleanly shut down: no".into());
        }
        lines.push(format!("cluster_size: {}", info.cluster_size));
        if let Some(backing) = &info.backing_filename {
            let full = info.full_backing_filename.as_ref().filter(|full| *full != backing);
            let full = full.map_or_else(String::new, |full| format!(" (actual path: {})", shown(full)));
            lines.push(format!("backing file: {}{full}", shown(backing)));
        }
        if let Some(format) = &info.backing_format {
            lines.push(format!("backing file format: {}", shown(format)));
        }
        if !info.snapshots.is_empty() {
            lines.push(snapshot::table(&info.snapshots).trim_end().to_owned());
        }
        lines.push("Format specific information:".into());
        lines.push(format!("    compat: {}", info.compat.name()));
        lines.push(format!("    compression type: {}", info.compression_type.name()));
        if info.compat == crate::format::qcow2::Compat::V3 {
            lines.push(bool_line("lazy refcounts", info.lazy_refcounts));
        }
        lines.push(format!("    refcount bits: {}", info.refcount_bits));
        for bitmap in &info.bitmaps {
            lines.push(format!("    bitmap: {} (granularity {})", shown(&bitmap.name), bitmap.granularity));
        }
        if info.compat == crate::format::qcow2::Compat::V3 {
            lines.push(bool_line("corrupt", info.corrupt));
            lines.push(bool_line("extended l2", info.extended_l2));
        }
        if let Some(data_file) = &info.data_file {
            lines.push(format!("    data file: {}", shown(data_file)));
            lines.push(bool_line("data file raw", info.data_file_raw));
        }
    }
    if !chain || mark.is_some() {
        lines.push(format!("protocol: {}, alignment {} bytes", file.kind(), driver.limits().request_align));
        match mark {
            None => lines.push("state: no mark: not the target of an unfinished copy".into()),
            Some(mark) => lines.extend(mark_to_text(mark).iter().map(|line| shown(line).into_owned())),
        }
    }
    lines.join("\n") + "\n"
}
