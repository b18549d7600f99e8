//! A disk that answers late: any other disk, with a fixed time added to each request.
//!
//! It stands in for slow media where their latency matters and their contents do not. The time passes
//! before the request goes on to the child; requests do not wait for each other.

use std::rc::Rc;

use blockferry_ring::{Buf, Nanos, Ring, SharedBuf};

use crate::block::{
    BlockError, Capabilities, Child, Driver, Extent, IoFuture, IoResult, Limits, Node, Role, WriteFlags,
    ZeroFlags,
};

/// A disk with latency added.
#[derive(Debug)]
pub struct DelayDriver {
    ring: Ring,
    name: Rc<str>,
    child: Rc<Child>,
    latency_ns: Nanos,
}

impl DelayDriver {
    /// `disk`, each of whose reads, writes, zeroes, discards and flushes takes `latency_ns` longer.
    pub fn new(ring: &Ring, disk: &Rc<Node>, latency_ns: Nanos) -> DelayDriver {
        let name: Rc<str> = disk.driver().name().into();
        let child = Child::inner(disk, Role::Filtered, name.clone());
        DelayDriver { ring: ring.clone(), name, child, latency_ns }
    }

    fn disk(&self) -> Rc<Node> {
        self.child.node()
    }

    /// The disk, when the time has passed.
    async fn late(&self) -> Rc<Node> {
        self.ring.sleep(self.latency_ns).await;
        self.disk()
    }
}

impl Driver for DelayDriver {
    fn kind(&self) -> &'static str {
        "delay"
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> u64 {
        self.disk().len()
    }

    fn is_read_only(&self) -> bool {
        self.disk().is_read_only()
    }

    fn limits(&self) -> Limits {
        self.disk().limits()
    }

    fn capabilities(&self) -> Capabilities {
        self.disk().capabilities()
    }

    fn read(&self, offset: u64, buf: Buf) -> IoFuture<'_, (Buf, IoResult)> {
        self.ring.boxed(async move { self.late().await.read(offset, buf).await })
    }

    fn write(&self, offset: u64, buf: SharedBuf, flags: WriteFlags) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async move { self.late().await.write(offset, buf, flags).await })
    }

    fn flush(&self) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async move { self.late().await.flush().await })
    }

    fn discard(&self, offset: u64, len: u64) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async move { self.late().await.discard(offset, len).await })
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async move { self.late().await.write_zeroes(offset, len, flags).await })
    }

    fn block_status(&self, offset: u64, len: u64) -> IoFuture<'_, Result<Extent, BlockError>> {
        self.ring.boxed(async move { self.disk().block_status(offset, len).await })
    }

    fn extents<'a>(
        &'a self,
        offset: u64,
        len: u64,
        extents_max: usize,
        out: &'a mut Vec<Extent>,
    ) -> Option<IoFuture<'a, IoResult>> {
        Some(self.ring.boxed(async move { self.disk().extents_of(offset, len, extents_max, out).await }))
    }

    fn filtered(&self) -> Option<Rc<Child>> {
        Some(self.child.clone())
    }

    fn set_len(&self, len: u64) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async move { self.disk().set_len(len).await })
    }
}
