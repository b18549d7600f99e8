//! Copying between a local disk and an NBD server that is some way off: nbdkit, whose delay filter makes every request
//! take so long, over a Unix socket and TCP.
//!
//! The server is started anew for each run, a target is empty then. In the round of warming up what was copied is read
//! back and compared.

use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use crate::copy::{Task, a_gib, words};
use crate::disks::{Content, Loop, Mount, drop_cache, make_file, sync};
use crate::process::{Daemon, run as run_tool};
use crate::qsd;
use crate::result::Role;
use crate::rounds::{Contender, Context, Values, interleave};
use crate::{Fallible, copy};

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    Mirror,
    Convert,
}

/// One way and one disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Case {
    /// To the server, or from it.
    to_server: bool,
    tcp: bool,
    latency_ms: u32,
    /// Every other 64 KiB instead of all.
    half: bool,
}

impl Case {
    /// All cases.
    pub fn all() -> impl Iterator<Item = Case> {
        (0..24).map(|i| Case {
            to_server: i % 2 == 0,
            half: i / 2 % 2 == 1,
            tcp: i / 4 % 2 == 1,
            latency_ms: [0, 1, 5][i / 8],
        })
    }

    /// As reports call it.
    pub fn name(self) -> String {
        let way = if self.to_server { "to" } else { "from" };
        let transport = if self.tcp { "TCP" } else { "unix" };
        let disk = if self.half { "every other 64 KiB" } else { "sequential" };
        format!("{way}, {transport}, {} ms, {disk}", self.latency_ms)
    }

    fn content(self) -> Content {
        if self.half { Content::Half(1) } else { Content::Random(1) }
    }
}

/// The local files; fields are dropped in this order.
struct Disks {
    xfs: Mount,
    _loop: Loop,
    _tmpfs: Mount,
    bytes: u64,
}

impl Disks {
    fn new(folder: &Path, bytes: u64) -> Fallible<Disks> {
        // Two disks, half of one, and half of one as an overlay.
        let device_bytes = 4 * bytes + (512 << 20);
        let tmpfs = Mount::tmpfs(&folder.join("tmpfs"), device_bytes + (64 << 20))?;
        let device = Loop::new(&tmpfs.path().join("xfs.img"), device_bytes)?;
        let xfs = Mount::xfs(device.path(), &folder.join("disks"))?;
        let disks = Disks { xfs, _loop: device, _tmpfs: tmpfs, bytes };
        for (half, content) in [(false, Content::Random(1)), (true, Content::Half(1))] {
            let source = disks.source(half);
            make_file(&source, bytes)?;
            content.fill(&source, bytes)?;
        }
        make_file(&disks.path("base.img"), bytes)?;
        let (half, overlay) = (disks.source(true), disks.overlay());
        let place = folder.join("made");
        for line in [
            format!("qemu-img convert -f raw -O qcow2 {} {}", half.display(), overlay.display()),
            format!("qemu-img rebase -u -f qcow2 -b base.img -F raw {}", overlay.display()),
        ] {
            run_tool(&words(&line), &place, &|| Ok(()))?;
        }
        Ok(disks)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.xfs.path().join(name)
    }

    fn source(&self, half: bool) -> PathBuf {
        self.path(if half { "half.img" } else { "full.img" })
    }

    /// An image whose uppermost layer holds every other 64 KiB, above a disk of holes.
    fn overlay(&self) -> PathBuf {
        self.path("overlay.qcow2")
    }

    /// The local target, all holes.
    fn fresh_target(&self) -> Fallible<PathBuf> {
        let target = self.path("target.img");
        let _ = std::fs::remove_file(&target);
        make_file(&target, self.bytes)?;
        sync(&target)?;
        Ok(target)
    }
}

/// A server and what leads to it.
struct Server {
    _daemon: Daemon,
    uri: String,
    /// In QEMU's terms.
    node: Value,
}

impl Server {
    fn start(case: Case, disks: &Disks, folder: &Path) -> Fallible<Server> {
        let socket = folder.join("nbd.sock");
        let _ = std::fs::remove_file(&socket);
        let mut line = words("nbdkit --foreground");
        let (uri, server) = if case.tcp {
            // Free a moment ago.
            let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port().to_string();
            line.extend(words(&format!("--ipaddr 127.0.0.1 --port {port}")));
            let node = json!({"type": "inet", "host": "127.0.0.1", "port": port});
            (format!("nbd://127.0.0.1:{port}"), node)
        } else {
            line.extend(words(&format!("--unix {}", socket.display())));
            let node = json!({"type": "unix", "path": socket.display().to_string()});
            (format!("nbd+unix:///?socket={}", socket.display()), node)
        };
        let ms = case.latency_ms;
        if ms > 0 {
            line.push("--filter=delay".into());
        }
        if case.to_server {
            line.extend(words(&format!("memory {}", disks.bytes)));
        } else {
            line.extend(words(&format!("file {}", disks.source(case.half).display())));
        }
        if ms > 0 {
            line.extend(words(&format!("rdelay={ms}ms wdelay={ms}ms delay-extents={ms}ms")));
        }
        let daemon = Daemon::start(&line, &folder.join("server.out"))?;
        let address = uri.trim_start_matches("nbd://").to_owned();
        let is_there = || {
            let is_there = if case.tcp {
                TcpStream::connect(&address).is_ok()
            } else {
                UnixStream::connect(&socket).is_ok()
            };
            Ok(is_there.then_some(()))
        };
        let listening = daemon.until(Duration::from_secs(5), Duration::from_millis(1), is_there)?;
        listening.ok_or_else(|| format!("nobody listens at {uri}"))?;
        Ok(Server { _daemon: daemon, uri, node: json!({"driver": "nbd", "server": server}) })
    }
}

/// How somebody copies.
#[derive(Clone, Debug)]
enum How {
    Tool {
        line: Vec<String>,
        ours: bool,
    },
    /// A job of qemu-storage-daemon with these arguments.
    Job(Value),
}

fn contenders(cx: &Context, work: Work, case: Case) -> Vec<(String, Role, How)> {
    let ours = |options: &[String]| {
        let is_overlay = work == Work::Mirror && case.half && case.to_server;
        let mut line = vec![cx.blockferry.clone()];
        line.extend(words(match (work, is_overlay) {
            (Work::Mirror, true) => "--json --stats mirror --quiet --force -f qcow2 -F raw --sync top",
            (Work::Mirror, false) => "--json --stats mirror --quiet --force -f raw -F raw",
            (Work::Convert, _) => "--json --stats convert --quiet -n -f raw -O raw",
        }));
        line.extend(words("--state-dir STATE"));
        line.extend_from_slice(options);
        line.extend(words("SRC DST"));
        How::Tool { line, ours: true }
    };
    let (name, peers) = match work {
        Work::Mirror => {
            let job = |more: Value| {
                let sync = if case.half && case.to_server { "top" } else { "full" };
                let mut arguments = json!({"sync": sync});
                copy::merge(&mut arguments, &more);
                How::Job(arguments)
            };
            let peers = vec![
                ("QSD mirror, io_uring", job(json!({}))),
                ("QSD mirror, io_uring, buf-size=64M", job(json!({"buf-size": 64 << 20}))),
            ];
            ("blockferry mirror", peers)
        }
        Work::Convert => {
            let tool = |line: &str| How::Tool { line: words(line), ours: false };
            let peers = vec![
                ("qemu-img convert, none", tool("qemu-img convert -n -f raw -O raw -t none -T none SRC DST")),
                (
                    "qemu-img convert, none, -m 16 -W",
                    tool("qemu-img convert -n -f raw -O raw -t none -T none -m 16 -W SRC DST"),
                ),
                ("nbdcopy", tool("nbdcopy --flush SRC DST")),
            ];
            ("blockferry convert", peers)
        }
    };
    let mut all = vec![(name.to_owned(), Role::Ours, ours(&[]))];
    for (variant, options) in &cx.variants {
        all.push((format!("{name}, {variant}"), Role::Ours, ours(options)));
    }
    all.extend(peers.into_iter().map(|(name, how)| (name.to_owned(), Role::Peer, how)));
    all
}

/// What reports show.
fn shown(how: &How, case: Case) -> String {
    let ms = case.latency_ms;
    let server = format!("nbdkit, delays of {ms} ms");
    match how {
        How::Tool { line, .. } => {
            let program = Path::new(&line[0]).file_name().map(|name| name.to_string_lossy().into_owned());
            let program = program.unwrap_or_default();
            format!("{program} {}; {server}", line[1..].join(" "))
        }
        How::Job(arguments) => format!(
            "qemu-storage-daemon; local node with aio=io_uring, cache.direct=on; blockdev-mirror {arguments}, until \
             BLOCK_JOB_READY; {server}"
        ),
    }
}

/// Runs the scenario.
pub fn run(cx: &mut Context, scenario: &str, work: Work) -> Fallible<()> {
    let bytes = if cx.quick { 256 << 20 } else { 1u64 << 30 };
    let disks = Disks::new(&cx.folder, bytes)?;
    for case in Case::all().filter(|case| cx.wants(&case.name())).collect::<Vec<_>>() {
        let (folder, is_counted) = (cx.folder.clone(), cx.counted);
        let entries = contenders(cx, work, case).into_iter().map(|(name, role, how)| {
            let (disks, folder) = (&disks, &folder);
            let command = shown(&how, case);
            let run =
                move |warm_up: bool| once(&how, case, work, disks, folder, (warm_up, warm_up && is_counted));
            Contender { name, role, command, run: Box::new(run) }
        });
        let limits = (cx.rounds_or(6), cx.seconds_max, cx.only.as_slice());
        interleave(&mut cx.sink, limits, (scenario, &case.name()), entries.collect())?;
    }
    Ok(())
}

fn once(
    how: &How,
    case: Case,
    work: Work,
    disks: &Disks,
    folder: &Path,
    (check, count): (bool, bool),
) -> Fallible<Values> {
    let server = Server::start(case, disks, folder)?;
    let is_overlay = work == Work::Mirror && case.half;
    let local = match case.to_server {
        true if is_overlay => disks.overlay(),
        true => disks.source(case.half),
        false => disks.fresh_target()?,
    };
    drop_cache(&local)?;
    if !case.to_server {
        drop_cache(&disks.source(case.half))?;
    }
    let far = PathBuf::from(&server.uri);
    let (source, target) = if case.to_server { (&local, &far) } else { (&far, &local) };
    let task = Task { source, target, before: &[], folder, count };
    let mut values = match how {
        How::Tool { line, ours } => {
            let state = folder.join("state").display().to_string();
            let place = |word: &String| if word == "STATE" { state.clone() } else { word.clone() };
            task.tool(&line.iter().map(place).collect::<Vec<_>>(), true, *ours)?
        }
        How::Job(arguments) => {
            let far = |name: &str| json!({"driver": "raw", "node-name": name, "file": server.node});
            let nodes = match case.to_server {
                true => [local_source(&local, is_overlay)?, far("dst")],
                false => [far("src"), qsd::node("dst", &local, "io_uring")?],
            };
            task.job(nodes, arguments)?
        }
    };
    let content = case.content();
    a_gib(&mut values, if case.half { disks.bytes / 2 } else { disks.bytes });
    if check {
        let copy = match case.to_server {
            true => {
                let back = disks.fresh_target()?;
                let line = ["nbdcopy".to_owned(), server.uri.clone(), back.display().to_string()];
                run_tool(&line, &folder.join("check.out"), &|| sync(&back))?;
                back
            }
            false => local,
        };
        content.check(&copy, disks.bytes)?;
    }
    Ok(values)
}

fn local_source(path: &Path, is_overlay: bool) -> Fallible<Value> {
    let mut node = qsd::node("src", path, "io_uring")?;
    if is_overlay {
        node["driver"] = json!("qcow2");
    }
    Ok(node)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_has_a_name_of_its_own() {
        let names: std::collections::BTreeSet<String> = Case::all().map(Case::name).collect();
        assert_eq!(names.len(), 24);
        assert!(names.contains("from, TCP, 5 ms, every other 64 KiB"));
    }
}
