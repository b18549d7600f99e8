//! Commands that write to a server which goes down with what it has not flushed, and comes back: what they end with is true,
//! also where nothing of clients' changes is kept. And the options that say how a server is asked.

use super::faulty::{FLAGS, Faults, Faulty, READ_ONLY};
use common::image::{KIB, MIB, Scratch, content};
use common::{Ended, run, run_json, tool};

const LEN: u64 = 4 * MIB;
/// In requests of 64 KiB a copy takes that many writes.
const WRITES: u64 = LEN / (64 * KIB);

/// An overlay of the server's disk with the bytes of `source`, and a layer with nothing above it.
fn chain(scratch: &Scratch, source: &str, uri: &str) -> (String, String) {
    let (middle, top) = (scratch.path("middle.qcow2"), scratch.path("top.qcow2"));
    tool("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", source, &middle]);
    tool("qemu-img", &["rebase", "-u", "-f", "qcow2", "-b", uri, "-F", "raw", &middle]);
    tool("qemu-img", &["create", "-q", "-u", "-f", "qcow2", "-b", &middle, "-F", "qcow2", &top, "4M"]);
    (middle, top)
}

/// One copy of `source` to the server, by each of the commands.
fn copy(scratch: &Scratch, way: &str, source: &str, uri: &str) -> Ended {
    let (notes, socket) = (scratch.path("notes"), scratch.path("socket"));
    let export = format!("nbd+unix:///disk?socket={socket}");
    let always = ["--json", "--unflushed", "0", "--max-request", "64KiB"];
    let mirror = ["--force", "-f", "raw", "-F", "raw", "--state-dir", &notes, source, uri];
    let pivot = ["--pivot", "--no-persistent", "--export", &export];
    let arguments = match way {
        "convert" => ["convert", "-n", "-f", "raw", "--state-dir", &notes, source, uri].to_vec(),
        "mirror" => [&["mirror"], &mirror[..]].concat(),
        "pivot" => [&["mirror"], &pivot[..], &mirror].concat(),
        _ => {
            let (middle, top) = chain(scratch, source, uri);
            let what: &[&str] =
                if way == "commit" { &[&middle] } else { &[&top, "--top", "middle.qcow2", "-b", uri] };
            return run(&[&["commit", "--allow-servers"], &always[1..], what].concat());
        }
    };
    run(&[&always[..1], &arguments[..1], &always[1..], &arguments[1..]].concat())
}

#[test]
fn a_copy_is_complete_though_its_server_has_lost_its_cache() {
    for way in ["convert", "mirror", "pivot", "commit", "commit between"] {
        let scratch = Scratch::new();
        let source = scratch.full("source", LEN);
        // In the middle, at what is written again after that, and with the last.
        let faults = Faults { lapses: vec![WRITES / 2, WRITES + WRITES / 2 - 2], ..Faults::default() };
        let server = Faulty::new(vec![0; LEN as usize], faults);
        let ended = copy(&scratch, way, &source, &server.uri());
        assert_eq!(ended.code, Some(0), "{way}: {ended}");
        assert_eq!(ended.err.matches("that is written again").count(), 2, "{way}: {ended}");
        assert!(server.durable() == content(&source), "{way}: what has lasted differs: {ended}");
        assert!(server.asked().0 <= 64 << 10, "{way}: {:?}", server.asked());
    }
}

#[test]
fn a_copy_to_what_has_become_another_disk_fails_and_says_so() {
    for (way, then) in
        [("convert", (LEN + MIB, FLAGS)), ("mirror", (LEN, FLAGS | READ_ONLY)), ("commit", (MIB, FLAGS))]
    {
        let scratch = Scratch::new();
        let source = scratch.full("source", LEN);
        let faults = Faults { lapses: vec![WRITES / 2], then: Some(then), ..Faults::default() };
        let server = Faulty::new(vec![0; LEN as usize], faults);
        let ended = copy(&scratch, way, &source, &server.uri());
        assert_eq!(ended.code, Some(1), "{way}: {ended}");
        assert!(
            ended.err.contains("not the export that it was") && !ended.err.contains("Completed"),
            "{way}: {ended}"
        );
    }
}

#[test]
fn a_server_is_not_asked_for_holes_where_that_is_said() {
    let scratch = Scratch::new();
    for (options, asks) in [(&[][..], true), (&["--no-block-status"], false)] {
        let server = Faulty::new(vec![7; MIB as usize], Faults::default());
        let (uri, target) = (server.uri(), scratch.path(&format!("target-{asks}")));
        run_json(&[&["convert", "-f", "raw", "--max-request", "32KiB"], options, &[&uri, &target]].concat());
        let (longest, asked) = server.asked();
        assert!(longest <= 32 << 10 && (asked > 0) == asks, "{options:?}: {longest} {asked}");
        assert!(content(&target) == server.disk());
    }
}

#[test]
fn no_message_shows_a_password() {
    let scratch = Scratch::new();
    let (source, image) = (scratch.full("source", MIB), scratch.path("image"));
    // A port on which nobody listens, and the other forms of a name.
    let name = "nbd://user:sesame@127.0.0.1:1/disk";
    let json = r#"json:{"driver":"nbd","host":"127.0.0.1","port":"1","password":"sesame"}"#;
    tool("qemu-img", &["create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "raw", &image, "1M"]);
    let commands: [&[&str]; 7] = [
        &["info", name],
        &["info", json],
        &["info", &image],
        &["map", "--allow-servers", &image],
        &["convert", "-n", "-f", "raw", &source, name],
        &["mirror", "--force", "-f", "raw", "-F", "raw", &source, name],
        &["serve", "-f", "raw", "--export", "nbd+unix:///?socket=x", name],
    ];
    for arguments in commands {
        for more in [&[][..], &["--json"]] {
            let ended = run(&[more, arguments].concat());
            let text = format!("{}{}", ended.out, ended.err);
            assert!(!text.contains("sesame"), "{arguments:?}: {ended}");
            assert!(text.contains("***"), "{arguments:?} says nothing of it: {ended}");
        }
    }
}
