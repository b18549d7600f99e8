//! libgfapi, loaded when it is first needed.
//!
//! GlusterFS's client library is not linked: a machine without it runs this program, and opening an image on GlusterFS
//! says what to install. A symbol is asked for with the version whose signature is written here. Since version 6 of the
//! library calls and callbacks tell the file's attributes before and after; the older versions of the same names, which a
//! plain look-up may give, take fewer arguments.
//!
//! Everything here may be called from any thread. What blocks says so in [`super::file`].

#![allow(unsafe_code)]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

/// A virtual mount, the library's `glfs_t`.
#[derive(Debug)]
#[repr(C)]
pub struct Fs {
    _opaque: [u8; 0],
}

/// An open file, the library's `glfs_fd_t`.
#[derive(Debug)]
#[repr(C)]
pub struct Fd {
    _opaque: [u8; 0],
}

/// Attributes before and after a call, the library's `struct glfs_stat`; nobody here looks into them.
pub type Attributes = *mut c_void;

/// What ends an asynchronous call, on a thread of the library. `errno` is that thread's.
pub type Callback = unsafe extern "C" fn(*mut Fd, isize, Attributes, Attributes, *mut c_void);

macro_rules! api {
    ($($name:ident: $symbol:literal @ $version:literal, fn($($arg:ty),*) -> $ret:ty;)*) => {
        /// The functions in use.
        #[derive(Clone, Copy)]
        pub struct Api {
            $(pub(super) $name: unsafe extern "C" fn($($arg),*) -> $ret,)*
        }

        impl Api {
            fn load(library: &Library) -> Result<Api, String> {
                Ok(Api {
                    $($name: {
                        let address = library.symbol($symbol, $version)?;
                        // SAFETY: the library's header declares the function of this name and version with this
                        // signature (`glfs.h` of GlusterFS 6 to 11), and the library is never unloaded.
                        unsafe {
                            std::mem::transmute::<
                                *mut c_void,
                                unsafe extern "C" fn($($arg),*) -> $ret,
                            >(address)
                        }
                    },)*
                })
            }
        }
    };
}

api! {
    new: c"glfs_new" @ c"GFAPI_3.4.0", fn(*const c_char) -> *mut Fs;
    set_volfile_server: c"glfs_set_volfile_server" @ c"GFAPI_3.4.0",
        fn(*mut Fs, *const c_char, *const c_char, c_int) -> c_int;
    set_logging: c"glfs_set_logging" @ c"GFAPI_3.4.0", fn(*mut Fs, *const c_char, c_int) -> c_int;
    set_xlator_option: c"glfs_set_xlator_option" @ c"GFAPI_3.4.0",
        fn(*mut Fs, *const c_char, *const c_char, *const c_char) -> c_int;
    init: c"glfs_init" @ c"GFAPI_3.4.0", fn(*mut Fs) -> c_int;
    fini: c"glfs_fini" @ c"GFAPI_3.4.0", fn(*mut Fs) -> c_int;
    open: c"glfs_open" @ c"GFAPI_3.4.0", fn(*mut Fs, *const c_char, c_int) -> *mut Fd;
    creat: c"glfs_creat" @ c"GFAPI_3.4.0", fn(*mut Fs, *const c_char, c_int, libc::mode_t) -> *mut Fd;
    unlink: c"glfs_unlink" @ c"GFAPI_3.4.0", fn(*mut Fs, *const c_char) -> c_int;
    close: c"glfs_close" @ c"GFAPI_3.4.0", fn(*mut Fd) -> c_int;
    stat: c"glfs_stat" @ c"GFAPI_3.4.0", fn(*mut Fs, *const c_char, *mut libc::stat) -> c_int;
    fstat: c"glfs_fstat" @ c"GFAPI_3.4.0", fn(*mut Fd, *mut libc::stat) -> c_int;
    lseek: c"glfs_lseek" @ c"GFAPI_3.4.0", fn(*mut Fd, libc::off_t, c_int) -> libc::off_t;
    ftruncate: c"glfs_ftruncate" @ c"GFAPI_6.0", fn(*mut Fd, libc::off_t, Attributes, Attributes) -> c_int;
    fallocate: c"glfs_fallocate" @ c"GFAPI_3.5.0", fn(*mut Fd, c_int, libc::off_t, usize) -> c_int;
    fsync: c"glfs_fsync" @ c"GFAPI_6.0", fn(*mut Fd, Attributes, Attributes) -> c_int;
    pread_async: c"glfs_pread_async" @ c"GFAPI_6.0",
        fn(*mut Fd, *mut c_void, usize, libc::off_t, c_int, Callback, *mut c_void) -> c_int;
    pwrite_async: c"glfs_pwrite_async" @ c"GFAPI_6.0",
        fn(*mut Fd, *const c_void, c_int, libc::off_t, c_int, Callback, *mut c_void) -> c_int;
    fsync_async: c"glfs_fsync_async" @ c"GFAPI_6.0", fn(*mut Fd, Callback, *mut c_void) -> c_int;
    discard_async: c"glfs_discard_async" @ c"GFAPI_6.0",
        fn(*mut Fd, libc::off_t, usize, Callback, *mut c_void) -> c_int;
    zerofill_async: c"glfs_zerofill_async" @ c"GFAPI_6.0",
        fn(*mut Fd, libc::off_t, libc::off_t, Callback, *mut c_void) -> c_int;
}

impl std::fmt::Debug for Api {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Api")
    }
}

/// The library's name, with the number of its binary interface.
const LIBRARY: &CStr = c"libgfapi.so.0";
const INSTALL: &str = "Install GlusterFS's client, version 6 or newer: on Debian and Ubuntu the packages libgfapi0 and \
                       glusterfs-common, on Fedora and RHEL glusterfs-api.";

impl Api {
    /// The library of this machine, loaded once; else why there is none, and what to do. Reads files: it may block.
    pub fn get() -> Result<&'static Api, &'static str> {
        static API: OnceLock<Result<Api, String>> = OnceLock::new();
        let load = || Library::open().and_then(|library| Api::load(&library));
        let api = API.get_or_init(|| load().map_err(|why| format!("{why}. {INSTALL}")));
        api.as_ref().map_err(String::as_str)
    }
}

/// A loaded library. It is never unloaded: its threads run on.
struct Library(*mut c_void);

impl Library {
    fn open() -> Result<Library, String> {
        // SAFETY: the name is a C string; what the library's own initialisers do is its business.
        let handle = unsafe { libc::dlopen(LIBRARY.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if handle.is_null() {
            return Err(format!("GlusterFS's client library cannot be loaded ({})", latest_error()));
        }
        let library = Library(handle);
        library.keep_openssl();
        Ok(library)
    }

    /// Has OpenSSL, which the library loads, keep what it has when the process ends. It would be thrown away by an exit
    /// handler, while threads of the library, and those that have called it, end too and throw their own parts of it away:
    /// one exit in two thousand crashed in there. It comes too late, and is not told so, where this process has used the
    /// same OpenSSL before.
    fn keep_openssl(&self) {
        type Init = unsafe extern "C" fn(u64, *const c_void) -> c_int;
        const NO_ATEXIT: u64 = 0x0008_0000;
        // SAFETY: the handle is an open library's, the name is a C string. Libraries that it needs are searched as well.
        let address = unsafe { libc::dlsym(self.0, c"OPENSSL_init_crypto".as_ptr()) };
        if address.is_null() {
            // Built without, or with OpenSSL 1.0, which has no such handler.
            return;
        }
        // SAFETY: `crypto.h` of OpenSSL 1.1.0 to 3 declares the function so; no settings are null.
        let done = unsafe { std::mem::transmute::<*mut c_void, Init>(address)(NO_ATEXIT, std::ptr::null()) };
        tracing::debug!(agreed = done == 1, "OpenSSL was told to keep what it has at exit");
    }

    fn symbol(&self, name: &CStr, version: &CStr) -> Result<*mut c_void, String> {
        // SAFETY: the handle is an open library's, the names are C strings.
        let address = unsafe { libc::dlvsym(self.0, name.as_ptr(), version.as_ptr()) };
        if address.is_null() {
            return Err(format!("GlusterFS's client library is too old ({})", latest_error()));
        }
        Ok(address)
    }
}

/// What the loader says of its latest failure on this thread.
fn latest_error() -> String {
    // SAFETY: the text is this thread's until its next call of the loader, and is copied before that.
    let text = unsafe {
        let text = libc::dlerror();
        (!text.is_null()).then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
    };
    text.unwrap_or_else(|| "the loader does not say why".into())
}
