//! Rings in worlds in which things go wrong.

use std::path::Path;

use super::tests::{SECOND, copied, filled, finish, open, world};
use super::*;
use crate::Ring;
use crate::backend::{OpenHow, SocketAddress};
use crate::op::{Fallocate, File};
use crate::sync::{Either, either};

const ALWAYS: u32 = 65_536;

#[test]
fn short_transfers_and_passing_errors_are_finished_inside() {
    let (mut shorts, mut agains) = (0, 0);
    for seed in 0..30 {
        let (world, ring) = world(seed);
        world.add_fault(FaultRule::new(OpKind::Read | OpKind::Write, "/", 40_000, Fault::Short));
        world.add_fault(FaultRule::new(OpKinds::DISK, "/", 10_000, Fault::Again));
        let r = ring.clone();
        ring.block_on(async move {
            let file = open(&r, "/disk");
            let bytes: Vec<u8> = (0..100_000u32).map(|i| (i / 7) as u8).collect();
            assert_eq!(r.write(&file, 100, copied(&r, &bytes).await, false).await, Ok(100_000));
            let (buf, n) = r.read(&file, 100, r.alloc(100_000).await).await;
            assert_eq!(n, Ok(100_000));
            assert!(buf.as_slice() == bytes);
            let mut bufs = Vec::new();
            for len in [40_000, 512, 59_488] {
                bufs.push(r.alloc(len).await);
            }
            let (bufs, n) = r.read_pieces(&file, 100, bufs).await;
            assert_eq!(n, Ok(100_000));
            assert!(bufs.iter().flat_map(|buf| buf.as_slice().to_vec()).collect::<Vec<u8>>() == bytes);
            r.sync(&file, false).await.unwrap();
        });
        let counts = world.fault_counts();
        assert_eq!(ring.stats().short_transfers.get(), counts.shorts);
        assert_eq!(ring.stats().retries.get(), counts.agains);
        shorts += counts.shorts;
        agains += counts.agains;
        assert_eq!(world.read_durable("/disk", 107, 1), [1]);
        finish(&ring);
    }
    assert!(shorts > 60 && agains > 60, "{shorts} {agains}");
}

#[test]
fn errors_strike_where_they_were_aimed() {
    let (world, ring) = world(1);
    world.fail_nth(OpKind::Write, "/disk", 2, Errno::EIO);
    world.fail_nth(OpKind::Open, "/disk", 2, Errno::EACCES);
    world.fail_nth(OpKind::Info, "/disk", 1, Errno::ENOMEM);
    let r = ring.clone();
    ring.block_on(async move {
        let file = open(&r, "/disk");
        assert_eq!(r.open(Path::new("/disk"), &OpenHow::default()).err(), Some(Errno::EACCES));
        assert_eq!(r.info(&file).err(), Some(Errno::ENOMEM));
        assert_eq!(r.info(&file).unwrap().len, 1 << 20);
        assert_eq!(r.write(&file, 0, filled(&r, 512, 1).await, false).await, Ok(512));
        assert_eq!(r.write(&file, 0, filled(&r, 512, 1).await, false).await, Err(Errno::EIO));
        assert_eq!(r.write(&file, 0, filled(&r, 512, 1).await, false).await, Ok(512));
        let read_only = r.open(Path::new("/disk"), &OpenHow::default()).unwrap();
        assert_eq!(r.write(&read_only, 0, filled(&r, 512, 1).await, false).await, Err(Errno::EBADF));
    });
    assert_eq!((world.fault_counts().one_shots, world.one_shots_left()), (3, 0));
    finish(&ring);
}

#[test]
fn a_failed_sync_may_lose_for_good_what_it_was_given() {
    let (mut lost, mut kept) = (0, 0);
    for seed in 0..40 {
        let (world, ring) = world(seed);
        world.fail_nth(OpKind::Sync, "/disk", 1, Errno::EIO);
        let r = ring.clone();
        ring.block_on(async move {
            let file = open(&r, "/disk");
            r.write(&file, 0, filled(&r, 4096, 1).await, false).await.unwrap();
            assert_eq!(r.sync(&file, true).await, Err(Errno::EIO));
            r.sync(&file, true).await.unwrap();
        });
        assert_eq!(world.read_live("/disk", 0, 1), [1]);
        match world.read_durable("/disk", 0, 1)[0] {
            0 => lost += 1,
            _ => kept += 1,
        }
        finish(&ring);
    }
    assert!(lost > 5 && kept > 5, "{lost} {kept}");
}

#[test]
fn space_runs_out_after_what_fits() {
    let (world, ring) = world(2);
    let model = FileModel { capacity_bytes: Some(64 << 10), ..FileModel::regular(1 << 20) };
    world.add_file("/small", model);
    let r = ring.clone();
    ring.block_on(async move {
        let file = open(&r, "/small");
        let result = r.write(&file, 0, filled(&r, 100_000, 1).await, false).await;
        assert_eq!(result, Err(Errno::ENOSPC));
        assert_eq!(r.info(&file).unwrap().allocated, 64 << 10);
        // What is there can be written again, and what is given back can be used elsewhere.
        assert_eq!(r.write(&file, 0, filled(&r, 4096, 2).await, false).await, Ok(4096));
        assert_eq!(r.fallocate(&file, Fallocate::Allocate, 1 << 19, 4096).await, Err(Errno::ENOSPC));
        assert_eq!(r.fallocate(&file, Fallocate::PunchHole, 0, 8192).await, Ok(0));
        assert_eq!(r.fallocate(&file, Fallocate::Allocate, 1 << 19, 4096).await, Ok(0));
        assert_eq!((r.seek(&file, 0, true), r.seek(&file, 8192, false)), (Ok(8192), Ok(64 << 10)));
        assert_eq!(r.seek(&file, 64 << 10, true), Err(Errno::ENXIO));
    });
    world.change_model("/small", |model| model.capacity_bytes = None);
    assert_eq!(world.fault_counts().no_space, 2);
    finish(&ring);
}

#[test]
fn direct_transfers_must_be_aligned_and_forms_of_zeroing_are_refused_as_they_are_on_devices() {
    let (world, ring) = world(3);
    let model = FileModel {
        offset_align: 4096,
        mem_align: 512,
        zero_range_ends_punch_hole: true,
        ..FileModel::block(1 << 20)
    };
    world.add_file("/dev/loop0", model);
    world.add_file("/tmpfs", FileModel { direct: false, zero_range: false, ..FileModel::regular(4096) });
    let r = ring.clone();
    ring.block_on(async move {
        let how = OpenHow { write: true, direct: true, exclusive_device: true, ..OpenHow::default() };
        assert_eq!(r.open(Path::new("/tmpfs"), &how).err(), Some(Errno::EINVAL));
        let file = r.open(Path::new("/dev/loop0"), &how).unwrap();
        assert_eq!(r.open(Path::new("/dev/loop0"), &how).err(), Some(Errno::EBUSY));
        let info = r.info(&file).unwrap();
        assert_eq!((info.mem_align, info.offset_align, info.len), (512, 4096, 1 << 20));
        let (_, n) = r.read(&file, 512, r.alloc(4096).await).await;
        assert_eq!(n, Err(Errno::EINVAL));
        let (_, n) = r.read(&file, 0, r.alloc(5000).await.split_at(4000).1).await;
        assert_eq!(n, Err(Errno::EINVAL));
        let (_, n) = r.read(&file, 0, r.alloc(4096 + 512).await.split_at(512).1).await;
        assert_eq!(n, Ok(4096));
        assert_eq!(r.write(&file, 1 << 20, filled(&r, 4096, 1).await, false).await, Err(Errno::ENOSPC));
        let edge = (1 << 20) - 4096;
        assert_eq!(r.write(&file, edge, filled(&r, 8192, 1).await, false).await, Err(Errno::ENOSPC));
        assert_eq!(r.fallocate(&file, Fallocate::PunchHole, edge, 4096).await, Ok(0));
        assert_eq!(r.fallocate(&file, Fallocate::ZeroRange, edge, 512).await, Err(Errno::EINVAL));
        assert_eq!(r.fallocate(&file, Fallocate::ZeroRange, edge, 4096).await, Ok(0));
        assert_eq!(r.fallocate(&file, Fallocate::PunchHole, edge, 4096).await, Err(Errno::EOPNOTSUPP));
        assert_eq!(r.discard(&file, 0, 65_536).await, Ok(0));
        assert_eq!(r.seek(&file, 0, true), Err(Errno::EINVAL));
        let file = open(&r, "/tmpfs");
        assert_eq!(r.discard(&file, 0, 4096).await, Err(Errno::EOPNOTSUPP));
        assert_eq!(r.fallocate(&file, Fallocate::ZeroRange, 0, 4096).await, Err(Errno::EOPNOTSUPP));
    });
    assert_eq!((world.fault_counts().misaligned, world.fault_counts().unsupported), (2, 3));
    finish(&ring);
}

#[test]
fn a_discard_leaves_anything() {
    let mut seen = [0; 3];
    for seed in 0..60 {
        let (world, ring) = world(seed);
        world.add_file("/dev/sda", FileModel::block(65_536));
        world.write_raw("/dev/sda", 0, &[1; 65_536]);
        let r = ring.clone();
        ring.block_on(async move {
            let file = open(&r, "/dev/sda");
            r.discard(&file, 512, 1024).await.unwrap();
        });
        let bytes = world.read_live("/dev/sda", 0, 65_536);
        assert!(bytes[..512].iter().chain(&bytes[1536..]).all(|byte| *byte == 1));
        let part = &bytes[512..1536];
        let kind = if *part == [1; 1024] {
            0
        } else if *part == [0; 1024] {
            1
        } else {
            2
        };
        seen[kind] += 1;
        finish(&ring);
    }
    assert!(seen.iter().all(|n| *n > 5), "{seen:?}");
}

#[test]
fn what_hangs_ends_after_its_release_and_nothing_else_waits_for_it() {
    let (world, ring) = world(4);
    world.add_file("/stuck", FileModel::regular(4096));
    world.hang("/stuck");
    let (r, w) = (ring.clone(), world.clone());
    ring.block_on(async move {
        let (good, stuck) = (open(&r, "/disk"), open(&r, "/stuck"));
        let write = r.write(&stuck, 0, filled(&r, 512, 5).await, false);
        assert_eq!(r.write(&good, 0, filled(&r, 512, 1).await, false).await, Ok(512));
        r.sleep(60 * SECOND).await;
        write.cancel();
        r.sleep(SECOND).await;
        assert_eq!(w.writes_in_flight("/stuck"), 1);
        assert_eq!(w.in_flight_lines(), ["write on /stuck, 0 bytes moved, hangs"]);
        w.heal();
        assert_eq!(write.await, Ok(512));
        assert_eq!(w.read_live("/stuck", 0, 1), [5]);
    });
    assert_eq!(world.fault_counts().hangs, 1);
    finish(&ring);
}

#[test]
fn a_cancelled_write_may_have_happened_or_not_or_even_succeed() {
    let (mut succeeded, mut happened, mut nothing) = (0, 0, 0);
    for seed in 0..200 {
        let (world, ring) = world(seed);
        let (r, w) = (ring.clone(), world.clone());
        let result = ring.block_on(async move {
            let file = open(&r, "/disk");
            let write = r.write(&file, 0, filled(&r, 4096, 1).await, false);
            while w.writes_in_flight("/disk") == 0 {
                r.yield_now().await;
            }
            write.cancel();
            write.await
        });
        match (result, world.read_live("/disk", 0, 1)[0]) {
            (Ok(4096), 1) => succeeded += 1,
            (Err(Errno::ECANCELED), 1) => happened += 1,
            (Err(Errno::ECANCELED), 0) => nothing += 1,
            other => panic!("{other:?}"),
        }
        finish(&ring);
    }
    assert!(succeeded > 20 && happened > 5 && nothing > 20, "{succeeded} {happened} {nothing}");
}

/// Both ends of one connection.
async fn pair(ring: &Ring) -> (File, File, File) {
    let (listener, address) = ring.listen(&SocketAddress::Unix("/run/pair".into())).unwrap();
    let client = ring.connect(&address).unwrap();
    let server = ring.accept(&listener).await.unwrap();
    (client, server, listener)
}

async fn recv(ring: &Ring, stream: &File) -> Result<u32, Errno> {
    ring.recv(stream, ring.alloc(100).await).await.1
}

async fn send(ring: &Ring, stream: &File) -> Result<u32, Errno> {
    ring.send(stream, filled(ring, 100, 1).await).await
}

#[test]
fn connections_end_in_all_their_ways() {
    let (world, ring) = world(5);
    let (r, w) = (ring.clone(), world.clone());
    ring.block_on(async move {
        // Shut down here: end of stream there, EPIPE for what the peer still sends.
        let (client, server, _) = pair(&r).await;
        let waiting = r.recv(&client, r.alloc(10).await);
        r.yield_now().await;
        r.shutdown_stream(&client);
        assert_eq!(waiting.await.1, Ok(0));
        assert_eq!(send(&r, &client).await, Err(Errno::EPIPE));
        assert_eq!(recv(&r, &server).await, Ok(0));
        assert_eq!(send(&r, &server).await, Err(Errno::EPIPE));
        // Closed with nothing unread.
        let (client, server, _) = pair(&r).await;
        drop(client);
        assert_eq!(recv(&r, &server).await, Ok(0));
        // Closed with bytes unread; what it sent before still arrives.
        let (client, server, _) = pair(&r).await;
        send(&r, &server).await.unwrap();
        send(&r, &client).await.unwrap();
        drop(client);
        assert!(recv(&r, &server).await.unwrap() > 0);
        while recv(&r, &server).await.is_ok_and(|n| n > 0) {}
        assert_eq!(recv(&r, &server).await, Err(Errno::ECONNRESET));
        // Reset from outside.
        let (client, server, _) = pair(&r).await;
        send(&r, &client).await.unwrap();
        assert!(w.reset_streams("unix:/run/pair") > 0);
        assert_eq!(recv(&r, &server).await, Err(Errno::ECONNRESET));
        assert_eq!(send(&r, &client).await, Err(Errno::ECONNRESET));
        // Half closed by a fault.
        let (client, server, _) = pair(&r).await;
        w.add_fault(FaultRule::new(OpKind::Send, "unix:/run/pair#client", ALWAYS, Fault::HalfClose));
        assert_eq!(send(&r, &client).await, Err(Errno::EPIPE));
        assert_eq!(recv(&r, &server).await, Ok(0));
        assert_eq!(send(&r, &server).await, Ok(100));
        assert!(recv(&r, &client).await.unwrap() > 0);
        w.set_faults(Vec::new());
        // Nobody listens; a listener is shut down under an accept.
        let (_, _, listener) = pair(&r).await;
        let accept = r.accept(&listener);
        let shut = async {
            r.yield_now().await;
            r.shutdown_stream(&listener);
        };
        assert_eq!(crate::sync::join(accept, shut).await.0.err(), Some(Errno::EINVAL));
        assert_eq!(r.connect(&SocketAddress::Unix("/run/pair".into())).err(), Some(Errno::ECONNREFUSED));
    });
    assert_eq!(world.fault_counts().half_closes, 1);
    finish(&ring);
}

#[test]
fn a_peer_that_does_not_read_is_felt_and_a_stalled_direction_goes_on_after_its_release() {
    let (world, ring) = world(6);
    let (r, w) = (ring.clone(), world.clone());
    ring.block_on(async move {
        let (client, server, _) = pair(&r).await;
        let big = filled(&r, 1 << 20, 1).await;
        let timeout = r.sleep(10 * SECOND);
        let mut sending = std::pin::pin!(r.send(&client, big));
        assert!(matches!(either(sending.as_mut(), timeout).await, Either::Second(())));
        let receives = async {
            let mut sum = 0;
            while sum < 1 << 20 {
                sum += r.recv(&server, r.alloc(50_000).await).await.1.unwrap();
            }
        };
        assert_eq!(crate::sync::join(sending, receives).await.0, Ok(1 << 20));
        w.hang("unix:/run/pair#client");
        let mut sending = std::pin::pin!(send(&r, &client));
        assert!(matches!(either(sending.as_mut(), r.sleep(10 * SECOND)).await, Either::Second(())));
        w.release("unix:/run/pair");
        assert_eq!(sending.await, Ok(100));
    });
    finish(&ring);
}
