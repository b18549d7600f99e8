//! The trace: every event folded into one 64-bit number, and the last lines kept for a person.
//!
//! Two runs of one seed that differ anywhere differ here. Nothing enters the number that a second run
//! could not repeat: no addresses, no wall clock.

use std::collections::VecDeque;

use crate::Nanos;

/// Folds words into a number.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hash(u64);

impl Hash {
    pub(super) const fn new() -> Hash {
        Hash(0xcbf2_9ce4_8422_2325)
    }

    pub(super) fn word(&mut self, word: u64) {
        // The rotation lets high bits reach low ones, which a plain product never does.
        self.0 = ((self.0 ^ word).wrapping_mul(0x0000_0100_0000_01b3)).rotate_left(29);
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks::<8>();
        for word in words {
            self.word(u64::from_le_bytes(*word));
        }
        let mut last = [0; 8];
        last[..rest.len()].copy_from_slice(rest);
        self.word(u64::from_le_bytes(last));
        self.word(bytes.len() as u64);
    }

    pub(super) fn value(self) -> u64 {
        self.0
    }

    /// Of bytes alone.
    pub(super) fn of(bytes: &[u8]) -> u64 {
        let mut hash = Hash::new();
        hash.bytes(bytes);
        hash.value()
    }
}

/// One event.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Entry {
    pub(super) what: &'static str,
    /// The open file, or whatever number names the thing.
    pub(super) file: u64,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) result: i64,
    /// Hash of the bytes moved.
    pub(super) content: u64,
}

#[derive(Debug)]
pub(super) struct Trace {
    hash: Hash,
    events: u64,
    tail: VecDeque<String>,
    tail_max: usize,
}

impl Trace {
    pub(super) fn new(tail_max: usize) -> Trace {
        Trace { hash: Hash::new(), events: 0, tail: VecDeque::new(), tail_max }
    }

    pub(super) fn add(&mut self, now: Nanos, entry: Entry) {
        self.events += 1;
        self.hash.word(now);
        self.hash.bytes(entry.what.as_bytes());
        for word in [entry.file, entry.offset, entry.len, entry.result as u64, entry.content] {
            self.hash.word(word);
        }
        if self.tail_max > 0 {
            if self.tail.len() == self.tail_max {
                self.tail.pop_front();
            }
            let Entry { what, file, offset, len, result, content } = entry;
            self.tail.push_back(format!(
                "{now:>14} {what:<20} file {file} offset {offset} len {len} result {result} content {content:016x}"
            ));
        }
    }

    pub(super) fn hash(&self) -> u64 {
        self.hash.value()
    }

    pub(super) fn events(&self) -> u64 {
        self.events
    }

    pub(super) fn tail(&self) -> Vec<String> {
        self.tail.iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_field_counts_and_the_tail_is_bounded() {
        let base = Entry { what: "write", file: 1, offset: 2, len: 3, result: 4, content: 5 };
        let hash_of = |now, entry| {
            let mut trace = Trace::new(0);
            trace.add(now, entry);
            trace.hash()
        };
        let variants = [
            hash_of(0, base),
            hash_of(1, base),
            hash_of(0, Entry { what: "read", ..base }),
            hash_of(0, Entry { file: 2, ..base }),
            hash_of(0, Entry { offset: 3, ..base }),
            hash_of(0, Entry { len: 4, ..base }),
            hash_of(0, Entry { result: -4, ..base }),
            hash_of(0, Entry { content: 6, ..base }),
        ];
        for (i, a) in variants.iter().enumerate() {
            assert!(variants[i + 1..].iter().all(|b| a != b));
        }
        assert_ne!(Hash::of(b"a\0"), Hash::of(b"a"));
        let mut trace = Trace::new(2);
        for now in 0..5 {
            trace.add(now, base);
        }
        assert_eq!((trace.events(), trace.tail().len()), (5, 2));
    }
}
