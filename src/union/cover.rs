//! Whiteouts beside objects: how names change hands where the upper's filesystem can neither
//! exchange two names nor leave a whiteout in one step.
//!
//! A file `.wh.NAME` (the *cover*) hides what lies beneath NAME. Beside an object it changes
//! nothing: the object hides as much, and a directory that has one is opaque anyway, or made so
//! first. So a change is: put the cover, take the object away (this publishes), and put the device
//! 0:0 in place of the cover where there are such. A crash in between leaves a cover, which hides
//! what it should.
//!
//! Locks: called with the `Dir::names` of the directory locked for writing.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::RenameFlags;

use super::node::NodeId;
use super::publish::{self, Temp, Work};
use crate::error::{Errno, Result};
use crate::layer;
use crate::marks;
use crate::sys;
use crate::sys::name::At;

impl Work {
    /// Puts the cover of `name`.
    ///
    /// # Errors
    /// `ENAMETOOLONG` for a name that leaves no room for it; those of openat(2).
    pub(super) fn cover(&self, dir: &layer::Dir, name: &[u8]) -> Result<()> {
        let cover = marks::whiteout_name(name).ok_or(Errno::NAMETOOLONG)?;
        dir.call("openat", &cover, publish::touch)
    }

    /// Takes away the cover of `name`, which has nothing to hide any more. Whether that succeeds
    /// changes nothing that is seen.
    pub(super) fn uncover(&self, dir: &layer::Dir, name: &[u8]) {
        let Some(cover) = marks::whiteout_name(name) else { return };
        match dir.call("unlinkat", &cover, sys::name::unlink) {
            Err(error) if error.errno() != Errno::NOENT => {
                tracing::warn!("a needless whiteout stays: {error}");
            }
            _ => {}
        }
    }

    /// Turns the cover of `name`, where nothing is now, into a whiteout of the kernel's form, if
    /// there are such; else it stays.
    pub(super) fn settle_cover(&self, dir: &layer::Dir, name: &[u8]) {
        if !self.can.device {
            return;
        }
        match self.device(dir, name) {
            Ok(()) => self.uncover(dir, name),
            Err(error) => tracing::warn!("a whiteout stays a .wh. file: {error}"),
        }
    }

    /// Takes the object `name` away by `take`, and hides what lies beneath.
    pub(super) fn replace(
        &self,
        dir: &layer::Dir,
        name: &[u8],
        take: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        self.cover(dir, name)?;
        take().inspect_err(|_| self.uncover(dir, name))?;
        self.settle_cover(dir, name);
        Ok(())
    }

    /// Makes way for a directory where a device 0:0 is: a cover takes its place. Once the directory
    /// is there, [`Work::uncover`] ends this; if it fails to come, [`Work::settle_cover`].
    pub(super) fn make_way(&self, dir: &layer::Dir, name: &[u8]) -> Result<()> {
        self.cover(dir, name)?;
        match dir.call("unlinkat", name, sys::name::unlink) {
            // It was a cover all the time.
            Err(error) if error.errno() == Errno::NOENT => Ok(()),
            removed => removed.inspect_err(|_| self.uncover(dir, name)),
        }
    }

    /// Publishes the directory `temp` as `name`, where a device 0:0 is. It hides as much itself.
    pub(super) fn publish_over_whiteout(
        &self,
        temp: Temp<'_>,
        to: &layer::Dir,
        name: &[u8],
    ) -> Result<()> {
        if self.can.exchange {
            return self.publish(temp, to, name, RenameFlags::EXCHANGE);
        }
        self.make_way(to, name)?;
        self.publish(temp, to, name, RenameFlags::empty())
            .inspect_err(|_| self.settle_cover(to, name))?;
        self.uncover(to, name);
        Ok(())
    }

    /// Empties directory `name`, which shows nothing: its marks go, and a cover beside it hides what
    /// they hid.
    pub(super) fn clear(&self, dir: &Arc<layer::Dir>, name: &[u8]) -> Result<()> {
        self.cover(dir, name)?;
        let stat = dir.call("statx", name, |at| sys::stat::at(at.dir, at.name))?;
        let inside = dir.child(name, &stat);
        for mark in publish::names(&inside)? {
            inside.call("unlinkat", &mark, sys::name::unlink)?;
        }
        Ok(())
    }

    /// Moves the object `name` out of sight, as `name` goes, so that it can still be reached: for
    /// filesystems that leave a name behind where an open file is removed.
    pub(super) fn keep_gone(&self, dir: &layer::Dir, name: &[u8], node: NodeId) -> Result<()> {
        let gone = gone(node);
        let work = self.dir.handle()?;
        let aside = At::new(work.as_fd(), &gone);
        dir.call("renameat2", name, |at| sys::name::rename(at, aside, RenameFlags::empty()))
    }

    /// Gives the object `name`, which is about to be replaced, a name out of sight.
    pub(super) fn link_gone(&self, dir: &layer::Dir, name: &[u8], node: NodeId) -> Result<()> {
        let gone = gone(node);
        let work = self.dir.handle()?;
        let aside = At::new(work.as_fd(), &gone);
        dir.call("linkat", name, |at| sys::name::link(at, aside))
    }

    /// Returns a handle of the removed object of a node.
    pub(super) fn gone_handle(&self, node: NodeId) -> Result<OwnedFd> {
        self.dir.call("openat", &gone(node), |at| sys::open::handle(at.dir, at.name))
    }

    /// Removes the object that is kept for a node, when nobody needs the object any more.
    pub(super) fn end_gone(&self, node: NodeId) {
        if let Err(error) = self.remove_tree(&gone(node)) {
            tracing::warn!("cannot clean up: {error}");
        }
    }
}

/// Name in work of the removed object of a node.
fn gone(node: NodeId) -> Vec<u8> {
    format!("gone-{:x}", node.0).into_bytes()
}
