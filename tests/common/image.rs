//! Images for tests: a folder of their own, contents that say where they belong.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

/// One mebibyte.
pub const MIB: u64 = 1 << 20;
/// One kibibyte.
pub const KIB: u64 = 1 << 10;

/// A folder for one test, removed at the end.
#[derive(Debug)]
pub struct Scratch(tempfile::TempDir);

impl Scratch {
    /// In the folder for temporary files, which is on a real filesystem.
    pub fn new() -> Scratch {
        Scratch(tempfile::tempdir().expect("a temporary folder"))
    }

    /// The path of a name in it.
    pub fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().expect("a path in UTF-8").to_owned()
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        self.0.path()
    }

    /// The path of a new image of `len` bytes that are all different from zero.
    pub fn full(&self, name: &str, len: u64) -> String {
        self.holey(name, len, &[(0, len)])
    }

    /// The path of a new image with a pattern in these places (offset, length) and holes elsewhere.
    pub fn holey(&self, name: &str, len: u64, data: &[(u64, u64)]) -> String {
        let path = self.path(name);
        let file = File::create(&path).expect("a new file");
        file.set_len(len).expect("its length");
        for &(offset, len) in data {
            let mut bytes = vec![0; len as usize];
            pattern(offset, 0, &mut bytes);
            file.write_all_at(&bytes, offset).expect("a write");
        }
        path
    }
}

/// A generator of numbers that look random: splitmix64.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// The same numbers for the same seed.
    pub fn new(seed: u64) -> Dice {
        Dice(seed)
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// Fills `bytes` with what belongs at `offset` in version `version`: no byte of it is zero.
pub fn pattern(offset: u64, version: u64, bytes: &mut [u8]) {
    let mut dice = Dice::new(offset ^ version.rotate_left(32));
    for part in bytes.chunks_mut(8) {
        let word = (dice.next() | 0x0101_0101_0101_0101).to_le_bytes();
        part.copy_from_slice(&word[..part.len()]);
    }
}

/// The whole content.
pub fn content(path: &str) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|error| panic!("reading {path}: {error}"))
}

/// Where two contents differ first, or `None`.
pub fn difference(a: &[u8], b: &[u8]) -> Option<usize> {
    if a == b {
        return None;
    }
    Some(a.iter().zip(b).position(|(a, b)| a != b).unwrap_or(a.len().min(b.len())))
}

/// Panics unless the files are alike byte by byte, lengths too.
pub fn assert_equal(a: &str, b: &str) {
    if let Some(at) = difference(&content(a), &content(b)) {
        panic!("{a} and {b} differ from offset {at} on");
    }
}

/// Bytes that a file takes on its disk.
pub fn allocated(path: &str) -> u64 {
    std::fs::metadata(path).expect("a file").blocks() * 512
}

/// Whether a file holds nothing but holes.
pub fn is_all_hole(path: &str) -> bool {
    let file = File::open(path).expect("a file");
    match rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(0)) {
        Ok(_) => false,
        Err(errno) => {
            assert_eq!(errno, rustix::io::Errno::NXIO);
            true
        }
    }
}

/// Overwrites a part of a file behind everybody's back.
pub fn scribble(path: &str, offset: u64, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(path).expect("a file");
    file.write_all_at(bytes, offset).expect("a write");
    file.sync_all().expect("a flush");
}
