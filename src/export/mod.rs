//! Who may use a disk from outside. See docs/architecture.md.

/// The NBD export.
pub mod nbd;
