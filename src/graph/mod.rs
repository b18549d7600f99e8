//! See docs/architecture.md.

/// Which parts of a disk still differ.
pub mod dirty;
/// Who may touch which part of a disk now.
pub mod ranges;
