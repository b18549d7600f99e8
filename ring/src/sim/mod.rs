//! The simulated world: the backend under which the whole engine runs in one thread, in no time, the
//! same way for the same seed.
//!
//! A [`World`] holds a virtual clock, disks, streams and a list of events to come. Rings connect to it
//! through [`World::backend`]; the test driver keeps a handle and looks at, breaks and repairs things
//! from outside. Nothing in it is a thread, a real file or a real clock.
//!
//! # Time
//! [`crate::Ring`]s move the clock by entering: one that may wait jumps to its next completion or
//! deadline, one that may not lets a seeded moment of up to [`WorldConfig::turn_nanos_max`] pass. An
//! hour of sleep takes one turn. Running tasks takes no time, but looking at the clock does.
//!
//! # Disks
//! An operation takes effect at a seeded instant between its submission and its completion, so writes
//! in flight reach the disk in any order. Contents, entries and attributes are volatile until they are
//! made durable; [`World::power_cut`] keeps what was durable and any part of the rest. What counts as
//! durable is conservative: only what had *completed* when the sync was *submitted*.
//!
//! # Repeating a history
//! Every effect, completion and control call is folded into [`World::trace_hash`]. Two runs of one seed
//! and one program have the same hash; a difference is a decision that rests on something it must not
//! rest on (an address, a hash map, a real clock).
//!
//! # After a power cut
//! The rings of before are dead (see [`SimBackend`]): shut them down or drop them, and make new ones
//! over [`World::backend`].

mod backend;
mod control;
mod disk;
mod effects;
mod faults;
mod flight;
mod fs;
mod inner;
mod latency;
mod ledger;
mod pages;
mod power;
mod stream;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_faults;
mod trace;

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;

pub use backend::SimBackend;
pub use faults::{Fault, FaultCounts, FaultRule, OpKind, OpKinds};
pub use fs::{DiscardModel, FileModel};
pub use latency::Latency;
pub use power::PowerCut;
pub use stream::StreamModel;

use self::flight::Flight;
use self::fs::Inode;
use self::inner::Inner;
use crate::Nanos;
use crate::backend::{Backend, LockRange};
use crate::errno::Errno;

/// How a world is made.
#[derive(Clone, Debug)]
pub struct WorldConfig {
    /// Decides everything that is not decided by the program that runs.
    pub seed: u64,
    /// Operations that a ring can queue before it must enter.
    pub queue_entries: usize,
    /// The most that an enter which may not wait lets pass.
    pub turn_nanos_max: Nanos,
    /// The model of files that rings create.
    pub new_file: FileModel,
    /// How streams behave.
    pub stream: StreamModel,
    /// How long offloaded calls take.
    pub offload: Latency,
    /// Memory that a ring may register, as under RLIMIT_MEMLOCK.
    pub registered_bytes_max: Option<usize>,
    /// Lines that [`World::trace_tail`] keeps; writing them costs time.
    pub trace_tail_lines: usize,
}

impl WorldConfig {
    /// A healthy world with fast disks.
    pub fn new(seed: u64) -> WorldConfig {
        WorldConfig {
            seed,
            queue_entries: crate::limits::SQ_ENTRIES as usize,
            turn_nanos_max: 2_000,
            new_file: FileModel::regular(0),
            stream: StreamModel::default(),
            offload: Latency::OFFLOAD,
            registered_bytes_max: None,
            trace_tail_lines: 0,
        }
    }
}

/// A handle of a simulated world; clones are the same world.
#[derive(Clone)]
pub struct World(Rc<RefCell<Inner>>);

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("World").field("seed", &self.seed()).field("now", &self.now()).finish_non_exhaustive()
    }
}

impl World {
    /// A world without files.
    pub fn new(config: WorldConfig) -> World {
        World(Rc::new(RefCell::new(Inner::new(config))))
    }

    /// A backend for one more ring. Files, locks and sockets of one ring are visible to all.
    pub fn backend(&self) -> Box<dyn Backend> {
        Box::new(SimBackend::new(self.clone()))
    }

    /// The seed.
    pub fn seed(&self) -> u64 {
        self.0.borrow().config.seed
    }

    /// The virtual time.
    pub fn now(&self) -> Nanos {
        self.0.borrow().now
    }

    /// Lets `span` pass without any ring entering.
    pub fn advance(&self, span: Nanos) {
        let mut inner = self.0.borrow_mut();
        let end = inner.now.saturating_add(span);
        while inner.next_event().is_some_and(|time| time <= end) {
            inner.step();
        }
        inner.now = end;
    }

    // Trace.

    /// All events so far in one number.
    pub fn trace_hash(&self) -> u64 {
        self.0.borrow().trace.hash()
    }

    /// How many events it is made of.
    pub fn events(&self) -> u64 {
        self.0.borrow().trace.events()
    }

    /// The last events, a line each, as many as [`WorldConfig::trace_tail_lines`] allows.
    pub fn trace_tail(&self) -> Vec<String> {
        self.0.borrow().trace.tail()
    }

    // Files.

    /// Adds a file or block device; its entry, its length and its zeroes are durable. A file of that
    /// name is replaced. The directories above it are added.
    pub fn add_file(&self, path: impl AsRef<Path>, model: FileModel) {
        let path = path.as_ref();
        let mut inner = self.0.borrow_mut();
        if let Some(parent) = path.parent() {
            inner.fs.add_directory(parent);
        }
        let now = inner.next();
        let number = inner.fs.create(now, path, model);
        let submitted = inner.next();
        inner.fs.settle_creation(number, submitted);
    }

    /// Adds a directory and those above it.
    pub fn add_directory(&self, path: impl AsRef<Path>) {
        self.0.borrow_mut().fs.add_directory(path.as_ref());
    }

    /// Changes what files can do that rings create from now on.
    pub fn set_new_file(&self, model: FileModel) {
        self.0.borrow_mut().fs.new_file = model;
    }

    fn with<T>(&self, path: &Path, f: impl FnOnce(&Inode) -> T) -> Option<T> {
        self.0.borrow().fs.inode(path).map(f)
    }

    fn with_mut<T>(&self, path: &Path, f: impl FnOnce(&mut Inode) -> T) -> Option<T> {
        self.0.borrow_mut().fs.inode_mut(path).map(f)
    }

    /// Changes what a file can do (its kind and length stay).
    pub fn change_model(&self, path: impl AsRef<Path>, change: impl FnOnce(&mut FileModel)) {
        self.with_mut(path.as_ref(), |inode| {
            let (kind, len) = (inode.model.kind, inode.model.len);
            change(&mut inode.model);
            (inode.model.kind, inode.model.len) = (kind, len);
        });
    }

    /// What reads would see; zeroes past the end and where there is no file.
    pub fn read_live(&self, path: impl AsRef<Path>, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.with(path.as_ref(), |inode| inode.disk.live().read(offset, &mut bytes));
        bytes
    }

    /// What is durable.
    pub fn read_durable(&self, path: impl AsRef<Path>, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.with(path.as_ref(), |inode| inode.disk.durable().read(offset, &mut bytes));
        bytes
    }

    /// Writes past the cache: live and durable at once. For preparing disks.
    pub fn write_raw(&self, path: impl AsRef<Path>, offset: u64, bytes: &[u8]) {
        self.with_mut(path.as_ref(), |inode| inode.disk.write_durable(offset, bytes));
    }

    /// The length of a file.
    pub fn len(&self, path: impl AsRef<Path>) -> Option<u64> {
        self.with(path.as_ref(), |inode| inode.disk.len())
    }

    /// The length that a power cut would leave at least the chance of: what is durable of it.
    pub fn durable_len(&self, path: impl AsRef<Path>) -> Option<u64> {
        self.with(path.as_ref(), |inode| inode.disk.durable_len())
    }

    /// Bytes allocated.
    pub fn allocated(&self, path: impl AsRef<Path>) -> Option<u64> {
        self.with(path.as_ref(), |inode| inode.disk.live().allocated_bytes())
    }

    /// There is such a file.
    pub fn exists(&self, path: impl AsRef<Path>) -> bool {
        self.with(path.as_ref(), |_| ()).is_some()
    }

    /// The paths of all files, in order.
    pub fn files(&self) -> Vec<PathBuf> {
        self.0.borrow().fs.names.live().keys().cloned().collect()
    }

    /// The entry is durable.
    pub fn exists_durably(&self, path: impl AsRef<Path>) -> bool {
        self.0.borrow().fs.names.durable().contains_key(path.as_ref())
    }

    /// An extended attribute as it is seen.
    pub fn get_attribute(&self, path: impl AsRef<Path>, name: &str) -> Option<Vec<u8>> {
        self.with(path.as_ref(), |inode| inode.attributes.live().get(name).cloned()).flatten()
    }

    /// An extended attribute as it is durable.
    pub fn get_durable_attribute(&self, path: impl AsRef<Path>, name: &str) -> Option<Vec<u8>> {
        self.with(path.as_ref(), |inode| inode.attributes.durable().get(name).cloned()).flatten()
    }

    /// Changes of a file that a power cut may still lose.
    pub fn undurable_changes(&self, path: impl AsRef<Path>) -> usize {
        self.with(path.as_ref(), |inode| inode.disk.undurable_changes()).unwrap_or(0)
    }

    /// A block device is in use elsewhere (mounted), or no longer.
    pub fn set_busy(&self, path: impl AsRef<Path>, busy: bool) {
        self.with_mut(path.as_ref(), |inode| inode.busy = busy);
    }

    /// Another process takes a shared lock on a range.
    pub fn lock_elsewhere(&self, path: impl AsRef<Path>, range: LockRange) {
        self.with_mut(path.as_ref(), |inode| inode.lock(fs::FOREIGN, range));
    }

    /// Another process gives its locks back.
    pub fn unlock_elsewhere(&self, path: impl AsRef<Path>) {
        self.with_mut(path.as_ref(), |inode| inode.unlock_all(fs::FOREIGN));
    }

    // What is under way.

    /// Operations in flight, of all rings.
    pub fn in_flight(&self) -> usize {
        self.0.borrow().flights.len()
    }

    /// Operations in flight, a line each: what a program waits for that does not go on.
    pub fn in_flight_lines(&self) -> Vec<String> {
        let inner = self.0.borrow();
        let line = |flight: &Flight| {
            let hangs = if flight.verdict.hang { ", hangs" } else { "" };
            format!("{} on {}, {} bytes moved{hangs}", flight.name(), flight.label, flight.moved)
        };
        inner.flights.values().map(line).collect()
    }

    fn writes(&self, path: &Path) -> Vec<std::ops::Range<u64>> {
        let inner = self.0.borrow();
        let number = inner.fs.find(path);
        let written = inner.flights.values().filter_map(Flight::written);
        written.filter(|(n, _)| Some(*n) == number).map(|(_, range)| range).collect()
    }

    /// Writes in flight on a file.
    pub fn writes_in_flight(&self, path: impl AsRef<Path>) -> usize {
        self.writes(path.as_ref()).len()
    }

    /// Writes in flight on a file that share bytes with another one in flight.
    pub fn in_flight_overlapping_writes(&self, path: impl AsRef<Path>) -> usize {
        let writes = self.writes(path.as_ref());
        let meets = |a: usize| {
            let a_range = &writes[a];
            let others = writes.iter().enumerate().filter(|(b, _)| *b != a);
            others.into_iter().any(|(_, b)| b.start < a_range.end && a_range.start < b.end)
        };
        (0..writes.len()).filter(|a| meets(*a)).count()
    }

    /// How many pairs of writes to a file that share bytes have been in flight together so far.
    pub fn overlapping_writes_seen(&self, path: impl AsRef<Path>) -> u64 {
        self.with(path.as_ref(), |inode| inode.overlaps).unwrap_or(0)
    }

    // Faults.

    /// Replaces all rules.
    pub fn set_faults(&self, rules: Vec<FaultRule>) {
        self.0.borrow_mut().faults.rules = rules;
    }

    /// Adds a rule.
    pub fn add_fault(&self, rule: FaultRule) {
        self.0.borrow_mut().faults.rules.push(rule);
    }

    /// Draws rules from the seed ([`FaultRule::swarm`]) for paths that begin with `path_prefix`.
    pub fn add_swarm(&self, path_prefix: &str) {
        let mut inner = self.0.borrow_mut();
        let rules = FaultRule::swarm(&mut inner.fault_rand, path_prefix);
        inner.faults.rules.extend(rules);
    }

    /// No rules, nothing hangs, no one-shot is left: the world is healthy from now on.
    pub fn heal(&self) {
        let mut inner = self.0.borrow_mut();
        inner.faults.heal();
        inner.release("");
    }

    /// The `nth` operation of `kind` on `path` from now on (1 is the next) fails with `errno`, once.
    pub fn fail_nth(&self, kind: OpKind, path: impl AsRef<Path>, nth: u64, errno: Errno) {
        let path = path.as_ref().display().to_string();
        self.0.borrow_mut().faults.fail_nth(kind, path, nth, errno);
    }

    /// One-shots that have not struck.
    pub fn one_shots_left(&self) -> usize {
        self.0.borrow().faults.one_shots_left()
    }

    /// Operations on paths that begin with `path_prefix`, submitted from now on, do not end before
    /// [`World::release`] with the same prefix.
    pub fn hang(&self, path_prefix: &str) {
        self.0.borrow_mut().faults.hang(path_prefix.to_owned());
    }

    /// Ends what hangs on paths that begin with `path_prefix`.
    pub fn release(&self, path_prefix: &str) {
        self.0.borrow_mut().release(path_prefix);
    }

    /// Resets the connections whose address begins with `prefix`; gives how many.
    pub fn reset_streams(&self, prefix: &str) -> usize {
        self.0.borrow_mut().reset_streams(prefix)
    }

    /// How often each fault has struck.
    pub fn fault_counts(&self) -> FaultCounts {
        self.0.borrow().faults.counts
    }
}
