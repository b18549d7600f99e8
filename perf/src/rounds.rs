//! Contenders in turn: round after round, one round of warming up first.
//!
//! A contender that fails is told of, and left out when it has failed twice; the others go on. A contender whose time is used up is
//! left out of the rounds that follow, so that no row takes longer than it may.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use crate::result::{Role, Sample, Sink};
use crate::{Fallible, stop};

/// So many failures, and a contender is left out.
const FAILURES_MAX: u32 = 2;

/// What was measured once, by name.
pub type Values = BTreeMap<String, f64>;

/// What all scenarios share.
#[derive(Debug)]
pub struct Context {
    /// The program under test.
    pub blockferry: String,
    /// This program, for the bare loop.
    pub perf: String,
    /// Rounds, if said.
    pub rounds: Option<usize>,
    /// Seconds that a row may take.
    pub seconds_max: f64,
    /// Small disks, few rounds: to see that all works.
    pub quick: bool,
    /// Whether system calls can be counted.
    pub counted: bool,
    /// Scratch folder.
    pub folder: PathBuf,
    /// Our settings beside the default: a name and options of `blockferry mirror`.
    pub variants: Vec<(String, Vec<String>)>,
    /// Only contenders whose names contain one of these, if there are any.
    pub only: Vec<String>,
    /// Only cases whose names contain one of these, if there are any.
    pub cases: Vec<String>,
    /// Where samples go.
    pub sink: Sink,
}

impl Context {
    /// Whether a case is to be run.
    pub fn wants(&self, case: &str) -> bool {
        self.cases.is_empty() || self.cases.iter().any(|part| case.contains(part.as_str()))
    }

    /// Rounds to run.
    pub fn rounds_or(&self, usual: usize) -> usize {
        self.rounds.unwrap_or(if self.quick { 2 } else { usual })
    }
}

/// One who is measured.
pub struct Contender<'a> {
    pub name: String,
    pub role: Role,
    /// The command line as reports show it.
    pub command: String,
    /// Runs it once; `true` in the round of warming up.
    pub run: Box<dyn FnMut(bool) -> Fallible<Values> + 'a>,
}

impl std::fmt::Debug for Contender<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Contender").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Runs contenders in turn and writes down what came out.
pub fn interleave(
    sink: &mut Sink,
    limits: (usize, f64, &[String]),
    place: (&str, &str),
    contenders: Vec<Contender<'_>>,
) -> Fallible<()> {
    let ((rounds, seconds_max, only), (scenario, case)) = (limits, place);
    let wanted = |name: &str| only.is_empty() || only.iter().any(|part| name.contains(part.as_str()));
    let mut contenders: Vec<_> =
        contenders.into_iter().filter(|c| wanted(&c.name)).map(|c| (c, 0.0, 0)).collect();
    for round in 0..=rounds {
        for (contender, used_secs, failures) in contenders.iter_mut().filter(|c| c.2 < FAILURES_MAX) {
            stop::check()?;
            // The warming up is not part of the row, or slow ones would have none.
            let average = *used_secs / (round.max(2) - 1) as f64;
            if round > 1 && *used_secs + average > seconds_max {
                continue;
            }
            let began = Instant::now();
            let values = match (contender.run)(round == 0) {
                Ok(values) => values,
                Err(error) => {
                    stop::check()?;
                    eprintln!("{scenario} {case}: {} failed: {error}", contender.name);
                    *failures += 1;
                    continue;
                }
            };
            if round > 0 {
                *used_secs += began.elapsed().as_secs_f64();
            }
            let sample = Sample {
                scenario: scenario.to_owned(),
                case: case.to_owned(),
                contender: contender.name.clone(),
                role: contender.role,
                command: contender.command.clone(),
                round,
                values,
            };
            sink.sample(&sample)?;
            tell(&sample);
        }
    }
    Ok(())
}

/// A line for who waits at the terminal.
fn tell(sample: &Sample) {
    let round = if sample.round == 0 { "warm-up".to_owned() } else { format!("round {}", sample.round) };
    let values: Vec<String> =
        sample.values.iter().map(|(name, value)| format!("{name}={}", crate::svg::number(*value))).collect();
    eprintln!("{} {} {round}: {}: {}", sample.scenario, sample.case, sample.contender, values.join(" "));
}
