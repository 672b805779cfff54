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
//! objects whose own number needs more than 56 bits, or that lie on a 256th filesystem.
//!
//! A file keeps its number when it is copied up: [`Numbers::keep`] remembers, for as long as the
//! mount lives, that an upper object shows the number of the lower one it came from.
//!
//! Locks: a leaf; nothing else is taken beneath.

use std::collections::HashMap;

use parking_lot::RwLock;

const SHIFT: u32 = 56;
const MADE_UP: u64 = 255;

/// The rule that numbers objects, and what it has to remember.
#[derive(Debug, Default)]
pub(crate) struct Numbers {
    memory: RwLock<Memory>,
}

#[derive(Debug, Default)]
struct Memory {
    /// Device numbers, by filesystem index.
    devices: Vec<u64>,
    /// Numbers that do not follow from (device, inode).
    kept: HashMap<(u64, u64), u64>,
    made_up: u64,
}

impl Numbers {
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
        if let Some(number) = memory.kept.get(&(device, inode)) {
            return *number;
        }
        let index = memory.devices.iter().position(|known| *known == device);
        match index.and_then(|index| pack(index, inode)) {
            Some(number) => number,
            None => {
                drop(memory);
                self.make_up(device, inode)
            }
        }
    }

    /// Makes the upper object (device, inode) show `number` from now on.
    pub(crate) fn keep(&self, device: u64, inode: u64, number: u64) {
        self.memory.write().kept.insert((device, inode), number);
    }

    /// Forgets the upper object (device, inode), whose inode number is free to be used again.
    pub(crate) fn drop_kept(&self, device: u64, inode: u64) {
        self.memory.write().kept.remove(&(device, inode));
    }

    fn make_up(&self, device: u64, inode: u64) -> u64 {
        let mut memory = self.memory.write();
        if !memory.devices.contains(&device) {
            memory.devices.push(device);
            let index = memory.devices.len() - 1;
            if let Some(number) = pack(index, inode) {
                return number;
            }
        }
        if let Some(number) = memory.kept.get(&(device, inode)) {
            return *number;
        }
        memory.made_up += 1;
        let number = MADE_UP << SHIFT | memory.made_up;
        memory.kept.insert((device, inode), number);
        number
    }
}

/// Packs index and inode number; `None` where they do not fit, or would be 0 or the FUSE root's 1.
fn pack(index: usize, inode: u64) -> Option<u64> {
    let index = u64::try_from(index).ok().filter(|index| *index < MADE_UP)?;
    let number = index << SHIFT | inode;
    (inode >> SHIFT == 0 && number > 1).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_filesystem_shows_its_own_numbers() {
        let numbers = Numbers::default();
        numbers.register(7);
        assert_eq!(numbers.of(7, 42), 42);
    }

    #[test]
    fn equal_inodes_of_two_filesystems_differ() {
        let numbers = Numbers::default();
        numbers.register(7);
        numbers.register(8);
        assert_eq!(numbers.of(8, 42), 1 << 56 | 42);
        assert_ne!(numbers.of(9, 42), numbers.of(8, 42));
    }

    #[test]
    fn odd_numbers_are_made_up_once() {
        let numbers = Numbers::default();
        numbers.register(7);
        for inode in [0, 1, 1 << 56, u64::MAX] {
            let number = numbers.of(7, inode);
            assert_eq!(number >> 56, 255);
            assert_eq!(numbers.of(7, inode), number);
        }
    }

    #[test]
    fn a_copied_up_object_keeps_its_number() {
        let numbers = Numbers::default();
        numbers.register(7);
        numbers.keep(7, 50, 42);
        assert_eq!(numbers.of(7, 50), 42);
        numbers.drop_kept(7, 50);
        assert_eq!(numbers.of(7, 50), 50);
    }
}
