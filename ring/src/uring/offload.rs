//! The offload pool: a few threads for calls that block, started on first use.
//!
//! A thread runs the call, then puts its name on a list and rings the eventfd. Nothing of the ring is
//! touched from there. An embedder that wants no threads gets the calls run in place.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::sys;
use crate::backend::Work;
use crate::config::OffloadMode;
use crate::errno::Errno;
use crate::limits;

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    more: Condvar,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<(u64, Work)>,
    done: Vec<u64>,
    idle: usize,
    closing: bool,
}

impl Shared {
    /// A panic in a call must not take the list with it.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) struct Offload {
    mode: OffloadMode,
    shared: Arc<Shared>,
    threads: usize,
    threads_max: usize,
    wake: Arc<OwnedFd>,
}

impl Offload {
    pub(super) fn new(mode: OffloadMode, threads_max: usize, wake: Arc<OwnedFd>) -> Offload {
        let threads_max = threads_max.clamp(1, limits::OFFLOAD_THREADS_MAX);
        Offload { mode, shared: Arc::default(), threads: 0, threads_max, wake }
    }

    pub(super) fn threads(&self) -> usize {
        self.threads
    }

    pub(super) fn start(&mut self, user_data: u64, work: Work) -> Result<(), Errno> {
        if self.mode == OffloadMode::Inline {
            work();
            self.shared.lock().done.push(user_data);
            return Ok(());
        }
        let idle = {
            let mut state = self.shared.lock();
            if state.waiting.len() >= limits::OFFLOAD_QUEUE {
                return Err(Errno::EAGAIN);
            }
            state.waiting.push_back((user_data, work));
            state.idle
        };
        if idle == 0 && self.threads < self.threads_max {
            self.start_thread();
        }
        self.shared.more.notify_one();
        if self.threads == 0 {
            // No thread could be started: run it here rather than never.
            let call = self.shared.lock().waiting.pop_back();
            if let Some((user_data, work)) = call {
                work();
                self.shared.lock().done.push(user_data);
            }
        }
        Ok(())
    }

    fn start_thread(&mut self) {
        let shared = self.shared.clone();
        let wake = self.wake.clone();
        let body = move || {
            loop {
                let mut state = shared.lock();
                let (user_data, work) = loop {
                    if let Some(call) = state.waiting.pop_front() {
                        break call;
                    }
                    if state.closing {
                        return;
                    }
                    state.idle += 1;
                    state = shared.more.wait(state).unwrap_or_else(PoisonError::into_inner);
                    state.idle -= 1;
                };
                drop(state);
                // A call that panics still ends: its owner finds no value and reports EIO.
                let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
                shared.lock().done.push(user_data);
                sys::ring_eventfd(&wake);
            }
        };
        match std::thread::Builder::new().name("blockferry-offload".into()).spawn(body) {
            Ok(_) => self.threads += 1,
            Err(error) => tracing::warn!(%error, "no offload thread could be started"),
        }
    }

    pub(super) fn has_done(&self) -> bool {
        !self.shared.lock().done.is_empty()
    }

    pub(super) fn take_done(&self, max: usize, out: &mut Vec<(u64, i32)>) {
        let mut state = self.shared.lock();
        let n = state.done.len().min(max.saturating_sub(out.len()));
        out.extend(state.done.drain(..n).map(|user_data| (user_data, 0)));
    }
}

impl Drop for Offload {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.more.notify_all();
    }
}
