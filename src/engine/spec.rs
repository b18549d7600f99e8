//! What a name means: a disk, and what may be said with it, read once at the edge of the house.
//!
//! A person, a script or an image names a disk by a path, a URI, QEMU's options as JSON (`json:{…}`) or as a list
//! (`driver=qcow2,file.driver=file,file.filename=…`). All of them become one [`NodeSpec`]; what else is to be known of a
//! name (where it leads, whether anything can be lost there) is asked of that. `Display` writes it in one canonical form,
//! which parses back to the same: the shortest that says everything.
//!
//! Who may have a name followed is not settled here: names that images have are judged by their text first
//! ([`super::named`]).

use std::fmt;
use std::path::{Path, PathBuf};

use blockferry_ring::{Errno, Nanos};
use serde_json::{Map, Value, json};

use super::open::{Format, ImageOptions, name_of};
use crate::base::os_name;
use crate::base::units::{NS_PER_SEC, parse_duration, parse_size};
use crate::block::{BlockError, Operation};
use crate::protocol::gluster::options::DEBUG_DEFAULT;
use crate::protocol::gluster::{self, GlusterUri, Image, Logging, Server};
use crate::protocol::nbd::options::NbdDisk;
use crate::protocol::nbd::{self, NbdAddress, NbdUri};
use crate::protocol::null;
use crate::protocol::open::Cache;
use crate::protocol::structured::{Options, is_structured};

/// A disk as it was named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeSpec {
    /// What its bytes mean, where that was said.
    pub format: Option<FormatSpec>,
    /// Where they are.
    pub protocol: ProtocolSpec,
    /// Never to be written (`read-only`).
    pub read_only: bool,
    /// Past the page cache or through it (`cache.direct`), where that was said.
    pub cache: Option<Cache>,
    /// How it is to be called (`node-name`).
    pub node_name: Option<String>,
}

/// What the bytes of a disk mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FormatSpec {
    /// The guest's bytes as they are, or a part of them.
    Raw {
        /// Where the disk begins.
        offset: u64,
        /// Its bytes; `None`: up to the end.
        size: Option<u64>,
    },
    /// QEMU's thin disks.
    Qcow2,
}

/// Where bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProtocolSpec {
    /// In a regular file, or on a block device.
    File {
        /// Its path.
        path: PathBuf,
    },
    /// In memory: all zeroes at first, gone at the end.
    Mem {
        /// Bytes.
        len: u64,
    },
    /// Nowhere: reads give zeroes, writes are forgotten.
    Null {
        /// Bytes.
        len: u64,
    },
    /// On an NBD server.
    Nbd(NbdDisk),
    /// On a volume of GlusterFS.
    Gluster {
        /// The image.
        image: Image,
        /// libgfapi's log.
        logging: Logging,
        /// The transport rdma was named, in whose place tcp is used.
        asked_for_rdma: bool,
    },
    /// Somewhere else, with so much latency added to every request.
    Delay {
        /// The latency.
        latency_ns: Nanos,
        /// Where.
        inner: Box<ProtocolSpec>,
    },
}

const NBD: [&str; 4] = ["nbd:", "nbd+", "nbds:", "nbds+"];
const GLUSTER: [&str; 2] = ["gluster:", "gluster+"];

fn begins_with(name: &str, prefixes: &[&str]) -> bool {
    prefixes.iter().any(|prefix| name.starts_with(prefix))
}

/// Whether a name is a URI (`http://...`) rather than a path. Those of a protocol that is not known lead nowhere.
fn has_scheme(name: &str) -> bool {
    name.split_once("://").is_some_and(|(scheme, _)| {
        let is_part = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.');
        scheme.len() > 1
            && scheme.starts_with(|c: char| c.is_ascii_alphabetic())
            && scheme.chars().all(is_part)
    })
}

impl From<ProtocolSpec> for NodeSpec {
    /// Nothing else is said.
    fn from(protocol: ProtocolSpec) -> NodeSpec {
        NodeSpec { format: None, protocol, read_only: false, cache: None, node_name: None }
    }
}

impl NodeSpec {
    /// The file or device at this path, whatever it is called.
    pub fn file(path: impl Into<PathBuf>) -> NodeSpec {
        ProtocolSpec::File { path: path.into() }.into()
    }

    /// Reads a name in any form.
    pub fn parse(name: &str) -> Result<NodeSpec, BlockError> {
        parse(name).map_err(|why| refused(name, why))
    }

    /// Reads a list of options (`filename=x,driver=file`), in any order; what says no driver is one, too.
    pub fn parse_options(text: &str) -> Result<NodeSpec, BlockError> {
        Options::parse_list(text).and_then(structured).map_err(|why| refused(text, why))
    }

    /// What it is called in messages: a name that leads to it.
    pub fn shown(&self) -> String {
        match &self.protocol {
            ProtocolSpec::File { path } if *self == NodeSpec::file(path) => name_of(path),
            _ => self.to_string(),
        }
    }

    /// The format, where it was said.
    pub fn format(&self) -> Option<Format> {
        self.format.map(|format| match format {
            FormatSpec::Raw { .. } => Format::Raw,
            FormatSpec::Qcow2 => Format::Qcow2,
        })
    }

    /// The part of the bytes that is the disk, where it is not all of them.
    pub fn window(&self) -> Option<(u64, Option<u64>)> {
        match self.format {
            Some(FormatSpec::Raw { offset, size }) if offset != 0 || size.is_some() => Some((offset, size)),
            _ => None,
        }
    }

    /// The path that it leads to, through `delay:` too; `None` if it leads to none.
    pub fn local_path(&self) -> Option<&Path> {
        match self.protocol.leaf() {
            ProtocolSpec::File { path } => Some(path),
            _ => None,
        }
    }

    /// The disk is on a server.
    pub fn is_remote(&self) -> bool {
        matches!(self.protocol.leaf(), ProtocolSpec::Nbd(_) | ProtocolSpec::Gluster { .. })
    }

    /// The disk is made by naming it and is gone at the end: nothing of it can be lost, and nothing in it could be mistaken
    /// for a format.
    pub fn is_memory(&self) -> bool {
        matches!(self.protocol.leaf(), ProtocolSpec::Mem { .. } | ProtocolSpec::Null { .. })
    }

    /// The disk of an NBD server that it leads to.
    pub fn nbd(&self) -> Option<&NbdUri> {
        match self.protocol.leaf() {
            ProtocolSpec::Nbd(disk) => Some(&disk.uri),
            _ => None,
        }
    }

    /// The image on a volume of GlusterFS that it leads to.
    pub fn gluster(&self) -> Option<&Image> {
        match self.protocol.leaf() {
            ProtocolSpec::Gluster { image, .. } => Some(image),
            _ => None,
        }
    }

    /// What it says beyond what `options` do; where both say something of one thing, the name is nearer. Its format and what
    /// is a format's are for who opens that.
    pub fn over(&self, options: &ImageOptions) -> ImageOptions {
        ImageOptions {
            read_only: options.read_only || self.read_only,
            cache: self.cache.unwrap_or(options.cache),
            ..options.clone()
        }
    }
}

impl ProtocolSpec {
    /// Where the bytes are, all delays aside.
    pub fn leaf(&self) -> &ProtocolSpec {
        match self {
            ProtocolSpec::Delay { inner, .. } => inner.leaf(),
            leaf => leaf,
        }
    }

    /// The delays, the outermost first.
    pub fn delays(&self) -> Vec<Nanos> {
        let (mut all, mut rest) = (Vec::new(), self);
        while let ProtocolSpec::Delay { latency_ns, inner } = rest {
            all.push(*latency_ns);
            rest = inner;
        }
        all
    }
}

fn refused(name: &str, why: String) -> BlockError {
    BlockError::new(Operation::Open, name, Errno::EINVAL).hint(why)
}

fn parse(name: &str) -> Result<NodeSpec, String> {
    if let Some(path) = name.strip_prefix("file:") {
        return Ok(NodeSpec::file(os_name::to_path(path)));
    }
    if let Some(rest) = name.strip_prefix("delay:") {
        return delayed(rest);
    }
    let sized = |size: &str| parse_size(size).map_err(|error| error.to_string());
    if let Some(size) = name.strip_prefix("mem:") {
        return Ok(ProtocolSpec::Mem { len: sized(size)? }.into());
    }
    if let Some(size) = name.strip_prefix("null:") {
        return Ok(ProtocolSpec::Null { len: sized(size)? }.into());
    }
    if is_structured(name) {
        return structured(Options::parse(name)?);
    }
    if begins_with(name, &GLUSTER) {
        return gluster_uri(name).map(NodeSpec::from);
    }
    if begins_with(name, &NBD) {
        let uri: NbdUri = name.parse().map_err(|error| format!("{error}"))?;
        return Ok(ProtocolSpec::Nbd(NbdDisk::from(uri)).into());
    }
    match has_scheme(name) {
        false => Ok(NodeSpec::file(os_name::to_path(name))),
        true => Err(
            "This protocol is not supported. Give a path, nbd://HOST/EXPORT, gluster://HOST/VOLUME/IMAGE, mem:SIZE, null:SIZE or \
             delay:TIME:NAME."
                .into(),
        ),
    }
}

fn gluster_uri(name: &str) -> Result<ProtocolSpec, String> {
    let GlusterUri { image, asked_for_rdma } = name.parse().map_err(|error| format!("{error}."))?;
    Ok(ProtocolSpec::Gluster { image, logging: Logging::default(), asked_for_rdma })
}

/// What follows `delay:`. It may be said several times over, so it is no recursion.
fn delayed(mut rest: &str) -> Result<NodeSpec, String> {
    let mut delays = Vec::new();
    loop {
        let Some((time, inner)) = rest.split_once(':') else {
            return Err("Say it as delay:TIME:NAME, such as delay:5ms:/images/a.img.".into());
        };
        delays.push(parse_duration(time).map_err(|error| error.to_string())?);
        match inner.strip_prefix("delay:") {
            Some(more) => rest = more,
            None => {
                rest = inner;
                break;
            }
        }
    }
    let mut spec = parse(rest)?;
    for latency_ns in delays.into_iter().rev() {
        spec.protocol = ProtocolSpec::Delay { latency_ns, inner: Box::new(spec.protocol) };
    }
    Ok(spec)
}

/// What a disk's options say apart from which it is.
struct Said {
    read_only: bool,
    cache: Option<Cache>,
    node_name: Option<String>,
}

impl Said {
    fn take(options: &mut Options) -> Result<Said, String> {
        let cache = options.take_switch("cache.direct")?.map(|direct| match direct {
            true => Cache::Direct,
            false => Cache::Buffered,
        });
        // Every flush is made, whatever is said of it.
        let _ = options.take_switch("cache.no-flush")?;
        let read_only = options.take_switch("read-only")? == Some(true);
        Ok(Said { read_only, cache, node_name: options.take(&["node-name"]) })
    }
}

/// What options mean: those of a disk, or of a format with the disk's own below `file`.
fn structured(mut options: Options) -> Result<NodeSpec, String> {
    let outer = Said::take(&mut options)?;
    if !options.has("file") {
        let protocol = match options.take_driver()?.as_str() {
            "raw" | "qcow2" => {
                return Err(
                    "The options of a format name its file: file.driver=file,file.filename=...".into()
                );
            }
            driver => protocol(driver, options)?,
        };
        let Said { read_only, cache, node_name } = outer;
        return Ok(NodeSpec { format: None, protocol, read_only, cache, node_name });
    }
    if options.take(&["file"]).is_some() {
        return Err(
            "The option 'file' names a node, which names of images cannot: give that disk's options \
                    (file.driver=file,file.filename=...)."
                .into(),
        );
    }
    let window = (options.take_size("offset")?, options.take_size("size")?);
    let format = options.take_format().filter(|name| !name.is_empty());
    let format = match format.as_deref() {
        Some("raw") => Some(FormatSpec::Raw { offset: window.0.unwrap_or(0), size: window.1 }),
        _ if window != (None, None) => {
            return Err("The options 'offset' and 'size' are for raw images: say driver=raw.".into());
        }
        Some("qcow2") => Some(FormatSpec::Qcow2),
        Some(name) => return Err(format!("The driver '{name}' is no format that is known.")),
        None => None,
    };
    let inner = Said::take(&mut options)?;
    let driver = match options.take(&["driver"]) {
        Some(driver) => driver,
        None => plain_file(&options)?,
    };
    let protocol = protocol(&driver, options)?;
    Ok(NodeSpec {
        format,
        protocol,
        read_only: outer.read_only || inner.read_only,
        cache: inner.cache.or(outer.cache),
        node_name: outer.node_name,
    })
}

/// Below a format, a file need not be called one.
fn plain_file(options: &Options) -> Result<String, String> {
    let Some(name) = options.get("filename") else {
        return Err("The option 'file.driver' is missing.".into());
    };
    match parse(name) {
        Ok(spec) if spec == NodeSpec::file(os_name::to_path(name)) => Ok("file".into()),
        _ => Err(format!(
            "The option 'file.filename' is '{name}', which may be no file: say which 'file.driver' it is of."
        )),
    }
}

fn protocol(driver: &str, mut options: Options) -> Result<ProtocolSpec, String> {
    let unknown = |_: &str| "it is not known";
    let len = |options: &mut Options| options.take_size("size");
    match driver {
        "nbd" => Ok(ProtocolSpec::Nbd(nbd::options::understand(options)?)),
        "gluster" => {
            // Whether it is only read has been taken out already.
            let gluster::Structured { image, asked_for_rdma, logging, .. } =
                gluster::options::understand(options)?;
            Ok(ProtocolSpec::Gluster { image, logging, asked_for_rdma })
        }
        // Which of the two it is the path tells.
        "file" | "host_device" => {
            let path = options.take(&["filename"]).ok_or("The option 'filename' is missing.")?;
            options.finish(&["aio"], |name| match name {
                "locking" => "say --no-lock to do without locks",
                _ => "it is not known",
            })?;
            Ok(ProtocolSpec::File { path: os_name::to_path(&path) })
        }
        "mem" => {
            let len = len(&mut options)?.ok_or("The option 'size' is missing.")?;
            options.finish(&[], unknown)?;
            Ok(ProtocolSpec::Mem { len })
        }
        "null" | "null-co" | "null-aio" => {
            let len = len(&mut options)?.unwrap_or(null::LEN_DEFAULT);
            options.finish(&["read-zeroes"], unknown)?;
            Ok(ProtocolSpec::Null { len })
        }
        other => Err(format!(
            "The driver '{other}' cannot be named in this form; 'file', 'host_device', 'mem', 'null-co', 'nbd' and 'gluster' \
             can, and above them 'raw' and 'qcow2'."
        )),
    }
}

impl fmt::Display for NodeSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for latency_ns in self.protocol.delays() {
            write!(f, "delay:{latency_ns}ns:")?;
        }
        let leaf = self.protocol.leaf();
        let says_more =
            self.format.is_some() || self.read_only || self.cache.is_some() || self.node_name.is_some();
        match plain(leaf).filter(|_| !says_more) {
            Some(name) => f.write_str(&name),
            None => write!(f, "json:{}", Value::Object(self.as_object(leaf))),
        }
    }
}

/// A name without options, where that says everything.
fn plain(leaf: &ProtocolSpec) -> Option<String> {
    let name = match leaf {
        ProtocolSpec::File { path } => os_name::from_path(path),
        ProtocolSpec::Mem { len } => format!("mem:{len}"),
        ProtocolSpec::Null { len } => format!("null:{len}"),
        ProtocolSpec::Nbd(disk) => disk.uri.to_string(),
        ProtocolSpec::Gluster { image, asked_for_rdma, .. } => gluster_name(image, *asked_for_rdma),
        ProtocolSpec::Delay { .. } => return None,
    };
    let is_it = |name: &str| parse(name).is_ok_and(|spec| spec == leaf.clone().into());
    match leaf {
        // Files may be called like anything.
        ProtocolSpec::File { .. } if !is_it(&name) => Some(format!("file:{name}")),
        _ => Some(name).filter(|name| is_it(name)),
    }
}

fn gluster_name(image: &Image, asked_for_rdma: bool) -> String {
    let name = image.to_string();
    match name.strip_prefix("gluster://").filter(|_| asked_for_rdma) {
        Some(rest) => format!("gluster+rdma://{rest}"),
        None => name,
    }
}

impl NodeSpec {
    /// All that it says of `leaf`, as QEMU's options.
    fn as_object(&self, leaf: &ProtocolSpec) -> Map<String, Value> {
        let mut object = Map::new();
        let mut add = |name: &str, value: Value| {
            object.insert(name.to_owned(), value);
        };
        match self.format {
            Some(FormatSpec::Qcow2) => add("driver", json!("qcow2")),
            Some(FormatSpec::Raw { offset, size }) => {
                add("driver", json!("raw"));
                if offset != 0 {
                    add("offset", json!(offset));
                }
                if let Some(size) = size {
                    add("size", json!(size));
                }
            }
            None => protocol_object(leaf).into_iter().for_each(|(name, value)| add(&name, value)),
        }
        if self.read_only {
            add("read-only", json!(true));
        }
        if let Some(cache) = self.cache {
            add("cache", json!({"direct": cache == Cache::Direct}));
        }
        if let Some(name) = &self.node_name {
            add("node-name", json!(name));
        }
        if self.format.is_some() {
            add("file", Value::Object(protocol_object(leaf)));
        }
        object
    }
}

fn protocol_object(leaf: &ProtocolSpec) -> Map<String, Value> {
    let value = match leaf {
        ProtocolSpec::File { path } => json!({"driver": "file", "filename": os_name::from_path(path)}),
        ProtocolSpec::Mem { len } => json!({"driver": "mem", "size": len}),
        ProtocolSpec::Null { len } => json!({"driver": "null-co", "size": len}),
        ProtocolSpec::Nbd(disk) => nbd_object(disk),
        ProtocolSpec::Gluster { image, logging, asked_for_rdma } => {
            let mut value = gluster_object(image, *asked_for_rdma);
            if logging.level != DEBUG_DEFAULT {
                value["debug"] = json!(logging.level);
            }
            if logging.file != Logging::default().file {
                value["logfile"] = json!(logging.file);
            }
            value
        }
        ProtocolSpec::Delay { inner, .. } => return protocol_object(inner),
    };
    match value {
        Value::Object(object) => object,
        _ => Map::new(),
    }
}

fn nbd_object(disk: &NbdDisk) -> Value {
    let server = match &disk.uri.address {
        NbdAddress::Tcp { host, port } => json!({"type": "inet", "host": host, "port": port.to_string()}),
        NbdAddress::Unix { path } => json!({"type": "unix", "path": os_name::from_path(path)}),
    };
    let mut value = json!({"driver": "nbd", "server": server, "export": disk.uri.export});
    if let Some(delay_ns) = disk.reconnect_delay_ns {
        value["reconnect-delay"] = json!(delay_ns / NS_PER_SEC);
    }
    if let Some(timeout_ns) = disk.open_timeout_ns {
        value["open-timeout"] = json!(timeout_ns / NS_PER_SEC);
    }
    if let Some(connections) = disk.connections_max {
        value["multi-conn"] = json!(connections);
    }
    value
}

fn gluster_object(image: &Image, asked_for_rdma: bool) -> Value {
    let uri = gluster_name(image, asked_for_rdma);
    let is_uri = uri
        .parse()
        .is_ok_and(|found: GlusterUri| found == GlusterUri { image: image.clone(), asked_for_rdma });
    if is_uri {
        return json!({"driver": "gluster", "filename": uri});
    }
    let server = |server: &Server| match server {
        Server::Tcp { host, port } => json!({"type": "inet", "host": host, "port": port.to_string()}),
        Server::Unix { path } => json!({"type": "unix", "path": os_name::from_path(path)}),
    };
    let servers: Vec<Value> = image.servers.iter().map(server).collect();
    json!({"driver": "gluster", "volume": image.volume, "path": image.path, "server": servers})
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::rng::Rng;

    fn parsed(name: &str) -> NodeSpec {
        NodeSpec::parse(name).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// Names in every form, and what they are written as.
    const NAMES: [(&str, &str); 40] = [
        ("a.img", "a.img"),
        ("/vm/a b,c.img", "/vm/a b,c.img"),
        ("./nbd:evil:10809", "./nbd:evil:10809"),
        ("file:a.img", "a.img"),
        ("file:nbd:evil:10809", "file:nbd:evil:10809"),
        ("file:file:a", "file:file:a"),
        ("gluster.img", "gluster.img"),
        ("driver.img", "driver.img"),
        ("c:\\a.img", "c:\\a.img"),
        ("x\0ff.img", "x\0ff.img"),
        ("mem:1M", "mem:1048576"),
        ("null:0x10", "null:16"),
        ("delay:1ms:a.img", "delay:1000000ns:a.img"),
        ("delay:0:delay:2us:mem:1", "delay:0ns:delay:2000ns:mem:1"),
        ("delay:1ms:nbd://h/x", "delay:1000000ns:nbd://h/x"),
        ("nbd:localhost:10809:exportname=disk", "nbd://localhost/disk"),
        ("nbd+unix:///x?socket=/s", "nbd+unix:///x?socket=/s"),
        ("driver=nbd,server.type=unix,server.path=/a,,b,export=x,,y", "nbd+unix:///x%2Cy?socket=/a%2Cb"),
        (
            r#"json:{"driver":"nbd","host":"::1","port":7,"node-name":"n"}"#,
            r#"json:{"driver":"nbd","server":{"type":"inet","host":"::1","port":"7"},"export":"","node-name":"n"}"#,
        ),
        (
            "driver=nbd,host=h,reconnect-delay=5,read-only=off",
            r#"json:{"driver":"nbd","server":{"type":"inet","host":"h","port":"10809"},"export":"","reconnect-delay":5}"#,
        ),
        ("gluster://1.2.3.4/testvol/a.img", "gluster://1.2.3.4/testvol/a.img"),
        ("gluster+rdma://h/v/a", "gluster+rdma://h/v/a"),
        (
            "driver=gluster,filename=gluster+rdma://h/v/a,logfile=/l",
            r#"json:{"driver":"gluster","filename":"gluster+rdma://h/v/a","logfile":"/l"}"#,
        ),
        (
            r#"json:{"driver":"gluster","volume":"v","path":"d/a","server":[{"type":"unix","path":"/s&t"}]}"#,
            r#"json:{"driver":"gluster","volume":"v","path":"d/a","server":[{"type":"unix","path":"/s&t"}]}"#,
        ),
        (
            r#"json:{"driver":"gluster","volume":"v","path":"a","server":[{"type":"inet","host":"a","port":"1"},{"type":"unix","path":"/s"}]}"#,
            r#"json:{"driver":"gluster","volume":"v","path":"a","server":[{"type":"inet","host":"a","port":"1"},{"type":"unix","path":"/s"}]}"#,
        ),
        (r#"json:{"driver":"file","filename":"x"}"#, "x"),
        (r#"json:{"driver":"file","filename":"file:x"}"#, "file:file:x"),
        (r#"json:{"driver":"host_device","filename":"/dev/x","aio":"io_uring"}"#, "/dev/x"),
        (
            "json:{'driver':'file','filename':'x','cache':{'direct':false,'no-flush':false}}",
            r#"json:{"driver":"file","filename":"x","cache":{"direct":false}}"#,
        ),
        (
            "json:{'driver':'qcow2','file.filename':'x'}",
            r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"x"}}"#,
        ),
        ("json:{'file.filename':'x'}", "x"),
        (
            r#"json:{"driver":"raw","file":{"driver":"file","filename":"x"}}"#,
            r#"json:{"driver":"raw","file":{"driver":"file","filename":"x"}}"#,
        ),
        (
            "driver=raw,offset=1M,size=512,file.driver=file,file.filename=a,,b",
            r#"json:{"driver":"raw","offset":1048576,"size":512,"file":{"driver":"file","filename":"a,b"}}"#,
        ),
        (
            "driver=qcow2,read-only=on,file.driver=file,file.read-only=on,file.node-name=f,file.filename=x",
            r#"json:{"driver":"qcow2","read-only":true,"file":{"driver":"file","filename":"x"}}"#,
        ),
        (
            "driver=qcow2,discard=unmap,node-name=n,file.driver=file,file.filename=x",
            r#"json:{"driver":"qcow2","node-name":"n","file":{"driver":"file","filename":"x"}}"#,
        ),
        (
            r#"json:{"driver":"qcow2","file":{"driver":"nbd","server":{"type":"unix","path":"/s"}}}"#,
            r#"json:{"driver":"qcow2","file":{"driver":"nbd","server":{"type":"unix","path":"/s"},"export":""}}"#,
        ),
        (
            "delay:1ms:driver=qcow2,file.driver=file,file.filename=x",
            r#"delay:1000000ns:json:{"driver":"qcow2","file":{"driver":"file","filename":"x"}}"#,
        ),
        ("driver=null-co,size=1M,read-zeroes=on", "null:1048576"),
        ("driver=null-co", "null:1073741824"),
        ("driver=mem,size=4096", "mem:4096"),
    ];

    #[test]
    fn every_form_has_one_canonical_one_which_means_the_same() {
        for (name, canonical) in NAMES {
            let spec = parsed(name);
            assert_eq!(spec.to_string(), canonical, "{name}");
            assert_eq!(parsed(canonical), spec, "{name}");
            assert_eq!(parsed(&spec.shown()).local_path().is_some(), spec.local_path().is_some(), "{name}");
        }
        let listed = "filename=nbd://h/x,driver=file,read-only=on";
        let listed = NodeSpec::parse_options(listed).unwrap();
        assert_eq!((listed.local_path(), listed.read_only), (Some(Path::new("nbd://h/x")), true));
        assert_eq!(parsed(&listed.to_string()), listed);
    }

    #[test]
    fn what_makes_no_sense_is_told_by_its_option() {
        for (name, word) in [
            ("http://h/x", "not supported"),
            ("mem:much", "much"),
            ("delay:1ms", "delay:TIME:NAME"),
            ("delay:soon:a.img", "soon"),
            ("json:{", "JSON"),
            (r#"json:{"filename":"x"}"#, "'driver' is missing"),
            (r#"json:{"driver":"file"}"#, "'filename' is missing"),
            (r#"json:{"driver":"file","filename":"x","colour":"red"}"#, "'colour'"),
            (r#"json:{"driver":"file","filename":"x","locking":"off"}"#, "--no-lock"),
            (r#"json:{"driver":"qcow2","filename":"x"}"#, "file.driver"),
            (r#"json:{"driver":"qcow2","file":"node"}"#, "'file' names a node"),
            (r#"json:{"driver":"qcow2","file.filename":"nbd://h/x"}"#, "'file.filename'"),
            (r#"json:{"driver":"qcow2","offset":1,"file.filename":"x"}"#, "'offset'"),
            (r#"json:{"driver":"raw","offset":"far","file.filename":"x"}"#, "'offset' is a size"),
            (r#"json:{"driver":"raw","size":-1,"file.filename":"x"}"#, "'size'"),
            (r#"json:{"driver":"qcow2","file.filename":"x","backing":null}"#, "'backing'"),
            (r#"json:{"driver":"vmdk","file.filename":"x"}"#, "'vmdk'"),
            (r#"json:{"driver":"qcow2","lazy-refcounts":true,"file.filename":"x"}"#, "'lazy-refcounts'"),
            (r#"json:{"driver":"raw","file":{"driver":"qcow2","file.filename":"x"}}"#, "'qcow2'"),
            ("driver=file,filename=x,cache.direct=maybe", "'cache.direct'"),
            ("driver=file,filename=x,read-only=1", "'read-only'"),
            ("driver=ssh,host=h", "'ssh'"),
        ] {
            let error = NodeSpec::parse(name).expect_err(name);
            let hint = error.hint.clone().unwrap_or_default();
            assert!(hint.contains(word), "{name}: {hint}");
            assert_eq!(error.errno, Errno::EINVAL);
        }
    }

    #[test]
    fn what_leads_where_is_told_through_delays() {
        let late = parsed("delay:1ms:delay:1ms:/vm/a");
        assert_eq!((late.local_path(), late.is_remote()), (Some(Path::new("/vm/a")), false));
        let far = parsed("delay:1ms:driver=qcow2,file.driver=nbd,file.host=h");
        assert!(far.is_remote() && far.nbd().is_some() && far.local_path().is_none());
        assert_eq!(far.format(), Some(Format::Qcow2));
        assert!(parsed("delay:1ms:mem:1").is_memory() && !late.is_memory());
        assert_eq!(parsed("driver=raw,size=5,file.filename=x").window(), Some((0, Some(5))));
    }

    fn text(rng: &mut Rng) -> String {
        let len = 1 + rng.below(8);
        let any = [
            "a", "b", "/", ":", ",", ",,", "'", "\"", "\\", "%", "&", "=", "{", "}", ".", "#", "?", " ", "ü",
            "nbd:", "json:", "driver=",
        ];
        (0..len).map(|_| any[rng.below(any.len() as u64) as usize]).collect()
    }

    fn number<T>(rng: &mut Rng, some: impl FnOnce(u64) -> T) -> Option<T> {
        let n = rng.below(50);
        (rng.below(2) == 0).then(|| some(n))
    }

    fn random_leaf(rng: &mut Rng) -> ProtocolSpec {
        match rng.below(5) {
            0 => ProtocolSpec::File { path: os_name::to_path(&format!("{}\0ff", text(rng))) },
            1 => ProtocolSpec::File { path: os_name::to_path(&text(rng)) },
            2 => match rng.below(2) {
                0 => ProtocolSpec::Mem { len: rng.below(1 << 50) },
                _ => ProtocolSpec::Null { len: rng.below(1 << 50) },
            },
            3 => {
                let address = match rng.below(2) {
                    0 => NbdAddress::Tcp { host: text(rng), port: 1 + rng.below(65_535) as u16 },
                    _ => NbdAddress::Unix { path: text(rng).into() },
                };
                let second = |n: u64| n * NS_PER_SEC;
                ProtocolSpec::Nbd(NbdDisk {
                    uri: NbdUri { address, export: text(rng) },
                    reconnect_delay_ns: number(rng, second),
                    open_timeout_ns: number(rng, second),
                    connections_max: number(rng, |n| 1 + n as usize % 8),
                })
            }
            _ => {
                let server = |rng: &mut Rng| match rng.below(2) {
                    0 => Server::Tcp { host: text(rng), port: 1 + rng.below(65_535) as u16 },
                    _ => Server::Unix { path: text(rng).into() },
                };
                let servers = (0..1 + rng.below(3)).map(|_| server(rng)).collect();
                let (volume, path) = (text(rng).replace('/', "v"), format!("p{}", text(rng)));
                let logging = match rng.below(2) {
                    0 => Logging::default(),
                    _ => Logging { level: rng.below(10) as u8, file: text(rng) },
                };
                let image = Image { servers, volume, path };
                ProtocolSpec::Gluster { image, logging, asked_for_rdma: false }
            }
        }
    }

    #[test]
    fn what_is_written_of_any_disk_parses_back_to_it() {
        let mut rng = Rng::new(13);
        for _ in 0..4000 {
            let mut protocol = random_leaf(&mut rng);
            for _ in 0..rng.below(3).saturating_sub(1) {
                let latency_ns = rng.below(1 << 40);
                protocol = ProtocolSpec::Delay { latency_ns, inner: Box::new(protocol) };
            }
            let format = match rng.below(4) {
                0 => Some(FormatSpec::Qcow2),
                1 => Some(FormatSpec::Raw { offset: rng.below(3), size: number(&mut rng, |n| n) }),
                _ => None,
            };
            let cache = [None, Some(Cache::Direct), Some(Cache::Buffered)][rng.below(3) as usize];
            let node_name = number(&mut rng, |n| format!("node{n}"));
            let spec = NodeSpec { format, protocol, read_only: rng.below(3) == 0, cache, node_name };
            let written = spec.to_string();
            assert_eq!(NodeSpec::parse(&written).as_ref().ok(), Some(&spec), "{written}");
        }
    }
}
