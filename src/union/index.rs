//! The index: what keeps the names of a lower file one file after it was copied up, at every mount.
//!
//! A directory `index` beside `work` has a link of each upper file that was copied from a lower file
//! with several names. Its name is the origin, in hexadecimal; so each lower name leads to it. The
//! xattr `overlay.nlink` on the file tells how many names the union shows, as a difference to the
//! link count of the upper or of the lower file: to the one that the next step does not change, so
//! that it is true whether or not that step was made.
//!
//! Locks: those of the operation that it is part of. Crash: an entry that no name leads to, removed at
//! the next mount.
//!
//! # Source
//! overlayfs.rst, "Index directory"; the kernel can go on with an index of ours, and the reverse.

use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::XattrFlags;

use super::attr::FileType;
use super::node::{Links, Node};
use super::origin::{Origins, Record};
use super::publish::{Work, names, remove_tree};
use super::remove::Victim;
use super::{Union, Upper};
use crate::error::{Context, Errno, Error, Result};
use crate::layer::{self, UPPER};
use crate::marks;
use crate::sys;
use crate::sys::stat::Statx;
use crate::sys::xattr::{self, Target};

const INDEX: &[u8] = b"index";

/// Name of an entry: the record of an origin, in hexadecimal.
pub(super) type Name = Box<[u8]>;

/// The index of a mount.
#[derive(Debug)]
pub(super) struct Index {
    pub(super) dir: Arc<layer::Dir>,
}

/// An upper file that stands for a lower one under all of its names.
#[derive(Debug)]
pub(super) struct Indexed {
    /// Its entry in the index.
    pub(super) name: Name,
    pub(super) stat: Statx,
    /// How many names the union shows; from 1 to [`COUNT_MAX`].
    pub(super) count: u32,
}

/// The greatest count of names that the kernel believes.
const COUNT_MAX: u32 = i32::MAX as u32;

/// Returns how many of `count` names are no links of a file that has `links`; a layer may say
/// anything of either.
pub(super) fn missing_links(count: u32, links: u32) -> i32 {
    let missing = i64::from(count) - i64::from(links);
    i32::try_from(missing).unwrap_or(if missing < 0 { i32::MIN } else { i32::MAX })
}

impl Indexed {
    /// Returns what a node of the file keeps of its names.
    pub(super) fn links(self) -> Links {
        Links {
            count: self.count,
            anchored: true,
            unlinked: missing_links(self.count, self.stat.stx_nlink),
            index: Some(self.name),
            ..Links::default()
        }
    }
}

/// Returns the name of the entry of an origin.
pub(super) fn name_of(record: &[u8]) -> Name {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |half: u8| DIGITS.get(usize::from(half & 15)).copied().unwrap_or_default();
    record.iter().flat_map(|byte| [digit(byte >> 4), digit(*byte)]).collect()
}

/// Returns the origin that an entry is named for.
fn record_of(name: &[u8]) -> Option<Vec<u8>> {
    let (pairs, []) = name.as_chunks::<2>() else { return None };
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let record = pairs.iter().map(|[high, low]| Some(digit(*high)? << 4 | digit(*low)?));
    record.collect::<Option<Vec<u8>>>().filter(|record| Record::parse(record).is_some())
}

/// What the difference in `overlay.nlink` is to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Base {
    /// The link count of the upper file.
    Upper,
    /// That of the lower file.
    Lower,
}

fn print_nlink(base: Base, more: i64) -> Vec<u8> {
    let letter = if base == Base::Upper { 'U' } else { 'L' };
    format!("{letter}{more:+}").into_bytes()
}

fn parse_nlink(value: &[u8]) -> Option<(Base, i32)> {
    let (letter, rest) = value.split_first()?;
    let base = match letter {
        b'U' => Base::Upper,
        b'L' => Base::Lower,
        _ => return None,
    };
    let text = std::str::from_utf8(rest).ok().filter(|text| text.starts_with(['+', '-']))?;
    Some((base, text.parse().ok()?))
}

impl Index {
    /// Opens the index in the workdir, makes sure that upper, lower and index belong together, and
    /// removes entries that nothing leads to.
    ///
    /// # Errors
    /// `ESTALE` where another mount's layers are meant; `Unsupported` where a filesystem has no file
    /// handles; those of the calls.
    pub(super) fn open(
        workdir: &Arc<layer::Dir>,
        work: &Work,
        upper: &layer::Dir,
        lowers: &[Arc<layer::Dir>],
        origins: &Origins,
    ) -> Result<Self> {
        for lower in lowers {
            if record(origins, lower, lower.device)?.is_none() {
                return Err(without_handles(lower));
            }
        }
        let dir = super::open_within(workdir, INDEX)?;
        let top = lowers.first().ok_or(Errno::STALE)?;
        let lower = record(origins, top, top.device)?.ok_or_else(|| without_handles(top))?;
        bind(
            work,
            upper,
            &marks::ORIGIN_XATTRS,
            &lower,
            "index=on: was used with another lowerdir",
        )?;
        let upper_record = upper.with("name_to_handle_at", |dir| {
            let uuid = sys::handle::filesystem_uuid(sys::open::directory(dir, b".")?.as_fd())?;
            let handle = sys::handle::of(dir)?;
            Ok(handle.and_then(|handle| origins.encode(uuid, handle, true)))
        })?;
        let upper_record = upper_record.ok_or_else(|| without_handles(upper))?;
        bind(
            work,
            &dir,
            &marks::UPPER_XATTRS,
            &upper_record,
            "index=on: was used with another upperdir",
        )?;
        let index = Self { dir };
        index.clean_up()?;
        Ok(index)
    }

    /// Removes what an interrupted mount left: the kernel's unfinished objects, entries that are not
    /// what they are named for, and files that no name is left of.
    fn clean_up(&self) -> Result<()> {
        for name in names(&self.dir)? {
            let is_stale = if name.starts_with(b"#") {
                true
            } else if let Some(record) = record_of(&name) {
                self.is_stale(&name, &record)?
            } else {
                tracing::warn!("{} is no entry of an index", self.dir.describe(&name));
                false
            };
            if is_stale {
                tracing::debug!("{}: removed, nothing leads to it", self.dir.describe(&name));
                remove_tree(&self.dir, &name)?;
            }
        }
        Ok(())
    }

    fn is_stale(&self, name: &[u8], record: &[u8]) -> Result<bool> {
        let Some(stat) = self.dir.find(name)? else { return Ok(false) };
        // Marks of the kernel's nfs_export, which mean nothing here.
        if kind_of(&stat) == FileType::Directory || sys::stat::is_whiteout(&stat) {
            return Ok(false);
        }
        if self.mark(name, &marks::ORIGIN_XATTRS)?.as_deref() != Some(record) {
            return Ok(true);
        }
        let nlink = self.mark(name, &marks::NLINK_XATTRS)?;
        let is_last = matches!(nlink.as_deref().and_then(parse_nlink), Some((Base::Upper, ..=-1)));
        Ok(stat.stx_nlink == 1 && is_last)
    }

    fn mark(&self, name: &[u8], xattrs: &[&[u8]]) -> Result<Option<Vec<u8>>> {
        self.dir.call("getxattr", name, |at| {
            for xattr in xattrs {
                if let Some(value) = xattr::get(Target::Name(at), xattr)? {
                    return Ok(Some(value));
                }
            }
            Ok(None)
        })
    }
}

fn kind_of(stat: &Statx) -> FileType {
    FileType::of_mode(u32::from(stat.stx_mode))
}

fn without_handles(layer: &layer::Dir) -> Error {
    Error::Unsupported {
        feature: format!(
            "index=on: {}: its filesystem gives out no file handles; leave index out, or use ext4, \
             xfs, btrfs or tmpfs",
            layer.describe(b"")
        )
        .into(),
    }
}

/// Returns the record of the directory `dir`.
fn record(origins: &Origins, dir: &layer::Dir, device: u64) -> Result<Option<Vec<u8>>> {
    let handle = dir.handle()?;
    let record = origins.record(device, handle.as_fd())?;
    Ok((!record.is_empty()).then_some(record))
}

/// Writes `record` on `dir`, or makes sure that it is what is written there.
fn bind(
    work: &Work,
    dir: &layer::Dir,
    xattrs: &[&'static [u8]; 2],
    record: &[u8],
    why: &'static str,
) -> Result<()> {
    let written =
        dir.with("getxattr", |dir| xattr::get(Target::Handle(dir), work.namespace.of(xattrs)))?;
    match written {
        Some(written) if written == record => Ok(()),
        // Copied up where no handle was to be had.
        Some(written) if !written.is_empty() => {
            Err(Error::sys(why, dir.describe(b""), Errno::STALE))
        }
        _ => dir.with("setxattr", |dir| {
            xattr::set(Target::Handle(dir), work.namespace.of(xattrs), record, XattrFlags::empty())
        }),
    }
}

impl Upper {
    /// Returns where the upper object of a node is anchored whose names are not all its own.
    pub(super) fn anchor(&self, node: &Node, links: &Links) -> Result<(&layer::Dir, Vec<u8>)> {
        match &links.index {
            Some(name) => {
                let index = self.index.as_ref().ok_or(Errno::STALE)?;
                Ok((&index.dir, name.to_vec()))
            }
            None => Ok((&self.work.dir, Work::anchor(node.ino))),
        }
    }

    /// Writes how many names the union shows of an indexed file, as a difference to what the next
    /// step does not change.
    ///
    /// # Errors
    /// Those of setxattr(2).
    pub(super) fn write_count(&self, links: &Links, base: Base) -> Result<()> {
        let (Some(index), Some(name)) = (&self.index, &links.index) else { return Ok(()) };
        let value = match base {
            Base::Upper => print_nlink(base, links.unlinked.into()),
            Base::Lower => print_nlink(base, i64::from(links.count) - i64::from(links.lower)),
        };
        index.dir.call("setxattr", name, |at| self.set_count(Target::Name(at), &value))
    }

    fn set_count(&self, file: Target<'_>, value: &[u8]) -> std::result::Result<(), Errno> {
        let name = self.work.namespace.of(&marks::NLINK_XATTRS);
        xattr::set(file, name, value, XattrFlags::empty())
    }

    /// Writes the count of a copy in work that is going to be the entry of a file with `count` names.
    pub(super) fn write_first_count(&self, copy: Target<'_>, count: u32) -> Result<()> {
        self.set_count(copy, &print_nlink(Base::Upper, i64::from(count) - 1))
            .at("setxattr", || "a copy in work")
    }
}

impl Union {
    pub(super) fn index(&self) -> Option<&Index> {
        self.upper.as_ref()?.index.as_ref()
    }

    /// Tells whether the object under a name must be copied up before the name goes: the index
    /// counts its names, and which of them are gone.
    pub(super) fn needs_index(&self, victim: &Victim<'_>) -> bool {
        self.index().is_some() && victim.layer != UPPER && victim.node.links.get().is_some()
    }

    /// Makes the count of names of an indexed file true for the change of its link count that comes
    /// next.
    ///
    /// # Errors
    /// Those of setxattr(2).
    pub(super) fn before_count_changes(&self, upper: &Upper, node: &Node) -> Result<()> {
        node.links.get().map_or(Ok(()), |links| upper.write_count(&links.lock(), Base::Upper))
    }

    /// Finds the upper file that stands for a lower one with several names.
    ///
    /// # Errors
    /// Those of name_to_handle_at(2), statx(2) and getxattr(2); `EIO` for an entry that cannot be.
    pub(super) fn find_indexed(
        &self,
        part: &layer::Dir,
        name: &[u8],
        stat: &Statx,
    ) -> Result<Option<Indexed>> {
        if self.index().is_none() {
            return Ok(None);
        }
        let object = part.call("openat", name, |at| sys::open::handle(at.dir, at.name))?;
        let record = self.origins.record(sys::stat::device(stat), object.as_fd())?;
        self.indexed(&record, stat, || Ok(Some(stat.stx_nlink)))
    }

    /// Returns the entry of an origin, which has the type of `like`. `lower` tells how many names
    /// the lower file has, if that can be known.
    pub(super) fn indexed(
        &self,
        record: &[u8],
        like: &Statx,
        lower: impl FnOnce() -> Result<Option<u32>>,
    ) -> Result<Option<Indexed>> {
        let Some(index) = self.index() else { return Ok(None) };
        let name = name_of(record);
        if record.is_empty() || name.len() > marks::NAME_MAX {
            return Ok(None);
        }
        let Some(mut stat) = index.dir.find(&name)? else { return Ok(None) };
        let is_deleted = sys::stat::is_whiteout(&stat);
        if sys::stat::is_whiteout(like) && kind_of(&stat) == FileType::Regular {
            // Of a nested overlay.
            sys::stat::show_as_whiteout(&mut stat);
        }
        if is_deleted || kind_of(&stat) != kind_of(like) {
            return Err(Error::Corrupt {
                what: "an entry of the index is of another type than its origin".into(),
                at: index.dir.describe(&name),
            });
        }
        let written = index.mark(&name, &marks::NLINK_XATTRS)?;
        let count = match written.as_deref().and_then(parse_nlink) {
            Some((Base::Upper, more)) => stat.stx_nlink.checked_add_signed(more),
            Some((Base::Lower, more)) => lower()?.and_then(|lower| lower.checked_add_signed(more)),
            None => None,
        };
        // One too many, the entry itself, rather than too few: it is not given up then.
        let count = count.filter(|count| (1..=COUNT_MAX).contains(count));
        let count = count.unwrap_or(stat.stx_nlink.clamp(1, COUNT_MAX));
        Ok(Some(Indexed { name, stat, count }))
    }
}
