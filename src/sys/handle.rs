//! File handles: what names an object of a filesystem for as long as it exists (open_by_handle_at(2)).
#![allow(unsafe_code, reason = "name_to_handle_at(2) and the ioctl have no safe form")]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::{Errno, retry_on_intr};
use rustix::ioctl::{Getter, Updater, ioctl, opcode};

use super::last_errno;

/// btrfs, as statfs(2) has it.
pub const BTRFS_MAGIC: u64 = 0x9123_683e;
/// ext2, ext3 and ext4.
pub const EXT_MAGIC: u64 = 0xef53;
/// xfs.
pub const XFS_MAGIC: u64 = 0x5846_5342;

/// Longest handle there is, in bytes (`MAX_HANDLE_SZ`).
const BYTES_MAX: usize = 128;

/// A handle as its filesystem made it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Handle {
    /// Type, which tells the filesystem how to read the bytes.
    pub kind: i32,
    /// The rest, in the byte order of the machine.
    pub bytes: Vec<u8>,
}

/// `struct file_handle` with room for the longest.
#[repr(C)]
struct Raw {
    len: u32,
    kind: i32,
    bytes: [u8; BYTES_MAX],
}

/// Returns the handle of an object behind a descriptor, which may be `O_PATH`; `None` where the
/// filesystem gives out none.
///
/// # Errors
/// Those of name_to_handle_at(2) but `EOPNOTSUPP`, `EOVERFLOW` and, where a filter keeps the call from
/// us, `ENOSYS` and `EPERM`.
pub fn of(object: BorrowedFd<'_>) -> Result<Option<Handle>, Errno> {
    let len = u32::try_from(BYTES_MAX).unwrap_or(0);
    let mut raw = Raw { len, kind: 0, bytes: [0; BYTES_MAX] };
    let mut mount = 0_i32;
    let called = retry_on_intr(|| {
        // SAFETY: the path is empty and NUL-terminated; the call writes one int at `mount` and at
        // most `len` bytes behind the head of `raw`, which has room for them.
        let done = unsafe {
            libc::syscall(
                libc::SYS_name_to_handle_at,
                object.as_raw_fd(),
                c"".as_ptr(),
                &raw mut raw,
                &raw mut mount,
                libc::AT_EMPTY_PATH,
            )
        };
        if done == 0 { Ok(()) } else { Err(last_errno()) }
    });
    match called {
        Ok(()) => {}
        Err(Errno::OPNOTSUPP | Errno::OVERFLOW | Errno::NOSYS | Errno::PERM) => return Ok(None),
        Err(errno) => return Err(errno),
    }
    let len = usize::try_from(raw.len).unwrap_or(BYTES_MAX);
    let bytes = raw.bytes.get(..len).ok_or(Errno::OVERFLOW)?.to_vec();
    Ok(Some(Handle { kind: raw.kind, bytes }))
}

/// Opens (`O_PATH`) the object that a handle names on the filesystem of `mount`, a descriptor open for
/// reading; `None` where the caller may not, or where there is no such object any more.
///
/// # Errors
/// Those of open_by_handle_at(2) but `EPERM`, `ESTALE` and what says that it is no handle of there.
pub fn open(mount: BorrowedFd<'_>, handle: &Handle) -> Result<Option<OwnedFd>, Errno> {
    let len = handle.bytes.len();
    let mut raw = Raw {
        len: u32::try_from(len).unwrap_or(u32::MAX),
        kind: handle.kind,
        bytes: [0; BYTES_MAX],
    };
    raw.bytes.get_mut(..len).ok_or(Errno::INVAL)?.copy_from_slice(&handle.bytes);
    let opened = retry_on_intr(|| {
        // SAFETY: the call reads the head of `raw` and `len` bytes behind it, which are there; what
        // it returns is a new descriptor that nobody else has.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_open_by_handle_at,
                mount.as_raw_fd(),
                &raw const raw,
                libc::O_PATH | libc::O_CLOEXEC,
            )
        };
        match i32::try_from(fd) {
            // SAFETY: as above.
            Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
            _ => Err(last_errno()),
        }
    });
    match opened {
        Ok(opened) => Ok(Some(opened)),
        Err(Errno::PERM | Errno::STALE | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => {
            Ok(None)
        }
        Err(errno) => Err(errno),
    }
}

/// `struct fsuuid2`: length, then the bytes.
type FsUuid = [u8; 17];
/// `struct btrfs_ioctl_fs_info_args`, with the UUID behind 16 bytes.
type BtrfsInfo = [u8; 1024];
/// `struct xfs_fsop_geom_v1`, with the UUID behind 64 bytes.
type XfsGeometry = [u8; 112];
/// `struct fsuuid` with room: how many bytes of a UUID there are, flags, the UUID.
type ExtUuid = [u8; 24];

const GET_UUID: u32 = opcode::read::<FsUuid>(0x15, 0);
const BTRFS_INFO: u32 = opcode::read::<BtrfsInfo>(0x94, 31);
const XFS_GEOMETRY: u32 = opcode::read::<XfsGeometry>(b'X', 100);
/// The structure ends where the UUID begins.
const EXT_UUID: u32 = opcode::read::<[u8; 8]>(b'f', 44);

/// Returns the UUID of the filesystem that holds an open file or directory, the one that the kernel's
/// overlayfs knows it by; `None` where it has none or does not tell, as ext4 before Linux 5.19.
///
/// # Errors
/// Those of ioctl(2) and fstatfs(2), but the ones that mean "no such ioctl".
pub fn filesystem_uuid(file: BorrowedFd<'_>) -> Result<Option<[u8; 16]>, Errno> {
    // SAFETY: the ioctl writes one struct fsuuid2, which is 17 bytes and may lie anywhere.
    let told = unsafe { ioctl(file, Getter::<GET_UUID, FsUuid>::new()) };
    let told = match told {
        Ok([16, uuid @ ..]) => Ok(Some(uuid)),
        Ok(_) => Ok(None),
        // From Linux 6.9 on btrfs alone; before that all.
        Err(Errno::NOTTY | Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => own_uuid(file),
        Err(errno) => Err(errno),
    };
    match told {
        Err(Errno::NOTTY | Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => Ok(None),
        told => told,
    }
}

/// Asks in the filesystem's own way.
fn own_uuid(file: BorrowedFd<'_>) -> Result<Option<[u8; 16]>, Errno> {
    let uuid_at = |bytes: &[u8], at: usize| bytes.get(at..at + 16)?.try_into().ok();
    match u64::try_from(rustix::fs::fstatfs(file)?.f_type) {
        Ok(BTRFS_MAGIC) => {
            let mut info: BtrfsInfo = [0; 1024];
            // SAFETY: the ioctl reads and writes one structure of this size.
            unsafe { ioctl(file, Updater::<BTRFS_INFO, BtrfsInfo>::new(&mut info)) }?;
            Ok(uuid_at(&info, 16))
        }
        Ok(XFS_MAGIC) => {
            let mut geometry: XfsGeometry = [0; 112];
            // SAFETY: the ioctl writes one structure of this size.
            unsafe { ioctl(file, Updater::<XFS_GEOMETRY, XfsGeometry>::new(&mut geometry)) }?;
            Ok(uuid_at(&geometry, 64))
        }
        Ok(EXT_MAGIC) => {
            let mut uuid: ExtUuid = [0; 24];
            // The length, in the order of the machine; the rest is asked for as zeros.
            uuid.iter_mut().zip(16_u32.to_ne_bytes()).for_each(|(to, byte)| *to = byte);
            // SAFETY: the ioctl reads the first 8 bytes and writes no more than all 24, as the first tell.
            unsafe { ioctl(file, Updater::<EXT_UUID, ExtUuid>::new(&mut uuid)) }?;
            Ok(uuid_at(&uuid, 8))
        }
        _ => Ok(None),
    }
}
