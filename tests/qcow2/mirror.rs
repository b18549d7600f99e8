//! Mirrors of images with layers: targets that are made in a format, copies of the uppermost layer only.

use common::image::{MIB, Scratch, allocated, content};
use common::nbd::Client;
use common::writer::{Plan, Writer};
use common::{Process, event, is_marked, run, run_json, tool};

/// An overlay with some data of its own, over a base that is full; and its sparse places.
fn chain(scratch: &Scratch) -> (String, String) {
    let base = scratch.path("base.qcow2");
    let full = scratch.full("full.img", 24 * MIB);
    tool("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &full, &base]);
    let top = scratch.path("top.qcow2");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", &top]);
    for command in
        ["write -P 0x11 1M 300k", "write -P 0x22 9M 64k", "write -z 12M 1M", "write -P 0x33 23M 4k"]
    {
        tool("qemu-io", &["-f", "qcow2", "-c", command, &top]);
    }
    (base, top)
}

fn compare(a: &str, b: &str, format: &str) {
    tool("qemu-img", &["compare", "-f", "qcow2", "-F", format, a, b]);
}

#[test]
fn only_the_uppermost_layer_is_copied_to_an_overlay_of_the_same_backing_file() {
    let scratch = Scratch::new();
    let (base, top) = chain(&scratch);
    let copy = scratch.path("copy.qcow2");
    let lines = run_json(&["mirror", "-f", "qcow2", &top, "-F", "qcow2", &copy, "--sync", "top"]);
    let details = &event(&lines, "end")["details"];
    let copied = details["bytes-copied"].as_u64().unwrap();
    assert!((364 * 1024..MIB).contains(&copied), "{details}");
    compare(&top, &copy, "qcow2");
    tool("qemu-img", &["check", "-f", "qcow2", &copy]);
    assert!(allocated(&copy) < 2 * MIB, "what lies below is not copied");
    let info = run_json(&["info", "-f", "qcow2", &copy]).pop().unwrap();
    assert_eq!(info["full-backing-filename"].as_str(), Some(base.as_str()), "{info:#}");
    assert!(!is_marked(&copy));
    // Everything, to an image without layers.
    let whole = scratch.path("whole.qcow2");
    run_json(&[
        "mirror",
        "-f",
        "qcow2",
        &top,
        "-F",
        "qcow2",
        "-o",
        "cluster_size=2M,compat=1.1",
        &whole,
        "--verify",
    ]);
    compare(&top, &whole, "qcow2");
    tool("qemu-img", &["check", "-f", "qcow2", &whole]);
    let raw = scratch.path("raw.img");
    run_json(&["mirror", "-f", "qcow2", &top, "-F", "raw", &raw, "--verify"]);
    compare(&top, &raw, "raw");
}

/// A new file is what it will be taken for: the source's format, unless its name says that it is another one.
#[test]
fn a_new_target_has_the_format_of_its_source_and_a_name_that_agrees() {
    let scratch = Scratch::new();
    let (_, top) = chain(&scratch);
    let raw = scratch.full("full.raw", MIB);
    let format = |name: &str| run_json(&["info", name]).pop().unwrap()["format"].as_str().unwrap().to_owned();
    for (source, target, is) in
        [(&top, "a.qcow2", "qcow2"), (&top, "a.img", "qcow2"), (&raw, "b.raw", "raw"), (&raw, "b.img", "raw")]
    {
        let target = scratch.path(target);
        run_json(&["mirror", source, &target]);
        assert_eq!(format(&target), is, "{source} to {target}");
        compare_as(source, &target, is);
    }
    for (source, target, cures) in [
        (&top, "c.raw", ["-F raw", "-F qcow2"]),
        (&raw, "c.qcow2", ["-F qcow2", "-F raw"]),
        (&raw, "c.VMDK", ["name it otherwise", "-F raw"]),
    ] {
        let target = scratch.path(target);
        for more in [&[][..], &["--dry-run"]] {
            let ended = run(&[&["mirror", source, &target], more].concat());
            assert_eq!(ended.code, Some(1), "{ended}");
            assert!(cures.iter().all(|cure| ended.err.contains(cure)), "{ended}");
            assert!(!std::path::Path::new(&target).exists());
        }
        // Whoever says it means it.
        run_json(&["mirror", source, "-F", "raw", &target]);
        assert_eq!(content(&target).len() as u64, std::fs::metadata(&target).unwrap().len());
        assert_ne!(&content(&target)[..4], b"QFI\xfb");
    }
    // Of what is there nothing is guessed, whatever its name is; all that has to be said is said at once.
    let there = scratch.path("a.qcow2");
    let before = content(&there);
    for more in [&[][..], &["--force"]] {
        let ended = run(&[&["mirror", &top, &there], more].concat());
        assert!(ended.code == Some(1) && ended.err.contains("-F qcow2"), "{ended}");
        assert!(!more.is_empty() || ended.err.contains("--force"), "{ended}");
    }
    assert!(content(&there) == before);
}

fn compare_as(source: &str, target: &str, format: &str) {
    tool("qemu-img", &["compare", "-f", format, "-F", format, source, target]);
}

#[test]
fn options_that_the_format_does_not_have_are_refused_and_nothing_is_made() {
    let scratch = Scratch::new();
    let source = scratch.full("source.img", MIB);
    let target = scratch.path("target.img");
    for options in [&["-o", "cluster_size=64k"][..], &["-F", "qcow2", "-o", "no_such=1"], &["-o", "x"]] {
        let ended = run(&[&["mirror", &source, &target], options].concat());
        assert_eq!(ended.code, Some(2), "{ended}");
        assert!(!std::path::Path::new(&target).exists());
    }
}

/// Clients write blocks of 4 KiB to an overlay that is copied in pieces of 4 KiB to one with clusters of 2 MiB, over the
/// same backing file; then they go on, on that one.
#[test]
fn an_overlay_moves_under_its_clients_to_one_with_larger_clusters() {
    let scratch = Scratch::new();
    let (base, top) = chain(&scratch);
    let (model, copy) = (scratch.path("model"), scratch.path("copy.qcow2"));
    tool("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", &top, &model]);
    let base_before = content(&base);
    let socket = std::path::PathBuf::from(scratch.path("socket"));
    let uri = format!("nbd+unix:///disk?socket={}", socket.display());
    let line = [
        "mirror",
        "-f",
        "qcow2",
        "--sync",
        "top",
        "--granularity",
        "4KiB",
        "--speed",
        "4MiB",
        "--pivot",
        "--no-persistent",
    ];
    let target = ["--export", &uri, &top, "-F", "qcow2", "-o", "cluster_size=2M", &copy];
    let mut mirror = Process::json(&[&line[..], &target].concat());
    mirror.wait_event("listening");
    let writer = Writer::start(&Plan::anywhere(&socket, 24 * MIB, 3), false);
    let end = mirror.wait_event("end");
    assert_eq!((&end["ending"], &end["pivot"]), (&"completed".into(), &true.into()));
    writer.wait_more(300);
    let history = writer.stop();
    let ended = mirror.end();
    assert_eq!(ended.code, Some(0), "{ended}");
    history.apply_to_file(&model);
    compare(&copy, &model, "raw");
    for image in [&top, &copy] {
        tool("qemu-img", &["check", "-q", "-f", "qcow2", image]);
    }
    let info = run_json(&["info", "-f", "qcow2", &copy]).pop().unwrap();
    assert_eq!(info["full-backing-filename"].as_str(), Some(base.as_str()), "{info:#}");
    assert_eq!(info["cluster-size"].as_u64(), Some(2 * MIB), "{info:#}");
    assert!(content(&base) == base_before, "the backing file is only read");
}

/// A client writes, never flushes, and goes; then the disk moves. The old image is the way back.
#[test]
fn the_disk_that_is_left_behind_holds_what_was_written_and_is_closed_cleanly() {
    let scratch = Scratch::new();
    let (_, top) = chain(&scratch);
    let copy = scratch.path("copy.qcow2");
    let socket = std::path::PathBuf::from(scratch.path("socket"));
    let uri = format!("nbd+unix:///disk?socket={}", socket.display());
    let line = ["mirror", "-f", "qcow2", "-F", "qcow2", "--speed", "8MiB", "--pivot", "--export", &uri];
    let mut mirror = Process::json(&[&line[..], &[&top, &copy]].concat());
    mirror.wait_event("listening");
    let mut client = Client::connect(&socket, "disk").expect("a connection");
    for i in 0..300 {
        let offset = (i * 1_234_567) % (23 * MIB);
        match i % 5 {
            0 => client.write_zeroes(offset / 65536 * 65536, 65536).expect("zeroes"),
            _ => client.write(offset, &[i as u8 + 1; 5000]).expect("a write"),
        }
    }
    client.disconnect().expect("a farewell");
    assert_eq!(mirror.wait_event("end")["pivot"], true);
    mirror.interrupt();
    let ended = mirror.end();
    assert_eq!(ended.code, Some(0), "{ended}");
    compare(&top, &copy, "qcow2");
    tool("qemu-img", &["check", "-q", "-f", "qcow2", &top]);
}

/// The load generator on images of this format: everything it read was what it had written, and QEMU finds the same.
#[test]
fn a_load_on_an_image_is_verified() {
    let scratch = Scratch::new();
    let (_, overlay) = chain(&scratch);
    let plain = scratch.path("plain.qcow2");
    let options = "cluster_size=16k,extended_l2=on,refcount_bits=64";
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, &plain, "32M"]);
    for (number, image) in [&overlay, &plain].into_iter().enumerate() {
        let log = scratch.path(&format!("log{number}"));
        let load = [
            "bench",
            "--overwrite",
            "-f",
            "qcow2",
            "-n",
            "4000",
            "-d",
            "16",
            "-p",
            "40",
            "--verify",
            "--flush-every",
            "300",
        ];
        let lines = run_json(&[&load[..], &["--log", &log, image]].concat());
        let verify = &event(&lines, "report")["report"]["verify"];
        assert!(verify["reads-verified"].as_u64() > Some(100), "{verify:#}");
        assert!(verify["at-end"]["verified"].as_u64() > Some(1000), "{verify:#}");
        tool("qemu-img", &["check", "-q", "-f", "qcow2", image]);
        run_json(&["bench", "-f", "qcow2", "--check-log", &log, image]);
        let raw = scratch.path(&format!("raw{number}"));
        tool("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", image, &raw]);
        run_json(&["bench", "--check-log", &log, &raw]);
    }
}
