//! Counters: what a run was really made of.

use std::cell::Cell;

/// The counters of one ring.
#[derive(Debug, Default)]
pub struct Stats {
    /// Turns.
    pub turns: Cell<u64>,
    /// Calls into the backend that submit or wait.
    pub enters: Cell<u64>,
    /// Operations submitted.
    pub operations: Cell<u64>,
    /// Reads and writes on registered memory and registered files.
    pub transfers_fixed: Cell<u64>,
    /// Reads and writes on other memory or files.
    pub transfers_plain: Cell<u64>,
    /// Bytes read from files.
    pub bytes_read: Cell<u64>,
    /// Bytes written to files.
    pub bytes_written: Cell<u64>,
    /// Completions.
    pub completions: Cell<u64>,
    /// The largest number of completions that one turn delivered.
    pub completions_a_turn_max: Cell<u64>,
    /// The largest number of operations that one enter submitted.
    pub batch_max: Cell<u64>,
    /// Transfers that ended short and were continued.
    pub short_transfers: Cell<u64>,
    /// Operations tried again after EINTR or EAGAIN.
    pub retries: Cell<u64>,
    /// Completions that matched no operation: always 0 unless the ring has a bug.
    pub stale_completions: Cell<u64>,
    /// Calls given to the offload pool.
    pub offloaded: Cell<u64>,
    /// Operations that others carried out.
    pub external: Cell<u64>,
    /// Tasks started.
    pub tasks: Cell<u64>,
    /// Waits that the safety backstop ended while operations were in flight.
    pub backstops: Cell<u64>,
    /// Heap allocations of the process when the ring was made.
    pub(crate) allocations_at_start: Cell<u64>,
}

/// A copy of the counters with what follows from them.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// Turns.
    pub turns: u64,
    /// Calls into the backend.
    pub enters: u64,
    /// Operations submitted.
    pub operations: u64,
    /// Reads and writes on registered memory and files.
    pub transfers_fixed: u64,
    /// Other reads and writes.
    pub transfers_plain: u64,
    /// Bytes read from files.
    pub bytes_read: u64,
    /// Bytes written to files.
    pub bytes_written: u64,
    /// Completions.
    pub completions: u64,
    /// Largest number of completions in one turn.
    pub completions_a_turn_max: u64,
    /// Largest number of operations in one enter.
    pub batch_max: u64,
    /// Transfers that ended short and were continued.
    pub short_transfers: u64,
    /// Operations tried again.
    pub retries: u64,
    /// Completions that matched no operation.
    pub stale_completions: u64,
    /// Calls given to the offload pool.
    pub offloaded: u64,
    /// Operations that others carried out.
    pub external: u64,
    /// Tasks started.
    pub tasks: u64,
    /// Waits ended by the safety backstop.
    pub backstops: u64,
    /// Heap allocations of the process since the ring was made (0 without the counting allocator).
    pub heap_allocations: u64,
}

pub(crate) fn add(cell: &Cell<u64>, n: u64) {
    cell.set(cell.get().wrapping_add(n));
}

pub(crate) fn max(cell: &Cell<u64>, n: u64) {
    cell.set(cell.get().max(n));
}

impl Stats {
    /// The counters now.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            turns: self.turns.get(),
            enters: self.enters.get(),
            operations: self.operations.get(),
            transfers_fixed: self.transfers_fixed.get(),
            transfers_plain: self.transfers_plain.get(),
            bytes_read: self.bytes_read.get(),
            bytes_written: self.bytes_written.get(),
            completions: self.completions.get(),
            completions_a_turn_max: self.completions_a_turn_max.get(),
            batch_max: self.batch_max.get(),
            short_transfers: self.short_transfers.get(),
            retries: self.retries.get(),
            stale_completions: self.stale_completions.get(),
            offloaded: self.offloaded.get(),
            external: self.external.get(),
            tasks: self.tasks.get(),
            backstops: self.backstops.get(),
            heap_allocations: crate::alloc::allocations().saturating_sub(self.allocations_at_start.get()),
        }
    }
}

impl Snapshot {
    /// Share of fixed operations among reads and writes, 0 to 1 (1 when there were none).
    pub fn fixed_share(&self) -> f64 {
        let all = self.transfers_fixed + self.transfers_plain;
        if all == 0 { 1.0 } else { self.transfers_fixed as f64 / all as f64 }
    }

    /// Enters per 1,000 operations.
    pub fn enters_per_1000(&self) -> f64 {
        self.enters as f64 * 1000.0 / self.operations.max(1) as f64
    }

    /// Operations an enter, on average.
    pub fn batch_mean(&self) -> f64 {
        self.operations as f64 / self.enters.max(1) as f64
    }

    /// Heap allocations an operation.
    pub fn allocations_an_operation(&self) -> f64 {
        self.heap_allocations as f64 / self.operations.max(1) as f64
    }
}
