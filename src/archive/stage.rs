//! A layer that appears whole or not at all: filled under a name that means nothing, then renamed.
//!
//! A crash before the rename leaves a directory called `.lamina-stage-...` beside the layer.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::RenameFlags;

use crate::error::{Context, Errno, Result};
use crate::sys::name::{self, At};
use crate::sys::{self, data, open};

/// A directory that is being filled; removed again unless published.
#[derive(Debug)]
pub struct Stage {
    parent: OwnedFd,
    name: Option<Vec<u8>>,
    shown: String,
}

static NEXT: AtomicU64 = AtomicU64::new(0);

impl Stage {
    /// Makes an empty directory in `parent`; `shown` is the layer's path, for messages.
    ///
    /// # Errors
    /// Those of mkdirat(2).
    pub fn new(parent: OwnedFd, shown: &Path) -> Result<Self> {
        let shown = shown.display().to_string();
        loop {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let name = format!(".lamina-stage-{}-{number}", std::process::id()).into_bytes();
            match name::mkdir(At::new(parent.as_fd(), &name), 0o700) {
                // Left over by a process that had the same number.
                Err(Errno::EXIST) => {}
                made => {
                    made.at("mkdirat", || shown.clone())?;
                    return Ok(Self { parent, name: Some(name), shown });
                }
            }
        }
    }

    /// Returns a handle to the directory.
    ///
    /// # Errors
    /// Those of openat(2).
    pub fn open(&self) -> Result<OwnedFd> {
        let name = self.name.as_deref().unwrap_or_default();
        open::directory(self.parent.as_fd(), name).at("openat", || self.shown.clone())
    }

    /// Gives the directory its name; `sync` makes content and name durable before.
    ///
    /// # Errors
    /// `EEXIST` if the name is taken; those of syncfs(2) and renameat2(2).
    /// # Crash
    /// Leaves the layer, or the staging directory.
    pub fn publish(mut self, to: &[u8], sync: bool) -> Result<()> {
        let parent = self.parent.as_fd();
        if sync {
            data::sync_filesystem(parent).at("syncfs", || self.shown.clone())?;
        }
        let name = self.name.as_deref().unwrap_or_default();
        let (from, to) = (At::new(parent, name), At::new(parent, to));
        name::rename(from, to, RenameFlags::NOREPLACE).at("renameat2", || self.shown.clone())?;
        if sync {
            data::sync(parent, false).at("fsync", || self.shown.clone())?;
        }
        self.name = None;
        Ok(())
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let Some(name) = self.name.take() else { return };
        if let Err(errno) = sys::tree::remove(self.parent.as_fd(), &name) {
            tracing::warn!(%errno, "{}: what was unpacked so far stays", self.shown);
        }
    }
}
