//! A regular file on this machine.
//!
//! # Holes
//! What the filesystem keeps as a hole reads as zeroes; SEEK_DATA and SEEK_HOLE tell. The latest extent
//! is remembered, so that a scan costs one pair of calls an extent. A remembered hole is forgotten when a
//! change that touches it ends, before the change is acknowledged: whoever asks after that sees data. A
//! hole is remembered only while nobody else may write the file, because others' writes are not seen here. What a
//! filesystem on another machine, or in a program, calls a hole is no more than a claim.

use std::cell::Cell;
use std::path::Path;

use blockferry_ring::backend::OpenHow;
use blockferry_ring::{Buf, Errno, File, FileKind, Ring, SharedBuf};

use super::leaf::Leaf;
use super::lock::{self, Locks};
use super::open::{self, OpenOptions};
use super::place;
use crate::base::range::ByteRange;
use crate::block::{
    BlockError, Capabilities, CopyFrom, Driver, Extent, IoFuture, IoResult, Limits, Operation, Permission,
    Permissions, Resolved, Word, WriteFlags, ZeroFlags,
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
        if open::kind(ring, path)? != FileKind::Regular {
            return Err(open::fail(Operation::Open, path, Errno::EINVAL)
                .hint("It is a block device: open it with the driver 'host_device'."));
        }
        let leaf = open::open_leaf(ring, path, options, FileKind::Regular)?;
        let locks = options.lock.then(|| Locks::new(ring, &leaf.file(), leaf.name().clone()));
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
        let (file, is_new) = match ring.open(path, &how) {
            Ok(file) => (file, true),
            Err(Errno::EEXIST) if options.overwrite => {
                let how = OpenHow { write: true, ..OpenHow::default() };
                let file = ring.open(path, &how).map_err(fail)?;
                if !options.no_lock {
                    // What somebody uses is not emptied under them. The lock ends with the file.
                    let locks = Locks::new(ring, &file, path.display().to_string().into());
                    lock::in_time(ring, || locks.set(Permissions::JOB_TARGET)).await?;
                }
                (file, false)
            }
            Err(Errno::EEXIST) => {
                return Err(fail(Errno::EEXIST)
                    .hint("It is left alone. Choose another name, or ask for it to be overwritten."));
            }
            Err(errno) => return Err(fail(errno)),
        };
        let result = Self::fill(ring, path, &file, len, is_new).await;
        if result.is_err() && is_new {
            // Half a file is worse than none. That it cannot be removed changes nothing about the error.
            let _ = ring.unlink(path);
        }
        result.map_err(fail)
    }

    async fn fill(ring: &Ring, path: &Path, file: &File, len: u64, is_new: bool) -> Result<(), Errno> {
        if ring.info(file)?.kind != FileKind::Regular {
            return Err(Errno::EINVAL);
        }
        if !is_new {
            ring.set_len(file, 0)?;
        }
        ring.set_len(file, len)?;
        ring.sync(file, false).await?;
        let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        ring.sync_directory(parent)
    }

    /// Looks at the allocation from `offset` on: the extent, with its true borders.
    fn look(&self, offset: u64) -> Result<(ByteRange, Extent), Errno> {
        let (ring, file, end) = (self.leaf.ring(), self.leaf.file(), self.leaf.len());
        let data = match ring.seek(&file, offset, true) {
            Ok(data) => data.min(end),
            // Nothing but a hole up to the end.
            Err(Errno::ENXIO) => end,
            Err(errno) => return Err(errno),
        };
        if data > offset {
            let range = ByteRange::at_saturating(offset, data - offset);
            let word = if self.leaf.info().is_local { Word::Filesystem } else { Word::Claim };
            return Ok((range, Extent::hole(range.len()).on(word)));
        }
        let hole = ring.seek(&file, offset, false)?.min(end);
        if data < offset || hole <= offset {
            // It changed between the two calls, or the filesystem makes no sense.
            return Err(Errno::EAGAIN);
        }
        let range = ByteRange::at_saturating(offset, hole - offset);
        Ok((range, Extent::data(range.len())))
    }

    fn status(&self, offset: u64, len: u64) -> Extent {
        if !self.leaf.capabilities().status {
            return Extent::data(len);
        }
        let found = match self.leaf.known(offset) {
            Some(known) => known,
            None => match self.look(offset) {
                Ok((range, extent)) => {
                    let keep = !extent.zero || self.alone.get();
                    self.leaf.set_known(keep.then_some((range, extent)));
                    (range, extent)
                }
                Err(errno) => {
                    if errno.is_unsupported() || errno == Errno::EINVAL {
                        self.leaf.lose("telling holes from data", |c| c.status = false);
                    }
                    return Extent::data(len);
                }
            },
        };
        let (range, extent) = found;
        Extent { len: (range.end() - offset).min(len), ..extent }
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
        self.leaf.ring().boxed(async move { Ok(self.status(offset, len)) })
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
        self.leaf.set_known(None);
        Ok(())
    }

    fn reopen(&self, read_only: bool) -> Option<IoFuture<'_, IoResult>> {
        Some(self.leaf.ring().boxed(async move {
            self.leaf.reopen(read_only, |file| match &self.locks {
                Some(locks) => locks.move_to(file),
                None => Ok(()),
            })
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
