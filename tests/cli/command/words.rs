//! What the command says: names as they were given, escapes shown, cures that work, and one object for programs at the end of
//! everything.

use common::image::{MIB, Scratch, content};
use common::{Ended, Process, run, tool};

#[track_caller]
fn says(ended: &Ended, code: i32, texts: &[&str]) {
    assert_eq!(ended.code, Some(code), "{ended}");
    for text in texts {
        assert!(ended.err.contains(text) || ended.out.contains(text), "no `{text}` in: {ended}");
    }
}

/// A name that would colour what follows and forge a line.
const EVIL: &str = "x\u{1b}[31mred\nblockferry: all is well\u{9b}";

#[test]
fn control_characters_from_anywhere_are_shown() {
    let scratch = Scratch::new();
    let (image, over) = (scratch.path("a.qcow2"), scratch.path("b.qcow2"));
    tool("qemu-img", &["create", "-q", "-f", "qcow2", &image, "1M"]);
    tool("qemu-img", &["snapshot", "-c", EVIL, &image]);
    tool("qemu-img", &["create", "-q", "-u", "-f", "qcow2", "-b", EVIL, "-F", "raw", &over, "1M"]);
    let evil = scratch.path(EVIL);
    std::fs::copy(&image, &evil).unwrap();
    for words in [
        &["snapshot", "-l", &image][..],
        &["info", &image],
        &["info", &over],
        &["map", &over],
        &["info", &evil],
        &["map", &evil],
        &["check", &evil],
        &["mirror", &evil, &evil],
        &["mirror", "--dry-run", &evil, &scratch.path("new")],
        &["info", &format!("{evil}/none")],
        &["mirror", "--speed", EVIL, &image, &evil],
        &["create", "-o", EVIL, &image, "1M"],
        &["bench", "-n", "1", &evil],
        &["serve", "--export", EVIL, &image],
        &["-v", "convert", "-O", "raw", &evil, &scratch.path("raw")],
    ] {
        for json in [&[][..], &["--json"]] {
            let ended = run(&[json, words].concat());
            for text in [&ended.out, &ended.err] {
                assert!(!text.contains(['\u{1b}', '\u{9b}']), "{words:?}: {text:?}");
                assert!(
                    !text.lines().any(|line| line.starts_with("blockferry: all is well")),
                    "{words:?}: {text}"
                );
            }
        }
    }
    // Programs get the name as it is.
    let listed = run(&["--json", "snapshot", "-l", &image]).events();
    assert!(format!("{listed:?}").contains("all is well"), "{listed:?}");
}

#[test]
fn mistakes_are_answered_with_what_is_needed_to_go_on() {
    let scratch = Scratch::new();
    let (raw, small) = (scratch.full("raw.img", 2 * MIB), scratch.full("small.img", MIB));
    let path = |name: &str| scratch.path(name);
    let (qcow2, orphan, dir) = (path("a.qcow2"), path("orphan.qcow2"), path("dir"));
    tool("qemu-img", &["create", "-q", "-f", "qcow2", &qcow2, "1M"]);
    tool(
        "qemu-img",
        &["create", "-q", "-u", "-f", "qcow2", "-b", "gone.qcow2", "-F", "qcow2", &orphan, "1M"],
    );
    std::fs::create_dir(&dir).unwrap();
    let force = ["--force", "-F", "raw"];
    let says_of = |code, texts: &[&str], words: &[&str]| says(&run(words), code, texts);
    says_of(1, &["2097152", "1048576"], &[&["mirror", &raw, &small][..], &force].concat());
    says_of(1, &["gone.qcow2", "orphan.qcow2"], &["mirror", &orphan, &path("x")]);
    says_of(1, &["nodir/new"], &["mirror", &raw, &path("nodir/new")]);
    says_of(1, &["which has no backing file"], &["commit", &raw]);
    says_of(1, &["which has no backing file"], &["rebase", "-b", "", &raw]);
    says_of(1, &["is a directory"], &["mirror", &raw, &dir]);
    says_of(1, &["itself"], &["mirror", &raw, &raw]);
    says_of(1, &["--force", "(-F raw"], &["mirror", &raw, &small]);
    says_of(2, &["'300' has no unit", "300ms"], &["mirror", "--max-downtime", "300", &raw, &path("x")]);
    says_of(2, &["'-5' is negative; a speed is not"], &["mirror", "--speed", "-5", &raw, &path("x")]);
    says_of(1, &["protocol is not supported"], &["mirror", "http://127.0.0.1/x", &path("x")]);
    says_of(2, &["cluster_size"], &["create", "-f", "qcow2", "-o", "clustersize=64k", &path("x"), "1M"]);
    says_of(
        0,
        &["taken as raw, as you said", "qcow2"],
        &["mirror", "-f", "raw", "-F", "raw", &qcow2, &path("r")],
    );
    says_of(63, &["a.img"], &["check", "-f", "raw", &scratch.full("a.img", MIB)]);
    let uri = format!("nbd+unix:///x?socket={}", path("socket"));
    let twice = run(&["serve", "-f", "raw", &raw, "--export", &uri, "--export", &uri]);
    says(&twice, 2, &["twice"]);
    assert!(!twice.err.contains("Serving"), "{twice}");
    // With --quiet nothing is said but errors.
    let quiet = run(&["mirror", "-q", "-f", "raw", "-F", "raw", &qcow2, &path("q")]);
    assert!(quiet.code == Some(0) && quiet.err.is_empty() && quiet.out.is_empty(), "{quiet}");
    for nothing in ["x", "nodir"] {
        assert!(!std::path::Path::new(&path(nothing)).exists(), "{nothing} was made");
    }
}

/// The option that is named against a lock is one that the command has.
#[test]
fn the_cure_for_a_lock_is_an_option_of_the_command() {
    let scratch = Scratch::new();
    let image = scratch.path("a.qcow2");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", &image, "1M"]);
    let uri = format!("nbd+unix:///x?socket={}", scratch.path("socket"));
    let mut server = Process::json(&["serve", "-f", "qcow2", &image, "--export", &uri]);
    server.wait_event("listening");
    let target = scratch.path("target");
    for (words, has, lacks) in [
        (&["convert", "-O", "raw", &image, &target][..], "-U", "--no-lock"),
        (&["mirror", "-F", "raw", &image, &target], "--no-lock", "-U"),
    ] {
        let ended = run(words);
        says(&ended, 1, &["in use", has, "blockferry (pid "]);
        assert!(!ended.err.contains(lacks), "{ended}");
        assert!(!std::path::Path::new(&target).exists());
    }
    // It works when it is followed.
    says(&run(&["convert", "-U", "-O", "raw", &image, &target]), 0, &[]);
}

#[test]
fn programs_get_one_object_at_the_end_of_everything() {
    let scratch = Scratch::new();
    let (raw, target) = (scratch.full("raw.img", MIB), scratch.path("target"));
    let image = scratch.path("a.qcow2");
    for (words, code) in [
        (&["mirror"][..], 2),
        (&["ferry"], 2),
        (&["mirror", "--speed", "fast", &raw, &target], 2),
        (&["mirror", "--dry-run", &raw, &target], 0),
        (&["mirror", "--dry-run", &raw, &raw], 1),
        (&["mirror", &raw, &target], 0),
        (&["mirror", &raw, &target], 1),
        (&["create", "-f", "qcow2", &image, "4M"], 0),
        (&["create", "-f", "qcow2", &image, "4M"], 1),
        (&["resize", "-f", "qcow2", &image, "8M"], 0),
        (&["snapshot", "-c", "one", &image], 0),
        (&["snapshot", "-l", &image], 0),
        (&["snapshot", "-a", "none", &image], 1),
        (&["check", &image], 0),
        (&["check", "-f", "raw", &raw], 63),
        (&["map", &image], 0),
        (&["measure", "-O", "qcow2", &image], 0),
        (&["compare", &raw, &target], 0),
        (&["compare", &raw, &image], 1),
        (&["bench", "-n", "5", "-q", &raw], 0),
        (&["bench", "-p", "0", &raw], 1),
        (&["doctor", scratch.dir().to_str().unwrap()], 0),
        (&["doctor", "/nowhere"], 1),
        (&["commit", &raw], 1),
        (&["info", "/nowhere"], 1),
    ] {
        let ended = run(&[&["--json"], words].concat());
        assert_eq!(ended.code, Some(code), "{words:?}: {ended}");
        let ends = ended.events().into_iter().filter(|event| {
            let name = event["event"].as_str().unwrap_or_default();
            ![
                "progress",
                "listening",
                "serving",
                "BLOCK_JOB_READY",
                "BLOCK_JOB_COMPLETED",
                "JOB_STATUS_CHANGE",
            ]
            .contains(&name)
        });
        assert_eq!(ends.count(), 1, "{words:?}: {ended}");
    }
}

/// What a run that was killed has left under a hidden name goes with the next one; what somebody still uses stays.
#[test]
fn hidden_files_of_runs_that_were_killed_go_with_the_next_run() {
    let scratch = Scratch::new();
    let (raw, target) = (scratch.full("raw.img", MIB), scratch.path("new.img"));
    // No process can have this id.
    let (left, other) =
        (scratch.path(".new.img.blockferry-4194999"), scratch.path(".other.blockferry-4194999"));
    let ours = scratch.path(&format!(".new.img.blockferry-{}", std::process::id()));
    for path in [&left, &other, &ours] {
        std::fs::write(path, "half").unwrap();
    }
    says(&run(&["mirror", &raw, &target]), 0, &[]);
    assert!(content(&raw) == content(&target));
    let is_there = |path: &str| std::path::Path::new(path).exists();
    assert_eq!((is_there(&left), is_there(&other), is_there(&ours)), (false, true, true));
}

/// Guesses of options that look alike explain nothing; what is wrong, and how it is said, do.
#[test]
fn what_is_not_known_is_not_guessed() {
    for (words, name) in [
        (&["mirror", "--foo", "a", "b"][..], "--foo"),
        (&["convert", "--no-lock", "a", "b"], "--no-lock"),
        (&["serve", "--read-onyl", "a"], "--read-onyl"),
        (&["convert", "-O", "raw", "a", "b", "--followw"], "--followw"),
    ] {
        let ended = run(words);
        says(&ended, 2, &[name, "Usage: blockferry", "For more information"]);
        let similar = ended.err.matches("--").count() - ended.err.matches(name).count();
        // What is left is --help, and what a command cannot do without.
        assert!(!ended.err.contains("tip:") && similar <= 3, "{ended}");
    }
    says(&run(&["convert", "-m", "0", "a", "b"]), 2, &["has to be from 1 to 16"]);
    says(&run(&["mirror", "-o", "help"]), 0, &["cluster_size"]);
    says(&run(&["mirror", "--target-options", "help", "-F", "raw", "a", "b"]), 0, &["preallocation"]);
    says(&run(&["measure", "-O", "qcow2", "-o", "help", "--size", "1M"]), 0, &["cluster_size"]);
}

/// A refusal of our own does not begin with the kernel's words, and nothing is told twice.
#[test]
fn one_failure_is_one_sentence() {
    let scratch = Scratch::new();
    let path = |name: &str| scratch.path(name);
    let (image, other) = (scratch.full("a.img", MIB), scratch.full("b.img", MIB));
    let inner = path("in/o.qcow2");
    std::fs::create_dir(path("in")).unwrap();
    let made = run(&["create", "-q", "-f", "qcow2", "-b", "../a.img", "-F", "raw", &inner]);
    says(&made, 0, &[" WARN ", "--allow-dir"]);
    assert!(!made.err.contains("blockferry:"), "{made}");
    let (socket, nobody) = (path("socket"), format!("nbd+unix:///x?socket={}", path("nobody")));
    let uri = |export: &str| format!("nbd+unix:///{export}?socket={socket}");
    let mut server = Process::json(&["serve", "-f", "raw", &image, "--export", &uri("x")]);
    server.wait_event("listening");
    for (words, texts, lacks) in [
        (&["map", &inner][..], &["failed: The image names the file", "--allow-dir"][..], "not permitted"),
        (&["info", &uri("wrong")], &["no such export", "serve --list"], "Protocol error"),
        (&["info", &nobody], &["failed: No such file or directory"], "Connecting"),
        (&["resize", "-f", "raw", &uri("x"), "+1M"], &["cannot grow"], "No space"),
        (
            &["measure", "-O", "qcow2", "-o", "extended_l2=on,compat=0.10", "--size", "1M"],
            &["compat=1.1"],
            "failed",
        ),
        (&["bench", "--histogram", &path("no/h"), "-n", "1", &image], &["No such file"], "os error"),
        (
            &["serve", "-f", "raw", &other, "--export", &nobody, "--pid-file", &path("no/p")],
            &["No such file"],
            "os error",
        ),
    ] {
        let ended = run(words);
        assert_ne!(ended.code, Some(0), "{ended}");
        for text in texts {
            assert_eq!(ended.err.matches(text).count(), 1, "`{text}` in {words:?}: {ended}");
        }
        assert!(!ended.err.contains(lacks) && !ended.err.contains(".; "), "{words:?}: {ended}");
    }
    let doctor = run(&["doctor", &uri("x")]);
    assert!(doctor.out.contains("size: 1 MiB") && !doctor.out.contains(".; "), "{doctor}");
}

/// What is going to be done is said as that, and by the names that were given.
#[test]
fn a_verbose_run_says_what_it_does() {
    let scratch = Scratch::new();
    let (source, target) = (scratch.full("a.img", MIB), scratch.path("b.img"));
    for words in [&["mirror", "-v", "--rate", "8M"][..], &["convert", "-vv", "-f", "raw"]] {
        let ended = run(&[words, &[&source, &target]].concat());
        says(&ended, 0, &["Will read", "Will make", "Completed in"]);
        for text in ["Would", "was changed", ".blockferry-", "file:"] {
            assert!(!ended.err.contains(text), "`{text}` in: {ended}");
        }
        assert!(!ended.err.contains("bytes a second"), "{ended}");
        std::fs::remove_file(&target).unwrap();
    }
    // A speed that is hardly meant is doubted, once.
    let doubted = run(&["mirror", "--dry-run", "--speed", "200", &source, &target]);
    assert_eq!(doubted.err.matches("200 bytes a second").count(), 1, "{doubted}");
    let image = scratch.path("a.qcow2");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", &image, "1M"]);
    for (option, word) in [("-c", "taken"), ("-a", "applied"), ("-d", "deleted")] {
        says(&run(&["snapshot", option, "one", &image]), 0, &[&format!("Snapshot 'one' {word}")]);
    }
    let quiet = run(&["snapshot", "-q", "-c", "one", &image]);
    assert!(quiet.code == Some(0) && quiet.out.is_empty() && quiet.err.is_empty(), "{quiet}");
    let (from, to) = (format!("if={source}"), format!("of={target}"));
    says(
        &run(&["dd", "-f", "raw", &from, &to, "bs=4k", "skip=1", "count=2"]),
        0,
        &["4 KiB copied", "from offset 4096 on"],
    );
}

/// What another command calls --json and --rate is understood here, too.
#[test]
fn one_idea_has_one_name() {
    let scratch = Scratch::new();
    let (source, target) = (scratch.full("a.img", MIB), scratch.path("b.img"));
    let ended = run(&["mirror", "-p", "--rate", "1G", "--output=json", &source, &target]);
    assert_eq!(ended.code, Some(0), "{ended}");
    assert_eq!(ended.events().last().expect("an end")["ending"], "completed", "{ended}");
    let ended = run(&["convert", "--force", "--speed", "1G", "-f", "raw", &source, &target]);
    assert_eq!(ended.code, Some(0), "{ended}");
    let doctor = run(&["doctor", "--output=json", &source]);
    assert!(doctor.events().last().expect("facts")["facts"].is_array(), "{doctor}");
}
