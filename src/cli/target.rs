//! The target of a copy: made if it is new, and marked as unfinished before anybody can take it for a copy.
//!
//! A new target appears under its name all at once: of the right length, and with its mark. It is made under
//! a hidden name next to it, `.NAME.blockferry-PID`, marked, made durable, and renamed, unless the name was
//! taken meanwhile. So whatever ends this program at whatever moment, an image without a mark is complete; at
//! worst an empty file with a hidden name is left behind.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use super::exit::Failure;
use super::image::OpenArgs;
use crate::block::Driver;
use crate::engine::open::local_path;
use crate::engine::remote::is_remote;
use crate::engine::{Engine, Format, ImageOptions};
use crate::graph::node::Node;
use crate::protocol::file::{CreateOptions, FileDriver};
use crate::protocol::mark::{MarkInfo, TargetMark};

/// How a target is to be opened.
#[derive(Debug)]
pub struct TargetOptions<'a> {
    /// As the user said it.
    pub name: &'a str,
    /// Its format, if that was said.
    pub format: Option<Format>,
    /// Overwrite what exists.
    pub force: bool,
    /// Bytes of a new one.
    pub len: u64,
    /// Options for opening.
    pub open: &'a OpenArgs,
    /// Where marks go that targets cannot carry.
    pub state_dir: Option<PathBuf>,
    /// What the mark says.
    pub mark: MarkInfo,
}

/// An opened target.
#[derive(Debug)]
pub struct Target {
    /// To copy to.
    pub node: Rc<Node>,
    state_dir: Option<PathBuf>,
    mark: MarkInfo,
    /// It was made here, under this path.
    made: Option<PathBuf>,
}

impl Target {
    /// Opens a target; makes it if it is a new file.
    pub async fn open(engine: &Engine, options: TargetOptions<'_>) -> Result<Target, Failure> {
        let ring = engine.ring();
        let mut made = None;
        let mut format = options.format;
        if let Some(path) = local_path(options.name) {
            let looked = ring.lookup(&path).map_err(|errno| {
                Failure::text(format!("The target '{}' cannot be looked at: {errno}", path.display()))
            })?;
            if looked.is_some() && !options.force {
                return Err(exists(&path));
            }
            if looked.is_none() {
                make(engine, &path, &options).await?;
                made = Some(path);
                format = format.or(Some(Format::Raw));
            }
        }
        if is_remote(options.name) && !options.force {
            return Err(Failure::text(format!(
                "The target '{}' is a disk of a server, which is left alone. Say --force to overwrite it",
                options.name
            )));
        }
        let opened = engine.open(options.name, &options.open.image(format, false)).await;
        let node = match opened {
            Ok(node) => node,
            Err(error) => {
                if let Some(path) = &made {
                    // The error that made it useless is the one to tell.
                    let _ = ring.unlink(path);
                }
                return Err(error.into());
            }
        };
        let target = Target { node, state_dir: options.state_dir, mark: options.mark, made };
        make_state_dir(engine, target.node.driver(), target.state_dir.as_deref())?;
        Ok(target)
    }

    /// The mark that the job puts on it.
    pub fn marker(&self, engine: &Engine) -> TargetMark {
        let driver = self.node.driver().clone();
        TargetMark::new(engine.ring(), driver, self.state_dir.clone(), self.mark.clone())
    }

    /// The job could not start: what was made for it is removed again.
    pub async fn undo(&self, engine: &Engine) {
        if let Some(path) = &self.made {
            // A note in the state directory would else be found by whoever gets the inode number next.
            let _ = self.marker(engine).clear().await;
            let _ = engine.ring().unlink(path);
        }
    }
}

fn exists(path: &Path) -> Failure {
    Failure::text(format!(
        "The target '{}' exists and is left alone. Name a new file, or say --force to overwrite it",
        path.display()
    ))
}

/// Makes a file with its length and its mark under the name `path`, all at once.
async fn make(engine: &Engine, path: &Path, options: &TargetOptions<'_>) -> Result<(), Failure> {
    let ring = engine.ring();
    let hidden = hidden_name(path);
    FileDriver::create(ring, &hidden, options.len, CreateOptions::default()).await?;
    let result = async {
        let image = ImageOptions { lock: false, ..ImageOptions::raw() };
        let node = engine.open(&format!("file:{}", hidden.display()), &image).await?;
        let state_dir = options.state_dir.clone();
        make_state_dir(engine, node.driver(), state_dir.as_deref())?;
        let mark = TargetMark::new(ring, node.driver().clone(), state_dir, options.mark.clone());
        mark.set().await?;
        let failed = |errno| match errno {
            blockferry_ring::Errno::EEXIST => exists(path),
            errno => Failure::text(format!("Making the target '{}' failed: {errno}", path.display())),
        };
        ring.rename_new(&hidden, path).map_err(failed)?;
        ring.sync_directory(&parent(path)).map_err(failed)
    };
    let result = result.await;
    if result.is_err() {
        // It may have its name already; both removals are tidying up after an error that is told.
        let _ = ring.unlink(&hidden);
    }
    result
}

fn parent(path: &Path) -> PathBuf {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_owned()
}

fn hidden_name(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // Names may have 255 bytes; what is behind this one must fit in.
    let mut end = name.len().min(200);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    parent(path).join(format!(".{}.blockferry-{}", &name[..end], std::process::id()))
}

/// Makes the directory for marks if this target needs it.
fn make_state_dir(engine: &Engine, driver: &Rc<dyn Driver>, dir: Option<&Path>) -> Result<(), Failure> {
    let Some(dir) = dir.filter(|_| TargetMark::needs_state_dir(engine.ring(), driver)) else { return Ok(()) };
    std::fs::create_dir_all(dir).map_err(|error| {
        Failure::text(format!(
            "Making the state directory '{}' failed: {error}. Name another with --state-dir",
            dir.display()
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hidden_name_is_next_to_the_real_one_and_short_enough() {
        let pid = std::process::id();
        assert_eq!(hidden_name(Path::new("/a/b.img")), Path::new(&format!("/a/.b.img.blockferry-{pid}")));
        assert_eq!(hidden_name(Path::new("b")), Path::new(&format!("./.b.blockferry-{pid}")));
        let long = hidden_name(Path::new(&"ü".repeat(127)));
        assert!(long.file_name().is_some_and(|name| name.len() <= 255));
    }
}
