//! Telling what there is: facts about the image, and which layer of a chain holds what.

use super::bitmap;
use super::header::{compatible, extension, incompatible};
use super::image::{Fault, Qcow2};
use super::info::{Info, MapExtent};
use super::options::Compat;
use super::plan::Place;
use crate::base::limits::BACKING_CHAIN_MAX;
use crate::block::{Driver, Extent, IoFuture};

impl Qcow2 {
    pub(super) async fn info_now(&self) -> Result<Info, Fault> {
        let header = self.header.borrow().clone();
        let (snapshots, _) = self.read_snapshots().await?;
        let (bitmaps, bitmaps_inconsistent) = self.bitmap_infos().await?;
        debug_assert!(bitmaps.len() <= bitmap::BITMAPS_MAX as usize);
        let has = |bit: u64| header.incompatible & bit != 0;
        Ok(Info {
            virtual_size: self.len.get(),
            cluster_size: self.g.cluster_size() as u32,
            compat: if header.version >= 3 { Compat::V3 } else { Compat::V2 },
            refcount_bits: self.counting().refcount_bits(),
            lazy_refcounts: header.compatible & compatible::LAZY_REFCOUNTS != 0,
            extended_l2: self.g.subclusters,
            compression_type: header.compression,
            corrupt: has(incompatible::CORRUPT),
            dirty: has(incompatible::DIRTY),
            data_file: header.text(extension::DATA_FILE),
            has_data_file: header.has_data_file(),
            data_file_raw: header.data_file_raw(),
            backing_format: header.text(extension::BACKING_FORMAT),
            full_backing_filename: self.backing_name.borrow().clone(),
            backing_filename: header.backing_file,
            snapshots: snapshots.iter().map(|snapshot| snapshot.info(header.size)).collect(),
            bitmaps,
            bitmaps_inconsistent,
        })
    }

    pub(super) async fn map_at(&self, offset: u64, len: u64) -> Result<MapExtent, Fault> {
        self.map_deep(offset, len, 0).await
    }

    fn map_deep(&self, offset: u64, len: u64, depth: u32) -> IoFuture<'_, Result<MapExtent, Fault>> {
        self.ring.boxed(async move {
            let _pin = self.epochs.enter();
            let piece = self.piece(offset, offset + len).await?;
            let file = |at: Option<u64>| at.map(|_| self.data().driver().name().to_owned());
            let own = |extent, compressed, at: Option<u64>| MapExtent {
                extent: Extent { depth, ..extent },
                present: true,
                compressed,
                offset: at,
                file: file(at),
            };
            let hole = own(Extent::hole(piece.len), false, None);
            Ok(match piece.place {
                Place::Data(host) => {
                    let found = self.data_status(host, piece.len).await?;
                    own(found, false, Some(host))
                }
                Place::Zero { host } => own(Extent::hole(piece.len), false, host),
                Place::Compressed { .. } => own(Extent::data(piece.len), true, None),
                Place::Below => match self.below() {
                    Some(below) if offset < below.len() => {
                        let len = piece.len.min(below.len() - offset);
                        map_below(&**below.driver(), offset, len, depth + 1).await?
                    }
                    // The layer below ends before this; it reads as zeroes by this one's length.
                    Some(_) => hole,
                    None => MapExtent { present: false, ..hole },
                },
            })
        })
    }
}

/// The extent of a layer below, which need not be of this format.
async fn map_below(below: &dyn Driver, offset: u64, len: u64, depth: u32) -> Result<MapExtent, Fault> {
    if depth as usize <= BACKING_CHAIN_MAX
        && let Some(image) = below.as_any().and_then(|any| any.downcast_ref::<Qcow2>())
    {
        return image.map_deep(offset, len, depth).await;
    }
    let extent = below.block_status(offset, len).await?;
    Ok(MapExtent {
        extent: Extent { depth, ..extent },
        present: true,
        compressed: false,
        offset: Some(offset),
        file: Some(below.name().to_owned()),
    })
}
