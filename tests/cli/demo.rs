//! The demo as a person runs it: it ends well, with its promises checked by others, and leaves nothing behind.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

fn blockferry() -> Command {
    Command::new(env!("CARGO_BIN_EXE_blockferry"))
}

fn demo(folder: &Path) -> Command {
    let mut command = blockferry();
    command.args(["demo", "--size", "32MiB", "--rate", "300", "--dir"]).arg(folder);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect()
}

/// One run, as a program sees it. What it kept is judged once more, by other means.
#[test]
fn the_demo_keeps_its_promises() {
    let folder = tempfile::tempdir().unwrap();
    let output = demo(folder.path()).args(["--json", "--keep"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{text}\n{errors}");
    let lines: Vec<Value> =
        text.lines().map(|line| serde_json::from_str(line).expect("one object a line")).collect();
    let report = lines.last().unwrap();
    assert_eq!((&report["event"], &report["verified"]), (&"demo".into(), &true.into()), "{text}");
    assert_eq!(report["verify"]["bytes"], 32 << 20);
    let names: Vec<&str> =
        report["loads"].as_array().unwrap().iter().map(|load| load["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["before", "during", "after"]);
    for load in report["loads"].as_array().unwrap() {
        assert!(load["writes"].as_u64() > Some(0), "{load}");
    }
    // 24 MiB were data at first; the copy is thin where nobody wrote.
    assert!(report["job"]["bytes-copied"].as_u64() >= Some(24 << 20), "{text}");
    assert!(report["job"]["cpu-ns"].as_u64() > Some(0));

    let [kept] = &entries(folder.path())[..] else { panic!("one folder is kept") };
    let log = kept.join("after.log");
    let check =
        blockferry().args(["bench", "--check-log"]).arg(&log).arg(kept.join("target.raw")).output().unwrap();
    assert_eq!(check.status.code(), Some(0), "{}", String::from_utf8_lossy(&check.stdout));
    // The source was left behind by the pivot: it lacks what was acknowledged after it.
    let stale =
        blockferry().args(["bench", "--check-log"]).arg(&log).arg(kept.join("source.raw")).output().unwrap();
    assert_eq!(stale.status.code(), Some(4), "{}", String::from_utf8_lossy(&stale.stdout));
}

/// Ctrl-C in the middle of it.
#[test]
fn an_interrupted_demo_cleans_up() {
    let folder = tempfile::tempdir().unwrap();
    let mut child = demo(folder.path()).spawn().unwrap();
    let mut errors = BufReader::new(child.stderr.take().unwrap());
    let mut seen = String::new();
    while !seen.contains("A client writes") {
        assert_ne!(errors.read_line(&mut seen).unwrap(), 0, "it ended: {seen}");
    }
    assert_eq!(entries(folder.path()).len(), 1);
    let pid = Pid::from_raw(child.id().try_into().unwrap()).unwrap();
    kill_process(pid, Signal::INT).unwrap();
    // The load generator has the other end of this pipe's twin; it must be gone for the output to end.
    let mut output = String::new();
    child.stdout.take().unwrap().read_to_string(&mut output).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(3), "{seen}");
    assert_eq!(output, "");
    assert!(entries(folder.path()).is_empty());
}

/// No room, no folder: told in a sentence, with the cure.
#[test]
fn a_demo_without_a_place_says_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    for (dir, size) in [(folder.path().join("nowhere"), "32MiB"), (folder.path().to_owned(), "1PiB")] {
        let output = blockferry().args(["demo", "--size", size, "--dir"]).arg(&dir).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{errors}");
        assert!(errors.contains("--dir"), "{errors}");
    }
    assert!(entries(folder.path()).is_empty());
}
