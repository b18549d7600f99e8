//! The NBD export in the simulated world: streams that are cut anywhere, short sends, resets, and memory too small for
//! all that is asked at once. The clients are this project's own.

mod flood;
mod hostile;

use std::cell::{Cell, RefCell};
use std::path::Path;
use std::rc::Rc;

use blockferry::export::nbd::{Export, NbdServer, ServerConfig};
use blockferry::graph::node::{Node, Root};
use blockferry::protocol::nbd::{CommandFlags, ConnectOptions, Connection, NbdClientError, NbdUri};
use blockferry::protocol::open::{OpenOptions, open};
use blockferry_ring::rng::Rng;
use blockferry_ring::sim::{FileModel, World, WorldConfig};
use blockferry_ring::sync::{Either, either};
use blockferry_ring::{Config, Ring, SocketAddress};

const KIB: u64 = 1 << 10;
/// Each worker has a part of the disk for itself. Its ends are on no block boundary.
const PART: u64 = 400 * KIB + 777;
const WORKERS: u64 = 12;
/// Histories a test.
const SEEDS: u64 = 10;
const SOCKETS: [&str; 3] = ["/one", "/two", "/three"];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Ending {
    /// All work is done.
    Done,
    /// Some connections are reset on the way.
    Resets,
    /// The server stops in the midst of it.
    Stop,
}

struct Worker {
    ring: Ring,
    connection: Rc<Connection>,
    begin: u64,
    rand: Rng,
    /// What the part holds.
    model: Vec<u8>,
}

impl Worker {
    fn range(&mut self, len_max: u64) -> (usize, usize) {
        let len = 1 + self.rand.below(len_max.min(PART));
        (self.rand.below(PART - len + 1) as usize, len as usize)
    }

    async fn step(&mut self) -> Result<(), NbdClientError> {
        let len_max = [600, 5000, 70 * KIB, PART][self.rand.below(4) as usize];
        let (at, len) = self.range(len_max);
        let offset = self.begin + at as u64;
        match self.rand.below(10) {
            0..4 => {
                let mut buf = self.ring.alloc(len).await;
                let byte = self.rand.next_u64() as u8;
                buf.as_mut_slice().fill(byte);
                let fua = self.rand.below(8) == 0;
                self.connection.write(offset, buf.freeze(), fua).await?;
                self.model[at..at + len].fill(byte);
            }
            4..8 => {
                let buf = self.ring.alloc(len).await;
                let (buf, result) = self.connection.read(offset, buf).await;
                result?;
                assert!(buf.as_slice() == &self.model[at..at + len], "{len} bytes at {offset}");
            }
            8 => {
                self.connection.write_zeroes(offset, len as u64, CommandFlags::EMPTY).await?;
                self.model[at..at + len].fill(0);
            }
            _ => {
                self.connection.flush().await?;
                let extents = self.connection.block_status(offset, len as u64).await?;
                let mut from = at;
                for extent in extents {
                    let to = from + extent.length as usize;
                    let reads_zero = self.model[from..to].iter().all(|byte| *byte == 0);
                    assert!(extent.flags & 2 == 0 || reads_zero, "{extent:?} at {from} of {offset}");
                    from = to;
                }
            }
        }
        Ok(())
    }
}

/// What a history came to.
#[derive(Debug, PartialEq)]
struct Outcome {
    hash: u64,
    steps: u64,
    workers_done: u64,
}

async fn live(ring: Ring, world: World, seed: u64, ending: Ending) -> (u64, u64) {
    let driver = open(&ring, Path::new("/disk"), &OpenOptions::default()).unwrap();
    let node = Node::new(&ring, "disk", driver);
    let config = ServerConfig { bytes_in_flight_max: 1 << 20, in_flight_max: 5, ..ServerConfig::default() };
    let server = NbdServer::new(&ring, config);
    let root = Root::new(&node, false).unwrap();
    let export = Export { root, description: String::new(), writable: true, default: true };
    server.add_export("disk", export).unwrap();
    for socket in SOCKETS {
        server.listen(&SocketAddress::Unix(socket.into())).unwrap();
    }
    let mut connections = Vec::new();
    for (i, socket) in SOCKETS.iter().enumerate() {
        let uri: NbdUri = format!("nbd+unix:///disk?socket={socket}").parse().unwrap();
        // One client speaks the protocol's oldest form, one the newest.
        let options = ConnectOptions {
            structured_replies: i > 0,
            extended_headers: i > 1,
            meta_contexts: if i > 0 { ConnectOptions::default().meta_contexts } else { Vec::new() },
            ..ConnectOptions::default()
        };
        connections.push(Connection::connect(&ring, &uri, &options).await.unwrap());
    }
    let (left, steps, done) = (Rc::new(Cell::new(WORKERS)), Rc::new(Cell::new(0)), Rc::new(Cell::new(0)));
    let ended = ring.notify();
    let surprises: Rc<RefCell<Vec<String>>> = Rc::default();
    for i in 0..WORKERS {
        let connection = connections[i as usize % connections.len()].clone();
        let has_status = connection.has_block_status();
        let mut worker = Worker {
            ring: ring.clone(),
            connection,
            begin: 100 + i * PART,
            rand: Rng::new(seed ^ i << 32),
            model: vec![0; PART as usize],
        };
        let (left, steps, done, ended) = (left.clone(), steps.clone(), done.clone(), ended.clone());
        let surprises = surprises.clone();
        ring.spawn(async move {
            let mut result = Ok(());
            for _ in 0..60 {
                result = worker.step().await;
                // A client without contexts cannot ask; that costs it nothing.
                if !has_status && result.as_ref().is_err_and(|error| !error.is_lost()) {
                    result = Ok(());
                }
                if result.is_err() {
                    break;
                }
                steps.set(steps.get() + 1);
            }
            match result {
                Ok(()) => done.set(done.get() + 1),
                Err(error) if error.is_lost() => {}
                Err(error) => surprises.borrow_mut().push(error.to_string()),
            }
            drop(worker);
            left.set(left.get() - 1);
            ended.notify();
        });
    }
    match ending {
        Ending::Done => {}
        Ending::Resets => {
            ring.sleep(1_000_000 + seed % 10 * 1_000_000).await;
            world.reset_streams("unix:/two");
        }
        Ending::Stop => {
            ring.sleep(1_000_000 + seed % 10 * 1_000_000).await;
            server.stop().await;
            assert_eq!(server.clients(), 0);
        }
    }
    ended.until(|| (left.get() == 0).then_some(())).await;
    assert!(surprises.borrow().is_empty(), "{surprises:?}");
    for connection in connections {
        connection.disconnect().await;
    }
    server.idle().await;
    server.stop().await;
    assert_eq!(node.in_flight(), 0);
    (steps.get(), done.get())
}

fn history(seed: u64, ending: Ending) -> Outcome {
    let world = World::new(WorldConfig::new(seed));
    world.add_file("/disk", FileModel::regular(8 << 20));
    // Little memory: what all want at once is more.
    let config = Config { arena_bytes: 6 << 20, ..Config::default() };
    let ring = Ring::with_backend(world.backend(), &config).unwrap();
    let (steps, workers_done) = ring.block_on(live(ring.clone(), world.clone(), seed, ending));
    // What is left are the clients' own tasks, at most: let them end.
    for _ in 0..1000 {
        if ring.task_count() == 0 {
            break;
        }
        let _ = ring.turn();
    }
    assert_eq!(ring.task_count(), 0, "tasks are left behind");
    assert_eq!(ring.arena().bytes_used(), 0, "memory is left behind");
    assert_eq!(ring.shutdown(1_000_000_000).leaked, 0);
    assert!(SOCKETS.iter().all(|socket| !world.exists(socket)), "a socket file is left behind");
    Outcome { hash: world.trace_hash(), steps, workers_done }
}

#[test]
fn every_byte_arrives_however_the_stream_is_cut() {
    for seed in 0..SEEDS {
        let outcome = history(seed, Ending::Done);
        assert_eq!((outcome.steps, outcome.workers_done), (60 * WORKERS, WORKERS), "seed {seed}");
    }
}

#[test]
fn a_reset_ends_one_session_and_no_other() {
    let mut cut_short = 0;
    for seed in 1000..1000 + SEEDS {
        let outcome = history(seed, Ending::Resets);
        assert!(outcome.workers_done >= WORKERS * 2 / 3, "seed {seed}: {outcome:?}");
        cut_short += u64::from(outcome.workers_done < WORKERS);
    }
    assert!(cut_short > SEEDS / 2, "the resets come too late: {cut_short} histories were cut short");
}

#[test]
fn stopping_in_the_midst_of_work_leaves_nothing() {
    // In history 2214 a connection is lost for sending while the last data still comes.
    let histories = (2000..2000 + SEEDS).chain([2214]).map(|seed| history(seed, Ending::Stop));
    let cut_short = histories.filter(|outcome| outcome.workers_done < WORKERS).count() as u64;
    assert!(cut_short > SEEDS / 2, "the stops come too late: {cut_short} histories were cut short");
}

#[test]
fn a_history_repeats() {
    for ending in [Ending::Done, Ending::Resets, Ending::Stop] {
        assert_eq!(history(7, ending), history(7, ending));
    }
}

/// A listener that has had no turn yet is stopped like one that accepts; and the server may listen again, at once.
#[test]
fn a_server_is_stopped_at_once_and_listens_again() {
    let world = World::new(WorldConfig::new(1));
    let ring = Ring::with_backend(world.backend(), &Config::default()).unwrap();
    let r = ring.clone();
    ring.block_on(async move {
        let server = NbdServer::new(&r, ServerConfig::default());
        let address = SocketAddress::Unix(SOCKETS[0].into());
        for _ in 0..3 {
            server.listen(&address).unwrap();
            let stopped = either(server.stop(), r.sleep(1_000_000_000)).await;
            assert!(matches!(stopped, Either::First(())), "it goes on listening");
            assert!(!server.is_listening() && r.connect(&address).is_err());
        }
    });
    assert_eq!((ring.task_count(), ring.arena().bytes_used()), (0, 0));
}
