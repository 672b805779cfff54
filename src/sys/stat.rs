//! statx(2) by handle or by (directory, name).

use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{AtFlags, StatxAttributes, StatxFlags, makedev};
use rustix::io::{Errno, retry_on_intr};

use super::inode_flags::{APPEND, IMMUTABLE};

/// What statx(2) says of one object.
pub type Statx = rustix::fs::Statx;

/// Mode bits by which a program runs with another's rights.
pub const SETIDS: u32 = libc::S_ISUID | libc::S_ISGID;

const WANTED: StatxFlags = StatxFlags::BASIC_STATS.union(StatxFlags::BTIME);

/// Returns the attributes of the object behind `handle`.
///
/// # Errors
/// Those of statx(2).
pub fn of(handle: impl AsFd) -> Result<Statx, Errno> {
    let handle = handle.as_fd();
    retry_on_intr(|| rustix::fs::statx(handle, c"", AtFlags::EMPTY_PATH, WANTED))
}

/// Returns the attributes of `name` in `dir`, not following a symlink.
///
/// # Errors
/// Those of statx(2).
pub fn at(dir: BorrowedFd<'_>, name: &[u8]) -> Result<Statx, Errno> {
    retry_on_intr(|| rustix::fs::statx(dir, name, AtFlags::SYMLINK_NOFOLLOW, WANTED))
}

/// Like [`at`], with the named list of errnos that mean absence (`ENOENT`) as a value.
///
/// # Errors
/// Those of statx(2) but `ENOENT`.
pub fn find(dir: BorrowedFd<'_>, name: &[u8]) -> Result<Option<Statx>, Errno> {
    match at(dir, name) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// Returns the device number of the filesystem that holds the object.
pub fn device(stat: &Statx) -> u64 {
    makedev(stat.stx_dev_major, stat.stx_dev_minor)
}

/// Returns whether the object is append-only or immutable, as flags of `inode_flags`.
pub fn protection(stat: &Statx) -> u32 {
    // EROFS says of every file that it is immutable, and knows no append-only ones; what has flags knows both.
    if !stat.stx_attributes_mask.contains(StatxAttributes::APPEND) {
        return 0;
    }
    let has = stat.stx_attributes;
    let of = |attribute, flag| if has.contains(attribute) { flag } else { 0 };
    of(StatxAttributes::APPEND, APPEND) | of(StatxAttributes::IMMUTABLE, IMMUTABLE)
}

/// Makes the attributes of a file those of a whiteout that users see.
pub fn show_as_whiteout(stat: &mut Statx) {
    const TYPE: u16 = 0o170_000;
    const CHARACTER_DEVICE: u16 = 0o020_000;
    stat.stx_mode = stat.stx_mode & !TYPE | CHARACTER_DEVICE;
    stat.stx_rdev_major = 0;
    stat.stx_rdev_minor = 0;
}

/// Tells whether the object is a whiteout: a character device 0:0.
pub fn is_whiteout(stat: &Statx) -> bool {
    u32::from(stat.stx_mode) & libc::S_IFMT == libc::S_IFCHR
        && stat.stx_rdev_major == 0
        && stat.stx_rdev_minor == 0
}
