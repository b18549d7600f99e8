//! Which format an image has: what the user says, or what its header says, and never a guess for an
//! image that will be written. See docs/decisions/0001-format-probing.md.
//!
//! A raw image has no header: its first bytes are the guest's. A guest that writes another format's
//! header there must not, at the next start, have its disk opened as that format (whose backing file
//! could be any file of this machine). So an image that will be written is raw only when that is said.

use std::path::Path;

use blockferry_ring::Errno;

use crate::block::{BlockError, Operation};

/// Bytes from the start of an image that [`probe`] wants to see. Fewer are fine for a shorter image.
pub const HEAD_BYTES: usize = 512;

/// A format that can be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The guest's bytes as they are.
    Raw,
    /// qcow2, versions 2 and 3.
    Qcow2,
}

impl Format {
    /// The format of this name; names are QEMU's.
    pub fn parse(name: &str) -> Option<Format> {
        match name {
            "raw" => Some(Format::Raw),
            "qcow2" => Some(Format::Qcow2),
            _ => None,
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        }
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// What the first bytes look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probed {
    /// No header that is known here: the bytes of a guest, or nothing yet.
    Raw,
    /// qcow2 of any version, those that nobody here knows included: opening it says whether it can be read.
    Qcow2,
    /// The first qcow format.
    Qcow1,
    /// VMware: a sparse extent, or a description in text.
    Vmdk,
    /// VirtualBox.
    Vdi,
    /// Hyper-V.
    Vhdx,
    /// Virtual PC (a dynamic disk; a fixed one has only a footer).
    Vpc,
    /// QEMU enhanced disk.
    Qed,
    /// Parallels.
    Parallels,
    /// An encrypted volume.
    Luks,
}

impl Probed {
    /// The name that QEMU uses.
    pub fn name(self) -> &'static str {
        match self {
            Probed::Raw => "raw",
            Probed::Qcow2 => "qcow2",
            Probed::Qcow1 => "qcow",
            Probed::Vmdk => "vmdk",
            Probed::Vdi => "vdi",
            Probed::Vhdx => "vhdx",
            Probed::Vpc => "vpc",
            Probed::Qed => "qed",
            Probed::Parallels => "parallels",
            Probed::Luks => "luks",
        }
    }

    /// The format with which such an image is opened.
    pub fn format(self) -> Option<Format> {
        Format::parse(self.name())
    }
}

/// The format that people take a file of this name for. Endings that images of several formats have (`.img`) tell nothing.
pub fn named_as(path: &Path) -> Option<Probed> {
    let suffix = path.extension()?.to_str()?.to_ascii_lowercase();
    Some(match suffix.as_str() {
        "raw" => Probed::Raw,
        "qcow2" => Probed::Qcow2,
        "qcow" => Probed::Qcow1,
        "vmdk" => Probed::Vmdk,
        "vdi" => Probed::Vdi,
        "vhdx" => Probed::Vhdx,
        "vhd" | "vpc" => Probed::Vpc,
        "qed" => Probed::Qed,
        "parallels" => Probed::Parallels,
        "luks" => Probed::Luks,
        _ => return None,
    })
}

/// Looks at the first bytes of an image (up to [`HEAD_BYTES`]) and at nothing else.
pub fn probe(head: &[u8]) -> Probed {
    let has = |at: usize, magic: &[u8]| head.get(at..).is_some_and(|rest| rest.starts_with(magic));
    if has(0, b"QFI\xfb\0\0\0\x01") {
        Probed::Qcow1
    } else if has(0, b"QFI\xfb") && head.len() >= 8 {
        // A version that is not known is no guest's disk: its container would be copied for it.
        Probed::Qcow2
    } else if has(0, b"KDMV") || has(0, b"COWD") || has(0, b"# Disk DescriptorFile") {
        Probed::Vmdk
    } else if has(64, b"\x7f\x10\xda\xbe") {
        Probed::Vdi
    } else if has(0, b"vhdxfile") {
        Probed::Vhdx
    } else if has(0, b"conectix") {
        Probed::Vpc
    } else if has(0, b"QED\0") {
        Probed::Qed
    } else if has(0, b"WithoutFreeSpace") || has(0, b"WithouFreSpacExt") {
        Probed::Parallels
    } else if has(0, b"LUKS\xba\xbe") {
        Probed::Luks
    } else {
        Probed::Raw
    }
}

/// Why an image cannot be opened with any format.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// The user's word is no format.
    #[error("'{name}' is not a format that Blockferry knows; it knows: raw, qcow2.")]
    Unknown {
        /// What the user said.
        name: String,
    },
    /// The header is one of a format that cannot be opened.
    #[error(
        "The image has the header of the format '{found}', which is not supported yet. Convert it first \
         (`qemu-img convert -O raw`), or say `-f raw` (`-F raw` for a target) to take its bytes as they are."
    )]
    Unsupported {
        /// The name of the format.
        found: &'static str,
    },
    /// No header, and the image will be written.
    #[error(
        "The image has no header that tells its format, and a format is never guessed for an image that will \
         be written. Say `-f raw` (`-F raw` for a target) if it is raw."
    )]
    Unsaid,
}

impl FormatError {
    /// As the error of opening the image `name`.
    pub fn of(self, name: &str) -> BlockError {
        BlockError::new(Operation::Open, name, Errno::EINVAL).hint(self.to_string())
    }
}

/// The format of an image with this head: `explicit` if it is said; else what the header says; raw without
/// a header only if the image will not be written.
pub fn choose_format(explicit: Option<&str>, head: &[u8], will_write: bool) -> Result<Format, FormatError> {
    if let Some(name) = explicit {
        return Format::parse(name).ok_or_else(|| FormatError::Unknown { name: name.to_owned() });
    }
    match probe(head) {
        Probed::Raw if will_write => Err(FormatError::Unsaid),
        probed => probed.format().ok_or(FormatError::Unsupported { found: probed.name() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(at: usize, magic: &[u8]) -> Vec<u8> {
        let mut head = vec![0u8; HEAD_BYTES];
        head[at..at + magic.len()].copy_from_slice(magic);
        head
    }

    #[test]
    fn headers_are_recognised() {
        let cases: [(usize, &[u8], Probed); 13] = [
            (0, b"", Probed::Raw),
            (0, b"QFI\xfb\0\0\0\x02", Probed::Qcow2),
            (0, b"QFI\xfb\0\0\0\x03", Probed::Qcow2),
            (0, b"QFI\xfb\0\0\0\x01", Probed::Qcow1),
            (0, b"QFI\xfb\0\0\0\x04", Probed::Qcow2),
            (0, b"KDMV\x01", Probed::Vmdk),
            (0, b"# Disk DescriptorFile\n", Probed::Vmdk),
            (64, b"\x7f\x10\xda\xbe", Probed::Vdi),
            (0, b"vhdxfile", Probed::Vhdx),
            (0, b"conectix", Probed::Vpc),
            (0, b"QED\0", Probed::Qed),
            (0, b"WithouFreSpacExt", Probed::Parallels),
            (0, b"LUKS\xba\xbe\0\x01", Probed::Luks),
        ];
        for (at, magic, wanted) in cases {
            let head = head(at, magic);
            assert_eq!(probe(&head), wanted);
            // Short images are looked at as far as they go.
            assert_eq!(probe(&head[..at + magic.len()]), wanted);
            let cut = &head[..(at + magic.len()).saturating_sub(1).min(4)];
            assert!(matches!(probe(cut), Probed::Raw | Probed::Vmdk | Probed::Qed));
        }
    }

    #[test]
    fn some_names_tell_a_format() {
        for (name, wanted) in [
            ("a.qcow2", Some(Probed::Qcow2)),
            ("/x.raw/a.QCOW2", Some(Probed::Qcow2)),
            ("a.vhd", Some(Probed::Vpc)),
            ("a.raw", Some(Probed::Raw)),
            ("a.img", None),
            ("a", None),
            (".qcow2", None),
            ("qcow2", None),
        ] {
            assert_eq!(named_as(Path::new(name)), wanted, "{name}");
        }
    }

    #[test]
    fn a_format_is_never_guessed_for_an_image_that_will_be_written() {
        let (empty, qcow2) = (head(0, b""), head(0, b"QFI\xfb\0\0\0\x03"));
        let vdi = head(64, b"\x7f\x10\xda\xbe");
        for will_write in [false, true] {
            // What is said counts, whatever the header looks like.
            assert_eq!(choose_format(Some("raw"), &qcow2, will_write), Ok(Format::Raw));
            assert_eq!(choose_format(Some("raw"), &[], will_write), Ok(Format::Raw));
            assert!(choose_format(Some("rwa"), &empty, will_write).is_err());
            assert_eq!(choose_format(None, &qcow2, will_write), Ok(Format::Qcow2));
            let error = choose_format(None, &vdi, will_write).unwrap_err();
            assert_eq!(error, FormatError::Unsupported { found: "vdi" });
            assert!(error.to_string().contains("not supported yet"));
        }
        assert_eq!(choose_format(None, &empty, false), Ok(Format::Raw));
        for head in [&empty[..], &[], &[7; 512]] {
            let error = choose_format(None, head, true).unwrap_err();
            assert_eq!(error, FormatError::Unsaid);
            assert!(error.of("/a.img").to_string().contains("Say `-f raw`"));
        }
    }
}
