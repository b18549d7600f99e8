//! A disk of memory that knows its holes, remembers what was asked of it, and fails on demand.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use blockferry::block::{
    BlockError, Capabilities, Driver, Extent, IoFuture, IoResult, Limits, Operation, Permissions, WriteFlags,
    ZeroFlags,
};
use blockferry_ring::{Buf, Errno, Ring, SharedBuf};

const BLOCK: usize = 4096;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Block {
    Hole,
    Zero,
    Data,
}

#[derive(Clone, Debug, Default)]
pub struct Seen {
    pub reads: u64,
    pub writes: u64,
    pub writes_fua: u64,
    pub flushes: u64,
    pub discards: u64,
    pub zeroes_unmapping: u64,
    pub zeroes_keeping: u64,
    pub in_flight_max: u64,
}

#[derive(Debug)]
pub struct MemoryDisk {
    ring: Ring,
    bytes: RefCell<Vec<u8>>,
    blocks: RefCell<Vec<Block>>,
    pub seen: RefCell<Seen>,
    in_flight: Cell<u64>,
    /// Requests that touch this byte fail.
    pub bad_byte: Cell<Option<(u64, Errno)>>,
    /// What a read or write takes, in nanoseconds.
    pub delay_ns: Cell<u64>,
}

impl MemoryDisk {
    pub fn new(ring: &Ring, len: u64) -> Rc<MemoryDisk> {
        Rc::new(MemoryDisk {
            ring: ring.clone(),
            bytes: RefCell::new(vec![0; len as usize]),
            blocks: RefCell::new(vec![Block::Hole; len.div_ceil(BLOCK as u64) as usize]),
            seen: RefCell::default(),
            in_flight: Cell::new(0),
            bad_byte: Cell::new(None),
            delay_ns: Cell::new(0),
        })
    }

    fn check(&self, operation: Operation, offset: u64, len: u64) -> IoResult {
        match self.bad_byte.get() {
            Some((at, errno)) if (offset..offset + len).contains(&at) => {
                Err(BlockError::at(operation, "memory", offset, len, errno))
            }
            _ => Ok(()),
        }
    }

    async fn begin(&self) {
        self.in_flight.set(self.in_flight.get() + 1);
        let most = self.seen.borrow().in_flight_max.max(self.in_flight.get());
        self.seen.borrow_mut().in_flight_max = most;
        match self.delay_ns.get() {
            0 => self.ring.yield_now().await,
            delay => self.ring.sleep(delay).await,
        }
        self.in_flight.set(self.in_flight.get() - 1);
    }

    /// Marks what a range covers: whole blocks as `whole`, others as data.
    fn mark(&self, offset: u64, len: u64, whole: Block) {
        let (start, end) = (offset as usize, (offset + len) as usize);
        let mut blocks = self.blocks.borrow_mut();
        for block in start / BLOCK..end.div_ceil(BLOCK) {
            let is_whole = block * BLOCK >= start && (block + 1) * BLOCK <= end;
            blocks[block] = if is_whole { whole } else { Block::Data };
        }
    }

    fn zero(&self, offset: u64, len: u64) {
        self.bytes.borrow_mut()[offset as usize..(offset + len) as usize].fill(0);
    }
}

impl Driver for MemoryDisk {
    fn kind(&self) -> &'static str {
        "memory"
    }

    fn name(&self) -> &str {
        "memory"
    }

    fn len(&self) -> u64 {
        self.bytes.borrow().len() as u64
    }

    fn is_read_only(&self) -> bool {
        false
    }

    fn limits(&self) -> Limits {
        Limits::default()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { fua: true, discard: true, zero_fast: true, zero_unmap: true, status: true }
    }

    fn read(&self, offset: u64, mut buf: Buf) -> IoFuture<'_, (Buf, IoResult)> {
        self.ring.boxed(async move {
            self.begin().await;
            self.seen.borrow_mut().reads += 1;
            let result = self.check(Operation::Read, offset, buf.len() as u64);
            if result.is_ok() {
                let len = buf.len();
                buf.copy_from(0, &self.bytes.borrow()[offset as usize..offset as usize + len]);
            }
            (buf, result)
        })
    }

    fn write(&self, offset: u64, buf: SharedBuf, flags: WriteFlags) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async move {
            self.begin().await;
            self.seen.borrow_mut().writes += 1;
            self.seen.borrow_mut().writes_fua += u64::from(flags.fua);
            self.check(Operation::Write, offset, buf.len() as u64)?;
            let range = offset as usize..offset as usize + buf.len();
            self.bytes.borrow_mut()[range].copy_from_slice(buf.as_slice());
            self.mark(offset, buf.len() as u64, Block::Data);
            Ok(())
        })
    }

    fn flush(&self) -> IoFuture<'_, IoResult> {
        self.seen.borrow_mut().flushes += 1;
        self.ring.boxed(async { Ok(()) })
    }

    fn discard(&self, offset: u64, len: u64) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async move {
            self.seen.borrow_mut().discards += 1;
            self.check(Operation::Discard, offset, len)?;
            self.zero(offset, len);
            self.mark(offset, len, Block::Hole);
            Ok(())
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async move {
            self.seen.borrow_mut().zeroes_unmapping += u64::from(flags.may_unmap);
            self.seen.borrow_mut().zeroes_keeping += u64::from(!flags.may_unmap);
            self.check(Operation::WriteZeroes, offset, len)?;
            self.zero(offset, len);
            self.mark(offset, len, if flags.may_unmap { Block::Hole } else { Block::Zero });
            Ok(())
        })
    }

    fn block_status(&self, offset: u64, len: u64) -> IoFuture<'_, Result<Extent, BlockError>> {
        self.ring.boxed(async move {
            self.check(Operation::BlockStatus, offset, 1)?;
            let blocks = self.blocks.borrow();
            let first = offset as usize / BLOCK;
            let same = blocks[first..].iter().take_while(|b| **b == blocks[first]).count();
            let len = (((first + same) * BLOCK) as u64 - offset).min(len);
            Ok(match blocks[first] {
                Block::Hole => Extent::hole(len),
                Block::Zero => Extent { allocated: true, ..Extent::hole(len) },
                Block::Data => Extent::data(len),
            })
        })
    }

    fn set_permissions(&self, _: Permissions) -> IoResult {
        Ok(())
    }

    fn set_len(&self, _: u64) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async { Err(BlockError::new(Operation::Resize, "memory", Errno::EOPNOTSUPP)) })
    }
}
