//! `blockferry bench`: an honest load on a disk, or a check of what a load left behind.
//!
//! It is a process of its own, so that what it measures shares neither its threads nor its clock with what is measured,
//! and it reports what went wrong before what went fast. The engine is [`load`]; here are the command's words, its
//! files, and the line on the terminal.

pub mod ack_log;
pub mod check;
pub mod load;
pub mod model;
pub mod pattern;
pub mod report;
pub mod schedule;
pub mod target;

use std::cell::Cell;
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use blockferry_ring::Ring;
use clap::{Args, ValueEnum};
use serde_json::json;

use super::exit::{Exit, Failure};
use super::image::{OpenArgs, duration, failed, parse_format, size};
use super::print::{self, product, say};
use super::service::at_once;
use super::signals::{Signals, begin};
use super::tool::PlanArgs;
use super::{Global, config, stats};
use crate::base::latency::to_log;
use crate::base::range::ByteRange;
use crate::base::secret::without_secrets;
use crate::base::shown::plain;
use crate::base::units::{NS_PER_SEC, fmt_bytes, fmt_duration, parse_size};
use crate::engine::admit::{Act, Admission, Plan, Refusal};
use crate::engine::open::{is_memory, local_path, open, said_by_header};
use crate::engine::remote::nbd_disk;
use crate::engine::{Format, ImageOptions};
use crate::graph::node::Role;
use ack_log::AckLog;
use check::{CheckReport, Expectation, check_on};
use load::{DEPTH_MAX, LoadConfig, LoadControl, LoadError, LoadOutcome, LoadProgress, check, run_on};
use model::Survival;
use schedule::{Access, Pace};
use target::{Target, TargetOptions};

/// How long a load runs when nothing else ends it.
const DURATION_NS: u64 = 10 * NS_PER_SEC;
/// How often the line on the terminal changes.
const LOOK_NS: u64 = NS_PER_SEC;
/// Places that are looked at to tell how much of a disk is holes.
const HOLES_LOOKED_FOR: u64 = 256;
/// Requests in flight at most of a load with a rate, if nothing else is said.
const RATE_DEPTH: usize = 256;

const AFTER: &str = "\
Examples:
  Random reads, one at a time, for ten seconds; nothing is written:
      blockferry bench nbd://127.0.0.1/disk

  As a busy guest would, at 5,000 requests a second whatever the disk does, so that stalls are seen
  (writes destroy what is on the disk, so that takes a word):
      blockferry bench --overwrite --rate 5000 --read-percent 70 --duration 1m nbd://127.0.0.1/disk

  Write for a while, check every read and everything at the end:
      blockferry bench --overwrite --verify --depth 16 'nbd+unix:///disk?socket=/run/disk.sock'

  Keep a log of what was acknowledged; later, check a copy of the disk against it:
      blockferry bench --overwrite --log acks.json --until-signal nbd://127.0.0.1/disk
      blockferry bench --check-log acks.json copy.img

With --rate, a latency counts from the moment at which the request was due, not from when it could at last
be sent: a disk that stalls for a second delays all that falls due in it, and the percentiles say so.

Exit code 1 means that requests failed, 4 that something was read that should not be there.";

/// Put a load on a disk, measure it, and verify what it stored
#[derive(Clone, Debug, Args)]
#[command(after_help = AFTER)]
pub struct BenchArgs {
    /// The disk: an NBD URI, a file, a block device, mem:SIZE or null:SIZE
    #[arg(value_name = "TARGET")]
    target: String,

    /// Requests in flight: the next one starts when one has ended [default: 1; with --rate at most 256]
    #[arg(short = 'd', long, value_name = "N", value_parser = depth, help_heading = "Load")]
    depth: Option<usize>,
    /// Requests a second, due at fixed distances however the disk is doing
    #[arg(short = 'r', long, value_name = "IOPS", help_heading = "Load",
        value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    rate: Option<u64>,
    /// With --rate: due at random moments (a Poisson process), as from many independent users
    #[arg(long, requires = "rate", help_heading = "Load")]
    poisson: bool,
    /// Bytes of a request: a multiple of 512, at most 1MiB
    #[arg(short = 'b', long, value_name = "SIZE", value_parser = block_bytes, default_value = "4KiB",
        help_heading = "Load")]
    block_size: u32,
    /// Write to the disk: what is on it is lost. Without this the load only reads (memory holds nothing that could be
    /// lost: mem: and null: may be written without)
    #[arg(long, help_heading = "Load")]
    overwrite: bool,
    /// Reads among 100 requests; the others write [default: 100; with --overwrite 0]
    #[arg(short = 'p', long, value_name = "PERCENT", help_heading = "Load",
        value_parser = clap::value_parser!(u8).range(0..=100))]
    read_percent: Option<u8>,
    /// Which block is next
    #[arg(long, value_enum, default_value_t = Pattern::Random, help_heading = "Load")]
    pattern: Pattern,
    /// Use this part of the disk only, such as 1GiB+256MiB (offset and length) [default: all of it]
    #[arg(long, value_name = "OFFSET+LEN", value_parser = range, help_heading = "Load")]
    range: Option<ByteRange>,
    /// Connections to an NBD server, among which requests take turns
    #[arg(short = 'c', long, value_name = "N", default_value_t = 1, help_heading = "Load",
        value_parser = clap::value_parser!(u16).range(1..=64))]
    connections: u16,
    /// Have every write be durable when it is acknowledged
    #[arg(long, help_heading = "Load")]
    fua: bool,
    /// Flush after every so many writes
    #[arg(long, value_name = "N", help_heading = "Load", value_parser = clap::value_parser!(u64).range(1..))]
    flush_every: Option<u64>,
    /// Repeat the load of this seed. On a disk that has seen it before, --verify sees less [default: a new one]
    #[arg(long, value_name = "N", help_heading = "Load")]
    seed: Option<u64>,

    /// End after this time, such as 30s [default: 10s, if nothing else ends it]
    #[arg(short = 't', long, value_name = "TIME", value_parser = duration, help_heading = "End")]
    duration: Option<u64>,
    /// End after so many requests
    #[arg(short = 'n', long, value_name = "N", help_heading = "End", value_parser = clap::value_parser!(u64).range(1..))]
    operations: Option<u64>,
    /// Run until SIGINT or SIGTERM (which end every load politely: it reports what it has)
    #[arg(long, help_heading = "End")]
    until_signal: bool,

    /// Check every read against what was written, and read everything back at the end
    #[arg(long, help_heading = "Truth")]
    verify: bool,
    /// Log which writes were acknowledged, for a later --check-log
    #[arg(long, value_name = "FILE", help_heading = "Truth", value_parser = crate::cli::image::path)]
    log: Option<PathBuf>,
    /// No load: check that the disk holds what this log says was acknowledged
    #[arg(long, value_name = "FILE", conflicts_with_all = LOAD_ONLY, help_heading = "Truth", value_parser = crate::cli::image::path)]
    check_log: Option<PathBuf>,
    /// With --check-log: the disk lost its caches, so only what was flushed must be there
    #[arg(long, requires = "check_log", help_heading = "Truth")]
    after_power_cut: bool,

    /// Save the latencies here, in nanoseconds, as an HDR histogram log: a line of text each for reads, writes, and
    /// requests that were never sent
    #[arg(long, value_name = "FILE", conflicts_with = "check_log", help_heading = "Output", value_parser = crate::cli::image::path)]
    histogram: Option<PathBuf>,
    /// No line with the progress
    #[arg(short, long, help_heading = "Output")]
    quiet: bool,

    /// Format of an image (not of an NBD export) [default: what its header says, or raw]
    #[arg(short = 'f', long, value_name = "FORMAT", value_parser = parse_format)]
    format: Option<Format>,
    #[command(flatten)]
    open: OpenArgs,
    #[command(flatten)]
    plan: PlanArgs,
}

/// Options that say nothing where there is no load.
const LOAD_ONLY: [&str; 14] = [
    "depth",
    "rate",
    "overwrite",
    "read_percent",
    "pattern",
    "range",
    "fua",
    "flush_every",
    "seed",
    "duration",
    "operations",
    "until_signal",
    "verify",
    "log",
];

/// Which block is next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Pattern {
    /// Any block, all alike
    Random,
    /// One after the other, from the start again at the end
    Sequential,
}

fn depth(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(depth) if (1..=DEPTH_MAX).contains(&depth) => Ok(depth),
        _ => Err(format!("a depth is a number from 1 to {DEPTH_MAX}")),
    }
}

fn block_bytes(text: &str) -> Result<u32, String> {
    let bytes = size(text)?;
    let good = bytes > 0 && bytes.is_multiple_of(512) && bytes <= load::BLOCK_BYTES_MAX.into();
    u32::try_from(bytes).ok().filter(|_| good).ok_or_else(|| {
        format!("a block is a multiple of 512 bytes, at most {}", fmt_bytes(load::BLOCK_BYTES_MAX.into()))
    })
}

fn range(text: &str) -> Result<ByteRange, String> {
    let (offset, len) =
        text.split_once('+').ok_or("a range is an offset and a length, such as 1GiB+256MiB")?;
    let size = |text: &str| parse_size(text).map_err(|error| error.to_string());
    ByteRange::at(size(offset)?, size(len)?).map_err(|error| error.to_string())
}

impl BenchArgs {
    fn config(&self) -> LoadConfig {
        let pace = match self.rate {
            Some(rate_per_sec) => Pace::Open {
                rate_per_sec,
                poisson: self.poisson,
                depth_max: self.depth.unwrap_or(RATE_DEPTH),
            },
            None => Pace::Closed { depth: self.depth.unwrap_or(1) },
        };
        let ends = self.duration.is_some() || self.operations.is_some() || self.until_signal;
        LoadConfig {
            block_bytes: self.block_size,
            range: self.range,
            access: match self.pattern {
                Pattern::Random => Access::Random,
                Pattern::Sequential => Access::Sequential,
            },
            read_percent: self.reads_of_hundred(),
            pace,
            duration_ns: self.duration.or((!ends).then_some(DURATION_NS)),
            operations: self.operations,
            seed: self.seed,
            verify: self.verify,
            fua: self.fua,
            flush_every: self.flush_every,
        }
    }

    /// What a disk of memory holds nobody can lose, and it holds nothing before it is written.
    fn may_write(&self) -> bool {
        self.overwrite || is_memory(&self.target)
    }

    fn reads_of_hundred(&self) -> u8 {
        let nothing_to_read =
            self.overwrite || is_memory(&self.target) && (self.verify || self.log.is_some());
        self.read_percent.unwrap_or(if nothing_to_read { 0 } else { 100 })
    }

    fn writes(&self) -> bool {
        self.check_log.is_none() && self.reads_of_hundred() < 100
    }

    /// A load that writes, or that is to know what was written, destroys what is there: that takes a word.
    fn without_a_word(&self) -> Option<Refusal> {
        let wants_writes = self.writes() || self.verify || self.log.is_some();
        (wants_writes && !self.may_write()).then(|| {
            let what = match (self.writes(), self.verify) {
                (true, _) => "this load writes",
                (false, true) => "--verify takes a load that writes",
                (false, false) => "--log takes a load that writes",
            };
            Refusal::Said(format!(
                "'{}' is left alone: {what}, and what is there would be lost. Say --overwrite if that is meant",
                self.target
            ))
        })
    }

    fn target_options(&self, format: Format) -> TargetOptions {
        TargetOptions {
            connections: self.connections.into(),
            verified: self.verify || self.log.is_some() || self.check_log.is_some(),
            image: self.open.image(Some(format), !self.writes()),
        }
    }

    /// The format that was said, or what the header of an image says. Whoever puts a load on a raw disk has said that
    /// nothing of it is needed, so none is guessed to anybody's harm.
    async fn format(&self, ring: &Ring) -> Result<Format, Failure> {
        if let Some(format) = self.format {
            return Ok(format);
        }
        if is_memory(&self.target) || nbd_disk(&self.target).is_some() {
            return Ok(Format::Raw);
        }
        let look = ImageOptions { lock: false, ..self.open.image(None, true) };
        Ok(said_by_header(ring, &self.target, &look).await?)
    }
}

/// Runs the command.
pub fn main(global: &Global, args: &BenchArgs) -> Result<Exit, Failure> {
    let ring = Ring::new(&config(global))?;
    let result = match &args.check_log {
        Some(log) => check_main(global, args, &ring, log),
        None => load_main(global, args, &ring),
    };
    stats::print(global, &ring);
    // What cannot be ended is leaked, and logged by the ring.
    let _ = ring.shutdown(NS_PER_SEC);
    result
}

fn check_main(global: &Global, args: &BenchArgs, ring: &Ring, path: &Path) -> Result<Exit, Failure> {
    let survival = if args.after_power_cut { Survival::PowerCut } else { Survival::Everything };
    let log = AckLog::load(path, survival).map_err(failed)?;
    let expectation = Expectation::of_log(&log);
    let options = args.target_options(format_of(args, ring)?);
    let (handle, name) = (ring.clone(), args.target.clone());
    let report = ring.block_on(async move {
        let target = Target::open(&handle, &name, &options).await?;
        let report = check_on(&handle, &target, expectation).await;
        target.close().await;
        Ok::<_, target::TargetError>(report)
    });
    let report = report.map_err(failed)?;
    if global.json {
        let mut line = json!({
            "event": "check",
            "target": without_secrets(&args.target),
            "log-complete": log.is_complete(),
            "writes-acknowledged": log.acknowledged(),
            "writes-unanswered": log.unanswered(),
        });
        line["check"] = serde_json::to_value(&report).map_err(failed)?;
        print::has_ended();
        product!("{line}");
    } else {
        print_check(&without_secrets(&args.target), &log, &report);
    }
    Ok(verdict(report.failures.count > 0, report.mismatches.count > 0))
}

fn print_check(target: &str, log: &AckLog, report: &CheckReport) {
    if !log.is_complete() {
        product!("the log was cut short; writes later than it knows count as right");
    }
    product!(
        "{target}: {} acknowledged writes, {} without an answer; {} blocks verified, {} unknown, {} wrong",
        log.acknowledged(),
        log.unanswered(),
        report.verified,
        report.unknown,
        report.mismatches.count
    );
    for mismatch in &report.mismatches.first {
        product!("  {mismatch}");
    }
    for failure in &report.failures.first {
        product!("  {failure}");
    }
}

fn verdict(failed: bool, wrong: bool) -> Exit {
    match (wrong, failed) {
        (true, _) => Exit::Different,
        (false, true) => Exit::Failed,
        (false, false) => Exit::Done,
    }
}

/// What the load would do, and what speaks against it: a log that is a file of the disk itself would empty it.
async fn judge(
    ring: Ring,
    name: String,
    image: ImageOptions,
    files: Vec<PathBuf>,
    refusal: Option<Refusal>,
) -> Plan {
    let mut admission = Admission::new(&ring, "bench");
    if let Some(refusal) = refusal {
        admission.refuse(refusal);
    }
    let look = ImageOptions { read_only: true, ..image.clone() };
    // A server is connected to by the load itself.
    if local_path(&name).is_some() {
        match open(&ring, &name, &look).await {
            Ok(node) => {
                let (act, kind) = match image.read_only {
                    true => (Act::Read, Role::Reader),
                    false => (Act::Overwrite, Role::Guest),
                };
                admission.layer("disk", act, &node, kind).await;
                for layer in node.chain() {
                    admission.stays(layer.driver(), "is a file of the disk under load").await;
                }
            }
            Err(error) => admission.refuse(error),
        }
    }
    for file in files {
        admission.writes_file(&file).await;
    }
    admission.judge().0
}

fn format_of(args: &BenchArgs, ring: &Ring) -> Result<Format, Failure> {
    let (handle, args) = (ring.clone(), args.clone());
    ring.block_on(async move { args.format(&handle).await })
}

fn load_main(global: &Global, args: &BenchArgs, ring: &Ring) -> Result<Exit, Failure> {
    let refusal = args.without_a_word();
    if let Some(refusal) = refusal.clone().filter(|_| !args.plan.dry_run) {
        return Err(refusal.into());
    }
    let (load, options) = (args.config(), args.target_options(format_of(args, ring)?));
    let files: Vec<_> = args.log.iter().chain(&args.histogram).cloned().collect();
    if args.plan.dry_run || !files.is_empty() {
        let plan =
            ring.block_on(judge(ring.clone(), args.target.clone(), options.image.clone(), files, refusal));
        if args.plan.judges(global, &plan)? {
            return Ok(Exit::Done);
        }
    }
    for (what, path) in [("histogram", &args.histogram), ("log", &args.log)] {
        if let Some(path) = path {
            left_alone(what, path)?;
        }
    }
    let control = LoadControl::new(ring);
    let signals = Signals::new(ring)?;
    let stop = control.clone();
    let is_open = Rc::new(Cell::new(false));
    let opened = is_open.clone();
    begin();
    ring.spawn(async move {
        signals.next_ending().await;
        if !opened.get() {
            say!("Cancelled: the target was not open yet");
            at_once(Exit::Cancelled);
        }
        stop.stop();
    });
    if !args.quiet {
        ring.spawn(show(ring.clone(), control.clone(), global.json));
    }
    let (handle, name, log) = (ring.clone(), args.target.clone(), args.log.clone());
    let reads_disk = load.read_percent > 0 && !is_memory(&args.target);
    let outcome: Result<LoadOutcome, Failure> = ring.block_on(async move {
        let target = Target::open(&handle, &name, &options).await.map_err(failed)?;
        is_open.set(true);
        // Nothing is made for a load that cannot run.
        let (offset, blocks) = check(&target, &load, load.verify || log.is_some()).map_err(not_for_it)?;
        let log: Option<Box<dyn std::io::Write>> = match &log {
            Some(path) => Some(Box::new(BufWriter::with_capacity(1 << 16, create(path)?))),
            None => None,
        };
        let holes = match reads_disk {
            true => holes_of_hundred(&target, offset, blocks * u64::from(load.block_bytes)).await,
            false => None,
        };
        let outcome = run_on(&handle, &target, &load, &control, log).await;
        target.close().await;
        let mut outcome = outcome.map_err(not_for_it)?;
        outcome.report.holes_percent = holes;
        Ok(outcome)
    });
    let report = outcome?.report;
    print::status(None);
    if let Some(path) = &args.histogram {
        let log = to_log(&report.histograms, report.elapsed_ns).map_err(failed)?;
        std::fs::write(path, log).map_err(|error| cannot_write(path, &error))?;
    }
    if global.json {
        let mut line = json!({"event": "report"});
        line["report"] = serde_json::to_value(&report).map_err(failed)?;
        print::has_ended();
        product!("{line}");
    } else {
        print::write_product(&report.to_text());
    }
    let wrong = report.verify.as_ref().is_some_and(|verify| verify.mismatched() > 0);
    Ok(verdict(!report.is_good(), wrong))
}

/// A load that does not suit the disk, by its own words.
fn not_for_it(error: LoadError) -> Failure {
    match error {
        LoadError::Range { .. }
        | LoadError::BlockBytes { .. }
        | LoadError::Unaligned { .. }
        | LoadError::TooManyBlocks { .. } => Failure::usage(error.to_string().trim_end_matches('.')),
        error => failed(error),
    }
}

/// How many of a hundred places of a range are holes, or known to be zero: they are not read from any disk. Some places are
/// looked at, as far from each other as can be. `None`: it cannot be told.
async fn holes_of_hundred(target: &Target, offset: u64, len: u64) -> Option<u8> {
    let driver = target.lanes().first()?.driver();
    let places = HOLES_LOOKED_FOR.min(len.max(1));
    let mut holes = 0;
    for n in 0..places {
        let at = offset + (u128::from(len) * u128::from(n) / u128::from(places)) as u64;
        holes += u64::from(driver.block_status(at, 1).await.ok()?.zero);
    }
    // Some are not none, and not all.
    let percent = (holes * 100).div_ceil(places);
    Some(if holes < places { percent.min(99) } else { percent } as u8)
}

/// A file that is there is left alone: it may be what a disk is to be judged by, or anything.
fn left_alone(what: &str, path: &Path) -> Result<(), Failure> {
    if std::fs::metadata(path).is_ok_and(|file| file.is_file() && file.len() > 0) {
        let text = "is there already, and left alone. Remove it, or name another";
        return Err(Failure::text(format!("The {what} '{}' {text}.", path.display())));
    }
    Ok(())
}

fn create(path: &Path) -> Result<std::fs::File, Failure> {
    std::fs::File::create(path).map_err(|error| cannot_write(path, &error))
}

fn cannot_write(path: &Path, error: &std::io::Error) -> Failure {
    Failure::text(format!("Writing '{}' failed: {}.", path.display(), plain(error)))
}

/// Keeps a line on the terminal up to date; with JSON a line a second on standard output.
async fn show(ring: Ring, control: LoadControl, json: bool) {
    let mut last = LoadProgress::default();
    loop {
        ring.sleep(LOOK_NS).await;
        let progress = control.progress();
        let iops = progress.operations.saturating_sub(last.operations) as f64 * NS_PER_SEC as f64
            / progress.elapsed_ns.saturating_sub(last.elapsed_ns).max(1) as f64;
        let bytes_per_sec = iops * progress.bytes as f64 / progress.operations.max(1) as f64;
        last = progress;
        if json {
            let line = json!({
                "event": "progress",
                "elapsed-ns": progress.elapsed_ns,
                "operations": progress.operations,
                "iops": iops,
                "bytes-per-sec": bytes_per_sec,
                "errors": progress.errors,
                "checking": progress.checking,
            });
            print::progress(&line);
        } else if print::has_status() {
            let doing = if progress.checking { "reading back" } else { "running" };
            print::status(Some(&format!(
                "{doing} {}  {iops:.0} IOPS  {:.1} MB/s  {} errors",
                fmt_duration(progress.elapsed_ns),
                bytes_per_sec / 1e6,
                progress.errors
            )));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: BenchArgs,
    }

    fn parse(words: &str) -> Result<BenchArgs, String> {
        let words = std::iter::once("bench").chain(words.split_whitespace());
        Line::try_parse_from(words).map(|line| line.args).map_err(|error| error.to_string())
    }

    #[test]
    fn words_become_a_load() {
        let load = parse("nbd://h/").unwrap().config();
        assert_eq!((load.block_bytes, load.pace), (4096, Pace::Closed { depth: 1 }));
        assert_eq!((load.duration_ns, load.operations), (Some(DURATION_NS), None));
        let words = "-r 500 --poisson -b 64K -p 70 --range 1M+1G -n 9 --pattern sequential --seed 3 x";
        let load = parse(words).unwrap().config();
        let pace = Pace::Open { rate_per_sec: 500, poisson: true, depth_max: RATE_DEPTH };
        assert_eq!((load.pace, load.block_bytes, load.read_percent), (pace, 65536, 70));
        assert_eq!(load.range, Some(ByteRange::at(1 << 20, 1 << 30).unwrap()));
        assert_eq!((load.duration_ns, load.operations, load.seed), (None, Some(9), Some(3)));
        assert_eq!(load.access, Access::Sequential);
        assert_eq!(parse("--until-signal x").unwrap().config().duration_ns, None);
    }

    #[test]
    fn writing_takes_a_word() {
        for (words, reads, is_refused) in [
            ("x", 100, false),
            ("-p 100 x", 100, false),
            ("-p 99 x", 99, true),
            ("--verify x", 100, true),
            ("--log l x", 100, true),
            ("--verify -p 100 nbd://h/", 100, true),
            ("--overwrite x", 0, false),
            ("--overwrite --verify -p 30 x", 30, false),
            ("mem:1M", 100, false),
            ("--verify mem:1M", 0, false),
            ("-p 50 delay:1ms:null:1M", 50, false),
            ("-p 50 delay:1ms:x", 50, true),
        ] {
            let args = parse(words).unwrap();
            assert_eq!(
                (args.reads_of_hundred(), args.without_a_word().is_some()),
                (reads, is_refused),
                "{words}"
            );
            assert_eq!(args.target_options(Format::Raw).image.read_only, reads == 100, "{words}");
        }
    }

    #[test]
    fn words_that_make_no_sense_are_refused() {
        for (words, message) in [
            ("-d 0 x", "from 1 to 1024"),
            ("-b 1000 x", "multiple of 512"),
            ("-b 2M x", "at most 1 MiB"),
            ("-p 101 x", "101"),
            ("--range 5 x", "such as 1GiB+256MiB"),
            ("--poisson x", "--rate"),
            ("--check-log l --verify x", "--verify"),
            ("--check-log l -d 3 x", "--depth"),
            ("--after-power-cut x", "--check-log"),
            ("-t 5 x", "has no unit"),
            ("", "TARGET"),
        ] {
            let refusal = parse(words).unwrap_err();
            assert!(refusal.contains(message), "{words}: {refusal}");
        }
    }
}
