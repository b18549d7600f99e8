//! A target, as it is wanted and as it stands: whether it is there, what is done with it then, and what of the request does
//! not go with it.
//!
//! What is there and is to be changed is opened for writing as bytes and locked, with the data file that comes with it; who
//! makes or opens the image goes on with these.

use std::path::Path;
use std::rc::Rc;

use blockferry_ring::{Errno, FileKind, Ring};

use super::access;
use super::place::{self, Ground, folder};
use super::{Act, Admission, Planned, Refusal, own_leaves};
use crate::base::os_name;
use crate::block::{BlockError, Driver, IoResult, Operation};
use crate::engine::create::{NewImage, data_file_path};
use crate::engine::open::{self, local_path};
use crate::engine::qcow2::format as format_of;
use crate::engine::spec::NodeSpec;
use crate::engine::{Format, ImageOptions, named, remote};
use crate::graph::node::{Child, Node, Role};

/// What is to become of a target that is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IfThere {
    /// It is left alone.
    Refuse,
    /// It is emptied and made anew. A block device or a server's disk, which has a length of its own, is taken as it is
    /// for a raw image, and given a new qcow2 image, of which it has nothing but the room.
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
    /// Bytes that it may have, at most.
    pub len_max: Option<u64>,
    /// Bytes that it will occupy at least.
    pub room_min: u64,
    /// The options that let one that is there be overwritten, all of them.
    pub say: &'static str,
    /// What one that is there has to have for its backing file.
    pub below: Option<Below<'a>>,
}

/// A backing file that a target is said to have.
#[derive(Clone, Copy, Debug)]
pub struct Below<'a> {
    /// As the target names it, or as it is reached from here.
    pub name: &'a str,
    /// Its format, if that was said.
    pub format: Option<Format>,
}

impl<'a> Wish<'a> {
    /// Of a new image that receives all of `source`.
    pub fn copy(name: &'a str, image: ImageOptions, new: &'a NewImage, source: &Node) -> Wish<'a> {
        let len_min = source.driver().len();
        Wish { len_min, ..Wish::new(name, image, new) }
    }

    /// Of a new image.
    pub fn new(name: &'a str, image: ImageOptions, new: &'a NewImage) -> Wish<'a> {
        let (if_there, may_make) = (IfThere::Refuse, true);
        let (len_min, len_max, room_min, say) = (0, None, 0, "--force");
        Wish { name, image, new, if_there, may_make, len_min, len_max, room_min, say, below: None }
    }
}

/// A file that is there, open for writing as the bytes that it has, and locked.
#[derive(Debug)]
pub struct Held {
    node: Rc<Node>,
    /// What was opened.
    spec: NodeSpec,
    lock: Rc<Child>,
}

impl Held {
    async fn open(
        ring: &Ring,
        shown: &str,
        spec: NodeSpec,
        image: &ImageOptions,
    ) -> Result<Held, BlockError> {
        let options = ImageOptions { read_only: false, ..image.clone() };
        let node = open::open_child(ring, shown, &spec, &options).await?;
        let node = node.called(spec.node_name.as_deref().unwrap_or(shown));
        let lock = node.attach_in_time(Role::PromisedTarget).await?;
        Ok(Held { node, spec, lock })
    }

    /// Its bytes.
    pub fn bytes(&self) -> &Rc<Node> {
        &self.node
    }

    /// Opens the image that these bytes are. The locks go over to it.
    pub async fn open_image(
        self,
        ring: &Ring,
        name: &str,
        image: &ImageOptions,
    ) -> Result<(Rc<Node>, Rc<Child>), BlockError> {
        let node = self.image(ring, name, image).await?;
        if Rc::ptr_eq(&node, self.bytes()) {
            return Ok((self.node, self.lock));
        }
        let node = node.called(name);
        // The locks of its file are held all the while: by its bytes, then by it.
        let lock = node.attach_in_time(Role::PromisedTarget).await?;
        Ok((node, lock))
    }

    async fn image(&self, ring: &Ring, name: &str, image: &ImageOptions) -> Result<Rc<Node>, BlockError> {
        open::open_on(ring, self.bytes(), name, &self.spec, image).await
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

impl Admission {
    /// The target.
    pub async fn target(&mut self, wish: &Wish<'_>) {
        if let Some(ground) = Ground::of_name(&self.ring, wish.name).await {
            let is_needed = self.is_needed(&ground);
            self.changed.push((ground, wish.name.to_owned()));
            if is_needed {
                // Our own locks on it would be in the way; what there is to say is known.
                return;
            }
        }
        let standing = match self.stands(wish).await {
            Ok(standing) => standing,
            Err(refusal) => return self.refuse(refusal),
        };
        let act = match &standing {
            Standing::Missing => Act::Make,
            Standing::Anew(_) => Act::Remake,
            Standing::AsItIs(_) => Act::Overwrite,
        };
        let path = local_path(wish.name);
        if act == Act::Make {
            let dir = match &path {
                Some(path) => Some(folder(&place::leads_to(&self.ring, path).await)),
                None => None,
            };
            self.mode = access::narrowed(&self.ring, &self.sources, dir.as_deref()).await;
        }
        self.plan.images.push(Planned {
            name: wish.name.to_owned(),
            role: "target",
            act,
            format: Some(wish.image.format.unwrap_or(wish.new.format()).name()),
            len: Some(wish.new.len()),
            locked: act != Act::Make,
            mode: (act == Act::Make && path.is_some()).then_some(self.mode),
        });
        let settled = match &standing {
            Standing::AsItIs(held) => self.fits(wish, held).await,
            Standing::Missing | Standing::Anew(_) => self.can_be_made(wish, &standing, path.as_deref()).await,
        };
        if let Err(refusal) = settled {
            self.refuse(refusal);
        }
        self.target = Some(standing);
    }

    /// Looks at what is there, and opens it if it is to be changed.
    async fn stands(&self, wish: &Wish<'_>) -> Result<Standing, Refusal> {
        let ring = &self.ring;
        let spec = NodeSpec::parse(wish.name)?;
        let is_part = spec.window().is_some();
        let exists = || Refusal::Exists { name: wish.name.to_owned(), say: wish.say };
        let missing = || match wish.may_make {
            true if is_part => Err(Refusal::Said(format!(
                "The target '{}' is to be a part (offset, size) of a file that does not exist",
                wish.name
            ))),
            true => Ok(Standing::Missing),
            false => Err(Refusal::Said(format!(
                "The target '{}' does not exist, and -n says that it is not to be made",
                wish.name
            ))),
        };
        may_be_target(wish, &spec)?;
        let mut can_be_emptied = remote::can_create(wish.name);
        if let Some(path) = spec.local_path() {
            match ring.lookup(path) {
                Ok(None) if path.as_os_str().is_empty() => {
                    return Err(Refusal::Said("The name of the target is empty".into()));
                }
                Ok(None) => return missing(),
                Ok(Some(FileKind::Socket | FileKind::Other)) => {
                    return Err(Refusal::Said(match access::is_directory(ring, path).await {
                        true => format!("The target '{}' is a directory: name a file in it", path.display()),
                        false => {
                            format!("The target '{}' is neither a file nor a block device", path.display())
                        }
                    }));
                }
                Ok(Some(_)) if wish.if_there == IfThere::Refuse => return Err(exists()),
                Ok(Some(kind)) => can_be_emptied = kind == FileKind::Regular,
                Err(errno) => {
                    return Err(Refusal::Said(format!(
                        "The target '{}' cannot be looked at: {errno}",
                        os_name::from_path(path)
                    )));
                }
            }
        } else if spec.nbd().is_some() && wish.if_there == IfThere::Refuse {
            return Err(Refusal::Said(format!(
                "The target '{}' is a disk of a server, which is left alone. Say {} to overwrite it",
                wish.name, wish.say
            )));
        }
        let held = match Held::open(ring, wish.name, spec, &wish.image).await {
            Err(error) if error.errno == Errno::ENOENT && remote::can_create(wish.name) => return missing(),
            held => held?,
        };
        if wish.if_there == IfThere::Refuse && remote::can_create(wish.name) {
            return Err(exists());
        }
        // What cannot be emptied is taken as it is, unless another image is made in it.
        let anew = can_be_emptied || wish.new.format() == Format::Qcow2;
        Ok(match wish.if_there == IfThere::Remake && anew {
            true => Standing::Anew(held),
            false => Standing::AsItIs(held),
        })
    }

    /// What is there already has the right length, and is no part of what is read.
    async fn fits(&mut self, wish: &Wish<'_>, held: &Held) -> Result<(), Refusal> {
        let look = ImageOptions { read_only: true, ..wish.image.clone() };
        let image = held.image(&self.ring, wish.name, &look).await?;
        let known = own_leaves(held.bytes().driver());
        for leaf in own_leaves(image.driver()) {
            if known.iter().any(|known| Rc::ptr_eq(known, &leaf)) {
                continue;
            }
            if let Some(ground) = Ground::of_leaf(&self.ring, &leaf).await {
                let is_needed = self.is_needed(&ground);
                self.changed.push((ground, leaf.name().to_owned()));
                if is_needed {
                    return Ok(());
                }
            }
        }
        check_len(wish, image.len())?;
        if let Some(below) = &wish.below {
            self.has_below(wish.name, image.driver(), below).await?;
        }
        if wish.if_there == IfThere::Remake && image.len() < wish.new.len() {
            let (name, len, wanted) = (wish.name, image.len(), wish.new.len());
            return Err(Refusal::Said(format!(
                "The target '{name}' has {len} bytes, and the new image {wanted}; it cannot be made longer from here"
            )));
        }
        if !Rc::ptr_eq(&image, held.bytes()) {
            // Its data file can be locked, too.
            drop(image.attach_in_time(Role::PromisedTarget).await?);
        }
        Ok(())
    }

    /// What is there has the backing file that it is said to have: what it shows is not only its own.
    async fn has_below(&self, name: &str, image: &Rc<dyn Driver>, said: &Below<'_>) -> Result<(), Refusal> {
        let refuse = |text: String| Err(Refusal::Said(format!("The target '{name}' {text}")));
        let Some(layer) = image.as_layer() else {
            return refuse(format!(
                "is taken as a raw image, which cannot have the backing file '{}' (-B): say -O qcow2 if it is one",
                said.name
            ));
        };
        let Some(backing) = layer.backing() else {
            return refuse(format!(
                "has no backing file, and -B says that it has '{}': give it that (blockferry rebase -u -b), or leave \
                 out -B, and all of the source is copied",
                said.name
            ));
        };
        let node = backing.node();
        let backing = node.driver();
        let recorded = layer.recorded_backing().is_some_and(|(text, _)| text == said.name);
        if !recorded && !self.leads_to(backing, said.name, name).await {
            return refuse(format!(
                "has another backing file, '{}', than '{}' (-B)",
                backing.name(),
                said.name
            ));
        }
        let is = format_of(backing);
        match said.format.filter(|said| *said != is) {
            Some(said) => refuse(format!(
                "has the backing file '{}' as a {is} image, and -F says {said}",
                backing.name()
            )),
            None => Ok(()),
        }
    }

    /// Whether a name, beside `image` or from here, leads to where these bytes are.
    async fn leads_to(&self, bytes: &Rc<dyn Driver>, name: &str, image: &str) -> bool {
        let mut there = Vec::new();
        for leaf in own_leaves(bytes) {
            there.extend(Ground::of_leaf(&self.ring, &leaf).await);
        }
        let beside = named::by_user(image, name).ok().map(|named| named.name());
        for name in beside.iter().map(String::as_str).chain([name]) {
            let ground = Ground::of_name(&self.ring, name).await;
            if ground.is_some_and(|ground| there.iter().any(|there| there.is(&ground))) {
                return true;
            }
        }
        false
    }

    /// An image can be made there, as it is wanted.
    async fn can_be_made(
        &mut self,
        wish: &Wish<'_>,
        standing: &Standing,
        path: Option<&Path>,
    ) -> Result<(), Refusal> {
        let (ring, new) = (self.ring.clone(), wish.new);
        new.check(wish.name)?;
        check_len(wish, new.len())?;
        if matches!(new.format(), Format::Raw) {
            access::within_file_limit(wish.name, new.len())?;
        }
        let fixed = match standing {
            Standing::Anew(held) if is_fixed(held, wish.name) => Some(held.bytes().len()),
            _ => None,
        };
        if let Some(room) = fixed {
            let needed = new.needs_at_least(room);
            if needed > room {
                return Err(Refusal::Said(format!(
                    "The target '{}' is too small: it has {room} bytes, and the new image needs {needed} even without data",
                    wish.name
                )));
            }
        }
        let Some(path) = path else {
            return match new.data_file() {
                Some(_) => Err(Refusal::Said(format!(
                    "'{}' is on a server: an image there cannot name a data file",
                    wish.name
                ))),
                None => Ok(()),
            };
        };
        if fixed.is_some() {
            return match new.data_file() {
                Some(name) => self.data_file(wish, path, name).await,
                None => Ok(()),
            };
        }
        let place = &place::leads_to(&ring, path).await;
        let freed = match standing {
            Standing::Anew(held) => held.bytes().allocated_bytes().unwrap_or(0),
            _ => {
                access::may_make_in(&ring, place).await?;
                0
            }
        };
        let room = access::room(&ring, &folder(place)).await;
        self.plan.room = room;
        let needed = new.room_min().max(wish.room_min);
        if let Some(room) = room.map(|room| room.saturating_add(freed)).filter(|room| *room < needed) {
            return Err(BlockError::new(Operation::Create, wish.name, Errno::ENOSPC)
                .because(format!("It needs {needed} bytes at once, and {room} are free there."))
                .into());
        }
        match new.data_file() {
            Some(name) => self.data_file(wish, path, name).await,
            None => Ok(()),
        }
    }

    /// The file that a new image is to keep its data in. It is emptied if it is there and that was said.
    async fn data_file(&mut self, wish: &Wish<'_>, image: &Path, name: &str) -> Result<(), Refusal> {
        let ring = self.ring.clone();
        let path = data_file_path(image, name)?;
        let shown = os_name::from_path(&path);
        if let Some(ground) = Ground::of_path(&ring, &path).await {
            let is_needed = self.is_needed(&ground);
            self.changed.push((ground, shown.clone()));
            if is_needed {
                return Ok(());
            }
        }
        let found = ring.lookup(&path).map_err(|errno| BlockError::new(Operation::Open, &*shown, errno))?;
        let (is_there, len) = (found.is_some(), Some(wish.new.len()));
        self.plan.images.push(Planned {
            name: shown.clone(),
            role: "data file",
            act: if is_there { Act::Remake } else { Act::Make },
            format: Some(Format::Raw.name()),
            len,
            locked: is_there,
            mode: (!is_there).then_some(self.mode),
        });
        if !is_there {
            return Ok(access::may_make_in(&ring, &path).await?);
        }
        if wish.if_there == IfThere::Refuse {
            return Err(Refusal::DataFileExists { name: shown });
        }
        let image = ImageOptions { format: Some(Format::Raw), ..wish.image.clone() };
        let held = Held::open(&ring, &shown, NodeSpec::file(&*path), &image).await?;
        if found == Some(FileKind::Block) && held.bytes().len() < wish.new.len() {
            return Err(Refusal::Said(format!(
                "The device '{shown}' is to hold the data of {} bytes, and has {}",
                wish.new.len(),
                held.bytes().len()
            )));
        }
        self.data_file = Some(held);
        Ok(())
    }
}

/// Whether a name can be that of a target: what it says of its use goes together with what is to be done.
fn may_be_target(wish: &Wish<'_>, spec: &NodeSpec) -> Result<(), Refusal> {
    let (name, made) = (wish.name, wish.new.format());
    let refuse = |text: String| Err(Refusal::Said(format!("The target '{name}' {text}")));
    match spec.format() {
        _ if spec.read_only => refuse("is named as one that is only read (read-only)".into()),
        Some(said) if wish.if_there != IfThere::Overwrite && said != made => {
            refuse(format!("is named as {said}, and would be made as {made}"))
        }
        _ if spec.window().is_some() && wish.if_there == IfThere::Remake => refuse(
            "is a part of a file (offset, size), and to be made anew: the rest of it would be lost".into(),
        ),
        _ => Ok(()),
    }
}

/// Whether what was opened has a length that is not ours to change.
fn is_fixed(held: &Held, name: &str) -> bool {
    own_leaves(held.bytes().driver()).iter().any(|leaf| leaf.kind() == "host_device")
        || remote::nbd_disk(name).is_some()
}

/// Whether a name leads to a block device or to a server's disk: there is no new file to be made, only a new image in what
/// is there.
pub fn is_place(ring: &Ring, name: &str) -> bool {
    match local_path(name) {
        Some(path) => matches!(ring.lookup(&path), Ok(Some(FileKind::Block))),
        None => remote::nbd_disk(name).is_some(),
    }
}

/// Takes what is in it out of what is to be made anew. What has a length of its own keeps it: who makes the new image sees
/// to that.
pub async fn empty(bytes: &Node) -> IoResult {
    match bytes.set_len(0).await {
        Err(error) if error.errno == Errno::EOPNOTSUPP => Ok(()),
        result => result,
    }
}

fn check_len(wish: &Wish<'_>, len: u64) -> Result<(), Refusal> {
    let (name, min) = (wish.name, wish.len_min);
    if len < min {
        let text = format!("The target '{name}' is smaller ({len} bytes) than the source ({min} bytes)");
        return Err(Refusal::Said(text));
    }
    match wish.len_max.filter(|max| len > *max) {
        Some(_) => Err(Refusal::Said(format!(
            "Source and target image have different sizes: '{name}' has {len} bytes, the source {min}. Say \
             --allow-larger-target if that is meant"
        ))),
        None => Ok(()),
    }
}
