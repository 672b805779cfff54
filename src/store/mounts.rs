//! Mounting layers and taking the mounts down again, counted over all processes.
//!
//! How often a layer was asked for stands in `RUNHOME/lamina-mounts/ID`, changed under the lock of
//! the layer, and, with what engines asked for, in the counts that they share (`engine`). Both are
//! believed only as far as the mount table agrees: a mount that nobody counted counts once, for
//! whoever made it, and counts of a mount that is gone are nothing. What an engine mounted stays until
//! the engine gives it back. A crash leaves a mount that is counted once too often or not at all, or
//! a count without a mount. Where nothing can be mounted, a copy stands in its place (`flat`), which
//! engines know nothing of.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, RenameFlags, openat};
use serde::{Deserialize, Serialize};

use super::driver::no_such;
use super::layout::{
    COMMITTED, LOWER, LayerId, MERGED, Variant, has, io_error, make_dirs, read_small, write_new,
};
use super::lock::LockedLayer;
use super::mountpoint::{Present, take_down};
use super::probe::Backend;
use super::{Found, Store, flat, idmap, lock};
use crate::error::{Context, Errno, Error, Result};
use crate::mount::mountinfo::MountEntry;
use crate::options::show_path;
use crate::sys;
use crate::sys::lockfile::Sharing;
use crate::sys::name::At;
use crate::sys::userns::Maps;

/// Directory in the run home with the counts.
const COUNTS: &str = "lamina-mounts";

/// How a layer is to be mounted.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct MountRequest {
    /// Whether nothing may be changed through the mount.
    pub read_only: bool,
    /// Whether syncs are skipped.
    pub volatile: bool,
    /// Mount options instead of those of the driver.
    pub options: Vec<String>,
    /// SELinux label.
    pub label: Option<String>,
    /// Ids that the mount shows in place of those of the layers.
    pub maps: Option<Maps>,
    /// Who is to serve, whatever the probe says.
    pub backend: Option<Backend>,
}

/// How often a layer is mounted, and by whom.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Count {
    /// Uses that this program knows of.
    pub(super) count: u64,
    pub(super) backend: Backend,
    pub(super) read_only: bool,
}

impl Store {
    /// Mounts a layer, or counts once more that it is, and returns where.
    ///
    /// # Errors
    /// `NoSuchLayer`; `Unsupported` if nobody can serve; what kernel or server say.
    /// # Locks
    /// The layer's, then that under which stores are set up, shared, and that of the counts that
    /// engines share.
    /// # Crash
    /// At worst a mount that is not counted, or an empty mountpoint.
    pub fn mount(&self, id: &LayerId, request: &MountRequest) -> Result<PathBuf> {
        let found = self.get_layer(id)?;
        let docker = found.home.variant() == Variant::Docker;
        let at = || found.home.show(id);
        if docker && !has(found.dir.as_fd(), LOWER).at("statx", at)? {
            // Nothing to merge; Docker uses the directory itself.
            return Ok(found.home.join(&[id.bytes(), b"diff"]));
        }
        let locked = self.lock_layer(&found, id)?;
        idmap::finish_rotation(&locked.dir).at("renameat", at)?;
        let counts = self.counts()?;
        let mut plan = None;
        loop {
            let mut merged = self.mountpoint(&found, id)?;
            // What takes long, or another lock, comes before the locks that engines wait for.
            let here = self.present(&merged, &found, id)?;
            if plan.is_none() && here.is_none() {
                let committed = docker && has(found.dir.as_fd(), COMMITTED).at("statx", at)?;
                let read_only = request.read_only || committed || !found.is_own;
                plan = Some(self.plan_mount(&found, id, request, read_only)?);
            }
            let is_copy = matches!(here, Some(Present::Flat(_)))
                || plan.as_ref().is_some_and(|plan| plan.backend == Backend::Flat);
            if is_copy {
                merged = self.merged_path(&found, id);
            }
            self.make_merged(&locked.dir, &merged)?;
            let in_home = !is_copy && !self.is_apart(&merged);
            let home = if in_home { self.hold_home()? } else { None };
            let mut engine = if is_copy { None } else { self.engine_mounts()? };
            let known = read_count(&counts, id)?;
            let shared = engine.as_ref().map_or(0, |engine| engine.count(id));
            let known = match (self.present(&merged, &found, id)?, known) {
                // One that this program did not make has a user of its own.
                (Some(Present::Mount(entry)), known) => {
                    Some(known.unwrap_or_else(|| foreign(&entry, shared)))
                }
                (Some(Present::Flat(_)), Some(known)) => Some(known),
                (Some(Present::Flat(flat)), None) => {
                    // Of another boot, or of somebody who was killed before he was told of it.
                    drop((engine, home));
                    self.take_flat(&found, id, &flat)?;
                    continue;
                }
                (None, _) => None,
            };
            if let Some(mut count) = known {
                let uses = count.count.max(shared);
                count.count += 1;
                write_count(&counts, id, &count)?;
                if let Some(engine) = &mut engine {
                    engine.set(id, &merged, uses + 1)?;
                }
                return Ok(merged);
            }
            // Somebody took it down since it was looked at.
            let Some(plan) = plan.take() else { continue };
            let (backend, read_only) = (plan.backend.clone(), plan.read_only);
            self.carry_out(&found, id, &merged, plan)?;
            write_count(&counts, id, &Count { count: 1, backend, read_only })?;
            if let Some(engine) = &mut engine {
                engine.set(id, &merged, 1)?;
            }
            return Ok(merged);
        }
    }

    /// Gives a mount of a layer back; the last one takes it down. Nothing mounted is no error.
    ///
    /// # Errors
    /// `NoSuchLayer`; `Busy` if only an engine has it mounted; those of unmounting.
    /// # Locks
    /// The layer's, and that of the counts that engines share.
    /// # Crash
    /// At worst a count without a mount, which nobody believes, or a mount that is counted once too
    /// often, which an engine gives back.
    pub fn unmount(&self, id: &LayerId) -> Result<()> {
        let found = self.get_layer(id)?;
        let locked = self.lock_layer(&found, id)?;
        let merged = self.mountpoint(&found, id)?;
        let counts = self.counts()?;
        let has_copy = flat::find(&locked.dir).at("read", || found.home.show(id))?.is_some();
        let mut engine = if has_copy { None } else { self.engine_mounts()? };
        let shared = engine.as_ref().map_or(0, |engine| engine.count(id));
        let known = read_count(&counts, id)?;
        let own = known.as_ref().map_or(0, |known| known.count);
        let mut share = |count: u64| match &mut engine {
            Some(engine) => engine.set(id, &merged, count),
            None => Ok(()),
        };
        match (self.present(&merged, &found, id)?, known) {
            (Some(Present::Mount(_)), None) if shared > 0 => Err(Error::Busy {
                what: format!(
                    "{id}: was mounted by an engine, {shared} times; unmount it there (podman \
                     unmount), or stop its container"
                )
                .into(),
            }),
            (Some(_), Some(mut count)) if own.max(shared) > 1 => {
                count.count -= 1;
                // Ours first: killed in between, the mount outlives its users, not they the mount.
                if count.count == 0 {
                    drop_count(&counts, id)?;
                } else {
                    write_count(&counts, id, &count)?;
                }
                share(own.max(shared) - 1)
            }
            (Some(Present::Mount(entry)), _) => {
                take_down(&merged, &entry)?;
                drop_count(&counts, id)?;
                share(0)?;
                self.renew_merged(&found, id, &locked.dir, &merged)
            }
            (Some(Present::Flat(flat)), _) => {
                self.take_flat(&found, id, &flat)?;
                drop_count(&counts, id)
            }
            (None, _) => {
                flat::forget(&locked.dir).at("unlinkat", || found.home.show(id))?;
                drop_count(&counts, id)?;
                share(shared.saturating_sub(own))
            }
        }
    }

    /// Returns how often each layer is mounted that is counted, whether or not it still is.
    ///
    /// # Errors
    /// Those of reading the counts.
    pub fn mount_counts(&self) -> Result<BTreeMap<LayerId, u64>> {
        list_counts(&self.run_home)
    }

    /// Forgets the count of a layer that is not mounted.
    ///
    /// # Errors
    /// Those of removing it.
    pub(super) fn forget_count(&self, id: &LayerId) -> Result<()> {
        let locked = match self.find(id)? {
            Some(found) => {
                let locked = lock::layer(found.home, id, Sharing::Exclusive)?;
                if self.present(&self.mountpoint(&found, id)?, &found, id)?.is_some() {
                    return Ok(());
                }
                locked
            }
            None => None,
        };
        let counts = self.counts()?;
        let own = read_count(&counts, id)?.map_or(0, |known| known.count);
        drop_count(&counts, id)?;
        if let Some(mut engine) = self.engine_mounts()? {
            let (path, shared) = (self.home().join(&[id.bytes(), MERGED]), engine.count(id));
            engine.set(id, &path, shared.saturating_sub(own))?;
        }
        drop(locked);
        Ok(())
    }

    fn lock_layer(&self, found: &Found<'_>, id: &LayerId) -> Result<LockedLayer> {
        lock::layer(found.home, id, Sharing::Exclusive)?.ok_or_else(|| no_such(id))
    }

    fn counts(&self) -> Result<OwnedFd> {
        open_counts(&self.run_home)
    }
}

/// Opens the directory of the counts, making it.
///
/// # Errors
/// Those of mkdir(2) and open(2).
pub(super) fn open_counts(run_home: &Path) -> Result<OwnedFd> {
    let path = run_home.join(COUNTS);
    make_dirs(&path, 0o700)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(CWD, &path, flags, Mode::empty()).at("open", || show_path(&path))
}

/// Returns how often each layer is mounted that is counted in a run home.
///
/// # Errors
/// Those of reading the counts.
pub(super) fn list_counts(run_home: &Path) -> Result<BTreeMap<LayerId, u64>> {
    let counts = open_counts(run_home)?;
    let mut all = BTreeMap::new();
    let mut names = Vec::new();
    sys::name::list(counts.as_fd(), |name, _, _| {
        names.push(name.to_vec());
        Ok(())
    })
    .at("getdents64", || COUNTS)?;
    for id in names.iter().filter_map(|name| LayerId::from_bytes(name)) {
        if let Some(count) = read_count(&counts, &id)? {
            all.insert(id, count.count);
        }
    }
    Ok(all)
}

/// Returns the count of a mount that is not ours: none if engines count it, else one for whoever
/// made it.
pub(super) fn foreign(entry: &MountEntry, shared: u64) -> Count {
    let backend = if entry.is_fuse() { Backend::Fuse } else { Backend::Kernel };
    Count { count: u64::from(shared == 0), backend, read_only: false }
}

pub(super) fn read_count(counts: &OwnedFd, id: &LayerId) -> Result<Option<Count>> {
    let text = read_small(counts.as_fd(), id.bytes()).at("read", || format!("{COUNTS}/{id}"))?;
    // One that was cut short by a crash says nothing.
    Ok(text.and_then(|text| serde_json::from_slice(&text).ok()))
}

/// Writes the count of a layer, whose lock the caller has: so there is one name to write it aside, and
/// what a crash left there is written over.
pub(super) fn write_count(counts: &OwnedFd, id: &LayerId, count: &Count) -> Result<()> {
    let text = serde_json::to_vec(count).map_err(|error| {
        io_error("write", Path::new(COUNTS), std::io::Error::other(error.to_string()))
    })?;
    let aside = aside_of(id);
    let put = || {
        match sys::name::unlink(At::new(counts.as_fd(), &aside)) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => return Err(errno),
        }
        write_new(counts.as_fd(), &aside, &text, 0o600)?;
        sys::name::rename(
            At::new(counts.as_fd(), &aside),
            At::new(counts.as_fd(), id.bytes()),
            RenameFlags::empty(),
        )
    };
    put().at("write", || format!("{COUNTS}/{id}"))
}

/// No layer has a name like this.
fn aside_of(id: &LayerId) -> Vec<u8> {
    [b".", id.bytes()].concat()
}

/// Forgets the count of a layer, and what a crash left beside it.
pub(super) fn drop_count(counts: &OwnedFd, id: &LayerId) -> Result<()> {
    for name in [id.bytes(), &aside_of(id)] {
        match sys::name::unlink(At::new(counts.as_fd(), name)) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => return Err(Error::sys("unlinkat", format!("{COUNTS}/{id}"), errno)),
        }
    }
    Ok(())
}
