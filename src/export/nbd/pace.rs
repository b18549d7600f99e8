//! How fast one client may ask: requests and bytes of data a second.
//!
//! A client above its limit is not refused: its next request is taken out of its stream later, and what it sends
//! meanwhile fills its own socket. Requests are charged whole when they start, so a large one is paid for by the wait of
//! the next ([`TokenBucket`] has the rules). A client that has gone or is shown the door does not wait.

use std::cell::{Cell, RefCell};

use blockferry_ring::sync::{Notify, either};
use blockferry_ring::{Nanos, Ring};

use crate::base::bucket::TokenBucket;

/// What one client may ask for in a second; 0 is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PaceLimits {
    /// Requests of any kind.
    pub requests_per_sec: u64,
    /// Bytes of data, read and written.
    pub bytes_per_sec: u64,
}

/// The limit of one client.
#[derive(Debug)]
pub(super) struct Pace {
    ring: Ring,
    requests: RefCell<TokenBucket>,
    bytes: RefCell<TokenBucket>,
    is_over: Cell<bool>,
    over: Notify,
}

impl Pace {
    /// `None` where nothing is limited.
    pub(super) fn new(ring: &Ring, limits: PaceLimits) -> Option<Pace> {
        (limits != PaceLimits::default()).then(|| Pace {
            ring: ring.clone(),
            requests: RefCell::new(TokenBucket::new(ring.now(), limits.requests_per_sec)),
            bytes: RefCell::new(TokenBucket::new(ring.now(), limits.bytes_per_sec)),
            is_over: Cell::new(false),
            over: ring.notify(),
        })
    }

    /// Nobody waits any more.
    pub(super) fn end(&self) {
        self.is_over.set(true);
        self.over.notify();
    }

    /// Waits until a request with `bytes` of data may start, and charges it.
    pub(super) async fn admit(&self, bytes: u64) {
        while let Some(at) = self.ready_at() {
            let over = self.over.until(|| self.is_over.get().then_some(()));
            either(over, self.ring.sleep_until(at)).await;
        }
        let now = self.ring.now();
        self.requests.borrow_mut().charge_debt(now, 1);
        self.bytes.borrow_mut().charge_debt(now, bytes);
    }

    fn ready_at(&self) -> Option<Nanos> {
        if self.is_over.get() {
            return None;
        }
        let now = self.ring.now();
        self.requests.borrow().ready_at(now).max(self.bytes.borrow().ready_at(now))
    }
}
