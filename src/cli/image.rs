//! Options by which images are named and opened, the same for every subcommand.

use std::sync::{Mutex, PoisonError};

use clap::{Args, ValueEnum, value_parser};

use super::exit::Failure;
use crate::base::{limits, os_name};
use crate::block::BlockError;
use crate::engine::marks::Marks;
use crate::engine::remote::ServerOptions;
use crate::engine::{Format, ImageOptions, NodeSpec};
use crate::format::qcow2::{Gate, Reach};
use crate::protocol::mark::default_state_dir;
use crate::protocol::nbd::Patience;
use crate::protocol::open::Cache;

/// Bytes of one request of the NBD protocol at most.
const NBD_REQUEST_MAX: u64 = limits::NBD_REQUEST_BYTES_MAX as u64;

/// Whether the page cache is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum CacheMode {
    /// O_DIRECT, past the page cache; buffered where the filesystem refuses it
    #[default]
    Direct,
    /// Through the page cache
    Buffered,
}

impl From<CacheMode> for Cache {
    fn from(mode: CacheMode) -> Cache {
        match mode {
            CacheMode::Direct => Cache::Direct,
            CacheMode::Buffered => Cache::Buffered,
        }
    }
}

/// Options for opening.
#[derive(Clone, Debug, Default, Args)]
pub struct OpenArgs {
    /// Past the page cache (direct) or through it (buffered); QEMU's cache modes are understood, too
    #[arg(long, value_parser = super::tool::cache, default_value = "direct", value_name = "MODE")]
    pub cache: CacheMode,
    /// Take no locks and heed none: for those who know that nobody else writes these images
    #[arg(long)]
    pub no_lock: bool,
    /// Let an image be written that clients have left by a pivot: it is old
    #[arg(long)]
    pub allow_superseded: bool,
    #[command(flatten)]
    pub server: ServerArgs,
    #[command(flatten)]
    pub gate: GateArgs,
}

/// How servers are treated.
#[derive(Clone, Debug, Args)]
pub struct ServerArgs {
    /// How long requests to a server wait when the connection is lost, such as 30s; 0: they fail at once
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "10s")]
    pub reconnect_delay: u64,
    /// How long to go on trying to reach a server that does not answer when it is opened; 0: once
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "0")]
    pub open_timeout: u64,
    /// Connections to a server at most, where it allows several
    #[arg(long, value_name = "N", default_value_t = limits::NBD_CONNECTIONS as u64,
        value_parser = value_parser!(u64).range(1..=limits::NBD_CONNECTIONS_MAX as u64))]
    pub server_connections: u64,
    /// How long a server may send nothing at all before a job's requests fail and its error policy acts; 0: for ever.
    /// Flushes, and zeroes of long ranges, have ten times as long
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "60s")]
    pub io_timeout: u64,
    /// The same for requests of clients; 0: they wait for ever
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "0")]
    pub guest_timeout: u64,
    /// Do not ask NBD servers where holes are: for those that tell it slowly or wrongly
    #[arg(long)]
    pub no_block_status: bool,
    /// Send no requests longer than this to an NBD server, but at least one of its blocks [default: what it takes]
    #[arg(long, value_name = "SIZE", value_parser = request_bytes)]
    pub max_request: Option<u32>,
    /// Bytes that an NBD server has acknowledged and not flushed which are kept in memory, to be written again when its
    /// connection is lost; from half of that on it is flushed. 0: nothing of clients' is, and their flushes fail after such a
    /// loss (what a job writes is kept all the same)
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "64MiB")]
    pub unflushed: u64,
}

impl Default for ServerArgs {
    fn default() -> ServerArgs {
        let options = ServerOptions::default();
        ServerArgs {
            reconnect_delay: options.reconnect_delay_ns,
            open_timeout: options.open_timeout_ns,
            server_connections: options.connections_max as u64,
            io_timeout: options.patience.job_ns,
            guest_timeout: options.patience.guest_ns,
            no_block_status: options.no_block_status,
            max_request: options.request_bytes_max,
            unflushed: options.unflushed_bytes_max,
        }
    }
}

impl ServerArgs {
    /// In the library's terms.
    pub fn options(&self) -> ServerOptions {
        ServerOptions {
            reconnect_delay_ns: self.reconnect_delay,
            open_timeout_ns: self.open_timeout,
            connections_max: self.server_connections as usize,
            patience: Patience {
                job_ns: self.io_timeout,
                guest_ns: self.guest_timeout,
                flush_ns: self.io_timeout.max(self.guest_timeout).saturating_mul(10),
            },
            no_block_status: self.no_block_status,
            request_bytes_max: self.max_request,
            unflushed_bytes_max: self.unflushed,
        }
    }
}

/// Which other files images may have opened for them.
#[derive(Clone, Debug, Default, Args)]
pub struct GateArgs {
    /// Let images name backing and data files in this directory, too, not only in their own (may be said more than
    /// once)
    #[arg(long, value_name = "DIR", value_parser = path)]
    pub allow_dir: Vec<std::path::PathBuf>,
    /// Let images name any file of this machine: for images that you trust
    #[arg(long)]
    pub allow_any_file: bool,
    /// Let images name disks on servers (nbd://..., gluster://...) as backing files: for images that you trust
    #[arg(long)]
    pub allow_servers: bool,
    /// Guess the format of backing files that the image does not tell: never where a guest wrote a raw one
    #[arg(long)]
    pub probe_backing: bool,
    /// Use images that a job has left incomplete; what is copied of them is marked as incomplete, too
    #[arg(long)]
    pub allow_incomplete: bool,
}

impl GateArgs {
    /// What marks mean to who uses an image: one that is not whole is refused, unless that is allowed.
    pub fn marks(&self) -> Marks {
        Marks { allow_incomplete: self.allow_incomplete, state_dir: state_dir(None), ..Marks::default() }
    }

    /// What they mean.
    pub fn gate(&self) -> Gate {
        let files = match (self.allow_any_file, self.allow_dir.is_empty()) {
            (true, _) => Reach::Anything,
            (false, true) => Reach::OwnDirectory,
            (false, false) => Reach::Directories(self.allow_dir.clone()),
        };
        Gate { files, servers: self.allow_servers }
    }
}

/// A format as the user says it.
pub fn parse_format(text: &str) -> Result<Format, String> {
    Format::parse(text)
        .ok_or_else(|| format!("'{text}' is not a format that Blockferry knows; it knows: raw, qcow2"))
}

impl OpenArgs {
    /// What these options mean for one image.
    pub fn image(&self, format: Option<Format>, read_only: bool) -> ImageOptions {
        ImageOptions {
            format,
            read_only,
            cache: self.cache.into(),
            lock: !self.no_lock,
            without_locks: Some("--no-lock"),
            warns_of_header: format == Some(Format::Raw),
            server: self.server.options(),
            gate: self.gate.gate(),
            probe_backing: self.gate.probe_backing,
            marks: Marks { allow_superseded: self.allow_superseded, ..self.gate.marks() },
            ..ImageOptions::default()
        }
    }
}

/// How images are named.
#[derive(Clone, Copy, Debug, Default, Args)]
pub struct NamingArgs {
    /// Images are named by QEMU's options instead of a path or a URI: driver=qcow2,file.driver=file,file.filename=a.qcow2
    #[arg(long)]
    pub image_opts: bool,
}

impl NamingArgs {
    /// The name of an image, of which `format` was said.
    pub fn read(self, said: &str, format: Option<Format>) -> Result<String, Failure> {
        match (self.image_opts, format) {
            (false, _) => Ok(said.to_owned()),
            (true, Some(_)) => Err(Failure::text(
                "With --image-opts the options of an image say its format (driver=FORMAT,file...), and no other does",
            )),
            (true, None) => Ok(NodeSpec::parse_options(said)?.to_string()),
        }
    }
}

/// A path, of the text that words of the command line have become.
pub fn path(text: &str) -> Result<std::path::PathBuf, String> {
    match text {
        "" => Err("a path is missing".into()),
        text => Ok(os_name::to_path(text)),
    }
}

/// Bytes of a request.
fn request_bytes(text: &str) -> Result<u32, String> {
    match size(text)? {
        bytes @ 512..=NBD_REQUEST_MAX => Ok(bytes as u32),
        _ => Err(format!("a request has from 512 bytes to {NBD_REQUEST_MAX}")),
    }
}

/// A size as people write it.
pub fn size(text: &str) -> Result<u64, String> {
    crate::base::units::parse_size(text).map_err(|error| error.to_string())
}

/// A speed as people write it.
pub fn speed(text: &str) -> Result<u64, String> {
    let speed = crate::base::units::parse_speed(text).map_err(|error| error.to_string())?;
    if is_odd_speed(text, speed) {
        ODD_SPEEDS.lock().unwrap_or_else(PoisonError::into_inner).push(text.trim().to_owned());
    }
    Ok(speed)
}

/// Speeds that were said without a unit and are hardly meant: the log has not begun when they are read.
static ODD_SPEEDS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// A speed without a unit below this is hardly meant.
const SPEED_MIN: u64 = 64 << 10;

fn is_odd_speed(text: &str, speed: u64) -> bool {
    (1..SPEED_MIN).contains(&speed) && text.trim().bytes().all(|byte| byte.is_ascii_digit())
}

/// Warns of speeds without a unit that are hardly meant.
pub fn warn_of_speeds() {
    for text in ODD_SPEEDS.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
        tracing::warn!("a speed of {text} is {text} bytes a second: say {text}M if MiB a second are meant");
    }
}

/// A span of time as people write it, in nanoseconds.
pub fn duration(text: &str) -> Result<u64, String> {
    crate::base::units::parse_duration(text).map_err(|error| error.to_string())
}

/// Whether blocks are shared instead of copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Reflink {
    /// Where both files lie on a filesystem that can
    #[default]
    Auto,
    /// Never: the copy has blocks of its own
    Never,
}

/// A refusal of something that nobody has tried: not what failed, but why it cannot be. Other errors stay what they are.
pub fn refused(what: &str, error: BlockError) -> Failure {
    match error.refusal() {
        Some(why) => Failure::text(format!("{what} cannot be made so: {why}")),
        None => error.into(),
    }
}

/// The text of an error as a failure.
pub fn failed(error: impl std::fmt::Display) -> Failure {
    Failure::text(error.to_string())
}

/// Where marks go that their targets cannot carry: as said, or this user's own place.
pub fn state_dir(said: Option<&std::path::Path>) -> Option<std::path::PathBuf> {
    let home = |name| std::env::var_os(name);
    let (state_home, own_home) = (home("XDG_STATE_HOME"), home("HOME"));
    let is_root = rustix::process::geteuid().is_root();
    said.map(std::path::Path::to_path_buf)
        .or_else(|| default_state_dir(is_root, state_home.as_deref(), own_home.as_deref()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_speed_without_a_unit_is_hardly_meant_when_it_is_low() {
        for (text, is_odd) in [
            ("200", true),
            ("65535", true),
            ("65536", false),
            ("0", false),
            ("200k", false),
            ("1B", false),
            ("unlimited", false),
        ] {
            assert_eq!(is_odd_speed(text, speed(text).unwrap()), is_odd, "{text}");
        }
    }
}
