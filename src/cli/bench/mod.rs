//! `blockferry bench`.

pub mod ack_log;
pub mod check;
pub mod load;
pub mod model;
pub mod pattern;
pub mod report;
pub mod schedule;
pub mod target;
