//! Renaming: gather what both names show, decide all cases in [`plan`], then one renameat2(2) that
//! publishes the whole change ([`publish`]).
//!
//! Locks: `Union::rename` for writing between two directories, then `Dir::names` of both.

mod plan;
mod publish;

use std::sync::Arc;

use rustix::fs::RenameFlags;

use self::plan::{Case, LowerParts, Side, Step, plan_rename};
use self::publish::Publish;
use super::attr::FileType;
use super::copy_up::Extent;
use super::create::check_name;
use super::flatten::Pin;
use super::listing::Child;
use super::node::{Dir, Node, NodeId};
use super::protect::Change;
use super::remove::Victim;
use super::{Union, Upper, lock};
use crate::error::{Context, Errno, Error, Result};
use crate::layer::{self, UPPER};
use crate::marks;
use crate::sys;
use crate::sys::stat::device;

/// What one try of a rename came to.
enum Tried<'a> {
    Done,
    /// Objects are to be copied up first.
    CopyUp,
    /// These directories are to be brought to the upper as a whole first.
    Flatten(Vec<Pin<'a>>),
}

/// A name and the directory it is in.
struct End<'a> {
    parent: &'a Arc<Node>,
    dir: &'a Dir,
    upper: &'a Arc<layer::Dir>,
    name: &'a [u8],
}

impl Union {
    /// Renames; `NOREPLACE` and `EXCHANGE` as renameat2(2) has them.
    ///
    /// # Errors
    /// `EROFS` without an upper; `EXDEV` for a directory of whose lower parts more would have to be
    /// copied than the limit allows; `ENOENT`, `EEXIST`, `ENOTEMPTY`, `ENOTDIR`, `EISDIR`, `EINVAL`; those of
    /// the copy-up and of renameat2(2).
    pub fn rename(
        &self,
        parent: NodeId,
        name: &[u8],
        new_parent: NodeId,
        new_name: &[u8],
        flags: RenameFlags,
    ) -> Result<()> {
        let upper = self.writable()?;
        if marks::is_reserved_name(name) {
            return Err(Errno::NOENT.into());
        }
        check_name(name)?;
        check_name(new_name)?;
        let is_exchange = flags.contains(RenameFlags::EXCHANGE);
        if upper.root.layer.is_leftover(new_name) || is_exchange && !upper.work.can.exchange {
            return Err(Errno::INVAL.into());
        }
        let (from, to) = (self.node(parent)?, self.node(new_parent)?);
        self.may(&from, Change::Remove)?;
        // What the rules refuse is refused before anything is copied up. Then each turn brings the
        // objects to the upper; a name that shows another one by then needs one more.
        for _ in 0..RENAME_TRIES {
            match self.try_rename(upper, (&from, name), (&to, new_name), flags)? {
                Tried::Done => return Ok(()),
                Tried::CopyUp => {}
                Tried::Flatten(dirs) => {
                    for dir in dirs {
                        self.flatten(&dir.node)?;
                    }
                    continue;
                }
            }
            self.bring_up(&from, name, |_| true)?;
            if flags.contains(RenameFlags::EXCHANGE) {
                self.bring_up(&to, new_name, |_| true)?;
            } else if self.index().is_some() {
                match self.bring_up(&to, new_name, |node| node.links.get().is_some()) {
                    // Nothing that is replaced.
                    Err(Error::Refused(Errno::NOENT)) => {}
                    done => done?,
                }
            }
            self.copy_up(&from, Extent::All)?;
            self.copy_up(&to, Extent::All)?;
        }
        Err(Errno::BUSY.into())
    }

    /// Copies up what a name shows, if it is `wanted`; a directory only to write a redirect.
    fn bring_up(&self, parent: &Arc<Node>, name: &[u8], wanted: fn(&Node) -> bool) -> Result<()> {
        let dir = lock::directory(parent)?;
        let names = self.names(dir)?;
        let found = self.find(dir, &names, name)?.ok_or(Errno::NOENT)?;
        let (node, _) = self.enter(parent, name, found)?;
        drop(names);
        // A directory that is completed first is copied up then.
        let is_wanted = (node.dir.is_none() || self.redirects) && wanted(&node);
        let done = if is_wanted { self.copy_up(&node, Extent::All) } else { Ok(()) };
        self.release(&node, 1);
        done
    }

    /// Renames unless something must be copied up first.
    fn try_rename(
        &self,
        upper: &Upper,
        (from, name): (&Arc<Node>, &[u8]),
        (to, new_name): (&Arc<Node>, &[u8]),
        flags: RenameFlags,
    ) -> Result<Tried<'_>> {
        let apart = !Arc::ptr_eq(from, to);
        let _alone = apart.then(|| self.rename.write());
        let _among = (!apart).then(|| self.rename.read());
        let mut both = lock::two_directories(from, to)?;
        if from.place.read().gone || to.place.read().gone {
            return Err(Errno::NOENT.into());
        }
        let (from_dir, to_dir) = (lock::directory(from)?, lock::directory(to)?);
        let source = self.victim(from, from_dir, both.from(), name)?;
        let is_dir = source.node.dir.is_some();
        if is_within(to, &source.node) {
            return Err(Errno::INVAL.into());
        }
        self.may_lose(from_dir, name, &source.node)?;
        // A directory needs to know about whiteouts in its way.
        if is_dir || to_dir.is_merged() {
            self.load(to_dir, both.to())?;
        }
        let target = match self.victim(to, to_dir, both.to(), new_name) {
            Ok(victim) => Some(victim),
            Err(Error::Refused(Errno::NOENT)) => None,
            Err(error) => return Err(error),
        };
        if target.as_ref().is_some_and(|target| Arc::ptr_eq(&target.node, &source.node)) {
            // Two names of one object: rename(2) does nothing.
            return Ok(Tried::Done);
        }
        self.may(to, if target.is_some() { Change::Remove } else { Change::Add })?;
        if let Some(target) = &target {
            self.may_lose(to_dir, new_name, &target.node)?;
        }
        if target.as_ref().is_some_and(|target| is_within(from, &target.node)) {
            return Err(Errno::NOTEMPTY.into());
        }
        let hidden = both.to().listing.as_ref();
        let case = Case {
            flags,
            lower_parts: self.lower_parts(),
            source: self.side(&source)?,
            target: target.as_ref().map(|target| self.side(target)).transpose()?,
            below_source: source.below,
            below_target: hidden.is_some_and(|listing| listing.is_below(new_name)),
            whiteout: hidden.is_some_and(|listing| listing.has_whiteout(new_name)),
        };
        let plan = match plan_rename(&case)? {
            Step::Rename(plan) => plan,
            Step::Flatten { source: first, target: second } => {
                let first = first.then_some(&source);
                let second = target.as_ref().filter(|_| second);
                let dirs = first.into_iter().chain(second);
                return Ok(Tried::Flatten(dirs.map(|dir| self.pin(&dir.node)).collect()));
            }
        };
        let (Some(old), Some(new)) = (from_dir.upper.get(), to_dir.upper.get()) else {
            return Ok(Tried::CopyUp);
        };
        let exchange = flags.contains(RenameFlags::EXCHANGE);
        let old = End { parent: from, dir: from_dir, upper: old, name };
        let new = End { parent: to, dir: to_dir, upper: new, name: new_name };
        if self.must_copy_up((&old, &source), (&new, target.as_ref()), exchange)? {
            return Ok(Tried::CopyUp);
        }
        for (needed, victim) in
            [(plan.redirect_source, Some(&source)), (plan.redirect_target, target.as_ref())]
        {
            let Some(victim) = victim.filter(|_| needed) else { continue };
            match self.set_redirect(upper, &victim.node, apart) {
                // The path is too long.
                Err(Error::Refused(Errno::XDEV)) if !self.copy_limit.is_none() => {
                    return Ok(Tried::Flatten(vec![self.pin(&victim.node)]));
                }
                done => done?,
            }
        }
        if apart {
            let swapped = target.as_ref().filter(|_| exchange);
            for (victim, to) in [(Some(&source), &new), (swapped, &old)] {
                let Some(victim) = victim else { continue };
                self.pass_on_origin(upper, &victim.node, to.upper)?;
                self.pass_on_whiteout(upper, &victim.stat, to.upper)?;
            }
        }
        let kept = match &target {
            Some(target) if !exchange => self.before_replacing(upper, &new, target)?,
            _ => None,
        };
        let nested = if flags.contains(RenameFlags::WHITEOUT) {
            upper.work.set_nested(old.upper)?;
            Some(upper.work.stage_nested_whiteout()?)
        } else {
            None
        };
        Publish { union: self, upper, plan, old: &old, new: &new }.run()?;
        if case.below_target && target.is_none() && !case.whiteout {
            upper.work.uncover(new.upper, new_name);
        }

        if let Some(listing) = &mut both.from().listing {
            listing.remove(name, plan.leaves_whiteout && upper.work.can.device);
        }
        let whiteout = nested
            .map(|staged| {
                upper
                    .work
                    .publish_file(staged, old.upper, name, plan.leaves_whiteout)
                    .and_then(|file| sys::stat::of(&file).at("statx", || old.upper.describe(name)))
            })
            .transpose();
        match &target {
            Some(target) if exchange => {
                if let Some(listing) = &mut both.from().listing {
                    listing.insert(child(name, target));
                }
                self.moved(target, &old, &new);
            }
            Some(target) if target.node.dir.is_some() => target.node.place.write().gone = true,
            Some(target) => self.removed(upper, to, new_name, target, kept),
            None => {}
        }
        if let Some(listing) = &mut both.to().listing {
            listing.insert(child(new_name, &source));
        }
        self.moved(&source, &new, &old);
        // The rename is done, whatever became of the whiteout.
        if let (Some(stat), Some(listing)) = (whiteout?, &mut both.from().listing) {
            listing.insert(Child {
                name,
                kind: FileType::CharDevice,
                top: UPPER,
                object: (device(&stat), stat.stx_ino),
                parts: &[],
            });
        }
        Ok(Tried::Done)
    }

    /// Tells whether an object is to be brought to the upper first, or its data.
    fn must_copy_up(
        &self,
        (old, source): (&End<'_>, &Victim<'_>),
        (new, target): (&End<'_>, Option<&Victim<'_>>),
        exchange: bool,
    ) -> Result<bool> {
        let is_lower = |victim: &Victim<'_>| {
            victim.layer != UPPER && (victim.node.dir.is_none() || self.redirects)
        };
        let must_be_upper = |target: &Victim<'_>| {
            if exchange { is_lower(target) } else { self.needs_index(target) }
        };
        if is_lower(source) || target.is_some_and(must_be_upper) {
            return Ok(true);
        }
        let swapped = target.filter(|_| exchange);
        for (end, victim) in [(old, Some(source)), (new, swapped)] {
            // Where nothing lies beneath, nothing is lent by it.
            let Some(victim) = victim.filter(|_| end.dir.is_merged()) else { continue };
            if self.is_metacopy(end.upper, end.name, &victim.stat, Some(&victim.node))? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn lower_parts(&self) -> LowerParts {
        match self.copy_limit.is_none() {
            _ if self.redirects => LowerParts::Redirect,
            true => LowerParts::Stay,
            false => LowerParts::Copy,
        }
    }

    fn side(&self, victim: &Victim<'_>) -> Result<Side> {
        let is_empty = match &victim.node.dir {
            Some(dir) => self.load(dir, &mut dir.names.write())?.is_empty(),
            None => true,
        };
        Ok(Side {
            is_dir: victim.node.dir.is_some(),
            is_movable: victim.is_movable(),
            is_upper: victim.layer == UPPER,
            is_empty,
        })
    }

    /// Readies an object that the rename replaces.
    fn before_replacing(
        &self,
        upper: &Upper,
        at: &End<'_>,
        target: &Victim<'_>,
    ) -> Result<Option<std::os::fd::OwnedFd>> {
        if let Some(dir) = &target.node.dir
            && let Some(part) = dir.upper.get()
        {
            part.pin()?;
        }
        let kept = self.before_removal(at.parent, at.upper, at.name, target)?;
        self.before_count_changes(upper, &target.node)?;
        if kept.is_some() && !upper.work.can.unlink_open {
            drop(kept);
            upper.work.link_gone(at.upper, at.name, target.node.id)?;
            return upper.work.gone_handle(target.node.id).map(Some);
        }
        Ok(kept)
    }

    /// Takes note that an upper object has the name `now` instead of `before`.
    fn moved(&self, victim: &Victim<'_>, now: &End<'_>, before: &End<'_>) {
        let node = &victim.node;
        if let Some(dir) = &node.dir
            && let Some(part) = dir.upper.get()
        {
            part.moved(now.upper, now.name);
        }
        let mut place = node.place.write();
        let other = place.other(before.parent, before.name);
        let old = if let Some(other) = other.and_then(|other| place.others_mut().get_mut(other)) {
            other.1 = now.name.into();
            Some(std::mem::replace(&mut other.0, Arc::clone(now.parent)))
        } else if place.is_named(before.parent, before.name) {
            place.name = now.name.into();
            place.parent.replace(Arc::clone(now.parent))
        } else {
            return;
        };
        self.table.retain(now.parent);
        drop(place);
        if let Some(old) = old {
            self.release(&old, 1);
        }
    }
}

/// Tells whether `node` is `dir` or lies beneath it. No rename between directories runs meanwhile.
fn is_within(node: &Arc<Node>, dir: &Arc<Node>) -> bool {
    if dir.dir.is_none() {
        return false;
    }
    let mut next = Some(Arc::clone(node));
    while let Some(node) = next {
        if Arc::ptr_eq(&node, dir) {
            return true;
        }
        next = node.place.read().parent.clone();
    }
    false
}

/// How often the object under a name may change hands while it is copied up.
const RENAME_TRIES: u32 = 16;

/// Returns the listing entry of an upper object.
fn child<'a>(name: &'a [u8], object: &Victim<'_>) -> Child<'a> {
    Child {
        name,
        kind: object.node.kind,
        top: UPPER,
        object: (device(&object.stat), object.stat.stx_ino),
        parts: &[],
    }
}
