//! `blockferry bench`.

pub mod ack_log;
pub mod model;
pub mod pattern;
