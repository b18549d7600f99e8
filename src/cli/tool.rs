//! What the image tools share: options with the names that users of `qemu-img` know.

use clap::{Args, ValueEnum};
use serde_json::Value;

use super::Global;
use super::exit::{Exit, Failure};
use super::image::{CacheMode, GateArgs, ServerArgs};
use super::print::{self, note, product};
use super::signals::begin;
use crate::engine::admit::Plan;
use crate::engine::open::local_path;
use crate::engine::{Format, ImageOptions};
use crate::format::probe::named_as;

/// How results are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// Text
    #[default]
    Human,
    /// One JSON document, as qemu-img prints it
    Json,
}

/// Where results go.
#[derive(Clone, Debug, Default, Args)]
pub struct OutputArgs {
    /// Print text, or one JSON document (the global --json prints the same on one line)
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: Output,
}

impl OutputArgs {
    /// Prints `value`, which is what the command is for, if JSON was asked for; false if people are to read something.
    pub fn print(&self, global: &Global, value: &Value) -> bool {
        if global.json {
            print::has_ended();
            product!("{value}");
        } else if self.output == Output::Json {
            print::write_product(&format!("{value:#}\n"));
        }
        self.is_json(global)
    }

    /// The same for a command that does something, and says what it did.
    pub fn note(&self, global: &Global, value: &Value) -> bool {
        if global.json {
            print::has_ended();
            note!("{value}");
        } else if self.output == Output::Json {
            print::write_note(&format!("{value:#}\n"));
        }
        self.is_json(global)
    }

    /// Whether JSON was asked for.
    pub fn is_json(&self, global: &Global) -> bool {
        global.json || self.output == Output::Json
    }
}

/// Whether a command only says what it would do.
#[derive(Clone, Copy, Debug, Default, Args)]
pub struct PlanArgs {
    /// Say what would be opened, locked, written and refused, and change nothing. Exit code 1: it would be refused
    #[arg(long)]
    pub dry_run: bool,
}

impl PlanArgs {
    /// Begins if nothing speaks against the plan; true: it was a dry run, which has been printed and ends here.
    pub fn ends(self, global: &Global, plan: &Plan) -> Result<bool, Failure> {
        let ends = self.judges(global, plan)?;
        if !ends {
            begin();
        }
        Ok(ends)
    }

    /// The same for a command that has not begun yet then.
    pub fn judges(self, global: &Global, plan: &Plan) -> Result<bool, Failure> {
        if self.dry_run {
            match global.json {
                true => {
                    print::has_ended();
                    product!("{}", plan.to_json());
                }
                false => print::write_product(&plan.to_string()),
            }
        }
        plan.admitted()?;
        if !self.dry_run {
            for line in plan.sentences("Will") {
                tracing::info!("{line}");
            }
        }
        Ok(self.dry_run)
    }
}

/// Tells that a new image is not what its name says: qemu-img makes such ones without a word, and they do not start, or are
/// opened by their names' endings and destroyed.
pub fn warn_of_name(name: &str, format: Format) {
    let told = local_path(name).and_then(|path| named_as(&path));
    if let Some(told) = told.filter(|told| told.format() != Some(format)) {
        tracing::warn!("'{name}' is made as a {format} image, and its name says {}", told.name());
    }
}

/// QEMU's names of cache modes. Here only one thing is chosen by them: past the page cache or through it. Every target
/// is flushed before it counts as complete, whatever the mode.
pub fn cache(text: &str) -> Result<CacheMode, String> {
    match text {
        "none" | "off" | "directsync" | "direct" => Ok(CacheMode::Direct),
        "writeback" | "writethrough" | "unsafe" | "buffered" => Ok(CacheMode::Buffered),
        _ => Err(format!(
            "'{text}' is no cache mode: none (off) and directsync go past the page cache; writeback, writethrough and \
             unsafe go through it"
        )),
    }
}

/// Options for an image that a tool reads: of marks is warned.
pub fn read_options(
    format: Option<Format>,
    cache: Option<CacheMode>,
    force_share: bool,
    server: &ServerArgs,
    gate: &GateArgs,
) -> ImageOptions {
    ImageOptions {
        format,
        gate: gate.gate(),
        probe_backing: gate.probe_backing,
        marks: gate.marks().warned(),
        cache: cache.unwrap_or_default().into(),
        lock: !force_share,
        without_locks: Some("-U"),
        warns_of_header: format == Some(Format::Raw),
        server: server.options(),
        ..ImageOptions::read_only()
    }
}

/// Ends a command whose exit code says more than success or failure: failures have this code, not 1.
pub fn with_code(global: &Global, code: u8, result: Result<Exit, Failure>) -> Result<Exit, Failure> {
    print::failure_has(code);
    match result {
        Ok(exit) => Ok(exit),
        Err(failure) => {
            print::failure(global.json, &failure);
            Ok(Exit::Code(code))
        }
    }
}

/// What lists of options say, one by one. A doubled comma is a comma. A list that begins with one, or ends with a single
/// one, is cut off somewhere, or was meant to be another: nothing of it is believed.
fn listed(said: &[String]) -> Result<Vec<String>, Failure> {
    let mut all = Vec::new();
    for text in said {
        let parts = text.replace(",,", "\0");
        if text.is_empty() || text.starts_with(',') || parts.ends_with(',') {
            return Err(Failure::usage(format!(
                "'{text}' is no list of options: say NAME=VALUE,NAME=VALUE (a comma in a value is doubled)"
            )));
        }
        all.extend(parts.split(',').map(|part| part.replace('\0', ",")));
    }
    Ok(all)
}

/// Options said as `-o NAME=VALUE,NAME=VALUE`, any number of times.
pub fn option_pairs(said: &[String]) -> Result<Vec<(String, String)>, Failure> {
    let pair = |part: String| match part.split_once('=') {
        Some((name, value)) => Ok((name.trim().to_owned(), value.to_owned())),
        None => Err(Failure::usage(format!("The option '{part}' has no value: say NAME=VALUE"))),
    };
    listed(said)?.into_iter().map(pair).collect()
}

/// Whether the options ask for what there is instead of saying something: `-o help`, as `qemu-img` has it.
pub fn asks_for_help(said: &[String]) -> Result<bool, Failure> {
    Ok(listed(said)?.iter().any(|part| matches!(part.as_str(), "help" | "?")))
}

/// Tells which options a format has.
pub fn print_options(format: Format, what: &str, options: &[(&str, &str)]) {
    product!("{what} of the format {format}, said as -o NAME=VALUE,NAME=VALUE:");
    let width = options.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    for (name, meaning) in options {
        product!("  {name:<width$}  {meaning}");
    }
}

/// A size as `qemu-img` writes it for people: binary units, three digits.
pub fn human_size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    // Three significant digits, no zeroes at the end.
    let places = if value >= 100.0 {
        0
    } else if value >= 10.0 {
        1
    } else {
        2
    };
    let text = format!("{value:.places$}");
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{text} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_cut_at_single_commas() {
        let pairs = option_pairs(&["a=1,b=x,,y".into(), "c=".into()]).unwrap();
        let pairs: Vec<_> = pairs.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
        assert_eq!(pairs, [("a", "1"), ("b", "x,y"), ("c", "")]);
        assert!(option_pairs(&["a".into()]).is_err());
        for cut_off in ["", ",", ",a=1", ",,", "a=1,", "a=x,,,", ",help", "help,"] {
            assert!(option_pairs(&[cut_off.into()]).is_err(), "{cut_off}");
            assert!(asks_for_help(&["help".into(), cut_off.into()]).is_err(), "{cut_off}");
        }
        for (text, asks) in [("a=1,help", true), ("?", true), ("a=x,,help", false), ("a=help", false)] {
            assert_eq!(asks_for_help(&[text.into()]).unwrap(), asks, "{text}");
        }
    }

    #[test]
    fn sizes_have_three_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "0.98 KiB"),
            (1 << 20, "1 MiB"),
            (339_968, "332 KiB"),
            (3 << 29, "1.5 GiB"),
        ] {
            assert_eq!(human_size(bytes), text);
        }
    }
}
