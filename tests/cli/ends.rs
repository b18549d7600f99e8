//! What ends a command, and what does not: signals in each state, readers of the output that go away or stand still, and
//! limits of the process.
//!
//! Each row of the table of signals is a story of its own; they run side by side, because most of each is waiting.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::image::{KIB, MIB, Scratch, assert_equal, content};
use common::nbd::Client;
use common::{Ended, PATIENCE, Process, blockferry, is_marked, tool};
use rustix::process::Signal;

const CONT: Signal = Signal::CONT;
const HUP: Signal = Signal::HUP;
const INT: Signal = Signal::INT;
const TERM: Signal = Signal::TERM;
const USR1: Signal = Signal::USR1;

/// A scratch folder with a disk in it, and a socket.
struct Place {
    scratch: Scratch,
    source: String,
    target: String,
    socket: PathBuf,
    uri: String,
}

impl Place {
    fn new(len: u64) -> Place {
        let scratch = Scratch::new();
        let (source, target) = (scratch.full("source", len), scratch.path("target"));
        let socket = scratch.dir().join("socket");
        let uri = format!("nbd+unix:///disk?socket={}", socket.display());
        Place { scratch, source, target, socket, uri }
    }

    /// A mirror with clients, from source to target.
    fn mirror(&self, options: &[&str]) -> Process {
        let start = ["mirror", "-f", "raw", "--export", &self.uri];
        let mut mirror = Process::json(&[&start[..], options, &[&self.source, &self.target]].concat());
        mirror.wait_event("listening");
        mirror
    }

    fn client(&self) -> Client {
        Client::connect(&self.socket, "disk").expect("a connection")
    }
}

/// The client is served.
fn goes_on(client: &mut Client) {
    client.write(4096, &[7; 512]).expect("a write");
    let mut bytes = [0; 512];
    client.read(4096, &mut bytes).expect("a read");
    assert_eq!(bytes, [7; 512]);
}

/// The client's connection is ended.
fn is_cut_off(client: &mut Client) {
    let mut bytes = [0; 512];
    while client.read(0, &mut bytes).is_ok() {}
}

fn ends_with(process: Process, code: i32) -> Ended {
    let ended = process.end();
    assert_eq!(ended.code, Some(code), "{ended}");
    ended
}

/// Runs all stories at the same time.
fn side_by_side(stories: &[(&str, fn())]) {
    std::thread::scope(|scope| {
        let threads: Vec<_> = stories.iter().map(|(name, story)| (name, scope.spawn(story))).collect();
        for (name, thread) in threads {
            assert!(thread.join().is_ok(), "{name}: see above");
        }
    });
}

#[test]
fn signals_in_each_state() {
    side_by_side(&[
        ("serve, first", || serve_ends(INT)),
        ("serve, first, TERM", || serve_ends(TERM)),
        ("serve with a stuck request, second", serve_ends_at_once),
        ("a job without clients", a_job_without_clients_is_given_up),
        ("a job with clients, INT", || a_job_is_given_up_and_its_client_goes_on(INT)),
        ("a job with clients, TERM", || a_job_is_given_up_and_its_client_goes_on(TERM)),
        ("a job with clients, twice", a_second_signal_ends_the_service),
        ("a job with clients, TERM, time", clients_have_their_time),
        ("a stream with clients", a_stream_is_given_up_and_its_client_goes_on),
        ("ready, first", a_ready_job_completes_and_its_client_goes_on),
        ("ready, second", a_ready_job_that_does_not_end_is_given_up),
        ("stopped by its policy", a_stopped_job_ends),
        ("server dead", || a_job_whose_server_is_dead_ends(TERM)),
        ("after a pivot", after_a_pivot_a_signal_says_who_is_served),
        ("after a pivot, nobody", after_a_pivot_a_service_without_clients_ends),
    ]);
}

fn serve_ends(signal: Signal) {
    let place = Place::new(MIB);
    let mut serve = Process::json(&["serve", "-f", "raw", &place.source, "--export", &place.uri]);
    serve.wait_event("listening");
    let mut client = place.client();
    goes_on(&mut client);
    serve.signal(signal);
    is_cut_off(&mut client);
    ends_with(serve, 0);
    assert!(!place.socket.exists() && content(&place.source)[4096..4608] == [7; 512]);
}

fn serve_ends_at_once() {
    let place = Place::new(MIB);
    let slow = format!("delay:1h:{}", place.source);
    let mut serve = Process::json(&["serve", "-f", "raw", &slow, "--export", &place.uri]);
    serve.wait_event("listening");
    let mut client = place.client();
    let reader = std::thread::spawn(move || is_cut_off(&mut client));
    // The request is there when a second client is: it came before.
    drop(place.client());
    serve.signal(TERM);
    // It has begun to end: nobody listens any more.
    let end = Instant::now() + PATIENCE;
    while place.socket.exists() {
        assert!(Instant::now() < end, "it goes on listening");
        std::thread::sleep(Duration::from_millis(5));
    }
    serve.signal(TERM);
    let began = Instant::now();
    let ended = serve.end();
    assert!(ended.code == Some(1) || ended.code == Some(0), "{ended}");
    assert!(began.elapsed() < Duration::from_secs(50));
    reader.join().expect("a client");
}

fn a_job_without_clients_is_given_up() {
    for signals in [&[INT][..], &[TERM], &[HUP], &[TERM, TERM]] {
        let place = Place::new(2 * MIB);
        let mut mirror = Process::json(&["mirror", "--speed", "1MiB", &place.source, &place.target]);
        mirror.wait_event("progress");
        for signal in signals {
            mirror.signal(*signal);
        }
        ends_with(mirror, 3);
        assert!(is_marked(&place.target));
    }
}

fn a_job_is_given_up_and_its_client_goes_on(signal: Signal) {
    let place = Place::new(4 * MIB);
    let mut mirror = place.mirror(&["--speed", "1MiB"]);
    let mut client = place.client();
    mirror.wait_event("progress");
    mirror.signal(signal);
    assert_eq!(mirror.wait_event("end")["ending"], "cancelled");
    assert_eq!(mirror.wait_event("serving")["clients"], 1);
    goes_on(&mut client);
    client.disconnect().expect("a farewell");
    ends_with(mirror, 3);
    assert!(is_marked(&place.target) && !place.socket.exists());
}

fn a_second_signal_ends_the_service() {
    let place = Place::new(4 * MIB);
    let mut mirror = place.mirror(&["--speed", "1MiB"]);
    let mut client = place.client();
    mirror.signal(TERM);
    mirror.wait_event("serving");
    goes_on(&mut client);
    mirror.signal(TERM);
    is_cut_off(&mut client);
    ends_with(mirror, 3);
    assert_eq!(content(&place.source)[4096..4608], [7; 512]);
}

fn clients_have_their_time() {
    let place = Place::new(4 * MIB);
    let mut mirror = place.mirror(&["--speed", "1MiB", "--drain-timeout", "500ms"]);
    let mut client = place.client();
    mirror.signal(TERM);
    mirror.wait_event("serving");
    goes_on(&mut client);
    is_cut_off(&mut client);
    ends_with(mirror, 3);
}

fn a_stream_is_given_up_and_its_client_goes_on() {
    let place = Place::new(4 * MIB);
    let top = place.scratch.path("top.qcow2");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &place.source, "-F", "raw", &top]);
    let mut stream = Process::json(&["stream", "--speed", "1MiB", "--export", &place.uri, &top]);
    stream.wait_event("listening");
    let mut client = place.client();
    stream.wait_event("progress");
    stream.signal(TERM);
    stream.wait_event("serving");
    goes_on(&mut client);
    client.disconnect().expect("a farewell");
    ends_with(stream, 3);
    tool("qemu-img", &["check", "-q", &top]);
}

fn a_ready_job_completes_and_its_client_goes_on() {
    let place = Place::new(MIB);
    let mut mirror = place.mirror(&["--follow"]);
    let mut client = place.client();
    mirror.wait_event("BLOCK_JOB_READY");
    goes_on(&mut client);
    mirror.signal(TERM);
    assert_eq!(mirror.wait_event("end")["ending"], "completed");
    mirror.wait_event("serving");
    assert!(!is_marked(&place.target));
    assert_equal(&place.source, &place.target);
    client.write(8192, &[9; 512]).expect("a write");
    mirror.signal(INT);
    is_cut_off(&mut client);
    ends_with(mirror, 0);
    assert_eq!(content(&place.source)[8192..8704], [9; 512]);
}

fn a_ready_job_that_does_not_end_is_given_up() {
    let place = Place::new(4 * KIB);
    std::fs::write(&place.target, [0; 4096]).expect("a file");
    // A write takes half a second, and so does a flush.
    let slow = format!("delay:1500ms:{}", place.target);
    let arguments = ["mirror", "--follow", "--force", "-F", "raw", &place.source, &slow];
    let mut mirror = Process::json(&arguments);
    mirror.wait_event("BLOCK_JOB_READY");
    mirror.signal(INT);
    mirror.signal(TERM);
    let ended = mirror.end();
    // The first may have been quicker.
    assert!(matches!(ended.code, Some(0 | 3)), "{ended}");
    assert_eq!(is_marked(&place.target), ended.code == Some(3));
}

/// A target on a server of its own.
fn with_server(place: &Place) -> (Process, String) {
    let socket = place.scratch.dir().join("server");
    let uri = format!("nbd+unix:///disk?socket={}", socket.display());
    std::fs::write(&place.target, vec![0; MIB as usize]).expect("a file");
    let mut server = Process::json(&["serve", "-f", "raw", &place.target, "--export", &uri]);
    server.wait_event("listening");
    (server, uri)
}

fn follow_to<'a>(place: &'a Place, uri: &'a str, state: &'a str, more: &[&'a str]) -> Process {
    let start = ["mirror", "-f", "raw", "-F", "raw", "--force", "--follow", "--state-dir", state];
    let end = ["--export", &place.uri, &place.source, uri];
    let mut mirror = Process::json(&[&start[..], more, &end].concat());
    mirror.wait_event("BLOCK_JOB_READY");
    mirror
}

fn a_stopped_job_ends() {
    let place = Place::new(MIB);
    let (server, uri) = with_server(&place);
    let state = place.scratch.path("state");
    let options = ["--on-target-error", "stop", "--reconnect-delay", "300ms"];
    let mut mirror = follow_to(&place, &uri, &state, &options);
    server.kill();
    let mut client = place.client();
    goes_on(&mut client);
    client.disconnect().expect("a farewell");
    mirror.wait_for(|event| event["event"] == "JOB_STATUS_CHANGE" && event["data"]["status"] == "standby");
    mirror.signal(TERM);
    ends_with(mirror, 3);
}

fn a_job_whose_server_is_dead_ends(signal: Signal) {
    let place = Place::new(MIB);
    let (server, uri) = with_server(&place);
    let state = place.scratch.path("state");
    let mirror = follow_to(&place, &uri, &state, &["--reconnect-delay", "1h"]);
    server.kill();
    let mut client = place.client();
    goes_on(&mut client);
    client.disconnect().expect("a farewell");
    mirror.signal(signal);
    ends_with(mirror, 3);
}

fn after_a_pivot_a_signal_says_who_is_served() {
    let place = Place::new(MIB);
    let mut mirror = place.mirror(&["--pivot"]);
    let mut client = place.client();
    // Told at once, though the service goes on.
    assert_eq!(mirror.wait_event("end")["ending"], "completed");
    mirror.wait_event("serving");
    mirror.signal(INT);
    let serving = mirror.wait_event("serving");
    assert_eq!((&serving["clients"], &serving["uris"][0]), (&1.into(), &place.uri.as_str().into()));
    goes_on(&mut client);
    mirror.signal(INT);
    is_cut_off(&mut client);
    ends_with(mirror, 0);
    assert_eq!(content(&place.target)[4096..4608], [7; 512]);
}

fn after_a_pivot_a_service_without_clients_ends() {
    let place = Place::new(MIB);
    let mut mirror = place.mirror(&["--pivot"]);
    mirror.wait_event("end");
    assert_eq!(mirror.wait_event("serving")["clients"], 0);
    // Whoever comes late finds the disk.
    goes_on(&mut place.client());
    mirror.signal(TERM);
    ends_with(mirror, 0);
    assert_eq!(content(&place.target)[4096..4608], [7; 512]);
}

#[test]
fn services_last_as_long_as_they_were_told_to() {
    side_by_side(&[
        ("--no-persistent", || {
            let place = Place::new(64 * KIB);
            let mirror = place.mirror(&["--pivot", "--no-persistent"]);
            ends_with(mirror, 0);
        }),
        ("--persistent", || {
            let place = Place::new(64 * KIB);
            let mut mirror = place.mirror(&["--persistent"]);
            mirror.wait_event("serving");
            for _ in 0..2 {
                goes_on(&mut place.client());
            }
            mirror.signal(TERM);
            ends_with(mirror, 0);
        }),
        ("a pivot's service ends some time after its last client", || {
            let place = Place::new(64 * KIB);
            let mut mirror = place.mirror(&["--pivot"]);
            mirror.wait_event("serving");
            goes_on(&mut place.client());
            ends_with(mirror, 0);
        }),
        ("--wait-client", || {
            let place = Place::new(64 * KIB);
            let mut mirror = place.mirror(&["--wait-client"]);
            assert_eq!(content(&place.target), [0; 64 << 10], "nothing is copied before somebody is there");
            let mut client = place.client();
            assert_eq!(mirror.wait_event("end")["ending"], "completed");
            goes_on(&mut client);
            client.disconnect().expect("a farewell");
            ends_with(mirror, 0);
        }),
        ("--wait-client, and nobody comes", || {
            let place = Place::new(64 * KIB);
            let mirror = place.mirror(&["--wait-client"]);
            mirror.signal(TERM);
            ends_with(mirror, 3);
            assert!(!Path::new(&place.target).exists() && !place.socket.exists());
        }),
    ]);
}

/// A server that takes connections and says nothing: what opens its disk waits for it, and a signal ends that at once.
fn ends_while_it_opens(words: &[&str], signal: Signal, code: i32) {
    let place = Place::new(MIB);
    let listener = UnixListener::bind(&place.socket).expect("a socket");
    let overlay = place.scratch.path("over");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", &overlay, "1M"]);
    let fill = |word: &&str| match *word {
        "URI" => place.uri.clone(),
        "if=URI" => format!("if={}", place.uri),
        "SOURCE" => place.source.clone(),
        "TARGET" => place.target.clone(),
        "of=TARGET" => format!("of={}", place.target),
        "OVERLAY" => overlay.clone(),
        "EXPORT" => format!("nbd+unix:///x?socket={}", place.scratch.path("other")),
        word => word.to_owned(),
    };
    let words: Vec<String> = words.iter().map(fill).collect();
    let words: Vec<&str> = ["--json"].into_iter().chain(words.iter().map(String::as_str)).collect();
    let before = (content(&place.source), content(&overlay));
    let process = Process::spawn(blockferry(&words));
    let (_silent, _) = listener.accept().expect("a connection");
    process.signal(signal);
    let ended = ends_with(process, code);
    assert_eq!(ended.err, "Cancelled before it began\n", "{words:?}: {ended}");
    let events = ended.events();
    let end = events.last().expect("an end");
    assert!(end["ending"] == "cancelled" && end["exit-code"] == code, "{words:?}: {ended}");
    assert!(!Path::new(&place.target).exists(), "{words:?} made something");
    assert!(before == (content(&place.source), content(&overlay)), "{words:?} changed something");
}

#[test]
fn signals_while_a_server_is_opened() {
    side_by_side(&[
        ("mirror", || ends_while_it_opens(&["mirror", "URI", "TARGET"], INT, 3)),
        ("mirror to it", || {
            ends_while_it_opens(&["mirror", "--force", "-F", "raw", "SOURCE", "URI"], TERM, 3);
        }),
        ("convert", || ends_while_it_opens(&["convert", "URI", "TARGET"], HUP, 3)),
        ("serve", || ends_while_it_opens(&["serve", "-f", "raw", "URI", "--export", "EXPORT"], INT, 3)),
        ("list", || ends_while_it_opens(&["serve", "--list", "URI"], INT, 3)),
        ("compare", || ends_while_it_opens(&["compare", "SOURCE", "URI"], TERM, 3)),
        ("info", || ends_while_it_opens(&["info", "URI"], INT, 3)),
        ("map", || ends_while_it_opens(&["map", "URI"], TERM, 3)),
        ("measure", || ends_while_it_opens(&["measure", "-O", "qcow2", "URI"], INT, 3)),
        ("dd", || ends_while_it_opens(&["dd", "if=URI", "of=TARGET"], INT, 3)),
        // There 3 says that clusters leaked.
        ("check", || ends_while_it_opens(&["check", "-f", "qcow2", "URI"], INT, 1)),
        ("resize", || ends_while_it_opens(&["resize", "-f", "raw", "URI", "2M"], INT, 3)),
        ("create", || {
            ends_while_it_opens(&["create", "-f", "qcow2", "-b", "URI", "-F", "raw", "TARGET"], TERM, 3);
        }),
        ("rebase", || {
            ends_while_it_opens(&["rebase", "-b", "URI", "-F", "raw", "OVERLAY"], INT, 3);
        }),
        ("commit", || ends_while_it_opens(&["commit", "-f", "qcow2", "URI"], INT, 3)),
    ]);
}

#[test]
fn signals_that_end_nothing() {
    side_by_side(&[
        ("SIGHUP that was ignored", || {
            let place = Place::new(MIB);
            let mut command = Command::new("sh");
            command.args(["-c", "trap '' HUP; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_blockferry")]);
            command.args(["--json", "mirror", "--speed", "2MiB", &place.source, &place.target]);
            let mut mirror = Process::spawn(command);
            mirror.wait_event("progress");
            mirror.signal(HUP);
            ends_with(mirror, 0);
            assert_equal(&place.source, &place.target);
        }),
        ("SIGUSR1, SIGCONT", || {
            let place = Place::new(MIB);
            let mut command = blockferry(&["mirror", "--speed", "1MiB", &place.source, &place.target]);
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
            let mut mirror = command.spawn().expect("a child");
            let id = rustix::process::Pid::from_child(&mirror);
            // It listens to signals once its target is there.
            let end = Instant::now() + PATIENCE;
            while !Path::new(&place.target).exists() {
                assert!(Instant::now() < end);
                std::thread::sleep(Duration::from_millis(5));
            }
            for signal in [USR1, CONT] {
                rustix::process::kill_process(id, signal).expect("a signal");
            }
            let mut text = String::new();
            mirror.stderr.take().expect("a pipe").read_to_string(&mut text).expect("text");
            assert_eq!(mirror.wait().expect("an end").code(), Some(0), "{text}");
            let lines: Vec<&str> = text.lines().collect();
            assert!(lines[0].starts_with("Progress: "), "{text}");
            assert!(!text.contains("resume") && !text.contains("paused"), "{text}");
            assert_equal(&place.source, &place.target);
        }),
    ]);
}

/// A pipe whose reader has gone.
fn closed_pipe() -> OwnedFd {
    rustix::pipe::pipe().expect("a pipe").1
}

/// Runs the command with standard output at `out`: its exit code and what it said on standard error.
fn run_into(out: impl Into<Stdio>, arguments: &[&str]) -> (Option<i32>, String) {
    let mut command = blockferry(arguments);
    let ended = command.stdin(Stdio::null()).stdout(out).stderr(Stdio::piped()).output().expect("a child");
    // How much was compared is told on standard error, whatever becomes of the output.
    let said = String::from_utf8_lossy(&ended.stderr);
    let said: String =
        said.lines().filter(|line| !line.contains(" compared: ")).map(|line| format!("{line}\n")).collect();
    (ended.status.code(), said)
}

fn full() -> std::fs::File {
    std::fs::OpenOptions::new().write(true).open("/dev/full").expect("/dev/full")
}

#[test]
fn readers_that_go_away_and_disks_that_are_full() {
    let scratch = Scratch::new();
    let image = scratch.path("a.qcow2");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", &image, "4M"]);
    tool("qemu-io", &["-f", "qcow2", "-c", "write 0 1M", &image]);
    let products: [(&[&str], i32); 9] = [
        (&["info", &image], 1),
        (&["--json", "info", &image], 1),
        (&["map", &image], 1),
        (&["map", "--output=json", &image], 1),
        (&["check", &image], 1),
        (&["measure", "-O", "raw", &image], 1),
        // 1 would say that they differ.
        (&["compare", &image, &image], 2),
        (&["doctor"], 1),
        (&["mirror", "--help"], 1),
    ];
    for (arguments, code) in products {
        assert_eq!(run_into(closed_pipe(), arguments), (Some(0), String::new()), "{arguments:?}");
        let (ended, said) = run_into(full(), arguments);
        assert_eq!(ended, Some(code), "{arguments:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{arguments:?}: {said}");
        assert!(said.contains("Writing to standard output failed: No space left"), "{arguments:?}: {said}");
    }
    // What a command does counts more than what it says.
    let (source, target) = (scratch.full("source", MIB), scratch.path("target"));
    for out in [closed_pipe(), full().into()] {
        let (ended, said) = run_into(out, &["--json", "mirror", "--force", "-F", "raw", &source, &target]);
        assert_eq!(ended, Some(0), "{said}");
        assert_equal(&source, &target);
        std::fs::remove_file(&target).expect("a file");
    }
    for arguments in [&["create", "-f", "raw", &target, "1M"][..], &["resize", "-f", "raw", &target, "2M"]] {
        let (ended, said) = run_into(full(), arguments);
        assert_eq!(ended, Some(0), "{arguments:?}: {said}");
    }
    // What is said on standard error matters even less.
    for err in [closed_pipe(), full().into()] {
        for (arguments, code) in [(&["info", "nothing"][..], 1), (&["ferry"], 2)] {
            let mut command = blockferry(arguments);
            let status = command.stderr(err.try_clone().expect("a descriptor")).status().expect("a child");
            assert_eq!(status.code(), Some(code), "{arguments:?}");
        }
    }
}

/// Everything that a job says goes into a pipe that nobody reads: it goes on, and so do its clients.
#[test]
fn a_reader_that_stands_still_holds_nobody_up() {
    let place = Place::new(MIB);
    let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
    rustix::pipe::fcntl_setpipe_size(&writer, 4096).expect("a small pipe");
    let arguments = ["-vv", "--json", "mirror", "-f", "raw", "--follow", "--export", &place.uri];
    let mut command = blockferry(&[&arguments[..], &[&place.source, &place.target]].concat());
    command.stdin(Stdio::null()).stdout(writer.try_clone().expect("a descriptor")).stderr(writer);
    let mut mirror = command.spawn().expect("a child");
    drop(command);
    let end = Instant::now() + PATIENCE;
    while !place.socket.exists() {
        assert!(Instant::now() < end, "nobody listens");
        std::thread::sleep(Duration::from_millis(5));
    }
    // The pipe is full when the socket buffers of the log's lines are: wait for that, by asking how much is in it.
    let mut client = place.client();
    while rustix::io::ioctl_fionread(&reader).expect("a count") < 3000 {
        goes_on(&mut client);
        assert!(Instant::now() < end, "it says nothing");
    }
    for _ in 0..200 {
        goes_on(&mut client);
    }
    client.disconnect().expect("a farewell");
    let id = rustix::process::Pid::from_child(&mirror);
    rustix::process::kill_process(id, TERM).expect("a signal");
    assert_eq!(mirror.wait().expect("an end").code(), Some(0));
    assert_equal(&place.source, &place.target);
    drop(reader);
}

/// The command under limits of the shell.
fn limited(limits: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("{limits}; exec \"$0\" \"$@\""), env!("CARGO_BIN_EXE_blockferry")]);
    command.args(arguments).env_remove("BLOCKFERRY_LOG");
    command
}

#[test]
fn files_that_may_not_grow_are_errors_of_requests() {
    let scratch = Scratch::new();
    let image = scratch.path("a.qcow2");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", &image, "64M"]);
    let socket = scratch.dir().join("socket");
    let uri = format!("nbd+unix:///disk?socket={}", socket.display());
    // 4 MiB, in blocks of 512 bytes.
    let arguments = ["--json", "serve", "-f", "qcow2", &image, "--export", &uri];
    let mut serve = Process::spawn(limited("ulimit -f 8192", &arguments));
    serve.wait_event("listening");
    let mut client = Client::connect(&socket, "disk").expect("a connection");
    let refusals = (0..16).filter(|i| client.write(i * MIB, &vec![5; MIB as usize]).is_err()).count();
    assert!((8..16).contains(&refusals), "{refusals} writes of 16 failed");
    let mut bytes = [0; 4096];
    client.read(0, &mut bytes).expect("a read");
    assert_eq!(bytes, [5; 4096]);
    client.flush().expect("a flush");
    serve.signal(TERM);
    ends_with(serve, 0);
    // A target that may not grow is a failed copy, with its mark.
    let (source, target) = (scratch.full("source", 8 * MIB), scratch.path("target"));
    let ended = Process::spawn(limited("ulimit -f 8192", &["mirror", &source, &target])).end();
    assert_eq!(ended.code, Some(1), "{ended}");
    assert!(ended.err.contains("raise the limit (`ulimit -f`)"), "{ended}");
}

#[test]
fn connections_without_end_end_nothing() {
    let place = Place::new(MIB);
    let arguments = ["--json", "serve", "-f", "raw", &place.source, "--export", &place.uri];
    let mut serve = Process::spawn(limited("ulimit -n 96", &arguments));
    serve.wait_event("listening");
    let mut client = place.client();
    let flood: Vec<_> = (0..100)
        .map_while(|_| {
            let stream = std::os::unix::net::UnixStream::connect(&place.socket).ok()?;
            stream.set_nonblocking(true).ok()?;
            Some(stream)
        })
        .collect();
    assert!(flood.len() > 60, "{} connections", flood.len());
    for _ in 0..20 {
        goes_on(&mut client);
    }
    drop(flood);
    // Others are let in again.
    goes_on(&mut place.client());
    serve.signal(TERM);
    let ended = ends_with(serve, 0);
    assert!(ended.err.lines().count() < 5, "{ended}");
}

#[test]
fn scarce_memory_is_refused_or_enough() {
    let scratch = Scratch::new();
    let (source, target) = (scratch.full("source", MIB), scratch.path("target"));
    let mut codes = Vec::new();
    for limit in
        ["-v 60000", "-v 150000", "-v 300000", "-v 400000", "-v 1000000", "-l 0", "-l 64", "-n 16", "-n 40"]
    {
        let arguments = ["mirror", "--force", "-F", "raw", &source, &target];
        let ended = Process::spawn(limited(&format!("ulimit {limit}"), &arguments)).end();
        match ended.code {
            Some(0) => assert_equal(&source, &target),
            Some(1) => {
                let said = ended.err.lines().filter(|line| line.starts_with("blockferry: "));
                assert_eq!(said.count(), 1, "ulimit {limit}: {ended}");
            }
            _ => panic!("ulimit {limit}: {ended}"),
        }
        codes.push(ended.code);
    }
    assert!(codes.contains(&Some(0)) && codes.contains(&Some(1)), "{codes:?}");
}
