//! The command line: one file a subcommand, and what they share.

pub mod amend;
pub mod bench;
pub mod chain;
pub mod check;
pub mod commit;
pub mod compare;
pub mod convert;
pub mod create;
pub mod dd;
pub mod demo;
pub mod doctor;
pub mod exit;
pub mod help;
pub mod image;
pub mod info;
pub mod job;
pub mod map;
pub mod measure;
pub mod mirror;
pub mod print;
pub mod progress;
pub mod rebase;
pub mod resize;
pub mod room;
pub mod serve;
pub mod service;
pub mod signals;
pub mod snapshot;
pub mod stats;
pub mod stream;
pub mod target;
pub mod tool;
pub mod twice;

use std::process::ExitCode;

use std::borrow::Cow;
use std::ffi::OsString;

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use serde_json::json;

use crate::base::shown::shown;
use crate::base::{os_name, planted};
pub use exit::{Exit, Failure};
use print::say;

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
  3  cancelled: before anything was changed; or before the target was complete, which is
     marked so; or before a chain was changed, which is as it was
  4  source and target (or data and pattern) differ

Try `blockferry demo` to see it work, `blockferry doctor` to see what this machine allows.";

/// Options of every subcommand.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = help::EVERYWHERE)]
pub struct Global {
    /// Print JSON, one object a line
    #[arg(long, global = true)]
    pub json: bool,
    /// Print the reactor's counters at the end (to standard error; with --json as an object)
    #[arg(long, global = true, hide_short_help = true)]
    pub stats: bool,
    /// Say more (twice: everything)
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Restrict the ring to the operations in use: io_uring's own sandbox, which seccomp cannot replace
    #[arg(long, global = true, hide_short_help = true)]
    pub restrict: bool,
    /// Nothing but what was asked for, and errors: every command has the option.
    #[arg(skip)]
    pub quiet: bool,
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
    Amend(amend::AmendArgs),
    Dd(Box<dd::DdArgs>),
    Snapshot(snapshot::SnapshotArgs),
    Measure(measure::MeasureArgs),
    Bench(Box<bench::BenchArgs>),
    Doctor(doctor::DoctorArgs),
}

/// The command line, with what all subcommands have in common.
pub fn command() -> clap::Command {
    Cli::command().mut_subcommands(help::dressed)
}

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    planted::plant_what_is_named();
    let words: Vec<_> = std::env::args_os().map(|word| os_name::from_word(&word)).collect();
    let whole = command();
    let words = twice::last_formats(&whole, words);
    let parsed = help::relaxed(whole, &words).try_get_matches_from(words).and_then(|matches| {
        let mut cli = Cli::from_arg_matches(&matches)?;
        if let Some((_, of_command)) = matches.subcommand() {
            cli.global.quiet = of_command.get_flag(help::QUIET);
            cli.global.json |= help::wants_json(of_command);
        }
        Ok(cli)
    });
    let cli = match parsed {
        Ok(cli) => cli,
        Err(mut error) => return print::finish(usage(&mut error)).into(),
    };
    start_log(&cli.global);
    if cli.global.json {
        print::wants_ending();
    }
    let global = &cli.global;
    // For `check` 3 says that clusters leaked, and 2 that there are corruptions.
    let cancelled = if matches!(cli.command, Command::Check(_)) { Exit::Failed } else { Exit::Cancelled };
    if cancelled == Exit::Failed {
        print::failure_has(1);
    }
    image::warn_of_speeds();
    let result = signals::defuse()
        .and_then(|()| room::prepare())
        .and_then(|()| signals::watch(global.json, cancelled))
        .and_then(|()| run(global, cli.command));
    let exit = result.unwrap_or_else(|failure| {
        print::failure(global.json, &failure);
        print::exit_of(&failure)
    });
    signals::let_go();
    print::finish(exit).into()
}

fn run(global: &Global, command: Command) -> Result<Exit, Failure> {
    match command {
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
        Command::Amend(args) => amend::main(global, args),
        Command::Dd(args) => dd::main(global, *args),
        Command::Snapshot(args) => snapshot::main(global, args),
        Command::Measure(args) => measure::main(global, args),
        Command::Bench(args) => bench::main(global, &args),
        Command::Doctor(args) => doctor::main(global, &args),
    }
}

/// What clap has to say: help that was asked for, or what is wrong with the command line.
fn usage(error: &mut clap::Error) -> Exit {
    let is_help = !error.use_stderr();
    let mut again = quoted();
    let said = match again.as_mut() {
        Some(again) => without_tips(again),
        None => without_tips(error),
    };
    let text = if print::has_colours(is_help) { said.ansi().to_string() } else { said.to_string() };
    let text = if is_help { text } else { help::ranges_in_words(&text) };
    print::usage(&text, is_help);
    if let Some(text) = not_here(error) {
        say!("{text}");
    }
    let exit = match u8::try_from(error.exit_code()) {
        Ok(0) => Exit::Done,
        // There 2 says that corruptions were found.
        Ok(_) if is_check() => Exit::Failed,
        Ok(code) => Exit::Code(code),
        Err(_) => Exit::Failed,
    };
    if !is_help && wants_json() {
        // The first paragraph says what is wrong, the others how it is said.
        let message = help::ranges_in_words(&said.to_string());
        let message = message.split("\n\n").next().unwrap_or_default();
        let message = message.trim_start_matches("error: ").trim_end();
        print::ending(json!({"event": "error", "message": message}), exit);
    }
    exit
}

/// What clap has to say, without what it guesses: options that look alike seldom do the same, and a usage line with one that
/// was never said explains nothing.
fn without_tips(error: &mut clap::Error) -> clap::builder::StyledStr {
    use clap::error::{ContextKind, ContextValue};
    let guesses = [
        ContextKind::Suggested,
        ContextKind::SuggestedArg,
        ContextKind::SuggestedSubcommand,
        ContextKind::SuggestedValue,
        ContextKind::SuggestedCommand,
        ContextKind::TrailingArg,
    ];
    for kind in guesses {
        error.remove(kind);
    }
    if error.kind() == clap::error::ErrorKind::UnknownArgument
        && let Some(usage) = help::usage_of_said_command()
    {
        error.insert(ContextKind::Usage, ContextValue::StyledStr(usage));
    }
    error.render()
}

/// What is wrong with a command line that has control characters in it, with these shown: it quotes the words.
fn quoted() -> Option<clap::Error> {
    let words: Vec<_> = std::env::args_os().map(|word| os_name::from_word(&word)).collect();
    let words = twice::last_formats(&command(), words);
    let clean = words.iter().map(|word| shown(&word.to_string_lossy()).into_owned());
    let is_clean = |word: &OsString| matches!(shown(&word.to_string_lossy()), Cow::Borrowed(_));
    if words.iter().all(is_clean) {
        return None;
    }
    command().try_get_matches_from(clean).err()
}

/// Whether JSON was asked for in a command line that could not be understood.
fn wants_json() -> bool {
    std::env::args_os().skip(1).take_while(|word| word != "--").any(|word| word == "--json")
}

/// Whether the command line is for `check`.
fn is_check() -> bool {
    std::env::args_os()
        .skip(1)
        .find(|word| !word.as_encoded_bytes().starts_with(b"-"))
        .is_some_and(|word| word == "check")
}

/// What users of `qemu-img` may look for, and what there is instead.
fn not_here(error: &clap::Error) -> Option<&'static str> {
    use clap::error::{ContextKind, ContextValue};
    let of = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        _ => None,
    };
    if of(ContextKind::InvalidSubcommand) == Some("bitmap") {
        return Some("Bitmaps of images cannot be changed here yet: use `qemu-img bitmap`");
    }
    match of(ContextKind::InvalidArg)? {
        "--image-opts" | "--source-image-opts" | "--target-image-opts" => Some(
            "Options of an image may stand where its name does: driver=qcow2,file.driver=file,file.filename=a.qcow2",
        ),
        "--object" => Some("There are no objects here: encrypted images and TLS need `qemu-img`"),
        "--bitmaps" | "--skip-broken-bitmaps" => {
            Some("Bitmaps are not copied here yet: use `qemu-img convert --bitmaps`")
        }
        _ => None,
    }
}

fn start_log(global: &Global) {
    use tracing_subscriber::field::MakeExt;
    use tracing_subscriber::filter::EnvFilter;
    use tracing_subscriber::fmt::format;
    let verbose = global.verbose;
    let default = match verbose {
        0 if global.quiet => "error",
        0 => "warn",
        1 => "blockferry=info,blockferry_ring=info,warn",
        2 => "blockferry=debug,blockferry_ring=debug,info",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_env("BLOCKFERRY_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(print::LogLine::default);
    // A line of the log may quote anything, and what would colour it is not told from what has no business there.
    let log = log.with_ansi(false).with_target(false);
    let log = log.fmt_fields(format::debug_fn(field).delimited(""));
    // Timestamps are noise beside a progress bar.
    let result = if verbose > 1 { log.try_init() } else { log.without_time().try_init() };
    // A second start (tests call this more than once) keeps the first log.
    drop(result);
}

/// A field of a message in the log, as a sentence goes on: errors behind a colon, the rest in brackets.
fn field(
    writer: &mut tracing_subscriber::fmt::format::Writer<'_>,
    field: &tracing::field::Field,
    value: &dyn std::fmt::Debug,
) -> std::fmt::Result {
    match field.name() {
        "message" => write!(writer, "{value:?}"),
        "error" | "errno" | "reason" => write!(writer, ": {value:?}"),
        name => write!(writer, " ({name} {value:?})"),
    }
}

/// The ring as the global options want it.
pub fn config(global: &Global) -> blockferry_ring::Config {
    let usual = blockferry_ring::Config::default();
    let arena_bytes = room::arena_bytes(usual.arena_bytes);
    blockferry_ring::Config { restrict: global.restrict, arena_bytes, ..usual }
}
