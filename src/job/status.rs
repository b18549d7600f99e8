//! The states of a job, the verbs a manager may say to it, and the two tables that rule both.
//!
//! The names, the arrows and the accepted verbs are those of QEMU's jobs (`JobStatus`, `JobVerb` in its QAPI
//! schema), because a VM manager written against QEMU decides by them. Each table stands in one function and
//! nowhere else: a life cycle that wants to know whether it may move asks [`Status::may_become`], a command
//! that wants to know whether it is welcome asks [`Status::accepts`].

use std::fmt;

use serde::Serialize;

/// Where a job is in its life. The lower-case name is what QMP shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Not made yet; never seen from outside.
    Undefined,
    /// Made, not started.
    Created,
    /// The body runs.
    Running,
    /// The body stands at a pause point, before it was ready.
    Paused,
    /// Source and target are alike, guest writes are followed, and the job waits for `complete` or `cancel`.
    Ready,
    /// Ready, and standing at a pause point.
    Standby,
    /// The body is over; the job waits for the other members of its group.
    Waiting,
    /// All that is left is to finalize.
    Pending,
    /// The job failed or was cancelled and is being undone.
    Aborting,
    /// Over; only the result is still there to be read.
    Concluded,
    /// Dismissed: nothing is left.
    Null,
}

impl Status {
    /// All states, in the order of a life.
    pub const ALL: [Status; 11] = [
        Status::Undefined,
        Status::Created,
        Status::Running,
        Status::Paused,
        Status::Ready,
        Status::Standby,
        Status::Waiting,
        Status::Pending,
        Status::Aborting,
        Status::Concluded,
        Status::Null,
    ];

    /// The name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Status::Undefined => "undefined",
            Status::Created => "created",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Ready => "ready",
            Status::Standby => "standby",
            Status::Waiting => "waiting",
            Status::Pending => "pending",
            Status::Aborting => "aborting",
            Status::Concluded => "concluded",
            Status::Null => "null",
        }
    }

    /// The transition table: may a job in this state move to `to`?
    pub fn may_become(self, to: Status) -> bool {
        use Status::*;
        match self {
            Undefined => matches!(to, Created),
            Created => matches!(to, Running | Aborting | Null),
            Running => matches!(to, Paused | Ready | Waiting | Aborting),
            Paused => matches!(to, Running),
            Ready => matches!(to, Standby | Waiting | Aborting),
            Standby => matches!(to, Ready),
            Waiting => matches!(to, Pending | Aborting),
            Pending => matches!(to, Aborting | Concluded),
            Aborting => matches!(to, Aborting | Concluded),
            Concluded => matches!(to, Null),
            Null => false,
        }
    }

    /// The verb table: is `verb` welcome in this state?
    pub fn accepts(self, verb: Verb) -> bool {
        use Status::*;
        match verb {
            Verb::Cancel => matches!(self, Created | Running | Paused | Ready | Standby | Waiting | Pending),
            Verb::Pause | Verb::Resume | Verb::SetSpeed | Verb::Change => {
                matches!(self, Created | Running | Paused | Ready | Standby)
            }
            Verb::Complete => self.is_ready(),
            Verb::Finalize => matches!(self, Pending),
            Verb::Dismiss => matches!(self, Concluded),
        }
    }

    /// Ready for `complete`: what `query-block-jobs` shows as `ready`.
    pub fn is_ready(self) -> bool {
        matches!(self, Status::Ready | Status::Standby)
    }

    /// Standing at a pause point.
    pub fn is_paused(self) -> bool {
        matches!(self, Status::Paused | Status::Standby)
    }

    /// Started, and its body has not returned.
    pub fn has_running_body(self) -> bool {
        matches!(self, Status::Running | Status::Paused | Status::Ready | Status::Standby)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a manager may say to a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verb {
    /// End without success; what it means while ready depends on `force`.
    Cancel,
    /// Hold at the next pause point.
    Pause,
    /// Take back a pause.
    Resume,
    /// Set the limit in bytes a second.
    SetSpeed,
    /// Change an option of a running job.
    Change,
    /// End a ready job with success.
    Complete,
    /// Let a pending job take effect.
    Finalize,
    /// Forget a concluded job.
    Dismiss,
}

impl Verb {
    /// All verbs.
    pub const ALL: [Verb; 8] = [
        Verb::Cancel,
        Verb::Pause,
        Verb::Resume,
        Verb::SetSpeed,
        Verb::Change,
        Verb::Complete,
        Verb::Finalize,
        Verb::Dismiss,
    ];

    /// The name as error texts show it.
    pub fn name(self) -> &'static str {
        match self {
            Verb::Cancel => "cancel",
            Verb::Pause => "pause",
            Verb::Resume => "resume",
            Verb::SetSpeed => "set-speed",
            Verb::Change => "change",
            Verb::Complete => "complete",
            Verb::Finalize => "finalize",
            Verb::Dismiss => "dismiss",
        }
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows are the state before, columns the state after, both in the order of a life.
    const ARROWS: &str = "
        from       U C R P Y S W D X E N
        undefined  . x . . . . . . . . .
        created    . . x . . . . . x . x
        running    . . . x x . x . x . .
        paused     . . x . . . . . . . .
        ready      . . . . . x x . x . .
        standby    . . . . x . . . . . .
        waiting    . . . . . . . x x . .
        pending    . . . . . . . . x x .
        aborting   . . . . . . . . x x .
        concluded  . . . . . . . . . . x
        null       . . . . . . . . . . .";

    /// Rows are the verbs, columns the states in the same order.
    const VERBS: &str = "
        verb       U C R P Y S W D X E N
        cancel     . x x x x x x x . . .
        pause      . x x x x x . . . . .
        resume     . x x x x x . . . . .
        set-speed  . x x x x x . . . . .
        change     . x x x x x . . . . .
        complete   . . . . x x . . . . .
        finalize   . . . . . . . x . . .
        dismiss    . . . . . . . . . x .";

    /// The rows of a picture: the name, and a mark a column.
    fn rows(picture: &str) -> Vec<(&str, Vec<bool>)> {
        let mut lines = picture.lines().map(str::trim).filter(|line| !line.is_empty());
        assert!(lines.next().is_some_and(|head| head.ends_with("U C R P Y S W D X E N")));
        lines
            .map(|line| {
                let mut words = line.split_whitespace();
                (words.next().unwrap(), words.map(|mark| mark == "x").collect())
            })
            .collect()
    }

    #[test]
    fn transitions_are_the_reference_table() {
        let table = rows(ARROWS);
        assert_eq!(table.len(), Status::ALL.len());
        for ((name, marks), from) in table.into_iter().zip(Status::ALL) {
            assert_eq!(name, from.to_string());
            assert_eq!(marks.len(), Status::ALL.len());
            for (allowed, to) in marks.into_iter().zip(Status::ALL) {
                assert_eq!(from.may_become(to), allowed, "{from} -> {to}");
            }
        }
    }

    #[test]
    fn verbs_are_the_reference_table() {
        let table = rows(VERBS);
        assert_eq!(table.len(), Verb::ALL.len());
        for ((name, marks), verb) in table.into_iter().zip(Verb::ALL) {
            assert_eq!(name, verb.to_string());
            assert_eq!(marks.len(), Status::ALL.len());
            for (allowed, status) in marks.into_iter().zip(Status::ALL) {
                assert_eq!(status.accepts(verb), allowed, "{verb} in {status}");
            }
        }
    }

    #[test]
    fn the_wire_name_is_the_shown_name() {
        for status in Status::ALL {
            assert_eq!(serde_json::to_value(status).unwrap(), status.to_string());
        }
    }
}
