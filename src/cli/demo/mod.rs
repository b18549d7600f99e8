//! `blockferry demo`: everything at once, on one machine, in less than a minute, and nothing left behind.
//!
//! # How it proceeds
//! 1. A folder is made, in it a disk with data and holes, and the disk is served over NBD.
//! 2. A client (a process of its own) writes to it at a steady rate: how long it waits *before* a job.
//! 3. Another client writes while the disk is mirrored and, as soon as source and target are alike, pivoted: how long it
//!    waits *during* the job. It goes on for a moment after the pivot, over the same connection, on the target. That
//!    moment is short, so that it does not water the figures down.
//! 4. A third client writes to the target: *after*.
//! 5. Service and engine let go of both disks, and every byte of the target is read with plain file reads and compared
//!    with what was there at first and what was acknowledged since ([`check`]).
//!
//! Before the disk is made, a probe tells how fast the place is ([`probe`]): a slow one gets a smaller disk and a client
//! with more patience, or the job would run after that client for ever.

mod check;
mod client;
mod disk;
mod probe;
mod report;
mod scratch;

use std::cell::RefCell;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blockferry_ring::Nanos;
use blockferry_ring::sync::{Either, either};
use clap::Args;
use rustix::time::{ClockId, clock_gettime};

use super::bench::load::SEED_END;
use super::exit::{Exit, Failure};
use super::image::{failed, size, speed};
use super::print::{self, product, say};
use super::serve::Exports;
use super::signals::{Signals, begin};
use super::{Global, config, stats};
use crate::base::os_name;
use crate::base::rng::Rng;
use crate::base::shown::plain;
use crate::base::units::{NS_PER_SEC, fmt_bytes, fmt_duration};
use crate::engine::{Engine, ImageOptions};
use crate::graph::node::Node;
use crate::job::mirror::MirrorOptions;
use crate::job::runner::Ending;
use crate::protocol::file::{CreateOptions, FileDriver};
use crate::protocol::mark::{MarkInfo, TargetMark};
use crate::protocol::nbd::{NbdAddress, NbdUri};
use check::{CheckReport, Expectation};
use client::{BLOCK_BYTES, Client, ClientReport, Plan};
use disk::Disk;
use report::{DemoReport, JobRow, LoadRow};
use scratch::Scratch;

/// How long the client is watched before the job.
const BEFORE_NS: Nanos = 4 * NS_PER_SEC;
/// How long the client of the job goes on after the pivot.
const TAIL_NS: Nanos = 300_000_000;
/// How long a client is watched on the target.
const AFTER_NS: Nanos = 2 * NS_PER_SEC;
/// How long a client may take to connect.
const CONNECT_NS_MAX: Nanos = 10 * NS_PER_SEC;
/// A look at whether it has.
const LOOK_NS: Nanos = 2_000_000;
/// How long a job may take to become ready, if nobody asked for something that takes longer.
const READY_NS_MAX: Nanos = 60 * NS_PER_SEC;

const AFTER: &str = "\
It needs nothing but io_uring and room for two disks, as any user. Exit code 4 means that a byte of the copy is
wrong; please report that.";

/// See it work: mirror a disk while a client writes to it, pivot, and check every byte
#[derive(Debug, Args)]
#[command(after_help = AFTER)]
pub struct DemoArgs {
    /// Bytes of the disk, a multiple of 4 KiB [default: 1GiB, or what room and speed of the place allow]
    #[arg(long, value_name = "SIZE", value_parser = disk_size)]
    size: Option<u64>,
    /// Where to make the disks, in a folder that is removed again [default: the folder for temporary files]
    #[arg(long, value_name = "DIR", value_parser = crate::cli::image::path)]
    dir: Option<PathBuf>,
    /// Writes of 4 KiB a second that the client makes [default: 2000, or what the place can take beside a job]
    #[arg(long, value_name = "IOPS", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    rate: Option<u64>,
    /// Limit the copying, such as 200MiB (a second); 0 or `unlimited` for no limit
    #[arg(long, value_name = "RATE", value_parser = speed, default_value = "0")]
    speed: u64,
    /// Repeat the writes of this seed
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Leave the folder with both disks and the logs behind
    #[arg(long)]
    keep: bool,
}

fn disk_size(text: &str) -> Result<u64, String> {
    let bytes = size(text)?;
    let good = bytes >= scratch::DISK_BYTES_MIN && bytes.is_multiple_of(BLOCK_BYTES.into());
    good.then_some(bytes).ok_or_else(|| {
        format!("a demo's disk is a multiple of 4 KiB, at least {}", fmt_bytes(scratch::DISK_BYTES_MIN))
    })
}

/// Runs the command.
pub fn main(global: &Global, args: &DemoArgs) -> Result<Exit, Failure> {
    let engine = Rc::new(Engine::new(&config(global))?);
    let signals = Signals::new(engine.ring())?;
    begin();
    let ring = engine.ring().clone();
    let parent = args.dir.clone().unwrap_or_else(std::env::temp_dir);
    let scratch = Rc::new(Scratch::new(&parent, args.keep, || ring.random())?);
    let demo = Rc::new(Demo {
        global: global.clone(),
        engine: engine.clone(),
        scratch: scratch.clone(),
        size: args.size,
        rate: args.rate,
        speed: i64::try_from(args.speed).map_err(|_| Failure::usage("--speed is too large"))?,
        seed: args.seed.unwrap_or_else(|| ring.random() % SEED_END),
        client: RefCell::default(),
        stop: Arc::default(),
    });
    let outcome = engine.run(async move {
        let outcome = match either(demo.show(), signals.next_ending()).await {
            Either::First(outcome) => outcome.map(Some),
            Either::Second(_) => Ok(None),
        };
        demo.stop.store(true, Ordering::Relaxed);
        let client = demo.client.borrow_mut().take();
        if let Some(client) = client {
            client.abandon().await;
        }
        outcome
    });
    // Nothing uses the disks any more when the folder goes.
    drop(engine);
    if args.keep && !global.json {
        say!("Kept: {}", scratch.path().display());
    }
    drop(scratch);
    let Some(report) = outcome? else {
        say!("Interrupted");
        return Ok(Exit::Cancelled);
    };
    if global.json {
        print::has_ended();
        product!("{}", report.to_json());
    } else {
        print::write_product(&format!("\n{}", report.to_text()));
    }
    Ok(if report.verify.is_good() { Exit::Done } else { Exit::Different })
}

struct Demo {
    global: Global,
    engine: Rc<Engine>,
    scratch: Rc<Scratch>,
    size: Option<u64>,
    rate: Option<u64>,
    speed: i64,
    seed: u64,
    /// The client that runs now.
    client: RefCell<Option<Client>>,
    /// Tells the independent reader to give up.
    stop: Arc<AtomicBool>,
}

/// CPU time of this process so far, kernel and all threads included. Nothing is decided by it.
fn cpu_ns() -> u64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    let part = |n: i64| u64::try_from(n).unwrap_or(0);
    part(time.tv_sec) * NS_PER_SEC + part(time.tv_nsec)
}

impl Demo {
    async fn show(&self) -> Result<DemoReport, Failure> {
        let ring = self.engine.ring();
        let began = ring.clock();
        let mut rng = Rng::new(self.seed);
        let (bytes, rate) = self.choose().await?;
        let disk = Disk { bytes, seed: rng.next_u64() };
        self.say(&format!("Making a disk of {} in {}", fmt_bytes(disk.bytes), self.scratch.path().display()));
        let (source_path, target_path) = (self.scratch.file("source.raw"), self.scratch.file("target.raw"));
        let source = self.make(&source_path, disk.bytes).await?;
        disk.fill(ring, source.driver(), disk.bytes).await?;
        let target = self.make(&target_path, disk.bytes).await?;

        let uri = NbdUri {
            address: NbdAddress::Unix { path: self.scratch.socket("nbd.sock")? },
            export: "disk".to_owned(),
        };
        let mut exports = Exports::new(ring);
        exports.add(&self.engine, &source, &uri, false, &self.global).await?;
        let uri = uri.to_string();

        self.say(&format!("A client writes to it, {rate} times a second, for {}", fmt_duration(BEFORE_NS)));
        let (cpu, then) = (cpu_ns(), ring.clock());
        let before = self.client("before", &uri, rate, rng.next_u64(), Some(BEFORE_NS))?.finish().await?;
        let serving = (cpu_ns() - cpu) as f64 / (ring.clock() - then).max(1) as f64;

        self.say("A client writes to it while it is mirrored and pivoted");
        let during = self.client("during", &uri, rate, rng.next_u64(), None)?;
        self.connected(&exports, &during).await?;
        let mut job = self.mirror(&source, &target).await?;
        job.cpu_serving_ns = (serving * job.elapsed_ns as f64) as u64;
        ring.sleep(TAIL_NS).await;
        let during = during.stop().await?;

        self.say(&format!("A client writes to the target for {}", fmt_duration(AFTER_NS)));
        let after = self.client("after", &uri, rate, rng.next_u64(), Some(AFTER_NS))?.finish().await?;
        self.client.borrow_mut().take();

        exports.stop().await?;
        drop((exports, source, target));
        stats::print(&self.global, ring);
        self.say("Reading the target without the engine, and comparing every byte");
        let loads = [&before, &during, &after].map(LoadRow::new);
        let logs = [before, during, after].map(|client: ClientReport| client.log);
        let verify = self.check(&target_path, Expectation { disk, logs: logs.into() }).await?;
        Ok(DemoReport {
            ring: ring.describe(),
            folder: self.scratch.path().display().to_string(),
            disk_bytes: disk.bytes,
            data_bytes: disk.data_bytes(),
            rate_per_sec: rate,
            seed: self.seed,
            job,
            loads: loads.into(),
            source_allocated_bytes: allocated(&source_path)?,
            target_allocated_bytes: allocated(&target_path)?,
            verify,
            elapsed_ns: ring.clock() - began,
        })
    }

    /// The disk's size and the client's rate: as asked for, otherwise what the place allows.
    async fn choose(&self) -> Result<(u64, u64), Failure> {
        let room = self.scratch.disk_bytes(self.size)?;
        if let (Some(bytes), Some(rate)) = (self.size, self.rate) {
            return Ok((bytes, rate));
        }
        let path = self.scratch.file("probe.raw");
        let node = self.make(&path, probe::bytes(room)).await?;
        let ring = self.engine.ring();
        let speed = probe::measure(ring, node.driver()).await?;
        drop(node);
        let _ = ring.unlink(&path);
        tracing::debug!(?speed, "probed");
        Ok((self.size.unwrap_or_else(|| speed.disk_bytes(room)), self.rate.unwrap_or_else(|| speed.rate())))
    }

    async fn make(&self, path: &Path, bytes: u64) -> Result<Rc<Node>, Failure> {
        FileDriver::create(self.engine.ring(), path, bytes, CreateOptions::default()).await?;
        Ok(self.engine.open(&os_name::from_path(path), &ImageOptions::raw()).await?)
    }

    fn client(
        &self,
        name: &'static str,
        uri: &str,
        rate: u64,
        seed: u64,
        duration_ns: Option<Nanos>,
    ) -> Result<Client, Failure> {
        let plan = Plan { name, uri, rate, seed, duration_ns, folder: self.scratch.path() };
        let client = Client::start(self.engine.ring(), &plan)?;
        self.client.replace(Some(client.clone()));
        Ok(client)
    }

    /// Waits until the client is there.
    async fn connected(&self, exports: &Exports, client: &Client) -> Result<(), Failure> {
        let ring = self.engine.ring();
        let end = ring.clock() + CONNECT_NS_MAX;
        while exports.clients() == 0 {
            if client.is_over() || ring.clock() > end {
                return Err(Failure::text("The client does not connect to the export"));
            }
            ring.sleep(LOOK_NS).await;
        }
        Ok(())
    }

    /// Mirrors and pivots.
    async fn mirror(&self, source: &Rc<Node>, target: &Rc<Node>) -> Result<JobRow, Failure> {
        let ring = self.engine.ring();
        let state = Some(self.scratch.path().to_owned());
        let info = MarkInfo::incomplete("demo", source.name());
        let mut options = MirrorOptions::new("demo");
        options.speed = self.speed;
        options.marker = Some(Box::new(TargetMark::new(ring, target.driver().clone(), state, info)));
        let (cpu, began) = (cpu_ns(), ring.clock());
        let job = self.engine.mirror(source, target, options).await?;
        let patience = match (self.size, self.rate, self.speed) {
            (None, None, 0) => READY_NS_MAX,
            _ => Nanos::MAX,
        };
        let end = ring.clock().saturating_add(patience);
        if let Either::Second(()) = either(job.until_ready(), ring.sleep_until(end)).await {
            return Err(Failure::text(format!(
                "The copy does not catch up with the client here ({} differ after {}); try a lower --rate",
                fmt_bytes(job.details().bytes_dirty),
                fmt_duration(patience)
            )));
        }
        let ready = ring.clock();
        if job.ending().is_none() {
            job.complete()?;
        }
        let ending = job.until_over().await;
        let over = ring.clock();
        let cpu = cpu_ns() - cpu;
        match ending {
            Ending::Completed => {}
            Ending::Cancelled => return Err(Failure::text("The mirror was cancelled")),
            Ending::Failed(text) => return Err(Failure::text(format!("The mirror failed: {text}"))),
        }
        if target.client_count() == 0 || source.client_count() > 0 {
            return Err(Failure::text("The pivot left the client on the source"));
        }
        let details = job.details();
        Ok(JobRow {
            elapsed_ns: over - began,
            ready_ns: ready - began,
            pivot_ns: over - ready,
            pivot_at: humantime::format_rfc3339_millis(std::time::SystemTime::now()).to_string(),
            bytes_copied: details.bytes_copied,
            bytes_zeroed: details.bytes_zeroed,
            bytes_skipped: details.bytes_skipped,
            bytes_guest: details.bytes_guest,
            cpu_ns: cpu,
            cpu_serving_ns: 0,
        })
    }

    async fn check(&self, path: &Path, expectation: Expectation) -> Result<CheckReport, Failure> {
        let ring = self.engine.ring();
        let expectation = Arc::new(expectation);
        let readers: Vec<_> = (0..check::PARTS)
            .map(|part| {
                let (r, path, stop) = (ring.clone(), path.to_owned(), self.stop.clone());
                let expectation = expectation.clone();
                ring.spawn_with_result(async move {
                    r.offload(move || check::check(&path, &expectation, part, &stop)).await
                })
            })
            .collect();
        let mut report = CheckReport::default();
        for reader in readers {
            report.merge(reader.take().await.map_err(failed)?.map_err(|error| {
                Failure::text(format!("Reading the target for the comparison failed: {}", plain(&error)))
            })?);
        }
        Ok(report)
    }

    fn say(&self, text: &str) {
        if !self.global.json {
            say!("{text}");
        }
    }
}

/// Bytes that a file occupies.
fn allocated(path: &Path) -> Result<u64, Failure> {
    let metadata = std::fs::metadata(path).map_err(|error| {
        Failure::text(format!("'{}' cannot be looked at: {}", path.display(), plain(&error)))
    })?;
    Ok(metadata.blocks() * 512)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_show_something() {
        assert_eq!(disk_size("1GiB"), Ok(1 << 30));
        for wrong in ["0", "1MiB", "16777217", "much"] {
            assert!(disk_size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn cpu_time_goes_on() {
        let before = cpu_ns();
        let mut rng = Rng::new(1);
        let sum = (0..1_000_000).fold(0u64, |sum, _| sum ^ rng.next_u64());
        assert_ne!(sum, 0);
        assert!(cpu_ns() > before);
    }
}
