//! The one renameat2(2) of a rename, or what takes its place where the upper cannot do that.
//!
//! Locks: `Dir::names` of both directories are held. Crash: at most an empty directory that looks like the one it
//! replaces, a cover (see [`cover`](crate::union::cover)), or a whiteout that hides nothing.

use std::os::fd::AsFd;

use rustix::fs::RenameFlags;

use super::End;
use super::plan::Plan;
use crate::error::{Context, Errno, Result};
use crate::layer::UPPER;
use crate::sys;
use crate::sys::name::At;
use crate::sys::xattr::Target;
use crate::union::copy_attr::copy_attributes;
use crate::union::readdir::shows_nothing;
use crate::union::{Union, Upper};

/// A rename that is planned and prepared.
#[derive(Clone, Copy)]
pub(super) struct Publish<'a> {
    pub(super) union: &'a Union,
    pub(super) upper: &'a Upper,
    pub(super) plan: Plan,
    pub(super) old: &'a End<'a>,
    pub(super) new: &'a End<'a>,
}

impl Publish<'_> {
    /// Publishes it: marks first, which change nothing yet, then the one rename(2).
    pub(super) fn run(&self) -> Result<()> {
        let Self { upper, plan, old, new, .. } = *self;
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
            return self.by_covers();
        }
        self.rename_or_clear()?;
        if plan.drop_whiteout {
            // Done already as far as anybody can see; a whiteout that stays hides nothing.
            if let Err(error) = old.upper.call("unlinkat", old.name, sys::name::unlink) {
                tracing::warn!("a needless whiteout stays: {error}");
            }
        }
        Ok(())
    }

    /// Renames with a cover under the old name, in place of the whiteout under the new one, or both
    /// (see [`cover`](crate::union::cover)). The one rename(2) publishes all of it.
    fn by_covers(&self) -> Result<()> {
        let Self { upper, plan, old, new, .. } = *self;
        let work = &upper.work;
        let plain = Self { plan: Plan { flags: RenameFlags::empty(), ..plan }, ..*self };
        if plan.is_swap() {
            work.make_way(new.upper, new.name)?;
        }
        let covered = if plan.leaves_whiteout { work.cover(old.upper, old.name) } else { Ok(()) };
        let renamed = covered.and_then(|()| {
            plain.rename_or_clear().inspect_err(|_| {
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

    fn rename_or_clear(&self) -> Result<()> {
        let Self { plan, old, new, .. } = *self;
        match rename_upper(old, new, plan.flags) {
            Err(error)
                if plan.clear_target
                    // EPERM: SFTP has no other word.
                    && matches!(error.errno(), Errno::NOTEMPTY | Errno::EXIST | Errno::PERM)
                    && holds_only_marks(new)? =>
            {
                self.over_whiteouts()
            }
            done => done,
        }
    }

    /// Renames a directory over one that is empty but for whiteouts. An empty one that looks the
    /// same takes that one's place first, and gives it back should the rename fail.
    fn over_whiteouts(&self) -> Result<()> {
        let Self { upper, plan, old, new, .. } = *self;
        if !upper.work.can.exchange {
            upper.work.clear(new.upper, new.name)?;
            rename_upper(old, new, plan.flags)?;
            upper.work.uncover(new.upper, new.name);
            return Ok(());
        }
        let target = new.upper.call("openat", new.name, |at| sys::open::handle(at.dir, at.name))?;
        let stat = sys::stat::of(&target)
            .and_then(|stat| self.union.seen_in_upper(Target::Handle(target.as_fd()), stat))
            .at("statx", || new.upper.describe(new.name))?;
        let empty = upper.work.make_directory(0o700)?;
        if plan.opaque_source || plan.redirect_source {
            empty.call("setxattr", |at| upper.work.set_opaque(at))?;
        }
        let work = upper.work.dir.handle()?;
        let dressed = Target::Name(At::new(work.as_fd(), &empty.name));
        let route = self.union.route(UPPER, upper);
        copy_attributes(&upper.work, route, Target::Handle(target.as_fd()), dressed, &stat)?;
        upper.work.exchange(&empty, new.upper, new.name)?;
        rename_upper(old, new, plan.flags).inspect_err(|_| {
            if let Err(error) = upper.work.exchange(&empty, new.upper, new.name) {
                tracing::error!("an empty directory took the place of another: {error}");
            }
        })
    }
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
