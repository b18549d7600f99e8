//! Going back to version 2, which has no clusters that read as zeroes.
//!
//! Each L2 table with such clusters, of the disk and of its snapshots, is made anew without them: where the image names a
//! backing file, they get clusters of zeroes, else nothing is there. The L1 tables that lead to them and the table of
//! snapshots are made anew as well, all of it next to the old. One write of the header switches over; then the references
//! of the old tables are dropped. Until that is done the image says that it is dirty, and is of version 3.
//!
//! A table that several L1 tables lead to stays one table, so that what all of them share goes on being shared.

use std::collections::BTreeMap;

use blockferry_ring::Errno;

use super::alloc::Run;
use super::count::Counts;
use super::entry::{COPIED, Cluster, OFFSET_MASK, Raw, get_be64, set_be64};
use super::header::incompatible;
use super::image::{Fault, Qcow2};
use super::snapshot::Snapshot;

/// An L2 table, and who leads to it.
#[derive(Debug, Default)]
struct Table {
    /// L1 tables.
    users: u64,
    /// One of them is that of the disk.
    is_active: bool,
    /// It has clusters that read as zeroes.
    has_zeroes: bool,
}

/// All L1 tables, and the L2 tables below them by their place.
#[derive(Debug, Default)]
struct Survey {
    active: Vec<u64>,
    snapshots: Vec<(Snapshot, Vec<u64>)>,
    /// Bytes of the table of snapshots.
    bytes: u64,
    tables: BTreeMap<u64, Table>,
}

impl Survey {
    /// An L1 table leads to one that has to be made anew.
    fn concerns(&self, l1: &[u64]) -> bool {
        l1.iter().any(|entry| self.tables.get(&(entry & OFFSET_MASK)).is_some_and(|table| table.has_zeroes))
    }
}

/// What is being made, and what it stands in for.
#[derive(Default)]
struct Anew {
    /// Everything that was reserved, to be given back if something fails, and how often it was counted.
    runs: Vec<(Run, u64)>,
    /// References that go when all of it counts.
    old: Counts,
    /// New L2 tables by the place of the old ones.
    tables: BTreeMap<u64, u64>,
}

impl Qcow2 {
    /// What version 2 cannot say of the snapshots; damage in any table is found, too.
    pub(super) async fn snapshots_keep_from_v2(&self) -> Result<Option<&'static str>, Fault> {
        let survey = self.survey().await?;
        let len = self.len.get();
        for (snapshot, _) in &survey.snapshots {
            if snapshot.disk_size.is_some_and(|size| size != len) {
                return Ok(Some("snapshots of another length than the disk's"));
            }
            if snapshot.vm_state_size > u32::MAX.into() {
                return Ok(Some("snapshots of machines as large as this one"));
            }
        }
        Ok(None)
    }

    async fn survey(&self) -> Result<Survey, Fault> {
        if !self.read_only.get() {
            self.write_back().await?;
        }
        let (list, bytes) = self.read_snapshots().await?;
        let active = self.meta.borrow().l1.entries.clone();
        let mut survey = Survey { bytes, active, ..Survey::default() };
        for snapshot in list {
            let l1 = self.l1_of(&snapshot).await?;
            survey.snapshots.push((snapshot, l1));
        }
        let inactive = survey.snapshots.iter().map(|(_, l1)| (l1, false));
        for (l1, is_active) in [(&survey.active, true)].into_iter().chain(inactive) {
            for host in l1.iter().map(|entry| entry & OFFSET_MASK).filter(|host| *host != 0) {
                let table = survey.tables.entry(host).or_default();
                table.users += 1;
                table.is_active |= is_active;
            }
        }
        for (host, table) in &mut survey.tables {
            table.has_zeroes = self.has_zeroes(*host).await?;
        }
        Ok(survey)
    }

    async fn has_zeroes(&self, host: u64) -> Result<bool, Fault> {
        let size = self.g.cluster_size();
        if !host.is_multiple_of(size) {
            return Err(Fault::Damage(format!("an L1 entry leads to {host:#x}, which is not a cluster")));
        }
        self.must_be_there("an L2 table", host, size)?;
        if self.is_hole(host, size).await? {
            return Ok(false);
        }
        let table = self.read_bytes(host, size).await?;
        let mut found = false;
        for index in 0..table.len() / 8 {
            self.let_others(1).await;
            let raw = Raw { entry: get_be64(&table, index), bitmap: 0 };
            found |= self.decode(Some(raw), 0)?.masks().1 != 0;
        }
        Ok(found)
    }

    /// Makes all clusters that read as zeroes something else that does.
    pub(super) async fn expand_zeroes(&self) -> Result<(), Fault> {
        let survey = self.survey().await?;
        if !survey.tables.values().any(|table| table.has_zeroes) {
            return Ok(());
        }
        let mut anew = Anew::default();
        let (l1, snapshots) = match self.make_anew(&survey, &mut anew).await {
            Ok(made) => made,
            Err(fault) => {
                for (run, users) in anew.runs {
                    for _ in 0..users {
                        self.give_back(run).await;
                    }
                }
                return Err(fault);
            }
        };
        {
            let mut header = self.header.borrow_mut();
            header.l1_offset = l1.unwrap_or(header.l1_offset);
            header.snapshots_offset = snapshots.unwrap_or(header.snapshots_offset);
            // Marks of sole references may be off until the old tables are gone.
            header.incompatible |= incompatible::DIRTY;
        }
        let switched = async {
            self.write_header().await?;
            self.flush_files().await?;
            self.reload().await
        };
        if let Err(fault) = switched.await {
            // Which tables count is not known: nothing may be freed, and nothing be written any more.
            self.sync.failed.set(Some(Errno::EIO));
            self.corrupt.set(true);
            return Err(fault);
        }
        self.drop_references(&anew.old).await?;
        self.repair_copied().await?;
        self.flush_files().await?;
        self.header.borrow_mut().incompatible &= !incompatible::DIRTY;
        self.write_header().await?;
        self.flush_files().await
    }

    /// Everything that is new, durable and led to by nothing: where the L1 table and the table of snapshots are, if they
    /// are others.
    async fn make_anew(&self, survey: &Survey, anew: &mut Anew) -> Result<(Option<u64>, Option<u64>), Fault> {
        for (host, table) in survey.tables.iter().filter(|(_, table)| table.has_zeroes) {
            self.remake_l2(*host, table, anew).await?;
            self.write_back_if_crowded().await?;
        }
        let mut l1 = None;
        if survey.concerns(&survey.active) {
            l1 = Some(self.remake_l1(&survey.active, Some(survey), anew).await?);
            let meta = self.meta.borrow();
            self.drop_later(anew, meta.l1.offset, meta.l1.bytes(&self.g))?;
        }
        let mut list = Vec::new();
        let mut is_other = false;
        for (snapshot, entries) in &survey.snapshots {
            let mut snapshot = snapshot.clone();
            if survey.concerns(entries) {
                let (at, len) = snapshot.table();
                self.drop_later(anew, at, len)?;
                snapshot.l1_offset = self.remake_l1(entries, None, anew).await?;
                is_other = true;
            }
            list.push(snapshot);
        }
        let mut snapshots = None;
        if is_other {
            let bytes: Vec<u8> = list.iter().flat_map(Snapshot::encode).collect();
            snapshots = Some(self.put_anew(&bytes, anew).await?);
            self.drop_later(anew, self.header.borrow().snapshots_offset, survey.bytes)?;
        }
        self.write_back().await?;
        Ok((l1, snapshots))
    }

    /// The clusters of an old table lose a reference.
    fn drop_later(&self, anew: &mut Anew, at: u64, len: u64) -> Result<(), Fault> {
        for cluster in (at >> self.g.cluster_bits..).take(self.g.clusters(len) as usize) {
            self.drop_often(anew, cluster, 1)?;
        }
        Ok(())
    }

    fn drop_often(&self, anew: &mut Anew, cluster: u64, times: u64) -> Result<(), Fault> {
        match anew.old.add_many(cluster, times) {
            true => Ok(()),
            false => Err(Fault::Damage("its clusters are scattered too widely".into())),
        }
    }

    /// Reserves clusters, to which so many will refer.
    async fn reserve(&self, clusters: u64, users: u64, anew: &mut Anew) -> Result<Run, Fault> {
        let run = self.allocate(clusters, false).await?;
        anew.runs.push((run, 1));
        let first = run.host >> self.g.cluster_bits;
        if users > 1 {
            for cluster in first..first + run.count {
                self.change_refcount(cluster, users as i64 - 1).await?;
            }
            if let Some(last) = anew.runs.last_mut() {
                last.1 = users;
            }
        }
        Ok(run)
    }

    async fn put_anew(&self, bytes: &[u8], anew: &mut Anew) -> Result<u64, Fault> {
        let run = self.reserve(self.g.clusters(bytes.len() as u64).max(1), 1, anew).await?;
        self.write_bytes(run.host, bytes).await?;
        Ok(run.host)
    }

    /// An L1 table that leads to the new L2 tables; `survey`: it is that of the disk.
    async fn remake_l1(
        &self,
        entries: &[u64],
        survey: Option<&Survey>,
        anew: &mut Anew,
    ) -> Result<u64, Fault> {
        let mut bytes = vec![0; entries.len() * 8];
        for (index, entry) in entries.iter().enumerate() {
            let host = entry & OFFSET_MASK;
            let new = match anew.tables.get(&host) {
                Some(new) => {
                    let is_sole = survey.is_some_and(|s| s.tables.get(&host).is_some_and(|t| t.users == 1));
                    if is_sole { new | COPIED } else { *new }
                }
                None => *entry,
            };
            set_be64(&mut bytes, index, new);
        }
        self.put_anew(&bytes, anew).await
    }

    async fn remake_l2(&self, host: u64, table: &Table, anew: &mut Anew) -> Result<(), Fault> {
        let size = self.g.cluster_size();
        let is_backed = self.header.borrow().backing_file.is_some();
        let copied = if table.is_active && table.users == 1 { COPIED } else { 0 };
        self.must_be_counted(host, table.users).await?;
        let mut bytes = self.read_bytes(host, size).await?;
        for index in 0..bytes.len() / 8 {
            self.let_others(1).await;
            let entry = get_be64(&bytes, index);
            let new = match self.decode(Some(Raw { entry, bitmap: 0 }), 0)? {
                Cluster::Zero if is_backed => self.zeroes(table.users, anew).await? | copied,
                Cluster::Zero => 0,
                Cluster::ZeroAt { host, .. } => {
                    let cluster = host >> self.g.cluster_bits;
                    self.must_be_counted(host, table.users).await?;
                    // It belongs to this table alone, and shows zeroes to all who lead here.
                    if is_backed && self.refcount_of(cluster).await? == table.users {
                        self.zero_host(host, size).await?;
                        host | copied
                    } else {
                        self.drop_often(anew, cluster, table.users)?;
                        if is_backed { self.zeroes(table.users, anew).await? | copied } else { 0 }
                    }
                }
                // The marks of a shared table may be old.
                _ if copied == 0 => entry & !COPIED,
                _ => entry,
            };
            set_be64(&mut bytes, index, new);
        }
        let run = self.reserve(1, table.users, anew).await?;
        self.write_bytes(run.host, &bytes).await?;
        anew.tables.insert(host, run.host);
        self.drop_often(anew, host >> self.g.cluster_bits, table.users)
    }

    /// What loses so many references has them.
    async fn must_be_counted(&self, host: u64, users: u64) -> Result<(), Fault> {
        let refcount = self.refcount_of(host >> self.g.cluster_bits).await?;
        if refcount >= users {
            return Ok(());
        }
        Err(Fault::Damage(format!(
            "the cluster at {host:#x} is used {users} times and its refcount is {refcount}"
        )))
    }

    /// A cluster of zeroes.
    async fn zeroes(&self, users: u64, anew: &mut Anew) -> Result<u64, Fault> {
        let run = self.reserve(1, users, anew).await?;
        if !run.virgin {
            self.zero_host(run.host, self.g.cluster_size()).await?;
        }
        self.write_back_if_crowded().await?;
        Ok(run.host)
    }
}
