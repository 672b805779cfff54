//! Extended attributes, and the flags of chattr(1).

use super::{Answer, Dispatcher};
use crate::error::{Errno, Result};
use crate::union::{NodeId, Writer, XattrFlags};

/// An extended attribute, or list of names, as the caller asked for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) enum XattrAnswer {
    /// The caller asked for the length, in bytes.
    Size(u32),
    /// The bytes; they fit.
    Data(Vec<u8>),
}

/// Attributes of a file as `FS_IOC_GETFLAGS` and its kin number them in the common layout of
/// ioctl numbers; the `32` ones are what a 32-bit process sends.
mod ioctl {
    pub(super) const GETFLAGS: u32 = 0x8008_6601;
    pub(super) const SETFLAGS: u32 = 0x4008_6602;
    pub(super) const GETFLAGS_32: u32 = 0x8004_6601;
    pub(super) const SETFLAGS_32: u32 = 0x4004_6602;
    pub(super) const FSGETXATTR: u32 = 0x801c_581f;
    pub(super) const FSSETXATTR: u32 = 0x401c_5820;
}

impl Dispatcher {
    /// Refuses, for good, what extended attributes are asked for where none are served.
    ///
    /// # Errors
    /// `ENOSYS`; the kernel says `EOPNOTSUPP` by itself from then on.
    fn serves_xattrs(&self) -> Answer<()> {
        if self.xattrs { Ok(()) } else { Err(Errno::NOSYS) }
    }

    /// Returns an extended attribute, or its length if `size` is 0.
    ///
    /// An access list that the backing filesystem cannot have is absent, not unsupported: the
    /// kernel asks while it checks permissions, and takes any failure but absence for a refusal.
    ///
    /// # Errors
    /// `ENODATA` if there is none; `ERANGE` if it does not fit.
    pub(in super::super) fn getxattr(
        &self,
        node: NodeId,
        name: &[u8],
        size: u32,
    ) -> Answer<XattrAnswer> {
        self.serves_xattrs()?;
        self.run("getxattr", node, name, || {
            let value = match self.union.getxattr(node, name) {
                Err(error)
                    if error.errno() == Errno::OPNOTSUPP
                        && name.starts_with(b"system.posix_acl_") =>
                {
                    None
                }
                other => other?,
            };
            fit(value.ok_or(Errno::NODATA)?, size)
        })
    }

    /// Returns the names of all extended attributes, or the length of the list if `size` is 0.
    ///
    /// # Errors
    /// `ERANGE` if it does not fit.
    pub(in super::super) fn listxattr(&self, node: NodeId, size: u32) -> Answer<XattrAnswer> {
        self.serves_xattrs()?;
        self.run("listxattr", node, b"", || fit(self.union.listxattr(node)?, size))
    }

    /// Sets an extended attribute, as setxattr(2) with `flags`. An access ACL set by somebody
    /// `unprivileged` of another group takes setgid away.
    pub(in super::super) fn setxattr(
        &self,
        node: NodeId,
        name: &[u8],
        value: &[u8],
        flags: XattrFlags,
        unprivileged: Option<Writer>,
    ) -> Answer<()> {
        self.serves_xattrs()?;
        self.run("setxattr", node, name, || {
            self.union.setxattr(node, name, value, flags)?;
            self.drop_foreign_setgid(node, name, unprivileged)
        })
    }

    /// Removes an extended attribute. An access ACL takes setgid with it as when it is set: not every
    /// filesystem does that, the kernel's overlay does.
    pub(in super::super) fn removexattr(
        &self,
        node: NodeId,
        name: &[u8],
        unprivileged: Option<Writer>,
    ) -> Answer<()> {
        self.serves_xattrs()?;
        self.run("removexattr", node, name, || {
            self.union.removexattr(node, name)?;
            self.drop_foreign_setgid(node, name, unprivileged)
        })
    }

    fn drop_foreign_setgid(
        &self,
        node: NodeId,
        name: &[u8],
        unprivileged: Option<Writer>,
    ) -> Result<()> {
        match unprivileged {
            // Nobody's permissions are in a default ACL.
            Some(writer) if name == b"system.posix_acl_access" => {
                self.union.drop_foreign_setgid(node, writer)
            }
            _ => Ok(()),
        }
    }

    /// Gets or sets the flags of chattr(1), and returns `out_size` bytes of result.
    ///
    /// # Errors
    /// `ENOTTY` for every other command; `EINVAL` for sizes that do not match the command.
    pub(in super::super) fn ioctl(
        &self,
        node: NodeId,
        command: u32,
        input: &[u8],
        out_size: usize,
    ) -> Answer<Vec<u8>> {
        self.run("ioctl", node, b"", || match command {
            ioctl::GETFLAGS | ioctl::GETFLAGS_32 => {
                let flags = self.union.get_flags(node)?;
                // The number says `long`, but the kernel passes an `int` on.
                match out_size {
                    4 => Ok(flags.to_ne_bytes().to_vec()),
                    8 => Ok(u64::from(flags).to_ne_bytes().to_vec()),
                    _ => Err(Errno::INVAL.into()),
                }
            }
            ioctl::SETFLAGS | ioctl::SETFLAGS_32 => {
                let flags = match (<[u8; 4]>::try_from(input), <[u8; 8]>::try_from(input)) {
                    (Ok(int), _) => u32::from_ne_bytes(int),
                    (_, Ok(long)) => u32::try_from(u64::from_ne_bytes(long))
                        .map_err(|_unknown_flags| Errno::OPNOTSUPP)?,
                    _ => return Err(Errno::INVAL.into()),
                };
                self.union.set_flags(node, flags).map(|()| Vec::new())
            }
            ioctl::FSGETXATTR => {
                let raw = self.union.get_fsxattr(node)?;
                if out_size == raw.len() { Ok(raw.to_vec()) } else { Err(Errno::INVAL.into()) }
            }
            ioctl::FSSETXATTR => {
                let Ok(raw) = <&[u8; 28]>::try_from(input) else {
                    return Err(Errno::INVAL.into());
                };
                self.union.set_fsxattr(node, raw).map(|()| Vec::new())
            }
            _ => Err(Errno::NOTTY.into()),
        })
    }
}

/// Returns `value` or its length, as a caller with room for `size` bytes wants it.
fn fit(value: Vec<u8>, size: u32) -> Result<XattrAnswer> {
    let Ok(len) = u32::try_from(value.len()) else {
        return Err(Errno::TOOBIG.into());
    };
    match size {
        0 => Ok(XattrAnswer::Size(len)),
        room if len <= room => Ok(XattrAnswer::Data(value)),
        _ => Err(Errno::RANGE.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xattr_answers_fit_or_refuse() {
        let value = || b"12345".to_vec();
        for (size, expected) in [
            (0, Ok(XattrAnswer::Size(5))),
            (4, Err(Errno::RANGE)),
            (5, Ok(XattrAnswer::Data(value()))),
            (6, Ok(XattrAnswer::Data(value()))),
        ] {
            assert_eq!(fit(value(), size).map_err(|error| error.errno()), expected, "{size}");
        }
        assert!(matches!(fit(Vec::new(), 0), Ok(XattrAnswer::Size(0))));
    }
}
