//! Many threads on the same few names at once, from a fixed seed: no answer but those that a race may give, no damaged content,
//! nothing lost that nobody else touched; and then the mount, its remount and kernel overlay on the same upper layer show one tree.
//!
//! The order in which threads meet is not repeated, but what each does is; `FUSE_TESTS_SEED` gives other sequences.

use std::fs::{self, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fuse_tests::both;
use fuse_tests::case::{Case, forget_all, put, text, whiteout, work_residue};
use fuse_tests::env;
use fuse_tests::fixture::Kind;
use fuse_tests::ops::Rng;
use fuse_tests::tree::{self, Options, assert_same};
use rustix::fs::{CWD, RenameFlags};
use rustix::io::Errno;

const THREADS: usize = 8;
const TIME: Duration = Duration::from_secs(5);

/// Where the threads meet: one directory of each kind, and one with ancestors to be copied up.
const DIRS: &[&str] = &["lower", "merged", "upper", "deep/er/lower"];
const FILES: usize = 10;
const SUBDIRS: usize = 4;

/// Files consist of records of this length, each written by one call.
const RECORD: usize = 16;

/// What a race may end in.
const FAIR: &[Errno] = &[
    Errno::NOENT,
    Errno::EXIST,
    Errno::NOTEMPTY,
    Errno::NOTDIR,
    Errno::ISDIR,
    Errno::INVAL,
    Errno::XDEV,
    Errno::LOOP,
];

fn record(thread: usize, number: u64) -> String {
    format!("{thread:03} {number:011}\n")
}

/// Fails if a file has anything but whole records. While others truncate it, a read that comes between the truncation and
/// the kernel's hearing of it gives zeros: FUSE fills up short reads to the size that it knows.
fn check_records(path: &Path, content: &[u8], others_truncate: bool) {
    let whole = |record: &[u8]| {
        record.len() == RECORD
            && record[RECORD - 1] == b'\n'
            && record[..3].iter().all(u8::is_ascii_digit)
            || others_truncate && record.iter().all(|byte| *byte == 0)
    };
    assert!(
        content.chunks(RECORD).all(whole),
        "{}: {:?}",
        path.display(),
        String::from_utf8_lossy(content)
    );
}

/// Layers in which half of all names exist somewhere.
fn layers() -> Case {
    let c = Case::new(2);
    for (n, dir) in DIRS.iter().enumerate() {
        let keep = if *dir == "upper" { c.u(dir) } else { c.l(1, dir) };
        put(keep.join("keep"), record(104, 0));
        if *dir == "upper" {
            continue;
        }
        for file in 0..FILES {
            put(c.l(1, &format!("{dir}/f{file}")), record(100, file as u64));
        }
        for sub in 0..SUBDIRS {
            put(c.l(1, &format!("{dir}/d{sub}/f0")), record(101, sub as u64));
        }
        if *dir == "merged" {
            put(c.l(0, &format!("{dir}/f{n}")), record(102, 0));
            put(c.l(0, &format!("{dir}/d0/f1")), record(102, 1));
            put(c.u(&format!("{dir}/f0")), record(103, 0));
            if env::is_machine_root() {
                whiteout(c.u(&format!("{dir}/f5")));
            }
        }
    }
    c
}

/// One thread: its place in the sequence, and the file that only it touches.
struct Worker<'a> {
    merged: &'a Path,
    number: usize,
    rng: Rng,
    count: u64,
    /// Where its own file is, if it is there, and what must be in it.
    own: Option<(&'static str, String)>,
}

impl Worker<'_> {
    fn run(mut self, end: Instant) -> u64 {
        while Instant::now() < end {
            if self.rng.chance(20) {
                self.touch_own();
            } else if let Err(e) = self.step() {
                let fair = FAIR.iter().any(|errno| e.raw_os_error() == Some(errno.raw_os_error()));
                assert!(fair, "thread {} step {}: {e}", self.number, self.count);
            }
            self.count += 1;
        }
        self.count
    }

    /// Changes the file that nobody else touches: here every answer is known.
    fn touch_own(&mut self) {
        let name = format!("own{}", self.number);
        let place = |dir: &str| self.merged.join(dir).join(&name);
        let dir = DIRS[self.rng.below(DIRS.len())];
        let line = record(self.number, self.count);
        self.own = match self.own.take() {
            None => {
                fs::write(place(dir), &line).unwrap_or_else(|e| panic!("create {dir}: {e}"));
                Some((dir, line))
            }
            Some((old, content)) => {
                let now = fs::read_to_string(place(old));
                assert_eq!(now.unwrap_or_else(|e| panic!("read {old}/{name}: {e}")), content);
                match self.rng.below(4) {
                    0 => {
                        fs::remove_file(place(old)).unwrap_or_else(|e| panic!("rm {old}: {e}"));
                        let again = fs::symlink_metadata(place(old));
                        assert!(again.is_err(), "{old}/{name} is still there");
                        None
                    }
                    1 => {
                        let moved = fs::rename(place(old), place(dir));
                        moved.unwrap_or_else(|e| panic!("mv {old} {dir}: {e}"));
                        Some((dir, content))
                    }
                    2 if old != dir => {
                        let linked = fs::hard_link(place(old), place(dir));
                        linked.unwrap_or_else(|e| panic!("ln {old} {dir}: {e}"));
                        fs::remove_file(place(old)).unwrap_or_else(|e| panic!("rm {old}: {e}"));
                        Some((dir, content))
                    }
                    _ => {
                        let file = OpenOptions::new().append(true).open(place(old));
                        let mut file = file.unwrap_or_else(|e| panic!("open {old}: {e}"));
                        file.write_all(line.as_bytes()).unwrap();
                        Some((old, content + &line))
                    }
                }
            }
        };
    }

    /// Does something with names that all threads use.
    fn step(&mut self) -> io::Result<()> {
        let rng = &mut self.rng;
        let mut pick = |kind: char, count: usize| {
            let dir = DIRS[rng.below(DIRS.len())];
            let sub =
                if rng.chance(25) { format!("d{}/", rng.below(SUBDIRS)) } else { String::new() };
            self.merged.join(format!("{dir}/{sub}{kind}{}", rng.below(count)))
        };
        let (file, other) = (pick('f', FILES), pick('f', FILES));
        let (dir, other_dir) = (pick('d', SUBDIRS), pick('d', SUBDIRS));
        let line = record(self.number, self.count);
        match rng.below(16) {
            0 => {
                let mut made = OpenOptions::new().write(true).create_new(true).open(file)?;
                made.write_all(line.as_bytes())
            }
            1 | 2 => OpenOptions::new().append(true).open(file)?.write_all(line.as_bytes()),
            3 => OpenOptions::new().write(true).open(file)?.set_len(0),
            4 | 5 => fs::rename(file, other),
            6 => {
                let flags = RenameFlags::EXCHANGE;
                Ok(rustix::fs::renameat_with(CWD, file, CWD, other, flags)?)
            }
            7 => fs::hard_link(file, other),
            8 => fs::remove_file(file),
            9 => {
                let content = fs::read(&file)?;
                check_records(&file, &content, true);
                Ok(())
            }
            10 => fs::create_dir(dir),
            11 => fs::remove_dir(dir),
            12 => fs::rename(dir, other_dir),
            13 => {
                let mode = 0o600 + u32::try_from(rng.below(0o100)).unwrap();
                fs::set_permissions(file, Permissions::from_mode(mode))
            }
            14 => {
                // Names that come and go may be missing or there twice, one that stays may not.
                let dir = self.merged.join(DIRS[rng.below(DIRS.len())]);
                let names = fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name()));
                let names = names.collect::<io::Result<Vec<_>>>()?;
                let found = names.iter().filter(|name| *name == "keep").count();
                assert_eq!(found, 1, "{names:?}");
                Ok(())
            }
            _ => {
                fs::remove_file(&file)?;
                symlink("f1", file)
            }
        }
    }
}

both!(threads_meet_on_the_same_names);
fn threads_meet_on_the_same_names() {
    let seed = std::env::var("FUSE_TESTS_SEED").map_or(1, |text| text.parse::<u64>().unwrap());
    let mut c = layers();
    c.mount();
    let merged = c.m("");
    let end = Instant::now() + TIME;
    let steps: u64 = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..THREADS)
            .map(|number| {
                let rng = Rng::new(seed.wrapping_mul(1000).wrapping_add(number as u64));
                let worker = Worker { merged: &merged, number, rng, count: 0, own: None };
                scope.spawn(move || worker.run(end))
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).sum()
    });
    assert!(steps > 1000, "only {steps} steps: nothing met");

    // Of a directory that changes while it is looked up, the kernel may go on showing the older time.
    let fresh = env::is_machine_root();
    if fresh {
        forget_all();
    }
    let options = Options { dir_times: fresh, ..Options::default() };
    let live = tree::snapshot_with(&merged, options);
    for (path, entry) in &live.entries {
        if entry.get("type") == "RegularFile" {
            let path = merged.join(path);
            check_records(&path, text(&path).as_bytes(), false);
        }
    }
    c.remount();
    let again = tree::snapshot_with(&merged, options);
    assert_same("left: before, right: after a remount", &live, &again);
    let ours = tree::snapshot(&merged);
    c.unmount();
    assert_eq!(work_residue(&c), Vec::<PathBuf>::new());
    if env::no_kernel_overlay().is_none() {
        // Its listings do not always agree with its stat on upper layers of others.
        let options = Options { check_ino: false, ..Options::default() };
        let kernel = c.sandbox.mount(Kind::Kernel);
        assert_same(
            "left: ours, right: the kernel's",
            &ours,
            &tree::snapshot_with(&merged, options),
        );
        kernel.unmount();
    }
}
