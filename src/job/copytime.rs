//! How long a job has copied: the time while there was something to copy and nothing held it up but the disks and its own
//! speed limit. Following, comparing, flushing at the end, and standing still (paused, or before another attempt) are not
//! copying, so a rate that is shown divides by this and not by the time that the whole job took.

use blockferry_ring::Nanos;

/// The time in which was copied.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct CopyTime {
    since: Option<Nanos>,
    total: Nanos,
}

impl CopyTime {
    /// From now on the job copies, or not.
    pub(super) fn look(&mut self, now: Nanos, copies: bool) {
        if let Some(since) = self.since.take() {
            self.total = self.total.saturating_add(now.saturating_sub(since));
        }
        self.since = copies.then_some(now);
    }

    /// So long, as of the latest look.
    pub(super) fn total(&self) -> Nanos {
        self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_copying_counts() {
        let mut time = CopyTime::default();
        for (now, copies) in [(5, false), (10, true), (14, true), (20, false), (90, false), (100, true)] {
            time.look(now, copies);
        }
        assert_eq!(time.total(), 10);
        time.look(101, false);
        assert_eq!(time.total(), 11);
    }
}
