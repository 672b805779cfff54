//! The FUSE device: more descriptors for one connection (`FUSE_DEV_IOC_CLONE`), and files that the
//! kernel reads and writes by itself (`FUSE_DEV_IOC_BACKING_OPEN`).
#![allow(unsafe_code, reason = "ioctl(2) has no safe form")]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, Setter, ioctl, opcode};

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

/// `struct fuse_backing_map`.
#[repr(C)]
#[derive(Debug)]
struct BackingMap {
    fd: i32,
    flags: u32,
    padding: u64,
}

/// `FUSE_DEV_IOC_BACKING_OPEN`, whose result is a number.
struct OpenBacking(BackingMap);

// SAFETY: the ioctl reads one `struct fuse_backing_map` at the pointer, and changes nothing there.
unsafe impl Ioctl for OpenBacking {
    type Output = i32;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        opcode::write::<BackingMap>(MAGIC, 1)
    }

    fn as_ptr(&mut self) -> *mut core::ffi::c_void {
        (&raw mut self.0).cast()
    }

    unsafe fn output_from_ptr(
        out: IoctlOutput,
        _: *mut core::ffi::c_void,
    ) -> rustix::io::Result<i32> {
        Ok(out)
    }
}

/// Registers `file` with the connection behind `device`; opens answered by the number that is
/// returned are served by the kernel from that file.
///
/// # Errors
/// `EPERM` without `CAP_SYS_ADMIN` of the machine; `ELOOP` where `file` lies on filesystems stacked
/// deeper than INIT said; `EOPNOTSUPP` where INIT did not ask for it.
pub fn open_backing(device: BorrowedFd<'_>, file: BorrowedFd<'_>) -> Result<i32, Errno> {
    let map = BackingMap { fd: file.as_raw_fd(), flags: 0, padding: 0 };
    // SAFETY: `device` is a FUSE device, and the ioctl is as `OpenBacking` describes it.
    unsafe { ioctl(device, OpenBacking(map)) }
}

/// Takes back what [`open_backing`] returned. Opens that have it keep it.
///
/// # Errors
/// `ENOENT` for another number.
pub fn close_backing(device: BorrowedFd<'_>, id: i32) -> Result<(), Errno> {
    const CLOSE: u32 = opcode::write::<u32>(MAGIC, 2);
    // SAFETY: the ioctl reads one 32-bit number at the pointer.
    unsafe { ioctl(device, Setter::<CLOSE, i32>::new(id)) }
}
