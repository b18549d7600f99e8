//! Checking: what the metadata says against what it should say.

/// The most lines of what is wrong that one check keeps.
pub const MESSAGES_MAX: usize = 1000;
