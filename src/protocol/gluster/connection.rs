//! Connections to volumes, shared by all images on the same one.
//!
//! What the library calls a `glfs_t` is a client of one volume: threads, connections to every brick, caches. Images on the
//! same volume share one. The volume's name alone does not say which that is, since two clusters may have volumes of the
//! same name: the servers are a part of the key. The last user closes it. Logging is as the first one said.
//!
//! Everything here blocks, and runs on the offload pool.

#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::os::unix::ffi::OsStrExt;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use blockferry_ring::Errno;

use super::api::{Api, Fs};
use super::options::Logging;
use super::uri::{Image, Server};

/// The levels of the library's log by their names, where layers take names; some levels have none.
const LEVELS: [&CStr; 10] = [
    c"NONE",
    c"CRITICAL",
    c"CRITICAL",
    c"CRITICAL",
    c"ERROR",
    c"WARNING",
    c"INFO",
    c"INFO",
    c"DEBUG",
    c"TRACE",
];

/// A client of one volume.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) api: &'static Api,
    fs: NonNull<Fs>,
}

// SAFETY: the library's handles may be used from any thread; it locks inside.
unsafe impl Send for Connection {}
// SAFETY: as above.
unsafe impl Sync for Connection {}

/// The place of one volume's connection: locked by who makes it, so that others wait for that one.
type Place = Arc<Mutex<Weak<Connection>>>;

/// Servers, volume, and (for tests, which have libraries of their own) the library's address.
type Key = (Vec<String>, String, usize);

static PLACES: Mutex<BTreeMap<Key, Place>> = Mutex::new(BTreeMap::new());

impl Connection {
    /// The connection to an image's volume: one that is there, or a new one.
    pub(super) fn shared(
        api: &'static Api,
        image: &Image,
        logging: &Logging,
    ) -> Result<Arc<Connection>, Errno> {
        let servers = image.servers.iter().map(ToString::to_string).collect();
        let key = (servers, image.volume.clone(), std::ptr::from_ref(api).addr());
        let place = {
            let mut places = PLACES.lock().unwrap_or_else(PoisonError::into_inner);
            // Places of connections that are gone, and that nobody is about to fill.
            places.retain(|_, place| {
                Arc::strong_count(place) > 1
                    || place.try_lock().map_or(true, |connection| connection.strong_count() > 0)
            });
            places.entry(key).or_default().clone()
        };
        let mut place = place.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(connection) = place.upgrade() {
            return Ok(connection);
        }
        let connection = Arc::new(Connection::new(api, image, logging)?);
        *place = Arc::downgrade(&connection);
        Ok(connection)
    }

    fn new(api: &'static Api, image: &Image, logging: &Logging) -> Result<Connection, Errno> {
        let volume = c_string(&image.volume)?;
        // SAFETY: the name is a C string, which the library copies.
        let fs = NonNull::new(unsafe { (api.new)(volume.as_ptr()) }).ok_or_else(latest_errno)?;
        let connection = Connection { api, fs };
        for server in &image.servers {
            let (transport, host, port) = match server {
                Server::Tcp { host, port } => (c"tcp", c_string(host)?, i32::from(*port)),
                Server::Unix { path } => {
                    let path = CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)?;
                    (c"unix", path, 0)
                }
            };
            // SAFETY: the handle is live, the names are C strings, which the library copies.
            check(unsafe { (api.set_volfile_server)(fs.as_ptr(), transport.as_ptr(), host.as_ptr(), port) })?;
        }
        let file = c_string(&logging.file)?;
        // SAFETY: as above.
        check(unsafe { (api.set_logging)(fs.as_ptr(), file.as_ptr(), i32::from(logging.level)) })?;
        // The volume's own settings would have its uppermost layer (which goes by the volume's name) log more than that.
        let level = LEVELS[usize::from(logging.level).min(LEVELS.len() - 1)];
        // SAFETY: as above.
        check(unsafe {
            (api.set_xlator_option)(fs.as_ptr(), volume.as_ptr(), c"log-level".as_ptr(), level.as_ptr())
        })?;
        // SAFETY: the handle is live, and nobody else has it yet.
        check(unsafe { (api.init)(fs.as_ptr()) })?;
        Ok(connection)
    }

    /// The handle, for calls of the library while this connection lives.
    pub(super) fn fs(&self) -> *mut Fs {
        self.fs.as_ptr()
    }
}

impl Drop for Connection {
    /// The library takes ten seconds to give a connection up (gluster/glusterfs#2606). Nothing is lost when nobody waits
    /// for that: files are closed before. So a thread of its own does it, and a program that ends meanwhile ends it.
    fn drop(&mut self) {
        let (api, fs) = (self.api, Handle(self.fs));
        let give_up = move || {
            let Handle(fs) = { fs };
            // SAFETY: this was the handle's last user: files hold the connection.
            let _ = unsafe { (api.fini)(fs.as_ptr()) };
        };
        if let Err(error) = std::thread::Builder::new().name("blockferry-fini".into()).spawn(give_up) {
            tracing::warn!(%error, "no thread could be started to close a connection to GlusterFS; it stays");
        }
    }
}

/// A handle on its way to another thread.
struct Handle(NonNull<Fs>);

// SAFETY: as for `Connection`.
unsafe impl Send for Handle {}

/// The number of the latest failure on this thread. The library sometimes fails without one.
pub(super) fn latest_errno() -> Errno {
    match Errno::from_io(&std::io::Error::last_os_error()) {
        Errno(0) => Errno::EINVAL,
        errno => errno,
    }
}

pub(super) fn check(result: i32) -> Result<(), Errno> {
    if result == 0 { Ok(()) } else { Err(latest_errno()) }
}

pub(super) fn c_string(text: &str) -> Result<CString, Errno> {
    CString::new(text).map_err(|_| Errno::EINVAL)
}
