//! An ext4 filesystem as something to move: thousands of files, and a large one into whose blocks a client may write, as
//! an application with that file open would: at any instant the filesystem is whole.

use std::path::Path;

use super::image::{Dice, MIB, Scratch, pattern};
use super::tool;

const FILES: u64 = 3000;
/// Bytes of the image.
pub const IMAGE_BYTES: u64 = 224 * MIB;
const LARGE_BYTES: u64 = 24 * MIB;
/// Bytes of a block of the filesystem.
pub const BLOCK_BYTES: u64 = 4096;

/// Makes one at `image`: the offsets of the blocks of its file `/large`.
pub fn make(scratch: &Scratch, image: &str) -> Vec<u64> {
    let tree = scratch.dir().join("tree");
    make_tree(&tree);
    let size = format!("{}M", IMAGE_BYTES / MIB);
    tool("mke2fs", &["-q", "-t", "ext4", "-b", "4096", "-d", tree.to_str().unwrap(), image, &size]);
    std::fs::remove_dir_all(&tree).unwrap();
    assert_whole(image);
    blocks_of_large(image)
}

/// A folder with thousands of small files and a large one.
fn make_tree(root: &Path) {
    let mut dice = Dice::new(7);
    for i in 0..FILES {
        let folder = root.join(format!("folder{}", i % 50));
        std::fs::create_dir_all(&folder).unwrap();
        let mut bytes = vec![0; dice.below(9000) as usize];
        pattern(i, 1, &mut bytes);
        std::fs::write(folder.join(format!("file{i}")), bytes).unwrap();
    }
    let mut bytes = vec![0; LARGE_BYTES as usize];
    pattern(0, 2, &mut bytes);
    std::fs::write(root.join("large"), bytes).unwrap();
}

/// The offsets of the data blocks of `/large`, from the extents that debugfs prints: `(0-2047):8192-10239, …`.
fn blocks_of_large(image: &str) -> Vec<u64> {
    let text = tool("debugfs", &["-R", "stat /large", image]);
    let (_, extents) = text.split_once("EXTENTS:").expect("a file with extents");
    let mut offsets = Vec::new();
    for extent in extents.split(',') {
        let (logical, physical) = extent.trim().split_once(':').expect("an extent");
        if logical.starts_with("(ETB") {
            // A block of the tree itself: not data.
            continue;
        }
        let (first, last) = physical.split_once('-').unwrap_or((physical, physical));
        let number = |text: &str| text.trim().parse::<u64>().expect("the number of a block");
        offsets.extend((number(first)..=number(last)).map(|block| block * BLOCK_BYTES));
    }
    assert_eq!(offsets.len() as u64 * BLOCK_BYTES, LARGE_BYTES, "{text}");
    offsets
}

/// `e2fsck` finds nothing.
pub fn assert_whole(image: &str) {
    tool("e2fsck", &["-f", "-n", image]);
}
