//! What tests on hand-made layers share: a [`Case`] to fill by path and mount, short words for what they look at, other
//! people who act on a mount, and who may run a test.
//!
//! Every function fails the calling test if it cannot do its work.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use rustix::fs::{CWD, FileType, Mode};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use rustix::process::Pid;

use crate::env::{self, wait_until};
use crate::fixture::{Kind, Mount, Sandbox, Spec, set_xattr};

/// Ends the calling test without root of the machine, who may make whiteouts, owners and `trusted.` xattrs, or FUSE.
#[macro_export]
macro_rules! needs_root {
    () => {
        if !$crate::env::is_machine_root() {
            $crate::skip!("needs root of the machine");
        }
        if let Some(reason) = $crate::env::no_fuse() {
            $crate::skip!("{reason}");
        }
    };
}

/// Ends the calling test where kernel overlay cannot be mounted for comparison.
#[macro_export]
macro_rules! needs_kernel_overlay {
    () => {
        if let Some(reason) = $crate::env::no_kernel_overlay() {
            $crate::skip!("{reason}");
        }
    };
}

/// Makes two tests of a function: as root, and in a user namespace.
#[macro_export]
macro_rules! both {
    ($name:ident) => {
        mod $name {
            #[test]
            fn as_root() {
                $crate::needs_root!();
                super::$name();
            }

            #[test]
            fn in_a_user_namespace() {
                if let Some(reason) = $crate::env::no_fuse() {
                    $crate::skip!("{reason}");
                }
                if !$crate::ran_in_user_namespace!() {
                    super::$name();
                }
            }
        }
    };
}

/// How long a test waits for what should come at once.
pub const BOUND: Duration = Duration::from_secs(10);

/// A version 2 capability record: `CAP_NET_RAW`, permitted and effective.
pub const CAP_NET_RAW: &[u8] = &[1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// Lower layers to be filled by path, then a mount of them.
#[derive(Debug)]
pub struct Case {
    /// The mount, while there is one that was not made by hand.
    pub mount: Option<Mount>,
    by_hand: bool,
    /// Its directories.
    pub sandbox: Sandbox,
}

impl Case {
    /// One with so many empty lower layers, not mounted.
    pub fn new(lowers: usize) -> Case {
        let mut sandbox = Sandbox::new();
        for _ in 0..lowers {
            sandbox.layer("");
        }
        Case { mount: None, by_hand: false, sandbox }
    }

    /// A path in lower layer `n`, 0 being the topmost.
    pub fn l(&self, n: usize, path: &str) -> PathBuf {
        below(&self.sandbox.lowers()[n], path)
    }

    /// A path in the mount.
    pub fn m(&self, path: &str) -> PathBuf {
        below(&self.sandbox.merged(), path)
    }

    /// A path in the upper layer.
    pub fn u(&self, path: &str) -> PathBuf {
        below(&self.sandbox.upper(), path)
    }

    /// A path in the work directory.
    pub fn w(&self, path: &str) -> PathBuf {
        below(&self.sandbox.work(), path)
    }

    /// The mount of all layers, to be changed.
    pub fn spec(&self) -> Spec {
        self.sandbox.spec(Kind::Lamina)
    }

    /// Mounts all layers.
    #[track_caller]
    pub fn mount(&mut self) {
        self.mount = Some(self.spec().mount());
    }

    /// Mounts all layers with an `-o` option more.
    #[track_caller]
    pub fn mount_with(&mut self, option: &str) {
        self.mount = Some(self.spec().option(option).mount());
    }

    /// Mounts with the server started by a shell that did `setup` before: a umask, a limit.
    #[track_caller]
    pub fn mount_after(&mut self, setup: &str) {
        self.sandbox.seal();
        let own = self.spec().command();
        let mut command = Command::new("sh");
        command.args(["-c", &format!("{setup}; exec \"$@\""), "sh"]);
        command.arg(own.get_program()).args(own.get_args()).stdin(Stdio::null());
        self.mount_by_hand(command);
    }

    /// Mounts without the checksums of the lowers: for layers too large, or that fail by design.
    #[track_caller]
    pub fn mount_unsealed(&mut self) {
        let command = self.spec().command();
        self.mount_by_hand(command);
    }

    /// As [`Case::mount_unsealed`], with an `-o` option more.
    #[track_caller]
    pub fn mount_unsealed_with(&mut self, option: &str) {
        let command = self.spec().option(option).command();
        self.mount_by_hand(command);
    }

    /// Mounts by a command that ends when the mount is there.
    #[track_caller]
    pub fn mount_by_hand(&mut self, mut command: Command) {
        let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
        assert!(status.success(), "{command:?}: {status}");
        self.by_hand = true;
    }

    /// Unmounts, waits for the server to end, and checks the lowers.
    #[track_caller]
    pub fn unmount(&mut self) {
        if let Some(mount) = self.mount.take() {
            mount.unmount();
        }
        if std::mem::take(&mut self.by_hand) {
            let merged = self.sandbox.merged();
            umount(&merged);
            wait_for_servers(&merged);
        }
    }

    /// Unmounts and mounts again; what was mounted by hand in the ordinary way.
    #[track_caller]
    pub fn remount(&mut self) {
        if let Some(mount) = self.mount.take() {
            self.mount = Some(mount.remount());
        } else {
            self.unmount();
            self.mount();
        }
    }

    /// The process that serves the mount.
    #[track_caller]
    pub fn server(&self) -> Pid {
        the_server(&self.sandbox.merged())
    }

    /// Processor time the threads of the server have used so far.
    pub fn server_nanoseconds(&self) -> u64 {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.server())).unwrap();
        tasks
            .filter_map(|task| fs::read_to_string(task.unwrap().path().join("schedstat")).ok())
            .map(|text| text.split(' ').next().unwrap().parse::<u64>().unwrap())
            .sum()
    }

    /// Waits until no thread of the server is at work, also for nobody.
    pub fn settle(&self) {
        let tasks = format!("/proc/{}/task", self.server());
        let rests = |task: fs::DirEntry| {
            let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('S'))
        };
        wait_until("the server to rest", BOUND, || {
            fs::read_dir(&tasks).unwrap().flatten().all(rests)
        });
    }

    /// Bytes the server has read and written by system calls so far.
    pub fn server_io(&self) -> u64 {
        self.server_numbers("io", &["rchar:", "wchar:"])
    }

    /// Memory of the server, in KiB.
    pub fn server_memory(&self) -> u64 {
        self.server_numbers("status", &["VmRSS:"])
    }

    /// Memory of the server without that of the files it is mapped from, in KiB.
    pub fn server_heap(&self) -> u64 {
        self.server_numbers("status", &["RssAnon:"])
    }

    /// How many descriptors the server has open.
    pub fn server_descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.server())).unwrap().count()
    }

    /// The sum of the numbers behind some words of a file in the server's /proc directory.
    fn server_numbers(&self, file: &str, words: &[&str]) -> u64 {
        let text = fs::read_to_string(format!("/proc/{}/{file}", self.server())).unwrap();
        text.lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>())
            .filter(|line| line.len() > 1 && words.contains(&line[0]))
            .map(|line| line[1].parse::<u64>().unwrap())
            .sum()
    }
}

impl Drop for Case {
    fn drop(&mut self) {
        if self.by_hand {
            let merged = self.sandbox.merged();
            let _ = rustix::mount::unmount(&merged, UnmountFlags::DETACH);
            wait_for_servers(&merged);
        }
    }
}

fn below(dir: &Path, path: &str) -> PathBuf {
    if path.is_empty() { dir.to_path_buf() } else { dir.join(path) }
}

fn wait_for_servers(merged: &Path) {
    wait_until("the end of the server", BOUND, || env::processes_with_argument(merged).is_empty());
}

/// The process that serves the mount at `merged`.
#[track_caller]
pub fn the_server(merged: &Path) -> Pid {
    let pids = env::processes_with_argument(merged);
    assert_eq!(pids.len(), 1, "{pids:?}");
    Pid::from_raw(i32::try_from(pids[0]).unwrap()).unwrap()
}

/// True if something is mounted right there.
pub fn is_mounted(path: &Path) -> bool {
    env::mounts_below(path).iter().any(|mount| mount == path)
}

/// Unmounts by system call. A test beside this one may hold a descriptor for the moment between
/// its fork and exec.
#[track_caller]
pub fn umount(path: &Path) {
    let mut answer = Ok(());
    wait_until("the mount to be free", BOUND, || {
        answer = rustix::mount::unmount(path, UnmountFlags::empty());
        answer != Err(Errno::BUSY)
    });
    answer.unwrap_or_else(|e| panic!("umount {}: {e}", path.display()));
}

/// Makes the kernel drop all names and inodes that are not in use.
pub fn forget_all() {
    fs::write("/proc/sys/vm/drop_caches", "2\n").unwrap();
}

/// Another filesystem, mounted below the sandbox until dropped.
#[derive(Debug)]
pub struct OtherFs {
    /// Its root.
    pub path: PathBuf,
}

impl OtherFs {
    /// An empty tmpfs.
    #[track_caller]
    pub fn tmpfs(c: &Case, name: &str) -> OtherFs {
        Self::mount(c, name, "tmpfs", "mode=755")
    }

    /// One of a type that needs no device.
    #[track_caller]
    pub fn mount(c: &Case, name: &str, kind: &str, options: &str) -> OtherFs {
        let path = c.sandbox.root().join(name);
        fs::create_dir(&path).unwrap();
        let status = Command::new("mount")
            .args(["-t", kind, "-o", options, name])
            .arg(&path)
            .status()
            .unwrap();
        assert!(status.success());
        OtherFs { path }
    }

    /// A fresh filesystem in a file, made by `mkfs.KIND`; what is missing to make one is the error.
    pub fn image(c: &Case, name: &str, kind: &str) -> Result<OtherFs, String> {
        let image = c.sandbox.root().join(format!("{name}.img"));
        let file = fs::File::create(&image).unwrap();
        // Sparse; the least that all of them take.
        file.set_len(320 << 20).unwrap();
        let path = c.sandbox.root().join(name);
        fs::create_dir(&path).unwrap();
        let run = |program: &str, arguments: &[&str], at: &[&Path]| {
            let out = Command::new(program).args(arguments).args(at).output();
            match out {
                Ok(out) if out.status.success() => Ok(()),
                Ok(out) => Err(said(&out)),
                Err(error) => Err(format!("{program}: {error}")),
            }
        };
        run(&format!("mkfs.{kind}"), &["-q"], &[&image])?;
        run("mount", &["-t", kind, "-o", "loop"], &[&image, &path])?;
        Ok(OtherFs { path })
    }
}

impl Drop for OtherFs {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.path, UnmountFlags::DETACH);
    }
}

/// Writes a file, with its parents.
#[track_caller]
pub fn put(path: impl AsRef<Path>, content: impl AsRef<[u8]>) {
    fs::create_dir_all(path.as_ref().parent().unwrap()).unwrap();
    fs::write(&path, content).unwrap_or_else(|e| panic!("{}: {e}", path.as_ref().display()));
}

/// Writes at the end of a file that is there.
#[track_caller]
pub fn append(path: impl AsRef<Path>, content: &str) {
    let mut file = OpenOptions::new().append(true).open(&path).unwrap();
    file.write_all(content.as_bytes()).unwrap();
}

/// The content of a file.
#[track_caller]
pub fn text(path: impl AsRef<Path>) -> String {
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.as_ref().display()))
}

/// The sorted names of a directory; each must be found by lookup too, and listed once.
#[track_caller]
pub fn names(dir: impl AsRef<Path>) -> Vec<String> {
    let dir = dir.as_ref();
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    for name in &names {
        fs::symlink_metadata(dir.join(name))
            .unwrap_or_else(|e| panic!("{name} is listed in {} but: {e}", dir.display()));
    }
    assert!(names.windows(2).all(|w| w[0] != w[1]), "a name twice: {names:?}");
    names
}

/// Fails unless the name does not exist.
#[track_caller]
pub fn gone(path: impl AsRef<Path>) {
    let path = path.as_ref();
    match fs::symlink_metadata(path) {
        Ok(meta) => panic!("{} is there: {:?}", path.display(), meta.file_type()),
        Err(e) => assert_eq!(e.kind(), std::io::ErrorKind::NotFound, "{}: {e}", path.display()),
    }
}

/// Fails unless the system refused with this error number.
#[track_caller]
pub fn refused<T: std::fmt::Debug>(result: std::io::Result<T>, errno: Errno) {
    let e = result.expect_err("done, although it must be refused");
    assert_eq!(e.raw_os_error(), Some(errno.raw_os_error()), "{e}");
}

/// The permission bits.
#[track_caller]
pub fn mode(path: impl AsRef<Path>) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

/// The inode number.
#[track_caller]
pub fn ino(path: impl AsRef<Path>) -> u64 {
    fs::symlink_metadata(path).unwrap().ino()
}

/// The link count.
#[track_caller]
pub fn nlink(path: impl AsRef<Path>) -> u64 {
    fs::symlink_metadata(path).unwrap().nlink()
}

/// Makes a whiteout of the kernel's form.
#[track_caller]
pub fn whiteout(path: impl AsRef<Path>) {
    rustix::fs::mknodat(CWD, path.as_ref(), FileType::CharacterDevice, Mode::empty(), 0).unwrap();
}

/// Sets an xattr, symlinks not followed.
#[track_caller]
pub fn setx(path: impl AsRef<Path>, name: &str, value: impl AsRef<[u8]>) {
    set_xattr(path.as_ref(), name.as_ref(), value.as_ref()).unwrap();
}

/// An xattr, symlinks not followed, if there is one of that name.
#[track_caller]
pub fn getx(path: impl AsRef<Path>, name: &str) -> Option<Vec<u8>> {
    let mut value = vec![0; 4096];
    match rustix::fs::lgetxattr(path.as_ref(), name, &mut value) {
        Ok(n) => Some(value[..n].to_vec()),
        Err(Errno::NODATA) => None,
        Err(e) => panic!("{}: {name}: {e}", path.as_ref().display()),
    }
}

/// Bytes allocated below a directory.
pub fn disk_usage(path: &Path) -> u64 {
    let meta = fs::symlink_metadata(path).unwrap();
    let inside: u64 = if meta.is_dir() {
        fs::read_dir(path).unwrap().map(|e| disk_usage(&e.unwrap().path())).sum()
    } else {
        0
    };
    meta.blocks() * 512 + inside
}

/// Returns what is left in the work directory, except the empty directories kept at rest and a
/// whiteout kept for reuse by linking.
pub fn work_residue(c: &Case) -> Vec<PathBuf> {
    let mut left = Vec::new();
    let mut todo = vec![c.w("")];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            let meta = entry.metadata().unwrap();
            let path = entry.path();
            let resting = ["work", "index"].iter().any(|name| path == c.w(name)) && meta.is_dir();
            let spare_whiteout = meta.file_type().is_char_device() && meta.rdev() == 0;
            if meta.is_dir() {
                todo.push(path.clone());
            }
            if !resting && !spare_whiteout {
                left.push(path);
            }
        }
    }
    left
}

/// Runs a shell script that must succeed; gives its output.
#[track_caller]
pub fn sh(dir: impl AsRef<Path>, script: &str) -> String {
    let out = Command::new("sh").args(["-ec", script]).current_dir(dir).output().unwrap();
    assert!(out.status.success(), "{script}\n{}", said(&out));
    String::from_utf8(out.stdout).unwrap()
}

/// Runs a Python script that must succeed.
#[track_caller]
pub fn python(script: &str, arguments: &[&str]) {
    let out = Command::new(env::PYTHON).arg("-c").arg(script).args(arguments).output().unwrap();
    assert!(out.status.success(), "{}", said(&out));
}

/// A program that runs a shell script as another user, without capabilities.
pub fn user_command(id: u32, dir: impl AsRef<Path>, script: &str) -> Command {
    let id = id.to_string();
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid", &id, "--regid", &id, "--clear-groups", "sh", "-ec", script])
        .current_dir(dir);
    command
}

/// Runs a shell script as another user, without capabilities.
pub fn as_user(id: u32, dir: impl AsRef<Path>, script: &str) -> Output {
    user_command(id, dir, script).output().unwrap()
}

/// Runs a shell script as `nobody`; it must succeed.
#[track_caller]
pub fn nobody(dir: impl AsRef<Path>, script: &str) {
    let out = as_user(65534, dir, script);
    assert!(out.status.success(), "{script}: {}", said(&out));
}

/// What a program wrote to standard error.
pub fn said(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned()
}

/// Runs a shell script for a mount of the program under test and then for one of the kernel, each with an upper layer of its own;
/// what it says must be the same. `$M`, `$U` and `$W` are the mount, the upper and the work directory; `prepare` runs before each
/// mount, with the latter two.
///
/// # Panics
/// If it is not, or if the script says nothing.
#[track_caller]
pub fn same_as_the_kernel(c: &Case, prepare: &str, script: &str) {
    same_as_the_kernel_with(c, &["allow_other", "suid", "dev"], prepare, script);
}

/// [`same_as_the_kernel`], with other options for the mount of the program under test.
///
/// # Panics
/// As that.
#[track_caller]
pub fn same_as_the_kernel_with(c: &Case, options: &[&str], prepare: &str, script: &str) {
    let run = |kind: Kind| {
        let (name, options): (_, &[&str]) = match kind {
            Kind::Lamina => ("ours", options),
            Kind::Kernel => ("kernel", &[]),
        };
        let mut spec = c.sandbox.side(kind, name);
        spec.options = options.iter().map(|&option| option.to_owned()).collect();
        let names = {
            let (upper, work) = spec.upper.as_ref().unwrap();
            format!("M={} U={} W={}", spec.merged.display(), upper.display(), work.display())
        };
        sh("/", &format!("{names}\n{prepare}"));
        let mount = spec.mount();
        let output = sh("/", &format!("{names}\n{script}"));
        mount.unmount();
        output
    };
    let ours = run(Kind::Lamina);
    assert!(!ours.is_empty(), "the script says nothing");
    let kernel = run(Kind::Kernel);
    for (n, (ours, kernel)) in ours.lines().zip(kernel.lines()).enumerate() {
        assert_eq!(ours, kernel, "line {n}; left: ours, right: the kernel's");
    }
    assert_eq!(ours.lines().count(), kernel.lines().count());
}
