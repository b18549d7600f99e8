//! Compressed clusters: reading them, and writing them for those who convert.
//!
//! Deflate streams are raw and have a window of 4 KiB, because QEMU inflates with no more. A compressed
//! cluster begins at any byte and may end in the next cluster of the file; how long it is is known only to
//! the sector, so decoders stop when a cluster is full. Several share one cluster of the file, which counts
//! one reference for each.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use blockferry_ring::arena::BLOCK_MAX;
use blockferry_ring::{Errno, Ring};

use super::alloc::Run;
use super::entry::Raw;
use super::image::{Fault, Qcow2, Turn};
use super::options::CompressionType;
use crate::base::range::ByteRange;
use crate::block::serial::LockKind;

/// Lengths of disks are multiples of this.
const SECTOR_BYTES: u64 = 512;
/// Bits of the window of deflate.
const WINDOW_BITS: u8 = 12;

/// Where the next compressed cluster goes, and the one that was read last.
#[derive(Debug)]
pub(super) struct Packing {
    /// Free bytes of a cluster of the file begin here; 0: there are none.
    next: Cell<u64>,
    turn: Turn,
    last: RefCell<Option<(u64, Rc<Vec<u8>>)>>,
    /// Counts what was forgotten, so that what was read before that is not kept.
    forgotten: Cell<u64>,
}

impl Packing {
    pub(super) fn new(ring: &Ring) -> Packing {
        Packing {
            next: Cell::new(0),
            turn: Turn::new(ring),
            last: RefCell::default(),
            forgotten: Cell::new(0),
        }
    }

    /// The compressed cluster at `host` is no more.
    pub(super) fn forget(&self, _host: u64) {
        self.forgotten.set(self.forgotten.get() + 1);
        self.last.replace(None);
    }

    /// Forgets everything: tables have been changed from outside.
    pub(super) fn reset(&self) {
        self.next.set(0);
        self.forget(0);
    }
}

/// The bytes of a compressed cluster of `size` bytes; `None` if they are damaged.
pub fn decompress(kind: CompressionType, bytes: &[u8], size: usize) -> Option<Vec<u8>> {
    let mut out = vec![0; size];
    match kind {
        CompressionType::Zlib => {
            let mut inflate = flate2::Decompress::new_with_window_bits(false, WINDOW_BITS);
            // What follows the stream up to the end of its sector is not looked at.
            inflate.decompress(bytes, &mut out, flate2::FlushDecompress::Finish).ok()?;
            (inflate.total_out() == size as u64).then_some(out)
        }
        CompressionType::Zstd => {
            use std::io::Read;
            let mut decoder = zstd::stream::read::Decoder::with_buffer(bytes).ok()?.single_frame();
            decoder.read_exact(&mut out).ok()?;
            Some(out)
        }
    }
}

/// A cluster, compressed; `None` if that does not make it smaller.
pub fn compress(kind: CompressionType, bytes: &[u8]) -> Option<Vec<u8>> {
    let room = bytes.len() - 1;
    match kind {
        CompressionType::Zlib => {
            let level = flate2::Compression::default();
            let mut deflate = flate2::Compress::new_with_window_bits(level, false, WINDOW_BITS);
            let mut out = vec![0; room];
            let status = deflate.compress(bytes, &mut out, flate2::FlushCompress::Finish).ok()?;
            let whole = status == flate2::Status::StreamEnd && deflate.total_in() == bytes.len() as u64;
            out.truncate(deflate.total_out() as usize);
            whole.then_some(out)
        }
        CompressionType::Zstd => {
            let out = zstd::bulk::compress(bytes, zstd::DEFAULT_COMPRESSION_LEVEL).ok()?;
            (out.len() <= room).then_some(out)
        }
    }
}

impl Qcow2 {
    /// The contents of the compressed cluster at `host`.
    pub(super) async fn inflate(&self, host: u64, len: u64) -> Result<Rc<Vec<u8>>, Fault> {
        if let Some((at, cluster)) = &*self.packing.last.borrow()
            && *at == host
        {
            return Ok(cluster.clone());
        }
        let forgotten = self.packing.forgotten.get();
        let bytes = self.read_bytes(host, len).await?;
        let (kind, size) = (self.header.borrow().compression, self.g.cluster_size() as usize);
        let work = move || decompress(kind, &bytes, size);
        let found = self.ring.offload(work).await.map_err(|errno| {
            Fault::Refused(errno, "A compressed cluster could not be handed to a thread.".into())
        })?;
        let Some(cluster) = found else {
            // Guest data is lost there; the rest of the image is as good as before.
            let why = format!("The compressed cluster at {host:#x} of the file cannot be decompressed.");
            return Err(Fault::Refused(Errno::EIO, why));
        };
        let cluster = Rc::new(cluster);
        if self.packing.forgotten.get() == forgotten {
            self.packing.last.replace(Some((host, cluster.clone())));
        }
        Ok(cluster)
    }

    /// Compresses a cluster and writes it; what does not become smaller is written as it is.
    pub(super) async fn write_compressed_guest(&self, offset: u64, mut bytes: Vec<u8>) -> Result<(), Fault> {
        self.check_writable()?;
        let (size, len) = (self.g.cluster_size(), bytes.len() as u64);
        let disk_end = self.len.get();
        let end = offset.checked_add(len).filter(|end| *end <= disk_end);
        // The disk ends with a sector: what comes may end inside it.
        let whole = len == size || end.is_some_and(|end| end.next_multiple_of(SECTOR_BYTES) >= disk_end);
        let rest = disk_end.saturating_sub(offset).min(size) as usize;
        if !offset.is_multiple_of(size) || end.is_none() || len > size || !whole {
            let why = "Only whole clusters can be written compressed.";
            return Err(Fault::Refused(Errno::EINVAL, why.into()));
        }
        if self.data_file.is_some() {
            let why = "Images with an external data file have no compressed clusters.";
            return Err(Fault::Refused(Errno::EOPNOTSUPP, why.into()));
        }
        let kind = self.header.borrow().compression;
        let work = move || {
            bytes.resize(size as usize, 0);
            (compress(kind, &bytes), bytes)
        };
        let (packed, bytes) = self.ring.offload(work).await.map_err(|errno| {
            Fault::Refused(errno, "A cluster could not be handed to a thread to be compressed.".into())
        })?;
        let Some(packed) = packed else { return self.write_plain(offset, &bytes[..rest]).await };
        self.mark_bitmaps().await?;
        let _claim = self.claims.enter(ByteRange::at_saturating(offset, size), LockKind::Exclusive).await;
        let raw = self.load_entry(offset).await?;
        let old = self.decode(raw, offset)?;
        if old.masks().0 != 0 {
            let why = "The cluster is there already; compressed clusters are only added.";
            return Err(Fault::Refused(Errno::EIO, why.into()));
        }
        self.own_l2(offset).await?;
        let host = self.pack(packed.len() as u64).await?;
        let write = async {
            let Some(entry) = Raw::compressed(&self.g, host, packed.len() as u64) else {
                let why = "The image is too large for compressed clusters.";
                return Err(Fault::Refused(Errno::EFBIG, why.into()));
            };
            self.write_bytes(host, &packed).await?;
            self.publish(offset, &[entry], &[old]).await
        };
        if let Err(fault) = write.await {
            let first = self.g.cluster_start(host);
            let count = (host + packed.len() as u64 - first).div_ceil(size);
            self.give_back(Run { host: first, count, virgin: false }).await;
            return Err(fault);
        }
        self.write_back_if_crowded().await
    }

    async fn write_plain(&self, offset: u64, bytes: &[u8]) -> Result<(), Fault> {
        let mut at = offset;
        for piece in bytes.chunks(BLOCK_MAX) {
            let mut buf = self.ring.alloc(piece.len()).await;
            buf.copy_from(0, piece);
            self.write_guest(at, &buf.freeze()).await?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// Room for `len` bytes (a cluster at most); each cluster of the file that they touch has one more reference.
    async fn pack(&self, len: u64) -> Result<u64, Fault> {
        let _turn = self.packing.turn.take().await;
        let size = self.g.cluster_size();
        let next = self.packing.next.get();
        let room = if next == 0 { 0 } else { size - self.g.in_cluster(next) };
        let add = |at: u64| self.change_refcount(at >> self.g.cluster_bits, 1);
        let set_next = |end: u64| self.packing.next.set(if end.is_multiple_of(size) { 0 } else { end });
        if next != 0 && len <= room && add(next).await.is_ok() {
            set_next(next + len);
            return Ok(next);
        }
        let run = self.allocate(1, false).await?;
        if next != 0 && len > room && run.host == next + room && add(next).await.is_ok() {
            set_next(next + len);
            return Ok(next);
        }
        set_next(run.host + len);
        Ok(run.host)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::rng::Rng;

    #[test]
    fn what_was_compressed_comes_back_with_anything_behind_it() {
        let mut rng = Rng::new(5);
        for kind in [CompressionType::Zlib, CompressionType::Zstd] {
            for size in [512, 4096, 65_536, 2 << 20] {
                let mut bytes: Vec<u8> = (0..size).map(|i| (i / 97) as u8).collect();
                rng.fill(&mut bytes[..size / 8]);
                let mut packed = compress(kind, &bytes).expect("it becomes smaller");
                let half = packed.len() / 2;
                packed.extend([7; 300]);
                assert!(decompress(kind, &packed, size).is_some_and(|back| back == bytes), "{kind:?} {size}");
                assert!(decompress(kind, &packed[..half], size).is_none());
                rng.fill(&mut bytes);
                assert!(compress(kind, &bytes).is_none());
            }
        }
    }
}
