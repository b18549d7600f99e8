//! How a ring is set up, what bounds its turns, and what they leave behind.

use crate::Nanos;
use crate::errno::Errno;
use crate::limits;

/// Where blocking calls run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum OffloadMode {
    /// On a small pool that starts on first use.
    #[default]
    Pool,
    /// On the ring's own thread: no thread is ever started, and the call delays its turn.
    Inline,
}

/// How to set up a ring.
#[derive(Clone, Debug)]
pub struct Config {
    /// Bytes of the arena.
    pub arena_bytes: usize,
    /// Where blocking calls run.
    pub offload: OffloadMode,
    /// Restrict the ring to the operations in use (seccomp does not see ring operations).
    pub restrict: bool,
    /// Bounds of a turn.
    pub budget: Budget,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            arena_bytes: limits::ARENA_BYTES,
            offload: OffloadMode::Pool,
            restrict: false,
            budget: Budget::default(),
        }
    }
}

/// Bounds of one turn.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// Completions delivered.
    pub completions: usize,
    /// Time spent in tasks.
    pub nanos: Nanos,
    /// Bytes of reads and writes submitted.
    pub bytes: u64,
}

impl Default for Budget {
    fn default() -> Budget {
        Budget { completions: limits::TURN_COMPLETIONS, nanos: limits::TURN_NANOS, bytes: limits::TURN_BYTES }
    }
}

/// For how many completions an enter waits when there is nothing but bulk work.
///
/// A device that does its I/O synchronously is served by kernel threads, and each of them wakes the ring when it is done:
/// two context switches an operation where both share a CPU. Waiting for a number of completions turns those into two
/// for all of them. It is wrong where somebody waits for a single completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// Completions to wait for, if more operations than that are in flight.
    pub completions: usize,
    /// For at most this long, in microseconds; then one is enough. Kernels without a minimum wait (before 6.12) know no
    /// such rule and are asked for one.
    pub wait_usec: u32,
}

/// What a turn leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a caller that ignores what is left may sleep too long"]
pub struct Turn {
    /// Something was delivered or run.
    pub progressed: bool,
    /// There is more to do now: turn again soon, without waiting for the fd.
    pub more_work: bool,
    /// Turn again at this time even if the fd stays silent.
    pub next_deadline: Option<Nanos>,
    /// Operations in flight: the fd will become readable. With neither these, nor more work, nor a
    /// deadline, only a [`RemoteWaker`] or a new request can cause work.
    pub in_flight: usize,
}

/// What a shutdown could not end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Shutdown {
    /// Operations that were still in flight; their memory is leaked, because the kernel may still use it.
    pub leaked: usize,
}

/// Why a ring could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The kernel forbids or lacks io_uring.
    #[error("io_uring is not to be had here: {reason}. {cure}")]
    Forbidden {
        /// What the kernel said.
        reason: String,
        /// What to do about it.
        cure: String,
    },
    /// Something else failed.
    #[error("Setting up the ring failed while {doing}: {errno}.")]
    Failed {
        /// The step.
        doing: &'static str,
        /// Its error.
        errno: Errno,
    },
}
