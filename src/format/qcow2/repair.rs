//! Repairing: what a check has found wrong is made right, where that can only make the image better.
//!
//! In this order: L2 entries that have no data and an impossible place lose the place; a table of snapshots that is
//! incomplete or too large is written anew; refcounts are lowered where they are, or all of them are made anew next to
//! the old ones, with one write of the header that switches over; marks of sole references are set right. A power cut
//! leaves the old or the new of each.
//!
//! Nothing is freed as long as something could not be read that may use it: when refcounts are made anew then, what was
//! in use stays in use. Whoever can read it later (an older copy of a table, another program) finds its clusters as
//! they were. Repairing leaks alone changes nothing else, except for marks that follow from the new counts.

use std::collections::BTreeSet;

use super::alloc::GROWTH_BYTES;
use super::check::Check;
use super::count::Counts;
use super::entry::{COPIED, OFFSET_MASK, Raw, get_be64, get_refcount, set_be64, set_refcount};
use super::geometry::{Geometry, REFTABLE_BYTES_MAX};
use super::header::{autoclear, extension, incompatible};
use super::image::{Fault, Qcow2};
use super::info::{CheckReport, Repair};
use super::snapshot::Snapshot;
use blockferry_ring::Errno;

/// What can be done where snapshots or bitmaps cannot be read.
const CURE: &str = "; `--repair drop-unreadable` drops snapshots and bitmaps that cannot be read";

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
        // What was dropped is not there any more.
        let again_for = if repair.is_all() { Repair::All } else { repair };
        let look_again = |first: &CheckReport| {
            let mut check = Check::new_for(self, again_for);
            check.lacked_none = first.leaks == 0 && first.unread.is_none();
            check
        };
        let mut check = Check::new_for(self, repair);
        check.look().await?;
        let mut first = check.report.clone();
        let is_right = first.corruptions == 0 && first.leaks == 0;
        // Where not all could be looked at, what is in use is not known.
        if repair != Repair::None && first.check_errors == 0 {
            self.drop_unknown_features().await?;
        }
        if repair == Repair::None || is_right || first.check_errors > 0 {
            if repair.is_all() && is_right && first.check_errors == 0 {
                self.clear_marks().await?;
            }
            return Ok(first);
        }
        let was_dirty = self.header.borrow().incompatible & incompatible::DIRTY != 0;
        if repair.is_all()
            && check.snapshots.is_some()
            && let Err(why) = check.room_for(check.snapshot_room()).await
        {
            first.messages.push(why);
            return Ok(first);
        }
        if repair.is_all() && self.mend_tables(&check).await? {
            self.reload().await?;
            check = look_again(&first);
            check.look().await?;
            if check.report.check_errors > 0 {
                return Ok(check.report);
            }
        }
        let said = check.repair_refcounts(repair).await?;
        self.flush_files().await?;
        self.reload().await?;
        let mut again = look_again(&first);
        again.look().await?;
        let mut report = again.report;
        report.leaks_fixed = first.leaks.saturating_sub(report.leaks);
        report.corruptions_fixed = first.corruptions.saturating_sub(report.corruptions);
        report.messages = first.messages;
        report.messages.extend(said);
        if repair.is_all() && report.corruptions == 0 && report.check_errors == 0 {
            self.clear_marks().await?;
        } else if !was_dirty && self.header.borrow().incompatible & incompatible::DIRTY != 0 {
            self.header.borrow_mut().incompatible &= !incompatible::DIRTY;
            self.write_header().await?;
            self.flush_files().await?;
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
        self.repair_copied_of(None).await
    }

    /// The same after a check: marks are set only where the check has found no other reference, and tables that lie on
    /// others are left alone.
    async fn repair_copied_of(&self, check: Option<&Check<'_>>) -> Result<(), Fault> {
        let entries = self.meta.borrow().l1.entries.clone();
        let size = self.g.cluster_size();
        let mut seen = BTreeSet::new();
        for (index, entry) in entries.iter().enumerate() {
            self.let_others(1).await;
            let host = entry & OFFSET_MASK;
            if check.is_some() && *entry == COPIED {
                self.meta.borrow_mut().l1.set(index as u64, 0);
            }
            if host == 0 || !host.is_multiple_of(size) || host >= self.file_len() {
                continue;
            }
            if seen.insert(host) && check.is_none_or(|check| check.is_no_other_table(host)) {
                self.repair_copied_in(host, check).await?;
            }
            let wanted = self.marked(*entry, host, check).await?;
            if wanted != *entry {
                self.meta.borrow_mut().l1.set(index as u64, wanted);
            }
        }
        let pages = self.meta.borrow_mut().l1.take_dirty();
        self.write_pages(&pages).await?;
        self.meta.borrow_mut().l2.forget(0, u64::MAX);
        Ok(())
    }

    /// The marks of one L2 table.
    async fn repair_copied_in(&self, at: u64, check: Option<&Check<'_>>) -> Result<(), Fault> {
        let size = self.g.cluster_size();
        let step = self.g.l2_entry_bytes() as usize;
        if self.is_hole(at, size).await? {
            return Ok(());
        }
        let mut bytes = self.read_bytes(at, size).await?;
        let before = bytes.clone();
        for slot in bytes.chunks_exact_mut(step) {
            self.let_others(1).await;
            let bitmap = if step == 16 { get_be64(slot, 1) } else { 0 };
            let raw = Raw { entry: get_be64(slot, 0), bitmap };
            let Ok(cluster) = raw.decode(&self.g, self.data_file.is_some()) else { continue };
            let entry = match cluster.host() {
                Some(_) if self.data_file.is_some() => raw.entry | COPIED,
                // What lies beyond the end of the file is nobody's.
                Some((host, _)) if check.is_some() && host >= self.file_len() => raw.entry & !COPIED,
                Some((host, _)) => self.marked(raw.entry, host, check).await?,
                None => raw.entry & !COPIED,
            };
            set_be64(slot, 0, entry);
        }
        if bytes != before {
            self.write_bytes(at, &bytes).await?;
        }
        Ok(())
    }

    /// An entry that leads to `host`, with the mark that it has to have.
    async fn marked(&self, entry: u64, host: u64, check: Option<&Check<'_>>) -> Result<u64, Fault> {
        let cluster = host >> self.g.cluster_bits;
        if self.refcount_of(cluster).await? != 1 {
            return Ok(entry & !COPIED);
        }
        // A refcount that is too low makes nobody the sole one, and neither does one that may be.
        let is_sole =
            check.is_none_or(|check| check.report.unread.is_none() && check.counts.get(cluster) <= 1);
        Ok(if is_sole { entry | COPIED } else { entry })
    }

    /// Mends what is not a matter of refcounts. Whether there was something.
    async fn mend_tables(&self, check: &Check<'_>) -> Result<bool, Fault> {
        if check.flawed_entries > 0 {
            Check::mending(check).look().await?;
            self.flush_files().await?;
        }
        if check.drops_bitmaps {
            {
                let mut header = self.header.borrow_mut();
                header.autoclear &= !autoclear::BITMAPS;
                header.set_extension(extension::BITMAPS, None);
            }
            self.write_header().await?;
            self.flush_files().await?;
        }
        if let Some(list) = &check.snapshots {
            let room = check.room_for(check.snapshot_room()).await.map_err(Fault::Damage)?;
            match check.snapshots_stay {
                true => self.count_snapshots(list.len()).await?,
                false => self.move_snapshots(list, room).await?,
            }
        }
        Ok(check.flawed_entries > 0 || check.snapshots.is_some() || check.drops_bitmaps)
    }

    /// The table of snapshots ends after so many. Nobody has dropped the references of the others yet: they leak.
    async fn count_snapshots(&self, count: usize) -> Result<(), Fault> {
        {
            let mut header = self.header.borrow_mut();
            header.nb_snapshots = count as u32;
            header.snapshots_offset = if count == 0 { 0 } else { header.snapshots_offset };
        }
        self.write_header().await?;
        self.flush_files().await
    }

    /// Writes the table of snapshots behind everything, and switches over. Its clusters have no refcounts yet: the image
    /// says that it is dirty until they have.
    async fn move_snapshots(&self, list: &[Snapshot], end: u64) -> Result<(), Fault> {
        let bytes: Vec<u8> = list.iter().flat_map(Snapshot::encode).collect();
        let at = end << self.g.cluster_bits;
        if !bytes.is_empty() {
            self.reach(at + (bytes.len() as u64).next_multiple_of(self.g.cluster_size())).await?;
            self.write_bytes(at, &bytes).await?;
            self.flush_files().await?;
        }
        {
            let mut header = self.header.borrow_mut();
            header.nb_snapshots = list.len() as u32;
            header.snapshots_offset = if bytes.is_empty() { 0 } else { at };
            if header.version >= 3 {
                header.incompatible |= incompatible::DIRTY;
            }
        }
        self.write_header().await?;
        self.flush_files().await
    }
}

impl Check<'_> {
    /// The cluster behind everything; behind all that is in use, where that is known.
    fn end(&self) -> u64 {
        match self.knows_all {
            true => self.counts.end(),
            false => self.counts.end().max(self.image.g.clusters(self.file_len)),
        }
    }

    /// The most clusters that refcounts for everything take, if they lie from `start` on.
    fn refcount_room(&self, start: u64) -> u64 {
        let g = &self.to;
        let (size, per_block) = (g.cluster_size(), g.refblock_entries());
        let unread = match &self.report.unread {
            Some(_) => g.clusters(self.file_len).div_ceil(per_block),
            None => 0,
        };
        let known = [&self.counts, &self.data_beyond].map(|counts| counts.blocks(per_block).len() as u64);
        let blocks = known.iter().sum::<u64>() + unread + 1;
        let table =
            ((start.saturating_add(blocks) / per_block + 2) * 8).min(REFTABLE_BYTES_MAX).div_ceil(size);
        // And the blocks that count the new ones themselves.
        let all = blocks + table;
        all + all / (per_block - 1) + 2
    }

    /// Clusters of the table of snapshots that a repair writes anew.
    fn snapshot_room(&self) -> u64 {
        let bytes = self.snapshots.iter().flatten().map(Snapshot::bytes).sum();
        if self.snapshots_stay { 0 } else { self.image.g.clusters(bytes) }
    }

    /// Where new tables can be put: `extra` clusters and refcounts for everything. Behind everything that is there, and in
    /// no place that guest data is said to have behind the end of a file that was cut off: that reads as zeroes, and goes
    /// on doing so when the file reaches it. It is the first place with so much room, so that the file becomes no longer
    /// than it has to. `Err` says that a table is named before or in it: as zeroes it would say something else than that it
    /// is lost.
    async fn room_for(&self, extra: u64) -> Result<u64, String> {
        let size = self.image.g.cluster_size();
        let growth = GROWTH_BYTES.div_ceil(size) + 1;
        let mut start = self.end();
        let (mut own, mut end);
        loop {
            // It grows with the distance, and hardly.
            own = extra + self.refcount_room(start);
            loop {
                end = start.saturating_add(own + growth);
                match self.data_beyond.last_before(end) {
                    Some(last) if last >= start => start = last + 1,
                    _ => break,
                }
                self.image.let_others(1).await;
            }
            if extra + self.refcount_room(start) == own {
                break;
            }
        }
        match self.tables_beyond.iter().next() {
            Some((table, _)) if table < end => Err(format!(
                "Nothing was repaired: a table at {:#x} lies behind the end of the file, which is cut off, and would read \
                 as zeroes if the file grew. What is left can be copied (`blockferry convert --salvage`)",
                table * size
            )),
            _ => Ok(start),
        }
    }

    /// Counts the guest data that is named behind the end of the file up to there: the file is about to reach it.
    fn count_beyond(&mut self, end: u64) {
        for (cluster, count) in self.data_beyond.iter().take_while(|(cluster, _)| *cluster < end) {
            self.counts.add_many(cluster, count);
        }
    }

    /// Makes refcounts, and the marks that follow from them, as right as they can be. Gives what there is to say.
    async fn repair_refcounts(&mut self, repair: Repair) -> Result<Option<String>, Fault> {
        let image = self.image;
        let mut said = None;
        let wants_all = repair.is_all() && (self.rebuild || self.refcounts_too_low().await?);
        let max = image.counting().refcount_max();
        if wants_all && self.counts.iter().any(|(_, count)| count > max) {
            said = Some(format!(
                "Refcounts of {} bits are too narrow for what is there: a copy with wider ones is sound (`blockferry \
                 convert -O qcow2 -o refcount_bits=16`)",
                image.counting().refcount_bits()
            ));
        } else if wants_all {
            match self.room_for(0).await {
                Ok(room) => {
                    self.rebuild_refcounts(room).await?;
                    image.reload().await?;
                    self.rebuild = false;
                }
                Err(why) => return Ok(Some(why)),
            }
        }
        if self.rebuild {
            return Ok(said);
        }
        match &self.report.unread {
            None => self.lower_refcounts().await?,
            Some(what) if said.is_none() && self.report.leaks > 0 => {
                let cure = if repair == Repair::DropUnreadable { "" } else { CURE };
                said = Some(format!("Nothing was freed: {what} cannot be read and may use it{cure}"));
            }
            Some(_) => {}
        }
        image.reload().await?;
        let is_known = self.report.unread.is_none() || repair.is_all();
        if self.has_l1 && is_known {
            image.repair_copied_of(Some(self)).await?;
        }
        Ok(said)
    }

    async fn refcounts_too_low(&mut self) -> Result<bool, Fault> {
        let per_block = self.image.counting().refblock_entries();
        for block in self.counts.blocks(per_block) {
            self.image.let_others(per_block).await;
            let found = self.block_counts(block).await;
            for index in 0..per_block {
                let is = found
                    .as_ref()
                    .map_or(0, |f| get_refcount(f, self.image.counting().refcount_order, index as usize));
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
        let (order, per_block) = (image.counting().refcount_order, image.counting().refblock_entries());
        let blocks = self.blocks.clone();
        image.progress.begin("free leaks", blocks.len() as u64 * image.g.cluster_size());
        for (block, host) in blocks {
            image.progress.step(image.g.cluster_size());
            let Some(mut bytes) = self.block_counts(block).await else { continue };
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

    /// Takes the old refcount table and its blocks for unused: they are when the new ones count.
    fn forget_refcount_tables(&mut self) -> BTreeSet<u64> {
        let g = &self.image.g;
        let mut old = BTreeSet::new();
        for (at, len) in std::mem::take(&mut self.refcount_tables) {
            for cluster in at >> g.cluster_bits..(at + len).div_ceil(g.cluster_size()) {
                self.counts.remove(cluster);
                old.insert(cluster);
            }
        }
        old
    }

    /// Counts what was in use as far as anybody can tell as in use, except for `old`: the refcounts that are there, and
    /// where there are none, whatever holds data. Where a refcount is lost, what could not be read may refer to the
    /// cluster as well: it counts once more, so that it is not freed, or written in place, by those who are known.
    async fn keep_unknown(&mut self, old: &BTreeSet<u64>) -> Result<(), Fault> {
        let image = self.image;
        let (size, order, per_block) =
            (image.g.cluster_size(), image.counting().refcount_order, image.counting().refblock_entries());
        let (clusters, max) = (image.g.clusters(self.file_len), image.counting().refcount_max());
        let known: Vec<u64> = self.blocks.keys().copied().collect();
        for block in known {
            image.let_others(per_block).await;
            let Some(found) = self.block_counts(block).await else { continue };
            for cluster in (block * per_block..(block + 1) * per_block).take_while(|at| *at < clusters) {
                let is = get_refcount(&found, order, (cluster % per_block) as usize);
                let counted = self.counts.get(cluster);
                if is > counted && !old.contains(&cluster) {
                    self.counts.add_many(cluster, is - counted);
                } else if is < counted && counted < max {
                    self.counts.add(cluster);
                }
            }
        }
        let mut at = 0;
        while at < self.file_len {
            image.let_others(1).await;
            let extent = image.file().block_status(at, self.file_len - at).await?;
            let end = at + extent.len.clamp(1, self.file_len - at);
            // A file may end far away: its holes cost nothing.
            let data = if extent.zero { 0..0 } else { at / size..end.div_ceil(size) };
            for cluster in data {
                image.let_others(1).await;
                let has_count = self.blocks.contains_key(&(cluster / per_block));
                if !has_count && !old.contains(&cluster) && self.counts.get(cluster) < max {
                    self.counts.add(cluster);
                }
            }
            at = end;
        }
        Ok(())
    }

    /// Makes all refcounts anew from the cluster `start` on, behind everything that is in use, and switches over.
    async fn rebuild_refcounts(&mut self, start: u64) -> Result<(), Fault> {
        let old = self.forget_refcount_tables();
        if self.report.unread.is_some() {
            self.keep_unknown(&old).await?;
        }
        self.count_beyond(start);
        self.write_new_refcounts(start).await?;
        self.switch_refcounts().await
    }

    /// Writes refcounts for all that was counted, and for themselves, from the cluster `start` on. Durable, and not yet
    /// those that count.
    async fn write_new_refcounts(&mut self, start: u64) -> Result<(), Fault> {
        let image = self.image;
        let (size, per_block) = (self.to.cluster_size(), self.to.refblock_entries());
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
        image.progress.begin("refcounts", blocks.len() as u64 * size);
        let mut table = vec![0; (table_clusters * size) as usize];
        for (number, block) in blocks.iter().enumerate() {
            let host = (start + table_clusters + number as u64) * size;
            image.let_others(per_block).await;
            image.write_bytes(host, &block_of(&self.counts, &self.to, *block)).await?;
            set_be64(&mut table, *block as usize, host);
            image.progress.step(size);
        }
        image.write_bytes(start * size, &table).await?;
        self.new_table = (start * size, table_clusters as u32);
        image.flush_files().await
    }

    /// The new ones count from here on: one write of the header.
    async fn switch_refcounts(&self) -> Result<(), Fault> {
        let image = self.image;
        {
            let mut header = image.header.borrow_mut();
            (header.reftable_offset, header.reftable_clusters) = self.new_table;
            header.refcount_order = self.to.refcount_order;
        }
        image.write_header().await?;
        image.flush_files().await
    }

    /// What keeps the refcounts from being made anew with another width.
    fn judge_width(&self) -> Result<(), Fault> {
        let cure = "Repair the image first (`blockferry check --repair all`).";
        let why = if self.report.check_errors > 0 || self.rebuild || !self.has_l1 {
            format!("Not all of its tables can be read, so that what is in use is not known. {cure}")
        } else if self.tables_beyond.end() > 0 || self.data_beyond.end() > 0 {
            "The file of the image was cut off: clusters of it lie behind its end.".into()
        } else if let Some((cluster, count)) =
            self.counts.iter().find(|(_, count)| *count > self.to.refcount_max())
        {
            format!(
                "Refcounts of {} bits go up to {}, and cluster {cluster} has {count} references.",
                self.to.refcount_bits(),
                self.to.refcount_max()
            )
        } else {
            return Ok(());
        };
        Err(Fault::Refused(Errno::EINVAL, why))
    }

    /// Counts all clusters as often at least as they are counted: what nobody is known to use stays in use.
    async fn keep_counted(&mut self) -> Result<(), Fault> {
        let image = self.image;
        let g = image.counting();
        let (clusters, per_block) = (g.clusters(self.file_len), g.refblock_entries());
        let known: Vec<u64> = self.blocks.keys().copied().collect();
        for block in known {
            image.let_others(per_block).await;
            let Some(found) = self.block_counts(block).await else { continue };
            for cluster in (block * per_block..(block + 1) * per_block).take_while(|at| *at < clusters) {
                let is = get_refcount(&found, g.refcount_order, (cluster % per_block) as usize);
                if is > self.to.refcount_max() {
                    return Err(Fault::Refused(
                        Errno::EINVAL,
                        format!(
                            "Refcounts of {} bits go up to {}, and that of cluster {cluster} is {is}.",
                            self.to.refcount_bits(),
                            self.to.refcount_max()
                        ),
                    ));
                }
                let counted = self.counts.get(cluster);
                if is > counted {
                    self.counts.add_many(cluster, is - counted);
                }
            }
        }
        Ok(())
    }
}

/// Refcounts of another width.
impl Qcow2 {
    /// Counts everything for refcounts of another width, and sees that these can hold it.
    async fn count_for_width(&self, refcount_order: u32) -> Result<Check<'_>, Fault> {
        if self.meta.borrow().reftable.entries.is_empty() {
            self.load_tables(true).await?;
        }
        let mut check = Check::new(self);
        check.to = Geometry { refcount_order, ..self.g };
        check.look().await?;
        check.keep_counted().await?;
        check.judge_width()?;
        check.knows_all = check.report.unread.is_none();
        Ok(check)
    }

    /// Whether refcounts can become so wide. Nothing is changed.
    pub(super) async fn judge_width(&self, refcount_order: u32) -> Result<(), Fault> {
        let check = self.count_for_width(refcount_order).await?;
        check.room_for(0).await.map(drop).map_err(|why| Fault::Refused(Errno::EINVAL, why))
    }

    /// Makes refcounts of another width next to the old ones. One write of the header switches over, and what the old
    /// ones lay in is free by what the new ones say.
    pub(super) async fn change_width(&self, refcount_order: u32) -> Result<(), Fault> {
        if refcount_order == self.refcount_order.get() {
            return Ok(());
        }
        self.write_back().await?;
        let mut check = self.count_for_width(refcount_order).await?;
        let start = check.room_for(0).await.map_err(|why| Fault::Refused(Errno::EINVAL, why))?;
        let old = check.forget_refcount_tables();
        check.write_new_refcounts(start).await?;
        if let Err(fault) = check.switch_refcounts().await {
            // Which of the two count is not known: nothing is written any more.
            self.sync.failed.set(Some(Errno::EIO));
            self.corrupt.set(true);
            return Err(fault);
        }
        self.refcount_order.set(refcount_order);
        self.meta.borrow_mut().g.refcount_order = refcount_order;
        for cluster in old.into_iter().filter(|cluster| check.counts.get(*cluster) == 0) {
            // Not giving room back is no error.
            let _ = self.file().discard(cluster << self.g.cluster_bits, self.g.cluster_size()).await;
        }
        self.reload().await
    }
}

/// A refcount block that says what was counted.
fn block_of(counts: &Counts, g: &Geometry, block: u64) -> Vec<u8> {
    let per_block = g.refblock_entries();
    let mut bytes = vec![0; g.cluster_size() as usize];
    for index in 0..per_block {
        let count = counts.get(block * per_block + index).min(g.refcount_max());
        set_refcount(&mut bytes, g.refcount_order, index as usize, count);
    }
    bytes
}
