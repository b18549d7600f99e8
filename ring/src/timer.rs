//! Deadlines: a heap in user space, whose first entry bounds the wait of an enter.
//!
//! A timer that is no longer wanted stays until it is due and then wakes a task that looks and goes
//! on waiting. That costs less than finding and removing it.

use std::cell::{Cell, RefCell};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::Nanos;
use crate::exec::{Exec, TaskId};

#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Key(Nanos, u64);

pub(crate) struct Timers {
    heap: RefCell<BinaryHeap<Reverse<(Key, Entry)>>>,
    sequence: Cell<u64>,
}

struct Entry(TaskId);

// The key alone orders entries; its sequence number makes it unique.
impl PartialEq for Entry {
    fn eq(&self, _: &Entry) -> bool {
        true
    }
}
impl Eq for Entry {}
impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Entry) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Entry {
    fn cmp(&self, _: &Entry) -> std::cmp::Ordering {
        std::cmp::Ordering::Equal
    }
}

impl Timers {
    pub(crate) fn new() -> Timers {
        Timers { heap: RefCell::new(BinaryHeap::new()), sequence: Cell::new(0) }
    }

    pub(crate) fn add(&self, deadline: Nanos, task: TaskId) {
        let sequence = self.sequence.get();
        self.sequence.set(sequence + 1);
        self.heap.borrow_mut().push(Reverse((Key(deadline, sequence), Entry(task))));
    }

    pub(crate) fn next(&self) -> Option<Nanos> {
        self.heap.borrow().peek().map(|Reverse((key, _))| key.0)
    }

    /// Wakes the tasks whose time has come.
    pub(crate) fn fire(&self, now: Nanos, exec: &Exec) -> bool {
        let mut heap = self.heap.borrow_mut();
        let mut fired = false;
        while let Some(Reverse((key, _))) = heap.peek() {
            if key.0 > now {
                break;
            }
            if let Some(Reverse((_, entry))) = heap.pop() {
                exec.wake(entry.0);
                fired = true;
            }
        }
        fired
    }

    pub(crate) fn clear(&self) {
        self.heap.borrow_mut().clear();
    }
}
