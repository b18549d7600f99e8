//! A disk that answers late: any other disk, with a fixed time added to each request.
//!
//! It stands in for slow media where their latency matters and their contents do not. The time passes
//! before the request goes on to the child; requests do not wait for each other.

use std::rc::Rc;

use blockferry_ring::{Buf, File, Nanos, Ring, SharedBuf};

use crate::block::{
    BlockError, Capabilities, Driver, Extent, IoFuture, IoResult, Limits, Permissions, WriteFlags, ZeroFlags,
};

/// A disk with latency added.
#[derive(Debug)]
pub struct DelayDriver {
    ring: Ring,
    child: Rc<dyn Driver>,
    latency_ns: Nanos,
}

impl DelayDriver {
    /// `child`, each of whose reads, writes, zeroes, discards and flushes takes `latency_ns` longer.
    pub fn new(ring: &Ring, child: Rc<dyn Driver>, latency_ns: Nanos) -> DelayDriver {
        DelayDriver { ring: ring.clone(), child, latency_ns }
    }

    /// `request` is made when the time has passed.
    fn late<'a, T: 'a>(&'a self, request: impl FnOnce() -> IoFuture<'a, T> + 'a) -> IoFuture<'a, T> {
        self.ring.boxed(async move {
            self.ring.sleep(self.latency_ns).await;
            request().await
        })
    }
}

impl Driver for DelayDriver {
    fn kind(&self) -> &'static str {
        "delay"
    }

    fn name(&self) -> &str {
        self.child.name()
    }

    fn len(&self) -> u64 {
        self.child.len()
    }

    fn is_read_only(&self) -> bool {
        self.child.is_read_only()
    }

    fn limits(&self) -> Limits {
        self.child.limits()
    }

    fn capabilities(&self) -> Capabilities {
        self.child.capabilities()
    }

    fn read(&self, offset: u64, buf: Buf) -> IoFuture<'_, (Buf, IoResult)> {
        self.late(move || self.child.read(offset, buf))
    }

    fn write(&self, offset: u64, buf: SharedBuf, flags: WriteFlags) -> IoFuture<'_, IoResult> {
        self.late(move || self.child.write(offset, buf, flags))
    }

    fn flush(&self) -> IoFuture<'_, IoResult> {
        self.late(move || self.child.flush())
    }

    fn discard(&self, offset: u64, len: u64) -> IoFuture<'_, IoResult> {
        self.late(move || self.child.discard(offset, len))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> IoFuture<'_, IoResult> {
        self.late(move || self.child.write_zeroes(offset, len, flags))
    }

    fn block_status(&self, offset: u64, len: u64) -> IoFuture<'_, Result<Extent, BlockError>> {
        self.child.block_status(offset, len)
    }

    fn extents<'a>(
        &'a self,
        offset: u64,
        len: u64,
        extents_max: usize,
        out: &'a mut Vec<Extent>,
    ) -> Option<IoFuture<'a, IoResult>> {
        self.child.extents(offset, len, extents_max, out)
    }

    fn children(&self) -> Vec<Rc<dyn Driver>> {
        vec![self.child.clone()]
    }

    fn reopen(&self, read_only: bool) -> Option<IoFuture<'_, IoResult>> {
        self.child.reopen(read_only)
    }

    fn set_permissions(&self, permissions: Permissions) -> IoResult {
        self.child.set_permissions(permissions)
    }

    fn local_file(&self) -> Option<File> {
        self.child.local_file()
    }

    fn identity(&self) -> Option<(u64, u64)> {
        self.child.identity()
    }

    fn set_len(&self, len: u64) -> IoFuture<'_, IoResult> {
        self.child.set_len(len)
    }

    fn allocated_bytes(&self) -> Option<u64> {
        self.child.allocated_bytes()
    }

    fn ask_allocated(&self) -> Option<IoFuture<'_, ()>> {
        self.child.ask_allocated()
    }

    fn fail_in_flight(&self) {
        self.child.fail_in_flight();
    }

    fn is_away(&self) -> bool {
        self.child.is_away()
    }
}
