//! The demo's folder: made for one run, gone afterwards whatever ends the run.
//!
//! It is private (mode 0700), has a name that nobody guesses, and removes itself when it is dropped, unless it is to be
//! kept. How large a disk may be there follows from the room that the filesystem has left.

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use super::super::exit::Failure;
use crate::base::shown::plain;
use crate::base::units::fmt_bytes;

/// The disk of a demo when there is room for it, in bytes.
const DISK_BYTES: u64 = 1 << 30;
/// The smallest disk with which a demo shows anything, in bytes.
pub const DISK_BYTES_MIN: u64 = 16 << 20;
/// Disks are multiples of this when nobody says their size, in bytes.
const DISK_STEP_BYTES: u64 = 16 << 20;
/// Room that source and target leave to others, in bytes.
const ROOM_BYTES: u64 = 64 << 20;
/// Bytes of a socket's path at most, as Linux has it.
const SOCKET_BYTES_MAX: usize = 107;
/// Names that are tried for the folder.
const NAMES_MAX: u32 = 16;

/// The folder of one run.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    keep: bool,
}

impl Scratch {
    /// Makes the folder in `parent`. `random` gives the digits of its name.
    pub fn new(parent: &Path, keep: bool, mut random: impl FnMut() -> u64) -> Result<Scratch, Failure> {
        // A relative path would have the load generator and this process agree on a working directory for ever.
        let parent = std::path::absolute(parent).unwrap_or_else(|_| parent.to_owned());
        let mut last = std::io::ErrorKind::AlreadyExists.into();
        for _ in 0..NAMES_MAX {
            let path = parent.join(format!("blockferry-demo-{:08x}", random() as u32));
            match std::fs::DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Ok(Scratch { path, keep }),
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => last = error,
                Err(error) => {
                    last = error;
                    break;
                }
            }
        }
        Err(Failure::text(format!(
            "A folder for the demo cannot be made in '{}': {}. Choose another place with --dir.",
            parent.display(),
            plain(&last)
        )))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A file in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// A socket in it.
    pub fn socket(&self, name: &str) -> Result<PathBuf, Failure> {
        let path = self.file(name);
        if path.as_os_str().len() > SOCKET_BYTES_MAX {
            return Err(Failure::text(format!(
                "The path '{}' is too long for a socket. Choose a shorter one with --dir.",
                path.display()
            )));
        }
        Ok(path)
    }

    /// The size of the demo's disk: as asked for if there is room for two of it, otherwise what the place allows.
    pub fn disk_bytes(&self, asked: Option<u64>) -> Result<u64, Failure> {
        let room = rustix::fs::statvfs(&self.path)
            .map(|fs| fs.f_bavail.saturating_mul(fs.f_frsize))
            .map_err(|error| self.failed("looked at", error))?;
        choose(room, asked).ok_or_else(|| {
            Failure::text(format!(
                "There is too little room in '{}': {} are free, and the demo makes two disks of {}. \
                 Choose another place with --dir, or a smaller disk with --size.",
                self.path.display(),
                fmt_bytes(room),
                fmt_bytes(asked.unwrap_or(DISK_BYTES_MIN)),
            ))
        })
    }

    fn failed(&self, doing: &str, error: impl Into<std::io::Error>) -> Failure {
        Failure::text(format!(
            "The folder '{}' cannot be {doing}: {}",
            self.path.display(),
            plain(&error.into())
        ))
    }
}

fn choose(room: u64, asked: Option<u64>) -> Option<u64> {
    let fits = |bytes: u64| bytes.checked_mul(2).and_then(|two| two.checked_add(ROOM_BYTES)) <= Some(room);
    let bytes = asked.unwrap_or_else(|| (room / 4).min(DISK_BYTES) / DISK_STEP_BYTES * DISK_STEP_BYTES);
    let sum_fits = bytes <= (u64::MAX - ROOM_BYTES) / 2 && fits(bytes);
    (bytes >= DISK_BYTES_MIN && sum_fits).then_some(bytes)
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        if let Err(error) = std::fs::remove_dir_all(&self.path) {
            tracing::warn!(folder = %self.path.display(), %error, "the demo's folder could not be removed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn a_disk_leaves_room_for_its_copy_and_for_others() {
        assert_eq!(choose(100 * GIB, None), Some(GIB));
        assert_eq!(choose(2 * GIB, None), Some(GIB / 2));
        assert_eq!(choose(GIB + (5 << 20), None), Some(256 << 20));
        assert_eq!(choose(100 << 20, None), Some(16 << 20));
        assert_eq!(choose(60 << 20, None), None);
        assert_eq!(choose(0, None), None);
        assert_eq!(choose(3 * GIB, Some(GIB)), Some(GIB));
        assert_eq!(choose(2 * GIB, Some(GIB)), None, "no room for others");
        assert_eq!(choose(u64::MAX, Some(u64::MAX)), None);
        assert_eq!(choose(GIB, Some(4096)), None, "too small to show anything");
    }

    #[test]
    fn the_folder_goes_with_its_owner() {
        let parent = tempfile::tempdir().unwrap();
        // A name that is taken is not used.
        let digits = std::cell::Cell::new(0);
        let random = || digits.replace(digits.get() + 1) / 2;
        let first = Scratch::new(parent.path(), false, random).unwrap();
        let second = Scratch::new(parent.path(), true, random).unwrap();
        assert_ne!(first.path(), second.path());
        std::fs::write(first.file("disk"), "data").unwrap();
        let (gone, kept) = (first.path().to_owned(), second.path().to_owned());
        assert!(first.socket("s").is_ok() && first.socket(&"s".repeat(100)).is_err());
        drop((first, second));
        assert!(!gone.exists() && kept.exists());
        let nowhere = Scratch::new(&gone, false, || 0).unwrap_err().to_string();
        assert!(nowhere.contains("--dir"), "{nowhere}");
    }
}
