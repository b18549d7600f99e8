//! Commit and stream in the simulated world: random chains, guests, verbs, faults and power cuts, thousands of times.
//!
//! Each seed draws a chain ([`story::Story`]): layers of any length and cluster size, over a raw base or a qcow2 one. A
//! guest writes, zeroes, discards and reads through it while jobs run on disjoint parts of it, or are refused where
//! they share one ([`life`]). At random events the power is cut in a copy of the world: the chain opens, a check finds
//! leaks at worst, every acknowledged and flushed write is there, and the job can be run again. At the end of each job
//! its promise is checked byte by byte, and that nothing of it is left behind.
//!
//! ```text
//! SIM_SEEDS=100000 SIM_FIRST=20000 cargo test --test sim chains::no_update    more seeds, others
//! BLOCKFERRY_SEED=1234 cargo test --test sim chains::one_seed -- --nocapture     one of them
//! ```

mod life;
mod story;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use blockferry::base::planted::{Bug, plant};

use crate::counts::Counts;
use story::Story;

/// How many seeds are run.
const SEEDS: u64 = 10_000;
/// Threads that share them.
const THREADS: u64 = 2;

/// What every run of the whole must have met at least once.
const EXPECTED: &[&str] = &[
    "bases compared with what was merged",
    "commits, active",
    "commits, intermediate",
    "streams, part",
    "streams, whole",
    "endings: cancelled",
    "endings: completed",
    "endings: failed",
    "guests: discards",
    "guests: errors",
    "guests: flushes",
    "guests: reads",
    "guests: writes",
    "guests: zeroes",
    "jobs refused",
    "jobs run again after a cut",
    "pauses",
    "pivots",
    "power cuts looked at",
    "power cuts after a chain had changed",
    "soft cancels of ready jobs",
    "speed changes",
    "stops by an error",
    "two jobs at once",
];

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

fn run_one(seed: u64, bug: Option<Bug>) -> Result<Counts, String> {
    let told = std::panic::catch_unwind(|| {
        plant(bug);
        life::run(&Story::draw(seed))
    });
    plant(None);
    match told {
        Ok(result) => result,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            Err(format!("panic: {}", text.unwrap_or_default()))
        }
    }
}

/// Runs seeds on all threads until all are run or one fails: the first that does.
fn run_seeds(count: u64, bug: Option<Bug>) -> (Counts, Option<(u64, String)>) {
    let first = number("SIM_FIRST").unwrap_or(1);
    let (next, stop_before) = (AtomicU64::new(0), AtomicU64::new(count));
    let worker = || {
        let (mut counts, mut failed) = (Counts::default(), None::<(u64, String)>);
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= stop_before.load(Ordering::Relaxed) {
                return (counts, failed);
            }
            match run_one(first + index, bug) {
                Ok(more) => counts.merge(&more),
                Err(why) => {
                    stop_before.fetch_min(index, Ordering::Relaxed);
                    if failed.as_ref().is_none_or(|(seed, _)| first + index < *seed) {
                        failed = Some((first + index, why));
                    }
                }
            }
        }
    };
    std::thread::scope(|scope| {
        let handles: Vec<_> = (0..THREADS).map(|_| scope.spawn(worker)).collect();
        let (mut counts, mut failed) = (Counts::default(), None::<(u64, String)>);
        for handle in handles {
            let (more, failure) = handle.join().expect("a thread that catches panics");
            counts.merge(&more);
            failed = [failed, failure].into_iter().flatten().min_by_key(|(seed, _)| *seed);
        }
        (counts, failed)
    })
}

#[test]
fn no_update_is_lost() {
    let (count, started) = (number("SIM_SEEDS").unwrap_or(SEEDS), Instant::now());
    let (counts, failed) = run_seeds(count, None);
    println!("{count} seeds, {:.1} s\n{counts}", started.elapsed().as_secs_f64());
    if let Some((seed, why)) = failed {
        panic!(
            "seed {seed}: {why}\nrun it alone:\n  BLOCKFERRY_SEED={seed} cargo test --test sim chains::one_seed -- --nocapture"
        );
    }
    let missing: Vec<_> = EXPECTED.iter().filter(|what| counts.get(what) == 0).collect();
    assert!(count < SEEDS || missing.is_empty(), "never happened: {missing:?}");
}

#[test]
fn planted_bugs_are_found() {
    for bug in Bug::CHAINS {
        match run_seeds(number("SIM_SEEDS").unwrap_or(SEEDS), Some(bug)).1 {
            Some((seed, why)) => {
                println!("{bug:?}: found by seed {seed}: {}", why.chars().take(200).collect::<String>());
            }
            None => panic!("{bug:?} was not found"),
        }
    }
}

#[test]
fn the_same_seed_tells_the_same_story() {
    for seed in 1..100 {
        let hash = |result: Result<Counts, String>| result.map(|counts| counts.hash());
        assert_eq!(hash(run_one(seed, None)), hash(run_one(seed, None)), "seed {seed}");
    }
}

/// Runs the seed in `BLOCKFERRY_SEED`; without one there is nothing to do.
#[test]
fn one_seed() {
    let Some(seed) = number("BLOCKFERRY_SEED") else { return };
    let story = Story::draw(seed);
    println!("{story:#?}");
    let counts = life::run(&story).unwrap_or_else(|why| panic!("seed {seed}: {why}"));
    println!("{counts}");
}
