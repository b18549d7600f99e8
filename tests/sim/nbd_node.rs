//! A remote disk in the simulated world: connections that break under it, servers that are dead, hung or hostile at
//! every byte, and how long anything may take, in virtual time.

mod jobs;
mod lapses;
mod late;
mod liar;
mod link;

use std::cell::Cell;
use std::path::Path;
use std::rc::Rc;

use blockferry::block::{Driver, WriteFlags, ZeroFlags};
use blockferry::export::nbd::{Export, NbdServer, ServerConfig};
use blockferry::graph::node::{Node, Root};
use blockferry::protocol::nbd::{NbdNode, RemoteOptions};
use blockferry::protocol::open::{OpenOptions, open};
use blockferry_ring::rng::Rng;
use blockferry_ring::sim::{FileModel, World, WorldConfig};
use blockferry_ring::{Config, Errno, Nanos, Ring, SocketAddress};

use link::{Harm, Link};

const MILLI: Nanos = 1_000_000;
const SECOND: Nanos = 1_000 * MILLI;
const KIB: u64 = 1 << 10;
const PART: u64 = 300 * KIB + 77;
const SOCKET: &str = "/sock";

fn address(path: &str) -> SocketAddress {
    SocketAddress::Unix(path.into())
}

fn options(path: &str) -> RemoteOptions {
    RemoteOptions::new(format!("nbd+unix:///disk?socket={path}").parse().unwrap())
}

fn serve(ring: &Ring) -> NbdServer {
    serve_file(ring, "/disk", true)
}

fn serve_file(ring: &Ring, path: &str, writable: bool) -> NbdServer {
    let driver = open(ring, Path::new(path), &OpenOptions::default()).unwrap();
    let server = NbdServer::new(ring, ServerConfig::default());
    let root = Root::new(&Node::new(ring, "disk", driver), false).unwrap();
    let export = Export { root, description: String::new(), writable, default: true };
    server.add_export("disk", export).unwrap();
    server.listen(&address(SOCKET)).unwrap();
    server
}

/// Lives `life` in a world of this seed, after which nothing may be left.
fn in_world<T: 'static, F: Future<Output = T> + 'static>(
    seed: u64,
    life: impl FnOnce(Ring, World) -> F,
) -> (T, u64) {
    in_world_of(8 << 20, seed, life)
}

/// The same with so much memory.
fn in_world_of<T: 'static, F: Future<Output = T> + 'static>(
    arena_bytes: usize,
    seed: u64,
    life: impl FnOnce(Ring, World) -> F,
) -> (T, u64) {
    let world = World::new(WorldConfig::new(seed));
    world.add_file("/disk", FileModel::regular(4 << 20));
    let config = Config { arena_bytes, ..Config::default() };
    let ring = Ring::with_backend(world.backend(), &config).unwrap();
    let result = ring.block_on(life(ring.clone(), world.clone()));
    // Farewells may take their time, and so may what was cancelled.
    let end = ring.clock() + 6 * SECOND;
    let is_left = || ring.task_count() > 0 || ring.arena().bytes_used() > 0;
    while is_left() && ring.clock() < end {
        let _ = ring.turn_blocking();
    }
    assert_eq!(ring.task_count(), 0, "seed {seed}: tasks are left behind");
    assert_eq!(ring.arena().bytes_used(), 0, "seed {seed}: memory is left behind");
    assert_eq!(ring.shutdown(SECOND).leaked, 0);
    (result, world.trace_hash())
}

/// One who uses a part of the disk alone, and knows what is there.
struct Worker {
    ring: Ring,
    node: Rc<NbdNode>,
    begin: u64,
    rand: Rng,
    model: Vec<u8>,
}

impl Worker {
    async fn step(&mut self) {
        let len_max = [600, 5000, 70 * KIB, PART][self.rand.below(4) as usize];
        let len = 1 + self.rand.below(len_max);
        let at = self.rand.below(PART - len + 1);
        let (offset, range) = (self.begin + at, at as usize..(at + len) as usize);
        match self.rand.below(10) {
            0..4 => {
                let mut buf = self.ring.alloc(len as usize).await;
                let byte = self.rand.next_u64() as u8;
                buf.as_mut_slice().fill(byte);
                let fua = self.rand.below(8) == 0;
                self.node.write(offset, buf.freeze(), WriteFlags { fua }).await.unwrap();
                self.model[range].fill(byte);
            }
            4..8 => {
                let buf = self.ring.alloc(len as usize).await;
                let (buf, result) = self.node.read(offset, buf).await;
                result.unwrap();
                assert!(buf.as_slice() == &self.model[range], "{len} bytes at {offset}");
            }
            8 => {
                self.node.write_zeroes(offset, len, ZeroFlags::default()).await.unwrap();
                self.model[range].fill(0);
            }
            _ => {
                self.node.flush().await.unwrap();
                let extent = self.node.block_status(offset, len).await.unwrap();
                let told = &self.model[range.start..range.start + extent.len as usize];
                assert!(!extent.zero || told.iter().all(|byte| *byte == 0), "{extent:?} at {offset}");
            }
        }
    }
}

async fn work_while_links_break(ring: Ring, world: World, seed: u64) -> u64 {
    let server = serve(&ring);
    let node = NbdNode::open(&ring, options(SOCKET), false).await.unwrap();
    let left = Rc::new(Cell::new(8u64));
    let ended = ring.notify();
    for i in 0..left.get() {
        let mut worker = Worker {
            ring: ring.clone(),
            node: node.clone(),
            begin: 100 + i * PART,
            rand: Rng::new(seed ^ i << 32),
            model: vec![0; PART as usize],
        };
        let (left, ended) = (left.clone(), ended.clone());
        ring.spawn(async move {
            for _ in 0..60 {
                worker.step().await;
            }
            drop(worker);
            left.set(left.get() - 1);
            ended.notify();
        });
    }
    let mut rand = Rng::new(seed);
    let mut resets = 0;
    while left.get() > 0 {
        ring.sleep(rand.below(12) * MILLI).await;
        resets += world.reset_streams("unix:/sock") as u64;
    }
    ended.until(|| (left.get() == 0).then_some(())).await;
    assert!(node.connections() <= 4);
    drop(node);
    server.idle().await;
    server.stop().await;
    resets
}

#[test]
fn a_disk_outlives_its_connections() {
    let mut resets = 0;
    for seed in 0..12 {
        resets += in_world(seed, |ring, world| work_while_links_break(ring, world, seed)).0;
    }
    assert!(resets > 60, "{resets} connections were reset");
    let again = || in_world(5, |ring, world| work_while_links_break(ring, world, 5));
    assert_eq!(again(), again(), "a history repeats");
}

async fn flush_takes(ring: &Ring, node: &NbdNode) -> (Nanos, Result<(), Errno>) {
    let begin = ring.clock();
    let result = node.flush().await.map_err(|error| error.errno);
    (ring.clock() - begin, result)
}

#[test]
fn a_dead_server_is_waited_for_as_long_as_was_said() {
    in_world(1, |ring, _| async move {
        let server = serve(&ring);
        let options = RemoteOptions { reconnect_delay_ns: 3 * SECOND, ..options(SOCKET) };
        let node = NbdNode::open(&ring, options.clone(), false).await.unwrap();
        let hasty = RemoteOptions { reconnect_delay_ns: 0, ..options };
        let hasty = NbdNode::open(&ring, hasty, false).await.unwrap();
        server.stop().await;
        let (took, result) = flush_takes(&ring, &hasty).await;
        assert!(result.is_err() && took < 100 * MILLI, "{took} {result:?}");
        let (took, result) = flush_takes(&ring, &node).await;
        assert!(result.is_err() && (2_500 * MILLI..3_200 * MILLI).contains(&took), "{took} {result:?}");
        let (took, result) = flush_takes(&ring, &node).await;
        assert!(result.is_err() && took < MILLI, "{took} {result:?}");
        // It comes back, and so does the disk, by itself.
        ring.sleep(20 * SECOND).await;
        server.listen(&address(SOCKET)).unwrap();
        ring.sleep(1_500 * MILLI).await;
        for node in [&node, &hasty] {
            let (took, result) = flush_takes(&ring, node).await;
            assert!(result.is_ok() && took < 500 * MILLI, "{took} {result:?}");
        }
        // Gone for less than the delay: nobody notices but by the time.
        server.stop().await;
        let again = server.clone();
        let late = ring.clone();
        ring.spawn(async move {
            late.sleep(2 * SECOND).await;
            again.listen(&address(SOCKET)).unwrap();
        });
        let (took, result) = flush_takes(&ring, &node).await;
        assert!(result.is_ok() && (1_500 * MILLI..3 * SECOND).contains(&took), "{took} {result:?}");
        drop((node, hasty));
        server.stop().await;
    });
}

#[test]
fn a_hung_server_is_given_up_at_once_when_that_is_wanted() {
    in_world(2, |ring, world| async move {
        let server = serve(&ring);
        let node = NbdNode::open(&ring, options(SOCKET), false).await.unwrap();
        node.flush().await.unwrap();
        world.hang("unix:/sock");
        let waits: Vec<_> = (0..20u64)
            .map(|i| {
                let (node, ring) = (node.clone(), ring.clone());
                ring.clone().spawn_with_result(async move {
                    let buf = ring.alloc(4096).await;
                    node.read(i * 4096, buf).await.1.map_err(|error| error.errno)
                })
            })
            .collect();
        ring.sleep(100 * SECOND).await;
        assert!(waits.iter().all(|wait| !wait.is_given()), "nothing ends a request but an answer");
        let begin = ring.clock();
        node.fail_in_flight();
        for wait in waits {
            assert_eq!(wait.take().await, Err(Errno::ESHUTDOWN));
        }
        assert!(ring.clock() - begin < 200 * MILLI, "{}", ring.clock() - begin);
        // While it hangs, later requests wait for the delay; then it comes back.
        let (took, result) = flush_takes(&ring, &node).await;
        assert!(result.is_err() && took < 11 * SECOND, "{took}");
        world.release("unix:/sock");
        world.heal();
        ring.sleep(15 * SECOND).await;
        node.flush().await.unwrap();
        drop(node);
        server.stop().await;
    });
}

#[test]
fn opening_takes_no_longer_than_it_may() {
    in_world(3, |ring, _| async move {
        let open = async |path: &str, open_timeout_ns| {
            let begin = ring.clock();
            let options = RemoteOptions { open_timeout_ns, ..options(path) };
            let error = NbdNode::open(&ring, options, false).await.unwrap_err();
            (ring.clock() - begin, error.errno)
        };
        let (took, errno) = open("/nobody", 0).await;
        assert!(took < 100 * MILLI && errno == Errno::ECONNREFUSED, "{took} {errno}");
        let (took, _) = open("/nobody", 7 * SECOND).await;
        assert!((7 * SECOND..7_200 * MILLI).contains(&took), "{took}");
        // Somebody takes the connection, and says nothing.
        let (silent, _) = ring.listen(&address("/silent")).unwrap();
        let (took, errno) = open("/silent", 0).await;
        assert!((10 * SECOND..11 * SECOND).contains(&took) && errno == Errno::ETIMEDOUT, "{took} {errno}");
        let (took, _) = open("/silent", 3 * SECOND).await;
        assert!((3 * SECOND..3_300 * MILLI).contains(&took), "{took}");
        drop(silent);
    });
}

/// What came of a session over a link that does harm once.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    NotOpened,
    /// Some requests failed.
    Failed,
    Unharmed,
}

/// Opens the disk over a harmful link and asks it this and that; all of it has to end in bounded time.
async fn ask_over(ring: Ring, harm: Harm) -> Fate {
    let server = serve(&ring);
    let link = Link::new(&ring, "/link", SOCKET, harm);
    let begin = ring.clock();
    let opened = NbdNode::open(&ring, options("/link"), false).await;
    assert!(ring.clock() - begin < 11 * SECOND, "opening took {} ns", ring.clock() - begin);
    let mut fate = Fate::NotOpened;
    if let Ok(node) = opened {
        fate = Fate::Unharmed;
        // Whoever waits for a hung server is freed by the same means by which a job is cancelled.
        let (guard, timer) = (node.clone(), ring.clone());
        let over = Rc::new(Cell::new(false));
        let is_over = over.clone();
        ring.spawn(async move {
            for _ in 0..200 {
                timer.sleep(100 * MILLI).await;
                if is_over.get() {
                    return;
                }
            }
            guard.fail_in_flight();
        });
        let mut results = Vec::new();
        for _ in 0..2 {
            let len = 40_000.min(node.len() as usize).max(1);
            let mut buf = ring.alloc(len).await;
            buf.as_mut_slice().fill(7);
            results.push(node.write(0, buf.freeze(), WriteFlags { fua: true }).await);
            results.push(node.read(0, ring.alloc(len).await).await.1);
            results.push(node.block_status(0, len as u64).await.map(drop));
            results.push(node.write_zeroes(0, len as u64, ZeroFlags::default()).await);
            results.push(node.discard(0, len as u64).await);
            results.push(node.flush().await);
        }
        if results.iter().any(|result| result.is_err()) {
            fate = Fate::Failed;
        }
        over.set(true);
        assert!(ring.clock() - begin < 60 * SECOND, "it took {} ns", ring.clock() - begin);
        // Let the guard see it.
        ring.sleep(200 * MILLI).await;
    }
    link.close();
    server.stop().await;
    fate
}

/// All fates of links that do harm at byte `at` of what the server sends.
fn fates(harm: impl Fn(u64) -> Harm) -> Vec<Fate> {
    let places = (0..420).chain((420..90_000).step_by(2_221));
    places.map(|at| in_world(at, |ring, _| ask_over(ring, harm(at))).0).collect()
}

fn count(fates: &[Fate], fate: Fate) -> usize {
    fates.iter().filter(|other| **other == fate).count()
}

#[test]
fn servers_may_fall_silent_at_any_byte() {
    let fates = fates(Harm::Stall);
    assert!(count(&fates, Fate::NotOpened) > 100 && count(&fates, Fate::Failed) > 100, "{fates:?}");
}

#[test]
fn links_may_break_at_any_byte() {
    let fates = fates(Harm::Cut);
    // After the handshake nobody notices; before it, opening tries once, but for a server that hangs up instead of
    // answering an option: that one is asked again without it.
    assert!(count(&fates, Fate::NotOpened) > 60 && count(&fates, Fate::Failed) == 0, "{fates:?}");
    assert!(count(&fates, Fate::Unharmed) > 200);
}

#[test]
fn servers_may_lie_at_any_byte() {
    for bits in [0xff, 0x80, 0x01] {
        let fates = fates(|at| Harm::Flip(at, bits));
        assert!(count(&fates, Fate::NotOpened) > 50 && count(&fates, Fate::Failed) > 20, "{fates:?}");
    }
}

#[test]
fn servers_may_rave_at_any_byte() {
    let fates = fates(Harm::Rubbish);
    assert!(count(&fates, Fate::NotOpened) > 100 && count(&fates, Fate::Failed) > 100, "{fates:?}");
}
