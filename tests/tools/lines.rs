//! The same command lines through `qemu-img` and through `blockferry`, on copies of the same small images: exit codes, JSON
//! documents, and what has become of the images. The lines are in `lines.txt`, with those that differ on purpose and why.
//!
//! And the other way round: what `qemu-img COMMAND --help` offers is here, or docs/tools.md says that it is not.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::Value;

use common::image::{KIB, MIB, Scratch, scribble};
use common::{Ended, blockferry, tool};

const LINES: &str = include_str!("lines.txt");
const PAGE: &str = include_str!("../../docs/tools.md");
/// What has been promised.
const LINES_MIN: usize = 400;
/// Processes that wait for each other's disks more than for processors.
const THREADS: usize = 4;
/// Images that others need.
const BELOW: [(&str, &[&str]); 6] = [
    ("top.qcow2", &["base.qcow2"]),
    ("mid.qcow2", &["base.qcow2"]),
    ("leaf.qcow2", &["mid.qcow2", "base.qcow2"]),
    ("over.qcow2", &["raw.img"]),
    ("long.qcow2", &["short.img"]),
    ("data.qcow2", &["data.raw"]),
];

/// What differs on purpose in a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Same,
    Exit,
    Json,
    Contents,
}

/// Every line of the table, each once.
fn table(text: &str) -> Vec<(Kind, String)> {
    let (mut kind, mut found, mut seen) = (Kind::Same, Vec::new(), BTreeSet::new());
    for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if let Some((word, reason)) = line.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            kind = match word {
                "same" => Kind::Same,
                "exit" => Kind::Exit,
                "json" => Kind::Json,
                "contents" => Kind::Contents,
                _ => panic!("no such heading: {line}"),
            };
            assert!(kind == Kind::Same || reason.len() > 10, "{line}: why?");
            continue;
        }
        found.extend(
            expand(line).into_iter().filter(|line| seen.insert(line.clone())).map(|line| (kind, line)),
        );
    }
    found
}

/// A line with each of the words that stand in braces.
fn expand(line: &str) -> Vec<String> {
    let Some((front, (choices, back))) =
        line.split_once('{').and_then(|(front, rest)| Some((front, rest.split_once('}')?)))
    else {
        return vec![line.split_whitespace().collect::<Vec<_>>().join(" ")];
    };
    choices.split('|').flat_map(|choice| expand(&format!("{front}{choice}{back}"))).collect()
}

/// The images that the lines are about, with the bytes of each.
fn images() -> BTreeMap<String, Vec<u8>> {
    let scratch = Scratch::new();
    let run = |program: &str, line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        let mut command = Command::new(program);
        command.current_dir(scratch.dir()).args(&words).stdout(Stdio::null());
        assert!(command.status().expect("it starts").success(), "{program} {line}");
    };
    let write = |image: &str, writes: &[&str]| {
        let words = writes.iter().flat_map(|write| ["-c", write]);
        let mut command = Command::new("qemu-io");
        command.current_dir(scratch.dir()).args(["-f", "qcow2"]).args(words).arg(image).stdout(Stdio::null());
        assert!(command.status().expect("it starts").success(), "{image} {writes:?}");
    };
    let data = [(0, 30_000), (200 * KIB, 30_000), (500 * KIB - 512, 30_000)];
    scratch.holey("raw.img", MIB, &data);
    scratch.holey("short.img", MIB / 2, &data[..2]);
    scratch.holey("other.img", MIB, &[(4 * KIB, 100 * KIB), (900 * KIB, 7000)]);
    for (options, image) in [
        ("", "a"),
        (" -o compat=0.10", "v2"),
        (" -o extended_l2=on", "ext"),
        ("", "zero"),
        ("", "snap"),
        (" -o data_file=data.raw", "data"),
        ("", "base"),
        ("", "leak"),
        ("", "bad"),
    ] {
        run("qemu-img", &format!("create -q -f qcow2{options} {image}.qcow2 1M"));
        write(&format!("{image}.qcow2"), &["write -P 3 64k 100k", "write -P 4 700000 5000"]);
    }
    run("qemu-img", "create -q -f qcow2 empty.qcow2 1M");
    run("qemu-img", "convert -c -O qcow2 -o cluster_size=4k raw.img comp.qcow2");
    write("zero.qcow2", &["write -z 0 128k", "write -z 600k 200k"]);
    for (snapshot, then) in [("one", "write -P 9 0 300k"), ("two", "write -P 8 400k 100k")] {
        run("qemu-img", &format!("snapshot -c {snapshot} snap.qcow2"));
        write("snap.qcow2", &[then]);
    }
    for (below, format, image) in [
        ("base.qcow2", "qcow2", "top"),
        ("raw.img", "raw", "over"),
        ("short.img", "raw", "long"),
        ("base.qcow2", "qcow2", "mid"),
        ("mid.qcow2", "qcow2", "leaf"),
    ] {
        run("qemu-img", &format!("create -q -f qcow2 -b {below} -F {format} {image}.qcow2 1M"));
        write(&format!("{image}.qcow2"), &["write -P 5 128k 64k", "write -P 6 300000 3000"]);
    }
    run("qemu-img", "create -q -f qcow2 -u -b vanished.qcow2 -F qcow2 gone.qcow2 1M");
    // The refcounts of 16 bits are in the third cluster.
    let refcount = |image: &str, cluster: u64, count: u8| {
        scribble(&scratch.path(image), (128 << 10) + 2 * cluster, &[0, count]);
    };
    let clusters =
        |image: &str| std::fs::metadata(scratch.path(image)).expect("a file").len().div_ceil(64 << 10);
    let end = clusters("leak.qcow2");
    scribble(&scratch.path("leak.qcow2"), ((end + 1) << 16) - 1, &[0]);
    refcount("leak.qcow2", end, 1);
    refcount("bad.qcow2", clusters("bad.qcow2") - 1, 0);
    std::fs::write(scratch.path("text.txt"), "no image\n".repeat(100)).expect("a file");
    files(scratch.dir())
}

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir).expect("a folder").flatten();
    entries
        .map(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            (name, std::fs::read(entry.path()).expect("a file"))
        })
        .collect()
}

/// One side of a line: what it said, and the folder afterwards.
struct Side {
    ended: Ended,
    scratch: Scratch,
    files: BTreeMap<String, Vec<u8>>,
}

fn run_side(command: Command, words: &[&str], given: &BTreeMap<&str, &Vec<u8>>) -> Side {
    let scratch = Scratch::new();
    for (name, bytes) in given {
        std::fs::write(scratch.dir().join(name), bytes).expect("a copy");
    }
    let mut command = command;
    command.args(words).current_dir(scratch.dir());
    let ended = common::Process::spawn(command).end();
    let files = files(scratch.dir());
    Side { ended, scratch, files }
}

/// What differs between the two programs for this line.
fn compare(line: &str, images: &BTreeMap<String, Vec<u8>>) -> Vec<(Kind, String)> {
    let words: Vec<&str> = line.split(' ').map(|word| if word == "''" { "" } else { word }).collect();
    let named = |name: &str| line.split([' ', '=', ',']).any(|word| word == name);
    let mut given = BTreeMap::new();
    for name in images.keys().filter(|name| named(name)) {
        let below = BELOW.iter().filter(|(image, _)| image == name).flat_map(|(_, below)| *below);
        for name in below.chain([&name.as_str()]) {
            given.insert(*name, &images[*name]);
        }
    }
    let theirs = run_side(Command::new("qemu-img"), &words, &given);
    let ours = run_side(blockferry(&[]), &words, &given);
    let says_more = matches!(words[0], "check" | "compare");
    let class = |side: &Side| side.ended.code.map(|code| if says_more { code } else { i32::from(code != 0) });
    let mut found = Vec::new();
    if class(&theirs) != class(&ours) || !matches!(ours.ended.code, Some(0..=3 | 63)) {
        let (a, b) = (&theirs.ended, &ours.ended);
        return vec![(Kind::Exit, format!("exit {:?} and {:?}: {}{}", a.code, b.code, a.err, b.err))];
    }
    if line.contains("json") && !theirs.ended.out.trim().is_empty() {
        let parse = |side: &Side| serde_json::from_str::<Value>(&side.ended.out).ok();
        match (parse(&theirs), parse(&ours)) {
            (Some(a), Some(b)) => fields(&a, &b, "", &mut found),
            _ => found.push((Kind::Json, format!("no JSON: {}", ours.ended))),
        }
    }
    if theirs.ended.code == Some(0) {
        contents(&theirs, &ours, &mut found);
    } else if given.iter().any(|(name, was)| ours.files.get(*name) != Some(was))
        || ours.files.len() != given.len()
    {
        // A repair that leaves something to be repaired has done its work all the same.
        if words[0] != "check" {
            found.push((Kind::Contents, "it was refused, and something has changed".into()));
        }
    }
    found
}

/// Fields that both have.
fn fields(theirs: &Value, ours: &Value, path: &str, found: &mut Vec<(Kind, String)>) {
    match (theirs, ours) {
        (Value::Object(a), Value::Object(b)) => {
            for (name, value) in a.iter().filter(|(name, _)| *name != "actual-size") {
                if let Some(ours) = b.get(name) {
                    fields(value, ours, &format!("{path}/{name}"), found);
                }
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            a.iter().zip(b).enumerate().for_each(|(n, (a, b))| fields(a, b, &format!("{path}/{n}"), found));
        }
        _ if theirs == ours => {}
        _ => found.push((Kind::Json, format!("{path}: {theirs} and {ours}"))),
    }
}

/// Every image shows the same afterwards, is of the same kind, and is sound.
fn contents(theirs: &Side, ours: &Side, found: &mut Vec<(Kind, String)>) {
    let names: BTreeSet<&String> = theirs.files.keys().chain(ours.files.keys()).collect();
    for name in names {
        let (Some(a), Some(b)) = (theirs.files.get(name), ours.files.get(name)) else {
            found.push((Kind::Contents, format!("only one of them made '{name}'")));
            continue;
        };
        if a == b {
            continue;
        }
        let is_qcow2 = |bytes: &Vec<u8>| bytes.starts_with(b"QFI\xfb");
        if is_qcow2(a) != is_qcow2(b) {
            found.push((Kind::Contents, format!("'{name}' has another format")));
            continue;
        }
        let format = if is_qcow2(a) { "qcow2" } else { "raw" };
        // Names in images are read from where they lie. What is over nothing shows nothing.
        let bytes = shown(theirs, name, format);
        if bytes.is_some() && bytes != shown(ours, name, format) {
            found.push((Kind::Contents, format!("'{name}' shows something else")));
        }
        let (a, b) = (theirs.scratch.path(name), ours.scratch.path(name));
        if format == "qcow2" {
            told(name, [&a, &b], found);
        }
    }
}

/// The bytes that an image shows, without the zeroes at its end.
fn shown(side: &Side, name: &str, format: &str) -> Option<Vec<u8>> {
    let raw = side.scratch.path("shown by qemu-img");
    let mut command = Command::new("qemu-img");
    command.current_dir(side.scratch.dir()).args(["convert", "-f", format, "-O", "raw", name, &raw]);
    let ended = common::Process::spawn(command).end();
    (ended.code == Some(0)).then(|| {
        let mut bytes = std::fs::read(&raw).expect("it was made");
        while bytes.last() == Some(&0) {
            bytes.pop();
        }
        bytes
    })
}

/// What an image tells of itself.
fn told(name: &str, images: [&str; 2], found: &mut Vec<(Kind, String)>) {
    const FIELDS: [&str; 6] = [
        "virtual-size",
        "cluster-size",
        "backing-filename",
        "backing-filename-format",
        "format-specific",
        "snapshots",
    ];
    let [a, b] = images.map(|image| {
        let mut told = super::qemu_json(&["info", "--output=json", image]);
        let snapshots = told["snapshots"].as_array_mut().into_iter().flatten();
        // Both were taken now.
        snapshots.filter_map(Value::as_object_mut).for_each(|snapshot| {
            snapshot.retain(|field, _| !field.starts_with("date"));
        });
        told
    });
    for field in FIELDS.into_iter().filter(|field| a[field] != b[field]) {
        found.push((Kind::Contents, format!("{field} of '{name}': {} and {}", a[field], b[field])));
    }
    let [a, b] = images.map(|image| super::qemu(&["check", "-q", image]));
    if b.code != Some(0) && a.code != b.code {
        found.push((Kind::Contents, format!("'{name}' is not sound: {b}")));
    }
}

/// Runs every line, on several threads; what is not as the table has it.
fn run_all(lines: &[(Kind, String)]) -> Vec<String> {
    let (images, next) = (images(), AtomicUsize::new(0));
    let work = || {
        let mut wrong = Vec::new();
        while let Some((kind, line)) = lines.get(next.fetch_add(1, Ordering::Relaxed)) {
            let found = compare(line, &images);
            let kinds: BTreeSet<Kind> = found.iter().map(|(kind, _)| *kind).collect();
            let wanted: BTreeSet<Kind> = [*kind].into_iter().filter(|kind| *kind != Kind::Same).collect();
            if kinds != wanted {
                wrong.push(format!("{line}\n    is to differ in {wanted:?}, and does in {found:?}"));
            }
        }
        wrong
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(work)).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("a thread")).collect()
    })
}

#[test]
fn every_line_does_what_it_does_for_qemu_img() {
    let lines = table(LINES);
    assert!(lines.len() >= LINES_MIN, "{}", lines.len());
    let wrong = run_all(&lines);
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), lines.len(), wrong.join("\n"));
}

/// The comparison itself can fail: in each way.
#[test]
fn what_differs_is_seen() {
    let lines = [
        (Kind::Exit, "info a.qcow2"),
        (Kind::Same, "create -q -f raw other.img 1M"),
        (Kind::Json, "info --output=json a.qcow2"),
        (Kind::Contents, "commit top.qcow2"),
    ];
    let lines: Vec<_> = lines.into_iter().map(|(kind, line)| (kind, line.to_owned())).collect();
    assert_eq!(run_all(&lines).len(), lines.len());
    let mut found = Vec::new();
    fields(
        &serde_json::json!({"a": [1, {"b": 2}]}),
        &serde_json::json!({"a": [1, {"b": 3}], "c": 1}),
        "",
        &mut found,
    );
    assert_eq!(found, [(Kind::Json, "/a/1/b: 2 and 3".to_owned())]);
}

/// The options that a help text lists: each with its other name.
fn options(help: &str) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    for line in help.lines().map(str::trim_start).filter(|line| line.starts_with('-')) {
        let mut names = Vec::new();
        for word in line.split([' ', ',', '=']).filter(|word| !word.is_empty()) {
            if !word.starts_with('-') || word.len() < 2 {
                break;
            }
            names.push(word.to_owned());
        }
        found.push(names);
    }
    found
}

/// What the page lists as not being here: (command, option).
fn differing() -> BTreeSet<(String, String)> {
    let rows = PAGE.lines().skip_while(|line| !line.starts_with("## Options that are not here"));
    let rows = rows.skip(1).take_while(|line| !line.starts_with("## ")).filter(|line| line.starts_with('|'));
    let words =
        |cell: &str| -> Vec<String> { cell.split('`').skip(1).step_by(2).map(str::to_owned).collect() };
    let mut found = BTreeSet::new();
    for row in rows {
        let cells: Vec<&str> = row.split('|').collect();
        let (Some(commands), Some(names)) = (cells.get(1), cells.get(2)) else { continue };
        for command in words(commands) {
            found.extend(words(names).into_iter().map(|name| (command.clone(), name)));
        }
    }
    found
}

/// The commands that `qemu-img` has.
fn commands() -> Vec<String> {
    let help = tool("qemu-img", &["--help"]);
    let listed = help.lines().skip_while(|line| !line.starts_with("Recognized commands")).skip(2);
    let listed = listed.take_while(|line| !line.is_empty());
    listed.filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect()
}

#[test]
fn every_option_of_qemu_img_is_here_or_the_page_says_that_it_is_not() {
    let (differing, mut wrong) = (differing(), Vec::new());
    let commands = commands();
    assert!(commands.len() >= 14 && differing.len() > 10, "{commands:?} {differing:?}");
    let mut seen = BTreeSet::new();
    for command in &commands {
        let ours: BTreeSet<String> = match common::run(&[command, "--help"]) {
            ended if ended.code == Some(0) => {
                // Other names are in brackets behind the help: [aliases: --cache]
                let words = ended.out.split([' ', ',', '=', '[', ']', '\n', '|']);
                words.filter(|word| word.starts_with('-')).map(str::to_owned).collect()
            }
            _ => BTreeSet::new(),
        };
        for names in options(&tool("qemu-img", &[command, "--help"])) {
            for name in names {
                let listed = differing.contains(&(command.clone(), name.clone()));
                seen.insert((command.clone(), name.clone()));
                // One is misspelt there.
                let is_here =
                    ours.iter().any(|ours| *ours == name || name.len() > 8 && ours.starts_with(&*name));
                // `bench` is another program of the same name: some options are called the same.
                if is_here == listed && !(is_here && command == "bench") {
                    wrong.push(format!("{command} {name}: here {is_here}, listed {listed}"));
                }
            }
        }
    }
    let unknown: Vec<_> = differing.iter().filter(|listed| !seen.contains(listed)).collect();
    assert!(wrong.is_empty() && unknown.is_empty(), "{}\nno such option: {unknown:?}", wrong.join("\n"));
}

/// Every option that both have stands in some line, by one of its names: `qemu-img` does not take every name that it lists.
#[test]
fn the_table_has_every_option() {
    let (differing, lines) = (differing(), table(LINES));
    let mut missing = Vec::new();
    for command in commands() {
        for names in options(&tool("qemu-img", &[&command, "--help"])) {
            let is_said = lines.iter().any(|(_, line)| {
                let mut words = line.split([' ', '=']);
                words.next() == Some(&command) && words.any(|word| names.iter().any(|name| word == name))
            });
            let is_left_out = |name: &String| {
                matches!(&**name, "-h" | "--help") || differing.contains(&(command.clone(), name.clone()))
            };
            if !is_said && !names.iter().all(is_left_out) {
                missing.push(format!("{command} {names:?}"));
            }
        }
    }
    assert!(missing.is_empty(), "{missing:?}");
}
