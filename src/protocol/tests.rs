//! Files on real filesystems, through the real ring: ext4 or what `/tmp` is, and tmpfs.

use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;

use blockferry_ring::{Buf, Config, Errno, Ring};

use super::*;
use crate::base::rng::Rng;
use crate::block::{Driver, Node, Permissions, Resolved, WriteFlags, ZeroFlags};

fn ring(arena_bytes: usize) -> Ring {
    Ring::new(&Config { arena_bytes, ..Config::default() }).expect("a ring")
}

fn run<T: 'static, F: Future<Output = T> + 'static>(test: impl FnOnce(Ring) -> F) -> T {
    let ring = ring(8 << 20);
    let value = ring.block_on(test(ring.clone()));
    assert_eq!(ring.shutdown(5_000_000_000).leaked, 0);
    value
}

/// A directory on the disk, and one in memory.
fn places() -> Vec<tempfile::TempDir> {
    let mut places = vec![tempfile::tempdir().expect("a directory")];
    if Path::new("/dev/shm").is_dir() {
        places.push(tempfile::tempdir_in("/dev/shm").expect("a directory in memory"));
    }
    places
}

fn file_of(dir: &tempfile::TempDir, name: &str, len: u64) -> std::path::PathBuf {
    let path = dir.path().join(name);
    std::fs::File::create(&path).and_then(|f| f.set_len(len)).expect("a file");
    path
}

pub(super) const DIRECT: OpenOptions =
    OpenOptions { read_only: false, cache: Cache::Direct, lock: true, without_locks: None };
pub(super) const BUFFERED: OpenOptions =
    OpenOptions { read_only: false, cache: Cache::Buffered, lock: true, without_locks: None };

pub(super) async fn filled(ring: &Ring, len: usize, tag: u8) -> Buf {
    let mut buf = ring.alloc(len).await;
    buf.as_mut_slice().fill(tag);
    buf
}

#[test]
fn a_file_is_written_read_and_flushed() {
    for dir in places() {
        for options in [DIRECT, BUFFERED] {
            let path = file_of(&dir, "a", 1 << 20);
            run(async move |r| {
                let file = FileDriver::open(&r, &path, &options).unwrap();
                assert_eq!((file.len(), file.kind(), file.is_read_only()), (1 << 20, "file", false));
                for flags in [WriteFlags::default(), WriteFlags { fua: true }] {
                    file.write(65_536, filled(&r, 8192, 7).await.freeze(), flags).await.unwrap();
                }
                file.flush().await.unwrap();
                let (buf, result) = file.read(61_440, r.alloc(16_384).await).await;
                result.unwrap();
                assert!(buf.as_slice()[..4096].iter().all(|&b| b == 0));
                assert!(buf.as_slice()[4096..12_288].iter().all(|&b| b == 7));
                assert!(matches!(file.resolve(65_536, 8192), Resolved::File { offset: 65_536, .. }));
                assert_eq!(file.allocated_bytes(), Some(8192));
                let on_disk = std::fs::read(&path).unwrap();
                assert!(on_disk[65_536..73_728].iter().all(|&b| b == 7) && on_disk.len() == 1 << 20);
            });
        }
    }
}

/// Requests of any place and size, many at once, overlapping, on little memory. What each byte holds
/// afterwards must be what one of the requests that cover it says, or, without any, what was there.
/// A discard leaves anything behind where `discard_leaves_anything`, and else zeroes or what was there.
pub(super) fn storm(
    driver: Rc<dyn Driver>,
    ring: &Ring,
    seed: u64,
    rounds: usize,
    discard_leaves_anything: bool,
) {
    let len = driver.len();
    storm_within(driver, ring, seed, rounds, discard_leaves_anything, len);
}

/// The same in the first `len` bytes, whether the disk is so long by then or not.
pub(super) fn storm_within(
    driver: Rc<dyn Driver>,
    ring: &Ring,
    seed: u64,
    rounds: usize,
    discard_leaves_anything: bool,
    len: u64,
) {
    #[derive(Clone, Copy, Debug)]
    enum What {
        Write,
        Zeroes,
        Discard,
        Read,
    }
    let mut rng = Rng::new(seed);
    let mut model = vec![0u8; len as usize];
    for round in 0..rounds {
        let done = Rc::new(RefCell::new(0));
        // A small window brings many requests into few blocks; the last one lies at the end of the file.
        let window = if rng.below(3) == 0 { len } else { 20_000.min(len) };
        let base = if rng.below(3) == 0 { len - window } else { rng.below(len - window + 1) };
        let mut asked = Vec::new();
        for i in 0..12u8 {
            let size_max = if rng.below(4) == 0 { 100_000 } else { 6000 };
            let mut offset = base + rng.below(window);
            let mut size = 1 + rng.below(size_max).min(len - offset - 1);
            if rng.below(4) == 0 {
                offset -= offset % 4096;
                size = size.next_multiple_of(4096).min(len - offset);
            }
            let what = match rng.below(10) {
                0..5 => What::Write,
                5..7 => What::Zeroes,
                7 => What::Discard,
                _ => What::Read,
            };
            asked.push((what, offset, size, 1 + ((round * 13) as u8).wrapping_add(i) % 255));
            let (driver, r, done) = (driver.clone(), ring.clone(), done.clone());
            let flags =
                ZeroFlags { may_unmap: rng.below(2) == 0, fua: rng.below(8) == 0, no_fallback: false };
            let (shift, fua) = (rng.below(3) as usize, rng.below(8) == 0);
            let tag = asked[i as usize].3;
            ring.spawn(async move {
                let size = size as usize;
                // Every third buffer lies at an odd address.
                let buf = filled(&r, size + shift, tag).await.split_at(shift).1;
                match what {
                    What::Write => driver.write(offset, buf.freeze(), WriteFlags { fua }).await,
                    What::Zeroes => driver.write_zeroes(offset, size as u64, flags).await,
                    What::Discard => driver.discard(offset, size as u64).await,
                    What::Read => {
                        let (buf, result) = driver.read(offset, buf).await;
                        assert_eq!(buf.len(), size);
                        result
                    }
                }
                .unwrap_or_else(|error| panic!("{what:?} of {size} at {offset}: {error}"));
                *done.borrow_mut() += 1;
            });
        }
        let started = ring.clock();
        let (all, ends, r) = (asked.len(), done.clone(), ring.clone());
        let ended = ring.block_on(async move {
            while *ends.borrow() < all && r.clock() - started < 20_000_000_000 {
                r.sleep(200_000).await;
            }
            *ends.borrow()
        });
        assert_eq!(ended, all, "requests wait for each other in round {round} of seed {seed}: {asked:?}");
        // Read all of it in odd pieces.
        let seen = Rc::new(RefCell::new(Vec::new()));
        let (out, d, r, step) = (seen.clone(), driver.clone(), ring.clone(), 1 + rng.below(99_999));
        ring.block_on(async move {
            let mut at = 0;
            while at < len {
                let (buf, result) = d.read(at, r.alloc(step.min(len - at) as usize).await).await;
                result.unwrap();
                out.borrow_mut().extend_from_slice(buf.as_slice());
                at += step;
            }
        });
        let seen = seen.take();
        let (mut covered, mut fine) = (vec![false; len as usize], vec![false; len as usize]);
        for &(what, offset, size, tag) in &asked {
            for at in offset as usize..(offset + size) as usize {
                let is = seen[at];
                match what {
                    What::Write => (covered[at], fine[at]) = (true, fine[at] | (is == tag)),
                    What::Zeroes => (covered[at], fine[at]) = (true, fine[at] | (is == 0)),
                    What::Discard => fine[at] |= is == 0 || discard_leaves_anything,
                    What::Read => {}
                }
            }
        }
        for at in 0..len as usize {
            let (was, is) = (model[at], seen[at]);
            let fine = fine[at] || (!covered[at] && is == was);
            assert!(fine, "byte {at} was {was} and is {is} in round {round} of seed {seed}: {asked:?}");
        }
        model = seen;
    }
}

#[test]
fn requests_of_any_place_and_size_agree_with_a_plain_model() {
    for (i, dir) in places().into_iter().enumerate() {
        for (j, len) in [196_608, 200_192, 200_001, 513, 1].into_iter().enumerate() {
            for (k, options) in [DIRECT, BUFFERED].into_iter().enumerate() {
                let ring = ring(2 << 20);
                let path = file_of(&dir, "storm", len);
                let file: Rc<dyn Driver> = Rc::new(FileDriver::open(&ring, &path, &options).unwrap());
                let seed = (i * 100 + j * 10 + k) as u64;
                storm(file.clone(), &ring, seed, 12, false);
                assert_eq!(std::fs::metadata(&path).unwrap().len(), len, "the length is as it was");
                let r = ring.clone();
                ring.block_on(async move {
                    file.flush().await.unwrap();
                    // Through the page cache, that is by another way, the bytes are the same.
                    let on_disk = std::fs::read(&path).unwrap();
                    let mut at = 0;
                    while at < len as usize {
                        let n = 65_536.min(len as usize - at);
                        let (buf, result) = file.read(at as u64, r.alloc(n).await).await;
                        result.unwrap();
                        assert_eq!(buf.as_slice(), &on_disk[at..at + n], "at {at}");
                        at += n;
                    }
                });
                assert_eq!(ring.shutdown(5_000_000_000).leaked, 0);
            }
        }
    }
}

#[test]
fn changes_behind_the_end_lengthen_a_file() {
    for (i, dir) in places().into_iter().enumerate() {
        for (j, len) in [196_608, 200_192, 200_001, 513, 0].into_iter().enumerate() {
            for (k, options) in [DIRECT, BUFFERED].into_iter().enumerate() {
                let ring = ring(2 << 20);
                let path = file_of(&dir, "grows", len);
                let file: Rc<dyn Driver> = Rc::new(FileDriver::open(&ring, &path, &options).unwrap());
                let seed = (i * 100 + j * 10 + k) as u64;
                storm_within(file.clone(), &ring, seed, 6, false, 300_000);
                let on_disk = std::fs::read(&path).unwrap();
                let now = on_disk.len() as u64;
                assert!(now > 200_192 && file.len() == now, "{now} bytes, {} known", file.len());
                let (r, f) = (ring.clone(), file.clone());
                ring.block_on(async move {
                    let (buf, result) = f.read(0, r.alloc(now as usize).await).await;
                    result.unwrap();
                    assert!(buf.as_slice() == on_disk);
                    let hole = f.block_status(now - 1, 1).await.unwrap();
                    assert!(!hole.zero || buf.as_slice()[now as usize - 1] == 0);
                    // The fast lane leads no further than the file.
                    assert!(
                        matches!(f.resolve(now - now % 4096, 4096), Resolved::Ask)
                            || now.is_multiple_of(4096)
                    );
                });
                assert_eq!(ring.shutdown(5_000_000_000).leaked, 0);
            }
        }
    }
}

#[test]
fn a_file_that_others_made_longer_is_not_cut() {
    let dir = tempfile::tempdir().unwrap();
    for options in [DIRECT, BUFFERED] {
        let path = file_of(&dir, "a", 10_000);
        run(async move |r| {
            let file = FileDriver::open(&r, &path, &options).unwrap();
            std::fs::write(&path, vec![9; 60_001]).unwrap();
            file.write(20_000, filled(&r, 100, 7).await.freeze(), WriteFlags::default()).await.unwrap();
            let mut wanted = vec![9; 60_001];
            wanted[20_000..20_100].fill(7);
            assert!(std::fs::read(&path).unwrap() == wanted && file.len() == 60_001);
            let (buf, result) = file.read(0, r.alloc(60_001).await).await;
            assert!(result.is_ok() && buf.as_slice() == wanted);
        });
    }
}

#[test]
fn unaligned_requests_end_when_no_memory_is_left() {
    let dir = &places()[0];
    let path = file_of(dir, "a", 4 << 20);
    let ring = ring(2 << 20);
    let r = ring.clone();
    ring.block_on(async move {
        let file = Rc::new(FileDriver::open(&r, &path, &DIRECT).unwrap());
        // Requests hold all there is, and every one of them needs more.
        let mut held = Vec::new();
        while let Some(buf) = r.arena().try_alloc(65_536) {
            held.push(buf);
        }
        while let Some(buf) = r.arena().try_alloc(4096) {
            held.push(buf);
        }
        assert!(held.len() > 10);
        let mut ends = Vec::new();
        for (i, buf) in held.into_iter().enumerate() {
            let file = file.clone();
            ends.push(r.spawn_with_result(async move {
                let at = i as u64 * 65_536 + 13;
                if i % 2 == 0 {
                    file.write(at, buf.freeze(), WriteFlags::default()).await
                } else {
                    file.read(at, buf).await.1
                }
            }));
        }
        for end in ends {
            end.take().await.unwrap();
        }
    });
}

#[test]
fn holes_are_known_and_a_written_hole_is_data_at_once() {
    for dir in places() {
        for options in [DIRECT, BUFFERED] {
            let path = file_of(&dir, "a", 8 << 20);
            run(async move |r| {
                let file = FileDriver::open(&r, &path, &options).unwrap();
                file.set_permissions(Permissions::USER).unwrap();
                let data = async |at, len| {
                    let extent = file.block_status(at, len).await.unwrap();
                    assert_eq!(extent.zero, !extent.allocated);
                    (extent.allocated, extent.len)
                };
                assert_eq!(data(0, 8 << 20).await, (false, 8 << 20));
                assert_eq!(data(12_345, 1000).await, (false, 1000));
                let buf = filled(&r, 1 << 20, 9).await.freeze();
                file.write(2 << 20, buf, WriteFlags::default()).await.unwrap();
                assert_eq!(data(0, 8 << 20).await, (false, 2 << 20));
                assert_eq!(data(2 << 20, 8 << 20).await, (true, 1 << 20));
                assert_eq!(data((3 << 20) - 1, 1).await, (true, 1));
                assert_eq!(data(3 << 20, 5 << 20).await, (false, 5 << 20));
                // A hole that was looked at a moment ago, and then written.
                let buf = filled(&r, 4096, 9).await.freeze();
                file.write(7 << 20, buf, WriteFlags::default()).await.unwrap();
                assert_eq!(data(7 << 20, 4096).await, (true, 4096));
                // Data that was looked at a moment ago, and then given back.
                file.discard(2 << 20, 1 << 20).await.unwrap();
                assert_eq!(data(2 << 20, 1 << 20).await, (false, 1 << 20));
                let flags = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
                file.write_zeroes(7 << 20, 4096, flags).await.unwrap();
                assert_eq!(data(0, 8 << 20).await, (false, 8 << 20));
                // Beyond a new end nothing is remembered.
                file.set_len(9 << 20).await.unwrap();
                assert_eq!(data(0, 9 << 20).await, (false, 9 << 20));
                assert_eq!(file.len(), 9 << 20);
            });
        }
    }
}

#[test]
fn zeroes_keep_their_space_unless_they_may_give_it_back() {
    for dir in places() {
        let path = file_of(&dir, "a", 4 << 20);
        run(async move |r| {
            let file = FileDriver::open(&r, &path, &DIRECT).unwrap();
            let fill = async || {
                for i in 0..4 {
                    let buf = filled(&r, 1 << 20, 3).await.freeze();
                    file.write(i << 20, buf, WriteFlags::default()).await.unwrap();
                }
            };
            fill().await;
            assert_eq!(file.allocated_bytes(), Some(4 << 20));
            // Whatever the filesystem lacks (tmpfs: ZERO_RANGE) is made up for by writing.
            file.write_zeroes(0, 4 << 20, ZeroFlags::default()).await.unwrap();
            assert_eq!(file.allocated_bytes(), Some(4 << 20));
            let (buf, result) = file.read(1 << 20, r.alloc(1 << 20).await).await;
            result.unwrap();
            assert!(buf.as_slice().iter().all(|&b| b == 0));
            fill().await;
            let strict = ZeroFlags { no_fallback: true, ..ZeroFlags::default() };
            match file.write_zeroes(0, 4 << 20, strict).await {
                Ok(()) => assert!(file.capabilities().zero_fast),
                Err(error) => {
                    assert!(!file.capabilities().zero_fast);
                    assert_eq!(error.errno, Errno::EOPNOTSUPP);
                    let (buf, _) = file.read(0, r.alloc(4096).await).await;
                    assert!(buf.as_slice().iter().all(|&b| b == 3), "a refusal changes nothing");
                }
            }
            let unmap = ZeroFlags { may_unmap: true, no_fallback: true, fua: true };
            file.write_zeroes(0, 4 << 20, unmap).await.unwrap();
            assert!(file.capabilities().zero_unmap);
            assert_eq!(file.allocated_bytes(), Some(0));
        });
    }
}

#[test]
fn errors_of_opening_say_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let file = file_of(&dir, "a.img", 4096);
    run(async move |r| {
        let fails = |path: &Path, options: &OpenOptions| match open(&r, path, options) {
            Ok(driver) => panic!("{driver:?} was opened"),
            Err(error) => error.to_string(),
        };
        let missing = dir.path().join("missing.img");
        assert_eq!(
            fails(&missing, &DIRECT),
            format!("Opening '{}' failed: No such file or directory", missing.display())
        );
        assert!(fails(dir.path(), &DIRECT).contains("neither a regular file nor a block device"));
        assert!(fails(Path::new("/dev/null"), &DIRECT).contains("neither a regular file nor a block device"));
        assert!(HostDevice::open(&r, &file, &DIRECT).unwrap_err().to_string().contains("driver 'file'"));
        let options = OpenOptions { read_only: true, ..DIRECT };
        let image = open(&r, &file, &options).unwrap();
        let buf = r.alloc(512).await.freeze();
        let error = image.write(0, buf, WriteFlags::default()).await.unwrap_err();
        assert_eq!(error.errno, Errno::EROFS);
        assert!(image.flush().await.is_ok() && image.discard(0, 512).await.is_err());
        assert!(image.write_zeroes(0, 512, ZeroFlags::default()).await.is_err());
        assert!(image.set_len(0).await.is_err());
    });
}

#[test]
fn creating_leaves_what_is_there_alone() {
    let dir = tempfile::tempdir().unwrap();
    run(async move |r| {
        let path = dir.path().join("new.img");
        let ask = CreateOptions { overwrite: true, ..CreateOptions::default() };
        FileDriver::create(&r, &path, 1 << 20, CreateOptions::default()).await.unwrap();
        std::fs::write(&path, "precious").unwrap();
        let error = FileDriver::create(&r, &path, 1 << 20, CreateOptions::default()).await.unwrap_err();
        assert!(error.to_string().contains("It is left alone"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        FileDriver::create(&r, &path, 1 << 16, ask).await.unwrap();
        assert!(std::fs::read(&path).unwrap() == vec![0; 1 << 16]);
        // What fails half-way is taken away again.
        let huge = dir.path().join("huge.img");
        let error = FileDriver::create(&r, &huge, u64::MAX >> 1, CreateOptions::default()).await.unwrap_err();
        assert_eq!(error.errno, Errno::EFBIG, "{error}");
        assert!(!huge.exists());
        assert!(FileDriver::create(&r, dir.path(), 1, ask).await.is_err());
    });
}

#[test]
fn the_end_of_a_file_that_others_cut_reads_as_zeroes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    std::fs::write(&path, vec![5u8; 1 << 20]).unwrap();
    run(async move |r| {
        for options in [DIRECT, BUFFERED] {
            let file = FileDriver::open(&r, &path, &options).unwrap();
            std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(600_000).unwrap();
            let (buf, result) = file.read(524_288, filled(&r, 524_288, 1).await).await;
            result.unwrap();
            let kept = 600_000 - 524_288;
            assert!(buf.as_slice()[..kept].iter().all(|&b| b == 5));
            assert!(buf.as_slice()[kept..].iter().all(|&b| b == 0));
            std::fs::write(&path, vec![5u8; 1 << 20]).unwrap();
        }
    });
}

#[test]
fn a_null_disk_reads_zeroes() {
    run(async move |r| {
        let null = NullDriver::new(&r, "null", null::LEN_DEFAULT, false);
        null.write(0, filled(&r, 512, 1).await.freeze(), WriteFlags::default()).await.unwrap();
        let (buf, result) = null.read(0, filled(&r, 512, 1).await).await;
        assert!(result.is_ok() && buf.as_slice().iter().all(|&b| b == 0));
        assert!(null.block_status(0, 1 << 30).await.unwrap().zero);
    });
}

#[test]
fn a_disk_in_memory_agrees_with_a_plain_model() {
    let ring = ring(2 << 20);
    let mem = Rc::new(MemDriver::new(&ring, "mem", 400_001, false));
    storm(mem.clone(), &ring, 77, 20, false);
    let r = ring.clone();
    ring.block_on(async move {
        let len = mem.len();
        mem.write_zeroes(0, len, ZeroFlags::default()).await.unwrap();
        // The last piece is not whole, and stays.
        assert_eq!(mem.allocated_bytes(), Some(65_536));
        let mut at = 0;
        let mut extents = Vec::new();
        while at < len {
            let extent = mem.block_status(at, len - at).await.unwrap();
            extents.push((extent.zero, extent.len));
            at += extent.len;
        }
        assert_eq!(extents, [(true, 393_216), (false, 6785)]);
        mem.write(0, r.alloc(512).await.freeze(), WriteFlags::default()).await.unwrap();
        mem.set_len(100).await.unwrap();
        assert_eq!(mem.allocated_bytes(), Some(65_536));
        mem.set_len(0).await.unwrap();
        mem.set_len(len).await.unwrap();
        assert_eq!(mem.block_status(0, len).await.unwrap().len, len);
    });
}

#[test]
fn a_slow_disk_is_late_by_what_was_asked() {
    run(async move |r| {
        let late = 20_000_000;
        let mem = Rc::new(MemDriver::new(&r, "mem", 1 << 20, false));
        let slow = DelayDriver::new(&r, &Node::of(&r, mem.clone()), late);
        let buf = filled(&r, 512, 7).await.freeze();
        for _ in 0..2 {
            let start = r.clock();
            // Two at once are as late as one.
            let (first, second) = blockferry_ring::sync::join(
                slow.write(0, buf.clone(), WriteFlags::default()),
                slow.write(512, buf.clone(), WriteFlags::default()),
            )
            .await;
            first.and(second).unwrap();
            let took = r.clock() - start;
            assert!(took >= late && took < 10 * late, "{took} ns");
        }
        let (buf, result) = slow.read(0, r.alloc(1024).await).await;
        assert!(result.is_ok() && buf.as_slice().iter().all(|&b| b == 7));
        slow.flush().await.unwrap();
        assert_eq!((slow.len(), slow.children().len()), (1 << 20, 1));
    });
}

#[test]
fn what_is_read_only_is_not_written_in_memory_either() {
    run(async move |r| {
        let mem = MemDriver::new(&r, "mem", 4096, true);
        let buf = filled(&r, 512, 7).await.freeze();
        assert_eq!(mem.write(0, buf, WriteFlags::default()).await.unwrap_err().errno, Errno::EROFS);
        assert!(mem.set_len(1).await.is_err() && mem.len() == 4096);
    });
}

/// A loop device over a file; it is detached when dropped. Needs root: `None`, with a word, without.
struct LoopDevice(std::path::PathBuf);

impl LoopDevice {
    fn new(file: &Path, sector_bytes: u32) -> Option<LoopDevice> {
        let made = std::process::Command::new("losetup")
            .args(["--find", "--show", "--direct-io=on", "--sector-size", &sector_bytes.to_string()])
            .arg(file)
            .output();
        match made {
            Ok(made) if made.status.success() => {
                Some(LoopDevice(String::from_utf8_lossy(&made.stdout).trim().into()))
            }
            other => {
                eprintln!("not tried: no loop device is to be had here ({other:?})");
                None
            }
        }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

#[test]
fn block_devices_serve_requests_of_any_place_and_size() {
    for (i, dir) in places().into_iter().enumerate() {
        for sector_bytes in [512, 4096] {
            let path = file_of(&dir, "loop", 192 << 10);
            let Some(device) = LoopDevice::new(&path, sector_bytes) else { return };
            let ring = ring(2 << 20);
            let disk = open(&ring, &device.0, &DIRECT).unwrap();
            assert_eq!((disk.kind(), disk.len()), ("host_device", 192 << 10));
            assert_eq!(disk.limits().request_align, sector_bytes);
            storm(disk.clone(), &ring, i as u64, 6, true);

            let (r, d) = (ring.clone(), disk.clone());
            ring.block_on(async move {
                let buf = filled(&r, 8192, 1).await.freeze();
                let error = d.write((192 << 10) - 4096, buf, WriteFlags::default()).await.unwrap_err();
                assert_eq!(error.errno, Errno::ENOSPC, "{error}");
                assert!(error.to_string().contains("ends at 196608"), "{error}");
            });
            let error = open(&ring, &device.0, &DIRECT).unwrap_err();
            assert!(error.to_string().contains("The device is in use"), "{error}");
            let reader = open(&ring, &device.0, &OpenOptions { read_only: true, ..DIRECT }).unwrap();
            assert_eq!(reader.identity(), disk.identity());

            let (r, d) = (ring.clone(), disk.clone());
            ring.block_on(async move {
                let unmap = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
                // Twice each, because the first may take a capability away for the second.
                for flags in [unmap, ZeroFlags::default(), unmap, ZeroFlags::default(), unmap] {
                    d.write(0, filled(&r, 131_072, 5).await.freeze(), WriteFlags::default()).await.unwrap();
                    d.write_zeroes(100, 100_000, flags).await.unwrap();
                    let (buf, result) = d.read(0, r.alloc(131_072).await).await;
                    result.unwrap();
                    let wanted = |at: usize| if (100..100_100).contains(&at) { 0 } else { 5 };
                    assert!(buf.as_slice().iter().enumerate().all(|(at, &b)| b == wanted(at)));
                }
                d.discard(0, 131_072).await.unwrap();
                d.flush().await.unwrap();
                let mark = mark::TargetMark::new(&r, d, None, mark::MarkInfo::incomplete("mirror", "x"));
                assert!(mark.set().await.unwrap_err().to_string().contains("--state-dir"));
            });
        }
    }
}

#[test]
fn memory_of_a_guest_is_taken_at_any_address() {
    for dir in places() {
        let path = file_of(&dir, "a", 200_001);
        run(async move |r| {
            let memory = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
            rustix::fs::ftruncate(&memory, 1 << 20).unwrap();
            let region = blockferry_ring::Region::map(&memory, 0, 1 << 20).unwrap();
            let file = FileDriver::open(&r, &path, &DIRECT).unwrap();
            for (at, offset, len) in [(0, 0, 8192), (13, 4096, 8192), (1, 100, 77), (511, 190_001, 10_000)] {
                let tag = at as u8 | 1;
                region.write(at, &vec![tag; len]);
                let buf = region.buf(at, len).unwrap().freeze();
                file.write(offset, buf, WriteFlags::default()).await.unwrap();
                region.write(at, &vec![0xff; len]);
                let (buf, result) = file.read(offset, region.buf(at, len).unwrap()).await;
                result.unwrap();
                assert!(buf.is_region() && buf.len() == len);
                let mut seen = vec![0; len];
                region.read(at, &mut seen);
                assert!(seen.iter().all(|&b| b == tag), "{len} bytes at {offset}, memory at {at}");
            }
            // Beyond the end that somebody else has set there are zeroes, in such memory too.
            std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(100).unwrap();
            region.write(0, &[0xff; 8192]);
            file.read(4096, region.buf(0, 8192).unwrap()).await.1.unwrap();
            let mut seen = [1; 8192];
            region.read(0, &mut seen);
            assert!(seen.iter().all(|&b| b == 0));
        });
    }
}
