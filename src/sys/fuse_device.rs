//! The FUSE device: more descriptors for one connection (`FUSE_DEV_IOC_CLONE`).
#![allow(unsafe_code, reason = "ioctl(2) has no safe form")]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Setter, ioctl, opcode};

/// The group of ioctl numbers that belong to the device.
const MAGIC: u8 = 229;

/// Its number says that it reads what it in fact is given.
const CLONE: u32 = opcode::read::<u32>(MAGIC, 0);

/// Returns a further descriptor for the connection that `device` serves, opened at `path`.
///
/// A request must be answered on the descriptor that it was read from.
///
/// # Errors
/// Those of open(2); `EINVAL` if `device` is no connection.
pub fn clone(device: BorrowedFd<'_>, path: &str) -> Result<OwnedFd, Errno> {
    let another = rustix::fs::openat(CWD, path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    let number = u32::try_from(device.as_raw_fd()).map_err(|_negative| Errno::BADF)?;
    // SAFETY: the ioctl reads one 32-bit number at the pointer, the descriptor of a connection.
    unsafe { ioctl(another.as_fd(), Setter::<CLONE, u32>::new(number)) }?;
    Ok(another)
}
