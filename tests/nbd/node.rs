//! A remote disk as jobs and guests use it, on real servers: nbdkit with filters that make life hard, qemu-nbd,
//! qemu-storage-daemon, and this project's own.

mod faulty;
mod lapses;
use common::nbd_peers;
mod proxy;
mod refusals;

use std::future::Future;
use std::rc::Rc;
use std::time::{Duration, Instant};

use blockferry::block::{Driver, Limits, Operation, WriteFlags, ZeroFlags};
use blockferry::protocol::nbd::{NbdNode, RemoteOptions};
use blockferry_ring::{Config, Errno, Ring};

use common::image::{Dice, KIB, MIB, Scratch, assert_equal, content, difference};
use common::nbd::Client;
use common::{Process, event, info, run, run_json, tool};
use nbd_peers::Peer;
use proxy::Proxy;

/// Runs `test` on a ring of its own.
fn on_ring<T: 'static, F: Future<Output = T> + 'static>(test: impl FnOnce(Ring) -> F) -> T {
    let ring = Ring::new(&Config::default()).expect("a ring");
    let result = ring.block_on(test(ring.clone()));
    assert_eq!(ring.shutdown(5_000_000_000).leaked, 0);
    result
}

fn options(uri: &str) -> RemoteOptions {
    RemoteOptions::new(uri.parse().expect("a good URI"))
}

async fn open(ring: &Ring, uri: &str) -> Rc<NbdNode> {
    NbdNode::open(ring, options(uri), false).await.expect("a disk")
}

/// Random requests, two at a time now and then, against a model in memory; how often the server told of zeroes.
async fn scrutinise(ring: Ring, node: Rc<NbdNode>, seed: u64, steps: u64) -> u64 {
    let len = node.len() as usize;
    let mut model = vec![0u8; len];
    let mut dice = Dice::new(seed);
    let (mut read, mut told_zero) = (0, 0u64);
    for step in 0..steps {
        let max = [600, 9_000, 200_000, 1 << 20][dice.below(4) as usize].min(len as u64);
        let size = 1 + dice.below(max) as usize;
        let at = match dice.below(8) {
            0 => len - size,
            1 => 0,
            _ => dice.below((len - size) as u64 + 1) as usize,
        };
        let (at, size) = if dice.below(3) == 0 { (at & !4095, size) } else { (at, size) };
        let size = size.min(len - at);
        let offset = at as u64;
        match dice.below(12) {
            0..4 => {
                let mut buf = ring.alloc(size).await;
                buf.as_mut_slice().iter_mut().for_each(|byte| *byte = dice.next() as u8 | 1);
                model[at..at + size].copy_from_slice(buf.as_slice());
                let fua = dice.below(6) == 0;
                node.write(offset, buf.freeze(), WriteFlags { fua }).await.expect("a write");
            }
            4..8 => {
                let mut buf = ring.alloc(size).await;
                buf.as_mut_slice().fill(0xdd);
                let (buf, result) = node.read(offset, buf).await;
                result.expect("a read");
                let wrong = difference(buf.as_slice(), &model[at..at + size]);
                assert_eq!(wrong, None, "step {step}: {size} bytes at {at}");
                read += size;
            }
            8 => {
                let flags = ZeroFlags {
                    fua: dice.below(3) == 0,
                    may_unmap: dice.below(2) == 0,
                    no_fallback: dice.below(4) == 0,
                };
                match node.write_zeroes(offset, size as u64, flags).await {
                    Ok(()) => model[at..at + size].fill(0),
                    Err(error) => assert!(flags.no_fallback && error.errno == Errno::EOPNOTSUPP, "{error}"),
                }
            }
            9 => node.flush().await.expect("a flush"),
            10 => {
                // Two writes at once that share a block at most, never a byte.
                let half = size / 2;
                if half == 0 {
                    continue;
                }
                let mut parts = Vec::new();
                for (from, to) in [(at, at + half), (at + half, at + size)] {
                    let mut buf = ring.alloc(to - from).await;
                    buf.as_mut_slice().fill(dice.next() as u8 | 1);
                    model[from..to].copy_from_slice(buf.as_slice());
                    let (node, buf) = (node.clone(), buf.freeze());
                    parts.push(ring.spawn_with_result(async move {
                        node.write(from as u64, buf, WriteFlags::default()).await
                    }));
                }
                for part in parts {
                    part.take().await.expect("a write beside another");
                }
            }
            _ => {
                let mut from = at;
                while from < at + size {
                    let left = (at + size - from) as u64;
                    let extent = node.block_status(from as u64, left).await.expect("a status");
                    assert!(extent.len > 0 && extent.len <= left, "{extent:?}");
                    let to = from + extent.len as usize;
                    let is_zero = model[from..to].iter().all(|byte| *byte == 0);
                    assert!(!extent.zero || is_zero, "step {step}: {extent:?} at {from}");
                    told_zero += u64::from(extent.zero);
                    from = to;
                }
            }
        }
    }
    assert!(read > 0);
    told_zero
}

fn scrutinise_peer(peer: &Peer, seed: u64, check: impl FnOnce(&NbdNode, u64)) {
    let uri = peer.uri();
    let (node, told_zero) = on_ring(|ring| async move {
        let node = open(&ring, &uri).await;
        let told_zero = scrutinise(ring, node.clone(), seed, 400).await;
        (node, told_zero)
    });
    check(&node, told_zero);
}

#[test]
fn any_server_is_a_disk() {
    let scratch = Scratch::new();
    let image = scratch.holey("image", 3 * MIB, &[]);
    let plain =
        |node: &NbdNode, told_zero| assert_eq!((node.limits().request_align, told_zero > 0), (1, true));
    scrutinise_peer(&Peer::nbdkit(&["memory", "3M"]), 1, plain);
    scrutinise_peer(&Peer::qemu_nbd(image.as_ref(), &["--cache=writeback", "--discard=unmap"]), 2, plain);
    // No extents, no zeroes, no trim, no FUA, one thing at a time.
    let bare =
        ["--filter=nozero", "--filter=noextents", "--filter=fua", "--filter=noparallel", "memory", "3M"];
    scrutinise_peer(&Peer::nbdkit(&bare), 3, |node, _| {
        let can = node.capabilities();
        assert!(!can.zero_fast && !can.zero_unmap && !can.fua, "{can:?}");
    });
    for mode in ["emulate", "notrim", "plugin"] {
        let zero = format!("zeromode={mode}");
        scrutinise_peer(&Peer::nbdkit(&["--filter=nozero", "memory", "3M", &zero]), 4, |_, _| {});
    }
    // An odd size, and one that is rounded to whole blocks.
    scrutinise_peer(&Peer::nbdkit(&["memory", "3000001"]), 5, |node, _| assert_eq!(node.len(), 3_000_001));
    let rounded = ["--filter=truncate", "memory", "3000001", "round-down=64K"];
    scrutinise_peer(&Peer::nbdkit(&rounded), 6, |node, _| assert!(node.len().is_multiple_of(64 * KIB)));
}

#[test]
fn parts_of_blocks_are_read_changed_and_written_back() {
    for (seed, minimum, maximum) in [(1, "512", "32M"), (2, "4K", "64K"), (3, "64K", "64K"), (4, "1", "4K")] {
        let (minimum, maximum) =
            (format!("blocksize-minimum={minimum}"), format!("blocksize-maximum={maximum}"));
        let policy = [
            "--filter=blocksize-policy",
            "memory",
            "3M",
            "blocksize-error-policy=error",
            "blocksize-preferred=64K",
            &minimum,
            &maximum,
        ];
        let policy = if maximum.ends_with("=4K") {
            policy
                .iter()
                .map(|word| if *word == "blocksize-preferred=64K" { "blocksize-preferred=4K" } else { word })
                .collect()
        } else {
            policy.to_vec()
        };
        scrutinise_peer(&Peer::nbdkit(&policy), seed, |node, _| {
            assert!(node.limits().request_align >= 1 && node.limits() != Limits::default());
        });
    }
}

#[test]
fn a_deep_queue_gets_more_connections_where_the_server_allows_them() {
    for (threads, most) in [(true, 4), (false, 1)] {
        let one = [
            "--filter=multi-conn",
            "--filter=delay",
            "memory",
            "8M",
            "rdelay=3ms",
            "multi-conn-mode=disable",
        ];
        let many = ["--filter=delay", "memory", "8M", "rdelay=3ms"];
        let peer = Peer::nbdkit(if threads { &many } else { &one });
        let uri = peer.uri();
        let (first, later) = on_ring(|ring| async move {
            let node = open(&ring, &uri).await;
            let first = node.connections();
            for _ in 0..4 {
                let reads: Vec<_> = (0..32u64)
                    .map(|i| {
                        let (ring, node) = (ring.clone(), node.clone());
                        ring.clone().spawn_with_result(async move {
                            let buf = ring.alloc(4096).await;
                            node.read(i * 4096, buf).await.1
                        })
                    })
                    .collect();
                for read in reads {
                    read.take().await.expect("a read");
                }
            }
            (first, node.connections())
        });
        assert!(first == 1 && (later > 1) == (most > 1) && later <= most, "{first}, then {later}");
    }
}

#[test]
fn the_link_is_cut_and_work_goes_on() {
    // With several threads nbdkit 1.32 aborts when one still answers on a connection that another has closed
    // (raw_send_socket: sock >= 0), and the disk is gone.
    let peer = Peer::nbdkit(&["--threads=1", "memory", "3M"]);
    let proxy = Proxy::new(&peer.socket());
    let uri = proxy.uri();
    proxy.cut_often();
    on_ring(|ring| async move {
        let node = open(&ring, &uri).await;
        scrutinise(ring, node, 9, 400).await;
    });
    assert!(proxy.cuts() >= 10, "the link was cut {} times", proxy.cuts());
}

#[test]
fn without_a_server_requests_wait_for_the_delay_and_no_longer() {
    let mut peer = Peer::nbdkit(&["memory", "1M"]);
    let uri = peer.uri();
    on_ring(|ring| async move {
        let options = RemoteOptions { reconnect_delay_ns: 400_000_000, ..options(&uri) };
        let node = NbdNode::open(&ring, options, false).await.expect("a disk");
        peer.kill();
        let begin = Instant::now();
        let (_, result) = node.read(0, ring.alloc(512).await).await;
        let error = result.expect_err("nobody answers");
        let took = begin.elapsed();
        assert!(took > Duration::from_millis(300) && took < Duration::from_secs(4), "{took:?}");
        assert!(error.operation == Operation::Read && error.to_string().contains("nbd+unix"), "{error}");
        // From then on they fail at once.
        let begin = Instant::now();
        node.flush().await.expect_err("nobody answers");
        assert!(begin.elapsed() < Duration::from_millis(200));
    });
}

#[test]
fn opening_tries_again_as_long_as_it_may() {
    let scratch = Scratch::new();
    let socket = scratch.dir().join("later");
    let uri = format!("nbd+unix:///?socket={}", socket.display());
    let late = socket.clone();
    let peer = Peer::nbdkit(&["memory", "1M"]);
    let real = peer.socket();
    let server = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(400));
        std::os::unix::fs::symlink(real, &late).unwrap();
    });
    let opened = uri.clone();
    on_ring(|ring| async move {
        let once = NbdNode::open(&ring, options(&opened), false).await.expect_err("not there yet");
        assert_eq!((once.operation, once.errno), (Operation::Open, Errno::ENOENT));
        let options = RemoteOptions { open_timeout_ns: 20_000_000_000, ..options(&opened) };
        NbdNode::open(&ring, options, false).await.expect("a disk");
    });
    server.join().unwrap();
    drop(peer);
    let begin = Instant::now();
    let ended = run(&["info", "-f", "raw", &uri]);
    assert!(ended.code == Some(1) && ended.err.contains("later"), "{ended}");
    assert!(begin.elapsed() < Duration::from_secs(10));
}

#[test]
fn another_export_under_the_same_name_is_refused() {
    let (first, second) = (Peer::nbdkit(&["memory", "1M"]), Peer::nbdkit(&["memory", "2M"]));
    let proxy = Proxy::new(&first.socket());
    let uri = proxy.uri();
    on_ring(|ring| async move {
        let node = open(&ring, &uri).await;
        proxy.lead_to(&second.socket());
        proxy.cut();
        for _ in 0..2 {
            let error = node.flush().await.expect_err("it is another disk");
            assert_eq!(error.errno, Errno::ESTALE, "{error}");
        }
    });
}

/// Copies there and back, and compares.
fn ferry(scratch: &Scratch, uri: &str, options: &[&str]) {
    let (source, back, notes) = (scratch.path("source"), scratch.path("back"), scratch.path("notes"));
    let to = ["mirror", "--force", "-F", "raw", "--state-dir", &notes];
    run_json(&[&to, options, &[&source, uri]].concat());
    run_json(&[&["mirror", "-f", "raw"], options, &[uri, &back]].concat());
    assert_equal(&source, &back);
    std::fs::remove_file(back).unwrap();
}

#[test]
fn mirrors_to_and_from_every_server() {
    let scratch = Scratch::new();
    let len = 8 * MIB;
    let data: Vec<(u64, u64)> = (0..40).map(|i| (i * 200 * KIB + i * 512, 90 * KIB)).collect();
    let source = scratch.holey("source", len, &data);
    let image = || scratch.holey("served", len, &[(1000, 3 * MIB)]);
    ferry(&scratch, &Peer::nbdkit(&["memory", "8M"]).uri(), &["--verify"]);
    ferry(
        &scratch,
        &Peer::qemu_nbd(image().as_ref(), &["--cache=none", "--discard=unmap"]).uri(),
        &["--verify"],
    );
    let bad = ["--filter=error", "--filter=delay", "memory", "8M", "delay-read=1ms", "delay-write=1ms"];
    let bad = Peer::nbdkit(&[&bad[..], &["error=EIO", "error-rate=5%"]].concat());
    ferry(&scratch, &bad.uri(), &["--on-source-error", "ignore", "--on-target-error", "ignore"]);
    let blocks = ["--filter=blocksize-policy", "--filter=nozero", "memory", "8M", "blocksize-minimum=64K"];
    let blocks = [&blocks[..], &["blocksize-preferred=64K", "blocksize-maximum=128K"]].concat();
    ferry(&scratch, &Peer::nbdkit(&[&blocks[..], &["blocksize-error-policy=error"]].concat()).uri(), &[]);
    // Our own server, under QEMU's name for it.
    let socket = scratch.path("sock");
    let export = format!("nbd+unix:///disk?socket={socket}");
    let served = image();
    let mut server = Process::json(&["serve", "-f", "raw", "--export", &export, &served]);
    server.wait_event("listening");
    ferry(&scratch, &format!("driver=nbd,server.type=unix,server.path={socket},export=disk"), &[]);
    let json = format!(
        r#"json:{{"driver":"nbd","server":{{"type":"unix","path":"{socket}"}},"export":"disk","read-only":true}}"#
    );
    assert_eq!(info(&json)["virtual-size"], len);
    server.interrupt();
    assert_eq!(server.end().code, Some(0));
    assert_equal(&source, &served);
    // The same over TCP, by names and addresses, on rings that may do no more than they have to.
    let served = image();
    let exports = ["--export", "nbd://[::1]:0/disk", "--export", "nbd://127.0.0.1:0/disk"];
    let mut server = Process::json(&[&["serve", "-f", "raw"][..], &exports, &[&served]].concat());
    let mut listening = || server.wait_event("listening")["uri"].as_str().unwrap().to_owned();
    let (six, four) = (listening(), listening());
    ferry(&scratch, &six, &["--restrict"]);
    let port = four.trim_start_matches("nbd://127.0.0.1:").trim_end_matches("/disk").to_owned();
    for name in [
        format!("nbd+tcp://localhost:{port}/disk"),
        format!("nbd:localhost:{port}:exportname=disk"),
        format!("delay:1ms:{four}"),
        format!("driver=nbd,host=127.0.0.1,port={port},export=disk"),
    ] {
        assert_eq!(info(&name)["virtual-size"], len, "{name}");
    }
    server.interrupt();
    assert_eq!(server.end().code, Some(0));
    assert_equal(&source, &served);
    // Nothing is overwritten that was not meant to be.
    let peer = Peer::nbdkit(&["memory", "8M"]);
    let ended = run(&["mirror", "-F", "raw", &source, &peer.uri()]);
    assert!(ended.code == Some(1) && ended.err.contains("--force"), "{ended}");
    let read_only = Peer::nbdkit(&["--readonly", "memory", "8M"]);
    let notes = scratch.path("notes");
    let ended = run(&["mirror", "--force", "-F", "raw", "--state-dir", &notes, &source, &read_only.uri()]);
    assert!(ended.code == Some(1) && ended.err.contains("nobody write"), "{ended}");
}

#[test]
fn qemu_storage_daemon_is_source_and_target() {
    let scratch = Scratch::new();
    let source = scratch.holey("source", 8 * MIB, &[(0, MIB), (3 * MIB + 512, 2 * MIB)]);
    let served = scratch.holey("served", 8 * MIB, &[(7 * MIB, 100)]);
    let socket = scratch.path("sock");
    let file = format!("driver=file,node-name=f,filename={served},discard=unmap");
    let listen = format!("addr.type=unix,addr.path={socket}");
    let mut command = std::process::Command::new("qemu-storage-daemon");
    command.args(["--blockdev", &file, "--nbd-server", &listen]);
    command.args(["--export", "type=nbd,id=e,node-name=f,name=disk,writable=on"]);
    let daemon = Process::spawn(command);
    let end = Instant::now() + common::PATIENCE;
    while std::os::unix::net::UnixStream::connect(&socket).is_err() {
        assert!(Instant::now() < end, "the daemon does not listen");
        std::thread::sleep(Duration::from_millis(10));
    }
    ferry(&scratch, &format!("nbd+unix:///disk?socket={socket}"), &[]);
    drop(daemon);
    assert_equal(&source, &served);
}

#[test]
fn nbdkits_checkwrite_accepts_our_copies() {
    let scratch = Scratch::new();
    let notes = scratch.path("notes");
    let data: Vec<(u64, u64)> = (0..30).map(|i| (i * 270 * KIB, 100 * KIB + i * 512)).collect();
    for source in [scratch.full("full", 4 * MIB), scratch.holey("holey", 8 * MIB, &data)] {
        let peer = Peer::nbdkit(&["--filter=checkwrite", "file", &source]);
        run_json(&["mirror", "--force", "-F", "raw", "--state-dir", &notes, &source, &peer.uri()]);
    }
    // It does find a copy that differs.
    let (one, other) = (scratch.full("one", MIB), scratch.holey("other", MIB, &[(4096, 512)]));
    let peer = Peer::nbdkit(&["--filter=checkwrite", "file", &one]);
    let ended = run(&["mirror", "--force", "-F", "raw", "--state-dir", &notes, &other, &peer.uri()]);
    assert!(ended.code == Some(1) && ended.err.contains("incomplete and marked so"), "{ended}");
}

/// The writes that nbdkit's log filter saw: offset and bytes, in order.
fn logged_writes(log: &str) -> Vec<(u64, u64)> {
    let number = |line: &str, name: &str| {
        let at = line.find(name).map(|at| at + name.len())?;
        let digits: String = line[at..].chars().take_while(char::is_ascii_hexdigit).collect();
        u64::from_str_radix(&digits, 16).ok()
    };
    std::fs::read_to_string(log)
        .unwrap()
        .lines()
        .filter(|line| line.contains(" Write ") && !line.contains("return"))
        .map(|line| (number(line, "offset=0x").unwrap_or(u64::MAX), number(line, "count=0x").unwrap_or(0)))
        .collect()
}

#[test]
fn an_outside_program_is_shown_every_write() {
    let scratch = Scratch::new();
    let source = scratch.full("source", 4 * MIB);
    let log = scratch.path("log");
    let file = format!("logfile={log}");
    let peer = Peer::nbdkit(&["--filter=log", "memory", "4M", &file]);
    let socket = scratch.dir().join("sock");
    let export = format!("nbd+unix:///disk?socket={}", socket.display());
    let uri = peer.uri();
    let notes = scratch.path("notes");
    let mirror =
        ["mirror", "--state-dir", &notes, "--sync", "none", "--follow", "--force", "-f", "raw", "-F", "raw"];
    let mut mirror = Process::json(&[&mirror[..], &["--export", &export, &source, &uri]].concat());
    mirror.wait_for(|event| event["event"] == "BLOCK_JOB_READY");
    let before = logged_writes(&log);
    assert_eq!(before, [], "without a write there is nothing to copy");
    let mut client = Client::connect(&socket, "disk").unwrap();
    let blocks: Vec<u64> = (0..20).map(|i| (i * 7 % 31) * 128 * KIB).collect();
    for block in &blocks {
        client.write(*block, &[*block as u8 | 1; 4096]).unwrap();
    }
    client.flush().unwrap();
    client.disconnect().unwrap();
    mirror.interrupt();
    let ended = mirror.end();
    assert_eq!(ended.code, Some(0), "{ended}");
    let seen = logged_writes(&log);
    for block in &blocks {
        let is_covered = seen.iter().any(|(at, len)| at <= block && at + len >= block + 4096);
        assert!(is_covered, "the write at {block} was not shown: {seen:?}");
    }
}

/// A mirror of new writes to `uri`, ready, and the socket of its own export.
fn shadow(scratch: &Scratch, uri: &str, options: &[&str]) -> (Process, std::path::PathBuf) {
    let (source, notes) = (scratch.full("source", 4 * MIB), scratch.path("notes"));
    let socket = scratch.dir().join("sock");
    let export = format!("nbd+unix:///disk?socket={}", socket.display());
    let mirror = ["mirror", "--sync", "none", "--follow", "--force", "-f", "raw", "-F", "raw"];
    let rest = ["--state-dir", &notes, "--export", &export, &source, uri];
    let mut mirror = Process::json(&[&mirror[..], options, &rest].concat());
    mirror.wait_for(|event| event["event"] == "BLOCK_JOB_READY");
    (mirror, socket)
}

#[test]
fn the_loss_of_the_outside_program_does_not_stop_the_guest() {
    let scratch = Scratch::new();
    let mut peer = Peer::nbdkit(&["memory", "4M"]);
    let (mut mirror, socket) = shadow(&scratch, &peer.uri(), &["--reconnect-delay", "1s"]);
    let mut client = Client::connect(&socket, "disk").unwrap();
    let mut longest = Duration::ZERO;
    for i in 0..400u64 {
        if i == 30 {
            peer.kill();
        }
        let begin = Instant::now();
        client.write(i % 60 * 64 * KIB, &[i as u8; 4096]).unwrap();
        longest = longest.max(begin.elapsed());
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(longest < Duration::from_millis(900), "a guest waited {longest:?}");
    let end = mirror.wait_event("end");
    assert_eq!(end["ending"], "failed");
    // The guest has its disk still.
    client.write(0, &[9; 4096]).unwrap();
    let mut bytes = [0; 4096];
    client.read(0, &mut bytes).unwrap();
    assert_eq!(bytes, [9; 4096]);
    client.disconnect().unwrap();
    assert_eq!(mirror.end().code, Some(1));
}

#[test]
fn who_asks_twice_is_not_kept_by_a_server_that_hangs() {
    let scratch = Scratch::new();
    let peer = Peer::nbdkit(&["--filter=delay", "memory", "4M", "delay-write=3600"]);
    let (mut mirror, socket) = shadow(&scratch, &peer.uri(), &["--exit-on-done"]);
    let mut client = Client::connect(&socket, "disk").unwrap();
    client.write(0, &[1; 4096]).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    mirror.interrupt();
    std::thread::sleep(Duration::from_millis(700));
    assert!(!mirror.has_ended(), "it ends complete, and is not complete");
    let begin = Instant::now();
    mirror.interrupt();
    let ended = mirror.end();
    assert_eq!(ended.code, Some(3), "{ended}");
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
}

#[test]
fn the_link_is_cut_for_seconds_and_the_mirror_goes_on() {
    let scratch = Scratch::new();
    let source = scratch.full("source", 32 * MIB);
    let served = scratch.holey("served", 32 * MIB, &[]);
    let notes = scratch.path("notes");
    let peer = Peer::qemu_nbd(served.as_ref(), &["--cache=writeback"]);
    let proxy = Proxy::new(&peer.socket());
    let uri = proxy.uri();
    let mut mirror = Process::json(&[
        "mirror",
        "--force",
        "-F",
        "raw",
        "--state-dir",
        &notes,
        "--speed",
        "12MiB",
        &source,
        &uri,
    ]);
    std::thread::sleep(Duration::from_millis(700));
    proxy.refuse();
    proxy.cut();
    std::thread::sleep(Duration::from_millis(2500));
    assert!(!mirror.has_ended(), "it gave up");
    proxy.allow();
    let end = mirror.wait_event("end");
    assert_eq!(end["ending"], "completed", "{}", mirror.end());
    let copied = end["details"]["bytes-copied"].as_u64();
    assert!(copied.is_none_or(|copied| copied < 34 * MIB), "it began from the start: {end}");
    assert_eq!(mirror.end().code, Some(0));
    drop(peer);
    assert_eq!(difference(&content(&source), &content(&served)), None);
}

#[test]
fn a_hung_server_does_not_keep_the_user() {
    let scratch = Scratch::new();
    let source = scratch.full("source", 4 * MIB);
    let slow = ["--filter=delay", "memory", "4M", "delay-write=3600", "delay-read=3600", "delay-zero=3600"];
    let peer = Peer::nbdkit(&slow);
    let (uri, target, notes) = (peer.uri(), scratch.path("target"), scratch.path("notes"));
    let data = Peer::nbdkit(&["--filter=delay", "pattern", "4M", "delay-read=3600"]);
    let full = data.uri();
    let to: &[&str] = &["mirror", "--force", "-F", "raw", "--state-dir", &notes, &source, &uri];
    let from: &[&str] = &["mirror", "-f", "raw", &full, &target];
    for arguments in [to, from] {
        let mirror = Process::json(arguments);
        std::thread::sleep(Duration::from_millis(500));
        let begin = Instant::now();
        mirror.interrupt();
        let ended = mirror.end();
        assert_eq!(ended.code, Some(3), "{ended}");
        assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
        event(&ended.events(), "end");
    }
    // And one that never says a word: opening has its time.
    let socket = scratch.dir().join("silent");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let silent = format!("nbd+unix:///?socket={}", socket.display());
    let begin = Instant::now();
    let ended = run(&["info", "-f", "raw", "--open-timeout", "300ms", &silent]);
    assert!(ended.code == Some(1) && begin.elapsed() < Duration::from_secs(15), "{ended}");
}

#[test]
fn converts_to_and_from_servers() {
    let scratch = Scratch::new();
    let source = scratch.holey("source", 8 * MIB, &[(0, MIB), (3 * MIB + 512, 2 * MIB)]);
    let served = scratch.holey("served", 8 * MIB, &[(7 * MIB, 100)]);
    let (peer, back) = (Peer::qemu_nbd(served.as_ref(), &["--cache=writeback"]), scratch.path("back"));
    run_json(&["convert", "-n", "-f", "raw", &source, &peer.uri()]);
    run_json(&["convert", "-f", "raw", &peer.uri(), &back]);
    drop(peer);
    assert_equal(&source, &served);
    assert_equal(&source, &back);
    let bad = Peer::nbdkit(&["--filter=error", "pattern", "8M", "error-pread=EIO", "error-pread-rate=100%"]);
    let ended = run(&["convert", "-f", "raw", &bad.uri(), &scratch.path("broken")]);
    assert!(ended.code == Some(1) && ended.err.contains("Input/output error"), "{ended}");
}

#[test]
fn a_remote_disk_is_served_again() {
    let scratch = Scratch::new();
    let peer = Peer::nbdkit(&["memory", "16M"]);
    let export = format!("nbd+unix:///disk?socket={}", scratch.path("sock"));
    let mut server = Process::json(&["serve", "-f", "raw", "--export", &export, &peer.uri()]);
    server.wait_event("listening");
    tool("qemu-io", &["-f", "raw", "-c", "write -P 3 1001 70000", "-c", "read -P 3 1001 70000", &export]);
    server.interrupt();
    assert_eq!(server.end().code, Some(0));
}
