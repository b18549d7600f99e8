//! Micro-benchmarks of the pieces that every request or every turn goes through.
//!
//! `cargo bench --bench hot [PART OF A NAME]` measures: each piece runs in rounds of about 20 ms; printed are the time of
//! one step in the fastest round and in the middle one. The two apart by much means that the machine was busy, and the
//! figures are worth nothing. `cargo test` runs every piece for a few steps and checks what it computed, so that no
//! benchmark rots or measures a loop that the compiler threw away.
//!
//! A figure from here is a hint where to look. What counts is measured on whole programs (docs/performance.md).

use std::cell::Cell;
use std::hint::black_box;
use std::rc::Rc;
use std::time::{Duration, Instant};

use blockferry::base::bucket::TokenBucket;
use blockferry::base::latency::LatencyHistogram;
use blockferry::base::range::ByteRange;
use blockferry::base::rng::Rng;
use blockferry::base::zero::{is_zero, zero_runs};
use blockferry::graph::dirty::DirtyMap;
use blockferry::protocol::nbd::HeaderStyle;
use blockferry::protocol::nbd::constants::{Command, CommandFlags};
use blockferry::protocol::nbd::transmission::{RequestHeader, parse_request};
use blockferry_ring::{Config, OpenHow, Ring};

/// What one round should take.
const ROUND: Duration = Duration::from_millis(20);
/// Rounds that count.
const ROUNDS: usize = 21;
/// Steps of each piece where nothing is measured.
const STEPS_TINY: u64 = 100;

const GIB: u64 = 1 << 30;

/// Runs pieces: measures them, or only tries them.
struct Bench {
    measure: bool,
    wanted: Option<String>,
}

impl Bench {
    /// Runs `piece` as many steps as it is told, again and again.
    fn run(&self, name: &str, mut piece: impl FnMut(u64)) {
        if self.wanted.as_ref().is_some_and(|wanted| !name.contains(wanted.as_str())) {
            return;
        }
        if !self.measure {
            piece(STEPS_TINY);
            println!("{name}: runs");
            return;
        }
        let mut time = |steps: u64| {
            let began = Instant::now();
            piece(steps);
            began.elapsed()
        };
        let mut steps = 1;
        while time(steps) < ROUND / 2 {
            steps *= 2;
        }
        let mut rounds: Vec<f64> =
            (0..ROUNDS).map(|_| time(steps).as_nanos() as f64 / steps as f64).collect();
        rounds.sort_by(f64::total_cmp);
        println!("{name:<44}{:>12.2} ns fastest{:>12.2} ns middle", rounds[0], rounds[ROUNDS / 2]);
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let bench = Bench {
        measure: arguments.iter().any(|argument| argument == "--bench"),
        wanted: arguments.into_iter().find(|argument| !argument.starts_with('-')),
    };
    dirty_map(&bench);
    token_bucket(&bench);
    histogram(&bench);
    zeroes(&bench);
    nbd_header(&bench);
    match Ring::new(&Config::default()) {
        Ok(ring) => reactor(&bench, &ring),
        Err(error) => println!("the reactor is left out: {error}"),
    }
}

/// A terabyte in chunks of 64 KiB, of which one in 4,000 is dirty: what a job sees that follows a busy guest.
fn dirty_map(bench: &Bench) {
    const LEN: u64 = 1024 * GIB;
    const CHUNK: u64 = 64 << 10;
    let mut rng = Rng::new(1);
    let mut map = DirtyMap::new(LEN, CHUNK).unwrap();
    for _ in 0..LEN / CHUNK / 4000 {
        map.set(ByteRange::at(rng.below(LEN / CHUNK) * CHUNK, CHUNK).unwrap());
    }
    let mut from = 0;
    bench.run("dirty map: find the next of a few dirty", |steps| {
        for _ in 0..steps {
            let run = map.next_dirty_wrapping(from, GIB).unwrap();
            assert!(run.end() > run.start());
            from = black_box(run.end());
        }
    });
    let clean = DirtyMap::new(64 * LEN, CHUNK).unwrap();
    bench.run("dirty map: scan 64 TiB of clean disk", |steps| {
        for _ in 0..steps {
            assert_eq!(black_box(&clean).next_dirty(0, GIB), None);
        }
    });
    bench.run("dirty map: dirty 4 KiB and clean it again", |steps| {
        for _ in 0..steps {
            let range = ByteRange::at(rng.below(LEN / CHUNK) * CHUNK, CHUNK).unwrap();
            let before = map.dirty_chunks();
            map.set(ByteRange::at(range.start(), 4096).unwrap());
            map.clear(range);
            assert!(map.dirty_chunks() <= before);
        }
    });
}

fn token_bucket(bench: &Bench) {
    let mut bucket = TokenBucket::new(0, 100 << 20);
    let mut now = 0;
    bench.run("token bucket: take or be told when", |steps| {
        let mut taken = 0u64;
        for _ in 0..steps {
            match bucket.try_take(now, 256 << 10) {
                Ok(()) => taken += 1,
                Err(ready_at) => now = black_box(ready_at),
            }
        }
        assert!(taken * 3 >= steps, "{taken} of {steps}");
    });
}

fn histogram(bench: &Bench) {
    let mut histogram = LatencyHistogram::new();
    let mut rng = Rng::new(2);
    bench.run("latency histogram: record", |steps| {
        let before = histogram.count();
        for _ in 0..steps {
            histogram.record(50_000 + rng.below(1 << 20));
        }
        assert_eq!(histogram.count(), before + steps);
    });
}

fn zeroes(bench: &Bench) {
    let buf = vec![0u8; 64 << 10];
    bench.run("zero detection: 64 KiB of zeroes", |steps| {
        for _ in 0..steps {
            assert!(is_zero(black_box(&buf)));
        }
    });
    bench.run("zero detection: the same by a plain loop", |steps| {
        for _ in 0..steps {
            assert!(black_box(&buf).iter().all(|&byte| byte == 0));
        }
    });
    // What a conversion does to a buffer of which every other granule holds data.
    let mut mixed = vec![0u8; 1 << 20];
    for granule in mixed.chunks_mut(4096).step_by(2) {
        granule.fill(7);
    }
    bench.run("zero detection: runs in 1 MiB, half data", |steps| {
        for _ in 0..steps {
            assert_eq!(zero_runs(black_box(&mixed), 4096).filter(|run| run.is_zero).count(), 128);
        }
    });
}

fn nbd_header(bench: &Bench) {
    let request = RequestHeader {
        flags: CommandFlags(0),
        command: Command::Write,
        cookie: 7,
        offset: 5 << 30,
        length: 4096,
    };
    for (style, name) in [
        (HeaderStyle::Structured, "NBD: parse a request header"),
        (HeaderStyle::Extended, "NBD: parse an extended request header"),
    ] {
        let head = request.write(style).unwrap();
        bench.run(name, |steps| {
            for _ in 0..steps {
                let (parsed, bytes) = parse_request(black_box(head.as_ref()), style).unwrap().unwrap();
                assert_eq!((parsed.offset, bytes), (request.offset, RequestHeader::bytes(style)));
            }
        });
    }
}

/// The reactor on the real kernel.
fn reactor(bench: &Bench, ring: &Ring) {
    bench.run("ring: a turn with nothing to do", |steps| {
        for _ in 0..steps {
            let turn = ring.turn();
            assert!(!turn.more_work);
        }
    });
    bench.run("ring: start a task, run it, end it", |steps| {
        let ran = Rc::new(Cell::new(0));
        for _ in 0..steps {
            let count = ran.clone();
            ring.spawn(async move { count.set(count.get() + 1) });
            let _ = ring.turn();
        }
        assert_eq!(ran.get(), steps);
    });
    let r = ring.clone();
    bench.run("ring: a task yields", |steps| {
        let ring = r.clone();
        r.block_on(async move {
            for _ in 0..steps {
                ring.yield_now().await;
            }
        });
    });
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    std::fs::write(&path, vec![7; 1 << 20]).unwrap();
    let file = ring.open(&path, &OpenHow::default()).unwrap();
    for depth in [1u64, 32] {
        let name = format!("ring: read 4 KiB from the page cache, {depth} at once");
        let (r, file) = (ring.clone(), file.clone());
        bench.run(&name, |steps| {
            // A step is one read; depth tasks share them.
            let left = Rc::new(Cell::new(steps));
            let readers: Vec<_> = (0..depth)
                .map(|lane| {
                    let (ring, file, left) = (r.clone(), file.clone(), left.clone());
                    r.spawn_with_result(async move {
                        let mut buf = ring.alloc(4096).await;
                        while left.get() > 0 {
                            left.set(left.get() - 1);
                            let (back, read) = ring.read(&file, lane * 4096, buf).await;
                            assert_eq!(read, Ok(4096));
                            buf = back;
                        }
                    })
                })
                .collect();
            r.block_on(async move {
                for reader in readers {
                    reader.take().await;
                }
            });
            assert_eq!(left.get(), 0);
        });
    }
}
