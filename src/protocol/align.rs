//! Who waits for whom when a write is smaller than the leaf's block.
//!
//! A leaf that takes only whole blocks (O_DIRECT) serves a smaller write by reading the block, changing
//! part of it and writing it back: a *rewrite*. In between nobody else may change that block, or the
//! rewrite puts old bytes back. So every change of the leaf (write, zeroes, discard) is registered here
//! by the blocks that it touches, and conflicts are settled by one rule: **wait only for older ones**.
//!
//! * A rewrite waits for every older change that overlaps it.
//! * A whole-block change waits for older rewrites that overlap it, and for nothing else: what two
//!   overlapping plain writes leave behind is their owner's business, as on any disk.
//!
//! Age is the order of registration, so a cycle of waits cannot form. Reads are not registered: a rewrite
//! puts the bytes that it does not own back as they were.
//!
//! Leaves whose block is one byte never rewrite and do not use this.

use std::cell::{Cell, RefCell};

use blockferry_ring::Ring;
use blockferry_ring::sync::Notify;

use crate::base::range::ByteRange;

/// The changes in flight on one leaf.
#[derive(Debug)]
pub(super) struct Changes {
    entries: RefCell<Vec<Entry>>,
    /// How many of the entries are rewrites: with none, a plain change has nobody to wait for.
    rewrites: Cell<usize>,
    id_next: Cell<u64>,
    ended: Notify,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    id: u64,
    /// Whole blocks.
    range: ByteRange,
    rewrite: bool,
}

/// A change that may go on; it ends when this is dropped.
#[derive(Debug)]
pub(super) struct Change<'a> {
    table: &'a Changes,
    id: u64,
}

impl Changes {
    pub(super) fn new(ring: &Ring) -> Changes {
        Changes {
            entries: RefCell::default(),
            rewrites: Cell::new(0),
            id_next: Cell::new(0),
            ended: ring.notify(),
        }
    }

    /// Registers a change of `range` (whole blocks) and waits for those older ones that it must not mix with.
    pub(super) async fn enter(&self, range: ByteRange, rewrite: bool) -> Change<'_> {
        let id = self.id_next.get();
        self.id_next.set(id + 1);
        self.entries.borrow_mut().push(Entry { id, range, rewrite });
        self.rewrites.set(self.rewrites.get() + usize::from(rewrite));
        // From here on the guard takes the entry out, whatever becomes of this future.
        let change = Change { table: self, id };
        if rewrite || self.rewrites.get() > 0 {
            self.ended.until(|| (!self.must_wait(id, range, rewrite)).then_some(())).await;
        }
        change
    }

    fn must_wait(&self, id: u64, range: ByteRange, rewrite: bool) -> bool {
        let entries = self.entries.borrow();
        entries.iter().any(|e| e.id < id && (rewrite || e.rewrite) && e.range.overlaps(range))
    }

    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.entries.borrow().len()
    }
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        let mut entries = self.table.entries.borrow_mut();
        if let Some(at) = entries.iter().position(|e| e.id == self.id) {
            // Ages are in the ids: the order of the entries means nothing.
            let entry = entries.swap_remove(at);
            self.table.rewrites.set(self.table.rewrites.get() - usize::from(entry.rewrite));
        }
        drop(entries);
        self.table.ended.notify();
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;
    use blockferry_ring::Config;

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange::at_saturating(start, end - start)
    }

    /// Starts changes in order, and says which of them may run; then ends some, and says so again.
    #[test]
    fn only_older_conflicts_are_waited_for() {
        let ring = Ring::new(&Config { arena_bytes: 1 << 20, ..Config::default() }).expect("a ring");
        let r = ring.clone();
        ring.block_on(async move {
            let table = Rc::new(Changes::new(&r));
            let running = Rc::new(RefCell::new(Vec::<usize>::new()));
            let asked = [
                (range(0, 4096), false),    // 0: plain
                (range(0, 4096), false),    // 1: plain over plain: runs
                (range(0, 512), true),      // 2: waits for 0 and 1
                (range(512, 1024), false),  // 3: beside 2: runs
                (range(0, 1024), false),    // 4: waits for 2 alone
                (range(8192, 8704), true),  // 5: alone: runs
                (range(8192, 8704), true),  // 6: waits for 5
                (range(0, 1 << 20), false), // 7: waits for 2, 5, 6
            ];
            let gates: Vec<_> = asked.iter().map(|_| r.one_shot::<()>()).collect();
            for (i, (range, rewrite)) in asked.into_iter().enumerate() {
                let (table, running, gate) = (table.clone(), running.clone(), gates[i].clone());
                r.spawn(async move {
                    let _change = table.enter(range, rewrite).await;
                    running.borrow_mut().push(i);
                    gate.take().await;
                    running.borrow_mut().retain(|&j| j != i);
                });
            }
            let settle = async |end: Option<usize>| {
                if let Some(i) = end {
                    gates[i].give(());
                }
                for _ in 0..8 {
                    r.yield_now().await;
                }
                let mut now = running.borrow().clone();
                now.sort();
                now
            };
            assert_eq!(settle(None).await, [0, 1, 3, 5]);
            assert_eq!(settle(Some(0)).await, [1, 3, 5]);
            assert_eq!(settle(Some(1)).await, [2, 3, 5]);
            assert_eq!(settle(Some(5)).await, [2, 3, 6]);
            assert_eq!(settle(Some(2)).await, [3, 4, 6]);
            assert_eq!(settle(Some(6)).await, [3, 4, 7]);
            for i in [3, 4, 7] {
                settle(Some(i)).await;
            }
            assert_eq!((table.count(), table.rewrites.get()), (0, 0));
        });
    }
}
