//! The farm of short symlinks, and what puts it right after a crash of the machine.
//!
//! Either of `l/LINK` and `ID/link` can be made from the other. Takes the lock of the store.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};

use super::layout::{
    DIFF, Home, LINK, LINK_DIR, LayerId, LinkId, has, link_target, parse_link_target, read_small,
    replace_small,
};
use super::{lock, stage};
use crate::error::{Context, Errno, Result};
use crate::options::show_path;
use crate::sys;
use crate::sys::name::At;

/// Returns the layer that a symlink in `links`, the `l` of a home, stands for; `None` if there is no
/// such symlink, or it does not look like one of a layer.
///
/// # Errors
/// Those of readlinkat(2), `ENOENT` aside.
pub fn resolve(links: &OwnedFd, link: &LinkId) -> Result<Option<LayerId>> {
    target(links, link.bytes())
}

fn target(links: &OwnedFd, name: &[u8]) -> Result<Option<LayerId>> {
    match sys::name::readlink(At::new(links.as_fd(), name)) {
        Ok(target) => Ok(parse_link_target(&target)),
        Err(Errno::NOENT | Errno::INVAL) => Ok(None),
        Err(errno) => {
            Err(errno).at("readlinkat", || format!("{LINK_DIR}/{}", String::from_utf8_lossy(name)))
        }
    }
}

/// Returns the link id that a layer's own file names; `None` if it is missing or damaged.
///
/// # Errors
/// Those of reading the file.
pub fn of_layer(layer: &OwnedFd, at: &str) -> Result<Option<LinkId>> {
    let text = read_small(layer.as_fd(), LINK).at("read", || format!("{at}/link"))?;
    Ok(text.as_deref().and_then(LinkId::parse))
}

/// What symlinks and `link` files say, both ways.
#[derive(Debug, Default)]
pub struct Farm {
    /// Link ids by layer, from the files; damaged or missing ones are `None`.
    pub files: BTreeMap<LayerId, Option<LinkId>>,
    /// Layers by link id, from the symlinks.
    pub links: BTreeMap<LinkId, LayerId>,
    /// Names in `l` that are no symlinks of layers.
    pub strange: BTreeSet<Vec<u8>>,
}

impl Farm {
    /// Reads it all.
    ///
    /// # Errors
    /// Those of reading directories, files and symlinks.
    pub fn load(home: &Home) -> Result<Self> {
        let mut farm = Self::default();
        for id in home.list()? {
            // One that is gone since the listing is no layer, nor is one without content.
            if let Some(layer) = home.layer(&id)?
                && has(layer.as_fd(), DIFF).at("statx", || home.show(&id))?
            {
                let link = of_layer(&layer, &home.show(&id))?;
                farm.files.insert(id, link);
            }
        }
        let Some(links) = home.links()? else { return Ok(farm) };
        let mut names = Vec::new();
        sys::name::list(links.as_fd(), |name, _, _| {
            names.push(name.to_vec());
            Ok(())
        })
        .at("getdents64", || show_path(&home.join(&[LINK_DIR.as_bytes()])))?;
        for name in names {
            match (LinkId::parse(&name), target(&links, &name)?) {
                (Some(link), Some(id)) => {
                    farm.links.insert(link, id);
                }
                _ => {
                    farm.strange.insert(name);
                }
            }
        }
        Ok(farm)
    }

    /// Returns layers whose symlink is missing or stands for another.
    pub fn lost_links(&self) -> Vec<(&LayerId, &LinkId)> {
        let lost = |(id, link): &(&LayerId, &LinkId)| self.links.get(link) != Some(id);
        let named = self.files.iter().filter_map(|(id, link)| Some((id, link.as_ref()?)));
        named.filter(lost).collect()
    }

    /// Returns layers whose file is missing or damaged, and the link id that a symlink has for them.
    pub fn lost_files(&self) -> Vec<(&LayerId, Option<&LinkId>)> {
        let lost = self.files.iter().filter(|(_, link)| link.is_none());
        lost.map(|(id, _)| {
            (id, self.links.iter().find(|(_, target)| *target == id).map(|(link, _)| link))
        })
        .collect()
    }

    /// Returns symlinks that stand for no layer there is, or for one that names another.
    pub fn dangling(&self) -> Vec<(&LinkId, &LayerId)> {
        let owned = |link: &LinkId, id: &LayerId| match self.files.get(id) {
            None => false,
            // Its file can be made from this one.
            Some(None) => true,
            Some(Some(named)) => named == link,
        };
        self.links.iter().filter(|(link, id)| !owned(link, id)).collect()
    }
}

/// Makes lost symlinks from `link` files and lost files from symlinks; returns how many.
///
/// # Errors
/// Those of reading and writing.
/// # Locks
/// Takes the lock of the store.
pub fn repair(home: &Home) -> Result<usize> {
    let _held = lock::store(home)?;
    let links = home.make_dir(LINK_DIR.as_bytes(), 0o755)?;
    let farm = Farm::load(home)?;
    let mut mended = 0;
    for (id, link) in farm.lost_links() {
        // A symlink of that name that stands for something else is in the way.
        stage::unlink_link(&links, link)?;
        make(&links, link, id)?;
        mended += 1;
    }
    for (id, link) in farm.lost_files() {
        let Some(layer) = home.layer(id)? else { continue };
        // Without a symlink nothing above can refer to the layer by one; it gets a new name.
        let link = match link {
            Some(link) => link.clone(),
            None => {
                let link = LinkId::random();
                make(&links, &link, id)?;
                link
            }
        };
        replace_small(layer.as_fd(), LINK, link.bytes(), 0o644).at("write", || home.show(id))?;
        mended += 1;
    }
    if mended > 0 {
        sys::data::sync(links.as_fd(), false).at("fsync", || LINK_DIR)?;
        tracing::warn!("{}: {mended} links were lost and are there again", show_path(home.path()));
    }
    Ok(mended)
}

/// Makes the symlink of a layer.
///
/// # Errors
/// Those of symlinkat(2).
pub fn make(links: &OwnedFd, link: &LinkId, id: &LayerId) -> Result<()> {
    sys::name::symlink(&link_target(id), At::new(links.as_fd(), link.bytes()))
        .at("symlinkat", || format!("{LINK_DIR}/{link}"))
}
