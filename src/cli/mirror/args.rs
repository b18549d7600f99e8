//! The options of `blockferry mirror`, and what they mean in the library's terms.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::cli::exit::Failure;
use crate::cli::image::{OpenArgs, Reflink, duration, parse_format, size, speed};
use crate::cli::job::{Policy, bytes, guest_first};
use crate::cli::serve::{ClientArgs, check_exports, export_uri};
use crate::cli::service::ServiceArgs;
use crate::cli::tool::{PlanArgs, option_pairs};
use crate::engine::Format;
use crate::job::governor::GuestFirst;
use crate::job::mirror::converge::OnDivergence;
use crate::job::mirror::{SyncMode, check_granularity};
use crate::job::offload::OffloadPolicy;
use crate::job::policy::CopyMode;
use crate::job::runner::ErrorPolicies;
use crate::protocol::nbd::NbdUri;

const AFTER: &str = "\
Examples:
  Copy a disk that nobody uses, and check the copy byte for byte:
      blockferry mirror --verify old.img new.img

  Serve a disk and copy it while clients write to it; then let them go on, on the copy:
      blockferry mirror -f raw old.img new.img --pivot \\
          --export 'nbd+unix:///disk?socket=/run/disk.sock'

  Keep a copy in step until told to stop (Ctrl-C completes it once it is ready, and cancels it before):
      blockferry mirror -f raw disk.img copy.img --follow --speed 200MiB \\
          --export nbd://127.0.0.1/disk

While the job runs the target carries a mark that says so; `blockferry info` shows it. The mark is gone
when, and only when, the target equals the source and is flushed. Exit code 3 means that the job was
cancelled before that; the same command takes such a target over. After a pivot the source carries a mark,
too, which says by what it was superseded.

A signal ends the job first, and not its clients: they go on until they leave, or until a second signal.
SIGUSR1 asks for a line of progress, SIGCONT lets a stopped job go on.";

/// Copy a disk to a new image, at rest or while it is in use
#[derive(Debug, Args)]
#[command(after_help = AFTER)]
pub struct MirrorArgs {
    /// The disk to copy: a file, a block device, nbd://HOST/EXPORT, gluster://HOST/VOLUME/IMAGE, mem:SIZE, null:SIZE or
    /// delay:TIME:NAME
    #[arg(value_name = "SRC", required = true)]
    pub(super) source: Option<String>,
    /// Where to: a new file (made with the source's size), or with --force and -F what is there already
    #[arg(value_name = "DST", required = true)]
    pub(super) target: Option<String>,
    /// Format of the source. Must be said (raw) when clients may write to it
    #[arg(short = 'f', long, value_name = "FORMAT", value_parser = parse_format)]
    pub(super) format: Option<Format>,
    /// Format of the target. Must be said for one that exists, and for NBD exports [default: a new file has the source's]
    #[arg(short = 'F', long, value_name = "FORMAT", value_parser = parse_format)]
    pub(super) target_format: Option<Format>,
    /// Options of the target's format if it is made, as NAME=VALUE,NAME=VALUE (may be said more than once); `-o help` lists
    /// them
    #[arg(short, long, visible_alias = "target-options", value_name = "OPTIONS")]
    pub(super) options: Vec<String>,
    /// What to copy: all of it; what is above the backing file, to a target that has the same one (all, where there is
    /// none); only new writes, to a target that is no copy then and says so
    #[arg(long, value_enum, default_value_t = Sync::Full)]
    pub(super) sync: Sync,
    /// Serve the source's clients meanwhile, at this NBD URI (may be said more than once)
    #[arg(long, value_name = "URI", value_parser = export_uri)]
    pub(super) export: Vec<NbdUri>,
    /// When source and target are alike, let the clients go on, on the target
    #[arg(long, requires = "export", conflicts_with = "follow")]
    pub(super) pivot: bool,
    /// Stay in step until SIGINT or SIGTERM, which complete the copy
    #[arg(long)]
    pub(super) follow: bool,
    /// Read both disks back, past the page cache, and compare; what is written meanwhile is compared again
    #[arg(long)]
    pub(super) verify: bool,
    /// When comparing, believe servers and remote filesystems that claim to hold zeroes: where both sides do, nothing is
    /// read
    #[arg(long, requires = "verify")]
    pub(super) trust_holes: bool,
    /// Overwrite an existing target. With `-F qcow2` a block device or an NBD export gets a new image, whatever is on it;
    /// an image in a file is written as it is
    #[arg(long)]
    pub(super) force: bool,
    /// With --force: a block device or an NBD export has an image on it already, which is written as it is
    #[arg(short = 'n', long, requires = "force")]
    pub(super) no_create: bool,
    /// Limit the copying, such as 200MiB (a second); 0 or `unlimited` for no limit
    #[arg(long, visible_alias = "rate", value_name = "RATE", value_parser = speed, default_value = "0")]
    pub(super) speed: u64,
    /// How clients' writes are treated while the job runs: copied later, or sent to both disks at once
    #[arg(long, value_enum, value_name = "MODE", default_value_t = CopyModeArg::Background)]
    pub(super) copy_mode: CopyModeArg,
    /// What to do when clients write faster than the job copies
    #[arg(long, value_enum, value_name = "POLICY", default_value_t = Divergence::WriteBlocking)]
    pub(super) on_divergence: Divergence,
    /// Clients' latency while the job runs: `auto` (near what it is without the job), `off`, or a time that 99
    /// of 100 requests shall not exceed, such as 500us
    #[arg(long, value_name = "HOW", value_parser = guest_first, default_value = "auto")]
    pub(super) guest_first: GuestFirst,
    /// The longest time for which clients wait while the job becomes ready or ends, such as 100ms; 0 for no
    /// bound. (With --verify the comparing that is left comes on top)
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "300ms")]
    pub(super) max_downtime: u64,
    /// Be ready within this time, such as 10min, even if clients notice
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(super) deadline: Option<u64>,
    /// Track changes in pieces of this size: a power of two from 512 to 64MiB [default: by the target, 64KiB]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(super) granularity: Option<u64>,
    /// Bytes in flight at most [default: 16MiB]
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "0", hide_default_value = true)]
    pub(super) buf_size: u64,
    /// Keep zeroes in the source's data out of the target
    #[arg(long, value_enum, default_value_t = DetectZeroes::Unmap)]
    pub(super) detect_zeroes: DetectZeroes,
    /// All of an existing target reads as zeroes: nothing of it is zeroed
    #[arg(long, requires = "force")]
    pub(super) target_is_zero: bool,
    /// Let source and target share blocks where the filesystem can, if no client can write meanwhile
    #[arg(long, value_enum, value_name = "WHEN", default_value_t = Reflink::Auto)]
    pub(super) reflink: Reflink,
    /// Allow a target that is larger than the source; what is behind the source's end stays as it is
    #[arg(long)]
    pub(super) allow_larger_target: bool,
    /// What to do when reading the source fails
    #[arg(long, value_enum, value_name = "POLICY", default_value_t = Policy::Report)]
    pub(super) on_source_error: Policy,
    /// What to do when writing the target fails
    #[arg(long, value_enum, value_name = "POLICY", default_value_t = Policy::Report)]
    pub(super) on_target_error: Policy,
    /// Where to note unfinished targets that cannot carry a mark themselves (block devices, some filesystems)
    #[arg(long, value_name = "DIR", value_parser = crate::cli::image::path)]
    pub(super) state_dir: Option<PathBuf>,
    /// Show progress (on a terminal it is shown anyway)
    #[arg(short, long, hide_short_help = true)]
    pub(super) progress: bool,
    /// No progress
    #[arg(short, long)]
    pub(super) quiet: bool,
    #[command(flatten)]
    pub(super) open: OpenArgs,
    #[command(flatten)]
    pub(super) service: ServiceArgs,
    #[command(flatten)]
    pub(super) clients: ClientArgs,
    #[command(flatten)]
    pub(super) plan: PlanArgs,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum Sync {
    Full,
    Top,
    None,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum DetectZeroes {
    /// Copy zeroes as data
    Off,
    /// Write zeroes by the target's own means; its space stays its own
    On,
    /// The same, and space is given back where that is possible
    Unmap,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum CopyModeArg {
    /// What clients change is copied later
    Background,
    /// Clients' writes go to both disks, and are answered after both
    WriteBlocking,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum Divergence {
    /// Go over to write-blocking
    WriteBlocking,
    /// Slow clients' writes down, smoothly, until the job gains on them
    Throttle,
    /// Show it, no more
    Report,
}

/// The arguments, in the library's terms.
pub(super) struct Settings {
    pub(super) source: String,
    pub(super) target: String,
    pub(super) format: Option<Format>,
    pub(super) target_format: Option<Format>,
    pub(super) target_options: Vec<(String, String)>,
    pub(super) sync: SyncMode,
    pub(super) export: Vec<NbdUri>,
    pub(super) pivot: bool,
    pub(super) follow: bool,
    pub(super) service: ServiceArgs,
    pub(super) verify: bool,
    pub(super) trust_holes: bool,
    pub(super) force: bool,
    pub(super) no_create: bool,
    pub(super) speed: i64,
    pub(super) granularity: Option<u64>,
    pub(super) buf_size: i64,
    pub(super) copy_mode: CopyMode,
    pub(super) on_divergence: OnDivergence,
    pub(super) guest_first: GuestFirst,
    pub(super) max_downtime: u64,
    pub(super) deadline: Option<u64>,
    pub(super) detect_zeroes: bool,
    pub(super) may_unmap: bool,
    pub(super) target_is_zero: bool,
    pub(super) offload: OffloadPolicy,
    pub(super) allow_larger_target: bool,
    pub(super) policies: ErrorPolicies,
    pub(super) state_dir: Option<PathBuf>,
    pub(super) quiet: bool,
    pub(super) open: OpenArgs,
    pub(super) clients: ClientArgs,
    pub(super) plan: PlanArgs,
}

impl Settings {
    pub(super) fn new(args: &MirrorArgs) -> Result<Settings, Failure> {
        if args.follow && args.export.is_empty() && args.sync as u8 != Sync::None as u8 {
            tracing::info!(
                "without --export nobody can write through this process: there is nothing to follow"
            );
        }
        let (Some(source), Some(target)) = (&args.source, &args.target) else {
            return Err(Failure::usage("Say what to copy, and where to: blockferry mirror SRC DST"));
        };
        check_exports(&args.export)?;
        if let Some(granularity) = args.granularity {
            check_granularity(granularity).map_err(|error| Failure::usage(error.to_string()))?;
        }
        if matches!(args.sync, Sync::None) && (args.pivot || args.verify) {
            let why = match args.pivot {
                true => "--pivot would put clients on a disk that lacks everything else",
                false => "there is no copy that --verify could compare",
            };
            return Err(Failure::usage(format!("--sync none copies only what is written meanwhile: {why}")));
        }
        Ok(Settings {
            source: source.clone(),
            target: target.clone(),
            format: args.format,
            target_format: args.target_format,
            target_options: option_pairs(&args.options)?,
            sync: match args.sync {
                Sync::Full => SyncMode::Full,
                Sync::Top => SyncMode::Top,
                Sync::None => SyncMode::None,
            },
            export: args.export.clone(),
            pivot: args.pivot,
            follow: args.follow,
            service: args.service,
            verify: args.verify,
            trust_holes: args.trust_holes,
            force: args.force,
            no_create: args.no_create,
            speed: bytes("speed", args.speed)?,
            granularity: args.granularity,
            buf_size: bytes("buf-size", args.buf_size)?,
            copy_mode: match args.copy_mode {
                CopyModeArg::Background => CopyMode::Background,
                CopyModeArg::WriteBlocking => CopyMode::WriteBlocking,
            },
            on_divergence: match args.on_divergence {
                Divergence::WriteBlocking => OnDivergence::WriteBlocking,
                Divergence::Throttle => OnDivergence::Throttle,
                Divergence::Report => OnDivergence::Report,
            },
            guest_first: args.guest_first,
            max_downtime: args.max_downtime,
            deadline: args.deadline,
            detect_zeroes: args.detect_zeroes != DetectZeroes::Off,
            may_unmap: args.detect_zeroes != DetectZeroes::On,
            target_is_zero: args.target_is_zero,
            offload: match args.reflink {
                Reflink::Auto => OffloadPolicy::Reflink,
                Reflink::Never => OffloadPolicy::Never,
            },
            allow_larger_target: args.allow_larger_target,
            policies: ErrorPolicies {
                source: args.on_source_error.into(),
                target: args.on_target_error.into(),
            },
            state_dir: args.state_dir.clone(),
            quiet: args.quiet,
            open: args.open.clone(),
            clients: args.clients.clone(),
            plan: args.plan,
        })
    }

    /// What can only be given a new image gets one.
    pub(super) fn makes_anew(&self) -> bool {
        self.target_format == Some(Format::Qcow2) && !self.no_create
    }
}
