//! Image locks against the programs that share the convention: `qemu-io`, `qemu-nbd`, `qemu-img`.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use blockferry::block::{Driver, Permissions};
use blockferry::protocol::{CreateOptions, FileDriver, OpenOptions};
use blockferry_ring::{Config, LockRange, Ring};

fn ring() -> Ring {
    Ring::new(&Config { arena_bytes: 1 << 20, ..Config::default() }).expect("a ring")
}

struct Image {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

fn image() -> Image {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("a.img");
    std::fs::File::create(&path).and_then(|f| f.set_len(1 << 20)).expect("an image");
    Image { _dir: dir, path }
}

fn open(ring: &Ring, path: &Path) -> FileDriver {
    FileDriver::open(ring, path, &OpenOptions::default()).expect("the image opens")
}

fn qemu_io(path: &Path, read_only: bool, command: &str) -> Output {
    let mut qemu_io = Command::new("qemu-io");
    if read_only {
        qemu_io.arg("-r");
    }
    qemu_io.args(["-f", "raw", "-c", command]).arg(path).output().expect("qemu-io runs")
}

/// QEMU's programs refuse with this text.
fn is_lock_refusal(output: &Output) -> bool {
    String::from_utf8_lossy(&output.stderr).contains("lock") && !output.status.success()
}

/// A running `qemu-nbd`, that is a program that uses the image until this is dropped.
struct QemuNbd(Child);

impl QemuNbd {
    fn start(image: &Image, format: &str, path: &Path) -> QemuNbd {
        let socket = image.path.with_extension("sock");
        let child = Command::new("qemu-nbd")
            .args(["-t", "-f", format, "-k"])
            .arg(&socket)
            .arg(path)
            .stderr(Stdio::null())
            .spawn()
            .expect("qemu-nbd runs");
        let nbd = QemuNbd(child);
        let start = Instant::now();
        // The socket is there before the image is open: only an answer says that the locks are taken.
        let uri = format!("nbd+unix:///?socket={}", socket.display());
        let answers = || {
            let mut info = Command::new("nbdinfo");
            info.arg("--size").arg(&uri).stdout(Stdio::null()).stderr(Stdio::null());
            info.status().is_ok_and(|status| status.success())
        };
        while !answers() {
            assert!(start.elapsed() < Duration::from_secs(60), "qemu-nbd does not get ready");
            std::thread::sleep(Duration::from_millis(10));
        }
        nbd
    }

    fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for QemuNbd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// One test at a time: until a child that another test starts has become its program, it holds this
/// process's descriptors, and with them its locks.
fn alone() -> std::sync::MutexGuard<'static, ()> {
    static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[test]
fn nobody_else_writes_what_is_in_use_here() {
    let _alone = alone();
    let (image, ring) = (image(), ring());
    let file = open(&ring, &image.path);
    assert!(qemu_io(&image.path, false, "write 0 512").status.success(), "an open file alone locks nothing");

    file.set_permissions(Permissions::USER).unwrap();
    let write = qemu_io(&image.path, false, "write 0 512");
    assert!(is_lock_refusal(&write), "{write:?}");
    assert!(qemu_io(&image.path, true, "read 0 512").status.success());
    let info = Command::new("qemu-img").arg("info").arg(&image.path).output().expect("qemu-img runs");
    assert!(info.status.success(), "{info:?}");
    let nbd = Command::new("qemu-nbd")
        .args(["-f", "raw", "-k"])
        .arg(image.path.with_extension("s"))
        .arg(&image.path)
        .output()
        .expect("qemu-nbd runs");
    assert!(is_lock_refusal(&nbd), "{nbd:?}");

    // Who only reads, and says that nobody may write meanwhile.
    file.set_permissions(Permissions::STABLE_READER).unwrap();
    assert!(is_lock_refusal(&qemu_io(&image.path, false, "write 0 512")));
    assert!(qemu_io(&image.path, true, "read 0 512").status.success());

    file.set_permissions(Permissions::READER).unwrap();
    assert!(qemu_io(&image.path, false, "write 0 512").status.success());
    drop(file);
    assert!(qemu_io(&image.path, false, "write 0 512").status.success());
}

#[test]
fn the_target_of_a_job_is_not_even_read() {
    let _alone = alone();
    let (image, ring) = (image(), ring());
    let file = open(&ring, &image.path);
    file.set_permissions(Permissions::JOB_TARGET).unwrap();
    let read = qemu_io(&image.path, true, "read 0 512");
    assert!(is_lock_refusal(&read), "{read:?}");
    assert!(is_lock_refusal(&qemu_io(&image.path, false, "write 0 512")));
    file.set_permissions(Permissions::NONE).unwrap();
    assert!(qemu_io(&image.path, false, "write 0 512").status.success());
}

#[test]
fn what_a_qemu_program_writes_is_refused_by_name() {
    let _alone = alone();
    let (image, ring) = (image(), ring());
    let nbd = QemuNbd::start(&image, "raw", &image.path);
    let options = OpenOptions { without_locks: Some("--no-lock"), ..OpenOptions::default() };
    let file = FileDriver::open(&ring, &image.path, &options).unwrap();
    for permissions in [Permissions::USER, Permissions::STABLE_READER, Permissions::JOB_TARGET] {
        let error = file.set_permissions(permissions).unwrap_err().to_string();
        assert!(error.starts_with(&format!("Locking '{}' failed", image.path.display())), "{error}");
        assert!(error.contains("permission"), "{error}");
        assert!(error.contains(&format!("by qemu-nbd (pid {})", nbd.pid())), "{error}");
        assert!(error.contains("--no-lock"), "{error}");
    }
    let error = file.set_permissions(Permissions::STABLE_READER).unwrap_err().to_string();
    assert!(error.contains("the 'write' permission cannot be denied to others: it is used"), "{error}");
    // A refusal leaves nothing locked: the other program's neighbours still get in.
    assert!(qemu_io(&image.path, false, "read 0 512").status.success());
    // Who takes the risk may read.
    file.set_permissions(Permissions::READER).unwrap();

    // Without locks everything goes.
    let options = OpenOptions { lock: false, ..OpenOptions::default() };
    let daring = FileDriver::open(&ring, &image.path, &options).unwrap();
    daring.set_permissions(Permissions::USER).unwrap();

    // A file in use is not emptied either.
    let path = image.path.clone();
    let overwrite = CreateOptions { overwrite: true, ..CreateOptions::default() };
    let r = ring.clone();
    let error =
        ring.block_on(async move { FileDriver::create(&r, &path, 4096, overwrite).await.unwrap_err() });
    assert!(error.to_string().contains("qemu-nbd"), "{error}");
    assert_eq!(std::fs::metadata(&image.path).unwrap().len(), 1 << 20);

    drop(nbd);
    drop(file);
    open(&ring, &image.path).set_permissions(Permissions::USER).unwrap();
}

#[test]
fn what_a_qemu_program_denies_is_named() {
    let _alone = alone();
    let (image, ring) = (image(), ring());
    let qcow2 = image.path.with_extension("qcow2");
    let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&qcow2).arg("1M").status();
    assert!(made.is_ok_and(|status| status.success()));
    // A qcow2 driver lets nobody write the file below it.
    let nbd = QemuNbd::start(&image, "qcow2", &qcow2);
    let error = open(&ring, &qcow2).set_permissions(Permissions::USER).unwrap_err().to_string();
    let wanted = format!("the 'write' permission is denied by qemu-nbd (pid {})", nbd.pid());
    assert!(error.contains(&wanted), "{error}");
}

/// A program that does not see who holds a lock: from a world of processes of its own it looks as if the holder were dead.
#[test]
fn a_lock_that_nobody_seems_to_hold_is_waited_for() {
    let _alone = alone();
    let image = image();
    let nbd = QemuNbd::start(&image, "raw", &image.path);
    let mut waiting = Command::new("unshare")
        .args(["--pid", "--fork", "--mount-proc", env!("CARGO_BIN_EXE_blockferry"), "resize", "-f", "raw"])
        .args([image.path.to_str().expect("a name"), "2M"])
        .env("BLOCKFERRY_LOG", "blockferry=debug")
        .stderr(Stdio::piped())
        .spawn()
        .expect("unshare runs");
    let mut said = BufReader::new(waiting.stderr.take().expect("a pipe")).lines();
    let waits = said.by_ref().map_while(Result::ok).any(|line| line.contains("waiting for a lock"));
    assert!(waits && std::fs::metadata(&image.path).unwrap().len() == 1 << 20);
    drop(nbd);
    let rest: Vec<String> = said.map_while(Result::ok).collect();
    assert!(waiting.wait().is_ok_and(|status| status.success()), "{rest:?}");
    assert_eq!(std::fs::metadata(&image.path).unwrap().len(), 2 << 20);
}

/// As soon as a file is closed nothing of it is locked, whoever else may still have the open file for a moment: a child
/// that has not become its program yet, or a worker of the kernel.
#[test]
fn a_closed_file_is_not_locked() {
    let _alone = alone();
    let (image, ring) = (image(), ring());
    let fd = std::fs::OpenOptions::new().read(true).write(true).open(&image.path).unwrap();
    let another = fd.try_clone().unwrap();
    let file = ring.adopt(fd.into()).unwrap();
    let byte = LockRange { start: 101, len: 1 };
    ring.lock_shared(&file, byte).unwrap();
    let looking = ring.adopt(std::fs::File::open(&image.path).unwrap().into()).unwrap();
    assert_eq!(ring.lock_conflict(&looking, byte), Ok(true));
    drop(file);
    assert_eq!(ring.lock_conflict(&looking, byte), Ok(false));
    drop(another);
}

#[test]
fn two_nodes_of_one_program_keep_each_other_out() {
    let _alone = alone();
    let (image, ring) = (image(), ring());
    let (first, second) = (open(&ring, &image.path), open(&ring, &image.path));
    first.set_permissions(Permissions::USER).unwrap();
    let error = second.set_permissions(Permissions::USER).unwrap_err().to_string();
    assert!(error.contains("by this program itself"), "{error}");
    second.set_permissions(Permissions::READER).unwrap();
    // Growing what is held: all or nothing.
    assert!(first.set_permissions(Permissions::JOB_TARGET).is_err());
    assert!(second.set_permissions(Permissions::USER).is_err());
    drop(second);
    first.set_permissions(Permissions::JOB_TARGET).unwrap();
    first.set_permissions(Permissions::NONE).unwrap();
    open(&ring, &image.path).set_permissions(Permissions::JOB_TARGET).unwrap();
}
