//! The numbers that follow from a header: sizes and counts of tables, and where in them an offset is.

/// Smallest cluster: 512 bytes.
pub const CLUSTER_BITS_MIN: u32 = 9;
/// Largest cluster: 2 MiB (QEMU's limit; the format has none).
pub const CLUSTER_BITS_MAX: u32 = 21;
/// Smallest cluster that has subclusters: 16 KiB.
pub const CLUSTER_BITS_SUBCLUSTERS_MIN: u32 = 14;
/// Subclusters of a cluster, where there are any.
pub const SUBCLUSTERS: u32 = 32;
/// Largest L1 table, in bytes (QEMU's limit).
pub const L1_BYTES_MAX: u64 = 32 << 20;
/// Largest refcount table, in bytes (QEMU's limit).
pub const REFTABLE_BYTES_MAX: u64 = 8 << 20;

/// Sizes of everything in one image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bits of an offset within a cluster.
    pub cluster_bits: u32,
    /// A refcount has `1 << refcount_order` bits.
    pub refcount_order: u32,
    /// L2 entries have 16 bytes and clusters have subclusters.
    pub subclusters: bool,
}

impl Geometry {
    /// Bytes of a cluster.
    pub const fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of an L2 entry.
    pub const fn l2_entry_bytes(&self) -> u64 {
        if self.subclusters { 16 } else { 8 }
    }

    /// Entries of an L2 table.
    pub const fn l2_entries(&self) -> u64 {
        self.cluster_size() / self.l2_entry_bytes()
    }

    /// Bytes of the disk that one L2 table maps.
    pub const fn l2_covers(&self) -> u64 {
        self.l2_entries() << self.cluster_bits
    }

    /// L1 entries of a disk of `len` bytes.
    pub const fn l1_entries_for(&self, len: u64) -> u64 {
        len.div_ceil(self.l2_covers())
    }

    /// Bits of a refcount.
    pub const fn refcount_bits(&self) -> u32 {
        1 << self.refcount_order
    }

    /// The largest refcount.
    pub const fn refcount_max(&self) -> u64 {
        if self.refcount_order == 6 { u64::MAX } else { (1 << self.refcount_bits()) - 1 }
    }

    /// Refcounts of a block.
    pub const fn refblock_entries(&self) -> u64 {
        (self.cluster_size() * 8) >> self.refcount_order
    }

    /// Bytes of the finest unit that is mapped: a subcluster, or a cluster.
    pub const fn unit_size(&self) -> u64 {
        if self.subclusters { self.cluster_size() / SUBCLUSTERS as u64 } else { self.cluster_size() }
    }

    /// Where the cluster of `offset` begins.
    pub const fn cluster_start(&self, offset: u64) -> u64 {
        offset & !(self.cluster_size() - 1)
    }

    /// `offset` within its cluster.
    pub const fn in_cluster(&self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    /// Clusters of `len` bytes, the last one perhaps in part.
    pub const fn clusters(&self, len: u64) -> u64 {
        len.div_ceil(self.cluster_size())
    }

    /// The number of the L1 entry for a place on the disk.
    pub const fn l1_index(&self, offset: u64) -> u64 {
        offset / self.l2_covers()
    }

    /// The number of the L2 entry, in its table, for a place on the disk.
    pub const fn l2_index(&self, offset: u64) -> u64 {
        (offset >> self.cluster_bits) % self.l2_entries()
    }

    /// In a compressed cluster's entry: bits of the offset (above them are the sectors).
    pub const fn compressed_offset_bits(&self) -> u32 {
        62 - (self.cluster_bits - 8)
    }

    /// The longest disk: what an L1 table of the largest size maps.
    pub const fn disk_len_max(&self) -> u64 {
        let entries = L1_BYTES_MAX / 8;
        let len = (self.l2_covers() as u128) * (entries as u128);
        if len > crate::base::limits::DISK_LEN_MAX as u128 {
            crate::base::limits::DISK_LEN_MAX
        } else {
            len as u64
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_the_common_image() {
        let g = Geometry { cluster_bits: 16, refcount_order: 4, subclusters: false };
        assert_eq!((g.cluster_size(), g.l2_entries(), g.refblock_entries()), (65_536, 8192, 32_768));
        assert_eq!((g.l2_covers(), g.refcount_max(), g.unit_size()), (512 << 20, 65_535, 65_536));
        assert_eq!((g.l1_index(1 << 30), g.l2_index((1 << 30) + 70_000)), (2, 1));
        assert_eq!((g.l1_entries_for(0), g.l1_entries_for(1), g.compressed_offset_bits()), (0, 1, 54));
    }

    #[test]
    fn numbers_at_the_ends() {
        let small = Geometry { cluster_bits: 9, refcount_order: 6, subclusters: false };
        assert_eq!((small.refblock_entries(), small.refcount_max()), (64, u64::MAX));
        assert_eq!((small.disk_len_max(), small.compressed_offset_bits()), (128 << 30, 61));
        let large = Geometry { cluster_bits: 21, refcount_order: 0, subclusters: true };
        assert_eq!((large.refblock_entries(), large.refcount_max()), (1 << 24, 1));
        assert_eq!(
            (large.unit_size(), large.l2_entries(), large.compressed_offset_bits()),
            (65_536, 131_072, 49)
        );
        assert_eq!(large.disk_len_max(), 1 << 60);
    }
}
