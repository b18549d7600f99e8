//! An NBD disk as QEMU's programs have it described: options by name instead of a URI.
//!
//! - `json:{"driver": "nbd", "server": {"type": "unix", "path": "/s"}, "export": "x"}`: objects in objects, or flat names
//!   with dots.
//! - `driver=nbd,server.type=inet,server.host=h,server.port=10809,export=x`: what `-blockdev` and `--image-opts` take; a
//!   comma in a value is written twice.
//!
//! The names are those of QEMU's `BlockdevOptionsNbd`, with what it took of old (`host`, `port`, `path`). Times are in
//! seconds. What cannot be honoured is refused by its name; what changes nothing here (`node-name`, `cache.*`,
//! `server.keep-alive`, …) is accepted.

use serde_json::{Map, Value};

use super::constants::{DEFAULT_PORT, STRING_BYTES_MAX};
use super::remote::RemoteOptions;
use super::uri::{NbdAddress, NbdUri};
use crate::base::limits::NBD_CONNECTIONS_MAX;
use crate::base::units::NS_PER_SEC;

/// Options that say how a disk is used and not which it is, or that make no difference here.
const IGNORED: [&str; 12] = [
    "node-name",
    "auto-read-only",
    "force-share",
    "discard",
    "detect-zeroes",
    "cache.direct",
    "cache.no-flush",
    "server.ipv4",
    "server.ipv6",
    "server.keep-alive",
    "server.tight",
    "server.abstract",
];

/// What the options mean.
#[derive(Clone, Debug)]
pub struct Structured {
    /// The disk and how it is reached; what was not said is as it was given.
    pub remote: RemoteOptions,
    /// `read-only`, if it was said.
    pub read_only: Option<bool>,
}

/// Whether a name is of these forms.
pub fn is_structured(name: &str) -> bool {
    name.starts_with("json:") || name.starts_with("driver=")
}

/// Parses either form. `usual` gives what is not said, its URI aside.
pub fn parse(name: &str, usual: impl FnOnce(NbdUri) -> RemoteOptions) -> Result<Structured, String> {
    let options = match name.strip_prefix("json:") {
        Some(text) => flatten(text)?,
        None => split(name)?,
    };
    understand(options, usual)
}

fn flatten(text: &str) -> Result<Vec<(String, String)>, String> {
    let value: Value =
        serde_json::from_str(text).map_err(|error| format!("What follows `json:` is no JSON: {error}."))?;
    let Value::Object(object) = value else { return Err("What follows `json:` is no JSON object.".into()) };
    let mut flat = Vec::new();
    add("", object, &mut flat)?;
    Ok(flat)
}

fn add(prefix: &str, object: Map<String, Value>, flat: &mut Vec<(String, String)>) -> Result<(), String> {
    for (key, value) in object {
        let name = if prefix.is_empty() { key } else { format!("{prefix}.{key}") };
        match value {
            Value::Object(inner) => add(&name, inner, flat)?,
            Value::String(text) => flat.push((name, text)),
            Value::Number(number) => flat.push((name, number.to_string())),
            Value::Bool(true) => flat.push((name, "on".into())),
            Value::Bool(false) => flat.push((name, "off".into())),
            Value::Null => {}
            Value::Array(_) => return Err(format!("The option '{name}' is a list, which none of NBD's is.")),
        }
    }
    Ok(())
}

fn split(text: &str) -> Result<Vec<(String, String)>, String> {
    // A comma that is written twice belongs to the value.
    let mut parts = vec![String::new()];
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        match (c, parts.last_mut()) {
            (',', Some(last)) if rest.peek() == Some(&',') => {
                rest.next();
                last.push(',');
            }
            (',', _) => parts.push(String::new()),
            (c, Some(last)) => last.push(c),
            (_, None) => {}
        }
    }
    let pair = |part: &String| match part.split_once('=') {
        Some((name, value)) => Ok((name.to_owned(), value.to_owned())),
        None => Err(format!("'{part}' is no option: write NAME=VALUE.")),
    };
    parts.iter().filter(|part| !part.is_empty()).map(pair).collect()
}

fn understand(
    options: Vec<(String, String)>,
    usual: impl FnOnce(NbdUri) -> RemoteOptions,
) -> Result<Structured, String> {
    let mut left = options;
    for (at, (name, _)) in left.iter().enumerate() {
        if left[..at].iter().any(|(other, _)| other == name) {
            return Err(format!("The option '{name}' is said twice."));
        }
    }
    let mut take = |names: &[&str]| {
        let at = left.iter().position(|(name, _)| names.contains(&name.as_str()))?;
        Some(left.swap_remove(at).1)
    };
    match take(&["driver"]).as_deref() {
        Some("nbd") => {}
        Some(other) => {
            return Err(format!("The driver '{other}' cannot be named in this form; 'nbd' can."));
        }
        None => return Err("The option 'driver' is missing.".into()),
    }
    let kind = take(&["server.type"]);
    let host = take(&["server.host", "host"]);
    let port = take(&["server.port", "port"]);
    let path = take(&["server.path", "path"]);
    let export = take(&["export"]).unwrap_or_default();
    let reconnect_delay = seconds("reconnect-delay", take(&["reconnect-delay"]))?;
    let open_timeout = seconds("open-timeout", take(&["open-timeout"]))?;
    let connections = number("multi-conn", take(&["multi-conn"]))?;
    let read_only = switch("read-only", take(&["read-only"]))?;
    if let Some((name, _)) = left.iter().find(|(name, _)| !IGNORED.contains(&name.as_str())) {
        let why = if name.starts_with("tls") { "TLS is not supported" } else { "it is not known" };
        return Err(format!("The option '{name}' cannot be honoured: {why}."));
    }
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
        (None | Some("unix"), None, Some(path)) if port.is_none() => NbdAddress::Unix { path: path.into() },
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
    let mut remote = usual(NbdUri { address, export });
    remote.reconnect_delay_ns = reconnect_delay.unwrap_or(remote.reconnect_delay_ns);
    remote.open_timeout_ns = open_timeout.unwrap_or(remote.open_timeout_ns);
    if let Some(connections) = connections {
        remote.connections_max = (connections as usize).clamp(1, NBD_CONNECTIONS_MAX);
    }
    Ok(Structured { remote, read_only })
}

fn number(name: &str, value: Option<String>) -> Result<Option<u64>, String> {
    let Some(value) = value else { return Ok(None) };
    let number =
        value.parse::<u32>().map_err(|_| format!("The option '{name}' is a number, not '{value}'."))?;
    Ok(Some(number.into()))
}

fn seconds(name: &str, value: Option<String>) -> Result<Option<u64>, String> {
    Ok(number(name, value)?.map(|seconds| seconds * NS_PER_SEC))
}

fn switch(name: &str, value: Option<String>) -> Result<Option<bool>, String> {
    match value.as_deref() {
        None => Ok(None),
        Some("on" | "true" | "yes") => Ok(Some(true)),
        Some("off" | "false" | "no") => Ok(Some(false)),
        Some(other) => Err(format!("The option '{name}' is on or off, not '{other}'.")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn understood(text: &str) -> Structured {
        parse(text, RemoteOptions::new).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    fn refused(text: &str) -> String {
        match parse(text, RemoteOptions::new) {
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
            (r#"json:{"driver":"nbd","host":["h"]}"#, "list"),
        ] {
            assert!(refused(text).contains(word), "{text}: {}", refused(text));
        }
    }
}
