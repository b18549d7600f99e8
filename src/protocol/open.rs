//! Opening a path: what may be opened, and how. The part that files and block devices share.

use std::path::Path;
use std::rc::Rc;

use blockferry_ring::backend::OpenHow;
use blockferry_ring::sync::at_once;
use blockferry_ring::{Aside, Errno, FileKind, Ring};

use super::file::FileDriver;
use super::host_device::HostDevice;
use super::leaf::{ALIGN_MAX, Leaf};
use crate::base::os_name;
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
    /// The option by which the user could do without locks, for messages about those of others.
    pub without_locks: Option<&'static str>,
}

impl Default for OpenOptions {
    fn default() -> OpenOptions {
        OpenOptions { read_only: false, cache: Cache::Direct, lock: true, without_locks: None }
    }
}

/// Opens a regular file or a block device, in place: for those who serve nobody yet.
pub fn open(ring: &Ring, path: &Path, options: &OpenOptions) -> Result<Rc<dyn Driver>, BlockError> {
    in_place(path, open_by(ring, &ring.in_place(), path, options))
}

/// Opens a regular file or a block device; whoever is served meanwhile does not wait for it.
pub async fn open_aside(
    ring: &Ring,
    path: &Path,
    options: &OpenOptions,
) -> Result<Rc<dyn Driver>, BlockError> {
    open_by(ring, &ring.aside(), path, options).await
}

async fn open_by(
    ring: &Ring,
    aside: &Aside,
    path: &Path,
    options: &OpenOptions,
) -> Result<Rc<dyn Driver>, BlockError> {
    Ok(match kind(aside, path).await? {
        FileKind::Block => Rc::new(HostDevice::open_by(ring, aside, path, options).await?),
        _ => Rc::new(FileDriver::open_by(ring, aside, path, options).await?),
    })
}

/// What comes of opening by calls that are made in place, and so never wait.
pub(super) fn in_place<T>(
    path: &Path,
    opening: impl Future<Output = Result<T, BlockError>>,
) -> Result<T, BlockError> {
    at_once(opening).unwrap_or_else(|| Err(fail(Operation::Open, path, Errno::EAGAIN)))
}

pub(super) fn fail(operation: Operation, path: &Path, errno: Errno) -> BlockError {
    let error = BlockError::new(operation, os_name::from_path(path), errno);
    match errno {
        Errno::EACCES | Errno::EPERM if rustix::process::geteuid().is_root() => error.hint(
            "The kernel does not let even root open it so: it may be immutable (`lsattr`), read-only, on a filesystem that \
             does not trust this root, or kept from this container.",
        ),
        Errno::EACCES | Errno::EPERM => {
            error.hint("This user may not: run as one who may, or change the permissions of the file.")
        }
        Errno::EROFS => error.hint("The filesystem is mounted read-only; open the image read-only too."),
        Errno::EMFILE => error.hint("Raise the limit of open files (`ulimit -n`)."),
        _ => error,
    }
}

/// What the path leads to: a regular file or a block device, or an error.
pub(super) async fn kind(aside: &Aside, path: &Path) -> Result<FileKind, BlockError> {
    match aside.lookup(path).await.map_err(|errno| fail(Operation::Open, path, errno))? {
        None => Err(fail(Operation::Open, path, Errno::ENOENT)),
        Some(FileKind::Other) => Err(fail(Operation::Open, path, Errno::EINVAL).hint(
            "It is neither a regular file nor a block device (but a directory, a character device, a pipe \
             or a socket): give the path of an image.",
        )),
        Some(kind) => Ok(kind),
    }
}

/// Opens `path`, which has to be of the `wanted` kind.
pub(super) async fn open_leaf(
    ring: &Ring,
    aside: &Aside,
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
            os_name::from_path(path),
            errno,
        )
        .hint(
            "The device is read-only (`blockdev --getro` tells): make it writable, or open it read-only too.",
        ),
        errno => fail(Operation::Open, path, errno),
    };
    let opened = match aside.open(path, &how).await {
        Err(Errno::EINVAL) if how.direct => {
            tracing::warn!(path = %path.display(), "O_DIRECT is refused here; the page cache is used");
            how.direct = false;
            aside.open(path, &how).await
        }
        opened => opened,
    };
    let mut file = opened.map_err(failed)?;
    let mut info = aside.info(&file).await.map_err(failed)?;
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
        file = aside.open(path, &how).await.map_err(failed)?;
        info = aside.info(&file).await.map_err(failed)?;
    }
    Leaf::new(ring, aside, path.to_owned(), file, info, how).await
}
