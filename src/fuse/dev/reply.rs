//! Replies, put together in one buffer of a worker so that each is one write(2) and none allocates.

use super::abi;
use super::pipe::{Filled, Pipes};
use crate::error::Errno;
use crate::union::NodeId;
use std::sync::Arc;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Bytes of the header that every reply begins with.
pub(super) const HEADER: usize = size_of::<abi::OutHeader>();

/// Names of a listing are padded to a multiple of this.
const ALIGN: usize = 8;

/// A reply in the making.
#[derive(Debug)]
pub(super) struct Reply {
    buffer: Box<[u8]>,
    /// Where the header stands.
    start: usize,
    /// Where the bytes in use end.
    len: usize,
    /// To be taken back should this reply not arrive.
    pub(super) gives: Gives,
    /// For large reads, where what carries the reply can send them.
    pipes: Option<Arc<Pipes>>,
    /// Takes the place of the buffer.
    filled: Option<Filled>,
}

/// What a reply gives to the kernel, which takes it back later by requests of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Gives {
    /// A lookup of this node.
    pub(super) lookup: Option<NodeId>,
    /// An open of this file.
    pub(super) open: Option<NodeId>,
    /// An open of this directory.
    pub(super) open_dir: Option<NodeId>,
    /// A lookup of each node in the listing that is the reply.
    pub(super) listed: bool,
}

impl Reply {
    /// Returns a buffer for replies with up to `capacity` bytes beside the header.
    ///
    /// Its memory is zeroed by the system when it is first touched, so what is never used costs
    /// nothing.
    pub(super) fn new(capacity: usize) -> Self {
        let buffer = vec![0; HEADER + capacity].into_boxed_slice();
        Self::over(buffer, 0)
    }

    /// Returns a reply in `buffer`, with its header at `start`.
    pub(super) fn over(buffer: Box<[u8]>, start: usize) -> Self {
        Self {
            buffer,
            start,
            len: start + HEADER,
            gives: Gives::default(),
            pipes: None,
            filled: None,
        }
    }

    /// Lets large reads go by a pipe.
    pub(super) fn with_pipes(self, pipes: Arc<Pipes>) -> Self {
        Self { pipes: Some(pipes), ..self }
    }

    /// Returns the pipes, if there may be some.
    pub(super) const fn pipes(&self) -> Option<&Arc<Pipes>> {
        self.pipes.as_ref()
    }

    /// Puts the whole reply.
    pub(super) fn fill(&mut self, filled: Filled) {
        self.filled = Some(filled);
    }

    /// Returns what is to be sent in place of the bytes.
    pub(super) const fn take_filled(&mut self) -> Option<Filled> {
        self.filled.take()
    }

    /// Returns the buffer.
    pub(super) fn into_buffer(self) -> Box<[u8]> {
        self.buffer
    }

    /// Forgets what was put.
    pub(super) fn clear(&mut self) {
        self.len = self.start + HEADER;
        self.gives = Gives::default();
        self.filled = None;
    }

    /// Returns what was completed.
    pub(super) fn bytes(&self) -> &[u8] {
        self.buffer.get(self.start..self.len).unwrap_or_default()
    }

    /// Appends a structure; what does not fit is left out, and told by `false`.
    pub(super) fn put(&mut self, value: &(impl IntoBytes + Immutable)) -> bool {
        self.put_bytes(value.as_bytes())
    }

    /// Appends bytes; what does not fit is left out, and told by `false`.
    pub(super) fn put_bytes(&mut self, bytes: &[u8]) -> bool {
        let end = self.len + bytes.len();
        match self.buffer.get_mut(self.len..end) {
            Some(room) => room.copy_from_slice(bytes),
            None => return false,
        }
        self.len = end;
        true
    }

    /// Returns room for up to `size` bytes to be written in place; [`Reply::took`] says how many
    /// were.
    pub(super) fn room(&mut self, size: usize) -> Option<&mut [u8]> {
        self.buffer.get_mut(self.len..self.len.checked_add(size)?)
    }

    /// Takes the first `count` bytes of the room into the reply.
    pub(super) fn took(&mut self, count: usize) {
        self.len = self.buffer.len().min(self.len.saturating_add(count));
    }

    /// Returns how many bytes follow the header.
    pub(super) fn payload(&self) -> usize {
        self.len - self.start - HEADER
    }

    /// Appends one name of a listing whose names take up to `limit` bytes, with its entry if it has
    /// one; `false` and no change if it does not fit.
    pub(super) fn put_name(
        &mut self,
        limit: usize,
        entry: Option<&abi::EntryOut>,
        dirent: &abi::Dirent,
        name: &[u8],
    ) -> bool {
        let before = self.len;
        let padding = name.len().next_multiple_of(ALIGN) - name.len();
        let put = entry.is_none_or(|entry| self.put(entry))
            && self.put(dirent)
            && self.put_bytes(name)
            && self.put_bytes([0; ALIGN].get(..padding).unwrap_or_default())
            && self.payload() <= limit;
        if !put {
            self.len = before;
        }
        put
    }

    /// The nodes of a listing with entries.
    pub(super) fn listed(&self) -> impl Iterator<Item = NodeId> {
        let mut rest = self.buffer.get(self.start + HEADER..self.len).unwrap_or_default();
        std::iter::from_fn(move || {
            let (entry, after) = abi::EntryOut::read_from_prefix(rest).ok()?;
            let (dirent, after) = abi::Dirent::read_from_prefix(after).ok()?;
            let name = usize::try_from(dirent.namelen).ok()?.next_multiple_of(ALIGN);
            rest = after.get(name..)?;
            Some(NodeId(entry.nodeid))
        })
        // Names without an entry.
        .filter(|node| node.0 != 0)
    }

    /// Completes the reply to request `unique` and returns its bytes.
    pub(super) fn finish(&mut self, unique: u64) -> &[u8] {
        self.finish_with(unique, 0)
    }

    /// Completes the reply as a refusal, which has nothing but its number.
    pub(super) fn refuse(&mut self, unique: u64, number: i32) -> &[u8] {
        self.len = self.start + HEADER;
        self.finish_with(unique, -number)
    }

    /// Completes the reply as a refusal of the request in `bytes`, whose answer was not taken.
    pub(super) fn refuse_request(&mut self, bytes: &[u8]) -> Option<&[u8]> {
        let (header, _) = abi::InHeader::read_from_prefix(bytes).ok()?;
        Some(self.refuse(header.unique, Errno::IO.raw_os_error()))
    }

    fn finish_with(&mut self, unique: u64, error: i32) -> &[u8] {
        // No buffer is as large as that.
        let len = u32::try_from(self.len - self.start).unwrap_or(u32::MAX);
        let header = abi::OutHeader { len, error, unique };
        if let Some(room) = self.buffer.get_mut(self.start..self.start + HEADER) {
            room.copy_from_slice(header.as_bytes());
        }
        self.bytes()
    }
}
