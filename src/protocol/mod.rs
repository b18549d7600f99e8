//! Where bytes live: a file, a block device, another machine, memory.
//!
//! See docs/architecture.md. [`open()`] takes a path of this machine and finds out which driver it needs.

mod allocation;
pub mod delay;
pub mod file;
pub mod gluster;
pub mod host_device;
mod leaf;
mod length;
pub mod lock;
pub mod mark;
pub mod mem;
pub mod nbd;
pub mod null;
pub mod open;
mod place;
mod rewrite;
pub mod structured;
mod uri;

pub use delay::DelayDriver;
pub use file::{CreateOptions, FileDriver};
pub use host_device::HostDevice;
pub use mem::MemDriver;
pub use null::NullDriver;
pub use open::{Cache, OpenOptions, open};

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_sim;
