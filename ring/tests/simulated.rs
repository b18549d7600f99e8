//! The reactor's edges, in the simulated world: operations that nobody wants any more, and shutdown
//! with something that never ends.

use std::path::Path;

use blockferry_ring::sim::{FileModel, World, WorldConfig};
use blockferry_ring::sync::{Either, either};
use blockferry_ring::{Config, Errno, File, OpenHow, Ring, SocketAddress};

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
