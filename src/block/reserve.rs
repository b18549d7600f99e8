//! Memory set aside, so that whoever others wait for never waits for their memory.
//!
//! Requests hold memory while they wait: for a leaf that has to put blocks together, for a table of an image, for a job
//! behind a shut door, for a connection that is made anew. Were all of the arena held by requests that wait like that,
//! none could end. So whoever they wait for sets a little aside when it begins, and has it when the arena is empty, one
//! operation at a time and in small pieces; since its holder waits for nothing but its own I/O, it always comes back.
//!
//! * A [`Lease`] ([`Reserve::take`]) is memory in between. It lends itself to one operation after the other, and goes back
//!   to where it came from by itself.
//! * A [`Loan`] ([`Reserve::lend`]) is a buffer that goes through many hands and is dropped by the last of them. The
//!   reserve is filled up again after that ([`Reserve::done`]).

use std::cell::RefCell;

use blockferry_ring::arena::BLOCK_MAX;
use blockferry_ring::{Buf, Errno, Ring, SharedBuf};

/// The memory of a lease is away: an operation that had it was dropped before it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the memory for it is not there any more")]
pub struct NoMemory;

impl From<NoMemory> for Errno {
    fn from(_: NoMemory) -> Errno {
        Errno::ENOMEM
    }
}

/// See the module's head.
#[derive(Debug)]
pub struct Reserve {
    ring: Ring,
    bytes: usize,
    /// Away while it is in use.
    held: RefCell<Option<Buf>>,
}

impl Reserve {
    /// Sets `bytes` (at most [`BLOCK_MAX`]) aside. `ENOMEM` when the arena has nothing left.
    pub fn new(ring: &Ring, bytes: usize) -> Result<Reserve, Errno> {
        let reserve = Reserve::empty(ring, bytes);
        if reserve.try_fill() { Ok(reserve) } else { Err(Errno::ENOMEM) }
    }

    /// Nothing is set aside yet; [`Reserve::fill`] does it.
    pub fn empty(ring: &Ring, bytes: usize) -> Reserve {
        Reserve { ring: ring.clone(), bytes, held: RefCell::default() }
    }

    /// Bytes of it.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Sets the memory aside, unless it is. Waits for it: whoever is served gives memory back.
    pub async fn fill(&self) {
        let filled = || self.try_fill().then_some(());
        self.ring.arena().freed().until(filled).await;
    }

    /// The same if there is memory now. False: nothing is set aside.
    pub fn try_fill(&self) -> bool {
        let mut held = self.held.borrow_mut();
        if held.is_none() {
            *held = self.ring.arena().try_alloc(self.bytes);
        }
        held.is_some()
    }

    /// What is set aside, if it is. Whoever has it gives it back ([`Reserve::give`]), or fills the reserve up again.
    pub fn try_take(&self) -> Option<Buf> {
        self.held.borrow_mut().take()
    }

    /// Takes memory of the reserve's length, unless it has some; then it comes back.
    pub fn give(&self, buf: Buf) -> Option<Buf> {
        if buf.len() != self.bytes || self.held.borrow().is_some() {
            return Some(buf);
        }
        self.put_back(Some(buf));
        None
    }

    /// Memory of `wanted` bytes (at most [`BLOCK_MAX`]), or the reserve, which may be less.
    pub async fn take(&self, wanted: usize) -> Lease<'_> {
        let wanted = wanted.clamp(1, BLOCK_MAX);
        let (buf, of_reserve) = self.any(wanted).await;
        let len = buf.len().min(wanted);
        Lease { reserve: self, buf: Some(buf), len, of_reserve }
    }

    /// A buffer of `wanted` bytes, or a shorter one out of the reserve. What it was used for must be followed by
    /// [`Reserve::done`].
    pub async fn lend(&self, wanted: usize) -> Loan {
        let (mut buf, of_reserve) = self.any(wanted).await;
        buf.truncate(wanted);
        Loan { buf, of_reserve }
    }

    /// The buffer of a loan has been dropped. The reserve is filled up again before anybody else gets that memory.
    pub async fn done(&self, of_reserve: bool) {
        if of_reserve {
            self.fill().await;
            self.ring.arena().freed().notify();
        }
    }

    async fn any(&self, wanted: usize) -> (Buf, bool) {
        let arena = self.ring.arena();
        let any = || match arena.try_alloc(wanted) {
            Some(buf) => Some((buf, false)),
            None => self.try_take().map(|buf| (buf, true)),
        };
        arena.freed().until(any).await
    }

    /// Puts back what was taken, and tells those who wait for memory.
    fn put_back(&self, buf: Option<Buf>) {
        *self.held.borrow_mut() = buf;
        // What an operation did not give back is lost; there may be other memory.
        self.try_fill();
        self.ring.arena().freed().notify();
    }
}

/// A buffer, and whether it is the reserve, or of it.
#[derive(Debug)]
pub struct Loan {
    pub buf: Buf,
    pub of_reserve: bool,
}

/// Memory in between.
#[derive(Debug)]
pub struct Lease<'a> {
    reserve: &'a Reserve,
    /// Not there only while an operation has it. May be longer than what was asked for.
    buf: Option<Buf>,
    len: usize,
    of_reserve: bool,
}

impl Lease<'_> {
    /// Bytes.
    #[allow(clippy::len_without_is_empty, reason = "it is never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The bytes.
    pub fn bytes(&mut self) -> Result<&mut [u8], NoMemory> {
        let buf = self.buf.as_mut().ok_or(NoMemory)?;
        Ok(&mut buf.as_mut_slice()[..self.len])
    }

    /// Hands bytes `from..to` to `fill`, which gives the memory back.
    pub async fn fill<T, E: From<NoMemory>>(
        &mut self,
        from: usize,
        to: usize,
        fill: impl AsyncFnOnce(Buf) -> (Buf, Result<T, E>),
    ) -> Result<T, E> {
        let (left, rest) = self.buf.take().ok_or(NoMemory)?.split_at(from);
        let (middle, right) = rest.split_at(to - from);
        let (middle, result) = fill(middle).await;
        self.buf = left.unsplit(middle).and_then(|left| left.unsplit(right)).ok();
        debug_assert!(self.buf.is_some(), "the parts of one buffer join again");
        result
    }

    /// Hands bytes `from..to` to `write`, to be written.
    pub async fn write<T, E: From<NoMemory>>(
        &mut self,
        from: usize,
        to: usize,
        write: impl AsyncFnOnce(SharedBuf) -> Result<T, E>,
    ) -> Result<T, E> {
        let shared = self.buf.take().ok_or(NoMemory)?.freeze();
        let result = write(shared.slice(from, to - from)).await;
        self.buf = shared.try_thaw().ok();
        debug_assert!(self.buf.is_some(), "a write that has ended holds its memory no longer");
        result
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        if self.of_reserve {
            self.reserve.put_back(self.buf.take());
        }
    }
}

#[cfg(test)]
mod tests {
    use blockferry_ring::Config;
    use blockferry_ring::sync::at_once;

    use super::*;

    fn ring() -> Ring {
        Ring::new(&Config { arena_bytes: 1 << 20, ..Config::default() }).expect("a ring")
    }

    fn all_of(ring: &Ring) -> Vec<Buf> {
        std::iter::from_fn(|| ring.arena().try_alloc(4096)).collect()
    }

    #[test]
    fn the_reserve_goes_round_when_there_is_no_other_memory() {
        let ring = ring();
        let r = ring.clone();
        ring.block_on(async move {
            let reserve = Reserve::new(&r, 8192).unwrap();
            assert_eq!(reserve.take(16384).await.len(), 16384);
            let held = all_of(&r);
            assert!(Reserve::new(&r, 4096).is_err_and(|errno| errno == Errno::ENOMEM));
            let mut lease = reserve.take(16384).await;
            assert_eq!(lease.len(), 8192, "what is set aside is less");
            assert!(at_once(reserve.take(512)).is_none(), "it is lent to one at a time");
            let filled = lease.fill(512, 1024, async |mut part| {
                part.as_mut_slice().fill(7);
                (part, Ok::<(), Errno>(()))
            });
            assert_eq!(filled.await, Ok(()));
            assert_eq!(lease.bytes().map(|bytes| (bytes[511], bytes[512], bytes[1024])), Ok((0, 7, 0)));
            let written = lease.write(512, 1024, async |part| Ok::<u8, Errno>(part.as_slice()[0])).await;
            assert_eq!(written, Ok(7));
            drop(lease);
            assert_eq!(reserve.take(512).await.len(), 512, "no more than was asked for");
            drop(held);
        });
    }

    #[test]
    fn memory_that_is_away_is_never_success() {
        let ring = ring();
        let r = ring.clone();
        ring.block_on(async move {
            let reserve = Reserve::new(&r, 4096).unwrap();
            let held = all_of(&r);
            let mut lease = reserve.take(4096).await;
            let endless = lease.write(0, 512, async |_| std::future::pending::<Result<(), Errno>>().await);
            assert!(at_once(endless).is_none(), "dropped before it ended");
            assert_eq!(lease.write(0, 512, async |_| Ok::<(), Errno>(())).await, Err(Errno::ENOMEM));
            assert_eq!(
                lease.fill(0, 512, async |part| (part, Ok::<(), Errno>(()))).await,
                Err(Errno::ENOMEM)
            );
            assert_eq!(lease.bytes().err(), Some(NoMemory));
            drop(lease);
            assert_eq!(reserve.take(4096).await.len(), 4096, "the reserve is not lost with it");
            drop(held);
        });
    }
}
