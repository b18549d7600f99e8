//! What queries show of a job: one item of `query-block-jobs`, and one of `query-jobs`.
//!
//! Members stand in the order in which QEMU 10.0.2 sends them, which clients must not rely on and some do.

use serde::Serialize;

use super::event::JobType;
use super::policy::IoStatus;
use super::status::Status;

/// An item of `query-block-jobs`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct JobInfo {
    /// Goes from pending to concluded without a `finalize`.
    pub auto_finalize: bool,
    /// Whether an error has stopped the job.
    pub io_status: IoStatus,
    /// The job's id.
    pub device: String,
    /// Goes from concluded to null without a `dismiss`.
    pub auto_dismiss: bool,
    /// False while nothing of the job is under way.
    pub busy: bool,
    /// Bytes done and left.
    pub len: u64,
    /// Bytes done.
    pub offset: u64,
    /// Where the job is in its life.
    pub status: Status,
    /// Someone holds the job: a user, or a drain of one of its nodes.
    pub paused: bool,
    /// The limit in bytes a second; 0 is none.
    pub speed: u64,
    /// `complete` is possible.
    pub ready: bool,
    /// What the job is.
    #[serde(rename = "type")]
    pub job_type: JobType,
    /// Mirror only: guest writes reach source and target before the guest is answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub actively_synced: Option<bool>,
    /// Why the job failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// An item of `query-jobs`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct JobSummary {
    /// Bytes done.
    pub current_progress: u64,
    /// Where the job is in its life.
    pub status: Status,
    /// Bytes done and left.
    pub total_progress: u64,
    /// What the job is.
    #[serde(rename = "type")]
    pub job_type: JobType,
    /// The job's id.
    pub id: String,
    /// Why the job failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl From<&JobInfo> for JobSummary {
    fn from(info: &JobInfo) -> Self {
        Self {
            current_progress: info.offset,
            status: info.status,
            total_progress: info.len,
            job_type: info.job_type,
            id: info.device.clone(),
            error: info.error.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_look_as_the_reference_sends_them() {
        let mut info = JobInfo {
            auto_finalize: true,
            io_status: IoStatus::Ok,
            device: "j".into(),
            auto_dismiss: false,
            busy: false,
            len: 1048576,
            offset: 0,
            status: Status::Concluded,
            paused: false,
            speed: 0,
            ready: false,
            job_type: JobType::Mirror,
            actively_synced: Some(false),
            error: Some("Operation canceled".into()),
        };
        assert_eq!(
            serde_json::to_string(&info).unwrap(),
            "{\"auto-finalize\":true,\"io-status\":\"ok\",\"device\":\"j\",\"auto-dismiss\":false,\
             \"busy\":false,\"len\":1048576,\"offset\":0,\"status\":\"concluded\",\"paused\":false,\
             \"speed\":0,\"ready\":false,\"type\":\"mirror\",\"actively-synced\":false,\
             \"error\":\"Operation canceled\"}"
        );
        assert_eq!(
            serde_json::to_string(&JobSummary::from(&info)).unwrap(),
            "{\"current-progress\":0,\"status\":\"concluded\",\"total-progress\":1048576,\
             \"type\":\"mirror\",\"id\":\"j\",\"error\":\"Operation canceled\"}"
        );
        (info.actively_synced, info.error) = (None, None);
        assert!(serde_json::to_string(&info).unwrap().ends_with("\"ready\":false,\"type\":\"mirror\"}"));
    }
}
