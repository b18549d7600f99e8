//! Jobs: what moves a disk while it is in use. See docs/architecture.md.

pub mod error;
pub mod event;
pub mod info;
pub mod lifecycle;
pub mod policy;
pub mod progress;
pub mod registry;
pub mod status;

/// The shape of every job: a state machine and its hands.
pub mod body;
/// Merges layers of a chain down.
pub mod commit;
/// Compares two disks that nobody writes.
pub mod compare;
/// Copies a disk that nobody writes.
pub mod convert;
/// How much a job may have in flight beside guests.
pub mod governor;
/// Copies a disk while it is in use.
pub mod mirror;
/// Copying without reading.
pub mod offload;
/// What is to be done about which part of a disk.
pub mod plan;
/// Runs a job.
pub mod runner;
/// Fills a layer with what it reads from those below.
pub mod stream;
/// One pass over a chain that is in use: what commit and stream have in common.
pub mod sweep;
mod writable;
