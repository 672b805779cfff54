//! Whether a layer that was put elsewhere shows what it did: entry by entry, both ways.
//!
//! What the layers beneath show is taken to be the same already: the layers of a store are compared
//! from the lowest up.

use std::collections::HashMap;

use super::read::show;
use super::same::{self, Rules};
use super::view::{Merged, Object, Stack};
use super::walk::{self, Change, Differ, Sink, all};
use crate::error::{Error, Result};
use crate::layer::Index;

/// Compares what two stacks show where either's topmost layer says anything; `is_tree` says that
/// the second is one complete tree. Data is read once, from the first.
///
/// # Errors
/// `EIO` that names an entry that differs; those of the system calls.
pub fn verify(source: &Stack, target: &Stack, is_tree: bool) -> Result<()> {
    let (Some(source_root), Some(target_root)) = (source.root(), target.root()) else {
        return Ok(());
    };
    let object = |dir: &Merged| Ok::<_, Error>(Object::Dir(dir.clone(), dir.top().stat()?.into()));
    let (root, other) = (object(&source_root)?, object(&target_root)?);
    if !same::objects(&root, &other, Rules::Attributes)? {
        return Err(differs(b"/"));
    }
    let mut compare = Compare { other: target_root, rules: Rules::Exact, links: HashMap::new() };
    walk::changes(source, Differ::Everything, &mut compare)?;
    let mut compare =
        Compare { other: source_root, rules: Rules::Attributes, links: HashMap::new() };
    if is_tree {
        all(&mut compare, b"", &other, &mut Vec::new())
    } else {
        walk::changes(target, Differ::Everything, &mut compare)
    }
}

struct Compare {
    other: Merged,
    rules: Rules,
    /// The file on the other side that each file with several names is.
    links: HashMap<(Index, u64), u64>,
}

impl Sink for Compare {
    fn change(&mut self, change: Change<'_>) -> Result<()> {
        let found = self.other.walk(change.path)?;
        match (change.object, &found) {
            (None, None) => Ok(()),
            (Some(object), Some(found)) if same::objects(object, found, self.rules)? => {
                let (Object::Leaf(leaf), Object::Leaf(other)) = (object, found) else {
                    return Ok(());
                };
                let key = (leaf.dir.layer.index, leaf.stat.stx_ino);
                let is_one = leaf.stat.stx_nlink < 2
                    || *self.links.entry(key).or_insert(other.stat.stx_ino) == other.stat.stx_ino;
                if is_one { Ok(()) } else { Err(differs(change.path)) }
            }
            _ => Err(differs(change.path)),
        }
    }

    fn wants_kinds(&self) -> bool {
        false
    }
}

fn differs(path: &[u8]) -> Error {
    Error::Corrupt {
        what: "differs between the two stores; remove the layer of the new one and try again"
            .into(),
        at: show(path).into(),
    }
}
