//! Progress of a job: a bar for people, lines for scripts.
//!
//! Rate and ETA are of the job's own work: the rate is that of data that it copied, and never above its speed limit. People
//! see how far the job is with the data: holes, which take no time, count neither as done nor as left. (Programs get both.)
//! Those that the job has not come to yet are counted beforehand, by [`Holes`]. The phase is named, because "100 %" and
//! "ready" are not the same: comparing is a phase, and so is a pause.
//!
//! The bar fits a terminal of [`WIDTH`] columns; what a wider one has room for comes behind that, and a narrower one gets
//! fewer fields, each of them whole. Where there is no terminal that can draw over a line, people get a line a minute.

use std::cell::Cell;
use std::rc::Rc;

use blockferry_ring::Ring;
use serde_json::json;

use super::job::within_limit;
use super::{Global, print};
use crate::base::units::{fmt_bytes, fmt_duration, fmt_rate};
use crate::block::Driver;
use crate::job::event::JobType;
use crate::job::policy::CopyMode;
use crate::job::runner::Job;
use crate::job::status::Status;

/// How often progress is looked at.
pub const INTERVAL_NANOS: u64 = 200_000_000;

/// Extents that are looked at beforehand, at most: a disk with more is shown as if the rest held data.
const EXTENTS_MAX: usize = 1 << 16;

/// Columns that have to suffice.
#[cfg(test)]
const WIDTH: usize = 60;

/// Characters of a bar.
const BAR_WIDTH: usize = 6;

/// How often a line is printed where no bar can be drawn.
const LINE_NANOS: u64 = 60_000_000_000;

/// Bytes of a disk that need no copying, as far as they are known by now: its tables, or its filesystem, are asked while the
/// job runs.
#[derive(Debug, Default)]
pub struct Holes {
    bytes: Cell<u64>,
}

impl Holes {
    /// Begins to count those of `disk`, until nobody wants to know any more; with `top_only`, what its uppermost layer does
    /// not hold needs no copying either. A disk on a server is not asked twice for what the job asks anyway.
    pub fn count(ring: &Ring, disk: &Rc<dyn Driver>, top_only: bool) -> Rc<Holes> {
        let holes = Rc::new(Holes::default());
        if !is_local(disk) {
            return holes;
        }
        let (wanted, disk, handle) = (Rc::downgrade(&holes), disk.clone(), ring.clone());
        ring.spawn(async move {
            let (mut at, mut looks) = (0, 0);
            // Tables answer at once: the job and its clients come first.
            let mut stint = handle.stint();
            while at < disk.len() && looks < EXTENTS_MAX {
                let Ok(extent) = disk.block_status(at, disk.len() - at).await else { break };
                let Some(holes) = wanted.upgrade() else { break };
                let len = extent.len.clamp(1, disk.len() - at);
                if extent.zero || top_only && !extent.allocated {
                    holes.bytes.set(holes.bytes.get() + len);
                }
                (at, looks) = (at + len, looks + 1);
                stint.step().await;
            }
        });
        holes
    }

    /// Those that a job has not come to, and which it counts as left.
    fn ahead(&self, job: &Job) -> u64 {
        let details = job.details();
        match job.status().is_ready() {
            true => 0,
            false => self.bytes.get().saturating_sub(details.bytes_skipped + details.bytes_zeroed),
        }
    }
}

/// Whether all that a disk lies in is on this machine.
fn is_local(disk: &Rc<dyn Driver>) -> bool {
    let below = disk.children();
    if below.is_empty() {
        disk.local_file().is_some()
    } else {
        below.iter().all(|child| is_local(child.node().driver()))
    }
}

/// Shows how far a job is.
#[derive(Debug)]
pub struct Progress {
    has_bar: bool,
    json: bool,
    quiet: bool,
    began_ns: u64,
    /// When a line was last printed instead of a bar.
    line_at_ns: u64,
    last: Option<(u64, u64)>,
    /// Bytes a second that are dealt with, smoothed.
    rate: f64,
    /// Bytes of data that were copied by the latest look, and a second, smoothed.
    copied: u64,
    copy_rate: f64,
    looks: u32,
    copy_mode: Option<CopyMode>,
    holes: Rc<Holes>,
}

/// How far something is, as people see it.
#[derive(Clone, Copy, Debug)]
struct Far {
    phase: &'static str,
    done: u64,
    len: u64,
    rate: u64,
    eta_ns: Option<u64>,
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
            line_at_ns: now_ns,
            last: None,
            rate: 0.0,
            copied: 0,
            copy_rate: 0.0,
            looks: 0,
            copy_mode: None,
            holes: Rc::default(),
        }
    }

    /// Knows where the source has holes.
    pub fn knowing(self, holes: Rc<Holes>) -> Progress {
        Progress { holes, ..self }
    }

    /// Looks at the job. `compared`: so much of a comparing that goes on beside it, or comes before its end.
    pub fn update(&mut self, job: &Job, compared: Option<(u64, u64)>, now_ns: u64) {
        let progress = job.progress();
        let details = job.details();
        self.tell_mode(details.copy_mode);
        if let Some((then, done)) = self.last
            && now_ns > then
        {
            let a_second = |bytes: u64| bytes as f64 * 1e9 / (now_ns - then) as f64;
            let new = self.looks < 3;
            let smooth = |old: f64, rate: f64| if new { rate } else { old * 0.7 + rate * 0.3 };
            self.rate = smooth(self.rate, a_second(worked(job).saturating_sub(done)));
            let copied = a_second(details.bytes_copied.saturating_sub(self.copied));
            self.copy_rate = smooth(self.copy_rate, copied);
        }
        self.last = Some((now_ns, worked(job)));
        self.copied = details.bytes_copied;
        self.looks += 1;
        let copy_rate = within_limit(job, self.copy_rate as u64);
        let eta_ns = (self.rate > 0.0).then(|| (progress.remaining() as f64 / self.rate * 1e9) as u64);
        let far = self.far(job, compared);
        if self.has_bar {
            let mut fields = fields(&far);
            // Only a mirror has clients that make dirty what was copied.
            if matches!(job.info().job_type, JobType::Mirror | JobType::Commit) && details.phase != "bulk" {
                fields.push((7, format!("  dirty {}", fmt_bytes(details.bytes_dirty))));
            }
            match (details.copy_mode, details.converges) {
                (CopyMode::WriteBlocking, _) => fields.push((6, "  write-blocking".to_owned())),
                (_, Some(false)) => fields.push((6, "  does not converge".to_owned())),
                _ => {}
            }
            print::status(Some(&fitted(fields, print::status_columns())));
        }
        self.tell_line(&far, now_ns);
        if self.json {
            let (compared, to_compare) = compared.unzip();
            let line = json!({
                "event": "progress",
                "status": job.status().name(),
                "phase": far.phase,
                "bytes-compared": compared,
                "bytes-to-compare": to_compare,
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

    /// How far a job is, as people see it.
    fn far(&self, job: &Job, compared: Option<(u64, u64)>) -> Far {
        let (progress, details) = (job.progress(), job.details());
        let skipped = details.bytes_skipped.min(progress.offset());
        let ahead = self.holes.ahead(job).min(progress.remaining());
        let (rate, left) = (within_limit(job, self.copy_rate as u64), progress.remaining() - ahead);
        let eta_ns = (self.rate > 0.0).then(|| (left as f64 / self.rate * 1e9) as u64);
        let far = Far {
            phase: details.phase,
            done: progress.offset() - skipped,
            len: progress.len().saturating_sub(skipped + ahead),
            rate,
            eta_ns,
        };
        match compared {
            _ if job.status().is_paused() => Far { phase: "paused", rate: 0, eta_ns: None, ..far },
            Some((done, len)) if job.status().is_ready() || details.phase == "verify" => {
                Far { phase: "verify", done, len, rate: 0, eta_ns: None }
            }
            _ => far,
        }
    }

    /// Tells that clients' writes are treated in another way from now on: they may feel it.
    fn tell_mode(&mut self, mode: CopyMode) {
        if self.copy_mode.replace(mode).is_none_or(|old| old == mode) {
            return;
        }
        if self.json {
            print::event(&json!({"event": "copy-mode", "copy-mode": mode}));
        }
        self.say(match mode {
            CopyMode::WriteBlocking => {
                "Copy mode: write-blocking from now on, because more than a quarter of what the job copies would have to be \
                 copied again (whole chunks, of which clients may write little)"
            }
            CopyMode::Background => "Copy mode: background from now on",
        });
    }

    /// Prints a line now and then, where nothing else shows that something goes on.
    fn tell_line(&mut self, far: &Far, now_ns: u64) {
        if self.is_line_due(now_ns) {
            print::say_line(&line(far));
        }
    }

    fn is_line_due(&mut self, now_ns: u64) -> bool {
        let is_wanted = !self.has_bar && !self.json && !self.quiet;
        let is_due = is_wanted && now_ns >= self.line_at_ns + LINE_NANOS;
        if is_due {
            self.line_at_ns = now_ns;
        }
        is_due
    }

    /// Says how far a job is, whoever asks for it.
    pub fn report(&mut self, job: &Job, compared: Option<(u64, u64)>, now_ns: u64) {
        self.update(job, compared, now_ns);
        if !self.json {
            let status = match job.status() {
                Status::Running => String::new(),
                status => format!(" ({})", status.name()),
            };
            print::say_line(&(line(&self.far(job, compared)) + &status));
        }
    }

    /// Says how far something is that is no job.
    pub fn report_of(&mut self, phase: &'static str, done: u64, len: u64, now_ns: u64) {
        self.show(phase, done, len, now_ns);
        if !self.json {
            print::say_line(&line(&Far { phase, done, len, rate: self.rate as u64, eta_ns: None }));
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
        let far = Far { phase, done, len, rate: self.rate as u64, eta_ns };
        if self.has_bar {
            print::status(Some(&fitted(fields(&far), print::status_columns())));
        }
        self.tell_line(&far, now_ns);
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
            // What was true before it is not drawn again behind it.
            self.finish();
            print::say_line(text);
        }
    }

    /// Prints a line above the bar.
    pub fn say(&self, text: &str) {
        if !self.quiet {
            self.insist(text);
        }
    }
}

/// Bytes that a job has dealt with, without those that took no work.
fn worked(job: &Job) -> u64 {
    job.progress().offset().saturating_sub(job.details().bytes_skipped)
}

/// How far something is, as a sentence.
fn line(far: &Far) -> String {
    let Far { phase, done, len, rate, .. } = *far;
    let share = if len == 0 { 100 } else { (done as f64 / len as f64 * 100.0).min(100.0) as u64 };
    format!("Progress: {phase}, {share} %, {} of {}, {}", fmt_bytes(done), fmt_bytes(len), fmt_rate(rate))
}

/// A field of a bar, and how early it is left out where there is no room for all: the highest goes first.
type Field = (u8, String);

/// How far something is, as the fields of a bar.
fn fields(far: &Far) -> Vec<Field> {
    let Far { phase, done, len, rate, eta_ns } = *far;
    let share = if len == 0 { 1.0 } else { (done as f64 / len as f64).min(1.0) };
    let filled = (share * BAR_WIDTH as f64) as usize;
    let head = if filled < BAR_WIDTH { ">" } else { "" };
    let phase = if phase == "final-flush" { "flush" } else { phase };
    let mut fields = vec![
        (1, format!("{phase:<8}")),
        (5, format!(" {:<BAR_WIDTH$}", "=".repeat(filled) + head)),
        (0, format!(" {:>3} %", (share * 100.0) as u64)),
        (4, format!(" of {}", fmt_bytes(len))),
        (3, format!("  {}", fmt_rate(rate))),
    ];
    if let Some(ns) = eta_ns {
        fields.push((2, format!("  {} left", fmt_duration(ns))));
    }
    fields
}

/// The fields as a line of so many columns at most.
fn fitted(mut fields: Vec<Field>, columns: usize) -> String {
    let width = |fields: &[Field]| fields.iter().map(|(_, text)| text.chars().count()).sum::<usize>();
    while width(&fields) > columns && fields.len() > 1 {
        let last = fields.iter().map(|(rank, _)| *rank).max();
        fields.retain(|(rank, _)| Some(*rank) != last);
    }
    fields.iter().map(|(_, text)| text.as_str()).collect::<String>().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bar(far: &Far) -> String {
        fitted(fields(far), WIDTH)
    }

    fn far(done: u64, len: u64) -> Far {
        Far { phase: "bulk", done, len, rate: 1 << 20, eta_ns: Some(3_000_000_000) }
    }

    #[test]
    fn a_bar_tells_how_far_it_is() {
        assert_eq!(bar(&far(1 << 20, 4 << 20)), "bulk     =>      25 % of 4 MiB  1 MiB/s  3 s left");
        assert!(bar(&far(0, 0)).contains(&format!("{} 100 %", "=".repeat(BAR_WIDTH))));
        assert!(bar(&far(9, 3)).contains(" 100 %"));
        assert!(!bar(&Far { eta_ns: None, ..far(1, 2) }).contains("left"));
    }

    #[test]
    fn fields_are_left_out_whole() {
        let all = fields(&far(1 << 20, 4 << 20));
        for (columns, line) in [
            (80, "bulk     =>      25 % of 4 MiB  1 MiB/s  3 s left"),
            (42, "bulk      25 % of 4 MiB  1 MiB/s  3 s left"),
            (36, "bulk      25 %  1 MiB/s  3 s left"),
            (30, "bulk      25 %  3 s left"),
            (20, "bulk      25 %"),
            (8, "25 %"),
            (1, "25 %"),
        ] {
            let said = fitted(all.clone(), columns);
            assert_eq!(said, line, "{columns}");
            assert!(said.chars().count() <= columns || columns == 1);
        }
    }

    #[test]
    fn without_a_terminal_there_is_a_line_a_minute() {
        let global = |json| Global { json, stats: false, verbose: 0, restrict: false, quiet: false };
        let lines = |json, quiet| {
            let mut progress = Progress::new(&global(json), quiet, 0);
            progress.has_bar = false;
            (0..=180).filter(|second| progress.is_line_due(second * 1_000_000_000)).collect::<Vec<u64>>()
        };
        assert_eq!(lines(false, false), [60, 120, 180]);
        assert!(lines(false, true).is_empty() && lines(true, false).is_empty());
    }

    /// With the longest of all words, too, and nothing is cut off.
    #[test]
    fn a_bar_fits_a_narrow_terminal() {
        for phase in ["bulk", "follow", "verify", "paused", "final-flush", "preparing"] {
            for (len, rate) in [(1023 << 30, 1023 << 20), (u64::MAX, u64::MAX), (1, 1)] {
                for ns in
                    [999, 59_949_999_999, 3_599_000_000_000, 86_399_000_000_000, 99 * 86_400_000_000_000]
                {
                    let line = bar(&Far { phase, done: len / 3, len, rate, eta_ns: Some(ns) });
                    assert!(line.chars().count() <= WIDTH && line.ends_with(" left"), "{line}");
                }
            }
        }
    }
}
