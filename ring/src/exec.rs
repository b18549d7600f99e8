//! The executor: tasks of one ring, run to their next wait, in the order in which they were woken.
//!
//! A task waits only for things of its own ring (operations, time, [`crate::sync`]). Those remember
//! the *task*, not a [`std::task::Waker`], so waiting costs no reference count and no allocation. A
//! future from elsewhere still works: the waker that it is given marks all tasks for another look
//! and wakes a sleeping ring. That is correct from any thread, and slow, which is why nothing here
//! does it on a hot path.
//!
//! A task that yields in the midst of long work waits behind all that were woken by something, however often
//! those wait again; one such task runs in each turn all the same. So a thousand walks over tables, each of which
//! yields, delay an answer by no more than one of their steps a turn.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use slab::Slab;

use crate::backend::RemoteWaker;
use crate::pool::{Pool, PooledFuture};

/// Names a task; stale names are harmless.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskId {
    index: u32,
    sequence: u32,
}

struct Task {
    /// Empty while the task is being polled.
    future: Option<PooledFuture<'static, ()>>,
    sequence: u32,
    queued: bool,
}

/// What foreign wakers reach: it may be called from any thread.
struct Foreign {
    woken: AtomicBool,
    remote: RemoteWaker,
}

impl Wake for Foreign {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.woken.swap(true, Ordering::AcqRel) {
            self.remote.wake();
        }
    }
}

/// A handle of the executor.
#[derive(Clone)]
pub struct Exec(Rc<Inner>);

struct Inner {
    tasks: RefCell<Slab<Task>>,
    ready: RefCell<VecDeque<TaskId>>,
    /// Those that have yielded.
    later: RefCell<VecDeque<TaskId>>,
    current: Cell<Option<TaskId>>,
    sequence: Cell<u32>,
    pool: Pool,
    foreign: Arc<Foreign>,
    waker: Waker,
}

impl std::fmt::Debug for Exec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Exec").field("tasks", &self.task_count()).finish_non_exhaustive()
    }
}

impl Exec {
    pub(crate) fn new(pool: Pool, remote: RemoteWaker) -> Exec {
        let foreign = Arc::new(Foreign { woken: AtomicBool::new(false), remote });
        Exec(Rc::new(Inner {
            tasks: RefCell::new(Slab::with_capacity(256)),
            ready: RefCell::new(VecDeque::with_capacity(256)),
            later: RefCell::default(),
            current: Cell::new(None),
            sequence: Cell::new(0),
            pool,
            waker: Waker::from(foreign.clone()),
            foreign,
        }))
    }

    /// Starts a task; it runs in this turn or the next.
    pub fn spawn(&self, future: impl Future<Output = ()> + 'static) -> TaskId {
        let sequence = self.0.sequence.get().wrapping_add(1);
        self.0.sequence.set(sequence);
        let future = PooledFuture::new(&self.0.pool, future);
        let index = self.0.tasks.borrow_mut().insert(Task { future: Some(future), sequence, queued: true });
        let id = TaskId { index: index as u32, sequence };
        self.0.ready.borrow_mut().push_back(id);
        id
    }

    /// Marks a task to be run. Unknown and finished tasks are ignored.
    pub fn wake(&self, id: TaskId) {
        self.queue(id, &self.0.ready);
    }

    /// The same, behind all that were woken.
    pub(crate) fn wake_later(&self, id: TaskId) {
        self.queue(id, &self.0.later);
    }

    fn queue(&self, id: TaskId, queue: &RefCell<VecDeque<TaskId>>) {
        let mut tasks = self.0.tasks.borrow_mut();
        if let Some(task) = tasks.get_mut(id.index as usize)
            && task.sequence == id.sequence
            && !task.queued
        {
            task.queued = true;
            queue.borrow_mut().push_back(id);
        }
    }

    /// The task that is being polled. `None` outside of one: what waits there is never woken.
    pub fn current(&self) -> Option<TaskId> {
        self.0.current.get()
    }

    pub(crate) fn has_ready(&self) -> bool {
        self.has_woken() || !self.0.later.borrow().is_empty()
    }

    /// Tasks are ready that were woken, and have not merely yielded.
    pub(crate) fn has_woken(&self) -> bool {
        !self.0.ready.borrow().is_empty() || self.0.foreign.woken.load(Ordering::Acquire)
    }

    /// Tasks that have not ended.
    pub fn task_count(&self) -> usize {
        self.0.tasks.borrow().len()
    }

    /// Runs one ready task to its next wait, those first that were woken; false when there was none.
    pub(crate) fn run_one(&self) -> bool {
        if self.0.foreign.woken.swap(false, Ordering::AcqRel) {
            self.wake_all();
        }
        let woken = self.0.ready.borrow_mut().pop_front();
        match woken {
            Some(id) => self.run(id),
            None => return self.run_yielded(),
        }
        true
    }

    /// Runs one of those that have yielded; false when there was none.
    pub(crate) fn run_yielded(&self) -> bool {
        let yielded = self.0.later.borrow_mut().pop_front();
        yielded.map(|id| self.run(id)).is_some()
    }

    fn run(&self, id: TaskId) {
        let future = {
            let mut tasks = self.0.tasks.borrow_mut();
            match tasks.get_mut(id.index as usize) {
                Some(task) if task.sequence == id.sequence => {
                    task.queued = false;
                    task.future.take()
                }
                _ => None,
            }
        };
        let Some(mut future) = future else { return };
        let before = self.0.current.replace(Some(id));
        let mut cx = Context::from_waker(&self.0.waker);
        let poll = Pin::new(&mut future).poll(&mut cx);
        self.0.current.set(before);
        match poll {
            Poll::Ready(()) => {
                self.0.tasks.borrow_mut().remove(id.index as usize);
                // Dropped last: what the task owned may wake or spawn others.
                drop(future);
            }
            Poll::Pending => {
                if let Some(task) = self.0.tasks.borrow_mut().get_mut(id.index as usize) {
                    task.future = Some(future);
                }
            }
        }
    }

    fn wake_all(&self) {
        let ids: Vec<TaskId> = {
            let tasks = self.0.tasks.borrow();
            tasks.iter().map(|(i, t)| TaskId { index: i as u32, sequence: t.sequence }).collect()
        };
        for id in ids {
            self.wake(id);
        }
    }

    /// Drops all tasks (shutdown only).
    pub(crate) fn clear(&self) {
        loop {
            let future = {
                let mut tasks = self.0.tasks.borrow_mut();
                let Some(index) = tasks.iter().next().map(|(i, _)| i) else { break };
                tasks.remove(index).future
            };
            drop(future);
        }
        self.0.ready.borrow_mut().clear();
        self.0.later.borrow_mut().clear();
    }
}
