//! What real trouble does to a mirror: a small filesystem that is full, room that somebody makes, a target
//! that is in write-blocking mode meanwhile.

mod common;

use std::path::Path;

use common::filesystem::Mounted;
use common::image::{MIB, Scratch, assert_equal, content, difference};
use common::writer::{Plan, Writer};
use common::{Process, assert_same, event, is_marked, tool};
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
