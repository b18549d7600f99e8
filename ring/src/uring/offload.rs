//! The offload pool: a few threads for calls that block, started on first use.
//!
//! A thread runs the call, then puts its name into the ring's [`Inbox`]. Nothing else of the ring is
//! touched from there. An embedder that wants no threads gets the calls run in place.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::backend::Work;
use crate::config::OffloadMode;
use crate::errno::Errno;
use crate::external::Inbox;
use crate::limits;

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    more: Condvar,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<(u64, Work)>,
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
    inbox: Arc<Inbox>,
}

impl Offload {
    pub(super) fn new(mode: OffloadMode, threads_max: usize, inbox: Arc<Inbox>) -> Offload {
        let threads_max = threads_max.clamp(1, limits::OFFLOAD_THREADS_MAX);
        Offload { mode, shared: Arc::default(), threads: 0, threads_max, inbox }
    }

    pub(super) fn threads(&self) -> usize {
        self.threads
    }

    pub(super) fn start(&mut self, user_data: u64, work: Work) -> Result<(), Errno> {
        if self.mode == OffloadMode::Inline {
            work();
            self.inbox.put(user_data, 0);
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
                self.inbox.put(user_data, 0);
            }
        }
        Ok(())
    }

    fn start_thread(&mut self) {
        let shared = self.shared.clone();
        let inbox = self.inbox.clone();
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
                inbox.put(user_data, 0);
            }
        };
        match std::thread::Builder::new().name("blockferry-offload".into()).spawn(body) {
            Ok(_) => self.threads += 1,
            Err(error) => tracing::warn!(%error, "no offload thread could be started"),
        }
    }
}

impl Drop for Offload {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.more.notify_all();
    }
}
