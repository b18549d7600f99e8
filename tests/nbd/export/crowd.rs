//! Clients that ask for more than their share, and a watch over the calls that the reactor's thread makes meanwhile.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ChildStderr;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use blockferry::block::{Driver, Permissions, WriteFlags};
use blockferry::engine::create::{Beside, NewImage};
use blockferry::engine::open::{ImageOptions, open};
use blockferry::export::nbd::{Export, NbdServer};
use blockferry::format::qcow2::CreateOptions;
use blockferry::graph::node::{Node, Role, Root};
use blockferry::protocol::FileDriver;
use blockferry::protocol::file::CreateOptions as FileOptions;
use blockferry::protocol::mark::{MarkInfo, TargetMark};
use blockferry::protocol::open::{OpenOptions, open_aside};
use blockferry_ring::{Config, Errno, Ring};

use super::lab::{Guarded, Lab, run, start};
use super::raw::{BLOCK_STATUS, FLAG_NO_HOLE, READ, Raw, TRIM, WRITE_ZEROES};

const MIB: u64 = 1 << 20;
const ATTACKERS: usize = 16;
const IDLE: usize = 128;

/// Data and holes of 4 KiB in turns.
fn in_pieces(lab: &Lab, len: u64) {
    let file = std::fs::OpenOptions::new().write(true).open(lab.path("disk.raw")).unwrap();
    for at in (0..len).step_by(8192) {
        file.write_all_at(&[b'x'; 4096], at).unwrap();
    }
}

/// Exports an image with small clusters, of which every eighth holds data.
async fn export_in_clusters(ring: Ring, server: NbdServer, path: String) {
    let aside = Path::new(&path);
    FileDriver::create(&ring, aside, 0, FileOptions::default()).await.unwrap();
    let file = open_aside(&ring, aside, &OpenOptions::default()).await.unwrap();
    let options = CreateOptions { size: 16 * MIB, cluster_size: 512, ..CreateOptions::default() };
    NewImage::Qcow2(Box::new(options))
        .write(&ring, &Node::of(&ring, file.clone()), aside, &Beside::default())
        .await
        .unwrap();
    drop(file);
    let driver = open(&ring, &path, &ImageOptions::default()).await.unwrap();
    for at in (0..16 * MIB).step_by(4096) {
        let mut buf = ring.alloc(512).await;
        buf.copy_from(0, &[b'x'; 512]);
        driver.write(at, buf.freeze(), WriteFlags::default()).await.unwrap();
    }
    let node = driver.called("image");
    let root = Root::new(&node, false).unwrap();
    let export = Export { root, description: String::new(), writable: true, default: false };
    server.add_export("image", export).unwrap();
}

#[test]
fn changes_of_many_clusters_do_not_hold_up_the_others() {
    let lab = Lab::new(MIB);
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = directory.path().join("image.qcow2").to_str().unwrap().to_owned();
    let image = path.clone();
    perform(&lab, move |ring, server| export_in_clusters(ring, server, image));
    // The last cluster with data is left alone.
    let kept = 16 * MIB - 4096;
    let mut honest = Raw::structured(lab.connect(), "image");
    // First the places are kept, then given back.
    for (flags, command) in [(FLAG_NO_HOLE, WRITE_ZEROES), (0, TRIM)] {
        let mut longest = Duration::ZERO;
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..ATTACKERS)
                .map(|_| {
                    scope.spawn(|| {
                        let mut stream = Raw::structured(lab.connect(), "image").stream;
                        stream.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
                        let _ =
                            stream.write_all(&Raw::header(flags, command, 7, 0, kept as u32).repeat(8000));
                    })
                })
                .collect();
            while threads.iter().any(|thread| !thread.is_finished()) {
                let began = Instant::now();
                assert_eq!(honest.call(0, READ, kept, 512).bytes(), vec![b'x'; 512]);
                longest = longest.max(began.elapsed());
            }
        });
        assert!(longest < Duration::from_secs(5), "command {command}: a read took {longest:?}");
        let began = Instant::now();
        lab.wait_for_clients(1);
        assert!(began.elapsed() < Duration::from_secs(10), "command {command}: {:?}", began.elapsed());
    }
    assert_eq!(honest.call(0, super::FLUSH, 0, 0).error, 0);
    drop((honest, lab));
    run("qemu-img", &["check", "-q", &path]);
}

/// Sends `count` requests and leaves; what the server does not take within `patience` stays unsent.
fn ask_and_leave(lab: &Lab, command: u16, length: u32, count: usize, patience: Duration) {
    let mut stream = Raw::structured(lab.connect(), "disk").stream;
    let all = Raw::header(0, command, 7, 0, length).repeat(count);
    stream.set_write_timeout(Some(patience)).unwrap();
    let _ = stream.write_all(&all);
}

/// The longest that a read of an honest client takes while `others` are at work.
fn longest_wait(lab: &Lab, others: impl Fn(usize) + Sync) -> Duration {
    let mut honest = Raw::structured(lab.connect(), "disk");
    let mut longest = Duration::ZERO;
    let others = &others;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..ATTACKERS).map(|i| scope.spawn(move || others(i))).collect();
        while threads.iter().any(|thread| !thread.is_finished()) {
            let began = Instant::now();
            assert_eq!(honest.call(0, READ, 8192, 4096).bytes(), vec![b'x'; 4096]);
            longest = longest.max(began.elapsed());
        }
    });
    longest
}

#[test]
fn one_client_does_not_hold_up_the_others() {
    let lab = Lab::on_file(16 * MIB);
    in_pieces(&lab, 16 * MIB);
    let idle: Vec<UnixStream> = (0..IDLE).map(|_| Raw::structured(lab.connect(), "disk").stream).collect();
    let began = Instant::now();
    let newcomer = Raw::structured(lab.connect(), "disk");
    // Half a second and one are promised; this machine may be ten times as slow.
    assert!(began.elapsed() < Duration::from_secs(10), "let in after {:?}", began.elapsed());
    drop(newcomer);
    for (command, length) in [(BLOCK_STATUS, 16 * MIB as u32), (READ, 4096)] {
        let longest =
            longest_wait(&lab, |_| ask_and_leave(&lab, command, length, 8000, Duration::from_millis(200)));
        assert!(longest < Duration::from_secs(5), "command {command}: a read took {longest:?}");
        // What they had asked is dropped with them.
        lab.wait_for_clients(IDLE);
    }
    // Some stay, and go on asking, until the server ends.
    let asking: Vec<UnixStream> = (0..ATTACKERS)
        .map(|_| {
            let mut stream = Raw::structured(lab.connect(), "disk").stream;
            stream.set_write_timeout(Some(Duration::from_millis(20))).unwrap();
            let _ = stream.write_all(&Raw::header(0, BLOCK_STATUS, 7, 0, 16 * MIB as u32).repeat(8000));
            stream
        })
        .collect();
    let began = Instant::now();
    drop(lab);
    assert!(began.elapsed() < Duration::from_secs(10), "it took {:?} to end", began.elapsed());
    drop((asking, idle));
}

/// Calls that may wait for a disk.
const WAITING: &str = "trace=?open,openat,openat2,?creat,?stat,?lstat,?fstat,?newfstatat,statx,lseek,ftruncate,\
     ?truncate,fallocate,fsync,fdatasync,sync_file_range,?access,faccessat,?faccessat2,?readlink,readlinkat,getxattr,\
     fgetxattr,setxattr,fsetxattr,removexattr,fremovexattr,?rename,?renameat,renameat2,?unlink,unlinkat,?mkdir,mkdirat,\
     ?getdents,getdents64,pread64,pwrite64,preadv,pwritev,copy_file_range,?sync,syncfs";

/// strace, attached to one thread.
struct Trace {
    strace: Guarded,
    /// It has more to say at its end.
    _words: BufReader<ChildStderr>,
    log: String,
}

impl Trace {
    fn of(thread: i32, log: String) -> Trace {
        let thread = thread.to_string();
        let mut strace = start("strace", &["-p", &thread, "-o", &log, "-e", WAITING]);
        let mut line = String::new();
        let mut words = BufReader::new(strace.0.stderr.take().unwrap());
        words.read_line(&mut line).unwrap();
        assert!(line.contains("attached"), "strace: {line}");
        Trace { strace, _words: words, log }
    }

    /// The calls so far, a line each.
    fn end(mut self) -> Vec<String> {
        let id = rustix::process::Pid::from_child(&self.strace.0);
        rustix::process::kill_process(id, rustix::process::Signal::INT).unwrap();
        self.strace.0.wait().unwrap();
        let text = std::fs::read_to_string(&self.log).unwrap();
        text.lines().filter(|line| line.contains('(')).map(str::to_owned).collect()
    }
}

/// Runs a task on the server's ring.
fn perform<T: Send + 'static, F: Future<Output = T> + 'static>(
    lab: &Lab,
    task: impl FnOnce(Ring, NbdServer) -> F + Send + 'static,
) -> T {
    let (give, take) = channel();
    lab.inside(move |inside| {
        let task = task(inside.ring.clone(), inside.server.clone());
        inside.ring.spawn(async move {
            let _ = give.send(task.await);
        });
    });
    take.recv_timeout(Duration::from_secs(20)).expect("the task ends")
}

/// Makes a qcow2 image, marked for a while, and exports it.
async fn make_and_export(ring: Ring, server: NbdServer, path: String) {
    let aside = Path::new(&path);
    FileDriver::create(&ring, aside, 0, FileOptions::default()).await.unwrap();
    let file = open_aside(&ring, aside, &OpenOptions::default()).await.unwrap();
    let new = NewImage::Qcow2(Box::new(CreateOptions { size: 256 * MIB, ..CreateOptions::default() }));
    new.write(&ring, &Node::of(&ring, file.clone()), aside, &Beside::default()).await.unwrap();
    let mark = TargetMark::new(&ring, file, None, MarkInfo::incomplete("mirror", "here"));
    mark.set().await.unwrap();
    assert!(mark.is_set().await.unwrap());
    mark.clear().await.unwrap();
    drop(mark);
    let driver = open(&ring, &path, &ImageOptions::default()).await.unwrap();
    assert_eq!(driver.format(), "qcow2");
    let node = driver.called("image");
    let root = Root::new(&node, false).unwrap();
    let export = Export { root, description: String::new(), writable: true, default: false };
    server.add_export("image", export).unwrap();
}

/// Opens a file that another has locked, and tells what came of it; then reopens it for writing.
async fn lock_and_reopen(ring: Ring, path: String) -> String {
    let options = OpenOptions { read_only: true, ..OpenOptions::default() };
    let driver = open_aside(&ring, Path::new(&path), &options).await.unwrap();
    let node = Node::new(&ring, "locked", driver.clone());
    let refused = node.attach_in_time(Role::JobTarget("mirror")).await.unwrap_err();
    assert_eq!(refused.errno, Errno::EBUSY);
    driver.reopen(false).expect("files can be reopened").await.unwrap();
    driver.set_len(3 * MIB + 100).await.unwrap();
    refused.to_string()
}

#[test]
fn the_reactor_makes_no_call_that_waits_for_a_disk_while_it_serves() {
    let lab = Lab::on_file(4 * MIB);
    in_pieces(&lab, 4 * MIB);
    let mut honest = Raw::structured(lab.connect(), "disk");
    honest.call(0, READ, 0, 4096);
    // Somebody else uses this one.
    let locked = lab.path("locked.raw");
    std::fs::File::create(&locked).unwrap().set_len(MIB).unwrap();
    let elsewhere = Ring::new(&Config::default()).unwrap();
    let other = FileDriver::open(&elsewhere, Path::new(&locked), &OpenOptions::default()).unwrap();
    other.set_permissions(Permissions::USER).unwrap();

    let thread = lab.inside(|_| rustix::thread::gettid().as_raw_nonzero().get());
    let trace = Trace::of(thread, lab.path("trace"));
    // The trace sees such calls: this one is made on purpose.
    lab.inside(|inside| assert_eq!(inside.ring.lookup(Path::new("/no/such/place")), Ok(None)));
    let path = lab.path("image.qcow2");
    perform(&lab, move |ring, server| make_and_export(ring, server, path));
    let mut writer = Raw::structured(lab.connect(), "image");
    for i in 0..200u64 {
        let at = i * 7 % 200 * MIB + i * 512;
        assert_eq!(writer.write(at, &[7; 3000]).error, 0, "at {at}");
    }
    assert_eq!(writer.call(0, WRITE_ZEROES, 5 * MIB, 90_000).error, 0);
    assert_eq!(writer.call(0, super::FLUSH, 0, 0).error, 0);
    let flood = |_| ask_and_leave(&lab, BLOCK_STATUS, 4 * MIB as u32, 300, Duration::from_millis(50));
    longest_wait(&lab, flood);
    let extents = honest.call(0, BLOCK_STATUS, 0, 4 * MIB as u32).extents;
    assert_eq!((extents.len(), extents[0], extents[1]), (1024, (4096, 0), (4096, 3)));
    let path = locked.clone();
    let refused = perform(&lab, move |ring, _| lock_and_reopen(ring, path));
    assert!(refused.contains("this program itself"), "{refused}");
    // The C library's memory allocator looks there once, when it first gives memory of a thread back.
    let is_ours = |line: &String| !line.contains("/proc/sys/vm/overcommit_memory");
    let calls = trace.end().into_iter().filter(is_ours);
    let (wanted, forbidden): (Vec<_>, Vec<_>) = calls.partition(|line| line.contains("/no/such/place"));
    assert_eq!(wanted.len(), 1, "{wanted:?}");
    assert_eq!(forbidden, Vec::<String>::new());
    drop(other);
}
