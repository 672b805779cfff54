//! The merged names of one directory, kept small: a directory may have a million.
//!
//! Each visible name has a number, which never changes while the listing lives and is never used
//! again; entries lie in the order of their numbers. Names lie one after the other in one buffer,
//! and a table of positions finds them.
//!
//! Locks: none; a listing belongs to `Dir::names`.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::LazyLock;

use hashbrown::HashTable;

use super::attr::FileType;
use crate::layer::{self, UPPER};

/// All names that the parts of a directory hold, visible or hidden.
#[derive(Debug, Default)]
pub(crate) struct Listing {
    /// In the order of their numbers; what was removed stays until it is half of them.
    items: Vec<Item>,
    /// The names.
    text: Vec<u8>,
    /// Positions in `items` by name, but for what was removed.
    found: HashTable<u32>,
    /// By number, see [`Child::parts`]; most listings have none.
    parts: BTreeMap<u64, Box<[layer::Index]>>,
    /// Device numbers of the objects.
    devices: Vec<u64>,
    next: u64,
    visible: usize,
    /// Unchanged since it was read: reading it again would number all names alike.
    pub(super) fresh: bool,
}

/// One for all: a listing of its own for each of many small directories is large enough.
static HASHER: LazyLock<RandomState> = LazyLock::new(RandomState::new);

/// A name; it was removed if it is neither visible nor anything else.
#[derive(Debug, Clone, Copy)]
struct Item {
    number: u64,
    inode: u64,
    at: usize,
    len: u16,
    device: u16,
    top: layer::Index,
    kind: FileType,
    state: u8,
}

/// Bits of [`Item::state`].
const VISIBLE: u8 = 1;
/// The upper part holds a whiteout under this very name, not as a `.wh.` file.
const WHITEOUT: u8 = 2;
/// The lower parts alone would show the name.
const BELOW: u8 = 4;

/// What a listing without names is counted for.
const OWN_WEIGHT: usize = 4;

/// Removed entries that are never worth a cleaning.
const REMOVED_MIN: usize = 32;

/// A visible name.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Child<'a> {
    pub(crate) name: &'a [u8],
    pub(crate) kind: FileType,
    /// The topmost layer that has it.
    pub(crate) top: layer::Index,
    /// Device and inode number of the object there.
    pub(crate) object: (u64, u64),
    /// For a directory in several layers: all that may take part, opaque marks not yet asked.
    pub(crate) parts: &'a [layer::Index],
}

impl Listing {
    pub(crate) fn find(&self, name: &[u8]) -> Option<Child<'_>> {
        self.item(name).filter(|item| item.state & VISIBLE != 0).map(|item| self.child(item))
    }

    /// The visible names.
    pub(crate) fn children(&self) -> impl Iterator<Item = Child<'_>> {
        self.children_from(0).map(|(_, child)| child)
    }

    /// The visible names from a number on, with their numbers.
    pub(crate) fn children_from(&self, number: u64) -> impl Iterator<Item = (u64, Child<'_>)> {
        let start = self.items.partition_point(|item| item.number < number);
        let items = self.items.get(start..).unwrap_or_default().iter();
        items.filter(|item| item.state & VISIBLE != 0).map(|item| (item.number, self.child(item)))
    }

    /// Tells whether removing the upper object would show a lower one.
    pub(crate) fn is_below(&self, name: &[u8]) -> bool {
        self.item(name).is_some_and(|item| item.state & BELOW != 0)
    }

    /// Tells whether a whiteout stands under the name in the upper part.
    pub(crate) fn has_whiteout(&self, name: &[u8]) -> bool {
        self.item(name).is_some_and(|item| item.state & WHITEOUT != 0)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.visible == 0
    }

    /// How much is remembered: names, visible or hidden, and a few for the listing itself.
    pub(crate) fn weight(&self) -> usize {
        self.found.len() + OWN_WEIGHT
    }

    /// Makes a name visible, in place of whatever it was.
    pub(crate) fn insert(&mut self, child: Child<'_>) {
        self.fresh = false;
        self.place(child);
        self.clean();
    }

    /// Takes in what the parts hold under a name, which may show nothing; `whiteout` and `below` are
    /// what [`Listing::has_whiteout`] and [`Listing::is_below`] tell of it.
    pub(super) fn read(
        &mut self,
        name: &[u8],
        child: Option<Child<'_>>,
        whiteout: bool,
        below: bool,
    ) {
        let state = if whiteout { WHITEOUT } else { 0 } | if below { BELOW } else { 0 };
        let position = match child {
            Some(child) => self.place(child),
            None if state == 0 => return,
            None => self.position(name).unwrap_or_else(|| {
                let at = self.store(name);
                self.push(name, at, 0)
            }),
        };
        if let Some(item) = self.items.get_mut(position) {
            item.state |= state;
        }
    }

    /// Makes a name visible, and returns its position.
    fn place(&mut self, child: Child<'_>) -> usize {
        let device = self.device(child.object.0);
        let known = self.position(child.name);
        let (mut at, mut state) = (None, 0);
        if let Some(position) = known
            && let Some(item) = self.items.get(position)
        {
            if item.state & VISIBLE != 0 {
                self.show(position, child, device);
                return position;
            }
            // It gets a new number, and with it a new place.
            (at, state) = (Some(item.at), item.state & BELOW);
            self.unlink(position);
        }
        let at = at.unwrap_or_else(|| self.store(child.name));
        let position = self.push(child.name, at, state);
        self.visible += 1;
        self.show(position, child, device);
        position
    }

    fn show(&mut self, position: usize, child: Child<'_>, device: u16) {
        let Some(item) = self.items.get_mut(position) else { return };
        item.state = VISIBLE | item.state & BELOW;
        (item.kind, item.top) = (child.kind, child.top);
        (item.device, item.inode) = (device, child.object.1);
        if !child.parts.is_empty() {
            self.parts.insert(item.number, child.parts.into());
        } else {
            self.parts.remove(&item.number);
        }
    }

    /// Hides a name; `whiteout` tells whether the upper part holds a whiteout now.
    pub(crate) fn remove(&mut self, name: &[u8], whiteout: bool) {
        self.fresh = false;
        let Some(position) = self.position(name) else { return };
        let Some(item) = self.items.get_mut(position) else { return };
        let was_visible = item.state & VISIBLE != 0;
        item.state = item.state & BELOW | if whiteout { WHITEOUT } else { 0 };
        let (number, is_gone) = (item.number, item.state == 0);
        if was_visible {
            self.visible -= 1;
            self.parts.remove(&number);
        }
        if is_gone {
            self.unlink(position);
            self.clean();
        }
    }

    /// Takes note that the object under a name is in the upper layer now, as object (device, inode).
    pub(crate) fn copied_up(&mut self, name: &[u8], object: (u64, u64)) {
        self.fresh = false;
        let device = self.device(object.0);
        let Some(position) = self.position(name) else { return };
        let Some(item) = self.items.get_mut(position) else { return };
        if item.state & VISIBLE == 0 {
            return;
        }
        let top = item.top;
        (item.top, item.device, item.inode) = (UPPER, device, object.1);
        if item.kind == FileType::Directory {
            let number = item.number;
            let lowers = self.parts.remove(&number).unwrap_or_else(|| Box::new([top]));
            self.parts.insert(number, std::iter::once(UPPER).chain(lowers).collect());
        }
    }

    /// Takes note that the upper part alone makes the directory from now on; returns the names of
    /// the whiteouts in it.
    pub(crate) fn seal(&mut self) -> Vec<Box<[u8]>> {
        let mut whiteouts = Vec::new();
        for position in 0..self.items.len() {
            let Some(item) = self.items.get_mut(position) else { break };
            let before = item.state;
            item.state &= VISIBLE;
            let is_removed = before != 0 && item.state == 0;
            if before & WHITEOUT != 0 {
                let item = *item;
                whiteouts.push(self.name(&item).into());
            }
            if is_removed {
                self.unlink(position);
            }
        }
        self.parts.clear();
        self.clean();
        whiteouts
    }

    /// Gives up what was reserved for more names.
    pub(super) fn shrink(&mut self) {
        self.items.shrink_to_fit();
        self.text.shrink_to_fit();
        let Self { items, text, found, .. } = self;
        found.shrink_to_fit(|position| hash_at(items, text, *position));
    }

    fn child(&self, item: &Item) -> Child<'_> {
        let device = self.devices.get(usize::from(item.device)).copied().unwrap_or_default();
        let parts = self.parts.get(&item.number);
        Child {
            name: self.name(item),
            kind: item.kind,
            top: item.top,
            object: (device, item.inode),
            parts: parts.map(|parts| &**parts).unwrap_or_default(),
        }
    }

    fn name(&self, item: &Item) -> &[u8] {
        name_of(&self.text, item)
    }

    fn item(&self, name: &[u8]) -> Option<&Item> {
        self.items.get(self.position(name)?)
    }

    fn position(&self, name: &[u8]) -> Option<usize> {
        let is_it = |position: &u32| {
            let item = self.items.get(usize::try_from(*position).unwrap_or(usize::MAX));
            item.is_some_and(|item| self.name(item) == name)
        };
        let found = self.found.find(HASHER.hash_one(name), is_it)?;
        usize::try_from(*found).ok()
    }

    /// Takes the name at a position out of the table; the entry counts as removed.
    fn unlink(&mut self, position: usize) {
        let Some(item) = self.items.get_mut(position) else { return };
        item.state = 0;
        let hash = HASHER.hash_one(name_of(&self.text, item));
        let is_it = |known: &u32| usize::try_from(*known).is_ok_and(|known| known == position);
        if let Ok(entry) = self.found.find_entry(hash, is_it) {
            entry.remove();
        }
    }

    /// Appends an entry whose name is stored and not in the table, and returns its position.
    fn push(&mut self, name: &[u8], at: usize, state: u8) -> usize {
        let number = self.next;
        self.next += 1;
        let last = self.items.len();
        // Neither number is ever reached: so many names fit into no memory, so long ones into none.
        let position = u32::try_from(last).unwrap_or(u32::MAX);
        let len = u16::try_from(name.len()).unwrap_or(u16::MAX);
        let kind = FileType::Regular;
        self.items.push(Item { number, inode: 0, at, len, device: 0, top: UPPER, kind, state });
        let Self { items, text, found, .. } = self;
        let hash = HASHER.hash_one(name);
        found.insert_unique(hash, position, |known| hash_at(items, text, *known));
        last
    }

    fn store(&mut self, name: &[u8]) -> usize {
        self.text.extend_from_slice(name);
        self.text.len() - name.len()
    }

    fn device(&mut self, device: u64) -> u16 {
        let known = self.devices.iter().position(|known| *known == device).unwrap_or_else(|| {
            self.devices.push(device);
            self.devices.len() - 1
        });
        // As many filesystems as there are layers, at most.
        u16::try_from(known).unwrap_or(u16::MAX)
    }

    /// Gives up what was removed, once it is the greater part.
    fn clean(&mut self) {
        let removed = self.items.len() - self.found.len();
        if removed < REMOVED_MIN || removed < self.found.len() {
            return;
        }
        let text = std::mem::take(&mut self.text);
        self.items.retain(|item| item.state != 0);
        for item in &mut self.items {
            let at = self.text.len();
            self.text.extend_from_slice(name_of(&text, item));
            item.at = at;
        }
        self.found.clear();
        let Self { items, text, found, .. } = self;
        for (item, position) in items.iter().zip(0u32..) {
            let hash = HASHER.hash_one(name_of(text, item));
            found.insert_unique(hash, position, |known| hash_at(items, text, *known));
        }
        self.shrink();
    }
}

fn name_of<'a>(text: &'a [u8], item: &Item) -> &'a [u8] {
    text.get(item.at..item.at + usize::from(item.len)).unwrap_or_default()
}

fn hash_at(items: &[Item], text: &[u8], position: u32) -> u64 {
    let item = items.get(usize::try_from(position).unwrap_or(usize::MAX));
    HASHER.hash_one(item.map(|item| name_of(text, item)).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &[u8], inode: u64) -> Child<'_> {
        Child { name, kind: FileType::Regular, top: UPPER, object: (7, inode), parts: &[] }
    }

    fn all(listing: &Listing) -> Vec<(u64, Vec<u8>)> {
        listing.children_from(0).map(|(number, child)| (number, child.name.to_vec())).collect()
    }

    #[test]
    fn numbers_are_never_used_twice() {
        let mut listing = Listing::default();
        for name in [b"a", b"b", b"c"] {
            listing.insert(file(name, 1));
        }
        listing.remove(b"b", false);
        listing.insert(file(b"b", 2));
        listing.insert(file(b"a", 3));
        let expected = [(0, b"a".to_vec()), (2, b"c".to_vec()), (3, b"b".to_vec())];
        assert_eq!(all(&listing), expected);
        assert_eq!(listing.find(b"a").unwrap().object, (7, 3));
        assert_eq!(listing.children_from(1).count(), 2);
    }

    #[test]
    fn hidden_names_stay_known() {
        let mut listing = Listing::default();
        listing.read(b"below", None, false, true);
        listing.read(b"gone", None, true, true);
        listing.read(b"nothing", None, false, false);
        assert!(listing.is_empty() && listing.found.len() == 2);
        listing.insert(file(b"gone", 1));
        assert!(listing.is_below(b"gone") && !listing.has_whiteout(b"gone"));
        listing.remove(b"gone", true);
        assert!(listing.has_whiteout(b"gone") && listing.find(b"gone").is_none());
        listing.remove(b"below", false);
        assert!(listing.is_below(b"below"));
        let whiteouts: Vec<_> = listing.seal();
        assert_eq!(whiteouts, [Box::from(*b"gone")]);
        assert_eq!(listing.weight(), OWN_WEIGHT);
    }

    #[test]
    fn a_copied_directory_has_one_part_more() {
        let mut listing = Listing::default();
        listing.insert(Child { kind: FileType::Directory, top: 3, ..file(b"d", 1) });
        listing.copied_up(b"d", (8, 2));
        let child = listing.find(b"d").unwrap();
        assert_eq!((child.top, child.object, child.parts), (UPPER, (8, 2), &[UPPER, 3][..]));
    }

    // Names that come and go take no more room than those that stay.
    #[test]
    fn removed_names_are_given_up() {
        let mut listing = Listing::default();
        listing.insert(file(b"stays", 1));
        for n in 0..10_000 {
            let name = format!("name {n}").into_bytes();
            listing.insert(file(&name, n));
            assert_eq!(listing.find(&name).unwrap().object.1, n);
            listing.remove(&name, false);
        }
        assert!(listing.items.len() < 100 && listing.text.len() < 1000);
        assert_eq!(all(&listing), [(0, b"stays".to_vec())]);
        listing.insert(file(b"last", 2));
        assert_eq!(all(&listing).last().unwrap().0, 10_001);
    }
}
