//! Fifty pivots to and fro under four verifying connections, on the real kernel.
//!
//! The engine with its NBD export and the clients live on threads of their own, as they would in life.
//! Three clients hammer disjoint parts of one disk at depth 16, one of them over two connections. Each
//! verifies what it reads, and at the end reads everything back. Meanwhile the disk moves to and fro
//! between a file and a loop device with sectors of 4096 bytes. No client reconnects or sees an error.

use std::path::Path;
use std::process::Command;
use std::rc::Rc;
use std::sync::mpsc;

use blockferry::base::range::ByteRange;
use blockferry::cli::bench::load::{LoadConfig, LoadControl, run_on};
use blockferry::cli::bench::report::LoadReport;
use blockferry::cli::bench::schedule::Pace;
use blockferry::cli::bench::target::{Target, TargetOptions};
use blockferry::engine::{Engine, ImageOptions};
use blockferry::export::nbd::{Export, NbdServer, ServerConfig};
use blockferry::graph::node::{Node, Root};
use blockferry::job::mirror::MirrorOptions;
use blockferry::job::runner::Ending;
use blockferry_ring::{Config, Ring, SocketAddress};

const DISK_BYTES: u64 = 6 << 20;
const PIVOTS: usize = 50;

/// A loop device, detached at the end.
struct Loop(String);

impl Loop {
    fn new(file: &Path) -> Loop {
        let output = Command::new("losetup")
            .args(["--find", "--show", "--direct-io=on", "--sector-size", "4096"])
            .arg(file)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Loop(String::from_utf8(output.stdout).unwrap().trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

/// Runs a verifying load over `connections` until told to stop.
fn client(
    uri: String,
    connections: usize,
    range: ByteRange,
    stop: mpsc::Receiver<()>,
) -> std::thread::JoinHandle<LoadReport> {
    std::thread::spawn(move || {
        let ring = Ring::new(&Config::default()).unwrap();
        let config = LoadConfig {
            range: Some(range),
            read_percent: 40,
            pace: Pace::Closed { depth: 16 },
            verify: true,
            flush_every: Some(500),
            ..LoadConfig::default()
        };
        let r = ring.clone();
        let report = ring.block_on(async move {
            let options = TargetOptions { connections, verified: true, ..TargetOptions::default() };
            let target = Target::open(&r, &uri, &options).await.unwrap();
            let control = LoadControl::new(&r);
            let stopper = control.clone();
            let waiting = r.clone();
            r.spawn(async move {
                let _ = waiting.offload(move || stop.recv()).await;
                stopper.stop();
            });
            let outcome = run_on(&r, &target, &config, &control, None).await.unwrap();
            target.close().await;
            outcome.report
        });
        let _ = ring.shutdown(5_000_000_000);
        report
    })
}

/// Moves the disk to and fro while clients are on it.
async fn pivots(engine: Rc<Engine>, nodes: [Rc<Node>; 2], server: NbdServer) -> usize {
    let [a, b] = nodes;
    let root = Root::new(&a, false).unwrap();
    server
        .add_export("disk", Export { root, description: String::new(), writable: true, default: true })
        .unwrap();
    let (mut from, mut to) = (a, b);
    for i in 0..PIVOTS {
        let mut options = MirrorOptions::new(format!("move{i}"));
        // Holes and zeroes are found often enough here without looking for them.
        options.detect_zeroes = i % 2 == 0;
        let job = engine.mirror(&from, &to, options).await.unwrap();
        job.until_ready().await;
        job.complete().unwrap();
        assert_eq!(job.until_over().await, Ending::Completed, "pivot {i}");
        assert_eq!((from.client_count(), to.client_count()), (0, 1), "pivot {i}");
        assert_eq!((from.filter_count(), from.is_drained(), from.in_flight()), (0, false, 0), "pivot {i}");
        (from, to) = (to, from);
    }
    PIVOTS
}

#[test]
fn fifty_pivots_under_four_verifying_connections() {
    let scratch = tempfile::tempdir().unwrap();
    let paths = ["file.img", "device.img"].map(|name| scratch.path().join(name));
    for path in &paths {
        std::fs::File::create(path).unwrap().set_len(DISK_BYTES).unwrap();
    }
    let device = Loop::new(&paths[1]);
    let socket = scratch.path().join("disk.sock");
    let uri = format!("nbd+unix:///disk?socket={}", socket.display());
    let (ready, is_ready) = mpsc::channel();
    let (done, is_done) = mpsc::channel();
    let (go, may_go) = mpsc::channel::<()>();
    let names = [paths[0].display().to_string(), device.0.clone()];
    let server = std::thread::spawn(move || {
        let engine = Rc::new(Engine::new(&Config::default()).unwrap());
        let nodes = names.map(|name| engine.open_as_said(&name, &ImageOptions::raw()).unwrap());
        let server = NbdServer::new(engine.ring(), ServerConfig::default());
        server.listen(&SocketAddress::Unix(socket)).unwrap();
        let (e, s) = (engine.clone(), server.clone());
        engine.run(async move {
            ready.send(()).unwrap();
            let ring = e.ring().clone();
            let count = pivots(e, nodes, s.clone()).await;
            done.send(count).unwrap();
            ring.offload(move || may_go.recv()).await.unwrap().unwrap();
            s.stop().await;
        });
    });
    is_ready.recv().unwrap();
    let part = DISK_BYTES / 3;
    let mut clients = Vec::new();
    for (i, connections) in [1, 2, 1].into_iter().enumerate() {
        let (stop, stopped) = mpsc::channel();
        let range = ByteRange::at_saturating(part * i as u64, part);
        clients.push((stop, client(uri.clone(), connections, range, stopped)));
    }
    let count = is_done.recv().expect("the pivots ended");
    let mut operations = 0;
    for (stop, client) in clients {
        stop.send(()).unwrap();
        let report = client.join().unwrap();
        let verify = report.verify.as_ref().expect("the load verifies");
        assert!(verify.is_good(), "{report:?}");
        assert_eq!(
            (report.reads.errors, report.writes.errors, report.flushes.errors),
            (0, 0, 0),
            "{report:?}"
        );
        assert!(report.writes.operations > 100 && report.reads.operations > 100, "{report:?}");
        operations += report.reads.operations + report.writes.operations;
    }
    go.send(()).unwrap();
    server.join().unwrap();
    println!("{count} pivots under {operations} verified requests");
}
