//! The `fuser` crate as transport: decodes requests, translates node ids, encodes replies.
//!
//! `fuser` sends a node's inode number as its node id, so a node id on this wire *is* `attr.ino`,
//! except for the root, which the protocol calls 1 whatever its inode number is. A number that the
//! union does not know answers `ESTALE`, upon which the kernel looks the path up anew.
//!
//! `fuser` hides a few things that the kernel says: the setuid-killing bit of SETATTR (we judge by
//! the caller's uid instead) and whether a reply arrived. Requests it cannot parse it answers with
//! `ENOSYS`, which is right for all of them.
//!
//! Nothing here may panic: only the dispatcher catches that.

use super::ServeOptions;
use super::convert::{
    PERMISSIONS, attributes, bare_attributes, decode_dev, file_type, reply_errno, set_time,
    unknown_attributes,
};
use super::dispatch::{Answer, Asker, Dispatcher, Keep, XattrAnswer};
use crate::error::{Errno, Error, Result};
use crate::idmap::OuterId;
use crate::union::{
    Caller, Entry, FileType, NodeId, RenameFlags, SetAttr, Union, Visit, Writer, XattrFlags,
};
use ::fuser::{
    AccessFlags, BsdFileFlags, Config, CopyFileRangeFlags, FileAttr, FileHandle, Filesystem,
    FopenFlags, Generation, INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, Notifier,
    OpenAccMode, OpenFlags, PollEvents, PollFlags, PollNotifier, ReplyAttr, ReplyBmap, ReplyCreate,
    ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek,
    ReplyOpen, ReplyPoll, ReplyStatfs, ReplyWrite, ReplyXattr, Request, Session, SessionACL,
    TimeOrNow, WriteFlags,
};
use rustix::fs::{Mode, OFlags};
use std::cell::RefCell;
use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

/// Largest READ and WRITE we ask the kernel for, in bytes; also the most it would grant.
const TRANSFER_MAX: u32 = 1 << 20;

/// Largest READ answered, in bytes; bounds the buffer of a worker.
const READ_MAX: usize = 16 << 20;

/// Requests the kernel may have in flight that nobody waits for, such as read-ahead.
const BACKGROUND_MAX: u16 = 64;

/// Most bytes one COPY_FILE_RANGE may report: the reply has 32 bits, kept to whole pages.
const COPY_MAX: u64 = 0xffff_0000;

/// Longest name, in bytes.
const NAME_MAX: u32 = 255;

/// We keep no state per open, so no reply has a handle worth telling apart.
const NO_HANDLE: FileHandle = FileHandle(0);

/// Inode numbers tell nodes apart while the kernel knows them, so generations are all alike.
const GENERATION: Generation = Generation(0);

/// Capabilities to ask for, each only if offered.
///
/// Not among them, on purpose: `ATOMIC_O_TRUNC` (truncation must come as SETATTR),
/// `AUTO_INVAL_DATA` (the opposite of what we promise), locks (the kernel's local ones are right),
/// and those that `fuser` accepts but cannot parse: `SETXATTR_EXT`, `OVER_IO_URING`.
const CAPABILITIES: [InitFlags; 9] = [
    InitFlags::FUSE_ASYNC_READ,
    InitFlags::FUSE_BIG_WRITES,
    InitFlags::FUSE_PARALLEL_DIROPS,
    InitFlags::FUSE_DO_READDIRPLUS,
    InitFlags::FUSE_READDIRPLUS_AUTO,
    InitFlags::FUSE_CACHE_SYMLINKS,
    InitFlags::FUSE_EXPLICIT_INVAL_DATA,
    InitFlags::FUSE_DONT_MASK,
    InitFlags::FUSE_HANDLE_KILLPRIV_V2,
];

thread_local! {
    /// What READ is answered from; grows to the largest READ this worker has seen.
    static READ_BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Answers INIT on `device`, calls `on_ready`, and serves until the mount is gone.
///
/// # Errors
/// When the handshake fails, or the device fails otherwise than by the end of the mount.
pub(super) fn serve(
    device: OwnedFd,
    union: Arc<Union>,
    options: &ServeOptions,
    on_ready: impl FnOnce() + Send,
) -> Result<()> {
    let threads = options.threads.max(1);
    let mut config = Config::default();
    // The kernel keeps other users out unless the mount says `allow_other`. `fuser`'s own check
    // would also refuse what they may do with a descriptor that was handed to them.
    config.acl = SessionACL::All;
    config.n_threads = Some(threads);
    config.clone_fd = threads > 1 && can_open_device();
    let notifier = Arc::new(OnceLock::new());
    let server = Server {
        dispatch: Dispatcher::new(union, options),
        posix_acl: options.posix_acl,
        writeback: options.writeback,
        notifier: Arc::clone(&notifier),
        kernel_masks: true,
    };
    let clone_fd = config.clone_fd;
    let session = Session::from_fd(server, device, SessionACL::All, config)
        .map_err(|error| device_error("FUSE handshake", &error))?;
    // Empty until now, so it cannot fail.
    drop(notifier.set(session.notifier()));
    tracing::debug!(threads, clone_fd, ?options, "serving");
    on_ready();
    match session.run() {
        Ok(()) => Ok(()),
        Err(error) if is_end_of_mount(&error) => Ok(()),
        Err(error) => Err(device_error("read", &error)),
    }
}

/// Returns whether each worker can have a device descriptor of its own.
///
/// `fuser` gives up the whole session if not, after the kernel has had its handshake. The device
/// node may be out of reach where its descriptor was handed to us.
fn can_open_device() -> bool {
    let opened = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    if let Err(error) = &opened {
        tracing::debug!(%error, "/dev/fuse cannot be opened; the workers share one descriptor");
    }
    opened.is_ok()
}

/// Returns whether reading the device failed because the mount is gone.
fn is_end_of_mount(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ECONNABORTED))
}

/// Returns a failure of the device as our own error.
fn device_error(op: &'static str, error: &io::Error) -> Error {
    match error.raw_os_error() {
        Some(number) => Error::sys(op, "/dev/fuse", Errno::from_raw_os_error(number)),
        // `fuser` made it up; its sentence is all there is.
        None => Error::sys(op, format!("/dev/fuse ({error})"), Errno::IO),
    }
}

/// The filesystem that `fuser` calls.
struct Server {
    /// Where all requests go.
    dispatch: Dispatcher,
    /// Whether to ask for POSIX ACLs.
    posix_acl: bool,
    /// Whether to ask for a writeback cache.
    writeback: bool,
    /// Sends what the kernel must know without being asked; set before the first request.
    notifier: Arc<OnceLock<Notifier>>,
    /// Whether the kernel applies the umask before it sends a mode; settled by INIT, then immutable.
    kernel_masks: bool,
}

impl Server {
    /// Returns the node of a node id on the wire.
    fn node(&self, ino: INodeNo) -> Answer<NodeId> {
        if ino == INodeNo::ROOT { Ok(NodeId::ROOT) } else { self.dispatch.node_by_ino(ino.0) }
    }

    /// With HANDLE_KILLPRIV_V2 the kernel leaves setuid and setgid to us, and says so in WRITE only.
    fn before_change(&self, request: &Request, ino: INodeNo, node: NodeId) -> Answer<()> {
        if let Some(writer) = self.unprivileged(request)
            && self.dispatch.drop_privileges(node, writer)?
        {
            self.forget_attributes(ino);
        }
        Ok(())
    }

    /// Makes the kernel ask for the attributes again. Before the reply, so that nobody runs a program
    /// with a setuid bit that it has no more; of attributes alone, which waits for no other request.
    fn forget_attributes(&self, ino: INodeNo) {
        if let Some(notifier) = self.notifier.get()
            && let Err(error) = notifier.inval_inode(ino, -1, 0)
        {
            tracing::warn!(ino = ino.0, %error, "the kernel may remember an old mode");
        }
    }

    /// Returns a caller who is not the superuser, so may not keep setuid and setgid.
    fn unprivileged(&self, request: &Request) -> Option<Writer> {
        let is_root = self.dispatch.is_root(OuterId::asked(request.uid()));
        (!is_root).then(|| writer(request))
    }

    /// Returns who asks, and the umask that is left to apply.
    fn caller(&self, request: &Request, umask: u32) -> Caller {
        Caller {
            uid: OuterId::asked(request.uid()),
            gid: OuterId::asked(request.gid()),
            umask: if self.kernel_masks { 0 } else { umask },
        }
    }

    /// Returns the attributes of an entry for a reply that hands its node to the kernel.
    ///
    /// # Errors
    /// `EIO` if the inode number means something else as a node id: 0 is an absence, 1 the root.
    /// The lookup is taken back then.
    fn entry(&self, entry: &Entry) -> Answer<FileAttr> {
        if entry.attr.ino > INodeNo::ROOT.0 {
            return Ok(attributes(&entry.attr));
        }
        tracing::error!(node = entry.node.0, ino = entry.attr.ino, "inode number is not usable");
        self.dispatch.forget(entry.node, 1);
        Err(Errno::IO)
    }

    /// Answers a request that makes or finds a name.
    fn reply_entry(&self, answer: Answer<Entry>, reply: ReplyEntry) {
        match answer.and_then(|entry| self.entry(&entry)) {
            Ok(attr) => reply.entry(&self.dispatch.valid, &attr, GENERATION),
            Err(errno) => reply.error(reply_errno(errno)),
        }
    }
}

/// Answers a request that has no result but success.
fn reply_empty(answer: Answer<()>, reply: ReplyEmpty) {
    match answer {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(reply_errno(errno)),
    }
}

/// Answers an open.
fn reply_open(answer: Answer<Keep>, reply: ReplyOpen) {
    match answer {
        Ok(keep) => reply.opened(NO_HANDLE, open_flags(keep)),
        Err(errno) => reply.error(reply_errno(errno)),
    }
}

/// Answers GETXATTR and LISTXATTR.
fn reply_xattr(answer: Answer<XattrAnswer>, reply: ReplyXattr) {
    match answer {
        Ok(XattrAnswer::Size(size)) => reply.size(size),
        Ok(XattrAnswer::Data(data)) => reply.data(&data),
        Err(errno) => reply.error(reply_errno(errno)),
    }
}

/// Answers with a count of bytes.
fn reply_written(answer: Answer<usize>, reply: ReplyWrite) {
    match answer.and_then(|count| u32::try_from(count).map_err(|_too_many| Errno::OVERFLOW)) {
        Ok(count) => reply.written(count),
        Err(errno) => reply.error(reply_errno(errno)),
    }
}

/// Returns what the kernel may keep, as flags of an open reply.
fn open_flags(keep: Keep) -> FopenFlags {
    let mut flags = FopenFlags::empty();
    flags.set(FopenFlags::FOPEN_KEEP_CACHE, keep.pages);
    flags.set(FopenFlags::FOPEN_CACHE_DIR, keep.listing);
    flags.set(FopenFlags::FOPEN_NOFLUSH, keep.no_flush);
    flags
}

/// Returns a figure of statfs in the 32 bits the reply has for it.
fn saturate(figure: u64) -> u32 {
    u32::try_from(figure).unwrap_or(u32::MAX)
}

impl Filesystem for Server {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let offered = config.capabilities();
        let mut granted = InitFlags::empty();
        let acl = self.posix_acl.then_some(InitFlags::FUSE_POSIX_ACL);
        let writeback = self.writeback.then_some(InitFlags::FUSE_WRITEBACK_CACHE);
        for capability in CAPABILITIES.into_iter().chain(acl).chain(writeback) {
            match config.add_capabilities(capability) {
                Ok(()) => granted |= capability,
                Err(missing) => tracing::debug!(?missing, "capability not offered"),
            }
        }
        self.kernel_masks = !granted.contains(InitFlags::FUSE_DONT_MASK);
        if self.posix_acl && !granted.contains(InitFlags::FUSE_POSIX_ACL) {
            tracing::warn!("this kernel does not check POSIX ACLs on FUSE mounts");
        }
        // Refused only beyond bounds that these constants keep; read-ahead stays as offered and
        // times have nanoseconds without asking.
        if let Err(nearest) = config.set_max_write(TRANSFER_MAX) {
            tracing::warn!(nearest, "size of writes refused");
        }
        if let Err(nearest) = config.set_max_background(BACKGROUND_MAX) {
            tracing::warn!(nearest, "number of background requests refused");
        }
        tracing::debug!(abi = %config.kernel_abi(), ?offered, ?granted, "handshake");
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found =
            self.node(parent).and_then(|parent| self.dispatch.lookup(parent, name.as_bytes()));
        match found {
            Ok(Some(entry)) => self.reply_entry(Ok(entry), reply),
            // An entry with node id 0 is an absence that the kernel may keep.
            Ok(None) => {
                reply.entry(
                    &self.dispatch.valid,
                    &bare_attributes(0, FileType::Regular),
                    GENERATION,
                );
            }
            Err(errno) => reply.error(reply_errno(errno)),
        }
    }

    fn forget(&self, _request: &Request, ino: INodeNo, nlookup: u64) {
        // The root is never looked up, hence never forgotten.
        if ino != INodeNo::ROOT
            && let Ok(node) = self.node(ino)
        {
            self.dispatch.forget(node, nlookup);
        }
    }

    fn getattr(&self, _request: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.node(ino).and_then(|node| self.dispatch.getattr(node)) {
            Ok(attr) => reply.attr(&self.dispatch.valid, &attributes(&attr)),
            Err(errno) => reply.error(reply_errno(errno)),
        }
    }

    fn setattr(
        &self,
        request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let set = SetAttr {
            mode: mode.map(|mode| mode & PERMISSIONS),
            uid: uid.map(OuterId::asked),
            gid: gid.map(OuterId::asked),
            size,
            atime: atime.map(set_time),
            mtime: mtime.map(set_time),
            // The kernel's own bit for this does not get through `fuser`.
            kill_privileges: self.unprivileged(request),
        };
        let asks = Asker {
            writer: writer(request),
            uid: OuterId::asked(request.uid()),
            writes_past_us: false,
        };
        match self.node(ino).and_then(|node| self.dispatch.setattr(node, &set, Some(asks))) {
            Ok(attr) => reply.attr(&self.dispatch.valid, &attributes(&attr)),
            Err(errno) => reply.error(reply_errno(errno)),
        }
    }

    fn readlink(&self, _request: &Request, ino: INodeNo, reply: ReplyData) {
        match self.node(ino).and_then(|node| self.dispatch.readlink(node)) {
            Ok(target) => reply.data(&target),
            Err(errno) => reply.error(reply_errno(errno)),
        }
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let caller = self.caller(request, umask);
        let made = self.node(parent).and_then(|parent| {
            self.dispatch.mknod(&caller, parent, name.as_bytes(), mode, decode_dev(rdev))
        });
        self.reply_entry(made, reply);
    }

    fn mkdir(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        let caller = self.caller(request, umask);
        let made = self.node(parent).and_then(|parent| {
            self.dispatch.mkdir(&caller, parent, name.as_bytes(), mode & PERMISSIONS)
        });
        self.reply_entry(made, reply);
    }

    fn unlink(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let parent = self.node(parent);
        reply_empty(parent.and_then(|parent| self.dispatch.unlink(parent, name.as_bytes())), reply);
    }

    fn rmdir(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let parent = self.node(parent);
        reply_empty(parent.and_then(|parent| self.dispatch.rmdir(parent, name.as_bytes())), reply);
    }

    fn symlink(
        &self,
        request: &Request,
        parent: INodeNo,
        link_name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let caller = self.caller(request, 0);
        let target = target.as_os_str().as_bytes();
        let made = self.node(parent).and_then(|parent| {
            self.dispatch.symlink(&caller, parent, link_name.as_bytes(), target)
        });
        self.reply_entry(made, reply);
    }

    fn rename(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: ::fuser::RenameFlags,
        reply: ReplyEmpty,
    ) {
        let flags = RenameFlags::from_bits_retain(flags.bits());
        let renamed = self.node(parent).and_then(|parent| {
            let new_parent = self.node(newparent)?;
            self.dispatch.rename(parent, name.as_bytes(), new_parent, newname.as_bytes(), flags)
        });
        reply_empty(renamed, reply);
    }

    fn link(
        &self,
        _request: &Request,
        ino: INodeNo,
        newparent: INodeNo,
        newname: &OsStr,
        reply: ReplyEntry,
    ) {
        let linked = self.node(ino).and_then(|node| {
            let new_parent = self.node(newparent)?;
            self.dispatch.link(node, new_parent, newname.as_bytes())
        });
        self.reply_entry(linked, reply);
    }

    fn open(&self, _request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let write = flags.acc_mode() != OpenAccMode::O_RDONLY;
        reply_open(self.node(ino).and_then(|node| self.dispatch.open(node, write)), reply);
    }

    fn read(
        &self,
        _request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        if size > READ_MAX {
            reply.error(reply_errno(Errno::INVAL));
            return;
        }
        READ_BUFFER.with_borrow_mut(|buffer| {
            if buffer.len() < size {
                buffer.resize(size, 0);
            }
            let buffer = buffer.get_mut(..size).unwrap_or_default();
            let read =
                self.node(ino).and_then(|node| self.dispatch.read(node, offset, &mut *buffer));
            match read.and_then(|count| buffer.get(..count).ok_or(Errno::IO)) {
                Ok(data) => reply.data(data),
                Err(errno) => reply.error(reply_errno(errno)),
            }
        });
    }

    fn write(
        &self,
        request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let kill =
            write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID).then(|| writer(request));
        let collected = write_flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        let written = self
            .node(ino)
            .and_then(|node| self.dispatch.write(node, offset, data, kill, collected));
        if written.is_ok_and(|written| written.mode_changed) {
            self.forget_attributes(ino);
        }
        reply_written(written.map(|written| written.bytes), reply);
    }

    fn flush(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply_empty(self.dispatch.flush(), reply);
    }

    fn release(
        &self,
        _request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        reply_empty(self.node(ino).and_then(|node| self.dispatch.release(node)), reply);
    }

    fn fsync(
        &self,
        _request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        datasync: bool,
        reply: ReplyEmpty,
    ) {
        reply_empty(self.node(ino).and_then(|node| self.dispatch.fsync(node, datasync)), reply);
    }

    fn opendir(&self, _request: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        reply_open(self.node(ino).and_then(|node| self.dispatch.opendir(node)), reply);
    }

    fn readdir(
        &self,
        _request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let listed = self.node(ino).and_then(|node| {
            self.dispatch.readdir(node, offset, &mut |entry| {
                let name = OsStr::from_bytes(entry.name);
                match reply.add(INodeNo(entry.ino), entry.offset, file_type(entry.kind), name) {
                    true => Visit::Full,
                    false => Visit::Taken,
                }
            })
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(reply_errno(errno)),
        }
    }

    fn readdirplus(
        &self,
        _request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let listed = self.node(ino).and_then(|node| {
            self.dispatch.readdirplus(node, offset, &mut |listed, entry| {
                let attr = match entry {
                    Some(entry) => attributes(&entry.attr),
                    // The kernel neither caches nor counts these two, whatever their node id.
                    None if matches!(listed.name, b"." | b"..") => {
                        bare_attributes(listed.ino, listed.kind)
                    }
                    None => unknown_attributes(listed.kind),
                };
                let name = OsStr::from_bytes(listed.name);
                match reply.add(
                    attr.ino,
                    listed.offset,
                    name,
                    &self.dispatch.valid,
                    &attr,
                    GENERATION,
                ) {
                    true => Visit::Full,
                    false => Visit::Taken,
                }
            })
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(reply_errno(errno)),
        }
    }

    fn releasedir(
        &self,
        _request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        reply_empty(self.node(ino).and_then(|node| self.dispatch.releasedir(node)), reply);
    }

    fn fsyncdir(
        &self,
        _request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        reply_empty(self.node(ino).and_then(|node| self.dispatch.fsyncdir(node)), reply);
    }

    fn statfs(&self, _request: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        match self.dispatch.statfs() {
            Ok(figures) => reply.statfs(
                figures.f_blocks,
                figures.f_bfree,
                figures.f_bavail,
                figures.f_files,
                figures.f_ffree,
                saturate(figures.f_bsize),
                NAME_MAX,
                saturate(figures.f_frsize),
            ),
            Err(errno) => reply.error(reply_errno(errno)),
        }
    }

    fn setxattr(
        &self,
        request: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let flags = XattrFlags::from_bits_retain(flags.cast_unsigned());
        let unprivileged = self.unprivileged(request);
        let set = self.node(ino).and_then(|node| {
            self.dispatch.setxattr(node, name.as_bytes(), value, flags, unprivileged)
        });
        reply_empty(set, reply);
    }

    fn getxattr(
        &self,
        _request: &Request,
        ino: INodeNo,
        name: &OsStr,
        size: u32,
        reply: ReplyXattr,
    ) {
        let value =
            self.node(ino).and_then(|node| self.dispatch.getxattr(node, name.as_bytes(), size));
        reply_xattr(value, reply);
    }

    fn listxattr(&self, _request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        reply_xattr(self.node(ino).and_then(|node| self.dispatch.listxattr(node, size)), reply);
    }

    fn removexattr(&self, request: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let unprivileged = self.unprivileged(request);
        let removed = self
            .node(ino)
            .and_then(|node| self.dispatch.removexattr(node, name.as_bytes(), unprivileged));
        reply_empty(removed, reply);
    }

    fn access(&self, _request: &Request, _ino: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        // Permissions are the kernel's to check (`default_permissions`); this makes it stop asking.
        reply.error(reply_errno(Errno::NOSYS));
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        let caller = self.caller(request, umask);
        let created = self.node(parent).and_then(|parent| {
            let (entry, keep) =
                self.dispatch.create(&caller, parent, name.as_bytes(), mode & PERMISSIONS)?;
            match self.entry(&entry) {
                Ok(attr) => Ok((attr, keep)),
                Err(errno) => self.dispatch.release(entry.node).and(Err(errno)),
            }
        });
        match created {
            Ok((attr, keep)) => {
                reply.created(&self.dispatch.valid, &attr, GENERATION, NO_HANDLE, open_flags(keep));
            }
            Err(errno) => reply.error(reply_errno(errno)),
        }
    }

    fn bmap(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _blocksize: u32,
        _idx: u64,
        reply: ReplyBmap,
    ) {
        // There is no block device beneath.
        reply.error(reply_errno(Errno::NOSYS));
    }

    fn ioctl(
        &self,
        _request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        cmd: u32,
        in_data: &[u8],
        out_size: u32,
        reply: ReplyIoctl,
    ) {
        let out_size = usize::try_from(out_size).unwrap_or(usize::MAX);
        match self.node(ino).and_then(|node| self.dispatch.ioctl(node, cmd, in_data, out_size)) {
            Ok(data) => reply.ioctl(0, &data),
            Err(errno) => reply.error(reply_errno(errno)),
        }
    }

    fn poll(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _ph: PollNotifier,
        _events: PollEvents,
        _flags: PollFlags,
        reply: ReplyPoll,
    ) {
        // The kernel then takes every file for ready, as files are.
        reply.error(reply_errno(Errno::NOSYS));
    }

    fn fallocate(
        &self,
        request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let mode = mode.cast_unsigned();
        let done = self.node(ino).and_then(|node| {
            self.before_change(request, ino, node)?;
            self.dispatch.fallocate(node, mode, offset, length)
        });
        reply_empty(done, reply);
    }

    fn lseek(
        &self,
        _request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        match self.node(ino).and_then(|node| self.dispatch.lseek(node, offset, whence)) {
            Ok(found) => reply.offset(found),
            Err(errno) => reply.error(reply_errno(errno)),
        }
    }

    fn copy_file_range(
        &self,
        request: &Request,
        ino_in: INodeNo,
        _fh_in: FileHandle,
        offset_in: u64,
        ino_out: INodeNo,
        _fh_out: FileHandle,
        offset_out: u64,
        len: u64,
        flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let len = len.min(COPY_MAX);
        let copied = self.node(ino_in).and_then(|from| {
            let to = self.node(ino_out)?;
            self.before_change(request, ino_out, to)?;
            self.dispatch.copy_file_range(from, offset_in, to, offset_out, len, flags.bits())
        });
        reply_written(copied, reply);
    }
}
fn writer(request: &Request) -> Writer {
    Writer { gid: OuterId::asked(request.gid()), pid: request.pid() }
}
