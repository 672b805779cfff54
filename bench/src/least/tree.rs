//! A tree in memory: what files, directories and links are, without a word about requests.
//!
//! One lock guards it, held for one change or look; contents of files have locks of their own, so that no copy of data
//! keeps other requests waiting.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Arc, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{FileType, RenameFlags};
use rustix::io::Errno;

use super::abi::{Attr, EntryOut};

/// How long the kernel may keep what it is told: as long as with lamina, for ever.
pub(super) const FOREVER: u64 = u32::MAX as u64;

/// The number of the root towards the kernel.
const ROOT: u64 = 1;

/// Added to the inode numbers of what is made; none in a layer is as large.
const NEW: u64 = 1 << 48;

/// What is in a file.
pub(super) type Data = Arc<RwLock<Vec<u8>>>;

/// A whole tree.
pub(super) struct Tree {
    /// By number; a number is never used twice.
    nodes: Vec<Option<Node>>,
}

/// One object.
pub(super) struct Node {
    pub(super) attr: Attr,
    pub(super) body: Body,
    /// As many as the kernel will take back.
    lookups: u64,
}

/// What an object is.
pub(super) enum Body {
    File(Data),
    Directory(Directory),
    Link(Vec<u8>),
    Other,
}

/// Names, without `.` and `..`, in the order they were made in, which a listing can be continued by whatever comes and goes.
#[derive(Default)]
pub(super) struct Directory {
    places: HashMap<Arc<[u8]>, u64>,
    names: BTreeMap<u64, (Arc<[u8]>, u64)>,
    last: u64,
}

/// A name in a directory.
pub(super) struct Listed {
    /// Where the next one comes after.
    pub(super) place: u64,
    pub(super) name: Arc<[u8]>,
    /// What it names.
    pub(super) node: u64,
}

impl Directory {
    fn find(&self, name: &[u8]) -> Option<u64> {
        Some(self.names.get(self.places.get(name)?)?.1)
    }

    fn insert(&mut self, name: &[u8], node: u64) {
        let name = Arc::<[u8]>::from(name);
        self.last += 1;
        if let Some(before) = self.places.insert(Arc::clone(&name), self.last) {
            self.names.remove(&before);
        }
        self.names.insert(self.last, (name, node));
    }

    fn remove(&mut self, name: &[u8]) {
        if let Some(place) = self.places.remove(name) {
            self.names.remove(&place);
        }
    }
}

/// Now, in seconds and nanoseconds.
fn now() -> (i64, u32) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    (i64::try_from(now.as_secs()).unwrap_or(i64::MAX), now.subsec_nanos())
}

/// Sets the times of what was changed.
pub(super) fn touch(attr: &mut Attr, is_modified: bool) {
    (attr.ctime, attr.ctimensec) = now();
    if is_modified {
        (attr.mtime, attr.mtimensec) = (attr.ctime, attr.ctimensec);
    }
}

/// Sets the size of a file, and what goes with it.
pub(super) fn set_size(attr: &mut Attr, size: usize) {
    attr.size = size as u64;
    attr.blocks = attr.size.div_ceil(512);
}

impl Tree {
    /// Reads the merged tree of `layers`, topmost first, into memory.
    ///
    /// # Errors
    /// If a layer cannot be read.
    pub(super) fn load(layers: &[PathBuf]) -> io::Result<Tree> {
        let mut tree = Tree { nodes: Vec::from([None]) };
        let top = layers.first().ok_or_else(|| io::Error::other("no layers"))?;
        tree.add(attributes(&fs::metadata(top)?), Body::Directory(Directory::default()));
        tree.load_directory(ROOT, layers)?;
        Ok(tree)
    }

    fn load_directory(&mut self, dir: u64, layers: &[PathBuf]) -> io::Result<()> {
        let mut below: BTreeMap<u64, Vec<PathBuf>> = BTreeMap::new();
        for layer in layers {
            for entry in fs::read_dir(layer)? {
                let (entry, path) = entry.map(|entry| (entry.file_name(), entry.path()))?;
                let meta = fs::symlink_metadata(&path)?;
                if let Some(node) = self.find(dir, entry.as_bytes())? {
                    if let Some(parts) = below.get_mut(&node).filter(|_| meta.is_dir()) {
                        parts.push(path);
                    }
                    continue;
                }
                let body = match meta.file_type() {
                    kind if kind.is_dir() => Body::Directory(Directory::default()),
                    kind if kind.is_file() => Body::File(Arc::new(RwLock::new(fs::read(&path)?))),
                    kind if kind.is_symlink() => {
                        Body::Link(fs::read_link(&path)?.as_os_str().as_bytes().to_vec())
                    }
                    _ => Body::Other,
                };
                let node = self.add(attributes(&meta), body);
                self.directory(dir)?.1.insert(entry.as_bytes(), node);
                if meta.is_dir() {
                    below.insert(node, vec![path]);
                }
            }
        }
        below.into_iter().try_for_each(|(node, parts)| self.load_directory(node, &parts))
    }

    /// Takes an object in, and returns its number.
    fn add(&mut self, attr: Attr, body: Body) -> u64 {
        let number = self.nodes.len() as u64;
        // One from a layer shows the number that it has there, as with lamina: git looks at a file again where it differs.
        let ino = if attr.ino == 0 { number | NEW } else { attr.ino };
        let attr = Attr { ino, ..attr };
        self.nodes.push(Some(Node { attr, body, lookups: 0 }));
        number
    }

    /// Returns an object.
    ///
    /// # Errors
    /// `ESTALE` for a number that the kernel should have forgotten.
    pub(super) fn node(&mut self, number: u64) -> Result<&mut Node, Errno> {
        let index = usize::try_from(number).unwrap_or(usize::MAX);
        self.nodes.get_mut(index).and_then(Option::as_mut).ok_or(Errno::STALE)
    }

    /// Returns a directory and its attributes.
    fn directory(&mut self, number: u64) -> Result<(&mut Attr, &mut Directory), Errno> {
        match self.node(number)? {
            Node { attr, body: Body::Directory(directory), .. } => Ok((attr, directory)),
            _ => Err(Errno::NOTDIR),
        }
    }

    fn find(&mut self, dir: u64, name: &[u8]) -> Result<Option<u64>, Errno> {
        Ok(self.directory(dir)?.1.find(name))
    }

    fn find_existing(&mut self, dir: u64, name: &[u8]) -> Result<u64, Errno> {
        self.find(dir, name)?.ok_or(Errno::NOENT)
    }

    /// Returns what the kernel is told of an object that it asked for by name; it will take that back.
    pub(super) fn entry(&mut self, number: u64) -> Result<EntryOut, Errno> {
        let node = self.node(number)?;
        node.lookups += 1;
        Ok(EntryOut {
            nodeid: number,
            entry_valid: FOREVER,
            attr_valid: FOREVER,
            attr: node.attr,
            ..Default::default()
        })
    }

    /// Looks a name up; an entry without a number is an absence.
    pub(super) fn lookup(&mut self, dir: u64, name: &[u8]) -> Result<EntryOut, Errno> {
        match self.find(dir, name)? {
            Some(number) => self.entry(number),
            None => Ok(EntryOut { entry_valid: FOREVER, ..Default::default() }),
        }
    }

    /// Takes lookups back.
    pub(super) fn forget(&mut self, number: u64, count: u64) {
        if let Ok(node) = self.node(number) {
            node.lookups = node.lookups.saturating_sub(count);
            self.drop_unused(number);
        }
    }

    fn drop_unused(&mut self, number: u64) {
        let is_unused =
            |node: &mut Node| number != ROOT && node.attr.nlink == 0 && node.lookups == 0;
        if self.node(number).is_ok_and(is_unused)
            && let Some(node) = self.nodes.get_mut(number as usize)
        {
            *node = None;
        }
    }

    /// Makes an object of `owner`; without a name it is gone with the last lookup.
    ///
    /// # Errors
    /// `EEXIST`.
    pub(super) fn make(
        &mut self,
        dir: u64,
        name: Option<&[u8]>,
        (mode, rdev): (u32, u32),
        (uid, gid): (u32, u32),
        body: Body,
    ) -> Result<EntryOut, Errno> {
        let mut attr =
            Attr { mode, uid, gid, rdev, nlink: 1, blksize: BLOCK, ..Default::default() };
        touch(&mut attr, true);
        (attr.atime, attr.atimensec) = (attr.mtime, attr.mtimensec);
        if let Body::Link(target) = &body {
            attr.size = target.len() as u64;
        }
        let Some(name) = name else {
            let number = self.add(Attr { nlink: 0, ..attr }, body);
            return self.entry(number);
        };
        if self.find(dir, name)?.is_some() {
            return Err(Errno::EXIST);
        }
        let number = self.add(attr, body);
        self.insert(dir, name, number)?;
        self.entry(number)
    }

    fn insert(&mut self, dir: u64, name: &[u8], number: u64) -> Result<(), Errno> {
        let (attr, directory) = self.directory(dir)?;
        directory.insert(name, number);
        touch(attr, true);
        Ok(())
    }

    /// Gives an object one more name.
    pub(super) fn link(&mut self, number: u64, dir: u64, name: &[u8]) -> Result<EntryOut, Errno> {
        if self.find(dir, name)?.is_some() {
            return Err(Errno::EXIST);
        }
        let node = self.node(number)?;
        node.attr.nlink += 1;
        touch(&mut node.attr, false);
        self.insert(dir, name, number)?;
        self.entry(number)
    }

    /// Removes a name, that of a directory if `is_directory`.
    ///
    /// # Errors
    /// Those of unlink(2) and rmdir(2).
    pub(super) fn remove(
        &mut self,
        dir: u64,
        name: &[u8],
        is_directory: bool,
    ) -> Result<(), Errno> {
        let number = self.find_existing(dir, name)?;
        self.check_replaced(number, is_directory)?;
        let (attr, directory) = self.directory(dir)?;
        directory.remove(name);
        touch(attr, true);
        self.unlinked(number)
    }

    /// Tells whether an object may go in favour of a directory, or of something else.
    fn check_replaced(&mut self, number: u64, is_directory: bool) -> Result<(), Errno> {
        match (&self.node(number)?.body, is_directory) {
            (Body::Directory(directory), true) if directory.names.is_empty() => Ok(()),
            (Body::Directory(_), true) => Err(Errno::NOTEMPTY),
            (Body::Directory(_), false) => Err(Errno::ISDIR),
            (_, true) => Err(Errno::NOTDIR),
            (_, false) => Ok(()),
        }
    }

    fn unlinked(&mut self, number: u64) -> Result<(), Errno> {
        let node = self.node(number)?;
        node.attr.nlink = node.attr.nlink.saturating_sub(1);
        touch(&mut node.attr, false);
        self.drop_unused(number);
        Ok(())
    }

    /// Renames or exchanges.
    ///
    /// # Errors
    /// Those of renameat2(2); `EINVAL` for `RENAME_WHITEOUT`.
    pub(super) fn rename(
        &mut self,
        (from, name): (u64, &[u8]),
        (to, new_name): (u64, &[u8]),
        flags: RenameFlags,
    ) -> Result<(), Errno> {
        let number = self.find_existing(from, name)?;
        let replaced = self.find(to, new_name)?;
        match flags {
            RenameFlags::EXCHANGE => {
                self.insert(from, name, replaced.ok_or(Errno::NOENT)?)?;
            }
            RenameFlags::NOREPLACE if replaced.is_some() => return Err(Errno::EXIST),
            _ if flags.difference(RenameFlags::NOREPLACE).is_empty() => {
                if let Some(replaced) = replaced {
                    if replaced == number {
                        return Ok(());
                    }
                    let is_directory = matches!(self.node(number)?.body, Body::Directory(_));
                    self.check_replaced(replaced, is_directory)?;
                    self.unlinked(replaced)?;
                }
                let (attr, directory) = self.directory(from)?;
                directory.remove(name);
                touch(attr, true);
            }
            _ => return Err(Errno::INVAL),
        }
        self.insert(to, new_name, number)
    }

    /// Returns the data of a file.
    pub(super) fn data(&mut self, number: u64) -> Result<Data, Errno> {
        match &self.node(number)?.body {
            Body::File(data) => Ok(Arc::clone(data)),
            Body::Directory(_) => Err(Errno::ISDIR),
            Body::Link(_) | Body::Other => Err(Errno::INVAL),
        }
    }

    /// Returns the first name in a directory after a place.
    pub(super) fn name_after(&mut self, dir: u64, place: u64) -> Result<Option<Listed>, Errno> {
        let next = self.directory(dir)?.1.names.range(place + 1..).next();
        Ok(next.map(|(&place, (name, node))| Listed { place, name: name.clone(), node: *node }))
    }
}

/// What is told as the best size of I/O, in bytes.
const BLOCK: u32 = 4096;

fn attributes(meta: &fs::Metadata) -> Attr {
    let nanos = |n: i64| u32::try_from(n).unwrap_or(0);
    let kind = FileType::from_raw_mode(meta.mode());
    Attr {
        ino: meta.ino(),
        size: meta.size(),
        blocks: meta.blocks(),
        atime: meta.atime(),
        mtime: meta.mtime(),
        ctime: meta.ctime(),
        atimensec: nanos(meta.atime_nsec()),
        mtimensec: nanos(meta.mtime_nsec()),
        ctimensec: nanos(meta.ctime_nsec()),
        mode: kind.as_raw_mode() | meta.mode() & 0o7777,
        nlink: 1,
        uid: meta.uid(),
        gid: meta.gid(),
        rdev: 0,
        blksize: BLOCK,
        flags: 0,
    }
}
