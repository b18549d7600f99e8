//! Clients that ask for the status of a disk in thousands of pieces, thousands of times, and leave; beside them an honest
//! client that must never wait, many who are silent, and one who comes late. And walks over an image's tables, which let
//! others have their turn.

use std::cell::Cell;
use std::path::Path;
use std::rc::Rc;

use blockferry::base::planted::{Bug, plant};
use blockferry::block::Node;
use blockferry::engine::ImageOptions;
use blockferry::engine::open::open_qcow2;
use blockferry::export::nbd::ServerConfig;
use blockferry::format::qcow2::{CreateOptions, Preallocation, Qcow2, Repair};
use blockferry::protocol::nbd::{ConnectOptions, Connection, NbdUri};
use blockferry::protocol::open::{OpenOptions, open};
use blockferry_ring::mem::Region;
use blockferry_ring::sim::{FileModel, Latency, StreamModel, World, WorldConfig};
use blockferry_ring::sync::either;
use blockferry_ring::{Config, Nanos, Ring, SocketAddress};

use super::hostile::{MILLI, SOCKET, check_clean, memory, serve};
use common::nbd_script::Script;

/// The longest that an honest client may wait, whoever else is there.
const GAP: Nanos = 50 * MILLI;
const DISK: u64 = 24 << 20;
const ATTACKERS: usize = 16;
const IDLE: usize = 128;
/// Block status requests of one attacker.
const QUESTIONS: usize = 2000;

/// What came of it.
#[derive(Debug)]
struct Outcome {
    /// The honest client's longest wait.
    longest: Nanos,
    /// How long it took until those were forgotten who had left.
    forgotten: Nanos,
    /// How long the one who came in the midst of it had to wait.
    let_in: Nanos,
}

impl Outcome {
    fn is_good(&self) -> bool {
        self.longest < GAP && self.forgotten < GAP && self.let_in < 1_000 * MILLI
    }
}

fn world(seed: u64) -> (World, Ring) {
    let stream = StreamModel { latency: Latency::fixed(20_000), ..StreamModel::default() };
    let world = World::new(WorldConfig { stream, offload: Latency::fixed(60_000), ..WorldConfig::new(seed) });
    world.add_file("/disk", FileModel { latency: Latency::fixed(60_000), ..FileModel::regular(DISK) });
    for at in (0..DISK).step_by(8192) {
        world.write_raw("/disk", at, &[7; 4096]);
    }
    let config = Config { arena_bytes: 24 << 20, ..Config::default() };
    let ring = Ring::with_backend(world.backend(), &config).unwrap();
    (world, ring)
}

/// Asks all at once, reads nothing of what it is told, and leaves after a while.
async fn attack(ring: Ring, region: Region, script_bytes: usize) {
    let Ok(stream) = ring.connect(&SocketAddress::Unix(SOCKET.into())) else { return };
    let all = region.buf(0, script_bytes).unwrap().freeze();
    let talk = ring.send(&stream, all);
    either(talk, ring.sleep(20 * MILLI)).await;
    ring.sleep(20 * MILLI).await;
}

async fn connect(ring: &Ring) -> Rc<Connection> {
    let uri: NbdUri = format!("nbd+unix:///disk?socket={SOCKET}").parse().unwrap();
    Connection::connect(ring, &uri, &ConnectOptions::default()).await.unwrap()
}

/// The honest client reads until `over`; gives its longest wait.
async fn read(ring: Ring, connection: Rc<Connection>, over: Rc<Cell<bool>>) -> Nanos {
    let mut longest = 0;
    while !over.get() {
        let began = ring.clock();
        let (buf, result) = connection.read(8192, ring.alloc(4096).await).await;
        result.unwrap();
        assert!(buf.as_slice().iter().all(|byte| *byte == 7));
        longest = longest.max(ring.clock() - began);
        ring.sleep(MILLI / 2).await;
    }
    longest
}

async fn flood(ring: Ring) -> Outcome {
    let (node, server) = serve(&ring, ServerConfig::default());
    let over = Rc::new(Cell::new(false));
    let honest = connect(&ring).await;
    let waits = ring.spawn_with_result(read(ring.clone(), honest.clone(), over.clone()));
    let mut script = Script::new();
    script.bytes.truncate(script.handshake_bytes);
    for _ in 0..QUESTIONS {
        script.request(7, 0, (DISK - (4 << 20)) as u32);
    }
    let region = memory(&script);
    let mut idle = Vec::new();
    for _ in 0..IDLE {
        let stream = ring.connect(&SocketAddress::Unix(SOCKET.into())).unwrap();
        let handshake = region.buf(0, script.handshake_bytes).unwrap().freeze();
        ring.send(&stream, handshake).await.unwrap();
        idle.push(stream);
    }
    let attack = || ring.spawn_with_result(attack(ring.clone(), region.clone(), script.bytes.len()));
    let attacks: Vec<_> = (0..ATTACKERS).map(|_| attack()).collect();
    ring.sleep(MILLI).await;
    let began = ring.clock();
    let newcomer = connect(&ring).await;
    let let_in = ring.clock() - began;
    newcomer.disconnect().await;
    for attack in attacks {
        attack.take().await;
    }
    let began = ring.clock();
    while server.clients() > IDLE + 1 {
        ring.sleep(MILLI / 10).await;
    }
    let forgotten = ring.clock() - began;
    over.set(true);
    let longest = waits.take().await;
    honest.disconnect().await;
    drop(idle);
    server.stop().await;
    assert_eq!((server.clients(), node.in_flight()), (0, 0));
    Outcome { longest, forgotten, let_in }
}

fn outcome(seed: u64) -> Outcome {
    let (world, ring) = world(seed);
    let outcome = ring.block_on(flood(ring.clone()));
    check_clean(&world, &ring);
    outcome
}

#[test]
fn a_flood_of_questions_holds_up_nobody() {
    for seed in 0..2 {
        let outcome = outcome(seed);
        assert!(outcome.is_good(), "seed {seed}: {outcome:?}");
    }
}

#[test]
fn a_walk_that_never_yields_is_found() {
    plant(Some(Bug::StatusWalkKeepsTurn));
    let outcome = outcome(0);
    plant(None);
    assert!(!outcome.is_good(), "{outcome:?}");
}

/// Clusters of an image whose tables are walked: all of them in one table of 2 MiB.
const CLUSTERS: u64 = 20_000;

/// Makes an image in the world whose tables are full, and holds no data.
async fn full_image(ring: &Ring) -> Rc<Qcow2> {
    let file = open(ring, Path::new("/image"), &OpenOptions::default()).unwrap();
    let options = CreateOptions {
        size: CLUSTERS << 21,
        cluster_size: 2 << 20,
        preallocation: Preallocation::Metadata,
        ..CreateOptions::default()
    };
    Qcow2::create(ring, &Node::of(ring, file), None, &options).await.unwrap();
    open_qcow2(ring, "/image", &ImageOptions::default()).await.unwrap()
}

/// How often others had their turn while `work` was done.
async fn turns_meanwhile<T>(ring: &Ring, work: impl Future<Output = T>) -> (T, u64) {
    let (over, turns) = (Rc::new(Cell::new(false)), Rc::new(Cell::new(0)));
    let other = ring.spawn_with_result({
        let (ring, over, turns) = (ring.clone(), over.clone(), turns.clone());
        async move {
            while !over.get() {
                turns.set(turns.get() + 1);
                ring.yield_now().await;
            }
        }
    });
    let done = work.await;
    over.set(true);
    other.take().await;
    (done, turns.get())
}

/// One yields after so many entries at the latest, and everything is looked at once or more.
const TURNS_MIN: u64 = CLUSTERS / 256;

#[test]
fn walks_over_the_tables_of_an_image_let_others_have_their_turn() {
    let world = World::new(WorldConfig::new(3));
    world.add_file("/image", FileModel::regular(0));
    let ring = Ring::with_backend(world.backend(), &Config::default()).unwrap();
    let inside = ring.clone();
    ring.block_on(async move {
        let ring = inside;
        let image = full_image(&ring).await;
        // What waits for the disk gives turns, too: so much as is certainly not due to that.
        let (id, turns) = turns_meanwhile(&ring, image.snapshot_create("one", (1, 2))).await;
        assert!(turns >= 3 * TURNS_MIN, "{turns} turns during a snapshot");
        let (report, turns) = turns_meanwhile(&ring, image.check(Repair::None)).await;
        let report = report.unwrap();
        assert_eq!((report.corruptions, report.leaks, report.allocated_clusters), (0, 0, CLUSTERS));
        assert!(turns >= 3 * TURNS_MIN, "{turns} turns during a check");
        let (deleted, turns) = turns_meanwhile(&ring, image.snapshot_delete(&id.unwrap())).await;
        deleted.unwrap();
        assert!(turns >= 3 * TURNS_MIN, "{turns} turns during the end of a snapshot");
    });
    assert_eq!(ring.shutdown(1_000 * MILLI).leaked, 0);
}
