//! Where io_uring is forbidden: the command says so, names the cure, and touches nothing.
//!
//! A seccomp filter takes the system calls away from child processes, with the errors that the profiles of
//! container engines answer with (EPERM, and ENOSYS for calls that a profile does not know).

use common::sandbox;

use common::image::{MIB, Scratch, assert_equal, content};
use common::{Ended, event, is_marked, run, run_json, stats};

const URING: [u32; 3] = [sandbox::SETUP, sandbox::ENTER, sandbox::REGISTER];

/// The text says what is wrong and what to do, and the exit code is that of a failure.
fn assert_told(ended: &Ended) {
    assert_eq!(ended.code, Some(1), "{ended}");
    for text in
        ["io_uring is not to be had here", "io_uring_setup was refused", "seccomp", "allow io_uring_setup"]
    {
        assert!(ended.err.contains(text), "no `{text}` in: {ended}");
    }
}

#[test]
fn a_refusal_is_told_with_its_cure() {
    let scratch = Scratch::new();
    let source = scratch.full("source", MIB);
    let target = scratch.path("target");
    let bytes = content(&source);
    let uri = format!("nbd+unix:///disk?socket={}", scratch.path("socket"));
    for errno in [libc::EPERM, libc::ENOSYS, libc::EACCES] {
        for arguments in [
            &["mirror", &source, &target][..],
            &["mirror", "--force", "-F", "raw", &target, &source],
            &["serve", "-f", "raw", "--export", &uri, &source],
            &["info", &source],
        ] {
            let ended = sandbox::without(&URING, errno, || run(arguments));
            assert_told(&ended);
            assert!(ended.out.is_empty(), "{ended}");
        }
    }
    assert!(!std::fs::exists(&target).unwrap() && !std::fs::exists(scratch.path("socket")).unwrap());
    assert!(content(&source) == bytes && !is_marked(&source));
}

#[test]
fn scripts_are_told_too() {
    let ended = sandbox::without(&URING, libc::EPERM, || run(&["--json", "info", "null:1MiB"]));
    assert_eq!(ended.code, Some(1));
    let events = ended.events();
    let message = event(&events, "error")["message"].as_str().unwrap();
    assert!(message.contains("seccomp") && message.contains("allow io_uring_setup"), "{message}");
}

#[test]
fn the_doctor_reports_all_the_same() {
    let ended = sandbox::without(&URING, libc::ENOSYS, || run(&["doctor"]));
    assert_told(&ended);
    // What can be told without a ring is told.
    for text in ["Linux", "RLIMIT_MEMLOCK", "kernel.io_uring_disabled", "seccomp"] {
        assert!(ended.out.contains(text), "no `{text}` in: {ended}");
    }
}

#[test]
fn half_a_ring_is_none() {
    // A profile that allows the first call and forgets the second: no hang, no copy that looks like one.
    let scratch = Scratch::new();
    let source = scratch.full("source", MIB);
    let target = scratch.path("target");
    let ended = sandbox::without(&[sandbox::ENTER], libc::EPERM, || run(&["mirror", &source, &target]));
    assert_eq!(ended.code, Some(1), "{ended}");
    assert!(ended.err.contains("io_uring_enter was refused") && ended.err.contains("seccomp"), "{ended}");
    assert!(!std::fs::exists(&target).unwrap());
}

#[test]
fn without_registration_plain_operations_do_it() {
    let scratch = Scratch::new();
    let source = scratch.full("source", 4 * MIB);
    let target = scratch.path("target");
    let events = sandbox::without(&[sandbox::REGISTER], libc::EPERM, || {
        run_json(&["mirror", "--stats", &source, &target])
    });
    assert_equal(&source, &target);
    let counters = stats(&events);
    assert_eq!(counters["transfers-fixed"], 0, "{counters}");
    assert!(counters["transfers-plain"].as_u64() >= Some(8), "{counters}");
    assert_eq!(counters["arena-bytes-registered"], 0, "{counters}");
    // The filter ended with its thread.
    let events = run_json(&["mirror", "--stats", "--force", "-F", "raw", &source, &target]);
    assert!(stats(&events)["transfers-fixed"].as_u64() > Some(0));
}
