//! Formats that are said twice. Scripts put their callers' options behind their own, and `qemu-img` looks at no format but
//! the last: an earlier one may be any word. Here every word is read as it comes, so the last one is put in the place of
//! those before it, and only that is judged.

use std::collections::BTreeMap;
use std::ffi::OsString;

use clap::{Arg, Command};

/// Where a value stands: in which word, and behind how many bytes of it.
type Place = (usize, usize);

/// The words, with each format in the place of those that were said before it for the same option.
pub fn last_formats(whole: &Command, mut words: Vec<OsString>) -> Vec<OsString> {
    let text: Vec<String> = words.iter().map(|word| word.to_string_lossy().into_owned()).collect();
    let Some(at) = text.iter().skip(1).position(|word| !word.starts_with('-')) else { return words };
    let Some(command) = whole.find_subcommand(&text[at + 1]) else { return words };
    for places in formats(command, &text, at + 2).into_values() {
        let Some((&(last, behind), earlier)) = places.split_last() else { continue };
        for &(word, start) in earlier {
            words[word] = OsString::from(format!("{}{}", &text[word][..start], &text[last][behind..]));
        }
    }
    words
}

/// Where the values of each option stand that is a format.
fn formats(command: &Command, text: &[String], from: usize) -> BTreeMap<String, Vec<Place>> {
    let mut found: BTreeMap<String, Vec<Place>> = BTreeMap::new();
    let mut at = from;
    while let Some(word) = text.get(at).filter(|word| *word != "--") {
        at += 1;
        let Some((arg, start)) = valued(command, word) else { continue };
        let place = match start {
            Some(start) => (at - 1, start),
            None => {
                at += 1;
                (at - 1, 0)
            }
        };
        if arg.get_id().as_str().ends_with("format") && place.0 < text.len() {
            found.entry(arg.get_id().to_string()).or_default().push(place);
        }
    }
    found
}

/// The option of a word that has a value, and where in the word that begins, if it is not the next one.
fn valued<'a>(command: &'a Command, word: &str) -> Option<(&'a Arg, Option<usize>)> {
    let takes = |arg: &&Arg| arg.get_action().takes_values();
    if let Some(long) = word.strip_prefix("--") {
        let (name, value) =
            long.split_once('=').map_or((long, None), |(name, _)| (name, Some(name.len() + 3)));
        let is = |arg: &&Arg| {
            let more = arg.get_all_aliases().unwrap_or_default();
            arg.get_long() == Some(name) || more.contains(&name)
        };
        return Some((command.get_arguments().filter(takes).find(is)?, value));
    }
    // Of several letters the last may have a value.
    for (n, letter) in word.strip_prefix('-')?.char_indices() {
        let arg = command.get_arguments().find(|arg| arg.get_short() == Some(letter))?;
        if takes(&arg) {
            let rest = &word[1 + n + letter.len_utf8()..];
            let start = word.len() - rest.strip_prefix('=').unwrap_or(rest).len();
            return Some((arg, (!rest.is_empty()).then_some(start)));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> String {
        let words = line.split(' ').map(OsString::from).collect();
        let words = last_formats(&super::super::command(), words);
        words.iter().map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn the_last_format_counts_and_no_other_word_changes() {
        for (line, meant) in [
            ("b create -f foo -f qcow2 x 1M", "b create -f qcow2 -f qcow2 x 1M"),
            (
                "b --json create -ffoo --format=bar -qf qcow2 x",
                "b --json create -fqcow2 --format=qcow2 -qf qcow2 x",
            ),
            (
                "b convert -f=a -O b --source-format raw -O=c x",
                "b convert -f=raw -O c --source-format raw -O=c x",
            ),
            ("b create -f qcow2 -f foo x 1M", "b create -f foo -f foo x 1M"),
            // Values of other options, and what stands behind the options.
            ("b create -o f -f foo -- -f qcow2", "b create -o f -f foo -- -f qcow2"),
            ("b info --output=json --output human -f a -f", "b info --output=json --output human -f a -f"),
            ("b none -f a -f b", "b none -f a -f b"),
            ("b", "b"),
        ] {
            assert_eq!(read(line), meant);
        }
    }
}
