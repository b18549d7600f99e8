//! A small filesystem of its own for a test: a file, a loop device, a mount.

use std::path::Path;
use std::process::Command;

use super::tool;

/// A mounted filesystem. Unmounted when it goes; its file goes with the folder it is in.
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

    fn new(folder: &Path, len: u64, make: &[&str]) -> Mounted {
        let text = |path: &Path| path.to_str().expect("a path in UTF-8").to_owned();
        let (file, at) = (text(&folder.join("filesystem")), text(&folder.join("mounted")));
        std::fs::File::create(&file).and_then(|f| f.set_len(len)).expect("a file for a filesystem");
        std::fs::create_dir(&at).expect("a folder to mount on");
        tool(make[0], &[&make[1..], &[&file]].concat());
        tool("mount", &["-o", "loop", &file, &at]);
        Mounted { at }
    }

    /// The path of a name in it.
    pub fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.at)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // A loop device made by mount goes with the mount. There is nothing more to do about a failure here.
        let _ = Command::new("umount").arg(&self.at).status();
    }
}
