//! What the demo shows in the end: one table for people, one object for programs.

use std::fmt::Write;

use serde::Serialize;

use super::check::CheckReport;
use super::client::{BLOCK_BYTES, ClientReport, Latency};
use crate::base::units::{NS_PER_SEC, fmt_bytes, fmt_duration, fmt_rate};
use crate::cli::bench::report::exact;

/// One load, in numbers.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct LoadRow {
    /// When it ran.
    pub name: &'static str,
    /// For how long.
    pub elapsed_ns: u64,
    /// Writes that were acknowledged.
    pub writes: u64,
    /// Writes that were due and never sent.
    pub unsent: u64,
    /// From when a write was due to its acknowledgement.
    pub latency: Latency,
}

impl LoadRow {
    /// Of a client.
    pub fn new(client: &ClientReport) -> LoadRow {
        LoadRow {
            name: client.name,
            elapsed_ns: client.report.elapsed_ns,
            writes: client.report.writes.operations,
            unsent: client.report.unsent,
            latency: client.report.total.latency,
        }
    }
}

/// The job, in numbers.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct JobRow {
    /// From the start to the client being on the target.
    pub elapsed_ns: u64,
    /// From the start to ready.
    pub ready_ns: u64,
    /// From the order to complete to the client being on the target.
    pub pivot_ns: u64,
    /// When the client was on the target (RFC 3339).
    pub pivot_at: String,
    /// Bytes copied as data.
    pub bytes_copied: u64,
    /// Bytes made zero.
    pub bytes_zeroed: u64,
    /// Bytes that were holes on both sides.
    pub bytes_skipped: u64,
    /// Bytes that the client changed meanwhile.
    pub bytes_guest: u64,
    /// CPU time of the process in that time, kernel included.
    pub cpu_ns: u64,
    /// How much of that serving the client takes, going by the time before the job.
    pub cpu_serving_ns: u64,
}

impl JobRow {
    fn bytes_per_sec(&self) -> u64 {
        per_sec(self.bytes_copied, self.elapsed_ns)
    }

    fn cpu_seconds_per_gib(&self) -> f64 {
        let gib = self.bytes_copied as f64 / f64::from(1 << 30);
        self.cpu_ns as f64 / NS_PER_SEC as f64 / gib.max(f64::MIN_POSITIVE)
    }
}

fn per_sec(bytes: u64, ns: u64) -> u64 {
    let rate = u128::from(bytes) * u128::from(NS_PER_SEC) / u128::from(ns.max(1));
    u64::try_from(rate).unwrap_or(u64::MAX)
}

/// Everything.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct DemoReport {
    /// The ring's set-up.
    pub ring: Vec<String>,
    /// Where the disks were.
    pub folder: String,
    /// Bytes of the disk.
    pub disk_bytes: u64,
    /// Bytes of it that were data at first.
    pub data_bytes: u64,
    /// Writes a second that the client made.
    pub rate_per_sec: u64,
    /// Seed of everything random.
    #[serde(serialize_with = "exact")]
    pub seed: u64,
    /// The job.
    pub job: JobRow,
    /// The client.
    pub loads: Vec<LoadRow>,
    /// Bytes that the source occupies in the end.
    pub source_allocated_bytes: u64,
    /// Bytes that the target occupies in the end.
    pub target_allocated_bytes: u64,
    /// What the independent reader found.
    pub verify: CheckReport,
    /// The whole demo.
    pub elapsed_ns: u64,
}

impl DemoReport {
    /// As JSON.
    pub fn to_json(&self) -> serde_json::Value {
        let mut value = serde_json::to_value(self).unwrap_or_default();
        value["event"] = "demo".into();
        value["job"]["bytes-per-sec"] = self.job.bytes_per_sec().into();
        value["job"]["cpu-seconds-per-gib"] = self.job.cpu_seconds_per_gib().into();
        value["verified"] = self.verify.is_good().into();
        value
    }

    /// As a table.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        let job = &self.job;
        let mut row = |name: &str, what: String| {
            // Writing to a string does not fail.
            let _ = writeln!(text, "{name:<12}{what}");
        };
        row(
            "disk",
            format!(
                "{}, {} of it data, the rest holes; in {}",
                fmt_bytes(self.disk_bytes),
                fmt_bytes(self.data_bytes),
                self.folder
            ),
        );
        row("ring", self.ring.join("; "));
        row(
            "mirror",
            format!(
                "{} copied in {}: {} (ready after {}); the client changed {} meanwhile",
                fmt_bytes(job.bytes_copied),
                fmt_duration(job.elapsed_ns),
                fmt_rate(job.bytes_per_sec()),
                fmt_duration(job.ready_ns),
                fmt_bytes(job.bytes_guest),
            ),
        );
        row(
            "CPU",
            format!(
                "{:.3} s per GiB copied ({} in all; serving the client takes about {} of it)",
                job.cpu_seconds_per_gib(),
                fmt_duration(job.cpu_ns),
                fmt_duration(job.cpu_serving_ns),
            ),
        );
        row("pivot", format!("{}; {} after the order", job.pivot_at, fmt_duration(job.pivot_ns)));
        row(
            "space",
            format!(
                "the source occupies {}, the target {}",
                fmt_bytes(self.source_allocated_bytes),
                fmt_bytes(self.target_allocated_bytes)
            ),
        );
        self.loads_text(&mut text);
        self.verify_text(&mut text);
        text
    }

    fn loads_text(&self, text: &mut String) {
        let _ = writeln!(
            text,
            "\nThe client writes {} at random places, {} a second, over NBD. How long until it is acknowledged:",
            fmt_bytes(BLOCK_BYTES.into()),
            self.rate_per_sec
        );
        let _ = writeln!(
            text,
            "{:<12}{:>9}{:>10}{:>10}{:>10}{:>10}{:>10}",
            "", "for", "writes", "p50", "p99", "p99.9", "max"
        );
        for load in &self.loads {
            let latency = &load.latency;
            let [p50, p99, p99_9, max] =
                [latency.p50_ns, latency.p99_ns, latency.p99_9_ns, latency.max_ns].map(fmt_duration);
            let _ = writeln!(
                text,
                "{:<12}{:>9}{:>10}{p50:>10}{p99:>10}{p99_9:>10}{max:>10}",
                load.name,
                fmt_duration(load.elapsed_ns),
                load.writes
            );
            if load.unsent > 0 {
                let _ = writeln!(text, "{:<12}due and not sent: {}", "", load.unsent);
            }
        }
    }

    fn verify_text(&self, text: &mut String) {
        let verify = &self.verify;
        let blocks = verify.blocks_written + verify.blocks_first + verify.blocks_zero + verify.blocks_wrong;
        let _ = writeln!(
            text,
            "\n{}: {blocks} blocks ({}) read from the target with plain reads and compared; {} hold writes of the \
             client, {} the first content, {} zeroes; {} wrong",
            if verify.is_good() { "Verified" } else { "WRONG" },
            fmt_bytes(verify.bytes),
            verify.blocks_written,
            verify.blocks_first,
            verify.blocks_zero,
            verify.blocks_wrong,
        );
        for difference in &verify.differences {
            let _ = writeln!(text, "  {difference}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> DemoReport {
        let latency = Latency { p50_ns: 100_000, p99_ns: 200_000, p99_9_ns: 300_000, max_ns: 4_000_000 };
        let load = |name, unsent| LoadRow { name, elapsed_ns: NS_PER_SEC, writes: 2000, unsent, latency };
        DemoReport {
            ring: vec!["flags: DEFER_TASKRUN".into(), "arena: 24 MiB".into()],
            folder: "/tmp/x".into(),
            disk_bytes: 1 << 30,
            data_bytes: 3 << 28,
            rate_per_sec: 2000,
            seed: 1,
            job: JobRow {
                elapsed_ns: 2 * NS_PER_SEC,
                ready_ns: NS_PER_SEC,
                pivot_ns: 3_000_000,
                pivot_at: "2030-01-01T00:00:00.000Z".into(),
                bytes_copied: 1 << 30,
                bytes_zeroed: 0,
                bytes_skipped: 1 << 28,
                bytes_guest: 1 << 20,
                cpu_ns: NS_PER_SEC / 2,
                cpu_serving_ns: NS_PER_SEC / 4,
            },
            loads: vec![load("before", 0), load("during", 7)],
            source_allocated_bytes: 3 << 28,
            target_allocated_bytes: 3 << 28,
            verify: CheckReport { bytes: 1 << 30, blocks_first: 1 << 18, ..CheckReport::default() },
            elapsed_ns: 9 * NS_PER_SEC,
        }
    }

    #[test]
    fn the_table_says_what_was_seen() {
        let text = report().to_text();
        for part in [
            "1 GiB copied in 2 s: 512 MiB/s (ready after 1 s)",
            "0.500 s per GiB",
            "before            1 s      2000    100 us    200 us    300 us      4 ms",
            "due and not sent: 7",
            "Verified: 262144 blocks (1 GiB)",
        ] {
            assert!(text.contains(part), "{part}\n{text}");
        }
        let mut wrong = report();
        wrong.verify.blocks_wrong = 1;
        wrong.verify.differences.push("At offset 0 lies nothing.".into());
        assert!(wrong.to_text().contains("WRONG") && wrong.to_text().contains("  At offset 0"));
        assert_eq!(wrong.to_json()["verified"], false);
    }

    #[test]
    fn programs_get_the_same() {
        let json = report().to_json();
        assert_eq!((&json["event"], &json["verified"]), (&"demo".into(), &true.into()));
        assert_eq!(json["job"]["cpu-seconds-per-gib"], 0.5);
        assert_eq!(json["job"]["bytes-per-sec"], 512 << 20);
        assert_eq!(json["loads"][1]["latency"]["p99-9-ns"], 300_000);
    }
}
