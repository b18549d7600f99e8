//! One life of a simulated machine: a world, a ring, the disk that guests use, and what is known about it.
//!
//! Tasks of one life share a [`Rig`]. Requests of guests are granted by whoever directs the life
//! ([`Rig::grant`]), so that a seed has a bounded amount of work however long its virtual time is.
//!
//! Nothing in here panics when the engine does something wrong: it is written down ([`Rig::fail`]), and the
//! life ends at the next turn.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::Rc;
use std::sync::OnceLock;

use blockferry::base::rng::Rng;
use blockferry::export::nbd::NbdServer;
use blockferry::graph::node::{Features, Root};
use blockferry::job::mirror::verify::Verifier;
use blockferry::job::runner::Job;
use blockferry_ring::sim::World;
use blockferry_ring::sync::{Either, Notify, either};
use blockferry_ring::{Nanos, Ring};

use super::disk::Disk;
use super::model::Model;
use super::nbd::Lost;
use super::plan::Plan;
use crate::counts::Counts;

/// The images of a job's disks at one instant.
pub struct Images {
    pub source: Vec<u8>,
    pub target: Vec<u8>,
}

/// What has to be known of a job to judge its target at any time.
pub struct Venture {
    pub job: Option<Job>,
    pub source: Disk,
    pub target: Disk,
    /// What was on the target before, durably.
    pub target_before: Vec<u8>,
    /// The model's time at the start.
    pub since: u64,
    /// Everything is copied, not only what changes.
    pub whole: bool,
    /// What the target held when its mark was last about to go, and the model's time then.
    pub settled: Option<(Vec<u8>, u64)>,
    /// Somebody told it to complete.
    pub asked_complete: bool,
    /// Somebody told it to end otherwise.
    pub asked_end: bool,
    pub pivoted: bool,
    pub verifier: Option<Rc<Verifier>>,
}

/// Somebody looks at one seed.
pub fn is_watched() -> bool {
    static WATCHED: OnceLock<bool> = OnceLock::new();
    *WATCHED.get_or_init(|| std::env::var_os("BLOCKFERRY_SEED").is_some())
}

/// See the module's documentation.
pub struct Rig {
    pub plan: Plan,
    pub world: World,
    pub ring: Ring,
    pub model: RefCell<Model>,
    pub counts: RefCell<Counts>,
    pub root: RefCell<Option<Root>>,
    /// A second root of the same disk.
    pub second_root: RefCell<Option<Root>>,
    /// What its clients were promised.
    pub features: Cell<Option<Features>>,
    /// The disk that the root points to.
    pub current: RefCell<Disk>,
    /// The disk that it pointed to before, or was copied to.
    pub other: RefCell<Option<Disk>>,
    pub venture: RefCell<Option<Venture>>,
    /// A disk that guests were moved away from, and what it held then.
    pub retired: RefCell<Option<(Disk, Vec<u8>)>>,
    pub servers: RefCell<Vec<NbdServer>>,
    /// Writes whose answers were lost with a connection.
    pub lost: Lost,
    pub failure: RefCell<Option<String>>,
    rng: RefCell<Rng>,
    /// A disk hung for a while: what waited for it may have failed.
    pub has_hung: Cell<bool>,
    /// Requests that guests may still make.
    granted: Cell<u64>,
    stopped: Cell<bool>,
    /// Told at a grant and at the stop.
    pub go: Notify,
    /// Told when a door is known to be shut.
    pub shut: Notify,
    /// Tasks of guests that have not ended.
    pub guests: Cell<u64>,
    /// Guests' requests that have ended.
    pub answered: Cell<u64>,
    /// Faults are over: users help jobs along.
    pub rescued: Cell<bool>,
    pub done: Cell<bool>,
}

impl Rig {
    /// A life on `world`. The current disk is there.
    pub fn new(plan: Plan, world: World, ring: Ring, model: Model, current: Disk, rng: Rng) -> Rc<Rig> {
        Rc::new(Rig {
            plan,
            world,
            model: RefCell::new(model),
            counts: RefCell::default(),
            root: RefCell::default(),
            second_root: RefCell::default(),
            features: Cell::default(),
            current: RefCell::new(current),
            other: RefCell::default(),
            venture: RefCell::default(),
            retired: RefCell::default(),
            servers: RefCell::default(),
            lost: Lost::default(),
            failure: RefCell::default(),
            rng: RefCell::new(rng),
            has_hung: Cell::new(false),
            granted: Cell::new(0),
            stopped: Cell::new(false),
            go: ring.notify(),
            shut: ring.notify(),
            ring,
            guests: Cell::new(0),
            answered: Cell::new(0),
            rescued: Cell::new(false),
            done: Cell::new(false),
        })
    }

    /// A generator of one task's own.
    pub fn fork_rng(&self) -> Rng {
        self.rng.borrow_mut().fork()
    }

    /// Something went wrong; the first thing counts.
    pub fn fail(&self, what: impl Into<String>) {
        let mut failure = self.failure.borrow_mut();
        if failure.is_none() {
            let now = self.world.now();
            *failure = Some(format!("at {now} ns of virtual time: {}", what.into()));
        }
    }

    /// Tells whoever looks at one seed.
    pub fn say(&self, what: impl FnOnce() -> String) {
        if is_watched() {
            println!("{:>14} {}", self.world.now(), what());
        }
    }

    /// It happened.
    pub fn count(&self, what: &'static str) {
        self.counts.borrow_mut().add(what);
    }

    /// Counts a moment, and whether guests' writes to the source overlap in it.
    pub fn count_moment(&self, what: &'static str, with_overlaps: &'static str) {
        self.count(what);
        let path = self.current.borrow().path.clone();
        if self.world.in_flight_overlapping_writes(&*path) > 0 {
            self.count(with_overlaps);
        }
    }

    /// The roots that guests use.
    pub fn roots(&self) -> Vec<Root> {
        let (first, second) = (self.root.borrow(), self.second_root.borrow());
        first.iter().chain(second.iter()).cloned().collect()
    }

    /// The last job moved the guests to its target.
    pub fn pivoted(&self) -> bool {
        self.venture.borrow().as_ref().is_some_and(|venture| venture.pivoted)
    }

    /// Guests have to bear errors, because the plan has some.
    pub fn guests_may_fail(&self) -> bool {
        !self.plan.faults.is_empty()
            || !self.plan.target_stream.is_empty()
            || self.plan.jobs.iter().any(|job| job.target_room.is_some())
    }

    /// The disk's length as guests see it.
    pub fn len(&self) -> usize {
        self.plan.len as usize
    }

    /// What reads of a file would see, as much as guests see of a disk.
    pub fn live(&self, disk: &Disk) -> Vec<u8> {
        self.world.read_live(&*disk.path, 0, self.len())
    }

    /// What is durable of it.
    pub fn durable(&self, disk: &Disk) -> Vec<u8> {
        self.world.read_durable(&*disk.path, 0, self.len())
    }

    /// Lets the guests make so many requests more.
    pub fn grant(&self, requests: u64) {
        self.granted.set(self.granted.get() + requests);
        self.go.notify();
    }

    /// Guests end.
    pub fn stop(&self) {
        self.stopped.set(true);
        self.go.notify();
        self.shut.notify();
    }

    /// Guests have been told to end.
    pub fn is_stopped(&self) -> bool {
        self.stopped.get()
    }

    /// Waits until one more request may be made; false: end.
    pub async fn take_grant(&self) -> bool {
        self.go
            .until(|| {
                if self.stopped.get() {
                    return Some(false);
                }
                let left = self.granted.get().checked_sub(1)?;
                self.granted.set(left);
                Some(true)
            })
            .await
    }

    /// The future's value, if it comes within `span`.
    pub async fn within<T>(&self, span: Nanos, future: impl Future<Output = T>) -> Option<T> {
        match either(future, self.ring.sleep(span)).await {
            Either::First(value) => Some(value),
            Either::Second(()) => None,
        }
    }
}
