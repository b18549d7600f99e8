//! What a job tells the world, and the queue in which it waits to be told.
//!
//! The life cycle pushes events in the order in which things happen, and its owner takes them out in that order
//! and stamps them with a time. Serialised, an event is the `data` object of the QMP event of the same
//! [`name`](JobEvent::name), members in the order in which QEMU 10.0 sends them.
//!
//! One kind of event can come in floods: with the `ignore` policy, a target that is broken for good fails as
//! fast as it can be asked. So error events that nobody has taken out yet are bounded, and what is beyond the
//! bound is counted instead; state changes are few by nature and never dropped.

use std::collections::VecDeque;

use serde::Serialize;

use super::policy::{ErrorAction, IoOperation};
use super::progress::Progress;
use super::status::Status;

/// How many error events of one job may wait to be taken out.
pub const ERROR_EVENTS_QUEUED_MAX: usize = 64;

/// What a job is, as clients see it. An active commit is a mirror inside and a `commit` here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum JobType {
    /// Copies a node to another and follows it until told to pivot.
    Mirror,
    /// Copies an overlay's data down into its backing chain.
    Commit,
    /// Copies a backing chain's data up into its overlay.
    Stream,
    /// Copies a node as it was at one moment.
    Backup,
    /// Copies a node that nobody writes. QEMU has no such job: `qemu-img convert` is a program of its own.
    Convert,
}

/// Where a job stood when something happened to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct JobPosition {
    /// The job's id.
    pub device: String,
    /// [`Progress::len`], in bytes.
    pub len: u64,
    /// [`Progress::offset`], in bytes.
    pub offset: u64,
    /// The limit in bytes a second; 0 is none.
    pub speed: u64,
    /// What the job is.
    #[serde(rename = "type")]
    pub job_type: JobType,
}

impl JobPosition {
    /// The position of `device` at `progress`.
    pub fn new(device: &str, progress: Progress, speed_bytes_per_sec: u64, job_type: JobType) -> Self {
        Self {
            device: device.to_owned(),
            len: progress.len(),
            offset: progress.offset(),
            speed: speed_bytes_per_sec,
            job_type,
        }
    }
}

/// One thing that happened to a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum JobEvent {
    /// `JOB_STATUS_CHANGE`: the job has moved to another state.
    StatusChange {
        /// The state it is in now.
        status: Status,
        /// The job.
        id: String,
    },
    /// `BLOCK_JOB_READY`: source and target are alike; `complete` is possible.
    Ready(JobPosition),
    /// `BLOCK_JOB_COMPLETED`: the job is over, with success unless there is an error.
    Completed {
        /// Where it ended.
        #[serde(flatten)]
        position: JobPosition,
        /// Why it failed.
        #[serde(skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    },
    /// `BLOCK_JOB_CANCELLED`: the job was cancelled by force, or before it was ready.
    Cancelled(JobPosition),
    /// `BLOCK_JOB_PENDING`: the job waits for `finalize`.
    Pending {
        /// What the job is.
        #[serde(rename = "type")]
        job_type: JobType,
        /// The job.
        id: String,
    },
    /// `BLOCK_JOB_ERROR`: a request failed.
    Error {
        /// The job.
        device: String,
        /// Which side failed.
        operation: IoOperation,
        /// What is done about it.
        action: ErrorAction,
    },
}

impl JobEvent {
    /// The QMP name of the event.
    pub fn name(&self) -> &'static str {
        match self {
            JobEvent::StatusChange { .. } => "JOB_STATUS_CHANGE",
            JobEvent::Ready(_) => "BLOCK_JOB_READY",
            JobEvent::Completed { .. } => "BLOCK_JOB_COMPLETED",
            JobEvent::Cancelled(_) => "BLOCK_JOB_CANCELLED",
            JobEvent::Pending { .. } => "BLOCK_JOB_PENDING",
            JobEvent::Error { .. } => "BLOCK_JOB_ERROR",
        }
    }
}

/// Events of one job, oldest first.
#[derive(Debug, Default)]
pub struct EventQueue {
    events: VecDeque<JobEvent>,
    errors_queued: usize,
    errors_suppressed: u64,
}

impl EventQueue {
    /// Adds an event, unless it is one error event too many.
    pub fn push(&mut self, event: JobEvent) {
        if matches!(event, JobEvent::Error { .. }) {
            if self.errors_queued == ERROR_EVENTS_QUEUED_MAX {
                self.errors_suppressed += 1;
                return;
            }
            self.errors_queued += 1;
        }
        self.events.push_back(event);
    }

    /// Takes the oldest event.
    pub fn pop(&mut self) -> Option<JobEvent> {
        let event = self.events.pop_front()?;
        if matches!(event, JobEvent::Error { .. }) {
            self.errors_queued -= 1;
        }
        Some(event)
    }

    /// How many error events were counted instead of queued, since the job was made.
    pub fn errors_suppressed(&self) -> u64 {
        self.errors_suppressed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn position() -> JobPosition {
        let mut progress = Progress::new(1 << 20);
        progress.done(4096);
        JobPosition::new("j", progress, 7, JobType::Mirror)
    }

    #[test]
    fn data_members_stand_in_the_order_of_the_wire() {
        let place = r#""device":"j","len":1048576,"offset":4096,"speed":7,"type":"mirror""#;
        let table = [
            (
                JobEvent::StatusChange { status: Status::Standby, id: "j".into() },
                "JOB_STATUS_CHANGE",
                r#"{"status":"standby","id":"j"}"#.to_owned(),
            ),
            (JobEvent::Ready(position()), "BLOCK_JOB_READY", format!("{{{place}}}")),
            (
                JobEvent::Completed { position: position(), error: None },
                "BLOCK_JOB_COMPLETED",
                format!("{{{place}}}"),
            ),
            (
                JobEvent::Completed { position: position(), error: Some("Input/output error".into()) },
                "BLOCK_JOB_COMPLETED",
                format!(r#"{{{place},"error":"Input/output error"}}"#),
            ),
            (JobEvent::Cancelled(position()), "BLOCK_JOB_CANCELLED", format!("{{{place}}}")),
            (
                JobEvent::Pending { job_type: JobType::Backup, id: "j".into() },
                "BLOCK_JOB_PENDING",
                r#"{"type":"backup","id":"j"}"#.to_owned(),
            ),
            (
                JobEvent::Error {
                    device: "j".into(),
                    operation: IoOperation::Write,
                    action: ErrorAction::Stop,
                },
                "BLOCK_JOB_ERROR",
                r#"{"device":"j","operation":"write","action":"stop"}"#.to_owned(),
            ),
        ];
        for (event, name, data) in table {
            assert_eq!(event.name(), name);
            assert_eq!(serde_json::to_string(&event).unwrap(), data);
        }
    }

    #[test]
    fn a_flood_of_errors_is_counted_and_drops_nothing_else() {
        let error =
            JobEvent::Error { device: "j".into(), operation: IoOperation::Read, action: ErrorAction::Ignore };
        let last = JobEvent::StatusChange { status: Status::Aborting, id: "j".into() };
        let mut queue = EventQueue::default();
        for _ in 0..ERROR_EVENTS_QUEUED_MAX + 3 {
            queue.push(error.clone());
        }
        queue.push(last.clone());
        assert_eq!(queue.errors_suppressed(), 3);
        for _ in 0..ERROR_EVENTS_QUEUED_MAX {
            assert_eq!(queue.pop(), Some(error.clone()));
        }
        assert_eq!(queue.pop(), Some(last));
        assert_eq!(queue.pop(), None);

        queue.push(error.clone());
        assert_eq!((queue.pop(), queue.errors_suppressed()), (Some(error), 3));
    }
}
