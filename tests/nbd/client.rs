//! The NBD client connection against real servers.

use common::nbd_peers;

use std::cell::Cell;
use std::future::Future;
use std::rc::Rc;

use blockferry::protocol::nbd::{
    AllocationFlags, CommandFlags, ConnectOptions, Connection, HeaderStyle, LostReason, NbdClientError,
    NbdErrno, NbdUri, NotSentReason, list_exports,
};
use blockferry_ring::{Config, Errno, Ring};
use nbd_peers::Peer;

fn uri(peer: &Peer) -> NbdUri {
    peer.uri().parse().expect("a good URI")
}

/// Runs `test` on a ring of its own.
fn on_ring<T: 'static, F: Future<Output = T> + 'static>(test: impl FnOnce(Ring) -> F) -> T {
    let ring = Ring::new(&Config::default()).expect("a ring");
    let result = ring.block_on(test(ring.clone()));
    assert_eq!(ring.shutdown(5_000_000_000).leaked, 0);
    result
}

async fn connect(ring: &Ring, uri: &NbdUri) -> Rc<Connection> {
    Connection::connect(ring, uri, &ConnectOptions::default()).await.expect("a connection")
}

fn fill(bytes: &mut [u8], seed: u8) {
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = (i as u32).wrapping_mul(2_654_435_761).to_be_bytes()[0] ^ seed;
    }
}

async fn check_round_trips(ring: Ring, uri: NbdUri, options: ConnectOptions) {
    let connection = Connection::connect(&ring, &uri, &options).await.expect("a connection");
    let size = connection.size();
    // From one sector up to the largest buffer, which takes the way around the copy.
    for (seed, bytes) in [512, 4096, 33 << 10, 100 << 10, 512 << 10, 1 << 20].into_iter().enumerate() {
        let offset = size - bytes as u64 - 4096;
        let mut buf = ring.alloc(bytes).await;
        fill(buf.as_mut_slice(), seed as u8);
        let expected = buf.as_slice().to_vec();
        connection.write(offset, buf.freeze(), seed % 2 == 1).await.expect("a write");
        let mut buf = ring.alloc(bytes).await;
        buf.as_mut_slice().fill(0xee);
        let (buf, result) = connection.read(offset, buf).await;
        result.expect("a read");
        assert!(buf.as_slice() == expected, "{bytes} bytes");
    }
    connection.flush().await.expect("a flush");
    connection.disconnect().await;
    let late = connection.flush().await.expect_err("it is closed");
    assert!(matches!(late, NbdClientError::Lost { reason: LostReason::ClosedHere, .. }), "{late}");
}

#[test]
fn what_is_written_is_read_in_every_style_and_from_every_server() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    std::fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
    let peers = [Peer::nbdkit(&["memory", "16M"]), Peer::qemu_nbd(&image, &["--cache=writeback"])];
    for peer in &peers {
        for structured_replies in [true, false] {
            let options = ConnectOptions {
                structured_replies,
                extended_headers: structured_replies,
                ..ConnectOptions::default()
            };
            let uri = uri(peer);
            on_ring(|ring| check_round_trips(ring, uri, options));
        }
    }
}

#[test]
fn a_deep_queue_keeps_every_answer_apart() {
    let peer = Peer::nbdkit(&["memory", "64M"]);
    let uri = uri(&peer);
    on_ring(|ring| async move {
        let connection = connect(&ring, &uri).await;
        let wrong = Rc::new(Cell::new(0));
        let tasks: Vec<_> = (0..300u64)
            .map(|i| {
                let (ring, connection, wrong) = (ring.clone(), connection.clone(), wrong.clone());
                ring.clone().spawn_with_result(async move {
                    let bytes = 512 * (1 + i as usize % 200);
                    let offset = i * (200 << 10);
                    let mut buf = ring.alloc(bytes).await;
                    fill(buf.as_mut_slice(), i as u8);
                    let expected = buf.as_slice().to_vec();
                    connection.write(offset, buf.freeze(), false).await.expect("a write");
                    for _ in 0..3 {
                        let buf = ring.alloc(bytes).await;
                        let (buf, result) = connection.read(offset, buf).await;
                        result.expect("a read");
                        if buf.as_slice() != expected {
                            wrong.set(wrong.get() + 1);
                        }
                    }
                })
            })
            .collect();
        for task in tasks {
            task.take().await;
        }
        assert_eq!((wrong.get(), connection.in_flight()), (0, 0));
        connection.disconnect().await;
    });
}

#[test]
fn requests_leave_in_batches() {
    // No answer comes before all requests have had the time to leave, one by one if need be.
    let delays = ["--threads=64", "--filter=delay", "memory", "1M", "rdelay=300ms"];
    let peer = Peer::nbdkit(&delays);
    let uri = uri(&peer);
    on_ring(|ring| async move {
        let connection = connect(&ring, &uri).await;
        let before = ring.stats().snapshot().operations;
        let answered = Rc::new(Cell::new(None));
        let tasks: Vec<_> = (0..64u64)
            .map(|i| {
                let (ring, connection, answered) = (ring.clone(), connection.clone(), answered.clone());
                ring.clone().spawn_with_result(async move {
                    let buf = ring.alloc(512).await;
                    connection.read(i * 512, buf).await.1.expect("a read");
                    answered.set(answered.get().or(Some(ring.stats().snapshot().operations)));
                })
            })
            .collect();
        for task in tasks {
            task.take().await;
        }
        let operations = answered.get().expect("an answer") - before;
        assert!(operations < 32, "64 requests took {operations} operations until the first answer was there");
        connection.disconnect().await;
    });
}

#[test]
fn zeroes_trims_and_extents() {
    let peer = Peer::nbdkit(&["memory", "8M"]);
    let uri = uri(&peer);
    on_ring(|ring| async move {
        let connection = connect(&ring, &uri).await;
        assert!(connection.has_block_status() && connection.can_multi_conn() && !connection.is_read_only());
        assert_ne!(connection.negotiated().style, HeaderStyle::Simple);
        let mut buf = ring.alloc(1 << 20).await;
        buf.as_mut_slice().fill(7);
        connection.write(1 << 20, buf.freeze(), false).await.expect("a write");
        connection.write_zeroes((1 << 20) + 65536, 4096, CommandFlags::FUA).await.expect("zeroes");
        connection.trim(3 << 19, 65536).await.expect("a trim");
        let (buf, result) = connection.read((1 << 20) + 65536 - 1, ring.alloc(4098).await).await;
        result.expect("a read");
        assert_eq!((buf.as_slice()[0], buf.as_slice()[4097]), (7, 7));
        assert!(buf.as_slice()[1..4097].iter().all(|byte| *byte == 0));
        let extents = connection.block_status(0, 8 << 20).await.expect("extents");
        assert_eq!(extents.iter().map(|extent| extent.length).sum::<u64>(), 8 << 20);
        let hole = u64::from(AllocationFlags::HOLE.with(AllocationFlags::ZERO).0);
        assert_eq!((extents[0].length, extents[0].flags), (1 << 20, hole));
        assert_eq!(extents[1].flags, 0);
        connection.disconnect().await;
    });
}

#[test]
fn a_refused_request_leaves_the_others_alone() {
    let peer =
        Peer::nbdkit(&["--filter=error", "memory", "1M", "error-pread=ENOSPC", "error-pread-rate=100%"]);
    let uri = uri(&peer);
    on_ring(|ring| async move {
        let connection = connect(&ring, &uri).await;
        for _ in 0..3 {
            let (buf, result) = connection.read(4096, ring.alloc(512).await).await;
            let error = result.expect_err("the filter fails all reads");
            assert!(
                matches!(&error, NbdClientError::Refused { errno: NbdErrno::NoSpace, offset: 4096, .. }),
                "{error}"
            );
            assert_eq!(error.errno(), Errno::ENOSPC);
            connection.write(0, buf.freeze(), false).await.expect("a write");
        }
        connection.disconnect().await;
    });
}

#[test]
fn what_makes_no_sense_is_not_sent() {
    let peer = Peer::nbdkit(&["--readonly", "memory", "1M"]);
    let uri = uri(&peer);
    on_ring(|ring| async move {
        let connection = connect(&ring, &uri).await;
        let reason = |error: NbdClientError| match error {
            NbdClientError::NotSent { reason, .. } => reason,
            other => panic!("{other}"),
        };
        let out_of_range = NotSentReason::OutOfRange { size_bytes: 1 << 20 };
        let (buf, result) = connection.read((1 << 20) - 511, ring.alloc(512).await).await;
        assert_eq!(reason(result.unwrap_err()), out_of_range);
        let (buf, result) = connection.read(u64::MAX - 3, buf).await;
        assert_eq!(reason(result.unwrap_err()), out_of_range);
        assert_eq!(reason(connection.block_status(0, 0).await.unwrap_err()), out_of_range);
        let write = connection.write(0, buf.freeze(), false).await;
        assert_eq!(reason(write.unwrap_err()), NotSentReason::ReadOnly);
        assert_eq!(reason(connection.trim(0, 512).await.unwrap_err()), NotSentReason::ReadOnly);
    });
}

#[test]
fn a_server_that_dies_fails_everything_in_flight() {
    let mut peer = Peer::nbdkit(&["--filter=delay", "memory", "1M", "rdelay=60"]);
    let uri = uri(&peer);
    on_ring(|ring| async move {
        let connection = connect(&ring, &uri).await;
        let reads: Vec<_> = (0..20)
            .map(|i| {
                let (ring, connection) = (ring.clone(), connection.clone());
                ring.clone().spawn_with_result(async move {
                    let buf = ring.alloc(4096).await;
                    connection.read(i * 4096, buf).await
                })
            })
            .collect();
        ring.sleep(50_000_000).await;
        assert_eq!(connection.in_flight(), 20);
        peer.kill();
        for read in reads {
            let (buf, result) = read.take().await;
            assert_eq!(buf.len(), 4096, "the buffer comes back");
            assert!(result.expect_err("the server is dead").is_lost());
        }
        assert!(connection.lost().is_some() && connection.flush().await.is_err());
        assert_eq!(connection.in_flight(), 0);
    });
}

#[test]
fn a_dropped_connection_ends_its_tasks() {
    let peer = Peer::nbdkit(&["memory", "1M"]);
    let uri = uri(&peer);
    on_ring(|ring| async move {
        let before = ring.task_count();
        let connection = connect(&ring, &uri).await;
        assert_eq!(ring.task_count(), before + 2);
        drop(connection);
        while ring.task_count() > before {
            ring.sleep(1_000_000).await;
        }
        assert!(ring.arena().bytes_used() < 64 << 10, "its buffers are back");
    });
}

#[test]
fn nobody_there_and_no_such_export() {
    let peer = Peer::nbdkit(&["--exportname=disk", "memory", "1M"]);
    let folder = tempfile::tempdir().unwrap();
    let uri = uri(&peer);
    let mut nobody = uri.clone();
    nobody.address =
        format!("nbd+unix:///?socket={}/nobody", folder.path().display()).parse::<NbdUri>().unwrap().address;
    let resolved: NbdUri = "nbd://no-such-host.invalid/".parse().unwrap();
    on_ring(|ring| async move {
        let options = ConnectOptions::default();
        let error = Connection::connect(&ring, &nobody, &options).await.expect_err("nobody");
        assert!(matches!(error, NbdClientError::Connect { errno: Errno::ENOENT, .. }), "{error}");
        let error = Connection::connect(&ring, &resolved, &options).await.expect_err("no such host");
        assert!(matches!(error, NbdClientError::Resolve { .. }), "{error}");
        let listed = list_exports(&ring, &uri, options.deadline).await.expect("a list");
        assert!(!listed.is_empty());
    });
}

#[test]
fn a_silent_server_is_given_up() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let uri: NbdUri = format!("nbd+unix:///?socket={}", socket.display()).parse().unwrap();
    on_ring(|ring| async move {
        let options = ConnectOptions { deadline: 50_000_000, ..ConnectOptions::default() };
        let error = Connection::connect(&ring, &uri, &options).await.expect_err("silence");
        assert!(matches!(error, NbdClientError::Lost { reason: LostReason::TimedOut, .. }), "{error}");
    });
}
