//! `blockferry commit` and `blockferry stream` as scripts see them: what QEMU finds afterwards, at rest and under
//! clients; what is refused, and that nothing is touched then; what an interrupted one leaves.

use std::path::PathBuf;
use std::process::Command;

use common::chain::{Chain, LEN};
use common::image::{MIB, Scratch, allocated, content};
use common::writer::{Plan, Writer};
use common::{Ended, Process, event, run, run_json, stats, tool, wait_unlocked};
use serde_json::Value;

const PLAIN: [&str; 4] = ["", "", "", ""];
const MIXED: [&str; 4] = [
    "cluster_size=4k",
    "compat=0.10,cluster_size=64k",
    "cluster_size=512k,extended_l2=on",
    "cluster_size=16k",
];

/// The content of every file of a chain.
fn files(chain: &Chain) -> Vec<Vec<u8>> {
    (0..chain.names.len()).map(|layer| content(&chain.path(layer))).collect()
}

/// The names of the chain that the command's last words tell.
fn told_chain(events: &[Value]) -> Vec<String> {
    let chain = event(events, "end")["chain"].as_array().expect("a list");
    let name = |value: &Value| {
        value.as_str().and_then(|path| path.rsplit('/').next()).unwrap_or_default().to_owned()
    };
    chain.iter().map(name).collect()
}

/// The URI of an export in the chain's folder, and its socket.
fn export(chain: &Chain) -> (String, PathBuf) {
    let socket = chain.scratch.dir().join("socket");
    (format!("nbd+unix:///disk?socket={}", socket.display()), socket)
}

/// A process that serves a chain while it changes it, and a client that writes, checking what it reads, before and after.
/// A job that follows is told to end. What the disk then holds, and the command's last words.
fn under_a_writer(chain: &Chain, arguments: &[&str]) -> (Vec<u8>, Value) {
    let (uri, socket) = export(chain);
    let mut job = Process::json(&[arguments, &["--export", &uri, "--speed", "8MiB"]].concat());
    job.wait_event("listening");
    let writer = Writer::start(&Plan::anywhere(&socket, LEN, 3), false);
    if arguments.contains(&"--follow") {
        job.wait_event("BLOCK_JOB_READY");
        writer.wait_more(100);
        job.interrupt();
    }
    let end = job.wait_event("end");
    assert_eq!(end["ending"], "completed");
    writer.wait_more(100);
    let history = writer.stop();
    let ended = job.end();
    assert_eq!(ended.code, Some(0), "{ended}");
    assert!(!socket.exists(), "the socket is left behind");
    let mut model = chain.model.clone();
    history.apply(&mut model);
    (model, end)
}

/// Two files of a chain may have the same name, in different folders: what is written to the wrong one is lost.
#[test]
fn a_layer_is_found_by_every_name_that_leads_to_it_alone() {
    let scratch = Scratch::new();
    for folder in ["a", "b"] {
        std::fs::create_dir(scratch.dir().join(folder)).unwrap();
    }
    std::os::unix::fs::symlink("b", scratch.path("link")).unwrap();
    let lowest = scratch.path("b/x.qcow2");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", &lowest, "1M"]);
    for (image, below) in
        [("b/y.qcow2", "x.qcow2"), ("a/x.qcow2", "../b/y.qcow2"), ("a/top.qcow2", "x.qcow2")]
    {
        tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", &scratch.path(image)]);
        tool("qemu-io", &["-f", "qcow2", "-c", "write -P 3 64k 64k", &scratch.path(image)]);
    }
    let top = scratch.path("a/top.qcow2");
    let commit = |base: &str| {
        let mut command = common::blockferry(&["commit", "--allow-any-file", "--dry-run", "-b", base, &top]);
        command.current_dir(scratch.dir());
        Process::spawn(command).end()
    };
    for (base, meant) in [
        ("../b/y.qcow2", "b/y.qcow2"),
        ("y.qcow2", "b/y.qcow2"),
        ("b/x.qcow2", "b/x.qcow2"),
        ("a/x.qcow2", "a/x.qcow2"),
        ("link/x.qcow2", "b/x.qcow2"),
        (&lowest, "b/x.qcow2"),
    ] {
        let ended = commit(base);
        assert_eq!(ended.code, Some(0), "{base}: {ended}");
        let line = ended.out.lines().find(|line| line.contains("(base,")).unwrap_or_default();
        assert!(line.contains(meant), "{base}: {ended}");
    }
    for (base, code, said) in [("x.qcow2", 2, "two layers"), ("z.qcow2", 1, "not in this backing file chain")]
    {
        let ended = commit(base);
        assert_eq!(ended.code, Some(code), "{base}: {ended}");
        assert!(ended.err.contains(said), "{base}: {ended}");
    }
}

#[test]
fn a_commit_at_rest_does_what_qemu_img_does() {
    for (seed, layers) in [(1, PLAIN), (2, MIXED)] {
        let (ours, theirs) = (Chain::new(seed, &layers), Chain::new(seed, &layers));
        let overlay = content(&ours.top());
        let ended = run(&["commit", "-d", &ours.top()]);
        assert_eq!(ended.code, Some(0), "{ended}");
        assert!(ended.err.contains("Completed") && ended.err.contains("'l2.qcow2' (qcow2, "), "{ended}");
        tool("qemu-img", &["commit", "-q", "-d", &theirs.top()]);
        // The file of the overlay is left alone, and the chain shows what it showed; its base shows it, too.
        assert!(content(&ours.top()) == overlay);
        ours.check(&ours.top(), &ours.model, &[3, 4]);
        ours.check(&ours.path(3), &ours.model, &[]);
        tool("qemu-img", &["compare", "-q", &ours.path(3), &theirs.path(3)]);
        // Without a word it is emptied, since its backing file has everything.
        let holds = || {
            let map: Value = serde_json::from_str(&tool("qemu-img", &["map", "--output=json", &ours.top()]))
                .expect("JSON");
            map.as_array()
                .expect("extents")
                .iter()
                .any(|extent| extent["depth"] == 0 && extent["present"] == true)
        };
        assert!(holds());
        let before = allocated(&ours.top());
        run_json(&["commit", &ours.top()]);
        assert!(!holds());
        // Its room is given back: what is left are tables.
        let after = allocated(&ours.top());
        assert!(after < before / 2 && after <= MIB / 2, "{before} and {after}");
        ours.check(&ours.top(), &ours.model, &[3, 4]);
        tool("qemu-img", &["check", "-q", &ours.top()]);
        // All the rest, down to the raw base.
        let events = run_json(&["commit", &ours.top(), "-b", "base.raw"]);
        assert_eq!(event(&events, "end")["pivot"], false);
        ours.check(&ours.path(0), &ours.model, &[]);
    }
}

/// Nothing crashed, and the program ended by itself: nobody is to take what is left for the trace of a crash.
#[test]
fn a_commit_or_stream_that_is_given_up_leaves_images_that_check_clean() {
    let options = ["cluster_size=4k", "", "cluster_size=16k", ""];
    for arguments in
        [&["commit", "-b", "l1.qcow2"][..], &["commit", "-b", "l1.qcow2", "--top", "l3.qcow2"], &["stream"]]
    {
        let chain = Chain::new(6, &options);
        let top = chain.top();
        let mut job = Process::json(&[arguments, &["--speed", "1MiB", &top]].concat());
        job.wait_for(|event| event["bytes-copied"].as_u64() > Some(0));
        job.interrupt();
        let ended = job.end();
        assert_eq!(ended.code, Some(3), "{ended}");
        for layer in 1..=4 {
            tool("qemu-img", &["check", "-q", "-f", "qcow2", &chain.path(layer)]);
        }
        chain.check(&top, &chain.model, &[]);
    }
}

#[test]
fn a_base_that_is_too_short_grows() {
    let scratch = Scratch::new();
    for (name, format) in [("base.qcow2", "qcow2"), ("base.raw", "raw")] {
        for (top, options) in [("top", &[][..]), ("again", &["--top", "mid.qcow2"])] {
            let (base, top) = (scratch.path(name), scratch.path(&format!("{top}.qcow2")));
            tool("qemu-img", &["create", "-q", "-f", format, &base, "1M"]);
            tool("qemu-io", &["-f", format, "-c", "write -P 1 0 1M", &base]);
            let mid = scratch.path("mid.qcow2");
            tool("qemu-img", &["create", "-q", "-f", "qcow2", "-F", format, "-b", &base, &mid, "3M"]);
            tool("qemu-io", &["-f", "qcow2", "-c", "write -P 2 2M 64k", &mid]);
            tool("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &mid, &top, "3M"]);
            tool("qemu-io", &["-f", "qcow2", "-c", "write -P 3 0 64k", &top]);
            let wanted = scratch.path("wanted.raw");
            let of_what = if options.is_empty() { &top } else { &mid };
            tool("qemu-img", &["convert", "-O", "raw", of_what, &wanted]);
            let ended = run(&[&["commit", "-b", &base, &top], options].concat());
            assert_eq!(ended.code, Some(0), "{ended}");
            tool("qemu-img", &["compare", "-q", "-F", "raw", "-f", format, &base, &wanted]);
            let text = tool("qemu-img", &["info", "--output=json", "-f", format, &base]);
            let info: Value = serde_json::from_str(&text).expect("JSON");
            assert_eq!(info["virtual-size"], 3 * MIB);
        }
    }
}

#[test]
fn layers_between_are_dropped() {
    for (seed, layers) in [(3, PLAIN), (4, MIXED)] {
        let chain = Chain::new(seed, &layers);
        let events = run_json(&["--stats", "commit", &chain.top(), "--top", "l2.qcow2", "-b", "l0.qcow2"]);
        assert_eq!(told_chain(&events), ["l3.qcow2", "l0.qcow2", "base.raw"]);
        assert!(stats(&events)["operations"].as_u64() > Some(0));
        let end = event(&events, "end");
        assert_eq!((&end["ending"], &end["pivot"]), (&"completed".into(), &false.into()));
        assert_eq!(event(&events, "BLOCK_JOB_COMPLETED")["data"]["type"], "commit");
        assert_eq!(chain.chain_of(&chain.top()), ["l0.qcow2", "base.raw"]);
        chain.check(&chain.top(), &chain.model, &[1, 4]);
        // A name of one's own.
        let name = format!("{}/./base.raw", chain.scratch.dir().display());
        run_json(&[
            "commit",
            &chain.top(),
            "--top",
            &chain.path(1),
            "-b",
            "base.raw",
            "--backing-file",
            &name,
        ]);
        let text = tool("qemu-img", &["info", "--output=json", &chain.top()]);
        let info: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(
            (&info["backing-filename"], &info["backing-filename-format"]),
            (&name.into(), &"raw".into())
        );
        chain.check(&chain.top(), &chain.model, &[4]);
    }
}

#[test]
fn streams_at_rest() {
    type Case = (&'static [&'static str], &'static [&'static str], &'static [usize], &'static str);
    let cases: [Case; 5] = [
        (&[], &[], &[4], ") needs no backing file any more"),
        (&["-b", "l0.qcow2"], &["l0.qcow2", "base.raw"], &[1, 4], ") has 'l0.qcow2' as its backing file now"),
        (
            &["--bottom", "l1.qcow2"],
            &["l0.qcow2", "base.raw"],
            &[1, 4],
            ") has 'l0.qcow2' as its backing file now",
        ),
        (
            &["--top", "l2.qcow2", "-b", "base.raw"],
            &["l2.qcow2", "base.raw"],
            &[3, 4],
            "'l2.qcow2' (qcow2, 8 MiB) has 'base.raw' as its backing file now",
        ),
        (
            &["--top", "l2.qcow2"],
            &["l2.qcow2"],
            &[3, 4],
            "'l2.qcow2' (qcow2, 8 MiB) needs no backing file any more",
        ),
    ];
    for (options, left, sound, said) in cases {
        for layers in [PLAIN, MIXED] {
            let chain = Chain::new(5, &layers);
            let below: Vec<_> = files(&chain).into_iter().take(3).collect();
            let ended = run(&[&["stream", &chain.top()], options].concat());
            assert_eq!(ended.code, Some(0), "{ended}");
            assert!(ended.err.contains(said), "{ended}");
            assert_eq!(chain.chain_of(&chain.top()), left, "{options:?}");
            chain.check(&chain.top(), &chain.model, sound);
            assert!(files(&chain)[..below.len().min(3)] == below[..], "files below were touched");
        }
    }
}

/// What makes no sense is refused, with a text, and no file has changed.
#[test]
fn bad_input_touches_nothing() {
    let chain = Chain::new(6, &PLAIN);
    let before = files(&chain);
    let (top, raw, nothing) = (chain.top(), chain.path(0), chain.scratch.path("nothing"));
    let no_chain = "There is no backing file below";
    let refused: [(&[&str], &str); 16] = [
        (&["commit", &top, "-b", "l9.qcow2"], "'l9.qcow2' is not in this backing file chain"),
        (&["commit", &top, "--top", "l9.qcow2"], "'l9.qcow2' is not in this backing file chain"),
        (&["commit", &top, "--top", "l1.qcow2", "-b", "l1.qcow2"], "top and base are the same"),
        (&["commit", &top, "--top", "l1.qcow2", "-b", "l2.qcow2"], "is not in the backing file chain of"),
        (&["commit", &top, "-b", &top], "top and base are the same"),
        (&["commit", &top, "--top", "base.raw"], no_chain),
        (&["commit", &top, "--backing-file", "x"], "'backing-file' specified, but 'top' is the active layer"),
        (&["commit", &raw], "is a raw image, which has no backing file"),
        (&["commit", "-f", "raw", &raw], no_chain),
        (&["commit", &nothing], "No such file"),
        (&["commit", &top, "--buf-size", "9223372036854775808"], "--buf-size is too large"),
        (&["stream", &top, "-b", "l9.qcow2"], "'l9.qcow2' is not in this backing file chain"),
        (&["stream", &top, "-b", &top], "is not in the backing file chain of"),
        (
            &["stream", &top, "--top", "l1.qcow2", "--bottom", "l2.qcow2"],
            "is not in the backing file chain of",
        ),
        (&["stream", &top, "--backing-file", "x"], "backing file specified, but streaming the entire chain"),
        (&["stream", "-f", "raw", &raw], "is no layer"),
    ];
    for (arguments, text) in refused {
        let ended = run(arguments);
        // What makes no sense whatever the images are is a mistake of the command line.
        let code = if text.contains("too large") { 2 } else { 1 };
        assert_eq!(ended.code, Some(code), "{arguments:?}: {ended}");
        assert!(ended.err.contains(text), "no `{text}` in: {ended}");
        let events = run(&[&["--json"], arguments].concat()).events();
        assert!(event(&events, "error")["message"].as_str().is_some_and(|message| message.contains(text)));
    }
    let senseless: [&[&str]; 7] = [
        &["commit"],
        &["commit", &top, "--pivot"],
        &["commit", &top, "--follow", "--top", "l1.qcow2"],
        &["commit", &top, "--speed", "fast"],
        &["commit", &top, "--exit-on-done"],
        &["stream", &top, "-b", "l0.qcow2", "--bottom", "l1.qcow2"],
        &["stream", &top, "--pivot"],
    ];
    for arguments in senseless {
        let ended = run(arguments);
        assert_eq!(ended.code, Some(2), "{arguments:?}: {ended}");
    }
    assert!(files(&chain) == before, "a file has changed");
}

/// A disk that somebody else uses is left alone.
#[test]
fn a_disk_in_use_is_left_alone() {
    let chain = Chain::new(7, &PLAIN);
    let (uri, _) = export(&chain);
    let mut server = Process::json(&["serve", &chain.top(), "--export", &uri]);
    server.wait_event("listening");
    let before = files(&chain);
    for arguments in [
        &["commit", &chain.top()][..],
        &["commit", &chain.top(), "--top", "l2.qcow2"],
        &["stream", &chain.top()],
        // A layer of a chain that somebody uses.
        &["commit", &chain.path(2)],
        &["stream", &chain.path(2)],
    ] {
        let ended = run(arguments);
        assert_eq!(ended.code, Some(1), "{arguments:?}: {ended}");
        assert!(ended.err.contains("lock"), "{arguments:?}: {ended}");
    }
    assert!(files(&chain) == before, "a file has changed");
    server.interrupt();
    assert_eq!(server.end().code, Some(0));
}

const ORDERS: [&[&str]; 4] = [
    &["commit", "-b", "base.raw"],
    &["commit", "--top", "l2.qcow2", "-b", "l0.qcow2"],
    &["stream"],
    &["stream", "--top", "l2.qcow2", "-b", "base.raw"],
];

/// Ctrl-C gives a job up: the chain is as it was, and the job can be run again.
#[test]
fn an_interrupted_job_leaves_the_chain_as_it_was() {
    for order in ORDERS {
        let chain = Chain::new(8, &MIXED);
        let was = chain.chain_of(&chain.top());
        let top = chain.top();
        let arguments = [order, &[&top]].concat();
        let mut job = Process::json(&[&arguments[..], &["--speed", "64KiB"]].concat());
        let progress = job.wait_event("progress");
        assert_eq!(progress["status"], "running");
        assert!(progress["len"].as_u64() > progress["offset"].as_u64(), "{progress}");
        job.interrupt();
        let end = job.wait_event("end");
        assert_eq!(end["ending"], "cancelled");
        let ended = job.end();
        assert_eq!(ended.code, Some(3), "{ended}");
        assert_eq!(chain.chain_of(&chain.top()), was, "{order:?}");
        chain.check(&chain.top(), &chain.model, &[1, 2, 3, 4]);
        let Ended { code, err, .. } = run(&arguments);
        assert_eq!(code, Some(0), "{err}");
        chain.check(&chain.top(), &chain.model, &[4]);
    }
}

/// A process that is killed leaves a chain that opens, with leaks at worst; the job can be run again.
#[test]
fn a_killed_job_leaves_a_chain_that_opens() {
    for order in ORDERS {
        let chain = Chain::new(12, &MIXED);
        let was = chain.chain_of(&chain.top());
        let top = chain.top();
        let arguments = [order, &[&top]].concat();
        let mut job = Process::json(&[&arguments[..], &["--speed", "1MiB"]].concat());
        job.wait_for(|event| event["bytes-copied"].as_u64() > Some(0));
        job.kill();
        (0..=4).for_each(|layer| wait_unlocked(&chain.path(layer)));
        assert_eq!(chain.chain_of(&chain.top()), was, "{order:?}");
        chain.check(&chain.top(), &chain.model, &[]);
        for layer in 1..=4 {
            let mut check = Command::new("qemu-img");
            check.args(["check", "-q", "-f", "qcow2", "-r", "leaks", &chain.path(layer)]);
            let ended = Process::spawn(check).end();
            assert_eq!(ended.code, Some(0), "{order:?}: layer {layer}: {ended}");
        }
        let ended = run(&arguments);
        assert_eq!(ended.code, Some(0), "{ended}");
        chain.check(&chain.top(), &chain.model, &[4]);
    }
}

#[test]
fn clients_go_on_on_the_base() {
    let chain = Chain::new(9, &PLAIN);
    let (model, end) =
        under_a_writer(&chain, &["commit", &chain.top(), "-b", "base.raw", "--pivot", "--no-persistent"]);
    assert_eq!(end["pivot"], true);
    assert_eq!(told_chain(&[end]), ["base.raw"]);
    chain.check(&chain.path(0), &model, &[]);
}

#[test]
fn a_base_is_kept_in_step_until_told_to_end() {
    let chain = Chain::new(10, &PLAIN);
    let (model, end) = under_a_writer(&chain, &["commit", &chain.top(), "-b", "l1.qcow2", "--follow"]);
    assert_eq!(end["pivot"], false);
    assert_eq!(chain.chain_of(&chain.top()).len(), 4);
    chain.check(&chain.top(), &model, &[1, 2, 3, 4]);
}

#[test]
fn layers_are_dropped_under_clients() {
    let orders: [(&[&str], &[&str], &[usize]); 3] = [
        (&["commit", "--top", "l2.qcow2", "-b", "l0.qcow2"], &["l0.qcow2", "base.raw"], &[1, 4]),
        (&["stream", "-b", "l0.qcow2"], &["l0.qcow2", "base.raw"], &[1, 4]),
        (&["stream"], &[], &[4]),
    ];
    for (order, left, sound) in orders {
        let chain = Chain::new(11, &MIXED);
        let (model, _) = under_a_writer(&chain, &[order, &[&chain.top()]].concat());
        assert_eq!(chain.chain_of(&chain.top()), left, "{order:?}");
        chain.check(&chain.top(), &model, sound);
    }
}
