//! Waiting inside one ring: conditions, one-shot results, joins, yielding.
//!
//! The one pattern is [`Notify::until`]: a condition is looked at again after every notification, so
//! that no decision rests on state from before a wait.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::Rc;
use std::task::Poll;

use crate::Nanos;
use crate::exec::{Exec, TaskId};
use crate::limits;
use crate::pool::PooledFuture;
use crate::ring::Ring;

/// A list of tasks that wait for some state to change.
#[derive(Clone, Debug)]
pub struct Notify(Rc<NotifyInner>);

#[derive(Debug)]
struct NotifyInner {
    exec: Exec,
    waiting: RefCell<Vec<TaskId>>,
}

impl Notify {
    pub(crate) fn new(exec: Exec) -> Notify {
        Notify(Rc::new(NotifyInner { exec, waiting: RefCell::new(Vec::new()) }))
    }

    /// Wakes all who wait; they look at their conditions in the order in which they came.
    pub fn notify(&self) {
        let mut waiting = self.0.waiting.borrow_mut();
        for task in waiting.drain(..) {
            self.0.exec.wake(task);
        }
    }

    /// Has the current task look again after the next [`Notify::notify`].
    pub fn register(&self) {
        if let Some(task) = self.0.exec.current() {
            let mut waiting = self.0.waiting.borrow_mut();
            if !waiting.contains(&task) {
                waiting.push(task);
            }
        }
    }

    /// Waits until `condition` gives a value. It is asked at once, and after every notification.
    pub async fn until<T>(&self, mut condition: impl FnMut() -> Option<T>) -> T {
        std::future::poll_fn(|_| match condition() {
            Some(value) => Poll::Ready(value),
            None => {
                self.register();
                Poll::Pending
            }
        })
        .await
    }
}

/// The two ends of a value that is given once.
#[derive(Debug)]
pub struct OneShot<T> {
    value: Rc<RefCell<Option<T>>>,
    notify: Notify,
}

impl<T> Clone for OneShot<T> {
    fn clone(&self) -> OneShot<T> {
        OneShot { value: self.value.clone(), notify: self.notify.clone() }
    }
}

impl<T> OneShot<T> {
    pub(crate) fn new(exec: Exec) -> OneShot<T> {
        OneShot { value: Rc::default(), notify: Notify::new(exec) }
    }

    /// Gives the value; the first one counts.
    pub fn give(&self, value: T) {
        let mut slot = self.value.borrow_mut();
        if slot.is_none() {
            *slot = Some(value);
            self.notify.notify();
        }
    }

    /// Whether the value is there.
    pub fn is_given(&self) -> bool {
        self.value.borrow().is_some()
    }

    /// The value if it is there.
    pub fn try_take(&self) -> Option<T> {
        self.value.borrow_mut().take()
    }

    /// Waits for the value.
    pub async fn take(&self) -> T {
        self.notify.until(|| self.try_take()).await
    }
}

/// Lets all tasks run first that are ready, and those that they wake.
pub async fn yield_now(exec: &Exec) {
    let yielded = Cell::new(false);
    std::future::poll_fn(|_| {
        if yielded.replace(true) {
            return Poll::Ready(());
        }
        if let Some(task) = exec.current() {
            exec.wake_later(task);
        }
        Poll::Pending
    })
    .await
}

/// One task's share of a turn. A loop over extents, tables or requests counts its steps here, and lets others run when
/// it has taken its share: so many steps, or so much time.
#[derive(Debug)]
pub struct Stint {
    ring: Ring,
    began: Nanos,
    steps: u32,
}

impl Stint {
    pub(crate) fn new(ring: &Ring) -> Stint {
        Stint { ring: ring.clone(), began: ring.clock(), steps: 0 }
    }

    /// `steps` more have been made.
    pub async fn count(&mut self, steps: usize) {
        let before = self.steps / limits::STINT_STEPS_A_LOOK;
        self.steps = self.steps.saturating_add(u32::try_from(steps).unwrap_or(u32::MAX));
        // Looking at the clock costs as much as some steps.
        if self.steps / limits::STINT_STEPS_A_LOOK == before {
            return;
        }
        if self.steps >= limits::STINT_STEPS || self.ring.clock() >= self.began + limits::STINT_NANOS {
            self.ring.yield_now().await;
            self.began = self.ring.clock();
            self.steps = 0;
        }
    }

    /// One more step has been made.
    pub async fn step(&mut self) {
        self.count(1).await;
    }
}

/// The value of a future that has nothing to wait for; `None` if it waits after all.
pub fn at_once<T>(future: impl Future<Output = T>) -> Option<T> {
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    match std::pin::pin!(future).poll(&mut context) {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}

/// Runs futures in one task and waits for all.
pub async fn join_all<T>(futures: Vec<PooledFuture<'_, T>>) -> Vec<T> {
    let mut running: Vec<Result<T, PooledFuture<'_, T>>> = futures.into_iter().map(Err).collect();
    std::future::poll_fn(|cx| {
        let mut pending = false;
        for slot in &mut running {
            if let Err(future) = slot {
                match std::pin::Pin::new(future).poll(cx) {
                    Poll::Ready(value) => *slot = Ok(value),
                    Poll::Pending => pending = true,
                }
            }
        }
        if pending { Poll::Pending } else { Poll::Ready(()) }
    })
    .await;
    running.into_iter().filter_map(Result::ok).collect()
}

/// Runs two futures in one task and waits for both.
pub async fn join<A: Future, B: Future>(a: A, b: B) -> (A::Output, B::Output) {
    let mut a = std::pin::pin!(a);
    let mut b = std::pin::pin!(b);
    let (mut x, mut y) = (None, None);
    std::future::poll_fn(move |cx| {
        if x.is_none()
            && let Poll::Ready(value) = a.as_mut().poll(cx)
        {
            x = Some(value);
        }
        if y.is_none()
            && let Poll::Ready(value) = b.as_mut().poll(cx)
        {
            y = Some(value);
        }
        match (x.take(), y.take()) {
            (Some(first), Some(second)) => Poll::Ready((first, second)),
            (first, second) => {
                (x, y) = (first, second);
                Poll::Pending
            }
        }
    })
    .await
}

/// Waits for `a` or `b`, whichever comes first; the other is dropped.
pub async fn either<A: Future, B: Future>(a: A, b: B) -> Either<A::Output, B::Output> {
    let mut a = std::pin::pin!(a);
    let mut b = std::pin::pin!(b);
    std::future::poll_fn(move |cx| {
        if let Poll::Ready(x) = a.as_mut().poll(cx) {
            return Poll::Ready(Either::First(x));
        }
        b.as_mut().poll(cx).map(Either::Second)
    })
    .await
}

/// Which of two futures ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Either<A, B> {
    /// The first.
    First(A),
    /// The second.
    Second(B),
}
