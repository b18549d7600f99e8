//! What commands that run a job have in common: options, and how a job is watched to its end.

use std::rc::Rc;

use blockferry_ring::sync::{Either, either};
use blockferry_ring::{Patience, Ring};
use clap::ValueEnum;
use serde_json::json;

use super::Global;
use super::exit::{Exit, Failure};
use super::image::duration;
use super::progress::{INTERVAL_NANOS, Progress};
use super::signals::{Signal, Signals};
use crate::base::limits;
use crate::base::units::fmt_bytes;
use crate::block::Driver;
use crate::engine::qcow2::format;
use crate::job::event::JobEvent;
use crate::job::governor::GuestFirst;
use crate::job::policy::{ErrorAction, OnError};
use crate::job::runner::{Ending, Job};

/// How much clients' latency counts.
pub fn guest_first(text: &str) -> Result<GuestFirst, String> {
    match text {
        "auto" | "on" => Ok(GuestFirst::Auto),
        "off" => Ok(GuestFirst::Off),
        time => duration(time).map(GuestFirst::Goal),
    }
}

/// The error policies, as clap shows them.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Policy {
    /// End the job with the error
    Report,
    /// Try again, with pauses that grow
    Ignore,
    /// Pause the job
    Stop,
    /// Pause the job when the target is full, otherwise report
    Enospc,
}

impl From<Policy> for OnError {
    fn from(policy: Policy) -> OnError {
        match policy {
            Policy::Report => OnError::Report,
            Policy::Ignore => OnError::Ignore,
            Policy::Stop => OnError::Stop,
            Policy::Enospc => OnError::Enospc,
        }
    }
}

/// A number of bytes as the library takes it.
pub fn bytes(name: &str, bytes: u64) -> Result<i64, Failure> {
    i64::try_from(bytes).map_err(|_| Failure::text(format!("--{name} is too large")))
}

/// The name of an ending in JSON.
pub fn ending_name(ending: &Ending) -> &'static str {
    match ending {
        Ending::Completed => "completed",
        Ending::Cancelled => "cancelled",
        Ending::Failed(_) => "failed",
    }
}

/// The exit code that belongs to an ending.
pub fn exit_code(ending: &Ending) -> Exit {
    match ending {
        Ending::Completed => Exit::Done,
        Ending::Cancelled => Exit::Cancelled,
        Ending::Failed(_) => Exit::Failed,
    }
}

/// Bytes of data a second, in the time in which the job copied. A limit allows a first burst; over any longer time it holds,
/// so no rate above it is claimed.
pub fn copy_rate(job: &Job) -> u64 {
    let details = job.details();
    within_limit(job, rate(details.bytes_copied, details.copy_nanos))
}

/// No more than the job's limit, where it has one.
pub fn within_limit(job: &Job, bytes_per_sec: u64) -> u64 {
    match job.info().speed {
        0 => bytes_per_sec,
        limit => bytes_per_sec.min(limit),
    }
}

fn rate(bytes: u64, nanos: u64) -> u64 {
    let rate = u128::from(bytes) * 1_000_000_000 / u128::from(nanos.max(1));
    rate.min(u128::from(u64::MAX)) as u64
}

/// A disk as the last line of a job names it: its name, format and size.
pub fn disk(name: &str, driver: &Rc<dyn Driver>) -> String {
    format!("'{name}' ({}, {})", format(driver), fmt_bytes(driver.len()))
}

/// What a job that failed has left of its target, which is called so.
pub fn left_behind(target: &str, is_marked: bool) -> String {
    match is_marked {
        true => format!("{target} is incomplete and marked so"),
        false => format!("Nothing says of {target} that it is incomplete: do not use it"),
    }
}

/// What is done with a job that is ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtReady {
    /// It ends, and clients stay where they are.
    Finish,
    /// It ends, and clients go on, on the other side.
    Pivot,
    /// It goes on until a signal ends it.
    Follow,
}

/// What is said of a job.
#[derive(Clone, Copy, Debug)]
pub struct Words {
    /// What is so when it is ready.
    pub ready: &'static str,
    /// A signal gives it up.
    pub gives_up: &'static str,
    /// A signal completes it.
    pub finishes: &'static str,
}

/// Watches a job to its end and gives the orders that the options imply.
#[derive(Debug)]
pub struct Watch<'a> {
    /// Options of every command.
    pub global: &'a Global,
    /// The ring.
    pub ring: &'a Ring,
    /// What ends the job, or lets it go on.
    pub signals: &'a Signals,
    /// No progress.
    pub quiet: bool,
    /// What is said.
    pub words: Words,
    /// What is done when it is ready.
    pub at_ready: AtReady,
}

impl Watch<'_> {
    /// To the end. A job that is ready is not ended before `may_end` says so, which is asked again and again.
    pub async fn follow(&self, job: &Job, mut may_end: impl FnMut() -> bool) -> Result<Ending, Failure> {
        let mut progress = Progress::new(self.global, self.quiet, self.ring.clock());
        let mut ordered = false;
        let mut asked = false;
        loop {
            let something = either(job.next_event(), self.signals.next());
            match either(something, self.ring.sleep(INTERVAL_NANOS)).await {
                Either::First(Either::First(event)) => self.tell(&progress, &event),
                Either::First(Either::Second(Signal::Continue)) => match job.resume() {
                    Ok(()) => progress.say("Going on"),
                    Err(error) => progress.say(&error.to_string()),
                },
                Either::First(Either::Second(_)) => {
                    // Before ready this gives the job up; from then on it ends complete, unless somebody who has
                    // waited for that in vain (a server may hang) says it again.
                    let gives_up = !job.status().is_ready() || asked;
                    progress.say(if gives_up { self.words.gives_up } else { self.words.finishes });
                    if let Err(error) = job.cancel(gives_up) {
                        progress.say(&error.to_string());
                    }
                    (ordered, asked) = (true, true);
                }
                Either::Second(()) => progress.update(job, self.ring.clock()),
            }
            if let Some(ending) = job.ending() {
                progress.finish();
                while let Some(event) = job.pop_event() {
                    self.tell(&progress, &event);
                }
                return Ok(ending);
            }
            if job.status().is_ready() && !ordered && may_end() {
                ordered = self.at_ready != AtReady::Follow;
                match self.at_ready {
                    AtReady::Finish => job.cancel(false)?,
                    AtReady::Pivot => job.complete()?,
                    AtReady::Follow => {}
                }
            }
        }
    }

    fn tell(&self, progress: &Progress, event: &JobEvent) {
        if self.global.json {
            println!("{}", json!({"event": event.name(), "data": event}));
        }
        match event {
            JobEvent::Ready(position) => progress.say(&format!(
                "Ready: {} ({} dealt with)",
                self.words.ready,
                fmt_bytes(position.offset)
            )),
            JobEvent::Error { operation, action, .. } => {
                let what = match action {
                    ErrorAction::Report => "the job ends",
                    ErrorAction::Ignore => "it is tried again",
                    ErrorAction::Stop => "the job is paused; SIGCONT lets it go on, SIGTERM ends it",
                };
                progress.say(&format!("A {} failed: {what}", operation.name()));
            }
            _ => {}
        }
    }
}

/// As many completions as a job has copies in flight; the time is about what a device with 2 GB/s takes for them.
const BULK: Patience = Patience { completions: limits::MIRROR_OPERATIONS, wait_usec: 2_000 };

/// For a job without clients, for whom nothing must wait: if one of the places does its I/O in worker threads, many
/// completions are taken at once.
pub fn suit_bulk<'a>(ring: &Ring, mut places: impl Iterator<Item = &'a str>) {
    if places.any(is_synchronous) {
        ring.set_patience(Some(BULK));
    }
}

/// Whether a file or device does its I/O in the call that asks for it: such a one refuses requests that must not wait.
/// io_uring hands its requests to worker threads (zram, tmpfs).
fn is_synchronous(name: &str) -> bool {
    use rustix::fs::{Mode, OFlags};
    let Ok(file) = rustix::fs::open(name, OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC, Mode::empty())
    else {
        return false;
    };
    let mut memory = vec![0; 2 * 4096];
    let start = memory.as_ptr().align_offset(4096);
    let Some(block) = memory.get_mut(start..start + 4096) else { return false };
    let mut parts = [std::io::IoSliceMut::new(block)];
    let result = rustix::io::preadv2(&file, &mut parts, 0, rustix::io::ReadWriteFlags::NOWAIT);
    matches!(result, Err(rustix::io::Errno::OPNOTSUPP))
}
