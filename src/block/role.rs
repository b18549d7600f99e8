//! In which role a node is used, what that takes and what it leaves to others.
//!
//! Users of a disk (clients, jobs) get along by a table: two jobs do not share a disk by accident, and a client may go on
//! using what a job reads. What is built on a node (an image on its file, a layer on its backing file) gets along with other
//! users by [permissions](super::Permissions): what one takes, every other has to share.

use super::Permissions;

/// Who uses a node. Decides what else may use it in this program, and which locks keep others out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A root that only reads.
    Reader,
    /// A root that writes. Several may: they see each other's writes.
    Guest,
    /// The source of a job of this type.
    JobSource(&'static str),
    /// The target of a job of this type: nobody else may use it.
    JobTarget(&'static str),
    /// A layer whose data a job of this type moves down: by itself it will make no sense any more.
    JobLayer(&'static str),
    /// The layer that a job of this type writes into below others, which hide the changes.
    JobBase(&'static str),
    /// The layer that a job of this type fills with what it reads from below.
    JobTop(&'static str),
    /// The image is changed without a change of what it shows: it gets another backing file.
    Editor,
    /// It is promised to a job that will read it, and stays as it is until that has begun.
    PromisedSource,
    /// It is promised to a job that will write it: nobody else may have it until that has begun.
    PromisedTarget,
    /// It is on its way out: others have come in its place.
    Leaving,
    /// The file that holds an image, tables and data.
    File,
    /// The file that holds an image's data beside it.
    DataFile,
    /// The layer below, which shows where this one holds nothing.
    Backing,
    /// All of it is passed on by what is built on it (a window, a delay).
    Filtered,
}

impl Role {
    /// What it takes and shares; what is built on a node says so itself ([`super::Child::set_permissions`]).
    pub(super) fn permissions(self) -> Permissions {
        match self {
            Role::Reader => Permissions::READER,
            Role::Guest => Permissions::USER,
            Role::JobSource(_) | Role::PromisedSource => Permissions::STABLE_READER,
            Role::JobTarget(_) | Role::PromisedTarget => Permissions::JOB_TARGET,
            Role::JobLayer(_) => Permissions::JOB_LAYER,
            Role::JobBase(_) => Permissions::JOB_BASE,
            Role::JobTop(_) | Role::Editor => Permissions::JOB_TOP,
            Role::File | Role::DataFile | Role::Backing | Role::Filtered | Role::Leaving => Permissions::NONE,
        }
    }

    /// The type of the job that it belongs to.
    pub fn job(self) -> Option<&'static str> {
        match self {
            Role::JobSource(job)
            | Role::JobTarget(job)
            | Role::JobLayer(job)
            | Role::JobBase(job)
            | Role::JobTop(job) => Some(job),
            _ => None,
        }
    }

    /// Whether something is built on the node: what that needs it says itself.
    pub(super) fn is_inner(self) -> bool {
        matches!(self, Role::File | Role::DataFile | Role::Backing | Role::Filtered)
    }

    /// Whether the two, which are not inner ones, may use one node at the same time.
    pub(super) fn agrees_with(self, other: Role) -> bool {
        self.allows(other) && other.allows(self)
    }

    fn allows(self, other: Role) -> bool {
        match (self, other) {
            (Role::Leaving, _) | (_, Role::Leaving) => true,
            (Role::Reader | Role::Guest | Role::Editor | Role::PromisedSource, _) => true,
            (Role::JobSource(_) | Role::JobTop(_), other) => other.job().is_none(),
            (Role::JobBase(_), other) => matches!(other, Role::Reader | Role::Editor),
            (Role::JobLayer(_), other) => other == Role::Editor,
            (Role::JobTarget(_), other) => other == Role::PromisedTarget,
            (Role::PromisedTarget, other) => matches!(other, Role::JobTarget(_)),
            (Role::File | Role::DataFile | Role::Backing | Role::Filtered, _) => true,
        }
    }
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Role::Reader | Role::Guest => f.write_str("a client"),
            Role::JobSource(job)
            | Role::JobTarget(job)
            | Role::JobLayer(job)
            | Role::JobBase(job)
            | Role::JobTop(job) => write!(f, "block job: {job}"),
            Role::Editor => f.write_str("a change of its backing file"),
            Role::PromisedSource => f.write_str("a job that will read it"),
            Role::PromisedTarget => f.write_str("a job that will write it"),
            Role::Leaving => f.write_str("nobody any more"),
            Role::File => f.write_str("an image, as its file"),
            Role::DataFile => f.write_str("an image, as its data file"),
            Role::Backing => f.write_str("an image, as its backing file"),
            Role::Filtered => f.write_str("a disk that passes it on"),
        }
    }
}
