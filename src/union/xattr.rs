//! Extended attributes as users see them, and inode flags.
//!
//! Marks of the format are private: neither seen nor set through the mount. A user's own xattr of
//! such a name is stored escaped, so that an overlay can be nested in this one.

use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::XattrFlags;

use super::attr::FileType;
use super::copy_up::Extent;
use super::node::{Node, NodeId};
use super::protect::{self, Change};
use super::{Leaf, Union};
use crate::error::{Errno, Result};
use crate::layer::UPPER;
use crate::marks;
use crate::sys::inode_flags;
use crate::sys::xattr::{self, Target};

/// Tells whether an xattr is what makes a file the whiteout of a nested overlay that `node` shows.
fn is_form(node: &Node, name: &[u8]) -> bool {
    node.kind == FileType::CharDevice && marks::WHITEOUT_XATTRS.contains(&name)
}

impl Union {
    /// Returns the value of an xattr; `None` if the object has none of that name.
    ///
    /// # Errors
    /// Those of getxattr(2) but `ENODATA` and `EOPNOTSUPP`.
    pub fn getxattr(&self, node: NodeId, name: &[u8]) -> Result<Option<Vec<u8>>> {
        let node = self.node(node)?;
        if is_form(&node, name) {
            return Ok(None);
        }
        if is_listed(name) && !self.may_have_xattrs(&node)? {
            return Ok(None);
        }
        let value = self.with_form(&node, |form| {
            let Some(stored) = Self::stored_xattr(form, name) else { return Ok(None) };
            self.with_xattrs(&node, "getxattr", |target| xattr::get(target, &stored))
        })?;
        value.map_or(Ok(None), |value| self.shown_value(name, value))
    }

    /// Tells whether the object has xattrs that users may see: from memory, but for the first time.
    fn may_have_xattrs(&self, node: &Arc<Node>) -> Result<bool> {
        match node.known.has_xattrs() {
            Some(some) => Ok(some),
            None => self.visible_xattrs(node).map(|names| !names.is_empty()),
        }
    }

    fn visible_xattrs(&self, node: &Arc<Node>) -> Result<Vec<u8>> {
        let visible = self.with_form(node, |form| {
            let stored = self.with_xattrs(node, "listxattr", |target| {
                let stored = xattr::list(target)?;
                // One question answers two. Of a lower object it is known, and stays so when it is copied up.
                if node.protection.is_unknown() {
                    node.protection.found(protect::read_mark(target, &stored)?);
                }
                Ok(stored)
            })?;
            let mut visible = Vec::with_capacity(stored.len());
            for name in stored.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
                let shown = Self::visible_xattr(form, name);
                if let Some(name) = shown.filter(|name| !is_form(node, name)) {
                    visible.extend_from_slice(&name);
                    visible.push(0);
                }
            }
            Ok(visible)
        })?;
        node.known.found_xattrs(!visible.is_empty());
        Ok(visible)
    }

    /// Returns the names of all xattrs, each followed by a NUL.
    ///
    /// # Errors
    /// Those of listxattr(2).
    pub fn listxattr(&self, node: NodeId) -> Result<Vec<u8>> {
        let node = self.node(node)?;
        if node.known.has_xattrs() == Some(false) {
            return Ok(Vec::new());
        }
        self.visible_xattrs(&node)
    }

    /// Sets an xattr; a lower object is copied up first.
    ///
    /// # Errors
    /// `EROFS` without an upper; `EPERM` for a name that cannot be stored; those of the copy-up and
    /// of setxattr(2).
    pub fn setxattr(
        &self,
        node: NodeId,
        name: &[u8],
        value: &[u8],
        flags: XattrFlags,
    ) -> Result<()> {
        let node = self.node(node)?;
        self.check_settable(&node, name)?;
        let stored = Self::stored_xattr(self.form(UPPER), name).ok_or(Errno::PERM)?;
        let value = self.stored_value(name, value)?;
        self.change_xattrs(&node, "setxattr", |target| xattr::set(target, &stored, &value, flags))
    }

    /// Removes an xattr; a lower object is copied up first.
    ///
    /// # Errors
    /// `EROFS` without an upper; `ENODATA`; those of the copy-up and of removexattr(2).
    pub fn removexattr(&self, node: NodeId, name: &[u8]) -> Result<()> {
        self.writable()?;
        let id = node;
        let node = self.node(node)?;
        // Nothing to remove is no reason to copy up.
        if !node.is_upper() && self.getxattr(id, name)?.is_none() {
            return Err(Errno::NODATA.into());
        }
        let stored = Self::stored_xattr(self.form(UPPER), name).ok_or(Errno::NODATA)?;
        self.change_xattrs(&node, "removexattr", |target| xattr::remove(target, &stored))
    }

    fn change_xattrs(
        &self,
        node: &Arc<Node>,
        op: &'static str,
        call: impl FnMut(Target<'_>) -> std::result::Result<(), Errno>,
    ) -> Result<()> {
        self.may(node, Change::Attributes)?;
        self.copy_up(node, Extent::Attributes)?;
        node.known.setting_xattr();
        // An ACL is a mode too.
        node.known.changing_privileges();
        let settled = self.settle_attributes(node);
        let changed = self.with_xattrs(node, op, call);
        drop(settled);
        node.known.changing_privileges();
        if let Some(dir) = &node.dir {
            *dir.default_acl.lock() = None;
        }
        changed
    }

    pub(super) fn with_xattrs<T>(
        &self,
        node: &Arc<Node>,
        op: &'static str,
        mut call: impl FnMut(Target<'_>) -> std::result::Result<T, Errno>,
    ) -> Result<T> {
        if let Some(dir) = &node.dir {
            let top = dir.top().ok_or(Errno::STALE)?;
            return top.with(op, |dir| call(Target::Handle(dir)));
        }
        self.with_leaf(node, op, |leaf| match leaf {
            Leaf::Handle(fd) => call(Target::Handle(fd)),
            Leaf::Name(at) => call(Target::Name(at)),
        })
    }

    /// `FS_IOC_GETFLAGS`: the inode flags of a file or directory.
    ///
    /// # Errors
    /// `ENOTTY` for other objects and where the filesystem has no flags.
    pub fn get_flags(&self, node: NodeId) -> Result<u32> {
        let flags = self.with_flags(node, false, inode_flags::get)?;
        Ok(flags | self.protection(&self.node(node)?)?)
    }

    /// `FS_IOC_SETFLAGS`; a lower object is copied up first.
    ///
    /// # Errors
    /// As [`Union::get_flags`]; `EROFS` without an upper; `EPERM` without privilege.
    pub fn set_flags(&self, node: NodeId, flags: u32) -> Result<()> {
        let others = self.change_protection(node, flags)?;
        self.with_flags(node, true, |fd| inode_flags::set(fd, others))
    }

    /// `FS_IOC_FSGETXATTR`: `struct fsxattr`, raw.
    ///
    /// # Errors
    /// As [`Union::get_flags`].
    pub fn get_fsxattr(&self, node: NodeId) -> Result<[u8; 28]> {
        let raw = self.with_flags(node, false, inode_flags::get_fsxattr)?;
        let protection = inode_flags::protection_of(&raw) | self.protection(&self.node(node)?)?;
        Ok(inode_flags::with_protection(&raw, protection))
    }

    /// `FS_IOC_FSSETXATTR`; a lower object is copied up first.
    ///
    /// # Errors
    /// As [`Union::set_flags`].
    pub fn set_fsxattr(&self, node: NodeId, raw: &[u8; 28]) -> Result<()> {
        self.change_protection(node, inode_flags::protection_of(raw))?;
        let raw = inode_flags::with_protection(raw, 0);
        self.with_flags(node, true, |fd| inode_flags::set_fsxattr(fd, &raw))
    }

    /// Copies an object up that can have flags, and keeps those apart that protect it.
    fn change_protection(&self, node: NodeId, flags: u32) -> Result<u32> {
        let node = self.node(node)?;
        if node.dir.is_none() && node.kind != FileType::Regular {
            return Err(Errno::NOTTY.into());
        }
        self.copy_up(&node, Extent::All)?;
        self.protect(&node, flags)
    }

    fn with_flags<T>(
        &self,
        node: NodeId,
        change: bool,
        mut call: impl FnMut(std::os::fd::BorrowedFd<'_>) -> std::result::Result<T, Errno>,
    ) -> Result<T> {
        let node = self.node(node)?;
        if change {
            self.copy_up(&node, Extent::All)?;
        }
        if let Some(dir) = &node.dir {
            return dir.top().ok_or(Errno::STALE)?.with("ioctl", |dir| {
                // The handle may be one that takes no ioctl (O_PATH).
                let dir = crate::sys::open::directory(dir, b".")?;
                call(dir.as_fd())
            });
        }
        if node.kind != FileType::Regular {
            return Err(Errno::NOTTY.into());
        }
        let data = self.readable_data(&node)?;
        if data.lent {
            return call(self.open_itself(&node, false)?.as_fd()).map_err(Into::into);
        }
        call(data.file.as_fd()).map_err(Into::into)
    }
}

/// Tells whether listxattr(2) names an xattr of this name where there is one, on every filesystem;
/// some of `system.` are made up when asked for.
fn is_listed(name: &[u8]) -> bool {
    [&b"user."[..], b"trusted.", b"security.", b"system.posix_acl_"]
        .iter()
        .any(|namespace| name.starts_with(namespace))
}
