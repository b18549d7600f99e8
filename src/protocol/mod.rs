//! See docs/architecture.md.
pub mod nbd;
