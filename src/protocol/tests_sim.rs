//! Files and devices in the simulated world: what real ones refuse, lose and reorder.

use std::path::Path;
use std::rc::Rc;

use blockferry_ring::sim::{DiscardModel, FileModel, OpKind, World, WorldConfig};
use blockferry_ring::{Config, Errno, LockRange, Ring};

use super::mark::{MarkInfo, TargetMark};
use super::tests::{BUFFERED, DIRECT, filled, storm, storm_within};
use super::*;
use crate::block::{Driver, Permissions, Resolved, WriteFlags, ZeroFlags};

const DISK: &str = "/disk";

fn world(seed: u64, model: FileModel) -> (World, Ring) {
    let world = World::new(WorldConfig::new(seed));
    world.add_file(DISK, model);
    let ring = ring(&world, 2 << 20);
    (world, ring)
}

fn ring(world: &World, arena_bytes: usize) -> Ring {
    let config = Config { arena_bytes, ..Config::default() };
    Ring::with_backend(world.backend(), &config).expect("a simulated ring")
}

fn opened(ring: &Ring, options: &OpenOptions) -> Rc<dyn Driver> {
    open(ring, Path::new(DISK), options).expect("the disk opens")
}

#[test]
fn storms_over_all_kinds_of_files_and_devices() {
    let regular = |len, align| FileModel { mem_align: 512, offset_align: align, ..FileModel::regular(len) };
    let block = |align| FileModel { offset_align: align, ..FileModel::block(196_608) };
    let models = [
        regular(196_608, 512),
        regular(196_608, 4096),
        regular(200_001, 4096),
        regular(65_535, 512),
        FileModel { zero_range: false, ..regular(200_192, 4096) },
        FileModel { punch_hole: false, zero_range: false, seek: false, ..regular(200_001, 512) },
        FileModel { direct: false, ..regular(200_001, 4096) },
        block(512),
        block(4096),
        FileModel { zero_range_ends_punch_hole: true, ..block(512) },
        FileModel { discard: DiscardModel::Refused, ..block(4096) },
        FileModel { discard: DiscardModel::Refused, punch_hole: false, zero_range: false, ..block(512) },
    ];
    for (i, model) in models.into_iter().enumerate() {
        for seed in 0..3 {
            let seed = i as u64 * 100 + seed;
            let anything = model.discard == DiscardModel::Anything;
            let (world, ring) = world(seed, model.clone());
            world.add_swarm(DISK);
            let disk = opened(&ring, if seed % 3 == 2 { &BUFFERED } else { &DIRECT });
            storm(disk.clone(), &ring, seed, 12, anything);
            assert_eq!(world.len(DISK), Some(model.len), "the length is as it was");
            assert_eq!(world.fault_counts().misaligned, 0, "seed {seed}");
            let w = world.clone();
            ring.block_on(async move {
                disk.flush().await.unwrap();
                let len = disk.len() as usize;
                assert!(w.read_durable(DISK, 0, len) == w.read_live(DISK, 0, len));
            });
        }
    }
}

#[test]
fn files_that_are_written_behind_their_end_lose_nothing() {
    let model = |len, align| FileModel { mem_align: 512, offset_align: align, ..FileModel::regular(len) };
    for (i, model) in [model(65_536, 4096), model(70_001, 512), model(0, 512)].into_iter().enumerate() {
        for seed in 0..4 {
            let (world, ring) = world(seed + 10 * i as u64, model.clone());
            world.add_swarm(DISK);
            let disk = opened(&ring, if seed % 3 == 2 { &BUFFERED } else { &DIRECT });
            storm_within(disk.clone(), &ring, seed, 8, false, 150_000);
            assert_eq!(world.len(DISK), Some(disk.len()));
            assert_eq!(world.fault_counts().misaligned, 0, "seed {seed}");
            ring.block_on(async move {
                disk.flush().await.unwrap();
                let len = disk.len() as usize;
                assert_eq!(world.durable_len(DISK), Some(len as u64));
                assert!(world.read_durable(DISK, 0, len) == world.read_live(DISK, 0, len));
            });
        }
    }
}

#[test]
fn a_flush_that_failed_goes_on_failing() {
    let (world, ring) = world(1, FileModel::regular(1 << 20));
    let disk = opened(&ring, &DIRECT);
    let r = ring.clone();
    ring.block_on(async move {
        // Busy rings are no loss.
        world.fail_nth(OpKind::Sync, DISK, 1, Errno::EAGAIN);
        disk.flush().await.unwrap();
        disk.write(0, filled(&r, 4096, 1).await.freeze(), WriteFlags::default()).await.unwrap();
        world.fail_nth(OpKind::Sync, DISK, 1, Errno::EIO);
        let error = disk.flush().await.unwrap_err();
        assert_eq!(error.errno, Errno::EIO);
        assert!(error.to_string().contains("go on failing until it is opened anew"), "{error}");
        for _ in 0..2 {
            assert_eq!(disk.flush().await.unwrap_err().errno, Errno::EIO);
        }
        // Reads and writes go on: what can be saved can be saved.
        disk.write(0, filled(&r, 4096, 2).await.freeze(), WriteFlags::default()).await.unwrap();
        let (buf, result) = disk.read(0, r.alloc(4096).await).await;
        assert!(result.is_ok() && buf.as_slice().iter().all(|&b| b == 2));
        opened(&r, &DIRECT).flush().await.unwrap();
    });
}

#[test]
fn two_flushes_at_once_fail_together() {
    let (world, ring) = world(2, FileModel::regular(1 << 20));
    let disk = opened(&ring, &DIRECT);
    ring.block_on(async move {
        world.fail_nth(OpKind::Sync, DISK, 1, Errno::EIO);
        let (first, second) = blockferry_ring::sync::join(disk.flush(), disk.flush()).await;
        let failed = [first.is_err(), second.is_err()];
        // The one that ended well before the other failed has promised nothing that was lost.
        assert!(failed.contains(&true));
        assert!(disk.flush().await.is_err());
    });
}

#[test]
fn a_durable_write_is_durable_even_where_that_is_not_known() {
    for options in [DIRECT, BUFFERED] {
        let (world, ring) = world(3, FileModel::regular(200_001));
        let disk = opened(&ring, &options);
        let r = ring.clone();
        ring.block_on(async move {
            let fua = WriteFlags { fua: true };
            let durable = |at: u64, tag: u8| world.read_durable(DISK, at, 1000).iter().all(|&b| b == tag);
            disk.write(0, filled(&r, 4096, 1).await.freeze(), fua).await.unwrap();
            disk.write(8193, filled(&r, 1000, 2).await.freeze(), fua).await.unwrap();
            disk.write(199_001, filled(&r, 1000, 3).await.freeze(), fua).await.unwrap();
            assert!(durable(0, 1) && durable(8193, 2) && durable(199_001, 3));
            disk.write_zeroes(0, 1000, ZeroFlags { fua: true, ..ZeroFlags::default() }).await.unwrap();
            assert!(durable(0, 0));
            assert!(disk.capabilities().fua);
            world.fail_nth(OpKind::Write, DISK, 1, Errno::EOPNOTSUPP);
            disk.write(0, filled(&r, 4096, 4).await.freeze(), fua).await.unwrap();
            assert!(durable(0, 4) && !disk.capabilities().fua);
            disk.write(0, filled(&r, 4096, 5).await.freeze(), fua).await.unwrap();
            assert!(durable(0, 5));
            // And a flush covers both sides of the border to the tail.
            disk.write(130_000, filled(&r, 70_001, 6).await.freeze(), WriteFlags::default()).await.unwrap();
            assert!(!durable(131_072, 6) && !durable(199_001, 6));
            disk.flush().await.unwrap();
            assert!(durable(130_000, 6) && durable(199_001, 6));
        });
    }
}

#[test]
fn a_buffered_durable_write_that_fails_may_have_told_of_another_one() {
    let (world, ring) = world(4, FileModel::regular(1 << 20));
    let r = ring.clone();
    ring.block_on(async move {
        for (options, sticks) in [(DIRECT, false), (BUFFERED, true)] {
            let disk = opened(&r, &options);
            world.fail_nth(OpKind::Write, DISK, 1, Errno::EIO);
            let fua = WriteFlags { fua: true };
            assert!(disk.write(0, filled(&r, 4096, 1).await.freeze(), fua).await.is_err());
            assert_eq!(disk.flush().await.is_err(), sticks);
        }
    });
}

#[test]
fn refusals_take_capabilities_away_one_by_one() {
    let model = FileModel { zero_range_ends_punch_hole: true, ..FileModel::block(1 << 20) };
    let (world, ring) = world(5, model);
    let disk = opened(&ring, &DIRECT);
    let r = ring.clone();
    ring.block_on(async move {
        assert_eq!(disk.kind(), "host_device");
        let unmap = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
        let strict = ZeroFlags { no_fallback: true, ..unmap };
        let fill = async || {
            let buf = filled(&r, 65_536, 9).await.freeze();
            disk.write(0, buf, WriteFlags::default()).await.unwrap();
        };
        let zeroed = || world.read_live(DISK, 0, 65_536).iter().all(|&b| b == 0);
        fill().await;
        disk.write_zeroes(0, 65_536, strict).await.unwrap();
        assert!(zeroed() && disk.capabilities().zero_unmap);
        // The kernel would write zeroes out for this one.
        let error = disk.write_zeroes(0, 65_536, ZeroFlags { may_unmap: false, ..strict }).await.unwrap_err();
        assert_eq!(error.errno, Errno::EOPNOTSUPP);
        fill().await;
        disk.write_zeroes(0, 65_536, ZeroFlags::default()).await.unwrap();
        assert!(zeroed() && disk.capabilities().zero_unmap);
        // That took hole punching away, which shows at the next use; the request goes on without.
        fill().await;
        disk.write_zeroes(0, 65_536, unmap).await.unwrap();
        assert!(zeroed() && !disk.capabilities().zero_unmap && disk.capabilities().zero_fast);
        assert_eq!(disk.write_zeroes(0, 65_536, strict).await.unwrap_err().errno, Errno::EOPNOTSUPP);
        world.change_model(DISK, |model| {
            model.zero_range = false;
            model.discard = DiscardModel::Refused;
        });
        fill().await;
        disk.write_zeroes(0, 65_536, unmap).await.unwrap();
        assert!(zeroed() && !disk.capabilities().zero_fast);
        fill().await;
        // Nothing is left that gives space back; that is no error, and nothing changes.
        disk.discard(0, 65_536).await.unwrap();
        assert!(!disk.capabilities().discard && world.read_live(DISK, 0, 1) == [9]);
        let status = disk.block_status(4096, 100).await.unwrap();
        assert!(!status.zero && status.allocated && status.len == 100);
        assert!(disk.set_len(2 << 20).await.is_err());
        assert!(disk.identity() != disk.children().first().and_then(|c| c.node().identity()));
    });
}

#[test]
fn other_errors_of_zeroing_are_errors() {
    let (world, ring) = world(6, FileModel::regular(1 << 20));
    let disk = opened(&ring, &DIRECT);
    ring.block_on(async move {
        let unmap = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
        world.fail_nth(OpKind::PunchHole, DISK, 1, Errno::EIO);
        let error = disk.write_zeroes(0, 4096, unmap).await.unwrap_err();
        assert_eq!(error.errno, Errno::EIO);
        assert!(error.to_string().starts_with("Writing zeroes to '/disk' at offset 0 (4096 bytes) failed"));
        world.fail_nth(OpKind::PunchHole, DISK, 1, Errno::EIO);
        assert!(disk.discard(0, 4096).await.is_err());
        assert!(disk.capabilities().zero_unmap && disk.capabilities().discard);
    });
}

#[test]
fn allocation_that_cannot_be_told_is_data() {
    let (world, ring) = world(7, FileModel::regular(1 << 20));
    let disk = opened(&ring, &DIRECT);
    ring.block_on(async move {
        assert!(disk.block_status(0, 1 << 20).await.unwrap().zero);
        world.fail_nth(OpKind::Seek, DISK, 1, Errno::EIO);
        let extent = disk.block_status(0, 1 << 20).await.unwrap();
        assert!(extent.allocated && extent.len == 1 << 20 && disk.capabilities().status);
        assert!(disk.block_status(0, 1 << 20).await.unwrap().zero);
        world.fail_nth(OpKind::Seek, DISK, 1, Errno::EINVAL);
        assert!(disk.block_status(0, 1 << 20).await.unwrap().allocated);
        assert!(!disk.capabilities().status);
    });
}

#[test]
fn a_scan_costs_one_look_an_extent_and_only_those_who_are_alone_remember_holes() {
    let (world, ring) = world(8, FileModel::regular(64 << 20));
    world.write_raw(DISK, 16 << 20, &[1; 65_536]);
    ring.block_on({
        let r = ring.clone();
        async move {
            let disk = opened(&r, &DIRECT);
            let scan = async || {
                let mut zero = 0;
                for at in (0..64 << 20).step_by(1 << 20) {
                    zero += u64::from(disk.block_status(at, 1 << 20).await.unwrap().zero);
                }
                zero
            };
            disk.set_permissions(Permissions::STABLE_READER).unwrap();
            assert_eq!(scan().await, 63);
            let before = world.events();
            assert_eq!(scan().await, 63);
            // Three extents, two calls each at most.
            assert!(world.events() - before <= 6, "{}", world.events() - before);
            // Somebody else may write now: each answer is a fresh look.
            disk.set_permissions(Permissions::READER).unwrap();
            assert!(disk.block_status(0, 1 << 20).await.unwrap().zero);
            world.write_raw(DISK, 0, &[1; 4096]);
            assert!(disk.block_status(0, 1 << 20).await.unwrap().allocated);
        }
    });
}

#[test]
fn the_fast_lane_leads_only_where_it_fits() {
    let (_, ring) = world(9, FileModel { offset_align: 4096, ..FileModel::regular(200_001) });
    let disk = opened(&ring, &DIRECT);
    let fast = |offset, len| matches!(disk.resolve(offset, len), Resolved::File { .. });
    assert!(fast(0, 196_608) && fast(192_512, 4096));
    assert!(!fast(512, 4096) && !fast(0, 512) && !fast(196_608, 1) && !fast(192_512, 8192));
    let buffered = opened(&ring, &BUFFERED);
    assert!(matches!(buffered.resolve(199_000, 1001), Resolved::File { offset: 199_000, .. }));
    assert_eq!((disk.limits().request_align, buffered.limits().request_align), (4096, 1));
}

#[test]
fn devices_in_use_and_devices_that_end_early() {
    let (world, ring) = world(10, FileModel::block(1 << 20));
    world.set_busy(DISK, true);
    let error = open(&ring, Path::new(DISK), &DIRECT).unwrap_err();
    assert!(error.to_string().contains("in use: mounted"), "{error}");
    assert!(open(&ring, Path::new(DISK), &OpenOptions { read_only: true, ..DIRECT }).is_ok());
    assert!(FileDriver::open(&ring, Path::new(DISK), &DIRECT).is_err());
    world.set_busy(DISK, false);
    let disk = opened(&ring, &DIRECT);
    let r = ring.clone();
    ring.block_on(async move {
        for at in [(1 << 20) - 512, (1 << 20) - 100] {
            let (_, result) = disk.read(at, r.alloc(1024).await).await;
            assert_eq!(result.unwrap_err().errno, Errno::EIO, "no zeroes in place of what a device has lost");
        }
    });
}

#[test]
fn locks_of_others_and_filesystems_without_locks() {
    let (world, ring) = world(11, FileModel::regular(1 << 20));
    let disk = opened(&ring, &DIRECT);
    world.lock_elsewhere(DISK, LockRange { start: 201, len: 1 });
    let error = disk.set_permissions(Permissions::USER).unwrap_err().to_string();
    assert!(error.contains("the 'write' permission is denied by simulated (pid 0)"), "{error}");
    disk.set_permissions(Permissions::STABLE_READER).unwrap();
    world.unlock_elsewhere(DISK);
    world.lock_elsewhere(DISK, LockRange { start: 103, len: 1 });
    let error = disk.set_permissions(Permissions::USER).unwrap_err().to_string();
    assert!(error.contains("the 'resize' permission cannot be denied to others"), "{error}");
    world.unlock_elsewhere(DISK);
    world.fail_nth(OpKind::Lock, DISK, 1, Errno::EOPNOTSUPP);
    let error = disk.set_permissions(Permissions::USER).unwrap_err().to_string();
    assert!(error.contains("does not keep locks"), "{error}");
    disk.set_permissions(Permissions::USER).unwrap();
    // What a refused change had taken before it was refused was given back.
    for (start, is_held) in [(100, true), (101, true), (103, false), (201, true), (203, true), (200, false)] {
        let file = ring.open(Path::new(DISK), &Default::default()).unwrap();
        let range = LockRange { start, len: 1 };
        assert_eq!(ring.lock_conflict(&file, range).unwrap(), is_held, "byte {start}");
    }
}

#[test]
fn a_mark_is_durable_when_it_is_set_and_when_it_is_gone() {
    for attributes in [true, false] {
        let (world, ring) = world(12, FileModel { attributes, ..FileModel::regular(1 << 20) });
        world.add_directory("/state");
        let disk = opened(&ring, &DIRECT);
        let r = ring.clone();
        ring.block_on(async move {
            assert_eq!(TargetMark::needs_state_dir(&r, &disk), !attributes);
            let info = MarkInfo::incomplete("mirror", "/source");
            let mark = TargetMark::new(&r, disk.clone(), Some("/state".into()), info);
            for seed in 0..8 {
                mark.set().await.unwrap();
                let after = |world: &World| {
                    let ring = ring_of(world);
                    let disk = opened(&ring, &DIRECT);
                    let r = ring.clone();
                    let read =
                        async move { TargetMark::read(&r, &disk, Some(Path::new("/state"))).await.unwrap() };
                    ring.block_on(read)
                };
                let found = after(&world.fork_after_power_cut(seed)).expect("the mark outlives a power cut");
                assert_eq!((found.state.as_str(), found.source.as_str()), ("incomplete", "/source"));
                mark.clear().await.unwrap();
                assert_eq!(after(&world.fork_after_power_cut(seed)), None);
            }
        });
    }
}

fn ring_of(world: &World) -> Ring {
    ring(world, 1 << 20)
}

#[test]
fn a_created_file_outlives_a_power_cut() {
    let world = World::new(WorldConfig::new(13));
    world.add_directory("/images");
    let ring = ring(&world, 1 << 20);
    let (r, w) = (ring.clone(), world.clone());
    ring.block_on(async move {
        let path = Path::new("/images/new");
        FileDriver::create(&r, path, 12_345, CreateOptions::default()).await.unwrap();
        for seed in 0..8 {
            assert_eq!(w.fork_after_power_cut(seed).len(path), Some(12_345));
        }
        // Half-made files are taken away.
        w.fail_nth(OpKind::Sync, "/images/half", 1, Errno::EIO);
        let half = Path::new("/images/half");
        assert!(FileDriver::create(&r, half, 1, CreateOptions::default()).await.is_err());
        assert!(!w.exists(half));
    });
}
