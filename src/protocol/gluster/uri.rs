//! How a person names an image on a GlusterFS volume:
//! `gluster[+transport]://[server[:port]]/volname/image[?socket=...]`.
//!
//! The transport is `tcp` unless it is said; `unix` reaches the management daemon of this machine through its socket, which
//! `socket=` names then, and no server; `rdma` is what GlusterFS no longer has, and tcp is used in its place. Without a
//! server it is localhost, without a port 24007. An IPv6 address stands in brackets. Slashes before and behind the volume's
//! name count once, and what follows is the path of the image on the volume.
//!
//! The grammar is the one of QEMU's manual. What cannot be honoured is refused instead of ignored: user names, fragments,
//! other parameters.

use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::str::FromStr;

use crate::base::secret::without_secrets;
use crate::protocol::uri::{Escaped, Host, host_and_port, port_number, unescape};

/// The port of GlusterFS's management daemon.
pub const DEFAULT_PORT: u16 = 24007;
/// The server where none is named.
const DEFAULT_HOST: &str = "localhost";
/// Bytes of a Unix socket's path that the kernel takes, without the NUL behind it.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Where a management daemon listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Server {
    /// A TCP port.
    Tcp {
        /// A name or an address; IPv6 without brackets.
        host: String,
        /// The port.
        port: u16,
    },
    /// A Unix socket.
    Unix {
        /// Its path.
        path: PathBuf,
    },
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Server::Tcp { host, port } => write!(f, "host {host} and port {port}"),
            Server::Unix { path } => write!(f, "socket {}", path.display()),
        }
    }
}

/// An image on a volume. `Display` gives a name that parses back to the same value: a URI where there is one server, QEMU's
/// options as JSON where there are several.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Image {
    /// The servers that can tell of the volume, to be tried in this order; at least one.
    pub servers: Vec<Server>,
    /// The volume.
    pub volume: String,
    /// The path on it, without a slash at the front.
    pub path: String,
}

impl fmt::Display for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = |f: &mut fmt::Formatter<'_>| {
            let (volume, path) = (self.volume.as_bytes(), self.path.as_bytes());
            write!(f, "/{}/{}", Escaped(volume, b":@"), Escaped(path, b"/:@"))
        };
        match self.servers.as_slice() {
            [Server::Tcp { host, port }] => {
                write!(f, "gluster://{}", Host(host))?;
                if *port != DEFAULT_PORT {
                    write!(f, ":{port}")?;
                }
                place(f)
            }
            [Server::Unix { path }] => {
                write!(f, "gluster+unix://")?;
                place(f)?;
                write!(f, "?socket={}", Escaped(path.as_os_str().as_bytes(), b"/:@"))
            }
            several => {
                let servers: Vec<_> = several
                    .iter()
                    .map(|server| match server {
                        Server::Tcp { host, port } => {
                            serde_json::json!({"type": "inet", "host": host, "port": port.to_string()})
                        }
                        Server::Unix { path } => {
                            serde_json::json!({"type": "unix", "path": path.display().to_string()})
                        }
                    })
                    .collect();
                let (volume, path) = (&self.volume, &self.path);
                let all = serde_json::json!(
                    {"driver": "gluster", "volume": volume, "path": path, "server": servers}
                );
                write!(f, "json:{all}")
            }
        }
    }
}

/// What a URI names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GlusterUri {
    /// The image.
    pub image: Image,
    /// The transport rdma was asked for: who opens it says that tcp is used.
    pub asked_for_rdma: bool,
}

/// Why a text does not name an image on a volume.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "Invalid URI '{uri}': {why}. Usage: gluster[+transport]://[server[:port]]/volname/image[?socket=...], where the \
     transport is tcp, unix or rdma"
)]
pub struct UriError {
    /// The text.
    pub uri: String,
    /// What is wrong with it.
    pub why: &'static str,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Transport {
    Tcp,
    Unix,
    Rdma,
}

impl FromStr for GlusterUri {
    type Err = UriError;

    fn from_str(uri: &str) -> Result<GlusterUri, UriError> {
        parse(uri).map_err(|why| UriError { uri: without_secrets(uri).into_owned(), why })
    }
}

fn parse(uri: &str) -> Result<GlusterUri, &'static str> {
    let (scheme, rest) = uri.split_once("://").ok_or("there is no '://' in it")?;
    let transport = match scheme {
        "gluster" | "gluster+tcp" => Transport::Tcp,
        "gluster+unix" => Transport::Unix,
        "gluster+rdma" => Transport::Rdma,
        _ => return Err("it names no transport that there is"),
    };
    if rest.contains('#') {
        return Err("it contains an unescaped '#'; write %23 if it belongs to a name");
    }
    let (rest, query) = rest.split_once('?').map_or((rest, None), |(rest, query)| (rest, Some(query)));
    let (authority, place) = rest.split_once('/').ok_or("it names no volume")?;
    let (volume, path) = volume_and_path(place)?;
    let server = match transport {
        Transport::Unix => unix_server(authority, query)?,
        _ if query.is_some() => return Err("only the transport unix has parameters"),
        _ => tcp_server(authority)?,
    };
    let image = Image { servers: vec![server], volume, path };
    Ok(GlusterUri { image, asked_for_rdma: transport == Transport::Rdma })
}

fn volume_and_path(place: &str) -> Result<(String, String), &'static str> {
    let place = place.trim_start_matches('/');
    let (volume, path) = place.split_once('/').unwrap_or((place, ""));
    let volume = text(volume)?;
    let path = text(path.trim_start_matches('/'))?;
    match () {
        () if volume.is_empty() => Err("it names no volume"),
        () if path.is_empty() => Err("it names no image on the volume"),
        () => Ok((volume, path)),
    }
}

/// A part of a URI as text that C takes for a string.
fn text(part: &str) -> Result<String, &'static str> {
    let bytes = bytes(part)?;
    String::from_utf8(bytes).map_err(|_| "a name in it is not UTF-8 text")
}

fn bytes(part: &str) -> Result<Vec<u8>, &'static str> {
    let bytes = unescape(part).ok_or("it contains a '%' without two hexadecimal digits behind it")?;
    if bytes.contains(&0) { Err("a name in it contains a NUL") } else { Ok(bytes) }
}

fn tcp_server(authority: &str) -> Result<Server, &'static str> {
    if authority.contains('@') {
        return Err("it contains a user name, which GlusterFS has no use for");
    }
    let split = host_and_port(authority);
    let (host, port) = split.ok_or("its server is malformed; an IPv6 address belongs in brackets")?;
    let host = match text(host)? {
        host if host.is_empty() => DEFAULT_HOST.into(),
        host => host,
    };
    let port = match port.map(|port| port_number(port).ok_or("its port is no number up to 65535")) {
        None | Some(Ok(0)) => DEFAULT_PORT,
        Some(port) => port?,
    };
    Ok(Server::Tcp { host, port })
}

fn unix_server(authority: &str, query: Option<&str>) -> Result<Server, &'static str> {
    if !authority.is_empty() {
        return Err("the transport unix has no server; write gluster+unix:///volname/image?socket=PATH");
    }
    const SOCKET: &str = "the transport unix has one parameter, socket=PATH";
    let path = bytes(query.and_then(|query| query.strip_prefix("socket=")).ok_or(SOCKET)?)?;
    if path.contains(&b'&') {
        return Err(SOCKET);
    }
    socket_path(path).map(|path| Server::Unix { path })
}

/// A path that a socket can have.
pub(super) fn socket_path(path: Vec<u8>) -> Result<PathBuf, &'static str> {
    if path.is_empty() || path.len() > SOCKET_PATH_BYTES_MAX {
        return Err("the path of its socket is empty, or longer than a socket's may be");
    }
    Ok(PathBuf::from(OsString::from_vec(path)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16) -> Server {
        Server::Tcp { host: host.into(), port }
    }

    fn image(server: Server, path: &str) -> Image {
        Image { servers: vec![server], volume: "testvol".into(), path: path.into() }
    }

    #[test]
    fn the_examples_mean_what_they_say() {
        let unix = Server::Unix { path: "/tmp/glusterd.socket".into() };
        let v6 = "1:2:3:4:5:6:7:8";
        for (text, wanted, rdma) in [
            ("gluster://1.2.3.4/testvol/a.img", image(tcp("1.2.3.4", 24007), "a.img"), false),
            ("gluster+tcp://1.2.3.4/testvol/a.img", image(tcp("1.2.3.4", 24007), "a.img"), false),
            (
                "gluster+tcp://1.2.3.4:24007/testvol/dir/a.img",
                image(tcp("1.2.3.4", 24007), "dir/a.img"),
                false,
            ),
            ("gluster+tcp://[1:2:3:4:5:6:7:8]/testvol/dir/a.img", image(tcp(v6, 24007), "dir/a.img"), false),
            (
                "gluster+tcp://[1:2:3:4:5:6:7:8]:24007/testvol/dir/a.img",
                image(tcp(v6, 24007), "dir/a.img"),
                false,
            ),
            (
                "gluster+tcp://server.domain.com:24007/testvol/dir/a.img",
                image(tcp("server.domain.com", 24007), "dir/a.img"),
                false,
            ),
            (
                "gluster+unix:///testvol/dir/a.img?socket=/tmp/glusterd.socket",
                image(unix, "dir/a.img"),
                false,
            ),
            ("gluster+rdma://1.2.3.4:24007/testvol/a.img", image(tcp("1.2.3.4", 24007), "a.img"), true),
            // What is left out, and slashes in plenty.
            ("gluster:///testvol/a.img", image(tcp("localhost", 24007), "a.img"), false),
            ("gluster://:1234/testvol/a.img", image(tcp("localhost", 1234), "a.img"), false),
            ("gluster://h:/testvol/a.img", image(tcp("h", 24007), "a.img"), false),
            ("gluster://h//testvol//dir//a.img", image(tcp("h", 24007), "dir//a.img"), false),
            ("gluster://h/testvol/a%20b%3F%25.img", image(tcp("h", 24007), "a b?%.img"), false),
        ] {
            let parsed: GlusterUri = text.parse().unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(parsed, GlusterUri { image: wanted, asked_for_rdma: rdma }, "{text}");
            // And what is shown names the same image.
            let again: GlusterUri = parsed.image.to_string().parse().unwrap();
            assert_eq!(again.image, parsed.image, "{}", parsed.image);
        }
    }

    #[test]
    fn what_names_no_image_is_refused_with_the_reason() {
        let long = format!("gluster+unix:///v/a?socket=/{}", "x".repeat(107));
        for (text, word) in [
            ("gluster:1.2.3.4/v/a", "'://'"),
            ("gluster+vsock://h/v/a", "transport"),
            ("glusters://h/v/a", "transport"),
            ("gluster://h", "no volume"),
            ("gluster://h/", "no volume"),
            ("gluster://h//", "no volume"),
            ("gluster://h/v", "no image"),
            ("gluster://h/v/", "no image"),
            ("gluster://h/v//", "no image"),
            ("gluster://1:2:3:4/v/a", "brackets"),
            ("gluster://[1:2/v/a", "brackets"),
            ("gluster://h:x/v/a", "port"),
            ("gluster://h:65536/v/a", "port"),
            ("gluster://me@h/v/a", "user name"),
            ("gluster://h/v/a?socket=/s", "only the transport unix"),
            ("gluster+tcp://h/v/a?", "only the transport unix"),
            ("gluster+rdma://h/v/a?x=y", "only the transport unix"),
            ("gluster+unix:///v/a", "socket=PATH"),
            ("gluster+unix:///v/a?sock=/s", "socket=PATH"),
            ("gluster+unix:///v/a?socket=/s&x=y", "socket=PATH"),
            ("gluster+unix:///v/a?socket=", "empty"),
            (&long, "longer"),
            ("gluster+unix://h/v/a?socket=/s", "no server"),
            ("gluster://h/v/a%4", "hexadecimal"),
            ("gluster://h/v/a%00", "NUL"),
            ("gluster://h/v/%ff", "UTF-8"),
            ("gluster://h/v/a#b", "'#'"),
        ] {
            let error = text.parse::<GlusterUri>().expect_err(text);
            assert!(error.why.contains(word), "{text}: {error}");
            let shown = error.to_string();
            assert!(shown.starts_with(&format!("Invalid URI '{text}'")) && shown.contains("Usage: gluster["));
        }
    }
}
