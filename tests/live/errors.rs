//! What real trouble does to jobs: a small filesystem that is full, and room that somebody makes; for a mirror, whose
//! target may be in write-blocking mode meanwhile, and for commits and streams, which write into a layer.

use std::io::BufRead;
use std::path::Path;
use std::process::{Command, Stdio};

use common::filesystem::Mounted;
use common::image::{MIB, Scratch, assert_equal, content, difference};
use common::writer::{Plan, Writer};
use common::{Process, assert_same, blockferry, event, is_marked, run, tool};
use serde_json::Value;

const IMAGE_BYTES: u64 = 24 * MIB;

/// A small ext4 filesystem that is almost full.
struct Small {
    filesystem: Mounted,
    ballast: String,
}

impl Small {
    /// With room for `free_bytes` besides a file that takes all the rest.
    fn new(scratch: &Scratch, free_bytes: u64) -> Small {
        let make = ["mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal"];
        let filesystem = Mounted::new(scratch.dir(), 80 * MIB, &make);
        let text = tool("df", &["--output=avail", "-B1", &filesystem.path("")]);
        let avail: u64 = text.lines().last().and_then(|line| line.trim().parse().ok()).expect("a number");
        let ballast = (avail - free_bytes).to_string();
        let small = Small { ballast: filesystem.path("ballast"), filesystem };
        tool("fallocate", &["-l", &ballast, &small.ballast]);
        small
    }

    fn make_room(&self) {
        std::fs::remove_file(&self.ballast).unwrap();
    }
}

fn is_stop(event: &Value) -> bool {
    event["event"] == "BLOCK_JOB_ERROR" && event["data"]["action"] == "stop"
}

fn is_status(event: &Value, status: &str) -> bool {
    event["event"] == "JOB_STATUS_CHANGE" && event["data"]["status"] == status
}

/// A full target stops the job once; with room it goes on with what failed, and completes.
fn full_then_room(options: &[&str], source: &str, small: &Small) -> (Vec<Value>, Vec<Value>) {
    let target = small.filesystem.path("target.img");
    let fixed = ["mirror", source, &target, "--on-target-error", "enospc", "--buf-size", "4MiB"];
    let mut job = Process::json(&[&fixed, options].concat());
    let mut before = Vec::new();
    loop {
        let event = job.event().expect("a job that is stopped by a full target");
        let paused = is_status(&event, "paused");
        before.push(event);
        if paused {
            break;
        }
    }
    let stopped = job.wait_for(|event| event["event"] == "progress" && event["io-status"] == "nospace");
    assert_eq!(stopped["status"], "paused");
    assert!(is_marked(&target), "an unfinished target says so");
    small.make_room();
    job.resume();
    let ended = job.end();
    assert_eq!(ended.code, Some(0), "{ended}");
    (before, ended.events())
}

#[test]
fn a_full_target_stops_the_job_and_room_lets_it_complete() {
    let scratch = Scratch::new();
    let source = scratch.full("source.img", IMAGE_BYTES);
    let small = Small::new(&scratch, 9 * MIB);
    let (before, after) = full_then_room(&[], &source, &small);
    assert!(before.iter().any(is_stop));
    // Several requests were in flight, and failed; the job was paused once.
    assert_eq!(before.iter().filter(|event| is_status(event, "paused")).count(), 1);
    assert!(after.iter().all(|event| !is_stop(event)), "it failed again with room: {after:#?}");
    let end = event(&after, "end");
    assert_eq!(end["ending"], "completed");
    // What had been copied was not copied again.
    let copied = end["details"]["bytes-copied"].as_u64().unwrap();
    assert!((IMAGE_BYTES..IMAGE_BYTES + 5 * MIB).contains(&copied), "{copied}");
    assert_same(&source, &small.filesystem.path("target.img"));
}

#[test]
fn report_ends_the_job_and_the_target_stays_marked() {
    let scratch = Scratch::new();
    let source = scratch.full("source.img", IMAGE_BYTES);
    let small = Small::new(&scratch, 9 * MIB);
    let target = small.filesystem.path("target.img");
    let ended = Process::json(&["mirror", &source, &target]).end();
    assert_eq!(ended.code, Some(1), "{ended}");
    let text = ended.to_string();
    assert!(text.contains("No space left") && text.contains("target.img"), "{text}");
    assert!(is_marked(&target));
}

/// Many requests are in flight and fail alike: a person hears of one, a paused job is one line that says what to do, and
/// programs get one object at the end.
#[test]
fn one_failure_is_one_sentence() {
    let scratch = Scratch::new();
    let source = scratch.full("source.img", IMAGE_BYTES);
    let small = Small::new(&scratch, 9 * MIB);
    let target = small.filesystem.path("target.img");
    let ended = run(&["mirror", &source, &target]);
    assert_eq!(ended.code, Some(1), "{ended}");
    assert_eq!(ended.err.matches("No space left").count(), 1, "{ended}");
    std::fs::remove_file(&target).unwrap();
    let mut job = Process::json(&["mirror", &source, &target, "--on-target-error", "enospc"]);
    let stopped = job.wait_for(|event| event["event"] == "progress" && event["io-status"] == "nospace");
    assert_eq!((&stopped["status"], &stopped["phase"]), (&"paused".into(), &"paused".into()));
    job.interrupt();
    let ended = job.end();
    assert_eq!(ended.code, Some(3), "{ended}");
    let ends = ended.events().iter().filter(|e| e["event"] == "end" || e["event"] == "error").count();
    assert_eq!(ends, 1, "{ended}");
    // The same for a person.
    let mut command = blockferry(&["mirror", &source, &target, "--on-target-error", "enospc"]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut lines = std::io::BufReader::new(child.stderr.take().unwrap()).lines();
    let paused = lines.by_ref().map(Result::unwrap).find(|line| line.starts_with("Paused: ")).unwrap();
    let pid = child.id();
    for text in ["No space left", "target.img", &format!("kill -CONT {pid}"), &format!("kill {pid}")] {
        assert!(paused.contains(text), "no `{text}` in: {paused}");
    }
    let status = Command::new("kill").arg(pid.to_string()).status().unwrap();
    assert!(status.success());
    let rest: Vec<String> = lines.map(Result::unwrap).collect();
    assert_eq!(child.wait().unwrap().code(), Some(3), "{rest:?}");
    assert!(rest.len() <= 2 && !rest.concat().contains("Paused"), "{rest:?}");
}

/// Clients' writes go to both disks while the target has no room: no client notices, nothing is lost.
#[test]
fn clients_do_not_notice_a_full_target_in_write_blocking_mode() {
    let scratch = Scratch::new();
    let source = scratch.full("source.img", IMAGE_BYTES);
    let base = content(&source);
    let small = Small::new(&scratch, 9 * MIB);
    let target = small.filesystem.path("target.img");
    let socket = scratch.path("disk.sock");
    let uri = format!("nbd+unix:///disk?socket={socket}");
    let mut job = Process::json(&[
        "mirror",
        "-f",
        "raw",
        &source,
        &target,
        "--export",
        &uri,
        "--copy-mode",
        "write-blocking",
        "--on-target-error",
        "stop",
        "--follow",
        "--speed",
        "64MiB",
    ]);
    job.wait_for(|event| is_status(event, "running"));
    let writer = Writer::start(&Plan::anywhere(Path::new(&socket), IMAGE_BYTES, 5), false);
    job.wait_for(|event| is_status(event, "paused"));
    writer.wait_more(200);
    small.make_room();
    job.resume();
    job.wait_event("BLOCK_JOB_READY");
    let synced = job.wait_for(|event| event["event"] == "progress" && event["actively-synced"] == true);
    assert_eq!(synced["copy-mode"], "write-blocking");
    writer.wait_more(200);
    let history = writer.stop();
    job.interrupt();
    let ended = job.end();
    assert_eq!(ended.code, Some(0), "{ended}");
    let end = ended.events();
    let details = &event(&end, "end")["details"];
    assert!(details["bytes-mirrored"].as_u64().is_some_and(|bytes| bytes > 0), "{details}");
    assert_equal(&source, &target);
    let found = content(&target);
    history.check(&base, &found).unwrap();
    assert!(difference(&base, &found).is_some(), "the clients did write");
}

/// A job that puts more into a layer than the small filesystem with that layer has room for.
struct Merge {
    small: Small,
    arguments: Vec<String>,
    /// The active layer, and all layers of the chain.
    top: String,
    layers: Vec<String>,
    /// What the disk shows.
    model: String,
    /// Goes last: the small filesystem lies in it.
    _scratch: Scratch,
}

const MERGES: [&str; 3] = ["intermediate commit", "active commit", "stream"];

impl Merge {
    fn new(kind: &str) -> Merge {
        let scratch = Scratch::new();
        let small = Small::new(&scratch, 9 * MIB);
        let (base, mid, top) = match kind {
            // What is filled lies on the small filesystem.
            "stream" => (scratch.path("base"), scratch.path("mid"), small.filesystem.path("top")),
            _ => (small.filesystem.path("base"), scratch.path("mid"), scratch.path("top")),
        };
        let create = ["create", "-q", "-f", "qcow2"];
        tool("qemu-img", &[&create[..], &[&base, "24M"]].concat());
        for (layer, below) in [(&mid, &base), (&top, &mid)] {
            tool("qemu-img", &[&create[..], &["-F", "qcow2", "-b", below, layer]].concat());
        }
        tool("qemu-io", &["-f", "qcow2", "-c", "write -q -P 7 0 24M", &mid]);
        tool("qemu-io", &["-f", "qcow2", "-c", "write -q -P 8 5M 1M", &top]);
        let model = scratch.path("model");
        tool("qemu-img", &["convert", "-O", "raw", &top, &model]);
        let directory = scratch.path("");
        let arguments = match kind {
            "intermediate commit" => vec!["commit", &top, "--top", &mid, "-b", &base],
            "active commit" => vec!["commit", &top, "-b", &base],
            _ => vec!["stream", &top, "--allow-dir", &directory],
        };
        let arguments = arguments.into_iter().map(str::to_owned).collect();
        Merge { arguments, top: top.clone(), layers: vec![base, mid, top], small, model, _scratch: scratch }
    }

    fn arguments<'a>(&'a self, more: &[&'a str]) -> Vec<&'a str> {
        self.arguments.iter().map(String::as_str).chain(more.iter().copied()).collect()
    }

    /// How many backing files the disk has.
    fn depth(&self) -> usize {
        let text = tool("qemu-img", &["info", "--output=json", "--backing-chain", &self.top]);
        let list: Vec<Value> = serde_json::from_str(&text).expect("JSON");
        list.len() - 1
    }

    /// The disk shows what it showed, and the images of these layers are sound.
    fn check(&self, layers: &[&String]) {
        for layer in layers {
            tool("qemu-img", &["check", "-q", "-f", "qcow2", layer]);
        }
        tool("qemu-img", &["compare", "-q", "-f", "qcow2", "-F", "raw", &self.top, &self.model]);
    }

    /// After the job: it did what it promised.
    fn check_done(&self, kind: &str) {
        let [base, mid, top] = &self.layers[..] else { unreachable!("three layers") };
        match kind {
            "intermediate commit" => {
                assert_eq!(self.depth(), 1);
                self.check(&[base, top]);
            }
            "active commit" => {
                assert_eq!(self.depth(), 2);
                self.check(&[base, mid, top]);
                tool("qemu-img", &["compare", "-q", "-f", "qcow2", "-F", "raw", base, &self.model]);
            }
            _ => {
                assert_eq!(self.depth(), 0);
                self.check(&[top]);
            }
        }
    }
}

/// The job is paused once; with room it goes on with what failed, and completes.
#[test]
fn a_full_layer_stops_a_merge_and_room_lets_it_complete() {
    for (kind, policy) in MERGES.into_iter().zip(["enospc", "stop", "enospc"]) {
        let merge = Merge::new(kind);
        let mut job = Process::json(&merge.arguments(&["--on-error", policy, "--buf-size", "4MiB"]));
        let mut pauses = 0;
        loop {
            let event = job.event().expect("a job that is stopped by a full layer");
            pauses += usize::from(is_status(&event, "paused"));
            if event["event"] == "progress" && event["io-status"] == "nospace" {
                assert_eq!(event["status"], "paused");
                break;
            }
        }
        assert_eq!(pauses, 1, "{kind}");
        merge.small.make_room();
        job.resume();
        let ended = job.end();
        assert_eq!(ended.code, Some(0), "{kind}: {ended}");
        let after = ended.events();
        assert!(after.iter().all(|event| !is_stop(event)), "it failed again with room: {after:#?}");
        assert_eq!(event(&after, "end")["ending"], "completed");
        merge.check_done(kind);
    }
}

/// `report` ends the job: the chain is as it was, and with room the job can be run again.
#[test]
fn a_full_layer_ends_a_merge_and_the_chain_is_as_it_was() {
    for kind in MERGES {
        let merge = Merge::new(kind);
        let ended = run(&merge.arguments(&[]));
        assert_eq!(ended.code, Some(1), "{kind}: {ended}");
        let text = ended.err.clone();
        assert!(text.contains("No space left") && text.contains("The chain is as it was"), "{kind}: {text}");
        assert_eq!(merge.depth(), 2);
        // Tables found room, so that nothing has leaked, and what was dealt with stays.
        merge.check(&merge.layers.iter().collect::<Vec<_>>());
        let filled = if kind == "stream" { &merge.layers[2] } else { &merge.layers[0] };
        let text = tool("qemu-img", &["check", "--output=json", "-f", "qcow2", filled]);
        let kept = serde_json::from_str::<Value>(&text).expect("JSON")["allocated-clusters"].as_u64();
        assert!(kept >= Some(4 * MIB / 65_536), "{kind}: {text}");
        merge.small.make_room();
        let ended = run(&merge.arguments(&[]));
        assert_eq!(ended.code, Some(0), "{kind}: {ended}");
        merge.check_done(kind);
    }
}

/// `ignore` tries again, with pauses, and goes on by itself when there is room.
#[test]
fn a_merge_that_ignores_a_full_layer_goes_on_when_there_is_room() {
    for kind in MERGES {
        let merge = Merge::new(kind);
        let mut job = Process::json(&merge.arguments(&["--on-error", "ignore"]));
        let ignored =
            |event: &Value| event["event"] == "BLOCK_JOB_ERROR" && event["data"]["action"] == "ignore";
        for _ in 0..3 {
            job.wait_for(ignored);
        }
        let progress = job.wait_event("progress");
        assert_eq!(progress["status"], "running");
        merge.small.make_room();
        let ended = job.end();
        assert_eq!(ended.code, Some(0), "{kind}: {ended}");
        assert_eq!(event(&ended.events(), "end")["ending"], "completed");
        merge.check_done(kind);
    }
}
