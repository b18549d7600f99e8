//! Copying without reading: what a job at rest asks before it moves bytes through its own memory.
//!
//! Where source and target lie on one filesystem that can share blocks (XFS, Btrfs, bcachefs), a range is copied by
//! letting both files point to the same blocks: no data moves. Other places (NFS, SMB) copy on their own machine.
//! Nobody says beforehand which pair of files can do it, so it is tried; the first refusal turns that means off for
//! this pair, and everything goes on by reading and writing.
//!
//! # Who may use it
//! The source must be at rest: a block that is shared is a copy of what the file held at the moment of the call, with
//! no order against writes that are under way. And only [`crate::block::Driver::resolve`] knows where the bytes of a
//! range lie; a driver that answers "ask" (compressed clusters, other machines) is read.

use std::cell::Cell;
use std::rc::Rc;

use blockferry_ring::{CopyHow, Errno};

use crate::base::range::ByteRange;
use crate::block::{BlockError, CopyFrom, Driver, Resolved, cannot_copy_range};

/// Filesystems share whole blocks of this size or a smaller one.
const BLOCK_BYTES: u64 = 4096;

/// Which means may be tried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OffloadPolicy {
    /// None: every byte is read and written.
    Never,
    /// Sharing of blocks.
    #[default]
    Reflink,
    /// Sharing of blocks, then whatever else `copy_file_range` can do. On local filesystems without sharing the kernel
    /// then copies through its page cache, which is slower than this program and fills the cache.
    Any,
}

/// What is known of one pair of disks.
#[derive(Debug)]
pub struct CopyOffload {
    means: Cell<Option<CopyHow>>,
    next: Cell<Option<CopyHow>>,
    has_failed: Cell<bool>,
}

impl CopyOffload {
    /// For a copy of any source to any target. Nothing is tried yet.
    pub fn new(policy: OffloadPolicy) -> CopyOffload {
        let (means, next) = match policy {
            OffloadPolicy::Never => (None, None),
            OffloadPolicy::Reflink => (Some(CopyHow::Reflink), None),
            OffloadPolicy::Any => (Some(CopyHow::Reflink), Some(CopyHow::Offload)),
        };
        CopyOffload { means: Cell::new(means), next: Cell::new(next), has_failed: Cell::new(false) }
    }

    /// Whether there is still something to try.
    pub fn is_worth_trying(&self) -> bool {
        self.means.get().is_some()
    }

    /// Some copy has failed halfway: the target may hold anything there, though nobody was told of an error.
    pub fn has_failed(&self) -> bool {
        self.has_failed.get()
    }

    /// Copies `range` of `from` to the same place of `to`. `Ok(0)`: nothing was done, read and write instead; else as
    /// many bytes from the start of the range as were copied. An error is one of the target's. The kernel does not say
    /// which of two files failed: where it may have been the source, nothing counts as done, and whoever reads and writes
    /// instead meets the error again. The range may hold anything after either.
    pub async fn copy(
        &self,
        from: &Rc<dyn Driver>,
        to: &Rc<dyn Driver>,
        range: ByteRange,
    ) -> Result<u64, BlockError> {
        while let Some(how) = self.means.get() {
            let len = range.len() - range.len() % BLOCK_BYTES;
            let Resolved::File { file, offset, pin } = resolve(from, range.start(), len) else {
                return Ok(0);
            };
            if !offset.is_multiple_of(BLOCK_BYTES) || !range.start().is_multiple_of(BLOCK_BYTES) {
                return Ok(0);
            }
            let Some(copy) = to.copy_range(CopyFrom { file, offset, len, how }, range.start()) else {
                self.means.set(None);
                return Ok(0);
            };
            let result = copy.await;
            drop(pin);
            match result {
                Ok(()) => return Ok(len),
                Err(error) if cannot_copy_range(error.errno) => {
                    // Another copy in flight may have turned it off meanwhile.
                    if self.means.get() == Some(how) {
                        tracing::debug!("copying by {how:?} is not to be had here: {}", error.errno);
                        self.means.set(self.next.take());
                    }
                }
                Err(error) if is_of_target(error.errno) => return Err(error),
                Err(error) => {
                    self.has_failed.set(true);
                    tracing::debug!(%error, "a range is read and written, to see which side fails");
                    return Ok(0);
                }
            }
        }
        Ok(0)
    }
}

/// Only whoever is written to fails so.
fn is_of_target(errno: Errno) -> bool {
    matches!(errno, Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG | Errno::EROFS)
}

fn resolve(from: &Rc<dyn Driver>, offset: u64, len: u64) -> Resolved {
    if len == 0 { Resolved::Ask } else { from.resolve(offset, len) }
}
