//! Files whose data the kernel takes straight from beneath (`FOPEN_PASSTHROUGH`).
//!
//! While somebody has a file open, the kernel allows one kind of open alone, and one file beneath.
//! So the first open decides for all until the last is released; a file that is copied up meanwhile
//! goes on through the server. Only what no copy-up will ever replace is handed to the kernel: it
//! would write into a lower layer otherwise.
//!
//! Locks: one, over the ioctls that register a file.

use super::notify::Notifier;
use crate::sys::fuse_device;
use crate::union::NodeId;
use lru::LruCache;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// Files registered with the kernel that nobody has open.
const IDLE_MAX: usize = 256;

/// A file registered with the kernel; taken back when dropped.
#[derive(Debug)]
struct Backing {
    device: Arc<OwnedFd>,
    id: i32,
}

impl Drop for Backing {
    fn drop(&mut self) {
        if let Err(error) = fuse_device::close_backing(self.device.as_fd(), self.id) {
            tracing::debug!(%error, "a file beneath stays registered until the end of the mount");
        }
    }
}

/// How a file is open just now.
#[derive(Debug)]
struct Open {
    /// Opens that were not released yet.
    count: usize,
    /// What the kernel has; `None` where all goes through the server.
    backing: Option<Backing>,
    /// Somebody may write past us, so that we cannot tell the kernel when times change.
    written: bool,
    /// What the kernel has is not kept for the next open.
    outdated: bool,
}

/// How the files of a mount are open.
#[derive(Debug)]
pub(super) struct Passthrough {
    device: Arc<OwnedFd>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    open: HashMap<NodeId, Open>,
    idle: LruCache<NodeId, Backing>,
}

impl Passthrough {
    /// For the mount that `device` serves.
    pub(super) fn new(device: Arc<OwnedFd>) -> Self {
        let idle = NonZeroUsize::new(IDLE_MAX).unwrap_or(NonZeroUsize::MIN);
        let state = State { open: HashMap::new(), idle: LruCache::new(idle) };
        Self { device, state: Mutex::new(state) }
    }

    /// Counts an open of `node`, and returns the number to answer it by if the kernel shall serve it.
    ///
    /// `provider` returns the file beneath, if no other will ever take its place.
    pub(super) fn opened<F: AsFd>(
        &self,
        node: NodeId,
        write: bool,
        provider: impl FnOnce() -> Option<F>,
    ) -> Option<i32> {
        let mut state = self.state.lock();
        if let Some(open) = state.open.get_mut(&node) {
            open.count += 1;
            open.written |= write;
            return open.backing.as_ref().map(|backing| backing.id);
        }
        let kept = state.idle.pop(&node);
        let backing = kept.or_else(|| self.register(provider()?.as_fd()));
        let id = backing.as_ref().map(|backing| backing.id);
        state.open.insert(node, Open { count: 1, backing, written: write, outdated: false });
        id
    }

    fn register(&self, file: BorrowedFd<'_>) -> Option<Backing> {
        match fuse_device::open_backing(self.device.as_fd(), file) {
            Ok(id) => Some(Backing { device: Arc::clone(&self.device), id }),
            Err(error) => {
                // ELOOP: the layer lies on stacked filesystems itself. All others pass as well.
                tracing::debug!(%error, "the kernel does not take a file; the server reads it");
                None
            }
        }
    }

    /// Counts an open less.
    pub(super) fn released(&self, node: NodeId, notifier: &Notifier) {
        let mut state = self.state.lock();
        let Some(open) = state.open.get_mut(&node) else { return };
        open.count = open.count.saturating_sub(1);
        if open.count > 0 {
            return;
        }
        let Some(Open { backing: Some(backing), written, outdated, .. }) = state.open.remove(&node)
        else {
            return;
        };
        let dropped = if outdated { Some((node, backing)) } else { state.idle.push(node, backing) };
        drop(state);
        drop(dropped);
        if written {
            notifier.forget_attributes(node);
        }
    }

    /// Tells whether `node` may be written past us.
    pub(super) fn is_written(&self, node: NodeId) -> bool {
        let state = self.state.lock();
        state.open.get(&node).is_some_and(|open| open.written && open.backing.is_some())
    }

    /// Has the next first open of `node` ask once more whether the kernel may serve it.
    pub(super) fn ask_again(&self, node: NodeId) {
        let mut state = self.state.lock();
        if let Some(open) = state.open.get_mut(&node) {
            open.outdated = true;
        }
        let dropped = state.idle.pop(&node);
        drop(state);
        drop(dropped);
    }

    /// Has `node` open once, with a file that no kernel has registered.
    #[cfg(test)]
    pub(super) fn pretend_open(&self, node: NodeId) {
        let backing = Some(Backing { device: Arc::clone(&self.device), id: -1 });
        let open = Open { count: 1, backing, written: true, outdated: false };
        self.state.lock().open.insert(node, open);
    }

    /// Returns how many files nobody has open are registered.
    #[cfg(test)]
    pub(super) fn idle(&self) -> usize {
        self.state.lock().idle.len()
    }

    /// Takes back what the kernel has of a file that it has forgotten.
    pub(super) fn forgot(&self, node: NodeId) {
        let dropped = self.state.lock().idle.pop(&node);
        drop(dropped);
    }
}
