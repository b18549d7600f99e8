//! What a client of an NBD server is told when something fails.
//!
//! Two kinds matter to a caller. A request that was *refused* failed alone: the connection is as good as before, and
//! the next request may succeed. A connection that was *lost* fails everything in flight with the same reason, and of a
//! write in flight nobody knows whether it was carried out, or still will be.

use std::rc::Rc;

use blockferry_ring::{Errno, Nanos};

use super::constants::{Command, OptionCode, ReplyCode};
use super::errno::NbdErrno;
use super::error::ProtocolError;
use crate::base::units::fmt_duration;
use crate::block::NoMemory;

/// Why a connection could not be made, a request failed, or everything did.
#[derive(Clone, Debug, thiserror::Error)]
pub enum NbdClientError {
    /// The host's name leads to no address.
    #[error("The host of '{uri}' could not be looked up: {reason}.")]
    Resolve {
        /// What was to be opened.
        uri: Rc<str>,
        /// Why.
        reason: String,
        /// Another attempt would end the same way.
        is_final: bool,
    },
    /// Nobody answers at the address.
    #[error("Connecting to '{uri}' failed: {errno}.")]
    Connect {
        /// What was to be opened.
        uri: Rc<str>,
        /// Why.
        errno: Errno,
    },
    /// The two sides did not come together.
    #[error("Opening '{uri}' failed: {reason}")]
    Handshake {
        /// What was to be opened.
        uri: Rc<str>,
        /// Why.
        reason: ProtocolError,
    },
    /// The connection is over, and with it everything that was in flight.
    #[error("The connection to '{uri}' is lost: {reason}")]
    Lost {
        /// The export.
        uri: Rc<str>,
        /// What ended it.
        reason: LostReason,
    },
    /// The server goes down again and again, and nothing that it is told lasts.
    #[error(
        "The server of '{uri}' was lost {times} times in a row without a flush between that succeeded: nothing that is \
         written to it lasts."
    )]
    LostTooOften {
        /// The export.
        uri: Rc<str>,
        /// How often.
        times: u32,
    },
    /// What is found under the name is not the export that was opened.
    #[error(
        "'{uri}' is not the export that it was when it was opened: its size, its blocks or its permissions differ."
    )]
    ChangedExport {
        /// The export.
        uri: Rc<str>,
    },
    /// The server failed one request.
    #[error("{uri}: a {command:?} request at offset {offset} ({length} bytes) failed: {errno}{}{message}.",
        if message.is_empty() { "" } else { "; the server says: " })]
    Refused {
        /// The export.
        uri: Rc<str>,
        /// The request.
        command: Command,
        /// Its offset, in bytes.
        offset: u64,
        /// Its length, in bytes.
        length: u64,
        /// Why.
        errno: NbdErrno,
        /// The server's words, made safe to print; may be empty.
        message: Rc<str>,
    },
    /// The request was not even sent, because the server cannot or must not be asked for it.
    #[error("{uri}: a {command:?} request at offset {offset} ({length} bytes) cannot be sent: {reason}.")]
    NotSent {
        /// The export.
        uri: Rc<str>,
        /// The request.
        command: Command,
        /// Its offset, in bytes.
        offset: u64,
        /// Its length, in bytes.
        length: u64,
        /// Why.
        reason: NotSentReason,
    },
    /// What was to be sent, or was read, has no memory.
    #[error("A request cannot go on: {0}.")]
    NoMemory(#[from] NoMemory),
}

/// What ended a connection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LostReason {
    /// The server closed it.
    #[error("the server closed it.")]
    ClosedByServer,
    /// The server closed it instead of answering an option of the handshake.
    #[error("the server closed it when it was asked for {option:?}{}", match option {
        OptionCode::ExportName => ": it may not have such an export.",
        _ => ".",
    })]
    HungUp {
        /// The option.
        option: OptionCode,
    },
    /// This side closed it.
    #[error("it was closed on this side.")]
    ClosedHere,
    /// The transport failed.
    #[error("{0}.")]
    Transport(Errno),
    /// The server said that it shuts down.
    #[error("the server says that it is shutting down.")]
    ShuttingDown,
    /// The server has sent nothing for so long that this side waits no longer.
    #[error("the server has not sent a byte for {}.", fmt_duration(*silent_ns))]
    GivenUp {
        /// How long it was silent.
        silent_ns: Nanos,
    },
    /// The server took too long.
    #[error("the server did not answer in time.")]
    TimedOut,
    /// The server broke the protocol, so nothing it says later can be understood.
    #[error("{0}")]
    Protocol(ProtocolError),
    /// The server answered something that was not asked.
    #[error("the server answered a request that was not made (cookie {cookie:#x}).")]
    UnknownCookie {
        /// The reply's cookie.
        cookie: u64,
    },
}

/// Why a request was not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotSentReason {
    /// The export does not offer it.
    #[error("the server does not offer it")]
    NotOffered,
    /// The export is read-only.
    #[error("the export is read-only")]
    ReadOnly,
    /// It lies outside of the export, or is empty.
    #[error("the export has {size_bytes} bytes")]
    OutOfRange {
        /// Size of the export in bytes.
        size_bytes: u64,
    },
    /// It is longer than the server takes.
    #[error("{bytes_max} bytes are the most that one request may have")]
    TooLong {
        /// The limit in bytes.
        bytes_max: u64,
    },
    /// It does not keep to the alignment that the server demands.
    #[error("the server demands multiples of {block_bytes} bytes")]
    Unaligned {
        /// The alignment in bytes.
        block_bytes: u32,
    },
}

impl NbdClientError {
    /// The number that describes it best.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Resolve { .. } => Errno::EADDRNOTAVAIL,
            Self::Connect { errno, .. } => *errno,
            Self::Handshake { .. } => Errno::EPROTO,
            Self::ChangedExport { .. } => Errno::ESTALE,
            Self::LostTooOften { .. } => Errno::ENOTRECOVERABLE,
            Self::NoMemory(why) => (*why).into(),
            Self::Lost { reason, .. } => match reason {
                LostReason::ClosedByServer | LostReason::HungUp { .. } => Errno::ECONNRESET,
                LostReason::ClosedHere | LostReason::ShuttingDown => Errno::ESHUTDOWN,
                LostReason::Transport(errno) => *errno,
                LostReason::TimedOut | LostReason::GivenUp { .. } => Errno::ETIMEDOUT,
                LostReason::Protocol(_) | LostReason::UnknownCookie { .. } => Errno::EPROTO,
            },
            Self::Refused { errno, .. } => errno.errno(),
            Self::NotSent { reason, .. } => match reason {
                NotSentReason::NotOffered => Errno::EOPNOTSUPP,
                NotSentReason::ReadOnly => Errno::EROFS,
                NotSentReason::OutOfRange { .. } | NotSentReason::Unaligned { .. } => Errno::EINVAL,
                NotSentReason::TooLong { .. } => Errno::EOVERFLOW,
            },
        }
    }

    /// Whether the server broke the protocol.
    pub fn is_broken_protocol(&self) -> bool {
        match self {
            Self::Lost { reason, .. } => {
                matches!(reason, LostReason::Protocol(_) | LostReason::UnknownCookie { .. })
            }
            Self::Handshake { reason, .. } => !matches!(reason, ProtocolError::Refused { .. }),
            _ => false,
        }
    }

    /// Whether the server has answered, and its answer will be the same when it is asked again: there is no such export, TLS
    /// comes first, a policy forbids it. A server that shuts down, or whom nobody reaches, may be another one in a moment.
    pub fn is_definite(&self) -> bool {
        match self {
            Self::Handshake { reason: ProtocolError::Refused { reply, .. }, .. } => {
                *reply != ReplyCode::ErrShutdown
            }
            Self::Handshake { .. } | Self::ChangedExport { .. } => true,
            Self::Resolve { is_final, .. } => *is_final,
            other => other.is_broken_protocol(),
        }
    }

    /// Whether the server did not answer in time.
    pub fn is_timed_out(&self) -> bool {
        matches!(self, Self::Lost { reason: LostReason::TimedOut, .. })
    }

    /// Whether the request was given up on this side because the server is silent: it may still be carried out.
    pub fn is_given_up(&self) -> bool {
        matches!(self, Self::Lost { reason: LostReason::GivenUp { .. }, .. })
    }

    /// Whether the server itself said that it goes: what was asked is for whoever comes after it.
    pub fn is_shutting_down(&self) -> bool {
        match self {
            Self::Lost { reason, .. } => *reason == LostReason::ShuttingDown,
            Self::Handshake { reason: ProtocolError::Refused { reply, .. }, .. } => {
                *reply == ReplyCode::ErrShutdown
            }
            _ => false,
        }
    }

    /// Whether the connection is over.
    pub fn is_lost(&self) -> bool {
        matches!(self, Self::Lost { .. })
    }
}
