//! Disks of any number of bytes, and files that end where nobody expects it.

use super::nbd_peers::Peer;
use super::ours;
use common::image::{Scratch, content, difference, pattern};
use common::{Process, run, tool};

/// Bytes, and what can be compressed of them.
fn odd(scratch: &Scratch, name: &str, len: u64) -> String {
    let path = scratch.path(name);
    let mut bytes = vec![b'x'; len as usize];
    pattern(0, 0, &mut bytes[..len as usize / 3]);
    std::fs::write(&path, bytes).expect("a file");
    path
}

/// A qcow2 image holds exactly this, and zeroes up to the end of its last sector.
#[track_caller]
fn holds(scratch: &Scratch, image: &str, source: &str) {
    let raw = scratch.path("held");
    tool("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", image, &raw]);
    tool("qemu-img", &["check", "-q", "-f", "qcow2", image]);
    let (mut wanted, found) = (content(source), content(&raw));
    wanted.resize(wanted.len().next_multiple_of(512), 0);
    assert_eq!(difference(&wanted, &found), None, "{image}: {} bytes, {}", found.len(), wanted.len());
    for strict in [&["-q"][..], &["-s"]] {
        let told = ours(&[&["compare", "-f", "raw", "-F", "qcow2"], strict, &[source, image]].concat());
        assert!(!told.contains("Warning"), "{told}");
    }
}

#[test]
fn a_disk_of_any_number_of_bytes_is_copied_whole() {
    for len in [1, 1000, 4097, 100_000, 1_048_577] {
        let scratch = Scratch::new();
        let source = odd(&scratch, "source", len);
        let (plain, packed, mirrored) = (scratch.path("a"), scratch.path("b"), scratch.path("c"));
        ours(&["convert", "-q", "-f", "raw", "-O", "qcow2", "--verify", &source, &plain]);
        holds(&scratch, &plain, &source);
        ours(&["convert", "-q", "-c", "-f", "raw", "-O", "qcow2", "--verify", &source, &packed]);
        holds(&scratch, &packed, &source);
        ours(&["mirror", "-q", "-f", "raw", "-F", "qcow2", "--verify", &source, &mirrored]);
        holds(&scratch, &mirrored, &source);
        // Onto an image that is there: what it held behind the end does not show.
        let sectors = len.next_multiple_of(512).to_string();
        tool("qemu-io", &["-f", "qcow2", "-c", &format!("write -P 9 0 {sectors}"), &plain]);
        ours(&["mirror", "-q", "-f", "raw", "-F", "qcow2", "--force", &source, &plain]);
        holds(&scratch, &plain, &source);
        tool("qemu-io", &["-f", "qcow2", "-c", &format!("write -P 9 0 {sectors}"), &plain]);
        ours(&["convert", "-q", "-n", "-f", "raw", "-O", "qcow2", &source, &plain]);
        holds(&scratch, &plain, &source);
        // And to a server, and back.
        let server = Peer::nbdkit(&["memory", &len.to_string()]);
        ours(&["mirror", "-q", "-f", "raw", "-F", "raw", "--force", "--verify", &source, &server.uri()]);
        let back = scratch.path("back");
        ours(&["convert", "-q", "-f", "raw", "-O", "raw", &server.uri(), &back]);
        assert_eq!(difference(&content(&source), &content(&back)), None, "{len}");
    }
}

#[test]
fn an_overlay_of_a_disk_of_any_length_is_committed_and_streamed() {
    let scratch = Scratch::new();
    let base = odd(&scratch, "base", 4097);
    let mut wanted = content(&base);
    wanted.resize(4608, 0);
    wanted[512..1536].fill(5);
    let top = scratch.path("top");
    let overlay = |name: &str| {
        tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", name]);
        tool("qemu-io", &["-f", "qcow2", "-c", "write -P 5 512 1k", name]);
    };
    overlay(&top);
    ours(&["stream", "-q", "-f", "qcow2", &top]);
    let raw = scratch.path("raw");
    tool("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", &top, &raw]);
    assert_eq!(difference(&wanted, &content(&raw)), None);
    overlay(&top);
    ours(&["commit", "-q", "-f", "qcow2", &top]);
    assert_eq!(difference(&wanted[..4097], &content(&base)[..4097]), None);
}

/// What QEMU leaves with subclusters, and what a cut leaves: the file ends inside its last cluster. A client writes behind
/// that end, in pieces that are rewritten, too, and reads all of it.
#[test]
fn what_is_written_behind_the_end_of_a_file_is_read() {
    for (options, cut) in [
        ("extended_l2=on,cluster_size=128k", 0),
        ("cluster_size=64k", 40_000),
        ("cluster_size=64k,compat=0.10", 60_000),
        ("data_file=data", (4 << 20) - 8192),
    ] {
        let scratch = Scratch::new();
        let image = scratch.path("image");
        let folder = scratch.dir().display().to_string();
        let options = options.replace("data_file=", &format!("data_file={folder}/"));
        tool("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &options, &image, "4M"]);
        tool("qemu-io", &["-f", "qcow2", "-c", "write -P 7 0 4k", &image]);
        let file = if options.contains("data") { scratch.path("data") } else { image.clone() };
        let len = std::fs::metadata(&file).expect("a file").len();
        let opened = std::fs::OpenOptions::new().write(true).open(&file).expect("a file");
        opened.set_len(len - cut).expect("a cut");
        let socket = scratch.path("socket");
        let uri = format!("nbd+unix:///?socket={socket}");
        let mut served = Process::json(&["serve", "-f", "qcow2", &image, "--export", &uri]);
        served.wait_event("listening");
        let commands = [
            "write -P 1 40k 20k",
            "write -P 2 45k 512",
            "read -P 1 40k 5k",
            "read -P 2 45k 512",
            "read -P 1 46592 14848",
        ];
        let arguments: Vec<&str> = commands.iter().flat_map(|command| ["-c", *command]).collect();
        let told = tool("qemu-io", &[&["-f", "raw"][..], &arguments, &[&uri]].concat());
        assert!(!told.contains("failed"), "{options}: {told}");
        served.interrupt();
        served.end();
        let told = tool("qemu-io", &["-f", "qcow2", "-c", commands[2], "-c", commands[3], &image]);
        assert!(!told.contains("failed"), "{options}: {told}");
    }
}

/// A version that nobody knows yet is no guest's disk.
#[test]
fn qcow2_of_an_unknown_version_is_refused() {
    let scratch = Scratch::new();
    let (image, target) = (scratch.path("image"), scratch.path("target"));
    for version in [0, 4, 9] {
        tool("qemu-img", &["create", "-q", "-f", "qcow2", &image, "1M"]);
        common::image::scribble(&image, 4, &[0, 0, 0, version]);
        for arguments in
            [&["convert", "-O", "raw", &image, &target][..], &["info", &image], &["check", &image]]
        {
            let refused = run(arguments);
            assert!(refused.code != Some(0), "{arguments:?}: {refused}");
            assert!(refused.err.contains(&format!("Version {version}")), "{refused}");
        }
        assert!(!std::path::Path::new(&target).exists());
    }
}
