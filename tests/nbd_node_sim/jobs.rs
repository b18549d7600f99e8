//! Mirrors to and from remote disks in virtual time: a link that is cut for seconds, servers that are dead or hang.

use std::path::Path;
use std::rc::Rc;

use blockferry::block::WriteFlags;
use blockferry::graph::node::{Node, Root};
use blockferry::job::mirror::{self, MirrorOptions};
use blockferry::job::runner::{Ending, Job};
use blockferry::protocol::nbd::NbdNode;
use blockferry::protocol::open::{OpenOptions, open};
use blockferry_ring::rand::Rand;
use blockferry_ring::sim::{FileModel, World};
use blockferry_ring::{Nanos, Ring};

use super::{MILLI, SECOND, SOCKET, address, in_world, options, serve};

const LEN: usize = 4 << 20;

fn local(ring: &Ring, world: &World, seed: u64) -> Rc<Node> {
    world.add_file("/local", FileModel::regular(LEN as u64));
    let mut rand = Rand::new(seed);
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

#[test]
fn a_mirror_is_given_up_in_bounded_time_whatever_the_server_does() {
    for (seed, hangs, to_server) in [(1, true, true), (2, true, false), (3, false, true), (4, false, false)] {
        in_world(seed, move |ring, world| async move {
            let server = serve(&ring);
            let (here, there) = (local(&ring, &world, seed), remote(&ring).await);
            world.write_raw("/disk", 0, &vec![5; LEN]);
            let (source, target) = if to_server { (&here, &there) } else { (&there, &here) };
            let job = start(&ring, source, target, 1 << 20).await;
            ring.sleep(500 * MILLI).await;
            if hangs {
                world.hang("unix:/sock");
            } else {
                server.stop().await;
            }
            ring.sleep(5 * SECOND).await;
            assert!(job.ending().is_none(), "{:?}", job.ending());
            let took = give_up(&ring, &job).await;
            assert!(took < 500 * MILLI, "hangs {hangs}, to the server {to_server}: it took {took} ns");
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
