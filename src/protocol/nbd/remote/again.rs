//! What becomes of acknowledged changes around the loss of a connection: they are written again, or counted as lost.

use blockferry_ring::sync::{Either, either};
use std::rc::Rc;

use super::{Remote, flush};
use crate::protocol::nbd::client_error::NbdClientError;

impl Remote {
    /// Flushes in the background, where much has gathered.
    pub(super) fn flush_soon(self: &Rc<Remote>) {
        if !self.unstable.is_much() || self.flushing.replace(true) {
            return;
        }
        let remote = self.clone();
        self.ring.spawn(async move {
            while remote.unstable.is_much() && !remote.closed.get() {
                let closed = remote.changed().until(|| remote.closed.get().then_some(()));
                match either(remote.flush(), closed).await {
                    Either::First(Ok(())) | Either::Second(()) => {}
                    Either::First(Err(error)) => {
                        if matches!(error, NbdClientError::Refused { .. }) {
                            remote.lose_for_good(&error.to_string());
                        }
                        break;
                    }
                }
            }
            remote.flushing.set(false);
            remote.unstable.room.notify();
        });
    }

    /// Waits until there may be room for a change, or something has happened that it has to look at.
    pub(super) async fn room(self: &Rc<Remote>, generation: u64, data_bytes: u64) {
        let _waiting = self.unstable.wait();
        self.flush_soon();
        let lost = self.keeper.lost.get();
        let unstable = &self.unstable;
        let room = unstable.room.until(|| {
            let is_given_up = unstable.is_much() && !self.flushing.get();
            (is_given_up || unstable.take_room(data_bytes).is_some()).then_some(())
        });
        let moved = self.changed().until(|| {
            let is_over = self.closed.get() || self.generation.get() != generation;
            (is_over || self.keeper.lost.get() != lost).then_some(())
        });
        either(room, moved).await;
    }

    /// How often changes that were acknowledged could not be written again after the server was lost.
    pub(in crate::protocol::nbd) fn losses_for_good(&self) -> u64 {
        self.losses_for_good.get()
    }

    /// From so many losses in a row on, without a flush between, requests fail.
    pub(in crate::protocol::nbd) fn set_lapses_max(&self, lapses_max: Option<u32>) {
        self.lapses_max.set(lapses_max);
        self.changed().notify();
    }

    /// A job writes to the disk from now on, or has ended.
    pub(in crate::protocol::nbd) fn set_writing_job(&self, is_there: bool) {
        if is_there { self.unstable.job_begins() } else { self.unstable.job_ends() }
    }

    pub(super) fn is_lost_too_often(&self) -> bool {
        self.lapses_max.get().is_some_and(|max| self.lapses.get() >= max)
    }

    /// Whether nothing has to be written again before anything else goes out.
    pub(super) fn is_whole(&self) -> bool {
        let lost = self.keeper.lost.get();
        if self.mended.get() != lost {
            if self.unstable.has_unkept() {
                self.lose_for_good("nothing is kept to be written again");
            }
            if self.unstable.is_empty() {
                self.mended.set(lost);
            }
        }
        self.mended.get() == lost
    }

    /// What was acknowledged and not flushed may be lost, and nothing can be done about it.
    pub(super) fn lose_for_good(&self, why: &str) {
        let Some(range) = self.unstable.forget() else { return };
        self.losses_for_good.set(self.losses_for_good.get() + 1);
        self.mended.set(self.keeper.lost.get());
        tracing::error!(
            uri = %self.name,
            from = range.start(),
            to = range.end(),
            why,
            "changes in this range that the server had acknowledged and not flushed may be lost; who has made them is told \
             with the next flush"
        );
    }

    /// Makes the changes again that may be lost, and flushes them; from the start when a connection is lost meanwhile.
    pub(super) async fn write_again(&self) {
        let keeper = &self.keeper;
        while let Some(connection) = self.oldest()
            && !self.is_whole()
        {
            if self.lapsed_at.replace(keeper.outages.get()) != keeper.outages.get() {
                self.lapses.set(self.lapses.get() + 1);
                let (changes, bytes) = self.unstable.amount();
                let lapses = self.lapses.get();
                tracing::warn!(
                    uri = %self.name, changes, bytes, lapses,
                    "a connection was lost, and maybe with it what the server had not flushed: that is written again"
                );
                self.changed().notify();
            }
            let lost = keeper.lost.get();
            let made = async {
                self.unstable.make_again(&self.ring, &connection).await?;
                flush(&connection).await
            };
            match made.await {
                Ok(()) if keeper.lost.get() == lost => {
                    self.unstable.flushed(self.unstable.mark());
                    self.lapses.set(0);
                    self.mended.set(lost);
                    tracing::info!(uri = %self.name, "what had not been flushed is written again and flushed");
                }
                Ok(()) => {}
                Err(error) if error.is_lost() => self.note_lost(&connection, &error),
                Err(error) => self.lose_for_good(&error.to_string()),
            }
        }
        self.changed().notify();
    }
}
