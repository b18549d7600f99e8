//! A disk that is not there: reads give zeroes, writes are swallowed. For measuring everything else.

use std::cell::Cell;

use blockferry_ring::{Buf, Ring, SharedBuf};

use crate::block::{
    BlockError, Capabilities, Driver, Extent, IoFuture, IoResult, Limits, Permissions, WriteFlags, ZeroFlags,
};

/// Bytes of a null disk when nothing is said.
pub const LEN_DEFAULT: u64 = 1 << 30;

/// A disk that keeps nothing.
#[derive(Debug)]
pub struct NullDriver {
    ring: Ring,
    name: String,
    len: Cell<u64>,
    read_only: Cell<bool>,
}

impl NullDriver {
    /// A disk of `len` bytes.
    pub fn new(ring: &Ring, name: impl Into<String>, len: u64, read_only: bool) -> NullDriver {
        NullDriver {
            ring: ring.clone(),
            name: name.into(),
            len: Cell::new(len),
            read_only: Cell::new(read_only),
        }
    }

    fn done(&self) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async { Ok(()) })
    }
}

impl Driver for NullDriver {
    fn kind(&self) -> &'static str {
        "null"
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> u64 {
        self.len.get()
    }

    fn is_read_only(&self) -> bool {
        self.read_only.get()
    }

    fn limits(&self) -> Limits {
        Limits::default()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { fua: true, discard: true, zero_fast: true, zero_unmap: true, status: true }
    }

    fn read(&self, _offset: u64, mut buf: Buf) -> IoFuture<'_, (Buf, IoResult)> {
        self.ring.boxed(async move {
            buf.fill_zero();
            (buf, Ok(()))
        })
    }

    fn write(&self, _offset: u64, _buf: SharedBuf, _flags: WriteFlags) -> IoFuture<'_, IoResult> {
        self.done()
    }

    fn flush(&self) -> IoFuture<'_, IoResult> {
        self.done()
    }

    fn discard(&self, _offset: u64, _len: u64) -> IoFuture<'_, IoResult> {
        self.done()
    }

    fn write_zeroes(&self, _offset: u64, _len: u64, _flags: ZeroFlags) -> IoFuture<'_, IoResult> {
        self.done()
    }

    fn block_status(&self, _offset: u64, len: u64) -> IoFuture<'_, Result<Extent, BlockError>> {
        self.ring.boxed(async move { Ok(Extent::hole(len)) })
    }

    fn reopen(&self, read_only: bool) -> Option<IoFuture<'_, IoResult>> {
        self.read_only.set(read_only);
        Some(self.ring.boxed(async { Ok(()) }))
    }

    fn set_permissions(&self, _permissions: Permissions) -> IoResult {
        Ok(())
    }

    fn set_len(&self, len: u64) -> IoFuture<'_, IoResult> {
        self.len.set(len);
        self.done()
    }

    fn allocated_bytes(&self) -> Option<u64> {
        Some(0)
    }
}
