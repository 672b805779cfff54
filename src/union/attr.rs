//! Attributes: what stat(2) shows and what chmod, chown, truncate and utimens change.

use std::os::fd::AsFd;
use std::sync::Arc;

use parking_lot::MutexGuard;
use rustix::fs::{StatVfs, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};

use super::copy_up::Extent;
use super::file::Data;
use super::look::Carrier;
use super::node::{Node, NodeId};
use super::owner::Owner;
use super::protect::Change;
use super::{Union, lock};
use crate::error::{Context, Errno, Result};
use crate::idmap::{Ids, InnerId, OuterId};
use crate::layer::{self, UPPER};
use crate::overrides::Form;
use crate::sys;
use crate::sys::stat::Statx;
use crate::sys::xattr::Target;

/// A point in time as the kernel has it: `nsec` always counts forward from `sec`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Time {
    /// Seconds since the epoch, negative before it.
    pub sec: i64,
    /// Nanoseconds, below 1,000,000,000.
    pub nsec: u32,
}

/// Types of objects.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FileType {
    /// Regular file.
    Regular,
    /// Directory.
    Directory,
    /// Symbolic link.
    Symlink,
    /// Named pipe.
    Fifo,
    /// Unix socket.
    Socket,
    /// Character device.
    CharDevice,
    /// Block device.
    BlockDevice,
}

impl FileType {
    /// Returns the type that `S_IFMT` of a mode names; what no system has is a regular file.
    pub fn of_mode(mode: u32) -> Self {
        match mode & libc::S_IFMT {
            libc::S_IFDIR => Self::Directory,
            libc::S_IFLNK => Self::Symlink,
            libc::S_IFIFO => Self::Fifo,
            libc::S_IFSOCK => Self::Socket,
            libc::S_IFCHR => Self::CharDevice,
            libc::S_IFBLK => Self::BlockDevice,
            _ => Self::Regular,
        }
    }
}

impl FileType {
    /// Returns the `S_IFMT` bits of a mode.
    pub(super) fn to_mode(self) -> u32 {
        match self {
            Self::Regular => libc::S_IFREG,
            Self::Directory => libc::S_IFDIR,
            Self::Symlink => libc::S_IFLNK,
            Self::Fifo => libc::S_IFIFO,
            Self::Socket => libc::S_IFSOCK,
            Self::CharDevice => libc::S_IFCHR,
            Self::BlockDevice => libc::S_IFBLK,
        }
    }
}

/// Attributes of an object of the union.
#[derive(Clone, Debug)]
pub struct Attr {
    /// Inode number, stable while the mount lives.
    pub ino: u64,
    /// Size in bytes.
    pub size: u64,
    /// Allocated blocks of 512 bytes.
    pub blocks: u64,
    /// Preferred I/O size in bytes.
    pub blksize: u32,
    /// Type and permission bits.
    pub mode: u32,
    /// Number of names; 1 for a directory with parts in several layers.
    pub nlink: u32,
    /// Owner.
    pub uid: OuterId,
    /// Group.
    pub gid: OuterId,
    /// Major number of a device.
    pub rdev_major: u32,
    /// Minor number of a device.
    pub rdev_minor: u32,
    /// Last access.
    pub atime: Time,
    /// Last change of content.
    pub mtime: Time,
    /// Last change of anything.
    pub ctime: Time,
    /// Creation, where the filesystem knows it.
    pub btime: Time,
}

impl Attr {
    /// Returns the type of the object.
    pub fn kind(&self) -> FileType {
        FileType::of_mode(self.mode)
    }

    pub(super) fn new(stat: &Statx, ino: u64, nlink: u32, ids: &Ids) -> Self {
        let time = |time: rustix::fs::StatxTimestamp| Time { sec: time.tv_sec, nsec: time.tv_nsec };
        Self {
            ino,
            size: stat.stx_size,
            blocks: stat.stx_blocks,
            blksize: stat.stx_blksize,
            mode: u32::from(stat.stx_mode),
            nlink,
            uid: ids.users.show(InnerId::stored(stat.stx_uid)),
            gid: ids.groups.show(InnerId::stored(stat.stx_gid)),
            rdev_major: stat.stx_rdev_major,
            rdev_minor: stat.stx_rdev_minor,
            atime: time(stat.stx_atime),
            mtime: time(stat.stx_mtime),
            ctime: time(stat.stx_ctime),
            btime: time(stat.stx_btime),
        }
    }
}

/// A time to set.
#[derive(Clone, Copy, Debug)]
pub enum SetTime {
    /// The time of the call.
    Now,
    /// This one.
    At(Time),
}

/// What to change; `None` leaves it.
#[derive(Default, Clone, Debug)]
pub struct SetAttr {
    /// Permission bits, 0o7777.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<OuterId>,
    /// Group.
    pub gid: Option<OuterId>,
    /// Size in bytes.
    pub size: Option<u64>,
    /// Last access.
    pub atime: Option<SetTime>,
    /// Last change of content.
    pub mtime: Option<SetTime>,
    /// Clear setuid and setgid with a change of size or owner, because the caller may not keep them.
    pub kill_privileges: Option<Writer>,
}

impl SetAttr {
    fn is_empty(&self) -> bool {
        self.mode.is_none()
            && self.uid.is_none()
            && self.gid.is_none()
            && self.size.is_none()
            && self.atime.is_none()
            && self.mtime.is_none()
    }

    fn times(&self) -> Option<Timestamps> {
        if self.atime.is_none() && self.mtime.is_none() {
            return None;
        }
        Some(Timestamps {
            last_access: timespec(self.atime),
            last_modification: timespec(self.mtime),
        })
    }
}

fn timespec(time: Option<SetTime>) -> Timespec {
    match time {
        None => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        Some(SetTime::Now) => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
        Some(SetTime::At(at)) => Timespec { tv_sec: at.sec, tv_nsec: at.nsec.into() },
    }
}

/// Who changes a file and may not keep setuid and setgid, but for those of a group of theirs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Writer {
    /// Its filesystem group id.
    pub gid: OuterId,
    /// Its number, by which further groups are found; 0 if it cannot be seen from here.
    pub pid: u32,
}

/// Returns the access and modification times of an object, to give them to a copy.
pub(super) fn times_of(stat: &Statx) -> Timestamps {
    let time = |time: rustix::fs::StatxTimestamp| Timespec {
        tv_sec: time.tv_sec,
        tv_nsec: time.tv_nsec.into(),
    };
    Timestamps { last_access: time(stat.stx_atime), last_modification: time(stat.stx_mtime) }
}

/// Makes what statx(2) says of the object of `node` what users see of it.
pub(super) fn show(node: &Node, stat: &mut Statx) {
    let kind = FileType::of_mode(u32::from(stat.stx_mode));
    if node.kind == FileType::CharDevice && kind == FileType::Regular {
        sys::stat::show_as_whiteout(stat);
    }
}

/// Returns what an object of a layer of this form is seen as.
fn seen(form: Option<Form>, target: Target<'_>, stat: Statx) -> std::result::Result<Statx, Errno> {
    form.map_or(Ok(stat), |form| layer::seen(form, target, stat))
}

impl Union {
    /// Returns the permission bits without setgid, if they have it and the object is of another group.
    fn without_foreign_setgid(&self, stat: &Statx, writer: Writer) -> Option<u32> {
        let mode = u32::from(stat.stx_mode) & 0o7777;
        let foreign = mode & libc::S_ISGID != 0 && !self.is_of_group(stat, writer);
        foreign.then_some(mode & !libc::S_ISGID)
    }

    /// Tells whether `writer` is a member of an object's group, or may keep setgid all the same.
    ///
    /// Looks the writer's process up if need be, so it is asked last.
    pub(super) fn is_of_group(&self, stat: &Statx, writer: Writer) -> bool {
        let gid = self.ids.groups.show(InnerId::stored(stat.stx_gid));
        // Ids of nobody all have one number, whether or not they are one.
        let is_somebody =
            |id| id != OuterId::NONE && id != OuterId::asked(InnerId::OVERFLOW.to_store());
        let uid = self.ids.users.show(InnerId::stored(stat.stx_uid));
        gid == writer.gid
            || is_somebody(gid)
                && sys::process::may_keep_setgid(writer.pid, gid.to_show(), is_somebody(uid))
    }

    /// Returns the attributes of a node.
    ///
    /// # Errors
    /// `ESTALE` for an unknown node; those of statx(2).
    pub fn getattr(&self, node: NodeId) -> Result<Attr> {
        let node = self.node(node)?;
        self.attr_of(&node)
    }

    pub(super) fn attr_of(&self, node: &Arc<Node>) -> Result<Attr> {
        let stat = self.stat_of(node)?;
        Ok(self.attr_from(node, &stat))
    }

    pub(super) fn stat_of(&self, node: &Arc<Node>) -> Result<Statx> {
        if let Some(dir) = &node.dir {
            return dir.top().ok_or(Errno::STALE)?.stat();
        }
        let data = node.data.lock().clone();
        if let Some(data) = data.filter(|data| !data.lent) {
            return self.stat_of_data(&data);
        }
        let mut stat = self.with_form(node, |form| {
            self.with_leaf(node, "statx", |leaf| {
                let (stat, target) = match leaf {
                    super::Leaf::Handle(fd) => (sys::stat::of(fd)?, Target::Handle(fd)),
                    super::Leaf::Name(at) => (sys::stat::at(at.dir, at.name)?, Target::Name(at)),
                };
                seen(form, target, stat)
            })
        })?;
        show(node, &mut stat);
        Ok(stat)
    }

    /// Returns the attributes of a node that is no directory, for somebody who has the names of one
    /// locked, under which `found` was found: [`Union::attr_of`] would lock the names of the directory
    /// that the node knows, this one or any other. What lies under a name that it has left meanwhile is not
    /// taken for it.
    pub(super) fn attr_of_alias(&self, node: &Arc<Node>, found: &Statx) -> Result<Attr> {
        // Held on to: another thread may close it, and then only the name would lead there.
        let data = node.data.lock().clone();
        if let Some(data) = data.filter(|data| !data.lent) {
            return self.stat_of_data(&data).map(|stat| self.attr_from(node, &stat));
        }
        if node.links.get().is_some_and(|links| links.lock().anchored) {
            // Reached without a name, for good.
            return self.attr_of(node);
        }
        let (held, parent, name, layer, object) = {
            let place = node.place.read();
            let parent = place.parent.clone();
            (place.held().cloned(), parent, place.name.clone(), place.layer, place.object)
        };
        let form = self.form(layer);
        let mut stat = if let Some(held) = held {
            sys::stat::of(&held)
                .and_then(|stat| seen(form, Target::Handle(held.as_fd()), stat))
                .at("statx", || "an object without a name")?
        } else {
            let parent = parent.ok_or(Errno::STALE)?;
            let part = lock::directory(&parent)?.part(layer).ok_or(Errno::STALE)?;
            let there = part.call("statx", &name, |at| {
                let found = sys::stat::find(at.dir, at.name)?;
                found.map(|stat| seen(form, Target::Name(at), stat)).transpose()
            })?;
            let is_it = |stat: &Statx| (sys::stat::device(stat), stat.stx_ino) == object;
            there.filter(is_it).unwrap_or(*found)
        };
        show(node, &mut stat);
        Ok(self.attr_from(node, &stat))
    }

    fn stat_of_data(&self, data: &Data) -> Result<Statx> {
        let stat = sys::stat::of(&data.file);
        match self.form(data.layer) {
            None => stat,
            Some(form) => {
                stat.and_then(|stat| layer::seen(form, Target::Open(data.file.as_fd()), stat))
            }
        }
        .at("statx", || "an open file")
    }

    /// Completes what statx(2) says of the object of `node`.
    pub(super) fn attr_from(&self, node: &Node, stat: &Statx) -> Attr {
        let nlink = match (&node.dir, node.links.get()) {
            _ if node.place.read().gone => 0,
            (Some(dir), _) if self.static_nlink || dir.was_merged() => 1,
            (None, Some(links)) => links.lock().count,
            _ => stat.stx_nlink,
        };
        Attr::new(stat, node.ino, nlink, &self.ids)
    }

    /// Changes attributes; a lower object is copied up first.
    ///
    /// # Errors
    /// `EROFS` without an upper; those of the copy-up and of the calls made on the upper object.
    pub fn setattr(&self, node: NodeId, set: &SetAttr) -> Result<Attr> {
        let node = self.node(node)?;
        if set.is_empty() {
            return self.attr_of(&node);
        }
        self.writable()?;
        let owner = match self.stored_owner(set.uid, set.gid) {
            Err(_) if self.is_its_owner(&node, set)? => Owner::default(),
            owner => owner?,
        };
        self.may_set(&node, set)?;
        if let Some(size) = set.size {
            self.truncate(&node, size, set.kill_privileges)?;
        }
        if set.mode.is_some() || set.uid.is_some() || set.gid.is_some() || set.times().is_some() {
            self.copy_up(&node, Extent::Attributes)?;
            node.known.changing_privileges();
            let applied = self.apply(&node, set, owner);
            node.known.changing_privileges();
            applied?;
        }
        self.attr_of(&node)
    }

    /// Tells whether the layers have the root owned by the very ids that are asked for, which mean
    /// nothing in the mount: an engine makes sure that its mountpoint belongs to it, mounted or not.
    fn is_its_owner(&self, node: &Node, set: &SetAttr) -> Result<bool> {
        if node.id != NodeId::ROOT {
            return Ok(false);
        }
        let stat = lock::directory(node)?.top().ok_or(Errno::STALE)?.stat()?;
        let is = |asked: Option<OuterId>, stored| asked.is_none_or(|id| id.to_show() == stored);
        Ok(is(set.uid, stat.stx_uid) && is(set.gid, stat.stx_gid))
    }

    fn may_set(&self, node: &Arc<Node>, set: &SetAttr) -> Result<()> {
        if set.size.is_some() {
            // No size is one that an append-only file may be cut to, not even its own.
            self.may(node, Change::Attributes)?;
        }
        if set.mode.is_some() || set.uid.is_some() || set.gid.is_some() {
            return self.may(node, Change::Attributes);
        }
        match set.times() {
            Some(_) => self.may(node, Change::of_times([set.atime, set.mtime])),
            None => Ok(()),
        }
    }

    /// Tells whether to set this modification time would be of no use: the object is a lower one that
    /// has it, or that has no name, so that only whoever asks knows of that time.
    ///
    /// # Errors
    /// `ESTALE` for an unknown node; those of statx(2).
    pub fn is_modified_at(&self, node: NodeId, time: Time) -> Result<bool> {
        let node = self.node(node)?;
        if node.is_upper() {
            return Ok(false);
        }
        if node.place.read().gone {
            return Ok(true);
        }
        let stat = self.stat_of(&node)?;
        Ok((stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec) == (time.sec, time.nsec))
    }

    /// Takes note of the modification time that the kernel tells of a file whose writes it collects:
    /// it may send them after that. Returns what was noted before.
    ///
    /// # Errors
    /// `ESTALE` for an unknown node.
    pub fn keep_modified(&self, node: NodeId, time: Option<Time>) -> Result<Option<Time>> {
        let node = self.node(node)?;
        if node.kind != FileType::Regular {
            return Ok(None);
        }
        Ok(std::mem::replace(node.place.write().modified_mut(), time))
    }

    /// Takes note of the modification time of a file before the kernel sends the first of what it has
    /// collected: that is the time which it shows, and it may have no other to tell.
    ///
    /// # Errors
    /// `ESTALE` for an unknown node; those of statx(2).
    pub fn hold_modified(&self, node: NodeId) -> Result<()> {
        let node = self.node(node)?;
        if node.place.read().modified().is_none() {
            let modified = self.stat_of(&node)?.stx_mtime;
            let time = Time { sec: modified.tv_sec, nsec: modified.tv_nsec };
            // Before anything is written, so whoever comes later finds it.
            node.place.write().modified_mut().get_or_insert(time);
        }
        Ok(())
    }

    /// Gives a file back the modification time that was noted last.
    ///
    /// # Errors
    /// `ESTALE` for an unknown node; those of utimensat(2).
    pub fn restore_modified(&self, node: NodeId) -> Result<()> {
        let node = self.node(node)?;
        let noted = || node.place.read().modified();
        let mut last = None;
        // Once more if another one was told meanwhile, and is overwritten.
        while let Some(time) = noted().filter(|time| last != Some(*time)) {
            let set = SetAttr { mtime: Some(SetTime::At(time)), ..SetAttr::default() };
            self.apply(&node, &set, Owner::default())?;
            last = Some(time);
        }
        Ok(())
    }

    fn apply(&self, node: &Arc<Node>, set: &SetAttr, owner: Owner) -> Result<()> {
        if let Some(carrier) = self.writable()?.carrier {
            return self.apply_overridden(node, carrier, set, owner);
        }
        let _settled = self.settle_attributes(node);
        self.with_upper_handle(node, "setattr", |handle, is_symlink| {
            if owner != Owner::default() {
                if let Some(caller) = set.kill_privileges
                    && node.kind == FileType::Regular
                {
                    // What chown(2) by the server would leave.
                    if let Some(mode) = self.without_foreign_setgid(&sys::stat::of(handle)?, caller)
                    {
                        sys::name::chmod_handle(handle, mode)?;
                    }
                }
                self.chown(handle, owner)?;
            }
            // After chown, which clears setuid and setgid. Symlinks have no mode.
            if let Some(mode) = set.mode.filter(|_| !is_symlink) {
                sys::name::chmod_handle(handle, mode)?;
            }
            if let Some(times) = set.times() {
                sys::name::set_times_handle(handle, &times)?;
            }
            Ok(())
        })
    }

    /// Waits until nobody copies data into a file that has none of its own: whoever does puts the
    /// attributes back that it had before. Hold what this gives over a change of attributes.
    ///
    /// # Locks
    /// Takes `node.copy`.
    pub(super) fn settle_attributes<'a>(&self, node: &'a Node) -> Option<MutexGuard<'a, ()>> {
        let may_lack_data = node.kind == FileType::Regular && !node.known.is_whole();
        may_lack_data.then(|| node.copy.lock())
    }

    fn chown(
        &self,
        handle: std::os::fd::BorrowedFd<'_>,
        owner: Owner,
    ) -> std::result::Result<(), Errno> {
        let (uid, gid) = owner.to_store();
        if self.upper.as_ref().is_some_and(|upper| upper.work.can.chown) {
            return sys::name::chown_handle(handle, uid, gid);
        }
        let stat = sys::stat::of(handle)?;
        let is_owner = |wanted: Option<u32>, owner| wanted.is_none_or(|wanted| wanted == owner);
        if is_owner(uid, stat.stx_uid) && is_owner(gid, stat.stx_gid) {
            return Ok(());
        }
        Err(Errno::PERM)
    }

    /// Does what [`Union::apply`] does where owner and mode are in an xattr.
    fn apply_overridden(
        &self,
        node: &Arc<Node>,
        carrier: Carrier,
        set: &SetAttr,
        owner: Owner,
    ) -> Result<()> {
        let _reading_and_writing = node.copy.lock();
        self.with_upper_handle(node, "setattr", |handle, _| {
            if owner != Owner::default() || set.mode.is_some() {
                let group = set.kill_privileges.filter(|_| node.kind == FileType::Regular);
                self.change_override(carrier, handle, owner, set.mode, group)?;
            }
            match set.times() {
                Some(times) => sys::name::set_times_handle(handle, &times),
                None => Ok(()),
            }
        })
    }

    fn truncate(&self, node: &Arc<Node>, size: u64, caller: Option<Writer>) -> Result<()> {
        if node.dir.is_some() {
            return Err(Errno::ISDIR.into());
        }
        self.copy_up(node, Extent::First(size))?;
        let data = self.writable_data(node)?;
        if let Some(caller) = caller {
            self.kill_privileges(node, &data, caller)?;
        }
        self.drop_overridden_capability(node, &data)?;
        sys::data::truncate(data.file.as_fd(), size).at("ftruncate", || "a file in upper")
    }

    /// Clears setuid and setgid of a file that somebody unprivileged is about to
    /// change; tells whether there was any.
    ///
    /// # Errors
    /// `EROFS` without an upper; those of the copy-up and of chmod(2).
    pub fn drop_privileges(&self, node: NodeId, writer: Writer) -> Result<bool> {
        let node = self.node(node)?;
        if node.known.is_unprivileged() {
            return Ok(false);
        }
        self.copy_up(&node, Extent::All)?;
        let data = self.writable_data(&node)?;
        self.kill_privileges(&node, &data, writer)
    }

    /// Clears setgid of an object that somebody unprivileged, not of the object's group, has
    /// given another ACL, as posix_acl_update_mode in the kernel does.
    ///
    /// # Errors
    /// `EROFS` without an upper; those of statx(2) and chmod(2).
    pub fn drop_foreign_setgid(&self, node: NodeId, writer: Writer) -> Result<()> {
        let node = self.node(node)?;
        match self.without_foreign_setgid(&self.stat_of(&node)?, writer) {
            None => Ok(()),
            mode => {
                let set = SetAttr { mode, ..SetAttr::default() };
                self.apply(&node, &set, Owner::default())
            }
        }
    }

    /// Clears what a write by somebody unprivileged must clear: setuid, and setgid of a program or
    /// of another group's file.
    pub(super) fn kill_privileges(&self, node: &Node, data: &Data, writer: Writer) -> Result<bool> {
        if node.known.is_unprivileged() {
            return Ok(false);
        }
        let since = node.known.looking();
        let stat = self.stat_of_data(data)?;
        let mode = u32::from(stat.stx_mode);
        let mut kept = mode & 0o7777 & !libc::S_ISUID;
        let is_setgid = mode & libc::S_ISGID != 0;
        if is_setgid && (mode & libc::S_IXGRP != 0 || !self.is_of_group(&stat, writer)) {
            kept &= !libc::S_ISGID;
        }
        if kept != mode & 0o7777 {
            match self.writable()?.carrier {
                None => sys::name::chmod_handle(&data.file, kept),
                Some(carrier) => {
                    let _reading_and_writing = node.copy.lock();
                    let handle = data.file.as_fd();
                    self.change_override(carrier, handle, Owner::default(), Some(kept), None)
                }
            }
            .at("chmod", || "a file in upper")?;
        }
        // Capabilities may be left where the filesystem does not know them as such.
        if kept & sys::stat::SETIDS == 0 && self.form(UPPER).is_none() {
            node.known.found_unprivileged(since);
        }
        Ok(kept != mode & 0o7777)
    }

    /// Returns the state of the filesystem that new data goes to.
    ///
    /// # Errors
    /// Those of fstatvfs(3).
    pub fn statfs(&self) -> Result<StatVfs> {
        let root = self.node(NodeId::ROOT)?;
        let top = lock::directory(&root)?.top().cloned().ok_or(Errno::STALE)?;
        debug_assert!(self.upper.is_none() || top.layer.index == UPPER);
        top.with("fstatvfs", |dir| rustix::fs::fstatvfs(dir))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    use super::*;
    use crate::options::Ability;
    use crate::union::open_in;

    /// The data was seen open, closed by another thread, and then only a name led to the object: that of
    /// the directory whose names were locked already.
    #[test]
    fn a_name_is_looked_at_while_the_data_is_closed() {
        let place = tempfile::tempdir().unwrap();
        let upper = place.path().join("u");
        std::fs::create_dir(&upper).unwrap();
        std::fs::File::create(upper.join("a")).unwrap();
        std::fs::hard_link(upper.join("a"), upper.join("b")).unwrap();
        let union = open_in(place.path(), |config| config.lacks = vec![Ability::Link]);
        let (sender, receiver) = std::sync::mpsc::channel();
        let race = std::thread::spawn(move || {
            let entry = union.lookup(NodeId::ROOT, b"a").unwrap().unwrap();
            union.read(entry.node, 0, &mut []).unwrap();
            let node = union.node(entry.node).unwrap();
            let done = AtomicBool::new(false);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    while !done.load(Ordering::Relaxed) {
                        let data = node.data.lock().take();
                        *node.data.lock() = data;
                    }
                });
                // On two processors that others use too, one in ten thousand meets a close.
                for _ in 0..60_000 {
                    // Finds what would go, with the names locked, and that it is no directory.
                    let refused = union.rmdir(NodeId::ROOT, b"b").unwrap_err();
                    assert_eq!(refused.errno(), Errno::NOTDIR);
                }
                done.store(true, Ordering::Relaxed);
            });
            sender.send(()).unwrap();
        });
        // Threads that wait for each other cannot be ended.
        let waits = receiver.recv_timeout(Duration::from_secs(60));
        assert_ne!(waits, Err(std::sync::mpsc::RecvTimeoutError::Timeout), "for ever");
        race.join().unwrap();
    }
}
