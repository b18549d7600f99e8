//! Who may use a node from outside.

pub mod nbd;
