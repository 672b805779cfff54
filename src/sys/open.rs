//! Opening directories and files beneath a directory handle, and reopening a handle.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::{Errno, retry_on_intr};

/// Flags of every open: never inherited, never a terminal.
const ALWAYS: OFlags = OFlags::CLOEXEC.union(OFlags::NOCTTY);

/// Opens directory `name` in `dir` for listing, or as a bare handle where reading is not allowed.
///
/// What is mounted on it is not entered: that could be the mount which the caller serves, and a
/// server that waits for itself waits for ever.
///
/// # Errors
/// `ENOENT`, `ENOTDIR` (also for a symlink), `EXDEV` for a mountpoint, and whatever else openat2(2)
/// reports.
pub fn directory(dir: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::CLOEXEC | OFlags::DIRECTORY | OFlags::NOFOLLOW;
    let open = |flags| {
        let within = ResolveFlags::NO_XDEV;
        match retry_on_intr(|| rustix::fs::openat2(dir, name, flags, Mode::empty(), within)) {
            // Before Linux 5.6, or kept from us by a filter that does not know the call; EINVAL where
            // the wrapper adds a flag that does not go with O_PATH.
            Err(Errno::NOSYS | Errno::INVAL) => beneath(dir, name, flags, Mode::empty()),
            opened => opened,
        }
    };
    let opened = match open(flags | OFlags::RDONLY | OFlags::NOATIME) {
        Err(Errno::PERM) => open(flags | OFlags::RDONLY),
        opened => opened,
    };
    match opened {
        Err(Errno::ACCESS) => open(flags | OFlags::PATH),
        opened => opened,
    }
}

/// Opens the object `name` in `dir`, whatever its type, without touching it (`O_PATH`).
///
/// # Errors
/// Those of openat(2).
pub fn handle(dir: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
    beneath(dir, name, ALWAYS | OFlags::PATH | OFlags::NOFOLLOW, Mode::empty())
}

/// Opens regular file `name` in `dir` for reading, without changing its access time if allowed.
///
/// # Errors
/// Those of openat(2).
pub fn reader(dir: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
    quiet(dir, name, ALWAYS | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK)
}

/// Opens regular file `name` in `dir` for reading and writing, or for writing alone where its
/// owner may not read it.
///
/// # Errors
/// Those of openat(2).
pub fn writer(dir: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = ALWAYS | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    match beneath(dir, name, flags | OFlags::RDWR, Mode::empty()) {
        Err(Errno::ACCESS) => beneath(dir, name, flags | OFlags::WRONLY, Mode::empty()),
        opened => opened,
    }
}

/// Creates regular file `name` in `dir`, open for reading and writing; it must not exist.
///
/// # Errors
/// `EEXIST` and whatever else openat(2) reports.
pub fn create(dir: BorrowedFd<'_>, name: &[u8], mode: u32) -> Result<OwnedFd, Errno> {
    let flags = ALWAYS | OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
    beneath(dir, name, flags, Mode::from_raw_mode(mode & 0o7777))
}

/// Creates an unnamed regular file on the filesystem of `dir` (`O_TMPFILE`), which inherits what a
/// named file in `dir` would.
///
/// # Errors
/// `EOPNOTSUPP` or `EISDIR` where the filesystem has no unnamed files.
pub fn unnamed(dir: BorrowedFd<'_>, mode: u32) -> Result<OwnedFd, Errno> {
    let flags = ALWAYS | OFlags::RDWR | OFlags::TMPFILE;
    beneath(dir, b".", flags, Mode::from_raw_mode(mode & 0o7777))
}

/// Reopens an object held by `handle` with other access.
///
/// # Errors
/// Those of open(2) on `/proc/self/fd`; `ENOENT` too where `/proc` is not mounted.
pub fn reopen(handle: BorrowedFd<'_>, flags: OFlags) -> Result<OwnedFd, Errno> {
    let path = FdPath::of(handle);
    retry_on_intr(|| rustix::fs::open(path.bytes(), ALWAYS | flags, Mode::empty()))
}

fn beneath(dir: BorrowedFd<'_>, name: &[u8], flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
    retry_on_intr(|| rustix::fs::openat(dir, name, flags, mode))
}

/// Opens with `O_NOATIME` where the caller may (owner or `CAP_FOWNER`), else without.
fn quiet(dir: BorrowedFd<'_>, name: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
    match beneath(dir, name, flags | OFlags::NOATIME, Mode::empty()) {
        Err(Errno::PERM) => beneath(dir, name, flags, Mode::empty()),
        opened => opened,
    }
}

/// The path `/proc/self/fd/N` or `/proc/self/fd/N/NAME`, for calls that have no descriptor form.
///
/// The kernel jumps to the object behind the descriptor, so it is no path walk of ours.
#[derive(Debug)]
pub struct FdPath(Vec<u8>);

impl FdPath {
    /// Returns the path of the object behind `handle`.
    pub fn of(handle: impl AsFd) -> Self {
        Self(format!("/proc/self/fd/{}", handle.as_fd().as_raw_fd()).into_bytes())
    }

    /// Returns the path of `name` in the directory behind `dir`.
    pub fn beneath(dir: impl AsFd, name: &[u8]) -> Self {
        let mut path = Self::of(dir);
        path.0.push(b'/');
        path.0.extend_from_slice(name);
        path
    }

    /// Returns the bytes of the path, without a NUL.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}
