//! Whether two objects are the same to a differ.

use std::os::fd::AsFd;

use rustix::fs::FileType;

use super::view::{Leaf, Object, kind};
use crate::error::{Context, Errno, Result};
use crate::sys::stat::{Statx, device};
use crate::sys::xattr::{self, Target};
use crate::sys::{data, name, open};
use crate::{layer, marks, overrides};

/// Whose idea of sameness.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rules {
    /// containers/storage's, of two mounted trees.
    Containers,
    /// containerd's and BuildKit's.
    BuildKit,
    /// Whatever a user could tell apart, but for times of access and labels.
    Exact,
    /// The same without reading data.
    Attributes,
}

/// Tells whether a directory of a layer was made only to hold what changed in it.
///
/// # Source
/// containers/storage, `OverlayChanges`: mode, size and time. The owner counts here as well: a
/// chown is a change.
pub fn directories(upper: &Statx, lower: &Statx) -> bool {
    upper.stx_mode == lower.stx_mode
        && (upper.stx_uid, upper.stx_gid) == (lower.stx_uid, lower.stx_gid)
        && same_time(upper, lower)
        && kind(lower) == FileType::Directory
}

/// Tells whether two objects are the same.
///
/// # Errors
/// Those of reading xattrs, link targets and data.
pub fn objects(upper: &Object, lower: &Object, rules: Rules) -> Result<bool> {
    let (a, b) = (upper.stat(), lower.stat());
    let is_one = device(a) == device(b) && a.stx_ino == b.stx_ino;
    if is_one {
        return Ok(true);
    }
    let is_alike = a.stx_mode == b.stx_mode
        && (a.stx_uid, a.stx_gid) == (b.stx_uid, b.stx_gid)
        && (a.stx_rdev_major, a.stx_rdev_minor) == (b.stx_rdev_major, b.stx_rdev_minor);
    if !is_alike || xattrs(upper, rules)? != xattrs(lower, rules)? {
        return Ok(false);
    }
    match (upper, lower) {
        (Object::Dir(..), Object::Dir(..)) => Ok(match rules {
            Rules::Containers => same_time(a, b),
            Rules::BuildKit => true,
            Rules::Exact | Rules::Attributes => exact_time(a) == exact_time(b),
        }),
        (Object::Leaf(upper), Object::Leaf(lower)) => leaves(upper, lower, rules),
        _ => Ok(false),
    }
}

fn leaves(upper: &Leaf, lower: &Leaf, rules: Rules) -> Result<bool> {
    let (a, b) = (&upper.stat, &lower.stat);
    let is_link = kind(a) == FileType::Symlink;
    if a.stx_size != b.stx_size {
        return Ok(false);
    }
    if is_link && link_target(upper)? != link_target(lower)? {
        return Ok(false);
    }
    match rules {
        Rules::Containers => Ok(same_time(a, b)),
        Rules::Exact | Rules::Attributes if exact_time(a) != exact_time(b) => Ok(false),
        Rules::Attributes => Ok(true),
        // The time may have been set back, and archives give the same to all.
        Rules::Exact => Ok(kind(a) != FileType::RegularFile || content(upper, lower)?),
        Rules::BuildKit => {
            let (a, b) = (a.stx_mtime, b.stx_mtime);
            if a.tv_sec != b.tv_sec {
                return Ok(false);
            }
            // Whole seconds on both sides come from archives and tell little.
            if (a.tv_nsec, b.tv_nsec) != (0, 0) {
                return Ok(a.tv_nsec == b.tv_nsec);
            }
            if kind(&upper.stat) != FileType::RegularFile {
                Ok(true)
            } else {
                content(upper, lower)
            }
        }
    }
}

/// Modification times are the same, also where one went through an archive with whole seconds.
fn same_time(a: &Statx, b: &Statx) -> bool {
    let (a, b) = (a.stx_mtime, b.stx_mtime);
    a.tv_sec == b.tv_sec && (a.tv_nsec == b.tv_nsec || a.tv_nsec == 0 || b.tv_nsec == 0)
}

fn exact_time(stat: &Statx) -> (i64, u32) {
    (stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec)
}

/// The target of a symlink.
///
/// # Errors
/// Those of readlinkat(2).
pub fn link_target(leaf: &Leaf) -> Result<Vec<u8>> {
    leaf.dir.call("readlinkat", &leaf.name, |at| match name::readlink(at) {
        // A file that stands for one.
        Err(Errno::INVAL) if leaf.dir.layer.form.is_some() => {
            layer::link_of_file(open::reader(at.dir, at.name)?.as_fd())
        }
        target => target,
    })
}

const CHUNK: usize = 64 * 1024;

fn content(upper: &Leaf, lower: &Leaf) -> Result<bool> {
    let (a, b) = (upper.open_data()?, lower.open_data()?);
    let (mut left, mut right) = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut at = 0;
    loop {
        let of = |leaf: &Leaf| leaf.dir.describe(&leaf.name);
        let got = data::read_at(a.as_fd(), &mut left, at).at("pread", || of(upper))?;
        let other = data::read_at(b.as_fd(), &mut right, at).at("pread", || of(lower))?;
        if left.get(..got) != right.get(..other) {
            return Ok(false);
        }
        if got == 0 {
            return Ok(true);
        }
        at += got as u64;
    }
}

/// Xattrs that count as content, by the names users see, in order.
///
/// # Errors
/// Those of listxattr(2) and getxattr(2).
/// # Source
/// containers/storage writes capabilities, IMA hashes and user xattrs into layers; BuildKit
/// capabilities alone.
pub fn xattrs(object: &Object, rules: Rules) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let form = object.form();
    let read = |target: Target<'_>| {
        let list = xattr::list(target)?;
        let mut found = Vec::new();
        for stored in list.split(|byte| *byte == 0).filter(|stored| !stored.is_empty()) {
            let meant = match form {
                Some(_) => overrides::visible_name(form, stored),
                None => Some(stored),
            };
            let Some(name) = meant.and_then(marks::visible_name) else { continue };
            let is_content = name.as_ref() == b"security.capability"
                || (matches!(rules, Rules::Exact | Rules::Attributes)
                    && name.as_ref() != b"security.selinux")
                || (rules == Rules::Containers
                    && (name.as_ref() == b"security.ima" || name.starts_with(b"user.")));
            if !is_content {
                continue;
            }
            if let Some(value) = xattr::get(target, stored)? {
                found.push((name.into_owned(), value));
            }
        }
        found.sort_unstable();
        Ok(found)
    };
    match object {
        Object::Dir(dir, _) => dir.top().with("getxattr", |dir| read(Target::Handle(dir))),
        Object::Leaf(leaf) => leaf.dir.call("getxattr", &leaf.name, |at| read(Target::Name(at))),
    }
}
