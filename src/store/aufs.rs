//! The `aufs` driver of Docker and of old containers/storage.
//!
//! ```text
//! HOME/layers/ID    text: the layers beneath, one a line, parent first; it is there if the layer is
//! HOME/diff/ID      content, with whiteouts as .wh. files
//! HOME/mnt/ID       mountpoint
//! HOME/lamina-work/ID  work directory while it is mounted
//! HOME/flat-ID      what is known of the copy at the mountpoint, while one stands there
//! ```
//!
//! The union mounts such layers as they are, and writes what aufs would. A layer appears and goes by
//! the rename of its file in `layers`; until the rest has followed, the temporary directory
//! ([`super::stage`]) holds that file or its place, by which the next start finds what is to go.
//! Locks are those of [`super::lock`], a layer's on its file in `layers`.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use rustix::fs::{FileType, RenameFlags};

use super::check::{Finding, Kind};
use super::check_old::{self, Findings};
use super::create::{RootStat, make_dir};
use super::driver::{self, Driver, Fill, Filling, Parts, has_child, no_such};
use super::flat::Place;
use super::layout::{Home, LayerId, TEMPS, Variant, find_dir, has, read_small, write_small};
use super::mounts::{MountRequest, drop_count, open_counts};
use super::point::{self, Point};
use super::probe::{self, Backend, Choice, Probe, Wishes};
use super::serve::Layers;
use super::stage::{self, TempDir};
use super::usage::{self, Item, Part};
use super::{
    Content, CreateOptions, StoreConfig, Whiteouts, engine, fs_name, lock, supports_shifting,
};
use crate::archive::flat;
use crate::error::{Context, Errno, Error, Result};
use crate::marks;
use crate::mount::kernel::LayerDir;
use crate::options::show_path;
use crate::sys;
use crate::sys::lockfile::{Sharing, lock_dir};
use crate::sys::name::At;

const LAYERS: &[u8] = b"layers";
const DIFF: &[u8] = b"diff";
const MNT: &[u8] = b"mnt";
const WORK: &[u8] = b"lamina-work";
/// Begins the name in the home of what is known of a copy that stands at a mountpoint.
const FLAT: &[u8] = b"flat-";
/// Ends the names of directories that Docker was removing.
const REMOVING: &[u8] = b"-removing";
/// Begins the name in a temporary directory of a layer's file, before its id.
const RECORD: &[u8] = b"1-";

/// An open store of that driver.
#[derive(Debug)]
pub struct Aufs {
    home: Home,
    layers: OwnedFd,
    diffs: OwnedFd,
    mnts: OwnedFd,
    run_home: PathBuf,
}

impl Aufs {
    /// Opens the store in a home, and recovers what killed processes left.
    pub(super) fn new(home: Home, config: &StoreConfig) -> Result<Self> {
        let store = Self::assemble(home, config)?;
        store.recover()?;
        Ok(store)
    }

    /// Opens the store in a home as it is.
    pub(super) fn assemble(home: Home, config: &StoreConfig) -> Result<Self> {
        let part = |name| home.make_dir(name, 0o700);
        let (layers, diffs, mnts) = (part(LAYERS)?, part(DIFF)?, part(MNT)?);
        let run_home = config.run_root.join(config.variant.name());
        Ok(Self { home, layers, diffs, mnts, run_home })
    }

    fn show(&self, part: &[u8], id: &LayerId) -> String {
        show_path(&self.path(part, id))
    }

    fn path(&self, part: &[u8], id: &LayerId) -> PathBuf {
        self.home.join(&[part, id.bytes()])
    }

    /// Returns the layers beneath one, parent first; `None` if there is no such layer.
    fn find(&self, id: &LayerId) -> Result<Option<Vec<LayerId>>> {
        let text =
            read_small(self.layers.as_fd(), id.bytes()).at("read", || self.show(LAYERS, id))?;
        let Some(text) = text else { return Ok(None) };
        let lines = text.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
        lines
            .filter(|line| !line.is_empty())
            .map(|line| {
                LayerId::from_bytes(line).ok_or_else(|| Error::Corrupt {
                    what: "is no list of layers, one a line".into(),
                    at: self.show(LAYERS, id).into(),
                })
            })
            .collect::<Result<_>>()
            .map(Some)
    }

    fn ancestors(&self, id: &LayerId) -> Result<Vec<LayerId>> {
        self.find(id)?.ok_or_else(|| no_such(id))
    }

    fn content(&self, id: &LayerId, needed_by: &LayerId) -> Result<Content> {
        let found = driver::content(&self.diffs, id.bytes(), self.path(DIFF, id))?;
        found.ok_or_else(|| Error::Corrupt {
            what: format!("the content of {id} is missing; restore it, or remove this layer")
                .into(),
            at: self.show(LAYERS, needed_by).into(),
        })
    }

    /// Takes the lock of a layer, waiting for it, and returns what keeps it.
    fn lock(&self, id: &LayerId, sharing: Sharing) -> Result<OwnedFd> {
        loop {
            let file = match sys::open::reader(self.layers.as_fd(), id.bytes()) {
                Err(Errno::NOENT) => return Err(no_such(id)),
                opened => opened.at("open", || self.show(LAYERS, id))?,
            };
            let at = || self.show(LAYERS, id);
            lock_dir(&file, sharing).at("flock", at)?;
            // Another layer may have the name by now, or none.
            let locked = sys::stat::of(&file).at("statx", at)?;
            let now = sys::stat::find(self.layers.as_fd(), id.bytes()).at("statx", at)?;
            if now.is_some_and(|now| now.stx_ino == locked.stx_ino) {
                return Ok(file);
            }
        }
    }

    fn contents(&self, id: &LayerId, ancestors: &[LayerId]) -> Result<Parts> {
        let lowers: Result<_> = ancestors.iter().map(|lower| self.content(lower, id)).collect();
        Ok(Parts { own: vec![self.content(id, id)?], lowers: lowers? })
    }

    /// Removes what was on its way in or out: directories that Docker named so, and the rest of
    /// layers whose file is in a temporary directory that nobody works in, or is to come from there.
    fn recover(&self) -> Result<()> {
        for (dir, part) in [(&self.diffs, DIFF), (&self.mnts, MNT)] {
            let at = || show_path(&self.home.join(&[part]));
            let mut names = Vec::new();
            sys::name::list(dir.as_fd(), |name, _, _| {
                names.extend(name.ends_with(REMOVING).then(|| name.to_vec()));
                Ok(())
            })
            .at("getdents64", at)?;
            let is_layer = |name: &[u8]| has(self.layers.as_fd(), name).at("statx", at);
            for name in names {
                let id = name.strip_suffix(REMOVING).unwrap_or_default();
                if !is_layer(&name)? && !is_layer(id)? {
                    sys::tree::remove(dir.as_fd(), &name).at("unlinkat", at)?;
                }
            }
        }
        let at = || show_path(&self.home.join(&[TEMPS]));
        if let Some(temps) = find_dir(self.home.dir(), TEMPS).at("open", at)? {
            for stale in stage::find_stale(&self.home)? {
                let name = stage::dir_name(&stale);
                let Some(dir) = find_dir(temps.as_fd(), &name).at("open", at)? else { continue };
                let mut ids = Vec::new();
                sys::name::list(dir.as_fd(), |name, _, kind| {
                    if kind == FileType::RegularFile {
                        ids.extend(name.strip_prefix(RECORD).and_then(LayerId::from_bytes));
                    }
                    Ok(())
                })
                .at("getdents64", at)?;
                for id in ids {
                    self.discard(&id)?;
                }
            }
        }
        stage::recover(&self.home).map(drop)
    }

    /// Removes what is left of a layer that is not there.
    fn discard(&self, id: &LayerId) -> Result<()> {
        let _held = lock::store(&self.home)?;
        if has(self.layers.as_fd(), id.bytes()).at("statx", || self.show(LAYERS, id))? {
            return Ok(());
        }
        for (dir, part) in [(self.diffs.as_fd(), DIFF), (self.mnts.as_fd(), MNT)] {
            sys::tree::remove(dir, id.bytes()).at("unlinkat", || self.show(part, id))?;
        }
        self.drop_work(id)
    }

    fn drop_work(&self, id: &LayerId) -> Result<()> {
        let at = || self.show(WORK, id);
        let Some(works) = find_dir(self.home.dir(), WORK).at("open", at)? else { return Ok(()) };
        sys::tree::remove(works.as_fd(), id.bytes()).at("unlinkat", at)?;
        match sys::name::rmdir(At::new(self.home.dir(), WORK)) {
            Ok(()) | Err(Errno::NOENT | Errno::NOTEMPTY | Errno::EXIST | Errno::BUSY) => Ok(()),
            Err(errno) => Err(Error::sys("unlinkat", at(), errno)),
        }
    }

    fn publish(&self, id: &LayerId, ancestors: &[LayerId], temp: TempDir<'_>) -> Result<()> {
        let at = || self.show(DIFF, id);
        let text: String = ancestors.iter().map(|id| format!("{id}\n")).collect();
        let record = [RECORD, id.bytes()].concat();
        let dir = temp.dir().as_fd();
        write_small(dir, &record, text.as_bytes(), 0o644).at("write", at)?;
        rustix::fs::syncfs(temp.dir()).at("syncfs", at)?;
        let _parent = match ancestors.first() {
            Some(parent) => Some(self.lock(parent, Sharing::Shared)?),
            None => None,
        };
        let held = lock::store(&self.home)?;
        if self.find(id)?.is_some() {
            return Err(Error::LayerExists { id: id.to_string().into() });
        }
        // Left by others, who make the file last as well.
        sys::tree::remove(self.diffs.as_fd(), id.bytes()).at("unlinkat", at)?;
        let none = RenameFlags::NOREPLACE;
        sys::name::rename(At::new(dir, DIFF), At::new(self.diffs.as_fd(), id.bytes()), none)
            .at("renameat2", at)?;
        match sys::name::mkdir(At::new(self.mnts.as_fd(), id.bytes()), 0o755) {
            Ok(()) | Err(Errno::EXIST) => (),
            Err(errno) => return Err(Error::sys("mkdirat", self.show(MNT, id), errno)),
        }
        // The file says that the rest is there.
        for dir in [&self.diffs, &self.mnts] {
            sys::data::sync(dir.as_fd(), false).at("fsync", at)?;
        }
        sys::name::rename(At::new(dir, &record), At::new(self.layers.as_fd(), id.bytes()), none)
            .at("renameat2", at)?;
        sys::data::sync(self.layers.as_fd(), false).at("fsync", at)?;
        drop(held);
        temp.remove()
    }

    /// Looks at one layer.
    fn look_at(&self, id: &LayerId, found: &mut Findings) -> Result<()> {
        let is_there = |dir: &OwnedFd, id: &LayerId| {
            has(dir.as_fd(), id.bytes()).at("statx", || self.show(LAYERS, id))
        };
        let beneath = match self.find(id) {
            Err(Error::Corrupt { .. }) => {
                let detail = "its list of layers beneath cannot be read; write it anew";
                found.note(Kind::DamagedLower, id, detail);
                return Ok(());
            }
            // Gone meanwhile.
            Ok(None) => return Ok(()),
            beneath => beneath?.unwrap_or_default(),
        };
        for lower in &beneath {
            if !is_there(&self.layers, lower)? || !is_there(&self.diffs, lower)? {
                let detail =
                    format!("{lower} beneath it is missing; restore it, or remove this layer");
                found.note(Kind::MissingParent, id, detail);
                break;
            }
        }
        if !is_there(&self.diffs, id)? {
            let detail = "its content is missing; restore it, or remove this layer";
            found.note(Kind::Incomplete, id, detail);
        }
        if is_there(&self.mnts, id)? {
            return Ok(());
        }
        found.mend(Kind::LostDirectory, id, "its mountpoint is missing; it is made", || {
            match sys::name::mkdir(At::new(self.mnts.as_fd(), id.bytes()), 0o755) {
                Ok(()) | Err(Errno::EXIST) => Ok(()),
                Err(errno) => Err(Error::sys("mkdirat", self.show(MNT, id), errno)),
            }
        })
    }

    /// Looks for directories of layers that are not there.
    fn look_for_leftovers(&self, found: &mut Findings) -> Result<()> {
        for (dir, part) in [(&self.diffs, DIFF), (&self.mnts, MNT)] {
            let at = || show_path(&self.home.join(&[part]));
            let mut ids = Vec::new();
            sys::name::list(dir.as_fd(), |name, _, _| {
                ids.extend(LayerId::from_bytes(name));
                Ok(())
            })
            .at("getdents64", at)?;
            ids.sort();
            for id in ids {
                // A removal or a new layer on its way is under the lock of the store.
                if self.exists(&id)? {
                    continue;
                }
                let what = format!("{}/{id}", String::from_utf8_lossy(part));
                let detail = format!(
                    "layers/{id} is missing; write it to have the layer back; what is empty is removed"
                );
                found.mend(Kind::Leftover, what, detail, || {
                    let _held = lock::store(&self.home)?;
                    if self.exists(&id)? {
                        return Ok(());
                    }
                    match sys::name::rmdir(At::new(dir.as_fd(), id.bytes())) {
                        Ok(()) | Err(Errno::NOENT | Errno::NOTEMPTY | Errno::EXIST) => Ok(()),
                        Err(errno) => Err(Error::sys("unlinkat", at(), errno)),
                    }
                })?;
            }
        }
        Ok(())
    }

    /// Calls `act` with the mountpoint of a layer.
    fn with_point<T>(&self, id: &LayerId, act: impl FnOnce(&Point<'_>) -> Result<T>) -> Result<T> {
        let mark = [FLAT, id.bytes()].concat();
        let place = Place {
            home: &self.home,
            mark: At::new(self.home.dir(), &mark),
            content: At::new(self.diffs.as_fd(), id.bytes()),
            content_path: self.path(DIFF, id),
            merged: At::new(self.mnts.as_fd(), id.bytes()),
            merged_path: self.path(MNT, id),
            work: None,
            merged_mode: Some(0o755),
            options: flat::Options { whiteout_files: true, ..flat::Options::default() },
        };
        let beneath = || Ok(self.contents(id, &self.ancestors(id)?)?.lowers);
        act(&Point { id, place, run_home: &self.run_home, beneath: &beneath })
    }

    fn unmount_by(&self, id: &LayerId, leave: impl Fn(&Point<'_>) -> Result<bool>) -> Result<()> {
        if self.ancestors(id)?.is_empty() {
            return Ok(());
        }
        let _locked = self.lock(id, Sharing::Exclusive)?;
        if self.with_point(id, leave)? { self.drop_work(id) } else { Ok(()) }
    }

    fn mount_by(
        &self,
        id: &LayerId,
        ancestors: &[LayerId],
        request: &MountRequest,
        place: &Place<'_>,
    ) -> Result<Backend> {
        let merged = &place.merged_path;
        let wishes = Wishes { forced: request.backend.clone(), is_aufs: true, ..Wishes::default() };
        let backend = probe::pick(&self.home, &self.run_home, &wishes)?;
        let parts = self.contents(id, ancestors)?;
        let read_only = point::is_read_only(request);
        let mut own = parts.own.into_iter();
        let Some(diff) = own.next() else { return Err(no_such(id)) };
        let layers = Layers { diff, lowers: parts.lowers, read_only };
        let mut options = point::options(request, &backend);
        let work = self.path(WORK, id);
        match backend {
            Backend::Fuse => {
                if !read_only {
                    let works = self.home.make_dir(WORK, 0o700)?;
                    match sys::name::mkdir(At::new(works.as_fd(), id.bytes()), 0o700) {
                        Ok(()) | Err(Errno::EXIST) => (),
                        Err(errno) => return Err(Error::sys("mkdirat", show_path(&work), errno)),
                    }
                    // What aufs would write.
                    options.push("upper_lacks=chardev:xattr".to_owned());
                }
                layers.mount_served(&backend, &work, &options, merged, self.home.path())?;
            }
            Backend::Kernel => {
                if !read_only {
                    return Err(point::unsupported(
                        &backend,
                        "writes whiteouts that aufs does not know; add --read-only, or use fuse",
                    ));
                }
                std::iter::once(&layers.diff).chain(&layers.lowers).try_for_each(refuse_marks)?;
                let dir = sys::open::directory(self.home.dir(), b".").at("open", || "aufs")?;
                let none = LayerDir { dir, path: work };
                layers.mount_kernel(none, &options, request.maps.as_ref(), merged)?;
            }
            Backend::Flat => point::copy(place, id, request, layers)?,
            Backend::Program(_) => {
                let why =
                    "does not serve the driver aufs; use fuse, flat, or kernel with --read-only";
                return Err(point::unsupported(&backend, why));
            }
        }
        Ok(backend)
    }
}

/// Fails if a content has names that only aufs and our own server understand.
fn refuse_marks(content: &Content) -> Result<()> {
    let mut found = None;
    let walked = sys::tree::walk_from(content.dir.as_fd(), &mut |_, name, _| {
        // What aufs keeps for itself at the top hides nothing.
        if marks::whiteout_target(name).is_some() || name == marks::OPAQUE_NAME {
            found = Some(name.escape_ascii().to_string());
            return Err(Errno::CANCELED);
        }
        Ok(())
    });
    match (found, walked) {
        (Some(name), _) => Err(point::unsupported(
            &Backend::Kernel,
            &format!("{} has {name}, a mark of aufs; use fuse", show_path(&content.path)),
        )),
        (None, walked) => walked.at("getdents64", || show_path(&content.path)),
    }
}

impl Driver for Aufs {
    fn variant(&self) -> Variant {
        Variant::Aufs
    }

    fn list(&self) -> Result<Vec<LayerId>> {
        let mut found = Vec::new();
        sys::name::list(self.layers.as_fd(), |name, _, _| {
            found.extend(LayerId::from_bytes(name));
            Ok(())
        })
        .at("getdents64", || show_path(&self.home.join(&[LAYERS])))?;
        found.sort();
        Ok(found)
    }

    fn exists(&self, id: &LayerId) -> Result<bool> {
        has(self.layers.as_fd(), id.bytes()).at("statx", || self.show(LAYERS, id))
    }

    fn status(&self) -> Result<Vec<(String, String)>> {
        let at = || show_path(self.home.path());
        let fs = rustix::fs::fstatfs(self.home.dir()).at("fstatfs", at)?;
        let wishes = Wishes { is_aufs: true, ..Wishes::default() };
        let (probe, choice) = probe::try_machine(&self.home, &self.run_home, &wishes, false)?;
        let shifts = supports_shifting(&probe, &choice);
        Ok(vec![
            ("Driver".to_owned(), self.variant().name().to_owned()),
            ("Root Dir".to_owned(), at()),
            ("Backing Filesystem".to_owned(), fs_name(fs.f_type)),
            ("Dirs".to_owned(), self.list()?.len().to_string()),
            ("Supports shifting".to_owned(), shifts.to_string()),
        ])
    }

    fn metadata(&self, id: &LayerId) -> Result<Vec<(&'static str, String)>> {
        let lowers: Vec<String> =
            self.ancestors(id)?.iter().map(|lower| self.show(DIFF, lower)).collect();
        let mut fields = vec![("DiffDir", self.show(DIFF, id)), ("MergedDir", self.show(MNT, id))];
        if !lowers.is_empty() {
            fields.push(("LowerDir", lowers.join(":")));
        }
        Ok(fields)
    }

    fn parent(&self, id: &LayerId) -> Result<Option<LayerId>> {
        Ok(self.ancestors(id)?.into_iter().next())
    }

    fn parts(&self, id: &LayerId) -> Result<Parts> {
        self.contents(id, &self.ancestors(id)?)
    }

    fn make(
        &self,
        id: &LayerId,
        options: CreateOptions<'_>,
        fill: Option<&mut Fill<'_>>,
    ) -> Result<()> {
        if self.exists(id)? {
            return Err(Error::LayerExists { id: id.to_string().into() });
        }
        let at = || self.show(DIFF, id);
        let (uid, gid) = options.owner.unwrap_or((0, 0));
        let mut root = RootStat { uid, gid, mode: self.variant().base_mode() };
        let mut ancestors = Vec::new();
        if let Some(parent) = options.parent {
            ancestors.push(parent.clone());
            ancestors.extend(self.ancestors(parent)?);
            let stat = sys::stat::of(&self.content(parent, parent)?.dir).at("statx", at)?;
            let mode = u32::from(stat.stx_mode) & 0o7777;
            root = RootStat { uid: stat.stx_uid, gid: stat.stx_gid, mode };
        }
        let max = self.variant().depth_max();
        if ancestors.len() > max {
            return Err(Error::invalid(
                format!("parent {}", ancestors.first().map_or("", LayerId::as_str)),
                format!("has {max} layers beneath it, which is the most; flatten some"),
            ));
        }
        let temp = TempDir::new(&self.home)?;
        make_dir(temp.dir().as_fd(), DIFF, root).at("mkdirat", at)?;
        if let Some(fill) = fill {
            let diff = sys::open::directory(temp.dir().as_fd(), DIFF).at("open", at)?;
            fill(Filling::plain(diff, Whiteouts::Files))?;
        }
        self.publish(id, &ancestors, temp)
    }

    fn remove(&self, id: &LayerId, even_named: bool) -> Result<()> {
        let locked = self.lock(id, Sharing::Exclusive)?;
        self.with_point(id, |point| point.refuse_mounted())?;
        for child in self.list()? {
            if self.find(&child)?.is_some_and(|beneath| beneath.contains(id)) {
                return Err(has_child(id, &child));
            }
        }
        if !even_named {
            engine::refuse_if_named(&self.home, id)?;
        }
        let temp = TempDir::new(&self.home)?;
        let dir = temp.dir().as_fd();
        let held = lock::store(&self.home)?;
        let none = RenameFlags::empty();
        let record = [RECORD, id.bytes()].concat();
        sys::name::rename(At::new(self.layers.as_fd(), id.bytes()), At::new(dir, &record), none)
            .at("renameat", || self.show(LAYERS, id))?;
        sys::data::sync(self.layers.as_fd(), false).at("fsync", || self.show(LAYERS, id))?;
        for (from, part) in [(self.mnts.as_fd(), MNT), (self.diffs.as_fd(), DIFF)] {
            match sys::name::rename(At::new(from, id.bytes()), At::new(dir, part), none) {
                Ok(()) | Err(Errno::NOENT) => (),
                Err(errno) => return Err(Error::sys("renameat", self.show(part, id), errno)),
            }
        }
        self.drop_work(id)?;
        drop((held, locked));
        temp.remove()
    }

    /// A layer with nothing beneath it is where it lies, as with Docker.
    fn mount(&self, id: &LayerId, request: &MountRequest) -> Result<PathBuf> {
        let ancestors = self.ancestors(id)?;
        if ancestors.is_empty() {
            return Ok(self.path(DIFF, id));
        }
        let _locked = self.lock(id, Sharing::Exclusive)?;
        let merged = self.path(MNT, id);
        match sys::name::mkdir(At::new(self.mnts.as_fd(), id.bytes()), 0o755) {
            Ok(()) | Err(Errno::EXIST) => (),
            Err(errno) => return Err(Error::sys("mkdirat", show_path(&merged), errno)),
        }
        self.with_point(id, |point| {
            point.enter(point::is_read_only(request), || {
                self.mount_by(id, &ancestors, request, &point.place)
            })
        })?;
        Ok(merged)
    }

    fn unmount(&self, id: &LayerId) -> Result<()> {
        self.unmount_by(id, |point| point.leave())
    }

    fn is_mounted(&self, id: &LayerId) -> Result<bool> {
        self.ancestors(id)?;
        self.with_point(id, |point| point.is_mounted())
    }

    fn is_named(&self, id: &LayerId) -> Result<bool> {
        engine::is_recorded(&self.home, id)
    }

    fn try_machine(&self) -> Result<(Probe, Choice)> {
        let wishes = Wishes { is_aufs: true, ..Wishes::default() };
        probe::try_machine(&self.home, &self.run_home, &wishes, true)
    }

    fn check(&self, mends: bool) -> Result<Vec<Finding>> {
        let look = |found: &mut Findings| {
            self.list()?.iter().try_for_each(|id| self.look_at(id, found))?;
            self.look_for_leftovers(found)
        };
        let forget = |id: &LayerId| match self.lock(id, Sharing::Exclusive) {
            Ok(_locked) => self.with_point(id, |point| point.forget()),
            Err(Error::NoSuchLayer { .. }) => drop_count(&open_counts(&self.run_home)?, id),
            Err(error) => Err(error),
        };
        let recover = || self.recover();
        check_old::check(self, &self.home, &self.run_home, mends, look, recover, forget)
    }

    fn usage(&self) -> Result<Vec<Item>> {
        let at = || show_path(&self.home.join(&[WORK]));
        let works = find_dir(self.home.dir(), WORK).at("open", at)?;
        usage::of_layers(&self.home, &self.list()?, |id, measure| {
            measure(self.diffs.as_fd(), id.bytes(), Part::Content)?;
            for dir in [&self.mnts, &self.layers] {
                measure(dir.as_fd(), id.bytes(), Part::Other)?;
            }
            match &works {
                Some(works) => measure(works.as_fd(), id.bytes(), Part::Work),
                None => Ok(()),
            }
        })
    }

    /// Takes all mounts down.
    fn cleanup(&self) -> Result<()> {
        let all = |point: &Point<'_>| point.clear().map(|()| true);
        self.list()?.iter().try_for_each(|id| self.unmount_by(id, all))
    }
}
