//! What is known of an image's metadata: the tables in memory, and what follows from them at once.
//!
//! No function here does I/O. What is not in memory is named, so that the caller loads it and asks again.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::cache::{PAGE_BYTES_MAX, Page, TableCache};
use super::entry::{COPIED, OFFSET_MASK, Raw, get_be64, get_refcount, set_be64, set_refcount};
use super::geometry::Geometry;

/// The bits of an L1 entry that must be 0.
pub(super) const L1_RESERVED: u64 = !(OFFSET_MASK | COPIED);

/// The image contradicts itself; the text says how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Damage(pub(super) String);

/// A thing that is known, or what to load first: the slice at this offset of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Known<T> {
    /// It is known.
    Yes(T),
    /// Load this slice.
    Load(u64),
}

/// What an L1 entry leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum L2Table {
    /// There is none: all of its range is unallocated.
    None,
    /// Here; `copied`: nobody else refers to it.
    At {
        /// Offset in the file.
        host: u64,
        /// It may be changed in place.
        copied: bool,
    },
}

/// Clusters of the file that are not referred to any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Freed {
    /// The first, as a number.
    pub(super) first: u64,
    /// How many.
    pub(super) count: u64,
    /// Give the room back to the filesystem as well.
    pub(super) discard: bool,
}

/// A table that is all in memory: L1, or the refcount table.
#[derive(Debug)]
pub(super) struct WholeTable {
    pub(super) offset: u64,
    pub(super) entries: Vec<u64>,
    /// Changed pages, by number.
    dirty: BTreeSet<u64>,
    page_bytes: u64,
}

impl WholeTable {
    pub(super) fn new(g: &Geometry, offset: u64, entries: Vec<u64>) -> WholeTable {
        WholeTable {
            offset,
            entries,
            dirty: BTreeSet::new(),
            page_bytes: g.cluster_size().min(PAGE_BYTES_MAX),
        }
    }

    pub(super) fn get(&self, index: u64) -> u64 {
        self.entries.get(index as usize).copied().unwrap_or(0)
    }

    pub(super) fn set(&mut self, index: u64, value: u64) {
        if let Some(entry) = self.entries.get_mut(index as usize) {
            *entry = value;
            self.dirty.insert(index * 8 / self.page_bytes);
        }
    }

    /// Clusters that it occupies.
    pub(super) fn bytes(&self, g: &Geometry) -> u64 {
        (self.entries.len() as u64 * 8).next_multiple_of(g.cluster_size())
    }

    pub(super) fn take_dirty(&mut self) -> Vec<Page> {
        let dirty = std::mem::take(&mut self.dirty);
        let per_page = (self.page_bytes / 8) as usize;
        let page = |number: u64| {
            let mut bytes = vec![0; self.page_bytes as usize];
            let entries = self.entries.iter().skip(number as usize * per_page).take(per_page);
            entries.enumerate().for_each(|(i, entry)| set_be64(&mut bytes, i, *entry));
            (self.offset + number * self.page_bytes, bytes)
        };
        dirty.into_iter().map(page).collect()
    }

    pub(super) fn failed(&mut self, pages: &[Page]) {
        for (at, _) in pages {
            // A table that has moved meanwhile was written as a whole.
            if let Some(inside) = at.checked_sub(self.offset) {
                self.dirty.insert(inside / self.page_bytes);
            }
        }
    }
}

/// All of it.
#[derive(Debug)]
pub(super) struct Meta {
    pub(super) g: Geometry,
    pub(super) l1: WholeTable,
    pub(super) reftable: WholeTable,
    pub(super) l2: TableCache,
    pub(super) refs: TableCache,
    /// All clusters of the file before this one are in use.
    pub(super) hint: u64,
    /// The file has never had anything from here on: it reads as zeroes there.
    pub(super) virgin: u64,
    /// Freed since the latest write-back began: something durable may still refer to them.
    pub(super) freed: Vec<Freed>,
    /// Not referred to durably any more; in use until the epoch is past.
    pub(super) releasing: VecDeque<(u64, Vec<Freed>)>,
    /// Tables that are not found through L1 or the refcount table: from, to.
    pub(super) fixed: BTreeMap<u64, u64>,
    /// Where the L2 tables of the active L1 table are.
    pub(super) l2_tables: BTreeSet<u64>,
    /// Where refcount blocks are.
    pub(super) refblocks: BTreeSet<u64>,
}

impl Meta {
    /// Takes a table for the active L1. Gives an L2 table that two of its entries lead to, if there is one:
    /// a change of one part of the disk would be one of the other.
    pub(super) fn note_l1(&mut self, l1: WholeTable) -> Option<u64> {
        let mut twice = None;
        self.l2_tables.clear();
        for at in l1.entries.iter().map(|entry| entry & OFFSET_MASK).filter(|at| *at != 0) {
            if !self.l2_tables.insert(at) {
                twice = Some(at);
            }
        }
        self.l1 = l1;
        twice
    }

    /// What the L1 entry for a place on the disk says.
    pub(super) fn l2_table(&self, offset: u64) -> Result<L2Table, Damage> {
        let index = self.g.l1_index(offset);
        let entry = self.l1.get(index);
        let host = entry & OFFSET_MASK;
        if host == 0 {
            return Ok(L2Table::None);
        }
        if !host.is_multiple_of(self.g.cluster_size()) {
            return Err(Damage(format!("L1 entry {index} leads to {host:#x}, which is not a cluster")));
        }
        Ok(L2Table::At { host, copied: entry & COPIED != 0 })
    }

    /// The L2 entry of the cluster with the byte at `offset`. `None`: there is no L2 table.
    pub(super) fn entry(&mut self, offset: u64) -> Result<Known<Option<Raw>>, Damage> {
        let L2Table::At { host, copied } = self.l2_table(offset)? else { return Ok(Known::Yes(None)) };
        // In a shared table the marks of sole references may be old.
        let sole = if copied { 0 } else { COPIED };
        let at = host + self.g.l2_index(offset) * self.g.l2_entry_bytes();
        let slice_at = self.l2.slice_of(at);
        let subclusters = self.g.subclusters;
        Ok(match self.l2.get(slice_at) {
            None => Known::Load(slice_at),
            Some(slice) => {
                let index = (at - slice_at) as usize / 8;
                let bitmap = if subclusters { get_be64(slice, index + 1) } else { 0 };
                Known::Yes(Some(Raw { entry: get_be64(slice, index) & !sole, bitmap }))
            }
        })
    }

    /// Sets the L2 entry of a cluster. False if its slice is not here.
    pub(super) fn set_entry(&mut self, offset: u64, raw: Raw) -> bool {
        let Ok(L2Table::At { host, .. }) = self.l2_table(offset) else { return false };
        let bytes = self.g.l2_entry_bytes();
        let subclusters = self.g.subclusters;
        self.l2.change(host + self.g.l2_index(offset) * bytes, bytes, |slot| {
            set_be64(slot, 0, raw.entry);
            if subclusters {
                set_be64(slot, 1, raw.bitmap);
            }
        })
    }

    /// Where the refcount of a cluster of the file is: the slice, and the number in it. `None`: no block yet.
    fn ref_place(&self, cluster: u64) -> Result<Option<(u64, usize)>, Damage> {
        let per_block = self.g.refblock_entries();
        let index = cluster / per_block;
        let block = self.reftable.get(index) & !0x1ff;
        if block == 0 {
            return Ok(None);
        }
        if !block.is_multiple_of(self.g.cluster_size()) || block >= 1 << 56 {
            return Err(Damage(format!(
                "refcount table entry {index} leads to {block:#x}, which is not a cluster"
            )));
        }
        let per_slice = (self.refs.slice_bytes() * 8) >> self.g.refcount_order;
        let inside = cluster % per_block;
        Ok(Some((block + inside / per_slice * self.refs.slice_bytes(), (inside % per_slice) as usize)))
    }

    /// The refcount of a cluster of the file.
    pub(super) fn refcount(&mut self, cluster: u64) -> Result<Known<u64>, Damage> {
        let Some((slice_at, index)) = self.ref_place(cluster)? else { return Ok(Known::Yes(0)) };
        let order = self.g.refcount_order;
        Ok(match self.refs.get(slice_at) {
            None => Known::Load(slice_at),
            Some(slice) => Known::Yes(get_refcount(slice, order, index)),
        })
    }

    /// Sets the refcount of a cluster of the file. False if its slice is not here.
    pub(super) fn set_refcount(&mut self, cluster: u64, value: u64) -> bool {
        let Ok(Some((slice_at, index))) = self.ref_place(cluster) else { return false };
        let order = self.g.refcount_order;
        // The byte or bytes of this one count, so that only its page is marked.
        let (at, bytes, index) = if order < 3 {
            let per_byte = 8 >> order;
            (slice_at + (index / per_byte) as u64, 1, index % per_byte)
        } else {
            let bytes = 1u64 << (order - 3);
            (slice_at + index as u64 * bytes, bytes, 0)
        };
        self.refs.change(at, bytes, |slot| set_refcount(slot, order, index, value))
    }

    /// The table, if any, that bytes `from..to` of the file belong to.
    pub(super) fn table_at(&self, from: u64, to: u64) -> Option<&'static str> {
        let cluster = self.g.cluster_size();
        let first = self.g.cluster_start(from);
        let within = |tables: &BTreeSet<u64>| tables.range(first..to).next().is_some();
        let before_end = self.fixed.range(..to).next_back();
        if before_end.is_some_and(|(_, end)| *end > from) {
            return Some("a fixed table");
        }
        let overlaps = |table: &WholeTable| {
            let end = table.offset + (table.entries.len() as u64 * 8).next_multiple_of(cluster);
            table.offset < to && from < end
        };
        if overlaps(&self.l1) {
            Some("the L1 table")
        } else if overlaps(&self.reftable) {
            Some("the refcount table")
        } else if within(&self.l2_tables) {
            Some("an L2 table")
        } else if within(&self.refblocks) {
            Some("a refcount block")
        } else {
            None
        }
    }

    /// Notes that clusters are not referred to any more.
    pub(super) fn free(&mut self, freed: Freed) {
        match self.freed.last_mut() {
            Some(last) if last.first + last.count == freed.first && last.discard == freed.discard => {
                last.count += freed.count;
            }
            _ => self.freed.push(freed),
        }
    }
}
