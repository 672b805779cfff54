//! Images in a store: what layers they have, and what their makers said of them.
//!
//! A store of layers knows no images. A record for each, `lamina-images/ID.json` in the root of the
//! store, names its layers; it is written last, so that an image that has a record is whole.
//! [`import`] and [`export`] move images in and out.
//!
//! A crash leaves whole layers without a record at most; importing again takes them up.

pub mod export;
pub mod import;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::archive::Digest;
use crate::error::{Context, Errno, Error, Result};
use crate::options::show_path;
use crate::store::engine::IMAGES;
use crate::store::layout::{make_dirs, replace_small};
use crate::sys::name::{self, At};
use crate::sys::{data, open};

const SUFFIX: &str = ".json";

/// An image as the store remembers it.
#[derive(Clone, Debug, Serialize, Deserialize, PartialEq, Eq)]
pub struct Record {
    /// Names with tags, as it came.
    pub names: Vec<String>,
    /// Ids of the layers in the store, the lowest first.
    pub layers: Vec<String>,
    /// The configuration, as it came.
    pub config: String,
}

impl Record {
    /// Returns the image's id.
    pub fn id(&self) -> Digest {
        Digest::of(self.config.as_bytes())
    }
}

/// The records of a store.
#[derive(Debug)]
pub struct Records {
    dir: OwnedFd,
    path: PathBuf,
}

impl Records {
    /// Opens those of the store at `root`, making the directory where it is missing.
    ///
    /// # Errors
    /// Those of mkdir(2) and open(2).
    pub fn open(root: &Path) -> Result<Self> {
        let path = root.join(IMAGES);
        make_dirs(&path, 0o700)?;
        let flags = rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
        let dir = rustix::fs::open(&path, flags, rustix::fs::Mode::empty())
            .at("open", || show_path(&path))?;
        Ok(Self { dir, path })
    }

    /// Makes a file without a name on the filesystem of the store.
    ///
    /// # Errors
    /// Those of open(2).
    pub fn unnamed_file(&self) -> Result<File> {
        let file = open::unnamed(self.dir.as_fd(), 0o600);
        file.at("openat", || show_path(&self.path)).map(File::from)
    }

    /// Writes a record, with the names that the same image had before; another image that had one
    /// of its names loses it.
    ///
    /// # Errors
    /// Those of writing and renaming.
    /// # Crash
    /// A name may be left to two images.
    pub fn add(&self, record: &mut Record) -> Result<()> {
        let (same, others): (Vec<Record>, Vec<Record>) =
            self.list()?.into_iter().partition(|known| known.config == record.config);
        for known in same.into_iter().flat_map(|known| known.names) {
            if !record.names.contains(&known) {
                record.names.push(known);
            }
        }
        self.put(record)?;
        for mut other in others {
            let before = other.names.len();
            other.names.retain(|name| !record.names.contains(name));
            if other.names.len() != before {
                self.put(&other)?;
            }
        }
        Ok(())
    }

    fn put(&self, record: &Record) -> Result<()> {
        let text = serde_json::to_vec(record).map_err(|error| self.broken(&error))?;
        replace_small(self.dir.as_fd(), &file_name(&record.id()), &text, 0o600)
            .at("write", || show_path(&self.path))
    }

    /// Returns all records, by id.
    ///
    /// # Errors
    /// Those of reading; `EIO` for a record that is damaged.
    pub fn list(&self) -> Result<Vec<Record>> {
        let mut names = Vec::new();
        name::list(self.dir.as_fd(), |name, _, _| {
            if name.ends_with(SUFFIX.as_bytes()) {
                names.push(name.to_vec());
            }
            Ok(())
        })
        .at("getdents64", || show_path(&self.path))?;
        names.sort_unstable();
        let mut records = Vec::new();
        for name in names {
            let text = read_record(&self.dir, &name).at("read", || show_path(&self.path))?;
            if let Some(text) = text {
                records.push(serde_json::from_slice(&text).map_err(|error| self.broken(&error))?);
            }
        }
        Ok(records)
    }

    /// Returns the image that is meant by a name or by the beginning of its id.
    ///
    /// # Errors
    /// `EINVAL` if there is none or more than one.
    pub fn find(&self, wanted: &str) -> Result<Record> {
        let hex = wanted.strip_prefix("sha256:").unwrap_or(wanted);
        let is_meant = |record: &Record| {
            record.names.iter().any(|name| name == wanted)
                || (hex.len() >= 4 && record.id().hex().starts_with(hex))
        };
        let mut found = self.list()?.into_iter().filter(is_meant);
        let record = found.next().ok_or_else(|| {
            Error::invalid(wanted.to_owned(), "is no image of the store; see lamina image list")
        })?;
        if found.next().is_some() {
            return Err(Error::invalid(
                wanted.to_owned(),
                "means several images; give more of the id",
            ));
        }
        Ok(record)
    }

    /// Forgets an image; its layers stay.
    ///
    /// # Errors
    /// Those of unlinkat(2).
    pub fn remove(&self, record: &Record) -> Result<()> {
        let name = file_name(&record.id());
        name::unlink(At::new(self.dir.as_fd(), &name)).at("unlinkat", || show_path(&self.path))?;
        data::sync(self.dir.as_fd(), false).at("fsync", || show_path(&self.path))
    }

    fn broken(&self, error: &serde_json::Error) -> Error {
        Error::Corrupt {
            what: format!("a record of an image is damaged: {error}").into(),
            at: show_path(&self.path).into(),
        }
    }
}

fn file_name(id: &Digest) -> Vec<u8> {
    format!("{}{SUFFIX}", id.hex()).into_bytes()
}

/// Reads a record, which may be larger than what the store calls small.
fn read_record(dir: &OwnedFd, name: &[u8]) -> std::result::Result<Option<Vec<u8>>, Errno> {
    match open::reader(dir.as_fd(), name) {
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(errno),
        Ok(file) => {
            let mut text = Vec::new();
            let mut chunk = vec![0; 64 * 1024];
            loop {
                let got = data::read_at(file.as_fd(), &mut chunk, text.len() as u64)?;
                if got == 0 {
                    return Ok(Some(text));
                }
                text.extend_from_slice(chunk.get(..got).unwrap_or_default());
            }
        }
    }
}
