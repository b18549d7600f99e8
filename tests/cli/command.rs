//! The command line as scripts see it: exit codes, texts, what is left on disk, what the counters say.

mod examples;
mod marks;
mod words;

use common::image::{KIB, MIB, Scratch, allocated, assert_equal, content, difference, pattern, scribble};
use common::nbd::Client;
use common::writer::{Plan, Writer};
use common::{Ended, LoopDevice, Process, event, info, is_marked, run, run_json, stats, tool};

/// Runs the command, which has to fail with exit code 1 and a text that contains all of `texts`.
fn refused(arguments: &[&str], texts: &[&str]) -> Ended {
    let ended = run(arguments);
    assert_eq!(ended.code, Some(1), "{ended}");
    for text in texts {
        assert!(ended.err.contains(text), "no `{text}` in: {ended}");
    }
    ended
}

/// The URI of an export at a socket of this scratch folder, and the socket.
fn export(scratch: &Scratch) -> (String, std::path::PathBuf) {
    let socket = scratch.dir().join("socket");
    (format!("nbd+unix:///disk?socket={}", socket.display()), socket)
}

#[test]
fn an_existing_target_is_left_alone() {
    let scratch = Scratch::new();
    let source = scratch.full("source", MIB);
    let target = scratch.holey("target", MIB, &[(4096, 512)]);
    let (bytes, before) = (content(&target), std::fs::metadata(&target).unwrap());
    refused(&["mirror", &source, &target], &["exists and is left alone", "--force", &target]);
    // Its format has to be said, too: nothing is guessed about what will be overwritten.
    refused(&["mirror", "--force", &source, &target], &["-F raw"]);
    let after = std::fs::metadata(&target).unwrap();
    assert!(content(&target) == bytes && before.modified().unwrap() == after.modified().unwrap());
    assert!(!is_marked(&target));
    let ended = run(&["mirror", "--force", "-F", "raw", &source, &target]);
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(ended.err.contains("Completed") && ended.err.contains(&target), "{ended}");
    assert_equal(&source, &target);
}

#[test]
fn a_target_that_is_wrapped_is_left_alone_too() {
    let scratch = Scratch::new();
    let source = scratch.full("source", MIB);
    let target = scratch.holey("target", MIB, &[(4096, 512)]);
    let bytes = content(&target);
    for name in [format!("file:{target}"), format!("delay:1ms:{target}")] {
        refused(&["mirror", "-F", "raw", &source, &name], &["exists and is left alone"]);
    }
    assert!(content(&target) == bytes);
}

#[test]
fn a_disk_is_not_mirrored_into_itself() {
    let scratch = Scratch::new();
    let source = scratch.full("source", MIB);
    let bytes = content(&source);
    let (symbolic, hard) = (scratch.path("symbolic"), scratch.path("hard"));
    std::os::unix::fs::symlink(&source, &symbolic).unwrap();
    std::fs::hard_link(&source, &hard).unwrap();
    for target in [&source, &symbolic, &hard] {
        let wrapped = format!("delay:1ms:{target}");
        for target in [target, &wrapped] {
            refused(&["mirror", "--force", "-F", "raw", &source, target], &["is the image that is read"]);
        }
    }
    assert!(content(&source) == bytes && !is_marked(&source));
}

#[test]
fn options_that_make_no_sense_change_nothing() {
    let scratch = Scratch::new();
    let source = scratch.full("source", MIB);
    let target = scratch.path("target");
    let range = "Parameter 'granularity' expects a value in range [512B, 64MB]";
    for (granularity, text) in [
        ("256", range),
        ("128MiB", range),
        ("3000", "Parameter 'granularity' expects a power of 2"),
        ("96KiB", "Parameter 'granularity' expects a power of 2"),
    ] {
        let ended = run(&["mirror", "--granularity", granularity, &source, &target]);
        assert!(ended.code == Some(2) && ended.err.contains(text), "{ended}");
        assert!(!std::fs::exists(&target).unwrap(), "--granularity {granularity} left a target behind");
    }
    // The command line itself: exit code 2, before anything is opened.
    for arguments in [
        &["mirror", &source][..],
        &["mirror", "--pivot", &source, &target],
        &["mirror", "--speed", "fast", &source, &target],
        &["mirror", "-f", "qcow3", &source, &target],
        &["ferry"],
    ] {
        let ended = run(arguments);
        assert_eq!(ended.code, Some(2), "{arguments:?}: {ended}");
    }
    refused(&["mirror", &scratch.path("nothing"), &target], &["nothing", "No such file"]);
    assert!(!std::fs::exists(&target).unwrap());
    // With --json the error is an object too.
    let ended = run(&["--json", "mirror", "--granularity", "3000", &source, &target]);
    assert_eq!(ended.code, Some(2));
    let events = ended.events();
    let error = event(&events, "error");
    assert_eq!(error["message"], "Parameter 'granularity' expects a power of 2");
    assert_eq!(error["exit-code"], 2);
}

#[test]
fn every_granularity_that_makes_sense_copies() {
    let scratch = Scratch::new();
    let source = scratch.holey("source", 3 * MIB + 512, &[(0, 5000), (MIB, MIB), (3 * MIB, 512)]);
    for (i, granularity) in ["512", "4KiB", "1MiB", "64MiB"].into_iter().enumerate() {
        let target = scratch.path(&format!("target{i}"));
        run_json(&["mirror", "--granularity", granularity, &source, &target]);
        assert_equal(&source, &target);
    }
}

#[test]
fn sizes_have_to_match_unless_a_larger_target_is_allowed() {
    let scratch = Scratch::new();
    let source = scratch.full("source", MIB);
    for len in [MIB - 512, MIB + 512] {
        let target = scratch.full("target", len);
        let bytes = content(&target);
        let text = if len < MIB { "is smaller" } else { "different sizes" };
        let ended = refused(&["mirror", "--force", "-F", "raw", &source, &target], &[text]);
        assert!(content(&target) == bytes && !is_marked(&target));
        assert!(!ended.err.contains("marked"), "the target was not touched: {ended}");
    }
    let arguments = ["mirror", "--force", "-F", "raw", "--allow-larger-target", &source];
    let smaller = scratch.full("smaller", MIB - 512);
    refused(&[&arguments[..], &[&smaller]].concat(), &["is smaller"]);
    let larger = scratch.path("larger");
    let mut bytes = vec![7; (MIB + 777) as usize];
    std::fs::write(&larger, &bytes).unwrap();
    run_json(&[&arguments[..], &[&larger]].concat());
    bytes[..MIB as usize].copy_from_slice(&content(&source));
    assert_eq!(difference(&content(&larger), &bytes), None);
}

#[test]
fn an_interrupt_before_ready_leaves_a_marked_target() {
    let scratch = Scratch::new();
    let source = scratch.full("source", 8 * MIB);
    let target = scratch.path("target");
    let mut mirror = Process::json(&["mirror", "--speed", "1MiB", &source, &target]);
    let progress = mirror.wait_event("progress");
    assert_eq!(progress["phase"], "bulk");
    assert!(is_marked(&target));
    mirror.interrupt();
    let ended = mirror.end();
    assert_eq!(ended.code, Some(3), "{ended}");
    let events = ended.events();
    assert_eq!(event(&events, "end")["ending"], "cancelled");
    event(&events, "BLOCK_JOB_CANCELLED");
    let mark = info(&target);
    assert_eq!(mark["state"], "incomplete");
    assert!(mark["mark"].to_string().contains("source"), "the mark names the source: {mark}");
    let text = run(&["info", "-f", "raw", &target]);
    assert!(text.out.contains("INCOMPLETE"), "{text}");

    // For people: the sentence, and the same exit code.
    let person = run_interrupted(&["mirror", "--speed", "1MiB", &source, &scratch.path("other")]);
    assert_eq!(person.code, Some(3), "{person}");
    assert!(person.err.contains("incomplete and marked so"), "{person}");

    // The next try completes it and takes the mark away.
    run_json(&["mirror", "--force", "-F", "raw", &source, &target]);
    assert!(!is_marked(&target));
    assert_equal(&source, &target);
}

/// Runs the command without `--json` and interrupts it when its target is there and marked.
fn run_interrupted(arguments: &[&str]) -> Ended {
    let mirror = Process::spawn(common::blockferry(arguments));
    let target = arguments.last().unwrap();
    let end = std::time::Instant::now() + common::PATIENCE;
    while !(std::fs::exists(target).unwrap() && is_marked(target)) {
        assert!(std::time::Instant::now() < end, "no target");
    }
    mirror.interrupt();
    mirror.end()
}

#[test]
fn an_interrupt_in_follow_completes() {
    let scratch = Scratch::new();
    let source = scratch.full("source", MIB);
    let target = scratch.path("target");
    let mut mirror = Process::json(&["mirror", "--follow", &source, &target]);
    mirror.wait_event("BLOCK_JOB_READY");
    assert!(is_marked(&target), "it goes on following: not the moment to call it complete");
    mirror.interrupt();
    let ended = mirror.end();
    assert_eq!(ended.code, Some(0), "{ended}");
    assert_eq!(event(&ended.events(), "end")["ending"], "completed");
    assert!(!is_marked(&target));
    assert_equal(&source, &target);
}

#[test]
fn tails_that_are_not_aligned() {
    let scratch = Scratch::new();
    for len in [0, 1, 511, 513, 4097, 65_537, 1_000_001, 2 * MIB + 1] {
        let source = scratch.full(&format!("source{len}"), len);
        for (i, options) in
            [&["--verify"][..], &["--cache", "buffered"], &["--granularity", "512"]].into_iter().enumerate()
        {
            let target = scratch.path(&format!("target{len}-{i}"));
            run_json(&[&["mirror"], options, &[&source, &target]].concat());
            tool("cmp", &[&source, &target]);
            assert!(!is_marked(&target));
        }
    }
}

#[test]
fn a_sparse_image_stays_thin() {
    let scratch = Scratch::new();
    let len = 256 * MIB;
    // Data at the start, in the middle and at the end, and zeroes that are written out.
    let data = [(0, 64 * KIB), (100 * MIB, 3 * MIB), (len - 64 * KIB, 64 * KIB)];
    let source = scratch.holey("source", len, &data);
    scribble(&source, 200 * MIB, &vec![0; (4 * MIB) as usize]);
    let (data_bytes, zero_bytes) = (3 * MIB + 128 * KIB, 4 * MIB);
    let target = scratch.path("target");
    let events = run_json(&["mirror", "--stats", &source, &target]);
    tool("cmp", &[&source, &target]);
    assert!(allocated(&target) <= data_bytes + 64 * KIB, "{} bytes allocated", allocated(&target));
    // Holes are neither read nor written; zeroes are read and not written.
    let counters = stats(&events);
    let (read, written) =
        (counters["bytes-read"].as_u64().unwrap(), counters["bytes-written"].as_u64().unwrap());
    assert!(read >= data_bytes && read <= data_bytes + zero_bytes + 256 * KIB, "{read} bytes read");
    assert!(written >= data_bytes && written <= data_bytes + 64 * KIB, "{written} bytes written");
    let details = &event(&events, "end")["details"];
    assert_eq!(details["bytes-copied"].as_u64(), Some(data_bytes), "{details}");
    // On request zeroes are data; holes stay holes.
    let thick = scratch.path("thick");
    run_json(&["mirror", "--detect-zeroes", "off", &source, &thick]);
    assert!(
        allocated(&thick) >= data_bytes + zero_bytes && allocated(&thick) < 2 * (data_bytes + zero_bytes)
    );
}

#[test]
fn what_was_there_before_is_zeroed_where_the_source_is() {
    let scratch = Scratch::new();
    let len = 16 * MIB;
    let source = scratch.holey("source", len, &[(MIB, 5000), (len - 4096, 4096)]);
    let target = scratch.full("target", len);
    run_json(&["mirror", "--force", "-F", "raw", "--verify", &source, &target]);
    tool("cmp", &[&source, &target]);
    assert!(allocated(&target) <= MIB, "{} bytes allocated", allocated(&target));
}

#[test]
fn without_sync_only_new_writes_arrive() {
    let scratch = Scratch::new();
    let source = scratch.full("source", 8 * MIB);
    let target = scratch.path("target");
    let (uri, socket) = export(&scratch);
    let mut mirror = Process::json(&[
        "mirror",
        "-f",
        "raw",
        "--sync",
        "none",
        "--follow",
        "--granularity",
        "4KiB",
        "--export",
        &uri,
        &source,
        &target,
    ]);
    let ready = mirror.wait_event("BLOCK_JOB_READY");
    assert_eq!(ready["data"]["len"], 0, "nothing is due at first");
    let mut expected = vec![0; (8 * MIB) as usize];
    let mut client = Client::connect(&socket, "disk").unwrap();
    let mut bytes = vec![0; 8192];
    for offset in [0, 3 * MIB, 8 * MIB - 8192] {
        pattern(offset, 9, &mut bytes);
        client.write(offset, &bytes).unwrap();
        expected[offset as usize..][..8192].copy_from_slice(&bytes);
    }
    client.disconnect().unwrap();
    mirror.interrupt();
    let ended = mirror.end();
    assert_eq!(ended.code, Some(0), "{ended}");
    assert_eq!(difference(&content(&target), &expected), None);
    // And without anybody who writes, nothing at all is read or written.
    let idle = scratch.path("idle");
    let events = run_json(&["mirror", "--sync", "none", "--stats", &source, &idle]);
    let written = stats(&events)["bytes-written"].as_u64();
    assert!(written == Some(0) && common::image::is_all_hole(&idle), "{written:?}");
}

/// Nearly all reads and writes must go through registered buffers.
fn assert_fixed(events: &[serde_json::Value], transfers_min: u64) {
    let counters = stats(events);
    let of = |name: &str| counters[name].as_u64().unwrap();
    let (fixed, plain) = (of("transfers-fixed"), of("transfers-plain"));
    assert!(fixed + plain >= transfers_min, "{counters}");
    assert!(fixed * 100 >= (fixed + plain) * 99, "{counters}");
}

#[test]
fn reads_and_writes_are_fixed_operations() {
    let scratch = Scratch::new();
    let source = scratch.full("source", 32 * MIB);
    let target = scratch.path("target");
    assert_fixed(&run_json(&["mirror", "--stats", &source, &target]), 64);

    // The path of an export, alone.
    let (uri, socket) = export(&scratch);
    let mut server = Process::json(&["serve", "-f", "raw", "--stats", "--export", &uri, &source]);
    server.wait_event("listening");
    let writer = Writer::start(&Plan::anywhere(&socket, 32 * MIB, 1), false);
    writer.wait_more(500);
    writer.stop();
    server.interrupt();
    let ended = server.end();
    assert_eq!(ended.code, Some(0), "{ended}");
    assert_fixed(&ended.events(), 400);

    // Both at once.
    let live = scratch.path("live");
    let arguments = ["mirror", "-f", "raw", "--stats", "--follow", "--export", &uri, &source, &live];
    let mut mirror = Process::json(&arguments);
    mirror.wait_event("listening");
    let writer = Writer::start(&Plan::anywhere(&socket, 32 * MIB, 2), false);
    writer.wait_more(500);
    writer.stop();
    mirror.wait_event("BLOCK_JOB_READY");
    mirror.interrupt();
    let ended = mirror.end();
    assert_eq!(ended.code, Some(0), "{ended}");
    assert_fixed(&ended.events(), 500);
    assert_equal(&source, &live);
}

#[test]
fn a_source_that_changes_behind_the_job_is_found_by_verify() {
    let scratch = Scratch::new();
    let source = scratch.full("source", 8 * MIB);
    let target = scratch.path("target");
    let mut mirror = Process::json(&["mirror", "--verify", "--speed", "4MiB", &source, &target]);
    mirror.wait_for(|event| event["event"] == "progress" && event["offset"].as_u64() >= Some(3 * MIB));
    // This part has been copied already, and nobody told the job.
    scribble(&source, MIB + 100, b"somebody else was here");
    let ended = mirror.end();
    assert_eq!(ended.code, Some(4), "{ended}");
    let events = ended.events();
    let end = event(&events, "end");
    assert_eq!((&end["ending"], &end["verify"]["mismatch"]), (&"failed".into(), &(MIB + 100).into()));
    assert!(is_marked(&target));
}

#[test]
fn verify_says_what_it_compared() {
    let scratch = Scratch::new();
    let source = scratch.holey("source", 5 * MIB + 77, &[(0, 100_000), (3 * MIB, 2 * MIB)]);
    let (a, b) = (scratch.path("a"), scratch.path("b"));
    let checksum = |target: &str| {
        let events = run_json(&["mirror", "--verify", &source, target]);
        let verify = event(&events, "end")["verify"].clone();
        assert_eq!(verify["bytes-compared"].as_u64(), Some(5 * MIB + 77), "{verify}");
        assert_eq!(verify["mismatch"], serde_json::Value::Null);
        verify["checksum"].as_str().unwrap().to_owned()
    };
    let first = checksum(&a);
    assert_eq!(first.len(), 64);
    assert_eq!(first, checksum(&b));
    scribble(&source, 0, b"x");
    assert_ne!(first, checksum(&scratch.path("c")));
}

#[test]
fn a_guest_may_write_only_to_a_disk_whose_format_is_said() {
    let scratch = Scratch::new();
    let source = scratch.full("source", MIB);
    let target = scratch.path("target");
    let (uri, socket) = export(&scratch);
    let rule = ["a format is never guessed for an image that will be written", "-f raw"];
    refused(&["mirror", "--export", &uri, &source, &target], &rule);
    refused(&["serve", "--export", &uri, &source], &rule);
    assert!(!std::fs::exists(&target).unwrap() && !socket.exists());
    // Reading is fine.
    let mut server = Process::json(&["serve", "--read-only", "--export", &uri, &source]);
    server.wait_event("listening");
    let mut client = Client::connect(&socket, "disk").unwrap();
    let mut bytes = vec![0; 4096];
    client.read(0, &mut bytes).unwrap();
    assert!(bytes == content(&source)[..4096]);
    assert!(client.write(0, &bytes).is_err());
    drop(client);
    server.interrupt();
    assert_eq!(server.end().code, Some(0));
    // A header of another format is never taken for raw bytes unless that is said.
    let vmdk = scratch.path("vmdk");
    tool("qemu-img", &["create", "-f", "vmdk", &vmdk, "1M"]);
    refused(&["mirror", &vmdk, &target], &["vmdk"]);
    run_json(&["mirror", "-f", "raw", &vmdk, &target]);
    assert_equal(&vmdk, &target);
}

#[test]
fn port_0_takes_a_free_one_and_clients_have_the_limits_that_were_said() {
    let scratch = Scratch::new();
    let source = scratch.full("source", MIB);
    let mut server = Process::json(&[
        "serve",
        "-f",
        "raw",
        "--export",
        "nbd://127.0.0.1:0/disk",
        "--export",
        "nbd://127.0.0.1:0/again",
        "--max-connections",
        "2",
        "--handshake-timeout",
        "300ms",
        "--client-requests",
        "4",
        "--client-bytes",
        "1MiB",
        "--client-iops",
        "1000000",
        "--client-speed",
        "1GiB",
        &source,
    ]);
    let uris = [server.wait_event("listening"), server.wait_event("listening")]
        .map(|event| event["uri"].as_str().unwrap().to_owned());
    let address = uris[0].strip_prefix("nbd://").and_then(|rest| rest.strip_suffix("/disk")).unwrap();
    assert!(!address.ends_with(":0") && uris[1] == format!("nbd://{address}/again"), "{uris:?}");
    // Two who say nothing take all the room there is, until they are shown the door.
    let silent = [(); 2].map(|()| std::net::TcpStream::connect(address).unwrap());
    for uri in &uris {
        tool("qemu-io", &["-f", "raw", "-c", "write -P 3 0 64k", "-c", "read -P 3 0 64k", uri]);
    }
    for mut stream in silent {
        let mut rest = Vec::new();
        let _ = std::io::Read::read_to_end(&mut stream, &mut rest);
    }
    server.interrupt();
    assert_eq!(server.end().code, Some(0));
    for wrong in [["--max-connections", "0"], ["--client-requests", "0"], ["--handshake-timeout", "soon"]] {
        let ended = run(&["serve", "-r", "--export", &uris[0], wrong[0], wrong[1], &source]);
        assert_eq!(ended.code, Some(2), "{wrong:?}: {ended}");
    }
}

#[test]
fn clients_go_on_after_the_job_unless_told_otherwise() {
    let scratch = Scratch::new();
    let source = scratch.full("source", 4 * MIB);
    let (uri, socket) = export(&scratch);
    for exit_on_done in [false, true] {
        let target = scratch.path(&format!("target{exit_on_done}"));
        let mut arguments =
            vec!["mirror", "-f", "raw", "--speed", "8MiB", "--pivot", "--export", &uri, &source, &target];
        // Clients of an earlier round have left it.
        arguments.push("--allow-superseded");
        if exit_on_done {
            arguments.push("--exit-on-done");
        } else {
            arguments.push("--no-persistent");
        }
        let mut mirror = Process::json(&arguments);
        mirror.wait_event("listening");
        let mut client = Client::connect(&socket, "disk").unwrap();
        let end = mirror.wait_event("end");
        assert_eq!((&end["ending"], &end["pivot"]), (&"completed".into(), &true.into()));
        assert!(!is_marked(&target));
        if exit_on_done {
            assert_eq!(mirror.end().code, Some(0));
            continue;
        }
        // The client is on the target now, and the source stays as it was.
        let (before, mut bytes) = (content(&source), vec![0; 4096]);
        client.write(MIB, &[0x5a; 4096]).unwrap();
        client.read(MIB, &mut bytes).unwrap();
        assert_eq!(bytes, [0x5a; 4096]);
        client.flush().unwrap();
        assert!(content(&source) == before);
        assert_eq!(content(&target)[MIB as usize..][..4096], [0x5a; 4096]);
        client.disconnect().unwrap();
        assert_eq!(mirror.end().code, Some(0));
    }
}

#[test]
fn loop_devices_are_sources_and_targets() {
    if !common::is_root() {
        println!("left out: loop devices need root");
        return;
    }
    let scratch = Scratch::new();
    let len = 16 * MIB;
    let source = scratch.holey("source", len, &[(0, 70_000), (3 * MIB, 2 * MIB), (len - 4096, 4096)]);
    // A used target: what is a hole in the source must become zero on it.
    let (small, large) = (scratch.full("small", len), scratch.full("large", len));
    let state = scratch.path("state");
    std::fs::create_dir(&state).unwrap();
    for (sector, file) in [(512, &small), (4096, &large)] {
        let (from, to) = (LoopDevice::new(&source, sector), LoopDevice::new(file, sector));
        let arguments = ["mirror", "--force", "-F", "raw", "--verify", "--state-dir", &state, &from.0, &to.0];
        let events = run_json(&arguments);
        assert_eq!(event(&events, "end")["ending"], "completed");
        assert!(info(&to.0)["driver"].as_str() == Some("host_device"), "{}", info(&to.0));
        // From device to file, too.
        let back = scratch.path(&format!("back{sector}"));
        run_json(&["mirror", &to.0, &back]);
        drop((from, to));
        assert_equal(&source, file);
        assert_equal(&source, &back);
        assert!(allocated(&back) < 4 * MIB, "zeroes on a device become holes in a file");
    }
}

#[test]
fn an_unfinished_copy_to_a_device_is_noted() {
    if !common::is_root() {
        println!("left out: loop devices need root");
        return;
    }
    let scratch = Scratch::new();
    let source = scratch.full("source", 8 * MIB);
    let file = scratch.full("file", 8 * MIB);
    let state = scratch.path("state");
    std::fs::create_dir(&state).unwrap();
    let device = LoopDevice::new(&file, 512);
    let arguments = ["mirror", "--force", "-F", "raw", "--state-dir", &state, &source, &device.0];
    let mut mirror = Process::json(&[&arguments[..], &["--speed", "1MiB"]].concat());
    mirror.wait_event("progress");
    mirror.interrupt();
    assert_eq!(mirror.end().code, Some(3));
    let look = || run_json(&["info", "--state-dir", &state, &device.0]).remove(0)["state"].clone();
    assert_eq!(look(), "incomplete");
    run_json(&arguments);
    assert_eq!(look(), "unmarked");
    assert_equal(&source, &file);
}
