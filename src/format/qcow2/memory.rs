//! Memory in between: for tables on their way to and from the file, and for clusters that are copied.
//!
//! Whoever asks here may hold the memory of a guest's request already. Were all of it held by requests that
//! wait here, none could end. So each image keeps a small buffer in reserve for tables, and one for copies
//! if it can be written. Who has the reserve for copies may need the one for tables, never the reverse.

use std::cell::RefCell;

use blockferry_ring::arena::BLOCK_MAX;
use blockferry_ring::{Buf, Errno, Ring, SharedBuf};

/// Where such memory comes from.
#[derive(Debug)]
pub(super) struct Memory {
    ring: Ring,
    reserve: RefCell<Option<Buf>>,
}

impl Memory {
    /// With `bytes` in reserve. `ENOMEM` when the arena has nothing left.
    pub(super) fn new(ring: &Ring, bytes: usize) -> Result<Memory, Errno> {
        let reserve = ring.arena().try_alloc(bytes).ok_or(Errno::ENOMEM)?;
        Ok(Memory { ring: ring.clone(), reserve: RefCell::new(Some(reserve)) })
    }

    /// Memory of `wanted` bytes, or the reserve (which may be less).
    pub(super) async fn take(&self, wanted: usize) -> Lease<'_> {
        let wanted = wanted.clamp(1, BLOCK_MAX);
        let take = || {
            if let Some(buf) = self.ring.arena().try_alloc(wanted) {
                return Some((buf, false));
            }
            self.reserve.borrow_mut().take().map(|buf| (buf, true))
        };
        let (buf, of_reserve) = self.ring.arena().freed().until(take).await;
        let len = buf.len().min(wanted);
        Lease { memory: self, buf: Some(buf), len, of_reserve }
    }
}

/// Memory on loan.
#[derive(Debug)]
pub(super) struct Lease<'a> {
    memory: &'a Memory,
    /// Not there only while an operation has it. May be longer than what was asked for.
    buf: Option<Buf>,
    len: usize,
    of_reserve: bool,
}

impl Lease<'_> {
    /// Bytes.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The bytes.
    pub(super) fn bytes(&mut self) -> &mut [u8] {
        match &mut self.buf {
            Some(buf) => &mut buf.as_mut_slice()[..self.len],
            None => &mut [],
        }
    }

    /// Hands bytes `from..to` to `fill`, which gives the memory back.
    pub(super) async fn fill<T>(
        &mut self,
        from: usize,
        to: usize,
        fill: impl AsyncFnOnce(Buf) -> (Buf, T),
    ) -> Option<T> {
        let (left, rest) = self.buf.take()?.split_at(from);
        let (middle, right) = rest.split_at(to - from);
        let (middle, value) = fill(middle).await;
        match left.unsplit(middle).and_then(|left| left.unsplit(right)) {
            Ok(whole) => self.buf = Some(whole),
            Err(_) => unreachable!("the parts of one buffer join again"),
        }
        Some(value)
    }

    /// Hands bytes `from..to` to `write`, to be written.
    pub(super) async fn write<T>(
        &mut self,
        from: usize,
        to: usize,
        write: impl AsyncFnOnce(SharedBuf) -> T,
    ) -> Option<T> {
        let shared = self.buf.take()?.freeze();
        let value = write(shared.slice(from, to - from)).await;
        match shared.try_thaw() {
            Ok(buf) => self.buf = Some(buf),
            Err(_) => unreachable!("a write that has ended holds its memory no longer"),
        }
        Some(value)
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        if self.of_reserve {
            *self.memory.reserve.borrow_mut() = self.buf.take();
            self.memory.ring.arena().freed().notify();
        }
    }
}
