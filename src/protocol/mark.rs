//! The mark on the target of a job: "what is in here is not complete". And that on a disk whose clients have gone on, on
//! another one: "what is in here is old".
//!
//! The first is set, durably, before the first byte of the target changes, and taken away, durably, after the
//! last flush. Whatever happens in between (a crash, a power cut, somebody who copies the file away), the
//! target tells what it is. A target that is no copy in the end keeps a mark that says so.
//!
//! # Where it is
//! * On a regular file: the extended attribute `user.blockferry.state`, which stays with the file under
//!   any name.
//! * Where there are no such attributes (some filesystems, block devices, other machines): a note, a file in the
//!   state directory. For a regular file its name comes from device and inode number; for a block device from its serial
//!   number, or from its number in the kernel where it has none; for all else from the name under which the target was
//!   opened.
//! * A note may be about another disk by now: numbers of devices and names on servers are given anew. A note about a
//!   device says which disk it was; where that does not tell, and for names on servers, what is read is
//!   [doubtful](MarkInfo::doubtful): it is worth a warning, and no more.
//! * Without a state directory such a target is an error: an unmarked target is one that lies.
//! * Memory is gone with the program and needs no mark.
//!
//! Its content is a line of JSON ([`MarkInfo`]). A content that cannot be read is a mark nonetheless.

mod info;

use std::cell::Cell;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use blockferry_ring::sync::at_once;
use blockferry_ring::{Aside, Errno, File, FileKind, OpenHow, Ring};

use crate::block::{BlockError, Driver, IoResult, Operation};
use info::cut;
pub use info::{MarkInfo, MarkState, MarkedDevice};

/// The extended attribute.
const ATTRIBUTE: &str = "user.blockferry.state";
/// Where a system's own programs keep what they must remember.
const STATE_DIR_SYSTEM: &str = "/var/lib/blockferry";
/// Bytes of a mark, at most: what every filesystem with attributes takes.
const MARK_BYTES_MAX: usize = 4096;
/// The state directory when none is named: the system's for root, else the user's own
/// (`$XDG_STATE_HOME`, which is `~/.local/state` when unset). Who uses it makes it.
pub fn default_state_dir(is_root: bool, state_home: Option<&OsStr>, home: Option<&OsStr>) -> Option<PathBuf> {
    if is_root {
        return Some(STATE_DIR_SYSTEM.into());
    }
    let base = match state_home {
        Some(dir) if Path::new(dir).is_absolute() => PathBuf::from(dir),
        _ => Path::new(home.filter(|home| !home.is_empty())?).join(".local/state"),
    };
    Some(base.join("blockferry"))
}

/// The mark of one target.
#[derive(Debug)]
pub struct TargetMark {
    ring: Ring,
    driver: Rc<dyn Driver>,
    state_dir: Option<PathBuf>,
    info: MarkInfo,
    /// What takes its place when the job has completed.
    at_end: Option<MarkInfo>,
    /// How far the job was when that was last noted.
    done: Cell<Option<(u64, u64)>>,
}

/// What a note is about.
enum About {
    File,
    Device(MarkedDevice),
    /// Whatever goes by that name.
    Name,
}

/// What can carry a mark.
enum Carrier {
    /// Nothing needs to.
    Nothing,
    /// The file itself, or a note under this name.
    File(File, String),
    /// A note under this name, about this device, or about something that only has a name.
    Note(String, Option<MarkedDevice>),
}

async fn carrier(ring: &Ring, aside: &Aside, driver: &Rc<dyn Driver>) -> Result<Carrier, Errno> {
    let mut bottom = driver.clone();
    while let Some(child) = bottom.children().first().cloned() {
        bottom = child.node().driver().clone();
    }
    if matches!(bottom.kind(), "mem" | "null") {
        return Ok(Carrier::Nothing);
    }
    let by_name = || Carrier::Note(note_name(bottom.kind(), bottom.name().as_bytes()), None);
    let Some(file) = driver.local_file() else { return Ok(by_name()) };
    let info = aside.info(&file).await?;
    match (info.kind, info.device) {
        (FileKind::Regular, _) => {
            let (device, inode) = info.identity;
            Ok(Carrier::File(file, note_name("file", format!("{device}:{inode}").as_bytes())))
        }
        (_, Some((major, minor))) => {
            let device = MarkedDevice::new(ring.device_identity(&file)?);
            let key = device.serial.clone().unwrap_or_else(|| format!("{major}:{minor}"));
            Ok(Carrier::Note(note_name("device", key.as_bytes()), Some(device)))
        }
        _ => Ok(by_name()),
    }
}

/// Which disk that is, whatever it is called, as far as this machine can tell.
pub fn identity_of(ring: &Ring, driver: &Rc<dyn Driver>) -> Option<String> {
    match at_once(carrier(ring, &ring.in_place(), driver))?.ok()? {
        Carrier::Nothing => None,
        Carrier::File(file, _) => {
            let (device, inode) = ring.info(&file).ok()?.identity;
            Some(format!("file {device}:{inode}"))
        }
        Carrier::Note(_, Some(device)) => Some(match (device.serial, device.sequence, device.boot) {
            (Some(serial), _, _) => format!("device {serial}"),
            (None, Some(sequence), Some(boot)) => format!("device {sequence} of boot {boot}"),
            _ => return None,
        }),
        Carrier::Note(_, None) => Some(cut(driver.name())),
    }
}

fn note_name(kind: &str, key: &[u8]) -> String {
    format!("{kind}-{}.json", &blake3::hash(key).to_hex()[..24])
}

/// Whether the file cannot carry an attribute, rather than failing at it.
fn is_no_attribute(errno: Errno) -> bool {
    errno.is_unsupported()
        || matches!(errno, Errno::EPERM | Errno::EACCES | Errno::ENOSPC | Errno::EDQUOT | Errno::ERANGE)
}

/// Whether a state directory is closed to this user: one who took another's place (`setpriv`, `su`) often
/// has the other's HOME. A target that carries marks itself has none there.
fn is_no_entry(errno: Errno) -> bool {
    matches!(errno, Errno::EACCES | Errno::EPERM)
}

impl TargetMark {
    /// The mark of `driver`, with what it will say. Nothing happens yet.
    pub fn new(
        ring: &Ring,
        driver: Rc<dyn Driver>,
        state_dir: Option<PathBuf>,
        info: MarkInfo,
    ) -> TargetMark {
        TargetMark { ring: ring.clone(), driver, state_dir, info, at_end: None, done: Cell::new(None) }
    }

    /// The mark that takes its place when the job has completed: for a target that is no whole copy then.
    pub fn ending_as(self, at_end: Option<MarkInfo>) -> TargetMark {
        TargetMark { at_end, ..self }
    }

    /// The ring on which it is set.
    pub fn ring(&self) -> &Ring {
        &self.ring
    }

    /// Whether the mark of this target has to go to a state directory.
    pub fn needs_state_dir(ring: &Ring, driver: &Rc<dyn Driver>) -> bool {
        match at_once(carrier(ring, &ring.in_place(), driver)).unwrap_or(Err(Errno::EAGAIN)) {
            Ok(Carrier::Nothing) => false,
            Ok(Carrier::File(file, _)) => ring.get_attribute(&file, ATTRIBUTE).is_err_and(is_no_attribute),
            Ok(Carrier::Note(..)) | Err(_) => true,
        }
    }

    /// Sets the mark. It is durable when this returns.
    pub async fn set(&self) -> IoResult {
        self.put(&self.info, true).await
    }

    /// Sets the mark so that whoever looks sees it. A power cut may still take it away.
    pub async fn set_soon(&self) -> IoResult {
        self.put(&self.info, false).await
    }

    /// Makes durable what [`TargetMark::set_soon`] did, and does not set it again.
    pub async fn settle(&self) -> IoResult {
        let Some(file) = self.driver.local_file() else { return Ok(()) };
        let synced = self.ring.sync(&file, false).await;
        synced.map(drop).map_err(|errno| self.fail(errno, "The mark could not be made durable"))
    }

    /// What the job leaves when it has completed: no mark, or that which says what the target is.
    pub async fn complete(&self) -> IoResult {
        match &self.at_end {
            Some(info) => self.put(info, true).await,
            None => self.clear().await,
        }
    }

    /// Notes on the mark how far the job is: `done` bytes of `of`. What is not marked stays so. A power cut may take it away.
    pub async fn note(&self, done: u64, of: u64) -> IoResult {
        if self.is_set().await? {
            self.done.set(Some((done, of)));
            self.put(&self.info, false).await?;
        }
        Ok(())
    }

    async fn put(&self, info: &MarkInfo, durably: bool) -> IoResult {
        let fail = |errno| self.fail(errno, "The mark of an unfinished target could not be set");
        let mut info = info.clone();
        info.done = self.done.get().or(info.done);
        let (name, device) = match carrier(&self.ring, &self.ring.aside(), &self.driver)
            .await
            .map_err(fail)?
        {
            Carrier::Nothing => return Ok(()),
            Carrier::File(file, name) => {
                match self.ring.aside().set_attribute(&file, ATTRIBUTE, Some(&info.to_bytes())).await {
                    Ok(()) if durably => return self.ring.sync(&file, false).await.map(drop).map_err(fail),
                    Ok(()) => return Ok(()),
                    Err(errno) if is_no_attribute(errno) => (name, None),
                    Err(errno) => return Err(fail(errno)),
                }
            }
            Carrier::Note(name, device) => (name, device),
        };
        let Some(dir) = &self.state_dir else {
            return Err(self.fail(
                Errno::EOPNOTSUPP,
                "An unfinished target has to be marked, and this one cannot carry a mark itself: name a \
                 directory for it (--state-dir)",
            ));
        };
        if info.kind() != MarkState::Superseded {
            info.target = Some(cut(self.driver.name()));
        }
        info.device = device;
        self.write_note(dir, &name, &info.to_bytes()).await.map_err(|errno| {
            let hint = format!(
                "The mark of an unfinished target could not be written to the state directory '{}' (it has \
                 to exist)",
                dir.display()
            );
            self.fail(errno, &hint)
        })
    }

    async fn write_note(&self, dir: &Path, name: &str, bytes: &[u8]) -> Result<(), Errno> {
        let (path, new) = (dir.join(name), dir.join(format!("{name}.new")));
        match self.ring.aside().unlink(&new).await {
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(errno) => return Err(errno),
        }
        let how = OpenHow { write: true, create_new: true, ..OpenHow::default() };
        let file = self.ring.aside().open(&new, &how).await?;
        let bytes = &bytes[..bytes.len().min(MARK_BYTES_MAX)];
        let mut buf = self.ring.alloc(bytes.len().max(1)).await;
        buf.copy_from(0, bytes);
        self.ring.write(&file, 0, buf.freeze(), false).await?;
        self.ring.sync(&file, false).await?;
        self.ring.aside().rename(&new, &path).await?;
        self.ring.aside().sync_directory(dir).await
    }

    /// Takes the mark away, wherever it is. That is durable when this returns. No mark is no error.
    pub async fn clear(&self) -> IoResult {
        let fail = |errno| {
            self.fail(errno, "The mark could not be taken away: the target still counts as unfinished")
        };
        let (name, carries) =
            match carrier(&self.ring, &self.ring.aside(), &self.driver).await.map_err(fail)? {
                Carrier::Nothing => return Ok(()),
                Carrier::File(file, name) => {
                    match self.ring.aside().set_attribute(&file, ATTRIBUTE, None).await {
                        Ok(()) => {
                            self.ring.sync(&file, false).await.map_err(fail)?;
                            (name, true)
                        }
                        Err(errno) if is_no_attribute(errno) => (name, false),
                        Err(errno) => return Err(fail(errno)),
                    }
                }
                Carrier::Note(name, _) => (name, false),
            };
        let Some(dir) = &self.state_dir else { return Ok(()) };
        match self.ring.aside().unlink(&dir.join(name)).await {
            Ok(()) => self.ring.aside().sync_directory(dir).await.map_err(fail),
            Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(()),
            Err(errno) if carries && is_no_entry(errno) => Ok(()),
            Err(errno) => Err(fail(errno)),
        }
    }

    /// The mark that a file on this machine carries itself, if it has one: nothing has to be waited for.
    pub fn read_own(ring: &Ring, driver: &Rc<dyn Driver>) -> Option<MarkInfo> {
        let file = driver.local_file()?;
        let bytes = ring.get_attribute(&file, ATTRIBUTE).ok()??;
        Some(MarkInfo::from_bytes(&bytes))
    }

    /// Whether the target is marked, by this mark or another.
    pub async fn is_set(&self) -> Result<bool, BlockError> {
        Ok(TargetMark::read(&self.ring, &self.driver, self.state_dir.as_deref()).await?.is_some())
    }

    /// The mark of a disk, if it has one.
    pub async fn read(
        ring: &Ring,
        driver: &Rc<dyn Driver>,
        state_dir: Option<&Path>,
    ) -> Result<Option<MarkInfo>, BlockError> {
        let fail = |errno| {
            BlockError::new(Operation::Read, driver.name(), errno)
                .hint("Whether it is marked as unfinished cannot be told.")
        };
        let (name, about, carries) = match carrier(ring, &ring.aside(), driver).await.map_err(fail)? {
            Carrier::Nothing => return Ok(None),
            Carrier::File(file, name) => match ring.aside().get_attribute(&file, ATTRIBUTE).await {
                Ok(Some(bytes)) => return Ok(Some(MarkInfo::from_bytes(&bytes))),
                // There is one, and it is none of ours.
                Err(Errno::ERANGE) => return Ok(Some(MarkInfo::from_bytes(b""))),
                Ok(None) => (name, About::File, true),
                Err(errno) if is_no_attribute(errno) => (name, About::File, false),
                Err(errno) => return Err(fail(errno)),
            },
            Carrier::Note(name, Some(device)) => (name, About::Device(device), false),
            Carrier::Note(name, None) => (name, About::Name, false),
        };
        let Some(dir) = state_dir else { return Ok(None) };
        let file = match ring.aside().open(&dir.join(name), &OpenHow::default()).await {
            Ok(file) => file,
            Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(None),
            Err(errno) if carries && is_no_entry(errno) => return Ok(None),
            Err(errno) => return Err(fail(errno)),
        };
        let (buf, n) = ring.read(&file, 0, ring.alloc(MARK_BYTES_MAX).await).await;
        let n = n.map_err(fail)? as usize;
        let info = MarkInfo::from_bytes(&buf.as_slice()[..n]);
        let doubtful = match about {
            About::File => false,
            About::Device(now) => !info.device.as_ref().is_some_and(|then| then.is(&now)),
            About::Name => true,
        };
        Ok(Some(MarkInfo { doubtful, ..info }))
    }

    fn fail(&self, errno: Errno, hint: &str) -> BlockError {
        BlockError::new(Operation::Write, self.driver.name(), errno).hint(format!("{hint}."))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::{Capabilities, Extent, IoFuture, Limits, Permissions, WriteFlags, ZeroFlags};
    use crate::protocol::{FileDriver, MemDriver, OpenOptions};
    use blockferry_ring::{Buf, Config, SharedBuf};

    /// Something on another machine: no file here.
    #[derive(Debug)]
    struct Remote(Ring);

    impl Driver for Remote {
        fn kind(&self) -> &'static str {
            "nbd"
        }
        fn name(&self) -> &str {
            "nbd://far/away"
        }
        fn len(&self) -> u64 {
            0
        }
        fn is_read_only(&self) -> bool {
            false
        }
        fn limits(&self) -> Limits {
            Limits::default()
        }
        fn capabilities(&self) -> Capabilities {
            Capabilities::default()
        }
        fn read(&self, _: u64, buf: Buf) -> IoFuture<'_, (Buf, IoResult)> {
            self.0.boxed(async { (buf, Ok(())) })
        }
        fn write(&self, _: u64, _: SharedBuf, _: WriteFlags) -> IoFuture<'_, IoResult> {
            self.flush()
        }
        fn flush(&self) -> IoFuture<'_, IoResult> {
            self.0.boxed(async { Ok(()) })
        }
        fn discard(&self, _: u64, _: u64) -> IoFuture<'_, IoResult> {
            self.flush()
        }
        fn write_zeroes(&self, _: u64, _: u64, _: ZeroFlags) -> IoFuture<'_, IoResult> {
            self.flush()
        }
        fn block_status(&self, _: u64, len: u64) -> IoFuture<'_, Result<Extent, BlockError>> {
            self.0.boxed(async move { Ok(Extent::data(len)) })
        }
        fn set_permissions(&self, _: Permissions) -> IoResult {
            Ok(())
        }
        fn set_len(&self, _: u64) -> IoFuture<'_, IoResult> {
            self.flush()
        }
    }

    fn run<F: Future<Output = ()> + 'static>(test: impl FnOnce(Ring) -> F) {
        let ring = Ring::new(&Config { arena_bytes: 1 << 20, ..Config::default() }).expect("a ring");
        ring.block_on(test(ring.clone()));
    }

    #[test]
    fn a_file_carries_its_mark_under_any_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.img");
        std::fs::write(&path, [0; 4096]).unwrap();
        run(async move |r| {
            let options = OpenOptions::default();
            let open = |path: &Path| Rc::new(FileDriver::open(&r, path, &options).unwrap()) as Rc<dyn Driver>;
            let file = open(&path);
            assert!(!TargetMark::needs_state_dir(&r, &file));
            assert_eq!(TargetMark::read(&r, &file, None).await.unwrap(), None);
            let info = MarkInfo::incomplete("mirror", "/source.img").started(1_700_000_000);
            let mark = TargetMark::new(&r, file.clone(), None, info.clone());
            mark.set().await.unwrap();
            mark.set().await.unwrap();
            let moved = path.with_extension("moved");
            std::fs::rename(&path, &moved).unwrap();
            let other = open(&moved);
            assert_eq!(TargetMark::read(&r, &other, None).await.unwrap(), Some(info));
            mark.clear().await.unwrap();
            mark.clear().await.unwrap();
            assert_eq!(TargetMark::read(&r, &other, None).await.unwrap(), None);
            // Whatever somebody else has put there is a mark.
            let file = other.local_file().unwrap();
            r.set_attribute(&file, ATTRIBUTE, Some(b"what is this")).unwrap();
            let read = TargetMark::read(&r, &other, None).await.unwrap().unwrap();
            assert_eq!(read.state, "unreadable");
        });
    }

    #[test]
    fn what_cannot_carry_a_mark_needs_a_state_directory() {
        let dir = tempfile::tempdir().unwrap();
        run(async move |r| {
            let far: Rc<dyn Driver> = Rc::new(Remote(r.clone()));
            assert!(TargetMark::needs_state_dir(&r, &far));
            let info = MarkInfo::incomplete("mirror", &"ü".repeat(5000));
            let mark = TargetMark::new(&r, far.clone(), None, info.clone());
            let error = mark.set().await.unwrap_err().to_string();
            assert!(error.contains("--state-dir") && error.contains("nbd://far/away"), "{error}");

            let state = dir.path().join("state");
            let mark = TargetMark::new(&r, far.clone(), Some(state.clone()), info.clone());
            let error = mark.set().await.unwrap_err().to_string();
            assert!(error.contains("it has to exist"), "{error}");
            std::fs::create_dir(&state).unwrap();
            // What a crash has left behind is in nobody's way.
            mark.set().await.unwrap();
            let note = std::fs::read_dir(&state).unwrap().next().unwrap().unwrap().path();
            std::fs::write(note.with_extension("json.new"), "half").unwrap();
            mark.set().await.unwrap();
            assert_eq!(std::fs::read_dir(&state).unwrap().count(), 1);
            let read = TargetMark::read(&r, &far, Some(&state)).await.unwrap().unwrap();
            assert_eq!((read.target.as_deref(), read.source.len()), (Some("nbd://far/away"), 1024));
            assert_eq!(TargetMark::read(&r, &far, Some(dir.path())).await.unwrap(), None);
            mark.clear().await.unwrap();
            mark.clear().await.unwrap();
            assert_eq!(std::fs::read_dir(&state).unwrap().count(), 0);
            assert_eq!(TargetMark::read(&r, &far, Some(&state)).await.unwrap(), None);
        });
    }

    #[test]
    fn memory_needs_no_mark() {
        run(async move |r| {
            let mem: Rc<dyn Driver> = Rc::new(MemDriver::new(&r, "mem", 512, false));
            assert!(!TargetMark::needs_state_dir(&r, &mem));
            let mark = TargetMark::new(&r, mem, None, MarkInfo::incomplete("mirror", "x"));
            mark.set().await.unwrap();
            mark.clear().await.unwrap();
        });
    }

    #[test]
    fn the_state_directory_has_a_usual_place() {
        let os = |text: &'static str| Some(OsStr::new(text));
        assert_eq!(default_state_dir(true, None, None), Some("/var/lib/blockferry".into()));
        assert_eq!(default_state_dir(false, os("/s"), os("/h")), Some("/s/blockferry".into()));
        assert_eq!(default_state_dir(false, os("s"), os("/h")), Some("/h/.local/state/blockferry".into()));
        assert_eq!(default_state_dir(false, None, os("")), None);
    }
}
