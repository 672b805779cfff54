//! Calls that make, move and remove names: always (directory handle, one name).

use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{AtFlags, FileType, Gid, Mode, RenameFlags, SeekFrom, Timestamps, Uid, makedev};
use rustix::io::{Errno, retry_on_intr};

use super::open::FdPath;

/// A directory handle and one name in it.
#[derive(Debug, Clone, Copy)]
pub struct At<'a> {
    /// The directory.
    pub dir: BorrowedFd<'a>,
    /// One component, no `/`.
    pub name: &'a [u8],
}

impl<'a> At<'a> {
    /// Returns `name` in `dir`.
    pub fn new(dir: BorrowedFd<'a>, name: &'a [u8]) -> Self {
        Self { dir, name }
    }
}

/// mkdirat(2).
///
/// # Errors
/// Those of the call.
pub fn mkdir(at: At<'_>, mode: u32) -> Result<(), Errno> {
    retry_on_intr(|| rustix::fs::mkdirat(at.dir, at.name, Mode::from_raw_mode(mode & 0o7777)))
}

/// mknodat(2); `mode` holds the file type, `rdev` is (major, minor).
///
/// # Errors
/// Those of the call.
pub fn mknod(at: At<'_>, mode: u32, rdev: (u32, u32)) -> Result<(), Errno> {
    let kind = FileType::from_raw_mode(mode);
    let perm = Mode::from_raw_mode(mode & 0o7777);
    retry_on_intr(|| rustix::fs::mknodat(at.dir, at.name, kind, perm, makedev(rdev.0, rdev.1)))
}

/// Makes a whiteout, a character device 0:0.
///
/// # Errors
/// Those of mknodat(2).
pub fn whiteout(at: At<'_>) -> Result<(), Errno> {
    mknod(at, libc::S_IFCHR, (0, 0))
}

/// symlinkat(2).
///
/// # Errors
/// Those of the call.
pub fn symlink(target: &[u8], at: At<'_>) -> Result<(), Errno> {
    retry_on_intr(|| rustix::fs::symlinkat(target, at.dir, at.name))
}

/// readlinkat(2), whole, whatever its length.
///
/// # Errors
/// Those of the call; `EINVAL` if it is no symlink.
pub fn readlink(at: At<'_>) -> Result<Vec<u8>, Errno> {
    retry_on_intr(|| rustix::fs::readlinkat(at.dir, at.name, Vec::new()))
        .map(std::ffi::CString::into_bytes)
}

/// linkat(2) of a named object, not following a symlink.
///
/// # Errors
/// Those of the call.
pub fn link(from: At<'_>, to: At<'_>) -> Result<(), Errno> {
    retry_on_intr(|| rustix::fs::linkat(from.dir, from.name, to.dir, to.name, AtFlags::empty()))
}

/// Gives the object behind `handle` a name; also a first one (`O_TMPFILE`).
///
/// # Errors
/// Those of linkat(2) on `/proc/self/fd`.
pub fn link_handle(handle: impl AsFd, to: At<'_>) -> Result<(), Errno> {
    let path = FdPath::of(handle);
    retry_on_intr(|| {
        rustix::fs::linkat(rustix::fs::CWD, path.bytes(), to.dir, to.name, AtFlags::SYMLINK_FOLLOW)
    })
}

/// renameat2(2).
///
/// # Errors
/// Those of the call.
pub fn rename(from: At<'_>, to: At<'_>, flags: RenameFlags) -> Result<(), Errno> {
    if flags.is_empty() {
        return retry_on_intr(|| rustix::fs::renameat(from.dir, from.name, to.dir, to.name));
    }
    retry_on_intr(|| rustix::fs::renameat_with(from.dir, from.name, to.dir, to.name, flags))
}

/// unlinkat(2) of something that is no directory.
///
/// # Errors
/// Those of the call.
pub fn unlink(at: At<'_>) -> Result<(), Errno> {
    retry_on_intr(|| rustix::fs::unlinkat(at.dir, at.name, AtFlags::empty()))
}

/// unlinkat(2) of an empty directory.
///
/// # Errors
/// Those of the call.
pub fn rmdir(at: At<'_>) -> Result<(), Errno> {
    retry_on_intr(|| rustix::fs::unlinkat(at.dir, at.name, AtFlags::REMOVEDIR))
}

/// fchownat(2), not following a symlink; `None` leaves an id as it is.
///
/// # Errors
/// Those of the call.
pub fn chown(at: At<'_>, uid: Option<u32>, gid: Option<u32>) -> Result<(), Errno> {
    retry_on_intr(|| {
        rustix::fs::chownat(
            at.dir,
            at.name,
            uid.map(Uid::from_raw),
            gid.map(Gid::from_raw),
            AtFlags::SYMLINK_NOFOLLOW,
        )
    })
}

/// fchown(2) by a handle that may be `O_PATH`.
///
/// # Errors
/// Those of the call.
pub fn chown_handle(handle: impl AsFd, uid: Option<u32>, gid: Option<u32>) -> Result<(), Errno> {
    retry_on_intr(|| {
        rustix::fs::chownat(
            handle.as_fd(),
            c"",
            uid.map(Uid::from_raw),
            gid.map(Gid::from_raw),
            AtFlags::EMPTY_PATH,
        )
    })
}

/// chmod(2) by a handle that may be `O_PATH`; never of a symlink, which has no mode.
///
/// # Errors
/// Those of the call.
pub fn chmod_handle(handle: impl AsFd, mode: u32) -> Result<(), Errno> {
    match chmod_open(&handle, mode) {
        // `O_PATH`. For all others the walk through /proc is spared.
        Err(Errno::BADF) => {}
        done => return done,
    }
    let path = FdPath::of(handle);
    retry_on_intr(|| rustix::fs::chmod(path.bytes(), Mode::from_raw_mode(mode & 0o7777)))
}

/// fchmod(2) by a descriptor open for I/O.
///
/// # Errors
/// Those of the call.
pub fn chmod_open(file: impl AsFd, mode: u32) -> Result<(), Errno> {
    retry_on_intr(|| rustix::fs::fchmod(&file, Mode::from_raw_mode(mode & 0o7777)))
}

/// futimens(3) by a descriptor open for I/O.
///
/// # Errors
/// Those of utimensat(2).
pub fn set_times_open(file: impl AsFd, times: &Timestamps) -> Result<(), Errno> {
    retry_on_intr(|| rustix::fs::futimens(&file, times))
}

/// utimensat(2) of a name, not following a symlink.
///
/// # Errors
/// Those of the call.
pub fn set_times(at: At<'_>, times: &Timestamps) -> Result<(), Errno> {
    retry_on_intr(|| rustix::fs::utimensat(at.dir, at.name, times, AtFlags::SYMLINK_NOFOLLOW))
}

/// utimensat(2) by a handle that may be `O_PATH`.
///
/// # Errors
/// Those of the call.
pub fn set_times_handle(handle: impl AsFd, times: &Timestamps) -> Result<(), Errno> {
    retry_on_intr(|| rustix::fs::utimensat(&handle, c"", times, AtFlags::EMPTY_PATH))
}

/// Calls `visit` with every name of a directory but `.` and `..`: name, inode number, `d_type`.
///
/// Opens the directory anew, so that no position is shared with another reader.
///
/// # Errors
/// Those of openat(2) and getdents64(2); a short listing is never passed off as a whole one.
pub fn list(
    dir: BorrowedFd<'_>,
    visit: impl FnMut(&[u8], u64, FileType) -> Result<(), Errno>,
) -> Result<(), Errno> {
    list_here(super::open::directory(dir, b".")?.as_fd(), visit)
}

/// Sets a directory's descriptor to its start.
///
/// # Errors
/// Those of lseek(2): `EBADF` of an `O_PATH` descriptor, `ESPIPE` where directories have no positions.
pub fn rewind(dir: BorrowedFd<'_>) -> Result<(), Errno> {
    rustix::fs::seek(dir, SeekFrom::Start(0)).map(drop)
}

/// Does what [`list`] does by the descriptor itself, from its position on, which nobody else may use meanwhile.
///
/// # Errors
/// Those of getdents64(2).
pub fn list_here(
    dir: BorrowedFd<'_>,
    mut visit: impl FnMut(&[u8], u64, FileType) -> Result<(), Errno>,
) -> Result<(), Errno> {
    let mut buffer = Vec::with_capacity(32 * 1024);
    let mut entries = rustix::fs::RawDir::new(dir, buffer.spare_capacity_mut());
    while let Some(entry) = entries.next() {
        let entry = match entry {
            Err(Errno::INTR) => continue,
            entry => entry?,
        };
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            visit(name, entry.ino(), entry.file_type())?;
        }
    }
    Ok(())
}
