//! Images on GlusterFS: large requests in order and small ones at random, at depth 1 and 16, through our driver, through
//! fio's engines on the same client library, and through a FUSE mount.
//!
//! A GlusterFS of one brick on a tmpfs is set up in a network namespace of its own, so that what is measured is clients,
//! brick and the way between them, and not a disk. fio's engines and our driver use the same library; what differs is how
//! its completions are waited for. The mount goes through the kernel.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::disks::{Content, Mount, make_file};
use crate::nbd::{fio_report, own_report};
use crate::process::{machine_busy_secs, run as run_tool};
use crate::result::Role;
use crate::rounds::{Contender, Context, Values, interleave};
use crate::{Fallible, copy};

const VOLUME: &str = "perf";
const ADDRESS: &str = "1.2.3.4";
/// How long anything may take to come up or to go.
const PATIENCE: Duration = Duration::from_secs(30);

struct Case {
    name: &'static str,
    write: bool,
    random: bool,
    kib: u32,
    depth: u32,
}

const fn case(name: &'static str, write: bool, random: bool, kib: u32, depth: u32) -> Case {
    Case { name, write, random, kib, depth }
}

const CASES: [Case; 8] = [
    case("read 1 MiB in order, depth 1", false, false, 1024, 1),
    case("read 1 MiB in order, depth 16", false, false, 1024, 16),
    case("write 1 MiB in order, depth 1", true, false, 1024, 1),
    case("write 1 MiB in order, depth 16", true, false, 1024, 16),
    case("read 4 KiB at random, depth 1", false, true, 4, 1),
    case("read 4 KiB at random, depth 16", false, true, 4, 16),
    case("write 4 KiB at random, depth 1", true, true, 4, 1),
    case("write 4 KiB at random, depth 16", true, true, 4, 16),
];

/// A GlusterFS; taken down when it goes. Fields are dropped in this order.
struct Gluster {
    folder: PathBuf,
    namespace: String,
    mounted: bool,
}

fn order(program: &str, arguments: &[&str]) -> Fallible<()> {
    let output =
        Command::new(program).args(arguments).output().map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(format!("{program} {}: {}", arguments.join(" "), text.trim()).into())
}

impl Gluster {
    /// Bricks lie in `brick`.
    fn start(folder: &Path, brick: &Path) -> Fallible<Gluster> {
        let namespace = format!("bf-perf-{}", std::process::id());
        let mut gluster = Gluster { folder: folder.to_owned(), namespace, mounted: false };
        let name = gluster.namespace.clone();
        order("ip", &["netns", "add", &name])?;
        let ip = |arguments: &[&str]| order("ip", &[&["-n", &name], arguments].concat());
        ip(&["link", "set", "lo", "up"])?;
        ip(&["link", "add", "v0", "type", "veth", "peer", "name", "v1"])?;
        ip(&["addr", "add", &format!("{ADDRESS}/24"), "dev", "v0"])?;
        ip(&["link", "set", "v0", "up"])?;
        ip(&["link", "set", "v1", "up"])?;
        for name in ["work", "run", "log/bricks", "mnt"] {
            std::fs::create_dir_all(gluster.path(name))?;
        }
        let volfile = format!(
            "volume management\n    type mgmt/glusterd\n    option working-directory {}\n    \
             option transport-type socket\n    option transport.socket.listen-port 24007\n    \
             option glusterd-sockfile {}\n    option max-port 60999\nend-volume\n",
            gluster.text("work"),
            gluster.text("glusterd.socket"),
        );
        std::fs::write(gluster.path("glusterd.vol"), volfile)?;
        let script = format!(
            "mkdir -p /var/run/gluster /var/log/glusterfs && mount --bind '{}' /var/run/gluster && \
             mount --bind '{}' /var/log/glusterfs && exec glusterd -f '{}' --log-file '{}' -p '{}'",
            gluster.text("run"),
            gluster.text("log"),
            gluster.text("glusterd.vol"),
            gluster.text("log/glusterd.log"),
            gluster.text("glusterd.pid"),
        );
        gluster.inside("sh", &["-c", &script])?;
        until("the daemon answers", || gluster.tell(&["volume", "list"]).is_ok())?;
        let brick = format!("{ADDRESS}:{}", brick.display());
        gluster.tell(&["volume", "create", VOLUME, "transport", "tcp", &brick, "force"])?;
        gluster.tell(&["volume", "start", VOLUME])?;
        let log = format!("log-file={}", gluster.text("log/mnt.log"));
        let (net, what) = (format!("--net=/run/netns/{name}"), format!("{ADDRESS}:/{VOLUME}"));
        order("nsenter", &[&net, "mount", "-t", "glusterfs", "-o", &log, &what, &gluster.text("mnt")])?;
        gluster.mounted = true;
        Ok(gluster)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn inside(&self, program: &str, arguments: &[&str]) -> Fallible<()> {
        order("ip", &[&["netns", "exec", &self.namespace, program], arguments].concat())
    }

    fn tell(&self, arguments: &[&str]) -> Fallible<()> {
        let socket = format!("--glusterd-sock={}", self.text("glusterd.socket"));
        let log = format!("--log-file={}", self.text("log/cli.log"));
        self.inside("gluster", &[&["--mode=script", &socket, &log], arguments].concat())
    }

    /// The daemons that have written down their ids, the one first that starts the others.
    fn pids(&self) -> Vec<Pid> {
        let mut files = vec![self.path("glusterd.pid")];
        let mut folders = vec![self.path("run")];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                match entry.path() {
                    path if path.is_dir() => folders.push(path),
                    path if path.extension().is_some_and(|end| end == "pid") => files.push(path),
                    _ => {}
                }
            }
        }
        let number = |file: &PathBuf| std::fs::read_to_string(file).ok()?.trim().parse::<i32>().ok();
        files.iter().filter_map(number).filter(|pid| is_ours(*pid)).filter_map(Pid::from_raw).collect()
    }
}

/// Whether a process of GlusterFS has this id, and runs.
fn is_ours(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.contains("(gluster") && stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

fn until(what: &str, mut is_it: impl FnMut() -> bool) -> Fallible<()> {
    let end = Instant::now() + PATIENCE;
    while !is_it() {
        crate::stop::check()?;
        if Instant::now() >= end {
            return Err(format!("this did not come: {what}").into());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

impl Drop for Gluster {
    fn drop(&mut self) {
        if self.mounted {
            let _ = order("umount", &["-l", &self.text("mnt")]);
        }
        for pid in self.pids() {
            let _ = kill_process(pid, Signal::KILL);
        }
        let end = Instant::now() + PATIENCE;
        while !self.pids().is_empty() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = order("ip", &["netns", "del", &self.namespace]);
    }
}

/// Runs the scenario.
pub fn run(cx: &mut Context, scenario: &str) -> Fallible<()> {
    let bytes: u64 = if cx.quick { 128 << 20 } else { 1 << 30 };
    let secs = if cx.quick { 1 } else { 3 };
    let tmpfs = Mount::tmpfs(&cx.folder.join("tmpfs"), bytes + (256 << 20))?;
    let brick = tmpfs.path().join("brick");
    std::fs::create_dir(&brick)?;
    let gluster = Gluster::start(&cx.folder, &brick)?;
    make_file(&gluster.path("mnt/disk.img"), bytes)?;
    Content::Random(1).fill(&gluster.path("mnt/disk.img"), bytes)?;
    for case in &CASES {
        let (folder, blockferry) = (cx.folder.clone(), cx.blockferry.clone());
        let lines = contenders(case, secs, bytes);
        let entries = lines.into_iter().map(|(name, role, command)| {
            let (gluster, folder, blockferry) = (&gluster, &folder, blockferry.clone());
            let line = command.replace("MNT", &gluster.text("mnt"));
            Contender {
                name: name.to_owned(),
                role,
                command,
                run: Box::new(move |_| once(&line, role, &gluster.namespace, folder, &blockferry)),
            }
        });
        let limits = (cx.rounds_or(5), cx.seconds_max, cx.only.as_slice());
        interleave(&mut cx.sink, limits, (scenario, case.name), entries.collect())?;
    }
    drop(gluster);
    drop(tmpfs);
    Ok(())
}

fn contenders(case: &Case, secs: u32, bytes: u64) -> Vec<(&'static str, Role, String)> {
    let Case { write, random, kib, depth, .. } = *case;
    let (percent, pattern) = (if write { 0 } else { 100 }, if random { "random" } else { "sequential" });
    let rw = format!("{}{}", if random { "rand" } else { "" }, if write { "write" } else { "read" });
    let fio = format!(
        "fio --name=c --rw={rw} --bs={kib}k --iodepth={depth} --time_based --runtime={secs} --size={bytes} \
         --norandommap --randrepeat=0 --output-format=json --percentile_list=50:99:99.9"
    );
    let library = format!("--volume={VOLUME} --brick={ADDRESS} --filename=disk.img");
    let ours = format!(
        "blockferry --json --stats bench --quiet --overwrite -t {secs}s -d {depth} -b {kib}KiB -p {percent} --pattern {pattern} \
         gluster://{ADDRESS}/{VOLUME}/disk.img"
    );
    let mut all = vec![
        ("blockferry bench", Role::Ours, ours),
        ("fio, gfapi_async", Role::Peer, format!("{fio} --ioengine=gfapi_async {library}")),
        ("fio, FUSE mount", Role::Peer, format!("{fio} --ioengine=io_uring --filename=MNT/disk.img")),
    ];
    if depth == 1 {
        // It does one thing at a time, whatever depth is said.
        all.push(("fio, gfapi", Role::Peer, format!("{fio} --ioengine=gfapi {library}")));
    }
    all
}

fn once(command: &str, role: Role, namespace: &str, folder: &Path, blockferry: &str) -> Fallible<Values> {
    let mut line: Vec<String> = ["ip", "netns", "exec", namespace].map(str::to_owned).into();
    line.extend(command.split_whitespace().map(|word| match word {
        "blockferry" => blockferry.to_owned(),
        word => word.to_owned(),
    }));
    let busy = machine_busy_secs()?;
    let ended = run_tool(&line, &folder.join("tool.out"), &|| Ok(()))?;
    let busy = machine_busy_secs()? - busy;
    let mut values = match role {
        Role::Ours => own_report(&ended.stdout)?,
        _ => fio_report(&ended.stdout)?,
    };
    let operations = values.remove("operations").ok_or("the client counted nothing")?.max(1.0);
    let cpu = ended.usage.user_secs + ended.usage.sys_secs;
    values.insert("cpu-us-an-io".to_owned(), cpu * 1e6 / operations);
    values.insert("busy-us-an-io".to_owned(), busy * 1e6 / operations);
    if role == Role::Ours {
        copy::add_own_counters(&mut values, &ended.stdout);
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_contender_does_the_same_work() {
        let lines = contenders(&CASES[5], 3, 1 << 20);
        assert_eq!(lines.len(), 3);
        assert!(lines[0].2.contains("-d 16 -b 4KiB -p 100 --pattern random gluster://1.2.3.4/perf/disk.img"));
        assert!(lines.iter().skip(1).all(|line| line.2.contains("--rw=randread --bs=4k --iodepth=16")));
        let lines = contenders(&CASES[2], 3, 1 << 20);
        assert!(lines[0].2.contains("-p 0 --pattern sequential"));
        assert!(lines.len() == 4 && lines[3].2.contains("--rw=write --bs=1024k --iodepth=1 "));
    }
}
