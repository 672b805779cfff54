//! Inode numbers: one for each object of the union, never two objects with one number.
//!
//! ```text
//!  63      56 55                                             0
//! +----------+------------------------------------------------+
//! | fs index |   inode number in that filesystem              |
//! +----------+------------------------------------------------+
//! ```
//! Filesystems are counted as layers name them, upper first; the first has index 0, so that a stack
//! on one filesystem shows the numbers that its layers have. Index 255 marks made-up numbers: for
//! objects whose own number needs more than 56 bits, that lie on a 256th filesystem, or whose number
//! another object shows. They are hashes, so that the next mount makes up the same. For programs that
//! know 32 bits only all of it is smaller: 4 bits of index, of which 15 marks what is made up, and 28.
//!
//! A file keeps its number when it is copied up: [`Numbers::keep`] remembers that an upper object
//! shows the number of the lower one it came from. Where `origin` finds it again on the disk that goes
//! with the node, else with the object.
//!
//! What is remembered is at most two entries for each object of the layers that is still there, and
//! none for most: numbers of their own are computed, and so are made-up ones of 64 bits, of which one
//! is remembered only where two met (one chance in a hundred thousand for a million of them; both
//! known to the kernel then). Of 32 bits many meet, so all that are made up are remembered.
//!
//! Locks: a leaf; nothing else is taken beneath.

use std::collections::HashMap;

use parking_lot::RwLock;

/// How many bits a number has, and how many of them tell the inode.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Width {
    bits: u32,
    shift: u32,
}

impl Width {
    /// What `ino_t` has.
    pub(crate) const FULL: Self = Self { bits: 64, shift: 56 };
    /// What it has for 32-bit programs that were built without large files.
    pub(crate) const HALF: Self = Self { bits: 32, shift: 28 };

    /// The index of made-up numbers.
    fn made_up(self) -> u64 {
        (1 << (self.bits - self.shift)) - 1
    }

    /// Makes up a number: index and inode mixed (SplitMix64).
    fn hash(self, index: usize, inode: u64) -> u64 {
        let index = u64::try_from(index).unwrap_or(u64::MAX);
        let z = inode.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        self.made_up() << self.shift | (z ^ (z >> 31)) >> (64 - self.shift)
    }

    /// Packs index and inode number; `None` where they do not fit, or would be 0 or the FUSE root's 1.
    fn pack(self, index: usize, inode: u64) -> Option<u64> {
        let index = u64::try_from(index).ok().filter(|index| *index < self.made_up())?;
        let number = index << self.shift | inode;
        (inode >> self.shift == 0 && number > 1).then_some(number)
    }
}

/// The rule that numbers objects, and what it has to remember.
#[derive(Debug)]
pub(crate) struct Numbers {
    width: Width,
    memory: RwLock<Memory>,
}

#[derive(Debug, Default)]
struct Memory {
    /// Device numbers, by filesystem index.
    devices: Vec<u64>,
    /// Numbers that do not follow from (device, inode).
    kept: HashMap<(u64, u64), u64>,
    /// Made-up numbers among them, and what shows them.
    made_up: HashMap<u64, (u64, u64)>,
}

/// Tables with room for fewer are not made smaller.
const KEPT_ROOM: usize = 1 << 10;

impl Memory {
    fn own(&self, width: Width, device: u64, inode: u64) -> Option<u64> {
        let index = self.devices.iter().position(|known| *known == device)?;
        width.pack(index, inode)
    }

    /// Returns a made-up number that need not be remembered: few of its width meet, and this one has
    /// met none.
    fn computed(&self, width: Width, device: u64, inode: u64) -> Option<u64> {
        let index = self.devices.iter().position(|known| *known == device)?;
        let number = width.hash(index, inode);
        (width == Width::FULL && !self.made_up.contains_key(&number)).then_some(number)
    }

    fn keep(&mut self, object: (u64, u64), number: u64) {
        if let Some(old) = self.kept.insert(object, number).filter(|old| *old != number) {
            self.give_up(object, old);
        }
    }

    fn drop_kept(&mut self, object: (u64, u64)) {
        let Some(number) = self.kept.remove(&object) else { return };
        self.give_up(object, number);
        if self.kept.capacity() > KEPT_ROOM && self.kept.len() < self.kept.capacity() / 8 {
            self.kept.shrink_to_fit();
            self.made_up.shrink_to_fit();
        }
    }

    /// Forgets that an object shows a made-up number.
    fn give_up(&mut self, object: (u64, u64), number: u64) {
        if self.made_up.get(&number) == Some(&object) {
            self.made_up.remove(&number);
        }
    }
}

impl Numbers {
    /// A rule for numbers of this many bits, which knows of no filesystem yet.
    pub(crate) fn new(width: Width) -> Self {
        Self { width, memory: RwLock::default() }
    }

    /// Takes note of a layer's filesystem, in the order of the stack.
    pub(crate) fn register(&self, device: u64) {
        let mut memory = self.memory.write();
        if !memory.devices.contains(&device) {
            memory.devices.push(device);
        }
    }

    /// Returns the number that object (device, inode) shows.
    pub(crate) fn of(&self, device: u64, inode: u64) -> u64 {
        let memory = self.memory.read();
        let known = memory.kept.get(&(device, inode)).copied();
        let own = known
            .or_else(|| memory.own(self.width, device, inode))
            .or_else(|| memory.computed(self.width, device, inode));
        drop(memory);
        own.unwrap_or_else(|| self.make_up(device, inode, None))
    }

    /// Returns the number that was kept for object (device, inode), if one was.
    pub(crate) fn kept(&self, device: u64, inode: u64) -> Option<u64> {
        self.memory.read().kept.get(&(device, inode)).copied()
    }

    /// Tells whether `number` is the object's own, not that of where it was copied up from.
    pub(crate) fn is_own(&self, device: u64, inode: u64, number: u64) -> bool {
        self.memory.read().own(self.width, device, inode) == Some(number)
    }

    /// Makes the upper object (device, inode) show `number` from now on.
    pub(crate) fn keep(&self, device: u64, inode: u64, number: u64) {
        self.memory.write().keep((device, inode), number);
    }

    /// Forgets object (device, inode): it is gone and its inode number free to be used again, or what
    /// it shows can be found on the disk.
    pub(crate) fn drop_kept(&self, device: u64, inode: u64) {
        let object = (device, inode);
        // Most often there is nothing.
        if self.memory.read().kept.contains_key(&object) {
            self.memory.write().drop_kept(object);
        }
    }

    /// Returns another number for object (device, inode), because a different object shows `taken`,
    /// which it should have: layers that were copied or made by hand may say so. It may have taken
    /// one that was made up, too.
    pub(crate) fn another(&self, device: u64, inode: u64, taken: u64) -> u64 {
        self.make_up(device, inode, Some(taken))
    }

    fn make_up(&self, device: u64, inode: u64, taken: Option<u64>) -> u64 {
        let mut memory = self.memory.write();
        let index = memory.devices.iter().position(|known| *known == device).unwrap_or_else(|| {
            memory.devices.push(device);
            memory.devices.len() - 1
        });
        if taken.is_none() {
            let known = memory.kept.get(&(device, inode)).copied();
            let own = known.or_else(|| self.width.pack(index, inode));
            if let Some(number) = own.or_else(|| memory.computed(self.width, device, inode)) {
                return number;
            }
        }
        let mut number = self.width.hash(index, inode);
        let is_other = |shows: &(u64, u64)| *shows != (device, inode);
        while taken == Some(number) || memory.made_up.get(&number).is_some_and(is_other) {
            number = self.width.hash(index, number);
        }
        memory.made_up.insert(number, (device, inode));
        memory.keep((device, inode), number);
        number
    }

    /// Returns how many numbers are remembered.
    #[cfg(test)]
    pub(crate) fn remembered(&self) -> usize {
        let memory = self.memory.read();
        memory.kept.len().max(memory.made_up.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_filesystem_shows_its_own_numbers() {
        let numbers = Numbers::new(Width::FULL);
        numbers.register(7);
        assert_eq!(numbers.of(7, 42), 42);
    }

    #[test]
    fn equal_inodes_of_two_filesystems_differ() {
        let numbers = Numbers::new(Width::FULL);
        numbers.register(7);
        numbers.register(8);
        assert_eq!(numbers.of(8, 42), 1 << 56 | 42);
        assert_ne!(numbers.of(9, 42), numbers.of(8, 42));
    }

    #[test]
    fn odd_numbers_are_made_up_once() {
        let numbers = Numbers::new(Width::FULL);
        numbers.register(7);
        for inode in [0, 1, 1 << 56, u64::MAX] {
            let number = numbers.of(7, inode);
            assert_eq!(number >> 56, 255);
            assert_eq!(numbers.of(7, inode), number);
        }
    }

    #[test]
    fn made_up_numbers_are_the_same_at_the_next_mount() {
        let (first, second) = (Numbers::new(Width::FULL), Numbers::new(Width::FULL));
        for (numbers, device) in [(&first, 7), (&second, 9)] {
            numbers.register(device);
        }
        assert_eq!(first.of(7, 1 << 60), second.of(9, 1 << 60));
        assert_ne!(first.of(7, 1 << 60), first.of(7, 1 << 61));
    }

    #[test]
    fn an_object_whose_number_is_taken_shows_another_one() {
        let numbers = Numbers::new(Width::FULL);
        numbers.register(7);
        let other = numbers.another(7, 42, 42);
        assert_ne!(other, 42);
        assert_eq!(numbers.of(7, 42), other);
        let third = numbers.another(7, 42, other);
        assert!(third != other && third != 42);
        assert_eq!(numbers.of(7, 42), third);
        assert!(numbers.is_own(7, 42, 42) && !numbers.is_own(7, 42, other));
    }

    #[test]
    fn a_copied_up_object_keeps_its_number() {
        let numbers = Numbers::new(Width::FULL);
        numbers.register(7);
        numbers.keep(7, 50, 42);
        assert_eq!(numbers.of(7, 50), 42);
        numbers.drop_kept(7, 50);
        assert_eq!(numbers.of(7, 50), 50);
    }

    #[test]
    fn what_is_gone_is_not_remembered() {
        for (width, for_good) in [(Width::FULL, 0), (Width::HALF, 10)] {
            let numbers = Numbers::new(width);
            numbers.register(7);
            for inode in 0..10 {
                numbers.of(7, (1 << 60) + inode);
            }
            assert_eq!(numbers.remembered(), for_good);
            for inode in 10..200_000 {
                let inode = (1 << 60) + inode;
                let number = numbers.of(7, inode);
                // An object that comes, is copied up, turns out to be another's, and goes.
                if inode % 3 == 0 {
                    numbers.keep(7, inode, 42);
                }
                if inode % 5 == 0 {
                    let other = numbers.another(7, inode, number);
                    numbers.another(7, inode, other);
                }
                numbers.drop_kept(7, inode);
            }
            assert_eq!(numbers.remembered(), for_good);
            let memory = numbers.memory.read();
            assert!(memory.kept.capacity() <= KEPT_ROOM && memory.made_up.capacity() <= KEPT_ROOM);
        }
    }

    #[test]
    fn numbers_of_32_bits_are_all_different_too() {
        let numbers = Numbers::new(Width::HALF);
        numbers.register(7);
        numbers.register(8);
        let mut seen = std::collections::HashSet::new();
        for device in [7, 8] {
            for inode in (0..2000).chain((1 << 28)..(1 << 28) + 2000).chain([u64::MAX]) {
                let number = numbers.of(device, inode);
                assert!(number >> 32 == 0 && number > 1 && seen.insert(number), "{number}");
                assert_eq!(numbers.of(device, inode), number);
            }
        }
        assert_eq!((numbers.of(7, 42), numbers.of(8, 42)), (42, 1 << 28 | 42));
    }
}
