//! Operations that somebody else carries out: ended from any thread, by a list and a wake-up.
//!
//! A library with threads of its own (or the offload pool) takes a [`Completer`] along with the work and uses it up when
//! the work is done. The completion goes onto the ring's list and wakes the ring, which delivers it like one of the
//! kernel's. Nothing else of the ring is touched from there.
//!
//! # Memory contract
//! As for the kernel's operations: memory and whatever else was handed in belong to the slot until the completion is
//! delivered, on the ring's own thread, whatever happens to the future. A completer that is dropped without having been
//! used ends its operation with `EIO`: whoever drops it says that nobody will touch the memory any more.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::backend::RemoteWaker;
use crate::errno::Errno;

/// Completions from other threads that the ring has not taken yet.
#[derive(Debug)]
pub(crate) struct Inbox {
    ended: Mutex<Vec<(u64, i32)>>,
    wake: RemoteWaker,
}

impl Inbox {
    pub(crate) fn new(wake: RemoteWaker) -> Arc<Inbox> {
        Arc::new(Inbox { ended: Mutex::default(), wake })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(u64, i32)>> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a completion on the list. What is on it already has been announced.
    pub(crate) fn put(&self, user_data: u64, result: i32) {
        let is_first = {
            let mut ended = self.lock();
            ended.push((user_data, result));
            ended.len() == 1
        };
        if is_first {
            self.wake.wake();
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// Moves completions to `out` until that holds `max`.
    pub(crate) fn take(&self, max: usize, out: &mut Vec<(u64, i32)>) {
        let mut ended = self.lock();
        let n = ended.len().min(max.saturating_sub(out.len()));
        out.extend(ended.drain(..n));
    }
}

/// Ends one operation, from any thread.
#[derive(Debug)]
pub struct Completer {
    user_data: u64,
    inbox: Arc<Inbox>,
    used: bool,
}

impl Completer {
    pub(crate) fn new(user_data: u64, inbox: Arc<Inbox>) -> Completer {
        Completer { user_data, inbox, used: false }
    }

    /// Ends the operation with a number of bytes (up to 2 GiB) or an error. Its memory is not touched any more.
    pub fn complete(mut self, result: Result<u32, Errno>) {
        self.used = true;
        let result = match result {
            Ok(number) => i32::try_from(number).unwrap_or(i32::MAX),
            // An error without a number must not pass for success.
            Err(Errno(number)) if number <= 0 => -libc::EIO,
            Err(Errno(number)) => -number,
        };
        self.inbox.put(self.user_data, result);
    }
}

impl Drop for Completer {
    fn drop(&mut self) {
        if !self.used {
            self.inbox.put(self.user_data, -libc::EIO);
        }
    }
}

/// Something that an operation keeps alive until it is complete.
pub type Keep = Arc<dyn std::any::Any + Send + Sync>;
