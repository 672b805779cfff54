//! Removing names: unlink and rmdir.
//!
//! Where a lower layer has the name, a whiteout takes its place in one step; where none has, the
//! upper object goes. No data is read or copied.
//!
//! Locks: `Union::rename` for reading (rmdir), `Dir::names` of the parent, then of the directory.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::RenameFlags;

use super::copy_up::Extent;
use super::create::check_name;
use super::node::{Dir, Links, Name, Node, NodeId};
use super::protect::Change;
use super::readdir::{Names, shows_nothing};
use super::{Union, Upper, lock};
use crate::error::{Context, Errno, Result};
use crate::layer::{self, UPPER};
use crate::marks;
use crate::sys;
use crate::sys::name::At;
use crate::sys::stat::Statx;

impl Union {
    /// Removes a name of something that is no directory.
    ///
    /// # Errors
    /// `EROFS` without an upper, `ENOENT`, `EISDIR`, and those of the calls on the upper.
    pub fn unlink(&self, parent: NodeId, name: &[u8]) -> Result<()> {
        let (upper, parent) = self.for_removal(parent, name, |_| Ok(()))?;
        let dir = lock::directory(&parent)?;
        let mut names = dir.names.write();
        let mut victim = self.victim(&parent, dir, &mut names, name)?;
        if victim.node.dir.is_some() {
            return Err(Errno::ISDIR.into());
        }
        self.may_lose(dir, name, &victim.node)?;
        while self.needs_index(&victim) {
            drop(names);
            self.copy_up(&victim.node, Extent::All)?;
            names = dir.names.write();
            victim = self.victim(&parent, dir, &mut names, name)?;
        }
        let to = dir.upper.get().ok_or(Errno::STALE)?;
        let kept = self.before_removal(&parent, to, name, &victim)?;
        self.before_count_changes(upper, &victim.node)?;
        let can = upper.work.can;
        let take = || {
            if can.unlink_open || kept.is_none() {
                return to.call("unlinkat", name, sys::name::unlink);
            }
            upper.work.keep_gone(to, name, victim.node.id)
        };
        if !victim.below {
            take()?;
        } else if victim.layer != UPPER {
            upper.work.whiteout(to, name)?;
        } else if can.device && can.unlink_open {
            let whiteout = upper.work.temp_whiteout()?;
            upper.work.publish(whiteout, to, name, RenameFlags::empty())?;
        } else {
            upper.work.replace(to, name, take)?;
        }
        if let Some(listing) = &mut names.listing {
            listing.remove(name, victim.below && upper.work.can.device);
        }
        self.removed(upper, &parent, name, &victim, kept);
        Ok(())
    }

    /// Removes an empty directory.
    ///
    /// # Errors
    /// `EROFS` without an upper, `ENOENT`, `ENOTDIR`, `ENOTEMPTY`, and those of the calls on the
    /// upper.
    pub fn rmdir(&self, parent: NodeId, name: &[u8]) -> Result<()> {
        let (upper, parent) = self.for_removal(parent, name, |victim| self.is_empty(victim))?;
        let _renames = self.rename.read();
        let dir = lock::directory(&parent)?;
        let mut names = dir.names.write();
        let victim = self.victim(&parent, dir, &mut names, name)?;
        let own = lock::directory(&victim.node)?;
        self.may_lose(dir, name, &victim.node)?;
        let mut own_names = own.names.write();
        // Its name goes, and with that the way to open it again.
        own.upper.get().map_or(Ok(()), |part| part.pin())?;
        let to = dir.upper.get().ok_or(Errno::STALE)?;
        let is_plain = victim.layer == UPPER && own.lowers().is_empty() && !victim.below;
        if !(is_plain && remove_empty(to, name)?) {
            if !self.load(own, &mut own_names)?.is_empty() {
                return Err(Errno::NOTEMPTY.into());
            }
            // What goes with it unseen is looked at once more: it may be marks only.
            if let Some(part) = own.upper.get()
                && !shows_nothing(part)?
            {
                self.distrust(&mut own_names);
                return Err(Errno::NOTEMPTY.into());
            }
            let take = || {
                // Its marks go with it, out of sight.
                let aside = upper.work.temp();
                let work = upper.work.dir.handle()?;
                let aside = At::new(work.as_fd(), &aside.name);
                let flags = RenameFlags::empty();
                to.call("renameat2", name, |at| sys::name::rename(at, aside, flags))
            };
            if victim.layer != UPPER {
                upper.work.whiteout(to, name)?;
            } else if !victim.below {
                take()?;
            } else if upper.work.can.device && upper.work.can.exchange {
                let whiteout = upper.work.temp_whiteout()?;
                upper.work.publish(whiteout, to, name, RenameFlags::EXCHANGE)?;
            } else {
                upper.work.replace(to, name, take)?;
            }
        }
        if let Some(listing) = &mut names.listing {
            listing.remove(name, victim.below && upper.work.can.device);
        }
        victim.node.place.write().gone = true;
        Ok(())
    }

    /// Readies the parent of a name that is to go. What `check` refuses is refused before anything is
    /// copied up.
    fn for_removal(
        &self,
        parent: NodeId,
        name: &[u8],
        check: impl FnOnce(&Node) -> Result<()>,
    ) -> Result<(&Upper, Arc<Node>)> {
        let upper = self.writable()?;
        if marks::is_reserved_name(name) {
            return Err(Errno::NOENT.into());
        }
        check_name(name)?;
        let parent = self.node(parent)?;
        self.may(&parent, Change::Remove)?;
        let dir = lock::directory(&parent)?;
        if dir.upper.get().is_none() {
            let names = self.names(dir)?;
            let found = self.find(dir, &names, name)?.ok_or(Errno::NOENT)?;
            let (victim, _) = self.enter(&parent, name, found)?;
            drop(names);
            let checked = check(&victim);
            self.release(&victim, 1);
            checked?;
            self.copy_up(&parent, Extent::All)?;
        }
        Ok((upper, parent))
    }

    /// Refuses what is no directory, or not an empty one.
    fn is_empty(&self, victim: &Node) -> Result<()> {
        let own = lock::directory(victim)?;
        let is_empty = self.load(own, &mut own.names.write())?.is_empty();
        if is_empty { Ok(()) } else { Err(Errno::NOTEMPTY.into()) }
    }

    /// Finds what a name shows, to remove or replace it. `names` belong to `dir` and are locked.
    pub(super) fn victim(
        &self,
        parent: &Arc<Node>,
        dir: &Dir,
        names: &mut Names,
        name: &[u8],
    ) -> Result<Victim<'_>> {
        if dir.is_merged() {
            self.load(dir, names)?;
        }
        let found = self.find(dir, names, name)?.ok_or(Errno::NOENT)?;
        let (layer, stat) = (found.layer, found.stat);
        let below = names.listing.as_ref().is_some_and(|listing| listing.is_below(name));
        let (node, _) = self.enter(parent, name, found)?;
        Ok(Victim { union: self, node, layer, stat, below })
    }

    /// Takes hold of an upper object that is about to lose the name its node has for it.
    pub(super) fn before_removal(
        &self,
        parent: &Arc<Node>,
        to: &layer::Dir,
        name: &[u8],
        victim: &Victim<'_>,
    ) -> Result<Option<OwnedFd>> {
        let node = &victim.node;
        let is_anchored = || {
            let can_link = self.upper.as_ref().is_some_and(|upper| upper.work.can.link);
            node.links.get().is_some() && can_link
        };
        if victim.layer != UPPER || node.dir.is_some() || is_anchored() {
            return Ok(None);
        }
        let place = node.place.read();
        let goes_on = !place.is_named(parent, name) || !place.others().is_empty();
        drop(place);
        if goes_on && victim.stat.stx_nlink > 1 {
            return Ok(None);
        }
        to.call("openat", name, |at| sys::open::handle(at.dir, at.name)).map(Some)
    }

    /// Takes note that a name of the victim is gone.
    pub(super) fn removed(
        &self,
        upper: &Upper,
        parent: &Arc<Node>,
        name: &[u8],
        victim: &Victim<'_>,
        kept: Option<OwnedFd>,
    ) {
        let node = &victim.node;
        if let Some(links) = node.links.get() {
            let mut links = links.lock();
            links.count = links.count.saturating_sub(1);
            let last = links.count == 0;
            let before = links.pending.len();
            links.pending.retain(|(at, pending)| !(Arc::ptr_eq(at, parent) && **pending == *name));
            let released = before - links.pending.len();
            if let Some(kept) = kept {
                // The only name of a copy; its lower ones still lead to the node.
                node.place.write().hold(Arc::new(kept));
            }
            let moved = self.go_on_under_another(upper, (parent, name), node, &links);
            if links.anchored && last {
                let removed = upper.anchor(node, &links).and_then(|(dir, anchor)| {
                    let handle =
                        dir.call("openat", &anchor, |at| sys::open::handle(at.dir, at.name))?;
                    dir.call("unlinkat", &anchor, sys::name::unlink)?;
                    Ok(handle)
                });
                match removed {
                    Ok(handle) => node.place.write().hold(Arc::new(handle)),
                    Err(error) => tracing::warn!("cannot remove an anchor: {error}"),
                }
                links.anchored = false;
            }
            if last {
                node.place.write().gone = true;
                if std::mem::take(&mut links.pinned) {
                    drop(links);
                    self.release(node, 1);
                }
            } else if links.index.is_none() {
                self.pin_links(node, &mut links);
                drop(links);
            }
            self.release_times(parent, released + usize::from(moved));
            return;
        }
        let last = victim.layer != UPPER || victim.stat.stx_nlink <= 1;
        let mut place = node.place.write();
        let mut released = None;
        if last {
            place.gone = true;
        } else if let Some(other) = place.other(parent, name) {
            released = Some(place.others_mut().swap_remove(other).0);
        } else if place.is_named(parent, name)
            && let Some((parent, name)) = place.pop_other()
        {
            released = place.parent.replace(parent);
            place.name = name;
        }
        if let Some(kept) = kept {
            place.hold(Arc::new(kept));
        }
        drop(place);
        if let Some(parent) = released {
            self.release(&parent, 1);
        }
    }

    /// Where the upper has no hard links a copy gets the name that its node has: when a lower file
    /// loses that one, it goes on with another name that leads to it. Tells whether it does.
    fn go_on_under_another(
        &self,
        upper: &Upper,
        (parent, name): (&Arc<Node>, &[u8]),
        node: &Arc<Node>,
        links: &Links,
    ) -> bool {
        let (layer, object) = {
            let place = node.place.read();
            if upper.work.can.link || place.layer == UPPER || !place.is_named(parent, name) {
                return false;
            }
            (place.layer, place.object)
        };
        let leads_there = |(at, other): &&(Arc<Node>, Name)| {
            let part = at.dir.as_ref().and_then(|dir| dir.part(layer));
            part.and_then(|part| part.find(other).ok().flatten())
                .is_some_and(|stat| (sys::stat::device(&stat), stat.stx_ino) == object)
        };
        let Some((at, other)) = links.pending.iter().find(leads_there).cloned() else {
            return false;
        };
        self.table.retain(&at);
        let mut place = node.place.write();
        place.parent = Some(at);
        place.name = other;
        true
    }

    fn release_times(&self, node: &Arc<Node>, times: usize) {
        for _ in 0..times {
            self.release(node, 1);
        }
    }
}

/// Removes a directory that is empty on the disk; tells whether it was.
fn remove_empty(to: &layer::Dir, name: &[u8]) -> Result<bool> {
    match to.call("unlinkat", name, |at| Ok(sys::name::rmdir(at)))? {
        Ok(()) => Ok(true),
        // EBUSY: a file in it was removed, and is open. EPERM: SFTP has no other word.
        Err(Errno::NOTEMPTY | Errno::EXIST | Errno::BUSY | Errno::PERM) => Ok(false),
        Err(errno) => Err(errno).at("unlinkat", || to.describe(name)),
    }
}

/// What a name shows that is about to go. Holds one count of the node.
pub(super) struct Victim<'a> {
    union: &'a Union,
    pub(super) node: Arc<Node>,
    pub(super) layer: layer::Index,
    pub(super) stat: Statx,
    /// A lower layer has the name too, so a whiteout must hide it.
    pub(super) below: bool,
}

impl Drop for Victim<'_> {
    fn drop(&mut self) {
        self.union.release(&self.node, 1);
    }
}

impl Victim<'_> {
    /// Tells whether a directory can be moved: nothing of it lies in a lower layer.
    pub(super) fn is_movable(&self) -> bool {
        match &self.node.dir {
            Some(dir) => dir.lowers().is_empty(),
            None => true,
        }
    }
}
