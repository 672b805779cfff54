//! How objects carry owner, mode and type: in their inodes or, in layers with overrides, in an
//! xattr beside them.
//!
//! An upper of that kind holds nothing but directories, symlinks and files, all of the server and
//! all with the mode of its root: what they stand for is in their xattrs. Symlinks cannot carry
//! one; they have the owner that the server may give them. ACLs are neither served nor kept there.
//!
//! Locks: `Node::copy` over reading and writing an xattr.

use std::borrow::Cow;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::XattrFlags;

use super::attr::{FileType, Writer};
use super::file::Data;
use super::node::{Node, NodeId};
use super::owner::Owner;
use super::{Union, Upper, acl};
use crate::error::{Context, Errno, Error, Result};
use crate::layer::{self, UPPER};
use crate::marks;
use crate::overrides::{self, Form, Override};
use crate::sys;
use crate::sys::stat::Statx;
use crate::sys::xattr::{self, CAPABILITY, Target};

/// How an upper with overrides keeps its objects.
#[derive(Clone, Copy, Debug)]
pub(super) struct Carrier {
    form: Form,
    /// Mode of everything on the disk, that of the upper's root: it says who may reach the layer.
    mask: u32,
}

/// Which mode bits of the upper's root its objects get, and which they need.
const MASK_MOST: u32 = 0o755;
const MASK_LEAST: u32 = 0o700;

/// What the root of an upper says when there is nothing that it could be taken from.
const ROOT: Override =
    Override { uid: 0, gid: 0, mode: 0o555, kind: Some((libc::S_IFDIR, (0, 0))) };

/// From where to where a copy goes.
#[derive(Clone, Copy)]
pub(super) struct Route {
    pub(super) from: Option<Form>,
    pub(super) to: Option<Carrier>,
}

impl Route {
    /// Returns the name that an xattr of the source has in the copy, if it goes along.
    pub(super) fn xattr<'a>(&self, stored: &'a [u8]) -> Option<Cow<'a, [u8]>> {
        let visible = overrides::visible_name(self.from, stored)?;
        if marks::is_private_xattr(visible) || visible.starts_with(ACL) && self.drops_acls() {
            return None;
        }
        overrides::stored_name(self.to.map(|carrier| carrier.form), visible)
    }

    /// Tells whether ACLs stay behind.
    pub(super) fn drops_acls(&self) -> bool {
        self.from.is_some() || self.to.is_some()
    }
}

/// What begins the names of ACLs.
const ACL: &[u8] = b"system.posix_acl_";

impl Carrier {
    /// Makes the root of an upper say what it is, and returns how the rest is kept; `None` where
    /// inodes say it. `asked` is the form that the mount was asked for, `lowers` are the other
    /// layers' roots.
    ///
    /// # Errors
    /// Those of reading and setting the xattr.
    pub(super) fn prepare(
        asked: Option<Form>,
        root: &OwnedFd,
        lowers: &[(Option<Form>, BorrowedFd<'_>)],
    ) -> Result<Option<Self>> {
        let target = Target::Handle(root.as_fd());
        let context = || "upperdir";
        let found = layer::form_of(target).at("listxattr", context)?;
        let form = match (asked, found) {
            (Some(Form::Containers), Some(Form::User | Form::Both)) => Some(Form::Both),
            (asked, found) => asked.or(found),
        };
        let Some(form) = form else { return Ok(None) };
        let mask = u32::from(sys::stat::of(root).at("statx", context)?.stx_mode);
        let carrier = Self { form, mask: mask & MASK_MOST | MASK_LEAST };
        if found != Some(form) {
            let own = (found, root.as_fd());
            let mut first = None;
            for (form, root) in [own].iter().chain(lowers) {
                if let Some(form) = form {
                    first =
                        layer::overridden(*form, Target::Handle(*root)).at("getxattr", context)?;
                    break;
                }
            }
            let said = Override { kind: ROOT.kind, ..first.unwrap_or(ROOT) };
            xattr::set(target, form.xattr(), &said.print(), XattrFlags::empty())
                .map_err(|errno| unsupported(form, errno))?;
        }
        Ok(Some(carrier))
    }

    pub(super) fn form(self) -> Form {
        self.form
    }

    /// Makes an object that is not published yet stand for what `said` says.
    ///
    /// # Errors
    /// Those of chmod(2) and setxattr(2).
    pub(super) fn put(
        self,
        handle: BorrowedFd<'_>,
        said: &Override,
    ) -> std::result::Result<(), Errno> {
        sys::name::chmod_handle(handle, self.mask)?;
        self.write(handle, said)
    }

    fn write(self, handle: BorrowedFd<'_>, said: &Override) -> std::result::Result<(), Errno> {
        let object = Target::Handle(handle);
        xattr::set(object, self.form.xattr(), &said.print(), XattrFlags::empty())?;
        match self.form.older().map(|name| xattr::remove(object, name)) {
            None | Some(Ok(()) | Err(Errno::NODATA)) => Ok(()),
            Some(failed) => failed,
        }
    }

    /// Takes the capabilities of a program that changes.
    fn drop_capability(self, handle: BorrowedFd<'_>) -> std::result::Result<(), Errno> {
        let Some(name) = overrides::stored_name(Some(self.form), CAPABILITY) else { return Ok(()) };
        match xattr::remove(Target::Handle(handle), &name) {
            Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(()),
            done => done,
        }
    }
}

fn unsupported(form: Form, errno: Errno) -> Error {
    Error::Unsupported {
        feature: format!(
            "upperdir: its root takes no xattr {} ({}); use ext4, xfs, btrfs or tmpfs (Linux 6.6 or \
             later), and xattr_permissions=2 without privilege",
            String::from_utf8_lossy(form.xattr()),
            Error::from(errno)
        )
        .into(),
    }
}

/// Returns what an object shall stand for that shows `stat`.
pub(super) fn override_of(stat: &Statx) -> Override {
    let mode = u32::from(stat.stx_mode);
    Override {
        uid: stat.stx_uid,
        gid: stat.stx_gid,
        mode: mode & 0o7777,
        kind: Some((mode & libc::S_IFMT, (stat.stx_rdev_major, stat.stx_rdev_minor))),
    }
}

/// Returns the mode bits of an object whose access ACL stays behind: the mask of the ACL, which
/// stands in the group's place, gives the group nothing that it did not have.
pub(super) fn mode_without_acl(from: Target<'_>, mode: u32) -> Result<u32> {
    let value = xattr::get(from, acl::ACCESS).at("getxattr", || "a lower object")?;
    Ok(match value {
        Some(value) => mode & !0o070 | (mode & acl::group_permissions(&value)? << 3),
        None => mode,
    })
}

/// Gives a symlink its owner, where the server may.
///
/// # Errors
/// Those of fchownat(2) but `EPERM` and `EINVAL`.
pub(super) fn try_owner(done: std::result::Result<(), Errno>) -> std::result::Result<(), Errno> {
    match done {
        Err(Errno::PERM | Errno::INVAL) => Ok(()),
        done => done,
    }
}

impl Union {
    /// Returns by which xattr a layer overrides its inodes.
    pub(super) fn form(&self, layer: layer::Index) -> Option<Form> {
        self.forms.get(usize::from(layer)).copied().flatten()
    }

    /// Returns the layer that the object of a node lies in.
    pub(super) fn layer_of(&self, node: &Node) -> layer::Index {
        if let Some(dir) = &node.dir {
            return dir.top().map_or(UPPER, |top| top.layer.index);
        }
        let anchored = node.links.get().is_some_and(|links| links.lock().anchored);
        if anchored { UPPER } else { node.place.read().layer }
    }

    /// Calls `call` with the form of the layer that the object of a node lies in, again if it was
    /// copied up meanwhile.
    pub(super) fn with_form<T>(
        &self,
        node: &Node,
        mut call: impl FnMut(Option<Form>) -> Result<T>,
    ) -> Result<T> {
        if self.forms.is_empty() {
            return call(None);
        }
        loop {
            let layer = self.layer_of(node);
            let done = call(self.form(layer));
            if self.layer_of(node) == layer {
                return done;
            }
        }
    }

    /// Returns how a copy from `layer` to the upper goes.
    pub(super) fn route(&self, from: layer::Index, upper: &Upper) -> Route {
        Route { from: self.form(from), to: upper.carrier }
    }

    /// Completes what statx(2) says of an upper object.
    pub(super) fn seen_in_upper(
        &self,
        target: Target<'_>,
        stat: Statx,
    ) -> std::result::Result<Statx, Errno> {
        match self.form(UPPER) {
            Some(form) => layer::seen(form, target, stat),
            None => Ok(stat),
        }
    }

    /// Changes owner and mode of a published upper object that has its own in an xattr, as chown(2)
    /// and chmod(2) would: a new owner takes setuid, setgid and capabilities of a program. Of whom
    /// only `group` is known may not keep setgid of another group.
    ///
    /// # Errors
    /// Those of reading and setting the xattr.
    pub(super) fn change_override(
        &self,
        carrier: Carrier,
        handle: BorrowedFd<'_>,
        owner: Owner,
        mode: Option<u32>,
        writer: Option<Writer>,
    ) -> std::result::Result<(), Errno> {
        let real = sys::stat::of(handle)?;
        let (uid, gid) = owner.to_store();
        let real_kind = FileType::of_mode(u32::from(real.stx_mode));
        match real_kind {
            FileType::Regular | FileType::Directory => {}
            FileType::Symlink => return try_owner(sys::name::chown_handle(handle, uid, gid)),
            // A device or pipe that was there before can have none.
            FileType::Fifo | FileType::Socket | FileType::CharDevice | FileType::BlockDevice => {
                if owner != Owner::default() {
                    sys::name::chown_handle(handle, uid, gid)?;
                }
                return mode.map_or(Ok(()), |mode| sys::name::chmod_handle(handle, mode));
            }
        }
        let stat = layer::seen(carrier.form, Target::Handle(handle), real)?;
        let mut said = override_of(&stat);
        if owner != Owner::default() {
            said.uid = uid.unwrap_or(said.uid);
            said.gid = gid.unwrap_or(said.gid);
            if real_kind != FileType::Directory {
                said.mode &= !libc::S_ISUID;
                let is_foreign = || writer.is_some_and(|writer| !self.is_of_group(&stat, writer));
                let is_setgid = said.mode & libc::S_ISGID != 0;
                if is_setgid && (said.mode & libc::S_IXGRP != 0 || is_foreign()) {
                    said.mode &= !libc::S_ISGID;
                }
                carrier.drop_capability(handle)?;
            }
        }
        said.mode = mode.unwrap_or(said.mode) & 0o7777;
        carrier.write(handle, &said)
    }

    /// Takes the capabilities of a file that is about to be written, where they are in an xattr that
    /// the filesystem does not know as such.
    pub(super) fn drop_overridden_capability(&self, node: &Node, data: &Data) -> Result<()> {
        let Some(carrier) = self.upper.as_ref().and_then(|upper| upper.carrier) else {
            return Ok(());
        };
        if node.known.is_unprivileged() {
            return Ok(());
        }
        let since = node.known.looking();
        let context = || "an open file";
        carrier.drop_capability(data.file.as_fd()).at("removexattr", context)?;
        let stat = sys::stat::of(&data.file)
            .and_then(|stat| self.seen_in_upper(Target::Open(data.file.as_fd()), stat))
            .at("statx", context)?;
        if u32::from(stat.stx_mode) & sys::stat::SETIDS == 0 {
            node.known.found_unprivileged(since);
        }
        Ok(())
    }

    /// Returns the name that an xattr has in a layer of this form; `None` if there can be none.
    pub(super) fn stored_xattr<'a>(form: Option<Form>, visible: &'a [u8]) -> Option<Cow<'a, [u8]>> {
        if form.is_some() && visible.starts_with(ACL) {
            return None;
        }
        match overrides::stored_name(form, visible)? {
            Cow::Borrowed(name) => marks::stored_name(name),
            encoded @ Cow::Owned(_) => Some(encoded),
        }
    }

    /// Returns the name that users see an xattr by; `None` if it is hidden.
    pub(super) fn visible_xattr<'a>(form: Option<Form>, stored: &'a [u8]) -> Option<Cow<'a, [u8]>> {
        let visible = overrides::visible_name(form, stored)?;
        if form.is_some() && visible.starts_with(ACL) { None } else { marks::visible_name(visible) }
    }

    /// Refuses an xattr that would change what the layer is at the next mount, or that it cannot keep.
    ///
    /// # Errors
    /// `EPERM`, `EOPNOTSUPP`.
    pub(super) fn check_settable(&self, node: &Arc<Node>, name: &[u8]) -> Result<()> {
        match self.form(UPPER) {
            None if node.id == NodeId::ROOT && overrides::is_stat_xattr(name) => {
                Err(Errno::PERM.into())
            }
            Some(_) if name.starts_with(ACL) => Err(Errno::OPNOTSUPP.into()),
            _ => Ok(()),
        }
    }
}
