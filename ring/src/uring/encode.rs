//! From an operation to a submission queue entry.
//!
//! Registered memory and files are used wherever they are at hand. Sends and reads of several pieces need a
//! vector (and a message header) that stays put until the completion: it is kept here, and used again.

use std::os::fd::AsRawFd;

use io_uring::{opcode, squeue, types};

use super::Entry;
use crate::mem::Mem;
use crate::op::{Fallocate, FileId, Op, Pieces};

/// `BLOCK_URING_CMD_DISCARD`: `_IO(0x12, 0)`; start in `addr`, length in `addr3`.
const BLOCK_DISCARD: u32 = 0x1200;

/// A message header with its vector, at an address that does not move.
struct Message {
    header: libc::msghdr,
    pieces: Vec<libc::iovec>,
}

/// Headers in use, and spare ones.
#[derive(Default)]
pub(super) struct Messages {
    in_flight: Vec<(u64, Box<Message>)>,
    // Boxes move between the two lists; what the kernel points at does not.
    #[allow(clippy::vec_box)]
    spare: Vec<Box<Message>>,
}

impl Messages {
    fn prepare(&mut self, user_data: u64, pieces: Pieces) -> &Message {
        let mut message = self.spare.pop().unwrap_or_else(|| {
            // SAFETY: a message header is plain data for which all zeroes is a valid, empty value.
            let header = unsafe { std::mem::zeroed() };
            Box::new(Message { header, pieces: Vec::new() })
        });
        message.pieces.clear();
        for i in 0..pieces.len() {
            let mem = piece(pieces, i);
            message.pieces.push(libc::iovec { iov_base: mem.ptr.as_ptr().cast(), iov_len: mem.len() });
        }
        message.header.msg_iov = message.pieces.as_mut_ptr();
        message.header.msg_iovlen = message.pieces.len() as _;
        self.in_flight.push((user_data, message));
        &self.in_flight[self.in_flight.len() - 1].1
    }

    /// The operation has ended (or never started): its header may be used again.
    pub(super) fn finish(&mut self, user_data: u64) {
        if let Some(at) = self.in_flight.iter().position(|(u, _)| *u == user_data) {
            let (_, message) = self.in_flight.swap_remove(at);
            self.spare.push(message);
        }
    }
}

fn piece(pieces: Pieces, index: usize) -> Mem {
    debug_assert!(index < pieces.len());
    // SAFETY: `Pieces` points at the vector in the operation's slot, which is neither changed nor
    // dropped between queueing and completion; the index is below its length.
    unsafe { *pieces.ptr.add(index) }
}

macro_rules! on_file {
    ($file:expr, $id:expr, |$fd:ident| $build:expr) => {
        if $file.fixed {
            let $fd = types::Fixed($id.0);
            $build
        } else {
            let $fd = types::Fd($file.fd.as_raw_fd());
            $build
        }
    };
}

pub(super) fn entry(
    op: &Op,
    file: &Entry,
    id: FileId,
    user_data: u64,
    messages: &mut Messages,
) -> squeue::Entry {
    let entry = match *op {
        Op::Read { offset, mem, .. } => on_file!(file, id, |fd| match mem.fixed {
            Some(index) => {
                opcode::ReadFixed::new(fd, mem.ptr.as_ptr(), mem.len, index).offset(offset).build()
            }
            None => opcode::Read::new(fd, mem.ptr.as_ptr(), mem.len).offset(offset).build(),
        }),
        Op::ReadPieces { offset, pieces, .. } => {
            let vector = &messages.prepare(user_data, pieces).pieces;
            let (first, count) = (vector.as_ptr(), vector.len() as u32);
            on_file!(file, id, |fd| opcode::Readv::new(fd, first, count).offset(offset).build())
        }
        Op::Write { offset, mem, fua, .. } => {
            let flags = if fua { libc::RWF_DSYNC } else { 0 };
            on_file!(file, id, |fd| match mem.fixed {
                Some(index) => opcode::WriteFixed::new(fd, mem.ptr.as_ptr(), mem.len, index)
                    .offset(offset)
                    .rw_flags(flags)
                    .build(),
                None =>
                    opcode::Write::new(fd, mem.ptr.as_ptr(), mem.len).offset(offset).rw_flags(flags).build(),
            })
        }
        Op::Sync { data_only, .. } => {
            let flags = if data_only { types::FsyncFlags::DATASYNC } else { types::FsyncFlags::empty() };
            on_file!(file, id, |fd| opcode::Fsync::new(fd).flags(flags).build())
        }
        Op::Fallocate { mode, offset, len, .. } => {
            let mode = match mode {
                Fallocate::PunchHole => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                Fallocate::ZeroRange => libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
                Fallocate::Allocate => libc::FALLOC_FL_KEEP_SIZE,
            };
            on_file!(file, id, |fd| opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build())
        }
        Op::Discard { offset, len, .. } => {
            let mut command = [0u8; 16];
            command[..8].copy_from_slice(&len.to_ne_bytes());
            on_file!(file, id, |fd| opcode::UringCmd16::new(fd, BLOCK_DISCARD)
                .addr(Some(offset))
                .cmd(command)
                .build())
        }
        Op::Accept { .. } => {
            on_file!(file, id, |fd| opcode::Accept::new(fd, std::ptr::null_mut(), std::ptr::null_mut())
                .flags(libc::SOCK_CLOEXEC)
                .build())
        }
        Op::Connect { .. } => {
            let (address, len) = file.peer.as_ref().map_or((std::ptr::null(), 0), |peer| {
                (peer.as_ptr().cast::<libc::sockaddr>(), peer.addr_len())
            });
            on_file!(file, id, |fd| opcode::Connect::new(fd, address, len).build())
        }
        Op::Recv { mem, .. } => {
            on_file!(file, id, |fd| opcode::Recv::new(fd, mem.ptr.as_ptr(), mem.len).build())
        }
        Op::RecvAll { mem, .. } => on_file!(file, id, |fd| opcode::Recv::new(fd, mem.ptr.as_ptr(), mem.len)
            .flags(libc::MSG_WAITALL)
            .build()),
        Op::Send { mem, .. } => on_file!(file, id, |fd| opcode::Send::new(fd, mem.ptr.as_ptr(), mem.len)
            .flags(libc::MSG_WAITALL | libc::MSG_NOSIGNAL)
            .build()),
        Op::SendPieces { pieces, .. } => {
            let header: *const libc::msghdr = &messages.prepare(user_data, pieces).header;
            on_file!(file, id, |fd| opcode::SendMsg::new(fd, header)
                .flags((libc::MSG_WAITALL | libc::MSG_NOSIGNAL) as u32)
                .build())
        }
    };
    entry.user_data(user_data)
}
