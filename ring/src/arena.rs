//! The arena: memory for I/O, mapped once, registered with the kernel where it lets us, handed out
//! in size classes.
//!
//! A segment is a mapping of whole MiB. Each MiB is a buddy tree of power-of-two blocks from 4 KiB to
//! 1 MiB; free blocks are kept in one bitmap an order, so taking and giving back cost a few word
//! operations and no heap allocation. Blocks carry a reference count, because one block may be split
//! into disjoint parts or shared for reading ([`crate::mem`]).
//!
//! A segment is unmapped when nobody holds memory of it. Operations in flight hold theirs: what cannot
//! be drained at shutdown is leaked with its segment, never unmapped under the kernel.

#![allow(unsafe_code)]

use std::cell::{Cell, RefCell};
use std::ptr::NonNull;
use std::rc::Rc;

use crate::errno::Errno;
use crate::mem::Buf;
use crate::sync::Notify;

/// The smallest block.
pub const BLOCK_MIN: usize = 4096;
/// The largest block, and so the largest single buffer.
pub const BLOCK_MAX: usize = 1 << 20;
const ORDERS: usize = 9;

/// One mapping.
#[derive(Debug)]
pub(crate) struct Segment {
    base: NonNull<u8>,
    bytes: usize,
    /// Index in the kernel's table of registered buffers.
    pub(crate) fixed: Cell<Option<u16>>,
    /// Per order, one bit a block: free.
    free: RefCell<[Vec<u64>; ORDERS]>,
    /// Per page: references to the block that starts there, and its order.
    references: Vec<Cell<u32>>,
    orders: Vec<Cell<u8>>,
    bytes_used: Cell<usize>,
    /// Told when memory comes back.
    freed: Notify,
}

impl Segment {
    pub(crate) fn map(bytes: usize, freed: Notify) -> Result<Segment, Errno> {
        let bytes = bytes.next_multiple_of(BLOCK_MAX);
        // SAFETY: an anonymous private mapping at an address of the kernel's choice touches no
        // memory that exists.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(Errno::from_io(&std::io::Error::last_os_error()));
        }
        // Advice only: without huge pages everything works the same.
        // SAFETY: the range is the mapping that was just made.
        unsafe { libc::madvise(base, bytes, libc::MADV_HUGEPAGE) };
        let Some(base) = NonNull::new(base.cast::<u8>()) else { return Err(Errno::ENOMEM) };
        let pages = bytes / BLOCK_MIN;
        let mut free: [Vec<u64>; ORDERS] =
            std::array::from_fn(|order| vec![0; (pages >> order).div_ceil(64)]);
        for tree in 0..bytes / BLOCK_MAX {
            free[ORDERS - 1][tree / 64] |= 1 << (tree % 64);
        }
        Ok(Segment {
            base,
            bytes,
            fixed: Cell::new(None),
            free: RefCell::new(free),
            references: vec![Cell::new(0); pages],
            orders: vec![Cell::new(0); pages],
            bytes_used: Cell::new(0),
            freed,
        })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Takes a block of `1 << order` pages; the page at which it starts.
    fn take(&self, order: usize) -> Option<u32> {
        let mut free = self.free.borrow_mut();
        let (mut from, index) = (order..ORDERS).find_map(|o| first_set(&free[o]).map(|i| (o, i)))?;
        clear(&mut free[from], index);
        let mut index = index;
        // Split down to the wanted order: the left half goes on, the right half is free.
        while from > order {
            from -= 1;
            index *= 2;
            set(&mut free[from], index + 1);
        }
        let page = index << order;
        self.orders[page].set(order as u8);
        self.references[page].set(1);
        self.bytes_used.set(self.bytes_used.get() + (BLOCK_MIN << order));
        Some(page as u32)
    }

    pub(crate) fn retain(&self, page: u32) {
        let count = &self.references[page as usize];
        debug_assert!(count.get() > 0, "a block that is not handed out gained a holder");
        count.set(count.get() + 1);
    }

    pub(crate) fn references(&self, page: u32) -> u32 {
        self.references[page as usize].get()
    }

    pub(crate) fn release(&self, page: u32) {
        let page = page as usize;
        let count = self.references[page].get();
        debug_assert!(count > 0, "a block came back twice");
        self.references[page].set(count - 1);
        if count > 1 {
            return;
        }
        let mut order = self.orders[page].get() as usize;
        self.bytes_used.set(self.bytes_used.get() - (BLOCK_MIN << order));
        let mut free = self.free.borrow_mut();
        let mut index = page >> order;
        // Join with the other half as long as that is free too.
        while order < ORDERS - 1 && is_set(&free[order], index ^ 1) {
            clear(&mut free[order], index ^ 1);
            index /= 2;
            order += 1;
        }
        set(&mut free[order], index);
        drop(free);
        self.freed.notify();
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: the mapping is this segment's own. Buffers and operations in flight hold the
        // segment by reference count, so none is left; the backend forgot its registration before
        // (or its ring is closed, and what could not be drained keeps a count that is never given back).
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

fn first_set(bits: &[u64]) -> Option<usize> {
    bits.iter().position(|&w| w != 0).map(|i| i * 64 + bits[i].trailing_zeros() as usize)
}

fn set(bits: &mut [u64], index: usize) {
    bits[index / 64] |= 1 << (index % 64);
}

fn clear(bits: &mut [u64], index: usize) {
    bits[index / 64] &= !(1 << (index % 64));
}

fn is_set(bits: &[u64], index: usize) -> bool {
    bits[index / 64] & (1 << (index % 64)) != 0
}

/// All segments of a ring.
#[derive(Clone, Debug)]
pub struct Arena(Rc<ArenaInner>);

#[derive(Debug)]
struct ArenaInner {
    segments: RefCell<Vec<Rc<Segment>>>,
    freed: Notify,
    bytes_used_max: Cell<usize>,
}

impl Arena {
    pub(crate) fn new(freed: Notify) -> Arena {
        Arena(Rc::new(ArenaInner { segments: RefCell::default(), freed, bytes_used_max: Cell::new(0) }))
    }

    pub(crate) fn add(&self, segment: Rc<Segment>) {
        self.0.segments.borrow_mut().push(segment);
        self.0.freed.notify();
    }

    /// Told when memory comes back: for those who wait for memory or for something else.
    pub fn freed(&self) -> &Notify {
        &self.0.freed
    }

    /// A buffer of `len` bytes (1 to [`BLOCK_MAX`]), aligned to its size class; `None` when the arena
    /// has no such block now, or never for a `len` out of range.
    pub fn try_alloc(&self, len: usize) -> Option<Buf> {
        if len == 0 || len > BLOCK_MAX {
            return None;
        }
        let order = len.next_power_of_two().max(BLOCK_MIN).trailing_zeros() as usize - 12;
        let segments = self.0.segments.borrow();
        let buf = segments.iter().find_map(|segment| {
            let page = segment.take(order)?;
            Some(Buf::from_block(segment.clone(), page, len))
        })?;
        let used: usize = segments.iter().map(|s| s.bytes_used.get()).sum();
        self.0.bytes_used_max.set(self.0.bytes_used_max.get().max(used));
        Some(buf)
    }

    /// Bytes mapped.
    pub fn bytes(&self) -> usize {
        self.0.segments.borrow().iter().map(|s| s.bytes()).sum()
    }

    /// Bytes in blocks that are handed out.
    pub fn bytes_used(&self) -> usize {
        self.0.segments.borrow().iter().map(|s| s.bytes_used.get()).sum()
    }

    /// The most that was handed out at once.
    pub fn bytes_used_max(&self) -> usize {
        self.0.bytes_used_max.get()
    }

    /// Bytes that are registered with the kernel.
    pub fn bytes_fixed(&self) -> usize {
        self.0.segments.borrow().iter().filter(|s| s.fixed.get().is_some()).map(|s| s.bytes()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::RemoteWaker;
    use crate::exec::Exec;
    use crate::pool::Pool;
    use crate::rng::Rng;

    fn arena(bytes: usize) -> Arena {
        let notify = Notify::new(Exec::new(Pool::default(), RemoteWaker::none()));
        let arena = Arena::new(notify.clone());
        arena.add(Rc::new(Segment::map(bytes, notify).unwrap()));
        arena
    }

    #[test]
    fn blocks_never_overlap_and_all_come_back() {
        let arena = arena(4 << 20);
        let mut rand = Rng::new(7);
        let mut held: Vec<(Buf, u8)> = Vec::new();
        for round in 0..20_000u32 {
            if rand.chance(32_768) || held.is_empty() {
                let most = BLOCK_MAX as u64 / (1 + rand.below(256));
                let len = 1 + rand.below(most) as usize;
                if let Some(mut buf) = arena.try_alloc(len) {
                    let tag = round as u8;
                    buf.as_mut_slice().fill(tag);
                    held.push((buf, tag));
                }
            } else {
                let (buf, tag) = held.swap_remove(rand.below(held.len() as u64) as usize);
                assert!(buf.as_slice().iter().all(|&b| b == tag), "somebody else wrote into a held block");
            }
        }
        held.clear();
        assert_eq!(arena.bytes_used(), 0);
        // Everything has been joined again: all the large blocks are there.
        let all: Vec<_> = (0..4).map(|_| arena.try_alloc(BLOCK_MAX)).collect();
        assert!(all.iter().all(Option::is_some) && arena.try_alloc(1).is_none());
    }

    #[test]
    fn neighbours_join_again_and_strangers_do_not() {
        let arena = arena(1 << 20);
        let (left, right) = arena.try_alloc(8192).unwrap().split_at(100);
        let (middle, right) = right.split_at(50);
        let (left, right) = left.unsplit(right).unwrap_err();
        let (middle, left) = middle.unsplit(left).unwrap_err();
        let whole = left.unsplit(middle).unwrap().unsplit(right).unwrap();
        assert_eq!(whole.len(), 8192);
        let (whole, other) = whole.unsplit(arena.try_alloc(8192).unwrap()).unwrap_err();
        // A joined buffer is the only holder of its block again.
        assert!(whole.freeze().try_thaw().is_ok() && other.len() == 8192);
        drop(other);
        assert_eq!(arena.bytes_used(), 0);
    }

    #[test]
    fn sizes_out_of_range_are_refused() {
        let arena = arena(1 << 20);
        assert!(arena.try_alloc(0).is_none() && arena.try_alloc(BLOCK_MAX + 1).is_none());
    }
}
