//! What stands between those who change a disk and its driver.

use std::rc::Rc;

use blockferry_ring::SharedBuf;

use super::node::Node;
use super::{Driver, IoFuture, IoResult, WriteFlags, ZeroFlags};
use crate::base::range::ByteRange;

/// A request that changes the disk.
#[derive(Clone, Debug)]
pub enum Mutation {
    /// Write all of the buffer.
    Write {
        /// Where.
        offset: u64,
        /// What.
        buf: SharedBuf,
        /// How.
        flags: WriteFlags,
    },
    /// Make a range read as zeroes.
    Zeroes {
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
        /// How.
        flags: ZeroFlags,
    },
    /// Give space back.
    Discard {
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
    },
}

impl Mutation {
    /// The bytes that it is about.
    pub fn range(&self) -> ByteRange {
        let (offset, len) = match self {
            Mutation::Write { offset, buf, .. } => (*offset, buf.len() as u64),
            Mutation::Zeroes { offset, len, .. } | Mutation::Discard { offset, len } => (*offset, *len),
        };
        ByteRange::at_saturating(offset, len)
    }
}

/// Sits between the guests of a node and its driver.
pub trait Filter: std::fmt::Debug {
    /// Passes a guest's change on to `below` and does its own part.
    fn mutate<'a>(&'a self, below: Below<'a>, mutation: Mutation) -> IoFuture<'a, IoResult>;
}

/// What is below a filter: further filters, then the driver.
#[derive(Debug)]
pub struct Below<'a> {
    pub(super) node: &'a Node,
    pub(super) filters: Rc<[Rc<dyn Filter>]>,
    pub(super) level: usize,
}

impl<'a> Below<'a> {
    /// The driver at the bottom.
    pub fn driver(&self) -> &'a Rc<dyn Driver> {
        self.node.driver()
    }

    /// Passes a change on.
    pub async fn mutate(self, mutation: Mutation) -> IoResult {
        let Below { node, filters, level } = self;
        match filters.clone().get(level) {
            Some(filter) => filter.mutate(Below { node, filters, level: level + 1 }, mutation).await,
            None => node.driver_mutate(mutation).await,
        }
    }
}
