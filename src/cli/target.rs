//! The target of a copy: made if it is new, and marked as unfinished before anybody can take it for a copy.
//!
//! A new target appears under its name all at once: of the right length, and with its mark. It is made under
//! a hidden name next to it, `.NAME.blockferry-PID`, marked, made durable, and renamed, unless the name was
//! taken meanwhile. So whatever ends this program at whatever moment, an image without a mark is complete; at
//! worst an empty file with a hidden name is left behind.
//!
//! A file on a server (GlusterFS) is made under its own name, which must not be taken, and its mark is a note in the state
//! directory, as for all that is not on this machine.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use blockferry_ring::{Errno, FileKind};

use super::exit::Failure;
use super::image::OpenArgs;
use crate::block::Driver;
use crate::engine::create::{NewImage, RawPreallocation};
use crate::engine::open::local_path;
use crate::engine::remote;
use crate::engine::{Engine, Format, ImageOptions};
use crate::graph::node::{Node, UseKind};
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

/// What was made here.
#[derive(Debug)]
enum Made {
    /// A file of this machine.
    File(PathBuf),
    /// The file of this name, on a server.
    Remote(String),
}

impl Made {
    /// Removes it, after an error that is told.
    async fn remove(&self, engine: &Engine) {
        let _ = match self {
            Made::File(path) => engine.ring().unlink(path).map_err(drop),
            Made::Remote(name) => {
                remote::remove(engine.ring(), name, &ImageOptions::raw()).await.map_err(drop)
            }
        };
    }
}

/// An opened target.
#[derive(Debug)]
pub struct Target {
    /// To copy to.
    pub node: Rc<Node>,
    state_dir: Option<PathBuf>,
    mark: MarkInfo,
    /// It was made here.
    made: Option<Made>,
    /// It was there, and has been emptied.
    remade: bool,
}

impl Target {
    /// Opens a target; makes it if it is a new file: a raw image, all hole.
    pub async fn open(engine: &Engine, options: TargetOptions<'_>) -> Result<Target, Failure> {
        let new = NewImage::Raw { len: options.len, preallocation: RawPreallocation::Off };
        Target::open_or_make(engine, options, &new, None).await
    }

    /// Opens a target; makes it as `new` says if it is a new file.
    pub async fn open_as(
        engine: &Engine,
        options: TargetOptions<'_>,
        new: &NewImage,
    ) -> Result<Target, Failure> {
        Target::open_or_make(engine, options, new, None).await
    }

    /// Makes a target anew, whatever is there: a file that exists must be one that may be overwritten
    /// ([`TargetOptions::force`]); it is marked, emptied, and made into what `new` says. A block device is taken as
    /// it is (raw only).
    pub async fn make_anew(
        engine: &Engine,
        options: TargetOptions<'_>,
        new: &NewImage,
    ) -> Result<Target, Failure> {
        let ring = engine.ring();
        let options = TargetOptions { format: Some(new.format()), ..options };
        let path = local_path(options.name);
        let kind = path.as_ref().map(|path| ring.lookup(path)).transpose();
        let mut overwrites = matches!(kind, Ok(Some(Some(FileKind::Regular)))) && options.force;
        let name =
            path.as_ref().map_or_else(|| options.name.to_owned(), |path| format!("file:{}", path.display()));
        let mut made = None;
        if remote::can_create(options.name) {
            made = make_remote(engine, options.name, new).await?;
            overwrites = made.is_none() && options.force;
        }
        if overwrites {
            let raw = ImageOptions { lock: !options.open.no_lock, ..ImageOptions::raw() };
            let file = engine.open(&name, &raw).await?;
            let lock = file.attach(UseKind::JobTarget("create"))?;
            make_state_dir(engine, file.driver(), options.state_dir.as_deref())?;
            let (driver, state_dir) = (file.driver().clone(), options.state_dir.clone());
            TargetMark::new(ring, driver, state_dir, options.mark.clone()).set().await?;
            file.driver().set_len(0).await?;
            new.write(ring, file.driver(), path.as_deref().unwrap_or(Path::new(""))).await?;
            drop(lock);
        }
        let target = Target::open_or_make(engine, options, new, made).await?;
        Ok(Target { remade: overwrites, ..target })
    }

    /// The target was made, or made anew: nothing that was there before can be read from it.
    pub fn is_fresh(&self) -> bool {
        self.made.is_some() || self.remade
    }

    async fn open_or_make(
        engine: &Engine,
        options: TargetOptions<'_>,
        new: &NewImage,
        mut made: Option<Made>,
    ) -> Result<Target, Failure> {
        let ring = engine.ring();
        let mut format = options.format;
        if let Some(path) = local_path(options.name) {
            let looked = ring.lookup(&path).map_err(|errno| {
                Failure::text(format!("The target '{}' cannot be looked at: {errno}", path.display()))
            })?;
            if looked.is_some() && !options.force {
                return Err(exists(&path.display().to_string()));
            }
            if looked.is_none() {
                make(engine, &path, &options, new).await?;
                made = Some(Made::File(path));
                format = format.or(Some(new.format()));
            }
        } else if remote::can_create(options.name) {
            if made.is_none() {
                made = make_remote(engine, options.name, new).await?;
            }
            match &made {
                Some(_) => format = format.or(Some(new.format())),
                None if options.force => {}
                None => return Err(exists(options.name)),
            }
        } else if remote::is_remote(options.name) && !options.force {
            return Err(Failure::text(format!(
                "The target '{}' is a disk of a server, which is left alone. Say --force to overwrite it",
                options.name
            )));
        }
        let opened = engine.open(options.name, &options.open.image(format, false)).await;
        let node = match opened {
            Ok(node) => node,
            Err(error) => {
                if let Some(made) = &made {
                    made.remove(engine).await;
                }
                return Err(error.into());
            }
        };
        let target = Target { node, state_dir: options.state_dir, mark: options.mark, made, remade: false };
        if let Err(failure) = make_state_dir(engine, target.node.driver(), target.state_dir.as_deref()) {
            target.undo(engine).await;
            return Err(failure);
        }
        Ok(target)
    }

    /// The mark that the job puts on it.
    pub fn marker(&self, engine: &Engine) -> TargetMark {
        let driver = self.node.driver().clone();
        TargetMark::new(engine.ring(), driver, self.state_dir.clone(), self.mark.clone())
    }

    /// The job could not start: what was made for it is removed again.
    pub async fn undo(&self, engine: &Engine) {
        if let Some(made) = &self.made {
            // A note in the state directory would else be found by whoever gets the inode number next.
            let _ = self.marker(engine).clear().await;
            made.remove(engine).await;
        }
    }
}

fn exists(name: &str) -> Failure {
    Failure::text(format!(
        "'{name}' exists and is left alone. Name a new file, or say --force to overwrite it"
    ))
}

/// Makes an image in a new file on a server; `None` if there is one of this name already.
async fn make_remote(engine: &Engine, name: &str, new: &NewImage) -> Result<Option<Made>, Failure> {
    if new.has_data_file() {
        return Err(Failure::text(format!(
            "'{name}' is on a server: an image there cannot name a data file"
        )));
    }
    let ring = engine.ring();
    let file = match remote::create(ring, name, &ImageOptions::raw()).await {
        Ok(file) => file,
        Err(error) if error.errno == Errno::EEXIST => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let made = Made::Remote(name.to_owned());
    if let Err(error) = new.write(ring, &file, Path::new("")).await {
        made.remove(engine).await;
        return Err(error.into());
    }
    Ok(Some(made))
}

/// Makes an image in a new file on a server, for its own sake. With `force` one that is there is made anew.
pub async fn create_remote(engine: &Engine, name: &str, new: &NewImage, force: bool) -> Result<(), Failure> {
    if make_remote(engine, name, new).await?.is_some() {
        return Ok(());
    }
    if !force {
        return Err(exists(name));
    }
    let file = engine.open(name, &ImageOptions::raw()).await?;
    file.driver().set_len(0).await?;
    Ok(new.write(engine.ring(), file.driver(), Path::new("")).await?)
}

/// Makes a file with its mark under the name `path`, all at once.
async fn make(
    engine: &Engine,
    path: &Path,
    options: &TargetOptions<'_>,
    new: &NewImage,
) -> Result<(), Failure> {
    let mark = async |file: &Rc<dyn Driver>| -> Result<(), Failure> {
        let state_dir = options.state_dir.clone();
        make_state_dir(engine, file, state_dir.as_deref())?;
        let mark = TargetMark::new(engine.ring(), file.clone(), state_dir, options.mark.clone());
        Ok(mark.set().await?)
    };
    make_file(engine, path, new, mark).await
}

/// Makes an image in a new file, which appears under the name `path` when it is whole. `last` is called with the file
/// before that.
pub async fn make_file(
    engine: &Engine,
    path: &Path,
    new: &NewImage,
    last: impl AsyncFnOnce(&Rc<dyn Driver>) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let ring = engine.ring();
    let hidden = hidden_name(path);
    FileDriver::create(ring, &hidden, 0, CreateOptions::default()).await?;
    let result = async {
        let image = ImageOptions { lock: false, ..ImageOptions::raw() };
        let node = engine.open(&format!("file:{}", hidden.display()), &image).await?;
        new.write(ring, node.driver(), path).await?;
        last(node.driver()).await?;
        let failed = |errno| match errno {
            Errno::EEXIST => exists(&path.display().to_string()),
            errno => Failure::text(format!("Making the image '{}' failed: {errno}", path.display())),
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
