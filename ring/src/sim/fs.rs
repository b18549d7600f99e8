//! Files, their names and attributes, locks, and what each file can do.
//!
//! A [`FileModel`] says what a file is and what its filesystem or device lends it: alignment for
//! direct I/O, hole punching, space, speed. Entries and attributes are volatile like contents are: a
//! new entry becomes durable with a sync of its file or of its directory, a removed or renamed one with
//! the directory, an attribute with a full sync of the file. Directories are there from the start and
//! are never lost.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::disk::Disk;
use super::latency::Latency;
use super::ledger::Ledger;
use crate::backend::{FileInfo, FileKind, LockRange};

/// What a block device does with a discarded range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiscardModel {
    /// It does not know discards.
    Refused,
    /// The range reads as zeroes.
    Zeroes,
    /// The range reads as it did, as zeroes, or as anything: one of them, as the seed has it.
    Anything,
}

/// What a file is and can do.
#[derive(Clone, Debug)]
pub struct FileModel {
    /// Regular file or block device.
    pub kind: FileKind,
    /// Bytes at the start (all zeroes, nothing allocated); the size of a block device.
    pub len: u64,
    /// Opening for writing is refused with `EROFS`.
    pub read_only: bool,
    /// O_DIRECT is to be had; opening with it is refused with `EINVAL` otherwise.
    pub direct: bool,
    /// What O_DIRECT needs of memory addresses.
    pub mem_align: u32,
    /// What O_DIRECT needs of offsets and lengths, and a block device of zeroing and discarding.
    pub offset_align: u32,
    /// `Fallocate::PunchHole` is known.
    pub punch_hole: bool,
    /// `Fallocate::ZeroRange` is known.
    pub zero_range: bool,
    /// `Fallocate::Allocate` is known (never on a block device).
    pub allocate: bool,
    /// The first `ZeroRange` ends `PunchHole`, as on a loop device over tmpfs.
    pub zero_range_ends_punch_hole: bool,
    /// What a discard does (block devices only).
    pub discard: DiscardModel,
    /// Holes can be looked for; if not, a regular file is all data.
    pub seek: bool,
    /// Extended attributes are to be had.
    pub attributes: bool,
    /// Bytes that may be allocated before `ENOSPC`.
    pub capacity_bytes: Option<u64>,
    /// Writes are durable when they complete.
    pub write_through: bool,
    /// The grain at which a power cut tears writes.
    pub sector_bytes: u32,
    /// How long operations take.
    pub latency: Latency,
}

impl FileModel {
    /// A regular file on a capable filesystem.
    pub fn regular(len: u64) -> FileModel {
        FileModel {
            kind: FileKind::Regular,
            len,
            read_only: false,
            direct: true,
            mem_align: 512,
            offset_align: 512,
            punch_hole: true,
            zero_range: true,
            allocate: true,
            zero_range_ends_punch_hole: false,
            discard: DiscardModel::Refused,
            seek: true,
            attributes: true,
            capacity_bytes: None,
            write_through: false,
            sector_bytes: 512,
            latency: Latency::FAST_DISK,
        }
    }

    /// A block device.
    pub fn block(len: u64) -> FileModel {
        FileModel {
            kind: FileKind::Block,
            allocate: false,
            discard: DiscardModel::Anything,
            seek: false,
            attributes: false,
            ..FileModel::regular(len)
        }
    }
}

/// A holder of locks that is no open file of any ring: another process, played by the test driver.
pub(super) const FOREIGN: u32 = u32::MAX;

#[derive(Clone, Debug)]
pub(super) struct Inode {
    pub(super) model: FileModel,
    pub(super) disk: Disk,
    pub(super) attributes: Ledger<String, Vec<u8>>,
    pub(super) locks: Vec<(u32, LockRange)>,
    pub(super) zero_range_seen: bool,
    /// Mounted or otherwise in use: `exclusive_device` is refused.
    pub(super) busy: bool,
    /// Pairs of writes that were in flight at once and had bytes in common.
    pub(super) overlaps: u64,
}

impl Inode {
    fn new(model: FileModel) -> Inode {
        Inode {
            disk: Disk::new(model.len),
            model,
            attributes: Ledger::default(),
            locks: Vec::new(),
            zero_range_seen: false,
            busy: false,
            overlaps: 0,
        }
    }

    pub(super) fn is_block(&self) -> bool {
        self.model.kind == FileKind::Block
    }

    pub(super) fn info(&self, number: u64, direct: bool) -> FileInfo {
        let model = &self.model;
        FileInfo {
            kind: model.kind,
            len: self.disk.len(),
            allocated: if self.is_block() { self.disk.len() } else { self.disk.live().allocated_bytes() },
            mem_align: if direct { model.mem_align } else { 1 },
            offset_align: if direct { model.offset_align } else { 1 },
            identity: (1, number),
            is_local: true,
            device: self.is_block().then_some((8, number as u32)),
            mode: 0o644,
            group: 0,
            links: 1,
        }
    }

    /// Pages that may still be allocated.
    pub(super) fn pages_free(&self) -> u64 {
        match self.model.capacity_bytes {
            Some(capacity) if !self.is_block() => {
                capacity.saturating_sub(self.disk.live().allocated_bytes()) / super::pages::PAGE
            }
            _ => u64::MAX,
        }
    }

    pub(super) fn lock_conflict(&self, holder: u32, range: LockRange) -> bool {
        let end = range.start.saturating_add(range.len);
        self.locks.iter().any(|(other, lock)| {
            *other != holder && lock.start < end && range.start < lock.start.saturating_add(lock.len)
        })
    }

    pub(super) fn lock(&mut self, holder: u32, range: LockRange) {
        self.unlock(holder, range);
        self.locks.push((holder, range));
    }

    /// Takes a range out of what `holder` has locked; a lock that covers more keeps its rest.
    pub(super) fn unlock(&mut self, holder: u32, range: LockRange) {
        let end = range.start.saturating_add(range.len);
        let mut left = Vec::new();
        for (other, lock) in self.locks.drain(..) {
            let lock_end = lock.start.saturating_add(lock.len);
            if other != holder || lock_end <= range.start || end <= lock.start {
                left.push((other, lock));
                continue;
            }
            for (start, end) in [(lock.start, range.start), (end, lock_end)] {
                if start < end {
                    left.push((other, LockRange { start, len: end - start }));
                }
            }
        }
        self.locks = left;
    }

    pub(super) fn unlock_all(&mut self, holder: u32) {
        self.locks.retain(|(other, _)| *other != holder);
    }
}

#[derive(Clone, Debug)]
pub(super) struct Fs {
    pub(super) names: Ledger<PathBuf, u64>,
    directories: BTreeSet<PathBuf>,
    pub(super) inodes: BTreeMap<u64, Inode>,
    inode_next: u64,
    /// The model of files that are created.
    pub(super) new_file: FileModel,
}

impl Fs {
    pub(super) fn new(new_file: FileModel) -> Fs {
        let directories = ["", ".", "/"].map(PathBuf::from).into();
        Fs { names: Ledger::default(), directories, inodes: BTreeMap::new(), inode_next: 2, new_file }
    }

    pub(super) fn add_directory(&mut self, path: &Path) {
        self.directories.extend(path.ancestors().map(Path::to_path_buf));
    }

    pub(super) fn has_directory(&self, path: &Path) -> bool {
        self.directories.contains(path)
    }

    pub(super) fn find(&self, path: &Path) -> Option<u64> {
        self.names.live().get(path).copied()
    }

    pub(super) fn inode(&self, path: &Path) -> Option<&Inode> {
        self.find(path).and_then(|number| self.inodes.get(&number))
    }

    pub(super) fn inode_mut(&mut self, path: &Path) -> Option<&mut Inode> {
        self.find(path).and_then(|number| self.inodes.get_mut(&number))
    }

    /// Makes a file; its entry is volatile.
    pub(super) fn create(&mut self, now: u64, path: &Path, model: FileModel) -> u64 {
        let number = self.inode_next;
        self.inode_next += 1;
        self.inodes.insert(number, Inode::new(model));
        self.names.change(now, vec![(path.to_path_buf(), Some(number))]);
        number
    }

    /// Makes the entry durable under which a file was created. Entries that moved it are the
    /// directory's business.
    pub(super) fn settle_creation(&mut self, number: u64, submitted: u64) {
        self.names
            .settle(|now, changes| now < submitted && matches!(changes[..], [(_, Some(n))] if n == number));
    }

    pub(super) fn sync_directory(&mut self, path: &Path) {
        let inside = |entry: &PathBuf| entry.parent() == Some(path);
        self.names.settle(|_, changes| changes.iter().any(|(entry, _)| inside(entry)));
    }

    /// Forgets files that have no name in any view and are not open.
    pub(super) fn forget_unreachable(&mut self, is_open: impl Fn(u64) -> bool) {
        let named: BTreeSet<u64> = self.names.reachable().copied().collect();
        self.inodes.retain(|number, _| named.contains(number) || is_open(*number));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locks_are_cut_and_conflict_only_with_others() {
        let mut inode = Inode::new(FileModel::regular(0));
        let range = |start, len| LockRange { start, len };
        inode.lock(1, range(100, 10));
        assert!(!inode.lock_conflict(1, range(0, 1000)));
        assert!(inode.lock_conflict(2, range(109, 1)) && !inode.lock_conflict(2, range(110, 1)));
        inode.unlock(1, range(103, 2));
        assert_eq!(inode.locks, [(1, range(100, 3)), (1, range(105, 5))]);
        inode.lock(1, range(100, 10));
        assert_eq!(inode.locks, [(1, range(100, 10))]);
        inode.unlock_all(1);
        assert!(inode.locks.is_empty());
    }

    #[test]
    fn names_and_files_come_and_go() {
        let mut fs = Fs::new(FileModel::regular(0));
        fs.add_directory(Path::new("/a/b"));
        assert!(fs.has_directory(Path::new("/a")) && fs.has_directory(Path::new("/a/b")));
        let number = fs.create(1, Path::new("/a/b/c"), FileModel::regular(5));
        fs.sync_directory(Path::new("/a"));
        assert!(fs.names.durable().is_empty());
        fs.settle_creation(number, 1);
        assert!(fs.names.durable().is_empty());
        fs.settle_creation(number, 2);
        assert_eq!(fs.names.durable().len(), 1);
        fs.names.change(3, vec![("/a/b/c".into(), None)]);
        fs.forget_unreachable(|_| false);
        assert_eq!(fs.inodes.len(), 1);
        fs.sync_directory(Path::new("/a/b"));
        fs.forget_unreachable(|_| false);
        assert!(fs.inodes.is_empty());
    }
}
