//! Requests from the bytes that the device gave. Pure and total: whatever the bytes are, the answer
//! is a request or a reason, and no name of a request can lead out of a directory.

use super::abi::{self, op};
use crate::error::Errno;
use crate::union::NodeId;
use zerocopy::FromBytes;

/// What all requests have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) opcode: u32,
    /// What the reply is told apart by.
    pub(super) unique: u64,
    /// The object that it is about; 0 where it is about none.
    pub(super) node: NodeId,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// The thread that asks; 0 where it cannot be seen from the mount, or none does.
    pub(super) pid: u32,
}

/// A request, with what it borrows from the buffer that it was read into.
#[derive(Clone, Copy, Debug)]
pub(super) enum Request<'a> {
    Lookup {
        name: &'a [u8],
    },
    Forget {
        count: u64,
    },
    BatchForget(Forgets<'a>),
    GetAttr,
    Statx,
    SetAttr(abi::SetAttrIn),
    ReadLink,
    Symlink {
        name: &'a [u8],
        target: &'a [u8],
    },
    Mknod {
        name: &'a [u8],
        mode: u32,
        rdev: u32,
        umask: u32,
    },
    Mkdir {
        name: &'a [u8],
        mode: u32,
        umask: u32,
    },
    Unlink {
        name: &'a [u8],
    },
    Rmdir {
        name: &'a [u8],
    },
    Rename {
        name: &'a [u8],
        new_parent: NodeId,
        new_name: &'a [u8],
        flags: u32,
    },
    Link {
        node: NodeId,
        name: &'a [u8],
    },
    Open {
        flags: u32,
    },
    Read {
        offset: u64,
        size: u32,
    },
    Write {
        offset: u64,
        data: &'a [u8],
        kill_privileges: bool,
        collected: bool,
    },
    Statfs,
    Release,
    Fsync {
        data_only: bool,
    },
    SetXattr {
        name: &'a [u8],
        value: &'a [u8],
        flags: u32,
        kills_setgid: Option<bool>,
    },
    GetXattr {
        name: &'a [u8],
        size: u32,
    },
    ListXattr {
        size: u32,
    },
    RemoveXattr {
        name: &'a [u8],
    },
    Flush,
    OpenDir,
    ReadDir {
        offset: u64,
        size: u32,
        plus: bool,
    },
    ReleaseDir,
    FsyncDir,
    Create {
        name: &'a [u8],
        mode: u32,
        umask: u32,
    },
    Tmpfile {
        mode: u32,
        umask: u32,
    },
    /// A signal came for whoever waits for the request `unique`.
    Interrupt {
        unique: u64,
    },
    Destroy,
    Ioctl {
        command: u32,
        data: &'a [u8],
        out_size: u32,
    },
    Fallocate {
        mode: u32,
        offset: u64,
        len: u64,
    },
    Lseek {
        offset: i64,
        whence: u32,
    },
    CopyFileRange(CopyRange),
    Syncfs,
    /// One that is not served: the kernel does without.
    Unserved,
}

/// A range to be copied from the node of the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CopyRange {
    pub(super) from_offset: u64,
    pub(super) to: NodeId,
    pub(super) to_offset: u64,
    pub(super) len: u64,
    pub(super) flags: u64,
    /// The reply has 64 bits for what was copied.
    pub(super) wide: bool,
}

/// Nodes and how many lookups of each are taken back.
#[derive(Clone, Copy, Debug)]
pub(super) struct Forgets<'a>(&'a [u8]);

impl Iterator for Forgets<'_> {
    type Item = (NodeId, u64);

    fn next(&mut self) -> Option<Self::Item> {
        let (one, rest) = abi::ForgetOne::read_from_prefix(self.0).ok()?;
        self.0 = rest;
        Some((NodeId(one.nodeid), one.nlookup))
    }
}

/// Why bytes are no request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Malformed {
    /// What to answer; without a number there is nobody to answer.
    pub(super) unique: Option<u64>,
    /// The refusal.
    pub(super) errno: Errno,
}

/// Reads a request from `bytes`, all of which belong to it.
///
/// `setxattr_ext`: SETXATTR has its longer form, as agreed by INIT.
///
/// # Errors
/// `EIO` for lengths that do not agree; `EINVAL` for a name that is none.
pub(super) fn decode(bytes: &[u8], setxattr_ext: bool) -> Result<(Header, Request<'_>), Malformed> {
    let (raw, body) = abi::InHeader::read_from_prefix(bytes)
        .map_err(|_short| Malformed { unique: None, errno: Errno::IO })?;
    let header = Header {
        opcode: raw.opcode,
        unique: raw.unique,
        node: NodeId(raw.nodeid),
        uid: raw.uid,
        gid: raw.gid,
        pid: raw.pid,
    };
    let malformed = |errno| Malformed { unique: Some(raw.unique), errno };
    // Extensions stand at the end; none is asked for, so they are left out unread.
    let extensions = usize::from(raw.total_extlen) * 8;
    let body = body
        .len()
        .checked_sub(extensions)
        .and_then(|end| body.get(..end))
        .filter(|_| usize::try_from(raw.len) == Ok(bytes.len()))
        .ok_or_else(|| malformed(Errno::IO))?;
    let request = decode_body(raw.opcode, Body(body), setxattr_ext).map_err(malformed)?;
    Ok((header, request))
}

fn decode_body(opcode: u32, mut body: Body<'_>, setxattr_ext: bool) -> Result<Request<'_>, Errno> {
    Ok(match opcode {
        op::LOOKUP => Request::Lookup { name: body.name()? },
        op::FORGET => Request::Forget { count: body.take::<abi::ForgetIn>()?.nlookup },
        op::BATCH_FORGET => {
            let count = body.take::<abi::BatchForgetIn>()?.count;
            let len = u64::from(count) * size_of::<abi::ForgetOne>() as u64;
            Request::BatchForget(Forgets(body.bytes(len)?))
        }
        op::GETATTR => Request::GetAttr,
        op::STATX => Request::Statx,
        op::SETATTR => Request::SetAttr(body.take()?),
        op::READLINK => Request::ReadLink,
        op::SYMLINK => Request::Symlink { name: body.name()?, target: body.string()? },
        op::MKNOD => {
            let abi::MknodIn { mode, rdev, umask, .. } = body.take()?;
            Request::Mknod { name: body.name()?, mode, rdev, umask }
        }
        op::MKDIR => {
            let abi::MkdirIn { mode, umask } = body.take()?;
            Request::Mkdir { name: body.name()?, mode, umask }
        }
        op::UNLINK => Request::Unlink { name: body.name()? },
        op::RMDIR => Request::Rmdir { name: body.name()? },
        op::RENAME => {
            let new_parent = NodeId(body.take::<abi::RenameIn>()?.newdir);
            Request::Rename { name: body.name()?, new_parent, new_name: body.name()?, flags: 0 }
        }
        op::RENAME2 => {
            let abi::Rename2In { newdir, flags, .. } = body.take()?;
            let new_parent = NodeId(newdir);
            Request::Rename { name: body.name()?, new_parent, new_name: body.name()?, flags }
        }
        op::LINK => {
            let node = NodeId(body.take::<abi::LinkIn>()?.oldnodeid);
            Request::Link { node, name: body.name()? }
        }
        op::OPEN => Request::Open { flags: body.take::<abi::OpenIn>()?.flags },
        op::READ => {
            let abi::ReadIn { offset, size, .. } = body.take()?;
            Request::Read { offset, size }
        }
        op::WRITE => {
            let abi::WriteIn { offset, size, write_flags, .. } = body.take()?;
            let kill_privileges = write_flags & abi::WRITE_KILL_SUIDGID != 0;
            let collected = write_flags & abi::WRITE_CACHE != 0;
            Request::Write { offset, data: body.bytes(size.into())?, kill_privileges, collected }
        }
        op::STATFS => Request::Statfs,
        op::RELEASE => Request::Release,
        op::FSYNC => {
            let flags = body.take::<abi::FsyncIn>()?.fsync_flags;
            Request::Fsync { data_only: flags & abi::FSYNC_FDATASYNC != 0 }
        }
        op::SETXATTR => {
            let abi::SetXattrIn { size, flags } = body.take()?;
            let kills_setgid = if setxattr_ext {
                let more = body.take::<abi::SetXattrInMore>()?.setxattr_flags;
                Some(more & abi::SETXATTR_ACL_KILL_SGID != 0)
            } else {
                None
            };
            let name = body.string()?;
            Request::SetXattr { name, value: body.bytes(size.into())?, flags, kills_setgid }
        }
        op::GETXATTR => {
            let size = body.take::<abi::GetXattrIn>()?.size;
            Request::GetXattr { name: body.string()?, size }
        }
        op::LISTXATTR => Request::ListXattr { size: body.take::<abi::GetXattrIn>()?.size },
        op::REMOVEXATTR => Request::RemoveXattr { name: body.string()? },
        op::FLUSH => Request::Flush,
        op::OPENDIR => Request::OpenDir,
        op::READDIR | op::READDIRPLUS => {
            let abi::ReadIn { offset, size, .. } = body.take()?;
            Request::ReadDir { offset, size, plus: opcode == op::READDIRPLUS }
        }
        op::RELEASEDIR => Request::ReleaseDir,
        op::FSYNCDIR => Request::FsyncDir,
        op::CREATE => {
            let abi::CreateIn { mode, umask, .. } = body.take()?;
            Request::Create { name: body.name()?, mode, umask }
        }
        // Its name is a slash, which nobody reads.
        op::TMPFILE => {
            let abi::CreateIn { mode, umask, .. } = body.take()?;
            Request::Tmpfile { mode, umask }
        }
        op::INTERRUPT => Request::Interrupt { unique: body.take::<abi::InterruptIn>()?.unique },
        op::DESTROY => Request::Destroy,
        op::IOCTL => {
            let abi::IoctlIn { cmd: command, in_size, out_size, .. } = body.take()?;
            Request::Ioctl { command, data: body.bytes(in_size.into())?, out_size }
        }
        op::FALLOCATE => {
            let abi::FallocateIn { offset, length: len, mode, .. } = body.take()?;
            Request::Fallocate { mode, offset, len }
        }
        op::LSEEK => {
            let abi::LseekIn { offset, whence, .. } = body.take()?;
            Request::Lseek { offset, whence }
        }
        op::COPY_FILE_RANGE | op::COPY_FILE_RANGE_64 => {
            let raw = body.take::<abi::CopyFileRangeIn>()?;
            Request::CopyFileRange(CopyRange {
                from_offset: raw.off_in,
                to: NodeId(raw.nodeid_out),
                to_offset: raw.off_out,
                len: raw.len,
                flags: raw.flags,
                wide: opcode == op::COPY_FILE_RANGE_64,
            })
        }
        op::SYNCFS => Request::Syncfs,
        // Among them ACCESS, BMAP, POLL and locks: the kernel's own answers are the right ones.
        _ => Request::Unserved,
    })
}

/// What of a request has not been read yet.
struct Body<'a>(&'a [u8]);

impl<'a> Body<'a> {
    fn take<T: FromBytes>(&mut self) -> Result<T, Errno> {
        let (value, rest) = T::read_from_prefix(self.0).map_err(|_short| Errno::IO)?;
        self.0 = rest;
        Ok(value)
    }

    fn bytes(&mut self, len: u64) -> Result<&'a [u8], Errno> {
        let len = usize::try_from(len).map_err(|_huge| Errno::IO)?;
        let (taken, rest) = self.0.split_at_checked(len).ok_or(Errno::IO)?;
        self.0 = rest;
        Ok(taken)
    }

    /// Takes the bytes before the next NUL.
    fn string(&mut self) -> Result<&'a [u8], Errno> {
        let len = self.0.iter().position(|&byte| byte == 0).ok_or(Errno::IO)?;
        let taken = self.bytes(len as u64)?;
        self.bytes(1)?;
        Ok(taken)
    }

    /// Takes one name in a directory.
    fn name(&mut self) -> Result<&'a [u8], Errno> {
        let name = self.string()?;
        if name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') {
            return Err(Errno::INVAL);
        }
        Ok(name)
    }
}
