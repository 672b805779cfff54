//! Redirects: a directory that was renamed in one step goes on in lower layers under the name that
//! its mark tells. Reading and following them, and writing them when asked to.
//!
//! A redirect is followed as the merge rule goes: from the layer with the mark down, one layer after
//! the other, each name looked up in a directory of the layer, so that no symlink is followed and
//! nothing outside of a layer reached. What one layer says of a directory on the way (a whiteout, an
//! opaque mark, a redirect of its own) counts for the layers beneath it.
//!
//! Locks: none of its own.
//!
//! # Source
//! overlayfs.rst, "redirect_dir" and "Directories"; the order of checks is the kernel's.

use std::sync::Arc;

use rustix::fs::XattrFlags;

use super::lookup::{Found, fact_of, is_closed};
use super::node::{Dir, Node};
use super::resolve::{Fact, Merge, Next};
use super::{Union, Upper, lock};
use crate::error::{Errno, Error, Result};
use crate::layer;
use crate::marks::{self, Redirect};
use crate::sys::xattr::{self, Target};

/// Whose redirects are followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Follow {
    /// None: what has one is refused.
    Nobody,
    /// Those in `trusted.overlay.`, which only root of the machine can have written.
    Trusted,
    /// All.
    Anybody,
}

impl Union {
    /// Returns where the lower parts of directory `name` go on, if not under that name.
    ///
    /// # Errors
    /// `EPERM` for a redirect that is not to be followed; `Corrupt` for one that leads nowhere;
    /// those of getxattr(2).
    pub(super) fn redirect_of(&self, part: &layer::Dir, name: &[u8]) -> Result<Option<Redirect>> {
        let list = part.call("listxattr", name, |at| xattr::list(Target::Name(at)))?;
        self.listed_redirect(part, name, &list)
    }

    /// [`Union::redirect_of`] where the names of the xattrs are known.
    pub(super) fn listed_redirect(
        &self,
        part: &layer::Dir,
        name: &[u8],
        list: &[u8],
    ) -> Result<Option<Redirect>> {
        if !marks::lists_any(list, &marks::REDIRECT_XATTRS) {
            return Ok(None);
        }
        for xattr in self.followed(&marks::REDIRECT_XATTRS) {
            let value = part.call("getxattr", name, |at| xattr::get(Target::Name(at), xattr))?;
            let Some(value) = value else { continue };
            return match Redirect::parse(&value) {
                Some(redirect) => Ok(Some(redirect)),
                None => Err(Error::Corrupt {
                    what: "its overlay.redirect names no place in a layer".into(),
                    at: part.describe(name),
                }),
            };
        }
        tracing::warn!(
            "{}: its redirect is not followed; mount with redirect_dir=follow if the layer is \
             trusted",
            part.describe(name)
        );
        Err(Errno::PERM.into())
    }

    /// Returns those of two xattrs, `trusted.` and `user.`, that count.
    pub(super) fn followed<'a>(&self, names: &'a [&'a [u8]; 2]) -> &'a [&'a [u8]] {
        match self.follow {
            Follow::Nobody => &[],
            Follow::Trusted => names.get(..1).unwrap_or_default(),
            Follow::Anybody => names,
        }
    }

    /// Adds the parts of a directory that a redirect leads to; the last part found so far has it.
    /// `dir` is the directory that the name was found in.
    pub(super) fn follow(&self, dir: &Dir, found: &mut Found, redirect: Redirect) -> Result<()> {
        let Some(last) = found.parts.last() else { return Ok(()) };
        let mut merge = Merge::Directory(vec![last.layer.index]);
        let mut route = redirect;
        for root in self.roots_below(last.layer.index) {
            let layer = root.layer.index;
            let Some(start) = route.start(dir, root) else { continue };
            let Walk { end, stop, turns } = self.walk(start, route.names())?;
            let next = merge.push(layer, end.as_ref().map_or(Fact::Absent, |end| end.fact));
            found.parts.extend(end.and_then(|end| end.part));
            if stop || next == Next::Done {
                break;
            }
            for (left, turn) in turns {
                route = turned(&route, left, turn);
            }
        }
        Ok(())
    }

    /// The tops of the lower layers beneath one, topmost first.
    pub(super) fn roots_below(&self, layer: layer::Index) -> &[Arc<layer::Dir>] {
        self.roots.get(usize::from(layer)..).unwrap_or_default()
    }

    /// Looks a path up in one layer.
    pub(super) fn walk(&self, start: &Arc<layer::Dir>, path: &[Box<[u8]>]) -> Result<Walk> {
        let mut walk = Walk { end: None, stop: false, turns: Vec::new() };
        let mut dir = Arc::clone(start);
        for (at, name) in path.iter().enumerate() {
            let is_last = at + 1 == path.len();
            let Some((fact, part)) = self.step(&dir, name)? else { return Ok(walk) };
            let Some(part) = part else {
                // On the way it hides all that lies beneath it in other layers; what it means at the
                // end is the caller's to say.
                walk.stop |= !is_last;
                walk.end = is_last.then(|| End { fact, dir, name: name.clone(), part: None });
                return Ok(walk);
            };
            if fact == (Fact::Directory { closed: true }) {
                walk.stop = true;
            } else if let Some(redirect) = self.redirect_of(&dir, name)? {
                walk.turns.push((path.len() - at, redirect));
            }
            if is_last {
                walk.end = Some(End { fact, dir, name: name.clone(), part: Some(part) });
                return Ok(walk);
            }
            dir = part;
        }
        Ok(walk)
    }

    /// Looks one name up in one directory of a layer; `None` if it does not exist there.
    fn step(
        &self,
        dir: &Arc<layer::Dir>,
        name: &[u8],
    ) -> Result<Option<(Fact, Option<Arc<layer::Dir>>)>> {
        if name.len() > marks::NAME_MAX || marks::is_reserved_name(name) {
            return Ok(None);
        }
        let marked = match marks::whiteout_name(name) {
            Some(mark) => dir.find(&mark)?.is_some(),
            None => false,
        };
        let Some(mut stat) = dir.find(name)? else {
            return Ok(marked.then_some((Fact::Whiteout, None)));
        };
        Ok(Some(match fact_of(dir, name, &mut stat)? {
            Fact::Directory { .. } => {
                let part = dir.child(name, &stat);
                let closed = marked || is_closed(&part)?;
                (Fact::Directory { closed }, Some(part))
            }
            fact @ (Fact::Absent | Fact::Whiteout | Fact::Leaf) => (fact, None),
        }))
    }

    /// Makes a directory that is about to be renamed find its lower parts under any name. Changes
    /// nothing of what is shown.
    ///
    /// # Errors
    /// `EXDEV` if the path would be longer than [`marks::REDIRECT_MAX`]; those of setxattr(2).
    pub(super) fn set_redirect(&self, upper: &Upper, node: &Arc<Node>, apart: bool) -> Result<()> {
        let dir = lock::directory(node)?;
        let part = dir.upper.get().ok_or(Errno::STALE)?;
        let redirect = match self.own_redirect(part)? {
            Some(Redirect::Path(_)) => return Ok(()),
            Some(Redirect::Sibling(_)) if !apart => return Ok(()),
            None if !apart => Redirect::Sibling((*node.place.read().name).into()),
            _ => self.lower_path(node)?,
        };
        let value = redirect.print();
        if value.len() > marks::REDIRECT_MAX {
            return Err(Errno::XDEV.into());
        }
        part.with("setxattr", |dir| {
            xattr::set(
                Target::Handle(dir),
                upper.work.namespace.of(&marks::REDIRECT_XATTRS),
                &value,
                XattrFlags::empty(),
            )
        })
    }

    /// Removes the redirect of an opaque directory, which means nothing but deters other readers.
    pub(super) fn drop_redirect(&self, upper: &Upper, part: &layer::Dir) {
        let xattr = upper.work.namespace.of(&marks::REDIRECT_XATTRS);
        let removed =
            part.with("removexattr", |dir| match xattr::remove(Target::Handle(dir), xattr) {
                Err(Errno::NODATA) => Ok(()),
                removed => removed,
            });
        if let Err(error) = removed {
            tracing::debug!("a needless redirect stays: {error}");
        }
    }

    /// The redirect of an upper directory, by its handle.
    fn own_redirect(&self, part: &layer::Dir) -> Result<Option<Redirect>> {
        let value = part.with("getxattr", |dir| {
            for xattr in self.followed(&marks::REDIRECT_XATTRS) {
                if let Some(value) = xattr::get(Target::Handle(dir), xattr)? {
                    return Ok(Some(value));
                }
            }
            Ok(None)
        })?;
        Ok(value.and_then(|value| Redirect::parse(&value)))
    }

    /// Returns where the lower layers alone would show a directory that has parts in them.
    fn lower_path(&self, node: &Arc<Node>) -> Result<Redirect> {
        let mut names = Vec::new();
        let mut node = Arc::clone(node);
        loop {
            let (parent, name) = {
                let place = node.place.read();
                (place.parent.clone(), place.name.clone())
            };
            let Some(parent) = parent else { break };
            let own = match lock::directory(&node)?.upper.get() {
                Some(part) => self.own_redirect(part)?,
                None => None,
            };
            match own {
                Some(Redirect::Path(path)) => {
                    names.extend(path.into_iter().rev());
                    break;
                }
                Some(Redirect::Sibling(sibling)) => names.push(sibling),
                None => names.push((*name).into()),
            }
            node = parent;
        }
        names.reverse();
        Ok(Redirect::Path(names))
    }
}

impl Redirect {
    /// Where its names are looked up from in the layer of `root`; `dir` is where it was found.
    pub(super) fn start<'a>(
        &self,
        dir: &'a Dir,
        root: &'a Arc<layer::Dir>,
    ) -> Option<&'a Arc<layer::Dir>> {
        match self {
            Self::Sibling(_) => dir.part(root.layer.index),
            Self::Path(_) => Some(root),
        }
    }

    pub(super) fn names(&self) -> &[Box<[u8]>] {
        match self {
            Self::Sibling(name) => std::slice::from_ref(name),
            Self::Path(path) => path,
        }
    }
}

/// What lies at the end of a path.
pub(super) struct End {
    pub(super) fact: Fact,
    /// The directory of the layer that it lies in, and its name there.
    pub(super) dir: Arc<layer::Dir>,
    pub(super) name: Box<[u8]>,
    /// Itself, if it is a directory.
    part: Option<Arc<layer::Dir>>,
}

/// What a layer says of a path.
pub(super) struct Walk {
    pub(super) end: Option<End>,
    /// Layers further down do not matter.
    pub(super) stop: bool,
    /// The names that go on elsewhere in the layers further down: how many names are left of the
    /// path from there on, and where.
    pub(super) turns: Vec<(usize, Redirect)>,
}

/// Returns the way to go on after a name of a route, the first of the last `left`, was found to be
/// redirected.
pub(super) fn turned(route: &Redirect, left: usize, turn: Redirect) -> Redirect {
    let Redirect::Path(path) = route else { return turn };
    let at = path.len().saturating_sub(left);
    let rest = path.get(at + 1..).unwrap_or_default().iter().cloned();
    let before = match turn {
        Redirect::Path(before) => before,
        Redirect::Sibling(name) => {
            let mut before = path.get(..at).unwrap_or_default().to_vec();
            before.push(name);
            before
        }
    };
    Redirect::Path(before.into_iter().chain(rest).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_route_turns_where_a_name_on_it_is_redirected() {
        let parse = |text: &str| Redirect::parse(text.as_bytes()).unwrap();
        for (route, left, turn, expected) in [
            ("a", 1, "b", "b"),
            ("a", 1, "/x/y", "/x/y"),
            ("/a/b/c", 3, "z", "/z/b/c"),
            ("/a/b/c", 2, "z", "/a/z/c"),
            ("/a/b/c", 1, "z", "/a/b/z"),
            ("/a/b/c", 3, "/x/y", "/x/y/b/c"),
            ("/a/b/c", 2, "/x", "/x/c"),
            ("/a/b/c", 1, "/x", "/x"),
        ] {
            assert_eq!(turned(&parse(route), left, parse(turn)), parse(expected), "{route} {turn}");
        }
    }
}
