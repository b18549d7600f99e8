//! Operations as plain data: what a backend is asked to do.

use std::rc::{Rc, Weak};

use crate::errno::Errno;
use crate::mem::{Buf, Mem, SharedBuf};

/// Names an open file or socket within one ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId(pub u32);

/// What closes a file when its last holder is gone.
pub(crate) trait CloseFile {
    fn close_file(&self, id: FileId);
}

/// An open file or socket. It closes when its last holder, operations in flight included, is gone.
#[derive(Clone)]
pub struct File(Rc<FileInner>);

struct FileInner {
    id: FileId,
    closer: Weak<dyn CloseFile>,
}

impl File {
    pub(crate) fn new(id: FileId, closer: Weak<dyn CloseFile>) -> File {
        File(Rc::new(FileInner { id, closer }))
    }

    /// Its name within the ring.
    pub fn id(&self) -> FileId {
        self.0.id
    }
}

impl std::fmt::Debug for File {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "File({})", self.0.id.0)
    }
}

impl Drop for FileInner {
    fn drop(&mut self) {
        if let Some(closer) = self.closer.upgrade() {
            closer.close_file(self.id);
        }
    }
}

/// The forms of `fallocate` in use. None of them changes a file's length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fallocate {
    /// Deallocate; reads as zeroes afterwards.
    PunchHole,
    /// Make it read as zeroes, by whatever means, keeping it allocated where the filesystem can.
    ZeroRange,
    /// Allocate without changing contents.
    Allocate,
}

/// How a range gets from one file to another without passing through this program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CopyHow {
    /// The files share the blocks from then on (FICLONERANGE): all of the range, or none of it.
    Reflink,
    /// By whatever means the kernel or the other machine has (copy_file_range).
    Offload,
}

/// One operation.
#[derive(Clone, Copy, Debug)]
pub enum Op {
    /// Read at an offset.
    Read { file: FileId, offset: u64, mem: Mem },
    /// Read at an offset into all pieces, in order. The vector lives in the operation's slot.
    ReadPieces { file: FileId, offset: u64, pieces: Pieces },
    /// Write at an offset; `fua`: durable when complete.
    Write { file: FileId, offset: u64, mem: Mem, fua: bool },
    /// Make what was written durable; `data_only` leaves out metadata that reading does not need.
    Sync { file: FileId, data_only: bool },
    /// Change the allocation of a range.
    Fallocate { file: FileId, mode: Fallocate, offset: u64, len: u64 },
    /// Discard a range of a block device (contents undefined afterwards).
    Discard { file: FileId, offset: u64, len: u64 },
    /// Accept a connection; the result is a [`FileId`].
    Accept { file: FileId },
    /// Connect a socket to the address that it was made for.
    Connect { file: FileId },
    /// Receive what has come, up to the memory's length; 0 is the end of the stream.
    Recv { file: FileId, mem: Mem },
    /// Receive until the memory is full; less means the end of the stream.
    RecvAll { file: FileId, mem: Mem },
    /// Send all of it.
    Send { file: FileId, mem: Mem },
    /// Send all pieces, in order. The vector lives in the operation's slot.
    SendPieces { file: FileId, pieces: Pieces },
}

/// Pieces of memory to send or to fill in one go. Points into the operation's slot.
#[derive(Clone, Copy, Debug)]
pub struct Pieces {
    pub(crate) ptr: *const Mem,
    pub(crate) len: u32,
}

impl Pieces {
    pub(crate) fn new(pieces: &[Mem]) -> Pieces {
        Pieces { ptr: pieces.as_ptr(), len: pieces.len() as u32 }
    }

    pub(crate) fn len(&self) -> usize {
        self.len as usize
    }

    /// Bytes of all of them.
    pub(crate) fn bytes(&self) -> u64 {
        self.iter().map(|mem| mem.len() as u64).sum()
    }
}

impl Op {
    /// The file that it is about.
    pub fn file(&self) -> FileId {
        match *self {
            Op::Read { file, .. }
            | Op::ReadPieces { file, .. }
            | Op::Write { file, .. }
            | Op::Sync { file, .. }
            | Op::Fallocate { file, .. }
            | Op::Discard { file, .. }
            | Op::Accept { file }
            | Op::Connect { file }
            | Op::Recv { file, .. }
            | Op::RecvAll { file, .. }
            | Op::Send { file, .. }
            | Op::SendPieces { file, .. } => file,
        }
    }

    /// Bytes that it moves to or from a disk inside the enter that submits it, at worst.
    pub fn bytes(&self) -> u64 {
        match self {
            Op::Read { mem, .. } | Op::Write { mem, .. } => mem.len() as u64,
            Op::ReadPieces { pieces, .. } => pieces.bytes(),
            _ => 0,
        }
    }

    /// A short name for traces and statistics.
    pub fn name(&self) -> &'static str {
        match self {
            Op::Read { .. } | Op::ReadPieces { .. } => "read",
            Op::Write { .. } => "write",
            Op::Sync { .. } => "sync",
            Op::Fallocate { .. } => "fallocate",
            Op::Discard { .. } => "discard",
            Op::Accept { .. } => "accept",
            Op::Connect { .. } => "connect",
            Op::Recv { .. } | Op::RecvAll { .. } => "recv",
            Op::Send { .. } | Op::SendPieces { .. } => "send",
        }
    }

    /// The memory of a one-piece transfer.
    pub fn mem(&self) -> Option<Mem> {
        match *self {
            Op::Read { mem, .. }
            | Op::Write { mem, .. }
            | Op::Recv { mem, .. }
            | Op::RecvAll { mem, .. }
            | Op::Send { mem, .. } => Some(mem),
            _ => None,
        }
    }

    /// How a transfer goes on after `done` of its bytes; `None` when it is finished (or cannot be
    /// continued, because one result is all there is).
    pub(crate) fn remainder(&self, done: usize) -> Option<Op> {
        let mut op = *self;
        match &mut op {
            Op::Read { offset, mem, .. } | Op::Write { offset, mem, .. } => {
                *offset += done as u64;
                *mem = mem.tail(done);
                (!mem.is_empty()).then_some(op)
            }
            Op::RecvAll { mem, .. } | Op::Send { mem, .. } => {
                *mem = mem.tail(done);
                (!mem.is_empty()).then_some(op)
            }
            _ => None,
        }
    }
}

/// What an operation holds until its terminal completion.
#[derive(Debug)]
pub(crate) enum Held {
    None,
    Buf(Buf),
    Shared {
        _buf: SharedBuf,
    },
    /// Pieces and their memory descriptions (the backend points at the latter).
    Pieces {
        _bufs: Vec<SharedBuf>,
        mems: Vec<Mem>,
    },
    /// Pieces that are filled, and their memory descriptions.
    Bufs {
        bufs: Vec<Buf>,
        mems: Vec<Mem>,
    },
}

/// The end of an operation: the bytes moved (or other non-negative result), or an error.
pub type OpResult = Result<u32, Errno>;
