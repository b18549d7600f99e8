//! Blockferry moves virtual disks while they are in use. See `docs/architecture.md`.

pub mod base;
pub mod block;
#[cfg(feature = "cli")]
pub mod cli;
pub mod engine;
pub mod export;
pub mod format;
pub mod graph;
pub mod job;
pub mod protocol;
