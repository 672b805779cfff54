//! The one error type of the crate and the only mapping from errors to errno.
//!
//! Expected absence is a value, never an error. An errno that the rules of a filesystem demand
//! (`EEXIST`, `ENOTEMPTY`, ...) is [`Error::Refused`]; one that a system call returned is
//! [`Error::Sys`] and carries the call and the place, so that a message can name both.

use std::borrow::Cow;
use std::fmt;

pub use rustix::io::Errno;

/// Result of every fallible operation of the crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong, where, and in which system call.
#[derive(Debug, Clone)]
pub enum Error {
    /// The rules of the filesystem say no; the caller's mistake, not a fault.
    Refused(Errno),
    /// A system call failed.
    Sys {
        /// Name of the call as in its man page, such as `renameat2`.
        op: &'static str,
        /// What it was done to: a layer and a name, or a path.
        at: Cow<'static, str>,
        /// What it returned.
        errno: Errno,
    },
    /// A layer or store holds what no writer of the format produces.
    Corrupt {
        /// What is wrong.
        what: Cow<'static, str>,
        /// Where it lies.
        at: Cow<'static, str>,
    },
    /// The machine, kernel or backing filesystem lacks something.
    Unsupported {
        /// The missing feature, and what to do about it.
        feature: Cow<'static, str>,
    },
    /// An argument or mount option cannot be used.
    Invalid {
        /// The option or argument as the user wrote it.
        arg: Cow<'static, str>,
        /// Why not, and what would do.
        why: Cow<'static, str>,
    },
    /// The store has no layer of that name.
    NoSuchLayer {
        /// What was asked for.
        id: Cow<'static, str>,
    },
    /// The store has a layer of that name already.
    LayerExists {
        /// What was to be made.
        id: Cow<'static, str>,
    },
    /// Something is in use by another live mount or process.
    Busy {
        /// What is in use, by whom as far as known, and the cure.
        what: Cow<'static, str>,
    },
}

impl Error {
    /// Returns the error of system call `op` on `at`.
    pub fn sys(op: &'static str, at: impl Into<Cow<'static, str>>, errno: Errno) -> Self {
        Self::Sys { op, at: at.into(), errno }
    }

    /// Returns the error for an option or argument that cannot be used.
    pub fn invalid(arg: impl Into<Cow<'static, str>>, why: impl Into<Cow<'static, str>>) -> Self {
        Self::Invalid { arg: arg.into(), why: why.into() }
    }

    /// Returns the number that a filesystem request is answered with.
    ///
    /// `Corrupt` is `EIO`, `Unsupported` is `EOPNOTSUPP`; errnos of system calls pass unchanged.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Refused(errno) | Self::Sys { errno, .. } => *errno,
            Self::Corrupt { .. } => Errno::IO,
            Self::Unsupported { .. } => Errno::OPNOTSUPP,
            Self::Invalid { .. } => Errno::INVAL,
            Self::NoSuchLayer { .. } => Errno::NOENT,
            Self::LayerExists { .. } => Errno::EXIST,
            Self::Busy { .. } => Errno::BUSY,
        }
    }
}

impl From<Errno> for Error {
    fn from(errno: Errno) -> Self {
        Self::Refused(errno)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(errno) => write!(f, "{}", text(*errno)),
            Self::Sys { op, at, errno } => write!(f, "{op} {at}: {}", text(*errno)),
            Self::Corrupt { what, at } => write!(f, "{at}: {what}"),
            Self::Unsupported { feature } => write!(f, "{feature}"),
            Self::Invalid { arg, why } => write!(f, "{arg}: {why}"),
            Self::NoSuchLayer { id } => {
                write!(f, "{id}: no such layer; lamina store list shows those there are")
            }
            Self::LayerExists { id } => write!(f, "{id}: this layer exists; choose another name"),
            Self::Busy { what } => write!(f, "{what}"),
        }
    }
}

impl std::error::Error for Error {}

/// Returns the C library's sentence for an errno, without the number.
fn text(errno: Errno) -> String {
    let full = std::io::Error::from_raw_os_error(errno.raw_os_error()).to_string();
    match full.find(" (os error") {
        Some(end) => full.get(..end).unwrap_or(&full).to_owned(),
        None => full,
    }
}

/// Adds the system call and the place to a bare errno.
pub trait Context<T> {
    /// Turns an errno into [`Error::Sys`]; `at` is only called when there is one.
    ///
    /// # Errors
    /// The same failure, named.
    fn at<A: Into<Cow<'static, str>>>(self, op: &'static str, at: impl FnOnce() -> A) -> Result<T>;
}

impl<T> Context<T> for std::result::Result<T, Errno> {
    fn at<A: Into<Cow<'static, str>>>(self, op: &'static str, at: impl FnOnce() -> A) -> Result<T> {
        self.map_err(|errno| Error::sys(op, at(), errno))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_names_call_place_and_cause() {
        let error = Error::sys("renameat2", "in work", Errno::NOSPC);
        assert_eq!(error.to_string(), "renameat2 in work: No space left on device");
        assert_eq!(error.errno(), Errno::NOSPC);
    }
}
