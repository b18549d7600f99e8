//! What a machine does about failed requests, as its error policy says: fail once nothing is in flight, stop until a user
//! resumes, or try again after a pause that doubles.

use blockferry_ring::Nanos;

use super::body::Context;
use super::error::JobFailure;
use super::lasting::is_final;
use super::policy::{ErrorAction, Failed};
use crate::base::limits::{ERROR_PAUSE_NANOS_MAX, ERROR_PAUSE_NANOS_MIN};

/// Failures of one job.
#[derive(Debug)]
pub(super) struct Retries {
    failure: Option<JobFailure>,
    at: Option<Nanos>,
    pause: Nanos,
    count: u64,
    /// What failed last, in words.
    last: Option<String>,
}

impl Retries {
    /// Nothing has failed yet.
    pub(super) fn new() -> Retries {
        Retries { failure: None, at: None, pause: ERROR_PAUSE_NANOS_MIN, count: 0, last: None }
    }

    /// A request failed. What is left of it must be put back: it is tried again unless the job fails.
    pub(super) fn failed<Op>(&mut self, cx: &mut Context<'_, Op>, failed: Failed) {
        if is_final(&failed) {
            return self.fatal(failed);
        }
        if !self.note(&failed) {
            return;
        }
        match (cx.on_error)(failed.operation, failed.errno) {
            ErrorAction::Report => self.failure = Some(failed.into()),
            ErrorAction::Stop => {
                self.at = None;
                // Stopped from now on, not from the next step on: this one must not try the range again.
                cx.orders.hold = true;
            }
            ErrorAction::Ignore => {
                self.at = Some(cx.now + self.pause);
                self.pause = (self.pause * 2).min(ERROR_PAUSE_NANOS_MAX);
            }
        }
    }

    /// A request failed in a way that no policy forgives.
    pub(super) fn fatal(&mut self, failed: Failed) {
        if self.note(&failed) {
            self.failure = Some(failed.into());
        }
    }

    /// Counts it; false if the job fails already.
    fn note(&mut self, failed: &Failed) -> bool {
        self.count += 1;
        // Many are in flight and fail alike: who follows the job hears of one, from its events and details.
        tracing::debug!(error = failed.text, "a request of a job failed");
        let is_news = self.failure.is_none();
        if is_news {
            self.last = Some(failed.text.clone());
        }
        is_news
    }

    /// The job fails, whatever else happens.
    pub(super) fn fail(&mut self, failure: JobFailure) {
        self.failure = Some(failure);
    }

    /// Something went well: the next pause is a short one.
    pub(super) fn went_well(&mut self) {
        self.pause = ERROR_PAUSE_NANOS_MIN;
    }

    /// The job will fail once nothing is in flight.
    pub(super) fn is_failing(&self) -> bool {
        self.failure.is_some()
    }

    /// Why it fails.
    pub(super) fn take_failure(&mut self) -> Option<JobFailure> {
        self.failure.take()
    }

    /// A pause before another attempt is to come, or under way.
    pub(super) fn is_pausing(&self) -> bool {
        self.at.is_some()
    }

    /// Whether the job waits before it tries again; it is woken in time.
    pub(super) fn waits<Op>(&mut self, cx: &mut Context<'_, Op>) -> bool {
        match self.at {
            Some(at) if at > cx.now => {
                cx.wake_by(at);
                true
            }
            _ => {
                self.at = None;
                false
            }
        }
    }

    /// What failed last.
    pub(super) fn last(&self) -> Option<String> {
        self.last.clone()
    }

    /// Requests that failed so far.
    pub(super) fn count(&self) -> u64 {
        self.count
    }
}
