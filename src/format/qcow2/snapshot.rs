//! Internal snapshots: their table, and taking, applying and deleting them.
//!
//! Each keeps an L1 table of its own, and counts as one more reference to everything that it leads to. The
//! order is always: count the new references, write the new tables, switch over with one write of the header,
//! drop the old references. A power cut leaves references that nobody has, never one that is not counted.
//!
//! Marks of sole references cannot change in the same instant as the refcounts that they tell of. So the image
//! says durably that it is dirty before the first of them changes, and no longer does after the last: whoever
//! opens it to write in between repairs it. Version 2 has no such mark: such an image is of version 3 meanwhile,
//! and stays so after a cut.

use std::collections::BTreeSet;

use blockferry_ring::Errno;

use super::count::Counts;
use super::entry::{COPIED, Cluster, OFFSET_MASK, Raw, get_be64, set_be64};
use super::header::{SNAPSHOTS_MAX, V2_BYTES, V3_BYTES_MIN, incompatible};
use super::image::{Fault, Qcow2};
use super::info::SnapshotInfo;
use super::meta::Freed;
use crate::base::os_name;
use crate::base::range::ByteRange;
use crate::block::serial::LockKind;

/// Largest table of snapshots (QEMU's limit).
pub(super) const TABLE_BYTES_MAX: u64 = 64 << 20;
/// Longest extra data of one snapshot (QEMU's limit).
const EXTRA_BYTES_MAX: u32 = 1024;
/// Extra data that an image of version 3 has at least: the size of the state of the machine, and that of the disk.
const EXTRA_BYTES_MIN: usize = 16;

/// One entry of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Snapshot {
    pub(super) l1_offset: u64,
    pub(super) l1_size: u32,
    pub(super) id: String,
    pub(super) name: String,
    pub(super) date_sec: u32,
    pub(super) date_nsec: u32,
    pub(super) vm_clock_nsec: u64,
    pub(super) vm_state_size: u64,
    pub(super) disk_size: Option<u64>,
    pub(super) icount: Option<u64>,
    /// Extra data as it is.
    pub(super) extra: Vec<u8>,
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    let mut value = [0; 4];
    if let Some(found) = bytes.get(at..at + 4) {
        value.copy_from_slice(found);
    }
    u32::from_be_bytes(value)
}

impl Snapshot {
    /// Bytes of an entry before its extra data.
    const FIXED_BYTES: u64 = 40;

    /// Bytes of the entry that begins with these 40.
    fn entry_bytes(fixed: &[u8]) -> u64 {
        let (id, name) = (u64::from(be32(fixed, 12) >> 16), u64::from(be32(fixed, 12) & 0xffff));
        (40 + u64::from(be32(fixed, 36)) + id + name).next_multiple_of(8)
    }

    /// An entry that says nothing: no name, no table.
    fn is_empty(&self) -> bool {
        self.id.is_empty() && self.name.is_empty() && self.l1_size == 0 && self.extra.is_empty()
    }

    /// Where its L1 table lies, and how long that is, in bytes.
    pub(super) fn table(&self) -> (u64, u64) {
        (self.l1_offset, u64::from(self.l1_size) * 8)
    }

    /// The table as it has to be: these, as far as there may be so many. Version 3 has no entries that say nothing; version
    /// 2 has, and of them only as many as leave room for all others.
    pub(super) fn mended<'a>(
        all: impl Iterator<Item = &'a Snapshot> + Clone,
        disk_size: u64,
        version: u32,
    ) -> Vec<Snapshot> {
        let saying = all.clone().filter(|snapshot| !snapshot.is_empty()).count();
        let mut empty = if version >= 3 { 0 } else { (SNAPSHOTS_MAX as usize).saturating_sub(saying) };
        let mut bytes = 0;
        let fits = |snapshot: &Snapshot| {
            bytes += snapshot.bytes();
            bytes <= TABLE_BYTES_MAX
        };
        all.filter(|snapshot| {
            let is_kept = !snapshot.is_empty() || empty > 0;
            empty -= usize::from(is_kept && snapshot.is_empty());
            is_kept
        })
        .map(|snapshot| match version {
            // Nothing has to be said there, so that what stands there can stay.
            ..3 => snapshot.clone().shortened(),
            _ => snapshot.clone().completed(disk_size),
        })
        .take(SNAPSHOTS_MAX as usize)
        .take_while(fits)
        .collect()
    }

    /// Bytes of its entry.
    pub(super) fn bytes(&self) -> u64 {
        let texts = os_name::to_bytes(&self.id).len() + os_name::to_bytes(&self.name).len();
        (Self::FIXED_BYTES + (self.extra.len() + texts) as u64).next_multiple_of(8)
    }

    /// With no more extra data than there may be.
    fn shortened(mut self) -> Snapshot {
        self.extra.truncate(EXTRA_BYTES_MAX as usize);
        self
    }

    /// With the extra data that there has to be, and no more than there may be.
    fn completed(mut self, disk_size: u64) -> Snapshot {
        if self.extra.len() < EXTRA_BYTES_MIN {
            let (state, disk) = (self.vm_state_size, self.disk_size.unwrap_or(disk_size));
            // The third says that instructions were not counted.
            self.extra = [state, disk, u64::MAX].map(u64::to_be_bytes).concat();
            self.disk_size = Some(disk);
        }
        self.shortened()
    }

    /// Reads one entry, which is all there.
    pub(super) fn parse(bytes: &[u8]) -> Snapshot {
        let (id_len, name_len) = ((be32(bytes, 12) >> 16) as usize, (be32(bytes, 12) & 0xffff) as usize);
        let extra_len = be32(bytes, 36) as usize;
        let extra = bytes[40..40 + extra_len].to_vec();
        let text = |from: usize, len: usize| os_name::from_bytes(&bytes[from..from + len]);
        let extra_u64 = |index: usize| (extra.len() >= index * 8 + 8).then(|| get_be64(&extra, index));
        Snapshot {
            l1_offset: get_be64(bytes, 0),
            l1_size: be32(bytes, 8),
            id: text(40 + extra_len, id_len),
            name: text(40 + extra_len + id_len, name_len),
            date_sec: be32(bytes, 16),
            date_nsec: be32(bytes, 20),
            vm_clock_nsec: get_be64(bytes, 3),
            vm_state_size: extra_u64(0).unwrap_or(be32(bytes, 32).into()),
            disk_size: extra_u64(1),
            icount: extra_u64(2).filter(|count| *count != u64::MAX),
            extra,
        }
    }

    /// The entry as bytes.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(self.l1_offset.to_be_bytes());
        out.extend(self.l1_size.to_be_bytes());
        let (id, name) = (os_name::to_bytes(&self.id), os_name::to_bytes(&self.name));
        out.extend((id.len() as u16).to_be_bytes());
        out.extend((name.len() as u16).to_be_bytes());
        out.extend(self.date_sec.to_be_bytes());
        out.extend(self.date_nsec.to_be_bytes());
        out.extend(self.vm_clock_nsec.to_be_bytes());
        let small = if self.vm_state_size > u64::from(u32::MAX) { 0 } else { self.vm_state_size as u32 };
        out.extend(small.to_be_bytes());
        out.extend((self.extra.len() as u32).to_be_bytes());
        out.extend(&self.extra);
        out.extend(&*id);
        out.extend(&*name);
        out.resize(out.len().next_multiple_of(8), 0);
        out
    }

    pub(super) fn info(&self, disk_size_now: u64) -> SnapshotInfo {
        SnapshotInfo {
            id: self.id.clone(),
            name: self.name.clone(),
            vm_state_size: self.vm_state_size,
            date_sec: self.date_sec,
            date_nsec: self.date_nsec,
            vm_clock_nsec: self.vm_clock_nsec,
            icount: self.icount,
            disk_size: self.disk_size.unwrap_or(disk_size_now),
        }
    }
}

/// A table of snapshots, read as far as it can be.
#[derive(Debug, Default)]
pub(super) struct Listed {
    /// What could be read.
    pub(super) list: Vec<Snapshot>,
    /// Bytes of the table up to there.
    pub(super) bytes: u64,
    /// There are entries that say nothing: too many were counted, or something has wiped them.
    pub(super) has_empty: bool,
    /// It is larger than it may be, or an entry is: nobody uses an image with such a table.
    pub(super) is_excessive: bool,
    /// What is wrong and does not keep the image from being used.
    pub(super) slips: Vec<String>,
    /// What is wrong and can be repaired.
    pub(super) flaws: Vec<String>,
    /// What cannot be read: nobody knows what is in use because of it.
    pub(super) unread: Vec<String>,
}

/// Damage that keeps something from being done, before anything was: the image is not marked because of it.
fn unmarked(fault: Fault) -> Fault {
    match fault {
        Fault::Damage(why) => {
            Fault::Refused(Errno::EIO, format!("The image is damaged: {why}. Check it (`blockferry check`)."))
        }
        fault => fault,
    }
}

impl Qcow2 {
    /// The snapshots, and the bytes of their table.
    pub(super) async fn read_snapshots(&self) -> Result<(Vec<Snapshot>, u64), Fault> {
        let Listed { list, bytes, flaws, unread, .. } = self.list_snapshots().await?;
        match unread.into_iter().chain(flaws).next() {
            Some(why) => Err(Fault::Damage(why)),
            None => Ok((list, bytes)),
        }
    }

    /// The same with what is wrong. What this costs is bounded by the file: a table ends where that ends.
    pub(super) async fn list_snapshots(&self) -> Result<Listed, Fault> {
        let (count, start, v3) = {
            let header = self.header.borrow();
            (header.nb_snapshots, header.snapshots_offset, header.version >= 3)
        };
        let mut found = Listed::default();
        let mut ahead = Ahead::default();
        let unread = |what: String| format!("its table of snapshots {what}");
        if count > 0 && (start == 0 || !start.is_multiple_of(self.g.cluster_size())) {
            found.unread.push(unread(format!("lies at an impossible place ({start:#x})")));
            return Ok(found);
        }
        for number in 0..count {
            self.let_others(1).await;
            let at = found.bytes;
            if let Err(Fault::Damage(why)) =
                self.must_be_there("its table of snapshots", start, at + Snapshot::FIXED_BYTES)
            {
                found.unread.push(why);
                break;
            }
            let fixed = self.read_ahead(&mut ahead, start + at, Snapshot::FIXED_BYTES).await?;
            let len = Snapshot::entry_bytes(fixed);
            let extra = be32(fixed, 36);
            if at + len > 2 * TABLE_BYTES_MAX {
                found.is_excessive = true;
                found.unread.push(unread(format!("is too large from entry {number} on")));
                break;
            }
            if let Err(Fault::Damage(why)) = self.must_be_there("its table of snapshots", start, at + len) {
                found.unread.push(why);
                break;
            }
            if extra > EXTRA_BYTES_MAX {
                found.is_excessive = true;
                found.flaws.push(unread(format!(
                    "has too much extra data in entry {number}: {extra} bytes, and {EXTRA_BYTES_MAX} may be"
                )));
            }
            if number >= SNAPSHOTS_MAX || at + len > TABLE_BYTES_MAX {
                found.is_excessive = true;
                let why = unread(format!("is too large: there is no room for entry {number}"));
                // One line for all of them.
                if found.flaws.last().is_none_or(|last| !last.contains("is too large")) {
                    found.flaws.push(why);
                }
            }
            let snapshot = Snapshot::parse(self.read_ahead(&mut ahead, start + at, len).await?);
            if v3 && snapshot.extra.len() < EXTRA_BYTES_MIN && found.slips.len() < super::check::MESSAGES_MAX
            {
                found.slips.push(unread(format!("has an incomplete entry {number}")));
            }
            found.has_empty |= snapshot.is_empty();
            let entries_max = (super::geometry::L1_BYTES_MAX / 8) as u32;
            if !snapshot.l1_offset.is_multiple_of(self.g.cluster_size())
                || snapshot.l1_offset >= 1 << 56
                || snapshot.l1_size > entries_max
            {
                found.unread.push(unread(format!("names an impossible L1 table in entry {number}")));
            }
            found.list.push(snapshot);
            found.bytes = at + len;
        }
        Ok(found)
    }

    /// Bytes of the file, with what follows them: entries are small, and there may be many.
    async fn read_ahead<'a>(&self, ahead: &'a mut Ahead, offset: u64, len: u64) -> Result<&'a [u8], Fault> {
        let is_there = offset >= ahead.at && offset + len <= ahead.at + ahead.bytes.len() as u64;
        if !is_there {
            ahead.bytes = self.read_bytes(offset, len.max(AHEAD_BYTES)).await?;
            ahead.at = offset;
        }
        let from = (offset - ahead.at) as usize;
        Ok(&ahead.bytes[from..from + len as usize])
    }
}

/// So much is read at once.
const AHEAD_BYTES: u64 = 64 << 10;

/// Bytes of a file that are read already.
#[derive(Default)]
struct Ahead {
    at: u64,
    bytes: Vec<u8>,
}

/// While references are dropped, requests that still look at something are waited for so long at a time.
const WAIT_NANOS: u64 = 1_000_000;

/// What the image was before it said that it is dirty.
#[derive(Clone, Copy, Debug)]
enum Unsettled {
    /// It said so.
    Already,
    /// Of version 2, to which it goes back.
    V2,
    /// Of version 3.
    V3,
}

impl Qcow2 {
    fn check_snapshots(&self) -> Result<(), Fault> {
        self.check_writable()?;
        if self.data_file.is_some() {
            let why = "Images with an external data file have no internal snapshots.";
            return Err(Fault::Refused(Errno::EOPNOTSUPP, why.into()));
        }
        Ok(())
    }

    /// Says durably that refcounts and marks of sole references may be off.
    async fn unsettle(&self) -> Result<Unsettled, Fault> {
        let (version, features) = {
            let header = self.header.borrow();
            (header.version, header.incompatible)
        };
        if features & incompatible::DIRTY != 0 {
            return Ok(Unsettled::Already);
        }
        if version >= 3 {
            self.header.borrow_mut().incompatible |= incompatible::DIRTY;
            self.write_header().await?;
            self.flush_files().await?;
            return Ok(Unsettled::V3);
        }
        let marked = self.rearrange_header(|header| {
            header.version = 3;
            header.header_length = V3_BYTES_MIN as u32;
            header.incompatible |= incompatible::DIRTY;
        });
        if marked.await? {
            return Ok(Unsettled::V2);
        }
        let why = "The header has no room to say that snapshots are being changed. Convert the image to one of \
                   version 3 (`blockferry convert -O qcow2`), or give its backing file a shorter name.";
        Err(Fault::Refused(Errno::ENOSPC, why.into()))
    }

    /// All of it is right again, and durable.
    async fn settle(&self, unsettled: Unsettled) -> Result<(), Fault> {
        self.flush_files().await?;
        match unsettled {
            Unsettled::Already => return Ok(()),
            Unsettled::V3 => {}
            Unsettled::V2 => {
                let back = self.rearrange_header(|header| {
                    header.version = 2;
                    header.header_length = V2_BYTES as u32;
                    header.incompatible &= !incompatible::DIRTY;
                });
                if back.await? {
                    return Ok(());
                }
            }
        }
        self.header.borrow_mut().incompatible &= !incompatible::DIRTY;
        self.write_header().await?;
        self.flush_files().await
    }

    /// Every reference that an L1 table and the L2 tables below it have.
    pub(super) async fn references(&self, l1: &[u64]) -> Result<Counts, Fault> {
        let mut counts = Counts::default();
        let mut tables = BTreeSet::new();
        let (size, bits) = (self.g.cluster_size(), self.g.cluster_bits);
        let step = self.g.l2_entry_bytes() as usize;
        let full = || Fault::Damage("its clusters are scattered too widely".into());
        for entry in l1 {
            let host = entry & OFFSET_MASK;
            if host == 0 {
                continue;
            }
            if !host.is_multiple_of(size) {
                return Err(Fault::Damage(format!("an L1 entry leads to {host:#x}, which is not a cluster")));
            }
            if !tables.insert(host) {
                return Err(Fault::Damage(format!("two entries of an L1 table lead to {host:#x}")));
            }
            self.must_be_there("an L2 table", host, size)?;
            counts.add(host >> bits).then_some(()).ok_or_else(full)?;
            if self.is_hole(host, size).await? {
                continue;
            }
            let table = self.read_bytes(host, size).await?;
            for slot in table.chunks_exact(step) {
                self.let_others(1).await;
                let bitmap = if step == 16 { get_be64(slot, 1) } else { 0 };
                let raw = Raw { entry: get_be64(slot, 0), bitmap };
                let cluster = self.decode(Some(raw), 0)?;
                let (first, end) = match cluster {
                    Cluster::Compressed { host, len } => (host >> bits, (host + len).div_ceil(size)),
                    other => match other.host() {
                        Some((host, _)) => (host >> bits, (host >> bits) + 1),
                        None => continue,
                    },
                };
                self.must_be_there("guest data", first << bits, (end - first) << bits)?;
                for cluster in first..end {
                    counts.add(cluster).then_some(()).ok_or_else(full)?;
                }
            }
        }
        Ok(counts)
    }

    /// All of these can be counted once more.
    async fn check_references(&self, counts: &Counts) -> Result<(), Fault> {
        let max = self.counting().refcount_max();
        for (cluster, count) in counts.iter() {
            let now = self.refcount_of(cluster).await?;
            if now == 0 {
                return Err(Fault::Damage(format!("cluster {cluster} is in use and its refcount is 0")));
            }
            if count > max - now {
                let why = format!(
                    "Refcounts of {} bits are too narrow for a snapshot.",
                    self.counting().refcount_bits()
                );
                return Err(Fault::Refused(Errno::EINVAL, why));
            }
        }
        Ok(())
    }

    /// Counts all of these once more.
    async fn add_references(&self, counts: &Counts) -> Result<(), Fault> {
        for (cluster, count) in counts.iter() {
            self.change_refcount(cluster, count as i64).await?;
            self.write_back_if_crowded().await?;
        }
        Ok(())
    }

    /// Drops all of these once nothing durable refers to them, and waits until that is done.
    pub(super) async fn drop_references(&self, counts: &Counts) -> Result<(), Fault> {
        for (cluster, count) in counts.iter() {
            self.let_others(count).await;
            let mut meta = self.meta.borrow_mut();
            (0..count).for_each(|_| meta.free(Freed { first: cluster, count: 1, discard: true }));
        }
        self.write_back().await?;
        while !self.meta.borrow().releasing.is_empty() {
            self.release().await?;
            if !self.meta.borrow().releasing.is_empty() {
                self.ring.sleep(WAIT_NANOS).await;
            }
        }
        self.write_refcounts().await?;
        self.flush_files().await
    }

    /// Writes a table of snapshots to a new place, and switches over. The references of the old one are dropped.
    async fn write_snapshots(&self, list: &[Snapshot], old_bytes: u64) -> Result<(), Fault> {
        let bytes: Vec<u8> = list.iter().flat_map(Snapshot::encode).collect();
        if bytes.len() as u64 > TABLE_BYTES_MAX || list.len() > SNAPSHOTS_MAX as usize {
            return Err(Fault::Refused(Errno::EFBIG, "There is no room for more snapshots.".into()));
        }
        let run = match bytes.len() as u64 {
            0 => None,
            len => Some(self.allocate(self.g.clusters(len), false).await?),
        };
        let before = self.header.borrow().clone();
        let write = async {
            if let Some(run) = run {
                self.write_bytes(run.host, &bytes).await?;
            }
            self.write_back().await
        };
        if let Err(fault) = write.await {
            if let Some(run) = run {
                self.give_back(run).await;
            }
            return Err(fault);
        }
        {
            let mut header = self.header.borrow_mut();
            header.nb_snapshots = list.len() as u32;
            header.snapshots_offset = run.map_or(0, |run| run.host);
        }
        let switched = async {
            self.write_header().await?;
            self.flush_files().await
        };
        if let Err(fault) = switched.await {
            // Which table counts is not known: nothing may be freed.
            *self.header.borrow_mut() = before;
            self.sync.failed.set(Some(Errno::EIO));
            self.corrupt.set(true);
            return Err(fault);
        }
        if old_bytes > 0 {
            let freed = Freed {
                first: before.snapshots_offset >> self.g.cluster_bits,
                count: self.g.clusters(old_bytes),
                discard: true,
            };
            self.meta.borrow_mut().free(freed);
        }
        let noted = self.note_fixed_tables().await;
        if noted.is_err() {
            // The new table counts; where it and what it leads to lie is not known any more.
            self.sync.failed.set(Some(Errno::EIO));
            self.corrupt.set(true);
        }
        noted
    }

    /// Snapshots of old programs do not say how long their disk was: as long as it is now, until it is resized.
    pub(super) async fn complete_snapshots(&self) -> Result<(), Fault> {
        let (list, old_bytes) = self.read_snapshots().await?;
        if list.iter().all(|snapshot| snapshot.extra.len() >= EXTRA_BYTES_MIN) {
            return Ok(());
        }
        let len = self.len.get();
        let whole: Vec<Snapshot> = list.into_iter().map(|snapshot| snapshot.completed(len)).collect();
        self.write_snapshots(&whole, old_bytes).await?;
        self.write_back().await
    }

    /// Takes the marks of sole references off the active tables: all of it is shared now. They have been
    /// written back.
    async fn share_all(&self) -> Result<(), Fault> {
        let len = self.meta.borrow().l1.entries.len() as u64;
        for index in 0..len {
            let entry = self.meta.borrow().l1.get(index);
            if entry & OFFSET_MASK == 0 {
                continue;
            }
            let start = index.saturating_mul(self.g.l2_covers());
            let entries = if self.is_hole(entry & OFFSET_MASK, self.g.cluster_size()).await? {
                0
            } else {
                self.g.l2_entries()
            };
            for number in 0..entries {
                self.let_others(1).await;
                let at = start + (number << self.g.cluster_bits);
                let Some(raw) = self.load_entry(at).await? else { break };
                if raw.entry & COPIED != 0 {
                    self.meta.borrow_mut().set_entry(at, Raw { entry: raw.entry & !COPIED, ..raw });
                }
            }
            // Last: in a table that is marked as shared, no entry is believed to be sole.
            self.meta.borrow_mut().l1.set(index, entry & !COPIED);
            self.write_back_if_crowded().await?;
        }
        Ok(())
    }

    pub(super) async fn take_snapshot(&self, name: &str, date: (u32, u32)) -> Result<String, Fault> {
        self.check_snapshots()?;
        if name.len() > usize::from(u16::MAX) {
            return Err(Fault::Refused(Errno::EINVAL, "The name of the snapshot is too long.".into()));
        }
        let _claim = self.claims.enter(ByteRange::ALL, LockKind::Exclusive).await;
        self.write_back().await?;
        let (mut list, old_bytes) = self.read_snapshots().await?;
        let id = list.iter().filter_map(|s| s.id.parse::<u64>().ok()).max().unwrap_or(0).saturating_add(1);
        let mut l1 = self.meta.borrow().l1.entries.clone();
        // Nothing has changed yet: a refusal leaves the image as usable as it was.
        let counts = self.references(&l1).await.map_err(unmarked)?;
        self.check_references(&counts).await.map_err(unmarked)?;
        let unsettled = self.unsettle().await?;
        self.add_references(&counts).await?;
        self.share_all().await?;
        // Refcounts before the marks, and both before anything refers to them once more.
        self.write_back().await?;
        l1.iter_mut().for_each(|entry| *entry &= !COPIED);
        let mut bytes = vec![0; l1.len() * 8];
        l1.iter().enumerate().for_each(|(i, entry)| set_be64(&mut bytes, i, *entry));
        let run = self.allocate(self.g.clusters(bytes.len() as u64).max(1), false).await?;
        let write = async {
            self.write_bytes(run.host, &bytes).await?;
            let mut extra = Vec::new();
            extra.extend(0u64.to_be_bytes());
            extra.extend(self.len.get().to_be_bytes());
            // Instructions counted, as `qemu-img` says it of a disk without a machine.
            extra.extend(0u64.to_be_bytes());
            list.push(Snapshot {
                l1_offset: run.host,
                l1_size: l1.len() as u32,
                id: id.to_string(),
                name: name.to_owned(),
                date_sec: date.0,
                date_nsec: date.1,
                vm_clock_nsec: 0,
                vm_state_size: 0,
                disk_size: Some(self.len.get()),
                icount: Some(0),
                extra,
            });
            self.write_snapshots(&list, old_bytes).await
        };
        if let Err(fault) = write.await {
            if self.sync.failed.get().is_none() {
                self.give_back(run).await;
                // What cannot be undone is repaired by whoever opens the image next.
                let undo = async {
                    self.drop_references(&counts).await?;
                    self.repair_copied().await?;
                    self.settle(unsettled).await
                };
                let _ = undo.await;
            }
            return Err(fault);
        }
        self.write_back().await?;
        self.settle(unsettled).await?;
        Ok(id.to_string())
    }

    fn find(list: &[Snapshot], name_or_id: &str) -> Result<usize, Fault> {
        let by_id = list.iter().position(|s| s.id == name_or_id);
        by_id
            .or_else(|| list.iter().position(|s| s.name == name_or_id))
            .ok_or_else(|| Fault::Refused(Errno::ENOENT, format!("There is no snapshot '{name_or_id}'.")))
    }

    pub(super) async fn l1_of(&self, snapshot: &Snapshot) -> Result<Vec<u64>, Fault> {
        let len = u64::from(snapshot.l1_size) * 8;
        self.must_be_there("the L1 table of a snapshot", snapshot.l1_offset, len)?;
        let bytes = self.read_table(snapshot.l1_offset, len).await?;
        Ok((0..snapshot.l1_size as usize).map(|i| get_be64(&bytes, i)).collect())
    }

    pub(super) async fn apply_snapshot(&self, name_or_id: &str) -> Result<(), Fault> {
        self.check_snapshots()?;
        self.mark_bitmaps().await?;
        let _claim = self.claims.enter(ByteRange::ALL, LockKind::Exclusive).await;
        self.write_back().await?;
        let (list, _) = self.read_snapshots().await?;
        let snapshot = &list[Self::find(&list, name_or_id)?];
        let size = snapshot.disk_size.unwrap_or(self.len.get());
        if size > self.g.disk_len_max() {
            return Err(Fault::Damage("a snapshot of an impossible length".into()));
        }
        let mut l1 = self.l1_of(snapshot).await?;
        l1.iter_mut().for_each(|entry| *entry &= !COPIED);
        let new = self.references(&l1).await?;
        l1.resize((self.g.l1_entries_for(size) as usize).max(l1.len()), 0);
        let now = self.meta.borrow().l1.entries.clone();
        let old = self.references(&now).await?;
        self.check_references(&new).await?;
        let unsettled = self.unsettle().await?;
        self.add_references(&new).await?;
        if let Err(fault) = self.move_l1(l1, Some(size)).await {
            if self.sync.failed.get().is_none() && self.drop_references(&new).await.is_ok() {
                let _ = self.settle(unsettled).await;
            }
            return Err(fault);
        }
        self.len.set(size);
        {
            let mut meta = self.meta.borrow_mut();
            meta.l2.forget(0, u64::MAX);
            let tables = meta.l1.entries.iter().map(|e| e & OFFSET_MASK).filter(|at| *at != 0).collect();
            meta.l2_tables = tables;
        }
        self.packing.reset();
        self.drop_references(&old).await?;
        self.repair_copied().await?;
        self.settle(unsettled).await
    }

    pub(super) async fn delete_snapshot(&self, name_or_id: &str) -> Result<(), Fault> {
        self.check_snapshots()?;
        let _claim = self.claims.enter(ByteRange::ALL, LockKind::Exclusive).await;
        self.write_back().await?;
        let (mut list, old_bytes) = self.read_snapshots().await?;
        let snapshot = list.remove(Self::find(&list, name_or_id)?);
        let l1 = self.l1_of(&snapshot).await?;
        let mut counts = self.references(&l1).await?;
        let clusters = self.g.clusters(u64::from(snapshot.l1_size) * 8);
        let first = snapshot.l1_offset >> self.g.cluster_bits;
        let unsettled = self.unsettle().await?;
        if let Err(fault) = self.write_snapshots(&list, old_bytes).await {
            if self.sync.failed.get().is_none() {
                let _ = self.settle(unsettled).await;
            }
            return Err(fault);
        }
        (first..first + clusters).for_each(|cluster| {
            counts.add(cluster);
        });
        self.drop_references(&counts).await?;
        self.repair_copied().await?;
        self.packing.reset();
        self.settle(unsettled).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_read_as_they_were_written() {
        let mut extra = vec![0; 24];
        set_be64(&mut extra, 0, 5 << 32);
        set_be64(&mut extra, 1, 1 << 30);
        set_be64(&mut extra, 2, u64::MAX);
        let snapshot = Snapshot {
            l1_offset: 0x50000,
            l1_size: 7,
            id: "12".into(),
            name: "before".into(),
            date_sec: 1,
            date_nsec: 2,
            vm_clock_nsec: 3,
            vm_state_size: 5 << 32,
            disk_size: Some(1 << 30),
            icount: None,
            extra,
        };
        let bytes = snapshot.encode();
        assert_eq!(Snapshot::entry_bytes(&bytes), bytes.len() as u64);
        assert_eq!(Snapshot::parse(&bytes), snapshot);
    }
}
