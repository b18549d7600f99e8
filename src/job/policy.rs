//! What a failed request means for its job: the error policies (`BlockdevOnError` of QEMU's QAPI schema).
//!
//! A policy is chosen when the job starts, one for reads of the source and one for writes to the target. Each
//! failing request asks [`OnError::action`]; the answer is shown in a `BLOCK_JOB_ERROR` event and obeyed by the
//! job. What it is to *retry* differs by job and is the job's own business.

use std::rc::Rc;

use blockferry_ring::Errno;
use serde::{Deserialize, Serialize};

use super::error::JobFailure;
use crate::block::{BlockError, Driver, place};

/// What the user wants done about a failed request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnError {
    /// The job fails with the first error.
    #[default]
    Report,
    /// The request is tried again later.
    Ignore,
    /// The job pauses until a user resumes it, then tries the request again.
    Stop,
    /// Stop when the target is full, report anything else. QEMU's `auto` means the same for a job.
    #[serde(alias = "auto")]
    Enospc,
}

/// What is done about one failed request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ErrorAction {
    /// The job fails.
    Report,
    /// The request is tried again.
    Ignore,
    /// The job pauses.
    Stop,
}

impl OnError {
    /// What this policy does about a request that failed with `errno`.
    pub fn action(self, errno: Errno) -> ErrorAction {
        match self {
            OnError::Report => ErrorAction::Report,
            OnError::Ignore => ErrorAction::Ignore,
            OnError::Stop => ErrorAction::Stop,
            OnError::Enospc if errno == Errno::ENOSPC => ErrorAction::Stop,
            OnError::Enospc => ErrorAction::Report,
        }
    }
}

/// How a mirror treats what guests change (`MirrorCopyMode` of QEMU's QAPI schema).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CopyMode {
    /// It is copied later.
    #[default]
    Background,
    /// It goes to source and target at the same time, and the guest is answered after both.
    WriteBlocking,
}

/// Which side of the job failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum IoOperation {
    /// A read of the source.
    Read,
    /// A write to the target, or its flush.
    Write,
}

impl IoOperation {
    /// For people: *read of the source* or *write to the target*.
    pub fn name(self) -> &'static str {
        match self {
            IoOperation::Read => "read of the source",
            IoOperation::Write => "write to the target",
        }
    }
}

/// Whether a job is stopped by an error, as `query-block-jobs` shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum IoStatus {
    /// No error has stopped the job.
    #[default]
    Ok,
    /// Stopped by an error other than a full target.
    Failed,
    /// Stopped because the target is full.
    Nospace,
}

impl IoStatus {
    /// The status after a `stop` because of `errno`: the first error stays until a resume.
    pub fn stopped_by(self, errno: Errno) -> IoStatus {
        match self {
            IoStatus::Ok if errno == Errno::ENOSPC => IoStatus::Nospace,
            IoStatus::Ok => IoStatus::Failed,
            already => already,
        }
    }
}

/// A failed request of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failed {
    /// Which side.
    pub operation: IoOperation,
    /// Its number.
    pub errno: Errno,
    /// The whole sentence.
    pub text: String,
}

impl Failed {
    /// The source could not be read.
    pub fn read(error: BlockError) -> Failed {
        Failed { operation: IoOperation::Read, errno: error.errno, text: error.to_string() }
    }

    /// The target could not be changed or flushed.
    pub fn write(error: BlockError) -> Failed {
        Failed { operation: IoOperation::Write, errno: error.errno, text: error.to_string() }
    }
}

/// Whether an error of [`find`] says that somebody has removed, replaced or cut one of the two, rather than that nobody can
/// tell for the moment. No policy forgives the former.
pub(super) fn is_displaced(failed: &Failed) -> bool {
    [Errno::ENOENT, Errno::ESTALE].contains(&failed.errno)
}

/// Looks whether both sides still are where they were, the target by its name; an error says on which side they are not.
pub(super) async fn find(source: &Rc<dyn Driver>, target: &Rc<dyn Driver>) -> Result<(), Failed> {
    place::check(target, true).await.map_err(Failed::write)?;
    place::check(source, false).await.map_err(Failed::read)
}

impl From<Failed> for JobFailure {
    fn from(failed: Failed) -> JobFailure {
        JobFailure::with_text(failed.errno, failed.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_policy_against_a_full_and_a_broken_target() {
        let table = [
            (OnError::Report, ErrorAction::Report, ErrorAction::Report),
            (OnError::Ignore, ErrorAction::Ignore, ErrorAction::Ignore),
            (OnError::Stop, ErrorAction::Stop, ErrorAction::Stop),
            (OnError::Enospc, ErrorAction::Stop, ErrorAction::Report),
        ];
        for (policy, when_full, when_broken) in table {
            assert_eq!(policy.action(Errno::ENOSPC), when_full, "{policy:?}");
            assert_eq!(policy.action(Errno::EIO), when_broken, "{policy:?}");
        }
    }

    #[test]
    fn auto_is_another_name_for_enospc() {
        let read = |name: &str| serde_json::from_value::<OnError>(name.into());
        assert_eq!(read("auto").unwrap(), OnError::Enospc);
        assert_eq!(read("enospc").unwrap(), OnError::Enospc);
        assert!(read("retry").is_err());
    }

    #[test]
    fn the_first_stop_decides_the_status() {
        assert_eq!(IoStatus::Ok.stopped_by(Errno::ENOSPC), IoStatus::Nospace);
        assert_eq!(IoStatus::Ok.stopped_by(Errno::EIO), IoStatus::Failed);
        assert_eq!(IoStatus::Nospace.stopped_by(Errno::EIO), IoStatus::Nospace);
        assert_eq!(IoStatus::Failed.stopped_by(Errno::ENOSPC), IoStatus::Failed);
    }
}
