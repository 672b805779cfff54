//! What a name shows, given what each layer holds: the merge rule, pure.
//!
//! Lookup, listing, removal, rename and the diff of layers all ask [`Merge`]; no other place reasons about whiteouts.
//! Facts are given from the topmost layer down, only of layers in which the parent directory
//! takes part.
//!
//! # Source
//! overlayfs.rst, "Directories" and "whiteouts and opaque directories"; `.wh.` files as
//! fuse-overlayfs and OCI layers have them.

/// What one layer holds under a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fact {
    /// Nothing.
    Absent,
    /// A whiteout in any of its forms, and no object.
    Whiteout,
    /// An object that is no directory.
    Leaf,
    /// A directory; `closed` if it is opaque or a `.wh.` file of its name lies beside it, so that
    /// nothing beneath may merge with it.
    Directory {
        /// Hides all lower parts.
        closed: bool,
    },
}

/// Whether layers further down can still matter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// Ask the next layer.
    Deeper,
    /// The answer is complete.
    Done,
}

/// The answer as far as the layers asked so far tell it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) enum Merge {
    /// Nothing found, nothing hidden.
    #[default]
    Open,
    /// Hidden by a whiteout: the name does not exist.
    Hidden,
    /// The object in this layer, no directory.
    Leaf(u16),
    /// A directory made of these layers' parts, topmost first.
    Directory(Vec<u16>),
}

impl Merge {
    /// Takes in what `layer` holds.
    pub(crate) fn push(&mut self, layer: u16, fact: Fact) -> Next {
        match (&mut *self, fact) {
            (Self::Hidden | Self::Leaf(_), _) => return Next::Done,
            (_, Fact::Absent) => return Next::Deeper,
            (Self::Open, Fact::Whiteout) => *self = Self::Hidden,
            (Self::Open, Fact::Leaf) => *self = Self::Leaf(layer),
            (Self::Open, Fact::Directory { closed }) => {
                *self = Self::Directory(vec![layer]);
                if !closed {
                    return Next::Deeper;
                }
            }
            // A directory above hides what is no directory, and merges with nothing below that.
            (Self::Directory(_), Fact::Whiteout | Fact::Leaf) => {}
            (Self::Directory(parts), Fact::Directory { closed }) => {
                parts.push(layer);
                if !closed {
                    return Next::Deeper;
                }
            }
        }
        Next::Done
    }

    /// Tells whether the name exists.
    pub(crate) fn exists(&self) -> bool {
        matches!(self, Self::Leaf(_) | Self::Directory(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIR: Fact = Fact::Directory { closed: false };
    const OPAQUE: Fact = Fact::Directory { closed: true };

    fn merged(facts: &[Fact]) -> Merge {
        let mut merge = Merge::default();
        for (layer, fact) in (0..).zip(facts) {
            if merge.push(layer, *fact) == Next::Done {
                break;
            }
        }
        merge
    }

    #[test]
    fn table() {
        use Fact::{Absent, Leaf, Whiteout};
        let cases: &[(&[Fact], Merge)] = &[
            (&[], Merge::Open),
            (&[Absent, Absent], Merge::Open),
            (&[Whiteout, Leaf], Merge::Hidden),
            (&[Absent, Whiteout, DIR], Merge::Hidden),
            (&[Leaf, DIR], Merge::Leaf(0)),
            (&[Absent, Leaf, DIR], Merge::Leaf(1)),
            (&[DIR, DIR], Merge::Directory(vec![0, 1])),
            (&[DIR, Absent, DIR], Merge::Directory(vec![0, 2])),
            (&[DIR, Whiteout, DIR], Merge::Directory(vec![0])),
            (&[DIR, Leaf, DIR], Merge::Directory(vec![0])),
            (&[OPAQUE, DIR], Merge::Directory(vec![0])),
            (&[DIR, OPAQUE, DIR], Merge::Directory(vec![0, 1])),
            (&[Absent, OPAQUE, DIR], Merge::Directory(vec![1])),
        ];
        for (facts, expected) in cases {
            assert_eq!(&merged(facts), expected, "{facts:?}");
        }
    }

    #[test]
    fn what_lies_beneath_the_end_never_matters() {
        let all = [Fact::Absent, Fact::Whiteout, Fact::Leaf, DIR, OPAQUE];
        for a in all {
            for b in all {
                let mut merge = Merge::default();
                if merge.push(0, a) == Next::Deeper && merge.push(1, b) == Next::Deeper {
                    continue;
                }
                for below in all {
                    assert_eq!(merged(&[a, b, below]), merge, "{a:?} {b:?} {below:?}");
                }
            }
        }
    }
}
