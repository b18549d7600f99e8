//! What is settled before the first byte of anything changes.
//!
//! A command says what it reads, what it makes and what it changes; all that can speak against it is found out here, while
//! nothing has been changed yet: the target is a part of what is read (by whatever name), it is there and was not to be
//! touched, it is locked by another program, the options make no sense, it is too small. What comes out is a plan with its
//! refusals. A dry run prints it; a real one begins if there is no refusal, with the files that were opened and locked for
//! the judgement, so that nobody can come between.
//!
//! Opening an image for writing may itself write to it (QEMU does so, too): what is judged is opened as the bytes that it
//! is stored in, and its format is only read.

mod access;
pub mod place;
pub mod plan;
mod target;

use std::path::Path;
use std::rc::Rc;

use blockferry_ring::{Errno, Ring};

use super::named;
use crate::base::os_name;
use crate::block::{BlockError, Driver, Operation};
use crate::graph::node::{Child, Node, Role};
pub use access::FILE_MODE;
use access::Source;
use place::Ground;
pub use plan::{Act, Plan, Planned, Refusal};
pub use target::{Below, Held, IfThere, Standing, Wish, empty, is_place};

/// What was judged, if nothing spoke against it. Those who were promised to a job keep their locks until it has its own.
#[derive(Debug)]
pub struct Admitted {
    /// The target.
    pub target: Option<Standing>,
    /// The data file that it is to have, if that is there already.
    pub data_file: Option<Held>,
    /// Permission bits of what is made.
    pub mode: u32,
    /// Uses of what is read.
    pub uses: Vec<Rc<Child>>,
}

/// A judgement under way.
#[derive(Debug)]
pub struct Admission {
    ring: Ring,
    plan: Plan,
    read: Vec<(Ground, String)>,
    changed: Vec<(Ground, String)>,
    uses: Vec<Rc<Child>>,
    /// Who may read what is read.
    sources: Vec<Source>,
    target: Option<Standing>,
    data_file: Option<Held>,
    mode: u32,
    counts: bool,
}

impl Admission {
    /// Of this command.
    pub fn new(ring: &Ring, command: &'static str) -> Admission {
        Admission {
            ring: ring.clone(),
            plan: Plan { command, ..Plan::default() },
            read: Vec::new(),
            changed: Vec::new(),
            uses: Vec::new(),
            sources: Vec::new(),
            target: None,
            data_file: None,
            mode: FILE_MODE,
            counts: false,
        }
    }

    /// The ring that its commands use.
    pub fn ring(&self) -> &Ring {
        &self.ring
    }

    /// The plan so far.
    pub fn plan(&mut self) -> &mut Plan {
        &mut self.plan
    }

    /// Where the target stands, as far as it has been looked at.
    pub fn standing(&self) -> Option<&Standing> {
        self.target.as_ref()
    }

    /// Something else speaks against it.
    pub fn refuse(&mut self, refusal: impl Into<Refusal>) {
        self.plan.refusals.push(refusal.into());
    }

    /// A disk is read from its image and all below it, and must stay as it is; by others, too.
    pub async fn source(&mut self, node: &Rc<Node>) {
        match node.attach_in_time(Role::PromisedSource).await {
            Ok(promised) => self.uses.push(promised),
            Err(error) => self.refuse(error),
        }
        let driver = node.driver();
        self.sources.extend(access::sources(&self.ring, driver));
        match driver.kind() {
            // It is nothing but what it is put together from.
            "joined" => {
                for part in driver.children() {
                    let part = part.node();
                    self.sources.extend(access::sources(&self.ring, part.driver()));
                    self.reads("source", part.driver()).await;
                }
            }
            _ => self.reads("source", driver).await,
        }
    }

    /// A disk is read as `role`, from its image and all below it.
    pub async fn reads(&mut self, role: &'static str, disk: &Rc<dyn Driver>) {
        let mut layer = Some((role, disk.clone()));
        while let Some((role, driver)) = layer {
            self.plan.images.push(planned(role, Act::Read, &driver));
            let relation = match role {
                "backing file" => "is a backing file of what is read",
                "new backing file" => "is its own new backing file",
                "new backing chain" => "is a part of its own new backing chain",
                _ => "is the image that is read itself",
            };
            self.stays(&driver, relation).await;
            let below = below(&driver);
            let role = if role.starts_with("new") { "new backing chain" } else { "backing file" };
            layer = below.map(|below| (role, below));
        }
    }

    /// The files of an image, and of all below it, must not be changed by anything else; see [`Admission::stays`].
    pub async fn stays_whole(&mut self, disk: &Rc<dyn Driver>, relation: &str) {
        let mut layer = Some(disk.clone());
        while let Some(driver) = layer {
            self.stays(&driver, relation).await;
            layer = below(&driver);
        }
    }

    /// The files of an image must not be changed by anything else: what would be is told that it `relation` (`is …`).
    pub async fn stays(&mut self, image: &Rc<dyn Driver>, relation: &str) {
        for leaf in own_leaves(image) {
            if let Some(ground) = Ground::of_leaf(&self.ring, &leaf).await {
                let relation = match leaf.name() == image.name() {
                    true => relation.to_owned(),
                    false => format!("is a file of '{}', which is needed", image.name()),
                };
                self.read.push((ground, relation));
            }
        }
    }

    /// An image that is there is changed in place, as `role`; see [`Admission::layer`]. No part of it may be read.
    pub async fn changes(&mut self, role: &'static str, node: &Rc<Node>, kind: Role) {
        self.layer(role, Act::Change, node, kind).await;
        for leaf in own_leaves(node.driver()) {
            if let Some(ground) = Ground::of_leaf(&self.ring, &leaf).await {
                self.changed.push((ground, leaf.name().to_owned()));
            }
        }
    }

    /// A layer of a chain that a job works on. `kind` is how the job will use it: whether that goes with what others do with
    /// it is tried, and given up again.
    pub async fn layer(&mut self, role: &'static str, act: Act, node: &Rc<Node>, kind: Role) {
        self.layer_of(None, role, act, node, kind).await;
    }

    /// The same for a layer in the chain of `disk`, on which the job works.
    pub async fn layer_of(
        &mut self,
        disk: Option<&Rc<Node>>,
        role: &'static str,
        act: Act,
        node: &Rc<Node>,
        kind: Role,
    ) {
        let tried = match disk {
            Some(disk) => node.attach_in_chain(kind, disk).await,
            None => node.attach_in_time(kind).await,
        };
        if let Err(error) = tried {
            self.refuse(error);
        }
        let driver = node.driver();
        self.plan.images.push(planned(role, act, driver));
        if act == Act::Read {
            return;
        }
        for leaf in own_leaves(driver) {
            if let Err(error) = access::may_write(&self.ring, &leaf).await {
                self.refuse(error);
            }
        }
    }

    /// Needs `bytes` of room at once for something of the name `name`, which lies beside `driver`'s file.
    pub async fn needs_room(&mut self, driver: &Rc<dyn Driver>, bytes: u64) {
        let Some(path) = super::open::local_path(driver.name()).filter(|_| driver.local_file().is_some())
        else {
            return;
        };
        // A device has its room already.
        if !own_leaves(driver).iter().all(|leaf| leaf.kind() == "file") {
            return;
        }
        self.plan.room = access::room(&self.ring, &place::folder(&path)).await;
        if let Some(room) = self.plan.room.filter(|room| *room < bytes) {
            self.refuse(
                BlockError::new(Operation::Resize, driver.name(), Errno::ENOSPC)
                    .because(format!("It needs {bytes} bytes more at once, and {room} are free there.")),
            );
        }
    }

    /// An image that is there gets this long.
    pub fn grows(&mut self, node: &Rc<Node>, len: u64) {
        let driver = node.driver();
        let kind = undelayed(driver).kind();
        if kind == "host_device" || super::remote::nbd_disk(driver.name()).is_some() {
            let text = format!("It has {} bytes, has to have {len}, and cannot grow.", driver.len());
            self.refuse(BlockError::new(Operation::Resize, driver.name(), Errno::ENOSPC).because(text));
        } else if kind == "file" {
            self.grows_to(driver.name(), len);
        }
    }

    /// All data of `disk` is copied, or that of its uppermost layer: so many bytes at most. They are counted only for who
    /// wants to know.
    pub async fn bytes_of(&mut self, disk: &Rc<dyn Driver>, top_only: bool) -> Result<(), BlockError> {
        if self.counts {
            self.plan.bytes_max = Some(access::data_bytes(disk, top_only).await?);
        }
        Ok(())
    }

    /// For a dry run: bytes are counted, which takes a walk over the disk's tables.
    pub fn counting(mut self, counts: bool) -> Admission {
        self.counts = counts;
        self
    }

    /// A file gets this long.
    fn grows_to(&mut self, name: &str, len: u64) {
        if let Err(refusal) = access::within_file_limit(name, len) {
            self.refuse(refusal);
        }
    }

    /// A file is written that has nothing to do with images, such as a log: it must not be one of them.
    pub async fn writes_file(&mut self, path: &Path) {
        if let Some(ground) = Ground::of_path(&self.ring, path).await {
            self.changed.push((ground, os_name::from_path(path)));
        }
    }

    /// A file that the new image names, and that nobody opens.
    pub async fn keeps(&mut self, image: &str, name: &str) {
        let Ok(named) = named::by_user(image, name) else { return };
        if let Some(ground) = Ground::of_name(&self.ring, &named.name()).await {
            self.read.push((ground, "is its own new backing file".into()));
        }
    }

    /// Whether a place is one of those that are read or changed already.
    fn is_needed(&self, ground: &Ground) -> bool {
        self.read.iter().chain(&self.changed).any(|(known, _)| known.overlaps(ground))
    }

    /// The judgement: the plan, and what goes on from here if nothing speaks against it.
    pub fn judge(mut self) -> (Plan, Admitted) {
        let parts = self.changed.iter().enumerate().filter_map(|(n, (ground, name))| {
            let read = self.read.iter().find(|(read, _)| read.overlaps(ground));
            let relation = read.map(|(_, relation)| relation.clone()).or_else(|| {
                let twice = self.changed[..n].iter().find(|(other, _)| other.overlaps(ground));
                twice.map(|(_, other)| format!("is to be two things at once, as '{other}' is the same"))
            })?;
            Some(Refusal::Part { changed: name.clone(), relation })
        });
        // This tells more than that a file exists or is locked (by ourselves, who read it).
        let mut refusals: Vec<Refusal> = parts.take(1).collect();
        if refusals.is_empty() {
            refusals = std::mem::take(&mut self.plan.refusals);
        }
        self.plan.refusals = refusals;
        let Admission { target, data_file, mode, uses, .. } = self;
        (self.plan, Admitted { target, data_file, mode, uses })
    }
}

impl Plan {
    /// An error if something speaks against it.
    pub fn admitted(&self) -> Result<(), Refusal> {
        self.refusals.first().map_or(Ok(()), |refusal| Err(refusal.clone()))
    }
}

/// Two images that somebody has opened: whether a job may copy one to the other.
pub async fn nodes(ring: &Ring, source: &Rc<Node>, target: &Rc<Node>) -> Result<(), BlockError> {
    let (from, to) = (source.driver(), target.driver());
    if Rc::ptr_eq(from, to) || from.identity().is_some() && from.identity() == to.identity() {
        // The job has its own words for this.
        return Ok(());
    }
    let mut admission = Admission::new(ring, "job");
    admission.reads("source", source.driver()).await;
    for leaf in own_leaves(target.driver()) {
        if let Some(ground) = Ground::of_leaf(ring, &leaf).await {
            admission.changed.push((ground, leaf.name().to_owned()));
        }
    }
    let (plan, _) = admission.judge();
    plan.admitted().map_err(|refusal| {
        let name = target.driver().name();
        BlockError::new(Operation::Write, name, Errno::EBUSY).because(format!("{refusal}."))
    })
}

fn planned(role: &'static str, act: Act, driver: &Rc<dyn Driver>) -> Planned {
    Planned {
        name: driver.name().to_owned(),
        role,
        act,
        format: Some(driver.format()),
        len: Some(driver.len()),
        locked: true,
        mode: None,
    }
}

/// What lies below a layer.
fn below(driver: &Rc<dyn Driver>) -> Option<Rc<dyn Driver>> {
    Some(driver.as_layer()?.backing()?.node().driver().clone())
}

/// What a disk is, its latency aside.
fn undelayed(driver: &Rc<dyn Driver>) -> Rc<dyn Driver> {
    let mut driver = driver.clone();
    while driver.kind() == "delay"
        && let Some(inner) = driver.children().into_iter().next()
    {
        driver = inner.node().driver().clone();
    }
    driver
}

/// What the bytes of an image itself lie in, without the layers below it: its file, its data file.
pub fn own_leaves(driver: &Rc<dyn Driver>) -> Vec<Rc<dyn Driver>> {
    let below = driver.as_layer().and_then(|layer| layer.backing());
    let mut leaves = Vec::new();
    for child in driver.children() {
        if below.as_ref().is_none_or(|below| !Rc::ptr_eq(below, &child)) {
            leaves.extend(own_leaves(child.node().driver()));
        }
    }
    if leaves.is_empty() {
        leaves.push(driver.clone());
    }
    leaves
}
