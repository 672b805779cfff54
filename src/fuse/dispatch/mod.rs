//! What happens to a request whichever way it came: call the union, log, survive a panic, and say
//! what the kernel may keep.
//!
//! The [`Dispatcher`] has one method per request, in plain types. It knows no transport, takes no
//! lock and keeps no state of its own. Decoding, node ids on the wire and encoding are the
//! transport's. [`mod@file`], [`directory`] and [`xattr`] have the requests of those, this file the rest.
//!
//! What the kernel shall do without us is answered `ENOSYS` here and nowhere else: FLUSH always, since
//! nothing is held back; OPEN, OPENDIR and CREATE where opens are no requests ([`IoMode::NoOpen`]; the
//! kernel then makes files by MKNOD); syncs on a volatile mount; LSEEK with a
//! writeback cache; xattrs where none are served.
//!
//! Only we change the tree, and the kernel sees each change that it asked for. So whatever it has
//! learned stays true: entries, absences and attributes are given for ever (unless `timeout` says how long), pages and listings are
//! kept over opens.

mod directory;
mod file;
mod xattr;

pub(super) use self::xattr::XattrAnswer;
use super::ServeOptions;
use crate::error::{Errno, Error, Result};
use crate::idmap::OuterId;
use crate::options::IoMode;
use crate::sys::process::may_keep_setuid;
use crate::sys::stat::SETIDS;
use crate::union::{
    Attr, Caller, Entry, NodeId, RenameFlags, SetAttr, SetTime, StatVfs, Union, Writer,
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

/// Who changes attributes, where the kernel leaves setuid and setgid to us.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asker {
    pub(super) writer: Writer,
    /// Its filesystem user id.
    pub(super) uid: OuterId,
    /// The file is open for writing past us.
    pub(super) writes_past_us: bool,
}

impl Asker {
    /// Tells whether a change that names nothing may be the word of a write to a file that has setuid or setgid
    /// to lose by it: of a write past us, or of one through an overlay above, which has the user id of whoever
    /// mounted that. The owner could take them away by other means.
    fn announces_write(&self, attr: &Attr) -> bool {
        attr.mode & libc::S_IFMT == libc::S_IFREG
            && attr.mode & SETIDS != 0
            && (self.uid.is_root() || self.uid == attr.uid || self.writes_past_us)
    }
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

    /// Notes that a signal came for whoever waits for request `unique`.
    pub(super) fn interrupt(&self, unique: u64) {
        self.union.interrupt(unique);
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
    /// A kernel that leaves setuid and setgid to us has a process that `asks`. It sends a change that
    /// names nothing before it writes to a file that has something to lose by that: one of these bits,
    /// or capabilities, which go whoever writes. There may be no other word of it: a write in
    /// passthrough is none, and one through an overlay above comes with the privilege of whoever mounted
    /// that. But chown(2) to nobody by a stranger is the same request, and takes nothing away.
    pub(super) fn setattr(&self, node: NodeId, set: &SetAttr, asks: Option<Asker>) -> Answer<Attr> {
        let nothing = set.mode.is_none()
            && set.uid.is_none()
            && set.gid.is_none()
            && set.size.is_none()
            && set.atime.is_none()
            && set.mtime.is_none();
        let without_privileges = |kill: Option<Writer>| {
            if let Some(writer) = kill {
                self.union.drop_privileges(node, writer)?;
            }
            self.union.getattr(node)
        };
        let changed = self.run("setattr", node, b"", || match set {
            _ if nothing => {
                let attr = self.union.getattr(node)?;
                match asks.filter(|asks| asks.announces_write(&attr)) {
                    Some(asks) if may_keep_setuid(asks.writer.pid) != Some(true) => {
                        without_privileges(Some(asks.writer))
                    }
                    _ => Ok(attr),
                }
            }
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
                ..
            } if self.writeback && self.union.getattr(node)?.size == *size => {
                without_privileges(set.kill_privileges)
            }
            SetAttr { mtime: Some(SetTime::At(time)), .. } if self.writeback => {
                // Before, so that a write in between does not give the old one back.
                let before = self.union.keep_modified(node, Some(*time))?;
                self.union.setattr(node, set).inspect_err(|_| {
                    // Gone by now, or the same as just before.
                    drop(self.union.keep_modified(node, before));
                })
            }
            set => self.union.setattr(node, set),
        })?;
        // An overlay above cuts with its own privilege as well, and nothing is sent before.
        if set.size.is_some()
            && set.kill_privileges.is_none()
            && changed.mode & SETIDS != 0
            && let Some(Asker { writer, .. }) = asks
            && may_keep_setuid(writer.pid) == Some(false)
        {
            return self.run("drop_privileges", node, b"", || without_privileges(Some(writer)));
        }
        Ok(changed)
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

    /// Tells whether a node lies in the upper layer.
    pub(super) fn is_upper(&self, node: NodeId) -> bool {
        self.run("is_upper", node, b"", || self.union.is_upper(node)).unwrap_or(true)
    }

    /// Tells whether the kernel has lookups of `node` left.
    pub(super) fn is_known(&self, node: NodeId) -> bool {
        self.run("is_known", node, b"", || self.union.is_upper(node)).is_ok()
    }

    /// Returns the figures of the filesystem.
    pub(super) fn statfs(&self) -> Answer<StatVfs> {
        self.run("statfs", NodeId::ROOT, b"", || self.union.statfs())
    }

    /// Tells whether `uid` is the superuser, of the mount's namespace or of the layers'.
    pub(super) fn is_root(&self, uid: OuterId) -> bool {
        self.union.is_root(uid)
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
