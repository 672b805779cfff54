//! A tree is walked whole: what the server holds for each file is bounded, whatever the tree, and comes back.
//!
//! 40,000 files, or as many as `FUSE_TESTS_FILES` says.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirEntryExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use fuse_tests::case::{Case, OtherFs, forget_all};
use fuse_tests::env::{self, wait_until};
use fuse_tests::needs_root;
use rustix::fs::inotify::{self, WatchFlags};

/// Bytes of memory for each file that is known, and for each directory.
const FILE_MAX: u64 = 400;
const DIRECTORY_MAX: u64 = 1000;

/// What the server may hold more when all is forgotten than before it began: a fixed amount for free memory
/// between what is in use, in KiB, and so many bytes for each file that was known.
const REST: u64 = 8 << 10;
const REST_EACH: u64 = 16;

/// The size of the tree.
fn size() -> usize {
    std::env::var("FUSE_TESTS_FILES").map_or(40_000, |files| files.parse().unwrap())
}

/// Fills `dirs` directories with files, or with directories, together `size`.
fn fill(lower: &Path, dirs: usize, size: usize, are_directories: bool) {
    for dir in 0..dirs {
        let dir = lower.join(format!("dir{dir:05}"));
        fs::create_dir(&dir).unwrap();
        for file in 0..size / dirs {
            let path = dir.join(format!("file{file:06}.txt"));
            if are_directories {
                fs::create_dir(path).unwrap();
            } else {
                fs::File::create(path).unwrap();
            }
        }
    }
}

/// Lists and looks at everything beneath a directory, and returns how many objects that is. While `watch` lives, the
/// kernel forgets none of them, also if somebody else on this machine has caches dropped.
fn walk(top: &Path, watch: &OwnedFd) -> usize {
    let mut seen = 0;
    let mut dirs = vec![top.to_path_buf()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let entry = entry.unwrap();
            let path = entry.path();
            let stat = fs::symlink_metadata(&path).unwrap();
            assert_eq!(stat.ino(), entry.ino(), "{}", path.display());
            inotify::add_watch(watch, &path, WatchFlags::DELETE_SELF).unwrap();
            seen += 1;
            if stat.is_dir() {
                dirs.push(path);
            }
        }
    }
    seen
}

/// One tree at a time: each test has caches dropped.
static TURN: Mutex<()> = Mutex::new(());

/// Walks a tree by a server started after `setup`, and has it forgotten, twice.
fn hold_little(setup: &str, dirs: usize, are_directories: bool, each_max: u64) {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let size = size();
    let watches = "/proc/sys/fs/inotify/max_user_watches";
    let allowed: usize = fs::read_to_string(watches).unwrap().trim().parse().unwrap();
    assert!(allowed > size + 2000, "{watches} is {allowed}");
    let mut c = Case::new(0);
    let many = OtherFs::tmpfs(&c, "many");
    fill(&many.path, dirs, size, are_directories);
    let mut command = Command::new("sh");
    command.args(["-c", &format!("{setup}; exec \"$@\""), "sh"]).arg(env::program());
    let (lower, upper, work) = (many.path.display(), c.u(""), c.w(""));
    let (upper, work) = (upper.display(), work.display());
    command.args(["-o", &format!("lowerdir={lower},upperdir={upper},workdir={work}")]);
    command.arg(c.m(""));
    c.mount_by_hand(command);
    let empty = c.server_heap();
    for round in 0..2 {
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC).unwrap();
        let seen = walk(&c.m(""), &watch);
        assert_eq!(seen, size + dirs);
        let (full, open) = (c.server_heap(), c.server_descriptors());
        let each = (full - empty) * 1024 / seen as u64;
        println!("{setup}: {each} bytes for each of {seen} objects, {open} descriptors");
        assert!(each < each_max, "{setup}, round {round}: {each} bytes for each");
        assert!(open < 2000, "{setup}, round {round}: {open} descriptors");
        let near = empty + REST + REST_EACH * seen as u64 / 1024;
        drop(watch);
        wait_until("memory to come back", Duration::from_secs(60), || {
            // What was used a moment ago is spared the first time, and a directory goes after its names.
            forget_all();
            let (rest, open) = (c.server_heap(), c.server_descriptors());
            rest < near && open < 100
        });
        println!(
            "{setup}: {empty} KiB at the start, {full} when walked, {} after",
            c.server_heap()
        );
    }
    c.unmount();
}

#[test]
fn a_tree_of_many_files_fits_into_little() {
    needs_root!();
    hold_little(":", size() / 1000, false, FILE_MAX);
}

#[test]
fn large_directories_fit_into_1024_descriptors() {
    needs_root!();
    hold_little("ulimit -n 1024", 10, false, FILE_MAX);
}

#[test]
fn a_tree_of_many_directories_fits_into_1024_descriptors() {
    needs_root!();
    hold_little("ulimit -n 1024", size() / 1000, true, DIRECTORY_MAX);
}
