//! What can be told of an image: for `info`, `map`, `snapshot -l` and `check`.

use super::options::{Compat, CompressionType};
use crate::block::Extent;

/// Facts about an open image. Names and meanings are those of `qemu-img info --output=json`
/// (`format-specific` and around it).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// Bytes of the disk (`virtual-size`).
    pub virtual_size: u64,
    /// Bytes of a cluster (`cluster-size`).
    pub cluster_size: u32,
    /// `compat`.
    pub compat: Compat,
    /// `refcount-bits`.
    pub refcount_bits: u32,
    /// `lazy-refcounts`.
    pub lazy_refcounts: bool,
    /// `extended-l2`.
    pub extended_l2: bool,
    /// `compression-type`.
    pub compression_type: CompressionType,
    /// `corrupt`: metadata is known to be broken; only reading and repairing are allowed.
    pub corrupt: bool,
    /// `dirty-flag`: reference counts may be off.
    pub dirty: bool,
    /// `data-file`: the name under which the image finds its external data file.
    pub data_file: Option<String>,
    /// The image has its data in another file, whether or not it names it.
    pub has_data_file: bool,
    /// `data-file-raw`.
    pub data_file_raw: bool,
    /// `backing-filename`, as it is written in the image.
    pub backing_filename: Option<String>,
    /// `backing-filename-format`.
    pub backing_format: Option<String>,
    /// `full-backing-filename`: the name that was opened, or would be.
    pub full_backing_filename: Option<String>,
    /// `snapshots`.
    pub snapshots: Vec<SnapshotInfo>,
    /// `bitmaps`.
    pub bitmaps: Vec<BitmapInfo>,
    /// The metadata of the bitmaps is out of date as a whole (the autoclear bit is off).
    pub bitmaps_inconsistent: bool,
}

/// One internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// `id`.
    pub id: String,
    /// `name`.
    pub name: String,
    /// `vm-state-size`, in bytes.
    pub vm_state_size: u64,
    /// `date-sec`: when it was taken, since the Epoch.
    pub date_sec: u32,
    /// `date-nsec`.
    pub date_nsec: u32,
    /// `vm-clock-sec` and `vm-clock-nsec` in one, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// `icount`, where it was recorded.
    pub icount: Option<u64>,
    /// Bytes of the disk at that time.
    pub disk_size: u64,
}

/// One persistent bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapInfo {
    /// `name`.
    pub name: String,
    /// `granularity`, in bytes.
    pub granularity: u64,
    /// Flag `in-use`: it was not saved, and tells nothing.
    pub in_use: bool,
    /// Flag `auto`: it records.
    pub auto: bool,
}

/// One extent of a chain, for `map`: what is known of it, and where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapExtent {
    /// `length`, `depth`, `zero`, and as `allocated` what is called `data`: the layer that decides stores bytes of it.
    pub extent: Extent,
    /// `present`: some layer of the chain has it (as data or as zeroes).
    pub present: bool,
    /// `compressed`.
    pub compressed: bool,
    /// `offset`: where in the file of that layer, if it is stored as it is.
    pub offset: Option<u64>,
    /// `filename`: the file that holds it, with an offset only.
    pub file: Option<String>,
}

/// What a check found. The fields are those of `qemu-img check --output=json`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// `check-errors`: things that could not be looked at.
    pub check_errors: u64,
    /// `corruptions`: what can make data wrong, after any repair.
    pub corruptions: u64,
    /// `leaks`: clusters that nobody uses and that are not free, after any repair.
    pub leaks: u64,
    /// `corruptions-fixed`.
    pub corruptions_fixed: u64,
    /// `leaks-fixed`.
    pub leaks_fixed: u64,
    /// `image-end-offset`: one past the last cluster in use.
    pub image_end_offset: u64,
    /// `total-clusters` of the disk.
    pub total_clusters: u64,
    /// `allocated-clusters`.
    pub allocated_clusters: u64,
    /// `compressed-clusters`.
    pub compressed_clusters: u64,
    /// `fragmented-clusters`: those that do not follow their predecessor in the file.
    pub fragmented_clusters: u64,
    /// What could not be read, though it may use clusters that seem to have leaked: nothing is freed then.
    pub unread: Option<String>,
    /// What is wrong, a line each, at most [`super::check::MESSAGES_MAX`] of them.
    pub messages: Vec<String>,
}

impl CheckReport {
    /// Nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.check_errors == 0 && self.corruptions == 0 && self.leaks == 0
    }
}

/// What a check may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Repair {
    /// Nothing.
    #[default]
    None,
    /// Clusters that leaked are freed.
    Leaks,
    /// Everything that can be is repaired.
    All,
    /// The same, and snapshots and bitmaps that cannot be read are dropped: what they used is freed.
    DropUnreadable,
}

impl Repair {
    /// Everything that can be is repaired.
    pub fn is_all(self) -> bool {
        matches!(self, Repair::All | Repair::DropUnreadable)
    }
}

/// How large a new image would become (`qemu-img measure`), in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measured {
    /// `required`: with the data that is there now.
    pub required: u64,
    /// `fully-allocated`: with every cluster in use.
    pub fully_allocated: u64,
}
