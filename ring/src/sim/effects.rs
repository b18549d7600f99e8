//! What operations do to disks when they take effect.
//!
//! Refusals are the kernel's: direct transfers that are not aligned, allocation forms that a file does
//! not know, ends of devices. Reads and writes come short at the end of a file, when space runs out,
//! and when a fault says so.

use std::ops::Range;
use std::rc::Rc;

use super::disk::{Change, tear};
use super::flight::Flight;
use super::fs::{DiscardModel, Inode};
use super::inner::Inner;
use super::trace::{Entry, Hash};
use crate::errno::Errno;
use crate::mem::Mem;
use crate::op::{Fallocate, Op, Pieces};

/// A discard beyond this does not fill the range with other bytes; that would cost more than it shows.
const SCRAMBLE_BYTES_MAX: u64 = 1 << 20;

impl Inner {
    /// The result, as the kernel gives it.
    pub(super) fn disk_effect(&mut self, flight: &mut Flight, number: u64) -> i32 {
        let Some(op) = flight.op() else { return 0 };
        let mut content = 0;
        let result = match op {
            Op::Read { offset, mem, .. } => self.read(flight, number, offset, mem, &mut content),
            Op::ReadPieces { offset, pieces, .. } => {
                self.read_pieces(flight, number, offset, pieces, &mut content)
            }
            Op::Write { offset, mem, .. } => self.write(flight, number, offset, mem, &mut content),
            Op::Sync { data_only, .. } => self.sync(flight, number, data_only),
            Op::Fallocate { mode, offset, len, .. } => self.fallocate(flight, number, mode, offset, len),
            Op::Discard { offset, len, .. } => self.discard(flight, number, offset, len),
            Op::Accept { .. }
            | Op::Connect { .. }
            | Op::Recv { .. }
            | Op::RecvAll { .. }
            | Op::Send { .. }
            | Op::SendPieces { .. } => Err(Errno(libc::ENOTSOCK)),
        };
        let result = match result {
            Ok(moved) => i32::try_from(moved).unwrap_or(i32::MAX),
            Err(errno) => -errno.0,
        };
        let (offset, len) = range_of(&op);
        self.note(Entry {
            what: effect_name(&op),
            file: u64::from(flight.file),
            offset,
            len,
            result: result.into(),
            content,
        });
        result
    }

    fn inode(&mut self, number: u64) -> Result<&mut Inode, Errno> {
        self.fs.inodes.get_mut(&number).ok_or(Errno::EBADF)
    }

    /// Registered memory must be what the ring says it is.
    pub(super) fn check_memory(&self, port: u32, mem: Mem) -> Result<(), Errno> {
        let Some(index) = mem.fixed else { return Ok(()) };
        let registered = self.ports.get(&port).and_then(|p| p.memory.get(index as usize).copied().flatten());
        let start = mem.ptr.as_ptr().addr();
        match registered {
            Some((base, bytes)) if base <= start && start + mem.len() <= base + bytes => Ok(()),
            _ => Err(Errno::EFAULT),
        }
    }

    fn check_aligned(&mut self, flight: &Flight, number: u64, offset: u64, mem: Mem) -> Result<(), Errno> {
        let model = &self.inode(number)?.model;
        let (mem_align, offset_align) = (model.mem_align as usize, u64::from(model.offset_align));
        let aligned = mem.ptr.as_ptr().addr().is_multiple_of(mem_align)
            && offset.is_multiple_of(offset_align)
            && (mem.len() as u64).is_multiple_of(offset_align);
        if flight.direct && !aligned {
            self.faults.counts.misaligned += 1;
            return Err(Errno::EINVAL);
        }
        Ok(())
    }

    /// What is left of a transfer of `n` bytes if a fault makes it short.
    fn shorten(&mut self, flight: &Flight, number: u64, n: u64) -> Result<u64, Errno> {
        let align = u64::from(self.inode(number)?.model.offset_align);
        let grain = if flight.direct { align.max(512) } else { 512 };
        if !flight.verdict.short || n <= grain {
            return Ok(n);
        }
        self.faults.counts.shorts += 1;
        Ok(self.rand.range(1..(n - 1) / grain + 1) * grain)
    }

    fn read(
        &mut self,
        flight: &Flight,
        number: u64,
        offset: u64,
        mem: Mem,
        content: &mut u64,
    ) -> Result<u64, Errno> {
        self.check_memory(flight.port, mem)?;
        if let Some(errno) = flight.verdict.error {
            if self.rand.chance(32_768) {
                // What a failed read leaves in memory is nobody's data.
                mem.fill_from(0, &vec![0xEE; mem.len()]);
            }
            return Err(errno);
        }
        let len = self.inode(number)?.disk.len();
        if offset >= len {
            return Ok(0);
        }
        self.check_aligned(flight, number, offset, mem)?;
        let n = self.shorten(flight, number, (len - offset).min(mem.len() as u64))?;
        let mut bytes = vec![0; n as usize];
        self.inode(number)?.disk.live().read(offset, &mut bytes);
        mem.fill_from(0, &bytes);
        *content = Hash::of(&bytes);
        Ok(n)
    }

    /// One piece after the other, up to the first that comes short.
    fn read_pieces(
        &mut self,
        flight: &Flight,
        number: u64,
        offset: u64,
        pieces: Pieces,
        content: &mut u64,
    ) -> Result<u64, Errno> {
        let mut done = 0;
        for mem in pieces.iter() {
            // The kernel knows this memory by its address only.
            let mem = Mem { fixed: None, ..mem };
            match self.read(flight, number, offset + done, mem, content) {
                Ok(n) => {
                    done += n;
                    if n < mem.len() as u64 {
                        break;
                    }
                }
                Err(errno) if done == 0 => return Err(errno),
                Err(_) => break,
            }
        }
        Ok(done)
    }

    fn write(
        &mut self,
        flight: &mut Flight,
        number: u64,
        offset: u64,
        mem: Mem,
        content: &mut u64,
    ) -> Result<u64, Errno> {
        if !flight.write {
            return Err(Errno::EBADF);
        }
        self.check_memory(flight.port, mem)?;
        self.check_aligned(flight, number, offset, mem)?;
        let inode = self.inode(number)?;
        let mut n = mem.len() as u64;
        if inode.is_block() {
            n = n.min(inode.disk.len().saturating_sub(offset));
        } else {
            let free = inode.pages_free();
            n = inode.disk.live().room(offset..offset + n, free);
        }
        if n == 0 && !mem.is_empty() {
            self.faults.counts.no_space += 1;
            return Err(Errno::ENOSPC);
        }
        let n = self.shorten(flight, number, n)?;
        let mut data = vec![0; n as usize];
        mem.copy_to(0, &mut data);
        *content = Hash::of(&data);
        let data: Rc<[u8]> = data.into();
        let whole = offset..offset + n;
        let ranges = match flight.verdict.error {
            None => vec![whole],
            // A failed write may have arrived, not at all, in part, or whole.
            Some(_) => match self.rand.below(3) {
                0 => Vec::new(),
                1 => vec![whole],
                _ => {
                    let sector_bytes = u64::from(self.inode(number)?.model.sector_bytes);
                    tear(&[whole], sector_bytes, &mut self.rand)
                }
            },
        };
        for range in ranges {
            let part = (range.start - offset) as usize..(range.end - offset) as usize;
            let change = Change::Write { offset: range.start, data: data[part].into() };
            self.change(flight, number, change, range)?;
        }
        flight.verdict.error.map_or(Ok(n), Err)
    }

    fn change(
        &mut self,
        flight: &mut Flight,
        number: u64,
        change: Change,
        range: Range<u64>,
    ) -> Result<(), Errno> {
        let id = self.next();
        self.inode(number)?.disk.change(id, change, range);
        flight.changes.push(id);
        Ok(())
    }

    fn sync(&mut self, flight: &Flight, number: u64, data_only: bool) -> Result<u64, Errno> {
        let inode = self.fs.inodes.get_mut(&number).ok_or(Errno::EBADF)?;
        if let Some(errno) = flight.verdict.error {
            // A direct write with FUA does not go through the page cache.
            let apart = self
                .flights
                .values()
                .filter(|f| f.direct && matches!(f.op(), Some(Op::Write { fua: true, .. })));
            let apart: Vec<u64> = apart.flat_map(|f| f.changes.iter().copied()).collect();
            self.faults.counts.lost += inode.disk.sync_failed(&apart, &mut self.rand);
            return Err(errno);
        }
        inode.disk.sync(flight.id, &mut self.rand);
        if !data_only {
            inode.attributes.settle(|now, _| now < flight.id || self.rand.chance(32_768));
        }
        self.fs.settle_creation(number, flight.id);
        Ok(0)
    }

    fn fallocate(
        &mut self,
        flight: &mut Flight,
        number: u64,
        mode: Fallocate,
        offset: u64,
        len: u64,
    ) -> Result<u64, Errno> {
        if !flight.write {
            return Err(Errno::EBADF);
        }
        let inode = self.inode(number)?;
        let end = offset.checked_add(len).filter(|_| len > 0).ok_or(Errno::EINVAL)?;
        let model = &inode.model;
        let known = match mode {
            Fallocate::PunchHole => {
                model.punch_hole && !(model.zero_range_ends_punch_hole && inode.zero_range_seen)
            }
            Fallocate::ZeroRange => model.zero_range,
            Fallocate::Allocate => model.allocate && !inode.is_block(),
        };
        if !known {
            self.faults.counts.unsupported += 1;
            return Err(Errno::EOPNOTSUPP);
        }
        let end = if inode.is_block() { device_range(inode, offset, end)? } else { end };
        let keeps = mode != Fallocate::PunchHole && !inode.is_block();
        inode.zero_range_seen |= mode == Fallocate::ZeroRange;
        if keeps && inode.disk.live().room(offset..end, inode.pages_free()) < end - offset {
            self.faults.counts.no_space += 1;
            return Err(Errno::ENOSPC);
        }
        if flight.verdict.error.is_none() || self.rand.chance(32_768) {
            let change = match mode {
                Fallocate::Allocate => Change::Allocate,
                _ => Change::Zero { keep: keeps },
            };
            self.change(flight, number, change, offset..end)?;
        }
        flight.verdict.error.map_or(Ok(0), Err)
    }

    fn discard(&mut self, flight: &mut Flight, number: u64, offset: u64, len: u64) -> Result<u64, Errno> {
        if !flight.write {
            return Err(Errno::EBADF);
        }
        let inode = self.inode(number)?;
        let model = inode.model.discard;
        if !inode.is_block() || model == DiscardModel::Refused {
            self.faults.counts.unsupported += 1;
            return Err(Errno::EOPNOTSUPP);
        }
        let end = offset.checked_add(len).filter(|end| *end <= inode.disk.len()).ok_or(Errno::EINVAL)?;
        let end = device_range(inode, offset, end)?;
        let outcome = if model == DiscardModel::Zeroes { 0 } else { self.rand.below(3) };
        let happens = flight.verdict.error.is_none() || self.rand.chance(32_768);
        let change = match outcome {
            0 => Some(Change::Zero { keep: false }),
            1 if end - offset <= SCRAMBLE_BYTES_MAX => Some(Change::Scramble { seed: self.rand.next_u64() }),
            _ => None,
        };
        if let Some(change) = change.filter(|_| happens) {
            self.change(flight, number, change, offset..end)?;
        }
        flight.verdict.error.map_or(Ok(0), Err)
    }
}

/// Ranges that a block device zeroes or discards are whole sectors, and begin on the device.
fn device_range(inode: &Inode, offset: u64, end: u64) -> Result<u64, Errno> {
    let align = u64::from(inode.model.offset_align);
    let end = end.min(inode.disk.len());
    let good = offset < end && offset.is_multiple_of(align) && end.is_multiple_of(align);
    if good { Ok(end) } else { Err(Errno::EINVAL) }
}

fn range_of(op: &Op) -> (u64, u64) {
    match *op {
        Op::Read { offset, mem, .. } | Op::Write { offset, mem, .. } => (offset, mem.len() as u64),
        Op::ReadPieces { offset, pieces, .. } => (offset, pieces.bytes()),
        Op::Fallocate { offset, len, .. } | Op::Discard { offset, len, .. } => (offset, len),
        _ => (0, 0),
    }
}

fn effect_name(op: &Op) -> &'static str {
    match op {
        Op::Read { .. } | Op::ReadPieces { .. } => "read takes effect",
        Op::Write { .. } => "write takes effect",
        Op::Sync { .. } => "sync takes effect",
        Op::Fallocate { mode: Fallocate::PunchHole, .. } => "punch takes effect",
        Op::Fallocate { mode: Fallocate::ZeroRange, .. } => "zero takes effect",
        Op::Fallocate { mode: Fallocate::Allocate, .. } => "alloc takes effect",
        Op::Discard { .. } => "discard takes effect",
        _ => "nothing to do",
    }
}
