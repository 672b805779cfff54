//! Looking for what is wrong with a store, and mending it.
//!
//! Looking takes no lock and changes nothing. Mending makes again what can be made from what is
//! there, and removes what nobody can use: it never removes a layer that has its content. A crash
//! while mending leaves less to mend.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::FileType;
use serde::Serialize;

use super::content::content;
use super::differ::STAGING_LOCK;
use super::layout::{
    DIFF, EMPTY, Home, LINK, LINK_DIR, LOWER, LOWER_LAYERS, LayerId, LinkId, STAGING, Variant,
    WORK, find_dir, has, link_target, read_small, replace_small,
};
use super::link::Farm;
use super::lower::{parse_lower, parse_lower_layers};
use super::stage::TempDir;
use super::{Store, flat, idmap, link, lock, stage};
use crate::error::{Context, Errno, Error, Result};
use crate::mount::mountinfo;
use crate::options::show_path;
use crate::sys;
use crate::sys::lockfile::{Sharing, try_lock_file};
use crate::sys::name::At;

/// What can be wrong.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A layer has no symlink in `l`.
    LostLink,
    /// A layer has no `link`, or one that cannot be read.
    LostLinkFile,
    /// A symlink stands for no layer.
    DanglingLink,
    /// Something in `l` is no symlink of a layer.
    StrangeLink,
    /// A directory without content: a layer that was never complete.
    Incomplete,
    /// `lower` or `lower-layers` cannot be read, or is missing where the other is there.
    DamagedLower,
    /// A layer names one beneath it that is nowhere.
    MissingParent,
    /// What a layer names beneath its parent is not what the parent names.
    WrongLower,
    /// `diff` cannot be opened, and is no directory of the layer.
    LostContent,
    /// A directory that a layer needs for its mounts is missing.
    LostDirectory,
    /// Contents of a layer were on their way to other names.
    UnfinishedRotation,
    /// A file that was written aside and never put in place.
    Leftover,
    /// A temporary directory whose owner is gone.
    StaleTemp,
    /// A directory of `staging` whose owner is gone.
    StaleStaging,
    /// A mount that nobody serves any more.
    DeadMount,
    /// A count of mounts that are gone.
    StaleCount,
}

impl Kind {
    /// Returns whether mending is known.
    pub fn can_be_mended(self) -> bool {
        !matches!(self, Self::MissingParent | Self::WrongLower | Self::LostContent)
    }
}

/// One thing that is wrong.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Finding {
    /// What it is.
    pub kind: Kind,
    /// The layer, or else the name of the thing.
    pub what: String,
    /// More about it, and what mends it.
    pub detail: String,
}

/// A finding with what is needed to mend it.
struct Found {
    finding: Finding,
    mend: Mend,
}

enum Mend {
    /// Symlinks and `link` files are made from each other, all at once.
    Links,
    Unlink(Vec<u8>),
    RemoveLayer(LayerId),
    Rewrite {
        id: LayerId,
        name: &'static [u8],
        text: Vec<u8>,
    },
    MakeDir {
        id: LayerId,
        name: &'static [u8],
    },
    FinishRotation(LayerId),
    RemoveFile {
        id: LayerId,
        name: Vec<u8>,
    },
    Recover,
    RemoveStaging(Vec<u8>),
    Detach(PathBuf),
    DropCount(LayerId),
    Nothing,
}

impl Store {
    /// Returns what is wrong, in a stable order.
    ///
    /// # Errors
    /// Those of reading; damage is no error.
    pub fn check(&self) -> Result<Vec<Finding>> {
        let mut all = Vec::new();
        for home in self.writable_homes() {
            all.extend(self.look(home)?.into_iter().map(|found| found.finding));
        }
        all.sort_by(|a, b| (a.kind, &a.what).cmp(&(b.kind, &b.what)));
        Ok(all)
    }

    /// Mends what can be mended, and returns what was.
    ///
    /// # Errors
    /// Those of reading and writing.
    /// # Locks
    /// The store's and those of layers, each for one change.
    pub fn repair(&self) -> Result<Vec<Finding>> {
        let mut mended = Vec::new();
        for home in self.writable_homes() {
            // Files first, for links that are made anew from them; each pass may uncover more.
            for _ in 0..4 {
                let found = self.look(home)?;
                let before = mended.len();
                let mut links_done = false;
                for Found { finding, mend } in found {
                    if matches!(mend, Mend::Nothing) {
                        continue;
                    }
                    if matches!(mend, Mend::Links) && std::mem::replace(&mut links_done, true) {
                        mended.push(finding);
                        continue;
                    }
                    self.mend(home, mend)?;
                    mended.push(finding);
                }
                if mended.len() == before {
                    break;
                }
            }
        }
        Ok(mended)
    }

    fn look(&self, home: &Home) -> Result<Vec<Found>> {
        let mut all = Vec::new();
        let farm = Farm::load(home)?;
        look_at_links(&farm, &mut all);
        for id in home.list()? {
            // One that is removed meanwhile is no finding.
            if let Some(layer) = home.layer(&id)? {
                self.look_at_layer(home, &id, &layer, &mut all)?;
            }
        }
        for name in stage::find_stale(home)? {
            all.push(Found {
                finding: Finding {
                    kind: Kind::StaleTemp,
                    what: name,
                    detail: "of a process that was killed; the next start removes it".into(),
                },
                mend: Mend::Recover,
            });
        }
        look_at_staging(home, &mut all)?;
        if std::ptr::eq(home, self.home()) {
            self.look_at_mounts(&mut all)?;
        }
        Ok(all)
    }

    fn look_at_layer(
        &self,
        home: &Home,
        id: &LayerId,
        layer: &OwnedFd,
        all: &mut Vec<Found>,
    ) -> Result<()> {
        let at = || home.show(id);
        let mut note = |kind, detail: String, mend| {
            all.push(Found { finding: Finding { kind, what: id.to_string(), detail }, mend });
        };
        let mut names = Vec::new();
        let listed = sys::name::list(layer.as_fd(), |name, _, kind| {
            names.push((name.to_vec(), kind));
            Ok(())
        });
        match listed {
            Ok(()) => (),
            Err(Errno::NOENT) => return Ok(()),
            Err(errno) => return Err(Error::sys("getdents64", at(), errno)),
        }
        if !names.iter().any(|(name, _)| name == DIFF) {
            if !is_incomplete(id, &names) {
                return Ok(());
            }
            let detail = "has no content; it is removed".to_owned();
            note(Kind::Incomplete, detail, Mend::RemoveLayer(id.clone()));
            return Ok(());
        }
        if let Some(detail) = lost_content(home, id, layer) {
            note(Kind::LostContent, detail, Mend::Nothing);
        }
        if idmap::has_unfinished_rotation(layer).at("statx", at)? {
            let detail = "the next mount finishes it, or --repair".to_owned();
            note(Kind::UnfinishedRotation, detail, Mend::FinishRotation(id.clone()));
        }
        let lower = read_small(layer.as_fd(), LOWER).at("read", at)?;
        let layers = read_small(layer.as_fd(), LOWER_LAYERS).at("read", at)?;
        let has_parent = lower.is_some() || layers.is_some();
        let docker = home.variant() == Variant::Docker;
        let needed: &[&'static [u8]] = match (docker, has_parent) {
            (true, true) => &[WORK],
            (true, false) => &[],
            // `merged` is made when it is needed, and some engines remove it.
            (false, true) => &[WORK],
            (false, false) => &[WORK, EMPTY],
        };
        for name in needed {
            if !has(layer.as_fd(), name).at("statx", at)? {
                let detail = format!("{} is made again", name.escape_ascii());
                note(Kind::LostDirectory, detail, Mend::MakeDir { id: id.clone(), name });
            }
        }
        let by_links = lower.as_deref().map(|text| parse_lower(text, &at()));
        let by_ids = layers.as_deref().map(|text| parse_lower_layers(text, &at()));
        match (&by_links, &by_ids) {
            (_, Some(Ok(ids))) => {
                if let Some(missing) = self.first_missing(ids)? {
                    note(Kind::MissingParent, missing_parent(&missing), Mend::Nothing);
                } else if matches!(by_links, None | Some(Err(_))) {
                    let mend = match self.links_of(ids)? {
                        Some(text) => Mend::Rewrite { id: id.clone(), name: LOWER, text },
                        None => Mend::Nothing,
                    };
                    note(Kind::DamagedLower, "lower is made from lower-layers".into(), mend);
                } else if let Some(detail) = self.contradiction(ids)? {
                    note(Kind::WrongLower, detail, Mend::Nothing);
                }
            }
            (Some(Ok(links)), damaged) => {
                let farms = self.farms()?;
                let mut ids = Vec::new();
                let mut lost = None;
                for link in links {
                    match super::resolve(&farms, link)? {
                        Some(id) => ids.push(id),
                        None => lost = Some(link.to_string()),
                    }
                }
                match lost.map_or_else(|| self.first_missing(&ids), |link| Ok(Some(link)))? {
                    Some(missing) => {
                        // With the symlinks in place again it may be found.
                        note(Kind::MissingParent, missing_parent(&missing), Mend::Nothing);
                    }
                    None if damaged.is_some() => {
                        let names: Vec<&str> = ids.iter().map(LayerId::as_str).collect();
                        let text = names.join(":").into_bytes();
                        let mend = Mend::Rewrite { id: id.clone(), name: LOWER_LAYERS, text };
                        note(Kind::DamagedLower, "lower-layers is made from lower".into(), mend);
                    }
                    None => {
                        if let Some(detail) = self.contradiction(&ids)? {
                            note(Kind::WrongLower, detail, Mend::Nothing);
                        }
                    }
                }
            }
            (Some(Err(error)), _) | (None, Some(Err(error))) => {
                let detail = format!("{error}; what lay beneath is not known: remove the layer");
                note(Kind::DamagedLower, detail, Mend::Nothing);
            }
            (None, None) => (),
        }
        let leftovers = names.into_iter().filter_map(|(name, kind)| {
            (kind != FileType::Directory && is_leftover(&name)).then_some(name)
        });
        for name in leftovers {
            let detail = format!("{} is removed", name.escape_ascii());
            note(Kind::Leftover, detail, Mend::RemoveFile { id: id.clone(), name });
        }
        Ok(())
    }

    /// Returns in what a list of layers and that of the first of them differ; one that cannot be read
    /// is told where it is.
    fn contradiction(&self, ids: &[LayerId]) -> Result<Option<String>> {
        let Some((parent, rest)) = ids.split_first() else { return Ok(None) };
        let found = self.get_layer(parent)?;
        let at = found.home.show(parent);
        let read = |name: &[u8]| read_small(found.dir.as_fd(), name).at("read", || at.clone());
        let named = if let Some(text) = read(LOWER_LAYERS)? {
            let Ok(named) = parse_lower_layers(&text, &at) else { return Ok(None) };
            named
        } else if let Some(text) = read(LOWER)? {
            let Ok(links) = parse_lower(&text, &at) else { return Ok(None) };
            let farms = self.farms()?;
            let mut named = Vec::new();
            for link in links {
                let Some(id) = super::resolve(&farms, &link)? else { return Ok(None) };
                named.push(id);
            }
            named
        } else {
            Vec::new()
        };
        let show = |ids: &[LayerId]| match ids {
            [] => "nothing".to_owned(),
            ids => ids.iter().map(LayerId::as_str).collect::<Vec<_>>().join(":"),
        };
        Ok((named != rest).then(|| {
            format!(
                "names {} beneath its parent {parent}, which names {}; correct the list that is \
                 wrong, or remove the layer",
                show(rest),
                show(&named)
            )
        }))
    }

    fn first_missing(&self, ids: &[LayerId]) -> Result<Option<String>> {
        for id in ids {
            if !self.exists(id)? {
                return Ok(Some(id.to_string()));
            }
        }
        Ok(None)
    }

    /// Returns the text of `lower` for these layers; `None` while one of them has no link.
    fn links_of(&self, ids: &[LayerId]) -> Result<Option<Vec<u8>>> {
        let mut items = Vec::new();
        for id in ids {
            let found = self.get_layer(id)?;
            match link::of_layer(&found.dir, &found.home.show(id))? {
                Some(link) => items.push(format!("{LINK_DIR}/{link}")),
                None => return Ok(None),
            }
        }
        Ok(Some(items.join(":").into_bytes()))
    }

    fn look_at_mounts(&self, all: &mut Vec<Found>) -> Result<()> {
        let mut dead = dead_mounts(self.home().path())?;
        dead.extend(dead_mounts(&self.run_home)?);
        let seen: BTreeSet<PathBuf> = dead.into_iter().collect();
        all.extend(seen.iter().map(|path| Found {
            finding: Finding {
                kind: Kind::DeadMount,
                what: show_path(path),
                detail: "its server is gone; it is unmounted".into(),
            },
            mend: Mend::Detach(path.clone()),
        }));
        let entries = mountinfo::load()?;
        for (id, count) in self.mount_counts()? {
            let mounted = match self.find(&id)? {
                Some(found) => {
                    let merged = self.mountpoint(&found, &id)?;
                    let has_mount =
                        mountinfo::find_top(&entries, &merged).is_some() && !seen.contains(&merged);
                    has_mount || flat::find(&found.dir).at("read", || id.to_string())?.is_some()
                }
                None => false,
            };
            if !mounted {
                all.push(Found {
                    finding: Finding {
                        kind: Kind::StaleCount,
                        what: id.to_string(),
                        detail: format!("counted {count} times, but not mounted"),
                    },
                    mend: Mend::DropCount(id),
                });
            }
        }
        Ok(())
    }

    fn mend(&self, home: &Home, mend: Mend) -> Result<()> {
        let locked = |id: &LayerId| lock::layer(home, id, Sharing::Exclusive);
        match mend {
            Mend::Nothing => Ok(()),
            Mend::Links => link::repair(home).map(drop),
            Mend::Recover => stage::recover(home).map(drop),
            Mend::Unlink(name) => {
                let _held = lock::store(home)?;
                let Some(links) = home.links()? else { return Ok(()) };
                // Somebody may have published the layer since.
                let mended = LinkId::parse(&name).is_some_and(|link| owned(home, &links, &link));
                if mended {
                    return Ok(());
                }
                sys::tree::remove(links.as_fd(), &name)
                    .at("unlinkat", || format!("{LINK_DIR}/{}", name.escape_ascii()))
            }
            Mend::RemoveLayer(id) => {
                let Some(layer) = locked(&id)? else { return Ok(()) };
                if has(layer.dir.as_fd(), DIFF).at("statx", || home.show(&id))? {
                    return Ok(());
                }
                let temp = TempDir::new(home)?;
                let held = lock::store(home)?;
                stage::retire(&temp, &id)?;
                drop((held, layer));
                temp.remove()
            }
            Mend::Rewrite { id, name, text } => {
                let Some(layer) = locked(&id)? else { return Ok(()) };
                replace_small(layer.dir.as_fd(), name, &text, 0o644).at("write", || home.show(&id))
            }
            Mend::MakeDir { id, name } => {
                let Some(layer) = locked(&id)? else { return Ok(()) };
                match sys::name::mkdir(At::new(layer.dir.as_fd(), name), 0o700) {
                    Ok(()) | Err(Errno::EXIST) => Ok(()),
                    Err(errno) => Err(Error::sys("mkdirat", home.show(&id), errno)),
                }
            }
            Mend::FinishRotation(id) => {
                let Some(layer) = locked(&id)? else { return Ok(()) };
                idmap::finish_rotation(&layer.dir).at("renameat", || home.show(&id))
            }
            Mend::RemoveFile { id, name } => {
                let Some(layer) = locked(&id)? else { return Ok(()) };
                sys::tree::remove(layer.dir.as_fd(), &name).at("unlinkat", || home.show(&id))
            }
            Mend::RemoveStaging(name) => remove_staging(home, &name),
            Mend::Detach(path) => crate::mount::unmount::remove_dead(&path),
            Mend::DropCount(id) => self.forget_count(&id),
        }
    }
}

/// Returns the mounts beneath a directory whose server is gone.
///
/// # Errors
/// Those of reading the mount table.
pub(super) fn dead_mounts(beneath: &Path) -> Result<Vec<PathBuf>> {
    let is_dead =
        |path: &Path| matches!(rustix::fs::statfs(path), Err(Errno::NOTCONN | Errno::CONNABORTED));
    let entries = mountinfo::load()?.into_iter().filter(|entry| entry.is_fuse());
    let paths = entries.map(|entry| entry.mount_point).filter(|path| path.starts_with(beneath));
    Ok(paths.filter(|path| is_dead(path)).collect())
}

/// Returns why the content of a layer cannot be opened, if so.
fn lost_content(home: &Home, id: &LayerId, layer: &OwnedFd) -> Option<String> {
    let error = content(home, id, layer).err()?;
    Some(match sys::name::readlink(At::new(layer.as_fd(), DIFF)) {
        Ok(target) if target.starts_with(b"/") => {
            format!("{error}; mount the layer store that has its content, or remove the layer")
        }
        Ok(target) => format!(
            "diff is a symlink to {}, which is no content; restore it, or remove the layer",
            target.escape_ascii()
        ),
        Err(_) => format!("diff: {error}; restore it, or remove the layer"),
    })
}

fn missing_parent(missing: &str) -> String {
    format!("{missing} beneath it is missing; restore it, or remove this layer")
}

/// Returns whether a directory without content was to be a layer, or was one: engines try things out
/// in directories of a home, too, and those are left to them.
fn is_incomplete(id: &LayerId, names: &[(Vec<u8>, FileType)]) -> bool {
    let marks: [&[u8]; 3] = [LINK, LOWER, LOWER_LAYERS];
    let is_digest = id.bytes().len() == 64 && id.bytes().iter().all(u8::is_ascii_hexdigit);
    is_digest || names.is_empty() || names.iter().any(|(name, _)| marks.contains(&name.as_slice()))
}

/// Returns whether the name is one of [`replace_small`]: `NAME.` and 26 letters.
fn is_leftover(name: &[u8]) -> bool {
    let known: [&[u8]; 3] = [LINK, LOWER, LOWER_LAYERS];
    known.iter().any(|file| {
        let rest = name.strip_prefix(*file).and_then(|rest| rest.strip_prefix(b"."));
        rest.is_some_and(|rest| LinkId::parse(rest).is_some())
    })
}

fn look_at_links(farm: &Farm, all: &mut Vec<Found>) {
    let mut note = |kind, what: String, detail: String, mend| {
        all.push(Found { finding: Finding { kind, what, detail }, mend });
    };
    for (id, link) in farm.lost_links() {
        let detail = format!("l/{link} is made again");
        note(Kind::LostLink, id.to_string(), detail, Mend::Links);
    }
    for (id, link) in farm.lost_files() {
        let detail = match link {
            Some(link) => format!("link is made again from l/{link}"),
            None => "link and symlink are made anew".to_owned(),
        };
        note(Kind::LostLinkFile, id.to_string(), detail, Mend::Links);
    }
    for (link, id) in farm.dangling() {
        let detail = format!("stands for {id}, which is not there or has another; it is removed");
        note(Kind::DanglingLink, link.to_string(), detail, Mend::Unlink(link.bytes().to_vec()));
    }
    for name in &farm.strange {
        let what = name.escape_ascii().to_string();
        let detail = "is no symlink of a layer; it is removed".to_owned();
        note(Kind::StrangeLink, what, detail, Mend::Unlink(name.clone()));
    }
}

/// Returns whether a symlink stands for a layer that is there and names it.
fn owned(home: &Home, links: &OwnedFd, link: &LinkId) -> bool {
    let Ok(target) = sys::name::readlink(At::new(links.as_fd(), link.bytes())) else {
        return false;
    };
    let Some(id) = super::layout::parse_link_target(&target) else { return false };
    let Ok(Some(layer)) = home.layer(&id) else { return false };
    target == link_target(&id)
        && link::of_layer(&layer, &home.show(&id)).is_ok_and(|named| {
            // Without a file of its own the layer still needs this one.
            named.is_none_or(|named| named == *link)
        })
}

fn staging_names(home: &Home) -> Result<Option<(OwnedFd, Vec<Vec<u8>>)>> {
    let at = || show_path(&home.join(&[STAGING]));
    let Some(staging) = find_dir(home.dir(), STAGING).at("open", at)? else { return Ok(None) };
    let mut names = Vec::new();
    sys::name::list(staging.as_fd(), |name, _, _| {
        names.push(name.to_vec());
        Ok(())
    })
    .at("getdents64", at)?;
    Ok(Some((staging, names)))
}

/// Takes the lock of a directory in `staging`; `None` if its owner lives.
fn take_staging(staging: &OwnedFd, name: &[u8]) -> Result<Option<OwnedFd>> {
    let at = || format!("staging/{}", name.escape_ascii());
    let Some(dir) = find_dir(staging.as_fd(), name).at("open", at)? else { return Ok(None) };
    let file = match sys::open::writer(dir.as_fd(), STAGING_LOCK) {
        // Its owner makes the file after the directory; one without content is left to it.
        Err(Errno::NOENT) => return Ok(None),
        file => file.at("open", at)?,
    };
    Ok(try_lock_file(&file, Sharing::Exclusive).at("fcntl", at)?.then_some(file))
}

fn look_at_staging(home: &Home, all: &mut Vec<Found>) -> Result<()> {
    let Some((staging, names)) = staging_names(home)? else { return Ok(()) };
    for name in names {
        if take_staging(&staging, &name)?.is_some() {
            all.push(Found {
                finding: Finding {
                    kind: Kind::StaleStaging,
                    what: name.escape_ascii().to_string(),
                    detail: "of a process that was killed; it is removed".into(),
                },
                mend: Mend::RemoveStaging(name),
            });
        }
    }
    Ok(())
}

/// Removes the directories in `staging` whose owners are gone.
///
/// # Errors
/// Those of reading and removing.
pub(super) fn recover_staging(home: &Home) -> Result<()> {
    let Some((_, names)) = staging_names(home)? else { return Ok(()) };
    names.iter().try_for_each(|name| remove_staging(home, name))
}

/// Removes the directories of `staging` whose owners are gone, and fails if any is left.
///
/// # Errors
/// `Busy` if one has an owner, or none that can be told; those of removing.
pub(super) fn prune_staging(home: &Home) -> Result<()> {
    recover_staging(home)?;
    let Some((_, names)) = staging_names(home)? else { return Ok(()) };
    let Some(name) = names.first() else { return Ok(()) };
    let path = show_path(&home.join(&[STAGING, name]));
    Err(Error::Busy {
        what: format!("{path}: a layer is being unpacked there; try again when it is done").into(),
    })
}

fn remove_staging(home: &Home, name: &[u8]) -> Result<()> {
    let Some((staging, _)) = staging_names(home)? else { return Ok(()) };
    let Some(_lock) = take_staging(&staging, name)? else { return Ok(()) };
    sys::tree::remove(staging.as_fd(), name)
        .at("unlinkat", || format!("staging/{}", name.escape_ascii()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_written_aside_are_told_from_others() {
        let aside = format!("lower.{}", LinkId::random());
        assert!(is_leftover(aside.as_bytes()));
        for name in ["lower", "lower.x", "lower-layers", "link", "diff.AAAAAAAAAAAAAAAAAAAAAAAAAA"]
        {
            assert!(!is_leftover(name.as_bytes()), "{name}");
        }
    }
}
