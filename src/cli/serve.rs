//! `blockferry serve`: gives clients a disk over NBD, without a job. And what `mirror --export` shares.

use std::path::PathBuf;
use std::rc::Rc;

use blockferry_ring::sync::{Either, Notify, either};
use blockferry_ring::{Nanos, Ring, SocketAddress};
use clap::{Args, value_parser};
use serde_json::{Value, json};

use super::exit::{Exit, Failure};
use super::image::{OpenArgs, duration, failed, parse_format, size, speed};
use super::print::{self, product, say};
use super::service::at_once;
use super::signals::{Signals, begin};
use super::{Global, config, room, stats};
use crate::base::limits::{self, STOP_NANOS_MAX};
use crate::base::shown::plain;
use crate::engine::{Engine, Format, ImageOptions};
use crate::export::nbd::{Export, NbdServer, PaceLimits, ServerConfig, ServerError};
use crate::format::qcow2::WhichSnapshot;
use crate::graph::node::{Node, Role, Root};
use crate::protocol::nbd::{
    ExportDetails, ListedExport, NbdAddress, NbdUri, TransmissionFlags, describe_exports,
};

const AFTER: &str = "\
Examples:
  blockferry serve -f raw disk.img --export 'nbd+unix:///?socket=/run/disk.sock'
  blockferry serve --read-only disk.img --export nbd://127.0.0.1:10809/disk
  blockferry serve -r -f raw --offset 1M -D 'the second half' disk.img \\
      --export nbd://127.0.0.1:10809/disk
  blockferry serve --list nbd://127.0.0.1:10809/disk

Clients may be many, with several connections each. The server ends with SIGINT or SIGTERM, or with
--exit-when-idle when the last client has left: requests are finished and what was written is flushed, for five
seconds at most; a second signal ends it at once. SIGUSR1 asks how many are served.";

/// Give clients a disk over NBD, without a job
#[derive(Debug, Args)]
#[command(after_help = AFTER)]
pub struct ServeArgs {
    /// The disk: a file, a block device, nbd://HOST/EXPORT, gluster://HOST/VOLUME/IMAGE, mem:SIZE, null:SIZE or
    /// delay:TIME:NAME
    #[arg(value_name = "IMAGE", required_unless_present = "list")]
    image: Option<String>,
    /// Where clients connect (may be said more than once; port 0 takes a free one)
    #[arg(long, value_name = "URI", required_unless_present = "list", value_parser = export_uri)]
    export: Vec<NbdUri>,
    /// Serve nothing: tell what the server at this NBD URI serves
    #[arg(short = 'L', long, value_name = "URI", conflicts_with_all = ["image", "export"], value_parser = export_uri)]
    list: Option<NbdUri>,
    /// Where the disk begins in a raw image
    #[arg(short, long, value_name = "OFFSET", value_parser = size, default_value = "0", hide_default_value = true)]
    offset: u64,
    /// Bytes of the disk in a raw image [default: up to its end]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    size: Option<u64>,
    /// The disk as this internal snapshot has it, read-only: its id or name, or snapshot.id=ID,snapshot.name=NAME
    #[arg(short = 'l', long = "load-snapshot", value_name = "SNAPSHOT", value_parser = WhichSnapshot::parse)]
    snapshot: Option<WhichSnapshot>,
    /// What clients are told of the disk
    #[arg(short = 'D', long, value_name = "TEXT")]
    description: Option<String>,
    /// Format of the image. Must be said (raw) when clients may write
    #[arg(short, long, value_name = "FORMAT", value_parser = parse_format)]
    format: Option<Format>,
    /// Clients may not write
    #[arg(short, long)]
    read_only: bool,
    /// End when the last client has left
    #[arg(long)]
    exit_when_idle: bool,
    /// Write the process id to this file once clients can connect; it is removed at the end
    #[arg(long, value_name = "FILE", value_parser = crate::cli::image::path)]
    pid_file: Option<PathBuf>,
    #[command(flatten)]
    open: OpenArgs,
    #[command(flatten)]
    clients: ClientArgs,
}

/// What clients of an export may take, the same for every subcommand that has one.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Limits for NBD clients")]
pub struct ClientArgs {
    /// Connections at once, those in the handshake included; further ones wait to be accepted. The limit on open files may
    /// allow fewer
    #[arg(long, value_name = "N", default_value_t = limits::NBD_CLIENTS_PER_SERVER as u64,
        value_parser = value_parser!(u64).range(1..=limits::NBD_CLIENTS_PER_SERVER_MAX as u64))]
    max_connections: u64,
    /// Who has not chosen an export in this time is disconnected (0: no limit)
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = duration)]
    handshake_timeout: u64,
    /// Requests in flight of one connection; further ones stay unread in its socket
    #[arg(long, value_name = "N", default_value_t = limits::NBD_IN_FLIGHT_PER_CLIENT as u64,
        value_parser = value_parser!(u64).range(1..=limits::NBD_IN_FLIGHT_PER_CLIENT_MAX as u64))]
    client_requests: u64,
    /// Bytes of data in flight of one connection; further ones stay unread in its socket
    #[arg(long, value_name = "SIZE", default_value = "16MiB", value_parser = size)]
    client_bytes: u64,
    /// Requests a second of one connection (0: no limit)
    #[arg(long, value_name = "N", default_value_t = 0)]
    client_iops: u64,
    /// Bytes a second, read and written, of one connection; 0 or `unlimited` for no limit
    #[arg(long, value_name = "RATE", default_value = "0", value_parser = speed)]
    client_speed: u64,
}

impl ClientArgs {
    fn config(&self) -> ServerConfig {
        let handshake_ns_max = match self.handshake_timeout {
            0 => limits::NBD_PATIENCE_NS,
            span => span,
        };
        ServerConfig {
            clients_max: room::clients_max(self.max_connections as usize),
            handshake_ns_max,
            in_flight_max: self.client_requests as usize,
            bytes_in_flight_max: self.client_bytes,
            pace: PaceLimits { requests_per_sec: self.client_iops, bytes_per_sec: self.client_speed },
            ..ServerConfig::default()
        }
    }
}

/// An NBD URI of the command line.
pub fn export_uri(text: &str) -> Result<NbdUri, String> {
    text.parse::<NbdUri>().map_err(|error| error.to_string())
}

/// Runs the command.
pub fn main(global: &Global, args: &ServeArgs) -> Result<Exit, Failure> {
    check_exports(&args.export)?;
    let engine = Rc::new(Engine::new(&config(global))?);
    if let Some(uri) = &args.list {
        return list(global, &engine, uri);
    }
    let signals = Signals::new(engine.ring())?;
    let (offset, size, snapshot) = (args.offset, args.size, args.snapshot.clone());
    // A snapshot is only read.
    let read_only = args.read_only || snapshot.is_some();
    let image = ImageOptions { offset, size, snapshot, ..args.open.image(args.format, read_only) };
    let name = args.image.clone().unwrap_or_default();
    let description = args.description.clone();
    let (global, e) = (global.clone(), engine.clone());
    let (uris, idle) = (args.export.clone(), args.exit_when_idle);
    let (pid_file, clients) = (args.pid_file.clone(), args.clients.clone());
    engine.run(async move {
        let ring = e.ring();
        let node = e.open(&name, &image).await?;
        begin();
        let mut exports = Exports { description, ..Exports::with_limits(e.ring(), &clients) };
        for uri in &uris {
            exports.add(&e, &node, uri, read_only, &global).await?;
        }
        if let Some(path) = &pid_file {
            std::fs::write(path, format!("{}\n", std::process::id())).map_err(|error| {
                Failure::text(format!("Writing '{}' failed: {}", path.display(), plain(&error)))
            })?;
        }
        let idle = async {
            match idle {
                true => exports.idle().await,
                false => std::future::pending().await,
            }
        };
        let mut idle = std::pin::pin!(idle);
        while let Either::Second(signal) = either(idle.as_mut(), signals.next()).await {
            if signal.is_ending() {
                break;
            }
            say!("{}", exports.describe());
        }
        let ended = either(exports.stop(), signals.next_ending()).await;
        if let Some(path) = &pid_file {
            // Somebody may have removed it already.
            let _ = std::fs::remove_file(path);
        }
        stats::print(&global, ring);
        match ended {
            Either::First(Ok(())) => return Ok(Exit::Done),
            Either::First(Err(failure)) => print::failure(global.json, &failure),
            Either::Second(_) => {
                say!("blockferry: Ended at once: what clients have written last may not be flushed")
            }
        }
        exports.forget();
        at_once(Exit::Failed)
    })
}

/// How long a server may take to tell what it serves.
const LIST_NANOS: Nanos = 10_000_000_000;

/// Tells what a server serves.
fn list(global: &Global, engine: &Rc<Engine>, uri: &NbdUri) -> Result<Exit, Failure> {
    let (ring, uri) = (engine.ring().clone(), uri.clone());
    let shown = uri.to_string();
    let found = engine.run(async move { describe_exports(&ring, &uri, LIST_NANOS).await });
    let found =
        found.map_err(|error| Failure::text(format!("Listing what '{shown}' serves failed: {error}")))?;
    if global.json {
        print::has_ended();
        product!("{}", json!({"exports": found.iter().map(listed_json).collect::<Vec<_>>()}));
        return Ok(Exit::Done);
    }
    product!("exports available: {}", found.len());
    for export in &found {
        product!(" export: '{}'", export.name);
        if !export.description.is_empty() {
            product!("  description: {}", export.description);
        }
        if let Some(details) = &export.details {
            tell_details(details);
        }
    }
    Ok(Exit::Done)
}

/// What a server tells of an export, in the words of `qemu-nbd --list`.
fn tell_details(details: &ExportDetails) {
    product!("  size:  {}", details.size_bytes);
    let flags = details.flags;
    if !flags.is_empty() {
        product!("  flags: {:#x} ( {} )", flags.0, flags_in_words(flags).join(" "));
    }
    if let Some(sizes) = details.block_sizes {
        product!("  min block: {}", sizes.minimum_bytes);
        product!("  opt block: {}", sizes.preferred_bytes);
        product!("  max block: {}", sizes.maximum_bytes);
    }
    product!("  transaction size: {}", transaction_size(details));
    if !details.meta_contexts.is_empty() {
        product!("  available meta contexts: {}", details.meta_contexts.len());
        for context in &details.meta_contexts {
            product!("   {context}");
        }
    }
}

/// How long a request may be, by the headers that are spoken.
fn transaction_size(details: &ExportDetails) -> &'static str {
    if details.style.is_extended() { "64-bit" } else { "32-bit" }
}

/// What an export can do, by the names that QEMU has for it.
fn flags_in_words(flags: TransmissionFlags) -> Vec<&'static str> {
    let names = [
        (TransmissionFlags::READ_ONLY, "readonly"),
        (TransmissionFlags::SEND_FLUSH, "flush"),
        (TransmissionFlags::SEND_FUA, "fua"),
        (TransmissionFlags::ROTATIONAL, "rotational"),
        (TransmissionFlags::SEND_TRIM, "trim"),
        (TransmissionFlags::SEND_WRITE_ZEROES, "zeroes"),
        (TransmissionFlags::SEND_DF, "df"),
        (TransmissionFlags::CAN_MULTI_CONN, "multi"),
        (TransmissionFlags::SEND_RESIZE, "resize"),
        (TransmissionFlags::SEND_CACHE, "cache"),
        (TransmissionFlags::SEND_FAST_ZERO, "fast-zero"),
        (TransmissionFlags::BLOCK_STATUS_PAYLOAD, "block-status-payload"),
    ];
    names.into_iter().filter(|(flag, _)| flags.contains(*flag)).map(|(_, name)| name).collect()
}

fn listed_json(export: &ListedExport) -> Value {
    let details = export.details.as_ref().map(|details| {
        json!({
            "bytes": details.size_bytes,
            "flags": flags_in_words(details.flags),
            "block-sizes": details.block_sizes.map(|sizes| json!({
                "minimum": sizes.minimum_bytes,
                "preferred": sizes.preferred_bytes,
                "maximum": sizes.maximum_bytes,
            })),
            "transaction-size": transaction_size(details),
            "meta-contexts": details.meta_contexts,
        })
    });
    json!({"name": export.name, "description": export.description, "details": details})
}

/// The servers of one command, one an address.
#[derive(Debug)]
pub struct Exports {
    ring: Ring,
    config: ServerConfig,
    servers: Vec<Listening>,
    /// Told when a client comes or goes.
    changed: Notify,
    /// What clients have, and whether they may have written to it.
    roots: Vec<(Root, bool)>,
    /// What they are told of it, if not the usual.
    description: Option<String>,
}

/// A server and where it listens.
#[derive(Debug)]
struct Listening {
    /// As it was said.
    said: SocketAddress,
    /// With the port that was taken.
    real: SocketAddress,
    server: NbdServer,
    /// The URIs of its exports, as clients say them.
    uris: Vec<String>,
}

/// Refuses exports that are said twice, before any of them is served.
pub fn check_exports(uris: &[NbdUri]) -> Result<(), Failure> {
    for (n, uri) in uris.iter().enumerate() {
        if uris[..n].iter().any(|other| other.address == uri.address && other.export == uri.export) {
            return Err(Failure::usage(format!(
                "The export '{uri}' is said twice: give each its own name or its own address"
            )));
        }
    }
    Ok(())
}

impl Exports {
    /// None yet; clients will have the usual limits.
    pub fn new(ring: &Ring) -> Exports {
        Exports {
            ring: ring.clone(),
            config: ServerConfig::default(),
            servers: Vec::new(),
            changed: ring.notify(),
            roots: Vec::new(),
            description: None,
        }
    }

    /// None yet; clients will have the limits that were said.
    pub fn with_limits(ring: &Ring, clients: &ClientArgs) -> Exports {
        Exports { config: clients.config(), ..Exports::new(ring) }
    }

    /// Gives clients `node` at `uri`, and says where.
    pub async fn add(
        &mut self,
        engine: &Engine,
        node: &Rc<Node>,
        uri: &NbdUri,
        read_only: bool,
        global: &Global,
    ) -> Result<(), Failure> {
        let kind = if read_only { Role::Reader } else { Role::Guest };
        let using = node.attach_in_time(kind).await?;
        let root = Root::new(node, read_only)?;
        drop(using);
        self.roots.push((root.clone(), !read_only));
        let export = Export {
            root,
            description: match &self.description {
                Some(text) => text.clone(),
                None => format!("{} by Blockferry", node.name()),
            },
            writable: !read_only,
            default: true,
        };
        let address = resolve(engine.ring(), &uri.address).await?;
        let shown = |real| NbdUri { address: shown(real), export: uri.export.clone() }.to_string();
        let shown = match self.servers.iter_mut().find(|listening| listening.said == address) {
            Some(listening) => {
                listening.server.add_export(&uri.export, export).map_err(failed)?;
                let shown = shown(&listening.real);
                listening.uris.push(shown.clone());
                shown
            }
            None => {
                let server = NbdServer::telling(&self.ring, self.config.clone(), self.changed.clone());
                server.add_export(&uri.export, export).map_err(failed)?;
                let real = server.listen(&address).map_err(|error| match error {
                    // By the name that was given.
                    ServerError::Listen { errno, .. } => {
                        Failure::text(format!("Listening at '{uri}' failed: {errno}"))
                    }
                    error => failed(error),
                })?;
                let shown = shown(&real);
                let uris = vec![shown.clone()];
                self.servers.push(Listening { said: address, real, server, uris });
                shown
            }
        };
        if global.json {
            print::event(&json!({"event": "listening", "uri": shown, "bytes": node.driver().len()}));
        } else if !global.quiet {
            say!("Serving '{}' at {shown}", node.name());
        }
        Ok(())
    }

    /// Clients that are connected.
    pub fn clients(&self) -> usize {
        self.servers.iter().map(|listening| listening.server.clients()).sum()
    }

    /// Where clients connect.
    pub fn places(&self) -> Vec<&str> {
        self.servers.iter().flat_map(|listening| &listening.uris).map(String::as_str).collect()
    }

    /// Whom it serves, in words.
    fn describe(&self) -> String {
        let places = self.places().join(" and ");
        match self.clients() {
            0 => format!("Serving nobody at {places}"),
            1 => format!("Serving 1 client at {places}"),
            n => format!("Serving {n} clients at {places}"),
        }
    }

    /// Waits until clients have been there and none is left.
    pub async fn idle(&self) {
        let is_idle = || {
            let has_come = self.servers.iter().any(|listening| listening.server.clients_ever() > 0);
            (has_come && self.clients() == 0).then_some(())
        };
        self.changed.until(is_idle).await;
    }

    /// Waits until somebody uses a disk.
    pub async fn until_used(&self) {
        let is_used = || self.servers.iter().any(|listening| listening.server.users() > 0).then_some(());
        self.changed.until(is_used).await;
    }

    /// Waits until nobody is connected.
    pub async fn until_unused(&self) {
        self.changed.until(|| (self.clients() == 0).then_some(())).await;
    }

    /// Ends the service. Requests in flight end, and what clients have written and not flushed is written out, tables of
    /// images too. Nobody waits for long for a disk or a server that hangs: requests to servers are cut off, and what does
    /// not end even then is told.
    pub async fn stop(&self) -> Result<(), Failure> {
        let began = self.ring.clock();
        let stopped = self.in_time(began, async {
            for listening in &self.servers {
                listening.server.stop().await;
            }
        });
        if stopped.await.is_none() {
            return Err(Failure::text(
                "Requests of clients did not end in time; what they have written last may be lost",
            ));
        }
        let mut unflushed = None;
        for (root, _) in self.roots.iter().filter(|(_, is_writable)| *is_writable) {
            match self.in_time(began, root.node().driver().flush()).await {
                Some(Ok(())) => {}
                Some(Err(error)) => {
                    unflushed = Some(format!(
                        "{}. What clients have written last may be lost",
                        error.to_string().trim_end_matches('.')
                    ));
                }
                None => {
                    return Err(Failure::text(format!(
                        "Flushing '{}' did not end in time; what clients have written last may be lost",
                        root.node().name()
                    )));
                }
            }
        }
        unflushed.map_or(Ok(()), |text| Err(Failure::Text(text)))
    }

    /// Waits for `work`; when that takes too long, requests to servers are cut off, so that it ends. `None`: it does not end
    /// even then.
    async fn in_time<T>(&self, began: Nanos, work: impl Future<Output = T>) -> Option<T> {
        let mut work = std::pin::pin!(work);
        for share in [STOP_NANOS_MAX / 10 * 7, STOP_NANOS_MAX / 10 * 9] {
            let rest = (began + share).saturating_sub(self.ring.clock());
            if let Either::First(done) = either(work.as_mut(), self.ring.sleep(rest)).await {
                return Some(done);
            }
            tracing::debug!("requests do not end in time; those to servers are given up");
            self.roots.iter().for_each(|(root, _)| root.node().driver().fail_in_flight());
        }
        None
    }

    /// The process is about to end without a stop: the socket files go.
    pub fn forget(&self) {
        for listening in self.servers.iter().filter(|listening| listening.server.is_listening()) {
            if let SocketAddress::Unix(path) = &listening.real {
                // Somebody may have removed it already.
                let _ = std::fs::remove_file(path);
            }
        }
    }
}

fn shown(address: &SocketAddress) -> NbdAddress {
    match address {
        SocketAddress::Unix(path) => NbdAddress::Unix { path: path.clone() },
        SocketAddress::Tcp(tcp) => NbdAddress::Tcp { host: tcp.ip().to_string(), port: tcp.port() },
    }
}

/// The address behind a URI; names are looked up off the reactor's thread.
pub async fn resolve(ring: &Ring, address: &NbdAddress) -> Result<SocketAddress, Failure> {
    match address {
        NbdAddress::Unix { path } => Ok(SocketAddress::Unix(path.clone())),
        NbdAddress::Tcp { host, port } => {
            let (host, port) = (host.clone(), *port);
            let name = host.clone();
            let found = ring
                .offload(move || {
                    std::net::ToSocketAddrs::to_socket_addrs(&(host.as_str(), port)).map(|mut all| all.next())
                })
                .await;
            match found {
                Ok(Ok(Some(address))) => Ok(SocketAddress::Tcp(address)),
                Ok(Ok(None)) => Err(Failure::text(format!("The host '{name}' has no address"))),
                Ok(Err(error)) => Err(Failure::text(format!("Looking up the host '{name}' failed: {error}"))),
                Err(errno) => Err(Failure::text(format!("Looking up the host '{name}' failed: {errno}"))),
            }
        }
    }
}
