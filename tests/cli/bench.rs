//! `blockferry bench` against real servers: it counts right, it is late where the disk is late, and it finds every kind
//! of wrong content, in the act and afterwards.

use common::nbd_peers;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use blockferry::cli::bench::ack_log::AckLog;
use blockferry::cli::bench::load::{LoadConfig, run};
use blockferry::cli::bench::model::Survival;
use blockferry::cli::bench::schedule::{Access, Pace};
use blockferry::cli::bench::target::TargetOptions;
use nbd_peers::Peer;
use serde_json::Value;

const DONE: i32 = 0;
const FAILED: i32 = 1;
const DIFFERENT: i32 = 4;

/// The command on a disk that may be lost.
fn command(arguments: &[&str]) -> Command {
    let mut command = careful(arguments);
    if !arguments.contains(&"--check-log") {
        command.arg("--overwrite");
    }
    command
}

/// The command without that word.
fn careful(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_blockferry"));
    command.arg("bench").args(arguments).stdin(Stdio::null());
    command
}

struct Ran {
    code: i32,
    /// The last line of the output, which is the result.
    result: Value,
    words: String,
}

fn judge(output: &Output) -> Ran {
    let text = String::from_utf8_lossy(&output.stdout);
    let result = text.lines().last().and_then(|line| serde_json::from_str(line).ok()).unwrap_or(Value::Null);
    let words = format!("{text}{}", String::from_utf8_lossy(&output.stderr));
    Ran { code: output.status.code().unwrap_or(-1), result, words }
}

/// Runs the command to its end, with JSON output.
fn bench(arguments: &[&str]) -> Ran {
    judge(&command(arguments).args(["--json", "--quiet"]).output().expect("the command runs"))
}

impl Ran {
    #[track_caller]
    fn expect(self, code: i32) -> Ran {
        assert_eq!(self.code, code, "{}", self.words);
        self
    }

    /// A number at a path such as `/report/total/iops`.
    #[track_caller]
    fn number(&self, path: &str) -> f64 {
        let value = self.result.pointer(path).and_then(Value::as_f64);
        value.unwrap_or_else(|| panic!("{path} in {}", self.words))
    }

    #[track_caller]
    fn text(&self, path: &str) -> &str {
        let value = self.result.pointer(path).and_then(Value::as_str);
        value.unwrap_or_else(|| panic!("{path} in {}", self.words))
    }

    /// Counts and percentiles of one kind of requests that agree with each other.
    #[track_caller]
    fn check_kind(&self, kind: &str) {
        let at = |field: &str| self.number(&format!("/report/{kind}/{field}"));
        let seconds = self.number("/report/elapsed-ns") / 1e9;
        let operations = at("operations");
        assert!((at("iops") * seconds - operations).abs() < 1.0, "{}", self.words);
        assert_eq!(at("bytes"), operations * self.number("/report/block-bytes"));
        assert!((at("bytes-per-sec") * seconds - at("bytes")).abs() < 4096.0, "{}", self.words);
        let latencies = ["min-ns", "p50-ns", "p90-ns", "p99-ns", "p99-9-ns", "max-ns"]
            .map(|p| at(&format!("latency/{p}")));
        assert!(latencies.is_sorted(), "{latencies:?}");
        let mean = at("latency/mean-ns");
        assert!(latencies[0] <= mean && mean <= latencies[5], "{}", self.words);
    }
}

fn image(folder: &Path, bytes: u64) -> PathBuf {
    let path = folder.join("image");
    std::fs::File::create(&path).unwrap().set_len(bytes).unwrap();
    path
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a plain path")
}

#[test]
fn a_mixed_load_is_counted_and_verified_over_one_and_several_connections() {
    let folder = tempfile::tempdir().unwrap();
    let image = image(folder.path(), 16 << 20);
    let peers = [Peer::nbdkit(&["memory", "16M"]), Peer::qemu_nbd(&image, &["--cache=writeback"])];
    for peer in &peers {
        for connections in ["1", "3"] {
            let uri = peer.uri();
            let load = ["-n", "6000", "-d", "24", "-p", "40", "--verify", "--flush-every", "500"];
            let ran = bench(&[&load[..], &["-c", connections, &uri]].concat()).expect(DONE);
            ["total", "reads", "writes"].iter().for_each(|kind| ran.check_kind(kind));
            let count = |path: &str| ran.number(path) as u64;
            assert_eq!(count("/report/total/operations"), 6000);
            assert_eq!(count("/report/total/latency/count"), 6000);
            let (reads, writes) = (count("/report/reads/operations"), count("/report/writes/operations"));
            assert_eq!(reads + writes, 6000);
            assert!((2100..2700).contains(&reads), "{reads} of 40 %");
            assert_eq!(count("/report/writes-acknowledged"), writes);
            let flushes = count("/report/flushes/operations");
            assert!((5..=writes / 500).contains(&flushes), "{flushes} flushes, {writes} writes");
            let verified = count("/report/verify/at-end/verified");
            assert!(verified > 2000 && verified <= writes, "{verified}");
            assert!(count("/report/verify/reads-verified") > 500);
            assert_eq!(count("/report/verify/at-end/unknown"), 0);
            assert_eq!(count("/report/connections"), connections.parse::<u64>().unwrap());
        }
    }
}

#[test]
fn people_get_a_table() {
    let peer = Peer::nbdkit(&["memory", "1M"]);
    let uri = peer.uri();
    let output =
        command(&["-n", "200", "-p", "50", "--verify", "--pattern", "sequential", &uri]).output().unwrap();
    let ran = judge(&output).expect(DONE);
    for word in ["IOPS", "p99.9", "reads", "writes", "all", "verified: ", "0 wrong", "200 operations"] {
        assert!(ran.words.contains(word), "{word}: {}", ran.words);
    }
}

/// A disk that answers in 20 ms serves 50 requests a second one at a time. Whoever asks for 200 a second must be told
/// how long they would really have waited; a closed load on the same disk looks fine.
#[test]
fn latency_counts_from_when_a_request_was_due() {
    let peer = Peer::nbdkit(&["--filter=delay", "memory", "1M", "rdelay=20ms"]);
    let uri = peer.uri();
    let closed = bench(&["-t", "1s", "-p", "100", "-d", "1", &uri]).expect(DONE);
    assert!(closed.number("/report/total/latency/p99-ns") < 100e6, "{}", closed.words);
    for poisson in [&[][..], &["--poisson"]] {
        let load = ["-t", "1s", "-p", "100", "-d", "1", "--rate", "200", &uri];
        let open = bench(&[&load[..], poisson].concat()).expect(DONE);
        let (done, unsent) = (open.number("/report/total/operations"), open.number("/report/unsent"));
        assert!((20.0..60.0).contains(&done), "{}", open.words);
        assert!((120.0..260.0).contains(&(done + unsent)), "{}", open.words);
        assert_eq!(open.number("/report/total/latency/count"), done + unsent);
        assert!(open.number("/report/total/latency/p50-ns") > 200e6, "{}", open.words);
        assert!(open.number("/report/total/latency/max-ns") > 500e6, "{}", open.words);
    }
    // With enough requests in flight the same disk keeps up.
    let deep = bench(&["-t", "1s", "-p", "100", "--rate", "200", &uri]).expect(DONE);
    assert_eq!(deep.number("/report/unsent"), 0.0);
    assert!((190.0..=200.0).contains(&deep.number("/report/total/operations")), "{}", deep.words);
}

#[test]
fn a_disk_that_forgets_is_found_out_in_the_act_and_at_the_end() {
    // It takes every write and reads zeroes.
    let peer = Peer::nbdkit(&["null", "1M"]);
    let uri = peer.uri();
    let ran = bench(&["-n", "2000", "-p", "50", "-d", "4", "--verify", &uri]).expect(DIFFERENT);
    assert!(ran.number("/report/verify/read-mismatches/count") > 100.0, "{}", ran.words);
    let at_end = "/report/verify/at-end";
    assert_eq!(ran.number(&format!("{at_end}/verified")), 0.0);
    assert!(ran.number(&format!("{at_end}/mismatches/count")) > 200.0);
    assert_eq!(ran.text(&format!("{at_end}/mismatches/first/0/found")), "zeroes");
    let output = command(&["-n", "500", "--verify", "--quiet", &uri]).output().unwrap();
    let ran = judge(&output).expect(DIFFERENT);
    assert!(ran.words.contains("At offset ") && ran.words.contains("expected write "), "{}", ran.words);
}

#[test]
fn failed_requests_are_counted_and_told() {
    let peer =
        Peer::nbdkit(&["--filter=error", "memory", "4M", "error-pwrite=ENOSPC", "error-pwrite-rate=20%"]);
    let uri = peer.uri();
    let ran = bench(&["-n", "1000", "-d", "8", "--verify", &uri]).expect(FAILED);
    let (done, failed) = (ran.number("/report/writes/operations"), ran.number("/report/writes/errors"));
    assert!(done + failed == 1000.0 && failed > 100.0, "{}", ran.words);
    assert_eq!(ran.number("/report/failures/count"), failed);
    assert!(ran.text("/report/failures/first/0").contains("No space left"), "{}", ran.words);
    assert_eq!(
        ran.number("/report/verify/at-end/mismatches/count"),
        0.0,
        "a failed write may be there or not"
    );
}

/// Writes a log, then damages the image in one way after the other.
#[test]
fn a_log_finds_whatever_was_planted_behind_the_servers_back() {
    let folder = tempfile::tempdir().unwrap();
    let image = image(folder.path(), 8 << 20);
    let log = folder.path().join("log");
    let peer = Peer::qemu_nbd(&image, &["--cache=writeback"]);
    let uri = peer.uri();
    let load = ["-n", "3000", "-d", "16", "--range", "1M+6M", "--log", text(&log)];
    let ran = bench(&[&load[..], &[&uri]].concat()).expect(DONE);
    let check = |target: &str| bench(&["--check-log", text(&log), target]);
    let good = check(&uri).expect(DONE);
    let verified = good.number("/check/verified");
    assert!(verified > 1000.0 && good.result["log-complete"] == Value::Bool(true), "{}", good.words);
    assert_eq!(good.number("/writes-acknowledged"), ran.number("/report/writes/operations"));
    drop(peer);
    let good = check(text(&image)).expect(DONE);
    assert_eq!(good.number("/check/verified"), verified, "the file as the server saw it");

    let written = AckLog::load(&log, Survival::Everything).unwrap();
    let mut blocks = written.model().written();
    let (first, second) = (blocks.next().unwrap(), blocks.next().unwrap());
    let place = |block: u64| (1 << 20) + 4096 * block;
    let file = std::fs::File::options().read(true).write(true).open(&image).unwrap();
    let read = |at: u64, bytes: usize| {
        let mut content = vec![0; bytes];
        file.read_exact_at(&mut content, at).unwrap();
        content
    };
    let original = read(place(first), 4096);
    let mut flipped = original.clone();
    flipped[1000] ^= 4;
    let mut half = original.clone();
    half[2048..].fill(0);
    let elsewhere = read(place(second), 4096);
    for (content, at, found) in [
        (flipped, 512, "damaged"),
        (half, 2048, "zeroes"),
        (elsewhere, 0, "of the run with seed"),
        (vec![b'x'; 4096], 0, "no load generator wrote"),
    ] {
        file.write_all_at(&content, place(first)).unwrap();
        let bad = check(text(&image)).expect(DIFFERENT);
        assert_eq!(bad.number("/check/mismatches/count"), 1.0);
        assert_eq!(bad.number("/check/verified"), verified - 1.0);
        assert_eq!(bad.number("/check/mismatches/first/0/offset") as u64, place(first) + at);
        assert!(bad.text("/check/mismatches/first/0/found").contains(found), "{}", bad.words);
    }
    file.write_all_at(&original, place(first)).unwrap();
    check(text(&image)).expect(DONE);
    file.set_len(2 << 20).unwrap();
    let short = check(text(&image)).expect(FAILED);
    assert!(short.text("/check/failures/first/0").contains("2097152 bytes"), "{}", short.words);
}

fn running(arguments: &[&str]) -> Child {
    let mut command = command(arguments);
    command.args(["--json", "--quiet"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().expect("the command starts")
}

fn wait_for(mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < end, "what was waited for does not happen");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn grown_beyond(path: &Path, bytes: u64) -> impl FnMut() -> bool {
    let path = path.to_owned();
    move || std::fs::metadata(&path).is_ok_and(|meta| meta.len() > bytes)
}

#[test]
fn a_server_that_dies_leaves_a_log_that_holds() {
    let folder = tempfile::tempdir().unwrap();
    let image = image(folder.path(), 8 << 20);
    let log = folder.path().join("log");
    let mut peer = Peer::qemu_nbd(&image, &["--cache=writeback"]);
    let child = running(&["-d", "16", "--until-signal", "--verify", "--log", text(&log), &peer.uri()]);
    wait_for(grown_beyond(&log, 100_000));
    peer.kill();
    let ran = judge(&child.wait_with_output().unwrap()).expect(FAILED);
    assert_eq!(ran.result["report"]["lost"], Value::Bool(true), "{}", ran.words);
    assert_eq!(ran.result["report"]["verify"]["at-end"], Value::Null, "{}", ran.words);
    // The server is gone, not the page cache: what it had acknowledged is there.
    let good = bench(&["--check-log", text(&log), text(&image)]).expect(DONE);
    assert!(good.number("/check/verified") > 500.0, "{}", good.words);
    assert_eq!(good.number("/writes-acknowledged"), ran.number("/report/writes-acknowledged"));
}

#[test]
fn a_log_cut_short_with_its_writer_still_holds() {
    let folder = tempfile::tempdir().unwrap();
    let image = image(folder.path(), 8 << 20);
    let log = folder.path().join("log");
    let peer = Peer::qemu_nbd(&image, &["--cache=writeback"]);
    let mut child = running(&["-d", "16", "--until-signal", "--log", text(&log), &peer.uri()]);
    wait_for(grown_beyond(&log, 200_000));
    child.kill().unwrap();
    child.wait().unwrap();
    let good = bench(&["--check-log", text(&log), &peer.uri()]).expect(DONE);
    assert_eq!(good.result["log-complete"], Value::Bool(false));
    assert!(good.number("/check/verified") > 1000.0, "{}", good.words);
}

#[test]
fn a_signal_ends_a_load_politely() {
    let folder = tempfile::tempdir().unwrap();
    let (log, histogram) = (folder.path().join("log"), folder.path().join("histogram"));
    let peer = Peer::nbdkit(&["memory", "8M"]);
    let files = ["--log", text(&log), "--histogram", text(&histogram)];
    let uri = peer.uri();
    let mut load = vec!["-d", "4", "-p", "50", "--rate", "3000", "--until-signal", "--verify", &uri];
    load.extend(files);
    let child = running(&load);
    wait_for(grown_beyond(&log, 60_000));
    let status = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    assert!(status.success());
    let ran = judge(&child.wait_with_output().unwrap()).expect(DONE);
    ran.check_kind("total");
    // Reads and writes have a line each; together they are what was reported.
    let saved = histograms_of(&std::fs::read(&histogram).unwrap());
    let of = |kind: &str| saved.iter().find(|(tag, _)| tag == kind).map_or(0, |(_, counts)| counts.len());
    for (kind, path) in [("read", "/report/reads/latency/count"), ("write", "/report/writes/latency/count")] {
        assert_eq!(of(kind) as f64, ran.number(path), "{kind}");
    }
    let mut all = saved[0].1.clone();
    saved[1..].iter().for_each(|(_, counts)| all.add(counts).unwrap());
    assert_eq!(all.len() as f64, ran.number("/report/total/latency/count"));
    assert_eq!(all.value_at_quantile(0.99) as f64, ran.number("/report/total/latency/p99-ns"));
    bench(&["--check-log", text(&log), &uri]).expect(DONE);
}

/// What a log of histograms holds, by tag.
fn histograms_of(log: &[u8]) -> Vec<(String, hdrhistogram::Histogram<u64>)> {
    use hdrhistogram::serialization::Deserializer;
    use hdrhistogram::serialization::interval_log::{IntervalLogIterator, LogEntry};
    let entries = IntervalLogIterator::new(log).map(|entry| entry.expect("a log"));
    let lines = entries.filter_map(|entry| match entry {
        LogEntry::Interval(line) => Some(line),
        _ => None,
    });
    lines
        .map(|line| {
            let bytes = from_base64(line.encoded_histogram());
            let tag = line.tag().expect("a kind").as_str().to_owned();
            (tag, Deserializer::new().deserialize(&mut &bytes[..]).expect("a histogram"))
        })
        .collect()
}

fn from_base64(text: &str) -> Vec<u8> {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let (mut bits, mut held, mut bytes) = (0u32, 0, Vec::new());
    for digit in text.bytes().filter(|digit| *digit != b'=') {
        let value = DIGITS.iter().position(|known| *known == digit).expect("a digit of base64");
        (bits, held) = (bits << 6 | value as u32, held + 6);
        if held >= 8 {
            held -= 8;
            bytes.push((bits >> held) as u8);
        }
    }
    bytes
}

/// Reading is what happens without a word; writes take one, whatever the disk is, and nothing is opened without it.
#[test]
fn a_log_by_which_a_disk_may_have_to_be_judged_is_left_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let log = folder.path().join("acks.json");
    let load = ["-n", "10", "--log", text(&log), "mem:1M"];
    bench(&load).expect(0);
    let kept = std::fs::read(&log).expect("a log");
    let again = bench(&load).expect(1);
    assert!(again.words.contains("is there already"), "{}", again.words);
    assert!(std::fs::read(&log).expect("a log") == kept);
    let again = bench(&["-n", "10", "--histogram", text(&log), "mem:1M"]).expect(1);
    assert!(again.words.contains("is there already"), "{}", again.words);
    assert!(std::fs::read(&log).expect("a log") == kept);
}

/// A disk that answers at once does not keep the load from being ended.
#[test]
fn a_load_on_memory_hears_a_signal() {
    let folder = tempfile::tempdir().expect("a folder");
    let log = folder.path().join("log");
    let child = running(&["--until-signal", "--log", text(&log), "mem:1M"]);
    wait_for(grown_beyond(&log, 60_000));
    let status = Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill runs");
    assert!(status.success());
    judge(&child.wait_with_output().expect("it ends")).expect(DONE);
}

#[test]
fn what_is_on_a_disk_is_only_lost_if_that_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let path = image(folder.path(), 1 << 20);
    std::fs::write(&path, vec![7; 1 << 20]).unwrap();
    let peer =
        Peer::nbdkit(&["--filter=log", "memory", "1M", &format!("logfile={}/calls", text(folder.path()))]);
    let (uri, raw) = (peer.uri(), text(&path));
    for target in [raw, &uri, &format!("delay:1ms:{raw}")] {
        for load in
            [&["-p", "0"][..], &["-p", "99"], &["--verify"], &["--log", "l"], &["-p", "0", "--dry-run"]]
        {
            let ran =
                judge(&careful(&[load, &["-n", "1", target]].concat()).output().unwrap()).expect(FAILED);
            assert!(ran.words.contains("--overwrite"), "{load:?} {target}: {}", ran.words);
        }
    }
    let calls = folder.path().join("calls");
    assert!(
        !std::fs::read_to_string(&calls).unwrap_or_default().contains("Write"),
        "the server was written to"
    );
    for target in [raw, &uri] {
        let ran = judge(&careful(&["-n", "50", "--json", "-q", target]).output().unwrap()).expect(DONE);
        assert_eq!(ran.number("/report/writes/operations"), 0.0);
        assert_eq!(ran.number("/report/reads/operations"), 50.0);
    }
    assert!(std::fs::read(&path).unwrap() == vec![7; 1 << 20]);
    // Memory that comes and goes with the load has nothing to lose.
    judge(&careful(&["-n", "50", "-p", "50", "--verify", "mem:1MiB"]).output().unwrap()).expect(DONE);
    // An image is taken for what its header says.
    let qcow2 = folder.path().join("image.qcow2");
    let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", text(&qcow2), "4M"]).status();
    assert!(made.unwrap().success());
    bench(&["-n", "200", "--verify", text(&qcow2)]).expect(DONE);
    let check = Command::new("qemu-img").args(["check", "-q", "-f", "qcow2", text(&qcow2)]).status();
    assert!(check.unwrap().success());
}

/// A seed that a reader of JSON gives back rounded is another load.
#[test]
fn seeds_survive_readers_whose_numbers_are_doubles() {
    let seed = |more: &[&str]| {
        let ran =
            judge(&careful(&[more, &["-n", "1", "--json", "-q", "mem:1MiB"]].concat()).output().unwrap());
        ran.expect(DONE).result["report"]["seed"].clone()
    };
    assert!(seed(&[]).as_u64().unwrap() <= 1 << 53);
    assert_eq!(seed(&["--seed", "7"]), 7);
    assert_eq!(seed(&["--seed", "18446744073709551615"]), "18446744073709551615");
}

#[test]
fn a_file_is_a_disk_too_and_the_engine_is_a_library() {
    let folder = tempfile::tempdir().unwrap();
    let image = image(folder.path(), 4 << 20);
    let ran = bench(&["-n", "500", "-d", "8", "--verify", "-b", "16K", text(&image)]).expect(DONE);
    assert!(ran.number("/report/verify/at-end/verified") > 100.0);
    let load = LoadConfig {
        access: Access::Sequential,
        pace: Pace::Closed { depth: 4 },
        operations: Some(1024),
        verify: true,
        ..LoadConfig::default()
    };
    let report = run(&load, text(&image), &TargetOptions::default()).unwrap();
    assert!(report.is_good());
    assert_eq!(report.verify.unwrap().verified(), 1024);
}

#[test]
fn what_makes_no_sense_is_refused_with_a_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let image = image(folder.path(), 1 << 20);
    let peer = Peer::nbdkit(&["--readonly", "memory", "1M"]);
    let alone = Peer::nbdkit(&["--filter=multi-conn", "memory", "1M", "multi-conn-mode=disable"]);
    for (arguments, code, words) in [
        (vec!["-n", "1", &peer.uri()], FAILED, "lets nobody write"),
        (vec!["-n", "1", "--range", "1M+4K", text(&image)], 2, "does not lie on"),
        (vec!["-n", "1", "-c", "2", "--verify", &alone.uri()], FAILED, "multi-conn"),
        (vec!["-n", "1", "-c", "2", text(&image)], FAILED, "one connection"),
        (vec!["-n", "1", "nbd:nonsense"], FAILED, "port"),
        (vec!["-n", "1", "nbd+unix:///?socket=/nowhere/at/all"], FAILED, "No such file"),
        (vec!["--check-log", text(&image), text(&image)], FAILED, "Line 1"),
        (vec!["-d", "0", text(&image)], 2, "from 1 to 1024"),
    ] {
        let ran = judge(&command(&arguments).arg("--quiet").output().unwrap()).expect(code);
        assert!(ran.words.contains(words), "{arguments:?}: {}", ran.words);
    }
    bench(&["-n", "100", "-p", "100", &peer.uri()]).expect(DONE);
    bench(&["-n", "100", "-c", "2", &alone.uri()]).expect(DONE);
    // No log is left of a load that did not begin.
    let log = folder.path().join("log");
    for (arguments, code) in [
        (vec!["--range", "1M+4K", text(&image)], 2),
        (vec!["nbd+unix:///?socket=/nowhere/at/all"], FAILED),
        (vec!["--range", "0+1K", text(&image)], 2),
    ] {
        bench(&[&["-n", "1", "--log", text(&log)][..], &arguments].concat()).expect(code);
        assert!(!log.exists(), "{arguments:?}");
    }
}

/// What is a hole is not read from a disk: a figure of it is none of the disk, and that is said.
#[test]
fn holes_are_told_of() {
    let folder = tempfile::tempdir().unwrap();
    let image = image(folder.path(), 8 << 20);
    let reads = |more: &[&str]| {
        let words = [&["-n", "50", "-f", "raw"][..], more, &[text(&image)]].concat();
        let told = String::from_utf8(careful(&words).output().unwrap().stdout).unwrap();
        let ran = judge(&careful(&words).args(["--json", "-q"]).output().unwrap()).expect(DONE);
        (
            ran.result["report"]["holes-percent"].clone(),
            told.lines().find(|line| line.contains("holes")).map(str::to_owned),
        )
    };
    let (percent, told) = reads(&[]);
    assert_eq!(
        (percent.as_u64(), told.is_some_and(|line| line.starts_with("all of it is holes"))),
        (Some(100), true)
    );
    std::fs::OpenOptions::new()
        .write(true)
        .open(&image)
        .unwrap()
        .write_all_at(&vec![7; 2 << 20], 1 << 20)
        .unwrap();
    let (percent, told) = reads(&[]);
    assert_eq!(
        (percent.as_u64(), told.is_some_and(|line| line.starts_with("75 % of it are holes"))),
        (Some(75), true)
    );
    let (percent, told) = reads(&["--range", "1M+2M"]);
    assert_eq!((percent.as_u64(), told), (Some(0), None));
    // Memory is no disk, and a load that only writes reads nothing.
    for words in [&["-n", "50", "-p", "100", "mem:1M"][..], &["-n", "1", text(&image)]] {
        assert!(bench(words).expect(DONE).result["report"]["holes-percent"].is_null(), "{words:?}");
    }
}

/// The same load by fio's NBD engine. Machines differ, so nothing is asserted about speed; both numbers are printed, to
/// be looked at (`--nocapture`).
#[test]
fn fio_tells_the_same_story() {
    let peer = Peer::nbdkit(&["memory", "64M"]);
    let uri = peer.uri();
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("output");
    let status = Command::new("fio")
        .args(["--name=same", "--ioengine=nbd", "--rw=randread", "--bs=4k", "--iodepth=16", "--norandommap"])
        .args(["--size=64m", &format!("--uri={uri}")])
        .args(["--output-format=json", &format!("--output={}", text(&output))])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .expect("fio runs");
    assert!(status.success());
    let fio: Value = serde_json::from_slice(&std::fs::read(&output).unwrap()).unwrap();
    let theirs = |path: &str| fio.pointer(path).and_then(Value::as_f64).expect("a number of fio's");
    let ran = bench(&["-n", "20000", "-d", "16", "-p", "100", &uri]).expect(DONE);
    ran.check_kind("total");
    assert_eq!(ran.number("/report/total/operations"), 20_000.0);
    println!(
        "fio:        {:>8.0} IOPS, mean {:>7.0} ns, p50 {:>7.0} ns, p99 {:>8.0} ns",
        theirs("/jobs/0/read/iops"),
        theirs("/jobs/0/read/clat_ns/mean"),
        theirs("/jobs/0/read/clat_ns/percentile/50.000000"),
        theirs("/jobs/0/read/clat_ns/percentile/99.000000"),
    );
    println!(
        "blockferry: {:>8.0} IOPS, mean {:>7.0} ns, p50 {:>7.0} ns, p99 {:>8.0} ns",
        ran.number("/report/total/iops"),
        ran.number("/report/total/latency/mean-ns"),
        ran.number("/report/total/latency/p50-ns"),
        ran.number("/report/total/latency/p99-ns"),
    );
    // Little's law ties both together whatever the machine: requests in flight = rate x latency.
    for (iops, mean_ns) in [
        (theirs("/jobs/0/read/iops"), theirs("/jobs/0/read/lat_ns/mean")),
        (ran.number("/report/total/iops"), ran.number("/report/total/latency/mean-ns")),
    ] {
        let in_flight = iops * mean_ns / 1e9;
        assert!((10.0..17.0).contains(&in_flight), "{in_flight} in flight on average, not 16");
    }
}
