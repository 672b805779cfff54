//! Docker's first `overlay` driver: an image layer is a complete tree in `root`, which shares files
//! with others by hard links; a container layer has an `upper` over the one tree that `lower-id` names.
//!
//! ```text
//! HOME/ID/root
//! HOME/ID/{upper,work,merged,lower-id}
//! ```
//!
//! Layers are made in a temporary directory and published by one rename ([`super::stage`]). The locks
//! are those of [`super::lock`].

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use rustix::fs::RenameFlags;

use super::check::{Finding, Kind};
use super::check_old::{self, Findings};
use super::create::{RootStat, make_dir};
use super::docker::LayerDb;
use super::driver::{self, Driver, Fill, Filling, Parts, has_child, no_such};
use super::flat::{MARK, Place};
use super::layout::{Home, LayerId, MERGED, Variant, WORK, has, read_small, write_small};
use super::mounts::{MountRequest, drop_count, open_counts};
use super::point::{self, Point};
use super::probe::{self, Backend, Choice, Probe, Wishes};
use super::serve::Layers;
use super::stage::{self, TempDir};
use super::usage::{self, Item, Part};
use super::{
    Content, CreateOptions, StoreConfig, Whiteouts, engine, fs_name, lock, supports_shifting,
};
use crate::archive::flat::{self, Transfer};
use crate::archive::transfer::Source;
use crate::archive::view::Stack;
use crate::error::{Context, Errno, Error, Result};
use crate::mount::kernel::LayerDir;
use crate::options::show_path;
use crate::sys;
use crate::sys::lockfile::Sharing;
use crate::sys::name::At;

/// Complete tree of an image layer.
const ROOT: &[u8] = b"root";
/// Changes of a container layer.
const UPPER: &[u8] = b"upper";
/// File of a container layer with the layer whose tree lies beneath.
const LOWER_ID: &[u8] = b"lower-id";

/// An open store of that driver.
#[derive(Debug)]
pub struct Overlay1 {
    home: Home,
    run_home: PathBuf,
}

/// Returns whether a home holds a layer of that driver.
///
/// # Errors
/// Those of looking.
pub fn is_one(home: &Home) -> Result<bool> {
    for id in home.list()? {
        let Some(layer) = home.layer(&id)? else { continue };
        if is_layer(&layer).at("statx", || home.show(&id))? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn is_layer(layer: &OwnedFd) -> std::result::Result<bool, Errno> {
    Ok(has(layer.as_fd(), ROOT)? || has(layer.as_fd(), LOWER_ID)?)
}

impl Overlay1 {
    /// Opens the store in a home, and recovers what killed processes left.
    pub(super) fn new(home: Home, config: &StoreConfig) -> Result<Self> {
        let store = Self::assemble(home, config)?;
        stage::recover(&store.home)?;
        Ok(store)
    }

    /// Opens the store in a home as it is.
    pub(super) fn assemble(home: Home, config: &StoreConfig) -> Result<Self> {
        if home.links()?.is_some() {
            return Err(Error::invalid(
                format!("root {}", show_path(&config.root)),
                "holds a store of containers/storage; use --driver overlay",
            ));
        }
        Ok(Self { home, run_home: config.run_root.join(config.variant.name()) })
    }

    fn layer(&self, id: &LayerId) -> Result<OwnedFd> {
        self.find(id)?.ok_or_else(|| no_such(id))
    }

    fn find(&self, id: &LayerId) -> Result<Option<OwnedFd>> {
        let Some(layer) = self.home.layer(id)? else { return Ok(None) };
        let is_layer = is_layer(&layer).at("statx", || self.home.show(id))?;
        Ok(is_layer.then_some(layer))
    }

    fn lower_id(&self, id: &LayerId, layer: &OwnedFd) -> Result<Option<LayerId>> {
        let text = read_small(layer.as_fd(), LOWER_ID).at("read", || self.home.show(id))?;
        let Some(text) = text else { return Ok(None) };
        LayerId::from_bytes(text.trim_ascii()).map(Some).ok_or_else(|| Error::Corrupt {
            what: "names no layer; remove this one".into(),
            at: format!("{}/lower-id", self.home.show(id)).into(),
        })
    }

    /// Returns what an image layer was made on, which nobody knows but Docker's own records: those
    /// of layers by digest, each with the layer here, and the digest of its parent.
    fn recorded_parent(&self, id: &LayerId) -> Result<Option<LayerId>> {
        let Some(records) = LayerDb::open(&self.home)? else { return Ok(None) };
        match records.parent(id)? {
            // One that is gone says nothing any more.
            Some(parent) if !self.exists(&parent)? => Ok(None),
            parent => Ok(parent),
        }
    }

    fn content(&self, id: &LayerId, layer: &OwnedFd, name: &[u8]) -> Result<Option<Content>> {
        driver::content(layer, name, self.home.join(&[id.bytes(), name]))
    }

    /// Returns the tree of an image layer, which another layer needs.
    fn root(&self, id: &LayerId, needed_by: &LayerId) -> Result<Content> {
        let root = match self.find(id)? {
            Some(layer) => self.content(id, &layer, ROOT)?,
            None => None,
        };
        root.ok_or_else(|| Error::Corrupt {
            what: format!(
                "the tree of {id} beneath it is missing; restore it, or remove this layer"
            )
            .into(),
            at: self.home.show(needed_by).into(),
        })
    }

    fn parts_of(&self, id: &LayerId, layer: &OwnedFd) -> Result<Parts> {
        if let Some(root) = self.content(id, layer, ROOT)? {
            return Ok(Parts { own: vec![root], lowers: Vec::new() });
        }
        let missing = || Error::Corrupt {
            what: "has neither root nor upper and lower-id; remove it".into(),
            at: self.home.show(id).into(),
        };
        let upper = self.content(id, layer, UPPER)?.ok_or_else(missing)?;
        let lower = self.lower_id(id, layer)?.ok_or_else(missing)?;
        Ok(Parts { own: vec![upper], lowers: vec![self.root(&lower, id)?] })
    }

    /// Makes the content of a layer on `parent`; `fill` says what is in it.
    fn make_on(
        &self,
        id: &LayerId,
        layer: &OwnedFd,
        parent: &LayerId,
        read_write: bool,
        fill: Option<&mut Fill<'_>>,
    ) -> Result<()> {
        let at = || self.home.show(id);
        let below = self.layer(parent)?;
        let path = |name: &[u8]| self.home.join(&[id.bytes(), name]);
        let make = |name: &[u8], stat: RootStat| {
            make_dir(layer.as_fd(), name, stat).at("mkdirat", at)?;
            sys::open::directory(layer.as_fd(), name).at("open", at)
        };
        let private = RootStat { uid: 0, gid: 0, mode: 0o700 };
        let parts = self.parts_of(parent, &below)?;
        let is_image = parts.lowers.is_empty();
        let fill = match fill {
            Some(fill) if !(read_write && is_image) => {
                let root = make(ROOT, private)?;
                let to = sys::open::directory(layer.as_fd(), ROOT).at("open", at)?;
                // Files of an upper may be written to in place, those of images never are.
                let options = flat::Options { hard_links: is_image, ..flat::Options::default() };
                let all = Source::Tree(parts.stack()?, Stack::new([])?);
                flat::transfer(&all, to, path(ROOT), Transfer::Layer, options, &mut |_| ())?;
                return fill(Filling::plain(root, Whiteouts::None));
            }
            fill => fill,
        };
        let lower = if is_image { Some(parent.clone()) } else { self.lower_id(parent, &below)? };
        let upper = match parts.own.first() {
            Some(content) => sys::stat::of(&content.dir).at("statx", at)?,
            None => return Err(no_such(parent)),
        };
        let mode = u32::from(upper.stx_mode) & 0o7777;
        let upper = make(UPPER, RootStat { uid: upper.stx_uid, gid: upper.stx_gid, mode })?;
        make(WORK, private)?;
        let lower = lower.ok_or_else(|| no_such(parent))?;
        write_small(layer.as_fd(), LOWER_ID, lower.bytes(), 0o644).at("write", at)?;
        if let Some(fill) = fill {
            return fill(Filling::plain(upper, Whiteouts::Kernel));
        }
        if is_image {
            return Ok(());
        }
        let options = flat::Options::default();
        flat::transfer(
            &Source::Layer(parts.stack()?),
            upper,
            path(UPPER),
            Transfer::Layer,
            options,
            &mut |_| (),
        )
    }

    fn publish(
        &self,
        id: &LayerId,
        parent: Option<&LayerId>,
        temp: TempDir<'_>,
        layer: &OwnedFd,
    ) -> Result<()> {
        let at = || self.home.show(id);
        rustix::fs::syncfs(layer).at("syncfs", at)?;
        let _parent = match parent {
            Some(parent) => Some(
                lock::layer(&self.home, parent, Sharing::Shared)?.ok_or_else(|| no_such(parent))?,
            ),
            None => None,
        };
        let held = lock::store(&self.home)?;
        let name = TempDir::name_of(id);
        let from = At::new(temp.dir().as_fd(), &name);
        let to = At::new(self.home.dir(), id.bytes());
        match sys::name::rename(from, to, RenameFlags::NOREPLACE) {
            Err(Errno::EXIST) => return Err(Error::LayerExists { id: id.to_string().into() }),
            done => done.at("renameat2", at)?,
        }
        sys::data::sync(self.home.dir(), false).at("fsync", || show_path(self.home.path()))?;
        drop(held);
        temp.remove()
    }

    /// Looks at one directory of the home.
    fn look_at(&self, id: &LayerId, found: &mut Findings) -> Result<()> {
        // One that is removed meanwhile is no finding.
        let Some(layer) = self.home.layer(id)? else { return Ok(()) };
        let at = || self.home.show(id);
        let holds = |name: &[u8]| has(layer.as_fd(), name).at("statx", at);
        if holds(ROOT)? {
            return Ok(());
        }
        let (has_upper, has_lower) = (holds(UPPER)?, holds(LOWER_ID)?);
        if !has_upper {
            // Of others, who may try something out in a directory of the home.
            if !has_lower {
                return Ok(());
            }
            let detail = "has no content; it is removed";
            return found.mend(Kind::Incomplete, id, detail, || self.drop_incomplete(id));
        }
        if !has_lower {
            let detail =
                "lower-id, the layer beneath it, is missing; write it anew, or remove the layer";
            found.note(Kind::DamagedLower, id, detail);
            return Ok(());
        }
        match self.lower_id(id, &layer) {
            Ok(Some(lower)) => {
                if let Err(Error::Corrupt { .. }) = self.root(&lower, id) {
                    let detail =
                        format!("{lower} beneath it is missing; restore it, or remove this layer");
                    found.note(Kind::MissingParent, id, detail);
                }
            }
            // Gone meanwhile.
            Ok(None) => (),
            Err(Error::Corrupt { .. }) => {
                found.note(Kind::DamagedLower, id, "lower-id names no layer; write it anew");
            }
            Err(error) => return Err(error),
        }
        if !holds(WORK)? {
            found.mend(Kind::LostDirectory, id, "work is missing; it is made", || {
                match sys::name::mkdir(At::new(layer.as_fd(), WORK), 0o700) {
                    Ok(()) | Err(Errno::EXIST) => Ok(()),
                    Err(errno) => Err(Error::sys("mkdirat", at(), errno)),
                }
            })?;
        }
        Ok(())
    }

    fn drop_incomplete(&self, id: &LayerId) -> Result<()> {
        let Some(locked) = lock::layer(&self.home, id, Sharing::Exclusive)? else { return Ok(()) };
        let holds = |name: &[u8]| has(locked.dir.as_fd(), name).at("statx", || self.home.show(id));
        if holds(ROOT)? || holds(UPPER)? {
            return Ok(());
        }
        let temp = TempDir::new(&self.home)?;
        let held = lock::store(&self.home)?;
        stage::retire(&temp, id)?;
        drop((held, locked));
        temp.remove()
    }

    /// Calls `act` with the mountpoint of a layer, whose directory is open.
    fn with_point<T>(
        &self,
        id: &LayerId,
        layer: &OwnedFd,
        act: impl FnOnce(&Point<'_>) -> Result<T>,
    ) -> Result<T> {
        let at = |name: &'static [u8]| At::new(layer.as_fd(), name);
        let place = Place {
            home: &self.home,
            mark: at(MARK),
            content: at(UPPER),
            content_path: self.home.join(&[id.bytes(), UPPER]),
            merged: at(MERGED),
            merged_path: self.home.join(&[id.bytes(), MERGED]),
            work: Some(at(WORK)),
            merged_mode: None,
            options: flat::Options::default(),
        };
        let beneath = || Ok(self.parts_of(id, layer)?.lowers);
        act(&Point { id, place, run_home: &self.run_home, beneath: &beneath })
    }

    fn unmount_by(&self, id: &LayerId, leave: impl Fn(&Point<'_>) -> Result<bool>) -> Result<()> {
        let locked = lock::layer(&self.home, id, Sharing::Exclusive)?.ok_or_else(|| no_such(id))?;
        let merged = self.home.join(&[id.bytes(), MERGED]);
        if !self.with_point(id, &locked.dir, leave)? {
            return Ok(());
        }
        // Copies of the mount that live on in other namespaces end with the directory.
        match sys::name::rmdir(At::new(locked.dir.as_fd(), MERGED)) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(Error::sys("unlinkat", show_path(&merged), errno)),
        }
    }

    /// Returns who serves the mount of a layer, an image or not.
    fn backend(&self, request: &MountRequest, is_image: bool) -> Result<Backend> {
        // One tree alone is no stack to the kernel.
        let wishes = Wishes {
            forced: request.backend.clone(),
            has_maps: request.maps.is_some(),
            is_tree: is_image,
            ..Wishes::default()
        };
        probe::pick(&self.home, &self.run_home, &wishes)
    }

    fn mount_by(
        &self,
        layer: &OwnedFd,
        backend: &Backend,
        request: &MountRequest,
        place: &Place<'_>,
        id: &LayerId,
    ) -> Result<()> {
        let merged = &place.merged_path;
        let parts = self.parts_of(id, layer)?;
        let mut own = parts.own.into_iter();
        let Some(diff) = own.next() else { return Err(no_such(id)) };
        let read_only = point::is_read_only(request);
        let layers = Layers { diff, lowers: parts.lowers, read_only };
        let options = point::options(request, backend);
        let work = self.home.join(&[id.bytes(), WORK]);
        match backend {
            Backend::Kernel => {
                let dir =
                    sys::open::directory(layer.as_fd(), WORK).at("open", || show_path(&work))?;
                let work = LayerDir { dir, path: work };
                layers.mount_kernel(work, &options, request.maps.as_ref(), merged)
            }
            Backend::Fuse => {
                layers.mount_served(backend, &work, &options, merged, self.home.path())
            }
            Backend::Flat => point::copy(place, id, request, layers),
            Backend::Program(_) => Err(point::unsupported(
                backend,
                "does not serve the driver overlay1; use kernel, fuse or flat",
            )),
        }
    }
}

impl Driver for Overlay1 {
    fn variant(&self) -> Variant {
        Variant::Overlay1
    }

    fn list(&self) -> Result<Vec<LayerId>> {
        let mut found = Vec::new();
        for id in self.home.list()? {
            if self.find(&id)?.is_some() {
                found.push(id);
            }
        }
        Ok(found)
    }

    fn exists(&self, id: &LayerId) -> Result<bool> {
        Ok(self.find(id)?.is_some())
    }

    fn status(&self) -> Result<Vec<(String, String)>> {
        let at = || show_path(self.home.path());
        let fs = rustix::fs::fstatfs(self.home.dir()).at("fstatfs", at)?;
        let (probe, choice) =
            probe::try_machine(&self.home, &self.run_home, &Wishes::default(), false)?;
        let shifts = supports_shifting(&probe, &choice);
        Ok(vec![
            ("Driver".to_owned(), self.variant().name().to_owned()),
            ("Home".to_owned(), at()),
            ("Backing Filesystem".to_owned(), fs_name(fs.f_type)),
            ("Layers".to_owned(), self.list()?.len().to_string()),
            ("Supports shifting".to_owned(), shifts.to_string()),
        ])
    }

    fn metadata(&self, id: &LayerId) -> Result<Vec<(&'static str, String)>> {
        let parts = self.parts_of(id, &self.layer(id)?)?;
        let path = |name: &[u8]| show_path(&self.home.join(&[id.bytes(), name]));
        let Some(lower) = parts.lowers.first() else {
            return Ok(vec![("RootDir", path(ROOT))]);
        };
        Ok(vec![
            ("LowerDir", show_path(&lower.path)),
            ("UpperDir", path(UPPER)),
            ("WorkDir", path(WORK)),
            ("MergedDir", path(MERGED)),
        ])
    }

    fn parent(&self, id: &LayerId) -> Result<Option<LayerId>> {
        match self.lower_id(id, &self.layer(id)?)? {
            Some(lower) => Ok(Some(lower)),
            None => self.recorded_parent(id),
        }
    }

    fn parts(&self, id: &LayerId) -> Result<Parts> {
        self.parts_of(id, &self.layer(id)?)
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
        let at = || self.home.show(id);
        let (uid, gid) = options.owner.unwrap_or((0, 0));
        let temp = TempDir::new(&self.home)?;
        let name = TempDir::name_of(id);
        make_dir(temp.dir().as_fd(), &name, RootStat { uid, gid, mode: 0o700 })
            .at("mkdirat", at)?;
        let layer = sys::open::directory(temp.dir().as_fd(), &name).at("open", at)?;
        if let Some(parent) = options.parent {
            self.make_on(id, &layer, parent, options.read_write, fill)?;
        } else {
            let mode = self.variant().base_mode();
            make_dir(layer.as_fd(), ROOT, RootStat { uid, gid, mode }).at("mkdirat", at)?;
            if let Some(fill) = fill {
                let root = sys::open::directory(layer.as_fd(), ROOT).at("open", at)?;
                fill(Filling::plain(root, Whiteouts::None))?;
            }
        }
        self.publish(id, options.parent, temp, &layer)
    }

    fn remove(&self, id: &LayerId, even_named: bool) -> Result<()> {
        let locked = lock::layer(&self.home, id, Sharing::Exclusive)?.ok_or_else(|| no_such(id))?;
        self.with_point(id, &locked.dir, |point| point.refuse_mounted())?;
        for child in self.list()? {
            let Some(layer) = self.find(&child)? else { continue };
            if self.lower_id(&child, &layer)?.as_ref() == Some(id) {
                return Err(has_child(id, &child));
            }
        }
        if !even_named {
            engine::refuse_if_named(&self.home, id)?;
        }
        let temp = TempDir::new(&self.home)?;
        let held = lock::store(&self.home)?;
        stage::retire(&temp, id)?;
        drop((held, locked));
        temp.remove()
    }

    /// The tree of an image layer is where it lies, as with Docker, unless it is only to be read.
    fn mount(&self, id: &LayerId, request: &MountRequest) -> Result<PathBuf> {
        let layer = self.layer(id)?;
        let is_image = has(layer.as_fd(), ROOT).at("statx", || self.home.show(id))?;
        if is_image && !point::is_read_only(request) {
            return Ok(self.home.join(&[id.bytes(), ROOT]));
        }
        let locked = lock::layer(&self.home, id, Sharing::Exclusive)?.ok_or_else(|| no_such(id))?;
        let merged = self.home.join(&[id.bytes(), MERGED]);
        match sys::name::mkdir(At::new(locked.dir.as_fd(), MERGED), 0o700) {
            Ok(()) | Err(Errno::EXIST) => (),
            Err(errno) => return Err(Error::sys("mkdirat", show_path(&merged), errno)),
        }
        self.with_point(id, &locked.dir, |point| {
            point.enter(point::is_read_only(request), || {
                let backend = self.backend(request, is_image)?;
                self.mount_by(&locked.dir, &backend, request, &point.place, id)?;
                Ok(backend)
            })
        })?;
        Ok(merged)
    }

    fn unmount(&self, id: &LayerId) -> Result<()> {
        self.unmount_by(id, |point| point.leave())
    }

    fn is_mounted(&self, id: &LayerId) -> Result<bool> {
        self.with_point(id, &self.layer(id)?, |point| point.is_mounted())
    }

    fn is_named(&self, id: &LayerId) -> Result<bool> {
        engine::is_recorded(&self.home, id)
    }

    fn try_machine(&self) -> Result<(Probe, Choice)> {
        probe::try_machine(&self.home, &self.run_home, &Wishes::default(), true)
    }

    fn check(&self, mends: bool) -> Result<Vec<Finding>> {
        let look = |found: &mut Findings| {
            self.home.list()?.iter().try_for_each(|id| self.look_at(id, found))
        };
        let recover = || stage::recover(&self.home).map(drop);
        let forget = |id: &LayerId| match lock::layer(&self.home, id, Sharing::Exclusive)? {
            Some(locked) => self.with_point(id, &locked.dir, |point| point.forget()),
            None => drop_count(&open_counts(&self.run_home)?, id),
        };
        check_old::check(self, &self.home, &self.run_home, mends, look, recover, forget)
    }

    fn usage(&self) -> Result<Vec<Item>> {
        usage::of_layers(&self.home, &self.list()?, |id, measure| {
            let Some(layer) = self.find(id)? else { return Ok(()) };
            for name in [ROOT, UPPER] {
                measure(layer.as_fd(), name, Part::Content)?;
            }
            measure(layer.as_fd(), WORK, Part::Work)?;
            // What was counted is not counted once more.
            measure(self.home.dir(), id.bytes(), Part::Other)
        })
    }

    /// Takes all mounts down.
    fn cleanup(&self) -> Result<()> {
        let all = |point: &Point<'_>| point.clear().map(|()| true);
        self.list()?.iter().try_for_each(|id| self.unmount_by(id, all))
    }
}
