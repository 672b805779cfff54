//! What else went wrong in other union filesystems under test suites and real clients.
//!
//! A test tells its failure in its first lines. Every lower layer is checksummed before and after
//! by the fixture.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{
    FileExt, FileTypeExt, MetadataExt, PermissionsExt, chown, lchown, symlink,
};
use std::path::{Path, PathBuf};

use fuse_tests::case::{
    BOUND, CAP_NET_RAW, Case, OtherFs, append, as_user, disk_usage, forget_all, getx, gone, ino,
    mode, names, nobody, put, setx, sh, text, whiteout,
};
use fuse_tests::env::{self, wait_until};
use fuse_tests::fixture::{Kind, set_mtime};
use fuse_tests::{needs_kernel_overlay, needs_root};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};

// `rm -rf d; mkdir d; rmdir d` on a lower directory takes the whiteout away with the new
// directory: the old one is back for good.
#[test]
fn a_directory_deleted_made_and_deleted_again_stays_deleted() {
    needs_root!();
    let mut c = Case::new(2);
    for path in ["d/f", "p/d/f", "both/f", "empty/x"] {
        put(c.l(1, path), "old");
    }
    put(c.l(0, "both/g"), "old");
    fs::remove_file(c.l(1, "empty/x")).unwrap();
    c.mount();
    let dirs = ["d", "p/d", "both", "empty"];
    for dir in dirs {
        let path = c.m(dir);
        fs::remove_dir_all(&path).unwrap();
        for _ in 0..3 {
            fs::create_dir(&path).unwrap();
            assert_eq!(names(&path), [""; 0], "{dir} is not empty when new");
            fs::remove_dir(&path).unwrap();
            gone(&path);
        }
        // By rename: away, and another one over it.
        fs::create_dir(&path).unwrap();
        fs::create_dir(c.m("other")).unwrap();
        fs::rename(c.m("other"), &path).unwrap();
        fs::rename(&path, c.m("moved")).unwrap();
        gone(&path);
        fs::remove_dir(c.m("moved")).unwrap();
    }
    for _ in 0..2 {
        for dir in dirs {
            gone(c.m(dir));
        }
        assert_eq!(names(c.m("")), ["p"]);
        c.remount();
    }
}

// A replaced top-level directory gets no opaque mark: its old files are back at the next mount
// and missing from diffs.
#[test]
fn a_replaced_top_level_directory_is_opaque_after_a_remount() {
    needs_root!();
    let mut c = Case::new(2);
    put(c.l(1, "d/old"), "old");
    put(c.l(0, "d/sub/old"), "old");
    put(c.l(1, "p/d/old"), "old");
    c.mount();
    for dir in ["d", "p/d"] {
        fs::remove_dir_all(c.m(dir)).unwrap();
        fs::create_dir(c.m(dir)).unwrap();
        put(c.m(dir).join("new"), "new");
    }
    for _ in 0..2 {
        assert_eq!(names(c.m("d")), ["new"]);
        assert_eq!(names(c.m("p/d")), ["new"]);
        c.remount();
    }
    c.unmount();
    for dir in ["d", "p/d"] {
        let opaque = ["trusted", "user"].map(|s| getx(c.u(dir), &format!("{s}.overlay.opaque")));
        assert!(opaque.contains(&Some(b"y".to_vec())), "{dir}: {opaque:?}");
    }
    needs_kernel_overlay!();
    let kernel = c.sandbox.mount(Kind::Kernel);
    assert_eq!(names(c.m("d")), ["new"]);
    assert_eq!(names(c.m("p/d")), ["new"]);
    drop(kernel);
}

// Opaque directories are written with a `.wh..wh..opq` file beside the xattr: kernel overlay
// shows that file.
#[test]
fn no_mark_files_lie_in_the_upper_where_the_kernel_would_show_them() {
    needs_root!();
    needs_kernel_overlay!();
    let mut c = Case::new(2);
    for n in 0..5 {
        put(c.l(1, &format!("d{n}/sub/old")), "old");
        put(c.l(0, &format!("d{n}/f")), "old");
    }
    c.mount();
    fs::remove_dir_all(c.m("d0")).unwrap();
    fs::remove_dir_all(c.m("d1")).unwrap();
    fs::create_dir(c.m("d1")).unwrap();
    fs::remove_dir_all(c.m("d2/sub")).unwrap();
    fs::create_dir(c.m("d2/sub")).unwrap();
    put(c.m("new/sub/f"), "");
    fs::remove_dir_all(c.m("d3")).unwrap();
    fs::rename(c.m("new"), c.m("d3")).unwrap();
    fs::remove_file(c.m("d4/f")).unwrap();
    let ours = sh(c.m(""), "find . | sort");
    c.unmount();
    let upper = sh(c.u(""), "find . | sort");
    assert!(!upper.contains(".wh."), "{upper}");
    let kernel = c.sandbox.mount(Kind::Kernel);
    assert_eq!(sh(c.m(""), "find . | sort"), ours);
    drop(kernel);
}

// A directory whiteout in a middle layer stops working after any unlink in that directory.
#[test]
fn a_middle_whiteout_of_a_directory_outlives_changes_above_it() {
    needs_root!();
    let mut c = Case::new(3);
    put(c.l(0, "d/x"), "top");
    put(c.l(0, "d/sub/x"), "top");
    whiteout(c.l(1, "d"));
    put(c.l(2, "d/y"), "deleted");
    put(c.l(2, "d/sub/y"), "deleted");
    put(c.l(2, "d/only/y"), "deleted");
    c.mount();
    let steps: [&dyn Fn(&Case); 6] = [
        &|c| fs::remove_file(c.m("d/x")).unwrap(),
        &|c| put(c.m("d/y"), "mine"),
        &|c| fs::remove_file(c.m("d/y")).unwrap(),
        &|c| fs::create_dir(c.m("d/only")).unwrap(),
        &|c| fs::remove_file(c.m("d/sub/x")).unwrap(),
        &|c| fs::remove_dir(c.m("d/sub")).unwrap(),
    ];
    for (n, step) in steps.iter().enumerate() {
        step(&c);
        for _ in 0..2 {
            if n != 1 {
                gone(c.m("d/y"));
            }
            gone(c.m("d/sub/y"));
            gone(c.m("d/only/y"));
            c.remount();
        }
    }
    assert_eq!(names(c.m("d")), ["only"]);
}

// An opaque mark in a middle layer is ignored below subdirectories that upper layers have again.
#[test]
fn a_middle_opaque_directory_hides_at_every_depth_below() {
    needs_root!();
    let mut c = Case::new(3);
    put(c.l(0, "d/a/b/c/top"), "top");
    fs::create_dir_all(c.l(1, "d/a")).unwrap();
    setx(c.l(1, "d"), "trusted.overlay.opaque", "y");
    for path in ["d/deleted", "d/a/deleted", "d/a/b/deleted", "d/a/b/c/deleted"] {
        put(c.l(2, path), "deleted");
    }
    c.mount();
    for round in 0..3 {
        assert_eq!(
            sh(c.m("d"), "find . | sort"),
            ".\n./a\n./a/b\n./a/b/c\n./a/b/c/top\n",
            "{round}"
        );
        for path in ["d/deleted", "d/a/deleted", "d/a/b/deleted", "d/a/b/c/deleted"] {
            gone(c.m(path));
        }
        if round == 1 {
            put(c.m("d/a/b/c/more"), "");
            fs::remove_file(c.m("d/a/b/c/more")).unwrap();
        }
        c.remount();
    }
}

// Two lower filesystems with equal inode numbers mix their contents through the page cache.
#[test]
fn two_filesystems_with_equal_inode_numbers_stay_apart() {
    needs_root!();
    let c = Case::new(0);
    let one = OtherFs::tmpfs(&c, "one");
    let two = OtherFs::tmpfs(&c, "two");
    for (fs_name, fs_path) in [("one", &one.path), ("two", &two.path)] {
        for n in 0..40 {
            put(
                fs_path.join(format!("{fs_name}-{n:02}")),
                format!("{fs_name} {n} ").repeat(n * 40),
            );
            put(fs_path.join(format!("dir/{fs_name}-{n:02}")), format!("{fs_name} dir {n}"));
        }
    }
    assert_eq!(ino(one.path.join("one-07")), ino(two.path.join("two-07")), "no test at all");
    let mut spec = c.spec();
    spec.lowers = vec![one.path.clone(), two.path.clone()];
    let mut mount = spec.mount();
    let check = |expect_extra: &str| {
        let mut seen = std::collections::BTreeMap::new();
        for n in (0..40).rev() {
            for fs_name in ["two", "one"] {
                let extra = if n == 7 { expect_extra } else { "" };
                let top = c.m(&format!("{fs_name}-{n:02}"));
                assert_eq!(text(&top), format!("{fs_name} {n} ").repeat(n * 40) + extra);
                let deep = c.m(&format!("dir/{fs_name}-{n:02}"));
                assert_eq!(text(&deep), format!("{fs_name} dir {n}"));
                for path in [top, deep] {
                    let meta = fs::metadata(&path).unwrap();
                    let earlier = seen.insert((meta.dev(), meta.ino()), path.clone());
                    assert_eq!(earlier, None, "one identity with {}", path.display());
                }
            }
        }
    };
    check("");
    for fs_name in ["one", "two"] {
        append(c.m(&format!("{fs_name}-07")), "+");
    }
    check("+");
    mount = mount.remount();
    check("+");
    mount.unmount();
    c.sandbox.forget_seals();
}

// A change through one name of a lower hard-link pair shows through the other until the next
// mount, and is then undone. Whatever is seen must stay.
#[test]
fn a_change_through_one_name_of_a_lower_pair_is_not_undone() {
    needs_root!();
    let mut c = Case::new(1);
    for what in ["chmod", "write", "chown", "xattr", "utimes", "rename"] {
        put(c.l(0, &format!("{what}-a")), "old");
        fs::hard_link(c.l(0, &format!("{what}-a")), c.l(0, &format!("{what}-b"))).unwrap();
        set_mtime(&c.l(0, &format!("{what}-a")), 1_000_000, 5).unwrap();
    }
    c.mount();
    fs::set_permissions(c.m("chmod-a"), Permissions::from_mode(0o600)).unwrap();
    append(c.m("write-a"), "+new");
    chown(c.m("chown-a"), Some(17), Some(18)).unwrap();
    setx(c.m("xattr-a"), "user.k", "v");
    set_mtime(&c.m("utimes-a"), 2_000_000, 7).unwrap();
    fs::rename(c.m("rename-a"), c.m("rename-c")).unwrap();
    let view = || {
        let mut out = String::new();
        for name in names(c.sandbox.merged()) {
            let path = c.sandbox.merged().join(&name);
            let meta = fs::metadata(&path).unwrap();
            out += &format!(
                "{name} {:o} {}:{} {}.{} {:?} {:?}\n",
                meta.mode(),
                meta.uid(),
                meta.gid(),
                meta.mtime(),
                meta.mtime_nsec(),
                text(&path),
                getx(&path, "user.k")
            );
        }
        out
    };
    let before = view();
    assert_eq!(mode(c.m("chmod-a")), 0o600);
    assert_eq!(text(c.m("write-a")), "old+new");
    let mut mount = c.mount.take().unwrap();
    for _ in 0..2 {
        mount = mount.remount();
        assert_eq!(view(), before);
    }
    drop(mount);
}

// The same when the kernel has forgotten the names in between, as it does when memory is short.
#[test]
fn a_change_through_a_forgotten_name_of_a_lower_pair_is_not_undone() {
    needs_root!();
    let mut c = Case::new(1);
    put(c.l(0, "a"), "old");
    fs::hard_link(c.l(0, "a"), c.l(0, "b")).unwrap();
    fs::create_dir(c.l(0, "d")).unwrap();
    fs::hard_link(c.l(0, "a"), c.l(0, "d/c")).unwrap();
    c.mount();
    let paths = ["a", "b", "d/c"];
    for round in 0..3 {
        for path in paths {
            text(c.m(path));
            names(c.m(""));
        }
        forget_all();
        append(c.m(paths[round % 3]), "+");
        forget_all();
        let live = paths.map(|path| text(c.m(path)));
        c.remount();
        assert_eq!(paths.map(|path| text(c.m(path))), live, "round {round}");
    }
}

// Opening a lower file for writing is no change of it; copying it up for that costs the whole file.
#[test]
fn open_for_writing_copies_nothing_up() {
    needs_root!();
    let mut c = Case::new(1);
    put(c.l(0, "f"), "content");
    c.mount();
    let file = OpenOptions::new().read(true).write(true).open(c.m("f")).unwrap();
    assert!(!c.u("f").exists());
    file.write_at(b"C", 0).unwrap();
    assert_eq!(text(c.u("f")), "Content");
}

// A lower filesystem without ACLs answers EOPNOTSUPP to an ACL read; passed on, every file not
// owned by the caller is unreadable.
#[test]
fn a_lower_without_acl_support_is_readable_by_everybody() {
    needs_root!();
    let c = Case::new(1);
    // ramfs has no xattrs at all.
    let bare = OtherFs::mount(&c, "bare", "ramfs", "mode=755");
    put(bare.path.join("d/f"), "readable");
    put(bare.path.join("d/exec"), "#!/bin/sh\necho ran\n");
    fs::set_permissions(bare.path.join("d/exec"), Permissions::from_mode(0o755)).unwrap();
    put(bare.path.join("secret"), "no");
    fs::set_permissions(bare.path.join("secret"), Permissions::from_mode(0o640)).unwrap();
    put(c.l(0, "other"), "");
    let mut spec = c.spec();
    spec.lowers = vec![bare.path.clone(), c.l(0, "")];
    let mount = spec.mount();
    nobody(
        c.m(""),
        "test \"$(cat d/f)\" = readable && ls -lR . && stat d d/f && test \"$(d/exec)\" = ran",
    );
    assert!(!as_user(65534, c.m(""), "cat secret").status.success());
    // Copy-up from there.
    append(c.m("d/f"), "+");
    setx(c.m("d/exec"), "user.k", "v");
    nobody(c.m(""), "test \"$(cat d/f)\" = readable+ && ls -l d");
    assert_eq!(getx(c.m("d/exec"), "user.k"), Some(b"v".to_vec()));
    mount.unmount();
    c.sandbox.forget_seals();
}

// Copy-up by utimens or link loses the setuid and setgid bits, or the capability.
#[test]
fn copy_up_keeps_setuid_setgid_sticky_and_capabilities() {
    needs_root!();
    type Act = fn(&Path);
    let ways: [(&str, Act); 6] = [
        ("utimens", |p| set_mtime(p, 5, 5).unwrap()),
        ("link", |p| fs::hard_link(p, p.with_extension("link")).unwrap()),
        ("rename", |p| {
            fs::rename(p, p.with_extension("tmp")).unwrap();
            fs::rename(p.with_extension("tmp"), p).unwrap();
        }),
        ("setxattr", |p| setx(p, "user.k", "v")),
        ("open", |p| drop(OpenOptions::new().read(true).write(true).open(p).unwrap())),
        ("removexattr", |p| rustix::fs::lremovexattr(p, "user.gone").unwrap()),
    ];
    let mut c = Case::new(1);
    for (way, _) in ways {
        let path = c.l(0, way);
        put(&path, "content");
        chown(&path, Some(33), Some(44)).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o7755)).unwrap();
        setx(&path, "security.capability", CAP_NET_RAW);
        setx(&path, "user.gone", "x");
    }
    c.mount();
    for (way, act) in ways {
        act(&c.m(way));
    }
    for _ in 0..2 {
        for (way, _) in ways {
            assert_eq!(mode(c.m(way)), 0o7755, "{way}");
            let meta = fs::metadata(c.m(way)).unwrap();
            assert_eq!((meta.uid(), meta.gid()), (33, 44), "{way}");
            assert_eq!(
                getx(c.m(way), "security.capability").as_deref(),
                Some(CAP_NET_RAW),
                "{way}"
            );
        }
        assert_eq!(mode(c.m("link.link")), 0o7755);
        assert_eq!(getx(c.m("removexattr"), "user.gone"), None);
        c.remount();
    }
}

// A copied-up symlink belongs to root and is dated now.
#[test]
fn a_copied_up_symlink_keeps_owner_time_and_target() {
    needs_root!();
    let mut c = Case::new(1);
    // xfs takes 1023 bytes.
    let long = [1500, 500].map(|n| "x/".repeat(n));
    let long =
        long.iter().find(|long| symlink(long, c.sandbox.root().join("try")).is_ok()).unwrap();
    for (name, target) in [("rename", "target"), ("link", long), ("chown", "/abs"), ("time", "t")] {
        symlink(target, c.l(0, name)).unwrap();
        lchown(c.l(0, name), Some(1234), Some(4321)).unwrap();
        set_mtime(&c.l(0, name), 77, 7).unwrap();
    }
    c.mount();
    fs::rename(c.m("rename"), c.m("renamed")).unwrap();
    fs::hard_link(c.m("link"), c.m("linked")).unwrap();
    lchown(c.m("chown"), Some(9), None).unwrap();
    set_mtime(&c.m("time"), 88, 8).unwrap();
    for _ in 0..2 {
        for (name, target, uid, time) in [
            ("renamed", "target", 1234, (77, 7)),
            ("link", long, 1234, (77, 7)),
            ("linked", long, 1234, (77, 7)),
            ("chown", "/abs", 9, (77, 7)),
            ("time", "t", 1234, (88, 8)),
        ] {
            let meta = fs::symlink_metadata(c.m(name)).unwrap();
            assert!(meta.is_symlink(), "{name}");
            assert_eq!((meta.uid(), meta.gid()), (uid, 4321), "{name}");
            assert_eq!((meta.mtime(), meta.mtime_nsec()), time, "{name}");
            assert_eq!(fs::read_link(c.m(name)).unwrap(), Path::new(target), "{name}");
        }
        assert_eq!(ino(c.m("link")), ino(c.m("linked")));
        c.remount();
    }
}

// chown of a lower FIFO, socket or device opens the node: EIO, ENXIO, a hang, or side effects on
// a real device.
#[test]
fn special_files_are_copied_up_without_being_opened() {
    needs_root!();
    let kinds = [
        ("fifo", FileType::Fifo, 0),
        ("socket", FileType::Socket, 0),
        ("char", FileType::CharacterDevice, rustix::fs::makedev(240, 77)),
        ("block", FileType::BlockDevice, rustix::fs::makedev(241, 300)),
        ("zero-one", FileType::CharacterDevice, rustix::fs::makedev(0, 1)),
    ];
    let acts = ["chown", "chmod", "utimes", "xattr", "link", "rename"];
    let mut c = Case::new(1);
    for (kind, file_type, dev) in kinds {
        for act in acts {
            let path = c.l(0, &format!("{kind}-{act}"));
            rustix::fs::mknodat(CWD, &path, file_type, Mode::from(0o640u32), dev).unwrap();
            lchown(&path, Some(5), Some(6)).unwrap();
            set_mtime(&path, 1000, 1).unwrap();
        }
    }
    c.mount();
    for (kind, _, _) in kinds {
        let path = |act: &str| c.m(&format!("{kind}-{act}"));
        lchown(path("chown"), Some(50), Some(60)).unwrap_or_else(|e| panic!("{kind}: {e}"));
        fs::set_permissions(path("chmod"), Permissions::from_mode(0o4711)).unwrap();
        set_mtime(&path("utimes"), 2000, 2).unwrap();
        setx(path("xattr"), "trusted.k", "v");
        fs::hard_link(path("link"), c.m(&format!("{kind}-link2"))).unwrap();
        fs::rename(path("rename"), c.m(&format!("{kind}-renamed"))).unwrap();
    }
    for _ in 0..2 {
        for (kind, _, dev) in kinds {
            let meta = |act: &str| fs::symlink_metadata(c.m(&format!("{kind}-{act}"))).unwrap();
            for act in ["chown", "chmod", "utimes", "xattr", "link", "link2", "renamed"] {
                assert_eq!(meta(act).rdev(), dev, "{kind}-{act}");
                let as_kind = meta(act).file_type();
                let right = match kind {
                    "fifo" => as_kind.is_fifo(),
                    "socket" => as_kind.is_socket(),
                    "block" => as_kind.is_block_device(),
                    _ => as_kind.is_char_device(),
                };
                assert!(right, "{kind}-{act} is {as_kind:?}");
                let owner = if act == "chown" { (50, 60) } else { (5, 6) };
                assert_eq!((meta(act).uid(), meta(act).gid()), owner, "{kind}-{act}");
                if act != "utimes" {
                    assert_eq!(meta(act).mtime(), 1000, "{kind}-{act}");
                }
            }
            assert_eq!(meta("chmod").mode() & 0o7777, 0o4711);
            assert_eq!(meta("utimes").mtime(), 2000);
            assert_eq!(meta("link").nlink(), 2, "{kind}");
            assert_eq!(getx(c.m(&format!("{kind}-xattr")), "trusted.k"), Some(b"v".to_vec()));
            gone(c.m(&format!("{kind}-rename")));
        }
        c.remount();
    }
}

// fstat says one link after the last name is gone; or zero while one is left.
#[test]
fn link_counts_are_right_before_and_after_the_last_unlink() {
    needs_root!();
    let mut c = Case::new(1);
    put(c.l(0, "lower"), "x");
    put(c.l(0, "pair-a"), "x");
    fs::hard_link(c.l(0, "pair-a"), c.l(0, "pair-b")).unwrap();
    c.mount();
    put(c.m("new"), "x");
    for name in ["lower", "new"] {
        let file = File::open(c.m(name)).unwrap();
        fs::hard_link(c.m(name), c.m("second")).unwrap();
        assert_eq!(file.metadata().unwrap().nlink(), 2, "{name}");
        fs::remove_file(c.m(name)).unwrap();
        assert_eq!(file.metadata().unwrap().nlink(), 1, "{name}");
        fs::remove_file(c.m("second")).unwrap();
        assert_eq!(file.metadata().unwrap().nlink(), 0, "{name}");
    }
    let pair = OpenOptions::new().read(true).write(true).open(c.m("pair-a")).unwrap();
    (&pair).write_all(b"y").unwrap();
    fs::remove_file(c.m("pair-a")).unwrap();
    fs::remove_file(c.m("pair-b")).unwrap();
    assert_eq!(pair.metadata().unwrap().nlink(), 0);
    drop(pair);
    c.remount();
    assert_eq!(names(c.m("")), [""; 0]);
}

// After some hundred mixed operations the live mount lists a tenth of what is there.
#[test]
fn listings_are_complete_after_many_mixed_operations() {
    needs_root!();
    for seed in 1..6u64 {
        let mut c = Case::new(3);
        let mut model: BTreeMap<String, Option<String>> = BTreeMap::new();
        for n in 0..24 {
            for (dir, layer) in [("a", n % 3), ("b", (n + 1) % 3), ("a/c", (n + 2) % 3)] {
                put(c.l(layer, &format!("{dir}/f{n}")), format!("{dir} {n}"));
                model.insert(format!("{dir}/f{n}"), Some(format!("{dir} {n}")));
                model.insert(dir.to_owned(), None);
            }
        }
        c.mount();
        let mut random = seed;
        let mut pick = move |n: usize| {
            // Knuth's MMIX generator.
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            usize::try_from(random >> 33).unwrap() % n
        };
        for step in 0..300 {
            let dirs = ["a", "b", "a/c", "n"];
            let dir = dirs[pick(4)];
            let path = format!("{dir}/f{}", pick(30));
            let to = format!("{}/f{}", dirs[pick(4)], pick(30));
            let has = |model: &BTreeMap<String, Option<String>>, path: &str| {
                model.get(path).is_some_and(Option::is_some)
            };
            if dir == "n" && !model.contains_key("n") {
                fs::create_dir(c.m("n")).unwrap();
                model.insert("n".to_owned(), None);
            }
            match pick(6) {
                0 | 1 => {
                    fs::write(c.m(&path), format!("step {step}")).unwrap();
                    model.insert(path, Some(format!("step {step}")));
                }
                2 if has(&model, &path) => {
                    fs::remove_file(c.m(&path)).unwrap();
                    model.remove(&path);
                }
                3 if has(&model, &path) && (model.contains_key("n") || !to.starts_with("n/")) => {
                    fs::rename(c.m(&path), c.m(&to)).unwrap();
                    let content = model.remove(&path).unwrap();
                    model.insert(to, content);
                }
                4 if has(&model, &path) => {
                    append(c.m(&path), "+");
                    let content = model.get_mut(&path).unwrap().as_mut().unwrap();
                    content.push('+');
                }
                5 if pick(12) == 0 => {
                    if let Ok(()) = fs::remove_dir_all(c.m("a/c")) {
                        fs::create_dir(c.m("a/c")).unwrap();
                        model.retain(|path, _| !path.starts_with("a/c/"));
                    }
                }
                _ => {}
            }
            if step % 37 == 0 {
                assert_eq!(
                    listing(&c.m("")),
                    model.keys().cloned().collect::<Vec<_>>(),
                    "{seed} {step}"
                );
            }
        }
        for round in 0..2 {
            assert_eq!(listing(&c.m("")), model.keys().cloned().collect::<Vec<_>>(), "{seed}");
            for (path, content) in &model {
                if let Some(content) = content {
                    assert_eq!(&text(c.m(path)), content, "seed {seed} round {round} {path}");
                }
            }
            c.remount();
        }
    }
}

/// All paths below a directory, sorted.
fn listing(root: &Path) -> Vec<String> {
    let mut out = Vec::new();
    let mut todo = vec![(root.to_path_buf(), String::new())];
    while let Some((dir, prefix)) = todo.pop() {
        for name in names(&dir) {
            let path = dir.join(&name);
            if fs::symlink_metadata(&path).unwrap().is_dir() {
                todo.push((path, format!("{prefix}{name}/")));
            }
            out.push(format!("{prefix}{name}"));
        }
    }
    out.sort();
    out
}

// A listing loses or repeats names that were there all the time, because the directory changes
// while it is read.
#[test]
fn names_are_not_lost_while_a_directory_changes() {
    needs_root!();
    let mut c = Case::new(2);
    let stable: Vec<String> = (0..600).map(|n| format!("stable-{n:03}")).collect();
    for (n, name) in stable.iter().enumerate() {
        put(c.l(n % 2, &format!("d/{name}")), "");
        put(c.l(1, &format!("d/old-{n}")), "");
    }
    c.mount();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let dir = c.m("d");
    std::thread::scope(|scope| {
        for worker in 0..3 {
            let (stop, dir) = (&stop, &dir);
            scope.spawn(move || {
                for n in 0.. {
                    if stop.load(std::sync::atomic::Ordering::Relaxed) {
                        break;
                    }
                    let path = dir.join(format!("temp-{worker}-{}", n % 50));
                    fs::write(&path, "x").unwrap();
                    fs::rename(&path, dir.join(format!("moved-{worker}-{}", n % 50))).unwrap();
                    fs::remove_file(dir.join(format!("moved-{worker}-{}", n % 50))).unwrap();
                    let _ = fs::remove_file(dir.join(format!("old-{}", n * 3 + worker)));
                }
            });
        }
        let result = std::panic::catch_unwind(|| {
            for round in 0..60 {
                let mut seen: Vec<String> = list_in_pieces(&dir, 700);
                seen.retain(|name| name.starts_with("stable-"));
                seen.sort();
                assert_eq!(seen, stable, "round {round}");
            }
        });
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    });
}

// `rm -r` removes what it has listed and reads on: what was not yet listed must still come.
#[test]
fn a_listing_survives_removal_of_what_it_gave() {
    needs_root!();
    let mut c = Case::new(2);
    for n in 0..500 {
        put(c.l(n % 2, &format!("d/lower-{n:03}")), "");
    }
    c.mount();
    for n in 0..500 {
        put(c.m(&format!("d/upper-{n:03}")), "");
    }
    let dir = File::open(c.m("d")).unwrap();
    let mut buffer = Vec::with_capacity(512);
    let mut listing = rustix::fs::RawDir::new(&dir, buffer.spare_capacity_mut());
    let mut removed = 0;
    while let Some(entry) = listing.next() {
        let entry = entry.unwrap();
        let name = entry.file_name().to_str().unwrap();
        if name != "." && name != ".." {
            fs::remove_file(c.m("d").join(name)).unwrap();
            removed += 1;
        }
    }
    assert_eq!(removed, 1000);
    drop(dir);
    fs::remove_dir(c.m("d")).unwrap();
    c.remount();
    gone(c.m("d"));
}

/// The names of a directory, read with a buffer of few bytes.
fn list_in_pieces(path: &Path, bytes: usize) -> Vec<String> {
    let dir = File::open(path).unwrap();
    let mut buffer = Vec::with_capacity(bytes);
    let mut listing = rustix::fs::RawDir::new(&dir, buffer.spare_capacity_mut());
    let mut out = Vec::new();
    while let Some(entry) = listing.next() {
        out.push(entry.unwrap().file_name().to_str().unwrap().to_owned());
    }
    out
}

// The type in the mount table is plain `fuse`, so that nothing tells who serves it.
#[test]
fn the_mount_table_names_the_type_and_the_program() {
    needs_root!();
    let mut c = Case::new(1);
    c.mount();
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let merged = c.m("").display().to_string();
    let line = table.lines().find(|line| line.split(' ').nth(4) == Some(&merged)).unwrap();
    let mut tail = line.split(" - ").nth(1).unwrap().split(' ');
    let kind = tail.next().unwrap();
    assert!(kind.starts_with("fuse.") && kind.len() > 5, "{line}");
    let source = tail.next().unwrap();
    assert!(!source.is_empty() && source != "none" && source != "/dev/fuse", "{line}");
    let options = tail.next().unwrap();
    assert!(options.contains("default_permissions"), "{line}");
}

// Creating and unlinking gets slower with each entry the directory has: a hundred times slower at
// 100,000. Counted is the processor time of the server, which other work does not change much.
#[test]
fn create_and_unlink_cost_the_same_in_a_large_directory() {
    needs_root!();
    let mut c = Case::new(2);
    for n in 0..20_000 {
        fs::create_dir_all(c.l(0, "large")).unwrap();
        fs::write(c.l(0, &format!("large/entry-{n}")), "").unwrap();
    }
    for n in 0..100 {
        put(c.l(0, &format!("small/entry-{n}")), "");
    }
    fs::create_dir(c.l(1, "large")).unwrap();
    fs::create_dir(c.l(1, "small")).unwrap();
    c.mount();
    for dir in ["small", "large"] {
        // Listed once, so that reading the names is not counted.
        fs::read_dir(c.m(dir)).unwrap().for_each(drop);
        put(c.m(&format!("{dir}/warm")), "");
    }
    let cost = |dir: &str, first: usize| {
        let before = c.server_nanoseconds();
        for n in 0..100 {
            let path = c.m(&format!("{dir}/new-{first}-{n}"));
            File::create_new(&path).unwrap();
            fs::remove_file(&path).unwrap();
        }
        for n in first..first + 20 {
            fs::remove_file(c.m(&format!("{dir}/entry-{n}"))).unwrap();
        }
        c.server_nanoseconds() - before
    };
    let best = |dir: &str| (0..4).map(|round| cost(dir, round * 20)).min().unwrap();
    let (small, large) = (best("small"), best("large"));
    assert!(
        large < 4 * small,
        "220 operations took the server {large} ns in a directory of 20,000 and {small} ns in one of 100"
    );
}

// A copy-up writes the holes of a sparse file: one byte changed, a gigabyte allocated.
#[test]
fn copy_up_keeps_holes() {
    needs_root!();
    let mut c = Case::new(1);
    let file = File::create(c.l(0, "sparse")).unwrap();
    file.set_len(1 << 30).unwrap();
    for at in [0u64, 123 << 20, 700 << 20, (1 << 30) - 5] {
        file.write_all_at(b"data!", at).unwrap();
    }
    drop(file);
    put(c.l(0, "chmod"), "");
    File::options().write(true).open(c.l(0, "chmod")).unwrap().set_len(1 << 30).unwrap();
    c.mount_unsealed();
    OpenOptions::new()
        .write(true)
        .open(c.m("sparse"))
        .unwrap()
        .write_all_at(b"X", 300 << 20)
        .unwrap();
    fs::set_permissions(c.m("chmod"), Permissions::from_mode(0o600)).unwrap();
    for name in ["sparse", "chmod"] {
        assert!(disk_usage(&c.u(name)) < 8 << 20, "{name}: {} bytes", disk_usage(&c.u(name)));
        assert_eq!(fs::metadata(c.m(name)).unwrap().len(), 1 << 30);
        assert!(fs::metadata(c.m(name)).unwrap().blocks() < 16384);
    }
    let file = File::open(c.m("sparse")).unwrap();
    let mut buf = [0u8; 5];
    for at in [0u64, 123 << 20, 700 << 20, (1 << 30) - 5] {
        file.read_exact_at(&mut buf, at).unwrap();
        assert_eq!(&buf, b"data!", "at {at}");
    }
    file.read_exact_at(&mut buf, 300 << 20).unwrap();
    assert_eq!(&buf, b"X\0\0\0\0");
    drop(file);
    c.unmount();
    assert_eq!(fs::metadata(c.l(0, "sparse")).unwrap().len(), 1 << 30);
}

// open(O_TRUNC) and truncate(0) of a lower file copy all its data first.
#[test]
fn truncation_to_nothing_copies_nothing() {
    needs_root!();
    let mut c = Case::new(1);
    for name in ["open", "truncate", "redirect"] {
        put(c.l(0, name), vec![b'x'; 100 << 20]);
        fs::set_permissions(c.l(0, name), Permissions::from_mode(0o640)).unwrap();
        chown(c.l(0, name), Some(3), Some(4)).unwrap();
    }
    c.mount_unsealed();
    let before = c.server_io();
    let file = OpenOptions::new().write(true).truncate(true).open(c.m("open")).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 0);
    file.write_all_at(b"new", 0).unwrap();
    drop(file);
    sh(c.m(""), "truncate -s 0 truncate; : > redirect");
    let moved = c.server_io() - before;
    assert!(moved < 1 << 20, "{moved} bytes went through the server");
    for round in 0..2 {
        assert_eq!(text(c.m("open")), "new");
        for name in ["open", "truncate", "redirect"] {
            let meta = fs::metadata(c.m(name)).unwrap();
            assert_eq!((meta.mode() & 0o7777, meta.uid(), meta.gid()), (0o640, 3, 4), "{name}");
            assert_eq!(meta.len(), if name == "open" { 3 } else { 0 }, "{name} {round}");
            assert_eq!(fs::metadata(c.l(0, name)).unwrap().len(), 100 << 20);
        }
        c.remount();
    }
}

// A stat elsewhere waits until the copy-up of a large file is done.
#[test]
fn a_stat_elsewhere_does_not_wait_for_a_copy_up() {
    needs_root!();
    let mut c = Case::new(1);
    // On another filesystem, or the copy could share the blocks and take no time.
    let other = OtherFs::tmpfs(&c, "other");
    c.sandbox.push(other.path.clone());
    put(c.l(0, "large"), vec![b'x'; 400 << 20]);
    for n in 0..2000 {
        put(c.l(1, &format!("d/f{n}")), "x");
    }
    c.mount_unsealed();
    let large = c.m("large");
    std::thread::scope(|scope| {
        let copy_up = scope.spawn(|| {
            fs::set_permissions(&large, Permissions::from_mode(0o600)).unwrap();
        });
        let mut done_before_it = 0;
        for n in 0..2000 {
            let path = c.m(&format!("d/f{n}"));
            fs::metadata(&path).unwrap();
            if n % 100 == 0 {
                // Other copy-ups go on too.
                fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
            }
            if !copy_up.is_finished() {
                done_before_it += 1;
            }
        }
        copy_up.join().unwrap();
        assert!(done_before_it > 20, "only {done_before_it} stats answered during the copy-up");
    });
    c.unmount();
}

// Room for `.wh.` is taken from the names: no name may be longer than 251 bytes.
#[test]
fn names_of_255_bytes_work_everywhere() {
    needs_root!();
    let mut c = Case::new(2);
    let name = |letter: char| letter.to_string().repeat(255);
    put(c.l(1, &name('f')), "file");
    put(c.l(1, &format!("{}/inner", name('d'))), "inner");
    put(c.l(1, &name('r')), "rename");
    put(c.l(1, &name('w')), "hidden");
    whiteout(c.l(0, &name('w')));
    c.mount();
    assert_eq!(rustix::fs::statfs(c.m("")).unwrap().f_namelen, 255);
    assert_eq!(text(c.m(&name('f'))), "file");
    gone(c.m(&name('w')));
    append(c.m(&name('f')), "+");
    put(c.m(&name('n')), "new");
    fs::create_dir(c.m(&name('m'))).unwrap();
    symlink(name('t'), c.m(&name('s'))).unwrap();
    fs::hard_link(c.m(&name('n')), c.m(&name('l'))).unwrap();
    put(c.m(&format!("{}/{}", name('d'), name('x'))), "x");
    fs::rename(c.m(&name('r')), c.m(&name('R'))).unwrap();
    fs::remove_dir_all(c.m(&name('d'))).unwrap();
    fs::create_dir(c.m(&name('d'))).unwrap();
    let too_long = fs::create_dir(c.m(&"y".repeat(256))).unwrap_err();
    assert_eq!(too_long.raw_os_error(), Some(Errno::NAMETOOLONG.raw_os_error()));
    for _ in 0..2 {
        let want: Vec<String> = "Rdflmns".chars().map(name).collect();
        assert_eq!(names(c.m("")), want);
        assert_eq!(text(c.m(&name('f'))), "file+");
        assert_eq!(text(c.m(&name('R'))), "rename");
        assert_eq!(fs::read_link(c.m(&name('s'))).unwrap(), Path::new(&name('t')));
        assert_eq!(names(c.m(&name('d'))), [""; 0]);
        gone(c.m(&name('r')));
        c.remount();
    }
    fs::remove_file(c.m(&name('f'))).unwrap();
    gone(c.m(&name('f')));
    c.remount();
    gone(c.m(&name('f')));
}

// Paths are put together as strings: ENAMETOOLONG below 4096 bytes.
#[test]
fn paths_deeper_than_4096_bytes_work() {
    needs_root!();
    let component = "n".repeat(120);
    let depth = 60;
    let mut c = Case::new(2);
    for layer in 0..2 {
        let mut dir = open_dir(&c.l(layer, ""));
        for _ in 0..depth {
            rustix::fs::mkdirat(&dir, &component, Mode::from(0o755u32)).unwrap();
            dir = open_below(&dir, &component);
        }
        write_at(&dir, &format!("lower{layer}"), b"content");
        write_at(&dir, "both", format!("layer {layer}").as_bytes());
    }
    c.mount();
    for round in 0..2 {
        let mut dir = open_dir(&c.m(""));
        for _ in 0..depth {
            dir = open_below(&dir, &component);
        }
        if round == 0 {
            assert_eq!(read_at(&dir, "lower1"), b"content");
            assert_eq!(read_at(&dir, "both"), b"layer 0");
            write_at(&dir, "lower1", b"changed");
            write_at(&dir, "new", b"new");
            rustix::fs::mkdirat(&dir, "dir", Mode::from(0o700u32)).unwrap();
            write_at(&open_below(&dir, "dir"), "inner", b"inner");
            rustix::fs::renameat(&dir, "both", &dir, "moved").unwrap();
            rustix::fs::unlinkat(&dir, "lower0", AtFlags::empty()).unwrap();
            rustix::fs::symlinkat("target", &dir, "sym").unwrap();
            rustix::fs::linkat(&dir, "new", &dir, "link", AtFlags::empty()).unwrap();
            rustix::fs::chmodat(&dir, "new", Mode::from(0o600u32), AtFlags::empty()).unwrap();
        }
        let mut listed: Vec<String> = rustix::fs::Dir::read_from(&dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_str().unwrap().to_owned())
            .filter(|name| !name.starts_with('.'))
            .collect();
        listed.sort();
        assert_eq!(listed, ["dir", "link", "lower1", "moved", "new", "sym"]);
        assert_eq!(read_at(&dir, "lower1"), b"changed");
        assert_eq!(read_at(&dir, "moved"), b"layer 0");
        assert_eq!(read_at(&dir, "link"), b"new");
        assert_eq!(read_at(&open_below(&dir, "dir"), "inner"), b"inner");
        let linked = rustix::fs::statat(&dir, "link", AtFlags::empty()).unwrap();
        assert_eq!((linked.st_mode & 0o7777, linked.st_nlink), (0o600, 2));
        drop(dir);
        c.remount();
    }
}

fn open_dir(path: &Path) -> OwnedFd {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap()
}

fn open_below(dir: &OwnedFd, name: &str) -> OwnedFd {
    rustix::fs::openat(dir, name, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap()
}

fn write_at(dir: &OwnedFd, name: &str, content: &[u8]) {
    let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::TRUNC;
    let fd = rustix::fs::openat(dir, name, flags, Mode::from(0o644u32)).unwrap();
    File::from(fd).write_all(content).unwrap();
}

fn read_at(dir: &OwnedFd, name: &str) -> Vec<u8> {
    let fd = rustix::fs::openat(dir, name, OFlags::RDONLY, Mode::empty()).unwrap();
    let mut content = Vec::new();
    File::from(fd).read_to_end(&mut content).unwrap();
    content
}

// A name that is no UTF-8 panics the server, or cannot be reached.
#[test]
fn names_of_every_byte_work() {
    needs_root!();
    let mut c = Case::new(1);
    let all: Vec<OsString> = (1..=255u8)
        .filter(|b| *b != b'/' && *b != b'.')
        .map(|b| OsString::from_vec(vec![b]))
        .chain([OsString::from_vec(b"\xff\xfe\n\\ \"':,=".to_vec()), OsString::from("\u{1f980}")])
        .collect();
    for name in &all {
        fs::write(c.l(0, "").join(name), name.as_bytes()).unwrap();
    }
    c.mount();
    let list = |dir: PathBuf| {
        let mut names: Vec<OsString> =
            fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let mut want = all.clone();
    want.sort();
    assert_eq!(list(c.m("")), want);
    fs::create_dir(c.m("upper")).unwrap();
    for (n, name) in all.iter().enumerate() {
        let path = c.m("").join(name);
        assert_eq!(fs::read(&path).unwrap(), name.as_bytes());
        fs::write(c.m("upper").join(name), "new").unwrap();
        symlink(name, c.m("upper").join([name.as_bytes(), b"-link"].concat().as_os())).unwrap();
        if n % 2 == 0 {
            fs::remove_file(&path).unwrap();
        } else {
            fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        }
    }
    c.remount();
    for (n, name) in all.iter().enumerate() {
        let lower = fs::read(c.m("").join(name));
        if n % 2 == 0 {
            assert!(lower.is_err(), "{name:?} is back");
        } else {
            assert_eq!(lower.unwrap(), name.as_bytes());
        }
        assert_eq!(fs::read(c.m("upper").join(name)).unwrap(), b"new");
        let link = c.m("upper").join([name.as_bytes(), b"-link"].concat().as_os());
        assert_eq!(fs::read_link(link).unwrap().as_os_str(), name);
    }
}

/// Bytes as a name.
trait AsOs {
    fn as_os(&self) -> &OsStr;
}

impl AsOs for Vec<u8> {
    fn as_os(&self) -> &OsStr {
        OsStr::from_bytes(self)
    }
}

// Hostile metadata: the largest ids, times beyond every range, many and large xattrs.
#[test]
fn extreme_metadata_passes_through_and_survives_copy_up() {
    needs_root!();
    let c = Case::new(1);
    // tmpfs takes any time there is.
    let wide = OtherFs::tmpfs(&c, "wide");
    let times: [i64; 6] = [-(1 << 40), -1, 1 << 33, 1 << 40, 1 << 55, -(1 << 55)];
    for (n, time) in times.into_iter().enumerate() {
        put(wide.path.join(format!("t{n}")), "x");
        set_mtime(&wide.path.join(format!("t{n}")), time, 999_999_999).unwrap();
    }
    put(wide.path.join("ids"), "x");
    chown(wide.path.join("ids"), Some(u32::MAX - 1), Some(u32::MAX - 1)).unwrap();
    put(wide.path.join("xattrs"), "x");
    for n in 0..20 {
        setx(
            wide.path.join("xattrs"),
            &format!("trusted.a-long-name-of-an-xattr-{n}"),
            "v".repeat(n),
        );
    }
    setx(wide.path.join("xattrs"), "trusted.large", "L".repeat(1500));
    setx(wide.path.join("xattrs"), "trusted.empty", "");
    let mut spec = c.spec();
    spec.lowers = vec![wide.path.clone()];
    let mut mount = spec.mount();
    for (n, time) in times.into_iter().enumerate() {
        let meta = fs::metadata(c.m(&format!("t{n}"))).unwrap();
        assert_eq!((meta.mtime(), meta.mtime_nsec()), (time, 999_999_999), "t{n}");
        // The upper filesystem may not hold the time; the server must live.
        fs::set_permissions(c.m(&format!("t{n}")), Permissions::from_mode(0o600)).unwrap();
        fs::metadata(c.m(&format!("t{n}"))).unwrap();
    }
    append(c.m("ids"), "+");
    append(c.m("xattrs"), "+");
    for _ in 0..2 {
        let meta = fs::metadata(c.m("ids")).unwrap();
        assert_eq!((meta.uid(), meta.gid()), (u32::MAX - 1, u32::MAX - 1));
        for n in 0..20 {
            let value = getx(c.m("xattrs"), &format!("trusted.a-long-name-of-an-xattr-{n}"));
            assert_eq!(value, Some("v".repeat(n).into_bytes()));
        }
        assert_eq!(getx(c.m("xattrs"), "trusted.large"), Some("L".repeat(1500).into_bytes()));
        assert_eq!(getx(c.m("xattrs"), "trusted.empty"), Some(Vec::new()));
        mount = mount.remount();
    }
    mount.unmount();
    c.sandbox.forget_seals();
}

// An I/O error of a lower layer is taken for absence: names below come into view.
#[test]
fn a_failing_layer_is_an_error_and_not_an_absent_name() {
    needs_root!();
    let mut c = Case::new(2);
    put(c.l(1, "d/below"), "must not be seen alone");
    put(c.l(1, "fresh/below"), "must not be seen alone");
    // The failing layer: a mount whose server is killed.
    let inner = c.sandbox.side(Kind::Lamina, "inner");
    let mut inner_mount = inner.mount();
    put(inner_mount.path().join("d/f"), "f");
    put(inner_mount.path().join("fresh/f"), "f");
    let mut spec = c.spec();
    spec.lowers = vec![inner.merged.clone(), c.l(0, ""), c.l(1, "")];
    // Unsealed: this lower cannot be read afterwards.
    let command = spec.command();
    c.mount_by_hand(command);
    assert_eq!(text(c.m("d/f")), "f");
    for pid in inner_mount.pids() {
        if env::processes_with_argument(&c.m("")).contains(&pid) {
            continue;
        }
        let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
        kill_process(pid, Signal::KILL).unwrap();
    }
    let dead = inner.merged.clone();
    wait_until("the layer to fail", BOUND, || {
        let answer = fs::symlink_metadata(dead.join("new"));
        answer.is_err_and(|e| e.kind() == std::io::ErrorKind::NotConnected)
    });
    // A directory that nobody has looked into yet: nothing about it can be known from before.
    for path in ["fresh/below", "fresh/never"] {
        let answer = fs::symlink_metadata(c.m(path));
        let error = answer.map(|meta| meta.len()).expect_err(path);
        assert_ne!(error.kind(), std::io::ErrorKind::NotFound, "{path} is said to be absent");
    }
    if let Ok(listing) = fs::read_dir(c.m("fresh")) {
        let listed: Vec<_> = listing.map(|entry| entry.map(|e| e.file_name())).collect();
        assert!(
            listed.iter().any(Result::is_err) || listed.iter().flatten().any(|name| name == "f"),
            "the failing layer was left out of {listed:?}"
        );
    }
    c.unmount();
    rustix::mount::unmount(&inner.merged, rustix::mount::UnmountFlags::DETACH).unwrap();
    inner_mount.gone();
    inner_mount.unmount();
}
