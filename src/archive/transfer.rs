//! Where the content of a layer is read from when it is put elsewhere, and whether it shows there what
//! it did: entry by entry, both ways.

use std::collections::HashMap;

use super::naive;
use super::read::show;
use super::same::{self, Rules};
use super::view::{Merged, Object, Stack};
use super::walk::{self, Change, Differ, Sink};
use crate::error::{Error, Result};
use crate::layer::Index;

/// A layer, over what lies beneath it.
#[derive(Debug)]
pub enum Source {
    /// The topmost of these says what it changes.
    Layer(Stack),
    /// What the first shows and the second does not.
    Tree(Stack, Stack),
}

impl Source {
    /// Returns all that it shows, with what lies beneath; `None` without any layer.
    pub fn root(&self) -> Option<Merged> {
        let (Self::Layer(stack) | Self::Tree(stack, _)) = self;
        stack.root()
    }

    /// Tells `sink` of all that the layer holds.
    ///
    /// # Errors
    /// Those of the system calls and of `sink`; `EIO` for a metacopy without data.
    pub fn tell(&self, sink: &mut dyn Sink) -> Result<()> {
        match self {
            Self::Layer(stack) => walk::changes(stack, Differ::Everything, sink),
            Self::Tree(stack, beneath) => match stack.root() {
                Some(root) => naive::changes(beneath.root().as_ref(), &root, Rules::Exact, sink),
                None => Ok(()),
            },
        }
    }
}

/// Compares what two layers show, wherever either says anything. What lies beneath them is taken to
/// be the same already: the layers of a store are compared from the lowest up. `shown` names them in
/// messages.
///
/// # Errors
/// `EIO` that names an entry that differs; those of the system calls.
pub fn verify(one: &Source, other: &Source, shown: &str) -> Result<()> {
    let (Some(one_root), Some(other_root)) = (one.root(), other.root()) else { return Ok(()) };
    let object = |dir: &Merged| Ok::<_, Error>(Object::Dir(dir.clone(), dir.top().stat()?.into()));
    if !same::objects(&object(&one_root)?, &object(&other_root)?, Rules::Attributes)? {
        return Err(differs(shown, b""));
    }
    let compare = |other, rules| Compare { shown, other, rules, links: HashMap::new() };
    one.tell(&mut compare(other_root, Rules::Exact))?;
    // Data was read once already.
    other.tell(&mut compare(one_root, Rules::Attributes))
}

struct Compare<'a> {
    shown: &'a str,
    other: Merged,
    rules: Rules,
    /// The file on the other side that each file with several names is.
    links: HashMap<(Index, u64), u64>,
}

impl Sink for Compare<'_> {
    fn change(&mut self, change: Change<'_>) -> Result<()> {
        let found = self.other.walk(change.path)?;
        match (change.object, &found) {
            (None, None) => Ok(()),
            (Some(object), Some(found)) if same::objects(object, found, self.rules)? => {
                let (Object::Leaf(leaf), Object::Leaf(other)) = (object, found) else {
                    return Ok(());
                };
                if leaf.stat.stx_nlink < 2 {
                    return Ok(());
                }
                let key = (leaf.dir.layer.index, leaf.stat.stx_ino);
                let first = self.links.entry(key).or_insert(other.stat.stx_ino);
                if *first == other.stat.stx_ino {
                    Ok(())
                } else {
                    Err(differs(self.shown, change.path))
                }
            }
            _ => Err(differs(self.shown, change.path)),
        }
    }

    fn wants_kinds(&self) -> bool {
        false
    }
}

fn differs(shown: &str, path: &[u8]) -> Error {
    Error::Corrupt {
        what: "differs in the two stores; if nobody uses them, remove the layer from the new one \
               and try again"
            .into(),
        at: format!("{shown}: /{}", show(path)).into(),
    }
}
