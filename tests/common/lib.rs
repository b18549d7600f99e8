//! For tests of the built command: run it, follow its JSON lines, look at what it left behind.
//!
//! Every process here is ended by its own id when its guard goes, and every wait has a limit that is far
//! beyond what is expected, so that a hang is a failure with a text and not a silent machine.

// Conventions for the users of a library that many have; this one has the tests.
#![allow(clippy::new_without_default, clippy::should_implement_trait, clippy::len_without_is_empty)]

pub mod chain;
pub mod ext4;
pub mod filesystem;
pub mod gluster;
pub mod image;
pub mod ledger;
pub mod nbd;
pub mod nbd_peers;
pub mod nbd_script;
pub mod qcow2;
pub mod sandbox;
pub mod writer;

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal};
use serde_json::Value;

/// How long anything may take that takes a moment. The machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Where the built command is: cargo puts it beside the folder of the tests.
pub fn command_path() -> PathBuf {
    let test = std::env::current_exe().expect("a test has a place");
    let profile = test.parent().and_then(Path::parent).expect("tests lie in target/PROFILE/deps");
    profile.join("blockferry")
}

/// The built command with these arguments.
pub fn blockferry(arguments: &[&str]) -> Command {
    let mut command = Command::new(command_path());
    // What the user of the machine has set must not change what is tested.
    command.env_remove("BLOCKFERRY_LOG").args(arguments);
    command
}

/// Runs the command to its end.
pub fn run(arguments: &[&str]) -> Ended {
    Process::spawn(blockferry(arguments)).end()
}

/// Runs the command, which has to succeed, with `--json`: its lines.
pub fn run_json(arguments: &[&str]) -> Vec<Value> {
    let ended = run(&[&["--json"], arguments].concat());
    assert_eq!(ended.code, Some(0), "{ended}");
    ended.events()
}

/// Runs another program, which has to succeed: its output.
pub fn tool(program: &str, arguments: &[&str]) -> String {
    let mut command = Command::new(program);
    command.args(arguments);
    let ended = Process::spawn(command).end();
    assert_eq!(ended.code, Some(0), "{program} {arguments:?}: {ended}");
    ended.out
}

/// The content of two raw images is the same, as QEMU sees it, and so is their length.
pub fn assert_same(a: &str, b: &str) {
    // Its strict mode would look at the length, but at the allocation too, which may differ.
    let len = |path: &str| std::fs::metadata(path).expect("an image").len();
    assert_eq!(len(a), len(b), "{a} and {b}");
    tool("qemu-img", &["compare", "-f", "raw", "-F", "raw", a, b]);
}

/// What `blockferry info` says about an image.
pub fn info(image: &str) -> Value {
    run_json(&["info", "-f", "raw", image]).pop().expect("a line of information")
}

/// Whether an image carries the mark of an unfinished copy.
pub fn is_marked(image: &str) -> bool {
    match info(image)["state"].as_str() {
        Some("incomplete") => true,
        Some("unmarked" | "superseded") => false,
        other => panic!("a strange state: {other:?}"),
    }
}

/// The first event of that name.
pub fn event<'a>(events: &'a [Value], name: &str) -> &'a Value {
    let found = events.iter().find(|event| event["event"] == name);
    found.unwrap_or_else(|| panic!("no event '{name}' in {events:#?}"))
}

/// The counters that a run with `--stats` printed.
pub fn stats(events: &[Value]) -> &Value {
    &event(events, "stats")["stats"]
}

/// What a program that has ended left behind.
#[derive(Debug)]
pub struct Ended {
    /// The exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// Standard output that was not taken before.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Ended {
    /// The output as JSON lines.
    pub fn events(&self) -> Vec<Value> {
        self.out.lines().map(parse).collect()
    }
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "exit code {:?}\n{}\n{}", self.code, self.out, self.err)
    }
}

fn parse(line: &str) -> Value {
    serde_json::from_str(line).unwrap_or_else(|error| panic!("no JSON ({error}): {line}"))
}

/// A program that runs. It is killed when this goes.
#[derive(Debug)]
pub struct Process {
    child: Child,
    pidfd: OwnedFd,
    lines: Receiver<String>,
    err: Option<JoinHandle<String>>,
    /// The lines taken so far, for messages.
    taken: Vec<String>,
}

impl Process {
    /// Starts it.
    pub fn spawn(mut command: Command) -> Process {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command
            .spawn()
            .unwrap_or_else(|error| panic!("{:?} does not start: {error}", command.get_program()));
        let pidfd = rustix::process::pidfd_open(Pid::from_child(&child), PidfdFlags::empty())
            .expect("a handle of a child");
        let (out, err) = (child.stdout.take().expect("a pipe"), child.stderr.take().expect("a pipe"));
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let err = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            // What came before an error is worth having too.
            let _ = BufReader::new(err).read_to_end(&mut bytes);
            String::from_utf8_lossy(&bytes).into_owned()
        });
        Process { child, pidfd, lines, err: Some(err), taken: Vec::new() }
    }

    /// The command with `--json` and these arguments.
    pub fn json(arguments: &[&str]) -> Process {
        Process::spawn(blockferry(&[&["--json"], arguments].concat()))
    }

    /// The next line of output, or `None` at its end.
    pub fn line(&mut self) -> Option<String> {
        match self.lines.recv_timeout(PATIENCE) {
            Ok(line) => {
                self.taken.push(line.clone());
                Some(line)
            }
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("silence; so far: {:#?}", self.taken),
        }
    }

    /// The next JSON line, or `None` at the end of the output.
    pub fn event(&mut self) -> Option<Value> {
        self.line().map(|line| parse(&line))
    }

    /// Waits for the JSON line that `is_it`.
    pub fn wait_for(&mut self, is_it: impl Fn(&Value) -> bool) -> Value {
        let end = Instant::now() + PATIENCE;
        while let Some(event) = self.event() {
            if is_it(&event) {
                return event;
            }
            assert!(Instant::now() < end, "it does not come; so far: {:#?}", self.taken);
        }
        let taken = std::mem::take(&mut self.taken).join("\n");
        let ended = self.finish();
        panic!("it ended before that came: {taken}\n{ended}");
    }

    /// Waits for the event of that name.
    pub fn wait_event(&mut self, name: &str) -> Value {
        self.wait_for(|event| event["event"] == name)
    }

    /// Sends SIGINT.
    pub fn interrupt(&self) {
        self.signal(Signal::INT);
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        rustix::process::pidfd_send_signal(&self.pidfd, signal).expect("a signal to a child");
    }

    /// Sends SIGCONT, which lets a job go on that an error has stopped.
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// Sends SIGKILL and waits for the end: the JSON lines that had not been taken.
    pub fn kill(mut self) -> Vec<Value> {
        self.child.kill().expect("a signal to a child");
        let ended = self.finish();
        assert_eq!(ended.code, None, "it had ended before: {ended}");
        // The last line may have been cut off.
        ended.out.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("the state of a child").is_some()
    }

    /// Waits for the end.
    pub fn end(mut self) -> Ended {
        self.finish()
    }

    fn finish(&mut self) -> Ended {
        let mut out = String::new();
        let end = Instant::now() + PATIENCE;
        loop {
            match self.lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(line) => writeln!(out, "{line}").expect("a string"),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => panic!("it does not end: {:#?}\n{out}", self.taken),
            }
        }
        let mut fds = [rustix::event::PollFd::new(&self.pidfd, rustix::event::PollFlags::IN)];
        let limit = rustix::time::Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
        let came = rustix::event::poll(&mut fds, Some(&limit)).expect("waiting for a child");
        assert_eq!(came, 1, "it closed its output and does not end: {out}");
        let status = self.child.wait().expect("the state of a child");
        let err = self.err.take().map(|thread| thread.join().expect("a reader")).unwrap_or_default();
        Ended { code: status.code(), out, err }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until nobody holds a lock on an image: the kernel gives those of a process that was killed back a moment later.
pub fn wait_unlocked(image: &str) {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(image).expect("an image");
    let end = Instant::now() + PATIENCE;
    while rustix::fs::fcntl_lock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_err() {
        assert!(Instant::now() < end, "{image} stays locked");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether loop devices can be made and other users be played.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A loop device on a file, with direct I/O. Detached when it goes.
#[derive(Debug)]
pub struct LoopDevice(pub String);

impl LoopDevice {
    /// Needs root.
    pub fn new(file: &str, sector_bytes: u32) -> LoopDevice {
        let sector = sector_bytes.to_string();
        let name = tool("losetup", &["--find", "--show", "--direct-io=on", "--sector-size", &sector, file]);
        LoopDevice(name.trim().to_owned())
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // It goes when its last user goes; there is nothing more to do about a failure here.
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}
