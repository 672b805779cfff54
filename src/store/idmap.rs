//! Giving a layer other owners for good: the tree is changed through a mount, and what was changed
//! becomes the new content above the old one.
//!
//! Takes the lock of the layer for the mounts and for the rotation, each for itself. A crash leaves
//! a layer that is mounted, or some of whose files have new owners; or a rotation that was begun,
//! which the next mount of the layer finishes.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{CWD, Mode, OFlags, RenameFlags, openat};

use super::driver::no_such;
use super::layout::{DIFF, LayerId, WORK, diff_name, has, renew_work};
use super::mounts::MountRequest;
use super::{Store, lock};
use crate::error::{Context, Errno, Error, Result};
use crate::options::show_path;
use crate::sys;
use crate::sys::lockfile::Sharing;
use crate::sys::name::At;
use crate::sys::userns::Maps;
use crate::sys::xattr::Target;

/// Name of the new content until it takes the place of the old one.
const NEXT: &[u8] = b"diff.next";
/// Files with several names that are kept one; what is beyond is parted by the change.
const LINKS_MAX: usize = 512;
/// Xattr that chown(2) drops, and that a program needs to go on working.
const CAPABILITY: &[u8] = b"security.capability";

impl Store {
    /// Changes the owners of all that a layer shows, from those of `from` to those of `to`: ids
    /// outside of the one map are taken inside, and those to ids outside of the other. No map is
    /// the one of equal ids.
    ///
    /// # Errors
    /// `Busy` if the layer is mounted; `Invalid` for an id that a map does not hold.
    /// # Locks
    /// The layer's.
    pub fn update_id_map(&self, id: &LayerId, from: &Maps, to: &Maps) -> Result<()> {
        let found = self.get_layer(id)?;
        if !found.is_own {
            return Err(Error::invalid(
                format!("layer {id}"),
                "lies in an image store; its owners are changed there",
            ));
        }
        if self.present(&self.mountpoint(&found, id)?, &found, id)?.is_some() {
            return Err(Error::Busy { what: format!("{id}: is mounted; unmount it first").into() });
        }
        let merged = self.mount(id, &MountRequest::default())?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let changed = openat(CWD, &merged, flags, Mode::empty())
            .at("open", || show_path(&merged))
            .and_then(|root| change_owners(&root, from, to, &|| show_path(&merged)));
        let unmounted = self.unmount(id);
        changed.and(unmounted)?;
        let locked = lock::layer(found.home, id, Sharing::Exclusive)?.ok_or_else(|| no_such(id))?;
        rotate(&locked.dir, to).at("renameat", || found.home.show(id))
    }
}

/// Moves each content one place down and puts an empty one on top.
fn rotate(layer: &OwnedFd, to: &Maps) -> std::result::Result<(), Errno> {
    finish_rotation(layer)?;
    let mode = u32::from(sys::stat::at(layer.as_fd(), DIFF)?.stx_mode) & 0o7777;
    let owner = (translate(0, &to.uids, Way::Out), translate(0, &to.gids, Way::Out));
    let make = |name: &[u8], mode: u32| {
        sys::name::mkdir(At::new(layer.as_fd(), name), 0o700)?;
        let handle = sys::open::handle(layer.as_fd(), name)?;
        sys::name::chown_handle(&handle, Some(owner.0.unwrap_or(0)), Some(owner.1.unwrap_or(0)))?;
        sys::name::chmod_handle(&handle, mode)
    };
    make(NEXT, mode)?;
    let mut free = 1;
    while has(layer.as_fd(), &diff_name(free))? {
        free += 1;
    }
    for number in (1..free).rev() {
        rename(layer, &diff_name(number), &diff_name(number + 1), RenameFlags::NOREPLACE)?;
    }
    // One step for the topmost: there is a `diff` at every moment.
    renew_work(At::new(layer.as_fd(), WORK), (owner.0.unwrap_or(0), owner.1.unwrap_or(0)))?;
    rename(layer, NEXT, DIFF, RenameFlags::EXCHANGE)?;
    rename(layer, NEXT, &diff_name(1), RenameFlags::NOREPLACE)?;
    sys::data::sync(layer.as_fd(), false)
}

fn rename(
    layer: &OwnedFd,
    from: &[u8],
    to: &[u8],
    flags: RenameFlags,
) -> std::result::Result<(), Errno> {
    sys::name::rename(At::new(layer.as_fd(), from), At::new(layer.as_fd(), to), flags)
}

/// Returns whether a rotation of contents was begun and not finished.
///
/// # Errors
/// Those of statx(2).
pub fn has_unfinished_rotation(layer: &OwnedFd) -> std::result::Result<bool, Errno> {
    has(layer.as_fd(), NEXT)
}

/// Finishes or undoes a rotation that was cut short: what is beside `diff` is either the old content
/// on its way down, or an empty one that was not needed yet.
///
/// # Errors
/// Those of renaming and removing.
/// # Locks
/// With the lock of the layer held.
pub fn finish_rotation(layer: &OwnedFd) -> std::result::Result<(), Errno> {
    if !has_unfinished_rotation(layer)? {
        return Ok(());
    }
    match sys::name::rmdir(At::new(layer.as_fd(), NEXT)) {
        Ok(()) => (),
        Err(Errno::NOTEMPTY | Errno::EXIST) => {
            return rename(layer, NEXT, &diff_name(1), RenameFlags::NOREPLACE);
        }
        Err(errno) => return Err(errno),
    }
    // Those that were moved down already come back up; there is one gap at most.
    let mut gap = 1;
    while has(layer.as_fd(), &diff_name(gap))? {
        gap += 1;
    }
    while has(layer.as_fd(), &diff_name(gap + 1))? {
        rename(layer, &diff_name(gap + 1), &diff_name(gap), RenameFlags::NOREPLACE)?;
        gap += 1;
    }
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    /// From an id outside to the one inside.
    In,
    /// From an id inside to the one outside.
    Out,
}

/// Translates an id; `None` if the map does not hold it. An empty map is the one of equal ids.
fn translate(id: u32, map: &[(u32, u32, u32)], way: Way) -> Option<u32> {
    if map.is_empty() {
        return Some(id);
    }
    map.iter().find_map(|&(inside, outside, count)| {
        let (start, target) = match way {
            Way::In => (outside, inside),
            Way::Out => (inside, outside),
        };
        let offset = id.checked_sub(start).filter(|offset| *offset < count)?;
        target.checked_add(offset)
    })
}

fn change_owners(root: &OwnedFd, from: &Maps, to: &Maps, at: &dyn Fn() -> String) -> Result<()> {
    let changed = |id: u32, from: &[(u32, u32, u32)], to: &[(u32, u32, u32)]| {
        translate(id, from, Way::In).and_then(|id| translate(id, to, Way::Out))
    };
    let one = |dir: BorrowedFd<'_>, name: &[u8], stat: &sys::stat::Statx| -> Result<()> {
        let shown = || format!("{}: {}", at(), name.escape_ascii());
        let uid = changed(stat.stx_uid, &from.uids, &to.uids);
        let gid = changed(stat.stx_gid, &from.gids, &to.gids);
        let (Some(uid), Some(gid)) = (uid, gid) else {
            return Err(Error::invalid(
                shown(),
                format!(
                    "its owner {}:{} is in no map; map these ids too",
                    stat.stx_uid, stat.stx_gid
                ),
            ));
        };
        if (uid, gid) == (stat.stx_uid, stat.stx_gid) {
            return Ok(());
        }
        let handle = sys::open::handle(dir, name).at("open", shown)?;
        let mode = u32::from(stat.stx_mode);
        let is_link = mode & libc::S_IFMT == libc::S_IFLNK;
        let capability = if is_link {
            None
        } else {
            sys::xattr::get(Target::Handle(handle.as_fd()), CAPABILITY).at("getxattr", shown)?
        };
        sys::name::chown_handle(&handle, Some(uid), Some(gid)).at("fchownat", shown)?;
        if !is_link && mode & sys::stat::SETIDS != 0 {
            sys::name::chmod_handle(&handle, mode).at("chmod", shown)?;
        }
        if let Some(value) = capability {
            let flags = rustix::fs::XattrFlags::empty();
            sys::xattr::set(Target::Handle(handle.as_fd()), CAPABILITY, &value, flags)
                .at("setxattr", shown)?;
        }
        Ok(())
    };
    let mut failed = Ok(());
    let mut links = HashMap::new();
    let walked = sys::tree::walk_from(root.as_fd(), &mut |dir, name, stat| {
        failed = (|| {
            let is_dir = u32::from(stat.stx_mode) & libc::S_IFMT == libc::S_IFDIR;
            if is_dir || stat.stx_nlink < 2 {
                return one(dir, name, stat);
            }
            let shown = || format!("{}: {}", at(), name.escape_ascii());
            if let Some(first) = links.get(&stat.stx_ino) {
                return join(first, dir, name).at("linkat", shown);
            }
            one(dir, name, stat)?;
            if links.len() < LINKS_MAX {
                let first = sys::open::handle(dir, name).at("open", shown)?;
                links.insert(stat.stx_ino, first);
            }
            Ok(())
        })();
        if failed.is_ok() { Ok(()) } else { Err(Errno::CANCELED) }
    });
    failed?;
    walked.at("getdents64", at)?;
    let stat = sys::stat::of(root).at("statx", at)?;
    one(root.as_fd(), b".", &stat)
}

/// Makes `name` one more name of a file whose owner was changed: the change may have parted them.
fn join(first: &OwnedFd, dir: BorrowedFd<'_>, name: &[u8]) -> std::result::Result<(), Errno> {
    let (whole, part) = (sys::stat::of(first)?, sys::stat::at(dir, name)?);
    if whole.stx_ino == part.stx_ino && whole.stx_uid == part.stx_uid {
        return Ok(());
    }
    let aside = format!(".{}", super::layout::LinkId::random());
    let aside = At::new(dir, aside.as_bytes());
    sys::name::link_handle(first, aside)?;
    sys::name::rename(aside, At::new(dir, name), RenameFlags::empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Cuts a rotation short after each of its renames, in the order they are made.
    #[test]
    fn a_rotation_that_was_cut_short_is_finished() {
        use std::fs;
        let steps: [(&str, &str, bool); 4] = [
            ("diff2", "diff3", false),
            ("diff1", "diff2", false),
            ("diff.next", "diff", true),
            ("diff.next", "diff1", false),
        ];
        for done in 0..=steps.len() {
            let temp = tempfile::tempdir().unwrap();
            for (name, file) in [("diff", "top"), ("diff1", "one"), ("diff2", "two")] {
                fs::create_dir(temp.path().join(name)).unwrap();
                fs::File::create(temp.path().join(name).join(file)).unwrap();
            }
            fs::create_dir(temp.path().join("diff.next")).unwrap();
            let layer = OwnedFd::from(fs::File::open(temp.path()).unwrap());
            for (from, to, exchange) in steps.iter().take(done) {
                let flags = if *exchange { RenameFlags::EXCHANGE } else { RenameFlags::NOREPLACE };
                rename(&layer, from.as_bytes(), to.as_bytes(), flags).unwrap();
            }
            finish_rotation(&layer).unwrap();
            assert!(!has_unfinished_rotation(&layer).unwrap());
            let mut order = Vec::new();
            let mut number = 0;
            while let Ok(dir) =
                fs::read_dir(temp.path().join(String::from_utf8(diff_name(number)).unwrap()))
            {
                order.extend(dir.map(|entry| entry.unwrap().file_name().into_string().unwrap()));
                number += 1;
            }
            assert_eq!(order, ["top", "one", "two"], "after {done} renames");
            assert_eq!(number, if done < 3 { 3 } else { 4 });
        }
    }

    #[test]
    fn ids_are_translated_both_ways() {
        let map = [(0, 100_000, 10), (10, 5, 1)];
        for (inside, outside) in [(0, 100_000), (9, 100_009), (10, 5)] {
            assert_eq!(translate(inside, &map, Way::Out), Some(outside));
            assert_eq!(translate(outside, &map, Way::In), Some(inside));
        }
        assert_eq!(translate(11, &map, Way::Out), None);
        assert_eq!(translate(100_010, &map, Way::In), None);
        assert_eq!(translate(7, &[], Way::Out), Some(7));
    }
}
