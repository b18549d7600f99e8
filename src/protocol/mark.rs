//! The mark on the target of a job: "what is in here is not complete".
//!
//! It is set, durably, before the first byte of the target changes, and taken away, durably, after the
//! last flush. Whatever happens in between (a crash, a power cut, somebody who copies the file away), the
//! target tells what it is.
//!
//! # Where it is
//! * On a regular file: the extended attribute `user.blockferry.state`, which stays with the file under
//!   any name.
//! * Where there are no such attributes (some filesystems, block devices, other machines): a file in the
//!   state directory. For a regular file its name comes from device and inode number; for all else from
//!   the name under which the target was opened, so use names that stay (`/dev/disk/by-id/...`).
//! * Without a state directory such a target is an error: an unmarked target is one that lies.
//! * Memory is gone with the program and needs no mark.
//!
//! Its content is a line of JSON ([`MarkInfo`]). A content that cannot be read is a mark nonetheless.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use blockferry_ring::{Errno, File, FileKind, OpenHow, Ring};

use crate::block::{BlockError, Driver, IoResult, Operation};

/// The extended attribute.
const ATTRIBUTE: &str = "user.blockferry.state";
/// Where a system's own programs keep what they must remember.
const STATE_DIR_SYSTEM: &str = "/var/lib/blockferry";
/// Bytes of a mark, at most: what every filesystem with attributes takes.
const MARK_BYTES_MAX: usize = 4096;
/// Bytes of a name in a mark; more is cut off.
const NAME_BYTES_MAX: usize = 1024;

/// What a mark says.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MarkInfo {
    /// `incomplete`; other words may come from later versions.
    pub state: String,
    /// What kind of job: `mirror`, ….
    pub job: String,
    /// What was copied, as the user named it.
    pub source: String,
    /// When it began, in seconds since 1970 (UTC).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started: Option<u64>,
    /// What was copied to, where the mark does not stand on the target itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
}

impl MarkInfo {
    /// The mark of an unfinished target of a `job`.
    pub fn incomplete(job: &str, source: &str) -> MarkInfo {
        MarkInfo {
            state: "incomplete".into(),
            job: job.into(),
            source: cut(source),
            started: None,
            target: None,
        }
    }

    /// With the time at which it began, in seconds since 1970 (UTC).
    pub fn started(mut self, unix_secs: u64) -> MarkInfo {
        self.started = Some(unix_secs);
        self
    }

    fn from_bytes(bytes: &[u8]) -> MarkInfo {
        serde_json::from_slice(bytes).unwrap_or_else(|_| MarkInfo {
            state: "unreadable".into(),
            ..MarkInfo::incomplete("an unknown job", "an unknown source")
        })
    }

    fn to_bytes(&self) -> Vec<u8> {
        // Strings and a number: there is nothing that could fail.
        serde_json::to_vec(self).unwrap_or_default()
    }
}

impl std::fmt::Display for MarkInfo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}, {} of {}", self.state, self.job, self.source)
    }
}

fn cut(name: &str) -> String {
    let mut end = name.len().min(NAME_BYTES_MAX);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    name[..end].to_owned()
}

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
}

/// What can carry a mark.
enum Carrier {
    /// Nothing needs to.
    Nothing,
    /// The file itself, or a note under this name.
    File(File, String),
    /// A note under this name.
    Note(String),
}

fn carrier(ring: &Ring, driver: &Rc<dyn Driver>) -> Result<Carrier, Errno> {
    let mut bottom = driver.clone();
    while let Some(child) = bottom.children().first().cloned() {
        bottom = child;
    }
    if matches!(bottom.kind(), "mem" | "null") {
        return Ok(Carrier::Nothing);
    }
    let by_name = || note_name(bottom.kind(), bottom.name().as_bytes());
    let Some(file) = driver.local_file() else { return Ok(Carrier::Note(by_name())) };
    let info = ring.info(&file)?;
    if info.kind != FileKind::Regular {
        return Ok(Carrier::Note(by_name()));
    }
    let (device, inode) = info.identity;
    Ok(Carrier::File(file, note_name("file", format!("{device}:{inode}").as_bytes())))
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
        TargetMark { ring: ring.clone(), driver, state_dir, info }
    }

    /// The ring on which it is set.
    pub fn ring(&self) -> &Ring {
        &self.ring
    }

    /// Whether the mark of this target has to go to a state directory.
    pub fn needs_state_dir(ring: &Ring, driver: &Rc<dyn Driver>) -> bool {
        match carrier(ring, driver) {
            Ok(Carrier::Nothing) => false,
            Ok(Carrier::File(file, _)) => ring.get_attribute(&file, ATTRIBUTE).is_err_and(is_no_attribute),
            Ok(Carrier::Note(_)) | Err(_) => true,
        }
    }

    /// Sets the mark. It is durable when this returns.
    pub async fn set(&self) -> IoResult {
        let fail = |errno| self.fail(errno, "The mark of an unfinished target could not be set");
        let name = match carrier(&self.ring, &self.driver).map_err(fail)? {
            Carrier::Nothing => return Ok(()),
            Carrier::File(file, name) => {
                let value = self.info.to_bytes();
                match self.ring.set_attribute(&file, ATTRIBUTE, Some(&value)) {
                    Ok(()) => return self.ring.sync(&file, false).await.map(drop).map_err(fail),
                    Err(errno) if is_no_attribute(errno) => name,
                    Err(errno) => return Err(fail(errno)),
                }
            }
            Carrier::Note(name) => name,
        };
        let Some(dir) = &self.state_dir else {
            return Err(self.fail(
                Errno::EOPNOTSUPP,
                "An unfinished target has to be marked, and this one cannot carry a mark itself: name a \
                 directory for it (--state-dir)",
            ));
        };
        let mut info = self.info.clone();
        info.target = Some(cut(self.driver.name()));
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
        match self.ring.unlink(&new) {
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(errno) => return Err(errno),
        }
        let how = OpenHow { write: true, create_new: true, ..OpenHow::default() };
        let file = self.ring.open(&new, &how)?;
        let bytes = &bytes[..bytes.len().min(MARK_BYTES_MAX)];
        let mut buf = self.ring.alloc(bytes.len().max(1)).await;
        buf.copy_from(0, bytes);
        self.ring.write(&file, 0, buf.freeze(), false).await?;
        self.ring.sync(&file, false).await?;
        self.ring.rename(&new, &path)?;
        self.ring.sync_directory(dir)
    }

    /// Takes the mark away, wherever it is. That is durable when this returns. No mark is no error.
    pub async fn clear(&self) -> IoResult {
        let fail = |errno| {
            self.fail(errno, "The mark could not be taken away: the target still counts as unfinished")
        };
        let (name, carries) = match carrier(&self.ring, &self.driver).map_err(fail)? {
            Carrier::Nothing => return Ok(()),
            Carrier::File(file, name) => match self.ring.set_attribute(&file, ATTRIBUTE, None) {
                Ok(()) => {
                    self.ring.sync(&file, false).await.map_err(fail)?;
                    (name, true)
                }
                Err(errno) if is_no_attribute(errno) => (name, false),
                Err(errno) => return Err(fail(errno)),
            },
            Carrier::Note(name) => (name, false),
        };
        let Some(dir) = &self.state_dir else { return Ok(()) };
        match self.ring.unlink(&dir.join(name)) {
            Ok(()) => self.ring.sync_directory(dir).map_err(fail),
            Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(()),
            Err(errno) if carries && is_no_entry(errno) => Ok(()),
            Err(errno) => Err(fail(errno)),
        }
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
        let (name, carries) = match carrier(ring, driver).map_err(fail)? {
            Carrier::Nothing => return Ok(None),
            Carrier::File(file, name) => match ring.get_attribute(&file, ATTRIBUTE) {
                Ok(Some(bytes)) => return Ok(Some(MarkInfo::from_bytes(&bytes))),
                // There is one, and it is none of ours.
                Err(Errno::ERANGE) => return Ok(Some(MarkInfo::from_bytes(b""))),
                Ok(None) => (name, true),
                Err(errno) if is_no_attribute(errno) => (name, false),
                Err(errno) => return Err(fail(errno)),
            },
            Carrier::Note(name) => (name, false),
        };
        let Some(dir) = state_dir else { return Ok(None) };
        let file = match ring.open(&dir.join(name), &OpenHow::default()) {
            Ok(file) => file,
            Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(None),
            Err(errno) if carries && is_no_entry(errno) => return Ok(None),
            Err(errno) => return Err(fail(errno)),
        };
        let (buf, n) = ring.read(&file, 0, ring.alloc(MARK_BYTES_MAX).await).await;
        let n = n.map_err(fail)? as usize;
        Ok(Some(MarkInfo::from_bytes(&buf.as_slice()[..n])))
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
