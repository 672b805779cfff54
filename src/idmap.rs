//! Ids as the layers hold them and ids as the mount shows them. Pure.
//!
//! A container's layers hold the container's ids. Where its user namespace has others, the mount
//! shows them shifted: `uidmapping=0:100000:65536` shows id 0 of the disk as 100000. The two kinds
//! are types of their own, so that an id that was not translated does not compile.
//!
//! An id outside of every range is shown as no id at all ([`OuterId::NONE`]): the kernel prints
//! the overflow id (65534) for it and lets nobody act as its owner, as on its own idmapped mounts.

use std::fmt;

/// An id as the layers hold it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct InnerId(u32);

/// An id as the mount shows it, and as callers have it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OuterId(u32);

impl InnerId {
    /// What stands on the disk for a privileged caller who has no id there, `nobody`.
    pub const OVERFLOW: Self = Self(65534);

    /// Returns an id that a layer holds.
    pub const fn stored(id: u32) -> Self {
        Self(id)
    }

    /// Returns the number to store.
    pub const fn to_store(self) -> u32 {
        self.0
    }
}

impl OuterId {
    /// No id: what an object shows whose owner has none here.
    pub const NONE: Self = Self(u32::MAX);

    /// Returns an id that a request carries.
    pub const fn asked(id: u32) -> Self {
        Self(id)
    }

    /// Returns the number that a reply carries.
    pub const fn to_show(self) -> u32 {
        self.0
    }

    /// Tells whether it is the superuser of the namespace that the mount was made in.
    pub const fn is_root(self) -> bool {
        self.0 == 0
    }
}

/// One range: `len` ids from `inner` on are shown as those from `outer` on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Range {
    inner: u32,
    outer: u32,
    len: u32,
}

/// Which ids are shown as which, for users or for groups. Without ranges each is shown as it is.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct IdMap {
    ranges: Vec<Range>,
    /// All are shown as 0, and stored as 0.
    pub squash_to_root: bool,
    /// All are shown as this one, and stored as they are asked for.
    pub squash_to: Option<u32>,
}

/// Finds `id` in the range that begins at `start`, and returns its image in that at `image`.
fn shift(id: u32, start: u32, image: u32, len: u32) -> Option<u32> {
    let offset = id.checked_sub(start).filter(|offset| *offset < len)?;
    image.checked_add(offset)
}

impl IdMap {
    /// Parses triples `stored:shown:length`; a colon before the first is allowed, as engines put it.
    ///
    /// # Errors
    /// Why they are no map: a number is missing, is none or too large, or ranges overlap.
    pub fn parse(triples: &str) -> Result<Self, String> {
        let mut numbers = Vec::new();
        for number in triples.strip_prefix(':').unwrap_or(triples).split(':') {
            let plain = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
            match number.parse::<u32>() {
                Ok(parsed) if plain => numbers.push(parsed),
                _ => return Err(format!("\"{number}\" is no id; write STORED:SHOWN:LENGTH[:...]")),
            }
        }
        let mut ranges: Vec<Range> = Vec::new();
        for triple in numbers.chunks(3) {
            let &[inner, outer, len] = triple else {
                return Err("the numbers are no triples; write STORED:SHOWN:LENGTH[:...]".into());
            };
            if len == 0 {
                return Err(format!("{inner}:{outer}:{len} is empty; give a length of at least 1"));
            }
            // The last number of all is no id.
            if inner.checked_add(len).is_none() || outer.checked_add(len).is_none() {
                return Err(format!(
                    "{inner}:{outer}:{len} goes beyond the largest id, 4294967294"
                ));
            }
            let meet = |a: u32, b: u32, b_len: u32| a < b + b_len && b < a + len;
            let clash = ranges.iter().find(|known| {
                meet(inner, known.inner, known.len) || meet(outer, known.outer, known.len)
            });
            if let Some(Range { inner: a, outer: b, len: c }) = clash {
                return Err(format!("{inner}:{outer}:{len} overlaps {a}:{b}:{c}"));
            }
            ranges.push(Range { inner, outer, len });
        }
        Ok(Self { ranges, ..Self::default() })
    }

    /// Tells whether every id is shown as it is stored.
    pub fn is_identity(&self) -> bool {
        self.ranges.is_empty() && !self.squash_to_root && self.squash_to.is_none()
    }

    /// Takes over the ranges of another map.
    pub fn take_ranges(&mut self, from: Self) {
        self.ranges = from.ranges;
    }

    /// Tells whether there are ranges.
    pub fn has_ranges(&self) -> bool {
        !self.ranges.is_empty()
    }

    /// Returns how a stored id is shown.
    pub fn show(&self, id: InnerId) -> OuterId {
        if let Some(all) = self.squash_to {
            return OuterId(all);
        }
        if self.squash_to_root {
            return OuterId(0);
        }
        if self.ranges.is_empty() {
            return OuterId(id.0);
        }
        let shown = self.ranges.iter().find_map(|r| shift(id.0, r.inner, r.outer, r.len));
        shown.map_or(OuterId::NONE, OuterId)
    }

    /// Returns how the id of a request is stored; `None` if no stored id is shown as it.
    pub fn store(&self, id: OuterId) -> Option<InnerId> {
        if self.squash_to_root {
            return Some(InnerId(0));
        }
        if self.ranges.is_empty() {
            return Some(InnerId(id.0));
        }
        self.ranges.iter().find_map(|r| shift(id.0, r.outer, r.inner, r.len)).map(InnerId)
    }
}

impl fmt::Display for IdMap {
    /// Prints the ranges as [`IdMap::parse`] reads them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, Range { inner, outer, len }) in self.ranges.iter().enumerate() {
            let between = if at == 0 { "" } else { ":" };
            write!(f, "{between}{inner}:{outer}:{len}")?;
        }
        Ok(())
    }
}

/// Users and groups.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Ids {
    /// Of users.
    pub users: IdMap,
    /// Of groups.
    pub groups: IdMap,
}

impl Ids {
    /// Tells whether every id is shown as it is stored.
    pub fn is_identity(&self) -> bool {
        self.users.is_identity() && self.groups.is_identity()
    }

    /// Tells whether `uid` is the superuser, of the mount's namespace or of the layers'.
    pub fn is_root(&self, uid: OuterId) -> bool {
        let of_container = || self.users.has_ranges() && self.users.store(uid) == Some(InnerId(0));
        uid.is_root() || of_container()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn map(triples: &str) -> IdMap {
        IdMap::parse(triples).unwrap()
    }

    #[test]
    fn ranges_are_read_with_and_without_the_leading_colon() {
        for triples in ["0:100000:65536", ":0:100000:65536"] {
            let map = map(triples);
            for (inner, outer) in [(0, 100_000), (1, 100_001), (65535, 165_535)] {
                assert_eq!(map.show(InnerId(inner)), OuterId(outer), "{triples} {inner}");
                assert_eq!(map.store(OuterId(outer)), Some(InnerId(inner)), "{triples} {outer}");
            }
            assert_eq!(map.show(InnerId(65536)), OuterId::NONE);
            assert_eq!(map.store(OuterId(99_999)), None);
            assert_eq!(map.store(OuterId(165_536)), None);
            assert_eq!(map.store(OuterId::NONE), None);
        }
    }

    #[test]
    fn several_ranges_as_keep_id_has_them() {
        let map = map(":0:1:1500:1500:0:1:1501:1501:64036");
        for (inner, outer) in [(0, 1), (1499, 1500), (1500, 0), (1501, 1501), (65536, 65536)] {
            assert_eq!(map.show(InnerId(inner)), OuterId(outer), "{inner}");
            assert_eq!(map.store(OuterId(outer)), Some(InnerId(inner)), "{outer}");
        }
        assert_eq!(map.show(InnerId(65537)), OuterId::NONE);
    }

    #[test]
    fn what_is_no_map_is_refused() {
        for (triples, why) in [
            ("", "is no id"),
            (":", "is no id"),
            ("::0:1:1", "is no id"),
            ("0:1:1:", "is no id"),
            ("0:1", "no triples"),
            ("0:1:1:2", "no triples"),
            ("0:-1:1", "is no id"),
            ("0:+1:1", "is no id"),
            ("a:1:1", "is no id"),
            ("4294967296:0:1", "is no id"),
            ("0:1:0", "is empty"),
            ("4294967295:0:1", "goes beyond"),
            ("0:4294967290:6", "goes beyond"),
            ("0:100:10:9:200:1", "overlaps"),
            ("0:100:10:20:109:5", "overlaps"),
            ("5:0:1:0:10:10", "overlaps"),
        ] {
            let message = IdMap::parse(triples).unwrap_err();
            assert!(message.contains(why), "{triples}: {message}");
        }
        assert!(IdMap::parse("0:4294967290:5").is_ok());
        assert!(IdMap::parse("0:100:10:10:110:10").is_ok());
    }

    #[test]
    fn squashing() {
        let root = IdMap { squash_to_root: true, ..IdMap::default() };
        assert_eq!(root.show(InnerId(7)), OuterId(0));
        assert_eq!(root.store(OuterId(7)), Some(InnerId(0)));
        let one = IdMap { squash_to: Some(1000), ..IdMap::default() };
        assert_eq!(one.show(InnerId(7)), OuterId(1000));
        assert_eq!(one.store(OuterId(7)), Some(InnerId(7)));
        assert!(!root.is_identity() && !one.is_identity() && IdMap::default().is_identity());
    }

    #[test]
    fn the_superuser_of_the_layers_is_one() {
        let ids = Ids { users: map("0:100000:65536"), groups: IdMap::default() };
        assert!(ids.is_root(OuterId(0)) && ids.is_root(OuterId(100_000)));
        assert!(!ids.is_root(OuterId(100_001)));
        let squashed = IdMap { squash_to_root: true, ..IdMap::default() };
        let ids = Ids { users: squashed, groups: IdMap::default() };
        assert!(!ids.is_root(OuterId(1)));
    }

    proptest! {
        #[test]
        fn both_directions_agree(
            ranges in proptest::collection::vec((0..50_u32, 0..50_u32, 0..20_u32), 1..5),
            id in 0..80_u32,
        ) {
            let triples: Vec<_> = ranges.iter().map(|(a, b, c)| format!("{a}:{b}:{c}")).collect();
            if let Ok(map) = IdMap::parse(&triples.join(":")) {
                prop_assert_eq!(map.to_string(), triples.join(":"));
                let shown = map.show(InnerId(id));
                if shown != OuterId::NONE {
                    prop_assert_eq!(map.store(shown), Some(InnerId(id)));
                }
                if let Some(stored) = map.store(OuterId(id)) {
                    prop_assert_eq!(map.show(stored), OuterId(id));
                }
            }
        }

        #[test]
        fn nothing_panics(triples in "[0-9:]{0,40}", id in any::<u32>()) {
            if let Ok(map) = IdMap::parse(&triples) {
                map.show(InnerId(id));
                map.store(OuterId(id));
            }
        }
    }
}
