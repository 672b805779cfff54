//! The kernel's side of the protocol: numbers and structures of `<linux/fuse.h>`, version 7.45.
//!
//! Everything is in the byte order of the machine and lies anywhere in a buffer: structures are
//! copied in and out, never pointed at. Sizes are checked when this is compiled, so that a field too
//! many cannot be shipped. Fields that nothing reads are named as the kernel names them.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The protocol's major version; there has been no other since 2006.
pub(super) const MAJOR: u32 = 7;
/// The newest minor version that this side speaks.
pub(super) const MINOR: u32 = 45;
/// The oldest one, of Linux 5.4; every structure below has its size since then, but where it says so.
pub(super) const MINOR_LEAST: u32 = 31;

/// Makes an open enumeration of opcodes: numbers, and names for the log.
macro_rules! opcodes {
    ($($name:ident = $number:literal,)*) => {
        $(pub(in super::super) const $name: u32 = $number;)*

        /// Returns the name of an opcode; what has none is `UNKNOWN`.
        pub(in super::super) const fn name(opcode: u32) -> &'static str {
            match opcode {
                $($name => stringify!($name),)*
                _ => "UNKNOWN",
            }
        }

        /// Every opcode that has a name.
        #[cfg(test)]
        pub(in super::super) const ALL: &[u32] = &[$($name,)*];
    };
}

/// What a request asks for.
pub(super) mod op {
    opcodes! {
        LOOKUP = 1,
        FORGET = 2,
        GETATTR = 3,
        SETATTR = 4,
        READLINK = 5,
        SYMLINK = 6,
        MKNOD = 8,
        MKDIR = 9,
        UNLINK = 10,
        RMDIR = 11,
        RENAME = 12,
        LINK = 13,
        OPEN = 14,
        READ = 15,
        WRITE = 16,
        STATFS = 17,
        RELEASE = 18,
        FSYNC = 20,
        SETXATTR = 21,
        GETXATTR = 22,
        LISTXATTR = 23,
        REMOVEXATTR = 24,
        FLUSH = 25,
        INIT = 26,
        OPENDIR = 27,
        READDIR = 28,
        RELEASEDIR = 29,
        FSYNCDIR = 30,
        GETLK = 31,
        SETLK = 32,
        SETLKW = 33,
        ACCESS = 34,
        CREATE = 35,
        INTERRUPT = 36,
        BMAP = 37,
        DESTROY = 38,
        IOCTL = 39,
        POLL = 40,
        NOTIFY_REPLY = 41,
        BATCH_FORGET = 42,
        FALLOCATE = 43,
        READDIRPLUS = 44,
        RENAME2 = 45,
        LSEEK = 46,
        COPY_FILE_RANGE = 47,
        SETUPMAPPING = 48,
        REMOVEMAPPING = 49,
        SYNCFS = 50,
        TMPFILE = 51,
        STATX = 52,
        COPY_FILE_RANGE_64 = 53,
    }
}

/// Bits of INIT: 0 to 31 in `flags`, 32 and up in `flags2`, which counts only with `INIT_EXT`.
pub(super) mod init {
    pub(in super::super) const ASYNC_READ: u64 = 1 << 0;
    pub(in super::super) const BIG_WRITES: u64 = 1 << 5;
    pub(in super::super) const DONT_MASK: u64 = 1 << 6;
    pub(in super::super) const DO_READDIRPLUS: u64 = 1 << 13;
    pub(in super::super) const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub(in super::super) const ASYNC_DIO: u64 = 1 << 15;
    pub(in super::super) const WRITEBACK_CACHE: u64 = 1 << 16;
    pub(in super::super) const PARALLEL_DIROPS: u64 = 1 << 18;
    pub(in super::super) const POSIX_ACL: u64 = 1 << 20;
    pub(in super::super) const MAX_PAGES: u64 = 1 << 22;
    pub(in super::super) const CACHE_SYMLINKS: u64 = 1 << 23;
    pub(in super::super) const EXPLICIT_INVAL_DATA: u64 = 1 << 25;
    pub(in super::super) const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub(in super::super) const SETXATTR_EXT: u64 = 1 << 29;
    pub(in super::super) const INIT_EXT: u64 = 1 << 30;
    pub(in super::super) const PASSTHROUGH: u64 = 1 << 37;
    pub(in super::super) const NO_EXPORT_SUPPORT: u64 = 1 << 38;
    pub(in super::super) const OVER_IO_URING: u64 = 1 << 41;
}

/// Bits of `SetAttrIn::valid`.
pub(super) mod fattr {
    pub(in super::super) const MODE: u32 = 1 << 0;
    pub(in super::super) const UID: u32 = 1 << 1;
    pub(in super::super) const GID: u32 = 1 << 2;
    pub(in super::super) const SIZE: u32 = 1 << 3;
    pub(in super::super) const ATIME: u32 = 1 << 4;
    pub(in super::super) const MTIME: u32 = 1 << 5;
    pub(in super::super) const ATIME_NOW: u32 = 1 << 7;
    pub(in super::super) const MTIME_NOW: u32 = 1 << 8;
    pub(in super::super) const KILL_SUIDGID: u32 = 1 << 11;
}

/// Bits of `OpenOut::open_flags`.
pub(super) mod fopen {
    pub(in super::super) const KEEP_CACHE: u32 = 1 << 1;
    pub(in super::super) const CACHE_DIR: u32 = 1 << 3;
    pub(in super::super) const NOFLUSH: u32 = 1 << 5;
    pub(in super::super) const PASSTHROUGH: u32 = 1 << 7;
}

/// `WriteIn::write_flags`: the kernel writes back what it has collected.
pub(super) const WRITE_CACHE: u32 = 1 << 0;
/// `WriteIn::write_flags`: the writer may not keep setuid and setgid bits.
pub(super) const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// `FsyncIn::fsync_flags`: fdatasync(2).
pub(super) const FSYNC_FDATASYNC: u32 = 1 << 0;
/// `SetXattrIn::setxattr_flags`: an ACL set by somebody who may not keep setgid.
pub(super) const SETXATTR_ACL_KILL_SGID: u32 = 1 << 0;

/// Codes of what is sent without being asked.
pub(super) mod notify {
    pub(in super::super) const INVAL_INODE: i32 = 2;
}

/// Bits of `Statx::mask`, those of statx(2).
pub(super) mod stx {
    pub(in super::super) const BASIC_STATS: u32 = 0x7ff;
    pub(in super::super) const BTIME: u32 = 0x800;
}

/// Makes structures as they are on the wire, each with its size in the kernel's header.
macro_rules! wire {
    ($($(#[$doc:meta])* $name:ident: $size:literal { $($field:ident: $type:ty,)* })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C)]
        #[allow(dead_code, reason = "the kernel has these fields, whether or not they are read")]
        pub(super) struct $name { $(pub(super) $field: $type,)* }
        const _: () = assert!(size_of::<$name>() == $size, stringify!($name));
    )*};
}

wire! {
    /// Begins every request.
    InHeader: 40 {
        len: u32, opcode: u32, unique: u64, nodeid: u64, uid: u32, gid: u32, pid: u32,
        total_extlen: u16, padding: u16,
    }
    /// Begins every reply and notification.
    OutHeader: 16 { len: u32, error: i32, unique: u64, }

    Attr: 88 {
        ino: u64, size: u64, blocks: u64, atime: i64, mtime: i64, ctime: i64,
        atimensec: u32, mtimensec: u32, ctimensec: u32, mode: u32, nlink: u32, uid: u32, gid: u32,
        rdev: u32, blksize: u32, flags: u32,
    }
    EntryOut: 128 {
        nodeid: u64, generation: u64, entry_valid: u64, attr_valid: u64,
        entry_valid_nsec: u32, attr_valid_nsec: u32, attr: Attr,
    }
    AttrOut: 104 { attr_valid: u64, attr_valid_nsec: u32, dummy: u32, attr: Attr, }

    /// What INIT had before 7.36; the rest is [`InitInMore`].
    InitIn: 16 { major: u32, minor: u32, max_readahead: u32, flags: u32, }
    InitInMore: 48 { flags2: u32, unused: [u32; 11], }
    InitOut: 64 {
        major: u32, minor: u32, max_readahead: u32, flags: u32, max_background: u16,
        congestion_threshold: u16, max_write: u32, time_gran: u32, max_pages: u16,
        map_alignment: u16, flags2: u32, max_stack_depth: u32, request_timeout: u16,
        unused: [u16; 11],
    }

    ForgetIn: 8 { nlookup: u64, }
    BatchForgetIn: 8 { count: u32, dummy: u32, }
    ForgetOne: 16 { nodeid: u64, nlookup: u64, }
    MknodIn: 16 { mode: u32, rdev: u32, umask: u32, padding: u32, }
    MkdirIn: 8 { mode: u32, umask: u32, }
    RenameIn: 8 { newdir: u64, }
    Rename2In: 16 { newdir: u64, flags: u32, padding: u32, }
    LinkIn: 8 { oldnodeid: u64, }
    SetAttrIn: 88 {
        valid: u32, padding: u32, fh: u64, size: u64, lock_owner: u64, atime: i64, mtime: i64,
        ctime: i64, atimensec: u32, mtimensec: u32, ctimensec: u32, mode: u32, unused4: u32,
        uid: u32, gid: u32, unused5: u32,
    }
    OpenIn: 8 { flags: u32, open_flags: u32, }
    CreateIn: 16 { flags: u32, mode: u32, umask: u32, open_flags: u32, }
    /// `backing_id` was padding before 7.40.
    OpenOut: 16 { fh: u64, open_flags: u32, backing_id: i32, }
    ReleaseIn: 24 { fh: u64, flags: u32, release_flags: u32, lock_owner: u64, }
    FlushIn: 24 { fh: u64, unused: u32, padding: u32, lock_owner: u64, }
    /// Of READ, READDIR and READDIRPLUS.
    ReadIn: 40 {
        fh: u64, offset: u64, size: u32, read_flags: u32, lock_owner: u64, flags: u32, padding: u32,
    }
    WriteIn: 40 {
        fh: u64, offset: u64, size: u32, write_flags: u32, lock_owner: u64, flags: u32,
        padding: u32,
    }
    WriteOut: 8 { size: u32, padding: u32, }
    StatfsOut: 80 {
        blocks: u64, bfree: u64, bavail: u64, files: u64, ffree: u64, bsize: u32, namelen: u32,
        frsize: u32, padding: u32, spare: [u32; 6],
    }
    /// Of FSYNC and FSYNCDIR.
    FsyncIn: 16 { fh: u64, fsync_flags: u32, padding: u32, }
    SyncfsIn: 8 { padding: u64, }
    /// What SETXATTR has without `SETXATTR_EXT`; the rest is [`SetXattrInMore`].
    SetXattrIn: 8 { size: u32, flags: u32, }
    SetXattrInMore: 8 { setxattr_flags: u32, padding: u32, }
    /// Of GETXATTR and LISTXATTR.
    GetXattrIn: 8 { size: u32, padding: u32, }
    GetXattrOut: 8 { size: u32, padding: u32, }
    InterruptIn: 8 { unique: u64, }
    IoctlIn: 32 { fh: u64, flags: u32, cmd: u32, arg: u64, in_size: u32, out_size: u32, }
    IoctlOut: 16 { result: i32, flags: u32, in_iovs: u32, out_iovs: u32, }
    FallocateIn: 32 { fh: u64, offset: u64, length: u64, mode: u32, padding: u32, }
    LseekIn: 24 { fh: u64, offset: i64, whence: u32, padding: u32, }
    LseekOut: 8 { offset: i64, }
    /// Of both forms of COPY_FILE_RANGE.
    CopyFileRangeIn: 56 {
        fh_in: u64, off_in: u64, nodeid_out: u64, fh_out: u64, off_out: u64, len: u64, flags: u64,
    }
    CopyFileRangeOut: 8 { bytes_copied: u64, }

    SxTime: 16 { tv_sec: i64, tv_nsec: u32, reserved: i32, }
    StatxIn: 24 { getattr_flags: u32, reserved: u32, fh: u64, sx_flags: u32, sx_mask: u32, }
    Statx: 256 {
        mask: u32, blksize: u32, attributes: u64, nlink: u32, uid: u32, gid: u32, mode: u16,
        spare0: u16, ino: u64, size: u64, blocks: u64, attributes_mask: u64, atime: SxTime,
        btime: SxTime, ctime: SxTime, mtime: SxTime, rdev_major: u32, rdev_minor: u32,
        dev_major: u32, dev_minor: u32, spare2: [u64; 14],
    }
    StatxOut: 288 {
        attr_valid: u64, attr_valid_nsec: u32, flags: u32, spare: [u64; 2], stat: Statx,
    }

    /// Begins a name in a listing; the name follows, padded to eight bytes.
    Dirent: 24 { ino: u64, off: u64, namelen: u32, kind: u32, }

    /// A notification, its [`OutHeader`] included.
    InvalInode: 40 { len: u32, code: i32, unique: u64, nodeid: u64, off: i64, range: i64, }
}

impl InvalInode {
    /// What its length says.
    pub(super) const LEN: u32 = 40;
}
