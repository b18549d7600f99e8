//! Real NBD servers for tests: nbdkit and qemu-nbd on a Unix socket in a folder of their own, ended with the test.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a server may take to listen.
const START_MAX: Duration = Duration::from_secs(20);

/// A running server.
#[derive(Debug)]
pub struct Peer {
    child: Child,
    folder: tempfile::TempDir,
}

impl Peer {
    /// nbdkit with the given plugin, filters and parameters.
    pub fn nbdkit(arguments: &[&str]) -> Peer {
        Peer::start(|socket| {
            let mut command = Command::new("nbdkit");
            command.args(["--foreground", "--exit-with-parent", "--unix"]).arg(socket).args(arguments);
            command
        })
    }

    /// qemu-nbd on a raw image.
    pub fn qemu_nbd(image: &Path, arguments: &[&str]) -> Peer {
        Peer::start(|socket| {
            let mut command = Command::new("qemu-nbd");
            command.args(["--persistent", "--shared=16", "--format=raw", "--socket"]).arg(socket);
            command.args(arguments).arg(image);
            command
        })
    }

    fn start(command: impl FnOnce(&Path) -> Command) -> Peer {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let socket = folder.path().join("socket");
        let mut command = command(&socket);
        let child = command.stdin(Stdio::null()).spawn();
        let child =
            child.unwrap_or_else(|error| panic!("{:?} does not start: {error}", command.get_program()));
        let mut peer = Peer { child, folder };
        let end = Instant::now() + START_MAX;
        while UnixStream::connect(peer.socket()).is_err() {
            let ended = peer.child.try_wait().expect("the state of a child");
            assert!(ended.is_none(), "{command:?} ended with {ended:?}");
            assert!(Instant::now() < end, "{command:?} does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        peer
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    /// The URI of the default export.
    pub fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket().display())
    }

    /// Ends the server at once.
    pub fn kill(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.kill();
    }
}
