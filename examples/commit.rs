//! Commit in a foreign event loop: the layers of a chain are merged while a guest goes on reading and writing.
//!
//! The loop and the guest are in [common]. First two intermediate layers go down into the base: the chain gets shorter
//! under the guest. Then the active layer does: that job becomes ready, and completing it lets the guest go on, on the
//! base.
//!
//! Usage: `cargo run --example commit -- DIRECTORY`

mod common;

use blockferry::job::runner::{Ending, Job};
use blockferry::job::status::Status;
use blockferry::job::sweep::SweepOptions;
use common::{Fallible, Loop, check_all, own_threads};

/// Whether a job has completed. One that is ready is told to.
fn is_over(job: &Option<Job>) -> Fallible<bool> {
    let Some(job) = job else { return Ok(false) };
    if job.status() == Status::Ready {
        job.complete()?;
    }
    match job.ending() {
        None => Ok(false),
        Some(Ending::Completed) => Ok(true),
        Some(ending) => Err(format!("the commit ended: {ending:?}").into()),
    }
}

fn main() -> Fallible<()> {
    let directory = std::env::args().nth(1).ok_or("usage: commit DIRECTORY")?;
    let mut vmm = Loop::new()?;
    let (disk, mut load) = vmm.chain(&directory)?;
    let layers = disk.chain();
    let base = layers.last().ok_or("the chain has a base")?;

    for (id, top) in [("intermediate", &layers[1]), ("active", &disk)] {
        let starting = vmm.engine.start_commit(&disk, Some(top), Some(base), SweepOptions::new(id));
        let (mut job, goal) = (None, load.serial + 5000);
        vmm.until(&mut load, |load| {
            if let Some(started) = starting.try_take() {
                job = Some(started?);
            }
            Ok((is_over(&job)? && load.serial > goal).then_some(()))
        })?;
        println!("{id} commit completed; layers left: {}", load.guest.root().node().chain().len());
    }
    vmm.quiesce(&mut load)?;
    let threads = own_threads()?;

    check_all(&load.written, &std::fs::read(format!("{directory}/base.raw"))?)?;
    println!(
        "{} requests, every block found on the base; threads: {threads}; longest turn: {:?}",
        load.serial, vmm.longest_turn
    );
    Ok(())
}
