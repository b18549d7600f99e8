//! The reactor.
pub const NAME: &str = "blockferry-ring";
