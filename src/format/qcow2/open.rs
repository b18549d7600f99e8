//! Opening an image: its header is believed only where it makes sense, and other files only through the gate.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;

use blockferry_ring::{Errno, Ring};

use super::cache::{SLICE_BYTES_MAX, TableCache};
use super::check::CheckProgress;
use super::compress::Packing;
use super::entry::get_be64;
use super::gate::{OpenFiles, Role, Wanted};
use super::header::{Header, HeaderError, autoclear, extension, first_cluster_bytes, incompatible};
use super::image::{Counters, Fault, Qcow2, SyncState, Turn, read_bytes};
use super::meta::{Meta, WholeTable};
use super::{Backing, OpenOptions, WhichSnapshot};
use crate::base::limits::{QCOW2_L2_CACHE_BYTES, QCOW2_REFCOUNT_CACHE_BYTES, RESERVE_BYTES};
use crate::block::pin::Epochs;
use crate::block::serial::Serial;
use crate::block::{self, BlockError, Child, Node, Operation, Permissions, Reserve};

/// Bytes that are read to learn how large the first cluster is.
const HEAD_BYTES: u64 = 4096;

/// What an image is put together from.
struct Parts {
    file: Rc<Child>,
    data_file: Option<Rc<Child>>,
    backing: Option<Rc<Child>>,
    table_memory: Reserve,
    copy_memory: OnceCell<Reserve>,
}

pub(super) fn refuse(name: &str, errno: Errno, why: impl Into<Rc<str>>) -> BlockError {
    BlockError::new(Operation::Open, name, errno).because(why)
}

pub(super) fn plain(name: &str, fault: Fault) -> BlockError {
    match fault {
        Fault::Io(error) => error,
        Fault::Damage(why) => refuse(name, Errno::EINVAL, format!("The image is damaged: {why}.")),
        Fault::Refused(errno, why) => refuse(name, errno, why),
    }
}

/// Reads the header and the first cluster of an image.
async fn read_header(
    file: &Rc<Node>,
    memory: &Reserve,
    for_check: bool,
) -> Result<(Header, Vec<u8>), BlockError> {
    let name = file.driver().name();
    let bad = |error: HeaderError| refuse(name, Errno::EINVAL, error.to_string());
    let read = async |len: u64| {
        let len = len.min(file.len());
        read_bytes(file, memory, 0, len).await.map_err(|fault| plain(name, fault))
    };
    let head = read(HEAD_BYTES).await?;
    let cluster = read(first_cluster_bytes(&head).map_err(bad)?).await?;
    let parse = if for_check { Header::parse_for_check } else { Header::parse };
    let header = parse(&cluster).map_err(bad)?;
    Ok((header, cluster))
}

impl Qcow2 {
    pub(super) async fn open_image(
        ring: &Ring,
        file: &Rc<Node>,
        files: &dyn OpenFiles,
        options: OpenOptions,
    ) -> Result<Rc<Qcow2>, BlockError> {
        let name: Rc<str> = file.driver().name().into();
        let child = Child::inner(file, block::Role::File, name.clone());
        let read_only = options.read_only || file.is_read_only();
        let memory = |bytes| {
            Reserve::new(ring, bytes).map_err(|errno| {
                refuse(&name, errno, "All memory for I/O is in use; give the engine more of it.")
            })
        };
        let table_memory = memory(SLICE_BYTES_MAX as usize)?;
        let copy_memory = OnceCell::new();
        if !read_only {
            let _ = copy_memory.set(memory(RESERVE_BYTES)?);
        }
        // Held from here on: nobody else changes what is read now.
        let held = if read_only { Permissions::STABLE_READER } else { Permissions::USER }.for_image();
        child.set_permissions(held)?;
        let (header, cluster) = read_header(file, &table_memory, options.for_check).await?;
        let writable = !read_only && !options.for_check;
        if header.incompatible & incompatible::CORRUPT != 0 && writable {
            let why = "The image is marked as damaged: it can be read, and repaired (`blockferry check --repair all`), \
                       but not written.";
            return Err(refuse(&name, Errno::EROFS, why));
        }
        let data_file = match (&options.data_file, header.has_data_file()) {
            (Some(data_file), true) => Some(data_file.clone()),
            (None, true) => Some(open_data_file(&header, files, &name, read_only).await?),
            (Some(_), false) => {
                return Err(refuse(&name, Errno::EINVAL, "The image has no external data file."));
            }
            (None, false) => None,
        };
        let backing = match (&options.backing, &header.backing_file) {
            (Backing::Given(node), _) => Some(node.clone()),
            (Backing::Named, Some(named)) => {
                let format = header.text(extension::BACKING_FORMAT);
                let wanted = Wanted {
                    role: Role::Backing,
                    name: named,
                    format: format.as_deref(),
                    image: &name,
                    read_only: true,
                };
                Some(files.open(wanted).await?)
            }
            _ => None,
        };
        let inner = |node: &Rc<Node>, role| Child::inner(node, role, name.clone());
        let data_file = data_file.map(|node| inner(&node, block::Role::DataFile));
        let backing = backing.map(|node| inner(&node, block::Role::Backing));
        let parts = Parts { file: child, data_file, backing, table_memory, copy_memory };
        let image = Qcow2::assemble(ring, header, cluster, parts, options.for_check, read_only);
        image.permissions.set(held);
        // In memory of its own: whoever opens a deep chain waits here once a layer.
        let (rest, snapshot) = (image.clone(), options.snapshot.clone());
        ring.boxed(async move { rest.make_ready(snapshot.as_ref()).await })
            .await
            .map_err(|fault| plain(&name, fault))?;
        Ok(image)
    }

    /// Reads tables, and does what has to be done before the first write.
    async fn make_ready(&self, snapshot: Option<&WhichSnapshot>) -> Result<(), Fault> {
        if let Some(snapshot) = snapshot {
            self.turn_to(snapshot).await?;
        }
        let writable = !self.read_only.get() && !self.for_check;
        self.load_tables(writable || self.for_check).await?;
        if writable { self.make_writable().await } else { Ok(()) }
    }

    /// Not inlined: what it puts together is large, and its caller waits on the stack of each layer above.
    #[inline(never)]
    fn assemble(
        ring: &Ring,
        header: Header,
        cluster: Vec<u8>,
        parts: Parts,
        for_check: bool,
        read_only: bool,
    ) -> Rc<Qcow2> {
        let Parts { file, data_file, backing, table_memory, copy_memory } = parts;
        let g = header.geometry();
        let mut head = cluster;
        head.resize(g.cluster_size().min(HEAD_BYTES) as usize, 0);
        let virgin = file.node().len().next_multiple_of(g.cluster_size());
        let meta = Meta {
            g,
            l1: WholeTable::new(&g, header.l1_offset, Vec::new()),
            reftable: WholeTable::new(&g, header.reftable_offset, Vec::new()),
            l2: TableCache::new(g.cluster_size(), QCOW2_L2_CACHE_BYTES),
            refs: TableCache::new(g.cluster_size(), QCOW2_REFCOUNT_CACHE_BYTES),
            hint: 0,
            virgin,
            freed: Vec::new(),
            releasing: VecDeque::new(),
            fixed: BTreeMap::new(),
            l2_tables: BTreeSet::new(),
            refblocks: BTreeSet::new(),
        };
        Rc::new(Qcow2 {
            ring: ring.clone(),
            name: file.node().driver().name().into(),
            file,
            data_file,
            backing_name: RefCell::new(
                backing.as_ref().map(|backing| backing.node().driver().name().to_owned()),
            ),
            backing: RefCell::new(backing),
            read_only: Cell::new(read_only),
            for_check,
            refcount_order: Cell::new(g.refcount_order),
            g,
            len: Cell::new(header.size),
            len_before: Cell::new(None),
            corrupt: Cell::new(header.incompatible & incompatible::CORRUPT != 0),
            header: RefCell::new(header),
            head: RefCell::new(head),
            meta: RefCell::new(meta),
            claims: Serial::new(ring),
            epochs: Rc::new(Epochs::default()),
            table_memory,
            copy_memory,
            tables: Turn::new(ring),
            growing: Turn::new(ring),
            lengthening: Turn::new(ring),
            syncing: Turn::new(ring),
            heading: Turn::new(ring),
            releasing: Turn::new(ring),
            sync: SyncState::default(),
            bitmaps_marked: Cell::new(false),
            preallocated: Cell::new(None),
            progress: CheckProgress::default(),
            permissions: Cell::new(Permissions::NONE),
            packing: Packing::new(ring),
            load_next: Cell::new(u64::MAX),
            changes: Cell::new(0),
            counters: Counters::default(),
        })
    }

    /// Reads the tables that stay in memory as a whole.
    pub(super) async fn load_tables(&self, with_refcounts: bool) -> Result<(), Fault> {
        let (l1_at, l1_len, refs_at, refs_len) = {
            let header = self.header.borrow();
            let clusters = if header.has_reftable() { header.reftable_clusters } else { 0 };
            let refs_len = u64::from(clusters) * self.g.cluster_size();
            (header.l1_offset, u64::from(header.l1_size) * 8, header.reftable_offset, refs_len)
        };
        let entries =
            |bytes: Vec<u8>| (0..bytes.len() / 8).map(|i| get_be64(&bytes, i)).collect::<Vec<u64>>();
        // Whoever checks is told of this, and goes on with what there is.
        if !self.for_check {
            self.must_be_there("its L1 table", l1_at, l1_len)?;
        }
        let l1 = entries(self.read_table(l1_at, l1_len).await?);
        let twice = {
            let mut meta = self.meta.borrow_mut();
            let twice = meta.note_l1(WholeTable::new(&self.g, l1_at, l1));
            twice.filter(|_| !self.for_check && !self.read_only.get())
        };
        if let Some(at) = twice {
            return Err(Fault::Damage(format!("two entries of its L1 table lead to {at:#x}")));
        }
        if !with_refcounts {
            return Ok(());
        }
        if !self.for_check {
            self.must_be_there("its refcount table", refs_at, refs_len)?;
        }
        let refs = entries(self.read_table(refs_at, refs_len).await?);
        let mut blocks = BTreeSet::new();
        let twice = refs.iter().map(|e| e & !0x1ff).filter(|at| *at != 0).find(|at| !blocks.insert(*at));
        if let Some(at) = twice
            && !self.for_check
            && !self.read_only.get()
        {
            return Err(Fault::Damage(format!("two entries of its refcount table lead to {at:#x}")));
        }
        {
            let mut meta = self.meta.borrow_mut();
            meta.refblocks = blocks;
            meta.reftable = WholeTable::new(&self.g, refs_at, refs);
        }
        if !self.for_check && !self.read_only.get() {
            self.note_fixed_tables().await?;
        }
        Ok(())
    }

    /// Where the tables are that no other table leads to.
    pub(super) async fn note_fixed_tables(&self) -> Result<(), Fault> {
        let size = self.g.cluster_size();
        let mut fixed = BTreeMap::from([(0, size)]);
        let mut note = |at: u64, len: u64| {
            if len > 0 {
                let end = at.saturating_add(len).checked_next_multiple_of(size).unwrap_or(u64::MAX);
                let entry = fixed.entry(at).or_insert(end);
                *entry = end.max(*entry);
            }
        };
        let (snapshots, table_bytes) = self.read_snapshots().await?;
        note(self.header.borrow().snapshots_offset, table_bytes);
        for snapshot in &snapshots {
            note(snapshot.l1_offset, u64::from(snapshot.l1_size) * 8);
        }
        if self.header.borrow().autoclear & autoclear::BITMAPS != 0
            && let Some((at, bytes, entries)) = self.bitmap_directory().await?
        {
            note(at, bytes.len() as u64);
            for bitmap in entries {
                note(bitmap.table_offset, u64::from(bitmap.table_entries) * 8);
            }
        }
        self.meta.borrow_mut().fixed = fixed;
        Ok(())
    }

    /// What has to be done before the first write: features that we do not keep up are switched off, and
    /// refcounts that may be off are repaired.
    pub(super) async fn make_writable(&self) -> Result<(), Fault> {
        if self.header.borrow().incompatible & incompatible::DIRTY != 0 {
            tracing::warn!(image = %self.name, "the image was not closed cleanly; its refcounts are repaired");
            self.repair_refcounts().await?;
        }
        self.drop_unknown_features().await
    }

    /// Features that whoever writes an image without knowing them has to switch off: what belongs to them is no longer
    /// kept up from here on, and clusters that only they know of may be freed.
    pub(super) async fn drop_unknown_features(&self) -> Result<(), Fault> {
        if self.header.borrow().autoclear & !autoclear::KNOWN == 0 {
            return Ok(());
        }
        self.header.borrow_mut().autoclear &= autoclear::KNOWN;
        self.write_header().await?;
        self.flush_files().await
    }
}

async fn open_data_file(
    header: &Header,
    files: &dyn OpenFiles,
    name: &Rc<str>,
    read_only: bool,
) -> Result<Rc<Node>, BlockError> {
    let Some(named) = header.text(extension::DATA_FILE) else {
        return Err(refuse(
            name,
            Errno::EINVAL,
            "The image has an external data file and does not say which.",
        ));
    };
    let wanted = Wanted { role: Role::DataFile, name: &named, format: Some("raw"), image: name, read_only };
    files.open(wanted).await
}
