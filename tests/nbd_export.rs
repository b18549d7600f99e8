//! The NBD export under real clients: libnbd's tools, QEMU's, fio, and clients that misbehave.

#[path = "nbd_export/disk.rs"]
mod disk;
#[path = "nbd_export/lab.rs"]
mod lab;

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use lab::{Lab, run};

const MIB: u64 = 1 << 20;

#[test]
fn qemu_io_reads_what_it_wrote() {
    let lab = Lab::new(64 * MIB);
    lab.qemu_io(&["write -P 0xa5 0 64k", "read -P 0xa5 0 64k", "read -P 0 64k 64k", "flush"]);
    // Parts of blocks, the largest request, and the end of the disk.
    lab.qemu_io(&[
        "write -P 1 1001 513",
        "read -P 1 1001 513",
        "read -P 0xa5 0 1001",
        "read -P 0xa5 1514 100",
    ]);
    lab.qemu_io(&[
        "write -P 7 1M 32M",
        "read -P 7 1M 32M",
        "write -P 9 67108352 512",
        "read -P 9 67108352 512",
    ]);
    lab.qemu_io(&["write -f -P 3 8k 4k", "aio_write -P 4 16k 4k", "aio_flush", "read -P 4 16k 4k"]);
    lab.qemu_io(&[
        "write -z 0 32k",
        "read -P 0 0 32k",
        "write -z -u 32k 32k",
        "read -P 0 32k 32k",
        "discard 1M 1M",
    ]);
    let seen = lab.disk(|disk| disk.seen.borrow().clone());
    assert!(seen.writes_fua >= 1 && seen.flushes >= 1 && seen.discards >= 1, "{seen:?}");
    assert!(seen.zeroes_keeping >= 1 && seen.zeroes_unmapping >= 1, "{seen:?}");
}

#[test]
fn nbdinfo_tells_the_export() {
    let lab = Lab::new(8 * MIB);
    let text = run("nbdinfo", &[&lab.uri("disk")]);
    for line in [
        "export-size: 8388608",
        "can_multi_conn: true",
        "can_flush: true",
        "can_fua: true",
        "can_trim: true",
        "can_zero: true",
        "can_fast_zero: true",
        "can_df: true",
        "can_cache: true",
        "is_read_only: false",
        "base:allocation",
        "block_size_minimum: 1",
        "block_size_maximum: 33554432",
    ] {
        assert!(text.contains(line), "no `{line}` in:\n{text}");
    }
    let list = run("nbdinfo", &["--list", &lab.uri("")]);
    assert!(list.contains("export=\"disk\"") && list.contains("export=\"readonly\""), "{list}");
    assert!(list.contains("description: A disk of memory."), "{list}");
    // The default export answers to no name.
    assert!(run("nbdinfo", &["--size", &lab.uri("")]).contains("8388608"));
    let read_only = run("nbdinfo", &[&lab.uri("readonly")]);
    assert!(read_only.contains("is_read_only: true"), "{read_only}");
}

#[test]
fn the_map_shows_holes_data_and_zeroes() {
    let lab = Lab::new(8 * MIB);
    lab.qemu_io(&["write -P 1 1M 1M", "write -z 3M 1M"]);
    let map = run("nbdinfo", &["--map", &lab.uri("disk")]);
    let lines: Vec<Vec<&str>> = map.lines().map(|line| line.split_whitespace().collect()).collect();
    let rows: Vec<[&str; 3]> = lines.iter().map(|l| [l[0], l[1], l[2]]).collect();
    let expected = [
        ["0", "1048576", "3"],
        ["1048576", "1048576", "0"],
        ["2097152", "1048576", "3"],
        ["3145728", "1048576", "2"],
        ["4194304", "4194304", "3"],
    ];
    assert_eq!(rows, expected, "{map}");
}

#[test]
fn a_fio_run_verifies() {
    let lab = Lab::new(64 * MIB);
    let uri = format!("--uri={}", lab.uri("disk"));
    let common = ["--name=job", "--ioengine=nbd", &uri, "--size=64M", "--verify=crc32c", "--verify_fatal=1"];
    let work = ["--rw=randwrite", "--bs=4k", "--iodepth=16", "--numjobs=1", "--number_ios=20000"];
    run("fio", &[&common[..], &work[..]].concat());
    let work = ["--rw=randwrite", "--bsrange=512-256k", "--iodepth=32", "--numjobs=1", "--bsrange=4k-300k"];
    run("fio", &[&common[..], &work[..]].concat());
}

#[test]
fn images_are_copied_in_and_out() {
    let lab = Lab::new(64 * MIB);
    let image = lab.pattern_file("in.raw", 64 * MIB);
    let out = lab.path("out.raw");
    run("nbdcopy", &["--flush", "-C4", &image, &lab.uri("disk")]);
    run("nbdcopy", &["-C4", &lab.uri("disk"), &out]);
    run("cmp", &[&image, &out]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &image, &lab.uri("disk")]);
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &lab.uri("readonly"), &lab.path("out.qcow2")]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &image, &lab.path("out.qcow2")]);
    run(
        "qemu-img",
        &[
            "convert",
            "-n",
            "-W",
            "-m16",
            "-f",
            "qcow2",
            "-O",
            "raw",
            &lab.path("out.qcow2"),
            &lab.uri("disk"),
        ],
    );
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &image, &lab.uri("disk")]);
    assert!(run("qemu-img", &["info", "-f", "raw", &lab.uri("disk")]).contains("virtual size: 64 MiB"));
}

#[test]
fn garbage_hurts_only_its_sender() {
    let lab = Lab::new(8 * MIB);
    let mut rubbish = lab.connect();
    rubbish.write_all(&[0x55; 4096]).unwrap();
    let mut sink = Vec::new();
    // The greeting, then the end (or a reset, because much was left unread).
    let _ = rubbish.read_to_end(&mut sink);
    assert_eq!(&sink[..8], b"NBDMAGIC");
    lab.qemu_io(&["write -P 1 0 4k", "read -P 1 0 4k"]);
    lab.wait_for_clients(0);
}

#[test]
fn a_silent_client_is_shown_the_door() {
    let lab = Lab::new(8 * MIB);
    let begin = Instant::now();
    let mut silent = lab.connect();
    let mut all = Vec::new();
    silent.read_to_end(&mut all).unwrap();
    let waited = begin.elapsed();
    assert!(waited > Duration::from_millis(900) && waited < Duration::from_secs(8), "{waited:?}");
    lab.wait_for_clients(0);
}
