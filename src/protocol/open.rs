//! Opening a path: what may be opened, and how. The part that files and block devices share.

use std::path::Path;
use std::rc::Rc;

use blockferry_ring::backend::OpenHow;
use blockferry_ring::{Errno, FileKind, Ring};

use super::file::FileDriver;
use super::host_device::HostDevice;
use super::leaf::{ALIGN_MAX, Leaf};
use crate::block::{BlockError, Driver, Operation};

/// Whether the page cache is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Cache {
    /// O_DIRECT; where the filesystem refuses it, the page cache after all, which is logged.
    #[default]
    Direct,
    /// The page cache.
    Buffered,
}

/// How to open an image.
#[derive(Clone, Copy, Debug)]
pub struct OpenOptions {
    /// Without write access.
    pub read_only: bool,
    /// Whether the page cache is used.
    pub cache: Cache,
    /// Keep out of other programs' way, and keep them out of ours ([`super::lock`]). Permissions are
    /// taken later, with [`Driver::set_permissions`].
    pub lock: bool,
}

impl Default for OpenOptions {
    fn default() -> OpenOptions {
        OpenOptions { read_only: false, cache: Cache::Direct, lock: true }
    }
}

/// Opens a regular file or a block device.
pub fn open(ring: &Ring, path: &Path, options: &OpenOptions) -> Result<Rc<dyn Driver>, BlockError> {
    Ok(match kind(ring, path)? {
        FileKind::Block => Rc::new(HostDevice::open(ring, path, options)?),
        _ => Rc::new(FileDriver::open(ring, path, options)?),
    })
}

pub(super) fn fail(operation: Operation, path: &Path, errno: Errno) -> BlockError {
    let error = BlockError::new(operation, path.display().to_string(), errno);
    match errno {
        Errno::EACCES | Errno::EPERM => {
            error.hint("This user may not: run as one who may, or change the permissions of the file.")
        }
        Errno::EROFS => error.hint("The filesystem is mounted read-only; open the image read-only too."),
        Errno::EMFILE => error.hint("Raise the limit of open files (`ulimit -n`)."),
        _ => error,
    }
}

/// What the path leads to: a regular file or a block device, or an error.
pub(super) fn kind(ring: &Ring, path: &Path) -> Result<FileKind, BlockError> {
    match ring.lookup(path).map_err(|errno| fail(Operation::Open, path, errno))? {
        None => Err(fail(Operation::Open, path, Errno::ENOENT)),
        Some(FileKind::Other) => Err(fail(Operation::Open, path, Errno::EINVAL).hint(
            "It is neither a regular file nor a block device (but a directory, a character device, a pipe \
             or a socket): give the path of an image.",
        )),
        Some(kind) => Ok(kind),
    }
}

/// Opens `path`, which has to be of the `wanted` kind.
pub(super) fn open_leaf(
    ring: &Ring,
    path: &Path,
    options: &OpenOptions,
    wanted: FileKind,
) -> Result<Leaf, BlockError> {
    let mut how = OpenHow {
        write: !options.read_only,
        direct: options.cache == Cache::Direct,
        create_new: false,
        mode: None,
        exclusive_device: wanted == FileKind::Block && !options.read_only,
    };
    let failed = |errno| match errno {
        Errno::EBUSY if wanted == FileKind::Block => fail(Operation::Open, path, errno).hint(
            "The device is in use: mounted, or part of a RAID, of LVM or of another device. Unmount it or \
             detach it first, or open it read-only.",
        ),
        Errno::EROFS if wanted == FileKind::Block => BlockError::new(
            Operation::Open,
            path.display().to_string(),
            errno,
        )
        .hint(
            "The device is read-only (`blockdev --getro` tells): make it writable, or open it read-only too.",
        ),
        errno => fail(Operation::Open, path, errno),
    };
    let opened = match ring.open(path, &how) {
        Err(Errno::EINVAL) if how.direct => {
            tracing::warn!(path = %path.display(), "O_DIRECT is refused here; the page cache is used");
            how.direct = false;
            ring.open(path, &how)
        }
        opened => opened,
    };
    let mut file = opened.map_err(failed)?;
    let mut info = ring.info(&file).map_err(failed)?;
    if info.kind != wanted {
        return Err(fail(Operation::Open, path, Errno::EAGAIN)
            .hint("What the path leads to changed meanwhile: try again."));
    }
    if info.offset_align > ALIGN_MAX || info.mem_align > ALIGN_MAX {
        tracing::warn!(
            path = %path.display(),
            block_bytes = info.offset_align,
            "the blocks of O_DIRECT are too large here; the page cache is used"
        );
        how.direct = false;
        // An exclusive device cannot be opened a second time while the first handle is there.
        drop(file);
        file = ring.open(path, &how).map_err(failed)?;
        info = ring.info(&file).map_err(failed)?;
    }
    Leaf::new(ring, path.to_owned(), file, info, how)
}
