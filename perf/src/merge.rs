//! Merging layers of a chain, live: our commit and stream, the jobs of qemu-storage-daemon, and `qemu-img` at rest; on
//! local files, and with a layer to which every request takes longer.
//!
//! Ours runs in a process of its own, this program again ([`child`]): it opens the chain as an embedder would, because
//! the layer with the latency is a `delay` node there; the peers have it behind nbdkit's delay filter.

use std::cell::RefCell;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use blockferry::block::{BlockError, IoFuture};
use blockferry::engine::{Engine, Format, ImageOptions};
use blockferry::format::qcow2::{Backing, OpenFiles, OpenOptions, Qcow2, Wanted};
use blockferry::graph::node::Node;
use blockferry::job::runner::Ending;
use blockferry::job::stream::Floor;
use blockferry::job::sweep::SweepOptions;
use blockferry_ring::rng::Rng;
use serde_json::{Value, json};

use crate::convert::{tool, write_clusters};
use crate::disks::{Loop, Mount, drop_cache, sync};
use crate::process::{Daemon, machine_busy_secs, run as run_tool};
use crate::qsd::Qsd;
use crate::result::Role;
use crate::rounds::{Contender, Context, Values, interleave};
use crate::{Fallible, stop};

const CLUSTER: u64 = 64 << 10;
const GIB: u64 = 1 << 30;

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// The layer below the active one goes down into the base.
    Intermediate,
    /// The active layer goes down into the base, until the job is ready.
    Active,
    /// What the base holds goes up into the active layer.
    Stream,
}

impl Work {
    pub fn name(self) -> &'static str {
        match self {
            Work::Intermediate => "intermediate commit",
            Work::Active => "active commit",
            Work::Stream => "stream",
        }
    }

    fn word(self) -> &'static str {
        match self {
            Work::Intermediate => "intermediate",
            Work::Active => "active",
            Work::Stream => "stream",
        }
    }
}

/// A full base, a quarter of it in random clusters over it, and an empty layer on top. Fields are dropped in this order.
pub struct Lab {
    xfs: Mount,
    _device: Loop,
    _tmpfs: Mount,
    bytes: u64,
}

impl Lab {
    pub fn new(folder: &Path, bytes: u64) -> Fallible<Lab> {
        let room = 4 * bytes + GIB;
        let tmpfs = Mount::tmpfs(&folder.join("tmpfs"), room + GIB / 4)?;
        let device = Loop::new(&tmpfs.path().join("disk.xfs"), room)?;
        let xfs = Mount::xfs(device.path(), &folder.join("xfs"))?;
        let lab = Lab { xfs, _device: device, _tmpfs: tmpfs, bytes };
        let (base, quarter) = (lab.path("base"), lab.path("quarter"));
        tool("qemu-img", &format!("create -q -f qcow2 {} {bytes}", base.display()))?;
        let all = bytes / CLUSTER;
        write_clusters(&base, &(0..all).collect::<Vec<_>>(), 1)?;
        tool("qemu-img", &format!("create -q -f qcow2 -b base -F qcow2 {} {bytes}", quarter.display()))?;
        let mut order: Vec<u64> = (0..all).collect();
        Rng::new(7).shuffle(&mut order);
        order.truncate(all as usize / 4);
        write_clusters(&quarter, &order, 2)?;
        Ok(lab)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.xfs.path().join(name)
    }

    /// The images as they are before the work, and nothing of them in memory.
    pub fn prepare(&self, work: Work) -> Fallible<()> {
        let (mid, top, quarter) = (self.path("mid"), self.path("top"), self.path("quarter"));
        let middle = if work == Work::Intermediate { &mid } else { &top };
        std::fs::copy(&quarter, middle)?;
        sync(middle)?;
        if work == Work::Intermediate {
            match std::fs::remove_file(&top) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
                _ => {}
            }
            let line = format!("create -q -f qcow2 -b mid -F qcow2 {} {}", top.display(), self.bytes);
            tool("qemu-img", &line)?;
            drop_cache(&mid)?;
        }
        drop_cache(&top)?;
        drop_cache(&self.path("base"))
    }

    /// The chain is what it is to be, and shows what it showed.
    fn verify(&self, work: Work) -> Fallible<()> {
        let top = self.path("top");
        for name in ["base", "top"] {
            tool("qemu-img", &format!("check -q -f qcow2 {}", self.path(name).display()))?;
        }
        // A commit has changed the base below: the quarter over it shows the same nevertheless.
        let shown = if work == Work::Active { self.path("base") } else { top };
        let (shown, quarter) = (shown.display(), self.path("quarter"));
        tool("qemu-img", &format!("compare -q -f qcow2 -F qcow2 {shown} {}", quarter.display()))
    }

    pub fn moved_bytes(&self, work: Work) -> u64 {
        if work == Work::Stream { self.bytes / 4 * 3 } else { self.bytes / 4 }
    }
}

/// The base behind a server that answers late, for the peers.
fn delayed_base(folder: &Path, base: &Path, latency: Duration) -> Fallible<(Daemon, PathBuf)> {
    let socket = folder.join("base.sock");
    let _ = std::fs::remove_file(&socket);
    let ms = latency.as_millis();
    let line = [
        "nbdkit".to_owned(),
        "-f".into(),
        "-U".into(),
        socket.display().to_string(),
        "--filter=delay".into(),
        "file".into(),
        base.display().to_string(),
        format!("rdelay={ms}ms"),
        format!("wdelay={ms}ms"),
    ];
    let server = Daemon::start(&line, &folder.join("nbdkit.out"))?;
    server.until_listening(&socket)?;
    Ok((server, socket))
}

pub fn file_node(path: &Path) -> Value {
    json!({
        "driver": "file", "filename": path.display().to_string(), "aio": "io_uring",
        "cache": {"direct": true, "no-flush": false}, "discard": "unmap",
    })
}

/// The daemon's command for it.
pub fn command_of(work: Work) -> (&'static str, Value) {
    match work {
        Work::Intermediate => (
            "block-commit",
            json!({"job-id": "j", "device": "top", "top-node": "mid", "base-node": "base", "backing-file": "base"}),
        ),
        Work::Active => ("block-commit", json!({"job-id": "j", "device": "top", "base-node": "base"})),
        Work::Stream => ("block-stream", json!({"job-id": "j", "device": "top"})),
    }
}

/// Has the daemon open the chain, over this base.
pub fn open_chain(qsd: &mut Qsd, lab: &Lab, work: Work, base_file: Value) -> Fallible<()> {
    let mut add = |name: &str, file: Value, backing: Option<&str>| {
        let mut node = json!({"driver": "qcow2", "node-name": name, "file": file, "backing": null});
        if let Some(backing) = backing {
            node["backing"] = json!(backing);
        }
        qsd.monitor.execute("blockdev-add", node).map(drop)
    };
    add("base", base_file, None)?;
    if work == Work::Intermediate {
        add("mid", file_node(&lab.path("mid")), Some("base"))?;
        add("top", file_node(&lab.path("top")), Some("mid"))
    } else {
        add("top", file_node(&lab.path("top")), Some("base"))
    }
}

/// A job of qemu-storage-daemon, until it is done, or ready.
fn by_daemon(lab: &Lab, folder: &Path, work: Work, latency: Duration) -> Fallible<Values> {
    let base_path = lab.path("base");
    let server = match latency.is_zero() {
        true => None,
        false => Some(delayed_base(folder, &base_path, latency)?),
    };
    let base_file = match &server {
        Some((_, socket)) => {
            json!({"driver": "nbd", "server": {"type": "unix", "path": socket.display().to_string()}})
        }
        None => file_node(&base_path),
    };
    let mut qsd = Qsd::start(folder, &[], &[])?;
    open_chain(&mut qsd, lab, work, base_file)?;
    let (command, arguments) = command_of(work);
    let (busy, cpu, began) = (machine_busy_secs()?, qsd.daemon.cpu_secs()?, Instant::now());
    qsd.monitor.execute(command, arguments)?;
    let deadline = began + Duration::from_secs(300);
    let event = qsd.monitor.event(&["BLOCK_JOB_READY", "BLOCK_JOB_COMPLETED"], deadline)?;
    let wall_secs = began.elapsed().as_secs_f64();
    stop::check()?;
    let event = event.ok_or("the job did not end in five minutes")?;
    if let Some(error) = event["data"]["error"].as_str() {
        return Err(error.to_owned().into());
    }
    let values = Values::from([
        ("wall-secs".to_owned(), wall_secs),
        ("cpu-secs".to_owned(), qsd.daemon.cpu_secs()? - cpu),
        ("busy-secs".to_owned(), machine_busy_secs()? - busy),
        ("rss-mib".to_owned(), qsd.daemon.rss_mib_max()?),
    ]);
    if work == Work::Active {
        qsd.monitor.execute("block-job-cancel", json!({"device": "j"}))?;
        qsd.monitor.event(&["BLOCK_JOB_COMPLETED"], Instant::now() + Duration::from_secs(30))?;
    }
    qsd.daemon.end(rustix::process::Signal::TERM)?;
    if let Some((server, _)) = server {
        server.end(rustix::process::Signal::TERM)?;
    }
    Ok(values)
}

/// A program that runs to its end, with what it says of itself.
fn by_tool(folder: &Path, line: &[String]) -> Fallible<Values> {
    let busy = machine_busy_secs()?;
    let ended = run_tool(line, &folder.join("tool.out"), &|| Ok(()))?;
    let mut values = Values::from([
        ("wall-secs".to_owned(), ended.wall_secs),
        ("cpu-secs".to_owned(), ended.usage.user_secs + ended.usage.sys_secs),
        ("busy-secs".to_owned(), machine_busy_secs()? - busy),
        ("rss-mib".to_owned(), ended.usage.rss_kib_max as f64 / 1024.0),
    ]);
    // Ours says how long the job itself took, as the daemon's is measured.
    if let Some(report) = ended.stdout.lines().find_map(|line| serde_json::from_str::<Value>(line).ok()) {
        for name in ["wall-secs", "cpu-secs"] {
            if let Some(value) = report[name].as_f64() {
                values.insert(name.to_owned(), value);
            }
        }
    }
    Ok(values)
}

/// Who does it.
#[derive(Clone, Copy, Debug)]
enum Who {
    Ours,
    Daemon,
    /// `qemu-img`, with these words before the image.
    Tool(&'static str),
}

fn contenders(work: Work, latency: Duration) -> Vec<(&'static str, Role, Who)> {
    let mut all = vec![("blockferry", Role::Ours, Who::Ours), ("QSD", Role::Peer, Who::Daemon)];
    if latency.is_zero() {
        match work {
            Work::Intermediate => {}
            Work::Active => {
                all.push(("qemu-img commit, none", Role::Peer, Who::Tool("commit -q -d -t none -f qcow2")));
            }
            Work::Stream => all.push((
                "qemu-img rebase, none",
                Role::Peer,
                Who::Tool("rebase -q -t none -T none -f qcow2 -b"),
            )),
        }
    }
    all
}

/// What is done, with which latency to the base, and what that is called.
pub fn cases() -> Vec<(Work, Duration, String)> {
    let works = [Work::Intermediate, Work::Active, Work::Stream];
    let case = |ms: u64, work: Work| match ms {
        0 => work.name().to_owned(),
        _ => format!("{}, {ms} ms to the base", work.name()),
    };
    [0, 1, 5]
        .into_iter()
        .flat_map(|ms| works.map(|work| (work, Duration::from_millis(ms), case(ms, work))))
        .collect()
}

/// Runs the scenario.
pub fn run(cx: &mut Context, scenario: &str) -> Fallible<()> {
    let bytes = if cx.quick { GIB / 8 } else { 2 * GIB };
    let lab = RefCell::new(Lab::new(&cx.folder, bytes)?);
    let (folder, perf) = (cx.folder.clone(), cx.perf.clone());
    let wanted: Vec<_> = cases().into_iter().filter(|(_, _, case)| cx.wants(case)).collect();
    for (work, latency, case) in wanted {
        let ms = latency.as_millis();
        let entries = contenders(work, latency).into_iter().map(|(name, role, who)| {
            let (lab, folder, perf) = (&lab, &folder, &perf);
            let shown = match who {
                Who::Ours => format!("blockferry-perf merge {} {} FOLDER", work.word(), latency.as_millis()),
                Who::Daemon => format!("qemu-storage-daemon, {}", work.name()),
                Who::Tool(words) => format!("qemu-img {words} TOP"),
            };
            Contender {
                name: name.to_owned(),
                role,
                command: shown,
                run: Box::new(move |warm_up| {
                    let lab = lab.borrow();
                    lab.prepare(work)?;
                    let mut values = match who {
                        Who::Daemon => by_daemon(&lab, folder, work, latency)?,
                        Who::Ours => {
                            let place = lab.xfs.path().display().to_string();
                            let line =
                                [perf.clone(), "merge".into(), work.word().into(), ms.to_string(), place];
                            by_tool(folder, &line)?
                        }
                        Who::Tool(words) => {
                            let mut line = vec!["qemu-img".to_owned()];
                            line.extend(words.split_whitespace().map(str::to_owned));
                            if work == Work::Stream {
                                line.push(String::new());
                            }
                            line.push(lab.path("top").display().to_string());
                            by_tool(folder, &line)?
                        }
                    };
                    crate::copy::a_gib(&mut values, lab.moved_bytes(work));
                    if warm_up {
                        lab.verify(work)?;
                    }
                    Ok(values)
                }),
            }
        });
        let limits = (cx.rounds_or(8), cx.seconds_max, cx.only.as_slice());
        let entries: Vec<Contender<'_>> = entries.collect();
        interleave(&mut cx.sink, limits, (scenario, &case), entries)?;
    }
    Ok(())
}

/// Nothing is opened by name: the chain is put together here.
#[derive(Debug)]
struct NoFiles;

impl OpenFiles for NoFiles {
    fn open<'a>(&'a self, wanted: Wanted<'a>) -> IoFuture<'a, Result<Rc<Node>, BlockError>> {
        unreachable!("'{}' is given", wanted.name)
    }
}

/// What the process under test is told on its command line.
#[derive(Debug, clap::Args)]
pub struct ChildArgs {
    /// intermediate, active or stream
    work: String,
    /// Milliseconds that a request to the base takes longer
    latency_ms: u64,
    /// Where the images are
    folder: PathBuf,
}

/// Opens the chain, does the work, and says how long it took.
pub fn child(args: &ChildArgs) -> Fallible<()> {
    let engine = Engine::new(&blockferry_ring::Config::default())?;
    let ring = engine.ring().clone();
    let path = |name: &str| args.folder.join(name).display().to_string();
    let base_name = match args.latency_ms {
        0 => path("base"),
        ms => format!("delay:{ms}ms:{}", path("base")),
    };
    let names: &[&str] = if args.work == "intermediate" { &["mid", "top"] } else { &["top"] };
    let layers: Vec<String> = names.iter().map(|name| path(name)).collect();
    let work = args.work.clone();
    let opened = engine.run(async move {
        let options =
            |read_only| ImageOptions { format: Some(Format::Qcow2), read_only, ..ImageOptions::default() };
        let mut node = blockferry::engine::open::open(&ring, &base_name, &options(true)).await?;
        for (i, layer) in layers.iter().enumerate() {
            let read_only = i + 1 < layers.len();
            let raw = ImageOptions { format: Some(Format::Raw), ..options(read_only) };
            let file = blockferry::engine::open::open(&ring, layer, &raw).await?;
            let open = OpenOptions { read_only, backing: Backing::Given(node), ..OpenOptions::default() };
            node = Node::of(&ring, Qcow2::open(&ring, &file, &NoFiles, open).await?);
        }
        Ok::<_, BlockError>(node.called("disk"))
    })?;
    let cpu = || crate::sys::cpu_secs(std::process::id() as i32);
    let (cpu_before, began) = (cpu()?, Instant::now());
    let options = SweepOptions { auto_dismiss: false, ..SweepOptions::new("job") };
    let chain = opened.chain();
    let job = match work.as_str() {
        "intermediate" => engine.start_commit(&opened, Some(&chain[1]), None, options),
        "active" => engine.start_commit(&opened, None, None, options),
        "stream" => engine.start_stream(&opened, None, Floor::Whole, options),
        other => return Err(format!("what is '{other}'?").into()),
    };
    let is_active = work == "active";
    let ending = engine.run(async move {
        let job = job.take().await.map_err(|error| error.to_string())?;
        if is_active {
            job.until_ready().await;
        } else {
            job.until_over().await;
        }
        let at = Instant::now();
        if is_active {
            job.cancel(false).map_err(|error| error.to_string())?;
        }
        Ok::<_, String>((job.until_over().await, at))
    });
    let (ending, at) = ending?;
    if ending != Ending::Completed {
        return Err(format!("{ending:?}").into());
    }
    let report = json!({
        "wall-secs": (at - began).as_secs_f64(),
        "cpu-secs": cpu()? - cpu_before,
    });
    writeln!(std::io::stdout(), "{report}")?;
    Ok(())
}
