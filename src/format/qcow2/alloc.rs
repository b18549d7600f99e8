//! The allocator: the one place where clusters of the file get and lose references.
//!
//! A cluster is free if its refcount is 0 in memory. What was freed keeps its refcount until nothing durable
//! refers to it and no request looks at it any more ([`Qcow2::release`]), so that quarantine needs no list of
//! its own here. A refcount may be written at any time: in memory it is never lower than what the tables on
//! the disk need. A candidate is taken only if its refcount block was read, and only if no table lies there.
//!
//! A refcount block that is made on the way lies in the range that it counts, at its beginning. So a run that is longer
//! than such a range never comes together by itself: it gets its blocks in one piece, in front of it.

use blockferry_ring::Errno;

use super::entry::{set_be64, set_refcount};
use super::geometry::REFTABLE_BYTES_MAX;
use super::image::{Fault, Qcow2};
use super::meta::{Damage, Freed, Known, Meta, WholeTable};
use crate::block::IoResult;

/// The file grows in steps of this many bytes at least, so that not every cluster changes its length.
pub(super) const GROWTH_BYTES: u64 = 1 << 20;

/// Clusters that were reserved: their refcount is 1, and nothing refers to them yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// Offset of the first in the file.
    pub(super) host: u64,
    /// How many.
    pub(super) count: u64,
    /// They have never been written and read as zeroes.
    pub(super) virgin: bool,
}

/// What a look for free clusters has found.
#[derive(Debug)]
enum Search {
    Found {
        first: u64,
        count: u64,
    },
    Load(u64),
    /// The refcount block with this number is not there yet.
    NewBlock(u64),
    /// The refcount table ends before this block.
    NewTable,
}

impl Meta {
    /// Looks for `want` free clusters in a row; fewer, but one at least, if `partial`.
    fn search(&mut self, want: u64, partial: bool) -> Result<Search, Damage> {
        let mut at = self.hint;
        let mut start = None;
        loop {
            let block = at / self.g.refblock_entries();
            if block >= self.reftable.entries.len() as u64 {
                return Ok(match start {
                    Some(first) if partial => Search::Found { first, count: at - first },
                    _ => Search::NewTable,
                });
            }
            if self.reftable.get(block) == 0 {
                return Ok(match start {
                    Some(first) if partial => Search::Found { first, count: at - first },
                    _ => Search::NewBlock(block),
                });
            }
            match self.refcount(at)? {
                Known::Load(slice) => match start {
                    Some(first) if partial => return Ok(Search::Found { first, count: at - first }),
                    _ => return Ok(Search::Load(slice)),
                },
                Known::Yes(0) => {
                    let first = *start.get_or_insert(at);
                    at += 1;
                    if at - first == want {
                        return Ok(Search::Found { first, count: want });
                    }
                }
                Known::Yes(_) => {
                    if let Some(first) = start.take()
                        && partial
                    {
                        return Ok(Search::Found { first, count: at - first });
                    }
                    if at == self.hint {
                        self.hint += 1;
                    }
                    at += 1;
                }
            }
        }
    }

    /// Takes what was found: refcounts become 1.
    fn take(&mut self, first: u64, count: u64) -> Result<Run, Damage> {
        let size = self.g.cluster_size();
        let (from, to) = (first * size, (first + count) * size);
        if let Some(table) = self.table_at(from, to) {
            return Err(Damage(format!("clusters at {from:#x} are said to be free, and {table} is there")));
        }
        for cluster in first..first + count {
            self.set_refcount(cluster, 1);
        }
        if first == self.hint {
            self.hint = first + count;
        }
        let virgin = from >= self.virgin;
        self.virgin = self.virgin.max(to);
        Ok(Run { host: from, count, virgin })
    }
}

impl Qcow2 {
    /// Reserves up to `want` clusters in a row (all of them unless `partial`).
    pub(super) async fn allocate(&self, want: u64, partial: bool) -> Result<Run, Fault> {
        if !partial && want >= self.counting().refblock_entries() {
            return self.allocate_long(want).await;
        }
        loop {
            let search = self.meta.borrow_mut().search(want.max(1), partial)?;
            match search {
                Search::Load(slice) => self.load_refs(slice).await?,
                Search::NewBlock(block) => self.new_refblock(block).await?,
                Search::NewTable => self.grow_reftable().await?,
                Search::Found { first, count } => {
                    // The file has to reach so far before anything refers to it.
                    let fits = match self.reach((first + count) << self.g.cluster_bits).await {
                        Ok(()) => count,
                        Err(fault) => {
                            let there = self.file().len() >> self.g.cluster_bits;
                            let fits = there.saturating_sub(first).min(count);
                            // What has a length of its own may have room for some of them.
                            if !partial || fits == 0 {
                                return Err(fault);
                            }
                            fits
                        }
                    };
                    let mut meta = self.meta.borrow_mut();
                    // Somebody else may have taken them while the file grew.
                    match meta.search(want.max(1), partial)? {
                        Search::Found { first: f, count: c } if (f, c) == (first, count) => {
                            return Ok(meta.take(first, fits)?);
                        }
                        _ => {}
                    }
                }
            }
        }
    }

    /// The same for a run that is longer than what one refcount block counts: where there is such a run, or behind all
    /// that is counted so far, with its own refcount blocks in front of it. Each refcount is looked at once.
    async fn allocate_long(&self, want: u64) -> Result<Run, Fault> {
        if let Some(first) = self.free_run(want).await? {
            self.reach((first + want) << self.g.cluster_bits).await?;
            let mut meta = self.meta.borrow_mut();
            // Somebody else may have taken some of them meanwhile.
            let is_free = (first..first + want).all(|at| matches!(meta.refcount(at), Ok(Known::Yes(0))));
            if is_free {
                return Ok(meta.take(first, want)?);
            }
        }
        let size = self.g.cluster_size();
        let per_block = self.counting().refblock_entries();
        loop {
            let (first, blocks, fits) = {
                let meta = self.meta.borrow();
                let entries = &meta.reftable.entries;
                let first = entries.iter().rposition(|entry| *entry != 0).map_or(0, |last| last as u64 + 1);
                // So many blocks that they count themselves as well.
                let blocks = want.div_ceil(per_block - 1);
                (first, blocks, first + blocks <= entries.len() as u64)
            };
            if !fits {
                self.grow_reftable_to(first + blocks).await?;
                continue;
            }
            let _turn = self.growing.take().await;
            let used = blocks + want;
            let host = first * per_block * size;
            {
                let meta = self.meta.borrow();
                let range = first as usize..(first + blocks) as usize;
                if meta.reftable.entries.get(range).is_none_or(|free| free.iter().any(|entry| *entry != 0)) {
                    continue; // Somebody else took them while this one waited for its turn.
                }
                if let Some(table) = meta.table_at(host, host + used * size) {
                    return Err(Fault::Damage(format!(
                        "{table} lies at {host:#x}, which no refcount block covers"
                    )));
                }
            }
            self.reach(host + used * size).await?;
            for block in 0..blocks {
                let mut bytes = vec![0; size as usize];
                let counted = used.saturating_sub(block * per_block).min(per_block);
                (0..counted as usize)
                    .for_each(|i| set_refcount(&mut bytes, self.counting().refcount_order, i, 1));
                self.write_bytes(host + block * size, &bytes).await?;
                self.let_others(counted).await;
            }
            let named = self.meta.borrow().reftable.offset + first * 8;
            self.take_room(named, blocks * 8).await?;
            let mut meta = self.meta.borrow_mut();
            for block in 0..blocks {
                let at = host + block * size;
                meta.refs.forget(at, at + size);
                meta.reftable.set(first + block, at);
                meta.refblocks.insert(at);
            }
            let from = host + blocks * size;
            let virgin = from >= meta.virgin;
            meta.virgin = meta.virgin.max(host + used * size);
            return Ok(Run { host: from, count: want, virgin });
        }
    }

    /// So many clusters in a row that are counted and free.
    async fn free_run(&self, want: u64) -> Result<Option<u64>, Fault> {
        let per_block = self.counting().refblock_entries();
        let (mut at, mut start) = (self.meta.borrow().hint, None);
        loop {
            let known = {
                let mut meta = self.meta.borrow_mut();
                let block = at / per_block;
                if block >= meta.reftable.entries.len() as u64 {
                    return Ok(None);
                }
                if meta.reftable.get(block) == 0 {
                    (at, start) = ((block + 1) * per_block, None);
                    continue;
                }
                meta.refcount(at)?
            };
            match known {
                Known::Load(slice) => self.load_refs(slice).await?,
                Known::Yes(count) => {
                    self.let_others(1).await;
                    start = if count == 0 { start.or(Some(at)) } else { None };
                    at += 1;
                    if let Some(first) = start.filter(|first| at - first == want) {
                        return Ok(Some(first));
                    }
                }
            }
        }
    }

    /// Makes the file at least so long.
    pub(super) async fn reach(&self, end: u64) -> Result<(), Fault> {
        if end <= self.file().len() {
            return Ok(());
        }
        if end > crate::base::limits::DISK_LEN_MAX || end >= 1 << 56 {
            return Err(Fault::Refused(
                Errno::EFBIG,
                "The image would become larger than the format allows.".into(),
            ));
        }
        // Two at once would have the shorter length cut off what the other one is for.
        let _turn = self.lengthening.take().await;
        if end <= self.file().len() {
            return Ok(());
        }
        let len = end.next_multiple_of(GROWTH_BYTES);
        match self.file().set_len(len).await {
            Ok(()) => Ok(()),
            // It was looked at again: it may have been made larger.
            Err(_) if end <= self.file().len() => Ok(()),
            Err(error) if error.errno == Errno::EOPNOTSUPP => {
                let why = "The image does not fit what it lies on; make that larger.";
                Err(Fault::Refused(Errno::ENOSPC, why.into()))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The file ends with the last cluster that was ever used, where it is longer only because it grows in steps: QEMU
    /// sets room aside behind the end of a file, and not behind the end of what is used of it. Nobody writes meanwhile.
    pub async fn cut_slack(&self) -> IoResult {
        let _turn = self.lengthening.take().await;
        let end = self.meta.borrow().virgin;
        if end >= self.file().len() {
            return Ok(());
        }
        match self.file().set_len(end).await {
            // What has a length of its own keeps it.
            Err(error) if error.errno == Errno::EOPNOTSUPP => Ok(()),
            done => done,
        }
    }

    /// A data file that was cut off is as long as the disk again, before something is written behind its end.
    pub(super) async fn reach_data(&self, end: u64) -> Result<(), Fault> {
        let Some(data_file) = self.data_file.as_ref().map(|file| file.node()).filter(|file| end > file.len())
        else {
            return Ok(());
        };
        let _turn = self.lengthening.take().await;
        if end <= data_file.len() {
            return Ok(());
        }
        match data_file.set_len(end.max(self.len.get())).await {
            // What has a length of its own refuses the write itself, and says why.
            Err(error) if error.errno != Errno::EOPNOTSUPP => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Gives back clusters that nothing has ever referred to, and their room: where a filesystem is full, tables need it.
    pub(super) async fn unreserve(&self, run: Run) {
        // Not giving room back is no error.
        let _ = self.file().discard(run.host, run.count << self.g.cluster_bits).await;
        self.give_back(run).await;
    }

    /// Gives back references to clusters in which there may be more than what they were taken for.
    pub(super) async fn give_back(&self, run: Run) {
        let first = run.host >> self.g.cluster_bits;
        for cluster in first..first + run.count {
            match self.change_refcount(cluster, -1).await {
                Ok(_) => {}
                // They leak; the error that led here is the one to tell.
                Err(fault) => {
                    tracing::warn!(image = %self.name, ?fault, cluster, "a reserved cluster could not be given back");
                    return;
                }
            }
        }
    }

    /// Adds to the refcount of a cluster of the file that has a refcount block; gives the new one.
    pub(super) async fn change_refcount(&self, cluster: u64, by: i64) -> Result<u64, Fault> {
        loop {
            let slice = {
                let mut meta = self.meta.borrow_mut();
                match meta.refcount(cluster)? {
                    Known::Load(slice) => slice,
                    Known::Yes(count) => {
                        let Some(new) = count.checked_add_signed(by) else {
                            return Err(Fault::Damage(format!(
                                "cluster {cluster} is freed more often than it was used"
                            )));
                        };
                        if new > self.counting().refcount_max() {
                            let why = format!(
                                "Refcounts of {} bits are too narrow for this.",
                                self.counting().refcount_bits()
                            );
                            return Err(Fault::Refused(Errno::EINVAL, why));
                        }
                        if !meta.set_refcount(cluster, new) {
                            return Err(Fault::Damage(format!(
                                "cluster {cluster} is in use and has no refcount block"
                            )));
                        }
                        if new == 0 {
                            meta.hint = meta.hint.min(cluster);
                        }
                        return Ok(new);
                    }
                }
            };
            self.load_refs(slice).await?;
        }
    }

    /// Frees what no request can look at any more and nothing durable refers to.
    pub(super) async fn release(&self) -> Result<(), Fault> {
        let _turn = self.releasing.take().await;
        loop {
            let batch = {
                let mut meta = self.meta.borrow_mut();
                match meta.releasing.front() {
                    Some((epoch, _)) if self.epochs.is_past(*epoch) => meta.releasing.pop_front(),
                    _ => None,
                }
            };
            let Some((_, batch)) = batch else { return Ok(()) };
            for freed in batch {
                self.release_one(freed).await?;
            }
        }
    }

    async fn release_one(&self, freed: Freed) -> Result<(), Fault> {
        let clusters = freed.first..freed.first + freed.count;
        if freed.discard {
            // Given back before they can be taken again, run by run of those that nobody else refers to.
            let mut run: Option<(u64, u64)> = None;
            for cluster in clusters.clone().chain([u64::MAX]) {
                let last = cluster != u64::MAX && self.refcount_of(cluster).await? == 1;
                match (&mut run, last) {
                    (Some((_, end)), true) => *end = cluster + 1,
                    (None, true) => run = Some((cluster, cluster + 1)),
                    (Some((first, end)), false) => {
                        let (at, len) =
                            (*first << self.g.cluster_bits, (*end - *first) << self.g.cluster_bits);
                        // Not giving room back is no error.
                        let _ = self.file().discard(at, len).await;
                        run = None;
                    }
                    (None, false) => {}
                }
            }
        }
        for cluster in clusters {
            self.let_others(1).await;
            self.change_refcount(cluster, -1).await?;
        }
        Ok(())
    }

    /// The refcount of a cluster of the file.
    pub(super) async fn refcount_of(&self, cluster: u64) -> Result<u64, Fault> {
        self.let_others(1).await;
        loop {
            let known = self.meta.borrow_mut().refcount(cluster)?;
            match known {
                Known::Yes(count) => return Ok(count),
                Known::Load(slice) => self.load_refs(slice).await?,
            }
        }
    }

    /// Makes a refcount block. Its range is all free, so it lies in it and counts itself.
    async fn new_refblock(&self, block: u64) -> Result<(), Fault> {
        let _turn = self.growing.take().await;
        if self.meta.borrow().reftable.get(block) != 0 {
            return Ok(());
        }
        let size = self.g.cluster_size();
        let cluster = block * self.counting().refblock_entries();
        let host = cluster << self.g.cluster_bits;
        if let Some(table) = self.meta.borrow().table_at(host, host + size) {
            return Err(Fault::Damage(format!("{table} lies at {host:#x}, which no refcount block covers")));
        }
        self.reach(host + size).await?;
        self.zero_table(host, size).await?;
        let named = self.meta.borrow().reftable.offset + block * 8;
        self.take_room(named, 8).await?;
        let mut meta = self.meta.borrow_mut();
        // All of it may be taken as read: it is zeroes.
        let slice_bytes = meta.refs.slice_bytes();
        meta.refs.forget(host, host + size);
        meta.refs.insert(host, vec![0; slice_bytes as usize].into());
        meta.reftable.set(block, host);
        meta.refblocks.insert(host);
        meta.virgin = meta.virgin.max(host + size);
        if !meta.set_refcount(cluster, 1) {
            return Err(Fault::Damage(format!("the new refcount block at {host:#x} cannot be used")));
        }
        Ok(())
    }

    async fn grow_reftable(&self) -> Result<(), Fault> {
        let _turn = self.growing.take().await;
        let is_full = {
            let mut meta = self.meta.borrow_mut();
            matches!(meta.search(1, false)?, Search::NewTable)
        };
        if is_full { self.move_reftable(0).await } else { Ok(()) }
    }

    /// Makes the refcount table long enough for so many blocks, and for those that it takes itself.
    async fn grow_reftable_to(&self, blocks: u64) -> Result<(), Fault> {
        let _turn = self.growing.take().await;
        let is_short = (self.meta.borrow().reftable.entries.len() as u64) < blocks;
        if is_short { self.move_reftable(blocks).await } else { Ok(()) }
    }

    /// Moves the refcount table to where it has room to grow, to at least so many entries more than it takes itself.
    /// Whatever happens in between, the old table or the new one counts, and both are right.
    async fn move_reftable(&self, entries_min: u64) -> Result<(), Fault> {
        // Blocks of which the old table does not know yet must be there before the new one names them.
        self.write_back().await?;
        let size = self.g.cluster_size();
        let per_block = self.counting().refblock_entries();
        let (old_offset, mut entries) = {
            let meta = self.meta.borrow();
            (meta.reftable.offset, meta.reftable.entries.clone())
        };
        let old_clusters = entries.len() as u64 * 8 / size;
        let mut table_clusters =
            (old_clusters + old_clusters.div_ceil(2)).max(self.g.clusters(entries_min * 8));
        let first = entries.len() as u64 * per_block;
        let mut blocks = 1;
        while table_clusters + blocks > blocks * per_block {
            blocks += 1;
        }
        let needed = (entries.len() as u64 + blocks + entries_min.saturating_sub(entries.len() as u64)) * 8;
        table_clusters = table_clusters.max(needed.div_ceil(size));
        while table_clusters + blocks > blocks * per_block {
            blocks += 1;
        }
        if table_clusters * size > REFTABLE_BYTES_MAX {
            return Err(Fault::Refused(
                Errno::EFBIG,
                "The image has no room for more reference counts.".into(),
            ));
        }
        let used = table_clusters + blocks;
        let host = first << self.g.cluster_bits;
        if let Some(table) = self.meta.borrow().table_at(host, host + used * size) {
            return Err(Fault::Damage(format!("{table} lies at {host:#x}, which no refcount block covers")));
        }
        self.reach(host + used * size).await?;
        let blocks_at = host + table_clusters * size;
        for block in 0..blocks {
            let mut bytes = vec![0; size as usize];
            let counted = used.saturating_sub(block * per_block).min(per_block);
            (0..counted as usize)
                .for_each(|i| set_refcount(&mut bytes, self.counting().refcount_order, i, 1));
            self.write_bytes(blocks_at + block * size, &bytes).await?;
            entries.push(blocks_at + block * size);
        }
        entries.resize((table_clusters * size / 8) as usize, 0);
        let mut bytes = vec![0; entries.len() * 8];
        entries.iter().enumerate().for_each(|(i, entry)| set_be64(&mut bytes, i, *entry));
        self.write_bytes(host, &bytes).await?;
        self.flush_files().await?;
        {
            let mut header = self.header.borrow_mut();
            (header.reftable_offset, header.reftable_clusters) = (host, table_clusters as u32);
        }
        let mut result = self.write_header().await;
        if result.is_ok() {
            result = self.flush_files().await;
        }
        if let Err(fault) = result {
            // Which table counts on the disk is not known. Both know everything up to now; only the next
            // write of a header could tell, and no allocation goes on before one succeeded.
            let mut header = self.header.borrow_mut();
            (header.reftable_offset, header.reftable_clusters) = (old_offset, old_clusters as u32);
            self.sync.failed.set(Some(Errno::EIO));
            return Err(fault);
        }
        let mut meta = self.meta.borrow_mut();
        meta.reftable = WholeTable::new(&self.g, host, entries);
        meta.refblocks.extend((0..blocks).map(|block| blocks_at + block * size));
        meta.virgin = meta.virgin.max(host + used * size);
        meta.free(Freed { first: old_offset >> self.g.cluster_bits, count: old_clusters, discard: true });
        Ok(())
    }
}
