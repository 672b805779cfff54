//! One list of operations, done on a plain directory and then on a lower, an upper and a merged directory of a mount: the
//! answers and the resulting trees must be the same, live and after a remount.

use std::fmt::{Debug, Write as _};
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use rustix::fs::{CWD, FallocateFlags, FileType, Mode};

use crate::env;
use crate::fixture::{Kind, Sandbox, pattern, set_mtime};
use crate::tree::{self, Options, assert_same, snapshot_with};

/// The answers of an operation list, one line each.
#[derive(Debug, Default)]
pub struct Trace(pub String);

impl Trace {
    /// Notes an answer or an error.
    pub fn put<T: Debug, E: Into<io::Error>>(&mut self, what: &str, result: Result<T, E>) {
        let _ = match result {
            Ok(value) => writeln!(self.0, "{what}: {value:?}"),
            Err(e) => writeln!(self.0, "{what}: {}", e.into()),
        };
    }

    /// Notes a value.
    pub fn say(&mut self, what: &str, value: impl Debug) {
        let _ = writeln!(self.0, "{what}: {value:?}");
    }

    /// Notes the output of a shell script in `dir`, and how it ended.
    pub fn sh(&mut self, dir: &Path, script: &str) {
        let out = Command::new("sh").args(["-c", script]).current_dir(dir).output().unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        self.say(script, (out.status.code(), text, said));
    }

    /// Notes the output of a Python script in `dir`, and how it ended.
    pub fn python(&mut self, dir: &Path, script: &str) {
        let out = Command::new(env::PYTHON).args(["-c", script]).current_dir(dir).output().unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        self.say("python", (out.status.code(), text, said));
    }

    /// Notes type, mode, owner, links and size of a path.
    pub fn stat(&mut self, what: &str, path: impl AsRef<Path>) {
        let stat = fs::symlink_metadata(path.as_ref()).map(|meta| {
            let nlink = if meta.is_dir() { 0 } else { meta.nlink() };
            let size = if meta.is_dir() { 0 } else { meta.len() };
            format!("{:o} {}:{} links {nlink} size {size}", meta.mode(), meta.uid(), meta.gid())
        });
        self.put(what, stat);
    }
}

/// Which objects of the seed a layer gets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Share {
    /// All of them.
    All,
    /// Half of them; the others as something else, which is to be hidden.
    Below,
    /// The other half.
    Above,
}

/// Makes the directory that every check starts with.
pub fn seed(dir: &Path, share: Share) {
    fs::create_dir_all(dir).unwrap();
    let mine = |n: usize| match share {
        Share::All => true,
        Share::Below => n.is_multiple_of(2),
        Share::Above => !n.is_multiple_of(2),
    };
    let below = share == Share::Below;
    let names = ["f", "d", "e", "s", "p", "h", "big", "g", "full", "z", "t"];
    for (n, name) in names.into_iter().enumerate() {
        let path = dir.join(name);
        if !mine(n) {
            // Directories take part from both sides, files are hidden by the layer above.
            match (below, name) {
                (true, "d" | "full" | "e") => fs::create_dir(&path).unwrap(),
                (true, "h" | "s" | "p") => symlink("hidden", &path).unwrap(),
                (true, _) => fs::write(&path, "hidden").unwrap(),
                (false, _) => {}
            }
            continue;
        }
        match name {
            "f" => fs::write(&path, "content").unwrap(),
            "g" => fs::write(&path, "0123456789").unwrap(),
            "z" => fs::write(&path, "").unwrap(),
            "t" => fs::write(&path, "#!/bin/sh\necho ran \"$@\"\n").unwrap(),
            "big" => fs::write(&path, pattern(300_000, 1)).unwrap(),
            "d" | "full" => {
                fs::create_dir(&path).unwrap();
                fs::write(path.join("inner"), "inner").unwrap();
                fs::create_dir(path.join("sub")).unwrap();
            }
            "e" => fs::create_dir(&path).unwrap(),
            "s" => symlink("f", &path).unwrap(),
            "p" => {
                let mode = Mode::from(0o640u32);
                rustix::fs::mknodat(CWD, &path, FileType::Fifo, mode, 0).unwrap();
            }
            "h" => {
                fs::write(&path, "linked").unwrap();
                fs::hard_link(&path, dir.join("h2")).unwrap();
            }
            _ => unreachable!(),
        }
        let mode = match name {
            "t" | "d" | "e" | "full" => 0o755,
            _ => 0o644,
        };
        if !matches!(name, "s" | "p") {
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        }
    }
    if share == Share::Below {
        let _ = fs::write(dir.join("h2"), "hidden");
    }
    date(dir);
}

/// Gives all objects the same fixed times.
fn date(path: &Path) {
    if fs::symlink_metadata(path).unwrap().is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            date(&entry.unwrap().path());
        }
    }
    set_mtime(path, 1_234_567_890, 123_456_789).unwrap();
}

/// The directories of a mount that [`same`] acts in.
pub const PLACES: [&str; 3] = ["lower", "upper", "merged"];

/// Layers seeded so that each of [`PLACES`] in the mount looks like the directory `plain`.
pub fn sandbox() -> Sandbox {
    let mut sandbox = Sandbox::new();
    let lower = sandbox.layer("");
    seed(&sandbox.root().join("plain"), Share::All);
    seed(&lower.join("lower"), Share::All);
    seed(&lower.join("merged"), Share::Below);
    seed(&sandbox.upper().join("upper"), Share::All);
    seed(&sandbox.upper().join("merged"), Share::Above);
    sandbox
}

/// Runs `act` on a plain directory and on each place of a mount; answers and trees must agree.
#[track_caller]
pub fn same(act: impl Fn(&Path, &mut Trace)) {
    let sandbox = sandbox();
    let plain = sandbox.root().join("plain");
    let mut mount = sandbox.mount(Kind::Lamina);
    // Kernel overlay itself lists some inode numbers of the layer beneath.
    let check_ino = !env::is_other_program();
    let options = Options { recent: Some(tree::now()), check_ino, ..Options::default() };
    for place in PLACES {
        let here = snapshot_with(mount.path().join(place), options);
        assert_same("before the test", &snapshot_with(&plain, options), &here);
    }
    let mut want = Trace::default();
    act(&plain, &mut want);
    for place in PLACES {
        let mut trace = Trace::default();
        act(&mount.path().join(place), &mut trace);
        for (n, (here, plain)) in trace.0.lines().zip(want.0.lines()).enumerate() {
            assert_eq!(here, plain, "line {n}; left: {place}, right: a plain directory");
        }
        assert_eq!(trace.0.lines().count(), want.0.lines().count(), "{place}");
    }
    let want = snapshot_with(&plain, options);
    for state in ["live", "after a remount"] {
        for place in PLACES {
            let here = snapshot_with(mount.path().join(place), options);
            assert_same(&format!("{place}, {state}"), &want, &here);
        }
        mount = mount.remount();
    }
    mount.unmount();
}

/// Whether the kernel's FUSE carries `FALLOC_FL_ZERO_RANGE`, as it does from Linux 5.12 on: if not, the server is never asked.
pub fn fuse_zeroes_ranges() -> bool {
    static CARRIES: OnceLock<bool> = OnceLock::new();
    *CARRIES.get_or_init(|| {
        let mut sandbox = Sandbox::new();
        sandbox.layer("");
        let log = sandbox.root().join("log");
        let options = format!("log_level=debug,log_file={}", log.display());
        let mount = sandbox.spec(Kind::Lamina).option(&options).mount();
        let file = fs::File::create(mount.path().join("file")).unwrap();
        let done = rustix::fs::fallocate(&file, FallocateFlags::ZERO_RANGE, 0, 100);
        drop(file);
        mount.unmount();
        done.is_ok() || fs::read_to_string(&log).unwrap().contains("fallocate")
    })
}
