//! The inode-flag ioctls: `FS_IOC_GETFLAGS`, `FS_IOC_SETFLAGS`, `FS_IOC_FSGETXATTR`,
//! `FS_IOC_FSSETXATTR` (ioctl_iflags(2), ioctl_xfs_fsgetxattr(2)).
#![allow(unsafe_code, reason = "ioctl(2) has no safe form")]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::ioctl::{Getter, Setter, ioctl, opcode};

/// `struct fsxattr`: flags, extent size, extents, project, CoW extent size, 8 bytes of padding.
type FsXattr = [u8; 28];

/// `FS_APPEND_FL`: data is only added.
pub const APPEND: u32 = 0x20;
/// `FS_IMMUTABLE_FL`: nothing changes.
pub const IMMUTABLE: u32 = 0x10;

/// `FS_SYNC_FL`: each write is durable.
pub const SYNC: u32 = 0x08;
/// `FS_NOATIME_FL`: reading does not change the access time.
pub const NOATIME: u32 = 0x80;

/// The first two in the flags of `struct fsxattr`.
const XFLAG_APPEND: u32 = 0x10;
const XFLAG_IMMUTABLE: u32 = 0x08;

const GET_FLAGS: u32 = opcode::read::<std::ffi::c_long>(b'f', 1);
const SET_FLAGS: u32 = opcode::write::<std::ffi::c_long>(b'f', 2);
const GET_FSXATTR: u32 = opcode::read::<FsXattr>(b'X', 31);
const SET_FSXATTR: u32 = opcode::write::<FsXattr>(b'X', 32);

/// An int, and what the number of the ioctl claims: a server before Linux 5.13 gets and gives as much.
type Flags = [u32; 2];

/// Returns the inode flags.
///
/// # Errors
/// `ENOTTY` where the filesystem has none; `ENOSYS` from a FUSE server before Linux 5.13.
pub fn get(file: BorrowedFd<'_>) -> Result<u32, Errno> {
    // SAFETY: the ioctl writes one int at the pointer, or as many bytes as its number says.
    let [flags, _] = unsafe { ioctl(file, Getter::<GET_FLAGS, Flags>::new()) }?;
    Ok(flags)
}

/// Sets the inode flags.
///
/// # Errors
/// `ENOTTY` where the filesystem has none; `EPERM` without privilege; `EOPNOTSUPP` for a flag.
pub fn set(file: BorrowedFd<'_>, flags: u32) -> Result<(), Errno> {
    // SAFETY: the ioctl reads one int at the pointer, or as many bytes as its number says.
    unsafe { ioctl(file, Setter::<SET_FLAGS, Flags>::new([flags, 0])) }
}

/// Returns `struct fsxattr`, raw.
///
/// # Errors
/// `ENOTTY` where the filesystem has none.
pub fn get_fsxattr(file: BorrowedFd<'_>) -> Result<FsXattr, Errno> {
    // SAFETY: the ioctl writes one struct fsxattr, which is 28 bytes and may lie anywhere.
    unsafe { ioctl(file, Getter::<GET_FSXATTR, FsXattr>::new()) }
}

/// Gives `to` those of the flags of `from` that a copy keeps: [`SYNC`] and [`NOATIME`]. Neither is an `O_PATH`
/// handle. What has no flags has none of these, and is not given any.
///
/// # Errors
/// Those of the ioctls but `ENOTTY`, `EINVAL`, `EOPNOTSUPP` and `ENOSYS`.
pub fn pass_on(
    from: BorrowedFd<'_>,
    to: impl FnOnce() -> Result<OwnedFd, Errno>,
) -> Result<(), Errno> {
    let unless_absent = |result| match result {
        Err(Errno::NOTTY | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => Ok(None),
        result => result.map(Some),
    };
    let kept = unless_absent(get(from))?.unwrap_or(0) & (SYNC | NOATIME);
    if kept == 0 {
        return Ok(());
    }
    let to = to()?;
    match unless_absent(get(to.as_fd()))? {
        Some(own) => set(to.as_fd(), own & !(SYNC | NOATIME) | kept),
        None => Ok(()),
    }
}

/// Sets `struct fsxattr`, raw.
///
/// # Errors
/// As [`set`].
pub fn set_fsxattr(file: BorrowedFd<'_>, raw: &FsXattr) -> Result<(), Errno> {
    // SAFETY: the ioctl reads one struct fsxattr of 28 bytes.
    unsafe { ioctl(file, Setter::<SET_FSXATTR, FsXattr>::new(*raw)) }
}

/// Returns [`APPEND`] and [`IMMUTABLE`] as `struct fsxattr` has them.
pub fn protection_of(raw: &FsXattr) -> u32 {
    let flags = xflags(raw);
    let of = |xflag, flag| if flags & xflag == 0 { 0 } else { flag };
    of(XFLAG_APPEND, APPEND) | of(XFLAG_IMMUTABLE, IMMUTABLE)
}

/// Returns `struct fsxattr` with these and no others of [`APPEND`] and [`IMMUTABLE`].
pub fn with_protection(raw: &FsXattr, flags: u32) -> FsXattr {
    let of = |xflag, flag| if flags & flag == 0 { 0 } else { xflag };
    let protection = of(XFLAG_APPEND, APPEND) | of(XFLAG_IMMUTABLE, IMMUTABLE);
    let flags = xflags(raw) & !(XFLAG_APPEND | XFLAG_IMMUTABLE) | protection;
    let mut raw = *raw;
    if let Some(first) = raw.first_chunk_mut::<4>() {
        *first = flags.to_ne_bytes();
    }
    raw
}

fn xflags(raw: &FsXattr) -> u32 {
    raw.first_chunk::<4>().map_or(0, |first| u32::from_ne_bytes(*first))
}
