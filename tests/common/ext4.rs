//! An ext4 filesystem as something to move: thousands of files, and a large one into whose blocks a client may write, as
//! an application with that file open would: at any instant the filesystem is whole.

use std::path::Path;

use super::filesystem::blocks_of;
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
    let blocks = blocks_of(image, "/large");
    assert_eq!(blocks.len() as u64 * BLOCK_BYTES, LARGE_BYTES);
    blocks
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

/// `e2fsck` finds nothing.
pub fn assert_whole(image: &str) {
    tool("e2fsck", &["-f", "-n", image]);
}
