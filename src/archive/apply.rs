//! Unpacks an archive into a layer.
//!
//! Each entry is looked at by name first ([`path`]: does it put an object, hide one, or mean
//! nothing), then put in place by (directory handle, one name). What the archive says of
//! directories, which later entries change, is kept until all entries are done.
//!
//! A crash, or an error, leaves the directory half filled: give it one that nobody sees yet, as
//! [`super::stage`] does.
//!
//! # Source
//! OCI image-spec layer.md, "Applying Changesets". Differs: a symlink or file that stands where an
//! entry needs a directory is an error, never followed and never replaced.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use super::digest::Digest;
use super::header::Kind;
use super::ids::Ids;
use super::input::{Source, unpack};
use super::metadata::{self, Place};
use super::path::{self, Meaning};
use super::read::{Entry, Limits, Reader, broken, show};
use super::target::{self, Found, Target};
use crate::error::{Context, Errno, Error, Result};
use crate::layer::Dir;
use crate::marks;
use crate::overrides::{self, Form};
use crate::sys::{data, name, open};

/// How a layer keeps what hides names of the layers beneath it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whiteouts {
    /// As kernel overlayfs: character devices 0:0 and opaque xattrs, `trusted.` where allowed and
    /// else `user.`. A `.wh.` file where no device can be made.
    Overlay,
    /// The same with `user.overlay.` xattrs always.
    OverlayUser,
    /// As the archive has them: `.wh.` files.
    Files,
    /// Not at all: the directory is a whole tree, and what is hidden is removed from it.
    Flat,
}

/// How an archive is applied.
#[derive(Clone, Debug)]
pub struct ApplyOptions {
    /// The form of whiteouts.
    pub whiteouts: Whiteouts,
    /// Container ids to ids on disk; `None` leaves them as they are.
    pub ids: Option<Ids>,
    /// Go on where an owner cannot be set.
    pub ignore_chown_errors: bool,
    /// Give every file and directory this mode, and keep the truth in an xattr.
    pub force_mask: Option<u32>,
    /// Mode of the layer's root where the archive does not say it; `None` leaves it as it is.
    pub root_mode: Option<u32>,
    /// Leave devices out, and xattrs that are refused.
    pub in_user_namespace: bool,
    /// Bounds.
    pub limits: Limits,
    /// What the digest of the input must be.
    pub blob: Option<Digest>,
    /// What the size of the input must be.
    pub blob_size: Option<u64>,
    /// What the digest of the unpacked archive must be.
    pub diff: Option<Digest>,
}

impl Default for ApplyOptions {
    fn default() -> Self {
        Self {
            whiteouts: Whiteouts::Overlay,
            ids: None,
            ignore_chown_errors: false,
            force_mask: None,
            root_mode: None,
            in_user_namespace: false,
            limits: Limits::default(),
            blob: None,
            blob_size: None,
            diff: None,
        }
    }
}

/// What was applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Applied {
    /// The archive's digests and sizes.
    pub source: Source,
    /// Sizes of all files together, holes counted.
    pub size: u64,
    /// How many entries it had.
    pub entries: u64,
    /// Devices, xattrs and owners that were left out.
    pub left_out: u64,
}

/// Unpacks `source` into the directory `root`; `shown` names it in messages.
///
/// # Errors
/// `EIO` for an archive that is malformed, hostile, larger than the bounds or not the one
/// expected; those of reading it and of the system calls.
/// # Crash
/// Leaves the directory half filled.
pub fn apply(
    root: OwnedFd,
    shown: PathBuf,
    source: impl Read + Send,
    options: &ApplyOptions,
) -> Result<Applied> {
    let mut applying = Applying::new(root, shown, options)?;
    let ((), source) = unpack(source, options.limits, |input| {
        let mut reader = Reader::new(input, options.limits);
        applying.entries(&mut reader)?;
        reader.drain()
    })?;
    check(&source, options)?;
    applying.finish()?;
    Ok(Applied {
        source,
        size: applying.size,
        entries: applying.count,
        left_out: applying.left_out,
    })
}

fn check(source: &Source, options: &ApplyOptions) -> Result<()> {
    let wrong = |what: &str, found: String, wanted: String| Error::Corrupt {
        what: format!("{what} is {found}, expected {wanted}").into(),
        at: "archive".into(),
    };
    for (what, found, wanted) in [
        ("the digest", source.blob, options.blob),
        ("the digest of the unpacked archive", source.diff, options.diff),
    ] {
        if let Some(wanted) = wanted.filter(|wanted| *wanted != found) {
            return Err(wrong(what, found.to_string(), wanted.to_string()));
        }
    }
    match options.blob_size {
        Some(wanted) if wanted != source.blob_size => {
            Err(wrong("the size", source.blob_size.to_string(), wanted.to_string()))
        }
        _ => Ok(()),
    }
}

/// A layer while it is filled.
pub(super) struct Applying<'a> {
    pub(super) options: &'a ApplyOptions,
    pub(super) target: Target,
    /// Mode, owner and times of directories, by clean path; the last entry of a path counts.
    directories: BTreeMap<Vec<u8>, Entry>,
    /// What this archive put there; kept for flat trees only.
    pub(super) unpacked: BTreeSet<Vec<u8>>,
    buffer: Vec<u8>,
    /// Bytes of memory that `directories` and `unpacked` took, with what was replaced since.
    kept: u64,
    size: u64,
    count: u64,
    /// Directories that no entry describes, or not yet.
    parents: u64,
    left_out: u64,
}

/// All directories together may take this many times what one entry may.
const KEPT_TIMES: u64 = 1024;
const BUFFER: usize = 256 * 1024;

impl<'a> Applying<'a> {
    fn new(root: OwnedFd, shown: PathBuf, options: &'a ApplyOptions) -> Result<Self> {
        Ok(Self {
            options,
            target: Target::new(root, shown)?,
            directories: BTreeMap::new(),
            unpacked: BTreeSet::new(),
            buffer: vec![0; BUFFER],
            kept: 0,
            size: 0,
            count: 0,
            parents: 0,
            left_out: 0,
        })
    }

    fn entries<R: Read>(&mut self, reader: &mut Reader<R>) -> Result<()> {
        while let Some(entry) = reader.next_entry()? {
            self.count += 1;
            let plain = path::clean(&entry.path, self.options.limits.depth_max)
                .map_err(|what| broken(&entry.path, what))?;
            match path::meaning(&plain).map_err(|what| broken(&entry.path, what))? {
                Meaning::Private => {}
                Meaning::Opaque(dir) => self.opaque(dir, &entry)?,
                Meaning::Whiteout(dir, name) => self.whiteout(dir, name, &entry)?,
                Meaning::Object => self.object(plain, entry, reader)?,
            }
        }
        Ok(())
    }

    fn object<R: Read>(
        &mut self,
        plain: Vec<u8>,
        mut entry: Entry,
        reader: &mut Reader<R>,
    ) -> Result<()> {
        metadata::take_override(&mut entry).map_err(|what| broken(&entry.path, what))?;
        self.size = self.size.saturating_add(entry.size);
        if plain.is_empty() {
            if entry.kind != Kind::Directory {
                return Err(broken(&entry.path, "takes the place of the layer itself"));
            }
            return self.describe_later(plain, entry);
        }
        let (dir, name) = path::split(&plain);
        if entry.kind == Kind::Char && entry.device == (0, 0) {
            return self.whiteout(dir, name, &entry);
        }
        if self.options.whiteouts == Whiteouts::Flat {
            self.remember(&plain, &entry)?;
        }
        let parent = self.directory(dir, &entry)?;
        match entry.kind {
            Kind::Directory => {
                self.make_directory(&parent, &plain, &entry)?;
                self.describe_later(plain, entry)
            }
            Kind::HardLink => self.hard_link(&plain, &entry),
            Kind::Symlink => self.symlink(&parent, &plain, &entry),
            Kind::File => self.file(&parent, &plain, &entry, reader),
            Kind::Char | Kind::Block | Kind::Fifo => self.special(&parent, &plain, &entry),
            Kind::GnuSparse
            | Kind::GnuLongName
            | Kind::GnuLongLink
            | Kind::Pax
            | Kind::PaxGlobal
            | Kind::Other(_) => Err(broken(&entry.path, "has a type that is not known")),
        }
    }

    /// Keeps what a directory is to be like until all that it holds is there.
    fn describe_later(&mut self, path: Vec<u8>, entry: Entry) -> Result<()> {
        let xattrs: usize = entry.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum();
        self.keep(2 * path.len() + xattrs + size_of::<Entry>(), &entry)?;
        self.directories.insert(path, entry);
        Ok(())
    }

    /// Keeps in mind that the archive has something at a path.
    fn remember(&mut self, path: &[u8], entry: &Entry) -> Result<()> {
        if self.unpacked.contains(path) {
            return Ok(());
        }
        self.keep(path.len() + size_of::<Vec<u8>>(), entry)?;
        self.unpacked.insert(path.to_vec());
        Ok(())
    }

    /// Counts bytes of memory.
    fn keep(&mut self, bytes: usize, entry: &Entry) -> Result<()> {
        self.kept = self.kept.saturating_add(bytes as u64);
        if self.kept > self.options.limits.meta_max.saturating_mul(KEPT_TIMES) {
            return Err(broken(
                &entry.path,
                "needs more memory for directories than the bound allows",
            ));
        }
        Ok(())
    }

    /// Returns the directory at a clean path, making what is missing of it.
    pub(super) fn directory(&mut self, path: &[u8], entry: &Entry) -> Result<Arc<Dir>> {
        if self.options.whiteouts == Whiteouts::Flat && !path.is_empty() {
            let ancestors = path.iter().enumerate().filter(|(_, byte)| **byte == b'/');
            let ends = ancestors.map(|(at, _)| at).chain([path.len()]);
            for above in ends.filter_map(|end| path.get(..end)) {
                self.remember(above, entry)?;
            }
        }
        loop {
            let (dir, start) = match self.target.find(path)? {
                Found::Dir(dir) => return Ok(dir),
                Found::Nothing(dir, start) => (dir, start),
                Found::Other(dir, start, stat) if self.is_whiteout(&stat) => {
                    let name = component(path, start);
                    self.target.remove(&dir, name)?;
                    let made = self.make_parent(&dir, name)?;
                    self.mark_opaque(&made)?;
                    continue;
                }
                Found::Other(..) => {
                    return Err(broken(&entry.path, "lies beneath what is no directory"));
                }
            };
            self.parents += 1;
            if self.count.saturating_add(self.parents) > self.options.limits.entries_max {
                return Err(broken(&entry.path, "needs more directories than the bound allows"));
            }
            self.make_parent(&dir, component(path, start))?;
        }
    }

    /// Makes a directory that the archive does not describe, or not yet.
    fn make_parent(&mut self, dir: &Arc<Dir>, name: &[u8]) -> Result<Arc<Dir>> {
        let made = target::make_directory(dir, name)?;
        let place = Place::Dir(&made);
        let mode = self.options.force_mask.unwrap_or(0o755);
        if self.options.force_mask.is_some() {
            metadata::set_override(&place, 0, 0, 0o755, "dir")?;
        } else {
            self.chown(&place, 0, 0, name)?;
        }
        place.chmod(mode)?;
        Ok(made)
    }

    fn make_directory(&mut self, parent: &Arc<Dir>, path: &[u8], entry: &Entry) -> Result<()> {
        let name = path::split(path).1;
        match target::make_directory(parent, name) {
            Ok(_) => return Ok(()),
            Err(Error::Sys { errno: Errno::EXIST, .. }) => {}
            Err(error) => return Err(error),
        }
        let Some(stat) = parent.find(name)? else {
            return Err(broken(&entry.path, "was removed by somebody else meanwhile"));
        };
        if target::is_directory(&stat) {
            return Ok(());
        }
        let was_whiteout = self.is_whiteout(&stat);
        self.clear(parent, path)?;
        let made = target::make_directory(parent, name)?;
        // What the whiteout hid stays hidden.
        if was_whiteout { self.mark_opaque(&made) } else { Ok(()) }
    }

    /// Removes what has the name of a new object.
    fn clear(&mut self, parent: &Arc<Dir>, path: &[u8]) -> Result<()> {
        self.target.remove(parent, path::split(path).1)?;
        let beneath = [path, b"/"].concat();
        // What lies beneath comes in one piece: neither is walked as a whole.
        let is_beneath = |path: &&Vec<u8>| path.starts_with(&beneath);
        let described = self.directories.range(beneath.clone()..).map(|(path, _)| path);
        let described: Vec<_> = described.take_while(is_beneath).cloned().collect();
        let unpacked = self.unpacked.range(beneath.clone()..);
        let unpacked: Vec<_> = unpacked.take_while(is_beneath).cloned().collect();
        for path in &described {
            self.directories.remove(path);
        }
        for path in &unpacked {
            self.unpacked.remove(path);
        }
        self.directories.remove(path);
        Ok(())
    }

    /// Makes an object by `make`, in place of what stands there.
    fn replace<T>(
        &mut self,
        parent: &Arc<Dir>,
        path: &[u8],
        op: &'static str,
        mut make: impl FnMut(name::At<'_>) -> std::result::Result<T, Errno>,
    ) -> Result<T> {
        let name = path::split(path).1;
        match parent.call(op, name, &mut make) {
            Err(Error::Sys { errno: Errno::EXIST, .. }) => {
                self.clear(parent, path)?;
                parent.call(op, name, make)
            }
            made => made,
        }
    }

    fn file<R: Read>(
        &mut self,
        parent: &Arc<Dir>,
        path: &[u8],
        entry: &Entry,
        reader: &mut Reader<R>,
    ) -> Result<()> {
        let file =
            self.replace(parent, path, "openat", |at| open::create(at.dir, at.name, 0o600))?;
        self.fill(&file, entry, reader)?;
        self.describe(&Place::Open(&file, parent, path::split(path).1), entry, "file")
    }

    fn fill<R: Read>(
        &mut self,
        file: &OwnedFd,
        entry: &Entry,
        reader: &mut Reader<R>,
    ) -> Result<()> {
        let whole = [super::sparse::Extent { offset: 0, length: entry.size }];
        let parts = entry.map.as_deref().unwrap_or(&whole);
        for part in parts {
            let end = part.offset.saturating_add(part.length);
            let mut at = part.offset;
            while at < end {
                let want = usize::try_from(end - at).unwrap_or(usize::MAX).min(self.buffer.len());
                let room = self.buffer.get_mut(..want).unwrap_or_default();
                let got = reader.read(room)?;
                if got == 0 {
                    return Err(reader.broken("is cut off"));
                }
                let mut part = room.get(..got).unwrap_or_default();
                while !part.is_empty() {
                    let put =
                        data::write_at(file.as_fd(), part, at).at("write", || show(&entry.path))?;
                    if put == 0 {
                        return Err(Error::sys("write", show(&entry.path), Errno::NOSPC));
                    }
                    at += put as u64;
                    part = part.get(put..).unwrap_or_default();
                }
            }
        }
        let stored_end = parts.last().map_or(0, |part| part.offset.saturating_add(part.length));
        let ends_in_hole = entry.map.is_some()
            && (stored_end < entry.size || parts.last().is_some_and(|part| part.length == 0));
        if ends_in_hole {
            data::truncate(file.as_fd(), entry.size).at("ftruncate", || show(&entry.path))?;
        }
        Ok(())
    }

    fn hard_link(&mut self, path: &[u8], entry: &Entry) -> Result<()> {
        let old = path::clean(&entry.link, self.options.limits.depth_max)
            .map_err(|_out| broken(&entry.path, "is a link to something outside of the layer"))?;
        let is_object = path::meaning(&old) == Ok(Meaning::Object) && !old.is_empty();
        let (old_dir, old_name) = path::split(&old);
        let missing =
            || broken(&entry.path, "is a link to something that the archive does not have");
        let Found::Dir(old_dir) = self.target.find(old_dir)? else { return Err(missing()) };
        let stat = old_dir.find(old_name)?.filter(|stat| is_object && !self.is_whiteout(stat));
        let stat = stat.ok_or_else(missing)?;
        if target::is_directory(&stat) {
            return Err(broken(&entry.path, "is a hard link to a directory"));
        }
        if old == path {
            return Ok(());
        }
        // A link beneath the name of its own target would remove that first.
        if old.strip_prefix(path).is_some_and(|rest| rest.starts_with(b"/")) {
            return Err(broken(&entry.path, "is a link to something that it replaces"));
        }
        let parent = self.directory(path::parent(path), entry)?;
        self.replace(&parent, path, "linkat", |to| {
            let old = old_dir.handle().map_err(|error| error.errno())?;
            name::link(name::At::new(old.as_fd(), old_name), to)
        })
    }

    fn symlink(&mut self, parent: &Arc<Dir>, path: &[u8], entry: &Entry) -> Result<()> {
        if path::leads_out(path, &entry.link) {
            return Err(broken(&entry.path, "is a link to something outside of the layer"));
        }
        self.replace(parent, path, "symlinkat", |at| name::symlink(&entry.link, at))?;
        self.describe(&Place::Name(parent, path::split(path).1), entry, "symlink")
    }

    fn special(&mut self, parent: &Arc<Dir>, path: &[u8], entry: &Entry) -> Result<()> {
        let number = |number: u64| {
            u32::try_from(number)
                .map_err(|_large| broken(&entry.path, "has a device number that is too large"))
        };
        let device = (number(entry.device.0)?, number(entry.device.1)?);
        let (kind, told) = match entry.kind {
            Kind::Char => (libc_mode::CHAR, format!("char-{}-{}", device.0, device.1)),
            Kind::Block => (libc_mode::BLOCK, format!("block-{}-{}", device.0, device.1)),
            Kind::File
            | Kind::HardLink
            | Kind::Symlink
            | Kind::Directory
            | Kind::Fifo
            | Kind::GnuSparse
            | Kind::GnuLongName
            | Kind::GnuLongLink
            | Kind::Pax
            | Kind::PaxGlobal
            | Kind::Other(_) => (libc_mode::FIFO, "pipe".to_owned()),
        };
        if self.options.force_mask.is_some() {
            let file =
                self.replace(parent, path, "openat", |at| open::create(at.dir, at.name, 0o600))?;
            return self.describe(&Place::Open(&file, parent, path::split(path).1), entry, &told);
        }
        if entry.kind != Kind::Fifo && self.options.in_user_namespace {
            self.left_out += 1;
            return Ok(());
        }
        self.replace(parent, path, "mknodat", |at| name::mknod(at, kind | 0o600, device))?;
        self.describe(&Place::Name(parent, path::split(path).1), entry, &told)
    }

    /// Gives an object its owner, xattrs, mode and times: in this order, as a mode may forbid xattrs,
    /// and a new owner takes rights away.
    pub(super) fn describe(&mut self, place: &Place<'_>, entry: &Entry, kind: &str) -> Result<()> {
        let is_link = entry.kind == Kind::Symlink;
        match self.options.force_mask {
            Some(mask) => {
                self.set_xattrs(place, entry)?;
                if !is_link {
                    metadata::set_override(place, entry.uid, entry.gid, entry.mode, kind)?;
                    place.chmod(mask)?;
                }
            }
            None => {
                self.chown(place, entry.uid, entry.gid, &entry.path)?;
                self.set_xattrs(place, entry)?;
                if !is_link {
                    place.chmod(entry.mode)?;
                }
            }
        }
        place.set_times(entry)
    }

    pub(super) fn chown(
        &mut self,
        place: &Place<'_>,
        uid: u64,
        gid: u64,
        path: &[u8],
    ) -> Result<()> {
        let map = |id: u64, is_group| match &self.options.ids {
            Some(ids) => {
                if is_group {
                    ids.gid_to_disk(id)
                } else {
                    ids.uid_to_disk(id)
                }
            }
            None => u32::try_from(id).ok().filter(|id| *id != u32::MAX),
        };
        let (Some(uid), Some(gid)) = (map(uid, false), map(gid, true)) else {
            if self.options.ignore_chown_errors {
                self.left_out += 1;
                return Ok(());
            }
            return Err(broken(path, "belongs to somebody who has no id here"));
        };
        match place.chown(uid, gid) {
            Err(_) if self.options.ignore_chown_errors => {
                self.left_out += 1;
                Ok(())
            }
            done => done,
        }
    }

    /// Returns the name of an xattr where others keep the truth; `None` if it cannot be kept.
    fn kept_name<'n>(&self, name: Cow<'n, [u8]>) -> Option<Cow<'n, [u8]>> {
        if self.options.force_mask.is_none() {
            return Some(name);
        }
        let kept = overrides::stored_name(Some(Form::Containers), &name)?.into_owned();
        Some(Cow::Owned(kept))
    }

    fn set_xattrs(&mut self, place: &Place<'_>, entry: &Entry) -> Result<()> {
        for (name, value) in &entry.xattrs {
            // Labels belong to the machine that a layer is used on.
            if name == b"security.selinux" {
                continue;
            }
            // A name that would be a mark in a layer is stored as an overlay shows it: escaped.
            let stored = marks::stored_name(name).and_then(|name| self.kept_name(name));
            let Some(stored) = stored else {
                self.left_out += 1;
                continue;
            };
            match place.set_xattr(&stored, value) {
                Err(Error::Sys { errno: Errno::OPNOTSUPP, .. }) => self.left_out += 1,
                Err(Error::Sys { errno: Errno::PERM, .. })
                    if self.options.in_user_namespace || place.has_no_user_xattrs(name, entry) =>
                {
                    self.left_out += 1;
                }
                done => done?,
            }
        }
        Ok(())
    }

    /// Gives directories what the archive says of them, the deepest first.
    fn finish(&mut self) -> Result<()> {
        if !self.directories.contains_key(&b""[..]) {
            let root = Arc::clone(self.target.root());
            let place = Place::Dir(&root);
            if let Some(mask) = self.options.force_mask {
                metadata::set_override(&place, 0, 0, 0o755, "dir")?;
                place.chmod(mask)?;
            } else if let Some(mode) = self.options.root_mode {
                self.chown(&place, 0, 0, b"/")?;
                place.chmod(mode)?;
            }
        }
        while let Some((path, entry)) = self.directories.pop_last() {
            let Found::Dir(dir) = self.target.find(&path)? else {
                return Err(broken(&entry.path, "was removed by somebody else meanwhile"));
            };
            self.describe(&Place::Dir(&dir), &entry, "dir")?;
        }
        Ok(())
    }
}

/// File types as mknodat(2) takes them.
mod libc_mode {
    pub(super) const CHAR: u32 = 0o020_000;
    pub(super) const BLOCK: u32 = 0o060_000;
    pub(super) const FIFO: u32 = 0o010_000;
}

/// The component of a path that begins at `start`.
fn component(path: &[u8], start: usize) -> &[u8] {
    let rest = path.get(start..).unwrap_or_default();
    rest.split(|byte| *byte == b'/').next().unwrap_or_default()
}
