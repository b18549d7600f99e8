//! Making an image. The header is written last: until then there is no image that could be taken for one.

use std::rc::Rc;

use blockferry_ring::Ring;

use super::cache::SLICE_BYTES_MAX;
use super::entry::{Cluster, Raw, set_be64, set_refcount};
use super::geometry::{Geometry, L1_BYTES_MAX, REFTABLE_BYTES_MAX};
use super::header::{
    Extension, Header, V2_BYTES, V3_BYTES, autoclear, compatible, extension, feature_names, incompatible,
};
use super::image::{Fault, Qcow2, write_bytes};
use super::info::Measured;
use super::options::{Compat, CompressionType, CreateOptions, Preallocation};
use super::{Backing, OpenFiles, OpenOptions, Wanted};
use crate::base::os_name;
use crate::block::{
    BlockError, Driver, IoFuture, IoResult, Node, Operation, Permissions, Reserve, ZeroFlags,
};
use blockferry_ring::Errno;

/// How many clusters each table of a new image has, and where they are: header, refcount table, refcount
/// blocks, L1 table, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    table: u64,
    blocks: u64,
    l1: u64,
    l1_entries: u64,
}

fn geometry(options: &CreateOptions) -> Geometry {
    Geometry {
        cluster_bits: options.cluster_size.trailing_zeros(),
        refcount_order: options.refcount_bits.trailing_zeros(),
        subclusters: options.extended_l2,
    }
}

impl Layout {
    /// With refcounts for `more` clusters beyond the tables themselves.
    fn new(g: &Geometry, size: u64, more: u64) -> Layout {
        let l1_entries = g.l1_entries_for(size);
        let l1 = g.clusters(l1_entries * 8);
        let mut layout = Layout { table: 1, blocks: 1, l1, l1_entries };
        loop {
            let blocks = (layout.clusters() + more).div_ceil(g.refblock_entries());
            let table = g.clusters(blocks * 8).max(1);
            if (blocks, table) == (layout.blocks, layout.table) {
                return layout;
            }
            (layout.blocks, layout.table) = (blocks.max(layout.blocks), table.max(layout.table));
            if (blocks, table) < (layout.blocks, layout.table) {
                return layout;
            }
        }
    }

    /// The same with a refcount table for all of a place of `room` bytes, or for all that the image can come to need
    /// if that is less: it never has to be moved to grow, which takes room that such a place may not have.
    fn for_room(self, g: &Geometry, size: u64, room: u64) -> Layout {
        let all = Layout::new(g, size, g.l1_entries_for(size) + g.clusters(size));
        let blocks = (room >> g.cluster_bits).div_ceil(g.refblock_entries());
        let table_max = all.table.min(REFTABLE_BYTES_MAX / g.cluster_size());
        let table = g.clusters(blocks * 8).min(table_max).max(self.table);
        let mut layout = Layout { table, ..self };
        while layout.blocks * g.refblock_entries() < layout.clusters() {
            layout.blocks += 1;
        }
        layout
    }

    fn clusters(&self) -> u64 {
        1 + self.table + self.blocks + self.l1
    }
}

fn header(options: &CreateOptions, g: &Geometry, layout: &Layout, size: u64) -> Header {
    let v3 = options.compat == Compat::V3;
    let cluster = g.cluster_size();
    let flag = |on: bool, bit: u64| if on { bit } else { 0 };
    let zstd = options.compression_type == CompressionType::Zstd;
    let mut header = Header {
        version: if v3 { 3 } else { 2 },
        backing_file: options.backing_file.clone(),
        backing_offset: 0,
        cluster_bits: g.cluster_bits,
        size,
        crypt_method: 0,
        l1_size: layout.l1_entries as u32,
        l1_offset: if layout.l1 == 0 { 0 } else { (1 + layout.table + layout.blocks) * cluster },
        reftable_offset: cluster,
        reftable_clusters: layout.table as u32,
        nb_snapshots: 0,
        snapshots_offset: 0,
        incompatible: flag(options.data_file.is_some(), incompatible::DATA_FILE)
            | flag(zstd, incompatible::COMPRESSION)
            | flag(options.extended_l2, incompatible::EXTENDED_L2),
        compatible: flag(options.lazy_refcounts, compatible::LAZY_REFCOUNTS),
        autoclear: flag(options.data_file_raw, autoclear::DATA_FILE_RAW),
        refcount_order: g.refcount_order,
        header_length: if v3 { V3_BYTES } else { V2_BYTES } as u32,
        compression: options.compression_type,
        more: Vec::new(),
        extensions: Vec::new(),
    };
    let mut add = |kind, data: &[u8]| header.extensions.push(Extension { kind, data: data.to_vec() });
    if let Some(format) = &options.backing_fmt {
        add(extension::BACKING_FORMAT, format.as_bytes());
    }
    if let Some(name) = &options.data_file {
        add(extension::DATA_FILE, &os_name::to_bytes(name));
    }
    // Small clusters have better use for their room.
    if v3 && cluster >= 4096 {
        add(extension::FEATURE_NAMES, &feature_names());
    }
    header
}

/// The first cluster: header, extensions, name of the backing file. `None`: they do not fit.
pub(super) fn first_cluster(header: &mut Header) -> Option<Vec<u8>> {
    let size = header.geometry().cluster_size() as usize;
    let mut bytes = header.encode_with_extensions();
    if let Some(name) = header.backing_file.clone() {
        header.backing_offset = bytes.len() as u64;
        bytes = header.encode_with_extensions();
        bytes.extend(&*os_name::to_bytes(&name));
    }
    (bytes.len() <= size).then(|| {
        bytes.resize(size, 0);
        bytes
    })
}

/// Opens nothing: an image that was just made names files that are of no interest yet.
#[derive(Debug)]
struct Nothing;

impl OpenFiles for Nothing {
    fn open<'a>(&'a self, wanted: Wanted<'a>) -> IoFuture<'a, Result<Rc<Node>, BlockError>> {
        let error = BlockError::new(Operation::Open, wanted.name, Errno::EPERM);
        let pool = blockferry_ring::Pool::default();
        IoFuture::new(&pool, async move { Err(error) })
    }
}

/// All of a new image's tables, if there can be such an image: bytes of the disk; where the tables are and the first
/// cluster, in a file and in a place of `room` bytes.
fn lay_out(name: &str, options: &CreateOptions, room: u64) -> Result<(u64, [Tables; 2]), BlockError> {
    options.check(name)?;
    let g = geometry(options);
    let fail = |errno, why: String| Err(BlockError::new(Operation::Create, name, errno).because(why));
    let Some(size) = options.size.checked_next_multiple_of(512).filter(|size| *size <= g.disk_len_max())
    else {
        return fail(
            Errno::EFBIG,
            format!(
                "With clusters of {} bytes a disk has at most {} bytes.",
                g.cluster_size(),
                g.disk_len_max()
            ),
        );
    };
    // What has a length of its own says so when it is to be emptied; both ways are judged before that.
    let layouts = [Layout::new(&g, size, 0), Layout::new(&g, size, 0).for_room(&g, size, room)];
    let layout = layouts[0];
    if layout.l1_entries * 8 > L1_BYTES_MAX
        || layout.table * g.cluster_size() > REFTABLE_BYTES_MAX.max(g.cluster_size())
    {
        return fail(Errno::EFBIG, "Its tables would be too large; use larger clusters.".into());
    }
    let first = |layout| first_cluster(&mut header(options, &g, layout, size));
    let [Some(first), Some(first_in_room)] = layouts.each_ref().map(first) else {
        return fail(
            Errno::EINVAL,
            "The names of other files do not fit into one cluster; use larger clusters.".into(),
        );
    };
    Ok((size, [(layout, first), (layouts[1], first_in_room)]))
}

type Tables = (Layout, Vec<u8>);

impl Qcow2 {
    /// Whether there can be an image like that. `name` is what it will be called.
    pub fn check_new(name: &str, options: &CreateOptions) -> Result<(), BlockError> {
        lay_out(name, options, 0).map(drop)
    }

    pub(super) async fn create_image(
        ring: &Ring,
        file: &Rc<Node>,
        data_file: Option<&Rc<Node>>,
        options: &CreateOptions,
    ) -> IoResult {
        let (size, [in_file, in_room]) = lay_out(file.driver().name(), options, file.len())?;
        let g = geometry(options);
        let fail = |errno, why: String| {
            Err(BlockError::new(Operation::Create, file.driver().name(), errno).because(why))
        };
        if data_file.is_some() != options.data_file.is_some() {
            return fail(Errno::EINVAL, "A data file was given and not named, or the reverse.".into());
        }
        let write = async {
            let memory = Reserve::new(ring, SLICE_BYTES_MAX as usize)
                .map_err(|errno| Fault::Refused(errno, "All memory for I/O is in use.".into()))?;
            // What was there is gone first, so that no old header is taken for that of half a new image.
            match file.set_len(0).await {
                Ok(()) => {
                    file.set_len(in_file.0.clusters() * g.cluster_size()).await?;
                    write_tables(file, &memory, &g, &in_file.0, &in_file.1).await?;
                }
                Err(error) if error.errno == Errno::EOPNOTSUPP => {
                    clear_head(file, &memory, &in_room.0, &g).await?;
                    write_tables(file, &memory, &g, &in_room.0, &in_room.1).await?;
                }
                Err(error) => return Err(error.into()),
            }
            if let Some(data_file) = data_file {
                if data_file.len() != size {
                    match data_file.set_len(size).await {
                        // A device keeps its length; what is behind the disk's end is of no interest.
                        Err(error) if error.errno == Errno::EOPNOTSUPP && data_file.len() >= size => {}
                        resized => resized?,
                    }
                }
                data_file.flush().await?;
            }
            Ok(())
        };
        match write.await {
            Ok(()) => {}
            Err(Fault::Io(error)) => return Err(error),
            Err(Fault::Damage(why)) => return fail(Errno::EIO, why),
            Err(Fault::Refused(errno, why)) => return fail(errno, why),
        }
        // What a raw data file holds is what the disk holds only if all of it is mapped.
        let preallocation = match options.preallocation {
            Preallocation::Off if options.data_file_raw => Preallocation::Metadata,
            other => other,
        };
        if preallocation == Preallocation::Off {
            return Ok(());
        }
        let open =
            OpenOptions { backing: Backing::None, data_file: data_file.cloned(), ..OpenOptions::default() };
        let image = Qcow2::open_image(ring, file, &Nothing, open).await?;
        let thin = options.backing_file.is_some();
        let made = match image.preallocate(0, size, preallocation, thin).await {
            Ok(()) => {
                async {
                    image.cut_slack().await?;
                    image.flush().await
                }
                .await
            }
            Err(fault) => Err(image.tell_whole(Operation::Create, fault).await),
        };
        // Said, not left to the closing of the file: a process that is started meanwhile may have a copy of it for a moment.
        let unlocked = image.set_permissions(Permissions::NONE);
        made.and(unlocked)
    }

    /// Maps all clusters of a range of the disk that are not mapped yet.
    pub(super) async fn preallocate(
        &self,
        from: u64,
        to: u64,
        mode: Preallocation,
        thin: bool,
    ) -> Result<(), Fault> {
        let size = self.g.cluster_size();
        let mut at = self.g.cluster_start(from);
        while at < to {
            if !self.has_no_room(at, thin).await? {
                at += size;
                continue;
            }
            self.own_l2(at).await?;
            let table_end = (self.g.l1_index(at) + 1).saturating_mul(self.g.l2_covers());
            let mut end = at + size;
            while end < to.min(table_end) && end - at < 64 << 20 && self.has_no_room(end, thin).await? {
                end += size;
            }
            let run = self.reserve_for(at, (end - at) / size).await?;
            let bytes = (run.count * size).min(if self.data_file.is_some() { to - at } else { u64::MAX });
            let result = self.prepare_room(run.host, bytes, mode, run.virgin).await;
            if let Err(fault) = result {
                self.unreserve_data(run).await;
                return Err(fault);
            }
            // What lies below a disk that grows must not appear.
            let zero = if thin || self.below().is_none() { 0 } else { u32::MAX };
            let entry = |i: u64| {
                let host = run.host + i * size;
                if self.g.subclusters || thin { Raw::sub(host, 0, zero) } else { Raw::data(&self.g, host) }
            };
            let entries: Vec<Raw> = (0..run.count).map(entry).collect();
            self.publish(at, &entries, &[]).await?;
            self.write_back_if_crowded().await?;
            at += run.count * size;
        }
        Ok(())
    }

    /// Nothing is allocated for the cluster at `at`: it is not mapped, or (where it will read as zeroes) said to be zero.
    async fn has_no_room(&self, at: u64, thin: bool) -> Result<bool, Fault> {
        let Some(raw) = self.load_entry(at).await? else { return Ok(true) };
        let is_zero = || raw == Raw::zero(&self.g);
        Ok(raw == Raw::UNALLOCATED || !thin && is_zero())
    }

    /// The disk was `old` bytes long and is `len` now: the rest of the cluster that its end lay in, where that has a place
    /// of its own, has room and is zero.
    pub(super) async fn prepare_rest_of_cluster(
        &self,
        old: u64,
        len: u64,
        mode: Preallocation,
    ) -> Result<(), Fault> {
        let start = self.g.cluster_start(old);
        let end = len.min(start.saturating_add(self.g.cluster_size()));
        if start == old || !matches!(mode, Preallocation::Falloc | Preallocation::Full) {
            return Ok(());
        }
        let raw = self.load_entry(start).await?;
        match self.decode(raw, start)? {
            Cluster::Data { host, copied: true }
            | Cluster::ZeroAt { host, copied: true }
            | Cluster::Sub { host, has_host: true, copied: true, .. } => {
                self.prepare_room(host + (old - start), end - old, mode, false).await
            }
            _ => Ok(()),
        }
    }

    async fn prepare_room(
        &self,
        host: u64,
        len: u64,
        mode: Preallocation,
        virgin: bool,
    ) -> Result<(), Fault> {
        let data = self.data();
        match mode {
            Preallocation::Off | Preallocation::Metadata if virgin || self.data_file.is_some() => Ok(()),
            Preallocation::Off | Preallocation::Metadata => self.zero_host(host, len).await,
            Preallocation::Falloc => Ok(data.write_zeroes(host, len, ZeroFlags::default()).await?),
            Preallocation::Full => {
                let mut at = host;
                while at < host + len {
                    let n = (host + len - at).min(1 << 20) as usize;
                    let mut buf = self.ring.alloc(n).await;
                    buf.fill_zero();
                    self.put(at, buf.freeze()).await?;
                    at += n as u64;
                }
                Ok(())
            }
        }
    }

    /// Bytes that an image needs at least that was just made in a place of `room` bytes.
    pub(super) fn least_bytes(options: &CreateOptions, room: u64) -> u64 {
        let (g, size) = (geometry(options), options.size.next_multiple_of(512));
        match options.preallocation {
            Preallocation::Off => {
                Layout::new(&g, size, 0).for_room(&g, size, room).clusters() * g.cluster_size()
            }
            _ => {
                // Where the data lies in another file, only tables are needed here.
                let data = if options.data_file.is_some() { 0 } else { g.clusters(size) };
                let l2_tables = g.l1_entries_for(size);
                (Layout::new(&g, size, l2_tables + data).clusters() + l2_tables + data) * g.cluster_size()
            }
        }
    }

    /// As QEMU counts: tables are those of a full disk, whatever it holds now; data counts wherever it lies; and what
    /// is not allocated reads as zeroes, unless there is a backing file, which nobody has looked at.
    pub(super) fn measure_image(options: &CreateOptions, data_clusters: Option<u64>) -> Measured {
        let g = geometry(options);
        let size = options.size.next_multiple_of(512);
        let (l2_tables, all) = (g.l1_entries_for(size), g.clusters(size));
        let tables = (Layout::new(&g, size, l2_tables + all).clusters() + l2_tables) * g.cluster_size();
        let is_allocated = matches!(options.preallocation, Preallocation::Falloc | Preallocation::Full);
        let used = match data_clusters {
            _ if is_allocated => all,
            Some(_) if options.backing_file.is_some() => all,
            Some(data) => data.min(all),
            None => 0,
        };
        Measured {
            required: tables + used * g.cluster_size(),
            fully_allocated: tables + all * g.cluster_size(),
        }
    }
}

/// Takes the header off what is to hold an image and has a length of its own.
async fn clear_head(file: &Rc<Node>, memory: &Reserve, layout: &Layout, g: &Geometry) -> Result<(), Fault> {
    let (needed, room) = (layout.clusters() * g.cluster_size(), file.len());
    if room < needed {
        let why = format!("An empty image has {needed} bytes already, and there is room for {room}.");
        return Err(Fault::Refused(Errno::ENOSPC, why));
    }
    write_bytes(file, memory, 0, &[0; 512]).await?;
    Ok(file.flush().await?)
}

async fn write_tables(
    file: &Rc<Node>,
    memory: &Reserve,
    g: &Geometry,
    layout: &Layout,
    first: &[u8],
) -> Result<(), Fault> {
    let size = g.cluster_size();
    let bytes = layout.clusters() * size;
    let zero = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
    file.write_zeroes(size, bytes - size, zero).await?;
    let blocks_at = (1 + layout.table) * size;
    let mut table = vec![0; (layout.blocks * 8).next_multiple_of(512) as usize];
    for block in 0..layout.blocks {
        set_be64(&mut table, block as usize, blocks_at + block * size);
        let counted =
            layout.clusters().saturating_sub(block * g.refblock_entries()).min(g.refblock_entries());
        let mut counts = vec![0; size as usize];
        (0..counted as usize).for_each(|i| set_refcount(&mut counts, g.refcount_order, i, 1));
        let used = ((counted << g.refcount_order).div_ceil(8)).next_multiple_of(512).min(size) as usize;
        write_bytes(file, memory, blocks_at + block * size, &counts[..used]).await?;
    }
    write_bytes(file, memory, size, &table).await?;
    file.flush().await?;
    write_bytes(file, memory, 0, first).await?;
    file.flush().await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_count_themselves() {
        for bits in 9..=21 {
            for refcount_order in 0..=6 {
                let g = Geometry { cluster_bits: bits, refcount_order, subclusters: false };
                for size in [0, 512, 1 << 30, 64 << 30] {
                    let layout = Layout::new(&g, size.min(g.disk_len_max()), 0);
                    assert!(layout.blocks * g.refblock_entries() >= layout.clusters());
                    assert!(layout.table * g.cluster_size() / 8 >= layout.blocks);
                    assert!(layout.l1 * g.cluster_size() / 8 >= layout.l1_entries);
                }
            }
        }
    }
}
