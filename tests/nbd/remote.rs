//! Copies to, from and beside NBD servers that others wrote: through filters that refuse, delay, cut and compare; as the
//! file under a qcow2 image; how many requests are under way to a server that is far away; what an outside program is
//! shown of a guest's writes; and that a server that hangs keeps nobody.

mod log;
use common::nbd_peers;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use common::image::{KIB, MIB, Scratch, assert_equal, content, difference};
use common::nbd::Client;
use common::{Process, event, run, run_json, tool};
use log::{Entry, most_at_once, questions, writes};
use nbd_peers::Peer;

/// How long something may take that is bounded by a second or so: tenfold, and something for the machine.
const BOUND: Duration = Duration::from_secs(20);

fn pieces(count: u64, step: u64, len: u64) -> Vec<(u64, u64)> {
    (0..count).map(|i| (i * step, len)).collect()
}

/// Mirrors and converts there and back, and compares.
fn both_ways(scratch: &Scratch, source: &str, uri: impl Fn() -> Peer, policies: &[&str]) {
    let (back, notes) = (scratch.path("back"), scratch.path("notes"));
    let there = uri();
    let to = ["mirror", "--force", "-f", "raw", "-F", "raw", "--state-dir", &notes];
    // No policy forgives what cannot be compared.
    let verify: &[&str] = if policies.is_empty() { &["--verify"] } else { &[] };
    run_json(&[&to, verify, policies, &[source, &there.uri()]].concat());
    run_json(&[&["mirror", "-f", "raw"], policies, &[&there.uri(), &back]].concat());
    assert_equal(source, &back);
    std::fs::remove_file(&back).unwrap();
    if policies.is_empty() {
        // Another server, which holds nothing yet.
        let there = uri();
        run_json(&["convert", "-n", "-f", "raw", "--verify", "--state-dir", &notes, source, &there.uri()]);
        run_json(&["convert", "-f", "raw", &there.uri(), &back]);
        assert_equal(source, &back);
        std::fs::remove_file(&back).unwrap();
    }
}

#[test]
fn copies_go_through_every_filter() {
    let scratch = Scratch::new();
    // Whole blocks of every size below, and parts of the larger ones.
    let source = scratch.holey("source", 8 * MIB, &pieces(40, 200 * KIB + 512, 90 * KIB));
    let ignoring = ["--on-source-error", "ignore", "--on-target-error", "ignore"];
    let served: [(&[&str], &[&str]); 7] = [
        (&["--filter=delay", "memory", "8M", "rdelay=2ms", "wdelay=2ms", "delay-extents=2ms"], &[]),
        (&["--filter=error", "memory", "8M", "error=EIO", "error-rate=3%"], &ignoring),
        // Without extents, without a cache to fill beforehand.
        (&["--filter=noextents", "--filter=nocache", "memory", "8M"], &[]),
        (&["--filter=nozero", "--filter=fua", "memory", "8M", "fuamode=emulate"], &[]),
        (
            &[
                "--filter=blocksize-policy",
                "memory",
                "8M",
                "blocksize-error-policy=error",
                "blocksize-minimum=64K",
                "blocksize-preferred=64K",
                "blocksize-maximum=128K",
            ],
            &[],
        ),
        // The plugin's disk is odd, the filter's is not.
        (&["--filter=truncate", "memory", "8380001", "truncate=8M"], &[]),
        (&["--filter=noparallel", "--filter=truncate", "memory", "9000001", "truncate=8M"], &[]),
    ];
    for (arguments, policies) in served {
        both_ways(&scratch, &source, || Peer::nbdkit(arguments), policies);
    }
}

#[test]
fn converts_to_what_compares() {
    let scratch = Scratch::new();
    let notes = scratch.path("notes");
    let holey = scratch.holey("holey", 8 * MIB, &pieces(30, 270 * KIB, 100 * KIB));
    for source in [scratch.full("full", 4 * MIB), holey] {
        let peer = Peer::nbdkit(&["--filter=checkwrite", "file", &source]);
        run_json(&["convert", "-n", "-f", "raw", "--state-dir", &notes, &source, &peer.uri()]);
    }
    // It does find a copy that differs.
    let (one, other) = (scratch.full("one", MIB), scratch.holey("other", MIB, &[(4096, 512)]));
    let peer = Peer::nbdkit(&["--filter=checkwrite", "file", &one]);
    let ended = run(&["convert", "-n", "-f", "raw", "--state-dir", &notes, &other, &peer.uri()]);
    assert!(ended.code == Some(1) && ended.err.contains("incomplete and marked so"), "{ended}");
}

#[test]
fn a_qcow2_image_lies_on_a_server() {
    let scratch = Scratch::new();
    let notes = scratch.path("notes");
    let source = scratch.holey("source", 8 * MIB, &pieces(30, 270 * KIB, 100 * KIB));
    for (name, more) in [("plain", &[][..]), ("blocks", &["--filter=blocksize-policy"])] {
        let image = scratch.path(name);
        tool("qemu-img", &["create", "-q", "-f", "qcow2", &image, "8M"]);
        // An export does not grow.
        std::fs::OpenOptions::new().write(true).open(&image).unwrap().set_len(12 * MIB).unwrap();
        let policy = ["blocksize-error-policy=error", "blocksize-minimum=4K", "blocksize-preferred=4K"];
        let policy = if more.is_empty() { &[][..] } else { &policy };
        let peer = Peer::nbdkit(&[more, &["file", &image], policy].concat());
        let uri = peer.uri();
        let to = ["mirror", "--force", "-f", "raw", "-F", "qcow2", "--verify", "--state-dir", &notes];
        run_json(&[&to[..], &[&source, &uri]].concat());
        for (back, tool_of_ours, output) in
            [(scratch.path("m"), "mirror", "-F"), (scratch.path("c"), "convert", "-O")]
        {
            run_json(&[tool_of_ours, "-f", "qcow2", output, "raw", &uri, &back]);
            assert_equal(&source, &back);
            std::fs::remove_file(&back).unwrap();
        }
        drop(peer);
        tool("qemu-img", &["check", "-q", "-f", "qcow2", &image]);
        tool("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &source, &image]);
    }
}

#[test]
fn an_image_names_a_disk_on_a_server_if_the_user_allows_it() {
    let scratch = Scratch::new();
    let base = scratch.holey("base", 8 * MIB, &pieces(20, 300 * KIB, 100 * KIB));
    let (before, after) = (scratch.path("before"), scratch.path("after"));
    let mut wanted = content(&base);
    std::fs::write(&before, &wanted).unwrap();
    wanted[MIB as usize..2 * MIB as usize].fill(7);
    std::fs::write(&after, &wanted).unwrap();
    let peer = Peer::qemu_nbd(base.as_ref(), &["--cache=writeback"]);
    let uri = peer.uri();
    let (top, ours) = (scratch.path("top"), scratch.path("ours"));
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &uri, "-F", "raw", &top]);
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 7 1M 1M", &top]);
    // What a user names needs no permission.
    run_json(&["create", "-f", "qcow2", "-b", &uri, "-F", "raw", &ours]);
    for image in [&top, &ours] {
        let refused = run(&["map", image]);
        assert!(refused.code == Some(1) && refused.err.contains("--allow-servers"), "{refused}");
    }
    let same = |image: &str, content: &str| {
        let ended = run(&["compare", "--allow-servers", "-F", "raw", image, content]);
        assert_eq!(ended.code, Some(0), "{ended}");
        tool("qemu-img", &["compare", "-q", "-f", "qcow2", "-F", "raw", image, content]);
    };
    same(&top, &after);
    same(&ours, &before);
    let socket = uri.split_once("socket=").expect("a Unix socket").1;
    let server = format!(r#"{{"driver":"nbd","server":{{"type":"unix","path":"{socket}"}}}}"#);
    let name = format!(r#"json:{{"driver":"raw","file":{server}}}"#);
    tool("qemu-img", &["rebase", "-u", "-f", "qcow2", "-b", &name, "-F", "raw", &ours]);
    same(&ours, &before);
    let chain = run_json(&["info", "--backing-chain", "--allow-servers", &top]);
    assert!(format!("{chain:?}").contains(&uri), "{chain:?}");
    // Down to the server.
    run_json(&["commit", "--allow-servers", &top]);
    drop(peer);
    assert_equal(&base, &after);
}

#[test]
fn a_far_server_has_more_requests_under_way() {
    let scratch = Scratch::new();
    let notes = scratch.path("notes");
    let len = 64 * MIB;
    // Every other 64 KiB: pieces cannot become longer.
    let source = scratch.holey("source", len, &pieces(512, 128 * KIB, 64 * KIB));
    for job in ["mirror", "convert"] {
        let log = scratch.path(job);
        let logged = format!("logfile={log}");
        let peer =
            Peer::nbdkit(&["--filter=log", "--filter=delay", "memory", "64M", "delay-write=20ms", &logged]);
        let into: &[&str] = if job == "mirror" { &["--force", "-F", "raw"] } else { &["-n"] };
        run_json(&[&[job, "-f", "raw", "--state-dir", &notes], into, &[&source, &peer.uri()]].concat());
        drop(peer);
        let most = most_at_once(&log);
        assert!(most > 32, "{job}: {most} writes at once");
        // One answer tells of all holes; it is believed for a second.
        let questions = questions(&log);
        assert!((1..100).contains(&questions), "{job}: {questions} questions about 512 holes");
    }
}

/// A mirror of new writes to `uri`, ready, and the socket of its own export.
fn shadow(scratch: &Scratch, uri: &str, options: &[&str]) -> (Process, PathBuf) {
    let (source, notes) = (scratch.full("source", 4 * MIB), scratch.path("notes"));
    let socket = scratch.dir().join("sock");
    let export = format!("nbd+unix:///disk?socket={}", socket.display());
    let mirror = ["mirror", "--sync", "none", "--follow", "--force", "-f", "raw", "-F", "raw"];
    let mode = ["--copy-mode", "write-blocking"];
    let rest = ["--state-dir", &notes, "--export", &export, &source, uri];
    let mut mirror = Process::json(&[&mirror[..], &mode, options, &rest].concat());
    mirror.wait_for(|event| event["event"] == "BLOCK_JOB_READY");
    (mirror, socket)
}

#[test]
fn an_outside_program_is_shown_every_write_in_order() {
    let scratch = Scratch::new();
    let log = scratch.path("log");
    let peer = Peer::nbdkit(&["--filter=log", "memory", "4M", &format!("logfile={log}")]);
    let (mirror, socket) = shadow(&scratch, &peer.uri(), &[]);
    let mut client = Client::connect(&socket, "disk").unwrap();
    // They overlap, begin and end anywhere, and each is another one.
    let guest: Vec<(u64, u64)> = (0..300u64).map(|i| (i * 7919 % 9000, 1 + i * 31 % 5000)).collect();
    for (i, (at, len)) in guest.iter().enumerate() {
        client.write(*at, &vec![i as u8; *len as usize]).unwrap();
    }
    client.flush().unwrap();
    client.disconnect().unwrap();
    mirror.interrupt();
    let ended = mirror.end();
    assert_eq!(ended.code, Some(0), "{ended}");
    let seen: Vec<(u64, u64)> = writes(&log).iter().map(|Entry { at, len, .. }| (*at, *len)).collect();
    assert_eq!(seen, guest);
    drop(peer);
}

#[test]
fn overlapping_writes_of_several_guests_are_shown_in_the_order_in_which_they_happened() {
    let scratch = Scratch::new();
    let target = scratch.holey("target", 4 * MIB, &[]);
    let peer = Peer::nbdkit(&["--filter=delay", "file", &target, "delay-write=1ms"]);
    let (mirror, socket) = shadow(&scratch, &peer.uri(), &[]);
    let source = scratch.path("source");
    let before = content(&source);
    // All write the same few blocks: who was last on one disk has to be last on the other.
    std::thread::scope(|scope| {
        for guest in 0..4u8 {
            let socket = &socket;
            scope.spawn(move || {
                let mut client = Client::connect(socket, "disk").unwrap();
                for i in 0..60u64 {
                    let at = (i * 5 + u64::from(guest)) % 8 * 512;
                    client.write(at, &[guest * 64 + i as u8; 2048]).unwrap();
                }
                client.flush().unwrap();
                client.disconnect().unwrap();
            });
        }
    });
    mirror.interrupt();
    assert_eq!(mirror.end().code, Some(0));
    drop(peer);
    let (source, target) = (content(&source), content(&target));
    let written = 7 * 512 + 2048;
    assert_eq!(difference(&source[..written], &target[..written]), None);
    assert_eq!(difference(&source[written..], &before[written..]), None);
    assert_ne!(difference(&source[..written], &before[..written]), None);
}

#[test]
fn a_program_that_goes_away_stops_no_guest_not_even_one_that_waits_for_it() {
    let scratch = Scratch::new();
    let mut peer = Peer::nbdkit(&["memory", "4M"]);
    let (mut mirror, socket) = shadow(&scratch, &peer.uri(), &["--reconnect-delay", "0"]);
    let mut client = Client::connect(&socket, "disk").unwrap();
    let mut longest = Duration::ZERO;
    for i in 0..100u64 {
        if i == 30 {
            peer.kill();
        }
        let begin = Instant::now();
        client.write(i % 60 * 64 * KIB, &[i as u8; 4096]).unwrap();
        longest = longest.max(begin.elapsed());
    }
    assert!(longest < BOUND, "a guest waited {longest:?}");
    assert_eq!(mirror.wait_event("end")["ending"], "failed");
    client.write(0, &[9; 4096]).unwrap();
    client.disconnect().unwrap();
    assert_eq!(mirror.end().code, Some(1));
}

#[test]
fn a_hung_server_keeps_no_conversion_and_no_server_of_ours() {
    let scratch = Scratch::new();
    let source = scratch.full("source", 4 * MIB);
    let hung = ["--filter=delay", "memory", "4M", "delay-write=3600", "delay-zero=3600"];
    let never_reads = || Peer::nbdkit(&["--filter=delay", "pattern", "4M", "delay-read=3600"]);
    let (to, from) = (Peer::nbdkit(&hung), never_reads());
    let (notes, target) = (scratch.path("notes"), scratch.path("target"));
    let arguments: [&[&str]; 2] = [
        &["convert", "-n", "-f", "raw", "--state-dir", &notes, &source, &to.uri()],
        &["convert", "-f", "raw", &from.uri(), &target],
    ];
    for arguments in arguments {
        let convert = Process::json(arguments);
        std::thread::sleep(Duration::from_millis(500));
        let begin = Instant::now();
        convert.interrupt();
        let ended = convert.end();
        assert_eq!(ended.code, Some(3), "{ended}");
        assert!(begin.elapsed() < BOUND, "{:?}", begin.elapsed());
        event(&ended.events(), "end");
    }
    // A client waits for a read that never ends. The server is another one: nbdkit 1.32 sometimes fails an assertion of
    // its own (`raw_send_socket`) when a client goes whose requests it has not answered.
    let from = never_reads();
    let socket = scratch.dir().join("sock");
    let export = format!("nbd+unix:///disk?socket={}", socket.display());
    let mut server = Process::json(&["serve", "-r", "-f", "raw", "--export", &export, &from.uri()]);
    server.wait_event("listening");
    let mut client = Client::connect(&socket, "disk").unwrap();
    let waits = std::thread::spawn(move || client.read(0, &mut [0; 512]).is_err());
    std::thread::sleep(Duration::from_millis(300));
    let begin = Instant::now();
    server.interrupt();
    let ended = server.end();
    assert!(begin.elapsed() < BOUND, "{:?}: {ended}", begin.elapsed());
    assert!(waits.join().unwrap(), "nobody answered, and the read ended well");
}
