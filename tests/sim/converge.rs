//! A guest that writes faster than a mirror copies, in virtual time: what each policy makes of it, how long
//! the door is shut, and what a deadline does.

use std::cell::Cell;
use std::path::Path;
use std::rc::Rc;

use blockferry::base::rng::Rng;
use blockferry::block::WriteFlags;
use blockferry::graph::node::{Node, Root};
use blockferry::job::governor::GuestFirst;
use blockferry::job::mirror::converge::OnDivergence;
use blockferry::job::mirror::{self, MirrorOptions};
use blockferry::job::policy::CopyMode;
use blockferry::job::runner::{Ending, Job};
use blockferry::protocol::open::{OpenOptions, open};
use blockferry_ring::sim::{Fault, FaultRule, FileModel, Latency, OpKind, World, WorldConfig};
use blockferry_ring::sync::{Either, either};
use blockferry_ring::{Config, Ring};

const MIB: u64 = 1 << 20;
const SECOND: u64 = 1_000_000_000;
const LEN: u64 = 128 * MIB;
const DEPTH: usize = 16;

/// A source and a target, and a guest of depth 16 that writes at random, without a pause.
struct Scene {
    world: World,
    ring: Ring,
    source: Rc<Node>,
    target: Rc<Node>,
    stop: Rc<Cell<bool>>,
    writes: Rc<Cell<u64>>,
    latency_max: Rc<Cell<u64>>,
    /// Nanoseconds from the start of the job.
    ready_after: Rc<Cell<u64>>,
}

impl Scene {
    /// With a target that takes 2 ms for a write, the guest dirties about 1 GB a second and half of it is copied.
    fn new(seed: u64) -> Scene {
        let world = World::new(WorldConfig::new(seed));
        let model = |nanos| FileModel { latency: Latency::fixed(nanos), ..FileModel::regular(LEN) };
        world.add_file("/source", model(1_000_000));
        world.add_file("/target", model(2_000_000));
        let config = Config { arena_bytes: 24 << 20, ..Config::default() };
        let ring = Ring::with_backend(world.backend(), &config).expect("a simulated ring");
        let node = |path: &str| {
            let driver = open(&ring, Path::new(path), &OpenOptions::default()).expect("a disk");
            Node::new(&ring, path, driver)
        };
        let (source, target) = (node("/source"), node("/target"));
        let (stop, writes, latency_max, ready_after) = Default::default();
        Scene { world, ring, source, target, stop, writes, latency_max, ready_after }
    }

    fn start_guest(&self, seed: u64) {
        let root = Root::new(&self.source, false).expect("a root");
        for lane in 0..DEPTH as u64 {
            let (ring, root, stop) = (self.ring.clone(), root.clone(), self.stop.clone());
            let (writes, latency_max) = (self.writes.clone(), self.latency_max.clone());
            let mut rng = Rng::new(seed * 100 + lane);
            self.ring.spawn(async move {
                while !stop.get() {
                    let mut buf = ring.alloc(4096).await;
                    buf.as_mut_slice().fill(rng.next_u64() as u8 | 1);
                    let began = ring.clock();
                    let result =
                        root.write(rng.below(LEN / 4096) * 4096, buf.freeze(), WriteFlags::default()).await;
                    assert!(result.is_ok(), "{result:?}");
                    latency_max.set(latency_max.get().max(ring.clock() - began));
                    writes.set(writes.get() + 1);
                }
            });
        }
    }

    fn alike(&self) -> bool {
        self.world.read_live("/source", 0, LEN as usize) == self.world.read_live("/target", 0, LEN as usize)
    }
}

/// Ready within so long, or not.
async fn ready_within(ring: &Ring, job: &Job, nanos: u64) -> bool {
    matches!(either(job.until_ready(), ring.sleep(nanos)).await, Either::First(_)) && job.status().is_ready()
}

fn options(change: impl FnOnce(&mut MirrorOptions)) -> MirrorOptions {
    let mut options = MirrorOptions::new("m");
    options.detect_zeroes = false;
    options.guest_first = GuestFirst::Off;
    options.buf_size = MIB as i64;
    change(&mut options);
    options
}

/// Runs a mirror beside the guest for at most `limit`, and says what became of it.
fn run(seed: u64, limit: u64, options: MirrorOptions) -> (bool, blockferry::job::body::Details, Scene) {
    let scene = Rc::new(Scene::new(seed));
    let s = scene.clone();
    scene.start_guest(seed);
    let (ready, details) = scene.ring.clone().block_on(async move {
        s.ring.sleep(SECOND / 10).await;
        let job = mirror::start(&s.ring, &s.source, &s.target, options).await.expect("a mirror");
        let began = s.ring.clock();
        let ready = ready_within(&s.ring, &job, limit).await;
        s.ready_after.set(s.ring.clock() - began);
        let details = job.details();
        s.latency_max.set(0);
        job.cancel(!ready).expect("a job that can be cancelled");
        let ending = job.until_over().await;
        if ready {
            assert_eq!(ending, Ending::Completed);
            // The instant of the end: the guest stands at the door that has just been opened.
            assert!(s.alike(), "completed, and the disks differ");
        }
        s.stop.set(true);
        s.ring.sleep(SECOND).await;
        (ready, details)
    });
    let Ok(scene) = Rc::try_unwrap(scene) else { panic!("somebody holds the scene") };
    (ready, details, scene)
}

#[test]
fn a_job_that_only_reports_never_catches_up() {
    let (ready, details, _) = run(1, 5 * SECOND, options(|o| o.on_divergence = OnDivergence::Report));
    assert!(!ready, "the guest is not fast enough for this test: {details:?}");
    assert_eq!(details.converges, Some(false));
    assert_eq!(details.copy_mode, CopyMode::Background);
    assert!(details.dirty_bytes_per_sec > details.copy_bytes_per_sec / 4, "{details:?}");
}

#[test]
fn by_default_it_goes_over_to_write_blocking_and_catches_up() {
    for seed in 1..4 {
        let (ready, details, scene) = run(seed, 5 * SECOND, options(|_| ()));
        assert!(ready, "{details:?}");
        assert!(details.bytes_mirrored > 0, "{details:?}");
        assert!(details.bytes_copied < LEN * 3 / 2, "{details:?}");
        assert!(scene.writes.get() > 1000, "the guest went on: {}", scene.writes.get());
    }
}

#[test]
fn write_blocking_from_the_start_copies_everything_once() {
    let (ready, details, _) = run(5, 5 * SECOND, options(|o| o.copy_mode = CopyMode::WriteBlocking));
    assert!(ready && details.actively_synced, "{details:?}");
    assert!(details.bytes_copied <= LEN, "{details:?}");
    assert_eq!(details.copy_mode, CopyMode::WriteBlocking);
}

/// What guests send to both sides is charged to the limit, but never all of it: the job comes to its end.
#[test]
fn a_limit_below_what_guests_write_starves_no_job() {
    let speed = 16 * MIB;
    let (ready, details, _) = run(
        6,
        80 * SECOND,
        options(|o| {
            o.copy_mode = CopyMode::WriteBlocking;
            o.speed = speed as i64;
        }),
    );
    assert!(ready, "{details:?}");
    assert!(details.bytes_mirrored > 10 * speed, "the guest is not fast enough for this test: {details:?}");
}

#[test]
fn a_writer_that_is_slowed_down_lets_the_job_catch_up() {
    let (ready, details, scene) = run(2, 20 * SECOND, options(|o| o.on_divergence = OnDivergence::Throttle));
    assert!(ready, "{details:?}");
    assert_eq!(details.bytes_mirrored, 0);
    assert!(details.bytes_copied < LEN * 2, "{details:?}");
    assert!(scene.writes.get() > 500, "it was slowed, not stopped: {}", scene.writes.get());
}

#[test]
fn no_guest_waits_longer_at_the_door_than_was_said() {
    let bound = 20_000_000;
    let (ready, details, scene) = run(3, 20 * SECOND, options(|o| o.downtime_nanos_max = bound));
    assert!(ready, "{details:?}");
    assert!(details.downtime_nanos <= bound, "{details:?}");
    // From the order to end on: the drain, what was left, the flush.
    assert!(scene.latency_max.get() <= 2 * bound, "{} ns", scene.latency_max.get());
}

/// The device takes longer for its flush than guests are to wait: the door opens again, and the job goes on trying.
#[test]
fn an_end_that_takes_too_long_is_put_off() {
    let scene = Rc::new(Scene::new(7));
    let s = scene.clone();
    scene.start_guest(7);
    scene.ring.clone().block_on(async move {
        let bound = 50_000_000;
        let options = options(|o| {
            o.downtime_nanos_max = bound;
            o.copy_mode = CopyMode::WriteBlocking;
        });
        let job = mirror::start(&s.ring, &s.source, &s.target, options).await.expect("a mirror");
        assert!(ready_within(&s.ring, &job, 5 * SECOND).await);
        let slow = Fault::Delay { nanos_min: SECOND, nanos_max: SECOND };
        s.world.add_fault(FaultRule::new(OpKind::Sync, "/target", 65_536, slow));
        s.latency_max.set(0);
        job.complete().expect("a ready job");
        s.ring.sleep(5 * SECOND).await;
        assert!(job.status().is_ready(), "{}", job.status());
        assert!(s.latency_max.get() < 2 * bound, "{} ns", s.latency_max.get());
        s.world.heal();
        let ended = either(job.until_over(), s.ring.sleep(60 * SECOND)).await;
        assert!(matches!(ended, Either::First(Ending::Completed)), "{}", job.status());
        assert!(s.alike());
        s.stop.set(true);
        s.ring.sleep(SECOND).await;
    });
}

#[test]
fn a_deadline_counts_more_than_the_guests_latency() {
    let strict = |o: &mut MirrorOptions| {
        o.buf_size = 16 * MIB as i64;
        o.guest_first = GuestFirst::Goal(500_000);
        o.copy_mode = CopyMode::WriteBlocking;
    };
    let (ready, details, slow) = run(4, 10 * SECOND, options(strict));
    assert!(ready && details.window_bytes < MIB, "{details:?}");
    let with_deadline = |o: &mut MirrorOptions| {
        strict(o);
        o.deadline_nanos = Some(SECOND / 10);
    };
    let (ready, details, quick) = run(4, 10 * SECOND, options(with_deadline));
    assert!(ready, "{details:?}");
    let (slow, quick) = (slow.ready_after.get(), quick.ready_after.get());
    assert!(quick <= SECOND / 10 && slow > SECOND / 10, "{slow} ns without a deadline, {quick} ns with it");
}
