//! From what a person types to a driver: protocol by name, format by order.
//!
//! | name | what it is |
//! |---|---|
//! | `PATH`, `file:PATH` | a regular file or a block device |
//! | `mem:SIZE` | memory, all zeroes at first, gone at the end |
//! | `null:SIZE` | reads zeroes, forgets writes |
//! | `delay:TIME:NAME` | any of these, with so much latency added to every request |

use std::path::{Path, PathBuf};
use std::rc::Rc;

use blockferry_ring::{Errno, Ring};

use super::chain::Files;
use crate::base::units::{parse_duration, parse_size};
use crate::block::{BlockError, Driver, Operation};
use crate::format::qcow2::{self, Backing, Gate, Qcow2};
use crate::format::raw::RawDriver;
use crate::protocol::delay::DelayDriver;
use crate::protocol::mem::MemDriver;
use crate::protocol::null::NullDriver;
use crate::protocol::open::{Cache, OpenOptions};

use crate::format::probe::{FormatError, HEAD_BYTES, choose_format};

pub use crate::format::probe::Format;

/// How to open an image.
#[derive(Clone, Debug)]
pub struct ImageOptions {
    /// The format as the user said it; `None`: by the safe rule (docs/decisions/0001-format-probing.md).
    pub format: Option<Format>,
    /// Without write access.
    pub read_only: bool,
    /// Past the page cache or through it.
    pub cache: Cache,
    /// Keep other programs out.
    pub lock: bool,
    /// Raw only: where the disk begins in the file.
    pub offset: u64,
    /// Raw only: bytes of the disk.
    pub size: Option<u64>,
    /// Which other files the image may have opened for it.
    pub gate: Gate,
    /// The backing file is not opened: what the image does not hold reads as zeroes.
    pub no_backing: bool,
    /// To be checked or repaired: damage is no reason not to open it.
    pub for_check: bool,
    /// An image that has no header is raw even if it will be written: only for layers whose format another image
    /// should have recorded.
    pub guess_raw: bool,
}

impl Default for ImageOptions {
    fn default() -> ImageOptions {
        ImageOptions {
            format: None,
            read_only: false,
            cache: Cache::Direct,
            lock: true,
            offset: 0,
            size: None,
            gate: Gate::OwnDirectory,
            no_backing: false,
            for_check: false,
            guess_raw: false,
        }
    }
}

/// An open image, and what is special about its format.
#[derive(Clone, Debug)]
pub struct Image {
    /// To read and write.
    pub driver: Rc<dyn Driver>,
    /// Its format.
    pub format: Format,
    /// The same image, where its format is qcow2.
    pub qcow2: Option<Rc<Qcow2>>,
}

impl ImageOptions {
    /// For reading only.
    pub fn read_only() -> ImageOptions {
        ImageOptions { read_only: true, ..ImageOptions::default() }
    }

    /// A raw image, said so.
    pub fn raw() -> ImageOptions {
        ImageOptions { format: Some(Format::Raw), ..ImageOptions::default() }
    }
}

/// The path that a name leads to, through `delay:` too; `None` if it leads to none.
pub fn local_path(name: &str) -> Option<PathBuf> {
    if let Some(path) = name.strip_prefix("file:") {
        return Some(PathBuf::from(path));
    }
    if let Some(rest) = name.strip_prefix("delay:") {
        return local_path(rest.split_once(':')?.1);
    }
    let special = ["mem:", "null:", "delay:", "nbd:", "nbd+", "nbds", "gluster", "json:"];
    (!special.iter().any(|prefix| name.starts_with(prefix))).then(|| PathBuf::from(name))
}

/// Opens what `name` means. The format is the one that was said, or what the image's own header says by
/// the safe rule.
pub async fn open(ring: &Ring, name: &str, options: &ImageOptions) -> Result<Rc<dyn Driver>, BlockError> {
    Ok(open_image(ring, name, options).await?.driver)
}

/// The same, with what is special about the format.
pub async fn open_image(ring: &Ring, name: &str, options: &ImageOptions) -> Result<Image, BlockError> {
    open_layer(ring, name, options, &Files::new(ring, options)).await
}

/// Opens one layer of a chain; what it names is opened by `files`.
pub(super) async fn open_layer(
    ring: &Ring,
    name: &str,
    options: &ImageOptions,
    files: &Files,
) -> Result<Image, BlockError> {
    let child = open_protocol(ring, name, options)?;
    let format = match options.format {
        Some(format) => format,
        None if is_fresh(name) => Format::Raw,
        None => {
            let head = head(ring, &child).await?;
            let will_write = !options.read_only && !options.guess_raw;
            choose_format(None, &head, will_write).map_err(|error| error.of(name))?
        }
    };
    match format {
        Format::Raw => {
            let driver = with_format(ring, child, format, options)?;
            Ok(Image { driver, format, qcow2: None })
        }
        Format::Qcow2 => {
            let files = files.enter(&child)?;
            let open = qcow2::OpenOptions {
                read_only: options.read_only,
                backing: if options.no_backing { Backing::None } else { Backing::Named },
                data_file: None,
                for_check: options.for_check,
            };
            let qcow2 = Qcow2::open(ring, child, &files, open).await?;
            Ok(Image { driver: qcow2.clone(), format, qcow2: Some(qcow2) })
        }
    }
}

async fn head(ring: &Ring, child: &Rc<dyn Driver>) -> Result<Vec<u8>, BlockError> {
    let len = child.len().min(HEAD_BYTES as u64) as usize;
    let mut head = vec![0u8; HEAD_BYTES];
    if len > 0 {
        let (buf, result) = child.read(0, ring.alloc(len).await).await;
        result?;
        buf.copy_to(0, &mut head[..len]);
    }
    Ok(head)
}

/// Opens what `name` means, without looking into it: the format has to be said.
pub fn open_as_said(ring: &Ring, name: &str, options: &ImageOptions) -> Result<Rc<dyn Driver>, BlockError> {
    let Some(format) = options.format.or(is_fresh(name).then_some(Format::Raw)) else {
        return Err(FormatError::Unsaid.of(name));
    };
    with_format(ring, open_protocol(ring, name, options)?, format, options)
}

/// Made by opening it: there is nothing in it that could be mistaken for a format.
fn is_fresh(name: &str) -> bool {
    name.starts_with("mem:") || name.starts_with("null:")
}

fn with_format(
    ring: &Ring,
    child: Rc<dyn Driver>,
    format: Format,
    options: &ImageOptions,
) -> Result<Rc<dyn Driver>, BlockError> {
    match format {
        // Nothing of the raw format is needed to take all bytes as they are.
        Format::Raw if options.offset == 0 && options.size.is_none() => Ok(child),
        Format::Raw => Ok(Rc::new(RawDriver::open(ring, child, options.offset, options.size)?)),
        Format::Qcow2 => Err(BlockError::new(Operation::Open, child.name(), Errno::EINVAL)
            .hint("A qcow2 image has to be looked into to be opened: open it from within a task.")),
    }
}

fn open_protocol(ring: &Ring, name: &str, options: &ImageOptions) -> Result<Rc<dyn Driver>, BlockError> {
    let refuse = |why: String| Err(BlockError::new(Operation::Open, name, Errno::EINVAL).hint(why));
    if let Some(size) = name.strip_prefix("mem:") {
        return match parse_size(size) {
            Ok(size) => Ok(Rc::new(MemDriver::new(ring, name, size, options.read_only))),
            Err(error) => refuse(error.to_string()),
        };
    }
    if let Some(rest) = name.strip_prefix("delay:") {
        let Some((time, child)) = rest.split_once(':') else {
            return refuse("Say it as delay:TIME:NAME, such as delay:5ms:/images/a.img.".into());
        };
        return match parse_duration(time) {
            Ok(latency_ns) => {
                let child = open_protocol(ring, child, options)?;
                Ok(Rc::new(DelayDriver::new(ring, child, latency_ns)))
            }
            Err(error) => refuse(error.to_string()),
        };
    }
    if let Some(size) = name.strip_prefix("null:") {
        return match parse_size(size) {
            Ok(size) => Ok(Rc::new(NullDriver::new(ring, name, size, options.read_only))),
            Err(error) => refuse(error.to_string()),
        };
    }
    match local_path(name) {
        Some(path) => open_path(ring, &path, options),
        None => refuse(
            "This protocol is not supported yet. Give a path, mem:SIZE, null:SIZE or delay:TIME:NAME.".into(),
        ),
    }
}

fn open_path(ring: &Ring, path: &Path, options: &ImageOptions) -> Result<Rc<dyn Driver>, BlockError> {
    let open = OpenOptions { read_only: options.read_only, cache: options.cache, lock: options.lock };
    crate::protocol::open::open(ring, path, &open)
}
