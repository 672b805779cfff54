//! Directories: opening and listing.

use super::{Answer, Dispatcher, Keep};
use crate::error::{Errno, Result};
use crate::options::IoMode;
use crate::union::{DirEntry, Entry, NodeId, Visit};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// For directories.
const KEEP_DIRECTORY: Keep = Keep { pages: true, listing: true, no_flush: false };

impl Dispatcher {
    /// Makes the names in a directory durable.
    ///
    /// # Errors
    /// `ENOSYS` on a volatile mount, as [`fsync`](Self::fsync).
    pub(in super::super) fn fsyncdir(&self, node: NodeId) -> Answer<()> {
        if self.volatile {
            return Err(Errno::NOSYS);
        }
        self.run("fsyncdir", node, b"", || self.union.sync_dir(node))
    }

    /// Opens a directory.
    ///
    /// # Errors
    /// `ENOSYS` where opens are no requests; the kernel asks once.
    pub(in super::super) fn opendir(&self, node: NodeId) -> Answer<Keep> {
        self.opens()?;
        self.run("opendir", node, b"", || self.union.open_dir(node).map(|()| KEEP_DIRECTORY))
    }

    /// Ends one open of a directory.
    pub(in super::super) fn releasedir(&self, node: NodeId) -> Answer<()> {
        if self.io == IoMode::NoOpen {
            return Ok(());
        }
        self.run("releasedir", node, b"", || {
            self.union.release_dir(node);
            Ok(())
        })
    }

    /// Lists a directory from `offset` on until `visit` is full.
    ///
    /// A failure after the first entry is left to the next call, which will meet it first.
    pub(in super::super) fn readdir(
        &self,
        node: NodeId,
        offset: u64,
        visit: &mut dyn FnMut(DirEntry<'_>) -> Visit,
    ) -> Answer<()> {
        let mut taken = false;
        self.run("readdir", node, b"", || {
            let listed = self.union.readdir(node, offset, &mut |entry| {
                let visited = visit(entry);
                taken |= visited == Visit::Taken;
                visited
            });
            unless_taken(listed, taken)
        })
    }

    /// Lists a directory with its entries, each of which counts as looked up once taken.
    ///
    /// A failure after the first entry is left to the next call: the reply must go out, or the
    /// kernel would never give those lookups back.
    pub(in super::super) fn readdirplus(
        &self,
        node: NodeId,
        offset: u64,
        visit: &mut dyn FnMut(DirEntry<'_>, Option<&Entry>) -> Visit,
    ) -> Answer<()> {
        let mut taken = false;
        self.run("readdirplus", node, b"", || {
            let listed = self.union.readdirplus(node, offset, &mut |name, entry| {
                let visited = visit(name, entry);
                taken |= visited == Visit::Taken;
                visited
            });
            unless_taken(listed, taken)
        })
    }

    /// Reads what a walk will ask for next; to be called when the answer is out.
    pub(in super::super) fn read_ahead(&self) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.union.read_ahead())) {
            self.panicked("read_ahead", &*panic);
        }
    }

    /// Ends that in another thread.
    pub(in super::super) fn end_reading_ahead(&self) {
        self.union.end_reading_ahead();
    }
}

/// Forgets the failure of a listing that has entries to show.
fn unless_taken(listed: Result<()>, taken: bool) -> Result<()> {
    if taken { Ok(()) } else { listed }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_with_entries_hides_its_failure() {
        assert!(unless_taken(Err(Errno::IO.into()), true).is_ok());
        assert!(unless_taken(Err(Errno::IO.into()), false).is_err());
        assert!(unless_taken(Ok(()), false).is_ok());
    }
}
