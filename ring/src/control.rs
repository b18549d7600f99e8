//! The control calls of a ring: short, and answered at once.

use std::os::fd::OwnedFd;
use std::path::Path;

use crate::backend::{DeviceIdentity, FileInfo, FileKind, LockRange, OpenHow, Place, SocketAddress};
use crate::errno::Errno;
use crate::op::File;
use crate::ring::Ring;

impl Ring {
    /// Opens a file or block device.
    pub fn open(&self, path: &Path, how: &OpenHow) -> Result<File, Errno> {
        let id = self.0.backend.borrow_mut().open(path, how)?;
        Ok(self.wrap(id))
    }

    /// Adopts a descriptor that somebody else opened.
    pub fn adopt(&self, fd: OwnedFd) -> Result<File, Errno> {
        let id = self.0.backend.borrow_mut().adopt(fd)?;
        Ok(self.wrap(id))
    }

    /// Facts about an open file.
    pub fn info(&self, file: &File) -> Result<FileInfo, Errno> {
        self.0.backend.borrow_mut().info(file.id())
    }

    /// What an open file is by now, and what `path` leads to: asked in the offload pool, because a disk may have to answer.
    pub async fn place(&self, file: &File, path: &Path) -> Result<Place, Errno> {
        let work = self.0.backend.borrow_mut().place_work(file.id(), path)?;
        self.offload(work).await?
    }

    /// What tells a block device from others that may have its name at another time.
    pub fn device_identity(&self, file: &File) -> Result<DeviceIdentity, Errno> {
        self.0.backend.borrow_mut().device_identity(file.id())
    }

    /// Seconds since 1970 (UTC), for people to read. Nothing is decided by them.
    pub fn unix_secs(&self) -> u64 {
        self.0.backend.borrow().unix_secs()
    }

    /// Sets the length of a regular file.
    pub fn set_len(&self, file: &File, len: u64) -> Result<(), Errno> {
        self.0.backend.borrow_mut().set_len(file.id(), len)
    }

    /// The first offset at or after `offset` with data (`data`) or with a hole; `ENXIO` past the end.
    pub fn seek(&self, file: &File, offset: u64, data: bool) -> Result<u64, Errno> {
        self.0.backend.borrow_mut().seek(file.id(), offset, data)
    }

    /// Takes a shared lock on a range.
    pub fn lock_shared(&self, file: &File, range: LockRange) -> Result<(), Errno> {
        self.0.backend.borrow_mut().lock_shared(file.id(), range)
    }

    /// Gives a lock back.
    pub fn unlock(&self, file: &File, range: LockRange) -> Result<(), Errno> {
        self.0.backend.borrow_mut().unlock(file.id(), range)
    }

    /// Whether somebody else holds a lock in the range.
    pub fn lock_conflict(&self, file: &File, range: LockRange) -> Result<bool, Errno> {
        self.0.backend.borrow_mut().lock_conflict(file.id(), range)
    }

    /// Who holds locks in the range, as far as can be known (pid, program); `None`: nobody was found in time.
    pub fn lock_holders(&self, file: &File, range: LockRange) -> Option<Vec<(u32, String)>> {
        self.0.backend.borrow_mut().lock_holders(file.id(), range)
    }

    /// Reads an extended attribute.
    pub fn get_attribute(&self, file: &File, name: &str) -> Result<Option<Vec<u8>>, Errno> {
        self.0.backend.borrow_mut().get_attribute(file.id(), name)
    }

    /// Sets or removes an extended attribute.
    pub fn set_attribute(&self, file: &File, name: &str, value: Option<&[u8]>) -> Result<(), Errno> {
        self.0.backend.borrow_mut().set_attribute(file.id(), name, value)
    }

    /// Removes a directory entry.
    pub fn unlink(&self, path: &Path) -> Result<(), Errno> {
        self.0.backend.borrow_mut().unlink(path)
    }

    /// Renames, replacing what is there.
    pub fn rename(&self, from: &Path, to: &Path) -> Result<(), Errno> {
        self.0.backend.borrow_mut().rename(from, to, true)
    }

    /// Renames, unless the new name is taken (EEXIST).
    pub fn rename_new(&self, from: &Path, to: &Path) -> Result<(), Errno> {
        self.0.backend.borrow_mut().rename(from, to, false)
    }

    /// Makes the entries of a directory durable.
    pub fn sync_directory(&self, path: &Path) -> Result<(), Errno> {
        self.0.backend.borrow_mut().sync_directory(path)
    }

    /// Whether a path exists, and what it is.
    pub fn lookup(&self, path: &Path) -> Result<Option<FileKind>, Errno> {
        self.0.backend.borrow_mut().lookup(path)
    }

    /// Listens; gives the address in use.
    pub fn listen(&self, address: &SocketAddress) -> Result<(File, SocketAddress), Errno> {
        let (id, address) = self.0.backend.borrow_mut().listen(address)?;
        Ok((self.wrap(id), address))
    }

    /// Connects, and does not return before that is done or refused: for addresses on this machine.
    pub fn connect(&self, address: &SocketAddress) -> Result<File, Errno> {
        let id = self.0.backend.borrow_mut().connect(address)?;
        Ok(self.wrap(id))
    }

    /// Ends both directions of a stream; operations in flight on it complete.
    pub fn shutdown_stream(&self, stream: &File) {
        self.0.backend.borrow_mut().shutdown_stream(stream.id());
    }

    /// Whether it is known that the other side of a stream has gone. One that merely sends nothing any more may still
    /// read; over TCP these are told apart only when something is sent.
    pub fn is_peer_gone(&self, stream: &File) -> bool {
        self.0.backend.borrow().is_peer_gone(stream.id())
    }
}
