//! What a new image is to be like: the options of `qemu-img create -f qcow2 -o`, by the same names.

use blockferry_ring::Errno;

use super::geometry::{CLUSTER_BITS_MAX, CLUSTER_BITS_MIN, CLUSTER_BITS_SUBCLUSTERS_MIN};
use crate::base::nearest::nearest;
use crate::base::os_name;
use crate::base::units::parse_size;
use crate::block::{BlockError, Operation};

/// The version of the format (`compat`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Compat {
    /// `0.10`: version 2, readable by QEMU before 1.1.
    V2,
    /// `1.1`: version 3.
    #[default]
    V3,
}

impl Compat {
    /// The name that `qemu-img` uses.
    pub fn name(self) -> &'static str {
        match self {
            Compat::V2 => "0.10",
            Compat::V3 => "1.1",
        }
    }
}

/// How compressed clusters are compressed (`compression_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum CompressionType {
    /// Raw deflate with a window of 4 KiB.
    #[default]
    Zlib,
    /// Zstandard.
    Zstd,
}

impl CompressionType {
    /// The name that `qemu-img` uses.
    pub fn name(self) -> &'static str {
        match self {
            CompressionType::Zlib => "zlib",
            CompressionType::Zstd => "zstd",
        }
    }
}

/// What is allocated when the image is made (`preallocation`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// All clusters are mapped; their data takes no room yet.
    Metadata,
    /// The same, and room is set aside for the data.
    Falloc,
    /// The same, and zeroes are written out.
    Full,
}

impl Preallocation {
    /// The name that `qemu-img` uses.
    pub fn name(self) -> &'static str {
        match self {
            Preallocation::Off => "off",
            Preallocation::Metadata => "metadata",
            Preallocation::Falloc => "falloc",
            Preallocation::Full => "full",
        }
    }
}

/// What a new image is to be like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Bytes of the disk (`size`); rounded up to whole sectors of 512 bytes.
    pub size: u64,
    /// Bytes of a cluster (`cluster_size`): a power of two from 512 to 2 MiB.
    pub cluster_size: u32,
    /// Version of the format (`compat`).
    pub compat: Compat,
    /// Bits of a reference count (`refcount_bits`): a power of two from 1 to 64.
    pub refcount_bits: u32,
    /// Reference counts may be written late (`lazy_refcounts`).
    pub lazy_refcounts: bool,
    /// Clusters have 32 subclusters (`extended_l2`).
    pub extended_l2: bool,
    /// `compression_type`.
    pub compression_type: CompressionType,
    /// `preallocation`.
    pub preallocation: Preallocation,
    /// The name under which the image finds its external data file (`data_file`).
    pub data_file: Option<String>,
    /// The data file is a raw image by itself (`data_file_raw`).
    pub data_file_raw: bool,
    /// The name of the backing file, as it is written into the image (`backing_file`).
    pub backing_file: Option<String>,
    /// The format of the backing file, as it is written into the image (`backing_fmt`).
    pub backing_fmt: Option<String>,
    /// The filesystem is not to copy the blocks of the file when they are written (`nocow`).
    pub nocow: bool,
}

impl Default for CreateOptions {
    fn default() -> CreateOptions {
        CreateOptions {
            size: 0,
            cluster_size: 64 << 10,
            compat: Compat::V3,
            refcount_bits: 16,
            lazy_refcounts: false,
            extended_l2: false,
            compression_type: CompressionType::Zlib,
            preallocation: Preallocation::Off,
            data_file: None,
            data_file_raw: false,
            backing_file: None,
            backing_fmt: None,
            nocow: false,
        }
    }
}

/// A switch, by the words that QEMU takes.
pub fn on_off(value: &str) -> Result<bool, String> {
    match value {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => Err(format!("'{value}' is neither 'on' nor 'off'")),
    }
}

/// A hint for filesystems that is read and not passed on: files are written in large pieces as it is.
pub fn extent_size_hint(value: &str) -> Result<(), String> {
    match parse_size(value) {
        Ok(bytes) if bytes <= u64::from(u32::MAX) => Ok(()),
        Ok(bytes) => Err(format!("An extent size hint is smaller than 4 GiB, and not {bytes} bytes")),
        Err(error) => Err(error.to_string()),
    }
}

impl CreateOptions {
    /// The options that [`CreateOptions::set`] knows, with what they mean.
    pub const NAMES: [(&'static str, &'static str); 14] = [
        ("backing_file", "File name of a base image"),
        ("backing_fmt", "Image format of the base image"),
        ("cluster_size", "qcow2 cluster size"),
        ("compat", "Compatibility level (v2 [0.10] or v3 [1.1])"),
        ("compression_type", "Compression method used for image cluster compression (zlib, zstd)"),
        ("data_file", "File name of an external data file"),
        ("data_file_raw", "The external data file must stay valid as a raw image"),
        ("extended_l2", "Extended L2 tables"),
        ("extent_size_hint", "Extent size hint for the image file, 0 to disable (read, and not needed)"),
        ("lazy_refcounts", "Postpone refcount updates"),
        ("nocow", "Turn off copy-on-write of the filesystem (Btrfs)"),
        ("preallocation", "Preallocation mode (allowed values: off, metadata, falloc, full)"),
        ("refcount_bits", "Width of a reference count entry in bits"),
        ("size", "Virtual disk size"),
    ];

    /// Sets one option as `-o NAME=VALUE` does. The error says what is wrong with it.
    pub fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        let number = |value: &str| {
            // As C reads numbers.
            let parsed = match value.strip_prefix("0x").or_else(|| value.strip_prefix("0X")) {
                Some(hex) => u32::from_str_radix(hex, 16),
                None if value.len() > 1 && value.starts_with('0') => u32::from_str_radix(value, 8),
                None => value.parse(),
            };
            parsed.map_err(|_| format!("'{value}' is not a number"))
        };
        match name {
            "size" => self.size = parse_size(value).map_err(|error| error.to_string())?,
            "cluster_size" => {
                let bytes = parse_size(value).map_err(|error| error.to_string())?;
                self.cluster_size = u32::try_from(bytes).map_err(|_| cluster_size_refused(bytes))?;
            }
            "compat" => {
                self.compat = match value {
                    "0.10" | "v2" => Compat::V2,
                    "1.1" | "v3" => Compat::V3,
                    _ => return Err(format!("Invalid compatibility level: '{value}'")),
                }
            }
            "refcount_bits" => self.refcount_bits = number(value)?,
            "lazy_refcounts" => self.lazy_refcounts = on_off(value)?,
            "extended_l2" => self.extended_l2 = on_off(value)?,
            "compression_type" => {
                self.compression_type = match value {
                    "zlib" => CompressionType::Zlib,
                    "zstd" => CompressionType::Zstd,
                    _ => return Err(format!("'{value}' is no compression type: 'zlib' and 'zstd' are")),
                }
            }
            "preallocation" => {
                let all =
                    [Preallocation::Off, Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full];
                self.preallocation = all.into_iter().find(|mode| mode.name() == value).ok_or_else(|| {
                    format!("'{value}' is no preallocation mode: off, metadata, falloc and full are")
                })?;
            }
            "data_file" => self.data_file = Some(value.to_owned()),
            "data_file_raw" => self.data_file_raw = on_off(value)?,
            "backing_file" => self.backing_file = Some(value.to_owned()),
            "backing_fmt" => self.backing_fmt = Some(value.to_owned()),
            "nocow" => self.nocow = on_off(value)?,
            "extent_size_hint" => extent_size_hint(value)?,
            _ => {
                let known = nearest(name, CreateOptions::NAMES.iter().map(|(name, _)| *name));
                let meant = known.map_or_else(String::new, |known| format!(": is {known} meant?"));
                return Err(format!("Unknown option '{name}' of the format qcow2{meant}"));
            }
        }
        Ok(())
    }

    /// Whether the options go together. `EINVAL`, with the reason as the hint.
    pub fn check(&self, image: &str) -> Result<(), BlockError> {
        match self.refusal() {
            Some(why) => Err(BlockError::new(Operation::Create, image, Errno::EINVAL).hint(why)),
            None => Ok(()),
        }
    }

    fn refusal(&self) -> Option<String> {
        let v2 = self.compat == Compat::V2;
        let bits = self.cluster_size.trailing_zeros();
        if !self.cluster_size.is_power_of_two() || !(CLUSTER_BITS_MIN..=CLUSTER_BITS_MAX).contains(&bits) {
            return Some(cluster_size_refused(self.cluster_size.into()));
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return Some("Refcount width must be a power of two and may not exceed 64 bits".into());
        }
        let needs_v3 = [
            (self.refcount_bits != 16, "Different refcount widths than 16 bits"),
            (self.lazy_refcounts, "Lazy refcounts"),
            (self.extended_l2, "Extended L2 entries"),
            (self.compression_type != CompressionType::Zlib, "Other compression types than zlib"),
            (self.data_file.is_some(), "External data files"),
        ];
        if let Some((_, what)) = needs_v3.iter().find(|(asked, _)| v2 && *asked) {
            return Some(format!("{what} need compatibility level 1.1 or above (compat=1.1)"));
        }
        if self.extended_l2 && bits < CLUSTER_BITS_SUBCLUSTERS_MIN {
            return Some("Extended L2 entries need clusters of at least 16 KiB".into());
        }
        if self.data_file_raw && self.data_file.is_none() {
            return Some("The option 'data_file_raw' needs 'data_file'".into());
        }
        if self.data_file_raw && self.backing_file.is_some() {
            return Some("A backing file and 'data_file_raw' do not go together".into());
        }
        if self.backing_fmt.is_some() && self.backing_file.is_none() {
            return Some("A backing format needs a backing file".into());
        }
        if self.backing_file.as_ref().is_some_and(|name| os_name::to_bytes(name).len() > 1023) {
            return Some("The name of the backing file is longer than 1023 bytes".into());
        }
        if self.backing_file.is_some() && self.preallocation != Preallocation::Off && !self.extended_l2 {
            return Some(
                "Backing file and preallocation can only be used at the same time if extended_l2 is enabled"
                    .into(),
            );
        }
        None
    }
}

fn cluster_size_refused(bytes: u64) -> String {
    format!("Cluster size must be a power of two between 512 and 2048k, and not {bytes}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_set_by_name() {
        let mut options = CreateOptions::default();
        for (name, value) in [
            ("size", "1G"),
            ("cluster_size", "2M"),
            ("compat", "v3"),
            ("refcount_bits", "1"),
            ("lazy_refcounts", "on"),
            ("extended_l2", "off"),
            ("compression_type", "zstd"),
            ("preallocation", "falloc"),
            ("data_file", "d.raw"),
            ("data_file_raw", "on"),
        ] {
            assert!(CreateOptions::NAMES.iter().any(|(known, _)| *known == name));
            options.set(name, value).unwrap();
        }
        options.check("a").unwrap();
        assert_eq!((options.size, options.cluster_size, options.refcount_bits), (1 << 30, 2 << 20, 1));
        assert!(options.set("cluster_sise", "1").is_err() && options.set("compat", "3").is_err());
    }

    #[test]
    fn what_does_not_go_together_is_refused() {
        let refused = |pairs: &[(&str, &str)]| {
            let mut options = CreateOptions::default();
            pairs.iter().for_each(|(name, value)| options.set(name, value).unwrap());
            options.check("a").is_err()
        };
        assert!(!refused(&[]) && !refused(&[("compat", "0.10")]) && !refused(&[("cluster_size", "512")]));
        assert!(refused(&[("cluster_size", "256")]) && refused(&[("cluster_size", "4M")]));
        assert!(refused(&[("cluster_size", "65535")]) && refused(&[("refcount_bits", "3")]));
        assert!(refused(&[("refcount_bits", "128")]) && refused(&[("refcount_bits", "0")]));
        for pair in [
            ("refcount_bits", "8"),
            ("lazy_refcounts", "on"),
            ("extended_l2", "on"),
            ("compression_type", "zstd"),
        ] {
            assert!(refused(&[("compat", "0.10"), pair]) && !refused(&[pair]), "{pair:?}");
        }
        assert!(refused(&[("extended_l2", "on"), ("cluster_size", "8k")]));
        assert!(refused(&[("data_file_raw", "on")]) && refused(&[("backing_fmt", "raw")]));
        assert!(refused(&[("backing_file", "b"), ("preallocation", "full")]));
    }
}
