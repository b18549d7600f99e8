//! The length of a file that may grow while it is in use.
//!
//! A length that is remembered decides what is read: beyond it there is nothing. So whoever writes behind the end lengthens
//! the file first, by one way, and what is remembered follows before the write is acknowledged. Changes go one at a time:
//! of two that are carried out in the wrong order, the shorter one would cut off what was written behind it.

use std::cell::Cell;

use blockferry_ring::Ring;
use blockferry_ring::sync::Notify;

/// How long a file is, as far as is known here.
#[derive(Debug)]
pub(super) struct Length {
    bytes: Cell<u64>,
    changing: Cell<bool>,
    changed: Notify,
}

/// The right to change the length; given back when this is dropped.
#[derive(Debug)]
pub(super) struct Changing<'a>(&'a Length);

impl Length {
    pub(super) fn new(ring: &Ring, bytes: u64) -> Length {
        Length { bytes: Cell::new(bytes), changing: Cell::new(false), changed: ring.notify() }
    }

    pub(super) fn get(&self) -> u64 {
        self.bytes.get()
    }

    /// Waits for those who change it.
    pub(super) async fn change(&self) -> Changing<'_> {
        self.changed.until(|| (!self.changing.replace(true)).then_some(())).await;
        Changing(self)
    }

    /// It was found to be this, at a moment at which nobody changes it.
    pub(super) fn found(&self, bytes: u64) {
        self.bytes.set(bytes);
    }
}

impl Changing<'_> {
    /// It is so long from now on.
    pub(super) fn set(&self, bytes: u64) {
        self.0.bytes.set(bytes);
    }
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        self.0.changing.set(false);
        self.0.changed.notify();
    }
}
