//! What the world knows of open files, of rings, and of operations under way.

use std::collections::VecDeque;
use std::ops::Range;
use std::rc::Rc;

use super::faults::Verdict;
use crate::Nanos;
use crate::backend::Work;
use crate::op::Op;

/// What an open file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// A file or block device, by its number.
    Disk(u64),
    /// A listening socket.
    Listener(u64),
    /// One end of a connection: its number and side.
    Stream(u64, usize),
    /// A socket that is to be connected.
    Socket,
    /// None: an offloaded call.
    Nothing,
}

#[derive(Clone, Debug)]
pub(super) struct OpenFile {
    pub(super) port: u32,
    /// What fault rules know it by.
    pub(super) label: Rc<str>,
    pub(super) target: Target,
    pub(super) write: bool,
    pub(super) direct: bool,
    pub(super) exclusive: bool,
}

/// One ring's connection to the world.
#[derive(Debug)]
pub(super) struct Port {
    pub(super) queue: Vec<Queued>,
    pub(super) ended: VecDeque<(u64, i32)>,
    /// What others ended, from outside the simulated world.
    pub(super) inbox: std::sync::Arc<crate::external::Inbox>,
    /// Set when the power went: what its clock shows since then.
    pub(super) dead: Option<Nanos>,
    /// Registered memory: address and bytes.
    pub(super) memory: Vec<Option<(usize, usize)>>,
}

#[derive(Debug)]
pub(super) enum Queued {
    Op(u64, Op),
    Cancel(u64),
}

pub(super) enum What {
    Op(Op),
    Work(Option<Work>),
}

/// An operation under way.
pub(super) struct Flight {
    pub(super) id: u64,
    pub(super) port: u32,
    pub(super) user_data: u64,
    pub(super) what: What,
    pub(super) file: u32,
    pub(super) label: Rc<str>,
    pub(super) target: Target,
    pub(super) write: bool,
    pub(super) direct: bool,
    pub(super) verdict: Verdict,
    /// It has taken effect, or never will.
    pub(super) settled: bool,
    pub(super) result: i32,
    /// Bytes that a stream has moved for it.
    pub(super) moved: usize,
    /// Changes that it made to a disk.
    pub(super) changes: Vec<u64>,
}

impl Flight {
    pub(super) fn op(&self) -> Option<Op> {
        match self.what {
            What::Op(op) => Some(op),
            What::Work(_) => None,
        }
    }

    pub(super) fn name(&self) -> &'static str {
        self.op().map_or("offload", |op| op.name())
    }

    /// Disk and bytes of a write.
    pub(super) fn written(&self) -> Option<(u64, Range<u64>)> {
        match (self.op(), self.target) {
            (Some(Op::Write { offset, mem, .. }), Target::Disk(number)) => {
                Some((number, offset..offset + mem.len() as u64))
            }
            _ => None,
        }
    }
}
