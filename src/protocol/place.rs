//! Whether an open file or device still is what it was: see [`crate::block::place`].

use blockferry_ring::{Errno, FileKind, Place};

use super::leaf::Leaf;
use crate::block::{BlockError, IoResult, Operation};

/// What somebody has done to an open file, if anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Removed,
    Replaced,
    Length(u64),
}

/// What has changed about a file that was opened as `identity`, with so many `links`, and is thought to have `len` bytes.
fn change(
    place: &Place,
    identity: (u64, u64),
    had_name: bool,
    len: (u64, u64),
    by_name: bool,
    exact: bool,
) -> Option<Change> {
    let is_file = place.open.kind == FileKind::Regular;
    // A device keeps its place in the kernel whatever happens to its name; a file without a name was opened by its number.
    if by_name && is_file && had_name {
        match place.named {
            Some(found) if found == identity && place.open.links > 0 => {}
            Some(found) if found != identity => return Some(Change::Replaced),
            _ => return Some(Change::Removed),
        }
    }
    // This program may have lengthened it while it looked.
    let (before, after) = len;
    let is_cut = place.open.len < before.min(after);
    let has_grown = (exact || !is_file) && before == after && place.open.len > before;
    (is_cut || has_grown).then_some(Change::Length(place.open.len))
}

/// Looks. Asked in the offload pool: nobody else waits for it.
pub(super) async fn check(leaf: &Leaf, by_name: bool, exact: bool) -> IoResult {
    let before = leaf.len();
    let fail = |errno: Errno| BlockError::new(Operation::Find, leaf.name().clone(), errno);
    let place = leaf.ring().place(&leaf.file(), leaf.path()).await.map_err(fail)?;
    let info = leaf.info();
    match change(&place, info.identity, info.links > 0, (before, leaf.len()), by_name, exact) {
        None => Ok(()),
        Some(Change::Removed) => Err(fail(Errno::ENOENT).hint(
            "Somebody has removed it while it was in use: what was written to it is gone when it is closed.",
        )),
        Some(Change::Replaced) => Err(fail(Errno::ESTALE).hint(
            "Somebody has put another file in its place while it was in use: what was written is not under this name.",
        )),
        Some(Change::Length(len)) => Err(fail(Errno::ESTALE).hint(format!(
            "Somebody has changed its length from {before} to {len} bytes while it was in use."
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockferry_ring::FileInfo;

    fn place(kind: FileKind, len: u64, links: u64, named: Option<(u64, u64)>) -> Place {
        let open = FileInfo {
            kind,
            len,
            allocated: 0,
            mem_align: 1,
            offset_align: 1,
            identity: (1, 7),
            is_local: true,
            device: None,
            mode: 0o644,
            group: 0,
            links,
        };
        Place { open, named }
    }

    #[test]
    fn a_file_is_found_by_its_name_or_is_not() {
        let look = |named, links, had_name, by_name| {
            change(&place(FileKind::Regular, 100, links, named), (1, 7), had_name, (100, 100), by_name, true)
        };
        assert_eq!(look(Some((1, 7)), 1, true, true), None);
        assert_eq!(look(Some((1, 8)), 1, true, true), Some(Change::Replaced));
        assert_eq!(look(None, 1, true, true), Some(Change::Removed));
        // Opened by its number in /proc, which leads to it still.
        assert_eq!(look(Some((1, 7)), 0, true, true), Some(Change::Removed));
        // It never had a name, or nobody asks for it.
        assert_eq!(look(Some((1, 7)), 0, false, true), None);
        assert_eq!(look(None, 0, true, false), None);
    }

    #[test]
    fn lengths_tell_who_was_at_work() {
        let look = |kind, len, known, exact| {
            change(&place(kind, len, 1, Some((1, 7))), (1, 7), true, known, true, exact)
        };
        let file = FileKind::Regular;
        assert_eq!(look(file, 99, (100, 100), false), Some(Change::Length(99)));
        assert_eq!(look(file, 101, (100, 100), true), Some(Change::Length(101)));
        // An image grows; and this program may be at it right now.
        assert_eq!(look(file, 101, (100, 100), false), None);
        assert_eq!(look(file, 120, (100, 130), false), None);
        assert_eq!(look(file, 110, (100, 130), true), None);
        assert_eq!(look(FileKind::Block, 200, (100, 100), false), Some(Change::Length(200)));
    }
}
