//! What a load found out, for people and for programs.

use std::fmt::Write;

use serde::Serialize;

use super::check::{CheckReport, Failures, Mismatches};
use super::load::SEED_END;
use crate::base::latency::{LatencyHistogram, LatencySummary};
use crate::base::shown::shown;
use crate::base::units::{NS_PER_SEC, fmt_bytes, fmt_duration};

/// Requests of one kind.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct KindReport {
    /// Those that succeeded.
    pub operations: u64,
    /// Those that failed.
    pub errors: u64,
    /// Bytes moved by those that succeeded.
    pub bytes: u64,
    /// Operations a second.
    pub iops: f64,
    /// Bytes a second.
    pub bytes_per_sec: f64,
    /// How long they took. With a rate this counts from when they were due, and includes those that were never sent.
    pub latency: LatencySummary,
}

impl KindReport {
    pub(super) fn new(
        operations: u64,
        errors: u64,
        bytes: u64,
        elapsed_ns: u64,
        latency: &LatencyHistogram,
    ) -> KindReport {
        let seconds = elapsed_ns.max(1) as f64 / NS_PER_SEC as f64;
        KindReport {
            operations,
            errors,
            bytes,
            iops: operations as f64 / seconds,
            bytes_per_sec: bytes as f64 / seconds,
            latency: latency.summary(),
        }
    }
}

/// What was verified.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct VerifyReport {
    /// Reads during the load of blocks whose content was known, and was right.
    pub reads_verified: u64,
    /// Reads during the load of blocks that held something else.
    pub read_mismatches: Mismatches,
    /// What was there at the end; `None` if it could not be read back because the disk was out of reach.
    pub at_end: Option<CheckReport>,
}

impl VerifyReport {
    /// Whether everything was right.
    pub fn is_good(&self) -> bool {
        self.read_mismatches.count == 0 && self.at_end.as_ref().is_some_and(CheckReport::is_good)
    }

    /// Blocks and reads that were judged and found right.
    pub fn verified(&self) -> u64 {
        self.reads_verified + self.at_end.as_ref().map_or(0, |check| check.verified)
    }

    /// Blocks and reads that were judged and found wrong.
    pub fn mismatched(&self) -> u64 {
        self.read_mismatches.count + self.at_end.as_ref().map_or(0, |check| check.mismatches.count)
    }
}

/// What a load found out.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct LoadReport {
    /// What was put under load.
    pub target: String,
    /// Seed by which the load can be repeated, and its patterns be recognised.
    #[serde(serialize_with = "exact")]
    pub seed: u64,
    /// Offset of the range that was used, in bytes.
    pub range_offset: u64,
    /// Length of that range, in bytes.
    pub range_bytes: u64,
    /// Bytes of a block.
    pub block_bytes: u32,
    /// Requests in flight at most.
    pub depth: usize,
    /// Connections.
    pub connections: usize,
    /// Requests that were due in a second, if the load had a rate.
    pub rate_per_sec: Option<u64>,
    /// How many of a hundred bytes of the range were holes before the load, if it reads from a disk and that can be told.
    pub holes_percent: Option<u8>,
    /// From the start to the end of the last request.
    pub elapsed_ns: u64,
    /// Reads and writes.
    pub total: KindReport,
    /// Reads.
    pub reads: KindReport,
    /// Writes.
    pub writes: KindReport,
    /// Flushes; not part of the total.
    pub flushes: KindReport,
    /// Requests that were due before the end and were never sent, because too many were in flight. They count among the
    /// latencies with the time that they had waited.
    pub unsent: u64,
    /// Writes that were acknowledged.
    pub writes_acknowledged: u64,
    /// Requests that failed.
    pub failures: Failures,
    /// The disk went out of reach before the end.
    pub lost: bool,
    /// What was verified, if that was asked for.
    pub verify: Option<VerifyReport>,
    /// Latencies of reads and writes.
    #[serde(skip)]
    pub histogram: LatencyHistogram,
    /// The same by kind: reads, writes, and how long those waited that were never sent.
    #[serde(skip)]
    pub histograms: Vec<(&'static str, LatencyHistogram)>,
}

/// A number that readers of JSON do not round: as text where their numbers, which are doubles, do not reach.
pub(in crate::cli) fn exact<S: serde::Serializer>(n: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    match *n <= SEED_END {
        true => serializer.serialize_u64(*n),
        false => serializer.collect_str(n),
    }
}

impl LoadReport {
    /// Whether nothing failed and nothing was wrong.
    pub fn is_good(&self) -> bool {
        !self.lost && self.failures.count == 0 && self.verify.as_ref().is_none_or(VerifyReport::is_good)
    }

    /// A table for people.
    pub fn to_text(&self) -> String {
        let mut text = format!(
            "{}: {} of it at {}, blocks of {}, {} in flight, {}, seed {}\n",
            shown(&self.target),
            fmt_bytes(self.range_bytes),
            self.range_offset,
            fmt_bytes(self.block_bytes.into()),
            self.depth,
            match self.connections {
                1 => "1 connection".to_owned(),
                n => format!("{n} connections"),
            },
            self.seed
        );
        let header = ["", "IOPS", "MB/s", "mean", "p50", "p90", "p99", "p99.9", "max", "count", "errors"];
        row(&mut text, &header.map(str::to_owned));
        let kinds = [
            ("reads", &self.reads),
            ("writes", &self.writes),
            ("all", &self.total),
            ("flushes", &self.flushes),
        ];
        let mixed = self.reads.operations > 0 && self.writes.operations > 0;
        for (name, kind) in kinds {
            let used = kind.operations + kind.errors > 0 && (name != "all" || mixed);
            if used {
                row(&mut text, &kind_row(name, kind));
            }
        }
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "{} in {}",
            count(self.total.operations, "operation"),
            fmt_duration(self.elapsed_ns)
        );
        if let Some(rate) = self.rate_per_sec {
            let _ = writeln!(text, "latencies count from when a request was due, at {rate} a second");
        }
        if let Some(percent) = self.holes_percent.filter(|percent| *percent > 0 && self.reads.operations > 0)
        {
            let what = if percent == 100 {
                "all of it is holes".into()
            } else {
                format!("{percent} % of it are holes")
            };
            let _ = writeln!(text, "{what}: what reads them is answered without the disk, and faster");
        }
        if self.unsent > 0 {
            let _ = writeln!(
                text,
                "{} due and never sent: the disk does not keep up with the rate",
                count(self.unsent, "request")
            );
        }
        self.judgement(&mut text);
        text
    }

    fn judgement(&self, text: &mut String) {
        if let Some(verify) = &self.verify {
            let _ = write!(
                text,
                "verified: {}, {} wrong",
                count(verify.reads_verified, "read"),
                verify.read_mismatches.count
            );
            let _ = match &verify.at_end {
                Some(check) => writeln!(
                    text,
                    "; at the end {}, {} wrong, {} unknown",
                    count(check.verified, "block"),
                    check.mismatches.count,
                    check.unknown
                ),
                None => writeln!(text, "; at the end nothing could be read back"),
            };
            let at_end = verify.at_end.iter().flat_map(|check| &check.mismatches.first);
            for mismatch in verify.read_mismatches.first.iter().chain(at_end) {
                let _ = writeln!(text, "  {mismatch}");
            }
        }
        if self.lost {
            let _ = writeln!(text, "the disk went out of reach");
        }
        let at_end = self.verify.iter().filter_map(|verify| verify.at_end.as_ref());
        let failures = at_end.map(|check| &check.failures).chain([&self.failures]);
        for message in failures.flat_map(|failures| &failures.first) {
            let _ = writeln!(text, "  {}", shown(message));
        }
    }
}

fn count(n: u64, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

fn kind_row(name: &str, kind: &KindReport) -> [String; 11] {
    let latency = &kind.latency;
    let times =
        [latency.mean_ns, latency.p50_ns, latency.p90_ns, latency.p99_ns, latency.p99_9_ns, latency.max_ns]
            .map(|ns| if latency.count == 0 { "-".to_owned() } else { fmt_duration(ns) });
    let [mean, p50, p90, p99, p99_9, max] = times;
    let iops = format!("{:.0}", kind.iops);
    let rate = format!("{:.1}", kind.bytes_per_sec / 1e6);
    let [done, errors] = [kind.operations, kind.errors].map(|n| n.to_string());
    [name.to_owned(), iops, rate, mean, p50, p90, p99, p99_9, max, done, errors]
}

fn row(text: &mut String, cells: &[String; 11]) {
    for (i, cell) in cells.iter().enumerate() {
        let _ = if i == 0 { write!(text, "{cell:<8}") } else { write!(text, " {cell:>9}") };
    }
    text.push('\n');
}
