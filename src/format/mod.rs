//! What bytes mean. See docs/architecture.md.

pub mod joined;
pub mod probe;
pub mod qcow2;
pub mod raw;

pub use joined::JoinedDriver;
pub use raw::RawDriver;
