//! What one layer changes, from the layer itself: cost follows the layer, not what lies beneath.
//!
//! The layers beneath are asked only where the layer cannot tell: whether what a whiteout or an
//! opaque mark hides is there, and whether a directory merges with one. Under a redirect, where the
//! layer lacks what the directory shows, the merged tree is walked instead.
//!
//! Each change goes to a [`Sink`], directories before what they hold, marks and whiteouts before
//! other names, names in the order of their bytes.

use std::collections::VecDeque;
use std::sync::Arc;

use super::path;
use super::same::{self, Rules};
use super::target::is_directory;
use super::view::{self, Leaf, Merged, Object, Stack};
use crate::error::Result;
use crate::layer::Dir;
use crate::marks;

/// What happened to a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It was not there beneath.
    Add,
    /// It was, and is otherwise now.
    Modify,
    /// It is no more.
    Delete,
}

/// One change.
#[derive(Debug)]
pub struct Change<'a> {
    /// Clean path; never the root's.
    pub path: &'a [u8],
    /// What happened.
    pub kind: Kind,
    /// What is there now; `None` if nothing.
    pub object: Option<&'a Object>,
    /// The directory hides all that it has beneath.
    pub is_opaque: bool,
    /// Directory of `path` and those above it, the root's first: what the sink heard of them.
    pub above: &'a mut [Above],
}

/// A directory on the way to a change.
#[derive(Debug)]
pub struct Above {
    /// Clean path.
    pub path: Vec<u8>,
    /// The directory now.
    pub object: Object,
    /// It was given to the sink, or the sink said so itself.
    pub is_told: bool,
}

/// Who is told of changes.
pub trait Sink {
    /// Takes one.
    ///
    /// # Errors
    /// Whatever stops the walk.
    fn change(&mut self, change: Change<'_>) -> Result<()>;

    /// Tells whether the difference between [`Kind::Add`] and [`Kind::Modify`] of what is no
    /// directory matters; finding it out costs a lookup.
    fn wants_kinds(&self) -> bool;
}

/// Whose idea of a change it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Differ {
    /// containers/storage's.
    Containers,
    /// BuildKit's overlay differ.
    BuildKit,
    /// All that the layer has counts, also directories that are as beneath.
    Everything,
}

/// A directory of the layer that is being walked.
struct Frame {
    dir: Arc<Dir>,
    /// What the layers beneath show in its place, even if it hides that.
    below: Option<Merged>,
    /// What they have there is hidden.
    is_hidden: bool,
    names: VecDeque<Vec<u8>>,
}

/// Tells `sink` of all that the topmost layer of `stack` changes.
///
/// # Errors
/// Those of the system calls and of `sink`; `EIO` for a metacopy without data.
pub fn changes(stack: &Stack, differ: Differ, sink: &mut dyn Sink) -> Result<()> {
    let Some(top) = stack.top() else { return Ok(()) };
    let root = Merged::with_top(top, stack.beneath().as_ref(), stack);
    let stat = Box::new(top.stat()?);
    let mut above =
        vec![Above { path: Vec::new(), object: Object::Dir(root, stat), is_told: true }];
    let is_hidden = view::dir_marks(top)?.opaque;
    let mut walk = Walk { stack, differ, sink };
    let below = stack.beneath();
    let mut frames = vec![walk.enter(Arc::clone(top), below, is_hidden, &mut above)?];
    while let Some(frame) = frames.last_mut() {
        let Some(name) = frame.names.pop_front() else {
            frames.pop();
            above.pop();
            continue;
        };
        if let Some(next) = walk.name(frame, &name, &mut above)? {
            frames.push(next);
        }
    }
    Ok(())
}

struct Walk<'a> {
    stack: &'a Stack,
    differ: Differ,
    sink: &'a mut dyn Sink,
}

impl Walk<'_> {
    /// Lists a directory, tells of what it hides, and returns the names still to look at.
    fn enter(
        &mut self,
        dir: Arc<Dir>,
        below: Option<Merged>,
        is_hidden: bool,
        above: &mut [Above],
    ) -> Result<Frame> {
        let mut names = Vec::new();
        let mut hidden = Vec::new();
        dir.list(|name, _, _| {
            match marks::whiteout_target(name) {
                Some(target) => hidden.push(target.to_vec()),
                None if marks::is_reserved_name(name) => {}
                None => names.push(name.to_vec()),
            }
            Ok(())
        })?;
        let mut objects = VecDeque::new();
        names.sort_unstable();
        for name in names {
            // Only devices and empty files can be whiteouts; both are looked at once more as objects.
            let Some(stat) = dir.find(&name)? else { continue };
            if view::is_whiteout(&dir, &name, &stat)? {
                hidden.push(name);
            } else {
                objects.push_back(name);
            }
        }
        // A file of that name may lie beside its own whiteout, and hides as much by itself.
        hidden.retain(|name| objects.binary_search(name).is_err());
        hidden.sort_unstable();
        hidden.dedup();
        if let Some(below) = below.as_ref().filter(|_| !is_hidden) {
            for name in hidden {
                if below.lookup(&name)?.is_some() {
                    self.tell(above, &name, Kind::Delete, None, false)?;
                }
            }
        }
        Ok(Frame { dir, below, is_hidden, names: objects })
    }

    fn name(
        &mut self,
        frame: &Frame,
        name: &[u8],
        above: &mut Vec<Above>,
    ) -> Result<Option<Frame>> {
        // Gone meanwhile: a live layer.
        let Some(stat) = frame.dir.find(name)? else { return Ok(None) };
        let lookup = |frame: &Frame| match &frame.below {
            Some(below) => below.lookup(name),
            None => Ok(None),
        };
        if !is_directory(&stat) {
            let mut kind = Kind::Add;
            if self.sink.wants_kinds() && lookup(frame)?.is_some() {
                kind = Kind::Modify;
            }
            let object = Object::Leaf(Leaf::new(&frame.dir, name, stat, frame.below.clone()));
            self.tell(above, name, kind, Some(&object), false)?;
            return Ok(None);
        }
        let found = lookup(frame)?;
        let dir = frame.dir.child(name, &stat);
        let marks = view::dir_marks(&dir)?;
        let is_closed = marks.opaque || has_whiteout_beside(&frame.dir, name)?;
        let lower = match &found {
            Some(Object::Dir(lower, _)) => Some(lower.clone()),
            Some(Object::Leaf(_)) | None => None,
        };
        let hides = is_closed && lower.is_some() && !frame.is_hidden;
        if marks.redirect.is_some() && !is_closed {
            return self.redirected(frame, name, lower.is_some(), above);
        }
        let object =
            Object::Dir(Merged::with_top(&dir, lower.as_ref(), self.stack), Box::new(stat));
        if hides && self.differ == Differ::BuildKit {
            return self.compared(name, &object, found.as_ref(), above);
        }
        let is_same = match &found {
            Some(below) if !hides => self.is_same(&object, below)?,
            _ => false,
        };
        let kind = match &found {
            None => Kind::Add,
            Some(_) if hides => Kind::Delete,
            Some(_) => Kind::Modify,
        };
        if !is_same {
            self.tell(above, name, kind, Some(&object), hides)?;
        }
        let is_told = !is_same;
        let path = path::join(above.last().map_or(&b""[..], |dir| &dir.path), name);
        above.push(Above { path, object, is_told });
        self.enter(dir, lower, frame.is_hidden || is_closed, above).map(Some)
    }

    /// Tells of a directory whose lower part lies elsewhere: all that it shows is new here.
    fn redirected(
        &mut self,
        frame: &Frame,
        name: &[u8],
        hides: bool,
        above: &mut Vec<Above>,
    ) -> Result<Option<Frame>> {
        let merged = Merged::with_top(&frame.dir, frame.below.as_ref(), self.stack);
        if let Some(object) = merged.lookup(name)? {
            let kind = if hides { Kind::Delete } else { Kind::Add };
            self.tell(above, name, kind, Some(&object), hides && !frame.is_hidden)?;
            all(self.sink, name, &object, above)?;
        }
        Ok(None)
    }

    /// Tells of an opaque directory as BuildKit does: compared with what it hides.
    fn compared(
        &mut self,
        name: &[u8],
        object: &Object,
        found: Option<&Object>,
        above: &mut Vec<Above>,
    ) -> Result<Option<Frame>> {
        let Some(lower) = found else { return Ok(None) };
        let is_told = !self.is_same(object, lower)?;
        if is_told {
            self.tell(above, name, Kind::Modify, Some(object), false)?;
        }
        let Object::Dir(upper, stat) = object else { return Ok(None) };
        // Nothing beneath shows through.
        let upper = Merged::with_top(upper.top(), None, self.stack);
        let path = path::join(above.last().map_or(&b""[..], |dir| &dir.path), name);
        above.push(Above { path, object: Object::Dir(upper.clone(), stat.clone()), is_told });
        if let Object::Dir(lower, _) = lower {
            super::naive::compare(Some(lower), &upper, Rules::BuildKit, above, self.sink)?;
        }
        above.pop();
        Ok(None)
    }

    fn is_same(&self, upper: &Object, lower: &Object) -> Result<bool> {
        match self.differ {
            Differ::Containers => Ok(same::directories(upper.stat(), lower.stat())),
            Differ::BuildKit => same::objects(upper, lower, Rules::BuildKit),
            Differ::Everything => Ok(false),
        }
    }

    fn tell(
        &mut self,
        above: &mut [Above],
        name: &[u8],
        kind: Kind,
        object: Option<&Object>,
        is_opaque: bool,
    ) -> Result<()> {
        tell(self.sink, above, name, kind, object, is_opaque)
    }
}

/// Tells a sink of one change in the directory that `above` ends with.
pub(super) fn tell(
    sink: &mut dyn Sink,
    above: &mut [Above],
    name: &[u8],
    kind: Kind,
    object: Option<&Object>,
    is_opaque: bool,
) -> Result<()> {
    let path = path::join(above.last().map_or(&b""[..], |dir| &dir.path), name);
    sink.change(Change { path: &path, kind, object, is_opaque, above })
}

/// Tells of everything beneath a new directory `name` in the directory that `above` ends with.
pub(super) fn all(
    sink: &mut dyn Sink,
    name: &[u8],
    object: &Object,
    above: &mut Vec<Above>,
) -> Result<()> {
    let Object::Dir(merged, _) = object else { return Ok(()) };
    let path = path::join(above.last().map_or(&b""[..], |dir| &dir.path), name);
    let depth = above.len();
    above.push(Above { path, object: object.clone(), is_told: true });
    let mut todo = vec![merged.list()?.into_iter()];
    while let Some(names) = todo.last_mut() {
        let Some((name, object)) = names.next() else {
            todo.pop();
            above.truncate(depth + todo.len());
            continue;
        };
        tell(sink, above, &name, Kind::Add, Some(&object), false)?;
        if let Object::Dir(merged, _) = &object {
            todo.push(merged.list()?.into_iter());
            let path = path::join(above.last().map_or(&b""[..], |dir| &dir.path), &name);
            above.push(Above { path, object, is_told: true });
        }
    }
    above.truncate(depth);
    Ok(())
}

fn has_whiteout_beside(dir: &Arc<Dir>, name: &[u8]) -> Result<bool> {
    match marks::whiteout_name(name) {
        Some(stored) => Ok(dir.find(&stored)?.is_some()),
        None => Ok(false),
    }
}
