//! What may run here: the program under test, privileges, kernel overlay, a place for test data.
//!
//! | variable | meaning |
//! |---|---|
//! | `LAMINA_BIN` | the `lamina` binary; default: the one cargo built next to the test |
//! | `FUSE_TESTS_PROGRAM` | another mount program to run every suite on, to prove that the tests can fail |
//! | `FUSE_TESTS_OPTIONS` | extra `-o` options for the program under test |
//! | `FUSE_TESTS_DIR` | where test data goes; default `/var/tmp` |
//! | `FUSE_TESTS_NO_SKIP=1` | a skip is a failure |
//! | `FUSE_TESTS_SKIP_LOG` | a file that gets one line for each skip |

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};

/// Ends the calling test because something it needs is missing; prints and counts the reason.
#[macro_export]
macro_rules! skip {
    ($($reason:tt)*) => {{
        $crate::env::note_skip($crate::function_name!(), &format!($($reason)*));
        return;
    }};
}

/// The path of the function this is used in, without the crate: the name that `--exact` takes.
#[macro_export]
macro_rules! function_name {
    () => {{
        fn here() {}
        $crate::env::test_name(std::any::type_name_of_val(&here))
    }};
}

/// True if the calling test was run again in a user namespace, as its root: the caller then returns.
///
/// Inside the namespace it is false and the rest of the test runs there. A failure inside is a failure here.
#[macro_export]
macro_rules! ran_in_user_namespace {
    () => {
        $crate::env::run_in_user_namespace($crate::function_name!())
    };
}

static SKIPS: AtomicUsize = AtomicUsize::new(0);

/// Prints and counts one skipped test; panics if `FUSE_TESTS_NO_SKIP=1`.
pub fn note_skip(test: &str, reason: &str) {
    assert!(
        std::env::var_os("FUSE_TESTS_NO_SKIP").is_none_or(|v| v != "1"),
        "{test} would be skipped: {reason}"
    );
    let count = SKIPS.fetch_add(1, Ordering::Relaxed) + 1;
    let line = format!("SKIP {count}: {test}: {reason}\n");
    // Written directly: the test runner hides what a passing test prints.
    let _ = io::stderr().write_all(line.as_bytes());
    if let Some(log) = std::env::var_os("FUSE_TESTS_SKIP_LOG") {
        let file = fs::OpenOptions::new().create(true).append(true).open(log);
        file.and_then(|mut f| f.write_all(line.as_bytes())).expect("FUSE_TESTS_SKIP_LOG");
    }
}

/// `krate::module::test::here` to `module::test`.
pub fn test_name(path: &'static str) -> &'static str {
    let path = path.strip_suffix("::here").unwrap_or(path);
    let path = path.trim_end_matches("::{{closure}}");
    path.split_once("::").map_or(path, |(_, name)| name)
}

/// Python that every user may run: one that PATH of root leads to first may lie in root's home.
pub const PYTHON: &str = "/usr/bin/python3";

/// The mount program under test.
///
/// # Panics
/// If there is none, saying how to build it.
pub fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| match std::env::var_os("FUSE_TESTS_PROGRAM") {
        Some(other) => PathBuf::from(other),
        None => lamina().to_path_buf(),
    })
}

/// True if `FUSE_TESTS_PROGRAM` names a program other than `lamina`.
pub fn is_other_program() -> bool {
    std::env::var_os("FUSE_TESTS_PROGRAM").is_some()
}

/// The `lamina` binary.
///
/// # Panics
/// If there is none, saying how to build it.
pub fn lamina() -> &'static Path {
    static LAMINA: OnceLock<PathBuf> = OnceLock::new();
    LAMINA.get_or_init(|| {
        if let Some(path) = std::env::var_os("LAMINA_BIN") {
            return PathBuf::from(path);
        }
        let exe = std::env::current_exe().unwrap();
        let deps = exe.parent().unwrap();
        ["../lamina", "../../release/lamina", "../../debug/lamina"]
            .iter()
            .filter_map(|place| fs::canonicalize(deps.join(place)).ok())
            .find(|path| path.is_file())
            .unwrap_or_else(|| {
                panic!(
                    "no lamina binary beside {}: run `cargo build` first, or set LAMINA_BIN",
                    exe.display()
                )
            })
    })
}

/// True with user id 0, be it root of the machine or of a user namespace.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// True in the initial user namespace, where `trusted.` xattrs and device nodes are allowed to root.
pub fn is_initial_namespace() -> bool {
    fs::read_to_string("/proc/self/uid_map")
        .is_ok_and(|map| map.split_whitespace().eq(["0", "0", "4294967295"]))
}

/// True for root of the machine.
pub fn is_machine_root() -> bool {
    is_root() && is_initial_namespace()
}

/// Prefix of the overlay xattrs that a mount made from here uses.
pub fn overlay_prefix() -> &'static str {
    if is_machine_root() { "trusted.overlay." } else { "user.overlay." }
}

/// Why the program under test cannot be mounted from here, if it cannot.
pub fn no_fuse() -> Option<String> {
    if let Err(e) = fs::OpenOptions::new().read(true).write(true).open("/dev/fuse") {
        return Some(format!("/dev/fuse cannot be opened: {e}"));
    }
    None
}

/// Why kernel overlayfs cannot be mounted from here, if it cannot. Tried once, on the directory for test data.
pub fn no_kernel_overlay() -> Option<String> {
    static REASON: OnceLock<Option<String>> = OnceLock::new();
    REASON
        .get_or_init(|| {
            let base = Base::get();
            try_overlay(&base.path, None)
                .err()
                .map(|e| format!("kernel overlay cannot be mounted: {e}"))
        })
        .clone()
}

/// Why kernel overlayfs cannot be mounted with an option that it can do without, if it cannot.
pub fn no_overlay_option(option: &str) -> Option<String> {
    let base = Base::get();
    let tried = try_overlay(&base.path, Some(option));
    tried.err().map(|e| format!("kernel overlay cannot be mounted with {option}: {e}"))
}

/// The `-o` options that every mount of the program under test gets, by `FUSE_TESTS_OPTIONS`.
pub fn extra_options() -> String {
    std::env::var("FUSE_TESTS_OPTIONS").unwrap_or_default()
}

/// Why no user namespace with a range of ids can be made here, if so. Tried once.
pub fn no_user_namespace() -> Option<String> {
    static REASON: OnceLock<Option<String>> = OnceLock::new();
    REASON
        .get_or_init(|| {
            if !is_initial_namespace() {
                return Some("already in a user namespace".into());
            }
            if extra_options().contains("io=passthrough") {
                return Some("io=passthrough is refused in a user namespace".into());
            }
            let mut command = Command::new("unshare");
            command.args(["--user", "--mount"]);
            if !is_root() {
                // Needs newuidmap and a range in /etc/subuid.
                command.args(["--map-root-user", "--map-auto"]);
            }
            let output = match command.arg("true").stdin(Stdio::null()).output() {
                Ok(output) => output,
                Err(e) => return Some(format!("unshare(1) cannot be run: {e}")),
            };
            let text = String::from_utf8_lossy(&output.stderr);
            (!output.status.success()).then(|| format!("no user namespace: {}", text.trim()))
        })
        .clone()
}

/// First id of the range that is mapped into the user namespace made by root.
const FIRST_ID: u32 = 200_000;
/// Set inside the user namespace, to the name of the test that runs there.
const INSIDE: &str = "FUSE_TESTS_INSIDE";

/// Copies a program that is to be run at once. By a process of its own: whoever another thread starts meanwhile would
/// hold it open for writing, and it could not be run (`ETXTBSY`).
///
/// # Panics
/// If it cannot be copied.
pub fn copy_program(from: &Path, to: &Path) {
    let status = Command::new("cp").arg("--preserve=mode").args([from, to]).status().unwrap();
    assert!(status.success(), "cp {}: {status}", from.display());
}

/// Does the work of [`ran_in_user_namespace!`].
///
/// # Panics
/// If the test fails inside.
pub fn run_in_user_namespace(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return false;
    }
    if let Some(reason) = no_user_namespace() {
        note_skip(test, &reason);
        return true;
    }
    let base = Base::get();
    let dir = base.unique("userns");
    fs::create_dir(&dir).unwrap();
    // The binaries may lie below a directory that an ordinary user cannot enter.
    let exe = dir.join("test");
    copy_program(&std::env::current_exe().unwrap(), &exe);
    let program_copy = dir.join("lamina");
    copy_program(program(), &program_copy);
    for path in [&exe, &program_copy, &dir] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let data = dir.join("data");
    fs::create_dir(&data).unwrap();

    let mut command = Command::new("unshare");
    if is_machine_root() {
        std::os::unix::fs::chown(&data, Some(FIRST_ID), Some(FIRST_ID)).unwrap();
        // The map is written from here, so the shell waits for it.
        command.args([
            "--user",
            "--mount",
            "--propagation",
            "unchanged",
            "--keep-caps",
            "sh",
            "-c",
        ]);
        command.arg("read go && exec setpriv --reuid 0 --regid 0 --clear-groups \"$@\"").arg("sh");
    } else {
        command.args(["--user", "--mount", "--map-root-user", "--map-auto"]);
    }
    command.arg(&exe).args(["--exact", test, "--include-ignored", "--nocapture"]);
    command.env(INSIDE, test).env("FUSE_TESTS_DIR", &data).current_dir("/");
    let variable = if is_other_program() { "FUSE_TESTS_PROGRAM" } else { "LAMINA_BIN" };
    command.env(variable, &program_copy);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("unshare(1) of util-linux");
    if is_machine_root() {
        let pid = child.id();
        let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/user")).ok();
        let own = namespace("self");
        wait_until("the user namespace", Duration::from_secs(10), || {
            namespace(&pid.to_string()).is_some_and(|ns| Some(ns) != own)
        });
        let map = format!("0 {FIRST_ID} 65536\n");
        fs::write(format!("/proc/{pid}/uid_map"), &map).unwrap();
        fs::write(format!("/proc/{pid}/gid_map"), &map).unwrap();
    }
    child.stdin.take().unwrap().write_all(b"go\n").unwrap();
    let output = child.wait_with_output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    fs::remove_dir_all(&dir)
        .unwrap_or_else(|e| panic!("{e}, left behind {}: {text}", dir.display()));
    for line in text.lines().filter(|line| line.starts_with("SKIP ")) {
        note_skip(test, line);
    }
    assert!(output.status.success(), "{test} failed in the user namespace:\n{text}");
    assert!(text.contains("1 passed"), "{test} was not run in the user namespace:\n{text}");
    true
}

/// Waits for a condition, with a bound.
///
/// # Panics
/// If the bound passes.
#[track_caller]
pub fn wait_until(what: &str, bound: Duration, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + bound;
    while !condition() {
        assert!(Instant::now() < end, "waited {bound:?} in vain for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The directory that holds the data of all tests of this process; removed when the last one is done.
#[derive(Debug)]
pub struct Base {
    /// Where it is.
    pub path: PathBuf,
    looped: bool,
}

impl Base {
    /// The base of this process, made when it is first needed.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn get() -> Arc<Base> {
        static BASE: Mutex<Weak<Base>> = Mutex::new(Weak::new());
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let mut slot = BASE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(base) = slot.upgrade() {
            return base;
        }
        raise_file_limit();
        let parent = std::env::var_os("FUSE_TESTS_DIR").unwrap_or_else(|| "/var/tmp".into());
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = Path::new(&parent).join(format!("fuse-tests-{}-{n}", std::process::id()));
        fs::create_dir(&path).unwrap_or_else(|e| panic!("mkdir {}: {e}", path.display()));
        let looped = is_machine_root() && try_overlay(&path, None).is_err() && mount_loop(&path);
        // A mount namespace that a test makes copies every mount that lives at that moment. Of shared ones the copies go away
        // with the original, so they do not keep its server from ending.
        if is_machine_root() {
            rustix::mount::mount_bind(&path, &path).unwrap();
            rustix::mount::mount_change(&path, MountPropagationFlags::SHARED).unwrap();
        }
        let base = Arc::new(Base { path, looped });
        *slot = Arc::downgrade(&base);
        base
    }

    /// A name in the base that nothing else of this process uses.
    pub fn unique(&self, prefix: &str) -> PathBuf {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        self.path.join(format!("{prefix}-{}", COUNT.fetch_add(1, Ordering::Relaxed)))
    }
}

impl Drop for Base {
    fn drop(&mut self) {
        let image = self.path.with_extension("img");
        if is_machine_root() {
            let _ = rustix::mount::unmount(&self.path, UnmountFlags::DETACH);
        }
        if self.looped {
            let _ = Command::new("umount").arg(&self.path).status();
            let _ = fs::remove_file(image);
        }
        if let Err(e) = fs::remove_dir(&self.path) {
            let text = format!("{} is left behind: {e}", self.path.display());
            if std::thread::panicking() {
                eprintln!("{text}");
            } else {
                panic!("{text}");
            }
        }
    }
}

/// Many suites hold one descriptor for each level of a deep tree.
fn raise_file_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard.min(1 << 20), hard);
    }
}

/// Mounts and unmounts a kernel overlay with its upper layer in `dir`, and leaves nothing there.
fn try_overlay(dir: &Path, option: Option<&str>) -> Result<(), String> {
    let probe = dir.join("probe");
    let names = ["lower", "upper", "work", "merged"].map(|name| probe.join(name));
    for name in &names {
        fs::create_dir_all(name).map_err(|e| e.to_string())?;
    }
    let [lower, upper, work, merged] = &names;
    let mut options = overlay_options(std::slice::from_ref(lower), Some((upper, work)));
    if !is_machine_root() {
        options.push(",userxattr");
    }
    if let Some(option) = option {
        options.push(format!(",{option}"));
    }
    let result = mount_overlay(&options, merged).map_err(|e| e.to_string()).and_then(|()| {
        let write = fs::write(merged.join("x"), "x").map_err(|e| e.to_string());
        // A test beside this one may hold a descriptor between its fork and exec.
        let mut done = Ok(());
        wait_until("the probe to be free", Duration::from_secs(10), || {
            done = rustix::mount::unmount(merged, UnmountFlags::empty());
            done != Err(rustix::io::Errno::BUSY)
        });
        done.map_err(|e| e.to_string())?;
        write
    });
    fs::remove_dir_all(&probe).map_err(|e| e.to_string())?;
    result
}

/// The UUID of the filesystem that holds a directory, where the kernel tells it.
pub fn filesystem_uuid(dir: &Path) -> Option<[u8; 16]> {
    let dir = fs::File::open(dir).unwrap();
    laminafs::sys::handle::filesystem_uuid(dir.as_fd()).unwrap()
}

/// Whether the filesystem that holds a directory gives out file handles.
pub fn gives_handles(dir: &Path) -> bool {
    let dir = fs::File::open(dir).unwrap();
    laminafs::sys::handle::of(dir.as_fd()).unwrap().is_some()
}

/// Whether a layer can be a private mount, which has neither submounts nor access times.
pub fn has_private_mounts(dir: &Path) -> bool {
    let dir = fs::File::open(dir).unwrap();
    laminafs::sys::mountfd::private_read_only(dir.as_fd()).is_ok()
}

/// Options of a stack, in the text form that kernel overlay and mount programs share; lowers topmost first.
pub fn overlay_options(lowers: &[PathBuf], upper: Option<(&PathBuf, &PathBuf)>) -> OsString {
    let mut text = OsString::from("lowerdir=");
    for (i, lower) in lowers.iter().enumerate() {
        if i > 0 {
            text.push(":");
        }
        text.push(lower);
    }
    if let Some((upper, work)) = upper {
        text.push(",upperdir=");
        text.push(upper);
        text.push(",workdir=");
        text.push(work);
    }
    text
}

/// mount(2) of a kernel overlay.
///
/// # Errors
/// What mount(2) says.
pub fn mount_overlay(options: &OsStr, merged: &Path) -> io::Result<()> {
    let data = std::ffi::CString::new(options.as_bytes())?;
    rustix::mount::mount("overlay", merged, "overlay", MountFlags::empty(), data.as_c_str())?;
    Ok(())
}

fn mount_loop(dir: &Path) -> bool {
    let image = dir.with_extension("img");
    let made = fs::File::create(&image).and_then(|f| f.set_len(4 << 30)).is_ok()
        && Command::new("mkfs.ext4").arg("-q").arg(&image).status().is_ok_and(|s| s.success())
        && Command::new("mount")
            .args(["-o", "loop"])
            .args([image.as_path(), dir])
            .status()
            .is_ok_and(|s| s.success());
    if made {
        // mkfs puts a directory there that a test base must not have.
        let _ = fs::remove_dir(dir.join("lost+found"));
    } else {
        let _ = fs::remove_file(&image);
    }
    made
}

/// The mount points below `dir` in this mount namespace.
pub fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let text = fs::read("/proc/self/mountinfo").unwrap();
    text.split(|b| *b == b'\n')
        .filter_map(|line| line.split(|b| *b == b' ').nth(4))
        .map(|field| PathBuf::from(OsStr::from_bytes(&unescape_octal(field))))
        .filter(|path| path.starts_with(dir))
        .collect()
}

fn unescape_octal(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let digits = tail.get(..3).and_then(|d| std::str::from_utf8(d).ok());
        match digits.and_then(|d| u8::from_str_radix(d, 8).ok()) {
            Some(value) if byte == b'\\' => {
                out.push(value);
                rest = &tail[3..];
            }
            _ => {
                out.push(byte);
                rest = tail;
            }
        }
    }
    out
}

/// The live processes that have `argument` as one of their arguments, as a mount program has its mount point.
pub fn processes_with_argument(argument: &Path) -> Vec<u32> {
    let wanted = argument.as_os_str().as_bytes();
    let own = std::process::id();
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    processes
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
        .filter(|pid| *pid != own)
        .filter(|pid| {
            // A zombie has an empty command line.
            fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| line.split(|b| *b == 0).any(|arg| arg == wanted))
        })
        .collect()
}

/// What each thread of a process is doing, for a report.
pub fn threads_of(pid: u32) -> String {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return String::new() };
    let line = |thread: PathBuf| {
        let read = |name| fs::read_to_string(thread.join(name)).unwrap_or_default();
        let (name, stat) = (read("comm"), read("stat"));
        let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next()).unwrap_or('?');
        format!("\n{} {state} in {} ({})", name.trim(), read("wchan"), read("syscall").trim())
    };
    threads.flatten().map(|thread| line(thread.path())).collect()
}

/// True if the file is a whiteout of the kernel's form.
pub fn is_whiteout(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_char_device() && m.rdev() == 0)
}
