//! A chain: the layers of one disk, each over its backing file. Which of them holds what, and what they are called.
//!
//! A layer that is shorter than the one above reads as zeroes beyond its end and hides what lies below it there,
//! however long that is.

use std::path::Path;
use std::rc::Rc;

use super::node::Node;
use crate::base::os_name;
use crate::base::planted::{Bug, is_planted};
use crate::block::{BlockError, Extent, Holds};
use crate::protocol::gluster::GlusterUri;
use crate::protocol::nbd::NbdUri;

/// What the `layers` (from above) hold together from `offset` on, for at most `len` bytes (above 0): the uppermost that
/// holds something decides. Bytes beyond the end of the first of them count as zeroes, too.
pub async fn held_by(layers: &[Rc<Node>], offset: u64, len: u64) -> Result<Extent, BlockError> {
    let mut len = len;
    for (depth, node) in (0..).zip(layers) {
        let driver = node.driver();
        if offset >= driver.len() {
            if is_planted(Bug::ShortLayerShows) {
                continue;
            }
            return Ok(Extent { depth, ..Extent::zero(len) });
        }
        len = len.min(driver.len() - offset);
        let held = match driver.as_layer() {
            Some(layer) => layer.holds(offset, len).await?,
            // It has no backing file: it holds everything.
            None => Extent { allocated: true, ..driver.block_status(offset, len).await? },
        };
        len = held.len.clamp(1, len);
        if held.holds() != Holds::Nothing {
            return Ok(Extent { len, depth, ..held });
        }
    }
    Ok(Extent::nothing(len))
}

/// The layers of the chain below `front` that are called so: by the name of the node or of the disk, or as the layer above
/// records it. `front` itself counts.
pub fn called(front: &Rc<Node>, name: &str) -> Vec<Rc<Node>> {
    let chain = front.chain();
    let is_recorded = |above: &Rc<Node>| {
        let recorded = above.driver().as_layer().and_then(|layer| layer.recorded_backing());
        recorded.is_some_and(|(text, _)| text == name)
    };
    let is_called = |n: usize, node: &Rc<Node>| {
        let above = n.checked_sub(1).and_then(|n| chain.get(n));
        node.name() == name || node.driver().name() == name || above.is_some_and(is_recorded)
    };
    let found = chain.iter().enumerate().filter(|(n, node)| is_called(*n, node));
    found.map(|(_, node)| node.clone()).collect()
}

/// How `overlay` is to record `base` as its backing file: in the words of the layer that has had it so far, if they mean
/// the same to the overlay; by a path relative to the overlay where it lies there or below; else by its whole path.
pub fn name_for(overlay: &Node, had_it: &Node, base: &Node) -> String {
    let directory = |node: &Node| {
        let path = os_name::to_path(node.driver().name());
        path.parent().map(Path::to_owned).unwrap_or_default()
    };
    // Where an image lies is told by its path or its URI; not by options, which name servers elsewhere.
    let has_place = |node: &Node| {
        let name = node.driver().name();
        let is_uri = || name.parse::<NbdUri>().is_ok() || name.parse::<GlusterUri>().is_ok();
        node.driver().local_file().is_some() || is_uri()
    };
    let recorded = had_it.driver().as_layer().and_then(|layer| layer.recorded_backing());
    if let Some((text, _)) = recorded
        && directory(overlay) == directory(had_it)
        && has_place(overlay)
        && has_place(had_it)
    {
        return text;
    }
    let name = base.driver().name();
    if let Ok(rest) = os_name::to_path(name).strip_prefix(directory(overlay))
        && base.driver().local_file().is_some()
    {
        return os_name::from_path(rest);
    }
    match base.driver().local_file() {
        Some(_) => std::path::absolute(os_name::to_path(name)).map_or(name.to_owned(), os_name::from_path),
        None => name.to_owned(),
    }
}
