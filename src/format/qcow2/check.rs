//! Checking: how often the tables refer to each cluster, against what the refcounts say.
//!
//! The file is read as it is, not what is cached; so the image is flushed first, and nobody may write
//! meanwhile. What is done about what is found is in `repair`.
//!
//! An image may have been made to keep a check busy. So a table is looked at once, however many lead to it;
//! tables that stand alone (L1 tables, those of bitmaps and snapshots) must not overlap; nothing beyond the end
//! of the file is looked at, and nothing that the filesystem says is a hole. What is left is what the file holds.
//!
//! What cannot be read (a directory of bitmaps, the L1 table of a snapshot) may refer to anything. Clusters that seem to
//! have leaked may belong to it, so nothing is freed as long as there is such a thing.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};

use super::bitmap::{Bitmap, ENTRY_RESERVED};
use super::count::{CHUNK, Counts};
use super::entry::{
    COMPRESSED, COPIED, Cluster, EntryError, OFFSET_MASK, RESERVED, Raw, get_be64, get_refcount, set_be64,
};
use super::geometry::Geometry;
use super::header::autoclear;
use super::image::{Fault, Qcow2};
use super::info::{CheckReport, Repair};
use super::meta::L1_RESERVED;
use super::snapshot::Snapshot;

/// The most lines of what is wrong that one check keeps.
pub const MESSAGES_MAX: usize = 1000;

/// How far a check is, in bytes of tables.
#[derive(Debug, Default)]
pub struct CheckProgress {
    phase: Cell<&'static str>,
    done: Cell<u64>,
    of: Cell<u64>,
}

impl CheckProgress {
    /// What is being done, how much of it is done, and how much there is.
    pub fn now(&self) -> (&'static str, u64, u64) {
        (self.phase.get(), self.done.get(), self.of.get())
    }

    pub(super) fn begin(&self, phase: &'static str, of: u64) {
        self.phase.set(phase);
        self.done.set(0);
        self.of.set(of);
    }

    /// There is more than was known.
    fn more(&self, bytes: u64) {
        self.of.set(self.of.get() + bytes);
    }

    pub(super) fn step(&self, bytes: u64) {
        self.done.set(self.done.get() + bytes);
    }
}

/// A check under way.
pub(super) struct Check<'a> {
    pub(super) image: &'a Qcow2,
    pub(super) report: CheckReport,
    pub(super) counts: Counts,
    pub(super) file_len: u64,
    /// Tables that only the header or one entry of a directory leads to: from, to.
    alone: BTreeMap<u64, u64>,
    /// The active L1 table is one of them, and all there.
    pub(super) has_l1: bool,
    /// L2 tables, and how many L1 entries lead to each.
    tables: Counts,
    /// Refcount blocks that can be one, by number.
    pub(super) blocks: BTreeMap<u64, u64>,
    /// The refcount table and its blocks, as they were counted: from, bytes.
    pub(super) refcount_tables: Vec<(u64, u64)>,
    /// Sizes with refcounts as wide as new ones are made.
    pub(super) to: Geometry,
    /// Nothing but what was counted is in use.
    pub(super) knows_all: bool,
    /// New refcounts: where their table lies, and its clusters.
    pub(super) new_table: (u64, u32),
    /// The refcounts cannot be mended where they are.
    pub(super) rebuild: bool,
    next_host: Option<u64>,
    /// The table of snapshots as it has to be, if it is not.
    pub(super) snapshots: Option<Vec<Snapshot>>,
    /// It begins just so where it is: only the number of its entries is wrong.
    pub(super) snapshots_stay: bool,
    /// L2 entries that can be mended.
    pub(super) flawed_entries: u64,
    /// What an earlier look has found: its L2 entries are mended where that is safe.
    mending: Option<&'a Check<'a>>,
    /// Clusters behind the end of the file that are named as guest data, and how often.
    pub(super) data_beyond: Counts,
    /// The same for tables.
    pub(super) tables_beyond: Counts,
    /// What is to be repaired.
    repair: Repair,
    /// Entries of the table of snapshots say nothing.
    may_lack_snapshots: bool,
    /// An earlier look has found nothing that such an entry could have led to.
    pub(super) lacked_none: bool,
    /// There are bitmaps to be dropped.
    pub(super) drops_bitmaps: bool,
}

impl<'a> Check<'a> {
    pub(super) fn new(image: &'a Qcow2) -> Check<'a> {
        Check {
            image,
            report: CheckReport::default(),
            counts: Counts::default(),
            file_len: image.file_len(),
            alone: BTreeMap::new(),
            has_l1: false,
            tables: Counts::default(),
            blocks: BTreeMap::new(),
            refcount_tables: Vec::new(),
            to: image.counting(),
            knows_all: false,
            new_table: (0, 0),
            rebuild: false,
            next_host: None,
            snapshots: None,
            snapshots_stay: false,
            flawed_entries: 0,
            mending: None,
            data_beyond: Counts::default(),
            tables_beyond: Counts::default(),
            repair: Repair::None,
            may_lack_snapshots: false,
            lacked_none: false,
            drops_bitmaps: false,
        }
    }

    /// A check for a repair of this kind.
    pub(super) fn new_for(image: &'a Qcow2, repair: Repair) -> Check<'a> {
        Check { repair, ..Check::new(image) }
    }

    /// Snapshots and bitmaps that cannot be read are not to be kept for somebody who can.
    fn drops(&self) -> bool {
        self.repair == Repair::DropUnreadable
    }

    /// Looks again, and mends L2 entries on the way.
    pub(super) fn mending(found: &'a Check<'a>) -> Check<'a> {
        Check { mending: Some(found), repair: found.repair, ..Check::new(found.image) }
    }

    pub(super) fn say(&mut self, text: String) {
        if self.report.messages.len() < MESSAGES_MAX {
            self.report.messages.push(text);
        }
    }

    fn corrupt(&mut self, text: String) {
        self.report.corruptions += 1;
        self.say(format!("ERROR {text}"));
    }

    /// Something is there that cannot be read as what it is: what it refers to is not known.
    fn unread(&mut self, what: &str) {
        self.report.unread.get_or_insert_with(|| what.to_owned());
    }

    /// The same for what belongs to bitmaps, which can be dropped as a whole.
    fn unread_bitmap(&mut self, what: &str) {
        match self.drops() {
            true => self.drops_bitmaps = true,
            false => self.unread(what),
        }
    }

    /// Something could not be looked at.
    fn failed(&mut self, text: String) {
        self.report.check_errors += 1;
        self.say(format!("ERROR {text}"));
    }

    /// One more reference to all clusters that `len` bytes at `at` touch. False if they are not in the file.
    fn refer(&mut self, at: u64, len: u64, what: &str) -> bool {
        self.refer_often(at, len, what, 1)
    }

    fn refer_often(&mut self, at: u64, len: u64, what: &str, times: u64) -> bool {
        let is_there = self.count(at, len, what, times);
        if !is_there {
            note_beyond(self.image, &mut self.tables_beyond, at, len, times);
        }
        is_there
    }

    /// The same for what leads nowhere.
    fn refer_to_data(&mut self, at: u64, len: u64, what: &str, times: u64) {
        if !self.count(at, len, what, times) {
            note_beyond(self.image, &mut self.data_beyond, at, len, times);
        }
    }

    fn count(&mut self, at: u64, len: u64, what: &str, times: u64) -> bool {
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

    /// The clusters that the bytes from start to end of a table touch, which must not be shared with another.
    fn clusters_of(&self, at: u64, len: u64) -> (u64, u64) {
        let size = self.image.g.cluster_size();
        let end = at.saturating_add(len).checked_next_multiple_of(size).unwrap_or(u64::MAX);
        (self.image.g.cluster_start(at), end)
    }

    /// A table that stands alone has bytes between these.
    fn is_on_table(&self, start: u64, end: u64) -> bool {
        self.alone.range(..end).next_back().is_some_and(|(_, before)| *before > start)
    }

    /// The same for a table that must not share clusters with another of its kind.
    fn refer_alone(&mut self, at: u64, len: u64, what: &str) -> bool {
        self.refer_alone_often(at, len, what, 1)
    }

    fn refer_alone_often(&mut self, at: u64, len: u64, what: &str, times: u64) -> bool {
        let (start, end) = self.clusters_of(at, len);
        if self.is_on_table(start, end) {
            self.corrupt(format!("{what} at {at:#x} ({len} bytes) lies on another table"));
            return false;
        }
        if len > 0 {
            self.alone.insert(start, end);
        }
        self.report.check_errors == 0 && self.refer_often(at, len, what, times)
    }

    /// Bytes of a table, unless they are a hole or cannot be read, which is noted.
    async fn table(&mut self, at: u64, len: u64, what: &str) -> Option<Vec<u8>> {
        let read = async {
            if self.image.is_hole(at, len).await? {
                return Ok(None);
            }
            self.image.read_bytes(at, len).await.map(Some)
        };
        match read.await {
            Ok(found) => found,
            Err(Fault::Io(error)) => {
                self.failed(format!("{what} at {at:#x} cannot be read: {error}"));
                None
            }
            Err(Fault::Damage(why) | Fault::Refused(_, why)) => {
                self.failed(format!("{what} at {at:#x} cannot be read: {why}"));
                None
            }
        }
    }

    /// The entries of a table in the file that are not 0, and their numbers.
    async fn entries(&mut self, at: u64, len: u64, what: &str) -> Vec<(usize, u64)> {
        let table = self.table(at, len, what).await.unwrap_or_default();
        let all = (0..table.len() / 8).map(|index| (index, get_be64(&table, index)));
        all.filter(|(_, entry)| *entry != 0).collect()
    }

    pub(super) async fn look(&mut self) -> Result<(), Fault> {
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
        let blocks = image.meta.borrow().reftable.entries.iter().filter(|entry| **entry != 0).count();
        image.progress.begin("check", (l1.len() + blocks) as u64 * size);
        self.has_l1 = self.refer_alone(l1_at, l1_len, "the L1 table");
        if !self.has_l1 {
            self.unread("the L1 table");
        }
        self.look_at_l1(&l1, 1).await;
        self.look_at_snapshots().await?;
        self.look_at_tables(&l1).await?;
        self.look_at_bitmaps().await?;
        if self.mending.is_some() {
            return Ok(());
        }
        self.look_at_refcount_tables().await;
        if self.report.check_errors > 0 {
            // Not all is counted: nothing can be compared.
            return Ok(());
        }
        self.compare().await?;
        if self.may_lack_snapshots && self.report.leaks > 0 {
            self.unread("the table of snapshots");
            self.snapshots = None;
        }
        self.look_at_copied(&l1).await
    }

    /// Entries of an L1 table, to which so many snapshots lead.
    async fn look_at_l1(&mut self, l1: &[(usize, u64)], times: u64) {
        let size = self.image.g.cluster_size();
        for (index, entry) in l1 {
            self.image.let_others(1).await;
            let host = entry & OFFSET_MASK;
            if entry & L1_RESERVED != 0 {
                self.corrupt(format!("L1 entry {index} has reserved bits set ({entry:#018x})"));
            }
            if host == 0 {
                if *entry == COPIED {
                    self.corrupt(format!("L1 entry {index} leads nowhere, and says that it does so alone"));
                }
                continue;
            }
            let is_cluster = host.is_multiple_of(size);
            if !is_cluster {
                self.corrupt(format!("L1 entry {index} leads to {host:#x}, which is not a cluster"));
            }
            // What it touches is in use, whatever it is.
            if self.refer_often(host, size, "an L2 table", times) && is_cluster {
                self.tables.add_many(host >> self.image.g.cluster_bits, times);
            } else {
                self.unread("an L2 table");
            }
        }
    }

    /// Looks at all L2 tables: first those of the active L1 table in their order, then those of snapshots.
    async fn look_at_tables(&mut self, l1: &[(usize, u64)]) -> Result<(), Fault> {
        let bits = self.image.g.cluster_bits;
        let mut tables = self.tables.clone();
        for (_, entry) in l1 {
            let cluster = (entry & OFFSET_MASK) >> bits;
            let times = tables.take(cluster);
            self.image.let_others(1).await;
            self.look_at_table(cluster << bits, times, true).await?;
        }
        for (cluster, times) in tables.iter() {
            self.image.progress.more(1 << bits);
            self.look_at_table(cluster << bits, times, false).await?;
        }
        Ok(())
    }

    async fn look_at_table(&mut self, at: u64, times: u64, active: bool) -> Result<(), Fault> {
        let size = self.image.g.cluster_size();
        self.image.progress.step(size);
        if times == 0 || self.report.check_errors > 0 {
            return Ok(());
        }
        let Some(mut table) = self.table(at, size, "an L2 table").await else { return Ok(()) };
        if self.look_at_l2(&mut table, at, times, active).await {
            self.image.write_bytes(at, &table).await?;
        }
        Ok(())
    }

    /// The L2 table at `at` is that, and nothing else as well: what is written to it changes nothing else.
    pub(super) fn is_only_table(&self, at: u64) -> bool {
        let cluster = at >> self.image.g.cluster_bits;
        self.tables.get(cluster) == self.counts.get(cluster)
    }

    /// The same but for guest data, for which a table's marks of sole references mean what they mean anyway.
    pub(super) fn is_no_other_table(&self, at: u64) -> bool {
        !self.is_on_table(at, at + self.image.g.cluster_size())
    }

    /// An L2 table to which `times` L1 entries lead. Whether it was changed.
    async fn look_at_l2(&mut self, table: &mut [u8], at: u64, times: u64, active: bool) -> bool {
        let image = self.image;
        let g = &image.g;
        let step = g.l2_entry_bytes() as usize;
        let mends = self.mending.is_some_and(|found| found.is_only_table(at));
        let mut changed = false;
        for (index, slot) in table.chunks_exact_mut(step).enumerate() {
            image.let_others(1).await;
            let bitmap = if step == 16 { get_be64(slot, 1) } else { 0 };
            let raw = Raw { entry: get_be64(slot, 0), bitmap };
            if raw == Raw::UNALLOCATED {
                continue;
            }
            let here = || format!("entry {index} of the L2 table at {at:#x}");
            let is_compressed = raw.entry & COMPRESSED != 0;
            if !is_compressed && raw.entry & RESERVED != 0 {
                self.corrupt(format!("{} has reserved bits set ({:#018x})", here(), raw.entry));
            }
            if is_compressed && bitmap != 0 {
                self.corrupt(format!("{} is compressed and has subclusters ({bitmap:#018x})", here()));
            }
            match raw.decode(g, image.data_file.is_some()) {
                Ok(cluster) => self.refer_to(cluster, raw, times, active, &here),
                Err(EntryError::Unaligned(_)) if mends && raw.has_no_data(g) => {
                    let mended = raw.without_host(g);
                    set_be64(slot, 0, mended.entry);
                    if step == 16 {
                        set_be64(slot, 1, mended.bitmap);
                    }
                    changed = true;
                }
                Err(error) => {
                    self.corrupt(format!("{}: {error}", here()));
                    let has_no_place = matches!(error, EntryError::Unaligned(_)) && raw.has_no_data(g);
                    self.flawed_entries += u64::from(has_no_place);
                    let host = raw.entry & OFFSET_MASK;
                    // What it touches may be in use.
                    if host != 0 && !is_compressed && image.data_file.is_none() {
                        self.refer_to_data(host, g.cluster_size(), "a cluster of data", times);
                    }
                }
            }
        }
        changed
    }

    /// References of one L2 entry.
    fn refer_to(&mut self, cluster: Cluster, raw: Raw, times: u64, active: bool, here: &dyn Fn() -> String) {
        let image = self.image;
        if let Cluster::Compressed { host, len } = cluster {
            if raw.entry & COPIED != 0 {
                self.corrupt(format!("{}: compressed and marked as sole", here()));
            }
            self.refer_to_data(host - host % 512, len + host % 512, "a compressed cluster", times);
            if active {
                self.report.compressed_clusters += 1;
                self.report.allocated_clusters += 1;
                // Compressed clusters are fragments by nature.
                self.report.fragmented_clusters += 1;
            }
            return;
        }
        let Some((host, _)) = cluster.host() else { return };
        if active {
            self.report.allocated_clusters += 1;
            if self.next_host.is_some_and(|next| next != host) {
                self.report.fragmented_clusters += 1;
            }
            self.next_host = Some(host + image.g.cluster_size());
        }
        if image.data_file.is_none() {
            self.refer_to_data(host, image.g.cluster_size(), "a cluster of data", times);
        }
    }

    async fn look_at_snapshots(&mut self) -> Result<(), Fault> {
        let listed = match self.image.list_snapshots().await {
            Ok(listed) => listed,
            Err(Fault::Io(error)) => {
                self.failed(format!("the table of snapshots cannot be read: {error}"));
                return Ok(());
            }
            Err(fault) => return Err(fault),
        };
        if listed.is_excessive && !self.repair.is_all() {
            // Whoever may not make it smaller goes no further: what it leads to is in use, and is not known.
            for what in &listed.flaws {
                self.failed(format!("{what}; `--repair all` drops what is too much"));
            }
            for what in &listed.unread {
                self.unread("the table of snapshots");
                self.failed(format!("{what}; `--repair drop-unreadable` drops what cannot be read"));
            }
            return Ok(());
        }
        for what in listed.slips.iter().chain(&listed.flaws).chain(&listed.unread) {
            self.corrupt(what.clone());
        }
        // What an entry that was wiped has led to looks as if it had leaked.
        self.may_lack_snapshots = listed.has_empty && !self.drops() && !self.lacked_none;
        let mut is_unread = !listed.unread.is_empty();
        let at = self.image.header.borrow().snapshots_offset;
        is_unread |= !self.refer_alone(at, listed.bytes, "the table of snapshots");
        if is_unread && !self.drops() {
            self.unread("the table of snapshots");
        }
        // Several snapshots may have one table, which is counted for each.
        let mut tables: BTreeMap<(u64, u64), u64> = BTreeMap::new();
        for snapshot in &listed.list {
            *tables.entry(snapshot.table()).or_default() += 1;
        }
        let mut lost = BTreeSet::new();
        for ((at, len), times) in tables {
            let is_possible = at.is_multiple_of(self.image.g.cluster_size()) && at < 1 << 56;
            let what = "the L1 table of a snapshot";
            if is_possible && self.refer_alone_often(at, len, what, times) {
                let l1 = self.entries(at, len, what).await;
                self.image.let_others(len / 8).await;
                self.look_at_l1(&l1, times).await;
            } else if self.drops() {
                lost.insert((at, len));
            } else {
                self.unread(what);
            }
        }
        // Where one entry leads astray, others may have been misread.
        if self.report.unread.is_none() {
            is_unread |= !lost.is_empty();
            let is_wrong = is_unread || !listed.slips.is_empty() || !listed.flaws.is_empty();
            let kept = listed.list.iter().filter(|snapshot| !lost.contains(&snapshot.table()));
            let version = self.image.header.borrow().version;
            self.snapshots = is_wrong.then(|| Snapshot::mended(kept, self.image.len.get(), version));
            self.snapshots_stay = self.snapshots.as_ref().is_some_and(|kept| listed.list.starts_with(kept));
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
                self.unread_bitmap("the directory of bitmaps");
                return Ok(());
            }
            Err(Fault::Io(error)) => {
                self.failed(format!("the directory of bitmaps cannot be read: {error}"));
                return Ok(());
            }
            Err(fault) => return Err(fault),
        };
        if !self.refer_alone(at, bytes.len() as u64, "the directory of bitmaps") {
            self.unread_bitmap("the directory of bitmaps");
        }
        for bitmap in entries {
            self.look_at_bitmap(&bitmap).await;
        }
        Ok(())
    }

    async fn look_at_bitmap(&mut self, bitmap: &Bitmap) {
        let size = self.image.g.cluster_size();
        let name = bitmap.name.escape_debug().to_string();
        if let Some(why) = bitmap.nonsense(size, self.image.len.get()) {
            self.corrupt(format!("the bitmap '{name}' {why}"));
            self.unread_bitmap("a bitmap");
        }
        let (at, len, what) = (bitmap.table_offset, bitmap.table_bytes(), "the table of a bitmap");
        let is_possible = at.is_multiple_of(size) && at < 1 << 56;
        if !is_possible || !self.refer_alone(at, len, what) {
            self.unread_bitmap("a bitmap");
            return;
        }
        for (index, entry) in self.entries(at, len, what).await {
            let host = entry & OFFSET_MASK;
            if entry & ENTRY_RESERVED != 0 || !host.is_multiple_of(size) || (host != 0 && entry & 1 != 0) {
                self.corrupt(format!("entry {index} of the bitmap '{name}' is impossible ({entry:#018x})"));
                self.unread_bitmap("a bitmap");
            }
            if host != 0 {
                self.refer_to_data(host, size, "a cluster of a bitmap", 1);
            }
        }
    }

    async fn look_at_refcount_tables(&mut self) {
        let size = self.image.g.cluster_size();
        let (at, entries) = {
            let meta = self.image.meta.borrow();
            (meta.reftable.offset, meta.reftable.entries.clone())
        };
        if entries.is_empty() {
            self.corrupt("there is no refcount table".into());
            self.rebuild = true;
        } else if self.refer_alone(at, entries.len() as u64 * 8, "the refcount table") {
            self.refcount_tables.push((at, entries.len() as u64 * 8));
        } else {
            self.rebuild = true;
        }
        for (index, entry) in entries.iter().enumerate().filter(|(_, entry)| **entry != 0) {
            self.image.let_others(1).await;
            let host = entry & !0x1ff;
            if entry & 0x1ff != 0 || !host.is_multiple_of(size) || host >= 1 << 56 {
                self.corrupt(format!(
                    "refcount table entry {index} leads to {entry:#x}, which is not a cluster"
                ));
                self.rebuild = true;
                continue;
            }
            if !self.refer(host, size, "a refcount block") {
                self.rebuild = true;
                continue;
            }
            self.refcount_tables.push((host, size));
            if self.counts.get(host >> self.image.g.cluster_bits) != 1 {
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
        let per_block = image.counting().refblock_entries();
        let mut last_used = 0;
        let counted = self.counts.blocks(per_block);
        let blocks: BTreeSet<u64> = self.blocks.keys().copied().chain(counted).collect();
        for block in blocks {
            image.progress.step(image.g.cluster_size());
            let found = self.block_counts(block).await;
            let clusters = block * per_block..((block + 1) * per_block).min(end);
            for first in clusters.clone().step_by(CHUNK as usize) {
                image.let_others(CHUNK).await;
                let counts = self.counts.chunk(first);
                for (cluster, wanted) in (first..clusters.end).zip(counts) {
                    let is = found.as_ref().map_or(0, |f| {
                        get_refcount(f, image.counting().refcount_order, (cluster % per_block) as usize)
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

    /// A refcount block as it is in the file; `None`: there is none, it is all zeroes, or it cannot be one. One that
    /// cannot be read is made anew, like all others.
    pub(super) async fn block_counts(&mut self, block: u64) -> Option<Vec<u8>> {
        let host = *self.blocks.get(&block)?;
        let size = self.image.g.cluster_size();
        let read = async {
            if self.image.is_hole(host, size).await? {
                return Ok(None);
            }
            self.image.read_bytes(host, size).await.map(Some)
        };
        match read.await {
            Ok(found) => found,
            Err(_) => {
                self.corrupt(format!("the refcount block at {host:#x} cannot be read"));
                self.blocks.remove(&block);
                self.rebuild = true;
                None
            }
        }
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
            if host == 0 || !host.is_multiple_of(size) || host >= self.file_len {
                continue;
            }
            let refcount = image.refcount_of(host >> bits).await?;
            if (refcount == 1) != (entry & COPIED != 0) {
                self.corrupt(format!(
                    "OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x} refcount={refcount}"
                ));
            }
            if !seen.insert(host) {
                continue;
            }
            let Some(table) = self.table(host, size, "an L2 table").await else { continue };
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
                }
            }
        }
        Ok(())
    }
}

/// Notes clusters behind the end of the file that something names, as far as a file can ever reach.
fn note_beyond(image: &Qcow2, beyond: &mut Counts, at: u64, len: u64, times: u64) {
    if let Some(end) = at.checked_add(len).filter(|end| *end <= 1 << 56) {
        for cluster in at >> image.g.cluster_bits..end.div_ceil(image.g.cluster_size()) {
            beyond.add_many(cluster, times);
        }
    }
}
