//! What is done about the marks on images that are opened: of unfinished targets, and of disks that clients have left.
//!
//! Whoever opens an image to use what is in it (to copy it, to serve it, as a backing file) is refused one that is not
//! whole, unless that is allowed; whoever only looks is told. Every layer of a chain is judged by itself. A mark that was
//! found under a name which may mean another disk by now refuses nothing.

use std::path::PathBuf;
use std::rc::Rc;

use blockferry_ring::{Errno, Ring};

use super::ImageOptions;
use crate::block::{BlockError, Driver, Operation};
use crate::protocol::mark::{MarkInfo, MarkState, TargetMark};

/// What marks mean to who opens an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Heed {
    /// An image that is not whole is refused; of an old one is warned.
    #[default]
    Refuse,
    /// Of both is warned.
    Warn,
    /// They are no matter: the image is overwritten.
    Ignore,
}

/// How marks are treated.
#[derive(Clone, Debug, Default)]
pub struct Marks {
    /// What they mean.
    pub heed: Heed,
    /// Where the notes about images are that cannot carry a mark.
    pub state_dir: Option<PathBuf>,
    /// An image that is not whole may be used.
    pub allow_incomplete: bool,
    /// An image that clients have left by a pivot may be written.
    pub allow_superseded: bool,
}

impl Marks {
    /// They are no matter.
    pub fn ignored() -> Marks {
        Marks { heed: Heed::Ignore, ..Marks::default() }
    }

    /// Of all is warned.
    pub fn warned(self) -> Marks {
        Marks { heed: Heed::Warn, ..self }
    }
}

/// Judges one layer that has been opened as `name`.
pub(super) async fn heed(
    ring: &Ring,
    layer: &Rc<dyn Driver>,
    name: &str,
    options: &ImageOptions,
) -> Result<(), BlockError> {
    if options.marks.heed == Heed::Ignore {
        return Ok(());
    }
    match TargetMark::read(ring, layer, options.marks.state_dir.as_deref()).await {
        Ok(None) => Ok(()),
        Ok(Some(mark)) => judge(&mark, name, options),
        Err(error) => {
            tracing::info!(%error, "whether an image is marked cannot be told");
            Ok(())
        }
    }
}

/// The same for what is opened without waiting: only what a file carries itself is known then.
pub(super) fn heed_own(
    ring: &Ring,
    layer: &Rc<dyn Driver>,
    name: &str,
    options: &ImageOptions,
) -> Result<(), BlockError> {
    match TargetMark::read_own(ring, layer) {
        Some(mark) if options.marks.heed != Heed::Ignore => judge(&mark, name, options),
        _ => Ok(()),
    }
}

/// Why a disk of this name and with this mark is not used so, if it is not.
pub fn refusal(mark: &MarkInfo, name: &str, options: &ImageOptions) -> Option<BlockError> {
    let marks = &options.marks;
    let is_allowed = match mark.kind() {
        MarkState::Superseded => options.read_only || marks.allow_superseded,
        _ => marks.allow_incomplete,
    };
    if is_allowed || mark.doubtful || marks.heed != Heed::Refuse {
        return None;
    }
    let why = match mark.kind() {
        MarkState::Superseded => format!(
            "It is old: {mark}. Use that disk; or, if this one is to be written all the same, say --allow-superseded."
        ),
        _ => format!(
            "It is no whole disk: {mark}. Run that job again, which takes it over; or, if it is to be used all the same, say \
             --allow-incomplete."
        ),
    };
    Some(BlockError::new(Operation::Open, name, Errno::EPERM).because(why))
}

fn judge(mark: &MarkInfo, name: &str, options: &ImageOptions) -> Result<(), BlockError> {
    if let Some(error) = refusal(mark, name, options) {
        return Err(error);
    }
    if mark.kind() == MarkState::Superseded {
        tracing::warn!("'{name}' is old: {mark}");
    } else if mark.doubtful {
        tracing::warn!(
            "a disk that was called '{name}' was marked as no whole disk ({mark}); it may be another one by now"
        );
    } else {
        tracing::warn!("'{name}' is no whole disk: {mark}");
    }
    Ok(())
}

/// The first mark, from the top down, that says that a disk or a layer of it is not whole.
pub async fn unfinished(ring: &Ring, disk: &Rc<dyn Driver>, marks: &Marks) -> Option<MarkInfo> {
    let mut due = vec![disk.clone()];
    while let Some(driver) = due.pop() {
        let children = driver.children();
        if !children.is_empty() {
            due.extend(children.iter().rev().map(|child| child.node().driver().clone()));
            continue;
        }
        let read = TargetMark::read(ring, &driver, marks.state_dir.as_deref()).await;
        if let Ok(Some(mark)) = read
            && mark.kind().is_unfinished()
            && !mark.doubtful
        {
            return Some(mark);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockferry_ring::Config;

    fn options(heed: Heed, read_only: bool) -> ImageOptions {
        let marks = Marks { heed, ..Marks::default() };
        ImageOptions { read_only, marks, ..ImageOptions::default() }
    }

    fn is_refused(mark: &MarkInfo, options: &ImageOptions) -> bool {
        judge(mark, "disk", options).is_err()
    }

    #[test]
    fn who_uses_an_image_is_refused_and_who_looks_is_not() {
        let ring = Ring::new(&Config { arena_bytes: 1 << 20, ..Config::default() }).expect("a ring");
        let half = MarkInfo::incomplete("mirror", "source");
        let old = MarkInfo::superseded(&ring, "mirror", "disk", "new");
        let allowed = |mut options: ImageOptions| {
            (options.marks.allow_incomplete, options.marks.allow_superseded) = (true, true);
            options
        };
        for (mark, reader, writer) in
            [(&half, true, true), (&half.clone().partial(), true, true), (&old, false, true)]
        {
            for (read_only, refused) in [(true, reader), (false, writer)] {
                assert_eq!(is_refused(mark, &options(Heed::Refuse, read_only)), refused, "{mark}");
                assert!(!is_refused(mark, &allowed(options(Heed::Refuse, read_only))));
                assert!(!is_refused(mark, &options(Heed::Warn, read_only)));
                let doubtful = MarkInfo { doubtful: true, ..mark.clone() };
                assert!(!is_refused(&doubtful, &options(Heed::Refuse, read_only)));
            }
        }
        let error = judge(&half, "disk", &options(Heed::Refuse, true)).unwrap_err().to_string();
        assert!(error.contains("incomplete") && error.contains("--allow-incomplete"), "{error}");
    }
}
