//! What is put under load: one disk, reached over one or several lanes.
//!
//! A lane is a driver of its own, for NBD a connection of its own. That writes over one lane are seen over another, and
//! that a flush covers them all, is for the server to promise (NBD calls it multi-conn).
//!
//! A connection that is lost is made anew, if the options allow that: requests wait meanwhile, the load goes on, and the
//! outage is measured as what a guest would feel of it. Without, the first loss ends the load.

use std::rc::Rc;

use blockferry_ring::Ring;

use crate::block::{BlockError, Driver, IoResult};
use crate::engine::ImageOptions;
use crate::engine::remote::ServerOptions;
use crate::graph::node::{Child, Role};
use crate::protocol::nbd::{
    ConnectOptions, Connection, NbdClientError, NbdDriver, NbdNode, NbdUri, UriError,
};

/// Why there is nothing to put under load.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// The text looks like a URI and is none.
    #[error(transparent)]
    Uri(#[from] UriError),
    /// The server.
    #[error(transparent)]
    Nbd(#[from] NbdClientError),
    /// The image.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// Several lanes to something that does not promise what they need.
    #[error(
        "'{name}' does not promise that several connections see each other's writes (NBD calls that multi-conn), so \
         nothing that is read over them can be verified. Use one connection."
    )]
    NoMultiConn {
        /// The target.
        name: String,
    },
    /// Several lanes to something that is no server.
    #[error("'{name}' is no NBD export, so it has one way only; use one connection.")]
    NoConnections {
        /// The target.
        name: String,
    },
}

/// How to reach a target.
#[derive(Clone, Debug)]
pub struct TargetOptions {
    /// Connections to an NBD server; anything else has one way only.
    pub connections: usize,
    /// What is read is to be verified: several connections have to promise that they see the same.
    pub verified: bool,
    /// How to open what is no NBD export.
    pub image: ImageOptions,
}

impl Default for TargetOptions {
    /// One connection; a raw image, for reading and writing.
    fn default() -> TargetOptions {
        TargetOptions { connections: 1, verified: false, image: ImageOptions::raw() }
    }
}

/// One way to the disk.
#[derive(Clone, Debug)]
pub struct Lane {
    driver: Rc<dyn Driver>,
    connection: Option<Rc<Connection>>,
    /// What makes lost connections anew.
    node: Option<Rc<NbdNode>>,
}

impl Lane {
    /// The driver.
    pub fn driver(&self) -> &Rc<dyn Driver> {
        &self.driver
    }

    /// Whether the disk can no longer be reached this way.
    pub fn is_lost(&self) -> bool {
        self.connection.as_ref().is_some_and(|connection| connection.lost().is_some())
            || self.node.as_ref().is_some_and(|node| node.is_out_of_reach())
    }
}

/// One disk.
#[derive(Clone, Debug)]
pub struct Target {
    lanes: Vec<Lane>,
    /// Keeps other programs out of its files.
    lock: Option<Rc<Child>>,
}

impl Target {
    /// A disk that is reached through a driver.
    pub fn of_driver(driver: Rc<dyn Driver>) -> Target {
        Target { lanes: vec![Lane { driver, connection: None, node: None }], lock: None }
    }

    /// An NBD export over `connections` connections (at least one). Where reads are to be `verified`, the server has to
    /// promise that several connections see the same.
    pub async fn of_nbd(
        ring: &Ring,
        uri: &NbdUri,
        connections: usize,
        verified: bool,
    ) -> Result<Target, TargetError> {
        let mut lanes = Vec::new();
        for _ in 0..connections.max(1) {
            let connection = Connection::connect(ring, uri, &ConnectOptions::default()).await?;
            if connections > 1 && verified && !connection.can_multi_conn() {
                return Err(TargetError::NoMultiConn { name: uri.to_string() });
            }
            lanes.push(Lane {
                driver: NbdDriver::new(ring, connection.clone()),
                connection: Some(connection),
                node: None,
            });
        }
        Ok(Target { lanes, lock: None })
    }

    /// The same over connections that are made anew when they are lost.
    async fn of_reconnecting(
        ring: &Ring,
        uri: &NbdUri,
        options: &TargetOptions,
    ) -> Result<Target, TargetError> {
        let one = ServerOptions { connections_max: 1, ..options.image.server };
        let mut lanes = Vec::new();
        for _ in 0..options.connections.max(1) {
            let node = NbdNode::open(ring, one.nbd(uri.clone()), options.image.read_only).await?;
            if options.connections > 1 && options.verified && !node.can_multi_conn() {
                return Err(TargetError::NoMultiConn { name: uri.to_string() });
            }
            lanes.push(Lane { driver: node.clone(), connection: None, node: Some(node) });
        }
        Ok(Target { lanes, lock: None })
    }

    /// Opens what a person named: an NBD URI, or anything that the engine opens.
    pub async fn open(ring: &Ring, name: &str, options: &TargetOptions) -> Result<Target, TargetError> {
        if ["nbd:", "nbd+", "nbds"].iter().any(|prefix| name.starts_with(prefix)) {
            let uri: NbdUri = name.parse()?;
            if options.image.server.reconnect_delay_ns > 0 {
                return Target::of_reconnecting(ring, &uri, options).await;
            }
            return Target::of_nbd(ring, &uri, options.connections, options.verified).await;
        }
        if options.connections > 1 {
            return Err(TargetError::NoConnections { name: name.to_owned() });
        }
        let node = crate::engine::open::open(ring, name, &options.image).await?;
        let lock =
            node.attach_in_time(if options.image.read_only { Role::Reader } else { Role::Guest }).await?;
        Ok(Target { lock: Some(lock), ..Target::of_driver(node.driver().clone()) })
    }

    /// What was written to an image that was opened here is durable afterwards, its tables too: they are written late, and
    /// clusters that a read was looking at are freed late. An NBD server looks after its own.
    pub async fn settle(&self) -> IoResult {
        for lane in self.lanes.iter().filter(|lane| lane.connection.is_none() && lane.node.is_none()) {
            lane.driver.flush().await?;
        }
        Ok(())
    }

    /// The ways to it; at least one.
    pub fn lanes(&self) -> &[Lane] {
        &self.lanes
    }

    /// What a person calls it.
    pub fn name(&self) -> &str {
        self.lanes.first().map_or("", |lane| lane.driver.name())
    }

    /// Bytes of the disk.
    pub fn len(&self) -> u64 {
        self.lanes.first().map_or(0, |lane| lane.driver.len())
    }

    /// No bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Waits for what is in flight and closes connections politely.
    pub async fn close(self) {
        drop(self.lock);
        for lane in &self.lanes {
            if let Some(connection) = &lane.connection {
                connection.disconnect().await;
            }
            if let Some(node) = &lane.node {
                node.disconnect().await;
            }
        }
    }
}
