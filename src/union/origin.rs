//! Origins: which lower object an upper one was copied from, so that it shows the same inode number
//! at the next mount as well.
//!
//! A copy-up writes `overlay.origin`, the file handle of the lower object as the kernel encodes it,
//! and marks the directory above `overlay.impure`. To open a file by its handle takes privilege, so
//! it is never opened: of the filesystems in common use the handle tells the inode number. For others,
//! and where the xattr is empty (the kernel without privilege, filesystems without handles), a lower
//! object under the same name is taken for the origin; a renamed one shows its own number then.
//!
//! An origin decides a number and nothing else. It is looked for in impure directories alone, so
//! that the others cost no call.
//!
//! Locks: those of a lookup. Crash: an impure mark on a directory without copies, which is harmless.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, OnceLock};

use rustix::fs::XattrFlags;

use super::attr::FileType;
use super::index::{self, Indexed};
use super::lookup::{Found, Identity, fact_of};
use super::node::{Dir, Node};
use super::publish::{Work, if_writable};
use super::resolve::Fact;
use super::{Union, Upper};
use crate::error::{Context, Errno, Result};
use crate::layer;
use crate::marks;
use crate::sys;
use crate::sys::handle::{BTRFS_MAGIC, EXT_MAGIC, Handle, XFS_MAGIC};
use crate::sys::name::At;
use crate::sys::stat::Statx;
use crate::sys::xattr::{self, Target};

/// What is written as origin: a handle, and the filesystem that gave it out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Record {
    /// Of the filesystem; zeros if it has none or it is not known.
    pub(super) uuid: [u8; 16],
    pub(super) handle: Handle,
    /// The object lies in the upper layer: so in the marks of an index.
    pub(super) is_upper: bool,
}

const MAGIC: u8 = 0xfb;
/// Bytes before the handle: version, magic, length, flags, type, UUID.
const HEAD: usize = 21;
const BIG_ENDIAN: u8 = 1;
const ANY_ENDIAN: u8 = 2;
const PATH_UPPER: u8 = 4;

impl Record {
    /// Returns the bytes of the record; `None` for a handle that no record can hold.
    ///
    /// # Source
    /// `struct ovl_fb` of the kernel's fs/overlayfs/overlayfs.h.
    pub(super) fn encode(&self) -> Option<Vec<u8>> {
        // The kernel rounds up to whole words.
        let len = u8::try_from(HEAD + self.handle.bytes.len().next_multiple_of(4)).ok()?;
        let kind = u8::try_from(self.handle.kind).ok()?;
        let endian = if cfg!(target_endian = "big") { BIG_ENDIAN } else { 0 };
        let flags = endian | if self.is_upper { PATH_UPPER } else { 0 };
        let mut bytes = vec![0, MAGIC, len, flags, kind];
        bytes.extend_from_slice(&self.uuid);
        bytes.extend_from_slice(&self.handle.bytes);
        bytes.resize(usize::from(len), 0);
        Some(bytes)
    }

    /// Reads a record; `None` for what is none, or one of a machine of the other byte order.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let (head, handle) = bytes.split_at_checked(HEAD)?;
        let [version, magic, len, flags, kind, uuid @ ..] = head else { return None };
        let uuid = uuid.try_into().ok()?;
        let is_whole = usize::from(*len) == bytes.len();
        let is_big = flags & BIG_ENDIAN != 0;
        let is_ours = flags & ANY_ENDIAN != 0 || is_big == cfg!(target_endian = "big");
        if *version != 0 || *magic != MAGIC || !is_whole || !is_ours {
            return None;
        }
        let handle = Handle { kind: i32::from(*kind), bytes: handle.to_vec() };
        Some(Self { uuid, handle, is_upper: flags & PATH_UPPER != 0 })
    }
}

const TMPFS_MAGIC: u64 = 0x0102_1994;
const SQUASHFS_MAGIC: u64 = 0x7371_7368;
const F2FS_MAGIC: u64 = 0xf2f5_2010;
const EROFS_MAGIC: u64 = 0xe0f5_e1e2;

/// Returns the inode number that a handle tells, and on filesystems with several volumes which one;
/// `None` where the layout is not known.
fn inode_of(filesystem: u64, handle: &Handle) -> Option<(u64, u64)> {
    let word = |at: usize| {
        let bytes = handle.bytes.get(at..at + 4)?;
        bytes.try_into().ok().map(u32::from_ne_bytes).map(u64::from)
    };
    let long = |at: usize| {
        let bytes = handle.bytes.get(at..at + 8)?;
        bytes.try_into().ok().map(u64::from_ne_bytes)
    };
    let inode = match (filesystem, handle.kind, handle.bytes.len()) {
        // Inode number and generation, in 32 bits each.
        (EXT_MAGIC | XFS_MAGIC | SQUASHFS_MAGIC | F2FS_MAGIC | EROFS_MAGIC, 1, 8) => word(0)?,
        // The number in two words, the upper one first.
        (EROFS_MAGIC, 0x81, 12) => word(0)? << 32 | word(4)?,
        // The generation comes first, the number in two words.
        (TMPFS_MAGIC, 1, 12) => word(4)? | word(8)? << 32,
        (XFS_MAGIC, 0x81, 12) => long(0)?,
        (BTRFS_MAGIC, 0x4d, 20) => return Some((long(0)?, long(8)?)),
        _ => return None,
    };
    Some((inode, 0))
}

/// The filesystems of the lower layers.
#[derive(Debug)]
pub(super) struct Origins {
    sources: Vec<Source>,
    without_uuid: bool,
}

#[derive(Debug)]
struct Source {
    device: u64,
    /// The root of a layer on it.
    root: Arc<layer::Dir>,
    /// Asked for when an origin is written or found.
    facts: OnceLock<Facts>,
}

#[derive(Debug)]
struct Facts {
    magic: u64,
    uuid: Option<[u8; 16]>,
    /// Handle of the root: tells one volume from another.
    root: Option<Handle>,
}

impl Source {
    fn facts(&self) -> Result<&Facts> {
        if let Some(facts) = self.facts.get() {
            return Ok(facts);
        }
        let facts = self.root.with("statfs", |root| {
            let root = sys::open::directory(root, b".")?;
            let magic = rustix::fs::fstatfs(&root)?.f_type;
            Ok(Facts {
                magic: u64::try_from(magic).unwrap_or(0),
                uuid: sys::handle::filesystem_uuid(root.as_fd())?,
                root: sys::handle::of(root.as_fd())?,
            })
        })?;
        Ok(self.facts.get_or_init(|| facts))
    }

    /// Tells whether the filesystem can have given out the handle of `record`.
    fn is_of(&self, record: &Record, without_uuid: bool) -> Result<bool> {
        // A kernel that does not tell the UUID cannot be asked whether it is the one.
        let uuid = if without_uuid { Some([0; 16]) } else { self.facts()?.uuid };
        Ok(!record.is_upper && uuid.is_none_or(|uuid| uuid == record.uuid))
    }

    /// Returns the inode number of the object that `record` names, if it lies on this filesystem.
    fn find(&self, record: &Record, without_uuid: bool) -> Result<Option<u64>> {
        let facts = self.facts()?;
        if !self.is_of(record, without_uuid)? {
            return Ok(None);
        }
        let volume = |handle| inode_of(facts.magic, handle);
        let Some((inode, at)) = volume(&record.handle) else { return Ok(None) };
        let here = facts.root.as_ref().and_then(volume).map(|(_, volume)| volume);
        Ok((here == Some(at)).then_some(inode))
    }
}

impl Origins {
    /// Takes note of the filesystems that the lower layers lie on.
    pub(super) fn new(lowers: &[Arc<layer::Dir>], without_uuid: bool) -> Self {
        let mut sources: Vec<Source> = Vec::new();
        for root in lowers {
            if !sources.iter().any(|known| known.device == root.device) {
                let root = Arc::clone(root);
                sources.push(Source { device: root.device, root, facts: OnceLock::new() });
            }
        }
        Self { sources, without_uuid }
    }

    /// Returns the record of an object of the filesystem with this UUID.
    pub(super) fn encode(
        &self,
        uuid: Option<[u8; 16]>,
        handle: Handle,
        is_upper: bool,
    ) -> Option<Vec<u8>> {
        let uuid = uuid.filter(|_| !self.without_uuid).unwrap_or_default();
        Record { uuid, handle, is_upper }.encode()
    }

    /// Returns what to write as origin of a copy of `object`, which lies on `device`: empty where
    /// there is no handle to write.
    ///
    /// # Errors
    /// Those of name_to_handle_at(2) and statfs(2).
    pub(super) fn record(&self, device: u64, object: BorrowedFd<'_>) -> Result<Vec<u8>> {
        let handle = sys::handle::of(object).at("name_to_handle_at", || "a lower object")?;
        let source = self.sources.iter().find(|source| source.device == device);
        let (Some(handle), Some(source)) = (handle, source) else { return Ok(Vec::new()) };
        Ok(self.encode(source.facts()?.uuid, handle, false).unwrap_or_default())
    }

    /// Returns device and inode number of the lower object that `record` names; `None` if it is on
    /// none of the filesystems, or perhaps on several.
    fn find(&self, record: &Record) -> Result<Option<(u64, u64)>> {
        let mut found = None;
        for source in &self.sources {
            if let Some(inode) = source.find(record, self.without_uuid)?
                && found.replace((source.device, inode)).is_some()
            {
                return Ok(None);
            }
        }
        Ok(found)
    }
}

impl Union {
    /// Tells what an upper object is by what it was copied from, if that is known.
    ///
    /// `found` is what `name` shows in `dir`; it has no lower part of that name.
    ///
    /// # Errors
    /// Those of listxattr(2) and getxattr(2) on the upper, and of looking at the lowers and the index.
    pub(super) fn identity_by_origin(
        &self,
        dir: &Dir,
        name: &[u8],
        found: &Found,
    ) -> Result<Option<Identity>> {
        let Some(upper) = dir.upper.get() else { return Ok(None) };
        if !upper.is_impure()? {
            return Ok(None);
        }
        let list = upper.call("listxattr", name, |at| xattr::list(Target::Name(at)))?;
        let origin = marks::ORIGIN_XATTRS.iter().find(|xattr| marks::lists_any(&list, &[xattr]));
        let Some(origin) = origin else { return Ok(None) };
        // One of several lower names, of which others may still show the lower object.
        let is_shared = found.parts.is_empty() && marks::lists_any(&list, &marks::NLINK_XATTRS);
        if is_shared && self.index().is_none() {
            return Ok(None);
        }
        let value = upper.call("getxattr", name, |at| xattr::get(Target::Name(at), origin))?;
        let Some(value) = value else { return Ok(None) };
        let record = Record::parse(&value);
        let object = match &record {
            Some(record) => match self.origins.find(record)? {
                None => same_name(dir, name, found, Some(&record.handle), 1)?.map(object_of),
                object => object,
            },
            // The other names of the file would not lead there.
            None if value.is_empty() && !has_other_names(&found.stat) => {
                same_name(dir, name, found, None, 1)?.map(object_of)
            }
            None => None,
        };
        let Some((device, inode)) = object else { return Ok(None) };
        let number = self.numbers.of(device, inode);
        // One with other names may be protected under one of them before it is known under this.
        let unprotected =
            !has_other_names(&found.stat) && !marks::lists_any(&list, &marks::PROTATTR_XATTRS);
        let mut identity = Identity { on_disk: true, unprotected, ..Identity::of(number) };
        if let (true, Some(record)) = (is_shared, &record) {
            identity.asked = Some(self.table.deaths(number));
            let links = || self.links_of_origin(dir, name, found, record);
            identity.indexed = self.indexed(&value, &found.stat, links)?;
            let is_it = |indexed: &Indexed| object_of(indexed.stat) == object_of(found.stat);
            if !identity.indexed.as_ref().is_some_and(is_it) {
                return Ok(None);
            }
        }
        Ok(Some(identity))
    }

    /// Returns how many names the lower file of `record` has, if it can be looked at: by its
    /// handle, which takes privilege, or under the name of the upper one.
    fn links_of_origin(
        &self,
        dir: &Dir,
        name: &[u8],
        found: &Found,
        record: &Record,
    ) -> Result<Option<u32>> {
        let handle = &record.handle;
        for source in &self.origins.sources {
            if !source.is_of(record, self.origins.without_uuid)? {
                continue;
            }
            let opened = source.root.with("open_by_handle_at", |root| {
                sys::handle::open(sys::open::directory(root, b".")?.as_fd(), handle)
            })?;
            if let Some(object) = opened {
                let stat = sys::stat::of(&object).at("statx", || "a lower object")?;
                return Ok(Some(stat.stx_nlink));
            }
        }
        let stat = same_name(dir, name, found, Some(handle), u32::MAX)?;
        Ok(stat.map(|stat| stat.stx_nlink))
    }

    /// Writes where a copy in work comes from, if the kernel would, and for a file with several names
    /// how many there are. Returns what the copy is to be known by.
    ///
    /// # Errors
    /// Those of the calls, but not that an xattr cannot be had there.
    pub(super) fn set_origin(
        &self,
        upper: &Upper,
        (source, stat): (BorrowedFd<'_>, &Statx),
        copy: Target<'_>,
    ) -> Result<Origin> {
        let is_shared = has_other_names(stat);
        if is_shared && upper.index.is_none() || upper.work.can.marks.is_none() {
            return Ok(Origin::None);
        }
        let record = self.origins.record(sys::stat::device(stat), source)?;
        let name = upper.work.namespace.of(&marks::ORIGIN_XATTRS);
        let set = || xattr::set(copy, name, &record, XattrFlags::empty());
        let is_set = set().or_else(|errno| match copy {
            // An upper one already, which its owner may not be allowed to write to.
            Target::Directory(dir) => if_writable(errno, At::new(dir, b"."), set),
            Target::Open(_) | Target::Handle(_) | Target::Name(_) => Err(errno),
        });
        match is_set {
            Ok(()) => {}
            // Of a symlink or device in the user namespace; a filesystem without xattrs.
            Err(Errno::PERM | Errno::OPNOTSUPP) => return Ok(Origin::None),
            Err(errno) => return Err(errno).at("setxattr", || "the origin of a copy in work"),
        }
        if !is_shared {
            let object =
                Record::parse(&record).map_or(Ok(None), |record| self.origins.find(&record));
            return Ok(Origin::Written { tells_number: object? == Some(object_of(*stat)) });
        }
        upper.write_first_count(copy, stat.stx_nlink)?;
        Ok(Origin::Indexed(index::name_of(&record)))
    }

    /// Writes where a directory comes from that is about to lose its lower parts, if that is not
    /// written yet: an upper layer made by hand has no such mark.
    ///
    /// # Errors
    /// Those of the calls.
    pub(super) fn complete_origin(&self, upper: &Upper, node: &Node, dir: &Dir) -> Result<()> {
        let lowers = dir.lowers();
        let (Some(part), Some(lower)) = (dir.upper.get(), lowers.first()) else { return Ok(()) };
        let list = part.with("listxattr", |dir| xattr::list(Target::Handle(dir)))?;
        if marks::lists_any(&list, &marks::ORIGIN_XATTRS) {
            return Ok(());
        }
        let (source, copy) = (lower.handle()?, part.handle()?);
        self.set_origin(upper, (source.as_fd(), &lower.stat()?), Target::Directory(copy.as_fd()))?;
        let parent = node.place.read().parent.clone();
        let above = parent.as_ref().and_then(|parent| parent.dir.as_ref()?.upper.get());
        above.map_or(Ok(()), |above| upper.work.set_impure(above))
    }

    /// Marks an upper directory impure that an object is about to appear in, if the object shows
    /// the number of another.
    ///
    /// # Errors
    /// Those of setxattr(2).
    pub(super) fn pass_on_origin(&self, upper: &Upper, node: &Node, to: &layer::Dir) -> Result<()> {
        let (device, inode) = node.place.read().object;
        let is_merged = node.dir.as_ref().is_some_and(|dir| !dir.lowers().is_empty());
        if is_merged || !self.numbers.is_own(device, inode, node.ino) {
            upper.work.set_impure(to)?;
        }
        Ok(())
    }

    /// Marks an upper directory that an object is about to appear in, if the object is a whiteout of
    /// a nested overlay.
    ///
    /// # Errors
    /// Those of setxattr(2).
    pub(super) fn pass_on_whiteout(
        &self,
        upper: &Upper,
        stat: &Statx,
        to: &layer::Dir,
    ) -> Result<()> {
        // Where files stand for devices, an empty one need not be a whiteout.
        let is_nested = upper.carrier.is_none() && sys::stat::is_whiteout(stat);
        if is_nested { upper.work.set_nested(to) } else { Ok(()) }
    }
}

/// What a copy is known by at the next mount.
#[derive(Debug)]
pub(super) enum Origin {
    /// Itself.
    None,
    /// What it was copied from; whether that tells its number, under whatever name it is found.
    Written { tells_number: bool },
    /// The same, and it is to be this entry of the index.
    Indexed(index::Name),
}

impl Origin {
    /// Tells whether the number of the copy can be found again on the disk.
    pub(super) fn lasts(&self) -> bool {
        matches!(self, Self::Indexed(_) | Self::Written { tells_number: true })
    }
}

/// Tells whether an object has several names: a copy of it would not show its number, which the
/// others may go on showing.
fn has_other_names(stat: &Statx) -> bool {
    let kind = FileType::of_mode(u32::from(stat.stx_mode));
    kind != FileType::Directory && stat.stx_nlink > 1
}

/// Writes a UUID of its own on the root of the upper, unless it has one.
///
/// # Errors
/// Those of setxattr(2).
pub(super) fn give_uuid(work: &Work, upper: &layer::Dir) -> Result<()> {
    let name = work.namespace.of(&marks::UUID_XATTRS);
    upper.with("setxattr", |dir| {
        let dir = Target::Handle(dir);
        if xattr::get(dir, name)?.is_some_and(|uuid| uuid.len() == 16) {
            return Ok(());
        }
        // Of the random kind.
        let random: u128 = rand::random();
        let uuid = random & !(0xf << 76 | 3 << 62) | 4 << 76 | 2 << 62;
        xattr::set(dir, name, &uuid.to_be_bytes(), XattrFlags::empty())
    })
}

fn object_of(stat: Statx) -> (u64, u64) {
    (sys::stat::device(&stat), stat.stx_ino)
}

/// Returns the lower object that the upper one hides, if that is what it can have been copied from:
/// it has the same type, at most `links` names and, if there is a handle, that one. With one name
/// the upper one may have no other either: under that the lower one would not be found.
fn same_name(
    dir: &Dir,
    name: &[u8],
    found: &Found,
    handle: Option<&Handle>,
    links: u32,
) -> Result<Option<Statx>> {
    let kind = FileType::of_mode(u32::from(found.stat.stx_mode));
    if kind == FileType::Directory || links == 1 && found.stat.stx_nlink > 1 {
        return Ok(None);
    }
    for part in dir.lowers() {
        let Some(mut stat) = part.find(name)? else { continue };
        let is_like =
            FileType::of_mode(u32::from(stat.stx_mode)) == kind && stat.stx_nlink <= links;
        if !is_like || fact_of(part, name, &mut stat)? != Fact::Leaf {
            return Ok(None);
        }
        if let Some(handle) = handle {
            let own = part.call("name_to_handle_at", name, |at| {
                sys::handle::of(sys::open::handle(at.dir, at.name)?.as_fd())
            })?;
            if own.as_ref() != Some(handle) {
                return Ok(None);
            }
        }
        return Ok(Some(stat));
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::union::{NodeId, RenameFlags, SetAttr, open_in};
    use proptest::prelude::*;

    fn handle(kind: i32, bytes: &[u8]) -> Handle {
        Handle { kind, bytes: bytes.to_vec() }
    }

    #[test]
    fn a_record_is_laid_out_as_the_kernel_has_it() {
        let record = Record {
            uuid: *b"0123456789abcdef",
            handle: handle(1, b"\x0c\0\0\0\x01\x02\x03\x04"),
            is_upper: true,
        };
        let bytes = record.encode().unwrap();
        let head = if cfg!(target_endian = "big") { 5 } else { 4 };
        assert_eq!(bytes[..5], [0, 0xfb, 29, head, 1]);
        assert_eq!(bytes[5..], *b"0123456789abcdef\x0c\0\0\0\x01\x02\x03\x04");
        assert_eq!(Record::parse(&bytes), Some(record));
    }

    #[test]
    fn what_is_no_record_is_refused() {
        let good = Record { uuid: [7; 16], handle: handle(1, &[0; 8]), is_upper: false };
        let good = good.encode().unwrap();
        assert!(Record::parse(&good).is_some());
        assert_eq!(Record::parse(b""), None);
        assert_eq!(Record::parse(&good[..28]), None);
        for (at, value) in [(0, 1), (1, 0xfa), (2, 28), (3, if good[3] == 0 { 1 } else { 0 })] {
            let mut bad = good.clone();
            bad[at] = value;
            assert_eq!(Record::parse(&bad), None, "byte {at}");
        }
        let long = Record { uuid: [0; 16], handle: handle(1, &[0; 256]), is_upper: false };
        assert_eq!(long.encode(), None);
    }

    #[test]
    fn handles_tell_the_inode_number() {
        let long = |n: u64| n.to_ne_bytes();
        let word = |n: u32| n.to_ne_bytes();
        let small = [word(12), word(99)].concat();
        let tmpfs = [word(99), word(12), word(1)].concat();
        let xfs = [&long(1 << 40)[..], &word(99)].concat();
        let erofs = [word(1), word(12), word(99)].concat();
        let btrfs = [&long(257)[..], &long(5), &word(9)].concat();
        for (filesystem, kind, bytes, inode) in [
            (EXT_MAGIC, 1, &small, Some((12, 0))),
            (XFS_MAGIC, 1, &small, Some((12, 0))),
            (XFS_MAGIC, 0x81, &xfs, Some((1 << 40, 0))),
            (TMPFS_MAGIC, 1, &tmpfs, Some((12 | 1 << 32, 0))),
            (BTRFS_MAGIC, 0x4d, &btrfs, Some((257, 5))),
            (EROFS_MAGIC, 1, &small, Some((12, 0))),
            (EROFS_MAGIC, 0x81, &erofs, Some((12 | 1 << 32, 0))),
            // Of an overlay or a FUSE filesystem it tells nothing that lasts.
            (0x794c_7630, 0xf8, &small, None),
            (0x6573_5546, 0x81, &xfs, None),
            (EXT_MAGIC, 2, &small, None),
        ] {
            assert_eq!(inode_of(filesystem, &handle(kind, bytes)), inode, "{filesystem:x} {kind}");
        }
    }

    #[test]
    fn the_number_of_a_copy_is_found_again_and_not_remembered() {
        let place = tempfile::tempdir().unwrap();
        let union = open_in(place.path(), |_| ());
        let source = union.origins.sources.first().unwrap();
        let Some((facts, root)) = source.facts().ok().and_then(|it| Some((it, it.root.as_ref()?)))
        else {
            return;
        };
        if inode_of(facts.magic, root).is_none() {
            return;
        }
        let look = || union.lookup(NodeId::ROOT, b"name").unwrap().unwrap();
        let first = look();
        let change = SetAttr { mode: Some(0o600), ..SetAttr::default() };
        union.setattr(first.node, &change).unwrap();
        assert_eq!(union.numbers.remembered(), 1);
        union.forget(first.node, 1);
        assert_eq!(union.numbers.remembered(), 0);
        union.rename(NodeId::ROOT, b"name", NodeId::ROOT, b"other", RenameFlags::empty()).unwrap();
        let again = union.lookup(NodeId::ROOT, b"other").unwrap().unwrap();
        assert_eq!((again.attr.ino, again.attr.mode & 0o7777), (first.attr.ino, 0o600));
        assert_ne!(again.node, first.node);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_harm(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Some(record) = Record::parse(&bytes) {
                for filesystem in [EXT_MAGIC, XFS_MAGIC, TMPFS_MAGIC, BTRFS_MAGIC] {
                    let _ = inode_of(filesystem, &record.handle);
                }
                prop_assert!(record.encode().is_some());
            }
        }
    }
}
