//! What `blockferry mirror` says at the end.

use std::rc::Rc;

use serde_json::{Value, json};

use super::Run;
use super::args::Settings;
use crate::base::units::{fmt_bytes, fmt_duration};
use crate::block::Driver;
use crate::cli::exit::{Exit, Failure};
use crate::cli::job::{WhatItHolds, copied, disk, ending_name, exit_code, keeps_nothing, left_behind};
use crate::cli::print::say;
use crate::job::mirror::SyncMode;
use crate::job::mirror::verify::{Report, Verifier};
use crate::job::runner::{Ending, Job};

/// What is reported at the end.
pub(super) struct Outcome<'a> {
    pub(super) ending: &'a Ending,
    pub(super) elapsed_ns: u64,
    /// Bytes of the target behind the source's end.
    pub(super) tail: Option<u64>,
    /// Bytes that source and target occupy.
    pub(super) allocated: [Option<u64>; 2],
    /// The source is no whole disk.
    pub(super) source_incomplete: bool,
    /// The two.
    pub(super) drivers: &'a [Rc<dyn Driver>; 2],
}

impl Run {
    /// Prints it, and gives the exit code; for programs comes what is to be printed once it is known what is left.
    pub(super) fn report(
        &self,
        settings: &Settings,
        job: &Job,
        outcome: &Outcome<'_>,
        verifier: Option<&Rc<Verifier>>,
    ) -> (Exit, Option<Value>) {
        let Outcome { ending, elapsed_ns, tail, allocated: [source_allocated, target_allocated], .. } =
            *outcome;
        let target = &outcome.drivers[1];
        let details = job.details();
        let verified = verifier.map(|verifier| verifier.report());
        let exit = match ending {
            Ending::Failed(_) if verified.as_ref().is_some_and(|v| v.mismatch.is_some()) => Exit::Different,
            ending => exit_code(ending),
        };
        if self.global.json {
            let end = json!({
                "event": "end",
                "ending": ending_name(ending),
                "pivot": settings.pivot,
                "elapsed-ns": elapsed_ns,
                "details": details,
                "target-tail-bytes": tail,
                "source-allocated-bytes": source_allocated,
                "target-allocated-bytes": target_allocated,
                "verify": verified,
            });
            return (exit, Some(end));
        }
        if settings.quiet && exit == Exit::Done {
            return (exit, None);
        }
        match ending {
            Ending::Completed => self.say_completed(settings, job, outcome, verified.as_ref()),
            Ending::Cancelled => {
                say!("Cancelled: {} is incomplete and marked so", disk(&settings.target, target));
            }
            Ending::Failed(_) => {
                // Nothing is verified by a job that failed; where the two differ is worth a line.
                if let Some(offset) = verified.and_then(|report| report.mismatch) {
                    say!("Verify: source and target differ at offset {offset}");
                }
            }
        }
        (exit, None)
    }

    /// What was done, and, as the last line, what is true now.
    fn say_completed(
        &self,
        settings: &Settings,
        job: &Job,
        outcome: &Outcome<'_>,
        verified: Option<&Report>,
    ) {
        let details = job.details();
        say!(
            "Completed in {}: {}, {}{} zeroed, {} skipped{}",
            fmt_duration(outcome.elapsed_ns),
            copied(job),
            match details.bytes_shared {
                0 => String::new(),
                shared => format!("{} shared, ", fmt_bytes(shared)),
            },
            fmt_bytes(details.bytes_zeroed),
            fmt_bytes(details.bytes_skipped),
            outcome.allocated[1]
                .map_or_else(String::new, |bytes| { format!("; the target occupies {}", fmt_bytes(bytes)) }),
        );
        if let Some(tail) = outcome.tail {
            say!(
                "The target is {} larger than the source: what lies behind the source's end holds what it held before",
                fmt_bytes(tail)
            );
        }
        if let Some(report) = verified {
            say_verified(report, self.engine.ring().clock());
        }
        let [source, target] = outcome.drivers;
        let named = disk(&settings.source, source);
        let now_ns = self.engine.ring().clock();
        // Clients that stay on the source may have changed it since.
        let is_served = !settings.export.is_empty() && !settings.pivot;
        let holds = WhatItHolds {
            source: &named,
            snapshot: None,
            len: source.len(),
            tail: outcome.tail.unwrap_or(0),
            is_incomplete: outcome.source_incomplete,
            as_of: is_served.then(|| instant(now_ns, now_ns)),
        };
        say!(
            "{} {}{}",
            disk(&settings.target, target),
            match (keeps_nothing(target), settings.sync) {
                (true, _) => format!("was sent what {named} holds, and keeps nothing"),
                (_, SyncMode::Full | SyncMode::Top) => holds.to_string(),
                (_, SyncMode::None) => {
                    format!("holds what was written to {named} meanwhile, is no copy of it, and is marked so")
                }
            },
            if settings.pivot { ", and is in use now" } else { "" },
        );
    }
}

fn say_verified(report: &Report, now_ns: u64) {
    say!(
        "Verified: {} compared ({} of it again; {}), checksum {} (BLAKE3 of the BLAKE3 of each MiB), as of {}",
        fmt_bytes(report.bytes_compared),
        fmt_bytes(report.bytes_compared_again),
        report.grounds,
        report.checksum,
        instant(report.instant_ns, now_ns),
    );
}

/// The failure in words, where it is one.
pub(super) fn exit_of(
    exit: Exit,
    ending: Ending,
    target: &str,
    is_there: bool,
    is_marked: bool,
) -> Result<Exit, Failure> {
    match ending {
        Ending::Failed(text) if exit == Exit::Failed => Err(Failure::text(format!(
            "The mirror failed: {}. {}",
            text.trim_end_matches('.'),
            left_behind(target, is_there, is_marked)
        ))),
        _ => Ok(exit),
    }
}

/// A moment of the ring's clock as people write it.
fn instant(at_ns: u64, now_ns: u64) -> String {
    let ago = std::time::Duration::from_nanos(now_ns.saturating_sub(at_ns));
    humantime::format_rfc3339_millis(std::time::SystemTime::now() - ago).to_string()
}
