//! Copies that are not read: blocks shared on XFS, and what happens where they cannot be.

use super::our_json;
use common::filesystem::Mounted;
use common::image::{MIB, Scratch, assert_equal};
use common::{is_root, tool};

/// How many of the file's extents are shared, and how many are not.
fn extents(path: &str) -> (usize, usize) {
    let text = tool("filefrag", &["-v", path]);
    // Those lines begin with a number and a colon.
    let lines: Vec<&str> =
        text.lines().filter(|l| l.trim_start().starts_with(|c: char| c.is_ascii_digit())).collect();
    let shared = lines.iter().filter(|line| line.contains("shared")).count();
    (shared, lines.len() - shared)
}

const DATA: [(u64, u64); 3] = [(0, 40 * MIB), (50 * MIB, 3 * MIB), (63 * MIB, MIB + 700)];
const LEN: u64 = 64 * MIB + 700;

/// A source on the mounted filesystem.
fn source(scratch: &Scratch, mounted: &Mounted) -> String {
    let (here, there) = (scratch.holey("source", LEN, &DATA), mounted.path("source"));
    tool("cp", &["--sparse=always", &here, &there]);
    tool("sync", &["-f", &there]);
    there
}

#[test]
fn on_xfs_blocks_are_shared() {
    if !is_root() {
        return;
    }
    let scratch = Scratch::new();
    let mounted = Mounted::xfs(scratch.dir(), 400 * MIB);
    let a = source(&scratch, &mounted);
    let b = mounted.path("b");
    let end = our_json(&["convert", "-f", "raw", "--verify", "--output=json", &a, &b]);
    let shared = end["bytes-shared"].as_u64().expect("a number");
    assert!(shared >= 43 * MIB, "{end:#}");
    assert_equal(&a, &b);
    let (with, without) = extents(&b);
    // Only the end of a file that is no multiple of a block may have been copied.
    assert!(with >= 2 && without <= 2, "{with} shared, {without} not");

    let c = mounted.path("c");
    let end = our_json(&["convert", "-f", "raw", "--reflink=never", "--output=json", &a, &c]);
    assert_eq!(end["bytes-shared"], 0);
    assert_equal(&a, &c);
    assert_eq!(extents(&c).0, 0);

    // A copy that is written to leaves its source alone.
    common::image::scribble(&b, 5 * MIB, &[1; 4096]);
    assert_equal(&a, &c);
}

#[test]
fn between_filesystems_and_where_nothing_can_be_shared_it_is_read() {
    if !is_root() {
        return;
    }
    let scratch = Scratch::new();
    let mounted = Mounted::ext4(scratch.dir(), 400 * MIB);
    let a = source(&scratch, &mounted);
    let (near, far) = (mounted.path("near"), scratch.path("far"));
    for target in [&near, &far] {
        let end = our_json(&["convert", "-f", "raw", "--output=json", &a, target]);
        assert_eq!(end["bytes-shared"], 0, "{end:#}");
        assert_equal(&a, target);
    }
    // With -C the kernel copies, in its own way.
    let c = mounted.path("c");
    let end = our_json(&["convert", "-f", "raw", "-C", "--output=json", &a, &c]);
    assert!(end["bytes-shared"].as_u64() >= Some(43 * MIB), "{end:#}");
    assert_equal(&a, &c);
}
