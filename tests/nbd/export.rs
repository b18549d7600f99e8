//! The NBD export under real clients: libnbd's tools, QEMU's, fio, and clients that misbehave.

mod crowd;
mod disk;
mod lab;
mod raw;

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use blockferry::export::nbd::{Export, PaceLimits, RemoveMode, ServerConfig};
use blockferry::graph::node::Root;
use blockferry_ring::SocketAddress;

use lab::{Lab, run};
use raw::{BLOCK_STATUS, FLAG_DF, FLAG_FAST_ZERO, FLAG_REQ_ONE, FLUSH, READ, Raw, WRITE, WRITE_ZEROES};

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

/// Writes all over the disk, in all sizes and at any offset, and reads it back.
fn verify_with_fio(lab: &Lab) {
    let uri = format!("--uri={}", lab.uri("disk"));
    let common = ["--name=job", "--ioengine=nbd", &uri, "--size=64M", "--rw=randwrite", "--numjobs=1"];
    let check = ["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"];
    for sizes in [
        ["--bs=4k", "--iodepth=16", "--number_ios=16000"],
        ["--bsrange=4k-300k", "--iodepth=32", "--number_ios=2000"],
        ["--bsrange=512-70k", "--bs_unaligned=1", "--iodepth=8"],
    ] {
        run("fio", &[&common[..], &check[..], &sizes[..]].concat());
    }
}

#[test]
fn a_disk_in_memory_verifies() {
    verify_with_fio(&Lab::new(64 * MIB));
}

#[test]
fn a_disk_in_a_file_verifies_and_is_copied() {
    let lab = Lab::on_file(64 * MIB);
    verify_with_fio(&lab);
    let image = lab.pattern_file("in.raw", 64 * MIB);
    run("nbdcopy", &["--flush", "-C4", &image, &lab.uri("disk")]);
    run("cmp", &[&image, &lab.path("disk.raw")]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &image, &lab.uri("readonly")]);
    lab.qemu_io(&[
        "write -z -u 1M 1M",
        "read -P 0 1M 1M",
        "discard 4M 4M",
        "write -f -P 5 4097 3",
        "read -P 5 4097 3",
    ]);
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
    // Good requests, then rubbish, from somebody who reads nothing and stays.
    let mut raw = Raw::structured(lab.connect(), "disk");
    (0..3).for_each(|cookie| raw.send(0, READ, cookie, 0, 1 << 20));
    raw.stream.write_all(&[0x55; 64]).unwrap();
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

const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const EOVERFLOW: u32 = 75;

#[test]
fn what_is_refused_costs_no_session() {
    let lab = Lab::new(40 * MIB);
    let mut raw = Raw::structured(lab.connect(), "disk");
    assert_eq!(raw.size, 40 * MIB);
    assert_eq!(raw.call(0, READ, 40 * MIB - 512, 1024).error, EINVAL);
    assert_eq!(raw.call(0, READ, u64::MAX, 1).error, EINVAL);
    assert_eq!(raw.write(40 * MIB - 512, &[1; 1024]).error, ENOSPC);
    assert_eq!(raw.call(0, 99, 0, 0).error, EINVAL);
    assert_eq!(raw.call(1 << 9, FLUSH, 0, 0).error, EINVAL);
    assert_eq!(raw.call(0, BLOCK_STATUS, 0, 0).error, EINVAL);
    // Too large, but small enough to be read past.
    assert_eq!(raw.write(0, &vec![1; 33 << 20]).error, EINVAL);
    assert_eq!(raw.write(0, b"still here").error, 0);
    assert_eq!(raw.call(0, READ, 0, 10).bytes(), b"still here");
    assert!(raw.call(0, READ, 0, 0).data.is_empty());
    assert_eq!(raw.write(0, b"").error, 0);
    // Larger than anybody should be asked to read past.
    raw.send(0, WRITE, 1, 0, 65 << 20);
    assert!(raw.is_over());
    let mut raw = Raw::structured(lab.connect(), "readonly");
    assert_eq!(raw.write(0, &[1; 512]).error, EPERM);
    assert_eq!(raw.call(0, READ, 0, 10).bytes(), b"still here");
    assert_eq!(raw.call(0, WRITE_ZEROES, 0, 512).error, EINVAL);
}

#[test]
fn failures_of_the_disk_reach_the_client() {
    let lab = Lab::new(8 * MIB);
    let mut raw = Raw::structured(lab.connect(), "disk");
    assert_eq!(raw.write(0, &vec![7; 4 << 20]).error, 0);
    lab.disk(|disk| disk.bad_byte.set(Some((3 * MIB + 5, blockferry_ring::Errno::EIO))));
    assert_eq!(raw.call(0, READ, 3 * MIB, 4096).error, EIO);
    // One part of four fails: the others may come, and the end tells.
    let reply = raw.call(0, READ, 0, 4 << 20);
    assert_eq!(reply.error, EIO);
    assert!(reply.data.iter().all(|(offset, _)| *offset != 3 * MIB));
    assert_eq!(raw.call(0, BLOCK_STATUS, 3 * MIB + 5, 512).error, EIO);
    lab.disk(|disk| disk.bad_byte.set(Some((3 * MIB + 5, blockferry_ring::Errno::EDQUOT))));
    assert_eq!(raw.write(3 * MIB, &[1; 4096]).error, ENOSPC);
    assert_eq!(raw.write(0, &vec![1; 4 << 20]).error, ENOSPC);
    lab.disk(|disk| disk.bad_byte.set(None));
    assert_eq!(raw.call(0, READ, 0, 4 << 20).bytes().len(), 4 << 20);
}

#[test]
fn large_reads_come_in_the_style_that_was_agreed() {
    let lab = Lab::new(40 * MIB);
    let image: Vec<u8> = (0..40 * MIB / 8).flat_map(|i| (i * 0x9e37_79b9).to_le_bytes()).collect();
    let mut raw = Raw::structured(lab.connect(), "disk");
    assert_eq!(raw.write(0, &image[..32 << 20]).error, 0);
    assert_eq!(raw.write(32 * MIB, &image[32 << 20..]).error, 0);
    let (from, to) = (12_345usize, 12_345 + (32 << 20));
    let reply = raw.call(0, READ, from as u64, 32 << 20);
    assert!(reply.data.len() == 32 && reply.bytes() == image[from..to], "parts of 1 MiB");
    assert_eq!(raw.call(FLAG_DF, READ, 1, 1 << 20).data, [(1, image[1..(1 << 20) + 1].to_vec())]);
    assert_eq!(raw.call(FLAG_DF, READ, 1, (1 << 20) + 1).error, EOVERFLOW);
    // Without chunks: in one piece, with other replies before and after, never within.
    let mut raw = Raw::simple(lab.connect(), "disk");
    let lengths = [512, 32 << 20, 100, (1 << 20) + 1, 4096, 3 << 20, 1];
    for (cookie, length) in lengths.iter().enumerate() {
        raw.send(0, READ, cookie as u64, from as u64, *length);
    }
    for _ in lengths {
        // The cookie tells how much data follows.
        let mut head = [0; 16];
        raw.stream.read_exact(&mut head).unwrap();
        assert_eq!(head[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0]);
        let length = lengths[head[15] as usize] as usize;
        let mut data = vec![0; length];
        raw.stream.read_exact(&mut data).unwrap();
        assert!(data == image[from..from + length], "{length} bytes");
    }
    // A failure before the data is an answer; one in its midst ends the session.
    lab.disk(|disk| disk.bad_byte.set(Some((5 * MIB, blockferry_ring::Errno::EIO))));
    raw.send(0, READ, 5, 5 * MIB, 2 << 20);
    assert_eq!(raw.simple_reply(2 << 20).1, EIO);
    raw.send(0, READ, 5, 4 * MIB, 2 << 20);
    let mut rest = Vec::new();
    let _ = raw.stream.read_to_end(&mut rest);
    assert!(rest.len() < 16 + (2 << 20), "{} bytes came", rest.len());
    lab.wait_for_clients(1);
}

#[test]
fn status_keeps_to_its_limits() {
    let lab = Lab::new(64 * MIB);
    let mut raw = Raw::structured(lab.connect(), "disk");
    for i in 0..4096 {
        raw.stream.write_all(&Raw::header(0, WRITE, i, i * 8192, 4096)).unwrap();
        raw.stream.write_all(&[1; 4096]).unwrap();
        assert_eq!(raw.reply(i).error, 0);
    }
    let extents = raw.call(0, BLOCK_STATUS, 0, 64 << 20).extents;
    assert!(extents.len() > 1000 && extents.len() < 4096, "{} extents", extents.len());
    assert!(extents.iter().enumerate().all(|(i, e)| *e == (4096, if i % 2 == 0 { 0 } else { 3 })));
    assert_eq!(raw.call(FLAG_REQ_ONE, BLOCK_STATUS, 100, 64 << 20 >> 1).extents, [(3996, 0)]);
    assert_eq!(raw.call(FLAG_REQ_ONE, BLOCK_STATUS, 100, 50).extents, [(50, 0)]);
    assert_eq!(raw.call(0, BLOCK_STATUS, 40 * MIB, 4096).extents, [(4096, 3)]);
    assert_eq!(raw.call(FLAG_FAST_ZERO, WRITE_ZEROES, 0, 8 << 20).error, 0);
    assert_eq!(raw.call(0, BLOCK_STATUS, 0, 8 << 20).extents, [(8 << 20, 3)]);
}

#[test]
fn requests_of_a_client_run_side_by_side_and_within_its_limits() {
    let config = ServerConfig { in_flight_max: 24, bytes_in_flight_max: MIB, ..ServerConfig::default() };
    let lab = Lab::with(16 * MIB, config);
    lab.disk(|disk| disk.delay_ns.set(20_000_000));
    let mut raw = Raw::structured(lab.connect(), "disk");
    let begin = Instant::now();
    let all: Vec<u8> = (0..96).flat_map(|i| Raw::header(0, READ, i, i * 4096, 4096)).collect();
    raw.stream.write_all(&all).unwrap();
    let mut cookies: Vec<u64> = (0..96).map(|_| raw.any_reply()).collect();
    cookies.sort();
    assert_eq!(cookies, (0..96).collect::<Vec<_>>());
    let took = begin.elapsed();
    assert_eq!(lab.disk(|disk| disk.seen.borrow().in_flight_max), 24);
    assert!(took >= Duration::from_millis(80) && took < Duration::from_secs(2), "{took:?}");
    // 24 requests would be 6 MiB.
    lab.disk(|disk| disk.seen.borrow_mut().in_flight_max = 0);
    let all: Vec<u8> = (0..40).flat_map(|i| Raw::header(0, READ, i, 0, 256 << 10)).collect();
    raw.stream.write_all(&all).unwrap();
    (0..40).for_each(|_| assert!(raw.any_reply() < 40));
    assert_eq!(lab.disk(|disk| disk.seen.borrow().in_flight_max), 4);
}

#[test]
fn clients_that_read_no_replies_stall_only_themselves() {
    let lab = Lab::new(64 * MIB);
    let mut stalled = Vec::new();
    for _ in 0..4 {
        let mut raw = Raw::structured(lab.connect(), "disk");
        raw.stream.set_nonblocking(true).unwrap();
        for cookie in 0..400 {
            if raw.stream.write_all(&Raw::header(0, READ, cookie, 0, 1 << 20)).is_err() {
                break;
            }
        }
        stalled.push(raw);
    }
    lab.qemu_io(&["write -P 1 0 8M", "read -P 1 0 8M", "flush"]);
    let image = lab.pattern_file("in.raw", 64 * MIB);
    run("nbdcopy", &[&image, &lab.uri("disk")]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &image, &lab.uri("disk")]);
    let (used, all) = lab.inside(|inside| (inside.ring.arena().bytes_used(), inside.ring.arena().bytes()));
    assert!(used < all, "{used} of {all} bytes are held by clients that do nothing");
    drop(stalled);
    lab.wait_for_clients(0);
}

#[test]
fn stalled_clients_go_when_others_need_the_memory() {
    let config = ServerConfig { stall_ns_max: 300_000_000, ..ServerConfig::default() };
    let lab = Lab::with(64 * MIB, config);
    // One alone may stall for as long as it likes.
    let mut patient = Raw::structured(lab.connect(), "disk");
    patient.send(0, READ, 1, 0, 4 << 20);
    std::thread::sleep(Duration::from_millis(700));
    assert_eq!(patient.reply(1).bytes().len(), 4 << 20);
    let mut stalled = Vec::new();
    for i in 0..40 {
        let mut raw = Raw::structured(lab.connect(), "disk");
        if i % 2 == 0 {
            (0..50).for_each(|cookie| raw.send(0, READ, cookie, 0, 1 << 20));
        } else {
            raw.send(0, WRITE, 1, 0, 32 << 20);
            raw.stream.write_all(&[0; 1000]).unwrap();
        }
        stalled.push(raw);
    }
    lab.qemu_io(&["write -P 1 0 8M", "read -P 1 0 8M", "flush"]);
    // The first one has done no wrong.
    assert_eq!(patient.call(0, READ, 0, 4096).bytes(), [1; 4096]);
    assert!(lab.inside(|inside| inside.server.clients()) < 41);
}

#[test]
fn clients_that_stop_at_any_byte_harm_nobody() {
    let lab = Lab::new(64 * MIB);
    let script = common::nbd_script::Script::new();
    // The farewell would end a session in good order.
    let all = *script.marks.last().unwrap();
    let cuts: Vec<usize> = script.cuts().into_iter().filter(|at| *at <= all).step_by(7).collect();
    assert!(cuts.len() > 60, "{} cuts", cuts.len());
    let begin = Instant::now();
    let stalled: Vec<_> = cuts
        .iter()
        .map(|cut| {
            let mut stream = lab.connect();
            // One that reads nothing may not get rid of all it has to say.
            stream.set_write_timeout(Some(Duration::from_millis(20))).unwrap();
            let _ = stream.write_all(&script.bytes[..*cut]);
            (*cut, stream)
        })
        .collect();
    let fio = [
        "--name=job",
        "--ioengine=nbd",
        "--size=4M",
        "--rw=randwrite",
        "--bsrange=512-70k",
        "--bs_unaligned=1",
    ];
    let uri = format!("--uri={}", lab.uri("disk"));
    run(
        "fio",
        &[&fio[..], &[&uri, "--verify_fatal=1", "--verify=crc32c", "--verify_state_save=0", "--iodepth=8"]]
            .concat(),
    );
    lab.qemu_io(&["write -P 1 0 4M", "read -P 1 0 4M", "flush"]);
    // Handshakes have a second.
    let served = cuts.iter().filter(|cut| **cut >= script.handshake_bytes).count();
    lab.wait_for_clients(served);
    let took = begin.elapsed();
    assert!(took > Duration::from_millis(900), "handshakes were ended after {took:?}");
    for (cut, mut stream) in stalled {
        if cut < script.handshake_bytes {
            let mut rest = Vec::new();
            let ended = stream.read_to_end(&mut rest);
            assert!(ended.is_ok() || rest.len() > 17, "cut at {cut}: {ended:?}");
        }
    }
    lab.wait_for_clients(0);
}

#[test]
fn a_client_with_a_pace_keeps_to_it() {
    let pace = PaceLimits { requests_per_sec: 200, bytes_per_sec: 0 };
    let lab = Lab::with(8 * MIB, ServerConfig { pace, ..ServerConfig::default() });
    let mut raw = Raw::structured(lab.connect(), "disk");
    let begin = Instant::now();
    let all: Vec<u8> = (0..220).flat_map(|i| Raw::header(0, READ, i, i * 4096, 4096)).collect();
    raw.stream.write_all(&all).unwrap();
    (0..220).for_each(|_| assert!(raw.any_reply() < 220));
    let took = begin.elapsed();
    // 20 are the burst, the rest takes a second.
    assert!((Duration::from_millis(950)..Duration::from_secs(10)).contains(&took), "{took:?}");
}

#[test]
fn clients_that_are_killed_leave_nothing() {
    let lab = Lab::new(64 * MIB);
    lab.disk(|disk| disk.delay_ns.set(3_000_000));
    for work in ["--rw=randrw", "--rw=randwrite", "--rw=randread"] {
        let uri = format!("--uri={}", lab.uri("disk"));
        let arguments =
            ["--name=job", "--ioengine=nbd", &uri, "--size=64M", work, "--bsrange=4k-512k", "--iodepth=32"];
        let client =
            lab::start("fio", &[&arguments[..], &["--time_based", "--runtime=30", "--thread"]].concat());
        lab.wait_for_clients(1);
        let begin = Instant::now();
        while lab.disk(|disk| disk.seen.borrow().in_flight_max) < 8 {
            assert!(begin.elapsed() < Duration::from_secs(20), "the client never gets going");
            std::thread::sleep(Duration::from_millis(5));
        }
        drop(client);
        lab.wait_for_clients(0);
        lab.disk(|disk| disk.seen.borrow_mut().in_flight_max = 0);
    }
    // Cut in the middle of a header, and of a payload on either side of what one receive holds.
    for cut in [5usize, 27, 28, 29, 5000, 70_000, (1 << 20) + 29, 3 << 20] {
        let mut raw = Raw::structured(lab.connect(), "disk");
        let mut bytes = Raw::header(0, WRITE, 1, 0, 4 << 20);
        bytes.resize(28 + (4 << 20), 0x11);
        raw.stream.write_all(&bytes[..cut]).unwrap();
        drop(raw);
        lab.wait_for_clients(0);
    }
    lab.disk(|disk| disk.delay_ns.set(0));
    lab.qemu_io(&["write -P 2 0 4k", "read -P 2 0 4k"]);
}

#[test]
fn who_connects_in_a_drain_waits_at_the_door() {
    let lab = Lab::new(8 * MIB);
    let mut before = Raw::structured(lab.connect(), "disk");
    assert_eq!(before.write(0, b"before").error, 0);
    lab.inside(|inside| {
        let (node, ring) = (inside.node.clone(), inside.ring.clone());
        ring.clone().spawn(async move {
            let drained = node.drain(1_000_000_000).await.unwrap();
            ring.sleep(400_000_000).await;
            drop(drained);
        });
    });
    while !lab.inside(|inside| inside.node.is_drained()) {}
    let begin = Instant::now();
    let newcomer = Raw::ask(lab.connect(), "disk");
    before.send(0, READ, 5, 0, 6);
    newcomer.set_read_timeout(Some(Duration::from_millis(150))).unwrap();
    let mut byte = [0];
    assert!((&newcomer).read(&mut byte).is_err(), "the handshake ended in the midst of a drain");
    newcomer.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut newcomer = Raw::answered(newcomer);
    assert!(begin.elapsed() >= Duration::from_millis(250));
    assert_eq!(newcomer.call(0, READ, 0, 6).bytes(), b"before");
    assert_eq!(before.reply(5).bytes(), b"before");
}

#[test]
fn exports_come_and_go() {
    let lab = Lab::new(8 * MIB);
    let mut raw = Raw::structured(lab.connect(), "disk");
    let refused =
        lab.inside(|inside| inside.server.remove_export("disk", RemoveMode::Safe).unwrap_err().to_string());
    assert_eq!(refused, "The export 'disk' is in use (clients: 1).");
    assert_eq!(raw.write(0, b"x").error, 0);
    lab.inside(|inside| {
        inside.server.remove_export("disk", RemoveMode::Hard).unwrap();
        inside.server.remove_export("disk", RemoveMode::Hard).unwrap_err();
        inside.server.remove_export("readonly", RemoveMode::Safe).unwrap();
    });
    assert!(raw.is_over());
    lab.wait_for_clients(0);
    let (is_good, text) = lab::try_run("nbdinfo", &[&lab.uri("disk")]);
    assert!(!is_good && text.contains("No such file or directory for export: disk"), "{text}");
    lab.inside(|inside| {
        let root = Root::new(&inside.node, false).unwrap();
        let export = Export { root, description: String::new(), writable: true, default: false };
        inside.server.add_export("again", export.clone()).unwrap();
        inside.server.add_export("again", export).unwrap_err();
        assert_eq!(inside.server.exports().len(), 1);
    });
    assert!(run("nbdinfo", &["--size", &lab.uri("again")]).contains("8388608"));
}

#[test]
fn idle_is_told_when_the_last_client_has_left() {
    let lab = Lab::new(8 * MIB);
    let (give, told) = std::sync::mpsc::channel();
    lab.inside(|inside| {
        let server = inside.server.clone();
        inside.ring.spawn(async move {
            server.idle().await;
            give.send(server.clients()).unwrap();
        });
    });
    let is_told = || told.try_recv().ok();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(is_told(), None, "nobody has been there yet");
    let (first, second) = (lab.connect(), lab.connect());
    lab.wait_for_clients(2);
    drop(first);
    lab.wait_for_clients(1);
    assert_eq!(is_told(), None);
    drop(second);
    lab.wait_for_clients(0);
    assert_eq!(is_told(), Some(0));
}

#[test]
fn too_many_clients_wait_to_be_accepted() {
    let lab = Lab::with(8 * MIB, ServerConfig { clients_max: 2, ..ServerConfig::default() });
    let first = Raw::structured(lab.connect(), "disk");
    let _second = Raw::structured(lab.connect(), "disk");
    let third = lab.connect();
    third.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let mut byte = [0];
    assert!((&third).read(&mut byte).is_err(), "a third client is greeted");
    assert_eq!(lab.inside(|inside| inside.server.clients()), 2);
    drop(first);
    third.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    Raw::structured(third, "disk").call(0, READ, 0, 512);
}

#[test]
fn sockets_are_taken_over_only_from_the_dead() {
    let lab = Lab::new(8 * MIB);
    let stale = lab.path("stale.sock");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    let file = lab.path("file");
    std::fs::write(&file, "not a socket").unwrap();
    let (used, busy) = (stale.clone(), lab.path("nbd.sock"));
    let tcp = lab.inside(move |inside| {
        let listen = |path: &str| inside.server.listen(&SocketAddress::Unix(path.into()));
        listen(&stale).unwrap();
        for path in [&busy, &file] {
            assert!(listen(path).unwrap_err().to_string().contains("Address already in use"), "{path}");
        }
        assert!(listen("/nonexistent/socket").unwrap_err().to_string().contains("No such file"));
        inside.server.listen(&SocketAddress::Tcp(([127, 0, 0, 1], 0).into())).unwrap()
    });
    assert!(matches!(tcp, SocketAddress::Tcp(address) if address.port() != 0));
    assert_eq!(std::fs::read_to_string(lab.path("file")).unwrap(), "not a socket");
    assert!(run("nbdinfo", &["--size", &format!("nbd+unix:///disk?socket={used}")]).contains("8388608"));
    let uri = format!("nbd://{tcp}/disk");
    run("qemu-io", &["-f", "raw", "-c", "write -P 3 0 4M", "-c", "read -P 3 0 4M", &uri]);
    // Who is connected stays when the door closes.
    let mut raw = Raw::structured(lab.connect(), "disk");
    lab.inside(|inside| {
        let server = inside.server.clone();
        inside.ring.spawn(async move { server.stop_accepting().await });
    });
    let begin = Instant::now();
    while std::path::Path::new(&used).exists() {
        assert!(begin.elapsed() < Duration::from_secs(20), "the socket stays");
    }
    assert_eq!(raw.call(0, READ, 0, 4).bytes(), [3; 4]);
    assert!(std::os::unix::net::UnixStream::connect(lab.path("nbd.sock")).is_err());
}
