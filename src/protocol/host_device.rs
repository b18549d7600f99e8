//! A block device of this machine.
//!
//! What differs from a file: its allocation cannot be asked for (everything counts as data), space is
//! given back by the device's own discard, its length is its own, and it is taken exclusively for
//! writing, so that a mounted one is refused.

use std::path::Path;

use blockferry_ring::{Aside, Buf, Errno, File, FileKind, Ring, SharedBuf};

use super::leaf::Leaf;
use super::lock::Locks;
use super::open::{self, OpenOptions};
use super::place;
use crate::block::{
    BlockError, Capabilities, Driver, Extent, IoFuture, IoResult, Limits, Operation, Permissions, Resolved,
    WriteFlags, ZeroFlags,
};

/// Set in the first half of the identity of a device, so that no file on some filesystem looks the same.
const DEVICE_IDENTITY: u64 = 1 << 63;

/// A block device.
#[derive(Debug)]
pub struct HostDevice {
    leaf: Leaf,
    /// None: asked to do without.
    locks: Option<Locks>,
}

impl HostDevice {
    /// Opens a block device; for writing only when nobody has it mounted or otherwise in use.
    pub fn open(ring: &Ring, path: &Path, options: &OpenOptions) -> Result<HostDevice, BlockError> {
        open::in_place(path, HostDevice::open_by(ring, &ring.in_place(), path, options))
    }

    pub(super) async fn open_by(
        ring: &Ring,
        aside: &Aside,
        path: &Path,
        options: &OpenOptions,
    ) -> Result<HostDevice, BlockError> {
        if open::kind(aside, path).await? != FileKind::Block {
            return Err(open::fail(Operation::Open, path, Errno::EINVAL)
                .because("It is no block device: open it with the driver 'file'."));
        }
        let leaf = open::open_leaf(ring, aside, path, options, FileKind::Block).await?;
        let locks =
            options.lock.then(|| Locks::new(ring, &leaf.file(), leaf.name().clone(), options.without_locks));
        Ok(HostDevice { leaf, locks })
    }
}

impl Driver for HostDevice {
    fn kind(&self) -> &'static str {
        "host_device"
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

    fn block_status(&self, _offset: u64, len: u64) -> IoFuture<'_, Result<Extent, BlockError>> {
        self.leaf.ring().boxed(async move { Ok(Extent::data(len)) })
    }

    fn resolve(&self, offset: u64, len: u64) -> Resolved {
        self.leaf.resolve(offset, len)
    }

    fn set_permissions(&self, permissions: Permissions) -> IoResult {
        match &self.locks {
            Some(locks) => locks.set(permissions),
            None => Ok(()),
        }
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

    /// By device number: several nodes in `/dev` may lead to one device.
    fn identity(&self) -> Option<(u64, u64)> {
        let info = self.leaf.info();
        Some(match info.device {
            Some((major, minor)) => (DEVICE_IDENTITY, u64::from(major) << 32 | u64::from(minor)),
            None => info.identity,
        })
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
