//! Layer stores for tests: a root and a run root of their own, and the `lamina` commands on them.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::case::said;
use crate::env;
use crate::fixture::{Sandbox, fill};

/// A store in a sandbox.
#[derive(Debug)]
pub struct TestStore {
    /// The sandbox that goes with it.
    pub sandbox: Sandbox,
    /// `--root`.
    pub root: PathBuf,
    /// `--runroot`.
    pub run_root: PathBuf,
    /// `--driver`.
    pub driver: &'static str,
    /// Whether the home becomes a private mount, as it does by default; `store cleanup` ends that.
    pub mounts_home: bool,
    /// More arguments of every command.
    pub arguments: Vec<String>,
}

impl TestStore {
    /// Makes a store with the layout of containers/storage.
    ///
    /// # Panics
    /// If it cannot be made.
    #[track_caller]
    pub fn new() -> TestStore {
        Self::with_driver("overlay")
    }

    /// Makes a store with the layout of `driver`.
    ///
    /// # Panics
    /// If it cannot be made.
    #[track_caller]
    pub fn with_driver(driver: &'static str) -> TestStore {
        let sandbox = Sandbox::new();
        let (root, run_root) = (sandbox.root().join("root"), sandbox.root().join("run"));
        let (mounts_home, arguments) = (false, Vec::new());
        let store = TestStore { sandbox, root, run_root, driver, mounts_home, arguments };
        store.ok(&["store", "init"]);
        store
    }

    /// The directory of the layers.
    pub fn home(&self) -> PathBuf {
        self.root.join(if self.driver == "overlay1" { "overlay" } else { self.driver })
    }

    /// A path in a layer.
    pub fn path(&self, id: &str, name: &str) -> PathBuf {
        self.home().join(id).join(name)
    }

    /// Where a layer keeps its content.
    pub fn diff(&self, id: &str) -> PathBuf {
        match self.driver {
            "aufs" => self.home().join("diff").join(id),
            "overlay1" if self.path(id, "root").exists() => self.path(id, "root"),
            "overlay1" => self.path(id, "upper"),
            _ => self.path(id, "diff"),
        }
    }

    /// The command for words such as `layer create ID`.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env::lamina());
        let (group, rest) = words.split_at(2.min(words.len()));
        command.args(group).arg("--root").arg(&self.root).arg("--runroot").arg(&self.run_root);
        command.args(["--driver", self.driver]);
        if !self.mounts_home && matches!(self.driver, "overlay" | "overlay2") {
            command.args(["--storage-opt", "overlay.skip_mount_home=true"]);
        }
        command.args(&self.arguments).args(rest);
        command.stdin(Stdio::null()).current_dir("/");
        command
    }

    /// Runs a command to its end.
    ///
    /// # Panics
    /// If it cannot be started.
    #[track_caller]
    pub fn run(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap_or_else(|e| panic!("{words:?}: {e}"))
    }

    /// Runs a command that must succeed without a word on stderr, and gives what it printed.
    ///
    /// # Panics
    /// If it does not.
    #[track_caller]
    pub fn ok(&self, words: &[&str]) -> String {
        let out = self.run(words);
        assert!(out.status.success(), "{words:?}: {}{}", said(&out), printed(&out));
        assert_eq!(said(&out), "", "{words:?}");
        String::from_utf8(out.stdout).unwrap()
    }

    /// Runs a command that must succeed and may warn, and gives what it printed.
    ///
    /// # Panics
    /// If it does not.
    #[track_caller]
    pub fn ok_with_warning(&self, words: &[&str]) -> String {
        let out = self.run(words);
        assert!(out.status.success(), "{words:?}: {}", said(&out));
        String::from_utf8(out.stdout).unwrap()
    }

    /// Runs a command that must fail, and gives the one line that it said.
    ///
    /// # Panics
    /// If it succeeds, or says anything but one line.
    #[track_caller]
    pub fn fails(&self, words: &[&str]) -> String {
        let out = self.run(words);
        assert!(!out.status.success(), "{words:?} succeeded");
        let text = said(&out);
        assert_eq!(text.lines().count(), 1, "{words:?}: {text}");
        text
    }

    /// Mounts a layer by the words after `layer mount`, and gives where.
    ///
    /// # Panics
    /// If it is not mounted.
    #[track_caller]
    pub fn mount(&self, words: &[&str]) -> PathBuf {
        let words: Vec<&str> = ["layer", "mount"].iter().chain(words).copied().collect();
        let merged = PathBuf::from(self.ok(&words).trim_end());
        assert!(merged.is_dir());
        merged
    }

    /// Unmounts a layer.
    ///
    /// # Panics
    /// If that fails.
    #[track_caller]
    pub fn unmount(&self, id: &str) {
        self.ok(&["layer", "unmount", id]);
    }

    /// Makes a layer on `parent`, if one is named, and fills it.
    ///
    /// # Panics
    /// If it cannot be made.
    #[track_caller]
    pub fn layer(&self, id: &str, parent: Option<&str>, text: &str) {
        match parent {
            Some(parent) => self.ok(&["layer", "create", "--parent", parent, id]),
            None => self.ok(&["layer", "create", id]),
        };
        if !text.is_empty() {
            fill(&self.diff(id), text);
        }
    }

    /// Makes a chain of `count` layers `NAME1`, `NAME2`, ... by hand, each on the one before, as engines leave them: fast, and
    /// without what is tested.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn chain(&self, name: &str, count: usize) {
        let mut links: Vec<String> = Vec::new();
        for number in 1..=count {
            let dir = self.home().join(format!("{name}{number}"));
            for part in ["diff", "work", "merged"] {
                fs::create_dir_all(dir.join(part)).unwrap();
            }
            if number == 1 {
                fs::create_dir(dir.join("empty")).unwrap();
            }
            let letter = |n: usize| char::from(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"[n % 32]);
            let digits: String =
                [number / 1024, number / 32, number].into_iter().map(letter).collect();
            let hash = name.bytes().fold(0, |sum, b| sum ^ usize::from(b));
            let link = format!("{}{digits}", String::from(letter(hash)).repeat(23));
            std::os::unix::fs::symlink(
                format!("../{name}{number}/diff"),
                self.home().join("l").join(&link),
            )
            .unwrap();
            fs::write(dir.join("link"), &link).unwrap();
            if !links.is_empty() {
                let lower: Vec<String> =
                    links.iter().rev().map(|link| format!("l/{link}")).collect();
                fs::write(dir.join("lower"), lower.join(":")).unwrap();
            }
            links.push(link);
        }
    }

    /// The symlinks in `l` with their targets, sorted.
    ///
    /// # Panics
    /// If they cannot be read.
    pub fn links(&self) -> Vec<(String, String)> {
        let mut all: Vec<(String, String)> = fs::read_dir(self.home().join("l"))
            .unwrap()
            .map(|entry| entry.unwrap())
            .map(|entry| {
                let target = fs::read_link(entry.path()).unwrap();
                let name = entry.file_name().into_string().unwrap();
                (name, target.into_os_string().into_string().unwrap())
            })
            .collect();
        all.sort();
        all
    }

    /// Fails if anything is left of changes that are over.
    ///
    /// # Panics
    /// If so.
    #[track_caller]
    pub fn check_no_leftovers(&self) {
        let temps = self.home().join("tempdirs");
        assert!(fs::symlink_metadata(&temps).is_err(), "{} is left", temps.display());
        if self.driver == "aufs" {
            let listed = |name: &str| crate::case::sh(self.home(), &format!("ls {name}"));
            assert_eq!(listed("diff"), listed("layers"));
            assert_eq!(listed("mnt"), listed("layers"));
            assert!(!self.home().join("lamina-work").exists());
        }
        if matches!(self.driver, "aufs" | "overlay1") {
            return;
        }
        for (link, target) in self.links() {
            let diff = self.home().join("l").join(&target);
            assert!(fs::symlink_metadata(&diff).is_ok(), "{link} -> {target} dangles");
        }
    }
}

impl Default for TestStore {
    fn default() -> Self {
        Self::new()
    }
}

/// Mode, owner and group of a directory.
///
/// # Panics
/// If it cannot be looked at.
#[track_caller]
pub fn stat_of(path: &Path) -> (u32, u32, u32) {
    let stat = fs::symlink_metadata(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    (stat.mode() & 0o7777, stat.uid(), stat.gid())
}

/// Takes the lock of a file in the way of programs in Go, for writing; it ends when the file is closed.
///
/// # Panics
/// If somebody else has it.
pub fn lock_classically(file: &fs::File) {
    let whole = nix::libc::flock {
        l_type: i16::try_from(nix::libc::F_WRLCK).unwrap(),
        l_whence: i16::try_from(nix::libc::SEEK_SET).unwrap(),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_SETLK(&whole)).unwrap();
}

/// What a program wrote to standard output.
fn printed(out: &std::process::Output) -> String {
    String::from_utf8_lossy(&out.stdout).into_owned()
}
