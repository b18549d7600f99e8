//! The examples for embedders, as built: a foreign epoll loop owns the engine, a job changes what lies under the guest,
//! and no thread is started. And the handle by which other threads ask an engine for something.

use std::process::Command;
use std::sync::mpsc::channel;
use std::time::Instant;

use blockferry::block::WriteFlags;
use blockferry::engine::handle::{Gone, RequestError};
use blockferry::engine::{Engine, ImageOptions};
use common::image::Scratch;
use common::{PATIENCE, Process, tool};

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

/// Threads with a disk each of one engine, which only turns: every request is answered, and reads give what was written.
#[test]
fn other_threads_use_a_disk_and_give_orders() {
    const REQUESTS: u64 = 500;
    let engine = Engine::without_threads().expect("an engine");
    let node = engine.open_as_said("mem:8M", &ImageOptions::raw()).expect("a disk");
    let threads: Vec<_> = (0..4u8)
        .map(|number| {
            let (disk, handle) = (engine.share(&node, false).expect("a use"), engine.handle());
            std::thread::spawn(move || {
                assert_eq!(disk.features().len, 8 << 20);
                let offset = u64::from(number) << 20;
                let (done, answers) = channel();
                for block in 0..REQUESTS {
                    let done = done.clone();
                    let memory = vec![number.wrapping_add(block as u8); 512];
                    let flags = WriteFlags::default();
                    disk.write(offset + block * 512, memory, flags, move |result| drop(done.send(result)));
                }
                assert!(answers.iter().take(REQUESTS as usize).all(|result| result.is_ok()));
                let (done, answers) = channel();
                disk.flush(|result| assert!(result.is_ok()));
                for block in 0..REQUESTS {
                    let done = done.clone();
                    let at = offset + block * 512;
                    disk.read(at, vec![0; 512], move |result| drop(done.send((block, result))));
                }
                for (block, result) in answers.iter().take(REQUESTS as usize) {
                    assert!(
                        result.is_ok_and(|memory| memory == [number.wrapping_add(block as u8); 512]),
                        "{block}"
                    );
                }
                // Of any length, none included.
                let large: Vec<u8> = (0..3 << 19).map(|at: u32| (at >> 9) as u8).collect();
                if number == 0 {
                    for memory in [large.clone(), Vec::new()] {
                        let (done, answers) = channel();
                        disk.write(4 << 20, memory, WriteFlags::default(), move |result| {
                            drop(done.send(result))
                        });
                        assert!(answers.recv().is_ok_and(|result| result.is_ok()));
                    }
                    let (done, answers) = channel();
                    disk.read(4 << 20, vec![0; large.len()], move |result| drop(done.send(result)));
                    assert!(answers.recv().is_ok_and(|result| result.is_ok_and(|memory| memory == large)));
                }
                // Beyond the end: the disk's own error.
                let (done, answers) = channel();
                disk.discard(8 << 20, 512, move |result| drop(done.send(result)));
                assert!(matches!(answers.recv(), Ok(Err(RequestError::Disk { .. }))));
                assert_eq!(handle.call(|here| std::future::ready(here.job_ids())), Ok(Vec::new()));
            })
        })
        .collect();
    let until = Instant::now() + PATIENCE;
    while !threads.iter().all(|thread| thread.is_finished()) {
        assert!(Instant::now() < until, "the threads do not come to their end");
        if !engine.turn().more_work {
            std::thread::yield_now();
        }
    }
    threads.into_iter().for_each(|thread| thread.join().expect("a thread that is content"));
}

/// An engine ends under the requests of other threads: each is answered once, by what it came to or by saying that there is
/// no engine any more, and nobody waits for ever.
#[test]
fn every_request_is_answered_when_the_engine_ends() {
    for turns in [0, 1, 5, 50] {
        let engine = Engine::without_threads().expect("an engine");
        let node = engine.open_as_said("delay:1ms:mem:4M", &ImageOptions::raw()).expect("a disk");
        let (disk, handle) = (engine.share(&node, false).expect("a use"), engine.handle());
        let (done, answers) = channel();
        let thread = std::thread::spawn(move || {
            let mut asked = 0;
            // Also when it has ended.
            let mut more = 20;
            while more > 0 {
                more -= u32::from(handle.has_ended());
                for block in 0..10 {
                    let (done, memory) = (done.clone(), vec![1; 512]);
                    let answer = move |result| drop(done.send(result));
                    disk.write(block * 512, memory, WriteFlags::default(), answer);
                    asked += 1;
                }
                std::thread::yield_now();
            }
            let gone = handle.call(|_| std::future::ready(1));
            assert_eq!(gone, Err(Gone));
            asked
        });
        for _ in 0..turns {
            let _ = engine.turn();
        }
        drop(node);
        drop(engine);
        let asked = thread.join().expect("a thread that ends");
        let answers: Vec<_> = answers.iter().collect();
        assert_eq!(answers.len(), asked, "{turns}");
        assert!(answers.iter().any(|answer| matches!(answer, Err(RequestError::Gone(_)))), "{turns}");
    }
}
