//! Requests for parts of blocks, where only whole blocks can be had.
//!
//! A file with O_DIRECT and a server with a minimum block size take whole blocks. What is read lies inside of the blocks
//! around it; what is written takes their place: the first and the last of them are read first, for what belongs to
//! others in them. Both go through memory in between ([`Reserve`]), piece by piece.
//!
//! # Order
//! Between the reading and the writing of such a *rewrite* nobody else may change its blocks, or it puts old bytes back. So
//! every change of the disk (write, zeroes, discard) claims the blocks that it touches ([`crate::block::serial`]): a rewrite
//! alone, a change of whole blocks together with its like. What two overlapping plain writes leave behind is their owner's
//! business, as on any disk. Reads claim nothing: a rewrite puts the bytes that it does not own back as they were. Where a
//! block is one byte there are no rewrites, and no claims.

use blockferry_ring::arena::BLOCK_MAX;
use blockferry_ring::{Buf, SharedBuf};

use crate::base::range::ByteRange;
use crate::block::serial::LockKind;
use crate::block::{NoMemory, Reserve};

/// What is to be written.
#[derive(Clone, Copy)]
pub(super) enum Source<'a> {
    /// These bytes, as many as the range has.
    Buf(&'a SharedBuf),
    /// As many zeroes.
    Zeroes,
}

/// How a change claims the blocks that it touches.
pub(super) fn kind_of_change(rewrite: bool) -> LockKind {
    if rewrite { LockKind::Exclusive } else { LockKind::Shared }
}

/// How whole blocks are had.
#[derive(Clone, Copy)]
pub(super) struct Blocks<'a> {
    /// Memory in between.
    pub(super) memory: &'a Reserve,
    /// Bytes of a block. The reserve has at least as many.
    pub(super) block: u64,
    /// Whole blocks, the most that is read or written at once.
    pub(super) bytes_max: u64,
}

impl Blocks<'_> {
    /// As much memory as `outer` asks for, and the pieces in which it passes through.
    fn pieces(&self, outer: ByteRange, len: usize) -> impl Iterator<Item = ByteRange> + use<> {
        outer.chunks(self.bytes_max.min(len as u64))
    }

    fn wanted(&self, outer: ByteRange) -> usize {
        outer.len().min(self.bytes_max).min(BLOCK_MAX as u64) as usize
    }

    /// Reads `range` into `buf` by way of the whole blocks around it, `outer`.
    pub(super) async fn read<E: From<NoMemory>>(
        &self,
        outer: ByteRange,
        range: ByteRange,
        mut buf: Buf,
        get: impl AsyncFn(u64, Buf) -> (Buf, Result<(), E>),
    ) -> (Buf, Result<(), E>) {
        let result = self.read_to(outer, range, &mut buf, get).await;
        (buf, result)
    }

    async fn read_to<E: From<NoMemory>>(
        &self,
        outer: ByteRange,
        range: ByteRange,
        buf: &mut Buf,
        get: impl AsyncFn(u64, Buf) -> (Buf, Result<(), E>),
    ) -> Result<(), E> {
        let mut lease = self.memory.take(self.wanted(outer)).await;
        for piece in self.pieces(outer, lease.len()) {
            lease.fill(0, piece.len() as usize, async |part| get(piece.start(), part).await).await?;
            if let Some(wanted) = piece.intersect(range) {
                let at = (wanted.start() - piece.start()) as usize;
                let bytes = &lease.bytes()?[at..at + wanted.len() as usize];
                buf.copy_from((wanted.start() - range.start()) as usize, bytes);
            }
        }
        Ok(())
    }

    /// Writes `range` by way of the whole blocks around it, `outer`. The last of them may be cut by the end of the disk.
    pub(super) async fn rewrite<E: From<NoMemory>>(
        &self,
        outer: ByteRange,
        range: ByteRange,
        source: Source<'_>,
        get: impl AsyncFn(u64, Buf) -> (Buf, Result<(), E>),
        put: impl AsyncFn(u64, SharedBuf) -> Result<(), E>,
    ) -> Result<(), E> {
        let block = self.block as usize;
        let mut lease = self.memory.take(self.wanted(outer)).await;
        for piece in self.pieces(outer, lease.len()) {
            let Some(ours) = piece.intersect(range) else { continue };
            let len = piece.len() as usize;
            let (head, tail) = (ours.start() > piece.start(), ours.end() < piece.end());
            if head {
                lease.fill(0, block.min(len), async |part| get(piece.start(), part).await).await?;
            }
            if tail && !(head && len <= block) {
                let from = (len - 1) / block * block;
                let at = piece.start() + from as u64;
                lease.fill(from, len, async |part| get(at, part).await).await?;
            }
            let at = (ours.start() - piece.start()) as usize;
            let bytes = &mut lease.bytes()?[at..at + ours.len() as usize];
            match source {
                Source::Buf(buf) => buf.copy_to((ours.start() - range.start()) as usize, bytes),
                Source::Zeroes => bytes.fill(0),
            }
            lease.write(0, len, async |buf| put(piece.start(), buf).await).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use blockferry_ring::{Config, Errno, Ring};

    use super::*;

    /// Every range of a small disk whose last block is cut, with room for one block at a time and for all of it: the
    /// bytes are where they belong, those around them as they were, and only blocks with others' bytes are read.
    #[test]
    fn parts_of_blocks_are_read_and_written() {
        const LEN: u64 = 44;
        const BLOCK: u64 = 8;
        let ring = Ring::new(&Config { arena_bytes: 1 << 20, ..Config::default() }).expect("a ring");
        let r = ring.clone();
        ring.block_on(async move {
            let memory = Reserve::new(&r, 4096).expect("memory");
            for bytes_max in [BLOCK, 2 * BLOCK, 1 << 10] {
                let blocks = Blocks { memory: &memory, block: BLOCK, bytes_max };
                for (from, to) in (0..LEN).flat_map(|from| (from + 1..=LEN).map(move |to| (from, to))) {
                    let range = ByteRange::at_saturating(from, to - from);
                    let outer = range.align_outward(BLOCK).split_at(LEN).0;
                    let before: Vec<u8> = (0..LEN as u8).collect();
                    let disk = RefCell::new(before.clone());
                    let gets = RefCell::new(Vec::new());
                    let get = async |at: u64, mut buf: Buf| {
                        assert!(at.is_multiple_of(BLOCK) && buf.len() as u64 <= bytes_max);
                        gets.borrow_mut().push(at);
                        buf.copy_from(0, &disk.borrow()[at as usize..at as usize + buf.len()]);
                        (buf, Ok::<(), Errno>(()))
                    };
                    let put = async |at: u64, buf: SharedBuf| {
                        let end = at + buf.len() as u64;
                        assert!(at.is_multiple_of(BLOCK) && (end.is_multiple_of(BLOCK) || end == LEN));
                        buf.copy_to(0, &mut disk.borrow_mut()[at as usize..end as usize]);
                        Ok::<(), Errno>(())
                    };
                    let mut ours = r.alloc(range.len() as usize).await;
                    ours.as_mut_slice().fill(0xee);
                    let ours = ours.freeze();
                    let done = blocks.rewrite(outer, range, Source::Buf(&ours), &get, &put).await;
                    assert_eq!(done, Ok(()));
                    let mut wanted = before;
                    wanted[from as usize..to as usize].fill(0xee);
                    assert_eq!(*disk.borrow(), wanted);
                    let foreign: Vec<u64> = (outer.start()..outer.end())
                        .step_by(BLOCK as usize)
                        .filter(|at| *at < from || (*at + BLOCK).min(LEN) > to)
                        .collect();
                    assert_eq!(*gets.borrow(), foreign, "{range:?}");

                    let (buf, result) =
                        blocks.read(outer, range, r.alloc(range.len() as usize).await, &get).await;
                    assert_eq!(result, Ok(()));
                    assert!(buf.as_slice().iter().all(|byte| *byte == 0xee));
                    assert_eq!(blocks.rewrite(outer, range, Source::Zeroes, &get, &put).await, Ok(()));
                    wanted[from as usize..to as usize].fill(0);
                    assert_eq!(*disk.borrow(), wanted);
                }
            }
        });
    }
}
