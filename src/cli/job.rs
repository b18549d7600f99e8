//! What commands that run a job have in common: options, and how a job is watched to its end.

use std::rc::Rc;

use blockferry_ring::sync::{Either, either};
use blockferry_ring::{Nanos, Patience, Ring};
use clap::ValueEnum;

use super::Global;
use super::exit::{Exit, Failure};
use super::image::duration;
use super::print;
use super::progress::{Holes, INTERVAL_NANOS, Progress};
use super::signals::{Asked, Signal, Signals};
use crate::base::limits;
use crate::base::secret::without_secrets;
use crate::base::units::{fmt_bytes, fmt_duration, fmt_rate};
use crate::block::Driver;
use crate::engine::qcow2::format;
use crate::job::event::JobEvent;
use crate::job::governor::GuestFirst;
use crate::job::policy::{ErrorAction, OnError};
use crate::job::runner::{Ending, Job};
use crate::job::status::Status;

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
    i64::try_from(bytes).map_err(|_| Failure::usage(format!("--{name} is too large")))
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

/// What was copied, and how fast, in words: the time of the copying, which may be a part of the whole, or the limit.
pub fn copied(job: &Job) -> String {
    let details = job.details();
    let (bytes, rate) = (fmt_bytes(details.bytes_copied), rate(details.bytes_copied, details.copy_nanos));
    match job.info().speed {
        _ if details.bytes_copied == 0 => format!("{bytes} copied"),
        limit if limit > 0 && rate > limit => format!("{bytes} copied ({}, the limit)", fmt_rate(limit)),
        _ => format!("{bytes} copied in {} ({})", fmt_duration(details.copy_nanos), fmt_rate(rate)),
    }
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
    format!("'{}' ({}, {})", without_secrets(name), format(driver), fmt_bytes(driver.len()))
}

/// Whether what is written to a disk is thrown away: nothing can be said of what it holds.
pub fn keeps_nothing(driver: &Rc<dyn Driver>) -> bool {
    driver.kind() == "null" || driver.children().iter().any(|child| keeps_nothing(child.node().driver()))
}

/// What a finished copy holds: what the sentence says that begins with its target. "Equals" is what `compare` would say.
#[derive(Debug)]
pub struct WhatItHolds<'a> {
    /// The source, as [`disk`] names it.
    pub source: &'a str,
    /// Which of its snapshots was copied.
    pub snapshot: Option<&'a str>,
    /// Bytes of the source.
    pub len: u64,
    /// Bytes of the target behind the source's end.
    pub tail: u64,
    /// The source is incomplete itself.
    pub is_incomplete: bool,
    /// The moment whose content it is, where somebody may have written to the source since.
    pub as_of: Option<String>,
}

impl std::fmt::Display for WhatItHolds<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.tail > 0 || self.snapshot.is_some() { "holds " } else { "equals " })?;
        if let Some(snapshot) = self.snapshot {
            write!(f, "{snapshot} of ")?;
        }
        f.write_str(self.source)?;
        if let Some(moment) = &self.as_of {
            write!(f, " as it was at {moment}")?;
        }
        if self.tail > 0 {
            write!(f, " in its first {}", fmt_bytes(self.len))?;
        }
        if self.is_incomplete {
            f.write_str(", which is incomplete itself, and is marked so, too")?;
        }
        Ok(())
    }
}

/// What a job that failed has left of its target, which is called so.
pub fn left_behind(target: &str, is_there: bool, is_marked: bool) -> String {
    match is_marked {
        _ if !is_there => format!("Nothing that can be used is left of {target}"),
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
#[allow(missing_debug_implementations)] // What is compared is a function.
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
    /// Where it reads and writes.
    pub places: Vec<Rc<dyn Driver>>,
    /// How much of a comparing that goes on beside it is done.
    pub compared: &'a dyn Fn() -> Option<(u64, u64)>,
    /// Where there is nothing to be copied.
    pub holes: Rc<Holes>,
}

/// How a watch ended.
#[derive(Clone, Debug)]
pub struct Watched {
    /// How the job ended.
    pub ending: Ending,
    /// A signal has asked for the end.
    pub asked: Option<Asked>,
}

/// What has been ordered by a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    /// Complete it; as it stood at that time, or when it was last seen to move.
    Finish { since: Nanos, left: u64 },
    /// Give it up.
    GiveUp,
}

impl Watch<'_> {
    /// To the end. A job that is ready is not ended before `may_end` says so, which is asked again and again.
    /// `at_once` is for somebody who asks again for the end of a job that has been given up.
    pub async fn follow(
        &self,
        job: &Job,
        mut may_end: impl FnMut() -> bool,
        at_once: impl Fn(),
    ) -> Result<Watched, Failure> {
        let mut progress =
            Progress::new(self.global, self.quiet, self.ring.clock()).knowing(self.holes.clone());
        let (mut asked, mut order) = (None, None);
        let mut told = Told::default();
        let mut is_ended_at_ready = false;
        loop {
            let something = either(job.next_event(), self.signals.next());
            match either(something, self.ring.sleep(INTERVAL_NANOS)).await {
                Either::First(Either::First(event)) => self.tell(job, &progress, &mut told, &event),
                Either::First(Either::Second(Signal::Report)) => {
                    progress.report(job, (self.compared)(), self.ring.clock())
                }
                Either::First(Either::Second(Signal::Continue)) => {
                    // After Ctrl-Z and `fg` it comes to jobs that nothing has stopped.
                    if job.status().is_paused() && job.resume().is_ok() {
                        progress.say("Going on");
                    }
                }
                Either::First(Either::Second(signal)) => {
                    asked = Some(Asked { signal, at_ns: self.ring.clock() });
                    order = Some(match order {
                        Some(Order::GiveUp) => {
                            progress.finish();
                            at_once();
                            Order::GiveUp
                        }
                        None if job.status() == Status::Ready => self.finish(job, &progress),
                        Some(Order::Finish { .. }) | None => self.give_up(job, &progress),
                    });
                }
                Either::Second(()) => progress.update(job, (self.compared)(), self.ring.clock()),
            }
            if let Some(ending) = job.ending() {
                progress.finish();
                while let Some(event) = job.pop_event() {
                    self.tell(job, &progress, &mut told, &event);
                }
                return Ok(Watched { ending, asked });
            }
            if let Some(Order::Finish { since, left }) = &mut order {
                let (now, is_left) = (self.ring.clock(), job.progress().remaining());
                if is_left != *left {
                    (*since, *left) = (now, is_left);
                } else if self.is_stuck(job, is_left) && now.saturating_sub(*since) > STUCK_NANOS {
                    order = Some(self.give_up(job, &progress));
                }
            }
            if job.status().is_ready() && order.is_none() && !is_ended_at_ready && may_end() {
                is_ended_at_ready = self.at_ready != AtReady::Follow;
                match self.at_ready {
                    AtReady::Finish => job.cancel(false)?,
                    AtReady::Pivot => job.complete()?,
                    AtReady::Follow => {}
                }
            }
        }
    }

    fn finish(&self, job: &Job, progress: &Progress) -> Order {
        progress.say(self.words.finishes);
        if let Err(error) = job.cancel(false) {
            progress.say(&error.to_string());
        }
        Order::Finish { since: self.ring.clock(), left: job.progress().remaining() }
    }

    fn give_up(&self, job: &Job, progress: &Progress) -> Order {
        progress.say(self.words.gives_up);
        if let Err(error) = job.cancel(true) {
            progress.say(&error.to_string());
        }
        Order::GiveUp
    }

    /// Whether a job that should end will not: its policy has stopped it, a server is gone, or it has something to copy and
    /// does not.
    fn is_stuck(&self, job: &Job, left: u64) -> bool {
        job.status().is_paused() || left > 0 || self.places.iter().any(|place| place.is_away())
    }

    fn tell(&self, job: &Job, progress: &Progress, told: &mut Told, event: &JobEvent) {
        if self.global.json {
            print::job_event(event);
        }
        match event {
            JobEvent::Ready(position) => progress.say(&format!(
                "Ready: {} ({} dealt with)",
                self.words.ready,
                fmt_bytes(position.offset)
            )),
            JobEvent::Error { operation, action, .. } => {
                let why =
                    job.details().last_error.unwrap_or_else(|| format!("a {} failed", operation.name()));
                let why = why.trim_end_matches('.');
                match action {
                    // Why it ends is the last thing that is said.
                    ErrorAction::Report => {}
                    ErrorAction::Ignore if told.is_due(self.ring.clock()) => {
                        progress.say(&format!("{why}. It is tried again"));
                    }
                    ErrorAction::Ignore => {}
                    // A job that stands still without a word is not what --quiet asks for.
                    ErrorAction::Stop if !std::mem::replace(&mut told.is_paused, true) => {
                        let pid = std::process::id();
                        progress.insist(&format!(
                            "Paused: {why}. `kill -CONT {pid}` lets the job go on, once that is mended; `kill {pid}` \
                             ends it"
                        ));
                    }
                    ErrorAction::Stop => {}
                }
            }
            JobEvent::StatusChange { status, .. } if !status.is_paused() => told.is_paused = false,
            _ => {}
        }
    }
}

/// What has been said, so that many failures of one kind are one line.
#[derive(Debug, Default)]
struct Told {
    /// That the job is paused.
    is_paused: bool,
    /// When it was last said that something is tried again.
    at_ns: Option<Nanos>,
}

impl Told {
    /// Whether a failure that is tried again is worth another line.
    fn is_due(&mut self, now_ns: Nanos) -> bool {
        let is_due = self.at_ns.is_none_or(|at_ns| now_ns.saturating_sub(at_ns) >= REPEAT_NANOS);
        if is_due {
            self.at_ns = Some(now_ns);
        }
        is_due
    }
}

/// How often what goes wrong again and again is said again.
const REPEAT_NANOS: Nanos = 60_000_000_000;

/// How long a job that was told to complete, and does not move, is waited for: with what comes after it, a command that was
/// asked to end ends within five seconds.
const STUCK_NANOS: Nanos = 2_500_000_000;

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
