//! The examples for embedders, as built: a foreign epoll loop owns the engine, a job changes what lies under the guest,
//! and no thread is started.

use std::process::Command;

use common::image::Scratch;
use common::{Process, tool};

/// Runs an example in a folder of its own; it has to say all of `texts`. Gives its last line.
fn run_example(name: &str, scratch: &Scratch, texts: &[&str]) -> String {
    // Tests live in `target/PROFILE/deps`, examples next to that folder.
    let test = std::env::current_exe().unwrap();
    let profile = test.parent().and_then(|deps| deps.parent()).unwrap();
    let example = profile.join("examples").join(name);
    assert!(
        example.exists(),
        "{} is not built; run `cargo test` or `cargo build --examples`",
        example.display()
    );
    let mut command = Command::new(&example);
    command.arg(scratch.dir());
    let ended = Process::spawn(command).end();
    assert_eq!(ended.code, Some(0), "{ended}");
    for text in texts.iter().chain(&["threads: 1;"]) {
        assert!(ended.out.contains(text), "no `{text}` in: {ended}");
    }
    ended.out.lines().last().unwrap_or_default().to_owned()
}

/// The number of requests that an example tells.
fn requests(line: &str) -> Option<u64> {
    line.split(' ').next().and_then(|number| number.parse().ok())
}

#[test]
fn the_mirror_pivots_on_one_thread() {
    let said = run_example("embed", &Scratch::new(), &["pivoted", "every block found on the copy"]);
    assert!(requests(&said) > Some(10_000), "{said}");
}

#[test]
fn commits_shorten_the_chain_on_one_thread() {
    let scratch = Scratch::new();
    let texts = [
        "intermediate commit completed; layers left: 2",
        "active commit completed; layers left: 1",
        "every block found on the base",
    ];
    let said = run_example("commit", &scratch, &texts);
    assert!(requests(&said) > Some(10_000), "{said}");
    tool("qemu-img", &["check", "-q", &scratch.path("top.qcow2")]);
}

#[test]
fn streams_shorten_the_chain_on_one_thread() {
    let scratch = Scratch::new();
    let texts = [
        "partial stream completed; layers left: 2",
        "whole stream completed; layers left: 1",
        "every block found without backing files",
    ];
    let said = run_example("stream", &scratch, &texts);
    assert!(requests(&said) > Some(10_000), "{said}");
    tool("qemu-img", &["check", "-q", &scratch.path("top.qcow2")]);
}
