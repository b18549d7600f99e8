//! Making images: what a new file is to be, and how it becomes that.
//!
//! A new image is made in a file that is there already and empty; who made the file (under a hidden name, marked or
//! not) is not known here. Everything that is written is durable afterwards.

use std::rc::Rc;

use blockferry_ring::arena::BLOCK_MAX;
use blockferry_ring::op::Fallocate;
use blockferry_ring::{Errno, Ring};

use super::Format;
use crate::base::range::ByteRange;
use crate::base::units::parse_size;
use crate::block::{BlockError, Driver, IoResult, Operation, WriteFlags};

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
    },
}

impl NewImage {
    /// From what the user says: a format, its options by name, and a length (which an option may say, too).
    pub fn parse(format: Format, options: &[(String, String)], len: Option<u64>) -> Result<NewImage, String> {
        match format {
            Format::Raw => {
                let (mut len, mut preallocation) = (len, RawPreallocation::Off);
                for (name, value) in options {
                    match name.as_str() {
                        "size" => len = Some(parse_size(value).map_err(|error| error.to_string())?),
                        "preallocation" => preallocation = RawPreallocation::parse(value)?,
                        _ => {
                            return Err(format!(
                                "Raw images have no option '{name}': they have size and preallocation"
                            ));
                        }
                    }
                }
                let len = len.ok_or("How large is the image to be? Say a size")?;
                Ok(NewImage::Raw { len, preallocation })
            }
            Format::Qcow2 => Err("New qcow2 images cannot be made by this command yet".into()),
        }
    }

    /// Its format.
    pub fn format(&self) -> Format {
        match self {
            NewImage::Raw { .. } => Format::Raw,
        }
    }

    /// Bytes of the disk.
    pub fn len(&self) -> u64 {
        match self {
            NewImage::Raw { len, .. } => *len,
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
        }
    }

    /// Makes it in `file`, which is open for writing and empty.
    pub async fn write(&self, ring: &Ring, file: &Rc<dyn Driver>) -> IoResult {
        match self {
            NewImage::Raw { len, preallocation } => {
                file.set_len(*len).await?;
                preallocate(ring, file, ByteRange::first(*len), *preallocation).await?;
                file.flush().await
            }
        }
    }
}

/// Sets room aside in a range of a raw image that holds nothing yet.
pub async fn preallocate(
    ring: &Ring,
    file: &Rc<dyn Driver>,
    range: ByteRange,
    mode: RawPreallocation,
) -> IoResult {
    if mode == RawPreallocation::Off || range.is_empty() {
        return Ok(());
    }
    let refused = |errno| {
        BlockError::at(Operation::Resize, file.name(), range.start(), range.len(), errno)
            .hint("Room cannot be set aside here.")
    };
    let local = file.local_file().ok_or_else(|| refused(Errno::EOPNOTSUPP))?;
    if mode == RawPreallocation::Falloc {
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
