//! A server on a thread of its own, and children that never outlive their test.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use blockferry::block::Driver;
use blockferry::export::nbd::{Export, NbdServer, ServerConfig};
use blockferry::graph::node::{Node, Root};
use blockferry::protocol::open::{OpenOptions, open};
use blockferry_ring::backend::RemoteWaker;
use blockferry_ring::{Config, Ring, SocketAddress};

use super::disk::MemoryDisk;

/// What lives on the server's thread.
pub struct Inside {
    pub ring: Ring,
    pub server: NbdServer,
    pub disk: Rc<MemoryDisk>,
    pub node: Rc<Node>,
}

type Call = Box<dyn FnOnce(&Inside) + Send>;

pub struct Lab {
    calls: Option<Sender<Call>>,
    waker: RemoteWaker,
    thread: Option<JoinHandle<()>>,
    directory: tempfile::TempDir,
}

fn config() -> ServerConfig {
    ServerConfig { handshake_ns_max: 1_000_000_000, ..ServerConfig::default() }
}

/// Where the exported bytes live.
enum Backing {
    Memory(u64),
    File(PathBuf),
}

fn live(
    calls: &Receiver<Call>,
    ready: &Sender<RemoteWaker>,
    socket: PathBuf,
    backing: Backing,
    config: ServerConfig,
) {
    let ring = Ring::new(&Config::default()).expect("these tests need io_uring");
    let (len, file) = match backing {
        Backing::Memory(len) => (len, None),
        Backing::File(path) => (0, Some(path)),
    };
    let disk = MemoryDisk::new(&ring, len);
    let driver: Rc<dyn Driver> = match file {
        Some(path) => open(&ring, &path, &OpenOptions::default()).unwrap(),
        None => disk.clone(),
    };
    let node = Node::new(&ring, "disk", driver);
    let server = NbdServer::new(&ring, config);
    for (name, read_only) in [("disk", false), ("readonly", true)] {
        let root = Root::new(&node, read_only).unwrap();
        let description = "A disk of memory.".to_owned();
        let export = Export { root, description, writable: true, default: name == "disk" };
        server.add_export(name, export).unwrap();
    }
    server.listen(&SocketAddress::Unix(socket)).unwrap();
    let inside = Inside { ring: ring.clone(), server, disk, node };
    ready.send(ring.remote_waker()).unwrap();
    loop {
        match calls.try_recv() {
            Ok(call) => call(&inside),
            Err(std::sync::mpsc::TryRecvError::Empty) => {
                let _ = ring.turn_blocking();
            }
            Err(std::sync::mpsc::TryRecvError::Disconnected) => break,
        }
    }
    let server = inside.server.clone();
    ring.block_on(async move { server.stop().await });
    assert_eq!(inside.server.clients(), 0);
    // What the disk keeps for itself goes with it.
    drop(inside);
    assert_eq!(ring.task_count(), 0, "tasks are left behind");
    assert_eq!(ring.arena().bytes_used(), 0, "memory is left behind");
    assert_eq!(ring.shutdown(1_000_000_000).leaked, 0);
}

impl Lab {
    pub fn new(len: u64) -> Lab {
        Lab::with(len, config())
    }

    pub fn with(len: u64, config: ServerConfig) -> Lab {
        Lab::start(tempfile::tempdir().unwrap(), Backing::Memory(len), config)
    }

    /// A disk in a file, past the page cache where the filesystem lets it.
    pub fn on_file(len: u64) -> Lab {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = directory.path().join("disk.raw");
        std::fs::File::create(&path).unwrap().set_len(len).unwrap();
        Lab::start(directory, Backing::File(path), config())
    }

    fn start(directory: tempfile::TempDir, backing: Backing, config: ServerConfig) -> Lab {
        let socket = directory.path().join("nbd.sock");
        let (calls, inbox) = channel();
        let (ready, is_ready) = channel();
        let thread = std::thread::spawn(move || live(&inbox, &ready, socket, backing, config));
        let waker = is_ready.recv().expect("the server starts");
        Lab { calls: Some(calls), waker, thread: Some(thread), directory }
    }

    /// Calls `f` on the server's thread.
    pub fn inside<T: Send + 'static>(&self, f: impl FnOnce(&Inside) -> T + Send + 'static) -> T {
        let (give, take) = channel();
        let call: Call = Box::new(move |inside| {
            let _ = give.send(f(inside));
        });
        self.calls.as_ref().unwrap().send(call).unwrap();
        self.waker.wake();
        take.recv_timeout(Duration::from_secs(20)).expect("the server answers")
    }

    pub fn disk<T: Send + 'static>(&self, f: impl FnOnce(&MemoryDisk) -> T + Send + 'static) -> T {
        self.inside(|inside| f(&inside.disk))
    }

    pub fn path(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().unwrap().to_owned()
    }

    pub fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.path("nbd.sock"))
    }

    pub fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.path("nbd.sock")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    pub fn qemu_io(&self, commands: &[&str]) {
        let uri = self.uri("disk");
        let mut arguments = vec!["-f", "raw"];
        for command in commands {
            arguments.extend(["-c", command]);
        }
        arguments.push(&uri);
        let text = run("qemu-io", &arguments);
        assert!(!text.contains("failed") && !text.contains("rror"), "{commands:?}:\n{text}");
    }

    /// A file of holes, zeroes and data of many kinds.
    pub fn pattern_file(&self, name: &str, len: u64) -> String {
        use std::os::unix::fs::FileExt;
        let path = self.path(name);
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(len).unwrap();
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut offset = 0;
        while offset < len {
            let mut block = vec![0u8; 65536];
            for word in block.chunks_mut(8) {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                word.copy_from_slice(&state.to_le_bytes());
            }
            let n = block.len().min((len - offset) as usize);
            file.write_all_at(&block[..n], offset).unwrap();
            // Now and then a hole.
            offset += 65536 + (state >> 60) * 32768;
        }
        path
    }

    pub fn wait_for_clients(&self, wanted: usize) {
        let end = Instant::now() + Duration::from_secs(20);
        while self.inside(|inside| inside.server.clients()) != wanted {
            assert!(Instant::now() < end, "the server never has {wanted} clients");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.calls = None;
        self.waker.wake();
        let ended = self.thread.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            assert!(matches!(ended, Some(Ok(()))), "the server's thread panicked");
            assert!(!self.directory.path().join("nbd.sock").exists(), "the socket file is left behind");
        }
    }
}

/// A child that is killed, by its own handle, when it is dropped.
pub struct Guarded(pub Child);

impl Drop for Guarded {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn start(program: &str, arguments: &[&str]) -> Guarded {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Guarded(command.spawn().unwrap_or_else(|error| panic!("{program}: {error}")))
}

/// Runs a program to its end, which has to be a good one; gives its output.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let (is_good, text) = try_run(program, arguments);
    assert!(is_good, "{program} {arguments:?}:\n{text}");
    text
}

/// Runs a program to its end; gives whether it was a good one, and its output.
pub fn try_run(program: &str, arguments: &[&str]) -> (bool, String) {
    let mut child = start(program, arguments);
    let mut readers = Vec::new();
    let (stdout, stderr) = (child.0.stdout.take().unwrap(), child.0.stderr.take().unwrap());
    let pipes: [Box<dyn Read + Send>; 2] = [Box::new(stdout), Box::new(stderr)];
    for mut pipe in pipes {
        readers.push(std::thread::spawn(move || {
            let mut text = Vec::new();
            let _ = pipe.read_to_end(&mut text);
            text
        }));
    }
    let end = Instant::now() + Duration::from_secs(60);
    let status = loop {
        if let Some(status) = child.0.try_wait().unwrap() {
            break Some(status);
        }
        if Instant::now() > end {
            break None;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    drop(child);
    let text: Vec<u8> = readers.into_iter().flat_map(|reader| reader.join().unwrap_or_default()).collect();
    let text = String::from_utf8_lossy(&text).into_owned();
    match status {
        Some(status) => (status.success(), text),
        None => panic!("{program} {arguments:?} did not end:\n{text}"),
    }
}
