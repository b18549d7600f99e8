//! A client beside a mirror: how long its writes take until the job is ready, against how long that takes.
//!
//! The client is `blockferry bench` in a process of its own, open-loop where it has a rate: a latency counts from when a
//! write was due, so that a stall is charged to all that fell due in it. It starts when the server takes connections, the
//! job at the same moment (ours, with the server) or 30 ms later (the peer, by a command), and the client is told to end
//! when the job is ready. What it reports is its life beside the job, but for those milliseconds.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::copy::{add_own_counters, merge};
use crate::disks::{Content, Loop, Mount, drop_cache, make_file, sync};
use crate::nbd::own_report;
use crate::process::Daemon;
use crate::qsd::{self, Qsd};
use crate::result::Role;
use crate::rounds::{Contender, Context, Values, interleave};
use crate::{Fallible, stop};

/// Where the disks are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    LoopOnTmpfs,
    Disk,
}

/// How long a job may take to become ready.
const PATIENCE: Duration = Duration::from_secs(15);
/// How long the client runs where there is no job.
const IDLE: Duration = Duration::from_secs(3);

/// What the client does.
const LOADS: [(&str, Option<&str>); 4] = [
    ("no client", None),
    ("2,000 writes a second", Some("--rate 2000")),
    ("depth 1, no limit", Some("-d 1")),
    ("depth 16, no limit", Some("-d 16")),
];

enum How {
    /// No job.
    Idle,
    /// `blockferry mirror` with more options.
    Ours(Vec<String>),
    /// `blockdev-mirror` with more arguments.
    Peer(Value),
}

struct Setting {
    name: String,
    role: Role,
    how: How,
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

/// Our settings: those whose options this build of the program has, and what the user adds.
fn own_settings(cx: &Context) -> Vec<(String, Vec<String>)> {
    let help = std::process::Command::new(&cx.blockferry).args(["mirror", "--help"]).output();
    let help = help.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    let candidates = [
        ("default", ""),
        ("guest-first off", "--guest-first off"),
        ("guest-first 300us", "--guest-first 300us"),
        ("guest-first 2ms", "--guest-first 2ms"),
        ("write-blocking", "--copy-mode write-blocking"),
        ("write-blocking, guest-first off", "--copy-mode write-blocking --guest-first off"),
        ("buf-size 1M, guest-first off", "--buf-size 1MiB --guest-first off"),
        ("buf-size 256k, guest-first off", "--buf-size 256KiB --guest-first off"),
    ];
    let has = |options: &str| {
        let mut flags = options.split_whitespace().filter(|word| word.starts_with("--"));
        flags.all(|flag| help.split(|c: char| c.is_whitespace() || c == '=').any(|word| word == flag))
    };
    let ours = candidates.into_iter().filter(|(_, options)| has(options));
    ours.map(|(name, options)| (name.to_owned(), words(options))).chain(cx.variants.iter().cloned()).collect()
}

fn settings(cx: &Context) -> Vec<Setting> {
    let mut all = vec![
        Setting { name: "no job, blockferry serve".into(), role: Role::Baseline, how: How::Idle },
        Setting { name: "no job, QSD".into(), role: Role::Baseline, how: How::Peer(Value::Null) },
    ];
    for (name, options) in own_settings(cx) {
        all.push(Setting { name: format!("blockferry, {name}"), role: Role::Ours, how: How::Ours(options) });
    }
    for (mode, short) in [("background", "bg"), ("write-blocking", "wb")] {
        for (size, bytes) in [("16M", 16 << 20), ("1M", 1 << 20), ("256k", 256 << 10)] {
            let how = How::Peer(json!({"copy-mode": mode, "buf-size": bytes}));
            all.push(Setting { name: format!("QSD, {short}, buf-size={size}"), role: Role::Peer, how });
        }
    }
    for (name, speed) in [("1G", 1u64 << 30), ("400M", 400 << 20)] {
        let how = How::Peer(json!({"copy-mode": "background", "speed": speed}));
        all.push(Setting { name: format!("QSD, bg, speed={name}"), role: Role::Peer, how });
    }
    all
}

/// The disks; fields are dropped in this order.
enum Disks {
    Loops { source: Loop, target: Loop, _tmpfs: Mount },
    Files { source: PathBuf, target: PathBuf },
}

impl Disks {
    fn new(place: Place, folder: &Path, bytes: u64) -> Fallible<Disks> {
        let disks = match place {
            Place::LoopOnTmpfs => {
                let tmpfs = Mount::tmpfs(&folder.join("tmpfs"), 2 * bytes + (64 << 20))?;
                let source = Loop::new(&tmpfs.path().join("source.img"), bytes)?;
                let target = Loop::new(&tmpfs.path().join("target.img"), bytes)?;
                Disks::Loops { source, target, _tmpfs: tmpfs }
            }
            Place::Disk => {
                let [source, target] = ["source.img", "target.img"].map(|name| folder.join(name));
                make_file(&source, bytes)?;
                make_file(&target, bytes)?;
                Disks::Files { source, target }
            }
        };
        let (source, target) = disks.paths();
        Content::Random(1).fill(&source, bytes)?;
        Content::Random(2).fill(&target, bytes)?;
        Ok(disks)
    }

    fn paths(&self) -> (PathBuf, PathBuf) {
        match self {
            Disks::Loops { source, target, .. } => (source.path().to_owned(), target.path().to_owned()),
            Disks::Files { source, target } => (source.clone(), target.clone()),
        }
    }

    fn prepare(&mut self) -> Fallible<()> {
        if let Disks::Loops { source, target, .. } = self {
            source.renew()?;
            target.renew()?;
        }
        let (source, target) = self.paths();
        for disk in [&source, &target] {
            sync(disk)?;
            drop_cache(disk)?;
        }
        Ok(())
    }
}

/// Runs the scenario.
pub fn run(cx: &mut Context, scenario: &str, place: Place) -> Fallible<()> {
    let gib = 1u64 << 30;
    let bytes = match (cx.quick, place) {
        (true, _) => gib / 2,
        (false, Place::LoopOnTmpfs) => 4 * gib,
        (false, Place::Disk) => 2 * gib,
    };
    let disks = std::cell::RefCell::new(Disks::new(place, &cx.folder, bytes)?);
    let settings = settings(cx);
    for (case, load) in LOADS {
        let fit = settings.iter().filter(|s| load.is_some() || s.role != Role::Baseline);
        let entries = fit.map(|setting| {
            let run = Run { blockferry: cx.blockferry.clone(), folder: cx.folder.clone(), load, bytes };
            let disks = &disks;
            Contender {
                name: setting.name.clone(),
                role: setting.role,
                command: shown(&setting.how, load),
                run: Box::new(move |_| {
                    disks.borrow_mut().prepare()?;
                    let (source, target) = disks.borrow().paths();
                    match &setting.how {
                        How::Idle => run.idle(&source),
                        How::Ours(options) => run.ours(&source, &target, options),
                        How::Peer(arguments) => run.peer(&source, &target, arguments),
                    }
                }),
            }
        });
        let limits = (cx.rounds_or(3), cx.seconds_max, cx.only.as_slice());
        interleave(&mut cx.sink, limits, (scenario, case), entries.collect())?;
    }
    Ok(())
}

fn shown(how: &How, load: Option<&str>) -> String {
    let server = match how {
        How::Idle => "blockferry serve -f raw SRC --export URI".to_owned(),
        How::Ours(options) => {
            let options = options.iter().map(|word| format!(" {word}")).collect::<String>();
            format!("blockferry mirror --force -f raw -F raw{options} SRC DST --export URI --follow")
        }
        How::Peer(Value::Null) => {
            "qemu-storage-daemon, export of SRC (aio=io_uring, cache.direct=on)".to_owned()
        }
        How::Peer(arguments) => {
            let mut job = json!({"job-id": "j", "device": "src", "target": "dst", "sync": "full"});
            merge(&mut job, arguments);
            format!(
                "qemu-storage-daemon, export of SRC (aio=io_uring, cache.direct=on), blockdev-mirror {job}"
            )
        }
    };
    match load {
        Some(load) => format!("{server}; client: blockferry bench --overwrite {load} --until-signal URI"),
        None => server,
    }
}

struct Run {
    blockferry: String,
    folder: PathBuf,
    load: Option<&'static str>,
    bytes: u64,
}

/// A running client.
pub struct Client(Option<Daemon>);

impl Client {
    /// Starts one with these options, at the server of this socket.
    pub fn start(blockferry: &str, load: &str, socket: &Path, folder: &Path) -> Fallible<Client> {
        let mut line = vec![blockferry.to_owned()];
        line.extend(words(&format!("--json bench --quiet --overwrite --until-signal {load}")));
        line.push(format!("nbd+unix:///?socket={}", socket.display()));
        Ok(Client(Some(Daemon::start(&line, &folder.join("client.out"))?)))
    }

    /// Ends it, and adds what it reports.
    pub fn end(self, values: &mut Values) -> Fallible<()> {
        let Some(client) = self.0 else { return Ok(()) };
        let (_, output) = client.end(Signal::INT)?;
        values.extend(own_report(&output)?);
        values.remove("operations");
        Ok(())
    }
}

impl Run {
    fn socket(&self) -> PathBuf {
        self.folder.join("nbd.sock")
    }

    fn client(&self) -> Fallible<Client> {
        match self.load {
            Some(load) => Client::start(&self.blockferry, load, &self.socket(), &self.folder),
            None => Ok(Client(None)),
        }
    }

    fn rest(&self) -> Fallible<()> {
        let end = Instant::now() + IDLE;
        while Instant::now() < end {
            stop::check()?;
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    fn idle(&self, source: &Path) -> Fallible<Values> {
        let mut line = vec![self.blockferry.clone()];
        line.extend(words("--json --stats serve -f raw"));
        line.extend([source.display().to_string(), "--export".to_owned()]);
        line.push(format!("nbd+unix:///?socket={}", self.socket().display()));
        let _ = std::fs::remove_file(self.socket());
        let server = Daemon::start(&line, &self.folder.join("server.out"))?;
        server.until_listening(&self.socket())?;
        let client = self.client()?;
        self.rest()?;
        let mut values = Values::new();
        client.end(&mut values)?;
        values.insert("rss-mib".to_owned(), server.rss_mib_max()?);
        let (_, output) = server.end(Signal::TERM)?;
        add_own_counters(&mut values, &output);
        Ok(values)
    }

    fn ours(&self, source: &Path, target: &Path, options: &[String]) -> Fallible<Values> {
        let mut line = vec![self.blockferry.clone()];
        line.extend(words("--json --stats mirror --quiet --force -f raw -F raw"));
        line.extend_from_slice(options);
        line.extend([source.display().to_string(), target.display().to_string(), "--export".to_owned()]);
        line.push(format!("nbd+unix:///?socket={}", self.socket().display()));
        line.push("--follow".to_owned());
        let _ = std::fs::remove_file(self.socket());
        let (server, mut lines) = Lines::of(&line, &self.folder.join("server.out"))?;
        let mut began = Instant::now();
        let deadline = began + PATIENCE;
        lines.until("\"running\"", deadline)?.ok_or("the job did not start")?;
        began = Instant::now();
        server.until_listening(&self.socket())?;
        let client = self.client()?;
        let ready = lines.until("BLOCK_JOB_READY", began + PATIENCE)?;
        let took = began.elapsed().as_secs_f64();
        let mut values = Values::new();
        values.insert("cpu-secs".to_owned(), server.cpu_secs()?);
        client.end(&mut values)?;
        values.insert("rss-mib".to_owned(), server.rss_mib_max()?);
        values.insert("is-ready".to_owned(), f64::from(u8::from(ready.is_some())));
        values.insert("ready-secs".to_owned(), took);
        if let Some(event) = ready {
            values.insert(
                "copied-to-size".to_owned(),
                event["data"]["offset"].as_f64().unwrap_or(0.0) / self.bytes as f64,
            );
        }
        stop::signal(server.pid(), Signal::INT);
        while lines.next(Instant::now() + Duration::from_secs(30))?.is_some() {}
        let (status, _, _) = server.wait()?;
        // 3: given up before it was ready.
        if !matches!(status.code(), Some(0 | 3)) {
            return Err(format!("`{}` ended with {status}", line.join(" ")).into());
        }
        for line in &lines.all {
            if let Some(bytes) = line["details"]["bytes-copied"].as_f64() {
                values.insert("copied-to-size".to_owned(), bytes / self.bytes as f64);
            }
            add_own_counters(&mut values, &line.to_string());
        }
        values.remove("inner-secs");
        Ok(values)
    }

    fn peer(&self, source: &Path, target: &Path, arguments: &Value) -> Fallible<Values> {
        let _ = std::fs::remove_file(self.socket());
        let mut qsd = Qsd::start(&self.folder, &[], &[])?;
        for (name, path) in [("src", source), ("dst", target)] {
            qsd.monitor.execute("blockdev-add", qsd::node(name, path, "io_uring")?)?;
        }
        let address =
            json!({"addr": {"type": "unix", "data": {"path": self.socket().display().to_string()}}});
        qsd.monitor.execute("nbd-server-start", address)?;
        let export = json!({"type": "nbd", "id": "e", "node-name": "src", "name": "", "writable": true});
        qsd.monitor.execute("block-export-add", export)?;
        let client = self.client()?;
        let mut values = Values::new();
        if arguments.is_null() {
            self.rest()?;
            client.end(&mut values)?;
            values.insert("rss-mib".to_owned(), qsd.daemon.rss_mib_max()?);
            return Ok(values);
        }
        std::thread::sleep(Duration::from_millis(30));
        let mut job = json!({"job-id": "j", "device": "src", "target": "dst", "sync": "full"});
        merge(&mut job, arguments);
        let (began, cpu) = (Instant::now(), qsd.daemon.cpu_secs()?);
        qsd.monitor.execute("blockdev-mirror", job)?;
        let ready = qsd.until_ready(began + PATIENCE)?;
        let took = began.elapsed().as_secs_f64();
        values.insert("cpu-secs".to_owned(), qsd.daemon.cpu_secs()? - cpu);
        client.end(&mut values)?;
        let jobs = qsd.monitor.execute("query-block-jobs", json!({}))?;
        let copied = jobs[0]["offset"].as_f64().unwrap_or(0.0) / self.bytes as f64;
        values.insert("copied-to-size".to_owned(), copied);
        values.insert("is-ready".to_owned(), f64::from(u8::from(ready)));
        values.insert("ready-secs".to_owned(), took);
        values.insert("rss-mib".to_owned(), qsd.daemon.rss_mib_max()?);
        qsd.cancel("j")?;
        Ok(values)
    }
}

/// What a program prints as JSON lines, read as it comes.
pub struct Lines {
    stream: UnixStream,
    buffer: Vec<u8>,
    pub all: Vec<Value>,
}

impl Lines {
    /// Starts a program whose lines are to be read.
    pub fn of(line: &[String], out: &Path) -> Fallible<(Daemon, Lines)> {
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_read_timeout(Some(Duration::from_millis(100)))?;
        let daemon = Daemon::start_into(line, out, std::os::fd::OwnedFd::from(theirs).into())?;
        Ok((daemon, Lines { stream: ours, buffer: Vec::new(), all: Vec::new() }))
    }

    /// The next one; `None` at the deadline or when the program has closed its output.
    pub fn next(&mut self, deadline: Instant) -> Fallible<Option<Value>> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                let value: Value = serde_json::from_slice(&line)?;
                self.all.push(value.clone());
                return Ok(Some(value));
            }
            stop::check()?;
            if Instant::now() >= deadline {
                return Ok(None);
            }
            let mut bytes = [0; 4096];
            match self.stream.read(&mut bytes) {
                Ok(0) => return Ok(None),
                Ok(n) => self.buffer.extend_from_slice(&bytes[..n]),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The first one that contains `text`.
    pub fn until(&mut self, text: &str, deadline: Instant) -> Fallible<Option<Value>> {
        while let Some(line) = self.next(deadline)? {
            if line.to_string().contains(text) {
                return Ok(Some(line));
            }
        }
        Ok(None)
    }
}
