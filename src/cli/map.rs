//! `blockferry map`: where the bytes of an image lie.

use std::rc::Rc;

use clap::Args;
use serde_json::{Value, json};

use super::exit::{Exit, Failure};
use super::image::{GateArgs, NamingArgs, ServerArgs, parse_format, size};
use super::print::{self, product};
use super::tool::{OutputArgs, read_options};
use super::{Global, config};
use crate::block::{BlockError, Driver, Extent};
use crate::engine::qcow2::qcow2;
use crate::engine::{Engine, Format, NodeSpec};
use crate::format::qcow2::MapExtent;

/// What QEMU counts in.
const SECTOR: u64 = 512;

/// Tell where the bytes of an image, and of its backing files, lie
#[derive(Debug, Args)]
pub struct MapArgs {
    /// The image
    #[arg(value_name = "FILE")]
    file: String,
    /// Its format, if its header should not be asked
    #[arg(short, long, value_name = "FORMAT", value_parser = parse_format)]
    format: Option<Format>,
    /// Begin at this offset of the disk
    #[arg(short, long, value_name = "OFFSET", value_parser = size, default_value = "0")]
    start_offset: u64,
    /// Tell of no more than so many bytes
    #[arg(short = 'l', long, value_name = "LENGTH", value_parser = size)]
    max_length: Option<u64>,
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

/// One line of the map.
#[derive(Clone, Debug)]
struct Line {
    start: u64,
    extent: MapExtent,
}

impl Line {
    /// Whether `next`, which begins where this one ends, is more of the same.
    fn goes_on_with(&self, next: &MapExtent) -> bool {
        let this = &self.extent;
        let offset = match (this.offset, next.offset) {
            (Some(offset), Some(next)) => offset + this.extent.len == next,
            (None, None) => true,
            _ => false,
        };
        let kind =
            |e: &MapExtent| (e.extent.depth, e.present, e.extent.zero, e.extent.allocated, e.compressed);
        offset && kind(this) == kind(next) && this.file == next.file
    }

    fn is_data(&self) -> bool {
        self.extent.extent.allocated && !self.extent.extent.zero
    }

    fn to_json(&self) -> Value {
        let e = &self.extent;
        let mut value = json!({
            "start": self.start,
            "length": e.extent.len,
            "depth": e.extent.depth,
            "present": e.present,
            "zero": e.extent.zero,
            "data": e.extent.allocated,
            "compressed": e.compressed,
        });
        if let (Some(offset), Some(object)) = (e.offset, value.as_object_mut()) {
            object.insert("offset".into(), offset.into());
        }
        value
    }
}

/// Runs the command.
pub fn main(global: &Global, mut args: MapArgs) -> Result<Exit, Failure> {
    args.file = args.naming.read(&args.file, args.format)?;
    let engine = Rc::new(Engine::new(&config(global))?);
    let args = Rc::new(args);
    let (e, a) = (engine.clone(), args.clone());
    let lines = engine.run(async move {
        let options = read_options(a.format, None, true, &a.server, &a.gate);
        let node = e.open(&a.file, &options).await?;
        // A raw disk may begin later than its file does.
        let begin = NodeSpec::parse(&a.file)?.window().map_or(0, |(offset, _)| offset);
        let mut lines = map(node.driver(), begin, a.start_offset, a.max_length).await?;
        add_rest_of_sector(&mut lines, node.driver(), &a, begin);
        Ok::<_, Failure>(lines)
    })?;
    if args.output.is_json(global) {
        // One extent a line, as qemu-img prints it.
        let list: Vec<String> = lines.iter().map(|line| line.to_json().to_string()).collect();
        print::has_ended();
        let between = if global.json { "," } else { ",\n" };
        print::write_product(&format!("[{}]\n", list.join(between)));
        return Ok(Exit::Done);
    }
    product!("{:<16}{:<16}{:<16}File", "Offset", "Length", "Mapped to");
    for Line { start, extent } in lines.iter().filter(|line| line.is_data()) {
        let (Some(offset), Some(file)) = (extent.offset, &extent.file) else {
            return Err(Failure::text(
                "The image has clusters that are compressed or stored elsewhere, which have no place of their own in \
                 a file: use --output=json",
            ));
        };
        let hex = |n: u64| if n == 0 { "0".to_owned() } else { format!("{n:#x}") };
        product!("{:<16}{:<16}{:<16}{file}", hex(*start), hex(extent.extent.len), hex(offset));
    }
    Ok(Exit::Done)
}

async fn map(
    driver: &Rc<dyn Driver>,
    begin: u64,
    start: u64,
    len: Option<u64>,
) -> Result<Vec<Line>, BlockError> {
    let disk = driver.len();
    let end = len.map_or(disk, |len| start.saturating_add(len)).min(disk);
    let mut lines: Vec<Line> = Vec::new();
    let (mut at, is_nbd) = (start, driver.kind() == "nbd");
    while at < end {
        let extent = match qcow2(driver) {
            Some(image) => present(driver, at, image.map(at, end - at).await?).await?,
            None => {
                let extent = driver.block_status(at, end - at).await?;
                MapExtent {
                    // Bytes that nobody says are zero are stored somewhere; of zeroes a server tells whether they are.
                    extent: Extent {
                        allocated: !extent.zero || is_nbd && extent.allocated,
                        depth: 0,
                        ..extent
                    },
                    present: true,
                    compressed: false,
                    offset: Some(begin + at),
                    file: Some(driver.name().to_owned()),
                }
            }
        };
        let len = extent.extent.len.clamp(1, end - at);
        match lines.last_mut() {
            Some(last) if last.goes_on_with(&extent) => last.extent.extent.len += len,
            _ => {
                let extent = MapExtent { extent: Extent { len, ..extent.extent }, ..extent };
                lines.push(Line { start: at, extent });
            }
        }
        at += len;
    }
    Ok(lines)
}

/// A disk may end within a sector. QEMU counts in whole ones, and its map goes on to the end of the last: what is behind the
/// disk's end reads as zeroes to it.
fn add_rest_of_sector(lines: &mut Vec<Line>, driver: &Rc<dyn Driver>, args: &MapArgs, begin: u64) {
    let (disk, start) = (driver.len(), args.start_offset);
    let end = args.max_length.map_or(u64::MAX, |len| start.saturating_add(len));
    let end = end.min(disk.next_multiple_of(SECTOR));
    let at = disk.max(start);
    if at >= end || qcow2(driver).is_some() {
        return;
    }
    let rest = MapExtent {
        extent: Extent { allocated: false, ..Extent::zero(end - at) },
        present: true,
        compressed: false,
        // A server has nothing there.
        offset: (driver.kind() != "nbd").then_some(begin + at),
        file: Some(driver.name().to_owned()),
    };
    match lines.last_mut() {
        Some(last) if last.goes_on_with(&rest) => last.extent.extent.len += end - at,
        _ => lines.push(Line { start: at, extent: rest }),
    }
}

/// What reads as zeroes because the backing file ends before it is not present, as QEMU sees it.
async fn present(driver: &Rc<dyn Driver>, at: u64, found: MapExtent) -> Result<MapExtent, BlockError> {
    let extent = found.extent;
    if extent.depth > 0 || extent.allocated || !extent.zero || !found.present {
        return Ok(found);
    }
    let status = driver.block_status(at, extent.len).await?;
    let extent = Extent { len: extent.len.min(status.len), ..extent };
    Ok(MapExtent { extent, present: status.allocated, ..found })
}
