//! Stub with the public API only.
#![allow(missing_docs, unused_variables)]
use crate::error::{Errno, Result};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
pub use rustix::fs::{RenameFlags, XattrFlags, StatVfs};
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)] pub struct NodeId(pub u64);
impl NodeId { pub const ROOT: Self = Self(1); }
#[derive(Clone, Copy, Debug, PartialEq, Eq)] pub struct Time { pub sec: i64, pub nsec: u32 }
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FileType { Regular, Directory, Symlink, Fifo, Socket, CharDevice, BlockDevice }
#[derive(Clone, Debug)]
pub struct Attr { pub ino: u64, pub size: u64, pub blocks: u64, pub blksize: u32, pub mode: u32, pub nlink: u32, pub uid: u32, pub gid: u32, pub rdev_major: u32, pub rdev_minor: u32, pub atime: Time, pub mtime: Time, pub ctime: Time, pub btime: Time }
impl Attr { pub fn kind(&self) -> FileType { FileType::Regular } }
#[derive(Clone, Debug)] pub struct Entry { pub node: NodeId, pub attr: Attr }
#[derive(Clone, Copy, Debug)] pub struct Caller { pub uid: u32, pub gid: u32, pub umask: u32 }
#[derive(Clone, Copy, Debug)] pub enum SetTime { Now, At(Time) }
#[derive(Default, Clone, Debug)]
pub struct SetAttr { pub mode: Option<u32>, pub uid: Option<u32>, pub gid: Option<u32>, pub size: Option<u64>, pub atime: Option<SetTime>, pub mtime: Option<SetTime>, pub kill_privileges: bool }
pub struct DirEntry<'a> { pub name: &'a [u8], pub ino: u64, pub kind: FileType, pub offset: u64 }
#[derive(Clone, Copy, PartialEq, Eq, Debug)] pub enum Visit { Taken, Full }
#[derive(Clone, Copy, PartialEq, Eq, Debug)] pub enum Whence { Data, Hole }
pub struct Config { pub lowers: Vec<LayerSpec>, pub upper: Option<UpperSpec>, pub volatile: bool, pub userxattr: bool }
pub struct LayerSpec { pub dir: OwnedFd, pub path: PathBuf }
pub struct UpperSpec { pub dir: OwnedFd, pub work: OwnedFd, pub path: PathBuf, pub work_path: PathBuf }
pub struct Union {}
type VisitPlain<'a> = &'a mut dyn FnMut(DirEntry<'_>) -> Visit;
type VisitPlus<'a> = &'a mut dyn FnMut(DirEntry<'_>, Option<&Entry>) -> Visit;
impl Union {
    pub fn open(config: Config) -> Result<Union> { Err(Errno::NOSYS.into()) }
    pub fn lookup(&self, parent: NodeId, name: &[u8]) -> Result<Option<Entry>> { Err(Errno::NOSYS.into()) }
    pub fn forget(&self, node: NodeId, count: u64) {  }
    pub fn node_by_ino(&self, ino: u64) -> Option<NodeId> { None }
    pub fn getattr(&self, node: NodeId) -> Result<Attr> { Err(Errno::NOSYS.into()) }
    pub fn setattr(&self, node: NodeId, set: &SetAttr) -> Result<Attr> { Err(Errno::NOSYS.into()) }
    pub fn readlink(&self, node: NodeId) -> Result<Vec<u8>> { Err(Errno::NOSYS.into()) }
    pub fn mknod(&self, caller: &Caller, parent: NodeId, name: &[u8], mode: u32 , rdev: (u32 , u32 )) -> Result<Entry> { Err(Errno::NOSYS.into()) }
    pub fn mkdir(&self, caller: &Caller, parent: NodeId, name: &[u8], mode: u32) -> Result<Entry> { Err(Errno::NOSYS.into()) }
    pub fn symlink(&self, caller: &Caller, parent: NodeId, name: &[u8], target: &[u8]) -> Result<Entry> { Err(Errno::NOSYS.into()) }
    pub fn link(&self, node: NodeId, new_parent: NodeId, new_name: &[u8]) -> Result<Entry> { Err(Errno::NOSYS.into()) }
    pub fn unlink(&self, parent: NodeId, name: &[u8]) -> Result<()> { Err(Errno::NOSYS.into()) }
    pub fn rmdir(&self, parent: NodeId, name: &[u8]) -> Result<()> { Err(Errno::NOSYS.into()) }
    pub fn rename(&self, parent: NodeId, name: &[u8], new_parent: NodeId, new_name: &[u8], flags: RenameFlags) -> Result<()> { Err(Errno::NOSYS.into()) }
    pub fn open_file(&self, node: NodeId, write: bool) -> Result<()> { Err(Errno::NOSYS.into()) }
    pub fn release_file(&self, node: NodeId) {  }
    pub fn create(&self, caller: &Caller, parent: NodeId, name: &[u8], mode: u32) -> Result<Entry> { Err(Errno::NOSYS.into()) }
    pub fn read(&self, node: NodeId, offset: u64, buf: &mut [u8]) -> Result<usize> { Err(Errno::NOSYS.into()) }
    pub fn write(&self, node: NodeId, offset: u64, data: &[u8], kill_privileges: bool) -> Result<usize> { Err(Errno::NOSYS.into()) }
    pub fn fsync(&self, node: NodeId, data_only: bool) -> Result<()> { Err(Errno::NOSYS.into()) }
    pub fn flush(&self, node: NodeId) -> Result<()> { Err(Errno::NOSYS.into()) }
    pub fn fallocate(&self, node: NodeId, mode: u32, offset: u64, len: u64) -> Result<()> { Err(Errno::NOSYS.into()) }
    pub fn lseek(&self, node: NodeId, offset: u64, whence: Whence ) -> Result<u64> { Err(Errno::NOSYS.into()) }
    pub fn copy_file_range(&self, from: NodeId, from_offset: u64, to: NodeId, to_offset: u64, len: u64) -> Result<usize> { Err(Errno::NOSYS.into()) }
    pub fn open_dir(&self, node: NodeId) -> Result<()> { Err(Errno::NOSYS.into()) }
    pub fn release_dir(&self, node: NodeId) {  }
    pub fn readdir(&self, node: NodeId, offset: u64, visit: VisitPlain<'_>) -> Result<()> { Err(Errno::NOSYS.into()) }
    pub fn readdirplus(&self, node: NodeId, offset: u64, visit: VisitPlus<'_>) -> Result<()> { Err(Errno::NOSYS.into()) }
    pub fn sync_dir(&self, node: NodeId) -> Result<()> { Err(Errno::NOSYS.into()) }
    pub fn statfs(&self) -> Result<StatVfs> { Err(Errno::NOSYS.into()) }
    pub fn getxattr(&self, node: NodeId, name: &[u8]) -> Result<Option<Vec<u8>>> { Err(Errno::NOSYS.into()) }
    pub fn listxattr(&self, node: NodeId) -> Result<Vec<u8>> { Err(Errno::NOSYS.into()) }
    pub fn setxattr(&self, node: NodeId, name: &[u8], value: &[u8], flags: XattrFlags) -> Result<()> { Err(Errno::NOSYS.into()) }
    pub fn removexattr(&self, node: NodeId, name: &[u8]) -> Result<()> { Err(Errno::NOSYS.into()) }
    pub fn get_flags(&self, node: NodeId) -> Result<u32> { Err(Errno::NOSYS.into()) }
    pub fn set_flags(&self, node: NodeId, flags: u32) -> Result<()> { Err(Errno::NOSYS.into()) }
    pub fn get_fsxattr(&self, node: NodeId) -> Result<[u8; 28]> { Err(Errno::NOSYS.into()) }
    pub fn set_fsxattr(&self, node: NodeId, raw: &[u8; 28]) -> Result<()> { Err(Errno::NOSYS.into()) }
    pub fn sync_all(&self) -> Result<()> { Err(Errno::NOSYS.into()) }
    pub fn poison(&self) {  }
}
