//! From one store to another, of whatever drivers: each layer is made anew from the lowest up, and
//! compared with the old one entry by entry.
//!
//! A layer that the new store has already is only compared, so a migration that was stopped goes on
//! where it was. The old store is only read. Takes no locks but those of making layers; a crash
//! leaves whole layers, and a temporary directory of the new store.

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::path::PathBuf;

use super::driver::{Driver, Filling};
use super::layout::LayerId;
use super::{CreateOptions, Whiteouts};
use crate::archive::flat::{self, Transfer};
use crate::archive::transfer::{self, Source};
use crate::error::{Context, Error, Result};
use crate::options::show_path;
use crate::sys;

/// One layer that is to be in the new store.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Step {
    /// The layer.
    pub id: LayerId,
    /// What it lies on.
    pub parent: Option<LayerId>,
    /// Whether another lies on it.
    pub is_parent: bool,
    /// Bytes of its files.
    pub bytes: u64,
}

/// Returns the layers of a store, each behind what it lies on.
///
/// # Errors
/// `Busy` if one is mounted; `Corrupt` for a layer that is not whole, or on itself; those of reading.
pub fn plan(from: &dyn Driver) -> Result<Vec<Step>> {
    let mut todo = Vec::new();
    for id in from.list()? {
        if from.is_mounted(&id)? {
            return Err(Error::Busy {
                what: format!("{id}: is mounted; unmount it first (lamina layer unmount {id})")
                    .into(),
            });
        }
        let parent = from.parent(&id)?;
        let mut bytes = 0;
        for content in from.parts(&id)?.own {
            sys::tree::walk(content.dir.as_fd(), &mut |_, stat| {
                bytes += stat.stx_size;
                Ok(())
            })
            .at("statx", || show_path(&content.path))?;
        }
        todo.push(Step { id, parent, is_parent: false, bytes });
    }
    let parents: BTreeSet<LayerId> = todo.iter().filter_map(|step| step.parent.clone()).collect();
    let mut done = BTreeSet::new();
    let mut sorted = Vec::new();
    while let Some(first) = todo.first() {
        let at = first.id.to_string();
        let is_next = |step: &Step| step.parent.as_ref().is_none_or(|id| done.contains(id));
        let (next, rest): (Vec<Step>, _) = todo.into_iter().partition(is_next);
        if next.is_empty() {
            return Err(Error::Corrupt {
                what: "lies on a layer that is missing, or on itself; remove it first".into(),
                at: at.into(),
            });
        }
        todo = rest;
        for step in next {
            done.insert(step.id.clone());
            sorted.push(Step { is_parent: parents.contains(&step.id), ..step });
        }
    }
    Ok(sorted)
}

/// Brings one layer into the new store, unless it is there, and compares the two. With
/// `hard_links` files are shared where that is possible: nobody may write to either store's in
/// place then. `watch` is told of the bytes of each file that is brought.
///
/// # Errors
/// Those of making the layer; `EIO` that names an entry that differs.
pub fn bring(
    from: &dyn Driver,
    to: &dyn Driver,
    step: &Step,
    hard_links: bool,
    watch: &mut dyn FnMut(u64),
) -> Result<()> {
    let old = source(from, step)?;
    if !to.exists(&step.id)? {
        // Where images are whole trees, what nothing lies on is taken for a container's.
        let new = CreateOptions {
            parent: step.parent.as_ref(),
            read_write: !step.is_parent,
            owner: None,
        };
        let mut fill = |filling: Filling| {
            let options = flat::Options {
                ignore_chown_errors: filling.ignore_chown_errors,
                whiteout_files: filling.whiteouts == Whiteouts::Files,
                hard_links,
            };
            let what = match filling.whiteouts {
                Whiteouts::None => Transfer::Tree,
                Whiteouts::Kernel | Whiteouts::Files => Transfer::Layer,
            };
            let path = PathBuf::from(step.id.as_str());
            flat::transfer(&old, filling.root, path, what, options, watch)
        };
        to.make(&step.id, new, Some(&mut fill))?;
    }
    transfer::verify(&old, &source(to, step)?, &format!("layer {}", step.id))
}

/// Opens a layer in a store. One that lies on another, but says nothing of it, is a tree; one of
/// several contents is compared with what lies beneath them.
fn source(store: &dyn Driver, step: &Step) -> Result<Source> {
    let parts = store.parts(&step.id)?;
    let is_one_layer = parts.is_one_layer();
    match &step.parent {
        Some(parent) if parts.lowers.is_empty() => {
            Ok(Source::Tree(parts.stack()?, store.parts(parent)?.stack()?))
        }
        _ if is_one_layer => Ok(Source::Layer(parts.stack()?)),
        _ => Ok(Source::Tree(parts.stack()?, store.parts(&step.id)?.beneath()?)),
    }
}
