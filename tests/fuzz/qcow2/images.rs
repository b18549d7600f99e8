//! The images that breeding starts from, and where in them each kind of table lies.

use std::rc::Rc;

use blockferry::base::rng::Rng;
use blockferry::block::{Driver, Node, Permissions, WriteFlags, ZeroFlags};
use blockferry::format::qcow2::entry::{OFFSET_MASK, get_be64, set_be64};
use blockferry::format::qcow2::header::{Header, autoclear, extension};
use blockferry::format::qcow2::{Backing, Compat, CreateOptions, OpenOptions, Qcow2, Repair};
use blockferry::protocol::open::{Cache, OpenOptions as FileOptions};
use blockferry_ring::sim::{FileModel, World, WorldConfig};
use blockferry_ring::{Config, Ring};

/// Where the image is in its world.
pub const DISK: &str = "/disk";

/// What a target patches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The header and its extensions.
    Header,
    /// L1, L2 and refcount tables.
    Tables,
    /// The directory of bitmaps and their tables.
    Bitmaps,
    /// The table of snapshots and their L1 tables.
    Snapshots,
}

impl Kind {
    /// Each target.
    pub const ALL: [Kind; 4] = [Kind::Header, Kind::Tables, Kind::Bitmaps, Kind::Snapshots];
}

/// An image as bytes, and where its tables are (from, to).
#[derive(Clone, Debug)]
pub struct Image {
    pub bytes: Vec<u8>,
    pub cluster_size: u64,
    tables: Vec<(u64, u64)>,
    bitmaps: Vec<(u64, u64)>,
    snapshots: Vec<(u64, u64)>,
}

impl Image {
    /// Where this kind is to be patched; nothing if there is none of it.
    pub fn places(&self, kind: Kind) -> Vec<(u64, u64)> {
        let with = |more: &[(u64, u64)], header: (u64, u64)| {
            let mut all = more.to_vec();
            if !all.is_empty() {
                all.push(header);
            }
            all
        };
        match kind {
            // The fixed part more often than what follows.
            Kind::Header => vec![(0, 112), (0, 112), (104, self.cluster_size.min(1024))],
            Kind::Tables => self.tables.clone(),
            Kind::Bitmaps => with(&self.bitmaps, (104, 200)),
            Kind::Snapshots => with(&self.snapshots, (60, 72)),
        }
    }

    fn of(bytes: Vec<u8>) -> Image {
        let header = Header::parse(&bytes).expect("a header that was written here");
        let size = header.geometry().cluster_size();
        let entries = |at: u64, n: u64| (0..n).map(move |i| (at + i * 8) as usize);
        let word = |at: usize| get_be64(&bytes[at..at + 8], 0);
        let led_to = |at: u64, n: u64| {
            entries(at, n)
                .map(word)
                .map(|entry| entry & OFFSET_MASK)
                .filter(|at| *at != 0)
                .map(|at| (at, at + size))
        };
        let (l1, reftable) = ((header.l1_offset, u64::from(header.l1_size)), header.reftable_offset);
        let mut tables = vec![(l1.0, l1.0 + l1.1 * 8), (reftable, reftable + 64)];
        tables.extend(led_to(l1.0, l1.1).chain(led_to(reftable, 8)));
        let mut snapshots = Vec::new();
        if header.nb_snapshots > 0 {
            snapshots.push((header.snapshots_offset, header.snapshots_offset + 200));
            let l1_of_it = word(header.snapshots_offset as usize);
            snapshots.push((l1_of_it, l1_of_it + l1.1 * 8));
        }
        let mut bitmaps = Vec::new();
        if let Some(data) = header.extension(extension::BITMAPS) {
            let directory = get_be64(data, 2);
            bitmaps.push((directory, directory + 80));
            let table = word(directory as usize);
            bitmaps.push((table, table + 32));
        }
        Image { bytes, cluster_size: size, tables, bitmaps, snapshots }
    }
}

/// A ring in a world.
pub fn new_ring(world: &World) -> Ring {
    let config = Config { arena_bytes: 4 << 20, ..Config::default() };
    Ring::with_backend(world.backend(), &config).expect("a simulated ring")
}

/// The file that the image is in.
pub fn file(ring: &Ring, read_only: bool) -> Rc<Node> {
    let options = FileOptions { read_only, cache: Cache::Direct, lock: true, ..FileOptions::default() };
    Node::of(ring, blockferry::protocol::open::open(ring, DISK.as_ref(), &options).expect("the file opens"))
}

async fn open(ring: &Ring, for_check: bool) -> Rc<Qcow2> {
    let options =
        OpenOptions { read_only: false, backing: Backing::None, for_check, data_file: None, snapshot: None };
    Qcow2::open(ring, &file(ring, false), &super::NoFiles(ring.clone()), options).await.expect("it opens")
}

/// Writes all kinds of clusters, with a snapshot in between if there is to be one.
async fn fill(ring: &Ring, image: &Qcow2, seed: u64, snapshot: bool) {
    let mut rng = Rng::new(seed);
    let (len, cluster) = (image.len(), u64::from(image.info().await.expect("facts").cluster_size));
    for step in 0..24 {
        let at = rng.below(len - 512) & !511;
        let n = (1 + rng.below(3 * cluster)).min(len - at);
        match rng.below(6) {
            0 => {
                image
                    .write_zeroes(at, n, ZeroFlags { may_unmap: step % 2 == 0, ..ZeroFlags::default() })
                    .await
            }
            1 => image.discard(at, n).await,
            2 => {
                let at = at - at % cluster;
                let buf = ring.alloc(cluster.min(len - at) as usize).await;
                // Only where there is nothing yet.
                image.write_compressed(at, buf.freeze()).await.or(Ok(()))
            }
            _ => {
                let mut buf = ring.alloc(n as usize).await;
                buf.as_mut_slice().fill(step + 1);
                image.write(at, buf.freeze(), WriteFlags::default()).await
            }
        }
        .expect("a change");
        if snapshot && step % 9 == 8 {
            image.snapshot_create(&format!("s{step}"), (1, 2)).await.expect("a snapshot");
        }
    }
    image.flush().await.expect("a flush");
}

/// Puts two bitmaps behind the end; their refcounts are made by a repair.
fn add_bitmaps(bytes: &mut Vec<u8>, cluster: usize) {
    let mut header = Header::parse(bytes).expect("a header");
    let at = bytes.len().next_multiple_of(cluster);
    bytes.resize(at + 4 * cluster, 0);
    let (directory, table, data) = (at, at + cluster, at + 2 * cluster);
    let mut out = Vec::new();
    for (number, name) in ["bitmap one", "b2"].into_iter().enumerate() {
        out.extend((if number == 0 { table as u64 } else { (at + 3 * cluster) as u64 }).to_be_bytes());
        out.extend(1u32.to_be_bytes());
        out.extend(2u32.to_be_bytes());
        out.extend([1, 16]);
        out.extend((name.len() as u16).to_be_bytes());
        out.extend(0u32.to_be_bytes());
        out.extend(name.as_bytes());
        out.resize(out.len().next_multiple_of(8), 0);
    }
    bytes[directory..directory + out.len()].copy_from_slice(&out);
    set_be64(&mut bytes[table..table + 8], 0, data as u64);
    bytes[data..data + 8].fill(0x5a);
    let mut told = vec![0; 24];
    set_be64(&mut told, 0, 2 << 32);
    set_be64(&mut told, 1, out.len() as u64);
    set_be64(&mut told, 2, directory as u64);
    header.set_extension(extension::FEATURE_NAMES, None);
    header.set_extension(extension::BITMAPS, Some(told));
    header.autoclear |= autoclear::BITMAPS;
    let head = header.encode_with_extensions();
    bytes[..cluster].fill(0);
    bytes[..head.len()].copy_from_slice(&head);
}

fn make(seed: u64, create: &CreateOptions, snapshots: bool, bitmaps: bool) -> Image {
    let world = World::new(WorldConfig::new(seed));
    world.add_file(DISK, FileModel::regular(0));
    let ring = new_ring(&world);
    let (r, c) = (ring.clone(), create.clone());
    ring.block_on(async move {
        Qcow2::create(&r, &file(&r, false), None, &c).await.expect("a new image");
        let image = open(&r, false).await;
        fill(&r, &image, seed, snapshots).await;
        image.set_permissions(Permissions::NONE).expect("unlocking");
    });
    let bytes_now = |world: &World| {
        let len = world.len(DISK).expect("it is there") as usize;
        let mut bytes = world.read_live(DISK, 0, len);
        let used = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |at| at + 1);
        bytes.truncate(used.next_multiple_of(create.cluster_size as usize));
        bytes
    };
    let mut bytes = bytes_now(&world);
    if bitmaps {
        add_bitmaps(&mut bytes, create.cluster_size as usize);
    }
    let world = World::new(WorldConfig::new(seed));
    world.add_file(DISK, FileModel::regular(bytes.len() as u64));
    world.write_raw(DISK, 0, &bytes);
    let ring = new_ring(&world);
    let r = ring.clone();
    ring.block_on(async move {
        let image = open(&r, true).await;
        let report = image.check(Repair::All).await.expect("a check");
        assert!(report.is_clean() && (bitmaps || report.corruptions_fixed == 0), "{report:?}");
        let facts = image.info().await.expect("facts");
        assert_eq!((facts.bitmaps.len(), !facts.snapshots.is_empty()), (usize::from(bitmaps) * 2, snapshots));
    });
    Image::of(bytes_now(&world))
}

/// Images of every kind, small, and all of them whole.
pub fn corpus() -> Vec<Image> {
    let of = |size: u64, cluster_size: u32| CreateOptions { size, cluster_size, ..CreateOptions::default() };
    let all = [
        (of(40 << 10, 512), false, false),
        (of(80 << 10, 512), true, false),
        (CreateOptions { refcount_bits: 64, ..of(160 << 10, 4096) }, true, true),
        (CreateOptions { refcount_bits: 1, ..of(160 << 10, 4096) }, false, false),
        (CreateOptions { compat: Compat::V2, ..of(120 << 10, 4096) }, true, false),
        (CreateOptions { extended_l2: true, ..of(300 << 10, 16_384) }, true, false),
        (of(160 << 10, 4096), false, true),
        (CreateOptions { refcount_bits: 8, ..of(400 << 10, 65_536) }, false, true),
        (
            CreateOptions {
                backing_file: Some("base".into()),
                backing_fmt: Some("raw".into()),
                ..of(200 << 10, 4096)
            },
            true,
            false,
        ),
    ];
    let made = all.iter().enumerate();
    made.map(|(seed, (create, snapshots, bitmaps))| make(seed as u64 + 1, create, *snapshots, *bitmaps))
        .collect()
}
