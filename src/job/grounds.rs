//! On what grounds two disks are said to be alike: what was read, and what was known without.
//!
//! Comparing need not read what both disks are known to hold zeroes in. How well that is known differs: an image's own
//! tables decide what is read from it, so reading would tell nothing else; a filesystem of this machine is believed like
//! the bytes that it gives; a server's word on its holes, or that of a filesystem behind which one stands, is only a claim.
//! Where a copy left out what such a claim called zero, comparing by the same claim would find nothing, whatever the disk
//! holds. So claims are believed only if the user says so, and both sides are read.

use serde::Serialize;

use crate::base::planted::{Bug, is_planted};
use crate::base::units::fmt_bytes;
use crate::block::{Extent, Word};

/// Bytes of a comparison by what is known of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Grounds {
    /// Read from one disk, and known to be zero on the other, or read from both.
    pub bytes_read: u64,
    /// Zero on both by the tables of images, or behind the end of a disk.
    pub bytes_by_tables: u64,
    /// Zero on both, and a local filesystem's hole on one of them.
    pub bytes_by_filesystem: u64,
    /// Zero on both, on another party's word for one of them.
    pub bytes_on_trust: u64,
}

/// How a range that both disks told of is to be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Read these of the two.
    Read([bool; 2]),
    /// Both are zero, on this word.
    Known(Word),
}

/// How to compare a range of which two disks say this. `trust`: claims are believed.
pub fn way(extents: [Extent; 2], trust: bool) -> Way {
    let trust = trust || is_planted(Bug::VerifyBelievesClaims);
    if !trust && extents.iter().any(|extent| extent.zero && extent.word == Word::Claim) {
        return Way::Read([true; 2]);
    }
    match extents {
        [a, b] if a.zero && b.zero => Way::Known(a.word.max(b.word)),
        [a, b] => Way::Read([!a.zero, !b.zero]),
    }
}

impl Grounds {
    /// Notes so many bytes.
    pub fn note(&mut self, way: Way, bytes: u64) {
        *match way {
            Way::Read(_) => &mut self.bytes_read,
            Way::Known(Word::Own) => &mut self.bytes_by_tables,
            Way::Known(Word::Filesystem) => &mut self.bytes_by_filesystem,
            Way::Known(Word::Claim) => &mut self.bytes_on_trust,
        } += bytes;
    }

    /// All of them.
    pub fn total(&self) -> u64 {
        self.bytes_read + self.bytes_by_tables + self.bytes_by_filesystem + self.bytes_on_trust
    }
}

impl std::fmt::Display for Grounds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} read", fmt_bytes(self.bytes_read))?;
        let others = [
            (self.bytes_by_tables, "zero by the images' tables"),
            (self.bytes_by_filesystem, "holes of local filesystems"),
            (self.bytes_on_trust, "not read: zero on another party's word"),
        ];
        others
            .iter()
            .filter(|(bytes, _)| *bytes > 0)
            .try_for_each(|(bytes, what)| write!(f, ", {} {what}", fmt_bytes(*bytes)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_are_read_on_both_sides_unless_they_are_trusted() {
        let claim = Extent::hole(8).on(Word::Claim);
        let hole = Extent::hole(8).on(Word::Filesystem);
        let (own, data) = (Extent::hole(8), Extent::data(8));
        let table = [
            ([data, data], Way::Read([true, true]), Way::Read([true, true])),
            ([data, own], Way::Read([true, false]), Way::Read([true, false])),
            ([hole, data], Way::Read([false, true]), Way::Read([false, true])),
            ([own, own], Way::Known(Word::Own), Way::Known(Word::Own)),
            ([own, hole], Way::Known(Word::Filesystem), Way::Known(Word::Filesystem)),
            ([claim, hole], Way::Read([true, true]), Way::Known(Word::Claim)),
            ([own, claim], Way::Read([true, true]), Way::Known(Word::Claim)),
            ([claim, data], Way::Read([true, true]), Way::Read([false, true])),
        ];
        for (extents, doubting, trusting) in table {
            assert_eq!((way(extents, false), way(extents, true)), (doubting, trusting), "{extents:?}");
        }
    }

    #[test]
    fn what_was_known_without_reading_is_said() {
        let mut grounds = Grounds::default();
        grounds.note(Way::Read([true, false]), 1 << 20);
        assert_eq!(grounds.to_string(), "1 MiB read");
        grounds.note(Way::Known(Word::Claim), 3 << 20);
        grounds.note(Way::Known(Word::Own), 1 << 10);
        assert_eq!(grounds.total(), (4 << 20) + (1 << 10));
        let text =
            "1 MiB read, 1 KiB zero by the images' tables, 3 MiB not read: zero on another party's word";
        assert_eq!(grounds.to_string(), text);
    }
}
