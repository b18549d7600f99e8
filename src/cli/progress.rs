//! Progress of a job: a bar for people, lines for scripts.
//!
//! Rate and ETA are of the job's own work: the rate is that of data that it copied, and never above its speed limit; the
//! ETA goes by bytes that it has dealt with, holes included. The phase is named, because "100 %" and "ready" are not the same.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

use super::Global;
use super::job::within_limit;
use crate::base::units::{fmt_bytes, fmt_duration, fmt_rate};
use crate::job::policy::CopyMode;
use crate::job::runner::Job;

/// How often progress is looked at.
pub const INTERVAL_NANOS: u64 = 200_000_000;

/// Shows how far a job is.
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
    json: bool,
    quiet: bool,
    began_ns: u64,
    last: Option<(u64, u64)>,
    /// Bytes a second that are dealt with, smoothed.
    rate: f64,
    /// Bytes of data that were copied by the latest look, and a second, smoothed.
    copied: u64,
    copy_rate: f64,
    looks: u32,
}

impl Progress {
    /// For a job that begins now.
    pub fn new(global: &Global, quiet: bool, now_ns: u64) -> Progress {
        let terminal = std::io::IsTerminal::is_terminal(&std::io::stderr());
        let bar = (!global.json && !quiet && terminal).then(|| {
            let bar = ProgressBar::with_draw_target(Some(1), ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template("{prefix:>12} {bar:32} {percent:>3} %  {msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "));
            bar.enable_steady_tick(Duration::from_secs(3600));
            bar
        });
        Progress {
            bar,
            json: global.json,
            quiet,
            began_ns: now_ns,
            last: None,
            rate: 0.0,
            copied: 0,
            copy_rate: 0.0,
            looks: 0,
        }
    }

    /// Looks at the job.
    pub fn update(&mut self, job: &Job, now_ns: u64) {
        let progress = job.progress();
        let details = job.details();
        if let Some((then, done)) = self.last
            && now_ns > then
        {
            let a_second = |bytes: u64| bytes as f64 * 1e9 / (now_ns - then) as f64;
            let new = self.looks < 3;
            let smooth = |old: f64, rate: f64| if new { rate } else { old * 0.7 + rate * 0.3 };
            self.rate = smooth(self.rate, a_second(progress.offset().saturating_sub(done)));
            let copied = a_second(details.bytes_copied.saturating_sub(self.copied));
            self.copy_rate = smooth(self.copy_rate, copied);
        }
        self.last = Some((now_ns, progress.offset()));
        self.copied = details.bytes_copied;
        self.looks += 1;
        let copy_rate = within_limit(job, self.copy_rate as u64);
        let eta_ns = (self.rate > 0.0).then(|| (progress.remaining() as f64 / self.rate * 1e9) as u64);
        if let Some(bar) = &self.bar {
            bar.set_length(progress.len().max(1));
            bar.set_position(if progress.is_empty() { 1 } else { progress.offset() });
            bar.set_prefix(details.phase);
            let eta = eta_ns.map_or_else(|| "-".to_owned(), fmt_duration);
            bar.set_message(format!(
                "{} of {}  {}  ETA {eta}  dirty {}{}",
                fmt_bytes(progress.offset()),
                fmt_bytes(progress.len()),
                fmt_rate(copy_rate),
                fmt_bytes(details.bytes_dirty),
                match (details.copy_mode, details.converges) {
                    (CopyMode::WriteBlocking, _) => "  write-blocking",
                    (_, Some(false)) => "  does not converge",
                    _ => "",
                },
            ));
        }
        if self.json {
            let line = json!({
                "event": "progress",
                "status": job.status().name(),
                "phase": details.phase,
                "offset": progress.offset(),
                "len": progress.len(),
                "rate-bytes-per-sec": copy_rate,
                "eta-ns": eta_ns,
                "elapsed-ns": now_ns - self.began_ns,
                "bytes-dirty": details.bytes_dirty,
                "bytes-copied": details.bytes_copied,
                "bytes-zeroed": details.bytes_zeroed,
                "bytes-skipped": details.bytes_skipped,
                "bytes-guest": details.bytes_guest,
                "bytes-mirrored": details.bytes_mirrored,
                "copy-mode": details.copy_mode,
                "actively-synced": details.actively_synced,
                "copy-bytes-per-sec": within_limit(job, details.copy_bytes_per_sec),
                "dirty-bytes-per-sec": details.dirty_bytes_per_sec,
                "converges": details.converges,
                "window-bytes": details.window_bytes,
                "goal-ns": details.goal_nanos,
                "pace-bytes-per-sec": details.pace_bytes_per_sec,
                "io-status": job.info().io_status,
            });
            println!("{line}");
        }
    }

    /// Shows how far something is that is no job.
    pub fn show(&mut self, phase: &'static str, done: u64, len: u64, now_ns: u64) {
        if let Some((then, before)) = self.last
            && now_ns > then
        {
            let rate = done.saturating_sub(before) as f64 * 1e9 / (now_ns - then) as f64;
            self.rate = if self.looks < 3 { rate } else { self.rate * 0.7 + rate * 0.3 };
        }
        self.last = Some((now_ns, done));
        self.looks += 1;
        let eta_ns = (self.rate > 0.0).then(|| (len.saturating_sub(done) as f64 / self.rate * 1e9) as u64);
        if let Some(bar) = &self.bar {
            bar.set_length(len.max(1));
            bar.set_position(done);
            bar.set_prefix(phase);
            let eta = eta_ns.map_or_else(|| "-".to_owned(), fmt_duration);
            let (done, len, rate) = (fmt_bytes(done), fmt_bytes(len), fmt_rate(self.rate as u64));
            bar.set_message(format!("{done} of {len}  {rate}  ETA {eta}"));
        }
        if self.json {
            let line = json!({
                "event": "progress",
                "phase": phase,
                "offset": done,
                "len": len,
                "rate-bytes-per-sec": self.rate as u64,
                "eta-ns": eta_ns,
                "elapsed-ns": now_ns - self.began_ns,
            });
            println!("{line}");
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    /// Prints a line above the bar.
    pub fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None if !self.json && !self.quiet => eprintln!("{text}"),
            None => {}
        }
    }
}
