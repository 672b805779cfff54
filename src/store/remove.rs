//! Removing a layer: out of the home by one rename, then deleted where nobody looks.
//!
//! Takes the layer's lock, and the store's for the rename only. A crash leaves a temporary
//! directory that the next start deletes.

use std::os::fd::AsFd;

use super::additional::notify_release;
use super::driver::no_such;
use super::layout::{ADDITIONAL, LayerId, read_small};
use super::stage::TempDir;
use super::{Store, flat, lock, stage};
use crate::error::{Context, Error, Result};
use crate::mount::mountinfo;
use crate::options::show_path;
use crate::sys::lockfile::Sharing;

impl Store {
    /// Removes a layer with its content.
    ///
    /// # Errors
    /// `NoSuchLayer`; `Busy` if it is mounted, another layer was made on it, or an image or container
    /// has it; `Invalid` in a store that is only read.
    /// # Locks
    /// The layer's, and the store's for the rename.
    pub fn remove(&self, id: &LayerId) -> Result<()> {
        self.remove_layer(id, false)
    }

    /// Removes a layer with its content, although an image or a container may have it.
    ///
    /// # Errors
    /// As [`Store::remove`].
    /// # Locks
    /// As [`Store::remove`].
    pub fn remove_named(&self, id: &LayerId) -> Result<()> {
        self.remove_layer(id, true)
    }

    fn remove_layer(&self, id: &LayerId, even_named: bool) -> Result<()> {
        let found = self.get_layer(id)?;
        if !found.is_writable {
            return Err(Error::invalid(
                format!("layer {id}"),
                format!(
                    "lies in {}, which is only read; remove it there",
                    show_path(found.home.path())
                ),
            ));
        }
        let locked = lock::layer(found.home, id, Sharing::Exclusive)?.ok_or_else(|| no_such(id))?;
        let merged = self.mountpoint(&found, id)?;
        let has_copy = flat::find(&locked.dir).at("read", || found.home.show(id))?.is_some();
        if has_copy || mountinfo::find_top(&mountinfo::load()?, &merged).is_some() {
            return Err(Error::Busy {
                what: format!("{id}: is mounted; unmount it first (lamina layer unmount {id})")
                    .into(),
            });
        }
        self.refuse_with_children(found.home, id, &locked.dir)?;
        let temp = TempDir::new(found.home)?;
        let held = lock::store(found.home)?;
        if !even_named {
            // Under the lock: an engine makes a layer and its record while it holds it.
            self.refuse_if_named(id)?;
        }
        release_additional(&locked.dir, || found.home.show(id))?;
        stage::retire(&temp, id)?;
        held.record_write()?;
        drop((held, locked));
        temp.remove()
    }
}

/// Tells an additional layer store that a layer of it is not used any more.
fn release_additional(layer: &std::os::fd::OwnedFd, at: impl Fn() -> String) -> Result<()> {
    use std::os::unix::ffi::OsStrExt;
    let Some(path) = read_small(layer.as_fd(), ADDITIONAL).at("read", &at)? else { return Ok(()) };
    notify_release(std::path::Path::new(std::ffi::OsStr::from_bytes(path.trim_ascii_end())));
    Ok(())
}
