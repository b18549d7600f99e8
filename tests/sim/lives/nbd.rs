//! Guests at the other end of a socket: the engine's NBD export and its NBD client, with simulated byte streams
//! between them that are cut anywhere, stall, and are reset.
//!
//! When a connection is lost, nobody tells its client what became of the requests in flight: the server may
//! carry them out later, even after the client has come back. So a write whose answer was lost stays under way
//! in the model until the server has no sessions any more ([`Lost::settle`]).

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use blockferry::base::rng::Rng;
use blockferry::export::nbd::{Export, NbdServer, ServerConfig};
use blockferry::graph::node::Root;
use blockferry::protocol::nbd::{ConnectOptions, Connection, NbdDriver};
use blockferry_ring::SocketAddress;
use blockferry_ring::sync::Notify;

use super::disk::Disk;
use super::model::Write;
use super::plan::SECOND;
use super::rig::Rig;

/// Where the server listens; how fault rules know its streams.
pub const SOCKET: &str = "/nbd.sock";
const NAME: &str = "disk";
/// Attempts to connect before the client gives up.
const ATTEMPTS: u32 = 1000;

/// Writes whose answers were lost.
#[derive(Default)]
pub struct Lost(RefCell<Vec<Write>>);

impl Lost {
    /// Nobody will tell what became of it.
    pub fn add(&self, write: Write) {
        self.0.borrow_mut().push(write);
    }

    /// No server has sessions any more: they have happened by now, or never will.
    pub fn settle(&self, rig: &Rig) {
        for write in self.0.take() {
            rig.model.borrow_mut().end_write(write, false, false);
        }
    }
}

/// Starts a server for the rig's root.
pub fn serve(rig: &Rc<Rig>) -> Result<(), String> {
    let Some(root) = rig.root.borrow().as_ref().map(Root::client) else { return Err("no root".into()) };
    let mut rng = rig.fork_rng();
    let config = ServerConfig {
        in_flight_max: 1 + rng.below(32) as usize,
        bytes_in_flight_max: 64 << rng.below(14),
        ..ServerConfig::default()
    };
    let server = NbdServer::new(&rig.ring, config);
    let export = Export { root, description: String::new(), writable: true, default: rng.below(2) == 0 };
    server.add_export(NAME, export).map_err(|error| error.to_string())?;
    server.listen(&SocketAddress::Unix(SOCKET.into())).map_err(|error| error.to_string())?;
    rig.servers.borrow_mut().push(server);
    Ok(())
}

/// Opens the file at `path` by way of a server and a connection of its own.
pub async fn open_remote(rig: &Rc<Rig>, path: &str) -> Result<Disk, String> {
    let file = Disk::open(&rig.ring, path, rig.plan.buffered).map_err(|error| error.to_string())?;
    let root = Root::new(&file.node, false).map_err(|error| error.to_string())?;
    let server = NbdServer::new(&rig.ring, ServerConfig::default());
    let export = Export { root, description: String::new(), writable: true, default: true };
    server.add_export(NAME, export).map_err(|error| error.to_string())?;
    let socket: Rc<str> = format!("/target-{}.sock", path.trim_start_matches('/')).into();
    server.listen(&SocketAddress::Unix((&*socket).into())).map_err(|error| error.to_string())?;
    rig.servers.borrow_mut().push(server);
    let uri = format!("nbd+unix:///{NAME}?socket={socket}").parse().map_err(|error| format!("{error}"))?;
    let connection = Connection::connect(&rig.ring, &uri, &ConnectOptions::default()).await;
    let driver = NbdDriver::new(&rig.ring, connection.map_err(|error| error.to_string())?);
    Ok(Disk::new(&rig.ring, path, driver.clone(), Some((socket, driver))))
}

/// A client that connects again when it is cut off.
pub struct Remote {
    options: ConnectOptions,
    driver: RefCell<Option<Rc<NbdDriver>>>,
    dialling: Cell<bool>,
    changed: Notify,
}

impl Remote {
    /// A client that has not connected yet.
    pub fn new(rig: &Rig, rng: &mut Rng) -> Rc<Remote> {
        let structured_replies = rng.below(4) > 0;
        let options = ConnectOptions {
            structured_replies,
            extended_headers: structured_replies && rng.below(2) == 0,
            meta_contexts: if structured_replies {
                ConnectOptions::default().meta_contexts
            } else {
                Vec::new()
            },
            ..ConnectOptions::default()
        };
        Rc::new(Remote {
            options,
            driver: RefCell::default(),
            dialling: Cell::new(false),
            changed: rig.ring.notify(),
        })
    }

    /// The connection as it stands, or a new one. `None`: none is to be had.
    pub async fn driver(&self, rig: &Rig) -> Option<Rc<NbdDriver>> {
        loop {
            let current = self.driver.borrow().clone();
            if let Some(driver) = current.filter(|driver| driver.connection().lost().is_none()) {
                return Some(driver);
            }
            if !self.dialling.replace(true) {
                let driver = self.dial(rig).await;
                self.dialling.set(false);
                *self.driver.borrow_mut() = driver.clone();
                self.changed.notify();
                return driver;
            }
            self.changed.until(|| (!self.dialling.get()).then_some(())).await;
            if self.driver.borrow().is_none() {
                return None;
            }
        }
    }

    async fn dial(&self, rig: &Rig) -> Option<Rc<NbdDriver>> {
        let uri = match format!("nbd+unix:///{NAME}?socket={SOCKET}").parse() {
            Ok(uri) => uri,
            Err(error) => {
                rig.fail(format!("{error}"));
                return None;
            }
        };
        if self.driver.borrow().is_some() {
            rig.count("connections made again");
        }
        // Behind a shut door nobody answers, and a hung disk keeps the door shut for long.
        let may_fail = || !rig.plan.stream.is_empty() || rig.has_hung.get();
        for attempt in 0..ATTEMPTS {
            match Connection::connect(&rig.ring, &uri, &self.options).await {
                Ok(connection) => return Some(NbdDriver::new(&rig.ring, connection)),
                Err(error) if rig.is_stopped() || !may_fail() || attempt + 1 == ATTEMPTS => {
                    if !rig.is_stopped() {
                        rig.fail(format!("a client cannot connect: {error}"));
                    }
                    return None;
                }
                Err(_) => rig.ring.sleep(SECOND / 1000).await,
            }
        }
        None
    }

    /// Whether the connection over which a request failed is lost.
    pub fn is_lost(driver: &NbdDriver) -> bool {
        driver.connection().lost().is_some()
    }

    /// Says farewell, if there is anybody to say it to.
    pub async fn leave(&self) {
        let driver = self.driver.borrow_mut().take();
        if let Some(driver) = driver {
            driver.connection().disconnect().await;
        }
    }
}
