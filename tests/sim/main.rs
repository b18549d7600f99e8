//! The whole engine and its rooms in a simulated world, in virtual time: guests, jobs, users, faults and power cuts.
//!
//! A seed tells the same story every time, so a failure is repeated by its number.

mod bench;
mod chains;
mod converge;
mod counts;
mod flush;
mod lives;
mod nbd_export;
mod nbd_node;
mod qcow2;
