//! Lower layers whose ids the kernel maps, in one mount for all that lie side by side.
//!
//! Layers of a store are `HOME/ID/diff`. One mount of `HOME` that nobody sees is given the map, and
//! each layer is opened anew in it: a mount for each layer would cost its making, and more its end.
//! What is not found there as it is (a symlink, another mount) has a mount of its own.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, openat};

use super::kernel::LayerDir;
use crate::error::{Context, Errno, Result};
use crate::options::show_path;
use crate::sys::{mountfd, stat};

/// Mounts that hold layers; the kernel takes a layer only while its mount is held.
#[derive(Debug)]
pub struct Shifted(
    #[allow(dead_code, reason = "held, not read")] BTreeMap<PathBuf, Option<OwnedFd>>,
);

/// Opens `layers` anew with their ids mapped as `namespace` says.
///
/// # Errors
/// `EINVAL` where the filesystem cannot; `EPERM` without `CAP_SYS_ADMIN` over the filesystem.
pub fn shift(layers: &mut [LayerDir], namespace: BorrowedFd<'_>) -> Result<Shifted> {
    let mut trees: BTreeMap<PathBuf, Option<OwnedFd>> = BTreeMap::new();
    for layer in layers {
        let mut inside = None;
        if let Some((home, name)) = split(&layer.path) {
            if !trees.contains_key(home) {
                let tree = tree(home, namespace).at("mount_setattr", || show_path(home))?;
                // A home that was moved since the layer was opened is another one.
                let tree = is_inside(&tree, name, &layer.dir).then_some(tree);
                trees.insert(home.to_owned(), tree);
            }
            let tree = trees.get(home).and_then(Option::as_ref);
            inside = tree.and_then(|tree| mountfd::open_inside(tree.as_fd(), name).ok());
        }
        layer.dir = match inside {
            Some(dir) => dir,
            None => mountfd::idmapped(layer.dir.as_fd(), namespace)
                .at("mount_setattr", || show_path(&layer.path))?,
        };
    }
    Ok(Shifted(trees))
}

/// Splits `HOME/ID/diff` into `HOME` and `ID/diff`.
fn split(path: &Path) -> Option<(&Path, &[u8])> {
    let home = path.parent()?.parent()?;
    Some((home, path.strip_prefix(home).ok()?.as_os_str().as_bytes()))
}

fn tree(home: &Path, namespace: BorrowedFd<'_>) -> std::result::Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let home = openat(CWD, home, flags, Mode::empty())?;
    mountfd::idmapped(home.as_fd(), namespace)
}

/// Returns whether `dir` is what the mount `tree` has at `path`.
fn is_inside(tree: &OwnedFd, path: &[u8], dir: &OwnedFd) -> bool {
    let identity = |dir: &OwnedFd| stat::of(dir).map(|stat| (stat::device(&stat), stat.stx_ino));
    mountfd::open_inside(tree.as_fd(), path)
        .and_then(|inside| Ok(identity(&inside)? == identity(dir)?))
        .unwrap_or(false)
}
