//! Renaming directories that lower layers have a part in: the server brings the whole directory to the upper layer first, step by
//! step and without changing what is shown, and then moves it by one rename.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use fuse_tests::case::{BOUND, Case, forget_all, gone, names, put, sh, text, work_residue};
use fuse_tests::fixture::Kind;
use fuse_tests::ops::Rng;
use fuse_tests::tree::{Options, Snapshot, assert_same, snapshot_with};
use fuse_tests::{both, env, needs_root};
use rustix::fs::{CWD, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use rustix::process::{Signal, kill_process};

/// Everything a directory may hold, spread over three layers.
const LAYERS: [&str; 2] = [
    "dir d 1755
     owner d 1000 1000
     file d/low 640 size:5000
     owner d/low 1000 2000
     xattr d/low user.a lower
     link d/hard d/low
     link d/sub/far d/low
     file d/hole 600 hole:1000000
     symlink d/sub/sym ../low
     fifo d/pipe 600
     socket d/sock 755
     char d/null 1 3
     file d/merged/bottom 644 bottom
     file d/merged/gone 644 gone
     file d/over 644 over
     file d/closed/f 000 closed
     mode d/closed 000
     dir d/empty 700
     xattr d/merged user.dir bottom
     file new/hidden 644 hidden
     mtime d/low -7.5
     file d/merged/deep/er/x 4755 size:70000",
    "dir d 2775
     file d/merged/top 644 top
     whiteout d/merged/gone
     symlink d/over nowhere
     file d/merged/deep/y 444 y
     opaque d/merged/deep",
];

/// Fills a case with [`LAYERS`] and an upper layer's part.
fn everything() -> Case {
    let mut c = Case::new(0);
    for layer in LAYERS {
        // Device nodes and ids as far as the namespace allows.
        let lines = layer.lines().filter(|line| env::is_machine_root() || !line.contains("char"));
        c.sandbox.layer(&lines.collect::<Vec<_>>().join("\n"));
    }
    c.sandbox.fill_upper(
        "dir d 755
         file d/up 644 up
         file d/merged/up 600 up
         dir d/pure 711
         file d/pure/f 644 pure",
    );
    c
}

fn look(path: impl AsRef<Path>) -> Snapshot {
    snapshot_with(path, Options::default())
}

fn text_of(mut file: &File) -> String {
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    text
}

/// The inode numbers of a tree by path.
fn numbers(root: &Path) -> BTreeMap<String, u64> {
    let found = sh(root, "find . -printf '%P %i\\n'");
    let pairs = found.lines().filter_map(|line| line.rsplit_once(' '));
    pairs.map(|(path, ino)| (path.to_owned(), ino.parse().unwrap())).collect()
}

// Content, owners, modes, times, xattrs, holes and links are what they were; the old name is free.
both!(a_directory_of_many_layers_moves_whole);
fn a_directory_of_many_layers_moves_whole() {
    let mut c = everything();
    c.mount();
    let (before, inos) = (look(c.m("d")), numbers(&c.m("d")));
    assert!(before.names().len() > 20, "{:?}", before.names());
    fs::rename(c.m("d"), c.m("new/moved")).unwrap();
    gone(c.m("d"));
    assert_same("moved", &before, &look(c.m("new/moved")));
    assert_eq!(numbers(&c.m("new/moved")), inos);
    assert!(fs::metadata(c.m("new/moved/hole")).unwrap().blocks() < 100, "the hole was filled");
    if env::is_machine_root() {
        forget_all();
        assert_eq!(numbers(&c.m("new/moved")), inos);
    }
    // Again, now that it is of the upper alone, and over what lies beneath another name.
    fs::rename(c.m("new/moved"), c.m("d")).unwrap();
    assert_same("moved back", &before, &look(c.m("d")));
    gone(c.m("new/moved"));
    c.remount();
    assert_same("after a remount", &before, &look(c.m("d")));
    assert_eq!(names(c.m("new")), ["hidden"]);
    c.unmount();
    assert_eq!(work_residue(&c), [] as [PathBuf; 0]);
    if env::no_kernel_overlay().is_none() {
        let kernel = c.sandbox.spec(Kind::Kernel).mount();
        let options = Options { check_ino: false, ..Options::default() };
        let shown = snapshot_with(kernel.path().join("d"), options);
        assert_same("by kernel overlay", &before, &shown);
    }
}

// A directory that the upper has no part of comes with its children in one piece: what it would give
// to new files, they do not get; and it may forbid even its owner to write.
both!(a_directory_gives_its_copies_nothing);
fn a_directory_gives_its_copies_nothing() {
    let mut c = Case::new(1);
    sh(
        c.l(0, ""),
        "mkdir -p d/acl/sub d/group d/sticky d/only d/empty
         for n in 1 2 3; do for d in d d/acl d/acl/sub d/group d/sticky d/only; do echo $n >$d/f$n; done; done
         ln -s f1 d/group/link; ln -s f2 d/only/link; mkfifo d/only/pipe; ln d/only/f1 d/only/hard
         chmod 640 d/group/f1; chmod 4755 d/only/f2; setfattr -n user.a -v b d/only
         chgrp 1 d/group; chmod 2770 d/group; chmod 1777 d/sticky; chmod 555 d/only
         setfacl -m u:1:r d/acl; setfacl -d -m u:1:rwx,g::rwx d/acl; touch -d 2001-02-03 d d/*",
    );
    let files = sh(c.l(0, "d"), "find . -type f | wc -l").trim().parse::<usize>().unwrap();
    c.mount();
    let (before, inos) = (look(c.m("d")), numbers(&c.m("d")));
    let reader = File::open(c.m("d/only/f2")).unwrap();
    let writer = OpenOptions::new().append(true).open(c.m("d/acl/f2")).unwrap();
    fs::rename(c.m("d"), c.m("e")).unwrap();
    assert_same("moved", &before, &look(c.m("e")));
    assert_eq!(numbers(&c.m("e")), inos);
    (&writer).write_all(b"more").unwrap();
    assert_eq!((text(c.m("e/acl/f2")), text_of(&reader)), ("2\nmore".into(), "2\n".into()));
    drop((reader, writer));
    assert_eq!(numbers(&c.m("e")).len(), inos.len());
    assert!(files > 18 && names(c.m("e/empty")).is_empty());
    let now = look(c.m(""));
    c.remount();
    assert_same("after a remount", &now, &look(c.m("")));
    check_upper_is_plain(&c);
    c.unmount();
    assert_eq!(work_residue(&c), [] as [PathBuf; 0]);
}

// Whatever was known of the tree before goes on: descriptors, working directories, removed files.
both!(what_is_open_beneath_a_moved_directory_goes_on);
fn what_is_open_beneath_a_moved_directory_goes_on() {
    let mut c = everything();
    put(c.l(0, "d/merged/removed"), "removed");
    c.mount();
    let mut reader = File::open(c.m("d/merged/bottom")).unwrap();
    let writer = OpenOptions::new().write(true).open(c.m("d/merged/top")).unwrap();
    let mut removed = File::open(c.m("d/merged/removed")).unwrap();
    fs::remove_file(c.m("d/merged/removed")).unwrap();
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(c.m("d/merged"), flags, Mode::empty()).unwrap();
    let script = "read go; cat bottom; wc -c <../low; echo more >>bottom; /bin/pwd -P";
    let mut shell = Command::new("sh");
    shell.args(["-ec", script]).current_dir(c.m("d/merged"));
    let mut shell = shell.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();

    fs::rename(c.m("d"), c.m("moved")).unwrap();

    shell.stdin.take().unwrap().write_all(b"go\n").unwrap();
    let said = String::from_utf8(shell.wait_with_output().unwrap().stdout).unwrap();
    assert_eq!(said, format!("bottom5000\n{}\n", c.m("moved/merged").display()));
    let mut content = String::new();
    reader.read_to_string(&mut content).unwrap();
    assert_eq!(content, "bottommore\n");
    writer.write_all_at(b"TOP", 0).unwrap();
    assert_eq!(text(c.m("moved/merged/top")), "TOP");
    content.clear();
    removed.read_to_string(&mut content).unwrap();
    assert_eq!(content, "removed");
    gone(c.m("moved/merged/removed"));
    let create = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
    rustix::fs::openat(dir.as_fd(), "made", create, Mode::from_raw_mode(0o644)).unwrap();
    assert!(fs::exists(c.m("moved/merged/made")).unwrap());
    rustix::fs::renameat(dir.as_fd(), "bottom", CWD, c.m("out")).unwrap();
    assert_eq!(text(c.m("out")), "bottommore\n");
    gone(c.m("moved/merged/bottom"));
    drop((reader, writer, removed, dir));
    let now = look(c.m(""));
    c.remount();
    assert_same("after a remount", &now, &look(c.m("")));
}

// The limit is exact, and what is refused has copied nothing.
both!(past_its_limit_a_directory_stays);
fn past_its_limit_a_directory_stays() {
    let mut c = Case::new(1);
    for n in 0..9 {
        put(c.l(0, &format!("d/sub/f{n}")), [b'x'; 1000]);
    }
    // `sub` and nine files.
    for (options, moves) in [
        ("dir_rename_entries=10,dir_rename_size=9000", true),
        ("dir_rename_entries=9", false),
        ("dir_rename_size=8999", false),
        ("dir_rename_entries=0", false),
        ("dir_rename_size=0", false),
        ("dir_rename_entries=1k,dir_rename_size=9K", true),
    ] {
        c.mount_with(options);
        let result = fs::rename(c.m("d"), c.m("e"));
        if moves {
            result.unwrap();
            assert_eq!(names(c.m("e/sub")).len(), 9);
            fs::rename(c.m("e"), c.m("d")).unwrap();
            fs::remove_dir_all(c.m("d")).unwrap();
        } else {
            let errno = result.unwrap_err().raw_os_error();
            assert_eq!(errno, Some(Errno::XDEV.raw_os_error()), "{options}");
            assert_eq!(names(c.u("")), [""; 0], "{options}");
        }
        c.unmount();
        if moves {
            assert!(env::is_whiteout(&c.u("d")));
            fs::remove_file(c.u("d")).unwrap();
        }
    }
    // What the upper layer has already is no cost.
    c.mount();
    sh(c.m("d/sub"), "for n in 0 1 2 3 4 5 6 7; do echo new >f$n; done");
    c.unmount();
    c.mount_with("dir_rename_entries=2,dir_rename_size=1000");
    fs::rename(c.m("d"), c.m("e")).unwrap();
    assert_eq!((text(c.m("e/sub/f7")), text(c.m("e/sub/f8")).len()), ("new\n".into(), 1000));
}

// Every way to rename a directory takes lower parts: over an empty one, exchanged, not over another.
both!(every_kind_of_rename_takes_lower_parts);
fn every_kind_of_rename_takes_lower_parts() {
    let mut c = Case::new(2);
    for dir in ["a", "b", "c", "full"] {
        put(c.l(1, &format!("{dir}/low")), dir);
        put(c.l(0, &format!("{dir}/mid")), dir);
    }
    put(c.l(1, "file"), "file");
    // Shows nothing, though three layers have it.
    put(c.l(1, "empty/x"), "");
    fs::create_dir(c.l(0, "empty")).unwrap();
    c.mount();
    fs::remove_file(c.m("empty/x")).unwrap();
    let rename = |old: &str, new: &str, flags| {
        rustix::fs::renameat_with(CWD, c.m(old), CWD, c.m(new), flags)
    };
    let (swap, keep) = (RenameFlags::EXCHANGE, RenameFlags::NOREPLACE);
    assert_eq!(rename("a", "b", keep), Err(Errno::EXIST));
    assert_eq!(rename("a", "full", RenameFlags::empty()), Err(Errno::NOTEMPTY));
    assert_eq!(rename("a", "file", RenameFlags::empty()), Err(Errno::NOTDIR));
    assert_eq!(rename("a", "a/sub", RenameFlags::empty()), Err(Errno::INVAL));
    rename("a", "b", swap).unwrap();
    rename("c", "empty", RenameFlags::empty()).unwrap();
    rename("full", "file", swap).unwrap();
    let check = || {
        assert_eq!((text(c.m("a/low")), text(c.m("b/mid"))), ("b".into(), "a".into()));
        assert_eq!((text(c.m("empty/low")), text(c.m("file/mid"))), ("c".into(), "full".into()));
        assert_eq!(names(c.m("empty")), ["low", "mid"]);
        assert_eq!(text(c.m("full")), "file");
        gone(c.m("c"));
        // Nothing of what lies beneath comes through, not even where a name is free again.
        fs::remove_file(c.m("a/mid")).unwrap();
        assert_eq!(names(c.m("a")), ["low"]);
        fs::write(c.m("a/mid"), "b").unwrap();
    };
    check();
    let now = look(c.m(""));
    c.remount();
    assert_same("after a remount", &now, &look(c.m("")));
    check_upper_is_plain(&c);
}

/// No whiteout may lie in an opaque directory, as the format wants it.
fn check_upper_is_plain(c: &Case) {
    let options = Options { private_xattrs: true, check_ino: false, ..Options::default() };
    let upper = snapshot_with(c.u(""), options);
    let opaque = format!("xattr {}opaque", env::overlay_prefix());
    for (path, entry) in &upper.entries {
        let above = path.ancestors().skip(1).filter_map(|dir| upper.get(dir));
        let hidden = above.into_iter().any(|dir| dir.get(&opaque) == "y");
        assert!(entry.get("device") != "0:0" || !hidden, "{}: whiteout", path.display());
    }
}

// Writers, makers, removers and renamers beneath a directory that moves to and fro: nothing that was
// answered is lost, and nobody waits for ever. The directory has new lower parts each time.
both!(changes_beneath_a_moving_directory_are_not_lost);
fn changes_beneath_a_moving_directory_are_not_lost() {
    const FILES: usize = 40;
    const ROUNDS: usize = 12;
    let mut c = Case::new(2);
    for round in 0..ROUNDS {
        for n in 0..FILES {
            put(c.l(n % 2, &format!("d{round}/s{}/f{n}", n % 4)), "old");
            put(c.l(1, &format!("d{round}/s{}/gone{n}", n % 4)), "old");
            put(c.l(n % 2, &format!("d{round}/s4/f{n}")), "old");
            // Enough of them for several threads.
            put(c.l(n % 2, &format!("d{round}/s{}/w{n}/f", n % 4)), "old");
        }
    }
    c.mount();
    for round in 0..ROUNDS {
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let top = c.m(&format!("d{round}"));
        let dir = rustix::fs::open(&top, flags, Mode::empty()).unwrap();
        let dir = &dir;
        let started = AtomicBool::new(false);
        let open = |path: &str, flags| {
            let mode = Mode::from_raw_mode(0o644);
            rustix::fs::openat(dir, path, flags | OFlags::CLOEXEC, mode).map(File::from)
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for n in 0..FILES {
                    let file = open(&format!("s{}/f{n}", n % 4), OFlags::WRONLY).unwrap();
                    file.write_all_at(b"new", 0).unwrap();
                    started.store(true, Ordering::Release);
                }
            });
            scope.spawn(|| {
                for n in 0..FILES {
                    let path = format!("s{}/made{n}", n % 4);
                    open(&path, OFlags::WRONLY | OFlags::CREATE).unwrap();
                }
            });
            scope.spawn(|| {
                for n in 0..FILES {
                    let name = format!("s{}/gone{n}", n % 4);
                    if n % 3 == 0 {
                        let to = format!("s{}/moved{n}", (n + 1) % 4);
                        rustix::fs::renameat(dir, &name, dir, &to).unwrap();
                    } else {
                        rustix::fs::unlinkat(dir, &name, rustix::fs::AtFlags::empty()).unwrap();
                    }
                }
            });
            scope.spawn(|| {
                // A directory inside moves too, and has lower parts.
                rustix::fs::renameat(dir, "s4", dir, "s1/in").unwrap();
                rustix::fs::renameat(dir, "s1/in", dir, "s5").unwrap();
            });
            env::wait_until("the first change", BOUND, || started.load(Ordering::Acquire));
            fs::rename(&top, c.m(&format!("e{round}"))).unwrap();
        });
        let moved = c.m(&format!("e{round}"));
        gone(&top);
        assert_eq!(names(&moved), ["s0", "s1", "s2", "s3", "s5"]);
        assert_eq!(names(moved.join("s5")).len(), FILES);
        for n in 0..FILES {
            let s = format!("s{}", n % 4);
            assert_eq!(text(moved.join(&s).join(format!("f{n}"))), "new");
            assert_eq!(text(moved.join(&s).join(format!("made{n}"))), "");
            gone(moved.join(&s).join(format!("gone{n}")));
            if n % 3 == 0 {
                assert_eq!(text(moved.join(format!("s{}/moved{n}", (n + 1) % 4))), "old");
            }
            assert_eq!(text(moved.join(format!("s5/f{n}"))), "old");
            assert_eq!(text(moved.join(&s).join(format!("w{n}/f"))), "old");
        }
    }
    let now = look(c.m(""));
    c.remount();
    assert_same("after a remount", &now, &look(c.m("")));
    check_upper_is_plain(&c);
}

// What waits in work to be published is bounded, whatever it is: a filesystem may have no room for as many
// directories in one, and all of it is lost if the server is stopped.
#[test]
fn empty_directories_do_not_pile_up_in_work() {
    needs_root!();
    const DIRS: usize = 20_000;
    let mut c = Case::new(1);
    for n in 0..DIRS {
        fs::create_dir_all(c.l(0, &format!("d/{}/{n}", n % 10))).unwrap();
    }
    c.mount_with("dir_rename_entries=30k");
    let work = c.w("work");
    let waiting = || fs::read_dir(&work).map_or(0, Iterator::count);
    let (mut most, moved) = (0, AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let done = fs::rename(c.m("d"), c.m("e"));
            moved.store(true, Ordering::Release);
            done.unwrap();
        });
        while !moved.load(Ordering::Acquire) {
            most = most.max(waiting());
        }
    });
    assert_eq!(sh(c.m("e"), "find . -mindepth 2 | wc -l").trim(), DIRS.to_string());
    // Four threads, each with as many as it may have.
    assert!((1..=4 * 4096 + 100).contains(&most), "{most} directories in work");
}

// Killed at any moment of the rename, the server leaves the tree before or after it.
#[test]
fn a_server_killed_while_it_moves_a_directory_leaves_it_before_or_after() {
    needs_root!();
    let mut c = Case::new(1);
    for n in 0..400 {
        put(c.l(0, &format!("d/s{}/f{n}", n % 7)), format!("content {n}"));
        // Enough directories for several threads.
        put(c.l(0, &format!("d/s{}/t{}/g{n}", n % 7, n % 49)), "x".repeat(n * 17));
    }
    symlink("f1", c.l(0, "d/sym")).unwrap();
    fs::hard_link(c.l(0, "d/s1/f1"), c.l(0, "d/s2/hard")).unwrap();
    // Names of one lower file part if only some are copied up by the next mount.
    let seen = |path: &Path| {
        let mut tree = snapshot_with(path, Options { dir_times: false, ..Options::default() });
        for name in ["s1/f1", "s2/hard"] {
            let entry = tree.entries.get_mut(Path::new(name)).unwrap();
            entry.set("nlink", "");
            entry.set("same file as", "");
        }
        tree
    };
    let whole = seen(&c.l(0, "d"));
    let mut rng = Rng::new(7);
    let (mut before, mut after) = (0, 0);
    for round in 0..12 {
        c.mount();
        let server = c.server();
        let (old, new) = (c.m("d"), c.m("e"));
        let rename = std::thread::spawn(move || fs::rename(old, new));
        // When it has done so much of its work.
        let limit = rng.below(900) as u64;
        let both = format!("find {} . -type f 2>/dev/null | wc -l || :", c.w("").display());
        let done = || sh(c.u(""), &both).trim().parse::<u64>();
        // At once every third time: the rename may be quicker than who looks at it.
        if round % 3 != 0 {
            env::wait_until("the copies", BOUND, || {
                rename.is_finished() || done().is_ok_and(|done| done >= limit)
            });
        }
        kill_process(server, Signal::KILL).unwrap();
        let answer = rename.join().unwrap();
        c.mount.as_mut().unwrap().gone();
        rustix::mount::unmount(c.m(""), rustix::mount::UnmountFlags::DETACH).unwrap();
        c.unmount();
        c.mount();
        let name = if fs::exists(c.m("d")).unwrap() { "d" } else { "e" };
        if answer.is_ok() {
            assert_eq!(name, "e", "a rename that was answered is undone");
        }
        *(if name == "d" { &mut before } else { &mut after }) += 1;
        assert_eq!(names(c.m("")), [name], "round {round}");
        assert_same(&format!("round {round}"), &whole, &seen(&c.m(name)));
        c.unmount();
        fs::remove_dir_all(c.u("")).unwrap();
        fs::create_dir(c.u("")).unwrap();
    }
    assert!(before > 0, "never killed in time: {before} {after}");
}
