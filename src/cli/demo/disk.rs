//! The demo's disk before anybody writes to it: data whose every sector says where it belongs, and holes.
//!
//! The content is the load generator's own pattern ([`pattern`]) under a seed of its own, so that one sector can be told
//! from every other, from zeroes, and from everything that clients write later. Every fourth stretch of the disk is left
//! out: there the copy has to stay as thin as the source.

use std::cell::Cell;
use std::rc::Rc;

use blockferry_ring::Ring;

use super::super::bench::pattern;
use crate::block::{BlockError, Driver, WriteFlags};

/// Bytes of a stretch that is data or a hole as a whole.
const STRETCH_BYTES: u64 = 4 << 20;
/// Of so many stretches the last is a hole.
const STRETCHES: u64 = 4;
/// The generation of what is there at first.
pub const GENERATION: u64 = 1;
/// Bytes of one write of the filling.
const PIECE_BYTES: u64 = 1 << 20;
/// Writes of the filling in flight.
const WRITERS: usize = 8;

/// What is on the disk at first.
#[derive(Clone, Copy, Debug)]
pub struct Disk {
    /// Bytes of the disk.
    pub bytes: u64,
    /// Seed of its pattern.
    pub seed: u64,
}

impl Disk {
    /// Whether the byte at `offset` lies in a hole.
    pub fn is_hole(&self, offset: u64) -> bool {
        offset / STRETCH_BYTES % STRETCHES == STRETCHES - 1
    }

    /// Bytes of data.
    pub fn data_bytes(&self) -> u64 {
        let stretches = self.bytes / STRETCH_BYTES;
        let holes = stretches / STRETCHES;
        let rest = if self.is_hole(self.bytes) { self.bytes % STRETCH_BYTES } else { 0 };
        self.bytes - holes * STRETCH_BYTES - rest
    }

    /// Writes the data of the first `bytes` of the disk, several pieces in flight, and flushes.
    pub async fn fill(self, ring: &Ring, driver: &Rc<dyn Driver>, bytes: u64) -> Result<(), BlockError> {
        let next = Rc::new(Cell::new(0));
        let writers: Vec<_> = (0..WRITERS)
            .map(|_| {
                let (r, driver, next) = (ring.clone(), driver.clone(), next.clone());
                ring.spawn_with_result(async move { self.write(&r, &*driver, &next, bytes).await })
            })
            .collect();
        let mut result = Ok(());
        for writer in writers {
            result = result.and(writer.take().await);
        }
        result?;
        driver.flush().await
    }

    async fn write(
        &self,
        ring: &Ring,
        driver: &dyn Driver,
        next: &Cell<u64>,
        bytes: u64,
    ) -> Result<(), BlockError> {
        while next.get() < bytes {
            let offset = next.get();
            let len = PIECE_BYTES.min(bytes - offset);
            next.set(offset + len);
            if self.is_hole(offset) {
                continue;
            }
            let mut buf = ring.alloc(len as usize).await;
            pattern::fill(buf.as_mut_slice(), self.seed, offset, GENERATION);
            driver.write(offset, buf.freeze(), WriteFlags::default()).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_is_what_is_no_hole() {
        for stretches in 1..10 {
            for rest in [0, 4096, 1 << 20] {
                let disk = Disk { bytes: stretches * STRETCH_BYTES + rest, seed: 1 };
                let counted = (0..disk.bytes / 4096).filter(|block| !disk.is_hole(block * 4096)).count();
                assert_eq!(disk.data_bytes(), counted as u64 * 4096, "{stretches} {rest}");
            }
        }
    }
}
