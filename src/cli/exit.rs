//! How a command ends.

use std::process::ExitCode;

/// The documented exit codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Done as promised.
    Done,
    /// Failed.
    Failed,
    /// Cancelled before the target was complete.
    Cancelled,
    /// Contents differ.
    Different,
    /// A code that this command shares with `qemu-img`.
    Code(u8),
}

impl Exit {
    /// As the process tells it.
    pub fn code(self) -> u8 {
        match self {
            Exit::Done => 0,
            Exit::Failed => 1,
            Exit::Cancelled => 3,
            Exit::Different => 4,
            Exit::Code(code) => code,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit.code())
    }
}

/// What the user is told when a command fails: a sentence, with the cure where there is one.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The ring could not be set up.
    #[error(transparent)]
    Setup(#[from] blockferry_ring::SetupError),
    /// An image.
    #[error(transparent)]
    Block(#[from] crate::block::BlockError),
    /// A mirror.
    #[error(transparent)]
    Mirror(#[from] crate::job::mirror::MirrorError),
    /// A conversion.
    #[error(transparent)]
    Convert(#[from] crate::job::convert::ConvertError),
    /// A commit or a stream.
    #[error(transparent)]
    Chain(#[from] crate::job::sweep::ChainError),
    /// A job verb.
    #[error(transparent)]
    Job(#[from] crate::job::error::JobError),
    /// Something speaks against it, before anything was changed.
    #[error(transparent)]
    Refused(#[from] crate::engine::admit::Refusal),
    /// The command line makes no sense.
    #[error("{0}")]
    Usage(String),
    /// Anything else, said in full.
    #[error("{0}")]
    Text(String),
}

impl Failure {
    /// What is wrong with the command line, as a sentence.
    pub fn usage(text: impl Into<String>) -> Failure {
        Failure::Usage(text.into())
    }

    /// The exit code of a command that ends with it.
    pub fn exit(&self) -> Exit {
        match self {
            Failure::Usage(_) => Exit::Code(2),
            _ => Exit::Failed,
        }
    }

    /// A failure with its sentence.
    pub fn text(text: impl Into<String>) -> Failure {
        Failure::Text(text.into())
    }
}
