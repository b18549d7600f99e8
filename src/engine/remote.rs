//! Disks that are not on this machine, by name: what takes a conversation to open.

use std::rc::Rc;

use blockferry_ring::{Errno, Nanos, Ring};

use super::open::ImageOptions;
use super::spec::{NodeSpec, ProtocolSpec};
use crate::base::limits;
use crate::block::{BlockError, Driver, IoResult, Operation};
use crate::protocol::gluster::{self, GlusterNode, OpenHow};
use crate::protocol::nbd::{NbdNode, NbdUri, Patience, RemoteOptions};
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

/// Whether a name leads to a server, through `delay:` too.
pub fn is_remote(name: &str) -> bool {
    NodeSpec::parse(name).is_ok_and(|spec| spec.is_remote())
}

/// Whether a name in an image, or one that a user gives for an image, leads to a disk on a server. What a user may say of the
/// use of such a disk (a delay, a part of it, a format that is to be found out), an image may not.
pub fn names_server(name: &str) -> bool {
    let Ok(spec) = NodeSpec::parse(name) else { return false };
    let is_delayed = matches!(spec.protocol, ProtocolSpec::Delay { .. });
    spec.is_remote() && !is_delayed && (!is_structured(name) || says_what_images_may(name))
}

fn says_what_images_may(name: &str) -> bool {
    Options::parse(name).is_ok_and(|options| {
        let is_said_twice = options.has("read-only") && options.has("file.read-only");
        options.has("driver") && !options.has("offset") && !options.has("size") && !is_said_twice
    })
}

fn refuse(operation: Operation, name: &str, why: String) -> BlockError {
    BlockError::new(operation, name, Errno::EINVAL).hint(why)
}

/// Opens a disk on a server.
pub(super) async fn open(
    ring: &Ring,
    leaf: &ProtocolSpec,
    image: &ImageOptions,
) -> Result<Rc<dyn Driver>, BlockError> {
    if let ProtocolSpec::Nbd(disk) = leaf {
        let remote = disk.reached(|uri| image.server.nbd(uri));
        return Ok(NbdNode::open(ring, remote, image.read_only).await?);
    }
    let not_far =
        || refuse(Operation::Open, &NodeSpec::from(leaf.clone()).shown(), "It is on no server.".into());
    let how = file_of(leaf, image).ok_or_else(not_far)?;
    if matches!(leaf, ProtocolSpec::Gluster { asked_for_rdma: true, .. }) {
        tracing::warn!("GlusterFS has no transport 'rdma' any more; tcp is used");
    }
    Ok(GlusterNode::open(ring, how).await?)
}

/// Where files can be made on a server, the file; `None` elsewhere.
fn file_of(leaf: &ProtocolSpec, image: &ImageOptions) -> Option<OpenHow> {
    let ProtocolSpec::Gluster { image: there, logging, .. } = leaf else { return None };
    let (there, logging) = (there.clone(), logging.clone());
    Some(OpenHow { image: there, logging, read_only: image.read_only, create: false })
}

/// The same of a name; it must not be delayed.
fn file_named(name: &str, image: &ImageOptions) -> Option<OpenHow> {
    file_of(&NodeSpec::parse(name).ok()?.protocol, image)
}

/// The image on a volume of GlusterFS that a name means, through `delay:` too.
pub(super) fn gluster_image(name: &str) -> Option<gluster::Image> {
    NodeSpec::parse(name).ok()?.gluster().cloned()
}

/// The disk of an NBD server that a name means, through `delay:` too.
pub fn nbd_disk(name: &str) -> Option<NbdUri> {
    NodeSpec::parse(name).ok()?.nbd().cloned()
}

/// Whether a name leads to a server on which images can be made.
pub fn can_create(name: &str) -> bool {
    file_named(name, &ImageOptions::default()).is_some()
}

/// Makes an empty file on a server, which must not exist (`EEXIST`), and gives it open for writing.
pub async fn create(ring: &Ring, name: &str, image: &ImageOptions) -> Result<Rc<dyn Driver>, BlockError> {
    match file_named(name, image) {
        Some(how) => Ok(GlusterNode::open(ring, OpenHow { create: true, ..how }).await?),
        None => Err(refuse(Operation::Create, name, "Images cannot be made on this server.".into())),
    }
}

/// Removes a file that was made on a server.
pub async fn remove(ring: &Ring, name: &str, image: &ImageOptions) -> IoResult {
    match file_named(name, image) {
        Some(how) => GlusterNode::remove(ring, how).await,
        None => Ok(()),
    }
}
