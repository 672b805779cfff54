//! Operations on a small tree, made from a seed, that print as text and can be read back.
//!
//! The name space is small, so that operations meet, and operands are indices into fixed tables, so that any part of a list
//! is a valid list again: shrinking needs no repair.

use std::fmt;
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::OnceLock;

use rustix::fs::{
    Access, AtFlags, CWD, FallocateFlags, FileType, Gid, Mode, OFlags, RenameFlags, Stat, Timespec,
    Timestamps, UTIME_NOW, UTIME_OMIT, Uid, XattrFlags,
};

use crate::env::Base;
use crate::fixture::{pattern, set_mtime};
use crate::same::fuse_zeroes_ranges;
use crate::tree;

/// A small random generator (SplitMix64): the same seed gives the same sequence everywhere.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// A generator for `seed`.
    pub fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    /// True in `percent` of 100 cases.
    pub fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    /// One of a list.
    pub fn pick<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }
}

/// Every path that operations and layers use.
pub const PATHS: &[&str] =
    &["a", "b", "c", "a/a", "a/b", "a/c", "b/a", "b/b", "b/c", "a/b/a", "a/b/b", "b/a/a", "b/a/c"];
const SIZES: &[usize] = &[0, 5, 5000, 70_000];
const OFFSETS: &[u64] = &[0, 3, 4096, 66_000];
const MODES: &[u32] =
    &[0o644, 0o600, 0o755, 0o444, 0o666, 0o777, 0o2755, 0o4755, 0o1777, 0o6777, 0o2777, 0o000];
const TARGETS: &[&str] = &["a", "b", "a/b", "nowhere/x", "c"];
const OWNERS: &[(Option<u32>, Option<u32>)] =
    &[(Some(0), Some(0)), (Some(1000), Some(1000)), (Some(1000), None), (None, Some(2000))];
/// Long before and after what 32 bits hold, and before 1970.
const TIMES: &[(i64, i64)] = &[(1, 5), (-7, 999_999_999), (4_500_000_000, 1), (0, UTIME_NOW)];
const XATTRS: &[&str] = &["user.a", "user.bb", "trusted.t"];
const VALUES: &[&[u8]] = &[b"", b"one", b"another value"];
const ACLS: &[&str] = &["system.posix_acl_access", "system.posix_acl_default"];
/// `u::rw-,u:1000:r--,g::r-x,m::rwx,o::r--` and `u::rwx,g::r-x,o::---`, as the kernel has them in xattrs.
const ACL_VALUES: &[&[u8]] = &[
    b"\x02\0\0\0\x01\0\x06\0\xff\xff\xff\xff\x02\0\x04\0\xe8\x03\0\0\x04\0\x05\0\xff\xff\xff\xff\
      \x10\0\x07\0\xff\xff\xff\xff\x20\0\x04\0\xff\xff\xff\xff",
    b"\x02\0\0\0\x01\0\x07\0\xff\xff\xff\xff\x04\0\x05\0\xff\xff\xff\xff\x20\0\0\0\xff\xff\xff\xff",
];
/// `cap_net_raw=ep`.
const CAPABILITIES: &[u8] = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
/// Who acts when an operation is not done as root.
const USER: u32 = 1000;
/// How many open files an operation sequence can hold.
pub const SLOTS: usize = 3;

macro_rules! verbs {
    ($($name:ident $weight:literal $operands:literal $doc:literal),* $(,)?) => {
        /// What an operation does. `n` is an index into tables of sizes, modes and the like.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[allow(non_camel_case_types, reason = "these are the words of the printed form")]
        pub enum Verb { $(#[doc = $doc] $name),* }

        /// Verb, its word, its weight, and its operands: p(ath), o(ther path), s(lot), n(umber).
        const VERBS: &[(Verb, &str, usize, &str)] =
            &[$((Verb::$name, stringify!($name), $weight, $operands)),*];
    };
}

verbs! {
    create 8 "pn" "Creates a file that must not be there and writes to it.",
    creat 4 "pn" "Creates or truncates a file and writes to it.",
    mkdir 7 "pn" "Makes a directory.",
    mkfifo 2 "pn" "Makes a fifo or socket.",
    mkchar 1 "pn" "Makes a character device.",
    mkwhiteout 1 "p" "Makes a character device 0:0, which would be a whiteout.",
    symlink 3 "pn" "Makes a symbolic link.",
    link 6 "po" "Makes a hard link.",
    unlink 10 "p" "Removes a non-directory.",
    rmdir 7 "p" "Removes a directory.",
    rename 12 "po" "Renames.",
    rename_noreplace 2 "po" "Renames if the new name is free.",
    exchange 3 "po" "Exchanges two names.",
    rename_whiteout 1 "po" "Renames and asks for a whiteout.",
    write 6 "pn" "Writes somewhere in a file.",
    append 3 "pn" "Appends to a file.",
    truncate 4 "pn" "Sets the size by path.",
    open_trunc 3 "pn" "Opens with O_TRUNC and writes.",
    chmod 5 "pn" "Changes the mode.",
    chown 4 "pn" "Changes the owner.",
    utimens 4 "pn" "Sets times.",
    setxattr 4 "pn" "Sets an xattr.",
    removexattr 2 "pn" "Removes an xattr.",
    setacl 2 "pn" "Sets an ACL.",
    removeacl 1 "pn" "Removes an ACL.",
    setcap 1 "p" "Sets file capabilities, which a write or chown clears.",
    listxattr 2 "p" "Reads all xattrs.",
    read 5 "p" "Reads a file by a fresh descriptor.",
    readlink 2 "p" "Reads a symbolic link.",
    readdir 5 "p" "Lists a directory.",
    stat 6 "p" "Reads attributes.",
    access 2 "pn" "Asks for a permission.",
    punch 2 "pn" "Punches a hole, or allocates.",
    copy 3 "pon" "copy_file_range(2) from one file to another.",
    open 5 "psn" "Opens a file for reading and writing, into a slot.",
    hread 3 "s" "Reads all of the open file.",
    hwrite 4 "sn" "Writes to the open file.",
    htruncate 2 "sn" "Sets the size of the open file.",
    hstat 3 "s" "Reads attributes of the open file.",
    hchmod 2 "sn" "Changes the mode of the open file.",
    hchown 1 "sn" "Changes the owner of the open file.",
    hutimens 1 "sn" "Sets the times of the open file.",
    hsetxattr 1 "sn" "Sets an xattr of the open file.",
    hlink 1 "ps" "Gives the open file a name.",
    hsync 1 "s" "fsync(2) of the open file.",
    hseek 1 "sn" "Asks for data and holes of the open file.",
    hclose 3 "s" "Closes the slot.",
    opendir 2 "ps" "Opens a directory into a slot; stat, chmod and so on of the open file then take it.",
    hlist 2 "s" "Lists the open directory.",
    hmkdir 1 "sn" "Makes a directory in the open directory, which may be removed meanwhile.",
    drop_caches 1 "" "Drops the kernel's cached names and inodes.",
    remount 1 "" "Closes all slots, unmounts and mounts again.",
}

/// One operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Op {
    /// What is done.
    pub verb: Verb,
    /// Index of the path.
    pub path: usize,
    /// Index of the other path.
    pub other: usize,
    /// Which open file.
    pub slot: usize,
    /// Index into the tables of the verb.
    pub number: usize,
    /// Done by an ordinary user.
    pub as_user: bool,
}

impl Op {
    /// A random operation.
    pub fn generate(rng: &mut Rng) -> Op {
        let total: usize = VERBS.iter().map(|row| row.2).sum();
        let mut point = rng.below(total);
        let row = VERBS.iter().find(|row| {
            let hit = point < row.2;
            point = point.wrapping_sub(row.2);
            hit
        });
        Op {
            verb: row.unwrap_or(&VERBS[0]).0,
            path: rng.below(PATHS.len()),
            other: rng.below(PATHS.len()),
            slot: rng.below(SLOTS),
            number: rng.below(120),
            as_user: rng.chance(6),
        }
    }

    /// The size that the number stands for, in bytes.
    pub fn size(&self) -> u64 {
        SIZES[self.number % SIZES.len()] as u64
    }

    fn row(self) -> &'static (Verb, &'static str, usize, &'static str) {
        VERBS.iter().find(|row| row.0 == self.verb).unwrap_or(&VERBS[0])
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (_, word, _, operands) = self.row();
        f.write_str(word)?;
        for operand in operands.chars() {
            match operand {
                'p' => write!(f, " {}", PATHS[self.path])?,
                'o' => write!(f, " {}", PATHS[self.other])?,
                's' => write!(f, " {}", self.slot)?,
                _ => write!(f, " {}", self.number)?,
            }
        }
        f.write_str(if self.as_user { " as-user" } else { "" })
    }
}

impl FromStr for Op {
    type Err = String;

    fn from_str(line: &str) -> Result<Op, String> {
        let mut words = line.split_whitespace();
        let word = words.next().unwrap_or_default();
        let row = VERBS.iter().find(|row| row.1 == word);
        let row = row.ok_or_else(|| format!("unknown operation {line:?}"))?;
        let mut op = Op { verb: row.0, path: 0, other: 0, slot: 0, number: 0, as_user: false };
        for operand in row.3.chars() {
            let word = words.next().ok_or_else(|| format!("too short: {line:?}"))?;
            let bad = || format!("{word:?} in {line:?}");
            let path = PATHS.iter().position(|path| *path == word);
            match operand {
                'p' => op.path = path.ok_or_else(bad)?,
                'o' => op.other = path.ok_or_else(bad)?,
                's' => op.slot = word.parse().ok().filter(|s| *s < SLOTS).ok_or_else(bad)?,
                _ => op.number = word.parse().map_err(|_| bad())?,
            }
        }
        op.as_user = words.next() == Some("as-user");
        Ok(op)
    }
}

/// A directory that operations are applied to, with its open files.
#[derive(Debug)]
pub struct Target {
    root: OwnedFd,
    slots: [Option<fs::File>; SLOTS],
    /// From when on a time is `recent` in outcomes.
    pub recent: i128,
    /// Leave out of listings what `stat` does not find (see the allowed differences).
    pub hide_dangling: bool,
    /// Give modification times of directories in outcomes.
    pub dir_times: bool,
}

/// Whether the filesystem of the test data changes the time of a file that truncate(2) gives the size that it has. ext4 does, tmpfs
/// and xfs do not, and so does kernel overlayfs on them; ours always does. Tried once.
fn marks_same_size() -> bool {
    static MARKS: OnceLock<bool> = OnceLock::new();
    *MARKS.get_or_init(|| {
        let base = Base::get();
        let path = base.unique("truncated");
        fs::write(&path, "").unwrap();
        set_mtime(&path, 0, 0).unwrap();
        nix::unistd::truncate(&path, 0).unwrap();
        let marks = fs::metadata(&path).unwrap().mtime() != 0;
        fs::remove_file(&path).unwrap();
        marks
    })
}

type Outcome = io::Result<String>;

impl Target {
    /// Opens `root`.
    ///
    /// # Panics
    /// If it is no directory.
    pub fn new(root: &Path, recent: i128) -> Target {
        // Not first by an operation as another user, who may make no file there.
        marks_same_size();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(root, flags, Mode::empty())
            .unwrap_or_else(|e| panic!("open {}: {e}", root.display()));
        let dir_times = std::env::var_os("FUSE_TESTS_NO_DIR_TIMES").is_none();
        Target { root, slots: [None, None, None], recent, hide_dangling: false, dir_times }
    }

    /// Does one operation and gives its outcome in text: an error number or what was read.
    pub fn apply(&mut self, op: &Op) -> String {
        let outcome = if op.as_user {
            let _user = AsUser::new();
            self.perform(op)
        } else {
            self.perform(op)
        };
        match outcome {
            Ok(text) if text.is_empty() => "ok".into(),
            Ok(text) => text,
            Err(e) => match e.raw_os_error() {
                Some(number) => {
                    let known = nix::errno::Errno::from_raw(number);
                    format!("{known:?}")
                }
                None => format!("error {e}"),
            },
        }
    }

    fn place(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{path}", self.root.as_raw_fd()))
    }

    fn open(&self, path: &str, flags: OFlags, mode: u32) -> io::Result<fs::File> {
        // A fifo must not block the test.
        let flags = flags | OFlags::CLOEXEC | OFlags::NONBLOCK;
        Ok(rustix::fs::openat(&self.root, path, flags, Mode::from_raw_mode(mode))?.into())
    }

    fn slot(&self, op: &Op) -> io::Result<&fs::File> {
        self.slots[op.slot].as_ref().ok_or_else(|| io::Error::other("empty slot"))
    }

    fn perform(&mut self, op: &Op) -> Outcome {
        let (path, other, n) = (PATHS[op.path], PATHS[op.other], op.number);
        let size = SIZES[n % SIZES.len()];
        let offset = OFFSETS[(n / 4) % OFFSETS.len()];
        let mode = MODES[n % MODES.len()];
        let data = || pattern(size, n as u8);
        let nofollow = AtFlags::SYMLINK_NOFOLLOW;
        match op.verb {
            Verb::create => {
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY;
                self.open(path, flags, mode)?.write_all_at(&data(), 0)?;
            }
            Verb::creat => {
                let flags = OFlags::CREATE | OFlags::TRUNC | OFlags::WRONLY;
                self.open(path, flags, mode)?.write_all_at(&data(), 0)?;
            }
            Verb::mkdir => rustix::fs::mkdirat(&self.root, path, Mode::from_raw_mode(mode))?,
            Verb::mkfifo | Verb::mkchar | Verb::mkwhiteout => {
                let (kind, device) = match op.verb {
                    Verb::mkfifo if n.is_multiple_of(3) => (FileType::Socket, 0),
                    Verb::mkfifo => (FileType::Fifo, 0),
                    Verb::mkchar => (FileType::CharacterDevice, rustix::fs::makedev(1, 3)),
                    _ => (FileType::CharacterDevice, 0),
                };
                rustix::fs::mknodat(&self.root, path, kind, Mode::from_raw_mode(mode), device)?;
            }
            Verb::symlink => {
                rustix::fs::symlinkat(TARGETS[n % TARGETS.len()], &self.root, path)?;
            }
            Verb::link => {
                rustix::fs::linkat(&self.root, path, &self.root, other, AtFlags::empty())?;
            }
            Verb::unlink => rustix::fs::unlinkat(&self.root, path, AtFlags::empty())?,
            Verb::rmdir => rustix::fs::unlinkat(&self.root, path, AtFlags::REMOVEDIR)?,
            Verb::rename => rustix::fs::renameat(&self.root, path, &self.root, other)?,
            Verb::rename_noreplace => self.rename(path, other, RenameFlags::NOREPLACE)?,
            Verb::exchange => self.rename(path, other, RenameFlags::EXCHANGE)?,
            Verb::rename_whiteout => self.rename(path, other, RenameFlags::WHITEOUT)?,
            Verb::write => {
                self.open(path, OFlags::WRONLY, 0)?.write_all_at(&data(), offset)?;
            }
            Verb::append => {
                self.open(path, OFlags::WRONLY | OFlags::APPEND, 0)?.write_all_at(&data(), 0)?;
            }
            Verb::truncate => {
                let place = self.place(path);
                let is_same =
                    fs::metadata(&place).is_ok_and(|m| m.is_file() && m.len() == size as u64);
                nix::unistd::truncate(&place, size as i64)?;
                if is_same && !marks_same_size() {
                    let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
                    let times = Timestamps { last_access: now, last_modification: now };
                    rustix::fs::utimensat(&self.root, path, &times, AtFlags::empty())?;
                }
            }
            Verb::open_trunc => {
                let file = self.open(path, OFlags::WRONLY | OFlags::TRUNC, 0)?;
                file.write_all_at(&data(), offset)?;
            }
            Verb::chmod => {
                let mode = Mode::from_raw_mode(mode);
                rustix::fs::chmodat(&self.root, path, mode, AtFlags::empty())?;
            }
            Verb::chown => {
                let (uid, gid) = owners(n);
                rustix::fs::chownat(&self.root, path, uid, gid, nofollow)?;
            }
            Verb::utimens => rustix::fs::utimensat(&self.root, path, &times(n), nofollow)?,
            Verb::setxattr => {
                let (name, value, flags) = xattr(n);
                rustix::fs::lsetxattr(self.place(path), name, value, flags)?;
            }
            Verb::removexattr => {
                rustix::fs::lremovexattr(self.place(path), XATTRS[n % XATTRS.len()])?;
            }
            Verb::setacl => {
                let value = ACL_VALUES[(n / 2) % ACL_VALUES.len()];
                let name = ACLS[n % ACLS.len()];
                rustix::fs::lsetxattr(self.place(path), name, value, XattrFlags::empty())?;
            }
            Verb::removeacl => {
                rustix::fs::lremovexattr(self.place(path), ACLS[n % ACLS.len()])?;
            }
            Verb::setcap => {
                let name = "security.capability";
                let flags = XattrFlags::empty();
                rustix::fs::lsetxattr(self.place(path), name, CAPABILITIES, flags)?;
            }
            Verb::listxattr => {
                // A name that is not there has no xattrs to some calls and an error to others.
                rustix::fs::statat(&self.root, path, nofollow)?;
                let mut text = String::from("xattrs");
                for (name, value) in tree::xattrs(&self.place(path))? {
                    if !tree::is_private(&name) {
                        let _ = write!(text, " {name}={}", tree::show_bytes(&value));
                    }
                }
                return Ok(text);
            }
            Verb::read => return tree::content(&mut self.open(path, OFlags::RDONLY, 0)?),
            Verb::readlink => {
                let target = rustix::fs::readlinkat(&self.root, path, Vec::new())?;
                return Ok(format!("target {}", target.to_string_lossy()));
            }
            Verb::readdir => return self.list(path),
            Verb::stat => {
                return Ok(self.show(&rustix::fs::statat(&self.root, path, nofollow)?));
            }
            Verb::access => {
                let access = *[Access::READ_OK, Access::WRITE_OK, Access::EXEC_OK, Access::EXISTS]
                    .get(n % 4)
                    .unwrap_or(&Access::EXISTS);
                rustix::fs::accessat(&self.root, path, access, AtFlags::EACCESS)?;
            }
            Verb::punch => {
                let file = self.open(path, OFlags::RDWR, 0)?;
                let keep = FallocateFlags::KEEP_SIZE;
                let zero = if fuse_zeroes_ranges() { FallocateFlags::ZERO_RANGE } else { keep };
                let flags =
                    [FallocateFlags::PUNCH_HOLE | keep, zero, FallocateFlags::empty(), keep]
                        [(n / 16) % 4];
                rustix::fs::fallocate(&file, flags, offset, size as u64)?;
            }
            Verb::copy => {
                let from = self.open(path, OFlags::RDONLY, 0)?;
                let to = self.open(other, OFlags::WRONLY, 0)?;
                return copy(&from, &to, size, offset);
            }
            Verb::open => {
                let append = if n.is_multiple_of(4) { OFlags::APPEND } else { OFlags::empty() };
                let file = self.open(path, OFlags::RDWR | append, 0)?;
                self.slots[op.slot] = Some(file);
            }
            Verb::hread => {
                let mut place = At { file: self.slot(op)?, offset: 0 };
                return tree::content(&mut place);
            }
            Verb::hwrite => self.slot(op)?.write_all_at(&data(), offset)?,
            Verb::htruncate => rustix::fs::ftruncate(self.slot(op)?, size as u64)?,
            Verb::hstat => return Ok(self.show(&rustix::fs::fstat(self.slot(op)?)?)),
            Verb::hchmod => rustix::fs::fchmod(self.slot(op)?, Mode::from_raw_mode(mode))?,
            Verb::hchown => {
                let (uid, gid) = owners(n);
                rustix::fs::fchown(self.slot(op)?, uid, gid)?;
            }
            Verb::hutimens => rustix::fs::futimens(self.slot(op)?, &times(n))?,
            Verb::hsetxattr => {
                let (name, value, flags) = xattr(n);
                rustix::fs::fsetxattr(self.slot(op)?, name, value, flags)?;
            }
            Verb::hlink => {
                let from = format!("/proc/self/fd/{}", self.slot(op)?.as_raw_fd());
                let flags = AtFlags::SYMLINK_FOLLOW;
                rustix::fs::linkat(CWD, from, &self.root, path, flags)?;
            }
            Verb::hsync => rustix::fs::fsync(self.slot(op)?)?,
            Verb::hseek => {
                let from = if n.is_multiple_of(2) {
                    rustix::fs::SeekFrom::Data(offset)
                } else {
                    rustix::fs::SeekFrom::Hole(offset)
                };
                // What lseek(2) says of a directory is the VFS's own affair.
                if !self.slot(op)?.metadata()?.is_file() {
                    return Ok("no file".into());
                }
                return Ok(format!("at {}", rustix::fs::seek(self.slot(op)?, from)?));
            }
            Verb::opendir => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY;
                self.slots[op.slot] = Some(self.open(path, flags, 0)?);
            }
            Verb::hlist => return self.show_names(self.slot(op)?.try_clone()?.into()),
            Verb::hmkdir => {
                let name = PATHS[n % 3];
                rustix::fs::mkdirat(self.slot(op)?, name, Mode::from_raw_mode(mode))?;
            }
            Verb::hclose => self.slots[op.slot] = None,
            // Both sides are served by one kernel: done once, by the runner.
            Verb::drop_caches | Verb::remount => {}
        }
        Ok(String::new())
    }

    fn rename(&self, path: &str, other: &str, flags: RenameFlags) -> io::Result<()> {
        Ok(rustix::fs::renameat_with(&self.root, path, &self.root, other, flags)?)
    }

    fn list(&self, path: &str) -> Outcome {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        self.show_names(self.open(path, flags, 0)?.into())
    }

    fn show_names(&self, dir: OwnedFd) -> Outcome {
        let (names, dots) = tree::read_names(&dir)?;
        let mut text = format!("{dots} dots");
        for (name, kind, _) in names {
            let found = rustix::fs::statat(&dir, &name, AtFlags::SYMLINK_NOFOLLOW);
            if self.hide_dangling && found.as_ref().err() == Some(&rustix::io::Errno::NOENT) {
                continue;
            }
            let _ = write!(text, ", {} {kind:?}", name.to_string_lossy());
        }
        Ok(text)
    }

    fn show(&self, stat: &Stat) -> String {
        let kind = FileType::from_raw_mode(stat.st_mode);
        let mut text = format!("{kind:?} {:04o}", stat.st_mode & 0o7777);
        let _ = write!(text, " {}:{}", stat.st_uid, stat.st_gid);
        if kind != FileType::Directory {
            let _ = write!(text, " nlink {} size {}", stat.st_nlink, stat.st_size);
            let _ = write!(text, " device {}", stat.st_rdev);
        }
        if kind != FileType::Directory || self.dir_times {
            let _ = write!(text, " mtime {}", tree::show_mtime(stat, Some(self.recent)));
        }
        text
    }
}

fn owners(n: usize) -> (Option<Uid>, Option<Gid>) {
    let (uid, gid) = OWNERS[n % OWNERS.len()];
    (uid.map(Uid::from_raw), gid.map(Gid::from_raw))
}

fn times(n: usize) -> Timestamps {
    let time = |(tv_sec, tv_nsec)| Timespec { tv_sec, tv_nsec };
    let omit = time((0, UTIME_OMIT));
    let set = time(TIMES[n % TIMES.len()]);
    match n / 4 % 4 {
        0 => Timestamps { last_access: set, last_modification: omit },
        _ => Timestamps { last_access: omit, last_modification: set },
    }
}

fn xattr(n: usize) -> (&'static str, &'static [u8], XattrFlags) {
    let flags = match n / 9 % 4 {
        0 => XattrFlags::CREATE,
        1 => XattrFlags::REPLACE,
        _ => XattrFlags::empty(),
    };
    (XATTRS[n % XATTRS.len()], VALUES[n / 3 % VALUES.len()], flags)
}

fn copy(from: &fs::File, to: &fs::File, size: usize, offset: u64) -> Outcome {
    let may_be_one = from.metadata()?.nlink() > 1 && to.metadata()?.nlink() > 1;
    if may_be_one && (size as u64) > offset {
        // All refuse to copy a file over itself. Kernel overlayfs, which may not see that two names are
        // one file, even by its numbers, has taken setuid away by then.
        return Err(rustix::io::Errno::INVAL.into());
    }
    let (mut from_offset, mut to_offset, mut left) = (0, offset, size);
    while left > 0 {
        let n = rustix::fs::copy_file_range(
            from,
            Some(&mut from_offset),
            to,
            Some(&mut to_offset),
            left,
        )?;
        if n == 0 {
            break;
        }
        left -= n;
    }
    Ok(format!("{} copied", size - left))
}

/// Reads an open file from its beginning, without its own position.
struct At<'a> {
    file: &'a fs::File,
    offset: u64,
}

impl io::Read for At<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read_at(buffer, self.offset)?;
        self.offset += n as u64;
        Ok(n)
    }
}

/// The calling thread acts on files as an ordinary user while this lives.
struct AsUser;

impl AsUser {
    fn new() -> AsUser {
        nix::unistd::setfsgid(USER.into());
        nix::unistd::setfsuid(USER.into());
        AsUser
    }
}

impl Drop for AsUser {
    fn drop(&mut self) {
        nix::unistd::setfsuid(0.into());
        nix::unistd::setfsgid(0.into());
    }
}
