//! A stack of layers as plain files: a complete copy of what it shows, and the way back, a layer of
//! what was changed in the copy; and one layer as it is put into another place or form.
//!
//! Takes no locks. A crash leaves the target half filled: it is to be nobody's until it is whole.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use rustix::fs::{FileType, Timespec, Timestamps};

use super::metadata::Place;
use super::naive;
use super::path;
use super::same::{Rules, link_target};
use super::target::{Found, Target, is_directory, make_directory};
use super::transfer::Source;
use super::view::{self, Leaf, Merged, Object, kind};
use super::walk::{Change, Sink, all};
use crate::error::{Context, Errno, Error, Result};
use crate::layer::{Dir, Index};
use crate::marks;
use crate::sys::data::Part;
use crate::sys::name::At;
use crate::sys::stat::Statx;
use crate::sys::{self, xattr};

/// How a tree is copied, and how a layer of changes is made of one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Options {
    /// Owners that cannot be set are left out.
    pub ignore_chown_errors: bool,
    /// What a layer deletes is kept as `.wh.` files.
    pub whiteout_files: bool,
    /// Files become those of the copy by hard links where that is possible: nobody may write to
    /// either in place then.
    pub hard_links: bool,
}

/// What [`transfer`] makes of a layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Transfer {
    /// The same layer, in an empty directory.
    Layer,
    /// What it changes is changed in a complete tree, which shows what lies beneath it.
    Tree,
}

/// Puts what a layer holds into another place or form.
///
/// `watch` is told of the bytes of each file; `to_path` is for messages.
///
/// # Errors
/// As [`copy`].
pub fn transfer(
    source: &Source,
    to: OwnedFd,
    to_path: PathBuf,
    what: Transfer,
    options: Options,
    watch: &mut dyn FnMut(u64),
) -> Result<()> {
    let Some(root) = source.root() else { return Ok(()) };
    let form = match what {
        Transfer::Layer => Form::Moved,
        Transfer::Tree => Form::Over,
    };
    let mut filling = Filling::new(&object(&root)?, to, to_path, form, options)?;
    if let Source::Layer(stack) = source
        && let Some(top) = stack.top()
        && view::dir_marks(top)?.opaque
    {
        let root = Arc::clone(filling.target.root());
        filling.hide(&root)?;
    }
    source.tell(&mut Watched(&mut filling, watch))?;
    filling.finish()
}

/// Passes changes on, and tells of their bytes.
struct Watched<'a>(&'a mut Filling, &'a mut dyn FnMut(u64));

impl Sink for Watched<'_> {
    fn change(&mut self, change: Change<'_>) -> Result<()> {
        let bytes = match change.object {
            Some(Object::Leaf(leaf)) if kind(&leaf.stat) == FileType::RegularFile => {
                leaf.stat.stx_size
            }
            _ => 0,
        };
        self.0.change(change)?;
        (self.1)(bytes);
        Ok(())
    }

    fn wants_kinds(&self) -> bool {
        false
    }
}

/// Fills an empty directory with all that a stack shows; data is shared where the filesystem can.
///
/// `to_path` is for messages.
///
/// # Errors
/// Those of the system calls; `EIO` for a metacopy without data.
pub fn copy(stack: &Merged, to: OwnedFd, to_path: PathBuf, options: Options) -> Result<()> {
    let root = object(stack)?;
    let mut filling = Filling::new(&root, to, to_path, Form::Tree, options)?;
    all(&mut filling, b"", &root, &mut Vec::new())?;
    filling.finish()
}

/// Fills an empty directory with the layer that turns what is `beneath` into `tree`, whose files
/// become those of the layer by hard links.
///
/// All names of a file are in the layer if one is: hard links stay whole.
///
/// # Errors
/// As [`copy`].
pub fn changes(
    beneath: Option<&Merged>,
    tree: &Merged,
    to: OwnedFd,
    to_path: PathBuf,
    options: Options,
) -> Result<()> {
    let root = object(tree)?;
    let mut filling = Filling::new(&root, to, to_path, Form::Layer, options)?;
    naive::changes(beneath, tree, Rules::Exact, &mut filling)?;
    if !filling.linked.is_empty() {
        all(&mut OtherNames(&mut filling), b"", &root, &mut Vec::new())?;
    }
    filling.finish()
}

fn object(dir: &Merged) -> Result<Object> {
    Ok(Object::Dir(dir.clone(), Box::new(dir.top().stat()?)))
}

/// What is being filled.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Form {
    /// A tree without marks.
    Tree,
    /// A layer of what was changed in a tree.
    Layer,
    /// A layer of a layer.
    Moved,
    /// A layer that is a complete tree, and there already.
    Over,
}

/// Xattr of labels, which belong to the place that a file is in.
const LABEL: &[u8] = b"security.selinux";

struct Filling {
    target: Target,
    form: Form,
    options: Options,
    /// The directories that were made, each with what it is to be like when all is in it.
    dirs: BTreeMap<Vec<u8>, Object>,
    /// Where the first name of a file with more of them was put.
    first_names: HashMap<(Index, u64), Vec<u8>>,
    /// Inodes in the layer that have names beside those put there so far.
    linked: HashSet<u64>,
}

impl Filling {
    fn new(
        root: &Object,
        to: OwnedFd,
        to_path: PathBuf,
        form: Form,
        options: Options,
    ) -> Result<Self> {
        Ok(Self {
            target: Target::new(to, to_path)?,
            form,
            options,
            dirs: BTreeMap::from([(Vec::new(), root.clone())]),
            first_names: HashMap::new(),
            linked: HashSet::new(),
        })
    }

    fn parent(&mut self, of: &[u8]) -> Result<Arc<Dir>> {
        match self.target.find(path::parent(of))? {
            Found::Dir(dir) => Ok(dir),
            Found::Nothing(dir, _) | Found::Other(dir, _, _) => {
                Err(Error::sys("openat", dir.describe(path::parent(of)), Errno::NOENT))
            }
        }
    }

    fn directory(&mut self, path: &[u8], object: &Object) -> Result<()> {
        if self.dirs.contains_key(path) {
            return Ok(());
        }
        let parent = self.parent(path)?;
        let name = path::split(path).1;
        let old = if self.form == Form::Over { parent.find(name)? } else { None };
        if !old.as_ref().is_some_and(is_directory) {
            if old.is_some() {
                self.target.remove(&parent, name)?;
            }
            make_directory(&parent, name)?;
        }
        self.dirs.insert(path.to_vec(), object.clone());
        Ok(())
    }

    /// Makes a directory that shows nothing of what lies beneath.
    fn opaque(&mut self, path: &[u8], object: &Object) -> Result<()> {
        self.directory(path, object)?;
        match self.target.find(path)? {
            Found::Dir(dir) => self.hide(&dir),
            Found::Nothing(dir, _) | Found::Other(dir, _, _) => {
                Err(Error::sys("openat", dir.describe(path), Errno::NOENT))
            }
        }
    }

    /// Hides what lies beneath a directory, which nothing was put into yet.
    fn hide(&mut self, dir: &Arc<Dir>) -> Result<()> {
        if self.form == Form::Over {
            let mut names = Vec::new();
            dir.list(|name, _, _| {
                names.push(name.to_vec());
                Ok(())
            })?;
            return names.iter().try_for_each(|name| self.target.remove(dir, name));
        }
        if self.options.whiteout_files {
            let made = dir
                .call("openat", marks::OPAQUE_NAME, |at| sys::open::create(at.dir, at.name, 0o600));
            return made.map(drop);
        }
        let [trusted, user, _] = marks::OPAQUE_XATTRS;
        let place = Place::Dir(dir);
        match place.set_xattr(trusted, marks::OPAQUE_VALUE) {
            // As where an archive is unpacked.
            Err(Error::Sys { errno: Errno::PERM | Errno::OPNOTSUPP, .. }) => {
                place.set_xattr(user, marks::OPAQUE_VALUE)
            }
            done => done,
        }
    }

    fn leaf(&mut self, path: &[u8], leaf: &Leaf) -> Result<()> {
        let parent = self.parent(path)?;
        let name = path::split(path).1;
        if self.form == Form::Over && parent.find(name)?.is_some() {
            self.target.remove(&parent, name)?;
        }
        if self.form == Form::Layer || self.options.hard_links {
            if leaf.stat.stx_nlink > 1 {
                self.linked.insert(leaf.stat.stx_ino);
            }
            if self.link_over(&parent, name, leaf)? {
                return Ok(());
            }
        }
        if leaf.stat.stx_nlink > 1 {
            let key = (leaf.dir.layer.index, leaf.stat.stx_ino);
            if let Some(first) = self.first_names.get(&key).cloned() {
                let dir = self.parent(&first)?;
                return link(&dir, path::split(&first).1, &parent, name);
            }
            self.first_names.insert(key, path.to_vec());
        }
        self.make(&parent, name, leaf)
    }

    /// Gives a file of the tree a name in the layer; `false` if it must be copied.
    fn link_over(&self, parent: &Arc<Dir>, name: &[u8], leaf: &Leaf) -> Result<bool> {
        let list =
            leaf.dir.call("listxattr", &leaf.name, |at| xattr::list(xattr::Target::Name(at)))?;
        let is_as_it_is = |name: &[u8]| {
            name == LABEL || self.xattr_name(name).is_some_and(|new| new.as_ref() == name)
        };
        if !list.split(|byte| *byte == 0).filter(|name| !name.is_empty()).all(is_as_it_is) {
            return Ok(false);
        }
        match link(&leaf.dir, &leaf.name, parent, name) {
            Ok(()) => Ok(true),
            Err(Error::Sys { errno: Errno::PERM | Errno::MLINK | Errno::XDEV, .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn make(&self, parent: &Arc<Dir>, name: &[u8], leaf: &Leaf) -> Result<()> {
        let object = Object::Leaf(leaf.clone());
        match kind(&leaf.stat) {
            FileType::RegularFile => {
                let data = leaf.open_data()?;
                let file =
                    parent.call("openat", name, |at| sys::open::create(at.dir, at.name, 0o600))?;
                let part = Part { len: leaf.stat.stx_size, whole: true, dense: false };
                sys::data::copy(data.as_fd(), file.as_fd(), part, &|| false)
                    .at("copy_file_range", || parent.describe(name))?;
                self.describe(&Place::Open(&file, parent, name), &object)
            }
            FileType::Symlink => {
                let target = link_target(leaf)?;
                parent.call("symlinkat", name, |at| sys::name::symlink(&target, at))?;
                self.describe(&Place::Name(parent, name), &object)
            }
            FileType::Directory
            | FileType::Fifo
            | FileType::Socket
            | FileType::CharacterDevice
            | FileType::BlockDevice
            | FileType::Unknown => {
                let mode = u32::from(leaf.stat.stx_mode) & !0o7777 | 0o600;
                let device = (leaf.stat.stx_rdev_major, leaf.stat.stx_rdev_minor);
                parent.call("mknodat", name, |at| sys::name::mknod(at, mode, device))?;
                self.describe(&Place::Name(parent, name), &object)
            }
        }
    }

    /// Gives an object owner, xattrs, mode and times: in this order, as a mode may forbid xattrs,
    /// and a new owner takes rights away.
    fn describe(&self, place: &Place<'_>, object: &Object) -> Result<()> {
        let stat = object.stat();
        match place.chown(stat.stx_uid, stat.stx_gid) {
            Err(_) if self.options.ignore_chown_errors => (),
            done => done?,
        }
        for (name, value) in self.xattrs(object)? {
            place.set_xattr(&name, &value)?;
        }
        if kind(stat) != FileType::Symlink {
            place.chmod(u32::from(stat.stx_mode) & 0o7777)?;
        }
        place.set_timestamps(&times(stat))
    }

    /// Returns the name that an xattr gets; `None` for a mark that means nothing there.
    fn xattr_name<'n>(&self, name: &'n [u8]) -> Option<Cow<'n, [u8]>> {
        match self.form {
            Form::Tree => marks::visible_name(name),
            Form::Layer => marks::stored_name(name),
            // Both are layers of a mount.
            Form::Moved | Form::Over => marks::visible_name(name).map(|_shown| Cow::Borrowed(name)),
        }
    }

    /// Returns the xattrs that an object is to have, by the names they are stored under.
    fn xattrs(&self, object: &Object) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let read = |target: xattr::Target<'_>| {
            let list = xattr::list(target)?;
            let mut found = Vec::new();
            for stored in list.split(|byte| *byte == 0).filter(|stored| !stored.is_empty()) {
                if stored == LABEL {
                    continue;
                }
                let Some(name) = self.xattr_name(stored) else { continue };
                if let Some(value) = xattr::get(target, stored)? {
                    found.push((name.into_owned(), value));
                }
            }
            Ok(found)
        };
        match object {
            Object::Dir(dir, _) => {
                dir.top().with("getxattr", |dir| read(xattr::Target::Handle(dir)))
            }
            Object::Leaf(leaf) => {
                leaf.dir.call("getxattr", &leaf.name, |at| read(xattr::Target::Name(at)))
            }
        }
    }

    fn whiteout(&mut self, path: &[u8]) -> Result<()> {
        let parent = self.parent(path)?;
        let name = path::split(path).1;
        if self.form == Form::Over {
            return self.target.remove(&parent, name);
        }
        if !self.options.whiteout_files {
            match parent.call("mknodat", name, sys::name::whiteout) {
                // As where an archive is unpacked.
                Err(Error::Sys { errno: Errno::PERM, .. }) => {}
                done => return done,
            }
        }
        let stored = marks::whiteout_name(name).ok_or_else(|| Error::Unsupported {
            feature: format!(
                "{}: was deleted, and its name is too long for a .wh. file",
                parent.describe(name)
            )
            .into(),
        })?;
        parent.call("openat", &stored, |at| sys::open::create(at.dir, at.name, 0o600)).map(drop)
    }

    /// Gives directories what they are to be like, the deepest first.
    fn finish(mut self) -> Result<()> {
        while let Some((path, object)) = self.dirs.pop_last() {
            let Found::Dir(dir) = self.target.find(&path)? else {
                let root = self.target.root();
                return Err(Error::sys("openat", root.describe(&path), Errno::NOENT));
            };
            if self.form == Form::Over {
                self.drop_xattrs(&dir, &object)?;
            }
            self.describe(&Place::Dir(&dir), &object)?;
        }
        Ok(())
    }

    /// Takes away the xattrs that a directory had and is not to have any more.
    fn drop_xattrs(&self, dir: &Arc<Dir>, object: &Object) -> Result<()> {
        let wanted = self.xattrs(object)?;
        dir.with("removexattr", |dir| {
            let target = xattr::Target::Handle(dir);
            for name in xattr::list(target)?.split(|byte| *byte == 0) {
                let is_wanted = wanted.iter().any(|(wanted, _)| wanted == name);
                if !name.is_empty() && name != LABEL && !is_wanted {
                    xattr::remove(target, name)?;
                }
            }
            Ok(())
        })
    }
}

fn link(dir: &Arc<Dir>, name: &[u8], to_dir: &Arc<Dir>, to: &[u8]) -> Result<()> {
    let from = dir.handle()?;
    to_dir.call("linkat", to, |to| sys::name::link(At::new(from.as_fd(), name), to))
}

/// Returns the access and modification times of an object, to give them to another.
pub(crate) fn times(stat: &Statx) -> Timestamps {
    let spec =
        |seconds, nanoseconds: u32| Timespec { tv_sec: seconds, tv_nsec: nanoseconds.into() };
    Timestamps {
        last_access: spec(stat.stx_atime.tv_sec, stat.stx_atime.tv_nsec),
        last_modification: spec(stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec),
    }
}

impl Sink for Filling {
    fn change(&mut self, change: Change<'_>) -> Result<()> {
        for above in change.above.iter() {
            self.directory(&above.path, &above.object)?;
        }
        match change.object {
            Some(object @ Object::Dir(..)) if change.is_opaque => self.opaque(change.path, object),
            Some(object @ Object::Dir(..)) => self.directory(change.path, object),
            Some(Object::Leaf(leaf)) => self.leaf(change.path, leaf),
            None => self.whiteout(change.path),
        }
    }

    fn wants_kinds(&self) -> bool {
        false
    }
}

/// Takes the names that are left of files that are in the layer by others.
struct OtherNames<'a>(&'a mut Filling);

impl Sink for OtherNames<'_> {
    fn change(&mut self, change: Change<'_>) -> Result<()> {
        let Some(Object::Leaf(leaf)) = change.object else { return Ok(()) };
        if leaf.stat.stx_nlink < 2 || !self.0.linked.contains(&leaf.stat.stx_ino) {
            return Ok(());
        }
        for above in change.above.iter() {
            self.0.directory(&above.path, &above.object)?;
        }
        let name = path::split(change.path).1;
        if self.0.parent(change.path)?.find(name)?.is_some() {
            return Ok(());
        }
        self.0.leaf(change.path, leaf)
    }

    fn wants_kinds(&self) -> bool {
        false
    }
}
