//! Layers from a few lines of text, and mounts that clean up after themselves.
//!
//! One line for each object, words separated by blanks, `#` begins a comment line; in a word `\xNN` is a byte and `\s` a blank.
//! Parents that are missing are made (mode 755). Every object gets an old modification time of its own.
//!
//! | line | makes |
//! |---|---|
//! | `dir PATH [MODE]` | a directory |
//! | `file PATH [MODE [CONTENT]]` | a file; content `size:N` is N bytes of a pattern, `hole:N` a hole |
//! | `link NEW OLD` | a hard link |
//! | `symlink PATH TARGET` | a symbolic link |
//! | `fifo PATH [MODE]`, `socket PATH [MODE]`, `char PATH MAJOR MINOR`, `block PATH MAJOR MINOR` | a special file |
//! | `whiteout PATH` | a character device 0:0 |
//! | `xwhiteout PATH` | an empty file with the overlay xattr `whiteout`, its parent marked `opaque` = `x` |
//! | `opaque PATH [VALUE]` | the overlay xattr `opaque` on a directory, `y` unless said otherwise |
//! | `xattr PATH NAME VALUE` | an xattr |
//! | `mode PATH MODE`, `owner PATH UID GID`, `mtime PATH SECONDS[.NANOSECONDS]` | a change |

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};
use rustix::mount::UnmountFlags;

use crate::env::{self, Base};
use crate::tree::{self, Snapshot};

/// How long a mount program may take to start, and to end after its mount is gone.
const BOUND: Duration = Duration::from_secs(20);

/// How long a mount may live. After that its program is killed, so that a test that waits for an answer fails instead of
/// waiting for ever.
const LIFE: Duration = Duration::from_secs(600);

/// Who serves a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The program under test: `lamina`, unless `FUSE_TESTS_PROGRAM` names another one.
    Lamina,
    /// Kernel overlayfs; in a user namespace with `userxattr`.
    Kernel,
}

/// A directory with layers, and what is needed to mount them. Dropping it removes all and checks that no lower layer changed.
#[derive(Debug)]
pub struct Sandbox {
    root: PathBuf,
    lowers: Vec<PathBuf>,
    seals: Arc<Seals>,
    _base: Arc<Base>,
}

/// Snapshots of the lower layers, taken before the first mount.
#[derive(Debug, Default)]
struct Seals(Mutex<Vec<(PathBuf, Snapshot)>>);

const SEAL: tree::Options = tree::Options {
    private_xattrs: true,
    dir_times: true,
    identity: true,
    recent: None,
    check_ino: false,
    check_dots: false,
};

impl Seals {
    fn seal(&self, layers: &[PathBuf]) {
        let mut seals = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for layer in layers {
            if !seals.iter().any(|(path, _)| path == layer) {
                seals.push((layer.clone(), tree::snapshot_with(layer, SEAL)));
            }
        }
    }

    fn check(&self) -> Result<(), String> {
        let seals = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for (layer, before) in seals.iter() {
            let lines = tree::diff(before, &tree::snapshot_with(layer, SEAL));
            if !lines.is_empty() {
                let layer = layer.display();
                return Err(format!("lower layer {layer} CHANGED:\n{}", lines.join("\n")));
            }
        }
        Ok(())
    }
}

/// Fails the test, or only says so if it is failing already.
fn complain(text: &str) {
    if std::thread::panicking() {
        eprintln!("also: {text}");
    } else {
        panic!("{text}");
    }
}

impl Default for Sandbox {
    fn default() -> Self {
        Self::new()
    }
}

impl Sandbox {
    /// An empty one: no lower layer, an empty upper layer.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn new() -> Sandbox {
        let base = Base::get();
        let root = base.unique("sandbox");
        fs::create_dir(&root).unwrap();
        let sandbox = Sandbox { root, lowers: Vec::new(), seals: Arc::default(), _base: base };
        for name in ["upper", "work", "merged"] {
            fs::create_dir(sandbox.root.join(name)).unwrap();
        }
        sandbox
    }

    /// The directory of the sandbox, for whatever else a test needs.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The upper directory of the default mount.
    pub fn upper(&self) -> PathBuf {
        self.root.join("upper")
    }

    /// The work directory of the default mount.
    pub fn work(&self) -> PathBuf {
        self.root.join("work")
    }

    /// The mount point of the default mount.
    pub fn merged(&self) -> PathBuf {
        self.root.join("merged")
    }

    /// The lower layers, topmost first, as options have them.
    pub fn lowers(&self) -> Vec<PathBuf> {
        self.lowers.iter().rev().cloned().collect()
    }

    /// Puts a new lower layer on top of those that are there, and gives its directory.
    ///
    /// # Panics
    /// If a line is wrong or cannot be done.
    pub fn layer(&mut self, text: &str) -> PathBuf {
        let path = self.root.join(format!("l{}", self.lowers.len()));
        fs::create_dir(&path).unwrap();
        fill(&path, text);
        self.lowers.push(path.clone());
        path
    }

    /// Puts a directory that is there on top of the lower layers.
    pub fn push(&mut self, layer: PathBuf) {
        self.lowers.push(layer);
    }

    /// Puts objects into the upper layer, before it is mounted.
    ///
    /// # Panics
    /// If a line is wrong or cannot be done.
    pub fn fill_upper(&self, text: &str) {
        fill(&self.upper(), text);
    }

    /// A mount of all layers with the default upper layer, to be changed and mounted.
    pub fn spec(&self, kind: Kind) -> Spec {
        Spec {
            kind,
            lowers: self.lowers(),
            upper: Some((self.upper(), self.work())),
            merged: self.merged(),
            options: Vec::new(),
            arguments: Vec::new(),
            seals: Arc::clone(&self.seals),
        }
    }

    /// A mount of all layers with an upper layer, work directory and mount point of its own, which are made if missing.
    ///
    /// # Panics
    /// If a directory cannot be made.
    pub fn side(&self, kind: Kind, name: &str) -> Spec {
        let [upper, work, merged] =
            ["upper", "work", "merged"].map(|d| self.root.join(format!("{d}-{name}")));
        for dir in [&upper, &work, &merged] {
            if !dir.is_dir() {
                fs::create_dir(dir).unwrap();
                // The root of the merged tree has the time of the upper directory, which two sides should share.
                fill(dir, "");
            }
        }
        let mut spec = self.spec(kind);
        spec.upper = Some((upper, work));
        spec.merged = merged;
        spec
    }

    /// Mounts all layers with the default upper layer.
    ///
    /// # Panics
    /// If it cannot be mounted.
    #[track_caller]
    pub fn mount(&self, kind: Kind) -> Mount {
        self.spec(kind).mount()
    }

    /// Takes the lower layers as they are for what must not change; a mount does it by itself.
    pub fn seal(&self) {
        self.seals.seal(&self.lowers);
    }

    /// Says that the test itself changed a lower layer: it is looked at anew before the next mount.
    pub fn forget_seals(&self) {
        self.seals.0.lock().unwrap().clear();
    }

    /// Fails if a lower layer is not what it was before the first mount.
    ///
    /// # Panics
    /// If one changed.
    #[track_caller]
    pub fn check_lowers(&self) {
        self.seals.check().unwrap_or_else(|text| panic!("{text}"));
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        let mut text = String::new();
        for mount in env::mounts_below(&self.root).iter().rev() {
            text += &format!("mount left behind: {}\n", mount.display());
            let _ = rustix::mount::unmount(mount, UnmountFlags::DETACH);
        }
        if let Err(changed) = self.seals.check() {
            text += &changed;
        }
        if let Err(e) = remove_tree(&self.root) {
            text += &format!("{} left behind: {e}\n", self.root.display());
        }
        if !text.is_empty() {
            complain(&text);
        }
    }
}

/// Removes a tree, also one that a test left without permissions or with paths too long for std.
fn remove_tree(root: &Path) -> io::Result<()> {
    if fs::remove_dir_all(root).is_ok() {
        return Ok(());
    }
    Command::new("chmod").args(["-R", "u+rwx"]).arg(root).stderr(Stdio::null()).status()?;
    let output = Command::new("rm").arg("-rf").arg(root).output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(String::from_utf8_lossy(&output.stderr).into_owned()))
}

/// A mount to be made.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Who serves it.
    pub kind: Kind,
    /// Lower layers, topmost first.
    pub lowers: Vec<PathBuf>,
    /// Upper and work directory; none is a read-only mount.
    pub upper: Option<(PathBuf, PathBuf)>,
    /// Where it is mounted.
    pub merged: PathBuf,
    /// More `-o` options.
    pub options: Vec<String>,
    /// Arguments before `-o`, for the program under test only.
    pub arguments: Vec<String>,
    seals: Arc<Seals>,
}

impl Spec {
    /// Adds an `-o` option.
    #[must_use]
    pub fn option(mut self, option: &str) -> Spec {
        self.options.push(option.into());
        self
    }

    /// Adds an argument for the program under test.
    #[must_use]
    pub fn argument(mut self, argument: &str) -> Spec {
        self.arguments.push(argument.into());
        self
    }

    /// Leaves out the upper layer.
    #[must_use]
    pub fn read_only(mut self) -> Spec {
        self.upper = None;
        self
    }

    /// Uses the upper and work directory of another mount.
    #[must_use]
    pub fn on_upper_of(mut self, other: &Spec) -> Spec {
        self.upper.clone_from(&other.upper);
        self
    }

    /// The text after `-o`.
    pub fn option_text(&self) -> OsString {
        let upper = self.upper.as_ref().map(|(upper, work)| (upper, work));
        let mut text = env::overlay_options(&self.lowers, upper);
        let namespace = self.kind == Kind::Kernel && !env::is_machine_root();
        let extra = env::extra_options();
        let extra = (self.kind == Kind::Lamina && !extra.is_empty()).then_some(extra);
        let more = self.options.iter().cloned().chain(namespace.then(|| "userxattr".to_owned()));
        for option in more.chain(extra) {
            text.push(",");
            text.push(option);
        }
        text
    }

    /// The command that mounts it with the program under test.
    pub fn command(&self) -> Command {
        let mut command = Command::new(env::program());
        command.args(&self.arguments).arg("-o").arg(self.option_text()).arg(&self.merged);
        command.current_dir("/").stdin(Stdio::null());
        command
    }

    /// Runs the program under test on it and gives what it said, mounted or not; for bad input.
    ///
    /// # Panics
    /// If the program cannot be run.
    pub fn try_mount(&self) -> Result<Mount, Output> {
        self.seals.seal(&self.lowers);
        // Through files: the daemon may keep its standard error open, and a pipe would then never end.
        let log = self.merged.with_extension("log");
        let file = fs::File::create(&log).unwrap();
        let mut command = self.command();
        command.stdout(file.try_clone().unwrap()).stderr(file);
        let status = command.status().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        if status.success() {
            return Ok(Mount::new(self));
        }
        let stderr = fs::read(&log).unwrap();
        Err(Output { status, stdout: Vec::new(), stderr })
    }

    /// Mounts it.
    ///
    /// # Panics
    /// If it cannot be mounted.
    #[track_caller]
    pub fn mount(&self) -> Mount {
        match self.kind {
            Kind::Lamina => {
                let mount = self.try_mount().unwrap_or_else(|output| {
                    let text = String::from_utf8_lossy(&output.stderr);
                    panic!("{:?} gave {}: {text}", self.command(), output.status)
                });
                let there = env::mounts_below(&self.merged).contains(&self.merged);
                assert!(
                    there,
                    "the program ended with 0 but {} is no mount",
                    self.merged.display()
                );
                mount
            }
            Kind::Kernel => {
                self.seals.seal(&self.lowers);
                let options = self.option_text();
                env::mount_overlay(&options, &self.merged).unwrap_or_else(|e| {
                    panic!("mount -t overlay -o {} : {e}", options.to_string_lossy())
                });
                Mount::new(self)
            }
        }
    }
}

/// A mount; dropping it unmounts, waits for the program to end, and checks that no lower layer changed.
#[derive(Debug)]
pub struct Mount {
    spec: Spec,
    mounted: bool,
    ended: bool,
    /// Closing it ends the watch.
    _watch: mpsc::Sender<()>,
}

impl Mount {
    fn new(spec: &Spec) -> Mount {
        let (watch, closed) = mpsc::channel();
        if spec.kind == Kind::Lamina {
            let merged = spec.merged.clone();
            std::thread::spawn(move || {
                if closed.recv_timeout(LIFE) == Err(mpsc::RecvTimeoutError::Timeout) {
                    eprintln!("{} is stuck: killing who serves it", merged.display());
                    kill(&env::processes_with_argument(&merged));
                }
            });
        }
        Mount { spec: spec.clone(), mounted: true, ended: false, _watch: watch }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.spec.merged
    }

    /// What it was made from, for a remount.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// The processes that serve it.
    pub fn pids(&self) -> Vec<u32> {
        match self.spec.kind {
            Kind::Lamina => env::processes_with_argument(&self.spec.merged),
            Kind::Kernel => Vec::new(),
        }
    }

    /// Unmounts and checks what the drop checks.
    ///
    /// # Panics
    /// If the mount or its program stays, or a lower layer changed.
    pub fn unmount(mut self) {
        self.end().unwrap_or_else(|text| panic!("{text}"));
    }

    /// Unmounts and mounts again.
    ///
    /// # Panics
    /// If that fails.
    #[must_use]
    pub fn remount(mut self) -> Mount {
        // The layers are looked at when the last mount ends: too slow for each of many remounts.
        self.detach().unwrap_or_else(|text| panic!("{text}"));
        self.spec.mount()
    }

    /// Says that the test has ended the mount by other means; the checks of the drop remain.
    pub fn gone(&mut self) {
        self.mounted = false;
    }

    fn detach(&mut self) -> Result<(), String> {
        self.ended = true;
        let merged = self.spec.merged.clone();
        let mut problem = String::new();
        if std::mem::take(&mut self.mounted) {
            let end = std::time::Instant::now() + Duration::from_secs(5);
            loop {
                match rustix::mount::unmount(&merged, UnmountFlags::NOFOLLOW) {
                    Ok(()) => break,
                    Err(rustix::io::Errno::BUSY) if std::time::Instant::now() < end => {
                        std::thread::sleep(Duration::from_millis(5));
                    }
                    Err(e) => {
                        problem = format!("umount {}: {e}", merged.display());
                        let _ = rustix::mount::unmount(&merged, UnmountFlags::DETACH);
                        break;
                    }
                }
            }
        }
        if env::mounts_below(&merged).contains(&merged) {
            problem += &format!("{} is still mounted\n", merged.display());
        }
        let end = std::time::Instant::now() + BOUND;
        while !self.pids().is_empty() {
            if std::time::Instant::now() > end {
                let pids = self.pids();
                problem +=
                    &format!("{} still served by {pids:?} {BOUND:?} later", merged.display());
                pids.iter().for_each(|pid| problem += &env::threads_of(*pid));
                kill(&pids);
                break;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        if problem.is_empty() { Ok(()) } else { Err(problem) }
    }

    fn end(&mut self) -> Result<(), String> {
        self.detach().and_then(|()| self.spec.seals.check())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if !self.ended
            && let Err(text) = self.end()
        {
            complain(&text);
        }
    }
}

fn kill(pids: &[u32]) {
    for pid in pids.iter().filter_map(|pid| i32::try_from(*pid).ok()) {
        if let Some(pid) = rustix::process::Pid::from_raw(pid) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

/// Seconds of the first modification time given to an object of a layer.
const OLD: i64 = 1_000_000_000;

/// Makes the objects that `text` tells of in `root`.
///
/// # Panics
/// If a line is wrong or cannot be done.
pub fn fill(root: &Path, text: &str) {
    try_fill(root, text).unwrap_or_else(|problem| panic!("{problem}"));
}

/// Makes the objects that `text` tells of in `root`.
///
/// # Errors
/// The line that is wrong or cannot be done, and why.
pub fn try_fill(root: &Path, text: &str) -> Result<(), String> {
    let mut filler = Filler { root, dated: Vec::new() };
    for line in text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')) {
        filler.line(line).map_err(|e| format!("layer line {line:?}: {e}"))?;
    }
    // Last, because making a child changes the time of its parent; what was dated by a line comes later in the list.
    filler.dated.push((root.to_path_buf(), OLD, 0));
    for (path, seconds, nanoseconds) in filler.dated {
        set_mtime(&path, seconds, nanoseconds)
            .map_err(|e| format!("time of {}: {e}", path.display()))?;
    }
    Ok(())
}

/// Sets the modification time of an object, symlinks not followed.
///
/// # Errors
/// What utimensat(2) says.
pub fn set_mtime(path: &Path, seconds: i64, nanoseconds: u32) -> io::Result<()> {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds.into() };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(())
}

/// `n` bytes that differ for each `seed` and do not repeat with a block.
pub fn pattern(n: usize, seed: u8) -> Vec<u8> {
    (0..n).map(|i| (i.wrapping_mul(31) ^ (i >> 8)) as u8 ^ seed).collect()
}

struct Filler<'a> {
    root: &'a Path,
    dated: Vec<(PathBuf, i64, u32)>,
}

impl Filler<'_> {
    fn line(&mut self, line: &str) -> io::Result<()> {
        let words: Vec<OsString> = line.split_whitespace().map(unescape).collect();
        let word = |n: usize| {
            words.get(n).cloned().ok_or_else(|| io::Error::other(format!("word {n} is missing")))
        };
        let number = |n: usize| -> io::Result<u32> {
            word(n)?.to_str().and_then(|w| w.parse().ok()).ok_or_else(|| io::Error::other("number"))
        };
        let mode = |n: usize, default: u32| -> io::Result<u32> {
            match words.get(n) {
                None => Ok(default),
                Some(w) => w
                    .to_str()
                    .and_then(|w| u32::from_str_radix(w, 8).ok())
                    .ok_or_else(|| io::Error::other("mode")),
            }
        };
        let path = self.root.join(word(1)?);
        let verb = word(0)?;
        let verb = verb.to_str().unwrap_or_default();
        let makes = !matches!(verb, "mode" | "owner" | "mtime" | "xattr" | "opaque");
        if makes {
            self.parents(&path)?;
        }
        let node = |kind: FileType, mode: u32, major: u32, minor: u32| -> io::Result<()> {
            let device = rustix::fs::makedev(major, minor);
            rustix::fs::mknodat(CWD, &path, kind, Mode::from_raw_mode(mode), device)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(mode))
        };
        match verb {
            "dir" => {
                // `dir` after an implied parent only sets its mode.
                if !path.is_dir() {
                    fs::create_dir(&path)?;
                }
                fs::set_permissions(&path, fs::Permissions::from_mode(mode(2, 0o755)?))?;
            }
            "file" => {
                let mut file = fs::File::create_new(&path)?;
                match words.get(3).map(|w| w.as_bytes()).unwrap_or_default() {
                    size if size.starts_with(b"size:") => {
                        file.write_all(&pattern(parse_size(&size[5..])?, self.dated.len() as u8))?;
                    }
                    size if size.starts_with(b"hole:") => {
                        file.set_len(parse_size(&size[5..])? as u64)?;
                    }
                    _ => {
                        let text = words.get(3..).unwrap_or_default().join(OsStr::new(" "));
                        file.write_all_at(text.as_bytes(), 0)?;
                    }
                }
                fs::set_permissions(&path, fs::Permissions::from_mode(mode(2, 0o644)?))?;
            }
            "link" => fs::hard_link(self.root.join(word(2)?), &path)?,
            "symlink" => std::os::unix::fs::symlink(word(2)?, &path)?,
            "fifo" => node(FileType::Fifo, mode(2, 0o644)?, 0, 0)?,
            "socket" => node(FileType::Socket, mode(2, 0o644)?, 0, 0)?,
            "char" => node(FileType::CharacterDevice, 0o644, number(2)?, number(3)?)?,
            "block" => node(FileType::BlockDevice, 0o644, number(2)?, number(3)?)?,
            "whiteout" => node(FileType::CharacterDevice, 0, 0, 0)?,
            "xwhiteout" => {
                fs::File::create_new(&path)?;
                set_overlay_xattr(&path, "whiteout", b"")?;
                let parent = path.parent().unwrap_or(self.root);
                set_overlay_xattr(parent, "opaque", b"x")?;
            }
            "opaque" => {
                let value = words.get(2).map_or(&b"y"[..], |w| w.as_bytes());
                set_overlay_xattr(&path, "opaque", value)?;
            }
            "xattr" => {
                let value = words.get(3).cloned().unwrap_or_default();
                set_xattr(&path, &word(2)?, value.as_bytes())?;
            }
            "mode" => fs::set_permissions(&path, fs::Permissions::from_mode(mode(2, 0)?))?,
            "owner" => std::os::unix::fs::lchown(&path, Some(number(2)?), Some(number(3)?))?,
            "mtime" => {
                let text = word(2)?;
                let text = text.to_str().unwrap_or_default();
                let (seconds, nanoseconds) = text.split_once('.').unwrap_or((text, "0"));
                let bad = |_| io::Error::other("time");
                self.dated.push((
                    path.clone(),
                    seconds.parse().map_err(bad)?,
                    nanoseconds.parse().map_err(bad)?,
                ));
            }
            _ => return Err(io::Error::other("unknown verb")),
        }
        if makes && verb != "link" {
            self.date(path.clone());
        }
        Ok(())
    }

    fn date(&mut self, path: PathBuf) {
        let n = self.dated.len();
        self.dated.push((path, OLD + n as i64, 123_456_789));
    }

    fn parents(&mut self, path: &Path) -> io::Result<()> {
        let Some(parent) = path.parent() else { return Ok(()) };
        if parent != self.root && fs::symlink_metadata(parent).is_err() {
            self.parents(parent)?;
            fs::create_dir(parent)?;
            self.date(parent.to_path_buf());
        }
        Ok(())
    }
}

fn parse_size(text: &[u8]) -> io::Result<usize> {
    let text = std::str::from_utf8(text).unwrap_or_default();
    text.parse().map_err(|_| io::Error::other("size"))
}

fn set_overlay_xattr(path: &Path, name: &str, value: &[u8]) -> io::Result<()> {
    set_xattr(path, OsStr::new(&format!("{}{name}", env::overlay_prefix())), value)
}

/// Sets an xattr, symlinks not followed.
///
/// # Errors
/// What lsetxattr(2) says.
pub fn set_xattr(path: &Path, name: &OsStr, value: &[u8]) -> io::Result<()> {
    rustix::fs::lsetxattr(path, name, value, XattrFlags::empty())?;
    Ok(())
}

fn unescape(word: &str) -> OsString {
    let mut out = Vec::new();
    let mut rest = word.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        let hex = tail.get(1..3).and_then(|d| std::str::from_utf8(d).ok());
        let hex = hex.and_then(|d| u8::from_str_radix(d, 16).ok());
        let (real, after) = match (byte, tail.first(), hex) {
            (b'\\', Some(b'x'), Some(value)) => (value, &tail[3..]),
            (b'\\', Some(b's'), _) => (b' ', &tail[1..]),
            _ => (byte, tail),
        };
        out.push(real);
        rest = after;
    }
    OsString::from_vec(out)
}
