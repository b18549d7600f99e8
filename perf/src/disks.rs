//! The disks that are copied and served: files, loop devices on tmpfs, zram devices, XFS in a loop device. Each belongs
//! to a value that removes it again; what the kernel keeps busy for a moment (a ring of a process that has ended lets go
//! of its files late) is tried again.
//!
//! Contents are made so that a page in the wrong place is seen: every page of 4 KiB carries its own number.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use blockferry_ring::rng::Rng;

use crate::Fallible;
use crate::stop;

/// Bytes of a page, and of what a number marks.
const PAGE: usize = 4096;
/// Bytes written or compared at a time.
const CHUNK: usize = 4 << 20;
/// How long something busy is tried again.
const PATIENCE: Duration = Duration::from_secs(20);

/// What is on a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Data that does not compress, other data for another seed.
    Random(u64),
    /// Pages that are eight bytes repeated (zram keeps such a page in no memory); other ones for another seed.
    SameFilled(u64),
    /// One MiB of random data in ten; the others are holes.
    Tenth(u64),
    /// Every other 64 KiB is random data; the others are holes.
    Half(u64),
}

/// Memory that O_DIRECT takes.
struct Aligned {
    memory: Vec<u8>,
    offset: usize,
}

impl Aligned {
    fn new() -> Aligned {
        let memory = vec![0; CHUNK + PAGE];
        let offset = memory.as_ptr().align_offset(PAGE);
        Aligned { memory, offset }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.offset..self.offset + CHUNK]
    }
}

fn open_direct(path: &Path, write: bool) -> Fallible<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(write).custom_flags(libc::O_DIRECT);
    options.open(path).map_err(|error| format!("'{}': {error}", path.display()).into())
}

impl Content {
    fn template(self, chunk: &mut [u8]) {
        if let Content::Random(seed) | Content::Tenth(seed) | Content::Half(seed) = self {
            let mut rand = Rng::new(seed);
            chunk.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&rand.next_u64().to_le_bytes()));
        }
    }

    /// Makes a chunk, made from the template, the one at `offset`.
    fn stamp(self, chunk: &mut [u8], offset: u64) {
        for (page, index) in chunk.chunks_exact_mut(PAGE).zip(offset / PAGE as u64..) {
            match self {
                Content::Random(_) | Content::Tenth(_) | Content::Half(_) => {
                    page[..8].copy_from_slice(&index.to_le_bytes());
                }
                Content::SameFilled(seed) => {
                    let word = (index + 1).wrapping_mul(seed.wrapping_mul(2) | 1).to_le_bytes();
                    page.chunks_exact_mut(8).for_each(|at| at.copy_from_slice(&word));
                }
            }
        }
    }

    /// Writes a disk full, past the page cache. A file has its size already.
    pub fn fill(self, path: &Path, bytes: u64) -> Fallible<()> {
        let file = open_direct(path, true)?;
        let mut memory = Aligned::new();
        let chunk = memory.bytes();
        self.template(chunk);
        for offset in (0..bytes).step_by(CHUNK) {
            stop::check()?;
            self.stamp(chunk, offset);
            let len = CHUNK.min(usize::try_from(bytes - offset)?);
            for at in (0..len).step_by(self.piece()).filter(|at| self.has_data(offset + *at as u64)) {
                let end = (at + self.piece()).min(len);
                file.write_all_at(&chunk[at..end], offset + at as u64)?;
            }
        }
        Ok(file.sync_all()?)
    }

    /// Bytes that are data or a hole together.
    fn piece(self) -> usize {
        match self {
            Content::Half(_) => 64 << 10,
            Content::Tenth(_) => 1 << 20,
            Content::Random(_) | Content::SameFilled(_) => CHUNK,
        }
    }

    fn has_data(self, offset: u64) -> bool {
        match self {
            Content::Tenth(_) => (offset >> 20).is_multiple_of(10),
            Content::Half(_) => (offset >> 16).is_multiple_of(2),
            Content::Random(_) | Content::SameFilled(_) => true,
        }
    }

    /// Compares a disk with what [`Content::fill`] writes, past the page cache.
    pub fn check(self, path: &Path, bytes: u64) -> Fallible<()> {
        let file = open_direct(path, false)?;
        let (mut memory, mut expected) = (Aligned::new(), Aligned::new());
        let (read, expected) = (memory.bytes(), expected.bytes());
        self.template(expected);
        let zeroes = vec![0; CHUNK];
        for offset in (0..bytes).step_by(CHUNK) {
            stop::check()?;
            self.stamp(expected, offset);
            let len = CHUNK.min(usize::try_from(bytes - offset)?);
            file.read_exact_at(&mut read[..len], offset)?;
            for at in (0..len).step_by(self.piece()) {
                let end = (at + self.piece()).min(len);
                let position = offset + at as u64;
                let right = if self.has_data(position) { &expected[at..end] } else { &zeroes[..end - at] };
                if read[at..end] != *right {
                    return Err(format!("'{}' is wrong in what begins at {position}", path.display()).into());
                }
            }
        }
        Ok(())
    }
}

/// Makes what was written to a file or device durable.
pub fn sync(path: &Path) -> Fallible<()> {
    Ok(OpenOptions::new().write(true).open(path)?.sync_all()?)
}

/// Takes a file or a device out of the page cache.
pub fn drop_cache(path: &Path) -> Fallible<()> {
    let file = File::open(path)?;
    if !file.metadata()?.file_type().is_block_device() {
        file.sync_all()?;
    }
    Ok(rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?)
}

fn command(program: &str, arguments: &[&str]) -> Fallible<String> {
    let output = std::process::Command::new(program)
        .args(arguments)
        .stdin(std::process::Stdio::null())
        .output()
        .map_err(|error| format!("{program}: {error}"))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{program} {}: {}", arguments.join(" "), text.trim()).into());
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Tries again while something is busy.
fn patiently(what: &str, mut attempt: impl FnMut() -> Fallible<()>) {
    let began = Instant::now();
    while let Err(error) = attempt() {
        if began.elapsed() > PATIENCE {
            eprintln!("blockferry-perf: {what} stays behind: {error}");
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A folder that is removed with all that is in it.
#[derive(Debug)]
pub struct Folder(PathBuf);

impl Folder {
    /// A new one in `parent`.
    pub fn new(parent: &Path) -> Fallible<Folder> {
        let path = parent.join(format!("blockferry-perf-{}", std::process::id()));
        std::fs::create_dir(&path).map_err(|error| format!("'{}': {error}", path.display()))?;
        Ok(Folder(path))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A mount in the scratch folder.
#[derive(Debug)]
pub struct Mount(PathBuf);

impl Mount {
    /// A tmpfs of at most so many bytes.
    pub fn tmpfs(place: &Path, bytes: u64) -> Fallible<Mount> {
        std::fs::create_dir_all(place)?;
        let at = place.display().to_string();
        command("mount", &["-t", "tmpfs", "-o", &format!("size={bytes}"), "blockferry-perf", &at])?;
        Ok(Mount(place.to_owned()))
    }

    /// A new XFS on a device.
    pub fn xfs(device: &Path, place: &Path) -> Fallible<Mount> {
        std::fs::create_dir_all(place)?;
        let (device, at) = (device.display().to_string(), place.display().to_string());
        // Without -K it would give the device's memory back.
        command("mkfs.xfs", &["-q", "-f", "-K", &device])?;
        command("mount", &["-t", "xfs", &device, &at])?;
        Ok(Mount(place.to_owned()))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let place = self.0.display().to_string();
        patiently(&place, || command("umount", &[&place]).map(drop));
    }
}

/// A loop device with direct I/O on a file.
#[derive(Debug)]
pub struct Loop {
    file: PathBuf,
    device: PathBuf,
}

impl Loop {
    /// A device on a file, which is made with so many bytes if it is not there.
    pub fn new(file: &Path, bytes: u64) -> Fallible<Loop> {
        make_file(file, bytes)?;
        let device = Loop::attach(file)?;
        Ok(Loop { file: file.to_owned(), device })
    }

    fn attach(file: &Path) -> Fallible<PathBuf> {
        let name = file.display().to_string();
        Ok(command("losetup", &["--direct-io=on", "-f", "--show", &name])?.into())
    }

    fn detach(&self) {
        let device = self.device.display().to_string();
        patiently(&device, || command("losetup", &["-d", &device]).map(drop));
        // The device is given up in the background when something still has it open, and may then be somebody else's.
        let backing = format!("/sys/block/{}/loop/backing_file", device.trim_start_matches("/dev/"));
        patiently(&device, || {
            let file = std::fs::read_to_string(&backing).unwrap_or_default();
            if Path::new(file.trim()) == self.file { Err("busy".into()) } else { Ok(()) }
        });
    }

    /// The device.
    pub fn path(&self) -> &Path {
        &self.device
    }

    /// The device anew, on the same file: one that has refused to zero a range once never tries again.
    pub fn renew(&mut self) -> Fallible<()> {
        self.detach();
        self.device = PathBuf::new();
        self.device = Loop::attach(&self.file)?;
        Ok(())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        if !self.device.as_os_str().is_empty() {
            self.detach();
        }
    }
}

/// Makes a file of so many bytes, all holes, if it is not there.
pub fn make_file(path: &Path, bytes: u64) -> Fallible<()> {
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(path)?;
    if file.metadata()?.len() != bytes {
        file.set_len(bytes)?;
    }
    Ok(())
}

/// A compressed disk in memory.
#[derive(Debug)]
pub struct Zram {
    number: u32,
    device: PathBuf,
}

impl Zram {
    /// A new device of so many bytes.
    pub fn new(bytes: u64) -> Fallible<Zram> {
        let control = Path::new("/sys/class/zram-control/hot_add");
        if !control.exists() {
            command("modprobe", &["zram", "num_devices=0"])
                .map_err(|error| format!("no zram here: {error}"))?;
        }
        let number: u32 = std::fs::read_to_string(control)?.trim().parse()?;
        let zram = Zram { number, device: format!("/dev/zram{number}").into() };
        std::fs::write(format!("/sys/block/zram{number}/disksize"), bytes.to_string())?;
        Ok(zram)
    }

    /// The device.
    pub fn path(&self) -> &Path {
        &self.device
    }
}

impl Drop for Zram {
    fn drop(&mut self) {
        let number = self.number.to_string();
        patiently(&format!("/dev/zram{number}"), || {
            std::fs::write(format!("/sys/block/zram{number}/reset"), "1")?;
            Ok(std::fs::write("/sys/class/zram-control/hot_remove", &number)?)
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_filled_is_recognised_and_damage_is_found() {
        let path = std::env::temp_dir().join(format!("blockferry-perf-content-{}", std::process::id()));
        let bytes = 11 << 20;
        for content in [Content::Random(1), Content::SameFilled(1), Content::Tenth(1), Content::Half(1)] {
            let _ = std::fs::remove_file(&path);
            make_file(&path, bytes).unwrap();
            if content.fill(&path, bytes).is_err() {
                // A folder for temporary files whose filesystem refuses O_DIRECT.
                continue;
            }
            content.check(&path, bytes).unwrap();
            let other = OpenOptions::new().write(true).read(true).open(&path).unwrap();
            let mut page = [0; PAGE];
            other.read_exact_at(&mut page, 4096).unwrap();
            other.write_all_at(&page, 8192).unwrap();
            other.sync_all().unwrap();
            assert!(content.check(&path, bytes).is_err(), "{content:?}: a page in a wrong place");
        }
        let _ = std::fs::remove_file(&path);
        let pages = |content: Content| {
            let mut chunk = vec![0; 2 * PAGE];
            content.template(&mut chunk);
            content.stamp(&mut chunk, 0);
            chunk
        };
        assert_ne!(pages(Content::Random(1)), pages(Content::Random(2)));
        assert_ne!(pages(Content::SameFilled(1)), pages(Content::SameFilled(2)));
    }
}
