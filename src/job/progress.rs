//! The progress meter of a job: bytes done, and bytes done plus bytes known to be left.
//!
//! A guest that writes while its disk is mirrored makes more work, and a hole found in the source makes less, so
//! the length moves both ways while the offset only grows. A job that ends with success ends with the two equal.

/// How far a job is. Units are bytes of the job's own work, not of the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    offset_bytes: u64,
    len_bytes: u64,
}

impl Progress {
    /// Nothing done, `len_bytes` to do.
    pub fn new(len_bytes: u64) -> Self {
        Self { offset_bytes: 0, len_bytes }
    }

    /// Bytes done; never falls.
    pub fn offset(&self) -> u64 {
        self.offset_bytes
    }

    /// Bytes done and bytes known to be left; may rise and fall.
    pub fn len(&self) -> u64 {
        self.len_bytes
    }

    /// True when the whole job, done and left, is nothing at all (a commit of an empty overlay).
    pub fn is_empty(&self) -> bool {
        self.len_bytes == 0
    }

    /// Bytes known to be left.
    pub fn remaining(&self) -> u64 {
        self.len_bytes.saturating_sub(self.offset_bytes)
    }

    /// True when nothing is known to be left.
    pub fn is_complete(&self) -> bool {
        self.remaining() == 0
    }

    /// Adds `bytes` to what is done.
    pub fn done(&mut self, bytes: u64) {
        self.offset_bytes = self.offset_bytes.saturating_add(bytes);
        self.len_bytes = self.len_bytes.max(self.offset_bytes);
    }

    /// Says anew how much is left.
    pub fn set_remaining(&mut self, bytes: u64) {
        self.len_bytes = self.offset_bytes.saturating_add(bytes);
    }

    /// Adds `bytes` to what is left.
    pub fn add_remaining(&mut self, bytes: u64) {
        self.len_bytes = self.len_bytes.saturating_add(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_length_moves_both_ways_and_the_offset_only_up() {
        let mut meter = Progress::new(100);
        meter.done(40);
        assert_eq!((meter.offset(), meter.len(), meter.remaining()), (40, 100, 60));
        meter.set_remaining(10);
        assert_eq!((meter.offset(), meter.len(), meter.remaining()), (40, 50, 10));
        meter.add_remaining(25);
        assert_eq!((meter.offset(), meter.len(), meter.remaining()), (40, 75, 35));
        meter.done(35);
        assert!(meter.is_complete());
        assert_eq!(meter.offset(), meter.len());
    }

    #[test]
    fn work_that_nobody_announced_never_leaves_the_offset_above_the_length() {
        let mut meter = Progress::new(10);
        meter.done(16);
        assert_eq!((meter.offset(), meter.len(), meter.remaining()), (16, 16, 0));
        meter.add_remaining(u64::MAX);
        meter.done(u64::MAX);
        assert_eq!((meter.offset(), meter.len()), (u64::MAX, u64::MAX));
    }

    #[test]
    fn an_empty_job_is_complete() {
        let meter = Progress::default();
        assert!(meter.is_complete() && meter.is_empty());
    }
}
