//! Who may touch which clusters of the disk now.
//!
//! Writes to clusters that have their place share them; whoever changes where a cluster is (allocating,
//! zeroing, discarding) has it alone. A claim waits only for older ones that it cannot share with, so no
//! circle of waiting can form. Reads claim nothing: what they look at stays readable until they end,
//! because freed clusters are not used again before that ([`crate::block::pin`]).
//!
//! Each claim that waits knows how many it waits for, and is woken by the end of the last of them: thousands may wait
//! for one cluster, and each of them comes and goes once a cluster.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use blockferry_ring::Ring;
use blockferry_ring::sync::Notify;

use crate::base::range::ByteRange;

/// The claims on one image.
#[derive(Debug)]
pub(super) struct Claims {
    ring: Ring,
    /// The oldest first.
    entries: RefCell<Vec<Entry>>,
    id_next: Cell<u64>,
}

#[derive(Debug)]
struct Entry {
    id: u64,
    range: ByteRange,
    alone: bool,
    /// `None`: it was granted at once.
    wait: Option<Rc<Wait>>,
}

/// How many older claims one waits for.
#[derive(Debug)]
struct Wait {
    older: Cell<usize>,
    over: Notify,
}

impl Entry {
    /// Whether the younger of the two waits for the older one.
    fn excludes(&self, range: ByteRange, alone: bool) -> bool {
        (alone || self.alone) && self.range.overlaps(range)
    }

    /// It waits for one claim less.
    fn wait_less(&self) {
        let Some(wait) = &self.wait else { return };
        wait.older.set(wait.older.get() - 1);
        if wait.older.get() == 0 {
            wait.over.notify();
        }
    }
}

/// A claim that was granted; it ends when this is dropped.
#[derive(Debug)]
pub(super) struct Claim<'a> {
    claims: &'a Claims,
    id: u64,
}

impl Claims {
    pub(super) fn new(ring: &Ring) -> Claims {
        Claims { ring: ring.clone(), entries: RefCell::default(), id_next: Cell::new(0) }
    }

    /// Claims `range` (of whole clusters) and waits for older claims.
    pub(super) async fn enter(&self, range: ByteRange, alone: bool) -> Claim<'_> {
        let id = self.id_next.get();
        self.id_next.set(id + 1);
        let older = self.entries.borrow().iter().filter(|e| e.excludes(range, alone)).count();
        let wait = (older > 0).then(|| Rc::new(Wait { older: Cell::new(older), over: self.ring.notify() }));
        self.entries.borrow_mut().push(Entry { id, range, alone, wait: wait.clone() });
        let claim = Claim { claims: self, id };
        if let Some(wait) = wait {
            wait.over.until(|| (wait.older.get() == 0).then_some(())).await;
        }
        claim
    }
}

impl Claim<'_> {
    /// Lets those in who share.
    pub(super) fn share(&self) {
        let mut entries = self.claims.entries.borrow_mut();
        let Some(at) = entries.iter().position(|e| e.id == self.id) else { return };
        if !std::mem::replace(&mut entries[at].alone, false) {
            return;
        }
        let range = entries[at].range;
        let sharing = entries[at + 1..].iter().filter(|e| !e.alone && e.range.overlaps(range));
        sharing.for_each(Entry::wait_less);
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut entries = self.claims.entries.borrow_mut();
        let Some(at) = entries.iter().position(|e| e.id == self.id) else { return };
        let gone = entries.remove(at);
        let younger = entries[at..].iter().filter(|e| e.excludes(gone.range, gone.alone));
        younger.for_each(Entry::wait_less);
    }
}
