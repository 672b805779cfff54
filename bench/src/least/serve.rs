//! One request after the other, from what was decoded to what is sent.
//!
//! Answers what lamina answers in its default mode, and refuses for good what lamina does. Setuid bits, xattrs and access
//! lists are not kept: nothing that is measured has them, and asking for them costs a request all the same.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::{FileType, RenameFlags};
use rustix::io::Errno;
use zerocopy::{Immutable, IntoBytes};

use super::abi::{self, Attr, fattr};
use super::decode::{Header, Request};
use super::reply::Reply;
use super::tree::{Body, Data, Directory, FOREVER, Listed, Tree, set_size, touch};

/// What to send.
pub(super) enum Answer {
    /// The kernel wants no answer.
    Nothing,
    /// What was put into the reply.
    Reply,
    /// As much of these bytes of a file as there is.
    Data(Data, Range<usize>),
}

/// The permissions of a mode.
const PERMISSIONS: u32 = 0o7777;

fn lock(tree: &Mutex<Tree>) -> MutexGuard<'_, Tree> {
    tree.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Serves one request.
///
/// # Errors
/// The refusal to send.
pub(super) fn answer(
    tree: &Mutex<Tree>,
    header: &Header,
    request: &Request<'_>,
    reply: &mut Reply,
) -> Result<Answer, Errno> {
    let node = header.node.0;
    let owner = (header.uid, header.gid);
    match *request {
        Request::Forget { count } => {
            lock(tree).forget(node, count);
            return Ok(Answer::Nothing);
        }
        Request::BatchForget(forgets) => {
            let mut tree = lock(tree);
            forgets.for_each(|(node, count)| tree.forget(node.0, count));
            return Ok(Answer::Nothing);
        }
        // All are answered at once.
        Request::Interrupt { .. } => return Ok(Answer::Nothing),
        Request::Read { offset, size } => {
            let data = lock(tree).data(node)?;
            let start = to_usize(offset)?;
            return Ok(Answer::Data(data, start..start.saturating_add(size as usize)));
        }
        Request::Write { offset, data, .. } => write(tree, node, offset, data, reply)?,
        Request::Lookup { name } => put(&lock(tree).lookup(node, name)?, reply)?,
        Request::GetAttr => put_attr(lock(tree).node(node)?.attr, reply)?,
        Request::Statx => {
            let attr = lock(tree).node(node)?.attr;
            put(&statx(&attr), reply)?;
        }
        Request::SetAttr(set) => put_attr(setattr(&mut lock(tree), node, &set)?, reply)?,
        Request::ReadLink => match &lock(tree).node(node)?.body {
            Body::Link(target) => fits(reply.put_bytes(target))?,
            _ => return Err(Errno::INVAL),
        },
        Request::Symlink { name, target } => {
            let mode = (FileType::Symlink.as_raw_mode() | 0o777, 0);
            let made = lock(tree).make(node, Some(name), mode, owner, Body::Link(target.to_vec()));
            put(&made?, reply)?;
        }
        Request::Mknod { name, mode, rdev, umask } => {
            let body = match FileType::from_raw_mode(mode) {
                FileType::RegularFile => Body::File(Data::default()),
                _ => Body::Other,
            };
            let made = lock(tree).make(node, Some(name), (mode & !umask, rdev), owner, body);
            put(&made?, reply)?;
        }
        Request::Mkdir { name, mode, umask } => {
            let mode = FileType::Directory.as_raw_mode() | mode & PERMISSIONS & !umask;
            let body = Body::Directory(Directory::default());
            put(&lock(tree).make(node, Some(name), (mode, 0), owner, body)?, reply)?;
        }
        Request::Tmpfile { mode, umask } => {
            let mode = FileType::RegularFile.as_raw_mode() | mode & PERMISSIONS & !umask;
            let body = Body::File(Data::default());
            put(&lock(tree).make(node, None, (mode, 0), owner, body)?, reply)?;
            put(&abi::OpenOut { open_flags: abi::fopen::KEEP_CACHE, ..Default::default() }, reply)?;
        }
        Request::Unlink { name } => lock(tree).remove(node, name, false)?,
        Request::Rmdir { name } => lock(tree).remove(node, name, true)?,
        Request::Rename { name, new_parent, new_name, flags } => lock(tree).rename(
            (node, name),
            (new_parent.0, new_name),
            RenameFlags::from_bits_retain(flags),
        )?,
        Request::Link { node: linked, name } => {
            put(&lock(tree).link(linked.0, node, name)?, reply)?;
        }
        Request::ReadDir { offset, size, plus } => {
            list(&mut lock(tree), node, (offset, size as usize, plus), reply)?;
        }
        Request::Statfs => {
            let room = 1 << 30;
            let out = abi::StatfsOut {
                blocks: room,
                bfree: room,
                bavail: room,
                files: room,
                ffree: room,
                bsize: 4096,
                namelen: 255,
                frsize: 4096,
                ..Default::default()
            };
            put(&out, reply)?;
        }
        Request::Fallocate { mode: 0, offset, len } => {
            let end = to_usize(offset.saturating_add(len))?;
            let mut tree = lock(tree);
            let data = tree.data(node)?;
            let mut file = data.write().unwrap_or_else(PoisonError::into_inner);
            if file.len() < end {
                file.resize(end, 0);
                set_size(&mut tree.node(node)?.attr, end);
            }
        }
        Request::Lseek { offset, whence } => {
            // All of a file is data.
            let size = lock(tree).node(node)?.attr.size.cast_signed();
            let offset = match whence {
                _ if offset < 0 || offset >= size => return Err(Errno::NXIO),
                SEEK_DATA => offset,
                SEEK_HOLE => size,
                _ => return Err(Errno::INVAL),
            };
            put(&abi::LseekOut { offset }, reply)?;
        }
        // There is no disk.
        Request::Fsync { .. } | Request::FsyncDir | Request::Syncfs => {}
        Request::Release | Request::ReleaseDir | Request::Destroy => {}
        Request::GetXattr { .. } => return Err(Errno::NODATA),
        Request::ListXattr { size: 0 } => put(&abi::GetXattrOut::default(), reply)?,
        Request::ListXattr { .. } => {}
        Request::SetXattr { .. } | Request::RemoveXattr { .. } | Request::Fallocate { .. } => {
            return Err(Errno::OPNOTSUPP);
        }
        Request::Ioctl { .. } => return Err(Errno::NOTTY),
        // As lamina, but for the last but one, which the kernel can do by READ and WRITE.
        Request::Open { .. }
        | Request::OpenDir
        | Request::Create { .. }
        | Request::Flush
        | Request::CopyFileRange(_)
        | Request::Unserved => return Err(Errno::NOSYS),
    }
    Ok(Answer::Reply)
}

/// `whence` of lseek(2).
const SEEK_DATA: u32 = 3;
const SEEK_HOLE: u32 = 4;

fn to_usize(number: u64) -> Result<usize, Errno> {
    usize::try_from(number).map_err(|_| Errno::FBIG)
}

fn fits(fits: bool) -> Result<(), Errno> {
    if fits { Ok(()) } else { Err(Errno::IO) }
}

fn put(value: &(impl IntoBytes + Immutable), reply: &mut Reply) -> Result<(), Errno> {
    fits(reply.put(value))
}

fn put_attr(attr: Attr, reply: &mut Reply) -> Result<(), Errno> {
    put(&abi::AttrOut { attr_valid: FOREVER, attr, ..Default::default() }, reply)
}

/// Memory for one large file. Where a file grows into memory that was never touched, most of the time goes to the faults
/// of that.
static SPARE: Mutex<Vec<u8>> = Mutex::new(Vec::new());

/// Size of that, in bytes.
const SPARE_SIZE: usize = 576 << 20;

/// Files up to this size have no need of it.
const SMALL: usize = 1 << 20;

/// Touches the memory that is kept for a large file.
pub(super) fn prepare() {
    let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
    // With something else than zeroes, which would leave it as it is.
    *spare = vec![1; SPARE_SIZE];
    spare.clear();
}

fn write(
    tree: &Mutex<Tree>,
    node: u64,
    offset: u64,
    data: &[u8],
    reply: &mut Reply,
) -> Result<(), Errno> {
    let offset = to_usize(offset)?;
    let file = lock(tree).data(node)?;
    let size = {
        let mut file = file.write().unwrap_or_else(PoisonError::into_inner);
        if offset > SMALL && offset.saturating_add(data.len()) > file.capacity() {
            let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
            if spare.capacity() > offset {
                spare.extend_from_slice(&file);
                *file = std::mem::take(&mut spare);
            }
        }
        if file.len() < offset {
            file.resize(offset, 0);
        }
        let (over, beyond) = data.split_at(data.len().min(file.len() - offset));
        file[offset..offset + over.len()].copy_from_slice(over);
        file.extend_from_slice(beyond);
        file.len()
    };
    let mut tree = lock(tree);
    let attr = &mut tree.node(node)?.attr;
    set_size(attr, size);
    touch(attr, true);
    put(&abi::WriteOut { size: u32::try_from(data.len()).unwrap_or(0), padding: 0 }, reply)
}

fn setattr(tree: &mut Tree, number: u64, set: &abi::SetAttrIn) -> Result<Attr, Errno> {
    let has = |flag| set.valid & flag != 0;
    let size = has(fattr::SIZE).then(|| to_usize(set.size)).transpose()?;
    if let Some(size) = size {
        tree.data(number)?.write().unwrap_or_else(PoisonError::into_inner).resize(size, 0);
    }
    let attr = &mut tree.node(number)?.attr;
    if has(fattr::MODE) {
        attr.mode = attr.mode & !PERMISSIONS | set.mode & PERMISSIONS;
    }
    if has(fattr::UID) {
        attr.uid = set.uid;
    }
    if has(fattr::GID) {
        attr.gid = set.gid;
    }
    touch(attr, size.is_some());
    if let Some(size) = size {
        set_size(attr, size);
    }
    if has(fattr::ATIME_NOW) {
        (attr.atime, attr.atimensec) = (attr.ctime, attr.ctimensec);
    } else if has(fattr::ATIME) {
        (attr.atime, attr.atimensec) = (set.atime, set.atimensec);
    }
    if has(fattr::MTIME_NOW) {
        (attr.mtime, attr.mtimensec) = (attr.ctime, attr.ctimensec);
    } else if has(fattr::MTIME) {
        (attr.mtime, attr.mtimensec) = (set.mtime, set.mtimensec);
    }
    Ok(*attr)
}

/// Lists a directory from a place on, with entries if `plus`, until a reply of `limit` bytes is full.
fn list(
    tree: &mut Tree,
    dir: u64,
    (mut place, limit, plus): (u64, usize, bool),
    reply: &mut Reply,
) -> Result<(), Errno> {
    while let Some(Listed { place: next, name, node }) = tree.name_after(dir, place)? {
        let entry = tree.entry(node)?;
        let dirent = abi::Dirent {
            ino: entry.attr.ino,
            off: next,
            namelen: u32::try_from(name.len()).unwrap_or(0),
            kind: entry.attr.mode >> 12,
        };
        let is_put = reply.put_name(limit, plus.then_some(&entry), &dirent, &name);
        if !is_put || !plus {
            tree.forget(node, 1);
        }
        if !is_put {
            break;
        }
        place = next;
    }
    Ok(())
}

fn statx(attr: &Attr) -> abi::StatxOut {
    let time = |tv_sec, tv_nsec| abi::SxTime { tv_sec, tv_nsec, reserved: 0 };
    let stat = abi::Statx {
        mask: abi::stx::BASIC_STATS,
        blksize: attr.blksize,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        mode: u16::try_from(attr.mode).unwrap_or(0),
        ino: attr.ino,
        size: attr.size,
        blocks: attr.blocks,
        atime: time(attr.atime, attr.atimensec),
        ctime: time(attr.ctime, attr.ctimensec),
        mtime: time(attr.mtime, attr.mtimensec),
        ..Default::default()
    };
    abi::StatxOut { attr_valid: FOREVER, stat, ..Default::default() }
}
