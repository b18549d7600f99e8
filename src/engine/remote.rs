//! Disks that are not on this machine, by name: what takes a conversation to open.

use std::rc::Rc;

use blockferry_ring::{Errno, Nanos, Ring};

use super::open::ImageOptions;
use crate::base::limits;
use crate::base::units::parse_duration;
use crate::block::{BlockError, Driver, Operation};
use crate::protocol::delay::DelayDriver;
use crate::protocol::nbd::{NbdNode, NbdUri, RemoteOptions, options};

/// How servers are treated where their disk's own options do not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServerOptions {
    /// How long requests wait for a lost connection to come back; 0: they fail at once.
    pub reconnect_delay_ns: Nanos,
    /// How long opening tries again; 0: once.
    pub open_timeout_ns: Nanos,
    /// Connections at most, where a server allows several.
    pub connections_max: usize,
}

impl Default for ServerOptions {
    fn default() -> ServerOptions {
        ServerOptions {
            reconnect_delay_ns: limits::NBD_RECONNECT_DELAY_NS,
            open_timeout_ns: 0,
            connections_max: limits::NBD_CONNECTIONS,
        }
    }
}

/// Whether a name leads to a server, through `delay:` too.
pub fn is_remote(name: &str) -> bool {
    if let Some(rest) = name.strip_prefix("delay:") {
        return rest.split_once(':').is_some_and(|(_, child)| is_remote(child));
    }
    ["nbd:", "nbd+", "nbds:", "nbds+"].iter().any(|prefix| name.starts_with(prefix))
        || options::is_structured(name)
}

/// Opens what a name that [`is_remote`] means.
pub(super) async fn open(
    ring: &Ring,
    name: &str,
    image: &ImageOptions,
) -> Result<Rc<dyn Driver>, BlockError> {
    let refuse = |why: String| BlockError::new(Operation::Open, name, Errno::EINVAL).hint(why);
    // `delay:` may be said several times over; the innermost is the first to be told of a request's end.
    let (mut delays, mut rest) = (Vec::new(), name);
    while let Some((time, child)) = rest.strip_prefix("delay:").and_then(|rest| rest.split_once(':')) {
        delays.push(parse_duration(time).map_err(|error| refuse(error.to_string()))?);
        rest = child;
    }
    let server = image.server;
    let usual = |uri: NbdUri| RemoteOptions {
        reconnect_delay_ns: server.reconnect_delay_ns,
        open_timeout_ns: server.open_timeout_ns,
        connections_max: server.connections_max,
        ..RemoteOptions::new(uri)
    };
    let (remote, read_only) = if options::is_structured(rest) {
        let structured = options::parse(rest, usual).map_err(refuse)?;
        (structured.remote, image.read_only || structured.read_only == Some(true))
    } else {
        let uri: NbdUri = rest.parse().map_err(|error| refuse(format!("{error}")))?;
        (usual(uri), image.read_only)
    };
    let mut driver: Rc<dyn Driver> = NbdNode::open(ring, remote, read_only).await?;
    for latency_ns in delays.into_iter().rev() {
        driver = Rc::new(DelayDriver::new(ring, driver, latency_ns));
    }
    Ok(driver)
}
