//! The images of a story: how each is stored, what it shows, and how both programs make one.

use blockferry::engine::Format;

use super::view::View;
use common::image::Dice;

/// A format, and how it is laid out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Layout {
    /// The bytes themselves.
    Raw,
    /// With these options of `create -o`.
    Qcow2(Options),
}

/// Options of a qcow2 image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Version 3.
    pub v3: bool,
    /// Bytes.
    pub cluster_size: u64,
    /// With subclusters.
    pub extended_l2: bool,
    /// Bits of a reference count.
    pub refcount_bits: u32,
    /// Reference counts may lag behind.
    pub lazy_refcounts: bool,
    /// Compressed clusters are of zstd.
    pub zstd: bool,
    /// The guest's bytes lie in a file of their own: its name, and whether it is a raw image by itself.
    pub data_file: Option<(String, bool)>,
    /// Tables are made at once.
    pub preallocated: bool,
}

/// One image.
#[derive(Clone, Debug)]
pub struct Image {
    /// Its file, in the folder of the story.
    pub name: String,
    /// How it is stored.
    pub layout: Layout,
    /// What it shows.
    pub view: View,
    /// Its snapshots: the name, and what each shows; `None` where what lies below has changed since.
    pub snapshots: Vec<(String, Option<View>)>,
}

impl Layout {
    /// Any layout. `backed`: the image is to have a backing file.
    pub fn any(dice: &mut Dice, len: u64, backed: bool, data_file: &str) -> Layout {
        if !backed && dice.below(3) == 0 {
            return Layout::Raw;
        }
        let v3 = dice.below(4) != 0;
        // A disk of gigabytes in clusters of 512 bytes is mostly tables: minutes for nothing that small ones don't show.
        let least_bits = if len > 64 << 20 { 15 } else { 9 };
        let cluster_size = 1 << (least_bits + dice.below(22 - least_bits));
        let wants_data = v3 && dice.below(6) == 0;
        let raw = !backed && dice.below(2) == 0;
        Layout::Qcow2(Options {
            v3,
            cluster_size,
            extended_l2: v3 && cluster_size >= 16 << 10 && dice.below(2) == 0,
            refcount_bits: if v3 { 1 << dice.below(7) } else { 16 },
            lazy_refcounts: v3 && dice.below(4) == 0,
            zstd: v3 && dice.below(3) == 0,
            data_file: wants_data.then(|| (data_file.to_owned(), raw)),
            preallocated: !backed && len <= 64 << 20 && dice.below(8) == 0,
        })
    }

    /// The name of the format.
    pub fn format(&self) -> &'static str {
        match self {
            Layout::Raw => "raw",
            Layout::Qcow2(_) => "qcow2",
        }
    }

    /// Its format, as our library names it.
    pub fn of_ours(&self) -> Format {
        match self {
            Layout::Raw => Format::Raw,
            Layout::Qcow2(_) => Format::Qcow2,
        }
    }

    /// What becomes of a length: qcow2 disks are of whole sectors.
    pub fn whole(&self, len: u64) -> u64 {
        match self {
            Layout::Raw => len,
            Layout::Qcow2(_) => len.next_multiple_of(512),
        }
    }

    /// The options, if it is qcow2.
    pub fn options(&self) -> Option<&Options> {
        match self {
            Layout::Raw => None,
            Layout::Qcow2(options) => Some(options),
        }
    }

    /// What `-o` takes.
    pub fn arguments(&self) -> Vec<String> {
        let Layout::Qcow2(o) = self else { return Vec::new() };
        let mut list = vec![
            format!("compat={}", if o.v3 { "1.1" } else { "0.10" }),
            format!("cluster_size={}", o.cluster_size),
            format!("refcount_bits={}", o.refcount_bits),
        ];
        let mut add = |wanted: bool, text: &str| wanted.then(|| list.push(text.to_owned()));
        add(o.extended_l2, "extended_l2=on");
        add(o.lazy_refcounts, "lazy_refcounts=on");
        add(o.zstd, "compression_type=zstd");
        add(o.preallocated, "preallocation=metadata");
        if let Some((name, raw)) = &o.data_file {
            list.push(format!("data_file={name}"));
            list.push(format!("data_file_raw={}", if *raw { "on" } else { "off" }));
        }
        vec!["-o".to_owned(), list.join(",")]
    }
}

impl Image {
    /// Whether it can take a snapshot (and give it back: every cluster is counted three times then).
    pub fn takes_snapshots(&self) -> bool {
        self.layout.options().is_some_and(|o| o.refcount_bits >= 8 && o.data_file.is_none())
    }

    /// What lies below it is another thing now: snapshots show something that nobody has noted.
    pub fn below_has_changed(&mut self) {
        self.snapshots.iter_mut().for_each(|(_, view)| *view = None);
    }

    /// The files that it is made of.
    pub fn files(&self) -> Vec<String> {
        let data = self.layout.options().and_then(|o| o.data_file.as_ref());
        let mut files = vec![self.name.clone()];
        files.extend(data.map(|(name, _)| name.clone()));
        files
    }
}

/// Any length of a disk: odd ones, small ones, and now and then a large one.
pub fn any_len(dice: &mut Dice, large: bool) -> u64 {
    const MIB: u64 = 1 << 20;
    if large {
        return (4 << 30) - dice.below(3) * 512;
    }
    match dice.below(6) {
        0 => 1 + dice.below(1024),
        1 => (1 + dice.below(16)) * 512,
        2 => (1 + dice.below(128)) * 65_536 + dice.below(3),
        3 => 1 + dice.below(MIB),
        // As many small ones as large ones: each shows something else.
        _ => {
            let most = (8 * MIB) >> dice.below(10);
            1 + dice.below(most)
        }
    }
}
