//! Images on GlusterFS volumes, through GlusterFS's own client library.
//!
//! ```text
//!   driver.rs       the driver of the block layer: straight-line async
//!     │  opening.rs   how its image is opened, in bounded time
//!     │
//!   allocation.rs   what may be believed of holes and data (pure)
//!     │
//!   file.rs         one open file: blocking calls for the offload pool, calls that end later for the ring
//!     │
//!   connection.rs   one client a volume, shared by its images
//!     │
//!   api.rs          libgfapi, loaded when it is first needed
//! ```
//!
//! [`uri`] and [`options`] say how such an image is named. The library has threads of its own; a call that ends on one of
//! them comes back as a completion of the ring ([`blockferry_ring::Completer`]), and nothing else of this program is
//! touched from there.

mod allocation;
pub mod api;
mod connection;
mod driver;
#[cfg(test)]
mod fake;
mod file;
mod opening;
pub mod options;
#[cfg(test)]
mod tests;
pub mod uri;

pub use driver::GlusterNode;
pub use opening::OpenHow;
pub use options::{Logging, Structured};
pub use uri::{GlusterUri, Image, Server, UriError};
