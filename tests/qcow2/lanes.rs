//! The fast lane of reads over a chain of qcow2 images, counted; and qcow2 at both ends of the commands.

use blockferry::block::{Driver, WriteFlags};
use blockferry::engine::open::open_qcow2;
use blockferry::format::qcow2::CreateOptions;
use blockferry::graph::node::{Node, Root};
use blockferry_ring::alloc::allocations;
use common::image::Scratch;
use common::qcow2::{assert_bytes, check_by_qemu, content_by_qemu, create, options, ring, storm, with};
use common::{Process, run_json, tool};

fn layer(size: u64, below: Option<&str>) -> CreateOptions {
    CreateOptions {
        size,
        backing_file: below.map(str::to_owned),
        backing_fmt: below.map(|_| "qcow2".into()),
        ..CreateOptions::default()
    }
}

#[test]
fn reads_that_hit_cached_tables_are_leaf_operations_at_once() {
    let (scratch, ring) = (Scratch::new(), ring());
    let (size, cluster) = (16u64 << 20, 65_536u64);
    // Each layer holds every fourth cluster; the fourth of them nobody holds.
    for number in 0..3u64 {
        let (path, below) = (scratch.path(&format!("l{number}")), format!("l{}", number.saturating_sub(1)));
        create(&ring, &path, &layer(size, (number > 0).then_some(&below)));
        let r = ring.clone();
        with(&ring, &path, &options(false), async move |image| {
            for at in (number * cluster..size).step_by(4 * cluster as usize) {
                let mut buf = r.alloc(cluster as usize).await;
                buf.as_mut_slice().fill(number as u8 + 1);
                image.write(at, buf.freeze(), WriteFlags::default()).await.unwrap();
            }
        });
    }
    let (r, top) = (ring.clone(), scratch.path("l2"));
    ring.block_on(async move {
        let image = open_qcow2(&r, &top, &options(false)).await.unwrap();
        let node = Node::new(&r, "top", image.clone());
        let root = Root::new(&node, true).unwrap();
        let read = async |at: u64| {
            let (buf, result) = root.read(at, r.alloc(4096).await).await;
            result.unwrap();
            let wanted = match at / cluster % 4 {
                3 => 0,
                layer => layer as u8 + 1,
            };
            assert!(buf.as_slice().iter().all(|b| *b == wanted), "at {at}");
        };
        for at in (0..size).step_by(cluster as usize) {
            read(at + 4096).await;
        }
        let before = image.counted();
        let (tasks, memory, misses) = (r.stats().tasks.get(), allocations(), r.pool().misses());
        for at in (0..size).step_by(8192) {
            read(at).await;
        }
        let after = image.counted();
        let reads = size / 8192;
        assert_eq!(after.resolved - before.resolved, reads, "all of them took the fast lane");
        assert_eq!((after.asked, after.loads), (before.asked, before.loads));
        assert_eq!(r.stats().tasks.get(), tasks, "no task");
        assert_eq!(r.pool().misses(), misses, "no memory for futures");
        assert_eq!(allocations() - memory, 0, "no allocation");
    });
}

/// A read of 1 MiB over four layers, of which each holds every fourth cluster: what lies together in a file is one
/// operation, all of them go out at once, and nothing is allocated for each piece.
#[test]
fn large_reads_over_a_chain_take_as_few_operations_as_its_files_allow() {
    let (scratch, ring) = (Scratch::new(), ring());
    let (size, cluster, depth) = (4u64 << 20, 65_536u64, 4u64);
    for number in 0..depth {
        let (path, below) = (scratch.path(&format!("l{number}")), format!("l{}", number.saturating_sub(1)));
        create(&ring, &path, &layer(size, (number > 0).then_some(&below)));
        let r = ring.clone();
        with(&ring, &path, &options(false), async move |image| {
            for at in (number * cluster..size).step_by((depth * cluster) as usize) {
                let mut buf = r.alloc(cluster as usize).await;
                buf.as_mut_slice().fill((at / cluster) as u8 + 1);
                image.write(at, buf.freeze(), WriteFlags::default()).await.unwrap();
            }
        });
    }
    // And one whose clusters lie in the file in the reverse order.
    create(&ring, &scratch.path("reverse"), &layer(size, None));
    let r = ring.clone();
    with(&ring, &scratch.path("reverse"), &options(false), async move |image| {
        for at in (0..size / cluster).rev().map(|number| number * cluster) {
            let mut buf = r.alloc(cluster as usize).await;
            buf.as_mut_slice().fill((at / cluster) as u8 + 1);
            image.write(at, buf.freeze(), WriteFlags::default()).await.unwrap();
        }
    });
    for (name, wanted) in [("l3", depth), ("reverse", 1)] {
        // Of its own, so that its statistics are those of these reads.
        let ring = common::qcow2::ring();
        let (r, path) = (ring.clone(), scratch.path(name));
        ring.block_on(async move {
            let image = open_qcow2(&r, &path, &options(true)).await.unwrap();
            let read = async |at: u64, len: u64| {
                let (buf, result) = image.read(at, r.alloc(len as usize).await).await;
                result.unwrap();
                for (i, part) in buf.as_slice().chunks(cluster as usize).enumerate() {
                    let value = (at / cluster) as u8 + i as u8 + 1;
                    assert!(
                        part.iter().all(|byte| *byte == value),
                        "{name}: cluster {i} of the read at {at}"
                    );
                }
            };
            // The tables of all layers, and memory for futures.
            read(0, 1 << 20).await;
            let (before, batch) = (image.counted(), r.stats().batch_max.get());
            let (operations, tasks, misses) =
                (r.stats().operations.get(), r.stats().tasks.get(), r.pool().misses());
            let memory = allocations();
            read(1 << 20, 1 << 20).await;
            let memory = allocations() - memory;
            assert_eq!(r.stats().operations.get() - operations, wanted, "{name}: operations");
            assert_eq!(
                (r.stats().tasks.get(), r.pool().misses()),
                (tasks, misses),
                "{name}: no task, no memory"
            );
            let after = image.counted();
            assert_eq!((after.gathered - before.gathered, after.loads - before.loads), (1, 0), "{name}");
            assert!(r.stats().batch_max.get() >= wanted.max(batch), "{name}: all at once");
            // A few lists, and two for each operation with several pieces.
            assert!(memory <= 8 + 3 * wanted, "{name}: {memory} allocations");
        });
    }
}

#[test]
fn sequential_writes_are_contiguous_and_tables_are_read_ahead() {
    let (scratch, ring) = (Scratch::new(), ring());
    let path = scratch.path("image");
    create(&ring, &path, &layer(1 << 30, None));
    let r = ring.clone();
    with(&ring, &path, &options(false), async move |image| {
        for at in (0..64u64 << 20).step_by(1 << 20) {
            let buf = r.alloc(1 << 20).await;
            image.write(at, buf.freeze(), WriteFlags::default()).await.unwrap();
        }
        let report = image.check(blockferry::format::qcow2::Repair::None).await.unwrap();
        assert_eq!((report.allocated_clusters, report.fragmented_clusters), (1024, 0));
    });
    let r = ring.clone();
    with(&ring, &path, &options(true), async move |image| {
        let before = image.counted().loads;
        for at in (0..512u64 << 20).step_by(1 << 20) {
            let (_, result) = image.read(at, r.alloc(1 << 20).await).await;
            result.unwrap();
        }
        // Four slices of 128 MiB each map this: one, and then the others at once.
        assert_eq!(image.counted().loads - before, 2);
    });
}

#[test]
fn commands_take_qcow2_at_both_ends() {
    let (scratch, ring) = (Scratch::new(), ring());
    let size = 8u64 << 20;
    create(&ring, &scratch.path("base"), &layer(size, None));
    let r = ring.clone();
    let model = with(&ring, &scratch.path("base"), &options(false), async move |image| {
        let mut model = vec![0; size as usize];
        storm(&r, &image, &mut model, 1, 20).await;
        model
    });
    let top = scratch.path("top");
    create(&ring, &top, &layer(size, Some("base")));
    let (r, m) = (ring.clone(), model);
    let mut model = with(&ring, &top, &options(false), async move |image| {
        let mut model = m;
        storm(&r, &image, &mut model, 2, 10).await;
        model
    });
    // A chain to a raw file.
    let raw = scratch.path("copy.raw");
    run_json(&["mirror", "-f", "qcow2", "-F", "raw", "--verify", &top, &raw]);
    assert_bytes("a raw copy", &std::fs::read(&raw).expect("the copy"), &model);
    // That to an image with clusters larger than what is copied at once.
    let target = scratch.path("copy.qcow2");
    create(&ring, &target, &CreateOptions { cluster_size: 2 << 20, ..layer(size, None) });
    run_json(&["mirror", "-f", "raw", "-F", "qcow2", "--force", "--verify", &raw, &target]);
    check_by_qemu(&target);
    assert_bytes("a qcow2 copy", &content_by_qemu(&target), &model);
    // Served, written by a client that never flushes, and stopped.
    let socket = scratch.path("socket");
    let uri = format!("nbd+unix:///?socket={socket}");
    let mut server = Process::json(&["serve", "-f", "qcow2", "--export", &uri, &top]);
    server.wait_event("listening");
    tool("qemu-io", &["-f", "raw", "-t", "unsafe", "-c", "write -q -P 9 1000k 100k", &uri]);
    model[1_024_000..1_126_400].fill(9);
    server.interrupt();
    let ended = server.end();
    assert_eq!(ended.code, Some(0), "{ended}");
    check_by_qemu(&top);
    assert_bytes("what was served", &content_by_qemu(&top), &model);
}
