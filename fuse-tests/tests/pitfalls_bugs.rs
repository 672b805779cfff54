//! The numbered bugs seen in other union filesystems, each as a test on a real mount.
//!
//! A test is named for its bug and tells the failure in its first lines. Every lower layer is
//! checksummed before and after by the fixture, so "the lower changed" is checked everywhere.

use std::fs::{self, File, FileTimes, OpenOptions, Permissions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, UNIX_EPOCH};

use fuse_tests::case::{
    BOUND, CAP_NET_RAW, Case, as_user, disk_usage, getx, gone, ino, is_mounted, mode, names, nlink,
    nobody, put, python, said, setx, sh, text, whiteout, work_residue,
};
use fuse_tests::env::{self, wait_until};
use fuse_tests::fixture::{Kind, set_mtime};
use fuse_tests::needs_root;
use rustix::fs::{FallocateFlags, Gid, Mode, OFlags, Uid, XattrFlags};
use rustix::io::Errno;
use rustix::process::{Signal, kill_process};

// B1 - a file is open read-only on its lower copy; a second open for writing reuses that backing
// and the write lands in the lower layer, shared with every other user of the image.
#[test]
fn b1_write_never_reaches_a_lower() {
    needs_root!();
    let mut c = Case::new(1);
    put(c.l(0, "f"), "old old old old\n");
    c.mount();
    let mut held = File::open(c.m("f")).unwrap();
    let mut first = [0u8; 4];
    held.read_exact(&mut first).unwrap();
    assert_eq!(&first, b"old ");
    // A process that keeps the file mapped while it is written.
    let mut mapper = Command::new(env::PYTHON)
        .args(["-c", MAP_AND_WAIT])
        .arg(c.m("f"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = BufReader::new(mapper.stdout.take().unwrap());
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    assert_eq!(line, "old old old old\n");

    let mut writer = OpenOptions::new().read(true).write(true).open(c.m("f")).unwrap();
    writer.write_all(b"NEW NEW NEW NEW\n").unwrap();
    writer.write_all(b"and longer\n").unwrap();
    drop(writer);

    assert_eq!(text(c.l(0, "f")), "old old old old\n", "the write went into the lower layer");
    assert_eq!(text(c.m("f")), "NEW NEW NEW NEW\nand longer\n");
    assert_eq!(text(c.u("f")), "NEW NEW NEW NEW\nand longer\n");
    // What was opened before may stay on the old file (as in the kernel) or follow the new one.
    let mut rest = String::new();
    held.read_to_string(&mut rest).unwrap();
    assert!(
        ["old old old\n", "NEW NEW NEW\nand longer\n"].contains(&rest.as_str()),
        "an old reader sees a mixture: {rest:?}"
    );
    mapper.stdin.take().unwrap().write_all(b"go\n").unwrap();
    let mut mapped = String::new();
    out.read_line(&mut mapped).unwrap();
    assert!(["old old old old\n", "NEW NEW NEW NEW\n"].contains(&mapped.as_str()), "{mapped:?}");
    assert!(mapper.wait().unwrap().success());
    drop(held);
    c.remount();
    assert_eq!(text(c.m("f")), "NEW NEW NEW NEW\nand longer\n");
}

const MAP_AND_WAIT: &str = "
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
m = mmap.mmap(fd, 16, mmap.MAP_SHARED, mmap.PROT_READ)
sys.stdout.write(m[:].decode()); sys.stdout.flush()
sys.stdin.readline()
sys.stdout.write(m[:].decode()); sys.stdout.flush()
";

// B1, the other ways to change a file: each while a reader holds the lower copy.
#[test]
fn b1_truncate_append_punch_and_map_never_reach_a_lower() {
    needs_root!();
    let names = ["truncate", "append", "punch", "zero", "map", "chmod", "copy"];
    let mut c = Case::new(2);
    let old = "0123456789abcdef".repeat(1024);
    for name in names {
        put(c.l(1, name), &old);
    }
    c.mount();
    let held: Vec<File> = names.iter().map(|name| File::open(c.m(name)).unwrap()).collect();
    for mut file in &held {
        let mut start = [0u8; 16];
        file.read_exact(&mut start).unwrap();
    }
    let rw = |name: &str| OpenOptions::new().read(true).write(true).open(c.m(name)).unwrap();
    rw("truncate").set_len(5).unwrap();
    OpenOptions::new().append(true).open(c.m("append")).unwrap().write_all(b"tail").unwrap();
    rustix::fs::fallocate(
        rw("punch"),
        FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
        4096,
        4096,
    )
    .unwrap();
    OpenOptions::new().write(true).truncate(true).open(c.m("zero")).unwrap();
    python(MAP_AND_WRITE, &[c.m("map").to_str().unwrap()]);
    fs::set_permissions(c.m("chmod"), Permissions::from_mode(0o600)).unwrap();
    let moved = rustix::fs::copy_file_range(&held[0], Some(&mut 100), rw("copy"), Some(&mut 0), 16);
    if let Ok(n) = moved {
        assert!(n <= 16);
    }

    drop(held);
    for name in names {
        assert_eq!(text(c.l(1, name)), old, "{name} changed the lower layer");
        assert_eq!(mode(c.l(1, name)), 0o644, "{name} changed the lower mode");
    }
    for round in 0..2 {
        assert_eq!(text(c.m("truncate")), "01234", "round {round}");
        assert_eq!(text(c.m("append")), format!("{old}tail"), "round {round}");
        let punched = fs::read(c.m("punch")).unwrap();
        assert_eq!(punched.len(), old.len());
        assert!(punched[4096..8192].iter().all(|&b| b == 0));
        assert_eq!(&punched[..4096], &old.as_bytes()[..4096]);
        assert_eq!(text(c.m("zero")), "");
        assert_eq!(&fs::read(c.m("map")).unwrap()[..6], b"MAPPED");
        assert_eq!(mode(c.m("chmod")), 0o600);
        assert_eq!(text(c.m("chmod")), old);
        c.remount();
    }
}

const MAP_AND_WRITE: &str = "
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
m = mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
m[0:6] = b'MAPPED'
m.flush()
";

// B2 - whether a whiteout is needed is taken from a stale in-memory hint: a lower file that was
// deleted, made anew and moved away shows its old content again.
#[test]
fn b2_deleted_lower_file_stays_deleted_after_rename() {
    needs_root!();
    let mut c = Case::new(2);
    for name in ["f", "replaced", "linked", "both"] {
        put(c.l(1, name), "old lower content");
    }
    put(c.l(0, "both"), "middle content");
    put(c.l(1, "d/inner"), "old inner");
    c.mount();
    fs::remove_file(c.m("f")).unwrap();
    put(c.m("f"), "new");
    fs::rename(c.m("f"), c.m("g")).unwrap();
    gone(c.m("f"));

    // The same by rename over the lower file, then away.
    put(c.m("tmp"), "newer");
    fs::rename(c.m("tmp"), c.m("replaced")).unwrap();
    fs::rename(c.m("replaced"), c.m("away")).unwrap();
    gone(c.m("replaced"));

    // And by link, then unlink.
    fs::remove_file(c.m("linked")).unwrap();
    fs::hard_link(c.m("g"), c.m("linked")).unwrap();
    fs::remove_file(c.m("linked")).unwrap();
    gone(c.m("linked"));

    // Copied up by a write, then moved.
    fs::write(c.m("both"), "mine").unwrap();
    fs::rename(c.m("both"), c.m("both2")).unwrap();
    gone(c.m("both"));

    // A directory of the same fate.
    fs::remove_dir_all(c.m("d")).unwrap();
    fs::create_dir(c.m("d")).unwrap();
    put(c.m("d/mine"), "mine");
    fs::rename(c.m("d"), c.m("e")).unwrap();
    gone(c.m("d"));

    for _ in 0..3 {
        for name in ["f", "replaced", "linked", "both", "d"] {
            gone(c.m(name));
        }
        assert_eq!(names(c.m("")), ["away", "both2", "e", "g"]);
        assert_eq!(text(c.m("g")), "new");
        assert_eq!(text(c.m("away")), "newer");
        assert_eq!(text(c.m("both2")), "mine");
        assert_eq!(names(c.m("e")), ["mine"]);
        c.remount();
    }
}

// B2 in long chains: rename over and away again and again, with a remount after each step.
#[test]
fn b2_rename_chains_with_a_remount_after_each_step() {
    needs_root!();
    let mut c = Case::new(1);
    for name in ["a", "b", "c"] {
        put(c.l(0, name), format!("lower {name}"));
    }
    c.mount();
    let steps: [(&str, &str); 6] =
        [("a", "b"), ("b", "d"), ("c", "a"), ("d", "c"), ("a", "b"), ("c", "x")];
    let mut model: std::collections::BTreeMap<String, String> =
        ["a", "b", "c"].iter().map(|n| ((*n).to_owned(), format!("lower {n}"))).collect();
    for (from, to) in steps {
        fs::rename(c.m(from), c.m(to)).unwrap();
        let moved = model.remove(from).unwrap();
        model.insert(to.to_owned(), moved);
        for _ in 0..2 {
            let want: Vec<String> = model.keys().cloned().collect();
            assert_eq!(names(c.m("")), want, "after {from} -> {to}");
            for (name, content) in &model {
                assert_eq!(&text(c.m(name)), content, "after {from} -> {to}");
            }
            c.remount();
        }
    }
}

// B3 - a whiteout in a middle layer is ignored once an upper layer has the directory: what it
// hides comes back when the entry above goes.
#[test]
fn b3_whiteout_in_a_middle_layer_hides_below() {
    needs_root!();
    for kind in ["char", "tar", "xattr"] {
        let mut c = Case::new(3);
        put(c.l(0, "d/x"), "top");
        put(c.l(0, "e/x"), "top");
        put(c.l(2, "d/y"), "bottom");
        put(c.l(2, "d/x"), "bottom");
        put(c.l(2, "e/x"), "bottom");
        put(c.l(2, "e/y"), "bottom");
        fs::create_dir(c.l(1, "e")).unwrap();
        // In the middle: directory d is deleted, and so are the files e/x and e/y.
        match kind {
            "char" => {
                whiteout(c.l(1, "d"));
                whiteout(c.l(1, "e/x"));
                whiteout(c.l(1, "e/y"));
            }
            "tar" => {
                put(c.l(1, ".wh.d"), "");
                put(c.l(1, "e/.wh.x"), "");
                put(c.l(1, "e/.wh.y"), "");
            }
            _ => {
                setx(c.l(1, ""), "trusted.overlay.opaque", "x");
                setx(c.l(1, "e"), "trusted.overlay.opaque", "x");
                for name in ["d", "e/x", "e/y"] {
                    put(c.l(1, name), "");
                    setx(c.l(1, name), "trusted.overlay.whiteout", "y");
                }
            }
        }
        c.mount();
        assert_eq!(text(c.m("d/x")), "top", "{kind}");
        gone(c.m("d/y"));
        gone(c.m("e/y"));
        assert_eq!(names(c.m("d")), ["x"], "{kind}");
        assert_eq!(names(c.m("e")), ["x"], "{kind}");
        fs::remove_file(c.m("d/x")).unwrap();
        fs::remove_file(c.m("e/x")).unwrap();
        for _ in 0..2 {
            for path in ["d/x", "d/y", "e/x", "e/y"] {
                gone(c.m(path));
            }
            assert_eq!(names(c.m("d")), [""; 0], "{kind}");
            assert_eq!(names(c.m("e")), [""; 0], "{kind}");
            c.remount();
        }
        fs::remove_dir(c.m("d")).unwrap();
        fs::remove_dir(c.m("e")).unwrap();
        c.remount();
        assert_eq!(names(c.m("")), [""; 0], "{kind}");
    }
}

// B4 - an opaque directory in a middle layer is ignored once a layer above has the directory:
// deleted content is listed again.
#[test]
fn b4_opaque_directory_in_a_middle_layer_hides_below() {
    needs_root!();
    let marks =
        ["trusted.overlay.opaque", "user.overlay.opaque", "user.fuseoverlayfs.opaque", "file"];
    for mark in marks {
        let mut c = Case::new(4);
        put(c.l(0, "d/a"), "a");
        put(c.l(1, "d/b"), "b");
        put(c.l(2, "d/c"), "c");
        put(c.l(2, "d/sub/c"), "c");
        put(c.l(3, "d/deleted"), "bottom");
        put(c.l(3, "d/c"), "bottom");
        put(c.l(3, "d/sub/deleted"), "bottom");
        put(c.l(0, "d/sub/a"), "a");
        if mark == "file" {
            put(c.l(2, "d/.wh..wh..opq"), "");
        } else {
            setx(c.l(2, "d"), mark, "y");
        }
        c.mount();
        for _ in 0..2 {
            gone(c.m("d/deleted"));
            gone(c.m("d/sub/deleted"));
            gone(c.m("d/.wh..wh..opq"));
            assert_eq!(names(c.m("d")), ["a", "b", "c", "sub"], "{mark}");
            assert_eq!(names(c.m("d/sub")), ["a", "c"], "{mark}");
            c.remount();
        }
        fs::remove_file(c.m("d/c")).unwrap();
        fs::remove_file(c.m("d/sub/c")).unwrap();
        put(c.m("d/sub/new"), "");
        for _ in 0..2 {
            assert_eq!(names(c.m("d")), ["a", "b", "sub"], "{mark}");
            assert_eq!(names(c.m("d/sub")), ["a", "new"], "{mark}");
            c.remount();
        }
    }
}

// B4 - a symlink in a middle layer is followed while merging: entries of another directory
// appear under a real one, and what the symlink hides comes back.
#[test]
fn b4_symlink_or_file_in_a_middle_layer_ends_the_merge() {
    needs_root!();
    let mut c = Case::new(3);
    put(c.l(0, "lib/a"), "a");
    put(c.l(0, "etc/a"), "a");
    put(c.l(1, "usr/lib/b"), "b");
    symlink("usr/lib", c.l(1, "lib")).unwrap();
    put(c.l(1, "etc"), "a plain file");
    put(c.l(2, "lib/c"), "c");
    put(c.l(2, "etc/c"), "c");
    c.mount();
    for _ in 0..2 {
        assert_eq!(names(c.m("lib")), ["a"]);
        assert_eq!(names(c.m("etc")), ["a"]);
        for path in ["lib/b", "lib/c", "etc/c"] {
            gone(c.m(path));
        }
        assert_eq!(names(c.m("usr/lib")), ["b"]);
        c.remount();
    }
    put(c.m("lib/new"), "new");
    fs::remove_file(c.m("lib/a")).unwrap();
    c.remount();
    assert_eq!(names(c.m("lib")), ["new"]);
    assert_eq!(names(c.m("usr/lib")), ["b"]);
}

// B5 - the caller's umask is ignored, or the daemon's own is applied: wrong modes on new objects.
#[test]
fn b5_modes_follow_the_callers_umask_and_no_other() {
    needs_root!();
    for daemon_umask in ["022", "077", "000"] {
        let mut c = Case::new(1);
        put(c.l(0, "low/f"), "");
        c.mount_after(&format!("umask {daemon_umask}"));
        for (umask, file, dir) in [
            ("077", 0o600, 0o700),
            ("000", 0o666, 0o777),
            ("027", 0o640, 0o750),
            ("022", 0o644, 0o755),
        ] {
            for place in ["", "low/", "new/"] {
                let at = format!("{place}u{umask}");
                fs::create_dir_all(c.m(place)).unwrap();
                sh(
                    c.m(""),
                    &format!(
                        "umask {umask}; : > {at}.f; mkdir {at}.d; mkfifo {at}.p; mknod {at}.c c 1 3"
                    ),
                );
                for (end, want) in [("f", file), ("d", dir), ("p", file), ("c", file)] {
                    let path = format!("{at}.{end}");
                    assert_eq!(
                        mode(c.m(&path)),
                        want,
                        "{path}, daemon started with {daemon_umask}"
                    );
                    assert_eq!(mode(c.u(&path)), want, "{path} in upper");
                }
            }
        }
    }
}

// B5 - a directory that is copied up because something changes inside it loses mode bits.
#[test]
fn b5_copied_up_directories_keep_mode_owner_and_times() {
    needs_root!();
    let modes = [0o700, 0o1777, 0o2775, 0o555, 0o000, 0o4711, 0o7777];
    for umask in ["077", "000"] {
        let mut c = Case::new(1);
        for mode in modes {
            let dir = c.l(0, &format!("{mode:o}"));
            put(dir.join("sub/f"), "f");
            for (path, uid) in [(dir.join("sub"), 7), (dir.clone(), 8)] {
                chown(&path, Some(uid), Some(uid + 1)).unwrap();
                fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
                set_mtime(&path, 1_234_567_890, 123_456_789).unwrap();
            }
        }
        c.mount_after(&format!("umask {umask}"));
        for mode in modes {
            // A change deep inside copies both directories up and adds no name to either.
            fs::write(c.m(&format!("{mode:o}/sub/f")), "changed").unwrap();
        }
        for _ in 0..2 {
            for bits in modes {
                for (path, uid) in [(format!("{bits:o}"), 8), (format!("{bits:o}/sub"), 7)] {
                    for at in [c.m(&path), c.u(&path)] {
                        let meta = fs::symlink_metadata(&at).unwrap();
                        assert_eq!(meta.mode() & 0o7777, bits, "{}", at.display());
                        assert_eq!((meta.uid(), meta.gid()), (uid, uid + 1), "{}", at.display());
                        assert_eq!(
                            (meta.mtime(), meta.mtime_nsec()),
                            (1_234_567_890, 123_456_789),
                            "mtime of {}",
                            at.display()
                        );
                    }
                }
            }
            c.remount();
        }
    }
}

// B6 - leftovers in the work directory: a stale 200-byte file lends its tail to a 6-byte copy-up,
// and stale directories make mkdir fail with EEXIST after a remount.
#[test]
fn b6_junk_in_the_work_directory_does_no_harm() {
    needs_root!();
    let mut c = Case::new(1);
    put(c.l(0, "d/six"), "123456");
    put(c.l(0, "d/gone"), "x");
    let junk = "J".repeat(200);
    fs::create_dir_all(c.w("work/deep/er")).unwrap();
    for n in 0..40 {
        for dir in ["", "work/"] {
            put(c.w(&format!("{dir}{n}")), &junk);
            put(c.w(&format!("{dir}#{n:x}")), &junk);
        }
        put(c.w(&format!("work/deep/er/{n}")), &junk);
        fs::create_dir(c.w(&format!("work/dir{n}"))).unwrap();
    }
    whiteout(c.w("work/wh"));
    symlink("/nowhere", c.w("work/link")).unwrap();
    // What lies in the work directory itself is nobody's business; `work` below it is emptied.
    let residue = |c: &Case| -> Vec<PathBuf> {
        work_residue(c).into_iter().filter(|path| path.starts_with(c.w("work"))).collect()
    };
    c.mount();
    for round in 0..30 {
        fs::create_dir(c.m(&format!("d/dir{round}"))).unwrap();
    }
    set_mtime(&c.m("d/six"), 1, 1).unwrap();
    assert_eq!(text(c.m("d/six")), "123456");
    OpenOptions::new().append(true).open(c.m("d/six")).unwrap().write_all(b"7").unwrap();
    fs::remove_file(c.m("d/gone")).unwrap();
    assert_eq!(text(c.u("d/six")), "1234567");
    assert_eq!(residue(&c), Vec::<PathBuf>::new());
    c.remount();
    assert_eq!(text(c.m("d/six")), "1234567");
    assert_eq!(residue(&c), Vec::<PathBuf>::new());
}

// B6 - each mkdir and rmdir under a merged parent leaves a directory in the work directory, and
// the numbering starts again at the next mount.
#[test]
fn b6_a_hundred_mkdir_rmdir_leave_nothing_in_work() {
    needs_root!();
    let mut c = Case::new(2);
    for n in 0..20 {
        put(c.l(1, &format!("d/lower{n}/f")), "f");
        put(c.l(1, &format!("d/file{n}")), "f");
    }
    c.mount();
    for round in 0..2 {
        for n in 0..100 {
            let dir = c.m(&format!("d/x{n}"));
            fs::create_dir(&dir).unwrap();
            put(dir.join("inner"), "x");
            fs::remove_file(dir.join("inner")).unwrap();
            fs::remove_dir(&dir).unwrap();
        }
        for n in (0..20).filter(|n| n % 2 == round) {
            fs::remove_dir_all(c.m(&format!("d/lower{n}"))).unwrap();
            fs::create_dir(c.m(&format!("d/lower{n}"))).unwrap();
            fs::remove_dir(c.m(&format!("d/lower{n}"))).unwrap();
            put(c.m("d/tmp"), "new");
            fs::rename(c.m("d/tmp"), c.m(&format!("d/file{n}"))).unwrap();
            fs::remove_file(c.m(&format!("d/file{n}"))).unwrap();
        }
        assert_eq!(work_residue(&c), Vec::<PathBuf>::new(), "round {round}");
        c.remount();
    }
    c.unmount();
    assert_eq!(work_residue(&c), Vec::<PathBuf>::new());
    c.mount();
    assert_eq!(names(c.m("d")), [""; 0]);
}

// B7 - a directory renamed onto the place of a deleted lower one is not made opaque: after a
// remount the deleted lower children are inside it.
#[test]
fn b7_a_renamed_directory_is_opaque_in_its_new_place() {
    needs_root!();
    let mut c = Case::new(2);
    put(c.l(0, "d/x"), "lower x");
    put(c.l(1, "d/sub/y"), "lower y");
    put(c.l(1, "e/z"), "lower z");
    put(c.l(1, "p/keep"), "keep");
    c.mount();
    // Onto a deleted name.
    put(c.m("p/new/mine"), "mine");
    fs::remove_dir_all(c.m("d")).unwrap();
    fs::rename(c.m("p/new"), c.m("d")).unwrap();
    // Onto an emptied merged directory.
    put(c.m("q/mine"), "mine");
    fs::remove_file(c.m("e/z")).unwrap();
    fs::rename(c.m("q"), c.m("e")).unwrap();
    // Below a directory with lower parts.
    put(c.m("r/mine"), "mine");
    fs::rename(c.m("r"), c.m("p/r")).unwrap();
    for _ in 0..3 {
        assert_eq!(names(c.m("")), ["d", "e", "p"]);
        assert_eq!(names(c.m("d")), ["mine"]);
        assert_eq!(names(c.m("e")), ["mine"]);
        assert_eq!(names(c.m("p")), ["keep", "r"]);
        for path in ["d/x", "d/sub", "d/sub/y", "e/z"] {
            gone(c.m(path));
        }
        c.remount();
    }
    // And moved on once more: nothing of either place may stay.
    fs::rename(c.m("d"), c.m("p/d2")).unwrap();
    for _ in 0..2 {
        gone(c.m("d"));
        assert_eq!(names(c.m("p/d2")), ["mine"]);
        c.remount();
    }
}

// B8 - inode numbers are taken from the lowest layer that has the name: a replaced file and its
// old hard-link partner become one file with the content of either.
#[test]
fn b8_unrelated_files_never_become_one() {
    needs_root!();
    for order in [["a", "b", "w"], ["b", "w", "a"], ["w", "a", "b"]] {
        let mut c = Case::new(2);
        put(c.l(1, "a"), "old");
        fs::hard_link(c.l(1, "a"), c.l(1, "b")).unwrap();
        fs::hard_link(c.l(1, "a"), c.l(1, "w")).unwrap();
        put(c.l(0, "a"), "a replaced, longer");
        whiteout(c.l(0, "w"));
        c.mount();
        for round in 0..3 {
            for name in order {
                match name {
                    "a" => assert_eq!(text(c.m("a")), "a replaced, longer", "{order:?} {round}"),
                    "b" => assert_eq!(text(c.m("b")), "old", "{order:?} {round}"),
                    _ => gone(c.m("w")),
                }
            }
            assert_ne!(ino(c.m("a")), ino(c.m("b")), "one inode number for two files");
            assert_eq!(names(c.m("")), ["a", "b"]);
            if round == 0 {
                // Growing one must not show in the other either.
                OpenOptions::new().append(true).open(c.m("b")).unwrap().write_all(b"+b").unwrap();
                assert_eq!(text(c.m("a")), "a replaced, longer");
                fs::write(c.m("b"), "old").unwrap();
            }
            c.remount();
        }
    }
}

// B9 - a file that is unlinked while open answers ENOENT to everything but read and write.
#[test]
fn b9_unlinked_open_files_keep_all_their_operations() {
    needs_root!();
    for place in ["lower", "copied", "new"] {
        let mut c = Case::new(1);
        put(c.l(0, "lower"), "0123456789");
        put(c.l(0, "copied"), "0123456789");
        c.mount();
        if place == "copied" {
            fs::set_permissions(c.m(place), Permissions::from_mode(0o640)).unwrap();
        }
        if place == "new" {
            put(c.m("new"), "0123456789");
        }
        let mut file = OpenOptions::new().read(true).write(true).open(c.m(place)).unwrap();
        let second = File::open(c.m(place)).unwrap();
        fs::remove_file(c.m(place)).unwrap();
        gone(c.m(place));

        let meta = file.metadata().expect("fstat");
        assert_eq!((meta.len(), meta.nlink()), (10, 0), "{place}");
        assert_eq!(file.seek(SeekFrom::End(0)).expect("lseek END"), 10, "{place}");
        let mut buf = [0u8; 4];
        file.read_exact_at(&mut buf, 2).expect("pread");
        assert_eq!(&buf, b"2345");
        file.write_all_at(b"ABC", 8).expect("pwrite");
        assert_eq!(file.metadata().unwrap().len(), 11, "{place}");
        file.set_len(4).expect("ftruncate");
        assert_eq!(file.metadata().unwrap().len(), 4, "{place}");
        file.set_len(20).expect("ftruncate up");
        assert_eq!(file.seek(SeekFrom::End(0)).unwrap(), 20);
        file.set_permissions(Permissions::from_mode(0o4711)).expect("fchmod");
        assert_eq!(file.metadata().unwrap().mode() & 0o7777, 0o4711, "{place}");
        rustix::fs::fchown(&file, Some(Uid::from_raw(12)), Some(Gid::from_raw(13)))
            .expect("fchown");
        let meta = file.metadata().unwrap();
        assert_eq!((meta.uid(), meta.gid()), (12, 13), "{place}");
        let stamp = UNIX_EPOCH + Duration::new(1_000_000_000, 7);
        file.set_times(FileTimes::new().set_modified(stamp)).expect("futimens");
        assert_eq!(file.metadata().unwrap().modified().unwrap(), stamp, "{place}");
        rustix::fs::fsetxattr(&file, "user.k", b"v", XattrFlags::empty()).expect("fsetxattr");
        let mut value = [0u8; 8];
        assert_eq!(rustix::fs::fgetxattr(&file, "user.k", &mut value).expect("fgetxattr"), 1);
        rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, 8192).expect("fallocate");
        assert_eq!(file.metadata().unwrap().len(), 8192);
        file.sync_all().expect("fsync");
        // The same object through its other descriptor and through /proc.
        assert_eq!(second.metadata().expect("second fstat").nlink(), 0);
        let again = format!("/proc/self/fd/{}", file.as_raw_fd());
        let mut reopened = File::open(again).expect("reopen through /proc");
        let mut head = [0u8; 4];
        reopened.read_exact(&mut head).unwrap();
        assert_eq!(&head, b"0123");
        // A new file of that name is another object.
        put(c.m(place), "another");
        assert_eq!(file.metadata().unwrap().len(), 8192);
        assert_eq!(text(c.m(place)), "another");
        drop((file, second, reopened));
        c.remount();
        assert_eq!(text(c.m(place)), "another");
    }
}

// B9 - the same when a rename takes the name away, and for the read-only holder of a lower file.
#[test]
fn b9_a_file_replaced_by_rename_stays_usable_through_its_descriptor() {
    needs_root!();
    let mut c = Case::new(1);
    put(c.l(0, "ro"), "old content");
    put(c.l(0, "rw"), "old content");
    c.mount();
    let ro = File::open(c.m("ro")).unwrap();
    let rw = OpenOptions::new().read(true).write(true).open(c.m("rw")).unwrap();
    for name in ["ro", "rw"] {
        put(c.m("tmp"), "replacement");
        fs::rename(c.m("tmp"), c.m(name)).unwrap();
    }
    let mut buf = [0u8; 3];
    for file in [&ro, &rw] {
        let meta = file.metadata().expect("fstat");
        assert_eq!((meta.len(), meta.nlink()), (11, 0));
        file.read_exact_at(&mut buf, 0).unwrap();
        assert_eq!(&buf, b"old");
    }
    rw.write_all_at(b"OLD", 0).unwrap();
    rw.read_exact_at(&mut buf, 0).unwrap();
    assert_eq!(&buf, b"OLD");
    for name in ["ro", "rw"] {
        assert_eq!(text(c.m(name)), "replacement");
    }
}

// B9 - a removed directory that somebody stands in.
#[test]
fn b9_a_removed_directory_stays_usable_through_its_descriptor() {
    needs_root!();
    let mut c = Case::new(1);
    fs::create_dir(c.l(0, "lower")).unwrap();
    c.mount();
    fs::create_dir(c.m("new")).unwrap();
    for name in ["lower", "new"] {
        let dir = File::open(c.m(name)).unwrap();
        fs::remove_dir(c.m(name)).unwrap();
        assert!(dir.metadata().expect("fstat").is_dir());
        let made =
            rustix::fs::openat(&dir, "f", OFlags::CREATE | OFlags::RDWR, Mode::from(0o644u32));
        assert_eq!(made.unwrap_err(), Errno::NOENT, "{name}");
        let listed: Vec<_> = rustix::fs::Dir::read_from(&dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_owned())
            .filter(|name| name.as_bytes() != b"." && name.as_bytes() != b"..")
            .collect();
        assert!(listed.is_empty(), "{name}: {listed:?}");
        gone(c.m(name));
    }
}

// B10 - link() after copy-up makes a second inode: two numbers, two page caches, one file.
#[test]
fn b10_link_after_copy_up_is_one_inode() {
    needs_root!();
    for prepare in ["none", "append", "chmod"] {
        let mut c = Case::new(1);
        put(c.l(0, "dir/f"), "start");
        c.mount();
        let before = ino(c.m("dir/f"));
        let held = File::open(c.m("dir/f")).unwrap();
        match prepare {
            "append" => {
                let mut f = OpenOptions::new().append(true).open(c.m("dir/f")).unwrap();
                f.write_all(b"").unwrap();
                f.write_all(b"+").unwrap();
            }
            "chmod" => {
                fs::set_permissions(c.m("dir/f"), Permissions::from_mode(0o600)).unwrap();
            }
            _ => {}
        }
        fs::hard_link(c.m("dir/f"), c.m("g")).unwrap();
        assert_eq!(ino(c.m("dir/f")), before, "{prepare}: copy-up changed the inode number");
        assert_eq!(held.metadata().unwrap().ino(), before, "{prepare}");
        drop(held);
        for round in 0..3 {
            assert_eq!(ino(c.m("dir/f")), ino(c.m("g")), "{prepare} {round}");
            assert_eq!((nlink(c.m("dir/f")), nlink(c.m("g"))), (2, 2), "{prepare} {round}");
            let add = format!("r{round}");
            let (write, read) = if round % 2 == 0 { ("g", "dir/f") } else { ("dir/f", "g") };
            let _cached = text(c.m(read));
            OpenOptions::new()
                .append(true)
                .open(c.m(write))
                .unwrap()
                .write_all(add.as_bytes())
                .unwrap();
            assert!(text(c.m(read)).ends_with(&add), "{prepare} {round}");
            if round > 0 {
                c.remount();
            }
        }
        fs::remove_file(c.m("dir/f")).unwrap();
        assert_eq!(nlink(c.m("g")), 1, "{prepare}");
        c.remount();
        gone(c.m("dir/f"));
        assert!(text(c.m("g")).starts_with("start"));
    }
}

/// Seconds and nanoseconds that break careless time arithmetic; all fit ext4.
const ODD_TIMES: [(i64, u32); 9] = [
    (-1, 0),
    (-1, 999_999_999),
    (-2, 1),
    (-86_400 * 365, 500_000_000),
    (-(1 << 31), 0),
    ((1 << 31) - 1, 999_999_999),
    (1 << 31, 0),
    (1 << 32, 1),
    (15_032_385_534, 5),
];

// B11 - a time before 1970 panics the worker thread: one stat per worker and the mount is dead.
#[test]
fn b11_times_before_1970_and_after_2106_do_not_kill_the_server() {
    needs_root!();
    let mut c = Case::new(1);
    for (n, (sec, nsec)) in ODD_TIMES.into_iter().enumerate() {
        for name in [format!("f{n}"), format!("w{n}")] {
            put(c.l(0, &name), "x");
            set_mtime(&c.l(0, &name), sec, nsec).unwrap();
        }
        fs::create_dir(c.l(0, &format!("d{n}"))).unwrap();
        set_mtime(&c.l(0, &format!("d{n}")), sec, nsec).unwrap();
    }
    c.mount();
    let check = |c: &Case| {
        for (n, (sec, nsec)) in ODD_TIMES.into_iter().enumerate() {
            for name in [format!("f{n}"), format!("d{n}")] {
                let meta = fs::symlink_metadata(c.m(&name)).unwrap();
                assert_eq!((meta.mtime(), meta.mtime_nsec()), (sec, i64::from(nsec)), "{name}");
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                check(&c);
                assert_eq!(names(c.m("")).len(), 3 * ODD_TIMES.len());
            });
        }
    });
    // Copy-up keeps them, and they can be set through the mount.
    for (n, (sec, nsec)) in ODD_TIMES.into_iter().enumerate() {
        fs::set_permissions(c.m(&format!("f{n}")), Permissions::from_mode(0o600)).unwrap();
        put(c.m(&format!("new{n}")), "");
        set_mtime(&c.m(&format!("new{n}")), sec, nsec).unwrap();
        set_mtime(&c.m(&format!("w{n}")), sec - 1, nsec.max(1) - 1).unwrap();
        fs::set_permissions(c.m(&format!("d{n}")), Permissions::from_mode(0o700)).unwrap();
    }
    for _ in 0..2 {
        check(&c);
        for (n, (sec, nsec)) in ODD_TIMES.into_iter().enumerate() {
            let meta = fs::symlink_metadata(c.m(&format!("new{n}"))).unwrap();
            assert_eq!((meta.mtime(), meta.mtime_nsec()), (sec, i64::from(nsec)), "new{n}");
            if sec > -(1 << 31) {
                let meta = fs::symlink_metadata(c.m(&format!("w{n}"))).unwrap();
                assert_eq!(
                    (meta.mtime(), meta.mtime_nsec()),
                    (sec - 1, i64::from(nsec.max(1) - 1)),
                    "w{n}"
                );
            }
        }
        c.remount();
    }
}

// B12 - a set-user-id file keeps its bits, or its capabilities, when somebody else writes to it.
#[test]
fn b12_setuid_setgid_and_capabilities_drop_on_write_by_another_user() {
    needs_root!();
    let mut c = Case::new(1);
    let make = |path: PathBuf| {
        put(&path, "content");
        fs::set_permissions(&path, Permissions::from_mode(0o6777)).unwrap();
        setx(&path, "security.capability", CAP_NET_RAW);
    };
    let ways = [
        ("write", "echo x > W"),
        ("append", "echo x >> W"),
        ("overwrite", "echo x 1<>W"),
        ("truncate", "truncate -s 3 W"),
    ];
    for (way, _) in ways {
        make(c.l(0, &format!("lower-{way}")));
    }
    make(c.l(0, "root-writes"));
    c.mount();
    for (way, _) in ways {
        make(c.m(&format!("upper-{way}")));
    }
    for (way, script) in ways {
        for place in ["lower", "upper"] {
            let name = format!("{place}-{way}");
            // Known to the kernel's caches before.
            assert_eq!(mode(c.m(&name)), 0o6777);
            nobody(c.m(""), &script.replace('W', &name));
            assert_eq!(mode(c.m(&name)), 0o777, "{name}: bits kept");
            assert_eq!(mode(c.u(&name)), 0o777, "{name}: bits kept in upper");
            assert_eq!(getx(c.m(&name), "security.capability"), None, "{name}: capability kept");
        }
    }
    c.remount();
    for (way, _) in ways {
        assert_eq!(mode(c.m(&format!("lower-{way}"))), 0o777);
        assert_eq!(getx(c.m(&format!("lower-{way}")), "security.capability"), None);
    }
    // Root (CAP_FSETID) keeps the mode bits; the capability goes for everybody.
    OpenOptions::new().append(true).open(c.m("root-writes")).unwrap().write_all(b"x").unwrap();
    assert_eq!(mode(c.m("root-writes")), 0o6777);
    assert_eq!(getx(c.m("root-writes"), "security.capability"), None);
}

// B13 - new objects do not take the access ACL from the parent's default ACL: access is widened.
#[test]
fn b13_default_acls_are_inherited_as_on_a_plain_directory() {
    needs_root!();
    let prepare =
        "mkdir -p D/sub && setfacl -m d:u::rwx,d:g::r-x,d:o::---,d:u:65534:rwx,d:m::rwx D";
    let act = "for u in 000 022 077; do umask $u; mkdir D/d$u; : > D/f$u; mkfifo D/p$u; \
               mkdir D/sub/s$u; mkdir D/d$u/dd; : > D/d$u/ff; ln -s x D/l$u; done";
    let show =
        "cd D && find . ! -type l | sort | xargs getfacl -pn && find . -printf '%p %m\\n' | sort";
    let mut c = Case::new(1);
    let plain = c.sandbox.root().join("plain");
    fs::create_dir(&plain).unwrap();
    sh(&plain, &prepare.replace('D', "one"));
    sh(&plain, &act.replace('D', "one"));
    let want = sh(&plain, &show.replace('D', "one"));
    assert!(want.contains("user:65534:rwx"), "the reference itself has no ACLs: {want}");
    sh(c.l(0, ""), &prepare.replace('D', "lower"));
    c.mount();
    sh(c.m(""), &prepare.replace('D', "upper"));
    for place in ["lower", "upper"] {
        sh(c.m(""), &act.replace('D', place));
    }
    for _ in 0..2 {
        for place in ["lower", "upper"] {
            assert_eq!(sh(c.m(""), &show.replace('D', place)), want, "under {place}");
        }
        c.remount();
    }
    // And the ACL is enforced: the named user may write, others may not even look.
    nobody(c.m("lower"), "echo x > d000/by-nobody");
    let other = as_user(1234, c.m(""), "cat lower/d000/by-nobody");
    assert!(!other.status.success(), "other::--- let a stranger in");
}

// B15 - attributes taken at opendir are handed out later with an endless lifetime: stat reports
// the old size of a file that grew between opendir and readdir.
#[test]
fn b15_no_stale_size_between_opendir_and_stat() {
    needs_root!();
    let mut c = Case::new(1);
    for n in 0..300 {
        put(c.l(0, &format!("d/f{n:03}")), "0123456789");
    }
    c.mount();
    for round in 1..4u64 {
        let mut listing = fs::read_dir(c.m("d")).unwrap();
        let first = listing.next().unwrap().unwrap();
        assert!(first.metadata().unwrap().is_file());
        for n in 0..300 {
            let name = c.m(&format!("d/f{n:03}"));
            OpenOptions::new().append(true).open(name).unwrap().write_all(&[b'x'; 90]).unwrap();
        }
        let want = 10 + 90 * round;
        let mut seen = 1;
        for entry in listing {
            assert_eq!(entry.unwrap().metadata().unwrap().len(), want, "round {round}");
            seen += 1;
        }
        assert_eq!(seen, 300);
        for n in 0..300 {
            assert_eq!(fs::metadata(c.m(&format!("d/f{n:03}"))).unwrap().len(), want);
        }
    }
}

// B16 - rm of a lower file copies its data up first.
#[test]
fn b16_unlink_and_rename_over_copy_no_data() {
    needs_root!();
    let mut c = Case::new(1);
    for name in ["rm", "over", "tree/a", "tree/b"] {
        put(c.l(0, name), vec![7u8; 32 << 20]);
    }
    c.mount();
    put(c.m("small"), "s");
    assert_eq!(names(c.m("tree")), ["a", "b"]);
    let before = c.server_io();
    fs::remove_file(c.m("rm")).unwrap();
    fs::rename(c.m("small"), c.m("over")).unwrap();
    fs::remove_dir_all(c.m("tree")).unwrap();
    let moved = c.server_io() - before;
    assert!(moved < 2 << 20, "removing files moved {moved} bytes through the server");
    c.remount();
    assert_eq!(names(c.m("")), ["over"]);
    assert!(disk_usage(&c.u("")) < 1 << 20);
}

// B17 - a lower hard-link pair is split by copy-up and data written to one name is lost or
// appears under the other after a remount.
#[test]
fn b17_appends_to_both_names_of_a_lower_pair_survive_a_remount() {
    needs_root!();
    let mut c = Case::new(1);
    put(c.l(0, "a"), "old\n");
    fs::create_dir(c.l(0, "d")).unwrap();
    fs::hard_link(c.l(0, "a"), c.l(0, "d/b")).unwrap();
    c.mount();
    assert_eq!(ino(c.m("a")), ino(c.m("d/b")));
    let append = |name: &str, what: &str| {
        OpenOptions::new()
            .append(true)
            .open(c.m(name))
            .unwrap()
            .write_all(what.as_bytes())
            .unwrap();
    };
    append("a", "to a\n");
    append("d/b", "to b\n");
    append("a", "again to a\n");
    for round in 0..3 {
        assert_eq!(text(c.m("a")), "old\nto a\nto b\nagain to a\n", "a, round {round}");
        assert_eq!(text(c.m("d/b")), "old\nto a\nto b\nagain to a\n", "b, round {round}");
        assert_eq!(ino(c.m("a")), ino(c.m("d/b")), "round {round}");
        assert_eq!(nlink(c.m("a")), 2, "round {round}");
        c.remount();
    }
}

// B18 - an xattr whiteout shows as an empty file.
#[test]
fn b18_xattr_whiteouts_hide_what_is_below() {
    needs_root!();
    for space in ["trusted", "user"] {
        for dir_mark in ["opaque", "whiteouts", ""] {
            let mut c = Case::new(3);
            put(c.l(1, "d/hidden"), "");
            put(c.l(1, "d/shown"), "");
            put(c.l(2, "d/hidden"), "deleted content");
            put(c.l(2, "d/other"), "other");
            put(c.l(0, "d/top"), "top");
            setx(c.l(1, "d/hidden"), &format!("{space}.overlay.whiteout"), "");
            if !dir_mark.is_empty() {
                setx(c.l(1, "d"), &format!("{space}.overlay.{dir_mark}"), "x");
            }
            c.mount();
            for _ in 0..2 {
                gone(c.m("d/hidden"));
                assert_eq!(
                    names(c.m("d")),
                    ["other", "shown", "top"],
                    "{space}, directory marked with {dir_mark:?}"
                );
                assert_eq!(text(c.m("d/other")), "other");
                c.remount();
            }
            // The name is free for a new object, and its going brings nothing back.
            put(c.m("d/hidden"), "new");
            assert_eq!(text(c.m("d/hidden")), "new");
            fs::remove_file(c.m("d/hidden")).unwrap();
            c.remount();
            gone(c.m("d/hidden"));
        }
    }
}

// B19 - creating `.wh.x` succeeds and deletes `x` at the next mount.
#[test]
fn b19_names_that_are_marks_are_refused() {
    needs_root!();
    let mut c = Case::new(1);
    put(c.l(0, "x"), "lower");
    put(c.l(0, "d/y"), "lower");
    c.mount();
    put(c.m("new"), "upper");
    put(c.m("e/z"), "upper");
    symlink("x", c.m("sym")).unwrap();
    let here = c.m("");
    for script in [
        ": > .wh.x",
        "mkdir .wh.x",
        "mkfifo .wh.x",
        "mknod .wh.x c 1 3",
        "ln -s t .wh.x",
        "ln new .wh.x",
        "mv -T new .wh.x",
        "mv -T e .wh.x",
        ": > d/.wh..wh..opq",
        ": > .wh..wh..opq",
        "ln -s t .wh..wh..opq",
        "mkdir d/.wh.y",
    ] {
        let out = Command::new("sh").arg("-c").arg(script).current_dir(&here).output().unwrap();
        assert!(!out.status.success(), "{script} was allowed");
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(
            // The third is what mv(1) makes of EINVAL.
            ["too long", "Invalid", "subdirectory of itself"].iter().any(|end| said.contains(end)),
            "{script}: {said}"
        );
    }
    for _ in 0..2 {
        assert_eq!(names(c.m("")), ["d", "e", "new", "sym", "x"]);
        assert_eq!(names(c.m("d")), ["y"]);
        assert_eq!(text(c.m("x")), "lower");
        assert_eq!(text(c.m("d/y")), "lower");
        assert!(fs::symlink_metadata(c.m(".wh.x")).is_err());
        c.remount();
    }
}

// B20 - SIGTERM leaves a dead mount behind.
#[test]
fn b20_sigterm_unmounts() {
    needs_root!();
    let mut c = Case::new(1);
    put(c.l(0, "f"), "f");
    c.mount();
    put(c.m("new"), "unsynced");
    let pid = c.server();
    kill_process(pid, Signal::TERM).unwrap();
    wait_until("the mount to go", BOUND, || !is_mounted(&c.m("")));
    wait_until("the server to end", BOUND, || fs::metadata(format!("/proc/{pid}")).is_err());
    assert_eq!(names(c.m("")), [""; 0], "the mount point is a plain directory again");
    assert_eq!(text(c.u("new")), "unsynced");
    let mut ended = c.mount.take().unwrap();
    ended.gone();
    ended.unmount();
    c.mount();
    assert_eq!(names(c.m("")), ["f", "new"]);
}

// B20 - options nobody knows, and plugin layers that are skipped, change what a user gets
// without a word. Both must stop the mount.
#[test]
fn b20_unknown_options_and_plugin_layers_are_errors() {
    needs_root!();
    let c = Case::new(1);
    put(c.l(0, "f"), "f");
    let lower = c.l(0, "").display().to_string().trim_end_matches('/').to_owned();
    for (what, options) in [
        ("no_such_option", format!("lowerdir={lower},no_such_option")),
        ("lowerdirs", format!("lowerdirs={lower}")),
        ("metacopi", format!("lowerdir={lower},metacopi=on")),
        ("is a plugin layer of fuse-overlayfs", format!("lowerdir=//plugin/b3BhcXVl/path:{lower}")),
    ] {
        assert_refused(&c, what, &options);
    }
    // A directory is one, however its path is written.
    let spec = c.sandbox.side(Kind::Lamina, "slashes");
    let mount = spec.option(&format!("lowerdir=/{lower}")).mount();
    assert_eq!(text(mount.path().join("f")), "f");
    mount.unmount();
}

/// The mount fails with one line that names the option.
#[track_caller]
fn assert_refused(c: &Case, what: &str, options: &str) {
    let out = Command::new(env::program())
        .args(["-o", options])
        .arg(c.m(""))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(!out.status.success(), "{what} was accepted");
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(said.trim_end().lines().count(), 1, "{what}: {said}");
    assert!(said.contains(what), "{what} is not named: {said}");
    assert!(!is_mounted(&c.m("")));
}

// B14 - a directory made under a map was reported with the id of the layer, and its maker could not remove it.
#[test]
fn b14_what_is_made_under_an_id_map_belongs_to_its_maker() {
    needs_root!();
    let c = Case::new(1);
    fs::set_permissions(c.u(""), Permissions::from_mode(0o777)).unwrap();
    let mut spec = c.spec();
    spec.options.push("uidmapping=0:100000:1000,gidmapping=0:100000:1000".into());
    let mount = spec.mount();
    let script = "mkdir d && stat -c %u:%g d && rmdir d && touch f && stat -c %u:%g f && rm f";
    let out = as_user(100_005, mount.path(), script);
    assert_eq!(String::from_utf8_lossy(&out.stdout), "100005:100005\n100005:100005\n");
    assert!(out.status.success(), "{}", said(&out));
}
