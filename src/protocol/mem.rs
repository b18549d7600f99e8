//! A disk in memory, gone at the end. It is sparse: what was never written takes no room.
//!
//! For tests, for trying things out, and as a target that shows what the rest of the engine costs.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use blockferry_ring::{Buf, Errno, Ring, SharedBuf};

use crate::base::range::ByteRange;
use crate::block::{
    BlockError, Capabilities, Driver, Extent, IoFuture, IoResult, Limits, Operation, Permissions, WriteFlags,
    ZeroFlags,
};

/// Bytes of a piece of memory, the unit of allocation.
const PIECE_BYTES: u64 = 64 << 10;

/// A disk in memory.
#[derive(Debug)]
pub struct MemDriver {
    ring: Ring,
    name: String,
    len: Cell<u64>,
    read_only: Cell<bool>,
    pieces: RefCell<Pieces>,
}

/// What was written, by the number of the piece.
#[derive(Default)]
struct Pieces(BTreeMap<u64, Box<[u8]>>);

impl std::fmt::Debug for Pieces {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} pieces", self.0.len())
    }
}

impl Pieces {
    fn read(&self, offset: u64, buf: &mut Buf) {
        buf.fill_zero();
        for part in parts(ByteRange::at_saturating(offset, buf.len() as u64)) {
            if let Some(piece) = self.0.get(&part.number) {
                let bytes = &piece[part.inside.clone()];
                buf.copy_from((part.start - offset) as usize, bytes);
            }
        }
    }

    fn write(&mut self, offset: u64, buf: &SharedBuf) {
        for part in parts(ByteRange::at_saturating(offset, buf.len() as u64)) {
            let piece =
                self.0.entry(part.number).or_insert_with(|| vec![0; PIECE_BYTES as usize].into_boxed_slice());
            buf.copy_to((part.start - offset) as usize, &mut piece[part.inside]);
        }
    }

    fn zero(&mut self, range: ByteRange) {
        for part in parts(range) {
            if part.inside.len() as u64 == PIECE_BYTES {
                self.0.remove(&part.number);
            } else if let Some(piece) = self.0.get_mut(&part.number) {
                piece[part.inside].fill(0);
            }
        }
    }

    /// Forgets what lies from `len` on.
    fn cut(&mut self, len: u64) {
        self.0.split_off(&len.div_ceil(PIECE_BYTES));
        if let Some(last) = self.0.get_mut(&(len / PIECE_BYTES)) {
            last[(len % PIECE_BYTES) as usize..].fill(0);
        }
    }

    fn status(&self, range: ByteRange) -> Extent {
        let number = range.start() / PIECE_BYTES;
        let known = |from: u64| self.0.range(from..).next().map(|(&number, _)| number);
        if known(number) == Some(number) {
            let mut end = number + 1;
            while end * PIECE_BYTES < range.end() && self.0.contains_key(&end) {
                end += 1;
            }
            Extent::data((end * PIECE_BYTES).min(range.end()) - range.start())
        } else {
            let end = known(number).map_or(u64::MAX, |next| next * PIECE_BYTES);
            Extent::hole(end.min(range.end()) - range.start())
        }
    }
}

/// The part of a range that lies in one piece.
struct Part {
    number: u64,
    start: u64,
    inside: std::ops::Range<usize>,
}

fn parts(range: ByteRange) -> impl Iterator<Item = Part> {
    let mut rest = range;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let number = rest.start() / PIECE_BYTES;
        let base = number * PIECE_BYTES;
        let (part, after) = rest.split_at(base.saturating_add(PIECE_BYTES));
        rest = after;
        let inside = (part.start() - base) as usize..(part.end() - base) as usize;
        Some(Part { number, start: part.start(), inside })
    })
}

impl MemDriver {
    /// A disk of `len` bytes, all zeroes.
    pub fn new(ring: &Ring, name: impl Into<String>, len: u64, read_only: bool) -> MemDriver {
        MemDriver {
            ring: ring.clone(),
            name: name.into(),
            len: Cell::new(len),
            read_only: Cell::new(read_only),
            pieces: RefCell::default(),
        }
    }

    /// A change of `range`, unless the disk was opened read-only.
    fn change<'a>(
        &'a self,
        operation: Operation,
        range: ByteRange,
        change: impl FnOnce(&mut Pieces) + 'a,
    ) -> IoFuture<'a, IoResult> {
        self.ring.boxed(async move {
            if self.read_only.get() {
                let (offset, len) = (range.start(), range.len());
                return Err(BlockError::at(operation, self.name.as_str(), offset, len, Errno::EROFS)
                    .because("The image was opened read-only."));
            }
            change(&mut self.pieces.borrow_mut());
            // What lies behind the end lengthens the disk.
            if matches!(operation, Operation::Write | Operation::WriteZeroes) {
                self.len.set(self.len.get().max(range.end()));
            }
            Ok(())
        })
    }
}

impl Driver for MemDriver {
    fn kind(&self) -> &'static str {
        "mem"
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> u64 {
        self.len.get()
    }

    fn is_read_only(&self) -> bool {
        self.read_only.get()
    }

    fn limits(&self) -> Limits {
        let unit = PIECE_BYTES as u32;
        Limits { zero_align: unit, discard_align: unit, cluster_size: Some(unit), ..Limits::default() }
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { fua: true, discard: true, zero_fast: true, zero_unmap: true, status: true }
    }

    fn read(&self, offset: u64, mut buf: Buf) -> IoFuture<'_, (Buf, IoResult)> {
        self.ring.boxed(async move {
            self.pieces.borrow().read(offset, &mut buf);
            (buf, Ok(()))
        })
    }

    fn write(&self, offset: u64, buf: SharedBuf, _flags: WriteFlags) -> IoFuture<'_, IoResult> {
        let range = ByteRange::at_saturating(offset, buf.len() as u64);
        self.change(Operation::Write, range, move |pieces| pieces.write(offset, &buf))
    }

    fn flush(&self) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async { Ok(()) })
    }

    fn discard(&self, offset: u64, len: u64) -> IoFuture<'_, IoResult> {
        let range = ByteRange::at_saturating(offset, len);
        self.change(Operation::Discard, range, move |pieces| pieces.zero(range))
    }

    fn write_zeroes(&self, offset: u64, len: u64, _flags: ZeroFlags) -> IoFuture<'_, IoResult> {
        let range = ByteRange::at_saturating(offset, len);
        self.change(Operation::WriteZeroes, range, move |pieces| pieces.zero(range))
    }

    fn block_status(&self, offset: u64, len: u64) -> IoFuture<'_, Result<Extent, BlockError>> {
        self.ring.boxed(async move { Ok(self.pieces.borrow().status(ByteRange::at_saturating(offset, len))) })
    }

    fn reopen(&self, read_only: bool) -> Option<IoFuture<'_, IoResult>> {
        self.read_only.set(read_only);
        Some(self.ring.boxed(async { Ok(()) }))
    }

    fn set_permissions(&self, _permissions: Permissions) -> IoResult {
        Ok(())
    }

    fn set_len(&self, len: u64) -> IoFuture<'_, IoResult> {
        self.change(Operation::Resize, ByteRange::first(len), move |pieces| {
            pieces.cut(len);
            self.len.set(len);
        })
    }

    fn allocated_bytes(&self) -> Option<u64> {
        Some(self.pieces.borrow().0.len() as u64 * PIECE_BYTES)
    }
}
