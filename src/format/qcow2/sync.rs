//! Writing tables back, in the order that a power cut cannot hurt.
//!
//! 1. Refcounts are written. If a refcount block is new: a barrier, then the refcount table.
//! 2. A barrier: guest data, new tables and refcounts are durable.
//! 3. L2 entries and L1 entries are written, as they were when all this began.
//! 4. A barrier: what was freed before all this is not referred to by anything durable any more.
//! 5. What nobody looks at any more of that is given back.
//!
//! So a pointer is durable only after what it points to and after its refcount, and a cluster is used again
//! only after the last pointer to it is gone for good. A cut at any moment leaves leaks at worst. Those who
//! ask while one of these is under way share the next.

use super::cache::Page;
use super::image::{Fault, Qcow2};
use crate::base::planted::{Bug, is_planted};

/// So many freed runs wait at most before they are worth a write-back.
const FREED_MAX: usize = 1024;

/// After so many changes, or looks at entries of tables, others have their turn.
const CHANGES_A_TURN: u64 = 256;

/// Pages of mappings, as they were at one instant.
struct Mappings {
    l2: Vec<Page>,
    l1: Vec<Page>,
}

impl Qcow2 {
    /// Makes everything that was acknowledged durable.
    pub(super) async fn flush_all(&self) -> Result<(), Fault> {
        if self.read_only.get() || self.for_check {
            return Ok(());
        }
        self.write_back().await
    }

    /// Writes tables back when there is so much to write that it must not become more. Called after every
    /// change, it also lets others have their turn now and then: a change of a terabyte may need no I/O.
    pub(super) async fn write_back_if_crowded(&self) -> Result<(), Fault> {
        self.let_others(1).await;
        let crowded = {
            let meta = self.meta.borrow();
            meta.l2.is_crowded() || meta.refs.is_crowded() || meta.freed.len() > FREED_MAX
        };
        if crowded { self.write_back().await } else { Ok(()) }
    }

    /// So many entries of tables have been changed or looked at, and none of that needed the disk: now and then others
    /// have their turn. Nothing may be borrowed, and what was read before may have changed.
    pub(super) async fn let_others(&self, steps: u64) {
        let before = self.changes.get();
        let now = before.wrapping_add(steps);
        self.changes.set(now);
        if now / CHANGES_A_TURN != before / CHANGES_A_TURN {
            self.ring.yield_now().await;
        }
    }

    /// The steps above, for all who ask meanwhile.
    pub(super) async fn write_back(&self) -> Result<(), Fault> {
        let number = self.sync.asked.get() + 1;
        self.sync.asked.set(number);
        let _turn = self.syncing.take().await;
        if self.sync.done.get() >= number {
            return Ok(());
        }
        let covered = self.sync.asked.get();
        self.write_back_now().await?;
        self.sync.done.set(covered);
        Ok(())
    }

    async fn write_back_now(&self) -> Result<(), Fault> {
        self.counters.syncs.set(self.counters.syncs.get() + 1);
        let (mappings, freed) = {
            let mut meta = self.meta.borrow_mut();
            let mappings = Mappings { l2: meta.l2.take_dirty(), l1: meta.l1.take_dirty() };
            (mappings, std::mem::take(&mut meta.freed))
        };
        let result = self.write_in_order(&mappings).await;
        let waiting = {
            let mut meta = self.meta.borrow_mut();
            if let Err(fault) = result {
                meta.l2.failed(&mappings.l2);
                meta.l1.failed(&mappings.l1);
                meta.freed.splice(0..0, freed);
                return Err(fault);
            }
            meta.l2.written();
            if !freed.is_empty() {
                let epoch = self.epochs.close();
                meta.releasing.push_back((epoch, freed));
            }
            !meta.releasing.is_empty()
        };
        if waiting {
            self.release().await?;
            // Not for safety: an image that is closed now has no leaks.
            self.write_refcounts().await?;
        }
        Ok(())
    }

    async fn write_in_order(&self, mappings: &Mappings) -> Result<(), Fault> {
        let none = mappings.l2.is_empty() && mappings.l1.is_empty();
        if is_planted(Bug::Qcow2RefcountAfterPointer) {
            self.flush_files().await?;
            self.write_mappings(mappings).await?;
            self.flush_files().await?;
            self.write_refcounts().await?;
            return Ok(());
        }
        self.write_refcounts().await?;
        if !none {
            if !is_planted(Bug::Qcow2MappingBeforeData) {
                self.flush_files().await?;
            }
            self.write_mappings(mappings).await?;
        }
        self.flush_files().await
    }

    async fn write_mappings(&self, mappings: &Mappings) -> Result<(), Fault> {
        self.write_pages(&mappings.l2).await?;
        self.write_pages(&mappings.l1).await
    }

    /// Step 1. A block is durable before the refcount table names it.
    pub(super) async fn write_refcounts(&self) -> Result<(), Fault> {
        let (pages, table) = {
            let mut meta = self.meta.borrow_mut();
            (meta.refs.take_dirty(), meta.reftable.take_dirty())
        };
        let write = async {
            self.write_pages(&pages).await?;
            if !table.is_empty() {
                self.flush_files().await?;
                self.write_pages(&table).await?;
            }
            Ok(())
        };
        let result = write.await;
        let mut meta = self.meta.borrow_mut();
        match result {
            Ok(()) => meta.refs.written(),
            Err(_) => {
                meta.refs.failed(&pages);
                meta.reftable.failed(&table);
            }
        }
        result
    }

    /// The length of the file that holds the image, as it is now.
    pub(super) fn file_len(&self) -> u64 {
        self.file().len()
    }
}
