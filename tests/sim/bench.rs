//! The load generator, its NBD client and our own export in the simulated world: repeatable, under damage, and after a
//! power cut, without a real clock.

use std::cell::RefCell;
use std::io::Write;
use std::rc::Rc;

use blockferry::cli::bench::ack_log::AckLog;
use blockferry::cli::bench::check::{CheckReport, Expectation, check_on};
use blockferry::cli::bench::load::{LoadConfig, LoadControl, LoadOutcome, run_on};
use blockferry::cli::bench::model::Survival;
use blockferry::cli::bench::schedule::Pace;
use blockferry::cli::bench::target::{Target, TargetOptions};
use blockferry::engine::{ImageOptions, open};
use blockferry::export::nbd::{Export, NbdServer, ServerConfig};
use blockferry::graph::node::Root;
use blockferry_ring::sim::{FileModel, Latency, PowerCut, World, WorldConfig};
use blockferry_ring::{Config, Ring, SocketAddress};

const DISK: &str = "/disk";
const SOCKET: &str = "/run/nbd";
const URI: &str = "nbd+unix:///disk?socket=/run/nbd";
const SECOND: u64 = 1_000_000_000;

fn world(seed: u64) -> World {
    let world = World::new(WorldConfig::new(seed));
    world.add_file(DISK, FileModel::regular(4 << 20));
    world
}

fn ring(world: &World) -> Ring {
    Ring::with_backend(world.backend(), &Config::default()).expect("a simulated ring")
}

/// Our own export of the disk, on the same ring.
fn serve(ring: &Ring) -> NbdServer {
    let handle = ring.clone();
    let driver = ring.block_on(async move { open::open(&handle, DISK, &ImageOptions::raw()).await }).unwrap();
    let node = driver.called(DISK);
    let server = NbdServer::new(ring, ServerConfig::default());
    let export = Export {
        root: Root::new(&node, false).unwrap(),
        description: String::new(),
        writable: true,
        default: true,
    };
    server.add_export("disk", export).unwrap();
    server.listen(&SocketAddress::Unix(SOCKET.into())).unwrap();
    server
}

fn load() -> LoadConfig {
    LoadConfig {
        pace: Pace::Closed { depth: 8 },
        read_percent: 40,
        operations: Some(800),
        verify: true,
        flush_every: Some(50),
        ..LoadConfig::default()
    }
}

/// A log that outlives whoever writes it.
#[derive(Clone, Default)]
struct Paper(Rc<RefCell<Vec<u8>>>);

impl Write for Paper {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.borrow_mut().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Paper {
    fn replay(&self, survival: Survival) -> AckLog {
        AckLog::read(&self.0.borrow()[..], "the log", survival).expect("a good log")
    }
}

async fn run_over_nbd(ring: Ring, config: LoadConfig, connections: usize, paper: Paper) -> LoadOutcome {
    let target = Target::of_nbd(&ring, &URI.parse().unwrap(), connections, true).await.expect("a connection");
    let control = LoadControl::new(&ring);
    let outcome = run_on(&ring, &target, &config, &control, Some(Box::new(paper))).await.expect("a load");
    target.close().await;
    outcome
}

/// What a fresh ring finds on the disk.
fn check(world: &World, expectation: Expectation) -> CheckReport {
    let ring = ring(world);
    let handle = ring.clone();
    ring.block_on(async move {
        let target = Target::open(&handle, DISK, &TargetOptions::default()).await.expect("the disk");
        check_on(&handle, &target, expectation).await
    })
}

#[test]
fn one_seed_is_one_history() {
    let history = |seed| {
        let world = world(seed);
        world.add_swarm("");
        let ring = ring(&world);
        let server = serve(&ring);
        let outcome = ring.block_on(run_over_nbd(ring.clone(), load(), 2, Paper::default()));
        assert!(outcome.report.is_good(), "seed {seed}: {}", outcome.report.to_text());
        ring.block_on(async move { server.stop().await });
        (serde_json::to_string(&outcome.report).unwrap(), world.trace_hash())
    };
    for seed in 0..6 {
        assert_eq!(history(seed), history(seed), "seed {seed}");
    }
    assert_ne!(history(1).1, history(2).1);
}

#[test]
fn a_reset_ends_the_load_and_the_log_holds() {
    for seed in 0..12 {
        let world = world(seed);
        let ring = ring(&world);
        let server = serve(&ring);
        let paper = Paper::default();
        let config = LoadConfig { operations: None, duration_ns: Some(20 * SECOND), ..load() };
        let running = ring.spawn_with_result(run_over_nbd(ring.clone(), config, 2, paper.clone()));
        while paper.0.borrow().len() < 2_000 + 100 * seed as usize {
            let _ = ring.turn_blocking();
        }
        assert!(world.reset_streams("") > 0);
        let reset_ns = world.now();
        let outcome = ring.block_on(async move { running.take().await });
        let took_ns = world.now() - reset_ns;
        assert!(
            took_ns < SECOND / 10,
            "seed {seed}: everything in flight fails at once, not after {took_ns} ns"
        );
        assert!(outcome.report.lost && !outcome.report.is_good(), "seed {seed}");
        // What the server had received it carries out; then the disk holds what the log says.
        ring.block_on(async move { server.stop().await });
        let log = paper.replay(Survival::Everything);
        assert!(log.is_complete() && log.acknowledged() > 20, "seed {seed}: {}", log.acknowledged());
        assert_eq!(ring.shutdown(SECOND).leaked, 0);
        let found = check(&world, Expectation::of_log(&log));
        assert!(found.is_good() && found.verified > 10, "seed {seed}: {found:?}");
    }
}

/// Writes until the power goes; gives the log as far as it had come.
fn run_into_a_power_cut(world: &World, fua: bool, how: Option<PowerCut>) -> Paper {
    let ring = ring(world);
    let paper = Paper::default();
    let config = LoadConfig {
        operations: None,
        read_percent: 0,
        verify: false,
        fua,
        flush_every: (!fua).then_some(40),
        ..load()
    };
    let (handle, log) = (ring.clone(), paper.clone());
    ring.spawn(async move {
        let target = Target::open(&handle, DISK, &TargetOptions::default()).await.expect("the disk");
        let control = LoadControl::new(&handle);
        // It never ends; the power goes first.
        let _ = run_on(&handle, &target, &config, &control, Some(Box::new(log))).await;
    });
    while world.now() < 30_000_000 {
        let _ = ring.turn_blocking();
    }
    match how {
        Some(how) => world.power_cut_with(how),
        None => world.power_cut(),
    }
    let _ = ring.shutdown(SECOND);
    paper
}

#[test]
fn what_was_flushed_survives_a_power_cut() {
    let mut unknown = 0;
    for seed in 0..30 {
        let world = world(seed);
        let paper = run_into_a_power_cut(&world, seed % 2 == 0, None);
        let log = paper.replay(Survival::PowerCut);
        assert!(!log.is_complete() && log.acknowledged() > 500, "{}", log.acknowledged());
        let found = check(&world, Expectation::of_log(&log));
        assert!(found.is_good() && found.verified > 50, "seed {seed}: {found:?}");
        unknown += found.unknown;
    }
    assert!(unknown > 0, "some writes were never certain");
}

/// The check is not blind: of a disk that lost its caches, it does not believe what was acknowledged only.
#[test]
fn what_was_only_acknowledged_does_not_survive_and_that_is_seen() {
    let world = world(3);
    let paper = run_into_a_power_cut(&world, false, Some(PowerCut::NOTHING_KEPT));
    let found = check(&world, Expectation::of_log(&paper.replay(Survival::Everything)));
    assert!(found.mismatches.count > 5, "{found:?}");
    let found = check(&world, Expectation::of_log(&paper.replay(Survival::PowerCut)));
    assert!(found.is_good(), "{found:?}");
}

/// A disk that answers in a millisecond and hangs for one second of ten. At 1,000 requests a second 1,000 of 10,000 fall
/// into the hang, and wait half a second on average: 10 % wait longer than the other 90 %. A closed load sees one slow
/// request at each of its places.
#[test]
fn a_stall_is_seen_in_full_by_an_open_load_and_hardly_by_a_closed_one() {
    let measure = |pace| {
        let world = World::new(WorldConfig::new(1));
        let model = FileModel { latency: Latency::fixed(1_000_000), ..FileModel::regular(4 << 20) };
        world.add_file(DISK, model);
        let ring = ring(&world);
        let config = LoadConfig {
            pace,
            read_percent: 100,
            duration_ns: Some(10 * SECOND),
            seed: Some(1),
            ..LoadConfig::default()
        };
        let (handle, stall) = (ring.clone(), world.clone());
        let ring_of_stall = ring.clone();
        ring.spawn(async move {
            ring_of_stall.sleep_until(3 * SECOND).await;
            stall.hang(DISK);
            ring_of_stall.sleep_until(4 * SECOND).await;
            stall.release(DISK);
        });
        let outcome = ring.block_on(async move {
            let target = Target::open(&handle, DISK, &TargetOptions::default()).await.expect("the disk");
            run_on(&handle, &target, &config, &LoadControl::new(&handle), None).await.expect("a load")
        });
        outcome.report
    };
    let open = measure(Pace::Open { rate_per_sec: 1000, poisson: false, depth_max: 16 });
    assert_eq!((open.total.operations, open.unsent), (10_000, 0));
    let part = |ns: u64| open.histogram.quantile(ns as f64 / 10_000.0);
    assert!(part(8_900) < 5_000_000, "{open:?}");
    assert!((350_000_000..650_000_000).contains(&part(9_500)), "{}", part(9_500));
    assert!((850_000_000..1_100_000_000).contains(&part(9_950)), "{}", part(9_950));
    let closed = measure(Pace::Closed { depth: 2 });
    assert!(closed.total.latency.max_ns > 900_000_000);
    assert!(closed.total.latency.p99_9_ns < 5_000_000, "{:?}", closed.total.latency);
}
