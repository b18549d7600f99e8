//! The header of an image and its extensions: bytes to meaning, and back.
//!
//! All of it lies in the first cluster: the fixed fields, extensions one after the other, and the name of
//! the backing file wherever the header says. Fields and extensions that are not known here are kept as
//! they are, because the specification asks for that. Of an extension that is there twice the last one counts, and a name
//! ends with its first zero byte, because QEMU reads them so: both must open the same files. What an image must not say
//! (tables beyond QEMU's limits, unaligned offsets, features that nobody here understands) is refused once, here.

use super::geometry::{
    CLUSTER_BITS_MAX, CLUSTER_BITS_MIN, CLUSTER_BITS_SUBCLUSTERS_MIN, Geometry, L1_BYTES_MAX,
    REFTABLE_BYTES_MAX,
};
use super::options::CompressionType;
use crate::base::os_name;

/// "QFI\xfb".
pub const MAGIC: u32 = 0x5146_49fb;
/// Bytes of a version 2 header.
pub const V2_BYTES: usize = 72;
/// Bytes of a version 3 header up to its length field.
pub const V3_BYTES_MIN: usize = 104;
/// Bytes of the header as it is written here: with the type of compression.
pub const V3_BYTES: usize = 112;
/// The most snapshots (QEMU's limit).
pub const SNAPSHOTS_MAX: u32 = 65_536;
/// Longest name of a backing file, in bytes.
pub const BACKING_NAME_BYTES_MAX: u32 = 1023;
/// Longest name of a backing file's format, in bytes.
pub const BACKING_FORMAT_BYTES_MAX: usize = 15;
/// Bytes of the extension for bitmaps.
pub const BITMAPS_BYTES: usize = 24;
/// The most extensions that are looked at.
pub const EXTENSIONS_MAX: usize = 4096;

/// Incompatible features.
pub mod incompatible {
    /// Reference counts may be off.
    pub const DIRTY: u64 = 1;
    /// Metadata is known to be broken.
    pub const CORRUPT: u64 = 1 << 1;
    /// Data lies in another file.
    pub const DATA_FILE: u64 = 1 << 2;
    /// Compressed clusters are not deflated.
    pub const COMPRESSION: u64 = 1 << 3;
    /// L2 entries with subclusters.
    pub const EXTENDED_L2: u64 = 1 << 4;
    /// All that are understood here.
    pub const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
}

/// Compatible features.
pub mod compatible {
    /// Reference counts may be written late.
    pub const LAZY_REFCOUNTS: u64 = 1;
}

/// Autoclear features.
pub mod autoclear {
    /// The bitmaps extension is consistent.
    pub const BITMAPS: u64 = 1;
    /// The data file is a raw image by itself.
    pub const DATA_FILE_RAW: u64 = 1 << 1;
    /// All that are understood here.
    pub const KNOWN: u64 = BITMAPS | DATA_FILE_RAW;
}

/// Types of extensions.
pub mod extension {
    /// End of the list.
    pub const END: u32 = 0;
    /// The format of the backing file.
    pub const BACKING_FORMAT: u32 = 0xe279_2aca;
    /// Names of features.
    pub const FEATURE_NAMES: u32 = 0x6803_f857;
    /// Bitmaps.
    pub const BITMAPS: u32 = 0x2385_2875;
    /// Where the LUKS header lies.
    pub const ENCRYPTION: u32 = 0x0537_be77;
    /// The name of the data file.
    pub const DATA_FILE: u32 = 0x4441_5441;
}

/// Offsets of fields that are changed in place.
pub mod field {
    /// `l1_size` and `l1_table_offset` follow each other.
    pub const L1: usize = 36;
    /// `refcount_table_offset` and `refcount_table_clusters`.
    pub const REFTABLE: usize = 48;
}

/// One extension.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// Its type.
    pub kind: u32,
    /// Its bytes, without padding.
    pub data: Vec<u8>,
}

/// A header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// The name of the backing file.
    pub backing_file: Option<String>,
    /// Where the name lies.
    pub backing_offset: u64,
    /// Bits of an offset within a cluster.
    pub cluster_bits: u32,
    /// Bytes of the disk.
    pub size: u64,
    /// 0: not encrypted.
    pub crypt_method: u32,
    /// Entries of the active L1 table.
    pub l1_size: u32,
    /// Where it lies.
    pub l1_offset: u64,
    /// Where the refcount table lies.
    pub reftable_offset: u64,
    /// Its clusters.
    pub reftable_clusters: u32,
    /// Snapshots.
    pub nb_snapshots: u32,
    /// Where their table lies.
    pub snapshots_offset: u64,
    /// Feature bits.
    pub incompatible: u64,
    /// Feature bits.
    pub compatible: u64,
    /// Feature bits.
    pub autoclear: u64,
    /// Refcounts have `1 << refcount_order` bits.
    pub refcount_order: u32,
    /// Bytes of the fixed part.
    pub header_length: u32,
    /// The type of compression.
    pub compression: CompressionType,
    /// Additional fields beyond those known here.
    pub more: Vec<u8>,
    /// In their order.
    pub extensions: Vec<Extension>,
}

/// Why a header was refused. The text is for a person.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Not this format, or not whole.
    #[error("It is not a qcow2 image: {0}.")]
    NotQcow2(&'static str),
    /// A feature or version that is not understood.
    #[error("{0}")]
    Unsupported(String),
    /// It contradicts itself or goes beyond a limit.
    #[error("The image is damaged or was made to mislead: {0}.")]
    Invalid(String),
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    let mut value = [0; 4];
    if let Some(found) = bytes.get(at..at + 4) {
        value.copy_from_slice(found);
    }
    u32::from_be_bytes(value)
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from(be32(bytes, at)) << 32 | u64::from(be32(bytes, at + 4))
}

fn invalid<T>(why: impl Into<String>) -> Result<T, HeaderError> {
    Err(HeaderError::Invalid(why.into()))
}

/// The length of the first cluster, from the first bytes of an image: what [`Header::parse`] wants to see.
pub fn first_cluster_bytes(head: &[u8]) -> Result<u64, HeaderError> {
    if head.len() < V2_BYTES {
        return Err(HeaderError::NotQcow2("it is shorter than a header"));
    }
    if be32(head, 0) != MAGIC {
        return Err(HeaderError::NotQcow2("its first bytes are not those of the format"));
    }
    let version = be32(head, 4);
    if !(2..=3).contains(&version) {
        return Err(HeaderError::Unsupported(format!(
            "Version {version} of the qcow2 format is not known here: 2 and 3 are."
        )));
    }
    let bits = be32(head, 20);
    if !(CLUSTER_BITS_MIN..=CLUSTER_BITS_MAX).contains(&bits) {
        return Err(HeaderError::Unsupported(format!(
            "Clusters of 2^{bits} bytes are not supported: from 2^{CLUSTER_BITS_MIN} to 2^{CLUSTER_BITS_MAX} are."
        )));
    }
    Ok(1 << bits)
}

impl Header {
    /// Reads a header off the first cluster of an image (less for a shorter file).
    pub fn parse(cluster: &[u8]) -> Result<Header, HeaderError> {
        let header = Header::parse_for_check(cluster)?;
        header.check_repairable()?;
        Ok(header)
    }

    /// The same for those who check and repair: what can be made anew is no reason to refuse.
    pub fn parse_for_check(cluster: &[u8]) -> Result<Header, HeaderError> {
        let cluster_size = first_cluster_bytes(cluster)?;
        let version = be32(cluster, 4);
        let v3 = version >= 3;
        let mut header = Header {
            version,
            backing_file: None,
            backing_offset: be64(cluster, 8),
            cluster_bits: be32(cluster, 20),
            size: be64(cluster, 24),
            crypt_method: be32(cluster, 32),
            l1_size: be32(cluster, 36),
            l1_offset: be64(cluster, 40),
            reftable_offset: be64(cluster, 48),
            reftable_clusters: be32(cluster, 56),
            nb_snapshots: be32(cluster, 60),
            snapshots_offset: be64(cluster, 64),
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            refcount_order: 4,
            header_length: V2_BYTES as u32,
            compression: CompressionType::Zlib,
            more: Vec::new(),
            extensions: Vec::new(),
        };
        if v3 {
            if cluster.len() < V3_BYTES_MIN {
                return Err(HeaderError::NotQcow2("it is shorter than a header"));
            }
            header.incompatible = be64(cluster, 72);
            header.compatible = be64(cluster, 80);
            header.autoclear = be64(cluster, 88);
            header.refcount_order = be32(cluster, 96);
            header.header_length = be32(cluster, 100);
        }
        let length = header.header_length as usize;
        if (v3 && length < V3_BYTES_MIN) || length > cluster.len() || length as u64 > cluster_size {
            return invalid(format!("its header says that it has {length} bytes"));
        }
        header.extensions = parse_extensions(cluster, length, header.backing_offset, cluster_size)?;
        header.check_features(cluster, length)?;
        if length > V3_BYTES {
            header.more = cluster[V3_BYTES..length].to_vec();
        }
        if header.backing_offset != 0 {
            let name = backing_name(cluster, header.backing_offset, cluster_size)?;
            header.backing_file = Some(name).filter(|name| !name.is_empty());
        }
        header.check_extensions()?;
        header.check_tables()?;
        Ok(header)
    }

    fn check_features(&mut self, cluster: &[u8], length: usize) -> Result<(), HeaderError> {
        let unknown = self.incompatible & !incompatible::KNOWN;
        if unknown != 0 {
            let names: Vec<String> = (0..64)
                .filter(|bit| unknown >> bit & 1 == 1)
                .map(|bit| {
                    self.feature_name(0, bit).unwrap_or_else(|| format!("incompatible feature bit {bit}"))
                })
                .collect();
            return Err(HeaderError::Unsupported(format!(
                "The image uses features that are not known here: {}.",
                names.join(", ")
            )));
        }
        match self.crypt_method {
            0 => {}
            1 => {
                return Err(HeaderError::Unsupported(
                    "The image is encrypted (AES), which is not supported.".into(),
                ));
            }
            2 => {
                return Err(HeaderError::Unsupported(
                    "The image is encrypted (LUKS), which is not supported.".into(),
                ));
            }
            other => {
                return Err(HeaderError::Unsupported(format!(
                    "The image is encrypted in a way that is not known here ({other})."
                )));
            }
        }
        let kind = if length > V3_BYTES_MIN { cluster[V3_BYTES_MIN] } else { 0 };
        let flagged = self.incompatible & incompatible::COMPRESSION != 0;
        self.compression = match (kind, flagged) {
            (0, false) => CompressionType::Zlib,
            (1, true) => CompressionType::Zstd,
            (0 | 1, _) => return invalid("its type of compression and the feature bit for it disagree"),
            _ => {
                return Err(HeaderError::Unsupported(format!(
                    "The image's type of compression ({kind}) is not known here."
                )));
            }
        };
        Ok(())
    }

    fn check_tables(&self) -> Result<(), HeaderError> {
        if self.refcount_order > 6 {
            return invalid("its reference counts are wider than 64 bits");
        }
        let g = self.geometry();
        if g.subclusters && self.cluster_bits < CLUSTER_BITS_SUBCLUSTERS_MIN {
            return invalid("its clusters are too small for subclusters");
        }
        let aligned = |offset: u64| offset.is_multiple_of(g.cluster_size()) && offset < 1 << 56;
        if self.size > g.disk_len_max() {
            return invalid(format!("its disk of {} bytes is longer than tables can map", self.size));
        }
        if u64::from(self.l1_size) * 8 > L1_BYTES_MAX {
            return invalid("its L1 table is larger than 32 MiB");
        }
        if u64::from(self.l1_size) < g.l1_entries_for(self.size) {
            return invalid("its L1 table is too small for the disk");
        }
        if self.l1_size > 0 && (!aligned(self.l1_offset) || self.l1_offset == 0) {
            return invalid("its L1 table lies at an impossible place");
        }
        if u64::from(self.reftable_clusters) * g.cluster_size() > REFTABLE_BYTES_MAX.max(g.cluster_size()) {
            return invalid("its table of reference counts is larger than 8 MiB");
        }
        let raw = self.autoclear & autoclear::DATA_FILE_RAW != 0;
        if raw && self.version >= 3 && !self.has_data_file() {
            return invalid("it says that its data file is raw, and has none");
        }
        if raw && self.has_data_file() && self.backing_file.is_some() {
            return invalid("it has both a raw data file and a backing file");
        }
        Ok(())
    }

    /// What keeps an image from being used, and can be repaired.
    fn check_repairable(&self) -> Result<(), HeaderError> {
        if !self.has_reftable() {
            return invalid("it has no table of reference counts; `blockferry check --repair all` makes one");
        }
        if self.nb_snapshots > SNAPSHOTS_MAX {
            return invalid("it has more than 65536 snapshots");
        }
        let is_place = |offset: u64| offset > 0 && offset.is_multiple_of(self.geometry().cluster_size());
        if self.nb_snapshots > 0 && !is_place(self.snapshots_offset) {
            return invalid(
                "its table of snapshots lies at an impossible place; `blockferry check --repair drop-unreadable` drops it",
            );
        }
        Ok(())
    }

    /// It says where the refcounts are.
    pub fn has_reftable(&self) -> bool {
        let is_place = self.reftable_offset.is_multiple_of(self.geometry().cluster_size());
        self.reftable_clusters > 0 && self.reftable_offset > 0 && is_place
    }

    /// The sizes that follow from it.
    pub fn geometry(&self) -> Geometry {
        Geometry {
            cluster_bits: self.cluster_bits,
            refcount_order: self.refcount_order,
            subclusters: self.incompatible & incompatible::EXTENDED_L2 != 0,
        }
    }

    /// Data lies in another file.
    pub fn has_data_file(&self) -> bool {
        self.incompatible & incompatible::DATA_FILE != 0
    }

    /// The data file is a raw image by itself.
    pub fn data_file_raw(&self) -> bool {
        self.has_data_file() && self.autoclear & autoclear::DATA_FILE_RAW != 0
    }

    /// Extensions that contradict what else the header says, or cannot be what they are.
    fn check_extensions(&self) -> Result<(), HeaderError> {
        for Extension { kind, data } in &self.extensions {
            match *kind {
                extension::BACKING_FORMAT if data.len() > BACKING_FORMAT_BYTES_MAX => {
                    return invalid("the name of its backing file's format is longer than 15 bytes");
                }
                extension::BITMAPS if data.len() != BITMAPS_BYTES => {
                    return invalid(format!(
                        "its extension for bitmaps has {} bytes, and not 24",
                        data.len()
                    ));
                }
                extension::BITMAPS if self.autoclear & autoclear::BITMAPS != 0 && data[4..8] != [0; 4] => {
                    return invalid("a reserved field of its extension for bitmaps is not zero");
                }
                extension::ENCRYPTION if self.crypt_method == 0 => {
                    return invalid("it has a header for encryption, and says that it is not encrypted");
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The extension of this type; the last one, if there are several.
    pub fn extension(&self, kind: u32) -> Option<&[u8]> {
        self.extensions.iter().rev().find(|e| e.kind == kind).map(|e| e.data.as_slice())
    }

    /// A string extension. An empty one says as little as none.
    pub fn text(&self, kind: u32) -> Option<String> {
        let data = until_zero(self.extension(kind)?);
        (!data.is_empty()).then(|| os_name::from_bytes(data))
    }

    /// Replaces, adds or takes away an extension. The format of the backing file comes first, so that it
    /// shares a sector with the fields that change together with it.
    pub fn set_extension(&mut self, kind: u32, data: Option<Vec<u8>>) {
        // One that counts is enough.
        let mut left = self.extensions.iter().filter(|e| e.kind == kind).count();
        self.extensions.retain(|e| {
            left -= usize::from(e.kind == kind);
            e.kind != kind || left == 0
        });
        let at = self.extensions.iter().position(|e| e.kind == kind);
        match (at, data) {
            (Some(at), Some(data)) => self.extensions[at].data = data,
            (Some(at), None) => {
                self.extensions.remove(at);
            }
            (None, Some(data)) if kind == extension::BACKING_FORMAT => {
                self.extensions.insert(0, Extension { kind, data });
            }
            (None, Some(data)) => self.extensions.push(Extension { kind, data }),
            (None, None) => {}
        }
    }

    fn feature_name(&self, kind: u8, bit: u8) -> Option<String> {
        let table = self.extension(extension::FEATURE_NAMES)?;
        let entry = table.chunks_exact(48).find(|entry| entry[0] == kind && entry[1] == bit)?;
        let name = entry[2..].split(|&b| b == 0).next()?;
        let name: String =
            String::from_utf8_lossy(name).chars().map(|c| if c.is_control() { '?' } else { c }).collect();
        (!name.is_empty()).then_some(name)
    }

    /// The fixed part as bytes.
    pub fn encode_fixed(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(V3_BYTES);
        let backing_len = self.backing_file.as_ref().map_or(0, |name| os_name::to_bytes(name).len()) as u32;
        let backing_offset = if self.backing_file.is_some() { self.backing_offset } else { 0 };
        out.extend(MAGIC.to_be_bytes());
        out.extend(self.version.to_be_bytes());
        out.extend(backing_offset.to_be_bytes());
        out.extend(backing_len.to_be_bytes());
        out.extend(self.cluster_bits.to_be_bytes());
        out.extend(self.size.to_be_bytes());
        out.extend(self.crypt_method.to_be_bytes());
        out.extend(self.l1_size.to_be_bytes());
        out.extend(self.l1_offset.to_be_bytes());
        out.extend(self.reftable_offset.to_be_bytes());
        out.extend(self.reftable_clusters.to_be_bytes());
        out.extend(self.nb_snapshots.to_be_bytes());
        out.extend(self.snapshots_offset.to_be_bytes());
        if self.version >= 3 {
            out.extend(self.incompatible.to_be_bytes());
            out.extend(self.compatible.to_be_bytes());
            out.extend(self.autoclear.to_be_bytes());
            out.extend(self.refcount_order.to_be_bytes());
            out.extend(self.header_length.to_be_bytes());
            if self.header_length as usize > V3_BYTES_MIN {
                out.push(u8::from(self.compression == CompressionType::Zstd));
                out.resize(V3_BYTES.min(self.header_length as usize), 0);
                out.extend(&self.more);
            }
        }
        out
    }

    /// The fixed part and the extensions, with their end.
    pub fn encode_with_extensions(&self) -> Vec<u8> {
        let mut out = self.encode_fixed();
        for Extension { kind, data } in &self.extensions {
            out.extend(kind.to_be_bytes());
            out.extend((data.len() as u32).to_be_bytes());
            out.extend(data);
            out.resize(out.len().next_multiple_of(8), 0);
        }
        out.extend([0; 8]);
        out
    }
}

fn parse_extensions(
    cluster: &[u8],
    start: usize,
    backing_offset: u64,
    cluster_size: u64,
) -> Result<Vec<Extension>, HeaderError> {
    let end = if backing_offset > 0 { backing_offset.min(cluster_size) } else { cluster_size };
    let end = (end as usize).min(cluster.len());
    let mut found = Vec::new();
    let mut at = start;
    while at + 8 <= end && found.len() < EXTENSIONS_MAX {
        let (kind, len) = (be32(cluster, at), be32(cluster, at + 4) as usize);
        at += 8;
        // The end has no length; one that has is a sign that all of this is something else.
        if len > end - at {
            return invalid(format!("its header extension {kind:#010x} is longer than there is room"));
        }
        if kind == extension::END {
            break;
        }
        found.push(Extension { kind, data: cluster[at..at + len].to_vec() });
        at = (at + len).next_multiple_of(8);
    }
    Ok(found)
}

/// A text as QEMU reads it.
fn until_zero(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

fn backing_name(cluster: &[u8], offset: u64, cluster_size: u64) -> Result<String, HeaderError> {
    let len = be32(cluster, 16);
    let end = offset.checked_add(len.into()).filter(|end| *end <= cluster_size.min(cluster.len() as u64));
    if len > BACKING_NAME_BYTES_MAX {
        return invalid("the name of its backing file is longer than 1023 bytes");
    }
    let Some(end) = end else {
        return invalid("the name of its backing file lies outside the header");
    };
    Ok(os_name::from_bytes(until_zero(&cluster[offset as usize..end as usize])))
}

/// The table of feature names that new images carry.
pub fn feature_names() -> Vec<u8> {
    let all: [(u8, u8, &str); 8] = [
        (0, 0, "dirty bit"),
        (0, 1, "corrupt bit"),
        (0, 2, "external data file"),
        (0, 3, "compression type"),
        (0, 4, "extended L2 entries"),
        (1, 0, "lazy refcounts"),
        (2, 0, "bitmaps"),
        (2, 1, "raw external data"),
    ];
    let mut out = Vec::new();
    for (kind, bit, name) in all {
        let mut entry = vec![kind, bit];
        entry.extend(name.as_bytes());
        entry.resize(48, 0);
        out.extend(entry);
    }
    out
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::base::rng::Rng;

    pub(in crate::format::qcow2) fn sample() -> Header {
        Header {
            version: 3,
            backing_file: Some("base.img".into()),
            backing_offset: 1000,
            cluster_bits: 16,
            size: 1 << 30,
            crypt_method: 0,
            l1_size: 2,
            l1_offset: 0x30000,
            reftable_offset: 0x10000,
            reftable_clusters: 1,
            nb_snapshots: 0,
            snapshots_offset: 0,
            incompatible: incompatible::COMPRESSION,
            compatible: 1,
            autoclear: 0,
            refcount_order: 4,
            header_length: 120,
            compression: CompressionType::Zstd,
            more: vec![1, 2, 3, 4, 5, 6, 7, 8],
            extensions: vec![
                Extension { kind: extension::BACKING_FORMAT, data: b"raw".to_vec() },
                Extension { kind: 0x1234_5678, data: b"unknown".to_vec() },
                Extension { kind: extension::FEATURE_NAMES, data: feature_names() },
            ],
        }
    }

    fn cluster(header: &Header) -> Vec<u8> {
        let mut bytes = header.encode_with_extensions();
        bytes.resize(65_536, 0);
        if let Some(name) = &header.backing_file {
            let at = header.backing_offset as usize;
            bytes[at..at + name.len()].copy_from_slice(name.as_bytes());
        }
        bytes
    }

    #[test]
    fn what_is_written_is_read() {
        let header = sample();
        assert_eq!(Header::parse(&cluster(&header)), Ok(header.clone()));
        let v2 = Header {
            version: 2,
            incompatible: 0,
            compatible: 0,
            header_length: 72,
            compression: CompressionType::Zlib,
            more: vec![],
            ..header
        };
        assert_eq!(Header::parse(&cluster(&v2)), Ok(v2));
    }

    #[test]
    fn unknown_features_are_refused_by_their_name() {
        let mut header = sample();
        header.incompatible |= 1 << 40 | 1 << 41;
        let mut table = feature_names();
        let mut entry = vec![0, 40];
        entry.extend(b"time travel");
        entry.resize(48, 0);
        table.extend(entry);
        header.set_extension(extension::FEATURE_NAMES, Some(table));
        let error = Header::parse(&cluster(&header)).unwrap_err().to_string();
        assert!(error.contains("time travel, incompatible feature bit 41"), "{error}");
        let luks = Header { crypt_method: 2, ..sample() };
        assert!(Header::parse(&cluster(&luks)).unwrap_err().to_string().contains("LUKS"));
    }

    #[test]
    fn impossible_tables_are_refused() {
        type Change = fn(&mut Header);
        let changes: [Change; 14] = [
            |h| h.cluster_bits = 8,
            |h| h.cluster_bits = 22,
            |h| h.version = 4,
            |h| h.refcount_order = 7,
            |h| h.l1_size = 1,
            |h| h.l1_size = u32::MAX,
            |h| h.l1_offset = 0x30001,
            |h| h.reftable_offset = 0,
            |h| h.reftable_clusters = 129,
            |h| h.nb_snapshots = 65_537,
            |h| h.size = u64::MAX,
            |h| h.header_length = 103,
            |h| h.backing_offset = 65_530,
            |h| h.incompatible = 0,
        ];
        for (number, change) in changes.into_iter().enumerate() {
            let mut header = sample();
            let mut bytes = cluster(&header);
            change(&mut header);
            let fixed = header.encode_fixed();
            bytes[..fixed.len()].copy_from_slice(&fixed);
            assert!(Header::parse(&bytes).is_err(), "change {number}");
        }
    }

    #[test]
    fn no_bytes_make_it_crash() {
        let mut rng = Rng::new(1);
        let good = cluster(&sample());
        for _ in 0..20_000 {
            let mut bytes = good.clone();
            for _ in 0..1 + rng.below(4) {
                let at = rng.below(700) as usize;
                bytes[at] = rng.next_u64() as u8;
            }
            bytes.truncate(if rng.chance(60_000) { 65_536 } else { rng.below(1200) as usize });
            let _ = Header::parse(&bytes);
        }
    }
}
