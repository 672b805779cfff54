//! What the space of a store is used for, and giving back what nobody needs.

use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd};

use serde::Serialize;

use super::Store;
use super::check::{Finding, Kind};
use super::layout::{DIFF, Home, LINK_DIR, LayerId, STAGING, TEMPS, WORK, find_dir};
use crate::error::{Context, Errno, Error, Result};
use crate::options::show_path;
use crate::sys;

/// Bytes of disk that something takes, as du(1) counts them.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Item {
    /// `layer`, `links`, `temporary`, `staging` or `other`.
    pub kind: &'static str,
    /// The layer, or the name in the home.
    pub name: String,
    /// All of it.
    pub bytes: u64,
    /// Of that, the content of a layer.
    pub content: u64,
    /// Of that, work directories and what is left in them.
    pub work: u64,
    /// Whether the metadata of the engine know it; absent without such metadata.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub known: Option<bool>,
}

impl Store {
    /// Returns what takes space in the home and the image store; their sum is what du(1) says.
    ///
    /// # Errors
    /// Those of walking the tree.
    pub fn usage(&self) -> Result<Vec<Item>> {
        let mut all = Vec::new();
        let known = self.known_layers()?;
        let of_images = self.image_layers()?;
        for home in self.writable_homes() {
            let mut names = Vec::new();
            sys::name::list(home.dir(), |name, _, _| {
                names.push(name.to_vec());
                Ok(())
            })
            .at("getdents64", || show_path(home.path()))?;
            names.sort();
            let mut top =
                blocks(&sys::stat::of(home.dir()).at("statx", || show_path(home.path()))?);
            for name in names {
                let Some(mut item) = measure(home, &name)? else { continue };
                if item.kind == "layer" {
                    item.known = known
                        .as_ref()
                        .map(|known| known.contains(&item.name) || of_images.contains(&item.name));
                } else if item.kind == "other" {
                    top += item.bytes;
                    continue;
                }
                all.push(item);
            }
            all.push(Item {
                kind: "other",
                name: show_path(home.path()),
                bytes: top,
                content: 0,
                work: 0,
                known: None,
            });
        }
        Ok(all)
    }

    /// Gives back what nobody needs, and returns what that was: temporary directories, incomplete
    /// layers, symlinks and counts of what is gone. With `orphans` also layers that the engine's
    /// metadata do not know, unless they are mounted.
    ///
    /// # Errors
    /// Those of [`Store::repair`] and [`Store::remove`]; `Invalid` if orphans are asked for where no
    /// metadata tell what one is.
    pub fn collect(&self, orphans: bool) -> Result<Vec<Finding>> {
        let mut done = self.repair()?;
        if !orphans {
            return Ok(done);
        }
        let known = self.known_layers()?.ok_or_else(|| {
            Error::invalid(
                "--orphans",
                "needs overlay-layers/layers.json, which tells what an engine uses; remove \
                 layers by lamina layer remove",
            )
        })?;
        let of_images = self.image_layers()?;
        // Children before their parents: each pass removes what has none any more.
        loop {
            let mut removed = false;
            for id in self.list()? {
                if known.contains(id.as_str()) || of_images.contains(id.as_str()) {
                    continue;
                }
                match self.remove(&id) {
                    Ok(()) => {
                        removed = true;
                        done.push(Finding {
                            kind: Kind::Incomplete,
                            what: id.to_string(),
                            detail: "no image or container knew it; removed".into(),
                        });
                    }
                    Err(Error::Busy { .. } | Error::NoSuchLayer { .. }) => (),
                    Err(error) => return Err(error),
                }
            }
            if !removed {
                return Ok(done);
            }
        }
    }
}

/// What a part of a layer is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Part {
    Content,
    Work,
    Other,
}

/// Measures what a part of a layer takes: a name in a directory.
pub(super) type Measure<'a> = dyn FnMut(BorrowedFd<'_>, &[u8], Part) -> Result<()> + 'a;

/// Returns what takes space in a store of old, each inode where it comes first: layers share files.
///
/// # Errors
/// Those of walking the tree, and of `parts`, which names the parts of a layer.
pub(super) fn of_layers(
    home: &Home,
    ids: &[LayerId],
    parts: impl Fn(&LayerId, &mut Measure<'_>) -> Result<()>,
) -> Result<Vec<Item>> {
    let at = || show_path(home.path());
    let mut seen = HashSet::new();
    let item = |kind, name| Item { kind, name, bytes: 0, content: 0, work: 0, known: None };
    let mut all = Vec::new();
    for id in ids {
        let mut layer = item("layer", id.to_string());
        parts(id, &mut |dir, name, part| {
            let bytes = new_bytes(dir, name, &mut seen).at("statx", at)?;
            layer.bytes += bytes;
            match part {
                Part::Content => layer.content += bytes,
                Part::Work => layer.work += bytes,
                Part::Other => (),
            }
            Ok(())
        })?;
        all.push(layer);
    }
    let mut other = item("other", show_path(home.path()));
    other.bytes = new_bytes(home.dir(), b".", &mut seen).at("statx", at)?;
    all.push(other);
    Ok(all)
}

/// Returns what a tree takes of inodes that were not seen before.
fn new_bytes(
    dir: BorrowedFd<'_>,
    name: &[u8],
    seen: &mut HashSet<(u64, u64)>,
) -> std::result::Result<u64, Errno> {
    let mut sum = 0_u64;
    let mut count = |stat: &sys::stat::Statx| {
        if seen.insert((sys::stat::device(stat), stat.stx_ino)) {
            sum = sum.saturating_add(blocks(stat));
        }
    };
    match sys::stat::find(dir, name) {
        Ok(Some(stat)) if u32::from(stat.stx_mode) & libc::S_IFMT == libc::S_IFDIR => {
            match sys::open::directory(dir, name) {
                Ok(below) => {
                    count(&stat);
                    sys::tree::walk(below.as_fd(), &mut |_, stat| {
                        count(stat);
                        Ok(())
                    })?;
                }
                // A mountpoint, or gone.
                Err(Errno::XDEV | Errno::NOENT) => (),
                Err(errno) => return Err(errno),
            }
        }
        Ok(Some(stat)) => count(&stat),
        // A mountpoint whose server is gone takes no space of its own either.
        Ok(None) | Err(Errno::NOTCONN | Errno::CONNABORTED) => (),
        Err(errno) => return Err(errno),
    }
    Ok(sum)
}

fn blocks(stat: &sys::stat::Statx) -> u64 {
    stat.stx_blocks.saturating_mul(512)
}

fn measure(home: &Home, name: &[u8]) -> Result<Option<Item>> {
    let shown = name.escape_ascii().to_string();
    let path = || show_path(&home.join(&[name]));
    let Some(stat) = sys::stat::find(home.dir(), name).at("statx", path)? else { return Ok(None) };
    let kind = match name {
        _ if name == LINK_DIR.as_bytes() => "links",
        TEMPS => "temporary",
        STAGING => "staging",
        _ if u32::from(stat.stx_mode) & libc::S_IFMT == libc::S_IFDIR
            && LayerId::from_bytes(name).is_some() =>
        {
            "layer"
        }
        _ => "other",
    };
    let mut item =
        Item { kind, name: shown, bytes: blocks(&stat), content: 0, work: 0, known: None };
    let Some(dir) =
        (if kind == "other" { None } else { find_dir(home.dir(), name).at("open", path)? })
    else {
        return Ok(Some(item));
    };
    let mut names = Vec::new();
    sys::name::list(dir.as_fd(), |name, _, _| {
        names.push(name.to_vec());
        Ok(())
    })
    .at("getdents64", path)?;
    for name in names {
        let bytes = tree_bytes(dir.as_fd(), &name).at("statx", path)?;
        item.bytes += bytes;
        if kind == "layer" && name.starts_with(DIFF) {
            item.content += bytes;
        } else if kind == "layer" && name == WORK {
            item.work += bytes;
        }
    }
    Ok(Some(item))
}

/// Returns what a tree takes, hard links once; what is mounted in it is not of it.
fn tree_bytes(dir: BorrowedFd<'_>, name: &[u8]) -> std::result::Result<u64, Errno> {
    let stat = match sys::stat::find(dir, name) {
        Ok(Some(stat)) => stat,
        // A mountpoint whose server is gone takes no space of its own either.
        Ok(None) | Err(Errno::NOTCONN | Errno::CONNABORTED) => return Ok(0),
        Err(errno) => return Err(errno),
    };
    let mut sum = blocks(&stat);
    if u32::from(stat.stx_mode) & libc::S_IFMT == libc::S_IFDIR {
        match sys::open::directory(dir, name) {
            Ok(below) => sys::tree::walk(below.as_fd(), &mut |_, stat| {
                sum = sum.saturating_add(blocks(stat));
                Ok(())
            })?,
            // A mountpoint, or gone.
            Err(Errno::XDEV) => return Ok(0),
            Err(Errno::NOENT) => (),
            Err(errno) => return Err(errno),
        }
    }
    Ok(sum)
}
