//! Changing what an image is, in place: its version, whether reference counts may be written late, and the length of its
//! disk, which may have to wait for the version that allows it.
//!
//! The first two are fields of the first sector, which is written as a whole: a power cut leaves the one image or the other. What
//! cannot be said in version 2 (zero clusters, narrow or wide reference counts, ...) keeps an image from going back to it;
//! nothing is rewritten for that.

use blockferry_ring::Errno;

use super::entry::OFFSET_MASK;
use super::header::{V2_BYTES, V3_BYTES_MIN, compatible, extension, incompatible};
use super::image::{Fault, Qcow2};
use super::options::{Compat, Preallocation};

/// What is to be different.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amendment {
    /// The version.
    pub compat: Option<Compat>,
    /// Whether reference counts may be written late.
    pub lazy_refcounts: Option<bool>,
    /// The length of the disk.
    pub len: Option<u64>,
}

impl Qcow2 {
    /// What speaks against it. Nothing is changed.
    pub(super) async fn judge_amendment(&self, to: &Amendment) -> Result<(), Fault> {
        let refuse = |why: String| Err(Fault::Refused(Errno::EINVAL, why));
        let (version, lazy_now) = {
            let header = self.header.borrow();
            (header.version, header.compatible & compatible::LAZY_REFCOUNTS != 0)
        };
        let compat = to.compat.unwrap_or(if version >= 3 { Compat::V3 } else { Compat::V2 });
        let lazy = to.lazy_refcounts.unwrap_or(lazy_now && to.compat != Some(Compat::V2));
        if lazy && compat == Compat::V2 {
            return refuse("Lazy refcounts need compatibility level 1.1 or above (compat=1.1).".into());
        }
        if let Some(len) = to.len {
            let version = if compat == Compat::V2 { 2 } else { 3 };
            self.judge_resize_as(version, len, Preallocation::Off)?;
        }
        if compat == Compat::V3 || version < 3 {
            return Ok(());
        }
        match self.keeps_from_v2().await? {
            Some(what) => refuse(format!(
                "Version 2 knows nothing of {what}: convert the image (`blockferry convert -O qcow2 -o compat=0.10`)."
            )),
            None => Ok(()),
        }
    }

    /// What the image has that version 2 has no words for.
    async fn keeps_from_v2(&self) -> Result<Option<&'static str>, Fault> {
        {
            let header = self.header.borrow();
            let found = [
                (header.incompatible & incompatible::DATA_FILE != 0, "external data files"),
                (header.incompatible & incompatible::EXTENDED_L2 != 0, "subclusters"),
                (header.incompatible & incompatible::COMPRESSION != 0, "this compression"),
                (header.incompatible & incompatible::CORRUPT != 0, "marks of damage"),
                (self.g.refcount_bits() != 16, "reference counts of other widths than 16 bits"),
                (header.extension(extension::BITMAPS).is_some(), "bitmaps"),
                (header.nb_snapshots > 0, "snapshots as version 3 has them"),
            ];
            if let Some((_, what)) = found.into_iter().find(|(is_so, _)| *is_so) {
                return Ok(Some(what));
            }
        }
        let len = self.meta.borrow().l1.entries.len() as u64;
        for index in 0..len {
            let entry = self.meta.borrow().l1.get(index);
            if entry & OFFSET_MASK == 0 {
                continue;
            }
            let start = index.saturating_mul(self.g.l2_covers());
            for number in 0..self.g.l2_entries() {
                self.let_others(1).await;
                let at = start + (number << self.g.cluster_bits);
                let Some(raw) = self.load_entry(at).await? else { break };
                if self.decode(Some(raw), at)?.masks().1 != 0 {
                    return Ok(Some("clusters that read as zeroes"));
                }
            }
        }
        Ok(None)
    }

    pub(super) async fn amend_image(&self, to: &Amendment) -> Result<(), Fault> {
        self.check_writable()?;
        self.judge_amendment(to).await?;
        self.write_back().await?;
        if to.compat == Some(Compat::V3) {
            // What version 3 wants of them is nothing that version 2 minds.
            self.complete_snapshots().await?;
        }
        let amended = self.rearrange_header(|header| {
            match to.compat {
                Some(Compat::V2) => {
                    header.version = 2;
                    header.header_length = V2_BYTES as u32;
                    (header.incompatible, header.compatible, header.autoclear) = (0, 0, 0);
                    header.set_extension(extension::FEATURE_NAMES, None);
                }
                Some(Compat::V3) if header.version < 3 => {
                    header.version = 3;
                    header.header_length = V3_BYTES_MIN as u32;
                    (header.incompatible, header.compatible, header.autoclear) = (0, 0, 0);
                }
                Some(Compat::V3) | None => {}
            }
            match to.lazy_refcounts {
                Some(true) => header.compatible |= compatible::LAZY_REFCOUNTS,
                Some(false) => header.compatible &= !compatible::LAZY_REFCOUNTS,
                None => {}
            }
        });
        if !amended.await? {
            let why = "The header has no room for that: give its backing file a shorter name, or convert the image.";
            return Err(Fault::Refused(Errno::ENOSPC, why.into()));
        }
        match to.len {
            Some(len) => self.resize_image(len, Preallocation::Off).await,
            None => Ok(()),
        }
    }
}
