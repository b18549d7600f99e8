//! Embedding: a foreign event loop owns the engine, and a mirror pivots under a guest.
//!
//! The loop and the guest are in [common]. A mirror runs beside the guest's requests and pivots: the guest goes on, on the
//! copy. Commit and stream are shown the same way in `commit.rs` and `stream.rs`.
//!
//! Usage: `cargo run --example embed -- DIRECTORY`

mod common;

use blockferry::engine::ImageOptions;
use blockferry::job::mirror::MirrorOptions;
use blockferry::job::runner::{Ending, Job};
use blockferry::job::status::Status;
use common::{BLOCKS, DISK_BYTES, Fallible, Load, Loop, check_all, own_threads};

fn main() -> Fallible<()> {
    let directory = std::env::args().nth(1).ok_or("usage: embed DIRECTORY")?;
    let (source, target) = (format!("{directory}/source.img"), format!("{directory}/target.img"));
    for path in [&source, &target] {
        std::fs::File::create(path)?.set_len(DISK_BYTES)?;
    }
    let mut vmm = Loop::new()?;
    let node = vmm.engine.open_as_said(&source, &ImageOptions::raw())?;
    let copy = vmm.engine.open_as_said(&target, &ImageOptions::raw())?;
    let mut load = Load::new(&vmm.engine, &node, vec![0; BLOCKS as usize])?;

    let starting = vmm.engine.start_mirror(&node, &copy, MirrorOptions::new("move"));
    let mut job: Option<Job> = None;
    vmm.until(&mut load, |load| {
        if let Some(started) = starting.try_take() {
            job = Some(started?);
        }
        let Some(job) = &job else { return Ok(None) };
        if job.status() == Status::Ready && load.serial > 20_000 {
            // Not an error when it was said already.
            job.complete()?;
        }
        match job.ending() {
            Some(Ending::Completed) => Ok(Some(())),
            Some(ending) => Err(format!("the mirror ended: {ending:?}").into()),
            None => Ok(None),
        }
    })?;
    vmm.quiesce(&mut load)?;
    let threads = own_threads()?;

    check_all(&load.written, &std::fs::read(&target)?)?;
    println!(
        "{} requests, pivoted, every block found on the copy; threads: {threads}; longest turn: {:?}",
        load.serial, vmm.longest_turn
    );
    Ok(())
}
