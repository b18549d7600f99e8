//! What can go wrong with a job, in two kinds that must not be mixed.
//!
//! [`JobError`] is the answer to a command that was refused: the job itself is untouched. Its texts and classes
//! are those that QEMU's QMP gives, because clients match on them. [`JobFailure`] is why a job ended without
//! success: an errno, and a sentence where the errno alone would not tell.

use blockferry_ring::Errno;
use serde::Serialize;
use thiserror::Error;

use super::status::{Status, Verb};

/// The QMP error class; everything that has no class of its own is `GenericError`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum ErrorClass {
    /// Nothing more is said than the text.
    GenericError,
    /// A `block-job-*` command named a job that is not there.
    DeviceNotActive,
    /// A command named a device that is not there.
    DeviceNotFound,
}

/// Why a command about a job was refused.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum JobError {
    /// The verb table says no.
    #[error("Job '{id}' in state '{status}' cannot accept command verb '{verb}'")]
    VerbNotAccepted {
        /// The job.
        id: String,
        /// The state it was in.
        status: Status,
        /// What was asked.
        verb: Verb,
    },
    /// A second user pause.
    #[error("Job is already paused")]
    AlreadyPaused,
    /// A resume without a user pause.
    #[error("Can't resume a job that was not paused")]
    NotPaused,
    /// `block-job-cancel` without `force` of a job that a user, or the `stop` policy, paused.
    #[error("The block job for device '{id}' is currently paused")]
    CurrentlyPaused {
        /// The job.
        id: String,
    },
    /// `complete` of a job that was cancelled, or that knows no `complete`.
    #[error("The active block job '{id}' cannot be completed")]
    CannotComplete {
        /// The job.
        id: String,
    },
    /// `change` of a job whose type has nothing to change.
    #[error("Job type does not support change")]
    ChangeNotSupported,
    /// A negative limit.
    #[error("Parameter 'speed' expects a non-negative value")]
    NegativeSpeed,
    /// An id that breaks the rules of ids.
    #[error("Invalid job ID '{id}'")]
    InvalidId {
        /// As it was given.
        id: String,
    },
    /// An id that another job has.
    #[error("Job ID '{id}' already in use")]
    IdInUse {
        /// As it was given.
        id: String,
    },
    /// More jobs than the engine holds.
    #[error("Too many jobs: this engine holds at most {limit}")]
    TooManyJobs {
        /// How many it holds.
        limit: usize,
    },
    /// A `job-*` command named a job that is not there.
    #[error("Job not found")]
    JobNotFound,
    /// A `block-job-*` command named a job that is not there.
    #[error("Block job '{id}' not found")]
    BlockJobNotFound {
        /// As it was given.
        id: String,
    },
    /// A command that starts a job named a device that is not there.
    #[error("Device '{device}' not found")]
    DeviceNotFound {
        /// As it was given.
        device: String,
    },
}

impl JobError {
    /// The class that goes with the text.
    pub fn class(&self) -> ErrorClass {
        match self {
            JobError::BlockJobNotFound { .. } => ErrorClass::DeviceNotActive,
            JobError::DeviceNotFound { .. } => ErrorClass::DeviceNotFound,
            _ => ErrorClass::GenericError,
        }
    }
}

/// Why a job ended without success. Shown as the `error` of events and queries.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{text}")]
pub struct JobFailure {
    /// Its number.
    pub errno: Errno,
    text: String,
}

impl JobFailure {
    /// A failure that its errno explains.
    pub fn from_errno(errno: Errno) -> Self {
        Self { errno, text: errno.to_string() }
    }

    /// A failure with a sentence of its own, such as `Source and target image have different sizes`.
    pub fn with_text(errno: Errno, text: impl Into<String>) -> Self {
        Self { errno, text: text.into() }
    }

    /// The end of a job that was cancelled by force.
    pub fn cancelled() -> Self {
        Self::from_errno(Errno::ECANCELED)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_those_that_clients_match() {
        let refused =
            JobError::VerbNotAccepted { id: "j".into(), status: Status::Concluded, verb: Verb::SetSpeed };
        assert_eq!(
            refused.to_string(),
            "Job 'j' in state 'concluded' cannot accept command verb 'set-speed'"
        );
        assert_eq!(refused.class(), ErrorClass::GenericError);
        let missing = JobError::BlockJobNotFound { id: "x".into() };
        assert_eq!(missing.to_string(), "Block job 'x' not found");
        assert_eq!(missing.class(), ErrorClass::DeviceNotActive);
        let device = JobError::DeviceNotFound { device: "d".into() };
        assert_eq!(device.class(), ErrorClass::DeviceNotFound);
        assert_eq!(serde_json::to_value(device.class()).unwrap(), "DeviceNotFound");
    }

    #[test]
    fn a_failure_speaks_like_strerror() {
        assert_eq!(JobFailure::from_errno(Errno::EIO).to_string(), "Input/output error");
        assert_eq!(JobFailure::from_errno(Errno::ENOSPC).to_string(), "No space left on device");
        assert_eq!(JobFailure::cancelled().to_string(), "Operation canceled");
        let sizes = JobFailure::with_text(Errno::EINVAL, "Source and target image have different sizes");
        assert_eq!(
            (sizes.errno, sizes.to_string().as_str()),
            (Errno::EINVAL, "Source and target image have different sizes")
        );
    }
}
