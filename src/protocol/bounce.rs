//! Memory in between: for requests whose own memory does not fit the leaf.
//!
//! Everybody who asks for bounce memory already holds the memory of a request. Were all of the arena
//! held by requests that wait for bounce memory, none could end. So each leaf keeps one small buffer in
//! reserve: when the arena is empty, requests go through it one at a time, in small pieces, and since
//! its holder waits for nothing but its own I/O, it always comes back.

use std::cell::RefCell;

use blockferry_ring::arena::BLOCK_MAX;
use blockferry_ring::{Buf, Errno, File, Ring, SharedBuf};

/// Bytes of the reserve of one leaf, whose blocks are no larger than this unless it says so.
pub(super) const RESERVE_BYTES: usize = 64 << 10;

static ZEROES: [u8; 4096] = [0; 4096];

/// Fills `buf` from offset `at` on with zeroes; works for regions too.
pub(super) fn zero_from(buf: &mut Buf, at: usize) {
    let mut at = at;
    while at < buf.len() {
        let n = ZEROES.len().min(buf.len() - at);
        buf.copy_from(at, &ZEROES[..n]);
        at += n;
    }
}

/// Where bounce memory comes from.
#[derive(Debug)]
pub(super) struct Bounce {
    ring: Ring,
    reserve: RefCell<Option<Buf>>,
}

impl Bounce {
    /// `ENOMEM` when the arena has nothing left for a reserve.
    pub(super) fn new(ring: &Ring) -> Result<Bounce, Errno> {
        Bounce::for_blocks(ring, RESERVE_BYTES)
    }

    /// The same for a leaf whose blocks have `block` bytes, at most [`BLOCK_MAX`].
    pub(super) fn for_blocks(ring: &Ring, block: usize) -> Result<Bounce, Errno> {
        let reserve = ring.arena().try_alloc(block.max(RESERVE_BYTES)).ok_or(Errno::ENOMEM)?;
        Ok(Bounce { ring: ring.clone(), reserve: RefCell::new(Some(reserve)) })
    }

    /// Memory of at most `wanted` bytes (a multiple of the leaf's block): all of them, or the reserve.
    pub(super) async fn take(&self, wanted: usize) -> Lease<'_> {
        let wanted = wanted.clamp(1, BLOCK_MAX);
        let take = || {
            if let Some(buf) = self.ring.arena().try_alloc(wanted) {
                return Some((buf, false));
            }
            self.reserve.borrow_mut().take().map(|buf| (buf, true))
        };
        let (buf, reserve) = self.ring.arena().freed().until(take).await;
        Lease { bounce: self, buf: Some(buf), reserve }
    }
}

/// Bounce memory in use.
#[derive(Debug)]
pub(super) struct Lease<'a> {
    bounce: &'a Bounce,
    /// Always there between calls.
    buf: Option<Buf>,
    reserve: bool,
}

impl Lease<'_> {
    /// Bytes.
    pub(super) fn len(&self) -> usize {
        self.buf.as_ref().map_or(0, Buf::len)
    }

    /// The bytes.
    pub(super) fn bytes(&mut self) -> &mut [u8] {
        match &mut self.buf {
            Some(buf) => buf.as_mut_slice(),
            None => &mut [],
        }
    }

    /// Reads `len` bytes at `offset` of the file to `at` of the memory. Gives what came; the rest is zeroes.
    pub(super) async fn read(
        &mut self,
        file: &File,
        offset: u64,
        at: usize,
        len: usize,
    ) -> Result<usize, Errno> {
        let Some(whole) = self.buf.take() else { return Err(Errno::EIO) };
        let (left, rest) = whole.split_at(at);
        let (middle, right) = rest.split_at(len);
        let (mut middle, result) = self.bounce.ring.read(file, offset, middle).await;
        let n = result.unwrap_or(0) as usize;
        zero_from(&mut middle, n);
        let whole = left.unsplit(middle).and_then(|left| left.unsplit(right));
        match whole {
            Ok(whole) => self.buf = Some(whole),
            Err(_) => unreachable!("the parts of one buffer join again"),
        }
        result.map(|_| n)
    }

    /// Hands the part `at..at + len` to `read`, to be filled.
    pub(super) async fn fill<E>(
        &mut self,
        at: usize,
        len: usize,
        read: impl AsyncFnOnce(Buf) -> (Buf, Result<(), E>),
    ) -> Result<(), E> {
        let Some(whole) = self.buf.take() else { unreachable!("the memory is there between calls") };
        let (left, rest) = whole.split_at(at);
        let (middle, right) = rest.split_at(len);
        let (middle, result) = read(middle).await;
        match left.unsplit(middle).and_then(|left| left.unsplit(right)) {
            Ok(whole) => self.buf = Some(whole),
            Err(_) => unreachable!("the parts of one buffer join again"),
        }
        result
    }

    /// Hands the first `len` bytes to `write` as a buffer to be written.
    pub(super) async fn write<T>(
        &mut self,
        len: usize,
        write: impl AsyncFnOnce(SharedBuf) -> T,
    ) -> Option<T> {
        let shared = self.buf.take()?.freeze();
        let result = write(shared.slice(0, len)).await;
        match shared.try_thaw() {
            Ok(buf) => self.buf = Some(buf),
            Err(_) => unreachable!("a write that has ended holds its memory no longer"),
        }
        Some(result)
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        if self.reserve {
            *self.bounce.reserve.borrow_mut() = self.buf.take();
            self.bounce.ring.arena().freed().notify();
        }
    }
}
