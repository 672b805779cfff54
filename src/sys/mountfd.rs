//! Mounts held by a descriptor: open_tree(2), mount_setattr(2).

#![allow(unsafe_code, reason = "mount_setattr has no wrapper")]

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};

/// `struct mount_attr` of mount_setattr(2).
#[repr(C)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns_fd: u64,
}

const RDONLY: u64 = 0x1;
const NOATIME: u64 = 0x10;

/// Returns `dir` as the root of a mount of its own, which nobody else sees, without what is mounted
/// beneath it; read-only, and without access times where the caller may change that.
///
/// # Errors
/// `EPERM` without `CAP_SYS_ADMIN` over the mount namespace; `EINVAL` where mounts beneath `dir`
/// must not be uncovered; `ENOSYS` before Linux 5.12.
pub fn private_read_only(dir: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    let clone = open_tree(dir, c"", flags)?;
    // In a user namespace the handling of access times may be locked.
    set(&clone, RDONLY | NOATIME).or_else(|_locked| set(&clone, RDONLY))?;
    Ok(clone)
}

fn set(mount: &OwnedFd, attributes: u64) -> Result<(), Errno> {
    let attr = MountAttr {
        set: attributes,
        clear: 0,
        // What others mount beneath the directory later stays out.
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    // SAFETY: the path is empty and NUL-terminated, `attr` is the structure that the call reads, of
    // the size given.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            std::ptr::from_ref(&attr),
            size_of::<MountAttr>(),
        )
    };
    if done == 0 {
        return Ok(());
    }
    let error = std::io::Error::last_os_error();
    Err(Errno::from_io_error(&error).unwrap_or(Errno::IO))
}
