//! What a copy gets of the object that it is made of, but for its data: owner, mode, times, xattrs and flags.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::XattrFlags;

use super::attr::{FileType, times_of};
use super::look::{Route, mode_without_acl, override_of, try_owner};
use super::protect;
use super::publish::{self, Work};
use crate::error::{Context, Errno, Error, Result};
use crate::overrides::Override;
use crate::sys;
use crate::sys::inode_flags;
use crate::sys::stat::Statx;
use crate::sys::xattr::{self, CAPABILITY, Target};

/// Gives a copy the flags of the file behind an `O_PATH` handle, unless we may not read it.
pub(super) fn pass_on_flags(
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
) -> std::result::Result<(), Errno> {
    match sys::open::reopen(from, rustix::fs::OFlags::RDONLY) {
        Ok(from) => inode_flags::pass_on(from.as_fd(), || rustix::io::fcntl_dupfd_cloexec(to, 0)),
        Err(Errno::ACCESS) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// Gives `to` what `stat` and the xattrs of `from` say. The order matters: chown clears setuid
/// and capabilities, the mode may forbid its owner to set an xattr, and all of them change times.
pub(super) fn copy_attributes(
    work: &Work,
    route: Route,
    from: Target<'_>,
    to: Target<'_>,
    stat: &Statx,
) -> Result<()> {
    let context = || "a copy in work";
    protect::pass_on(work, stat, to).at("setxattr", context)?;
    let owner = (Some(stat.stx_uid), Some(stat.stx_gid));
    let mut mode = u32::from(stat.stx_mode);
    let is_symlink = FileType::of_mode(mode) == FileType::Symlink;
    if is_symlink && !work.can.symlink_attributes {
        return Ok(());
    }
    if route.drops_acls() && route.from.is_none() && !is_symlink {
        mode = mode_without_acl(from, mode)?;
    }
    if let Some(carrier) = route.to
        && !is_symlink
    {
        let mut said = Override { mode: mode & 0o7777, ..override_of(stat) };
        if sys::stat::is_whiteout(stat) {
            // Of a nested overlay: a file, or it would be one of ours.
            said.kind = Some((libc::S_IFREG, (0, 0)));
        }
        match to {
            Target::Open(fd) | Target::Handle(fd) | Target::Directory(fd) => carrier.put(fd, &said),
            Target::Name(at) => sys::open::handle(at.dir, at.name)
                .and_then(|handle| carrier.put(handle.as_fd(), &said)),
        }
        .at("setxattr", context)?;
        copy_xattrs(route, from, to)?;
        return copy_times(to, stat);
    }
    match (route.to, work.give(to, owner)) {
        (_, Ok(true)) => {}
        (_, Ok(false)) => mode = publish::without_owner(mode),
        (Some(_), given) => {
            try_owner(given.map(|_| ()).map_err(|error| error.errno())).at("fchownat", context)?;
        }
        (None, given) => {
            given?;
        }
    }
    copy_xattrs(route, from, to)?;
    if !is_symlink {
        match to {
            Target::Open(fd) | Target::Handle(fd) | Target::Directory(fd) => {
                sys::name::chmod_handle(fd, mode)
            }
            Target::Name(at) => sys::open::handle(at.dir, at.name)
                .and_then(|handle| sys::name::chmod_handle(&handle, mode)),
        }
        .at("chmod", context)?;
    }
    copy_times(to, stat)
}

fn copy_times(to: Target<'_>, stat: &Statx) -> Result<()> {
    let times = times_of(stat);
    match to {
        Target::Open(fd) | Target::Handle(fd) | Target::Directory(fd) => {
            sys::name::set_times_handle(fd, &times)
        }
        Target::Name(at) => sys::name::set_times(at, &times),
    }
    .at("utimensat", || "a copy in work")
}

fn copy_xattrs(route: Route, from: Target<'_>, to: Target<'_>) -> Result<()> {
    let names = xattr::list(from).at("listxattr", || "a lower object")?;
    for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        if is_foreign_acl(name) {
            continue;
        }
        let Some(copied) = route.xattr(name) else { continue };
        let value = xattr::get(from, name).at("getxattr", || "a lower object")?;
        let Some(value) = value else { continue };
        match xattr::set(to, &copied, &value, XattrFlags::empty()) {
            Ok(()) => {}
            // The upper has no such xattrs; an ACL without which access would change is no
            // such case, nor is a capability.
            Err(Errno::OPNOTSUPP)
                if !name.starts_with(b"system.posix_acl_") && name != CAPABILITY =>
            {
                tracing::debug!("copy-up leaves out {}", String::from_utf8_lossy(name));
            }
            // Labels and the like that only a privileged process may set.
            Err(Errno::PERM) if name.starts_with(b"security.") || name.starts_with(b"trusted.") => {
                tracing::debug!("copy-up may not set {}", String::from_utf8_lossy(name));
            }
            Err(errno) => {
                let name = String::from_utf8_lossy(name).into_owned();
                return Err(Error::sys("setxattr", format!("{name} of a copy in work"), errno));
            }
        }
    }
    Ok(())
}

/// NFS shows its own ACLs as an xattr, which no other filesystem takes.
fn is_foreign_acl(name: &[u8]) -> bool {
    name.starts_with(b"system.") && !name.starts_with(b"system.posix_acl_")
}
