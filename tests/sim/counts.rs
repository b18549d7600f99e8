//! How often each thing happened: a run in which something never happened has not tested it.

use std::collections::BTreeMap;

/// What every run of the whole must have met at least once.
pub const EXPECTED: &[&str] = &[
    "cancels, forced",
    "changes of the copy mode",
    "writes acknowledged while actively synced",
    "cancels, forced, with guests' overlapping writes in flight",
    "cancels, soft",
    "cancels, soft, with guests' overlapping writes in flight",
    "connections made again",
    "clients that came in the middle",
    "clients that came while the door was shut",
    "completes asked for",
    "completes asked for with guests' overlapping writes in flight",
    "delays",
    "device: agains",
    "device: errors",
    "device: hangs",
    "device: no space",
    "device: shorts",
    "device: torn writes of power cuts",
    "dismissals",
    "drains that timed out",
    "endings: cancelled",
    "endings: completed",
    "endings: failed",
    "faults of source: flush",
    "faults of source: read",
    "faults of source: write",
    "faults of source: zeroes",
    "faults of target: flush",
    "faults of target: read",
    "faults of target: write",
    "faults of target: zeroes",
    "finalizes",
    "guests: discards",
    "guests: durable writes",
    "guests: flushes",
    "guests: reads",
    "guests: requests over NBD",
    "guests: requests that waited at the door",
    "guests: writes",
    "guests: zeroes",
    "jobs",
    "pauses",
    "pauses in ready",
    "pending",
    "pivots",
    "pivots back",
    "power cuts",
    "power cuts looked at",
    "power cuts with an unfinished target",
    "quits",
    "ready",
    "ready with guests' overlapping writes in flight",
    "requests lost with a connection",
    "resumes",
    "streams: half closes",
    "streams: resets",
    "speed changes",
    "stops by an error",
    "targets over NBD",
    "verbs in a job's last moments",
    "verifications",
];

/// Counters by name.
#[derive(Clone, Debug, Default)]
pub struct Counts(BTreeMap<&'static str, u64>);

impl Counts {
    /// It happened.
    pub fn add(&mut self, what: &'static str) {
        self.add_many(what, 1);
    }

    /// It happened so many times.
    pub fn add_many(&mut self, what: &'static str, n: u64) {
        if n > 0 {
            *self.0.entry(what).or_default() += n;
        }
    }

    /// Both runs together.
    pub fn merge(&mut self, other: &Counts) {
        for (what, n) in &other.0 {
            self.add_many(what, *n);
        }
    }

    /// How often.
    pub fn get(&self, what: &'static str) -> u64 {
        self.0.get(what).copied().unwrap_or(0)
    }

    /// What should have happened and never did.
    pub fn missing(&self) -> Vec<&'static str> {
        EXPECTED.iter().filter(|what| self.get(what) == 0).copied().collect()
    }

    /// All of it in one number.
    pub fn hash(&self) -> u64 {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        for (what, n) in &self.0 {
            for byte in what.bytes().chain(n.to_le_bytes()) {
                hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
            }
        }
        hash
    }
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|(what, n)| writeln!(f, "{n:>10}  {what}"))
    }
}
