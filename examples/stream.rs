//! Stream in a foreign event loop: a disk becomes independent of its backing files while a guest goes on reading and
//! writing.
//!
//! The loop and the guest are in [common]. First the two layers above the base go up into the active layer, then the base
//! as well. What the guest reads is filled first.
//!
//! Usage: `cargo run --example stream -- DIRECTORY`

mod common;

use blockferry::engine::ImageOptions;
use blockferry::job::runner::{Ending, Job};
use blockferry::job::stream::Floor;
use blockferry::job::sweep::SweepOptions;
use common::{DISK_BYTES, Fallible, Loop, check_all, own_threads};

fn main() -> Fallible<()> {
    let directory = std::env::args().nth(1).ok_or("usage: stream DIRECTORY")?;
    let mut vmm = Loop::new()?;
    let (disk, mut load) = vmm.chain(&directory)?;
    let base = disk.chain().last().cloned().ok_or("the chain has a base")?;

    for (id, floor) in [("partial", Floor::Base(base)), ("whole", Floor::Whole)] {
        let starting = vmm.engine.start_stream(&disk, None, floor, SweepOptions::new(id));
        let mut job: Option<Job> = None;
        let goal = load.serial + 5000;
        vmm.until(&mut load, |load| {
            if let Some(started) = starting.try_take() {
                job = Some(started?);
            }
            match job.as_ref().and_then(Job::ending) {
                Some(Ending::Completed) => Ok((load.serial > goal).then_some(())),
                Some(ending) => Err(format!("the stream ended: {ending:?}").into()),
                None => Ok(None),
            }
        })?;
        println!("{id} stream completed; layers left: {}", disk.chain().len());
    }
    vmm.quiesce(&mut load)?;
    let threads = own_threads()?;
    let wanted = load.written.clone();
    drop((load.guest, disk));

    // Everything is in one file: its backing files may go.
    for name in ["base.raw", "one.qcow2", "two.qcow2"] {
        std::fs::remove_file(format!("{directory}/{name}"))?;
    }
    let disk = vmm.open(&format!("{directory}/top.qcow2"), &ImageOptions::read_only())?;
    let ring = vmm.engine.ring().clone();
    let driver = disk.driver().clone();
    let reading = vmm.engine.ring().spawn_with_result(async move {
        let mut bytes = vec![0; DISK_BYTES as usize];
        for (i, piece) in bytes.chunks_mut(1 << 20).enumerate() {
            let (buf, result) = driver.read((i as u64) << 20, ring.alloc(piece.len()).await).await;
            result?;
            buf.copy_to(0, piece);
        }
        Ok::<_, blockferry::block::BlockError>(bytes)
    });
    let bytes = vmm.wait(&reading)?;
    check_all(&wanted, &bytes)?;
    println!(
        "{} requests, every block found without backing files; threads: {threads}; longest turn: {:?}",
        load.serial, vmm.longest_turn
    );
    Ok(())
}
