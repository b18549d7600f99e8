//! qcow2 images for tests: made by this program or by QEMU, written by both, compared with a plain model.

use std::path::Path;
use std::rc::Rc;

use blockferry::block::{Driver, Node, Permissions, WriteFlags, ZeroFlags};
use blockferry::engine::open::open_qcow2;
use blockferry::engine::{Format, ImageOptions};
use blockferry::format::qcow2::{CreateOptions, Qcow2};
use blockferry::protocol::file::{CreateOptions as NewFile, FileDriver};
use blockferry::protocol::open::{Cache, OpenOptions};
use blockferry_ring::{Config, Ring};

use super::image::{Dice, pattern};
use super::tool;

/// A ring for tests.
pub fn ring() -> Ring {
    Ring::new(&Config { arena_bytes: 16 << 20, ..Config::default() }).expect("a ring")
}

/// How images are opened here.
pub fn options(read_only: bool) -> ImageOptions {
    ImageOptions { read_only, cache: Cache::Buffered, format: Some(Format::Qcow2), ..ImageOptions::default() }
}

/// An open file, to make an image in.
pub fn file(ring: &Ring, path: &str) -> Rc<Node> {
    let open = OpenOptions { cache: Cache::Buffered, ..OpenOptions::default() };
    Node::of(ring, Rc::new(FileDriver::open(ring, Path::new(path), &open).expect("it opens")))
}

/// Makes an image (and its data file, if the options name one, next to it).
pub fn create(ring: &Ring, path: &str, options: &CreateOptions) {
    let (r, path, options) = (ring.clone(), path.to_owned(), options.clone());
    ring.block_on(async move {
        let new = NewFile { overwrite: true, ..NewFile::default() };
        FileDriver::create(&r, Path::new(&path), 0, new).await.expect("a new file");
        let data = match &options.data_file {
            Some(name) => {
                let data = Path::new(&path).with_file_name(name);
                FileDriver::create(&r, &data, 0, new).await.expect("a new file");
                Some(file(&r, data.to_str().expect("UTF-8")))
            }
            None => None,
        };
        Qcow2::create(&r, &file(&r, &path), data.as_ref(), &options).await.expect("a new image");
    });
}

/// Runs `work` on an open image, flushes it, and closes it.
pub fn with<T: 'static>(
    ring: &Ring,
    path: &str,
    options: &ImageOptions,
    work: impl AsyncFnOnce(Rc<Qcow2>) -> T + 'static,
) -> T {
    let (r, path, options) = (ring.clone(), path.to_owned(), options.clone());
    ring.block_on(async move {
        let image = open_qcow2(&r, &path, &options).await.unwrap_or_else(|error| panic!("{path}: {error}"));
        let value = work(image.clone()).await;
        if !options.read_only && !options.for_check {
            image.flush().await.expect("a flush");
        }
        image.set_permissions(Permissions::NONE).expect("locks are given back");
        value
    })
}

/// All bytes of the disk.
pub async fn read_all(ring: &Ring, image: &Qcow2) -> Vec<u8> {
    let mut bytes = vec![0; image.len() as usize];
    for (i, piece) in bytes.chunks_mut(1 << 20).enumerate() {
        let (buf, result) = image.read((i as u64) << 20, ring.alloc(piece.len()).await).await;
        result.expect("a read");
        buf.copy_to(0, piece);
    }
    bytes
}

/// The bytes of the disk as this program reads them.
pub fn content(ring: &Ring, path: &str) -> Vec<u8> {
    let r = ring.clone();
    with(ring, path, &options(true), async move |image| read_all(&r, &image).await)
}

/// The bytes of the disk as QEMU reads them.
pub fn content_by_qemu(path: &str) -> Vec<u8> {
    let raw = format!("{path}.raw");
    tool("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", path, &raw]);
    let bytes = std::fs::read(&raw).expect("what was converted");
    std::fs::remove_file(&raw).expect("it is there");
    bytes
}

/// `qemu-img check` finds nothing wrong.
pub fn check_by_qemu(path: &str) {
    tool("qemu-img", &["check", "-q", "-f", "qcow2", path]);
}

/// `count` random changes of the disk, several at a time, and of its model.
pub async fn storm(ring: &Ring, image: &Rc<Qcow2>, model: &mut [u8], seed: u64, count: usize) {
    let mut dice = Dice::new(seed);
    let len = model.len() as u64;
    if len == 0 {
        return;
    }
    let longest = (len / 3).clamp(512, 400 << 10);
    for version in 0..count as u64 {
        // A few at once, in places of their own, so that the model is simple.
        let lanes = 1 + dice.below(4);
        let lane_len = len / lanes;
        let mut running = Vec::new();
        for lane in 0..lanes {
            let start = lane * lane_len + dice.below(lane_len.max(1));
            let room = (lane + 1) * lane_len - start;
            let n = 1 + dice.below(room.min(longest));
            // Many requests of real guests are aligned.
            let align = [1, 512, 4096, 65_536][dice.below(4) as usize];
            let start = if start - start % align >= lane * lane_len { start - start % align } else { start };
            let (range, kind) = (start as usize..(start + n) as usize, dice.below(10));
            let (image, r) = (image.clone(), ring.clone());
            let mut bytes = vec![0u8; n as usize];
            match kind {
                0..6 => {
                    pattern(start, seed.wrapping_mul(1000) + version, &mut bytes);
                    model[range.clone()].copy_from_slice(&bytes);
                    running.push((
                        range,
                        false,
                        ring.spawn_with_result(async move {
                            let mut buf = r.alloc(bytes.len()).await;
                            buf.copy_from(0, &bytes);
                            let fua = version % 16 == 0;
                            image.write(start, buf.freeze(), WriteFlags { fua }).await
                        }),
                    ));
                }
                6..9 => {
                    model[range.clone()].fill(0);
                    let flags = ZeroFlags { may_unmap: kind != 6, ..ZeroFlags::default() };
                    running.push((
                        range,
                        false,
                        ring.spawn_with_result(async move { image.write_zeroes(start, n, flags).await }),
                    ));
                }
                _ => running.push((
                    range,
                    true,
                    ring.spawn_with_result(async move { image.discard(start, n).await }),
                )),
            }
        }
        for (range, discarded, result) in running {
            result.take().await.expect("a change");
            if discarded {
                let (buf, result) = image.read(range.start as u64, ring.alloc(range.len()).await).await;
                result.expect("a read");
                for (old, new) in model[range].iter_mut().zip(buf.as_slice()) {
                    assert!(*new == 0 || *new == *old, "what was discarded is zeroes or as it was");
                    *old = *new;
                }
            }
        }
        if dice.below(6) == 0 {
            image.flush().await.expect("a flush");
        }
    }
}

/// Random changes by `qemu-io`, and of the model.
pub fn storm_by_qemu(path: &str, model: &mut [u8], seed: u64, count: usize) {
    let mut dice = Dice::new(seed);
    let mut arguments: Vec<String> = ["-f", "qcow2"].map(str::to_owned).to_vec();
    let sectors = model.len() as u64 / 512;
    if sectors == 0 {
        return;
    }
    for _ in 0..count {
        let first = dice.below(sectors);
        let n = 1 + dice.below((sectors - first).min(600));
        let range = first as usize * 512..(first + n) as usize * 512;
        let value = 1 + dice.below(250) as u8;
        let place = format!("{} {}", range.start, range.len());
        arguments.push("-c".into());
        arguments.push(if dice.below(4) == 0 {
            model[range].fill(0);
            let unmap = if dice.below(2) == 0 { "-u " } else { "" };
            format!("write -q -z {unmap}{place}")
        } else {
            model[range].fill(value);
            format!("write -q -P {value} {place}")
        });
    }
    arguments.push(path.to_owned());
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    tool("qemu-io", &arguments);
}

/// Two disks have the same bytes.
pub fn assert_bytes(what: &str, found: &[u8], wanted: &[u8]) {
    assert_eq!(found.len(), wanted.len(), "{what}: the length");
    if let Some(at) = super::image::difference(found, wanted) {
        panic!("{what}: byte {at:#x} is {:#x} and not {:#x}", found[at], wanted[at]);
    }
}
