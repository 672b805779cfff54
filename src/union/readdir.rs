//! The merged names of a directory, and listing them.
//!
//! A listing is computed once, from the parts of all layers, and then kept true by every change
//! that goes through the union; lowers do not change. It gives each name a number that never
//! changes while the listing lives, which is what makes offsets stable: a scan that goes on while
//! names come and go shows each other name exactly once.
//!
//! Locks: runs under `Dir::names`.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use hashbrown::HashTable;
use parking_lot::{RwLockReadGuard, RwLockWriteGuard};

use super::attr::FileType;
use super::listing::{Child, Listing};
use super::lookup::Entry;
use super::node::{Dir, Node, NodeId, end_open};
use super::resolve::{Fact, Merge, Next};
use super::{Union, lock, parts};
use crate::error::{Errno, Result};
use crate::layer::{self, UPPER};
use crate::marks;
use crate::sys;

/// One entry of a listing.
#[derive(Debug, Clone, Copy)]
pub struct DirEntry<'a> {
    /// The name, one component.
    pub name: &'a [u8],
    /// Inode number, the same as stat(2) shows.
    pub ino: u64,
    /// Type of the object.
    pub kind: FileType,
    /// Where a listing goes on after this entry.
    pub offset: u64,
}

/// What the receiver of an entry says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Visit {
    /// Stored; the next one, please.
    Taken,
    /// No room: the listing stops, and will begin with this entry again.
    Full,
}

/// The names of a directory, once they are known.
#[derive(Debug, Default)]
pub(crate) struct Names {
    pub(crate) listing: Option<Box<Listing>>,
}

/// A name while the parts are read, topmost first.
struct Draft {
    name: Box<[u8]>,
    merge: Merge,
    closed: bool,
    kind: FileType,
    object: (u64, u64),
    upper_whiteout: bool,
    /// The answer of the lower parts alone.
    below: Merge,
    below_closed: bool,
}

impl Draft {
    fn new(name: Box<[u8]>) -> Self {
        Self {
            name,
            merge: Merge::Open,
            closed: false,
            kind: FileType::Regular,
            object: (0, 0),
            upper_whiteout: false,
            below: Merge::Open,
            below_closed: false,
        }
    }

    fn push(&mut self, layer: layer::Index, fact: Fact, inode: u64) {
        if !self.closed {
            self.closed = self.merge.push(layer, fact) == Next::Done;
        }
        if layer == UPPER {
            self.upper_whiteout = fact == Fact::Whiteout && inode != MARK_ONLY;
        } else if !self.below_closed {
            self.below_closed = self.below.push(layer, fact) == Next::Done;
        }
    }
}

impl Union {
    /// Gives up a listing that a failed change may have made untrue; it is read again.
    pub(super) fn distrust(&self, names: &mut Names) {
        let dropped = names.listing.take();
        self.unlisted(dropped.as_ref().map_or(0, |listing| listing.weight()));
    }

    /// Returns the names of a directory for reading, complete where a lookup needs them to be.
    ///
    /// A directory with one part needs no listing to be looked up in; one with several does,
    /// because whiteouts of the `.wh.` form would cost a call for each layer and name.
    pub(super) fn names<'a>(&self, dir: &'a Dir) -> Result<RwLockReadGuard<'a, Names>> {
        let names = dir.names.read();
        if names.listing.is_some() || !dir.is_merged() {
            return Ok(names);
        }
        drop(names);
        self.names_listed(dir)
    }

    /// Returns the names of a directory for reading, always complete.
    pub(super) fn names_listed<'a>(&self, dir: &'a Dir) -> Result<RwLockReadGuard<'a, Names>> {
        self.names_up_to(dir, usize::MAX)
    }

    /// Like [`Union::names_listed`], for names that nobody asked for yet.
    ///
    /// # Errors
    /// `E2BIG` if there are more than `most`.
    pub(super) fn names_up_to<'a>(
        &self,
        dir: &'a Dir,
        most: usize,
    ) -> Result<RwLockReadGuard<'a, Names>> {
        let names = dir.names.read();
        if names.listing.is_some() {
            return Ok(names);
        }
        drop(names);
        let mut names = dir.names.write();
        self.load_up_to(dir, &mut names, most)?;
        Ok(RwLockWriteGuard::downgrade(names))
    }

    /// Reads the names of all parts, if that was not done before.
    pub(super) fn load<'a>(&self, dir: &Dir, names: &'a mut Names) -> Result<&'a mut Listing> {
        self.load_up_to(dir, names, usize::MAX)
    }

    fn load_up_to<'a>(
        &self,
        dir: &Dir,
        names: &'a mut Names,
        most: usize,
    ) -> Result<&'a mut Listing> {
        if names.listing.is_none() {
            let listing = self.read_parts(dir, most)?;
            self.listed.fetch_add(listing.weight(), Ordering::Relaxed);
            names.listing = Some(Box::new(listing));
        }
        names.listing.as_deref_mut().ok_or_else(|| Errno::IO.into())
    }

    fn read_parts(&self, dir: &Dir, most: usize) -> Result<Listing> {
        let mut drafts: Vec<Draft> = Vec::new();
        let mut positions: HashTable<usize> = HashTable::new();
        let hasher = RandomState::new();
        let all: Vec<_> = dir.parts().collect();
        let read = |piece| parts::each(piece, |part: &&Arc<layer::Dir>| read_part(part, most));
        let reads = parts::pieces(&all).flat_map(|piece| piece.iter().copied().zip(read(piece)));
        for (part, read) in reads {
            let (found, is_last) = read?;
            if drafts.len() > most {
                return Err(Errno::TOOBIG.into());
            }
            for (name, fact, kind, inode) in found {
                let known = (all.len() > 1).then(|| {
                    let hash = |draft: Option<&Draft>| hasher.hash_one(draft.map(|it| &*it.name));
                    let is_it = |at: &usize| drafts.get(*at).is_some_and(|it| it.name == name);
                    let rehash = |at: &usize| hash(drafts.get(*at));
                    let entry = positions.entry(hasher.hash_one(Some(&*name)), is_it, rehash);
                    *entry.or_insert(drafts.len()).get()
                });
                if known.is_none_or(|at| at == drafts.len()) {
                    drafts.push(Draft::new(name));
                }
                let at = known.unwrap_or(drafts.len() - 1);
                let Some(draft) = drafts.get_mut(at) else { continue };
                if !draft.closed && draft.merge == Merge::Open {
                    draft.kind = kind;
                    draft.object = (part.device, inode);
                }
                draft.push(part.layer.index, fact, inode);
            }
            // The upper part was asked when it was found, and has nothing beneath it then.
            if is_last && part.layer.index != UPPER {
                dir.ends_with(part);
                break;
            }
        }
        let mut listing = Listing::default();
        for Draft { name, merge, kind, object, upper_whiteout, below, .. } in drafts {
            let (top, parts) = match &merge {
                Merge::Leaf(layer) => (Some(*layer), &[][..]),
                Merge::Directory(parts) if parts.len() > 1 => (parts.first().copied(), &**parts),
                Merge::Directory(parts) => (parts.first().copied(), &[][..]),
                Merge::Open | Merge::Hidden => (None, &[][..]),
            };
            debug_assert!(top.is_none() || !upper_whiteout, "nothing shows through a whiteout");
            let child = top.map(|top| Child { name: &name, kind, top, object, parts });
            listing.read(&name, child, upper_whiteout, below.exists());
        }
        listing.shrink();
        listing.fresh = true;
        Ok(listing)
    }

    /// Prepares a directory for listing; the listing is kept at least until it is released.
    ///
    /// # Errors
    /// `ENOTDIR`; those of reading the parts.
    pub fn open_dir(&self, node: NodeId) -> Result<()> {
        let node = self.node(node)?;
        let dir = lock::directory(&node)?;
        dir.opened.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    /// Ends what [`Union::open_dir`] began.
    pub fn release_dir(&self, node: NodeId) {
        let Some(node) = self.table.get(node) else { return };
        let Some(dir) = &node.dir else { return };
        if !end_open(&dir.opened) {
            return;
        }
        // Too much is remembered: what can be read again is given up, directory by directory.
        if self.listed.load(Ordering::Relaxed) > super::LISTED_MAX {
            let mut names = dir.names.write();
            // Opened again meanwhile: its offsets must hold.
            if dir.opened.load(Ordering::Acquire) == 0 {
                self.distrust(&mut names);
            }
        }
    }

    /// Lists names from `offset` on (0 is the start, `.` and `..` come first).
    ///
    /// # Errors
    /// `ENOTDIR`; those of reading the parts.
    pub fn readdir(
        &self,
        node: NodeId,
        offset: u64,
        visit: &mut dyn FnMut(DirEntry<'_>) -> Visit,
    ) -> Result<()> {
        let node = self.node(node)?;
        let dir = lock::directory(&node)?;
        let names = self.names_of(&node, dir)?;
        if self.dots(&node, offset, visit) == Visit::Full {
            return Ok(());
        }
        let Some(listing) = names.as_ref().and_then(|names| names.listing.as_ref()) else {
            return Ok(());
        };
        let mut rest = listing.children_from(offset.saturating_sub(2)).peekable();
        let at_end = rest.peek().is_none();
        for (number, child) in rest {
            let ino = self.child_ino(dir, &child);
            let kind = self.child_kind(dir, &child);
            let offset = number + 3;
            if visit(DirEntry { name: child.name, ino, kind, offset }) == Visit::Full {
                break;
            }
        }
        drop(names);
        // The kernel asks so for what follows the first entries, unless their attributes were of use.
        self.ahead.showed(&node, Vec::new(), at_end);
        self.listed_to_the_end(dir, at_end);
        Ok(())
    }

    /// Lists names like [`Union::readdir`], each with its entry, as a lookup would give it.
    ///
    /// `.` and `..` come without an entry, and so does what cannot be looked at. Each entry taken
    /// counts as one lookup.
    ///
    /// # Errors
    /// Those of [`Union::readdir`] and of statx(2).
    pub fn readdirplus(
        &self,
        node: NodeId,
        offset: u64,
        visit: &mut dyn FnMut(DirEntry<'_>, Option<&Entry>) -> Visit,
    ) -> Result<()> {
        let node = self.node(node)?;
        let dir = lock::directory(&node)?;
        let names = self.names_of(&node, dir)?;
        if self.dots(&node, offset, &mut |entry| visit(entry, None)) == Visit::Full {
            return Ok(());
        }
        let Some(listing) = names.as_ref().and_then(|names| names.listing.as_ref()) else {
            return Ok(());
        };
        let mut aliases = Vec::new();
        let mut dirs = Vec::new();
        let ready = self.ahead.ready(&node, offset);
        let mut rest = listing.children_from(offset.saturating_sub(2)).peekable();
        let at_end = rest.peek().is_none();
        for (number, child) in rest {
            let offset = number + 3;
            let known = ready.as_ref().and_then(|ready| ready.find(number, &child));
            let looked = match known {
                Some(found) => Ok(Some(found.clone())),
                None => self.find_child(dir, &child),
            };
            let looked = looked.and_then(|found| {
                let Some(found) = found else { return Ok(None) };
                let may_be_alias = found.is_alias();
                let (entered, attr) = self.enter(&node, child.name, found)?;
                Ok(Some((entered, attr, may_be_alias)))
            });
            let (entered, attr, may_be_alias) = match looked {
                Ok(Some(looked)) => looked,
                Ok(None) => continue,
                // One child that cannot be looked at does not hide the others.
                Err(error) => {
                    tracing::debug!(%error, "listed without attributes");
                    let ino = self.numbers.of(child.object.0, child.object.1);
                    let listed = DirEntry { name: child.name, ino, kind: child.kind, offset };
                    if visit(listed, None) == Visit::Full {
                        break;
                    }
                    continue;
                }
            };
            let entry = Entry::given(&entered, attr);
            let (ino, kind) = (entry.attr.ino, entry.attr.kind());
            let listed = DirEntry { name: child.name, ino, kind, offset };
            if visit(listed, Some(&entry)) == Visit::Full {
                self.release(&entered, entered.take_back(1));
                break;
            }
            if kind == FileType::Directory {
                dirs.push((ino, child.name.into()));
            }
            if may_be_alias {
                aliases.push(entered);
            }
        }
        drop(names);
        self.ahead.showed(&node, dirs, at_end);
        for alias in aliases {
            self.link_alias(&alias);
        }
        self.listed_to_the_end(dir, at_end);
        Ok(())
    }

    /// Where opens are no requests, nothing tells when a directory is closed. Once too much is
    /// remembered, a listing that was shown to its end is given up, unless it has changed: others
    /// who are in the midst of it go on at offsets that mean the same when it is read again.
    fn listed_to_the_end(&self, dir: &Dir, at_end: bool) {
        if !at_end
            || self.listed.load(Ordering::Relaxed) <= super::LISTED_MAX
            || dir.opened.load(Ordering::Acquire) > 0
        {
            return;
        }
        let mut names = dir.names.write();
        if names.listing.as_ref().is_some_and(|listing| listing.fresh) {
            self.distrust(&mut names);
        }
    }

    /// Names of a directory that may have been removed: then there are none.
    fn names_of<'a>(
        &self,
        node: &Node,
        dir: &'a Dir,
    ) -> Result<Option<RwLockReadGuard<'a, Names>>> {
        if node.place.read().gone {
            return Ok(None);
        }
        self.names_listed(dir).map(Some)
    }

    fn dots(
        &self,
        node: &Arc<Node>,
        offset: u64,
        visit: &mut dyn FnMut(DirEntry<'_>) -> Visit,
    ) -> Visit {
        let parent = node.place.read().parent.as_ref().map_or(node.ino, |parent| parent.ino);
        for (number, name, ino) in [(1, &b"."[..], node.ino), (2, &b".."[..], parent)] {
            if number > offset {
                let kind = FileType::Directory;
                if visit(DirEntry { name, ino, kind, offset: number }) == Visit::Full {
                    return Visit::Full;
                }
            }
        }
        Visit::Taken
    }

    /// Returns the number that stat(2) would show for a child.
    ///
    /// A child that cannot be looked at shows some number: its name is no secret.
    fn child_ino(&self, dir: &Dir, child: &Child<'_>) -> u64 {
        let (device, inode) = child.object;
        let may_have_origin = || {
            let upper = dir.upper.get().is_some_and(|upper| upper.is_impure().unwrap_or(true));
            child.top == UPPER && upper && self.numbers.kept(device, inode).is_none()
        };
        let is_redirected = child.kind == FileType::Directory && child.top < self.lowest;
        if (!child.parts.is_empty() || is_redirected || may_have_origin())
            && let Ok(Some(found)) = self.find_child(dir, child)
            && let Ok(identity) = self.identity(dir, child.name, &found)
        {
            return identity.number;
        }
        self.numbers.of(device, inode)
    }

    /// Returns the type that stat(2) would show for a child, which a file may stand for.
    fn child_kind(&self, dir: &Dir, child: &Child<'_>) -> FileType {
        if child.kind == FileType::Regular
            && self.form(child.top).is_some()
            && let Ok(Some(found)) = self.find_child(dir, child)
        {
            return FileType::of_mode(u32::from(found.stat.stx_mode));
        }
        child.kind
    }

    /// Makes the changes of a directory durable.
    ///
    /// # Errors
    /// `EIO`, `ENOSPC` and whatever else fsync(2) reports.
    pub fn sync_dir(&self, node: NodeId) -> Result<()> {
        let node = self.node(node)?;
        let Some(upper) = lock::directory(&node)?.upper.get() else { return Ok(()) };
        if self.volatile {
            return Ok(());
        }
        upper.with("fsync", |dir| {
            // The handle may be one that cannot be synced (O_PATH).
            let dir = sys::open::directory(dir, b".")?;
            sys::data::sync(std::os::fd::AsFd::as_fd(&dir), false)
        })
    }
}

/// Name, what it is, type and inode number.
type Found = (Box<[u8]>, Fact, FileType, u64);

/// Inode number that stands for a name with a `.wh.` file and no object.
const MARK_ONLY: u64 = 0;

/// Reads the names of one part, with whiteouts of every form turned into facts; tells whether one of them is the mark
/// that hides all beneath. `E2BIG` if there are more than `most`.
fn read_part(part: &Arc<layer::Dir>, most: usize) -> Result<(Vec<Found>, bool)> {
    let mut found: Vec<Found> = Vec::new();
    let mut is_opaque = false;
    // Names with a `.wh.` file beside them.
    let mut marked: Vec<Box<[u8]>> = Vec::new();
    let mut unsure: Vec<usize> = Vec::new();
    part.list(|name, inode, kind| {
        if part.layer.is_leftover(name) {
            return Ok(());
        }
        if found.len() + marked.len() >= most {
            return Err(Errno::TOOBIG);
        }
        is_opaque |= name == marks::OPAQUE_NAME;
        if let Some(hidden) = marks::whiteout_target(name) {
            marked.push(hidden.into());
        } else if !marks::is_reserved_name(name) {
            use rustix::fs::FileType as Raw;
            let (fact, file_type) = match kind {
                Raw::Directory => (Fact::Directory { closed: false }, FileType::Directory),
                Raw::RegularFile => (Fact::Leaf, FileType::Regular),
                Raw::Symlink => (Fact::Leaf, FileType::Symlink),
                Raw::Fifo => (Fact::Leaf, FileType::Fifo),
                Raw::Socket => (Fact::Leaf, FileType::Socket),
                Raw::BlockDevice => (Fact::Leaf, FileType::BlockDevice),
                Raw::CharacterDevice | Raw::Unknown => {
                    unsure.push(found.len());
                    (Fact::Leaf, FileType::CharDevice)
                }
            };
            found.push((name.into(), fact, file_type, inode));
        }
        Ok(())
    })?;
    // Any empty file in them may be a whiteout, ours or a nested overlay's.
    if part.has_xattr_whiteouts()? {
        let regular = |(_, entry): &(usize, &Found)| entry.2 == FileType::Regular;
        unsure.extend(found.iter().enumerate().filter(regular).map(|(at, _)| at));
    }
    if !part.layer.has_true_numbers() {
        unsure = (0..found.len()).collect();
    }
    for at in unsure {
        let Some(entry) = found.get_mut(at) else { continue };
        // A name that went meanwhile was not there.
        let Some(mut stat) = part.find(&entry.0)? else {
            entry.1 = Fact::Absent;
            continue;
        };
        entry.1 = super::lookup::fact_of(part, &entry.0, &mut stat)?;
        entry.2 = FileType::of_mode(u32::from(stat.stx_mode));
        entry.3 = stat.stx_ino;
    }
    if marked.is_empty() {
        return Ok((found, is_opaque));
    }
    let mut marked: HashSet<Box<[u8]>> = marked.into_iter().collect();
    for (name, fact, ..) in &mut found {
        // The mark is for lower layers; beside a directory it makes that opaque.
        if marked.remove(&**name)
            && let Fact::Directory { closed } = fact
        {
            *closed = true;
        }
    }
    let alone = |hidden: Box<[u8]>| (hidden, Fact::Whiteout, FileType::Regular, MARK_ONLY);
    found.extend(marked.into_iter().map(alone));
    Ok((found, is_opaque))
}

/// Tells whether a directory holds nothing but whiteouts and marks, by what is on the disk now.
pub(super) fn shows_nothing(part: &Arc<layer::Dir>) -> Result<bool> {
    let (found, _) = read_part(part, usize::MAX)?;
    Ok(found.iter().all(|(_, fact, ..)| matches!(fact, Fact::Absent | Fact::Whiteout)))
}
