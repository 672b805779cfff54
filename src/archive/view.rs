//! A stack of layers as one tree, read only: what a path shows, without a mount.
//!
//! Asks the merge rule (`union::resolve`) like the union does. Holds nothing but directories of layers,
//! whose handles are opened when needed; every lookup asks the disk anew.
//!
//! # Source
//! overlayfs.rst; redirects and metacopies are followed in either namespace.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::FileType;

use super::path;
use super::target::is_directory;
use crate::error::{Errno, Error, Result};
use crate::layer::cache::HandleCache;
use crate::layer::{Dir, Index, form_of};
use crate::marks::{self, Opaque};
use crate::overrides::Form;
use crate::sys::stat::{self, Statx};
use crate::sys::xattr::{self, Target};
use crate::sys::{self, open};
use crate::union::resolve::{Fact, Merge, Next};

/// Directory handles kept open for one view.
const HANDLES: usize = 512;
/// How often redirects and metacopies may lead on from one object.
const HOPS: usize = 64;

/// An ordered set of layers, topmost first.
#[derive(Debug, Clone)]
pub struct Stack {
    roots: Arc<[Arc<Dir>]>,
}

/// A directory of the tree: its parts, topmost first, never empty.
#[derive(Debug, Clone)]
pub struct Merged {
    stack: Stack,
    parts: Vec<Arc<Dir>>,
}

/// What a name shows.
#[derive(Debug, Clone)]
pub enum Object {
    /// A directory; the attributes are of its topmost part.
    Dir(Merged, Box<Statx>),
    /// Anything else.
    Leaf(Leaf),
}

/// An object that is no directory, in the layer that has it.
#[derive(Debug, Clone)]
pub struct Leaf {
    /// The part of its directory that holds it.
    pub dir: Arc<Dir>,
    /// Its name there.
    pub name: Vec<u8>,
    /// Its attributes there.
    pub stat: Box<Statx>,
    /// What lies beneath it, where data is that it lacks.
    beneath: Option<Merged>,
}

/// What the xattrs of a directory say of the layers beneath.
#[derive(Debug, Default)]
pub struct DirMarks {
    /// Hides them.
    pub opaque: bool,
    /// They have it elsewhere.
    pub redirect: Option<Vec<u8>>,
}

impl Stack {
    /// Takes open directories, topmost first; the paths are for messages.
    ///
    /// # Errors
    /// Those of statx(2); `EINVAL` for more layers than have a number.
    pub fn new(layers: impl IntoIterator<Item = (OwnedFd, PathBuf)>) -> Result<Self> {
        let handles = Arc::new(HandleCache::new(HANDLES));
        let mut roots = Vec::new();
        for (number, (handle, path)) in layers.into_iter().enumerate() {
            // 0 stands for an upper in messages, and each of these is read only.
            let index = Index::try_from(number + 1)
                .map_err(|_many| Error::invalid("layers", "are more than 65534; give fewer"))?;
            roots.push(Dir::root(index, handle, path, None, &handles)?);
        }
        Ok(Self { roots: roots.into() })
    }

    /// Returns the same with owner, mode and type of each object as its layer means them, which is
    /// not what the inodes say where the layer's root carries an xattr that overrides them.
    ///
    /// # Errors
    /// Those of listxattr(2) and dup(2).
    pub fn as_meant(self) -> Result<Self> {
        let handles = Arc::new(HandleCache::new(HANDLES));
        let meant = |root: &Arc<Dir>| {
            let form = root.with("listxattr", |dir| form_of(Target::Handle(dir)))?;
            if form.is_none() {
                return Ok(Arc::clone(root));
            }
            let layer = &root.layer;
            let copy = root.handle()?.try_clone().map_err(|error| {
                let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
                Error::sys("dup", layer.path.display().to_string(), errno)
            })?;
            Dir::root(layer.index, copy, layer.path.clone(), form, &handles)
        };
        let roots: Result<Vec<_>> = self.roots.iter().map(meant).collect();
        Ok(Self { roots: roots?.into() })
    }

    /// Returns the root of the tree; `None` without layers.
    pub fn root(&self) -> Option<Merged> {
        self.merged(self.roots.to_vec())
    }

    /// Returns the tree that the layers beneath the topmost one make.
    pub fn beneath(&self) -> Option<Merged> {
        self.merged(self.roots.get(1..)?.to_vec())
    }

    /// Returns the root of the topmost layer.
    pub fn top(&self) -> Option<&Arc<Dir>> {
        self.roots.first()
    }

    fn merged(&self, parts: Vec<Arc<Dir>>) -> Option<Merged> {
        (!parts.is_empty()).then(|| Merged { stack: self.clone(), parts })
    }

    /// Returns the tree of the layers beneath this one.
    fn below(&self, layer: Index) -> Option<Merged> {
        self.merged(self.roots.iter().filter(|root| root.layer.index > layer).cloned().collect())
    }
}

impl Merged {
    /// Returns a directory of these parts of the same stack, topmost first.
    pub fn with_top(top: &Arc<Dir>, below: Option<&Self>, stack: &Stack) -> Self {
        let below = below.map(|below| below.parts.as_slice()).unwrap_or_default();
        let parts = std::iter::once(top).chain(below).cloned().collect();
        Self { stack: stack.clone(), parts }
    }

    /// Returns the topmost part.
    pub fn top(&self) -> &Arc<Dir> {
        // Never empty.
        #[expect(clippy::indexing_slicing, reason = "made with one part at least")]
        &self.parts[0]
    }

    /// Returns what a name shows; `None` if nothing.
    ///
    /// # Errors
    /// Those of the system calls but absence; `ELOOP` for redirects without end.
    pub fn lookup(&self, name: &[u8]) -> Result<Option<Object>> {
        self.lookup_within(name, HOPS)
    }

    /// Walks a clean path from here; the root of the walk is a directory.
    ///
    /// # Errors
    /// As [`Merged::lookup`].
    pub fn walk(&self, path: &[u8]) -> Result<Option<Object>> {
        self.walk_within(path, HOPS)
    }

    fn walk_within(&self, path: &[u8], hops: usize) -> Result<Option<Object>> {
        let stat = Box::new(self.top().stat()?);
        let mut at = Object::Dir(self.clone(), stat);
        for name in path::components(path) {
            let Object::Dir(dir, _) = at else { return Ok(None) };
            let Some(found) = dir.lookup_within(name, hops)? else { return Ok(None) };
            at = found;
        }
        Ok(Some(at))
    }

    fn lookup_within(&self, name: &[u8], hops: usize) -> Result<Option<Object>> {
        let hops = hops
            .checked_sub(1)
            .ok_or_else(|| Error::sys("lookup", self.top().describe(name), Errno::LOOP))?;
        // Such a name cannot be seen.
        if marks::is_reserved_name(name) {
            return Ok(None);
        }
        let mut merge = Merge::default();
        let mut found: Vec<(Arc<Dir>, Box<Statx>)> = Vec::new();
        for (number, part) in self.parts.iter().enumerate() {
            let rest = self.parts.get(number + 1..).unwrap_or_default();
            let Some(stat) = find(part, name)? else {
                let fact =
                    if has_whiteout_file(part, name)? { Fact::Whiteout } else { Fact::Absent };
                if merge.push(part.layer.index, fact) == Next::Done {
                    break;
                }
                continue;
            };
            if is_whiteout(part, name, &stat)? {
                if merge.push(part.layer.index, Fact::Whiteout) == Next::Done {
                    break;
                }
                continue;
            }
            if !is_directory(&stat) {
                merge.push(part.layer.index, Fact::Leaf);
                if found.is_empty() {
                    let beneath = self.stack.merged(rest.to_vec());
                    let leaf = Leaf {
                        dir: Arc::clone(part),
                        name: name.to_vec(),
                        stat: Box::new(stat),
                        beneath,
                    };
                    return Ok(Some(Object::Leaf(leaf)));
                }
                break;
            }
            let dir = part.child(name, &stat);
            if rest.is_empty() && self.is_last(part) {
                merge.push(part.layer.index, Fact::Directory { closed: true });
                found.push((dir, Box::new(stat)));
                break;
            }
            let marks = dir_marks(&dir)?;
            let closed = marks.opaque || has_whiteout_file(part, name)?;
            found.push((dir, Box::new(stat)));
            let next = merge.push(part.layer.index, Fact::Directory { closed });
            if next == Next::Done {
                break;
            }
            if let Some(redirect) = marks.redirect {
                let lower = self.follow(part.layer.index, rest, &redirect, hops)?;
                if let Some(Object::Dir(lower, stat)) = lower {
                    found.extend(lower.parts.into_iter().map(|part| (part, stat.clone())));
                }
                break;
            }
        }
        if !merge.exists() {
            return Ok(None);
        }
        let Some((_, stat)) = found.first() else { return Ok(None) };
        let stat = stat.clone();
        let parts = found.into_iter().map(|(part, _)| part).collect();
        Ok(Some(Object::Dir(Self { stack: self.stack.clone(), parts }, stat)))
    }

    /// Tells whether no layer lies beneath this part's, so that a mark cannot matter.
    fn is_last(&self, part: &Dir) -> bool {
        self.stack.roots.last().is_none_or(|last| last.layer.index == part.layer.index)
    }

    /// Returns what a redirect that was found in `layer` leads to in the layers beneath.
    fn follow(
        &self,
        layer: Index,
        rest: &[Arc<Dir>],
        redirect: &[u8],
        hops: usize,
    ) -> Result<Option<Object>> {
        let is_absolute = redirect.starts_with(b"/");
        let from =
            if is_absolute { self.stack.below(layer) } else { self.stack.merged(rest.to_vec()) };
        let clean = path::clean(redirect, usize::MAX).map_err(|_out| Error::Corrupt {
            what: "a redirect leads out of the layer".into(),
            at: self.top().describe(b""),
        })?;
        match from {
            Some(from) => from.walk_within(&clean, hops),
            None => Ok(None),
        }
    }

    /// Returns the visible names in order, each with what it shows.
    ///
    /// # Errors
    /// Those of the system calls.
    pub fn list(&self) -> Result<BTreeMap<Vec<u8>, Object>> {
        let mut names = BTreeMap::new();
        for part in &self.parts {
            part.list(|name, _, _| {
                names.insert(name.to_vec(), ());
                Ok(())
            })?;
        }
        let mut shown = BTreeMap::new();
        for name in names.into_keys() {
            if let Some(object) = self.lookup(&name)? {
                shown.insert(name, object);
            }
        }
        Ok(shown)
    }
}

impl Object {
    /// Returns its attributes.
    pub fn stat(&self) -> &Statx {
        match self {
            Self::Dir(_, stat) => stat,
            Self::Leaf(leaf) => &leaf.stat,
        }
    }

    /// Returns by which xattr its layer overrides what inodes say, if that is asked for.
    pub fn form(&self) -> Option<Form> {
        match self {
            Self::Dir(dir, _) => dir.top().layer.form,
            Self::Leaf(leaf) => leaf.dir.layer.form,
        }
    }
}

impl Leaf {
    /// Returns an object of one layer; `beneath` are the parts of its directory beneath that one.
    pub fn new(dir: &Arc<Dir>, name: &[u8], stat: Statx, beneath: Option<Merged>) -> Self {
        Self { dir: Arc::clone(dir), name: name.to_vec(), stat: Box::new(stat), beneath }
    }

    /// Opens the file that has the data of a regular file, which is in a lower layer for a metacopy.
    ///
    /// # Errors
    /// Those of the system calls; `EIO` for a metacopy without data.
    pub fn open_data(&self) -> Result<OwnedFd> {
        self.data_within(HOPS)
    }

    fn data_within(&self, hops: usize) -> Result<OwnedFd> {
        let (is_metacopy, redirect) = self.dir.call("getxattr", &self.name, |at| {
            let target = Target::Name(at);
            let list = xattr::list(target)?;
            if !marks::lists_any(&list, &marks::METACOPY_XATTRS) {
                return Ok((false, None));
            }
            Ok((true, first(target, &list, &marks::REDIRECT_XATTRS)?))
        })?;
        if !is_metacopy {
            return self.dir.call("openat", &self.name, |at| open::reader(at.dir, at.name));
        }
        let missing = || Error::Corrupt {
            what: "a metacopy has no data in the layers beneath".into(),
            at: self.dir.describe(&self.name),
        };
        let hops = hops.checked_sub(1).ok_or_else(missing)?;
        let beneath = self.beneath.as_ref().ok_or_else(missing)?;
        let found = match redirect {
            Some(redirect) => {
                let rest = &beneath.parts;
                beneath.follow(self.dir.layer.index, rest, &redirect, hops)?
            }
            None => beneath.lookup_within(&self.name, hops)?,
        };
        match found {
            Some(Object::Leaf(leaf)) if kind(&leaf.stat) == FileType::RegularFile => {
                leaf.data_within(hops)
            }
            _ => Err(missing()),
        }
    }
}

/// The type of an object.
pub fn kind(stat: &Statx) -> FileType {
    FileType::from_raw_mode(stat.stx_mode.into())
}

/// Reads what a directory's xattrs and files say of the layers beneath it.
///
/// # Errors
/// Those of the system calls but absence.
pub fn dir_marks(dir: &Arc<Dir>) -> Result<DirMarks> {
    let mut found = dir.with("getxattr", |handle| {
        let target = Target::Handle(handle);
        let list = xattr::list(target)?;
        let mut found = DirMarks::default();
        if list.is_empty() {
            return Ok(found);
        }
        for name in marks::OPAQUE_XATTRS.iter().filter(|name| marks::lists_any(&list, &[name])) {
            match xattr::get(target, name)?.as_deref().map_or(Opaque::No, Opaque::from_value) {
                Opaque::Yes => found.opaque = true,
                Opaque::XattrWhiteouts | Opaque::No => {}
            }
        }
        found.redirect = first(target, &list, &marks::REDIRECT_XATTRS)?;
        Ok(found)
    })?;
    if !found.opaque && find(dir, marks::OPAQUE_NAME)?.is_some() {
        found.opaque = true;
    }
    Ok(found)
}

/// Returns the value of the first of `names` that is listed.
fn first(
    target: Target<'_>,
    list: &[u8],
    names: &[&[u8]],
) -> std::result::Result<Option<Vec<u8>>, Errno> {
    for name in names.iter().filter(|name| marks::lists_any(list, &[name])) {
        if let Some(value) = xattr::get(target, name)? {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

/// Tells whether an object that was found is a whiteout of the kernel's forms.
///
/// # Errors
/// Those of listxattr(2).
pub fn is_whiteout(dir: &Arc<Dir>, name: &[u8], stat: &Statx) -> Result<bool> {
    if stat::is_whiteout(stat) {
        return Ok(true);
    }
    if stat.stx_size != 0 || kind(stat) != FileType::RegularFile {
        return Ok(false);
    }
    dir.call("listxattr", name, |at| {
        let list = sys::xattr::list(Target::Name(at))?;
        Ok(marks::lists_any(&list, &marks::WHITEOUT_XATTRS))
    })
}

fn has_whiteout_file(dir: &Arc<Dir>, name: &[u8]) -> Result<bool> {
    match marks::whiteout_name(name) {
        Some(stored) => Ok(find(dir, &stored)?.is_some()),
        None => Ok(false),
    }
}

/// Like [`Dir::find`]; a name too long to exist is absent.
fn find(dir: &Arc<Dir>, name: &[u8]) -> Result<Option<Statx>> {
    if name.len() > marks::NAME_MAX {
        return Ok(None);
    }
    dir.find(name)
}
