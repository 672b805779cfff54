//! Brings a whole directory to the upper layer, so that one rename can move it.
//!
//! Every step leaves what is shown as it was: what lies beneath is copied up, many files between two
//! syncs (`staging`); then each directory, from the innermost out, is marked opaque,
//! because its upper part holds all of it. From there on it has no lower parts. Changes made
//! meanwhile go on undisturbed: there is never less in the upper than before, so one more look at
//! the names, taken with them locked, finds whatever was missed.
//!
//! Locks: none over copying; over publishing those of `staging`; `Dir::names` of one directory over the
//! last look and the mark.
//! Crash: leaves copies in the upper that show what the lowers show.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::attr::{FileType, times_of};
use super::copy_up::Extent;
use super::listing::Child;
use super::lookup::Found;
use super::node::{Dir, Node};
use super::staging::{Leaf, Staging};
use super::{Union, Upper, interrupt, lock};
use crate::error::{Errno, Result};
use crate::layer::UPPER;
use crate::sys;

/// How much is copied at most to move a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyLimit {
    /// Files and directories that lie in a lower layer.
    pub entries: u64,
    /// Bytes of such files.
    pub bytes: u64,
}

impl CopyLimit {
    /// Nothing is copied: a directory with lower parts does not move.
    pub fn is_none(self) -> bool {
        self.entries == 0 || self.bytes == 0
    }

    /// Takes one more entry of so many bytes away.
    ///
    /// # Errors
    /// `EXDEV` past the limit, so that the caller copies by itself.
    fn take(&mut self, bytes: u64) -> Result<()> {
        let left = (self.entries.checked_sub(1), self.bytes.checked_sub(bytes));
        let (Some(entries), Some(bytes)) = left else { return Err(Errno::XDEV.into()) };
        *self = Self { entries, bytes };
        Ok(())
    }
}

/// Copies, directories among them, published after one sync, at most.
const BATCH_COPIES: usize = 4096;
/// Bytes that one sync waits for, about.
const BATCH_BYTES: u64 = 256 << 20;

/// Threads that copy for one move, at most; and directories that each of them should have.
const COPIERS_MAX: usize = 4;
const DIRS_EACH: usize = 8;

/// How often what others do meanwhile may call for one more round.
const ROUNDS: u32 = 16;

/// Copies that wait for one sync, of one thread.
#[derive(Default)]
struct Batch<'a> {
    ready: Vec<Staging<'a>>,
    copies: usize,
    bytes: u64,
}

impl Batch<'_> {
    fn is_full(&self) -> bool {
        self.copies >= BATCH_COPIES || self.bytes >= BATCH_BYTES
    }
}

/// One count of a node.
pub(super) struct Pin<'a> {
    union: &'a Union,
    pub(super) node: Arc<Node>,
}

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        self.union.release(&self.node, 1);
    }
}

impl Union {
    /// Counts one more user of a node.
    pub(super) fn pin(&self, node: &Arc<Node>) -> Pin<'_> {
        self.table.retain(node);
        Pin { union: self, node: Arc::clone(node) }
    }

    /// Counts one more user of the node with this number, if there is one.
    pub(super) fn pin_by_number(&self, ino: u64) -> Option<Pin<'_>> {
        self.table.by_ino_counted(ino).map(|node| Pin { union: self, node })
    }

    /// Makes sure that all beneath a directory lies in the upper, and nothing of it in lowers.
    ///
    /// # Errors
    /// `EXDEV` past the limit, and for hard links where the upper has none, before anything is copied;
    /// those of the copy-up; `EBUSY` if others bring in more lower parts again and again.
    /// # Crash
    /// What was copied stays, and shows what it showed.
    pub(super) fn flatten(&self, top: &Arc<Node>) -> Result<()> {
        let upper = self.writable()?;
        for _ in 0..ROUNDS {
            let dirs = self.survey(upper, top)?;
            let staged = self.stage_all(upper, &dirs)?;
            self.publish_batch(upper, staged)?;
            // Children come after their parents.
            let mut done = true;
            for dir in dirs.iter().rev() {
                done &= self.seal(upper, &dir.node)?;
            }
            if done {
                return Ok(());
            }
        }
        Err(Errno::BUSY.into())
    }

    /// Finds the directories with lower parts from `top` on, parents first, and adds up what is to
    /// be copied.
    fn survey(&self, upper: &Upper, top: &Arc<Node>) -> Result<Vec<Pin<'_>>> {
        let mut left = self.copy_limit;
        let mut dirs = vec![self.pin(top)];
        let mut next = 0;
        while let Some(pin) = dirs.get(next) {
            let parent = Arc::clone(&pin.node);
            next += 1;
            let dir = lock::directory(&parent)?;
            let names = self.names_listed(dir)?;
            for child in names.listing.iter().flat_map(|listing| listing.children()) {
                let is_own = child.top == UPPER && child.kind != FileType::Directory;
                if is_own && child.kind != FileType::Regular {
                    continue;
                }
                let Some(found) = self.find_child(dir, &child)? else { continue };
                if !has_lower(&found) && !self.lacks_data(dir, &child, &found)? {
                    continue;
                }
                if found.is_alias() && !upper.work.can.link {
                    // Only one of its names can get a copy of it.
                    return Err(Errno::XDEV.into());
                }
                let is_file = child.kind == FileType::Regular;
                left.take(if is_file { found.stat.stx_size } else { 0 })?;
                if child.kind == FileType::Directory {
                    dirs.push(self.pin_found(&parent, &child, found)?);
                }
            }
        }
        Ok(dirs)
    }

    /// Tells whether an upper file is a metacopy, which needs its data before it moves.
    fn lacks_data(&self, dir: &Dir, child: &Child<'_>, found: &Found) -> Result<bool> {
        match dir.upper.get() {
            Some(part) if found.layer == UPPER => {
                self.is_metacopy(part, child.name, &found.stat, None)
            }
            _ => Ok(false),
        }
    }

    /// Returns the node of what was found in `parent`, whose names are locked.
    fn pin_found(&self, parent: &Arc<Node>, child: &Child<'_>, found: Found) -> Result<Pin<'_>> {
        let (node, _) = self.enter(parent, child.name, found)?;
        Ok(Pin { union: self, node })
    }

    /// Copies what lies in the lower parts of directories, and publishes it but for what is left to
    /// wait for a sync, which is returned. Several threads take one directory after the other, of
    /// which none waits for another's names.
    fn stage_all<'a>(&'a self, upper: &'a Upper, dirs: &[Pin<'_>]) -> Result<Vec<Staging<'a>>> {
        let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
        let caller = interrupt::served();
        let work = || {
            let mut batch = Batch::default();
            loop {
                let order = next.fetch_add(1, Ordering::Relaxed);
                let Some(dir) = dirs.get(order) else { return Ok(batch.ready) };
                if failed.load(Ordering::Relaxed) {
                    return Ok(batch.ready);
                }
                if let Err(error) = self.stage_directory(upper, order, &dir.node, &mut batch) {
                    failed.store(true, Ordering::Relaxed);
                    return Err(error);
                }
            }
        };
        let help = || {
            // Who waits for the caller waits for this.
            interrupt::serve(caller.0, caller.1);
            if let Err(errno) = sys::process::unbind() {
                tracing::debug!(%errno, "a copier stays on the CPU of its caller");
            }
            work()
        };
        let threads = sys::process::cpus().min(COPIERS_MAX).min(dirs.len() / DIRS_EACH);
        std::thread::scope(|scope| {
            let start = || std::thread::Builder::new().name("copier".into());
            // Fewer do as well.
            let helpers: Vec<_> =
                (1..threads).map_while(|_| start().spawn_scoped(scope, help).ok()).collect();
            let mut staged = work();
            for helper in helpers {
                let helped = helper.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                staged = match (staged, helped) {
                    (Ok(mut all), Ok(more)) => {
                        all.extend(more);
                        Ok(all)
                    }
                    (Err(error), _) | (_, Err(error)) => Err(error),
                };
            }
            staged
        })
    }

    /// Copies what lies in the lower parts of a directory, but for directories.
    fn stage_directory<'a>(
        &'a self,
        upper: &'a Upper,
        order: usize,
        parent: &Arc<Node>,
        batch: &mut Batch<'a>,
    ) -> Result<()> {
        let dir = lock::directory(parent)?;
        let leaves = self.lower_leaves(parent, dir)?;
        if leaves.is_empty() && dir.upper.get().is_some() || parent.place.read().gone {
            return Ok(());
        }
        let mut staging = Staging::new(upper, order, parent)?;
        for leaf in leaves {
            if leaf.pin.node.links.get().is_some() || leaf.pin.node.is_upper() {
                // Its names are linked to one copy, which has its own way; or it is a metacopy.
                self.copy_up(&leaf.pin.node, Extent::All)?;
                continue;
            }
            batch.bytes += self.stage_leaf(upper, &mut staging, leaf)?;
            batch.copies += 1;
            if batch.is_full() {
                let full = std::mem::replace(&mut staging, Staging::new(upper, order, parent)?);
                batch.ready.push(self.complete(upper, full)?);
                self.publish_batch(upper, std::mem::take(batch).ready)?;
            }
        }
        batch.ready.push(self.complete(upper, staging)?);
        batch.copies += 1;
        if batch.is_full() {
            self.publish_batch(upper, std::mem::take(batch).ready)?;
        }
        Ok(())
    }

    /// Lists what a directory shows of its lower parts, but for directories.
    fn lower_leaves(&self, parent: &Arc<Node>, dir: &Dir) -> Result<Vec<Leaf<'_>>> {
        let names = self.names_listed(dir)?;
        let mut leaves = Vec::new();
        for child in names.listing.iter().flat_map(|listing| listing.children()) {
            let is_own = child.top == UPPER && child.kind != FileType::Regular;
            if is_own || child.kind == FileType::Directory {
                continue;
            }
            let Some(found) = self.find_child(dir, &child)? else { continue };
            if found.layer == UPPER && !self.lacks_data(dir, &child, &found)? {
                continue;
            }
            let stat = found.stat;
            let pin = self.pin_found(parent, &child, found)?;
            leaves.push(Leaf { name: child.name.into(), pin, stat });
        }
        Ok(leaves)
    }

    /// Publishes finished copies, unless somebody else was first or their names are gone.
    fn publish_batch(&self, upper: &Upper, mut batch: Vec<Staging<'_>>) -> Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        if !self.volatile {
            upper.sync()?;
        }
        // A parent comes as a whole unless a child has called for it.
        batch.sort_by_key(|staging| staging.order);
        batch.into_iter().try_for_each(|staging| self.publish_staging(upper, staging))
    }

    /// Marks a directory opaque if its upper part holds all that it shows; tells whether it does.
    fn seal(&self, upper: &Upper, node: &Arc<Node>) -> Result<bool> {
        let dir = lock::directory(node)?;
        let mut names = dir.names.write();
        if dir.lowers().is_empty() || node.place.read().gone {
            return Ok(true);
        }
        let part = dir.upper.get().ok_or(Errno::STALE)?;
        let listing = self.load(dir, &mut names)?;
        let mut hidden = Vec::new();
        for child in listing.children() {
            // Only this mount itself makes metacopies meanwhile.
            let may_lack = self.metacopy && child.kind == FileType::Regular;
            if child.top == UPPER && child.kind != FileType::Directory && !may_lack {
                continue;
            }
            match self.find_child(dir, &child)? {
                Some(found) if has_lower(&found) => return Ok(false),
                Some(found) if self.lacks_data(dir, &child, &found)? => return Ok(false),
                Some(_) => {}
                None => hidden.push(Box::from(child.name)),
            }
        }
        self.complete_origin(upper, node, dir)?;
        // First, so that a lookup after the mark finds the number.
        self.numbers.keep(part.device, part.inode, node.ino);
        node.place.write().object = (part.device, part.inode);
        part.with("setxattr", |dir| upper.work.set_opaque_handle(dir))?;
        self.drop_redirect(upper, part);
        dir.seal();
        for name in hidden {
            listing.remove(&name, false);
        }
        let whiteouts = listing.seal();
        if whiteouts.is_empty() {
            return Ok(true);
        }
        // They hide nothing any more; one that stays does no harm.
        let before = part.stat()?;
        for name in whiteouts {
            if let Err(error) = part.call("unlinkat", &name, sys::name::unlink) {
                tracing::warn!("a needless whiteout stays: {error}");
            }
        }
        let times = times_of(&before);
        part.with("utimensat", |dir| sys::name::set_times_handle(dir, &times))?;
        Ok(true)
    }
}

/// Tells whether some of an object lies in a lower layer.
fn has_lower(found: &Found) -> bool {
    found.layer != UPPER || found.parts.iter().any(|part| part.layer.index != UPPER)
}

impl Upper {
    /// Makes everything durable that was written to the upper's filesystem.
    fn sync(&self) -> Result<()> {
        self.work.dir.with("syncfs", |dir| {
            let dir = sys::open::directory(dir, b".")?;
            rustix::fs::syncfs(dir.as_fd())
        })
    }
}
