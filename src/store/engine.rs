//! What lies beside a home: the records that engines keep of layers, their counts of mounts, and the
//! records of images of our own.
//!
//! containers/storage counts in `RUNROOT/overlay-layers/mountpoints.json`, under the lock beside it,
//! how often a layer is mounted, and takes a mount down when that falls to nothing. So mounts of ours
//! are counted there too, and the lock is held while one is made or taken down: podman uses a mount
//! of ours, and neither unmounts beneath the other. An engine writes back only the layers that its
//! own records name; what it drops is still in our own count.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, openat};
use serde::{Deserialize, Serialize};

use super::Store;
use super::docker::LayerDb;
use super::layout::{Home, LayerId, Variant, io_error, put_small, read_file};
use super::lock::{self, Held, LAYERS};
use crate::error::{Context, Error, Result};
use crate::options::show_path;

/// File with the counts of mounts.
const MOUNTS: &[u8] = b"mountpoints.json";
/// Largest such file that is read, in bytes.
const MOUNTS_MAX: u64 = 64 << 20;
/// Records of the images that `lamina image` brought, in the root of a store.
pub const IMAGES: &str = "lamina-images";

/// One record of `layers.json`, as far as it matters here.
#[derive(Deserialize)]
struct LayerRecord {
    id: String,
}

/// A record of an image of ours, as far as it matters here.
#[derive(Deserialize)]
struct ImageRecord {
    layers: Vec<String>,
}

/// One record of `mountpoints.json`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct MountRecord {
    id: String,
    path: String,
    count: i64,
}

/// The counts of mounts that engines share, locked while the value lives.
#[derive(Debug)]
pub struct EngineMounts {
    held: Held,
    dir: OwnedFd,
    path: PathBuf,
    records: Vec<MountRecord>,
}

impl EngineMounts {
    /// Returns how often a layer is mounted, as far as the file says.
    pub fn count(&self, id: &LayerId) -> u64 {
        let record = self.records.iter().find(|record| record.id == id.as_str());
        record.map_or(0, |record| u64::try_from(record.count).unwrap_or(0))
    }

    /// Puts down how often a layer is mounted.
    ///
    /// # Errors
    /// Those of writing the file.
    pub fn set(&mut self, id: &LayerId, merged: &Path, count: u64) -> Result<()> {
        if self.count(id) == count {
            return Ok(());
        }
        self.records.retain(|record| record.id != id.as_str());
        if count > 0 {
            self.records.push(MountRecord {
                id: id.to_string(),
                path: merged.to_string_lossy().into_owned(),
                count: i64::try_from(count).unwrap_or(i64::MAX),
            });
        }
        let text = serde_json::to_vec(&self.records).map_err(|error| {
            io_error("write", &self.path, std::io::Error::other(error.to_string()))
        })?;
        put_small(self.dir.as_fd(), MOUNTS, &text, 0o600).at("write", || show_path(&self.path))?;
        self.held.record_write()
    }
}

impl Store {
    /// Takes the lock of the counts that engines share, and reads them; `None` with Docker, whose
    /// counts nobody else sees.
    ///
    /// # Errors
    /// `Corrupt` for a file that cannot be read; those of open(2) and fcntl(2).
    /// # Locks
    /// After that of the layer; holds its own until the value is dropped.
    pub(super) fn engine_mounts(&self) -> Result<Option<EngineMounts>> {
        let Some(dir_path) = self.run_records() else { return Ok(None) };
        let held = lock::mounts(&dir_path)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir =
            openat(CWD, &dir_path, flags, Mode::empty()).at("open", || show_path(&dir_path))?;
        let path = dir_path.join("mountpoints.json");
        let text = read_file(dir.as_fd(), MOUNTS, MOUNTS_MAX).at("read", || show_path(&path))?;
        let text = text.unwrap_or_default();
        let records = match text.trim_ascii() {
            // What Go writes for no list at all.
            b"" | b"null" => Vec::new(),
            text => serde_json::from_slice(text).map_err(|error| Error::Corrupt {
                what: format!("is no list of mounts ({error}); remove it when nothing is mounted")
                    .into(),
                at: show_path(&path).into(),
            })?,
        };
        Ok(Some(EngineMounts { held, dir, path, records }))
    }

    /// Returns where engines keep what need not outlive a boot.
    fn run_records(&self) -> Option<PathBuf> {
        match self.home().variant() {
            Variant::Docker | Variant::Overlay1 | Variant::Aufs => None,
            Variant::Containers => self.run_home.parent().map(|run| run.join(LAYERS)),
        }
    }

    /// Fails if an image or a container has a layer.
    ///
    /// # Errors
    /// `Busy` if so, and as [`Store::known_layers`] and [`Store::image_layers`].
    pub(super) fn refuse_if_named(&self, id: &LayerId) -> Result<()> {
        refuse(id, self.is_recorded(id)?, || image_layers(self.home()))
    }

    /// Returns the layers that the records of containers/storage name; `None` without such.
    ///
    /// # Errors
    /// `Corrupt` for records that cannot be read: then nothing can be said of any layer.
    pub fn known_layers(&self) -> Result<Option<BTreeSet<String>>> {
        let Some(run) = self.run_records() else { return Ok(None) };
        let dir = lock::root_of(self.home()).join(LAYERS);
        let files = [
            dir.join("layers.json"),
            dir.join("volatile-layers.json"),
            run.join("volatile-layers.json"),
        ];
        named_in(&files)
    }

    /// Returns whether records of an engine name a layer.
    ///
    /// # Errors
    /// As [`Store::known_layers`], and those of reading Docker's.
    pub(super) fn is_recorded(&self, id: &LayerId) -> Result<bool> {
        Ok(self.known_layers()?.is_some_and(|all| all.contains(id.as_str()))
            || self.home().variant() != Variant::Containers && is_recorded(self.home(), id)?)
    }

    /// Returns the layers of the images that `lamina image` brought.
    ///
    /// # Errors
    /// `Corrupt` for a record that cannot be read; those of reading.
    pub fn image_layers(&self) -> Result<BTreeSet<String>> {
        image_layers(self.home())
    }
}

/// As [`Store::image_layers`].
fn image_layers(home: &Home) -> Result<BTreeSet<String>> {
    let dir = lock::root_of(home).join(IMAGES);
    let mut known = BTreeSet::new();
    let entries = match std::fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(known),
        Err(error) => return Err(io_error("opendir", &dir, error)),
    };
    for entry in entries {
        let path = entry.map_err(|error| io_error("readdir", &dir, error))?.path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        let Some(text) = read_text(&path)? else { continue };
        let record: ImageRecord = serde_json::from_str(&text).map_err(|error| {
            let what = format!(
                "is no record of an image ({error}); remove it, and import the image again"
            );
            Error::Corrupt { what: what.into(), at: show_path(&path).into() }
        })?;
        known.extend(record.layers);
    }
    Ok(known)
}

/// Returns the layers that files of containers/storage name; `None` if none of them is there.
fn named_in(files: &[PathBuf]) -> Result<Option<BTreeSet<String>>> {
    let mut known = None;
    for path in files {
        let Some(text) = read_text(path)? else { continue };
        let records: Vec<LayerRecord> = serde_json::from_str(&text).map_err(|error| {
            let what = format!("is no list of layers ({error}); repair it with podman").into();
            Error::Corrupt { what, at: show_path(path).into() }
        })?;
        known.get_or_insert_with(BTreeSet::new).extend(records.into_iter().map(|record| record.id));
    }
    Ok(known)
}

/// Returns whether records of an engine name a layer of a home that Docker's may be, or that of
/// another driver of containers/storage, which kept `layers.json` beside it too.
///
/// # Errors
/// `Corrupt` for a list that cannot be read; those of reading the records.
pub(super) fn is_recorded(home: &Home, id: &LayerId) -> Result<bool> {
    let layers = format!("{}-layers", home.variant().home_name());
    let list = lock::root_of(home).join(layers).join("layers.json");
    if named_in(&[list])?.is_some_and(|all| all.contains(id.as_str())) {
        return Ok(true);
    }
    match LayerDb::open(home)? {
        Some(records) => records.names(id),
        None => Ok(false),
    }
}

/// Fails if an image or a container has a layer of a store of old.
///
/// # Errors
/// `Busy` if so, and those of reading the records.
pub(super) fn refuse_if_named(home: &Home, id: &LayerId) -> Result<()> {
    refuse(id, is_recorded(home, id)?, || image_layers(home))
}

fn refuse(
    id: &LayerId,
    is_recorded: bool,
    of_images: impl FnOnce() -> Result<BTreeSet<String>>,
) -> Result<()> {
    let (whose, cure) = if is_recorded {
        ("an engine", "remove its image or container there (rmi, rm of podman or docker)")
    } else if of_images()?.contains(id.as_str()) {
        ("lamina image", "remove the image first (lamina image remove)")
    } else {
        return Ok(());
    };
    Err(Error::Busy {
        what: format!("{id}: records of {whose} name it; {cure}, or say --force").into(),
    })
}

/// Reads a file; `None` if it is absent or empty.
fn read_text(path: &Path) -> Result<Option<String>> {
    match std::fs::read_to_string(path) {
        Ok(text) if text.trim().is_empty() => Ok(None),
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io_error("read", path, error)),
    }
}
