//! The image as a driver: what every user of a disk sees.

use std::rc::Rc;

use blockferry_ring::{Buf, Errno, File, SharedBuf};

use super::header::autoclear;
use super::image::{Fault, Qcow2};
use crate::base::range::ByteRange;
use crate::block::{
    BlockError, Capabilities, Child, Driver, Extent, Fill, IoFuture, IoResult, Layer, Limits, Node,
    Operation, Permissions, Resolved, WriteFlags, ZeroFlags,
};

impl Qcow2 {
    async fn done(&self, operation: Operation, range: ByteRange, result: Result<(), Fault>) -> IoResult {
        match result {
            Ok(()) => Ok(()),
            Err(fault) => Err(self.tell(operation, range, fault).await),
        }
    }

    /// Nothing is done beyond the end of the disk.
    fn check_range(&self, range: ByteRange) -> Result<(), Fault> {
        if range.end() <= self.len.get() {
            return Ok(());
        }
        Err(Fault::Refused(Errno::EINVAL, "The request reaches beyond the end of the disk.".into()))
    }
}

impl Driver for Qcow2 {
    fn kind(&self) -> &'static str {
        "qcow2"
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self) -> u64 {
        self.len_before.get().unwrap_or(self.len.get())
    }

    fn is_read_only(&self) -> bool {
        self.read_only.get()
    }

    fn limits(&self) -> Limits {
        let below = self.data().limits();
        let unit = self.g.unit_size() as u32;
        Limits {
            zero_align: unit,
            discard_align: self.g.cluster_size() as u32,
            cluster_size: Some(unit.max(4096)),
            ..below
        }
    }

    fn capabilities(&self) -> Capabilities {
        let v3 = self.header.borrow().version >= 3;
        let raw = self.header.borrow().autoclear & autoclear::DATA_FILE_RAW != 0;
        let zero = !self.read_only.get() && v3 && !raw;
        Capabilities {
            fua: false,
            discard: !self.read_only.get(),
            zero_fast: zero,
            zero_unmap: zero,
            status: true,
        }
    }

    fn read(&self, offset: u64, buf: Buf) -> IoFuture<'_, (Buf, IoResult)> {
        self.ring.boxed(async move {
            let range = ByteRange::at_saturating(offset, buf.len() as u64);
            self.counters.asked.set(self.counters.asked.get() + 1);
            if range.is_empty() {
                return (buf, Ok(()));
            }
            if let Err(fault) = self.check_range(range) {
                return (buf, Err(self.tell(Operation::Read, range, fault).await));
            }
            let _pin = self.epochs.enter();
            let (buf, result) = self.read_guest(offset, buf).await;
            (buf, self.done(Operation::Read, range, result).await)
        })
    }

    fn write(&self, offset: u64, buf: SharedBuf, flags: WriteFlags) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async move {
            let range = ByteRange::at_saturating(offset, buf.len() as u64);
            let write = async {
                self.check_range(range)?;
                self.write_guest(offset, &buf).await?;
                if flags.fua { self.flush_all().await } else { Ok(()) }
            };
            let result = write.await;
            self.done(Operation::Write, range, result).await
        })
    }

    fn flush(&self) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async move {
            match self.flush_all().await {
                Ok(()) => Ok(()),
                Err(fault) => Err(self.tell_whole(Operation::Flush, fault).await),
            }
        })
    }

    fn discard(&self, offset: u64, len: u64) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async move {
            let range = ByteRange::at_saturating(offset, len);
            let discard = async {
                self.check_range(range)?;
                self.discard_guest(range).await
            };
            let result = discard.await;
            self.done(Operation::Discard, range, result).await
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async move {
            let range = ByteRange::at_saturating(offset, len);
            let zero = async {
                self.check_range(range)?;
                self.zero_guest(range, flags).await?;
                if flags.fua { self.flush_all().await } else { Ok(()) }
            };
            let result = zero.await;
            self.done(Operation::WriteZeroes, range, result).await
        })
    }

    fn block_status(&self, offset: u64, len: u64) -> IoFuture<'_, Result<Extent, BlockError>> {
        self.ring.boxed(async move {
            match self.status(offset, len).await {
                Ok(extent) => Ok(extent),
                Err(fault) => {
                    let range = ByteRange::at_saturating(offset, len);
                    Err(self.tell(Operation::BlockStatus, range, fault).await)
                }
            }
        })
    }

    fn resolve(&self, offset: u64, len: u64) -> Resolved {
        self.resolve_now(offset, len)
    }

    fn as_layer(&self) -> Option<&dyn Layer> {
        Some(self)
    }

    fn format(&self) -> &'static str {
        "qcow2"
    }

    fn reopen(&self, read_only: bool) -> Option<IoFuture<'_, IoResult>> {
        Some(self.ring.boxed(self.reopen_image(read_only)))
    }

    fn children(&self) -> Vec<Rc<Child>> {
        let below = self.backing.borrow().clone();
        [Some(self.file.clone()), self.data_file.clone(), below].into_iter().flatten().collect()
    }

    fn set_permissions(&self, permissions: Permissions) -> IoResult {
        let old = self.permissions.get();
        // Tables are read and written by whoever reads or writes the disk.
        let used = permissions != Permissions::NONE;
        let own = match (used, self.read_only.get()) {
            (true, false) => permissions.for_image(),
            // What it has read of them must stay true, whoever it is read for.
            (true, true) => permissions.of_tables(),
            (false, _) => permissions,
        };
        self.file.set_permissions(own)?;
        let data_file = self.data_file.as_ref().map_or(Ok(()), |data_file| data_file.set_permissions(own));
        let backing = self.backing.borrow().clone();
        let below = || backing.map_or(Ok(()), |below| below.set_permissions(self.needs_below(own)));
        if let Err(error) = data_file.and_then(|()| below()) {
            // Going back to what was held takes nothing new from others.
            let _ = self.file.set_permissions(old);
            let _ = self.data_file.as_ref().map(|data_file| data_file.set_permissions(old));
            return Err(error);
        }
        self.permissions.set(own);
        Ok(())
    }

    fn as_any(&self) -> Option<&dyn std::any::Any> {
        Some(self)
    }

    fn local_file(&self) -> Option<File> {
        self.file().local_file()
    }

    fn identity(&self) -> Option<(u64, u64)> {
        self.file().identity()
    }

    fn set_len(&self, len: u64) -> IoFuture<'_, IoResult> {
        self.ring.boxed(self.resize(len, super::Preallocation::Off))
    }

    fn allocated_bytes(&self) -> Option<u64> {
        self.file().allocated_bytes()
    }

    fn ask_allocated(&self) -> Option<IoFuture<'_, ()>> {
        let file = self.file();
        Some(self.ring.boxed(async move {
            if let Some(asked) = file.ask_allocated() {
                asked.await;
            }
        }))
    }

    fn fail_in_flight(&self) {
        self.file().fail_in_flight();
        if let Some(data_file) = &self.data_file {
            data_file.node().fail_in_flight();
        }
    }

    fn is_away(&self) -> bool {
        self.file().is_away() || self.data_file.as_ref().is_some_and(|data_file| data_file.node().is_away())
    }
}

impl Qcow2 {
    /// What is needed of the layer below while this is needed of the image: it is only read, by many at once, and must not
    /// change under them.
    pub(super) fn needs_below(&self, own: Permissions) -> Permissions {
        if own == Permissions::NONE { Permissions::NONE } else { Permissions::STABLE_READER }
    }
}

impl Layer for Qcow2 {
    fn backing(&self) -> Option<Rc<Child>> {
        self.backing.borrow().clone()
    }

    fn recorded_backing(&self) -> Option<(String, Option<String>)> {
        let header = self.header.borrow();
        let name = header.backing_file.clone()?;
        Some((name, header.text(super::header::extension::BACKING_FORMAT)))
    }

    fn holds(&self, offset: u64, len: u64) -> IoFuture<'_, Result<Extent, BlockError>> {
        self.ring.boxed(async move {
            match self.held(offset, len).await {
                Ok(held) => Ok(held),
                Err(fault) => {
                    let range = ByteRange::at_saturating(offset, len);
                    Err(self.tell(Operation::BlockStatus, range, fault).await)
                }
            }
        })
    }

    fn populate(&self, offset: u64, fill: Fill) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async move {
            let range = ByteRange::at_saturating(offset, fill.len());
            let populate = async {
                self.check_range(range)?;
                self.populate_guest(range, &fill).await
            };
            let result = populate.await;
            self.done(Operation::Write, range, result).await
        })
    }

    fn record_backing<'a>(&'a self, backing: Option<(&'a str, &'a str)>) -> IoFuture<'a, IoResult> {
        let backing = backing.map(|(name, format)| (name, Some(format)));
        self.ring.boxed(Qcow2::set_backing(self, backing))
    }

    fn set_backing(&self, backing: Option<&Rc<Node>>) -> IoResult {
        self.replace_backing(backing)
    }
}
