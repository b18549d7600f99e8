//! An NBD disk as QEMU's programs have it described: `json:{"driver": "nbd", "server": {"type": "unix", "path": "/s"},
//! "export": "x"}`, or `driver=nbd,server.type=inet,server.host=h,server.port=10809,export=x` ([`super::super::structured`]).
//!
//! The names are those of QEMU's `BlockdevOptionsNbd`, with what it took of old (`host`, `port`, `path`). Times are in
//! seconds. What cannot be honoured is refused by its name; what changes nothing here (`node-name`, `cache.*`,
//! `server.keep-alive`, …) is accepted.

use super::constants::{DEFAULT_PORT, STRING_BYTES_MAX};
use super::remote::RemoteOptions;
use super::uri::{NbdAddress, NbdUri};
use crate::base::limits::NBD_CONNECTIONS_MAX;
use crate::base::os_name;
use crate::base::units::NS_PER_SEC;
use crate::protocol::structured::Options;
use blockferry_ring::Nanos;

/// Options that make no difference here.
const IGNORED: [&str; 5] =
    ["server.ipv4", "server.ipv6", "server.keep-alive", "server.tight", "server.abstract"];

/// A disk of a server, and what its name says of how it is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdDisk {
    /// The disk.
    pub uri: NbdUri,
    /// How long requests wait for a lost connection, where it was said.
    pub reconnect_delay_ns: Option<Nanos>,
    /// How long opening tries again, where it was said.
    pub open_timeout_ns: Option<Nanos>,
    /// Connections at most, where it was said.
    pub connections_max: Option<usize>,
}

impl From<NbdUri> for NbdDisk {
    /// Nothing else is said.
    fn from(uri: NbdUri) -> NbdDisk {
        NbdDisk { uri, reconnect_delay_ns: None, open_timeout_ns: None, connections_max: None }
    }
}

impl NbdDisk {
    /// How it is reached. `usual` gives what is not said, its URI aside.
    pub fn reached(&self, usual: impl FnOnce(NbdUri) -> RemoteOptions) -> RemoteOptions {
        let mut remote = usual(self.uri.clone());
        remote.reconnect_delay_ns = self.reconnect_delay_ns.unwrap_or(remote.reconnect_delay_ns);
        remote.open_timeout_ns = self.open_timeout_ns.unwrap_or(remote.open_timeout_ns);
        remote.connections_max = self.connections_max.unwrap_or(remote.connections_max);
        remote
    }
}

/// What the options mean, the driver's name aside, and what is said of the use of any disk.
pub fn understand(mut options: Options) -> Result<NbdDisk, String> {
    let kind = options.take(&["server.type"]);
    let host = options.take(&["server.host", "host"]);
    let port = options.take(&["server.port", "port"]);
    let path = options.take(&["server.path", "path"]);
    let export = options.take(&["export"]).unwrap_or_default();
    let reconnect_delay = options.take_number("reconnect-delay")?;
    let open_timeout = options.take_number("open-timeout")?;
    let connections = options.take_number("multi-conn")?;
    options.finish(&IGNORED, |name| {
        if name.starts_with("tls") { "TLS is not supported" } else { "it is not known" }
    })?;
    let address = match (kind.as_deref(), host, path) {
        (None | Some("inet"), Some(host), None) => {
            let port = match port {
                None => DEFAULT_PORT,
                Some(port) => {
                    let number = port.parse().ok().filter(|port| *port > 0);
                    number.ok_or_else(|| format!("'{port}' is not a port from 1 to 65535."))?
                }
            };
            NbdAddress::Tcp { host, port }
        }
        (None | Some("unix"), None, Some(path)) if port.is_none() => {
            NbdAddress::Unix { path: os_name::to_path(&path) }
        }
        (Some("inet"), ..) => return Err("A server of type 'inet' has a host and a port.".into()),
        (Some("unix"), ..) => return Err("A server of type 'unix' has a path.".into()),
        (Some(kind), ..) => return Err(format!("Servers of type '{kind}' cannot be reached.")),
        (None, ..) => {
            return Err("Say where the server is: server.type=inet with server.host and server.port, \
                        or server.type=unix with server.path."
                .into());
        }
    };
    if export.len() > STRING_BYTES_MAX || export.contains('\0') {
        return Err("The export's name is too long, or contains a NUL.".into());
    }
    let nanos = |seconds: u64| seconds * NS_PER_SEC;
    Ok(NbdDisk {
        uri: NbdUri { address, export },
        reconnect_delay_ns: reconnect_delay.map(nanos),
        open_timeout_ns: open_timeout.map(nanos),
        connections_max: connections.map(|connections| (connections as usize).clamp(1, NBD_CONNECTIONS_MAX)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk as it is reached.
    #[derive(Debug)]
    struct Structured {
        remote: RemoteOptions,
        read_only: Option<bool>,
    }

    fn parse(text: &str) -> Result<Structured, String> {
        let mut options = Options::parse(text)?;
        match options.take_driver()?.as_str() {
            "nbd" => {
                let read_only = options.take_switch("read-only")?;
                Ok(Structured { remote: understand(options)?.reached(RemoteOptions::new), read_only })
            }
            other => Err(other.into()),
        }
    }

    fn understood(text: &str) -> Structured {
        parse(text).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    fn refused(text: &str) -> String {
        match parse(text) {
            Ok(structured) => panic!("{text}: {structured:?}"),
            Err(error) => error,
        }
    }

    #[test]
    fn both_forms_name_the_same_disks() {
        for (text, uri) in [
            (
                r#"json:{"driver":"nbd","server":{"type":"unix","path":"/s"},"export":"x"}"#,
                "nbd+unix:///x?socket=/s",
            ),
            (r#"json:{"driver":"nbd","server.type":"unix","server.path":"/s"}"#, "nbd+unix:///?socket=/s"),
            ("driver=nbd,server.type=unix,server.path=/a,,b,export=x,,y", "nbd+unix:///x%2Cy?socket=/a%2Cb"),
            ("driver=nbd,server.type=inet,server.host=h,server.port=1", "nbd://h:1/"),
            (r#"json:{"driver":"nbd","server":{"type":"inet","host":"::1","port":"10809"}}"#, "nbd://[::1]/"),
            (r#"json:{"driver":"nbd","host":"h","port":7,"node-name":"n","discard":"unmap"}"#, "nbd://h:7/"),
            ("driver=nbd,path=/s,cache.direct=on", "nbd+unix:///?socket=/s"),
        ] {
            assert_eq!(understood(text).remote.uri.to_string(), uri, "{text}");
        }
        let all = "driver=nbd,host=h,reconnect-delay=5,open-timeout=7,read-only=on,multi-conn=2";
        let structured = understood(all);
        let remote = &structured.remote;
        assert_eq!((remote.reconnect_delay_ns, remote.open_timeout_ns), (5_000_000_000, 7_000_000_000));
        assert_eq!((structured.read_only, remote.connections_max), (Some(true), 2));
        let usual = understood("driver=nbd,host=h").remote;
        assert_eq!(usual.open_timeout_ns, 0);
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_by_name() {
        for (text, word) in [
            ("json:[]", "object"),
            ("json:{", "JSON"),
            ("driver=file,filename=x", "file"),
            (r#"json:{"server":{}}"#, "driver"),
            ("driver=nbd", "server.type=inet"),
            ("driver=nbd,host=h,path=/s", "where the server is"),
            ("driver=nbd,server.type=inet,server.path=/s", "inet"),
            ("driver=nbd,server.type=unix,server.host=h", "unix"),
            ("driver=nbd,server.type=vsock,server.cid=3", "server.cid"),
            ("driver=nbd,server.type=fd,server.path=3", "fd"),
            ("driver=nbd,host=h,port=0", "port"),
            ("driver=nbd,host=h,tls-creds=t", "tls-creds"),
            ("driver=nbd,host=h,x-dirty-bitmap=b", "x-dirty-bitmap"),
            ("driver=nbd,host=h,host=i", "twice"),
            ("driver=nbd,host=h,reconnect-delay=soon", "reconnect-delay"),
            ("driver=nbd,host=h,read-only=maybe", "read-only"),
            ("driver=nbd,nonsense", "nonsense"),
            (r#"json:{"driver":"nbd","host":["h"]}"#, "host.0"),
        ] {
            assert!(refused(text).contains(word), "{text}: {}", refused(text));
        }
    }
}
