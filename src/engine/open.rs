//! From what a person types to a driver: protocol by name, format by order.
//!
//! | name | what it is |
//! |---|---|
//! | `PATH`, `file:PATH` | a regular file or a block device |
//! | `mem:SIZE` | memory, all zeroes at first, gone at the end |
//! | `null:SIZE` | reads zeroes, forgets writes |
//! | `nbd://…`, `nbd+tcp://…`, `nbd+unix://…`, `nbd:…` | an NBD server's disk; so are `json:{…}` and `driver=nbd,…` |
//! | `delay:TIME:NAME` | any of these, with so much latency added to every request |

use std::path::{Path, PathBuf};
use std::rc::Rc;

use blockferry_ring::{Errno, Ring};

use crate::base::units::{parse_duration, parse_size};
use crate::block::{BlockError, Driver, Operation};
use crate::format::raw::RawDriver;
use crate::protocol::delay::DelayDriver;
use crate::protocol::mem::MemDriver;
use crate::protocol::null::NullDriver;
use crate::protocol::open::{Cache, OpenOptions};

use super::remote::{ServerOptions, is_remote};
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
    /// How servers are treated.
    pub server: ServerOptions,
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
            server: ServerOptions::default(),
        }
    }
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
    let special = ["mem:", "null:", "delay:", "nbd:", "nbd+", "nbds", "gluster", "json:", "driver="];
    (!special.iter().any(|prefix| name.starts_with(prefix))).then(|| PathBuf::from(name))
}

/// Opens what `name` means. The format is the one that was said, or what the image's own header says by
/// the safe rule.
pub async fn open(ring: &Ring, name: &str, options: &ImageOptions) -> Result<Rc<dyn Driver>, BlockError> {
    let child = match is_remote(name) {
        true => super::remote::open(ring, name, options).await?,
        false => open_protocol(ring, name, options)?,
    };
    let format = match options.format {
        Some(format) => format,
        None if is_fresh(name) => Format::Raw,
        None => {
            let len = child.len().min(HEAD_BYTES as u64) as usize;
            let mut head = vec![0u8; HEAD_BYTES];
            if len > 0 {
                let (buf, result) = child.read(0, ring.alloc(len).await).await;
                result?;
                buf.copy_to(0, &mut head[..len]);
            }
            choose_format(None, &head, !options.read_only).map_err(|error| error.of(name))?
        }
    };
    with_format(ring, child, format, options)
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
        None if is_remote(name) => {
            refuse("A disk on a server is opened in a task, because its server has to be asked.".into())
        }
        None => refuse(
            "This protocol is not supported yet. Give a path, nbd://HOST/EXPORT, mem:SIZE, null:SIZE or \
             delay:TIME:NAME."
                .into(),
        ),
    }
}

fn open_path(ring: &Ring, path: &Path, options: &ImageOptions) -> Result<Rc<dyn Driver>, BlockError> {
    let open = OpenOptions { read_only: options.read_only, cache: options.cache, lock: options.lock };
    crate::protocol::open::open(ring, path, &open)
}
