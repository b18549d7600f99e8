//! The help of all subcommands in one form: options in groups, examples for each command, and a short help that fits a
//! screen. Each command says what its options are; here is what they have in common.

use std::ffi::OsString;

use clap::{Arg, ArgAction, Command};

/// The id of the option of all subcommands that makes them quiet.
pub const QUIET: &str = "quiet";

/// What values of options are called that are numbers.
const NUMBERS: [&str; 6] = ["RATE", "SIZE", "TIME", "N", "IOPS", "PERCENT"];

/// Heading of the options that are the same everywhere.
pub const EVERYWHERE: &str = "Every command";

/// Groups of options by their ids. Those of the last column are in the long help only.
const GROUPS: [(&str, &[&str], bool); 8] = [
    (
        "Clients",
        &[
            "export",
            "pivot",
            "follow",
            "persistent",
            "no_persistent",
            "wait_client",
            "drain_timeout",
            "exit_on_done",
            "exit_when_idle",
            "pid_file",
        ],
        false,
    ),
    (
        "Speed",
        &[
            "speed",
            "copy_mode",
            "on_divergence",
            "guest_first",
            "max_downtime",
            "deadline",
            "granularity",
            "buf_size",
            "reflink",
            "detect_zeroes",
            "target_is_zero",
        ],
        false,
    ),
    ("Errors", &["on_source_error", "on_target_error", "on_error", "salvage"], true),
    ("Opening", &["cache", "no_lock", "allow_superseded", "force_share", "state_dir"], true),
    (
        "Files that images name",
        &["allow_dir", "allow_any_file", "allow_servers", "probe_backing", "allow_incomplete"],
        true,
    ),
    (
        "Servers",
        &[
            "reconnect_delay",
            "open_timeout",
            "server_connections",
            "io_timeout",
            "guest_timeout",
            "no_block_status",
            "max_request",
            "unflushed",
        ],
        true,
    ),
    (
        "Limits for NBD clients",
        &[
            "max_connections",
            "handshake_timeout",
            "client_requests",
            "client_bytes",
            "client_iops",
            "client_speed",
        ],
        true,
    ),
    (EVERYWHERE, &["json", "stats", "verbose", "restrict", QUIET], false),
];

/// Options that the short help leaves out, beside whole groups: who needs one looks for it.
const LONG_ONLY: [&str; 19] = [
    "persistent",
    "no_persistent",
    "wait_client",
    "drain_timeout",
    "exit_on_done",
    "copy_mode",
    "on_divergence",
    "guest_first",
    "max_downtime",
    "deadline",
    "granularity",
    "buf_size",
    "reflink",
    "detect_zeroes",
    "target_is_zero",
    "trust_holes",
    "no_create",
    "allow_larger_target",
    "backing_file",
];

/// What the short help says instead of a long sentence, by command (empty: any) and option.
const SHORT: [(&str, &str, &str); 11] = [
    ("mirror", "source", "The disk to copy"),
    ("mirror", "target", "A new file; or what is there, with --force and -F"),
    ("mirror", "target_format", "Format of the target (a new file: the source's)"),
    ("mirror", "sync", "What to copy: full (the default), top or none"),
    ("mirror", "speed", "Limit, such as 200MiB a second"),
    ("mirror", "export", "Serve clients meanwhile, at this NBD URI"),
    ("", "dry_run", "Say what would happen, and change nothing"),
    ("mirror", "options", "Options of a target that is made"),
    ("mirror", "verify", "Read both disks back and compare"),
    ("mirror", "follow", "Stay in step until Ctrl-C, which completes it"),
    ("mirror", "pivot", "Let clients go on, on the copy"),
];

const EXAMPLES: [(&str, &str); 10] = [
    (
        "info",
        "\
Examples:
  What an image is, and whether a copy to it ended well:
      blockferry info disk.img

  An image with all that lies below it, as JSON:
      blockferry info --backing-chain --output=json top.qcow2",
    ),
    (
        "compare",
        "\
Examples:
  Whether two disks hold the same (exit code 0 or 1), whatever their formats:
      blockferry compare -f raw -F raw old.img disk.img

  The holes, too:
      blockferry compare -s top.qcow2 top.qcow2",
    ),
    (
        "create",
        "\
Examples:
  An empty image of 20 GiB:
      blockferry create -f qcow2 new.qcow2 20G

  An overlay: what is written goes into it, and base.img stays as it is:
      blockferry create -f qcow2 -b base.img -F raw over.qcow2",
    ),
    (
        "resize",
        "\
Examples:
  4 GiB more:
      blockferry resize -f raw disk.img +4G

  To a size, which is smaller; what lies behind it is lost:
      blockferry resize --shrink -f raw disk.img 1M",
    ),
    (
        "map",
        "\
Examples:
  Where the data of a disk lies, in which file of its chain:
      blockferry map top.qcow2

  Holes and zeroes, too, as JSON:
      blockferry map --output=json top.qcow2",
    ),
    (
        "check",
        "\
Examples:
  Whether the tables of an image are sound; nothing is changed:
      blockferry check top.qcow2

  Free what leaked:
      blockferry check -r leaks top.qcow2",
    ),
    (
        "rebase",
        "\
Examples:
  Another backing file; what the image shows stays the same:
      blockferry rebase -b base.img -F raw top.qcow2

  The backing file has moved: change the name, and nothing else:
      blockferry rebase -u -b /images/base.img -F raw top.qcow2

  Independent of all backing files:
      blockferry rebase -b '' top.qcow2",
    ),
    (
        "amend",
        "\
Examples:
  Refcounts of an image may be written late:
      blockferry amend -o lazy_refcounts=on disk.qcow2",
    ),
    (
        "snapshot",
        "\
Examples:
  Take one, see what there is, and go back to it:
      blockferry snapshot -c before top.qcow2
      blockferry snapshot -l top.qcow2
      blockferry snapshot -a before top.qcow2",
    ),
    (
        "measure",
        "\
Examples:
  What a file will take if this disk is copied to qcow2:
      blockferry measure -O qcow2 disk.img

  What an image of 20 GiB takes when it is empty, and when it is full:
      blockferry measure -O qcow2 --size 20G",
    ),
];

const DEMO: &str = "\
Examples:
  A disk of 64 MiB that moves under its client:
      blockferry demo --size 64MiB";

/// Usage lines of commands whose words depend on each other in ways that clap does not see.
const USAGES: [(&str, &str); 5] = [
    ("amend", "blockferry amend [OPTIONS] -o <OPTIONS> <FILE>"),
    ("convert", "blockferry convert [OPTIONS] <SRC>... <DST>"),
    ("dd", "blockferry dd [OPTIONS] if=<INPUT> of=<OUTPUT> [bs=<SIZE>] [count=<N>] [skip=<N>]"),
    ("mirror", "blockferry mirror [OPTIONS] <SRC> <DST>"),
    (
        "serve",
        "blockferry serve [OPTIONS] --export <URI> <IMAGE>\n       blockferry serve [OPTIONS] --list <URI>",
    ),
];

/// Options that mean nothing to a command: it has no clients, or writes nothing.
const MEANINGLESS: [(&str, &[&str]); 6] = [
    ("compare", &["guest_timeout", "unflushed"]),
    ("convert", &["guest_timeout"]),
    ("dd", &["guest_timeout"]),
    ("info", &["guest_timeout", "unflushed"]),
    ("map", &["guest_timeout", "unflushed"]),
    ("measure", &["guest_timeout", "unflushed"]),
];

/// The id of `--output` where it says the same as `--json`.
const AS_JSON: &str = "output_as_json";

/// The command line for these words: where they ask which options a format has (`-o help`), no image need be named.
pub fn relaxed(whole: Command, words: &[OsString]) -> Command {
    let says = |what: &str| words.iter().any(|word| word == what);
    let whole = match says("mirror") && says("-h") {
        true => {
            let everywhere = |arg: Arg| arg.hide_short_help(true);
            whole
                .mut_subcommand("mirror", on_one_screen)
                .mut_arg("json", everywhere)
                .mut_arg("verbose", everywhere)
        }
        false => whole,
    };
    let asks = words.windows(2).any(|pair| {
        ["-o", "--options", "--target-options"].iter().any(|option| pair[0] == *option) && pair[1] == "help"
    });
    match asks {
        true => whole.mut_subcommand("mirror", |mirror| {
            mirror.mut_arg("source", |arg| arg.required(false)).mut_arg("target", |arg| arg.required(false))
        }),
        false => whole,
    }
}

/// A command whose short help fits a terminal of 24 lines: no groups, and nothing that every command has.
fn on_one_screen(command: Command) -> Command {
    let flat = |arg: Arg| {
        let is_hidden = arg.get_id() == QUIET || arg.get_id() == "options";
        let arg = arg.help_heading(clap::builder::Resettable::Reset);
        let arg = match arg.get_action().takes_values() {
            true => arg.hide_possible_values(true).hide_default_value(true),
            false => arg,
        };
        if is_hidden { arg.hide_short_help(true) } else { arg }
    };
    command.mut_args(flat).disable_version_flag(true)
}

/// Whether `--output=json` was said to a command that has it for `--json` only.
pub fn wants_json(of_command: &clap::ArgMatches) -> bool {
    let said = of_command.try_get_one::<String>(AS_JSON).ok().flatten();
    said.is_some_and(|said| said == "json")
}

/// The usage line of the subcommand that the process was started with.
pub fn usage_of_said_command() -> Option<clap::builder::StyledStr> {
    let mut whole = super::command();
    whole.build();
    let words: Vec<_> = std::env::args().skip(1).collect();
    let name = words.iter().find(|word| whole.find_subcommand(word.as_str()).is_some())?;
    Some(whole.find_subcommand_mut(name)?.render_usage())
}

/// Ranges of numbers as people write them: `from 1 to 16` for `1..=16`.
pub fn ranges_in_words(text: &str) -> String {
    const IS_NOT_IN: &str = "is not in ";
    let Some((before, rest)) = text.split_once(IS_NOT_IN) else { return text.to_owned() };
    let end = rest.find(|c: char| !c.is_ascii_digit() && !"-.=".contains(c)).unwrap_or(rest.len());
    let (range, after) = rest.split_at(end);
    let words = range.split_once("..").and_then(|(from, to)| {
        let (to, includes) = to.strip_prefix('=').map_or((to, false), |to| (to, true));
        let last = to.parse::<u64>().ok()?.saturating_sub(u64::from(!includes));
        let is_open = last >= i64::MAX as u64 - 1;
        Some(if is_open {
            format!("has to be at least {from}")
        } else {
            format!("has to be from {from} to {last}")
        })
    });
    match words {
        Some(words) => format!("{before}{words}{after}"),
        None => text.to_owned(),
    }
}

/// Text that was wrapped by hand, with each paragraph on one line: whoever shows it knows how wide the terminal is. Commands
/// and tables stay as they are.
fn unwrapped(text: &str) -> String {
    let mut lines: Vec<String> = Vec::new();
    let indent = |line: &str| line.len() - line.trim_start().len();
    let is_prose = |line: &str| {
        let words = line.trim();
        !words.is_empty() && indent(line) <= 2 && !words.starts_with("blockferry ") && !words.contains("  ")
    };
    for line in text.lines() {
        match lines.last_mut() {
            Some(last) if is_prose(last) && is_prose(line) && indent(last) == indent(line) => {
                last.push(' ');
                last.push_str(line.trim());
            }
            _ => lines.push(line.to_owned()),
        }
    }
    lines.join("\n")
}

/// Gives a subcommand what all of them have.
pub fn dressed(subcommand: Command) -> Command {
    let name = subcommand.get_name().to_owned();
    if name == "help" {
        return subcommand;
    }
    // What is said twice counts as it was said last.
    let subcommand = subcommand.args_override_self(true);
    let has_quiet = subcommand.get_arguments().any(|arg| arg.get_id() == QUIET);
    let subcommand = match has_quiet {
        true => subcommand,
        false => {
            let quiet = Arg::new(QUIET).short('q').long(QUIET);
            subcommand.arg(quiet.action(ArgAction::SetTrue))
        }
    };
    let has = |subcommand: &Command, id: &str| subcommand.get_arguments().any(|arg| arg.get_id() == id);
    let subcommand = match has(&subcommand, "output") {
        true => subcommand,
        false => {
            let output =
                Arg::new(AS_JSON).long("output").value_name("FORMAT").value_parser(["human", "json"]);
            let output = output.help("json: the same as --json").help_heading(EVERYWHERE);
            subcommand.arg(output.hide_short_help(true).hide_possible_values(true))
        }
    };
    let subcommand = match USAGES.iter().find(|(of, _)| *of == name) {
        Some((_, usage)) => subcommand.override_usage(*usage),
        None => subcommand,
    };
    let examples = match name.as_str() {
        "demo" => DEMO,
        name => EXAMPLES.iter().find(|(of, _)| *of == name).map_or("", |(_, text)| text),
    };
    let after = subcommand.get_after_help().map(ToString::to_string).unwrap_or_default();
    let after = match (after.contains("Examples:"), after.is_empty()) {
        (true, _) => after,
        (false, true) => examples.to_owned(),
        (false, false) => format!("{examples}\n\n{after}"),
    };
    let more = format!("`blockferry {name} --help` tells all options, with examples.");
    subcommand.after_long_help(unwrapped(&after)).after_help(more).mut_args(|arg| in_group(arg, &name))
}

fn in_group(arg: Arg, command: &str) -> Arg {
    let id = arg.get_id().as_str().to_owned();
    let is_option = arg.get_long().is_some();
    // A number below zero is refused as what it is, and not as an option that is not known.
    let names = arg.get_value_names().unwrap_or_default();
    let is_number = names.iter().any(|name| NUMBERS.contains(&name.as_str()));
    let arg = if is_number && is_option { arg.allow_hyphen_values(true) } else { arg };
    let group = GROUPS.iter().find(|(_, ids, _)| is_option && ids.contains(&id.as_str()));
    let arg = match group {
        Some((heading, _, _)) => arg.help_heading(*heading),
        // A heading of options before it is not its own.
        None if id == "dry_run" => arg.help_heading(clap::builder::Resettable::Reset),
        None => arg,
    };
    let arg = if id == QUIET { arg.help("Nothing but what was asked for, and errors") } else { arg };
    if MEANINGLESS.iter().any(|(of, ids)| *of == command && ids.contains(&id.as_str())) {
        return arg.hide(true);
    }
    let is_long_only = group.is_some_and(|(_, _, is_long)| *is_long) || LONG_ONLY.contains(&id.as_str());
    if is_long_only {
        return arg.hide_short_help(true);
    }
    let Some(help) = arg.get_help().map(ToString::to_string) else { return arg };
    let said = SHORT
        .iter()
        .find(|(of, its, _)| (of.is_empty() || *of == command) && *its == id)
        .map(|(_, _, text)| *text);
    let short = said.unwrap_or_else(|| first_part(&help));
    if short.len() == help.len() { arg } else { arg.help(short.to_owned()).long_help(help) }
}

/// The beginning of a long sentence, up to where it goes into details.
fn first_part(help: &str) -> &str {
    const ENOUGH: usize = 52;
    if help.len() <= ENOUGH {
        return help;
    }
    let ends = [". ", "; ", " (", ": ", " ["].into_iter().filter_map(|end| help.find(end));
    let end = ends.filter(|end| *end > 12).min().unwrap_or(help.len());
    help.get(..end).unwrap_or(help)
}

#[cfg(test)]
mod tests {
    use super::super::command;

    #[test]
    fn ranges_are_told_in_words() {
        let said = |text: &str| super::ranges_in_words(text);
        assert_eq!(said("'--a <N>': 0 is not in 1..=16\n\nx"), "'--a <N>': 0 has to be from 1 to 16\n\nx");
        assert_eq!(said("0 is not in 1..18446744073709551615"), "0 has to be at least 1");
        assert_eq!(said("0 is not in 1..=18446744073709551615"), "0 has to be at least 1");
        assert_eq!(said("it is not in here"), "it is not in here");
    }

    #[test]
    fn paragraphs_are_one_line_each_and_commands_stay() {
        let text =
            "A b\nc d.\n\nExamples:\n  One,\n  two:\n      blockferry x \\\n          y\n  blockferry z\n";
        let flat = "A b c d.\n\nExamples:\n  One, two:\n      blockferry x \\\n          y\n  blockferry z";
        assert_eq!(super::unwrapped(text), flat);
    }

    /// What means nothing to a command is understood, because scripts say it everywhere, and not offered.
    #[test]
    fn what_is_named_as_meaningless_is_there() {
        for (of, ids) in super::MEANINGLESS {
            let whole = command();
            let arguments: Vec<_> = whole.find_subcommand(of).unwrap().get_arguments().collect();
            for id in ids {
                assert!(arguments.iter().any(|arg| arg.get_id() == *id && arg.is_hide_set()), "{of} {id}");
            }
        }
    }

    #[test]
    fn the_command_line_makes_sense() {
        command().debug_assert();
    }

    #[test]
    fn every_command_has_examples_and_can_be_quiet() {
        for subcommand in command().get_subcommands().filter(|sub| sub.get_name() != "help") {
            let name = subcommand.get_name();
            let text = subcommand.get_after_long_help().map(ToString::to_string).unwrap_or_default();
            assert!(text.contains("Examples:\n") && text.contains(&format!("blockferry {name}")), "{name}");
            assert!(subcommand.get_arguments().any(|arg| arg.get_short() == Some('q')), "{name}");
        }
    }

    /// A default that is told in words is not told by its value again.
    #[test]
    fn no_default_is_told_twice() {
        for subcommand in command().get_subcommands() {
            for arg in subcommand.get_arguments() {
                let help =
                    arg.get_long_help().or(arg.get_help()).map(ToString::to_string).unwrap_or_default();
                let told = help.matches("[default").count();
                let shown =
                    usize::from(!arg.get_default_values().is_empty() && !arg.is_hide_default_value_set());
                assert!(told + shown <= 1, "{} {}: {help}", subcommand.get_name(), arg.get_id());
            }
        }
    }

    /// On a terminal of 24 lines and 80 columns, with the prompt behind it.
    #[test]
    fn the_short_help_of_a_mirror_fits_a_screen() {
        let mut command = super::relaxed(command(), &["blockferry", "mirror", "-h"].map(Into::into));
        command.build();
        let mirror = command.find_subcommand_mut("mirror").unwrap();
        let text = mirror.clone().term_width(80).render_help().to_string();
        assert!(text.lines().count() <= 23, "{} lines:\n{text}", text.lines().count());
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    }
}
