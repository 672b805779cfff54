//! What differs between two trees of whatever origin: both are walked.

use std::collections::BTreeMap;

use super::path;
use super::same::{self, Rules};
use super::view::{Merged, Object};
use super::walk::{Above, Kind, Sink, all, tell};
use crate::error::Result;

/// The names of both sides that are still to be compared in one directory.
struct Frame {
    names: std::vec::IntoIter<(Vec<u8>, Object, Option<Object>)>,
}

/// Tells `sink` of what `upper` has otherwise than `lower`, which may be nothing at all.
///
/// `above` ends with the directory that `upper` is.
///
/// # Errors
/// Those of the system calls and of `sink`.
pub fn compare(
    lower: Option<&Merged>,
    upper: &Merged,
    rules: Rules,
    above: &mut Vec<Above>,
    sink: &mut dyn Sink,
) -> Result<()> {
    let depth = above.len();
    let mut frames = vec![enter(lower, upper, above, sink)?];
    while let Some(frame) = frames.last_mut() {
        let Some((name, object, old)) = frame.names.next() else {
            frames.pop();
            if above.len() > depth {
                above.pop();
            }
            continue;
        };
        let Some(old) = old else {
            tell(sink, above, &name, Kind::Add, Some(&object), false)?;
            all(sink, &name, &object, above)?;
            continue;
        };
        let is_same = same::objects(&object, &old, rules)?;
        let becomes_dir = matches!((&object, &old), (Object::Dir(..), Object::Leaf(_)));
        if !is_same {
            tell(sink, above, &name, Kind::Modify, Some(&object), false)?;
        }
        if becomes_dir {
            all(sink, &name, &object, above)?;
            continue;
        }
        let (Object::Dir(new_dir, _), Object::Dir(old_dir, _)) = (&object, &old) else { continue };
        let (new_dir, old_dir) = (new_dir.clone(), old_dir.clone());
        let path = path::join(above.last().map_or(&b""[..], |dir| &dir.path), &name);
        above.push(Above { path, object, is_told: !is_same });
        frames.push(enter(Some(&old_dir), &new_dir, above, sink)?);
    }
    Ok(())
}

/// Tells of the names that are gone, and returns the others.
fn enter(
    lower: Option<&Merged>,
    upper: &Merged,
    above: &mut [Above],
    sink: &mut dyn Sink,
) -> Result<Frame> {
    let mut old = match lower {
        Some(lower) => lower.list()?,
        None => BTreeMap::new(),
    };
    let new = upper.list()?;
    for name in old.keys().filter(|name| !new.contains_key(*name)) {
        tell(sink, above, name, Kind::Delete, None, false)?;
    }
    let pairs: Vec<_> = new
        .into_iter()
        .map(|(name, object)| {
            let old = old.remove(&name);
            (name, object, old)
        })
        .collect();
    Ok(Frame { names: pairs.into_iter() })
}

/// Tells `sink` of what one tree has otherwise than another.
///
/// # Errors
/// As [`compare`].
pub fn changes(
    lower: Option<&Merged>,
    upper: &Merged,
    rules: Rules,
    sink: &mut dyn Sink,
) -> Result<()> {
    let stat = Box::new(upper.top().stat()?);
    let object = Object::Dir(upper.clone(), stat);
    let mut above = vec![Above { path: Vec::new(), object, is_told: true }];
    compare(lower, upper, rules, &mut above, sink)
}
