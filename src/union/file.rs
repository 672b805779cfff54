//! File data. I/O is by node: every open of a file uses the one handle that the node has, so an
//! open made before a copy-up sees what is written after it.
//!
//! Handles of files that are open stay open; those of others, and all of them where opens are no
//! requests, are kept up to a bound, those used lately rather than others. No lock is held over
//! reading or writing.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FallocateFlags, OFlags, SeekFrom};

use super::attr::{FileType, Writer};
use super::copy_up::Extent;
use super::node::{Node, NodeId, end_open};
use super::protect::Change;
use super::{Leaf, Union};
use crate::error::{Context, Errno, Error, Result};
use crate::layer::{self, UPPER};
use crate::sys;
use crate::sys::xattr::CAPABILITY;

/// An open file behind a node.
#[derive(Debug)]
pub struct Data {
    pub(crate) file: OwnedFd,
    /// Open for writing; then it is the upper object.
    writable: bool,
    /// The data of another file, which it lends to a metacopy: its attributes are not those of the
    /// node.
    pub(super) lent: bool,
    /// The layer that the object of the node lies in.
    pub(super) layer: layer::Index,
    /// It was used since the bounded list of handles last looked.
    used: AtomicBool,
    /// splice(2) has refused it.
    unspliceable: AtomicBool,
}

impl AsFd for Data {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Data {
    /// A file that we made, open for reading and writing.
    pub(crate) fn new(file: OwnedFd) -> Self {
        Self { writable: true, ..Self::reading(file, UPPER) }
    }

    fn reading(file: OwnedFd, layer: layer::Index) -> Self {
        let (used, unspliceable) = (AtomicBool::new(false), AtomicBool::new(false));
        Self { file, writable: false, lent: false, layer, used, unspliceable }
    }

    /// Tells whether splice(2) may be tried with it.
    pub(crate) fn may_splice(&self) -> bool {
        !self.unspliceable.load(Ordering::Relaxed)
    }

    /// Takes note that splice(2) does not work with it.
    pub(crate) fn cannot_splice(&self) {
        self.unspliceable.store(true, Ordering::Relaxed);
    }

    /// Hands it out: it is one used lately from now on.
    fn hand_out(self: &Arc<Self>) -> Arc<Self> {
        // Most of the time it is so already, and a line of the cache is not fought for.
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
        }
        Arc::clone(self)
    }
}

/// What a write did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Bytes stored; fewer than asked for only where the next one failed.
    pub bytes: usize,
    /// Setuid or setgid was cleared, which whoever remembers the mode must learn.
    pub mode_changed: bool,
}

/// What lseek(2) looks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Whence {
    /// `SEEK_DATA`.
    Data,
    /// `SEEK_HOLE`.
    Hole,
}

/// How many handles that were used lately are passed over in search of one to close.
const SECOND_CHANCES: u32 = 16;

/// How a message names what is only known by its handle.
const OPEN_FILE: &str = "an open file";

impl Union {
    /// Opens a file: from here to [`Union::release_file`] its data can be reached, whatever happens
    /// to its name or mode. A lower file is not copied up before it is written.
    ///
    /// # Errors
    /// `EROFS` for writing without an upper; those of openat(2).
    pub fn open_file(&self, node: NodeId, write: bool) -> Result<()> {
        let node = self.node(node)?;
        if write {
            self.writable()?;
            self.may(&node, Change::Touch)?;
        }
        node.opened.fetch_add(1, Ordering::AcqRel);
        if node.kind != FileType::Regular {
            return Ok(());
        }
        let opened = if write && node.is_upper() {
            self.writable_data(&node).map(|_| ())
        } else if self.uid != 0 {
            // Later its mode may forbid us to.
            self.readable_data(&node).map(|_| ())
        } else {
            Ok(())
        };
        opened.inspect_err(|_| self.unpin(&node))
    }

    /// Returns how many opens of a node there are.
    #[cfg(test)]
    pub fn opens(&self, node: NodeId) -> u64 {
        let Some(node) = self.table.get(node) else { return 0 };
        let of_dir = node.dir.as_ref().map_or(0, |dir| dir.opened.load(Ordering::Acquire));
        u64::from(node.opened.load(Ordering::Acquire) + of_dir)
    }

    /// Ends what [`Union::open_file`] or [`Union::create`] began.
    pub fn release_file(&self, node: NodeId) {
        if let Some(node) = self.table.get(node) {
            self.unpin(&node);
        }
    }

    fn unpin(&self, node: &Arc<Node>) {
        if end_open(&node.opened) && node.data.lock().is_some() {
            self.note_data(node);
        }
    }

    /// Takes note that `node` has a data handle; closes the one not used for longest.
    pub(super) fn note_data(&self, node: &Node) {
        let mut next = node.id;
        for chances in (0..SECOND_CHANCES).rev() {
            let evicted = self.idle.lock().push(next, ());
            let Some((id, ())) = evicted.filter(|(id, ())| *id != next) else { return };
            let Some(node) = self.table.get(id) else { return };
            let mut data = node.data.lock();
            let is_used = |data: &Arc<Data>| data.used.swap(false, Ordering::Relaxed);
            if chances > 0 && data.as_ref().is_some_and(is_used) {
                next = id;
                continue;
            }
            let closed = if node.is_opened() { None } else { data.take() };
            drop(data);
            drop(closed);
            return;
        }
    }

    /// Returns a handle that can be read from.
    pub(super) fn readable_data(&self, node: &Arc<Node>) -> Result<Arc<Data>> {
        if let Some(data) = &*node.data.lock() {
            return Ok(data.hand_out());
        }
        self.open_data(node, false)
    }

    /// Returns a handle of the upper object that can be read from and written to.
    pub(super) fn writable_data(&self, node: &Arc<Node>) -> Result<Arc<Data>> {
        if let Some(data) = node.data.lock().as_ref().filter(|data| data.writable) {
            return Ok(data.hand_out());
        }
        self.open_data(node, true)
    }

    fn open_data(&self, node: &Arc<Node>, writable: bool) -> Result<Arc<Data>> {
        if node.kind != FileType::Regular {
            return Err(if node.dir.is_some() { Errno::ISDIR } else { Errno::INVAL }.into());
        }
        let (mut data, opened) = loop {
            let was_upper = node.is_upper();
            let opened = self.open_leaf(node, writable)?;
            let data = node.data.lock();
            if let Some(data) = data.as_ref().filter(|data| data.writable || !writable) {
                return Ok(Arc::clone(data));
            }
            // Copied up while we opened the lower file, or given its own data? Then that is no
            // longer the one.
            let outdated = opened.lent && node.known.is_whole();
            if node.is_upper() == was_upper && !outdated {
                break (data, opened);
            }
        };
        let opened = Arc::new(opened);
        let old = data.replace(Arc::clone(&opened));
        drop(data);
        drop(old);
        self.note_data(node);
        Ok(opened)
    }

    /// Returns the file that holds the data of a node, if whoever may write it may do so without us:
    /// no copy-up will ever replace it (it is in the upper layer, or there is none), and a store
    /// through a mapping, of which nobody hears, has no capabilities to take away.
    ///
    /// # Errors
    /// `ESTALE` for an unknown node; those of openat(2) and [`Union::getxattr`].
    pub fn provider(&self, id: NodeId) -> Result<Option<Arc<Data>>> {
        let node = self.node(id)?;
        if node.kind != FileType::Regular || self.upper.is_some() && !node.is_upper() {
            return Ok(None);
        }
        let data = self.readable_data(&node)?;
        // What a lower lends to a file of the upper is replaced by a copy one day.
        let ours = self.upper.is_some() && (data.lent || self.getxattr(id, CAPABILITY)?.is_some());
        Ok((!ours).then_some(data))
    }

    /// Tells whether `node` lies in the upper layer.
    ///
    /// # Errors
    /// `ESTALE` for an unknown node.
    pub fn is_upper(&self, node: NodeId) -> Result<bool> {
        self.node(node).map(|node| node.is_upper())
    }

    /// Returns a handle to copy a lower file from once, which need not be kept.
    pub(super) fn source_data(&self, node: &Arc<Node>) -> Result<Arc<Data>> {
        if let Some(data) = &*node.data.lock() {
            return Ok(Arc::clone(data));
        }
        self.open_leaf(node, false).map(Arc::new)
    }

    /// Opens the data of a regular file, whoever has it.
    fn open_leaf(&self, node: &Arc<Node>, writable: bool) -> Result<Data> {
        let layer = self.layer_of(node);
        let is_upper = layer == UPPER;
        if is_upper && writable {
            self.own_data(node, Extent::All)?;
        }
        let file = self.open_itself(node, writable)?;
        if is_upper && node.known.is_whole() {
            return Ok(Data { writable, ..Data::reading(file, layer) });
        }
        if let Some(data) = self.lent_data(node, file.as_fd())? {
            return Ok(Data { lent: true, ..Data::reading(data, layer) });
        }
        if is_upper {
            node.known.set_whole(true);
        }
        Ok(Data { writable, ..Data::reading(file, layer) })
    }

    /// Opens the regular file of a node, be it a metacopy.
    pub(super) fn open_itself(&self, node: &Arc<Node>, writable: bool) -> Result<OwnedFd> {
        let open = || {
            self.with_leaf(node, "openat", |leaf| match (leaf, writable) {
                (Leaf::Handle(fd), false) => sys::open::reopen(fd, OFlags::RDONLY),
                (Leaf::Handle(fd), true) => sys::open::reopen(fd, OFlags::RDWR),
                (Leaf::Name(at), false) => sys::open::reader(at.dir, at.name),
                (Leaf::Name(at), true) => sys::open::writer(at.dir, at.name),
            })
        };
        match open() {
            Err(error) if matches!(error.errno(), Errno::MFILE | Errno::NFILE) => {
                self.close_idle();
                open()
            }
            opened => opened,
        }
    }

    /// Closes what nobody has open, after the process ran out of descriptors.
    fn close_idle(&self) {
        loop {
            let Some((id, ())) = self.idle.lock().pop_lru() else { break };
            if let Some(node) = self.table.get(id)
                && !node.is_opened()
                && let Some(mut data) = node.data.try_lock()
            {
                data.take();
            }
        }
        self.handles.shrink();
    }

    /// Returns the file that the data of a node is read from now.
    ///
    /// # Errors
    /// `ESTALE` for an unknown node; those of openat(2).
    pub fn readable(&self, node: NodeId) -> Result<Arc<Data>> {
        let node = self.node(node)?;
        self.readable_data(&node)
    }

    /// Reads at `offset`; fewer bytes than asked for mean the end of the file.
    ///
    /// # Errors
    /// Those of openat(2) and pread(2).
    pub fn read(&self, node: NodeId, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let node = self.node(node)?;
        let data = self.readable_data(&node)?;
        let read = match sys::data::read_at(data.file.as_fd(), buffer, offset) {
            // The server of a network filesystem has lost it; its name may still lead to it.
            Err(Errno::STALE) => {
                let lost = node.data.lock().take();
                drop(lost);
                let data = self.readable_data(&node)?;
                sys::data::read_at(data.file.as_fd(), buffer, offset)
            }
            read => read,
        };
        read.at("pread", || OPEN_FILE)
    }

    /// Writes at `offset`; a lower file is copied up first.
    ///
    /// `kill_privileges`: the writer, who may not keep setuid and setgid bits.
    ///
    /// # Errors
    /// `EROFS` without an upper; those of the copy-up and of pwrite(2).
    pub fn write(
        &self,
        node: NodeId,
        offset: u64,
        content: &[u8],
        kill_privileges: Option<Writer>,
    ) -> Result<Written> {
        let node = self.node(node)?;
        let data = self.change_data(&node, Change::Data(offset))?;
        let mode_changed = match kill_privileges {
            Some(writer) => self.kill_privileges(&node, &data, writer)?,
            None => false,
        };
        let bytes =
            sys::data::write_at(data.file.as_fd(), content, offset).at("pwrite", || OPEN_FILE)?;
        Ok(Written { bytes, mode_changed })
    }

    /// Returns a handle of the upper object, whose names all lead to the upper too.
    fn change_data(&self, node: &Arc<Node>, change: Change) -> Result<Arc<Data>> {
        self.writable()?;
        self.may(node, change)?;
        let open = match node.links.get() {
            None => node.data.lock().as_ref().filter(|data| data.writable).map(Data::hand_out),
            Some(_) => None,
        };
        let data = match open {
            Some(data) => data,
            None => {
                self.copy_up(node, Extent::All)?;
                self.writable_data(node)?
            }
        };
        self.drop_overridden_capability(node, &data)?;
        Ok(data)
    }

    /// Makes a file durable. A lower file is so already.
    ///
    /// # Errors
    /// `EIO`, `ENOSPC`, `EDQUOT` as the filesystem reports them.
    pub fn fsync(&self, node: NodeId, data_only: bool) -> Result<()> {
        let node = self.node(node)?;
        if self.volatile || !node.is_upper() {
            return Ok(());
        }
        let data = self.readable_data(&node)?;
        if data.lent {
            let file = self.open_itself(&node, false)?;
            return sys::data::sync(file.as_fd(), data_only).at("fsync", || OPEN_FILE);
        }
        sys::data::sync(data.file.as_fd(), data_only).at("fsync", || OPEN_FILE)
    }

    /// fallocate(2): allocates, punches, zeroes or collapses a range.
    ///
    /// # Errors
    /// `EROFS` without an upper; those of the copy-up and of fallocate(2).
    pub fn fallocate(&self, node: NodeId, mode: u32, offset: u64, len: u64) -> Result<()> {
        let node = self.node(node)?;
        let flags = FallocateFlags::from_bits_retain(mode);
        let only_adds = (FallocateFlags::KEEP_SIZE).contains(flags);
        let change = if only_adds { Change::Touch } else { Change::Attributes };
        let data = self.change_data(&node, change)?;
        rustix::io::retry_on_intr(|| rustix::fs::fallocate(&data.file, flags, offset, len))
            .at("fallocate", || OPEN_FILE)
    }

    /// Finds the next data or hole from `offset` on.
    ///
    /// # Errors
    /// `ENXIO` past the end; those of lseek(2).
    pub fn lseek(&self, node: NodeId, offset: u64, whence: Whence) -> Result<u64> {
        let node = self.node(node)?;
        let data = self.readable_data(&node)?;
        let to = match whence {
            Whence::Data => SeekFrom::Data(offset),
            Whence::Hole => SeekFrom::Hole(offset),
        };
        rustix::fs::seek(&data.file, to).map_err(Error::Refused)
    }

    /// Copies a range within the union; returns the bytes copied, fewer at the end of the source.
    ///
    /// # Errors
    /// `EROFS` without an upper; those of the copy-up, of copy_file_range(2) and of reading and
    /// writing where two filesystems have no common way.
    pub fn copy_file_range(
        &self,
        from: NodeId,
        from_offset: u64,
        to: NodeId,
        to_offset: u64,
        len: u64,
    ) -> Result<usize> {
        let (from, to) = (self.node(from)?, self.node(to)?);
        // First, because both may be one file.
        let target = self.change_data(&to, Change::Data(to_offset))?;
        let source = self.readable_data(&from)?;
        let len = usize::try_from(len).unwrap_or(usize::MAX).min(1 << 30);
        sys::data::copy_range(
            (source.file.as_fd(), from_offset),
            (target.file.as_fd(), to_offset),
            len,
        )
        .at("copy_file_range", || OPEN_FILE)
    }
}
