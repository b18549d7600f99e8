//! Writing: one shape for every write that needs a place. Reserve, write the data, publish the mapping; the
//! order in which these reach the disk is the write-back's business ([`super::sync`]). Whatever fails before
//! the mapping is published is undone, and the guest sees what it saw before.

use blockferry_ring::SharedBuf;
use blockferry_ring::sync::join_all;

use super::alloc::Run;
use super::entry::{Cluster, Raw};
use super::image::{Fault, Qcow2};
use super::meta::{Freed, Known, L2Table};
use super::plan::WriteStep;
use crate::base::planted::{Bug, is_planted};
use crate::base::range::ByteRange;
use crate::block::serial::LockKind;

/// Largest piece that is put together from old and new bytes.
const COPY_BYTES_MAX: u64 = 256 << 10;
/// Writes to new places are widened to multiples of this where there are only zeroes around.
const BLOCK_BYTES: u64 = 4096;

/// Where the bytes of a write go: runs (host, bytes) in their order. Most writes have one, which costs no memory.
struct Places {
    last: (u64, u64),
    before: Vec<(u64, u64)>,
}

impl Qcow2 {
    /// Writes guest bytes. The range lies within the disk.
    pub(super) async fn write_guest(&self, offset: u64, buf: &SharedBuf) -> Result<(), Fault> {
        self.check_writable()?;
        self.mark_bitmaps().await?;
        let range = ByteRange::at_saturating(offset, buf.len() as u64);
        if range.is_empty() {
            return Ok(());
        }
        let clusters = self.clusters_of(range);
        let claim = self.claims.enter(clusters, LockKind::Shared).await;
        if let Some(pieces) = self.all_in_place(range).await? {
            return self.put_pieces(buf, pieces).await;
        }
        let claim = claim.upgrade().await;
        if let Some(pieces) = self.all_in_place(range).await? {
            // Whoever came before has made the places: nobody need wait for this one.
            claim.share();
            return self.put_pieces(buf, pieces).await;
        }
        let mut at = range.start();
        while at < range.end() {
            at = self.write_some(range, at, buf).await?;
        }
        drop(claim);
        self.write_back_if_crowded().await
    }

    /// The places of a range, if all of it has places that may be written.
    async fn all_in_place(&self, range: ByteRange) -> Result<Option<Places>, Fault> {
        let size = self.g.cluster_size();
        let mut places = Places { last: (0, 0), before: Vec::new() };
        for cluster in self.clusters_of(range).chunks(size) {
            let Some(part) = cluster.intersect(range) else { continue };
            let raw = self.load_entry(part.start()).await?;
            let step = self.frame().write(raw, cluster.start(), part.start(), part.end())?;
            let WriteStep::InPlace(host) = step else { return Ok(None) };
            let host = host + (part.start() - cluster.start());
            let (from, len) = places.last;
            if len > 0 && from + len == host {
                places.last.1 += part.len();
            } else {
                if len > 0 {
                    places.before.push((from, len));
                }
                places.last = (host, part.len());
            }
        }
        for (host, len) in places.before.iter().chain([&places.last]) {
            self.check_place(*host, *len)?;
        }
        Ok(Some(places))
    }

    async fn put_pieces(&self, buf: &SharedBuf, places: Places) -> Result<(), Fault> {
        if places.before.is_empty() {
            return self.put(places.last.0, buf.clone()).await;
        }
        let mut skip = 0;
        let mut writes = Vec::with_capacity(places.before.len() + 1);
        for (host, len) in places.before.into_iter().chain([places.last]) {
            let part = buf.slice(skip, len as usize);
            skip += len as usize;
            writes.push(self.ring.boxed(self.put(host, part)));
        }
        join_all(writes).await.into_iter().collect()
    }

    /// The L2 entry of a cluster; loads what that takes.
    pub(super) async fn load_entry(&self, offset: u64) -> Result<Option<Raw>, Fault> {
        loop {
            let known = self.meta.borrow_mut().entry(offset)?;
            match known {
                Known::Yes(raw) => return Ok(raw),
                Known::Load(slice) => self.load_l2(slice).await?,
            }
        }
    }

    /// Writes the next part of a request, whose clusters are claimed alone; gives where it ends.
    pub(super) async fn write_some(&self, range: ByteRange, at: u64, buf: &SharedBuf) -> Result<u64, Fault> {
        let size = self.g.cluster_size();
        let start = self.g.cluster_start(at);
        let end = range.end().min(start + size);
        let raw = self.load_entry(at).await?;
        match self.frame().write(raw, start, at, end)? {
            WriteStep::InPlace(host) => {
                self.check_place(host, size)?;
                let part = buf.slice((at - range.start()) as usize, (end - at) as usize);
                self.put(host + at - start, part).await?;
                Ok(end)
            }
            WriteStep::Fill { host, after } => {
                self.check_place(host, size)?;
                self.own_l2(start).await?;
                let unit = self.g.unit_size();
                let wide = ByteRange::at_saturating(at, end - at).align_outward(unit);
                self.put_whole(wide, host + wide.start() - start, range, buf, false).await?;
                self.publish(start, &[after], &[]).await?;
                Ok(end)
            }
            WriteStep::New(old) => self.write_new(range, at, buf, old).await,
        }
    }

    /// Writes to new places, as many clusters in a row as there are.
    async fn write_new(
        &self,
        range: ByteRange,
        at: u64,
        buf: &SharedBuf,
        old: Cluster,
    ) -> Result<u64, Fault> {
        let size = self.g.cluster_size();
        let start = self.g.cluster_start(at);
        self.own_l2(start).await?;
        // As many clusters as need a place, up to the end of the L2 table.
        let mut olds = vec![old];
        let table_end = (self.g.l1_index(start) + 1).saturating_mul(self.g.l2_covers());
        let mut next = start + size;
        while next < range.end().min(table_end) {
            let raw = self.load_entry(next).await?;
            match self.frame().write(raw, next, next, range.end().min(next + size))? {
                WriteStep::New(old) => olds.push(old),
                _ => break,
            }
            next += size;
        }
        let run = self.reserve_for(start, olds.len() as u64).await?;
        olds.truncate(run.count as usize);
        let clusters = ByteRange::at_saturating(start, run.count * size);
        let entries = match self.fill_new(clusters, range, buf, &olds, run).await {
            Ok(entries) => entries,
            Err(fault) => {
                self.unreserve_data(run).await;
                return Err(fault);
            }
        };
        // What fails from here on may have made some of them known: they stay taken.
        if !is_planted(Bug::Qcow2PublishBeforeWrite) {
            self.publish(clusters.start(), &entries, &olds).await?;
        }
        Ok(clusters.end().min(range.end()))
    }

    /// Places for guest clusters from `start` on.
    pub(super) async fn reserve_for(&self, start: u64, count: u64) -> Result<Run, Fault> {
        if self.data_file.is_some() {
            return Ok(Run { host: start, count, virgin: false });
        }
        self.allocate(count, true).await
    }

    pub(super) async fn unreserve_data(&self, run: Run) {
        if self.data_file.is_none() {
            self.unreserve(run).await;
        }
    }

    async fn fill_new(
        &self,
        clusters: ByteRange,
        range: ByteRange,
        buf: &SharedBuf,
        olds: &[Cluster],
        run: Run,
    ) -> Result<Vec<Raw>, Fault> {
        let size = self.g.cluster_size();
        let mut entries = Vec::with_capacity(olds.len());
        for (i, old) in olds.iter().enumerate() {
            let host = run.host + i as u64 * size;
            let cluster = ByteRange::at_saturating(clusters.start() + i as u64 * size, size);
            let Some(ours) = cluster.intersect(range) else { continue };
            // With subclusters only those that hold data already, or get some, have to be there.
            let thin = self.g.subclusters && matches!(old, Cluster::Unallocated | Cluster::Zero);
            entries.push(if thin {
                let (from, to) = (ours.start() - cluster.start(), ours.end() - cluster.start());
                let touched = super::entry::subclusters_touched(&self.g, from, to);
                Raw::sub(host, touched, old.masks().1 & !touched)
            } else {
                Raw::data(&self.g, host)
            });
        }
        if is_planted(Bug::Qcow2PublishBeforeWrite) {
            self.publish(clusters.start(), &entries, olds).await?;
        }
        // Neighbours that are covered as a whole go out in one piece; the ends are put together.
        let covered = range.intersect(clusters).and_then(|ours| ours.align_inward(size));
        let mut at = clusters.start();
        while at < clusters.end() {
            let host = run.host + at - clusters.start();
            if let Some(whole) = covered.filter(|whole| whole.start() == at) {
                let part = buf.slice((at - range.start()) as usize, whole.len() as usize);
                self.put(host, part).await?;
                at = whole.end();
                continue;
            }
            let cluster = ByteRange::at_saturating(at, size);
            let old = olds[((at - clusters.start()) / size) as usize];
            let thin = self.g.subclusters && matches!(old, Cluster::Unallocated | Cluster::Zero);
            let Some(ours) = cluster.intersect(range) else { break };
            let wide = if thin { ours.align_outward(self.g.unit_size()) } else { cluster };
            self.put_whole(wide, host + wide.start() - at, range, buf, run.virgin).await?;
            at += size;
        }
        Ok(entries)
    }

    /// Writes all bytes of `wide` to `host`: those of `range` out of `buf`, the others as the guest sees them
    /// now. `virgin`: the place reads as zeroes already.
    async fn put_whole(
        &self,
        wide: ByteRange,
        host: u64,
        range: ByteRange,
        buf: &SharedBuf,
        virgin: bool,
    ) -> Result<(), Fault> {
        let Some(ours) = wide.intersect(range) else { return Ok(()) };
        if ours == wide {
            let part = buf.slice((wide.start() - range.start()) as usize, wide.len() as usize);
            return self.put(host, part).await;
        }
        // Nothing lies beyond the end of the disk; a data file ends there as well.
        let disk_end = self.len.get().max(ours.end());
        let mut wide_now = wide;
        let mut host = host;
        if virgin
            && self.reads_as_zero(wide.start(), ours.start()).await?
            && self.reads_as_zero(ours.end().min(disk_end), wide.end().min(disk_end)).await?
        {
            let narrow = ours.align_outward(BLOCK_BYTES).intersect(wide).unwrap_or(ours);
            host += narrow.start() - wide.start();
            wide_now = narrow;
        }
        if self.data_file.is_some() {
            wide_now = wide_now.split_at(disk_end).0;
        }
        let Some(memory) = self.copy_memory.get() else {
            return Err(Fault::Damage("an image that is only read was to be written".into()));
        };
        let mut at = wide_now.start();
        while at < wide_now.end() {
            let mut lease = memory.take((wide_now.end() - at).min(COPY_BYTES_MAX) as usize).await;
            let piece = ByteRange::at_saturating(at, lease.len() as u64);
            let (before, rest) = piece.split_at(ours.start());
            let (middle, after) = rest.split_at(ours.end());
            for part in [before, after] {
                let (inside, outside) = part.split_at(disk_end);
                let place = |r: ByteRange| ((r.start() - at) as usize, (r.end() - at) as usize);
                if !inside.is_empty() {
                    let (from, to) = place(inside);
                    let read = async |buf| self.read_guest(inside.start(), buf).await;
                    lease.fill(from, to, read).await?;
                }
                if !outside.is_empty() {
                    let (from, to) = place(outside);
                    lease.bytes()?[from..to].fill(0);
                }
            }
            if !middle.is_empty() {
                let (from, to) = ((middle.start() - at) as usize, (middle.end() - at) as usize);
                buf.copy_to((middle.start() - range.start()) as usize, &mut lease.bytes()?[from..to]);
            }
            let n = lease.len();
            let target = host + at - wide_now.start();
            lease.write(0, n, async |buf| self.put(target, buf).await).await?;
            at = piece.end();
        }
        Ok(())
    }

    /// Sets the L2 entries of clusters from `start` on (in one L2 table, which is ours alone), and frees what
    /// the old ones referred to.
    pub(super) async fn publish(&self, start: u64, entries: &[Raw], olds: &[Cluster]) -> Result<(), Fault> {
        for (i, raw) in entries.iter().enumerate() {
            let at = start + ((i as u64) << self.g.cluster_bits);
            loop {
                let slice = {
                    let mut meta = self.meta.borrow_mut();
                    match meta.entry(at)? {
                        Known::Yes(_) => {
                            if !meta.set_entry(at, *raw) {
                                return Err(Fault::Damage(format!(
                                    "there is no L2 table for offset {at:#x}"
                                )));
                            }
                            break;
                        }
                        Known::Load(slice) => slice,
                    }
                };
                self.load_l2(slice).await?;
            }
            if let Some(old) = olds.get(i) {
                self.free_cluster(*old, raw.entry);
            }
        }
        if is_planted(Bug::Qcow2FreedTooEarly) {
            let freed = std::mem::take(&mut self.meta.borrow_mut().freed);
            let epoch = self.epochs.close();
            self.meta.borrow_mut().releasing.push_back((epoch, freed));
            self.release().await?;
        }
        Ok(())
    }

    /// Frees what an old entry referred to, unless the new one keeps it.
    pub(super) fn free_cluster(&self, old: Cluster, new_entry: u64) {
        if self.data_file.is_some() {
            return;
        }
        let bits = self.g.cluster_bits;
        let mut meta = self.meta.borrow_mut();
        match old {
            Cluster::Compressed { host, len } => {
                let (first, end) = (host >> bits, (host + len).div_ceil(1 << bits));
                self.packing.forget(host);
                meta.free(Freed { first, count: end - first, discard: false });
            }
            other => {
                let compressed = new_entry & super::entry::COMPRESSED != 0;
                let kept = if compressed { 0 } else { new_entry & super::entry::OFFSET_MASK };
                if let Some((host, _)) = other.host()
                    && host != kept
                {
                    meta.free(Freed { first: host >> bits, count: 1, discard: true });
                }
            }
        }
    }

    /// Makes sure that the L2 table for a place on the disk is there, and ours alone.
    pub(super) async fn own_l2(&self, offset: u64) -> Result<(), Fault> {
        if let L2Table::At { copied: true, .. } = self.meta.borrow().l2_table(offset)? {
            return Ok(());
        }
        let _turn = self.tables.take().await;
        let old = match self.meta.borrow().l2_table(offset)? {
            L2Table::At { copied: true, .. } => return Ok(()),
            L2Table::At { host, .. } => Some(host),
            L2Table::None => None,
        };
        let size = self.g.cluster_size();
        let run = self.allocate(1, false).await?;
        let made = match old {
            None => self.zero_table(run.host, size).await,
            Some(host) => self.copy_l2(host, run.host).await,
        };
        let index = self.g.l1_index(offset);
        let named = self.meta.borrow().l1.offset + index * 8;
        let made = match made {
            Ok(()) => self.take_room(named, 8).await,
            fault => fault,
        };
        if let Err(fault) = made {
            self.unreserve(run).await;
            return Err(fault);
        }
        let mut meta = self.meta.borrow_mut();
        meta.l2.forget(run.host, run.host + size);
        if old.is_none() {
            // What was just zeroed need not be read.
            let slice_bytes = meta.l2.slice_bytes();
            let at = run.host + self.g.l2_index(offset) * self.g.l2_entry_bytes();
            let at = meta.l2.slice_of(at);
            meta.l2.insert(at, vec![0; slice_bytes as usize].into());
        }
        meta.l1.set(index, run.host | super::entry::COPIED);
        meta.l2_tables.insert(run.host);
        if let Some(host) = old {
            // Others refer to it; it is no longer a table of the active L1, and never changed here.
            meta.l2_tables.remove(&host);
            meta.free(Freed { first: host >> self.g.cluster_bits, count: 1, discard: false });
        }
        Ok(())
    }

    /// A copy of a shared L2 table. Whatever it refers to is shared too.
    async fn copy_l2(&self, from: u64, to: u64) -> Result<(), Fault> {
        let mut bytes = self.read_bytes(from, self.g.cluster_size()).await?;
        let step = self.g.l2_entry_bytes() as usize;
        if self.data_file.is_none() {
            for slot in bytes.chunks_exact_mut(step) {
                // The topmost bit says that nobody else refers to the cluster.
                slot[0] &= 0x7f;
            }
        }
        self.write_bytes(to, &bytes).await
    }
}
