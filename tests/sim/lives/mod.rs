//! The whole engine in a simulated world: guests, jobs, faults, users and power cuts at random, thousands of
//! times, and after each step the question whether anything was lost.
//!
//! Each seed draws a plan ([`plan`]): the disk, its guests, the jobs that move it, what users do to them and
//! what goes wrong. Everything runs in one thread and in virtual time, so a seed tells the same story every
//! time. Guests' answers are compared with a plain model of the disk ([`model`]); at each end of a job source,
//! target and model are compared byte for byte in the very instant ([`watch`]); at random times somebody looks
//! what a power cut would leave; and each job, each request and each life has to come to its end.
//!
//! ```text
//! SIM_SEEDS=100000 SIM_FIRST=20000 cargo test --test sim lives::no_update    more seeds, others
//! BLOCKFERRY_SEED=1234 cargo test --test sim lives::one_seed -- --nocapture     one of them
//! ```
//!
//! That the harness finds what it is there to find is shown by bugs planted in the engine
//! ([`blockferry::base::planted`]): each has to be found within the same seeds.

mod director;
mod disk;
mod guest;
mod life;
mod model;
mod nbd;
mod plan;
mod rig;
mod watch;
mod world;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use blockferry::base::planted::Bug;

use crate::counts::Counts;
use life::Outcome;
use plan::Plan;

/// The first seed of a run when none is named.
const SEED_FIRST: u64 = 1;
/// How many are run.
const SEEDS: u64 = 10_000;
/// How many are run twice, to see that they do not differ.
const SEEDS_TWICE: u64 = 200;
/// Threads that share them.
const THREADS: u64 = 2;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

fn seeds() -> u64 {
    number("SIM_SEEDS").unwrap_or(SEEDS)
}

fn seed_first() -> u64 {
    number("SIM_FIRST").unwrap_or(SEED_FIRST)
}

fn command(seed: u64) -> String {
    format!("BLOCKFERRY_SEED={seed} cargo test --test sim lives::one_seed -- --nocapture")
}

/// Runs seeds on all threads until all are run or one fails.
fn run_seeds(count: u64, bug: Option<Bug>) -> (Counts, u64, Option<(u64, String)>) {
    let next = AtomicU64::new(0);
    let stop_before = AtomicU64::new(count);
    let results: Vec<_> = std::thread::scope(|scope| {
        let worker = || {
            let mut counts = Counts::default();
            let (mut turns, mut failed) = (0, None::<(u64, String)>);
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                // A seed before the first failure is run to the end, so that the first one is always the same.
                if index >= stop_before.load(Ordering::Relaxed) {
                    return (counts, turns, failed);
                }
                let seed = seed_first() + index;
                let outcome = life::run(Plan::draw(seed), bug);
                counts.merge(&outcome.counts);
                turns += outcome.turns;
                if let Some(what) = outcome.failure {
                    stop_before.fetch_min(index, Ordering::Relaxed);
                    if failed.as_ref().is_none_or(|(earlier, _)| seed < *earlier) {
                        failed = Some((seed, what));
                    }
                }
            }
        };
        let handles: Vec<_> = (0..THREADS).map(|_| scope.spawn(worker)).collect();
        handles.into_iter().map(|handle| handle.join().expect("a thread that catches panics")).collect()
    });
    let mut all = Counts::default();
    let (mut turns, mut failed) = (0, None::<(u64, String)>);
    for (counts, n, failure) in results {
        all.merge(&counts);
        turns += n;
        failed = match (failed, failure) {
            (Some(a), Some(b)) => Some(if a.0 < b.0 { a } else { b }),
            (a, b) => a.or(b),
        };
    }
    (all, turns, failed)
}

#[test]
fn no_update_is_lost() {
    let (count, started) = (seeds(), Instant::now());
    let (counts, turns, failed) = run_seeds(count, None);
    println!("{count} seeds, {turns} turns, {:.1} s\n{counts}", started.elapsed().as_secs_f64());
    if let Some((seed, what)) = failed {
        panic!("seed {seed}: {what}\nrun it alone:\n  {}", command(seed));
    }
    let missing = counts.missing();
    assert!(count < SEEDS || missing.is_empty(), "never happened: {missing:?}");
}

#[test]
fn planted_bugs_are_found() {
    for bug in Bug::ALL {
        let (_, _, failed) = run_seeds(seeds(), Some(bug));
        match failed {
            Some((seed, what)) => println!("{bug:?}: found by seed {seed}: {what}"),
            None => panic!("{bug:?} was not found in {} seeds", seeds()),
        }
    }
}

#[test]
fn fifty_pivots_to_and_fro() {
    let outcome = life::run(Plan::pendulum(SEED_FIRST, 50), None);
    println!("{}", outcome.counts);
    assert_eq!(outcome.failure, None);
    let counts = &outcome.counts;
    assert_eq!((counts.get("pivots"), counts.get("pivots back")), (50, 25));
    assert!(counts.get("guests: requests that waited at the door") > 0);
}

#[test]
fn the_same_seed_tells_the_same_story() {
    for seed in seed_first()..seed_first() + SEEDS_TWICE {
        let Outcome { hash, .. } = life::run(Plan::draw(seed), None);
        let again = life::run(Plan::draw(seed), None).hash;
        assert_eq!(hash, again, "two runs differ\n  {}", command(seed));
    }
}

/// Runs the seed in `BLOCKFERRY_SEED`; without one there is nothing to do.
#[test]
fn one_seed() {
    let Some(seed) = number("BLOCKFERRY_SEED") else { return };
    let plan = Plan::draw(seed);
    println!("{plan:#?}");
    let outcome = life::run(plan, None);
    println!("{}", outcome.counts);
    if let Some(what) = outcome.failure {
        panic!("seed {seed}: {what}");
    }
}
