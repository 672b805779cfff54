//! Nodes: the objects that the kernel knows by id, and the table that finds them.
//!
//! A node lives while somebody needs it: the kernel (LOOKUP minus FORGET), a node beneath it, or
//! the mount itself. Files are (parent, name, layer), with a handle only while in use; directories
//! have one part for each layer that holds them.
//!
//! Locks: table shards are leaves; `Node::place` and `Node::links` may be taken with a directory's
//! names locked (see [`super::lock`]).

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use hashbrown::HashTable;
use once_cell::race::OnceBox;
use parking_lot::{Mutex, RwLock};
use smallvec::SmallVec;

use super::attr::{FileType, Time};
use super::file::Data;
use super::protect::Protection;
use super::readdir::Names;
use crate::layer::{self, UPPER};

/// Names a node towards the kernel; never used twice within a mount.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct NodeId(pub u64);

impl NodeId {
    /// The root of the merged tree.
    pub const ROOT: Self = Self(1);
}

/// An object of the union.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) id: NodeId,
    /// `st_ino`; holds for the life of the node.
    pub(crate) ino: u64,
    pub(crate) kind: FileType,
    /// Kernel lookups, plus nodes whose parent this is, plus pins. Guarded by the table shard.
    count: AtomicU64,
    /// The kernel's share of `count`, so that what it gives back too often is nobody else's.
    lookups: AtomicU64,
    pub(crate) place: RwLock<Place>,
    /// Held while the object is copied up: by whoever copies, waited for by whoever needs it.
    pub(crate) copy: Mutex<()>,
    pub(crate) data: Mutex<Option<Arc<Data>>>,
    /// Opens that the transport has not released; the data handle stays while there are any.
    pub(crate) opened: AtomicU32,
    /// What need not be asked again.
    pub(crate) known: Known,
    /// Whether it is append-only or immutable.
    pub(crate) protection: Protection,
    pub(crate) dir: Option<Box<Dir>>,
    /// Set for an object that has several names in a lower layer.
    pub(crate) links: OnceBox<Mutex<Links>>,
}

/// What is known of an object, once somebody has looked. One byte: there are many nodes.
#[derive(Debug, Default)]
pub(crate) struct Known(AtomicU8);

impl Known {
    const NO_XATTRS: u8 = 1;
    const XATTRS: u8 = 2;
    const UNPRIVILEGED: u8 = 4;
    const WHOLE: u8 = 8;
    /// The rest counts changes of privileges, round and round.
    const CHANGE: u8 = 16;
    const CHANGES: u8 = 0xf0;

    /// Tells whether the object has xattrs that users may see, as far as is known. The kernel asks for
    /// `security.capability` at each first write, `ls -l` for ACLs and labels; most objects have none, which
    /// need be found out once.
    pub(crate) fn has_xattrs(&self) -> Option<bool> {
        let known = self.0.load(Ordering::Acquire);
        (known & (Self::NO_XATTRS | Self::XATTRS) != 0).then_some(known & Self::XATTRS != 0)
    }

    /// Takes note whether there are xattrs; not if somebody set one meanwhile.
    pub(crate) fn found_xattrs(&self, some: bool) {
        let found = if some { Self::XATTRS } else { Self::NO_XATTRS };
        self.change(|known| match known & (Self::NO_XATTRS | Self::XATTRS) {
            0 => known | found,
            _ => known,
        });
    }

    /// To be called before an xattr is set.
    pub(crate) fn setting_xattr(&self) {
        self.change(|known| known & !Self::NO_XATTRS | Self::XATTRS);
    }

    /// Tells that the object is known to carry neither setuid nor setgid.
    pub(crate) fn is_unprivileged(&self) -> bool {
        self.0.load(Ordering::Acquire) & Self::UNPRIVILEGED != 0
    }

    /// To be called before the mode is looked at; what it returns goes to [`Known::found_unprivileged`].
    pub(crate) fn looking(&self) -> u8 {
        self.0.load(Ordering::Acquire) & Self::CHANGES
    }

    /// Takes note that there is neither setuid nor setgid; not if mode or owner changed meanwhile.
    pub(crate) fn found_unprivileged(&self, since: u8) {
        self.change(|known| match known & Self::CHANGES == since {
            true => known | Self::UNPRIVILEGED,
            false => known,
        });
    }

    /// To be called before and after mode, owner or xattrs change: whoever looks in between may have seen what was before.
    pub(crate) fn changing_privileges(&self) {
        self.change(|known| (known & !Self::UNPRIVILEGED).wrapping_add(Self::CHANGE));
    }

    /// Tells that the object, if it is an upper file, is known to hold its own data: no metacopy.
    pub(crate) fn is_whole(&self) -> bool {
        self.0.load(Ordering::Acquire) & Self::WHOLE != 0
    }

    /// Takes note of that, or that it is not known.
    pub(crate) fn set_whole(&self, whole: bool) {
        self.change(|known| if whole { known | Self::WHOLE } else { known & !Self::WHOLE });
    }

    fn change(&self, change: impl Fn(u8) -> u8) {
        let change = |now| Some(change(now)).filter(|new| *new != now);
        // An error tells that nothing was to change.
        let (Ok(_) | Err(_)) = self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, change);
    }
}

/// A name that needs no memory of its own while it is as short as most: a tree has many.
pub(crate) type Name = SmallVec<[u8; 24]>;

/// Where the object of a node is found.
#[derive(Debug)]
pub(crate) struct Place {
    /// `None` for the root only. Counted in the parent's `count`.
    pub(crate) parent: Option<Arc<Node>>,
    pub(crate) name: Name,
    /// The layer that holds the object. For directories: of the topmost part.
    pub(crate) layer: layer::Index,
    /// Device and inode number of what the node shows; of a directory those of its topmost lower
    /// part, else of its upper one. Two objects are never one node, whatever layers say.
    pub(crate) object: (u64, u64),
    /// Its number was found by an origin on the disk, and can be found there again.
    pub(crate) found_origin: bool,
    /// No name leads to the object any more, or none has yet.
    pub(crate) gone: bool,
    /// No name has ever led to the object, and one may (`O_TMPFILE`).
    pub(crate) nameless: bool,
    /// What few objects have.
    rare: Option<Box<Rare>>,
}

#[derive(Debug, Default)]
struct Rare {
    held: Option<Arc<OwnedFd>>,
    others: Vec<(Arc<Node>, Name)>,
    modified: Option<Time>,
}

impl Place {
    /// A place with one name.
    pub(crate) fn new(
        parent: Option<Arc<Node>>,
        name: &[u8],
        layer: layer::Index,
        object: (u64, u64),
    ) -> Self {
        Self {
            parent,
            name: name.into(),
            layer,
            object,
            found_origin: false,
            gone: false,
            nameless: false,
            rare: None,
        }
    }

    /// A place in upper without a name, beneath the directory that one may be given in.
    pub(crate) fn nameless(parent: Arc<Node>, held: Arc<OwnedFd>, object: (u64, u64)) -> Self {
        let mut place = Self::new(Some(parent), b"", UPPER, object);
        place.hold(held);
        Self { gone: true, nameless: true, ..place }
    }

    /// What reaches an upper object whose name is not, or no longer, its own.
    pub(crate) fn held(&self) -> Option<&Arc<OwnedFd>> {
        self.rare.as_ref()?.held.as_ref()
    }

    pub(crate) fn hold(&mut self, handle: Arc<OwnedFd>) {
        self.rare.get_or_insert_default().held = Some(handle);
    }

    pub(crate) fn take_held(&mut self) -> Option<Arc<OwnedFd>> {
        self.rare.as_mut()?.held.take()
    }

    /// More names of an upper object, to go on with when its first goes. Parents are counted.
    pub(crate) fn others(&self) -> &[(Arc<Node>, Name)] {
        self.rare.as_ref().map_or(&[], |rare| &rare.others)
    }

    pub(crate) fn others_mut(&mut self) -> &mut Vec<(Arc<Node>, Name)> {
        &mut self.rare.get_or_insert_default().others
    }

    /// The modification time of a file whose writes the kernel collects.
    pub(crate) fn modified(&self) -> Option<Time> {
        self.rare.as_ref()?.modified
    }

    pub(crate) fn modified_mut(&mut self) -> &mut Option<Time> {
        &mut self.rare.get_or_insert_default().modified
    }

    /// Takes the name that was noted last.
    pub(crate) fn pop_other(&mut self) -> Option<(Arc<Node>, Name)> {
        self.rare.as_mut()?.others.pop()
    }

    pub(crate) fn is_named(&self, parent: &Arc<Node>, name: &[u8]) -> bool {
        self.parent.as_ref().is_some_and(|at| Arc::ptr_eq(at, parent)) && *self.name == *name
    }

    /// Position of a name among the others.
    pub(crate) fn other(&self, parent: &Arc<Node>, name: &[u8]) -> Option<usize> {
        self.others().iter().position(|(at, other)| Arc::ptr_eq(at, parent) && **other == *name)
    }
}

/// A lower object with several names stays one object within the mount.
///
/// On copy-up a link in the work directory (the *anchor*) holds the upper object; names that the
/// kernel knows are linked to it at once, others when they are looked up and then written through.
#[derive(Debug, Default)]
pub(crate) struct Links {
    /// Names in the lower layer minus those removed, plus those made.
    pub(crate) count: u32,
    /// Copied up, and reached through the anchor.
    pub(crate) anchored: bool,
    /// Names looked up whose upper directory entry is still missing. Parents are counted.
    pub(crate) pending: Vec<(Arc<Node>, Name)>,
    /// The node is kept for the life of the mount, because a lookup would not find all this.
    pub(crate) pinned: bool,
    /// With an index: the entry that is the anchor.
    pub(crate) index: Option<Box<[u8]>>,
    /// With an index: `count` minus the link count of the upper file, which is below 0 by the entry
    /// alone and above by each lower name without an upper one.
    pub(crate) unlinked: i32,
    /// Link count of the lower file; 0 until a lower name was seen.
    pub(crate) lower: u32,
}

/// What a node has if it is a directory.
#[derive(Debug)]
pub(crate) struct Dir {
    /// Guards the names: read by lookups, written by whatever changes one.
    pub(crate) names: RwLock<Names>,
    /// The upper part: there from the start, or once the directory is copied up.
    pub(crate) upper: OnceLock<Arc<layer::Dir>>,
    /// Parts of lower layers, topmost first; never changes. [`Dir::lowers`] has those that show.
    lowers: Box<[Arc<layer::Dir>]>,
    /// How many of them are parts at all: fewer once one was listed that hides the rest. Changed with the names locked
    /// for writing.
    count: AtomicUsize,
    /// The upper part is opaque and holds all that the directory shows: lower parts show no more.
    /// Set once, with the names locked for writing.
    sealed: AtomicBool,
    pub(crate) opened: AtomicU32,
    /// `system.posix_acl_default` of the directory, once asked for.
    pub(crate) default_acl: Mutex<Option<Option<Arc<[u8]>>>>,
}

impl Dir {
    pub(crate) fn new(upper: Option<Arc<layer::Dir>>, lowers: Vec<Arc<layer::Dir>>) -> Self {
        Self {
            names: RwLock::default(),
            upper: upper.map(OnceLock::from).unwrap_or_default(),
            count: AtomicUsize::new(lowers.len()),
            lowers: lowers.into(),
            sealed: AtomicBool::new(false),
            opened: AtomicU32::new(0),
            default_acl: Mutex::new(None),
        }
    }

    /// Parts of lower layers that show, topmost first; until the directory is listed there may be some that a
    /// `.wh..wh..opq` in one above them hides.
    pub(crate) fn lowers(&self) -> &[Arc<layer::Dir>] {
        if self.sealed.load(Ordering::Acquire) { &[] } else { self.all_lowers() }
    }

    fn all_lowers(&self) -> &[Arc<layer::Dir>] {
        self.lowers.get(..self.count.load(Ordering::Acquire)).unwrap_or_default()
    }

    /// Takes note that a lower part hides those beneath it.
    pub(crate) fn ends_with(&self, part: &Arc<layer::Dir>) {
        if let Some(at) = self.lowers.iter().position(|lower| Arc::ptr_eq(lower, part)) {
            self.count.fetch_min(at + 1, Ordering::AcqRel);
        }
    }

    /// Takes note that the upper part is all there is from now on.
    pub(crate) fn seal(&self) {
        self.sealed.store(true, Ordering::Release);
    }

    /// Parts from the topmost down.
    pub(crate) fn parts(&self) -> impl Iterator<Item = &Arc<layer::Dir>> {
        self.upper.get().into_iter().chain(self.lowers())
    }

    /// The part that attributes come from.
    pub(crate) fn top(&self) -> Option<&Arc<layer::Dir>> {
        self.parts().next()
    }

    /// The part in a layer; also one that shows no more, where a removed file may still lie.
    pub(crate) fn part(&self, layer: layer::Index) -> Option<&Arc<layer::Dir>> {
        if layer == UPPER {
            return self.upper.get();
        }
        let lowers = self.all_lowers();
        let found = lowers.binary_search_by_key(&layer, |part| part.layer.index).ok()?;
        lowers.get(found)
    }

    /// Made of more than one layer's part.
    pub(crate) fn is_merged(&self) -> bool {
        self.lowers().len() + usize::from(self.upper.get().is_some()) > 1
    }

    /// It was found with more than one layer's part. Unlike [`Dir::is_merged`] this does not change by being listed.
    pub(crate) fn was_merged(&self) -> bool {
        self.is_merged() || self.lowers.len() > 1 && !self.sealed.load(Ordering::Acquire)
    }
}

impl Node {
    pub(crate) fn new(id: NodeId, ino: u64, kind: FileType, place: Place) -> Self {
        Self {
            id,
            ino,
            kind,
            count: AtomicU64::new(0),
            lookups: AtomicU64::new(0),
            place: RwLock::new(place),
            copy: Mutex::new(()),
            data: Mutex::new(None),
            opened: AtomicU32::new(0),
            known: Known::default(),
            protection: Protection::default(),
            dir: None,
            links: OnceBox::new(),
        }
    }

    pub(crate) fn with_dir(mut self, dir: Dir) -> Self {
        self.dir = Some(Box::new(dir));
        self
    }

    /// Tells whether the object lies in the upper layer.
    pub(crate) fn is_upper(&self) -> bool {
        match &self.dir {
            Some(dir) => dir.upper.get().is_some(),
            None => self.place.read().layer == UPPER,
        }
    }

    /// Tells whether the node is a directory with the upper part (device, inode): that one may have
    /// just lost its lower parts.
    pub(crate) fn has_upper(&self, part: Option<(u64, u64)>) -> bool {
        let own = self.dir.as_ref().and_then(|dir| dir.upper.get());
        own.is_some_and(|own| part == Some((own.device, own.inode)))
    }

    pub(crate) fn is_opened(&self) -> bool {
        self.opened.load(Ordering::Acquire) > 0
    }

    /// Makes one count of the caller's a lookup of the kernel.
    pub(crate) fn give(&self) {
        self.lookups.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes up to `n` lookups of the kernel back, and tells how many counts that leaves to be
    /// released: fewer if it has not so many.
    pub(crate) fn take_back(&self, n: u64) -> u64 {
        let less = |has: u64| Some(has.saturating_sub(n));
        let had = self.lookups.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        had.unwrap_or_else(|had| had).min(n)
    }
}

/// Counts an open less; tells whether it was the last. A kernel that ends more than it began ends none.
pub(crate) fn end_open(opens: &AtomicU32) -> bool {
    let ended = opens.fetch_update(Ordering::AcqRel, Ordering::Acquire, |open| open.checked_sub(1));
    if ended.is_err() {
        tracing::error!("more opens are ended than were begun");
    }
    ended == Ok(1)
}

const SHARDS: usize = 64;

/// All nodes, by id and by inode number.
#[derive(Debug)]
pub(crate) struct Table {
    /// Each holds what [`shard_of`] its ids says.
    ids: [RwLock<HashTable<Arc<Node>>>; SHARDS],
    /// Guards creation and death of the nodes with these numbers.
    numbers: [Mutex<HashTable<Arc<Node>>>; SHARDS],
    /// Nodes with several names that died, by number; changed with that shard of `numbers` locked.
    deaths: [AtomicU64; SHARDS],
    root: OnceLock<Arc<Node>>,
    /// The next id.
    next: AtomicU64,
    /// Nodes that died.
    dead: AtomicU64,
    /// The most nodes that lived since memory was given back.
    high: AtomicU64,
}

/// A table with room for fewer is not made smaller, and no memory is given back for fewer nodes.
const KEPT_ROOM: usize = 64;
const KEPT_NODES: u64 = 2 << 10;

impl Default for Table {
    fn default() -> Self {
        Self {
            ids: std::array::from_fn(|_| RwLock::default()),
            numbers: std::array::from_fn(|_| Mutex::default()),
            deaths: std::array::from_fn(|_| AtomicU64::default()),
            root: OnceLock::new(),
            next: AtomicU64::new(NodeId::ROOT.0 + 1),
            dead: AtomicU64::new(0),
            high: AtomicU64::new(0),
        }
    }
}

impl Table {
    pub(crate) fn set_root(&self, root: Arc<Node>) {
        // Called once, by Union::open.
        drop(self.root.set(root));
    }

    pub(crate) fn get(&self, id: NodeId) -> Option<Arc<Node>> {
        if id == NodeId::ROOT {
            return self.root.get().cloned();
        }
        self.id_shard(id).read().find(mix(id.0), |node| node.id == id).cloned()
    }

    pub(crate) fn by_ino(&self, ino: u64) -> Option<Arc<Node>> {
        find_number(&self.number_shard(ino).lock(), ino).cloned()
    }

    /// Returns the node with this number, counted once more, if there is one.
    pub(crate) fn by_ino_counted(&self, ino: u64) -> Option<Arc<Node>> {
        let numbers = self.number_shard(ino).lock();
        let node = find_number(&numbers, ino)?;
        self.retain(node);
        Some(Arc::clone(node))
    }

    /// Returns how many nodes with several names have died that have this number, or others. What is
    /// found out afterwards of such an object is true of its next node while this stays the same.
    pub(crate) fn deaths(&self, ino: u64) -> u64 {
        #[expect(clippy::indexing_slicing, reason = "a shard number is below the length")]
        self.deaths[shard_of(ino)].load(Ordering::Acquire)
    }

    /// Returns the node with this number, made by `make` if there is none, counted once more. `None`
    /// if it would have to be made of what was found out after as many deaths as `since`, and one
    /// has died since.
    ///
    /// `make` gets the id of the new node; what it returns tells the number and type. The flag
    /// tells whether the node is new.
    pub(crate) fn get_or_insert(
        &self,
        ino: u64,
        since: Option<u64>,
        make: impl FnOnce(NodeId) -> Node,
    ) -> Option<(Arc<Node>, bool)> {
        let mut numbers = self.number_shard(ino).lock();
        if let Some(node) = find_number(&numbers, ino) {
            self.retain(node);
            return Some((Arc::clone(node), false));
        }
        if since.is_some_and(|since| since != self.deaths(ino)) {
            return None;
        }
        let id = NodeId(self.next.fetch_add(1, Ordering::Relaxed));
        let node = Arc::new(make(id));
        node.count.store(1, Ordering::Relaxed);
        self.id_shard(id).write().insert_unique(mix(id.0), Arc::clone(&node), |it| mix(it.id.0));
        numbers.insert_unique(mix(ino), Arc::clone(&node), |it| mix(it.ino));
        drop(numbers);
        if let Some(parent) = &node.place.read().parent {
            self.retain(parent);
        }
        Some((node, true))
    }

    /// Counts one more user of a node that is in the table, and stays there meanwhile: because it is
    /// counted for somebody already, or because the shard of its number is locked.
    pub(crate) fn retain(&self, node: &Arc<Node>) {
        node.count.fetch_add(1, Ordering::Relaxed);
    }

    /// Tells, once, that most nodes have died since the last time, and of enough of them that it is
    /// worth while to give their memory back.
    pub(crate) fn has_shrunk(&self) -> bool {
        let high = self.high.load(Ordering::Relaxed);
        let live = self.live();
        live < high / 2
            && high - live > KEPT_NODES
            && self.high.compare_exchange(high, live, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    fn live(&self) -> u64 {
        // In this order: what died was made before.
        let dead = self.dead.load(Ordering::Acquire);
        self.next.load(Ordering::Relaxed).saturating_sub(dead)
    }

    /// Counts `n` users less, and hands back the nodes that nobody needs any more.
    pub(crate) fn release(&self, node: &Arc<Node>, n: u64) -> Vec<Arc<Node>> {
        let mut freed = Vec::new();
        let mut next = Some((Arc::clone(node), n));
        let mut more = Vec::new();
        while let Some((node, n)) = next {
            if self.release_one(&node, n) {
                let mut place = node.place.write();
                // The parent is told once, so its name stays for messages but its count goes.
                more.extend(place.parent.take());
                if let Some(rare) = &mut place.rare {
                    more.extend(rare.others.drain(..).map(|(parent, _)| parent));
                }
                drop(place);
                if let Some(links) = node.links.get() {
                    more.extend(links.lock().pending.drain(..).map(|(parent, _)| parent));
                }
                freed.push(node);
            }
            next = more.pop().map(|parent| (parent, 1));
        }
        freed
    }

    fn release_one(&self, node: &Arc<Node>, n: u64) -> bool {
        if node.id == NodeId::ROOT {
            return false;
        }
        let mut numbers = self.number_shard(node.ino).lock();
        // One step: others count users more meanwhile.
        let count = node.count.fetch_sub(n, Ordering::Relaxed);
        debug_assert!(count >= n, "node {:?} released {n} of {count} times", node.id);
        if count > n {
            return false;
        }
        self.high.fetch_max(self.live(), Ordering::Relaxed);
        let known = numbers.find_entry(mix(node.ino), |known| Arc::ptr_eq(known, node));
        if let Ok(known) = known {
            known.remove();
        }
        if has_room(&numbers) {
            numbers.shrink_to(0, |it| mix(it.ino));
        }
        let mut ids = self.id_shard(node.id).write();
        if let Ok(known) = ids.find_entry(mix(node.id.0), |known| known.id == node.id) {
            known.remove();
        }
        if has_room(&ids) {
            ids.shrink_to(0, |it| mix(it.id.0));
        }
        self.dead.fetch_add(1, Ordering::Release);
        if node.links.get().is_some() {
            #[expect(clippy::indexing_slicing, reason = "a shard number is below the length")]
            self.deaths[shard_of(node.ino)].fetch_add(1, Ordering::Release);
        }
        true
    }

    fn number_shard(&self, ino: u64) -> &Mutex<HashTable<Arc<Node>>> {
        #[expect(clippy::indexing_slicing, reason = "a shard number is below the length")]
        &self.numbers[shard_of(ino)]
    }

    fn id_shard(&self, id: NodeId) -> &RwLock<HashTable<Arc<Node>>> {
        #[expect(clippy::indexing_slicing, reason = "a shard number is below the length")]
        &self.ids[shard_of(id.0)]
    }
}

fn find_number(numbers: &HashTable<Arc<Node>>, ino: u64) -> Option<&Arc<Node>> {
    numbers.find(mix(ino), |node| node.ino == ino)
}

/// Tells whether a table is large for what is in it.
fn has_room(table: &HashTable<Arc<Node>>) -> bool {
    table.capacity() > KEPT_ROOM && table.len() < table.capacity() / 8
}

/// Spreads numbers that lie close together.
fn shard_of(number: u64) -> usize {
    usize::try_from(number % SHARDS as u64).unwrap_or(0)
}

/// Spreads numbers, those of one shard too, over all bits of a hash (SplitMix64).
fn mix(number: u64) -> u64 {
    let z = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(id: NodeId, ino: u64, parent: Option<Arc<Node>>) -> Node {
        Node::new(id, ino, FileType::Regular, Place::new(parent, b"f", 1, (7, ino)))
    }

    #[test]
    fn a_node_takes_little_memory() {
        // With what Arc and malloc(3) add a piece of 176 bytes, name included: a tree has many.
        assert!(size_of::<Node>() <= 152, "{}", size_of::<Node>());
    }

    #[test]
    fn what_was_set_meanwhile_is_not_found_absent() {
        let known = Known::default();
        known.set_whole(true);
        known.setting_xattr();
        known.found_xattrs(false);
        assert_eq!(known.has_xattrs(), Some(true));
        known.found_unprivileged(known.looking());
        known.set_whole(false);
        assert!(known.is_unprivileged() && !known.is_whole());
    }

    #[test]
    fn a_mode_seen_before_a_change_is_not_taken_for_the_new_one() {
        let known = Known::default();
        known.set_whole(true);
        for _ in 0..40 {
            let before = known.looking();
            known.changing_privileges();
            let during = known.looking();
            known.changing_privileges();
            known.found_unprivileged(before);
            known.found_unprivileged(during);
            assert!(!known.is_unprivileged());
            known.found_unprivileged(known.looking());
            assert!(known.is_unprivileged() && known.is_whole() && known.has_xattrs().is_none());
        }
    }

    #[test]
    fn ids_are_not_used_twice() {
        let table = Table::default();
        let (first, new) = table.get_or_insert(7, None, |id| file(id, 7, None)).unwrap();
        assert!(new);
        let id = first.id;
        assert!(table.get(id).is_some());
        table.release(&first, 1);
        assert!(table.get(id).is_none());
        let (second, _) = table.get_or_insert(7, None, |id| file(id, 7, None)).unwrap();
        assert_ne!(second.id, id);
        assert!(table.get(id).is_none());
    }

    #[test]
    fn what_was_known_before_a_death_makes_no_node() {
        let table = Table::default();
        let make = |id| {
            let node = file(id, 7, None);
            drop(node.links.set(Box::default()));
            node
        };
        let since = Some(table.deaths(7));
        let (first, _) = table.get_or_insert(7, since, make).unwrap();
        // Known, whatever was found out.
        let (_, new) = table.get_or_insert(7, since, make).unwrap();
        assert!(!new);
        table.release(&first, 2);
        assert!(table.get_or_insert(7, since, make).is_none());
        assert!(table.get_or_insert(7, Some(table.deaths(7)), make).is_some());
    }

    #[test]
    fn a_parent_lives_as_long_as_its_children() {
        let table = Table::default();
        let (parent, _) = table.get_or_insert(7, None, |id| file(id, 7, None)).unwrap();
        let above = Some(Arc::clone(&parent));
        let (child, _) = table.get_or_insert(8, None, |id| file(id, 8, above)).unwrap();
        assert!(table.release(&parent, 1).is_empty());
        assert!(table.by_ino(7).is_some());
        assert_eq!(table.release(&child, 1).len(), 2);
        assert!(table.by_ino(7).is_none());
    }
}
