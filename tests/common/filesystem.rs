//! A small filesystem of its own for a test: a file, a loop device, a mount.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::tool;

fn text(path: &Path) -> String {
    path.to_str().expect("a path in UTF-8").to_owned()
}

/// The offsets of the data blocks (of 4 KiB) of a file in an ext4 image, from the extents that debugfs prints:
/// `(0-2047):8192-10239, …`.
pub fn blocks_of(image: &str, file: &str) -> Vec<u64> {
    let text = tool("debugfs", &["-R", &format!("stat {file}"), image]);
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
        offsets.extend((number(first)..=number(last)).map(|block| block * 4096));
    }
    offsets
}

/// A mounted filesystem. Unmounted when it goes; its file goes with the folder it is in.
#[derive(Debug)]
pub struct Mounted {
    at: String,
}

impl Mounted {
    /// XFS with sharing of blocks, `len` bytes large. Needs root.
    pub fn xfs(folder: &Path, len: u64) -> Mounted {
        Mounted::new(folder, len, &["mkfs.xfs", "-q", "-m", "reflink=1"])
    }

    /// ext4, which shares nothing. Needs root.
    pub fn ext4(folder: &Path, len: u64) -> Mounted {
        Mounted::new(folder, len, &["mkfs.ext4", "-q", "-F"])
    }

    /// One in memory. Needs root.
    pub fn tmpfs(folder: &Path, len: u64) -> Mounted {
        let at = text(&folder.join("mounted"));
        std::fs::create_dir(&at).expect("a folder to mount on");
        tool("mount", &["-t", "tmpfs", "-o", &format!("size={len}"), "none", &at]);
        Mounted { at }
    }

    /// One that this command makes in a file. Needs root.
    pub fn new(folder: &Path, len: u64, make: &[&str]) -> Mounted {
        let (file, at) = (text(&folder.join("filesystem")), text(&folder.join("mounted")));
        std::fs::File::create(&file).and_then(|f| f.set_len(len)).expect("a file for a filesystem");
        std::fs::create_dir(&at).expect("a folder to mount on");
        tool(make[0], &[&make[1..], &[&file]].concat());
        tool("mount", &["-o", "loop", &file, &at]);
        Mounted { at }
    }

    /// The one that is in this file already, mounted at a folder that is there. Needs root.
    pub fn of(file: &str, at: &str) -> Mounted {
        tool("mount", &["-o", "loop", file, at]);
        Mounted { at: at.to_owned() }
    }

    /// The path of a name in it.
    pub fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.at)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // A loop device made by mount goes with the mount. A ring that has just ended may hold a file for a moment.
        for _ in 0..50 {
            let ended = Command::new("umount").arg(&self.at).output();
            if ended.is_ok_and(|ended| ended.status.success()) {
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}
