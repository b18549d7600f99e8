//! New qcow2 images in what is there and has a length of its own: block devices and disks of NBD servers.

use serde_json::Value;

use super::nbd_peers::Peer;
use super::{our_json, ours, qemu_json};
use common::image::{KIB, MIB, Scratch, content, difference};
use common::{LoopDevice, is_root, run, tool};

/// An old image: another size, another version, a snapshot, data everywhere.
fn old_image(place: &str) {
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "compat=0.10", place, "64M"]);
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 0x53 1M 9M", place]);
    tool("qemu-img", &["snapshot", "-c", "old", place]);
}

/// What is there is a new image like the source, with the options that were given, and nothing of an old one.
#[track_caller]
fn is_new(scratch: &Scratch, place: &str, source: &str) {
    let info = qemu_json(&["info", "-f", "qcow2", "--output=json", place]);
    let len = content(source).len() as u64;
    assert_eq!((&info["virtual-size"], &info["cluster-size"]), (&len.into(), &4096.into()), "{info:#}");
    assert!(info["snapshots"].as_array().is_none_or(Vec::is_empty), "{info:#}");
    assert_eq!(info["format-specific"]["data"]["compat"], "1.1");
    let raw = scratch.path("copied-back");
    tool("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", place, &raw]);
    assert_eq!(difference(&content(source), &content(&raw)), None, "{place}");
    tool("qemu-img", &["check", "-q", "-f", "qcow2", place]);
}

fn make(command: &str, source: &str, place: &str, state: &str) {
    let options = ["-o", "cluster_size=4k", "--force"];
    let len = content(source).len().to_string();
    match command {
        "create" => drop(ours(&[&["create", "-q", "-f", "qcow2"], &options[..], &[place, &len]].concat())),
        "convert" => drop(ours(
            &[
                &["convert", "-q", "-f", "raw", "-O", "qcow2", "--state-dir", state],
                &options[..],
                &[source, place],
            ]
            .concat(),
        )),
        _ => drop(ours(
            &[
                &["mirror", "-q", "-f", "raw", "-F", "qcow2", "--verify", "--state-dir", state],
                &options[..],
                &[source, place],
            ]
            .concat(),
        )),
    }
}

#[test]
fn a_block_device_gets_a_new_image_whatever_is_on_it() {
    if !is_root() {
        return;
    }
    for sector in [512, 4096] {
        let scratch = Scratch::new();
        let source = scratch.holey("source", 3 * MIB, &[(0, 700 * KIB), (2 * MIB, 64 * KIB)]);
        let empty = scratch.holey("empty", 3 * MIB, &[]);
        let under = scratch.holey("under", 20 * MIB, &[]);
        let device = LoopDevice::new(&under, sector);
        for command in ["create", "convert", "mirror"] {
            old_image(&device.0);
            make(command, &source, &device.0, &scratch.path("state"));
            is_new(&scratch, &device.0, if command == "create" { &empty } else { &source });
        }
        // What is written there as it is keeps its options.
        ours(&[
            "mirror",
            "-q",
            "-f",
            "raw",
            "-F",
            "qcow2",
            "--force",
            "-n",
            "--state-dir",
            &scratch.path("state"),
            &source,
            &device.0,
        ]);
        is_new(&scratch, &device.0, &source);
    }
}

#[test]
fn a_device_as_large_as_is_measured_is_enough_and_a_smaller_one_is_left_alone() {
    if !is_root() {
        return;
    }
    for options in ["cluster_size=64k", "cluster_size=512", "cluster_size=4k,refcount_bits=64"] {
        let scratch = Scratch::new();
        let source = scratch.full("source", 9 * MIB);
        let measured =
            our_json(&["measure", "--output=json", "-O", "qcow2", "-o", options, "-f", "raw", &source]);
        let required = measured["required"].as_u64().expect("bytes");
        let under = scratch.holey("under", required.next_multiple_of(512), &[]);
        let device = LoopDevice::new(&under, 512);
        let state = scratch.path("state");
        let arguments =
            ["convert", "-q", "-f", "raw", "-O", "qcow2", "--force", "--state-dir", &state, "-o", options];
        ours(&[&arguments[..], &[&source, &device.0]].concat());
        tool("qemu-img", &["compare", "-q", "-f", "raw", "-F", "qcow2", &source, &device.0]);
        tool("qemu-img", &["check", "-q", "-f", "qcow2", &device.0]);
        drop(device);
        let small = scratch.full("small", 1536);
        let device = LoopDevice::new(&small, 512);
        let before = content(&small);
        let refused = run(&[&arguments[..], &[&source, &device.0]].concat());
        assert!(refused.code == Some(1) && refused.err.contains("too small"), "{refused}");
        assert!(content(&small) == before);
    }
}

#[test]
fn a_device_that_nobody_may_write_is_refused() {
    if !is_root() {
        return;
    }
    let scratch = Scratch::new();
    let under = scratch.full("under", 4 * MIB);
    let name = tool("losetup", &["--find", "--show", "--read-only", &under]);
    let device = LoopDevice(name.trim().to_owned());
    let refused = run(&["create", "-f", "qcow2", "--force", &device.0, "1M"]);
    assert!(refused.code == Some(1) && refused.err.contains(&device.0), "{refused}");
    assert!(refused.err.contains("read-only") || refused.err.contains("may not"), "{refused}");
}

#[test]
fn a_servers_disk_gets_a_new_image() {
    let scratch = Scratch::new();
    let source = scratch.holey("source", 3 * MIB, &[(0, 700 * KIB), (2 * MIB, 64 * KIB)]);
    let empty = scratch.holey("empty", 3 * MIB, &[]);
    let under = scratch.full("under", 20 * MIB);
    type Server = Box<dyn Fn() -> Peer>;
    let (image, plain) = (under.clone(), under.clone());
    let servers: [Server; 3] = [
        Box::new(|| Peer::nbdkit(&["memory", "20M"])),
        Box::new(move || Peer::qemu_nbd(image.as_ref(), &[])),
        // A server that can neither zero nor trim, over what is full.
        Box::new(move || Peer::nbdkit(&["--filter=nozero", "split", &plain])),
    ];
    for server in &servers {
        let server = server();
        for command in ["create", "convert", "mirror"] {
            if command != "create" {
                old_image(&server.uri());
            }
            make(command, &source, &server.uri(), &scratch.path("state"));
            is_new(&scratch, &server.uri(), if command == "create" { &empty } else { &source });
        }
        let left_alone = run(&["create", "-f", "qcow2", &server.uri(), "1M"]);
        assert!(left_alone.code == Some(1) && left_alone.err.contains("--force"), "{left_alone}");
        let small = run(&["create", "-f", "raw", "--force", &server.uri(), "100M"]);
        assert!(small.code == Some(1) && small.err.contains("longer"), "{small}");
    }
}

#[test]
fn a_server_with_large_blocks_holds_an_image() {
    let scratch = Scratch::new();
    let source = scratch.full("source", 4 * MIB);
    let server = Peer::nbdkit(&[
        "--filter=blocksize-policy",
        "memory",
        "8M",
        "blocksize-minimum=65536",
        "blocksize-preferred=65536",
        "blocksize-maximum=32M",
    ]);
    make("convert", &source, &server.uri(), &scratch.path("state"));
    is_new(&scratch, &server.uri(), &source);
    let info: Value = our_json(&["info", "--output=json", "-f", "qcow2", &server.uri()]);
    assert_eq!(info["virtual-size"], 4 * MIB);
}
