//! Random stories of chains, told by this program and by QEMU's tools in turns, judged after each step.
//!
//! A story begins with a chain of 1 to 6 layers of any format, length and layout, and goes on for 12 to 40 steps: guests
//! write, discard and compress, layers are added, merged, filled, rebased, converted, mirrored, resized, and snapshots come
//! and go. At least a third of the steps are ours, and at least a third QEMU's. A plain model knows what each image has to
//! show; after every step QEMU checks what was changed, and the uppermost is compared with the model byte by byte, by QEMU
//! or by us in turns, after every few steps the whole chain. What has to be refused is tried, too, and then
//! not a byte may have changed. Faults that were mended are put back, and have to be found.
//!
//! `SWEEP_STORIES` stories (150) are told from `SWEEP_SEED` (1) on; a failure prints the seed and the whole story as
//! command lines: `SWEEP_SEED=1234 SWEEP_STORIES=1 cargo test --test sweep`. `SWEEP_BINARY` is another build of
//! the command, and `SWEEP_WITHOUT=rebase,refuse` leaves out kinds of steps, to see what else goes wrong.

mod guest;
mod image;
mod steps;
mod story;
mod view;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use blockferry::base::planted::Bug;
use story::Story;

fn setting(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")),
        Err(_) => default,
    }
}

/// What stories found, and how many steps of each kind were told by whom.
struct Found {
    faults: Vec<String>,
    tally: BTreeMap<String, u64>,
}

/// Tells `count` stories from `first` on, by a program with this bug; with one, only until it is found.
fn tell(first: u64, count: u64, planted: Option<Bug>) -> Found {
    let next = AtomicU64::new(first);
    let found = Mutex::new(Found { faults: Vec::new(), tally: BTreeMap::new() });
    let is_found = || planted.is_some() && !found.lock().expect("no thread has died").faults.is_empty();
    // Processes are what takes the time, so threads beyond the processors gain little.
    let threads = std::thread::available_parallelism().map_or(2, |n| n.get() as u64).min(count);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + count || is_found() {
                        return;
                    }
                    let mut story = Story::new(seed, planted);
                    let told = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| story.tell()));
                    let mut found = found.lock().expect("no thread has died");
                    for (what, n) in &story.tally {
                        *found.tally.entry(what.clone()).or_insert(0u64) += n;
                    }
                    let fault = match told {
                        Ok(Ok(())) => continue,
                        Ok(Err(text)) => text,
                        Err(panic) => format!("a panic: {}", text_of(&*panic)),
                    };
                    let log = story.log.join("\n  ");
                    found.faults.push(format!("seed {seed}: {fault}\n  {log}"));
                }
            });
        }
    });
    found.into_inner().expect("all have ended")
}

#[test]
fn chains_show_what_the_model_shows_whoever_changes_them() {
    let (first, count) = (setting("SWEEP_SEED", 1), setting("SWEEP_STORIES", 150));
    let Found { faults, tally } = tell(first, count, None);
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

/// Faults that the program once had, put back.
#[test]
fn stories_find_what_was_mended() {
    // Told from about where they show, which saves minutes.
    for (bug, first) in Bug::COMMANDS.into_iter().zip([1, 38, 36, 6]) {
        let Found { faults, .. } = tell(first, 100, Some(bug));
        let fault = faults.first().unwrap_or_else(|| panic!("100 stories did not find {bug:?}"));
        println!("{bug:?}: {}", fault.lines().next().unwrap_or_default());
    }
}

fn text_of(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}
