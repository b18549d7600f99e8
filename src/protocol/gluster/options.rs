//! An image on GlusterFS as QEMU's programs have it described: a volume, a path, and any number of servers, the first of
//! which that answers tells where the bricks are.
//!
//! `json:{"driver":"gluster","volume":"v","path":"a.img","server":[{"type":"inet","host":"h","port":"24007"},
//! {"type":"unix","path":"/s"}]}`, or the same as flat names ([`super::super::structured`]). Names of old are taken too: the
//! type `tcp` for `inet`, `socket` for the path of a socket, `filename` for a URI. What is wrong is said in the reference's
//! words, which managers of virtual machines know.

use super::uri::{DEFAULT_PORT, GlusterUri, Image, Server, socket_path};
use crate::base::limits::GLUSTER_SERVERS_MAX;
use crate::protocol::structured::Options;
use crate::protocol::uri::port_number;

/// How much libgfapi logs, from 0 (nothing) to 9 (everything), where nothing is said.
pub const DEBUG_DEFAULT: u8 = 4;
const DEBUG_MAX: u64 = 9;

/// What libgfapi logs, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Logging {
    /// 0 to 9.
    pub level: u8,
    /// A path; `-` is standard error.
    pub file: String,
}

impl Default for Logging {
    fn default() -> Logging {
        Logging { level: DEBUG_DEFAULT, file: "-".into() }
    }
}

/// What the options mean.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Structured {
    /// The image.
    pub image: Image,
    /// The transport rdma was asked for.
    pub asked_for_rdma: bool,
    /// libgfapi's log.
    pub logging: Logging,
    /// `read-only`, if it was said.
    pub read_only: Option<bool>,
}

/// What the options mean, the driver's name aside.
pub fn understand(mut options: Options) -> Result<Structured, String> {
    let mut logging = Logging::default();
    if let Some(level) = options.take_number("debug")? {
        logging.level = level.min(DEBUG_MAX) as u8;
    }
    if let Some(file) = options.take(&["logfile"]) {
        logging.file = file;
    }
    let read_only = options.take_switch("read-only")?;
    let (image, asked_for_rdma) = match options.take(&["filename"]) {
        Some(uri) => {
            let uri: GlusterUri = uri.parse().map_err(|error| format!("{error}."))?;
            (uri.image, uri.asked_for_rdma)
        }
        None => (image(&mut options)?, false),
    };
    options.finish(&[], |_| "it is not known")?;
    Ok(Structured { image, asked_for_rdma, logging, read_only })
}

fn missing(name: &str) -> String {
    format!("Parameter '{name}' is missing")
}

fn image(options: &mut Options) -> Result<Image, String> {
    if !options.has("server.0") {
        return Err(missing("server"));
    }
    let volume = options.take(&["volume"]).ok_or_else(|| missing("volume"))?;
    let path = options.take(&["path"]).ok_or_else(|| missing("path"))?;
    let path = path.trim_start_matches('/').to_owned();
    if volume.is_empty() || path.is_empty() || volume.contains(['\0', '/']) || path.contains('\0') {
        return Err("Parameters 'volume' and 'path' have to name a volume and an image on it".into());
    }
    let mut servers = Vec::new();
    while options.has(&format!("server.{}", servers.len())) {
        if servers.len() == GLUSTER_SERVERS_MAX {
            return Err(format!("There are more than {GLUSTER_SERVERS_MAX} servers"));
        }
        let server = server(options, servers.len())?;
        servers.push(server);
    }
    Ok(Image { servers, volume, path })
}

fn server(options: &mut Options, index: usize) -> Result<Server, String> {
    let at = |text: String| format!("{text}. Check in 'server' array index '{index}'");
    let mut take = |name: &str| options.take(&[&format!("server.{index}.{name}")]);
    match take("type").as_deref() {
        Some("inet" | "tcp") => {
            let host = take("host").ok_or_else(|| at(missing("host")))?;
            let port = take("port").ok_or_else(|| at(missing("port")))?;
            if take("to").is_some() {
                return Err(at("Parameter 'to' not supported".into()));
            }
            if take("ipv4").or_else(|| take("ipv6")).is_some() {
                return Err(at("Parameters 'ipv4/ipv6' not supported".into()));
            }
            if host.is_empty() || host.contains('\0') {
                return Err(at("Parameter 'host' names no host".into()));
            }
            let number = port_number(&port);
            let port = number.ok_or_else(|| at(format!("'{port}' is not a valid port number")))?;
            Ok(Server::Tcp { host, port: if port == 0 { DEFAULT_PORT } else { port } })
        }
        Some("unix") => {
            let path = match (take("path"), take("socket")) {
                (Some(_), Some(_)) => return Err(at("Conflicting parameters 'path' and 'socket'".into())),
                (Some(path), None) | (None, Some(path)) => path,
                (None, None) => return Err(at(missing("path"))),
            };
            let is_text = !path.contains('\0');
            let path = socket_path(path.into_bytes()).ok().filter(|_| is_text);
            let path = path.ok_or_else(|| at("Parameter 'path' is no path of a socket".into()))?;
            Ok(Server::Unix { path })
        }
        _ => Err(at("Parameter 'type' may be 'inet' or 'unix'".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Structured, String> {
        let mut options = Options::parse(text)?;
        assert_eq!(options.take_driver()?, "gluster", "{text}");
        understand(options)
    }

    fn understood(text: &str) -> Structured {
        parse(text).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn all_forms_name_the_same_images() {
        let both = Image {
            servers: vec![
                Server::Tcp { host: "1.2.3.4".into(), port: 24007 },
                Server::Unix { path: "/var/run/glusterd.socket".into() },
            ],
            volume: "testvol".into(),
            path: "dir/a.img".into(),
        };
        for text in [
            r#"json:{"driver":"gluster","volume":"testvol","path":"dir/a.img","server":[
                {"type":"inet","host":"1.2.3.4","port":"24007"},{"type":"unix","path":"/var/run/glusterd.socket"}]}"#,
            r#"json:{"driver":"gluster","volume":"testvol","path":"/dir/a.img","debug":4,"logfile":"-","server":[
                {"type":"tcp","host":"1.2.3.4","port":24007},{"type":"unix","socket":"/var/run/glusterd.socket"}]}"#,
            "driver=gluster,volume=testvol,path=dir/a.img,server.0.type=tcp,server.0.host=1.2.3.4,server.0.port=24007,\
             server.1.type=unix,server.1.socket=/var/run/glusterd.socket",
        ] {
            let structured = understood(text);
            assert_eq!(structured.image, both, "{text}");
            assert_eq!((structured.logging, structured.read_only), (Logging::default(), None));
        }
        assert_eq!(understood(&both.to_string()).image, both);
        let one = understood("driver=gluster,filename=gluster+rdma://h/v/a,debug=12,logfile=/l,read-only=on");
        assert_eq!(one.image.to_string(), "gluster://h/v/a");
        assert!(one.asked_for_rdma);
        assert_eq!((one.logging, one.read_only), (Logging { level: 9, file: "/l".into() }, Some(true)));
    }

    #[test]
    fn what_is_wrong_is_said_in_the_words_of_the_reference() {
        let with = |server: &str| format!("driver=gluster,volume=v,path=a,{server}");
        for (text, said) in [
            ("driver=gluster,volume=v,path=a".into(), "Parameter 'server' is missing"),
            (
                "driver=gluster,path=a,server.0.type=unix,server.0.path=/s".into(),
                "Parameter 'volume' is missing",
            ),
            (
                "driver=gluster,volume=v,server.0.type=unix,server.0.path=/s".into(),
                "Parameter 'path' is missing",
            ),
            (
                with("server.0.host=h"),
                "Parameter 'type' may be 'inet' or 'unix'. Check in 'server' array index '0'",
            ),
            (
                with("server.0.type=unix,server.0.path=/s,server.1.type=rdma"),
                "Parameter 'type' may be 'inet' or 'unix'. Check in 'server' array index '1'",
            ),
            (with("server.0.type=inet,server.0.port=1"), "Parameter 'host' is missing"),
            (with("server.0.type=inet,server.0.host=h"), "Parameter 'port' is missing"),
            (with("server.0.type=inet,server.0.host=h,server.0.port=x"), "'x' is not a valid port number"),
            (
                with("server.0.type=tcp,server.0.host=h,server.0.port=65536"),
                "'65536' is not a valid port number",
            ),
            (
                with("server.0.type=unix,server.0.path=/s,server.0.socket=/t"),
                "Conflicting parameters 'path' and 'socket'",
            ),
            (with("server.0.type=unix,server.0.host=h"), "Parameter 'path' is missing"),
            (
                with("server.0.type=inet,server.0.host=h,server.0.port=1,server.0.to=2"),
                "Parameter 'to' not supported",
            ),
            (
                with("server.0.type=inet,server.0.host=h,server.0.port=1,server.0.ipv6=on"),
                "Parameters 'ipv4/ipv6' not supported",
            ),
            (
                with("server.0.type=unix,server.0.path=/s,server.0.x=y"),
                "The option 'server.0.x' cannot be honoured",
            ),
            (
                with("server.0.type=unix,server.0.path=/s,debug=much"),
                "The option 'debug' is a number, not 'much'",
            ),
            (
                "driver=gluster,volume=,path=a,server.0.type=unix,server.0.path=/s".into(),
                "have to name a volume",
            ),
            (
                "driver=gluster,filename=gluster://h/v".into(),
                "Invalid URI 'gluster://h/v': it names no image",
            ),
        ] {
            let error = parse(&text).expect_err(&text);
            assert!(error.contains(said), "{text}: {error}");
        }
        let many: Vec<_> = (0..=GLUSTER_SERVERS_MAX)
            .map(|n| format!("server.{n}.type=unix,server.{n}.path=/s{n}"))
            .collect();
        assert!(parse(&with(&many.join(","))).expect_err("too many").contains("more than"));
    }
}
