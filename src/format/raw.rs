//! The raw format: the guest's bytes as they are, or a window of them.
//!
//! `offset` and `size` cut a window out of the child, as `driver=raw` of QEMU's `blockdev-add` does: the
//! window must lie within the child when it is opened. Without `size` it reaches to the child's end,
//! wherever that is at the moment.

use std::rc::Rc;

use blockferry_ring::{Buf, Errno, Ring, SharedBuf};

use crate::block::{
    BlockError, Capabilities, Child, CopyFrom, Driver, Extent, IoFuture, IoResult, Limits, Node, Operation,
    Resolved, Role, WriteFlags, ZeroFlags,
};

/// Raw bytes over a child.
#[derive(Debug)]
pub struct RawDriver {
    ring: Ring,
    name: Rc<str>,
    child: Rc<Child>,
    offset: u64,
    size: Option<u64>,
}

impl RawDriver {
    /// The bytes of `file` from `offset` on, `size` of them (without: up to its end).
    pub fn open(
        ring: &Ring,
        file: &Rc<Node>,
        offset: u64,
        size: Option<u64>,
    ) -> Result<RawDriver, BlockError> {
        let (name, len): (Rc<str>, _) = (file.driver().name().into(), file.len());
        let refuse =
            |why: String| Err(BlockError::new(Operation::Open, name.clone(), Errno::EINVAL).hint(why));
        if offset > len {
            return refuse(format!(
                "The option 'offset' ({offset}) lies beyond the end of the file ({len})."
            ));
        }
        if let Some(size) = size
            && size > len - offset
        {
            return refuse(format!(
                "The options 'offset' ({offset}) and 'size' ({size}) reach beyond the end of the file ({len})."
            ));
        }
        let child = Child::inner(file, Role::Filtered, name.clone());
        Ok(RawDriver { ring: ring.clone(), name, child, offset, size })
    }

    fn file(&self) -> Rc<Node> {
        self.child.node()
    }

    /// Behind the window lies what belongs to others. Without a size the child knows where it ends.
    fn within(&self, operation: Operation, offset: u64, len: u64) -> IoResult {
        match self.size.filter(|size| offset.checked_add(len).is_none_or(|end| end > *size)) {
            Some(size) => Err(BlockError::at(operation, self.name.clone(), offset, len, Errno::ENOSPC)
                .hint(format!("The option 'size' ends this disk at {size}."))),
            None => Ok(()),
        }
    }
}

impl Driver for RawDriver {
    fn kind(&self) -> &'static str {
        "raw"
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> u64 {
        self.size.unwrap_or_else(|| self.file().len().saturating_sub(self.offset))
    }

    fn is_read_only(&self) -> bool {
        self.file().is_read_only()
    }

    fn limits(&self) -> Limits {
        self.file().limits()
    }

    fn capabilities(&self) -> Capabilities {
        self.file().capabilities()
    }

    fn read(&self, offset: u64, buf: Buf) -> IoFuture<'_, (Buf, IoResult)> {
        self.ring.boxed(async move { self.file().read(self.offset + offset, buf).await })
    }

    fn write(&self, offset: u64, buf: SharedBuf, flags: WriteFlags) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async move {
            self.within(Operation::Write, offset, buf.len() as u64)?;
            self.file().write(self.offset + offset, buf, flags).await
        })
    }

    fn flush(&self) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async move { self.file().flush().await })
    }

    fn discard(&self, offset: u64, len: u64) -> IoFuture<'_, IoResult> {
        let len = self.size.map_or(len, |size| size.saturating_sub(offset).min(len));
        self.ring.boxed(async move { self.file().discard(self.offset + offset, len).await })
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async move {
            self.within(Operation::WriteZeroes, offset, len)?;
            self.file().write_zeroes(self.offset + offset, len, flags).await
        })
    }

    fn block_status(&self, offset: u64, len: u64) -> IoFuture<'_, Result<Extent, BlockError>> {
        self.ring.boxed(async move { self.file().block_status(self.offset + offset, len).await })
    }

    fn extents<'a>(
        &'a self,
        offset: u64,
        len: u64,
        extents_max: usize,
        out: &'a mut Vec<Extent>,
    ) -> Option<IoFuture<'a, IoResult>> {
        let offset = self.offset + offset;
        Some(self.ring.boxed(async move { self.file().extents_of(offset, len, extents_max, out).await }))
    }

    fn copy_range(&self, from: CopyFrom, offset: u64) -> Option<IoFuture<'_, IoResult>> {
        Some(self.ring.boxed(async move {
            self.within(Operation::Write, offset, from.len)?;
            self.file().copy_range_or_refuse(from, self.offset + offset).await
        }))
    }

    fn resolve(&self, offset: u64, len: u64) -> Resolved {
        self.file().resolve(self.offset + offset, len)
    }

    fn filtered(&self) -> Option<Rc<Child>> {
        Some(self.child.clone())
    }

    fn set_len(&self, len: u64) -> IoFuture<'_, IoResult> {
        let whole = self.size.is_none().then(|| self.offset.checked_add(len)).flatten();
        self.ring.boxed(async move {
            match whole {
                Some(whole) => self.file().set_len(whole).await,
                None => Err(BlockError::new(Operation::Resize, self.name.clone(), Errno::EOPNOTSUPP)
                    .because("The option 'size' fixes the length of this disk.")),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::{FileDriver, NullDriver, OpenOptions};
    use blockferry_ring::Config;

    #[test]
    fn a_window_lies_within_the_file() {
        let ring = Ring::new(&Config { arena_bytes: 1 << 20, ..Config::default() }).expect("a ring");
        let open = |offset, size| {
            let child = Node::new(&ring, "n", Rc::new(NullDriver::new(&ring, "n", 10_000, false)));
            RawDriver::open(&ring, &child, offset, size).map(|raw| raw.len()).map_err(|e| e.to_string())
        };
        assert_eq!(open(0, None), Ok(10_000));
        assert_eq!(open(10_000, None), Ok(0));
        assert_eq!(open(1000, Some(9000)), Ok(9000));
        assert!(open(10_001, None).is_err_and(|e| e.contains("'offset' (10001) lies beyond")));
        assert!(
            open(1000, Some(9001)).is_err_and(|e| e.contains("reach beyond the end of the file (10000)"))
        );
        assert!(open(1, Some(u64::MAX)).is_err());
    }

    #[test]
    fn a_window_shifts_everything() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("a");
        std::fs::write(&path, vec![1u8; 131_072]).expect("a file");
        let ring = Ring::new(&Config { arena_bytes: 1 << 20, ..Config::default() }).expect("a ring");
        let r = ring.clone();
        ring.block_on(async move {
            let file = Rc::new(FileDriver::open(&r, &path, &OpenOptions::default()).unwrap());
            let file = Node::new(&r, "file", file);
            let raw = RawDriver::open(&r, &file, 4096, Some(20_000)).unwrap();
            let mut buf = r.alloc(100).await;
            buf.as_mut_slice().fill(2);
            raw.write(7, buf.freeze(), WriteFlags::default()).await.unwrap();
            raw.write_zeroes(8192, 4096, ZeroFlags { may_unmap: true, ..ZeroFlags::default() })
                .await
                .unwrap();
            raw.discard(12_288, 4096).await.unwrap();
            let extent = raw.block_status(8192, 11_808).await.unwrap();
            assert_eq!((extent.len, extent.zero, extent.allocated), (8192, true, false));
            assert!(matches!(raw.resolve(8192, 4096), Resolved::File { offset: 12_288, .. }));
            let (buf, result) = raw.read(7, r.alloc(100).await).await;
            assert!(result.is_ok() && buf.as_slice().iter().all(|&b| b == 2));
            // What lies behind the window is not its own.
            let buf = r.alloc(100).await.freeze();
            let error = raw.write(19_950, buf, WriteFlags::default()).await.unwrap_err();
            assert_eq!(error.errno, Errno::ENOSPC, "{error}");
            assert!(raw.write_zeroes(0, 20_001, ZeroFlags::default()).await.is_err());
            raw.discard(19_990, 100_000).await.unwrap();
            let error = raw.set_len(1).await.unwrap_err();
            assert!(error.to_string().contains("fixes the length"));
            let rest = RawDriver::open(&r, &file, 4096, None).unwrap();
            rest.set_len(150_000).await.unwrap();
            raw.flush().await.unwrap();
            let bytes = std::fs::read(&path).unwrap();
            assert_eq!((bytes.len(), rest.len(), raw.len()), (154_096, 150_000, 20_000));
            let mut wanted = vec![1u8; 131_072];
            wanted.resize(154_096, 0);
            wanted[4103..4203].fill(2);
            wanted[12_288..20_480].fill(0);
            assert!(bytes == wanted);
        });
    }
}
