//! Names of other files, as images have them and as users say them for an image: where they lead, and whether an image may
//! have them opened.
//!
//! A name is relative to the image, which may be a file of this machine or, on a volume of GlusterFS, of a server. Of those
//! that an image has, the ones that stay in its own directory are followed; the others where the user allows it
//! ([`Gate`]).

use std::path::{Component, Path, PathBuf};

use blockferry_ring::{Errno, Ring};

use super::open::{local_path, name_of};
use super::remote::{gluster_image, names_server};
use crate::block::{BlockError, Operation};
use crate::format::qcow2::gate::{
    GateError, Reference, Role, Wanted, clean, has_protocol, judge, resolve, understand,
};
use crate::format::qcow2::{Gate, Reach};
use crate::protocol::gluster::Image;
use crate::protocol::structured::is_structured;

/// Where a name leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Named {
    /// To a file of this machine.
    File(Reference),
    /// To a disk on a server: a name that is relative to nothing.
    Server(String),
}

impl Named {
    /// The name, relative to nothing or to where this program runs.
    pub fn name(&self) -> String {
        match self {
            Named::File(reference) => name_of(&reference.path),
            Named::Server(name) => name.clone(),
        }
    }

    /// The format, where the name of a file says it.
    pub fn format(&self) -> Option<&str> {
        match self {
            Named::File(reference) => reference.format.as_deref(),
            Named::Server(_) => None,
        }
    }
}

/// Reads a name that a user says for `image`. It goes through no gate: it is not the image that asks.
pub fn by_user(image: &str, name: &str) -> Result<Named, GateError> {
    if names_server(name) {
        return Ok(Named::Server(name.to_owned()));
    }
    if let Some(path) = local_path(image) {
        return understand(&path, name).map(Named::File);
    }
    if !has_protocol(name) && !name.starts_with('/') {
        let beside = gluster_image(image).and_then(|image| beside(&image, name));
        let beside = beside.ok_or_else(|| GateError::NoFile(name.to_owned()))?;
        return Ok(Named::Server(beside.to_string()));
    }
    let reference = understand(Path::new(""), name)?;
    match reference.path.is_absolute() {
        true => Ok(Named::File(reference)),
        false => Err(GateError::NoFile(name.to_owned())),
    }
}

/// Reads a name that an image has, and judges it.
pub fn by_image(gate: &Gate, wanted: &Wanted<'_>) -> Result<Named, GateError> {
    let may_be_far = wanted.role == Role::Backing;
    if let Some(path) = local_path(wanted.image)
        && !(may_be_far && names_server(wanted.name))
    {
        return resolve(gate, &path, wanted.name).map(Named::File);
    }
    if !may_be_far {
        // The guest's data is beside its tables, as a file.
        return Err(GateError::NoFile(wanted.name.to_owned()));
    }
    let named = by_user(wanted.image, wanted.name)?;
    match &named {
        Named::File(reference) => judge(gate, None, &reference.path)?,
        Named::Server(name) if gate.servers || is_in_directory_of(wanted.image, name) => {}
        Named::Server(_) => return Err(GateError::Server(wanted.name.to_owned())),
    }
    Ok(named)
}

/// [`by_image`], for who may have files looked at: a directory is the same one by whatever name (relative, absolute, through
/// links), so a file is in the image's own directory if it really lies there. It is opened by its real path then: what was
/// judged is what is opened.
pub async fn followed(ring: &Ring, gate: &Gate, wanted: &Wanted<'_>) -> Result<Named, GateError> {
    let refused = match by_image(gate, wanted) {
        Err(refused @ GateError::Outside(_)) => refused,
        judged => return judged,
    };
    let named = match by_user(wanted.image, wanted.name) {
        Ok(Named::File(reference)) => reference,
        _ => return Err(refused),
    };
    let (gate, image, path) = (gate.clone(), local_path(wanted.image), named.path);
    let real = ring.offload(move || really_inside(&gate, image.as_deref(), &path)).await;
    let path = real.ok().flatten().ok_or(refused)?;
    Ok(Named::File(Reference { path, ..named }))
}

/// The real path of a file, if it lies in one of the directories in which an image may name files.
fn really_inside(gate: &Gate, image: Option<&Path>, path: &Path) -> Option<PathBuf> {
    let folder = |path: &Path| {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        folder.canonicalize().ok()
    };
    let real = folder(path)?.join(path.file_name()?);
    // An image may be called by a link to it.
    let own = image.and_then(|image| image.canonicalize().ok());
    let mut dirs: Vec<PathBuf> = [image, own.as_deref()].into_iter().flatten().filter_map(folder).collect();
    if let Reach::Directories(more) = &gate.files {
        dirs.extend(more.iter().filter_map(|dir| dir.canonicalize().ok()));
    }
    judge(&Reach::Directories(dirs).into(), None, &real).ok().map(|()| real)
}

/// What a user is told whose name for another file makes no sense.
pub(super) fn failed(name: &str, error: &GateError) -> BlockError {
    BlockError::new(Operation::Open, name, Errno::EINVAL).hint(error.to_string())
}

fn directory(image: &Image) -> PathBuf {
    clean(Path::new(&image.path).parent().unwrap_or(Path::new("")))
}

/// The image that `name` means where `image` lies; `None` beyond the volume.
fn beside(image: &Image, name: &str) -> Option<Image> {
    let path = clean(&directory(image).join(name));
    let leaves = path.components().next() == Some(Component::ParentDir);
    let path = path.to_str().filter(|path| !path.is_empty() && !leaves)?.to_owned();
    Some(Image { path, ..image.clone() })
}

/// Both are on one volume, reached in one way, and `name` where `image` lies or below it.
fn is_in_directory_of(image: &str, name: &str) -> bool {
    let (Some(image), Some(other)) = (gluster_image(image), gluster_image(name)) else { return false };
    let path = Path::new(&other.path);
    let is_plain = path.components().all(|part| matches!(part, Component::Normal(_)));
    // Options may say more than where it lies, such as where to log.
    let says_no_more = !is_structured(name) || other.to_string() == name;
    other.servers == image.servers
        && other.volume == image.volume
        && is_plain
        && says_no_more
        && path.starts_with(directory(&image))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted<'a>(image: &'a str, name: &'a str) -> Wanted<'a> {
        Wanted { role: Role::Backing, name, format: None, image, read_only: true }
    }

    fn named(gate: &Gate, image: &str, name: &str) -> Result<String, GateError> {
        by_image(gate, &wanted(image, name)).map(|named| named.name())
    }

    const ON_VOLUME: &str = "gluster://host/vol/dir/top.qcow2";

    #[test]
    fn names_on_a_volume_are_relative_to_the_image() {
        let own = Gate::default();
        for (name, means) in [
            ("base.img", "gluster://host/vol/dir/base.img"),
            ("./sub//base.img", "gluster://host/vol/dir/sub/base.img"),
            ("sub/../base.img", "gluster://host/vol/dir/base.img"),
            ("gluster://host/vol/dir/base.img", "gluster://host/vol/dir/base.img"),
        ] {
            assert_eq!(named(&own, ON_VOLUME, name), Ok(means.into()), "{name}");
        }
        let several = r#"json:{"driver":"gluster","volume":"vol","path":"dir/top","server":[{"type":"inet","host":"a","port":"1"},{"type":"unix","path":"/s"}]}"#;
        let found = named(&own, several, "base").expect("it is beside the image");
        assert!(found.contains(r#""path":"dir/base""#) && found.contains("/s"), "{found}");
    }

    #[test]
    fn what_leads_out_of_its_directory_there_is_not_followed() {
        let (own, servers) = (Gate::default(), Gate { servers: true, ..Gate::default() });
        for name in [
            "../base.img",
            "gluster://host/vol/base.img",
            "gluster://host/vol/dir/../base.img",
            "gluster://host/vol/dirty/base.img",
            "gluster://host/other/dir/base.img",
            "gluster://elsewhere/vol/dir/base.img",
            "nbd://host/disk",
            r#"json:{"driver":"gluster","filename":"gluster://host/vol/dir/b","logfile":"log"}"#,
        ] {
            assert_eq!(named(&own, ON_VOLUME, name), Err(GateError::Server(name.into())));
            assert!(named(&servers, ON_VOLUME, name).is_ok(), "{name}");
        }
        // Nowhere on the volume.
        for name in ["../../base.img", "dir/../../../base.img", "file:base.img"] {
            assert_eq!(named(&servers, ON_VOLUME, name), Err(GateError::NoFile(name.into())));
        }
        // On this machine.
        assert_eq!(named(&servers, ON_VOLUME, "/vm/b"), Err(GateError::Outside("/vm/b".into())));
        let trusted = Gate::from(Reach::Directories(vec!["/vm".into()]));
        assert_eq!(named(&trusted, ON_VOLUME, "/vm/b"), Ok("/vm/b".into()));
        let data = Wanted { role: Role::DataFile, ..wanted(ON_VOLUME, "data") };
        assert_eq!(by_image(&servers, &data), Err(GateError::NoFile("data".into())));
    }

    #[test]
    fn an_image_may_not_say_all_that_a_user_may() {
        let all = Gate { servers: true, files: Reach::Anything };
        for name in [
            "delay:1ms:nbd://host/disk",
            r#"json:{"file":{"driver":"nbd","host":"h"}}"#,
            r#"json:{"driver":"raw","offset":512,"file":{"driver":"nbd","host":"h"}}"#,
            r#"json:{"driver":"raw","size":512,"file":{"driver":"nbd","host":"h"}}"#,
            r#"json:{"driver":"raw","read-only":true,"file":{"driver":"nbd","host":"h","read-only":true}}"#,
            r#"json:{"driver":"null-co","size":512}"#,
            "mem:1M",
        ] {
            assert!(
                matches!(named(&all, "/vm/a", name), Err(GateError::Json(_) | GateError::Protocol(_))),
                "{name}"
            );
        }
        // A file that is described is judged like any other, and is where it is said to be, whatever it is called.
        let own = Gate::default();
        for name in [
            r#"json:{"driver":"file","filename":"/etc/shadow"}"#,
            "json:{'driver':'qcow2','file.filename':'/etc/shadow'}",
            r#"json:{"driver":"raw","file":{"driver":"file","filename":"/etc/shadow"}}"#,
        ] {
            assert_eq!(named(&own, "/vm/a", name), Err(GateError::Outside("/etc/shadow".into())));
        }
        let literal = "json:{'driver':'qcow2','file.filename':'nbd://h/x'}";
        assert_eq!(named(&own, "/vm/a", literal), Ok("/vm/nbd:/h/x".into()));
        // What a user calls an image by options is where its file is.
        let described = r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"/vm/a"}}"#;
        assert_eq!(named(&own, described, "b"), Ok("/vm/b".into()));
        assert_eq!(named(&own, described, "../b"), Err(GateError::Outside("/b".into())));
    }

    #[test]
    fn a_file_that_is_called_like_something_else_is_that_file() {
        let own = Gate::default();
        let server = "driver=gluster,volume=v,path=p,server.0.type=inet,server.0.host=h,server.0.port=1";
        for odd in ["nbd:evil:10809", "file:/etc/shadow", "delay:1ms:/etc/shadow", "mem:1M", server] {
            // By whatever name the image gets there, what is opened is the file.
            for name in [format!("./{odd}"), format!("file:{odd}"), format!("file:./{odd}")] {
                if Path::new(name.trim_start_matches("file:")).is_absolute() {
                    continue;
                }
                let found = named(&own, "top.qcow2", &name);
                assert_eq!(found.as_deref(), Ok(format!("./{odd}").as_str()), "{name}");
                assert_eq!(local_path(&found.unwrap_or_default()), Some(format!("./{odd}").into()));
            }
            // And it is where it is, not on that server.
            let image = name_of(Path::new(odd));
            assert_eq!(named(&own, &image, "x"), Ok(name_of(&Path::new(odd).with_file_name("x"))));
        }
    }

    #[test]
    fn files_may_be_called_like_servers() {
        for name in ["gluster.img", "gluster-backup/a.img", "nbds.img", "driver.img"] {
            assert_eq!(local_path(name), Some(name.into()));
            assert_eq!(
                named(&Gate::default(), name, "nbds.img").map(|name| name.ends_with("nbds.img")),
                Ok(true)
            );
        }
    }

    #[test]
    fn an_export_has_nothing_beside_it() {
        let all = Gate { servers: true, files: Reach::Anything };
        for name in ["base.img", "sub/base.img", "../base.img"] {
            assert_eq!(named(&all, "nbd://host/disk", name), Err(GateError::NoFile(name.into())));
        }
        assert_eq!(named(&all, "nbd://host/disk", "/vm/b"), Ok("/vm/b".into()));
        assert_eq!(named(&all, "/vm/a", "b"), Ok("/vm/b".into()));
    }
}
