//! The order in which locks are taken, written once.
//!
//! 1. `Union::rename`: for writing by a rename between two directories, for reading by rmdir and by
//!    a rename within one, so that "parent before child" and "in order of ids" never meet.
//! 2. `Node::copy`: of a leaf, then of one of its ancestors at a time. Held while that one object is
//!    copied up, and never waited for by a thread that holds a lock named below.
//! 3. `Dir::names`: of a parent before its child, else in order of the node ids
//!    ([`two_directories`]). Held over the calls that change or look up a name, never over file
//!    data. A lookup takes it for reading.
//! 4. `Node::links`, then `Node::data`, then `Node::place`.
//! 5. The leaves: table shards, numbers, handle cache, `layer::Dir::place`, `Ahead::walk`.
//!
//! `Ahead::reader` comes before all of them, and is tried only.
//!
//! A directory that is to move is brought to the upper with none of these held over the copying
//! (`flatten`): what others change beneath it meanwhile is never less in the upper than before, and a
//! last look, with the names of one directory locked at a time, finds what is still to be done.
//!
//! After a lock is won the state is looked at again: "another thread did it" and "it was removed"
//! are ordinary branches. No lock is held over a reply or a notification to the kernel.

use std::sync::Arc;

use parking_lot::RwLockWriteGuard;

use super::node::{Dir, Node};
use super::readdir::Names;
use crate::error::{Errno, Result};

/// Returns the directory side of a node.
///
/// # Errors
/// `ENOTDIR` for any other node.
pub(crate) fn directory(node: &Node) -> Result<&Dir> {
    node.dir.as_deref().ok_or_else(|| Errno::NOTDIR.into())
}

/// The names of two directories, which may be one and the same.
pub(crate) struct Two<'a> {
    first: RwLockWriteGuard<'a, Names>,
    second: Option<RwLockWriteGuard<'a, Names>>,
    swapped: bool,
}

impl Two<'_> {
    /// The names of the directory given first.
    pub(crate) fn from(&mut self) -> &mut Names {
        match &mut self.second {
            Some(second) if self.swapped => second,
            _ => &mut self.first,
        }
    }

    /// The names of the directory given second.
    pub(crate) fn to(&mut self) -> &mut Names {
        match &mut self.second {
            Some(second) if !self.swapped => second,
            _ => &mut self.first,
        }
    }
}

/// Locks the names of two directories for writing, in the order of their ids.
///
/// # Errors
/// `ENOTDIR` if one is no directory.
pub(crate) fn two_directories<'a>(from: &'a Arc<Node>, to: &'a Arc<Node>) -> Result<Two<'a>> {
    let (from_dir, to_dir) = (directory(from)?, directory(to)?);
    if Arc::ptr_eq(from, to) {
        return Ok(Two { first: from_dir.names.write(), second: None, swapped: false });
    }
    let swapped = to.id.0 < from.id.0;
    let (first, second) = if swapped { (to_dir, from_dir) } else { (from_dir, to_dir) };
    let first = first.names.write();
    Ok(Two { first, second: Some(second.names.write()), swapped })
}
