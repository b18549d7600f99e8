//! What one user of a disk has heard of its losses.
//!
//! A disk on a server may lose changes for good that it had acknowledged ([`Driver::losses_for_good`]). Each user who has
//! written has to hear of it once, with the next flush. Which of the changes were whose is not known, and a user of several
//! connections flushes on any of them: so whoever has ever written hears of each loss.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};

use blockferry_ring::Errno;

use super::node::Root;
use crate::block::{BlockError, Driver, IoResult, Operation};

/// See the module's head.
#[derive(Debug, Default)]
pub struct Heard {
    /// The disk; a pivot puts another into its place.
    of: RefCell<Option<Weak<dyn Driver>>>,
    losses: Cell<u64>,
    has_written: Cell<bool>,
}

impl Heard {
    /// A user who begins now: losses of before are not hers.
    pub fn new(root: &Root) -> Heard {
        let heard = Heard::default();
        heard.look(root);
        heard.losses.set(root.node().driver().losses_for_good());
        heard
    }

    /// A change is on its way.
    pub fn writes(&self) {
        self.has_written.set(true);
    }

    /// Flushes the disk, unless there is something to be heard first.
    pub async fn flush(&self, root: &Root) -> IoResult {
        self.tell(root)?;
        root.flush().await?;
        // What was lost meanwhile is not covered.
        self.tell(root)
    }

    /// Has the losses of another disk counted from the beginning: one that takes a disk's place was flushed before.
    fn look(&self, root: &Root) {
        let node = root.node();
        let driver = node.driver();
        let is_same =
            self.of.borrow().as_ref().is_some_and(|of| std::ptr::addr_eq(of.as_ptr(), Rc::as_ptr(driver)));
        if !is_same {
            *self.of.borrow_mut() = Some(Rc::downgrade(driver));
            self.losses.set(0);
        }
    }

    fn tell(&self, root: &Root) -> IoResult {
        self.look(root);
        let node = root.node();
        let losses = node.driver().losses_for_good();
        if self.losses.replace(losses) == losses || !self.has_written.get() {
            return Ok(());
        }
        Err(BlockError::new(Operation::Flush, node.driver().name().to_owned(), Errno::EIO).hint(
            "The server was lost, and what it had acknowledged and not flushed could not be written again: it may be gone.",
        ))
    }
}
