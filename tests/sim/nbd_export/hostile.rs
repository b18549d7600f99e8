//! Clients that stall, vanish, drip or rave at every byte of what they send and of what they are sent, many at once,
//! beside one good client that checks every byte and must never wait long.
//!
//! The hostile ones use memory of their own (a guest's, not the arena's), so that what the arena loses to them is what
//! the server holds for them.

use std::cell::{Cell, RefCell};
use std::path::Path;
use std::rc::Rc;

use blockferry::export::nbd::{Export, NbdServer, PaceLimits, ServerConfig};
use blockferry::graph::node::{Node, Root};
use blockferry::protocol::nbd::{ConnectOptions, Connection, NbdUri};
use blockferry::protocol::open::{OpenOptions, open};
use blockferry_ring::mem::Region;
use blockferry_ring::rng::Rng;
use blockferry_ring::sim::{FileModel, World, WorldConfig};
use blockferry_ring::sync::{Either, either, join};
use blockferry_ring::{Config, File, Nanos, Ring, SharedBuf, SocketAddress};

use super::{PART, Worker};
use common::nbd_script::Script;

pub const MILLI: Nanos = 1_000_000;
const KIB: usize = 1 << 10;
/// The server's patience with handshakes, and with clients that hold memory while it is short.
const HANDSHAKE: Nanos = 1_000 * MILLI;
const STALL: Nanos = 400 * MILLI;
/// How long a client that does nothing stays.
const STAY: Nanos = HANDSHAKE + 300 * MILLI;
/// Between two bytes of a client that drips.
const DRIP: Nanos = 50 * MILLI;
/// The longest that the good client may ever wait for one request.
const PATIENCE: Nanos = 2_000 * MILLI;
/// Hostile clients at once.
const MANY: usize = 12;
pub const SOCKET: &str = "/sock";
const LISTENERS: [&str; 2] = [SOCKET, "/other"];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Ending {
    /// Stays, and neither sends nor reads.
    Stall,
    /// Closes.
    Vanish,
    /// Sends rubbish, then stays.
    Rave,
    /// Sends the rest one byte at a time, slowly.
    Drip,
}

/// What one hostile client does.
#[derive(Clone, Copy, Debug)]
struct Plan {
    send: usize,
    receive: usize,
    ending: Ending,
}

struct Attacker {
    ring: Ring,
    memory: Region,
    script_bytes: usize,
    handshake_bytes: usize,
    rand: Rng,
}

impl Attacker {
    fn part(&self, from: usize, to: usize) -> SharedBuf {
        self.memory.buf(from, to - from).unwrap().freeze()
    }

    async fn send(&mut self, stream: &File, to: usize) {
        let mut at = 0;
        while at < to {
            let end = to.min(at + 1 + self.rand.below(20_000) as usize);
            if self.ring.send(stream, self.part(at, end)).await.is_err() {
                return;
            }
            at = end;
        }
    }

    async fn receive(ring: &Ring, memory: &Region, stream: &File, count: usize) {
        let mut left = count;
        while left > 0 {
            // Behind the script there is room for what nobody looks at.
            let buf = memory.buf(memory.bytes() - 64 * KIB, left.min(64 * KIB)).unwrap();
            match ring.recv(stream, buf).await.1 {
                Ok(n) if n > 0 => left -= n as usize,
                _ => return,
            }
        }
    }

    async fn attack(mut self, plan: Plan) {
        let Ok(stream) = self.ring.connect(&SocketAddress::Unix(SOCKET.into())) else { return };
        let (ring, memory) = (self.ring.clone(), self.memory.clone());
        let talk =
            join(self.send(&stream, plan.send), Attacker::receive(&ring, &memory, &stream, plan.receive));
        // What is not answered is not waited for.
        either(talk, ring.sleep(100 * MILLI)).await;
        match plan.ending {
            Ending::Vanish => return,
            Ending::Stall => {}
            Ending::Rave => {
                let rubbish = self.memory.buf(self.memory.bytes() - 128 * KIB, 200).unwrap().freeze();
                either(ring.send(&stream, rubbish), ring.sleep(STAY)).await;
            }
            Ending::Drip => {
                let end = self.script_bytes.min(plan.send + (STAY / DRIP) as usize);
                for at in plan.send..end {
                    let byte = self.part(at, at + 1);
                    either(ring.send(&stream, byte), ring.sleep(STAY)).await;
                    ring.sleep(DRIP).await;
                }
            }
        }
        ring.sleep(STAY).await;
        let in_time = if plan.ending == Ending::Drip { (HANDSHAKE / DRIP) as usize } else { 0 };
        if plan.send + in_time < self.handshake_bytes {
            // It was shown the door: the stream has an end.
            let all = Attacker::receive(&ring, &memory, &stream, usize::MAX);
            let ended = either(all, ring.sleep(100 * MILLI)).await;
            assert!(matches!(ended, Either::First(())), "{plan:?}: still there after {STAY} ns");
        }
    }
}

pub fn memory(script: &Script) -> Region {
    let bytes = script.bytes.len().next_multiple_of(4096) + 256 * KIB;
    let file = rustix::fs::memfd_create("hostile", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&file, bytes as u64).unwrap();
    let region = Region::map(&file, 0, bytes).unwrap();
    region.write(0, &script.bytes);
    region.write(bytes - 128 * KIB, &[0x55; 200]);
    region
}

pub fn serve(ring: &Ring, config: ServerConfig) -> (Rc<Node>, NbdServer) {
    let driver = open(ring, Path::new("/disk"), &OpenOptions::default()).unwrap();
    let node = Node::new(ring, "disk", driver);
    let server = NbdServer::new(ring, config);
    let root = Root::new(&node, false).unwrap();
    let export = Export { root, description: "A disk.".into(), writable: true, default: true };
    server.add_export("disk", export).unwrap();
    for socket in LISTENERS {
        server.listen(&SocketAddress::Unix(socket.into())).unwrap();
    }
    (node, server)
}

fn config() -> ServerConfig {
    ServerConfig {
        bytes_in_flight_max: 1 << 20,
        in_flight_max: 5,
        handshake_ns_max: HANDSHAKE,
        stall_ns_max: STALL,
        ..ServerConfig::default()
    }
}

fn world(seed: u64, arena_bytes: usize) -> (World, Ring) {
    let world = World::new(WorldConfig::new(seed));
    world.add_file("/disk", FileModel::regular(8 << 20));
    let config = Config { arena_bytes, ..Config::default() };
    let ring = Ring::with_backend(world.backend(), &config).unwrap();
    (world, ring)
}

/// Nothing is left of all this.
pub fn check_clean(world: &World, ring: &Ring) {
    for _ in 0..10_000 {
        if ring.task_count() == 0 {
            break;
        }
        let _ = ring.turn();
    }
    assert_eq!(ring.task_count(), 0, "tasks are left behind");
    assert_eq!(ring.arena().bytes_used(), 0, "memory is left behind");
    assert_eq!(ring.shutdown(1_000 * MILLI).leaked, 0);
    assert!(LISTENERS.iter().all(|socket| !world.exists(socket)), "a socket file is left behind");
}

/// The good client works until `over`; gives the steps it took and the longest of them.
async fn work(mut worker: Worker, over: Rc<Cell<bool>>) -> (u64, Nanos) {
    let (mut steps, mut longest) = (0, 0);
    while !over.get() {
        let begin = worker.ring.clock();
        worker.step().await.expect("the good client's requests succeed");
        longest = longest.max(worker.ring.clock() - begin);
        steps += 1;
        let pause = worker.rand.below(100) * MILLI;
        worker.ring.sleep(pause).await;
    }
    (steps, longest)
}

async fn siege(ring: Ring, seed: u64, script: Rc<Script>, plans: Vec<Plan>) {
    let (node, server) = serve(&ring, config());
    let uri: NbdUri = format!("nbd+unix:///disk?socket={}", LISTENERS[1]).parse().unwrap();
    let connection = Connection::connect(&ring, &uri, &ConnectOptions::default()).await.unwrap();
    let rand = Rng::new(seed);
    let model = vec![0; PART as usize];
    let worker = Worker { ring: ring.clone(), connection: connection.clone(), begin: 100, rand, model };
    let over = Rc::new(Cell::new(false));
    let good = ring.spawn_with_result(work(worker, over.clone()));
    let region = memory(&script);
    for (wave, plans) in plans.chunks(MANY).enumerate() {
        let ended: Vec<_> = plans
            .iter()
            .enumerate()
            .map(|(i, plan)| {
                let attacker = Attacker {
                    ring: ring.clone(),
                    memory: region.clone(),
                    script_bytes: script.bytes.len(),
                    handshake_bytes: script.handshake_bytes,
                    rand: Rng::new(seed ^ (wave * MANY + i) as u64),
                };
                ring.spawn_with_result(attacker.attack(*plan))
            })
            .collect();
        for one in ended {
            one.take().await;
        }
        // Who has gone is forgotten, whatever it was in the midst of.
        ring.sleep(100 * MILLI).await;
        assert_eq!(server.clients(), 1, "wave {wave}: {plans:?}");
    }
    over.set(true);
    let (steps, longest) = good.take().await;
    let waves = plans.len().div_ceil(MANY) as u64;
    assert!(steps > waves, "the good client took {steps} steps in {waves} waves");
    assert!(longest < PATIENCE, "the good client waited {longest} ns for one step");
    connection.disconnect().await;
    server.stop().await;
    assert_eq!((server.clients(), node.in_flight()), (0, 0));
}

fn besiege(seed: u64, plans: impl FnOnce(&Script) -> Vec<Plan>) {
    let script = Rc::new(Script::new());
    let plans = plans(&script);
    let (world, ring) = world(seed, 8 << 20);
    ring.block_on(siege(ring.clone(), seed, script, plans));
    check_clean(&world, &ring);
}

const ENDINGS: [Ending; 4] = [Ending::Stall, Ending::Vanish, Ending::Rave, Ending::Drip];

#[test]
fn a_good_client_does_not_feel_who_stops_sending_at_any_byte() {
    for (seed, ending) in ENDINGS.into_iter().enumerate() {
        besiege(seed as u64, |script| {
            let cuts = script.cuts();
            assert!(cuts.len() > 500, "{} cuts", cuts.len());
            cuts.into_iter().map(|send| Plan { send, receive: usize::MAX, ending }).collect()
        });
    }
}

#[test]
fn a_good_client_does_not_feel_who_stops_reading_at_any_byte() {
    for (seed, ending) in [Ending::Stall, Ending::Vanish].into_iter().enumerate() {
        besiege(100 + seed as u64, |script| {
            let send = script.bytes.len();
            // The greeting, the options' answers, the first replies; then here and there in 3 MiB of data.
            let early = 0..700;
            let late = (700..3_300_000).step_by(77_777);
            early.chain(late).map(|receive| Plan { send, receive, ending }).collect()
        });
    }
}

/// What one client costs at worst, by whatever it does.
async fn greed(ring: Ring, reads: bool) -> usize {
    let limits = config();
    let (_node, server) = serve(&ring, limits.clone());
    let mut script = Script::new();
    // Not the farewell.
    script.bytes.truncate(script.marks.pop().unwrap());
    for _ in 0..100 {
        script.request(if reads { 0 } else { 1 }, 0, 200_000);
    }
    let region = memory(&script);
    let stream = ring.connect(&SocketAddress::Unix(SOCKET.into())).unwrap();
    let most = Rc::new(RefCell::new(0));
    let mut attacker = Attacker {
        ring: ring.clone(),
        memory: region.clone(),
        script_bytes: script.bytes.len(),
        handshake_bytes: script.handshake_bytes,
        rand: Rng::new(1),
    };
    let seen = most.clone();
    let (all, watched) = (script.bytes.len(), ring.clone());
    let watch = async move {
        for _ in 0..100_000 {
            let used = watched.arena().bytes_used();
            let most = *seen.borrow();
            *seen.borrow_mut() = most.max(used);
            watched.sleep(20_000).await;
        }
    };
    let stay = async {
        attacker.send(&stream, all).await;
        ring.sleep(200 * MILLI).await;
    };
    either(stay, watch).await;
    drop(stream);
    server.idle().await;
    server.stop().await;
    *most.borrow()
}

#[test]
fn memory_for_one_client_is_bounded() {
    for reads in [true, false] {
        let (world, ring) = world(7, 24 << 20);
        let most = ring.block_on(greed(ring.clone(), reads));
        // Its quota, the memory that is received into and sent from, and one piece that a leaf bounces.
        let bound = config().bytes_in_flight_max as usize + 512 * KIB;
        assert!((200_000..=bound).contains(&most), "{most} bytes are held for one client");
        check_clean(&world, &ring);
    }
}

#[test]
fn a_client_with_a_pace_keeps_to_it_and_can_be_shown_the_door() {
    let (world, ring) = world(9, 8 << 20);
    let pace = PaceLimits { requests_per_sec: 100, bytes_per_sec: 1 << 20 };
    let inside = ring.clone();
    ring.block_on(async move {
        let ring = inside;
        let (_node, server) = serve(&ring, ServerConfig { pace, ..config() });
        let uri: NbdUri = format!("nbd+unix:///disk?socket={SOCKET}").parse().unwrap();
        let connection = Connection::connect(&ring, &uri, &ConnectOptions::default()).await.unwrap();
        // 10 requests are the burst; 200 more take two seconds.
        let begin = ring.clock();
        for _ in 0..210 {
            connection.flush().await.unwrap();
        }
        let took = ring.clock() - begin;
        assert!((1_900 * MILLI..2_300 * MILLI).contains(&took), "{took} ns for 210 requests");
        let begin = ring.clock();
        for _ in 0..32 {
            let buf = ring.alloc(128 * KIB).await;
            connection.read(0, buf).await.1.unwrap();
        }
        let took = ring.clock() - begin;
        assert!((3_500 * MILLI..4_300 * MILLI).contains(&took), "{took} ns for 4 MiB");
        // A debt of seconds does not hold up the end.
        let buf = ring.alloc(1 << 20).await;
        connection.read(0, buf).await.1.unwrap();
        let waits = ring.spawn_with_result({
            let connection = connection.clone();
            async move { connection.flush().await.is_err() }
        });
        ring.sleep(10 * MILLI).await;
        let begin = ring.clock();
        server.stop().await;
        assert!(ring.clock() - begin < 100 * MILLI, "stopping waits for a client's debt");
        assert!(waits.take().await);
    });
    check_clean(&world, &ring);
}
