//! Nodes and roots: who may use a disk, and how its use is stopped for a moment.
//!
//! A [`Node`] is a disk or layer with its driver, its filters, and the requests in flight on it. A user
//! (an export, an embedder) holds a [`Root`], which points to a node; a pivot lets it point to another
//! one while the user's clients go on. Jobs read and write nodes directly, below the filters.
//!
//! # Drain
//! [`Node::drain`] stops requests at the door of every root on the node and waits, up to a deadline,
//! until those inside have ended. What it gives back keeps the door shut; dropping it opens the door,
//! and the requests that parked look again where their root points. A drain that fails changes nothing.
//! New requests park whether their client was there before or connects meanwhile: there is one door.
//!
//! # Chains
//! Each layer of a chain is a node, too ([`Node::below`]): jobs use layers, and two that do not go together are told
//! apart there. A layer that is used by those above it keeps its locks as long as they are used.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};

use blockferry_ring::sync::{Either, Notify, either};
use blockferry_ring::{Buf, Errno, Nanos, Ring, SharedBuf};

use super::load::Load;
use crate::base::planted::{Bug, is_planted};
use crate::base::range::ByteRange;
use crate::block::{
    BlockError, Driver, Extent, IoFuture, IoResult, Operation, Permissions, Resolved, WriteFlags, ZeroFlags,
};
use crate::protocol::lock;

/// A request that changes the disk.
#[derive(Clone, Debug)]
pub enum Mutation {
    /// Write all of the buffer.
    Write {
        /// Where.
        offset: u64,
        /// What.
        buf: SharedBuf,
        /// How.
        flags: WriteFlags,
    },
    /// Make a range read as zeroes.
    Zeroes {
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
        /// How.
        flags: ZeroFlags,
    },
    /// Give space back.
    Discard {
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
    },
}

impl Mutation {
    /// The bytes that it is about.
    pub fn range(&self) -> ByteRange {
        let (offset, len) = match self {
            Mutation::Write { offset, buf, .. } => (*offset, buf.len() as u64),
            Mutation::Zeroes { offset, len, .. } | Mutation::Discard { offset, len } => (*offset, *len),
        };
        ByteRange::at_saturating(offset, len)
    }
}

/// Sits between the guests of a node and its driver.
pub trait Filter: std::fmt::Debug {
    /// Passes a guest's change on to `below` and does its own part.
    fn mutate<'a>(&'a self, below: Below<'a>, mutation: Mutation) -> IoFuture<'a, IoResult>;
}

/// What is below a filter: further filters, then the driver.
#[derive(Debug)]
pub struct Below<'a> {
    node: &'a Node,
    filters: Rc<[Rc<dyn Filter>]>,
    level: usize,
}

impl<'a> Below<'a> {
    /// The driver at the bottom.
    pub fn driver(&self) -> &'a Rc<dyn Driver> {
        &self.node.driver
    }

    /// Passes a change on.
    pub async fn mutate(self, mutation: Mutation) -> IoResult {
        let Below { node, filters, level } = self;
        match filters.clone().get(level) {
            Some(filter) => filter.mutate(Below { node, filters, level: level + 1 }, mutation).await,
            None => node.driver_mutate(mutation).await,
        }
    }
}

/// A disk or a layer in use.
pub struct Node {
    name: String,
    ring: Ring,
    driver: Rc<dyn Driver>,
    filters: RefCell<Rc<[Rc<dyn Filter>]>>,
    /// Guest requests inside.
    in_flight: Cell<u32>,
    /// Drains that keep the door shut.
    drains: Cell<u32>,
    /// Told when a request ends or the door opens.
    changed: Notify,
    roots: RefCell<Vec<Weak<RootInner>>>,
    users: RefCell<Vec<(u64, UseKind)>>,
    user_next: Cell<u64>,
    /// What its driver holds.
    held: Cell<Permissions>,
    /// The layer below.
    below: RefCell<Option<Rc<Node>>>,
    /// It counts as a user of that.
    uses_below: Cell<bool>,
    /// Layers above that are in use.
    used_above: Cell<u32>,
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
        f.debug_struct("Hearing").field("node", &self.node.name).finish_non_exhaustive()
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
            .field("name", &self.name)
            .field("driver", &self.driver.kind())
            .field("in_flight", &self.in_flight.get())
            .field("drains", &self.drains.get())
            .finish_non_exhaustive()
    }
}

/// Who uses a node. Decides what else may use it in this program, and which locks keep others out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UseKind {
    /// A root that only reads.
    Reader,
    /// A root that writes. Several may: they see each other's writes.
    Guest,
    /// The source of a job of this type.
    JobSource(&'static str),
    /// The target of a job of this type: nobody else may use it.
    JobTarget(&'static str),
    /// A layer whose data a job of this type moves down: by itself it will make no sense any more.
    JobLayer(&'static str),
    /// The layer that a job of this type writes into below others, which hide the changes.
    JobBase(&'static str),
    /// The layer that a job of this type fills with what it reads from below.
    JobTop(&'static str),
    /// The image is changed without a change of what it shows: it gets another backing file.
    Editor,
    /// It is promised to a job that will read it, and stays as it is until that has begun.
    PromisedSource,
    /// It is promised to a job that will write it: nobody else may have it until that has begun.
    PromisedTarget,
}

impl UseKind {
    fn permissions(self) -> Permissions {
        match self {
            UseKind::Reader => Permissions::READER,
            UseKind::Guest => Permissions::USER,
            UseKind::JobSource(_) | UseKind::PromisedSource => Permissions::STABLE_READER,
            UseKind::JobTarget(_) | UseKind::PromisedTarget => Permissions::JOB_TARGET,
            UseKind::JobLayer(_) => Permissions::JOB_LAYER,
            UseKind::JobBase(_) => Permissions::JOB_BASE,
            UseKind::JobTop(_) | UseKind::Editor => Permissions::JOB_TOP,
        }
    }

    fn job(self) -> Option<&'static str> {
        match self {
            UseKind::JobSource(job)
            | UseKind::JobTarget(job)
            | UseKind::JobLayer(job)
            | UseKind::JobBase(job)
            | UseKind::JobTop(job) => Some(job),
            UseKind::Reader
            | UseKind::Guest
            | UseKind::Editor
            | UseKind::PromisedSource
            | UseKind::PromisedTarget => None,
        }
    }

    /// Whether the two may use one node at the same time.
    fn agrees_with(self, other: UseKind) -> bool {
        self.allows(other) && other.allows(self)
    }

    fn allows(self, other: UseKind) -> bool {
        match self {
            UseKind::Reader | UseKind::Guest | UseKind::Editor | UseKind::PromisedSource => true,
            UseKind::JobSource(_) | UseKind::JobTop(_) => other.job().is_none(),
            UseKind::JobBase(_) => matches!(other, UseKind::Reader | UseKind::Editor),
            UseKind::JobLayer(_) => other == UseKind::Editor,
            UseKind::JobTarget(_) => other == UseKind::PromisedTarget,
            UseKind::PromisedTarget => matches!(other, UseKind::JobTarget(_)),
        }
    }

    /// Whether a layer may be used so while it is the backing file of one that is in use.
    fn allows_overlays(self) -> bool {
        !matches!(self, UseKind::Guest | UseKind::JobTarget(_) | UseKind::PromisedTarget)
    }
}

/// One use of a node; dropping it ends the use.
#[derive(Debug)]
pub struct Use {
    node: Rc<Node>,
    id: u64,
}

impl Use {
    /// The node.
    pub fn node(&self) -> &Rc<Node> {
        &self.node
    }

    /// Turns it into another kind of use in one step: the locks that stay are never given up between.
    pub fn change(&self, kind: UseKind) -> IoResult {
        self.node.check_use(kind, Some(self.id))?;
        let set = |kind| {
            let mut old = kind;
            for (id, k) in self.node.users.borrow_mut().iter_mut().filter(|(id, _)| *id == self.id) {
                debug_assert_eq!(*id, self.id);
                old = std::mem::replace(k, kind);
            }
            old
        };
        let old = set(kind);
        self.node.apply_permissions().inspect_err(|_| {
            set(old);
        })
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        self.node.users.borrow_mut().retain(|(id, _)| *id != self.id);
        if let Err(error) = self.node.apply_permissions() {
            // Giving permissions up takes no new locks; only a dying file could refuse it.
            tracing::warn!(%error, "locks could not be given back");
        }
        self.node.changed.notify();
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
    /// A node on `driver`.
    pub fn new(ring: &Ring, name: impl Into<String>, driver: Rc<dyn Driver>) -> Rc<Node> {
        let backing = driver.as_layer().and_then(|layer| layer.backing());
        let below = backing.map(|driver| Node::new(ring, driver.name().to_owned(), driver));
        Rc::new(Node {
            name: name.into(),
            ring: ring.clone(),
            driver,
            filters: RefCell::new(Rc::from([])),
            in_flight: Cell::new(0),
            drains: Cell::new(0),
            changed: ring.notify(),
            roots: RefCell::default(),
            users: RefCell::default(),
            user_next: Cell::new(0),
            held: Cell::new(Permissions::NONE),
            below: RefCell::new(below),
            uses_below: Cell::new(false),
            used_above: Cell::new(0),
            access: Access::default(),
            relinking: Cell::new(false),
            load: Load::default(),
            readers_told: RefCell::new(Rc::from([])),
        })
    }

    /// Its name in the graph.
    pub fn name(&self) -> &str {
        &self.name
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

    /// Roots that point to it.
    pub fn root_count(&self) -> usize {
        self.roots.borrow().iter().filter(|r| r.strong_count() > 0).count()
    }

    /// Registers a use. Refused when another use of this node, or another program, does not allow it.
    pub fn attach(self: &Rc<Node>, kind: UseKind) -> Result<Use, BlockError> {
        self.check_use(kind, None)?;
        let id = self.user_next.get();
        self.user_next.set(id + 1);
        self.users.borrow_mut().push((id, kind));
        if let Err(error) = self.apply_permissions() {
            self.users.borrow_mut().retain(|(i, _)| *i != id);
            return Err(error);
        }
        Ok(Use { node: self.clone(), id })
    }

    /// The same; where a lock of somebody who was killed stands in the way, that is waited for.
    pub async fn attach_in_time(self: &Rc<Node>, kind: UseKind) -> Result<Use, BlockError> {
        lock::in_time(&self.ring, || self.attach(kind)).await
    }

    /// Waits until no job uses it, or has yet to give back that it may be written. Operations that a job has left behind
    /// at its end are uses, too.
    pub async fn until_free_of_jobs(&self) {
        let is_held = || self.access.holders.get() > 0 || self.access.busy.get();
        let is_used = || is_held() || self.users.borrow().iter().any(|(_, kind)| kind.job().is_some());
        self.changed.until(|| (!is_used()).then_some(())).await;
    }

    fn check_use(&self, kind: UseKind, own: Option<u64>) -> IoResult {
        let users = self.users.borrow();
        let refused = users.iter().find(|(id, other)| Some(*id) != own && !kind.agrees_with(*other));
        if refused.is_none() && self.used_above.get() > 0 && !kind.allows_overlays() {
            let hint = format!("Node '{}' is the backing file of an image that is in use", self.name);
            return Err(BlockError::new(Operation::Lock, self.driver.name(), Errno::EBUSY).hint(hint));
        }
        let Some((_, other)) = refused else { return Ok(()) };
        let hint = match other.job() {
            Some(job) => format!("Node '{}' is busy: block device is in use by block job: {job}", self.name),
            None => format!("Node '{}' is in use by a client and cannot be the target of a job", self.name),
        };
        Err(BlockError::new(Operation::Lock, self.driver.name(), Errno::EBUSY).hint(hint))
    }

    fn apply_permissions(&self) -> IoResult {
        let above = if self.used_above.get() > 0 { Permissions::STABLE_READER } else { Permissions::NONE };
        let all = self.users.borrow().iter().fold(above, |sum, (_, kind)| sum.and(kind.permissions()));
        self.driver.set_permissions(all)?;
        if let Err(error) = self.use_below(all != Permissions::NONE) {
            // Going back to what was held takes nothing new from others.
            let _ = self.driver.set_permissions(self.held.get());
            return Err(error);
        }
        self.held.set(all);
        Ok(())
    }

    /// Counts as a user of the layer below, or no longer. It is only read by those above, by many at once, and must not
    /// change under them.
    fn use_below(&self, used: bool) -> IoResult {
        let Some(below) = self.below() else { return Ok(()) };
        if self.uses_below.get() != used {
            below.count_above(used)?;
            self.uses_below.set(used);
        }
        Ok(())
    }

    fn count_above(&self, more: bool) -> IoResult {
        let before = self.used_above.get();
        self.used_above.set(if more { before + 1 } else { before - 1 });
        self.apply_permissions().inspect_err(|_| self.used_above.set(before))
    }

    // Chains.

    /// The layer below.
    pub fn below(&self) -> Option<Rc<Node>> {
        self.below.borrow().clone()
    }

    /// This node and the layers below it, from above.
    pub fn chain(self: &Rc<Node>) -> Vec<Rc<Node>> {
        std::iter::successors(Some(self.clone()), |node| node.below()).collect()
    }

    /// Another layer lies below from now on, or none; it shows the same bytes where this one holds nothing.
    pub fn set_below(&self, below: Option<Rc<Node>>) -> IoResult {
        let driver = below.as_ref().map(|node| node.driver.clone());
        self.link_below(below)?;
        if let Some(layer) = self.driver.as_layer() {
            layer.set_backing(driver);
        }
        Ok(())
    }

    /// The graph alone: its driver goes on reading from where it did. Gives what was below.
    pub fn link_below(&self, below: Option<Rc<Node>>) -> Result<Option<Rc<Node>>, BlockError> {
        let used = self.held.get() != Permissions::NONE;
        if let Some(new) = &below
            && used
        {
            new.count_above(true)?;
        }
        let old = self.below.replace(below);
        let counted = self.uses_below.replace(used && self.below.borrow().is_some());
        if let Some(old) = &old
            && counted
            && let Err(error) = old.count_above(false)
        {
            // To give locks up takes nothing from others; only a dying file could refuse it.
            tracing::warn!(%error, "locks of a layer could not be given back");
        }
        Ok(old)
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

    async fn reopen(&self, read_only: bool) -> IoResult {
        match self.driver.reopen(read_only) {
            Some(reopening) => reopening.await?,
            None => {
                return Err(BlockError::new(Operation::Open, self.driver.name(), Errno::EROFS).because(
                    "It was opened to be read only, and cannot be opened otherwise while it is in use.",
                ));
            }
        }
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

    fn was_read(&self, offset: u64, len: u64) {
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

    /// Lets every root on this node point to `target` instead. Both are drained, or nobody uses the target.
    pub fn replace_with(self: &Rc<Node>, target: &Rc<Node>, _drained: &Drained) {
        let roots = std::mem::take(&mut *self.roots.borrow_mut());
        for weak in roots {
            let Some(root) = weak.upgrade() else { continue };
            *root.node.borrow_mut() = target.clone();
            target.roots.borrow_mut().push(weak);
        }
    }

    /// The roots that point to this node.
    pub fn roots(&self) -> Vec<Root> {
        self.roots
            .borrow()
            .iter()
            .filter_map(|weak| weak.upgrade().map(|inner| Root { inner, ungated: false }))
            .collect()
    }

    async fn driver_mutate(&self, mutation: Mutation) -> IoResult {
        match mutation {
            Mutation::Write { offset, buf, flags } => self.driver.write(offset, buf, flags).await,
            Mutation::Zeroes { offset, len, flags } => self.driver.write_zeroes(offset, len, flags).await,
            Mutation::Discard { offset, len } => self.driver.discard(offset, len).await,
        }
    }

    async fn mutate(&self, mutation: Mutation) -> IoResult {
        let filters = self.filters.borrow().clone();
        if filters.is_empty() {
            return self.driver_mutate(mutation).await;
        }
        Below { node: self, filters, level: 0 }.mutate(mutation).await
    }
}

/// What clients of a root may rely on for its whole life, whatever node it points to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// Bytes.
    pub len: u64,
    /// The smallest request that needs no read-modify-write when the root was made; requests of any
    /// size work.
    pub preferred_block: u32,
    /// Writes are refused.
    pub read_only: bool,
}

struct RootInner {
    node: RefCell<Rc<Node>>,
    features: Features,
    kind: UseKind,
    using: RefCell<Option<Use>>,
    parked: Cell<u32>,
}

/// A user's handle of a disk.
#[derive(Clone)]
pub struct Root {
    inner: Rc<RootInner>,
    /// Planted bug: this client does not see the shut door.
    ungated: bool,
}

impl std::fmt::Debug for Root {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Root").field("node", &self.inner.node.borrow().name).finish_non_exhaustive()
    }
}

/// One request inside a node.
struct Inside {
    node: Rc<Node>,
    /// When it came to the door; `None` for what tells nothing of the disk.
    came: Option<Nanos>,
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

impl Root {
    /// A root on `node`. Takes the locks that its use needs.
    pub fn new(node: &Rc<Node>, read_only: bool) -> Result<Root, BlockError> {
        let kind = if read_only { UseKind::Reader } else { UseKind::Guest };
        let using = node.attach(kind)?;
        let features = Features {
            len: node.driver.len(),
            preferred_block: node.driver.limits().request_align.max(4096),
            read_only: read_only || node.driver.is_read_only(),
        };
        let inner = Rc::new(RootInner {
            node: RefCell::new(node.clone()),
            features,
            kind,
            using: RefCell::new(Some(using)),
            parked: Cell::new(0),
        });
        node.roots.borrow_mut().push(Rc::downgrade(&inner));
        Ok(Root { inner, ungated: false })
    }

    /// The handle for one client of this root.
    pub fn client(&self) -> Root {
        let ungated = is_planted(Bug::NewClientNotDrained) && self.node().is_drained();
        Root { inner: self.inner.clone(), ungated }
    }

    /// What clients may rely on.
    pub fn features(&self) -> Features {
        self.inner.features
    }

    /// The node that it points to now.
    pub fn node(&self) -> Rc<Node> {
        self.inner.node.borrow().clone()
    }

    /// Requests that wait at the door.
    pub fn parked(&self) -> u32 {
        self.inner.parked.get()
    }

    /// What kind of use this root makes of its node.
    pub fn kind(&self) -> UseKind {
        self.inner.kind
    }

    /// Ends the use of the old node after a pivot.
    pub fn set_use(&self, using: Use) {
        let old = self.inner.using.borrow_mut().replace(using);
        drop(old);
    }

    /// Waits until the door is open. New connections come in through it as well.
    pub async fn admit(&self) {
        drop(self.enter().await);
    }

    async fn enter(&self) -> Inside {
        let node = self.inner.node.borrow().clone();
        if node.drains.get() == 0 || self.ungated {
            node.in_flight.set(node.in_flight.get() + 1);
            return Inside { node, came: None };
        }
        self.enter_parked(node).await
    }

    /// For reads and changes: how long they take, the wait at the door included, is counted.
    async fn enter_counted(&self) -> Inside {
        let came = self.inner.node.borrow().ring.clock();
        let mut inside = self.enter().await;
        inside.came = Some(came);
        inside
    }

    async fn enter_parked(&self, mut node: Rc<Node>) -> Inside {
        self.inner.parked.set(self.inner.parked.get() + 1);
        loop {
            node.changed.until(|| (node.drains.get() == 0).then_some(())).await;
            // Where the root points may have changed while the door was shut.
            let now = self.inner.node.borrow().clone();
            if now.drains.get() == 0 {
                self.inner.parked.set(self.inner.parked.get() - 1);
                now.in_flight.set(now.in_flight.get() + 1);
                return Inside { node: now, came: None };
            }
            node = now;
        }
    }

    /// Whether such a request is allowed, and lies within the disk.
    pub fn check(&self, operation: Operation, offset: u64, len: u64) -> IoResult {
        let features = &self.inner.features;
        let fits = offset.checked_add(len).is_some_and(|end| end <= features.len);
        let errno = if operation.is_write() && features.read_only {
            Errno::EPERM
        } else if !fits {
            if operation.is_write() { Errno::ENOSPC } else { Errno::EINVAL }
        } else {
            return Ok(());
        };
        Err(BlockError::at(operation, self.inner.node.borrow().driver.name(), offset, len, errno))
    }

    /// Reads `buf.len()` bytes at `offset`.
    pub async fn read(&self, offset: u64, buf: Buf) -> (Buf, IoResult) {
        if let Err(error) = self.check(Operation::Read, offset, buf.len() as u64) {
            return (buf, Err(error));
        }
        let inside = self.enter_counted().await;
        inside.node.was_read(offset, buf.len() as u64);
        match inside.node.driver.resolve(offset, buf.len() as u64) {
            Resolved::Zero => {
                let mut buf = buf;
                buf.fill_zero();
                (buf, Ok(()))
            }
            Resolved::File { file, offset: at, pin }
                if buf.is_aligned(inside.node.driver.limits().mem_align as usize) =>
            {
                let wanted = buf.len();
                let (buf, result) = inside.node.ring.read(&file, at, buf).await;
                drop(pin);
                match result {
                    Ok(n) if n as usize == wanted => (buf, Ok(())),
                    // Short or failed: the driver knows what that means.
                    _ => inside.node.driver.read(offset, buf).await,
                }
            }
            _ => inside.node.driver.read(offset, buf).await,
        }
    }

    /// Writes all of `buf` at `offset`.
    pub async fn write(&self, offset: u64, buf: SharedBuf, flags: WriteFlags) -> IoResult {
        self.check(Operation::Write, offset, buf.len() as u64)?;
        let inside = self.enter_counted().await;
        inside.node.mutate(Mutation::Write { offset, buf, flags }).await
    }

    /// Makes a range read as zeroes.
    pub async fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> IoResult {
        self.check(Operation::WriteZeroes, offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let inside = self.enter_counted().await;
        inside.node.mutate(Mutation::Zeroes { offset, len, flags }).await
    }

    /// Gives space back; contents are undefined afterwards.
    pub async fn discard(&self, offset: u64, len: u64) -> IoResult {
        self.check(Operation::Discard, offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let inside = self.enter().await;
        inside.node.mutate(Mutation::Discard { offset, len }).await
    }

    /// Makes acknowledged writes durable.
    pub async fn flush(&self) -> IoResult {
        let inside = self.enter().await;
        inside.node.driver.flush().await
    }

    /// What is known of the range from `offset` on: extents that follow each other, at most `extents_max`, added to `out`.
    pub async fn extents(
        &self,
        offset: u64,
        len: u64,
        extents_max: usize,
        out: &mut Vec<Extent>,
    ) -> IoResult {
        self.check(Operation::BlockStatus, offset, len)?;
        let inside = self.enter().await;
        let driver = &inside.node.driver;
        if let Some(found) = driver.extents(offset, len, extents_max, out) {
            return found.await;
        }
        out.push(driver.block_status(offset, len).await?);
        Ok(())
    }

    /// What is known of the range from `offset` on.
    pub async fn block_status(&self, offset: u64, len: u64) -> Result<Extent, BlockError> {
        self.check(Operation::BlockStatus, offset, len)?;
        let inside = self.enter().await;
        inside.node.driver.block_status(offset, len).await
    }
}
