//! Progress of a job: a bar for people, lines for scripts.
//!
//! Rate and ETA are of the job's own work: the rate is that of data that it copied, and never above its speed limit; the
//! ETA goes by bytes that it has dealt with, holes included. The phase is named, because "100 %" and "ready" are not the same.

use serde_json::json;

use super::job::within_limit;
use super::{Global, print};
use crate::base::units::{fmt_bytes, fmt_duration, fmt_rate};
use crate::job::policy::CopyMode;
use crate::job::runner::Job;
use crate::job::status::Status;

/// How often progress is looked at.
pub const INTERVAL_NANOS: u64 = 200_000_000;

/// Characters of a bar.
const BAR_WIDTH: usize = 32;

/// Shows how far a job is.
#[derive(Debug)]
pub struct Progress {
    has_bar: bool,
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
        let has_bar = !global.json && !quiet && print::has_status();
        Progress {
            has_bar,
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
        if self.has_bar {
            let eta = eta_ns.map_or_else(|| "-".to_owned(), fmt_duration);
            let more = format!(
                "  dirty {}{}",
                fmt_bytes(details.bytes_dirty),
                match (details.copy_mode, details.converges) {
                    (CopyMode::WriteBlocking, _) => "  write-blocking",
                    (_, Some(false)) => "  does not converge",
                    _ => "",
                },
            );
            let line = bar(details.phase, progress.offset(), progress.len(), copy_rate, &eta) + &more;
            print::status(Some(&line));
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
            print::progress(&line);
        }
    }

    /// Says how far a job is, whoever asks for it.
    pub fn report(&mut self, job: &Job, now_ns: u64) {
        self.update(job, now_ns);
        if !self.json {
            let (progress, phase) = (job.progress(), job.details().phase);
            let status = match job.status() {
                Status::Running => String::new(),
                status => format!(" ({})", status.name()),
            };
            print::say_line(
                &(line(phase, progress.offset(), progress.len(), within_limit(job, self.copy_rate as u64))
                    + &status),
            );
        }
    }

    /// Says how far something is that is no job.
    pub fn report_of(&mut self, phase: &'static str, done: u64, len: u64, now_ns: u64) {
        self.show(phase, done, len, now_ns);
        if !self.json {
            print::say_line(&line(phase, done, len, self.rate as u64));
        }
    }

    /// Shows how far something is that is no job.
    pub fn show(&mut self, phase: &'static str, done: u64, len: u64, now_ns: u64) {
        self.show_work(phase, done, len, done, now_ns);
    }

    /// The same where only a part of what is done was work. The rate is that of the work, and what is left is taken to
    /// need as much of it as what is done.
    pub fn show_work(&mut self, phase: &'static str, done: u64, len: u64, work: u64, now_ns: u64) {
        if let Some((then, before)) = self.last
            && now_ns > then
        {
            let rate = work.saturating_sub(before) as f64 * 1e9 / (now_ns - then) as f64;
            self.rate = if self.looks < 3 { rate } else { self.rate * 0.7 + rate * 0.3 };
        }
        self.last = Some((now_ns, work));
        self.looks += 1;
        let left = len.saturating_sub(done) as f64 * (work as f64 / done.max(1) as f64);
        let eta_ns = (self.rate > 0.0).then(|| (left / self.rate * 1e9) as u64);
        if self.has_bar {
            let eta = eta_ns.map_or_else(|| "-".to_owned(), fmt_duration);
            print::status(Some(&bar(phase, done, len, self.rate as u64, &eta)));
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
            print::progress(&line);
        }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        if self.has_bar {
            print::status(None);
        }
    }

    /// Prints a line that people have to know, whatever they asked for.
    pub fn insist(&self, text: &str) {
        if !self.json {
            print::say_line(text);
        }
    }

    /// Prints a line above the bar.
    pub fn say(&self, text: &str) {
        if !self.json && !self.quiet {
            print::say_line(text);
        }
    }
}

/// How far something is, as a sentence.
fn line(phase: &str, done: u64, len: u64, rate: u64) -> String {
    let share = if len == 0 { 100 } else { (done as f64 / len as f64 * 100.0).min(100.0) as u64 };
    format!("Progress: {phase}, {share} %, {} of {}, {}", fmt_bytes(done), fmt_bytes(len), fmt_rate(rate))
}

/// How far something is, as a line.
fn bar(phase: &str, done: u64, len: u64, rate: u64, eta: &str) -> String {
    let share = if len == 0 { 1.0 } else { (done as f64 / len as f64).min(1.0) };
    let filled = (share * BAR_WIDTH as f64) as usize;
    let head = if filled < BAR_WIDTH { ">" } else { "" };
    format!(
        "{phase:>12} {:<BAR_WIDTH$} {:>3} %  {} of {}  {}  ETA {eta}",
        "=".repeat(filled) + head,
        (share * 100.0) as u64,
        fmt_bytes(done),
        fmt_bytes(len),
        fmt_rate(rate),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_tells_how_far_it_is() {
        let line = bar("bulk", 1 << 20, 4 << 20, 1 << 20, "3 s");
        assert!(line.starts_with(&format!("        bulk {:<32}  25 %  ", "========>")), "{line}");
        assert!(line.contains("ETA 3 s"), "{line}");
        assert!(bar("x", 0, 0, 0, "-").contains(&format!("{} 100 %", "=".repeat(32))));
        assert!(bar("x", 9, 3, 0, "-").contains(" 100 %"));
    }
}
