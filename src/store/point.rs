//! Mountpoints of layers in the stores of old, counted over all processes.
//!
//! The counts are those of [`super::mounts`], and as far to be believed. Call with the lock of the
//! layer held.

use std::path::Path;

use super::Content;
use super::flat::{Place, Wanted};
use super::layout::LayerId;
use super::mountpoint::{Present, mounted, take_down};
use super::mounts::{
    Count, MountRequest, drop_count, foreign, open_counts, read_count, write_count,
};
use super::probe::Backend;
use super::serve::{Layers, map_options, refuse_for_flat};
use crate::error::{Error, Result};
use crate::mount::kernel;
use crate::mount::mountinfo;

/// Where a layer is mounted, or a copy stands in place of a mount.
pub(super) struct Point<'a> {
    /// The layer.
    pub(super) id: &'a LayerId,
    /// Its mountpoint, and what a copy there concerns.
    pub(super) place: Place<'a>,
    /// Directory of the counts, and what else need not outlive a boot.
    pub(super) run_home: &'a Path,
    /// Opens what lies beneath the layer's content.
    pub(super) beneath: &'a dyn Fn() -> Result<Vec<Content>>,
}

impl Point<'_> {
    fn merged(&self) -> &Path {
        &self.place.merged_path
    }

    fn present(&self) -> Result<Option<Present>> {
        if let Some(entry) = mounted(self.merged())? {
            return Ok(Some(Present::Mount(entry)));
        }
        Ok(self.place.find()?.map(Present::Flat))
    }

    /// Mounts by `mount`, or counts once more that it is mounted.
    ///
    /// # Errors
    /// Those of `mount`, and of writing the count.
    pub(super) fn enter(
        &self,
        read_only: bool,
        mount: impl FnOnce() -> Result<Backend>,
    ) -> Result<()> {
        let counts = open_counts(self.run_home)?;
        let more = |known: Count| Count { count: known.count + 1, ..known };
        let count = match (self.present()?, read_count(&counts, self.id)?) {
            (Some(Present::Mount(entry)), known) => {
                more(known.unwrap_or_else(|| foreign(&entry, 0)))
            }
            (Some(Present::Flat(_)), Some(known)) => more(known),
            (found, _) => {
                if let Some(Present::Flat(flat)) = found {
                    // Of another boot, or of somebody who was killed before he was told of it.
                    self.place.take(&flat, self.beneath)?;
                }
                Count { count: 1, backend: mount()?, read_only }
            }
        };
        write_count(&counts, self.id, &count)
    }

    /// Gives one mount back, and returns whether it was the last, which is down then.
    ///
    /// # Errors
    /// Those of unmounting, and of writing the count.
    pub(super) fn leave(&self) -> Result<bool> {
        let counts = open_counts(self.run_home)?;
        match read_count(&counts, self.id)? {
            Some(known) if known.count > 1 && self.is_mounted()? => {
                write_count(&counts, self.id, &Count { count: known.count - 1, ..known })?;
                Ok(false)
            }
            _ => self.clear().map(|()| true),
        }
    }

    /// Takes the mount or the copy down, however often it is counted.
    ///
    /// # Errors
    /// Those of unmounting and of taking changes back, and of removing the count.
    pub(super) fn clear(&self) -> Result<()> {
        match self.present()? {
            Some(Present::Mount(entry)) => take_down(self.merged(), &entry)?,
            Some(Present::Flat(flat)) => self.place.take(&flat, self.beneath)?,
            None => self.place.forget()?,
        }
        drop_count(&open_counts(self.run_home)?, self.id)
    }

    /// Returns whether it is mounted, or a copy is there.
    ///
    /// # Errors
    /// Those of reading the mount table and the mark of a copy.
    pub(super) fn is_mounted(&self) -> Result<bool> {
        let has_mount = mountinfo::find_top(&mountinfo::load()?, self.merged()).is_some();
        Ok(has_mount || self.place.find()?.is_some())
    }

    /// Forgets the count if nothing is mounted.
    ///
    /// # Errors
    /// Those of looking, and of removing the count.
    pub(super) fn forget(&self) -> Result<()> {
        match self.present()? {
            Some(_) => Ok(()),
            None => drop_count(&open_counts(self.run_home)?, self.id),
        }
    }

    /// Fails if it is mounted.
    ///
    /// # Errors
    /// `Busy`, and those of reading the mount table.
    pub(super) fn refuse_mounted(&self) -> Result<()> {
        if !self.is_mounted()? {
            return Ok(());
        }
        let id = self.id;
        Err(Error::Busy {
            what: format!("{id}: is mounted; unmount it first (lamina layer unmount {id})").into(),
        })
    }
}

/// Returns whether a mount is to be read-only.
pub(super) fn is_read_only(request: &MountRequest) -> bool {
    request.read_only || request.options.iter().any(|option| option == "ro")
}

/// Puts a copy of what a layer shows in place of a mount.
///
/// # Errors
/// `Unsupported` for what only a mount can do; those of copying.
pub(super) fn copy(
    place: &Place<'_>,
    id: &LayerId,
    request: &MountRequest,
    layers: Layers,
) -> Result<()> {
    let other_ids = "change its owners in an overlay store (lamina store migrate, then lamina layer \
                     update-id-map)";
    refuse_for_flat(id, request, false, other_ids)?;
    let Layers { diff, lowers, read_only } = layers;
    place.make(Wanted { diff, lowers, read_only, volatile: request.volatile })
}

/// Returns the options of a mount by `backend`.
pub(super) fn options(request: &MountRequest, backend: &Backend) -> Vec<String> {
    let mut options = request.options.clone();
    options.retain(|option| option != "ro" && option != "rw");
    if request.volatile && !is_read_only(request) {
        options.push("volatile".to_owned());
    }
    if let Some(label) = &request.label {
        options.push(format!("context=\"{label}\""));
    }
    if *backend == Backend::Kernel {
        if kernel::needs_userxattr() {
            options.push("userxattr".to_owned());
        }
    } else if let Some(maps) = &request.maps {
        options.extend(map_options(maps));
    }
    options
}

/// Returns the error for a backend that cannot serve a store.
pub(super) fn unsupported(backend: &Backend, why: &str) -> Error {
    Error::Unsupported { feature: format!("backend {}: {why}", backend.name()).into() }
}
