//! Every operation of a POSIX filesystem, once on a plain directory and then on a lower, an upper
//! and a merged directory of a mount: answers and resulting trees must be the same, live and
//! after a remount. Each check runs as root and in a user namespace.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{
    FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown, lchown, symlink,
};
use std::path::Path;

use fuse_tests::both;
use fuse_tests::env;
use fuse_tests::fixture::{Kind, Sandbox, pattern, set_mtime};
use fuse_tests::same::{PLACES, Share, Trace, fuse_zeroes_ranges, same, sandbox, seed};
use fuse_tests::tree::{self, Options, assert_same, snapshot_with};
use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, IFlags, Mode, OFlags, RenameFlags, SeekFrom,
    StatxFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, XattrFlags,
};
use rustix::io::Errno;

both!(stat_and_lookup);
fn stat_and_lookup() {
    same(|dir, t| {
        for name in ["f", "d", "e", "s", "p", "h", "h2", "big", "d/inner", "d/sub", "none", "f/x"] {
            t.stat(name, dir.join(name));
            t.put(name, fs::metadata(dir.join(name)).map(|meta| meta.is_file()));
        }
        t.stat("d/..", dir.join("d/../f"));
        t.stat("long", dir.join("x".repeat(256)));
        t.sh(dir, "cd d && cat ../f && test . -ef ../d && test .. -ef ../d/.. && echo same");
        symlink("loop", dir.join("loop")).unwrap();
        t.put("loop", fs::metadata(dir.join("loop")).map(|meta| meta.len()));
        t.put("readlink", fs::read_link(dir.join("s")));
        t.put("readlink of a file", fs::read_link(dir.join("f")));
        for mode in ["-r", "-w", "-x"] {
            t.sh(dir, &format!("for x in f d t none; do test {mode} $x; echo $x $?; done"));
        }
        t.sh(dir, "./t a b; sh t c; cp /bin/true bin && ./bin && echo fine");
    });
}

both!(mknod);
fn mknod() {
    same(|dir, t| {
        let kinds = [
            ("regular", FileType::RegularFile),
            ("fifo", FileType::Fifo),
            ("socket", FileType::Socket),
            ("char", FileType::CharacterDevice),
            ("block", FileType::BlockDevice),
        ];
        for (name, kind) in kinds {
            let dev = rustix::fs::makedev(300, 70_000);
            for target in [name.to_owned(), format!("d/{name}"), "f".into(), "none/x".into()] {
                let mode = Mode::from(0o751u32);
                t.put(&target, rustix::fs::mknodat(CWD, dir.join(&target), kind, mode, dev));
                t.stat(&target, dir.join(&target));
            }
        }
        t.sh(dir, "mkfifo q && { echo through > q & cat q; wait; }");
    });
}

both!(mkdir_and_rmdir);
fn mkdir_and_rmdir() {
    same(|dir, t| {
        for name in ["new", "d/new", "d", "f", "f/x", "none/x", "d/sub/deep", "s"] {
            t.put(name, fs::create_dir(dir.join(name)));
        }
        for name in ["new", "d", "e", "f", "none", "d/sub", "s"] {
            t.put(name, fs::remove_dir(dir.join(name)));
        }
        t.put("rmdir .", rustix::fs::unlinkat(CWD, dir.join("full/."), AtFlags::REMOVEDIR));
        t.put("again", fs::create_dir(dir.join("e")));
        t.put("tree", fs::remove_dir_all(dir.join("full")));
        t.put("again", fs::create_dir(dir.join("full")));
        t.put("listed", fs::read_dir(dir.join("full")).map(Iterator::count));
        t.sh(dir, "umask 077; mkdir -m 1777 sticky; mkdir private; mkdir -p a/b/c/d; stat -c %a a");
    });
}

both!(symlinks);
fn symlinks() {
    same(|dir, t| {
        let long = "l".repeat(4095);
        for (name, target) in
            [("a", "f"), ("b", "/abs/none"), ("c", "d/inner"), ("long", &long), ("d/up", "../f")]
        {
            t.put(name, symlink(target, dir.join(name)));
            t.put(name, fs::read_link(dir.join(name)).map(|p| p.as_os_str().len()));
            t.put(name, fs::read_to_string(dir.join(name)));
        }
        t.put("exists", symlink("x", dir.join("f")));
        t.put("exists", symlink("x", dir.join("s")));
        t.put("empty", symlink("", dir.join("empty")));
        t.put("write through", fs::write(dir.join("s"), "through the link"));
        t.put("unlink", fs::remove_file(dir.join("a")));
        t.put("chown", lchown(dir.join("s"), Some(7), Some(8)));
        t.put("times", set_mtime(&dir.join("s"), 99, 9));
        t.stat("s", dir.join("s"));
    });
}

both!(hard_links);
fn hard_links() {
    same(|dir, t| {
        for (old, new) in [
            ("f", "f2"),
            ("d/inner", "outer"),
            ("s", "s2"),
            ("p", "p2"),
            ("h", "d/h3"),
            ("h2", "h4"),
            ("d", "d2"),
            ("f", "g"),
            ("none", "x"),
            ("z", "none/x"),
        ] {
            t.put(
                new,
                rustix::fs::linkat(CWD, dir.join(old), CWD, dir.join(new), AtFlags::empty()),
            );
            t.stat(new, dir.join(new));
            t.stat(old, dir.join(old));
        }
        t.put("write", fs::write(dir.join("d/h3"), "by another name"));
        t.put("read", fs::read_to_string(dir.join("h")));
        t.put("chmod", fs::set_permissions(dir.join("h4"), Permissions::from_mode(0o600)));
        t.stat("h2", dir.join("h2"));
        for name in ["h", "f", "h4"] {
            t.put("unlink", fs::remove_file(dir.join(name)));
            t.stat("h2", dir.join("h2"));
            t.stat("f2", dir.join("f2"));
        }
        let open = File::open(dir.join("big")).unwrap();
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&open));
        let linked = rustix::fs::linkat(CWD, path, CWD, dir.join("big2"), AtFlags::SYMLINK_FOLLOW);
        t.put("link of an open file", linked);
        t.stat("big2", dir.join("big2"));
    });
}

both!(rename_of_files);
fn rename_of_files() {
    same(|dir, t| {
        for (old, new) in [
            ("f", "f-new"),
            ("g", "d/g"),
            ("d/g", "g-back"),
            ("big", "z"),
            ("s", "d/s"),
            ("p", "p-new"),
            ("h", "h2"),
            ("h", "d"),
            ("none", "x"),
            ("t", "none/x"),
            ("t", "t"),
            ("h2", "f"),
        ] {
            t.put(&format!("{old} {new}"), fs::rename(dir.join(old), dir.join(new)));
            t.stat(old, dir.join(old));
            t.stat(new, dir.join(new));
        }
        t.put("content", fs::read(dir.join("z")).map(|data| data == pattern(300_000, 1)));
    });
}

both!(rename_flags);
fn rename_flags() {
    same(|dir, t| {
        fs::create_dir(dir.join("own")).unwrap();
        fs::write(dir.join("own/x"), "x").unwrap();
        for (flags, old, new) in [
            (RenameFlags::NOREPLACE, "f", "g"),
            (RenameFlags::NOREPLACE, "f", "d"),
            (RenameFlags::NOREPLACE, "f", "fresh"),
            (RenameFlags::NOREPLACE, "none", "fresh2"),
            (RenameFlags::EXCHANGE, "fresh", "g"),
            (RenameFlags::EXCHANGE, "big", "s"),
            (RenameFlags::EXCHANGE, "p", "none"),
            (RenameFlags::EXCHANGE, "z", "d/inner"),
            (RenameFlags::EXCHANGE, "own", "t"),
            (RenameFlags::EXCHANGE, "h", "h2"),
            (RenameFlags::EXCHANGE | RenameFlags::NOREPLACE, "h", "h2"),
        ] {
            let what = format!("{flags:?} {old} {new}");
            t.put(&what, rustix::fs::renameat_with(CWD, dir.join(old), CWD, dir.join(new), flags));
            t.stat(old, dir.join(old));
            t.stat(new, dir.join(new));
        }
        // Onto a name that was deleted.
        fs::remove_file(dir.join("h2")).unwrap();
        let onto = rustix::fs::renameat_with(
            CWD,
            dir.join("h"),
            CWD,
            dir.join("h2"),
            RenameFlags::NOREPLACE,
        );
        t.put("onto a deleted name", onto);
    });
}

// Only directories made in the mount.
both!(rename_of_directories);
fn rename_of_directories() {
    same(|dir, t| {
        for name in ["one", "two", "three", "four"] {
            fs::create_dir(dir.join(name)).unwrap();
            fs::write(dir.join(name).join("x"), name).unwrap();
        }
        fs::remove_dir_all(dir.join("full")).unwrap();
        for (old, new) in [
            ("one", "moved"),
            ("two", "d/two"),
            ("three", "e"),
            ("four", "full"),
            ("moved", "d"),
            ("moved", "f"),
            ("f", "moved"),
            ("moved", "moved/inside"),
            ("moved", "d/two/deep"),
        ] {
            // POSIX has two errors for a directory that is not empty, and xfs gives the other one.
            let done = rustix::fs::rename(dir.join(old), dir.join(new));
            let done = done.map_err(|e| if e == Errno::EXIST { Errno::NOTEMPTY } else { e });
            t.put(&format!("{old} {new}"), done);
        }
        t.put("..", fs::read_dir(dir.join("d/two/deep/..")).map(Iterator::count));
    });
}

// A directory is moved whatever layers it has parts in.
both!(rename_of_a_lower_directory_moves_it);
fn rename_of_a_lower_directory_moves_it() {
    let sandbox = sandbox();
    let mut mount = sandbox.mount(Kind::Lamina);
    let options = Options { recent: Some(tree::now()), dir_times: false, ..Options::default() };
    let plain = sandbox.root().join("plain");
    for place in PLACES {
        let dir = mount.path().join(place);
        fs::rename(dir.join("d"), dir.join("moved")).unwrap_or_else(|e| panic!("{place}: {e}"));
    }
    fs::rename(plain.join("d"), plain.join("moved")).unwrap();
    for _ in 0..2 {
        for place in PLACES {
            let here = snapshot_with(mount.path().join(place), options);
            assert_same(place, &snapshot_with(&plain, options), &here);
        }
        mount = mount.remount();
    }
}

both!(unlink);
fn unlink() {
    same(|dir, t| {
        for name in ["f", "d", "s", "p", "h", "none", "f/x", "d/inner", "big"] {
            t.put(name, rustix::fs::unlinkat(CWD, dir.join(name), AtFlags::empty()));
            t.stat(name, dir.join(name));
        }
        t.stat("h2", dir.join("h2"));
        // The lower inode counts both names for good: only an index could tell after a remount.
        t.put("h2", fs::remove_file(dir.join("h2")));
        t.put("made again", fs::write(dir.join("f"), "again"));
        t.put("read", fs::read_to_string(dir.join("f")));
        t.put("dir in its place", fs::create_dir(dir.join("s")));
        t.put("file in place of a directory", {
            fs::remove_dir_all(dir.join("d")).and_then(|()| fs::write(dir.join("d"), "file"))
        });
    });
}

both!(open_flags);
fn open_flags() {
    same(|dir, t| {
        let flags = [
            ("rdonly", OFlags::RDONLY),
            ("wronly", OFlags::WRONLY),
            ("rdwr", OFlags::RDWR),
            ("creat", OFlags::RDWR | OFlags::CREATE),
            ("excl", OFlags::RDWR | OFlags::CREATE | OFlags::EXCL),
            ("nofollow", OFlags::RDONLY | OFlags::NOFOLLOW),
            ("directory", OFlags::RDONLY | OFlags::DIRECTORY),
            ("path", OFlags::PATH | OFlags::NOFOLLOW),
            ("append", OFlags::WRONLY | OFlags::APPEND),
            ("nonblock", OFlags::RDONLY | OFlags::NONBLOCK),
            ("trunc", OFlags::WRONLY | OFlags::TRUNC),
        ];
        for name in ["f", "d", "s", "h", "none/x", "f/x"] {
            for (what, flags) in flags {
                let opened = rustix::fs::open(dir.join(name), flags, Mode::from(0o604u32));
                t.put(&format!("{name} {what}"), opened.map(|_| ()));
            }
            t.stat(name, dir.join(name));
        }
        // Modes that forbid what the creating descriptor may still do.
        for mode in [0o000u32, 0o200, 0o444, 0o4755, 0o1644] {
            let name = dir.join(format!("mode{mode:o}"));
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL;
            let fd = rustix::fs::open(&name, flags, Mode::from(mode)).unwrap();
            let mut file = File::from(fd);
            t.put("write", file.write_all(b"data"));
            t.put("read", file.read_exact_at(&mut [0u8; 4], 0));
            t.stat("created", &name);
        }
    });
}

both!(read_and_write);
fn read_and_write() {
    same(|dir, t| {
        for name in ["f", "g", "big", "z", "h", "fresh"] {
            let path = dir.join(name);
            let mut file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)
                .unwrap();
            let mut buf = [0u8; 16];
            t.put("pread", file.read_at(&mut buf, 3).map(|n| buf[..n].to_vec()));
            t.put("pwrite", file.write_at(b"WRITTEN", 5));
            t.put("past the end", file.write_at(b"far", 500_000));
            t.put("hole", file.read_at(&mut buf, 400_000).map(|n| buf[..n].to_vec()));
            t.put("at the end", file.read_at(&mut buf, 600_000));
            t.put("sequential", file.write(b"start"));
            let mut append = OpenOptions::new().append(true).open(&path).unwrap();
            for _ in 0..3 {
                t.put("append", append.write(b"<appended>"));
            }
            t.put("two buffers", {
                let slices = [io::IoSlice::new(b"one "), io::IoSlice::new(b"two")];
                append.write_vectored(&slices)
            });
            t.put("len", file.metadata().map(|meta| meta.len()));
            let mut all = Vec::new();
            t.put("read all", file.read_to_end(&mut all));
            t.put(
                "no reading",
                append.read(&mut buf).map_err(|e| e.raw_os_error()).or_else(ok_errno),
            );
        }
        t.put("2 MiB", fs::write(dir.join("large"), pattern(2 << 20, 9)));
        t.put("2 MiB", fs::read(dir.join("large")).map(|data| data == pattern(2 << 20, 9)));
        t.put("a directory", File::open(dir.join("d")).and_then(|mut d| d.read(&mut [0u8; 4])));
    });
}

fn ok_errno(errno: Option<i32>) -> io::Result<usize> {
    Err(io::Error::from_raw_os_error(errno.unwrap_or(0)))
}

both!(truncate);
fn truncate() {
    same(|dir, t| {
        for (n, name) in ["f", "g", "big", "h", "z"].into_iter().enumerate() {
            let path = dir.join(name);
            t.put(
                "truncate",
                OpenOptions::new().write(true).open(&path).and_then(|f| f.set_len(4)),
            );
            t.put("up", OpenOptions::new().write(true).open(&path).and_then(|f| f.set_len(5000)));
            let start = fs::read(&path).map(|data| data[..8].to_vec());
            t.put("start", start);
            if n % 2 == 0 {
                t.put(
                    "to 0",
                    OpenOptions::new().write(true).truncate(true).open(&path).map(|_| ()),
                );
            }
            t.stat(name, &path);
        }
        t.sh(dir, "truncate -s 3 h2; cat h; truncate -s 1 d");
        t.put("read-only", File::open(dir.join("f")).and_then(|f| f.set_len(1)));
    });
}

both!(chmod_chown_and_times);
fn chmod_chown_and_times() {
    same(|dir, t| {
        for name in ["f", "d", "p", "h", "e", "t"] {
            let path = dir.join(name);
            for mode in [0o6755, 0o1777, 0o000, 0o640] {
                t.put("chmod", fs::set_permissions(&path, Permissions::from_mode(mode)));
                t.stat(name, &path);
            }
            t.put("chmod", fs::set_permissions(&path, Permissions::from_mode(0o6755)));
            // On a file this takes the setuid and setgid bits away.
            t.put("chown", chown(&path, Some(10), Some(20)));
            t.stat(name, &path);
            t.put("chgrp", chown(&path, None, Some(30)));
            t.stat(name, &path);
        }
        let omit = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
        let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
        let fixed = Timespec { tv_sec: -5, tv_nsec: 500 };
        for (name, last_access, last_modification) in [
            ("g", fixed, omit),
            ("f", omit, fixed),
            ("d", fixed, fixed),
            ("s", fixed, fixed),
            ("big", now, now),
            ("z", omit, omit),
            ("none", now, now),
        ] {
            let times = Timestamps { last_access, last_modification };
            let path = dir.join(name);
            t.put(name, rustix::fs::utimensat(CWD, &path, &times, AtFlags::SYMLINK_NOFOLLOW));
            t.put(
                name,
                fs::symlink_metadata(&path).map(|meta| (meta.mtime() < 0, meta.atime() < 0)),
            );
        }
        t.sh(dir, "chmod -R go-rwx full; chown -R 5:6 full; stat -c '%a %u %g' full full/inner");
        // Writing sets the time; reading does not set the modification time.
        set_mtime(&dir.join("g"), 1000, 1).unwrap();
        fs::read(dir.join("g")).unwrap();
        t.put("read", fs::metadata(dir.join("g")).map(|meta| meta.mtime()));
        OpenOptions::new().append(true).open(dir.join("g")).unwrap().write_all(b"x").unwrap();
        t.put("written", fs::metadata(dir.join("g")).map(|meta| meta.mtime() > 1000));
        set_mtime(&dir.join("e"), 1000, 1).unwrap();
        fs::write(dir.join("e/x"), "x").unwrap();
        t.put("entry made", fs::metadata(dir.join("e")).map(|meta| meta.mtime() > 1000));
        set_mtime(&dir.join("e"), 1000, 1).unwrap();
        fs::remove_file(dir.join("e/x")).unwrap();
        t.put("entry removed", fs::metadata(dir.join("e")).map(|meta| meta.mtime() > 1000));
    });
}

both!(xattrs);
fn xattrs() {
    same(|dir, t| {
        let set = |path: &Path, name: &str, value: &[u8], flags| {
            rustix::fs::lsetxattr(path, name, value, flags)
        };
        for name in ["f", "d", "h", "big"] {
            let path = dir.join(name);
            t.put("set", set(&path, "user.one", b"1", XattrFlags::empty()));
            t.put("empty", set(&path, "user.empty", b"", XattrFlags::CREATE));
            t.put("create", set(&path, "user.one", b"2", XattrFlags::CREATE));
            t.put("replace", set(&path, "user.one", b"three", XattrFlags::REPLACE));
            t.put("replace none", set(&path, "user.none", b"2", XattrFlags::REPLACE));
            t.put("large", set(&path, "user.large", &[b'x'; 2000], XattrFlags::empty()));
            t.put("bad", set(&path, "nonsense", b"2", XattrFlags::empty()));
            t.put("bytes", set(&path, "user.bytes", &[0, 255, 10], XattrFlags::empty()));
            for name in ["user.one", "user.empty", "user.none", "user.large", "user.bytes"] {
                let mut value = vec![0u8; 4096];
                let got = rustix::fs::lgetxattr(&path, name, &mut value);
                t.put(name, got.map(|n| value[..n].iter().map(|b| u64::from(*b)).sum::<u64>()));
                t.put("size", rustix::fs::lgetxattr(&path, name, &mut [] as &mut [u8]));
            }
            t.put("small buffer", rustix::fs::lgetxattr(&path, "user.large", &mut [0u8; 10]));
            t.put("remove", rustix::fs::lremovexattr(&path, "user.empty"));
            t.put("remove none", rustix::fs::lremovexattr(&path, "user.empty"));
            t.say("list", list_xattrs(&path));
            let size = rustix::fs::llistxattr(&path, &mut [] as &mut [u8]).unwrap_or(0);
            t.say("size", size > 0);
            // A buffer of exactly the size that was told, and one too small.
            t.put("exact", rustix::fs::llistxattr(&path, &mut vec![0u8; size]).map(|n| n == size));
            t.put("short", rustix::fs::llistxattr(&path, &mut [0u8; 5]));
        }
        for name in ["s", "p"] {
            t.put(name, set(&dir.join(name), "user.one", b"1", XattrFlags::empty()));
        }
        t.put("none", set(&dir.join("none"), "user.one", b"1", XattrFlags::empty()));
    });
}

fn list_xattrs(path: &Path) -> Vec<String> {
    let mut buffer = vec![0u8; 65536];
    let n = rustix::fs::llistxattr(path, &mut buffer).unwrap();
    let mut names: Vec<String> = buffer[..n]
        .split(|b| *b == 0)
        .filter(|name| !name.is_empty())
        .map(|name| String::from_utf8_lossy(name).into_owned())
        .collect();
    names.sort();
    names
}

both!(private_xattrs_are_neither_shown_nor_set);
fn private_xattrs_are_neither_shown_nor_set() {
    let mut sandbox = Sandbox::new();
    let prefix = env::overlay_prefix();
    sandbox.layer("file hidden/x\nfile d/below\n");
    sandbox
        .layer("dir hidden\nopaque hidden\nfile hidden/y\ndir marked\nopaque marked x\nfile d/f\n");
    for name in ["origin", "impure", "redirect-not"] {
        let path = sandbox.lowers()[0].join("d");
        let full = format!("{prefix}{name}");
        rustix::fs::lsetxattr(&path, full.as_str(), b"y", XattrFlags::empty()).unwrap();
    }
    let mut mount = sandbox.mount(Kind::Lamina);
    fs::write(mount.path().join("d/f"), "copied up").unwrap();
    fs::remove_dir_all(mount.path().join("hidden")).unwrap();
    fs::create_dir(mount.path().join("hidden")).unwrap();
    for _ in 0..2 {
        for name in ["", "hidden", "marked", "d", "d/f"] {
            let path = mount.path().join(name);
            let shown = list_xattrs(&path);
            assert!(!shown.iter().any(|x| x.contains("overlay")), "{name}: {shown:?}");
            let mut value = [0u8; 64];
            for mark in ["opaque", "origin", "impure"] {
                let got = rustix::fs::lgetxattr(&path, format!("{prefix}{mark}"), &mut value);
                assert!(got.is_err(), "{name} shows its {mark}");
            }
        }
        // A caller's own mark is refused, or kept apart from ours; it never takes effect.
        let dir = mount.path().join("d");
        let mark = format!("{prefix}opaque");
        if rustix::fs::lsetxattr(&dir, mark.as_str(), b"y", XattrFlags::empty()).is_ok() {
            let mut value = [0u8; 8];
            let n = rustix::fs::lgetxattr(&dir, mark.as_str(), &mut value).unwrap();
            assert_eq!(&value[..n], b"y");
            rustix::fs::lremovexattr(&dir, mark.as_str()).unwrap();
        }
        let mut value = [0u8; 8];
        let on_disk = rustix::fs::lgetxattr(sandbox.upper().join("d"), mark.as_str(), &mut value);
        assert!(on_disk.is_err() || &value[..1] != b"y", "a caller made d opaque");
        mount = mount.remount();
        assert_eq!(fs::read_to_string(mount.path().join("d/below")).unwrap(), "");
        assert_eq!(fs::read_dir(mount.path().join("hidden")).unwrap().count(), 0);
    }
}

both!(access_control_lists);
fn access_control_lists() {
    same(|dir, t| {
        t.sh(dir, "setfacl -m u:1234:rw,g:55:r f d/inner && setfacl -m u:1234:rwx d e");
        t.sh(dir, "getfacl -n f d d/inner e");
        t.sh(dir, "chmod 600 f; getfacl -n f; chmod 664 f; getfacl -n f; stat -c %a f");
        t.sh(dir, "setfacl -d -m u:1234:rwx,o::- d e; touch d/n e/n; mkdir d/m e/m");
        t.sh(dir, "cd d; getfacl -n n m ../e/n ../e/m");
        t.sh(dir, "setfacl -b d/inner; getfacl -n d/inner; setfacl -k d; getfacl -n d");
        t.sh(dir, "cp -p f copy; getfacl -n copy; setfacl -m u:1:r g h; getfacl -n h2");
    });
}

// What the kernel enforces for us must rest on right modes, owners and ACLs.
both!(permissions_are_enforced);
fn permissions_are_enforced() {
    same(|dir, t| {
        let as_user = "setpriv --reuid 1234 --regid 1234 --clear-groups sh -c";
        // The way to the plain directory and to the mount must be open to everybody.
        fs::set_permissions(dir, Permissions::from_mode(0o755)).unwrap();
        t.sh(dir, "chmod 600 f; chmod 700 d; chmod 777 e; chmod 666 g; chmod 1777 full; id -u");
        for script in [
            "cat f",
            "cat g",
            "ls d",
            "cat d/inner",
            "echo x > e/mine; cat e/mine; stat -c '%u %g %a' e/mine",
            "echo more >> g",
            "rm -f full/inner; echo $?",
            "mv full/inner full/other; echo $?",
            "touch full/own && rm full/own && echo sticky fine",
            "touch t; echo $?; touch -d @5 g; echo $?",
            "chmod 777 f; echo $?; chown 1234 f; echo $?; chmod 640 e/mine; echo $?",
            "mkdir new; echo $?; ln -s x new; echo $?; ln g e/link; echo $?",
            "test -w f; echo $?; test -r g; echo $?; test -x t; echo $?",
            "setfattr -n user.k -v v e/mine; getfattr --only-values -n user.k e/mine; echo $?",
        ] {
            let quoted = script.replace('\'', "'\\''");
            t.sh(dir, &format!("{as_user} '{quoted}' 2>&1"));
        }
        t.sh(dir, "setfacl -m u:1234:r f");
        t.sh(dir, &format!("{as_user} 'cat f'"));
    });
}

both!(setgid_directories);
fn setgid_directories() {
    same(|dir, t| {
        t.sh(
            dir,
            "chgrp 77 d e; chmod 2777 d e; umask 022; mkdir d/x e/x; touch d/y e/y; mkfifo d/z",
        );
        t.sh(dir, "stat -c '%n %a %u %g' d e d/x e/x d/y e/y d/z");
        t.sh(
            dir,
            "setpriv --reuid 1234 --regid 1234 --clear-groups sh -c \
             'umask 002; mkdir d/u; touch d/v; ln -s x d/w' 2>&1; stat -c '%n %a %u %g' d/u d/v d/w",
        );
        // A setgid bit on a file made by one who is not in the group is dropped.
        t.sh(
            dir,
            "setpriv --reuid 1234 --regid 1234 --clear-groups /usr/bin/python3 -c \
             'import os; os.umask(0); os.close(os.open(\"d/sg\", os.O_CREAT|os.O_RDWR, 0o2775))'; \
             stat -c '%a %u %g' d/sg",
        );
    });
}

// What is set for objects to come says nothing of the directory's own mode.
both!(a_default_acl_keeps_setgid);
fn a_default_acl_keeps_setgid() {
    same(|dir, t| {
        t.sh(dir, "chown 1234:77 d e; chmod 2775 d e");
        for which in ["-d", ""] {
            t.sh(
                dir,
                &format!(
                    "setpriv --reuid 1234 --regid 1234 --clear-groups \
                     setfacl {which} -m u:55:rx d e 2>&1; stat -c '%n %a %u %g' d e"
                ),
            );
        }
    });
}

both!(umask_of_the_caller);
fn umask_of_the_caller() {
    same(|dir, t| {
        for umask in ["000", "022", "077", "137"] {
            t.sh(
                dir,
                &format!(
                    "umask {umask}; for at in . d e; do : > $at/f{umask}; mkdir $at/d{umask}; \
                     mkfifo $at/p{umask}; stat -c '%n %a' $at/?{umask}; done"
                ),
            );
        }
    });
}

both!(sync_calls);
fn sync_calls() {
    same(|dir, t| {
        for name in ["f", "h", "fresh"] {
            let mut file =
                OpenOptions::new().append(true).create(true).open(dir.join(name)).unwrap();
            t.put("write", file.write_all(b"+"));
            t.put("fsync", file.sync_all());
            t.put("fdatasync", file.sync_data());
        }
        t.put("fsync of a reader", File::open(dir.join("big")).and_then(|f| f.sync_all()));
        for name in ["d", "e", "."] {
            let open = File::open(dir.join(name)).unwrap();
            t.put("fsync of a directory", open.sync_all());
            t.put("fdatasync of a directory", open.sync_data());
            t.put("syncfs", rustix::fs::syncfs(&open));
        }
    });
}

both!(fallocate);
fn fallocate() {
    same(|dir, t| {
        let all = FallocateFlags::empty();
        let keep = FallocateFlags::KEEP_SIZE;
        for name in ["f", "big", "z", "h"] {
            let file = OpenOptions::new().read(true).write(true).open(dir.join(name)).unwrap();
            t.put("allocate", rustix::fs::fallocate(&file, all, 0, 10_000));
            t.stat(name, dir.join(name));
            t.put("keep size", rustix::fs::fallocate(&file, keep, 0, 1_000_000));
            t.stat(name, dir.join(name));
            let punch = FallocateFlags::PUNCH_HOLE | keep;
            t.put("punch", rustix::fs::fallocate(&file, punch, 4096, 4096));
            let zero = FallocateFlags::ZERO_RANGE;
            if fuse_zeroes_ranges() {
                t.put("zero", rustix::fs::fallocate(&file, zero, 2, 3));
            }
            t.put("nothing", rustix::fs::fallocate(&file, all, 0, 0));
            t.stat(name, dir.join(name));
        }
        let reader = File::open(dir.join("g")).unwrap();
        t.put("a reader", rustix::fs::fallocate(&reader, all, 0, 100));
    });
}

both!(seek_data_and_hole);
fn seek_data_and_hole() {
    same(|dir, t| {
        let make = |name: &str| {
            let file = File::create(dir.join(name)).unwrap();
            file.set_len(1 << 20).unwrap();
            file.write_all_at(&[1u8; 8192], 256 << 10).unwrap();
            file.sync_all().unwrap();
        };
        make("sparse");
        for name in ["sparse", "big", "f", "z"] {
            let file = File::open(dir.join(name)).unwrap();
            for at in [0u64, 1, 5, 100_000, 262_144, 270_336, 1_000_000, 1 << 20, 1 << 21] {
                t.put(&format!("{name} data {at}"), rustix::fs::seek(&file, SeekFrom::Data(at)));
                t.put(&format!("{name} hole {at}"), rustix::fs::seek(&file, SeekFrom::Hole(at)));
            }
            t.put("end", rustix::fs::seek(&file, SeekFrom::End(-1)));
            t.put("before", rustix::fs::seek(&file, SeekFrom::Current(-(1 << 30))));
        }
    });
}

both!(copy_file_range);
fn copy_file_range() {
    same(|dir, t| {
        let rw = |name: &str| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(dir.join(name))
                .unwrap()
        };
        for (from, to) in
            [("big", "z"), ("big", "fresh"), ("f", "g"), ("h", "h2"), ("d/inner", "f")]
        {
            let (from_file, to_file) = (rw(from), rw(to));
            let (mut off_in, mut off_out) = (2, 1);
            let mut total = 0;
            // How much one call copies is its own choice.
            loop {
                let copied = rustix::fs::copy_file_range(
                    &from_file,
                    Some(&mut off_in),
                    &to_file,
                    Some(&mut off_out),
                    if from == "h" { 1 } else { 200_000 - total },
                );
                match copied {
                    Ok(0) => break t.say("copied", total),
                    Ok(n) => total += n,
                    Err(e) => break t.put("copied", Err::<(), _>(e)),
                }
                if total >= 200_000 || from == "h" {
                    break t.say("copied", total);
                }
            }
            t.stat(to, dir.join(to));
        }
        let file = rw("big");
        t.put("overlap", {
            rustix::fs::copy_file_range(&file, Some(&mut 0), &file, Some(&mut 10), 100)
        });
        t.sh(dir, "cp --reflink=auto big copy && cmp big copy && echo same");
    });
}

both!(inode_flags);
fn inode_flags() {
    same(|dir, t| {
        // The bits that describe how ext4 stores a file differ from object to object.
        let kept = IFlags::NODUMP | IFlags::NOATIME | IFlags::APPEND | IFlags::IMMUTABLE;
        for name in ["f", "d", "big", "e"] {
            let file = File::open(dir.join(name)).unwrap();
            let flags = rustix::fs::ioctl_getflags(&file);
            t.put("get", flags.map(|flags| flags & kept));
            if let Ok(flags) = flags {
                t.put("set", rustix::fs::ioctl_setflags(&file, flags | IFlags::NODUMP));
            }
            drop(file);
            let file = File::open(dir.join(name)).unwrap();
            t.put("get", rustix::fs::ioctl_getflags(&file).map(|flags| flags & kept));
        }
        t.sh(dir, "lsattr -d d >/dev/null 2>&1; echo $?");
    });
}

both!(shared_mappings);
fn shared_mappings() {
    same(|dir, t| {
        for name in ["f", "big", "h", "fresh"] {
            t.python(
                dir,
                &format!(
                    "
import mmap, os
fd = os.open('{name}', os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, 20000)
m = mmap.mmap(fd, 20000)
m[3:9] = b'mapped'
m[12000:12003] = b'end'
print(os.pread(fd, 12, 0), os.pread(fd, 5, 11999))
os.pwrite(fd, b'written', 100)
print(m[98:109])
m.flush(); m.close(); os.close(fd)
fd = os.open('{name}', os.O_RDONLY)
m = mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ)
print(m[0:12], len(m))
m = mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
m[0:7] = b'private'
print(os.pread(fd, 7, 0))
"
                ),
            );
        }
    });
}

both!(direct_io);
fn direct_io() {
    same(|dir, t| {
        // The plain directory tells whether the filesystem beneath has O_DIRECT at all.
        t.sh(dir, "dd if=big bs=4096 iflag=direct 2>/dev/null | cksum");
        t.sh(
            dir,
            "dd if=/dev/zero of=big bs=4096 count=3 seek=2 oflag=direct conv=notrunc 2>/dev/null",
        );
        t.sh(
            dir,
            "dd if=/dev/zero of=fresh bs=4096 count=2 oflag=direct 2>/dev/null; cksum big fresh",
        );
    });
}

both!(sockets_and_locks);
fn sockets_and_locks() {
    same(|dir, t| {
        t.python(
            dir,
            "
import socket, os, fcntl
s = socket.socket(socket.AF_UNIX); s.bind('sock'); s.listen(1)
c = socket.socket(socket.AF_UNIX); c.connect('sock')
a, _ = s.accept(); c.send(b'hello'); print(a.recv(9))
try: socket.socket(socket.AF_UNIX).bind('f')
except OSError as e: print(e.errno)
for how in (fcntl.flock, fcntl.lockf):
    for name in ('f', 'big', 'new'):
        one = open(name, 'a'); how(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fork() == 0:
            try: how(open(name, 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB); os._exit(0)
            except OSError as e: os._exit(e.errno)
        print(name, os.waitstatus_to_exitcode(os.wait()[1]))
        how(one, fcntl.LOCK_UN)
        if os.fork() == 0:
            how(open(name, 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB); os._exit(0)
        print(name, os.waitstatus_to_exitcode(os.wait()[1]))
",
        );
    });
}

both!(statfs);
fn statfs() {
    let sandbox = sandbox();
    let mount = sandbox.mount(Kind::Lamina);
    let beneath = rustix::fs::statvfs(sandbox.upper()).unwrap();
    for place in ["", "lower/f", "upper/d", "merged/p"] {
        let here = rustix::fs::statvfs(mount.path().join(place)).unwrap();
        assert_eq!(
            (here.f_bsize, here.f_frsize, here.f_blocks, here.f_files, here.f_namemax),
            (beneath.f_bsize, beneath.f_frsize, beneath.f_blocks, beneath.f_files, 255),
            "{place}"
        );
        assert!(here.f_bavail > 0 && here.f_bavail <= here.f_blocks);
    }
    let magic = rustix::fs::statfs(mount.path()).unwrap().f_type;
    assert_eq!(magic, 0x6573_5546, "container engines look for the FUSE magic number");
    let device = |path: &Path| fs::metadata(path).unwrap().dev();
    assert_ne!(device(mount.path()), device(sandbox.root()));
    let one = device(mount.path());
    for place in ["lower/f", "upper/f", "merged/f", "lower/d", "merged/d/inner"] {
        assert_eq!(device(&mount.path().join(place)), one, "{place} is on another device");
    }
}

// telldir and seekdir: every cookie leads to what followed it, also after the directory changed.
both!(readdir_offsets);
fn readdir_offsets() {
    let mut sandbox = Sandbox::new();
    for layer in 0..3 {
        let names: String =
            (0..150).map(|n| format!("file d/l{layer}-{n:03}\nfile d/all-{n:03}\n")).collect();
        sandbox.layer(&names);
    }
    let mount = sandbox.mount(Kind::Lamina);
    let path = mount.path().join("d");
    for n in 0..150 {
        fs::write(path.join(format!("upper-{n:03}")), "").unwrap();
        if n % 3 == 0 {
            fs::remove_file(path.join(format!("l1-{n:03}"))).unwrap();
        }
    }
    let dir = rustix::fs::open(&path, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
    let all = read_from(&dir, 0);
    assert_eq!(all.len(), 2 + 150 + 150 * 3 + 150 - 50);
    let mut cookies: Vec<u64> = all.iter().map(|(_, cookie)| *cookie).collect();
    cookies.sort_unstable();
    cookies.dedup();
    assert_eq!(cookies.len(), all.len(), "cookies repeat");
    for n in (0..all.len()).step_by(37).chain([0, all.len() - 1]) {
        assert_eq!(read_from(&dir, all[n].1), all[n + 1..], "from the cookie of entry {n}");
    }
    // What was listed once and is still there stays where it was.
    let (first, rest) = all.split_at(all.len() / 2);
    for (name, _) in &first[..first.len() / 2] {
        if name.as_bytes().first() != Some(&b'.') {
            fs::remove_file(path.join(name)).unwrap();
        }
    }
    fs::write(path.join("brand-new"), "").unwrap();
    let later = read_from(&dir, first.last().unwrap().1);
    let later: Vec<_> = later.into_iter().filter(|(name, _)| name != "brand-new").collect();
    assert_eq!(later, rest, "entries moved when others went");
    let rewound = read_from(&dir, 0);
    assert!(rewound.iter().any(|(name, _)| name == "brand-new"), "rewinddir shows an old list");
    assert_eq!(
        rewound.len(),
        all.len() - first.len() / 2 + 2 + 1 - dots(&first[first.len() / 2..])
    );
    for (name, _) in &rewound {
        assert!(fs::symlink_metadata(path.join(name)).is_ok(), "{name:?} is listed but gone");
    }
}

/// How many of the entries are `.` or `..`.
fn dots(entries: &[(OsString, u64)]) -> usize {
    entries.iter().filter(|(name, _)| name == "." || name == "..").count()
}

/// The entries of a directory from a cookie on, each with the cookie behind it.
fn read_from(dir: &OwnedFd, cookie: u64) -> Vec<(OsString, u64)> {
    rustix::fs::seek(dir, SeekFrom::Start(cookie)).unwrap();
    let mut buffer = Vec::with_capacity(1000);
    let mut listing = rustix::fs::RawDir::new(dir, buffer.spare_capacity_mut());
    let mut out = Vec::new();
    while let Some(entry) = listing.next() {
        let entry = entry.unwrap();
        let name = std::ffi::OsStr::from_bytes(entry.file_name().to_bytes()).to_owned();
        out.push((name, entry.next_entry_cookie()));
    }
    out
}

// The inode number of an object stays over copy-up and cache drop; over a remount too, but for a
// file that was copied up, which then shows the number of its upper inode.
both!(inode_numbers_are_stable);
fn inode_numbers_are_stable() {
    let sandbox = sandbox();
    let mut mount = sandbox.mount(Kind::Lamina);
    let names = ["f", "d", "h", "s", "p", "e", "d/inner", "big"];
    let numbers = |root: &Path| -> Vec<(String, u64)> {
        PLACES
            .iter()
            .flat_map(|place| names.iter().map(move |name| format!("{place}/{name}")))
            .map(|path| (path.clone(), fs::symlink_metadata(root.join(path)).unwrap().ino()))
            .collect()
    };
    let before = numbers(mount.path());
    let root = fs::metadata(mount.path()).unwrap().ino();
    let held = File::open(mount.path().join("lower/f")).unwrap();
    for place in PLACES {
        for name in names {
            let path = mount.path().join(place).join(name);
            lchown(&path, Some(1), Some(1)).unwrap();
        }
    }
    assert_eq!(numbers(mount.path()), before, "copy-up changed a number");
    assert_eq!(held.metadata().unwrap().ino(), before[0].1);
    drop(held);
    mount = mount.remount();
    let after = numbers(mount.path());
    // Without an index a copy of one of several lower names is a file of its own from then on, and a
    // symlink or pipe takes no xattr of the user namespace.
    let bare = if env::is_machine_root() { &["/h"][..] } else { &["/h", "/s", "/p"] };
    let is_kept = |(path, _): &&(String, u64)| {
        path.starts_with("upper/") || !bare.iter().any(|name| path.ends_with(name))
    };
    let kept =
        |numbers: &[(String, u64)]| -> Vec<_> { numbers.iter().filter(is_kept).cloned().collect() };
    assert_eq!(kept(&after), kept(&before), "a remount changed a number");
    assert_eq!(fs::metadata(mount.path()).unwrap().ino(), root);
    // All different, and equal to what statx and a listing say.
    let mut seen = std::collections::HashSet::new();
    for (path, number) in &after {
        assert!(seen.insert(*number), "{path} shares number {number}");
        let full = mount.path().join(path);
        let statx =
            rustix::fs::statx(CWD, &full, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::INO).unwrap();
        assert_eq!(statx.stx_ino, *number, "{path}");
    }
}

// Objects go from one kind of place to another.
both!(moves_between_lower_upper_and_merged);
fn moves_between_lower_upper_and_merged() {
    let sandbox = sandbox();
    let mut mount = sandbox.mount(Kind::Lamina);
    let merged = mount.path().to_path_buf();
    for from in PLACES {
        for to in PLACES {
            let at = |place: &str, name: &str| merged.join(place).join(name);
            fs::hard_link(at(from, "f"), at(to, &format!("link-of-{from}-f"))).unwrap();
            fs::copy(at(from, "big"), at(to, &format!("copy-of-{from}-big"))).unwrap();
            if from != to {
                let link = at(to, &format!("link-of-{from}-f"));
                fs::rename(link, at(from, &format!("moved-from-{to}"))).unwrap();
            }
        }
    }
    for _ in 0..2 {
        for from in PLACES {
            let number = |path: String| fs::metadata(mount.path().join(path)).unwrap().ino();
            for to in PLACES {
                let copy = mount.path().join(format!("{to}/copy-of-{from}-big"));
                assert!(fs::read(copy).unwrap() == pattern(300_000, 1), "{from} {to}");
                let link = if from == to {
                    format!("{to}/link-of-{from}-f")
                } else {
                    format!("{from}/moved-from-{to}")
                };
                assert_eq!(number(link), number(format!("{from}/f")), "{from} {to}");
            }
        }
        mount = mount.remount();
    }
}

// A mount without an upper layer: everything can be read and nothing be changed.
both!(read_only_mounts);
fn read_only_mounts() {
    let mut sandbox = Sandbox::new();
    let lower = sandbox.layer("");
    seed(&lower.join("d1"), Share::All);
    seed(&sandbox.root().join("plain"), Share::All);
    let mount = sandbox.spec(Kind::Lamina).read_only().mount();
    let dir = mount.path().join("d1");
    let options = Options::default();
    let plain = snapshot_with(sandbox.root().join("plain"), options);
    assert_same("read-only", &plain, &snapshot_with(&dir, options));
    let mut t = Trace::default();
    let write = |name: &str| OpenOptions::new().write(true).open(dir.join(name)).map(|_| ());
    t.put("write", write("f"));
    t.put("create", fs::write(dir.join("new"), ""));
    t.put(
        "truncate",
        OpenOptions::new().write(true).truncate(true).open(dir.join("f")).map(|_| ()),
    );
    t.put("mkdir", fs::create_dir(dir.join("new")));
    t.put("mknod", rustix::fs::mknodat(CWD, dir.join("new"), FileType::Fifo, Mode::RUSR, 0));
    t.put("symlink", symlink("x", dir.join("new")));
    t.put("link", fs::hard_link(dir.join("f"), dir.join("new")));
    t.put("rename", fs::rename(dir.join("f"), dir.join("new")));
    t.put("unlink", fs::remove_file(dir.join("f")));
    t.put("rmdir", fs::remove_dir(dir.join("e")));
    t.put("chmod", fs::set_permissions(dir.join("f"), Permissions::from_mode(0o600)));
    t.put("chown", lchown(dir.join("f"), Some(1), Some(1)));
    t.put("utimes", set_mtime(&dir.join("f"), 1, 1));
    t.put("setxattr", rustix::fs::lsetxattr(dir.join("f"), "user.k", b"v", XattrFlags::empty()));
    t.put("removexattr", rustix::fs::lremovexattr(dir.join("f"), "user.k"));
    for line in t.0.lines() {
        assert!(line.contains("Read-only file system"), "{line}");
    }
    assert_eq!(t.0.lines().count(), 15);
    File::open(dir.join("f")).unwrap().sync_all().unwrap();
    File::open(&dir).unwrap().sync_all().unwrap();
    assert_same("read-only", &plain, &snapshot_with(&dir, options));
}

// A character device 0:0 in a layer is a whiteout: one that is made through the mount must not delete a name.
both!(a_whiteout_of_a_caller_deletes_no_name);
fn a_whiteout_of_a_caller_deletes_no_name() {
    let mut sandbox = Sandbox::new();
    sandbox.layer("file f 644 content\n");
    let mut mount = sandbox.mount(Kind::Lamina);
    let kind = FileType::CharacterDevice;
    let make = |name| rustix::fs::mknodat(CWD, mount.path().join(name), kind, Mode::RUSR, 0);
    assert_eq!(make("f"), Err(Errno::EXIST));
    make("new").unwrap();
    let (f, g) = (mount.path().join("f"), mount.path().join("g"));
    rustix::fs::renameat_with(CWD, &f, CWD, &g, RenameFlags::WHITEOUT).unwrap();
    for _ in 0..2 {
        assert_eq!(fs::read_to_string(&g).unwrap(), "content");
        for name in ["f", "new"] {
            assert!(env::is_whiteout(&mount.path().join(name)), "{name}");
        }
        assert_eq!(fs::read_dir(mount.path()).unwrap().count(), 3);
        mount = mount.remount();
    }
}

// The working directory of a process and its open files keep working while names move above them.
both!(open_directories_follow_renames_above_them);
fn open_directories_follow_renames_above_them() {
    same(|dir, t| {
        t.sh(
            dir,
            "mkdir -p a/b/c && cd a/b/c && echo x > f && mv ../../../a ../../../moved && cat f && \
             echo y > g && ls && cd .. && ls && cat c/g",
        );
        t.sh(dir, "exec 3< big; mv big d/; rm d/big; cksum <&3");
        let file = OpenOptions::new().create_new(true).write(true).mode(0o600).open(dir.join("q"));
        let file = file.unwrap();
        fs::rename(dir.join("q"), dir.join("d/q")).unwrap();
        t.put("write after rename", file.write_all_at(b"late", 0));
        t.put("read", fs::read_to_string(dir.join("d/q")));
        let mut text = String::new();
        t.put("read", File::open(dir.join("d/q")).and_then(|mut f| f.read_to_string(&mut text)));
    });
}
