//! Mirrors to and from remote disks in virtual time: a link that is cut for seconds, servers that are dead or hang.

use std::path::Path;
use std::rc::Rc;

use blockferry::block::{Driver, WriteFlags};
use blockferry::graph::node::{Node, Root};
use blockferry::job::convert::{self, ConvertOptions};
use blockferry::job::mirror::{self, MirrorOptions};
use blockferry::job::runner::{Ending, Job};
use blockferry::protocol::nbd::NbdNode;
use blockferry::protocol::open::{OpenOptions, open};
use blockferry_ring::rng::Rng;
use blockferry_ring::sim::{FileModel, World, WorldConfig};
use blockferry_ring::{Config, Nanos, Ring};

use super::{MILLI, SECOND, SOCKET, address, in_world, options, serve};

pub const LEN: usize = 4 << 20;

pub fn local(ring: &Ring, world: &World, seed: u64) -> Rc<Node> {
    world.add_file("/local", FileModel::regular(LEN as u64));
    let mut rand = Rng::new(seed);
    let bytes: Vec<u8> = (0..LEN).map(|_| rand.next_u64() as u8).collect();
    world.write_raw("/local", 0, &bytes);
    Node::new(ring, "local", open(ring, Path::new("/local"), &OpenOptions::default()).unwrap())
}

async fn remote(ring: &Ring) -> Rc<Node> {
    Node::new(ring, "remote", NbdNode::open(ring, options(SOCKET), false).await.unwrap())
}

async fn start(ring: &Ring, source: &Rc<Node>, target: &Rc<Node>, speed: i64) -> Job {
    let options = MirrorOptions { speed, ..MirrorOptions::new("mirror") };
    mirror::start(ring, source, target, options).await.unwrap()
}

/// Force-cancels, and gives how long the job took to end.
async fn give_up(ring: &Ring, job: &Job) -> Nanos {
    let begin = ring.clock();
    job.cancel(true).unwrap();
    assert_eq!(job.until_over().await, Ending::Cancelled);
    ring.clock() - begin
}

#[test]
fn a_mirror_goes_on_where_the_link_was_cut() {
    for seed in 0..6 {
        in_world(seed, move |ring, world| async move {
            let server = serve(&ring);
            let (source, target) = (local(&ring, &world, seed), remote(&ring).await);
            let guest = Root::new(&source, false).unwrap();
            let job = start(&ring, &source, &target, 1 << 20).await;
            for round in 0..2u64 {
                ring.sleep(700 * MILLI).await;
                // Nobody is let in, and who is in is thrown out.
                server.stop().await;
                let mut buf = ring.alloc(5000).await;
                buf.as_mut_slice().fill(round as u8 + 1);
                let begin = ring.clock();
                guest.write(round * 1_000_000 + 77, buf.freeze(), WriteFlags::default()).await.unwrap();
                assert!(ring.clock() - begin < SECOND, "the guest felt it");
                ring.sleep(3 * SECOND + seed * 500 * MILLI).await;
                assert!(job.ending().is_none(), "{:?}", job.ending());
                server.listen(&address(SOCKET)).unwrap();
            }
            job.until_ready().await;
            job.cancel(false).unwrap();
            assert_eq!(job.until_over().await, Ending::Completed);
            let copied = job.details().bytes_copied;
            assert!(copied < LEN as u64 + (2 << 20), "it began from the start: {copied} bytes were copied");
            drop((job, guest, source, target));
            server.idle().await;
            server.stop().await;
            let same = world.read_live("/local", 0, LEN) == world.read_live("/disk", 0, LEN);
            assert!(same, "seed {seed}: the copy differs");
        });
    }
}

async fn start_conversion(ring: &Ring, source: &Rc<Node>, target: &Rc<Node>) -> Job {
    let options = ConvertOptions { speed: 1 << 20, ..ConvertOptions::new("convert") };
    convert::start(ring, source, target, options).await.unwrap().0
}

#[test]
fn a_job_is_given_up_in_bounded_time_whatever_the_server_does() {
    let ways = (0..8).map(|i| (i, i % 2 == 0, i / 2 % 2 == 0, i / 4 == 0));
    for (seed, hangs, to_server, mirrors) in ways {
        in_world(seed, move |ring, world| async move {
            let server = serve(&ring);
            let (here, there) = (local(&ring, &world, seed), remote(&ring).await);
            world.write_raw("/disk", 0, &vec![5; LEN]);
            let (source, target) = if to_server { (&here, &there) } else { (&there, &here) };
            let job = if mirrors {
                start(&ring, source, target, 1 << 20).await
            } else {
                start_conversion(&ring, source, target).await
            };
            ring.sleep(500 * MILLI).await;
            if hangs {
                world.hang("unix:/sock");
            } else {
                server.stop().await;
            }
            ring.sleep(5 * SECOND).await;
            assert!(job.ending().is_none(), "{:?}", job.ending());
            let took = give_up(&ring, &job).await;
            let way = format!("hangs {hangs}, to the server {to_server}, mirror {mirrors}");
            assert!(took < 500 * MILLI, "{way}: it took {took} ns");
            // And the disk goes: what still hangs is cut off with it.
            there.driver().fail_in_flight();
            drop((job, here, there));
            world.release("unix:/sock");
            world.heal();
            ring.sleep(6 * SECOND).await;
            server.stop().await;
        });
    }
}

/// Two rings in one world, turned in turn, until `is_over`.
fn turn_both(world: &World, rings: [&Ring; 2], is_over: impl Fn() -> bool) {
    for _ in 0..3_000_000 {
        if is_over() {
            return;
        }
        let busy = rings.map(|ring| {
            let turn = ring.turn();
            turn.progressed || turn.more_work
        });
        if busy == [false, false] {
            world.advance(50_000);
        }
    }
    panic!("it comes to no end");
}

#[test]
fn guests_that_hold_all_memory_do_not_keep_the_disk_from_coming_back() {
    let world = World::new(WorldConfig::new(11));
    world.add_file("/disk", FileModel::regular(LEN as u64));
    let ring_of = |arena_bytes| {
        let config = Config { arena_bytes, ..Config::default() };
        Ring::with_backend(world.backend(), &config).unwrap()
    };
    let (near, far) = (ring_of(2 << 20), ring_of(8 << 20));
    let server = serve(&far);
    let opened = near.spawn_with_result({
        let ring = near.clone();
        async move { NbdNode::open(&ring, options(SOCKET), false).await.unwrap() }
    });
    turn_both(&world, [&near, &far], || opened.is_given());
    let node = opened.try_take().unwrap();
    // The link goes, and with every byte of memory in their requests guests wait for it.
    world.reset_streams("unix:/sock");
    let mut writes = Vec::new();
    for len in [64 << 10, 4096] {
        while let Some(mut buf) = near.arena().try_alloc(len) {
            buf.as_mut_slice().fill(writes.len() as u8);
            let (node, offset) = (node.clone(), writes.len() as u64 * 65536 % (LEN as u64 - 65536));
            writes.push(near.spawn_with_result(async move {
                node.write(offset, buf.freeze(), WriteFlags::default())
                    .await
                    .map_err(|error| error.to_string())
            }));
        }
    }
    assert!(writes.len() > 20 && near.arena().try_alloc(4096).is_none());
    turn_both(&world, [&near, &far], || writes.iter().all(|write| write.is_given()));
    for write in &writes {
        assert_eq!(write.try_take(), Some(Ok(())));
    }
    drop(node);
    let stopped = far.spawn_with_result(async move { server.stop().await });
    turn_both(&world, [&near, &far], || stopped.is_given() && near.task_count() == 0);
    for ring in [near, far] {
        assert_eq!((ring.arena().bytes_used(), ring.shutdown(SECOND).leaked), (0, 0));
    }
}

#[test]
fn a_server_that_stays_away_fails_the_mirror_after_the_delay() {
    in_world(9, |ring, world| async move {
        let server = serve(&ring);
        let (source, target) = (local(&ring, &world, 9), remote(&ring).await);
        let job = start(&ring, &source, &target, 1 << 20).await;
        ring.sleep(500 * MILLI).await;
        server.stop().await;
        let begin = ring.clock();
        let Ending::Failed(text) = job.until_over().await else { panic!("{:?}", job.ending()) };
        let took = ring.clock() - begin;
        assert!((9 * SECOND..11 * SECOND).contains(&took), "{took}");
        assert!(text.contains("nbd+unix:///disk?socket=/sock"), "{text}");
    });
}
