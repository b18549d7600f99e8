//! What goes wrong, how often, and where.
//!
//! A [`FaultRule`] says: operations of these kinds, on paths with this prefix, suffer this fault so
//! many times out of 65536. Rules are switched at run time, so that a test can begin with a healthy
//! world, break it, and heal it again to see that everything comes to an end. A one-shot fails exactly
//! the n-th operation of a kind on one path: that is how each step of an update gets its failing test.
//!
//! Streams are named by their address and end: `unix:/run/x#client`, `127.0.0.1:10809#server`.

use std::collections::BTreeMap;
use std::ops::BitOr;

use crate::Nanos;
use crate::errno::Errno;
use crate::op::{Fallocate, Op};
use crate::rng::Rng;

/// What an operation or a control call does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum OpKind {
    /// Reading from a disk.
    Read,
    /// Writing to a disk.
    Write,
    /// Making a disk durable.
    Sync,
    /// Deallocating.
    PunchHole,
    /// Zeroing.
    ZeroRange,
    /// Allocating.
    Allocate,
    /// Discarding on a block device.
    Discard,
    /// Accepting a connection.
    Accept,
    /// Receiving.
    Recv,
    /// Sending.
    Send,
    /// Opening a file.
    Open,
    /// Asking for facts about a file.
    Info,
    /// Setting a length.
    SetLen,
    /// Looking for data or holes.
    Seek,
    /// Taking, giving back or looking at locks.
    Lock,
    /// Reading an attribute.
    GetAttribute,
    /// Setting an attribute.
    SetAttribute,
    /// Removing an entry.
    Unlink,
    /// Renaming an entry (the path is the one it had).
    Rename,
    /// Making entries durable.
    SyncDirectory,
    /// Looking a path up.
    Lookup,
    /// Listening.
    Listen,
    /// Connecting.
    Connect,
}

impl OpKind {
    pub(super) fn of(op: &Op) -> OpKind {
        match op {
            Op::Read { .. } | Op::ReadPieces { .. } => OpKind::Read,
            Op::Write { .. } => OpKind::Write,
            Op::Sync { .. } => OpKind::Sync,
            Op::Fallocate { mode, .. } => match mode {
                Fallocate::PunchHole => OpKind::PunchHole,
                Fallocate::ZeroRange => OpKind::ZeroRange,
                Fallocate::Allocate => OpKind::Allocate,
            },
            Op::Discard { .. } => OpKind::Discard,
            Op::Accept { .. } => OpKind::Accept,
            Op::Connect { .. } => OpKind::Connect,
            Op::Recv { .. } | Op::RecvAll { .. } => OpKind::Recv,
            Op::Send { .. } | Op::SendPieces { .. } => OpKind::Send,
        }
    }
}

/// A set of kinds; `OpKind::Read | OpKind::Write` makes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpKinds(u32);

impl OpKinds {
    /// Reads, writes and whatever else moves or changes bytes of a disk.
    pub const DISK: OpKinds = OpKinds(0b111_1111);
    /// Accepting, receiving, sending.
    pub const STREAM: OpKinds = OpKinds(0b11_1000_0000);

    fn contains(self, kind: OpKind) -> bool {
        self.0 >> kind as u8 & 1 == 1
    }
}

impl From<OpKind> for OpKinds {
    fn from(kind: OpKind) -> OpKinds {
        OpKinds(1 << kind as u8)
    }
}

impl BitOr for OpKind {
    type Output = OpKinds;

    fn bitor(self, other: OpKind) -> OpKinds {
        OpKinds::from(self) | other
    }
}

impl BitOr<OpKind> for OpKinds {
    type Output = OpKinds;

    fn bitor(self, other: OpKind) -> OpKinds {
        OpKinds(self.0 | OpKinds::from(other).0)
    }
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It fails. A failed write may have reached the disk in part; a failed sync may lose what it was
    /// to make durable, and a later sync that succeeds does not bring it back.
    Error(Errno),
    /// Less is moved than was asked for, never nothing.
    Short,
    /// `EAGAIN` or `EINTR`, for this and the next few operations on the file.
    Again,
    /// It takes this much longer. On a stream the whole direction stalls.
    Delay {
        /// At least.
        nanos_min: Nanos,
        /// At most.
        nanos_max: Nanos,
    },
    /// It does not end before [`super::World::release`]; cancelling does not help.
    Hang,
    /// The connection is reset: both ends see `ECONNRESET`, bytes under way are lost.
    Reset,
    /// The direction in which a send goes is closed before it: `EPIPE` here, end of stream there.
    HalfClose,
}

/// A fault, where it strikes and how often.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FaultRule {
    /// The operations concerned.
    pub kinds: OpKinds,
    /// Files whose path begins like this; empty means all.
    pub path_prefix: String,
    /// How often, out of 65536.
    pub chance: u32,
    /// What happens.
    pub fault: Fault,
}

impl FaultRule {
    /// A rule.
    pub fn new(
        kinds: impl Into<OpKinds>,
        path_prefix: impl Into<String>,
        chance: u32,
        fault: Fault,
    ) -> FaultRule {
        FaultRule { kinds: kinds.into(), path_prefix: path_prefix.into(), chance, fault }
    }

    /// Rules for one seed: each fault is there or not, with a weight of its own. A world in which
    /// everything fails a little is always the same world; one in which some things never fail and
    /// others often do reaches deeper. Nothing here makes data unreachable for good: errors of reads,
    /// writes and syncs are left to rules that a test writes itself.
    pub fn swarm(rand: &mut Rng, path_prefix: &str) -> Vec<FaultRule> {
        let span = Fault::Delay { nanos_min: 1_000_000, nanos_max: 200_000_000 };
        let candidates = [
            (OpKind::Read | OpKind::Write, Fault::Short),
            (OpKind::Recv | OpKind::Send, Fault::Short),
            (OpKinds::DISK, Fault::Again),
            (OpKinds::STREAM, Fault::Again),
            (OpKinds::DISK, span),
            (OpKinds::STREAM, span),
        ];
        let mut rules = Vec::new();
        for (kinds, fault) in candidates {
            if rand.chance(32_768) {
                let chance = 1 << rand.range(5..14);
                rules.push(FaultRule::new(kinds, path_prefix, chance, fault));
            }
        }
        rules
    }
}

/// How often each fault has struck.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultCounts {
    /// Errors drawn from rules.
    pub errors: u64,
    /// One-shots.
    pub one_shots: u64,
    /// Short transfers.
    pub shorts: u64,
    /// `EAGAIN` and `EINTR`.
    pub agains: u64,
    /// Delays.
    pub delays: u64,
    /// Operations that hung.
    pub hangs: u64,
    /// Connections reset.
    pub resets: u64,
    /// Directions closed.
    pub half_closes: u64,
    /// Refusals for want of space.
    pub no_space: u64,
    /// Direct transfers refused for their alignment.
    pub misaligned: u64,
    /// Operations that a file does not know.
    pub unsupported: u64,
    /// Operations that ended as cancelled.
    pub cancelled: u64,
    /// Writes that a power cut tore.
    pub torn: u64,
    /// Changes that a power cut or a failed sync lost.
    pub lost: u64,
}

/// What is decided about one operation.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Verdict {
    pub(super) error: Option<Errno>,
    pub(super) short: bool,
    pub(super) delay_nanos: Nanos,
    pub(super) hang: bool,
    pub(super) reset: bool,
    pub(super) half_close: bool,
}

impl Verdict {
    /// The error, if it is one of those that mean that nothing was tried.
    pub(super) fn refusal(&self) -> Option<Errno> {
        let nothing_tried =
            [Errno::EAGAIN, Errno::EINTR, Errno::EINVAL, Errno::EOPNOTSUPP, Errno::EBADF, Errno::ENOSYS];
        self.error.filter(|errno| nothing_tried.contains(errno))
    }
}

#[derive(Debug)]
struct OneShot {
    kind: OpKind,
    path: String,
    left: u64,
    errno: Errno,
}

#[derive(Debug, Default)]
pub(super) struct Faults {
    pub(super) rules: Vec<FaultRule>,
    pub(super) counts: FaultCounts,
    one_shots: Vec<OneShot>,
    hanging: Vec<String>,
    /// `EAGAIN`s still to come, by path.
    bursts: BTreeMap<String, u32>,
}

impl Faults {
    pub(super) fn fail_nth(&mut self, kind: OpKind, path: String, nth: u64, errno: Errno) {
        self.one_shots.push(OneShot { kind, path, left: nth.max(1), errno });
    }

    pub(super) fn heal(&mut self) {
        *self = Faults { counts: self.counts, ..Faults::default() };
    }

    pub(super) fn one_shots_left(&self) -> usize {
        self.one_shots.len()
    }

    pub(super) fn hang(&mut self, prefix: String) {
        self.hanging.push(prefix);
    }

    pub(super) fn end_hang(&mut self, prefix: &str) {
        self.hanging.retain(|hanging| !hanging.starts_with(prefix));
    }

    pub(super) fn decide(&mut self, kind: OpKind, path: &str, rand: &mut Rng) -> Verdict {
        let mut verdict = Verdict::default();
        let is_operation = kind <= OpKind::Send;
        // All of them count the operation, so that two for one path do not shift one another.
        for one_shot in &mut self.one_shots {
            if one_shot.kind == kind && one_shot.path == path {
                one_shot.left -= 1;
                if one_shot.left == 0 {
                    verdict.error = Some(one_shot.errno);
                    self.counts.one_shots += 1;
                }
            }
        }
        self.one_shots.retain(|one_shot| one_shot.left > 0);
        if verdict.error.is_some() {
            return verdict;
        }
        verdict.hang = is_operation && self.hanging.iter().any(|prefix| path.starts_with(prefix.as_str()));
        if let Some(left) = self.bursts.get_mut(path).filter(|_| is_operation) {
            *left -= 1;
            if *left == 0 {
                self.bursts.remove(path);
            }
            verdict.error = Some(again(rand));
            self.counts.agains += 1;
            return verdict;
        }
        for rule in &self.rules {
            if rule.chance == 0
                || !rule.kinds.contains(kind)
                || !path.starts_with(rule.path_prefix.as_str())
                || !rand.chance(rule.chance)
            {
                continue;
            }
            match rule.fault {
                Fault::Error(errno) => {
                    verdict.error = Some(errno);
                    self.counts.errors += 1;
                    break;
                }
                Fault::Again if is_operation => {
                    verdict.error = Some(again(rand));
                    self.counts.agains += 1;
                    let more = rand.below(8) as u32;
                    if more > 0 {
                        self.bursts.insert(path.to_owned(), more);
                    }
                    break;
                }
                Fault::Delay { nanos_min, nanos_max } if is_operation => {
                    verdict.delay_nanos += rand.range(nanos_min..nanos_max + 1);
                    self.counts.delays += 1;
                }
                Fault::Short => verdict.short = true,
                Fault::Hang if is_operation => verdict.hang = true,
                Fault::Reset => verdict.reset = true,
                Fault::HalfClose => verdict.half_close = true,
                // What waits or is tried again has no meaning for a call that is answered at once.
                Fault::Again | Fault::Delay { .. } | Fault::Hang => {}
            }
        }
        self.counts.hangs += u64::from(verdict.hang);
        verdict
    }
}

fn again(rand: &mut Rng) -> Errno {
    if rand.chance(32_768) { Errno::EAGAIN } else { Errno::EINTR }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_one_shot_strikes_once_at_its_turn() {
        let mut faults = Faults::default();
        let mut rand = Rng::new(1);
        faults.fail_nth(OpKind::Write, "/a".into(), 3, Errno::EIO);
        faults.fail_nth(OpKind::Write, "/a".into(), 4, Errno::ENOSPC);
        let mut next = |kind, path| faults.decide(kind, path, &mut rand).error;
        assert_eq!(next(OpKind::Write, "/a"), None);
        assert_eq!(next(OpKind::Write, "/b"), None);
        assert_eq!(next(OpKind::Read, "/a"), None);
        assert_eq!(next(OpKind::Write, "/a"), None);
        assert_eq!(next(OpKind::Write, "/a"), Some(Errno::EIO));
        assert_eq!(next(OpKind::Write, "/a"), Some(Errno::ENOSPC));
        assert_eq!(next(OpKind::Write, "/a"), None);
        assert_eq!((faults.counts.one_shots, faults.one_shots_left()), (2, 0));
    }

    #[test]
    fn rules_keep_to_their_kinds_paths_and_weights() {
        let mut rand = Rng::new(2);
        let kinds = OpKind::Read | OpKind::Open;
        let mut faults = Faults {
            rules: vec![
                FaultRule::new(kinds, "/disks/", 65_536, Fault::Error(Errno::EACCES)),
                FaultRule::new(OpKinds::DISK, "", 0, Fault::Error(Errno::EIO)),
            ],
            ..Faults::default()
        };
        let mut next = |kind, path| faults.decide(kind, path, &mut rand).error;
        assert_eq!(next(OpKind::Open, "/disks/a"), Some(Errno::EACCES));
        assert_eq!(next(OpKind::Open, "/elsewhere"), None);
        assert_eq!(next(OpKind::Write, "/disks/a"), None);
        assert!(OpKinds::DISK.contains(OpKind::Discard) && !OpKinds::DISK.contains(OpKind::Accept));
        assert!(OpKinds::STREAM.contains(OpKind::Send) && !OpKinds::STREAM.contains(OpKind::Open));
    }
}
