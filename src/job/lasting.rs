//! Whether what a job writes lasts, where its target is on a server.
//!
//! The driver writes again what the server may have lost with a connection: all of it, for a job, whatever the user said of
//! clients' changes ([`Driver::set_writing_job`]). [`Driver::losses_for_good`] says what it could not. A server that is lost
//! again and again without a flush between that succeeds will never hold the copy, and a job whose target has lost changes
//! for good has no copy either, whatever the flushes that follow say: both end the job, whatever its error policy is.

use std::cell::Cell;
use std::rc::Rc;

use blockferry_ring::Errno;

use super::policy::Failed;
use crate::base::limits::LAPSES_MAX;
use crate::block::{BlockError, Driver, Operation};

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Lasting {
    target: Rc<dyn Driver>,
    losses: Cell<u64>,
    /// The target is the job's alone: its requests may fail for the job's sake.
    alone: bool,
}

impl Lasting {
    /// Watches over a target from now on. Where others use it, too, their requests are not to fail because the job's do.
    pub(super) fn new(target: &Rc<dyn Driver>, alone: bool) -> Lasting {
        target.set_writing_job(true);
        if alone {
            target.set_lapses_max(Some(LAPSES_MAX));
        }
        Lasting { target: target.clone(), losses: Cell::new(target.losses_for_good()), alone }
    }

    /// Flushes the target: on success all that the job wrote before is durable.
    pub(super) async fn flush(&self) -> Result<(), BlockError> {
        self.target.flush().await?;
        self.check()
    }

    /// Whether all that the job wrote is still there, or is written again: no flush is needed to know that it is not.
    pub(super) fn check(&self) -> Result<(), BlockError> {
        if self.target.losses_for_good() == self.losses.get() {
            return Ok(());
        }
        Err(BlockError::new(Operation::Flush, self.target.name().to_owned(), Errno::ENOTRECOVERABLE).hint(
            "The server was lost, and what it had acknowledged and not flushed could not be written again: the copy is \
             not complete.",
        ))
    }
}

impl Drop for Lasting {
    fn drop(&mut self) {
        self.target.set_writing_job(false);
        if self.alone {
            self.target.set_lapses_max(None);
        }
    }
}

/// Whether a failure is one of those that no error policy forgives: what was written is lost, or what is found under the
/// name now is another disk. Neither gets better by another attempt.
pub(super) fn is_final(failed: &Failed) -> bool {
    [Errno::ENOTRECOVERABLE, Errno::ESTALE].contains(&failed.errno)
}
