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

pub mod place;
pub mod plan;

use std::rc::Rc;

use blockferry_ring::{Errno, Ring};

use super::create::NewImage;
use super::open::{self, local_path, name_of};
use super::{Format, ImageOptions, named, remote};
use crate::block::{BlockError, Driver, Operation};
use crate::graph::node::{Node, Use, UseKind};
use place::Ground;
pub use plan::{Act, Plan, Planned, Refusal};

/// What is to become of a target that is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IfThere {
    /// It is left alone.
    Refuse,
    /// It is emptied and made anew. A raw block device is taken as it is.
    Remake,
    /// It is written as the image that it is.
    Overwrite,
}

/// A target, as it is wanted.
#[derive(Clone, Debug)]
pub struct Wish<'a> {
    /// As the user said it.
    pub name: &'a str,
    /// How to open it.
    pub image: ImageOptions,
    /// What is made.
    pub new: &'a NewImage,
    /// What is done with one that is there.
    pub if_there: IfThere,
    /// One that is not there is made.
    pub may_make: bool,
    /// Bytes that it has to have.
    pub len_min: u64,
}

impl<'a> Wish<'a> {
    /// Of a new image that receives all of `source`.
    pub fn copy(name: &'a str, image: ImageOptions, new: &'a NewImage, source: &Node) -> Wish<'a> {
        let len_min = source.driver().len();
        Wish { name, image, new, if_there: IfThere::Refuse, may_make: true, len_min }
    }
}

/// A file that is there, open for writing as the bytes that it has, and locked.
#[derive(Debug)]
pub struct Held {
    node: Rc<Node>,
    /// The format that its name says.
    format: Option<Format>,
    _lock: Use,
}

impl Held {
    async fn open(ring: &Ring, name: &str, image: &ImageOptions) -> Result<Held, BlockError> {
        let options = ImageOptions { read_only: false, ..image.clone() };
        let (driver, format) = open::open_child(ring, name, &options).await?;
        let node = Node::new(ring, name, driver);
        let lock = node.attach_in_time(UseKind::PromisedTarget).await?;
        Ok(Held { node, format, _lock: lock })
    }

    /// Its bytes.
    pub fn bytes(&self) -> &Rc<dyn Driver> {
        self.node.driver()
    }

    /// Opens the image that these bytes are. The locks go over to it.
    pub async fn open_image(
        self,
        ring: &Ring,
        name: &str,
        image: &ImageOptions,
    ) -> Result<(Rc<Node>, Use), BlockError> {
        let driver = self.image(ring, name, image).await?;
        let node = match Rc::ptr_eq(&driver, self.bytes()) {
            true => return Ok((self.node, self._lock)),
            false => Node::new(ring, name, driver),
        };
        // Both keep their locks on one open file: the old ones go first, and nothing is waited for until the new ones
        // are there.
        drop(self);
        let lock = node.attach_in_time(UseKind::PromisedTarget).await?;
        Ok((node, lock))
    }

    async fn image(
        &self,
        ring: &Ring,
        name: &str,
        image: &ImageOptions,
    ) -> Result<Rc<dyn Driver>, BlockError> {
        open::open_on(ring, self.bytes().clone(), self.format, name, image).await
    }
}

/// Where a target stands.
#[derive(Debug)]
pub enum Standing {
    /// It is not there.
    Missing,
    /// It is there, and to be made anew.
    Anew(Held),
    /// It is there, and is written as it is.
    AsItIs(Held),
}

/// What was judged, if nothing spoke against it. Those who were promised to a job keep their locks until it has its own.
#[derive(Debug)]
pub struct Admitted {
    /// The target.
    pub target: Option<Standing>,
    /// Uses of what is read.
    pub uses: Vec<Use>,
}

/// A judgement under way.
#[derive(Debug)]
pub struct Admission {
    ring: Ring,
    plan: Plan,
    read: Vec<(Ground, String)>,
    changed: Vec<(Ground, String)>,
    uses: Vec<Use>,
    target: Option<Standing>,
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
            target: None,
        }
    }

    /// The plan so far.
    pub fn plan(&mut self) -> &mut Plan {
        &mut self.plan
    }

    /// Something else speaks against it.
    pub fn refuse(&mut self, refusal: impl Into<Refusal>) {
        self.plan.refusals.push(refusal.into());
    }

    /// A disk is read from its image and all below it, and must stay as it is; by others, too.
    pub async fn source(&mut self, node: &Rc<Node>) {
        match node.attach_in_time(UseKind::PromisedSource).await {
            Ok(promised) => self.uses.push(promised),
            Err(error) => self.refuse(error),
        }
        self.reads("source", node.driver()).await;
    }

    /// A disk is read as `role`, from its image and all below it.
    pub async fn reads(&mut self, role: &'static str, disk: &Rc<dyn Driver>) {
        let mut layer = Some((role, disk.clone()));
        while let Some((role, driver)) = layer {
            self.plan.images.push(planned(role, Act::Read, &driver));
            let relation = match role {
                "backing file" => "is a backing file of what is read",
                "new backing file" => "is the new image's own backing file",
                _ => "is the image that is read",
            };
            for leaf in own_leaves(&driver) {
                if let Some(ground) = Ground::of_leaf(&self.ring, &leaf).await {
                    let relation = match leaf.name() == driver.name() {
                        true => relation.to_owned(),
                        false => format!("is a file of '{}', which is read", driver.name()),
                    };
                    self.read.push((ground, relation));
                }
            }
            let below = driver.as_layer().and_then(|layer| layer.backing());
            layer = below.map(|below| ("backing file", below));
        }
    }

    /// A file that the new image names, and that nobody opens.
    pub async fn keeps(&mut self, image: &str, name: &str) {
        let Ok(named) = named::by_user(image, name) else { return };
        if let Some(ground) = Ground::of_name(&self.ring, &named.name()).await {
            self.read.push((ground, "is the new image's own backing file".into()));
        }
    }

    /// The target.
    pub async fn target(&mut self, wish: &Wish<'_>) {
        if let Some(ground) = Ground::of_name(&self.ring, wish.name).await {
            self.changed.push((ground, wish.name.to_owned()));
        }
        match self.stands(wish).await {
            Ok(standing) => {
                let act = match &standing {
                    Standing::Missing => Act::Make,
                    Standing::Anew(_) => Act::Remake,
                    Standing::AsItIs(_) => Act::Overwrite,
                };
                if let Err(refusal) = self.settle(wish, &standing).await {
                    self.refuse(refusal);
                }
                self.plan.images.push(Planned {
                    name: wish.name.to_owned(),
                    role: "target",
                    act,
                    format: Some(wish.image.format.unwrap_or(wish.new.format()).name()),
                    len: Some(wish.new.len()),
                    locked: act != Act::Make,
                });
                self.target = Some(standing);
            }
            Err(refusal) => self.refuse(refusal),
        }
    }

    /// Looks at what is there, and opens it if it is to be changed.
    async fn stands(&self, wish: &Wish<'_>) -> Result<Standing, Refusal> {
        let ring = &self.ring;
        let exists = || Refusal::Exists { name: wish.name.to_owned() };
        let missing = || match wish.may_make {
            true => Ok(Standing::Missing),
            false => Err(Refusal::Said(format!(
                "The target '{}' does not exist, and -n says that it is not to be made",
                wish.name
            ))),
        };
        let mut name = wish.name.to_owned();
        if let Some(path) = local_path(wish.name) {
            match ring.lookup(&path) {
                Ok(None) => return missing(),
                Ok(Some(_)) if wish.if_there == IfThere::Refuse => return Err(exists()),
                Ok(Some(_)) => {}
                Err(errno) => {
                    return Err(Refusal::Said(format!(
                        "The target '{}' cannot be looked at: {errno}",
                        path.display()
                    )));
                }
            }
            if !wish.name.starts_with("delay:") {
                name = format!("file:{}", name_of(&path));
            }
        } else if is_nbd(wish.name) && wish.if_there == IfThere::Refuse {
            return Err(Refusal::Said(format!(
                "The target '{}' is a disk of a server, which is left alone. Say --force to overwrite it",
                wish.name
            )));
        }
        let held = match Held::open(ring, &name, &wish.image).await {
            Err(error) if error.errno == Errno::ENOENT && remote::can_create(wish.name) => return missing(),
            held => held?,
        };
        if wish.if_there == IfThere::Refuse && remote::can_create(wish.name) {
            return Err(exists());
        }
        // What cannot be emptied is taken as it is.
        let has_own_length = held.bytes().kind() != "host_device" && !is_nbd(wish.name);
        Ok(match wish.if_there == IfThere::Remake && has_own_length {
            true => Standing::Anew(held),
            false => Standing::AsItIs(held),
        })
    }

    /// What of the request does not go with what is there.
    async fn settle(&mut self, wish: &Wish<'_>, standing: &Standing) -> Result<(), Refusal> {
        let smaller = |len: u64| {
            let (name, needed) = (wish.name, wish.len_min);
            Refusal::Said(format!(
                "The target '{name}' is smaller ({len} bytes) than the source ({needed} bytes)"
            ))
        };
        let held = match standing {
            Standing::Missing | Standing::Anew(_) => {
                wish.new.check(wish.name)?;
                return if wish.new.len() < wish.len_min { Err(smaller(wish.new.len())) } else { Ok(()) };
            }
            Standing::AsItIs(held) => held,
        };
        let look = ImageOptions { read_only: true, ..wish.image.clone() };
        let image = held.image(&self.ring, wish.name, &look).await?;
        for leaf in own_leaves(&image) {
            if let Some(ground) = Ground::of_leaf(&self.ring, &leaf).await {
                self.changed.push((ground, leaf.name().to_owned()));
            }
        }
        match image.len() < wish.len_min {
            true => Err(smaller(image.len())),
            false => Ok(()),
        }
    }

    /// The judgement: the plan, and what goes on from here if nothing speaks against it.
    pub fn judge(mut self) -> (Plan, Admitted) {
        let parts = self.changed.iter().enumerate().filter_map(|(n, (ground, name))| {
            let read = self.read.iter().find(|(read, _)| read.overlaps(ground));
            let relation = read.map(|(_, relation)| relation.clone()).or_else(|| {
                let twice = self.changed[..n].iter().find(|(other, _)| other.overlaps(ground));
                twice
                    .filter(|(_, other)| other != name)
                    .map(|(_, other)| format!("is the same file as '{other}', which is changed, too"))
            })?;
            Some(Refusal::Part { changed: name.clone(), relation })
        });
        // This tells more than that a file exists or is locked (by ourselves, who read it).
        let mut refusals: Vec<Refusal> = parts.take(1).collect();
        if refusals.is_empty() {
            refusals = std::mem::take(&mut self.plan.refusals);
        }
        self.plan.refusals = refusals;
        (self.plan, Admitted { target: self.target, uses: self.uses })
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
        BlockError::new(Operation::Write, name, Errno::EBUSY).hint(format!("{refusal}."))
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
    }
}

fn is_nbd(name: &str) -> bool {
    remote::nbd_disk(name).is_some()
}

/// What the bytes of an image itself lie in, without the layers below it: its file, its data file.
pub fn own_leaves(driver: &Rc<dyn Driver>) -> Vec<Rc<dyn Driver>> {
    let below = driver.as_layer().and_then(|layer| layer.backing());
    let mut leaves = Vec::new();
    for child in driver.children() {
        if below.as_ref().is_none_or(|below| !Rc::ptr_eq(below, &child)) {
            leaves.extend(own_leaves(&child));
        }
    }
    if leaves.is_empty() {
        leaves.push(driver.clone());
    }
    leaves
}
