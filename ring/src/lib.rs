//! `blockferry-ring`: the reactor.
//!
//! One thread owns a [`Ring`]. Work is expressed as tasks (`async fn`s that wait only for things of
//! their own ring) and as operations on files, sockets and time. A **turn** reaps completions, runs
//! the tasks that they wake, fires timers, and makes one call into the backend that submits all that
//! was queued and, if it may, waits no longer than the next deadline.
//!
//! Two backends stand behind one trait ([`backend::Backend`]): [`uring`], the kernel's io_uring, and
//! [`sim`], a deterministic world with a virtual clock. Nothing above this crate can tell which one
//! it runs on.
//!
//! # Contracts
//!
//! * **Memory.** Memory that the kernel may touch belongs to the operation's slot from submission to
//!   its terminal completion. Dropping the future of an operation orphans the slot; it never frees
//!   the memory early. See [`mem`].
//! * **Results.** Short transfers, `EINTR` and `EAGAIN` are finished inside; an owner sees the whole
//!   transfer, end of file, or one error.
//! * **Tasks.** A task is never dropped before it ends, except by [`Ring::shutdown`].
//! * **Keyspace.** `user_data` is `sequence << 32 | index`; sequence 0 is reserved for the backend's
//!   own operations. A completion whose sequence does not match its slot is a bug of the ring and is
//!   counted, never delivered.
//!
//! This crate knows fds, offsets, bytes and time. It knows nothing of disks, formats or jobs.

pub mod alloc;
pub mod arena;
mod aside;
pub mod backend;
mod config;
mod control;
mod core;
pub mod errno;
pub mod exec;
mod external;
pub mod limits;
pub mod mem;
pub mod op;
mod operation;
pub mod pool;
mod ring;
pub mod rng;
pub mod sim;
pub mod stats;
pub mod sync;
mod timer;
pub mod uring;

pub use aside::{Aside, FileExtent, Serving};
pub use backend::{
    Backend, CopyRange, DeviceIdentity, FileInfo, FileKind, LockRange, OpenHow, Place, SocketAddress,
};
pub use config::{Budget, Config, OffloadMode, Patience, SetupError, Shutdown, Turn};
pub use errno::Errno;
pub use external::{Completer, Keep};
pub use mem::{Buf, Mem, Region, SharedBuf};
pub use op::{CopyHow, File, FileId};
pub use operation::{Kind, Operation, PlainKind, ReadKind, ReadPiecesKind};
pub use pool::{Pool, PooledFuture};
pub use ring::Ring;
pub use stats::Stats;

/// A point in time or a span, in nanoseconds of the ring's clock (monotonic, or virtual in the simulator).
pub type Nanos = u64;
