//! Opens the directories of one mount and refuses what cannot work, before anything is changed.
//!
//! Each directory is opened once, by the path the user gave, and known by its descriptor from
//! then on. "Inside" is decided by walking `..` from descriptors, so symlinks and names do not
//! matter.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{
    Access, AtFlags, CWD, FlockOperation, Mode, OFlags, StatVfsMountFlags, StatxFlags, accessat,
    flock, fstatfs, fstatvfs, openat, statx,
};
use tracing::{debug, warn};

use super::{MountSpec, refuse};
use crate::error::{Context, Errno, Error, Result};
use crate::options::{self, RedirectDir, show_path};
use crate::sys::mountfd::private_read_only;
use crate::union::{Config, CopyLimit, Follow, LayerSpec, UpperSpec, Uuid, Verity};

/// Returns a lower's directory cut off from what is or will be mounted beneath it, and write
/// protected by the kernel; as it is where the caller may not mount.
fn private(dir: OwnedFd) -> OwnedFd {
    match private_read_only(dir.as_fd()) {
        Ok(clone) => clone,
        Err(errno) => {
            debug!(%errno, "a lower layer is used without a mount of its own");
            dir
        }
    }
}

/// How long an earlier mount on the same upper may take to end after its unmount.
const LOCK_WAIT: Duration = Duration::from_secs(2);
/// Deepest directory whose ancestors are walked.
const DEPTH_MAX: usize = 4096;

/// The open and checked directories of one mount.
#[derive(Debug)]
pub struct Stack {
    lowers: Vec<Place>,
    /// Data-only layers.
    data: Vec<Place>,
    upper: Option<Place>,
    work: Option<Place>,
    merged: Merged,
}

/// The mountpoint.
#[derive(Debug)]
pub struct Merged {
    /// Its absolute path without symlinks.
    pub path: PathBuf,
    /// Held open, and locked shared, while the server lives: whoever unmounts it can wait for the
    /// server's end. `None` where the directory cannot be opened for reading or locked.
    pub alive: Option<OwnedFd>,
}

/// Locks that keep a second server off the upper and work directories while they are held.
#[derive(Debug)]
pub struct Locks(#[allow(dead_code, reason = "held, not read")] Vec<OwnedFd>);

impl Stack {
    /// Opens and checks everything that `spec` names; relative paths start at the current
    /// directory.
    ///
    /// # Errors
    /// One sentence with the option, the path, the system call and the cure.
    pub fn open(spec: &MountSpec) -> Result<Self> {
        let options = spec.options();
        let mut seen = Seen::default();
        let mut lowers = Vec::new();
        let count = options.lowers.len();
        if let (Some(path), true) = (&options.upper, options.read_only) {
            lowers.push(Place::open(Role::Upper, path, &mut seen)?);
        }
        for (index, path) in options.lowers.iter().enumerate() {
            lowers.push(Place::open(Role::Lower { number: index + 1, count }, path, &mut seen)?);
        }
        let mut data = Vec::new();
        for (index, path) in options.data.iter().enumerate() {
            let role = Role::Data { number: index + 1, count: options.data.len() };
            data.push(Place::open(role, path, &mut seen)?);
        }
        let (mut upper, mut work) = (None, None);
        if let (Some(upper_path), Some(work_path), false) =
            (&options.upper, &options.work, options.read_only)
        {
            let opened_upper = Place::open(Role::Upper, upper_path, &mut seen)?;
            let opened_work = Place::open(Role::Work, work_path, &mut seen)?;
            check_pair(&opened_upper, &opened_work)?;
            for lower in lowers.iter().chain(&data) {
                check_apart(lower, &opened_upper)?;
                check_apart(lower, &opened_work)?;
            }
            check_writable(&opened_upper, &opened_work)?;
            upper = Some(opened_upper);
            work = Some(opened_work);
        }
        let point = Place::open_mountpoint(spec.merged(), &mut seen)?;
        for layer in lowers.iter().chain(&data).chain(&upper).chain(&work) {
            check_mountpoint(layer, &point)?;
        }
        let path = resolve(spec.merged())?;
        let merged = Merged { path, alive: lock_shared(&point) };
        Ok(Self { lowers, data, upper, work, merged })
    }

    /// Takes the locks on upper and work, waiting a moment for an earlier server that is ending.
    ///
    /// # Errors
    /// `Busy` if another live mount has them.
    pub fn lock(&self) -> Result<Locks> {
        let mut held = Vec::new();
        for place in self.upper.iter().chain(&self.work) {
            held.extend(lock_exclusive(place)?);
        }
        Ok(Locks(held))
    }

    /// Turns the directories into what the union is built of, and the mountpoint.
    pub fn into_config(self, spec: &MountSpec) -> (Config, Merged) {
        let layer = |place: Place| LayerSpec { dir: private(place.dir), path: place.path };
        let upper = match (self.upper, self.work) {
            (Some(upper), Some(work)) => Some(UpperSpec {
                dir: upper.dir,
                work: work.dir,
                path: upper.path,
                work_path: work.path,
            }),
            _ => None,
        };
        let options = spec.options();
        let config = Config {
            lowers: self.lowers.into_iter().map(layer).collect(),
            upper,
            volatile: options.volatile || !options.sync,
            volatile_mark: options.volatile,
            ids: options.ids.clone(),
            static_nlink: options.static_nlink,
            ino32: options.ino32,
            overrides: options.overrides,
            userxattr: options.userxattr,
            follow: match spec.redirect_dir() {
                RedirectDir::NoFollow => Follow::Nobody,
                RedirectDir::Off => Follow::Trusted,
                RedirectDir::On | RedirectDir::Follow => Follow::Anybody,
            },
            redirects: spec.redirect_dir() == RedirectDir::On,
            lacks: options.upper_lacks.clone(),
            index: options.index,
            uuid: match options.uuid {
                options::Uuid::Auto | options::Uuid::Null => Uuid::Auto,
                options::Uuid::On => Uuid::On,
                options::Uuid::Off => Uuid::Off,
            },
            metacopy: spec.metacopy(),
            verity: match options.verity {
                options::Verity::Off => Verity::Off,
                options::Verity::On => Verity::On,
                options::Verity::Require => Verity::Require,
            },
            data: self.data.into_iter().map(layer).collect(),
            copy_limit: CopyLimit {
                entries: options.dir_rename_entries,
                bytes: options.dir_rename_size,
            },
        };
        (config, self.merged)
    }
}

/// What a directory is to the mount.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Role {
    Lower { number: usize, count: usize },
    Data { number: usize, count: usize },
    Upper,
    Work,
    Merged,
}

/// One open directory.
#[derive(Debug)]
struct Place {
    role: Role,
    path: PathBuf,
    dir: OwnedFd,
    id: Id,
    /// Directories above it, nearest first.
    above: Vec<Id>,
}

/// What tells one directory from another.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Id {
    device: (u32, u32),
    ino: u64,
    /// Number of the mount it was reached through, 0 where the kernel does not say.
    mount: u64,
}

impl Id {
    fn of(dir: BorrowedFd<'_>) -> std::result::Result<Self, Errno> {
        let stat = statx(dir, "", AtFlags::EMPTY_PATH, StatxFlags::INO | StatxFlags::MNT_ID)?;
        Ok(Self {
            device: (stat.stx_dev_major, stat.stx_dev_minor),
            ino: stat.stx_ino,
            mount: stat.stx_mnt_id,
        })
    }

    fn is(&self, other: &Self) -> bool {
        self.device == other.device && self.ino == other.ino
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&label(self.role, &self.path))
    }
}

impl Place {
    fn open(role: Role, path: &Path, seen: &mut Seen) -> Result<Self> {
        Self::open_with(role, path, OFlags::RDONLY, seen)
    }

    fn open_mountpoint(path: &Path, seen: &mut Seen) -> Result<Self> {
        let readable = Self::open_with(Role::Merged, path, OFlags::RDONLY, seen);
        // Only waiting for the server's end needs the right to read it.
        readable.or_else(|_| Self::open_with(Role::Merged, path, OFlags::PATH, seen))
    }

    fn open_with(role: Role, path: &Path, access: OFlags, seen: &mut Seen) -> Result<Self> {
        let failed = |op: &str, errno| refuse(label(role, path), op, errno, cure(role, errno));
        let flags = access | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = openat(CWD, path, flags, Mode::empty()).map_err(|errno| {
            if errno == Errno::NOENT && is_plugin(role, path) {
                return Error::invalid(label(role, path), PLUGIN);
            }
            failed("open", errno)
        })?;
        let id = Id::of(dir.as_fd()).map_err(|errno| failed("statx", errno))?;
        // A dead server's directory still opens and may answer statx(2) from the kernel's cache.
        if seen.alive.insert(id.device) {
            fstatfs(&dir).map_err(|errno| failed("fstatfs", errno))?;
        }
        let above = seen.ancestors(dir.as_fd(), id);
        Ok(Self { role, path: path.to_owned(), dir, id, above })
    }

    /// Returns whether it lies below `other`, seen through the same mount.
    fn is_inside(&self, other: &Self) -> bool {
        self.above
            .iter()
            .take_while(|above| above.mount == self.id.mount)
            .any(|above| above.is(&other.id))
    }

    /// Returns whether a mount on `other` would hide it.
    fn is_hidden_by(&self, other: &Self) -> bool {
        self.above.iter().any(|above| above.is(&other.id))
    }
}

/// Returns a directory as the option that names it.
fn label(role: Role, path: &Path) -> String {
    let path = show_path(path);
    match role {
        Role::Lower { count: 1, .. } => format!("lowerdir={path}"),
        Role::Lower { number, count } => format!("lowerdir={path} (layer {number} of {count})"),
        Role::Data { number, count } => {
            format!("datadir={path} (data-only layer {number} of {count})")
        }
        Role::Upper => format!("upperdir={path}"),
        Role::Work => format!("workdir={path}"),
        Role::Merged => path,
    }
}

/// What is said of a plugin layer.
const PLUGIN: &str = "is a plugin layer of fuse-overlayfs (//PLUGIN/DATA/PATH): not supported by this \
     version: layers are plain directories";

/// Tells whether `path`, where no directory is, means a plugin of fuse-overlayfs.
fn is_plugin(role: Role, path: &Path) -> bool {
    matches!(role, Role::Lower { .. }) && path.as_os_str().as_encoded_bytes().starts_with(b"//")
}

/// Returns what helps when a directory cannot be opened.
fn cure(role: Role, errno: Errno) -> &'static str {
    match (errno, role) {
        (Errno::NOENT, Role::Lower { .. } | Role::Data { .. }) => {
            "create it or correct the path (a colon in a path is written \\:, a comma \\,)"
        }
        (Errno::NOENT, Role::Merged) => "create the mountpoint with mkdir",
        (Errno::NOENT, _) => "create it with mkdir or correct the path",
        (Errno::NOTDIR, _) => "name a directory",
        (Errno::ACCESS, _) => {
            "make it readable, or run as its owner or in the user namespace that owns it \
             (podman unshare)"
        }
        (Errno::NOTCONN, _) => "it is a mount whose server has died; remove it with lamina unmount",
        (Errno::MFILE, _) => "allow more open files (ulimit -Hn), or merge some layers first",
        _ => "check the path and its filesystem",
    }
}

/// What is known of the machine from the directories before: layers of one mount mostly lie side by
/// side, and each is asked no more than it has of its own.
#[derive(Default)]
struct Seen {
    /// Filesystems that answered.
    alive: HashSet<(u32, u32)>,
    /// Directories that another one lies in, with those above them, nearest first.
    above: HashMap<Id, Vec<Id>>,
}

impl Seen {
    /// Returns the directories above `dir`, nearest first, as far as they may be seen.
    fn ancestors(&mut self, dir: BorrowedFd<'_>, id: Id) -> Vec<Id> {
        let mut above = Vec::new();
        let (mut last, mut holder): (Id, Option<OwnedFd>) = (id, None);
        while above.len() < DEPTH_MAX {
            let from = holder.as_ref().map_or(dir, AsFd::as_fd);
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let Ok(parent) = openat(from, "..", flags, Mode::empty()) else { break };
            let Ok(next) = Id::of(parent.as_fd()) else { break };
            if next == last {
                break;
            }
            above.push(next);
            if let Some(rest) = self.above.get(&next) {
                above.extend(rest);
                break;
            }
            (last, holder) = (next, Some(parent));
        }
        for (index, id) in above.iter().enumerate() {
            let rest = above.get(index + 1..).unwrap_or_default();
            self.above.entry(*id).or_insert_with(|| rest.to_vec());
        }
        above
    }
}

/// Upper and work: one filesystem, one mount, neither inside the other.
fn check_pair(upper: &Place, work: &Place) -> Result<()> {
    let why = if work.id.is(&upper.id) {
        "is the upper directory itself; use another directory beside it".to_owned()
    } else if work.is_inside(upper) {
        format!("lies inside {upper}; use a directory beside it")
    } else if upper.is_inside(work) {
        format!("holds {upper}; use a directory beside it")
    } else if work.id.device != upper.id.device || work.id.mount != upper.id.mount {
        format!(
            "is not on the filesystem of {upper} (rename between them: {}); \
             use a directory on the same filesystem and mount",
            Error::Refused(Errno::XDEV)
        )
    } else {
        return Ok(());
    };
    Err(Error::invalid(work.to_string(), why))
}

/// A lower shares nothing with upper or work: what is written there would change the lower.
fn check_apart(lower: &Place, written: &Place) -> Result<()> {
    let why = if lower.id.is(&written.id) {
        format!("is also {written}; use separate directories")
    } else if lower.is_inside(written) {
        format!("lies inside {written}; use separate directories")
    } else if written.is_inside(lower) {
        format!("holds {written}; move that one outside of the layer")
    } else {
        return Ok(());
    };
    Err(Error::invalid(lower.to_string(), why))
}

/// The mount hides no layer, and does not lie in what it writes.
fn check_mountpoint(layer: &Place, point: &Place) -> Result<()> {
    if layer.is_hidden_by(point) {
        return Err(Error::invalid(
            layer.to_string(),
            format!("lies inside the mountpoint {point}; mount on a directory outside of it"),
        ));
    }
    let is_written = matches!(layer.role, Role::Upper | Role::Work);
    if is_written && (point.id.is(&layer.id) || point.is_inside(layer)) {
        return Err(Error::invalid(
            point.to_string(),
            format!("the mountpoint lies in {layer}; mount on a directory outside of it"),
        ));
    }
    Ok(())
}

fn check_writable(upper: &Place, work: &Place) -> Result<()> {
    let stat = fstatvfs(&upper.dir).at("fstatvfs", || upper.to_string())?;
    if stat.f_flag.contains(StatVfsMountFlags::RDONLY) {
        return Err(refuse(
            upper.to_string(),
            "fstatvfs",
            Errno::ROFS,
            "use a writable filesystem, or -o ro to read the upper as one more layer",
        ));
    }
    for place in [work, upper] {
        match accessat(&place.dir, ".", Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS) {
            Ok(()) => (),
            // A new upper may be changed below a top that may not: only work must be writable.
            Err(errno) if place.role == Role::Upper => {
                debug!("{place}: faccessat: {}", Error::Refused(errno));
            }
            Err(errno) => {
                return Err(refuse(
                    place.to_string(),
                    "faccessat",
                    errno,
                    "make it writable, or run as its owner or in the user namespace that owns it",
                ));
            }
        }
    }
    Ok(())
}

/// Returns the absolute path of the mountpoint.
fn resolve(path: &Path) -> Result<PathBuf> {
    std::fs::canonicalize(path).map_err(|error| {
        let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
        refuse(show_path(path), "realpath", errno, cure(Role::Merged, errno))
    })
}

/// Takes the shared lock on the mountpoint by which others wait for the server's end.
fn lock_shared(point: &Place) -> Option<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = openat(&point.dir, ".", flags, Mode::empty()).ok()?;
    // Whoever waits for an earlier server's end holds the other lock for an instant.
    for _ in 0..10 {
        match flock(&dir, FlockOperation::NonBlockingLockShared) {
            Ok(()) => return Some(dir),
            Err(Errno::WOULDBLOCK) => std::thread::sleep(Duration::from_millis(5)),
            Err(_) => break,
        }
    }
    None
}

/// Takes the lock on an upper or work directory.
fn lock_exclusive(place: &Place) -> Result<Option<OwnedFd>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = openat(&place.dir, ".", flags, Mode::empty()).at("open", || place.to_string())?;
    let end = Instant::now() + LOCK_WAIT;
    loop {
        match flock(&dir, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(Some(dir)),
            Err(Errno::INTR) => (),
            Err(Errno::WOULDBLOCK) if Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(Errno::WOULDBLOCK) => return Err(busy(place)),
            // Network filesystems may have no lock for a directory.
            Err(errno) => {
                warn!("{place}: flock: {}; not guarded against a second mount", Error::from(errno));
                return Ok(None);
            }
        }
    }
}

/// Returns the error for a directory that another server has.
fn busy(place: &Place) -> Error {
    let mut table = String::new();
    let holder = File::open("/proc/locks")
        .and_then(|mut file| file.read_to_string(&mut table))
        .ok()
        .and_then(|_| find_lock_holder(&table, place.id.device, place.id.ino));
    let (by, how) = match holder {
        Some(pid) => (format!(" (process {pid})"), format!("ps -fp {pid}")),
        None => (String::new(), "findmnt -t fuse.lamina".to_owned()),
    };
    Error::Busy {
        what: format!(
            "{place}: flock: in use by another live mount{by}; unmount that one first, \
             it is shown by: {how}"
        )
        .into(),
    }
}

/// Returns the process that holds a flock on an inode, from the text of /proc/locks.
fn find_lock_holder(table: &str, device: (u32, u32), ino: u64) -> Option<u32> {
    // 1: FLOCK  ADVISORY  WRITE 4711 fe:00:12345 0 EOF
    let wanted = format!("{:02x}:{:02x}:{ino}", device.0, device.1);
    table.lines().find_map(|line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let (kind, pid, inode) = (fields.next()?, fields.nth(2)?, fields.next()?);
        let pid: u32 = pid.parse().ok()?;
        (kind == "FLOCK" && inode == wanted && pid != 0).then_some(pid)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::MountOptions;
    use std::os::unix::fs::symlink;

    /// Makes a fresh tree and returns the sentence that refuses `list` there, or `Ok`.
    fn check(list: &str, merged: &str) -> std::result::Result<Stack, String> {
        let root = tempfile::tempdir().unwrap();
        let at = root.path();
        for dir in ["l1/sub", "l2", "u/in", "w", "m/in", "w/in"] {
            std::fs::create_dir_all(at.join(dir)).unwrap();
        }
        std::fs::File::create(at.join("file")).unwrap();
        symlink("u", at.join("link")).unwrap();
        let list = list.replace('@', at.to_str().unwrap());
        let merged = merged.replace('@', at.to_str().unwrap());
        let options = MountOptions::parse(&[list]).unwrap().0;
        let spec = MountSpec::new(options, merged.into()).unwrap();
        Stack::open(&spec).map_err(|error| error.to_string().replace(at.to_str().unwrap(), "@"))
    }

    #[test]
    fn good_stacks_open() {
        for (list, merged) in [
            ("lowerdir=@/l1", "@/m"),
            ("lowerdir=@/l1:@/l2,upperdir=@/u,workdir=@/w", "@/m"),
            // Mounting over a lower hides nothing that is not held open.
            ("lowerdir=@/l1:@/l2,upperdir=@/u,workdir=@/w", "@/l1"),
            ("lowerdir=@/l1:@/l2,upperdir=@/link,workdir=@/w", "@/l1/sub"),
            ("lowerdir=@/l1,upperdir=@/u,ro", "@/m"),
        ] {
            check(list, merged).unwrap();
        }
    }

    #[test]
    fn bad_stacks_are_refused_in_one_sentence_with_a_cure() {
        for (list, merged, start) in [
            ("lowerdir=@/l1:@/no", "@/m", "lowerdir=@/no (layer 2 of 2): open: No such file"),
            ("lowerdir=@/no", "@/m", "lowerdir=@/no: open: No such file"),
            ("lowerdir=@/file", "@/m", "lowerdir=@/file: open: Not a directory"),
            ("lowerdir=@/l1,upperdir=@/no,workdir=@/w", "@/m", "upperdir=@/no: open: No such"),
            ("lowerdir=@/l1,upperdir=@/u,workdir=@/no", "@/m", "workdir=@/no: open: No such"),
            ("lowerdir=@/l1,upperdir=@/u,workdir=@/u", "@/m", "workdir=@/u: is the upper"),
            ("lowerdir=@/l1,upperdir=@/u,workdir=@/link", "@/m", "workdir=@/link: is the upper"),
            (
                "lowerdir=@/l1,upperdir=@/u,workdir=@/u/in",
                "@/m",
                "workdir=@/u/in: lies inside upper",
            ),
            ("lowerdir=@/l1,upperdir=@/w/in,workdir=@/w", "@/m", "workdir=@/w: holds upperdir="),
            (
                "lowerdir=@/l1,upperdir=@/u,workdir=/proc",
                "@/m",
                "workdir=/proc: is not on the file",
            ),
            ("lowerdir=@/u,upperdir=@/u,workdir=@/w", "@/m", "lowerdir=@/u: is also upperdir=@/u"),
            ("lowerdir=@/u/in,upperdir=@/u,workdir=@/w", "@/m", "lowerdir=@/u/in: lies inside upp"),
            ("lowerdir=@/w/in,upperdir=@/u,workdir=@/w", "@/m", "lowerdir=@/w/in: lies inside wor"),
            ("lowerdir=@,upperdir=@/u,workdir=@/w", "@/m", "lowerdir=@: holds upperdir=@/u"),
            ("lowerdir=@/m/in", "@/m", "lowerdir=@/m/in: lies inside the mountpoint @/m"),
            ("lowerdir=@/l1,upperdir=@/u,workdir=@/w", "@/u", "@/u: the mountpoint lies in upper"),
            ("lowerdir=@/l1,upperdir=@/u,workdir=@/w", "@/w/in", "@/w/in: the mountpoint lies in"),
            ("lowerdir=@/l1", "@/no", "@/no: open: No such file or directory; create the mount"),
            ("lowerdir=@/l1", "@/file", "@/file: open: Not a directory; name a directory"),
        ] {
            let message = check(list, merged).unwrap_err();
            assert!(message.starts_with(start), "{message}\n{start}");
            assert!(message.contains("; ") && message.lines().count() == 1, "{message}");
        }
    }

    #[test]
    fn an_upper_has_one_mount_at_a_time() {
        let root = tempfile::tempdir().unwrap();
        for dir in ["l", "u", "w", "m"] {
            std::fs::create_dir(root.path().join(dir)).unwrap();
        }
        let at = root.path().display();
        let list = format!("lowerdir={at}/l,upperdir={at}/u,workdir={at}/w");
        let options = MountOptions::parse(&[list]).unwrap().0;
        let spec = MountSpec::new(options, root.path().join("m")).unwrap();
        let first = Stack::open(&spec).unwrap().lock().unwrap();
        let second = Stack::open(&spec).unwrap();
        let message = second.lock().unwrap_err().to_string();
        let start = format!("upperdir={at}/u: flock: in use by another live mount");
        assert!(message.starts_with(&start), "{message}");
        drop(first);
        second.lock().unwrap();
    }

    #[test]
    fn the_holder_of_a_lock_is_found_by_its_inode() {
        let table = "1: POSIX  ADVISORY  WRITE 10 fe:00:77 0 EOF\n\
                     2: FLOCK  ADVISORY  READ 11 fe:00:78 0 EOF\n\
                     3: FLOCK  ADVISORY  WRITE 12 fe:00:77 0 EOF\n4: -> FLOCK\nx\n\n";
        assert_eq!(find_lock_holder(table, (0xfe, 0), 77), Some(12));
        assert_eq!(find_lock_holder(table, (0xfe, 0), 79), None);
    }
}
