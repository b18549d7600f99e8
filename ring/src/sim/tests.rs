//! Rings in simulated worlds: disks, power cuts, streams, time, and the same history twice.

use std::cell::{Cell, RefCell};
use std::path::Path;
use std::rc::Rc;

use super::*;
use crate::backend::{FileKind, OpenHow, SocketAddress};
use crate::mem::{Buf, SharedBuf};
use crate::op::{Fallocate, File};
use crate::rng::Rng;
use crate::sync::join;
use crate::{Config, Ring};

pub(super) const SECOND: Nanos = 1_000_000_000;

pub(super) fn ring_of(world: &World) -> Ring {
    let config = Config { arena_bytes: 4 << 20, ..Config::default() };
    Ring::with_backend(world.backend(), &config).unwrap()
}

pub(super) fn world(seed: u64) -> (World, Ring) {
    let world = World::new(WorldConfig::new(seed));
    world.add_file("/disk", FileModel::regular(1 << 20));
    let ring = ring_of(&world);
    (world, ring)
}

pub(super) fn open(ring: &Ring, path: &str) -> File {
    ring.open(Path::new(path), &OpenHow { write: true, ..OpenHow::default() }).unwrap()
}

pub(super) async fn filled(ring: &Ring, len: usize, byte: u8) -> SharedBuf {
    let mut buf = ring.alloc(len).await;
    buf.as_mut_slice().fill(byte);
    buf.freeze()
}

pub(super) async fn copied(ring: &Ring, bytes: &[u8]) -> SharedBuf {
    let mut buf = ring.alloc(bytes.len()).await;
    buf.copy_from(0, bytes);
    buf.freeze()
}

/// Ends the ring and sees that it ended well.
pub(super) fn finish(ring: &Ring) {
    assert_eq!(ring.shutdown(10 * SECOND).leaked, 0);
    assert_eq!(ring.stats().stale_completions.get(), 0);
    assert_eq!(ring.arena().bytes_used(), 0);
}

#[test]
fn what_is_written_is_read_and_a_sync_makes_it_durable() {
    let (world, ring) = world(1);
    let (r, w) = (ring.clone(), world.clone());
    ring.block_on(async move {
        let file = open(&r, "/disk");
        assert_eq!(r.write(&file, 5000, filled(&r, 70_000, 7).await, false).await, Ok(70_000));
        let (buf, n) = r.read(&file, 4990, r.alloc(100).await).await;
        assert_eq!(n, Ok(100));
        assert_eq!((buf.as_slice()[9], buf.as_slice()[10]), (0, 7));
        assert_eq!(w.read_live("/disk", 5000, 1), [7]);
        assert_eq!(w.read_durable("/disk", 5000, 1), [0]);
        r.sync(&file, true).await.unwrap();
        assert_eq!(w.read_durable("/disk", 74_999, 2), [7, 0]);
        assert_eq!(w.undurable_changes("/disk"), 0);
        // FUA needs no sync; a file grows with what is written past its end; there reads are short.
        assert_eq!(r.write(&file, 1 << 20, filled(&r, 10, 9).await, true).await, Ok(10));
        assert_eq!(w.durable_len("/disk"), Some((1 << 20) + 10));
        let (_, n) = r.read(&file, (1 << 20) + 4, r.alloc(4096).await).await;
        assert_eq!(n, Ok(6));
        let (_, n) = r.read(&file, 2 << 20, r.alloc(4096).await).await;
        assert_eq!(n, Ok(0));
    });
    let stats = ring.stats().snapshot();
    assert_eq!(stats.transfers_plain, 0, "{stats:?}");
    assert!(world.now() > 0 && world.events() > 8);
    finish(&ring);
}

#[test]
fn an_hour_of_sleep_is_one_turn() {
    let (world, ring) = world(2);
    let (r, start) = (ring.clone(), std::time::Instant::now());
    ring.block_on(async move { r.sleep(3600 * SECOND).await });
    assert!((3600 * SECOND..3602 * SECOND).contains(&world.now()));
    assert!(start.elapsed().as_secs() < 60);
    // Without blocking, time creeps, and I/O ends all the same.
    let r = ring.clone();
    let file = open(&ring, "/disk");
    let done = ring.spawn_with_result(async move { r.read(&file, 0, r.alloc(512).await).await.1 });
    let mut turns = 0;
    let result = loop {
        match done.try_take() {
            Some(result) => break result,
            None => turns += u32::from(ring.turn().in_flight > 0),
        }
    };
    assert_eq!(result, Ok(512));
    assert!(turns > 1);
    finish(&ring);
}

#[test]
fn a_power_cut_keeps_what_was_synced_and_any_part_of_the_rest() {
    let (mut kept, mut lost, mut torn, mut in_flight_kept) = (0, 0, 0, 0);
    for seed in 0..150 {
        let (world, ring) = world(seed);
        let (r, w) = (ring.clone(), world.clone());
        ring.spawn(async move {
            let file = open(&r, "/disk");
            r.write(&file, 0, filled(&r, 8192, 1).await, false).await.unwrap();
            r.sync(&file, true).await.unwrap();
            r.write(&file, 8192, filled(&r, 8192, 2).await, false).await.unwrap();
            let under_way = r.write(&file, 65_536, filled(&r, 8192, 3).await, false);
            while w.writes_in_flight("/disk") == 0 {
                r.yield_now().await;
            }
            w.power_cut();
            assert_eq!(under_way.await, Err(Errno::EIO));
        });
        while ring.task_count() > 0 {
            let _ = ring.turn_blocking();
        }
        // A ring whose power went ends well, and fails whatever is asked of it.
        assert_eq!(ring.open(Path::new("/disk"), &OpenHow::default()).err(), Some(Errno::EIO));
        finish(&ring);
        assert_eq!(world.read_live("/disk", 0, 8192), [1; 8192]);
        let rest = world.read_live("/disk", 8192, 8192);
        let written = rest.iter().filter(|byte| **byte == 2).count();
        assert!(rest.iter().all(|byte| *byte == 2 || *byte == 0));
        kept += u32::from(written == 8192);
        lost += u32::from(written == 0);
        torn += u32::from(written % 8192 != 0);
        assert_eq!(written % 512, 0);
        in_flight_kept += u32::from(world.read_live("/disk", 65_536, 8192).contains(&3));
        // A new ring finds what is left.
        let after = ring_of(&world);
        let (r, file) = (after.clone(), open(&after, "/disk"));
        let (buf, n) = after.block_on(async move { r.read(&file, 0, r.alloc(8192).await).await });
        assert_eq!((n, buf.as_slice()[8191]), (Ok(8192), 1));
        drop(buf);
        finish(&after);
    }
    assert!(
        kept > 10 && lost > 10 && torn > 3 && in_flight_kept > 10,
        "{kept} {lost} {torn} {in_flight_kept}"
    );
}

#[test]
fn a_sync_promises_nothing_about_writes_that_had_not_completed() {
    let (mut durable, mut volatile) = (0, 0);
    for seed in 0..60 {
        let (world, ring) = world(seed);
        let r = ring.clone();
        ring.block_on(async move {
            let file = open(&r, "/disk");
            let write = r.write(&file, 0, filled(&r, 4096, 1).await, false);
            let (a, b) = join(write, r.sync(&file, true)).await;
            assert_eq!((a, b), (Ok(4096), Ok(0)));
        });
        match world.read_durable("/disk", 0, 1)[0] {
            1 => durable += 1,
            _ => volatile += 1,
        }
        finish(&ring);
    }
    assert!(durable > 5 && volatile > 5, "{durable} {volatile}");
}

#[test]
fn a_forked_world_shows_many_ruins_of_one_instant() {
    let (world, ring) = world(3);
    let r = ring.clone();
    ring.block_on(async move {
        let file = open(&r, "/disk");
        for i in 0..8u8 {
            r.write(&file, u64::from(i) * 4096, filled(&r, 4096, i + 1).await, false).await.unwrap();
        }
    });
    let mut found = std::collections::BTreeSet::new();
    for seed in 0..50 {
        let fork = world.fork_after_power_cut(seed);
        assert_eq!(
            fork.read_live("/disk", 0, 32_768),
            world.fork_after_power_cut(seed).read_live("/disk", 0, 32_768)
        );
        found.insert(fork.read_live("/disk", 0, 32_768));
    }
    assert!(found.len() > 20, "{}", found.len());
    assert_eq!(world.read_live("/disk", 0, 1), [1]);
    finish(&ring);
}

#[test]
fn entries_and_attributes_are_durable_only_after_their_sync() {
    let (world, ring) = world(4);
    let (r, w) = (ring.clone(), world.clone());
    ring.block_on(async move {
        let how = OpenHow { write: true, create_new: true, ..OpenHow::default() };
        assert_eq!(r.open(Path::new("/no/where"), &how).err(), Some(Errno::ENOENT));
        assert_eq!(r.open(Path::new("/disk"), &how).err(), Some(Errno::EEXIST));
        let file = r.open(Path::new("/new"), &how).unwrap();
        assert!(w.exists("/new") && !w.exists_durably("/new"));
        r.set_attribute(&file, "user.state", Some(b"one")).unwrap();
        r.sync(&file, true).await.unwrap();
        assert!(w.exists_durably("/new"));
        assert_eq!(w.get_durable_attribute("/new", "user.state"), None);
        r.sync(&file, false).await.unwrap();
        assert_eq!(w.get_durable_attribute("/new", "user.state"), Some(b"one".to_vec()));
        assert_eq!(r.get_attribute(&file, "user.state"), Ok(Some(b"one".to_vec())));
        assert_eq!(r.rename_new(Path::new("/new"), Path::new("/disk")), Err(Errno::EEXIST));
        r.rename(Path::new("/new"), Path::new("/disk")).unwrap();
        assert!(!w.exists("/new") && w.exists_durably("/new"));
        r.sync_directory(Path::new("/")).unwrap();
        assert!(!w.exists_durably("/new"));
        assert_eq!(w.len("/disk"), Some(0));
        r.unlink(Path::new("/disk")).unwrap();
        assert_eq!(r.lookup(Path::new("/disk")), Ok(None));
        assert_eq!(r.lookup(Path::new("/")), Ok(Some(FileKind::Other)));
    });
    world.power_cut_with(PowerCut::NOTHING_KEPT);
    assert_eq!(world.len("/disk"), Some(0));
    finish(&ring);
}

/// Sends `bytes` through a server that sends everything back, and gives what came.
fn echo(world: &World, ring: &Ring, address: SocketAddress, bytes: Vec<u8>) -> Vec<u8> {
    let (listener, address) = ring.listen(&address).unwrap();
    let r = ring.clone();
    ring.spawn(async move {
        let stream = r.accept(&listener).await.unwrap();
        loop {
            let (mut buf, n) = r.recv(&stream, r.alloc(9_000).await).await;
            let n = n.unwrap() as usize;
            if n == 0 {
                break;
            }
            buf.truncate(n);
            let buf = buf.freeze();
            let pieces = vec![buf.slice(0, n / 3), buf.slice(n / 3, n)].into_iter();
            let pieces: Vec<_> = pieces.filter(|piece| !piece.is_empty()).collect();
            assert_eq!(r.send_pieces(&stream, pieces).await, Ok(n as u32));
        }
    });
    let (r, len) = (ring.clone(), bytes.len());
    let got = ring.block_on(async move {
        let stream = r.connect(&address).unwrap();
        let sends = async {
            for part in bytes.chunks(100_000) {
                assert_eq!(r.send(&stream, copied(&r, part).await).await, Ok(part.len() as u32));
            }
        };
        let receives = async {
            let mut got = Vec::new();
            while got.len() < len {
                let want = (len - got.len()).min(70_000);
                let (buf, n) = r.recv_all(&stream, r.alloc(want).await).await;
                assert_eq!(n, Ok(want as u32));
                got.extend_from_slice(buf.as_slice());
            }
            got
        };
        let ((), got) = join(sends, receives).await;
        r.shutdown_stream(&stream);
        let (_, n) = r.recv(&stream, r.alloc(10).await).await;
        assert_eq!(n, Ok(0));
        got
    });
    while ring.task_count() > 0 {
        let _ = ring.turn_blocking();
    }
    assert!(world.in_flight() == 0);
    got
}

#[test]
fn streams_carry_every_byte_through_every_cut() {
    let mut short = 0;
    for seed in 0..20 {
        let (world, ring) = world(seed);
        if seed % 2 == 1 {
            world.add_fault(FaultRule::new(OpKinds::STREAM, "", 8_192, Fault::Short));
            world.add_fault(FaultRule::new(OpKinds::STREAM, "", 4_096, Fault::Again));
            let (nanos_min, nanos_max) = (1, SECOND);
            world.add_fault(FaultRule::new(OpKinds::STREAM, "", 300, Fault::Delay { nanos_min, nanos_max }));
        }
        let mut rand = Rng::new(seed);
        let bytes: Vec<u8> = (0..400_000).map(|_| rand.next_u64() as u8).collect();
        let address = match seed % 3 {
            0 => SocketAddress::Unix("/run/echo".into()),
            _ => SocketAddress::Tcp("127.0.0.1:0".parse().unwrap()),
        };
        assert!(echo(&world, &ring, address, bytes.clone()) == bytes, "seed {seed}");
        short += ring.stats().short_transfers.get();
        finish(&ring);
    }
    assert!(short > 20);
}

/// A bit of everything, under faults, with a power cut; gives the hash of the history.
fn history(seed: u64, tasks: u64) -> (u64, u64) {
    let (world, ring) = world(seed);
    world.add_swarm("/");
    for task in 0..tasks {
        let r = ring.clone();
        let file = open(&ring, "/disk");
        ring.spawn(async move {
            let mut rand = Rng::new(r.random() ^ task);
            for _ in 0..20 {
                let (offset, len) = (rand.below(200) * 512, rand.range(1..31) as usize * 512);
                match rand.below(6) {
                    0..=2 => drop(r.write(&file, offset, filled(&r, len, task as u8).await, false).await),
                    3 => drop(r.read(&file, offset, r.alloc(len).await).await),
                    4 => drop(r.sync(&file, true).await),
                    _ => drop(r.fallocate(&file, Fallocate::PunchHole, offset, len as u64).await),
                }
                r.sleep(rand.below(1_000_000)).await;
            }
        });
    }
    for _ in 0..200 {
        let _ = ring.turn_blocking();
    }
    world.power_cut();
    assert_eq!(ring.shutdown(SECOND).leaked, 0);
    let hash = super::trace::Hash::of(&world.read_live("/disk", 0, 200_000));
    (world.trace_hash(), hash)
}

#[test]
fn one_seed_is_one_history() {
    let mut hashes = std::collections::BTreeSet::new();
    for seed in 0..20 {
        let first = history(seed, 6);
        assert_eq!(first, history(seed, 6), "seed {seed}");
        hashes.insert(first.0);
    }
    assert_eq!(hashes.len(), 20);
    assert_ne!(history(1, 6).0, history(1, 5).0);
}

#[test]
fn overlapping_writes_are_seen_and_reach_the_disk_in_any_order() {
    let mut winners = [0; 3];
    for seed in 0..60 {
        let (world, ring) = world(seed);
        let (r, w) = (ring.clone(), world.clone());
        ring.block_on(async move {
            let file = open(&r, "/disk");
            let a = r.write(&file, 0, filled(&r, 4096, 1).await, false);
            let b = r.write(&file, 512, filled(&r, 4096, 2).await, false);
            while w.writes_in_flight("/disk") < 2 {
                r.yield_now().await;
            }
            assert_eq!(w.in_flight_overlapping_writes("/disk"), 2);
            let (a, b) = join(a, b).await;
            assert_eq!((a, b), (Ok(4096), Ok(4096)));
        });
        assert_eq!(world.overlapping_writes_seen("/disk"), 1);
        winners[world.read_live("/disk", 1000, 1)[0] as usize] += 1;
        finish(&ring);
    }
    assert!(winners[0] == 0 && winners[1] > 10 && winners[2] > 10, "{winners:?}");
}

#[test]
fn memory_of_an_orphan_stays_until_the_operation_ends() {
    for seed in 0..40 {
        let (world, ring) = world(seed);
        let file = open(&ring, "/disk");
        let (r, w, f) = (ring.clone(), world.clone(), file.clone());
        ring.block_on(async move {
            world_hangs_then(&w, &r, &f).await;
        });
        // Nobody waits, and the memory is still held; what was dropped before it left is gone.
        assert_eq!((world.in_flight(), ring.arena().bytes_used()), (1, 4096));
        world.release("/disk");
        while world.in_flight() > 0 || ring.arena().bytes_used() > 0 {
            let _ = ring.turn_blocking();
        }
        drop(file);
        finish(&ring);
    }
}

async fn world_hangs_then(world: &World, ring: &Ring, file: &File) {
    world.hang("/disk");
    let read = ring.read(file, 0, ring.alloc(4096).await);
    while world.in_flight() == 0 {
        ring.yield_now().await;
    }
    drop(read);
    ring.sleep(2 * SECOND).await;
}

#[test]
fn shutdown_waits_for_what_ends_and_leaks_what_does_not() {
    let (world, ring) = world(5);
    world.hang("/stuck");
    world.add_file("/stuck", FileModel::regular(8192));
    let results: Rc<RefCell<Vec<Buf>>> = Rc::default();
    for path in ["/disk", "/stuck"] {
        let (r, results) = (ring.clone(), results.clone());
        ring.spawn(async move {
            let file = open(&r, path);
            let (buf, _) = r.read(&file, 0, r.alloc(4096).await).await;
            results.borrow_mut().push(buf);
        });
    }
    let _ = ring.turn();
    assert_eq!(world.in_flight(), 2);
    let before = world.now();
    assert_eq!(ring.shutdown(5 * SECOND).leaked, 1);
    assert!(world.now() >= before + 5 * SECOND && results.borrow().is_empty());
    // It ends after all: into memory that was never given away.
    world.release("/stuck");
    world.advance(SECOND);
    assert_eq!(world.in_flight(), 0);
}

#[test]
fn a_ring_that_is_dropped_takes_its_files_and_locks_along() {
    let (world, ring) = world(6);
    let other = ring_of(&world);
    let (mine, theirs) = (open(&ring, "/disk"), open(&other, "/disk"));
    let range = LockRange { start: 100, len: 1 };
    ring.lock_shared(&mine, range).unwrap();
    other.lock_shared(&theirs, range).unwrap();
    assert_eq!(other.lock_conflict(&theirs, range), Ok(true));
    assert_eq!(other.lock_holders(&theirs, range).map(|holders| holders.len()), Some(1));
    let address = SocketAddress::Unix("/run/x".into());
    let (listener, _) = ring.listen(&address).unwrap();
    assert_eq!(other.listen(&address).err(), Some(Errno::EADDRINUSE));
    let stream = other.connect(&address).unwrap();
    drop(ring);
    assert_eq!(other.lock_conflict(&theirs, range), Ok(false));
    world.lock_elsewhere("/disk", range);
    assert_eq!(other.lock_conflict(&theirs, range), Ok(true));
    world.unlock_elsewhere("/disk");
    assert_eq!(other.connect(&address).err(), Some(Errno::ECONNREFUSED));
    let (r, s) = (other.clone(), stream.clone());
    let n = other.block_on(async move { r.recv(&s, r.alloc(10).await).await.1 });
    assert_eq!(n, Err(Errno::ECONNRESET));
    drop((mine, listener, stream, theirs));
    finish(&other);
}

#[test]
fn offloaded_calls_run_and_wake_ups_end_waits() {
    let (_world, ring) = world(7);
    let r = ring.clone();
    assert_eq!(ring.block_on(async move { r.offload(|| 6 * 7).await }), Ok(42));
    let before = ring.clock();
    ring.remote_waker().wake();
    let _ = ring.turn_blocking();
    assert!(ring.clock() < before + SECOND);
    let _ = ring.turn_blocking();
    assert!(ring.clock() >= before + SECOND);
    finish(&ring);
}

#[test]
fn whoever_was_woken_comes_before_those_who_only_yield() {
    let (_world, ring) = world(11);
    let over = Rc::new(Cell::new(false));
    let walked = Rc::new(Cell::new(0u64));
    for _ in 0..1000 {
        let (r, over, walked) = (ring.clone(), over.clone(), walked.clone());
        ring.spawn(async move {
            let mut stint = r.stint();
            while !over.get() {
                walked.set(walked.get() + 1);
                stint.step().await;
            }
        });
    }
    let r = ring.clone();
    let longest = ring.block_on(async move {
        let file = open(&r, "/disk");
        let mut longest = 0;
        for _ in 0..20 {
            let began = r.clock();
            r.read(&file, 0, r.alloc(4096).await).await.1.unwrap();
            longest = longest.max(r.clock() - began);
        }
        over.set(true);
        longest
    });
    while ring.task_count() > 0 {
        let _ = ring.turn();
    }
    // Each of the thousand takes 33 us in one go; a turn takes half a millisecond.
    assert!(longest < 10_000_000, "a read took {longest} ns beside a thousand walks");
    assert!(walked.get() > 100_000, "the walks made {} steps", walked.get());
    finish(&ring);
}

#[test]
fn one_that_yields_gets_on_in_each_turn_however_many_are_woken() {
    let (_world, ring) = world(12);
    let turns = Rc::new(Cell::new(0));
    let walker = {
        let (r, turns) = (ring.clone(), turns.clone());
        ring.spawn_with_result(async move {
            for _ in 0..50 {
                turns.set(turns.get() + 1);
                r.yield_now().await;
            }
        })
    };
    // Two who wake each other, without end.
    let ball = ring.notify();
    for _ in 0..2 {
        let (r, ball, walker) = (ring.clone(), ball.clone(), walker.clone());
        ring.spawn(async move {
            while !walker.is_given() {
                ball.notify();
                let mut caught = false;
                ball.until(|| std::mem::replace(&mut caught, true).then_some(())).await;
                r.clock();
            }
            ball.notify();
        });
    }
    for _ in 0..60 {
        let _ = ring.turn();
    }
    assert_eq!((turns.get(), walker.is_given()), (50, true));
    while ring.task_count() > 0 {
        ball.notify();
        let _ = ring.turn();
    }
    finish(&ring);
}

#[test]
fn control_calls_go_to_the_pool_while_somebody_is_served() {
    let (world, ring) = world(13);
    let r = ring.clone();
    ring.block_on(async move {
        let how = OpenHow { write: true, ..OpenHow::default() };
        let calls = async |expected: u64| {
            let before = r.stats().offloaded.get();
            let file = r.aside().open(Path::new("/disk"), &how).await.unwrap();
            assert_eq!(r.aside().info(&file).await.unwrap().len, 1 << 20);
            r.aside().set_len(&file, 1 << 20).await.unwrap();
            let extents = r.aside().extents(&file, 0, 1 << 20, 10).await.unwrap();
            assert_eq!(extents, [crate::FileExtent { start: 0, end: 1 << 20, is_hole: true }]);
            r.aside().set_attribute(&file, "user.a", Some(b"b")).await.unwrap();
            assert_eq!(r.aside().get_attribute(&file, "user.a").await, Ok(Some(b"b".to_vec())));
            r.aside().rename_new(Path::new("/disk"), Path::new("/other")).await.unwrap();
            r.aside().rename(Path::new("/other"), Path::new("/disk")).await.unwrap();
            r.aside().sync_directory(Path::new("/")).await.unwrap();
            assert_eq!(r.aside().lookup(Path::new("/disk")).await, Ok(Some(FileKind::Regular)));
            assert_eq!(r.aside().unlink(Path::new("/none")).await, Err(Errno::ENOENT));
            assert_eq!(r.stats().offloaded.get() - before, expected);
        };
        calls(0).await;
        let (one, two) = (r.serve(), r.serve());
        drop(one);
        calls(11).await;
        let before = r.stats().offloaded.get();
        assert!(crate::sync::at_once(r.in_place().lookup(Path::new("/disk"))).is_some());
        assert_eq!(r.stats().offloaded.get(), before);
        drop(two);
        calls(0).await;
        assert!(world.exists("/disk"));
    });
    finish(&ring);
}

#[test]
fn what_others_carry_out_ends_in_a_world_too() {
    let (_world, ring) = world(7);
    let keep: crate::Keep = std::sync::Arc::new(());
    let (r, k) = (ring.clone(), keep.clone());
    ring.block_on(async move {
        // At once, and by a call that takes its time.
        let (buf, n) = r
            .external_read(r.alloc(10).await, k.clone(), |mem, completer| {
                mem.fill_from(0, b"abc");
                completer.complete(Ok(3));
            })
            .await;
        assert_eq!((&buf.as_slice()[..3], n), (&b"abc"[..], Ok(3)));
        let (sender, completers) = std::sync::mpsc::channel();
        let later = r.external(k.clone(), |completer| sender.send(completer).unwrap());
        let completer: crate::Completer = completers.recv().unwrap();
        let began = r.clock();
        let ended = r.offload(move || {
            completer.complete(Err(Errno::ENOSPC));
            true
        });
        let (ended, later) = crate::sync::join(ended, later).await;
        assert_eq!((ended, later), (Ok(true), Err(Errno::ENOSPC)));
        assert!(r.clock() > began);
        assert_eq!(r.external(k, drop).await, Err(Errno::EIO));
    });
    assert_eq!(std::sync::Arc::strong_count(&keep), 1);
    finish(&ring);
}

#[test]
fn memory_beyond_what_may_be_registered_is_plain() {
    let world = World::new(WorldConfig { registered_bytes_max: Some(3 << 20), ..WorldConfig::new(8) });
    world.add_file("/disk", FileModel::regular(1 << 20));
    let ring = ring_of(&world);
    assert_eq!((ring.arena().bytes_fixed(), ring.arena().bytes()), (3 << 20, 4 << 20));
    let file = open(&ring, "/disk");
    let r = ring.clone();
    let moved = Rc::new(Cell::new(0));
    let sum = moved.clone();
    ring.block_on(async move {
        let mut held = Vec::new();
        for _ in 0..4 {
            let (buf, n) = r.read(&file, 0, r.alloc(1 << 20).await).await;
            sum.set(sum.get() + n.unwrap());
            held.push(buf);
        }
    });
    assert_eq!(moved.get(), 4 << 20);
    let stats = ring.stats().snapshot();
    assert_eq!((stats.transfers_fixed, stats.transfers_plain), (3, 1));
    finish(&ring);
}

/// One sector of the oracle: versions that may be found in it.
#[derive(Clone, Copy, Default)]
struct Promise {
    submitted: u64,
    acknowledged: u64,
    durable: u64,
}

/// Tasks write, zero and sync their own parts of a disk; the power goes at any moment. Each sector
/// must hold a version that is not older than the last one that a sync had promised.
fn promises_hold(seed: u64) -> u64 {
    const SECTORS: u64 = 64;
    let (world, ring) = world(seed);
    world.add_swarm("/");
    let promises = Rc::new(RefCell::new(vec![Promise::default(); 4 * SECTORS as usize]));
    for task in 0..4 {
        let (r, promises, file) = (ring.clone(), promises.clone(), open(&ring, "/disk"));
        ring.spawn(async move {
            let mut rand = Rng::new(r.random());
            for version in 1..60u64 {
                let first = task * SECTORS + rand.below(SECTORS);
                let last = rand.range(first..(task + 1) * SECTORS);
                let (range, part) = (first * 512..(last + 1) * 512, first as usize..=last as usize);
                if rand.chance(16_384) {
                    let before = promises.borrow().clone();
                    if r.sync(&file, rand.chance(32_768)).await.is_ok() {
                        for (promise, before) in promises.borrow_mut().iter_mut().zip(before) {
                            promise.durable = promise.durable.max(before.acknowledged);
                        }
                    }
                    continue;
                }
                promises.borrow_mut()[part.clone()].iter_mut().for_each(|p| p.submitted = version);
                let mut bytes = Vec::new();
                (first..=last).for_each(|_| bytes.extend([version.to_le_bytes(); 64].as_flattened()));
                let fua = rand.chance(8_192);
                if r.write(&file, range.start, copied(&r, &bytes).await, fua).await.is_ok() {
                    for promise in &mut promises.borrow_mut()[part] {
                        promise.acknowledged = version;
                        promise.durable = if fua { version } else { promise.durable };
                    }
                }
            }
        });
    }
    let turns = Rng::new(seed).below(400);
    for _ in 0..turns {
        let _ = ring.turn_blocking();
    }
    let promises = promises.borrow().clone();
    world.power_cut();
    finish(&ring);
    let mut newer = 0;
    for (sector, promise) in promises.iter().enumerate() {
        let bytes = world.read_live("/disk", sector as u64 * 512, 512);
        let version = u64::from_le_bytes(*bytes.first_chunk().unwrap());
        assert!(bytes.chunks(8).all(|chunk| chunk == version.to_le_bytes()), "seed {seed} sector {sector}");
        let allowed = promise.durable..=promise.submitted;
        assert!(allowed.contains(&version), "seed {seed} sector {sector}: {version} not in {allowed:?}");
        newer += u64::from(version > promise.durable);
    }
    newer
}

#[test]
fn after_a_power_cut_each_sector_holds_what_was_promised_or_something_newer() {
    let newer: u64 = (0..150).map(promises_hold).sum();
    assert!(newer > 1000, "{newer}");
}

/// Bulk work waits for company, a few operations do not, and nothing waits for what will not come.
#[test]
fn patience_is_for_many() {
    let enters = |patience: Option<crate::Patience>| {
        let (_world, ring) = world(21);
        ring.set_patience(patience);
        let r = ring.clone();
        ring.block_on(async move {
            let file = open(&r, "/disk");
            let readers: Vec<_> = (0..18u64)
                .map(|lane| {
                    let (ring, r, file) = (r.clone(), r.clone(), file.clone());
                    let read = async move {
                        for i in 0..20 {
                            let (_, n) = r.read(&file, ((lane + i) % 16) * 4096, r.alloc(4096).await).await;
                            assert_eq!(n, Ok(4096));
                        }
                    };
                    ring.spawn_with_result(read)
                })
                .collect();
            for reader in readers {
                reader.take().await;
            }
        });
        let enters = ring.stats().enters.get();
        // One operation in flight is not made to wait.
        let (r, before) = (ring.clone(), ring.clock());
        ring.block_on(async move {
            let file = open(&r, "/disk");
            r.read(&file, 0, r.alloc(4096).await).await.1
        })
        .unwrap();
        assert!(ring.clock() - before < SECOND);
        finish(&ring);
        enters
    };
    let patient = enters(Some(crate::Patience { completions: 16, wait_usec: 5_000_000 }));
    assert!(patient * 3 < enters(None), "{patient}");
}
