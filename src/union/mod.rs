//! The union: what kernel overlayfs does with a stack of layers, without a kernel and without FUSE.
//!
//! Knows nothing of requests and replies; a server, a test or a library user calls it alike. Every
//! method takes `&self` and may be called from any thread; `lock` has the order of locks. Every
//! change is prepared out of sight and published by one rename or link, so that whatever stops the
//! process leaves the tree before or after the operation.

mod acl;
mod ahead;
mod attr;
mod copy_attr;
mod copy_up;
mod cover;
mod create;
mod file;
mod flatten;
mod index;
mod ino;
mod interrupt;
mod link;
mod listing;
mod lock;
mod look;
mod lookup;
mod metacopy;
mod node;
mod origin;
mod owner;
mod parts;
mod probe;
mod protect;
mod publish;
mod readdir;
mod redirect;
mod remove;
mod rename;
pub(crate) mod resolve;
mod staging;
#[cfg(test)]
mod testing;
mod xattr;

use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use lru::LruCache;
use parking_lot::{Mutex, RwLock};
pub use rustix::fs::{RenameFlags, StatVfs, XattrFlags};

use self::ahead::Ahead;
pub use self::attr::{Attr, FileType, SetAttr, SetTime, Time, Writer};
pub use self::create::Caller;
pub use self::file::{Data, Whence, Written};
pub use self::flatten::CopyLimit;
use self::index::Index;
use self::ino::{Numbers, Width};
use self::interrupt::Interrupts;
pub use self::interrupt::serve;
use self::look::Carrier;
pub use self::lookup::Entry;
pub use self::metacopy::Verity;
pub use self::node::NodeId;
use self::node::{Dir, Node, Place, Table};
use self::origin::Origins;
use self::publish::Work;
pub use self::readdir::{DirEntry, Visit};
pub use self::redirect::Follow;
#[cfg(test)]
pub(crate) use self::testing::open_in;
use crate::error::{Context, Errno, Error, Result};
use crate::idmap::{Ids, OuterId};
use crate::layer::cache::HandleCache;
use crate::layer::{self, UPPER};
use crate::options::Ability;
use crate::overrides::Form;
use crate::sys;
use crate::sys::name::At;

/// Names remembered in listings before those of released directories are given up.
const LISTED_MAX: usize = 250_000;

/// Directory handles kept open for the next call: those of 200 directories in ten layers, which one listing opens.
const HANDLES_MAX: usize = 2048;

/// Data handles kept open of files that nobody is known to have open.
const IDLE_MAX: usize = 896;

/// What a union is made of.
#[derive(Debug)]
pub struct Config {
    /// Read-only layers, topmost first; at least one.
    pub lowers: Vec<LayerSpec>,
    /// The writable layer; without one the union is read-only.
    pub upper: Option<UpperSpec>,
    /// Nothing is made durable: no sync before a copy-up is published, none on request.
    pub volatile: bool,
    /// The work directory keeps a mark that says so, as the kernel's does.
    pub volatile_mark: bool,
    /// Which ids of the layers are shown as which.
    pub ids: Ids,
    /// Every directory shows a link count of 1.
    pub static_nlink: bool,
    /// Inode numbers have 32 bits.
    pub ino32: bool,
    /// Opaque marks are written as `user.overlay.`, even where `trusted.overlay.` could be.
    pub userxattr: bool,
    /// What the upper's filesystem is not to be used for, though it may be able to.
    pub lacks: Vec<Ability>,
    /// Names of a lower file stay names of one file, over copy-up and remounts.
    pub index: bool,
    /// What the mount does with the UUIDs of filesystems and of its own.
    pub uuid: Uuid,
    /// How much is copied to rename a directory that has lower parts.
    pub copy_limit: CopyLimit,
    /// Whose redirects are followed.
    pub follow: Follow,
    /// Directories that have lower parts are renamed by writing a redirect.
    pub redirects: bool,
    /// A change of attributes alone copies no data.
    pub metacopy: bool,
    /// What is done about digests of data.
    pub verity: Verity,
    /// Layers that only lend data to metacopies, topmost first.
    pub data: Vec<LayerSpec>,
    /// Owner, mode and type of upper objects are kept in an xattr of this form.
    pub overrides: Option<Form>,
}

/// What a mount does with UUIDs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Uuid {
    /// Origins hold those of the filesystems; the upper keeps its own if it has one.
    #[default]
    Auto,
    /// The same, and the upper gets one.
    On,
    /// Origins are written and read without, for layers that move to another filesystem.
    Off,
}

/// A layer that is only read.
#[derive(Debug)]
pub struct LayerSpec {
    /// Its top directory.
    pub dir: OwnedFd,
    /// How the user named it; for messages only.
    pub path: PathBuf,
}

/// The layer that takes all changes.
#[derive(Debug)]
pub struct UpperSpec {
    /// Its top directory.
    pub dir: OwnedFd,
    /// The workdir, on the same filesystem; `work` is made in it.
    pub work: OwnedFd,
    /// How the user named the upper; for messages only.
    pub path: PathBuf,
    /// How the user named the workdir; for messages only.
    pub work_path: PathBuf,
}

/// A stack of layers shown as one tree.
#[derive(Debug)]
pub struct Union {
    table: Table,
    numbers: Numbers,
    origins: Origins,
    upper: Option<Upper>,
    volatile: bool,
    volatile_mark: bool,
    ids: Ids,
    /// By which xattr each layer, upper first, overrides its inodes; empty where none does.
    forms: Box<[Option<Form>]>,
    static_nlink: bool,
    copy_limit: CopyLimit,
    follow: Follow,
    redirects: bool,
    metacopy: bool,
    verity: Verity,
    /// The tops of the data-only layers, topmost first.
    data_roots: Box<[Arc<layer::Dir>]>,
    /// The tops of the lower layers, topmost first.
    roots: Box<[Arc<layer::Dir>]>,
    /// The bottom of the stack.
    lowest: layer::Index,
    /// See [`lock`].
    rename: RwLock<()>,
    handles: Arc<HandleCache>,
    /// Nodes with a data handle that is kept though nobody may have the file open.
    idle: Mutex<LruCache<NodeId, ()>>,
    /// Names in all listings, about.
    listed: AtomicUsize,
    ahead: Ahead,
    poisoned: AtomicBool,
    interrupts: Interrupts,
    uid: u32,
    gid: u32,
}

/// The writable side.
#[derive(Debug)]
struct Upper {
    root: Arc<layer::Dir>,
    /// How its objects are kept, if not by inodes alone.
    carrier: Option<Carrier>,
    work: Work,
    index: Option<Index>,
}

/// Where the object of a node that is no directory is reached.
#[derive(Clone, Copy)]
enum Leaf<'a> {
    Handle(BorrowedFd<'a>),
    Name(At<'a>),
}

impl Union {
    /// Opens a stack. Empties the work directory and probes what the upper's filesystem can do.
    ///
    /// # Errors
    /// `Invalid` without a lower or with more than 500; `Unsupported` for an upper that cannot hold
    /// the format; `Busy` for a workdir that a volatile mount left behind.
    pub fn open(config: Config) -> Result<Self> {
        if config.lowers.is_empty() {
            return Err(Error::invalid("lowerdir", "at least one layer is needed"));
        }
        let files = descriptor_limit();
        let handles = Arc::new(HandleCache::new((files / 2).min(HANDLES_MAX)));
        let numbers = Numbers::new(if config.ino32 { Width::HALF } else { Width::FULL });
        let forms = lower_forms(&config)?;
        let mut upper_form = None;
        let mut workdir = None;
        let mut upper = match config.upper {
            Some(upper) => {
                let roots: Vec<_> = config.lowers.iter().map(|lower| lower.dir.as_fd()).collect();
                let roots: Vec<_> = forms.iter().copied().zip(roots).collect();
                let carrier = Carrier::prepare(config.overrides, &upper.dir, &roots)?;
                let form = carrier.map(Carrier::form);
                upper_form = form;
                let root = layer::Dir::root(UPPER, upper.dir, upper.path, form, &handles)?;
                numbers.register(root.device);
                let work = upper.work;
                let dir = layer::Dir::root(UPPER, work, upper.work_path, form, &handles)?;
                let work = Work::open(open_work(&dir)?, config.userxattr, &config.lacks)?;
                workdir = Some(dir);
                if !work.can.unlink_open {
                    root.layer.hide_leftovers();
                }
                if !work.dir.layer.has_true_numbers() {
                    root.layer.distrust_numbers();
                }
                if config.volatile_mark {
                    mark_volatile(&work.dir)?;
                }
                Some(Upper { root, carrier, work, index: None })
            }
            None => None,
        };
        let mut lowers = Vec::with_capacity(config.lowers.len());
        // Filesystem of the layer before, if it keeps true inode numbers.
        let mut honest = None;
        for ((index, lower), form) in (1..).zip(config.lowers).zip(&forms) {
            let root = layer::Dir::root(index, lower.dir, lower.path, *form, &handles)?;
            // All of one filesystem are alike, but each is told.
            if honest.is_none_or(|device| device != root.device) {
                honest = root.probe_numbers()?.then_some(root.device);
            }
            numbers.register(root.device);
            lowers.push(root);
        }
        let origins = Origins::new(&lowers, config.uuid == Uuid::Off);
        if let (Some(upper), Some(workdir)) = (&mut upper, &workdir) {
            if config.index && (upper.work.can.marks.is_none() || !upper.work.can.link) {
                tracing::warn!(
                    "upperdir: its filesystem cannot hold an index; going on with index=off"
                );
            } else if config.index {
                let index = Index::open(workdir, &upper.work, &upper.root, &lowers, &origins)?;
                upper.index = Some(index);
            }
            if config.uuid == Uuid::On {
                origin::give_uuid(&upper.work, &upper.root)?;
            }
        }
        let mut data_roots = Vec::with_capacity(config.data.len());
        let first = lowers.last().map_or(UPPER, |lower| lower.layer.index) + 1;
        for (index, data) in (first..).zip(config.data) {
            data_roots.push(layer::Dir::root(index, data.dir, data.path, None, &handles)?);
        }
        let idle = NonZeroUsize::new((files / 4).min(IDLE_MAX)).unwrap_or(NonZeroUsize::MIN);
        // Redirects and copies without data are told by marks.
        let marks = upper.as_ref().is_none_or(|upper| upper.work.can.marks.is_some());
        let union = Self {
            table: Table::default(),
            numbers,
            origins,
            upper,
            volatile: config.volatile,
            volatile_mark: config.volatile_mark,
            ids: config.ids,
            forms: match upper_form.is_some() || forms.iter().any(Option::is_some) {
                true => std::iter::once(upper_form).chain(forms).collect(),
                false => Box::default(),
            },
            static_nlink: config.static_nlink,
            copy_limit: config.copy_limit,
            follow: config.follow,
            redirects: config.redirects && marks,
            metacopy: config.metacopy && marks,
            verity: config.verity,
            data_roots: data_roots.into(),
            roots: lowers.clone().into(),
            lowest: lowers.last().map_or(UPPER, |lower| lower.layer.index),
            rename: RwLock::new(()),
            handles,
            idle: Mutex::new(LruCache::new(idle)),
            listed: AtomicUsize::new(0),
            ahead: Ahead::default(),
            poisoned: AtomicBool::new(false),
            interrupts: Interrupts::default(),
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
        };
        union.table.set_root(Arc::new(union.root(lowers)?));
        Ok(union)
    }

    fn root(&self, mut lowers: Vec<Arc<layer::Dir>>) -> Result<Node> {
        let upper = self.upper.as_ref().map(|upper| Arc::clone(&upper.root));
        // An opaque mark on the root of a layer ends the stack there, as on any directory.
        let mut closed = match &upper {
            Some(upper) => lookup::is_closed(upper)?,
            None => false,
        };
        let mut taking_part = 0;
        for lower in &lowers {
            if closed {
                break;
            }
            taking_part += 1;
            closed = lookup::is_closed(lower)?;
        }
        lowers.truncate(taking_part);
        let top = lowers.first().or(upper.as_ref()).ok_or(Errno::STALE)?;
        let ino = self.numbers.of(top.device, top.inode);
        let layer = if upper.is_some() { UPPER } else { 1 };
        let place = Place::new(None, b"", layer, (top.device, top.inode));
        let dir = Dir::new(upper, lowers);
        Ok(Node::new(NodeId::ROOT, ino, FileType::Directory, place).with_dir(dir))
    }

    /// Tells whether a layer that files may be opened in for good lies on kernel overlayfs.
    pub fn is_on_overlay(&self) -> bool {
        const OVERLAYFS_MAGIC: u64 = 0x794c_7630;
        let Ok(root) = self.node(NodeId::ROOT) else { return false };
        let Some(dir) = &root.dir else { return false };
        let is_overlay = |part: &Arc<layer::Dir>| {
            let stat = part.with("fstatfs", |dir| rustix::fs::fstatfs(dir));
            stat.is_ok_and(|stat| u64::try_from(stat.f_type) == Ok(OVERLAYFS_MAGIC))
        };
        match &self.upper {
            Some(upper) => is_overlay(&upper.root),
            None => dir.lowers().iter().any(is_overlay),
        }
    }

    /// Notes that a signal came for whoever waits for `request`; see [`serve`].
    pub fn interrupt(&self, request: u64) {
        self.interrupts.note(request);
    }

    /// Refuses every later change, because a request ended in a way nobody foresaw.
    pub fn poison(&self) {
        self.poisoned.store(true, Ordering::Release);
    }

    /// Tells whether `uid` is the superuser, of the mount's namespace or of the layers'.
    pub fn is_root(&self, uid: OuterId) -> bool {
        self.ids.is_root(uid)
    }

    /// Empties the work directory, when the last request has been answered; of a volatile union
    /// the mark stays, as the kernel's does.
    ///
    /// # Errors
    /// Those of listing and unlinking there.
    pub fn close(&self) -> Result<()> {
        match &self.upper {
            Some(upper) if self.volatile_mark => upper.work.empty_but(MARKER_DIR),
            Some(upper) => upper.work.empty_but(b""),
            None => Ok(()),
        }
    }

    /// Makes everything durable that was written, unless the union is volatile.
    ///
    /// # Errors
    /// Those of syncfs(2).
    pub fn sync_all(&self) -> Result<()> {
        match &self.upper {
            Some(upper) if !self.volatile => upper.root.with("syncfs", |dir| {
                let dir = sys::open::directory(dir, b".")?;
                rustix::fs::syncfs(dir.as_fd())
            }),
            _ => Ok(()),
        }
    }

    fn writable(&self) -> Result<&Upper> {
        if self.poisoned.load(Ordering::Acquire) {
            return Err(Errno::ROFS.into());
        }
        self.upper.as_ref().ok_or_else(|| Errno::ROFS.into())
    }

    fn node(&self, id: NodeId) -> Result<Arc<Node>> {
        self.table.get(id).ok_or_else(|| Errno::STALE.into())
    }

    /// Counts `n` users of a node less, and ends what only they needed.
    fn release(&self, node: &Arc<Node>, n: u64) {
        for freed in self.table.release(node, n) {
            if let Some(dir) = &freed.dir {
                // Nobody else has it any more but, perhaps, the thread that is here.
                let names = dir.names.try_read();
                let listing = names.as_ref().and_then(|names| names.listing.as_ref());
                self.unlisted(listing.map_or(0, |listing| listing.weight()));
            }
            let (held, object) = {
                let mut place = freed.place.write();
                let held = if place.gone { place.take_held() } else { None };
                let object = (place.gone || place.found_origin).then_some(place.object);
                (held, object)
            };
            // The inode number is free to be used again once we let go, of it or of the node.
            if let Some((device, inode)) = object {
                self.numbers.drop_kept(device, inode);
            }
            if held.is_some()
                && let Some(upper) = self.upper.as_ref().filter(|upper| !upper.work.can.unlink_open)
            {
                let data = freed.data.lock().take();
                drop((data, held));
                upper.work.end_gone(freed.id);
            }
        }
    }

    fn unlisted(&self, names: usize) {
        // A count in round numbers: changes of a listing are not counted.
        let less = |listed: usize| Some(listed.saturating_sub(names));
        let counted = self.listed.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        debug_assert!(counted.is_ok(), "there is always a new count");
    }

    /// Calls `call` with the object of a node that is no directory, while no rename can move it.
    ///
    /// Not to be called with the names of its parent locked for writing.
    fn with_leaf<T>(
        &self,
        node: &Arc<Node>,
        op: &'static str,
        mut call: impl FnMut(Leaf<'_>) -> std::result::Result<T, Errno>,
    ) -> Result<T> {
        if let Some(links) = node.links.get() {
            let links = links.lock();
            if links.anchored {
                let upper = self.upper.as_ref().ok_or(Errno::ROFS)?;
                let (dir, name) = upper.anchor(node, &links)?;
                drop(links);
                return dir.call(op, &name, |at| call(Leaf::Name(at)));
            }
        }
        loop {
            let (held, parent) = {
                let place = node.place.read();
                (place.held().cloned(), place.parent.clone())
            };
            if let Some(held) = held {
                return call(Leaf::Handle(held.as_fd())).at(op, || "an object without a name");
            }
            let parent = parent.ok_or(Errno::STALE)?;
            let dir = lock::directory(&parent)?;
            let _names = dir.names.read();
            let (part, name) = {
                let place = node.place.read();
                let moved = !place.parent.as_ref().is_some_and(|now| Arc::ptr_eq(now, &parent));
                if moved || place.held().is_some() {
                    continue;
                }
                (dir.part(place.layer).ok_or(Errno::STALE)?, place.name.clone())
            };
            return part.call(op, &name, |at| call(Leaf::Name(at)));
        }
    }

    /// Calls `call` with a handle of an upper object, and whether it is a symlink.
    fn with_upper_handle<T>(
        &self,
        node: &Arc<Node>,
        op: &'static str,
        mut call: impl FnMut(BorrowedFd<'_>, bool) -> std::result::Result<T, Errno>,
    ) -> Result<T> {
        if let Some(dir) = &node.dir {
            let upper = dir.upper.get().ok_or(Errno::ROFS)?;
            return upper.with(op, |dir| call(dir, false));
        }
        let is_symlink = node.kind == FileType::Symlink;
        let data = node.data.lock().clone();
        if let Some(data) = data.filter(|data| !data.lent) {
            return call(data.file.as_fd(), false).at(op, || "an open file");
        }
        self.with_leaf(node, op, |leaf| match leaf {
            Leaf::Handle(fd) => call(fd, is_symlink),
            Leaf::Name(at) => {
                let handle = sys::open::handle(at.dir, at.name)?;
                call(handle.as_fd(), is_symlink)
            }
        })
    }

    /// Returns where a symlink points.
    ///
    /// # Errors
    /// `EINVAL` if it is none; those of readlinkat(2).
    pub fn readlink(&self, node: NodeId) -> Result<Vec<u8>> {
        let node = self.node(node)?;
        if node.kind != FileType::Symlink {
            return Err(Errno::INVAL.into());
        }
        self.link_target(&node)
    }

    /// Returns where the symlink of a node points; the content of a file that stands for one.
    fn link_target(&self, node: &Arc<Node>) -> Result<Vec<u8>> {
        self.with_leaf(node, "readlinkat", |leaf| {
            let target = match leaf {
                Leaf::Handle(fd) => sys::name::readlink(At::new(fd, b"")),
                Leaf::Name(at) => sys::name::readlink(at),
            };
            // Known as a symlink, but it is none.
            if target != Err(Errno::INVAL) || self.forms.is_empty() {
                return target;
            }
            let file = match leaf {
                Leaf::Handle(fd) => sys::open::reopen(fd, rustix::fs::OFlags::RDONLY),
                Leaf::Name(at) => sys::open::reader(at.dir, at.name),
            }?;
            layer::link_of_file(file.as_fd())
        })
    }
}

/// Where the kernel marks an upper that may be incomplete, in `work`: a directory in a directory.
const MARKER_DIR: &[u8] = b"incompat";
const MARKER: &[u8] = b"volatile";

/// Leaves the mark by which every later mount knows that this one was volatile.
fn mark_volatile(work: &layer::Dir) -> Result<()> {
    work.call("mkdirat", MARKER_DIR, |at| {
        sys::name::mkdir(at, 0o700)?;
        let incompat = sys::open::directory(at.dir, at.name)?;
        sys::name::mkdir(At::new(incompat.as_fd(), MARKER), 0o700)
    })
}

/// How many descriptors the process may have open; a share of it is used for caches.
pub fn descriptor_limit() -> usize {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    limit.and_then(|limit| usize::try_from(limit).ok()).map_or(1 << 16, |limit| limit.min(1 << 16))
}

/// Finds out which lowers override their inodes.
///
/// # Errors
/// `Unsupported` where somebody without privilege could make root of the machine show setuid
/// programs of root: by an xattr on a directory of his own, which nobody asked to be trusted.
fn lower_forms(config: &Config) -> Result<Vec<Option<Form>>> {
    let mut forms = Vec::with_capacity(config.lowers.len());
    for lower in &config.lowers {
        let context = || lower.path.display().to_string();
        let form = layer::form_of(sys::xattr::Target::Handle(lower.dir.as_fd()))
            .at("listxattr", context)?;
        forms.push(form);
        let is_privileged = matches!(form, None | Some(Form::Privileged));
        if is_privileged || config.overrides.is_some() || !sys::process::is_machine_root() {
            continue;
        }
        let owner = sys::stat::of(&lower.dir).at("statx", context)?.stx_uid;
        if owner != 0 {
            let path = lower.path.display();
            let feature = format!(
                "lowerdir={path}: user {owner} says by xattrs whom its files belong to; if he may \
                 say so, add xattr_permissions=2"
            );
            return Err(Error::Unsupported { feature: feature.into() });
        }
    }
    Ok(forms)
}

/// Makes directory `name` in the workdir, if it is not there, and one in which we may work.
fn open_within(workdir: &Arc<layer::Dir>, name: &[u8]) -> Result<Arc<layer::Dir>> {
    if workdir.find(name)?.is_none() {
        workdir.call("mkdirat", name, |at| sys::name::mkdir(at, 0o700))?;
    }
    let stat = workdir.call("openat", name, |at| {
        // The kernel makes it without permissions, which not every owner may ignore.
        let handle = sys::open::handle(at.dir, at.name)?;
        sys::name::chmod_handle(&handle, 0o700)?;
        // What is made in it must inherit nothing.
        for acl in [&b"system.posix_acl_default"[..], b"system.posix_acl_access"] {
            match sys::xattr::remove(sys::xattr::Target::Handle(handle.as_fd()), acl) {
                Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
                Err(errno) => return Err(errno),
            }
        }
        sys::stat::of(&handle)
    })?;
    Ok(workdir.child(name, &stat))
}

/// Makes `work` in the workdir, as the kernel does, and refuses what a volatile mount left.
fn open_work(workdir: &Arc<layer::Dir>) -> Result<Arc<layer::Dir>> {
    let work = open_within(workdir, b"work")?;
    // Its handle is needed again and again.
    work.pin()?;
    let mut marker = None;
    work.with("getdents64", |work| match sys::open::directory(work, MARKER_DIR) {
        Ok(incompat) => sys::name::list(incompat.as_fd(), |name, _, _| {
            marker = Some(String::from_utf8_lossy(name).into_owned());
            Ok(())
        }),
        Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(errno),
    })?;
    let Some(marker) = marker else { return Ok(work) };
    let why = if marker.as_bytes() == MARKER {
        "the last mount was volatile, so its upper layer may be incomplete"
    } else {
        "the last mount had a feature that is not known here"
    };
    Err(Error::Busy {
        what: format!(
            "workdir: {} exists: {why}; discard upperdir and workdir, or remove that directory to \
             use them all the same",
            workdir.layer.path.join("work").join("incompat").join(marker).display()
        )
        .into(),
    })
}
