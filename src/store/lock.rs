//! Locks between processes, and their order.
//!
//! 1. The lock of one layer: flock(2) on its directory, exclusive while it is mounted, unmounted,
//!    removed or its files are repaired; shared while a child of it is published. Who only reads
//!    takes none.
//! 2. The lock of the store, held for as long as names in the home change: renames of whole layers
//!    and symlinks, never a tree. With containers/storage it is `overlay-layers/layers.lock` beside
//!    the home, which podman and buildah take for their changes; Docker has none, so it is flock(2)
//!    on `l`, or on the home itself where that is missing.
//! 3. Locks of single files in `tempdirs` and of mount counts, which are last.
//!
//! All end with the process. A file that is locked by fcntl(2) also says who wrote last: 64
//! characters that nobody else has written, by which others learn that they must look anew.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, openat};

use super::layout::{Home, LayerId, Variant, make_dirs};
use crate::error::{Context, Error, Result};
use crate::options::show_path;
use crate::sys;
use crate::sys::lockfile::{Sharing, lock_dir, lock_file};

/// Directory of the metadata of layers beside the home, and the lock in it.
const LAYERS: &str = "overlay-layers";
const LAYERS_LOCK: &str = "layers.lock";
/// Lock in the root that containers/storage takes while it sets a store up.
const STORAGE_LOCK: &str = "storage.lock";
/// Length of what the last writer leaves in a lock file.
const WRITER_LEN: usize = 64;

/// A lock that is held while the value lives.
#[derive(Debug)]
pub struct Held {
    file: OwnedFd,
    tells: bool,
}

impl Held {
    /// Tells others who share the lock that something was changed under it.
    ///
    /// # Errors
    /// Those of pwrite(2).
    pub fn record_write(&self) -> Result<()> {
        if !self.tells {
            return Ok(());
        }
        let drawn: [u8; WRITER_LEN / 2] = rand::random();
        let text: String = drawn.iter().map(|byte| format!("{byte:02x}")).collect();
        let written = sys::data::write_at(self.file.as_fd(), text.as_bytes(), 0)
            .at("pwrite", || LAYERS_LOCK)?;
        if written == WRITER_LEN {
            return Ok(());
        }
        Err(Error::sys("pwrite", LAYERS_LOCK, crate::error::Errno::NOSPC))
    }
}

/// Takes the lock of the store, waiting for it.
///
/// # Errors
/// Those of open(2), fcntl(2) and flock(2).
/// # Locks
/// Second in the order; not to be held over work that takes long.
pub fn store(home: &Home) -> Result<Held> {
    if home.variant() != Variant::Containers {
        let dir = if home.variant().has_links() {
            home.make_dir(super::layout::LINK_DIR.as_bytes(), 0o755)?
        } else {
            sys::open::directory(home.dir(), b".").at("open", || show_path(home.path()))?
        };
        lock_dir(&dir, Sharing::Exclusive).at("flock", || show_path(home.path()))?;
        return Ok(Held { file: dir, tells: false });
    }
    let dir = root_of(home).join(LAYERS);
    make_dirs(&dir, 0o700)?;
    let file = open_and_lock(&dir.join(LAYERS_LOCK))?;
    Ok(Held { file, tells: true })
}

/// Takes the lock under which a store is set up; with Docker there is none.
///
/// # Errors
/// Those of open(2) and fcntl(2).
/// # Locks
/// Before all others, and only while no other is held.
pub fn setup(home: &Home) -> Result<Option<Held>> {
    if home.variant() != Variant::Containers {
        return Ok(None);
    }
    let file = open_and_lock(&root_of(home).join(STORAGE_LOCK))?;
    Ok(Some(Held { file, tells: true }))
}

/// Returns the directory that holds the home.
pub fn root_of(home: &Home) -> &Path {
    home.path().parent().unwrap_or(home.path())
}

fn open_and_lock(path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file =
        openat(CWD, path, flags, Mode::from_raw_mode(0o644)).at("open", || show_path(path))?;
    lock_file(&file, Sharing::Exclusive).at("fcntl", || show_path(path))?;
    Ok(file)
}

/// A layer whose lock is held.
#[derive(Debug)]
pub struct LockedLayer {
    /// Its directory.
    pub dir: OwnedFd,
}

/// Opens a layer and takes its lock, waiting for it; `None` if there is no such layer.
///
/// # Errors
/// Those of openat2(2) and flock(2).
/// # Locks
/// First in the order; two layers are never locked at once.
pub fn layer(home: &Home, id: &LayerId, sharing: Sharing) -> Result<Option<LockedLayer>> {
    loop {
        let Some(dir) = home.layer(id)? else { return Ok(None) };
        lock_dir(&dir, sharing).at("flock", || home.show(id))?;
        // Another layer may have the name by now, or none.
        let locked = sys::stat::of(&dir).at("statx", || home.show(id))?;
        let now = sys::stat::find(home.dir(), id.bytes()).at("statx", || home.show(id))?;
        if now.is_some_and(|now| now.stx_ino == locked.stx_ino) {
            return Ok(Some(LockedLayer { dir }));
        }
    }
}
