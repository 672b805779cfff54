//! Mountpoints of layers: what stands there, making one, and a fresh one after the mount is gone.
//!
//! All with the lock of the layer held.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, RenameFlags, openat};
use rustix::mount::{UnmountFlags, unmount};

use super::flat::{self, Flat};
use super::layout::{LayerId, MERGED, Variant, make_dirs};
use super::{Found, Store};
use crate::error::{Context, Errno, Error, Result};
use crate::mount::mountinfo::{self, MountEntry};
use crate::options::show_path;
use crate::sys;
use crate::sys::name::At;

/// What stands at a mountpoint.
#[derive(Debug)]
pub(super) enum Present {
    /// A mount.
    Mount(MountEntry),
    /// A copy in place of one.
    Flat(Flat),
}

impl Store {
    /// Returns what stands at the mountpoint of a layer.
    pub(super) fn present(
        &self,
        merged: &Path,
        found: &Found<'_>,
        id: &LayerId,
    ) -> Result<Option<Present>> {
        if let Some(entry) = mounted(merged)? {
            return Ok(Some(Present::Mount(entry)));
        }
        let flat = flat::find(&found.dir).at("read", || found.home.show(id))?;
        Ok(flat.map(Present::Flat))
    }

    /// Makes the mountpoint where it is missing.
    pub(super) fn make_merged(&self, layer: &OwnedFd, merged: &Path) -> Result<()> {
        if self.is_apart(merged) {
            return make_dirs(merged, 0o700);
        }
        match sys::name::mkdir(At::new(layer.as_fd(), MERGED), 0o700) {
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(errno) => Err(Error::sys("mkdirat", show_path(merged), errno)),
        }
    }

    /// Returns whether a mountpoint lies in the run home.
    pub(super) fn is_apart(&self, merged: &Path) -> bool {
        merged.starts_with(&self.run_home)
    }

    /// Puts a fresh mountpoint in place of one that was used: copies of the mount that live on in
    /// other namespaces end with the directory.
    pub(super) fn renew_merged(
        &self,
        found: &Found<'_>,
        id: &LayerId,
        layer: &OwnedFd,
        merged: &Path,
    ) -> Result<()> {
        const NEXT: &[u8] = b"merged.1";
        if self.is_apart(merged) {
            // Nothing else lies there.
            for dir in [Some(merged), merged.parent()].into_iter().flatten() {
                match rustix::fs::rmdir(dir) {
                    Ok(()) | Err(Errno::NOENT | Errno::NOTEMPTY | Errno::BUSY) => (),
                    Err(errno) => return Err(Error::sys("rmdir", show_path(dir), errno)),
                }
            }
            return Ok(());
        }
        let at = || show_path(merged);
        if found.home.variant() == Variant::Docker {
            return match sys::name::rmdir(At::new(layer.as_fd(), MERGED)) {
                Ok(()) | Err(Errno::NOENT) => Ok(()),
                Err(errno) => Err(Error::sys("unlinkat", at(), errno)),
            };
        }
        let old = sys::stat::find(layer.as_fd(), MERGED).at("statx", at)?;
        match sys::name::mkdir(At::new(layer.as_fd(), NEXT), 0o700) {
            Ok(()) | Err(Errno::EXIST) => (),
            Err(errno) => return Err(Error::sys("mkdirat", at(), errno)),
        }
        if let Some(old) = old {
            let (uid, gid) = (Some(old.stx_uid), Some(old.stx_gid));
            sys::name::chown(At::new(layer.as_fd(), NEXT), uid, gid).at("fchownat", at)?;
        }
        sys::name::rename(
            At::new(layer.as_fd(), NEXT),
            At::new(layer.as_fd(), MERGED),
            RenameFlags::empty(),
        )
        .at("renameat", || format!("{}: files were written beneath the mount", found.home.show(id)))
    }
}

/// Returns the mount at `merged`; one whose server has died is taken away first.
///
/// # Errors
/// Those of reading the mount table, and of umount2(2).
pub(super) fn mounted(merged: &Path) -> Result<Option<MountEntry>> {
    loop {
        let entries = mountinfo::load()?;
        let Some(entry) = mountinfo::find_top(&entries, merged) else { return Ok(None) };
        match rustix::fs::statfs(merged) {
            Err(Errno::NOTCONN | Errno::CONNABORTED) => {
                unmount(merged, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
                    .at("umount2", || show_path(merged))?;
            }
            _ => return Ok(Some(entry.clone())),
        }
    }
}

/// Takes a mount down; one in use loses its place now and ends with its last user.
pub(super) fn take_down(merged: &Path, entry: &MountEntry) -> Result<()> {
    let at = || show_path(merged);
    if entry.is_fuse() {
        match crate::mount::unmount::unmount(merged, false) {
            Ok(()) => return Ok(()),
            Err(error) => tracing::debug!("{error}"),
        }
    } else {
        match unmount(merged, UnmountFlags::NOFOLLOW) {
            Ok(()) => return Ok(()),
            Err(Errno::BUSY) => (),
            Err(errno) => return Err(Error::sys("umount2", at(), errno)),
        }
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    if let Ok(root) = openat(CWD, merged, flags, Mode::empty()) {
        rustix::fs::syncfs(&root).at("syncfs", at)?;
    }
    match unmount(merged, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        // Not a mountpoint any more: it went after all.
        Ok(()) | Err(Errno::INVAL) => Ok(()),
        Err(errno) => Err(Error::sys("umount2", at(), errno)),
    }
}
