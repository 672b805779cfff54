//! Renaming: gather what both names show, decide all cases in [`plan_rename`], then one
//! renameat2(2) that publishes the whole change.
//!
//! Locks: `Union::rename` for writing between two directories, then `Dir::names` of both.

use std::os::fd::AsFd;
use std::sync::Arc;

use rustix::fs::RenameFlags;

use super::attr::FileType;
use super::copy_up::{Extent, copy_attributes};
use super::create::check_name;
use super::flatten::Pin;
use super::listing::Child;
use super::node::{Dir, Node, NodeId};
use super::protect::Change;
use super::readdir::shows_nothing;
use super::remove::Victim;
use super::{Union, Upper, lock};
use crate::error::{Context, Errno, Error, Result};
use crate::layer::{self, UPPER};
use crate::marks;
use crate::sys;
use crate::sys::name::At;
use crate::sys::stat::device;
use crate::sys::xattr::Target;

/// One side of a rename.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Side {
    is_dir: bool,
    /// Not a directory with lower parts.
    is_movable: bool,
    /// There is an upper object under the name.
    is_upper: bool,
    /// No directory, or one that shows nothing.
    is_empty: bool,
}

/// What the two names show and hide.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Case {
    flags: RenameFlags,
    lower_parts: LowerParts,
    source: Side,
    target: Option<Side>,
    /// Lower layers show something under the old name.
    below_source: bool,
    /// Lower layers show something under the new name.
    below_target: bool,
    /// A whiteout lies under the new name in the upper.
    whiteout: bool,
}

/// What becomes of the lower parts of a directory that is to move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LowerParts {
    /// It does not move.
    Stay,
    /// Its upper part is completed first.
    Copy,
    /// A redirect leads to them.
    Redirect,
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Bring all that these directories hold to the upper, and look again.
    Flatten { source: bool, target: bool },
    /// Rename.
    Rename(Plan),
}

/// The rename itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Plan {
    /// Flags of the one renameat2(2).
    flags: RenameFlags,
    /// The moved directory needs a redirect.
    redirect_source: bool,
    /// The other directory of an exchange needs one.
    redirect_target: bool,
    /// The moved directory must hide what lies beneath its new place.
    opaque_source: bool,
    /// The other directory of an exchange likewise.
    opaque_target: bool,
    /// The upper part of the replaced directory may hold whiteouts: then an empty one takes its
    /// place first.
    clear_target: bool,
    /// The exchange left a whiteout under the old name that hides nothing.
    drop_whiteout: bool,
    /// The old name hides something from now on.
    leaves_whiteout: bool,
}

impl Plan {
    /// Tells whether a directory changes places with a whiteout, not two objects at a user's wish.
    fn is_swap(&self) -> bool {
        self.flags == RenameFlags::EXCHANGE && (self.drop_whiteout || self.leaves_whiteout)
    }
}

/// Decides a rename.
///
/// # Errors
/// `EINVAL` for flags that overlayfs does not take, `EEXIST`, `ENOENT`, `ENOTDIR`, `EISDIR`,
/// `ENOTEMPTY`; `EXDEV` for a directory whose lower parts stay.
fn plan_rename(case: &Case) -> std::result::Result<Step, Errno> {
    let exchange = case.flags == RenameFlags::EXCHANGE;
    let known = RenameFlags::NOREPLACE | RenameFlags::WHITEOUT;
    if !exchange && !(case.flags - known).is_empty() {
        return Err(Errno::INVAL);
    }
    let source = case.source;
    match case.target {
        None if exchange => return Err(Errno::NOENT),
        Some(_) if case.flags.contains(RenameFlags::NOREPLACE) => return Err(Errno::EXIST),
        Some(target) if !exchange && source.is_dir && !target.is_dir => return Err(Errno::NOTDIR),
        Some(target) if !exchange && !source.is_dir && target.is_dir => return Err(Errno::ISDIR),
        _ => {}
    }
    let redirect_source = !source.is_movable;
    let redirect_target = exchange && case.target.is_some_and(|target| !target.is_movable);
    let is_movable = !redirect_source && !redirect_target;
    if !is_movable && case.lower_parts == LowerParts::Stay {
        return Err(Errno::XDEV);
    }
    if !exchange && case.target.is_some_and(|target| !target.is_empty) {
        return Err(Errno::NOTEMPTY);
    }
    if !is_movable && case.lower_parts == LowerParts::Copy {
        return Ok(Step::Flatten { source: redirect_source, target: redirect_target });
    }
    // A redirect hides what lies beneath the new name.
    let opaque_source = source.is_dir && !redirect_source && case.below_target;
    if exchange {
        let target_is_dir = case.target.is_some_and(|target| target.is_dir);
        return Ok(Step::Rename(Plan {
            flags: RenameFlags::EXCHANGE,
            redirect_source,
            redirect_target,
            opaque_source,
            opaque_target: target_is_dir && !redirect_target && case.below_source,
            clear_target: false,
            drop_whiteout: false,
            leaves_whiteout: false,
        }));
    }
    // A directory cannot be renamed over a whiteout, but can change places with it.
    let swap = source.is_dir && case.whiteout;
    Ok(Step::Rename(Plan {
        flags: match (swap, case.below_source) {
            (true, _) => RenameFlags::EXCHANGE,
            (false, true) => RenameFlags::WHITEOUT,
            (false, false) => RenameFlags::empty(),
        },
        redirect_source,
        redirect_target,
        opaque_source,
        opaque_target: false,
        clear_target: source.is_dir && case.target.is_some_and(|target| target.is_upper),
        drop_whiteout: swap && !case.below_source,
        leaves_whiteout: case.below_source,
    }))
}

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
        let lower = |victim: &Victim<'_>| {
            victim.layer != UPPER && (victim.node.dir.is_none() || self.redirects)
        };
        let exchange = flags.contains(RenameFlags::EXCHANGE);
        let (Some(old), Some(new)) = (from_dir.upper.get(), to_dir.upper.get()) else {
            return Ok(Tried::CopyUp);
        };
        let must_be_upper = |target: &Victim<'_>| {
            if exchange { lower(target) } else { self.needs_index(target) }
        };
        if lower(&source) || target.as_ref().is_some_and(must_be_upper) {
            return Ok(Tried::CopyUp);
        }
        let lends = |dir: &Dir, part: &layer::Dir, name: &[u8], victim: &Victim<'_>| {
            // Where nothing lies beneath, nothing is lent by it.
            if !dir.is_merged() {
                return Ok(false);
            }
            self.is_metacopy(part, name, &victim.stat, Some(&victim.node))
        };
        let swapped = target.as_ref().filter(|_| exchange);
        if lends(from_dir, old, name, &source)?
            || swapped.map_or(Ok(false), |target| lends(to_dir, new, new_name, target))?
        {
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
        let old = End { parent: from, upper: old, name };
        let new = End { parent: to, upper: new, name: new_name };
        if apart {
            self.pass_on_origin(upper, &source.node, new.upper)?;
            self.pass_on_whiteout(upper, &source.stat, new.upper)?;
            if let Some(target) = target.as_ref().filter(|_| exchange) {
                self.pass_on_origin(upper, &target.node, old.upper)?;
                self.pass_on_whiteout(upper, &target.stat, old.upper)?;
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
        self.publish_rename(upper, &plan, &old, &new)?;
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
        match (&target, exchange) {
            (Some(target), true) => {
                if let Some(listing) = &mut both.from().listing {
                    listing.insert(child(name, target));
                }
                self.moved(target, &old, &new);
            }
            (Some(target), false) if target.node.dir.is_some() => {
                target.node.place.write().gone = true;
            }
            (Some(target), false) => self.removed(upper, to, new_name, target, kept),
            (None, _) => {}
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

    fn publish_rename(
        &self,
        upper: &Upper,
        plan: &Plan,
        old: &End<'_>,
        new: &End<'_>,
    ) -> Result<()> {
        // An opaque mark changes nothing yet: what is marked has no lower parts here.
        if plan.opaque_source {
            old.upper.call("setxattr", old.name, |at| upper.work.set_opaque(at))?;
        }
        if plan.opaque_target {
            new.upper.call("setxattr", new.name, |at| upper.work.set_opaque(at))?;
        }
        let can = upper.work.can;
        if plan.is_swap() && !can.exchange
            || plan.flags.contains(RenameFlags::WHITEOUT) && !can.rename_whiteout
        {
            return self.rename_by_covers(upper, plan, old, new);
        }
        self.rename_or_clear(upper, plan, old, new)?;
        if plan.drop_whiteout {
            // Done already as far as anybody can see; a whiteout that stays hides nothing.
            if let Err(error) = old.upper.call("unlinkat", old.name, sys::name::unlink) {
                tracing::warn!("a needless whiteout stays: {error}");
            }
        }
        Ok(())
    }

    /// Renames with a cover under the old name, in place of the whiteout under the new one, or both
    /// (see [`super::cover`]). The one rename(2) publishes all of it.
    fn rename_by_covers(
        &self,
        upper: &Upper,
        plan: &Plan,
        old: &End<'_>,
        new: &End<'_>,
    ) -> Result<()> {
        let work = &upper.work;
        let plain = Plan { flags: RenameFlags::empty(), ..*plan };
        if plan.is_swap() {
            work.make_way(new.upper, new.name)?;
        }
        let covered = if plan.leaves_whiteout { work.cover(old.upper, old.name) } else { Ok(()) };
        let renamed = covered.and_then(|()| {
            self.rename_or_clear(upper, &plain, old, new).inspect_err(|_| {
                if plan.leaves_whiteout {
                    work.uncover(old.upper, old.name);
                }
            })
        });
        if let Err(error) = renamed {
            if plan.is_swap() {
                work.settle_cover(new.upper, new.name);
            }
            return Err(error);
        }
        if plan.is_swap() {
            work.uncover(new.upper, new.name);
        }
        if plan.leaves_whiteout {
            work.settle_cover(old.upper, old.name);
        }
        Ok(())
    }

    fn rename_or_clear(
        &self,
        upper: &Upper,
        plan: &Plan,
        old: &End<'_>,
        new: &End<'_>,
    ) -> Result<()> {
        match rename_upper(old, new, plan.flags) {
            Err(error)
                if plan.clear_target
                    // EPERM: SFTP has no other word.
                    && matches!(error.errno(), Errno::NOTEMPTY | Errno::EXIST | Errno::PERM)
                    && holds_only_marks(new)? =>
            {
                self.rename_over_whiteouts(upper, plan, old, new)
            }
            done => done,
        }
    }

    /// Renames a directory over one that is empty but for whiteouts. An empty one that looks the
    /// same takes that one's place first, and gives it back should the rename fail.
    fn rename_over_whiteouts(
        &self,
        upper: &Upper,
        plan: &Plan,
        old: &End<'_>,
        new: &End<'_>,
    ) -> Result<()> {
        if !upper.work.can.exchange {
            upper.work.clear(new.upper, new.name)?;
            rename_upper(old, new, plan.flags)?;
            upper.work.uncover(new.upper, new.name);
            return Ok(());
        }
        let target = new.upper.call("openat", new.name, |at| sys::open::handle(at.dir, at.name))?;
        let stat = sys::stat::of(&target)
            .and_then(|stat| self.seen_in_upper(Target::Handle(target.as_fd()), stat))
            .at("statx", || new.upper.describe(new.name))?;
        let empty = upper.work.make_directory(0o700)?;
        if plan.opaque_source || plan.redirect_source {
            empty.call("setxattr", |at| upper.work.set_opaque(at))?;
        }
        let work = upper.work.dir.handle()?;
        let dressed = Target::Name(At::new(work.as_fd(), &empty.name));
        let route = self.route(UPPER, upper);
        copy_attributes(&upper.work, route, Target::Handle(target.as_fd()), dressed, &stat)?;
        upper.work.exchange(&empty, new.upper, new.name)?;
        rename_upper(old, new, plan.flags).inspect_err(|_| {
            if let Err(error) = upper.work.exchange(&empty, new.upper, new.name) {
                tracing::error!("an empty directory took the place of another: {error}");
            }
        })
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

/// Tells whether the directory at `end` would show nothing, by what is on the disk now.
fn holds_only_marks(end: &End<'_>) -> Result<bool> {
    let stat = end.upper.call("statx", end.name, |at| sys::stat::at(at.dir, at.name))?;
    shows_nothing(&end.upper.child(end.name, &stat))
}

/// The one renameat2(2) of a rename.
fn rename_upper(old: &End<'_>, new: &End<'_>, flags: RenameFlags) -> Result<()> {
    let handle = new.upper.handle()?;
    let to = At::new(handle.as_fd(), new.name);
    old.upper.call("renameat2", old.name, |from| sys::name::rename(from, to, flags))
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

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: Side = Side { is_dir: false, is_movable: true, is_upper: true, is_empty: true };
    const DIR: Side = Side { is_dir: true, is_movable: true, is_upper: true, is_empty: true };
    const PLAIN: Case = Case {
        flags: RenameFlags::empty(),
        lower_parts: LowerParts::Stay,
        source: FILE,
        target: None,
        below_source: false,
        below_target: false,
        whiteout: false,
    };
    const NOTHING: Plan = Plan {
        flags: RenameFlags::empty(),
        redirect_source: false,
        redirect_target: false,
        opaque_source: false,
        opaque_target: false,
        clear_target: false,
        drop_whiteout: false,
        leaves_whiteout: false,
    };

    #[test]
    fn refusals() {
        let both = RenameFlags::WHITEOUT | RenameFlags::EXCHANGE;
        let merged = Side { is_movable: false, ..DIR };
        let full = Side { is_empty: false, ..DIR };
        let cases = [
            (Case { flags: both, ..PLAIN }, Errno::INVAL),
            (Case { flags: RenameFlags::EXCHANGE, ..PLAIN }, Errno::NOENT),
            (Case { flags: RenameFlags::NOREPLACE, target: Some(FILE), ..PLAIN }, Errno::EXIST),
            (Case { target: Some(DIR), ..PLAIN }, Errno::ISDIR),
            (Case { source: DIR, target: Some(FILE), ..PLAIN }, Errno::NOTDIR),
            (Case { source: merged, ..PLAIN }, Errno::XDEV),
            (Case { flags: RenameFlags::EXCHANGE, target: Some(merged), ..PLAIN }, Errno::XDEV),
            (Case { source: merged, target: Some(full), ..PLAIN }, Errno::XDEV),
            (Case { source: DIR, target: Some(full), ..PLAIN }, Errno::NOTEMPTY),
        ];
        for (case, errno) in cases {
            assert_eq!(plan_rename(&case), Err(errno), "{case:?}");
        }
    }

    #[test]
    fn directories_with_lower_parts_are_completed_before_they_move() {
        let merged = Side { is_movable: false, ..DIR };
        let full = Side { is_empty: false, ..DIR };
        let copy = Case { lower_parts: LowerParts::Copy, source: DIR, ..PLAIN };
        let exchange = Case { flags: RenameFlags::EXCHANGE, ..copy };
        let both = |source, target| Ok(Step::Flatten { source, target });
        let cases = [
            (Case { source: merged, ..copy }, both(true, false)),
            (Case { source: merged, target: Some(DIR), ..copy }, both(true, false)),
            // What is replaced is gone, whatever it was made of.
            (Case { source: merged, target: Some(merged), ..copy }, both(true, false)),
            (Case { source: merged, target: Some(full), ..copy }, Err(Errno::NOTEMPTY)),
            (Case { source: merged, target: Some(FILE), ..copy }, Err(Errno::NOTDIR)),
            (Case { target: Some(merged), ..exchange }, both(false, true)),
            (Case { source: merged, target: Some(merged), ..exchange }, both(true, true)),
            (Case { source: merged, target: Some(full), ..exchange }, both(true, false)),
        ];
        for (case, step) in cases {
            assert_eq!(plan_rename(&case), step, "{case:?}");
        }
    }

    #[test]
    fn redirects_hide_what_lies_beneath_the_new_name() {
        let merged = Side { is_movable: false, ..DIR };
        let redirect = Case { lower_parts: LowerParts::Redirect, below_source: true, ..PLAIN };
        let moved = Plan {
            flags: RenameFlags::WHITEOUT,
            redirect_source: true,
            leaves_whiteout: true,
            ..NOTHING
        };
        let swapped = Plan { flags: RenameFlags::EXCHANGE, ..NOTHING };
        let exchange = Case { flags: RenameFlags::EXCHANGE, below_target: true, ..redirect };
        let cases = [
            (Case { source: merged, ..redirect }, moved),
            (Case { source: merged, below_target: true, ..redirect }, moved),
            (
                Case { source: merged, target: Some(DIR), ..exchange },
                Plan { redirect_source: true, opaque_target: true, ..swapped },
            ),
            (
                Case { source: DIR, target: Some(merged), ..exchange },
                Plan { redirect_target: true, opaque_source: true, ..swapped },
            ),
            (
                Case { source: merged, target: Some(merged), ..exchange },
                Plan { redirect_source: true, redirect_target: true, ..swapped },
            ),
        ];
        for (case, plan) in cases {
            assert_eq!(plan_rename(&case), Ok(Step::Rename(plan)), "{case:?}");
        }
    }

    #[test]
    fn plans() {
        let cases = [
            (PLAIN, NOTHING),
            (
                Case { below_source: true, ..PLAIN },
                Plan { flags: RenameFlags::WHITEOUT, leaves_whiteout: true, ..NOTHING },
            ),
            // A file goes over a whiteout, and hides what it hid.
            (Case { whiteout: true, below_target: true, ..PLAIN }, NOTHING),
            (
                Case { source: DIR, whiteout: true, below_target: true, ..PLAIN },
                Plan {
                    flags: RenameFlags::EXCHANGE,
                    opaque_source: true,
                    drop_whiteout: true,
                    ..NOTHING
                },
            ),
            (
                Case { source: DIR, whiteout: true, below_source: true, ..PLAIN },
                Plan { flags: RenameFlags::EXCHANGE, leaves_whiteout: true, ..NOTHING },
            ),
            (
                Case { source: DIR, target: Some(DIR), below_target: true, ..PLAIN },
                Plan { opaque_source: true, clear_target: true, ..NOTHING },
            ),
            (
                Case {
                    source: DIR,
                    target: Some(Side { is_upper: false, ..DIR }),
                    below_target: true,
                    ..PLAIN
                },
                Plan { opaque_source: true, ..NOTHING },
            ),
            (
                Case {
                    flags: RenameFlags::EXCHANGE,
                    source: DIR,
                    target: Some(FILE),
                    below_source: true,
                    below_target: true,
                    ..PLAIN
                },
                Plan { flags: RenameFlags::EXCHANGE, opaque_source: true, ..NOTHING },
            ),
        ];
        for (case, plan) in cases {
            assert_eq!(plan_rename(&case), Ok(Step::Rename(plan)), "{case:?}");
        }
    }
}
