//! The home as a private mount of its own, as containers/storage has it: what is mounted in it is
//! not copied into the mount namespaces that others make meanwhile, where it would be kept busy.
//!
//! An engine that ends undoes it, with all that is mounted there, unless a layer is mounted that its
//! records name; [`Store::mountpoint`] minds that.
//!
//! Made before the first layer is mounted in it, and not at all with `skip_mount_home`, without
//! `CAP_SYS_ADMIN`, or where something is mounted in the home already, which it would hide. It stays
//! until [`Store::cleanup`]: engines rely on it as well.
//!
//! A crash leaves the home mounted, or not.

use std::path::Path;

use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags};
use rustix::mount::{MountPropagationFlags, UnmountFlags, mount_bind, mount_change, unmount};

use super::layout::Variant;
use super::lock::{self, Held};
use super::{Store, check};
use crate::error::{Context, Errno, Error, Result};
use crate::mount::mountinfo::{self, MountEntry};
use crate::options::show_path;
use crate::sys::lockfile::Sharing;

impl Store {
    /// Makes the home a private mount unless it is one, and keeps it as it is while the value lives;
    /// `None` if it is not to be one, or cannot.
    ///
    /// # Errors
    /// Those of mount(2), but for lack of privilege.
    /// # Locks
    /// The one under which stores are set up, also on return.
    pub(super) fn hold_home(&self) -> Result<Option<Held>> {
        let path = self.home().path();
        if self.options().skip_mount_home || self.home().variant() != Variant::Containers {
            return Ok(None);
        }
        // Once more than cleanups can come in between; elsewhere the home is hidden by other mounts.
        for _ in 0..4 {
            let held = lock::setup(self.home(), Sharing::Shared)?;
            if is_mount_root(path)? {
                return match mount_change(path, MountPropagationFlags::PRIVATE) {
                    // Without privilege it is as whoever mounted it wanted.
                    Ok(()) | Err(Errno::PERM) => Ok(held),
                    Err(errno) => Err(Error::sys("mount", show_path(path), errno)),
                };
            }
            drop(held);
            if !self.bind_home()? {
                break;
            }
        }
        Ok(None)
    }

    /// Binds the home over itself; returns whether it is a mount now.
    fn bind_home(&self) -> Result<bool> {
        let path = self.home().path();
        let _held = lock::setup(self.home(), Sharing::Exclusive)?;
        let table = mountinfo::load()?;
        if mountinfo::find_top(&table, path).is_some() {
            return Ok(true);
        }
        if let Some(inside) = table.iter().find(|entry| entry.mount_point.starts_with(path)) {
            tracing::debug!(
                "{}: is mounted already; the home stays as it is",
                show_path(&inside.mount_point)
            );
            return Ok(false);
        }
        match mount_bind(path, path) {
            Ok(()) => Ok(true),
            // Such a caller can have FUSE mounts only, which go through fusermount3.
            Err(Errno::PERM) => Ok(false),
            Err(errno) => Err(Error::sys("mount", show_path(path), errno)),
        }
    }

    /// Undoes what mounting layers left: the home is no mount of its own any more, and directories
    /// are gone that killed programs were unpacking to.
    ///
    /// # Errors
    /// `Busy` while a layer is mounted or being unpacked; those of umount2(2).
    /// # Locks
    /// The one under which stores are set up, then that of mounts, so that nobody mounts meanwhile.
    pub fn cleanup(&self) -> Result<()> {
        let path = self.home().path();
        for home in self.writable_homes() {
            check::prune_staging(home)?;
        }
        let held = lock::setup(self.home(), Sharing::Exclusive)?;
        let mounts = self.engine_mounts()?;
        let table = mountinfo::load()?;
        let inside = |entry: &&MountEntry| {
            (entry.mount_point.starts_with(path) && entry.mount_point != path)
                || entry.mount_point.starts_with(&self.run_home)
        };
        if let Some(busy) = table.iter().find(inside) {
            return Err(Error::Busy {
                what: format!(
                    "{}: is mounted; unmount it first (lamina layer unmount, podman unmount --all)",
                    show_path(&busy.mount_point)
                )
                .into(),
            });
        }
        let mut changed = false;
        let mut table = table;
        // Those who looked at the same time may have made one each.
        while let Some(entry) = mountinfo::find_top(&table, path)
            && is_own_bind(entry, &table)
        {
            // Somebody may stand in it; layers are not mounted, so nothing is lost with it.
            unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
                .at("umount2", || show_path(path))?;
            changed = true;
            table = mountinfo::load()?;
        }
        drop(mounts);
        match held {
            // Engines that run look anew, and make it again before they mount.
            Some(held) if changed => held.record_write(),
            _ => Ok(()),
        }
    }
}

/// Returns whether a path is the root of a mount.
fn is_mount_root(path: &Path) -> Result<bool> {
    let stat = rustix::fs::statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::empty())
        .at("statx", || show_path(path))?;
    if stat.stx_attributes_mask.contains(StatxAttributes::MOUNT_ROOT) {
        return Ok(stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT));
    }
    // Before Linux 5.8.
    Ok(mountinfo::find_top(&mountinfo::load()?, path).is_some())
}

/// Returns whether a mount shows the very directory that it covers; one that somebody mounted there
/// for good is not ours to take.
fn is_own_bind(entry: &MountEntry, table: &[MountEntry]) -> bool {
    let Some(below) = table.iter().find(|other| other.id == entry.parent) else { return false };
    let Ok(inside) = entry.mount_point.strip_prefix(&below.mount_point) else { return false };
    let covered =
        if inside.as_os_str().is_empty() { below.root.clone() } else { below.root.join(inside) };
    below.device == entry.device && covered == entry.root
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_bind_of_the_home_itself_is_taken() {
        let table = mountinfo::parse(
            b"21 1 254:0 / / rw - ext4 /dev/vda rw\n\
              22 21 254:0 /s/overlay /s/overlay rw - ext4 /dev/vda rw\n\
              23 22 254:0 /s/overlay /s/overlay rw - ext4 /dev/vda rw\n\
              24 21 254:0 /other /s/mine rw - ext4 /dev/vda rw\n\
              25 21 254:1 /s/disk /s/disk rw - ext4 /dev/vdb rw\n\
              26 99 254:0 /s/lost /s/lost rw - ext4 /dev/vda rw\n",
        );
        let own: Vec<u64> =
            table.iter().filter(|entry| is_own_bind(entry, &table)).map(|entry| entry.id).collect();
        assert_eq!(own, [22, 23]);
    }
}
