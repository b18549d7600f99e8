//! The reactor's inside: slots, the queue, and the steps of a turn.
//!
//! A slot owns the memory and the file of its operation from submission to the terminal completion.
//! Short transfers, `EINTR` and `EAGAIN` put it back into the queue; everything else ends it and wakes
//! the task that waits.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Weak;

use slab::Slab;

use crate::Nanos;
use crate::arena::Arena;
use crate::backend::{Backend, Wait};
use crate::config::{Budget, Patience};
use crate::exec::{Exec, TaskId};
use crate::external::Keep;
use crate::limits;
use crate::op::{CloseFile, File, FileId, Held, Op, Pieces};
use crate::pool::Pool;
use crate::stats::{Stats, add, max};
use crate::sync::Notify;
use crate::timer::Timers;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Queued,
    InFlight,
    Done(i32),
}

/// What becomes of an operation after a completion.
enum Onward {
    /// That was its end.
    Ended,
    /// It is queued again for the rest.
    Queued,
    /// There is a rest, and nobody wants it.
    GivenUp,
}

pub(crate) struct Slot {
    pub(crate) sequence: u32,
    /// What was asked for; `op.remainder(done)` is what is in flight.
    pub(crate) op: Option<Op>,
    pub(crate) held: Held,
    /// Keeps the file open; `None` for what others carry out.
    pub(crate) _file: Option<File>,
    /// What those keep alive by it.
    pub(crate) keep: Option<Keep>,
    pub(crate) state: State,
    pub(crate) waiter: Option<TaskId>,
    /// Nobody will ask for the result.
    pub(crate) orphan: bool,
    /// Its owner asked to end it: what is left of it is not submitted any more.
    pub(crate) cancelled: bool,
    pub(crate) done: usize,
    pub(crate) retries: u32,
}

pub(crate) struct Core {
    pub(crate) backend: RefCell<Box<dyn Backend>>,
    pub(crate) slots: RefCell<Slab<Slot>>,
    pub(crate) queue: RefCell<VecDeque<u32>>,
    /// Slots that pause after EAGAIN, with the time at which they are queued again.
    pub(crate) paused: RefCell<Vec<(Nanos, u32, u32)>>,
    pub(crate) in_flight: Cell<usize>,
    pub(crate) sequence: Cell<u32>,
    pub(crate) exec: Exec,
    pub(crate) pool: Pool,
    pub(crate) timers: Timers,
    pub(crate) now: Cell<Nanos>,
    pub(crate) arena: Arena,
    pub(crate) stats: Stats,
    pub(crate) reaped: RefCell<Vec<(u64, i32)>>,
    /// Files whose last holder went away while the backend was busy.
    pub(crate) closing: RefCell<Vec<FileId>>,
    pub(crate) this: Weak<Core>,
    pub(crate) budget: Budget,
    pub(crate) fixed_allowed: Cell<bool>,
    pub(crate) patience: Cell<Option<Patience>>,
    /// How many say that somebody is served.
    pub(crate) serving: Cell<usize>,
    /// Calls handed to the offload pool whose owners still wait; told when one ends.
    pub(crate) offloads: Cell<usize>,
    pub(crate) offload_ended: Notify,
}

impl CloseFile for Core {
    fn close_file(&self, id: FileId) {
        match self.backend.try_borrow_mut() {
            Ok(mut backend) => backend.close(id),
            Err(_) => self.closing.borrow_mut().push(id),
        }
    }
}

/// How long a ring that is dropped without [`Ring::shutdown`] waits for operations in flight.
const DROP_DEADLINE_NANOS: Nanos = 5_000_000_000;

impl Drop for Core {
    fn drop(&mut self) {
        let end = self.backend.borrow().now().saturating_add(DROP_DEADLINE_NANOS);
        self.drain(end);
    }
}

pub(crate) fn user_data(sequence: u32, key: u32) -> u64 {
    u64::from(sequence) << 32 | u64::from(key)
}

impl Core {
    /// Waits for operations in flight; gives the number of those whose memory had to be leaked.
    pub(crate) fn drain(&self, end: Nanos) -> usize {
        while self.in_flight.get() > 0 {
            // The wait is bounded from `now` on: with an old one it would not wait at all.
            let now = self.backend.borrow().now();
            self.now.set(now);
            if now >= end {
                break;
            }
            self.enter(true, Some(end));
            self.reap();
            // What ended short is not continued.
            let queue = std::mem::take(&mut *self.queue.borrow_mut());
            for key in queue {
                let slot = self.slots.borrow_mut().try_remove(key as usize);
                drop(slot);
            }
        }
        self.close_late();
        let leaked = self.in_flight.get();
        if leaked > 0 {
            tracing::error!(leaked, "operations did not end at shutdown; their memory is leaked");
            std::mem::forget(self.slots.take());
            self.in_flight.set(0);
        }
        leaked
    }

    pub(crate) fn reap(&self) -> bool {
        let mut reaped = self.reaped.take();
        self.backend.borrow_mut().reap(self.budget.completions, &mut reaped);
        let n = reaped.len() as u64;
        add(&self.stats.completions, n);
        max(&self.stats.completions_a_turn_max, n);
        for (user_data, result) in reaped.drain(..) {
            self.apply((user_data >> 32) as u32, user_data as u32, result);
        }
        self.reaped.replace(reaped);
        n > 0
    }

    fn apply(&self, sequence: u32, key: u32, result: i32) {
        let mut slots = self.slots.borrow_mut();
        let slot = match slots.get_mut(key as usize) {
            Some(slot) if slot.sequence == sequence && slot.state == State::InFlight => slot,
            _ => {
                add(&self.stats.stale_completions, 1);
                debug_assert!(false, "a completion came for no operation in flight");
                return;
            }
        };
        self.in_flight.set(self.in_flight.get() - 1);
        let mut result = result;
        if let Some(op) = slot.op {
            match self.goes_on(slot, &op, key, result) {
                Onward::Queued => return,
                // Part of a transfer is no result: the owner asked for its end and gets that.
                Onward::GivenUp => result = -libc::ECANCELED,
                Onward::Ended => {}
            }
            match op {
                Op::Read { .. } | Op::ReadPieces { .. } => add(&self.stats.bytes_read, slot.done as u64),
                Op::Write { .. } => add(&self.stats.bytes_written, slot.done as u64),
                _ => {}
            }
        }
        let total = if result < 0 { result } else { i32::try_from(slot.done).unwrap_or(i32::MAX) };
        let total = match slot.op {
            Some(Op::Accept { .. }) | None => result,
            // Nothing went out though something was left: there is no progress to be had.
            Some(Op::Write { .. } | Op::Send { .. } | Op::SendPieces { .. }) if result == 0 => -libc::EIO,
            _ => total,
        };
        slot.state = State::Done(total);
        if slot.orphan {
            let slot = slots.remove(key as usize);
            drop(slots);
            self.drop_unseen(slot);
        } else if let Some(task) = slot.waiter {
            self.exec.wake(task);
        }
    }

    /// Drops a slot whose result nobody will look at.
    pub(crate) fn drop_unseen(&self, slot: Slot) {
        if let (Some(Op::Accept { .. }), State::Done(result)) = (slot.op, slot.state)
            && let Ok(id) = u32::try_from(result)
        {
            // Nobody will use the connection: close it.
            self.close_file(FileId(id));
        }
    }

    /// Finishes short transfers and passing errors inside.
    fn goes_on(&self, slot: &mut Slot, op: &Op, key: u32, result: i32) -> Onward {
        if result == -libc::EINTR || result == -libc::EAGAIN {
            add(&self.stats.retries, 1);
            slot.retries += 1;
            if slot.retries > limits::EAGAIN_RETRIES {
                return Onward::Ended;
            }
            let pauses = slot.retries > limits::EAGAIN_RETRIES_EAGER;
            return self.queue_again(slot, key, pauses);
        }
        if result <= 0 {
            return Onward::Ended;
        }
        slot.done += result as usize;
        // Only refusals in a row count.
        slot.retries = 0;
        if let Held::Pieces { mems, .. } | Held::Bufs { mems, .. } = &mut slot.held {
            let total: usize = mems.iter().map(|m| m.len()).sum();
            // `mems` is cut in place, so it holds what was in flight.
            if (result as usize) >= total {
                return Onward::Ended;
            }
            let mut gone = result as usize;
            mems.retain_mut(|mem| {
                let n = gone.min(mem.len());
                *mem = mem.tail(n);
                gone -= n;
                !mem.is_empty()
            });
            let rest = Pieces::new(mems);
            slot.op = Some(match *op {
                Op::ReadPieces { file, offset, .. } => {
                    Op::ReadPieces { file, offset: offset + result as u64, pieces: rest }
                }
                _ => Op::SendPieces { file: op.file(), pieces: rest },
            });
        } else if op.remainder(slot.done).is_none() {
            return Onward::Ended;
        }
        add(&self.stats.short_transfers, 1);
        self.queue_again(slot, key, false)
    }

    /// The rest of an operation, unless nobody wants it any more.
    fn queue_again(&self, slot: &mut Slot, key: u32, pauses: bool) -> Onward {
        if slot.orphan || slot.cancelled {
            return Onward::GivenUp;
        }
        slot.state = State::Queued;
        if pauses {
            let at = self.now.get() + limits::EAGAIN_PAUSE_NANOS;
            self.paused.borrow_mut().push((at, key, slot.sequence));
        } else {
            self.queue.borrow_mut().push_back(key);
        }
        Onward::Queued
    }

    pub(crate) fn unpause(&self, now: Nanos) -> bool {
        let mut paused = self.paused.borrow_mut();
        if paused.is_empty() {
            return false;
        }
        let before = paused.len();
        let mut queue = self.queue.borrow_mut();
        paused.retain(|&(at, key, _)| {
            if at <= now {
                queue.push_back(key);
            }
            at > now
        });
        paused.len() < before
    }

    pub(crate) fn next_deadline(&self) -> Option<Nanos> {
        let paused = self.paused.borrow().iter().map(|p| p.0).min();
        match (self.timers.next(), paused) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        }
    }

    pub(crate) fn close_late(&self) {
        let closing = std::mem::take(&mut *self.closing.borrow_mut());
        for id in closing {
            self.backend.borrow_mut().close(id);
        }
    }

    /// Hands queued operations to the backend; true when some had to stay.
    pub(crate) fn push_queue(&self) -> bool {
        let mut queue = self.queue.borrow_mut();
        if queue.is_empty() {
            return false;
        }
        let mut slots = self.slots.borrow_mut();
        let mut backend = self.backend.borrow_mut();
        let (mut bytes, mut batch) = (0u64, 0u64);
        // Dropped at the end: closing a file needs the backend.
        let mut unwanted = Vec::new();
        while let Some(&key) = queue.front() {
            if self.in_flight.get() >= limits::IN_FLIGHT_MAX || bytes >= self.budget.bytes {
                break;
            }
            let Some(slot) = slots.get_mut(key as usize) else {
                queue.pop_front();
                continue;
            };
            // A request to cancel reaches only what is in flight; what has not left stays here.
            if slot.orphan {
                queue.pop_front();
                unwanted.push(slots.remove(key as usize));
                continue;
            }
            if slot.cancelled {
                queue.pop_front();
                slot.state = State::Done(-libc::ECANCELED);
                slot.waiter.into_iter().for_each(|task| self.exec.wake(task));
                continue;
            }
            let Some(op) = slot
                .op
                .and_then(|op| if slot.done > 0 { op.remainder(slot.done).or(slot.op) } else { Some(op) })
            else {
                queue.pop_front();
                continue;
            };
            if !backend.push(user_data(slot.sequence, key), &op) {
                break;
            }
            queue.pop_front();
            slot.state = State::InFlight;
            self.in_flight.set(self.in_flight.get() + 1);
            bytes += op.bytes();
            batch += 1;
            if let Op::Read { file, mem, .. } | Op::Write { file, mem, .. } = op {
                let fixed = mem.fixed.is_some() && backend.is_fixed_file(file);
                add(if fixed { &self.stats.transfers_fixed } else { &self.stats.transfers_plain }, 1);
            } else if let Op::ReadPieces { .. } = op {
                add(&self.stats.transfers_plain, 1);
            }
        }
        add(&self.stats.operations, batch);
        max(&self.stats.batch_max, batch);
        // Waiting for completions is what makes room when the limit of operations in flight was met.
        let left = !queue.is_empty() && self.in_flight.get() < limits::IN_FLIGHT_MAX;
        drop((queue, slots, backend));
        drop(unwanted);
        left
    }

    pub(crate) fn enter(&self, may_block: bool, deadline: Option<Nanos>) {
        let in_flight = self.in_flight.get();
        let mut wait = Wait::default();
        if may_block {
            let backstop = self.now.get() + limits::SAFETY_BACKSTOP_NANOS;
            wait.deadline = Some(deadline.map_or(backstop, |d| d.min(backstop)));
            let patience = self.patience.get().filter(|patience| in_flight > patience.completions);
            if let Some(patience) = patience {
                wait.want = patience.completions;
                wait.min_wait_usec = patience.wait_usec;
            } else {
                // Asking for more at once, with a wait of a microsecond, costs a timer an enter: see `docs/architecture.md`.
                wait.want = 1;
            }
        }
        let result = self.backend.borrow_mut().enter(wait);
        match result {
            Ok(entered) => add(&self.stats.enters, u64::from(entered)),
            Err(errno) => tracing::error!(%errno, "entering the ring failed; trying again"),
        }
    }
}
