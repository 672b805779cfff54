//! Mounting layers and taking the mounts down again, counted over all processes.
//!
//! How often a layer was asked for stands in `RUNHOME/lamina-mounts/ID`, changed under the lock of
//! the layer, and is believed only as far as the mount table agrees: a mount that nobody counted
//! counts once, for whoever made it, and counts of a mount that is gone are nothing. A crash leaves
//! a mount without a count, or a count without a mount. Where nothing can be mounted, a copy stands in
//! its place (`flat`), for which the same holds.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, RenameFlags, openat};
use rustix::mount::{UnmountFlags, unmount};
use serde::{Deserialize, Serialize};

use super::flat::{self, Flat, Wanted};
use super::layout::{
    COMMITTED, Home, LOWER, LayerId, MERGED, Variant, WORK, has, io_error, make_dirs, read_small,
    replace_small,
};
use super::lock::LockedLayer;
use super::probe::Backend;
use super::{Content, Found, Store, contents, empty_lower, idmap, lock};
use crate::error::{Context, Errno, Error, Result};
use crate::mount::kernel::{self, LayerDir, Overlay};
use crate::mount::mountinfo::{self, MountEntry};
use crate::mount::program::{self, Served};
use crate::options::show_path;
use crate::sys;
use crate::sys::lockfile::Sharing;
use crate::sys::name::At;
use crate::sys::userns::{self, Maps};

/// Directory in the run home with the counts.
const COUNTS: &str = "lamina-mounts";
/// Place of the kernel's mark of a volatile upper in a work directory.
const VOLATILE: [&[u8]; 2] = [b"work", b"incompat"];

/// How a layer is to be mounted.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct MountRequest {
    /// Whether nothing may be changed through the mount.
    pub read_only: bool,
    /// Whether syncs are skipped.
    pub volatile: bool,
    /// Mount options instead of those of the driver.
    pub options: Vec<String>,
    /// SELinux label.
    pub label: Option<String>,
    /// Ids that the mount shows in place of those of the layers.
    pub maps: Option<Maps>,
    /// Who is to serve, whatever the probe says.
    pub backend: Option<Backend>,
}

/// How often a layer is mounted, and by whom.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Count {
    pub(super) count: u64,
    pub(super) backend: Backend,
    pub(super) read_only: bool,
}

/// What stands at a mountpoint.
enum Present {
    /// A mount.
    Mount(MountEntry),
    /// A copy in place of one.
    Flat(Flat),
}

impl Store {
    /// Mounts a layer, or counts once more that it is, and returns where.
    ///
    /// # Errors
    /// `NoSuchLayer`; `Unsupported` if nobody can serve; what kernel or server say.
    /// # Locks
    /// The layer's.
    /// # Crash
    /// At worst a mount that is not counted, or an empty mountpoint.
    pub fn mount(&self, id: &LayerId, request: &MountRequest) -> Result<PathBuf> {
        let found = self.get_layer(id)?;
        let docker = found.home.variant() == Variant::Docker;
        let at = || found.home.show(id);
        if docker && !has(found.dir.as_fd(), LOWER).at("statx", at)? {
            // Nothing to merge; Docker uses the directory itself.
            return Ok(found.home.join(&[id.bytes(), b"diff"]));
        }
        let locked = self.lock_layer(&found, id)?;
        idmap::finish_rotation(&locked.dir).at("renameat", at)?;
        let merged = self.make_merged(&found, id, &locked.dir)?;
        let counts = self.counts()?;
        let known = read_count(&counts, id)?;
        let known = match (self.present(&merged, &found, id)?, known) {
            // One that this program did not make has a user of its own.
            (Some(Present::Mount(entry)), known) => Some(known.unwrap_or_else(|| foreign(&entry))),
            (Some(Present::Flat(_)), Some(known)) => Some(known),
            (Some(Present::Flat(flat)), None) => {
                // Of another boot, or of somebody who was killed before he was told of it.
                self.take_flat(&found, id, &flat)?;
                self.make_merged(&found, id, &locked.dir)?;
                None
            }
            (None, _) => None,
        };
        if let Some(mut count) = known {
            count.count += 1;
            write_count(&counts, id, &count)?;
            return Ok(merged);
        }
        let committed = docker && has(found.dir.as_fd(), COMMITTED).at("statx", at)?;
        let mut request = request.clone();
        request.read_only |= committed || !found.is_own;
        let backend = self.mount_now(&found, id, &merged, &request)?;
        let count = Count { count: 1, backend, read_only: request.read_only };
        write_count(&counts, id, &count)?;
        Ok(merged)
    }

    /// Gives a mount of a layer back; the last one takes it down. Nothing mounted is no error.
    ///
    /// # Errors
    /// `NoSuchLayer`, and those of unmounting.
    /// # Locks
    /// The layer's.
    /// # Crash
    /// At worst a count without a mount, which nobody believes.
    pub fn unmount(&self, id: &LayerId) -> Result<()> {
        let found = self.get_layer(id)?;
        let locked = self.lock_layer(&found, id)?;
        let merged = self.merged_path(&found, id);
        let counts = self.counts()?;
        let known = read_count(&counts, id)?;
        let present = self.present(&merged, &found, id)?;
        if let (Some(mut count), Some(_)) = (known, &present)
            && count.count > 1
        {
            count.count -= 1;
            return write_count(&counts, id, &count);
        }
        match present {
            Some(Present::Mount(entry)) => {
                take_down(&merged, &entry)?;
                drop_count(&counts, id)?;
                self.renew_merged(&found, id, &locked.dir, &merged)
            }
            Some(Present::Flat(flat)) => {
                self.take_flat(&found, id, &flat)?;
                drop_count(&counts, id)
            }
            None => {
                flat::drop_mark(&locked.dir).at("unlinkat", || found.home.show(id))?;
                drop_count(&counts, id)
            }
        }
    }

    /// Returns how often each layer is mounted that is counted, whether or not it still is.
    ///
    /// # Errors
    /// Those of reading the counts.
    pub fn mount_counts(&self) -> Result<BTreeMap<LayerId, u64>> {
        let counts = self.counts()?;
        let mut all = BTreeMap::new();
        let mut names = Vec::new();
        sys::name::list(counts.as_fd(), |name, _, _| {
            names.push(name.to_vec());
            Ok(())
        })
        .at("getdents64", || COUNTS)?;
        for id in names.iter().filter_map(|name| LayerId::from_bytes(name)) {
            if let Some(count) = read_count(&counts, &id)? {
                all.insert(id, count.count);
            }
        }
        Ok(all)
    }

    /// Forgets the count of a layer that is not mounted.
    ///
    /// # Errors
    /// Those of removing it.
    pub(super) fn forget_count(&self, id: &LayerId) -> Result<()> {
        let locked = match self.find(id)? {
            Some(found) => {
                let locked = lock::layer(found.home, id, Sharing::Exclusive)?;
                if self.present(&self.merged_path(&found, id), &found, id)?.is_some() {
                    return Ok(());
                }
                locked
            }
            None => None,
        };
        let done = drop_count(&self.counts()?, id);
        drop(locked);
        done
    }

    fn lock_layer(&self, found: &Found<'_>, id: &LayerId) -> Result<LockedLayer> {
        lock::layer(found.home, id, Sharing::Exclusive)?
            .ok_or_else(|| Error::NoSuchLayer { id: id.to_string().into() })
    }

    fn counts(&self) -> Result<OwnedFd> {
        open_counts(&self.run_home)
    }

    /// Returns what stands at the mountpoint of a layer.
    fn present(&self, merged: &Path, found: &Found<'_>, id: &LayerId) -> Result<Option<Present>> {
        if let Some(entry) = mounted(merged)? {
            return Ok(Some(Present::Mount(entry)));
        }
        let flat = flat::find(&found.dir).at("read", || found.home.show(id))?;
        Ok(flat.map(Present::Flat))
    }

    /// Makes the mountpoint where it is missing.
    fn make_merged(&self, found: &Found<'_>, id: &LayerId, layer: &OwnedFd) -> Result<PathBuf> {
        let merged = self.merged_path(found, id);
        if !found.is_own {
            make_dirs(&merged, 0o700)?;
            return Ok(merged);
        }
        match sys::name::mkdir(At::new(layer.as_fd(), MERGED), 0o700) {
            Ok(()) | Err(Errno::EXIST) => Ok(merged),
            Err(errno) => Err(Error::sys("mkdirat", show_path(&merged), errno)),
        }
    }

    /// Puts a fresh mountpoint in place of one that was used: copies of the mount that live on in
    /// other namespaces end with the directory.
    fn renew_merged(
        &self,
        found: &Found<'_>,
        id: &LayerId,
        layer: &OwnedFd,
        merged: &Path,
    ) -> Result<()> {
        const NEXT: &[u8] = b"merged.1";
        if !found.is_own {
            // Nothing else lies there.
            for dir in [Some(merged), merged.parent()].into_iter().flatten() {
                match rustix::fs::rmdir(dir) {
                    Ok(()) | Err(Errno::NOENT | Errno::NOTEMPTY | Errno::BUSY) => (),
                    Err(errno) => return Err(Error::sys("rmdir", show_path(dir), errno)),
                }
            }
            return Ok(());
        }
        let at = || show_path(merged);
        if found.home.variant() == Variant::Docker {
            return match sys::name::rmdir(At::new(layer.as_fd(), MERGED)) {
                Ok(()) | Err(Errno::NOENT) => Ok(()),
                Err(errno) => Err(Error::sys("unlinkat", at(), errno)),
            };
        }
        let old = sys::stat::find(layer.as_fd(), MERGED).at("statx", at)?;
        match sys::name::mkdir(At::new(layer.as_fd(), NEXT), 0o700) {
            Ok(()) | Err(Errno::EXIST) => (),
            Err(errno) => return Err(Error::sys("mkdirat", at(), errno)),
        }
        if let Some(old) = old {
            let (uid, gid) = (Some(old.stx_uid), Some(old.stx_gid));
            sys::name::chown(At::new(layer.as_fd(), NEXT), uid, gid).at("fchownat", at)?;
        }
        sys::name::rename(
            At::new(layer.as_fd(), NEXT),
            At::new(layer.as_fd(), MERGED),
            RenameFlags::empty(),
        )
        .at("renameat", || format!("{}: files were written beneath the mount", found.home.show(id)))
    }

    /// Mounts and returns who serves.
    fn mount_now(
        &self,
        found: &Found<'_>,
        id: &LayerId,
        merged: &Path,
        request: &MountRequest,
    ) -> Result<Backend> {
        let mut own = contents(found.home, id, &found.dir)?.into_iter();
        let Some(diff) = own.next() else {
            return Err(Error::NoSuchLayer { id: id.to_string().into() });
        };
        let mut lowers: Vec<Content> = own.collect();
        lowers.extend(self.lower_contents(found, id)?);
        if lowers.is_empty() {
            lowers.push(empty_lower(found.home, id, &found.dir)?);
        }
        let probe = self.probe(false)?;
        let choice = self.choose(&probe, request.backend.clone())?;
        let Some(backend) = choice.backend else {
            return Err(Error::Unsupported {
                feature: format!("{id}: cannot be mounted: {}; {}", choice.reason, choice.cure)
                    .into(),
            });
        };
        let mut options = if request.options.is_empty() {
            self.options().mount_options.clone()
        } else {
            request.options.clone()
        };
        let read_only = request.read_only || options.iter().any(|option| option == "ro");
        options.retain(|option| option != "ro" && option != "rw");
        let has_metacopy = backend == Backend::Kernel && probe.holds("metacopy");
        options.retain(|option| option != "metacopy=on" || has_metacopy);
        if request.volatile
            && !read_only
            && (backend != Backend::Kernel || probe.holds("volatile"))
            && !options.iter().any(|option| option == "volatile")
        {
            options.push("volatile".to_owned());
        }
        if let Some(label) = &request.label {
            options.push(format!("context=\"{label}\""));
        }
        if backend == Backend::Flat {
            refuse_for_flat(id, request, self.options().force_mask.is_some())?;
            let volatile = options.iter().any(|option| option == "volatile");
            self.make_flat(found, id, Wanted { diff, lowers, read_only, volatile })?;
            return Ok(backend);
        }
        let layers = Layers { diff, lowers, read_only };
        if !read_only {
            forget_volatile(&found.dir).at("unlinkat", || found.home.show(id))?;
        }
        match &backend {
            Backend::Kernel => {
                if kernel::needs_userxattr() {
                    options.push("userxattr".to_owned());
                }
                if found.home.variant() == Variant::Docker {
                    options.push("index=off".to_owned());
                }
                let work = work_dir(found.home, id, &found.dir)?;
                layers.mount_kernel(work, &options, request.maps.as_ref(), merged)?;
            }
            Backend::Fuse | Backend::Program(_) | Backend::Flat => {
                if let Some(maps) = &request.maps {
                    options.extend(map_options(maps));
                }
                if self.options().force_mask.is_some() {
                    options.push("xattr_permissions=2".to_owned());
                }
                if let Backend::Program(_) = backend {
                    self.flag_program()?;
                }
                let work = found.home.join(&[id.bytes(), WORK]);
                layers.mount_served(&backend, &work, &options, merged, found.home.path())?;
            }
        }
        Ok(backend)
    }

    /// Says on disk that a mount program wrote into the store.
    fn flag_program(&self) -> Result<()> {
        use super::layout::PROGRAM_FLAG;
        if self.has_program_flag()? {
            return Ok(());
        }
        let home = self.home();
        replace_small(home.dir(), PROGRAM_FLAG, b"true", 0o600)
            .at("write", || show_path(&home.join(&[PROGRAM_FLAG])))
    }
}

/// Opens the directory of the counts, making it.
///
/// # Errors
/// Those of mkdir(2) and open(2).
pub(super) fn open_counts(run_home: &Path) -> Result<OwnedFd> {
    let path = run_home.join(COUNTS);
    make_dirs(&path, 0o700)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(CWD, &path, flags, Mode::empty()).at("open", || show_path(&path))
}

/// Returns the mount at `merged`; one whose server has died is taken away first.
///
/// # Errors
/// Those of reading the mount table, and of umount2(2).
pub(super) fn mounted(merged: &Path) -> Result<Option<MountEntry>> {
    loop {
        let entries = mountinfo::load()?;
        let Some(entry) = mountinfo::find_top(&entries, merged) else { return Ok(None) };
        match rustix::fs::statfs(merged) {
            Err(Errno::NOTCONN | Errno::CONNABORTED) => {
                unmount(merged, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
                    .at("umount2", || show_path(merged))?;
            }
            _ => return Ok(Some(entry.clone())),
        }
    }
}

/// The open layers of a mount.
pub(super) struct Layers {
    pub(super) diff: Content,
    pub(super) lowers: Vec<Content>,
    pub(super) read_only: bool,
}

impl Layers {
    pub(super) fn mount_kernel(
        self,
        work: LayerDir,
        options: &[String],
        maps: Option<&Maps>,
        merged: &Path,
    ) -> Result<()> {
        let layer = |content: Content| LayerDir { dir: content.dir, path: content.path };
        let mut lowers: Vec<LayerDir> = self.lowers.into_iter().map(layer).collect();
        let diff = layer(self.diff);
        let mut upper = Some(diff);
        if self.read_only {
            lowers.splice(0..0, upper.take());
        }
        if let Some(maps) = maps {
            let namespace = userns::with_maps(maps)?;
            for lower in &mut lowers {
                lower.dir = sys::mountfd::idmapped(lower.dir.as_fd(), namespace.as_fd())
                    .at("mount_setattr", || show_path(&lower.path))?;
            }
        }
        let upper = upper.as_ref().map(|upper| (upper, &work));
        kernel::mount(&Overlay { lowers: &lowers, upper, options }, merged).map(drop)
    }

    pub(super) fn mount_served(
        self,
        backend: &Backend,
        work: &Path,
        options: &[String],
        merged: &Path,
        home: &Path,
    ) -> Result<()> {
        let mut lowers: Vec<PathBuf> =
            self.lowers.into_iter().map(|content| content.path).collect();
        if self.read_only {
            lowers.insert(0, self.diff.path.clone());
        }
        let upper = (!self.read_only).then_some((self.diff.path.as_path(), work));
        let served = Served { lowers: &lowers, upper, options, target: merged, home };
        match backend {
            Backend::Program(program) => program::start_other(program, &served),
            Backend::Fuse | Backend::Kernel | Backend::Flat => program::start_own(&served),
        }
    }
}

/// Fails for what only a mount can do.
fn refuse_for_flat(id: &LayerId, request: &MountRequest, has_force_mask: bool) -> Result<()> {
    let what = match request {
        _ if has_force_mask => "force_mask",
        MountRequest { maps: Some(_), .. } => "shown ids that the layers do not have",
        MountRequest { label: Some(_), .. } => "a label",
        _ => return Ok(()),
    };
    Err(Error::Unsupported {
        feature: format!(
            "{id}: {what}: needs a mount, and this is a copy; lamina store probe tells what \
             mounts need"
        )
        .into(),
    })
}

/// Returns the options of a mount program for ids: triples of container id, host id and count.
pub(super) fn map_options(maps: &Maps) -> [String; 2] {
    [("uid", &maps.uids), ("gid", &maps.gids)].map(|(kind, map)| match map.as_slice() {
        [(_, outside, 1)] => format!("squash_to_{kind}={outside}"),
        map => {
            let triples: Vec<String> = map
                .iter()
                .map(|(inside, outside, count)| format!("{inside}:{outside}:{count}"))
                .collect();
            format!("{kind}mapping=:{}", triples.join(":"))
        }
    })
}

fn work_dir(home: &Home, id: &LayerId, layer: &OwnedFd) -> Result<LayerDir> {
    let path = home.join(&[id.bytes(), WORK]);
    match sys::name::mkdir(At::new(layer.as_fd(), WORK), 0o700) {
        Ok(()) | Err(Errno::EXIST) => (),
        Err(errno) => return Err(Error::sys("mkdirat", show_path(&path), errno)),
    }
    let dir = sys::open::directory(layer.as_fd(), WORK).at("open", || show_path(&path))?;
    Ok(LayerDir { dir, path })
}

/// Removes the kernel's mark that an upper was volatile: engines mount one again and again.
fn forget_volatile(layer: &OwnedFd) -> std::result::Result<(), Errno> {
    let Some(mut dir) = super::layout::find_dir(layer.as_fd(), WORK)? else { return Ok(()) };
    for name in VOLATILE {
        match super::layout::find_dir(dir.as_fd(), name)? {
            Some(below) => dir = below,
            None => return Ok(()),
        }
    }
    sys::tree::remove(dir.as_fd(), b"volatile")
}

/// Takes a mount down; one in use loses its place now and ends with its last user.
pub(super) fn take_down(merged: &Path, entry: &MountEntry) -> Result<()> {
    let at = || show_path(merged);
    if entry.is_fuse() {
        match crate::mount::unmount::unmount(merged, false) {
            Ok(()) => return Ok(()),
            Err(error) => tracing::debug!("{error}"),
        }
    } else {
        match unmount(merged, UnmountFlags::NOFOLLOW) {
            Ok(()) => return Ok(()),
            Err(Errno::BUSY) => (),
            Err(errno) => return Err(Error::sys("umount2", at(), errno)),
        }
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    if let Ok(root) = openat(CWD, merged, flags, Mode::empty()) {
        rustix::fs::syncfs(&root).at("syncfs", at)?;
    }
    match unmount(merged, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        // Not a mountpoint any more: it went after all.
        Ok(()) | Err(Errno::INVAL) => Ok(()),
        Err(errno) => Err(Error::sys("umount2", at(), errno)),
    }
}

pub(super) fn foreign(entry: &MountEntry) -> Count {
    let backend = if entry.is_fuse() { Backend::Fuse } else { Backend::Kernel };
    Count { count: 1, backend, read_only: false }
}

pub(super) fn read_count(counts: &OwnedFd, id: &LayerId) -> Result<Option<Count>> {
    let text = read_small(counts.as_fd(), id.bytes()).at("read", || format!("{COUNTS}/{id}"))?;
    // One that was cut short by a crash says nothing.
    Ok(text.and_then(|text| serde_json::from_slice(&text).ok()))
}

pub(super) fn write_count(counts: &OwnedFd, id: &LayerId, count: &Count) -> Result<()> {
    let text = serde_json::to_vec(count).map_err(|error| {
        io_error("write", Path::new(COUNTS), std::io::Error::other(error.to_string()))
    })?;
    replace_small(counts.as_fd(), id.bytes(), &text, 0o600).at("write", || format!("{COUNTS}/{id}"))
}

pub(super) fn drop_count(counts: &OwnedFd, id: &LayerId) -> Result<()> {
    match sys::name::unlink(At::new(counts.as_fd(), id.bytes())) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(Error::sys("unlinkat", format!("{COUNTS}/{id}"), errno)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_are_written_as_mount_programs_read_them() {
        let maps =
            Maps { uids: vec![(0, 300_000, 65_536), (65_536, 1000, 1)], gids: vec![(0, 1000, 1)] };
        assert_eq!(
            map_options(&maps),
            ["uidmapping=:0:300000:65536:65536:1000:1".to_owned(), "squash_to_gid=1000".to_owned()]
        );
    }
}
