//! Checking: how often the tables refer to each cluster, against what the refcounts say.
//!
//! The file is read as it is, not what is cached; so the image is flushed first, and nobody may write
//! meanwhile. What is worse than a leak in the refcounts is repaired by making all of them anew, next to the
//! old ones, and switching over with one write of the header: a power cut leaves the old or the new.
//!
//! An image may have been made to keep a check busy. So a table is looked at once, however many lead to it;
//! tables that stand alone (L1 tables, those of bitmaps and snapshots) must not overlap; nothing beyond the end
//! of the file is looked at, and nothing that the filesystem says is a hole. What is left is what the file holds.

use std::collections::{BTreeMap, BTreeSet};

use super::bitmap::Bitmap;
use super::count::{CHUNK, Counts};
use super::entry::{COPIED, Cluster, OFFSET_MASK, Raw, get_be64, get_refcount, set_be64, set_refcount};
use super::geometry::REFTABLE_BYTES_MAX;
use super::header::{autoclear, incompatible};
use super::image::{Fault, Qcow2};
use super::info::{CheckReport, Repair};
use super::meta::L1_RESERVED;
use blockferry_ring::Errno;

/// The most lines of what is wrong that one check keeps.
pub const MESSAGES_MAX: usize = 1000;

/// A check under way.
struct Check<'a> {
    image: &'a Qcow2,
    report: CheckReport,
    counts: Counts,
    file_len: u64,
    /// Tables that only the header or one entry of a directory leads to: from, to.
    alone: BTreeMap<u64, u64>,
    /// L2 tables, and how many L1 entries lead to each.
    tables: Counts,
    /// Refcount blocks that can be one, by number.
    blocks: BTreeMap<u64, u64>,
    /// The refcount table is counted among what is in use.
    has_reftable: bool,
    /// The refcounts cannot be mended where they are.
    rebuild: bool,
    next_host: Option<u64>,
    /// Entries of the active tables whose mark of a sole reference is wrong.
    wrong_copied: u64,
}

impl Qcow2 {
    /// Looks at everything, repairs what `repair` says, and looks again if it did.
    pub(super) async fn check_image(&self, repair: Repair) -> Result<CheckReport, Fault> {
        if repair != Repair::None && self.read_only.get() {
            return Err(Fault::Refused(Errno::EROFS, "The image was opened read-only.".into()));
        }
        self.flush_all().await?;
        if self.meta.borrow().reftable.entries.is_empty() {
            self.load_tables(true).await?;
        }
        let mut check = Check::new(self);
        check.look().await?;
        let first = check.report.clone();
        if repair == Repair::None || (first.corruptions == 0 && first.leaks == 0) {
            if repair == Repair::All && first.check_errors == 0 && first.corruptions == 0 {
                self.clear_marks().await?;
            }
            return Ok(first);
        }
        if check.rebuild || check.refcounts_too_low().await? {
            if repair == Repair::All {
                check.rebuild_refcounts().await?;
            }
        } else {
            check.lower_refcounts().await?;
        }
        if repair == Repair::All {
            self.reload().await?;
            self.repair_copied().await?;
        }
        self.flush_files().await?;
        self.reload().await?;
        let mut again = Check::new(self);
        again.look().await?;
        let mut report = again.report;
        report.leaks_fixed = first.leaks.saturating_sub(report.leaks);
        report.corruptions_fixed = first.corruptions.saturating_sub(report.corruptions);
        report.messages = first.messages;
        if repair == Repair::All && report.corruptions == 0 && report.check_errors == 0 {
            self.clear_marks().await?;
        }
        Ok(report)
    }

    /// Refcounts may be off (the dirty bit): all of them are made right.
    pub(super) async fn repair_refcounts(&self) -> Result<(), Fault> {
        let report = self.check_image(Repair::All).await?;
        if report.corruptions > 0 || report.check_errors > 0 {
            return Err(Fault::Damage("its refcounts cannot be repaired".into()));
        }
        self.reload().await?;
        self.note_fixed_tables().await
    }

    /// The image is whole: it need not say otherwise.
    async fn clear_marks(&self) -> Result<(), Fault> {
        let marks = incompatible::DIRTY | incompatible::CORRUPT;
        if self.header.borrow().incompatible & marks == 0 {
            return Ok(());
        }
        self.flush_files().await?;
        self.header.borrow_mut().incompatible &= !marks;
        self.write_header().await?;
        self.flush_files().await?;
        self.corrupt.set(false);
        Ok(())
    }

    /// Forgets all tables and reads them anew.
    pub(super) async fn reload(&self) -> Result<(), Fault> {
        {
            let mut meta = self.meta.borrow_mut();
            meta.l2.forget(0, u64::MAX);
            meta.refs.forget(0, u64::MAX);
            meta.freed.clear();
            meta.releasing.clear();
            meta.hint = 0;
            meta.virgin = self.file_len().next_multiple_of(self.g.cluster_size()).max(meta.virgin);
        }
        self.packing.reset();
        self.load_tables(true).await
    }

    /// Sets the mark of a sole reference where it is right and takes it away where not.
    pub(super) async fn repair_copied(&self) -> Result<(), Fault> {
        let entries = self.meta.borrow().l1.entries.clone();
        let size = self.g.cluster_size();
        let step = self.g.l2_entry_bytes() as usize;
        let mut seen = BTreeSet::new();
        for (index, entry) in entries.iter().enumerate() {
            self.let_others(1).await;
            let host = entry & OFFSET_MASK;
            if host == 0 || !host.is_multiple_of(size) || host >= self.file_len() || !seen.insert(host) {
                continue;
            }
            let hole = self.is_hole(host, size).await?;
            let mut bytes = if hole { Vec::new() } else { self.read_bytes(host, size).await? };
            let before = bytes.clone();
            for slot in bytes.chunks_exact_mut(step) {
                self.let_others(1).await;
                let bitmap = if step == 16 { get_be64(slot, 1) } else { 0 };
                let raw = Raw { entry: get_be64(slot, 0), bitmap };
                let Ok(cluster) = raw.decode(&self.g, self.data_file.is_some()) else { continue };
                let copied = match cluster.host() {
                    Some(_) if self.data_file.is_some() => true,
                    Some((host, _)) => self.refcount_of(host >> self.g.cluster_bits).await? == 1,
                    None => false,
                };
                set_be64(slot, 0, if copied { raw.entry | COPIED } else { raw.entry & !COPIED });
            }
            if bytes != before {
                self.write_bytes(host, &bytes).await?;
            }
            let copied = self.refcount_of(host >> self.g.cluster_bits).await? == 1;
            let wanted = if copied { entry | COPIED } else { entry & !COPIED };
            if wanted != *entry {
                self.meta.borrow_mut().l1.set(index as u64, wanted);
            }
        }
        let pages = self.meta.borrow_mut().l1.take_dirty();
        self.write_pages(&pages).await?;
        self.meta.borrow_mut().l2.forget(0, u64::MAX);
        Ok(())
    }
}

impl<'a> Check<'a> {
    fn new(image: &'a Qcow2) -> Check<'a> {
        Check {
            image,
            report: CheckReport::default(),
            counts: Counts::default(),
            file_len: image.file_len(),
            alone: BTreeMap::new(),
            tables: Counts::default(),
            blocks: BTreeMap::new(),
            has_reftable: false,
            rebuild: false,
            next_host: None,
            wrong_copied: 0,
        }
    }

    fn say(&mut self, text: String) {
        if self.report.messages.len() < MESSAGES_MAX {
            self.report.messages.push(text);
        }
    }

    fn corrupt(&mut self, text: String) {
        self.report.corruptions += 1;
        self.say(format!("ERROR {text}"));
    }

    /// One more reference to all clusters that `len` bytes at `at` touch. False if they are not in the file.
    fn refer(&mut self, at: u64, len: u64, what: &str) -> bool {
        self.refer_often(at, len, what, 1)
    }

    fn refer_often(&mut self, at: u64, len: u64, what: &str, times: u64) -> bool {
        if len == 0 {
            return true;
        }
        let size = self.image.g.cluster_size();
        let bits = self.image.g.cluster_bits;
        // The last cluster of a file may be there in part.
        if at.checked_add(len).is_none_or(|end| end >= self.file_len.saturating_add(size)) {
            self.corrupt(format!("{what} at {at:#x} ({len} bytes) lies beyond the end of the file"));
            return false;
        }
        for cluster in at >> bits..(at + len).div_ceil(size) {
            if !self.counts.add_many(cluster, times) {
                if self.report.check_errors == 0 {
                    self.say("There are more clusters in use than can be counted".into());
                }
                self.report.check_errors += 1;
                return false;
            }
        }
        true
    }

    /// The same for a table that must not share clusters with another of its kind.
    fn refer_alone(&mut self, at: u64, len: u64, what: &str) -> bool {
        let size = self.image.g.cluster_size();
        let end = at.saturating_add(len).checked_next_multiple_of(size).unwrap_or(u64::MAX);
        let start = self.image.g.cluster_start(at);
        if self.alone.range(..end).next_back().is_some_and(|(_, before)| *before > start) {
            self.corrupt(format!("{what} at {at:#x} ({len} bytes) lies on another table"));
            return false;
        }
        if len > 0 {
            self.alone.insert(start, end);
        }
        self.report.check_errors == 0 && self.refer(at, len, what)
    }

    /// The entries of a table in the file that are not 0, and their numbers.
    async fn entries(&self, at: u64, len: u64) -> Result<Vec<(usize, u64)>, Fault> {
        if self.image.is_hole(at, len).await? {
            return Ok(Vec::new());
        }
        let table = self.image.read_bytes(at, len).await?;
        let all = (0..table.len() / 8).map(|index| (index, get_be64(&table, index)));
        Ok(all.filter(|(_, entry)| *entry != 0).collect())
    }

    async fn look(&mut self) -> Result<(), Fault> {
        let image = self.image;
        let size = image.g.cluster_size();
        self.report.total_clusters = image.g.clusters(image.len.get());
        self.refer_alone(0, size, "the header");
        let (l1_at, l1_len, l1) = {
            let meta = image.meta.borrow();
            let all = meta.l1.entries.iter().copied().enumerate();
            let used: Vec<(usize, u64)> = all.filter(|(_, entry)| *entry != 0).collect();
            (meta.l1.offset, meta.l1.entries.len() as u64 * 8, used)
        };
        self.refer_alone(l1_at, l1_len, "the L1 table");
        self.look_at_l1(&l1).await;
        self.look_at_snapshots().await?;
        self.look_at_tables(&l1).await?;
        self.look_at_bitmaps().await?;
        self.look_at_refcount_tables().await;
        if self.report.check_errors > 0 {
            // Not all is counted: nothing can be compared.
            return Ok(());
        }
        self.compare().await?;
        self.look_at_copied(&l1).await
    }

    async fn look_at_l1(&mut self, l1: &[(usize, u64)]) {
        let size = self.image.g.cluster_size();
        for (index, entry) in l1 {
            self.image.let_others(1).await;
            let host = entry & OFFSET_MASK;
            if entry & L1_RESERVED != 0 {
                self.corrupt(format!("L1 entry {index} has reserved bits set ({entry:#018x})"));
            }
            if host == 0 {
                continue;
            }
            if !host.is_multiple_of(size) {
                self.corrupt(format!("L1 entry {index} leads to {host:#x}, which is not a cluster"));
                continue;
            }
            if self.refer(host, size, "an L2 table") {
                self.tables.add(host >> self.image.g.cluster_bits);
            }
        }
    }

    /// Looks at all L2 tables: first those of the active L1 table in their order, then those of snapshots.
    async fn look_at_tables(&mut self, l1: &[(usize, u64)]) -> Result<(), Fault> {
        let bits = self.image.g.cluster_bits;
        let mut tables = std::mem::take(&mut self.tables);
        for (_, entry) in l1 {
            let cluster = (entry & OFFSET_MASK) >> bits;
            let times = tables.take(cluster);
            self.image.let_others(1).await;
            self.look_at_table(cluster << bits, times, true).await?;
        }
        for (cluster, times) in tables.iter() {
            self.look_at_table(cluster << bits, times, false).await?;
        }
        Ok(())
    }

    async fn look_at_table(&mut self, at: u64, times: u64, active: bool) -> Result<(), Fault> {
        let size = self.image.g.cluster_size();
        if times > 0 && self.report.check_errors == 0 && !self.image.is_hole(at, size).await? {
            let table = self.image.read_bytes(at, size).await?;
            self.look_at_l2(&table, at, times, active).await;
        }
        Ok(())
    }

    /// An L2 table to which `times` L1 entries lead.
    async fn look_at_l2(&mut self, table: &[u8], at: u64, times: u64, active: bool) {
        let image = self.image;
        let g = &image.g;
        let step = g.l2_entry_bytes() as usize;
        for (index, slot) in table.chunks_exact(step).enumerate() {
            image.let_others(1).await;
            let bitmap = if step == 16 { get_be64(slot, 1) } else { 0 };
            let raw = Raw { entry: get_be64(slot, 0), bitmap };
            if raw == Raw::UNALLOCATED {
                continue;
            }
            let cluster = match raw.decode(g, image.data_file.is_some()) {
                Ok(cluster) => cluster,
                Err(error) => {
                    self.corrupt(format!("entry {index} of the L2 table at {at:#x}: {error}"));
                    continue;
                }
            };
            match cluster {
                Cluster::Compressed { host, len } => {
                    if raw.entry & COPIED != 0 {
                        self.corrupt(format!(
                            "entry {index} of the L2 table at {at:#x}: compressed and marked as sole"
                        ));
                    }
                    self.refer_often(host - host % 512, len + host % 512, "a compressed cluster", times);
                    if active {
                        self.report.compressed_clusters += 1;
                        self.report.allocated_clusters += 1;
                        // Compressed clusters are fragments by nature.
                        self.report.fragmented_clusters += 1;
                    }
                }
                other => {
                    let Some((host, _)) = other.host() else { continue };
                    if active {
                        self.report.allocated_clusters += 1;
                        if self.next_host.is_some_and(|next| next != host) {
                            self.report.fragmented_clusters += 1;
                        }
                        self.next_host = Some(host + g.cluster_size());
                    }
                    if image.data_file.is_none() {
                        self.refer_often(host, g.cluster_size(), "a cluster of data", times);
                    }
                }
            }
        }
    }

    async fn look_at_snapshots(&mut self) -> Result<(), Fault> {
        let (snapshots, bytes) = match self.image.read_snapshots().await {
            Ok(found) => found,
            Err(Fault::Damage(why)) => {
                self.corrupt(why);
                return Ok(());
            }
            Err(fault) => return Err(fault),
        };
        let at = self.image.header.borrow().snapshots_offset;
        self.refer_alone(at, bytes, "the table of snapshots");
        for snapshot in &snapshots {
            let (at, len) = (snapshot.l1_offset, u64::from(snapshot.l1_size) * 8);
            if self.refer_alone(at, len, "the L1 table of a snapshot") {
                let l1 = self.entries(at, len).await?;
                self.look_at_l1(&l1).await;
            }
        }
        Ok(())
    }

    async fn look_at_bitmaps(&mut self) -> Result<(), Fault> {
        if self.image.header.borrow().autoclear & autoclear::BITMAPS == 0 {
            return Ok(());
        }
        let (at, bytes, entries) = match self.image.bitmap_directory().await {
            Ok(Some(found)) => found,
            Ok(None) => return Ok(()),
            Err(Fault::Damage(why)) => {
                self.corrupt(why);
                return Ok(());
            }
            Err(fault) => return Err(fault),
        };
        self.refer_alone(at, bytes.len() as u64, "the directory of bitmaps");
        for bitmap in entries {
            self.look_at_bitmap(&bitmap).await?;
        }
        Ok(())
    }

    async fn look_at_bitmap(&mut self, bitmap: &Bitmap) -> Result<(), Fault> {
        let len = u64::from(bitmap.table_entries) * 8;
        if len > 64 << 20 || !self.refer_alone(bitmap.table_offset, len, "the table of a bitmap") {
            return Ok(());
        }
        for (_, entry) in self.entries(bitmap.table_offset, len).await? {
            let host = entry & OFFSET_MASK;
            if host != 0 {
                self.refer(host, self.image.g.cluster_size(), "a cluster of a bitmap");
            }
        }
        Ok(())
    }

    async fn look_at_refcount_tables(&mut self) {
        let size = self.image.g.cluster_size();
        let (at, entries) = {
            let meta = self.image.meta.borrow();
            (meta.reftable.offset, meta.reftable.entries.clone())
        };
        self.has_reftable = self.refer_alone(at, entries.len() as u64 * 8, "the refcount table");
        self.rebuild |= !self.has_reftable;
        for (index, entry) in entries.iter().enumerate().filter(|(_, entry)| **entry != 0) {
            self.image.let_others(1).await;
            let host = entry & !0x1ff;
            if entry & 0x1ff != 0 || !host.is_multiple_of(size) || host >= 1 << 56 {
                self.corrupt(format!(
                    "refcount table entry {index} leads to {entry:#x}, which is not a cluster"
                ));
                self.rebuild = true;
            } else if !self.refer(host, size, "a refcount block") {
                self.rebuild = true;
            } else if self.counts.get(host >> self.image.g.cluster_bits) != 1 {
                self.corrupt(format!("the refcount block at {host:#x} is something else as well"));
                self.rebuild = true;
            } else {
                self.blocks.insert(index as u64, host);
            }
        }
    }

    /// Refcounts in the file against references, cluster by cluster.
    async fn compare(&mut self) -> Result<(), Fault> {
        let image = self.image;
        let end = image.g.clusters(self.file_len).max(self.counts.end());
        let per_block = image.g.refblock_entries();
        let mut last_used = 0;
        let counted = self.counts.blocks(per_block);
        let blocks: BTreeSet<u64> = self.blocks.keys().copied().chain(counted).collect();
        for block in blocks {
            let found = self.block_counts(block).await?;
            let clusters = block * per_block..((block + 1) * per_block).min(end);
            for first in clusters.clone().step_by(CHUNK as usize) {
                image.let_others(CHUNK).await;
                let counts = self.counts.chunk(first);
                for (cluster, wanted) in (first..clusters.end).zip(counts) {
                    let is = found.as_ref().map_or(0, |f| {
                        get_refcount(f, image.g.refcount_order, (cluster % per_block) as usize)
                    });
                    if is > 0 || wanted > 0 {
                        last_used = cluster + 1;
                        self.judge(cluster, is, wanted.into());
                    }
                }
            }
        }
        self.report.image_end_offset = last_used * image.g.cluster_size();
        Ok(())
    }

    /// What the refcount of a cluster is, against what it should be.
    fn judge(&mut self, cluster: u64, is: u64, wanted: u64) {
        if is < wanted {
            self.corrupt(format!("cluster {cluster} refcount={is} reference={wanted}"));
        } else if is > wanted {
            self.report.leaks += 1;
            self.say(format!("Leaked cluster {cluster} refcount={is} reference={wanted}"));
        }
    }

    /// A refcount block as it is in the file; `None`: there is none, it is all zeroes, or it cannot be one.
    async fn block_counts(&self, block: u64) -> Result<Option<Vec<u8>>, Fault> {
        let size = self.image.g.cluster_size();
        match self.blocks.get(&block) {
            Some(host) if !self.image.is_hole(*host, size).await? => {
                Ok(Some(self.image.read_bytes(*host, size).await?))
            }
            _ => Ok(None),
        }
    }

    async fn refcounts_too_low(&self) -> Result<bool, Fault> {
        let per_block = self.image.g.refblock_entries();
        for block in self.counts.blocks(per_block) {
            self.image.let_others(per_block).await;
            let found = self.block_counts(block).await?;
            for index in 0..per_block {
                let is = found
                    .as_ref()
                    .map_or(0, |f| get_refcount(f, self.image.g.refcount_order, index as usize));
                if is < self.counts.get(block * per_block + index) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// Frees what leaked, in place.
    async fn lower_refcounts(&mut self) -> Result<(), Fault> {
        let image = self.image;
        let (order, per_block) = (image.g.refcount_order, image.g.refblock_entries());
        for (block, host) in self.blocks.clone() {
            let Some(mut bytes) = self.block_counts(block).await? else { continue };
            let before = bytes.clone();
            image.let_others(per_block).await;
            for index in 0..per_block {
                let wanted = self.counts.get(block * per_block + index);
                if get_refcount(&bytes, order, index as usize) > wanted {
                    set_refcount(&mut bytes, order, index as usize, wanted);
                }
            }
            if bytes != before {
                image.write_bytes(host, &bytes).await?;
            }
        }
        Ok(())
    }

    /// Makes all refcounts anew behind everything that is in use, and switches over.
    async fn rebuild_refcounts(&mut self) -> Result<(), Fault> {
        let image = self.image;
        let (size, order, per_block) =
            (image.g.cluster_size(), image.g.refcount_order, image.g.refblock_entries());
        // The old refcount tables are referred to by nobody in the new world.
        let old = image.meta.borrow().reftable.entries.clone();
        let old_at = image.meta.borrow().reftable.offset;
        let start = self.counts.end().max(image.g.clusters(self.file_len));
        let forget = |counts: &mut Counts, at: u64, len: u64| {
            (at >> image.g.cluster_bits..(at + len).div_ceil(size))
                .for_each(|cluster| counts.remove(cluster));
        };
        if self.has_reftable {
            forget(&mut self.counts, old_at, old.len() as u64 * 8);
        }
        for entry in old.iter().map(|entry| entry & !0x1ff).filter(|at| *at != 0 && at.is_multiple_of(size)) {
            if entry.checked_add(size).is_some_and(|end| end < self.file_len.saturating_add(size)) {
                forget(&mut self.counts, entry, size);
            }
        }
        // Table and blocks lie behind everything; they count themselves.
        let mut blocks = self.counts.blocks(per_block);
        let (table_clusters, used) = loop {
            let last = blocks.last().copied().unwrap_or(0);
            let table = ((last + 1) * 8).div_ceil(size);
            // Before anything is made of it: a file may claim to end far away.
            if table.saturating_mul(size) > REFTABLE_BYTES_MAX.max(size) {
                let why = "New refcounts for all of it would be too large.";
                return Err(Fault::Refused(Errno::EFBIG, why.into()));
            }
            let used = table + blocks.len() as u64;
            let own = start / per_block..=(start + used - 1) / per_block;
            let missing: Vec<u64> = own.filter(|block| blocks.binary_search(block).is_err()).collect();
            if missing.is_empty() {
                break (table, used);
            }
            blocks.extend(missing);
            blocks.sort_unstable();
        };
        (start..start + used).for_each(|cluster| {
            self.counts.add(cluster);
        });
        image.reach((start + used) * size).await?;
        let mut table = vec![0; (table_clusters * size) as usize];
        for (number, block) in blocks.iter().enumerate() {
            let host = (start + table_clusters + number as u64) * size;
            let mut bytes = vec![0; size as usize];
            image.let_others(per_block).await;
            for index in 0..per_block {
                let count = self.counts.get(block * per_block + index);
                if count > image.g.refcount_max() {
                    return Err(Fault::Refused(
                        Errno::EINVAL,
                        "Refcounts are too narrow for what is there.".into(),
                    ));
                }
                set_refcount(&mut bytes, order, index as usize, count);
            }
            image.write_bytes(host, &bytes).await?;
            set_be64(&mut table, *block as usize, host);
        }
        image.write_bytes(start * size, &table).await?;
        image.flush_files().await?;
        {
            let mut header = image.header.borrow_mut();
            (header.reftable_offset, header.reftable_clusters) = (start * size, table_clusters as u32);
        }
        image.write_header().await?;
        image.flush_files().await
    }

    /// Whether sole references are marked as such, and no others.
    async fn look_at_copied(&mut self, l1: &[(usize, u64)]) -> Result<(), Fault> {
        if self.rebuild {
            return Ok(());
        }
        let mut seen = BTreeSet::new();
        let image = self.image;
        let (size, bits) = (image.g.cluster_size(), image.g.cluster_bits);
        let step = image.g.l2_entry_bytes() as usize;
        for (index, entry) in l1 {
            let host = entry & OFFSET_MASK;
            if host == 0 || !host.is_multiple_of(size) || host >= self.file_len || !seen.insert(host) {
                continue;
            }
            let refcount = image.refcount_of(host >> bits).await?;
            if (refcount == 1) != (entry & COPIED != 0) {
                self.corrupt(format!(
                    "OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x} refcount={refcount}"
                ));
                self.wrong_copied += 1;
            }
            if image.is_hole(host, size).await? {
                continue;
            }
            let table = image.read_bytes(host, size).await?;
            for slot in table.chunks_exact(step) {
                image.let_others(1).await;
                let bitmap = if step == 16 { get_be64(slot, 1) } else { 0 };
                let raw = Raw { entry: get_be64(slot, 0), bitmap };
                let Ok(cluster) = raw.decode(&image.g, image.data_file.is_some()) else { continue };
                let Some((at, copied)) = cluster.host() else { continue };
                let sole = if image.data_file.is_some() {
                    true
                } else if at >= self.file_len {
                    continue;
                } else {
                    image.refcount_of(at >> bits).await? == 1
                };
                if sole != copied {
                    self.corrupt(format!("OFLAG_COPIED data cluster: l2_entry={:x}", raw.entry));
                    self.wrong_copied += 1;
                }
            }
        }
        Ok(())
    }
}
