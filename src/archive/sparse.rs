//! Maps of the parts of a file that have data, as three tar formats spell them. Pure.
//!
//! # Source
//! The GNU tar manual, "Storing Sparse Files".

use super::header::{Block, count};
use super::pax::decimal;

/// A part of a file that has data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where it begins in the file, in bytes.
    pub offset: u64,
    /// How long it is, in bytes.
    pub length: u64,
}

const SLOT: usize = 24;
/// Where the map begins in a header of the old GNU format, and how many parts it has room for.
const HEADER_MAP: (usize, usize) = (386, 4);
const HEADER_MORE: usize = 482;
const HEADER_SIZE: (usize, usize) = (483, 12);
/// The same in a block of nothing but parts.
const BLOCK_MAP: (usize, usize) = (0, 21);
const BLOCK_MORE: usize = 504;

/// Reads the map in a GNU header: the file's size, and whether a block with more parts follows.
///
/// # Errors
/// A sentence on a number that is none.
pub fn read_header(block: &Block, map: &mut Vec<Extent>) -> Result<(u64, bool), &'static str> {
    let (start, len) = HEADER_SIZE;
    let size = count(block.get(start..start + len).unwrap_or_default())?;
    read_slots(block, HEADER_MAP, map)?;
    Ok((size, block.get(HEADER_MORE).is_some_and(|more| *more != 0)))
}

/// Reads a block of parts that follows a GNU header; tells whether another one follows.
///
/// # Errors
/// A sentence on a number that is none.
pub fn read_block(block: &Block, map: &mut Vec<Extent>) -> Result<bool, &'static str> {
    read_slots(block, BLOCK_MAP, map)?;
    Ok(block.get(BLOCK_MORE).is_some_and(|more| *more != 0))
}

fn read_slots(
    block: &Block,
    (start, slots): (usize, usize),
    map: &mut Vec<Extent>,
) -> Result<(), &'static str> {
    for slot in 0..slots {
        let at = start + slot * SLOT;
        let (Some(offset), Some(length)) = (block.get(at..at + 12), block.get(at + 12..at + 24))
        else {
            break;
        };
        // The first slot that is not used ends the map.
        if offset.first().is_none_or(|byte| *byte == 0) {
            break;
        }
        map.push(Extent { offset: count(offset)?, length: count(length)? });
    }
    Ok(())
}

/// A map that stands before the data (format 1.0), read line by line.
#[derive(Debug, Default)]
pub struct LineReader {
    line: Vec<u8>,
    wanted: Option<u64>,
    offset: Option<u64>,
    /// The parts read so far.
    pub map: Vec<Extent>,
}

impl LineReader {
    /// Takes in one block; tells whether the map is complete. What follows it there is padding.
    ///
    /// # Errors
    /// A sentence on what is malformed.
    pub fn read_block(&mut self, block: &Block) -> Result<bool, &'static str> {
        const BROKEN: &str = "has a malformed sparse map";
        for byte in block {
            if *byte != b'\n' {
                // No number has more digits.
                if self.line.len() >= 20 {
                    return Err(BROKEN);
                }
                self.line.push(*byte);
                continue;
            }
            let number = decimal(&self.line).ok_or(BROKEN)?;
            self.line.clear();
            match (self.wanted, self.offset.take()) {
                (None, _) => self.wanted = Some(number),
                (Some(_), None) => self.offset = Some(number),
                (Some(_), Some(offset)) => self.map.push(Extent { offset, length: number }),
            }
            if self.wanted == Some(self.map.len() as u64) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Checks that the parts of a file of `size` bytes stand in order and need all of `stored` bytes.
///
/// # Errors
/// A sentence on what does not add up.
pub fn check(map: &[Extent], size: u64, stored: u64) -> Result<(), &'static str> {
    let mut end = 0;
    let mut sum = 0_u64;
    for part in map {
        if part.offset < end {
            return Err("has sparse parts that overlap");
        }
        end = part.offset.checked_add(part.length).ok_or("has a sparse part that is too large")?;
        sum = sum.saturating_add(part.length);
    }
    if end > size {
        return Err("has a sparse part beyond its end");
    }
    if sum != stored {
        return Err("has more or less data than its sparse parts need");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::header::BLOCK;
    use proptest::prelude::*;

    fn extent(offset: u64, length: u64) -> Extent {
        Extent { offset, length }
    }

    #[test]
    fn maps_must_add_up() {
        for (map, size, stored, good) in [
            (vec![], 0, 0, true),
            (vec![], 10, 0, true),
            (vec![extent(0, 5), extent(5, 5)], 10, 10, true),
            (vec![extent(0, 5), extent(10, 0)], 10, 5, true),
            (vec![extent(0, 5), extent(4, 5)], 10, 10, false),
            (vec![extent(5, 5), extent(0, 5)], 10, 10, false),
            (vec![extent(0, 11)], 10, 11, false),
            (vec![extent(0, 5)], 10, 6, false),
            (vec![extent(u64::MAX, 2)], 10, 2, false),
        ] {
            assert_eq!(check(&map, size, stored).is_ok(), good, "{map:?} {size} {stored}");
        }
    }

    fn lines(text: &str) -> Result<Option<Vec<Extent>>, &'static str> {
        let mut reader = LineReader::default();
        for chunk in text.as_bytes().chunks(BLOCK) {
            let mut block = [0; BLOCK];
            block[..chunk.len()].copy_from_slice(chunk);
            if reader.read_block(&block)? {
                return Ok(Some(reader.map));
            }
        }
        Ok(None)
    }

    #[test]
    fn maps_before_the_data() {
        assert_eq!(lines("0\n"), Ok(Some(vec![])));
        assert_eq!(lines("2\n0\n5\n50\n5\n"), Ok(Some(vec![extent(0, 5), extent(50, 5)])));
        assert!(lines("x\n").is_err());
        assert!(lines("\n").is_err());
        assert!(lines("1\n0\n").is_err(), "padding is no number");
        assert!(lines("123456789012345678901234\n").is_err());
        let long = format!("200\n{}", "1000\n0\n".repeat(200));
        assert_eq!(lines(&long).unwrap().map(|map| map.len()), Some(200));
    }

    proptest! {
        #[test]
        fn any_block_is_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), BLOCK)) {
            let mut block = [0; BLOCK];
            block.copy_from_slice(&bytes);
            let mut map = Vec::new();
            read_header(&block, &mut map).ok();
            read_block(&block, &mut map).ok();
            LineReader::default().read_block(&block).ok();
            check(&map, 1000, 1000).ok();
        }
    }
}
