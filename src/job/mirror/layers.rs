//! What a target has to show when only the uppermost layer of a source is copied: all that lies below it. A target without a
//! backing file shows zeroes there; one with another backing file shows what nobody knows.

use std::rc::Rc;

use super::MirrorError;
use crate::block::Driver;

/// What lies below a disk.
pub fn below(driver: &Rc<dyn Driver>) -> Option<Rc<dyn Driver>> {
    Some(driver.as_layer()?.backing()?.node().driver().clone())
}

/// Whether both are one image, seen in one way.
pub fn are_one(one: &Rc<dyn Driver>, other: &Rc<dyn Driver>) -> bool {
    let is_same_file = match (one.identity(), other.identity()) {
        (Some(one), Some(other)) => one == other,
        (None, None) => one.name() == other.name() && !matches!(one.kind(), "mem" | "null"),
        _ => false,
    };
    Rc::ptr_eq(one, other) || is_same_file && one.format() == other.format() && one.len() == other.len()
}

/// Refuses a target called `target` that does not show, by its backing file, what lies below the source. One with another
/// backing file is taken if all of it is compared in the end.
pub fn check_shown(
    source: &Rc<dyn Driver>,
    target: &str,
    target_backing: Option<&Rc<dyn Driver>>,
    is_compared: bool,
) -> Result<(), MirrorError> {
    let Some(backing) = below(source) else { return Ok(()) };
    let why = match target_backing {
        Some(other) if is_compared || are_one(&backing, other) => return Ok(()),
        Some(other) => format!(
            "the target '{target}' has another backing file, '{}' (say --verify if it holds the same: all is compared then)",
            other.name()
        ),
        None => format!("the target '{target}' has no backing file"),
    };
    Err(MirrorError::NotShown { source_name: source.name().into(), backing: backing.name().into(), why })
}
