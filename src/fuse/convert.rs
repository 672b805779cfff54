//! Conversions between the union's plain types and what a FUSE request or reply carries.
//!
//! Everything here is pure, total and never panics: whatever number a kernel, a layer or a backing
//! filesystem comes up with has an image, if need be a saturated one.

use crate::error::Errno;
use crate::union::{Attr, FileType, SetTime, Time};
use ::fuser::{FileAttr, INodeNo, TimeOrNow};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Nanoseconds in a second.
const NANOS: u32 = 1_000_000_000;

/// The permission, setuid, setgid and sticky bits of a mode.
pub(super) const PERMISSIONS: u32 = 0o7777;

/// First errno that the FUSE device refuses in a reply.
const ERRNO_END: i32 = 512;

/// Returns the number a reply carries for `errno`.
///
/// The kernel keeps numbers from 512 up to itself, but some filesystems let one slip (`ENOTSUPP`).
/// A reply with such a number is refused and its request would wait for ever, so it becomes `EIO`.
pub(super) fn reply_number(errno: Errno) -> i32 {
    let number = errno.raw_os_error();
    if (1..ERRNO_END).contains(&number) { number } else { Errno::IO.raw_os_error() }
}

/// Returns [`reply_number`] in `fuser`'s type.
pub(super) fn reply_errno(errno: Errno) -> ::fuser::Errno {
    ::fuser::Errno::from_i32(reply_number(errno))
}

/// Returns the device number as the kernel puts it on the wire (`new_encode_dev`).
///
/// The kernel has 12 bits of major and 20 of minor number; bits beyond are lost, as in its own
/// encoding.
pub(super) const fn encode_dev(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | ((major & 0xfff) << 8) | ((minor & 0xfff00) << 12)
}

/// Returns (major, minor) of a device number from the wire (`new_decode_dev`).
pub(super) const fn decode_dev(dev: u32) -> (u32, u32) {
    ((dev >> 8) & 0xfff, (dev & 0xff) | ((dev >> 12) & 0xfff00))
}

/// Returns `time` in the form from which `fuser` makes the same wire time.
///
/// `SystemTime` counts seconds in an `i64` on Linux, as the wire does, so every time has an image;
/// nanoseconds beyond a second are cut to the last one.
pub(super) fn system_time(time: Time) -> SystemTime {
    let seconds = Duration::from_secs(time.sec.unsigned_abs());
    let nanos = Duration::from_nanos(u64::from(time.nsec.min(NANOS - 1)));
    let whole = if time.sec < 0 {
        UNIX_EPOCH.checked_sub(seconds)
    } else {
        UNIX_EPOCH.checked_add(seconds)
    };
    whole.and_then(|whole| whole.checked_add(nanos)).unwrap_or(UNIX_EPOCH)
}

/// Returns the wire time from which `fuser` made `time`.
///
/// For a time before 1970 `fuser` goes back by the nanoseconds where the wire counts them forward
/// from the second, so `time` lies as far too early as this undoes. It is not the inverse of
/// [`system_time`].
pub(super) fn wire_time(time: SystemTime) -> Time {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => Time {
            sec: i64::try_from(after.as_secs()).unwrap_or(i64::MAX),
            nsec: after.subsec_nanos(),
        },
        Err(error) => {
            let before = error.duration();
            Time {
                sec: 0_i64.checked_sub_unsigned(before.as_secs()).unwrap_or(i64::MIN),
                nsec: before.subsec_nanos(),
            }
        }
    }
}

/// Returns what a SETATTR request wants a time to become.
pub(super) fn set_time(time: TimeOrNow) -> SetTime {
    match time {
        TimeOrNow::Now => SetTime::Now,
        TimeOrNow::SpecificTime(time) => SetTime::At(wire_time(time)),
    }
}

/// Returns the transport's word for a file type.
pub(super) const fn file_type(kind: FileType) -> ::fuser::FileType {
    match kind {
        FileType::Regular => ::fuser::FileType::RegularFile,
        FileType::Directory => ::fuser::FileType::Directory,
        FileType::Symlink => ::fuser::FileType::Symlink,
        FileType::Fifo => ::fuser::FileType::NamedPipe,
        FileType::Socket => ::fuser::FileType::Socket,
        FileType::CharDevice => ::fuser::FileType::CharDevice,
        FileType::BlockDevice => ::fuser::FileType::BlockDevice,
    }
}

/// Returns the permission bits of a mode.
fn permissions(mode: u32) -> u16 {
    u16::try_from(mode & PERMISSIONS).unwrap_or(0)
}

/// Returns the attributes of a reply.
pub(super) fn attributes(attr: &Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(attr.ino),
        size: attr.size,
        blocks: attr.blocks,
        atime: system_time(attr.atime),
        mtime: system_time(attr.mtime),
        ctime: system_time(attr.ctime),
        crtime: system_time(attr.btime),
        kind: file_type(attr.kind()),
        perm: permissions(attr.mode),
        nlink: attr.nlink,
        uid: attr.uid.to_show(),
        gid: attr.gid.to_show(),
        rdev: encode_dev(attr.rdev_major, attr.rdev_minor),
        blksize: attr.blksize,
        flags: 0,
    }
}

/// Returns attributes that say no more than a number and a type.
///
/// For what the kernel does not read: a negative entry (number 0), and `.` and `..` in a listing
/// with attributes.
pub(super) const fn bare_attributes(ino: u64, kind: FileType) -> FileAttr {
    FileAttr {
        ino: INodeNo(ino),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: file_type(kind),
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 0,
        flags: 0,
    }
}

/// Returns attributes for a listed name that could not be looked up.
///
/// Their size is none that a file can have, so the kernel takes the type alone and gives the node
/// id back at once: it must be one that is never a node's.
pub(super) const fn unknown_attributes(kind: FileType) -> FileAttr {
    FileAttr { size: u64::MAX, ..bare_attributes(u64::MAX, kind) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::idmap::OuterId;

    /// What `fuser` makes of a wire time (its `system_time_from_time`).
    fn fuser_decodes(sec: i64, nsec: u32) -> SystemTime {
        if sec >= 0 {
            UNIX_EPOCH + Duration::new(sec.unsigned_abs(), nsec)
        } else {
            UNIX_EPOCH - Duration::new(sec.unsigned_abs(), nsec)
        }
    }

    /// What `fuser` puts on the wire for a time (its `time_from_system_time`).
    fn fuser_encodes(time: SystemTime) -> (i64, u32) {
        match time.duration_since(UNIX_EPOCH) {
            Ok(d) => match i64::try_from(d.as_secs()) {
                Ok(sec) => (sec, d.subsec_nanos()),
                Err(_) => (i64::MAX, 999_999_999),
            },
            Err(e) => {
                let (sec, nsec) = (e.duration().as_secs(), e.duration().subsec_nanos());
                match i64::try_from(sec) {
                    Err(_) => (i64::MIN, 0),
                    Ok(sec) if nsec == 0 => (-sec, 0),
                    Ok(sec) => (-sec - 1, NANOS - nsec),
                }
            }
        }
    }

    const TIMES: &[(i64, u32)] = &[
        (0, 0),
        (0, 1),
        (1, 999_999_999),
        (1_700_000_000, 123_456_789),
        (-1, 0),
        (-1, 1),
        (-1, 999_999_999),
        (-2, 200_000_000),
        (-1_000_000_000, 500_000_000),
        (i64::MAX, 0),
        (i64::MAX, 999_999_999),
        (i64::MIN, 0),
        (i64::MIN + 1, 0),
        (i64::MIN + 1, 999_999_999),
    ];

    #[test]
    fn times_reach_the_wire_unchanged() {
        for &(sec, nsec) in TIMES {
            assert_eq!(fuser_encodes(system_time(Time { sec, nsec })), (sec, nsec));
        }
        assert_eq!(
            fuser_encodes(system_time(Time { sec: i64::MIN, nsec: 5 })),
            (i64::MIN, 5),
            "the last second before the end of time"
        );
    }

    #[test]
    fn times_from_the_wire_are_undone_exactly() {
        for &(sec, nsec) in TIMES {
            assert_eq!(wire_time(fuser_decodes(sec, nsec)), Time { sec, nsec });
        }
    }

    #[test]
    fn nanoseconds_out_of_range_do_not_carry() {
        let time = system_time(Time { sec: i64::MAX, nsec: u32::MAX });
        assert_eq!(fuser_encodes(time), (i64::MAX, 999_999_999));
        let time = system_time(Time { sec: 7, nsec: NANOS });
        assert_eq!(fuser_encodes(time), (7, 999_999_999));
    }

    #[test]
    fn set_time_keeps_now_apart() {
        assert!(matches!(set_time(TimeOrNow::Now), SetTime::Now));
        let time = fuser_decodes(-3, 250_000_000);
        let SetTime::At(at) = set_time(TimeOrNow::SpecificTime(time)) else {
            panic!("a given time became now");
        };
        assert_eq!(at, Time { sec: -3, nsec: 250_000_000 });
    }

    #[test]
    fn device_numbers() {
        for (major, minor, wire) in [
            (0, 0, 0),
            (1, 3, 0x0103),
            (8, 255, 0x08ff),
            (8, 256, 0x0010_0800),
            (259, 0x1234, 0x0121_0334),
            (0xfff, 0xf_ffff, 0xffff_ffff),
        ] {
            assert_eq!(encode_dev(major, minor), wire, "{major}:{minor}");
            assert_eq!(decode_dev(wire), (major, minor), "{wire:#x}");
        }
    }

    #[test]
    fn errnos() {
        for (from, to) in [
            (Errno::NOENT, libc::ENOENT),
            (Errno::ACCESS, libc::EACCES),
            (Errno::NODATA, libc::ENODATA),
            (Errno::STALE, libc::ESTALE),
            (Errno::from_raw_os_error(511), 511),
            (Errno::from_raw_os_error(512), libc::EIO),
            (Errno::from_raw_os_error(524), libc::EIO),
            (Errno::from_raw_os_error(4095), libc::EIO),
        ] {
            assert_eq!(reply_errno(from).code(), to);
        }
    }

    #[test]
    fn file_types() {
        for (kind, expected) in [
            (FileType::Regular, ::fuser::FileType::RegularFile),
            (FileType::Directory, ::fuser::FileType::Directory),
            (FileType::Symlink, ::fuser::FileType::Symlink),
            (FileType::Fifo, ::fuser::FileType::NamedPipe),
            (FileType::Socket, ::fuser::FileType::Socket),
            (FileType::CharDevice, ::fuser::FileType::CharDevice),
            (FileType::BlockDevice, ::fuser::FileType::BlockDevice),
        ] {
            assert_eq!(file_type(kind), expected);
        }
    }

    #[test]
    fn attributes_keep_every_field() {
        let attr = Attr {
            ino: u64::MAX,
            size: (1 << 40) + 5,
            blocks: (1 << 33) + 1,
            blksize: 4096,
            mode: libc::S_IFREG | 0o6751,
            nlink: 3,
            uid: OuterId::asked(100_000),
            gid: OuterId::asked(u32::MAX - 1),
            rdev_major: 8,
            rdev_minor: 300,
            atime: Time { sec: 1, nsec: 2 },
            mtime: Time { sec: -1, nsec: 999_999_999 },
            ctime: Time { sec: 5, nsec: 6 },
            btime: Time { sec: 7, nsec: 8 },
        };
        let out = attributes(&attr);
        assert_eq!(out.ino.0, u64::MAX);
        assert_eq!((out.size, out.blocks, out.blksize), ((1 << 40) + 5, (1 << 33) + 1, 4096));
        assert_eq!((out.perm, out.nlink), (0o6751, 3));
        assert_eq!((out.uid, out.gid), (100_000, u32::MAX - 1));
        assert_eq!(decode_dev(out.rdev), (8, 300));
        assert_eq!(fuser_encodes(out.atime), (1, 2));
        assert_eq!(fuser_encodes(out.mtime), (-1, 999_999_999));
        assert_eq!(fuser_encodes(out.ctime), (5, 6));
        assert_eq!(fuser_encodes(out.crtime), (7, 8));
    }
}
