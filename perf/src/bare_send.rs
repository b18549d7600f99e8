//! Sending through a socket on io_uring and nothing else: what registered buffers and zero-copy sends save, or cost.
//!
//! One thread sends blocks, one after the other, as a connection with much to say does; another reads them and throws
//! them away. With zero copy a block's memory is used again when the kernel gives it back, and the kernel is asked whether
//! it copied after all. It is `unsafe` because the kernel is handed pointers.

#![allow(unsafe_code)]

use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use io_uring::{IoUring, cqueue, opcode, squeue, types};

use crate::Fallible;
use crate::sys::cpu_secs;

/// How blocks are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum How {
    /// `IORING_OP_SEND` from ordinary memory.
    Send,
    /// `IORING_OP_WRITE_FIXED` from a registered buffer.
    WriteFixed,
    /// `IORING_OP_SEND_ZC`.
    ZeroCopy,
    /// The same from a registered buffer.
    ZeroCopyFixed,
}

/// What to send, and how.
#[derive(Clone, Copy, Debug)]
pub struct BareSend {
    pub how: How,
    /// Over TCP on the loopback device instead of a Unix socket.
    pub tcp: bool,
    pub block_bytes: usize,
    pub bytes: u64,
}

/// Blocks in memory; with zero copy so many may wait to be given back.
const BLOCKS: usize = 16;
/// Asks whether a zero-copy send copied (`IORING_SEND_ZC_REPORT_USAGE`); the answer is the topmost bit.
const REPORT_USAGE: u16 = 1 << 3;
const COPIED: u32 = 1 << 31;

/// Sends, and prints what that took.
pub fn send(job: &BareSend) -> Fallible<()> {
    let cpu = cpu_secs(i32::try_from(std::process::id())?)?;
    let began = Instant::now();
    let copied = if job.tcp {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let from = TcpStream::connect(listener.local_addr()?)?;
        from.set_nodelay(true)?;
        pump(job, from.as_raw_fd(), listener.accept()?.0)?
    } else {
        let (from, to) = UnixStream::pair()?;
        pump(job, from.as_raw_fd(), to)?
    };
    let secs = began.elapsed().as_secs_f64();
    let cpu = cpu_secs(i32::try_from(std::process::id())?)? - cpu;
    let gib = job.bytes as f64 / f64::from(1 << 30);
    println!(
        "{:?} over {}, blocks of {} KiB: {:.2} GiB/s, {:.3} s of CPU a GiB{}",
        job.how,
        if job.tcp { "TCP" } else { "a Unix socket" },
        job.block_bytes >> 10,
        gib / secs,
        cpu / gib,
        if copied { "; the kernel copied all the same" } else { "" }
    );
    Ok(())
}

/// Sends all blocks to the other end of a socket; whether zero-copy sends were copied.
fn pump(job: &BareSend, from: RawFd, mut to: impl Read + Send) -> Fallible<bool> {
    let mut ring: IoUring<squeue::Entry, cqueue::Entry> =
        IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(64)?;
    let mut memory = vec![1u8; BLOCKS * job.block_bytes];
    let base = memory.as_mut_ptr();
    let block = |index: usize| base.wrapping_add(index * job.block_bytes);
    let vectors: Vec<libc::iovec> = (0..BLOCKS)
        .map(|index| libc::iovec { iov_base: block(index).cast(), iov_len: job.block_bytes })
        .collect();
    // SAFETY: the memory is leaked below, so it outlives whatever the kernel does with it.
    unsafe { ring.submitter().register_buffers(&vectors)? };
    std::mem::forget(memory);
    let bytes = job.bytes;
    std::thread::scope(|scope| {
        let reader = scope.spawn(move || {
            let mut buffer = vec![0; 256 << 10];
            let mut left = bytes;
            while left > 0 {
                match to.read(&mut buffer) {
                    Ok(0) | Err(_) => return,
                    Ok(n) => left -= n as u64,
                }
            }
        });
        let result = send_all(&mut ring, job, from, block);
        if result.is_err() {
            // SAFETY: the descriptor belongs to the caller, who keeps it open.
            unsafe { libc::shutdown(from, libc::SHUT_RDWR) };
        }
        reader.join().map_err(|_| "the reader panicked")?;
        result
    })
}

fn entry(job: &BareSend, from: RawFd, memory: *const u8, index: usize, len: u32) -> squeue::Entry {
    let (fd, all) = (types::Fd(from), libc::MSG_WAITALL | libc::MSG_NOSIGNAL);
    let zero_copy = opcode::SendZc::new(fd, memory, len).flags(all).zc_flags(REPORT_USAGE);
    let entry = match job.how {
        How::Send => opcode::Send::new(fd, memory, len).flags(all).build(),
        How::WriteFixed => opcode::WriteFixed::new(fd, memory, len, index as u16).build(),
        How::ZeroCopy => zero_copy.build(),
        How::ZeroCopyFixed => zero_copy.buf_index(Some(index as u16)).build(),
    };
    entry.user_data(index as u64)
}

fn send_all(
    ring: &mut IoUring<squeue::Entry, cqueue::Entry>,
    job: &BareSend,
    from: RawFd,
    block: impl Fn(usize) -> *mut u8,
) -> Fallible<bool> {
    let (mut left, mut copied, mut sending) = (job.bytes, false, false);
    let mut free: Vec<usize> = (0..BLOCKS).collect();
    // Where a send ended early it goes on in its block.
    let mut rest: Option<(usize, usize)> = None;
    while left > 0 || sending || free.len() < BLOCKS {
        if !sending && left > 0 {
            let next = rest.take().or_else(|| free.pop().map(|index| (index, 0)));
            if let Some((index, done)) = next {
                let len = (job.block_bytes - done).min(usize::try_from(left)?);
                let entry = entry(job, from, block(index).wrapping_add(done), index, u32::try_from(len)?);
                // SAFETY: the block is not used for anything else until the kernel gives it back, and is never freed.
                unsafe { ring.submission().push(&entry)? };
                sending = true;
            }
        }
        ring.submit_and_wait(1)?;
        for completion in ring.completion() {
            let index = usize::try_from(completion.user_data())?;
            if cqueue::notif(completion.flags()) {
                copied |= completion.result() as u32 & COPIED != 0;
                free.push(index);
                continue;
            }
            if completion.result() < 0 {
                return Err(std::io::Error::from_raw_os_error(-completion.result()).into());
            }
            sending = false;
            let sent = completion.result() as usize;
            left -= sent as u64;
            if !cqueue::more(completion.flags()) {
                if sent < job.block_bytes && left > 0 {
                    // Only ordinary sends are continued; the next zero-copy send takes another block.
                    rest = Some((index, sent % job.block_bytes));
                } else {
                    free.push(index);
                }
            }
        }
    }
    Ok(copied)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_arrives_or_the_kernel_says_that_it_cannot() {
        for tcp in [false, true] {
            for how in [How::Send, How::WriteFixed, How::ZeroCopy, How::ZeroCopyFixed] {
                let job = BareSend { how, tcp, block_bytes: 64 << 10, bytes: (5 << 20) + 77 };
                match send(&job) {
                    Ok(()) => {}
                    Err(error) => {
                        let errno = error.downcast_ref::<std::io::Error>().and_then(|e| e.raw_os_error());
                        assert!(errno == Some(libc::EOPNOTSUPP) && !tcp, "{job:?}: {error}");
                    }
                }
            }
        }
    }
}
