//! A chain of five qcow2 layers that qemu-img has made over a real ext4 filesystem: served to clients that write and
//! know what they wrote, converted, rebased, mirrored and compared. `e2fsck`, `qemu-img check` and `qemu-img compare`
//! find nothing.
//!
//! Between the layers the kernel's own ext4 has written and removed files. The layers differ in cluster size, in
//! subclusters and in compression, as they do where images come from different hands.

use common::nbd_peers;

use std::path::{Path, PathBuf};

use common::filesystem::{Mounted, blocks_of};
use common::image::{Dice, MIB, Scratch, content, pattern};
use common::nbd::Client;
use common::writer::{Plan, Writer};
use common::{Process, is_marked, run_json, tool};
use nbd_peers::Peer;

const IMAGE_BYTES: u64 = 96 * MIB;
const LARGE_BYTES: u64 = 8 * MIB;
/// What is compared between two states of the disk, and written to a layer if it differs.
const STEP_BYTES: usize = 4096;
/// Options of each layer above the lowest.
const LAYERS: [&str; 4] =
    ["cluster_size=65536", "cluster_size=65536,extended_l2=on", "cluster_size=4096", "cluster_size=2M"];

/// Writes files, and removes some that are there.
fn busy_hour(root: &Path, hour: u64) {
    let mut dice = Dice::new(hour + 1);
    for i in 0..120 {
        let folder = root.join(format!("folder{}", i % 7));
        std::fs::create_dir_all(&folder).unwrap();
        let mut bytes = vec![0; dice.below(60_000) as usize];
        pattern(i, hour, &mut bytes);
        std::fs::write(folder.join(format!("file{hour}-{i}")), bytes).unwrap();
        if hour > 0 && i % 3 == 0 {
            // It may have been removed before.
            let _ = std::fs::remove_file(folder.join(format!("file{}-{i}", hour - 1)));
        }
    }
}

struct Chain {
    scratch: Scratch,
    top: String,
    /// What the disk holds, as a raw image.
    model: String,
}

impl Chain {
    fn new() -> Chain {
        let scratch = Scratch::new();
        let model = scratch.path("model");
        let tree = scratch.dir().join("tree");
        busy_hour(&tree, 0);
        let mut bytes = vec![0; LARGE_BYTES as usize];
        pattern(0, 99, &mut bytes);
        std::fs::write(tree.join("large"), bytes).unwrap();
        let size = format!("{}M", IMAGE_BYTES / MIB);
        tool("mke2fs", &["-q", "-t", "ext4", "-b", "4096", "-d", tree.to_str().unwrap(), &model, &size]);
        std::fs::remove_dir_all(&tree).unwrap();
        let lowest = scratch.path("layer0");
        tool("qemu-img", &["convert", "-c", "-f", "raw", "-O", "qcow2", &model, &lowest]);
        let at = scratch.path("at");
        std::fs::create_dir(&at).unwrap();
        for (number, options) in LAYERS.iter().enumerate() {
            let (below, path) = (format!("layer{number}"), scratch.path(&format!("layer{}", number + 1)));
            let before = content(&model);
            {
                let mounted = Mounted::of(&model, &at);
                busy_hour(Path::new(&mounted.path("")), number as u64 + 1);
            }
            tool(
                "qemu-img",
                &["create", "-q", "-f", "qcow2", "-o", options, "-b", &below, "-F", "qcow2", &path],
            );
            write_differences(&path, &before, &content(&model));
        }
        let chain = Chain { top: scratch.path("layer4"), model, scratch };
        (0..=LAYERS.len()).for_each(|i| check(&chain.scratch.path(&format!("layer{i}"))));
        chain.assert_model(&chain.top);
        chain
    }

    fn path(&self, name: &str) -> String {
        self.scratch.path(name)
    }

    /// The image is whole and is the model, byte for byte; so is the filesystem in it.
    fn assert_model(&self, image: &str) {
        check(image);
        tool("qemu-img", &["compare", "-f", "qcow2", "-F", "raw", image, &self.model]);
        e2fsck(&self.model);
        assert!(!is_marked(image));
    }

    /// Clients that write to the blocks of a large file only, so that the filesystem stays whole.
    fn writer(&self, socket: &Path, seed: u64) -> Writer {
        let blocks = blocks_of(&self.model, "/large");
        assert_eq!(blocks.len() as u64 * 4096, LARGE_BYTES);
        let plan = Plan { socket: socket.to_owned(), export: "disk".into(), blocks, lanes: 4, seed };
        Writer::start(&plan, false)
    }

    fn export(&self, name: &str) -> (PathBuf, String) {
        let socket = PathBuf::from(self.path(name));
        let uri = format!("nbd+unix:///disk?socket={}", socket.display());
        (socket, uri)
    }

    /// Four clients know what they wrote; when they have gone it is all in the uppermost layer.
    fn serve(&self) {
        let (socket, uri) = self.export("served");
        let mut server = Process::json(&["serve", "-f", "qcow2", "--export", &uri, &self.top]);
        server.wait_event("listening");
        let writer = self.writer(&socket, 1);
        writer.wait_more(1500);
        let history = writer.stop();
        server.interrupt();
        let ended = server.end();
        assert_eq!(ended.code, Some(0), "{ended}");
        history.apply_to_file(&self.model);
        self.assert_model(&self.top);
        println!("served: {} acknowledged writes", history.acked());
    }

    fn convert(&self) {
        for (name, options) in [
            ("flat", &[][..]),
            ("small", &["-c"]),
            ("wide", &["-o", "cluster_size=2M,extended_l2=on"]),
            ("on-layer3", &["-B", "layer3", "-F", "qcow2"]),
        ] {
            let target = self.path(name);
            let line =
                [&["convert", "-f", "qcow2", "-O", "qcow2", "--verify"], options, &[&self.top, &target]];
            run_json(&line.concat());
            self.assert_model(&target);
            run_json(&["compare", "-f", "qcow2", "-F", "raw", &target, &self.model]);
        }
        let raw = self.path("raw");
        run_json(&["convert", "-f", "qcow2", "-O", "raw", "--verify", &self.top, &raw]);
        assert!(content(&raw) == content(&self.model));
        e2fsck(&raw);
    }

    fn rebase(&self) {
        let copy = self.path("rebased");
        tool("cp", &["--sparse=always", &self.top, &copy]);
        for below in ["layer1", "layer3", "layer0", ""] {
            let backing = if below.is_empty() { vec!["-b", ""] } else { vec!["-b", below, "-F", "qcow2"] };
            run_json(&[&["rebase", "-f", "qcow2"], &backing[..], &[&copy]].concat());
            self.assert_model(&copy);
            let info = run_json(&["info", "-f", "qcow2", &copy]).pop().unwrap();
            assert_eq!(info["backing-filename"].as_str().unwrap_or(""), below);
        }
    }

    /// At rest, in whole and only the uppermost layer; and under writing clients, who go on on the copy.
    fn mirror(&self) {
        for (name, sync) in [("mirrored", "full"), ("mirrored-top", "top")] {
            let target = self.path(name);
            run_json(&[
                "mirror", "-f", "qcow2", &self.top, "-F", "qcow2", &target, "--sync", sync, "--verify",
            ]);
            self.assert_model(&target);
        }
        let (socket, uri) = self.export("moved");
        let target = self.path("pivoted");
        let mut mirror = Process::json(&[
            "mirror",
            "-f",
            "qcow2",
            "--export",
            &uri,
            "--pivot",
            "--no-persistent",
            "--speed",
            "64MiB",
            &self.top,
            "-F",
            "qcow2",
            &target,
        ]);
        mirror.wait_event("listening");
        let writer = self.writer(&socket, 2);
        let end = mirror.wait_event("end");
        assert_eq!((&end["ending"], &end["pivot"]), (&"completed".into(), &true.into()));
        writer.wait_more(500);
        let history = writer.stop();
        let ended = mirror.end();
        assert_eq!(ended.code, Some(0), "{ended}");
        check(&self.top);
        history.apply_to_file(&self.model);
        self.assert_model(&target);
        println!("pivoted: {} acknowledged writes", history.acked());
    }
}

/// Writes what differs to an image, by QEMU.
fn write_differences(image: &str, before: &[u8], after: &[u8]) {
    let server = Peer::qemu_nbd(Path::new(image), &["--format=qcow2"]);
    let mut client = Client::connect(&server.socket(), "").expect("a connection");
    let mut written = 0;
    for (at, (old, new)) in before.chunks(STEP_BYTES).zip(after.chunks(STEP_BYTES)).enumerate() {
        if old != new {
            client.write((at * STEP_BYTES) as u64, new).expect("a write");
            written += 1;
        }
    }
    assert!(written > 100, "{written} differences");
    client.flush().expect("a flush");
    client.disconnect().expect("an end");
}

fn check(image: &str) {
    tool("qemu-img", &["check", "-q", "-f", "qcow2", image]);
    let report = run_json(&["check", "-f", "qcow2", image]).pop().unwrap();
    assert_eq!(report["check-errors"].as_u64(), Some(0), "{report:#}");
}

fn e2fsck(image: &str) {
    tool("e2fsck", &["-f", "-n", image]);
}

#[test]
fn five_layers_over_a_real_filesystem_are_served_converted_rebased_mirrored_and_compared() {
    let chain = Chain::new();
    chain.serve();
    chain.convert();
    chain.rebase();
    chain.mirror();
    run_json(&["compare", "-f", "qcow2", "-F", "raw", &chain.path("pivoted"), &chain.model]);
}
