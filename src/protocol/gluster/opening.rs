//! Opening an image on GlusterFS: the calls block, and go to the offload pool; nobody waits longer for them than anybody
//! would, whatever the bricks do, and what fails is told with what a person may do about it.

use std::rc::Rc;

use blockferry_ring::sync::{Either, either};
use blockferry_ring::{Errno, Ring};

use super::allocation::can_tell;
use super::api::Api;
use super::connection::Connection;
use super::file::{FileFacts, OpenFile};
use super::options::Logging;
use super::uri::Image;
use crate::base::limits::{DISK_LEN_MAX, GLUSTER_OPEN_NS_MAX, GLUSTER_OPEN_TOLD_NS};
use crate::base::units::fmt_duration;
use crate::block::{BlockError, Operation};

/// How to open an image.
#[derive(Clone, Debug)]
pub struct OpenHow {
    /// The image.
    pub image: Image,
    /// libgfapi's log.
    pub logging: Logging,
    /// Nothing will be written.
    pub read_only: bool,
    /// Make the file, which must not exist.
    pub create: bool,
}

/// What was found by opening.
pub(super) struct Opened {
    pub(super) file: OpenFile,
    pub(super) facts: FileFacts,
    pub(super) len: u64,
    pub(super) can_tell: bool,
}

/// Why opening failed, and what a person may do.
fn open_hint(image: &Image, errno: Errno, connecting: bool) -> String {
    let servers: Vec<_> = image.servers.iter().map(|server| format!("failed on {server}")).collect();
    let (volume, path) = (&image.volume, &image.path);
    if connecting {
        let why = servers.join("; ");
        return format!(
            "The connection for volume '{volume}' (path '{path}') could not be made: {why}. Is there a started volume of \
             this name, and does it let this machine in (auth.allow, server.allow-insecure)? libgfapi's log says more"
        );
    }
    match errno {
        Errno::ENOENT => format!("There is no '{path}' on the volume '{volume}'"),
        Errno::EEXIST => format!("There is a '{path}' on the volume '{volume}' already"),
        Errno::EACCES | Errno::EPERM => format!("The volume '{volume}' does not let this user open '{path}'"),
        Errno::EROFS => format!("The volume '{volume}' is read-only; open the image read-only too"),
        _ => format!("It is '{path}' on the volume '{volume}' that was to be opened"),
    }
}

/// What failed: an errno, a sentence, and whether that was at making the connection.
struct Failed {
    errno: Errno,
    hint: String,
}

fn open_blocking(how: &OpenHow, api: Option<&'static Api>) -> Result<Opened, Failed> {
    let no_library = |hint: &str| Failed { errno: Errno::ENOSYS, hint: hint.to_owned() };
    let api = match api {
        Some(api) => api,
        None => Api::get().map_err(no_library)?,
    };
    let failed = |errno, connecting| Failed { errno, hint: open_hint(&how.image, errno, connecting) };
    let connection =
        Connection::shared(api, &how.image, &how.logging).map_err(|errno| failed(errno, true))?;
    let path = &how.image.path;
    let file = match how.create {
        true => OpenFile::create(&connection, path),
        false => OpenFile::open(&connection, path, !how.read_only),
    };
    let opened = file.and_then(look).map_err(|errno| failed(errno, false))?;
    if !opened.facts.is_regular {
        return Err(Failed { errno: Errno::EINVAL, hint: format!("'{path}' is no regular file") });
    }
    if opened.len > DISK_LEN_MAX {
        return Err(Failed { errno: Errno::EFBIG, hint: format!("It has {} bytes", opened.len) });
    }
    Ok(opened)
}

/// Looks at an open file. The client opens a file on the bricks as late as it can: what a brick says to that comes here.
fn look(file: OpenFile) -> Result<Opened, Errno> {
    let facts = file.facts()?;
    // A directory has no cursor to move, and is refused by whoever called.
    let len = if facts.is_regular { file.seek(0, libc::SEEK_END)? } else { 0 };
    let can_tell = facts.is_regular && can_tell(file.seek(len, libc::SEEK_DATA));
    Ok(Opened { file, facts, len, can_tell })
}

/// Opens, for so long as anybody would wait.
pub(super) async fn open_in_time(
    ring: &Ring,
    name: &Rc<str>,
    how: &OpenHow,
    api: Option<&'static Api>,
) -> Result<Opened, BlockError> {
    let operation = if how.create { Operation::Create } else { Operation::Open };
    let fail = |errno, hint: String| BlockError::new(operation, name.clone(), errno).hint(hint);
    let there = how.clone();
    let mut opening = std::pin::pin!(ring.offload(move || open_blocking(&there, api)));
    let told = async {
        ring.sleep(GLUSTER_OPEN_TOLD_NS).await;
        tracing::warn!(
            image = %name,
            "GlusterFS has not let this client in so far. Its bricks may be down, or reject the client: look at the volume's \
             auth.allow, auth.reject and TLS, and at the library's log. It is waited for, for {}",
            fmt_duration(GLUSTER_OPEN_NS_MAX)
        );
        ring.sleep(GLUSTER_OPEN_NS_MAX - GLUSTER_OPEN_TOLD_NS).await;
    };
    let opened = match either(opening.as_mut(), told).await {
        Either::First(Ok(opened)) => opened,
        Either::First(Err(errno)) => return Err(fail(errno, "The offload pool failed".into())),
        // The call itself goes on; what it opens is closed again when its result is dropped.
        Either::Second(()) => {
            return Err(fail(Errno::ETIMEDOUT, open_hint(&how.image, Errno::ETIMEDOUT, true)));
        }
    };
    opened.map_err(|failed| fail(failed.errno, format!("{}.", failed.hint)))
}
