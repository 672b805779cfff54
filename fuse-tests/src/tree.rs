//! Canonical snapshot of a tree, for comparison with another one.
//!
//! The walk is relative to descriptors, so depth and path length have no limit but the number of open files.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::{CStr, OsStr, OsString};
use std::fmt::Write as _;
use std::fs;
use std::hash::Hasher;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

/// What a snapshot holds beside type, mode, owner, size, device number, link target, content and links.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Include the xattrs that overlay programs keep for themselves.
    pub private_xattrs: bool,
    /// Include the modification times of directories.
    pub dir_times: bool,
    /// Include inode numbers and change times: for layers that must not be touched at all.
    pub identity: bool,
    /// A modification time between this one (ns since 1970) and an hour from then on is given as `recent`.
    pub recent: Option<i128>,
    /// Check that directory listings agree with `stat` on inode numbers.
    pub check_ino: bool,
    /// Check that directory listings have `.` and `..`.
    pub check_dots: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            private_xattrs: false,
            dir_times: true,
            identity: false,
            recent: None,
            check_ino: true,
            check_dots: true,
        }
    }
}

/// One object of a tree, as named values in text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    fields: BTreeMap<String, String>,
}

impl Entry {
    /// The value of a field, empty if it has none.
    pub fn get(&self, field: &str) -> &str {
        self.fields.get(field).map_or("", String::as_str)
    }

    /// Sets a field; also how a test injects a fault.
    pub fn set(&mut self, field: &str, value: impl Into<String>) {
        self.fields.insert(field.into(), value.into());
    }

    /// Removes a field.
    pub fn clear(&mut self, field: &str) {
        self.fields.remove(field);
    }
}

/// A tree: path relative to its root (the root itself is `.`) to object.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Every object by its path.
    pub entries: BTreeMap<PathBuf, Entry>,
}

impl Snapshot {
    /// The object at `path`, if there is one.
    pub fn get(&self, path: impl AsRef<Path>) -> Option<&Entry> {
        self.entries.get(path.as_ref())
    }

    /// All paths but the root's, in order, as text.
    pub fn names(&self) -> Vec<String> {
        let paths = self.entries.keys().filter(|path| path.as_os_str() != ".");
        paths.map(|path| path.display().to_string()).collect()
    }

    /// The part below `dir`, as if it were the root.
    pub fn below(&self, dir: &Path) -> Snapshot {
        let part = self.entries.iter().filter_map(|(path, entry)| {
            let rest = path.strip_prefix(dir).ok()?;
            let rest = if rest.as_os_str().is_empty() { Path::new(".") } else { rest };
            Some((rest.to_path_buf(), entry.clone()))
        });
        Snapshot { entries: part.collect() }
    }
}

/// Takes a snapshot with the default options.
///
/// # Panics
/// If the root cannot be opened; every other error becomes part of the snapshot.
pub fn snapshot(root: impl AsRef<Path>) -> Snapshot {
    snapshot_with(root, Options::default())
}

/// Takes a snapshot.
///
/// # Panics
/// If the root cannot be opened; every other error becomes part of the snapshot.
pub fn snapshot_with(root: impl AsRef<Path>, options: Options) -> Snapshot {
    let root = root.as_ref();
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = rustix::fs::open(root, flags, Mode::empty())
        .unwrap_or_else(|e| panic!("open {}: {e}", root.display()));
    let mut walk = Walk { options, tree: Snapshot::default(), links: HashMap::new() };
    let stat = rustix::fs::fstat(&fd).unwrap();
    let mut entry = walk.describe(&stat, format!("/proc/self/fd/{}/.", fd.as_raw_fd()));
    walk.list(&fd, Path::new(""), &mut entry);
    walk.tree.entries.insert(".".into(), entry);
    walk.tree
}

struct Walk {
    options: Options,
    tree: Snapshot,
    /// Device and inode to the first path seen with it.
    links: HashMap<(u64, u64), PathBuf>,
}

impl Walk {
    fn list(&mut self, dir: &OwnedFd, path: &Path, entry: &mut Entry) {
        let (children, dots) = match read_names(dir) {
            Ok(listing) => listing,
            Err(e) => return entry.set("list", e.to_string()),
        };
        if dots != 2 && self.options.check_dots {
            entry.set("dots", format!("{dots} of . and .. listed"));
        }
        let mut seen = HashSet::new();
        for (name, kind, ino) in children {
            if !seen.insert(name.clone()) {
                entry.set("listed twice", name.to_string_lossy());
                continue;
            }
            let path = path.join(&name);
            let child = self.object(dir, &name, &path, kind, ino);
            self.tree.entries.insert(path, child);
        }
    }

    fn object(
        &mut self,
        dir: &OwnedFd,
        name: &OsStr,
        path: &Path,
        kind: FileType,
        ino: u64,
    ) -> Entry {
        let stat = match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(e) => {
                let mut entry = Entry::default();
                entry.set("stat", e.to_string());
                return entry;
            }
        };
        let mut place = OsString::from(format!("/proc/self/fd/{}/", dir.as_raw_fd()));
        place.push(name);
        let mut entry = self.describe(&stat, &place);
        let real = FileType::from_raw_mode(stat.st_mode);
        if kind != real && kind != FileType::Unknown {
            entry.set("listed as", format!("{kind:?}"));
        }
        if self.options.check_ino && ino != stat.st_ino {
            entry.set("listed inode", format!("{ino} but stat says {}", stat.st_ino));
        }
        match real {
            FileType::Directory => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                match rustix::fs::openat(dir, name, flags, Mode::empty()) {
                    Ok(fd) => self.list(&fd, path, &mut entry),
                    Err(e) => entry.set("open", e.to_string()),
                }
            }
            FileType::Symlink => match rustix::fs::readlinkat(dir, name, Vec::new()) {
                Ok(target) => entry.set("target", target.to_string_lossy()),
                Err(e) => entry.set("readlink", e.to_string()),
            },
            FileType::RegularFile => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                match rustix::fs::openat(dir, name, flags, Mode::empty()) {
                    Ok(fd) => match content(&mut fs::File::from(fd)) {
                        Ok(text) => entry.set("content", text),
                        Err(e) => entry.set("read", e.to_string()),
                    },
                    Err(e) => entry.set("open", e.to_string()),
                }
            }
            _ => {}
        }
        if real != FileType::Directory {
            let first = self.links.entry((stat.st_dev, stat.st_ino));
            let first = first.or_insert_with(|| path.to_path_buf());
            if first != path {
                entry.set("same file as", first.display().to_string());
            }
        }
        entry
    }

    fn describe(&self, stat: &Stat, place: impl AsRef<Path>) -> Entry {
        let mut entry = Entry::default();
        let kind = FileType::from_raw_mode(stat.st_mode);
        entry.set("type", format!("{kind:?}"));
        entry.set("mode", format!("{:04o}", stat.st_mode & 0o7777));
        entry.set("owner", format!("{}:{}", stat.st_uid, stat.st_gid));
        if kind != FileType::Directory {
            entry.set("nlink", stat.st_nlink.to_string());
            entry.set("size", stat.st_size.to_string());
        }
        if matches!(kind, FileType::CharacterDevice | FileType::BlockDevice) {
            let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
            entry.set("device", format!("{major}:{minor}"));
        }
        if kind != FileType::Directory || self.options.dir_times {
            entry.set("mtime", show_mtime(stat, self.options.recent));
        }
        if self.options.identity {
            let ctime = format!("{}.{:09}", stat.st_ctime, stat.st_ctime_nsec);
            entry.set("ctime", ctime);
            entry.set("inode", stat.st_ino.to_string());
            entry.set("nlink", stat.st_nlink.to_string());
        }
        match xattrs(place.as_ref()) {
            Ok(pairs) => {
                for (name, value) in pairs {
                    if self.options.private_xattrs || !is_private(&name) {
                        entry.set(&format!("xattr {name}"), show_bytes(&value));
                    }
                }
            }
            Err(e) => entry.set("xattrs", e.to_string()),
        }
        entry
    }
}

/// The modification time as text, with what happened just now made equal.
pub fn show_mtime(stat: &Stat, recent: Option<i128>) -> String {
    let time = i128::from(stat.st_mtime) * 1_000_000_000 + i128::from(stat.st_mtime_nsec);
    match recent {
        // A coarse clock may lag a little behind the one that the start was taken from.
        Some(start) if (start - 20_000_000..start + 3_600_000_000_000).contains(&time) => {
            "recent".into()
        }
        _ => format!("{}.{:09}", stat.st_mtime, stat.st_mtime_nsec),
    }
}

/// Now, in ns since 1970, as [`Options::recent`] takes it.
pub fn now() -> i128 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    i128::try_from(now.as_nanos()).unwrap()
}

/// Names, types and inode numbers of a directory without `.` and `..`, and how many of those two were listed.
///
/// # Errors
/// What getdents(2) says.
#[allow(clippy::type_complexity, reason = "taken apart at once by the callers")]
pub fn read_names(dir: &OwnedFd) -> io::Result<(Vec<(OsString, FileType, u64)>, usize)> {
    let mut names = Vec::new();
    let mut dots = 0;
    for child in Dir::read_from(dir.as_fd())? {
        let child = child?;
        let name: &CStr = child.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            dots += 1;
            continue;
        }
        let name = OsString::from_vec(name.to_bytes().to_vec());
        names.push((name, child.file_type(), child.ino()));
    }
    names.sort_by(|a, b| a.0.cmp(&b.0));
    Ok((names, dots))
}

/// Length and hash of all that can be read from `file`.
///
/// # Errors
/// What read(2) says.
pub fn content(file: &mut impl Read) -> io::Result<String> {
    let mut buffer = vec![0; 128 * 1024];
    let mut hash = std::hash::DefaultHasher::new();
    let mut length = 0;
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            return Ok(format!("{length} bytes {:016x}", hash.finish()));
        }
        length += n;
        // Byte by byte boundaries do not matter to this hasher's `write`, only the stream does.
        hash.write(&buffer[..n]);
    }
}

/// All xattrs of an object, symlinks not followed.
///
/// # Errors
/// What llistxattr(2) or lgetxattr(2) say; a file system without xattrs has none.
pub fn xattrs(path: &Path) -> io::Result<Vec<(String, Vec<u8>)>> {
    let mut list = vec![0; 64 * 1024];
    let length = match rustix::fs::llistxattr(path, &mut list[..]) {
        Ok(length) => length,
        Err(Errno::NOTSUP) => return Ok(Vec::new()),
        Err(e) => return Err(e.into()),
    };
    list.truncate(length);
    let mut pairs = Vec::new();
    for name in list.split(|b| *b == 0).filter(|name| !name.is_empty()) {
        let mut value = vec![0; 64 * 1024];
        match rustix::fs::lgetxattr(path, name, &mut value[..]) {
            Ok(length) => value.truncate(length),
            Err(e) => value = format!("<{e}>").into_bytes(),
        }
        pairs.push((String::from_utf8_lossy(name).into_owned(), value));
    }
    pairs.sort();
    Ok(pairs)
}

/// True for the xattrs that overlay programs keep for themselves.
pub fn is_private(name: &str) -> bool {
    let prefixes = ["trusted.overlay.", "user.overlay.", "user.fuseoverlayfs."];
    prefixes.iter().any(|prefix| name.starts_with(prefix))
}

/// Bytes as text, long ones as length and hash.
pub fn show_bytes(bytes: &[u8]) -> String {
    if bytes.len() > 64 {
        return content(&mut &bytes[..]).unwrap_or_default();
    }
    let mut text = String::new();
    for byte in bytes {
        let _ = write!(text, "{}", byte.escape_ascii());
    }
    text
}

/// The differences of two trees, one line each; empty if there are none.
pub fn diff(left: &Snapshot, right: &Snapshot) -> Vec<String> {
    let mut lines = Vec::new();
    let paths: std::collections::BTreeSet<_> =
        left.entries.keys().chain(right.entries.keys()).collect();
    for path in paths {
        let shown = path.display();
        match (left.get(path), right.get(path)) {
            (Some(l), Some(r)) if l != r => {
                let fields: std::collections::BTreeSet<_> =
                    l.fields.keys().chain(r.fields.keys()).collect();
                for field in fields.into_iter().filter(|f| l.get(f) != r.get(f)) {
                    let (l, r) = (l.get(field), r.get(field));
                    lines.push(format!("{shown}: {field}: left {l:?}, right {r:?}"));
                }
            }
            (Some(l), None) => lines.push(format!("{shown}: only left ({})", l.get("type"))),
            (None, Some(r)) => lines.push(format!("{shown}: only right ({})", r.get("type"))),
            _ => {}
        }
    }
    lines
}

/// Fails if two trees differ.
///
/// # Panics
/// With all differences, if there are any.
#[track_caller]
pub fn assert_same(what: &str, left: &Snapshot, right: &Snapshot) {
    let lines = diff(left, right);
    assert!(lines.is_empty(), "{what}: {} differences:\n{}", lines.len(), lines.join("\n"));
}

/// Whole seconds, and nothing of the root, which layers of engines do not describe.
pub fn as_layers_tell(mut tree: Snapshot) -> Snapshot {
    for (path, entry) in &mut tree.entries {
        let time = entry.get("mtime").split('.').next().unwrap_or_default().to_owned();
        let is_root = path.as_os_str() == ".";
        entry.set("mtime", if is_root { "" } else { &time });
        if is_root {
            entry.clear("mode");
        }
    }
    tree
}
