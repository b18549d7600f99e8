//! Entries of tables: what eight (or sixteen) bytes say about a cluster, and the other way round.

use super::geometry::{Geometry, SUBCLUSTERS};

/// Bits 9 to 55: where a cluster lies in the file.
pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Exactly one reference leads to the cluster.
pub const COPIED: u64 = 1 << 63;
/// The cluster is compressed.
pub const COMPRESSED: u64 = 1 << 62;
/// The cluster reads as zeroes (not with subclusters).
pub const ZERO: u64 = 1;

/// Bits of an L2 entry that must be 0, unless it is compressed.
pub const RESERVED: u64 = 0x3f00_0000_0000_01fe;

/// All subclusters hold data.
pub const ALL_DATA: u64 = 0xffff_ffff;
/// All subclusters read as zeroes.
pub const ALL_ZERO: u64 = 0xffff_ffff << 32;

/// An L2 entry as it is stored; `bitmap` is 0 without subclusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Raw {
    /// The descriptor.
    pub entry: u64,
    /// The subclusters.
    pub bitmap: u64,
}

/// What an L2 entry means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cluster {
    /// Whatever is below.
    Unallocated,
    /// Zeroes, without a place in the file.
    Zero,
    /// Zeroes, with a place in the file for later.
    ZeroAt {
        /// Where.
        host: u64,
        /// This is the only reference to it.
        copied: bool,
    },
    /// Data.
    Data {
        /// Where.
        host: u64,
        /// This is the only reference to it.
        copied: bool,
    },
    /// Each subcluster for itself; `host` is 0 where there is no place.
    Sub {
        /// Where.
        host: u64,
        /// There is a place (with a data file, 0 is one).
        has_host: bool,
        /// This is the only reference to it.
        copied: bool,
        /// Subclusters with data.
        data: u32,
        /// Subclusters that read as zeroes.
        zero: u32,
    },
    /// Compressed data.
    Compressed {
        /// Where it begins: any byte.
        host: u64,
        /// Bytes up to the end of its last sector.
        len: u64,
    },
}

/// Why an entry makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EntryError {
    /// The offset is not that of a cluster.
    #[error("offset {0:#x} is not a multiple of the cluster size")]
    Unaligned(u64),
    /// A subcluster is both data and zeroes.
    #[error("subclusters are said to be both data and zeroes ({0:#018x})")]
    Bitmap(u64),
    /// Subclusters with data, and no place for them.
    #[error("subclusters have data and no place in the file")]
    NoHost,
    /// A compressed cluster where there must be none.
    #[error("a compressed cluster in an image that cannot have any")]
    Compressed,
}

impl Raw {
    /// What it means. `data_file`: guest data lies in another file, where offset 0 is a place.
    pub fn decode(self, g: &Geometry, data_file: bool) -> Result<Cluster, EntryError> {
        let Raw { entry, bitmap } = self;
        if entry & COMPRESSED != 0 {
            if data_file {
                return Err(EntryError::Compressed);
            }
            let bits = g.compressed_offset_bits();
            // Where offsets have more bits than a file can be long, these count, too: such a place is none.
            let host = entry & ((1 << bits) - 1);
            let sectors = (entry & !(COPIED | COMPRESSED)) >> bits;
            return Ok(Cluster::Compressed { host, len: (sectors + 1) * 512 - host % 512 });
        }
        let host = entry & OFFSET_MASK;
        let copied = entry & COPIED != 0;
        let has_host = host != 0 || (data_file && copied);
        if !host.is_multiple_of(g.cluster_size()) {
            return Err(EntryError::Unaligned(host));
        }
        if g.subclusters {
            let (data, zero) = (bitmap as u32, (bitmap >> 32) as u32);
            if data & zero != 0 {
                return Err(EntryError::Bitmap(bitmap));
            }
            return match (data, zero) {
                (0, 0) if !has_host => Ok(Cluster::Unallocated),
                (0, u32::MAX) if !has_host => Ok(Cluster::Zero),
                (0, u32::MAX) => Ok(Cluster::ZeroAt { host, copied }),
                (u32::MAX, 0) if has_host => Ok(Cluster::Data { host, copied }),
                (1.., _) if !has_host => Err(EntryError::NoHost),
                _ => Ok(Cluster::Sub { host, has_host, copied, data, zero }),
            };
        }
        Ok(match entry & ZERO != 0 {
            // Here offset 0 is no place, with a data file neither.
            true if host == 0 => Cluster::Zero,
            true => Cluster::ZeroAt { host, copied },
            false if has_host => Cluster::Data { host, copied },
            false => Cluster::Unallocated,
        })
    }

    /// Whether no data is lost if it has no place in the file any more.
    pub fn has_no_data(self, g: &Geometry) -> bool {
        self.entry & COMPRESSED == 0
            && if g.subclusters { self.bitmap & ALL_DATA == 0 } else { self.entry & ZERO != 0 }
    }

    /// The same without a place in the file: what reads as zeroes goes on reading as zeroes.
    pub fn without_host(self, g: &Geometry) -> Raw {
        Raw { entry: if g.subclusters { 0 } else { ZERO }, bitmap: self.bitmap & ALL_ZERO }
    }

    /// Nothing is here.
    pub const UNALLOCATED: Raw = Raw { entry: 0, bitmap: 0 };

    /// Data at `host`, referred to from here alone.
    pub fn data(g: &Geometry, host: u64) -> Raw {
        Raw { entry: host | COPIED, bitmap: if g.subclusters { ALL_DATA } else { 0 } }
    }

    /// Subclusters at `host`, referred to from here alone.
    pub fn sub(host: u64, data: u32, zero: u32) -> Raw {
        Raw { entry: host | COPIED, bitmap: u64::from(data) | u64::from(zero) << 32 }
    }

    /// Zeroes without a place.
    pub fn zero(g: &Geometry) -> Raw {
        if g.subclusters { Raw { entry: 0, bitmap: ALL_ZERO } } else { Raw { entry: ZERO, bitmap: 0 } }
    }

    /// Zeroes with a place, referred to from here alone.
    pub fn zero_at(g: &Geometry, host: u64) -> Raw {
        let zero = Raw::zero(g);
        Raw { entry: zero.entry | host | COPIED, bitmap: zero.bitmap }
    }

    /// Compressed bytes at `host`; `None` if they cannot be described.
    pub fn compressed(g: &Geometry, host: u64, len: u64) -> Option<Raw> {
        let bits = g.compressed_offset_bits();
        let sectors = (host % 512 + len).div_ceil(512).checked_sub(1)?;
        let fits = host < 1 << bits.min(56) && sectors < 1 << (62 - bits);
        fits.then_some(Raw { entry: COMPRESSED | sectors << bits | host, bitmap: 0 })
    }
}

impl Cluster {
    /// The cluster of the file that it refers to as a whole, and whether it does so alone.
    pub fn host(self) -> Option<(u64, bool)> {
        match self {
            Cluster::ZeroAt { host, copied } | Cluster::Data { host, copied } => Some((host, copied)),
            Cluster::Sub { host, has_host: true, copied, .. } => Some((host, copied)),
            _ => None,
        }
    }

    /// Subclusters with data, and those that read as zeroes. For a compressed cluster: all data.
    pub fn masks(self) -> (u32, u32) {
        match self {
            Cluster::Unallocated => (0, 0),
            Cluster::Zero | Cluster::ZeroAt { .. } => (0, u32::MAX),
            Cluster::Data { .. } | Cluster::Compressed { .. } => (u32::MAX, 0),
            Cluster::Sub { data, zero, .. } => (data, zero),
        }
    }
}

/// The subclusters that bytes `from..to` of a cluster touch.
pub fn subclusters_touched(g: &Geometry, from: u64, to: u64) -> u32 {
    let unit = g.cluster_size() / u64::from(SUBCLUSTERS);
    mask(from / unit, to.div_ceil(unit))
}

/// The subclusters that bytes `from..to` of a cluster cover as a whole.
pub fn subclusters_covered(g: &Geometry, from: u64, to: u64) -> u32 {
    let unit = g.cluster_size() / u64::from(SUBCLUSTERS);
    mask(from.div_ceil(unit), to / unit)
}

fn mask(from: u64, to: u64) -> u32 {
    if from >= to {
        return 0;
    }
    let ones = |n: u64| if n >= 32 { u32::MAX } else { (1u32 << n) - 1 };
    ones(to) & !ones(from)
}

/// Reads refcount number `index` of a block.
pub fn get_refcount(block: &[u8], order: u32, index: usize) -> u64 {
    match order {
        0..=2 => {
            let width = 1usize << order;
            let per_byte = 8 / width;
            let byte = block[index / per_byte];
            u64::from(byte >> (index % per_byte * width) & ((1u16 << width) - 1) as u8)
        }
        _ => {
            let width = 1usize << (order - 3);
            block[index * width..(index + 1) * width].iter().fold(0, |sum, &b| sum << 8 | u64::from(b))
        }
    }
}

/// Writes refcount number `index` of a block. The value has to fit.
pub fn set_refcount(block: &mut [u8], order: u32, index: usize, value: u64) {
    match order {
        0..=2 => {
            let width = 1usize << order;
            let per_byte = 8 / width;
            let shift = index % per_byte * width;
            let ones = ((1u16 << width) - 1) as u8;
            let byte = &mut block[index / per_byte];
            *byte = *byte & !(ones << shift) | (value as u8 & ones) << shift;
        }
        _ => {
            let width = 1usize << (order - 3);
            block[index * width..(index + 1) * width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
        }
    }
}

/// Entry number `index` of a table of 64-bit entries.
pub fn get_be64(table: &[u8], index: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&table[index * 8..index * 8 + 8]);
    u64::from_be_bytes(value)
}

/// Sets entry number `index` of a table of 64-bit entries.
pub fn set_be64(table: &mut [u8], index: usize, value: u64) {
    table[index * 8..index * 8 + 8].copy_from_slice(&value.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::rng::Rng;

    const G: Geometry = Geometry { cluster_bits: 16, refcount_order: 4, subclusters: false };
    const S: Geometry = Geometry { cluster_bits: 16, refcount_order: 4, subclusters: true };

    #[test]
    fn entries_mean_what_they_were_made_of() {
        let host = 0x50000;
        for g in [G, S] {
            for data_file in [false, true] {
                let decode = |raw: Raw| raw.decode(&g, data_file).unwrap();
                assert_eq!(decode(Raw::UNALLOCATED), Cluster::Unallocated);
                assert_eq!(decode(Raw::zero(&g)), Cluster::Zero);
                assert_eq!(decode(Raw::zero_at(&g, host)), Cluster::ZeroAt { host, copied: true });
                assert_eq!(decode(Raw::data(&g, host)), Cluster::Data { host, copied: true });
            }
            let raw = Raw::compressed(&g, 0x12345, 1000).unwrap();
            let Cluster::Compressed { host, len } = raw.decode(&g, false).unwrap() else { panic!("{raw:?}") };
            assert!(host == 0x12345 && len >= 1000 && (host + len).is_multiple_of(512) && len < 1512);
            assert_eq!(raw.decode(&g, true), Err(EntryError::Compressed));
        }
        assert_eq!(Raw::data(&G, 0).decode(&G, true), Ok(Cluster::Data { host: 0, copied: true }));
        assert_eq!(Raw { entry: 0x50200, bitmap: 0 }.decode(&G, false), Err(EntryError::Unaligned(0x50200)));
        assert_eq!(Raw::sub(host, 1, 1).decode(&S, false), Err(EntryError::Bitmap(1 << 32 | 1)));
        assert_eq!(Raw { entry: 0, bitmap: 1 }.decode(&S, false), Err(EntryError::NoHost));
        let sub = Cluster::Sub { host, has_host: true, copied: true, data: 3, zero: 4 };
        assert_eq!(Raw::sub(host, 3, 4).decode(&S, false), Ok(sub));
    }

    #[test]
    fn compressed_entries_at_the_ends_of_all_cluster_sizes() {
        for bits in 9..=21 {
            let g = Geometry { cluster_bits: bits, ..G };
            let size = g.cluster_size();
            for (host, len) in [(size, 1), (size + 511, size), (3 * size - 1, size - 1), (1 << 40, 513)] {
                let raw = Raw::compressed(&g, host, len).unwrap();
                match raw.decode(&g, false).unwrap() {
                    Cluster::Compressed { host: h, len: l } => {
                        assert!(h == host && l >= len && l - len < 512)
                    }
                    other => panic!("{other:?}"),
                }
            }
            assert_eq!(Raw::compressed(&g, 1 << g.compressed_offset_bits().min(56), 1), None);
        }
    }

    #[test]
    fn refcounts_of_all_widths_do_not_touch_each_other() {
        let mut rng = Rng::new(3);
        for order in 0..=6 {
            let g = Geometry { refcount_order: order, ..G };
            let mut block = vec![0u8; 512];
            let mut model = vec![0u64; (512 * 8) >> order];
            for _ in 0..2000 {
                let index = rng.below(model.len() as u64) as usize;
                let value = rng.next_u64() & g.refcount_max();
                set_refcount(&mut block, order, index, value);
                model[index] = value;
            }
            for (index, value) in model.iter().enumerate() {
                assert_eq!(get_refcount(&block, order, index), *value, "order {order}");
            }
        }
        // The least significant bits of a byte come first.
        let mut block = vec![0u8; 1];
        set_refcount(&mut block, 0, 1, 1);
        assert_eq!(block, [2]);
    }

    #[test]
    fn masks_of_subclusters() {
        assert_eq!(subclusters_touched(&S, 0, 1), 1);
        assert_eq!(subclusters_touched(&S, 2047, 2049), 3);
        assert_eq!(subclusters_covered(&S, 2047, 4096), 2);
        assert_eq!(subclusters_covered(&S, 0, 65_536), u32::MAX);
        assert_eq!(subclusters_covered(&S, 1, 4095), 0);
        assert_eq!(subclusters_touched(&S, 65_535, 65_536), 1 << 31);
    }
}
