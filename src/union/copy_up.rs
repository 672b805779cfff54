//! Copy-up: replaces a lower object by an upper copy before it is changed.
//!
//! Ancestors come first. The copy is prepared where nobody sees it (data, owner, mode, times,
//! xattrs), made durable unless the mount is volatile, and published by one link or rename. An
//! object that lost its name meanwhile is copied all the same, and stays without a name: whoever
//! has it open goes on with it.
//!
//! Locks: `Node::copy` of the object, over all of it; `Dir::names` of the parent for the publishing.
//! Crash: leaves at most one object in work, removed at the next mount. A caller that is killed while
//! data is copied leaves nothing.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{RenameFlags, XattrFlags};

use super::attr::{FileType, times_of};
use super::copy_attr::{copy_attributes, pass_on_flags};
use super::file::Data;
use super::index::{Base, missing_links};
use super::node::{Dir, Node};
use super::origin::Origin;
use super::publish::{Staged, Temp};
use super::readdir::Names;
use super::{Leaf, Union, Upper, lock};
use crate::error::{Context, Errno, Result};
use crate::layer::{self, UPPER};
use crate::marks;
use crate::sys;
use crate::sys::data::Part;
use crate::sys::inode_flags;
use crate::sys::name::At;
use crate::sys::stat::Statx;
use crate::sys::xattr::{self, Target};

/// How much of a file's data its new owner needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extent {
    /// All of it.
    All,
    /// This many bytes from the start: the file is cut there next.
    First(u64),
    /// None, if the mount makes metacopies: its attributes change.
    Attributes,
}

impl Extent {
    /// How many bytes of a file of this size are needed, if any are copied.
    pub(super) fn of(self, size: u64) -> u64 {
        match self {
            Self::All | Self::Attributes => size,
            Self::First(len) => len.min(size),
        }
    }
}

impl Union {
    /// Makes sure that the object of `node` lies in the upper layer, under each of its known names.
    ///
    /// # Errors
    /// `EROFS` without an upper; `ENOSPC`, `EDQUOT`, `EIO` and the like from reading and writing.
    pub(super) fn copy_up(&self, node: &Arc<Node>, extent: Extent) -> Result<()> {
        let upper = self.writable()?;
        if node.dir.is_some() {
            return self.copy_up_directory(upper, node);
        }
        if !node.is_upper() {
            self.copy_up_leaf(upper, node, extent)?;
        }
        if extent != Extent::Attributes {
            self.own_data(node, extent)?;
        }
        self.link_names(upper, node)
    }

    fn copy_up_leaf(&self, upper: &Upper, node: &Arc<Node>, extent: Extent) -> Result<()> {
        let _copying = node.copy.lock();
        if node.is_upper() {
            return Ok(());
        }
        let parent = {
            let place = node.place.read();
            if place.gone { None } else { place.parent.clone() }
        };
        if let Some(parent) = &parent {
            self.copy_up_directory(upper, parent)?;
        }
        let stat = self.stat_of(node)?;
        if node.kind == FileType::Regular {
            if extent == Extent::Attributes
                && parent.is_some()
                && let Some((staged, origin)) = self.stage_metacopy(upper, node, &stat)?
            {
                return self.publish_copy(upper, node, Copy::Metacopy(staged), origin);
            }
            let (staged, origin) = self.stage_copy(upper, node, &stat, extent)?;
            self.publish_copy(upper, node, Copy::File(staged), origin)
        } else {
            let temp = upper.work.temp();
            let at = (&*upper.work.dir, &*temp.name);
            let origin = self.copy_special(upper, node, &stat, at)?;
            self.publish_copy(upper, node, Copy::Special(temp), origin)
        }
    }

    /// Prepares the copy of a regular file, durable and complete but for a name.
    fn stage_copy<'a>(
        &self,
        upper: &'a Upper,
        node: &Arc<Node>,
        stat: &Statx,
        extent: Extent,
    ) -> Result<(Staged<'a>, Origin)> {
        let source = self.readable_data(node)?;
        let staged = upper.work.stage_file(&upper.work.dir, 0o600)?;
        let origin = self.fill_copy(upper, &source, node, (staged.file.as_fd(), stat), extent)?;
        if !self.volatile {
            staged.sync()?;
        }
        Ok((staged, origin))
    }

    /// Fills an empty file with data and attributes of a lower one.
    ///
    /// # Errors
    /// `EINTR` if nobody waits for it any more.
    fn fill_copy(
        &self,
        upper: &Upper,
        source: &Data,
        node: &Arc<Node>,
        (to, stat): (BorrowedFd<'_>, &Statx),
        extent: Extent,
    ) -> Result<Origin> {
        // Of a directory full of small files too.
        if self.interrupts.is_given_up() {
            return Err(Errno::INTR.into());
        }
        // The attributes are those of the file itself, whoever lends it data.
        let itself = if source.lent { Some(self.lower_handle(node)?) } else { None };
        let from = itself.as_ref().map_or(source.file.as_fd(), AsFd::as_fd);
        let origin = self.set_origin(upper, (from, stat), Target::Open(to))?;
        let mut part = Part::first(extent.of(stat.stx_size), stat);
        // The blocks counted are those of the file that lends nothing.
        part.dense &= !source.lent;
        let is_given_up = || self.interrupts.is_given_up();
        sys::data::copy(source.file.as_fd(), to, part, &is_given_up)
            .at("copy_file_range", || "from a lower file to work")?;
        // Not before: data would be written through to the disk bit by bit.
        match &itself {
            None => inode_flags::pass_on(from, || rustix::io::fcntl_dupfd_cloexec(to, 0)),
            Some(itself) => pass_on_flags(itself.as_fd(), to),
        }
        .at("ioctl", || "the flags of a copy in work")?;
        let from = if source.lent { Target::Handle(from) } else { Target::Open(from) };
        let route = self.route(source.layer, upper);
        copy_attributes(&upper.work, route, from, Target::Open(to), stat)?;
        Ok(origin)
    }

    /// Prepares the copy of an object that is no directory as `name` in a directory in work, not
    /// synced. Tells whether its number can be found again on the disk.
    pub(super) fn stage_named(
        &self,
        upper: &Upper,
        node: &Arc<Node>,
        stat: &Statx,
        (dir, name): (&layer::Dir, &[u8]),
    ) -> Result<bool> {
        if node.kind != FileType::Regular {
            return Ok(self.copy_special(upper, node, stat, (dir, name))?.lasts());
        }
        let source = self.source_data(node)?;
        let file = dir.call("openat", name, |at| sys::open::create(at.dir, at.name, 0o600))?;
        let origin = self.fill_copy(upper, &source, node, (file.as_fd(), stat), Extent::All)?;
        Ok(origin.lasts())
    }

    /// Prepares the copy of a symlink, device, pipe or socket as `name` in a directory in work.
    fn copy_special(
        &self,
        upper: &Upper,
        node: &Arc<Node>,
        stat: &Statx,
        (dir, name): (&layer::Dir, &[u8]),
    ) -> Result<Origin> {
        let source = self.lower_handle(node)?;
        if sys::stat::is_whiteout(stat) {
            // Of a nested overlay. Its xattr comes with the others, unless they change their names.
            let file = dir.call("openat", name, |at| sys::open::create(at.dir, at.name, 0o600))?;
            let mark = upper.work.namespace.of(&marks::NESTED_WHITEOUT_XATTRS);
            xattr::set(Target::Open(file.as_fd()), mark, b"y", XattrFlags::empty())
                .at("setxattr", || "a whiteout in work")?;
        } else if node.kind == FileType::Symlink {
            let target = self.link_target(node)?;
            dir.call("symlinkat", name, |at| sys::name::symlink(&target, at))?;
        } else if upper.carrier.is_some() {
            // Stands for it.
            dir.call("openat", name, |at| sys::open::create(at.dir, at.name, 0o600))?;
        } else {
            let mode = u32::from(stat.stx_mode) & (libc::S_IFMT | 0o600);
            let rdev = (stat.stx_rdev_major, stat.stx_rdev_minor);
            dir.call("mknodat", name, |at| sys::name::mknod(at, mode, rdev))?;
        }
        let dir = dir.handle()?;
        let to = Target::Name(At::new(dir.as_fd(), name));
        let origin = self.set_origin(upper, (source.as_fd(), stat), to)?;
        let route = self.route(self.layer_of(node), upper);
        copy_attributes(&upper.work, route, Target::Handle(source.as_fd()), to, stat)?;
        Ok(origin)
    }

    /// Publishes a finished copy under the name of the node, or keeps it without one.
    fn publish_copy(
        &self,
        upper: &Upper,
        node: &Arc<Node>,
        copy: Copy<'_>,
        origin: Origin,
    ) -> Result<()> {
        if let Some(links) = node.links.get()
            && upper.work.can.link
            && !node.place.read().gone
        {
            // Names are linked to the anchor afterwards, each on its own.
            let mut links = links.lock();
            let lasts = origin.lasts();
            if let Origin::Indexed(name) = origin {
                links.index = Some(name);
                links.unlinked = missing_links(links.count, 1);
            }
            let (dir, name) = upper.anchor(node, &links)?;
            let object = copy.keep_as_anchor(upper, dir, &name)?;
            self.numbers.keep(object.0, object.1, node.ino);
            links.anchored = true;
            if links.index.is_none() {
                self.pin_links(node, &mut links);
            }
            drop(links);
            self.now_upper(node, copy, object, lasts);
            return Ok(());
        }
        let parent = node.place.read().parent.clone().ok_or(Errno::STALE)?;
        let dir = lock::directory(&parent)?;
        let mut names = dir.names.write();
        let name = {
            let place = node.place.read();
            (!place.gone).then(|| place.name.clone())
        };
        let mut shown = copy.stat(upper)?;
        super::attr::show(node, &mut shown);
        let object = (sys::stat::device(&shown), shown.stx_ino);
        let Some(name) = name else {
            // Removed while it was copied: whoever has it open goes on with the copy.
            node.place.write().hold(copy.handle()?);
            self.numbers.keep(object.0, object.1, node.ino);
            self.now_upper(node, copy, object, false);
            return Ok(());
        };
        let to = dir.upper.get().ok_or(Errno::STALE)?;
        self.pass_on_whiteout(upper, &shown, to)?;
        if !matches!(origin, Origin::None) {
            upper.work.set_impure(to)?;
        }
        self.numbers.keep(object.0, object.1, node.ino);
        let published = unnoticed(to, || match copy {
            Copy::File(staged) => {
                upper.work.publish_file(staged, to, &name, false).map(|file| Some(Data::new(file)))
            }
            Copy::Metacopy(staged) => {
                upper.work.publish_file(staged, to, &name, false).map(|_| None)
            }
            Copy::Special(temp) => {
                upper.work.publish(temp, to, &name, RenameFlags::empty()).map(|()| None)
            }
        });
        let data = published.inspect_err(|_| self.numbers.drop_kept(object.0, object.1))?;
        if let Some(listing) = &mut names.listing {
            listing.copied_up(&name, object);
        }
        self.set_upper(node, data, object, origin.lasts());
        Ok(())
    }

    fn now_upper(&self, node: &Arc<Node>, copy: Copy<'_>, object: (u64, u64), lasts: bool) {
        let data = match copy {
            // Its name in work, if it has one, goes with this; an anchor has its own.
            Copy::File(staged) => Some(Data::new(staged.file)),
            Copy::Metacopy(_) | Copy::Special(_) => None,
        };
        self.set_upper(node, data, object, lasts);
    }

    /// Switches a node to its upper copy, (device, inode) `object`: from here on everybody reads and
    /// writes that. If its number lasts, it need not be remembered longer than the node.
    pub(super) fn set_upper(
        &self,
        node: &Arc<Node>,
        data: Option<Data>,
        object: (u64, u64),
        lasts: bool,
    ) {
        let mut place = node.place.write();
        // Not if the lower object showed another number than what the origin tells.
        place.found_origin |= lasts && self.numbers.of(place.object.0, place.object.1) == node.ino;
        place.layer = UPPER;
        place.object = object;
        drop(place);
        let data = data.map(Arc::new);
        let is_open = data.is_some();
        // Whatever is open here was copied whole.
        node.known.set_whole(is_open);
        let old = std::mem::replace(&mut *node.data.lock(), data);
        drop(old);
        if is_open {
            self.note_data(node);
        }
    }

    /// Links all known names of an anchored object into the upper layer.
    fn link_names(&self, upper: &Upper, node: &Arc<Node>) -> Result<()> {
        let Some(links) = node.links.get() else { return Ok(()) };
        loop {
            let next = {
                let links = links.lock();
                if !links.anchored {
                    return Ok(());
                }
                links.pending.last().cloned()
            };
            let Some((parent, name)) = next else { return Ok(()) };
            self.copy_up_directory(upper, &parent)?;
            let dir = lock::directory(&parent)?;
            let mut names = dir.names.write();
            let mut links = links.lock();
            let at = links
                .pending
                .iter()
                .position(|(known, pending)| Arc::ptr_eq(known, &parent) && *pending == name);
            // Linked, renamed or removed by another thread meanwhile.
            let Some(at) = at else { continue };
            let to = dir.upper.get().ok_or(Errno::STALE)?;
            let (anchors, anchor) = upper.anchor(node, &links)?;
            let handle = anchors.handle()?;
            let from = At::new(handle.as_fd(), &anchor);
            let mut stat = anchors.call("statx", &anchor, |at| sys::stat::at(at.dir, at.name))?;
            super::attr::show(node, &mut stat);
            self.pass_on_whiteout(upper, &stat, to)?;
            if links.index.is_some() {
                upper.work.set_impure(to)?;
                upper.write_count(&links, Base::Lower)?;
            }
            unnoticed(to, || to.call("linkat", &name, |to| sys::name::link(from, to)))?;
            links.unlinked = links.unlinked.saturating_sub(1);
            if let Some(listing) = &mut names.listing {
                listing.copied_up(&name, (sys::stat::device(&stat), stat.stx_ino));
            }
            links.pending.swap_remove(at);
            drop(links);
            drop(names);
            self.release(&parent, 1);
        }
    }

    /// Makes sure that a directory and all above it have an upper part.
    fn copy_up_directory(&self, upper: &Upper, node: &Arc<Node>) -> Result<()> {
        // From the first ancestor that lacks one, downward; no recursion, paths may be long.
        let mut missing = Vec::new();
        let mut next = Some(Arc::clone(node));
        while let Some(node) = next {
            if node.is_upper() {
                break;
            }
            next = node.place.read().parent.clone();
            missing.push(node);
        }
        while let Some(node) = missing.pop() {
            self.copy_up_one_directory(upper, &node)?;
        }
        Ok(())
    }

    fn copy_up_one_directory(&self, upper: &Upper, node: &Arc<Node>) -> Result<()> {
        let _copying = node.copy.lock();
        let dir = lock::directory(node)?;
        if dir.upper.get().is_some() {
            return Ok(());
        }
        let temp = upper.work.make_directory(0o700)?;
        self.fill_directory(upper, dir, &temp.name)?;
        let parent = node.place.read().parent.clone().ok_or(Errno::STALE)?;
        let above = lock::directory(&parent)?;
        let mut names = above.names.write();
        let name = {
            let place = node.place.read();
            if place.gone {
                return Err(Errno::NOENT.into());
            }
            place.name.clone()
        };
        self.publish_directory(upper, node, temp, (above, &mut names), &name)
    }

    /// Gives the directory `name` in work what the lower one has, but for its children.
    pub(super) fn fill_directory(&self, upper: &Upper, dir: &Dir, name: &[u8]) -> Result<()> {
        let source = dir.top().ok_or(Errno::STALE)?;
        let stat = source.stat()?;
        let from = source.handle()?;
        let work = upper.work.dir.handle()?;
        let made = Target::Name(At::new(work.as_fd(), name));
        self.set_origin(upper, (from.as_fd(), &stat), made)?;
        match sys::open::directory(from.as_fd(), b".") {
            Ok(from) => {
                inode_flags::pass_on(from.as_fd(), || sys::open::directory(work.as_fd(), name))
            }
            // We may not list it, nor need to.
            Err(Errno::ACCESS) => Ok(()),
            Err(errno) => Err(errno),
        }
        .at("ioctl", || "the flags of a copy in work")?;
        let route = self.route(source.layer.index, upper);
        copy_attributes(&upper.work, route, Target::Handle(from.as_fd()), made, &stat)
    }

    /// Publishes a directory in work as the upper part of `node`, which has none and is `name` in
    /// `above`.
    ///
    /// # Locks
    /// Held by the caller: `Node::copy` of the directory, `Dir::names` of the one above.
    pub(super) fn publish_directory(
        &self,
        upper: &Upper,
        node: &Node,
        temp: Temp<'_>,
        (above, names): (&Dir, &mut Names),
        name: &[u8],
    ) -> Result<()> {
        let to = above.upper.get().ok_or(Errno::STALE)?;
        let made = temp.call("statx", |at| sys::stat::at(at.dir, at.name))?;
        upper.work.set_impure(to)?;
        unnoticed(to, || upper.work.publish(temp, to, name, RenameFlags::empty()))?;
        if let Some(listing) = &mut names.listing {
            listing.copied_up(name, (sys::stat::device(&made), made.stx_ino));
        }
        // Held back until the directory is there: set once, under Node::copy.
        drop(lock::directory(node)?.upper.set(to.child(name, &made)));
        node.place.write().layer = UPPER;
        Ok(())
    }

    /// Returns an `O_PATH` handle of a lower object that is no directory.
    pub(super) fn lower_handle(&self, node: &Arc<Node>) -> Result<OwnedFd> {
        self.with_leaf(node, "openat", |leaf| match leaf {
            Leaf::Handle(fd) => sys::open::reopen(fd, rustix::fs::OFlags::PATH),
            Leaf::Name(at) => sys::open::handle(at.dir, at.name),
        })
    }
}

/// Publishes a copy in `dir` without changing the times of `dir`: nobody changed that directory.
///
/// Like the kernel's, best effort: the copy is published whether or not the times can be restored.
/// Of several copies some may be published before one fails.
pub(super) fn unnoticed<T>(dir: &layer::Dir, publish: impl FnOnce() -> Result<T>) -> Result<T> {
    let before = dir.stat()?;
    let published = publish();
    let times = times_of(&before);
    if let Err(error) = dir.with("utimensat", |dir| sys::name::set_times_handle(dir, &times)) {
        tracing::debug!("times of a directory not restored after a copy-up: {error}");
    }
    published
}

/// A finished copy without its name.
enum Copy<'a> {
    File(Staged<'a>),
    Metacopy(Staged<'a>),
    Special(Temp<'a>),
}

impl Copy<'_> {
    fn stat(&self, upper: &Upper) -> Result<Statx> {
        match self {
            Self::File(staged) | Self::Metacopy(staged) => {
                sys::stat::of(&staged.file).at("statx", || "a copy in work")
            }
            Self::Special(temp) => {
                upper.work.dir.call("statx", &temp.name, |at| sys::stat::at(at.dir, at.name))
            }
        }
    }

    /// Links the copy to `name` in `dir`; returns its device and inode number.
    fn keep_as_anchor(&self, upper: &Upper, dir: &layer::Dir, name: &[u8]) -> Result<(u64, u64)> {
        let work = upper.work.dir.handle()?;
        dir.call("linkat", name, |to| match self {
            Self::File(staged) | Self::Metacopy(staged) => staged.link(work.as_fd(), to),
            Self::Special(temp) => sys::name::link(At::new(work.as_fd(), &temp.name), to),
        })?;
        let stat = self.stat(upper)?;
        Ok((sys::stat::device(&stat), stat.stx_ino))
    }

    fn handle(&self) -> Result<Arc<OwnedFd>> {
        let handle = match self {
            Self::File(staged) | Self::Metacopy(staged) => {
                sys::open::reopen(staged.file.as_fd(), rustix::fs::OFlags::PATH)
                    .at("open", || "a copy in work")?
            }
            Self::Special(temp) => temp.call("openat", |at| sys::open::handle(at.dir, at.name))?,
        };
        Ok(Arc::new(handle))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::union::open_in;

    #[test]
    fn a_directory_keeps_its_times_though_not_all_copies_are_published() {
        let place = tempfile::tempdir().unwrap();
        let union = open_in(place.path(), |_| ());
        let root = &union.upper.as_ref().unwrap().root;
        let old = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1);
        let dir = std::fs::File::open(place.path().join("u")).unwrap();
        dir.set_times(std::fs::FileTimes::new().set_modified(old)).unwrap();
        let failed: Result<()> = unnoticed(root, || {
            root.call("mkdirat", b"first", |at| sys::name::mkdir(at, 0o700))?;
            Err(Errno::NOSPC.into())
        });
        assert_eq!(failed.unwrap_err().errno(), Errno::NOSPC);
        assert_eq!(dir.metadata().unwrap().modified().unwrap(), old);
    }
}
