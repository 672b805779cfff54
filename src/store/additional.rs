//! Layers of additional layer stores: content that another program brings when it is read, found by
//! the digest of its table of contents.
//!
//! `STORE/[base64(REFERENCE)/]DIGEST` holds `diff`, `info` and `blob`. Making the file `use` in it
//! tells the store that a layer refers to it now, rmdir(2) that none does any more; a store that
//! counts answers `ENOENT` to either.
//!
//! A crash leaves at worst a use that is never given back.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustix::fs::{CWD, Mode, OFlags, openat, stat};

use super::layout::{LayerId, io_error};
use super::{CreateOptions, Store};
use crate::archive::Digest;
use crate::error::{Context, Errno, Error, Result};
use crate::options::show_path;

/// A layer of an additional layer store.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Additional {
    path: PathBuf,
}

impl Additional {
    /// Returns what the store says of it, JSON as containers/storage keeps of a layer.
    ///
    /// # Errors
    /// Those of reading the file.
    pub fn info(&self) -> Result<String> {
        let path = self.path.join("info");
        std::fs::read_to_string(&path).map_err(|error| io_error("read", &path, error))
    }

    /// Returns the path of the archive that it came as.
    pub fn blob(&self) -> PathBuf {
        self.path.join("blob")
    }

    fn notify_use(&self) {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC;
        match openat(CWD, self.path.join("use"), flags, Mode::from_raw_mode(0o644)) {
            Err(Errno::NOENT) => (),
            done => tracing::debug!("{}: does not count uses: {done:?}", show_path(&self.path)),
        }
    }
}

/// Tells a store that a layer of it is not used any more.
pub(super) fn notify_release(path: &Path) {
    match rustix::fs::rmdir(path) {
        Err(Errno::NOENT) => (),
        done => tracing::debug!("{}: does not count uses: {done:?}", show_path(path)),
    }
}

impl Store {
    /// Finds a layer by the digest of its table of contents, in the additional layer stores that the
    /// options name; `reference` is that of its image, for stores that are asked with one.
    ///
    /// # Errors
    /// Those of looking, `ENOENT` aside.
    pub fn find_additional(&self, toc: &Digest, reference: &str) -> Result<Option<Additional>> {
        for store in &self.options().layer_stores {
            let mut path = store.path.clone();
            if store.with_reference {
                path.push(STANDARD.encode(reference));
            }
            path.push(toc.to_string());
            let mut is_whole = true;
            for name in ["diff", "info", "blob"] {
                let path = path.join(name);
                is_whole &= match stat(&path) {
                    Ok(_) => true,
                    Err(Errno::NOENT) => false,
                    Err(errno) => return Err(Error::sys("stat", show_path(&path), errno)),
                };
            }
            if is_whole {
                return Ok(Some(Additional { path }));
            }
        }
        Ok(None)
    }

    /// Makes a layer whose content lies in an additional layer store.
    ///
    /// # Errors
    /// As [`Store::create`].
    pub fn create_from_additional(
        &self,
        id: &LayerId,
        parent: Option<&LayerId>,
        layer: &Additional,
    ) -> Result<()> {
        let options = CreateOptions { parent, read_write: false, owner: None };
        let staged = self.stage(id, options)?;
        let content = layer.path.join("diff");
        staged
            .lie_elsewhere(content.as_os_str().as_bytes(), layer.path.as_os_str().as_bytes())
            .at("symlinkat", || id.to_string())?;
        // Before others see it: content that nobody uses may go.
        layer.notify_use();
        staged.publish().inspect_err(|_| notify_release(&layer.path))
    }
}
