//! The error of this seam: what failed, where, with which number.

use std::rc::Rc;

use blockferry_ring::{Errno, File, LockRange};

use crate::base::secret::without_secrets;

/// What was being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Opening an image.
    Open,
    /// Creating an image.
    Create,
    /// Taking its locks.
    Lock,
    /// Reading.
    Read,
    /// Writing.
    Write,
    /// Flushing.
    Flush,
    /// Discarding.
    Discard,
    /// Writing zeroes.
    WriteZeroes,
    /// Asking for holes and data.
    BlockStatus,
    /// Changing the length.
    Resize,
    /// Looking whether it still is where it was.
    Find,
}

impl Operation {
    /// Whether it changes the image (counts as a write for error policies).
    pub fn is_write(self) -> bool {
        !matches!(self, Operation::Open | Operation::Read | Operation::BlockStatus | Operation::Find)
    }

    fn verb(self) -> &'static str {
        match self {
            Operation::Open => "Opening",
            Operation::Create => "Creating",
            Operation::Lock => "Locking",
            Operation::Read => "Reading",
            Operation::Write => "Writing",
            Operation::Flush => "Flushing",
            Operation::Discard => "Discarding in",
            Operation::WriteZeroes => "Writing zeroes to",
            Operation::BlockStatus => "Asking for the allocation of",
            Operation::Resize => "Resizing",
            Operation::Find => "Finding",
        }
    }
}

/// A failed request or open.
#[derive(Clone, Debug, thiserror::Error)]
pub struct BlockError {
    /// What was being done.
    pub operation: Operation,
    /// The image, as a person calls it.
    pub name: Rc<str>,
    /// Where in it, and how much: (offset, bytes).
    pub place: Option<(u64, u64)>,
    /// The number.
    pub errno: Errno,
    /// What to know or to do about it, if there is something.
    pub hint: Option<Rc<str>>,
    /// The hint says all of it: nothing but this program has refused it, or the hint names what the number stands for.
    pub is_told: bool,
    /// A lock stands in the way that no process is seen to hold: whoever had it was killed, perhaps, and the kernel is
    /// about to end what it had in flight.
    pub is_orphaned: bool,
    /// A lock stands in the way, and who holds it has yet to be asked.
    pub conflict: Option<Box<LockConflict>>,
}

/// A lock that somebody else holds.
#[derive(Clone, Debug)]
pub struct LockConflict {
    /// On this file.
    pub file: File,
    /// There.
    pub range: LockRange,
    /// What it denies, in words.
    pub what: String,
    /// The option by which the user could do without locks.
    pub without: Option<&'static str>,
}

impl std::fmt::Display for BlockError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} '{}'", self.operation.verb(), without_secrets(&self.name))?;
        if let Some((offset, len)) = self.place {
            write!(f, " at offset {offset} ({len} bytes)")?;
        }
        match &self.hint {
            // The number stands for a refusal of our own, or for a lock: the words behind it say what it means.
            Some(hint) if self.is_told_by_hint() => write!(f, " failed: {}", without_secrets(hint)),
            Some(hint) => write!(f, " failed: {}. {}", self.errno, without_secrets(hint)),
            None => write!(f, " failed: {}", self.errno),
        }
    }
}

impl BlockError {
    /// Whether nobody has said that the change was not made: its server was lost, or hung and was given up, and may still
    /// make it, after newer ones.
    pub fn may_land_late(&self) -> bool {
        let unanswered = [
            Errno::ETIMEDOUT,
            Errno::ECONNRESET,
            Errno::ECONNREFUSED,
            Errno::ESHUTDOWN,
            Errno::ENOTCONN,
            Errno::EPIPE,
            Errno::EPROTO,
            Errno::ENOTRECOVERABLE,
        ];
        unanswered.contains(&self.errno)
    }

    /// Whether the hint says all that the words of the number would.
    fn is_told_by_hint(&self) -> bool {
        self.is_told
            || self.errno == Errno::EINVAL
            || self.operation == Operation::Lock && self.errno == Errno::EBUSY
    }

    /// An error of a whole image.
    pub fn new(operation: Operation, name: impl Into<Rc<str>>, errno: Errno) -> BlockError {
        BlockError {
            operation,
            name: name.into(),
            place: None,
            errno,
            hint: None,
            is_told: false,
            is_orphaned: false,
            conflict: None,
        }
    }

    /// An error at a place.
    pub fn at(
        operation: Operation,
        name: impl Into<Rc<str>>,
        offset: u64,
        len: u64,
        errno: Errno,
    ) -> BlockError {
        BlockError { place: Some((offset, len)), ..BlockError::new(operation, name, errno) }
    }

    /// Adds what to know or to do about it.
    pub fn hint(mut self, hint: impl Into<Rc<str>>) -> BlockError {
        self.hint = Some(hint.into());
        self
    }

    /// Says all of it, where the words of the number would mislead or say it twice: a refusal of our own, above all.
    pub fn because(mut self, why: impl Into<Rc<str>>) -> BlockError {
        self.is_told = true;
        self.hint(why)
    }

    /// Why it is refused, if that is a refusal of our own.
    pub fn refusal(&self) -> Option<&str> {
        self.hint.as_deref().filter(|_| self.is_told || self.errno == Errno::EINVAL)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_path_offset_and_cure() {
        let error = BlockError::at(Operation::Write, "/a.img", 4096, 512, Errno::ENOSPC).hint("Make room.");
        assert_eq!(
            error.to_string(),
            "Writing '/a.img' at offset 4096 (512 bytes) failed: No space left on device. Make room."
        );
        let error = BlockError::new(Operation::Open, "x", Errno::EINVAL).hint("It is none.");
        assert_eq!(error.to_string(), "Opening 'x' failed: It is none.");
        // Who reads "Operation not permitted" changes permissions.
        let error = BlockError::new(Operation::Open, "x", Errno::EPERM).because("It is no whole disk.");
        assert_eq!(error.to_string(), "Opening 'x' failed: It is no whole disk.");
        let error =
            BlockError::new(Operation::Open, "ftp://u:sesame@h/x", Errno::EINVAL).hint("x://u:sesame@h/ ?");
        assert!(!error.to_string().contains("sesame"), "{error}");
    }
}
