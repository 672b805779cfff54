//! Extended attributes of an object given by handle or by (directory, name).

use std::os::fd::BorrowedFd;

use rustix::fs::XattrFlags;
use rustix::io::{Errno, retry_on_intr};

use super::name::At;
use super::open::FdPath;

/// An object whose xattrs are meant. Symlinks are never followed.
#[derive(Debug, Clone, Copy)]
pub enum Target<'a> {
    /// Behind a descriptor open for I/O.
    Open(BorrowedFd<'a>),
    /// Behind an `O_PATH` descriptor.
    Handle(BorrowedFd<'a>),
    /// A directory behind a descriptor as [`super::open::directory`] gives one: nearly always open
    /// for reading, which spares a walk through `/proc`.
    Directory(BorrowedFd<'a>),
    /// A name in a directory.
    Name(At<'a>),
}

/// The xattr that holds the capabilities of a program.
pub const CAPABILITY: &[u8] = b"security.capability";

/// The kernel's bounds (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`), in bytes.
const SIZE_MAX: usize = 64 * 1024;

/// Returns a value; `None` if there is none or the filesystem has no such xattrs.
///
/// # Errors
/// Those of getxattr(2) but `ENODATA` and `EOPNOTSUPP`.
pub fn get(target: Target<'_>, name: &[u8]) -> Result<Option<Vec<u8>>, Errno> {
    match read(|buffer| get_into(target, name, buffer)) {
        Ok(value) => Ok(Some(value)),
        Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// Returns the names, each with a NUL; empty where the filesystem has no xattrs.
///
/// # Errors
/// Those of listxattr(2) but `EOPNOTSUPP`.
pub fn list(target: Target<'_>) -> Result<Vec<u8>, Errno> {
    match read(|buffer| list_into(target, buffer)) {
        Err(Errno::OPNOTSUPP) => Ok(Vec::new()),
        listed => listed,
    }
}

/// Sets a value.
///
/// # Errors
/// Those of setxattr(2).
pub fn set(target: Target<'_>, name: &[u8], value: &[u8], flags: XattrFlags) -> Result<(), Errno> {
    retry_on_intr(|| match target {
        Target::Open(fd) => rustix::fs::fsetxattr(fd, name, value, flags),
        Target::Handle(fd) | Target::Directory(fd) => {
            rustix::fs::setxattr(FdPath::of(fd).bytes(), name, value, flags)
        }
        Target::Name(at) => {
            rustix::fs::lsetxattr(FdPath::beneath(at.dir, at.name).bytes(), name, value, flags)
        }
    })
}

/// Removes a value.
///
/// # Errors
/// Those of removexattr(2).
pub fn remove(target: Target<'_>, name: &[u8]) -> Result<(), Errno> {
    retry_on_intr(|| match target {
        Target::Open(fd) => rustix::fs::fremovexattr(fd, name),
        Target::Handle(fd) | Target::Directory(fd) => {
            rustix::fs::removexattr(FdPath::of(fd).bytes(), name)
        }
        Target::Name(at) => {
            rustix::fs::lremovexattr(FdPath::beneath(at.dir, at.name).bytes(), name)
        }
    })
}

fn get_into(target: Target<'_>, name: &[u8], buffer: &mut [u8]) -> Result<usize, Errno> {
    retry_on_intr(|| match target {
        Target::Open(fd) => rustix::fs::fgetxattr(fd, name, &mut *buffer),
        Target::Handle(fd) => rustix::fs::getxattr(FdPath::of(fd).bytes(), name, &mut *buffer),
        Target::Directory(fd) => match rustix::fs::fgetxattr(fd, name, &mut *buffer) {
            Err(Errno::BADF) => rustix::fs::getxattr(FdPath::of(fd).bytes(), name, &mut *buffer),
            done => done,
        },
        Target::Name(at) => {
            rustix::fs::lgetxattr(FdPath::beneath(at.dir, at.name).bytes(), name, &mut *buffer)
        }
    })
}

fn list_into(target: Target<'_>, buffer: &mut [u8]) -> Result<usize, Errno> {
    retry_on_intr(|| match target {
        Target::Open(fd) => rustix::fs::flistxattr(fd, &mut *buffer),
        Target::Handle(fd) => rustix::fs::listxattr(FdPath::of(fd).bytes(), &mut *buffer),
        Target::Directory(fd) => match rustix::fs::flistxattr(fd, &mut *buffer) {
            Err(Errno::BADF) => rustix::fs::listxattr(FdPath::of(fd).bytes(), &mut *buffer),
            done => done,
        },
        Target::Name(at) => {
            rustix::fs::llistxattr(FdPath::beneath(at.dir, at.name).bytes(), &mut *buffer)
        }
    })
}

/// Reads with a small buffer first, then with the largest that the kernel ever fills.
fn read(mut call: impl FnMut(&mut [u8]) -> Result<usize, Errno>) -> Result<Vec<u8>, Errno> {
    let mut small = [0; 256];
    match call(&mut small) {
        Ok(len) => Ok(small.get(..len).unwrap_or_default().to_vec()),
        Err(Errno::RANGE) => {
            let mut large = vec![0; SIZE_MAX];
            let len = call(&mut large)?;
            large.truncate(len);
            Ok(large)
        }
        Err(errno) => Err(errno),
    }
}
