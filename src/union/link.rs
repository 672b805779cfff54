//! Hard links: one more name for an upper object; a lower one is copied up first.

use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::{OFlags, RenameFlags};

use super::attr::{FileType, show};
use super::copy_up::Extent;
use super::create::check_name;
use super::listing::Child;
use super::lookup::Entry;
use super::node::{Links, Node, NodeId, Place};
use super::protect::Change;
use super::{Leaf, Union, lock};
use crate::error::{Context, Errno, Result};
use crate::layer::UPPER;
use crate::sys;
use crate::sys::xattr::Target;

impl Union {
    /// Gives `node` one more name.
    ///
    /// # Errors
    /// `EROFS` without an upper; `EPERM` for a directory; `ENOENT` for an object that lost its name;
    /// `EEXIST`; those of the copy-up and of linkat(2).
    pub fn link(&self, node: NodeId, new_parent: NodeId, new_name: &[u8]) -> Result<Entry> {
        let upper = self.writable()?;
        check_name(new_name)?;
        let (node, parent) = (self.node(node)?, self.node(new_parent)?);
        if node.dir.is_some() {
            return Err(Errno::PERM.into());
        }
        let lost = |place: &Place| place.gone && !place.nameless;
        if lost(&node.place.read()) {
            return Err(Errno::NOENT.into());
        }
        let dir = lock::directory(&parent)?;
        self.may(&parent, Change::Add)?;
        self.may(&node, Change::Name)?;
        self.copy_up(&node, Extent::All)?;
        self.copy_up(&parent, Extent::All)?;
        let object = self.with_leaf(&node, "openat", |leaf| match leaf {
            Leaf::Handle(fd) => sys::open::reopen(fd, OFlags::PATH),
            Leaf::Name(at) => sys::open::handle(at.dir, at.name),
        })?;
        let mut names = dir.names.write();
        if parent.place.read().gone {
            return Err(Errno::NOENT.into());
        }
        let to = dir.upper.get().ok_or(Errno::STALE)?;
        self.pass_on_origin(upper, &node, to)?;
        if node.kind == FileType::CharDevice {
            let mut stat = sys::stat::of(&object).at("statx", || "an upper device")?;
            show(&node, &mut stat);
            self.pass_on_whiteout(upper, &stat, to)?;
        }
        self.before_count_changes(upper, &node)?;
        if self.in_the_way(dir, &mut names, to, new_name)? {
            let temp = upper.work.temp();
            temp.call("linkat", |at| sys::name::link_handle(object.as_fd(), at))?;
            upper.work.publish(temp, to, new_name, RenameFlags::empty())?;
        } else {
            to.call("linkat", new_name, |at| sys::name::link_handle(object.as_fd(), at))?;
            if names.listing.as_ref().is_some_and(|listing| listing.is_below(new_name)) {
                upper.work.uncover(to, new_name);
            }
        }
        let mut stat = sys::stat::of(&object)
            .and_then(|stat| self.seen_in_upper(Target::Handle(object.as_fd()), stat))
            .at("statx", || to.describe(new_name))
            // The name may be there all the same.
            .inspect_err(|_| self.distrust(&mut names))?;
        show(&node, &mut stat);
        if let Some(listing) = &mut names.listing {
            listing.insert(Child {
                name: new_name,
                kind: node.kind,
                top: UPPER,
                object: (sys::stat::device(&stat), stat.stx_ino),
                parts: &[],
            });
        }
        match node.links.get() {
            Some(links) => {
                let mut links = links.lock();
                links.count = links.count.saturating_add(1);
            }
            None => self.settle(&node, &parent, new_name),
        }
        self.table.retain(&node);
        Ok(Entry::given(&node, self.attr_from(&node, &stat)))
    }

    /// Keeps the node of an object with several lower names for the life of the mount: a lookup
    /// would find the lower object, and know nothing of what became of it.
    pub(super) fn pin_links(&self, node: &Arc<Node>, links: &mut Links) {
        if !links.pinned {
            links.pinned = true;
            self.table.retain(node);
        }
    }
}
