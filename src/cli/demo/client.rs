//! The demo's client: a load generator in a process of its own, so that what it measures shares neither thread nor ring
//! with what is measured.
//!
//! It is this program again, as `bench`. It is waited for on a thread of the ring's pool, never on the reactor's, and it
//! is told to end through a pidfd, which cannot hit another process that got the same number later.

use std::cell::Cell;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::rc::Rc;

use blockferry_ring::sync::{Either, Notify, OneShot, either};
use blockferry_ring::{Nanos, Ring};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::Deserialize;

use super::super::bench::ack_log::AckLog;
use super::super::bench::model::Survival;
use super::super::exit::Failure;
use super::super::image::failed;
use crate::base::units::NS_PER_SEC;

/// Bytes of one write of the client.
pub const BLOCK_BYTES: u32 = 4096;
/// How long a client that was told to end may take.
const END_NS_MAX: Nanos = 5 * NS_PER_SEC;

/// What a client is to do.
#[derive(Debug)]
pub struct Plan<'a> {
    /// What this load is called.
    pub name: &'static str,
    /// The disk.
    pub uri: &'a str,
    /// Writes a second.
    pub rate: u64,
    /// Seed of the load.
    pub seed: u64,
    /// How long it runs; until it is told to end if `None`.
    pub duration_ns: Option<Nanos>,
    /// Where its log goes.
    pub folder: &'a Path,
}

/// A client that runs.
#[derive(Clone, Debug)]
pub struct Client {
    ring: Ring,
    name: &'static str,
    process: Rc<OwnedFd>,
    log: PathBuf,
    output: OneShot<Result<Output, Failure>>,
    over: Rc<Cell<bool>>,
    ended: Notify,
}

/// What a client found.
#[derive(Debug)]
pub struct ClientReport {
    /// What the load is called.
    pub name: &'static str,
    /// Its own account.
    pub report: Account,
    /// What was acknowledged.
    pub log: AckLog,
}

/// A load generator's account of itself, as far as it matters here.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Account {
    /// How long it ran.
    pub elapsed_ns: Nanos,
    /// Its writes.
    pub writes: Writes,
    /// All requests; those that were due and never sent included.
    pub total: Writes,
    /// Writes that were due and never sent.
    pub unsent: u64,
}

/// Writes in numbers.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Writes {
    /// Those that succeeded.
    pub operations: u64,
    /// From when a write was due to its acknowledgement.
    pub latency: Latency,
}

/// Latencies.
#[derive(Clone, Copy, Debug, Default, Deserialize, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)] // The names say it all.
pub struct Latency {
    pub p50_ns: Nanos,
    pub p99_ns: Nanos,
    pub p99_9_ns: Nanos,
    pub max_ns: Nanos,
}

#[derive(Deserialize)]
struct Line {
    event: String,
    report: Option<Account>,
}

impl Client {
    /// Starts one.
    pub fn start(ring: &Ring, plan: &Plan<'_>) -> Result<Client, Failure> {
        let cannot =
            |error: &dyn std::fmt::Display| Failure::text(format!("The load cannot be started: {error}"));
        let program = std::env::current_exe().map_err(|error| cannot(&error))?;
        let log = plan.folder.join(format!("{}.log", plan.name));
        let mut command = Command::new(program);
        command.args(["--json", "bench", plan.uri, "--quiet", "--overwrite"]);
        command.args(["--block-size", &BLOCK_BYTES.to_string()]);
        command.args(["--rate", &plan.rate.to_string(), "--seed", &plan.seed.to_string()]);
        command.arg("--log").arg(&log);
        match plan.duration_ns {
            Some(ns) => command.args(["--duration", &format!("{}ms", ns / 1_000_000)]),
            None => command.arg("--until-signal"),
        };
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().map_err(|error| cannot(&error))?;
        // Not reaped yet, so the number is still its own.
        let process = i32::try_from(child.id())
            .ok()
            .and_then(Pid::from_raw)
            .ok_or_else(|| cannot(&"it has no number"))
            .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).map_err(|errno| cannot(&errno)))?;
        let (over, ended) = (Rc::new(Cell::new(false)), ring.notify());
        let (r, o, e) = (ring.clone(), over.clone(), ended.clone());
        let output = ring.spawn_with_result(async move {
            let output = r.offload(move || child.wait_with_output()).await;
            o.set(true);
            e.notify();
            match output {
                Ok(Ok(output)) => Ok(output),
                Ok(Err(error)) => Err(Failure::text(format!("The load cannot be waited for: {error}"))),
                Err(errno) => Err(Failure::text(format!("The load cannot be waited for: {errno}"))),
            }
        });
        Ok(Client { ring: ring.clone(), name: plan.name, process: process.into(), log, output, over, ended })
    }

    fn tell(&self, signal: Signal) {
        // It may be over already.
        let _ = pidfd_send_signal(self.process.as_fd(), signal);
    }

    /// Tells it to end politely, and waits for what it found.
    pub async fn stop(self) -> Result<ClientReport, Failure> {
        self.tell(Signal::INT);
        self.finish().await
    }

    /// Waits for its end.
    pub async fn finish(self) -> Result<ClientReport, Failure> {
        let output = self.output.take().await?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(Failure::text(format!(
                "The load '{}' failed ({}): {}",
                self.name,
                output.status,
                said.trim()
            )));
        }
        let report = account(&output.stdout)
            .ok_or_else(|| Failure::text(format!("The load '{}' gave no account of itself", self.name)))?;
        let path = self.log.clone();
        let log = self.ring.offload(move || AckLog::load(&path, Survival::Everything)).await;
        let log = log.map_err(failed)?.map_err(failed)?;
        if !log.is_complete() || log.acknowledged() != report.writes.operations {
            return Err(Failure::text(format!("The log of the load '{}' is not complete", self.name)));
        }
        Ok(ClientReport { name: self.name, report, log })
    }

    /// Whether it has ended.
    pub fn is_over(&self) -> bool {
        self.over.get()
    }

    /// Ends it, politely at first, whatever it found.
    pub async fn abandon(self) {
        for signal in [Signal::INT, Signal::KILL] {
            if self.is_over() {
                return;
            }
            self.tell(signal);
            let over = self.ended.until(|| self.over.get().then_some(()));
            if let Either::First(()) = either(over, self.ring.sleep(END_NS_MAX)).await {
                return;
            }
        }
    }
}

/// The account on a load generator's output.
fn account(output: &[u8]) -> Option<Account> {
    let lines = output.split(|&byte| byte == b'\n');
    let mut parsed = lines.filter_map(|line| serde_json::from_slice::<Line>(line).ok());
    parsed.find(|line| line.event == "report")?.report
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::super::bench::report::KindReport;
    use super::*;
    use crate::base::latency::LatencyHistogram;

    /// The shape is the load generator's own.
    #[test]
    fn the_account_is_found() {
        let mut waits = LatencyHistogram::new();
        [1000, 1000, 2000].iter().for_each(|&ns| waits.record(ns));
        let writes = KindReport { operations: 3, latency: waits.summary(), ..KindReport::default() };
        let report = json!({"elapsed-ns": 9, "unsent": 2, "target": "x", "writes": writes, "total": writes});
        let progress = json!({"event": "progress", "elapsed-ns": 1});
        let output = format!("{progress}\n{}\n", json!({"event": "report", "report": report}));
        let account = account(output.as_bytes()).unwrap();
        assert_eq!((account.elapsed_ns, account.unsent, account.writes.operations), (9, 2, 3));
        let Latency { p50_ns, p99_ns, p99_9_ns, max_ns } = account.total.latency;
        assert_eq!([p50_ns, p99_ns, p99_9_ns, max_ns], [1000, 2000, 2000, 2000]);
        assert!(super::account(b"nonsense\n{}\n").is_none());
    }
}
