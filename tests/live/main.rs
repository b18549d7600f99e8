//! Disks that change while they are in use, on real files, devices and file systems.

mod chain;
mod chain_ext4;
mod chain_live;
mod crash;
mod errors;
mod ext4;
mod pivots;
mod thin;
