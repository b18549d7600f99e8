//! An ordinary user with the usual 8 MiB of RLIMIT_MEMLOCK: most of the arena cannot be registered, the
//! command says so once, and copies all the same.
//!
//! As root the tests become `nobody` with setpriv; as anybody else they stay who they are. The user works in a
//! folder of its own that is also the working directory: so it does not matter whether the folders above may be
//! entered, and the program is a copy there.

use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use common::image::{MIB, Scratch, assert_equal};
use common::{Ended, Process, event, is_root, stats};

const NOBODY: u32 = 65_534;
const MEMLOCK: u64 = 8 << 20;

/// The limit is one for all processes of a user: one test at a time.
static LIMIT: Mutex<()> = Mutex::new(());

/// A folder of an ordinary user, with the program in it.
struct Home {
    scratch: Scratch,
    _alone: MutexGuard<'static, ()>,
}

impl Home {
    fn new() -> Home {
        let scratch = Scratch::new();
        std::fs::copy(env!("CARGO_BIN_EXE_blockferry"), scratch.path("blockferry")).unwrap();
        // A test that failed while it held the lock has left nothing behind.
        Home { scratch, _alone: LIMIT.lock().unwrap_or_else(PoisonError::into_inner) }
    }

    /// Everything in it belongs to the user.
    fn give_away(&self) {
        if !is_root() {
            return;
        }
        let entries = std::fs::read_dir(self.scratch.dir()).unwrap().map(|entry| entry.unwrap().path());
        for path in entries.chain([self.scratch.dir().to_owned()]) {
            std::os::unix::fs::chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
        }
    }

    /// Runs the command as the user.
    fn run(&self, memlock: u64, arguments: &[&str]) -> Ended {
        let id = NOBODY.to_string();
        let mut command = Command::new("prlimit");
        command.arg(format!("--memlock={memlock}:{memlock}"));
        if is_root() {
            command.args(["setpriv", "--reuid", &id, "--regid", &id, "--clear-groups"]);
        }
        // HOME stays what it was, as with setpriv, su and many supervisors: perhaps closed to this user.
        command
            .arg("./blockferry")
            .args(arguments)
            .current_dir(self.scratch.dir())
            .env_remove("BLOCKFERRY_LOG");
        Process::spawn(command).end()
    }
}

#[test]
fn a_copy_under_a_small_limit_is_right_and_says_what_it_lacks() {
    let home = Home::new();
    let source = home.scratch.full("source", 24 * MIB);
    home.give_away();
    let quiet = home.run(MEMLOCK, &["--json", "info", "source"]);
    assert!(quiet.err.is_empty(), "nothing that the user cannot act on: {quiet}");
    let ended = home.run(MEMLOCK, &["-v", "--json", "mirror", "--verify", "--stats", "source", "target"]);
    assert_eq!(ended.code, Some(0), "{ended}");
    assert_equal(&source, &home.scratch.path("target"));
    for text in ["the kernel registers no more memory", "RLIMIT_MEMLOCK", "plain buffers are used"] {
        assert_eq!(ended.err.matches(text).count(), 1, "`{text}`, once: {ended}");
    }
    let events = ended.events();
    assert_eq!(event(&events, "end")["ending"], "completed");
    let counters = stats(&events);
    let of = |name: &str| counters[name].as_u64().unwrap();
    assert!(of("arena-bytes-registered") < of("arena-bytes"), "{counters}");
    assert!(of("arena-bytes-registered") <= MEMLOCK, "{counters}");
    let info = home.run(MEMLOCK, &["--json", "info", "target"]);
    assert_eq!(info.code, Some(0), "{info}");
    assert_eq!(info.events()[0]["state"], "unmarked");
}

#[test]
fn with_next_to_nothing_it_copies_by_plain_operations_or_says_why_not() {
    let home = Home::new();
    let source = home.scratch.full("source", 4 * MIB);
    home.give_away();
    // Kernels differ in what a ring itself is charged; what is left is less than the arena wants in any case.
    let ended = home.run(1 << 20, &["-v", "--json", "mirror", "--stats", "source", "target"]);
    if ended.code == Some(0) {
        assert_equal(&source, &home.scratch.path("target"));
        let events = ended.events();
        let counters = stats(&events);
        assert!(counters["transfers-plain"].as_u64() > Some(0), "{counters}");
        assert!(ended.err.contains("RLIMIT_MEMLOCK"), "{ended}");
    } else {
        assert_eq!(ended.code, Some(1), "{ended}");
        assert!(ended.err.contains("Raise RLIMIT_MEMLOCK"), "{ended}");
        assert!(!std::fs::exists(home.scratch.path("target")).unwrap());
    }
}

#[test]
fn the_doctor_tells_an_ordinary_user_what_was_chosen() {
    let home = Home::new();
    home.give_away();
    let ended = home.run(MEMLOCK, &["doctor", "."]);
    assert_eq!(ended.code, Some(0), "{ended}");
    let texts = [
        "RLIMIT_MEMLOCK, bytes that may be registered: 8388608",
        "set-up flags",
        "MiB of it registered",
        "write: yes",
    ];
    for text in texts {
        assert!(ended.out.contains(text), "no `{text}` in: {ended}");
    }
    // What is slower for it is judged, with what to do.
    let json = home.run(MEMLOCK, &["--json", "doctor", "."]).events().pop().unwrap();
    assert_eq!((&json["verdict"], &json["version"]), (&"slower".into(), &env!("CARGO_PKG_VERSION").into()));
    let facts = json["facts"].as_array().unwrap();
    let limit =
        facts.iter().find(|fact| fact["name"].as_str().unwrap().starts_with("RLIMIT_MEMLOCK")).unwrap();
    assert_eq!(limit["verdict"], "slower");
    assert!(limit["because"].as_str().unwrap().contains("registered"), "{limit}");
    assert!(limit["do"].as_str().unwrap().contains("ulimit -l"), "{limit}");
    // Where something does not work, the exit code says so.
    let ended = home.run(MEMLOCK, &["doctor", "/nowhere"]);
    assert!(ended.code == Some(1) && ended.out.contains("/nowhere"), "{ended}");
    // It leaves nothing behind.
    let names: Vec<_> =
        std::fs::read_dir(home.scratch.dir()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["blockferry"]);
}

#[test]
fn what_the_user_may_not_do_is_said() {
    let home = Home::new();
    if !is_root() {
        println!("left out: needs root, to own a file that the user may not write");
        return;
    }
    home.give_away();
    let theirs = home.scratch.full("theirs", MIB);
    let ended =
        home.run(MEMLOCK, &["serve", "-f", "raw", "--export", "nbd+unix:///?socket=socket", "theirs"]);
    assert_eq!(ended.code, Some(1), "{ended}");
    assert!(ended.err.contains("theirs") && ended.err.contains("Permission denied"), "{ended}");
    // Reading it is allowed.
    let ended = home.run(MEMLOCK, &["mirror", "theirs", "copy"]);
    assert_eq!(ended.code, Some(0), "{ended}");
    assert_equal(&theirs, &home.scratch.path("copy"));
}
