//! What every store of layers can do, whatever its format: the seam between commands and drivers.
//!
//! [`Store`] is the driver for `overlay` and `overlay2`, [`Overlay1`] and [`Aufs`] are those for
//! stores of old. A layer's content is handed out as open directories ([`Parts`]), and made by a
//! function that is given one to fill ([`Filling`]).

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use super::aufs::Aufs;
use super::check::Finding;
use super::layout::{Home, LayerId, Variant};
use super::mounts::MountRequest;
use super::overlay1::{self, Overlay1};
use super::probe::{Choice, Probe};
use super::usage::Item;
use super::{Content, CreateOptions, Store, StoreConfig, Whiteouts, flat};
use crate::archive::view::Stack;
use crate::error::{Context, Errno, Error, Result};
use crate::mount::mountinfo;
use crate::options::show_path;
use crate::sys;

/// A store of layers.
pub trait Driver: fmt::Debug {
    /// Returns whose rules it follows.
    fn variant(&self) -> Variant;

    /// Returns all layers, sorted.
    ///
    /// # Errors
    /// Those of getdents64(2).
    fn list(&self) -> Result<Vec<LayerId>>;

    /// Returns whether there is such a layer.
    ///
    /// # Errors
    /// Those of looking it up.
    fn exists(&self, id: &LayerId) -> Result<bool>;

    /// Returns what engines show of a driver: names and values.
    ///
    /// # Errors
    /// Those of looking at the store.
    fn status(&self) -> Result<Vec<(String, String)>>;

    /// Returns the directories of a layer, by the names that engines give them.
    ///
    /// # Errors
    /// `NoSuchLayer`; `Corrupt` for a layer that is not whole.
    fn metadata(&self, id: &LayerId) -> Result<Vec<(&'static str, String)>>;

    /// Returns the layer that one was made on, as far as that is known.
    ///
    /// # Errors
    /// As [`Driver::metadata`].
    fn parent(&self, id: &LayerId) -> Result<Option<LayerId>>;

    /// Opens the content of a layer and of all beneath it.
    ///
    /// # Errors
    /// As [`Driver::metadata`].
    fn parts(&self, id: &LayerId) -> Result<Parts>;

    /// Makes a layer, whole or not at all. `fill` writes its content; without it there is none.
    ///
    /// # Errors
    /// `LayerExists`; `NoSuchLayer` for the parent; `Invalid` beyond the depth that the format has;
    /// those of `fill`.
    fn make(
        &self,
        id: &LayerId,
        options: CreateOptions<'_>,
        fill: Option<&mut Fill<'_>>,
    ) -> Result<()>;

    /// Removes a layer with its content; with `even_named` also one that an image or a container has.
    ///
    /// # Errors
    /// `NoSuchLayer`; `Busy` if it is mounted, or another layer, an image or a container needs it.
    fn remove(&self, id: &LayerId, even_named: bool) -> Result<()>;

    /// Mounts a layer, or counts once more that it is, and returns where.
    ///
    /// # Errors
    /// `NoSuchLayer`; `Unsupported` if nobody can serve; what kernel or server say.
    fn mount(&self, id: &LayerId, request: &MountRequest) -> Result<PathBuf>;

    /// Gives a mount of a layer back; the last one takes it down. Nothing mounted is no error.
    ///
    /// # Errors
    /// `NoSuchLayer`, and those of unmounting.
    fn unmount(&self, id: &LayerId) -> Result<()>;

    /// Returns whether a layer is mounted, or a copy stands in place of a mount.
    ///
    /// # Errors
    /// `NoSuchLayer`, and those of looking.
    fn is_mounted(&self, id: &LayerId) -> Result<bool>;

    /// Returns whether records that an engine keeps beside the store name a layer.
    ///
    /// # Errors
    /// Those of reading them.
    fn is_named(&self, id: &LayerId) -> Result<bool>;

    /// Returns the store if it can keep content before there is a layer for it.
    fn stager(&self) -> Option<&Store> {
        None
    }

    /// Tries what the machine can do for the store, and returns who mounts, and why.
    ///
    /// # Errors
    /// Those of writing into the store and the run home.
    fn try_machine(&self) -> Result<(Probe, Choice)>;

    /// Returns what is wrong, and mends what can be mended if that is asked for: then it is what was
    /// wrong.
    ///
    /// # Errors
    /// Those of reading and mending; damage is no error.
    fn check(&self, mends: bool) -> Result<Vec<Finding>>;

    /// Gives back what nobody needs, and returns what that was; with `orphans` also layers that the
    /// records of an engine do not name.
    ///
    /// # Errors
    /// As [`Driver::check`]; `Invalid` if orphans are asked for where nothing tells what one is.
    fn collect(&self, orphans: bool) -> Result<Vec<Finding>> {
        if orphans {
            return Err(Error::invalid(
                "--orphans",
                format!(
                    "is not known for the driver {}; remove layers by lamina layer remove",
                    self.variant().name()
                ),
            ));
        }
        self.check(true)
    }

    /// Returns what takes space in the store.
    ///
    /// # Errors
    /// Those of walking the tree.
    fn usage(&self) -> Result<Vec<Item>>;

    /// Undoes what mounting layers left, for who is about to give the store up.
    ///
    /// # Errors
    /// `Busy` where an engine may have layers mounted as well; those of unmounting.
    fn cleanup(&self) -> Result<()>;
}

/// Writes the content of a new layer.
pub type Fill<'a> = dyn FnMut(Filling) -> Result<()> + 'a;

/// A new layer that is to be filled.
#[derive(Debug)]
pub struct Filling {
    /// Where its content goes.
    pub root: OwnedFd,
    /// What is deleted is kept in this form; of a whole tree it is removed.
    pub whiteouts: Whiteouts,
    /// Whether owners that cannot be set are left out.
    pub ignore_chown_errors: bool,
    /// Mode that everything really has.
    pub force_mask: Option<u32>,
}

impl Filling {
    /// Returns what is needed of stores that have no options.
    pub(super) fn plain(root: OwnedFd, whiteouts: Whiteouts) -> Self {
        Self { root, whiteouts, ignore_chown_errors: false, force_mask: None }
    }
}

/// The open directories of a layer, for who reads contents.
#[derive(Debug)]
pub struct Parts {
    /// What the layer itself holds: its content, and older ones, newest first.
    pub own: Vec<Content>,
    /// What lies beneath, topmost first.
    pub lowers: Vec<Content>,
}

impl Parts {
    /// Returns whether the layer's content is one directory that says what it changes.
    pub fn is_one_layer(&self) -> bool {
        self.own.len() == 1
    }

    /// Returns the layer over those beneath it.
    ///
    /// # Errors
    /// Those of statx(2).
    pub fn stack(self) -> Result<Stack> {
        stack(self.own.into_iter().chain(self.lowers))
    }

    /// Returns those beneath it.
    ///
    /// # Errors
    /// Those of statx(2).
    pub fn beneath(self) -> Result<Stack> {
        stack(self.lowers)
    }
}

fn stack(contents: impl IntoIterator<Item = Content>) -> Result<Stack> {
    Stack::new(contents.into_iter().map(|content| (content.dir, content.path)))
}

/// Opens a store that exists, and recovers what killed processes left.
///
/// # Errors
/// As [`Store::open`].
pub fn open(config: &StoreConfig) -> Result<Box<dyn Driver>> {
    Ok(match config.variant {
        Variant::Containers | Variant::Docker => Box::new(Store::open(config)?),
        Variant::Overlay1 => Box::new(Overlay1::new(existing(config)?, config)?),
        Variant::Aufs => Box::new(Aufs::new(existing(config)?, config)?),
    })
}

/// Opens a store that exists, and leaves it as it is.
///
/// # Errors
/// As [`Store::open_as_it_is`].
pub fn open_as_it_is(config: &StoreConfig) -> Result<Box<dyn Driver>> {
    Ok(match config.variant {
        Variant::Containers | Variant::Docker => Box::new(Store::open_as_it_is(config)?),
        Variant::Overlay1 => Box::new(Overlay1::assemble(existing(config)?, config)?),
        Variant::Aufs => Box::new(Aufs::assemble(existing(config)?, config)?),
    })
}

/// Opens a store, making it where there is none.
///
/// # Errors
/// As [`Store::init`].
pub fn init(config: &StoreConfig) -> Result<Box<dyn Driver>> {
    Ok(match config.variant {
        Variant::Containers | Variant::Docker => Box::new(Store::init(config)?),
        Variant::Overlay1 => Box::new(Overlay1::new(created(config)?, config)?),
        Variant::Aufs => Box::new(Aufs::new(created(config)?, config)?),
    })
}

fn created(config: &StoreConfig) -> Result<Home> {
    refuse_options(config)?;
    Home::create(&config.root, config.variant)
}

/// Returns whose store lies in a root: that of the first driver whose home is there.
///
/// # Errors
/// Those of looking.
pub fn find(root: &Path) -> Result<Variant> {
    if let Some(home) = Home::open(root, Variant::Containers)? {
        let is_old = home.links()?.is_none() && overlay1::is_one(&home)?;
        return Ok(if is_old { Variant::Overlay1 } else { Variant::Containers });
    }
    for variant in [Variant::Docker, Variant::Aufs] {
        if Home::open(root, variant)?.is_some() {
            return Ok(variant);
        }
    }
    Ok(Variant::Containers)
}

/// Opens the home of a store of old.
fn existing(config: &StoreConfig) -> Result<Home> {
    refuse_options(config)?;
    Home::open(&config.root, config.variant)?.ok_or_else(|| {
        Error::invalid(
            format!("root {}", show_path(&config.root)),
            format!(
                "holds no store ({} is missing); name another by --root, or make one by lamina \
                 store init",
                config.variant.home_name()
            ),
        )
    })
}

/// Fails for options: the stores of old have none.
fn refuse_options(config: &StoreConfig) -> Result<()> {
    let driver = config.variant.name();
    match config.options.first() {
        Some(option) => Err(Error::invalid(
            format!("storage option {option}"),
            format!("means nothing to the driver {driver}; leave it out"),
        )),
        None if config.image_store.is_some() => Err(Error::invalid(
            "--imagestore",
            format!("means nothing to the driver {driver}; leave it out"),
        )),
        None => Ok(()),
    }
}

/// Returns the error for a layer that is not there.
pub(super) fn no_such(id: &LayerId) -> Error {
    Error::NoSuchLayer { id: id.to_string().into() }
}

/// Returns the error for a layer that another one needs.
pub(super) fn has_child(id: &LayerId, child: &LayerId) -> Error {
    Error::Busy {
        what: format!("{id}: the layer {child} was made on it; remove that first").into(),
    }
}

/// Opens a directory of a layer; `None` if it is missing.
pub(super) fn content(dir: &OwnedFd, name: &[u8], path: PathBuf) -> Result<Option<Content>> {
    use std::os::fd::AsFd;
    match sys::open::directory(dir.as_fd(), name) {
        Ok(dir) => Ok(Some(Content { dir, path })),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(Error::sys("open", show_path(&path), errno)),
    }
}

impl Driver for Store {
    fn variant(&self) -> Variant {
        self.home().variant()
    }

    fn list(&self) -> Result<Vec<LayerId>> {
        Self::list(self)
    }

    fn exists(&self, id: &LayerId) -> Result<bool> {
        Self::exists(self, id)
    }

    fn status(&self) -> Result<Vec<(String, String)>> {
        Self::status(self)
    }

    fn metadata(&self, id: &LayerId) -> Result<Vec<(&'static str, String)>> {
        let metadata = Self::metadata(self, id)?;
        let lowers: Vec<String> = metadata.lowers.iter().map(|path| show_path(path)).collect();
        let mut fields = vec![
            ("UpperDir", show_path(&metadata.upper)),
            ("WorkDir", show_path(&metadata.work)),
            ("MergedDir", show_path(&metadata.merged)),
        ];
        if !lowers.is_empty() {
            fields.push(("LowerDir", lowers.join(":")));
        }
        Ok(fields)
    }

    fn parent(&self, id: &LayerId) -> Result<Option<LayerId>> {
        let found = self.get_layer(id)?;
        Ok(self.lowers(&found, id)?.into_iter().next().map(|lower| lower.id))
    }

    fn parts(&self, id: &LayerId) -> Result<Parts> {
        Self::parts(self, id)
    }

    fn make(
        &self,
        id: &LayerId,
        options: CreateOptions<'_>,
        fill: Option<&mut Fill<'_>>,
    ) -> Result<()> {
        let mut staged = self.stage(id, options)?;
        if let Some(fill) = fill {
            let root = staged.content().try_clone_to_owned().map_err(|error| {
                let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
                Error::sys("fcntl", id.to_string(), errno)
            })?;
            fill(self.filling(root)?)?;
        }
        staged.publish()
    }

    fn remove(&self, id: &LayerId, even_named: bool) -> Result<()> {
        if even_named { self.remove_named(id) } else { Self::remove(self, id) }
    }

    fn mount(&self, id: &LayerId, request: &MountRequest) -> Result<PathBuf> {
        Self::mount(self, id, request)
    }

    fn unmount(&self, id: &LayerId) -> Result<()> {
        Self::unmount(self, id)
    }

    fn is_mounted(&self, id: &LayerId) -> Result<bool> {
        let found = self.get_layer(id)?;
        let has_copy = flat::find(&found.dir).at("read", || found.home.show(id))?.is_some();
        let merged = self.mountpoint(&found, id)?;
        Ok(has_copy || mountinfo::find_top(&mountinfo::load()?, &merged).is_some())
    }

    fn is_named(&self, id: &LayerId) -> Result<bool> {
        self.is_recorded(id)
    }

    fn stager(&self) -> Option<&Store> {
        Some(self)
    }

    fn try_machine(&self) -> Result<(Probe, Choice)> {
        let probe = self.probe(true)?;
        let choice = self.choose(&probe, false, None)?;
        Ok((probe, choice))
    }

    fn check(&self, mends: bool) -> Result<Vec<Finding>> {
        if mends { self.repair() } else { Self::check(self) }
    }

    fn collect(&self, orphans: bool) -> Result<Vec<Finding>> {
        Self::collect(self, orphans)
    }

    fn usage(&self) -> Result<Vec<Item>> {
        Self::usage(self)
    }

    fn cleanup(&self) -> Result<()> {
        Self::cleanup(self)
    }
}
