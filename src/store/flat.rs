//! Layers where nothing can be mounted: a complete copy of what a layer shows stands at its
//! mountpoint, and what was changed in it goes back into the layer at the end.
//!
//! The copy is made in a temporary directory and published by one rename; so is the new content of
//! the layer. `ID/flat` says which directory is the copy: it is there before the copy is, and until
//! the copy is gone, so that a copy that outlives a boot is known. It also says from when to when
//! the copy may have changes: whoever finds it at another time throws it away. Copies never share inodes with
//! layers: nobody could keep a user from writing to them.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use rustix::fs::RenameFlags;
use serde::{Deserialize, Serialize};

use super::layout::{
    DIFF, Home, LayerId, MERGED, Variant, WORK, read_small, renew_work, replace_small,
};
use super::stage::TempDir;
use super::{Content, Found, Store, Whiteouts, contents};
use crate::archive::flat::{self, Options};
use crate::archive::view::Stack;
use crate::error::{Context, Errno, Error, Result};
use crate::options::show_path;
use crate::sys;
use crate::sys::name::At;

/// File of a layer with what is known of its copy.
pub(super) const MARK: &[u8] = b"flat";

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

/// Where the parts of a layer lie that a copy concerns.
#[derive(Clone, Debug)]
pub(super) struct Place<'a> {
    /// The store, for temporary directories.
    pub home: &'a Home,
    /// The file with what is known of the copy.
    pub mark: At<'a>,
    /// What the layer holds, which a copy that was changed becomes.
    pub content: At<'a>,
    /// The same, for messages.
    pub content_path: PathBuf,
    /// Where the copy stands.
    pub merged: At<'a>,
    /// The same, for messages.
    pub merged_path: PathBuf,
    /// A work directory, which may refer to the content.
    pub work: Option<At<'a>>,
    /// Mode of the empty mountpoint that stays when the copy is gone, if one stays.
    pub merged_mode: Option<u32>,
    /// How changes are kept.
    pub options: Options,
}

/// Returns the copy that stands at the mountpoint of a layer of [`Store`].
///
/// # Errors
/// Those of openat(2), read(2) and statx(2).
pub fn find(layer: &OwnedFd) -> std::result::Result<Option<Flat>, Errno> {
    find_at(At::new(layer.as_fd(), MARK), At::new(layer.as_fd(), MERGED))
}

/// Forgets a copy of a layer of [`Store`] that is not there.
///
/// # Errors
/// Those of unlinkat(2).
pub fn forget(layer: &OwnedFd) -> std::result::Result<(), Errno> {
    drop_mark(At::new(layer.as_fd(), MARK))
}

fn find_at(mark: At<'_>, merged: At<'_>) -> std::result::Result<Option<Flat>, Errno> {
    let Some(text) = read_small(mark.dir, mark.name)? else { return Ok(None) };
    // It is replaced whole; what cannot be read is not ours.
    let Ok(flat) = serde_json::from_slice::<Flat>(&text) else { return Ok(None) };
    match sys::stat::find(merged.dir, merged.name) {
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
    /// Returns where the parts of a layer lie; `layer` is its directory.
    pub(super) fn flat_place<'a>(
        &self,
        found: &'a Found<'_>,
        id: &LayerId,
        options: Options,
    ) -> Place<'a> {
        let at = |name: &'static [u8]| At::new(found.dir.as_fd(), name);
        Place {
            home: found.home,
            mark: at(MARK),
            content: at(DIFF),
            content_path: found.home.join(&[id.bytes(), DIFF]),
            merged: at(MERGED),
            merged_path: self.merged_path(found, id),
            work: Some(at(WORK)),
            merged_mode: (found.home.variant() == Variant::Containers).then_some(0o700),
            options,
        }
    }

    /// Puts a copy of what a layer shows at its empty mountpoint.
    ///
    /// # Errors
    /// `Unsupported` for a layer of another store; as [`Place::make`].
    /// # Locks
    /// With the layer's held.
    pub(super) fn make_flat(&self, found: &Found<'_>, id: &LayerId, wanted: Wanted) -> Result<()> {
        let unsupported = |why: &str| Error::Unsupported { feature: format!("{id}: {why}").into() };
        if !found.is_own {
            return Err(unsupported(
                "lies in an image store and would have to be copied into the run home; mount a \
                 layer made on it",
            ));
        }
        let is_link = sys::name::readlink(At::new(found.dir.as_fd(), DIFF)).is_ok();
        if is_link && !wanted.read_only {
            return Err(unsupported(
                "has its content in an additional layer store; mount it with --read-only",
            ));
        }
        self.flat_place(found, id, self.flat_options()?).make(wanted)
    }

    /// Takes the changes of a copy into the layer, and the copy away; as [`Place::take`].
    ///
    /// # Errors
    /// As [`Place::take`].
    /// # Locks
    /// With the layer's held.
    pub(super) fn take_flat(&self, found: &Found<'_>, id: &LayerId, flat: &Flat) -> Result<()> {
        self.flat_place(found, id, self.flat_options()?).take(flat, || {
            let mut beneath = contents(found.home, id, &found.dir)?;
            beneath.remove(0);
            beneath.extend(self.lower_contents(found, id)?);
            Ok(beneath)
        })
    }

    fn flat_options(&self) -> Result<Options> {
        Ok(Options {
            ignore_chown_errors: self.options().ignore_chown_errors,
            whiteout_files: self.whiteouts()? == Whiteouts::Files,
            hard_links: false,
        })
    }
}

impl Place<'_> {
    fn shown(&self) -> String {
        show_path(&self.merged_path)
    }

    /// Returns the copy that stands there.
    ///
    /// # Errors
    /// Those of openat(2), read(2) and statx(2).
    pub(super) fn find(&self) -> Result<Option<Flat>> {
        find_at(self.mark, self.merged).at("read", || self.shown())
    }

    /// Puts a copy of what a layer shows at its empty mountpoint.
    ///
    /// # Errors
    /// Those of copying; `EINVAL` where directories cannot be exchanged.
    /// # Locks
    /// With the layer's held.
    /// # Crash
    /// Leaves a temporary directory, and a mark of what is not there, which says nothing.
    pub(super) fn make(&self, wanted: Wanted) -> Result<()> {
        let at = || self.shown();
        refuse_files(self.merged)
            .at("mkdirat", || format!("{}: files lie at the mountpoint", self.shown()))?;
        let temp = TempDir::new(self.home)?;
        sys::name::mkdir(At::new(temp.dir().as_fd(), MERGED), 0o700).at("mkdirat", at)?;
        let root = sys::open::directory(temp.dir().as_fd(), MERGED).at("open", at)?;
        let inode = sys::stat::of(&root).at("statx", at)?.stx_ino;
        let all = std::iter::once(wanted.diff).chain(wanted.lowers);
        if let Some(shown) = stack(all)?.root() {
            let to = sys::open::directory(temp.dir().as_fd(), MERGED).at("open", at)?;
            flat::copy(&shown, to, self.merged_path.clone(), self.options)?;
        }
        if !wanted.volatile && !wanted.read_only {
            // Half a copy would come back as changes.
            sys::data::sync_filesystem(root.as_fd()).at("syncfs", at)?;
        }
        let (read_only, volatile) = (wanted.read_only, wanted.volatile);
        let flat = Flat { inode, read_only, volatile, is_used: false };
        put_mark(self.mark, &flat).at("write", at)?;
        // What can be exchanged now can be exchanged when changes go back.
        let flags = if read_only { RenameFlags::empty() } else { RenameFlags::EXCHANGE };
        let staged = At::new(temp.dir().as_fd(), MERGED);
        move_dir(staged, self.merged, flags).at("renameat2", at)?;
        put_mark(self.mark, &Flat { is_used: true, ..flat }).at("write", at)?;
        temp.remove()
    }

    /// Takes the changes of a copy into the layer, unless it is only read, and the copy away.
    /// `beneath` opens what lies beneath the layer's content.
    ///
    /// # Errors
    /// Those of reading the copy and making the new content; then all stays as it is.
    /// # Locks
    /// With the layer's held.
    /// # Crash
    /// Leaves a temporary directory, and the copy, whose changes are found again.
    pub(super) fn take(
        &self,
        flat: &Flat,
        beneath: impl FnOnce() -> Result<Vec<Content>>,
    ) -> Result<()> {
        let at = || self.shown();
        let temp = TempDir::new(self.home)?;
        let dir = temp.dir().as_fd();
        let old = sys::stat::at(self.merged.dir, self.merged.name).at("statx", at)?;
        let has_changes = flat.is_used && !flat.read_only;
        if has_changes {
            sys::name::mkdir(At::new(dir, DIFF), 0o700).at("mkdirat", at)?;
            let diff = sys::open::directory(dir, DIFF).at("open", at)?;
            self.fill(beneath()?, diff)?;
            if !flat.volatile {
                sys::data::sync_filesystem(dir).at("syncfs", at)?;
            }
            if let Some(work) = self.work {
                renew_work(work, (old.stx_uid, old.stx_gid)).at("unlinkat", at)?;
            }
            let exchange = RenameFlags::EXCHANGE;
            move_dir(At::new(dir, DIFF), self.content, exchange).at("renameat2", at)?;
            // The mark, which may lie elsewhere, is not to be known before the content is.
            sys::data::sync(self.content.dir, false).at("fsync", at)?;
            put_mark(self.mark, &Flat { is_used: false, ..flat.clone() }).at("write", at)?;
        }
        let none = RenameFlags::empty();
        move_dir(self.merged, At::new(dir, MERGED), none).at("renameat", at)?;
        if let Some(mode) = self.merged_mode {
            sys::name::mkdir(self.merged, mode).at("mkdirat", at)?;
            let (uid, gid) = (Some(old.stx_uid), Some(old.stx_gid));
            sys::name::chown(self.merged, uid, gid).at("fchownat", at)?;
        }
        drop_mark(self.mark).at("unlinkat", at)?;
        sys::data::sync(self.mark.dir, false).at("fsync", at)?;
        temp.remove()
    }

    fn fill(&self, beneath: Vec<Content>, diff: OwnedFd) -> Result<()> {
        let at = || self.shown();
        let copy = sys::open::directory(self.merged.dir, self.merged.name).at("open", at)?;
        let copy = Stack::new([(copy, self.merged_path.clone())])?;
        let Some(copy) = copy.root() else { return Ok(()) };
        let beneath = stack(beneath)?.root();
        flat::changes(beneath.as_ref(), &copy, diff, self.content_path.clone(), self.options)
    }

    /// Forgets a copy that is not there, and makes the mountpoint that stays without one: whoever
    /// took the copy away may have died before that.
    ///
    /// # Errors
    /// Those of mkdirat(2) and unlinkat(2).
    pub(super) fn forget(&self) -> Result<()> {
        if let Some(mode) = self.merged_mode {
            match sys::name::mkdir(self.merged, mode) {
                Ok(()) | Err(Errno::EXIST) => (),
                Err(errno) => return Err(Error::sys("mkdirat", self.shown(), errno)),
            }
        }
        drop_mark(self.mark).at("unlinkat", || self.shown())
    }
}

/// Fails with `ENOTEMPTY` if something lies at the mountpoint, which would be lost.
fn refuse_files(merged: At<'_>) -> std::result::Result<(), Errno> {
    let merged = sys::open::directory(merged.dir, merged.name)?;
    sys::name::list(merged.as_fd(), |_, _, _| Err(Errno::NOTEMPTY))
}

/// Writes what is known of a copy, for good.
fn put_mark(mark: At<'_>, flat: &Flat) -> std::result::Result<(), Errno> {
    let text = serde_json::to_vec(flat).map_err(|_never| Errno::INVAL)?;
    replace_small(mark.dir, mark.name, &text, 0o600)
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

fn drop_mark(mark: At<'_>) -> std::result::Result<(), Errno> {
    match sys::name::unlink(mark) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(errno),
    }
}

fn stack(contents: impl IntoIterator<Item = Content>) -> Result<Stack> {
    Stack::new(contents.into_iter().map(|content| (content.dir, content.path)))
}
