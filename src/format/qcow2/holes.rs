//! Clusters that have their place in the file and nothing in it: those of an image whose metadata was preallocated.
//!
//! Such a cluster counts as data, and reads as zeroes where the filesystem has a hole. To ask the filesystem at every
//! cluster would be slow for the many images that have no such clusters. So it is asked only where the file has clearly
//! less room than the clusters that are in use take, which is found out once; QEMU has the same rule.

use super::entry::get_refcount;
use super::image::{Fault, Qcow2};
use crate::block::Extent;

impl Qcow2 {
    /// What the filesystem says of data at `host`: zeroes where there is a hole in a preallocated image.
    pub(super) async fn data_status(&self, host: u64, len: u64) -> Result<Extent, Fault> {
        if !self.is_preallocated().await? || host >= self.file().len() {
            return Ok(Extent::data(len));
        }
        let there = len.min(self.file().len() - host);
        let found = self.file().block_status(host, there).await?;
        Ok(Extent { allocated: true, len: found.len.min(len), ..found })
    }

    /// More clusters of the file are in use than it has room for.
    async fn is_preallocated(&self) -> Result<bool, Fault> {
        if let Some(known) = self.preallocated.get() {
            return Ok(known);
        }
        let found = match (&self.data_file, self.file().local_file(), self.file().allocated_bytes()) {
            (None, Some(_), Some(allocated)) => {
                let there = allocated / self.g.cluster_size();
                let enough = (there * 10 / 9).max(there + 2);
                self.has_clusters_in_use(enough).await?
            }
            _ => false,
        };
        self.preallocated.set(Some(found));
        Ok(found)
    }

    /// Whether so many clusters of the file have a refcount. Tables that make no sense have none.
    async fn has_clusters_in_use(&self, enough: u64) -> Result<bool, Fault> {
        let (size, end) = (self.g.cluster_size(), self.file().len());
        if self.g.clusters(end) < enough {
            return Ok(false);
        }
        let (at, len) = {
            let header = self.header.borrow();
            (header.reftable_offset, u64::from(header.reftable_clusters) * size)
        };
        let per_block = self.counting().refblock_entries();
        let blocks = self.g.clusters(end).div_ceil(per_block);
        let len = len.min(blocks * 8).min(end.saturating_sub(at));
        let table = self.read_table(at, len).await?;
        let mut used = 0;
        for entry in table.chunks_exact(8) {
            let block = super::entry::get_be64(entry, 0) & !0x1ff;
            if block == 0 || !block.is_multiple_of(size) || block >= end || self.is_hole(block, size).await? {
                continue;
            }
            let counts = self.read_bytes(block, size).await?;
            self.let_others(per_block).await;
            used += (0..per_block as usize)
                .filter(|index| get_refcount(&counts, self.counting().refcount_order, *index) > 0)
                .count() as u64;
            if used >= enough {
                return Ok(true);
            }
        }
        Ok(false)
    }
}
