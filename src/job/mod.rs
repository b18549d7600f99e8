//! Jobs: what moves a disk while it is in use.
//!
//! # One life cycle
//! Every job is a [`runner::Job`]: it has an id, a [status](status::Status), verbs (pause, resume, set-speed, complete,
//! cancel, finalize, dismiss, change), [events](event::JobEvent), a [progress meter](progress::Progress), an [error
//! policy](policy::OnError) and a speed limit, alone or [with others](group). States, verbs, texts and the order of
//! events are QEMU's (docs/architecture.md).
//!
//! | job | what it does, and promises |
//! |---|---|
//! | [`mirror`] | copies a disk to another and follows it; *completed*: the target equals the source at a point in time |
//! | [`commit`] | merges layers down; *completed*: the base holds what the top showed, and takes its place |
//! | [`stream`] | fills a layer from those below; *completed*: it needs them no longer |
//! | [`convert`] | copies a disk that nobody writes |
//!
//! # A new kind of job
//! A file (or folder) here with a `start` that gives a `Job`, its test, and the line that names it below. Its state
//! machine is a [`body::Body`], which is stepped by events and does no I/O; its [`body::Hands`] carry out what it asks
//! for. `Engine::adopt` takes it into an engine, whatever it is.

pub mod error;
pub mod event;
pub mod info;
mod lasting;
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
mod copytime;
/// How many copies a job keeps in flight.
pub mod depth;
/// How much a job may have in flight beside guests.
pub mod governor;
/// One speed limit for several jobs.
pub mod grounds;
pub mod group;
/// Copies a disk while it is in use.
pub mod mirror;
/// Copying without reading.
pub mod offload;
/// What is to be done about which part of a disk.
pub mod plan;
mod retry;
/// Runs a job.
pub mod runner;
/// Fills a layer with what it reads from those below.
pub mod stream;
/// One pass over a chain that is in use: what commit and stream have in common.
pub mod sweep;
/// The end of a target that counts in sectors.
pub mod tail;
mod unflushed;
mod writable;
