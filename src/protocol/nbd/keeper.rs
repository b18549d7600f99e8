//! The connections of one disk, counted: how many were made and lost, and how often that may have been their server's end.
//!
//! A server that goes down loses all its connections, which is noticed one by one: that is one outage.

use std::cell::Cell;
use std::rc::Rc;

use blockferry_ring::sync::Notify;
use blockferry_ring::{Nanos, Ring};

/// What becomes of the connections of one disk.
#[derive(Debug)]
pub(super) struct Keeper {
    /// Told when one is lost, and when its owner has something to tell.
    pub(super) changed: Notify,
    /// How many were made: the number of the newest.
    made: Cell<u64>,
    /// How many were lost.
    pub(super) lost: Cell<u64>,
    /// When the latest end was: one that is given up counts as lost at once, and ends when its server does or answers.
    pub(super) ended_at: Cell<Nanos>,
    /// How often one was lost that had not been there when the one before was: each time the server may have gone down.
    pub(super) outages: Cell<u64>,
    /// The newest connection at the time of the latest of these.
    outage_of: Cell<u64>,
}

impl Keeper {
    pub(super) fn new(ring: &Ring) -> Rc<Keeper> {
        Rc::new(Keeper {
            changed: ring.notify(),
            made: Cell::new(0),
            lost: Cell::new(0),
            ended_at: Cell::new(0),
            outages: Cell::new(0),
            outage_of: Cell::new(0),
        })
    }

    /// One is made: its number.
    pub(super) fn count_made(&self) -> u64 {
        self.made.set(self.made.get() + 1);
        self.made.get()
    }

    /// The one with this number is lost.
    pub(super) fn count_lost(&self, number: u64) {
        self.lost.set(self.lost.get() + 1);
        if number > self.outage_of.get() {
            self.outages.set(self.outages.get() + 1);
            self.outage_of.set(self.made.get());
        }
    }
}
