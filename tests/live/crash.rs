//! Fifty times SIGKILL, spread over everything that a mirror does, while four connections write.
//!
//! After each kill two things have to hold. The source has every acknowledged write, or, once the clients had
//! been moved to the target, what it had at that instant. And the mark is right: a target that carries none
//! has every acknowledged write; any other is told from a complete one by `blockferry info`.
//!
//! From outside a moment can only be aimed at. So where a kill has hit is told afterwards, by the last line
//! that came out and by what is on disk, and there are attempts until each phase was hit ten times.

use std::collections::BTreeMap;
use std::time::Duration;

use common::image::{Dice, MIB, Scratch, content, is_all_hole};
use common::writer::{History, Plan, Writer};
use common::{Process, is_marked};
use serde_json::Value;

const DISK_BYTES: u64 = 16 * MIB;
const HITS_EACH: u32 = 10;
const ATTEMPTS_MAX: u32 = 250;
/// Failures print it. Another one is another schedule of kills and writes.
const SEED: u64 = 0x0b10_c8fe;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    /// Up to the first byte on the target.
    Create,
    /// Copying, not yet ready.
    Bulk,
    /// Ready: following the guests.
    Ready,
    /// From the order to complete on: drain, the rest, flush, removal of the mark.
    FinalFlush,
    /// The clients move, or have just moved.
    Pivot,
}

const PHASES: [Phase; 5] = [Phase::Create, Phase::Bulk, Phase::Ready, Phase::FinalFlush, Phase::Pivot];

/// A moment below `most`, none of them likelier than another.
fn pause(dice: &mut Dice, most: Duration) {
    std::thread::sleep(Duration::from_micros(dice.below(most.as_micros() as u64 + 1)));
}

fn status(event: &Value) -> Option<&str> {
    event["data"]["status"].as_str()
}

struct Attempt<'a> {
    source: &'a str,
    target: &'a str,
    socket: std::path::PathBuf,
    dice: Dice,
    /// Every line that came out.
    lines: Vec<Value>,
}

impl Attempt<'_> {
    fn start(&self, target: &str, options: &[&str]) -> Process {
        let uri = format!("nbd+unix:///disk?socket={}", self.socket.display());
        let arguments = ["mirror", "-f", "raw", "--granularity", "16KiB", "--export", &uri];
        Process::json(&[&arguments[..], options, &[self.source, target]].concat())
    }

    /// Takes lines up to the one that `is_it`.
    fn follow(&mut self, mirror: &mut Process, is_it: impl Fn(&Value) -> bool) {
        loop {
            let line = mirror.event().unwrap_or_else(|| panic!("an early end after {:#?}", self.lines));
            self.lines.push(line);
            if self.lines.last().is_some_and(&is_it) {
                return;
            }
        }
    }

    fn writer(&mut self, mirror: &mut Process) -> Writer {
        self.follow(mirror, |line| line["event"] == "listening");
        Writer::start(&Plan::anywhere(&self.socket, DISK_BYTES, self.dice.next()), true)
    }

    /// Runs a mirror and kills it at about that moment: what the clients have done.
    fn kill_in(&mut self, aim: Phase) -> History {
        let (mirror, writer) = match aim {
            Phase::Create => {
                let mut mirror = self.start(self.target, &["--speed", "16MiB"]);
                match self.dice.below(4) {
                    0 => {}
                    1 => self.follow(&mut mirror, |line| line["event"] == "listening"),
                    2 => self.follow(&mut mirror, |line| status(line) == Some("created")),
                    _ => self.follow(&mut mirror, |line| status(line) == Some("running")),
                }
                // Starting takes so long when nothing else runs.
                let most = if self.lines.is_empty() { 25_000 } else { 1_000 };
                pause(&mut self.dice, Duration::from_micros(most));
                (mirror, None)
            }
            Phase::Bulk => {
                let mut mirror = self.start(self.target, &["--speed", "32MiB", "--follow"]);
                let writer = self.writer(&mut mirror);
                self.follow(&mut mirror, |line| status(line) == Some("running"));
                pause(&mut self.dice, Duration::from_millis(300));
                (mirror, Some(writer))
            }
            Phase::Ready => {
                let mut mirror = self.start(self.target, &["--follow"]);
                let writer = self.writer(&mut mirror);
                self.follow(&mut mirror, |line| line["event"] == "BLOCK_JOB_READY");
                writer.wait_more(self.dice.below(200));
                (mirror, Some(writer))
            }
            Phase::FinalFlush => {
                // A target that answers late makes the phase long enough to be hit in its parts.
                std::fs::File::create(self.target).unwrap().set_len(DISK_BYTES).unwrap();
                let late = format!("delay:{}ms:{}", self.dice.below(4), self.target);
                let mut mirror = self.start(&late, &["--pivot", "--force", "-F", "raw"]);
                let writer = self.writer(&mut mirror);
                self.follow(&mut mirror, |line| line["event"] == "BLOCK_JOB_READY");
                pause(&mut self.dice, Duration::from_millis(25));
                (mirror, Some(writer))
            }
            Phase::Pivot => {
                let mut mirror = self.start(self.target, &["--pivot"]);
                let writer = self.writer(&mut mirror);
                self.follow(&mut mirror, |line| status(line) == Some("waiting"));
                pause(&mut self.dice, Duration::from_millis(10));
                (mirror, Some(writer))
            }
        };
        self.lines.extend(mirror.kill());
        writer.map(Writer::cut).unwrap_or_default()
    }

    /// Where the kill has hit.
    fn hit(&self) -> Phase {
        let came = |is_it: &dyn Fn(&Value) -> bool| self.lines.iter().any(is_it);
        if came(&|line| status(line) == Some("waiting")) {
            Phase::Pivot
        } else if came(&|line| line["event"] == "BLOCK_JOB_READY") {
            Phase::Ready
        } else if std::fs::exists(self.target).unwrap() && !is_all_hole(self.target) {
            Phase::Bulk
        } else {
            Phase::Create
        }
    }

    /// Whether everything is as promised; if not, what is wrong.
    fn check(&self, base: &[u8], history: &History) -> Result<(), String> {
        let source = content(self.source);
        if !std::fs::exists(self.target).unwrap() || is_marked(self.target) {
            return history.check(base, &source).map_err(|why| format!("the source {why}"));
        }
        let target = content(self.target);
        history.check(base, &target).map_err(|why| format!("there is no mark, and the target {why}"))?;
        history.check_left(base, &source).map_err(|why| format!("the source that was left {why}"))
    }
}

#[test]
fn fifty_kills_damage_nothing_and_the_mark_is_always_right() {
    let scratch = Scratch::new();
    let holes = scratch.holey("base", DISK_BYTES, &[(0, 5 * MIB), (9 * MIB, 4 * MIB)]);
    let base = content(&holes);
    let mut hits = BTreeMap::from(PHASES.map(|phase| (phase, 0)));
    let (mut attempts, mut writes, mut unmarked) = (0, 0, 0);
    let mut dice = Dice::new(SEED);
    while let Some(aim) = PHASES.into_iter().find(|phase| hits[phase] < HITS_EACH) {
        attempts += 1;
        assert!(attempts <= ATTEMPTS_MAX, "the phases are not hit: {hits:?}");
        let run = Scratch::new();
        let (source, target) = (run.path("source"), run.path("target"));
        std::fs::copy(&holes, &source).unwrap();
        let mut attempt = Attempt {
            source: &source,
            target: &target,
            socket: run.dir().join("socket"),
            dice: Dice::new(dice.next()),
            lines: Vec::new(),
        };
        let history = attempt.kill_in(aim);
        let mut hit = attempt.hit();
        if (aim, hit) == (Phase::FinalFlush, Phase::Ready) {
            // It had been told to complete.
            hit = Phase::FinalFlush;
        }
        if let Err(why) = attempt.check(&base, &history) {
            panic!(
                "seed {SEED:#x}, attempt {attempts}, killed in {hit:?}: {why}; lines: {:#?}",
                attempt.lines
            );
        }
        if hit == aim {
            *hits.entry(hit).or_default() += 1;
        }
        writes += history.acked();
        unmarked += u32::from(std::fs::exists(&target).unwrap() && !is_marked(&target));
    }
    println!("{attempts} kills: {hits:?}; {writes} acknowledged writes; {unmarked} targets complete");
    assert!(unmarked > 0 && writes > 1000, "{unmarked} complete, {writes} writes");
}
