//! Requests by token: what a VMM or another foreign loop uses instead of futures.
//!
//! Submitting never waits and never fails at once; every request ends as one [`Completion`] with the
//! token that it was submitted with. A guest keeps its disk through a pivot without noticing.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use blockferry_ring::{Buf, Ring, Serving};

use crate::base::process::Process;
use crate::block::{BlockError, WriteFlags, ZeroFlags};
use crate::graph::heard::Heard;
use crate::graph::node::{Features, Root};

/// The end of a request.
#[derive(Debug)]
pub struct Completion {
    /// As submitted.
    pub token: u64,
    /// What came of it.
    pub result: Result<(), BlockError>,
    /// The memory of a read.
    pub buf: Option<Buf>,
}

/// A user of a disk with its queue of completions.
#[derive(Clone, Debug)]
pub struct Guest {
    ring: Ring,
    root: Root,
    heard: Rc<Heard>,
    done: Rc<RefCell<VecDeque<Completion>>>,
    _serving: Rc<Serving>,
}

impl Guest {
    pub(super) fn new(ring: &Ring, root: Root) -> Guest {
        // What /proc tells is asked for before requests come.
        Process::own();
        let heard = Rc::new(Heard::new(&root));
        Guest { ring: ring.clone(), heard, root, done: Rc::default(), _serving: Rc::new(ring.serve()) }
    }

    /// What can be relied on for the guest's whole life.
    pub fn features(&self) -> Features {
        self.root.features()
    }

    /// The root that it uses.
    pub fn root(&self) -> &Root {
        &self.root
    }

    /// Reads into `buf` from `offset` on.
    pub fn read(&self, token: u64, offset: u64, buf: Buf) {
        let root = self.root.clone();
        self.start(token, async move {
            let (buf, result) = root.read(offset, buf).await;
            (Some(buf), result)
        });
    }

    /// Writes `buf` at `offset`. The memory must not change before the completion.
    pub fn write(&self, token: u64, offset: u64, buf: Buf, flags: WriteFlags) {
        let root = self.root.clone();
        self.heard.writes();
        self.start(token, async move { (None, root.write(offset, buf.freeze(), flags).await) });
    }

    /// Makes acknowledged writes durable.
    pub fn flush(&self, token: u64) {
        let (root, heard) = (self.root.clone(), self.heard.clone());
        self.start(token, async move { (None, heard.flush(&root).await) });
    }

    /// Gives space back.
    pub fn discard(&self, token: u64, offset: u64, len: u64) {
        let root = self.root.clone();
        self.heard.writes();
        self.start(token, async move { (None, root.discard(offset, len).await) });
    }

    /// Makes a range read as zeroes.
    pub fn write_zeroes(&self, token: u64, offset: u64, len: u64, flags: ZeroFlags) {
        let root = self.root.clone();
        self.heard.writes();
        self.start(token, async move { (None, root.write_zeroes(offset, len, flags).await) });
    }

    /// The next request that has ended.
    pub fn pop_completion(&self) -> Option<Completion> {
        self.done.borrow_mut().pop_front()
    }

    fn start(&self, token: u64, work: impl Future<Output = (Option<Buf>, Result<(), BlockError>)> + 'static) {
        let done = self.done.clone();
        self.ring.spawn(async move {
            let (buf, result) = work.await;
            done.borrow_mut().push_back(Completion { token, result, buf });
        });
    }
}
