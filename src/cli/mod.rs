//! The command line: one file a subcommand, and what they share.

pub mod bench;
pub mod chain;
pub mod check;
pub mod commit;
pub mod compare;
pub mod convert;
pub mod create;
pub mod demo;
pub mod doctor;
pub mod exit;
pub mod image;
pub mod info;
pub mod job;
pub mod map;
pub mod measure;
pub mod mirror;
pub mod progress;
pub mod rebase;
pub mod resize;
pub mod serve;
pub mod signals;
pub mod snapshot;
pub mod stats;
pub mod stream;
pub mod target;
pub mod tool;

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::base::secret::without_secrets;

pub use exit::{Exit, Failure};

/// Moves virtual disks while they are in use.
///
/// Blockferry copies a disk to a new image while its user goes on reading and writing, keeps the copy in
/// step for as long as you like, and switches over without the user noticing. It serves disks over NBD,
/// measures them honestly, and tells what it did.
#[derive(Debug, Parser)]
#[command(name = "blockferry", version, after_help = EXIT_CODES, propagate_version = true)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "\
Exit codes:
  0  done as promised
  1  failed; the message names what, where, and what to do
  2  the command line makes no sense
  3  cancelled before the target was complete, which is marked so, or the chain was changed
  4  source and target (or data and pattern) differ

Try `blockferry demo` to see it work, `blockferry doctor` to see what this machine allows.";

/// Options of every subcommand.
#[derive(Clone, Debug, Args)]
pub struct Global {
    /// Print JSON, one object a line, on standard output
    #[arg(long, global = true)]
    pub json: bool,
    /// Print the reactor's counters at the end (to standard error; with --json as an object)
    #[arg(long, global = true)]
    pub stats: bool,
    /// Say more (twice: everything)
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Restrict the ring to the operations in use: io_uring's own sandbox, which seccomp cannot replace
    #[arg(long, global = true)]
    pub restrict: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    Demo(demo::DemoArgs),
    Mirror(Box<mirror::MirrorArgs>),
    Commit(Box<commit::CommitArgs>),
    Stream(Box<stream::StreamArgs>),
    Serve(serve::ServeArgs),
    Info(info::InfoArgs),
    Convert(Box<convert::ConvertArgs>),
    Compare(Box<compare::CompareArgs>),
    Create(create::CreateArgs),
    Resize(resize::ResizeArgs),
    Map(map::MapArgs),
    Check(check::CheckArgs),
    Rebase(Box<rebase::RebaseArgs>),
    Snapshot(snapshot::SnapshotArgs),
    Measure(measure::MeasureArgs),
    Bench(Box<bench::BenchArgs>),
    Doctor(doctor::DoctorArgs),
}

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    start_log(cli.global.verbose);
    let global = &cli.global;
    let result = match cli.command {
        Command::Demo(args) => demo::main(global, &args),
        Command::Mirror(args) => mirror::main(global, &args),
        Command::Commit(args) => commit::main(global, *args),
        Command::Stream(args) => stream::main(global, *args),
        Command::Serve(args) => serve::main(global, &args),
        Command::Info(args) => info::main(global, args),
        Command::Convert(args) => convert::main(global, *args),
        Command::Compare(args) => compare::main(global, &args),
        Command::Create(args) => create::main(global, args),
        Command::Resize(args) => resize::main(global, args),
        Command::Map(args) => map::main(global, args),
        Command::Check(args) => check::main(global, args),
        Command::Rebase(args) => rebase::main(global, *args),
        Command::Snapshot(args) => snapshot::main(global, args),
        Command::Measure(args) => measure::main(global, args),
        Command::Bench(args) => bench::main(global, &args),
        Command::Doctor(args) => doctor::main(global, &args),
    };
    match result {
        Ok(exit) => exit.into(),
        Err(failure) => {
            let failure = failure.to_string();
            let failure = without_secrets(&failure);
            if global.json {
                println!("{}", serde_json::json!({"event": "error", "message": failure}));
            }
            eprintln!("blockferry: {failure}");
            Exit::Failed.into()
        }
    }
}

fn start_log(verbose: u8) {
    use tracing_subscriber::filter::EnvFilter;
    let default = match verbose {
        0 => "warn",
        1 => "blockferry=info,blockferry_ring=info,warn",
        2 => "blockferry=debug,blockferry_ring=debug,info",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_env("BLOCKFERRY_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    let colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| LogLines);
    let log = log.with_ansi(colours).with_target(false);
    // Timestamps are noise beside a progress bar.
    let result = if verbose > 1 { log.try_init() } else { log.without_time().try_init() };
    // A second start (tests call this more than once) keeps the first log.
    drop(result);
}

/// Log lines on their way to standard error, each written at once and without the passwords that names may hold.
struct LogLines;

impl std::io::Write for LogLines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let text = String::from_utf8_lossy(bytes);
        std::io::stderr().write_all(without_secrets(&text).as_bytes())?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        std::io::stderr().flush()
    }
}

/// The ring as the global options want it.
pub fn config(global: &Global) -> blockferry_ring::Config {
    blockferry_ring::Config { restrict: global.restrict, ..blockferry_ring::Config::default() }
}
