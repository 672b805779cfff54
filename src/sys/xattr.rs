//! Extended attributes of an object given by handle or by (directory, name).
#![allow(unsafe_code, reason = "getxattrat and listxattrat have no wrapper")]

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use libc::{c_long, c_uint};
use rustix::fs::XattrFlags;
use rustix::io::{Errno, retry_on_intr};
use rustix::path::Arg;

use super::last_errno;
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
        Target::Name(at) => match get_at(at, name, &mut *buffer) {
            Err(Errno::NOSYS | Errno::PERM) => {
                rustix::fs::lgetxattr(FdPath::beneath(at.dir, at.name).bytes(), name, &mut *buffer)
            }
            done => done,
        },
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
        Target::Name(at) => match list_at(at, &mut *buffer) {
            Err(Errno::NOSYS | Errno::PERM) => {
                rustix::fs::llistxattr(FdPath::beneath(at.dir, at.name).bytes(), &mut *buffer)
            }
            done => done,
        },
    })
}

/// Numbers of the calls that need no walk through `/proc`, which takes twice the time of the call itself (Linux 6.13).
const GETXATTRAT: c_long = 464;
const LISTXATTRAT: c_long = 465;
/// These have the numbers; others count from elsewhere and go through `/proc`.
const HAS_NUMBERS: bool = cfg!(all(
    any(
        target_arch = "x86_64",
        target_arch = "aarch64",
        target_arch = "riscv64",
        target_arch = "loongarch64",
        target_arch = "powerpc64",
        target_arch = "s390x",
    ),
    target_pointer_width = "64"
));

/// The kernel has said that it has them not.
static ABSENT: AtomicBool = AtomicBool::new(!HAS_NUMBERS);

/// `struct xattr_args` of linux/xattr.h.
#[repr(C, align(8))]
struct Arguments {
    value: u64,
    size: u32,
    flags: u32,
}

/// lgetxattr(2) of a name in a directory.
///
/// # Errors
/// Those of the call; `ENOSYS` where there is none, and `EPERM` also where a filter keeps it from us.
fn get_at(at: At<'_>, name: &[u8], buffer: &mut [u8]) -> Result<usize, Errno> {
    let size = u32::try_from(buffer.len()).unwrap_or(u32::MAX);
    let value = buffer.as_mut_ptr().expose_provenance() as u64;
    let mut arguments = Arguments { value, size, flags: 0 };
    at.name.into_with_c_str(|path| {
        name.into_with_c_str(|name| {
            // SAFETY: both names end with a NUL; the call reads `arguments`, which has the size given, and writes
            // at most `size` bytes to `buffer`, which has that many.
            unless_absent(|| unsafe {
                libc::syscall(
                    GETXATTRAT,
                    at.dir.as_raw_fd(),
                    path.as_ptr(),
                    NOFOLLOW,
                    name.as_ptr(),
                    &raw mut arguments,
                    size_of::<Arguments>(),
                )
            })
        })
    })
}

/// llistxattr(2) of a name in a directory.
///
/// # Errors
/// As [`get_at`].
fn list_at(at: At<'_>, buffer: &mut [u8]) -> Result<usize, Errno> {
    at.name.into_with_c_str(|path| {
        // SAFETY: the name ends with a NUL; the call writes at most as many bytes to `buffer` as it has.
        unless_absent(|| unsafe {
            libc::syscall(
                LISTXATTRAT,
                at.dir.as_raw_fd(),
                path.as_ptr(),
                NOFOLLOW,
                buffer.as_mut_ptr(),
                buffer.len(),
            )
        })
    })
}

const NOFOLLOW: c_uint = libc::AT_SYMLINK_NOFOLLOW.cast_unsigned();

/// Makes a call that older kernels do not have.
fn unless_absent(call: impl FnOnce() -> c_long) -> Result<usize, Errno> {
    if ABSENT.load(Ordering::Relaxed) {
        return Err(Errno::NOSYS);
    }
    if let Ok(done) = usize::try_from(call()) {
        return Ok(done);
    }
    let errno = last_errno();
    if errno == Errno::NOSYS {
        ABSENT.store(true, Ordering::Relaxed);
    }
    Err(errno)
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

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    /// What `call` says when the kernel has the calls of a name, and when it has not.
    fn both<T: PartialEq + std::fmt::Debug>(call: impl Fn() -> T) -> T {
        let said = call();
        let was = ABSENT.swap(true, Ordering::Relaxed);
        assert_eq!(call(), said);
        ABSENT.store(was, Ordering::Relaxed);
        said
    }

    #[test]
    fn a_name_has_the_same_xattrs_with_and_without_proc() {
        let place = tempfile::tempdir_in("/var/tmp").unwrap();
        let dir = std::fs::File::open(place.path()).unwrap();
        let at = |name| At::new(dir.as_fd(), name);
        drop(crate::sys::open::create(dir.as_fd(), b"file", 0o600).unwrap());
        crate::sys::name::symlink(b"file", at(b"link")).unwrap();
        let named = |name| Target::Name(at(name));
        let long = [7; 1000];
        set(named(b"file"), b"user.long", &long, XattrFlags::empty()).unwrap();
        assert_eq!(both(|| get(named(b"file"), b"user.long")), Ok(Some(long.to_vec())));
        assert_eq!(both(|| get(named(b"file"), b"user.none")), Ok(None));
        let lists = |names: &[u8]| names.split(|byte| *byte == 0).any(|name| name == b"user.long");
        assert!(lists(&both(|| list(named(b"file")).unwrap())));
        assert!(!lists(&both(|| list(named(b"link")).unwrap())));
        assert_eq!(both(|| list(named(b"absent"))), Err(Errno::NOENT));
    }
}
