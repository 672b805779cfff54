//! One request after the other: from bytes to a call of the dispatcher and its answer to bytes.
//!
//! Knows no device: a test plays the kernel by handing bytes in. A node id on this wire is the
//! union's own, never an inode number.

use super::abi::{self, fattr, fopen, init, stx};
use super::decode::{self, CopyRange, Header, Malformed, Request};
use super::handshake::Terms;
use super::notify::Notifier;
use super::passthrough::Passthrough;
use super::pool::Serve;
use super::reply::{Gives, Reply};
use crate::error::Errno;
use crate::fuse::RequestCounts;
use crate::fuse::convert::{PERMISSIONS, decode_dev, encode_dev, reply_number};
use crate::fuse::dispatch::{Answer, Asker, Dispatcher, Keep, XattrAnswer};
use crate::idmap::OuterId;
use crate::sys::xattr::CAPABILITY;
use crate::union::{
    self, Attr, Caller, Entry, FileType, NodeId, RenameFlags, SetAttr, SetTime, Time, Visit,
    Writer, XattrFlags,
};
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use zerocopy::{Immutable, IntoBytes};

/// Most bytes that one COPY_FILE_RANGE with a short reply may report, kept to whole pages.
const COPY_MAX: u64 = 0xffff_0000;

/// Longest name, in bytes.
const NAME_MAX: u32 = 255;

/// Nanoseconds in a second.
const NANOS: u32 = 1_000_000_000;

/// What serves the requests of one mount.
pub(super) struct Session {
    pub(super) dispatch: Dispatcher,
    pub(super) terms: Terms,
    /// Tells the kernel what it did not ask.
    pub(super) notifier: Notifier,
    /// Present where the kernel may serve files by itself.
    pub(super) passthrough: Option<Passthrough>,
    pub(super) counts: Arc<RequestCounts>,
}

impl Serve for Session {
    /// A request that panics is answered `EIO`, and is the last that may change anything.
    fn serve<'a>(&self, bytes: &[u8], reply: &'a mut Reply) -> Option<&'a [u8]> {
        reply.clear();
        let setxattr_ext = self.terms.has(init::SETXATTR_EXT);
        let (header, request) = match decode::decode(bytes, setxattr_ext) {
            Ok(decoded) => decoded,
            Err(Malformed { unique, errno }) => {
                tracing::error!(?unique, %errno, "the device gave a request that makes no sense");
                return unique.map(|unique| reply.refuse(unique, reply_number(errno)));
            }
        };
        self.counts.count(header.opcode);
        union::serve(header.unique, header.pid);
        let answer = catch_unwind(AssertUnwindSafe(|| self.answer(&header, &request, reply)));
        let answer = answer
            .unwrap_or_else(|panic| Some(Err(self.dispatch.panicked("transport", &*panic))))?;
        match answer {
            Ok(()) => Some(reply.finish(header.unique)),
            Err(errno) => {
                // A refusal gives nothing, whatever was put before it.
                self.take_back(reply);
                Some(reply.refuse(header.unique, reply_number(errno)))
            }
        }
    }

    fn rest(&self) {
        self.dispatch.read_ahead();
    }

    fn end(&self) {
        self.dispatch.end_reading_ahead();
    }

    fn take_back(&self, reply: &mut Reply) {
        let Gives { lookup, open, open_dir, listed } = std::mem::take(&mut reply.gives);
        // What cannot be taken back was logged, and there is nobody to tell.
        if let Some(node) = open {
            self.release(node).unwrap_or(());
        }
        if let Some(node) = open_dir {
            self.dispatch.releasedir(node).unwrap_or(());
        }
        // Last: until then the node is known.
        if let Some(node) = lookup {
            self.dispatch.forget(node, 1);
        }
        if listed {
            reply.listed().for_each(|node| self.dispatch.forget(node, 1));
        }
    }
}

impl Session {
    /// Serves one request; `None` where the kernel wants no answer.
    fn answer(
        &self,
        header: &Header,
        request: &Request<'_>,
        reply: &mut Reply,
    ) -> Option<Answer<()>> {
        let node = header.node;
        Some(match *request {
            Request::Forget { count } => {
                self.forget(node, count);
                return None;
            }
            // No answer: the kernel reads one as "try again", or as "never again". Tried again, it
            // would ask the worker that got this one, not the one that has the request.
            Request::Interrupt { unique } => {
                self.dispatch.interrupt(unique);
                return None;
            }
            Request::BatchForget(forgets) => {
                forgets.for_each(|(node, count)| self.forget(node, count));
                return None;
            }
            Request::Lookup { name } => self.lookup(node, name, reply),
            Request::GetAttr => {
                self.dispatch.getattr(node).and_then(|attr| self.put_attr(&attr, reply))
            }
            Request::Statx => {
                self.dispatch.getattr(node).and_then(|attr| self.put_statx(&attr, reply))
            }
            Request::SetAttr(raw) => self.setattr(header, &raw, reply),
            Request::ReadLink => {
                self.dispatch.readlink(node).and_then(|target| put_bytes(&target, reply))
            }
            Request::Symlink { name, target } => {
                let caller = self.caller(header, 0);
                self.put_entry(self.dispatch.symlink(&caller, node, name, target), reply)
            }
            Request::Mknod { name, mode, rdev, umask } => {
                let caller = self.caller(header, umask);
                let rdev = decode_dev(rdev);
                self.put_entry(self.dispatch.mknod(&caller, node, name, mode, rdev), reply)
            }
            Request::Mkdir { name, mode, umask } => {
                let caller = self.caller(header, umask);
                self.put_entry(self.dispatch.mkdir(&caller, node, name, mode & PERMISSIONS), reply)
            }
            Request::Unlink { name } => self.dispatch.unlink(node, name),
            Request::Rmdir { name } => self.dispatch.rmdir(node, name),
            Request::Rename { name, new_parent, new_name, flags } => {
                let flags = RenameFlags::from_bits_retain(flags);
                self.dispatch.rename(node, name, new_parent, new_name, flags)
            }
            Request::Link { node: linked, name } => {
                self.put_entry(self.dispatch.link(linked, node, name), reply)
            }
            Request::Open { flags } => {
                let write = flags & libc::O_ACCMODE.cast_unsigned() != 0;
                let opened = self.dispatch.open(node, write);
                opened.and_then(|keep| self.put_opened(node, write, keep, reply))
            }
            Request::OpenDir => {
                let opened = self.dispatch.opendir(node);
                reply.gives.open_dir = opened.is_ok().then_some(node);
                opened.and_then(|keep| put_open(keep, None, reply))
            }
            Request::Create { name, mode, umask } => {
                let caller = self.caller(header, umask);
                let created = self.dispatch.create(&caller, node, name, mode & PERMISSIONS);
                self.put_created(created, reply)
            }
            Request::Tmpfile { mode, umask } => {
                let caller = self.caller(header, umask);
                self.put_created(self.dispatch.tmpfile(&caller, node, mode & PERMISSIONS), reply)
            }
            Request::Read { offset, size } => self.read(header, offset, size, reply),
            Request::Write { offset, data, kill_privileges, collected } => {
                let kill = self.write_kills(header, kill_privileges);
                self.write(node, offset, data, (kill, collected), reply)
            }
            Request::ReadDir { offset, size, plus } => {
                let limit = usize::try_from(size).unwrap_or(usize::MAX);
                if plus {
                    self.readdirplus(node, offset, limit, reply)
                } else {
                    self.readdir(node, offset, limit, reply)
                }
            }
            Request::Statfs => self.statfs(reply),
            Request::Flush => self.dispatch.flush(),
            Request::Release => self.release(node),
            Request::ReleaseDir => self.dispatch.releasedir(node),
            Request::Syncfs => self.dispatch.syncfs(),
            Request::Fsync { data_only } => self.dispatch.fsync(node, data_only),
            Request::FsyncDir => self.dispatch.fsyncdir(node),
            Request::SetXattr { name, value, flags, kills_setgid } => {
                self.setxattr(header, name, value, flags, kills_setgid)
            }
            Request::GetXattr { name, size } => {
                put_xattr(self.dispatch.getxattr(node, name, size), reply)
            }
            Request::ListXattr { size } => put_xattr(self.dispatch.listxattr(node, size), reply),
            // The kernel does not say whether an ACL takes setgid with it.
            Request::RemoveXattr { name } => {
                self.dispatch.removexattr(node, name, self.unprivileged(header))
            }
            Request::Ioctl { command, data, out_size } => {
                self.ioctl(node, command, data, out_size, reply)
            }
            Request::Fallocate { mode, offset, len } => self
                .before_change(header, node)
                .and_then(|()| self.dispatch.fallocate(node, mode, offset, len)),
            Request::Lseek { offset, whence } => {
                let found = self.dispatch.lseek(node, offset, whence.cast_signed());
                found.and_then(|offset| put(&abi::LseekOut { offset }, reply))
            }
            Request::CopyFileRange(range) => self.copy_file_range(header, &range, reply),
            Request::Destroy => Ok(()),
            Request::Unserved => Err(Errno::NOSYS),
        })
    }

    /// Ends one open of a file.
    fn release(&self, node: NodeId) -> Answer<()> {
        if let Some(passthrough) = &self.passthrough {
            passthrough.released(node, &self.notifier);
            // The kernel hands out forgets first, so this one may have overtaken us.
            if !self.dispatch.is_known(node) {
                passthrough.forgot(node);
            }
        }
        self.dispatch.release(node)
    }

    /// Takes lookups back. The root was never looked up.
    fn forget(&self, node: NodeId, count: u64) {
        if node != NodeId::ROOT {
            self.dispatch.forget(node, count);
            if let Some(passthrough) = &self.passthrough {
                passthrough.forgot(node);
            }
        }
    }

    /// Returns who asks, and the umask that is left to apply.
    fn caller(&self, header: &Header, umask: u32) -> Caller {
        let umask = if self.terms.has(init::DONT_MASK) { umask } else { 0 };
        Caller { uid: OuterId::asked(header.uid), gid: OuterId::asked(header.gid), umask }
    }

    /// Takes setuid and setgid away where the kernel leaves it to us without a word in the request.
    fn before_change(&self, header: &Header, node: NodeId) -> Answer<()> {
        if self.terms.has(init::HANDLE_KILLPRIV_V2)
            && let Some(writer) = self.unprivileged(header)
            && self.dispatch.drop_privileges(node, writer)?
        {
            self.notifier.forget_attributes(node);
        }
        Ok(())
    }

    /// Returns the writer whose WRITE takes setuid and setgid away. Kernels that leave nothing to us
    /// have done so, but for the setgid bit of another group's file that nobody runs.
    fn write_kills(&self, header: &Header, is_told: bool) -> Option<Writer> {
        if self.terms.has(init::HANDLE_KILLPRIV_V2) {
            return is_told.then(|| writer(header));
        }
        self.unprivileged(header)
    }

    /// Returns a caller who is not the superuser, so may not keep setuid and setgid.
    fn unprivileged(&self, header: &Header) -> Option<Writer> {
        let is_root = self.dispatch.is_root(OuterId::asked(header.uid));
        (!is_root).then(|| writer(header))
    }

    fn lookup(&self, parent: NodeId, name: &[u8], reply: &mut Reply) -> Answer<()> {
        match self.dispatch.lookup(parent, name)? {
            Some(entry) => self.put_entry(Ok(entry), reply),
            // An entry without a node is an absence that the kernel may keep.
            None => {
                let (entry_valid, entry_valid_nsec) = self.valid();
                put(&abi::EntryOut { entry_valid, entry_valid_nsec, ..Default::default() }, reply)
            }
        }
    }

    fn setattr(&self, header: &Header, raw: &abi::SetAttrIn, reply: &mut Reply) -> Answer<()> {
        let has = |flag| raw.valid & flag != 0;
        let time = |given, now, sec, nsec| match (has(now), has(given)) {
            (true, _) => Ok(Some(SetTime::Now)),
            (_, true) if nsec < NANOS => Ok(Some(SetTime::At(Time { sec, nsec }))),
            (_, true) => Err(Errno::INVAL),
            (false, false) => Ok(None),
        };
        // With a change of owner the flag always stands, as chown(2) clears setuid for everybody.
        // Kernels that leave nothing to us send what they take for the mode after chown(2) or
        // truncate(2), with the setgid bit of another group's file. A call that changes both is not
        // known.
        let is_left = self.terms.has(init::HANDLE_KILLPRIV_V2);
        let changes_mode = !is_left && raw.valid & (fattr::UID | fattr::GID | fattr::SIZE) != 0;
        let kill = match (has(fattr::KILL_SUIDGID), has(fattr::SIZE)) {
            (true, true) => Some(writer(header)),
            (true, false) => self.unprivileged(header),
            (false, _) if changes_mode => self.unprivileged(header),
            (false, _) => None,
        };
        let set = SetAttr {
            mode: (has(fattr::MODE) && !changes_mode).then_some(raw.mode & PERMISSIONS),
            uid: has(fattr::UID).then(|| OuterId::asked(raw.uid)),
            gid: has(fattr::GID).then(|| OuterId::asked(raw.gid)),
            size: has(fattr::SIZE).then_some(raw.size),
            atime: time(fattr::ATIME, fattr::ATIME_NOW, raw.atime, raw.atimensec)?,
            mtime: time(fattr::MTIME, fattr::MTIME_NOW, raw.mtime, raw.mtimensec)?,
            kill_privileges: kill,
        };
        let asks = is_left.then(|| Asker {
            writer: writer(header),
            uid: OuterId::asked(header.uid),
            writes_past_us: self
                .passthrough
                .as_ref()
                .is_some_and(|passthrough| passthrough.is_written(header.node)),
        });
        self.put_attr(&self.dispatch.setattr(header.node, &set, asks)?, reply)
    }

    fn read(&self, header: &Header, offset: u64, size: u32, reply: &mut Reply) -> Answer<()> {
        let node = header.node;
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        if let Some(pipes) = reply.pipes().filter(|pipes| pipes.takes(size)) {
            let file = self.dispatch.readable(node)?;
            if file.may_splice() {
                match pipes.fill(file.as_fd(), offset, size, header.unique) {
                    Ok(Some(filled)) => {
                        reply.fill(filled);
                        return Ok(());
                    }
                    Ok(None) => {}
                    // Reading tells the same, or works.
                    Err(_) => file.cannot_splice(),
                }
            }
        }
        let room = reply.room(size).ok_or(Errno::INVAL)?;
        let count = self.dispatch.read(node, offset, room)?;
        reply.took(count);
        Ok(())
    }

    fn write(
        &self,
        node: NodeId,
        offset: u64,
        data: &[u8],
        (kill, collected): (Option<Writer>, bool),
        reply: &mut Reply,
    ) -> Answer<()> {
        let written = self.dispatch.write(node, offset, data, kill, collected)?;
        if written.mode_changed {
            self.notifier.forget_attributes(node);
        }
        put_written(written.bytes, reply)
    }

    fn readdir(&self, node: NodeId, offset: u64, limit: usize, reply: &mut Reply) -> Answer<()> {
        self.dispatch.readdir(node, offset, &mut |entry| {
            let dirent = dirent(entry.ino, entry.offset, entry.kind, entry.name);
            visited(reply.put_name(limit, None, &dirent, entry.name))
        })
    }

    fn readdirplus(
        &self,
        node: NodeId,
        offset: u64,
        limit: usize,
        reply: &mut Reply,
    ) -> Answer<()> {
        reply.gives.listed = true;
        self.dispatch.readdirplus(node, offset, &mut |listed, entry| {
            let dirent = dirent(listed.ino, listed.offset, listed.kind, listed.name);
            // Without a node the kernel takes the name alone, and looks it up when it must.
            let out = entry.map(|entry| self.entry_out(entry)).unwrap_or_default();
            visited(reply.put_name(limit, Some(&out), &dirent, listed.name))
        })
    }

    fn statfs(&self, reply: &mut Reply) -> Answer<()> {
        let figures = self.dispatch.statfs()?;
        let out = abi::StatfsOut {
            blocks: figures.f_blocks,
            bfree: figures.f_bfree,
            bavail: figures.f_bavail,
            files: figures.f_files,
            ffree: figures.f_ffree,
            bsize: saturate(figures.f_bsize),
            namelen: NAME_MAX,
            frsize: saturate(figures.f_frsize),
            ..Default::default()
        };
        put(&out, reply)
    }

    fn setxattr(
        &self,
        header: &Header,
        name: &[u8],
        value: &[u8],
        flags: u32,
        kills_setgid: Option<bool>,
    ) -> Answer<()> {
        let flags = XattrFlags::from_bits_retain(flags);
        let unprivileged = match kills_setgid {
            Some(kills) => kills.then(|| writer(header)),
            // Kernels that do not say: those without SETXATTR_EXT, before Linux 5.12.
            None => self.unprivileged(header),
        };
        self.dispatch.setxattr(header.node, name, value, flags, unprivileged)?;
        if let Some(passthrough) = &self.passthrough
            && name == CAPABILITY
        {
            passthrough.ask_again(header.node);
        }
        Ok(())
    }

    fn ioctl(
        &self,
        node: NodeId,
        command: u32,
        data: &[u8],
        out_size: u32,
        reply: &mut Reply,
    ) -> Answer<()> {
        let out_size = usize::try_from(out_size).unwrap_or(usize::MAX);
        let result = self.dispatch.ioctl(node, command, data, out_size)?;
        put(&abi::IoctlOut::default(), reply)?;
        put_bytes(&result, reply)
    }

    fn copy_file_range(&self, header: &Header, range: &CopyRange, reply: &mut Reply) -> Answer<()> {
        let &CopyRange { from_offset, to, to_offset, len, flags, wide } = range;
        self.before_change(header, to)?;
        let len = if wide { len } else { len.min(COPY_MAX) };
        let copied =
            self.dispatch.copy_file_range(header.node, from_offset, to, to_offset, len, flags)?;
        if wide {
            return put(&abi::CopyFileRangeOut { bytes_copied: copied as u64 }, reply);
        }
        put_written(copied, reply)
    }

    /// How long the kernel may keep what it is told: seconds and nanoseconds.
    const fn valid(&self) -> (u64, u32) {
        (self.dispatch.valid.as_secs(), self.dispatch.valid.subsec_nanos())
    }

    fn put_attr(&self, attr: &Attr, reply: &mut Reply) -> Answer<()> {
        let (attr_valid, attr_valid_nsec) = self.valid();
        put(&abi::AttrOut { attr_valid, attr_valid_nsec, dummy: 0, attr: wire_attr(attr) }, reply)
    }

    fn put_statx(&self, attr: &Attr, reply: &mut Reply) -> Answer<()> {
        let (attr_valid, attr_valid_nsec) = self.valid();
        let stat = wire_statx(attr);
        put(&abi::StatxOut { attr_valid, attr_valid_nsec, stat, ..Default::default() }, reply)
    }

    fn put_entry(&self, answer: Answer<Entry>, reply: &mut Reply) -> Answer<()> {
        let entry = answer?;
        reply.gives.lookup = Some(entry.node);
        put(&self.entry_out(&entry), reply)
    }

    fn put_created(&self, answer: Answer<(Entry, Keep)>, reply: &mut Reply) -> Answer<()> {
        let (entry, keep) = answer?;
        let node = entry.node;
        self.put_entry(Ok(entry), reply)?;
        self.put_opened(node, true, keep, reply)
    }

    /// Appends how a file was opened, by whom it is served included.
    fn put_opened(
        &self,
        node: NodeId,
        write: bool,
        mut keep: Keep,
        reply: &mut Reply,
    ) -> Answer<()> {
        reply.gives.open = Some(node);
        let Some(passthrough) = &self.passthrough else { return put_open(keep, None, reply) };
        let provider = || self.dispatch.provider(node);
        let id = passthrough.opened(node, write, provider);
        // Pages of a time before somebody wrote past them.
        keep.pages &= id.is_none() && !self.dispatch.is_upper(node);
        put_open(keep, id, reply)
    }

    fn entry_out(&self, entry: &Entry) -> abi::EntryOut {
        let (valid, nanos) = self.valid();
        abi::EntryOut {
            nodeid: entry.node.0,
            // A node id is never used twice.
            generation: 0,
            entry_valid: valid,
            attr_valid: valid,
            entry_valid_nsec: nanos,
            attr_valid_nsec: nanos,
            attr: wire_attr(&entry.attr),
        }
    }
}

fn writer(header: &Header) -> Writer {
    Writer { gid: OuterId::asked(header.gid), pid: header.pid }
}

/// Appends a structure that always fits.
fn put(value: &(impl IntoBytes + Immutable), reply: &mut Reply) -> Answer<()> {
    if reply.put(value) { Ok(()) } else { Err(Errno::IO) }
}

/// Appends bytes.
///
/// # Errors
/// `E2BIG` if they are more than the largest reply holds.
fn put_bytes(bytes: &[u8], reply: &mut Reply) -> Answer<()> {
    if reply.put_bytes(bytes) { Ok(()) } else { Err(Errno::TOOBIG) }
}

/// Appends what an open may keep, and by which number the kernel serves it. There is no handle: I/O
/// is by node.
fn put_open(keep: Keep, backing: Option<i32>, reply: &mut Reply) -> Answer<()> {
    let mut open_flags = backing.map_or(0, |_| fopen::PASSTHROUGH);
    for (wanted, flag) in [
        (keep.pages, fopen::KEEP_CACHE),
        (keep.listing, fopen::CACHE_DIR),
        (keep.no_flush, fopen::NOFLUSH),
    ] {
        if wanted {
            open_flags |= flag;
        }
    }
    let backing_id = backing.unwrap_or_default();
    put(&abi::OpenOut { open_flags, backing_id, ..Default::default() }, reply)
}

fn put_written(count: usize, reply: &mut Reply) -> Answer<()> {
    let size = u32::try_from(count).map_err(|_too_many| Errno::OVERFLOW)?;
    put(&abi::WriteOut { size, padding: 0 }, reply)
}

fn put_xattr(answer: Answer<XattrAnswer>, reply: &mut Reply) -> Answer<()> {
    match answer? {
        XattrAnswer::Size(size) => put(&abi::GetXattrOut { size, padding: 0 }, reply),
        XattrAnswer::Data(data) => put_bytes(&data, reply),
    }
}

/// Returns a figure of statfs in the 32 bits the reply has for it.
fn saturate(figure: u64) -> u32 {
    u32::try_from(figure).unwrap_or(u32::MAX)
}

const fn visited(fits: bool) -> Visit {
    if fits { Visit::Taken } else { Visit::Full }
}

fn dirent(ino: u64, off: u64, kind: FileType, name: &[u8]) -> abi::Dirent {
    let namelen = u32::try_from(name.len()).unwrap_or(u32::MAX);
    abi::Dirent { ino, off, namelen, kind: wire_kind(kind) }
}

/// Returns the type of an object as listings have it, `DT_REG` and the like.
const fn wire_kind(kind: FileType) -> u32 {
    let kind = match kind {
        FileType::Regular => libc::DT_REG,
        FileType::Directory => libc::DT_DIR,
        FileType::Symlink => libc::DT_LNK,
        FileType::Fifo => libc::DT_FIFO,
        FileType::Socket => libc::DT_SOCK,
        FileType::CharDevice => libc::DT_CHR,
        FileType::BlockDevice => libc::DT_BLK,
    };
    kind as u32
}

fn wire_attr(attr: &Attr) -> abi::Attr {
    abi::Attr {
        ino: attr.ino,
        size: attr.size,
        blocks: attr.blocks,
        atime: attr.atime.sec,
        mtime: attr.mtime.sec,
        ctime: attr.ctime.sec,
        atimensec: attr.atime.nsec,
        mtimensec: attr.mtime.nsec,
        ctimensec: attr.ctime.nsec,
        mode: attr.mode,
        nlink: attr.nlink,
        uid: attr.uid.to_show(),
        gid: attr.gid.to_show(),
        rdev: encode_dev(attr.rdev_major, attr.rdev_minor),
        blksize: attr.blksize,
        flags: 0,
    }
}

fn wire_statx(attr: &Attr) -> abi::Statx {
    let time = |time: Time| abi::SxTime { tv_sec: time.sec, tv_nsec: time.nsec, reserved: 0 };
    // Filesystems without a time of birth show none at all.
    let born = attr.btime != Time { sec: 0, nsec: 0 };
    abi::Statx {
        mask: stx::BASIC_STATS | if born { stx::BTIME } else { 0 },
        blksize: attr.blksize,
        nlink: attr.nlink,
        uid: attr.uid.to_show(),
        gid: attr.gid.to_show(),
        mode: u16::try_from(attr.mode & 0xffff).unwrap_or(0),
        ino: attr.ino,
        size: attr.size,
        blocks: attr.blocks,
        atime: time(attr.atime),
        btime: time(attr.btime),
        ctime: time(attr.ctime),
        mtime: time(attr.mtime),
        rdev_major: attr.rdev_major,
        rdev_minor: attr.rdev_minor,
        ..Default::default()
    }
}
