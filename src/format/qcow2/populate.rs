//! Holding what so far was read from below: what streaming does.
//!
//! Nobody who reads notices, so this is no write of a guest. It is decided per cluster, alone on it, whether this layer
//! holds it by now: a guest that was faster has its way, and the bytes that came from below are dropped.

use blockferry_ring::SharedBuf;

use super::image::{Fault, Qcow2};
use super::plan::Place;
use super::zero::Change;
use crate::base::planted::{Bug, is_planted};
use crate::base::range::ByteRange;
use crate::block::serial::LockKind;
use crate::block::{Extent, Fill};

/// Largest buffer of zeroes.
const ZERO_BYTES: u64 = 64 << 10;
/// So many clusters are claimed at once.
const CLUSTERS_AT_ONCE: u64 = 64;

impl Qcow2 {
    /// See [`crate::block::Layer::holds`].
    pub(super) async fn held(&self, offset: u64, len: u64) -> Result<Extent, Fault> {
        let piece = self.piece(offset, offset + len).await?;
        Ok(match piece.place {
            Place::Data(_) | Place::Compressed { .. } => Extent::data(piece.len),
            Place::Zero { .. } => Extent::zero(piece.len),
            Place::Below => Extent::nothing(piece.len),
        })
    }

    /// See [`crate::block::Layer::populate`]. The range lies within the disk.
    pub(super) async fn populate_guest(&self, range: ByteRange, fill: &Fill) -> Result<(), Fault> {
        self.check_writable()?;
        // Clusters that become data are changes that a bitmap in the file would have to know of, as in QEMU.
        self.mark_bitmaps().await?;
        let step = match fill {
            // The whole buffer at once: its clusters lie in a row then.
            Fill::Data(_) => range.len().max(1),
            Fill::Zeroes(_) => CLUSTERS_AT_ONCE << self.g.cluster_bits,
        };
        let mut at = range.start();
        while at < range.end() {
            let end =
                range.end().min(self.g.cluster_start(at).saturating_add(step.max(self.g.cluster_size())));
            let part = ByteRange::at_saturating(at, end - at);
            let claim = self.claims.enter(self.clusters_of(part), LockKind::Exclusive).await;
            self.populate_claimed(range, part, fill).await?;
            drop(claim);
            self.write_back_if_crowded().await?;
            at = end;
        }
        Ok(())
    }

    /// Nobody else changes the clusters of `part` meanwhile.
    async fn populate_claimed(&self, range: ByteRange, part: ByteRange, fill: &Fill) -> Result<(), Fault> {
        let mut at = part.start();
        while at < part.end() {
            let piece = self.piece(at, part.end()).await?;
            let run = ByteRange::at_saturating(at, piece.len);
            if piece.place == Place::Below || is_planted(Bug::PopulateOverwrites) {
                match fill {
                    Fill::Data(buf) => {
                        let skip = (run.start() - range.start()) as usize;
                        self.populate_run(run, &buf.slice(skip, run.len() as usize)).await?;
                    }
                    Fill::Zeroes(_) => self.populate_zeroes(run).await?,
                }
            }
            at = run.end();
        }
        Ok(())
    }

    async fn populate_run(&self, run: ByteRange, buf: &SharedBuf) -> Result<(), Fault> {
        let mut at = run.start();
        while at < run.end() {
            at = self.write_some(run, at, buf).await?;
        }
        Ok(())
    }

    async fn populate_zeroes(&self, run: ByteRange) -> Result<(), Fault> {
        let (size, unit) = (self.g.cluster_size(), self.g.unit_size());
        let mut at = run.start();
        while at < run.end() {
            let start = self.g.cluster_start(at);
            let end = run.end().min(start + size);
            // The last unit ends with the disk.
            let wide = if end == self.len.get() { end.next_multiple_of(size) } else { end };
            let part = ByteRange::at_saturating(at, wide - at);
            let raw = self.load_entry(at).await?;
            let old = self.decode(raw, start)?;
            let change = if part.is_aligned(unit) {
                // What lies below may be another file one day, and not be zero there.
                self.zero_entry(old, part, false, false)
            } else {
                Change::Write
            };
            match change {
                Change::Nothing => {}
                Change::Entry(new) => {
                    self.own_l2(start).await?;
                    self.publish(start, &[new], &[old]).await?;
                }
                Change::Write => self.populate_zero_bytes(ByteRange::at_saturating(at, end - at)).await?,
            }
            at = end;
        }
        Ok(())
    }

    async fn populate_zero_bytes(&self, range: ByteRange) -> Result<(), Fault> {
        for part in range.chunks(ZERO_BYTES) {
            let mut buf = self.ring.alloc(part.len() as usize).await;
            buf.fill_zero();
            self.populate_run(part, &buf.freeze()).await?;
        }
        Ok(())
    }
}
