//! Disks that are not on this machine, by name: what takes a conversation to open.

use std::rc::Rc;

use blockferry_ring::{Errno, Nanos, Ring};

use super::open::{Format, ImageOptions};
use crate::base::limits;
use crate::base::units::parse_duration;
use crate::block::{BlockError, Driver, IoResult, Operation};
use crate::protocol::delay::DelayDriver;
use crate::protocol::gluster::{self, GlusterNode, GlusterUri, Logging, OpenHow};
use crate::protocol::nbd::{self, NbdNode, NbdUri, Patience, RemoteOptions};
use crate::protocol::structured::{Options, is_structured};

/// How servers are treated where their disk's own options do not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServerOptions {
    /// How long requests wait for a lost connection to come back; 0: they fail at once.
    pub reconnect_delay_ns: Nanos,
    /// How long opening tries again; 0: once.
    pub open_timeout_ns: Nanos,
    /// Connections at most, where a server allows several.
    pub connections_max: usize,
    /// How long a silent server is waited for.
    pub patience: Patience,
    /// It is not asked where holes are.
    pub no_block_status: bool,
    /// Bytes of one request at most; `None`: what the server takes.
    pub request_bytes_max: Option<u32>,
    /// Bytes that a server has acknowledged and not flushed which are kept at most, to be written again when it is lost.
    pub unflushed_bytes_max: u64,
}

impl Default for ServerOptions {
    fn default() -> ServerOptions {
        ServerOptions {
            reconnect_delay_ns: limits::NBD_RECONNECT_DELAY_NS,
            open_timeout_ns: 0,
            connections_max: limits::NBD_CONNECTIONS,
            patience: Patience::default(),
            no_block_status: false,
            request_bytes_max: None,
            unflushed_bytes_max: limits::NBD_UNFLUSHED_BYTES,
        }
    }
}

impl ServerOptions {
    /// How the disk of this URI is reached with these options.
    pub fn nbd(&self, uri: NbdUri) -> RemoteOptions {
        let mut options = RemoteOptions {
            reconnect_delay_ns: self.reconnect_delay_ns,
            open_timeout_ns: self.open_timeout_ns,
            connections_max: self.connections_max,
            patience: self.patience,
            request_bytes_max: self.request_bytes_max,
            unflushed_bytes_max: self.unflushed_bytes_max,
            ..RemoteOptions::new(uri)
        };
        if self.no_block_status {
            options.connect.meta_contexts.clear();
        }
        options
    }
}

const NBD: [&str; 4] = ["nbd:", "nbd+", "nbds:", "nbds+"];
const GLUSTER: [&str; 2] = ["gluster:", "gluster+"];

fn begins_with(name: &str, prefixes: &[&str]) -> bool {
    prefixes.iter().any(|prefix| name.starts_with(prefix))
}

/// Whether a name leads to a server, through `delay:` too.
pub fn is_remote(name: &str) -> bool {
    if let Some(rest) = name.strip_prefix("delay:") {
        return rest.split_once(':').is_some_and(|(_, child)| is_remote(child));
    }
    begins_with(name, &NBD) || begins_with(name, &GLUSTER) || is_structured(name)
}

/// Whether a name in an image, or one that a user gives for an image, leads to a disk on a server.
pub fn names_server(name: &str) -> bool {
    is_remote(name) && Meaning::of(name, &ImageOptions::default()).is_ok()
}

/// A disk on a server, and how it is reached.
enum Disk {
    Nbd(RemoteOptions),
    Gluster {
        how: OpenHow,
        /// The transport rdma was named.
        asked_for_rdma: bool,
    },
}

/// What a name means.
struct Meaning {
    disk: Disk,
    read_only: bool,
    /// The format, where the name says it.
    format: Option<Format>,
}

impl Meaning {
    fn of(name: &str, image: &ImageOptions) -> Result<Meaning, String> {
        let server = image.server;
        let usual = |uri: NbdUri| server.nbd(uri);
        if begins_with(name, &GLUSTER) {
            let GlusterUri { image: there, asked_for_rdma } =
                name.parse().map_err(|error| format!("{error}."))?;
            let read_only = image.read_only;
            let how = OpenHow { image: there, logging: Logging::default(), read_only, create: false };
            return Ok(Meaning { disk: Disk::Gluster { how, asked_for_rdma }, read_only, format: None });
        }
        if !is_structured(name) {
            let uri: NbdUri = name.parse().map_err(|error| format!("{error}"))?;
            return Ok(Meaning { disk: Disk::Nbd(usual(uri)), read_only: image.read_only, format: None });
        }
        let mut options = Options::parse(name)?;
        let format = match options.take_format() {
            None => None,
            Some(name) => Some(
                Format::parse(&name)
                    .ok_or_else(|| format!("The driver '{name}' is no format that is known."))?,
            ),
        };
        match options.take_driver()?.as_str() {
            "nbd" => {
                let structured = nbd::options::understand(options, usual)?;
                let read_only = image.read_only || structured.read_only == Some(true);
                Ok(Meaning { disk: Disk::Nbd(structured.remote), read_only, format })
            }
            "gluster" => {
                let said = gluster::options::understand(options)?;
                let read_only = image.read_only || said.read_only == Some(true);
                let how = OpenHow { image: said.image, logging: said.logging, read_only, create: false };
                let disk = Disk::Gluster { how, asked_for_rdma: said.asked_for_rdma };
                Ok(Meaning { disk, read_only, format })
            }
            other => {
                Err(format!("The driver '{other}' cannot be named in this form; 'nbd' and 'gluster' can."))
            }
        }
    }
}

fn refuse(operation: Operation, name: &str, why: String) -> BlockError {
    BlockError::new(operation, name, Errno::EINVAL).hint(why)
}

/// Opens what a name that [`is_remote`] means. Some names say the format, too.
pub(super) async fn open(
    ring: &Ring,
    name: &str,
    image: &ImageOptions,
) -> Result<(Rc<dyn Driver>, Option<Format>), BlockError> {
    // `delay:` may be said several times over; the innermost is the first to be told of a request's end.
    let (mut delays, mut rest) = (Vec::new(), name);
    while let Some((time, child)) = rest.strip_prefix("delay:").and_then(|rest| rest.split_once(':')) {
        let delay = parse_duration(time);
        delays.push(delay.map_err(|error| refuse(Operation::Open, name, error.to_string()))?);
        rest = child;
    }
    let meaning = Meaning::of(rest, image).map_err(|why| refuse(Operation::Open, name, why))?;
    let mut driver: Rc<dyn Driver> = match meaning.disk {
        Disk::Nbd(remote) => NbdNode::open(ring, remote, meaning.read_only).await?,
        Disk::Gluster { how, asked_for_rdma } => {
            if asked_for_rdma {
                tracing::warn!("GlusterFS has no transport 'rdma' any more; tcp is used");
            }
            GlusterNode::open(ring, how).await?
        }
    };
    for latency_ns in delays.into_iter().rev() {
        driver = Rc::new(DelayDriver::new(ring, driver, latency_ns));
    }
    Ok((driver, meaning.format))
}

/// Where files can be made on a server, the file of a name; `None` for other names.
fn file_of(name: &str, image: &ImageOptions) -> Option<OpenHow> {
    match Meaning::of(name, image).ok()?.disk {
        Disk::Gluster { how, .. } => Some(how),
        Disk::Nbd(_) => None,
    }
}

/// The image on a volume of GlusterFS that a name means, through `delay:` too.
pub(super) fn gluster_image(name: &str) -> Option<gluster::Image> {
    match name.strip_prefix("delay:") {
        Some(rest) => gluster_image(rest.split_once(':')?.1),
        None if is_remote(name) => Some(file_of(name, &ImageOptions::default())?.image),
        None => None,
    }
}

/// The disk of an NBD server that a name means, through `delay:` too.
pub fn nbd_disk(name: &str) -> Option<NbdUri> {
    if let Some(rest) = name.strip_prefix("delay:") {
        return nbd_disk(rest.split_once(':')?.1);
    }
    match Meaning::of(name, &ImageOptions::default()).ok().filter(|_| is_remote(name))?.disk {
        Disk::Nbd(remote) => Some(remote.uri),
        Disk::Gluster { .. } => None,
    }
}

/// Whether a name leads to a server on which images can be made.
pub fn can_create(name: &str) -> bool {
    is_remote(name) && !name.starts_with("delay:") && file_of(name, &ImageOptions::default()).is_some()
}

/// Makes an empty file on a server, which must not exist (`EEXIST`), and gives it open for writing.
pub async fn create(ring: &Ring, name: &str, image: &ImageOptions) -> Result<Rc<dyn Driver>, BlockError> {
    match file_of(name, image) {
        Some(how) => Ok(GlusterNode::open(ring, OpenHow { create: true, ..how }).await?),
        None => Err(refuse(Operation::Create, name, "Images cannot be made on this server.".into())),
    }
}

/// Removes a file that was made on a server.
pub async fn remove(ring: &Ring, name: &str, image: &ImageOptions) -> IoResult {
    match file_of(name, image) {
        Some(how) => GlusterNode::remove(ring, how).await,
        None => Ok(()),
    }
}
