//! A real GlusterFS in a network namespace: a management daemon, a volume of one brick and one of two copies.
//!
//! Everything of it lies in one folder and one namespace. The daemons see that folder in place of the machine's own
//! (`/var/run/gluster`, `/var/log/glusterfs`), by mounts of their own; they write down their process ids there, and are
//! ended by these when the lab goes, also when a test panics. The addresses are those of the examples in QEMU's manual:
//! 1.2.3.4 and 1:2:3:4:5:6:7:8 on a veth pair that leads nowhere, server.domain.com by the namespace's own hosts file.
//!
//! Needs root, `glusterd`, `gluster`, `mount.glusterfs`, `ip`, `nsenter`, `unshare`.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use serde_json::Value;

use super::image::Scratch;
use super::{Ended, PATIENCE, Process, command_path, tool};

/// The volume of one brick.
pub const PLAIN: &str = "testvol";
/// The volume of two copies.
pub const TWICE: &str = "twovol";
/// Where one example looks for the daemon's socket.
pub const SOCKET: &str = "/tmp/glusterd.socket";
/// The brick of [`PLAIN`], those of [`TWICE`].
pub const BRICKS: [&str; 3] = ["plain", "first", "second"];

const ADDRESS: &str = "1:2:3:4:5:6:7:8";
/// What a lab's namespace is called, before the id of its process.
const NAMESPACE: &str = "bf-gluster-";

/// See the head of this file.
#[derive(Debug)]
pub struct Lab {
    scratch: Scratch,
    namespace: String,
    /// Mount points.
    mounted: Vec<PathBuf>,
}

impl Lab {
    /// Starts all of it.
    pub fn start() -> Lab {
        let namespace = format!("{NAMESPACE}{}", std::process::id());
        clear_away_the_killed();
        // From here on whatever stands is taken down again when this goes.
        let mut lab = Lab { scratch: Scratch::new(), namespace, mounted: Vec::new() };
        lab.make_namespace();
        lab.start_daemon();
        let brick = |name: &str| format!("{ADDRESS}:{}", lab.path(name));
        let (plain, first, second) = (brick(BRICKS[0]), brick(BRICKS[1]), brick(BRICKS[2]));
        lab.gluster(&["volume", "create", PLAIN, "transport", "tcp", &plain, "force"]);
        lab.gluster(&[
            "volume",
            "create",
            TWICE,
            "replica",
            "2",
            "transport",
            "tcp",
            &first,
            &second,
            "force",
        ]);
        for volume in [PLAIN, TWICE] {
            lab.gluster(&["volume", "start", volume]);
            lab.mount(volume);
        }
        lab
    }

    /// A path in the lab's folder.
    pub fn path(&self, name: &str) -> String {
        self.scratch.path(name)
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        self.scratch.dir()
    }

    /// A file of a volume, as FUSE shows it.
    pub fn seen(&self, volume: &str, path: &str) -> String {
        self.path(&format!("mnt-{volume}/{path}"))
    }

    fn make_namespace(&self) {
        let name = self.namespace.as_str();
        tool("ip", &["netns", "add", name]);
        let ip = |arguments: &[&str]| tool("ip", &[&["-n", name], arguments].concat());
        ip(&["link", "set", "lo", "up"]);
        ip(&["link", "add", "v0", "type", "veth", "peer", "name", "v1"]);
        ip(&["addr", "add", "1.2.3.4/24", "dev", "v0"]);
        ip(&["addr", "add", &format!("{ADDRESS}/64"), "dev", "v0", "nodad"]);
        ip(&["link", "set", "v0", "up"]);
        ip(&["link", "set", "v1", "up"]);
        let etc = self.etc();
        std::fs::create_dir_all(&etc).expect("the namespace's folder in /etc");
        std::fs::write(etc.join("hosts"), "127.0.0.1 localhost\n1.2.3.4 server.domain.com\n")
            .expect("its hosts");
    }

    fn etc(&self) -> PathBuf {
        Path::new("/etc/netns").join(&self.namespace)
    }

    fn start_daemon(&self) {
        for name in ["work", "run", "log/bricks"] {
            std::fs::create_dir_all(self.path(name)).expect("a folder of the daemon's");
        }
        let volfile = format!(
            "volume management\n    type mgmt/glusterd\n    option working-directory {}\n    \
             option transport-type socket\n    option transport.socket.listen-port 24007\n    \
             option glusterd-sockfile {}\n    option transport.address-family inet6\n    option ping-timeout 0\n    \
             option max-port 60999\nend-volume\n",
            self.path("work"),
            self.path("glusterd.socket"),
        );
        std::fs::write(self.path("glusterd.vol"), volfile).expect("the daemon's settings");
        // The folders have to be there to be covered.
        let script = format!(
            "mkdir -p /var/run/gluster /var/log/glusterfs && mount --bind '{}' /var/run/gluster && \
             mount --bind '{}' /var/log/glusterfs && exec glusterd -f '{}' --log-file '{}' -p '{}'",
            self.path("run"),
            self.path("log"),
            self.path("glusterd.vol"),
            self.path("log/glusterd.log"),
            self.path("glusterd.pid"),
        );
        // `ip netns exec` makes mounts of its own, too.
        tool("ip", &["netns", "exec", &self.namespace, "sh", "-c", &script]);
        self.until("the daemon answers", || self.try_gluster(&["volume", "list"]).code == Some(0));
        std::os::unix::fs::symlink(self.path("glusterd.socket"), SOCKET).expect("the socket of the example");
    }

    fn mount(&mut self, volume: &str) {
        let at = self.path(&format!("mnt-{volume}"));
        std::fs::create_dir(&at).expect("a folder to mount on");
        let net = format!("--net=/run/netns/{}", self.namespace);
        let log = format!("log-file={}", self.path(&format!("log/mnt-{volume}.log")));
        self.mounted.push(at.clone().into());
        // Nothing is kept in this client's caches: it is there to see what is on the bricks.
        let options = format!("{log},direct-io-mode=enable,attribute-timeout=0,entry-timeout=0");
        tool(
            "nsenter",
            &[&net, "mount", "-t", "glusterfs", "-o", &options, &format!("1.2.3.4:/{volume}"), &at],
        );
    }

    /// Waits for an event that does not say when it comes.
    pub fn until(&self, what: &str, mut is_it: impl FnMut() -> bool) {
        let end = Instant::now() + PATIENCE;
        while !is_it() {
            assert!(Instant::now() < end, "this did not come: {what}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Another program in the namespace.
    pub fn inside(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new("ip");
        command
            .env_remove("BLOCKFERRY_LOG")
            .args(["netns", "exec", &self.namespace, program])
            .args(arguments);
        command
    }

    fn try_gluster(&self, arguments: &[&str]) -> Ended {
        let socket = format!("--glusterd-sock={}", self.path("glusterd.socket"));
        let log = format!("--log-file={}", self.path("log/cli.log"));
        Process::spawn(self.inside("gluster", &[&["--mode=script", &socket, &log], arguments].concat())).end()
    }

    /// An order to the daemon, which has to succeed.
    pub fn gluster(&self, arguments: &[&str]) -> String {
        let ended = self.try_gluster(arguments);
        assert_eq!(ended.code, Some(0), "gluster {arguments:?}: {ended}");
        ended.out
    }

    /// The built command, in the namespace.
    pub fn blockferry(&self, arguments: &[&str]) -> Command {
        self.inside(&command_path().to_string_lossy(), arguments)
    }

    /// Runs the command to its end.
    pub fn run(&self, arguments: &[&str]) -> Ended {
        Process::spawn(self.blockferry(arguments)).end()
    }

    /// Runs the command, which has to succeed: its JSON lines.
    pub fn run_json(&self, arguments: &[&str]) -> Vec<Value> {
        let ended = self.run(&[&["--json"], arguments].concat());
        assert_eq!(ended.code, Some(0), "{arguments:?}: {ended}");
        ended.events()
    }

    /// Starts the command with `--json`.
    pub fn json(&self, arguments: &[&str]) -> Process {
        Process::spawn(self.blockferry(&[&["--json"], arguments].concat()))
    }

    /// The id of a brick's process, as its file says.
    fn brick(&self, name: &str) -> Option<Pid> {
        let volume = if name == BRICKS[0] { PLAIN } else { TWICE };
        let ending = format!("-{name}.pid");
        let folder = std::fs::read_dir(self.path(&format!("run/vols/{volume}"))).ok()?;
        let file = folder.flatten().find(|file| file.file_name().to_string_lossy().ends_with(&ending))?;
        pid_in(&file.path())
    }

    /// Ends a brick's process as a power cut does.
    pub fn kill_brick(&self, name: &str) {
        self.signal_brick(name, Signal::KILL);
    }

    /// Sends a signal to a brick's process.
    pub fn signal_brick(&self, name: &str, signal: Signal) {
        let pid = self.brick(name).expect("the id of a brick's process");
        rustix::process::kill_process(pid, signal).expect("a signal to a brick");
    }

    /// Starts the bricks of a volume that do not run, and waits until they take clients.
    pub fn restart_bricks(&self, volume: &str) {
        self.until("the bricks run", || {
            // The daemon does nothing, successfully, as long as it has not noticed that one is gone.
            self.gluster(&["volume", "start", volume, "force"]);
            let status = self.try_gluster(&["volume", "status", volume, "detail"]).out;
            status.contains("Online")
                && !status.lines().any(|line| line.starts_with("Online") && line.trim_end().ends_with(": N"))
        });
        self.until("a client has found them", || std::fs::read_dir(self.seen(volume, "")).is_ok());
    }

    fn pids(&self) -> Vec<Pid> {
        // The daemon first, so that it starts nothing anew.
        let mut files = vec![PathBuf::from(self.path("glusterd.pid"))];
        let mut folders = vec![PathBuf::from(self.path("run"))];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                match entry.path() {
                    path if path.is_dir() => folders.push(path),
                    path if path.extension().is_some_and(|end| end == "pid") => files.push(path),
                    _ => {}
                }
            }
        }
        files.iter().filter_map(|file| pid_in(file)).collect()
    }
}

/// Takes down what labs of test programs that were killed have left: nobody is there who would.
fn clear_away_the_killed() {
    // A link to a daemon that answers is another lab's, which is in use.
    let is_link = std::fs::symlink_metadata(SOCKET).is_ok_and(|found| found.is_symlink());
    if is_link && UnixStream::connect(SOCKET).is_err() {
        std::fs::remove_file(SOCKET).expect("a link to nobody");
    }
    // A client that has lost its process answers nothing but this.
    for line in std::fs::read_to_string("/proc/self/mounts").expect("what is mounted").lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let is_dead =
            || std::fs::metadata(fields[1]).is_err_and(|e| e.raw_os_error() == Some(libc::ENOTCONN));
        if fields[0].starts_with("1.2.3.4:/") && fields[2] == "fuse.glusterfs" && is_dead() {
            tool("umount", &["-l", fields[1]]);
        }
    }
    for entry in std::fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let of_process = name.strip_prefix(NAMESPACE).and_then(|number| number.parse::<i32>().ok());
        if of_process.and_then(Pid::from_raw).is_some_and(|pid| !is_there(pid)) {
            tool("ip", &["netns", "del", &name]);
            let _ = std::fs::remove_dir_all(Path::new("/etc/netns").join(&name));
        }
    }
}

/// The process that a file names, if it is one of GlusterFS's.
fn pid_in(file: &Path) -> Option<Pid> {
    let number = std::fs::read_to_string(file).ok()?.trim().parse::<i32>().ok()?;
    let name = std::fs::read_to_string(format!("/proc/{number}/comm")).ok()?;
    Pid::from_raw(number).filter(|_| name.starts_with("gluster"))
}

impl Drop for Lab {
    fn drop(&mut self) {
        // Nothing here can do anything about a failure.
        for at in &self.mounted {
            let _ = Command::new("umount").arg("-l").arg(at).output();
        }
        let pids = self.pids();
        for pid in &pids {
            let _ = rustix::process::kill_process(*pid, Signal::KILL);
        }
        let end = Instant::now() + PATIENCE;
        while pids.iter().any(|pid| is_there(*pid)) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(20));
        }
        if std::fs::read_link(SOCKET).is_ok_and(|to| to.starts_with(self.dir())) {
            let _ = std::fs::remove_file(SOCKET);
        }
        let _ = Command::new("ip").args(["netns", "del", &self.namespace]).output();
        let _ = std::fs::remove_dir_all(self.etc());
        // Only if no other namespace has one.
        let _ = std::fs::remove_dir("/etc/netns");
    }
}

/// Whether a process runs (one that nobody has waited for yet does not).
fn is_there(pid: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}
