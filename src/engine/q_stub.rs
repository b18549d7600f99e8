//! Temporary.
use crate::block::*;
use crate::format::qcow2::Qcow2;
use blockferry_ring::{Buf, SharedBuf};
impl Driver for Qcow2 {
    fn kind(&self) -> &'static str {
        "qcow2"
    }
    fn name(&self) -> &str {
        ""
    }
    fn len(&self) -> u64 {
        0
    }
    fn is_read_only(&self) -> bool {
        true
    }
    fn limits(&self) -> Limits {
        Limits::default()
    }
    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }
    fn read(&self, _: u64, _: Buf) -> IoFuture<'_, (Buf, IoResult)> {
        unreachable!()
    }
    fn write(&self, _: u64, _: SharedBuf, _: WriteFlags) -> IoFuture<'_, IoResult> {
        unreachable!()
    }
    fn flush(&self) -> IoFuture<'_, IoResult> {
        unreachable!()
    }
    fn discard(&self, _: u64, _: u64) -> IoFuture<'_, IoResult> {
        unreachable!()
    }
    fn write_zeroes(&self, _: u64, _: u64, _: ZeroFlags) -> IoFuture<'_, IoResult> {
        unreachable!()
    }
    fn block_status(&self, _: u64, _: u64) -> IoFuture<'_, Result<Extent, BlockError>> {
        unreachable!()
    }
    fn set_permissions(&self, _: Permissions) -> IoResult {
        unreachable!()
    }
    fn as_any(&self) -> Option<&dyn std::any::Any> {
        Some(self)
    }
    fn set_len(&self, _: u64) -> IoFuture<'_, IoResult> {
        unreachable!()
    }
}
