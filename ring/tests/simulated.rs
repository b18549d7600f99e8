//! The reactor's edges, in the simulated world: operations that nobody wants any more, and shutdown
//! with something that never ends.

use std::cell::Cell;
use std::path::Path;
use std::rc::Rc;

use blockferry_ring::sim::{FileModel, Latency, World, WorldConfig};
use blockferry_ring::sync::{Either, either};
use blockferry_ring::{Budget, Config, Errno, File, OpenHow, Ring, SocketAddress};

const SECOND: u64 = 1_000_000_000;

fn world(seed: u64) -> (World, Ring) {
    let world = World::new(WorldConfig::new(seed));
    let config = Config { arena_bytes: 1 << 20, ..Config::default() };
    let ring = Ring::with_backend(world.backend(), &config).unwrap();
    (world, ring)
}

/// Both ends of one connection.
async fn pair(ring: &Ring) -> (File, File) {
    let (listener, address) = ring.listen(&SocketAddress::Unix("/run/pair".into())).unwrap();
    let client = ring.connect(&address).unwrap();
    (client, ring.accept(&listener).await.unwrap())
}

async fn send(ring: &Ring, stream: &File, bytes: &[u8]) {
    let mut buf = ring.alloc(bytes.len()).await;
    buf.copy_from(0, bytes);
    assert_eq!(ring.send(stream, buf.freeze()).await, Ok(bytes.len() as u32));
}

fn finish(ring: &Ring) {
    assert_eq!(ring.shutdown(10 * SECOND).leaked, 0);
    assert_eq!((ring.stats().stale_completions.get(), ring.arena().bytes_used()), (0, 0));
}

#[test]
fn a_receive_that_was_dropped_before_it_left_takes_no_bytes() {
    for seed in 0..20 {
        let (_world, ring) = world(seed);
        let r = ring.clone();
        ring.block_on(async move {
            let (client, server) = pair(&r).await;
            drop(r.recv(&server, r.alloc(4).await));
            let receives = async {
                let (buf, n) = r.recv_all(&server, r.alloc(8).await).await;
                assert_eq!(n, Ok(8));
                assert_eq!(buf.as_slice(), b"12345678");
            };
            let sends = async {
                r.sleep(SECOND).await;
                send(&r, &client, b"12345678").await;
            };
            blockferry_ring::sync::join(receives, sends).await;
        });
        finish(&ring);
    }
}

#[test]
fn a_cancel_ends_what_is_queued_and_what_is_half_done() {
    for seed in 0..20 {
        let (world, ring) = world(seed);
        let r = ring.clone();
        ring.block_on(async move {
            let (client, server) = pair(&r).await;
            let queued = r.recv(&server, r.alloc(4).await);
            queued.cancel();
            assert_eq!(queued.await.1, Err(Errno::ECANCELED));
            send(&r, &client, b"1234").await;
            let half_done = r.recv_all(&server, r.alloc(8).await);
            r.sleep(SECOND).await;
            half_done.cancel();
            match either(half_done, r.sleep(60 * SECOND)).await {
                Either::First((_, n)) => assert_eq!(n, Err(Errno::ECANCELED)),
                Either::Second(()) => panic!("what was cancelled went on waiting"),
            }
        });
        assert_eq!(world.in_flight(), 0);
        finish(&ring);
    }
}

#[test]
fn a_connection_that_was_accepted_for_nobody_is_closed() {
    let (_world, ring) = world(1);
    let r = ring.clone();
    ring.block_on(async move {
        let (listener, address) = r.listen(&SocketAddress::Unix("/run/door".into())).unwrap();
        let mut accept = Box::pin(r.accept(&listener));
        assert!(matches!(either(accept.as_mut(), r.sleep(SECOND)).await, Either::Second(())));
        let client = r.connect(&address).unwrap();
        r.sleep(SECOND).await;
        // The connection is there, but its result was never looked at.
        drop(accept);
        let (_, n) = r.recv(&client, r.alloc(4).await).await;
        assert_eq!(n, Ok(0));
    });
    finish(&ring);
}

#[test]
fn a_shutdown_that_waits_for_long_sleeps_meanwhile() {
    let (world, ring) = world(2);
    world.add_file("/stuck", FileModel::regular(4096));
    world.hang("/stuck");
    let file = ring.open(Path::new("/stuck"), &OpenHow::default()).unwrap();
    let r = ring.clone();
    ring.spawn(async move { drop(r.read(&file, 0, r.alloc(512).await).await) });
    let _ = ring.turn();
    let before = ring.stats().enters.get();
    assert_eq!(ring.shutdown(30 * SECOND).leaked, 1);
    assert!(ring.stats().enters.get() - before < 50);
}

/// A ring with narrow turns, and a disk.
fn narrow(budget: Budget) -> (World, Ring, File) {
    let world = World::new(WorldConfig::new(1));
    world
        .add_file("/disk", FileModel { latency: Latency::fixed(SECOND / 10), ..FileModel::regular(8 << 20) });
    let config = Config { arena_bytes: 16 << 20, budget, ..Config::default() };
    let ring = Ring::with_backend(world.backend(), &config).unwrap();
    let file = ring.open(Path::new("/disk"), &OpenHow::default()).unwrap();
    (world, ring, file)
}

/// Starts so many reads of `len` bytes; the count of those that have ended.
fn reads(ring: &Ring, file: &File, count: usize, len: usize) -> Rc<Cell<usize>> {
    let ended = Rc::new(Cell::new(0));
    for _ in 0..count {
        let (r, file, ended) = (ring.clone(), file.clone(), ended.clone());
        ring.spawn(async move {
            let buf = r.alloc(len).await;
            let (_, result) = r.read(&file, 0, buf).await;
            assert_eq!(result, Ok(len as u32));
            ended.set(ended.get() + 1);
        });
    }
    ended
}

#[test]
fn a_turn_delivers_no_more_completions_than_it_may() {
    let (world, ring, file) = narrow(Budget { completions: 10, ..Budget::default() });
    let ended = reads(&ring, &file, 95, 4096);
    while ring.turn().more_work {}
    assert_eq!(ended.get(), 0, "the reads are in flight");
    world.advance(SECOND);
    for turn in 1..=9 {
        let left = ring.turn();
        assert_eq!(ended.get(), turn * 10);
        assert!(left.more_work, "a caller would sleep with {} undelivered", 95 - ended.get());
    }
    let _ = ring.turn();
    assert_eq!(ended.get(), 95);
    finish(&ring);
}

#[test]
fn a_turn_submits_no_more_bytes_than_it_may() {
    let (_, ring, file) = narrow(Budget { bytes: 256 << 10, ..Budget::default() });
    let _ended = reads(&ring, &file, 40, 65_536);
    let mut before = 0;
    let mut turns = 0;
    loop {
        let turn = ring.turn();
        turns += 1;
        assert!(turn.in_flight - before <= 4, "{} reads of 64 KiB left in one turn", turn.in_flight - before);
        before = turn.in_flight;
        if !turn.more_work {
            break;
        }
    }
    assert!(turns >= 10 && before == 40, "{turns} turns, {before} in flight");
    finish_in_flight(&ring);
}

#[test]
fn a_turn_spends_no_more_time_in_tasks_than_it_may() {
    let budget = 500_000;
    let (world, ring, _file) = narrow(Budget { nanos: budget, ..Budget::default() });
    // Tasks that take a tenth of a turn each.
    let ran = Rc::new(Cell::new(0));
    for _ in 0..200 {
        let (world, ran) = (world.clone(), ran.clone());
        ring.spawn(async move {
            world.advance(50_000);
            ran.set(ran.get() + 1);
        });
    }
    let mut turns = 0;
    while ran.get() < 200 {
        let before = world.now();
        let turn = ring.turn();
        turns += 1;
        // The clock is looked at after every sixteenth task.
        assert!(world.now() - before <= budget + 16 * 50_000, "a turn took {} ns", world.now() - before);
        assert!(turn.more_work || ran.get() == 200);
    }
    assert!(turns >= 200 / 32, "{turns} turns");
    finish(&ring);
}

/// Like [`finish`], with operations in flight whose tasks go.
fn finish_in_flight(ring: &Ring) {
    assert_eq!(ring.shutdown(10 * SECOND).leaked, 0);
}
