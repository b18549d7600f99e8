//! `blockferry-perf`: head-to-head measurements of Blockferry against its peers.
//!
//! A *scenario* is a piece of work; its *contenders* do it in turn, round after round, after one round of warming up in
//! which results are verified and system calls counted. `run` writes a file of JSON lines, `report` makes tables and
//! charts of such files. Nothing here passes or fails. See docs/performance.md for what the figures mean.

mod bare;
mod bare_send;
mod convert;
mod copy;
mod disks;
mod gluster;
mod live;
mod machine;
mod merge;
mod merge_live;
mod nbd;
mod node;
mod process;
mod qcow2;
mod qsd;
mod remote;
mod report;
mod result;
mod rounds;
mod scenarios;
mod stats;
mod stop;
mod svg;
mod sys;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::scenarios::{SCENARIOS, Scenario};

/// What goes wrong here is told to a person and ends the run.
pub type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

/// Measures Blockferry head to head with its peers
#[derive(Debug, Parser)]
#[command(name = "blockferry-perf", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List the scenarios
    List,
    /// Run scenarios; as root, on an otherwise idle machine
    Run(RunArgs),
    /// Make tables and charts of results
    Report(report::ReportArgs),
    /// Copy a disk with a bare io_uring loop: what the kernel allows
    BareCopy(BareArgs),
    /// Merge layers of a chain that `run` has made: our side of the scenario of that name
    #[command(hide = true)]
    Merge(merge::ChildArgs),
    /// Send through a socket with bare io_uring: what registered buffers and zero copy save
    BareSend(SendArgs),
}

#[derive(Debug, clap::Args)]
struct RunArgs {
    /// Scenarios by name, or the start of their names [default: all]
    #[arg(value_name = "SCENARIO")]
    scenarios: Vec<String>,
    /// Rounds that count, after the one of warming up [default: as each scenario needs]
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// Seconds that a row (a contender with all its rounds) may take
    #[arg(long, value_name = "SECONDS", default_value_t = 60.0)]
    seconds_max: f64,
    /// Append the results to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Where to make a folder for files and mounts. Scenarios of the disk measure the disk under it
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    scratch: PathBuf,
    /// Small disks and two rounds: to see whether everything works
    #[arg(long)]
    quick: bool,
    /// Only contenders whose names contain this (may be said more than once)
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    only: Vec<String>,
    /// Only cases whose names contain this (may be said more than once)
    #[arg(long, value_name = "TEXT")]
    case: Vec<String>,
    /// Measure `blockferry mirror` with these options too, such as 'lanes=--lanes 2' (may be said more than once)
    #[arg(long, value_name = "NAME=OPTIONS", value_parser = variant)]
    ours: Vec<(String, Vec<String>)>,
    /// The program under test [default: `blockferry` beside this program]
    #[arg(long, value_name = "FILE")]
    blockferry: Option<PathBuf>,
}

fn variant(text: &str) -> Result<(String, Vec<String>), String> {
    let (name, options) = text.split_once('=').ok_or("a name, =, and options")?;
    Ok((name.to_owned(), options.split_whitespace().map(str::to_owned).collect()))
}

#[derive(Debug, clap::Args)]
struct BareArgs {
    #[arg(value_name = "SRC")]
    source: PathBuf,
    #[arg(value_name = "DST")]
    target: PathBuf,
    /// Blocks in flight, of each thread
    #[arg(long, default_value_t = 16)]
    depth: usize,
    /// Bytes of a block, such as 256KiB
    #[arg(long, value_parser = block, default_value = "256KiB")]
    block: usize,
    /// Threads, each with a ring and a part of the disk
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Copy only data; the target has to be all zeroes
    #[arg(long)]
    sparse: bool,
}

#[derive(Debug, clap::Args)]
struct SendArgs {
    #[arg(value_name = "HOW")]
    how: bare_send::How,
    /// Over TCP instead of a Unix socket
    #[arg(long)]
    tcp: bool,
    /// Bytes of a block, such as 256KiB
    #[arg(long, value_parser = block, default_value = "256KiB")]
    block: usize,
    /// MiB to send
    #[arg(long, value_name = "N", default_value_t = 4096)]
    mib: u64,
}

fn block(text: &str) -> Result<usize, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "" => 1,
        "k" | "K" | "KiB" => 1 << 10,
        "M" | "MiB" => 1 << 20,
        _ => return Err("a size such as 256KiB or 1MiB".to_owned()),
    };
    let bytes = digits.parse::<usize>().ok().and_then(|count| count.checked_mul(unit));
    let good = |bytes: &usize| (4096..=16 << 20).contains(bytes) && bytes.is_multiple_of(4096);
    bytes.filter(good).ok_or_else(|| "a multiple of 4 KiB, at most 16 MiB".to_owned())
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::List => list(),
        Command::Run(args) => run(&args),
        Command::Report(args) => report::main(&args),
        Command::Merge(args) => merge::child(&args),
        Command::BareCopy(args) => bare::copy(&bare::BareCopy {
            source: args.source,
            target: args.target,
            depth: args.depth,
            block_bytes: args.block,
            threads: args.threads,
            sparse: args.sparse,
        }),
        Command::BareSend(args) => bare_send::send(&bare_send::BareSend {
            how: args.how,
            tcp: args.tcp,
            block_bytes: args.block,
            bytes: args.mib << 20,
        }),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("blockferry-perf: {error}");
            ExitCode::FAILURE
        }
    }
}

fn list() -> Fallible<()> {
    for scenario in SCENARIOS {
        println!("{:<16} {}", scenario.name, scenario.title);
    }
    Ok(())
}

fn chosen(names: &[String]) -> Fallible<Vec<&'static Scenario>> {
    if names.is_empty() {
        return Ok(SCENARIOS.iter().collect());
    }
    let mut all: Vec<&Scenario> = Vec::new();
    for name in names {
        let exact = scenarios::find(name).into_iter().collect::<Vec<_>>();
        let found = match exact.is_empty() {
            true => SCENARIOS.iter().filter(|scenario| scenario.name.starts_with(name.as_str())).collect(),
            false => exact,
        };
        if found.is_empty() {
            return Err(format!("there is no scenario '{name}'; `blockferry-perf list` has them all").into());
        }
        all.extend(found);
    }
    Ok(all)
}

fn run(args: &RunArgs) -> Fallible<()> {
    let scenarios = chosen(&args.scenarios)?;
    if !rustix::process::geteuid().is_root() {
        return Err("loop devices, zram devices and mounts need root".into());
    }
    stop::listen()?;
    let perf = std::env::current_exe()?;
    let blockferry = args.blockferry.clone().unwrap_or_else(|| perf.with_file_name("blockferry"));
    if !blockferry.exists() {
        let advice = "build it with `cargo build --release`, or say --blockferry";
        return Err(format!("'{}' is not there; {advice}", blockferry.display()).into());
    }
    let folder = disks::Folder::new(&args.scratch)?;
    let blockferry = blockferry.display().to_string();
    let counted = process::can_count();
    let machine = machine::describe(folder.path(), &blockferry, counted);
    for (name, value) in &machine.facts {
        eprintln!("{name}: {value}");
    }
    let mut cx = rounds::Context {
        blockferry,
        perf: perf.display().to_string(),
        rounds: args.rounds,
        seconds_max: args.seconds_max,
        quick: args.quick,
        counted,
        folder: folder.path().to_owned(),
        variants: args.ours.clone(),
        only: args.only.clone(),
        cases: args.case.clone(),
        sink: result::Sink::open(args.json.as_deref(), &machine)?,
    };
    let mut failed = Vec::new();
    for scenario in scenarios {
        let place = folder.path().join(scenario.name);
        std::fs::create_dir(&place)?;
        cx.folder.clone_from(&place);
        eprintln!("{}", scenario.title);
        if let Err(error) = scenario.run(&mut cx) {
            stop::check()?;
            eprintln!("{}: {error}", scenario.name);
            failed.push(scenario.name);
        }
        remove(&place)?;
    }
    if failed.is_empty() { Ok(()) } else { Err(format!("not run to the end: {}", failed.join(", ")).into()) }
}

fn remove(place: &Path) -> Fallible<()> {
    Ok(std::fs::remove_dir_all(place).map_err(|error| format!("'{}': {error}", place.display()))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_makes_sense() {
        Cli::command().debug_assert();
        assert_eq!(block("256KiB"), Ok(1 << 18));
        assert_eq!((block("1M"), block("8192")), (Ok(1 << 20), Ok(8192)));
        for wrong in ["", "5", "1G", "1000000M", "MiB"] {
            assert!(block(wrong).is_err(), "{wrong}");
        }
        assert_eq!(variant("a=--b c"), Ok(("a".into(), vec!["--b".into(), "c".into()])));
        assert!(variant("a").is_err());
    }

    #[test]
    fn scenarios_are_chosen_by_name_or_by_how_names_begin() {
        let names = |list: &[&str]| {
            let list: Vec<String> = list.iter().map(|name| (*name).to_owned()).collect();
            chosen(&list).map(|all| all.iter().map(|s| s.name).collect::<Vec<_>>())
        };
        assert_eq!(names(&["copy-zram"]).unwrap(), ["copy-zram"]);
        assert_eq!(names(&["live"]).unwrap(), ["live-loop", "live-disk"]);
        assert_eq!(names(&[]).unwrap().len(), SCENARIOS.len());
        assert!(names(&["x"]).is_err());
    }
}
