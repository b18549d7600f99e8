//! The stages of a mirror: what the [machine](super::machine) waits for, and what that means for the guests of its disk.

/// Where the machine stands. See the module's documentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The target is being marked.
    Marking,
    /// The layers are being looked through.
    Scanning,
    /// Not yet alike.
    Copying,
    /// Alike, but for the flush.
    FlushingForReady,
    /// Ready.
    Following,
    /// Waiting for guests inside to end.
    Draining,
    /// Drained; copying the rest.
    Closing,
    /// Drained and alike; flushing.
    FlushingLast,
    /// Drained, alike, flushed; comparing.
    Verifying,
    /// Drained, alike, flushed; removing the mark.
    Unmarking,
    /// Nothing left to do but to pivot, or not.
    Settled,
    /// The body is over.
    Over,
}

impl Stage {
    pub(super) fn name(self) -> &'static str {
        match self {
            Stage::Marking => "marking",
            Stage::Scanning => "scan",
            Stage::Copying => "bulk",
            Stage::FlushingForReady => "flush",
            Stage::Following => "follow",
            Stage::Draining => "drain",
            Stage::Closing | Stage::FlushingLast | Stage::Unmarking => "final-flush",
            Stage::Verifying => "verify",
            Stage::Settled => "pivot",
            Stage::Over => "over",
        }
    }

    pub(super) fn copies(self) -> bool {
        matches!(
            self,
            Stage::Copying | Stage::FlushingForReady | Stage::Following | Stage::Draining | Stage::Closing
        )
    }

    /// The end can still be put off.
    pub(super) fn may_reopen(self) -> bool {
        matches!(self, Stage::Draining | Stage::Closing | Stage::FlushingLast)
    }

    /// The source's door is shut, or about to be.
    pub(super) fn is_closing(self) -> bool {
        matches!(
            self,
            Stage::Draining
                | Stage::Closing
                | Stage::FlushingLast
                | Stage::Verifying
                | Stage::Unmarking
                | Stage::Settled
        )
    }
}
