//! `blockferry serve`: gives clients a disk over NBD, without a job. And what `mirror --export` shares.

use std::path::PathBuf;
use std::rc::Rc;

use blockferry_ring::sync::{Either, either};
use blockferry_ring::{Ring, SocketAddress};
use clap::{Args, value_parser};
use serde_json::json;

use super::exit::{Exit, Failure};
use super::image::{OpenArgs, duration, failed, parse_format, size, speed};
use super::signals::Signals;
use super::{Global, config, stats};
use crate::base::limits::{self, STOP_NANOS_MAX};
use crate::engine::{Engine, Format};
use crate::export::nbd::{Export, NbdServer, PaceLimits, ServerConfig};
use crate::graph::node::{Node, Root, UseKind};
use crate::protocol::nbd::{NbdAddress, NbdUri};

const AFTER: &str = "\
Examples:
  blockferry serve -f raw disk.img --export 'nbd+unix:///?socket=/run/disk.sock'
  blockferry serve --read-only disk.img --export nbd://127.0.0.1:10809/disk

Clients may be many, with several connections each. The server ends with SIGINT or SIGTERM, or with
--exit-when-idle when the last client has left.";

/// Give clients a disk over NBD, without a job
#[derive(Debug, Args)]
#[command(after_help = AFTER)]
pub struct ServeArgs {
    /// The disk: a file, a block device, nbd://HOST/EXPORT, gluster://HOST/VOLUME/IMAGE, mem:SIZE, null:SIZE or
    /// delay:TIME:NAME
    #[arg(value_name = "IMAGE")]
    image: String,
    /// Where clients connect (may be said more than once; port 0 takes a free one)
    #[arg(long, value_name = "URI", required = true, value_parser = export_uri)]
    export: Vec<NbdUri>,
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
    #[arg(long, value_name = "FILE")]
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
    /// Connections at once, those in the handshake included; further ones wait to be accepted
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
            clients_max: self.max_connections as usize,
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
    let engine = Rc::new(Engine::new(&config(global))?);
    let signals = Signals::new(engine.ring())?;
    let image = args.open.image(args.format, args.read_only);
    let name = args.image.clone();
    let (global, e) = (global.clone(), engine.clone());
    let (uris, read_only, idle) = (args.export.clone(), args.read_only, args.exit_when_idle);
    let (pid_file, clients) = (args.pid_file.clone(), args.clients.clone());
    engine.run(async move {
        let node = e.open(&name, &image).await?;
        let mut exports = Exports::with_limits(e.ring(), &clients);
        for uri in &uris {
            exports.add(&e, &node, uri, read_only, &global).await?;
        }
        if let Some(path) = &pid_file {
            std::fs::write(path, format!("{}\n", std::process::id()))
                .map_err(|error| Failure::text(format!("Writing '{}' failed: {error}", path.display())))?;
        }
        if idle {
            either(exports.idle(), signals.next()).await;
        } else {
            signals.next().await;
        }
        exports.stop().await;
        if let Some(path) = &pid_file {
            // Somebody may have removed it already.
            let _ = std::fs::remove_file(path);
        }
        stats::print(&global, e.ring());
        Ok(Exit::Done)
    })
}

/// The servers of one command, one an address.
#[derive(Debug)]
pub struct Exports {
    ring: Ring,
    config: ServerConfig,
    servers: Vec<Listening>,
    /// What clients have, and whether they may have written to it.
    roots: Vec<(Root, bool)>,
}

/// A server and where it listens.
#[derive(Debug)]
struct Listening {
    /// As it was said.
    said: SocketAddress,
    /// With the port that was taken.
    real: SocketAddress,
    server: NbdServer,
}

impl Exports {
    /// None yet; clients will have the usual limits.
    pub fn new(ring: &Ring) -> Exports {
        Exports {
            ring: ring.clone(),
            config: ServerConfig::default(),
            servers: Vec::new(),
            roots: Vec::new(),
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
        let kind = if read_only { UseKind::Reader } else { UseKind::Guest };
        let using = node.attach_in_time(kind).await?;
        let root = Root::new(node, read_only)?;
        drop(using);
        self.roots.push((root.clone(), !read_only));
        let export = Export {
            root,
            description: format!("{} by Blockferry", node.name()),
            writable: !read_only,
            default: true,
        };
        let address = resolve(engine.ring(), &uri.address).await?;
        let known = self.servers.iter().find(|listening| listening.said == address);
        let real = match known {
            Some(listening) => {
                listening.server.add_export(&uri.export, export).map_err(failed)?;
                listening.real.clone()
            }
            None => {
                let server = NbdServer::new(&self.ring, self.config.clone());
                server.add_export(&uri.export, export).map_err(failed)?;
                let real = server.listen(&address).map_err(failed)?;
                self.servers.push(Listening { said: address, real: real.clone(), server });
                real
            }
        };
        let shown = NbdUri { address: shown(&real), export: uri.export.clone() }.to_string();
        if global.json {
            println!("{}", json!({"event": "listening", "uri": shown, "bytes": node.driver().len()}));
        } else {
            eprintln!("Serving '{}' at {shown}", node.name());
        }
        Ok(())
    }

    /// Clients that are connected.
    pub fn clients(&self) -> usize {
        self.servers.iter().map(|listening| listening.server.clients()).sum()
    }

    /// Waits until clients have been there and none is left.
    pub async fn idle(&self) {
        loop {
            for listening in &self.servers {
                listening.server.idle().await;
            }
            if self.clients() == 0 {
                return;
            }
        }
    }

    /// Goes on serving those who are connected until the last has left, or a signal comes.
    pub async fn serve_until_idle(&self, signals: &Signals) {
        if self.clients() == 0 {
            return;
        }
        match either(self.idle(), signals.next_ending()).await {
            Either::First(()) => {}
            Either::Second(signal) => tracing::info!(?signal, "ending the service"),
        }
    }

    /// Ends the service. What clients have written and not flushed is written out, tables of images too. Nobody waits for
    /// ever for a server that hangs.
    pub async fn stop(&self) {
        self.in_time(async {
            for listening in &self.servers {
                listening.server.stop().await;
            }
        })
        .await;
        for (root, _) in self.roots.iter().filter(|(_, is_writable)| *is_writable) {
            if let Err(error) = self.in_time(root.node().driver().flush()).await {
                tracing::error!(%error, "what clients have written last may be lost");
            }
        }
    }

    /// Waits for `work`; when that takes too long, requests to servers are cut off, so that it ends.
    async fn in_time<T>(&self, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        loop {
            if let Either::First(done) = either(work.as_mut(), self.ring.sleep(STOP_NANOS_MAX)).await {
                return done;
            }
            tracing::warn!("requests do not end in time; those to servers are given up");
            self.roots.iter().for_each(|(root, _)| root.node().driver().fail_in_flight());
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
