//! A server that goes down and comes back without what it had not flushed, again and again: whoever uses its disk reads
//! what he wrote, and what he flushed is there.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use blockferry::base::planted::{Bug, plant};
use blockferry::block::{Driver, WriteFlags, ZeroFlags};
use blockferry::export::nbd::NbdServer;
use blockferry::graph::heard::Heard;
use blockferry::graph::node::{Node, Root};
use blockferry::job::convert::{self, ConvertOptions};
use blockferry::job::mirror::{self, MirrorOptions};
use blockferry::job::policy::{CopyMode, OnError};
use blockferry::job::runner::{Ending, ErrorPolicies};
use blockferry::protocol::nbd::{NbdNode, RemoteOptions};
use blockferry_ring::rng::Rng;
use blockferry_ring::sim::{FileModel, OpKind, World};
use blockferry_ring::sync::{Either, either};
use blockferry_ring::{Errno, Ring};

use super::jobs::{LEN, local};
use super::{KIB, MILLI, PART, SECOND, SOCKET, address, in_world, options, serve, serve_file};

/// Nobody knows what a byte is after a discard.
const UNKNOWN: u16 = 256;

/// The server's machine loses what was in its caches, and is there again.
async fn lapse(ring: &Ring, world: &World, server: &NbdServer) {
    server.stop().await;
    let durable = world.read_durable("/disk", 0, LEN);
    world.write_raw("/disk", 0, &durable);
    server.listen(&address(SOCKET)).unwrap();
    // It listens from its next turn on.
    ring.sleep(MILLI).await;
}

async fn remote(ring: &Ring, unflushed_bytes_max: u64) -> Rc<NbdNode> {
    let options = RemoteOptions { unflushed_bytes_max, ..options(SOCKET) };
    NbdNode::open(ring, options, false).await.unwrap()
}

/// One who uses a part of the disk alone.
struct Writer {
    ring: Ring,
    node: Rc<NbdNode>,
    begin: u64,
    rand: Rng,
    model: Vec<u16>,
    wrong: Rc<RefCell<Vec<String>>>,
}

impl Writer {
    fn compare(&self, what: &str, at: usize, bytes: &[u8]) {
        let differs = |(byte, model): (&u8, &u16)| *model != UNKNOWN && u16::from(*byte) != *model;
        if let Some(first) = bytes.iter().zip(&self.model[at..]).position(differs) {
            self.wrong.borrow_mut().push(format!("{what} at {}", self.begin + (at + first) as u64));
        }
    }

    async fn step(&mut self) {
        let len_max = [600, 5000, 40 * KIB, PART / 2][self.rand.below(4) as usize];
        let len = 1 + self.rand.below(len_max);
        let at = self.rand.below(PART - len + 1);
        let (offset, range) = (self.begin + at, at as usize..(at + len) as usize);
        match self.rand.below(12) {
            0..6 => {
                let mut buf = self.ring.alloc(len as usize).await;
                let byte = self.rand.next_u64() as u8;
                buf.as_mut_slice().fill(byte);
                let fua = self.rand.below(6) == 0;
                self.node.write(offset, buf.freeze(), WriteFlags { fua }).await.unwrap();
                self.model[range].fill(byte.into());
            }
            6..9 => {
                let buf = self.ring.alloc(len as usize).await;
                let (buf, result) = self.node.read(offset, buf).await;
                result.unwrap();
                self.compare("a read", range.start, buf.as_slice());
            }
            9 => {
                self.node.write_zeroes(offset, len, ZeroFlags::default()).await.unwrap();
                self.model[range].fill(0);
            }
            10 => {
                self.node.discard(offset, len).await.unwrap();
                self.model[range].fill(UNKNOWN);
            }
            _ => self.node.flush().await.unwrap(),
        }
    }
}

/// What was found to be wrong, and how often the server went down.
async fn live_through(ring: Ring, world: World, seed: u64, unflushed_bytes_max: u64) -> (Vec<String>, u64) {
    let server = serve(&ring);
    let node = remote(&ring, unflushed_bytes_max).await;
    let wrong = Rc::new(RefCell::new(Vec::new()));
    let (left, ended) = (Rc::new(Cell::new(8u64)), ring.notify());
    let writers: Vec<_> = (0..left.get())
        .map(|i| {
            let mut writer = Writer {
                ring: ring.clone(),
                node: node.clone(),
                begin: 100 + i * PART,
                rand: Rng::new(seed ^ i << 32),
                model: vec![0; PART as usize],
                wrong: wrong.clone(),
            };
            let (left, ended) = (left.clone(), ended.clone());
            ring.spawn_with_result(async move {
                for _ in 0..60 {
                    writer.step().await;
                }
                left.set(left.get() - 1);
                ended.notify();
                writer
            })
        })
        .collect();
    let mut rand = Rng::new(seed);
    let mut lapses = 0;
    while left.get() > 0 {
        while node.connections() == 0 && left.get() > 0 {
            ring.sleep(MILLI).await;
        }
        ring.sleep((1 + rand.below(10)) * MILLI).await;
        lapse(&ring, &world, &server).await;
        lapses += 1;
    }
    ended.until(|| (left.get() == 0).then_some(())).await;
    node.flush().await.unwrap();
    // From here on all of it lasts.
    lapse(&ring, &world, &server).await;
    for writer in writers {
        let writer = writer.take().await;
        let bytes = world.read_durable("/disk", writer.begin, PART as usize);
        writer.compare("what was flushed", 0, &bytes);
    }
    assert_eq!(node.losses_for_good(), 0);
    drop(node);
    server.stop().await;
    (wrong.take(), lapses)
}

#[test]
fn what_was_acknowledged_outlives_the_server() {
    let mut lapses = 0;
    for seed in 0..9 {
        let unflushed = [64 << 20, 400 * KIB, 100 * KIB][seed as usize % 3];
        let (wrong, times) = in_world(seed, |ring, world| live_through(ring, world, seed, unflushed)).0;
        assert!(wrong.is_empty(), "seed {seed}: {wrong:?}");
        lapses += times;
    }
    assert!(lapses > 30, "the server went down {lapses} times");
}

#[test]
fn planted_bugs_of_a_remote_disk_are_found() {
    for bug in Bug::REMOTE {
        let is_found = |seed| {
            plant(Some(bug));
            let (wrong, _) = in_world(seed, |ring, world| live_through(ring, world, seed, 64 << 20)).0;
            plant(None);
            !wrong.is_empty()
        };
        assert!((0..12).any(is_found), "{bug:?} is not found");
    }
}

#[test]
fn whoever_has_written_hears_once_of_what_could_not_be_kept() {
    in_world(4, |ring, world| async move {
        let server = serve(&ring);
        let node = Node::new(&ring, "remote", remote(&ring, 0).await);
        let user = || Root::new(&node, false).unwrap();
        let users = [user(), user(), user()];
        let heard = users.each_ref().map(Heard::new);
        for (user, heard) in users.iter().zip(&heard).take(2) {
            let mut buf = ring.alloc(4096).await;
            buf.as_mut_slice().fill(1);
            heard.writes();
            user.write(8192, buf.freeze(), WriteFlags::default()).await.unwrap();
        }
        lapse(&ring, &world, &server).await;
        for (index, (user, heard)) in users.iter().zip(&heard).enumerate() {
            let first = heard.flush(user).await.map_err(|error| error.errno);
            assert_eq!(first.err(), (index < 2).then_some(Errno::EIO), "user {index}");
            heard.flush(user).await.unwrap();
        }
        // Nothing is lost that was flushed.
        lapse(&ring, &world, &server).await;
        for (user, heard) in users.iter().zip(&heard) {
            heard.flush(user).await.unwrap();
        }
        assert_eq!(node.driver().losses_for_good(), 1);
        drop((users, node));
        server.stop().await;
    });
}

/// A copy to a server that loses its caches again and again meanwhile: how it ended, and whether what has lasted there is
/// what it was to be. The seed says what kind of copy it is, and what of clients' changes is kept.
fn copy_meanwhile(seed: u64) -> (Ending, bool) {
    in_world(seed, move |ring, world| async move {
        let server = serve(&ring);
        let source = local(&ring, &world, seed);
        let unflushed = [64 << 20, 0][seed as usize / 4 % 2];
        let target = Node::new(&ring, "remote", remote(&ring, unflushed).await);
        let guest = Root::new(&source, false).unwrap();
        let (converts, pivots, blocks) = (seed % 4 == 1, seed % 4 == 2, seed % 4 == 3);
        let job = if converts {
            let options = ConvertOptions { speed: 2 << 20, ..ConvertOptions::new("convert") };
            convert::start(&ring, &source, &target, options).await.unwrap().0
        } else {
            let copy_mode = if blocks { CopyMode::WriteBlocking } else { CopyMode::Background };
            let options = MirrorOptions { speed: 2 << 20, copy_mode, ..MirrorOptions::new("mirror") };
            mirror::start(&ring, &source, &target, options).await.unwrap()
        };
        let write = async |round: u64| {
            let mut buf = ring.alloc(9000).await;
            buf.as_mut_slice().fill(round as u8 + 1);
            guest.write(round * 600_000 + 77, buf.freeze(), WriteFlags::default()).await.unwrap();
        };
        for round in 0..4 {
            ring.sleep(300 * MILLI + seed * 11 * MILLI).await;
            if !converts {
                write(round).await;
            }
            let pauses = !converts && round == 1;
            if pauses {
                job.pause().unwrap();
                ring.sleep(50 * MILLI).await;
            }
            lapse(&ring, &world, &server).await;
            if pauses {
                ring.sleep(500 * MILLI).await;
                job.resume().unwrap();
            }
        }
        if !converts {
            job.until_ready().await;
            write(4).await;
            lapse(&ring, &world, &server).await;
            if pivots { job.complete().unwrap() } else { job.cancel(false).unwrap() }
        }
        let ending = job.until_over().await;
        lapse(&ring, &world, &server).await;
        let is_same = world.read_live("/local", 0, LEN) == world.read_durable("/disk", 0, LEN);
        drop((job, guest, source, target));
        server.stop().await;
        (ending, is_same)
    })
    .0
}

#[test]
fn copies_are_whole_when_their_server_goes_down_meanwhile() {
    for seed in 0..8 {
        assert_eq!(copy_meanwhile(seed), (Ending::Completed, true), "seed {seed}");
    }
    plant(Some(Bug::NotWrittenAgain));
    let found: Vec<_> = (0..8).map(|seed| !copy_meanwhile(seed).1).collect();
    plant(None);
    assert!(found.iter().filter(|found| **found).count() >= 4, "{found:?}");
}

/// The server is well, and little is kept: who finds no room beside that has it flushed.
#[test]
fn a_writer_without_room_does_not_wait_for_others() {
    in_world(7, |ring, _| async move {
        let server = serve(&ring);
        let node = remote(&ring, 100 * KIB).await;
        for (byte, kib) in [(1, 30), (2, 90), (3, 45), (4, 99), (5, 100), (6, 49)] {
            let mut buf = ring.alloc(kib << 10).await;
            buf.as_mut_slice().fill(byte);
            let write = node.write(0, buf.freeze(), WriteFlags::default());
            match either(write, ring.sleep(SECOND)).await {
                Either::First(result) => result.unwrap(),
                Either::Second(()) => panic!("{kib} KiB were not written"),
            }
        }
        drop(node);
        server.stop().await;
    });
}

/// A copy to a server that goes down before it has flushed what is written to it again; `then` says how often.
fn copy_to_one_that_never_lasts(unflushed_bytes_max: u64, lapses: u32) -> Ending {
    in_world(5, move |ring, world| async move {
        let server = serve(&ring);
        let source = local(&ring, &world, 5);
        let node = remote(&ring, unflushed_bytes_max).await;
        let target = Node::new(&ring, "remote", node.clone());
        let policies = ErrorPolicies { source: OnError::Ignore, target: OnError::Ignore };
        let options = ConvertOptions { speed: 2 << 20, policies, ..ConvertOptions::new("convert") };
        let job = convert::start(&ring, &source, &target, options).await.unwrap().0;
        ring.sleep(400 * MILLI).await;
        for _ in 0..lapses {
            world.hang("/disk");
            while node.connections() > 0 {
                world.reset_streams("unix:/sock");
                ring.sleep(MILLI / 10).await;
            }
            while node.connections() == 0 {
                ring.sleep(MILLI).await;
            }
            ring.sleep(5 * MILLI).await;
        }
        world.release("/disk");
        world.heal();
        let ending = job.until_over().await;
        drop((job, source, target, node));
        server.stop().await;
        ending
    })
    .0
}

#[test]
fn a_server_that_keeps_nothing_ends_a_job_whatever_its_policy() {
    // What is kept of clients' changes makes no difference.
    for unflushed in [64 << 20, 0] {
        assert_eq!(copy_to_one_that_never_lasts(unflushed, 2), Ending::Completed);
        let ending = copy_to_one_that_never_lasts(unflushed, 3);
        let Ending::Failed(text) = ending else { panic!("it did not fail") };
        assert!(text.contains("3 times in a row"), "{text}");
    }
}

/// A copy to a disk whose place is taken by another while nobody listens: what its end says, whatever its policy is.
fn copy_to_one_that_becomes(another: fn(&Ring, &World) -> NbdServer, copies: bool) -> Ending {
    in_world(6, move |ring, world| async move {
        let server = serve(&ring);
        let source = local(&ring, &world, 6);
        let target = Node::new(&ring, "remote", remote(&ring, 0).await);
        let policies = ErrorPolicies { source: OnError::Ignore, target: OnError::Ignore };
        let speed = if copies { 2 << 20 } else { 0 };
        let options = MirrorOptions { speed, policies, ..MirrorOptions::new("mirror") };
        let job = mirror::start(&ring, &source, &target, options).await.unwrap();
        if copies {
            ring.sleep(400 * MILLI).await;
        } else {
            job.until_ready().await;
        }
        server.stop().await;
        let other = another(&ring, &world);
        ring.sleep(SECOND).await;
        if !copies {
            job.complete().unwrap();
        }
        let ending = job.until_over().await;
        drop((job, source, target));
        other.stop().await;
        ending
    })
    .0
}

fn longer(ring: &Ring, world: &World) -> NbdServer {
    world.add_file("/longer", FileModel::regular(8 << 20));
    serve_file(ring, "/longer", true)
}

fn read_only(ring: &Ring, world: &World) -> NbdServer {
    world.add_file("/other", FileModel::regular(LEN as u64));
    serve_file(ring, "/other", false)
}

/// The same disk, and there is no room.
fn full(ring: &Ring, world: &World) -> NbdServer {
    world.add_file("/full", FileModel::regular(LEN as u64));
    for nth in 1..1000 {
        world.fail_nth(OpKind::Write, "/full", nth, Errno::ENOSPC);
    }
    serve_file(ring, "/full", true)
}

#[test]
fn a_job_whose_target_becomes_another_disk_says_so() {
    for (another, word) in
        [(longer as fn(&Ring, &World) -> NbdServer, "not the export"), (read_only, "not the export")]
    {
        for copies in [true, false] {
            let Ending::Failed(text) = copy_to_one_that_becomes(another, copies) else {
                panic!("it did not fail")
            };
            assert!(text.contains(word), "{text}");
        }
    }
    let Ending::Failed(text) = copy_to_one_that_becomes(full, true) else { panic!("it did not fail") };
    assert!(text.contains("could not be written again"), "{text}");
}
