//! Nodes: disks and layers in use, who uses them, and how that is stopped for a moment.
//!
//! A [`Node`] is a disk or layer with its driver, its filters, and the requests of clients in flight on it. Whoever uses it
//! holds a [`Child`]: clients by a root (`graph::node`), jobs, and whatever is built on it. Jobs read and write nodes
//! directly, below the filters.
//!
//! # Drain
//! [`Node::drain`] stops requests at the door of every root on the node and waits, up to a deadline, until those inside
//! have ended. What it gives back keeps the door shut; dropping it opens the door, and the requests that parked look again
//! where their root points. A drain that fails changes nothing. New requests park whether their client was there before or
//! connects meanwhile: there is one door.
//!
//! # Chains
//! What lies below a node is told by its driver alone: an image holds a [`Child`] of its backing file's node. Jobs use
//! layers, and two that do not go together are told apart there. A layer that is used by those above it keeps its locks as
//! long as they are used.

use std::cell::{Cell, OnceCell, RefCell};
use std::rc::{Rc, Weak};

use blockferry_ring::sync::{Either, Notify, either};
use blockferry_ring::{Errno, Nanos, Ring};

use super::child::Child;
use super::conflict;
use super::filter::{Below, Filter, Mutation};
use super::load::Load;
use super::{BlockError, CopyFrom, Driver, Extent, IoResult, Operation, Permissions, Role};
use crate::base::range::ByteRange;

thread_local! {
    /// Nodes that were made. For their names only: nothing is decided by it.
    static NUMBERS: Cell<u64> = const { Cell::new(0) };
}

/// A disk or a layer in use.
pub struct Node {
    /// The name that it was given.
    given: OnceCell<String>,
    /// Which of all nodes of this thread it is.
    number: u64,
    ring: Ring,
    driver: Rc<dyn Driver>,
    filters: RefCell<Rc<[Rc<dyn Filter>]>>,
    /// Guest requests inside.
    in_flight: Cell<u32>,
    /// Drains that keep the door shut.
    drains: Cell<u32>,
    /// Told when a request ends or the door opens.
    changed: Notify,
    /// Who uses it.
    edges: RefCell<Vec<Weak<Child>>>,
    /// What its driver holds.
    held: Cell<Permissions>,
    access: Access,
    /// The chain below is being changed.
    relinking: Cell<bool>,
    load: Load,
    /// Those who hear of guests' reads. A read in progress of being told goes on with the list as it was.
    readers_told: RefCell<Rc<[ReadTold]>>,
}

/// Who needs a layer to be writable that was opened to be read.
#[derive(Debug, Default)]
struct Access {
    holders: Cell<u32>,
    /// It was opened to be read only, and will be so again.
    reopened: Cell<bool>,
    /// One at a time changes it.
    busy: Cell<bool>,
}

/// Is told of a range that a guest reads.
pub type ReadTold = Rc<dyn Fn(ByteRange)>;

/// Somebody hears of what guests read; no longer when this is dropped.
pub struct Hearing {
    node: Rc<Node>,
    told: ReadTold,
}

impl std::fmt::Debug for Hearing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hearing").field("node", &self.node.name()).finish_non_exhaustive()
    }
}

impl Drop for Hearing {
    fn drop(&mut self) {
        let mut all = self.node.readers_told.borrow_mut();
        *all = all.iter().filter(|told| !Rc::ptr_eq(told, &self.told)).cloned().collect();
    }
}

/// Nobody else does the same meanwhile.
#[derive(Debug)]
pub struct Alone<'a> {
    busy: &'a Cell<bool>,
    changed: &'a Notify,
}

impl<'a> Alone<'a> {
    async fn enter(busy: &'a Cell<bool>, changed: &'a Notify) -> Alone<'a> {
        changed.until(|| (!busy.replace(true)).then_some(())).await;
        Alone { busy, changed }
    }
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        self.busy.set(false);
        self.changed.notify();
    }
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node")
            .field("name", &self.name())
            .field("driver", &self.driver.kind())
            .field("in_flight", &self.in_flight.get())
            .field("drains", &self.drains.get())
            .finish_non_exhaustive()
    }
}

/// A node whose door is shut. Dropping it opens the door again.
#[derive(Debug)]
pub struct Drained {
    node: Rc<Node>,
}

impl Drop for Drained {
    fn drop(&mut self) {
        self.node.drains.set(self.node.drains.get() - 1);
        self.node.changed.notify();
    }
}

impl Node {
    /// A node on `driver`, called so.
    pub fn new(ring: &Ring, name: impl Into<String>, driver: Rc<dyn Driver>) -> Rc<Node> {
        Node::of(ring, driver).called(name)
    }

    /// A node on `driver`, called as that is until it is given a name.
    pub fn of(ring: &Ring, driver: Rc<dyn Driver>) -> Rc<Node> {
        Rc::new(Node {
            given: OnceCell::new(),
            number: NUMBERS.replace(NUMBERS.get() + 1),
            ring: ring.clone(),
            driver,
            filters: RefCell::new(Rc::from([])),
            in_flight: Cell::new(0),
            drains: Cell::new(0),
            changed: ring.notify(),
            edges: RefCell::default(),
            held: Cell::new(Permissions::NONE),
            access: Access::default(),
            relinking: Cell::new(false),
            load: Load::default(),
            readers_told: RefCell::new(Rc::from([])),
        })
    }

    /// Its name in the graph.
    pub fn name(&self) -> &str {
        self.given.get().map_or_else(|| self.driver.name(), String::as_str)
    }

    /// A name that no other node of this thread has: the one that it was given, or one that was made for it.
    pub fn unique_name(&self) -> String {
        self.given.get().cloned().unwrap_or_else(|| format!("#node{}", self.number))
    }

    /// Gives it a name, once: a second one changes nothing.
    #[must_use]
    pub fn called(self: Rc<Node>, name: impl Into<String>) -> Rc<Node> {
        let _ = self.given.set(name.into());
        self
    }

    /// The reactor that it lives on.
    pub fn ring(&self) -> &Ring {
        &self.ring
    }

    /// Its driver: what jobs read and write.
    pub fn driver(&self) -> &Rc<dyn Driver> {
        &self.driver
    }

    /// Guest requests inside.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.get()
    }

    /// Whether the door is shut.
    pub fn is_drained(&self) -> bool {
        self.drains.get() > 0
    }

    /// How long its guests wait.
    pub fn load(&self) -> &Load {
        &self.load
    }

    /// Filters on it.
    pub fn filter_count(&self) -> usize {
        self.filters.borrow().len()
    }

    pub(super) fn edges(&self) -> &RefCell<Vec<Weak<Child>>> {
        &self.edges
    }

    /// Those who use it, in the order in which they came.
    pub fn users(&self) -> Vec<Rc<Child>> {
        self.edges.borrow().iter().filter_map(Weak::upgrade).collect()
    }

    /// Clients that it serves: those who would go along in a pivot.
    pub fn client_count(&self) -> usize {
        self.users().iter().filter(|user| user.follows()).count()
    }

    /// Registers a use. Refused when another use of this node, or another program, does not allow it.
    pub fn attach(self: &Rc<Node>, role: Role) -> Result<Rc<Child>, BlockError> {
        Child::attach(self, role, false, Weak::new())
    }

    /// The use of a client, who goes along in a pivot.
    pub fn attach_client(self: &Rc<Node>, role: Role) -> Result<Rc<Child>, BlockError> {
        Child::attach(self, role, true, Weak::new())
    }

    /// The same as [`Node::attach`]; where a lock of somebody who was killed stands in the way, that is waited for.
    pub async fn attach_in_time(self: &Rc<Node>, role: Role) -> Result<Rc<Child>, BlockError> {
        conflict::in_time(&self.ring, || self.attach(role)).await
    }

    /// The same for a job that works on the chain below `disk`, in which this node lies, and sees to it that `disk` shows
    /// the same all the while: the layers above in that chain agree with whatever it does. Others over this node do not.
    pub async fn attach_in_chain(
        self: &Rc<Node>,
        role: Role,
        disk: &Rc<Node>,
    ) -> Result<Rc<Child>, BlockError> {
        let attach = || Child::attach(self, role, false, Rc::downgrade(disk));
        conflict::in_time(&self.ring, attach).await
    }

    /// Waits until no job uses it, or has yet to give back that it may be written. Operations that a job has left behind
    /// at its end are uses, too.
    pub async fn until_free_of_jobs(&self) {
        let is_held = || self.access.holders.get() > 0 || self.access.busy.get();
        let is_used = || is_held() || self.users().iter().any(|user| user.role().job().is_some());
        self.changed.until(|| (!is_used()).then_some(())).await;
    }

    /// Whether all others agree with this use, which may be among them.
    pub(super) fn check(&self, own: &Child) -> IoResult {
        let users = self.users();
        let refused = users.iter().find(|user| !std::ptr::eq(&***user, own) && !own.agrees_with(user));
        refused.map_or(Ok(()), |other| Err(own.conflict_with(other, self)))
    }

    /// Has the driver hold what all users need together, down to the files. On an error nothing has changed.
    pub(super) fn apply_permissions(&self) -> IoResult {
        let all = self.users().iter().fold(Permissions::NONE, |sum, user| sum.and(user.permissions()));
        self.driver.set_permissions(all)?;
        self.held.set(all);
        Ok(())
    }

    /// A use has ended, or goes elsewhere. False: it had never begun.
    pub(super) fn forget(&self, user: &Child) -> bool {
        let mut edges = self.edges.borrow_mut();
        let before = edges.len();
        edges.retain(|edge| !std::ptr::eq(edge.as_ptr(), user));
        edges.len() < before
    }

    /// Less is needed than before.
    pub(super) fn give_back(&self) {
        if let Err(error) = self.apply_permissions() {
            // Giving permissions up takes no new locks; only a dying file could refuse it.
            tracing::warn!(%error, "locks could not be given back");
        }
        self.changed.notify();
    }

    // Chains.

    /// The layer below.
    pub fn below(&self) -> Option<Rc<Node>> {
        Some(self.driver.as_layer()?.backing()?.node())
    }

    /// This node and the layers below it, from above.
    pub fn chain(self: &Rc<Node>) -> Vec<Rc<Node>> {
        std::iter::successors(Some(self.clone()), |node| node.below()).collect()
    }

    /// Another layer lies below from now on, or none; it shows the same bytes where this one holds nothing. What cannot
    /// have one stays as it is. On an error nothing has changed.
    pub fn set_below(&self, below: Option<&Rc<Node>>) -> IoResult {
        self.driver.as_layer().map_or(Ok(()), |layer| layer.set_backing(below))
    }

    /// Waits for whoever changes the chain below this node, and keeps others from it.
    pub async fn relinking(&self) -> Alone<'_> {
        Alone::enter(&self.relinking, &self.changed).await
    }

    /// Sees to it that the driver can be written, until [`Node::release_writable`]. Whoever calls has a use that writes.
    pub async fn hold_writable(&self) -> IoResult {
        let _alone = Alone::enter(&self.access.busy, &self.changed).await;
        if self.driver.is_read_only() {
            self.reopen(false).await?;
        }
        self.access.holders.set(self.access.holders.get() + 1);
        Ok(())
    }

    /// The last who needed it so restores how the driver was open. What was written is written out, tables of images too.
    pub async fn release_writable(&self) {
        let _alone = Alone::enter(&self.access.busy, &self.changed).await;
        let access = &self.access;
        access.holders.set(access.holders.get() - 1);
        if access.holders.get() > 0 {
            return;
        }
        if access.reopened.get() {
            if let Err(error) = self.reopen(true).await {
                tracing::warn!(%error, "a layer stays open to be written");
            }
        } else if let Err(error) = self.driver.flush().await {
            tracing::warn!(%error, "a layer may lack what a job has written to it last");
        }
    }

    /// It stays writable when the last who needed it so lets go: a guest writes it from now on.
    pub fn stay_writable(&self) {
        self.access.reopened.set(false);
    }

    /// Extents that follow each other, by the cheapest way that the driver has; at least one.
    pub async fn extents_of(
        &self,
        offset: u64,
        len: u64,
        extents_max: usize,
        out: &mut Vec<Extent>,
    ) -> IoResult {
        if let Some(found) = self.driver.extents(offset, len, extents_max, out) {
            return found.await;
        }
        out.push(self.driver.block_status(offset, len).await?);
        Ok(())
    }

    /// Copies a range by the means of the kernel, or says that there is none (`EOPNOTSUPP`).
    pub async fn copy_range_or_refuse(&self, from: CopyFrom, offset: u64) -> IoResult {
        let len = from.len;
        match self.driver.copy_range(from, offset) {
            Some(copied) => copied.await,
            None => Err(BlockError::at(Operation::Write, self.driver.name(), offset, len, Errno::EOPNOTSUPP)),
        }
    }

    /// Has the driver go over to reading only, or to writing too.
    pub async fn reopen_driver(&self, read_only: bool) -> IoResult {
        match self.driver.reopen(read_only) {
            Some(reopening) => reopening.await,
            None => Err(BlockError::new(Operation::Open, self.driver.name(), Errno::EROFS).because(
                "It was opened to be read only, and cannot be opened otherwise while it is in use.",
            )),
        }
    }

    async fn reopen(&self, read_only: bool) -> IoResult {
        self.reopen_driver(read_only).await?;
        // What has to be locked depends on the access.
        if let Err(error) = self.driver.set_permissions(self.held.get()) {
            if let Some(reopening) = self.driver.reopen(!read_only)
                && let Err(error) = reopening.await
            {
                tracing::warn!(%error, "the access to a layer could not be changed back");
            }
            return Err(error);
        }
        self.access.reopened.set(!read_only);
        Ok(())
    }

    /// `told` hears of every range that a guest has read, beside others who do, until what this gives is dropped.
    pub fn tell_reads(self: &Rc<Node>, told: ReadTold) -> Hearing {
        let mut all = self.readers_told.borrow_mut();
        *all = all.iter().cloned().chain([told.clone()]).collect();
        Hearing { node: self.clone(), told }
    }

    /// Tells who wants to know that a client reads this.
    pub fn was_read(&self, offset: u64, len: u64) {
        let all = self.readers_told.borrow().clone();
        for told in all.iter() {
            told(ByteRange::at_saturating(offset, len));
        }
    }

    /// Puts a filter on top of the others. Only in a drain: a request that is inside would miss it.
    pub fn add_filter(&self, filter: Rc<dyn Filter>, _drained: &Drained) {
        let mut filters = self.filters.borrow_mut();
        *filters = std::iter::once(filter).chain(filters.iter().cloned()).collect();
    }

    /// Removes a filter. Requests that are inside finish with it.
    pub fn remove_filter(&self, filter: &Rc<dyn Filter>) {
        let mut filters = self.filters.borrow_mut();
        *filters = filters.iter().filter(|f| !Rc::ptr_eq(f, filter)).cloned().collect();
    }

    /// Shuts the door and waits until nobody is inside, for at most `span`.
    pub async fn drain(self: &Rc<Node>, span: Nanos) -> Result<Drained, Errno> {
        let drained = self.shut();
        let empty = self.changed.until(|| (self.in_flight.get() == 0).then_some(()));
        match either(empty, self.ring.sleep(span)).await {
            Either::First(()) => Ok(drained),
            Either::Second(()) => Err(Errno::ETIMEDOUT),
        }
    }

    /// Shuts the door without waiting for those inside.
    pub fn shut(self: &Rc<Node>) -> Drained {
        self.drains.set(self.drains.get() + 1);
        Drained { node: self.clone() }
    }

    /// Lets every client of this node use `target` instead, in the place of `instead_of`, which gives it up. Both are
    /// drained, or nobody uses the target. A refusal changes nothing.
    pub fn pivot_to(self: &Rc<Node>, target: &Rc<Node>, instead_of: &Child, _drained: &Drained) -> IoResult {
        let moving: Vec<_> = self.users().into_iter().filter(|user| user.follows()).collect();
        let role = instead_of.set_role(Role::Leaving);
        let moved = moving.iter().try_for_each(|user| target.check(user)).and_then(|()| {
            target.edges.borrow_mut().extend(moving.iter().map(Rc::downgrade));
            target.apply_permissions()
        });
        if let Err(error) = moved {
            for user in &moving {
                target.forget(user);
            }
            instead_of.set_role(role);
            return Err(error);
        }
        for user in &moving {
            user.set_node(target);
            self.forget(user);
        }
        self.give_back();
        Ok(())
    }

    pub(super) async fn driver_mutate(&self, mutation: Mutation) -> IoResult {
        match mutation {
            Mutation::Write { offset, buf, flags } => self.driver.write(offset, buf, flags).await,
            Mutation::Zeroes { offset, len, flags } => self.driver.write_zeroes(offset, len, flags).await,
            Mutation::Discard { offset, len } => self.driver.discard(offset, len).await,
        }
    }

    /// Passes a client's change through the filters.
    pub async fn mutate(&self, mutation: Mutation) -> IoResult {
        let filters = self.filters.borrow().clone();
        if filters.is_empty() {
            return self.driver_mutate(mutation).await;
        }
        Below { node: self, filters, level: 0 }.mutate(mutation).await
    }

    /// A client's request comes inside; if the door is shut it has the node back.
    pub fn enter(self: Rc<Node>, even_if_shut: bool) -> Result<Inside, Rc<Node>> {
        if self.is_drained() && !even_if_shut {
            return Err(self);
        }
        self.in_flight.set(self.in_flight.get() + 1);
        Ok(Inside { node: self, came: None })
    }

    /// Waits until the door is open.
    pub async fn until_open(&self) {
        self.changed.until(|| (!self.is_drained()).then_some(())).await;
    }
}

/// One request inside a node.
#[derive(Debug)]
pub struct Inside {
    node: Rc<Node>,
    /// When it came to the door; `None` for what tells nothing of the disk.
    came: Option<Nanos>,
}

impl Inside {
    /// How long it takes, from `came` on, is counted as what clients wait.
    pub fn counted_from(mut self, came: Nanos) -> Inside {
        self.came = Some(came);
        self
    }

    /// Where it is.
    pub fn node(&self) -> &Rc<Node> {
        &self.node
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        if let Some(came) = self.came {
            self.node.load.ended(came, self.node.ring.clock());
        }
        self.node.in_flight.set(self.node.in_flight.get() - 1);
        // Only a drain waits for requests to end.
        if self.node.drains.get() > 0 {
            self.node.changed.notify();
        }
    }
}

impl std::ops::Deref for Node {
    type Target = dyn Driver;

    /// The driver: what is below the filters.
    fn deref(&self) -> &(dyn Driver + 'static) {
        &*self.driver
    }
}
