//! Error numbers as the backend reports them, with the text that a person reads.

use std::fmt;

/// An `errno` value. The simulator uses the same numbers as the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

macro_rules! errnos {
    ($($name:ident),* $(,)?) => {
        impl Errno {
            $(#[doc = stringify!($name)] pub const $name: Errno = Errno(libc::$name);)*

            /// The symbolic name, such as `ENOSPC`, where it is a known one.
            pub fn name(self) -> Option<&'static str> {
                $(if self.0 == libc::$name { return Some(stringify!($name)); })*
                None
            }
        }
    };
}

errnos!(
    EPERM,
    ENOENT,
    EINTR,
    EIO,
    ENXIO,
    EBADF,
    EBADFD,
    EAGAIN,
    ENOMEM,
    EACCES,
    EFAULT,
    EBUSY,
    EEXIST,
    EXDEV,
    ENODEV,
    ENOTDIR,
    EISDIR,
    EINVAL,
    EMFILE,
    EFBIG,
    ENOSPC,
    ESPIPE,
    EROFS,
    EPIPE,
    ERANGE,
    ENODATA,
    EPROTO,
    EOVERFLOW,
    EOPNOTSUPP,
    EADDRINUSE,
    ECONNRESET,
    ECONNREFUSED,
    ENOTCONN,
    ETIMEDOUT,
    ECANCELED,
    EDQUOT,
    ENOSYS,
    EADDRNOTAVAIL,
    ECONNABORTED,
    ESHUTDOWN,
    ESTALE,
    ENOTTY,
    ELOOP,
    ENAMETOOLONG,
    ENOTRECOVERABLE
);

impl Errno {
    /// The error of an I/O call; errors without a number become `EIO`.
    pub fn from_io(error: &std::io::Error) -> Errno {
        Errno(error.raw_os_error().unwrap_or(libc::EIO))
    }

    /// No space is left: on the device, or in the quota.
    pub fn is_no_space(self) -> bool {
        self == Errno::ENOSPC || self == Errno::EDQUOT
    }

    /// The other side or the layer below does not know this operation.
    pub fn is_unsupported(self) -> bool {
        self == Errno::EOPNOTSUPP || self == Errno::ENOSYS || self == Errno::ENODEV || self == Errno::ENOTTY
    }
}

impl From<rustix::io::Errno> for Errno {
    fn from(errno: rustix::io::Errno) -> Errno {
        Errno(errno.raw_os_error())
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = std::io::Error::from_raw_os_error(self.0).to_string();
        // The standard library appends " (os error N)".
        let text = text.split(" (os error").next().unwrap_or(&text);
        f.write_str(text)
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "Errno({})", self.0),
        }
    }
}

impl std::error::Error for Errno {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_has_no_number() {
        assert_eq!(Errno::ENOSPC.to_string(), "No space left on device");
        assert_eq!(format!("{:?}", Errno::EIO), "EIO");
        assert!(Errno::EDQUOT.is_no_space() && !Errno::EIO.is_no_space());
    }
}
