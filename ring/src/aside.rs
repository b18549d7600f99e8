//! Control calls that may wait for a disk, made where nobody waits for them.
//!
//! Opening, asking for facts, changing a length, looking for holes: each is a system call that the kernel may answer at
//! once or after the disk has been asked. While somebody is served ([`Ring::serve`]) such a call goes to the offload
//! pool, and everybody else goes on. A program that serves nobody has nothing to do meanwhile: there the call is made in
//! place, and no thread is started for it.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;

use crate::backend::{Backend, FileInfo, FileKind, LockRange, OpenHow};
use crate::core::Core;
use crate::errno::Errno;
use crate::limits;
use crate::op::{File, FileId};
use crate::ring::Ring;
use crate::uring::sys;

/// A part of a file, as its filesystem keeps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileExtent {
    /// Where it begins.
    pub start: u64,
    /// Where it ends.
    pub end: u64,
    /// Nothing is kept for it: it reads as zeroes.
    pub is_hole: bool,
}

/// Somebody is served while this lives.
pub struct Serving(Rc<Core>);

impl std::fmt::Debug for Serving {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Serving")
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.serving.set(self.0.serving.get() - 1);
    }
}

/// The control calls of a ring, made aside.
#[derive(Clone, Debug)]
pub struct Aside {
    ring: Ring,
    in_place: bool,
}

impl Ring {
    /// Says that somebody is served, who must not wait for this thread: what may wait for a disk is done elsewhere.
    pub fn serve(&self) -> Serving {
        self.0.serving.set(self.0.serving.get() + 1);
        Serving(self.0.clone())
    }

    /// Whether somebody is served.
    pub fn is_serving(&self) -> bool {
        self.0.serving.get() > 0
    }

    /// The control calls that may wait for a disk.
    pub fn aside(&self) -> Aside {
        Aside { ring: self.clone(), in_place: false }
    }

    /// The same calls, made in place whoever is served: none of them is ever pending ([`crate::sync::at_once`]).
    pub fn in_place(&self) -> Aside {
        Aside { ring: self.clone(), in_place: true }
    }
}

impl Aside {
    /// `call` is for the kernel, `here` for a backend that knows no other thread, and for when nobody is served.
    async fn run<T: Send + 'static>(
        &self,
        call: impl FnOnce() -> Result<T, Errno> + Send + 'static,
        here: impl FnOnce(&mut dyn Backend) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let core = &self.ring.0;
        if self.ring.is_serving() && !self.in_place {
            if core.backend.borrow().is_kernel() {
                return self.ring.offload(call).await?;
            }
            self.ring.offload(|| ()).await?;
        }
        let mut backend = core.backend.borrow_mut();
        here(&mut **backend)
    }

    async fn with_file<T: Send + 'static>(
        &self,
        file: &File,
        call: impl FnOnce(&OwnedFd) -> Result<T, Errno> + Send + 'static,
        here: impl FnOnce(&mut dyn Backend, FileId) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let id = file.id();
        // The pool holds it open by itself, should the future be dropped.
        let handle = self.ring.0.backend.borrow().handle(id);
        let call = move || handle.map_or(Err(Errno::EBADF), |fd| call(&fd));
        self.run(call, |backend| here(backend, id)).await
    }

    /// Opens a file or block device.
    pub async fn open(&self, path: &Path, how: &OpenHow) -> Result<File, Errno> {
        enum Opened {
            Fd(OwnedFd),
            File(FileId),
        }
        let (there, its_how) = (path.to_owned(), how.clone());
        let opened = self
            .run(
                move || sys::open(&there, &its_how).map(Opened::Fd),
                |backend| backend.open(path, how).map(Opened::File),
            )
            .await?;
        match opened {
            Opened::Fd(fd) => self.ring.adopt(fd),
            Opened::File(id) => Ok(self.ring.wrap(id)),
        }
    }

    /// Facts about an open file.
    pub async fn info(&self, file: &File) -> Result<FileInfo, Errno> {
        self.with_file(file, sys::info, |backend, id| backend.info(id)).await
    }

    /// Sets the length of a regular file.
    pub async fn set_len(&self, file: &File, len: u64) -> Result<(), Errno> {
        self.with_file(file, move |fd| sys::set_len(fd, len), |backend, id| backend.set_len(id, len)).await
    }

    /// Holes and data between `from` and `to`, which lies within the file: as many extents as one call may look for, at
    /// least one where there is something.
    pub async fn extents(
        &self,
        file: &File,
        from: u64,
        to: u64,
        extents_max: usize,
    ) -> Result<Vec<FileExtent>, Errno> {
        let max = extents_max.clamp(1, limits::EXTENTS_A_CALL);
        self.with_file(
            file,
            move |fd| sys::extents(fd, from, to, max),
            |backend, id| look(from, to, max, |at, data| backend.seek(id, at, data), || false),
        )
        .await
    }

    /// Who holds locks in the range, as far as can be known (pid, program); `None`: nobody was found in time.
    pub async fn lock_holders(&self, file: &File, range: LockRange) -> Option<Vec<(u32, String)>> {
        let found = self.with_file(
            file,
            move |fd| Ok(sys::lock_holders(sys::info(fd)?.identity, range, fd.as_raw_fd())),
            |backend, id| Ok(backend.lock_holders(id, range)),
        );
        found.await.unwrap_or(Some(Vec::new()))
    }

    /// Reads an extended attribute.
    pub async fn get_attribute(&self, file: &File, name: &str) -> Result<Option<Vec<u8>>, Errno> {
        let its_name = name.to_owned();
        self.with_file(
            file,
            move |fd| sys::get_attribute(fd, &its_name),
            |backend, id| backend.get_attribute(id, name),
        )
        .await
    }

    /// Sets or removes an extended attribute.
    pub async fn set_attribute(&self, file: &File, name: &str, value: Option<&[u8]>) -> Result<(), Errno> {
        let (its_name, its_value) = (name.to_owned(), value.map(<[u8]>::to_vec));
        self.with_file(
            file,
            move |fd| sys::set_attribute(fd, &its_name, its_value.as_deref()),
            |backend, id| backend.set_attribute(id, name, value),
        )
        .await
    }

    /// Removes a directory entry.
    pub async fn unlink(&self, path: &Path) -> Result<(), Errno> {
        let there = path.to_owned();
        self.run(move || sys::unlink(&there), |backend| backend.unlink(path)).await
    }

    /// Renames, replacing what is there.
    pub async fn rename(&self, from: &Path, to: &Path) -> Result<(), Errno> {
        self.rename_with(from, to, true).await
    }

    /// Renames, unless the new name is taken (EEXIST).
    pub async fn rename_new(&self, from: &Path, to: &Path) -> Result<(), Errno> {
        self.rename_with(from, to, false).await
    }

    async fn rename_with(&self, from: &Path, to: &Path, replace: bool) -> Result<(), Errno> {
        let (there, then) = (from.to_owned(), to.to_owned());
        let call = move || sys::rename(&there, &then, replace);
        self.run(call, |backend| backend.rename(from, to, replace)).await
    }

    /// Makes the entries of a directory durable.
    pub async fn sync_directory(&self, path: &Path) -> Result<(), Errno> {
        let there = path.to_owned();
        self.run(move || sys::sync_directory(&there), |backend| backend.sync_directory(path)).await
    }

    /// Whether a path exists, and what it is.
    pub async fn lookup(&self, path: &Path) -> Result<Option<FileKind>, Errno> {
        let there = path.to_owned();
        self.run(move || sys::lookup(&there), |backend| backend.lookup(path)).await
    }
}

/// Looks for holes and data between `from` and `to` by means of `seek`, until there are `max` extents or `enough` says
/// so. A later failure ends the list: whoever asks for the rest meets it first.
pub(crate) fn look(
    from: u64,
    to: u64,
    max: usize,
    mut seek: impl FnMut(u64, bool) -> Result<u64, Errno>,
    mut enough: impl FnMut() -> bool,
) -> Result<Vec<FileExtent>, Errno> {
    let mut extents = Vec::new();
    let mut at = from;
    while at < to && extents.len() < max {
        let mut next = || -> Result<[FileExtent; 2], Errno> {
            let data = match seek(at, true) {
                // Nothing but a hole up to the end.
                Err(Errno::ENXIO) => to,
                found => found?.min(to),
            };
            let end = if data < to { seek(data, false)?.min(to) } else { to };
            if data < at || end < data || data < to && end == data {
                // It changed between the two calls, or the filesystem makes no sense.
                return Err(Errno::EAGAIN);
            }
            let hole = FileExtent { start: at, end: data, is_hole: true };
            Ok([hole, FileExtent { start: data, end, is_hole: false }])
        };
        match next() {
            Ok(found) => {
                extents.extend(found.into_iter().filter(|extent| extent.start < extent.end));
                at = found[1].end;
            }
            Err(errno) if extents.is_empty() => return Err(errno),
            Err(_) => break,
        }
        if enough() {
            break;
        }
    }
    extents.truncate(max);
    Ok(extents)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Blocks of 10 bytes, data where there is a letter; ends like a file.
    fn seek(map: &'static str) -> impl FnMut(u64, bool) -> Result<u64, Errno> {
        move |at, data| {
            let len = 10 * map.len() as u64;
            if at >= len {
                return Err(Errno::ENXIO);
            }
            let is_data = |at: u64| map.as_bytes()[(at / 10) as usize] != b' ';
            match (at..len).find(|at| is_data(*at) == data) {
                Some(found) => Ok(found),
                None if data => Err(Errno::ENXIO),
                None => Ok(len),
            }
        }
    }

    fn text(extents: &[FileExtent]) -> String {
        let word = |e: &FileExtent| format!("{}{}..{}", if e.is_hole { "-" } else { "+" }, e.start, e.end);
        extents.iter().map(word).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn extents_have_their_true_borders() {
        let all = |from, to, max| text(&look(from, to, max, seek("ab  c "), || false).unwrap());
        assert_eq!(all(0, 60, 9), "+0..20 -20..40 +40..50 -50..60");
        assert_eq!(all(5, 45, 9), "+5..20 -20..40 +40..45", "within what was asked for");
        assert_eq!(all(25, 60, 9), "-25..40 +40..50 -50..60");
        assert_eq!(all(0, 60, 2), "+0..20 -20..40");
        assert_eq!(all(25, 60, 1), "-25..40");
        assert_eq!(
            text(&look(0, 60, 9, seek("ab  c "), || true).unwrap()),
            "+0..20",
            "it has taken its time"
        );
    }

    #[test]
    fn what_makes_no_sense_is_an_error_and_not_an_extent() {
        let nonsense = |at, data| if data { Ok(at) } else { Ok(5) };
        assert_eq!(look(7, 60, 9, nonsense, || false), Err(Errno::EAGAIN));
        let mut calls = 0;
        let late = |at, data| {
            calls += 1;
            if calls > 2 { Err(Errno::EIO) } else { seek("a a")(at, data) }
        };
        assert_eq!(text(&look(0, 30, 9, late, || false).unwrap()), "+0..10", "what was found before");
        assert_eq!(look(0, 30, 9, |_, _| Err(Errno::EIO), || false), Err(Errno::EIO));
    }
}
