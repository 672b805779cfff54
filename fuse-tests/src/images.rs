//! Lower layers in images: filesystems that are only read, and such as have no xattrs, ACLs, owners or links.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::mount::UnmountFlags;

use crate::case::said;
use crate::env;
use crate::fixture::Sandbox;
use crate::ops::Verb;

/// A kind of image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Image {
    /// squashfs.
    Squashfs,
    /// squashfs without a table of xattrs, which then are not supported.
    SquashfsWithoutXattrs,
    /// EROFS.
    Erofs,
    /// EROFS mounted without ACLs and xattrs of users.
    ErofsWithoutAcls,
    /// vfat: no owners, modes, links, special files or xattrs.
    Vfat,
}

const SQUASHFS: &[&str] = &["-quiet", "-no-progress"];

impl Image {
    /// Why images of this kind cannot be made or mounted here, if so: tried with an empty one.
    pub fn missing(self) -> Option<String> {
        // Without the paths.
        let last = |why: &str| why.lines().next()?.rsplit(": ").next().map(str::to_owned);
        let why = self.with_empty(|_| ()).err()?;
        Some(format!("{self:?} cannot be made and mounted: {}", last(&why).unwrap_or(why)))
    }

    /// Whether the kernel tells the UUID of such an image.
    pub fn tells_uuid(self) -> bool {
        self.with_empty(|dir| env::filesystem_uuid(dir).is_some()) == Ok(true)
    }

    fn with_empty<T>(self, look: impl FnOnce(&Path) -> T) -> Result<T, String> {
        let sandbox = Sandbox::new();
        let tree = sandbox.root().join("tree");
        fs::create_dir(&tree).unwrap();
        let seen = self.mount_over(&tree).map(|()| look(&tree));
        unmount(&tree);
        seen
    }

    /// Without one the kernel has no index over several layers, and does not write where copies come from.
    pub fn has_uuid(self) -> bool {
        !matches!(self, Image::Squashfs | Image::SquashfsWithoutXattrs)
    }

    /// Operations that the kernel refuses on objects that are lower yet: it asks the lower filesystem whether it takes ACLs,
    /// which those that are only read do not.
    pub fn cannot(self) -> &'static [Verb] {
        match self {
            Image::Vfat => &[],
            _ => &[Verb::setacl],
        }
    }

    /// Packs a tree and mounts the image over it.
    ///
    /// # Errors
    /// What the program that failed said.
    fn mount_over(self, tree: &Path) -> Result<(), String> {
        let image = &tree.with_extension("img");
        match self {
            Image::Squashfs => run("mksquashfs", &[tree, image], SQUASHFS),
            Image::SquashfsWithoutXattrs => {
                run("mksquashfs", &[tree, image], &[SQUASHFS, &["-no-xattrs"]].concat())
            }
            Image::Erofs | Image::ErofsWithoutAcls => {
                run("mkfs.erofs", &[image, tree], &["--quiet"])
            }
            Image::Vfat => {
                // Sparse.
                let sized = fs::File::create(image).and_then(|file| file.set_len(64 << 20));
                sized.map_err(|e| e.to_string())?;
                run("mkfs.vfat", &[image], &[])?;
                let fill = &tree.with_extension("fill");
                fs::create_dir(fill).map_err(|e| e.to_string())?;
                run("mount", &[image, fill], &["-t", "vfat", "-o", "loop"])?;
                let copied = run("cp", &[tree, fill], &["-rT"]);
                run("umount", &[fill], &[])?;
                copied
            }
        }?;
        let (kind, options) = match self {
            Image::Squashfs | Image::SquashfsWithoutXattrs => ("squashfs", "loop,ro"),
            Image::Erofs => ("erofs", "loop,ro"),
            Image::ErofsWithoutAcls => ("erofs", "loop,ro,noacl,nouser_xattr"),
            Image::Vfat => ("vfat", "loop,ro"),
        };
        run("mount", &[image, tree], &["-t", kind, "-o", options])
    }
}

fn run(program: &str, at: &[&Path], arguments: &[&str]) -> Result<(), String> {
    let out = Command::new(program).args(at).args(arguments).output();
    let out = out.map_err(|e| format!("{program}: {e}"))?;
    if out.status.success() { Ok(()) } else { Err(format!("{program}: {}", said(&out))) }
}

fn unmount(path: &Path) {
    if env::mounts_below(path).iter().any(|mount| mount == path) {
        let _ = rustix::mount::unmount(path, UnmountFlags::DETACH);
    }
}

/// Layers of a sandbox that are covered by images of themselves until this is dropped.
#[derive(Debug)]
pub struct Packed<'a> {
    sandbox: &'a Sandbox,
    layers: Vec<PathBuf>,
}

impl<'a> Packed<'a> {
    /// Packs layers, which no mount uses yet.
    ///
    /// # Panics
    /// If an image cannot be made or mounted.
    pub fn new(sandbox: &'a Sandbox, layers: &[PathBuf], image: Image) -> Packed<'a> {
        let mut packed = Packed { sandbox, layers: Vec::new() };
        for layer in layers {
            packed.layers.push(layer.clone());
            image.mount_over(layer).unwrap_or_else(|why| panic!("{image:?}: {why}"));
        }
        packed
    }
}

impl Drop for Packed<'_> {
    fn drop(&mut self) {
        // Mounts have looked at the layers when they ended; what lies under the images is something else.
        self.sandbox.forget_seals();
        self.layers.iter().for_each(|layer| unmount(layer));
    }
}
