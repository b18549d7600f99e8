//! qcow2 images that were bred to be strange: headers and extensions, L1, L2 and refcount tables, bitmaps, snapshots.
//!
//! The images that breeding starts from are made here, by the program that is tested ([`corpus`]); an input is one
//! of them and a list of patches. Each target patches its own kind of table. An input that makes the image behave in
//! a way not seen before is kept and bred from. There is no instrumentation: a way is the list of what opening,
//! checking, reading, writing, snapshots and repairs said.
//!
//! What must hold whatever comes: no panic, no other file opened without asking, an end after a bounded number of
//! operations and within bounded memory, no file that grows as an image likes, and a repair that says that all is
//! well leaves an image of which a second check says the same. A failure prints the input. `FUZZ_SECONDS` is the time
//! that all targets take, side by side (half a second if it is not set; `tests/run` sets 20).

mod images;

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use blockferry::base::rng::Rng;
use blockferry::block::{BlockError, Driver, IoFuture, Node, Operation, Permissions, WriteFlags, ZeroFlags};
use blockferry::format::qcow2::{Backing, OpenFiles, OpenOptions, Qcow2, Repair, Wanted};
use blockferry_ring::sim::{FileModel, World, WorldConfig};
use blockferry_ring::{Errno, Ring};
use images::{DISK, Image, Kind, corpus, file, new_ring};

/// Inputs that are kept at most, and patches of one.
const CORPUS_MAX: usize = 3000;
const PATCHES_MAX: usize = 24;
/// Inputs that each target runs, however little time there is.
const RUNS_MIN: u64 = 40;
/// Operations of the reactor that one input takes at most.
const OPERATIONS_MAX: u64 = 300_000;
/// A file takes at most so much more room. Its length says little: garbage that counts references can claim that all is in
/// use for gigabytes, and what is new lies behind that, after a hole.
const GROWTH_BYTES_MAX: u64 = 64 << 20;
/// Memory of the process with all targets, at any time.
const MEMORY_BYTES_MAX: u64 = 2 << 30;
/// An input that takes so long has no end.
const HANG: Duration = Duration::from_secs(120);
/// Disks are read and changed as a whole up to this length, and at some places beyond.
const WHOLE_BYTES_MAX: u64 = 192 << 10;

fn span() -> Duration {
    let said = std::env::var("FUZZ_SECONDS").ok().and_then(|text| text.parse().ok());
    Duration::from_secs_f64(said.unwrap_or(0.5))
}

/// One of the images, and what is done to it.
#[derive(Clone, Debug, Default)]
struct Input {
    image: usize,
    /// The file ends here instead.
    len: Option<u64>,
    patches: Vec<(u64, Vec<u8>)>,
    /// What is done with it, and in which order.
    seed: u64,
}

impl Input {
    fn mutate(&mut self, rng: &mut Rng, images: &[Image], kind: Kind, other: &Input) {
        let image = &images[self.image];
        for _ in 0..1 + rng.below(3) {
            match rng.below(12) {
                0 if !self.patches.is_empty() => {
                    let at = rng.below(self.patches.len() as u64) as usize;
                    drop(self.patches.swap_remove(at));
                }
                1 if other.image == self.image => {
                    let n = rng.below(other.patches.len() as u64 + 1) as usize;
                    self.patches.extend_from_slice(&other.patches[..n]);
                }
                2 if rng.below(4) == 0 => {
                    let len = image.bytes.len() as u64;
                    self.len = Some([rng.below(len), 1 << (20 + rng.below(35)), len][rng.below(3) as usize]);
                }
                3 => self.seed = rng.next_u64(),
                _ => self.patches.push(patch(rng, image, kind)),
            }
        }
        self.patches.truncate(PATCHES_MAX);
    }

    fn world(&self, images: &[Image]) -> World {
        let image = &images[self.image];
        let world = World::new(WorldConfig::new(1));
        let mut bytes = image.bytes.clone();
        for (at, patch) in &self.patches {
            let at = (*at as usize).min(bytes.len());
            let n = patch.len().min(bytes.len() - at);
            bytes[at..at + n].copy_from_slice(&patch[..n]);
        }
        let len = self.len.unwrap_or(bytes.len() as u64);
        bytes.truncate(len.min(bytes.len() as u64) as usize);
        world.add_file(DISK, FileModel::regular(len));
        world.write_raw(DISK, 0, &bytes);
        world
    }
}

/// A change somewhere in the tables of a kind: mostly a whole field, and mostly to what a field might hold.
fn patch(rng: &mut Rng, image: &Image, kind: Kind) -> (u64, Vec<u8>) {
    let places = image.places(kind);
    let (from, to) = places[rng.below(places.len() as u64) as usize];
    let width = [1u64, 2, 4, 8, 8, 8][rng.below(6) as usize];
    let at = from + rng.below((to - from).div_ceil(width)) * width;
    let size = image.cluster_size;
    let clusters = (image.bytes.len() as u64).div_ceil(size);
    let number = match rng.below(10) {
        0 => [0, 1, 2, 3, u64::MAX, u64::MAX >> 1, 1 << 32, 0x7fff_ffff][rng.below(8) as usize],
        1 => 1 << rng.below(64),
        2 => rng.below(200),
        3 => (1 << 55) | rng.below(4) << 20,
        4 => rng.next_u64(),
        5 => (rng.below(clusters) * size) | (1 << 62) | (rng.below(64) << 54),
        6 => rng.below(clusters * size),
        7 => (rng.below(clusters * 2) * size) | 1,
        _ => (rng.below(clusters) * size) | (rng.below(2) << 63),
    };
    (at, number.to_be_bytes()[8 - width as usize..].to_vec())
}

/// Nobody gets another file; whoever is refused says so.
#[derive(Debug)]
struct NoFiles(Ring);

impl OpenFiles for NoFiles {
    fn open<'a>(&'a self, wanted: Wanted<'a>) -> IoFuture<'a, Result<Rc<Node>, BlockError>> {
        let error = BlockError::new(Operation::Open, wanted.name, Errno::EACCES);
        self.0.boxed(async move { Err(error) })
    }
}

/// What was said on the way, as a number; numbers in texts do not count.
#[derive(Default)]
struct Way(DefaultHasher);

impl Way {
    fn said(&mut self, text: &str) {
        let mut words = text.split(|c: char| !c.is_alphabetic()).filter(|word| word.len() > 2);
        words.by_ref().take(24).for_each(|word| word.hash(&mut self.0));
    }

    fn ended<T>(&mut self, result: Result<T, BlockError>) -> Option<T> {
        match result {
            Ok(value) => {
                self.0.write_u8(1);
                Some(value)
            }
            Err(error) => {
                self.said(&error.to_string());
                None
            }
        }
    }
}

/// Places to read and to write.
fn places(rng: &mut Rng, len: u64) -> Vec<(u64, usize)> {
    if len == 0 {
        return Vec::new();
    }
    let whole = (0..len.min(WHOLE_BYTES_MAX)).step_by(64 << 10);
    let whole = whole.map(|at| (at, (len - at).min(64 << 10) as usize));
    let some = (0..4).map(|_| rng.below(len)).map(|at| (at, (len - at).min(5000) as usize));
    whole.chain(some).collect()
}

async fn look_around(ring: &Ring, image: &Qcow2, rng: &mut Rng, way: &mut Way) {
    if let Some(info) = way.ended(image.info().await) {
        way.0.write_usize(info.snapshots.len().min(8) * 8 + info.bitmaps.len().min(7));
    }
    for (at, n) in places(rng, image.len()) {
        let (_, result) = image.read(at, ring.alloc(n).await).await;
        way.ended(result);
        for extent in [
            image.map(at, n as u64).await.map(|e| e.extent.len),
            image.block_status(at, n as u64).await.map(|e| e.len),
        ] {
            if let Some(len) = way.ended(extent) {
                assert!((1..=n as u64).contains(&len), "an extent of {len} bytes at {at}");
            }
        }
    }
}

async fn change(ring: &Ring, image: &Qcow2, rng: &mut Rng, way: &mut Way) {
    let len = image.len();
    for (at, n) in places(rng, len) {
        let result = match rng.below(5) {
            0 => image.discard(at, n as u64).await,
            1 => {
                image
                    .write_zeroes(
                        at,
                        n as u64,
                        ZeroFlags { may_unmap: rng.below(2) == 0, ..ZeroFlags::default() },
                    )
                    .await
            }
            2 => image.write_compressed(at, ring.alloc(n).await.freeze()).await,
            _ => image.write(at, ring.alloc(n).await.freeze(), WriteFlags { fua: rng.below(4) == 0 }).await,
        };
        way.ended(result);
    }
    for _ in 0..3 {
        match rng.below(5) {
            0 => drop(way.ended(image.snapshot_create("new", (1, 2)).await)),
            1 => drop(way.ended(image.snapshot_apply("1").await)),
            2 => drop(way.ended(image.snapshot_delete("1").await)),
            3 => drop(way.ended(image.resize((len + 70_000).min(4 << 20), Default::default()).await)),
            _ => drop(way.ended(image.set_backing(Some(("b", Some("raw")))).await)),
        }
    }
    way.ended(image.flush().await);
}

async fn check(image: &Qcow2, repair: Repair, way: &mut Way) -> Option<bool> {
    let report = way.ended(image.check(repair).await)?;
    report.messages.iter().take(8).for_each(|line| way.said(line));
    Some(report.is_clean())
}

/// Everything that can be done with an image, several times, each time opened anew.
async fn live(ring: Ring, seed: u64) -> u64 {
    let (mut rng, mut way) = (Rng::new(seed), Way::default());
    for round in 0..5 {
        let act = if round == 0 { 0 } else { rng.below(5) };
        let (read_only, for_check) =
            [(true, true), (true, false), (false, false), (false, true), (false, true)][act as usize];
        let backing = if rng.below(4) == 0 { Backing::Named } else { Backing::None };
        let options = OpenOptions { read_only, backing, for_check, data_file: None, snapshot: None };
        let opened = Qcow2::open(&ring, &file(&ring, read_only), &NoFiles(ring.clone()), options).await;
        way.0.write_u64(act);
        let Some(image) = way.ended(opened) else { continue };
        match act {
            0 => drop(check(&image, Repair::None, &mut way).await),
            1 => look_around(&ring, &image, &mut rng, &mut way).await,
            2 => {
                change(&ring, &image, &mut rng, &mut way).await;
                look_around(&ring, &image, &mut rng, &mut way).await;
            }
            _ => {
                let repair = if act == 3 { Repair::Leaks } else { Repair::All };
                if check(&image, repair, &mut way).await == Some(true) {
                    let again = check(&image, Repair::None, &mut way).await;
                    assert_eq!(again, Some(true), "what was mended is whole");
                }
            }
        }
        way.ended(image.set_permissions(Permissions::NONE));
    }
    way.0.finish()
}

fn memory_peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib: u64 = line.and_then(|rest| rest.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0);
    kib << 10
}

/// Runs one input; gives the way.
fn run(input: &Input, images: &[Image]) -> u64 {
    let world = input.world(images);
    let ring = new_ring(&world);
    let before = world.allocated(DISK).unwrap_or(0);
    let way = ring.block_on({
        let ring = ring.clone();
        let seed = input.seed;
        async move { live(ring, seed).await }
    });
    let operations = ring.stats().operations.get();
    assert!(operations <= OPERATIONS_MAX, "{operations} operations");
    let after = world.allocated(DISK).unwrap_or(0);
    assert!(after <= before + GROWTH_BYTES_MAX, "the file took {before} bytes and takes {after}");
    let memory = memory_peak_bytes();
    assert!(memory <= MEMORY_BYTES_MAX, "{memory} bytes of memory");
    way
}

/// What a target is doing, for whoever watches that it comes to an end.
type Now = Mutex<Option<(Instant, Input)>>;

/// Breeds for the given time; gives how many ways there were.
fn breed(kind: Kind, images: &[Image], now: &Now) -> usize {
    let end = Instant::now() + span();
    let usable = |image: &Image| !image.places(kind).is_empty();
    let first = images.iter().enumerate().filter(|(_, image)| usable(image));
    let mut pool: Vec<Input> = first.map(|(image, _)| Input { image, ..Input::default() }).collect();
    let (mut ways, mut runs) = (BTreeSet::new(), 0u64);
    let mut rng = Rng::new(0x5eed ^ kind as u64);
    while Instant::now() < end || runs < RUNS_MIN {
        let mut input = pool[rng.below(pool.len() as u64) as usize].clone();
        let other = pool[rng.below(pool.len() as u64) as usize].clone();
        if runs >= pool.len() as u64 {
            input.mutate(&mut rng, images, kind, &other);
        }
        *now.lock().expect("nobody panics with it") = Some((Instant::now(), input.clone()));
        let way = catch_unwind(AssertUnwindSafe(|| run(&input, images)));
        let Ok(way) = way else {
            *now.lock().expect("nobody panics with it") = None;
            panic!("{kind:?}, run {runs}: {input:x?}");
        };
        runs += 1;
        if ways.insert(way) && pool.len() < CORPUS_MAX {
            pool.push(input);
        }
    }
    *now.lock().expect("nobody panics with it") = None;
    println!("{kind:?}: {runs} runs, {} ways", ways.len());
    ways.len()
}

#[test]
fn images_that_were_bred_to_be_strange_do_no_harm() {
    let images = corpus();
    let done = AtomicBool::new(false);
    let nows: Vec<Now> = Kind::ALL.iter().map(|_| Mutex::new(None)).collect();
    std::thread::scope(|scope| {
        let targets: Vec<_> = (Kind::ALL.into_iter().zip(&nows))
            .map(|(kind, now)| {
                scope.spawn({
                    let images = &images;
                    move || breed(kind, images, now)
                })
            })
            .collect();
        scope.spawn(|| {
            while !done.load(Ordering::Acquire) {
                std::thread::park_timeout(Duration::from_millis(50));
                for now in &nows {
                    let now = now.lock().expect("nobody panics with it");
                    if let Some((began, input)) = &*now
                        && began.elapsed() > HANG
                    {
                        // Past the capture of what tests print: that would be lost with the process.
                        let _ = writeln!(std::io::stderr(), "no end: {input:x?}");
                        std::process::abort();
                    }
                }
            }
        });
        let ended: Vec<_> = targets.into_iter().map(|target| target.join()).collect();
        done.store(true, Ordering::Release);
        for (kind, ways) in Kind::ALL.into_iter().zip(ended) {
            let ways = ways.unwrap_or_else(|_| panic!("{kind:?}: see above"));
            assert!(ways > 4, "{kind:?}: {ways} ways");
        }
    });
}
