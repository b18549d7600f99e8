//! What bytes mean. See docs/architecture.md.

pub mod probe;
pub mod qcow2;
pub mod raw;

pub use raw::RawDriver;
