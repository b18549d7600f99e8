//! What a client holds: requests in flight and payload bytes, until their replies have been sent.
//!
//! A [`Ticket`] is a share of it. It travels with the request, then with its reply, and gives itself back when it is
//! dropped, whichever way the request ends.

use std::cell::Cell;
use std::rc::Rc;

use blockferry_ring::Ring;
use blockferry_ring::sync::Notify;

use super::pace::PaceLimits;
use super::session::may_hold;
use crate::base::limits::{NBD_LONG_CHANGES_PER_CLIENT, NBD_WALKS_PER_CLIENT};
use crate::base::planted::{Bug, is_planted};

/// What a client may hold at once.
#[derive(Clone, Debug)]
pub(super) struct QuotaLimits {
    pub(super) requests_max: usize,
    pub(super) bytes_max: u64,
    /// And how fast it may ask for more.
    pub(super) pace: PaceLimits,
    /// Long changes of all clients of its export.
    pub(super) changes_of_export: Rc<Seats>,
}

/// What one client holds.
#[derive(Debug)]
pub(super) struct Quota {
    ring: Ring,
    pub(super) limits: QuotaLimits,
    requests: Cell<usize>,
    bytes: Cell<u64>,
    released: Notify,
    /// Walks over the disk's allocation.
    pub(super) walks: Rc<Seats>,
    /// Long changes.
    pub(super) changes: Rc<Seats>,
}

impl Quota {
    pub(super) fn new(ring: &Ring, limits: QuotaLimits) -> Rc<Quota> {
        let walks = if is_planted(Bug::StatusWalkKeepsTurn) { usize::MAX } else { NBD_WALKS_PER_CLIENT };
        Rc::new(Quota {
            ring: ring.clone(),
            limits,
            requests: Cell::new(0),
            bytes: Cell::new(0),
            released: ring.notify(),
            walks: Seats::new(ring, walks),
            changes: Seats::new(ring, NBD_LONG_CHANGES_PER_CLIENT),
        })
    }

    /// Waits until the client may have one more request in flight.
    pub(super) async fn request(self: &Rc<Quota>) -> Ticket {
        let fits = || (self.requests.get() < self.limits.requests_max).then_some(());
        self.released.until(fits).await;
        self.requests.set(self.requests.get() + 1);
        Ticket { quota: self.clone(), requests: 1, bytes: 0 }
    }

    /// Waits until the client may hold `bytes` more of payload.
    pub(super) async fn bytes(self: &Rc<Quota>, bytes: usize) -> Ticket {
        let bytes = bytes as u64;
        let arena = self.ring.arena();
        let fits = || {
            let free = arena.bytes().saturating_sub(arena.bytes_used()) as u64;
            may_hold(self.bytes.get(), bytes, self.limits.bytes_max, free).then_some(())
        };
        self.released.until(fits).await;
        self.bytes.set(self.bytes.get() + bytes);
        Ticket { quota: self.clone(), requests: 0, bytes }
    }

    /// A share of nothing, for what is part of something that has its share.
    pub(super) fn nothing(self: &Rc<Quota>) -> Ticket {
        Ticket { quota: self.clone(), requests: 0, bytes: 0 }
    }

    /// Waits until the client holds nothing.
    pub(super) async fn empty(&self) {
        self.released.until(|| (self.requests.get() == 0 && self.bytes.get() == 0).then_some(())).await;
    }
}

/// So many at a time, of one client or of all clients of an export. Who comes first is first.
#[derive(Debug)]
pub(super) struct Seats {
    free: Cell<usize>,
    released: Notify,
}

impl Seats {
    pub(super) fn new(ring: &Ring, seats: usize) -> Rc<Seats> {
        Rc::new(Seats { free: Cell::new(seats), released: ring.notify() })
    }

    /// Waits for one.
    pub(super) async fn take(self: &Rc<Seats>) -> Seat {
        self.released.until(|| (self.free.get() > 0).then_some(())).await;
        self.free.set(self.free.get() - 1);
        Seat(self.clone())
    }
}

/// One of [`Seats`], taken while this lives.
#[derive(Debug)]
pub(super) struct Seat(Rc<Seats>);

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.free.set(self.0.free.get() + 1);
        self.0.released.notify();
    }
}

/// A share of what a client holds.
#[derive(Debug)]
pub(super) struct Ticket {
    quota: Rc<Quota>,
    requests: usize,
    bytes: u64,
}

impl Ticket {
    /// Two shares of one client become one.
    pub(super) fn absorb(&mut self, mut other: Ticket) {
        self.requests += std::mem::take(&mut other.requests);
        self.bytes += std::mem::take(&mut other.bytes);
    }

    /// Gives the bytes back, keeps the requests.
    pub(super) fn give_bytes_back(&mut self) {
        self.quota.bytes.set(self.quota.bytes.get() - std::mem::take(&mut self.bytes));
        self.quota.released.notify();
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.requests > 0 || self.bytes > 0 {
            self.quota.requests.set(self.quota.requests.get() - self.requests);
            self.quota.bytes.set(self.quota.bytes.get() - self.bytes);
            self.quota.released.notify();
        }
    }
}
