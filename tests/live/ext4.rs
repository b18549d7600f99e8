//! A filesystem that is in use while it moves: thousands of files in ext4, four connections that write into
//! the blocks of one of them, and a mirror that ends in each way in which it can end well.
//!
//! The clients write only to blocks that belong to the data of one large file, as an application with that
//! file open would; so at any instant the filesystem is whole, and `e2fsck` finds nothing. Whether the bytes
//! are right is decided by QEMU: it compares the target with a model, which is a copy of the original image
//! with every acknowledged write applied to it.

use std::path::PathBuf;

use common::ext4::{IMAGE_BYTES, assert_whole, make};
use common::image::{Scratch, content, difference};
use common::writer::{Plan, Writer};
use common::{Process, assert_same, event, is_marked, tool};
use serde_json::Value;

/// Slowly enough that the clients write a lot before it is ready, in pieces as small as theirs, so that they
/// do not dirty more than it may copy.
const SLOWLY: [&str; 4] = ["--granularity", "4KiB", "--speed", "64MiB"];

/// A filesystem to move.
struct Lab {
    scratch: Scratch,
    original: String,
    blocks: Vec<u64>,
}

/// One move of it.
struct Move {
    source: String,
    target: String,
    model: String,
    socket: PathBuf,
    mirror: Process,
    writer: Writer,
}

impl Lab {
    fn new() -> Lab {
        let scratch = Scratch::new();
        let original = scratch.path("original");
        let blocks = make(&scratch, &original);
        Lab { scratch, original, blocks }
    }

    /// Starts a mirror with writing clients; they have written before, while and after it becomes ready.
    fn start(&self, name: &str, options: &[&str]) -> Move {
        let path = |what: &str| self.scratch.path(&format!("{name}-{what}"));
        let (source, target, model) = (path("source"), path("target"), path("model"));
        tool("cp", &["--sparse=always", &self.original, &source]);
        tool("cp", &["--sparse=always", &self.original, &model]);
        let socket = PathBuf::from(path("socket"));
        let uri = format!("nbd+unix:///disk?socket={}", socket.display());
        let arguments = ["mirror", "-f", "raw", "--export", &uri];
        let mut mirror = Process::json(&[&arguments[..], options, &[&source, &target]].concat());
        mirror.wait_event("listening");
        let plan = Plan {
            socket: socket.clone(),
            export: "disk".into(),
            blocks: self.blocks.clone(),
            lanes: 4,
            seed: 11,
        };
        let writer = Writer::start(&plan, false);
        Move { source, target, model, socket, mirror, writer }
    }

    fn done(&self, moved: [&str; 3]) {
        for path in moved {
            std::fs::remove_file(path).unwrap();
        }
    }

    /// Completes by SIGINT when the clients have stopped: the target is the source.
    fn follow_until_told(&self) {
        let Move { source, target, model, socket, mut mirror, writer } =
            self.start("follow", &[&["--follow"], &SLOWLY[..]].concat());
        let ready = mirror.wait_event("BLOCK_JOB_READY");
        assert_eq!(ready["data"]["len"], ready["data"]["offset"]);
        writer.wait_more(500);
        let history = writer.stop();
        mirror.interrupt();
        let ended = mirror.end();
        assert_eq!(ended.code, Some(0), "{ended}");
        assert_eq!(event(&ended.events(), "end")["ending"], "completed");
        history.apply_to_file(&model);
        assert_copy(&target, &model);
        assert_same(&source, &model);
        assert!(!socket.exists(), "the socket is left behind");
        println!("follow: {} acknowledged writes", history.acked());
        self.done([&source, &target, &model]);
    }

    /// Completes by pivot while the clients write; they notice nothing and go on, on the target.
    fn pivot_under_the_clients(&self) {
        let Move { source, target, model, mut mirror, writer, .. } =
            self.start("pivot", &[&["--pivot", "--no-persistent"], &SLOWLY[..]].concat());
        let end = mirror.wait_event("end");
        assert_eq!((&end["ending"], &end["pivot"]), (&"completed".into(), &true.into()));
        assert!(!is_marked(&target));
        let left = content(&source);
        writer.wait_more(500);
        let history = writer.stop();
        let ended = mirror.end();
        assert_eq!(ended.code, Some(0), "{ended}");
        // After the pivot nobody writes to the source; it is as it was at that instant, and whole.
        assert_eq!(difference(&content(&source), &left), None);
        assert_whole(&source);
        history.check_left(&content(&self.original), &left).unwrap();
        history.apply_to_file(&model);
        assert_copy(&target, &model);
        println!("pivot: {} acknowledged writes", history.acked());
        self.done([&source, &target, &model]);
    }

    /// Completes by SIGINT while the clients write on, on the source: the target is the source at one instant.
    fn an_instant_of_a_busy_disk(&self) {
        let Move { source, target, model, mut mirror, writer, .. } =
            self.start("instant", &["--follow", "--verify"]);
        mirror.wait_event("BLOCK_JOB_READY");
        writer.wait_more(500);
        mirror.interrupt();
        let end = mirror.wait_event("end");
        assert_eq!(end["ending"], "completed");
        let verify = &end["verify"];
        assert!(verify["bytes-compared"].as_u64() >= Some(IMAGE_BYTES), "{verify}");
        assert_eq!(verify["mismatch"], Value::Null);
        assert_eq!(verify["checksum"].as_str().map(str::len), Some(64), "{verify}");
        writer.wait_more(500);
        let history = writer.stop();
        let ended = mirror.end();
        assert_eq!(ended.code, Some(0), "{ended}");
        let (original, copy) = (content(&self.original), content(&target));
        history.check_left(&original, &copy).unwrap();
        assert!(history.check(&original, &copy).is_err(), "the target still follows after the end");
        assert!(!is_marked(&target));
        assert_whole(&target);
        history.apply_to_file(&model);
        assert_copy(&source, &model);
        println!("instant: {} acknowledged writes", history.acked());
        self.done([&source, &target, &model]);
    }
}

/// A filesystem that is whole, byte for byte the model, and not marked as unfinished.
fn assert_copy(image: &str, model: &str) {
    assert!(!is_marked(image));
    assert_whole(image);
    assert_same(image, model);
}

#[test]
fn a_filesystem_in_use_is_copied_whole_however_the_mirror_ends() {
    let lab = Lab::new();
    lab.follow_until_told();
    lab.pivot_under_the_clients();
    lab.an_instant_of_a_busy_disk();
}
