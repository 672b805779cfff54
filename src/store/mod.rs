//! Layer stores: graph drivers for the homes that containers/storage (`overlay`) and Docker
//! (`overlay2`) keep, and for those of Docker of old ([`overlay1`], [`aufs`]).
//!
//! [`Driver`] has the operations that all have, [`Store`] those of the first two. Both know ids and
//! directories, no file content: [`Store::parts`] and [`Store::stage`] hand out open directories
//! for that. [`lock`] has the locks and their order.
//!
//! Every change is made aside and published by one rename ([`stage`]). A killed process leaves a
//! temporary directory, which the next [`Store::open`] finishes or undoes.

pub mod additional;
pub mod aufs;
pub mod check;
mod check_old;
pub mod config;
pub mod content;
pub mod create;
pub mod differ;
mod docker;
pub mod driver;
pub mod engine;
pub mod flat;
pub mod idmap;
pub mod layout;
pub mod link;
pub mod lock;
pub mod lower;
pub mod migrate;
mod mountpoint;
pub mod mounts;
pub mod options;
pub mod overlay1;
mod point;
mod private;
pub mod probe;
pub mod remove;
mod serve;
pub mod stage;
mod trials;
pub mod usage;

use std::collections::HashSet;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

pub use content::{Content, Lower};
use content::{contents, empty_lower, resolve};
pub use create::{CreateOptions, StagedLayer};
pub use driver::{Driver, Filling, Parts};
use driver::{has_child, no_such};
pub use layout::{Home, LayerId, Variant};
pub use mounts::MountRequest;
pub use options::DriverOptions;
pub use probe::{Backend, Choice, Probe};

use crate::error::{Context, Error, Result};
use crate::mount::mountinfo;
use crate::options::show_path;
use crate::sys::lockfile::Sharing;
use layout::{DIFF, LOWER, LOWER_LAYERS, MERGED, PROGRAM_FLAG, WORK, make_dirs, read_small};

/// Where a store lies and how it is to be used.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StoreConfig {
    /// Directory that the home is in, `/var/lib/containers/storage`.
    pub root: PathBuf,
    /// Directory for what need not outlive a boot, `/run/containers/storage`.
    pub run_root: PathBuf,
    /// Root of the store that takes read-only layers, if they are kept apart.
    pub image_store: Option<PathBuf>,
    /// Whose rules the home follows.
    pub variant: Variant,
    /// `KEY=VALUE` options of the driver.
    pub options: Vec<String>,
}

/// An open store.
#[derive(Debug)]
pub struct Store {
    /// The home, then the image store, then the additional stores, which are only read.
    homes: Vec<Home>,
    /// How many of `homes` may be changed.
    writable: usize,
    run_home: PathBuf,
    options: DriverOptions,
}

/// Where a layer was found.
#[derive(Debug)]
pub struct Found<'a> {
    /// The home that holds it.
    pub home: &'a Home,
    /// Its directory.
    pub dir: OwnedFd,
    /// Whether it lies in the store's own home, not in an image store.
    pub is_own: bool,
    /// Whether it may be changed.
    pub is_writable: bool,
}

/// In which form layers of a store hold what they delete.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Whiteouts {
    /// Character devices and xattrs, as the kernel has them.
    Kernel,
    /// `.wh.` files: a mount program serves the store, or aufs did.
    Files,
    /// Not at all: a layer is a complete tree.
    None,
}

/// Paths that describe a layer, by the names that engines give them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Metadata {
    /// What the layer itself holds.
    pub upper: PathBuf,
    /// Its work directory.
    pub work: PathBuf,
    /// Its mountpoint.
    pub merged: PathBuf,
    /// Contents of its ancestors, parent first.
    pub lowers: Vec<PathBuf>,
}

impl Store {
    /// Opens a store that exists, and recovers what killed processes left.
    ///
    /// # Errors
    /// `Invalid` for options, or without a store there; those of opening directories.
    pub fn open(config: &StoreConfig) -> Result<Self> {
        Self::with_home(Self::existing(config)?, config)
    }

    fn existing(config: &StoreConfig) -> Result<Home> {
        refuse_others(config)?;
        Home::open(&config.root, config.variant)?.ok_or_else(|| {
            Error::invalid(
                format!("root {}", show_path(&config.root)),
                format!(
                    "holds no store ({} is missing); name another by --root, or make one by \
                     lamina store init",
                    config.variant.name()
                ),
            )
        })
    }

    /// Opens a store that exists, and leaves it as it is.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_as_it_is(config: &StoreConfig) -> Result<Self> {
        Self::assemble(Self::existing(config)?, config)
    }

    /// Opens a store, making it where there is none.
    ///
    /// # Errors
    /// As [`Store::open`], and those of making directories.
    /// # Locks
    /// Takes the lock under which stores are set up.
    pub fn init(config: &StoreConfig) -> Result<Self> {
        refuse_others(config)?;
        // Nothing is made for options that cannot be used.
        DriverOptions::parse(&config.options)?;
        let home = Home::create(&config.root, config.variant)?;
        let held = lock::setup(&home, Sharing::Exclusive)?;
        let store = Self::with_home(home, config)?;
        drop(held);
        Ok(store)
    }

    fn with_home(home: Home, config: &StoreConfig) -> Result<Self> {
        let store = Self::assemble(home, config)?;
        for home in store.writable_homes() {
            stage::recover(home)?;
            check::recover_staging(home)?;
        }
        Ok(store)
    }

    fn assemble(home: Home, config: &StoreConfig) -> Result<Self> {
        let options = DriverOptions::parse(&config.options)?;
        let mut homes = vec![home];
        if let Some(root) = &config.image_store {
            homes.push(Home::create(root, config.variant)?);
        }
        let writable = homes.len();
        for root in &options.image_stores {
            // One that nothing was put into yet has no layers; one that is not there is a mistake.
            std::fs::read_dir(root).map_err(|error| {
                Error::invalid(
                    format!("storage option overlay.imagestore={}", show_path(root)),
                    format!("open: {error}; correct it, or leave it out"),
                )
            })?;
            homes.extend(Home::open(root, config.variant)?);
        }
        // The mount table has paths without symlinks.
        let run_root = std::fs::canonicalize(&config.run_root)
            .or_else(|_missing| std::path::absolute(&config.run_root))
            .map_err(|error| layout::io_error("realpath", &config.run_root, error))?;
        let run_home = run_root.join(config.variant.name());
        Ok(Self { homes, writable, run_home, options })
    }

    /// Returns the store's own home.
    pub fn home(&self) -> &Home {
        // There is one at least: `with_home` puts it there.
        self.homes.first().unwrap_or_else(|| unreachable!())
    }

    /// Returns the homes that may be changed: the own one, and the image store.
    pub fn writable_homes(&self) -> impl Iterator<Item = &Home> {
        self.homes.iter().take(self.writable)
    }

    /// Returns what the options say.
    pub fn options(&self) -> &DriverOptions {
        &self.options
    }

    /// Returns the directory for what need not outlive a boot, making it.
    ///
    /// # Errors
    /// Those of mkdir(2).
    pub fn run_home(&self) -> Result<&Path> {
        make_dirs(&self.run_home, 0o700)?;
        Ok(&self.run_home)
    }

    /// Finds a layer in all homes.
    ///
    /// # Errors
    /// Those of openat2(2).
    pub fn find(&self, id: &LayerId) -> Result<Option<Found<'_>>> {
        for (index, home) in self.homes.iter().enumerate() {
            if let Some(dir) = home.layer(id)? {
                let (is_own, is_writable) = (index == 0, index < self.writable);
                return Ok(Some(Found { home, dir, is_own, is_writable }));
            }
        }
        Ok(None)
    }

    /// Finds a layer that must be there.
    ///
    /// # Errors
    /// `NoSuchLayer`, and those of openat2(2).
    pub fn get_layer(&self, id: &LayerId) -> Result<Found<'_>> {
        self.find(id)?.ok_or_else(|| no_such(id))
    }

    /// Returns whether there is such a layer.
    ///
    /// # Errors
    /// Those of openat2(2).
    pub fn exists(&self, id: &LayerId) -> Result<bool> {
        Ok(self.find(id)?.is_some())
    }

    /// Returns the layers of the home and the image store, sorted; not those of additional stores.
    ///
    /// # Errors
    /// Those of getdents64(2).
    pub fn list(&self) -> Result<Vec<LayerId>> {
        let mut all = Vec::new();
        for home in self.writable_homes() {
            all.extend(home.list()?);
        }
        all.sort();
        all.dedup();
        Ok(all)
    }

    /// Returns what engines show of a driver: names and values.
    ///
    /// # Errors
    /// As [`Store::probe`].
    pub fn status(&self) -> Result<Vec<(String, String)>> {
        let home = self.home();
        let probe = self.probe(false)?;
        let choice = self.choose(&probe, false, None)?;
        let kernel = choice.backend == Some(Backend::Kernel);
        let truth = |truth: bool| truth.to_string();
        Ok([
            ("Driver", home.variant().name().to_owned()),
            ("Home", show_path(home.path())),
            ("Backing Filesystem", probe.filesystem.clone()),
            ("Mounts By", choice.backend.as_ref().map_or("nobody", Backend::name).to_owned()),
            ("Supports d_type", truth(!kernel || probe.holds("d_type"))),
            ("Native Overlay Diff", truth(kernel && probe.holds("native-diff"))),
            ("Using metacopy", truth(kernel && probe.holds("metacopy"))),
            ("Supports shifting", truth(supports_shifting(&probe, &choice))),
            ("Supports volatile", truth(!kernel || probe.holds("volatile"))),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .to_vec())
    }

    /// Returns the paths of a layer.
    ///
    /// # Errors
    /// `NoSuchLayer`, and as [`Store::lowers`].
    pub fn metadata(&self, id: &LayerId) -> Result<Metadata> {
        let found = self.get_layer(id)?;
        let path = |name: &[u8]| found.home.join(&[id.bytes(), name]);
        let lowers = self.lowers(&found, id)?;
        Ok(Metadata {
            upper: path(DIFF),
            work: path(WORK),
            merged: self.mountpoint(&found, id)?,
            lowers: lowers.iter().map(|lower| lower.home.join(&[lower.id.bytes(), DIFF])).collect(),
        })
    }

    /// Returns where a layer is mounted, or would be.
    ///
    /// An engine that ends unmounts the home with all that is in it, unless a layer is mounted that
    /// its records name. So those that they do not name are mounted in the run home, but with
    /// `skip_mount_home`, which engines are told as well.
    ///
    /// # Errors
    /// Those of reading the mount table and the records.
    pub fn mountpoint(&self, found: &Found<'_>, id: &LayerId) -> Result<PathBuf> {
        let beside = self.merged_path(found, id);
        if !found.is_own || found.home.variant() == Variant::Docker {
            return Ok(beside);
        }
        let table = mountinfo::load()?;
        let apart = self.merged_apart(id);
        for path in [&beside, &apart] {
            if mountinfo::find_top(&table, path).is_some() {
                return Ok(path.clone());
            }
        }
        let has_copy = || flat::find(&found.dir).at("read", || found.home.show(id));
        if self.options.skip_mount_home || self.is_recorded(id)? || has_copy()?.is_some() {
            return Ok(beside);
        }
        Ok(apart)
    }

    fn merged_apart(&self, id: &LayerId) -> PathBuf {
        self.run_home.join(id.as_str()).join("merged")
    }

    /// Returns where a layer is mounted by engines: beside its content, or in the run home if that
    /// cannot be written.
    pub fn merged_path(&self, found: &Found<'_>, id: &LayerId) -> PathBuf {
        if found.is_own { found.home.join(&[id.bytes(), MERGED]) } else { self.merged_apart(id) }
    }

    /// Returns in which form whiteouts are to be written.
    ///
    /// # Errors
    /// Those of reading the flag of the store.
    pub fn whiteouts(&self) -> Result<Whiteouts> {
        let files = self.options.mount_program.is_some() || self.has_program_flag()?;
        Ok(if files { Whiteouts::Files } else { Whiteouts::Kernel })
    }

    /// Returns whether a mount program wrote into the store, as far as its flag knows.
    ///
    /// # Errors
    /// Those of reading it.
    pub fn has_program_flag(&self) -> Result<bool> {
        let flag = read_small(self.home().dir(), PROGRAM_FLAG)
            .at("read", || show_path(&self.home().join(&[PROGRAM_FLAG])))?;
        Ok(flag.is_some_and(|text| text.trim_ascii() == b"true"))
    }

    /// Fails if a layer beneath the home is the parent of another.
    fn refuse_with_children(&self, home: &Home, id: &LayerId, dir: &OwnedFd) -> Result<()> {
        let link = link::of_layer(dir, &home.show(id))?;
        let first = |text: &[u8]| text.split(|&byte| byte == b':').next().map(<[u8]>::to_vec);
        let by_id = id.bytes().to_vec();
        let by_link = link.map(|link| format!("{}/{link}", layout::LINK_DIR).into_bytes());
        let mut looked_at = HashSet::new();
        for home in self.writable_homes() {
            for child in home.list()? {
                let Some(layer) = home.layer(&child)? else { continue };
                let read =
                    |name: &[u8]| read_small(layer.as_fd(), name).at("read", || home.show(&child));
                // The older of the two files is in every store; the newer one is needed without it.
                let is_child = match read(LOWER)? {
                    Some(text) => first(&text) == by_link && by_link.is_some(),
                    None => read(LOWER_LAYERS)?
                        .is_some_and(|text| first(&text).as_ref() == Some(&by_id)),
                };
                if is_child && looked_at.insert(child.clone()) {
                    return Err(has_child(id, &child));
                }
            }
        }
        Ok(())
    }
}

/// Fails for a store that another driver keeps.
fn refuse_others(config: &StoreConfig) -> Result<()> {
    if config.variant.has_links() {
        let home = Home::open(&config.root, config.variant)?;
        return match home {
            Some(home) if home.links()?.is_none() && overlay1::is_one(&home)? => {
                Err(Error::invalid(
                    format!("root {}", show_path(&config.root)),
                    "holds a store of old Docker; use --driver overlay1",
                ))
            }
            _ => Ok(()),
        };
    }
    Err(Error::invalid(
        format!("driver {}", config.variant.name()),
        "cannot do this; lamina store migrate makes an overlay or overlay2 store of it",
    ))
}

/// Returns whether a mount can show other ids than the layers have.
pub fn supports_shifting(probe: &Probe, choice: &Choice) -> bool {
    let disabled = std::env::var_os("_CONTAINERS_OVERLAY_DISABLE_IDMAP");
    if disabled.is_some_and(|value| value == "yes") {
        return false;
    }
    match choice.backend {
        Some(Backend::Kernel) => probe.holds("idmapped-lowers") || probe.holds("fuse"),
        Some(Backend::Fuse | Backend::Program(_)) => true,
        Some(Backend::Flat) | None => false,
    }
}

/// Returns the name of a filesystem by its number in statfs(2), or the number.
pub fn fs_name(magic: i64) -> String {
    let name = match magic {
        0xef53 => "extfs",
        0x5846_5342 => "xfs",
        0x9123_683e => "btrfs",
        0x0102_1994 => "tmpfs",
        0x794c_7630 => "overlayfs",
        0x2fc1_2fc1 => "zfs",
        0xf2f5_2010 => "f2fs",
        0x6969 => "nfs",
        0xff53_4d42 | 0xfe53_4d42 => "cifs",
        0x6573_5546 => "fuse",
        0xf15f => "ecryptfs",
        0xca45_1a4e => "bcachefs",
        _ => return format!("{magic:#x}"),
    };
    name.to_owned()
}
