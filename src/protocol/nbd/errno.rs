//! Why a request failed, in the eight values that NBD allows on the wire.
//!
//! The wire values look like Linux error numbers but are the protocol's own; both directions map by name. What the
//! protocol has no word for becomes `Invalid` when it is read (as the document asks) and `Io` when it is written.

use blockferry_ring::Errno;

/// An error value of a reply (`NBD_E*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NbdErrno {
    /// The export is read-only, or the server forbids the operation.
    #[error("the operation is not permitted")]
    NotPermitted,
    /// The device failed.
    #[error("an input/output error occurred")]
    Io,
    /// The server lacks memory.
    #[error("the server is out of memory")]
    NoMemory,
    /// The request makes no sense: flags, alignment, range.
    #[error("the request is not valid")]
    Invalid,
    /// There is no room for the data.
    #[error("no space is left on the device")]
    NoSpace,
    /// The request is too long to be served whole.
    #[error("the request is too large")]
    Overflow,
    /// Fast zeroing was asked for and cannot be had.
    #[error("the operation is not supported")]
    NotSupported,
    /// The server is shutting down.
    #[error("the server is shutting down")]
    Shutdown,
}

impl NbdErrno {
    /// The error in the field of a reply; `None` is success. A value outside the protocol counts as `Invalid`.
    pub const fn from_wire(value: u32) -> Option<Self> {
        Some(match value {
            0 => return None,
            1 => Self::NotPermitted,
            5 => Self::Io,
            12 => Self::NoMemory,
            28 => Self::NoSpace,
            75 => Self::Overflow,
            95 => Self::NotSupported,
            108 => Self::Shutdown,
            _ => Self::Invalid,
        })
    }

    /// The value on the wire, never 0.
    pub const fn to_wire(self) -> u32 {
        match self {
            Self::NotPermitted => 1,
            Self::Io => 5,
            Self::NoMemory => 12,
            Self::Invalid => 22,
            Self::NoSpace => 28,
            Self::Overflow => 75,
            Self::NotSupported => 95,
            Self::Shutdown => 108,
        }
    }

    /// What to tell a client when the system said `errno`.
    pub fn from_errno(errno: Errno) -> Self {
        match errno {
            Errno::EPERM | Errno::EACCES | Errno::EROFS => Self::NotPermitted,
            Errno::ENOMEM => Self::NoMemory,
            Errno::EINVAL => Self::Invalid,
            Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG => Self::NoSpace,
            Errno::EOVERFLOW => Self::Overflow,
            Errno::EOPNOTSUPP => Self::NotSupported,
            Errno::ESHUTDOWN => Self::Shutdown,
            _ => Self::Io,
        }
    }

    /// The system's number for this error.
    pub const fn errno(self) -> Errno {
        match self {
            Self::NotPermitted => Errno::EPERM,
            Self::Io => Errno::EIO,
            Self::NoMemory => Errno::ENOMEM,
            Self::Invalid => Errno::EINVAL,
            Self::NoSpace => Errno::ENOSPC,
            Self::Overflow => Errno::EOVERFLOW,
            Self::NotSupported => Errno::EOPNOTSUPP,
            Self::Shutdown => Errno::ESHUTDOWN,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [NbdErrno; 8] = [
        NbdErrno::NotPermitted,
        NbdErrno::Io,
        NbdErrno::NoMemory,
        NbdErrno::Invalid,
        NbdErrno::NoSpace,
        NbdErrno::Overflow,
        NbdErrno::NotSupported,
        NbdErrno::Shutdown,
    ];

    #[test]
    fn every_value_survives_both_round_trips() {
        for error in ALL {
            assert_eq!(NbdErrno::from_wire(error.to_wire()), Some(error));
            assert_eq!(NbdErrno::from_errno(error.errno()), error);
        }
    }

    #[test]
    fn what_the_protocol_cannot_say_is_rounded() {
        assert_eq!(NbdErrno::from_wire(0), None);
        assert_eq!(NbdErrno::from_wire(4711), Some(NbdErrno::Invalid));
        assert_eq!(NbdErrno::from_errno(Errno::EDQUOT), NbdErrno::NoSpace);
        assert_eq!(NbdErrno::from_errno(Errno::EFBIG), NbdErrno::NoSpace);
        assert_eq!(NbdErrno::from_errno(Errno::ETIMEDOUT), NbdErrno::Io);
    }
}
