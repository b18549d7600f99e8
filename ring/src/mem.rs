//! Buffers: who may touch memory, and when.
//!
//! * [`Buf`] is exclusive: its holder may read and write the bytes. It can be split into disjoint
//!   parts, and it is what a read operation takes, because the kernel then writes to it.
//! * [`SharedBuf`] is what a [`Buf`] becomes when it is frozen: many may hold it, all only read. It is
//!   what a write operation takes, so one buffer can go to two places at once.
//! * [`Region`] is memory of an embedder (guest RAM) that others may change at any time. It is never
//!   seen as a slice; bytes go in and out by copying, or directly by the kernel.
//!
//! # Memory contract
//!
//! An operation holds its buffer, and the buffer holds its block or region by reference count, until
//! the terminal completion. There is no borrowed memory across the boundary to the kernel, and no
//! `Box` or `Vec` whose exclusive access the kernel could violate: this is raw mapped memory.

#![allow(unsafe_code)]

use std::cell::Cell;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::rc::Rc;

use crate::arena::Segment;
use crate::errno::Errno;
use crate::op::Pieces;

/// What an operation tells the backend of its memory. It can only be made from a buffer that the
/// operation holds.
#[derive(Clone, Copy, Debug)]
pub struct Mem {
    pub(crate) ptr: NonNull<u8>,
    pub(crate) len: u32,
    pub(crate) fixed: Option<u16>,
}

impl Mem {
    /// Bytes.
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// No bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where it lies, for whoever carries the operation out; valid until the operation's completion.
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr.as_ptr()
    }

    /// Copies `bytes` into the memory, as the kernel would (simulator only). Excess bytes are ignored.
    pub(crate) fn fill_from(&self, at: usize, bytes: &[u8]) {
        let Some(room) = self.len().checked_sub(at) else { return };
        let n = bytes.len().min(room);
        // SAFETY: `ptr..ptr + len` is memory that the operation's slot holds exclusively until its
        // completion (a read takes a `Buf` or region memory); `at + n <= len`.
        unsafe { std::ptr::copy(bytes.as_ptr(), self.ptr.as_ptr().add(at), n) }
    }

    /// Copies the memory out, as the kernel would (simulator only). `out` bounds the length.
    pub(crate) fn copy_to(&self, at: usize, out: &mut [u8]) {
        let Some(room) = self.len().checked_sub(at) else { return };
        let n = out.len().min(room);
        // SAFETY: as for `fill_from`; nobody writes to memory that a write operation reads, except
        // for a region, whose bytes may be anything.
        unsafe { std::ptr::copy(self.ptr.as_ptr().add(at), out.as_mut_ptr(), n) }
    }

    /// The part from `at` on.
    pub(crate) fn tail(&self, at: usize) -> Mem {
        let at = at.min(self.len());
        // SAFETY: `at <= len`, so the pointer stays within the memory or one past its end.
        let ptr = unsafe { self.ptr.add(at) };
        Mem { ptr, len: self.len - at as u32, fixed: self.fixed }
    }
}

impl Pieces {
    /// The pieces, in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Mem> + use<> {
        let Pieces { ptr, len } = *self;
        // SAFETY: `Pieces` is made from the vector in an operation's slot and handed to the backend
        // with the operation; the slot neither changes nor frees the vector before the completion.
        (0..len as usize).map(move |i| unsafe { *ptr.add(i) })
    }
}

/// What keeps the memory of a buffer.
enum Hold {
    Block { segment: Rc<Segment>, page: u32 },
    Region(Rc<RegionInner>),
}

impl Clone for Hold {
    fn clone(&self) -> Hold {
        match self {
            Hold::Block { segment, page } => {
                segment.retain(*page);
                Hold::Block { segment: segment.clone(), page: *page }
            }
            Hold::Region(region) => Hold::Region(region.clone()),
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Hold::Block { segment, page } = self {
            segment.release(*page);
        }
    }
}

impl Hold {
    fn is_same(&self, other: &Hold) -> bool {
        match (self, other) {
            (Hold::Block { segment: a, page: p }, Hold::Block { segment: b, page: q }) => {
                Rc::ptr_eq(a, b) && p == q
            }
            (Hold::Region(a), Hold::Region(b)) => Rc::ptr_eq(a, b),
            _ => false,
        }
    }

    fn fixed(&self) -> Option<u16> {
        match self {
            Hold::Block { segment, .. } => segment.fixed.get(),
            Hold::Region(region) => region.fixed.get(),
        }
    }
}

/// Exclusive memory for I/O.
pub struct Buf {
    ptr: NonNull<u8>,
    len: u32,
    hold: Hold,
}

impl std::fmt::Debug for Buf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Buf").field("len", &self.len).finish_non_exhaustive()
    }
}

impl Buf {
    pub(crate) fn from_block(segment: Rc<Segment>, page: u32, len: usize) -> Buf {
        // SAFETY: the block of `page` lies within the segment's mapping.
        let ptr = unsafe { segment.base().add(page as usize * crate::arena::BLOCK_MIN) };
        Buf { ptr, len: len as u32, hold: Hold::Block { segment, page } }
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// No bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Memory of an embedder, which others may change: no slices of it.
    pub fn is_region(&self) -> bool {
        matches!(self.hold, Hold::Region(_))
    }

    /// True when operations on it use registered memory.
    pub fn is_fixed(&self) -> bool {
        self.hold.fixed().is_some()
    }

    /// True when the address is a multiple of `align` (a power of two), as O_DIRECT asks for.
    pub fn is_aligned(&self, align: usize) -> bool {
        self.ptr.as_ptr().addr() & (align - 1) == 0
    }

    /// The bytes.
    ///
    /// # Panics
    /// On memory of a [`Region`] (see [`Buf::is_region`]): there is no moment at which it holds still.
    pub fn as_slice(&self) -> &[u8] {
        assert!(!self.is_region(), "a region is never seen as a slice; copy it");
        // SAFETY: the memory is initialised (mapped zeroed), lives as long as `hold`, and this
        // handle is the only one to these bytes: `Buf` is not `Clone`, its parts are disjoint, and
        // an operation that lets the kernel write takes the `Buf` itself.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len()) }
    }

    /// The bytes, to be changed.
    ///
    /// # Panics
    /// As for [`Buf::as_slice`].
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        assert!(!self.is_region(), "a region is never seen as a slice; copy it");
        // SAFETY: as for `as_slice`, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len()) }
    }

    /// Copies `bytes` to offset `at`; works for regions too. Excess bytes are ignored.
    pub fn copy_from(&mut self, at: usize, bytes: &[u8]) {
        self.mem().fill_from(at, bytes);
    }

    /// Makes all bytes zero; works for regions too.
    pub fn fill_zero(&mut self) {
        self.fill_zero_from(0);
    }

    /// Makes the bytes from offset `at` on zero; works for regions too.
    pub fn fill_zero_from(&mut self, at: usize) {
        static ZEROES: [u8; 4096] = [0; 4096];
        for at in (at..self.len()).step_by(ZEROES.len()) {
            self.copy_from(at, &ZEROES[..ZEROES.len().min(self.len() - at)]);
        }
    }

    /// Copies bytes from offset `at` out; works for regions too.
    pub fn copy_to(&self, at: usize, out: &mut [u8]) {
        self.mem().copy_to(at, out);
    }

    /// Two disjoint parts: `..at` and `at..`. `at` beyond the end counts as the end.
    pub fn split_at(mut self, at: usize) -> (Buf, Buf) {
        let at = at.min(self.len());
        // SAFETY: `at <= len`.
        let ptr = unsafe { self.ptr.add(at) };
        let right = Buf { ptr, len: self.len - at as u32, hold: self.hold.clone() };
        self.len = at as u32;
        (self, right)
    }

    /// Makes one buffer of two neighbours again: what [`Buf::split_at`] gave, in its order. Anything
    /// else comes back unchanged.
    pub fn unsplit(self, right: Buf) -> Result<Buf, (Buf, Buf)> {
        let end = self.ptr.as_ptr().addr() + self.len();
        match self.len.checked_add(right.len) {
            Some(len) if self.hold.is_same(&right.hold) && end == right.ptr.as_ptr().addr() => {
                // Both hold the same memory and lie side by side in it, so their union is as exclusive
                // and as long-lived as they are.
                Ok(Buf { ptr: self.ptr, len, hold: self.hold })
            }
            _ => Err((self, right)),
        }
    }

    /// Shortens it. A length beyond the present one changes nothing.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len as u32);
    }

    /// Gives up the right to change it.
    pub fn freeze(self) -> SharedBuf {
        SharedBuf { ptr: self.ptr, len: self.len, hold: self.hold }
    }

    pub(crate) fn mem(&self) -> Mem {
        Mem { ptr: self.ptr, len: self.len, fixed: self.hold.fixed() }
    }
}

/// Memory for I/O that all its holders only read.
#[derive(Clone)]
pub struct SharedBuf {
    ptr: NonNull<u8>,
    len: u32,
    hold: Hold,
}

impl std::fmt::Debug for SharedBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SharedBuf").field("len", &self.len).finish_non_exhaustive()
    }
}

impl SharedBuf {
    /// Bytes.
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// No bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Memory of an embedder, which others may change: no slices of it.
    pub fn is_region(&self) -> bool {
        matches!(self.hold, Hold::Region(_))
    }

    /// True when operations on it use registered memory.
    pub fn is_fixed(&self) -> bool {
        self.hold.fixed().is_some()
    }

    /// True when the address is a multiple of `align` (a power of two), as O_DIRECT asks for.
    pub fn is_aligned(&self, align: usize) -> bool {
        self.ptr.as_ptr().addr() & (align - 1) == 0
    }

    /// The bytes.
    ///
    /// # Panics
    /// On memory of a [`Region`].
    pub fn as_slice(&self) -> &[u8] {
        assert!(!self.is_region(), "a region is never seen as a slice; copy it");
        // SAFETY: the memory is initialised and lives as long as `hold`; a frozen buffer is never
        // written again before all its holders are gone (`try_thaw` asks for the only one).
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len()) }
    }

    /// Copies bytes from offset `at` out; works for regions too.
    pub fn copy_to(&self, at: usize, out: &mut [u8]) {
        self.mem().copy_to(at, out);
    }

    /// The part `at..at + len`, cut to what there is.
    pub fn slice(&self, at: usize, len: usize) -> SharedBuf {
        let at = at.min(self.len());
        // SAFETY: `at <= len`.
        let ptr = unsafe { self.ptr.add(at) };
        SharedBuf { ptr, len: len.min(self.len() - at) as u32, hold: self.hold.clone() }
    }

    /// The exclusive buffer back, if this is the last holder of the whole block.
    pub fn try_thaw(self) -> Result<Buf, SharedBuf> {
        let alone = match &self.hold {
            Hold::Block { segment, page } => segment.references(*page) == 1,
            Hold::Region(_) => true,
        };
        if alone { Ok(Buf { ptr: self.ptr, len: self.len, hold: self.hold }) } else { Err(self) }
    }

    pub(crate) fn mem(&self) -> Mem {
        Mem { ptr: self.ptr, len: self.len, fixed: self.hold.fixed() }
    }
}

/// Memory that belongs to an embedder: a shared mapping of guest RAM, or plain memory of its own.
///
/// Register it with [`crate::Ring::register_region`] so that operations on it need no page lookups.
#[derive(Clone)]
pub struct Region(Rc<RegionInner>);

struct RegionInner {
    base: NonNull<u8>,
    bytes: usize,
    fixed: Cell<Option<u16>>,
    /// Mapped here, so unmapped here; otherwise the keepalive owns it.
    mapped: bool,
    _keepalive: Option<Box<dyn std::any::Any>>,
}

impl std::fmt::Debug for Region {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Region").field("bytes", &self.0.bytes).finish_non_exhaustive()
    }
}

impl Region {
    /// Maps `bytes` of `fd` (a memfd that holds guest RAM) from `offset` on, shared.
    pub fn map(fd: impl AsFd, offset: u64, bytes: usize) -> Result<Region, Errno> {
        use std::os::fd::AsRawFd;
        let offset = i64::try_from(offset).map_err(|_| Errno::EINVAL)?;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory that exists.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_fd().as_raw_fd(),
                offset,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(Errno::from_io(&std::io::Error::last_os_error()));
        }
        let base = NonNull::new(base.cast::<u8>()).ok_or(Errno::ENOMEM)?;
        Ok(Region(Rc::new(RegionInner {
            base,
            bytes,
            fixed: Cell::new(None),
            mapped: true,
            _keepalive: None,
        })))
    }

    /// Takes memory that an embedder has mapped already.
    ///
    /// # Safety
    /// `base..base + bytes` must stay mapped, readable and writable for as long as `keepalive` lives,
    /// and no Rust reference to it may exist while operations on it are in flight.
    pub unsafe fn from_raw(base: NonNull<u8>, bytes: usize, keepalive: Box<dyn std::any::Any>) -> Region {
        Region(Rc::new(RegionInner {
            base,
            bytes,
            fixed: Cell::new(None),
            mapped: false,
            _keepalive: Some(keepalive),
        }))
    }

    /// Bytes.
    pub fn bytes(&self) -> usize {
        self.0.bytes
    }

    /// The part `at..at + len` as a buffer for an operation; `None` when it is not inside. Several
    /// buffers may cover the same bytes: order between their operations is the embedder's business,
    /// as it is on any disk controller.
    pub fn buf(&self, at: usize, len: usize) -> Option<Buf> {
        let end = at.checked_add(len)?;
        if end > self.0.bytes || len == 0 || u32::try_from(len).is_err() {
            return None;
        }
        // SAFETY: `at <= bytes`.
        let ptr = unsafe { self.0.base.add(at) };
        Some(Buf { ptr, len: len as u32, hold: Hold::Region(self.0.clone()) })
    }

    /// Copies `bytes` to offset `at`; what does not fit is ignored.
    pub fn write(&self, at: usize, bytes: &[u8]) {
        if let Some(mut buf) = self.buf(at, bytes.len()) {
            buf.copy_from(0, bytes);
        }
    }

    /// Copies bytes from offset `at` out.
    pub fn read(&self, at: usize, out: &mut [u8]) {
        if let Some(buf) = self.buf(at, out.len()) {
            buf.copy_to(0, out);
        }
    }

    pub(crate) fn parts(&self) -> (NonNull<u8>, usize) {
        (self.0.base, self.0.bytes)
    }

    pub(crate) fn set_fixed(&self, index: Option<u16>) {
        self.0.fixed.set(index);
    }
}

impl Drop for RegionInner {
    fn drop(&mut self) {
        if self.mapped {
            // SAFETY: the mapping was made by `Region::map`; buffers and operations hold this inner
            // value by reference count, so nobody uses it any more.
            unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes) };
        }
    }
}
