//! Writing compressed clusters: read a few, compress them on another thread, write them.

use std::rc::Rc;

use super::hands::Parts;
use crate::base::range::ByteRange;
use crate::block::Driver;
use crate::job::mirror::machine::{Copied, Failed};

/// Bytes of a cluster, where the driver can compress clusters.
pub(super) fn cluster_bytes(_to: &Rc<dyn Driver>) -> Option<u64> {
    None
}

/// Copies a piece that begins with a cluster and ends with one, or with the disk.
pub(super) async fn copy(_parts: &Parts, _range: ByteRange, _done: &mut Copied) -> Result<(), Failed> {
    Ok(())
}
