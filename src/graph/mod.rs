//! See docs/architecture.md.

/// Which parts of a disk still differ.
pub mod dirty;
