//! Control calls on files that are more than a look at a table: opening, seeking, setting a length.

use std::path::Path;

use super::disk::Change;
use super::flight::{OpenFile, Target};
use super::inner::Inner;
use crate::backend::OpenHow;
use crate::errno::Errno;
use crate::op::FileId;

impl Inner {
    pub(super) fn open(&mut self, port: u32, path: &Path, how: &OpenHow) -> Result<FileId, Errno> {
        if self.fs.has_directory(path) {
            return Err(Errno::EISDIR);
        }
        let found = self.fs.find(path);
        if how.create_new {
            let parent = path.parent().unwrap_or(Path::new(""));
            if found.is_some() {
                return Err(Errno::EEXIST);
            } else if !self.fs.has_directory(parent) {
                return Err(Errno::ENOENT);
            } else if how.direct && !self.fs.new_file.direct {
                return Err(Errno::EINVAL);
            }
            let model = self.fs.new_file.clone();
            let now = self.next();
            self.fs.create(now, path, model);
        }
        let number = self.fs.find(path).ok_or(Errno::ENOENT)?;
        let inode = self.fs.inodes.get(&number).ok_or(Errno::ENOENT)?;
        let exclusive = how.exclusive_device && inode.is_block();
        let taken = |open: &OpenFile| open.target == Target::Disk(number) && open.exclusive;
        if how.write && inode.model.read_only {
            return Err(Errno::EROFS);
        } else if how.direct && !inode.model.direct {
            return Err(Errno::EINVAL);
        } else if exclusive && (inode.busy || self.files.values().any(taken)) {
            return Err(Errno::EBUSY);
        }
        let file = OpenFile {
            port,
            label: path.display().to_string().into(),
            target: Target::Disk(number),
            write: how.write,
            direct: how.direct,
            exclusive,
        };
        Ok(FileId(self.add_file(file)))
    }

    pub(super) fn seek(&mut self, number: u64, offset: u64, data: bool) -> Result<u64, Errno> {
        let inode = self.fs.inodes.get(&number).ok_or(Errno::EBADF)?;
        let len = inode.disk.len();
        if inode.is_block() {
            return Err(Errno::EINVAL);
        } else if offset >= len {
            return Err(Errno::ENXIO);
        } else if !inode.model.seek {
            return Ok(if data { offset } else { len });
        }
        let at = inode.disk.live().next(offset, len, data);
        if data && at >= len { Err(Errno::ENXIO) } else { Ok(at) }
    }

    pub(super) fn set_len(&mut self, file: FileId, number: u64, len: u64) -> Result<(), Errno> {
        let write = self.files.get(&file.0).is_some_and(|open| open.write);
        let now = self.next();
        let inode = self.fs.inodes.get_mut(&number).ok_or(Errno::EBADF)?;
        if inode.is_block() || !write {
            return Err(Errno::EINVAL);
        }
        inode.disk.change(now, Change::SetLen(len), 0..0);
        inode.disk.complete(now, now);
        if inode.model.write_through {
            inode.disk.settle_one(now);
        }
        Ok(())
    }
}
