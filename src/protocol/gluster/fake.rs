//! A client library for tests that does wrong what real ones have been seen to do wrong. How a file misbehaves is said by
//! its name; calls end on threads of their own.

#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::api::{Api, Attributes, Callback, Fd, Fs};

/// Bytes of every file.
pub(super) const LEN: usize = 1 << 20;

/// Connections that were made.
pub(super) static MADE: AtomicU32 = AtomicU32::new(0);

struct File {
    name: String,
    may_write: bool,
    /// The first, the second...
    number: u64,
    bytes: Mutex<Vec<u8>>,
    syncs: AtomicU32,
    /// Where the latest write began, and the latest that the bricks have.
    written: AtomicU64,
    stored: AtomicU64,
}

impl File {
    fn is(&self, name: &str) -> bool {
        self.name == name
    }
}

fn fail(errno: i32) -> isize {
    // SAFETY: the place of this thread's own number.
    unsafe { *libc::__errno_location() = errno };
    -1
}

/// # Safety
/// `fd` is what `open` gave, and nobody has closed it.
unsafe fn file<'a>(fd: *mut Fd) -> &'a File {
    // SAFETY: files are leaked boxes: they live for ever.
    unsafe { &*fd.cast::<File>() }
}

/// Ends a call later, on a thread of its own.
fn end(
    fd: *mut Fd,
    callback: Callback,
    data: *mut c_void,
    work: impl FnOnce() -> isize + Send + 'static,
) -> c_int {
    struct Sent(*mut Fd, *mut c_void);
    // SAFETY: the file is one that any thread may use; the data is for the callback, wherever it runs.
    unsafe impl Send for Sent {}
    let sent = Sent(fd, data);
    std::thread::spawn(move || {
        let Sent(fd, data) = { sent };
        let result = work();
        let nothing = std::ptr::null_mut();
        // SAFETY: the callback of whoever started the call, with its data, once.
        unsafe { callback(fd, result, nothing, nothing, data) };
    });
    0
}

unsafe extern "C" fn new(_: *const c_char) -> *mut Fs {
    MADE.fetch_add(1, Ordering::SeqCst);
    std::ptr::NonNull::dangling().as_ptr()
}

unsafe extern "C" fn set_volfile_server(
    _: *mut Fs,
    _: *const c_char,
    host: *const c_char,
    _: c_int,
) -> c_int {
    // SAFETY: the caller's C string.
    let host = unsafe { CStr::from_ptr(host) };
    if host == c"nobody" { fail(libc::EINVAL) as c_int } else { 0 }
}

unsafe extern "C" fn set_logging(_: *mut Fs, _: *const c_char, _: c_int) -> c_int {
    0
}

unsafe extern "C" fn set_xlator_option(
    _: *mut Fs,
    _: *const c_char,
    _: *const c_char,
    _: *const c_char,
) -> c_int {
    0
}

unsafe extern "C" fn init(_: *mut Fs) -> c_int {
    0
}

unsafe extern "C" fn fini(_: *mut Fs) -> c_int {
    0
}

unsafe extern "C" fn open(_: *mut Fs, path: *const c_char, flags: c_int) -> *mut Fd {
    static OPENED: AtomicU64 = AtomicU64::new(0);
    // SAFETY: the caller's C string.
    let name = unsafe { CStr::from_ptr(path) }.to_string_lossy().into_owned();
    let file = File {
        name,
        may_write: flags & libc::O_RDWR != 0,
        number: OPENED.fetch_add(1, Ordering::SeqCst),
        bytes: Mutex::new(vec![0xaa; LEN]),
        syncs: AtomicU32::new(0),
        written: AtomicU64::new(u64::MAX),
        stored: AtomicU64::new(u64::MAX),
    };
    Box::into_raw(Box::new(file)).cast()
}

unsafe extern "C" fn creat(fs: *mut Fs, path: *const c_char, flags: c_int, _: libc::mode_t) -> *mut Fd {
    // SAFETY: as this function's own caller promises.
    unsafe { open(fs, path, flags) }
}

unsafe extern "C" fn unlink(_: *mut Fs, _: *const c_char) -> c_int {
    0
}

unsafe extern "C" fn close(_: *mut Fd) -> c_int {
    0
}

unsafe extern "C" fn fstat(fd: *mut Fd, stat: *mut libc::stat) -> c_int {
    // SAFETY: the caller's file, and room for the answer.
    unsafe {
        let file = file(fd);
        (*stat).st_ino = if file.is("replaced") { file.number } else { 1 };
        (*stat).st_mode = libc::S_IFREG | 0o600;
        (*stat).st_size = LEN as i64;
    }
    0
}

unsafe extern "C" fn stat(_: *mut Fs, path: *const c_char, stat: *mut libc::stat) -> c_int {
    // SAFETY: the caller's C string.
    let name = unsafe { CStr::from_ptr(path) };
    if name == c"removed" {
        return fail(libc::ENOENT) as c_int;
    }
    if name == c"unreachable" {
        return fail(libc::ENOTCONN) as c_int;
    }
    // SAFETY: room for the answer.
    unsafe {
        (*stat).st_ino = if name == c"exchanged" { 2 } else { 1 };
        (*stat).st_mode = libc::S_IFREG | 0o600;
        (*stat).st_size = if name == c"cut" { 4096 } else { LEN as i64 };
    }
    0
}

unsafe extern "C" fn lseek(fd: *mut Fd, offset: libc::off_t, whence: c_int) -> libc::off_t {
    // SAFETY: an open file.
    let file = unsafe { file(fd) };
    let at_end = offset == LEN as i64;
    match whence {
        libc::SEEK_END => LEN as i64,
        libc::SEEK_DATA if at_end && file.is("seek-unknown") => offset,
        libc::SEEK_DATA if at_end => fail(libc::ENXIO) as i64,
        libc::SEEK_DATA if file.is("all-hole") => fail(libc::ENXIO) as i64,
        libc::SEEK_DATA if file.is("behind") => match file.stored.load(Ordering::SeqCst) {
            stored if stored < LEN as u64 && stored as i64 >= offset => stored as i64,
            _ => fail(libc::ENXIO) as i64,
        },
        libc::SEEK_DATA if file.is("seek-backwards") => offset - 1,
        libc::SEEK_DATA => offset,
        _ if file.is("seek-nowhere") => offset,
        _ => LEN as i64,
    }
}

unsafe extern "C" fn ftruncate(_: *mut Fd, _: libc::off_t, _: Attributes, _: Attributes) -> c_int {
    0
}

unsafe extern "C" fn fallocate(_: *mut Fd, _: c_int, _: libc::off_t, _: usize) -> c_int {
    0
}

unsafe extern "C" fn fsync(_: *mut Fd, _: Attributes, _: Attributes) -> c_int {
    0
}

unsafe extern "C" fn pread_async(
    fd: *mut Fd,
    buf: *mut c_void,
    count: usize,
    offset: libc::off_t,
    _: c_int,
    callback: Callback,
    data: *mut c_void,
) -> c_int {
    // SAFETY: an open file.
    let file = unsafe { file(fd) };
    if file.is("not-started") {
        return fail(libc::ENOTCONN) as c_int;
    }
    let buf = buf.expose_provenance();
    end(fd, callback, data, move || {
        let end = if file.is("ends-early") { 5000 } else { LEN };
        let from = (offset as usize).min(end);
        let mut n = count.min(end - from);
        if file.is("short-read") {
            n = n.div_ceil(2);
        }
        let bytes = file.bytes.lock().unwrap();
        // SAFETY: the caller's memory is `count` bytes, its own until the callback.
        unsafe {
            let buf = std::ptr::with_exposed_provenance_mut::<u8>(buf);
            std::ptr::copy_nonoverlapping(bytes[from..from + n].as_ptr(), buf, n);
        }
        match file.name.as_str() {
            "read-fails" => fail(libc::ESTALE),
            "goes-bad" => fail(libc::EBADFD),
            _ => n as isize,
        }
    })
}

unsafe extern "C" fn pwrite_async(
    fd: *mut Fd,
    buf: *const c_void,
    count: c_int,
    offset: libc::off_t,
    _: c_int,
    callback: Callback,
    data: *mut c_void,
) -> c_int {
    // SAFETY: an open file.
    let file = unsafe { file(fd) };
    // SAFETY: the caller's memory is `count` bytes.
    let from = unsafe { std::slice::from_raw_parts(buf.cast::<u8>(), count as usize) }.to_vec();
    end(fd, callback, data, move || {
        if !file.may_write {
            return fail(libc::EBADF);
        }
        let n = match file.name.as_str() {
            "short-write" => from.len() / 2,
            "empty-write" => 0,
            _ => from.len(),
        };
        let at = offset as usize;
        file.bytes.lock().unwrap()[at..at + n].copy_from_slice(&from[..n]);
        file.written.store(at as u64, Ordering::SeqCst);
        n as isize
    })
}

unsafe extern "C" fn fsync_async(fd: *mut Fd, callback: Callback, data: *mut c_void) -> c_int {
    // SAFETY: an open file.
    let file = unsafe { file(fd) };
    end(fd, callback, data, move || {
        // It fails once, and then claims that all is well.
        let is_first = file.syncs.fetch_add(1, Ordering::SeqCst) == 0;
        file.stored.store(file.written.load(Ordering::SeqCst), Ordering::SeqCst);
        if file.is("flush-fails") && is_first { fail(libc::EIO) } else { 0 }
    })
}

unsafe extern "C" fn discard_async(
    fd: *mut Fd,
    offset: libc::off_t,
    len: usize,
    callback: Callback,
    data: *mut c_void,
) -> c_int {
    // SAFETY: an open file.
    let file = unsafe { file(fd) };
    end(fd, callback, data, move || zero(file, offset as usize, len))
}

unsafe extern "C" fn zerofill_async(
    fd: *mut Fd,
    offset: libc::off_t,
    len: libc::off_t,
    callback: Callback,
    data: *mut c_void,
) -> c_int {
    // SAFETY: an open file.
    let file = unsafe { file(fd) };
    end(fd, callback, data, move || zero(file, offset as usize, len as usize))
}

fn zero(file: &File, at: usize, len: usize) -> isize {
    if file.is("no-zeroes") {
        return fail(libc::EOPNOTSUPP);
    }
    file.bytes.lock().unwrap()[at..at + len].fill(0);
    0
}

/// The library.
pub(super) static FAKE: Api = Api {
    new,
    set_volfile_server,
    set_logging,
    set_xlator_option,
    init,
    fini,
    open,
    creat,
    unlink,
    close,
    stat,
    fstat,
    lseek,
    ftruncate,
    fallocate,
    fsync,
    pread_async,
    pwrite_async,
    fsync_async,
    discard_async,
    zerofill_async,
};
