//! The work directory: where objects are prepared, and the one rename or link that publishes them.
//!
//! A name in work begins with what it is: `tmp-N` (unfinished or discarded), `link-INO` (anchor of
//! a copied-up object with several names), `gone-ID` (removed, and perhaps still open), `whiteout`
//! (what all whiteouts are links of). All of them are emptied out when the next mount begins, so a
//! crash leaves nothing that is ever seen.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FileType, RenameFlags, XattrFlags};

use super::attr::times_of;
use super::probe::{self, Abilities};
use crate::error::{Context, Errno, Error, Result};
use crate::layer::{self, leftover};
use crate::marks::{self, Namespace};
use crate::options::Ability;
use crate::sys;
use crate::sys::name::At;
use crate::sys::xattr::{self, Target};

const WHITEOUT: &[u8] = b"whiteout";

/// The work directory of a mount, and what its filesystem can do.
#[derive(Debug)]
pub(crate) struct Work {
    pub(crate) dir: Arc<layer::Dir>,
    /// What the filesystem can do.
    pub(crate) can: Abilities,
    /// Where this mount keeps its marks, where it can.
    pub(crate) namespace: Namespace,
    /// The system gives each new file xattrs, such as a label.
    pub(crate) new_files_have_xattrs: bool,
    next: AtomicU64,
}

/// A regular file that no name leads to yet.
#[derive(Debug)]
pub(crate) struct Staged<'a> {
    pub(crate) file: OwnedFd,
    /// Its name in work, where the filesystem has no unnamed files.
    name: Option<Temp<'a>>,
}

/// A name in work, removed with what it names when dropped.
#[derive(Debug)]
pub(crate) struct Temp<'a> {
    work: &'a Work,
    pub(crate) name: Vec<u8>,
}

impl Drop for Temp<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.work.remove_tree(&self.name) {
            tracing::warn!("cannot clean up: {error}");
        }
    }
}

impl Temp<'_> {
    /// Runs one call on the name.
    pub(crate) fn call<T>(
        &self,
        op: &'static str,
        call: impl FnMut(At<'_>) -> std::result::Result<T, Errno>,
    ) -> Result<T> {
        self.work.dir.call(op, &self.name, call)
    }
}

impl Work {
    /// Takes over `dir`, empties it, and finds out what its filesystem can do; abilities in `lacks`
    /// are not used.
    ///
    /// # Errors
    /// Those of the calls that are tried, but that something is not supported.
    pub(crate) fn open(dir: Arc<layer::Dir>, userxattr: bool, lacks: &[Ability]) -> Result<Self> {
        let mut work = Self {
            dir,
            can: Abilities::default(),
            namespace: if userxattr { Namespace::User } else { Namespace::Trusted },
            new_files_have_xattrs: true,
            next: AtomicU64::new(0),
        };
        work.empty_but(b"")?;
        work.can = probe::probe(&work, userxattr, lacks)?;
        work.namespace = work.can.marks.unwrap_or(work.namespace);
        if work.can.device && work.can.link {
            work.make_whiteout_template()?;
        }
        work.new_files_have_xattrs = work.probe_new_xattrs()?;
        Ok(work)
    }

    fn probe_new_xattrs(&self) -> Result<bool> {
        let temp = self.temp();
        temp.call("openat", |at| sys::open::create(at.dir, at.name, 0o600))?;
        let xattrs = temp.call("listxattr", |at| xattr::list(Target::Name(at)))?;
        Ok(!xattrs.is_empty())
    }

    fn rename(&self, from: &[u8], to: &[u8], flags: RenameFlags) -> Result<()> {
        self.dir
            .with("renameat2", |dir| sys::name::rename(At::new(dir, from), At::new(dir, to), flags))
    }

    fn make_whiteout_template(&self) -> Result<()> {
        self.dir.call("mknodat", WHITEOUT, sys::name::whiteout)
    }

    /// Returns a fresh name; nothing of that name exists.
    pub(crate) fn temp(&self) -> Temp<'_> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        Temp { work: self, name: format!("tmp-{number:x}").into_bytes() }
    }

    /// Makes an empty directory in work.
    pub(crate) fn make_directory(&self, mode: u32) -> Result<Temp<'_>> {
        let temp = self.temp();
        temp.call("mkdirat", |at| sys::name::mkdir(at, mode))?;
        Ok(temp)
    }

    /// Makes an empty regular file that no name leads to. It inherits from `parent` what a file
    /// made there does (group, ACL), if the filesystem has unnamed files.
    pub(crate) fn stage_file(&self, parent: &layer::Dir, mode: u32) -> Result<Staged<'_>> {
        if let Some(file) = self.unnamed(parent, mode)? {
            return Ok(Staged { file, name: None });
        }
        let temp = self.temp();
        let file = temp.call("openat", |at| sys::open::create(at.dir, at.name, mode))?;
        Ok(Staged { file, name: Some(temp) })
    }

    /// Hides what lies beneath `name` in `dir`, where the upper has nothing.
    pub(crate) fn whiteout(&self, dir: &layer::Dir, name: &[u8]) -> Result<()> {
        if self.can.device { self.device(dir, name) } else { self.cover(dir, name) }
    }

    /// Makes a device 0:0.
    pub(super) fn device(&self, dir: &layer::Dir, name: &[u8]) -> Result<()> {
        if !self.can.link {
            return dir.call("mknodat", name, sys::name::whiteout);
        }
        self.link_whiteout(|template| dir.call("linkat", name, |at| sys::name::link(template, at)))
    }

    /// Returns a device 0:0 in work.
    pub(crate) fn temp_whiteout(&self) -> Result<Temp<'_>> {
        let temp = self.temp();
        self.device(&self.dir, &temp.name)?;
        Ok(temp)
    }

    /// Links the template; makes another one when that has as many links as an inode may have.
    fn link_whiteout(&self, link: impl Fn(At<'_>) -> Result<()>) -> Result<()> {
        let handle = self.dir.handle()?;
        let template = At::new(handle.as_fd(), WHITEOUT);
        match link(template) {
            Err(error) if matches!(error.errno(), Errno::MLINK | Errno::NOENT) => {
                // Another thread may have done the same; both templates are as good.
                let fresh = self.temp();
                fresh.call("mknodat", sys::name::whiteout)?;
                self.rename(&fresh.name, WHITEOUT, RenameFlags::empty())?;
                link(template)
            }
            linked => linked,
        }
    }

    /// Gives an object to an owner, as far as one is named; tells whether it has that one now.
    ///
    /// # Errors
    /// Those of fchownat(2) and statx(2).
    pub(super) fn give(
        &self,
        object: Target<'_>,
        (uid, gid): (Option<u32>, Option<u32>),
    ) -> Result<bool> {
        let given = if self.can.chown {
            match object {
                Target::Open(fd) | Target::Handle(fd) | Target::Directory(fd) => {
                    sys::name::chown_handle(fd, uid, gid)
                }
                Target::Name(at) => sys::name::chown(at, uid, gid),
            }
            .map(|()| true)
        } else {
            match object {
                Target::Open(fd) | Target::Handle(fd) | Target::Directory(fd) => sys::stat::of(fd),
                Target::Name(at) => sys::stat::at(at.dir, at.name),
            }
            .map(|stat| {
                uid.is_none_or(|uid| uid == stat.stx_uid)
                    && gid.is_none_or(|gid| gid == stat.stx_gid)
            })
        };
        given.at("fchownat", || "an object in work")
    }

    /// Marks a directory opaque.
    pub(crate) fn set_opaque(&self, at: At<'_>) -> std::result::Result<(), Errno> {
        if self.can.marks.is_none() {
            return mark_opaque(sys::open::directory(at.dir, at.name)?.as_fd());
        }
        let name = self.namespace.of(&marks::OPAQUE_XATTRS);
        xattr::set(Target::Name(at), name, marks::OPAQUE_VALUE, XattrFlags::empty())
    }

    /// Marks the upper directory `dir` as one that may hold objects with an origin, unless it is.
    ///
    /// # Errors
    /// `ENOSPC`, `EDQUOT` and the like; not that such xattrs cannot be had there.
    pub(crate) fn set_impure(&self, dir: &layer::Dir) -> Result<()> {
        if self.can.marks.is_none() || dir.is_impure()? {
            return Ok(());
        }
        let name = self.namespace.of(&marks::IMPURE_XATTRS);
        dir.with("setxattr", |handle| {
            let set = || {
                let dir = Target::Handle(handle);
                xattr::set(dir, name, marks::IMPURE_VALUE, XattrFlags::empty())
            };
            match set().or_else(|errno| if_writable(errno, At::new(handle, b"."), set)) {
                // Then numbers change with the next mount, and nothing else.
                Ok(()) | Err(Errno::OPNOTSUPP | Errno::PERM | Errno::ACCESS) => Ok(()),
                Err(errno) => Err(errno),
            }
        })?;
        dir.now_impure();
        Ok(())
    }

    /// Marks an open directory opaque; also one that its owner may not write to.
    pub(crate) fn set_opaque_handle(&self, dir: BorrowedFd<'_>) -> std::result::Result<(), Errno> {
        let name = self.namespace.of(&marks::OPAQUE_XATTRS);
        let set = || match self.can.marks {
            None => mark_opaque(dir),
            Some(_) => {
                xattr::set(Target::Handle(dir), name, marks::OPAQUE_VALUE, XattrFlags::empty())
            }
        };
        set().or_else(|errno| if_writable(errno, At::new(dir, b"."), set))
    }

    /// Marks the upper directory `dir` as one that may hold whiteouts of a nested overlay, unless it
    /// is: for our own listings, and for a nested overlay that has it as a lower layer.
    ///
    /// # Errors
    /// Those of getxattr(2) and setxattr(2).
    pub(crate) fn set_nested(&self, dir: &layer::Dir) -> Result<()> {
        if dir.has_nested_whiteouts()? {
            return Ok(());
        }
        let mark = self.namespace.of(&marks::NESTED_WHITEOUTS_XATTRS);
        let opaque = self.namespace.of(&marks::NESTED_OPAQUE_XATTRS);
        dir.with("setxattr", |dir| {
            let dir = Target::Handle(dir);
            if xattr::get(dir, opaque)?.is_none() {
                xattr::set(dir, opaque, marks::XATTR_WHITEOUTS_VALUE, XattrFlags::empty())?;
            }
            // Also there if the nested overlay makes the directory opaque.
            xattr::set(dir, mark, b"y", XattrFlags::empty())
        })?;
        dir.now_nested();
        Ok(())
    }

    /// Makes a whiteout of a nested overlay that no name leads to yet: an empty file with the
    /// escaped xattr, because a device 0:0 would be one of ours.
    ///
    /// # Source
    /// overlayfs.rst, "Nesting overlayfs mounts". Differs: shown as a device again, which all
    /// overlays read, in every layer.
    pub(crate) fn stage_nested_whiteout(&self) -> Result<Staged<'_>> {
        let staged = self.stage_file(&self.dir, 0o600)?;
        let name = self.namespace.of(&marks::NESTED_WHITEOUT_XATTRS);
        let target = Target::Open(staged.file.as_fd());
        xattr::set(target, name, b"y", XattrFlags::empty())
            .at("setxattr", || "a whiteout in work")?;
        Ok(staged)
    }

    /// Name of the anchor of the object with inode number `ino`.
    pub(crate) fn anchor(ino: u64) -> Vec<u8> {
        format!("link-{ino:x}").into_bytes()
    }

    /// Publishes what `temp` names as `name` in `to`. With `RENAME_EXCHANGE` the object that was
    /// there takes its place in work, and is removed with `temp`.
    pub(crate) fn publish(
        &self,
        temp: Temp<'_>,
        to: &layer::Dir,
        name: &[u8],
        flags: RenameFlags,
    ) -> Result<()> {
        self.exchange_or_rename((&self.dir, &temp.name), to, name, flags)?;
        if !flags.contains(RenameFlags::EXCHANGE) {
            // Moved away, so there is nothing to clean up.
            std::mem::forget(temp);
        }
        Ok(())
    }

    /// Swaps what `temp` names with `name` in `to`; the other object is in work then, as `temp`.
    pub(crate) fn exchange(&self, temp: &Temp<'_>, to: &layer::Dir, name: &[u8]) -> Result<()> {
        self.exchange_or_rename((&self.dir, &temp.name), to, name, RenameFlags::EXCHANGE)
    }

    /// Publishes what is `name` in a directory in work as the same in `to`.
    pub(crate) fn publish_child(
        &self,
        dir: &layer::Dir,
        to: &layer::Dir,
        name: &[u8],
    ) -> Result<()> {
        self.exchange_or_rename((dir, name), to, name, RenameFlags::empty())
    }

    fn exchange_or_rename(
        &self,
        (dir, from): (&layer::Dir, &[u8]),
        to: &layer::Dir,
        name: &[u8],
        flags: RenameFlags,
    ) -> Result<()> {
        let handle = dir.handle()?;
        let from = At::new(handle.as_fd(), from);
        to.call("renameat2", name, |to| {
            match sys::name::rename(from, to, flags) {
                Err(Errno::ACCESS) => {}
                done => return done,
            }
            // A directory that its owner may not write to cannot get another parent: for the time
            // of the rename it can be written to.
            let moving = Writable::new(from)?;
            let other = flags.contains(RenameFlags::EXCHANGE).then(|| Writable::new(to));
            let rename = || sys::name::rename(from, to, flags);
            let done = rename().or_else(|errno| if_writable(errno, to, rename));
            if let Some(Ok(other)) = other {
                other.restore()?;
            }
            // Where it is now, or still is.
            moving.restore()?;
            done
        })
    }

    /// Makes a regular file without a name, where the filesystem has such files.
    ///
    /// # Errors
    /// Those of openat(2).
    pub(crate) fn unnamed(&self, parent: &layer::Dir, mode: u32) -> Result<Option<OwnedFd>> {
        if !self.can.unnamed {
            return Ok(None);
        }
        parent.with("openat", |dir| sys::open::unnamed(dir, mode)).map(Some)
    }

    /// Publishes a staged file as `name` in `to`; over what is there only if `replace`.
    pub(crate) fn publish_file(
        &self,
        staged: Staged<'_>,
        to: &layer::Dir,
        name: &[u8],
        replace: bool,
    ) -> Result<OwnedFd> {
        let Staged { file, name: temp } = staged;
        let temp = match temp {
            Some(temp) => temp,
            None if replace => {
                let temp = self.temp();
                temp.call("linkat", |at| sys::name::link_handle(&file, at))?;
                temp
            }
            None => {
                to.call("linkat", name, |at| {
                    let link = || sys::name::link_handle(&file, at);
                    link().or_else(|errno| if_writable(errno, at, link))
                })?;
                return Ok(file);
            }
        };
        self.publish(temp, to, name, RenameFlags::empty())?;
        Ok(file)
    }

    /// Empties work, whatever an earlier mount left in it, but for the name `kept`.
    pub(crate) fn empty_but(&self, kept: &[u8]) -> Result<()> {
        for name in names(&self.dir)? {
            if name == kept {
                continue;
            }
            match self.remove_tree(&name) {
                // Another process has it open; it goes when that closes it.
                Err(error) if leftover::is_name(&name) => tracing::debug!("{error}"),
                done => done?,
            }
        }
        Ok(())
    }

    /// Removes a name in work with all beneath; one that does not exist is no error.
    pub(crate) fn remove_tree(&self, name: &[u8]) -> Result<()> {
        remove_tree(&self.dir, name)
    }
}

/// Removes a name in `dir` with all beneath; one that does not exist is no error.
pub(super) fn remove_tree(work: &Arc<layer::Dir>, name: &[u8]) -> Result<()> {
    let first = work.call("unlinkat", name, |at| Ok(sys::name::unlink(at)))?;
    match first {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        // A directory; some filesystems say EPERM.
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(errno) => return Err(Error::sys("unlinkat", work.describe(name), errno)),
    }
    match work.call("unlinkat", name, |at| Ok(sys::name::rmdir(at)))? {
        Ok(()) => return Ok(()),
        // EPERM: SFTP has no other word.
        Err(Errno::NOTEMPTY | Errno::EXIST | Errno::PERM) => {}
        Err(errno) => return Err(Error::sys("unlinkat", work.describe(name), errno)),
    }
    // The way down is kept here, not on the thread's stack.
    let Some(top) = descend(work, name)? else { return Ok(()) };
    let mut way = vec![(top, name.to_vec())];
    while let Some((dir, _)) = way.last() {
        let dir = Arc::clone(dir);
        let mut deeper = None;
        for name in names(&dir)? {
            if let Some(below) = descend(&dir, &name)? {
                deeper = Some((below, name));
                break;
            }
            dir.call("unlinkat", &name, sys::name::unlink)?;
        }
        if let Some(below) = deeper {
            way.push(below);
        } else if let Some((_, name)) = way.pop() {
            let above = way.last().map_or(work, |(above, _)| above);
            above.call("unlinkat", &name, sys::name::rmdir)?;
        }
    }
    Ok(())
}

/// Returns directory `name` of `dir`, made accessible; `None` if it is no directory.
fn descend(dir: &Arc<layer::Dir>, name: &[u8]) -> Result<Option<Arc<layer::Dir>>> {
    let Some(stat) = dir.find(name)? else { return Ok(None) };
    if FileType::from_raw_mode(u32::from(stat.stx_mode)) != FileType::Directory {
        return Ok(None);
    }
    if u32::from(stat.stx_mode) & 0o700 != 0o700 {
        dir.call("chmod", name, |at| {
            let handle = sys::open::handle(at.dir, at.name)?;
            sys::name::chmod_handle(&handle, 0o700)
        })?;
    }
    Ok(Some(dir.child(name, &stat)))
}

/// A directory made writable for its owner, who is not privileged; anything else is left alone.
struct Writable(Option<(OwnedFd, u32)>);

impl Writable {
    fn new(at: At<'_>) -> std::result::Result<Self, Errno> {
        let handle = sys::open::handle(at.dir, at.name)?;
        let mode = u32::from(sys::stat::of(&handle)?.stx_mode);
        if FileType::from_raw_mode(mode) != FileType::Directory || mode & 0o200 != 0 {
            return Ok(Self(None));
        }
        sys::name::chmod_handle(&handle, mode | 0o200)?;
        Ok(Self(Some((handle, mode))))
    }

    fn restore(self) -> std::result::Result<(), Errno> {
        self.0.map_or(Ok(()), |(handle, mode)| sys::name::chmod_handle(&handle, mode))
    }
}

/// Makes a call once more that failed for want of permission, with the directory that it changes
/// writable: a copy-up needs no permission of its owner.
pub(super) fn if_writable<T>(
    errno: Errno,
    at: At<'_>,
    call: impl FnOnce() -> std::result::Result<T, Errno>,
) -> std::result::Result<T, Errno> {
    if errno != Errno::ACCESS {
        return Err(errno);
    }
    let dir = Writable::new(At::new(at.dir, b"."))?;
    let done = call();
    dir.restore()?;
    done
}

/// What an object may allow that did not get its owner: nothing to whoever runs it, and to its
/// group no more than to others.
pub(super) fn without_owner(mode: u32) -> u32 {
    let others = mode & 0o007;
    mode & !0o6070 | mode & others << 3
}

/// Marks a directory opaque by a file.
fn mark_opaque(dir: BorrowedFd<'_>) -> std::result::Result<(), Errno> {
    let before = times_of(&sys::stat::of(dir)?);
    touch(At::new(dir, marks::OPAQUE_NAME))?;
    // Nobody made a file that is seen.
    sys::name::set_times_handle(dir, &before)
}

/// Makes an empty file, unless there is one.
pub(super) fn touch(at: At<'_>) -> std::result::Result<(), Errno> {
    match sys::open::create(at.dir, at.name, 0o644) {
        Ok(_) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno),
    }
}

pub(super) fn names(dir: &layer::Dir) -> Result<Vec<Vec<u8>>> {
    let mut names = Vec::new();
    dir.list(|name, _, _| {
        names.push(name.to_vec());
        Ok(())
    })?;
    Ok(names)
}

impl Staged<'_> {
    /// Gives the file one more name; `work` is where it may have one.
    pub(crate) fn link(&self, work: BorrowedFd<'_>, to: At<'_>) -> std::result::Result<(), Errno> {
        match &self.name {
            None => sys::name::link_handle(&self.file, to),
            Some(temp) => sys::name::link(At::new(work, &temp.name), to),
        }
    }

    /// Makes data and attributes durable.
    pub(crate) fn sync(&self) -> Result<()> {
        sys::data::sync(self.file.as_fd(), false).at("fsync", || "a new file in work")
    }
}
