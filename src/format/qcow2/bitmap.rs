//! Persistent bitmaps: they are kept, listed, and never believed to be right when they are not.
//!
//! Nothing here records changes in bitmaps. So before the first change of the disk, those that ought to
//! record it are marked as not saved (`in_use`), as QEMU itself does while it has an image open. Bitmaps
//! that are switched off stay as good as they are.

use super::entry::{OFFSET_MASK, get_be64};
use super::header::{autoclear, extension};
use super::image::{Fault, Qcow2};
use super::info::BitmapInfo;

/// The most bitmaps (QEMU's limit).
pub(super) const BITMAPS_MAX: u32 = 65_535;
/// The longest directory: so many entries with names of the longest.
const DIRECTORY_BYTES_MAX: u64 = 64 << 20;
const IN_USE: u32 = 1;
const AUTO: u32 = 2;
/// Extra data may be skipped by those who do not know it.
const EXTRA_COMPATIBLE: u32 = 4;
/// The only type there is: dirty clusters.
const TYPE_DIRTY: u8 = 1;
/// Bits of the finest and the coarsest granularity.
const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;
/// The longest table, in bytes.
const TABLE_BYTES_MAX: u64 = 64 << 20;
/// Bits of an entry of a table that must be 0. The lowest one says "all ones" where there is no cluster.
pub(super) const ENTRY_RESERVED: u64 = !(OFFSET_MASK | 1);

/// One entry of the directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Bitmap {
    /// Where the entry begins in the directory.
    pub(super) at: usize,
    pub(super) table_offset: u64,
    pub(super) table_entries: u32,
    pub(super) flags: u32,
    pub(super) kind: u8,
    pub(super) granularity_bits: u8,
    pub(super) name: String,
}

/// The extension: (bitmaps, bytes of the directory, where it lies).
pub(super) fn parse_extension(data: &[u8]) -> Option<(u32, u64, u64)> {
    if data.len() < 24 {
        return None;
    }
    let count = (get_be64(data, 0) >> 32) as u32;
    Some((count, get_be64(data, 1), get_be64(data, 2)))
}

/// Reads a directory. `None`: it contradicts itself.
pub(super) fn parse_directory(bytes: &[u8], count: u32) -> Option<Vec<Bitmap>> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let fixed = bytes.get(at..at + 24)?;
        let be32 = |i: usize| u32::from_be_bytes([fixed[i], fixed[i + 1], fixed[i + 2], fixed[i + 3]]);
        let name_len = usize::from(u16::from_be_bytes([fixed[18], fixed[19]]));
        let extra_len = be32(20) as usize;
        let name_at = at.checked_add(24)?.checked_add(extra_len)?;
        let name = bytes.get(name_at..name_at.checked_add(name_len)?)?;
        if found.len() as u32 == count || name_len == 0 {
            return None;
        }
        found.push(Bitmap {
            at,
            table_offset: get_be64(fixed, 0),
            table_entries: be32(8),
            flags: be32(12),
            kind: fixed[16],
            granularity_bits: fixed[17],
            name: String::from_utf8_lossy(name).into_owned(),
        });
        at = (name_at + name_len).next_multiple_of(8);
    }
    (found.len() as u32 == count).then_some(found)
}

/// Bytes that bitmaps of a disk of `len` bytes take in an image with clusters of `cluster` bytes, if every cluster of
/// theirs is there: their bits, a table for each, and the directory.
pub(super) fn bytes_of(bitmaps: &[BitmapInfo], len: u64, cluster: u64) -> u64 {
    let one = |bitmap: &BitmapInfo| {
        let bits = len.div_ceil(bitmap.granularity.max(1));
        let clusters = bits.div_ceil(8).div_ceil(cluster);
        clusters * cluster + (clusters * 8).next_multiple_of(cluster)
    };
    let directory: u64 = bitmaps.iter().map(|b| (24 + b.name.len() as u64).next_multiple_of(8)).sum();
    bitmaps.iter().map(one).sum::<u64>() + directory.next_multiple_of(cluster)
}

impl Bitmap {
    /// Bytes of its table.
    pub(super) fn table_bytes(&self) -> u64 {
        u64::from(self.table_entries) * 8
    }

    /// What about it makes no sense, if anything does not.
    pub(super) fn nonsense(&self, cluster: u64, disk_len: u64) -> Option<&'static str> {
        let bits = u128::from(self.table_entries) * u128::from(cluster) * 8;
        let covered = bits << u32::from(self.granularity_bits).min(64);
        if !self.table_offset.is_multiple_of(cluster) || self.table_offset >= 1 << 56 {
            Some("has its table at an impossible place")
        } else if self.table_offset == 0 || self.table_entries == 0 {
            Some("has no table")
        } else if self.table_bytes() > TABLE_BYTES_MAX {
            Some("has too large a table")
        } else if self.kind != TYPE_DIRTY || self.flags & !(IN_USE | AUTO | EXTRA_COMPATIBLE) != 0 {
            Some("is of a kind that is not known here")
        } else if !GRANULARITY_BITS.contains(&self.granularity_bits) {
            Some("has an impossible granularity")
        } else if self.flags & IN_USE == 0 && covered < u128::from(disk_len) {
            Some("has too short a table for the disk")
        } else {
            None
        }
    }

    pub(super) fn info(&self) -> BitmapInfo {
        BitmapInfo {
            name: self.name.clone(),
            granularity: 1u64.checked_shl(self.granularity_bits.into()).unwrap_or(0),
            in_use: self.flags & IN_USE != 0,
            auto: self.flags & AUTO != 0,
        }
    }
}

impl Qcow2 {
    /// Where the directory lies, and its bytes; `None` without bitmaps.
    pub(super) async fn bitmap_directory(&self) -> Result<Option<(u64, Vec<u8>, Vec<Bitmap>)>, Fault> {
        let Some((count, len, at)) =
            self.header.borrow().extension(extension::BITMAPS).and_then(parse_extension)
        else {
            return Ok(None);
        };
        let damaged = |what: &str| Fault::Damage(format!("its directory of bitmaps {what}"));
        if count > BITMAPS_MAX || len > DIRECTORY_BYTES_MAX || !at.is_multiple_of(self.g.cluster_size()) {
            return Err(damaged("is impossible"));
        }
        if at & !OFFSET_MASK != 0 || at.checked_add(len).is_none_or(|end| end > self.file().len()) {
            return Err(damaged("lies outside the file"));
        }
        let bytes = self.read_bytes(at, len).await?;
        let entries = parse_directory(&bytes, count).ok_or_else(|| damaged("contradicts itself"))?;
        Ok(Some((at, bytes, entries)))
    }

    /// Before the first change: what should record it and does not is marked.
    pub(super) async fn mark_bitmaps(&self) -> Result<(), Fault> {
        if self.bitmaps_marked.get() {
            return Ok(());
        }
        let _turn = self.heading.take().await;
        if self.bitmaps_marked.get() {
            return Ok(());
        }
        if self.header.borrow().autoclear & autoclear::BITMAPS != 0
            && let Some((at, bytes, entries)) = self.bitmap_directory().await?
        {
            let mut marked = false;
            for bitmap in entries.iter().filter(|b| b.flags & AUTO != 0 && b.flags & IN_USE == 0) {
                let mut sector_change = bytes[bitmap.at + 12..bitmap.at + 16].to_vec();
                sector_change[3] |= IN_USE as u8;
                self.write_bytes(at + bitmap.at as u64 + 12, &sector_change).await?;
                marked = true;
            }
            if marked {
                self.flush_files().await?;
            }
        }
        self.bitmaps_marked.set(true);
        Ok(())
    }

    /// The bitmaps, and whether all of them are out of date.
    pub(super) async fn bitmap_infos(&self) -> Result<(Vec<BitmapInfo>, bool), Fault> {
        let consistent = self.header.borrow().autoclear & autoclear::BITMAPS != 0;
        match self.bitmap_directory().await {
            Ok(None) => Ok((Vec::new(), false)),
            Ok(Some((_, _, entries))) => Ok((entries.iter().map(Bitmap::info).collect(), !consistent)),
            // What nobody vouches for may be anything.
            Err(_) if !consistent => Ok((Vec::new(), true)),
            Err(fault) => Err(fault),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::rng::Rng;

    #[test]
    fn directories_are_read_and_nonsense_is_not() {
        let mut bytes = Vec::new();
        for name in ["a", "a longer name"] {
            bytes.extend(0x50000u64.to_be_bytes());
            bytes.extend(1u32.to_be_bytes());
            bytes.extend(AUTO.to_be_bytes());
            bytes.extend([1, 16]);
            bytes.extend((name.len() as u16).to_be_bytes());
            bytes.extend(0u32.to_be_bytes());
            bytes.extend(name.as_bytes());
            bytes.resize(bytes.len().next_multiple_of(8), 0);
        }
        let found = parse_directory(&bytes, 2).unwrap();
        let info =
            BitmapInfo { name: "a longer name".into(), granularity: 65_536, in_use: false, auto: true };
        assert_eq!(found[1].info(), info);
        assert!(parse_directory(&bytes, 1).is_none() && parse_directory(&bytes, 3).is_none());
        assert!(parse_directory(&bytes[..40], 2).is_none());
        let mut rng = Rng::new(1);
        for _ in 0..5000 {
            let mut bad = bytes.clone();
            for _ in 0..3 {
                let at = rng.below(bad.len() as u64) as usize;
                bad[at] = rng.next_u64() as u8;
            }
            let _ = parse_directory(&bad, 2);
        }
    }
}
