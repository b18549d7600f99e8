//! The NBD protocol for both sides, as a codec without I/O, and a client.
//!
//! Bytes go in, events and bytes come out: nothing in the codec owns a socket, a task, a buffer pool or a clock, so the export,
//! the client node, the bench tool and the simulator use the same code, and a conversation can be tested one byte at a
//! time. The source is `doc/proto.md` of the NetworkBlockDevice/nbd repository.
//!
//! - `handshake_server`, `handshake_client`: the negotiation, one machine a side. Their owner keeps the bytes that
//!   have not been consumed, sends what was appended to `out`, and calls again.
//! - `transmission`: requests and replies as a server sees them, headers without allocation.
//! - `reply_reader`: replies as a client sees them; `pending`: whether they answer what was asked.
//! - `wire`, `constants`, `errno`, `meta_context`: structures, numbers, error values, metadata contexts.
//! - `uri`: how a person names an export; `options`: how QEMU's programs do.
//!
//! On top of the codec, and the only part that knows the ring: `connection`, a client with many requests in flight
//! (`dial` makes it, `in_flight` keeps its books, `kept` its memory for the next one), and `driver`, which shows one to the
//! block layer. `remote` keeps connections to one export alive, and `node` is the disk that jobs and guests use on top of
//! it.
//!
//! What must hold: no byte that a peer sends can make this code panic, loop without progress, or keep more memory than
//! the limits in `constants` allow.

mod client_error;
pub mod connection;
pub mod constants;
#[cfg(test)]
mod conversation;
mod cursor;
mod dial;
pub mod driver;
mod errno;
mod error;
#[cfg(test)]
mod exchange;
pub mod handshake_client;
pub mod handshake_server;
mod in_flight;
mod keeper;
mod kept;
mod known;
mod meta_context;
pub mod node;
pub mod options;
pub mod pending;
mod remote;
pub mod reply_reader;
mod silence;
pub mod transmission;
mod unstable;
pub mod uri;
pub mod wire;

pub use client_error::{LostReason, NbdClientError, NotSentReason};
pub use connection::{ConnectOptions, Connection, describe_exports, list_exports};
pub use constants::*;
pub use cursor::Head;
pub use driver::NbdDriver;
pub use errno::NbdErrno;
pub use error::ProtocolError;
pub use handshake_client::{
    ClientGoal, ClientHandshake, ClientNegotiated, ClientProgress, ClientStep, ConnectRequest, ExportDetails,
    ListedExport,
};
pub use handshake_server::{
    ExportDirectory, ExportInfo, Negotiated, ServerHandshake, ServerPolicy, ServerProgress, ServerStep,
};
pub use meta_context::MetaContext;
pub use node::NbdNode;
pub use pending::{PendingReply, ReplyBody};
pub use remote::RemoteOptions;
pub use reply_reader::{
    BlockStatus, DATA_OFFSET_BYTES, ErrorChunk, ReplyHeader, parse_block_status, parse_data_offset,
    parse_error, parse_hole, parse_reply,
};
pub use silence::Patience;
pub use transmission::{ReplyTo, RequestHeader, RequestRules, StatusExtent, parse_request};
pub use uri::{NbdAddress, NbdUri, UriError};
pub use wire::{BlockSizes, ExportListing};
