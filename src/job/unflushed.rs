//! What a job has written and not flushed yet.
//!
//! # Situation
//! A device with a cache takes writes faster than it can keep them, and a flush takes as long as keeping all that has
//! gathered. On many disks, virtual ones above all, nothing else goes ahead meanwhile: when a copy of 800 MiB was flushed as
//! one, the guests of that disk stood still for 1.3 s.
//!
//! # How it decides
//! So a job beside guests flushes while it copies, before more has gathered than a short flush deals with. How much that is
//! is learnt from how long flushes take: half as much after one of more than [`LONG_NANOS`], twice as much after one of less
//! than [`SHORT_NANOS`]. Where a flush takes its time however little there is to flush, less of it would only mean more
//! flushes: if half of the bytes did not take clearly less, there are more bytes to a flush, and before the next attempt
//! there are twice as many flushes as before the last. While a flush is under way, no more may gather than is flushed next.

use blockferry_ring::Nanos;

/// Bytes before the first flush.
const BYTES_FIRST: u64 = 16 << 20;
/// Bytes between flushes at least, and at most.
const BYTES_MIN: u64 = 2 << 20;
const BYTES_MAX: u64 = 1 << 30;
/// Long flushes in a row at most before half as much is tried again: a device may change.
const PATIENCE_MAX: u32 = 64;
/// A flush that took less disturbs nobody.
const SHORT_NANOS: Nanos = 2_500_000;
/// One that took more does.
const LONG_NANOS: Nanos = 10_000_000;

/// See the module's documentation.
#[derive(Clone, Debug)]
pub struct Unflushed {
    bytes: u64,
    bytes_max: u64,
    /// Since when a flush is under way.
    running: Option<Nanos>,
    /// How long a flush took that is followed by one of half as much.
    halved_after: Option<Nanos>,
    /// Long flushes to put up with after less to flush did not help, and those of them that are left.
    patience: u32,
    patience_left: u32,
}

impl Unflushed {
    /// Nothing yet.
    pub fn new() -> Unflushed {
        Unflushed {
            bytes: 0,
            bytes_max: BYTES_FIRST,
            running: None,
            halved_after: None,
            patience: 0,
            patience_left: 0,
        }
    }

    /// So much was written.
    pub fn wrote(&mut self, bytes: u64) {
        self.bytes = self.bytes.saturating_add(bytes);
    }

    /// So much has gathered that it is to be flushed.
    pub fn is_much(&self) -> bool {
        self.running.is_none() && self.bytes >= self.bytes_max
    }

    /// As much has gathered again as the flush under way began with: more is to wait for its end.
    pub fn is_too_much(&self) -> bool {
        self.running.is_some() && self.bytes >= self.bytes_max
    }

    /// A flush has begun.
    pub fn began(&mut self, now: Nanos) {
        self.running = Some(now);
        self.bytes = 0;
    }

    /// It has ended.
    pub fn ended(&mut self, now: Nanos) {
        let Some(began) = self.running.take() else { return };
        let took = now.saturating_sub(began);
        let is_long = took > LONG_NANOS;
        match self.halved_after.take() {
            Some(before) if is_long && took > before / 4 * 3 => {
                self.patience = (self.patience * 2).clamp(1, PATIENCE_MAX);
                self.patience_left = self.patience;
            }
            Some(_) => self.patience = 0,
            None => {}
        }
        if is_long && self.patience_left == 0 {
            if self.bytes_max > BYTES_MIN {
                self.bytes_max /= 2;
                self.halved_after = Some(took);
            }
        } else if is_long || took < SHORT_NANOS {
            self.patience_left = self.patience_left.saturating_sub(1);
            self.bytes_max = (self.bytes_max * 2).min(BYTES_MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// Copies so much at one byte a nanosecond; a flush of so many bytes takes so long. How many bytes the flushes had.
    fn flushes(total: u64, takes: impl Fn(u64) -> Nanos) -> Vec<u64> {
        let (mut unflushed, mut all, mut now) = (Unflushed::new(), Vec::new(), 0);
        for _ in 0..total >> 20 {
            unflushed.wrote(1 << 20);
            now += 1 << 20;
            if unflushed.is_much() {
                let bytes = unflushed.bytes;
                unflushed.began(now);
                assert!(!unflushed.is_much(), "one at a time");
                now += takes(bytes);
                unflushed.ended(now);
                all.push(bytes);
            }
        }
        all
    }

    #[test]
    fn what_gathers_is_flushed_in_short_parts() {
        // A byte takes two nanoseconds to be kept.
        let all = flushes(4 << 30, |bytes| bytes * 2);
        assert_eq!(all[..2], [BYTES_FIRST, BYTES_FIRST / 2]);
        assert!(all[3..].iter().all(|bytes| bytes * 2 <= LONG_NANOS), "{all:?}");
        // A slow device: as short as they get.
        let all = flushes(1 << 30, |bytes| bytes * 10);
        assert!(all[4..].iter().all(|bytes| *bytes <= 2 * BYTES_MIN), "{all:?}");
    }

    #[test]
    fn a_flush_that_costs_nothing_is_seldom_made() {
        let all = flushes(4 << 30, |_| 100_000);
        assert!(all.len() <= 9, "{all:?}");
    }

    #[test]
    fn a_flush_that_always_takes_its_time_is_not_made_for_every_little() {
        let all = flushes(4 << 30, |_| 30_000_000);
        assert!(all.len() <= 20, "{all:?}");
        // Nor does one that took longer by chance make the parts larger for good.
        let count = Cell::new(0);
        let all = flushes(4 << 30, |bytes| {
            count.set(count.get() + 1);
            if count.get() % 20 == 0 { 100_000_000 } else { bytes * 2 }
        });
        let short = all.iter().filter(|bytes| **bytes * 2 <= 2 * LONG_NANOS).count();
        assert!(short * 10 >= all.len() * 9, "{all:?}");
    }
}
