//! The gate: which other files an image may have opened for it, and how their names are read.
//!
//! An image is data from anywhere. The names in it (backing file, data file, `json:` descriptions) are not
//! followed just because they are there: by default only files in the image's own directory, or below it,
//! are opened, and more where the user allows it. Names are cleaned of `.` and `..` by their text alone, and
//! what was cleaned and judged is what is opened. Symbolic links that lead out of the directory were made by
//! somebody who may write there, not by the image: they are followed. Names of disks on servers are for the engine to
//! understand; they are not followed either, unless the user allows it, or they are in the image's own directory there.
//!
//! A backing file without a recorded format is taken for raw, and only if it does not look like anything
//! else: guests write the first bytes of raw disks.

use std::path::{Component, Path, PathBuf};
use std::rc::Rc;

use crate::base::os_name;
use crate::block::{BlockError, IoFuture, Node};
use crate::protocol::structured::parse_json;

/// What a named file is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The layer below; it is only read.
    Backing,
    /// Where the guest's data lies.
    DataFile,
}

/// A request of an image to open another file for it.
#[derive(Clone, Debug)]
pub struct Wanted<'a> {
    /// What for.
    pub role: Role,
    /// The name, as it is written in the image.
    pub name: &'a str,
    /// The format that the image records for it.
    pub format: Option<&'a str>,
    /// The name of the image that asks.
    pub image: &'a str,
    /// Without write access.
    pub read_only: bool,
}

/// Who opens other files for images. The engine has one that asks a [`Gate`].
pub trait OpenFiles: std::fmt::Debug {
    /// Opens the file, or says why not.
    fn open<'a>(&'a self, wanted: Wanted<'a>) -> IoFuture<'a, Result<Rc<Node>, BlockError>>;
}

/// What may be opened.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Gate {
    /// Files of this machine.
    pub files: Reach,
    /// Disks on servers, as backing files.
    pub servers: bool,
}

impl From<Reach> for Gate {
    /// No servers.
    fn from(files: Reach) -> Gate {
        Gate { files, servers: false }
    }
}

/// Which files may be opened.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum Reach {
    /// Files in the directory of the image that names them, and below it.
    #[default]
    OwnDirectory,
    /// Those, and files in these directories.
    Directories(Vec<PathBuf>),
    /// Any file of this machine.
    Anything,
}

/// A name, understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    /// The file.
    pub path: PathBuf,
    /// The format, where the name itself says it (`json:`).
    pub format: Option<String>,
}

/// Why a name was not followed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GateError {
    /// It leads out of where it may.
    #[error(
        "The image names the file '{0}', which is not in its own directory. If you trust the image, allow the \
         directory (--allow-dir DIR) or everything (--allow-any-file)."
    )]
    Outside(String),
    /// A disk on a server, which it may not.
    #[error(
        "The image names '{0}', a disk on a server. If you trust the image, allow that (--allow-servers)."
    )]
    Server(String),
    /// A protocol that is not for files.
    #[error(
        "The image names '{0}', which looks like a disk of another kind than a file, and such a one cannot lie below an image. \
         A file that is called so is named './{0}'."
    )]
    Protocol(String),
    /// A file, beside an image that is not in a directory.
    #[error("The image names the file '{0}', and is no file itself.")]
    NoFile(String),
    /// `json:` with something in it that is not understood.
    #[error("The image describes a file in a way that is not understood: {0}.")]
    Json(String),
}

/// `path` without `.` and `..`, by its text. `..` at the root stays there; leading ones of a relative path stay.
pub fn clean(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => match out.components().next_back() {
                Some(Component::Normal(_)) => {
                    out.pop();
                }
                Some(Component::RootDir) => {}
                _ => out.push(".."),
            },
            other => out.push(other),
        }
    }
    out
}

fn directory(image: &Path) -> PathBuf {
    clean(image.parent().unwrap_or(Path::new("")))
}

/// Reads a name in an image at `image` (a path) and judges it. Relative names are relative to the image.
pub fn resolve(gate: &Gate, image: &Path, name: &str) -> Result<Reference, GateError> {
    let reference = understand(image, name)?;
    judge(gate, Some(image), &reference.path)?;
    Ok(reference)
}

/// Judges a file that is named by an image, which is itself at `image`, or at no path at all.
pub fn judge(gate: &Gate, image: Option<&Path>, path: &Path) -> Result<(), GateError> {
    // A relative path that begins with `..` has left the directory that relative paths begin in.
    let inside = |dir: &Path| {
        let same_kind = dir.is_absolute() == path.is_absolute();
        let leaves = path.strip_prefix(dir).ok().and_then(|rest| rest.components().next())
            == Some(Component::ParentDir);
        same_kind && path.starts_with(dir) && !leaves
    };
    let in_own = || image.is_some_and(|image| inside(&directory(image)));
    let allowed = match &gate.files {
        Reach::Anything => true,
        Reach::OwnDirectory => in_own(),
        Reach::Directories(dirs) => in_own() || dirs.iter().any(|dir| inside(&clean(dir))),
    };
    if allowed { Ok(()) } else { Err(GateError::Outside(os_name::from_path(path))) }
}

/// Reads the name of a file without judging it.
pub fn understand(image: &Path, name: &str) -> Result<Reference, GateError> {
    if let Some(text) = name.strip_prefix("json:") {
        return understand_json(image, text);
    }
    let path = match name.strip_prefix("file:") {
        Some(rest) => rest.strip_prefix("//").unwrap_or(rest),
        None if has_protocol(name) => return Err(GateError::Protocol(name.to_owned())),
        None => name,
    };
    Ok(Reference { path: place(image, path), format: None })
}

fn place(image: &Path, path: &str) -> PathBuf {
    let path = os_name::to_path(path);
    if path.is_absolute() { clean(&path) } else { clean(&directory(image).join(path)) }
}

/// Text before a colon with no slash before it is a protocol, as QEMU has it.
pub fn has_protocol(name: &str) -> bool {
    name.split_once(':').is_some_and(|(before, _)| !before.contains('/'))
}

fn understand_json(image: &Path, text: &str) -> Result<Reference, GateError> {
    let bad = |why: String| Err(GateError::Json(why));
    let value = match parse_json(text) {
        Ok(value) => value,
        Err(error) => return bad(error.to_string()),
    };
    let (mut format, mut driver, mut filename) = (None, None, None);
    // `{"driver": "qcow2", "file": {"driver": "file", "filename": "a"}}`, flat (`file.filename`) or nested.
    let mut queue = vec![(String::new(), &value)];
    while let Some((prefix, value)) = queue.pop() {
        let Some(object) = value.as_object() else { return bad("it is not an object".into()) };
        for (key, value) in object {
            let key = format!("{prefix}{key}");
            match (key.as_str(), value.as_str()) {
                ("driver", Some(name)) => format = Some(name.to_owned()),
                ("filename" | "file.filename", Some(name)) => filename = Some(name.to_owned()),
                ("file.driver", Some(name)) => driver = Some(name.to_owned()),
                ("file", None) if value.is_object() => queue.push(("file.".into(), value)),
                _ => return bad(format!("the option '{key}'")),
            }
        }
    }
    let is_protocol = |name: &str| matches!(name, "file" | "host_device");
    if let Some(name) = format.take() {
        if is_protocol(&name) && driver.is_none() {
            driver = Some(name);
        } else {
            format = Some(name);
        }
    }
    if let Some(name) = driver.filter(|name| !is_protocol(name)) {
        return Err(GateError::Protocol(name));
    }
    match filename {
        Some(name) => Ok(Reference { path: place(image, &name), format }),
        None => bad("no file name".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolved(gate: &Gate, image: &str, name: &str) -> Result<(String, Option<String>), GateError> {
        resolve(gate, Path::new(image), name).map(|r| (r.path.display().to_string(), r.format))
    }

    #[test]
    fn names_are_relative_to_the_image() {
        let own = Gate::default();
        let path = |image, name| resolved(&own, image, name).map(|(path, _)| path);
        assert_eq!(path("/vm/a.qcow2", "base.img"), Ok("/vm/base.img".into()));
        assert_eq!(path("/vm/a.qcow2", "./x/../base.img"), Ok("/vm/base.img".into()));
        assert_eq!(path("/vm/a.qcow2", "/vm/sub/base.img"), Ok("/vm/sub/base.img".into()));
        assert_eq!(path("a.qcow2", "base.img"), Ok("base.img".into()));
        assert_eq!(path("vm/a.qcow2", "file:base.img"), Ok("vm/base.img".into()));
        assert_eq!(path("./a.qcow2", "file:///etc/x"), Err(GateError::Outside("/etc/x".into())));
    }

    #[test]
    fn names_that_lead_out_are_not_followed() {
        let own = Gate::default();
        for (image, name) in [
            ("/vm/a", "/etc/shadow"),
            ("/vm/a", "../etc/shadow"),
            ("/vm/a", "x/../../etc/shadow"),
            ("/vm/a", "/vm/../etc/shadow"),
            ("/vm/a", "/vmx/base"),
            ("a", "../b"),
            ("a", "/b"),
            ("../a", "../b"),
            ("vm/a", "../../b"),
            (
                "/vm/a",
                "json:{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"/etc/shadow\"}}",
            ),
        ] {
            assert!(matches!(resolved(&own, image, name), Err(GateError::Outside(_))), "{image} {name}");
            assert!(resolved(&Reach::Anything.into(), image, name).is_ok());
        }
        let more = Gate::from(Reach::Directories(vec!["/base/".into()]));
        assert!(resolved(&more, "/vm/a", "/base/b").is_ok() && resolved(&more, "/vm/a", "b").is_ok());
        assert!(resolved(&more, "/vm/a", "/base/../etc/b").is_err());
        assert!(matches!(
            resolved(&Reach::Anything.into(), "/a", "nbd:localhost:1"),
            Err(GateError::Protocol(_))
        ));
    }

    #[test]
    fn json_descriptions() {
        let own = Gate::default();
        for json in [
            r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"b"}}"#,
            r#"json:{"driver":"qcow2","file.driver":"file","file.filename":"/vm/b"}"#,
            r#"json:{"file.filename":"b","driver":"qcow2"}"#,
        ] {
            assert_eq!(resolved(&own, "/vm/a", json), Ok(("/vm/b".into(), Some("qcow2".into()))), "{json}");
        }
        let plain = r#"json:{"driver":"file","filename":"b"}"#;
        assert_eq!(resolved(&own, "/vm/a", plain), Ok(("/vm/b".into(), None)));
        for bad in [
            "json:{",
            "json:[]",
            r#"json:{"driver":"qcow2"}"#,
            r#"json:{"driver":"raw","offset":5,"file.filename":"b"}"#,
            r#"json:{"driver":"nbd","host":"h"}"#,
            r#"json:{"driver":"raw","file":{"driver":"nbd","filename":"b"}}"#,
        ] {
            assert!(resolved(&own, "/vm/a", bad).is_err(), "{bad}");
        }
    }
}
