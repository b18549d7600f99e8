//! What the examples have in common: a foreign event loop that owns an engine, and a guest that keeps a disk busy.
//!
//! The loop is the program's own epoll set; the engine's fd is one member of it. Requests read and write the program's
//! own memory (guest RAM in a memfd), tokens tell which one ended. `turn()` never blocks and no thread is started.

#![allow(dead_code)]

use std::rc::Rc;
use std::time::{Duration, Instant};

use blockferry::block::{BlockError, WriteFlags};
use blockferry::engine::create::{Beside, NewImage};
use blockferry::engine::guest::Guest;
use blockferry::engine::open::open;
use blockferry::engine::{Engine, ImageOptions};
use blockferry::format::qcow2::CreateOptions;
use blockferry::graph::node::Node;
use blockferry::protocol::file::{CreateOptions as FileOptions, FileDriver};
use blockferry_ring::sync::OneShot;
use blockferry_ring::{Region, Turn};
use rustix::event::epoll;

pub type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

pub const DISK_BYTES: u64 = 64 << 20;
pub const BLOCK_BYTES: usize = 4096;
pub const BLOCKS: u64 = DISK_BYTES / BLOCK_BYTES as u64;
const DEPTH: usize = 16;
/// Every so many requests one reads.
const READ_EVERY: u64 = 4;
const TOKEN_FLUSH: u64 = u64::MAX;

/// The foreign loop: an epoll set in which the engine is one fd among others.
pub struct Loop {
    pub engine: Engine,
    epoll: std::os::fd::OwnedFd,
    last: Option<Turn>,
    pub longest_turn: Duration,
}

impl Loop {
    pub fn new() -> Fallible<Loop> {
        let engine = Engine::without_threads()?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        engine.with_fd(|fd| match fd {
            Some(fd) => {
                epoll::add(&epoll, fd, epoll::EventData::new_u64(1), epoll::EventFlags::IN).map_err(Box::from)
            }
            None => Err(Box::<dyn std::error::Error>::from("the engine has no fd to poll")),
        })?;
        Ok(Loop { engine, epoll, last: None, longest_turn: Duration::ZERO })
    }

    /// One round: sleep in epoll as long as nothing is to be done, then let the engine turn.
    fn round(&mut self) -> Fallible<()> {
        let wait_ns = match &self.last {
            Some(turn) if !turn.more_work => {
                turn.next_deadline.map_or(50_000_000, |at| at.saturating_sub(self.engine.ring().clock()))
            }
            _ => 0,
        };
        let timeout = rustix::time::Timespec { tv_sec: 0, tv_nsec: wait_ns.min(50_000_000) as i64 };
        let mut events = Vec::with_capacity(4);
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let began = Instant::now();
        self.last = Some(self.engine.turn());
        self.longest_turn = self.longest_turn.max(began.elapsed());
        Ok(())
    }

    /// Rounds until `look` has found something; `load` keeps its disk busy meanwhile.
    pub fn until<T>(
        &mut self,
        load: &mut Load,
        mut look: impl FnMut(&Load) -> Fallible<Option<T>>,
    ) -> Fallible<T> {
        loop {
            load.submit()?;
            self.round()?;
            load.reap()?;
            if let Some(found) = look(load)? {
                return Ok(found);
            }
        }
    }

    /// Rounds until a result is there. No guest is busy.
    pub fn wait<T, E: std::error::Error + 'static>(&mut self, shot: &OneShot<Result<T, E>>) -> Fallible<T> {
        loop {
            self.round()?;
            if let Some(result) = shot.try_take() {
                return Ok(result?);
            }
        }
    }

    /// The guest ends its requests, and flushes.
    pub fn quiesce(&mut self, load: &mut Load) -> Fallible<()> {
        while load.in_flight > 0 {
            self.round()?;
            load.reap()?;
        }
        load.guest.flush(TOKEN_FLUSH);
        load.in_flight = 1;
        while load.in_flight > 0 {
            self.round()?;
            load.reap()?;
        }
        Ok(())
    }

    pub fn open(&mut self, path: &str, options: &ImageOptions) -> Fallible<Rc<Node>> {
        let opening = self.engine.start_open(path, options);
        self.wait(&opening)
    }

    /// Makes an overlay of `backing`, which lies beside it.
    fn create_overlay(&mut self, path: &str, backing: &str, format: &str) -> Fallible<()> {
        let options = CreateOptions {
            size: DISK_BYTES,
            backing_file: Some(backing.to_owned()),
            backing_fmt: Some(format.to_owned()),
            ..CreateOptions::default()
        };
        let (ring, path) = (self.engine.ring().clone(), std::path::PathBuf::from(path));
        let making = self.engine.ring().spawn_with_result(async move {
            FileDriver::create(&ring, &path, 0, FileOptions::default()).await?;
            let file = open(&ring, &format!("file:{}", path.display()), &ImageOptions::raw()).await?;
            NewImage::Qcow2(Box::new(options)).write(&ring, &file, &path, &Beside::default()).await
        });
        self.wait::<(), BlockError>(&making)
    }

    /// A chain `base.raw ← one.qcow2 ← two.qcow2 ← top.qcow2`, with something in each layer, and a guest of it.
    pub fn chain(&mut self, directory: &str) -> Fallible<(Rc<Node>, Load)> {
        let path = |name: &str| format!("{directory}/{name}");
        std::fs::File::create(path("base.raw"))?.set_len(DISK_BYTES)?;
        let mut written = vec![0; BLOCKS as usize];
        let mut below = ("base.raw", "raw");
        for name in ["one.qcow2", "two.qcow2", "top.qcow2"] {
            self.create_overlay(&path(name), below.0, below.1)?;
            below = (name, "qcow2");
            let disk = self.open(&path(name), &ImageOptions::default())?;
            let mut load = Load::new(&self.engine, &disk, written)?;
            if name == "top.qcow2" {
                return Ok((disk, load));
            }
            let until = load.serial + 3000;
            self.until(&mut load, |load| Ok((load.serial > until).then_some(())))?;
            self.quiesce(&mut load)?;
            written = load.written;
        }
        unreachable!("the last name is that of the top")
    }
}

/// A guest that keeps its disk busy: each block gets a serial number, which is remembered when it is acknowledged. What
/// is read is compared.
pub struct Load {
    pub guest: Guest,
    ram: Region,
    /// What each block holds.
    pub written: Vec<u64>,
    in_flight: usize,
    idle: Vec<usize>,
    pub serial: u64,
}

impl Load {
    pub fn new(engine: &Engine, disk: &Rc<Node>, written: Vec<u64>) -> Fallible<Load> {
        // The guest's memory: this program's own, registered so that the kernel need not look up its pages.
        let memory = rustix::fs::memfd_create("guest-ram", rustix::fs::MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&memory, (DEPTH * BLOCK_BYTES) as u64)?;
        let ram = Region::map(&memory, 0, DEPTH * BLOCK_BYTES)?;
        // Where that is refused (RLIMIT_MEMLOCK), plain operations are used.
        let _ = engine.ring().register_region(&ram);
        let serial = written.iter().copied().max().unwrap_or(0);
        let guest = engine.guest(disk, false)?;
        Ok(Load { guest, ram, written, in_flight: 0, idle: (0..DEPTH).collect(), serial })
    }

    fn block(serial: u64) -> u64 {
        (serial * 7919) % BLOCKS
    }

    fn submit(&mut self) -> Fallible<()> {
        while let Some(slot) = self.idle.pop() {
            self.serial += 1;
            let (serial, offset) = (self.serial, Load::block(self.serial) * BLOCK_BYTES as u64);
            let token = serial << 8 | slot as u64;
            if !serial.is_multiple_of(READ_EVERY) {
                self.ram.write(slot * BLOCK_BYTES, &serial.to_le_bytes());
            }
            let buf = self.ram.buf(slot * BLOCK_BYTES, BLOCK_BYTES).ok_or("the slot is inside the memory")?;
            match serial.is_multiple_of(READ_EVERY) {
                true => self.guest.read(token, offset, buf),
                false => self.guest.write(token, offset, buf, WriteFlags::default()),
            }
            self.in_flight += 1;
        }
        Ok(())
    }

    fn reap(&mut self) -> Fallible<()> {
        while let Some(done) = self.guest.pop_completion() {
            done.result?;
            self.in_flight -= 1;
            if done.token == TOKEN_FLUSH {
                continue;
            }
            let (serial, slot) = (done.token >> 8, (done.token & 0xff) as usize);
            let block = Load::block(serial) as usize;
            if done.buf.is_some() {
                let mut found = [0; 8];
                self.ram.read(slot * BLOCK_BYTES, &mut found);
                check(block, found, self.written[block])?;
            } else {
                self.written[block] = serial;
            }
            self.idle.push(slot);
        }
        Ok(())
    }
}

/// Everything that was acknowledged (`written`, the serial of each block) is in `disk`, read by other means.
pub fn check_all(written: &[u64], disk: &[u8]) -> Fallible<()> {
    for (block, serial) in written.iter().enumerate() {
        check(block, disk[block * BLOCK_BYTES..][..8].try_into()?, *serial)?;
    }
    Ok(())
}

fn check(block: usize, found: [u8; 8], wanted: u64) -> Fallible<()> {
    let found = u64::from_le_bytes(found);
    if found == wanted {
        Ok(())
    } else {
        Err(format!("block {block} holds {found} instead of {wanted}").into())
    }
}

/// Threads of this process but the kernel's own workers, which serve devices that cannot do without.
pub fn own_threads() -> Fallible<usize> {
    let mut own = 0;
    for task in std::fs::read_dir("/proc/self/task")? {
        let name = std::fs::read_to_string(task?.path().join("comm"))?;
        own += usize::from(!name.starts_with("iou-wrk"));
    }
    Ok(own)
}
