//! Names of other files, as images have them and as users say them for an image: where they lead, and whether an image may
//! have them opened.
//!
//! A name is relative to the image, which may be a file of this machine or, on a volume of GlusterFS, of a server. Of those
//! that an image has, the ones that stay in its own directory are followed; the others where the user allows it
//! ([`Gate`]).

use std::path::{Component, Path};

use blockferry_ring::Errno;

use super::open::local_path;
use super::remote::{gluster_image, names_server};
use crate::block::{BlockError, Operation};
use crate::format::qcow2::Gate;
use crate::format::qcow2::gate::{
    GateError, Reference, Role, Wanted, clean, has_protocol, judge, understand,
};
use crate::protocol::gluster::Image;

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
            Named::File(reference) => reference.path.display().to_string(),
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
    let named = match (wanted.role, local_path(wanted.image)) {
        (Role::Backing, _) => by_user(wanted.image, wanted.name)?,
        // The guest's data is beside its tables, as a file.
        (Role::DataFile, Some(path)) => Named::File(understand(&path, wanted.name)?),
        (Role::DataFile, None) => return Err(GateError::NoFile(wanted.name.to_owned())),
    };
    match &named {
        Named::File(reference) => judge(gate, local_path(wanted.image).as_deref(), &reference.path)?,
        Named::Server(name) if gate.servers || is_in_directory_of(wanted.image, name) => {}
        Named::Server(_) => return Err(GateError::Server(wanted.name.to_owned())),
    }
    Ok(named)
}

/// What a user is told whose name for another file makes no sense.
pub(super) fn failed(name: &str, error: &GateError) -> BlockError {
    BlockError::new(Operation::Open, name, Errno::EINVAL).hint(error.to_string())
}

fn directory(image: &Image) -> &Path {
    Path::new(&image.path).parent().unwrap_or(Path::new(""))
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
    other.servers == image.servers
        && other.volume == image.volume
        && is_plain
        && path.starts_with(directory(&image))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::qcow2::Reach;

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
