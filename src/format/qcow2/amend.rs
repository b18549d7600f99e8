//! Changing what an image is, in place: its version, how wide reference counts are and whether they may be written late,
//! what its data file is, and the length of its disk, which may have to wait for the version that allows it.
//!
//! Each of these is decided by the first sector, which is written as a whole: a power cut leaves the one image or the other.
//! What has to be made anew for that (reference counts of another width) lies next to the old until then. What cannot be
//! said in version 2 (subclusters, bitmaps, ...) keeps an image from going back to it; zero clusters become something else
//! first.

use blockferry_ring::Errno;

use super::header::{V2_BYTES, V3_BYTES_MIN, autoclear, compatible, extension, incompatible};
use super::image::{Fault, Qcow2};
use super::options::{Compat, Preallocation};
use crate::base::os_name;
use crate::base::range::ByteRange;
use crate::block::serial::LockKind;

/// What is to be different.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Amendment {
    /// The version.
    pub compat: Option<Compat>,
    /// Whether reference counts may be written late.
    pub lazy_refcounts: Option<bool>,
    /// Bits of a reference count: a power of two up to 64.
    pub refcount_bits: Option<u32>,
    /// The name of the data file; empty: it is not written down. The data stays where it is.
    pub data_file: Option<String>,
    /// The data file is no longer kept as a raw image that shows the whole disk.
    pub data_file_not_raw: bool,
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
        if to.data_file.is_some() && self.data_file.is_none() {
            return refuse(
                "The image has no external data file, and gets none: convert it (`blockferry convert`)."
                    .into(),
            );
        }
        let bits = to.refcount_bits.unwrap_or(self.counting().refcount_bits());
        if !bits.is_power_of_two() || bits > 64 {
            return refuse(format!("Refcounts have 1, 2, 4, 8, 16, 32 or 64 bits, not {bits}."));
        }
        if compat == Compat::V2 && bits != 16 {
            return refuse(format!(
                "Refcounts of {bits} bits need compatibility level 1.1 or above (compat=1.1); version 2 has 16 bits."
            ));
        }
        if bits != self.counting().refcount_bits() {
            self.judge_width(bits.ilog2()).await?;
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
                (header.extension(extension::BITMAPS).is_some(), "bitmaps"),
            ];
            if let Some((_, what)) = found.into_iter().find(|(is_so, _)| *is_so) {
                return Ok(Some(what));
            }
        }
        self.snapshots_keep_from_v2().await
    }

    pub(super) async fn amend_image(&self, to: &Amendment) -> Result<(), Fault> {
        self.check_writable()?;
        self.judge_amendment(to).await?;
        self.write_back().await?;
        if to.compat == Some(Compat::V3) {
            // What version 3 wants of them is nothing that version 2 minds.
            self.complete_snapshots().await?;
        }
        if self.header.borrow().version < 3 {
            self.change_header(to).await?;
        }
        self.remake_tables(to).await?;
        self.change_header(to).await?;
        match to.len {
            Some(len) => self.resize_image(len, Preallocation::Off).await,
            None => Ok(()),
        }
    }

    /// What has to be made anew. Nobody uses the image meanwhile.
    async fn remake_tables(&self, to: &Amendment) -> Result<(), Fault> {
        let _claim = self.claims.enter(ByteRange::ALL, LockKind::Exclusive).await;
        if let Some(bits) = to.refcount_bits {
            self.change_width(bits.ilog2()).await?;
        }
        if to.compat == Some(Compat::V2) && self.header.borrow().version >= 3 {
            self.expand_zeroes().await?;
        }
        Ok(())
    }

    /// What is said in the header alone.
    async fn change_header(&self, to: &Amendment) -> Result<(), Fault> {
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
            if let Some(name) = &to.data_file {
                let name = (!name.is_empty()).then(|| os_name::to_bytes(name).into_owned());
                header.set_extension(extension::DATA_FILE, name);
            }
            if to.data_file_not_raw {
                header.autoclear &= !autoclear::DATA_FILE_RAW;
            }
        });
        if !amended.await? {
            let why = "The header has no room for that: give its backing file a shorter name, or convert the image.";
            return Err(Fault::Refused(Errno::ENOSPC, why.into()));
        }
        Ok(())
    }
}
