//! Embedding: a foreign event loop owns the engine.
//!
//! The loop is this program's own epoll set; the engine's fd is one member of it. Requests read and
//! write the program's own memory (guest RAM in a memfd), tokens tell which one ended. A mirror runs
//! beside them and pivots: the guest goes on, on the copy. `turn()` never blocks and no thread is started.
//!
//! Usage: `cargo run --example embed -- DIRECTORY`

use std::time::{Duration, Instant};

use blockferry::block::WriteFlags;
use blockferry::engine::{Engine, ImageOptions};
use blockferry::job::mirror::MirrorOptions;
use blockferry::job::runner::{Ending, Job};
use blockferry::job::status::Status;
use blockferry_ring::{Region, Turn};
use rustix::event::epoll;

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

const DISK_BYTES: u64 = 64 << 20;
const BLOCK_BYTES: usize = 4096;
const BLOCKS: u64 = DISK_BYTES / BLOCK_BYTES as u64;
const DEPTH: usize = 16;

/// The foreign loop: an epoll set in which the engine is one fd among others.
struct Loop {
    epoll: std::os::fd::OwnedFd,
    longest_turn: Duration,
}

impl Loop {
    fn new(engine: &Engine) -> Fallible<Loop> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        engine.with_fd(|fd| match fd {
            Some(fd) => {
                epoll::add(&epoll, fd, epoll::EventData::new_u64(1), epoll::EventFlags::IN).map_err(Box::from)
            }
            None => Err(Box::<dyn std::error::Error>::from("the engine has no fd to poll")),
        })?;
        Ok(Loop { epoll, longest_turn: Duration::ZERO })
    }

    /// One round: sleep in epoll as long as nothing is to be done, then let the engine turn.
    fn round(&mut self, engine: &Engine, last: Option<Turn>) -> Fallible<Turn> {
        let wait_ns = match last {
            Some(turn) if !turn.more_work => {
                turn.next_deadline.map_or(50_000_000, |at| at.saturating_sub(engine.ring().clock()))
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
        let turn = engine.turn();
        self.longest_turn = self.longest_turn.max(began.elapsed());
        Ok(turn)
    }
}

/// Threads of this process but the kernel's own workers, which serve devices that cannot do without.
fn own_threads() -> Fallible<usize> {
    let mut own = 0;
    for task in std::fs::read_dir("/proc/self/task")? {
        let name = std::fs::read_to_string(task?.path().join("comm"))?;
        own += usize::from(!name.starts_with("iou-wrk"));
    }
    Ok(own)
}

fn main() -> Fallible<()> {
    let directory = std::env::args().nth(1).ok_or("usage: embed DIRECTORY")?;
    let (source, target) = (format!("{directory}/source.img"), format!("{directory}/target.img"));
    for path in [&source, &target] {
        std::fs::File::create(path)?.set_len(DISK_BYTES)?;
    }
    let engine = Engine::without_threads()?;
    let node = engine.open_as_said(&source, &ImageOptions::raw())?;
    let copy = engine.open_as_said(&target, &ImageOptions::raw())?;
    let guest = engine.guest(&node, false)?;

    // The guest's memory: this program's own, registered so that the kernel need not look up its pages.
    let memory = rustix::fs::memfd_create("guest-ram", rustix::fs::MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&memory, (DEPTH * BLOCK_BYTES) as u64)?;
    let ram = Region::map(&memory, 0, DEPTH * BLOCK_BYTES)?;
    // Where that is refused (RLIMIT_MEMLOCK), plain operations are used.
    let _ = engine.ring().register_region(&ram);

    let mut event_loop = Loop::new(&engine)?;
    let mut turn = None;
    let mut starting = Some(engine.start_mirror(&node, &copy, MirrorOptions::new("move")));
    let mut job: Option<Job> = None;
    let (mut written, mut in_flight, mut stop) = (vec![0u64; BLOCKS as usize], 0, false);
    let mut idle: Vec<usize> = (0..DEPTH).collect();
    let mut serial = 0u64;
    while !stop || in_flight > 0 {
        // Keep the disk busy: each block gets a serial number, which is remembered when it is acknowledged.
        while let Some(slot) = idle.pop().filter(|_| !stop) {
            serial += 1;
            let block = (serial * 7919) % BLOCKS;
            ram.write(slot * BLOCK_BYTES, &serial.to_le_bytes());
            let buf = ram.buf(slot * BLOCK_BYTES, BLOCK_BYTES).ok_or("the slot is inside the memory")?;
            guest.write(serial << 8 | slot as u64, block * BLOCK_BYTES as u64, buf, WriteFlags::default());
            in_flight += 1;
        }
        turn = Some(event_loop.round(&engine, turn)?);
        while let Some(done) = guest.pop_completion() {
            done.result?;
            let serial = done.token >> 8;
            written[((serial * 7919) % BLOCKS) as usize] = serial;
            idle.push((done.token & 0xff) as usize);
            in_flight -= 1;
        }
        if let Some(started) = starting.as_ref().and_then(|start| start.try_take()) {
            (job, starting) = (Some(started?), None);
        }
        if let Some(job) = &job {
            if job.status() == Status::Ready && !stop && serial > 20_000 {
                // Not an error when it was said already.
                job.complete()?;
            }
            match job.ending() {
                Some(Ending::Completed) => stop = true,
                Some(ending) => return Err(format!("the mirror ended: {ending:?}").into()),
                None => {}
            }
        }
    }
    let threads = own_threads()?;
    drop((guest, node, copy));
    drop(engine);

    // Every acknowledged write is on the copy, read here by other means.
    let bytes = std::fs::read(&target)?;
    for (block, serial) in written.iter().enumerate() {
        let found = u64::from_le_bytes(bytes[block * BLOCK_BYTES..][..8].try_into()?);
        if found != *serial {
            return Err(format!("block {block} holds {found} instead of {serial}").into());
        }
    }
    println!(
        "{serial} writes, pivoted, every block found on the copy; threads: {threads}; longest turn: {:?}",
        event_loop.longest_turn
    );
    Ok(())
}
