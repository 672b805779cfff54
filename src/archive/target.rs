//! The directory tree that an archive is unpacked into: reached name by name from its top handle.
//!
//! No symlink is followed and no `..` taken, whatever the archive or another process put there.
//! Knows nothing of archives. A crash leaves the tree half filled; see [`super::stage`].

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::FileType;

use super::path;
use crate::error::Result;
use crate::layer::cache::HandleCache;
use crate::layer::{Dir, UPPER};
use crate::sys::stat::{self, Statx};
use crate::sys::{self, name};

/// Directory handles kept open while a layer is written.
const HANDLES: usize = 256;

/// A tree under construction, with the way to the directory used last.
#[derive(Debug)]
pub(super) struct Target {
    root: Arc<Dir>,
    /// Clean path of `way`'s last directory.
    at: Vec<u8>,
    /// The directories from beneath the root to `at`.
    way: Vec<Arc<Dir>>,
}

/// What stands where a directory is looked for.
#[derive(Debug)]
pub(super) enum Found {
    /// The directory.
    Dir(Arc<Dir>),
    /// Nothing, at the component that begins here in the path.
    Nothing(Arc<Dir>, usize),
    /// Something else there, with these attributes.
    Other(Arc<Dir>, usize, Box<Statx>),
}

impl Target {
    /// Takes an open directory; `path` is for messages.
    ///
    /// # Errors
    /// Those of statx(2).
    pub(super) fn new(root: OwnedFd, path: PathBuf) -> Result<Self> {
        let handles = Arc::new(HandleCache::new(HANDLES));
        let root = Dir::root(UPPER, root, path, None, &handles)?;
        Ok(Self { root, at: Vec::new(), way: Vec::new() })
    }

    /// Returns the root.
    pub(super) fn root(&self) -> &Arc<Dir> {
        &self.root
    }

    /// Looks for the directory at a clean path.
    ///
    /// # Errors
    /// Those of the system calls but `ENOENT`.
    pub(super) fn find(&mut self, path: &[u8]) -> Result<Found> {
        let mut dir = self.back_to_common(path);
        // Behind the slash, if anything stands before it.
        let mut start = if self.at.is_empty() { 0 } else { self.at.len() + 1 };
        while let Some(rest) = path.get(start..).filter(|rest| !rest.is_empty()) {
            let end = rest.iter().position(|byte| *byte == b'/').unwrap_or(rest.len());
            let name = rest.get(..end).unwrap_or_default();
            let Some(stat) = dir.find(name)? else { return Ok(Found::Nothing(dir, start)) };
            if !is_directory(&stat) {
                return Ok(Found::Other(dir, start, Box::new(stat)));
            }
            dir = dir.child(name, &stat);
            self.way.push(Arc::clone(&dir));
            start += end + 1;
            self.at = path.get(..start - 1).unwrap_or(path).to_vec();
        }
        Ok(Found::Dir(dir))
    }

    /// Gives up the way from where it leads elsewhere than `path`; returns where it ends then.
    fn back_to_common(&mut self, path: &[u8]) -> Arc<Dir> {
        let is_beneath = |at: &[u8]| {
            at.is_empty()
                || path
                    .strip_prefix(at)
                    .is_some_and(|rest| matches!(rest.first(), None | Some(b'/')))
        };
        while !is_beneath(&self.at) {
            self.way.pop();
            let above = path::parent(&self.at).len();
            self.at.truncate(above);
        }
        Arc::clone(self.way.last().unwrap_or(&self.root))
    }

    /// Removes whatever has this name in `dir`, with all that lies beneath it.
    ///
    /// # Errors
    /// Those of the system calls.
    pub(super) fn remove(&mut self, dir: &Arc<Dir>, name: &[u8]) -> Result<()> {
        // The way may lead through what is removed.
        self.way.clear();
        self.at.clear();
        dir.call("unlinkat", name, |at| sys::tree::remove(at.dir, at.name))
    }
}

/// Tells whether attributes are a directory's.
pub(super) fn is_directory(stat: &Statx) -> bool {
    FileType::from_raw_mode(u32::from(stat.stx_mode)) == FileType::Directory
}

/// Makes an empty directory that nobody else may look into yet, and returns it.
///
/// # Errors
/// `EEXIST`, and what else mkdirat(2) and statx(2) report.
pub(super) fn make_directory(parent: &Arc<Dir>, name: &[u8]) -> Result<Arc<Dir>> {
    parent.call("mkdirat", name, |at| name::mkdir(at, 0o700))?;
    let stat = parent.call("statx", name, |at| stat::at(at.dir, at.name))?;
    Ok(parent.child(name, &stat))
}
