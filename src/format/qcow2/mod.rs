//! qcow2: thin disks with backing files and snapshots, as QEMU writes them.
//!
//! The format is described in QEMU's documentation (docs/interop/qcow2); limits and defaults are those of
//! QEMU 10. What is where:
//!
//! | file | what it holds |
//! |---|---|
//! | `header`, `entry`, `geometry` | bytes to meaning and back; no I/O |
//! | `options`, `info` | what can be asked for, what can be told |
//! | `gate` | which other files an image may have opened |
//! | `cache`, `meta` | tables in memory; what is not there is named, not loaded |
//! | `plan` | what a request means in terms of places |
//! | `image` | the state of an open image |
//! | `alloc` | the one place where clusters get and lose references |
//! | `read`, `gather`, `write`, `zero`, `populate`, `compress` | requests, straight down |
//! | `sync` | the order in which all of it reaches the disk |
//! | `holes` | clusters with a place in the file and nothing in it |
//! | `open`, `reopen`, `create`, `resize`, `rename`, `amend`, `downgrade`, `empty`, `snapshot`, `view`, `bitmap`, `check`, `repair` | what its name says |

mod alloc;
mod amend;
mod bitmap;
mod cache;
pub mod check;
pub mod compress;
mod count;
mod create;
mod downgrade;
mod driver;
mod empty;
pub mod entry;
pub mod gate;
mod gather;
pub mod geometry;
pub mod header;
mod holes;
mod image;
pub mod info;
mod map;
mod meta;
mod open;
pub mod options;
mod plan;
mod populate;
mod read;
mod rename;
mod reopen;
mod repair;
mod resize;
mod snapshot;
mod sync;
mod view;
mod write;
mod zero;

use std::rc::Rc;

use blockferry_ring::{Ring, SharedBuf};

pub use amend::Amendment;
pub use gate::{Gate, OpenFiles, Reach, Role, Wanted};
pub use image::{Counted, Qcow2};
pub use info::{BitmapInfo, CheckReport, Info, MapExtent, Measured, Repair, SnapshotInfo};
pub use options::{Compat, CompressionType, CreateOptions, Preallocation};
pub use view::WhichSnapshot;

use crate::base::range::ByteRange;
use crate::block::{self, BlockError, Child, IoResult, Node, Operation};

/// What becomes of the backing file when an image is opened.
#[derive(Clone, Debug, Default)]
pub enum Backing {
    /// The one that the image names is opened.
    #[default]
    Named,
    /// None is opened. What the image does not hold reads as zeroes.
    None,
    /// This one stands in for it.
    Given(Rc<Node>),
}

/// How to open an image.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Without write access. Nothing is repaired then.
    pub read_only: bool,
    /// The layer below.
    pub backing: Backing,
    /// The file that holds the data, instead of the one that the image names.
    pub data_file: Option<Rc<Node>>,
    /// Not the disk as it is, but as this snapshot has it; read-only.
    pub snapshot: Option<WhichSnapshot>,
    /// To be checked or repaired: damage is no reason not to open it, and nothing is repaired yet.
    /// Guest writes are refused.
    pub for_check: bool,
}

impl Qcow2 {
    /// Makes an image in `file`, which is empty or whose contents are lost; it is durable afterwards.
    /// `data_file` has to be there if and only if the options name one; it gets the length of the disk.
    ///
    /// The backing file is only written down: it is not opened, and `options.size` must be said.
    ///
    /// # Errors
    /// `EINVAL` with a hint for options that do not go together; what the file says.
    pub async fn create(
        ring: &Ring,
        file: &Rc<Node>,
        data_file: Option<&Rc<Node>>,
        options: &CreateOptions,
    ) -> IoResult {
        Qcow2::create_image(ring, file, data_file, options).await
    }

    /// How large an image with these options would become (`qemu-img measure`) that is a copy of one with so many
    /// clusters of data, or an empty one.
    pub fn measure(options: &CreateOptions, data_clusters: Option<u64>) -> Measured {
        Qcow2::measure_image(options, data_clusters)
    }

    /// Bytes that bitmaps like these take in a new image with these options.
    pub fn measure_bitmaps(options: &CreateOptions, bitmaps: &[BitmapInfo]) -> u64 {
        bitmap::bytes_of(bitmaps, options.size, u64::from(options.cluster_size))
    }

    /// Bytes that a new image with these options needs at least of a device or a server's disk that has `room` bytes.
    pub fn needed_at_least(options: &CreateOptions, room: u64) -> u64 {
        Qcow2::least_bytes(options, room)
    }

    /// Opens the image in `file`. Other files that it names are opened through `files`.
    ///
    /// # Errors
    /// `EINVAL` with a hint for what is no image, damaged, encrypted, or uses unknown features;
    /// `EROFS` for a corrupt image that is to be written.
    pub async fn open(
        ring: &Ring,
        file: &Rc<Node>,
        files: &dyn OpenFiles,
        options: OpenOptions,
    ) -> Result<Rc<Qcow2>, BlockError> {
        Qcow2::open_image(ring, file, files, options).await
    }

    /// The file that holds the image.
    pub fn file(&self) -> Rc<Node> {
        self.file.node()
    }

    /// The layer below, where one is open.
    pub fn backing(&self) -> Option<Rc<Node>> {
        self.below()
    }

    /// How requests went so far.
    pub fn counted(&self) -> Counted {
        let counters = &self.counters;
        Counted {
            resolved: counters.resolved.get(),
            asked: counters.asked.get(),
            gathered: counters.gathered.get(),
            loads: counters.loads.get(),
            syncs: counters.syncs.get(),
        }
    }

    /// Facts about it, as they are now.
    pub async fn info(&self) -> Result<Info, BlockError> {
        match self.info_now().await {
            Ok(info) => Ok(info),
            Err(fault) => Err(self.tell_whole(Operation::Read, fault).await),
        }
    }

    /// The extent at `offset` (within the disk), at most `len` bytes: which layer has it, and where.
    pub async fn map(&self, offset: u64, len: u64) -> Result<MapExtent, BlockError> {
        match self.map_at(offset, len).await {
            Ok(extent) => Ok(extent),
            Err(fault) => {
                Err(self.tell(Operation::BlockStatus, ByteRange::at_saturating(offset, len), fault).await)
            }
        }
    }

    /// How far [`Qcow2::check`] is.
    pub fn check_progress(&self) -> &check::CheckProgress {
        &self.progress
    }

    /// Looks at all metadata, and repairs what `repair` says. Nobody may write meanwhile.
    pub async fn check(&self, repair: Repair) -> Result<CheckReport, BlockError> {
        match self.check_image(repair).await {
            Ok(report) => Ok(report),
            Err(fault) => Err(self.tell_whole(Operation::Read, fault).await),
        }
    }

    /// Changes the length of the disk. Shrinking loses what lies beyond. The room of new clusters is set
    /// aside as `preallocation` says. `ENOTSUP` with a hint where snapshots or bitmaps stand against it.
    pub async fn resize(&self, len: u64, preallocation: Preallocation) -> IoResult {
        self.resize_told(len, preallocation).await
    }

    /// Whether [`Qcow2::resize`] would do it. Nothing is changed.
    pub async fn check_resize(&self, len: u64, preallocation: Preallocation) -> IoResult {
        match self.judge_resize(len, preallocation) {
            Ok(_) => Ok(()),
            Err(fault) => Err(self.tell_whole(Operation::Resize, fault).await),
        }
    }

    /// Writes another backing file (and format) into the image, in one step as far as a power cut can tell,
    /// and durably. `None`: no backing file. Nothing is opened or copied: what `rebase -u` does.
    pub async fn set_backing(&self, backing: Option<(&str, Option<&str>)>) -> IoResult {
        match self.set_backing_name(backing).await {
            Ok(()) => Ok(()),
            Err(fault) => Err(self.tell_whole(Operation::Write, fault).await),
        }
    }

    /// Changes its version, how reference counts are kept, what its data file is called or how long its disk is; each of
    /// these in one step as far as a power cut can tell, and durably.
    ///
    /// # Errors
    /// `EINVAL` with the reason where the image has what cannot be said so; nothing is changed then.
    pub async fn amend(&self, to: &Amendment) -> IoResult {
        match self.amend_image(to).await {
            Ok(()) => Ok(()),
            Err(fault) => Err(self.tell_whole(Operation::Write, fault).await),
        }
    }

    /// Whether [`Qcow2::amend`] would do it. Nothing is changed.
    pub async fn check_amend(&self, to: &Amendment) -> IoResult {
        match self.judge_amendment(to).await {
            Ok(()) => Ok(()),
            Err(fault) => Err(self.tell_whole(Operation::Write, fault).await),
        }
    }

    /// Replaces the open layer below, without a word to the image. Nobody may use the image meanwhile.
    pub fn replace_backing(&self, backing: Option<&Rc<Node>>) -> IoResult {
        let child = self.backing.borrow().clone();
        match (child, backing) {
            (Some(child), Some(node)) => child.switch_to(node)?,
            (_, None) => drop(self.backing.take()),
            (None, Some(node)) => {
                let child = Child::inner(node, block::Role::Backing, self.name.clone());
                child.set_permissions(self.needs_below(self.permissions.get()))?;
                self.backing.replace(Some(child));
            }
        }
        *self.backing_name.borrow_mut() = backing.map(|node| node.driver().name().to_owned());
        Ok(())
    }

    /// Bytes of a cluster, which is compressed as a whole.
    pub fn cluster_size(&self) -> u64 {
        self.g.cluster_size()
    }

    /// Compresses one cluster and writes it. `offset` is a multiple of the cluster size, and `buf` a whole
    /// cluster, or what there is up to the end of the disk. What does not become smaller is written as it is.
    /// Several may be under way at once; the work is done on the ring's offload threads.
    /// The cluster has to be unallocated; else `EIO`, as in QEMU.
    pub async fn write_compressed(&self, offset: u64, buf: SharedBuf) -> IoResult {
        let mut bytes = vec![0; buf.len()];
        buf.copy_to(0, &mut bytes);
        drop(buf);
        self.write_compressed_bytes(offset, bytes).await
    }

    /// The same with bytes on the heap: a cluster may be larger than any buffer.
    pub async fn write_compressed_bytes(&self, offset: u64, bytes: Vec<u8>) -> IoResult {
        let range = ByteRange::at_saturating(offset, bytes.len() as u64);
        match self.write_compressed_guest(offset, bytes).await {
            Ok(()) => Ok(()),
            Err(fault) => Err(self.tell(Operation::Write, range, fault).await),
        }
    }

    /// Takes all that it holds out of it: it shows its backing file, or zeroes. Durable afterwards.
    pub async fn make_empty(&self) -> IoResult {
        match self.make_empty_image().await {
            Ok(()) => Ok(()),
            Err(fault) => Err(self.tell_whole(Operation::Discard, fault).await),
        }
    }

    /// Takes a snapshot named `name`; its id comes back. `date` is (seconds, nanoseconds) since the Epoch.
    /// Nobody may write meanwhile; it is durable afterwards.
    pub async fn snapshot_create(&self, name: &str, date: (u32, u32)) -> Result<String, BlockError> {
        match self.take_snapshot(name, date).await {
            Ok(done) => Ok(done),
            Err(fault) => Err(self.tell_whole(Operation::Write, fault).await),
        }
    }

    /// Makes the disk what it was (`name_or_id`: an id if there is such a one, else a name).
    /// `ENOENT` if there is no such snapshot.
    pub async fn snapshot_apply(&self, name_or_id: &str) -> IoResult {
        match self.apply_snapshot(name_or_id).await {
            Ok(done) => Ok(done),
            Err(fault) => Err(self.tell_whole(Operation::Write, fault).await),
        }
    }

    /// Deletes a snapshot.
    pub async fn snapshot_delete(&self, name_or_id: &str) -> IoResult {
        match self.delete_snapshot(name_or_id).await {
            Ok(done) => Ok(done),
            Err(fault) => Err(self.tell_whole(Operation::Write, fault).await),
        }
    }
}
