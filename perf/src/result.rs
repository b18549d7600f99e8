//! What a run leaves behind: a file of JSON lines, first the machine, then one line a sample, so that a run that was
//! ended early is still of use and several files can be reported together.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::Fallible;

/// What somebody who is measured is to the question.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Blockferry.
    Ours,
    /// A peer that does the same work with O_DIRECT.
    Peer,
    /// A peer through the page cache: shown, and not what we compare with.
    Buffered,
    /// A bare loop without layers: what the kernel allows.
    Limit,
    /// Nobody's work: the state that others are compared with.
    Baseline,
}

/// One contender, once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Scenario, by its name in the catalogue.
    pub scenario: String,
    /// Part of the scenario that has a table of its own; empty if there is only one.
    pub case: String,
    /// Who.
    pub contender: String,
    pub role: Role,
    /// The command line, with SRC and DST for the disks.
    pub command: String,
    /// From 1; 0 is the round of warming up, of which only counts are used.
    pub round: usize,
    /// What was measured, by name (the names end in their units).
    pub values: BTreeMap<String, f64>,
}

/// The machine and the programs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Things and what they are, in the order in which to show them.
    pub facts: Vec<(String, String)>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "line", rename_all = "kebab-case")]
enum Line {
    Machine(Machine),
    Sample(Sample),
}

/// Where samples go.
#[derive(Debug)]
pub struct Sink {
    file: Option<std::fs::File>,
}

impl Sink {
    /// Appends to `path`, if there is one.
    pub fn open(path: Option<&Path>, machine: &Machine) -> Fallible<Sink> {
        let file = match path {
            None => None,
            Some(path) => Some(
                std::fs::OpenOptions::new()
                    .create(true)
                    .append(true)
                    .open(path)
                    .map_err(|error| format!("'{}': {error}", path.display()))?,
            ),
        };
        let mut sink = Sink { file };
        sink.line(&Line::Machine(machine.clone()))?;
        Ok(sink)
    }

    /// Writes a sample down at once.
    pub fn sample(&mut self, sample: &Sample) -> Fallible<()> {
        self.line(&Line::Sample(sample.clone()))
    }

    fn line(&mut self, line: &Line) -> Fallible<()> {
        if let Some(file) = &mut self.file {
            let mut text = serde_json::to_string(line)?;
            text.push('\n');
            file.write_all(text.as_bytes())?;
        }
        Ok(())
    }
}

/// Everything of some files. Where a scenario was run more than once, rounds go on counting.
#[derive(Debug, Default)]
pub struct Results {
    /// Without repetitions.
    pub machines: Vec<Machine>,
    pub samples: Vec<Sample>,
}

impl Results {
    /// Adds the lines of one file.
    pub fn add(&mut self, text: &str) -> Fallible<()> {
        let mut shift: BTreeMap<String, usize> = BTreeMap::new();
        for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            match serde_json::from_str(line).map_err(|error| format!("line {}: {error}", number + 1))? {
                Line::Machine(machine) => {
                    // A new run: its rounds come after all that were seen so far.
                    shift.clear();
                    for sample in &self.samples {
                        let last = shift.entry(sample.scenario.clone()).or_default();
                        *last = (*last).max(sample.round);
                    }
                    if !self.machines.contains(&machine) {
                        self.machines.push(machine);
                    }
                }
                Line::Sample(mut sample) => {
                    if sample.round > 0 {
                        sample.round += shift.get(&sample.scenario).copied().unwrap_or(0);
                    }
                    self.samples.push(sample);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(round: usize) -> Sample {
        Sample {
            scenario: "copy-loop".into(),
            case: String::new(),
            contender: "dd".into(),
            role: Role::Peer,
            command: "dd if=SRC of=DST".into(),
            round,
            values: [("wall-secs".to_owned(), 0.5)].into(),
        }
    }

    #[test]
    fn lines_come_back_and_runs_add_up() {
        let directory = std::env::temp_dir().join(format!("blockferry-perf-test-{}", std::process::id()));
        let machine = Machine { facts: vec![("kernel".into(), "Linux".into())] };
        for _ in 0..2 {
            let mut sink = Sink::open(Some(&directory), &machine).unwrap();
            for round in 0..3 {
                sink.sample(&sample(round)).unwrap();
            }
        }
        let text = std::fs::read_to_string(&directory).unwrap();
        std::fs::remove_file(&directory).unwrap();
        let mut results = Results::default();
        results.add(&text).unwrap();
        assert_eq!(results.machines, [machine]);
        let rounds: Vec<usize> = results.samples.iter().map(|sample| sample.round).collect();
        assert_eq!(rounds, [0, 1, 2, 0, 3, 4]);
        assert_eq!(results.samples[1], sample(1));
        assert!(results.add("{\"line\":\"else\"}").is_err());
    }
}
