//! How a person names an NBD export: URIs, and the older colon forms.
//!
//! - `nbd://HOST[:PORT]/EXPORT`, `nbd+tcp://HOST[:PORT]/EXPORT`: TCP; the port is 10809 unless given.
//! - `nbd+unix:///EXPORT?socket=PATH`: a Unix socket.
//! - `nbd:HOST:PORT[:exportname=EXPORT]`, `nbd:unix:PATH[:exportname=EXPORT]`: what QEMU took before it took URIs;
//!   nothing in them is percent-encoded.
//!
//! The source is `doc/uri.md` of the NetworkBlockDevice/nbd repository. The export is what follows the first slash of the
//! path; it may be empty, contain slashes, or begin with one. What cannot be honoured is refused instead of ignored: TLS,
//! user names, parameters that mean nothing here, fragments (an unescaped `#` would cut a name short in silence).

use super::constants::{DEFAULT_PORT, STRING_BYTES_MAX};
use crate::base::secret::without_secrets;
use crate::protocol::uri::{self, Escaped, Host};
use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Bytes of a Unix socket's path that the kernel takes, without the NUL behind it.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum NbdAddress {
    /// A TCP port.
    Tcp {
        /// A name or an address; IPv6 without brackets.
        host: String,
        /// The port. A server that is told 0 takes a free one; nobody can connect to 0.
        port: u16,
    },
    /// A Unix socket.
    Unix {
        /// Its path.
        path: PathBuf,
    },
}

/// An export on a server. `Display` gives a URI that parses back to the same value.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NbdUri {
    /// The server.
    pub address: NbdAddress,
    /// The export's name; empty is the default export.
    pub export: String,
}

/// Why a text does not name an NBD export.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UriError {
    /// It is something else.
    #[error(
        "{uri:?} is not an NBD address. Write nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH."
    )]
    NotNbd {
        /// The text.
        uri: String,
    },
    /// TLS was asked for.
    #[error("{uri:?} asks for TLS, which is not supported. Use nbd:// over a trusted network or a tunnel.")]
    TlsNotSupported {
        /// The text.
        uri: String,
    },
    /// There is no server to connect to.
    #[error("{uri:?} names no host. Write nbd://HOST[:PORT]/EXPORT.")]
    HostMissing {
        /// The text.
        uri: String,
    },
    /// The older form needs a port.
    #[error("{uri:?} names no port. Write nbd:HOST:PORT or nbd://HOST/EXPORT.")]
    PortMissing {
        /// The text.
        uri: String,
    },
    /// An IPv6 address without brackets, or with one of them.
    #[error("{uri:?} has a malformed host. An IPv6 address belongs in brackets, as in nbd://[::1]/EXPORT.")]
    BadHost {
        /// The text.
        uri: String,
    },
    /// Not a port number.
    #[error(
        "{port:?} in {uri:?} is not a port. A port is a number from 1 to 65535; 0 lets a server take a free one."
    )]
    BadPort {
        /// The text.
        uri: String,
        /// The part that should be a port.
        port: String,
    },
    /// User names serve TLS only.
    #[error("{uri:?} contains a user name, which only TLS has a use for.")]
    UserNotSupported {
        /// The text.
        uri: String,
    },
    /// A Unix socket is not on a host.
    #[error(
        "{uri:?} names both a host and a Unix socket. Write nbd+unix:///EXPORT?socket=PATH, with three slashes."
    )]
    HostWithSocket {
        /// The text.
        uri: String,
    },
    /// Without a socket there is nothing to connect to.
    #[error("{uri:?} names no socket. Write nbd+unix:///EXPORT?socket=PATH.")]
    SocketMissing {
        /// The text.
        uri: String,
    },
    /// An empty or overlong path, one with NUL bytes, or an abstract socket.
    #[error("The socket in {uri:?} is not a path of 1 to 107 bytes.")]
    BadSocket {
        /// The text.
        uri: String,
    },
    /// A parameter that means nothing here, or comes twice.
    #[error(
        "{uri:?} has the parameter {parameter:?}, which is not known, does not belong there, or comes twice."
    )]
    BadParameter {
        /// The text.
        uri: String,
        /// The parameter's name.
        parameter: String,
    },
    /// An unescaped `#`.
    #[error("{uri:?} contains an unescaped '#'. Write %23 if it belongs to a name.")]
    FragmentNotSupported {
        /// The text.
        uri: String,
    },
    /// Broken percent-encoding.
    #[error(
        "{uri:?} contains a '%' without two hexadecimal digits behind it. Write %25 for the character itself."
    )]
    BadEscape {
        /// The text.
        uri: String,
    },
    /// A name that NBD cannot transport.
    #[error("The export name in {uri:?} is not UTF-8 text of at most 4096 bytes without NUL characters.")]
    BadExport {
        /// The text.
        uri: String,
    },
}

impl FromStr for NbdUri {
    type Err = UriError;

    fn from_str(uri: &str) -> Result<Self, UriError> {
        let shown = without_secrets(uri);
        parse(uri, &shown).map_err(|error| match error {
            // What looks like a port is the beginning of a password.
            UriError::BadPort { uri: shown, .. } if shown != uri => UriError::UserNotSupported { uri: shown },
            error => error,
        })
    }
}

/// Parses `uri`; errors show it as `shown`.
fn parse(uri: &str, shown: &str) -> Result<NbdUri, UriError> {
    let text = || shown.to_owned();
    let not_nbd = || UriError::NotNbd { uri: text() };
    let (scheme, rest) = uri.split_once(':').ok_or_else(not_nbd)?;
    let unix = match scheme.to_ascii_lowercase().as_str() {
        "nbd" if !rest.starts_with("//") => return colon_form(shown, rest),
        "nbd" | "nbd+tcp" => false,
        "nbd+unix" => true,
        "nbds" | "nbds+tcp" | "nbds+unix" => return Err(UriError::TlsNotSupported { uri: text() }),
        _ => return Err(not_nbd()),
    };
    let rest = rest.strip_prefix("//").ok_or_else(not_nbd)?;
    if rest.contains('#') {
        return Err(UriError::FragmentNotSupported { uri: text() });
    }
    let (rest, query) = rest.split_once('?').map_or((rest, None), |(rest, query)| (rest, Some(query)));
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let export =
        String::from_utf8(unescape(shown, path)?).map_err(|_| UriError::BadExport { uri: text() })?;
    let socket = socket_parameter(shown, query, unix)?;
    let address = match socket {
        Some(_) if !authority.is_empty() => return Err(UriError::HostWithSocket { uri: text() }),
        Some(path) => unix_address(shown, path)?,
        None if unix => return Err(UriError::SocketMissing { uri: text() }),
        None => tcp_address(shown, authority)?,
    };
    finish(shown, address, export)
}

/// Parses what follows `nbd:` in the older form.
fn colon_form(uri: &str, rest: &str) -> Result<NbdUri, UriError> {
    let (server, export) = rest.split_once(":exportname=").unwrap_or((rest, ""));
    let address = if let Some(path) = server.strip_prefix("unix:") {
        unix_address(uri, path.as_bytes().to_vec())?
    } else if server.contains('@') {
        return Err(UriError::UserNotSupported { uri: uri.to_owned() });
    } else {
        let (host, port) = host_and_port(uri, server)?;
        let port = port.ok_or_else(|| UriError::PortMissing { uri: uri.to_owned() })?;
        NbdAddress::Tcp { host: host.to_owned(), port }
    };
    finish(uri, address, export.to_owned())
}

fn finish(uri: &str, address: NbdAddress, export: String) -> Result<NbdUri, UriError> {
    if export.len() > STRING_BYTES_MAX || export.contains('\0') {
        return Err(UriError::BadExport { uri: uri.to_owned() });
    }
    Ok(NbdUri { address, export })
}

fn tcp_address(uri: &str, authority: &str) -> Result<NbdAddress, UriError> {
    if authority.contains('@') {
        return Err(UriError::UserNotSupported { uri: uri.to_owned() });
    }
    let (host, port) = host_and_port(uri, authority)?;
    let host = String::from_utf8(unescape(uri, host)?).ok().filter(|host| !host.contains('\0'));
    let host = host.ok_or_else(|| UriError::BadHost { uri: uri.to_owned() })?;
    Ok(NbdAddress::Tcp { host, port: port.unwrap_or(DEFAULT_PORT) })
}

fn unix_address(uri: &str, path: Vec<u8>) -> Result<NbdAddress, UriError> {
    if path.is_empty() || path.len() > SOCKET_PATH_BYTES_MAX || path.contains(&0) {
        return Err(UriError::BadSocket { uri: uri.to_owned() });
    }
    Ok(NbdAddress::Unix { path: PathBuf::from(OsString::from_vec(path)) })
}

/// Splits `HOST[:PORT]`, where an IPv6 host wears brackets.
fn host_and_port<'a>(uri: &str, server: &'a str) -> Result<(&'a str, Option<u16>), UriError> {
    let split = uri::host_and_port(server).ok_or_else(|| UriError::BadHost { uri: uri.to_owned() });
    let (host, port) = split?;
    if host.is_empty() {
        return Err(UriError::HostMissing { uri: uri.to_owned() });
    }
    let parse = |port: &str| {
        uri::port_number(port).ok_or_else(|| UriError::BadPort { uri: uri.to_owned(), port: port.to_owned() })
    };
    Ok((host, port.map(parse).transpose()?))
}

/// The value of `socket`, the one parameter that is known; it belongs to Unix sockets.
fn socket_parameter(uri: &str, query: Option<&str>, unix: bool) -> Result<Option<Vec<u8>>, UriError> {
    let mut socket = None;
    for pair in query.unwrap_or("").split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        if name.starts_with("tls-") {
            return Err(UriError::TlsNotSupported { uri: uri.to_owned() });
        }
        if name != "socket" || !unix || socket.is_some() {
            return Err(UriError::BadParameter { uri: uri.to_owned(), parameter: name.to_owned() });
        }
        socket = Some(unescape(uri, value)?);
    }
    Ok(socket)
}

fn unescape(uri: &str, text: &str) -> Result<Vec<u8>, UriError> {
    uri::unescape(text).ok_or_else(|| UriError::BadEscape { uri: uri.to_owned() })
}

impl fmt::Display for NbdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let export = Escaped(self.export.as_bytes(), b"/:@");
        match &self.address {
            NbdAddress::Tcp { host, port } => {
                write!(f, "nbd://{}", Host(host))?;
                if *port != DEFAULT_PORT {
                    write!(f, ":{port}")?;
                }
                write!(f, "/{export}")
            }
            NbdAddress::Unix { path } => {
                write!(f, "nbd+unix:///{export}?socket={}", Escaped(path_bytes(path), b"/:@"))
            }
        }
    }
}

fn path_bytes(path: &Path) -> &[u8] {
    path.as_os_str().as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u16, export: &str) -> NbdUri {
        NbdUri { address: NbdAddress::Tcp { host: host.into(), port }, export: export.into() }
    }

    fn unix(path: &str, export: &str) -> NbdUri {
        NbdUri { address: NbdAddress::Unix { path: path.into() }, export: export.into() }
    }

    #[test]
    fn every_form_is_understood_and_survives_the_round_trip() {
        for (text, uri, canonical) in [
            ("nbd://example.com/disk", tcp("example.com", 10809, "disk"), "nbd://example.com/disk"),
            ("NBD://example.com", tcp("example.com", 10809, ""), "nbd://example.com/"),
            ("nbd+tcp://example.com:/", tcp("example.com", 10809, ""), "nbd://example.com/"),
            (
                "nbd://example.com:10810//disk",
                tcp("example.com", 10810, "/disk"),
                "nbd://example.com:10810//disk",
            ),
            ("nbd://h/hello%20world%3F", tcp("h", 10809, "hello world?"), "nbd://h/hello%20world%3F"),
            ("nbd://h/gr%C3%B6%C3%9Fe+1?", tcp("h", 10809, "größe+1"), "nbd://h/gr%C3%B6%C3%9Fe%2B1"),
            ("nbd://[::1]/a", tcp("::1", 10809, "a"), "nbd://[::1]/a"),
            ("nbd://[fe80::1%25eth0]:99/", tcp("fe80::1%eth0", 99, ""), "nbd://[fe80::1%25eth0]:99/"),
            (
                "nbd+unix:///disk?socket=/run/nbd.sock",
                unix("/run/nbd.sock", "disk"),
                "nbd+unix:///disk?socket=/run/nbd.sock",
            ),
            ("nbd+unix://?socket=a%20b", unix("a b", ""), "nbd+unix:///?socket=a%20b"),
            ("nbd:localhost:10809", tcp("localhost", 10809, ""), "nbd://localhost/"),
            (
                "nbd:localhost:1:exportname=a:b/%20",
                tcp("localhost", 1, "a:b/%20"),
                "nbd://localhost:1/a:b/%2520",
            ),
            ("nbd:[::1]:10809:exportname=", tcp("::1", 10809, ""), "nbd://[::1]/"),
            ("nbd:unix:/run/a:b", unix("/run/a:b", ""), "nbd+unix:///?socket=/run/a:b"),
            ("nbd:unix:/s:exportname=x#y&z", unix("/s", "x#y&z"), "nbd+unix:///x%23y%26z?socket=/s"),
        ] {
            let parsed: NbdUri = text.parse().unwrap();
            assert_eq!(parsed, uri, "{text}");
            assert_eq!(parsed.to_string(), canonical, "{text}");
            assert_eq!(canonical.parse(), Ok(uri), "{canonical}");
        }
    }

    #[test]
    fn any_path_and_name_survives_the_round_trip() {
        let path = PathBuf::from(OsString::from_vec((1..=107).map(|n| n + 140).collect()));
        let export: String = ('\u{1}'..='\u{7f}').chain("äß€😀".chars()).collect();
        let uri = NbdUri { address: NbdAddress::Unix { path }, export: export.clone() };
        assert_eq!(uri.to_string().parse(), Ok(uri));
        let uri = tcp("h", 1, &export);
        assert_eq!(uri.to_string().parse(), Ok(uri));
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_with_the_reason() {
        let refused = |text: &str| text.parse::<NbdUri>().unwrap_err();
        let uri = |text: &str| text.to_owned();
        for text in
            ["", "disk.qcow2", "http://example.com/", "nbd+unix:/x", "nbd+tcp:host:1", "nbd+vsock://1/"]
        {
            assert_eq!(refused(text), UriError::NotNbd { uri: uri(text) }, "{text}");
        }
        for text in ["nbds://h/", "nbds+unix:///?socket=/s", "nbd://h/?tls-type=psk", "nbds:h:1"] {
            assert_eq!(refused(text), UriError::TlsNotSupported { uri: uri(text) }, "{text}");
        }
        for text in ["nbd:///disk", "nbd://:10809/", "nbd::10809", "nbd://[]/"] {
            assert_eq!(refused(text), UriError::HostMissing { uri: uri(text) }, "{text}");
        }
        for text in ["nbd://::1/", "nbd://[::1/", "nbd://[::1]x/", "nbd:::1:10809", "nbd://%FF/"] {
            assert_eq!(refused(text), UriError::BadHost { uri: uri(text) }, "{text}");
        }
        for port in ["65536", "x", "+1", "-1", "1 "] {
            let text = format!("nbd://h:{port}/");
            assert_eq!(refused(&text), UriError::BadPort { uri: text.clone(), port: uri(port) });
        }
        for text in ["nbd+unix:///?socket=", "nbd:unix:", "nbd+unix:///?socket=%00abstract"] {
            assert_eq!(refused(text), UriError::BadSocket { uri: uri(text) }, "{text}");
        }
        assert!(matches!(refused(&format!("nbd:unix:/{}", "x".repeat(107))), UriError::BadSocket { .. }));
        for (text, parameter) in [
            ("nbd://h/?socket=/s", "socket"),
            ("nbd://h/?x-speed=1", "x-speed"),
            ("nbd+unix:///?socket=/s&socket=/t", "socket"),
        ] {
            assert_eq!(refused(text), UriError::BadParameter { uri: uri(text), parameter: uri(parameter) });
        }
        assert!(matches!(refused("nbd:host"), UriError::PortMissing { .. }));
        for text in
            ["nbd://me@h/", "nbd://me:sesame@h/", "nbd://me:ses/ame@h/", "nbd:me:sesame@h:1", "nbd:me@h"]
        {
            assert!(matches!(refused(text), UriError::UserNotSupported { .. }), "{text}");
        }
        for text in
            ["nbd://me:sesame@h/", "nbd://me:ses/ame@h/", "ftp://me:sesame@h/", "nbds://me:sesame@h/?x=1"]
        {
            assert!(!refused(text).to_string().contains("ses"), "{}", refused(text));
        }
        assert!(matches!(refused("nbd+unix://run/s?socket=/s"), UriError::HostWithSocket { .. }));
        assert!(matches!(refused("nbd+unix:///disk"), UriError::SocketMissing { .. }));
        assert!(matches!(refused("nbd://h/a#b"), UriError::FragmentNotSupported { .. }));
        for text in ["nbd://h/%", "nbd://h/%4", "nbd://h/%zz", "nbd://h/%+1"] {
            assert_eq!(refused(text), UriError::BadEscape { uri: uri(text) }, "{text}");
        }
        for text in ["nbd://h/%00", "nbd://h/%ff"] {
            assert_eq!(refused(text), UriError::BadExport { uri: uri(text) }, "{text}");
        }
        assert!(matches!(refused(&format!("nbd://h/{}", "x".repeat(4097))), UriError::BadExport { .. }));
    }
}
