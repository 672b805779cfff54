//! Layers where nothing can be mounted: a complete copy of what a layer shows stands at its
//! mountpoint, and what was changed in it goes back into the layer at the end.
//!
//! The copy is made in a temporary directory and published by one rename; so is the new content of
//! the layer. `ID/flat` says which directory is the copy: it is there before the copy is, and until
//! the copy is gone, so that a copy that outlives a boot is known. It also says from when to when
//! the copy may have changes: whoever finds it at another time throws it away. Copies never share inodes with
//! layers: nobody could keep a user from writing to them.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::RenameFlags;
use serde::{Deserialize, Serialize};

use super::layout::{DIFF, LayerId, MERGED, Variant, WORK, read_small, replace_small};
use super::stage::TempDir;
use super::{Content, Found, Store, Whiteouts, contents};
use crate::archive::flat::{self, Options};
use crate::archive::view::Stack;
use crate::error::{Context, Errno, Error, Result};
use crate::sys;
use crate::sys::name::At;

/// File of a layer with what is known of its copy.
const MARK: &[u8] = b"flat";

/// What is known of the copy of a layer.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Flat {
    /// Inode number of its root; that of anything else is not it.
    inode: u64,
    /// Changes are thrown away.
    pub read_only: bool,
    /// Changes need not survive a crash of the machine.
    volatile: bool,
    /// Whether it may have changes: not before it is whole, nor when they are in the layer.
    is_used: bool,
}

/// Returns the copy that stands at the mountpoint of a layer.
///
/// # Errors
/// Those of openat(2), read(2) and statx(2).
pub fn find(layer: &OwnedFd) -> std::result::Result<Option<Flat>, Errno> {
    let Some(text) = read_small(layer.as_fd(), MARK)? else { return Ok(None) };
    // It is replaced whole; what cannot be read is not ours.
    let Ok(flat) = serde_json::from_slice::<Flat>(&text) else { return Ok(None) };
    match sys::stat::find(layer.as_fd(), MERGED) {
        Ok(stat) => Ok(stat.is_some_and(|stat| stat.stx_ino == flat.inode).then_some(flat)),
        Err(Errno::NOTCONN | Errno::CONNABORTED) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// The layers of a copy, and what is asked of it.
#[derive(Debug)]
pub struct Wanted {
    /// Content of the layer.
    pub diff: Content,
    /// What lies beneath, topmost first.
    pub lowers: Vec<Content>,
    /// Changes are thrown away.
    pub read_only: bool,
    /// Changes need not survive a crash of the machine.
    pub volatile: bool,
}

impl Store {
    /// Puts a copy of what a layer shows at its empty mountpoint.
    ///
    /// # Errors
    /// `Unsupported` for a layer of another store, or where directories cannot be exchanged; those
    /// of copying.
    /// # Locks
    /// With the layer's held.
    /// # Crash
    /// Leaves a temporary directory, and a mark of what is not there, which says nothing.
    pub(super) fn make_flat(&self, found: &Found<'_>, id: &LayerId, wanted: Wanted) -> Result<()> {
        let unsupported = |why: &str| Error::Unsupported { feature: format!("{id}: {why}").into() };
        if !found.is_own {
            return Err(unsupported(
                "lies in an image store and would have to be copied into the run home; mount a \
                 layer made on it",
            ));
        }
        let layer = &found.dir;
        let at = || found.home.show(id);
        let is_link = sys::name::readlink(At::new(layer.as_fd(), DIFF)).is_ok();
        if is_link && !wanted.read_only {
            return Err(unsupported(
                "has its content in an additional layer store; mount it with --read-only",
            ));
        }
        refuse_files(layer).at("mkdirat", || {
            format!("{}/merged: files lie at the mountpoint", found.home.show(id))
        })?;
        let temp = TempDir::new(found.home)?;
        sys::name::mkdir(At::new(temp.dir().as_fd(), MERGED), 0o700).at("mkdirat", at)?;
        let root = sys::open::directory(temp.dir().as_fd(), MERGED).at("open", at)?;
        let inode = sys::stat::of(&root).at("statx", at)?.stx_ino;
        let all = std::iter::once(wanted.diff).chain(wanted.lowers);
        if let Some(shown) = stack(all)?.root() {
            let to = sys::open::directory(temp.dir().as_fd(), MERGED).at("open", at)?;
            let path = self.merged_path(found, id);
            flat::copy(&shown, to, path, self.flat_options()?)?;
        }
        if !wanted.volatile && !wanted.read_only {
            // Half a copy would come back as changes.
            sys::data::sync_filesystem(root.as_fd()).at("syncfs", at)?;
        }
        let (read_only, volatile) = (wanted.read_only, wanted.volatile);
        let flat = Flat { inode, read_only, volatile, is_used: false };
        put_mark(layer, &flat).at("write", at)?;
        // What can be exchanged now can be exchanged when changes go back.
        let flags = if read_only { RenameFlags::empty() } else { RenameFlags::EXCHANGE };
        let staged = At::new(temp.dir().as_fd(), MERGED);
        move_dir(staged, At::new(layer.as_fd(), MERGED), flags).at("renameat2", at)?;
        put_mark(layer, &Flat { is_used: true, ..flat }).at("write", at)?;
        temp.remove()
    }

    /// Takes the changes of a copy into the layer, unless it is only read, and the copy away.
    ///
    /// # Errors
    /// Those of reading the copy and making the new content; then all stays as it is.
    /// # Locks
    /// With the layer's held.
    /// # Crash
    /// Leaves a temporary directory, and the copy, whose changes are found again.
    pub(super) fn take_flat(&self, found: &Found<'_>, id: &LayerId, flat: &Flat) -> Result<()> {
        let layer = &found.dir;
        let at = || found.home.show(id);
        let temp = TempDir::new(found.home)?;
        let dir = temp.dir().as_fd();
        let old = sys::stat::at(layer.as_fd(), MERGED).at("statx", at)?;
        let has_changes = flat.is_used && !flat.read_only;
        if has_changes {
            sys::name::mkdir(At::new(dir, DIFF), 0o700).at("mkdirat", at)?;
            let diff = sys::open::directory(dir, DIFF).at("open", at)?;
            self.fill_diff(found, id, diff)?;
            if !flat.volatile {
                sys::data::sync_filesystem(layer.as_fd()).at("syncfs", at)?;
            }
            let exchange = RenameFlags::EXCHANGE;
            move_dir(At::new(dir, DIFF), At::new(layer.as_fd(), DIFF), exchange)
                .at("renameat2", at)?;
            // It may refer to the content that was there until now.
            sys::tree::remove(layer.as_fd(), WORK).at("unlinkat", at)?;
            put_mark(layer, &Flat { is_used: false, ..flat.clone() }).at("write", at)?;
        }
        let make = |name: &[u8]| {
            sys::name::mkdir(At::new(layer.as_fd(), name), 0o700)?;
            let (uid, gid) = (Some(old.stx_uid), Some(old.stx_gid));
            sys::name::chown(At::new(layer.as_fd(), name), uid, gid)
        };
        if has_changes {
            make(WORK).at("mkdirat", at)?;
        }
        let none = RenameFlags::empty();
        move_dir(At::new(layer.as_fd(), MERGED), At::new(dir, MERGED), none).at("renameat", at)?;
        if found.home.variant() == Variant::Containers {
            make(MERGED).at("mkdirat", at)?;
        }
        drop_mark(layer).at("unlinkat", at)?;
        sys::data::sync(layer.as_fd(), false).at("fsync", at)?;
        temp.remove()
    }

    fn fill_diff(&self, found: &Found<'_>, id: &LayerId, diff: OwnedFd) -> Result<()> {
        let at = || found.home.show(id);
        let merged = self.merged_path(found, id);
        let copy = sys::open::directory(found.dir.as_fd(), MERGED).at("open", at)?;
        let Some(copy) = Stack::new([(copy, merged)])?.root() else { return Ok(()) };
        let mut beneath = contents(found.home, id, &found.dir)?;
        beneath.remove(0);
        beneath.extend(self.lower_contents(found, id)?);
        let path = found.home.join(&[id.bytes(), DIFF]);
        let beneath = stack(beneath)?.root();
        flat::changes(beneath.as_ref(), &copy, diff, path, self.flat_options()?)
    }

    fn flat_options(&self) -> Result<Options> {
        Ok(Options {
            ignore_chown_errors: self.options().ignore_chown_errors,
            whiteout_files: self.whiteouts()? == Whiteouts::Files,
            hard_links: false,
        })
    }
}

/// Fails with `ENOTEMPTY` if something lies at the mountpoint, which would be lost.
fn refuse_files(layer: &OwnedFd) -> std::result::Result<(), Errno> {
    let merged = sys::open::directory(layer.as_fd(), MERGED)?;
    sys::name::list(merged.as_fd(), |_, _, _| Err(Errno::NOTEMPTY))
}

/// Writes what is known of a copy, for good.
fn put_mark(layer: &OwnedFd, flat: &Flat) -> std::result::Result<(), Errno> {
    let text = serde_json::to_vec(flat).map_err(|_never| Errno::INVAL)?;
    replace_small(layer.as_fd(), MARK, &text, 0o600)
}

/// Renames a directory, which keeps its times: xfs changes them where two are exchanged.
fn move_dir(from: At<'_>, to: At<'_>, flags: RenameFlags) -> std::result::Result<(), Errno> {
    let before = flat::times(&sys::stat::at(from.dir, from.name)?);
    lend_and_rename(from, to, flags)?;
    let now = flat::times(&sys::stat::at(to.dir, to.name)?);
    if now.last_modification == before.last_modification {
        return Ok(());
    }
    sys::name::set_times(to, &before)
}

/// Renames a directory. Whoever is not privileged needs write permission for its `..`: a mode
/// without it is lent that, and is as it was afterwards.
fn lend_and_rename(from: At<'_>, to: At<'_>, flags: RenameFlags) -> std::result::Result<(), Errno> {
    match sys::name::rename(from, to, flags) {
        Err(Errno::ACCESS) => (),
        done => return done,
    }
    let lend = |at: At<'_>| {
        let handle = sys::open::handle(at.dir, at.name)?;
        let mode = u32::from(sys::stat::of(&handle)?.stx_mode);
        sys::name::chmod_handle(&handle, mode | 0o200)?;
        Ok((handle, mode))
    };
    let mut lent = vec![lend(from)?];
    if flags.contains(RenameFlags::EXCHANGE) {
        lent.push(lend(to)?);
    }
    let done = sys::name::rename(from, to, flags);
    for (handle, mode) in &lent {
        sys::name::chmod_handle(handle, *mode)?;
    }
    done
}

/// Forgets a copy that is not there.
///
/// # Errors
/// Those of unlinkat(2).
pub fn drop_mark(layer: &OwnedFd) -> std::result::Result<(), Errno> {
    match sys::name::unlink(At::new(layer.as_fd(), MARK)) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(errno),
    }
}

fn stack(contents: impl IntoIterator<Item = Content>) -> Result<Stack> {
    Stack::new(contents.into_iter().map(|content| (content.dir, content.path)))
}
