//! The server: exports by name, listening sockets, and the sessions of those who connect.
//!
//! A connection is a session task from accept to end. It negotiates against a deadline, waits at its export's door if
//! that is shut (a client that connects in the midst of a pivot must see the disk after it), and is served. The server
//! keeps every session's stream, so that it can end all of them, or those of one export: streams are shut down,
//! requests in flight end by themselves, and only then is the session gone.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use blockferry_ring::sync::{Either, Notify, either};
use blockferry_ring::{Errno, File, FileKind, Nanos, Ring, Serving, SocketAddress};

use super::client::Client;
use super::handshake::{Chosen, negotiate, send};
use super::output::Output;
use super::pace::PaceLimits;
use super::quota::{QuotaLimits, Seats};
use crate::base::limits;
use crate::base::process::Process;
use crate::block::Reserve;
use crate::graph::node::Root;
use crate::protocol::nbd::{
    BlockSizes, ExportDirectory, ExportInfo, ExportListing, MetaContext, STRING_BYTES_MAX, ServerPolicy,
    TransmissionFlags,
};

/// How a server treats its clients.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Clients at once; further ones wait to be accepted.
    pub clients_max: usize,
    /// Time in which a handshake has to end, in nanoseconds.
    pub handshake_ns_max: Nanos,
    /// Requests in flight of one client.
    pub in_flight_max: usize,
    /// Payload bytes in flight of one client.
    pub bytes_in_flight_max: u64,
    /// When memory is short, clients that keep the server waiting for this long are disconnected, in nanoseconds.
    pub stall_ns_max: Nanos,
    /// Largest read or write, in bytes: at most [`limits::NBD_REQUEST_BYTES_MAX`].
    pub request_bytes_max: u32,
    /// How fast one client may ask.
    pub pace: PaceLimits,
}

impl Default for ServerConfig {
    fn default() -> ServerConfig {
        ServerConfig {
            clients_max: limits::NBD_CLIENTS_PER_SERVER,
            handshake_ns_max: limits::NBD_HANDSHAKE_NS_MAX,
            in_flight_max: limits::NBD_IN_FLIGHT_PER_CLIENT,
            bytes_in_flight_max: limits::NBD_BYTES_IN_FLIGHT_PER_CLIENT,
            stall_ns_max: limits::NBD_STALL_NS_MAX,
            request_bytes_max: limits::NBD_REQUEST_BYTES_MAX,
            pace: PaceLimits::default(),
        }
    }
}

/// A disk that clients may use.
#[derive(Clone, Debug)]
pub struct Export {
    /// The disk.
    pub root: Root,
    /// Words for a person; may be empty.
    pub description: String,
    /// Whether clients may write. A read-only root is never written.
    pub writable: bool,
    /// Whether clients that name no export get this one.
    pub default: bool,
}

/// What happens to an export's clients when it is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RemoveMode {
    /// The export stays if it has clients.
    Safe,
    /// They are disconnected.
    Hard,
}

/// Why the server did not do something.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The name is in use.
    #[error("An export named '{name}' is there already.")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// The name or description is over the protocol's limit.
    #[error("The {what} of an export has {bytes} bytes; NBD allows {STRING_BYTES_MAX}.")]
    TooLong {
        /// Which string.
        what: &'static str,
        /// Its length.
        bytes: usize,
    },
    /// The table is full.
    #[error("The server has {max} exports already; it cannot have more.")]
    TooManyExports {
        /// The limit.
        max: usize,
    },
    /// There is no such export.
    #[error("There is no export named '{name}'.")]
    NoSuchExport {
        /// The name.
        name: String,
    },
    /// It has clients.
    #[error("The export '{name}' is in use (clients: {clients}).")]
    InUse {
        /// The name.
        name: String,
        /// How many.
        clients: usize,
    },
    /// Nobody can connect there.
    #[error("Listening on {address} failed: {errno}.")]
    Listen {
        /// The address.
        address: SocketAddress,
        /// The error.
        errno: Errno,
    },
}

/// An export as it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportStatus {
    /// Its name.
    pub name: String,
    /// Words for a person.
    pub description: String,
    /// Whether clients may write.
    pub writable: bool,
    /// Clients that use it.
    pub clients: usize,
}

#[derive(Debug)]
struct Entry {
    root: Root,
    info: ExportInfo,
    default: bool,
    clients: Cell<usize>,
    removed: Cell<bool>,
    /// Long changes of all its clients.
    changes: Rc<Seats>,
}

/// A connection, as the server keeps it.
#[derive(Debug)]
struct Session {
    stream: File,
    /// What it chose, once it has.
    export: Option<Rc<Entry>>,
    /// What it is in the transmission phase.
    client: Option<Rc<Client>>,
}

impl Session {
    /// Shows it the door, whatever it waits for.
    fn hang_up(&self, ring: &Ring) {
        match &self.client {
            Some(client) => client.hang_up(),
            None => ring.shutdown_stream(&self.stream),
        }
    }
}

#[derive(Debug)]
struct Inner {
    ring: Ring,
    config: ServerConfig,
    /// In the order in which they were added: clients list them so.
    exports: RefCell<Vec<Rc<Entry>>>,
    sessions: RefCell<BTreeMap<u64, Session>>,
    session_next: Cell<u64>,
    listeners: Cell<usize>,
    /// Accept loops of an earlier generation end.
    generation: Cell<u64>,
    stopping: Cell<bool>,
    /// The task that looks after the memory is there.
    watching: Cell<bool>,
    /// From when clients may come on, no call on this thread may wait for a disk.
    serving: OnceCell<Serving>,
    /// Told when a session comes or goes, a listener goes, or the server stops.
    changed: Notify,
}

/// An NBD server; clones are the same server.
#[derive(Clone, Debug)]
pub struct NbdServer(Rc<Inner>);

impl NbdServer {
    /// A server without exports that listens nowhere.
    pub fn new(ring: &Ring, config: ServerConfig) -> NbdServer {
        // What /proc tells is asked for now, once: when clients are there, nothing that waits is.
        Process::own();
        NbdServer::telling(ring, config, ring.notify())
    }

    /// The same; `changed` is told of clients that come and go, by this server and by others that have it.
    pub fn telling(ring: &Ring, config: ServerConfig, changed: Notify) -> NbdServer {
        NbdServer(Rc::new(Inner {
            ring: ring.clone(),
            config,
            exports: RefCell::default(),
            sessions: RefCell::default(),
            session_next: Cell::new(1),
            listeners: Cell::new(0),
            generation: Cell::new(0),
            stopping: Cell::new(false),
            watching: Cell::new(false),
            serving: OnceCell::new(),
            changed,
        }))
    }

    /// Adds an export.
    pub fn add_export(&self, name: &str, export: Export) -> Result<(), ServerError> {
        for (what, text) in [("name", name), ("description", &export.description)] {
            if text.len() > STRING_BYTES_MAX {
                return Err(ServerError::TooLong { what, bytes: text.len() });
            }
        }
        let mut exports = self.0.exports.borrow_mut();
        if exports.iter().any(|entry| entry.info.name == name) {
            return Err(ServerError::NameTaken { name: name.to_owned() });
        }
        if exports.len() >= limits::NBD_EXPORTS_PER_SERVER {
            return Err(ServerError::TooManyExports { max: limits::NBD_EXPORTS_PER_SERVER });
        }
        let info = describe(name, &export, &self.0.config);
        exports.push(Rc::new(Entry {
            root: export.root,
            info,
            default: export.default,
            clients: Cell::new(0),
            removed: Cell::new(false),
            changes: Seats::new(&self.0.ring, limits::NBD_LONG_CHANGES_PER_EXPORT),
        }));
        Ok(())
    }

    /// Removes an export. With [`RemoveMode::Hard`] its clients are disconnected; their requests in flight end later.
    pub fn remove_export(&self, name: &str, mode: RemoveMode) -> Result<(), ServerError> {
        let mut exports = self.0.exports.borrow_mut();
        let Some(at) = exports.iter().position(|entry| entry.info.name == name) else {
            return Err(ServerError::NoSuchExport { name: name.to_owned() });
        };
        let clients = exports[at].clients.get();
        if mode == RemoveMode::Safe && clients > 0 {
            return Err(ServerError::InUse { name: name.to_owned(), clients });
        }
        let entry = exports.remove(at);
        drop(exports);
        entry.removed.set(true);
        for session in self.0.sessions.borrow().values() {
            if session.export.as_ref().is_some_and(|export| Rc::ptr_eq(export, &entry)) {
                session.hang_up(&self.0.ring);
            }
        }
        Ok(())
    }

    /// Waits until nobody uses a removed export's `root` any more.
    pub async fn export_released(&self, name: &str) {
        let gone = || {
            let sessions = self.0.sessions.borrow();
            let is_it = |entry: &Rc<Entry>| entry.info.name == name && entry.removed.get();
            let uses = |session: &Session| session.export.as_ref().is_some_and(is_it);
            (!sessions.values().any(uses)).then_some(())
        };
        self.0.changed.until(gone).await;
    }

    /// The exports in the order in which they were added.
    pub fn exports(&self) -> Vec<ExportStatus> {
        let status = |entry: &Rc<Entry>| ExportStatus {
            name: entry.info.name.clone(),
            description: entry.info.description.clone(),
            writable: !entry.info.read_only,
            clients: entry.clients.get(),
        };
        self.0.exports.borrow().iter().map(status).collect()
    }

    /// Listens, and accepts clients from now on; gives the address in use (port 0 becomes a real one). A server may
    /// listen in several places.
    pub fn listen(&self, address: &SocketAddress) -> Result<SocketAddress, ServerError> {
        let (listener, address) = listen(&self.0.ring, address)
            .map_err(|errno| ServerError::Listen { address: address.clone(), errno })?;
        self.0.serving.get_or_init(|| self.0.ring.serve());
        self.0.listeners.set(self.0.listeners.get() + 1);
        let inner = self.0.clone();
        let path = match &address {
            SocketAddress::Unix(path) => Some(path.clone()),
            SocketAddress::Tcp(_) => None,
        };
        let name = SocketName { ring: self.0.ring.clone(), path };
        // Of now: who stops listening before the task has its first turn means this listener, too.
        let generation = inner.generation.get();
        self.0.ring.spawn(async move {
            inner.accept_all(&listener, generation).await;
            // The name first: whoever finds it can connect.
            name.remove().await;
            drop(listener);
            inner.listeners.set(inner.listeners.get() - 1);
            inner.changed.notify();
        });
        Ok(address)
    }

    /// Serves one connection that somebody else accepted.
    pub fn serve(&self, stream: File) {
        self.0.serving.get_or_init(|| self.0.ring.serve());
        self.0.clone().start(stream);
    }

    /// Clients that are connected, those in the handshake included.
    pub fn clients(&self) -> usize {
        self.0.sessions.borrow().len()
    }

    /// Whether clients can connect.
    pub fn is_listening(&self) -> bool {
        self.0.listeners.get() > 0
    }

    /// Clients that have ever connected.
    pub fn clients_ever(&self) -> u64 {
        self.0.session_next.get() - 1
    }

    /// Clients that use an export: those in the handshake are not among them.
    pub fn users(&self) -> usize {
        self.0.sessions.borrow().values().filter(|session| session.client.is_some()).count()
    }

    /// Waits until a client has been there and none is left.
    pub async fn idle(&self) {
        let idle = || (self.clients_ever() > 0 && self.0.sessions.borrow().is_empty()).then_some(());
        self.0.changed.until(idle).await;
    }

    /// Stops listening; sockets close and their files go. Clients that are connected stay.
    pub async fn stop_accepting(&self) {
        self.0.generation.set(self.0.generation.get() + 1);
        self.0.changed.notify();
        self.0.changed.until(|| (self.0.listeners.get() == 0).then_some(())).await;
    }

    /// Stops listening, disconnects all clients, and waits until their requests in flight have ended. Requests that
    /// wait at a shut door are waited for too.
    pub async fn stop(&self) {
        self.0.stopping.set(true);
        self.stop_accepting().await;
        for session in self.0.sessions.borrow().values() {
            session.hang_up(&self.0.ring);
        }
        self.0.changed.until(|| self.0.sessions.borrow().is_empty().then_some(())).await;
        self.0.stopping.set(false);
    }
}

/// The name of a socket on which somebody listens; it goes with this, however the listening ends.
struct SocketName {
    ring: Ring,
    /// Until it is removed.
    path: Option<PathBuf>,
}

impl SocketName {
    /// Removes it without keeping clients waiting.
    async fn remove(mut self) {
        if let Some(path) = self.path.take() {
            self.removed(&path, self.ring.aside().unlink(&path).await);
        }
    }

    fn removed(&self, path: &Path, result: Result<(), Errno>) {
        if let Err(errno) = result {
            tracing::debug!(path = %path.display(), %errno, "the socket file could not be removed");
        }
    }
}

impl Drop for SocketName {
    fn drop(&mut self) {
        if let Some(path) = self.path.take() {
            self.removed(&path, self.ring.unlink(&path));
        }
    }
}

/// Listens. What a server that died left of a unix socket is removed: nobody answers there.
fn listen(ring: &Ring, address: &SocketAddress) -> Result<(File, SocketAddress), Errno> {
    match (ring.listen(address), address) {
        (Err(Errno::EADDRINUSE), SocketAddress::Unix(path)) if is_stale_socket(ring, path) => {
            tracing::debug!(%address, "a stale socket file is removed");
            ring.unlink(path)?;
            ring.listen(address)
        }
        (result, _) => result,
    }
}

fn is_stale_socket(ring: &Ring, path: &Path) -> bool {
    // Only sockets: connecting to any other file is refused just the same.
    ring.lookup(path) == Ok(Some(FileKind::Socket))
        && matches!(ring.connect(&SocketAddress::Unix(path.to_owned())), Err(Errno::ECONNREFUSED))
}

/// What clients are told of an export.
fn describe(name: &str, export: &Export, config: &ServerConfig) -> ExportInfo {
    use TransmissionFlags as Flags;
    let features = export.root.features();
    let read_only = features.read_only || !export.writable;
    // A flush goes to the node that all connections share, so it covers the writes of all.
    let mut flags =
        Flags::SEND_FLUSH | Flags::SEND_FUA | Flags::SEND_DF | Flags::SEND_CACHE | Flags::CAN_MULTI_CONN;
    if !read_only {
        // That zeroing is fast is no promise: what this says is that a refusal comes fast where it is not. Disks lose
        // and, by a pivot, win that capability while clients are connected.
        flags = flags | Flags::SEND_TRIM | Flags::SEND_WRITE_ZEROES | Flags::SEND_FAST_ZERO;
    }
    let maximum_bytes =
        config.request_bytes_max.clamp(limits::NBD_RECV_BYTES_MIN as u32, limits::NBD_REQUEST_BYTES_MAX);
    // Both are powers of two.
    let preferred_max = 1 << maximum_bytes.ilog2();
    let preferred_bytes = features.preferred_block.next_power_of_two().clamp(512, 1 << 20).min(preferred_max);
    ExportInfo {
        name: name.to_owned(),
        description: export.description.clone(),
        size_bytes: features.len,
        flags,
        read_only,
        block_sizes: BlockSizes { minimum_bytes: 1, preferred_bytes, maximum_bytes },
        meta_contexts: vec![MetaContext::BaseAllocation],
    }
}

impl ExportDirectory for Inner {
    fn list(&self) -> Vec<ExportListing> {
        let listing = |entry: &Rc<Entry>| ExportListing {
            name: entry.info.name.clone(),
            description: entry.info.description.clone(),
        };
        self.exports.borrow().iter().map(listing).collect()
    }

    fn lookup(&self, name: &str) -> Option<ExportInfo> {
        self.find(name).map(|entry| entry.info.clone())
    }
}

impl Inner {
    /// An export by name; without one, the export without a name, then the default one.
    fn find(&self, name: &str) -> Option<Rc<Entry>> {
        let exports = self.exports.borrow();
        let named = exports.iter().find(|entry| entry.info.name == name);
        let found = named.or_else(|| exports.iter().find(|entry| name.is_empty() && entry.default));
        found.cloned()
    }

    /// Accepts clients until the generation changes.
    async fn accept_all(self: &Rc<Inner>, listener: &File, generation: u64) {
        let is_over = || self.generation.get() != generation;
        let mut is_told = false;
        loop {
            let has_room = || self.sessions.borrow().len() < self.config.clients_max;
            self.changed.until(|| (is_over() || has_room()).then_some(())).await;
            let over = self.changed.until(|| is_over().then_some(()));
            match either(over, self.ring.accept(listener)).await {
                Either::First(()) => return,
                Either::Second(Ok(stream)) => {
                    is_told = false;
                    self.clone().start(stream);
                }
                Either::Second(Err(errno)) => {
                    // While descriptors are short this fails again and again; it is said once.
                    if !std::mem::replace(&mut is_told, true) {
                        tracing::warn!(%errno, "accepting an NBD client failed; it is tried again");
                    }
                    let over = self.changed.until(|| is_over().then_some(()));
                    either(over, self.ring.sleep(limits::NBD_ACCEPT_PAUSE_NS)).await;
                }
            }
        }
    }

    /// Looks after the memory until there are no clients: one that holds some of it and does not move has to go when
    /// it is needed.
    async fn watch(&self) {
        loop {
            let empty = self.changed.until(|| self.sessions.borrow().is_empty().then_some(()));
            let span = self.config.stall_ns_max / 4;
            if let Either::First(()) = either(empty, self.ring.sleep(span.max(1_000_000))).await {
                self.watching.set(false);
                return;
            }
            let arena = self.ring.arena();
            let free = arena.bytes().saturating_sub(arena.bytes_used());
            if free >= arena.bytes() / limits::NBD_STALL_FREE_DIVISOR {
                continue;
            }
            let latest = self.ring.now().saturating_sub(self.config.stall_ns_max);
            for client in self.sessions.borrow().values().filter_map(|session| session.client.as_ref()) {
                if client.stalled_since().is_some_and(|since| since <= latest) {
                    tracing::warn!(
                        client = client.id,
                        "an NBD client that does not move is disconnected: memory is short"
                    );
                    client.hang_up();
                }
            }
        }
    }

    fn start(self: Rc<Inner>, stream: File) {
        let id = self.session_next.get();
        self.session_next.set(id + 1);
        if !self.watching.replace(true) {
            let server = self.clone();
            self.ring.spawn(async move { server.watch().await });
        }
        self.sessions.borrow_mut().insert(id, Session { stream: stream.clone(), export: None, client: None });
        let ring = self.ring.clone();
        ring.spawn(async move {
            tracing::debug!(client = id, "an NBD client connected");
            self.run(id, &stream).await;
            drop(stream);
            let session = self.sessions.borrow_mut().remove(&id);
            if let Some(entry) = session.and_then(|session| session.export) {
                entry.clients.set(entry.clients.get() - 1);
            }
            self.changed.notify();
        });
    }

    /// One session, from its first byte to its last.
    async fn run(&self, id: u64, stream: &File) {
        let policy = ServerPolicy { extended_headers: true, ..ServerPolicy::default() };
        let span = self.config.handshake_ns_max;
        let talk = negotiate(&self.ring, stream, policy, self);
        let Chosen { negotiated, answer, early } = match either(talk, self.ring.sleep(span)).await {
            Either::First(Ok(chosen)) => chosen,
            Either::First(Err(reason)) => {
                tracing::debug!(client = id, %reason, "an NBD handshake ended");
                return;
            }
            Either::Second(()) => {
                tracing::debug!(client = id, "an NBD client did not finish its handshake in time");
                return;
            }
        };
        let Some(entry) = self.find(&negotiated.export.name) else { return };
        if let Some(session) = self.sessions.borrow_mut().get_mut(&id) {
            session.export = Some(entry.clone());
            entry.clients.set(entry.clients.get() + 1);
        }
        // Whoever comes in the midst of a drain waits here, so that it sees the disk on which the drain ends.
        let root = entry.root.client();
        root.admit().await;
        if entry.removed.get() || self.stopping.get() {
            return;
        }
        match either(send(&self.ring, stream, &answer), self.ring.sleep(span)).await {
            Either::First(Ok(())) => {}
            Either::First(Err(_)) | Either::Second(()) => {
                tracing::debug!(client = id, "an NBD client did not take the end of its handshake");
                return;
            }
        }
        let quota = QuotaLimits {
            requests_max: self.config.in_flight_max.max(1),
            bytes_max: self.config.bytes_in_flight_max,
            pace: self.config.pace,
            changes_of_export: entry.changes.clone(),
        };
        let reserve = Reserve::empty(&self.ring, Output::RESERVE_BYTES);
        reserve.fill().await;
        let client = Client::new(&self.ring, id, stream, root, &negotiated, quota, reserve);
        drop((negotiated, answer));
        if let Some(session) = self.sessions.borrow_mut().get_mut(&id) {
            session.client = Some(client.clone());
        }
        self.changed.notify();
        let end = client.serve(&early).await;
        tracing::debug!(client = id, export = entry.info.name, %end, "an NBD session ended");
    }
}
