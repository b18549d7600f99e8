//! qcow2 images in the simulated world: power cuts between any two events, failures of any single operation,
//! and bugs that are planted on purpose and have to be found.
//!
//! After a cut the image opens, a check finds leaks at worst, and every sector holds what was last written
//! before a flush that was acknowledged, or something that was written later.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use blockferry::base::planted::{Bug, plant};
use blockferry::base::rng::Rng;
use blockferry::block::{BlockError, Driver, IoFuture, Node, Permissions, WriteFlags, ZeroFlags};
use blockferry::format::qcow2::{
    Amendment, Backing, Compat, CreateOptions, OpenFiles, OpenOptions, Preallocation, Qcow2, Repair, Wanted,
};
use blockferry::protocol::open::{Cache, OpenOptions as FileOptions};
use blockferry_ring::sim::{Fault, FaultRule, FileModel, OpKind, World, WorldConfig};
use blockferry_ring::{Config, Errno, Ring};

mod rebase;

use common::ledger::{Model, OF_BASE, SECTOR, stamp};

const DISK: &str = "/disk";
const BASE: &str = "/base";

#[derive(Debug)]
struct NoFiles;

impl OpenFiles for NoFiles {
    fn open<'a>(&'a self, wanted: Wanted<'a>) -> IoFuture<'a, Result<Rc<Node>, BlockError>> {
        panic!("'{}' is not to be opened here", wanted.name);
    }
}

/// What an image is like, and what happens to it.
#[derive(Clone, Debug)]
struct Story {
    seed: u64,
    create: CreateOptions,
    backed: bool,
    /// Groups of changes; those of a group run at once.
    steps: usize,
    lanes: u64,
    capacity: Option<u64>,
    /// The file ends inside its last cluster, which the guest has written with zeroes already: they hide what is below.
    ends_early: bool,
}

impl Story {
    fn draw(seed: u64, steps: usize) -> Story {
        let mut rng = Rng::new(seed);
        let mut one = |of: &[u32]| of[rng.below(of.len() as u64) as usize];
        let cluster_size = one(&[512, 512, 4096, 16_384, 65_536]);
        let refcount_bits = one(&[1, 8, 16, 64]);
        let extended_l2 = cluster_size >= 16_384 && one(&[0, 1]) == 1;
        let clusters = u64::from(one(&[5, 40, 90]));
        let size = (clusters * u64::from(cluster_size)).min(600 << 10) - 512 * u64::from(one(&[0, 0, 0]));
        let backed = one(&[0, 1]) == 1;
        let create =
            CreateOptions { size, cluster_size, refcount_bits, extended_l2, ..CreateOptions::default() };
        let lanes = u64::from(one(&[1, 2, 3]));
        let ends_early = one(&[0, 0, 1]) == 1;
        Story { seed, create, backed, steps, lanes, capacity: None, ends_early }
    }
}

fn ring(world: &World) -> Ring {
    let config = Config { arena_bytes: 4 << 20, ..Config::default() };
    Ring::with_backend(world.backend(), &config).expect("a simulated ring")
}

fn file(ring: &Ring, path: &str, read_only: bool) -> Rc<Node> {
    let options = FileOptions { read_only, cache: Cache::Direct, lock: true, ..FileOptions::default() };
    Node::of(ring, blockferry::protocol::open::open(ring, path.as_ref(), &options).expect("the file opens"))
}

async fn open(ring: &Ring, backed: bool, read_only: bool, for_check: bool) -> Result<Rc<Qcow2>, BlockError> {
    let backing = if backed { Backing::Given(file(ring, BASE, true)) } else { Backing::None };
    let options = OpenOptions { read_only, backing, for_check, data_file: None, snapshot: None };
    Qcow2::open(ring, &file(ring, DISK, read_only), &NoFiles, options).await
}

async fn read_all(ring: &Ring, image: &Qcow2) -> Result<Vec<u8>, BlockError> {
    let mut bytes = vec![0; image.len() as usize];
    for (i, piece) in bytes.chunks_mut(64 << 10).enumerate() {
        let (buf, result) = image.read((i as u64) << 16, ring.alloc(piece.len()).await).await;
        result?;
        buf.copy_to(0, piece);
    }
    Ok(bytes)
}

/// What is found in a world after everything has stopped there.
fn inspect(world: &World, story: &Story, model: &Model) -> Result<(), String> {
    let ring = ring(world);
    let (r, backed, model) = (ring.clone(), story.backed, model.clone());
    ring.block_on(async move {
        let told = |what: &str, error: BlockError| format!("{what}: {error}");
        let image = open(&r, backed, true, true).await.map_err(|e| told("opening", e))?;
        let report = image.check(Repair::None).await.map_err(|e| told("checking", e))?;
        if report.corruptions + report.check_errors > 0 {
            return Err(format!("{:?}", report.messages));
        }
        image.set_permissions(Permissions::NONE).map_err(|e| told("unlocking", e))?;
        drop(image);
        let image = open(&r, backed, false, false).await.map_err(|e| told("opening to write", e))?;
        let bytes = read_all(&r, &image).await.map_err(|e| told("reading", e))?;
        model.check(&bytes)
    })
}

/// The world of a story, and what its disk shows before anything happens.
fn world(story: &Story) -> (World, Ring, Model) {
    let world = World::new(WorldConfig::new(story.seed));
    world.add_file(DISK, FileModel { capacity_bytes: story.capacity, ..FileModel::regular(0) });
    let size = story.create.size as usize;
    world.add_file(BASE, FileModel::regular(size as u64));
    let mut base = vec![0; size];
    base.chunks_exact_mut(SECTOR).enumerate().for_each(|(i, sector)| stamp(sector, OF_BASE + i as u32));
    world.write_raw(BASE, 0, &base);
    let ring = ring(&world);
    let (r, create) = (ring.clone(), story.create.clone());
    ring.block_on(async move {
        let disk = file(&r, DISK, false);
        Qcow2::create(&r, &disk, None, &create).await.expect("a new image");
    });
    let of_below = |i| if story.backed { OF_BASE + i as u32 } else { 0 };
    let mut shown: Vec<u32> = (0..size / SECTOR).map(of_below).collect();
    if story.ends_early {
        let (r, story) = (ring.clone(), story.clone());
        let zeroes = ring.block_on(async move { cut_last_cluster(&r, &story).await });
        shown[zeroes].fill(0);
    }
    (world, ring, Model::of(shown.into_iter()))
}

/// A cluster of the disk is written with zeroes, and the file cut inside it: the disk shows zeroes there. Gives its
/// sectors.
async fn cut_last_cluster(ring: &Ring, story: &Story) -> std::ops::Range<usize> {
    let mut rng = Rng::new(story.seed ^ 0xc07);
    let cluster = u64::from(story.create.cluster_size);
    let at = rng.below(story.create.size.div_ceil(cluster)) * cluster;
    let image = open(ring, false, false, false).await.expect("it opens");
    let len = cluster.min(story.create.size - at);
    let mut buf = ring.alloc(len as usize).await;
    buf.as_mut_slice().fill(0);
    image.write(at, buf.freeze(), WriteFlags::default()).await.expect("a write");
    image.flush().await.expect("a flush");
    let place = image.map(at, 1).await.expect("a map").offset.expect("it is data");
    image.set_permissions(Permissions::NONE).expect("unlocked");
    drop(image);
    let disk = file(ring, DISK, false);
    disk.set_len(place + 1 + rng.below(cluster - 1)).await.expect("a cut");
    disk.flush().await.expect("a flush");
    at as usize / SECTOR..(at + len) as usize / SECTOR
}

/// Tells the story; errors of requests are for the model alone. Gives the image, if it opened and gave back what was
/// written.
async fn tell(ring: Ring, story: Story, model: Rc<RefCell<Model>>, flush: bool) -> Result<Rc<Qcow2>, String> {
    let told = |error: BlockError| error.to_string();
    let image = open(&ring, story.backed, false, false).await.map_err(told)?;
    let all_went_well = Rc::new(Cell::new(true));
    let mut rng = Rng::new(story.seed ^ 0x5eed);
    let sectors = story.create.size / SECTOR as u64;
    for step in 0..story.steps as u32 {
        let lane_len = sectors / story.lanes;
        let (mut running, mut asked) = (Vec::new(), 0..0);
        for lane in 0..story.lanes {
            if lane_len == 0 {
                continue;
            }
            let first = lane * lane_len + rng.below(lane_len);
            let room = (lane + 1) * lane_len - first;
            let longest = 1 + (2 << rng.below(7));
            let n = 1 + rng.below(room.min(longest));
            let range = first as usize..(first + n) as usize;
            let version = step * 8 + lane as u32 + 1;
            let (kind, fua) = (rng.below(8), rng.chance(6000));
            let (at, len) = (first * SECTOR as u64, n * SECTOR as u64);
            asked = range.clone();
            let (image, r, m, well) = (image.clone(), ring.clone(), model.clone(), all_went_well.clone());
            let zero = (5..8).contains(&kind);
            m.borrow_mut().issue(range.clone(), if zero { 0 } else { version }, kind == 7);
            running.push(ring.spawn_with_result(async move {
                let result = match kind {
                    0..5 => {
                        let mut buf = r.alloc(len as usize).await;
                        stamp(buf.as_mut_slice(), version);
                        image.write(at, buf.freeze(), WriteFlags { fua }).await
                    }
                    5 | 6 => {
                        let flags = ZeroFlags { may_unmap: kind == 5, fua, ..ZeroFlags::default() };
                        image.write_zeroes(at, len, flags).await
                    }
                    _ => image.discard(at, len).await,
                };
                match result {
                    Ok(()) => m.borrow_mut().ack(range),
                    Err(_) => well.set(false),
                }
            }));
        }
        let flushing = flush && rng.chance(20_000);
        if flushing {
            let began = model.borrow().clock;
            if image.flush().await.is_ok() {
                model.borrow_mut().flushed(began);
            }
        }
        for result in running {
            result.take().await;
        }
        if story.ends_early && all_went_well.get() {
            // Whoever has written reads it, whether the file has grown in the meantime or not.
            let (buf, result) =
                image.read((asked.start * SECTOR) as u64, ring.alloc(asked.len() * SECTOR).await).await;
            result.map_err(told)?;
            model.borrow().check_range(asked.start, buf.as_slice())?;
        }
    }
    let began = model.borrow().clock;
    if image.flush().await.is_ok() {
        model.borrow_mut().flushed(began);
    }
    Ok(image)
}

/// Tells a story and cuts the power after every turn in which something happened (or now and then).
fn cut_everywhere(story: &Story, every: u64, cuts: u64) -> Result<u64, String> {
    let (world, ring, model) = world(story);
    let model = Rc::new(RefCell::new(model));
    let told = ring.spawn_with_result(tell(ring.clone(), story.clone(), model.clone(), true));
    let mut inspected = 0;
    let mut seen = world.events();
    while !told.is_given() {
        let _ = ring.turn_blocking();
        if world.events() < seen + every {
            continue;
        }
        seen = world.events();
        for cut in 0..cuts {
            let after = world.fork_after_power_cut(seen * 10 + cut);
            inspect(&after, story, &model.borrow())
                .map_err(|why| format!("seed {} at event {seen}: {why}\n{story:?}", story.seed))?;
            inspected += 1;
        }
    }
    let image = told.try_take().ok_or("the story did not end")?;
    let image = image.map_err(|why| format!("seed {}: {why}\n{story:?}", story.seed))?;
    let bytes = ring.block_on({
        let ring = ring.clone();
        async move { read_all(&ring, &image).await }
    });
    let bytes = bytes.map_err(|error| error.to_string())?;
    model.borrow().check_live(&bytes).map_err(|why| format!("seed {}: {why}\n{story:?}", story.seed))?;
    Ok(inspected)
}

#[test]
fn a_power_cut_at_every_event_of_small_histories() {
    let mut inspected = 0;
    for seed in 0..80 {
        inspected += cut_everywhere(&Story::draw(seed, 5), 1, 3).unwrap();
    }
    assert!(inspected > 5000, "{inspected}");
}

#[test]
fn power_cuts_at_random_in_long_histories() {
    let mut inspected = 0;
    for seed in 1000..1030 {
        inspected += cut_everywhere(&Story::draw(seed, 150), 53, 2).unwrap();
    }
    assert!(inspected > 300, "{inspected}");
}

#[test]
fn planted_bugs_are_found() {
    for bug in Bug::QCOW2 {
        plant(Some(bug));
        let found = (0..400).find_map(|seed| cut_everywhere(&Story::draw(seed, 8), 3, 2).err());
        plant(None);
        let why = found.unwrap_or_else(|| panic!("{bug:?} was not found"));
        println!("{bug:?}: {}", why.chars().take(300).collect::<String>());
    }
}

/// One operation of each kind fails, whichever; afterwards nothing overlaps and nothing is lost but what failed.
#[test]
fn any_single_failure_is_undone() {
    let mut struck = 0;
    for (kind, errno) in [
        (OpKind::Write, Errno::EIO),
        (OpKind::Write, Errno::ENOSPC),
        (OpKind::SetLen, Errno::ENOSPC),
        (OpKind::Read, Errno::EIO),
        (OpKind::PunchHole, Errno::EIO),
        (OpKind::Sync, Errno::EIO),
    ] {
        for seed in 0..4 {
            for nth in 1..60 {
                let story = Story::draw(seed + 77, 6);
                let (world, ring, model) = world(&story);
                let model = Rc::new(RefCell::new(model));
                world.fail_nth(kind, DISK, nth, errno);
                let (r, s, m) = (ring.clone(), story.clone(), model.clone());
                let _image = ring.block_on(async move { tell(r, s, m, true).await });
                if world.one_shots_left() > 0 {
                    break;
                }
                struck += 1;
                world.heal();
                for cut in 0..2 {
                    inspect(&world.fork_after_power_cut(cut), &story, &model.borrow())
                        .unwrap_or_else(|why| panic!("{kind:?} number {nth}: {why}\n{story:?}"));
                }
            }
        }
    }
    assert!(struck > 200, "{struck}");
}

/// What does not fit is refused, and room that comes later is used.
#[test]
fn an_image_that_runs_out_of_room_goes_on_when_there_is_some() {
    for seed in 0..6 {
        let story = Story { capacity: Some(96 << 10), ..Story::draw(seed + 500, 30) };
        let (world, ring, model) = world(&story);
        let model = Rc::new(RefCell::new(model));
        let (r, s, m) = (ring.clone(), story.clone(), model.clone());
        let image = ring.block_on(async move { tell(r, s, m, true).await }).expect("it opens");
        world.change_model(DISK, |model| model.capacity_bytes = None);
        let flushed = ring.block_on(async move { image.flush().await });
        flushed.expect("what could not be written is written now");
        inspect(&world.fork_after_power_cut(1), &story, &model.borrow()).unwrap();
    }
}

/// Going back to version 2, and not; zeroes in two places.
const TO_V2: usize = 11;
const TO_V3: usize = 12;
const ZEROES: usize = 13;

/// What else changes an image: each is cut at every event.
async fn administer(image: &Qcow2, act: usize) {
    let result = match act {
        0 => image.resize(40 << 20, Preallocation::Off).await,
        1 => image.resize(20 << 10, Preallocation::Off).await,
        2 => image.resize(400 << 10, Preallocation::Metadata).await,
        3 => image.snapshot_create("s", (1, 2)).await.map(drop),
        4 => image.snapshot_create("t", (1, 2)).await.map(drop),
        5 => image.snapshot_apply("s").await,
        6 => image.snapshot_delete("s").await,
        7 => image.set_backing(Some(("a-name-that-is-longer-than-the-other-one", Some("raw")))).await,
        8 => image.set_backing(Some(("b", None))).await,
        9 => image.make_empty().await,
        10 => image.amend(&Amendment { lazy_refcounts: Some(true), ..Amendment::default() }).await,
        TO_V2 => image.amend(&Amendment { compat: Some(Compat::V2), ..Amendment::default() }).await,
        TO_V3 => image.amend(&Amendment { compat: Some(Compat::V3), ..Amendment::default() }).await,
        ZEROES => {
            let flags = ZeroFlags { may_unmap: false, ..ZeroFlags::default() };
            let (head, tail) =
                (image.write_zeroes(0, 4096, flags), image.write_zeroes(60 << 10, 3072, flags));
            match head.await.and(tail.await) {
                Ok(()) => image.flush().await,
                failed => failed,
            }
        }
        bits => {
            let refcount_bits = Some(bits as u32 - 100);
            image.amend(&Amendment { refcount_bits, ..Amendment::default() }).await
        }
    };
    result.expect("it works");
}

/// What is found after a cut.
#[derive(Debug)]
struct Found {
    bytes: Vec<u8>,
    backing: Option<String>,
    compat: Compat,
    /// It said that it was dirty.
    dirty: bool,
    /// What a check found before anything was repaired.
    corruptions: u64,
}

/// Opens what a cut has left: as it is; then to write, which repairs what says that it is dirty; then again.
fn open_after_cut(world: &World) -> Result<Found, String> {
    let ring = ring(world);
    let r = ring.clone();
    ring.block_on(async move {
        let told = |what: &str, error: BlockError| format!("{what}: {error}");
        let look = async || {
            let image = open(&r, false, true, true).await.map_err(|e| told("opening", e))?;
            let report = image.check(Repair::None).await.map_err(|e| told("checking", e))?;
            let info = image.info().await.map_err(|e| told("facts", e))?;
            let bytes = read_all(&r, &image).await.map_err(|e| told("reading", e))?;
            image.set_permissions(Permissions::NONE).map_err(|e| told("unlocking", e))?;
            Ok::<_, String>((report, info, bytes))
        };
        let (report, info, bytes) = look().await?;
        let only_marks =
            report.messages.iter().all(|line| !line.starts_with("ERROR") || line.contains("OFLAG_COPIED"));
        let allowed = report.corruptions == 0 || (only_marks && info.dirty);
        if !allowed || report.check_errors > 0 {
            return Err(format!("dirty: {}, {:?}", info.dirty, report.messages));
        }
        let image = open(&r, false, false, false).await.map_err(|e| told("opening to write", e))?;
        image.set_permissions(Permissions::NONE).map_err(|e| told("unlocking", e))?;
        drop(image);
        let (again, info_again, bytes_again) = look().await?;
        let repaired = again.corruptions == 0 && (again.leaks == 0 || !info.dirty);
        if info_again.dirty || !repaired || bytes != bytes_again {
            return Err(format!("after a repair: {:?}", again.messages));
        }
        let backing = info.backing_filename;
        let (dirty, compat) = (info.dirty, info.compat);
        Ok(Found { bytes, backing, compat, dirty, corruptions: report.corruptions })
    })
}

/// After a cut in the midst of one of these the image opens, and its disk is as before or as after. A check finds
/// leaks at worst, or the image says that it is dirty, and is whole once it was opened to be written. An image of
/// version 2 is of version 3 meanwhile, which can say so.
#[test]
fn a_power_cut_at_every_event_of_what_else_changes_an_image() {
    let (mut inspected, mut dirty, mut damaged) = (0, 0, 0);
    let others = [
        vec![0],
        vec![1],
        vec![2],
        vec![7, 8],
        vec![9],
        vec![10, 9],
        vec![101, 164, 108, 2],
        vec![ZEROES, 7, TO_V2, TO_V3, 8],
        vec![ZEROES, TO_V2],
    ];
    let snapshots = [
        vec![3, 4, 5, 6],
        vec![3, 6],
        vec![3, 5, 4, 6],
        vec![3, 9, 5],
        vec![3, 4, 104, 5, 164, 6],
        vec![ZEROES, 3, ZEROES, 4, 7, TO_V2, 5, 6],
        vec![3, ZEROES, TO_V2, 5],
    ];
    for (seed, acts) in others.into_iter().chain(snapshots).enumerate() {
        for v2 in [false, true] {
            if v2 && (acts[0] != 3 || acts.iter().any(|act| *act > 10)) {
                continue;
            }
            let (size, compat) = (200 << 10, if v2 { Compat::V2 } else { Compat::V3 });
            let create = CreateOptions {
                size,
                cluster_size: 512,
                refcount_bits: 16,
                compat,
                ..CreateOptions::default()
            };
            let seed = seed as u64 + 1;
            let story =
                Story { seed, create, backed: false, steps: 12, lanes: 2, capacity: None, ends_early: false };
            let (world, ring, model) = world(&story);
            let model = Rc::new(RefCell::new(model));
            let (r, s) = (ring.clone(), story.clone());
            let image = ring.block_on(async move { tell(r, s, model, true).await }).expect("it opens");
            for act in acts.iter().copied() {
                let read = |world: &World| {
                    open_after_cut(world).unwrap_or_else(|why| panic!("seed {seed}, act {act}: {why}"))
                };
                let before = read(&world.fork_after_power_cut(1));
                let i = image.clone();
                let done = ring.spawn_with_result(async move { administer(&i, act).await });
                let mut seen = world.events();
                let mut found = Vec::new();
                while !done.is_given() {
                    let _ = ring.turn_blocking();
                    if world.events() > seen {
                        seen = world.events();
                        found.extend((0..4).map(|cut| read(&world.fork_after_power_cut(seen * 4 + cut))));
                    }
                }
                let after = read(&world.fork_after_power_cut(2));
                assert!(!before.dirty && !after.dirty, "act {act}: a mark was forgotten");
                let wanted = match act {
                    TO_V2 => Compat::V2,
                    TO_V3 => Compat::V3,
                    _ => before.compat,
                };
                assert_eq!(after.compat, wanted, "act {act}");
                if act == ZEROES {
                    continue; // Two requests, of which a cut may leave one.
                }
                inspected += found.len();
                for state in found {
                    dirty += u32::from(state.dirty);
                    damaged += u32::from(state.dirty && state.corruptions > 0);
                    let cut = |a: &[u8], b: &[u8]| a.starts_with(b) || b.starts_with(a);
                    let same = [&before, &after].iter().any(|known| {
                        let bytes = (&state.bytes, &known.bytes);
                        state.backing == known.backing
                            && cut(bytes.0, bytes.1)
                            && bytes.0.len() == bytes.1.len()
                    });
                    assert!(same, "act {act}: neither as before nor as after");
                }
            }
        }
    }
    println!(
        "{inspected} cuts; {dirty} left an image that was dirty, {damaged} of them one that needed repair"
    );
    assert!(inspected > 900 && dirty > 100 && damaged > 20, "{inspected} {dirty} {damaged}");
}

/// Reads of many clusters, of an image and of what is below it: short transfers are finished, and an operation that
/// fails once is asked for again by whoever knows what it means. Never do bytes end up in a wrong place.
#[test]
fn reads_of_many_places_come_whole_through_short_transfers_and_failures() {
    let (mut gathered, mut shorts, mut struck) = (0, 0, 0);
    for seed in 200..212 {
        let story = Story { backed: true, ..Story::draw(seed, 25) };
        let (world, ring, model) = world(&story);
        let model = Rc::new(RefCell::new(model));
        let (r, s, m) = (ring.clone(), story.clone(), model.clone());
        let image = ring.block_on(async move { tell(r, s, m, true).await }).expect("it opens");
        let read = |image: &Rc<Qcow2>| {
            let (r, image) = (ring.clone(), image.clone());
            ring.block_on(async move { read_all(&r, &image).await })
        };
        let bytes = read(&image).expect("bytes");
        model.borrow().check_live(&bytes).unwrap();
        world.add_fault(FaultRule::new(OpKind::Read, "/", 30_000, Fault::Short));
        world.add_fault(FaultRule::new(OpKind::Read, "/", 10_000, Fault::Again));
        assert!(read(&image).expect("bytes") == bytes, "seed {seed}");
        shorts += world.fault_counts().shorts;
        world.heal();
        for (nth, path) in (1..12).flat_map(|nth| [(nth, DISK), (nth, BASE)]) {
            world.fail_nth(OpKind::Read, path, nth, Errno::EIO);
            if let Ok(found) = read(&image) {
                assert!(found == bytes, "seed {seed}, read number {nth} of {path}");
            }
            struck += u32::from(world.one_shots_left() == 0);
            world.heal();
        }
        gathered += image.counted().gathered;
    }
    assert!(gathered > 200 && shorts > 100 && struck > 100, "{gathered} {shorts} {struck}");
}

#[test]
fn the_gate_is_not_asked_for_what_is_given() {
    for ends_early in [false, true] {
        let story = Story { backed: true, ends_early, ..Story::draw(3, 0) };
        let (_world, ring, model) = world(&story);
        let r = ring.clone();
        let bytes = ring.block_on(async move {
            let image = open(&r, true, true, false).await.unwrap();
            read_all(&r, &image).await.unwrap()
        });
        model.check_live(&bytes).unwrap();
    }
}
