//! The disks of a seed: a file driver of the engine, watched at the seam, on a file of the simulated world.
//!
//! [`Watched`] passes everything on. It counts what fails, so that a run can tell which faults it met, and
//! tells when a job flushes its target behind a shut door: that is the moment for a client to come.

use std::cell::{Cell, RefCell};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use blockferry::block::{
    BlockError, Capabilities, Driver, Extent, IoFuture, IoResult, Limits, Operation, Permissions, Resolved,
    WriteFlags, ZeroFlags,
};
use blockferry::graph::node::Node;
use blockferry::job::mirror::Marker;
use blockferry::protocol::mark::TargetMark;
use blockferry::protocol::nbd::NbdDriver;
use blockferry::protocol::open::{Cache, OpenOptions, open};
use blockferry_ring::sim::World;
use blockferry_ring::{Buf, File, Ring, SharedBuf};

use crate::counts::Counts;

/// The attribute that says that a target is not complete.
const ATTRIBUTE: &str = "user.blockferry.state";
/// Where the notes about those go that take no attribute.
pub const STATE_DIR: &str = "/state";

/// What a disk's failures are counted as: read, write, zeroes, flush.
const SOURCE_FAULTS: [&str; 4] = [
    "faults of source: read",
    "faults of source: write",
    "faults of source: zeroes",
    "faults of source: flush",
];
const TARGET_FAULTS: [&str; 4] = [
    "faults of target: read",
    "faults of target: write",
    "faults of target: zeroes",
    "faults of target: flush",
];

/// What is known of a driver by watching it.
#[derive(Debug, Default)]
pub struct Seam {
    pub is_target: Cell<bool>,
    pub flushes_failed: Cell<u64>,
    counts: RefCell<Counts>,
}

impl Seam {
    fn see<T>(&self, result: &Result<T, BlockError>) {
        let Err(error) = result else { return };
        let names = if self.is_target.get() { TARGET_FAULTS } else { SOURCE_FAULTS };
        let index = match error.operation {
            Operation::Write => 1,
            Operation::WriteZeroes | Operation::Discard => 2,
            Operation::Flush => {
                self.flushes_failed.set(self.flushes_failed.get() + 1);
                3
            }
            _ => 0,
        };
        self.counts.borrow_mut().add(names[index]);
    }
}

/// A driver that is watched.
#[derive(Debug)]
pub struct Watched {
    ring: Ring,
    inner: Rc<dyn Driver>,
    seam: Rc<Seam>,
}

impl Driver for Watched {
    fn kind(&self) -> &'static str {
        self.inner.kind()
    }

    fn name(&self) -> &str {
        self.inner.name()
    }

    fn len(&self) -> u64 {
        self.inner.len()
    }

    fn is_read_only(&self) -> bool {
        self.inner.is_read_only()
    }

    fn limits(&self) -> Limits {
        self.inner.limits()
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    fn read(&self, offset: u64, buf: Buf) -> IoFuture<'_, (Buf, IoResult)> {
        self.ring.boxed(async move {
            let (buf, result) = self.inner.read(offset, buf).await;
            self.seam.see(&result);
            (buf, result)
        })
    }

    fn write(&self, offset: u64, buf: SharedBuf, flags: WriteFlags) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async move {
            let result = self.inner.write(offset, buf, flags).await;
            self.seam.see(&result);
            result
        })
    }

    fn flush(&self) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async move {
            let result = self.inner.flush().await;
            self.seam.see(&result);
            result
        })
    }

    fn discard(&self, offset: u64, len: u64) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async move {
            let result = self.inner.discard(offset, len).await;
            self.seam.see(&result);
            result
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> IoFuture<'_, IoResult> {
        self.ring.boxed(async move {
            let result = self.inner.write_zeroes(offset, len, flags).await;
            self.seam.see(&result);
            result
        })
    }

    fn block_status(&self, offset: u64, len: u64) -> IoFuture<'_, Result<Extent, BlockError>> {
        self.inner.block_status(offset, len)
    }

    fn resolve(&self, offset: u64, len: u64) -> Resolved {
        self.inner.resolve(offset, len)
    }

    fn set_permissions(&self, permissions: Permissions) -> IoResult {
        self.inner.set_permissions(permissions)
    }

    fn local_file(&self) -> Option<File> {
        self.inner.local_file()
    }

    fn identity(&self) -> Option<(u64, u64)> {
        self.inner.identity()
    }

    fn set_len(&self, len: u64) -> IoFuture<'_, IoResult> {
        self.inner.set_len(len)
    }

    fn allocated_bytes(&self) -> Option<u64> {
        self.inner.allocated_bytes()
    }

    fn fail_in_flight(&self) {
        self.inner.fail_in_flight();
    }
}

/// A disk in use.
#[derive(Clone, Debug)]
pub struct Disk {
    pub path: Rc<str>,
    /// What the engine calls it.
    pub name: Rc<str>,
    pub node: Rc<Node>,
    pub seam: Rc<Seam>,
    /// It is reached over NBD: the socket, and the connection.
    pub remote: Option<(Rc<str>, Rc<NbdDriver>)>,
}

impl Disk {
    /// Opens the file at `path`.
    pub fn open(ring: &Ring, path: &str, buffered: bool) -> Result<Disk, BlockError> {
        let cache = if buffered { Cache::Buffered } else { Cache::Direct };
        let options = OpenOptions { cache, ..OpenOptions::default() };
        Ok(Disk::new(ring, path, open(ring, Path::new(path), &options)?, None))
    }

    /// The file at `path`, by way of a driver.
    pub fn new(
        ring: &Ring,
        path: &str,
        inner: Rc<dyn Driver>,
        remote: Option<(Rc<str>, Rc<NbdDriver>)>,
    ) -> Disk {
        let seam = Rc::new(Seam::default());
        let name = inner.name().into();
        let watched = Watched { ring: ring.clone(), inner, seam: seam.clone() };
        let node = Node::new(ring, path, Rc::new(watched));
        Disk { path: path.into(), name, node, seam, remote }
    }

    /// Nothing will ever go well on it again, though the world be healed: a flush has failed, or the connection is
    /// lost.
    pub fn is_beyond_help(&self) -> bool {
        let is_cut = self.remote.as_ref().is_some_and(|(_, driver)| driver.connection().lost().is_some());
        is_cut || self.seam.flushes_failed.get() > 0
    }

    /// Takes out what was counted.
    pub fn take_counts(&self) -> Counts {
        self.seam.counts.take()
    }
}

/// The engine's own mark, with a hook.
pub struct SimMarker {
    pub mark: TargetMark,
    /// Called when the mark is about to be removed: the door is shut then.
    pub before_unmark: Rc<dyn Fn()>,
}

impl std::fmt::Debug for SimMarker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SimMarker").field("mark", &self.mark).finish_non_exhaustive()
    }
}

impl Marker for SimMarker {
    fn mark(&self) -> IoFuture<'_, IoResult> {
        self.mark.mark()
    }

    fn unmark(&self) -> IoFuture<'_, IoResult> {
        (self.before_unmark)();
        self.mark.unmark()
    }

    fn note(&self, done: u64, of: u64) -> IoFuture<'_, IoResult> {
        Marker::note(&self.mark, done, of)
    }
}

/// Whether a disk is marked as unfinished: on itself, or by a note in the state directory.
pub fn is_marked(world: &World, disk: &Disk) -> bool {
    let Disk { path, name, .. } = disk;
    let note_is_about_it = |note: &PathBuf| {
        let len = world.len(note).unwrap_or(0) as usize;
        String::from_utf8_lossy(&world.read_live(note, 0, len)).contains(&format!("\"target\":\"{name}\""))
    };
    let is_note =
        |note: &&PathBuf| note.starts_with(STATE_DIR) && note.extension().is_some_and(|e| e == "json");
    // One that clients have left is old, and whole.
    let is_old = |mark: &Vec<u8>| String::from_utf8_lossy(mark).contains("\"state\":\"superseded\"");
    world.get_attribute(&**path, ATTRIBUTE).is_some_and(|mark| !is_old(&mark))
        || world.files().iter().filter(is_note).any(note_is_about_it)
}
