//! See docs/architecture.md.

/// Rate limits, alone and shared.
pub mod bucket;
/// Latency histograms.
pub mod latency;
/// Every number that bounds something.
pub mod limits;
pub mod nearest;
pub mod os_name;
/// Deliberate bugs for tests.
pub mod planted;
/// Which process did something.
pub mod process;
/// Half-open byte ranges.
pub mod range;
/// Seeded random numbers with a frozen stream: the simulated world draws from the same ones.
pub use blockferry_ring::rng;
/// Passwords in names, hidden from those who read messages.
pub mod secret;
pub mod shown;
/// Sizes, speeds and times as people write and read them.
pub mod units;
/// Finding zeroes in data.
pub mod zero;
