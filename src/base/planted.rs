//! Deliberate bugs, for showing that the tests would find them.
//!
//! In a build without debug assertions (a release) every question is answered with a constant `false`, and the bugs are not
//! in the program; nothing that a user can switch on brings them back. In others a test plants one bug in its own thread, or
//! names one in the environment of a command that it runs.

/// A bug that the simulator must find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// The dirty bits of a chunk are cleared after it was read, so that a write in between is lost.
    BitClearedAfterRead,
    /// The pivot happens without a drain.
    NoDrainBeforePivot,
    /// The last flush of the target is left out.
    FlushSkipped,
    /// Nobody looks whether the target still has its name before a mirror ends.
    TargetNotLookedFor,
    /// A copy that failed is taken for done.
    CompletionLost,
    /// A client that connects during a drain is let in.
    NewClientNotDrained,
    /// Of two overlapping writes to both sides the younger one does not wait.
    WriteNotOrdered,
    /// A write to both sides is acknowledged when the source has it.
    TargetNotAwaited,
    /// The disk that a pivot leaves behind is not flushed.
    OldDiskUnflushed,
    /// Verifying believes whoever claims that there are zeroes.
    VerifyBelievesClaims,
    /// qcow2: the mapping of a new cluster reaches the disk without a barrier after its data.
    Qcow2MappingBeforeData,
    /// qcow2: the mapping of a new cluster is made known before its data is written.
    Qcow2PublishBeforeWrite,
    /// qcow2: refcounts are written after the pointers that need them.
    Qcow2RefcountAfterPointer,
    /// qcow2: a cluster is free as soon as nothing in memory refers to it.
    Qcow2FreedTooEarly,
    /// NBD: what was given up on a connection that hangs is not waited for before something newer is written there.
    LateWriteNotAwaited,
    /// Verifying: where a change was given up, what was compared before it may have landed is not compared again.
    LateWriteNotCompared,
    /// Commit and stream: the target is not flushed before the chain changes.
    SweepFlushSkipped,
    /// Commit and stream: zeroes that a layer holds are taken for nothing.
    SweepZeroesSkipped,
    /// Commit and stream: a layer that ends early does not hide what is below it.
    ShortLayerShows,
    /// Stream: what a layer holds by now is overwritten with what came from below.
    PopulateOverwrites,
    /// Rebase: zeroes are left out where what lies below reads as zeroes now.
    ZeroesRestOnBelow,
    /// Files: what is written behind the end of a file does not change how long it is taken to be.
    LengthNotFollowed,
    /// Printing: a message waits until its reader reads.
    PrintingWaits,
    /// Printing: what comes after a line that was written in part is joined to it.
    TornLineGoesOn,
    /// Remote disks: after a server was lost, what it had not flushed is not written again.
    NotWrittenAgain,
    /// Remote disks: a flush is taken to cover what was acknowledged after it was sent.
    FlushCoversLater,
    /// Remote disks: a durable write is forgotten while older ones are kept that will be written over it.
    DurableNotKept,
    /// Copies: a target whose disk ends where the last sector ends is taken for a longer one.
    RoundedIsLonger,
    /// Admission: nobody looks whether what is to be changed is what is read, by another name.
    SameImageNotLookedFor,
    /// NBD export: a walk over a disk's allocation keeps its turn to the end, and goes on when nobody listens any more.
    StatusWalkKeepsTurn,
}

impl Bug {
    /// Those of mirrors.
    pub const ALL: [Bug; 8] = [
        Bug::BitClearedAfterRead,
        Bug::NoDrainBeforePivot,
        Bug::FlushSkipped,
        Bug::CompletionLost,
        Bug::NewClientNotDrained,
        Bug::WriteNotOrdered,
        Bug::TargetNotAwaited,
        Bug::OldDiskUnflushed,
    ];

    /// Those of commit and stream.
    pub const CHAINS: [Bug; 4] =
        [Bug::SweepFlushSkipped, Bug::SweepZeroesSkipped, Bug::ShortLayerShows, Bug::PopulateOverwrites];

    /// Those that a command is given by [`VARIABLE`].
    pub const COMMANDS: [Bug; 4] =
        [Bug::ZeroesRestOnBelow, Bug::LengthNotFollowed, Bug::RoundedIsLonger, Bug::SameImageNotLookedFor];

    /// Those of printing.
    pub const PRINTING: [Bug; 2] = [Bug::PrintingWaits, Bug::TornLineGoesOn];

    /// Those of remote disks.
    pub const REMOTE: [Bug; 3] = [Bug::NotWrittenAgain, Bug::FlushCoversLater, Bug::DurableNotKept];

    /// Those of qcow2 images.
    pub const QCOW2: [Bug; 5] = [
        Bug::Qcow2MappingBeforeData,
        Bug::Qcow2PublishBeforeWrite,
        Bug::Qcow2RefcountAfterPointer,
        Bug::Qcow2FreedTooEarly,
        Bug::LengthNotFollowed,
    ];
}

/// Names one of [`Bug::COMMANDS`] to a command that is built with debug assertions.
pub const VARIABLE: &str = "BLOCKFERRY_PLANTED";

#[cfg(debug_assertions)]
mod in_this_thread {
    use super::{Bug, VARIABLE};
    use std::cell::Cell;
    use std::sync::OnceLock;

    /// What threads begin with.
    static AT_FIRST: OnceLock<Bug> = OnceLock::new();

    thread_local! {
        static PLANTED: Cell<Option<Bug>> = Cell::new(AT_FIRST.get().copied());
    }

    /// Plants what [`VARIABLE`] names in every thread that begins, and in this one: for the command.
    pub fn plant_what_is_named() {
        let name = std::env::var(VARIABLE).unwrap_or_default();
        if let Some(bug) = Bug::COMMANDS.into_iter().find(|bug| format!("{bug:?}") == name) {
            plant(Some(*AT_FIRST.get_or_init(|| bug)));
        }
    }

    /// Plants one bug in this thread, or none.
    pub fn plant(bug: Option<Bug>) {
        PLANTED.set(bug);
    }

    /// Whether this bug is planted here.
    pub fn is_planted(bug: Bug) -> bool {
        PLANTED.get() == Some(bug)
    }
}

#[cfg(not(debug_assertions))]
mod in_this_thread {
    use super::Bug;

    /// Does nothing.
    pub const fn plant_what_is_named() {}

    /// Plants nothing: whoever wants to see a bug found has to build with debug assertions.
    pub fn plant(bug: Option<Bug>) {
        assert!(bug.is_none(), "bugs can be planted in builds with debug assertions only");
    }

    /// Whether this bug is planted here: never.
    pub const fn is_planted(_bug: Bug) -> bool {
        false
    }
}

pub use in_this_thread::{is_planted, plant, plant_what_is_named};
