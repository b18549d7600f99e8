//! What marks are for: a disk that is not whole, or old, is not taken for one that is; and what a job says at its end is
//! true of a target that is there.

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::rc::Rc;

use blockferry::engine::{Engine, ImageOptions};
use blockferry::job::mirror::{MirrorOptions, SyncMode};
use blockferry::protocol::mark::{MarkState, TargetMark};
use blockferry_ring::Config;

use super::{export, refused};
use common::image::{MIB, Scratch, assert_equal, content};
use common::nbd::Client;
use common::{Ended, Process, blockferry, event, info, is_marked, run, run_json, tool};

/// A target that was given up, and its source.
fn given_up(scratch: &Scratch) -> (String, String) {
    let (source, target) = (scratch.full("source", 4 * MIB), scratch.path("half"));
    let mut mirror = Process::json(&["mirror", "--speed", "1MiB", &source, &target]);
    mirror.wait_event("progress");
    mirror.interrupt();
    assert_eq!(mirror.end().code, Some(3));
    (source, target)
}

fn last_line(ended: &Ended) -> &str {
    ended.err.lines().last().unwrap_or_default()
}

#[test]
fn what_was_left_incomplete_is_used_by_nobody_and_taken_over_by_its_own() {
    let scratch = Scratch::new();
    let (source, half) = given_up(&scratch);
    let before = content(&half);
    let copy = scratch.path("copy");
    let uri = export(&scratch).0;
    for command in [
        &["mirror", &half, &copy][..],
        &["convert", &half, &copy],
        &["convert", "-O", "qcow2", "-B", &half, "-F", "raw", &source, &copy],
        &["create", "-f", "qcow2", "-b", &half, "-F", "raw", &copy],
        &["serve", "--read-only", "-f", "raw", "--export", &uri, &half],
        &["bench", "--overwrite", "-f", "raw", "-n", "1", &half],
    ] {
        refused(command, &["no whole disk", "--allow-incomplete"]);
        assert!(!std::fs::exists(&copy).unwrap(), "{command:?}");
    }
    assert!(content(&half) == before);
    // Who only looks is told.
    for command in [&["map", &half][..], &["compare", &half, &source], &["measure", &half], &["info", &half]]
    {
        let ended = run(command);
        assert!(ended.code.is_some_and(|code| code < 2) && ended.err.contains("no whole disk"), "{ended}");
    }
    // As a layer below, too; and by whoever allows it.
    let overlay = scratch.path("overlay");
    let make = ["create", "-f", "qcow2", "-b", &half, "-F", "raw"];
    run_json(&[&make[..], &["--allow-incomplete", &overlay]].concat());
    refused(&["convert", &overlay, &copy], &["no whole disk"]);
    // What a rebase copies out of it is no more whole.
    refused(&["rebase", "-b", "", &overlay], &["no whole disk", "--allow-incomplete"]);
    refused(&["rebase", "-b", &source, "-F", "raw", &overlay], &["no whole disk"]);
    run_json(&["rebase", "--allow-incomplete", "-b", "", &overlay]);
    assert!(is_marked(&overlay));
    refused(&["convert", &overlay, &copy], &["no whole disk"]);
    // It is told since when, by whom, how far, and what to do.
    let told = info(&half);
    let mark = &told["mark"];
    assert_eq!((&told["state"], &mark["process-state"]), (&"incomplete".into(), &"ended".into()), "{told}");
    assert_eq!((&mark["source-bytes"], &mark["format"]), (&(4 * MIB).into(), &"raw".into()), "{mark}");
    assert!(mark["done"][0].as_u64() > Some(0) && mark["done"][1] == 4 * MIB, "{mark}");
    let text = run(&["info", &half]).out;
    for part in [
        "INCOMPLETE",
        "begun at 20",
        "which has ended",
        "of 4 MiB dealt with",
        "what to do: run the mirror again",
    ] {
        assert!(text.contains(part), "no `{part}` in: {text}");
    }
    // A copy of it is marked, too.
    let ended = run(&["convert", "--allow-incomplete", &half, &copy]);
    assert!(ended.code == Some(0) && last_line(&ended).contains("is marked so, too"), "{ended}");
    assert!(is_marked(&copy) && content(&copy) == content(&half));
    refused(&["convert", &copy, &scratch.path("third")], &["incomplete itself"]);
    // Another source, another format, another size: not its own.
    let other = scratch.full("other", 4 * MIB);
    refused(&["mirror", &other, &half], &["exists and is left alone"]);
    refused(&["mirror", "-F", "qcow2", &source, &half], &["exists and is left alone"]);
    // The same again, by another name of the source and by the other command, goes on with it.
    let link = scratch.path("link");
    std::fs::hard_link(&source, &link).unwrap();
    let ended = run(&["mirror", &link, &half]);
    assert!(ended.code == Some(0) && ended.err.contains("taken over"), "{ended}");
    assert_eq!(last_line(&ended), format!("'{half}' (raw, 4 MiB) equals '{link}' (raw, 4 MiB)"));
    assert!(!is_marked(&half));
    assert_equal(&source, &half);
    refused(&["mirror", &source, &half], &["exists and is left alone"]);
}

#[test]
fn a_disk_that_clients_have_left_says_so() {
    let scratch = Scratch::new();
    let (old, new) = (scratch.full("old", MIB), scratch.path("new"));
    let (uri, socket) = export(&scratch);
    let mut mirror =
        Process::json(&["mirror", "-f", "raw", "--pivot", "--speed", "1MiB", "--export", &uri, &old, &new]);
    mirror.wait_event("listening");
    let mut client = Client::connect(&socket, "disk").unwrap();
    mirror.wait_event("end");
    client.write(0, &[7; 512]).unwrap();
    client.disconnect().unwrap();
    mirror.interrupt();
    assert_eq!(mirror.end().code, Some(0));
    assert!(!is_marked(&new));
    let told = run_json(&["info", "-f", "raw", &old]).remove(0);
    assert_eq!(
        (&told["state"], &told["mark"]["target"]),
        (&"superseded".into(), &new.as_str().into()),
        "{told}"
    );
    // It may be read, with a warning; whoever wants to write it has to know what it is.
    let back = scratch.path("back");
    let ended = run(&["convert", &old, &back]);
    assert!(ended.code == Some(0) && ended.err.contains("is old") && ended.err.contains(&new), "{ended}");
    assert!(!is_marked(&back), "it is a copy of an old disk, and whole");
    refused(&["serve", "-f", "raw", "--export", &uri, &old], &["superseded by", "--allow-superseded"]);
    let mut server = Process::json(&["serve", "-f", "raw", "--allow-superseded", "--export", &uri, &old]);
    server.wait_event("listening");
    server.interrupt();
    assert_eq!(server.end().code, Some(0));
    // A commit writes to its base.
    let top = scratch.path("top.qcow2");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &old, "-F", "raw", &top]);
    refused(&["commit", &top], &["superseded by", "--allow-superseded"]);
    run_json(&["commit", "--allow-superseded", &top]);
    // A new image in its place is none that somebody has left.
    let other = scratch.path("other");
    tool("cp", &["--preserve=xattr", &old, &other]);
    assert_eq!(run_json(&["info", "-f", "raw", &other])[0]["state"], "superseded");
    run_json(&["create", "--force", "-f", "raw", &other, "1M"]);
    assert_ne!(run_json(&["info", "-f", "raw", &other])[0]["state"], "superseded");
    // What is copied over it is new.
    run_json(&["mirror", "--force", "-F", "raw", &new, &old]);
    assert!(!is_marked(&old));
    assert_equal(&new, &old);
}

#[test]
fn only_what_shows_the_lower_layers_takes_the_uppermost_alone() {
    let scratch = Scratch::new();
    let base = scratch.full("base", MIB);
    let (top, twin) = (scratch.path("top"), scratch.path("twin"));
    std::fs::copy(&base, &twin).unwrap();
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &base, "-F", "raw", &top]);
    tool("qemu-io", &["-f", "qcow2", "-c", "write -P 1 64k 64k", &top]);
    let mirror = ["mirror", "--sync", "top", "-f", "qcow2"];
    let target = scratch.path("target");
    let other = format!("backing_file={twin},backing_fmt=raw");
    for rest in [&["-F", "raw"][..], &["-F", "qcow2", "-o", &other]] {
        refused(&[&mirror[..], rest, &[&top, &target]].concat(), &["backing file", "--sync full"]);
        assert!(!std::fs::exists(&target).unwrap(), "{rest:?}");
    }
    // One that is there is left as it is, too.
    let there = scratch.full("there", MIB);
    let before = content(&there);
    refused(&[&mirror[..], &["--force", "-F", "raw", &top, &there]].concat(), &["no backing file"]);
    assert!(content(&there) == before && !is_marked(&there));
    // Compared as a whole, another backing file will do if it holds the same, and not if it does not.
    run_json(&[&mirror[..], &["--verify", "-F", "qcow2", "-o", &other, &top, &target]].concat());
    tool("qemu-img", &["compare", "-q", &top, &target]);
    let file = std::fs::OpenOptions::new().write(true).open(&twin).unwrap();
    file.write_all_at(&[1], 0).unwrap();
    let wrong = scratch.path("wrong");
    let ended = run(&[&mirror[..], &["--verify", "-F", "qcow2", "-o", &other, &top, &wrong]].concat());
    assert!(
        ended.code == Some(4) && !ended.err.contains("Verified") && !ended.err.contains("equals"),
        "{ended}"
    );
    assert!(is_marked(&wrong));
}

#[test]
fn new_writes_alone_make_no_copy() {
    let scratch = Scratch::new();
    let (source, target) = (scratch.full("source", MIB), scratch.path("target"));
    let (uri, none) = (export(&scratch).0, ["mirror", "--sync", "none", "-f", "raw"]);
    let pivot = ["--export", &uri, "--pivot"];
    for rest in [&pivot[..], &["--verify"]] {
        let ended = run(&[&none[..], rest, &[&source, &target]].concat());
        assert!(ended.code == Some(2) && ended.err.contains("only what is written meanwhile"), "{ended}");
    }
    assert!(!std::fs::exists(&target).unwrap());
    let ended = run(&[&none[..], &[&source, &target]].concat());
    assert!(ended.code == Some(0) && !ended.err.contains("equals"), "{ended}");
    // A target that keeps nothing equals nothing.
    for command in ["mirror", "convert"] {
        let ended = run(&[
            &[command, "-f", "raw"][..],
            &["-n"][..usize::from(command == "convert")],
            &[&source, "null:1M"],
        ]
        .concat());
        assert!(ended.code == Some(0) && last_line(&ended).ends_with("and keeps nothing"), "{ended}");
    }
    assert!(last_line(&ended).contains("is no copy of it, and is marked so"), "{ended}");
    assert_eq!(info(&target)["state"], "partial");
    refused(&["convert", &target, &scratch.path("copy")], &["holds only what was written"]);
}

#[test]
fn somebody_takes_away_what_a_job_works_on() {
    type Harm = fn(&Scratch, &str, &str);
    let harms: [(&str, Harm); 5] = [
        ("removed", |_, _, target| std::fs::remove_file(target).unwrap()),
        ("replaced", |scratch, _, target| {
            std::fs::write(scratch.path("other"), vec![1; 3 << 20]).unwrap();
            std::fs::rename(scratch.path("other"), target).unwrap();
        }),
        // It gets its length back with the last piece, but not what was in it.
        ("cut", |_, _, target| set_len(target, 0)),
        ("source cut", |_, source, _| set_len(source, 3 * MIB - 1)),
        ("source longer", |_, source, _| set_len(source, 4 * MIB)),
    ];
    let commands = [&["mirror", "--speed", "1MiB"][..], &["convert", "-r", "1MiB"]];
    let mut running = Vec::new();
    for (what, harm) in harms {
        for command in commands {
            let scratch = Scratch::new();
            let (source, target) = (scratch.full("source", 3 * MIB), scratch.path("target"));
            let mut job = Process::json(&[command, &[&source, &target]].concat());
            job.wait_event("progress");
            harm(&scratch, &source, &target);
            running.push((what, command, job, scratch));
        }
    }
    for (what, command, job, _scratch) in running {
        let ended = job.end();
        assert_eq!(ended.code, Some(1), "{what} under {command:?}: {ended}");
        assert!(ended.err.contains("Somebody has"), "{what} under {command:?}: {ended}");
        let events = ended.events();
        assert_eq!(event(&events, "end")["ending"], "failed", "{what}: {ended}");
        let is_ready = events.iter().any(|event| event["event"] == "BLOCK_JOB_READY");
        assert!(!is_ready, "{what} under {command:?}: ready for nothing");
    }
}

fn set_len(path: &str, len: u64) {
    std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(len).unwrap();
}

#[test]
fn a_target_that_never_had_a_name_is_no_matter() {
    let scratch = Scratch::new();
    let (source, nameless) = (scratch.full("source", MIB), scratch.path("nameless"));
    let options =
        std::fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&nameless);
    let file = options.unwrap();
    file.set_len(MIB).unwrap();
    std::fs::remove_file(&nameless).unwrap();
    let name = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    let ended = run(&["mirror", "--force", "-F", "raw", &source, &name]);
    assert_eq!(ended.code, Some(0), "{ended}");
    let mut bytes = vec![0; MIB as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == content(&source));
}

#[test]
fn no_figure_is_above_the_limit() {
    let scratch = Scratch::new();
    let limit = 1 << 20;
    // Holes cost nothing, and a limit lets a first burst through: neither is a speed.
    let source = scratch.holey("source", 64 * MIB, &[(0, 3 * MIB / 2)]);
    for command in [&["mirror", "--speed", "1MiB"][..], &["convert", "-r", "1MiB"]] {
        let target = scratch.path(command[0]);
        let ended = Process::spawn(blockferry(&[&["--json"], command, &[&source, &target]].concat())).end();
        assert_eq!(ended.code, Some(0), "{ended}");
        let events = ended.events();
        for progress in events.iter().filter(|event| event["event"] == "progress") {
            for figure in ["rate-bytes-per-sec", "copy-bytes-per-sec"] {
                assert!(progress[figure].as_u64().unwrap_or(0) <= limit, "{progress}");
            }
        }
        let details = &event(&events, "end")["details"];
        let of = |name: &str| details[name].as_u64().unwrap();
        assert!(of("copy-ns") > 0 && of("bytes-copied") == 3 * MIB / 2, "{details}");
    }
}

/// The library's defaults: the target is marked while the job runs, and its source after a pivot.
#[test]
fn an_embedders_target_is_marked_by_itself() {
    let scratch = Scratch::new();
    let (source, target) = (scratch.full("source", 4 * MIB), scratch.holey("target", 4 * MIB, &[]));
    let engine = Rc::new(Engine::new(&Config::default()).expect("a ring"));
    let e = engine.clone();
    let (from, to) = (source.clone(), target.clone());
    engine.run(async move {
        let raw = ImageOptions::raw();
        let (source, target) = (e.open(&from, &raw).await.unwrap(), e.open(&to, &raw).await.unwrap());
        let mark = || TargetMark::read_own(e.ring(), target.driver()).map(|mark| mark.kind());
        let options = MirrorOptions { speed: 1 << 20, ..MirrorOptions::new("first") };
        let job = e.mirror(&source, &target, options).await.unwrap();
        let copies = || (job.details().bytes_copied > 0).then_some(());
        while copies().is_none() {
            e.ring().sleep(1_000_000).await;
        }
        assert_eq!(mark(), Some(MarkState::Incomplete));
        job.cancel(true).unwrap();
        job.until_over().await;
        assert_eq!(mark(), Some(MarkState::Incomplete));
        // Whoever opens it is told.
        assert!(e.open(&to, &ImageOptions { lock: false, ..raw.clone() }).await.is_err());
        target.until_free_of_jobs().await;
        let options = MirrorOptions { sync: SyncMode::None, ..MirrorOptions::new("second") };
        let job = e.mirror(&source, &target, options).await.unwrap();
        job.until_ready().await;
        assert!(job.complete().is_err(), "nobody can be put on what is no copy");
        job.cancel(false).unwrap();
        job.until_over().await;
        assert_eq!(mark(), Some(MarkState::Partial));
        let guest = e.guest(&source, false).unwrap();
        let job = e.mirror(&source, &target, MirrorOptions::new("third")).await.unwrap();
        job.until_ready().await;
        job.complete().unwrap();
        job.until_over().await;
        assert_eq!(mark(), None);
        let old = || TargetMark::read_own(e.ring(), source.driver()).map(|mark| mark.kind());
        while old().is_none() {
            e.ring().yield_now().await;
        }
        assert_eq!(old(), Some(MarkState::Superseded));
        drop(guest);
    });
    assert_equal(&source, &target);
}
