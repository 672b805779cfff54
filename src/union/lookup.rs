//! Looking up one name: gathers what the layers hold, asks the merge rule, makes the node.
//!
//! Locks: `Dir::names` of the parent for reading, over the calls of one lookup.

use std::sync::Arc;

use parking_lot::Mutex;

use super::attr::{Attr, FileType};
use super::flatten::Pin;
use super::index::Indexed;
use super::listing::Child;
use super::node::{Dir, Links, Name, Node, NodeId, Place};
use super::readdir::Names;
use super::resolve::Fact;
use super::{Union, lock, parts};
use crate::error::{Errno, Result};
use crate::layer::{self, UPPER};
use crate::marks;
use crate::sys;
use crate::sys::stat::{self, Statx};
use crate::sys::xattr::{self, Target};

/// A node and its attributes, as a lookup gives them.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The node, counted once more.
    pub node: NodeId,
    /// Its attributes.
    pub attr: Attr,
}

impl Entry {
    /// Makes the count that the caller has of `node` a lookup of the kernel.
    pub(super) fn given(node: &Node, attr: Attr) -> Self {
        node.give();
        Self { node: node.id, attr }
    }
}

/// What the layers hold under a name.
#[derive(Clone, Debug)]
pub(super) struct Found {
    /// Attributes of the topmost object.
    pub(super) stat: Statx,
    pub(super) layer: layer::Index,
    /// For a directory: its parts, topmost first.
    pub(super) parts: Vec<Arc<layer::Dir>>,
}

/// What is known of an object by its number.
pub(super) struct Identity {
    /// The number that it shows.
    pub(super) number: u64,
    /// The number was found by marks on the disk, and can be found there again.
    pub(super) on_disk: bool,
    /// What the index has of it.
    pub(super) indexed: Option<Indexed>,
    /// Its xattrs were listed, and none of them protects it.
    pub(super) unprotected: bool,
    /// How many nodes had died when the index was asked, see [`Table::deaths`](super::node::Table::deaths).
    pub(super) asked: Option<u64>,
}

impl Identity {
    /// What shows a number and nothing else is known of.
    pub(super) fn of(number: u64) -> Self {
        Self { number, on_disk: false, indexed: None, unprotected: false, asked: None }
    }
}

/// A lower part of a directory, and its marks.
struct Opened {
    part: Arc<layer::Dir>,
    xattrs: Result<(Vec<u8>, marks::Opaque)>,
}

impl Opened {
    /// `None` where that cannot be done, whyever, or it is none.
    fn new(above: &Arc<layer::Dir>, name: &[u8]) -> Option<Self> {
        let (part, _) = above.open_child(name).filter(|_| !above.layer.is_leftover(name))?;
        let xattrs = part.xattrs();
        Some(Self { part, xattrs })
    }
}

impl Found {
    /// Tells whether other names of a lower layer lead to the same object.
    pub(super) fn is_alias(&self) -> bool {
        self.layer != UPPER && self.parts.is_empty() && self.stat.stx_nlink > 1
    }

    /// The topmost lower part of a directory, which copy-up does not change.
    fn lower_part(&self) -> Option<&Arc<layer::Dir>> {
        self.parts.iter().find(|part| part.layer.index != UPPER)
    }

    /// Returns device and inode number of what is shown, see [`Place::object`].
    fn object(&self) -> (u64, u64) {
        self.lower_part()
            .map_or((stat::device(&self.stat), self.stat.stx_ino), |part| (part.device, part.inode))
    }
}

impl Union {
    /// Looks up a name; `None` if it does not exist. A hit counts one lookup of the node.
    ///
    /// # Errors
    /// `ENOTDIR`, `ENAMETOOLONG`; any errno of a layer but `ENOENT`, so that an I/O error never
    /// looks like absence.
    pub fn lookup(&self, parent: NodeId, name: &[u8]) -> Result<Option<Entry>> {
        let parent = self.node(parent)?;
        let dir = lock::directory(&parent)?;
        if name.len() > marks::NAME_MAX {
            return Err(Errno::NAMETOOLONG.into());
        }
        let names = self.names(dir)?;
        let Some(found) = self.find(dir, &names, name)? else { return Ok(None) };
        let may_be_alias = found.is_alias();
        let (node, attr) = self.enter(&parent, name, found)?;
        drop(names);
        if may_be_alias {
            self.link_alias(&node);
        }
        Ok(Some(Entry::given(&node, attr)))
    }

    /// Links a name just seen to the object it shows, if that was copied up under another name:
    /// what a name has shown it must show after a remount as well.
    pub(super) fn link_alias(&self, node: &Arc<Node>) {
        let Some(links) = node.links.get() else { return };
        let is_pending = {
            let links = links.lock();
            // With an index a lower name leads to the copy anyway.
            links.anchored && links.index.is_none() && !links.pending.is_empty()
        };
        if is_pending && let Err(error) = self.copy_up(node, super::copy_up::Extent::All) {
            tracing::warn!("a further name of a copied-up file stays a lower one: {error}");
        }
    }

    /// Counts `count` lookups less; the node is freed with the last one, and once most of them are,
    /// their memory goes back to the system. Not to be called with a lock held.
    ///
    /// A kernel that gives back more than it got loses what it has, and nobody else does.
    pub fn forget(&self, node: NodeId, count: u64) {
        if let Some(node) = self.table.get(node) {
            let taken = node.take_back(count);
            if taken < count && node.id != NodeId::ROOT {
                let id = node.id.0;
                tracing::error!(id, count, taken, "more lookups are given back than were made");
            }
            if taken > 0 {
                self.release(&node, taken);
            }
            drop(node);
            if self.table.has_shrunk() {
                sys::process::give_memory_back();
            }
        }
    }

    /// Returns the node that shows inode number `ino`, if the kernel knows one.
    pub fn node_by_ino(&self, ino: u64) -> Option<NodeId> {
        self.table.by_ino(ino).map(|node| node.id)
    }

    /// Finds what a name shows. `names` belong to `dir` and are locked.
    pub(super) fn find(&self, dir: &Dir, names: &Names, name: &[u8]) -> Result<Option<Found>> {
        if let Some(listing) = &names.listing {
            return match listing.find(name) {
                Some(child) => self.find_child(dir, &child),
                None => Ok(None),
            };
        }
        if marks::is_reserved_name(name) {
            return Ok(None);
        }
        // One part, or one lower part and an upper one made this moment by a copy-up: what is empty
        // until a change, which would have made the listing.
        match dir.lowers().first().or_else(|| dir.upper.get()) {
            Some(part) => self.find_from(dir, part, name, &[]),
            None => Ok(None),
        }
    }

    /// Finds a name in a single part. What is `expected` to be a directory with more beneath is
    /// opened at once, as its marks will be asked.
    fn find_in(
        &self,
        part: &Arc<layer::Dir>,
        name: &[u8],
        expected: bool,
    ) -> Result<Option<Found>> {
        if part.layer.is_leftover(name) {
            return Ok(None);
        }
        let layer = part.layer.index;
        if expected && let Some((child, stat)) = part.open_child(name) {
            return Ok(Some(Found { stat, layer, parts: vec![child] }));
        }
        let Some(mut stat) = part.find(name)? else { return Ok(None) };
        Ok(match fact_of(part, name, &mut stat)? {
            Fact::Absent | Fact::Whiteout => None,
            Fact::Leaf => Some(Found { stat, layer, parts: Vec::new() }),
            Fact::Directory { .. } => {
                Some(Found { stat, layer, parts: vec![part.child(name, &stat)] })
            }
        })
    }

    /// Finds what `top` holds under a name; for a directory also its parts further down, which are
    /// in the `others` of the layers that hold it, or where a redirect leads to.
    ///
    /// A `.wh..wh..opq` in a lower part is left for the listing, which sees it anyway and is made before anything is
    /// looked up in a directory of several parts.
    fn find_from(
        &self,
        dir: &Dir,
        top: &Arc<layer::Dir>,
        name: &[u8],
        others: &[layer::Index],
    ) -> Result<Option<Found>> {
        let Some(mut found) = self.find_in(top, name, !others.is_empty())? else { return Ok(None) };
        if let Err(error) = self.find_beneath(dir, top, name, others, &mut found) {
            // What is hidden need not be readable.
            let hides = |part: &Arc<layer::Dir>| has_opaque_name(part).unwrap_or(false);
            let last = found.parts.iter().position(hides).ok_or(error)?;
            found.parts.truncate(last + 1);
        }
        Ok(Some(found))
    }

    /// Adds the parts of a directory beneath its topmost.
    fn find_beneath(
        &self,
        dir: &Dir,
        top: &Arc<layer::Dir>,
        name: &[u8],
        others: &[layer::Index],
        found: &mut Found,
    ) -> Result<()> {
        let mut part = top;
        // All but the last, as what that is marked with matters only if it leads elsewhere.
        let most = others.split_last().map_or(&[][..], |(_, most)| most);
        let open = |layer: &layer::Index| Opened::new(dir.part(*layer)?, name);
        let mut opened = parts::pieces(most).flat_map(|piece| parts::each(piece, open));
        let mut known = None;
        let mut others = others.iter();
        while let Some(last) = found.parts.last() {
            if part.layer.index >= self.lowest {
                break;
            }
            let Some(layer) = others.next() else {
                // Nothing but a redirect leads further; it need not be opened to be asked for one.
                let list = part.call("listxattr", name, |at| xattr::list(Target::Name(at)))?;
                if marks::lists_any(&list, &marks::REDIRECT_XATTRS) && !is_closed(last)? {
                    self.follow_listed(dir, found, part, name, &list)?;
                }
                break;
            };
            let (list, opaque) = known.take().unwrap_or_else(|| last.xattrs())?;
            let is_upper = last.layer.index == UPPER;
            if opaque == marks::Opaque::Yes || is_upper && has_opaque_name(last)? {
                break;
            }
            if marks::lists_any(&list, &marks::REDIRECT_XATTRS) {
                self.follow_listed(dir, found, part, name, &list)?;
                break;
            }
            part = dir.part(*layer).ok_or(Errno::STALE)?;
            if let Some(Opened { part, xattrs }) = opened.next().flatten() {
                found.parts.push(part);
                known = Some(xattrs);
                continue;
            }
            let Some(below) = self.find_in(part, name, false)? else { break };
            if below.parts.is_empty() {
                break;
            }
            found.parts.extend(below.parts);
        }
        Ok(())
    }

    /// Finds further parts of `found` where the redirect leads that its xattrs have.
    fn follow_listed(
        &self,
        dir: &Dir,
        found: &mut Found,
        part: &Arc<layer::Dir>,
        name: &[u8],
        list: &[u8],
    ) -> Result<()> {
        match self.listed_redirect(part, name, list)? {
            Some(redirect) => self.follow(dir, found, redirect),
            None => Ok(()),
        }
    }

    /// Finds the parts of a listed name, asking opaque marks where more lies beneath, but see
    /// [`Union::find_from`].
    pub(super) fn find_child(&self, dir: &Dir, child: &Child<'_>) -> Result<Option<Found>> {
        let top = dir.part(child.top).ok_or(Errno::STALE)?;
        let others = child.parts.get(1..).unwrap_or_default();
        self.find_from(dir, top, child.name, others)
    }

    /// Tells what `name` shows in `dir` by its number: that of the lower object that was or would be
    /// copied up, so that copy-up does not change it.
    ///
    /// # Errors
    /// Those of [`Union::identity_by_origin`].
    pub(super) fn identity(&self, dir: &Dir, name: &[u8], found: &Found) -> Result<Identity> {
        let (device, inode) = found.object();
        if found.layer == UPPER && found.lower_part().is_none() {
            if let Some(number) = self.numbers.kept(device, inode) {
                return Ok(Identity::of(number));
            }
            if let Some(identity) = self.identity_by_origin(dir, name, found)? {
                return Ok(identity);
            }
        }
        Ok(Identity::of(self.numbers.of(device, inode)))
    }

    /// Tells what a file with several names is that may be in the index. Where a node is known, the
    /// index is not asked: the node must not be forgotten in between, or the next one would show the
    /// lower file that has an upper copy.
    fn identity_in_index(
        &self,
        dir: &Dir,
        name: &[u8],
        found: &Found,
    ) -> Result<(Identity, Option<Pin<'_>>)> {
        let (device, inode) = found.object();
        let number = match found.layer {
            UPPER => self.numbers.kept(device, inode),
            _ => Some(self.numbers.of(device, inode)),
        };
        if let Some(known) = number.and_then(|number| self.pin_by_number(number)) {
            return Ok((Identity::of(known.node.ino), Some(known)));
        }
        if found.layer == UPPER {
            let identity = self.identity_by_origin(dir, name, found)?;
            let own = || Identity::of(self.numbers.of(device, inode));
            return Ok((identity.unwrap_or_else(own), None));
        }
        let number = self.numbers.of(device, inode);
        let asked = Some(self.table.deaths(number));
        let part = dir.part(found.layer).ok_or(Errno::STALE)?;
        let indexed = self.find_indexed(part, name, &found.stat)?;
        let on_disk = indexed.is_some();
        Ok((Identity { on_disk, indexed, asked, ..Identity::of(number) }, None))
    }

    /// Returns node and attributes of what was found under (parent, name), whose names are locked.
    /// The node is counted once more, for the caller.
    pub(super) fn enter(
        &self,
        parent: &Arc<Node>,
        name: &[u8],
        found: Found,
    ) -> Result<(Arc<Node>, Attr)> {
        let dir = lock::directory(parent)?;
        if self.index().is_none() || !found.parts.is_empty() || found.stat.stx_nlink < 2 {
            let identity = self.identity(dir, name, &found)?;
            return self.enter_as(parent, name, found, identity)?.ok_or(Errno::STALE.into());
        }
        loop {
            let (identity, known) = self.identity_in_index(dir, name, &found)?;
            // One that was made, changed and forgotten since the index was asked knew better.
            let entered = self.enter_as(parent, name, found.clone(), identity)?;
            drop(known);
            if let Some(entered) = entered {
                return Ok(entered);
            }
        }
    }

    /// Does what [`Union::enter`] does for an object of which it is known what it is; `None` if what
    /// the index said of it may no longer be true.
    pub(super) fn enter_as(
        &self,
        parent: &Arc<Node>,
        name: &[u8],
        found: Found,
        identity: Identity,
    ) -> Result<Option<(Arc<Node>, Attr)>> {
        let Identity { number: mut ino, on_disk, mut indexed, unprotected, mut asked } = identity;
        let mut object = found.object();
        let several = found.is_alias();
        let Found { mut stat, mut layer, mut parts } = found;
        let lower_links = stat.stx_nlink;
        if let Some(indexed) = &indexed {
            // A lower name of it, or an upper one.
            stat = indexed.stat;
            layer = UPPER;
            object = (stat::device(&stat), stat.stx_ino);
        }
        let kind = FileType::of_mode(u32::from(stat.stx_mode));
        let upper_part = parts.first().filter(|part| part.layer.index == UPPER);
        let upper_part = upper_part.map(|part| (part.device, part.inode));
        let mut tries = 0;
        let (node, new) = loop {
            let entered = self.table.get_or_insert(ino, asked.take(), |id| {
                let place = Place::new(Some(Arc::clone(parent)), name, layer, object);
                let node = Node::new(id, ino, kind, place);
                if layer != UPPER {
                    node.protection.found_lower(&stat);
                } else if unprotected {
                    node.protection.found(0);
                }
                let links = match indexed.take() {
                    Some(indexed) => Some(indexed.links()),
                    None => several.then(|| Links { count: lower_links, ..Links::default() }),
                };
                if let Some(links) = links {
                    // Empty until now, so it cannot fail.
                    drop(node.links.set(Box::new(Mutex::new(links))));
                }
                if kind != FileType::Directory {
                    return node;
                }
                let mut parts = std::mem::take(&mut parts);
                let upper = (layer == UPPER && !parts.is_empty()).then(|| parts.remove(0));
                node.with_dir(Dir::new(upper, parts))
            });
            let Some((node, new)) = entered else { return Ok(None) };
            let is_alias = several && node.links.get().is_some();
            // Two redirects may lead to one lower directory, which makes no one directory of them.
            let is_same = || match (&node.dir, upper_part) {
                (Some(_), Some(_)) => node.has_upper(upper_part),
                (Some(dir), None) if dir.upper.get().is_some() => false,
                _ => node.place.read().object == object,
            };
            if new || is_alias || is_same() {
                break (node, new);
            }
            let several_ways = node.dir.is_some() && upper_part.is_none();
            // An origin that is not true, or the same directory in the stack twice.
            self.release(&node, 1);
            if tries == TRIES || several_ways {
                return Err(Errno::STALE.into());
            }
            tries += 1;
            let (device, inode) = upper_part.unwrap_or(object);
            ino = self.numbers.another(device, inode, ino);
        };
        if new && on_disk && tries == 0 {
            self.numbers.keep(object.0, object.1, ino);
            node.place.write().found_origin = true;
        }
        if node.kind != kind {
            // A layer was changed from outside; the kernel still knows what was there before.
            self.release(&node, 1);
            return Err(Errno::STALE.into());
        }
        if several {
            self.note_alias(&node, parent, name, (layer, lower_links));
        }
        let attr = if new || node.dir.is_some() {
            self.attr_from(&node, &stat)
        } else {
            if layer == UPPER && !several {
                self.settle(&node, parent, name);
            }
            let is_vague = layer == UPPER
                && stat.stx_nlink > 1
                && self.upper.as_ref().is_some_and(|upper| !upper.work.can.link);
            if several && node.is_upper() || is_vague {
                // Another name of a lower object that was copied up under the first; or one that
                // may not show yet what was written under another.
                self.attr_of_alias(&node, &stat).inspect_err(|_| self.release(&node, 1))?
            } else {
                self.attr_from(&node, &stat)
            }
        };
        Ok(Some((node, attr)))
    }

    /// Remembers a name of a lower object with several, for its copy-up.
    fn note_alias(
        &self,
        node: &Arc<Node>,
        parent: &Arc<Node>,
        name: &[u8],
        (layer, lower): (layer::Index, u32),
    ) {
        let Some(links) = node.links.get() else { return };
        let mut links = links.lock();
        links.lower = lower;
        let known = |(at, known): &(Arc<Node>, Name)| Arc::ptr_eq(at, parent) && **known == *name;
        if !links.pending.iter().any(known) {
            self.table.retain(parent);
            links.pending.push((Arc::clone(parent), name.into()));
        }
        if self.upper.as_ref().is_none_or(|upper| upper.work.can.link) {
            return;
        }
        // Where the upper has no hard links a copy gets the name that the node has. That one went
        // while no other was known.
        let mut place = node.place.write();
        let is_there = |(at, known): &(Arc<Node>, Name)| place.is_named(at, known);
        if place.layer == UPPER || place.gone || links.pending.iter().any(is_there) {
            return;
        }
        self.table.retain(parent);
        let old = place.parent.replace(Arc::clone(parent));
        place.name = name.into();
        place.layer = layer;
        drop(place);
        drop(links);
        if let Some(old) = old {
            self.release(&old, 1);
        }
    }

    /// Takes note of a name of an upper object: its first, if the known ones went, or one more.
    pub(super) fn settle(&self, node: &Arc<Node>, parent: &Arc<Node>, name: &[u8]) {
        let mut place = node.place.write();
        if place.is_named(parent, name) && place.held().is_none() && place.layer == UPPER {
            return;
        }
        if place.held().is_none() && !place.gone && place.layer == UPPER {
            let is_known = place.other(parent, name).is_some();
            if !is_known && place.others().len() < OTHERS_MAX {
                self.table.retain(parent);
                place.others_mut().push((Arc::clone(parent), name.into()));
            }
            return;
        }
        self.table.retain(parent);
        let old = place.parent.replace(Arc::clone(parent));
        place.name = name.into();
        place.layer = UPPER;
        place.gone = false;
        place.nameless = false;
        drop(place.take_held());
        drop(place);
        if let Some(old) = old {
            self.release(&old, 1);
        }
    }
}

/// How many numbers of one object may be taken by others who say that they are theirs.
const TRIES: u32 = 16;

/// Names remembered of one upper object; with more, a handle is held when the first name goes.
const OTHERS_MAX: usize = 8;

/// Tells what an object is for the merge rule; opaque marks are left for when they matter. Of a
/// whiteout of a nested overlay `stat` is made what users see.
///
/// # Errors
/// Those of listxattr(2), asked of empty files only.
pub(super) fn fact_of(part: &layer::Dir, name: &[u8], stat: &mut Statx) -> Result<Fact> {
    let kind = FileType::of_mode(u32::from(stat.stx_mode));
    if kind == FileType::Directory {
        return Ok(Fact::Directory { closed: false });
    }
    if stat::is_whiteout(stat) {
        return Ok(Fact::Whiteout);
    }
    if kind == FileType::Regular && stat.stx_size == 0 {
        let list = part.call("listxattr", name, |at| xattr::list(Target::Name(at)))?;
        if marks::lists_any(&list, &marks::WHITEOUT_XATTRS) {
            return Ok(Fact::Whiteout);
        }
        if marks::lists_any(&list, &marks::NESTED_WHITEOUT_XATTRS) {
            stat::show_as_whiteout(stat);
        }
    }
    Ok(Fact::Leaf)
}

/// Tells whether a directory of a layer hides everything beneath it.
///
/// # Errors
/// As [`layer::Dir::xattrs`], and those of statx(2) but absence.
pub(super) fn is_closed(part: &layer::Dir) -> Result<bool> {
    Ok(part.xattrs()?.1 == marks::Opaque::Yes || has_opaque_name(part)?)
}

/// Tells whether the name lies in a directory that hides everything beneath it.
fn has_opaque_name(part: &layer::Dir) -> Result<bool> {
    part.call("statx", marks::OPAQUE_NAME, |at| stat::find(at.dir, at.name))
        .map(|stat| stat.is_some())
}
