//! New layers: built in a temporary directory, then published by one rename.
//!
//! Takes the lock of the parent (shared) and that of the store, for the publishing only. A crash
//! before leaves a temporary directory; after it, the layer is whole.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{RenameFlags, XattrFlags};

use super::driver::no_such;
use super::layout::{
    ADDITIONAL, COMMITTED, DIFF, EMPTY, Home, LINK, LINK_DIR, LOWER, LOWER_LAYERS, LayerId, LinkId,
    MERGED, Variant, WORK, has, read_small, write_small,
};
use super::lower::{parse_lower, print_lower, print_lower_layers};
use super::options::Sync;
use super::stage::TempDir;
use super::{Found, Store, contents, link, lock, stage};
use crate::error::{Context, Errno, Error, Result};
use crate::options::show_path;
use crate::sys;
use crate::sys::lockfile::Sharing;
use crate::sys::name::At;
use crate::sys::xattr::Target;

/// Xattr that holds what owner and mode should be where `force_mask` replaces them.
const OVERRIDE: &[u8] = b"user.containers.override_stat";

/// How a layer is to be made.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CreateOptions<'a> {
    /// The layer beneath it.
    pub parent: Option<&'a LayerId>,
    /// Whether it is for a container, and so stays in the own home.
    pub read_write: bool,
    /// Owner of its directories where no parent says otherwise; uid and gid 0 unless given.
    pub owner: Option<(u32, u32)>,
}

/// Owner and mode of the root of a content.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct RootStat {
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mode: u32,
}

/// A layer that is complete but for its content, and that nobody sees.
#[derive(Debug)]
pub struct StagedLayer<'a> {
    temp: TempDir<'a>,
    id: LayerId,
    link: LinkId,
    layer: OwnedFd,
    diff: OwnedFd,
    parent: Option<(&'a Home, LayerId)>,
    sync: Sync,
    has_content: bool,
}

impl Store {
    /// Makes a layer.
    ///
    /// # Errors
    /// `LayerExists`; `NoSuchLayer` for the parent; `Invalid` beyond the depth that the format has.
    pub fn create(&self, id: &LayerId, options: CreateOptions<'_>) -> Result<()> {
        self.stage(id, options)?.publish()
    }

    /// Makes a layer that has the content of `template` beneath it.
    ///
    /// # Errors
    /// As [`Store::create`].
    pub fn create_from_template(
        &self,
        id: &LayerId,
        template: &LayerId,
        read_write: bool,
    ) -> Result<()> {
        self.create(id, CreateOptions { parent: Some(template), read_write, owner: None })
    }

    /// Makes a layer whose content is still to be written, unseen until it is published.
    ///
    /// # Errors
    /// As [`Store::create`].
    pub fn stage(&self, id: &LayerId, options: CreateOptions<'_>) -> Result<StagedLayer<'_>> {
        if self.exists(id)? {
            return Err(Error::LayerExists { id: id.to_string().into() });
        }
        let home = match self.writable_homes().nth(1) {
            Some(images) if !options.read_write => images,
            _ => self.home(),
        };
        let parent = match options.parent {
            Some(parent) => Some((self.get_layer(parent)?, parent.clone())),
            None => None,
        };
        let lower = match &parent {
            Some((found, parent)) => Some(self.lower_files(found, parent)?),
            None => None,
        };
        let (uid, gid) = options.owner.unwrap_or((0, 0));
        let root = match &parent {
            Some((found, parent)) => root_stat(found, parent)?,
            None => RootStat { uid, gid, mode: home.variant().base_mode() },
        };
        let temp = TempDir::new(home)?;
        let name = TempDir::name_of(id);
        let at = || home.show(id);
        make_dir(temp.dir().as_fd(), &name, RootStat { uid, gid, mode: 0o700 })
            .at("mkdirat", at)?;
        let layer = sys::open::directory(temp.dir().as_fd(), &name).at("open", at)?;
        let real = match self.options().force_mask {
            Some(mode) => RootStat { uid, gid, mode },
            None => root,
        };
        let diff =
            self.make_dirs(&layer, home.variant(), parent.is_some(), real).at("mkdirat", at)?;
        if self.options().force_mask.is_some() {
            let value = format!("{}:{}:{:04o}:dir", root.uid, root.gid, root.mode);
            sys::xattr::set(
                Target::Open(diff.as_fd()),
                OVERRIDE,
                value.as_bytes(),
                XattrFlags::empty(),
            )
            .at("setxattr", at)?;
        }
        let link = LinkId::random();
        let write = |name: &[u8], text: &[u8]| {
            write_small(layer.as_fd(), name, text, 0o644).at("write", at)
        };
        write(LINK, link.bytes())?;
        if let Some((links, ids)) = lower {
            write(LOWER, &links)?;
            if home.variant() == Variant::Containers {
                write(LOWER_LAYERS, &ids)?;
            }
        }
        let sync = self.options().sync;
        let parent = parent.map(|(found, parent)| (found.home, parent));
        Ok(StagedLayer {
            temp,
            id: id.clone(),
            link,
            layer,
            diff,
            parent,
            sync,
            has_content: false,
        })
    }

    fn make_dirs(
        &self,
        layer: &OwnedFd,
        variant: Variant,
        has_parent: bool,
        real: RootStat,
    ) -> std::result::Result<OwnedFd, Errno> {
        make_dir(layer.as_fd(), DIFF, real)?;
        let diff = sys::open::directory(layer.as_fd(), DIFF)?;
        let private = RootStat { mode: 0o700, ..real };
        let others: &[&[u8]] = match (variant == Variant::Containers, has_parent) {
            (true, false) => &[WORK, MERGED, EMPTY],
            (true, true) => &[WORK, MERGED],
            (false, false) => &[],
            (false, true) => &[WORK],
        };
        for name in others {
            make_dir(layer.as_fd(), name, private)?;
        }
        Ok(diff)
    }

    /// Returns `lower` and `lower-layers` for a child of a layer.
    fn lower_files(&self, found: &Found<'_>, parent: &LayerId) -> Result<(Vec<u8>, Vec<u8>)> {
        let at = found.home.show(parent);
        let link_of = |found: &Found<'_>, id: &LayerId| -> Result<LinkId> {
            let at = found.home.show(id);
            if let Some(link) = link::of_layer(&found.dir, &at)? {
                return Ok(link);
            }
            if found.is_writable {
                link::repair(found.home)?;
            }
            link::of_layer(&found.dir, &at)?.ok_or_else(|| Error::Corrupt {
                what: "has no link file; run lamina store check --repair on its store".into(),
                at: at.into(),
            })
        };
        let link = link_of(found, parent)?;
        let beneath = self.lowers(found, parent)?;
        let max = found.home.variant().depth_max();
        if beneath.len() + 1 > max {
            return Err(Error::invalid(
                format!("parent {parent}"),
                format!("has {max} layers beneath it, which is the most; flatten some"),
            ));
        }
        let text = read_small(found.dir.as_fd(), LOWER).at("read", || at.clone())?;
        let links = match text {
            Some(text) => parse_lower(&text, &at)?,
            // A store that has left the symlinks behind.
            None => {
                let mut links = Vec::new();
                for lower in &beneath {
                    links.push(link_of(&self.get_layer(&lower.id)?, &lower.id)?);
                }
                links
            }
        };
        let ids: Vec<LayerId> = beneath.into_iter().map(|lower| lower.id).collect();
        Ok((print_lower(&link, &links), print_lower_layers(parent, &ids)))
    }
}

impl StagedLayer<'_> {
    /// Returns the directory for the content, which is then synced with the rest.
    pub fn content(&mut self) -> BorrowedFd<'_> {
        self.has_content = true;
        self.diff.as_fd()
    }

    /// Puts a directory in place of the empty one for the content; it is synced with the rest.
    ///
    /// # Errors
    /// Those of rmdir(2) and renameat2(2).
    pub(super) fn replace_content(&mut self, from: At<'_>) -> std::result::Result<(), Errno> {
        let to = At::new(self.layer.as_fd(), DIFF);
        sys::name::rmdir(to)?;
        sys::name::rename(from, to, RenameFlags::NOREPLACE)?;
        self.diff = sys::open::directory(self.layer.as_fd(), DIFF)?;
        self.has_content = true;
        Ok(())
    }

    /// Has the content be where `path` leads, in the additional layer at `owner`.
    ///
    /// # Errors
    /// Those of rmdir(2), symlinkat(2) and write(2).
    pub(super) fn lie_elsewhere(
        &self,
        path: &[u8],
        owner: &[u8],
    ) -> std::result::Result<(), Errno> {
        let at = At::new(self.layer.as_fd(), DIFF);
        sys::name::rmdir(at)?;
        sys::name::symlink(path, at)?;
        write_small(self.layer.as_fd(), ADDITIONAL, owner, 0o644)
    }

    /// Syncs the layer and gives it its place.
    ///
    /// # Errors
    /// `LayerExists` if another was faster; `NoSuchLayer` if the parent is gone meanwhile.
    /// # Locks
    /// The parent's, shared, and the store's.
    /// # Crash
    /// At worst a symlink whose layer is still in the temporary directory; both go.
    pub fn publish(self) -> Result<()> {
        let home = self.temp.home();
        let at = || home.show(&self.id);
        if self.has_content || self.sync == Sync::Filesystem {
            rustix::fs::syncfs(&self.layer).at("syncfs", at)?;
        } else {
            sys::data::sync(self.layer.as_fd(), false).at("fsync", at)?;
        }
        let _parent = match &self.parent {
            Some((home, parent)) => {
                let locked =
                    lock::layer(home, parent, Sharing::Shared)?.ok_or_else(|| no_such(parent))?;
                commit(home, &locked.dir).at("write", || home.show(parent))?;
                Some(locked)
            }
            None => None,
        };
        let held = lock::store(home)?;
        let links = home.make_dir(LINK_DIR.as_bytes(), 0o755)?;
        link::make(&links, &self.link, &self.id)?;
        let name = TempDir::name_of(&self.id);
        let published = sys::name::rename(
            At::new(self.temp.dir().as_fd(), &name),
            At::new(home.dir(), self.id.bytes()),
            RenameFlags::NOREPLACE,
        );
        if let Err(errno) = published {
            stage::unlink_link(&links, &self.link)?;
            return Err(match errno {
                Errno::EXIST => Error::LayerExists { id: self.id.to_string().into() },
                errno => Error::sys("renameat2", at(), errno),
            });
        }
        sys::data::sync(home.dir(), false).at("fsync", || show_path(home.path()))?;
        held.record_write()?;
        drop(held);
        self.temp.remove()
    }
}

/// Marks a parent in Docker's variant as one that must not change any more.
fn commit(home: &Home, parent: &OwnedFd) -> std::result::Result<(), Errno> {
    if home.variant() != Variant::Docker || has(parent.as_fd(), COMMITTED)? {
        return Ok(());
    }
    match write_small(parent.as_fd(), COMMITTED, b"", 0o600) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// Makes a directory with exactly this mode and owner.
///
/// # Errors
/// Those of mkdirat(2), fchownat(2) and fchmod(2).
pub(super) fn make_dir(
    dir: BorrowedFd<'_>,
    name: &[u8],
    stat: RootStat,
) -> std::result::Result<(), Errno> {
    let at = At::new(dir, name);
    sys::name::mkdir(at, 0o700)?;
    let handle = sys::open::handle(dir, name)?;
    let made = sys::stat::of(&handle)?;
    if (made.stx_uid, made.stx_gid) != (stat.uid, stat.gid) {
        sys::name::chown_handle(&handle, Some(stat.uid), Some(stat.gid))?;
    }
    sys::name::chmod_handle(&handle, stat.mode)
}

/// Returns owner and mode that a child inherits: those of the parent's content, or those that
/// `force_mask` keeps in an xattr.
fn root_stat(found: &Found<'_>, parent: &LayerId) -> Result<RootStat> {
    let at = || found.home.show(parent);
    let all = contents(found.home, parent, &found.dir)?;
    let Some(diff) = all.first() else {
        return Err(no_such(parent));
    };
    let value = sys::xattr::get(Target::Open(diff.dir.as_fd()), OVERRIDE).at("getxattr", at)?;
    if let Some(stat) = value.as_deref().and_then(parse_override) {
        return Ok(stat);
    }
    let stat = sys::stat::of(&diff.dir).at("statx", at)?;
    Ok(RootStat { uid: stat.stx_uid, gid: stat.stx_gid, mode: u32::from(stat.stx_mode) & 0o7777 })
}

/// Parses `UID:GID:MODE[:TYPE]`.
fn parse_override(value: &[u8]) -> Option<RootStat> {
    let text = std::str::from_utf8(value).ok()?;
    let mut fields = text.split(':');
    let uid = fields.next()?.parse().ok()?;
    let gid = fields.next()?.parse().ok()?;
    let mode = u32::from_str_radix(fields.next()?, 8).ok()? & 0o7777;
    Some(RootStat { uid, gid, mode })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overridden_stats_are_read_in_every_form() {
        let expected = Some(RootStat { uid: 5, gid: 6, mode: 0o755 });
        for text in ["5:6:755", "5:6:0755", "5:6:0755:dir", "5:6:40755:dir"] {
            assert_eq!(parse_override(text.as_bytes()), expected, "{text}");
        }
        for text in ["", "5", "5:6", "5:6:x", "a:6:755", "-1:6:755"] {
            assert_eq!(parse_override(text.as_bytes()), None, "{text}");
        }
    }
}
