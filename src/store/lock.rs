//! Locks between processes, and their order.
//!
//! 1. The lock of one layer: flock(2) on its directory, exclusive while it is mounted, unmounted,
//!    removed or its files are repaired; shared while a child of it is published. Who only reads
//!    takes none.
//! 2. `storage.lock` in the root, exclusive while a store is set up or its home mounted or unmounted,
//!    shared while a layer is mounted in the home, which engines must not unmount meanwhile.
//! 3. The lock of the store, held for as long as names in the home change: renames of whole layers
//!    and symlinks, never a tree. With containers/storage it is `overlay-layers/layers.lock` beside
//!    the home, which podman and buildah take for their changes; Docker has none, so it is flock(2)
//!    on `l`, or on the home itself where that is missing.
//! 4. The lock of the counts of mounts, `overlay-layers/mountpoints.lock` in the run root, while a
//!    layer is mounted or unmounted; engines take it for the same, after the third.
//! 5. Locks of single files in `tempdirs` and of mount counts, which are last.
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
pub const LAYERS: &str = "overlay-layers";
const LAYERS_LOCK: &str = "layers.lock";
/// Lock of the counts of mounts, in the directory of that name in the run root.
const MOUNTS_LOCK: &str = "mountpoints.lock";
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
/// Third in the order; not to be held over work that takes long.
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
    let file = open_and_lock(&dir.join(LAYERS_LOCK), Sharing::Exclusive)?;
    Ok(Held { file, tells: true })
}

/// Takes the lock under which a store is set up, and the home mounted and unmounted; with Docker there
/// is none. Shared, the home stays as it is.
///
/// # Errors
/// Those of open(2) and fcntl(2).
/// # Locks
/// After that of a layer, before all others.
pub fn setup(home: &Home, sharing: Sharing) -> Result<Option<Held>> {
    if home.variant() != Variant::Containers {
        return Ok(None);
    }
    let file = open_and_lock(&root_of(home).join(STORAGE_LOCK), sharing)?;
    Ok(Some(Held { file, tells: true }))
}

/// Takes the lock of the counts of mounts, which lies in `dir`, waiting for it.
///
/// # Errors
/// Those of mkdir(2), open(2) and fcntl(2).
/// # Locks
/// Fourth in the order.
pub fn mounts(dir: &Path) -> Result<Held> {
    make_dirs(dir, 0o700)?;
    Ok(Held { file: open_and_lock(&dir.join(MOUNTS_LOCK), Sharing::Exclusive)?, tells: true })
}

/// Returns the directory that holds the home.
pub fn root_of(home: &Home) -> &Path {
    home.path().parent().unwrap_or(home.path())
}

fn open_and_lock(path: &Path, sharing: Sharing) -> Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file =
        openat(CWD, path, flags, Mode::from_raw_mode(0o644)).at("open", || show_path(path))?;
    lock_file(&file, sharing).at("fcntl", || show_path(path))?;
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
