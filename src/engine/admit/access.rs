//! Who may read and write what, and how much room there is: what the filesystem says before anything is asked of it.
//!
//! A copy is never readable by more people than what it is a copy of. It gets the narrow permission bits when it is made, so
//! that there is no moment at which more could open it.

use std::path::Path;
use std::rc::Rc;

use blockferry_ring::{Errno, Ring};
use rustix::fs::Access;

use super::place::folder;
use super::{Refusal, own_leaves};
use crate::base::os_name;
use crate::base::units::fmt_bytes;
use crate::block::{BlockError, Driver, Operation};

/// Permission bits of a file that is made where nothing is known of who may read it, before the process's umask.
pub const FILE_MODE: u32 = 0o644;

/// A file that is read: its permission bits, and the group that they are for.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    mode: u32,
    group: u32,
}

/// The files that hold a disk, those of all layers.
pub(super) fn sources(ring: &Ring, disk: &Rc<dyn Driver>) -> Vec<Source> {
    let mut found = Vec::new();
    let mut layer = Some(disk.clone());
    while let Some(driver) = layer {
        let files = own_leaves(&driver).into_iter().filter_map(|leaf| leaf.local_file());
        let infos = files.filter_map(|file| ring.info(&file).ok());
        found.extend(infos.map(|info| Source { mode: info.mode, group: info.group }));
        layer = super::below(&driver);
    }
    found
}

/// Permission bits for a new file in `dir` that holds what these hold.
pub(super) async fn narrowed(ring: &Ring, sources: &[Source], dir: Option<&Path>) -> u32 {
    let Some(dir) = dir.filter(|_| !sources.is_empty()) else { return FILE_MODE };
    let dir = dir.to_owned();
    let group = ring.offload(move || group_in(&dir)).await.ok().flatten();
    sources.iter().fold(FILE_MODE, |mode, source| mode & readable(*source, group))
}

/// The group of a new file.
fn group_in(dir: &Path) -> Option<u32> {
    use std::os::unix::fs::MetadataExt;
    let found = std::fs::metadata(dir).ok()?;
    let passes_its_group_on = found.mode() & 0o2000 != 0;
    Some(if passes_its_group_on { found.gid() } else { rustix::process::getegid().as_raw() })
}

/// Bits of a file of `group` that let nobody read it who may not read `source`.
fn readable(source: Source, group: Option<u32>) -> u32 {
    let (by_group, by_others) = (source.mode & 0o040 != 0, source.mode & 0o004 != 0);
    let (by_group, by_others) = match group == Some(source.group) {
        true => (by_group, by_others),
        // Those of the source's group are others to the new file, and the reverse.
        false => (by_group && by_others, by_group && by_others),
    };
    0o600 | if by_group { 0o040 } else { 0 } | if by_others { 0o004 } else { 0 }
}

/// Whether this process may write what `leaf` is a file or device of, which may be open to be read only.
pub(super) async fn may_write(ring: &Ring, leaf: &Rc<dyn Driver>) -> Result<(), BlockError> {
    if leaf.local_file().is_none() {
        return Ok(());
    }
    let name = leaf.name().to_owned();
    let result = accessible(ring, &os_name::to_path(&name), Access::WRITE_OK).await;
    result.map_err(|errno| BlockError::new(Operation::Open, name, errno).hint("It has to be written."))
}

/// Whether this process may make `path`.
pub(super) async fn may_make_in(ring: &Ring, path: &Path) -> Result<(), BlockError> {
    let result = accessible(ring, &folder(path), Access::WRITE_OK | Access::EXEC_OK).await;
    result.map_err(|errno| {
        let hint = match errno {
            Errno::ENOENT => "The directory does not exist.",
            Errno::EROFS => "The filesystem is mounted read-only.",
            _ => "This user may not make files in that directory.",
        };
        BlockError::new(Operation::Create, os_name::from_path(path), errno).because(hint)
    })
}

async fn accessible(ring: &Ring, path: &Path, access: Access) -> Result<(), Errno> {
    let path = path.to_owned();
    ring.offload(move || {
        rustix::fs::accessat(rustix::fs::CWD, &path, access, rustix::fs::AtFlags::EACCESS)
            .map_err(Errno::from)
    })
    .await?
}

/// Whether a path leads to a directory.
pub(super) async fn is_directory(ring: &Ring, path: &Path) -> bool {
    let path = path.to_owned();
    ring.offload(move || path.is_dir()).await.unwrap_or(false)
}

/// Bytes that this process may still allocate in a directory's filesystem.
pub(super) async fn room(ring: &Ring, dir: &Path) -> Option<u64> {
    let dir = dir.to_owned();
    let found = ring.offload(move || rustix::fs::statvfs(&dir).ok()).await.ok().flatten()?;
    let is_root = rustix::process::geteuid().is_root();
    let blocks = if is_root { found.f_bfree } else { found.f_bavail };
    Some(blocks.saturating_mul(found.f_frsize))
}

/// Bytes of a disk that are not zero for certain; of its uppermost layer only, if that is said. At most this many are
/// copied.
pub async fn data_bytes(disk: &Rc<dyn Driver>, top_only: bool) -> Result<u64, BlockError> {
    let (mut at, mut counted) = (0, 0);
    while at < disk.len() {
        let extent = disk.block_status(at, disk.len() - at).await?;
        let len = extent.len.clamp(1, disk.len() - at);
        if !extent.zero && (extent.allocated || !top_only) {
            counted += len;
        }
        at += len;
    }
    Ok(counted)
}

/// Whether this process may make a file as long as that.
pub(super) fn within_file_limit(name: &str, len: u64) -> Result<(), Refusal> {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Fsize).current;
    match limit.filter(|limit| len > *limit) {
        Some(limit) => Err(BlockError::new(Operation::Create, name, Errno::EFBIG)
            .because(format!(
                "It is to have {len} bytes, and this process may write files of at most {}: raise the limit \
                 (`ulimit -f`).",
                fmt_bytes(limit)
            ))
            .into()),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_read_by_no_more_people_than_its_source() {
        let bits = |mode, group| readable(Source { mode, group: 7 }, group);
        for (mode, same, other) in [
            (0o644, 0o644, 0o644),
            (0o600, 0o600, 0o600),
            (0o640, 0o640, 0o600),
            (0o604, 0o604, 0o600),
            (0o666, 0o644, 0o644),
            (0o400, 0o600, 0o600),
        ] {
            assert_eq!(bits(mode, Some(7)), same, "{mode:o} in its own group");
            assert_eq!(bits(mode, Some(8)), other, "{mode:o} in another group");
            assert_eq!(bits(mode, None), other, "{mode:o} in a group that is not known");
        }
    }
}
