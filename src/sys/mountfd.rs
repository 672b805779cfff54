//! Mounts held by a descriptor: open_tree(2), mount_setattr(2).

#![allow(unsafe_code, reason = "mount_setattr has no wrapper")]

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use rustix::io::{Errno, retry_on_intr};
use rustix::mount::{OpenTreeFlags, open_tree};

use super::last_errno;

/// `struct mount_attr` of mount_setattr(2).
#[repr(C)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns_fd: u64,
}

const RDONLY: u64 = 0x1;

/// Returns `dir` as the root of a mount of its own, which nobody else sees, without what is mounted
/// beneath it; read-only, which keeps access times as well: they are changed where writing is allowed.
///
/// # Errors
/// `EPERM` without `CAP_SYS_ADMIN` over the mount namespace; `EINVAL` where mounts beneath `dir`
/// must not be uncovered; `ENOSYS` before Linux 5.12.
pub fn private_read_only(dir: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let clone = detached(dir)?;
    set(&clone, RDONLY, 0)?;
    Ok(clone)
}

/// Returns `dir` as the root of a mount of its own on which ids are mapped as `namespace` says.
///
/// # Errors
/// `EINVAL` where the filesystem cannot; `EPERM` without `CAP_SYS_ADMIN` over the filesystem.
pub fn idmapped(dir: BorrowedFd<'_>, namespace: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    const IDMAP: u64 = 0x0010_0000;
    let clone = detached(dir)?;
    set(&clone, IDMAP, namespace.as_raw_fd())?;
    Ok(clone)
}

/// Opens the directory at `path` beneath the root of a mount, not by a symlink nor on another mount.
///
/// # Errors
/// Those of openat2(2): `ELOOP` for a symlink, `EXDEV` for a mountpoint, `ENOSYS` before Linux 5.6.
pub fn open_inside(root: BorrowedFd<'_>, path: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let within = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    retry_on_intr(|| openat2(root, path, flags, Mode::empty(), within))
}

fn detached(dir: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    open_tree(dir, c"", flags)
}

fn set(mount: &OwnedFd, attributes: u64, namespace: RawFd) -> Result<(), Errno> {
    let attr = MountAttr {
        set: attributes,
        clear: 0,
        // What others mount beneath the directory later stays out.
        propagation: libc::MS_PRIVATE,
        userns_fd: u64::try_from(namespace).unwrap_or_default(),
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
    if done == 0 { Ok(()) } else { Err(last_errno()) }
}
