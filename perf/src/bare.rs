//! A copy loop on io_uring and nothing else: what the kernel allows.
//!
//! Registered buffers and files, one issuer, deferred task work; each slot reads a block, writes it, and takes the next
//! block. No layers, no limits, no zero detection, no error policy: the first error ends it. With several threads, each
//! has a ring and a part of the disk. It knows holes if asked to (as `lseek` tells them).
//!
//! It is `unsafe` for the reason that the ring's kernel backend is: the kernel is handed pointers.

#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use crate::Fallible;

/// What to copy, and how.
#[derive(Clone, Debug)]
pub struct BareCopy {
    pub source: PathBuf,
    pub target: PathBuf,
    /// Blocks in flight, of each thread.
    pub depth: usize,
    /// Bytes of a block.
    pub block_bytes: usize,
    pub threads: usize,
    /// Ask where data is, and copy only that; the target has to be all zeroes.
    pub sparse: bool,
}

/// Bytes to which O_DIRECT wants memory aligned anywhere.
const ALIGN: usize = 4096;

#[derive(Clone, Copy)]
struct Piece {
    offset: u64,
    len: u32,
}

fn open(path: &Path, write: bool) -> Fallible<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(write).custom_flags(libc::O_DIRECT);
    options.open(path).map_err(|error| format!("'{}': {error}", path.display()).into())
}

/// Bytes of a file or a device.
fn len_of(file: &File) -> Fallible<u64> {
    Ok(rustix::fs::seek(file, rustix::fs::SeekFrom::End(0))?)
}

/// Where there is data, as ranges.
fn data_of(file: &File, len: u64, sparse: bool) -> Fallible<Vec<(u64, u64)>> {
    use rustix::fs::{SeekFrom, seek};
    if !sparse {
        return Ok(vec![(0, len)]);
    }
    let (mut ranges, mut at) = (Vec::new(), 0);
    while at < len {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        at = seek(file, SeekFrom::Hole(start))?;
        ranges.push((start, at));
    }
    Ok(ranges)
}

/// Copies, and returns when the target is durable.
pub fn copy(job: &BareCopy) -> Fallible<()> {
    let (source, target) = (open(&job.source, false)?, open(&job.target, true)?);
    let len = len_of(&source)?;
    if len_of(&target)? < len {
        return Err("the target is smaller than the source".into());
    }
    let mut pieces = Vec::new();
    for (start, end) in data_of(&source, len, job.sparse)? {
        for offset in (start..end).step_by(job.block_bytes) {
            let len = (end - offset).min(job.block_bytes as u64);
            pieces.push(Piece { offset, len: u32::try_from(len)? });
        }
    }
    let part = pieces.len().div_ceil(job.threads.max(1)).max(1);
    std::thread::scope(|scope| {
        let workers: Vec<_> = pieces
            .chunks(part)
            .map(|pieces| {
                let (source, target) = (&source, &target);
                scope.spawn(move || {
                    lane(source, target, pieces, job.depth, job.block_bytes)
                        .map_err(|error| error.to_string())
                })
            })
            .collect();
        for worker in workers {
            worker.join().map_err(|_| "a thread of the loop panicked")??;
        }
        Ok::<(), Box<dyn std::error::Error>>(())
    })?;
    Ok(target.sync_data()?)
}

const SOURCE: types::Fixed = types::Fixed(0);
const TARGET: types::Fixed = types::Fixed(1);

fn lane(source: &File, target: &File, pieces: &[Piece], depth: usize, block_bytes: usize) -> Fallible<()> {
    let depth = depth.min(pieces.len()).max(1);
    let entries = u32::try_from(depth.next_power_of_two())?;
    let mut ring: IoUring<squeue::Entry, cqueue::Entry> =
        IoUring::builder().setup_single_issuer().setup_defer_taskrun().setup_clamp().build(entries)?;
    let mut memory = vec![0u8; depth * block_bytes + ALIGN];
    let base = memory.as_mut_ptr();
    let base = base.wrapping_add(base.align_offset(ALIGN));
    let buffer = |slot: usize| base.wrapping_add(slot * block_bytes);
    let vectors: Vec<libc::iovec> =
        (0..depth).map(|slot| libc::iovec { iov_base: buffer(slot).cast(), iov_len: block_bytes }).collect();
    // SAFETY: `memory` outlives the ring's last operation: the loop below ends with nothing in flight, and where it ends
    // with an error the memory is leaked.
    unsafe { ring.submitter().register_buffers(&vectors)? };
    ring.submitter().register_files(&[source.as_raw_fd(), target.as_raw_fd()])?;
    let result = turn(&mut ring, pieces, depth, buffer);
    if result.is_err() {
        std::mem::forget(memory);
    }
    result
}

fn turn(
    ring: &mut IoUring<squeue::Entry, cqueue::Entry>,
    pieces: &[Piece],
    depth: usize,
    buffer: impl Fn(usize) -> *mut u8,
) -> Fallible<()> {
    let mut next = pieces.iter();
    let mut slots: Vec<Option<Piece>> = (0..depth).map(|_| next.next().copied()).collect();
    let mut in_flight = 0;
    let read = |slot: usize, piece: Piece| {
        opcode::ReadFixed::new(SOURCE, buffer(slot), piece.len, slot as u16)
            .offset(piece.offset)
            .build()
            .user_data((slot as u64) << 1)
    };
    let write = |slot: usize, piece: Piece| {
        opcode::WriteFixed::new(TARGET, buffer(slot), piece.len, slot as u16)
            .offset(piece.offset)
            .build()
            .user_data((slot as u64) << 1 | 1)
    };
    let mut queue: Vec<squeue::Entry> = Vec::with_capacity(depth);
    for (slot, piece) in slots.iter().enumerate() {
        queue.extend(piece.map(|piece| read(slot, piece)));
    }
    loop {
        in_flight += queue.len();
        for entry in queue.drain(..) {
            // SAFETY: the entry's memory is a registered buffer of the caller, alive until nothing is in flight, and a
            // slot has one operation at a time. The queue has room for one entry a slot.
            unsafe { ring.submission().push(&entry)? };
        }
        if in_flight == 0 {
            return Ok(());
        }
        match ring.submit_and_wait(1) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            other => other?,
        };
        for completion in ring.completion() {
            in_flight -= 1;
            let slot = usize::try_from(completion.user_data() >> 1)?;
            let piece = slots[slot].ok_or("a completion of nothing")?;
            if completion.result() < 0 {
                return Err(std::io::Error::from_raw_os_error(-completion.result()).into());
            }
            if completion.result().unsigned_abs() != piece.len {
                return Err(format!("a short transfer at {}", piece.offset).into());
            }
            if completion.user_data() & 1 == 0 {
                queue.push(write(slot, piece));
            } else {
                slots[slot] = next.next().copied();
                queue.extend(slots[slot].map(|piece| read(slot, piece)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disks::{Content, make_file};

    #[test]
    fn it_copies() {
        let base = std::env::temp_dir().join(format!("blockferry-perf-bare-{}", std::process::id()));
        let (source, target) = (base.with_extension("src"), base.with_extension("dst"));
        let bytes = 21 << 20;
        for (content, sparse, threads) in
            [(Content::Random(1), false, 2), (Content::Tenth(1), true, 1), (Content::Random(2), false, 1)]
        {
            let _ = (std::fs::remove_file(&source), std::fs::remove_file(&target));
            make_file(&source, bytes).unwrap();
            make_file(&target, bytes).unwrap();
            if content.fill(&source, bytes).is_err() {
                continue;
            }
            let (source, target) = (source.clone(), target.clone());
            let job = BareCopy { source, target, depth: 3, block_bytes: 1 << 18, threads, sparse };
            copy(&job).unwrap();
            content.check(&job.target, bytes).unwrap();
        }
        let _ = (std::fs::remove_file(&source), std::fs::remove_file(&target));
    }
}
