//! Memory of a connection, kept for the one that comes after it.
//!
//! Requests that wait for a lost connection hold memory, maybe all there is. Were the new connection to wait for some of
//! it, neither would ever come. So what one connection needs is taken when the disk is opened, used by the connections
//! that come and go, and given back at their ends. Connections beside the first take theirs from the arena.

use std::cell::RefCell;
use std::rc::Rc;

use blockferry_ring::arena::BLOCK_MIN;
use blockferry_ring::{Buf, Errno, Ring};

/// Bytes received at once during the handshake.
pub(super) const HANDSHAKE_BYTES: usize = 16 << 10;
/// Bytes sent at once during the handshake.
pub(super) const SPEECH_BYTES: usize = BLOCK_MIN;
/// Bytes received at once.
pub(super) const RECEIVE_BYTES: usize = 128 << 10;
/// Bytes of headers and short payloads that are gathered to be sent at once.
pub(super) const GATHER_BYTES: usize = 128 << 10;

/// What is kept, by length: one of each, two where two lengths are the same.
const WHOLE: [usize; 4] = [HANDSHAKE_BYTES, SPEECH_BYTES, RECEIVE_BYTES, GATHER_BYTES];

/// See the module's head. Clones are the same memory; the default keeps nothing.
#[derive(Clone, Debug, Default)]
pub(super) struct Kept(Option<Rc<RefCell<Vec<Buf>>>>);

impl Kept {
    /// Sets memory for one connection aside; `ENOMEM` when there is none.
    pub(super) fn new(ring: &Ring) -> Result<Kept, Errno> {
        let bufs: Option<Vec<Buf>> = WHOLE.iter().map(|bytes| ring.arena().try_alloc(*bytes)).collect();
        Ok(Kept(Some(Rc::new(RefCell::new(bufs.ok_or(Errno::ENOMEM)?)))))
    }

    /// Memory of one of the lengths above: from what is kept, else from the arena, whichever has some first. The
    /// connection before may be about to give back what is kept.
    pub(super) async fn take(&self, ring: &Ring, bytes: usize) -> Buf {
        let arena = ring.arena();
        arena.freed().until(|| self.try_take(bytes).or_else(|| arena.try_alloc(bytes))).await
    }

    fn try_take(&self, bytes: usize) -> Option<Buf> {
        let mut bufs = self.0.as_ref()?.borrow_mut();
        let at = bufs.iter().position(|buf| buf.len() == bytes)?;
        Some(bufs.swap_remove(at))
    }

    /// Gives memory back, whole.
    pub(super) fn give(&self, ring: &Ring, buf: Buf) {
        let Some(bufs) = &self.0 else { return };
        let count = |lens: &mut dyn Iterator<Item = usize>| lens.filter(|len| *len == buf.len()).count();
        let there = count(&mut bufs.borrow().iter().map(Buf::len));
        if there < count(&mut WHOLE.iter().copied()) {
            bufs.borrow_mut().push(buf);
            ring.arena().freed().notify();
        }
    }
}
