//! Zeroing and discarding: changes of mappings, cluster by cluster, with writes of zeroes only at the ends.

use blockferry_ring::Errno;

use super::entry::{COPIED, Cluster, Raw, subclusters_covered};
use super::header::autoclear;
use super::image::{Fault, Qcow2};
use super::meta::L2Table;
use crate::base::range::ByteRange;
use crate::block::ZeroFlags;
use crate::block::serial::LockKind;

/// Largest buffer of zeroes.
const ZERO_BYTES: u64 = 64 << 10;
/// So many clusters are changed before others get a chance to write.
const CLUSTERS_AT_ONCE: u64 = 4096;

impl Qcow2 {
    pub(super) fn is_v2(&self) -> bool {
        self.header.borrow().version < 3
    }

    fn is_data_raw(&self) -> bool {
        self.header.borrow().autoclear & autoclear::DATA_FILE_RAW != 0 && self.data_file.is_some()
    }

    /// Where there is no entry, do bytes from `at` on read as zeroes?
    fn nothing_below(&self, at: u64) -> bool {
        self.below().is_none_or(|below| at >= below.len())
    }

    /// Makes a range read as zeroes.
    pub(super) async fn zero_guest(&self, range: ByteRange, flags: ZeroFlags) -> Result<(), Fault> {
        self.check_writable()?;
        self.mark_bitmaps().await?;
        if range.is_empty() {
            return Ok(());
        }
        let unit = self.g.unit_size();
        // The last unit ends with the disk.
        let end = if range.end() == self.len.get() {
            range.end().next_multiple_of(self.g.cluster_size())
        } else {
            range.end()
        };
        let wide = ByteRange::at_saturating(range.start(), end - range.start());
        let middle = wide.align_inward(unit).unwrap_or(ByteRange::at_saturating(range.end(), 0));
        let (head, rest) = range.split_at(middle.start().min(range.end()));
        let (_, tail) = rest.split_at(middle.end().min(range.end()));
        for part in [head, tail] {
            if part.is_empty() || self.reads_as_zero_now(part).await? {
                continue;
            }
            if flags.no_fallback {
                return Err(Fault::Refused(
                    Errno::EOPNOTSUPP,
                    "Parts of clusters are zeroed by writing.".into(),
                ));
            }
            self.write_zero_bytes(part).await?;
        }
        for piece in middle.chunks(CLUSTERS_AT_ONCE << self.g.cluster_bits) {
            self.zero_units(piece, flags).await?;
        }
        if self.is_data_raw()
            && let Some(data_file) = &self.data_file
        {
            self.reach_data(range.end()).await?;
            data_file
                .node()
                .write_zeroes(range.start(), range.len(), ZeroFlags { fua: false, ..flags })
                .await?;
        }
        Ok(())
    }

    async fn reads_as_zero_now(&self, part: ByteRange) -> Result<bool, Fault> {
        let _claim = self.claims.enter(self.clusters_of(part), LockKind::Shared).await;
        if self.is_data_raw() {
            return Ok(false);
        }
        self.reads_as_zero(part.start(), part.end()).await
    }

    /// Writes zeroes as data.
    async fn write_zero_bytes(&self, range: ByteRange) -> Result<(), Fault> {
        let mut at = range.start();
        while at < range.end() {
            let n = (range.end() - at).min(ZERO_BYTES) as usize;
            let mut buf = self.ring.alloc(n).await;
            buf.fill_zero();
            self.write_guest(at, &buf.freeze()).await?;
            at += n as u64;
        }
        Ok(())
    }

    async fn zero_units(&self, range: ByteRange, flags: ZeroFlags) -> Result<(), Fault> {
        let mut at = range.start();
        while at < range.end() {
            let start = self.g.cluster_start(at);
            let end = range.end().min(start + self.g.cluster_size());
            if let Some(next) = self.skip_unmapped(at, range.end())? {
                at = next;
                continue;
            }
            let part = ByteRange::at_saturating(at, end - at);
            let written_out = {
                let _claim = self.claims.enter(self.clusters_of(part), LockKind::Exclusive).await;
                let raw = self.load_entry(at).await?;
                let old = self.decode(raw, start)?;
                let change = self.zero_entry(old, part, self.nothing_below(start), flags.may_unmap);
                match change {
                    Change::Nothing => false,
                    Change::Write => true,
                    Change::Entry(new) => {
                        self.zero_data_file(part, flags).await?;
                        self.own_l2(start).await?;
                        self.publish(start, &[new], &[old]).await?;
                        false
                    }
                }
            };
            if written_out {
                if flags.no_fallback {
                    return Err(Fault::Refused(
                        Errno::EOPNOTSUPP,
                        "Version 2 has no clusters of zeroes.".into(),
                    ));
                }
                self.write_zero_bytes(part.split_at(self.len.get()).0).await?;
            }
            self.write_back_if_crowded().await?;
            at = end;
        }
        Ok(())
    }

    /// Where the next L2 table begins, if nothing is mapped at `at` and nothing need be.
    fn skip_unmapped(&self, at: u64, end: u64) -> Result<Option<u64>, Fault> {
        let none = self.meta.borrow().l2_table(at)? == L2Table::None;
        let next = (self.g.l1_index(at) + 1).saturating_mul(self.g.l2_covers());
        Ok((none && self.nothing_below(at)).then_some(next.min(end)))
    }

    async fn zero_data_file(&self, part: ByteRange, flags: ZeroFlags) -> Result<(), Fault> {
        if let Some(data_file) = &self.data_file
            && flags.may_unmap
            && !self.is_data_raw()
        {
            // Only room is given back here; what the guest sees is said by the entry.
            let data_file = data_file.node();
            let part = part.split_at(data_file.len()).0;
            if !part.is_empty() {
                let _ = data_file.discard(part.start(), part.len()).await;
            }
        }
        Ok(())
    }

    pub(super) fn decode(&self, raw: Option<Raw>, start: u64) -> Result<Cluster, Fault> {
        raw.unwrap_or(Raw::UNALLOCATED).decode(&self.g, self.data_file.is_some()).map_err(|error| {
            Fault::Damage(format!("the L2 entry for offset {start:#x} of the disk: {error}"))
        })
    }

    /// What zeroing `part` of a cluster makes of its entry. `below_is_zero`: what is not mapped reads as zeroes.
    pub(super) fn zero_entry(
        &self,
        old: Cluster,
        part: ByteRange,
        below_is_zero: bool,
        may_unmap: bool,
    ) -> Change {
        let (g, v2) = (&self.g, self.is_v2());
        let start = g.cluster_start(part.start());
        let whole = part.len() == g.cluster_size();
        // A raw data file is read without these tables: what has a place there keeps it.
        let may_unmap = may_unmap && !self.is_data_raw();
        if v2 {
            return match old {
                Cluster::Unallocated if below_is_zero => Change::Nothing,
                Cluster::Unallocated => Change::Write,
                // With a layer below, even a shorter one, an entry says more than none: that layer may be replaced.
                _ if may_unmap && self.below().is_none() => Change::Entry(Raw::UNALLOCATED),
                _ => Change::Write,
            };
        }
        if !whole {
            return self.zero_subclusters(old, part, start, below_is_zero);
        }
        match old {
            Cluster::Unallocated if below_is_zero => Change::Nothing,
            Cluster::Zero => Change::Nothing,
            Cluster::ZeroAt { .. } if !may_unmap => Change::Nothing,
            Cluster::Data { host, copied: true }
            | Cluster::Sub { host, has_host: true, copied: true, .. }
                if !may_unmap =>
            {
                Change::Entry(Raw::zero_at(g, host))
            }
            _ => Change::Entry(Raw::zero(g)),
        }
    }

    fn zero_subclusters(&self, old: Cluster, part: ByteRange, start: u64, below_is_zero: bool) -> Change {
        let covered = subclusters_covered(&self.g, part.start() - start, part.end() - start);
        let (data, zero) = old.masks();
        let (data_after, zero_after) = (data & !covered, zero | covered);
        match old {
            Cluster::Compressed { .. } => Change::Write,
            Cluster::Unallocated if below_is_zero => Change::Nothing,
            _ if (data_after, zero_after) == (data, zero) => Change::Nothing,
            _ => {
                let bitmap = u64::from(data_after) | u64::from(zero_after) << 32;
                let entry = match old.host() {
                    Some((host, copied)) => host | if copied { COPIED } else { 0 },
                    None => 0,
                };
                Change::Entry(Raw { entry, bitmap })
            }
        }
    }

    /// Gives the room of whole clusters back. They read as zeroes afterwards.
    pub(super) async fn discard_guest(&self, range: ByteRange) -> Result<(), Fault> {
        self.check_writable()?;
        let size = self.g.cluster_size();
        let end =
            if range.end() == self.len.get() { range.end().next_multiple_of(size) } else { range.end() };
        let wide = ByteRange::at_saturating(range.start(), end - range.start());
        let Some(middle) = wide.align_inward(size) else { return Ok(()) };
        let v2 = self.is_v2();
        if self.is_data_raw() || (v2 && self.below().is_some()) {
            // What is below must not show through, and a raw data file keeps its bytes.
            return Ok(());
        }
        self.mark_bitmaps().await?;
        let mut at = middle.start();
        while at < middle.end() {
            let next = at + size;
            let none = self.meta.borrow().l2_table(at)? == L2Table::None;
            if none {
                at = ((self.g.l1_index(at) + 1).saturating_mul(self.g.l2_covers())).min(middle.end());
                continue;
            }
            {
                let part = ByteRange::at_saturating(at, size);
                let _claim = self.claims.enter(part, LockKind::Exclusive).await;
                let raw = self.load_entry(at).await?;
                let old = self.decode(raw, at)?;
                let bare = self.below().is_none();
                let new = match old {
                    Cluster::Unallocated | Cluster::Zero => None,
                    _ if v2 || bare => Some(Raw::UNALLOCATED),
                    _ => Some(Raw::zero(&self.g)),
                };
                if let Some(new) = new {
                    self.zero_data_file(part, ZeroFlags { may_unmap: true, ..ZeroFlags::default() }).await?;
                    self.own_l2(at).await?;
                    self.publish(at, &[new], &[old]).await?;
                }
            }
            self.write_back_if_crowded().await?;
            at = next;
        }
        Ok(())
    }
}

/// What becomes of an entry.
pub(super) enum Change {
    Nothing,
    Entry(Raw),
    /// Zeroes have to be written as data.
    Write,
}
