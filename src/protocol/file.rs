//! A regular file on this machine.
//!
//! # Holes
//! What the filesystem keeps as a hole reads as zeroes; SEEK_DATA and SEEK_HOLE tell. One look tells of many
//! extents, which are remembered ([`super::allocation`]). A hole is remembered only while nobody else may write the
//! file, because others' writes are not seen here; whoever asks for many extents at once still gets them from one look.
//! What a filesystem on another machine, or in a program, calls a hole is no more than a claim.

use std::cell::Cell;
use std::path::Path;

use blockferry_ring::backend::OpenHow;
use blockferry_ring::{Aside, Buf, Errno, File, FileKind, Ring, SharedBuf};

use super::leaf::Leaf;
use super::lock::Locks;
use super::open::{self, OpenOptions};
use super::place;
use crate::base::os_name;
use crate::base::range::ByteRange;
use crate::block::{
    BlockError, Capabilities, CopyFrom, Driver, Extent, IoFuture, IoResult, Limits, Operation, Permission,
    Permissions, Resolved, WriteFlags, ZeroFlags,
};

/// A regular file.
#[derive(Debug)]
pub struct FileDriver {
    leaf: Leaf,
    /// None: asked to do without.
    locks: Option<Locks>,
    /// Nobody else writes the file: locks see to it.
    alone: Cell<bool>,
}

/// How to make a file.
#[derive(Clone, Copy, Debug, Default)]
pub struct CreateOptions {
    /// Take an existing file, whose contents are lost. Without it an existing file is an error.
    pub overwrite: bool,
    /// Overwrite even what another program has locked.
    pub no_lock: bool,
    /// Permission bits of a new one, before the process's umask. `None`: 0644.
    pub mode: Option<u32>,
}

impl FileDriver {
    /// Opens an existing file.
    pub fn open(ring: &Ring, path: &Path, options: &OpenOptions) -> Result<FileDriver, BlockError> {
        open::in_place(path, FileDriver::open_by(ring, &ring.in_place(), path, options))
    }

    pub(super) async fn open_by(
        ring: &Ring,
        aside: &Aside,
        path: &Path,
        options: &OpenOptions,
    ) -> Result<FileDriver, BlockError> {
        if open::kind(aside, path).await? != FileKind::Regular {
            return Err(open::fail(Operation::Open, path, Errno::EINVAL)
                .because("It is a block device: open it with the driver 'host_device'."));
        }
        let leaf = open::open_leaf(ring, aside, path, options, FileKind::Regular).await?;
        let locks =
            options.lock.then(|| Locks::new(ring, &leaf.file(), leaf.name().clone(), options.without_locks));
        Ok(FileDriver { leaf, locks, alone: Cell::new(false) })
    }

    /// Makes a file of `len` bytes, all of it a hole. It is durable, its name too.
    pub async fn create(
        ring: &Ring,
        path: &Path,
        len: u64,
        options: CreateOptions,
    ) -> Result<(), BlockError> {
        let fail = |errno| open::fail(Operation::Create, path, errno);
        let how = OpenHow { write: true, create_new: true, mode: options.mode, ..OpenHow::default() };
        let aside = ring.aside();
        let (file, is_new) = match aside.open(path, &how).await {
            Ok(file) => (file, true),
            Err(Errno::EEXIST) if options.overwrite => {
                let how = OpenHow { write: true, ..OpenHow::default() };
                let file = aside.open(path, &how).await.map_err(fail)?;
                if !options.no_lock {
                    // What somebody uses is not emptied under them. The lock ends with the file.
                    let locks = Locks::new(ring, &file, os_name::from_path(path).into(), None);
                    crate::block::conflict::in_time(ring, || locks.set(Permissions::JOB_TARGET)).await?;
                }
                (file, false)
            }
            Err(Errno::EEXIST) => {
                return Err(fail(Errno::EEXIST)
                    .because("It is left alone. Choose another name, or ask for it to be overwritten."));
            }
            Err(errno) => return Err(fail(errno)),
        };
        let result = Self::fill(ring, path, &file, len, is_new).await;
        if result.is_err() && is_new {
            // Half a file is worse than none. That it cannot be removed changes nothing about the error.
            let _ = aside.unlink(path).await;
        }
        result.map_err(fail)
    }

    async fn fill(ring: &Ring, path: &Path, file: &File, len: u64, is_new: bool) -> Result<(), Errno> {
        let aside = ring.aside();
        if aside.info(file).await?.kind != FileKind::Regular {
            return Err(Errno::EINVAL);
        }
        if !is_new {
            aside.set_len(file, 0).await?;
        }
        aside.set_len(file, len).await?;
        ring.sync(file, false).await?;
        let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        aside.sync_directory(parent).await
    }
}

impl Driver for FileDriver {
    fn kind(&self) -> &'static str {
        "file"
    }

    fn name(&self) -> &str {
        self.leaf.name()
    }

    fn len(&self) -> u64 {
        self.leaf.len()
    }

    fn is_read_only(&self) -> bool {
        self.leaf.is_read_only()
    }

    fn limits(&self) -> Limits {
        self.leaf.limits()
    }

    fn capabilities(&self) -> Capabilities {
        self.leaf.capabilities()
    }

    fn read(&self, offset: u64, buf: Buf) -> IoFuture<'_, (Buf, IoResult)> {
        self.leaf.read(offset, buf)
    }

    fn write(&self, offset: u64, buf: SharedBuf, flags: WriteFlags) -> IoFuture<'_, IoResult> {
        self.leaf.write(offset, buf, flags)
    }

    fn flush(&self) -> IoFuture<'_, IoResult> {
        self.leaf.ring().boxed(self.leaf.flush())
    }

    fn discard(&self, offset: u64, len: u64) -> IoFuture<'_, IoResult> {
        self.leaf.ring().boxed(self.leaf.discard(offset, len))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> IoFuture<'_, IoResult> {
        self.leaf.ring().boxed(self.leaf.write_zeroes(offset, len, flags))
    }

    fn block_status(&self, offset: u64, len: u64) -> IoFuture<'_, Result<Extent, BlockError>> {
        self.leaf.ring().boxed(async move {
            let mut found = Vec::with_capacity(1);
            self.leaf
                .extents(ByteRange::at_saturating(offset, len), 1, || self.alone.get(), &mut found)
                .await;
            Ok(found.first().copied().unwrap_or(Extent::data(len)))
        })
    }

    fn extents<'a>(
        &'a self,
        offset: u64,
        len: u64,
        extents_max: usize,
        out: &'a mut Vec<Extent>,
    ) -> Option<IoFuture<'a, IoResult>> {
        Some(self.leaf.ring().boxed(async move {
            let range = ByteRange::at_saturating(offset, len);
            self.leaf.extents(range, extents_max, || self.alone.get(), out).await;
            Ok(())
        }))
    }

    fn copy_range(&self, from: CopyFrom, offset: u64) -> Option<IoFuture<'_, IoResult>> {
        Some(self.leaf.ring().boxed(self.leaf.copy_range(from, offset)))
    }

    fn resolve(&self, offset: u64, len: u64) -> Resolved {
        self.leaf.resolve(offset, len)
    }

    fn set_permissions(&self, permissions: Permissions) -> IoResult {
        if let Some(locks) = &self.locks {
            locks.set(permissions)?;
            self.alone.set(!permissions.shares(Permission::Write));
        }
        // A hole that is known from a time when others could write is no longer believed.
        self.leaf.forget_all();
        Ok(())
    }

    fn reopen(&self, read_only: bool) -> Option<IoFuture<'_, IoResult>> {
        Some(self.leaf.ring().boxed(async move {
            let moved = |file: &File| match &self.locks {
                Some(locks) => locks.move_to(file),
                None => Ok(()),
            };
            self.leaf.reopen(read_only, moved).await
        }))
    }

    fn local_file(&self) -> Option<File> {
        Some(self.leaf.file())
    }

    fn identity(&self) -> Option<(u64, u64)> {
        Some(self.leaf.info().identity)
    }

    fn check_place(&self, by_name: bool, exact: bool) -> Option<IoFuture<'_, IoResult>> {
        Some(self.leaf.ring().boxed(place::check(&self.leaf, by_name, exact)))
    }

    fn set_len(&self, len: u64) -> IoFuture<'_, IoResult> {
        self.leaf.ring().boxed(self.leaf.set_len(len))
    }

    fn allocated_bytes(&self) -> Option<u64> {
        self.leaf.allocated_bytes()
    }
}
