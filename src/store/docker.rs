//! What Docker keeps of layers beside a home, as far as it matters here: which of them images and
//! containers have, and on what those of images were made.
//!
//! ```text
//! ROOT/image/DRIVER/layerdb/ALGORITHM/CHAIN/cache-id   layer of an image
//! ROOT/image/DRIVER/layerdb/ALGORITHM/CHAIN/parent     ALGORITHM:CHAIN of the one beneath
//! ROOT/image/DRIVER/layerdb/mounts/CONTAINER/mount-id  layer of a container
//! ROOT/image/DRIVER/layerdb/mounts/CONTAINER/init-id   the one beneath it
//! ```
//!
//! Layers of Docker's build cache are named elsewhere: what is not named here may be needed.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::fs::{CWD, FileType, Mode, OFlags, openat};

use super::layout::{Home, LayerId, find_dir, read_small};
use super::lock;
use crate::error::{Context, Errno, Error, Result};
use crate::options::show_path;
use crate::sys;

const CACHE_ID: &[u8] = b"cache-id";
const PARENT: &[u8] = b"parent";
const MOUNTS: &[u8] = b"mounts";
/// Files of a container with its layers.
const OF_CONTAINER: [&[u8]; 2] = [b"mount-id", b"init-id"];

/// Docker's records of the layers of a home.
#[derive(Debug)]
pub(super) struct LayerDb {
    dir: OwnedFd,
    path: PathBuf,
}

impl LayerDb {
    /// Opens them; `None` if there are none.
    ///
    /// # Errors
    /// Those of openat(2).
    pub(super) fn open(home: &Home) -> Result<Option<Self>> {
        let path = ["image", home.variant().home_name(), "layerdb"]
            .iter()
            .fold(lock::root_of(home).to_owned(), |path, name| path.join(name));
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match openat(CWD, &path, flags, Mode::empty()) {
            Ok(dir) => Ok(Some(Self { dir, path })),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
            Err(errno) => Err(Error::sys("open", show_path(&path), errno)),
        }
    }

    /// Returns whether an image or a container has a layer.
    ///
    /// # Errors
    /// Those of reading the records.
    pub(super) fn names(&self, id: &LayerId) -> Result<bool> {
        let mut is_named = false;
        self.each(|name, record| {
            let files = if name == MOUNTS { &OF_CONTAINER[..] } else { &[CACHE_ID] };
            for file in files {
                is_named |= read_small(record, file)?.is_some_and(|text| is(&text, id));
            }
            Ok(())
        })?;
        Ok(is_named)
    }

    /// Returns the layer that an image's was made on, as far as that is known.
    ///
    /// # Errors
    /// Those of reading the records.
    pub(super) fn parent(&self, id: &LayerId) -> Result<Option<LayerId>> {
        let mut parent = None;
        self.each(|name, record| {
            let is_it = name != MOUNTS && read_small(record, CACHE_ID)?.is_some_and(|t| is(&t, id));
            if is_it {
                parent = read_small(record, PARENT)?;
            }
            Ok(())
        })?;
        let Some(parent) = parent else { return Ok(None) };
        let mut words = parent.trim_ascii().splitn(2, |byte| *byte == b':');
        let (Some(algorithm), Some(chain)) = (words.next(), words.next()) else { return Ok(None) };
        let mut dir = None;
        for name in [algorithm, chain] {
            // A name, and nothing that leads elsewhere.
            if LayerId::from_bytes(name).is_none() {
                return Ok(None);
            }
            let from = dir.as_ref().unwrap_or(&self.dir);
            match find_dir(from.as_fd(), name).at("open", || show_path(&self.path))? {
                Some(found) => dir = Some(found),
                None => return Ok(None),
            }
        }
        let dir = dir.as_ref().unwrap_or(&self.dir);
        let text = read_small(dir.as_fd(), CACHE_ID).at("read", || show_path(&self.path))?;
        Ok(text.and_then(|text| LayerId::from_bytes(text.trim_ascii())))
    }

    /// Calls `act` with each record: the name of the directory it lies in, and its own.
    fn each(
        &self,
        mut act: impl FnMut(&[u8], BorrowedFd<'_>) -> std::result::Result<(), Errno>,
    ) -> Result<()> {
        let directories = |dir: BorrowedFd<'_>| {
            let mut names = Vec::new();
            sys::name::list(dir, |name, _, kind| {
                if matches!(kind, FileType::Directory | FileType::Unknown) {
                    names.push(name.to_vec());
                }
                Ok(())
            })?;
            Ok::<_, Errno>(names)
        };
        let mut all = || {
            for group in directories(self.dir.as_fd())? {
                let Some(dir) = find_dir(self.dir.as_fd(), &group)? else { continue };
                for name in directories(dir.as_fd())? {
                    let Some(record) = find_dir(dir.as_fd(), &name)? else { continue };
                    act(&group, record.as_fd())?;
                }
            }
            Ok(())
        };
        all().at("read", || show_path(&self.path))
    }
}

fn is(text: &[u8], id: &LayerId) -> bool {
    text.trim_ascii() == id.bytes()
}
