//! Who serves the mount of a layer, and how he is called: kernel overlayfs, our own server, a mount
//! program, or nobody, where a copy is made.
//!
//! What is needed is gathered first ([`Plan`]), which may take other locks; carrying it out takes
//! none. With the lock of the layer held.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use super::driver::no_such;
use super::flat::Wanted;
use super::layout::{Home, LayerId, PROGRAM_FLAG, Variant, WORK, find_dir, replace_small};
use super::mounts::MountRequest;
use super::probe::Backend;
use super::{Content, Found, Store, contents, empty_lower};
use crate::error::{Context, Errno, Error, Result};
use crate::mount::kernel::{self, LayerDir, Overlay};
use crate::mount::program::{self, Served};
use crate::mount::shifted::shift;
use crate::options::show_path;
use crate::sys;
use crate::sys::name::At;
use crate::sys::userns::{self, Maps};

/// Place of the kernel's mark of a volatile upper in a work directory.
const VOLATILE: [&[u8]; 2] = [b"work", b"incompat"];

/// All that a mount needs.
#[derive(Debug)]
pub(super) struct Plan {
    /// Who serves.
    pub backend: Backend,
    /// Whether nothing may be changed through it.
    pub read_only: bool,
    diff: Content,
    lowers: Vec<Content>,
    options: Vec<String>,
    maps: Option<Maps>,
}

impl Store {
    /// Gathers what the mount of a layer needs.
    ///
    /// # Errors
    /// `Unsupported` if nobody can serve; `Corrupt` for a damaged layer.
    /// # Locks
    /// The store's, where a symlink was lost.
    pub(super) fn plan_mount(
        &self,
        found: &Found<'_>,
        id: &LayerId,
        request: &MountRequest,
        read_only: bool,
    ) -> Result<Plan> {
        let mut own = contents(found.home, id, &found.dir)?.into_iter();
        let Some(diff) = own.next() else {
            return Err(no_such(id));
        };
        let mut lowers: Vec<Content> = own.collect();
        lowers.extend(self.lower_contents(found, id)?);
        if lowers.is_empty() {
            lowers.push(empty_lower(found.home, id, &found.dir)?);
        }
        let probe = self.probe(false)?;
        let choice = self.choose(&probe, request.maps.is_some(), request.backend.clone())?;
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
        let read_only = read_only || options.iter().any(|option| option == "ro");
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
            let other_ids = "give them those owners for good: lamina layer update-id-map";
            refuse_for_flat(id, request, self.options().force_mask.is_some(), other_ids)?;
        }
        let maps = request.maps.clone();
        Ok(Plan { backend, read_only, diff, lowers, options, maps })
    }

    /// Mounts a layer as planned.
    ///
    /// # Errors
    /// What kernel, server or copying say.
    pub(super) fn carry_out(
        &self,
        found: &Found<'_>,
        id: &LayerId,
        merged: &Path,
        plan: Plan,
    ) -> Result<()> {
        let Plan { backend, read_only, diff, lowers, mut options, maps } = plan;
        if backend == Backend::Flat {
            let volatile = options.iter().any(|option| option == "volatile");
            return self.make_flat(found, id, Wanted { diff, lowers, read_only, volatile });
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
                layers.mount_kernel(work, &options, maps.as_ref(), merged)
            }
            Backend::Fuse | Backend::Program(_) | Backend::Flat => {
                if let Some(maps) = &maps {
                    options.extend(map_options(maps));
                }
                if self.options().force_mask.is_some() {
                    options.push("xattr_permissions=2".to_owned());
                }
                if let Backend::Program(_) = backend {
                    self.flag_program()?;
                }
                let work = found.home.join(&[id.bytes(), WORK]);
                layers.mount_served(&backend, &work, &options, merged, found.home.path())
            }
        }
    }

    /// Says on disk that a mount program wrote into the store.
    fn flag_program(&self) -> Result<()> {
        if self.has_program_flag()? {
            return Ok(());
        }
        let home = self.home();
        replace_small(home.dir(), PROGRAM_FLAG, b"true", 0o600)
            .at("write", || show_path(&home.join(&[PROGRAM_FLAG])))
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
        let _held = match maps {
            Some(maps) => Some(shift(&mut lowers, userns::with_maps(maps)?.as_fd())?),
            None => None,
        };
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

/// Fails for what only a mount can do; `other_ids` is what else shows other ids.
pub(super) fn refuse_for_flat(
    id: &LayerId,
    request: &MountRequest,
    has_force_mask: bool,
    other_ids: &str,
) -> Result<()> {
    let (what, instead) = match request {
        _ if has_force_mask => ("force_mask", "leave it out, in a store of its own"),
        MountRequest { maps: Some(_), .. } => ("shown ids that the layers do not have", other_ids),
        MountRequest { label: Some(_), .. } => {
            ("a label", "mount it without, and label the copy: chcon -R")
        }
        _ => return Ok(()),
    };
    Err(Error::Unsupported {
        feature: format!(
            "{id}: {what}: needs a mount, and this is a copy; {instead}; or see by lamina store \
             probe what mounts need"
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
    let Some(mut dir) = find_dir(layer.as_fd(), WORK)? else { return Ok(()) };
    for name in VOLATILE {
        match find_dir(dir.as_fd(), name)? {
            Some(below) => dir = below,
            None => return Ok(()),
        }
    }
    sys::tree::remove(dir.as_fd(), b"volatile")
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
