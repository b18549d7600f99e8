//! The rules of the house that no compiler knows, read off the sources.
//!
//! Each rule is a function from a path and a text to what is wrong with it, so that it can be shown to fail on a
//! small planted text before it is believed about the tree. The sources are cut into tokens first (comments,
//! strings and characters left out), because a rule that trips over a sentence in a comment is soon switched off.
//!
//! What is ruled: rooms use only rooms below them; `unsafe` has its listed places; no file outgrows one idea; each
//! opens with prose; printing has its place; nothing is left unfinished or switched off; links in the papers lead somewhere; the licences
//! are there.

use std::fs;
use std::path::{Path, PathBuf};

/// The rooms from the ground up (docs/architecture.md). A room uses itself and what stands before it here. The crate
/// `blockferry-ring` lies below them all.
const FLOORS: &[&str] =
    &["base", "block", "protocol", "format", "graph", "job", "export", "control", "engine", "cli"];

/// Where `allow(unsafe_code)` may stand: paths that begin like this.
const UNSAFE_PLACES: &[&str] = &[
    // The bare io_uring loop that is measured as the limit, and two system calls that no safe crate in use offers.
    "perf/src/bare.rs",
    "perf/src/bare_send.rs",
    "perf/src/sys.rs",
    "ring/src/alloc.rs",
    "ring/src/arena",
    "ring/src/mem.rs",
    "ring/src/pool",
    "ring/src/uring",
    // The edge to libgfapi, a C library with threads of its own (docs/gluster.md).
    "src/protocol/gluster/api.rs",
    "src/protocol/gluster/connection.rs",
    "src/protocol/gluster/fake.rs",
    "src/protocol/gluster/file.rs",
    // One system call that no safe crate in use offers (docs/testing.md).
    "tests/common/sandbox.rs",
];

/// Files that see every room because they only wire them together.
const EXEMPT_FROM_FLOORS: &[&str] = &["src/lib.rs", "src/main.rs"];

/// Who may write to standard output and standard error: everybody else hands lines over (docs/architecture.md). Tests speak
/// to those who run them.
const PRINTING_PLACES: &[&str] = &["src/cli/print/", "src/protocol/tests.rs"];
/// Macros that panic when nobody reads, and wait for whoever reads slowly.
const PRINTING_MACROS: &[&str] = &["print", "println", "eprint", "eprintln"];

/// Lines of a source file, its in-file tests not counted.
const LINES_MAX: usize = 900;

/// Words that mark what is not done. Spelled in halves, or this file would find itself.
const UNFINISHED_WORDS: &[&str] = &[concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X")];
/// Macros that mark what is not done, or was left over from a search for an error.
const UNFINISHED_MACROS: &[&str] = &["todo", "unimplemented", "dbg"];
/// Attributes that keep a test from running, or from telling what failed.
const TEST_DODGES: &[&str] = &["ignore", "should_panic"];

/// Folders with Rust sources of ours.
const SOURCE_FOLDERS: &[&str] = &["src", "ring", "perf", "tests", "benches", "examples"];

// Tokens.

#[derive(Debug, Clone, PartialEq, Eq)]
struct Token {
    text: String,
    /// From 1.
    line: usize,
}

/// Cuts Rust source into words, `::` and single signs; leaves out comments, strings, characters and lifetimes.
fn tokens(source: &str) -> Vec<Token> {
    let chars: Vec<char> = source.chars().collect();
    let at = |index: usize| chars.get(index).copied().unwrap_or('\0');
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut found = Vec::new();
    let mut line = 1;
    let mut i = 0;
    while i < chars.len() {
        let start = i;
        match at(i) {
            '/' if at(i + 1) == '/' => {
                while i < chars.len() && at(i) != '\n' {
                    i += 1;
                }
            }
            '/' if at(i + 1) == '*' => i = after_block_comment(&chars, i),
            '"' => i = after_string(&chars, i),
            '\'' if at(i + 1) == '\\' || at(i + 2) == '\'' => i = after_character(&chars, i),
            '\'' => {
                i += 1;
                while is_word(at(i)) {
                    i += 1;
                }
            }
            c if is_word(c) => {
                while is_word(at(i)) {
                    i += 1;
                }
                let word: String = chars[start..i].iter().collect();
                let raw = matches!(word.as_str(), "r" | "br" | "cr");
                if raw && (at(i) == '"' || (at(i) == '#' && matches!(at(i + 1), '"' | '#'))) {
                    i = after_raw_string(&chars, i);
                } else if matches!(word.as_str(), "b" | "c") && at(i) == '"' {
                    i = after_string(&chars, i);
                } else if word == "b" && at(i) == '\'' {
                    i = after_character(&chars, i);
                } else if word == "r" && at(i) == '#' {
                    i += 1;
                } else {
                    found.push(Token { text: word, line });
                }
            }
            ':' if at(i + 1) == ':' => {
                found.push(Token { text: "::".into(), line });
                i += 2;
            }
            c => {
                if !c.is_whitespace() {
                    found.push(Token { text: c.into(), line });
                }
                i += 1;
            }
        }
        line += chars[start..i.min(chars.len())].iter().filter(|c| **c == '\n').count();
    }
    found
}

fn after_block_comment(chars: &[char], mut i: usize) -> usize {
    let mut depth = 0;
    while i < chars.len() {
        match (chars[i], chars.get(i + 1)) {
            ('/', Some('*')) => (depth, i) = (depth + 1, i + 2),
            ('*', Some('/')) => (depth, i) = (depth - 1, i + 2),
            _ => i += 1,
        }
        if depth == 0 {
            break;
        }
    }
    i
}

fn after_string(chars: &[char], mut i: usize) -> usize {
    i += 1;
    while i < chars.len() && chars[i] != '"' {
        i += if chars[i] == '\\' { 2 } else { 1 };
    }
    i + 1
}

fn after_raw_string(chars: &[char], mut i: usize) -> usize {
    let hashes = chars[i..].iter().take_while(|c| **c == '#').count();
    i += hashes + 1;
    while i < chars.len() {
        let closes = chars[i] == '"' && chars[i + 1..].iter().take_while(|c| **c == '#').count() >= hashes;
        i += 1;
        if closes {
            return i + hashes;
        }
    }
    i
}

fn after_character(chars: &[char], mut i: usize) -> usize {
    i += 1;
    while i < chars.len() && chars[i] != '\'' {
        i += if chars[i] == '\\' { 2 } else { 1 };
    }
    i + 1
}

/// Whether `wanted` stands at `index`.
fn stands_at(tokens: &[Token], index: usize, wanted: &[&str]) -> bool {
    tokens.len() >= index + wanted.len()
        && wanted.iter().zip(&tokens[index..]).all(|(text, token)| token.text == *text)
}

/// The index behind the bracket that closes the one at `open`.
fn after_bracket(tokens: &[Token], open: usize) -> usize {
    let mut depth = 0;
    for (index, token) in tokens.iter().enumerate().skip(open) {
        match token.text.as_str() {
            "{" | "[" | "(" => depth += 1,
            "}" | "]" | ")" => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return index + 1;
        }
    }
    tokens.len()
}

// Rules. Each answers with one sentence a finding.

/// The modules that lead to a file of the root package: `src/job/mod.rs` is `job`, `src/job/event.rs` is `job::event`.
fn module_path(path: &str) -> Vec<&str> {
    let inner = path.strip_prefix("src/").unwrap_or(path);
    let inner = inner.strip_suffix(".rs").unwrap_or(inner);
    let inner = inner.strip_suffix("/mod").unwrap_or(inner);
    inner.split('/').collect()
}

/// The names right behind a path prefix: one, or the heads of a `{...}` group.
fn heads(tokens: &[Token], index: usize) -> Vec<&Token> {
    let Some(first) = tokens.get(index) else { return Vec::new() };
    if first.text != "{" {
        return vec![first];
    }
    let mut found = Vec::new();
    let mut depth = 0;
    for (i, token) in tokens.iter().enumerate().take(after_bracket(tokens, index)).skip(index) {
        match token.text.as_str() {
            "{" => depth += 1,
            "}" => depth -= 1,
            _ if depth == 1 && matches!(tokens[i - 1].text.as_str(), "{" | ",") => found.push(token),
            _ => {}
        }
    }
    found
}

/// A room uses only rooms below it.
fn floor_faults(path: &str, source: &str) -> Vec<String> {
    if EXEMPT_FROM_FLOORS.contains(&path) {
        return Vec::new();
    }
    let modules = module_path(path);
    let Some(floor) = FLOORS.iter().position(|room| *room == modules[0]) else {
        return vec![format!("{path}: the room `{}` has no floor; give it one in FLOORS", modules[0])];
    };
    let tokens = tokens(source);
    let mut faults = Vec::new();
    // For each open brace, whether it opens an inline module: `super` climbs out of those too.
    let mut braces: Vec<bool> = Vec::new();
    for (i, token) in tokens.iter().enumerate() {
        let rooms = match token.text.as_str() {
            "{" => {
                braces.push(i >= 2 && tokens[i - 2].text == "mod");
                continue;
            }
            "}" => {
                braces.pop();
                continue;
            }
            "crate" if stands_at(&tokens, i + 1, &["::"]) => heads(&tokens, i + 2),
            "super" if i == 0 || tokens[i - 1].text != "::" || stands_at(&tokens, i - 2, &["self"]) => {
                let climbs = (0..).take_while(|n| stands_at(&tokens, i + 2 * n, &["super", "::"])).count();
                let depth = modules.len() + braces.iter().filter(|is_module| **is_module).count();
                if climbs != depth {
                    continue;
                }
                heads(&tokens, i + 2 * climbs)
            }
            _ => continue,
        };
        for used in rooms {
            let above = FLOORS.iter().position(|room| *room == used.text).is_some_and(|other| other > floor);
            if above || used.text == "*" {
                let line = used.line;
                faults.push(format!("{path}:{line}: `{}` may not use `{}`", modules[0], used.text));
            }
        }
    }
    faults
}

/// The ring knows nothing of disks or jobs: its sources name no crate above it.
fn ring_faults(path: &str, source: &str) -> Vec<String> {
    tokens(source)
        .iter()
        .filter(|token| token.text == "blockferry")
        .map(|token| format!("{path}:{}: the ring may not use `blockferry`", token.line))
        .collect()
}

/// No file outgrows one idea.
fn length_faults(path: &str, source: &str) -> Vec<String> {
    let tokens = tokens(source);
    let attribute = ["#", "[", "cfg", "(", "test", ")", "]", "mod"];
    let mut lines = source.lines().count();
    for i in 0..tokens.len() {
        let open = i + attribute.len() + 1;
        if stands_at(&tokens, i, &attribute) && stands_at(&tokens, open, &["{"]) {
            let last = tokens[after_bracket(&tokens, open) - 1].line;
            lines -= last + 1 - tokens[i].line;
        }
    }
    if lines <= LINES_MAX {
        return Vec::new();
    }
    vec![format!("{path}: {lines} lines without its tests; at most {LINES_MAX}")]
}

/// `unsafe` is allowed by name, in listed places, and nowhere else.
fn unsafe_faults(path: &str, source: &str) -> Vec<String> {
    if UNSAFE_PLACES.iter().any(|place| path.starts_with(place)) {
        return Vec::new();
    }
    tokens(source)
        .iter()
        .filter(|token| token.text == "unsafe_code")
        .map(|token| format!("{path}:{}: `unsafe` is not allowed here; see UNSAFE_PLACES", token.line))
        .collect()
}

/// What is printed goes through one place: `println!` panics when its reader has gone, and waits for one that stands.
fn printing_faults(path: &str, source: &str) -> Vec<String> {
    if PRINTING_PLACES.iter().any(|place| path.starts_with(place)) {
        return Vec::new();
    }
    let tokens = tokens(source);
    let is_macro =
        |i: usize| PRINTING_MACROS.contains(&tokens[i].text.as_str()) && stands_at(&tokens, i + 1, &["!"]);
    // Asking whether it is a terminal writes nothing.
    let is_writer = |i: usize| {
        matches!(tokens[i].text.as_str(), "stdout" | "stderr")
            && stands_at(&tokens, i + 1, &["(", ")"])
            && !stands_at(&tokens, i.saturating_sub(7), &["is_terminal", "(", "&"])
    };
    let found = (0..tokens.len()).filter(|i| is_macro(*i) || is_writer(*i));
    found
        .map(|i| format!("{path}:{}: `{}`: print through `cli::print`", tokens[i].line, tokens[i].text))
        .collect()
}

/// What is built on a disk holds a `Child` of its node: a bare driver could be changed, locked and left behind without the
/// graph.
fn edge_faults(path: &str, source: &str) -> Vec<String> {
    let tokens = tokens(source);
    (0..tokens.len())
        .filter(|i| stands_at(&tokens, *i, &["Rc", "<", "dyn", "Driver", ">"]))
        .map(|i| format!("{path}:{}: a bare driver: hold a `Child`, or take a `Node`", tokens[i].line))
        .collect()
}

/// A package keeps the workspace's lints, or none of them holds.
fn manifest_faults(path: &str, text: &str) -> Vec<String> {
    let mut faults = Vec::new();
    if !text.contains("[lints]\nworkspace = true") {
        faults.push(format!("{path}: must have `[lints]` with `workspace = true`"));
    }
    if !text.contains("license.workspace = true") {
        faults.push(format!("{path}: must have `license.workspace = true`"));
    }
    if path.starts_with("ring/") && text.lines().any(|line| names_dependency(line, "blockferry")) {
        faults.push(format!("{path}: the ring may not depend on `blockferry`"));
    }
    faults
}

fn names_dependency(line: &str, name: &str) -> bool {
    let rest = line.trim_start().strip_prefix(name).unwrap_or("-").trim_start();
    rest.starts_with('=') || rest.starts_with(".workspace") || rest.starts_with(".path")
}

/// Nothing is left undone, and no test is switched off.
fn unfinished_faults(path: &str, source: &str) -> Vec<String> {
    let mut faults = Vec::new();
    for (index, line) in source.lines().enumerate() {
        let mut words = line.split(|c: char| !c.is_alphanumeric() && c != '_');
        if let Some(word) = words.find(|word| UNFINISHED_WORDS.contains(word)) {
            faults.push(format!("{path}:{}: `{word}`: finish it or put it on the list of issues", index + 1));
        }
    }
    let tokens = tokens(source);
    for (i, token) in tokens.iter().enumerate() {
        let line = token.line;
        if UNFINISHED_MACROS.contains(&token.text.as_str()) && stands_at(&tokens, i + 1, &["!"]) {
            faults.push(format!("{path}:{line}: `{}!` may not stay", token.text));
        }
        if stands_at(&tokens, i, &["#", "["]) {
            let attribute = &tokens[i + 2..after_bracket(&tokens, i + 1)];
            let conditional = stands_at(attribute, 0, &["cfg_attr"]);
            let reach = if conditional { attribute.len() } else { 1 };
            let mut words = attribute.iter().take(reach);
            if let Some(dodge) = words.find(|word| TEST_DODGES.contains(&word.text.as_str())) {
                faults.push(format!("{path}:{line}: `#[{}]` is not used here", dodge.text));
            }
        }
    }
    faults
}

/// A file opens with prose.
fn head_faults(path: &str, source: &str) -> Vec<String> {
    if source.starts_with("//! ") {
        return Vec::new();
    }
    vec![format!("{path}: must open with `//!`: what situation it handles, and how")]
}

/// Links of a paper to files of the tree lead somewhere. `exists` is asked about paths from the root of the tree.
fn link_faults(path: &str, text: &str, exists: &dyn Fn(&Path) -> bool) -> Vec<String> {
    let folder = Path::new(path).parent().unwrap_or(Path::new(""));
    let mut faults = Vec::new();
    let mut fenced = false;
    for (index, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        }
        if fenced {
            continue;
        }
        // Every second piece between backticks is code.
        let prose: String = line.split('`').step_by(2).collect::<Vec<_>>().join("code");
        for target in link_targets(&prose) {
            let file = target.split(['#', '?']).next().unwrap_or_default();
            if file.is_empty() || file.contains("://") || file.starts_with("mailto:") {
                continue;
            }
            if !exists(&folder.join(file)) {
                faults.push(format!("{path}:{}: the link to `{file}` leads nowhere", index + 1));
            }
        }
    }
    faults
}

fn link_targets(prose: &str) -> Vec<&str> {
    let until = |rest: &'static [char], text| -> Option<&str> { str::split(text, rest).next() };
    let mut targets: Vec<&str> =
        prose.split("](").skip(1).filter_map(|rest| until(&[')', ' '], rest)).collect();
    if prose.starts_with('[')
        && let Some((_, rest)) = prose.split_once("]: ")
    {
        targets.extend(until(&[' '], rest.trim()));
    }
    targets
}

/// Both licences stand in full.
fn licence_faults(read: &dyn Fn(&str) -> Option<String>) -> Vec<String> {
    let licences = [
        ("LICENSE-MIT", &["MIT License", "The Blockferry developers", "WITHOUT WARRANTY OF ANY KIND"][..]),
        ("LICENSE-APACHE", &["Version 2.0, January 2004", "END OF TERMS AND CONDITIONS"][..]),
    ];
    let mut faults = Vec::new();
    for (file, sentences) in licences {
        let text = read(file).unwrap_or_default();
        for sentence in sentences.iter().filter(|sentence| !text.contains(**sentence)) {
            faults.push(format!("{file}: must be there and say `{sentence}`"));
        }
    }
    faults
}

// The tree.

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(root().join(path)).ok()
}

/// Files under `folder` (a path from the root) that end in `.extension`, in the order of their names. What is built
/// and what is hidden is left out.
fn files(folder: &str, extension: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(root().join(folder)) else { return Vec::new() };
    let mut names: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    names.sort();
    let mut found = Vec::new();
    for name in names {
        let path = name.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
        let hidden = name.file_name().is_some_and(|file| file.to_string_lossy().starts_with('.'));
        if name.is_dir() && !hidden && path != "target" {
            found.extend(files(&path, extension));
        } else if name.extension().is_some_and(|end| end == extension) {
            found.push(path);
        }
    }
    found
}

fn sources() -> Vec<String> {
    SOURCE_FOLDERS.iter().flat_map(|folder| files(folder, "rs")).collect()
}

/// Fails with all that `rule` finds in `paths`, of which there must be some.
fn hold(paths: &[String], rule: &dyn Fn(&str, &str) -> Vec<String>) {
    assert!(!paths.is_empty(), "there is nothing to rule");
    let faults: Vec<String> = paths.iter().flat_map(|path| rule(path, &read(path).unwrap())).collect();
    assert!(faults.is_empty(), "\n{}\n", faults.join("\n"));
}

/// The crates that an embedder gets, who does without the command.
fn crates(features: &[&str]) -> Vec<String> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let tree = std::process::Command::new(cargo)
        .args([
            "tree",
            "--offline",
            "--locked",
            "--edges",
            "normal",
            "--prefix",
            "none",
            "--package",
            "blockferry",
        ])
        .args(features)
        .current_dir(root())
        .output()
        .expect("cargo runs");
    assert!(tree.status.success(), "{}", String::from_utf8_lossy(&tree.stderr));
    let text = String::from_utf8(tree.stdout).expect("text");
    text.lines().filter_map(|line| line.split(' ').next()).map(str::to_owned).collect()
}

#[test]
fn embedders_get_no_command_line() {
    const OF_THE_COMMAND: [&str; 3] = ["clap", "signal-hook", "tracing-subscriber"];
    let is_there = |crates: &[String], name: &str| crates.iter().any(|found| found == name);
    let (all, embedded) = (crates(&[]), crates(&["--no-default-features"]));
    for name in OF_THE_COMMAND {
        assert!(is_there(&all, name) && !is_there(&embedded, name), "{name}");
    }
    assert!(is_there(&embedded, "io-uring"));
}

#[test]
fn rooms_use_only_rooms_below() {
    hold(&files("src", "rs"), &floor_faults);
}

#[test]
fn the_ring_stands_alone() {
    hold(&files("ring", "rs"), &ring_faults);
}

#[test]
fn no_file_outgrows_one_idea() {
    hold(&sources(), &length_faults);
}

#[test]
fn unsafe_code_has_its_places() {
    hold(&sources(), &unsafe_faults);
    assert!(read("Cargo.toml").unwrap().contains("unsafe_code = \"deny\""));
}

#[test]
fn printing_has_its_place() {
    hold(&files("src", "rs"), &printing_faults);
}

#[test]
fn formats_and_exports_hold_edges() {
    let rooms =
        ["src/format", "src/export", "src/graph/node.rs", "src/graph/chain.rs", "src/protocol/delay.rs"];
    let paths = files("src", "rs").into_iter().filter(|path| rooms.iter().any(|room| path.starts_with(room)));
    hold(&paths.collect::<Vec<_>>(), &edge_faults);
    assert_eq!(edge_faults("a.rs", "fn f(it: &Rc<dyn Driver>) {}").len(), 1);
}

#[test]
fn packages_keep_the_house_lints() {
    hold(&["Cargo.toml", "ring/Cargo.toml", "perf/Cargo.toml"].map(String::from), &manifest_faults);
}

#[test]
fn nothing_is_left_unfinished() {
    hold(&sources(), &unfinished_faults);
}

#[test]
fn each_source_opens_with_prose() {
    hold(&sources(), &head_faults);
}

#[test]
fn links_lead_somewhere() {
    let papers = files("", "md");
    assert!(papers.iter().any(|path| path == "README.md"));
    hold(&papers, &|path, text| link_faults(path, text, &|target| root().join(target).exists()));
}

#[test]
fn licences_are_there() {
    assert_eq!(licence_faults(&read), [""; 0]);
}

// Each rule seen to fail.

mod planted {
    use super::*;

    /// Each text has as many faults as it says.
    fn count(rule: &dyn Fn(&str, &str) -> Vec<String>, path: &str, table: &[(usize, &str)]) {
        for (faults, text) in table {
            let found = rule(path, text);
            assert_eq!(found.len(), *faults, "{path}: {text}\n{found:?}");
        }
    }

    #[test]
    fn the_lexer_sees_code_only() {
        let source = "// crate::a\n/* crate /* b */ c */ fn f<'long>(x: &'long str) -> char {\n\
                      let s = \"crate::\\\"d\"; let r = r#\"e\"f\"#; let b = b\"g\"; let q = '\"'; 'x' }\n\
                      r#use ::h b'\\'' '\\u{1F600}' end";
        let words: Vec<_> = tokens(source).into_iter().map(|token| (token.text, token.line)).collect();
        let texts: Vec<&str> = words.iter().map(|(text, _)| text.as_str()).collect();
        assert_eq!(
            texts.join(" "),
            "fn f < > ( x : & str ) - > char { let s = ; let r = ; let b = ; let q = ; } use :: h end"
        );
        assert_eq!((words[0].1, words.last().unwrap().1), (2, 4));
    }

    #[test]
    fn arrows_that_run_up() {
        count(
            &floor_faults,
            "src/graph/node.rs",
            &[
                (0, "use crate::base::ranges; use crate::{block::Request, format::{raw, qcow2}};"),
                (
                    0,
                    "// crate::job is above\nlet s = \"crate::export\"; crate::graph::x(); pub(crate) fn job() {}",
                ),
                (1, "use crate::job::Lifecycle;"),
                (1, "use crate::{base::{self}, export::Root, block::{control, engine}};"),
                (2, "fn f() -> crate::job::A { crate :: engine::b() }"),
                (1, "macro_rules! m { () => { $crate::cli::main() } }"),
                (1, "use super::super::job::Lifecycle;"),
                (0, "use super::job::Lifecycle;"),
                (1, "mod tests { use super::super::super::{block, job}; }"),
                (0, "mod tests { use super::super::job; }"),
                (1, "use crate::*;"),
            ],
        );
        count(&floor_faults, "src/job/mod.rs", &[(1, "use super::export;"), (0, "use super::graph;")]);
        count(&floor_faults, "src/engine.rs", &[(1, "use crate::cli;"), (0, "use crate::control;")]);
        count(&floor_faults, "src/attic/mod.rs", &[(1, "")]);
        count(&floor_faults, "src/lib.rs", &[(0, "use crate::cli;")]);
    }

    #[test]
    fn a_ring_that_looks_up() {
        count(
            &ring_faults,
            "ring/src/lib.rs",
            &[(0, "//! Used by blockferry.\nuse blockferry_ring::x;"), (1, "use blockferry::block;")],
        );
        let manifest = |dependency: &str| {
            format!("license.workspace = true\n[dependencies]\n{dependency}\n[lints]\nworkspace = true\n")
        };
        count(
            &manifest_faults,
            "ring/Cargo.toml",
            &[
                (0, &manifest("slab = \"0.4\"")),
                (1, &manifest("blockferry = { path = \"..\" }")),
                (1, &manifest("blockferry.workspace = true")),
                (0, &manifest("blockferry-base.workspace = true")),
            ],
        );
    }

    #[test]
    fn packages_without_lints_or_licence() {
        count(
            &manifest_faults,
            "perf/Cargo.toml",
            &[(2, ""), (1, "license.workspace = true"), (1, "[lints]\nworkspace = true\n")],
        );
    }

    #[test]
    fn files_that_grew() {
        let lines = |count: usize| "fn f() {}\n".repeat(count);
        let tests = format!("#[cfg(test)]\nmod tests {{\n{}}}\n", lines(500));
        count(
            &length_faults,
            "src/base/x.rs",
            &[
                (0, &lines(LINES_MAX)),
                (1, &lines(LINES_MAX + 1)),
                (0, &(lines(LINES_MAX) + &tests)),
                (1, &(lines(LINES_MAX) + &tests + &lines(1))),
            ],
        );
    }

    #[test]
    fn unsafe_out_of_place() {
        let allowed = "#![allow(unsafe_code)]";
        count(&unsafe_faults, "src/protocol/file.rs", &[(1, allowed), (0, "// allow(unsafe_code)")]);
        count(&unsafe_faults, "src/export/mod.rs", &[(1, "#[expect(unsafe_code, reason = \"\")] mod x;")]);
        count(&unsafe_faults, "ring/src/sim.rs", &[(1, allowed)]);
        for place in ["ring/src/arena.rs", "ring/src/arena/lease.rs", "ring/src/uring/mod.rs"] {
            count(&unsafe_faults, place, &[(0, allowed)]);
        }
    }

    #[test]
    fn printing_out_of_place() {
        count(
            &printing_faults,
            "src/cli/info.rs",
            &[
                (0, "// println!\nlet s = \"eprintln!\"; print::say(s); product!(\"{s}\"); fn print() {}"),
                (1, "println!(\"{s}\");"),
                (2, "eprint!(\"a\"); if x { print!(\"b\") }"),
                (1, "writeln!(std::io::stdout(), \"a\");"),
                (1, "use std::io; io::stderr().lock()"),
                (0, "let t = std::io::IsTerminal::is_terminal(&std::io::stderr());"),
            ],
        );
        count(&printing_faults, "src/cli/print/mod.rs", &[(0, "write(io::stdout())")]);
        count(&printing_faults, "src/job/runner.rs", &[(1, "eprintln!()")]);
    }

    #[test]
    fn work_left_undone() {
        let marks: Vec<String> = UNFINISHED_WORDS.iter().map(|word| format!("// {word}: later")).collect();
        let mut table: Vec<(usize, &str)> = marks.iter().map(|line| (1, line.as_str())).collect();
        table.extend([
            (1, "fn f() { todo!() }"),
            (1, "let x = dbg!(y);"),
            (1, "#[test]\n#[ignore]\nfn f() {}"),
            (1, "#[ignore = \"slow\"]"),
            (1, "#[should_panic(expected = \"x\")]"),
            (1, "#[cfg_attr(miri, ignore)]"),
            (0, "// #[ignore] and dbg! are not used\nOnError::Ignore; let s = \"todo!\"; fn ignore() {}"),
            (0, "#[allow(dead_code)] fn todo() { ignore() }"),
            (0, "let template = \"/tmp/disk.XXXXXX\";"),
        ]);
        count(&unfinished_faults, "src/x.rs", &table);
    }

    #[test]
    fn files_without_a_word() {
        count(
            &head_faults,
            "src/x.rs",
            &[(0, "//! Prose.\n"), (1, "use std::fs;\n//! Late.\n"), (1, "// Not a doc.\n"), (1, "")],
        );
    }

    #[test]
    fn links_to_nowhere() {
        let exists = |path: &Path| path == Path::new("docs/a.md") || path == Path::new("docs/../README.md");
        let rule = |path: &str, text: &str| link_faults(path, text, &exists);
        count(
            &rule,
            "docs/b.md",
            &[
                (0, "[a](a.md), [part](a.md#part), [up](../README.md \"title\"), [here](#here)"),
                (0, "[web](https://example.org/x) [mail](mailto:x@example.org)"),
                (1, "[gone](gone.md)"),
                (2, "[a](a.md) [x](x.md) and ![picture](x.png)"),
                (1, "[gone]: gone.md"),
                (0, "[a]: a.md"),
                (0, "`[x](x.md)`\n```\n[y](y.md)\n```\n"),
                (1, "```\n```\n[y](y.md)"),
            ],
        );
    }

    #[test]
    fn licences_cut_short() {
        assert_eq!(licence_faults(&|_| None).len(), 5);
        assert_eq!(licence_faults(&|file| read(file).filter(|_| file == "LICENSE-MIT")).len(), 2);
        assert_eq!(licence_faults(&|file| read(file).map(|text| text[..200].to_owned())).len(), 2);
    }
}
