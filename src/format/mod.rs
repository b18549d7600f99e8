//! What bytes mean. See docs/architecture.md.

pub mod raw;

pub use raw::RawDriver;
pub mod probe;
