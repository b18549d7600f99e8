//! One open file of a volume, as safe calls: those that block, for the offload pool, and those that end later, on a thread
//! of the library, for the ring ([`blockferry_ring::Completer`]).
//!
//! # Memory contract
//! The memory of an asynchronous call belongs to the ring's operation until the callback has put its completion on the
//! ring's list; the callback does nothing else, and never calls the library. The same operation keeps the file open.

#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};
use std::ptr::NonNull;
use std::sync::Arc;

use blockferry_ring::{Completer, Errno, Mem};

use super::api::{Attributes, Fd};
use super::connection::{Connection, c_string, check, latest_errno};

/// Access of a new file: its owner's.
const MODE: libc::mode_t = 0o600;

/// An open file. It is closed by who drops it last, which blocks.
#[derive(Debug)]
pub(super) struct OpenFile {
    connection: Arc<Connection>,
    fd: NonNull<Fd>,
}

// SAFETY: the library's handles may be used from any thread; it locks inside.
unsafe impl Send for OpenFile {}
// SAFETY: as above.
unsafe impl Sync for OpenFile {}

/// Facts about a file.
#[derive(Clone, Copy, Debug)]
pub(super) struct FileFacts {
    pub(super) allocated: u64,
    /// The volume's number and the file's on it.
    pub(super) identity: (u64, u64),
    pub(super) is_regular: bool,
    pub(super) len: u64,
}

impl FileFacts {
    fn ask(call: impl FnOnce(*mut libc::stat) -> c_int) -> Result<FileFacts, Errno> {
        let mut stat = std::mem::MaybeUninit::<libc::stat>::zeroed();
        check(call(stat.as_mut_ptr()))?;
        // SAFETY: all zeroes are a valid `stat`, and the call has filled it.
        let stat = unsafe { stat.assume_init() };
        Ok(FileFacts {
            allocated: u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512),
            identity: (stat.st_dev, stat.st_ino),
            is_regular: stat.st_mode & libc::S_IFMT == libc::S_IFREG,
            len: u64::try_from(stat.st_size).unwrap_or(0),
        })
    }
}

// What blocks.

impl OpenFile {
    pub(super) fn open(connection: &Arc<Connection>, path: &str, write: bool) -> Result<OpenFile, Errno> {
        let flags = if write { libc::O_RDWR } else { libc::O_RDONLY };
        let path = c_string(path)?;
        // SAFETY: the connection lives, the path is a C string.
        OpenFile::of(connection, unsafe { (connection.api.open)(connection.fs(), path.as_ptr(), flags) })
    }

    /// Makes a file, which must not exist.
    pub(super) fn create(connection: &Arc<Connection>, path: &str) -> Result<OpenFile, Errno> {
        let flags = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL;
        let path = c_string(path)?;
        // SAFETY: as for `open`.
        OpenFile::of(connection, unsafe {
            (connection.api.creat)(connection.fs(), path.as_ptr(), flags, MODE)
        })
    }

    fn of(connection: &Arc<Connection>, fd: *mut Fd) -> Result<OpenFile, Errno> {
        let fd = NonNull::new(fd).ok_or_else(latest_errno)?;
        Ok(OpenFile { connection: connection.clone(), fd })
    }

    /// Which connection it is on.
    #[cfg(test)]
    pub(super) fn connection_address(&self) -> usize {
        Arc::as_ptr(&self.connection).addr()
    }

    pub(super) fn facts(&self) -> Result<FileFacts, Errno> {
        // SAFETY: the file is open, and there is room for the answer.
        FileFacts::ask(|stat| unsafe { (self.connection.api.fstat)(self.fd.as_ptr(), stat) })
    }

    /// Facts about whatever has this name now, which need not be this file. It is not opened for that: closing it would take
    /// away the error of a write that failed behind the writer's back, so that the next flush would not tell of it.
    pub(super) fn facts_by_name(&self, path: &str) -> Result<FileFacts, Errno> {
        let (connection, path) = (&self.connection, c_string(path)?);
        // SAFETY: the connection lives, the path is a C string, and there is room for the answer.
        FileFacts::ask(|stat| unsafe { (connection.api.stat)(connection.fs(), path.as_ptr(), stat) })
    }

    /// Moves the file's one cursor: not by two at once.
    pub(super) fn seek(&self, offset: u64, whence: c_int) -> Result<u64, Errno> {
        let offset = libc::off_t::try_from(offset).map_err(|_| Errno::EINVAL)?;
        // SAFETY: the file is open.
        let at = unsafe { (self.connection.api.lseek)(self.fd.as_ptr(), offset, whence) };
        u64::try_from(at).map_err(|_| latest_errno())
    }

    pub(super) fn set_len(&self, len: u64) -> Result<(), Errno> {
        let len = libc::off_t::try_from(len).map_err(|_| Errno::EFBIG)?;
        let nothing = std::ptr::null_mut();
        // SAFETY: the file is open; attributes that nobody wants may be null.
        check(unsafe { (self.connection.api.ftruncate)(self.fd.as_ptr(), len, nothing, nothing) })
    }

    /// Makes what was written durable.
    pub(super) fn sync(&self) -> Result<(), Errno> {
        let nothing = std::ptr::null_mut();
        // SAFETY: as for `set_len`.
        check(unsafe { (self.connection.api.fsync)(self.fd.as_ptr(), nothing, nothing) })
    }

    /// Sets room aside.
    pub(super) fn allocate(&self, offset: u64, len: u64) -> Result<(), Errno> {
        let offset = libc::off_t::try_from(offset).map_err(|_| Errno::EFBIG)?;
        let len = usize::try_from(len).map_err(|_| Errno::EFBIG)?;
        // SAFETY: the file is open.
        check(unsafe { (self.connection.api.fallocate)(self.fd.as_ptr(), 1, offset, len) })
    }
}

/// Removes a file.
pub(super) fn unlink(connection: &Connection, path: &str) -> Result<(), Errno> {
    let path = c_string(path)?;
    // SAFETY: the connection lives, the path is a C string.
    check(unsafe { (connection.api.unlink)(connection.fs(), path.as_ptr()) })
}

impl Drop for OpenFile {
    fn drop(&mut self) {
        // SAFETY: this is the file's last user: operations in flight hold it.
        let _ = unsafe { (self.connection.api.close)(self.fd.as_ptr()) };
    }
}

// What ends later.

/// Ends an operation on a thread of the library.
///
/// # Safety
/// `data` is a leaked `Box<Completer>` that nobody else takes back.
unsafe extern "C" fn ended(_: *mut Fd, result: isize, _: Attributes, _: Attributes, data: *mut c_void) {
    let errno = latest_errno();
    // SAFETY: the library hands back, once, what `start` gave it.
    let completer = unsafe { Box::from_raw(data.cast::<Completer>()) };
    completer.complete(u32::try_from(result).map_err(|_| if result < 0 { errno } else { Errno::EOVERFLOW }));
}

/// Starts a call, which takes over what ends the operation; when it could not be started, that ends it here.
fn start(completer: Completer, call: impl FnOnce(*mut c_void) -> c_int) {
    let data = Box::into_raw(Box::new(completer));
    if call(data.cast()) < 0 {
        let errno = latest_errno();
        // SAFETY: a call that could not be started never comes to its callback.
        let completer = unsafe { Box::from_raw(data) };
        completer.complete(Err(errno));
    }
}

fn offset_of(offset: u64) -> libc::off_t {
    // Disks end below `DISK_LEN_MAX`: the offset fits.
    libc::off_t::try_from(offset).unwrap_or(libc::off_t::MAX)
}

impl OpenFile {
    /// Reads into memory that belongs to the completer's operation.
    pub(super) fn start_read(&self, offset: u64, mem: Mem, completer: Completer) {
        start(completer, |data| {
            // SAFETY: the file is open and the memory is the operation's until its completion, which `ended` gives. The
            // operation holds both.
            unsafe {
                (self.connection.api.pread_async)(
                    self.fd.as_ptr(),
                    mem.as_ptr().cast(),
                    mem.len(),
                    offset_of(offset),
                    0,
                    ended,
                    data,
                )
            }
        });
    }

    /// Writes memory that belongs to the completer's operation.
    pub(super) fn start_write(&self, offset: u64, mem: Mem, completer: Completer) {
        start(completer, |data| {
            // SAFETY: as for `start_read`; buffers are no larger than 1 MiB, so the length fits.
            unsafe {
                (self.connection.api.pwrite_async)(
                    self.fd.as_ptr(),
                    mem.as_ptr().cast_const().cast(),
                    mem.len() as c_int,
                    offset_of(offset),
                    0,
                    ended,
                    data,
                )
            }
        });
    }

    pub(super) fn start_sync(&self, completer: Completer) {
        // SAFETY: the file is open; the operation holds it.
        start(completer, |data| unsafe { (self.connection.api.fsync_async)(self.fd.as_ptr(), ended, data) });
    }

    /// Gives space back; reads as zeroes afterwards.
    pub(super) fn start_discard(&self, offset: u64, len: u64, completer: Completer) {
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        // SAFETY: as for `start_sync`.
        start(completer, |data| unsafe {
            (self.connection.api.discard_async)(self.fd.as_ptr(), offset_of(offset), len, ended, data)
        });
    }

    /// Makes a range read as zeroes and keeps it allocated.
    pub(super) fn start_zeroes(&self, offset: u64, len: u64, completer: Completer) {
        // SAFETY: as for `start_sync`.
        start(completer, |data| unsafe {
            (self.connection.api.zerofill_async)(
                self.fd.as_ptr(),
                offset_of(offset),
                offset_of(len),
                ended,
                data,
            )
        });
    }
}
