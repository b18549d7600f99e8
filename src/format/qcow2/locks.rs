//! Who may touch which clusters of the disk now.
//!
//! Writes to clusters that have their place share them; whoever changes where a cluster is (allocating,
//! zeroing, discarding) has it alone. A claim waits only for older ones that it cannot share with, so no
//! circle of waiting can form. Reads claim nothing: what they look at stays readable until they end,
//! because freed clusters are not used again before that ([`crate::block::pin`]).

use std::cell::{Cell, RefCell};

use blockferry_ring::Ring;
use blockferry_ring::sync::Notify;

use crate::base::range::ByteRange;

/// The claims on one image.
#[derive(Debug)]
pub(super) struct Claims {
    entries: RefCell<Vec<Entry>>,
    id_next: Cell<u64>,
    changed: Notify,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    id: u64,
    range: ByteRange,
    alone: bool,
}

/// A claim that was granted; it ends when this is dropped.
#[derive(Debug)]
pub(super) struct Claim<'a> {
    claims: &'a Claims,
    id: u64,
}

impl Claims {
    pub(super) fn new(ring: &Ring) -> Claims {
        Claims { entries: RefCell::default(), id_next: Cell::new(0), changed: ring.notify() }
    }

    /// Claims `range` (of whole clusters) and waits for older claims.
    pub(super) async fn enter(&self, range: ByteRange, alone: bool) -> Claim<'_> {
        let id = self.id_next.get();
        self.id_next.set(id + 1);
        self.entries.borrow_mut().push(Entry { id, range, alone });
        let claim = Claim { claims: self, id };
        self.changed.until(|| (!self.must_wait(id, range, alone)).then_some(())).await;
        claim
    }

    fn must_wait(&self, id: u64, range: ByteRange, alone: bool) -> bool {
        let entries = self.entries.borrow();
        entries.iter().any(|e| e.id < id && (alone || e.alone) && e.range.overlaps(range))
    }
}

impl Claim<'_> {
    /// Lets those in who share.
    pub(super) fn share(&self) {
        for entry in self.claims.entries.borrow_mut().iter_mut().filter(|e| e.id == self.id) {
            entry.alone = false;
        }
        self.claims.changed.notify();
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        // Ages are in the ids: the order of the entries means nothing.
        let mut entries = self.claims.entries.borrow_mut();
        if let Some(at) = entries.iter().position(|e| e.id == self.id) {
            entries.swap_remove(at);
        }
        drop(entries);
        self.claims.changed.notify();
    }
}
