//! Random stories of chains, told by this program and by QEMU's tools in turns, judged after each step.
//!
//! A story begins with a chain of 1 to 6 layers of any format, length and layout, and goes on for 12 to 40 steps: guests
//! write, discard and compress, layers are added, merged, filled, rebased, converted, mirrored, resized, and snapshots come
//! and go. At least a third of the steps are ours, and at least a third QEMU's. A plain model knows what each image has to
//! show; after every step QEMU compares the uppermost with it byte by byte and checks what was changed, and after every few
//! the whole chain. What has to be refused is tried, too, and then not a byte may have changed.
//!
//! `SWEEP_STORIES` stories (100) are told from `SWEEP_SEED` (1) on; a failure prints the seed and the whole story as
//! command lines: `SWEEP_SEED=1234 SWEEP_STORIES=1 cargo test --test sweep`. `SWEEP_BINARY` is another build of
//! the command, and `SWEEP_WITHOUT=rebase,refuse` leaves out kinds of steps, to see what else goes wrong.

#[path = "../common/mod.rs"]
mod common;

mod guest;
mod image;
mod steps;
mod story;
mod view;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use story::Story;

fn setting(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")),
        Err(_) => default,
    }
}

#[test]
fn chains_show_what_the_model_shows_whoever_changes_them() {
    let (first, count) = (setting("SWEEP_SEED", 1), setting("SWEEP_STORIES", 100));
    let next = AtomicU64::new(first);
    let (faults, tally) = (Mutex::new(Vec::new()), Mutex::new(BTreeMap::new()));
    // Processes are what takes the time, so threads beyond the processors gain little.
    let threads = std::thread::available_parallelism().map_or(2, |n| n.get() as u64).min(count);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + count {
                        return;
                    }
                    let mut story = Story::new(seed);
                    let told = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| story.tell()));
                    let mut sum = tally.lock().expect("no thread has died");
                    for (what, n) in &story.tally {
                        *sum.entry(what.clone()).or_insert(0u64) += n;
                    }
                    drop(sum);
                    let fault = match told {
                        Ok(Ok(())) => continue,
                        Ok(Err(text)) => text,
                        Err(panic) => format!("a panic: {}", text_of(&*panic)),
                    };
                    let log = story.log.join("\n  ");
                    faults.lock().expect("no thread has died").push(format!("seed {seed}: {fault}\n  {log}"));
                }
            });
        }
    });
    let (faults, tally) =
        (faults.into_inner().expect("all have ended"), tally.into_inner().expect("all have ended"));
    println!("steps by kind and teller: {tally:#?}");
    assert!(faults.is_empty(), "{} of {count} stories went wrong:\n{}", faults.len(), faults.join("\n\n"));
    let by = |who: &str| tally.iter().filter(|(what, _)| what.ends_with(who)).map(|(_, n)| n).sum::<u64>();
    let (ours, theirs) = (by("by us"), by("by QEMU"));
    if count >= 100 {
        assert!(
            3 * ours >= ours + theirs && 3 * theirs >= ours + theirs,
            "{ours} steps are ours, {theirs} QEMU's"
        );
        for kind in steps::KINDS {
            assert!(tally.keys().any(|what| what.starts_with(kind)), "no story has a step '{kind}'");
        }
    }
}

fn text_of(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}
