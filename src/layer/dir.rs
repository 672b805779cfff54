//! A directory of a layer: where it lies, and its handle when needed.
//!
//! Locks: `Dir::place`, held over no system call.

use std::borrow::Cow;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use once_cell::race::OnceBox;
use parking_lot::RwLock;
use rustix::fs::FileType;
use smallvec::SmallVec;

use super::cache::HandleCache;
use super::{Index, leftover};
use crate::error::{Context, Errno, Error, Result};
use crate::marks;
use crate::overrides::Form;
use crate::sys::name::At;
use crate::sys::stat::Statx;
use crate::sys::xattr::{self, Target};
use crate::sys::{self, open};

/// What all directories of one layer share.
#[derive(Debug)]
pub struct Layer {
    /// Its position in the stack.
    pub index: Index,
    /// How the user named it; for messages only.
    pub path: PathBuf,
    /// By which xattr its objects are what their inodes are not.
    pub form: Option<Form>,
    handles: Arc<HandleCache>,
    /// Its filesystem keeps files that are removed while open under made-up names.
    leaves_names: AtomicBool,
    /// Its filesystem makes inode numbers up, and listings have others than statx(2).
    made_up_numbers: AtomicBool,
}

impl Layer {
    /// Tells whether listings of the layer have true inode numbers. Where not, an object may have
    /// another number each time it is looked up.
    pub fn has_true_numbers(&self) -> bool {
        !self.made_up_numbers.load(Ordering::Relaxed)
    }

    /// Takes note that the filesystem makes inode numbers up.
    pub fn distrust_numbers(&self) {
        self.made_up_numbers.store(true, Ordering::Relaxed);
    }

    /// Takes note that removed files stay under made-up names, which then are no part of the layer.
    pub fn hide_leftovers(&self) {
        self.leaves_names.store(true, Ordering::Relaxed);
    }

    /// Tells whether `name` is one that the filesystem has made up for a removed file.
    pub fn is_leftover(&self, name: &[u8]) -> bool {
        self.leaves_names.load(Ordering::Relaxed) && leftover::is_name(name)
    }
}

/// Where a directory lies in its layer.
#[derive(Debug)]
pub struct Place {
    /// The directory above.
    pub parent: Arc<Dir>,
    /// Its name there.
    pub name: Name,
}

/// A name that needs no memory of its own while it is short: there are many directories.
type Name = SmallVec<[u8; 16]>;

/// A directory of a layer.
#[derive(Debug)]
pub struct Dir {
    /// The layer it belongs to.
    pub layer: Arc<Layer>,
    /// Device number of the filesystem that holds it.
    pub device: u64,
    /// Inode number in that filesystem.
    pub inode: u64,
    id: u64,
    /// `None` for the root of the layer. Changed by a rename in the upper only.
    place: RwLock<Option<Place>>,
    /// Which marks of its own the directory has, once that is known: [`KNOWN`] and others.
    marked: AtomicU8,
    /// Somebody has listed it by its handle, which has one position, and is read through once: sshfs says of a directory
    /// that is read again from its start that it is empty.
    listed: AtomicBool,
    /// Set for the root, and for a directory removed while somebody still uses it.
    pinned: OnceBox<Arc<OwnedFd>>,
}

/// Bits of [`Dir::marked`].
const KNOWN: u8 = 1;
const IMPURE: u8 = 2;
const NESTED: u8 = 4;
const XATTR_WHITEOUTS: u8 = 8;

/// How often a walk is begun again because a rename crossed it.
const RENAME_TRIES: u32 = 100;

/// `statfs` type of a FUSE mount.
const FUSE_SUPER_MAGIC: i64 = 0x6573_5546;

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

impl Dir {
    /// Makes `handle` the root of a layer.
    ///
    /// # Errors
    /// Those of statx(2).
    pub fn root(
        index: Index,
        handle: OwnedFd,
        path: PathBuf,
        form: Option<Form>,
        handles: &Arc<HandleCache>,
    ) -> Result<Arc<Self>> {
        let stat = sys::stat::of(&handle).at("statx", || path.display().to_string())?;
        let layer = Arc::new(Layer {
            index,
            path,
            form,
            handles: Arc::clone(handles),
            leaves_names: AtomicBool::new(false),
            made_up_numbers: AtomicBool::new(false),
        });
        let dir = Self::new(layer, &stat, None);
        // Empty until now, so it cannot fail.
        drop(dir.pinned.set(Box::new(Arc::new(handle))));
        Ok(Arc::new(dir))
    }

    fn new(layer: Arc<Layer>, stat: &Statx, place: Option<Place>) -> Self {
        Self {
            layer,
            device: sys::stat::device(stat),
            inode: stat.stx_ino,
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            place: RwLock::new(place),
            marked: AtomicU8::new(0),
            listed: AtomicBool::new(false),
            pinned: OnceBox::new(),
        }
    }

    /// Returns the directory `name` beneath this one, whose attributes are `stat`.
    pub fn child(self: &Arc<Self>, name: &[u8], stat: &Statx) -> Arc<Self> {
        let place = Place { parent: Arc::clone(self), name: name.into() };
        Arc::new(Self::new(Arc::clone(&self.layer), stat, Some(place)))
    }

    /// Opens the directory `name` beneath this one, and returns it with its attributes, handle open;
    /// `None` where that cannot be done, whyever: ask [`Dir::find`] then.
    pub fn open_child(self: &Arc<Self>, name: &[u8]) -> Option<(Arc<Self>, Statx)> {
        let opened = open::directory(self.handle().ok()?.as_fd(), name).ok()?;
        let stat = sys::stat::of(&opened).ok()?;
        let stat = self.seen(Target::Directory(opened.as_fd()), stat).ok()?;
        let child = self.child(name, &stat);
        child.adopt(opened);
        Some((child, stat))
    }

    /// Finds out whether the filesystem of the layer makes inode numbers up, by an entry of this
    /// directory. Only a FUSE server can do that; returns whether this is another filesystem.
    ///
    /// # Errors
    /// Those of fstatfs(2), and of listing the directory and looking at a name.
    pub fn probe_numbers(&self) -> Result<bool> {
        let magic = self.with("fstatfs", |dir| rustix::fs::fstatfs(dir))?.f_type;
        if magic != FUSE_SUPER_MAGIC {
            return Ok(true);
        }
        let mut first = None;
        self.list(|name, inode, _| {
            first.get_or_insert_with(|| (name.to_vec(), inode));
            Ok(())
        })?;
        if let Some((name, listed)) = first
            && let Some(stat) = self.find(&name)?
            && stat.stx_ino != listed
        {
            self.layer.distrust_numbers();
            tracing::info!(
                "{}: its filesystem makes inode numbers up; ours hold as long as it keeps its own",
                self.layer.path.display()
            );
        }
        Ok(false)
    }

    /// Returns an open handle, opening what is missing on the way from the root.
    ///
    /// # Errors
    /// Those of openat(2); `ESTALE` where another directory lies at the place now.
    pub fn handle(&self) -> Result<Arc<OwnedFd>> {
        let mut tries = 0;
        loop {
            match self.try_handle() {
                Ok(handle) => return Ok(handle),
                Err(Errno::MFILE | Errno::NFILE) if tries == 0 => self.layer.handles.shrink(),
                // A directory on the way was renamed meanwhile, or a server knows it no longer.
                Err(Errno::STALE) if tries < RENAME_TRIES => self.forget_handles(),
                Err(Errno::NOENT) if tries < RENAME_TRIES => {}
                Err(errno) => return Err(Error::sys("openat", self.describe(b""), errno)),
            }
            tries += 1;
        }
    }

    fn try_handle(&self) -> std::result::Result<Arc<OwnedFd>, Errno> {
        if let Some(open) = self.open_handle() {
            return Ok(open);
        }
        // A stack of its own: directories may lie deeper than the thread's stack is long.
        let mut missing = Vec::new();
        let mut above = self.above();
        let mut open = loop {
            let Some((parent, name)) = above else { return Err(Errno::STALE) };
            let found = parent.open_handle();
            above = parent.above();
            missing.push((parent, name));
            if let Some(open) = found {
                break open;
            }
        };
        let mut names = missing.into_iter().rev().map(|(dir, name)| (Some(dir), name)).peekable();
        while let Some((_, name)) = names.next() {
            let below = names.peek().and_then(|(dir, _)| dir.clone());
            let target = below.as_deref().unwrap_or(self);
            open = target.keep(open::directory(open.as_fd(), &name)?)?;
        }
        Ok(open)
    }

    fn keep(&self, handle: OwnedFd) -> std::result::Result<Arc<OwnedFd>, Errno> {
        let stat = sys::stat::of(&handle)?;
        let is_same = stat.stx_ino == self.inode || !self.layer.has_true_numbers();
        if !is_same || sys::stat::device(&stat) != self.device {
            return Err(Errno::STALE);
        }
        Ok(self.layer.handles.put(self.id, handle))
    }

    /// Closes the handles on the way from the root, which a server may know no longer.
    fn forget_handles(&self) {
        self.layer.handles.remove(self.id);
        let mut above = self.above();
        while let Some((parent, _)) = above {
            self.layer.handles.remove(parent.id);
            above = parent.above();
        }
    }

    /// Hands over a handle opened by the caller, so that it need not be opened again.
    pub fn adopt(&self, handle: OwnedFd) -> Arc<OwnedFd> {
        self.layer.handles.put(self.id, handle)
    }

    fn open_handle(&self) -> Option<Arc<OwnedFd>> {
        self.pinned.get().cloned().or_else(|| self.layer.handles.get(self.id))
    }

    fn above(&self) -> Option<(Arc<Self>, Name)> {
        let place = self.place.read();
        place.as_ref().map(|place| (Arc::clone(&place.parent), place.name.clone()))
    }

    /// Keeps the handle open from now on, because the name is about to go.
    ///
    /// # Errors
    /// Those of [`Dir::handle`].
    pub fn pin(&self) -> Result<()> {
        let handle = self.handle()?;
        // Pinned before is as good.
        drop(self.pinned.set(Box::new(handle)));
        Ok(())
    }

    /// Takes note of a rename in the upper.
    pub fn moved(&self, parent: &Arc<Self>, name: &[u8]) {
        let place = Place { parent: Arc::clone(parent), name: name.into() };
        let old = self.place.write().replace(place);
        drop(old);
    }

    /// Returns layer and path for a message. Never used to reach anything.
    pub fn describe(&self, name: &[u8]) -> Cow<'static, str> {
        let mut names = vec![String::from_utf8_lossy(name).into_owned()];
        let mut above = self.above();
        while let Some((parent, name)) = above {
            names.push(String::from_utf8_lossy(&name).into_owned());
            above = parent.above();
        }
        let which = if self.layer.index == super::UPPER { "upper" } else { "lower" };
        let mut path = self.layer.path.display().to_string();
        for name in names.iter().rev().filter(|name| !name.is_empty()) {
            path.push('/');
            path.push_str(name);
        }
        format!("{which} layer, {path}").into()
    }

    /// Completes what statx(2) says by what the layer says.
    fn seen(&self, target: Target<'_>, stat: Statx) -> std::result::Result<Statx, Errno> {
        match self.layer.form {
            Some(form) => super::seen::seen(form, target, stat),
            None => Ok(stat),
        }
    }

    /// Returns the attributes of `name`, or `None` if there is no such name.
    ///
    /// # Errors
    /// Those of statx(2) but `ENOENT`.
    pub fn find(&self, name: &[u8]) -> Result<Option<Statx>> {
        let found = self.attempt(|dir| match sys::stat::find(dir, name)? {
            Some(stat) => self.seen(Target::Name(At::new(dir, name)), stat).map(Some),
            None => Ok(None),
        })?;
        found.at("statx", || self.describe(name))
    }

    /// Returns the attributes of the directory itself.
    ///
    /// # Errors
    /// Those of statx(2).
    pub fn stat(&self) -> Result<Statx> {
        self.attempt(|dir| self.seen(Target::Directory(dir), sys::stat::of(dir)?))?
            .at("statx", || self.describe(b""))
    }

    /// Returns the names of the directory's xattrs, and what its opaque mark says, in whichever
    /// namespace it stands.
    ///
    /// # Errors
    /// Those of listxattr(2), and of getxattr(2) but absence; `EACCES` and `EPERM` are errors, never
    /// "not opaque".
    pub fn xattrs(&self) -> Result<(Vec<u8>, marks::Opaque)> {
        self.with("listxattr", |dir| {
            let dir = Target::Directory(dir);
            // Most directories have no mark, which one call tells.
            let list = xattr::list(dir)?;
            let opaque = opaque_in(dir, &list)?;
            self.note_marks(&list, opaque);
            Ok((list, opaque))
        })
    }

    /// Tells whether the directory is marked as one that may hold copies of lower objects; asked
    /// once.
    ///
    /// # Errors
    /// Those of listxattr(2).
    pub fn is_impure(&self) -> Result<bool> {
        Ok(self.marks()? & IMPURE != 0)
    }

    /// Tells whether empty files in the directory may be whiteouts of a nested overlay; asked once.
    ///
    /// # Errors
    /// Those of listxattr(2).
    pub fn has_nested_whiteouts(&self) -> Result<bool> {
        Ok(self.marks()? & NESTED != 0)
    }

    /// Tells whether empty files in the directory may be whiteouts, ours or a nested overlay's; asked
    /// once.
    ///
    /// # Errors
    /// Those of listxattr(2) and getxattr(2).
    pub fn has_xattr_whiteouts(&self) -> Result<bool> {
        Ok(self.marks()? & (NESTED | XATTR_WHITEOUTS) != 0)
    }

    fn marks(&self) -> Result<u8> {
        if self.marked.load(Ordering::Relaxed) & KNOWN == 0 {
            self.xattrs()?;
        }
        Ok(self.marked.load(Ordering::Relaxed))
    }

    fn note_marks(&self, list: &[u8], opaque: marks::Opaque) {
        let mut found = KNOWN;
        if opaque == marks::Opaque::XattrWhiteouts {
            found |= XATTR_WHITEOUTS;
        }
        if marks::lists_any(list, &marks::IMPURE_XATTRS) {
            found |= IMPURE;
        }
        if marks::lists_any(list, &marks::NESTED_WHITEOUTS_XATTRS)
            || marks::lists_any(list, &marks::NESTED_OPAQUE_XATTRS)
        {
            found |= NESTED;
        }
        // What was marked meanwhile stays so.
        self.marked.fetch_or(found, Ordering::Relaxed);
    }

    /// Takes note that the directory was made without marks.
    pub fn now_unmarked(&self) {
        self.marked.store(KNOWN, Ordering::Relaxed);
    }

    /// Takes note that the directory was marked impure.
    pub fn now_impure(&self) {
        self.marked.fetch_or(IMPURE, Ordering::Relaxed);
    }

    /// Takes note that the directory was marked as one that may hold whiteouts of a nested overlay.
    pub fn now_nested(&self) {
        self.marked.fetch_or(NESTED, Ordering::Relaxed);
    }

    /// Calls `visit` with each name, its inode number and `d_type`.
    ///
    /// # Errors
    /// Those of getdents64(2) and of `visit`.
    pub fn list(
        &self,
        mut visit: impl FnMut(&[u8], u64, FileType) -> std::result::Result<(), Errno>,
    ) -> Result<()> {
        let mut begun = false;
        self.attempt(|dir| {
            // What has been visited is not visited again.
            if begun {
                return Err(Errno::STALE);
            }
            let visit = |name: &[u8], inode, kind| {
                begun = true;
                visit(name, inode, kind)
            };
            let is_first = !self.listed.swap(true, Ordering::Relaxed);
            // Not if it is an `O_PATH` handle, as where it may be searched only.
            if is_first && sys::name::rewind(dir).is_ok() {
                return sys::name::list_here(dir, visit);
            }
            sys::name::list(dir, visit)
        })?
        .at("getdents64", || self.describe(b""))
    }

    /// Runs one system call on `name`, naming it in an error.
    ///
    /// # Errors
    /// That of the call, with its place.
    pub fn call<T>(
        &self,
        op: &'static str,
        name: &[u8],
        mut call: impl FnMut(At<'_>) -> std::result::Result<T, Errno>,
    ) -> Result<T> {
        self.attempt(|dir| call(At::new(dir, name)))?.at(op, || self.describe(name))
    }

    /// Runs one system call on the open directory.
    ///
    /// # Errors
    /// That of the call, with its place.
    pub fn with<T>(
        &self,
        op: &'static str,
        call: impl FnMut(BorrowedFd<'_>) -> std::result::Result<T, Errno>,
    ) -> Result<T> {
        self.attempt(call)?.at(op, || self.describe(b""))
    }

    /// Makes a call, and makes it once more if the process ran out of descriptors, with some of
    /// them closed, or if the server of a network filesystem has lost the handle, with a new one.
    fn attempt<T>(
        &self,
        mut call: impl FnMut(BorrowedFd<'_>) -> std::result::Result<T, Errno>,
    ) -> Result<std::result::Result<T, Errno>> {
        let handle = self.handle()?;
        Ok(match call(handle.as_fd()) {
            Err(Errno::MFILE | Errno::NFILE) => {
                self.layer.handles.shrink();
                call(handle.as_fd())
            }
            Err(Errno::STALE) if self.pinned.get().is_none() => {
                self.forget_handles();
                call(self.handle()?.as_fd())
            }
            done => done,
        })
    }
}

/// Tells what the opaque mark of a directory with these xattrs says.
fn opaque_in(dir: Target<'_>, list: &[u8]) -> std::result::Result<marks::Opaque, Errno> {
    let mut opaque = marks::Opaque::No;
    if marks::lists_any(list, &marks::XATTR_WHITEOUTS_XATTRS) {
        opaque = marks::Opaque::XattrWhiteouts;
    }
    for name in marks::OPAQUE_XATTRS {
        if !marks::lists_any(list, &[name]) {
            continue;
        }
        let value = xattr::get(dir, name)?;
        match value.as_deref().map_or(marks::Opaque::No, marks::Opaque::from_value) {
            // Hides all, whatever else the directory is marked with.
            marks::Opaque::Yes => return Ok(marks::Opaque::Yes),
            marks::Opaque::XattrWhiteouts => opaque = marks::Opaque::XattrWhiteouts,
            marks::Opaque::No => {}
        }
    }
    Ok(opaque)
}

impl Drop for Dir {
    fn drop(&mut self) {
        self.layer.handles.remove(self.id);
        // Unlinks the chain of parents one by one: dropping it recursively could need more stack
        // than a thread has.
        let mut above = self.place.get_mut().take().map(|place| place.parent);
        while let Some(parent) = above {
            above = Arc::into_inner(parent)
                .and_then(|mut dir| dir.place.get_mut().take().map(|place| place.parent));
        }
    }
}
