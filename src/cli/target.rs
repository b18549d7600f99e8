//! The target of a copy: made if it is new, and marked as unfinished before anybody can take it for a copy.
//!
//! A new target appears under its name all at once: of the right length, and with its mark. It is made under
//! a hidden name next to it, `.NAME.blockferry-PID`, marked, made durable, and renamed, unless the name was
//! taken meanwhile. So whatever ends this program at whatever moment, an image without a mark is complete; at
//! worst an empty file with a hidden name is left behind.
//!
//! One that an earlier run of the same job has left unfinished is taken over.
//!
//! A file on a server (GlusterFS) is made under its own name, which must not be taken, and its mark is a note in the state
//! directory, as for all that is not on this machine.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use blockferry_ring::{Errno, FileKind};

use super::exit::Failure;
use crate::base::os_name;
use crate::base::process::Fate;
use crate::base::shown::plain;
use crate::block::{Driver, Operation};
use crate::engine::admit::{Admitted, Held, Refusal, Standing, empty, place};
use crate::engine::create::{Beside, NewImage, data_file_path};
use crate::engine::open::local_path;
use crate::engine::remote;
use crate::engine::{Engine, Format, ImageOptions, NodeSpec};
use crate::format::qcow2::{Gate, Reach};
use crate::graph::node::{Child, Node, Role};
use crate::protocol::file::{CreateOptions, FileDriver};
use crate::protocol::mark::{MarkInfo, TargetMark};

/// How a target is to be opened.
#[derive(Debug)]
pub struct TargetOptions<'a> {
    /// As the user said it.
    pub name: &'a str,
    /// How to open it.
    pub image: ImageOptions,
    /// Where marks go that targets cannot carry.
    pub state_dir: Option<PathBuf>,
    /// What the mark says.
    pub mark: MarkInfo,
    /// What it says when the job has completed, if the target is no whole copy then.
    pub at_end: Option<MarkInfo>,
}

/// What was made here.
#[derive(Debug)]
enum Made {
    /// A file of this machine, and its data file.
    File(PathBuf, Option<PathBuf>),
    /// The file of this name, on a server.
    Remote(String),
}

impl Made {
    /// Removes it, after an error that is told.
    async fn remove(&self, engine: &Engine) {
        let _ = match self {
            Made::File(path, data_file) => {
                let removed = data_file.as_ref().map_or(Ok(()), |path| engine.ring().unlink(path));
                engine.ring().unlink(path).and(removed).map_err(drop)
            }
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
    /// Keep others away from it, and what is read as it is, until a job has its own locks.
    _promised: Vec<Rc<Child>>,
    state_dir: Option<PathBuf>,
    mark: MarkInfo,
    at_end: Option<MarkInfo>,
    /// It was made here.
    made: Option<Made>,
    /// It was there, and has been emptied.
    remade: bool,
}

impl Target {
    /// Takes the target that was judged: makes it as `new` says if it is not there, or is to be made anew; it is marked
    /// before that.
    pub async fn take(
        engine: &Engine,
        admitted: Admitted,
        options: TargetOptions<'_>,
        new: &NewImage,
    ) -> Result<Target, Failure> {
        let ring = engine.ring();
        let mut image = options.image.clone();
        let Admitted { target: standing, data_file, mode, uses } = admitted;
        let Some(standing) = standing else { return Err(Failure::text("There is no target")) };
        if !matches!(standing, Standing::AsItIs(_)) {
            // What such an image names was named by the user, and has been looked at: it needs no permission.
            image.gate = Gate { files: Reach::Anything, servers: true };
        }
        let beside = Beside { data_file: data_file.as_ref().map(Held::bytes), mode: Some(mode) };
        let (held, made, remade) = match standing {
            Standing::AsItIs(held) => (Some(held), None, false),
            Standing::Anew(held) => {
                let file = held.bytes();
                try_length(file, new).await?;
                make_state_dir(engine, file.driver(), options.state_dir.as_deref())?;
                let (driver, state_dir) = (file.driver().clone(), options.state_dir.clone());
                TargetMark::new(ring, driver, state_dir, options.mark.clone()).set().await?;
                empty(file).await?;
                new.write(ring, file, &path_of(options.name), &beside).await?;
                (Some(held), None, true)
            }
            Standing::Missing => {
                image.format = image.format.or(Some(new.format()));
                (None, Some(make(engine, &options, new, &beside).await?), false)
            }
        };
        // The image has locks of its own on it.
        drop(data_file);
        let opened = async {
            match held {
                Some(held) => held.open_image(ring, options.name, &image).await,
                None => {
                    let node = engine.open(options.name, &image).await?;
                    let promised = node.attach_in_time(Role::PromisedTarget).await?;
                    Ok((node, promised))
                }
            }
        };
        let (node, promised) = match opened.await {
            Ok(opened) => opened,
            Err(error) => {
                if let Some(made) = &made {
                    made.remove(engine).await;
                }
                return Err(error.into());
            }
        };
        let TargetOptions { state_dir, mark, at_end, .. } = options;
        let _promised = uses.into_iter().chain([promised]).collect();
        let target = Target { node, _promised, state_dir, mark, at_end, made, remade };
        if let Err(failure) = make_state_dir(engine, target.node.driver(), target.state_dir.as_deref()) {
            target.undo(engine).await;
            return Err(failure);
        }
        Ok(target)
    }

    /// The target was made, or made anew: nothing that was there before can be read from it.
    pub fn is_fresh(&self) -> bool {
        self.made.is_some() || self.remade
    }

    /// The mark that the job puts on it.
    pub fn marker(&self, engine: &Engine) -> TargetMark {
        let driver = self.node.driver().clone();
        TargetMark::new(engine.ring(), driver, self.state_dir.clone(), self.mark.clone())
            .ending_as(self.at_end.clone())
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

/// Whether the target is what an earlier run of the job whose mark would be `mark` has left unfinished: nobody has anything
/// to lose there. One that is being written is not.
pub async fn is_left_by(engine: &Engine, name: &str, mark: &MarkInfo, state_dir: Option<&Path>) -> bool {
    let Some(path) = local_path(name) else { return false };
    if !matches!(engine.ring().lookup(&path), Ok(Some(FileKind::Regular | FileKind::Block))) {
        return false;
    }
    let look =
        ImageOptions { lock: false, read_only: true, is_hidden: true, ..ImageOptions::raw().overwriting() };
    let Ok(node) = engine.open_spec(&NodeSpec::file(path), &look).await else {
        return false;
    };
    let Ok(Some(left)) = TargetMark::read(engine.ring(), node.driver(), state_dir).await else {
        return false;
    };
    let runs = left.process.as_ref().is_some_and(|process| process.fate() == Fate::Runs);
    if runs || !left.is_continued_by(mark) {
        return false;
    }
    tracing::warn!("'{name}' was left unfinished by an earlier run ({left}): it is taken over");
    true
}

fn exists(name: &str) -> Failure {
    Refusal::Exists { name: name.to_owned(), say: "--force" }.into()
}

/// The path that names of other files are relative to.
fn path_of(name: &str) -> PathBuf {
    local_path(name).unwrap_or_default()
}

/// Makes an image in a new file on a server.
pub async fn make_remote(engine: &Engine, name: &str, new: &NewImage) -> Result<(), Failure> {
    let ring = engine.ring();
    let file = match remote::create(ring, name, &ImageOptions::raw()).await {
        Ok(file) => file,
        Err(error) if error.errno == Errno::EEXIST => return Err(exists(name)),
        Err(error) => return Err(error.into()),
    };
    if let Err(error) = new.write(ring, &Node::of(ring, file), Path::new(""), &Beside::default()).await {
        Made::Remote(name.to_owned()).remove(engine).await;
        return Err(error.into());
    }
    Ok(())
}

/// Makes a target that is not there; a file appears under its name with its mark, all at once.
async fn make(
    engine: &Engine,
    options: &TargetOptions<'_>,
    new: &NewImage,
    beside: &Beside<'_>,
) -> Result<Made, Failure> {
    let Some(path) = local_path(options.name) else {
        make_remote(engine, options.name, new).await?;
        return Ok(Made::Remote(options.name.to_owned()));
    };
    let mark = async |file: &Rc<dyn Driver>| -> Result<(), Failure> {
        let state_dir = options.state_dir.clone();
        make_state_dir(engine, file, state_dir.as_deref())?;
        let mark = TargetMark::new(engine.ring(), file.clone(), state_dir, options.mark.clone());
        Ok(mark.set().await?)
    };
    make_file(engine, &path, new, beside, mark).await?;
    let data_file = new.data_file().filter(|_| beside.data_file.is_none());
    let data_file = data_file.and_then(|name| data_file_path(&path, name).ok());
    Ok(Made::File(place::leads_to(engine.ring(), &path).await, data_file))
}

/// Makes an image in a new file, which appears under the name `path` when it is whole. `last` is called with the file
/// before that.
pub async fn make_file(
    engine: &Engine,
    path: &Path,
    new: &NewImage,
    beside: &Beside<'_>,
    last: impl AsyncFnOnce(&Rc<dyn Driver>) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let ring = engine.ring();
    let place = &place::leads_to(ring, path).await;
    remove_left_over(engine, place).await;
    let hidden = hidden_name(place);
    let made = CreateOptions { mode: beside.mode, ..CreateOptions::default() };
    // What goes wrong is told of the name that was given.
    let named = |failure| of_target(failure, &os_name::from_path(&hidden), path);
    FileDriver::create(ring, &hidden, 0, made).await.map_err(|error| named(error.into()))?;
    new.prepare(ring, &hidden).await;
    let mut is_written = false;
    let result = async {
        let image = ImageOptions { is_hidden: true, ..ImageOptions::raw().overwriting() };
        let node = engine.open_spec(&NodeSpec::file(&*hidden), &image).await?;
        // Tells others that somebody is at it. Where locks are not to be had they must do without.
        let _using = node.attach_in_time(Role::PromisedTarget).await.ok();
        new.write(ring, &node, path, beside).await?;
        is_written = true;
        last(node.driver()).await?;
        let failed = |errno| match errno {
            Errno::EEXIST => exists(&os_name::from_path(path)),
            errno => {
                Failure::text(format!("Making the image '{}' failed: {errno}", os_name::from_path(path)))
            }
        };
        ring.rename_new(&hidden, place).map_err(failed)?;
        ring.sync_directory(&parent(place)).map_err(failed)
    };
    let result = result.await.map_err(named);
    if result.is_err() {
        // It may have its name already; both removals are tidying up after an error that is told.
        let _ = ring.unlink(&hidden);
        if is_written {
            beside.remove(ring, path, new);
        }
    }
    result
}

/// An error about what has a hidden name still, as one about the target.
fn of_target(failure: Failure, hidden: &str, path: &Path) -> Failure {
    match failure {
        Failure::Block(mut error) if *error.name == *hidden => {
            error.name = os_name::from_path(path).into();
            // Nobody has asked for another length of what is only being made.
            if error.operation == Operation::Resize {
                error.operation = Operation::Create;
            }
            if error.errno == Errno::EFBIG {
                error = error.because("Its filesystem cannot hold a file of that length.");
            }
            Failure::Block(error)
        }
        other => other,
    }
}

fn parent(path: &Path) -> PathBuf {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_owned()
}

fn hidden_name(path: &Path) -> PathBuf {
    let mut name = hidden_prefix(path);
    name.push(std::process::id().to_string());
    parent(path).join(name)
}

/// How the hidden names of a target begin; a process id follows.
fn hidden_prefix(path: &Path) -> OsString {
    let name = path.file_name().unwrap_or_default().as_bytes();
    // Names may have 255 bytes; what is behind this one must fit in. No character is cut in two.
    let mut end = name.len().min(200);
    while name.get(end).is_some_and(|byte| byte & 0xc0 == 0x80) && end > 196 {
        end -= 1;
    }
    let mut hidden = OsString::from(".");
    hidden.push(OsStr::from_bytes(&name[..end]));
    hidden.push(".blockferry-");
    hidden
}

/// Removes what runs that were killed have left under hidden names of this target. Nobody uses it whose process is not there
/// any more, and whose lock can be had.
async fn remove_left_over(engine: &Engine, path: &Path) {
    let (ring, dir, prefix) = (engine.ring(), parent(path), hidden_prefix(path));
    let found = ring.offload(move || left_over(&dir, &prefix)).await.unwrap_or_default();
    for hidden in found {
        let image = ImageOptions { is_hidden: true, ..ImageOptions::raw().overwriting() };
        let name = os_name::from_path(&hidden);
        // What cannot be opened or locked stays where it is.
        let Ok(node) = engine.open_spec(&NodeSpec::file(&*hidden), &image).await else { continue };
        let Ok(_held) = node.attach(Role::PromisedTarget) else { continue };
        if ring.unlink(&hidden).is_ok() {
            tracing::info!("'{name}' was left by a run that was killed: it is removed");
        }
    }
}

fn left_over(dir: &Path, prefix: &OsStr) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let is_left = |name: &OsStr| {
        let pid = name.as_bytes().strip_prefix(prefix.as_bytes()).and_then(|pid| str::from_utf8(pid).ok());
        let pid = pid.and_then(|pid| pid.parse::<u32>().ok());
        pid.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists())
    };
    entries.flatten().filter(|entry| is_left(&entry.file_name())).map(|entry| entry.path()).collect()
}

/// A raw image is as long as its disk: whether the file can be is tried before it is emptied. What it holds stays.
pub async fn try_length(file: &Node, new: &NewImage) -> Result<(), Failure> {
    let old = file.len();
    if new.format() == Format::Raw && new.len() > old {
        file.set_len(new.len()).await?;
        file.set_len(old).await?;
    }
    Ok(())
}

/// Makes the directory for marks if this disk needs it.
pub fn make_state_dir(engine: &Engine, driver: &Rc<dyn Driver>, dir: Option<&Path>) -> Result<(), Failure> {
    let Some(dir) = dir.filter(|_| TargetMark::needs_state_dir(engine.ring(), driver)) else { return Ok(()) };
    std::fs::create_dir_all(dir).map_err(|error| {
        let error = plain(&error);
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
