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
/// Compares two disks that nobody writes.
pub mod compare;
/// Copies a disk that nobody writes.
pub mod convert;
/// How many copies a job keeps in flight.
pub mod depth;
/// How much a job may have in flight beside guests.
pub mod governor;
/// Copies a disk while it is in use.
pub mod mirror;
/// Copying without reading.
pub mod offload;
/// Runs a job.
pub mod runner;
