//! Making images: what a new file is to be, and how it becomes that.
//!
//! A new image is made in a file that is there already and empty; who made the file (under a hidden name, marked or
//! not) is not known here. Everything that is written is durable afterwards.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use blockferry_ring::arena::BLOCK_MAX;
use blockferry_ring::op::Fallocate;
use blockferry_ring::{Errno, Ring};

use super::admit::place;
use super::{Format, ImageOptions, named};
use crate::base::limits::DISK_LEN_MAX;
use crate::base::range::ByteRange;
use crate::base::units::parse_size;
use crate::block::{BlockError, IoResult, Node, Operation, WriteFlags, ZeroFlags};
use crate::format::qcow2::gate::understand;
use crate::format::qcow2::options::{extent_size_hint, on_off};
use crate::format::qcow2::{CreateOptions, Preallocation, Qcow2};
use crate::protocol::file::{CreateOptions as FileOptions, FileDriver};

/// Where formats have their headers.
const HEAD_BYTES: u64 = 4096;
const NO_SIZE: &str = "How large is the image to be? Say a size";

/// What is allocated of a new raw image, or of the part that is added to one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RawPreallocation {
    /// Nothing: it is all hole.
    #[default]
    Off,
    /// Room is set aside.
    Falloc,
    /// Zeroes are written out.
    Full,
}

impl RawPreallocation {
    /// The mode of this name; names are QEMU's.
    pub fn parse(name: &str) -> Result<RawPreallocation, String> {
        match name {
            "off" => Ok(RawPreallocation::Off),
            "falloc" => Ok(RawPreallocation::Falloc),
            "full" => Ok(RawPreallocation::Full),
            _ => Err(format!("'{name}' is no preallocation mode of raw images: off, falloc and full are")),
        }
    }
}

/// What a new image is to be.
#[derive(Clone, Debug)]
pub enum NewImage {
    /// The guest's bytes as they are.
    Raw {
        /// Bytes of the disk.
        len: u64,
        /// What is allocated.
        preallocation: RawPreallocation,
        /// The filesystem is not to copy its blocks when they are written.
        nocow: bool,
    },
    /// QEMU's thin disks.
    Qcow2(Box<CreateOptions>),
}

impl NewImage {
    /// The options that [`NewImage::parse`] knows, with what they mean.
    pub fn options(format: Format) -> &'static [(&'static str, &'static str)] {
        match format {
            Format::Raw => &[
                (
                    "extent_size_hint",
                    "Extent size hint for the image file, 0 to disable (read, and not needed)",
                ),
                ("nocow", "Turn off copy-on-write of the filesystem (Btrfs)"),
                ("preallocation", "Preallocation mode (allowed values: off, falloc, full)"),
                ("size", "Virtual disk size"),
            ],
            Format::Qcow2 => &CreateOptions::NAMES,
        }
    }

    /// From what the user says: a format, its options by name, and a length (which an option may say, too).
    pub fn parse(format: Format, options: &[(String, String)], len: Option<u64>) -> Result<NewImage, String> {
        match format {
            Format::Raw => {
                let (mut len, mut preallocation, mut nocow) = (len, RawPreallocation::Off, false);
                for (name, value) in options {
                    match name.as_str() {
                        "size" => len = Some(parse_size(value).map_err(|error| error.to_string())?),
                        "preallocation" => preallocation = RawPreallocation::parse(value)?,
                        "nocow" => nocow = on_off(value)?,
                        "extent_size_hint" => extent_size_hint(value)?,
                        _ => {
                            return Err(format!(
                                "Raw images have no option '{name}': they have extent_size_hint, \
                                 nocow, preallocation and size"
                            ));
                        }
                    }
                }
                let len = len.ok_or(NO_SIZE)?;
                Ok(NewImage::Raw { len, preallocation, nocow })
            }
            Format::Qcow2 => {
                let mut all = CreateOptions { size: u64::MAX, ..CreateOptions::default() };
                for (name, value) in options {
                    all.set(name, value)?;
                }
                all.size = match (all.size, len) {
                    (u64::MAX, Some(len)) => len,
                    (u64::MAX, None) => return Err(NO_SIZE.into()),
                    (said, _) => said,
                };
                Ok(NewImage::Qcow2(Box::new(all)))
            }
        }
    }

    /// Its format.
    pub fn format(&self) -> Format {
        match self {
            NewImage::Raw { .. } => Format::Raw,
            NewImage::Qcow2(_) => Format::Qcow2,
        }
    }

    /// Whether an image can be like that. `name` is what it will be called.
    pub fn check(&self, name: &str) -> Result<(), BlockError> {
        match self {
            NewImage::Raw { len, .. } if *len > DISK_LEN_MAX => {
                let why = format!("A disk has at most {DISK_LEN_MAX} bytes, and not {len}.");
                Err(BlockError::new(Operation::Create, name, Errno::EFBIG).because(why))
            }
            NewImage::Raw { .. } => Ok(()),
            NewImage::Qcow2(options) => Qcow2::check_new(name, options),
        }
    }

    /// Bytes that it needs at least of a device or a server's disk of `room` bytes, which has a length of its own.
    pub fn needs_at_least(&self, room: u64) -> u64 {
        match self {
            NewImage::Raw { len, .. } => *len,
            NewImage::Qcow2(options) => Qcow2::needed_at_least(options, room),
        }
    }

    /// Bytes of the disk.
    pub fn len(&self) -> u64 {
        match self {
            NewImage::Raw { len, .. } => *len,
            NewImage::Qcow2(options) => options.size,
        }
    }

    /// A disk of no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The image has a layer below that shows where nothing is written.
    pub fn has_backing(&self) -> bool {
        match self {
            NewImage::Raw { .. } => false,
            NewImage::Qcow2(options) => options.backing_file.is_some(),
        }
    }

    /// The name of the file that its data is in, where it has one of its own.
    pub fn data_file(&self) -> Option<&str> {
        match self {
            NewImage::Raw { .. } => None,
            NewImage::Qcow2(options) => options.data_file.as_deref(),
        }
    }

    /// Tells the filesystem what it is to know of the new file at `path`, which is still empty. Where it knows nothing of that,
    /// nothing is different.
    pub async fn prepare(&self, ring: &Ring, path: &Path) {
        let nocow = match self {
            NewImage::Raw { nocow, .. } => *nocow,
            NewImage::Qcow2(options) => options.nocow,
        };
        if !nocow {
            return;
        }
        let path = path.to_owned();
        let set = ring.offload(move || {
            let file = std::fs::File::open(path).ok()?;
            let flags = rustix::fs::ioctl_getflags(&file).ok()?;
            rustix::fs::ioctl_setflags(&file, flags | rustix::fs::IFlags::NOCOW).ok()
        });
        if set.await.ok().flatten().is_none() {
            tracing::info!("The filesystem has no copy-on-write to turn off for this file");
        }
    }

    /// Bytes that it occupies as soon as it is made, where room is set aside in it.
    pub fn room_min(&self) -> u64 {
        match self {
            NewImage::Raw { preallocation: RawPreallocation::Off, .. } => 0,
            NewImage::Raw { len, .. } => *len,
            NewImage::Qcow2(options) => match options.preallocation {
                Preallocation::Off | Preallocation::Metadata => 0,
                // With the data, wherever it lies.
                Preallocation::Falloc | Preallocation::Full => Qcow2::measure(options, None).fully_allocated,
            },
        }
    }

    /// Makes it in `file`, which is open for writing and empty. `path` is the name that the image will have: names of
    /// other files are relative to it.
    pub async fn write(&self, ring: &Ring, file: &Rc<Node>, path: &Path, beside: &Beside<'_>) -> IoResult {
        match self {
            NewImage::Qcow2(options) => {
                let data_file = match &options.data_file {
                    Some(name) => Some(beside.data_file(ring, path, name, options.size).await?),
                    None => None,
                };
                let made = Qcow2::create(ring, file, data_file.as_ref(), options).await;
                if made.is_err() {
                    beside.remove(ring, path, self);
                }
                made
            }
            NewImage::Raw { len, preallocation, .. } => {
                match file.set_len(*len).await {
                    // It has a length of its own. Nothing that was there is taken for an image.
                    Err(error) if error.errno == Errno::EOPNOTSUPP && file.len() >= *len => {
                        let head = file.len().min(HEAD_BYTES);
                        file.write_zeroes(0, head, ZeroFlags::default()).await?;
                    }
                    result => result?,
                }
                preallocate(ring, file, ByteRange::first(*len), *preallocation).await?;
                file.flush().await
            }
        }
    }
}

/// What stands beside a new image.
#[derive(Clone, Copy, Debug, Default)]
pub struct Beside<'a> {
    /// The data file that the image is to have, if it is there already: what is in it is lost. Without one it is made,
    /// and one that is there is left alone.
    pub data_file: Option<&'a Rc<Node>>,
    /// Permission bits of what is made.
    pub mode: Option<u32>,
}

impl Beside<'_> {
    /// The data file of a new image of `size` bytes, which reads as zeroes.
    async fn data_file(
        &self,
        ring: &Ring,
        image: &Path,
        name: &str,
        size: u64,
    ) -> Result<Rc<Node>, BlockError> {
        if let Some(there) = self.data_file {
            match there.set_len(0).await {
                Ok(()) => {}
                // A device keeps its length. What the image will show of it must be nothing of what was there.
                Err(error) if error.errno == Errno::EOPNOTSUPP => {
                    let flags = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
                    let len = size.min(there.len());
                    if len > 0 {
                        there.write_zeroes(0, len, flags).await?;
                    }
                }
                Err(error) => return Err(error),
            }
            return Ok(there.clone());
        }
        let path = place::leads_to(ring, &data_file_path(image, name)?).await;
        let options = FileOptions { mode: self.mode, ..FileOptions::default() };
        FileDriver::create(ring, &path, 0, options).await?;
        super::open::open_file(ring, &path, &ImageOptions::raw()).await
    }

    /// Making the image has failed, after all: what was made beside it goes, too.
    pub fn remove(&self, ring: &Ring, image: &Path, new: &NewImage) {
        let name = new.data_file().filter(|_| self.data_file.is_none());
        if let Some(path) = name.and_then(|name| data_file_path(image, name).ok()) {
            // Tidying up after an error that is told.
            let _ = ring.unlink(&place::end_of_links(&path));
        }
    }
}

/// Where the data file of an image lies.
pub fn data_file_path(image: &Path, name: &str) -> Result<PathBuf, BlockError> {
    let reference = understand(image, name).map_err(|error| named::failed(name, &error))?;
    Ok(reference.path)
}

/// Sets room aside in a range of a raw image that holds nothing yet.
pub async fn preallocate(ring: &Ring, file: &Rc<Node>, range: ByteRange, mode: RawPreallocation) -> IoResult {
    if mode == RawPreallocation::Off || range.is_empty() {
        return Ok(());
    }
    let refused = |errno| {
        BlockError::at(Operation::Resize, file.name(), range.start(), range.len(), errno)
            .hint("Room cannot be set aside here.")
    };
    if mode == RawPreallocation::Falloc {
        if let Some(allocated) = file.allocate(range.start(), range.len()) {
            return allocated.await;
        }
        let local = file.local_file().ok_or_else(|| refused(Errno::EOPNOTSUPP))?;
        let call = ring.fallocate(&local, Fallocate::Allocate, range.start(), range.len());
        return call.await.map(drop).map_err(refused);
    }
    let mut buf = ring.alloc(BLOCK_MAX).await;
    buf.as_mut_slice().fill(0);
    let zeroes = buf.freeze();
    for piece in range.chunks(BLOCK_MAX as u64) {
        let buf = zeroes.slice(0, piece.len() as usize);
        file.write(piece.start(), buf, WriteFlags::default()).await?;
    }
    Ok(())
}
