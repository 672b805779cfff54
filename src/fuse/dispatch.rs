//! What happens to a request whichever way it came: call the union, log, survive a panic, and say
//! what the kernel may keep.
//!
//! The [`Dispatcher`] has one method per request, in plain types. It knows no transport, takes no
//! lock and keeps no state of its own. Decoding, node ids on the wire and encoding are the
//! transport's.
//!
//! What the kernel shall do without us is answered `ENOSYS` here and nowhere else: FLUSH always, since
//! nothing is held back; OPEN, OPENDIR and CREATE where opens are no requests ([`IoMode::NoOpen`]; the
//! kernel then makes files by MKNOD); syncs on a volatile mount; LSEEK with a
//! writeback cache; xattrs where none are served.
//!
//! Only we change the tree, and the kernel sees each change that it asked for. So whatever it has
//! learned stays true: entries, absences and attributes are given for ever (unless `timeout` says how long), pages and listings are
//! kept over opens.

use super::ServeOptions;
use crate::error::{Errno, Error, Result};
use crate::idmap::OuterId;
use crate::options::IoMode;
use crate::union::{
    Attr, Caller, Data, DirEntry, Entry, NodeId, RenameFlags, SetAttr, SetTime, StatVfs, Union,
    Visit, Whence, Writer, Written, XattrFlags,
};
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

/// What a request is answered with: a value, or the number of the refusal.
pub(super) type Answer<T> = std::result::Result<T, Errno>;

/// How long the kernel may keep entries, absences and attributes: for ever.
///
/// 136 years; the kernel cuts it to its own longest time, so a larger number gains nothing.
const FOREVER: Duration = Duration::from_secs(u32::MAX as u64);

/// What the kernel may keep over an open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Keep {
    /// Pages cached by earlier opens stay good.
    pub(super) pages: bool,
    /// The listing of a directory may be answered from the cache.
    pub(super) listing: bool,
    /// A close has nothing to report, so FLUSH need not be sent.
    pub(super) no_flush: bool,
}

/// For files: all opens of a node share one page cache, and writes are answered when they are done.
const KEEP_FILE: Keep = Keep { pages: true, listing: false, no_flush: true };

/// For directories.
const KEEP_DIRECTORY: Keep = Keep { pages: true, listing: true, no_flush: false };

/// An extended attribute, or list of names, as the caller asked for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum XattrAnswer {
    /// The caller asked for the length, in bytes.
    Size(u32),
    /// The bytes; they fit.
    Data(Vec<u8>),
}

/// Attributes of a file as `FS_IOC_GETFLAGS` and its kin number them in the common layout of
/// ioctl numbers; the `32` ones are what a 32-bit process sends.
mod ioctl {
    pub(super) const GETFLAGS: u32 = 0x8008_6601;
    pub(super) const SETFLAGS: u32 = 0x4008_6602;
    pub(super) const GETFLAGS_32: u32 = 0x8004_6601;
    pub(super) const SETFLAGS_32: u32 = 0x4004_6602;
    pub(super) const FSGETXATTR: u32 = 0x801c_581f;
    pub(super) const FSSETXATTR: u32 = 0x401c_5820;
}

/// Carries requests to a [`Union`] and its answers back.
pub(super) struct Dispatcher {
    /// What is served.
    union: Arc<Union>,
    /// Whether syncs are skipped for the whole mount.
    volatile: bool,
    /// Whether opens are requests. If not there is no state per open, even for what is opened all
    /// the same (TMPFILE): whether its RELEASE comes is up to the kernel.
    io: IoMode,
    /// Whether the kernel collects writes. It then tells modification times whenever it likes, and
    /// knows of data that we have not seen yet.
    writeback: bool,
    /// Whether extended attributes are served.
    xattrs: bool,
    /// How long the kernel may keep what it is told of a name.
    pub(super) valid: Duration,
}

impl Dispatcher {
    /// Returns the dispatcher of `union`.
    pub(super) const fn new(union: Arc<Union>, options: &ServeOptions) -> Self {
        Self {
            union,
            volatile: options.volatile,
            io: options.io,
            writeback: options.writeback,
            xattrs: options.xattrs,
            valid: match options.timeout {
                Some(timeout) => timeout,
                None => FOREVER,
            },
        }
    }

    /// Refuses what opens, for good, where the kernel does that by itself.
    ///
    /// # Errors
    /// `ENOSYS`.
    fn opens(&self) -> Answer<()> {
        match self.io {
            IoMode::NoOpen => Err(Errno::NOSYS),
            IoMode::Open | IoMode::Passthrough => Ok(()),
        }
    }

    /// Returns the node whose inode number is `ino`, for transports whose node ids are those.
    ///
    /// # Errors
    /// `ESTALE` for a number that the kernel should have forgotten.
    pub(super) fn node_by_ino(&self, ino: u64) -> Answer<NodeId> {
        match catch_unwind(AssertUnwindSafe(|| self.union.node_by_ino(ino))) {
            Ok(Some(node)) => Ok(node),
            Ok(None) => {
                tracing::debug!(ino, "unknown node");
                Err(Errno::STALE)
            }
            Err(panic) => Err(self.panicked("node_by_ino", &*panic)),
        }
    }

    /// Looks up `name` in `parent`; `None` is an absence that the kernel may keep as well.
    pub(super) fn lookup(&self, parent: NodeId, name: &[u8]) -> Answer<Option<Entry>> {
        self.run("lookup", parent, name, || self.union.lookup(parent, name))
    }

    /// Takes back `count` lookups of `node`.
    pub(super) fn forget(&self, node: NodeId, count: u64) {
        let forgotten = self.run("forget", node, b"", || {
            self.union.forget(node, count);
            Ok(())
        });
        // There is no reply that could carry a failure, and `run` has logged it.
        forgotten.unwrap_or(());
    }

    /// Returns the attributes of `node`.
    pub(super) fn getattr(&self, node: NodeId) -> Answer<Attr> {
        self.run("getattr", node, b"", || self.union.getattr(node))
    }

    /// Changes attributes and returns them all.
    ///
    /// A change that names nothing (the kernel sends one for the change time alone) only returns
    /// them.
    pub(super) fn setattr(&self, node: NodeId, set: &SetAttr) -> Answer<Attr> {
        let nothing = set.mode.is_none()
            && set.uid.is_none()
            && set.gid.is_none()
            && set.size.is_none()
            && set.atime.is_none()
            && set.mtime.is_none();
        self.run("setattr", node, b"", || match set {
            _ if nothing => self.union.getattr(node),
            // What UNLINK, RENAME, LINK and SETXATTR are each followed by.
            SetAttr {
                mode: None,
                uid: None,
                gid: None,
                size: None,
                atime: None,
                mtime: Some(SetTime::At(time)),
                ..
            } if self.writeback && self.union.is_modified_at(node, *time)? => {
                self.union.getattr(node)
            }
            // A size that the file has, without a time: the kernel goes on showing the old one.
            SetAttr {
                mode: None,
                uid: None,
                gid: None,
                size: Some(size),
                atime: None,
                mtime: None,
                kill_privileges,
            } if self.writeback && self.union.getattr(node)?.size == *size => {
                if let Some(writer) = kill_privileges {
                    self.union.drop_privileges(node, *writer)?;
                }
                self.union.getattr(node)
            }
            set => self.union.setattr(node, set),
        })
    }

    /// Returns the target of a symbolic link.
    pub(super) fn readlink(&self, node: NodeId) -> Answer<Vec<u8>> {
        self.run("readlink", node, b"", || self.union.readlink(node))
    }

    /// Creates a file that is neither directory nor symbolic link; `mode` includes the type.
    pub(super) fn mknod(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &[u8],
        mode: u32,
        rdev: (u32, u32),
    ) -> Answer<Entry> {
        self.run("mknod", parent, name, || self.union.mknod(caller, parent, name, mode, rdev))
    }

    /// Creates a directory.
    pub(super) fn mkdir(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &[u8],
        mode: u32,
    ) -> Answer<Entry> {
        self.run("mkdir", parent, name, || self.union.mkdir(caller, parent, name, mode))
    }

    /// Creates a symbolic link.
    pub(super) fn symlink(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &[u8],
        target: &[u8],
    ) -> Answer<Entry> {
        self.run("symlink", parent, name, || self.union.symlink(caller, parent, name, target))
    }

    /// Gives `node` one more name.
    pub(super) fn link(&self, node: NodeId, new_parent: NodeId, new_name: &[u8]) -> Answer<Entry> {
        self.run("link", new_parent, new_name, || self.union.link(node, new_parent, new_name))
    }

    /// Removes a name that is not a directory's.
    pub(super) fn unlink(&self, parent: NodeId, name: &[u8]) -> Answer<()> {
        self.run("unlink", parent, name, || self.union.unlink(parent, name))
    }

    /// Removes an empty directory.
    pub(super) fn rmdir(&self, parent: NodeId, name: &[u8]) -> Answer<()> {
        self.run("rmdir", parent, name, || self.union.rmdir(parent, name))
    }

    /// Renames or exchanges, as renameat2(2) with `flags`.
    pub(super) fn rename(
        &self,
        parent: NodeId,
        name: &[u8],
        new_parent: NodeId,
        new_name: &[u8],
        flags: RenameFlags,
    ) -> Answer<()> {
        self.run("rename", parent, name, || {
            self.union.rename(parent, name, new_parent, new_name, flags)
        })
    }

    /// Opens a file, for writing too if `write`.
    ///
    /// # Errors
    /// `ENOSYS` where opens are no requests; the kernel asks once.
    pub(super) fn open(&self, node: NodeId, write: bool) -> Answer<Keep> {
        self.opens()?;
        self.run("open", node, b"", || self.union.open_file(node, write).map(|()| KEEP_FILE))
    }

    /// Creates a regular file that must not exist, and opens it.
    ///
    /// # Errors
    /// `ENOSYS` where opens are no requests; the kernel sends MKNOD then, now and later.
    pub(super) fn create(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &[u8],
        mode: u32,
    ) -> Answer<(Entry, Keep)> {
        self.opens()?;
        self.run("create", parent, name, || {
            self.union.create(caller, parent, name, mode).map(|entry| (entry, KEEP_FILE))
        })
    }

    /// Creates a regular file without a name, and opens it.
    pub(super) fn tmpfile(
        &self,
        caller: &Caller,
        parent: NodeId,
        mode: u32,
    ) -> Answer<(Entry, Keep)> {
        self.run("tmpfile", parent, b"", || {
            let entry = self.union.tmpfile(caller, parent, mode)?;
            if self.io == IoMode::NoOpen {
                self.union.release_file(entry.node);
            }
            Ok((entry, KEEP_FILE))
        })
    }

    /// Makes all that was written durable.
    ///
    /// # Errors
    /// `ENOSYS` on a volatile mount, as [`fsync`](Self::fsync).
    pub(super) fn syncfs(&self) -> Answer<()> {
        if self.volatile {
            return Err(Errno::NOSYS);
        }
        self.run("syncfs", NodeId::ROOT, b"", || self.union.sync_all())
    }

    /// Returns the file that holds the data of a node, if no other will ever take its place.
    pub(super) fn provider(&self, node: NodeId) -> Option<Arc<Data>> {
        self.run("provider", node, b"", || self.union.provider(node)).unwrap_or_default()
    }

    /// Tells whether a node lies in the upper layer.
    pub(super) fn is_upper(&self, node: NodeId) -> bool {
        self.run("is_upper", node, b"", || self.union.is_upper(node)).unwrap_or(true)
    }

    /// Tells whether the kernel has lookups of `node` left.
    pub(super) fn is_known(&self, node: NodeId) -> bool {
        self.run("is_known", node, b"", || self.union.is_upper(node)).is_ok()
    }

    /// Ends one open of a file.
    pub(super) fn release(&self, node: NodeId) -> Answer<()> {
        if self.io == IoMode::NoOpen {
            return Ok(());
        }
        self.run("release", node, b"", || {
            self.union.release_file(node);
            Ok(())
        })
    }

    /// Reads into `buf`; fewer bytes than it has room for mean the end of the file.
    pub(super) fn read(&self, node: NodeId, offset: u64, buf: &mut [u8]) -> Answer<usize> {
        self.run("read", node, b"", || self.union.read(node, offset, buf))
    }

    /// Writes `data`; `kill_privileges` takes the setuid and setgid bits away with it.
    pub(super) fn write(
        &self,
        node: NodeId,
        offset: u64,
        data: &[u8],
        kill_privileges: Option<Writer>,
    ) -> Answer<Written> {
        self.run("write", node, b"", || self.union.write(node, offset, data, kill_privileges))
    }

    /// Answers a close(2): nothing was held back, so there is nothing to report.
    ///
    /// # Errors
    /// `ENOSYS`: the kernel takes it for success and never asks again.
    #[expect(clippy::unused_self, reason = "a request like the others")]
    pub(super) const fn flush(&self) -> Answer<()> {
        Err(Errno::NOSYS)
    }

    /// Makes a file durable.
    ///
    /// # Errors
    /// `ENOSYS` on a volatile mount: the kernel takes it for success and never asks again.
    pub(super) fn fsync(&self, node: NodeId, data_only: bool) -> Answer<()> {
        if self.volatile {
            return Err(Errno::NOSYS);
        }
        self.run("fsync", node, b"", || self.union.fsync(node, data_only))
    }

    /// Makes the names in a directory durable.
    ///
    /// # Errors
    /// `ENOSYS` on a volatile mount, as [`fsync`](Self::fsync).
    pub(super) fn fsyncdir(&self, node: NodeId) -> Answer<()> {
        if self.volatile {
            return Err(Errno::NOSYS);
        }
        self.run("fsyncdir", node, b"", || self.union.sync_dir(node))
    }

    /// Takes setuid and setgid away before a change by somebody who may not keep them; tells whether
    /// the mode changed.
    pub(super) fn drop_privileges(&self, node: NodeId, writer: Writer) -> Answer<bool> {
        self.run("drop_privileges", node, b"", || self.union.drop_privileges(node, writer))
    }

    /// Allocates, punches or shifts space, as fallocate(2).
    pub(super) fn fallocate(&self, node: NodeId, mode: u32, offset: u64, len: u64) -> Answer<()> {
        self.run("fallocate", node, b"", || self.union.fallocate(node, mode, offset, len))
    }

    /// Finds the next data or hole, as lseek(2).
    ///
    /// # Errors
    /// `ENOSYS` where the kernel may have data that we have not seen: it then takes all of a file for
    /// data. `ENXIO` beyond the end; `EINVAL` for another `whence`, which the kernel never sends.
    pub(super) fn lseek(&self, node: NodeId, offset: i64, whence: i32) -> Answer<i64> {
        if self.writeback {
            return Err(Errno::NOSYS);
        }
        self.run("lseek", node, b"", || {
            let whence = match whence {
                libc::SEEK_DATA => Whence::Data,
                libc::SEEK_HOLE => Whence::Hole,
                _ => return Err(Errno::INVAL.into()),
            };
            let Ok(offset) = u64::try_from(offset) else {
                return Err(Errno::NXIO.into());
            };
            let found = self.union.lseek(node, offset, whence)?;
            i64::try_from(found).map_err(|_too_far| Errno::OVERFLOW.into())
        })
    }

    /// Copies between files, as copy_file_range(2); may copy less than `len`.
    ///
    /// # Errors
    /// `EINVAL` for flags, of which there are none yet.
    pub(super) fn copy_file_range(
        &self,
        from: NodeId,
        from_offset: u64,
        to: NodeId,
        to_offset: u64,
        len: u64,
        flags: u64,
    ) -> Answer<usize> {
        self.run("copy_file_range", from, b"", || {
            if flags != 0 {
                return Err(Errno::INVAL.into());
            }
            self.union.copy_file_range(from, from_offset, to, to_offset, len)
        })
    }

    /// Opens a directory.
    ///
    /// # Errors
    /// `ENOSYS` where opens are no requests; the kernel asks once.
    pub(super) fn opendir(&self, node: NodeId) -> Answer<Keep> {
        self.opens()?;
        self.run("opendir", node, b"", || self.union.open_dir(node).map(|()| KEEP_DIRECTORY))
    }

    /// Ends one open of a directory.
    pub(super) fn releasedir(&self, node: NodeId) -> Answer<()> {
        if self.io == IoMode::NoOpen {
            return Ok(());
        }
        self.run("releasedir", node, b"", || {
            self.union.release_dir(node);
            Ok(())
        })
    }

    /// Lists a directory from `offset` on until `visit` is full.
    ///
    /// A failure after the first entry is left to the next call, which will meet it first.
    pub(super) fn readdir(
        &self,
        node: NodeId,
        offset: u64,
        visit: &mut dyn FnMut(DirEntry<'_>) -> Visit,
    ) -> Answer<()> {
        let mut taken = false;
        self.run("readdir", node, b"", || {
            let listed = self.union.readdir(node, offset, &mut |entry| {
                let visited = visit(entry);
                taken |= visited == Visit::Taken;
                visited
            });
            unless_taken(listed, taken)
        })
    }

    /// Lists a directory with its entries, each of which counts as looked up once taken.
    ///
    /// A failure after the first entry is left to the next call: the reply must go out, or the
    /// kernel would never give those lookups back.
    pub(super) fn readdirplus(
        &self,
        node: NodeId,
        offset: u64,
        visit: &mut dyn FnMut(DirEntry<'_>, Option<&Entry>) -> Visit,
    ) -> Answer<()> {
        let mut taken = false;
        self.run("readdirplus", node, b"", || {
            let listed = self.union.readdirplus(node, offset, &mut |name, entry| {
                let visited = visit(name, entry);
                taken |= visited == Visit::Taken;
                visited
            });
            unless_taken(listed, taken)
        })
    }

    /// Returns the figures of the filesystem.
    pub(super) fn statfs(&self) -> Answer<StatVfs> {
        self.run("statfs", NodeId::ROOT, b"", || self.union.statfs())
    }

    /// Refuses, for good, what extended attributes are asked for where none are served.
    ///
    /// # Errors
    /// `ENOSYS`; the kernel says `EOPNOTSUPP` by itself from then on.
    fn serves_xattrs(&self) -> Answer<()> {
        if self.xattrs { Ok(()) } else { Err(Errno::NOSYS) }
    }

    /// Tells whether `uid` is the superuser, of the mount's namespace or of the layers'.
    pub(super) fn is_root(&self, uid: OuterId) -> bool {
        self.union.is_root(uid)
    }

    /// Returns an extended attribute, or its length if `size` is 0.
    ///
    /// An access list that the backing filesystem cannot have is absent, not unsupported: the
    /// kernel asks while it checks permissions, and takes any failure but absence for a refusal.
    ///
    /// # Errors
    /// `ENODATA` if there is none; `ERANGE` if it does not fit.
    pub(super) fn getxattr(&self, node: NodeId, name: &[u8], size: u32) -> Answer<XattrAnswer> {
        self.serves_xattrs()?;
        self.run("getxattr", node, name, || {
            let value = match self.union.getxattr(node, name) {
                Err(error)
                    if error.errno() == Errno::OPNOTSUPP
                        && name.starts_with(b"system.posix_acl_") =>
                {
                    None
                }
                other => other?,
            };
            fit(value.ok_or(Errno::NODATA)?, size)
        })
    }

    /// Returns the names of all extended attributes, or the length of the list if `size` is 0.
    ///
    /// # Errors
    /// `ERANGE` if it does not fit.
    pub(super) fn listxattr(&self, node: NodeId, size: u32) -> Answer<XattrAnswer> {
        self.serves_xattrs()?;
        self.run("listxattr", node, b"", || fit(self.union.listxattr(node)?, size))
    }

    /// Sets an extended attribute, as setxattr(2) with `flags`.
    pub(super) fn setxattr(
        &self,
        node: NodeId,
        name: &[u8],
        value: &[u8],
        flags: XattrFlags,
    ) -> Answer<()> {
        self.serves_xattrs()?;
        self.run("setxattr", node, name, || self.union.setxattr(node, name, value, flags))
    }

    /// Takes setgid away after somebody unprivileged of another group has set an ACL.
    pub(super) fn drop_foreign_setgid(&self, node: NodeId, writer: Writer) -> Answer<()> {
        self.run("drop_foreign_setgid", node, b"", || self.union.drop_foreign_setgid(node, writer))
    }

    /// Removes an extended attribute.
    pub(super) fn removexattr(&self, node: NodeId, name: &[u8]) -> Answer<()> {
        self.serves_xattrs()?;
        self.run("removexattr", node, name, || self.union.removexattr(node, name))
    }

    /// Gets or sets the flags of chattr(1), and returns `out_size` bytes of result.
    ///
    /// # Errors
    /// `ENOTTY` for every other command; `EINVAL` for sizes that do not match the command.
    pub(super) fn ioctl(
        &self,
        node: NodeId,
        command: u32,
        input: &[u8],
        out_size: usize,
    ) -> Answer<Vec<u8>> {
        self.run("ioctl", node, b"", || match command {
            ioctl::GETFLAGS | ioctl::GETFLAGS_32 => {
                let flags = self.union.get_flags(node)?;
                // The number says `long`, but the kernel passes an `int` on.
                match out_size {
                    4 => Ok(flags.to_ne_bytes().to_vec()),
                    8 => Ok(u64::from(flags).to_ne_bytes().to_vec()),
                    _ => Err(Errno::INVAL.into()),
                }
            }
            ioctl::SETFLAGS | ioctl::SETFLAGS_32 => {
                let flags = match (<[u8; 4]>::try_from(input), <[u8; 8]>::try_from(input)) {
                    (Ok(int), _) => u32::from_ne_bytes(int),
                    (_, Ok(long)) => u32::try_from(u64::from_ne_bytes(long))
                        .map_err(|_unknown_flags| Errno::OPNOTSUPP)?,
                    _ => return Err(Errno::INVAL.into()),
                };
                self.union.set_flags(node, flags).map(|()| Vec::new())
            }
            ioctl::FSGETXATTR => {
                let raw = self.union.get_fsxattr(node)?;
                if out_size == raw.len() { Ok(raw.to_vec()) } else { Err(Errno::INVAL.into()) }
            }
            ioctl::FSSETXATTR => {
                let Ok(raw) = <&[u8; 28]>::try_from(input) else {
                    return Err(Errno::INVAL.into());
                };
                self.union.set_fsxattr(node, raw).map(|()| Vec::new())
            }
            _ => Err(Errno::NOTTY.into()),
        })
    }

    /// Runs one request: logs it and its result, and turns a panic into `EIO`.
    ///
    /// `ENOSYS` never gets through from below: the kernel would take it for our own word that the
    /// request is not implemented, and never send its like again.
    fn run<T>(
        &self,
        op: &'static str,
        node: NodeId,
        name: &[u8],
        request: impl FnOnce() -> Result<T>,
    ) -> Answer<T> {
        match catch_unwind(AssertUnwindSafe(request)) {
            Ok(Ok(value)) => {
                tracing::debug!(op, node = node.0, name = %name.escape_ascii(), "ok");
                Ok(value)
            }
            Ok(Err(error)) => {
                log_refusal(op, node, name, &error);
                Err(match error.errno() {
                    Errno::NOSYS => Errno::OPNOTSUPP,
                    errno => errno,
                })
            }
            Err(panic) => Err(self.panicked(op, &*panic)),
        }
    }

    /// Logs a panic, stops all further changes, and returns what to answer.
    ///
    /// A panic is a bug of ours and may have left a table half changed; what is on disk is whole,
    /// since every change is published in one step, and shall stay so.
    pub(super) fn panicked(&self, op: &'static str, panic: &(dyn Any + Send)) -> Errno {
        let message = panic
            .downcast_ref::<&str>()
            .copied()
            .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
            .unwrap_or("no message");
        tracing::error!(op, message, "a request panicked; the mount is read-only from now on");
        self.union.poison();
        Errno::IO
    }
}

/// Logs a failed request at the level of its cause: the caller's mistakes low, the disk's higher.
fn log_refusal(op: &'static str, node: NodeId, name: &[u8], error: &Error) {
    let node = node.0;
    let name = name.escape_ascii();
    match error {
        Error::Corrupt { .. } => tracing::error!(op, node, %name, %error, "refused"),
        Error::Sys { errno: Errno::IO | Errno::UCLEAN | Errno::NFILE | Errno::MFILE, .. } => {
            tracing::warn!(op, node, %name, %error, "refused");
        }
        Error::Refused(_)
        | Error::Sys { .. }
        | Error::Unsupported { .. }
        | Error::Invalid { .. }
        | Error::NoSuchLayer { .. }
        | Error::LayerExists { .. }
        | Error::Busy { .. } => tracing::debug!(op, node, %name, %error, "refused"),
    }
}

/// Forgets the failure of a listing that has entries to show.
fn unless_taken(listed: Result<()>, taken: bool) -> Result<()> {
    if taken { Ok(()) } else { listed }
}

/// Returns `value` or its length, as a caller with room for `size` bytes wants it.
fn fit(value: Vec<u8>, size: u32) -> Result<XattrAnswer> {
    let Ok(len) = u32::try_from(value.len()) else {
        return Err(Errno::TOOBIG.into());
    };
    match size {
        0 => Ok(XattrAnswer::Size(len)),
        room if len <= room => Ok(XattrAnswer::Data(value)),
        _ => Err(Errno::RANGE.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xattr_answers_fit_or_refuse() {
        let value = || b"12345".to_vec();
        for (size, expected) in [
            (0, Ok(XattrAnswer::Size(5))),
            (4, Err(Errno::RANGE)),
            (5, Ok(XattrAnswer::Data(value()))),
            (6, Ok(XattrAnswer::Data(value()))),
        ] {
            assert_eq!(fit(value(), size).map_err(|error| error.errno()), expected, "{size}");
        }
        assert!(matches!(fit(Vec::new(), 0), Ok(XattrAnswer::Size(0))));
    }

    #[test]
    fn a_listing_with_entries_hides_its_failure() {
        assert!(unless_taken(Err(Errno::IO.into()), true).is_ok());
        assert!(unless_taken(Err(Errno::IO.into()), false).is_err());
        assert!(unless_taken(Ok(()), false).is_ok());
    }
}
