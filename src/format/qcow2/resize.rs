//! Changing the length of the disk.

use blockferry_ring::Errno;

use super::entry::{Raw, set_be64};
use super::geometry::L1_BYTES_MAX;
use super::header::extension;
use super::image::{Fault, Qcow2};
use super::meta::{Freed, L2Table, WholeTable};
use super::options::Preallocation;
use crate::base::range::ByteRange;
use crate::block::{BlockError, Operation, ZeroFlags};

impl Qcow2 {
    /// Whether the disk can become so long; the length that it gets.
    pub(super) fn judge_resize(&self, len: u64, mode: Preallocation) -> Result<u64, Fault> {
        let version = self.header.borrow().version;
        self.judge_resize_as(version, len, mode)
    }

    /// The same for an image that will be of this version by then.
    pub(super) fn judge_resize_as(&self, version: u32, len: u64, mode: Preallocation) -> Result<u64, Fault> {
        let refuse = |errno, why: &str| Err(Fault::Refused(errno, why.into()));
        let old = self.len.get();
        let len = match len.checked_next_multiple_of(512) {
            Some(len) if len <= self.g.disk_len_max() => len,
            _ => return refuse(Errno::EFBIG, "The disk would be longer than its tables can map."),
        };
        if len == old {
            return Ok(len);
        }
        if self.g.l1_entries_for(len) * 8 > L1_BYTES_MAX {
            return refuse(Errno::EFBIG, "Its tables would be too large.");
        }
        if self.header.borrow().extension(extension::BITMAPS).is_some() {
            return refuse(
                Errno::EOPNOTSUPP,
                "The image has bitmaps, which cannot be resized with it; remove them first.",
            );
        }
        if self.header.borrow().nb_snapshots > 0 && version < 3 {
            let why = "A version 2 image with snapshots cannot be resized; `blockferry amend -o compat=1.1` makes it one of version 3.";
            return refuse(Errno::EOPNOTSUPP, why);
        }
        if mode != Preallocation::Off && len < old {
            return refuse(Errno::EINVAL, "Room is set aside only where a disk grows.");
        }
        Ok(len)
    }

    pub(super) async fn resize_image(&self, len: u64, mode: Preallocation) -> Result<(), Fault> {
        self.check_writable()?;
        let (old, len) = (self.len.get(), self.judge_resize(len, mode)?);
        match len.cmp(&old) {
            std::cmp::Ordering::Equal => Ok(()),
            std::cmp::Ordering::Greater => self.grow(old, len, mode).await,
            std::cmp::Ordering::Less => self.shrink(old, len).await,
        }
    }

    async fn grow(&self, old: u64, len: u64, mode: Preallocation) -> Result<(), Fault> {
        self.write_back().await?;
        let needed = self.g.l1_entries_for(len);
        if needed > self.meta.borrow().l1.entries.len() as u64 {
            self.grow_l1(needed).await?;
        }
        if let Some(data_file) = &self.data_file {
            data_file.node().set_len(len).await?;
        }
        self.len_before.set(Some(old));
        self.len.set(len);
        // What was cut off earlier, or lies below, must not appear in the new part.
        let below = self.below().map_or(0, |below| below.len()).min(len);
        let end = below.max(old.next_multiple_of(self.g.cluster_size()).min(len));
        let work = async {
            if end > old {
                let flags = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
                self.zero_guest(ByteRange::at_saturating(old, end - old), flags).await?;
            }
            if mode != Preallocation::Off {
                // The cluster that the old end lies in may still show what lies below.
                let whole =
                    if self.below().is_some() { old.next_multiple_of(self.g.cluster_size()) } else { old };
                self.preallocate(whole, len, mode, false).await?;
                self.prepare_rest_of_cluster(old, len, mode).await?;
                self.cut_slack().await?;
            }
            self.write_back().await?;
            self.header.borrow_mut().size = len;
            self.write_header().await?;
            self.flush_files().await
        };
        let result = work.await;
        self.len_before.set(None);
        if result.is_err() {
            self.len.set(old);
            self.header.borrow_mut().size = old;
        }
        result
    }

    /// Moves the L1 table to where it has room for `entries`.
    pub(super) async fn grow_l1(&self, entries: u64) -> Result<(), Fault> {
        if entries * 8 > L1_BYTES_MAX {
            return Err(Fault::Refused(Errno::EFBIG, "The L1 table would be larger than 32 MiB.".into()));
        }
        let mut table = self.meta.borrow().l1.entries.clone();
        table.resize(entries as usize, 0);
        self.move_l1(table, None).await
    }

    /// Writes an L1 table to a new place and switches over to it, together with a new length of the disk.
    /// All tables have been written back, and nobody changes any meanwhile.
    pub(super) async fn move_l1(&self, table: Vec<u64>, size: Option<u64>) -> Result<(), Fault> {
        let cluster = self.g.cluster_size();
        let clusters = self.g.clusters(table.len() as u64 * 8).max(1);
        let run = self.allocate(clusters, false).await?;
        let mut bytes = vec![0; (clusters * cluster) as usize];
        table.iter().enumerate().for_each(|(i, entry)| set_be64(&mut bytes, i, *entry));
        let write = async {
            self.write_bytes(run.host, &bytes).await?;
            // The refcount of the new place is durable before the header leads there.
            self.write_back().await
        };
        if let Err(fault) = write.await {
            self.give_back(run).await;
            return Err(fault);
        }
        let (old_at, old_bytes) = {
            let meta = self.meta.borrow();
            (meta.l1.offset, meta.l1.bytes(&self.g))
        };
        let before = self.header.borrow().clone();
        {
            let mut header = self.header.borrow_mut();
            (header.l1_offset, header.l1_size) = (run.host, table.len() as u32);
            header.size = size.unwrap_or(header.size);
        }
        let result = async {
            self.write_header().await?;
            self.flush_files().await
        };
        if let Err(fault) = result.await {
            // Which of the two counts is not known: nothing may be freed, and nothing be written any more.
            *self.header.borrow_mut() = before;
            self.sync.failed.set(Some(Errno::EIO));
            self.corrupt.set(true);
            return Err(fault);
        }
        let mut meta = self.meta.borrow_mut();
        meta.l1 = WholeTable::new(&self.g, run.host, table);
        if old_bytes != 0 {
            let (first, count) = (old_at >> self.g.cluster_bits, old_bytes >> self.g.cluster_bits);
            meta.free(Freed { first, count, discard: true });
        }
        Ok(())
    }

    async fn shrink(&self, old: u64, len: u64) -> Result<(), Fault> {
        self.write_back().await?;
        self.header.borrow_mut().size = len;
        let result = async {
            self.write_header().await?;
            self.flush_files().await
        };
        if let Err(fault) = result.await {
            self.header.borrow_mut().size = old;
            return Err(fault);
        }
        // From here on the part is gone; unmapping it gives room back.
        let size = self.g.cluster_size();
        let mut at = len.next_multiple_of(size);
        if at > len {
            // Whoever lets the disk grow again may not think of what the last cluster held.
            let tail = ByteRange::at_saturating(len, at.min(old) - len);
            self.zero_guest(tail, ZeroFlags::default()).await?;
        }
        while at < old {
            if self.meta.borrow().l2_table(at)? == L2Table::None {
                at = (self.g.l1_index(at) + 1).saturating_mul(self.g.l2_covers());
                continue;
            }
            let raw = self.load_entry(at).await?;
            let cluster = self.decode(raw, at)?;
            if raw.is_some_and(|raw| raw != Raw::UNALLOCATED) {
                self.own_l2(at).await?;
                self.publish(at, &[Raw::UNALLOCATED], &[cluster]).await?;
                self.write_back_if_crowded().await?;
            }
            at += size;
        }
        self.len.set(len);
        self.write_back().await?;
        if let Some(data_file) = &self.data_file {
            data_file.node().set_len(len).await?;
        }
        Ok(())
    }

    pub(super) async fn resize_told(&self, len: u64, mode: Preallocation) -> Result<(), BlockError> {
        match self.resize_image(len, mode).await {
            Ok(()) => Ok(()),
            Err(fault) => Err(self.tell_whole(Operation::Resize, fault).await),
        }
    }
}
