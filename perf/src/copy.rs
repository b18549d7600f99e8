//! Copying a disk at rest: ours, the peers' mirrors and copy tools, and the bare loop.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::disks::{Content, Loop, Mount, Zram, drop_cache, make_file, sync};
use crate::process::{self, Counter, counted, counts, machine_busy_secs};
use crate::qsd::{self, Qsd};
use crate::result::Role;
use crate::rounds::{Contender, Context, Values, interleave};
use crate::{Fallible, stop};

/// Between what is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Media {
    /// Loop devices with direct I/O on files of a tmpfs.
    LoopOnTmpfs,
    /// zram devices.
    Zram,
    /// Files in the scratch folder.
    Files,
    /// Files on two XFS, each on a loop device on tmpfs; the target is made anew each time.
    FreshXfsFiles,
}

/// One scenario of copying.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub media: Media,
    pub content: Content,
    pub bytes: u64,
    /// All contenders on one CPU.
    pub pinned: bool,
    pub rounds: usize,
    /// Leave out those who need minutes here.
    pub fast_only: bool,
}

/// The CPU that pinned contenders run on: not the one that interrupts usually go to.
const CPU: &str = "1";

impl Setup {
    /// Bytes that are data.
    fn data_bytes(&self, bytes: u64) -> u64 {
        match self.content {
            Content::Tenth(_) => (bytes >> 20).div_ceil(10) << 20,
            Content::Half(_) => bytes / 2,
            _ => bytes,
        }
    }

    fn other_content(&self) -> Content {
        match self.content {
            Content::Random(seed) | Content::Tenth(seed) | Content::Half(seed) => Content::Random(seed + 1),
            Content::SameFilled(seed) => Content::SameFilled(seed + 1),
        }
    }
}

/// The disks of a scenario; fields are dropped in this order.
enum Disks {
    Loops { source: Loop, target: Loop, _tmpfs: Mount },
    Zrams { source: Zram, target: Zram },
    Files { source: PathBuf, target: PathBuf },
    Xfs { source: Mount, target: Option<Mount>, loops: [Loop; 2], _tmpfs: Mount },
}

impl Disks {
    fn new(setup: &Setup, folder: &Path, bytes: u64) -> Fallible<Disks> {
        let room = 64 << 20;
        let tmpfs = |bytes: u64| Mount::tmpfs(&folder.join("tmpfs"), bytes);
        let disks = match setup.media {
            Media::LoopOnTmpfs => {
                let tmpfs = tmpfs(2 * bytes + room)?;
                let source = Loop::new(&tmpfs.path().join("source.img"), bytes)?;
                let target = Loop::new(&tmpfs.path().join("target.img"), bytes)?;
                Disks::Loops { source, target, _tmpfs: tmpfs }
            }
            Media::Zram => Disks::Zrams { source: Zram::new(bytes)?, target: Zram::new(bytes)? },
            Media::Files => {
                let files = [folder.join("source.img"), folder.join("target.img")];
                files.iter().try_for_each(|file| make_file(file, bytes))?;
                let [source, target] = files;
                Disks::Files { source, target }
            }
            Media::FreshXfsFiles => {
                // Room for all of the file: a contender may reserve space for what it makes zero.
                let device_bytes = 2 * bytes + (4 << 30);
                let data_bytes = setup.data_bytes(bytes);
                let tmpfs = tmpfs(8 * data_bytes + (1 << 30))?;
                let loops = [
                    Loop::new(&tmpfs.path().join("source.xfs"), device_bytes)?,
                    Loop::new(&tmpfs.path().join("target.xfs"), device_bytes)?,
                ];
                let source = Mount::xfs(loops[0].path(), &folder.join("source"))?;
                let target = Some(Mount::xfs(loops[1].path(), &folder.join("target"))?);
                make_file(&source.path().join("disk.img"), bytes)?;
                Disks::Xfs { source, target, loops, _tmpfs: tmpfs }
            }
        };
        setup.content.fill(&disks.source(), bytes)?;
        Ok(disks)
    }

    fn source(&self) -> PathBuf {
        match self {
            Disks::Loops { source, .. } => source.path().to_owned(),
            Disks::Zrams { source, .. } => source.path().to_owned(),
            Disks::Files { source, .. } => source.clone(),
            Disks::Xfs { source, .. } => source.path().join("disk.img"),
        }
    }

    fn target(&self) -> PathBuf {
        match self {
            Disks::Loops { target, .. } => target.path().to_owned(),
            Disks::Zrams { target, .. } => target.path().to_owned(),
            Disks::Files { target, .. } => target.clone(),
            Disks::Xfs { target, .. } => {
                target.as_ref().map_or_else(PathBuf::new, |mount| mount.path().join("disk.img"))
            }
        }
    }

    /// Before each run. In the round of warming up the target gets other data, so that a copy can be told from what was
    /// there.
    fn prepare(&mut self, setup: &Setup, bytes: u64, warm_up: bool) -> Fallible<()> {
        match self {
            Disks::Loops { target, .. } => target.renew()?,
            Disks::Xfs { target, loops, .. } => {
                // A new filesystem puts files where the last one did, on memory that has been touched.
                if let Some(mount) = target.take() {
                    let place = mount.path().to_owned();
                    drop(mount);
                    let mount = target.insert(Mount::xfs(loops[1].path(), &place)?);
                    make_file(&mount.path().join("disk.img"), bytes)?;
                }
            }
            _ => {}
        }
        if warm_up && setup.media != Media::FreshXfsFiles {
            setup.other_content().fill(&self.target(), bytes)?;
        }
        sync(&self.target())?;
        drop_cache(&self.source())?;
        drop_cache(&self.target())
    }
}

/// How somebody copies.
#[derive(Clone, Debug)]
enum How {
    /// A command that ends; `durable` if its work is durable then.
    Tool { line: Vec<String>, durable: bool, ours: bool },
    /// A job of qemu-storage-daemon, with this kind of asynchronous I/O and these arguments.
    Job { aio: &'static str, arguments: Value },
}

pub fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

const CONVERT_DIRECT: &str = "qemu-img convert -n -f raw -O raw -t none -T none";

fn contenders(cx: &Context, setup: &Setup) -> Vec<(String, Role, How)> {
    let mut all = Vec::new();
    let tool = |line: &str, durable: bool| How::Tool { line: words(line), durable, ours: false };
    let ours = |options: &[String]| {
        let mut line = vec![cx.blockferry.clone()];
        line.extend(words("--json --stats mirror --quiet --force -f raw -F raw"));
        line.extend_from_slice(options);
        line.extend(words("SRC DST"));
        How::Tool { line, durable: true, ours: true }
    };
    all.push(("blockferry mirror".to_owned(), Role::Ours, ours(&[])));
    for (name, options) in &cx.variants {
        all.push((format!("blockferry mirror, {name}"), Role::Ours, ours(options)));
    }
    let tuned = json!({"granularity": 1 << 20, "buf-size": 64 << 20});
    for aio in ["io_uring", "native"] {
        all.push((format!("QSD mirror, {aio}"), Role::Peer, How::Job { aio, arguments: json!({}) }));
    }
    all.push((
        "QSD mirror, io_uring, granularity=1M buf-size=64M".to_owned(),
        Role::Peer,
        How::Job { aio: "io_uring", arguments: tuned },
    ));
    let mut peer = |name: &str, role, how| all.push((name.to_owned(), role, how));
    if !setup.fast_only {
        peer("qemu-img convert", Role::Buffered, tool("qemu-img convert -n -f raw -O raw SRC DST", false));
        peer("qemu-img convert, none", Role::Peer, tool(&format!("{CONVERT_DIRECT} SRC DST"), true));
        peer("nbdcopy", Role::Buffered, tool("nbdcopy --flush SRC DST", true));
    }
    let wide = format!("{CONVERT_DIRECT} -m 16 -W SRC DST");
    peer("qemu-img convert, none, -m 16 -W", Role::Peer, tool(&wide, true));
    let sparse = matches!(setup.content, Content::Tenth(_));
    if !sparse {
        let dd = "dd if=SRC of=DST bs=4M iflag=direct oflag=direct conv=notrunc,fdatasync status=none";
        peer("dd, direct", Role::Peer, tool(dd, true));
    }
    let mut bare = |name: &str, options: &str| {
        let mut line = vec![cx.perf.clone()];
        line.extend(words(&format!("bare-copy {options}")));
        if sparse {
            line.push("--sparse".into());
        }
        line.extend(words("SRC DST"));
        peer(name, Role::Limit, How::Tool { line, durable: true, ours: false });
    };
    bare("bare ring, 16 × 256 KiB", "--depth 16 --block 256KiB");
    bare("bare ring, 16 × 1 MiB", "--depth 16 --block 1MiB");
    if !setup.pinned {
        bare("two bare rings, 8 × 256 KiB each", "--threads 2 --depth 8 --block 256KiB");
    }
    all
}

/// What reports show: programs by their names, disks as SRC and DST.
fn shown(how: &How, before: &[String]) -> String {
    match how {
        How::Tool { line, durable, .. } => {
            let mut line = line.clone();
            if let Some(name) = Path::new(&line[0]).file_name() {
                line[0] = name.to_string_lossy().into_owned();
            }
            let after = if *durable { "" } else { ", then fsync of DST" };
            format!("{}{after}", [before, &line].concat().join(" "))
        }
        How::Job { aio, arguments } => {
            let mut job = json!({"job-id": "j", "device": "src", "target": "dst", "sync": "full"});
            merge(&mut job, arguments);
            format!(
                "{}; both nodes raw with aio={aio}, cache.direct=on, discard=unmap; blockdev-mirror {job}, until \
                 BLOCK_JOB_READY",
                [before, &words("qemu-storage-daemon --chardev socket,… --monitor chardev=c")]
                    .concat()
                    .join(" ")
            )
        }
    }
}

/// Adds the members of one object to another.
pub fn merge(object: &mut Value, more: &Value) {
    if let (Some(object), Some(more)) = (object.as_object_mut(), more.as_object()) {
        object.extend(more.clone());
    }
}

/// Runs the scenario.
pub fn run(cx: &mut Context, name: &str, setup: &Setup) -> Fallible<()> {
    let bytes = if cx.quick { (setup.bytes / 16).max(256 << 20) } else { setup.bytes };
    let before = if setup.pinned { words(&format!("taskset -c {CPU}")) } else { Vec::new() };
    let disks = std::cell::RefCell::new(Disks::new(setup, &cx.folder, bytes)?);
    let (folder, is_counted) = (cx.folder.clone(), cx.counted);
    let list = contenders(cx, setup);
    let entries = list.into_iter().map(|(name, role, how)| {
        let (disks, before, folder) = (&disks, &before, &folder);
        Contender {
            name,
            role,
            command: shown(&how, before),
            run: Box::new(move |warm_up| {
                disks.borrow_mut().prepare(setup, bytes, warm_up)?;
                let (source, target) = (disks.borrow().source(), disks.borrow().target());
                let task =
                    Task { source: &source, target: &target, before, folder, count: warm_up && is_counted };
                let mut values = match &how {
                    How::Tool { line, durable, ours } => task.tool(line, *durable, *ours)?,
                    How::Job { aio, arguments } => {
                        let nodes = [qsd::node("src", &source, aio)?, qsd::node("dst", &target, aio)?];
                        task.job(nodes, arguments)?
                    }
                };
                a_gib(&mut values, setup.data_bytes(bytes));
                if warm_up {
                    setup.content.check(&target, bytes)?;
                }
                Ok(values)
            }),
        }
    });
    let limits = (cx.rounds_or(setup.rounds), cx.seconds_max, cx.only.as_slice());
    interleave(&mut cx.sink, limits, (name, ""), entries.collect())
}

/// Turns what was counted over the whole run into what it is a GiB.
pub fn a_gib(values: &mut Values, bytes: u64) {
    let gib = bytes as f64 / f64::from(1 << 30);
    for (from, to) in [
        ("cpu-secs", "cpu-secs-a-gib"),
        ("busy-secs", "busy-secs-a-gib"),
        ("syscalls", "syscalls-a-gib"),
        ("switches", "switches-a-gib"),
    ] {
        if let Some(value) = values.remove(from) {
            values.insert(to.to_owned(), value / gib);
        }
    }
    if let Some(wall) = values.get("wall-secs") {
        values.insert("mib-a-sec".to_owned(), gib * 1024.0 / wall);
    }
}

/// One run.
#[derive(Clone, Copy, Debug)]
pub struct Task<'a> {
    /// A path, or a URI.
    pub source: &'a Path,
    pub target: &'a Path,
    /// What goes before command lines.
    pub before: &'a [String],
    /// Where output goes.
    pub folder: &'a Path,
    /// Count system calls.
    pub count: bool,
}

impl Task<'_> {
    /// Runs a command, in which SRC and DST stand for the disks.
    pub fn tool(&self, line: &[String], durable: bool, ours: bool) -> Fallible<Values> {
        let place = |word: &String| match word.as_str() {
            "SRC" => self.source.display().to_string(),
            "DST" => self.target.display().to_string(),
            other => other
                .replace("=SRC", &format!("={}", self.source.display()))
                .replace("=DST", &format!("={}", self.target.display())),
        };
        let mut line: Vec<String> = self.before.iter().cloned().chain(line.iter().map(place)).collect();
        let count_file = self.folder.join("counts");
        if self.count {
            line = counted(&line, &count_file);
        }
        let busy = machine_busy_secs()?;
        let after = || if durable { Ok(()) } else { sync(self.target) };
        let ended = process::run(&line, &self.folder.join("tool.out"), &after)?;
        let mut values = Values::from([
            ("wall-secs".to_owned(), ended.wall_secs),
            ("cpu-secs".to_owned(), ended.usage.user_secs + ended.usage.sys_secs),
            ("busy-secs".to_owned(), machine_busy_secs()? - busy),
            ("rss-mib".to_owned(), ended.usage.rss_kib_max as f64 / 1024.0),
            ("switches".to_owned(), ended.usage.switches as f64),
        ]);
        if self.count {
            add_counts(&mut values, counts(&count_file));
        }
        if ours {
            add_own_counters(&mut values, &ended.stdout);
        }
        Ok(values)
    }

    /// Runs a mirror job of qemu-storage-daemon between two nodes, `src` and `dst`, until it is ready.
    pub fn job(&self, nodes: [Value; 2], arguments: &Value) -> Fallible<Values> {
        let mut qsd = Qsd::start(self.folder, self.before, &[])?;
        for node in nodes {
            qsd.monitor.execute("blockdev-add", node)?;
        }
        let counter = match self.count {
            true => Some(Counter::attach(qsd.daemon.pid(), &self.folder.join("counts"))?),
            false => None,
        };
        let mut job = json!({"job-id": "j", "device": "src", "target": "dst", "sync": "full"});
        merge(&mut job, arguments);
        let (busy, cpu) = (machine_busy_secs()?, qsd.daemon.cpu_secs()?);
        let began = Instant::now();
        qsd.monitor.execute("blockdev-mirror", job)?;
        let deadline = began + Duration::from_secs(180);
        let ready = qsd.until_ready(deadline)?;
        let wall_secs = began.elapsed().as_secs_f64();
        stop::check()?;
        if !ready {
            return Err("the job did not become ready in three minutes".into());
        }
        let mut values = Values::from([
            ("wall-secs".to_owned(), wall_secs),
            ("cpu-secs".to_owned(), qsd.daemon.cpu_secs()? - cpu),
            ("busy-secs".to_owned(), machine_busy_secs()? - busy),
            ("rss-mib".to_owned(), qsd.daemon.rss_mib_max()?),
        ]);
        if let Some(counter) = counter {
            add_counts(&mut values, counter.end()?);
        }
        qsd.cancel("j")?;
        let (usage, _) = qsd.daemon.end(rustix::process::Signal::TERM)?;
        values.entry("switches".to_owned()).or_insert(usage.switches as f64);
        Ok(values)
    }
}

fn add_counts(values: &mut Values, counts: Option<(f64, f64)>) {
    if let Some((syscalls, switches)) = counts {
        values.insert("syscalls".to_owned(), syscalls);
        values.insert("switches".to_owned(), switches);
    }
}

/// What `--json --stats` of ours says.
pub fn add_own_counters(values: &mut Values, stdout: &str) {
    for line in stdout.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
        let names = [
            ("fixed-share", "fixed-share"),
            ("enters-per-1000-operations", "enters-per-1000"),
            ("batch-mean", "batch-mean"),
            ("batch-max", "batch-max"),
            ("heap-allocations-an-operation", "allocations-an-operation"),
        ];
        for (theirs, name) in names {
            if let Some(value) = line["stats"][theirs].as_f64() {
                values.insert(name.to_owned(), value);
            }
        }
        if let Some(elapsed) = line["elapsed-ns"].as_f64().filter(|_| line["event"] == "end") {
            values.insert("inner-secs".to_owned(), elapsed / 1e9);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_counters_are_read_and_the_rest_is_ignored() {
        let mut values = Values::new();
        add_own_counters(
            &mut values,
            "noise\n{\"event\":\"end\",\"elapsed-ns\":2000000000}\n{\"event\":\"progress\",\"elapsed-ns\":9}\n\
             {\"event\":\"stats\",\"stats\":{\"fixed-share\":1.0,\"batch-mean\":7.5,\"operations\":3}}\n",
        );
        let expected = [("batch-mean", 7.5), ("fixed-share", 1.0), ("inner-secs", 2.0)];
        assert_eq!(values, expected.map(|(name, value)| (name.to_owned(), value)).into());
    }

    #[test]
    fn figures_are_a_gib_of_data() {
        let mut values = Values::from([("cpu-secs".to_owned(), 1.0), ("wall-secs".to_owned(), 2.0)]);
        a_gib(&mut values, 2 << 30);
        let expected = [("cpu-secs-a-gib", 0.5), ("mib-a-sec", 1024.0), ("wall-secs", 2.0)];
        assert_eq!(values, expected.map(|(name, value)| (name.to_owned(), value)).into());
    }

    #[test]
    fn command_lines_are_shown_whole() {
        let line = words("/somewhere/tool --a SRC DST");
        let how = How::Tool { line, durable: false, ours: false };
        assert_eq!(shown(&how, &words("taskset -c 1")), "taskset -c 1 tool --a SRC DST, then fsync of DST");
        let how = How::Job { aio: "native", arguments: json!({"buf-size": 5}) };
        assert!(shown(&how, &[]).contains("\"sync\":\"full\",\"buf-size\":5}"));
    }
}
