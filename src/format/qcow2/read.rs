//! Reading: from the tables to the places, each place in one request, all of them at once.

use blockferry_ring::Buf;

use super::image::{Fault, Qcow2};
use super::meta::Known;
use super::plan::{Frame, Piece, Place};
use crate::block::{Extent, Resolved};

impl Qcow2 {
    pub(super) fn frame(&self) -> Frame {
        Frame { g: self.g, data_file: self.data_file.is_some() }
    }

    /// The first piece of `from..to`, or what to load first.
    pub(super) fn look(&self, from: u64, to: u64) -> Result<Known<Piece>, Fault> {
        let mut meta = self.meta.borrow_mut();
        Ok(self.frame().next_piece(|at| meta.entry(at), from, to)?)
    }

    /// The first piece of `from..to`; loads what that takes.
    pub(super) async fn piece(&self, from: u64, to: u64) -> Result<Piece, Fault> {
        loop {
            match self.look(from, to)? {
                Known::Yes(piece) => return Ok(piece),
                Known::Load(slice) => self.load_l2(slice).await?,
            }
        }
    }

    /// The fast lane: all of the range is in one place, and nothing has to be read to know that.
    pub(super) fn resolve_now(&self, offset: u64, len: u64) -> Resolved {
        let found = match self.look(offset, offset + len) {
            Ok(Known::Yes(piece)) if piece.len == len => piece.place,
            _ => return Resolved::Ask,
        };
        let resolved = match found {
            Place::Data(host) => {
                let data = self.data();
                if host.checked_add(len).is_none_or(|end| end > data.len()) {
                    return Resolved::Ask;
                }
                match data.resolve(host, len) {
                    Resolved::File { file, offset, pin: None } => {
                        // An image that is only read may be written before this read ends.
                        Resolved::File { file, offset, pin: Some(self.epochs.enter()) }
                    }
                    _ => Resolved::Ask,
                }
            }
            Place::Below => match self.below() {
                Some(below) if offset + len <= below.len() => below.resolve(offset, len),
                Some(below) if offset < below.len() => Resolved::Ask,
                _ => Resolved::Zero,
            },
            Place::Zero { .. } => Resolved::Zero,
            Place::Compressed { .. } => Resolved::Ask,
        };
        if !matches!(resolved, Resolved::Ask) {
            self.counters.resolved.set(self.counters.resolved.get() + 1);
        }
        resolved
    }

    /// Reads guest bytes. The caller keeps the places from being used again (a pin or a claim).
    pub(super) async fn read_guest(&self, offset: u64, buf: Buf) -> (Buf, Result<(), Fault>) {
        let end = offset + buf.len() as u64;
        match self.piece(offset, end.max(offset + 1)).await {
            Ok(piece) if piece.len >= buf.len() as u64 && !matches!(piece.place, Place::Below) => {
                self.read_piece(offset, piece.place, buf).await
            }
            Ok(_) => self.read_scattered(offset, buf).await,
            Err(fault) => (buf, Err(fault)),
        }
    }

    /// Reads bytes that are all in one place.
    pub(super) async fn read_piece(
        &self,
        offset: u64,
        place: Place,
        mut buf: Buf,
    ) -> (Buf, Result<(), Fault>) {
        match place {
            Place::Data(host) => Qcow2::get(&self.data(), host, buf).await,
            Place::Below => match self.below() {
                Some(below) => Qcow2::get(&below, offset, buf).await,
                None => {
                    buf.fill_zero();
                    (buf, Ok(()))
                }
            },
            Place::Zero { .. } => {
                buf.fill_zero();
                (buf, Ok(()))
            }
            Place::Compressed { host, len, skip } => match self.inflate(host, len).await {
                Ok(cluster) => {
                    let skip = skip as usize;
                    buf.copy_from(0, &cluster[skip..skip + buf.len()]);
                    (buf, Ok(()))
                }
                Err(fault) => (buf, Err(fault)),
            },
        }
    }

    /// What is known from `offset` on: zero for certain, and held by this layer.
    pub(super) async fn status(&self, offset: u64, len: u64) -> Result<Extent, Fault> {
        let _pin = self.epochs.enter();
        let piece = self.piece(offset, offset + len).await?;
        match piece.place {
            Place::Data(host) => self.data_status(host, piece.len).await,
            Place::Compressed { .. } => Ok(Extent::data(piece.len)),
            Place::Zero { .. } => Ok(Extent::zero(piece.len)),
            Place::Below => match self.below() {
                Some(below) if offset < below.len() => {
                    let found = below.block_status(offset, piece.len.min(below.len() - offset)).await?;
                    Ok(found.seen_from_above())
                }
                _ => Ok(Extent::hole(piece.len)),
            },
        }
    }

    /// Whether the range reads as zeroes for certain.
    pub(super) async fn reads_as_zero(&self, from: u64, to: u64) -> Result<bool, Fault> {
        let mut at = from;
        while at < to {
            self.let_others(1).await;
            let extent = self.status(at, to - at).await?;
            if !extent.zero {
                return Ok(false);
            }
            at += extent.len;
        }
        Ok(true)
    }
}
