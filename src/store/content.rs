//! What a layer holds and what lies beneath it, opened: `diff`, its older contents, and those of the
//! layers that `lower-layers` or `lower` names.
//!
//! Takes no locks, but the store's where a symlink was lost.

use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use rustix::fs::{CWD, Mode, OFlags, openat};

use super::driver::Parts;
use super::layout::{
    DIFF, EMPTY, Home, LOWER, LOWER_LAYERS, LayerId, LinkId, diff_name, find_dir, read_small,
};
use super::lower::{parse_lower, parse_lower_layers};
use super::{Found, Store, link};
use crate::error::{Context, Errno, Error, Result};
use crate::options::show_path;
use crate::sys;
use crate::sys::name::At;

/// A layer beneath another.
#[derive(Clone, Debug)]
pub struct Lower<'a> {
    /// The home that holds it.
    pub home: &'a Home,
    /// Its id.
    pub id: LayerId,
}

impl Store {
    /// Returns the layers beneath one, parent first. Lost symlinks are made again.
    ///
    /// # Errors
    /// `Corrupt` if a list cannot be read or names a layer that is nowhere.
    /// # Locks
    /// The store's, only where a symlink was lost.
    pub fn lowers(&self, found: &Found<'_>, id: &LayerId) -> Result<Vec<Lower<'_>>> {
        let at = found.home.show(id);
        let named = self.named_beneath(found, &at)?.into_iter();
        named.map(|id| self.lower(id, &at).map(|(lower, _)| lower)).collect()
    }

    /// Returns the layers that one names as beneath it, parent first, wherever they are.
    fn named_beneath(&self, found: &Found<'_>, at: &str) -> Result<Vec<LayerId>> {
        let read = |name: &[u8]| read_small(found.dir.as_fd(), name).at("read", || at.to_owned());
        if let Some(text) = read(LOWER_LAYERS)? {
            return parse_lower_layers(&text, at);
        }
        let Some(text) = read(LOWER)? else { return Ok(Vec::new()) };
        let farms = self.farms()?;
        let resolve = |link| match resolve(&farms, &link)? {
            Some(id) => Ok(id),
            None => self.resolve_lost(&link, at),
        };
        parse_lower(&text, at)?.into_iter().map(resolve).collect()
    }

    /// Opens a layer that one beneath which it lies names.
    fn lower(&self, id: LayerId, at: &str) -> Result<(Lower<'_>, OwnedFd)> {
        for home in &self.homes {
            if let Some(dir) = home.layer(&id)? {
                return Ok((Lower { home, id }, dir));
            }
        }
        Err(Error::Corrupt {
            what: format!("the layer {id} beneath it is missing; restore it, or remove this layer")
                .into(),
            at: at.to_owned().into(),
        })
    }

    /// Opens the directories of symlinks of all homes that have one.
    pub(super) fn farms(&self) -> Result<Vec<OwnedFd>> {
        let mut farms = Vec::new();
        for home in &self.homes {
            farms.extend(home.links()?);
        }
        Ok(farms)
    }

    fn resolve_lost(&self, link: &LinkId, at: &str) -> Result<LayerId> {
        for home in self.writable_homes() {
            link::repair(home)?;
        }
        resolve(&self.farms()?, link)?.ok_or_else(|| Error::Corrupt {
            what: format!("nothing has the link {link} that it names; remove this layer").into(),
            at: at.to_owned().into(),
        })
    }

    /// Opens the content of a layer and of all beneath it.
    ///
    /// # Errors
    /// `NoSuchLayer`, and as [`Store::lowers`].
    pub fn parts(&self, id: &LayerId) -> Result<Parts> {
        let found = self.get_layer(id)?;
        Ok(Parts {
            own: contents(found.home, id, &found.dir)?,
            lowers: self.lower_contents(&found, id)?,
        })
    }

    /// Opens the contents of all layers beneath one, topmost first.
    ///
    /// # Errors
    /// As [`Store::lowers`].
    pub fn lower_contents(&self, found: &Found<'_>, id: &LayerId) -> Result<Vec<Content>> {
        let at = found.home.show(id);
        let mut all = Vec::new();
        for id in self.named_beneath(found, &at)? {
            let (lower, dir) = self.lower(id, &at)?;
            all.extend(contents(lower.home, &lower.id, &dir)?);
        }
        Ok(all)
    }
}

/// Returns the layer that a symlink in one of these directories stands for.
pub(super) fn resolve(farms: &[OwnedFd], link: &LinkId) -> Result<Option<LayerId>> {
    for links in farms {
        if let Some(id) = link::resolve(links, link)? {
            return Ok(Some(id));
        }
    }
    Ok(None)
}

/// One directory of content, open and by its path.
#[derive(Debug)]
pub struct Content {
    /// The directory.
    pub dir: OwnedFd,
    /// Its path.
    pub path: PathBuf,
}

/// Opens `diff` of a layer and its older contents, newest first.
///
/// # Errors
/// `Corrupt` without a `diff`; those of opening.
pub fn contents(home: &Home, id: &LayerId, layer: &OwnedFd) -> Result<Vec<Content>> {
    let at = || home.show(id);
    let mut all = vec![content(home, id, layer)?];
    for number in 1.. {
        let name = diff_name(number);
        let Some(dir) = find_dir(layer.as_fd(), &name).at("open", at)? else { break };
        all.push(Content { dir, path: home.join(&[id.bytes(), &name]) });
    }
    Ok(all)
}

/// Opens `diff` of a layer, which is a symlink if the content lies in an additional layer store.
pub(super) fn content(home: &Home, id: &LayerId, layer: &OwnedFd) -> Result<Content> {
    let path = home.join(&[id.bytes(), DIFF]);
    let missing = || Error::Corrupt {
        what: "has no diff; lamina store check tells more".into(),
        at: home.show(id).into(),
    };
    match sys::name::readlink(At::new(layer.as_fd(), DIFF)) {
        Ok(target) => {
            let target = PathBuf::from(OsStr::from_bytes(&target));
            if !target.is_absolute() {
                return Err(missing());
            }
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let dir =
                openat(CWD, &target, flags, Mode::empty()).at("open", || show_path(&target))?;
            Ok(Content { dir, path: target })
        }
        Err(Errno::INVAL) => {
            let dir = sys::open::directory(layer.as_fd(), DIFF).at("open", || show_path(&path))?;
            Ok(Content { dir, path })
        }
        Err(Errno::NOENT) => Err(missing()),
        Err(errno) => Err(Error::sys("readlinkat", show_path(&path), errno)),
    }
}

/// Opens the empty lower of a layer that has nothing beneath it.
///
/// # Errors
/// Those of opening, and of making it where it was lost.
pub fn empty_lower(home: &Home, id: &LayerId, layer: &OwnedFd) -> Result<Content> {
    let path = home.join(&[id.bytes(), EMPTY]);
    let at = || show_path(&path);
    if let Some(dir) = find_dir(layer.as_fd(), EMPTY).at("open", at)? {
        return Ok(Content { dir, path });
    }
    sys::name::mkdir(At::new(layer.as_fd(), EMPTY), 0o700).at("mkdirat", at)?;
    let dir = sys::open::directory(layer.as_fd(), EMPTY).at("open", at)?;
    Ok(Content { dir, path })
}
