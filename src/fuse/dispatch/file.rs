//! Files: opening, data, and space.

use super::{Answer, Dispatcher, Keep};
use crate::error::Errno;
use crate::options::IoMode;
use crate::union::{Caller, Data, Entry, NodeId, Whence, Writer, Written};
use std::sync::Arc;

/// For files: all opens of a node share one page cache, and writes are answered when they are done.
const KEEP_FILE: Keep = Keep { pages: true, listing: false, no_flush: true };

impl Dispatcher {
    /// Opens a file, for writing too if `write`.
    ///
    /// # Errors
    /// `ENOSYS` where opens are no requests; the kernel asks once.
    pub(in super::super) fn open(&self, node: NodeId, write: bool) -> Answer<Keep> {
        self.opens()?;
        self.run("open", node, b"", || self.union.open_file(node, write).map(|()| KEEP_FILE))
    }

    /// Creates a regular file that must not exist, and opens it.
    ///
    /// # Errors
    /// `ENOSYS` where opens are no requests; the kernel sends MKNOD then, now and later.
    pub(in super::super) fn create(
        &self,
        caller: &Caller,
        parent: NodeId,
        name: &[u8],
        mode: u32,
    ) -> Answer<(Entry, Keep)> {
        self.opens()?;
        self.run("create", parent, name, || {
            self.union.create(caller, parent, name, mode).map(|entry| (entry, KEEP_FILE))
        })
    }

    /// Creates a regular file without a name, and opens it.
    pub(in super::super) fn tmpfile(
        &self,
        caller: &Caller,
        parent: NodeId,
        mode: u32,
    ) -> Answer<(Entry, Keep)> {
        self.run("tmpfile", parent, b"", || {
            let entry = self.union.tmpfile(caller, parent, mode)?;
            if self.io == IoMode::NoOpen {
                self.union.release_file(entry.node);
            }
            Ok((entry, KEEP_FILE))
        })
    }

    /// Returns the file that holds the data of a node, if no other will ever take its place.
    pub(in super::super) fn provider(&self, node: NodeId) -> Option<Arc<Data>> {
        self.run("provider", node, b"", || self.union.provider(node)).unwrap_or_default()
    }

    /// Returns a file to read the data of a node from, for whoever reads without [`Dispatcher::read`].
    pub(in super::super) fn readable(&self, node: NodeId) -> Answer<Arc<Data>> {
        self.run("read", node, b"", || self.union.readable(node))
    }

    /// Ends one open of a file.
    pub(in super::super) fn release(&self, node: NodeId) -> Answer<()> {
        if self.io == IoMode::NoOpen {
            return Ok(());
        }
        self.run("release", node, b"", || {
            self.union.release_file(node);
            Ok(())
        })
    }

    /// Reads into `buf`; fewer bytes than it has room for mean the end of the file.
    pub(in super::super) fn read(
        &self,
        node: NodeId,
        offset: u64,
        buf: &mut [u8],
    ) -> Answer<usize> {
        self.run("read", node, b"", || self.union.read(node, offset, buf))
    }

    /// Writes `data`; `kill_privileges` takes the setuid and setgid bits away with it. What the kernel
    /// has `collected` does not change the modification time, which is the kernel's to tell.
    pub(in super::super) fn write(
        &self,
        node: NodeId,
        offset: u64,
        data: &[u8],
        kill_privileges: Option<Writer>,
        collected: bool,
    ) -> Answer<Written> {
        self.run("write", node, b"", || {
            if collected {
                self.union.hold_modified(node)?;
            }
            let written = self.union.write(node, offset, data, kill_privileges)?;
            // What was written is written, whether or not its time can be given back.
            if collected && let Err(error) = self.union.restore_modified(node) {
                tracing::debug!("a modification time is not restored after a write: {error}");
            }
            Ok(written)
        })
    }

    /// Answers a close(2): nothing was held back, so there is nothing to report.
    ///
    /// # Errors
    /// `ENOSYS`: the kernel takes it for success and never asks again.
    #[expect(clippy::unused_self, reason = "a request like the others")]
    pub(in super::super) const fn flush(&self) -> Answer<()> {
        Err(Errno::NOSYS)
    }

    /// Makes a file durable.
    ///
    /// # Errors
    /// `ENOSYS` on a volatile mount: the kernel takes it for success and never asks again.
    pub(in super::super) fn fsync(&self, node: NodeId, data_only: bool) -> Answer<()> {
        if self.volatile {
            return Err(Errno::NOSYS);
        }
        self.run("fsync", node, b"", || self.union.fsync(node, data_only))
    }

    /// Takes setuid and setgid away before a change by somebody who may not keep them; tells whether
    /// the mode changed.
    pub(in super::super) fn drop_privileges(&self, node: NodeId, writer: Writer) -> Answer<bool> {
        self.run("drop_privileges", node, b"", || self.union.drop_privileges(node, writer))
    }

    /// Allocates, punches or shifts space, as fallocate(2).
    pub(in super::super) fn fallocate(
        &self,
        node: NodeId,
        mode: u32,
        offset: u64,
        len: u64,
    ) -> Answer<()> {
        self.run("fallocate", node, b"", || self.union.fallocate(node, mode, offset, len))
    }

    /// Finds the next data or hole, as lseek(2).
    ///
    /// # Errors
    /// `ENOSYS` where the kernel may have data that we have not seen: it then takes all of a file for
    /// data. `ENXIO` beyond the end; `EINVAL` for another `whence`, which the kernel never sends.
    pub(in super::super) fn lseek(&self, node: NodeId, offset: i64, whence: i32) -> Answer<i64> {
        if self.writeback {
            return Err(Errno::NOSYS);
        }
        self.run("lseek", node, b"", || {
            let whence = match whence {
                libc::SEEK_DATA => Whence::Data,
                libc::SEEK_HOLE => Whence::Hole,
                _ => return Err(Errno::INVAL.into()),
            };
            let Ok(offset) = u64::try_from(offset) else {
                return Err(Errno::NXIO.into());
            };
            let found = self.union.lseek(node, offset, whence)?;
            i64::try_from(found).map_err(|_too_far| Errno::OVERFLOW.into())
        })
    }

    /// Copies between files, as copy_file_range(2); may copy less than `len`.
    ///
    /// # Errors
    /// `EINVAL` for flags, of which there are none yet.
    pub(in super::super) fn copy_file_range(
        &self,
        from: NodeId,
        from_offset: u64,
        to: NodeId,
        to_offset: u64,
        len: u64,
        flags: u64,
    ) -> Answer<usize> {
        self.run("copy_file_range", from, b"", || {
            if flags != 0 {
                return Err(Errno::INVAL.into());
            }
            self.union.copy_file_range(from, from_offset, to, to_offset, len)
        })
    }
}
