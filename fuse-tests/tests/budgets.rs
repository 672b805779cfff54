//! What an operation may cost: requests to the server, and system calls that it makes for them. Both are counted, so
//! that a test says the same on every machine; nothing here looks at a clock.
//!
//! In no-open mode, with the kernel's caches warm unless a test says otherwise.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use fuse_tests::case::{Case, forget_all, gone, names, put, sh, text};
use fuse_tests::trace::{Counts, count, no_counts, with_faults};
use fuse_tests::{env, needs_root, skip};
use rustix::fs::{Mode, OFlags, Timespec, Timestamps};

/// One test at a time: what one makes the kernel forget, another would count.
static ALONE: Mutex<()> = Mutex::new(());

macro_rules! needs_counts {
    () => {
        let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        needs_root!();
        if let Some(reason) = no_counts().or_else(other_mode) {
            skip!("{reason}");
        }
    };
}

/// Why a mount costs something else, if so.
fn other_mode() -> Option<String> {
    let options = env::extra_options();
    let is_other =
        options.contains("writeback") || options.replace("io=noopen", "").contains("io=");
    is_other.then(|| format!("budgets are those of io=noopen, not of {options}"))
}

/// Two lower layers with a merged directory, one that each layer has alone, and a mount that has told the kernel what
/// it need not ask.
fn mounted(prepare: impl Fn(&Case)) -> Case {
    mounted_with("io=noopen", prepare)
}

fn mounted_with(options: &str, prepare: impl Fn(&Case)) -> Case {
    let mut c = Case::new(2);
    for n in 0..100 {
        put(c.l(n % 2, &format!("merged/f{n}")), format!("content {n}"));
        put(c.l(1, &format!("plain/f{n}")), format!("content {n}"));
    }
    for layer in 0..2 {
        put(c.l(layer, "warm"), "x");
    }
    symlink("f1", c.l(1, "plain/link")).unwrap();
    prepare(&c);
    c.mount_with(options);
    names(c.m(""));
    text(c.m("warm"));
    put(c.m("warm-too"), "x");
    fs::remove_file(c.m("warm-too")).unwrap();
    c
}

/// One thread reads nothing ahead, which, overtaken, does some calls twice.
const NOT_AHEAD: &str = "io=noopen,threads=1";

fn counted(c: &Case, work: impl FnOnce()) -> Counts {
    count(c.server(), &c.sandbox.root().join("strace"), work)
}

/// The cheapest of a few runs: somebody else on the machine may make the kernel drop its caches.
fn cheapest(c: &Case, mut work: impl FnMut()) -> Counts {
    (0..4).map(|_| counted(c, &mut work)).min_by_key(Counts::requests).unwrap()
}

/// Makes the kernel know attributes; of a directory, so that no path walk asks for them. Does not ask for the time of
/// birth, as std's metadata does: that is a request of its own.
fn know(c: &Case, names: &[&str]) {
    for name in names {
        rustix::fs::stat(c.m(name)).unwrap();
    }
}

#[test]
fn what_is_cached_costs_nothing() {
    needs_counts!();
    let c = mounted(|_| ());
    let run = || {
        for dir in ["plain", "merged"] {
            assert!(names(c.m(dir)).len() >= 100);
            for n in 0..100 {
                let path = c.m(&format!("{dir}/f{n}"));
                assert_eq!(text(&path), format!("content {n}"));
                let open = OpenOptions::new().read(true).write(true).open(&path).unwrap();
                assert_eq!(open.metadata().unwrap().len(), fs::metadata(&path).unwrap().len());
            }
            gone(c.m(&format!("{dir}/absent")));
        }
        assert_eq!(fs::read_link(c.m("plain/link")).unwrap(), Path::new("f1"));
    };
    run();
    run();
    let counts = cheapest(&c, run);
    counts.assert_requests("warm", "");
    counts.assert_calls("warm", 0);
}

#[test]
fn lookups() {
    needs_counts!();
    let c = mounted(|_| ());
    know(&c, &["", "plain", "merged"]);
    // A directory that one layer has is not listed for it; its handle is opened and checked once.
    let counts = counted(&c, || know(&c, &["plain/f1"]));
    counts.assert_requests("first lookup", "LOOKUP");
    counts.assert_calls("first lookup", 3);
    let counts = counted(&c, || gone(c.m("plain/absent")));
    counts.assert_requests("first miss", "LOOKUP");
    counts.assert_calls("first miss", 1);
    // One that both have is listed once, for all later lookups.
    let counts = counted(&c, || know(&c, &["merged/f1"]));
    counts.assert_requests("listing lookup", "LOOKUP");
    let counts = counted(&c, || {
        for n in 2..50 {
            know(&c, &[&format!("merged/f{n}")]);
        }
    });
    assert_eq!(counts.requests(), 48, "{counts:?}");
    counts.assert_calls("lookup when listed", 48);
    let counts = counted(&c, || {
        for n in 0..50 {
            gone(c.m(&format!("merged/absent{n}")));
        }
    });
    assert_eq!(counts.requests(), 50, "{counts:?}");
    counts.assert_calls("miss when listed", 0);
}

/// Whoever asks for the time of birth pays one request for each file, once: the kernel asks for it apart.
#[test]
fn the_time_of_birth_is_asked_for_once() {
    needs_counts!();
    let c = mounted(|_| ());
    let born = |path: PathBuf| fs::metadata(path).unwrap().created();
    know(&c, &["", "plain", "plain/f1", "plain/f2"]);
    let mut shown = None;
    let counts = counted(&c, || shown = born(c.m("plain/f1")).ok());
    // A transport that does not serve it has said so, and is not asked again.
    counts.assert_requests("first time", if shown.is_some() { "STATX" } else { "" });
    if let Some(shown) = shown {
        assert_eq!(shown, born(c.l(1, "plain/f1")).unwrap());
        let counts = counted(&c, || drop(born(c.m("plain/f2"))));
        counts.assert_requests("another file", "STATX");
    }
    for name in ["plain/f1", "plain/f2"] {
        let counts = cheapest(&c, || drop(born(c.m(name))));
        counts.assert_requests("later", "");
    }
}

#[test]
fn a_cold_walk() {
    needs_counts!();
    const DIRS: usize = 20;
    const FILES: usize = 200;
    let c = mounted_with(NOT_AHEAD, |c| {
        for dir in 0..DIRS {
            for file in 0..FILES {
                put(c.l(dir % 2, &format!("walk/d{dir}/f{file}")), "x");
            }
        }
    });
    let entries = DIRS * (FILES + 1) + 1;
    let counts = cheapest(&c, || {
        forget_all();
        let listed = sh(c.m(""), "find walk -ls | wc -l");
        assert_eq!(listed.trim().parse::<usize>().unwrap(), entries);
    });
    assert!(counts.requests() <= entries / 30, "{entries} entries: {counts:?}");
    let stats = counts.calls.get("statx").copied().unwrap_or(0);
    // Each directory is also checked when it is opened.
    assert!(stats <= entries + 2 * DIRS + 10, "{entries} entries: {counts:?}");
    counts.assert_calls("a cold walk", entries + 12 * DIRS + 40);
}

/// Each layer that has part in a directory costs six calls, and one that closes: it is opened once, looked at, asked for
/// its xattrs; set to its start, and listed in two calls.
#[test]
fn a_directory_in_many_layers() {
    needs_counts!();
    const LAYERS: usize = 12;
    const DIRS: usize = 10;
    let mut c = Case::new(LAYERS);
    for layer in 0..LAYERS {
        for dir in 0..DIRS {
            put(c.l(layer, &format!("many/d{dir}/f{layer}")), "x");
        }
    }
    c.mount_with(NOT_AHEAD);
    names(c.m(""));
    let entries = 1 + DIRS + DIRS * LAYERS;
    let counts = cheapest(&c, || {
        forget_all();
        let listed = sh(c.m(""), "find many -printf '%s\n' | wc -l");
        assert_eq!(listed.trim().parse::<usize>().unwrap(), entries);
    });
    let parts = (DIRS + 1) * LAYERS;
    // The pool starts threads where the only one waits, as it does while it is traced.
    let own = ["openat2", "statx", "flistxattr", "lseek", "getdents64"];
    let calls: usize = own.iter().filter_map(|call| counts.calls.get(*call)).sum();
    assert!(calls <= entries + 6 * parts, "{entries} entries, {parts} parts: {counts:?}");
    let lists = counts.calls.get("flistxattr").copied().unwrap_or(0);
    assert!(lists <= parts + 2, "{lists} of {parts}: {counts:?}");
    for by_name in ["llistxattr", "listxattrat"] {
        assert_eq!(counts.calls.get(by_name), None, "{counts:?}");
    }
    let opened: usize =
        ["openat", "openat2"].iter().filter_map(|call| counts.calls.get(*call)).sum();
    assert!(opened <= parts + 2, "{opened} of {parts}: {counts:?}");
}

/// Lists a directory, and looks at nothing in it.
fn list(path: &Path) -> Vec<PathBuf> {
    fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect()
}

// Who lists a directory and then one in it finds the next ready.
#[test]
fn a_walk_is_read_ahead() {
    needs_counts!();
    let c = mounted(|c| {
        for layer in 0..2 {
            for dir in ["m", "z", "a", "k", "b"] {
                put(c.l(layer, &format!("walk/{dir}/f{layer}")), "x");
                put(c.l(layer, &format!("walk/{dir}/s/f{layer}")), "x");
            }
        }
    });
    for order in ["as listed", "reversed"] {
        forget_all();
        let mut dirs = list(&c.m("walk"));
        if order == "reversed" {
            dirs.reverse();
        }
        let step = |dir: &Path| {
            assert_eq!(list(dir).len(), 3);
            assert_eq!(list(&dir.join("s")).len(), 2);
            c.settle();
        };
        step(&dirs[0]);
        let counts = counted(&c, || assert_eq!(list(&dirs[1]).len(), 3));
        // Its own directory in two layers, read ahead again.
        let calls =
            ["openat2", "getdents64"].map(|call| counts.calls.get(call).copied().unwrap_or(0));
        assert!(calls[0] == 0 && calls[1] <= 4, "{order}: {counts:?}");
        counts.assert_calls(order, 12);
    }
}

// Not much more is looked up ahead than an answer has, when nothing else is used.
#[test]
fn reading_ahead_is_worth_it() {
    needs_counts!();
    const DIRS: usize = 8;
    const FILES: usize = 300;
    let c = mounted(|c| {
        for dir in 0..DIRS {
            for file in 0..FILES {
                put(c.l(0, &format!("walk/d{dir:02}/f{file}")), "x");
            }
        }
    });
    forget_all();
    let counts = counted(&c, || {
        for dir in list(&c.m("walk")) {
            assert_eq!(list(&dir).len(), FILES);
            c.settle();
        }
    });
    // The first answer of each has what a buffer of 32 KiB holds, some 200; the rest are names alone.
    let looked = counts.calls.get("statx").copied().unwrap_or(0);
    assert!(looked <= DIRS * 240, "{looked}: {counts:?}");
}

// Files come to the upper with the directory that they are in: no name of their own is published.
#[test]
fn moving_a_lower_directory() {
    needs_counts!();
    const DIRS: usize = 20;
    const FILES: usize = 20;
    let c = mounted(|c| {
        for dir in 0..DIRS {
            for file in 0..FILES {
                put(c.l(0, &format!("tree/d{dir}/f{file}")), "x");
            }
        }
    });
    let counts = counted(&c, || fs::rename(c.m("tree"), c.m("moved")).unwrap());
    let renames: usize =
        ["renameat", "renameat2", "linkat"].iter().filter_map(|call| counts.calls.get(*call)).sum();
    assert!(renames <= DIRS + 3, "{renames} renames: {counts:?}");
    // A file: three statx, two opens and closes, two listxattr, a handle, its origin, a try to clone,
    // its flags, read, write, owner, mode, times. A directory: some forty.
    counts.assert_calls("moving a lower directory", DIRS * FILES * 16 + (DIRS + 1) * 42);
}

#[test]
fn creation() {
    needs_counts!();
    let c = mounted(|_| ());
    fs::create_dir(c.m("new")).unwrap();
    put(c.m("new/first"), "x");
    know(&c, &["", "new"]);
    let create = |name: &str| {
        let mut file = OpenOptions::new().write(true).create_new(true).open(c.m(name)).unwrap();
        file.write_all(&[1; 4096]).unwrap();
        file
    };
    let counts = counted(&c, || drop(create("new/small")));
    counts.assert_requests("create", "LOOKUP MKNOD GETXATTR WRITE");
    // GETXATTR none: statx for LOOKUP, open, statx, pwrite.
    counts.assert_calls("create", 4);
    names(c.m("new"));
    let counts = counted(&c, || drop(create("new/listed")));
    counts.assert_requests("create when listed", "LOOKUP MKNOD GETXATTR WRITE");
    // LOOKUP none either.
    counts.assert_calls("create when listed", 3);
    know(&c, &["new"]);
    let counts = counted(&c, || {
        let file = create("new/dressed");
        file.set_permissions(fs::Permissions::from_mode(0o640)).unwrap();
        let time = Timespec { tv_sec: 1_000_000_000, tv_nsec: 0 };
        rustix::fs::futimens(&file, &Timestamps { last_access: time, last_modification: time })
            .unwrap();
    });
    counts.assert_requests("create, dress", "LOOKUP MKNOD GETXATTR WRITE SETATTR SETATTR");
    counts.assert_calls("create, dress", 7);
    // Over a whiteout.
    fs::remove_file(c.m("merged/f1")).unwrap();
    know(&c, &["merged"]);
    let counts = counted(&c, || drop(create("merged/f1")));
    counts.assert_requests("create over a whiteout", "LOOKUP MKNOD GETXATTR WRITE");
    counts.assert_calls("create over a whiteout", 9);
}

#[test]
fn writing_to_what_is_there() {
    needs_counts!();
    let c = mounted(|_| ());
    put(c.m("own"), "x");
    let path = c.m("own");
    know(&c, &["", "plain"]);
    let counts =
        counted(&c, || drop(OpenOptions::new().write(true).open(c.m("plain/f1")).unwrap()));
    counts.assert_requests("open to write, and close", "LOOKUP");
    gone(c.u("plain"));
    let write = OpenOptions::new().write(true).open(&path).unwrap();
    write.write_all_at(b"y", 0).unwrap();
    let counts = counted(&c, || write.write_all_at(b"z", 1).unwrap());
    counts.assert_requests("next write", "WRITE");
    counts.assert_calls("next write", 1);
    write.metadata().unwrap();
    let counts = counted(&c, || write.write_all_at(b"z", 2).unwrap());
    counts.assert_requests("write after a stat", "GETXATTR WRITE");
    counts.assert_calls("write after a stat", 1);
    let mut append = OpenOptions::new().append(true).open(&path).unwrap();
    append.write_all(b"a").unwrap();
    let counts = counted(&c, || append.write_all(b"b").unwrap());
    counts.assert_requests("append", "WRITE");
    counts.assert_calls("append", 1);
    let counts = counted(&c, || {
        let mut file = File::create(&path).unwrap();
        file.write_all(b"anew").unwrap();
    });
    counts.assert_requests("overwrite", "SETATTR GETXATTR WRITE");
    counts.assert_calls("overwrite", 3);
}

// As editors and dpkg do: a new file, made durable, takes the place of the old one.
#[test]
fn replacing_a_file() {
    needs_counts!();
    let c = mounted(|_| ());
    put(c.m("d/file"), "old");
    let dir = File::open(c.m("d")).unwrap();
    know(&c, &["", "d"]);
    let counts = counted(&c, || {
        let mut file = File::create(c.m("d/file.tmp")).unwrap();
        file.write_all(b"new").unwrap();
        file.set_permissions(fs::Permissions::from_mode(0o600)).unwrap();
        file.sync_all().unwrap();
        drop(file);
        fs::rename(c.m("d/file.tmp"), c.m("d/file")).unwrap();
        dir.sync_all().unwrap();
    });
    // The kernel looks the target of a rename up anew, and asks once for the directory that changed.
    let expected = "LOOKUP MKNOD GETXATTR WRITE SETATTR FSYNC GETATTR LOOKUP RENAME FSYNCDIR";
    counts.assert_requests("replace", expected);
    counts.assert_calls("replace", 19);
}

#[test]
fn unlinking_a_lower_file() {
    needs_counts!();
    let c = mounted(|c| put(c.l(1, "merged/large"), vec![1; 1 << 20]));
    assert_eq!(names(c.m("merged")).len(), 101);
    // The directory is copied up and the whiteout to be linked made by the first.
    fs::remove_file(c.m("merged/f1")).unwrap();
    know(&c, &["", "merged"]);
    let counts = counted(&c, || fs::remove_file(c.m("merged/large")).unwrap());
    counts.assert_requests("unlink", "UNLINK");
    counts.assert_calls("unlink", 3);
    for call in ["read", "pread64", "copy_file_range", "sendfile", "fsync"] {
        assert!(!counts.calls.contains_key(call), "{counts:?}");
    }
}

/// What is copied is asked where it comes from when it is first looked at; its xattrs, listed for that, say as well
/// whether it may be removed.
#[test]
fn unlinking_a_copied_file() {
    needs_counts!();
    let mut c = mounted(|_| ());
    fs::rename(c.m("plain"), c.m("moved")).unwrap();
    c.remount();
    names(c.m(""));
    let counts = counted(&c, || assert_eq!(names(c.m("moved")).len(), 101));
    for calls in [["listxattrat", "llistxattr"], ["getxattrat", "lgetxattr"]] {
        let asked: usize = calls.iter().filter_map(|call| counts.calls.get(*call)).sum();
        assert!(asked <= 101, "{calls:?}: {counts:?}");
    }
    know(&c, &["", "moved"]);
    let counts = counted(&c, || fs::remove_file(c.m("moved/f1")).unwrap());
    counts.assert_requests("unlink a copy", "UNLINK");
    // statx, a handle, unlinkat.
    counts.assert_calls("unlink a copy", 3);
}

#[test]
fn reading_an_evicted_file() {
    needs_counts!();
    let c = mounted(|_| ());
    names(c.m("plain"));
    let counts = counted(&c, || {
        let mut content = String::new();
        File::open(c.m("plain/f7")).unwrap().read_to_string(&mut content).unwrap();
    });
    counts.assert_requests("first read", "READ");
    counts.assert_calls("first read", 5);
}

/// Its pages go to the kernel by reference: nobody but the kernel copies them.
#[test]
fn reading_a_large_file() {
    needs_counts!();
    let c = mounted(|c| put(c.l(1, "plain/large"), vec![1; 128 << 10]));
    names(c.m("plain"));
    let mut file = File::open(c.m("plain/large")).unwrap();
    let mut content = vec![0; 128 << 10];
    file.read_exact(&mut content).unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    let counts = counted(&c, || file.read_exact_at(&mut content, 0).unwrap());
    counts.assert_requests("large read", "READ");
    // To the pipe and from it; one may have to be made for it.
    assert_eq!(counts.calls.get("splice"), Some(&2), "{counts:?}");
    assert!(!counts.calls.contains_key("pread64"), "{counts:?}");
}

/// Whether the file cannot be spliced, or the device takes nothing out of a pipe.
#[test]
fn what_splice_refuses_is_copied() {
    needs_counts!();
    let content: Vec<u8> = (0..128_u32 << 8).flat_map(u32::to_le_bytes).collect();
    for fault in ["splice:error=EINVAL", "splice:error=ENOMEM:when=2+2"] {
        let c = mounted(|c| put(c.l(1, "plain/large"), &content));
        let failed = with_faults(c.server(), &c.sandbox.root().join("strace"), fault, || {
            // Past the page cache, which would ask again where a READ failed.
            let flags = OFlags::RDONLY | OFlags::DIRECT;
            let file = rustix::fs::open(c.m("plain/large"), flags, Mode::empty()).unwrap();
            let mut read = vec![0; content.len()];
            File::from(file).read_exact(&mut read).unwrap();
            assert_eq!(read, content, "{fault}");
        });
        assert!(failed > 0, "{fault}");
    }
}

#[test]
fn unpacking_an_archive() {
    needs_counts!();
    const FILES: usize = 200;
    let c = mounted(|_| ());
    let source = c.sandbox.root().join("source");
    for n in 0..FILES {
        put(source.join(format!("d{}/f{n}", n % 10)), vec![7; n * 41 % 8_000]);
    }
    sh(c.sandbox.root(), "tar -C source --owner 1234 --group 1234 -cf archive.tar .");
    let archive = c.sandbox.root().join("archive.tar");
    let counts = counted(&c, || {
        sh(c.m(""), &format!("mkdir out; tar -C out -xf {}", archive.display()));
    });
    assert!(counts.requests() <= FILES * 10, "{FILES} files: {counts:?}");
    println!(
        "per file: {:.1} requests, {:.1} system calls",
        per(counts.requests(), FILES),
        per(counts.calls(), FILES)
    );
    counts.assert_calls("untar", FILES * 13);
    assert_eq!(fs::read(c.m("out/d3/f113")).unwrap().len(), 113 * 41);
}

fn per(count: usize, of: usize) -> f64 {
    count as f64 / of as f64
}
