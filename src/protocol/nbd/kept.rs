//! Memory of a connection, kept for the one that comes after it.
//!
//! Requests that wait for a lost connection hold memory, maybe all there is. Were the new connection to wait for some of
//! it, neither would ever come. So what one connection needs is taken when the disk is opened, used by the connections
//! that come and go, and given back at their ends. Connections beside the first take theirs from the arena.

use std::rc::Rc;

use blockferry_ring::arena::BLOCK_MIN;
use blockferry_ring::{Buf, Errno, Ring};

use crate::block::Reserve;

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
pub(super) struct Kept(Option<Rc<[Reserve; WHOLE.len()]>>);

impl Kept {
    /// Sets memory for one connection aside; `ENOMEM` when there is none.
    pub(super) fn new(ring: &Ring) -> Result<Kept, Errno> {
        let whole = WHOLE.map(|bytes| Reserve::empty(ring, bytes));
        if whole.iter().all(Reserve::try_fill) { Ok(Kept(Some(Rc::new(whole)))) } else { Err(Errno::ENOMEM) }
    }

    /// Memory of one of the lengths above: from what is kept, else from the arena, whichever has some first. The
    /// connection before may be about to give back what is kept.
    pub(super) async fn take(&self, ring: &Ring, bytes: usize) -> Buf {
        let arena = ring.arena();
        arena.freed().until(|| self.try_take(bytes).or_else(|| arena.try_alloc(bytes))).await
    }

    fn try_take(&self, bytes: usize) -> Option<Buf> {
        self.0
            .iter()
            .flat_map(|whole| whole.iter())
            .filter(|part| part.bytes() == bytes)
            .find_map(Reserve::try_take)
    }

    /// Gives memory back, whole.
    pub(super) fn give(&self, buf: Buf) {
        // What nobody has to keep goes back to the arena.
        let _ = self.0.iter().flat_map(|whole| whole.iter()).try_fold(buf, |buf, part| part.give(buf));
    }
}
