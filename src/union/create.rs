//! Making new objects: files, directories, symlinks, devices, pipes, sockets.
//!
//! An object appears complete or not at all. Where nothing is in the way and the caller is who we
//! are, one call under the final name does that. Otherwise the object is prepared in work (owner,
//! mode, inherited ACL, opaque mark) and published over the whiteout.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{OFlags, RenameFlags, XattrFlags};

use super::acl;
use super::attr::{Attr, FileType};
use super::file::Data;
use super::listing::Child;
use super::look::{Carrier, try_owner};
use super::lookup::{Entry, Found, Identity, fact_of};
use super::node::{Dir, Node, NodeId, Place};
use super::owner::Owner;
use super::protect::Change;
use super::publish::{self, Temp, Work};
use super::readdir::Names;
use super::resolve::Fact;
use super::{Union, Upper, lock};
use crate::error::{Context, Errno, Result};
use crate::idmap::OuterId;
use crate::layer::{self, UPPER};
use crate::marks;
use crate::overrides::Override;
use crate::sys;
use crate::sys::name::At;
use crate::sys::stat::Statx;
use crate::sys::xattr::{self, Target};

/// Who asks for a new object.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    /// Its filesystem user id.
    pub uid: OuterId,
    /// Its filesystem group id.
    pub gid: OuterId,
    /// Its umask; 0 where the transport has applied it.
    pub umask: u32,
}

/// What to make.
#[derive(Clone, Copy)]
enum What<'a> {
    File,
    Directory,
    Symlink(&'a [u8]),
    /// Device, pipe or socket, by `S_IFMT`.
    Special {
        kind: u32,
        rdev: (u32, u32),
    },
    /// A whiteout for an overlay nested in the mount.
    Whiteout,
}

impl What<'_> {
    fn kind(&self) -> FileType {
        match self {
            Self::File => FileType::Regular,
            Self::Directory => FileType::Directory,
            Self::Symlink(_) => FileType::Symlink,
            Self::Special { kind, .. } => FileType::of_mode(*kind),
            Self::Whiteout => FileType::CharDevice,
        }
    }

    fn rdev(&self) -> (u32, u32) {
        match self {
            Self::Special { rdev, .. } => *rdev,
            Self::File | Self::Directory | Self::Symlink(_) | Self::Whiteout => (0, 0),
        }
    }

    /// Makes the object in one call; returns the file if it is one.
    fn make(&self, at: At<'_>, mode: u32) -> std::result::Result<Option<OwnedFd>, Errno> {
        match *self {
            Self::File => return sys::open::create(at.dir, at.name, mode).map(Some),
            Self::Directory => sys::name::mkdir(at, mode)?,
            Self::Symlink(target) => sys::name::symlink(target, at)?,
            Self::Special { kind, rdev } => sys::name::mknod(at, kind | mode & 0o7777, rdev)?,
            Self::Whiteout => return Err(Errno::INVAL),
        }
        Ok(None)
    }
}

/// Refuses names that no layer can hold, or that mean something else there.
///
/// # Errors
/// `ENAMETOOLONG`; `EINVAL` for `.wh.` names, empty ones and those with a slash.
pub(super) fn check_name(name: &[u8]) -> Result<()> {
    if name.len() > marks::NAME_MAX {
        return Err(Errno::NAMETOOLONG.into());
    }
    let odd = name.is_empty() || name == b"." || name == b"..";
    if odd || name.contains(&b'/') || name.contains(&0) || marks::is_reserved_name(name) {
        return Err(Errno::INVAL.into());
    }
    Ok(())
}

impl Union {
    /// Makes a regular file, device, pipe or socket; `mode` has the type, `rdev` is (major, minor).
    ///
    /// # Errors
    /// `EROFS` without an upper, `EEXIST`, and those of the calls on the upper.
    pub fn mknod(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &[u8],
        mode: u32,
        rdev: (u32, u32),
    ) -> Result<Entry> {
        let kind = mode & libc::S_IFMT;
        let what = match kind {
            0 | libc::S_IFREG => What::File,
            libc::S_IFCHR if rdev == (0, 0) => What::Whiteout,
            libc::S_IFCHR | libc::S_IFBLK | libc::S_IFIFO | libc::S_IFSOCK => {
                What::Special { kind, rdev }
            }
            _ => return Err(Errno::INVAL.into()),
        };
        self.make(caller, parent, name, mode, what).map(given)
    }

    /// Makes a directory.
    ///
    /// # Errors
    /// As [`Union::mknod`].
    pub fn mkdir(&self, caller: &Caller, parent: NodeId, name: &[u8], mode: u32) -> Result<Entry> {
        self.make(caller, parent, name, mode, What::Directory).map(given)
    }

    /// Makes a symlink.
    ///
    /// # Errors
    /// As [`Union::mknod`].
    pub fn symlink(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &[u8],
        target: &[u8],
    ) -> Result<Entry> {
        self.make(caller, parent, name, 0o777, What::Symlink(target)).map(given)
    }

    /// Makes a regular file and opens it, as [`Union::open_file`] does.
    ///
    /// # Errors
    /// As [`Union::mknod`]; `EEXIST` if the name exists.
    pub fn create(&self, caller: &Caller, parent: NodeId, name: &[u8], mode: u32) -> Result<Entry> {
        let made = self.make(caller, parent, name, mode, What::File)?;
        made.0.opened.fetch_add(1, Ordering::AcqRel);
        Ok(given(made))
    }

    /// Makes a regular file without a name and opens it, as [`Union::create`] does. It owes owner,
    /// mode and ACL to its maker and to `parent`; [`Union::link`] may name it anywhere.
    ///
    /// # Errors
    /// `EROFS` without an upper; `EOPNOTSUPP` if its filesystem has no unnamed files; those of the
    /// calls there.
    /// # Source
    /// open(2), `O_TMPFILE`. Differs: `parent` is not copied up.
    pub fn tmpfile(&self, caller: &Caller, parent: NodeId, mode: u32) -> Result<Entry> {
        let upper = self.writable()?;
        let parent = self.node(parent)?;
        let dir = lock::directory(&parent)?;
        if parent.place.read().gone {
            return Err(Errno::NOENT.into());
        }
        self.may(&parent, Change::Add)?;
        let dress = Dress {
            owner: self.owner_of(caller)?,
            umask: caller.umask,
            mode,
            parent: dir.top().ok_or(Errno::STALE)?.stat()?,
            acl: self.default_acl(dir)?,
            kind: FileType::Regular,
            rdev: (0, 0),
        };
        let file = upper.work.unnamed(&upper.work.dir, mode & 0o700)?.ok_or(Errno::OPNOTSUPP)?;
        dress.put_on(&upper.work, upper.carrier, file.as_fd())?;
        let at = || "a new object in work";
        let stat = sys::stat::of(&file)
            .and_then(|stat| self.seen_in_upper(Target::Open(file.as_fd()), stat))
            .at("statx", at)?;
        let held = sys::open::reopen(file.as_fd(), OFlags::PATH).at("open", at)?;
        let object = (sys::stat::device(&stat), stat.stx_ino);
        self.numbers.drop_kept(object.0, object.1);
        let ino = self.numbers.of(object.0, object.1);
        let made = self.table.get_or_insert(ino, None, |id| {
            let place = Place::nameless(Arc::clone(&parent), Arc::new(held), object);
            Node::new(id, ino, dress.kind, place)
        });
        let (node, new) = made.ok_or(Errno::STALE)?;
        if !new {
            // Its inode number is one that something shows which a layer lost from outside.
            self.release(&node, 1);
            return Err(Errno::STALE.into());
        }
        node.protection.found(0);
        *node.data.lock() = Some(Arc::new(Data::new(file)));
        node.opened.fetch_add(1, Ordering::AcqRel);
        self.note_data(&node);
        Ok(Entry::given(&node, self.attr_from(&node, &stat)))
    }

    fn make(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &[u8],
        mode: u32,
        what: What<'_>,
    ) -> Result<(Arc<Node>, Attr)> {
        check_name(name)?;
        let upper = self.writable()?;
        let owner = self.owner_of(caller)?;
        let parent = self.node(parent)?;
        self.may(&parent, Change::Add)?;
        self.copy_up(&parent, super::copy_up::Extent::All)?;
        let dir = lock::directory(&parent)?;
        let mut names = dir.names.write();
        if parent.place.read().gone {
            return Err(Errno::NOENT.into());
        }
        let to = dir.upper.get().ok_or(Errno::STALE)?;
        if to.layer.is_leftover(name) {
            return Err(Errno::INVAL.into());
        }
        let is_plain = match upper.carrier {
            None => true,
            // The directory's group would not come by itself: its setgid bit is kept in an xattr.
            Some(_) => {
                matches!(what, What::Symlink(_))
                    && u32::from(to.stat()?.stx_mode) & libc::S_ISGID == 0
            }
        };
        let is_ours = is_plain && owner.to_store() == (Some(self.uid), Some(self.gid));
        let new = New { umask: caller.umask, owner, dir, to, name, mode, what };
        let is_nested = matches!(what, What::Whiteout);
        let is_ours = is_ours && !is_nested;
        if is_ours && names.listing.is_none() && !dir.is_merged() {
            // Nothing is hidden, and most often nothing is there: the call that makes it tells.
            match self.make_in_place(&new) {
                Err(error) if error.errno() == Errno::EXIST => {}
                made => {
                    return made
                        .and_then(|made| self.made(upper, &parent, dir, &mut names, name, made));
                }
            }
        }
        let whiteout = self.in_the_way(dir, &mut names, to, name)?;
        // A whiteout of the `.wh.` form is not in the way, but hides something all the same.
        let hides = names.listing.as_ref().is_some_and(|listing| listing.is_below(name));
        let opaque = matches!(what, What::Directory) && (whiteout || hides);
        let done = if is_ours && !whiteout && !opaque {
            self.make_in_place(&new)
        } else {
            self.make_in_work(upper, &new, Way { whiteout, opaque })
        };
        if done.is_ok() && hides && !whiteout {
            upper.work.uncover(to, name);
        }
        done.and_then(|made| self.made(upper, &parent, dir, &mut names, name, made))
            // It may be there all the same.
            .inspect_err(|_| self.distrust(&mut names))
    }

    /// Makes the object in one call, under its final name.
    fn make_in_place(&self, new: &New<'_>) -> Result<(Option<OwnedFd>, Statx)> {
        let New { to, name, what, .. } = *new;
        let mode = self.masked(new)?;
        let file = to.call("create", name, |at| what.make(at, mode))?;
        let look = || match &file {
            Some(file) => sys::stat::of(file).at("statx", || to.describe(name)),
            None => to.call("statx", name, |at| sys::stat::at(at.dir, at.name)),
        };
        let stat = look()?;
        // Lost where a server makes the object first and gives it to its owner then.
        let has = u32::from(stat.stx_mode) & 0o7777;
        let lost = mode & !has & 0o7000;
        if lost == 0 || self.uid != 0 || matches!(what, What::Symlink(_)) {
            return Ok((file, stat));
        }
        to.call("chmod", name, |at| {
            // It may have more than it was made with: setgid, of a directory that hands it down.
            sys::name::chmod_handle(&sys::open::handle(at.dir, at.name)?, has | lost)
        })?;
        let stat = look()?;
        Ok((file, stat))
    }

    /// Tells whether a whiteout lies in the way of a new name.
    ///
    /// # Errors
    /// `EEXIST` if an object does; `EINVAL` for a name that stands for a removed file.
    pub(super) fn in_the_way(
        &self,
        dir: &Dir,
        names: &mut Names,
        to: &layer::Dir,
        name: &[u8],
    ) -> Result<bool> {
        if to.layer.is_leftover(name) {
            return Err(Errno::INVAL.into());
        }
        if names.listing.is_some() || dir.is_merged() {
            let listing = self.load(dir, names)?;
            let Some(child) = listing.find(name) else { return Ok(listing.has_whiteout(name)) };
            // An xattr whiteout in a directory that is not marked is listed, but hides.
            return match self.find_child(dir, &child)? {
                Some(_) => Err(Errno::EXIST.into()),
                None => Ok(child.top == UPPER),
            };
        }
        match to.find(name)? {
            None => Ok(false),
            Some(mut stat) => match fact_of(to, name, &mut stat)? {
                Fact::Whiteout => Ok(true),
                Fact::Absent | Fact::Leaf | Fact::Directory { .. } => Err(Errno::EXIST.into()),
            },
        }
    }

    /// Applies the umask, unless a default ACL takes its place.
    fn masked(&self, new: &New<'_>) -> Result<u32> {
        let is_symlink = matches!(new.what, What::Symlink(_));
        let umask = new.umask;
        if is_symlink || new.mode & umask == 0 || self.default_acl(new.dir)?.is_some() {
            return Ok(new.mode & 0o7777);
        }
        Ok(new.mode & 0o7777 & !umask)
    }

    /// Returns the default ACL of a directory, asked for once.
    fn default_acl(&self, dir: &Dir) -> Result<Option<Arc<[u8]>>> {
        let mut cached = dir.default_acl.lock();
        if let Some(known) = &*cached {
            return Ok(known.clone());
        }
        let top = dir.top().ok_or(Errno::STALE)?;
        if top.layer.form.is_some() {
            return Ok(None);
        }
        let value = top
            .with("getxattr", |dir| xattr::get(Target::Handle(dir), b"system.posix_acl_default"))?;
        let value = value.map(Arc::from);
        *cached = Some(value.clone());
        Ok(value)
    }

    /// Prepares the object in work as the caller's, and publishes it.
    fn make_in_work(
        &self,
        upper: &Upper,
        new: &New<'_>,
        way: Way,
    ) -> Result<(Option<OwnedFd>, Statx)> {
        let New { umask, owner, dir, to, name, mode, what } = *new;
        let dress = Dress {
            owner,
            umask,
            mode,
            parent: to.stat()?,
            acl: self.default_acl(dir)?,
            kind: what.kind(),
            rdev: what.rdev(),
        };
        if let What::Whiteout = what {
            upper.work.set_nested(to)?;
            let staged = upper.work.stage_nested_whiteout()?;
            if upper.carrier.is_none() {
                let owner = owner.to_store();
                sys::name::chown_handle(&staged.file, owner.0, owner.1)
                    .at("fchownat", || "a whiteout in work")?;
            }
            let file = upper.work.publish_file(staged, to, name, way.whiteout)?;
            let mut stat = sys::stat::of(&file).at("statx", || to.describe(name))?;
            sys::stat::show_as_whiteout(&mut stat);
            return Ok((None, stat));
        }
        let carrier = upper.carrier;
        let stands_for = carrier.is_some() && matches!(what, What::Special { .. });
        if stands_for || matches!(what, What::File) {
            let staged = upper.work.stage_file(&upper.work.dir, mode & 0o700)?;
            dress.put_on(&upper.work, carrier, staged.file.as_fd())?;
            let file = upper.work.publish_file(staged, to, name, way.whiteout)?;
            let stat = sys::stat::of(&file)
                .and_then(|stat| self.seen_in_upper(Target::Open(file.as_fd()), stat))
                .at("statx", || to.describe(name))?;
            return Ok(((!stands_for).then_some(file), stat));
        }
        let temp: Temp<'_> = upper.work.temp();
        // The marks of a directory need its owner's permissions, whatever its own will be.
        let unfinished = if dress.kind == FileType::Directory { 0o700 } else { mode & 0o700 };
        temp.call("create", |at| what.make(at, unfinished))?;
        let handle = temp.call("openat", |at| sys::open::handle(at.dir, at.name))?;
        if way.opaque {
            temp.call("setxattr", |at| upper.work.set_opaque(at))?;
        }
        dress.put_on(&upper.work, carrier, handle.as_fd())?;
        // A directory cannot be renamed over a whiteout.
        if way.whiteout && dress.kind == FileType::Directory {
            upper.work.publish_over_whiteout(temp, to, name)?;
        } else {
            upper.work.publish(temp, to, name, RenameFlags::empty())?;
        }
        let stat = sys::stat::of(&handle)
            .and_then(|stat| self.seen_in_upper(Target::Handle(handle.as_fd()), stat))
            .at("statx", || to.describe(name))?;
        Ok((None, stat))
    }

    /// Takes note of a new upper object and returns its node.
    fn made(
        &self,
        upper: &Upper,
        parent: &Arc<Node>,
        dir: &Dir,
        names: &mut Names,
        name: &[u8],
        (file, stat): (Option<OwnedFd>, Statx),
    ) -> Result<(Arc<Node>, Attr)> {
        let to = dir.upper.get().ok_or(Errno::STALE)?;
        let object = (sys::stat::device(&stat), stat.stx_ino);
        // A new inode may have the number of one that was removed from outside.
        self.numbers.drop_kept(object.0, object.1);
        let kind = FileType::of_mode(u32::from(stat.stx_mode));
        if let Some(listing) = &mut names.listing {
            listing.insert(Child { name, kind, top: UPPER, object, parts: &[] });
        }
        let mut parts = Vec::new();
        if kind == FileType::Directory {
            let part = to.child(name, &stat);
            part.now_unmarked();
            parts.push(part);
        }
        let unprivileged = u32::from(stat.stx_mode) & sys::stat::SETIDS == 0;
        let identity = Identity::of(self.numbers.of(object.0, object.1));
        let found = Found { stat, layer: UPPER, parts };
        let entered = self.enter_as(parent, name, found, identity)?;
        let (node, attr) = entered.ok_or(Errno::STALE)?;
        node.protection.found(0);
        if let Some(file) = file {
            *node.data.lock() = Some(Arc::new(Data::new(file)));
            self.note_data(&node);
            match unprivileged {
                true => node.known.found_unprivileged(node.known.looking()),
                false => node.known.changing_privileges(),
            }
            node.known.set_whole(true);
            // The kernel asks at the first write. One question for each directory spares one for
            // each file.
            let plain = !upper.work.new_files_have_xattrs;
            if plain && self.default_acl(dir).is_ok_and(|acl| acl.is_none()) {
                node.known.found_xattrs(false);
            }
        }
        Ok((node, attr))
    }
}

fn given((node, attr): (Arc<Node>, Attr)) -> Entry {
    Entry::given(&node, attr)
}

/// A new object: who wants it, where, and what it shall be.
#[derive(Clone, Copy)]
struct New<'a> {
    owner: Owner,
    umask: u32,
    dir: &'a Dir,
    to: &'a layer::Dir,
    name: &'a [u8],
    mode: u32,
    what: What<'a>,
}

/// What lies under the name of a new object.
#[derive(Clone, Copy)]
struct Way {
    /// A whiteout, to be replaced.
    whiteout: bool,
    /// Lower layers hold something that a directory must hide.
    opaque: bool,
}

/// What a new object gets from its maker and from the directory it is made in.
struct Dress {
    owner: Owner,
    umask: u32,
    mode: u32,
    parent: Statx,
    acl: Option<Arc<[u8]>>,
    kind: FileType,
    rdev: (u32, u32),
}

impl Dress {
    fn put_on(
        &self,
        work: &Work,
        carrier: Option<Carrier>,
        object: std::os::fd::BorrowedFd<'_>,
    ) -> Result<()> {
        let context = || "a new object in work";
        if self.kind == FileType::Symlink && !work.can.symlink_attributes {
            return Ok(());
        }
        let setgid = u32::from(self.parent.stx_mode) & libc::S_ISGID != 0;
        let (uid, gid) = self.owner.to_store();
        let gid = if setgid { Some(self.parent.stx_gid) } else { gid };
        if let Some(carrier) = carrier {
            if self.kind == FileType::Symlink {
                let owned = try_owner(sys::name::chown_handle(object, uid, gid));
                return owned.at("fchownat", context);
            }
            let said = self.override_of(uid, gid, setgid);
            return carrier.put(object, &said).at("setxattr", context);
        }
        let given = work.give(Target::Handle(object), (uid, gid))?;
        if self.kind == FileType::Symlink {
            return Ok(());
        }
        let is_dir = self.kind == FileType::Directory;
        let inherited = match &self.acl {
            Some(acl) => Some(acl::inherit(acl, self.mode & 0o7777, is_dir)?),
            None => None,
        };
        let mode = match &inherited {
            Some(inherited) => inherited.mode & 0o7777,
            None => self.mode & 0o7777 & !self.umask,
        };
        let mode = if is_dir && setgid { mode | libc::S_ISGID } else { mode };
        let mode = if given { mode } else { publish::without_owner(mode) };
        sys::name::chmod_handle(object, mode).at("chmod", context)?;
        let Some(inherited) = inherited else { return Ok(()) };
        let acls: [(&[u8], _); 2] = [
            (b"system.posix_acl_access", inherited.access),
            (b"system.posix_acl_default", inherited.default),
        ];
        for (name, value) in acls {
            if let Some(value) = value {
                xattr::set(Target::Handle(object), name, &value, XattrFlags::empty())
                    .at("setxattr", context)?;
            }
        }
        Ok(())
    }

    /// What the object stands for in an upper with overrides; without an ACL.
    fn override_of(&self, uid: Option<u32>, gid: Option<u32>, setgid: bool) -> Override {
        let mut mode = self.mode & 0o7777 & !self.umask;
        if setgid && self.kind == FileType::Directory {
            mode |= libc::S_ISGID;
        }
        Override {
            uid: uid.unwrap_or_default(),
            gid: gid.unwrap_or_default(),
            mode,
            kind: Some((self.kind.to_mode(), self.rdev)),
        }
    }
}
