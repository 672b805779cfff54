//! Names on disk: the home of a store, its layers and their small files.
//!
//! ```text
//! HOME/l/LINK -> ../ID/diff
//! HOME/ID/{diff,link,lower,lower-layers,work,merged,empty}
//! HOME/tempdirs/{lock-X,temp-dir-X/N-ID}
//! ```
//!
//! Everything is reached by (directory handle, one name). Takes no locks.

use std::ffi::OsStr;
use std::fmt;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, openat};

use crate::error::{Context, Errno, Error, Result};
use crate::options::show_path;
use crate::sys::name::At;
use crate::sys::{self, stat};

/// Directory of the short symlinks.
pub const LINK_DIR: &str = "l";
/// File of a layer with the name of its symlink.
pub const LINK: &[u8] = b"link";
/// File of a layer with the symlinks of what lies beneath it.
pub const LOWER: &[u8] = b"lower";
/// File of a layer with the ids of what lies beneath it.
pub const LOWER_LAYERS: &[u8] = b"lower-layers";
/// Content of a layer.
pub const DIFF: &[u8] = b"diff";
/// Work directory of a layer.
pub const WORK: &[u8] = b"work";
/// Mountpoint of a layer.
pub const MERGED: &[u8] = b"merged";
/// Lower of a layer without parent.
pub const EMPTY: &[u8] = b"empty";
/// Directory of staged and removed layers.
pub const TEMPS: &[u8] = b"tempdirs";
/// Directory of layers that other programs are unpacking.
pub const STAGING: &[u8] = b"staging";
/// File that says whether a mount program wrote into the store: `true` or `false`.
pub const PROGRAM_FLAG: &[u8] = b".has-mount-program";
/// Empty file of a layer in Docker's variant that has a child and may not change any more.
pub const COMMITTED: &[u8] = b"committed";
/// File of a layer whose content lies in an additional layer store: the path of it there.
pub const ADDITIONAL: &[u8] = b"additionallayer";

/// Largest small file that is read, in bytes; 500 ids of 255 bytes fit.
const SMALL_MAX: u64 = 128 * 1024;

/// Whose rules the home follows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Variant {
    /// `overlay` of containers/storage: podman, buildah, CRI-O.
    Containers,
    /// `overlay2` of Docker.
    Docker,
    /// `overlay` of Docker, before 24.0: complete trees that share files by hard links.
    Overlay1,
    /// `aufs` of Docker and of old containers/storage.
    Aufs,
}

impl Variant {
    /// Parses the driver's name.
    ///
    /// # Errors
    /// `Invalid` for any other.
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "overlay" => Ok(Self::Containers),
            "overlay2" => Ok(Self::Docker),
            "overlay1" => Ok(Self::Overlay1),
            "aufs" => Ok(Self::Aufs),
            _ => Err(Error::invalid(
                format!("driver {name}"),
                "is not known; use overlay (podman, buildah), overlay2 (Docker), or overlay1 or \
                 aufs (Docker of old)",
            )),
        }
    }

    /// Returns the driver's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Containers => "overlay",
            Self::Docker => "overlay2",
            Self::Overlay1 => "overlay1",
            Self::Aufs => "aufs",
        }
    }

    /// Returns the name of the home in the root.
    pub fn home_name(self) -> &'static str {
        match self {
            // Docker knew no other overlay then.
            Self::Overlay1 => "overlay",
            Self::Containers | Self::Docker | Self::Aufs => self.name(),
        }
    }

    /// Returns how many layers may lie beneath one.
    pub fn depth_max(self) -> usize {
        match self {
            // As many as one of our mounts takes.
            Self::Containers | Self::Aufs => 500,
            Self::Docker => 128,
            // Of an image there is one tree.
            Self::Overlay1 => usize::MAX,
        }
    }

    /// Returns whether layers have symlinks in `l`, by which `lower` names them.
    pub fn has_links(self) -> bool {
        matches!(self, Self::Containers | Self::Docker)
    }

    /// Returns the mode of `diff` of a layer without parent.
    pub fn base_mode(self) -> u32 {
        match self {
            Self::Containers => 0o555,
            Self::Docker | Self::Overlay1 | Self::Aufs => 0o755,
        }
    }
}

/// The name of a layer: one path component that is nothing else in a home.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct LayerId(String);

impl LayerId {
    /// Parses a name given by a user.
    ///
    /// # Errors
    /// `Invalid` if it cannot be one.
    pub fn parse(name: &str) -> Result<Self> {
        Self::from_bytes(name.as_bytes()).ok_or_else(|| {
            Error::invalid(
                format!("layer {name:?}"),
                "is no name of a layer; use letters, digits, '-', '_' and '.', not first, at \
                 most 250 of them",
            )
        })
    }

    /// Returns the id of these bytes, `None` if they cannot be one.
    pub fn from_bytes(name: &[u8]) -> Option<Self> {
        let allowed =
            |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        let reserved = [LINK_DIR.as_bytes(), TEMPS, STAGING, b"backingFsBlockDev"];
        if !name.first()?.is_ascii_alphanumeric()
            || name.len() > 250
            || !name.iter().all(allowed)
            || reserved.contains(&name)
        {
            return None;
        }
        Some(Self(String::from_utf8(name.to_vec()).ok()?))
    }

    /// Returns the name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the name as the bytes of a file name.
    pub fn bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl fmt::Display for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The name of a symlink in `l`: 26 characters of base32.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct LinkId(String);

const LINK_LEN: usize = 26;
const LINK_ALPHABET: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";

impl LinkId {
    /// Returns the link id of these bytes, blanks at the end aside; `None` if they are none.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let text = text.trim_ascii_end();
        if text.len() != LINK_LEN || !text.iter().all(|byte| LINK_ALPHABET.contains(byte)) {
            return None;
        }
        Some(Self(String::from_utf8(text.to_vec()).ok()?))
    }

    /// Returns a new one, drawn at random.
    pub fn random() -> Self {
        let drawn: [u8; LINK_LEN] = rand::random();
        let letters = drawn.iter().map(|byte| {
            char::from(LINK_ALPHABET.get(usize::from(byte & 31)).copied().unwrap_or(b'A'))
        });
        Self(letters.collect())
    }

    /// Returns the name as the bytes of a file name.
    pub fn bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl fmt::Display for LinkId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Returns the target of the symlink of a layer.
pub fn link_target(id: &LayerId) -> Vec<u8> {
    format!("../{id}/diff").into_bytes()
}

/// Returns the layer that the target of a symlink in `l` names.
pub fn parse_link_target(target: &[u8]) -> Option<LayerId> {
    LayerId::from_bytes(target.strip_prefix(b"../")?.strip_suffix(b"/diff")?)
}

/// Returns the name of the `n`th older content of a layer, newest first; 0 is the content.
pub fn diff_name(n: usize) -> Vec<u8> {
    if n == 0 { DIFF.to_vec() } else { format!("diff{n}").into_bytes() }
}

/// The directory that holds the layers, `ROOT/overlay`, `ROOT/overlay2` or `ROOT/aufs`.
#[derive(Debug)]
pub struct Home {
    dir: OwnedFd,
    path: PathBuf,
    variant: Variant,
}

impl Home {
    /// Opens a home that exists; `None` if it does not.
    ///
    /// # Errors
    /// Those of open(2) and realpath(3).
    pub fn open(root: &Path, variant: Variant) -> Result<Option<Self>> {
        let path = root.join(variant.home_name());
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = match openat(CWD, &path, flags, Mode::empty()) {
            Ok(dir) => dir,
            Err(Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(Error::sys("open", show_path(&path), errno)),
        };
        let path =
            std::fs::canonicalize(&path).map_err(|error| io_error("realpath", &path, error))?;
        Ok(Some(Self { dir, path, variant }))
    }

    /// Opens a home, making it and the directories above it where they are missing.
    ///
    /// # Errors
    /// Those of mkdir(2) and open(2).
    pub fn create(root: &Path, variant: Variant) -> Result<Self> {
        make_dirs(root, 0o700)?;
        let path = root.join(variant.home_name());
        // As both engines do: programs in containers may have to reach layers beneath.
        make_dirs(&path, if variant == Variant::Docker { 0o710 } else { 0o700 })?;
        let home = Self::open(root, variant)?
            .ok_or_else(|| Error::sys("open", show_path(&path), Errno::NOENT))?;
        if variant.has_links() {
            home.make_dir(LINK_DIR.as_bytes(), 0o755)?;
        }
        Ok(home)
    }

    /// Returns the home itself.
    pub fn dir(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// Returns its absolute path, without symlinks.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns whose rules it follows.
    pub fn variant(&self) -> Variant {
        self.variant
    }

    /// Returns where something in it lies, for messages and for other programs.
    pub fn join(&self, names: &[&[u8]]) -> PathBuf {
        let mut path = self.path.clone();
        path.extend(names.iter().map(|name| OsStr::from_bytes(name)));
        path
    }

    /// Makes a directory in it unless it is there, and opens it.
    ///
    /// # Errors
    /// Those of mkdirat(2) and openat2(2).
    pub fn make_dir(&self, name: &[u8], mode: u32) -> Result<OwnedFd> {
        let at = || show_path(&self.join(&[name]));
        match sys::name::mkdir(At::new(self.dir(), name), mode) {
            Ok(()) | Err(Errno::EXIST) => (),
            Err(errno) => return Err(Error::sys("mkdirat", at(), errno)),
        }
        sys::open::directory(self.dir(), name).at("open", at)
    }

    /// Opens the directory of the symlinks; `None` if it was lost.
    ///
    /// # Errors
    /// Those of openat2(2).
    pub fn links(&self) -> Result<Option<OwnedFd>> {
        find_dir(self.dir(), LINK_DIR.as_bytes()).at("open", || show_path(&self.join(&[b"l"])))
    }

    /// Opens the directory of a layer; `None` if there is none.
    ///
    /// # Errors
    /// Those of openat2(2).
    pub fn layer(&self, id: &LayerId) -> Result<Option<OwnedFd>> {
        find_dir(self.dir(), id.bytes()).at("open", || self.show(id))
    }

    /// Returns the path of a layer for messages.
    pub fn show(&self, id: &LayerId) -> String {
        show_path(&self.join(&[id.bytes()]))
    }

    /// Returns all layers, sorted.
    ///
    /// # Errors
    /// Those of getdents64(2).
    pub fn list(&self) -> Result<Vec<LayerId>> {
        let mut found = Vec::new();
        let mut unsure = Vec::new();
        sys::name::list(self.dir(), |name, _, kind| {
            match (LayerId::from_bytes(name), kind) {
                (Some(id), FileType::Directory) => found.push(id),
                (Some(id), FileType::Unknown) => unsure.push(id),
                _ => (),
            }
            Ok(())
        })
        .at("getdents64", || show_path(&self.path))?;
        for id in unsure {
            if self.layer(&id)?.is_some() {
                found.push(id);
            }
        }
        found.sort();
        Ok(found)
    }
}

/// Opens directory `name` in `dir`; `None` if it is absent.
///
/// # Errors
/// Those of openat2(2), `ENOENT` aside.
pub fn find_dir(dir: BorrowedFd<'_>, name: &[u8]) -> std::result::Result<Option<OwnedFd>, Errno> {
    match sys::open::directory(dir, name) {
        Ok(dir) => Ok(Some(dir)),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// Returns whether `dir` has `name`, of whatever type; a mountpoint whose server is gone counts.
///
/// # Errors
/// Those of statx(2), `ENOENT` aside.
pub fn has(dir: BorrowedFd<'_>, name: &[u8]) -> std::result::Result<bool, Errno> {
    match stat::find(dir, name) {
        Ok(found) => Ok(found.is_some()),
        Err(Errno::NOTCONN | Errno::CONNABORTED) => Ok(true),
        Err(errno) => Err(errno),
    }
}

/// Reads a small file whole; `None` if it is absent.
///
/// # Errors
/// Those of openat(2) and read(2); `EFBIG` if it is not small.
pub fn read_small(dir: BorrowedFd<'_>, name: &[u8]) -> std::result::Result<Option<Vec<u8>>, Errno> {
    read_file(dir, name, SMALL_MAX)
}

/// Reads a file whole that has at most `max` bytes; `None` if it is absent.
///
/// # Errors
/// Those of openat(2) and read(2); `EFBIG` if it is larger.
pub fn read_file(
    dir: BorrowedFd<'_>,
    name: &[u8],
    max: u64,
) -> std::result::Result<Option<Vec<u8>>, Errno> {
    let file = match sys::open::reader(dir, name) {
        Ok(file) => std::fs::File::from(file),
        Err(Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(errno),
    };
    let mut text = Vec::new();
    file.take(max.saturating_add(1))
        .read_to_end(&mut text)
        .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    if u64::try_from(text.len()).unwrap_or(u64::MAX) > max {
        return Err(Errno::FBIG);
    }
    Ok(Some(text))
}

/// Makes a small file, which must not exist, and syncs it.
///
/// # Errors
/// Those of openat(2), write(2) and fsync(2).
pub fn write_small(
    dir: BorrowedFd<'_>,
    name: &[u8],
    text: &[u8],
    mode: u32,
) -> std::result::Result<(), Errno> {
    sys::data::sync(write_new(dir, name, text, mode)?.as_fd(), false)
}

/// Writes a small file that was not there.
///
/// # Errors
/// `EEXIST`; those of openat(2) and write(2).
/// # Crash
/// Leaves it with less in it.
pub fn write_new(
    dir: BorrowedFd<'_>,
    name: &[u8],
    text: &[u8],
    mode: u32,
) -> std::result::Result<OwnedFd, Errno> {
    let file = sys::open::create(dir, name, mode)?;
    let mut done = 0;
    while let Some(rest) = text.get(done..).filter(|rest| !rest.is_empty()) {
        let offset = u64::try_from(done).unwrap_or(u64::MAX);
        done += sys::data::write_at(file.as_fd(), rest, offset)?;
    }
    Ok(file)
}

/// Puts a small file in place of whatever has the name: written aside, synced, renamed.
///
/// # Errors
/// Those of openat(2), write(2), fsync(2) and renameat(2).
/// # Crash
/// Leaves at most a file `NAME.RANDOM`, which `store check` removes.
pub fn replace_small(
    dir: BorrowedFd<'_>,
    name: &[u8],
    text: &[u8],
    mode: u32,
) -> std::result::Result<(), Errno> {
    replace(dir, name, |aside| write_small(dir, aside, text, mode))?;
    sys::data::sync(dir, false)
}

/// Like [`replace_small`], for what need not outlive a boot: nothing is synced.
///
/// # Errors
/// Those of openat(2), write(2) and renameat(2).
/// # Crash
/// As [`replace_small`].
pub fn put_small(
    dir: BorrowedFd<'_>,
    name: &[u8],
    text: &[u8],
    mode: u32,
) -> std::result::Result<(), Errno> {
    replace(dir, name, |aside| write_new(dir, aside, text, mode).map(drop))
}

fn replace(
    dir: BorrowedFd<'_>,
    name: &[u8],
    write: impl Fn(&[u8]) -> std::result::Result<(), Errno>,
) -> std::result::Result<(), Errno> {
    let mut aside = name.to_vec();
    aside.push(b'.');
    aside.extend_from_slice(LinkId::random().bytes());
    let put = || {
        write(&aside)?;
        sys::name::rename(
            At::new(dir, &aside),
            At::new(dir, name),
            rustix::fs::RenameFlags::empty(),
        )
    };
    put().inspect_err(|_| {
        // The first error is the one to report.
        if let Err(errno) = sys::name::unlink(At::new(dir, &aside)) {
            tracing::debug!(%errno, "a file written aside stays");
        }
    })
}

/// Empties the work directory of a layer, or makes it: what is left there may refer to a content that
/// is to be another one.
///
/// # Errors
/// Those of the system calls.
/// # Crash
/// Leaves it with less in it.
pub fn renew_work(at: At<'_>, (uid, gid): (u32, u32)) -> std::result::Result<(), Errno> {
    match sys::name::mkdir(at, 0o700) {
        Ok(()) => (),
        Err(Errno::EXIST) => sys::tree::clear(at.dir, at.name)?,
        Err(errno) => return Err(errno),
    }
    let handle = sys::open::handle(at.dir, at.name)?;
    sys::name::chown_handle(&handle, Some(uid), Some(gid))?;
    sys::name::chmod_handle(&handle, 0o700)
}

/// Makes a directory and those above it, where they are missing.
///
/// # Errors
/// Those of mkdir(2).
pub fn make_dirs(path: &Path, mode: u32) -> Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .map_err(|error| io_error("mkdir", path, error))
}

/// Returns the error of a call of the standard library.
pub fn io_error(op: &'static str, path: &Path, error: std::io::Error) -> Error {
    Error::sys(op, show_path(path), Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_layers_are_components_and_nothing_else() {
        for name in ["a", "0123abc", "A-init", "x_y.z", "d".repeat(64).as_str()] {
            assert_eq!(LayerId::parse(name).unwrap().as_str(), name);
        }
        for name in
            ["", ".", "..", ".x", "a/b", "a:b", "a,b", "l", "tempdirs", "staging", "-x", "a b"]
        {
            assert!(LayerId::parse(name).is_err(), "{name}");
        }
        assert!(LayerId::parse(&"d".repeat(251)).is_err());
    }

    #[test]
    fn link_ids_are_drawn_and_parsed() {
        let drawn = LinkId::random();
        assert_eq!(LinkId::parse(drawn.bytes()), Some(drawn.clone()));
        assert_eq!(LinkId::parse(format!("{drawn}\n").as_bytes()), Some(drawn.clone()));
        assert_ne!(LinkId::random(), drawn);
        for text in ["", "A", &"a".repeat(26), &"1".repeat(26), &"A".repeat(27)] {
            assert_eq!(LinkId::parse(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn targets_of_links() {
        let id = LayerId::parse("abc").unwrap();
        assert_eq!(parse_link_target(&link_target(&id)), Some(id));
        for target in ["../abc", "abc/diff", "../../diff", "../a/b/diff", "/abc/diff", "../l/diff"]
        {
            assert_eq!(parse_link_target(target.as_bytes()), None, "{target}");
        }
    }
}
