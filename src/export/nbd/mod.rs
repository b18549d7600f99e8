//! The NBD export: disks for clients on a socket.
//!
//! ```text
//!   server.rs     exports by name, accepting, one session a connection, stopping
//!     │ handshake.rs   the codec's handshake on a stream
//!     │ client.rs      one client: its reader cuts requests out of what it receives
//!     │   request.rs     one request: a task from the disk to its reply
//!     │   change.rs      discards and zeroings, in pieces
//!     │   output.rs      replies on their way out, sent together
//!     │   quota.rs       what a client holds
//!     │   pace.rs        how fast it may ask
//!     └ session.rs     what of this needs no I/O
//! ```
//!
//! Requests of a client run side by side and are answered as they end. The protocol's only promises of order are that a
//! flush covers the writes that were *answered* before it was sent, and that a write with FUA is durable when answered;
//! both hold for all connections together, since they share the node. That is what `CAN_MULTI_CONN` says.
//!
//! Harm is bounded: a client can hold no more than its quota of memory and requests; one that stalls keeps only that,
//! one that sends rubbish loses its own connection. See `limits` for the numbers.

mod change;
mod client;
mod handshake;
mod output;
mod pace;
mod quota;
mod request;
mod server;
mod session;

pub use pace::PaceLimits;
pub use server::{Export, ExportStatus, NbdServer, RemoveMode, ServerConfig, ServerError};
