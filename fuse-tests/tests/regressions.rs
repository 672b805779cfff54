//! One test for each fault that a review of the union found, so that none comes back.
//!
//! A test tells its failure in its first lines. Where kernel overlay does the same thing, it is the reference.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use fuse_tests::case::{
    BOUND, Case, append, disk_usage, forget_all, getx, gone, ino, mode, names, nlink, put, refused,
    said, same_as_the_kernel, setx, sh, text, whiteout,
};
use fuse_tests::env::{self, wait_until};
use fuse_tests::fixture::Kind;
use fuse_tests::tree;
use fuse_tests::{both, needs_kernel_overlay, needs_root};
use rustix::fs::{AtFlags, CWD, StatxFlags, Timespec, Timestamps};
use rustix::io::Errno;
use rustix::process::{Signal, kill_process};

/// An ordinary user.
const USER: u32 = 65534;

/// What a directory lists, none of it looked up.
#[track_caller]
fn listed(dir: impl AsRef<Path>) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// All paths below a directory but `.`.
fn paths(dir: &Path) -> Vec<String> {
    tree::snapshot(dir).names()
}

/// A file or directory that cannot be changed, moved or removed until this is dropped.
struct Immutable(PathBuf);

impl Immutable {
    fn new(path: PathBuf) -> Option<Immutable> {
        let made = Command::new("chattr").arg("+i").arg(&path).stderr(Stdio::null()).status();
        made.is_ok_and(|status| status.success()).then_some(Immutable(path))
    }
}

impl Drop for Immutable {
    fn drop(&mut self) {
        let _ = Command::new("chattr").arg("-i").arg(&self.0).status();
    }
}

/// A directory mounted on another place too, until dropped.
struct Bind(PathBuf);

impl Bind {
    #[track_caller]
    fn new(what: &Path, place: &Path) -> Bind {
        rustix::mount::mount_bind(what, place).unwrap();
        Bind(place.to_path_buf())
    }
}

impl Drop for Bind {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

// A default ACL of the workdir is inherited by all that is prepared there: each copy and each new
// object grants what neither its lower nor its directory does.
#[test]
fn acls_of_the_workdir_are_not_inherited_by_copies() {
    needs_root!();
    needs_kernel_overlay!();
    let c = Case::new(1);
    put(c.l(0, "f"), "secret");
    put(c.l(0, "d/inner"), "secret");
    put(c.l(0, "hidden"), "");
    for path in ["f", "d/inner"] {
        fs::set_permissions(c.l(0, path), Permissions::from_mode(0o660)).unwrap();
    }
    for path in ["d", ""] {
        fs::set_permissions(c.l(0, path), Permissions::from_mode(0o777)).unwrap();
    }
    symlink("f", c.l(0, "s")).unwrap();
    same_as_the_kernel(
        &c,
        "chmod 777 $U; mkdir $U/own; chmod 777 $U/own
         setfacl -d -m u:nobody:rwx $W; setfacl -m u:nobody:rwx $W",
        "cd $M; umask 027
         chmod 664 f; chmod 664 d/inner; chown -h 5 s
         rm hidden; mkdir hidden
         setpriv --reuid 1000 --regid 1000 --clear-groups \
            sh -ec 'umask 027; : > own/new; mkdir own/dir; mkfifo own/fifo; : > d/new; mkdir d/dir'
         cd $U; getfacl -R -P . | grep -v '^$'; find . -type l | xargs stat -c '%n %u %a'",
    );
}

// Each name of an upper file that is removed while another remains costs a descriptor for as long
// as the kernel knows the file: 256 of them and nothing can be opened or made any more.
#[test]
fn links_and_unlinks_hold_no_descriptors() {
    needs_root!();
    let mut c = Case::new(1);
    fs::create_dir(c.l(0, "d")).unwrap();
    c.mount_after("ulimit -n 256");
    let count = 400;
    for i in 0..count {
        put(c.m(&format!("g{i}")), format!("{i}"));
        fs::hard_link(c.m(&format!("g{i}")), c.m(&format!("d/h{i}"))).unwrap();
    }
    // Half of them lose their first name, half their second.
    for i in 0..count {
        let loser = if i % 2 == 0 { format!("g{i}") } else { format!("d/h{i}") };
        fs::remove_file(c.m(&loser)).unwrap_or_else(|e| panic!("{loser}: {e}"));
    }
    let open = c.server_descriptors();
    assert!(open < 200, "{open} descriptors are open");
    put(c.m("after"), "after");
    let left = |i: u32| c.m(&if i.is_multiple_of(2) { format!("d/h{i}") } else { format!("g{i}") });
    for i in 0..count {
        append(left(i), "+");
        assert_eq!(text(left(i)), format!("{i}+"));
        assert_eq!(nlink(left(i)), 1);
    }
    assert_eq!(names(c.m("d")).len(), 200);
    c.remount();
    assert_eq!(names(c.m("")).len(), 202);
    assert_eq!(text(c.m("d/h398")), "398+");
}

// A directory in the way of a rename is replaced by an empty, private one before the rename, which
// then fails: its owner, mode and xattrs are lost, its old files are back or the mount is on a deleted one.
#[test]
fn a_failing_rename_over_a_directory_changes_nothing() {
    needs_root!();
    let mut c = Case::new(1);
    put(c.l(0, "dst/old"), "deleted");
    put(c.l(0, "dst/sub/old"), "deleted");
    for dir in ["dst", "plain"] {
        fs::create_dir(c.u(dir)).unwrap();
        fs::set_permissions(c.u(dir), Permissions::from_mode(0o750)).unwrap();
        setx(c.u(dir), "user.a", "1");
        chown(c.u(dir), Some(5), Some(6)).unwrap();
    }
    whiteout(c.u("dst/old"));
    whiteout(c.u("dst/sub"));
    put(c.u("src/content"), "content");
    let Some(held) = Immutable::new(c.u("src")) else {
        fuse_tests::skip!("no chattr +i here");
    };
    c.mount();
    for (round, dir) in ["dst", "plain", "dst"].into_iter().enumerate() {
        refused(fs::rename(c.m("src"), c.m(dir)), Errno::PERM);
        for path in [c.m(dir), c.u(dir)] {
            let meta = fs::metadata(&path).unwrap();
            assert_eq!((meta.mode() & 0o7777, meta.uid(), meta.gid()), (0o750, 5, 6), "{dir}");
            assert_eq!(getx(&path, "user.a"), Some(b"1".to_vec()), "{dir}");
        }
        assert_eq!(names(c.m(dir)), [""; 0], "{dir}");
        // The mount works on the directory that is there.
        put(c.m(dir).join("x"), "x");
        assert_eq!(text(c.u(dir).join("x")), "x");
        fs::remove_file(c.m(dir).join("x")).unwrap();
        if round == 1 {
            c.remount();
        }
    }
    drop(held);
    for dir in ["dst", "plain"] {
        fs::create_dir(c.m("next")).unwrap();
        put(c.m("next/content"), dir);
        fs::rename(c.m("next"), c.m(dir)).unwrap();
    }
    for _ in 0..2 {
        for dir in ["dst", "plain"] {
            assert_eq!(names(c.m(dir)), ["content"]);
            assert_eq!((mode(c.m(dir)), text(c.m(dir).join("content"))), (0o755, dir.into()));
        }
        c.remount();
    }
}

// Other programs write `.wh.NAME` files into an upper. A directory made or moved to NAME is to be
// exchanged with a whiteout that is not there: ENOENT.
#[test]
fn directories_take_names_hidden_by_mark_files_in_the_upper() {
    needs_root!();
    let mut c = Case::new(1);
    for dir in ["foo", "moved", "lowered"] {
        put(c.l(0, &format!("{dir}/old")), "deleted");
    }
    put(c.l(0, "bar"), "deleted");
    for name in ["foo", "moved", "bar", "nothing", "free", "lowered"] {
        put(c.u(&format!(".wh.{name}")), "");
    }
    put(c.u("up/content"), "up");
    put(c.u("up2/content"), "up2");
    put(c.u("file"), "file");
    c.mount();
    assert_eq!(names(c.m("")), ["file", "up", "up2"]);
    fs::create_dir(c.m("foo")).unwrap();
    fs::create_dir(c.m("nothing")).unwrap();
    fs::rename(c.m("up"), c.m("moved")).unwrap();
    fs::rename(c.m("up2"), c.m("free")).unwrap();
    put(c.m("bar"), "new");
    fs::rename(c.m("file"), c.m("lowered")).unwrap();
    for _ in 0..2 {
        assert_eq!(names(c.m("")), ["bar", "foo", "free", "lowered", "moved", "nothing"]);
        assert_eq!(names(c.m("foo")), [""; 0]);
        assert_eq!(names(c.m("nothing")), [""; 0]);
        assert_eq!(text(c.m("moved/content")), "up");
        assert_eq!(names(c.m("moved")), ["content"]);
        assert_eq!(text(c.m("free/content")), "up2");
        assert_eq!((text(c.m("bar")), text(c.m("lowered"))), ("new".into(), "file".into()));
        c.remount();
    }
    // And away again: what was hidden stays so.
    for dir in ["foo", "nothing"] {
        fs::remove_dir(c.m(dir)).unwrap();
    }
    fs::rename(c.m("moved"), c.m("elsewhere")).unwrap();
    for _ in 0..2 {
        assert_eq!(names(c.m("")), ["bar", "elsewhere", "free", "lowered"]);
        c.remount();
    }
}

// The same for root, with a mark that is refused.
#[test]
fn a_child_with_a_refused_mark_hides_no_siblings() {
    needs_root!();
    let mut c = Case::new(2);
    for name in ["aa/f", "before/f", "red/f", "zz/f", "zafter"] {
        put(c.l(0, name), "");
    }
    put(c.l(1, "red/below"), "");
    setx(c.l(0, "red"), "user.overlay.redirect", "/other");
    c.mount();
    for _ in 0..2 {
        assert_eq!(listed(c.m("")), ["aa", "before", "red", "zafter", "zz"]);
        refused(fs::metadata(c.m("red")), Errno::PERM);
        c.remount();
    }
    // All but that one goes.
    let out = Command::new("rm")
        .args(["-rf", "aa", "before", "red", "zafter", "zz"])
        .current_dir(c.m(""))
        .output()
        .unwrap();
    assert!(!out.status.success() && said(&out).contains("red"), "{}", said(&out));
    assert_eq!(listed(c.m("")), ["red"]);
}

// A hard-linked lower file is open, loses all its names and is then written: its copy is anchored
// in work, where nothing ever removes it.
#[test]
fn an_unlinked_lower_pair_that_is_written_leaves_nothing_in_work() {
    needs_root!();
    let mut c = Case::new(1);
    put(c.l(0, "a"), vec![b'x'; 4 << 20]);
    fs::hard_link(c.l(0, "a"), c.l(0, "b")).unwrap();
    c.mount();
    let mut file = OpenOptions::new().read(true).write(true).open(c.m("a")).unwrap();
    for name in ["a", "b"] {
        fs::remove_file(c.m(name)).unwrap();
    }
    file.write_all(b"zz").unwrap();
    assert_eq!(file.metadata().unwrap().nlink(), 0);
    file.seek(SeekFrom::Start(0)).unwrap();
    let mut start = [0; 4];
    file.read_exact(&mut start).unwrap();
    assert_eq!(&start, b"zzxx");
    drop(file);
    forget_all();
    wait_until("the copy to go", BOUND, || disk_usage(&c.w("")) < 1 << 20);
    assert_eq!(names(c.m("")), [""; 0]);
}

// Of a directory with both marks the one for xattr whiteouts is found first, and what the other
// hides is shown.
#[test]
fn opaque_wins_over_the_mark_for_xattr_whiteouts() {
    needs_root!();
    let mut c = Case::new(2);
    for (name, marks) in [
        ("d", &[("opaque", "y"), ("whiteouts", "y")][..]),
        ("e", &[("whiteouts", "y"), ("opaque", "y")]),
        ("x", &[("opaque", "x")]),
        ("plain", &[]),
    ] {
        put(c.l(0, &format!("{name}/shown")), "");
        put(c.l(1, &format!("{name}/below")), "");
        for (mark, value) in marks {
            setx(c.l(0, name), &format!("trusted.overlay.{mark}"), value);
        }
    }
    c.mount();
    let ours = ["d", "e", "x", "plain"].map(|name| names(c.m(name)));
    assert_eq!(ours[0], ["shown"]);
    assert_eq!(ours[2], ["below", "shown"]);
    c.unmount();
    needs_kernel_overlay!();
    let kernel = c.sandbox.mount(Kind::Kernel);
    assert_eq!(ours, ["d", "e", "x", "plain"].map(|name| names(c.m(name))));
    drop(kernel);
}

// A volatile mount leaves no mark: after a crash its upper, which may be incomplete, is used again.
both!(a_volatile_upper_is_refused_until_its_mark_is_removed);
fn a_volatile_upper_is_refused_until_its_mark_is_removed() {
    let mut c = Case::new(1);
    put(c.l(0, "f"), "content");
    let mark = c.w("work/incompat/volatile");
    for killed in [false, true] {
        c.mount_with("volatile");
        assert!(mark.is_dir(), "no mark while mounted");
        append(c.m("f"), "+");
        if killed {
            kill_process(c.server(), Signal::KILL).unwrap();
            let merged = c.m("");
            wait_until("the end of the server", BOUND, || {
                env::processes_with_argument(&merged).is_empty()
            });
        }
        c.unmount();
        assert!(mark.is_dir(), "no mark after the mount");
        let out = c.spec().try_mount().expect_err("mounted on what a volatile mount left");
        for word in ["volatile", "work"] {
            assert!(said(&out).contains(word), "{}", said(&out));
        }
        assert_eq!(said(&out).trim().lines().count(), 1, "{}", said(&out));
        c.spec().option("volatile").try_mount().expect_err("mounted, being volatile itself");
        if env::no_kernel_overlay().is_none() {
            let spec = c.sandbox.spec(Kind::Kernel);
            env::mount_overlay(&spec.option_text(), &spec.merged)
                .expect_err("the kernel does not know the mark");
        }
        fs::remove_dir(&mark).unwrap();
        // Another incompatible feature, as later kernels may have.
        let other = mark.with_file_name("other");
        fs::create_dir(&other).unwrap();
        let out = c.spec().try_mount().expect_err("mounted in spite of an unknown feature");
        assert!(said(&out).contains("incompat/other exists"), "{}", said(&out));
        fs::remove_dir(&other).unwrap();
        c.mount();
        gone(&mark);
        assert_eq!(text(c.m("f")), format!("content{}", "+".repeat(1 + usize::from(killed))));
        c.unmount();
    }
}

// What is mounted somewhere inside a lower is taken for a part of the layer, with files and inode
// numbers of another filesystem.
#[test]
fn a_mount_inside_a_lower_is_not_crossed() {
    needs_root!();
    let mut c = Case::new(2);
    if !env::has_private_mounts(c.sandbox.root()) {
        fuse_tests::skip!("the kernel makes no private mounts of layers");
    }
    let other = c.sandbox.root().join("other");
    put(other.join("mounted"), "");
    put(other.join("file"), "");
    put(c.l(0, "sub/orig"), "orig");
    put(c.l(0, "loop/q"), "q");
    fs::create_dir(c.l(0, "loop/in")).unwrap();
    put(c.l(1, "both/orig"), "");
    put(c.l(0, "both/top"), "");
    put(c.l(0, "file"), "orig");
    let binds = [
        Bind::new(&other, &c.l(0, "sub")),
        Bind::new(&other, &c.l(1, "both")),
        Bind::new(&other.join("file"), &c.l(0, "file")),
        Bind::new(&c.l(0, "loop"), &c.l(0, "loop/in")),
    ];
    let look = "cd $M; find . | sort; find . -type f | sort | xargs head -v
        echo changed >> sub/orig; echo changed >> file; : > loop/in/new
        cat sub/orig file; find . | sort; cd $U; find . | sort";
    let can_compare = env::no_kernel_overlay().is_none();
    if can_compare {
        same_as_the_kernel(&c, "", look);
    }
    c.mount();
    assert_eq!(names(c.m("sub")), ["orig"]);
    assert_eq!(names(c.m("both")), ["orig", "top"]);
    assert_eq!(names(c.m("loop/in")), [""; 0]);
    assert_eq!(text(c.m("file")), "orig");
    append(c.m("file"), "+");
    assert_eq!(text(c.u("file")), "orig+");
    c.unmount();
    assert_eq!(text(other.join("file")), "");
    c.sandbox.forget_seals();
    drop(binds);
}

// Reading a link sets its access time, in a lower too.
#[test]
fn reading_does_not_touch_the_access_times_of_lowers() {
    needs_root!();
    let mut c = Case::new(1);
    if !env::has_private_mounts(c.sandbox.root()) {
        fuse_tests::skip!("the kernel makes no private mounts of layers");
    }
    symlink("f", c.l(0, "s")).unwrap();
    put(c.l(0, "f"), "content");
    put(c.l(0, "d/inner"), "content");
    let control = c.sandbox.root().join("control");
    symlink("f", &control).unwrap();
    let paths = ["s", "f", "d", "d/inner"].map(|name| c.l(0, name));
    let old = Timestamps {
        last_access: Timespec { tv_sec: 1_000_000, tv_nsec: 0 },
        last_modification: Timespec { tv_sec: 2_000_000, tv_nsec: 0 },
    };
    for path in paths.iter().chain([&control]) {
        rustix::fs::utimensat(CWD, path, &old, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }
    let atime = |path: &Path| fs::symlink_metadata(path).unwrap().atime();
    fs::read_link(&control).unwrap();
    if atime(&control) == 1_000_000 {
        fuse_tests::skip!("access times are not kept here");
    }
    for _ in 0..2 {
        // Taking checksums reads links too.
        c.mount_unsealed();
        for _ in 0..3 {
            assert_eq!(fs::read_link(c.m("s")).unwrap(), Path::new("f"));
            assert_eq!(text(c.m("s")), "content");
            assert_eq!(text(c.m("d/inner")), "content");
            assert_eq!(names(c.m("d")), ["inner"]);
            forget_all();
        }
        c.unmount();
    }
    for path in &paths {
        assert_eq!(atime(path), 1_000_000, "{}", path.display());
    }
}

// A file made under one name, linked to its final one and unlinked under the first is looked for
// under the first.
both!(a_file_is_found_under_the_names_that_are_left);
fn a_file_is_found_under_the_names_that_are_left() {
    let mut c = Case::new(1);
    for n in 0..3 {
        put(c.l(0, &format!("lower{n}")), "content");
        put(c.u(&format!("upper{n}")), "content");
    }
    fs::create_dir(c.l(0, "dir")).unwrap();
    c.mount();
    for n in 0..3 {
        put(c.m(&format!("new{n}")), "content");
    }
    let places = ["lower", "upper", "new"];
    let mut open = Vec::new();
    for place in places {
        for n in 0..3 {
            let (tmp, end) = (c.m(&format!("{place}{n}")), c.m(&format!("dir/{place}{n}")));
            let file = OpenOptions::new().read(true).write(true).open(&tmp).unwrap();
            fs::hard_link(&tmp, &end).unwrap();
            if n == 1 {
                // A third name, for which the second goes too.
                fs::hard_link(&end, c.m(&format!("dir/third-{place}"))).unwrap();
                fs::remove_file(&end).unwrap();
                fs::rename(c.m(&format!("dir/third-{place}")), &end).unwrap();
            }
            fs::remove_file(&tmp).unwrap();
            assert_eq!(file.metadata().unwrap().nlink(), 1, "{place}{n}");
            // By descriptor, by name, by rename; in each of the orders.
            let by_fd = || {
                file.set_permissions(Permissions::from_mode(0o600)).unwrap();
                file.write_all_at(b"C", 0).unwrap();
                assert_eq!(mode(&end), 0o600, "{place}{n}");
            };
            if n != 2 {
                by_fd();
            }
            fs::set_permissions(&end, Permissions::from_mode(0o640)).unwrap();
            assert_eq!(file.metadata().unwrap().mode() & 0o777, 0o640, "{place}{n}");
            append(&end, "+");
            if n == 2 {
                by_fd();
            }
            assert_eq!(ino(&end), file.metadata().unwrap().ino(), "{place}{n}");
            let last = c.m(&format!("{place}-end{n}"));
            fs::rename(&end, &last).unwrap();
            // The descriptor follows.
            file.write_all_at(b"O", 1).unwrap();
            assert_eq!(text(&last), "COntent+", "{place}{n}");
            gone(&end);
            gone(&tmp);
            open.push(file);
        }
    }
    drop(open);
    c.remount();
    for place in places {
        for n in 0..3 {
            let last = c.m(&format!("{place}-end{n}"));
            assert_eq!((text(&last), nlink(&last)), ("COntent+".into(), 1), "{place}{n}");
        }
    }
    assert_eq!(names(c.m("dir")), [""; 0]);
    assert_eq!(names(c.m("")).len(), 10);
}

// A rename that is refused has copied up the target's directory, or more, before it finds out.
both!(a_refused_rename_copies_nothing_up);
fn a_refused_rename_copies_nothing_up() {
    let mut c = Case::new(2);
    put(c.l(0, "a/d/f"), "old");
    put(c.l(1, "a/merged/f"), "old");
    put(c.l(0, "a/merged/g"), "old");
    put(c.l(0, "b/deep/er/full/f"), "old");
    put(c.l(0, "b/file"), "old");
    c.mount_with("dir_rename_entries=0");
    for (old, new, errno) in [
        ("a/d", "b/deep/er/d", Errno::XDEV),
        ("a/d", "a/e", Errno::XDEV),
        ("a/merged", "b/merged", Errno::XDEV),
        ("a/d", "b/deep/er/full", Errno::NOTEMPTY),
        ("a/d", "b/file", Errno::NOTDIR),
        ("b/file", "a/d", Errno::ISDIR),
        ("b/deep", "b/deep/er/in", Errno::INVAL),
    ] {
        let result = fs::rename(c.m(old), c.m(new));
        // Which of two reasons is told does not matter here.
        if errno != Errno::NOTEMPTY {
            refused(result, errno);
        } else {
            result.expect_err("renamed over a full directory");
        }
        assert_eq!(paths(&c.u("")), [""; 0], "{old} to {new} was refused");
    }
    c.unmount();
    assert_eq!(paths(&c.u("")), [""; 0]);
}

// A second name of a lower file, seen but not used when the first is changed, shows the old file
// after the next mount.
both!(a_seen_name_of_a_changed_lower_pair_stays_the_same_file);
fn a_seen_name_of_a_changed_lower_pair_stays_the_same_file() {
    let mut c = Case::new(1);
    fs::create_dir(c.l(0, "dir")).unwrap();
    for kind in ["write", "chmod", "xattr", "unseen"] {
        put(c.l(0, kind), "old");
        fs::hard_link(c.l(0, kind), c.l(0, &format!("dir/{kind}"))).unwrap();
    }
    c.mount();
    for kind in ["write", "chmod", "xattr"] {
        assert_eq!(ino(c.m(kind)), ino(c.m(&format!("dir/{kind}"))));
    }
    append(c.m("write"), "+new");
    fs::set_permissions(c.m("chmod"), Permissions::from_mode(0o600)).unwrap();
    setx(c.m("xattr"), "user.a", "1");
    let check = |c: &Case| {
        for kind in ["write", "chmod", "xattr"] {
            let (a, b) = (c.m(kind), c.m(&format!("dir/{kind}")));
            assert_eq!((ino(&a), nlink(&a)), (ino(&b), 2), "{kind}");
        }
        assert_eq!(text(c.m("dir/write")), "old+new");
        assert_eq!(mode(c.m("dir/chmod")), 0o600);
        assert_eq!(getx(c.m("dir/xattr"), "user.a"), Some(b"1".to_vec()));
    };
    check(&c);
    c.remount();
    check(&c);
    append(c.m("dir/write"), "+newer");
    assert_eq!(text(c.m("write")), "old+new+newer");
    c.unmount();
    if env::no_kernel_overlay().is_none() {
        let kernel = c.sandbox.mount(Kind::Kernel);
        assert_eq!(text(c.m("write")), "old+new+newer");
        assert_eq!(ino(c.m("write")), ino(c.m("dir/write")));
        drop(kernel);
    }
}

// What the listing of a directory does not know is removed with it, unlooked at: a file that is
// there after an operation that failed half-way, or that came by another way.
both!(rmdir_removes_nothing_that_it_has_not_seen);
fn rmdir_removes_nothing_that_it_has_not_seen() {
    let mut c = Case::new(1);
    put(c.l(0, "merged/old"), "old");
    put(c.u("upper/old"), "old");
    put(c.l(0, "over/old"), "old");
    c.mount();
    for dir in ["merged", "upper", "over"] {
        fs::remove_file(c.m(dir).join("old")).unwrap();
        assert_eq!(names(c.m(dir)), [""; 0]);
        put(c.u(dir).join("precious/file"), "precious");
    }
    for dir in ["merged", "upper"] {
        fs::remove_dir(c.m(dir)).expect_err("removed with what was in it");
    }
    fs::create_dir(c.m("new")).unwrap();
    fs::rename(c.m("new"), c.m("over")).expect_err("replaced with what was in it");
    for dir in ["merged", "upper", "over"] {
        assert_eq!(text(c.u(dir).join("precious/file")), "precious", "{dir}");
    }
    c.remount();
    for dir in ["merged", "upper", "over"] {
        assert_eq!(text(c.m(dir).join("precious/file")), "precious", "{dir}");
    }
}

// Each `.wh.` file is searched among all names of its directory: minutes for a layer that somebody
// else made.
#[test]
fn mark_files_are_matched_in_linear_time() {
    needs_root!();
    let mut c = Case::new(2);
    let count = 40_000;
    fs::create_dir(c.l(0, "d")).unwrap();
    put(c.l(1, "d/f7"), "deleted");
    put(c.l(1, "d/shown"), "");
    for n in 0..count {
        File::create(c.l(0, &format!("d/.wh.f{n}"))).unwrap();
    }
    c.mount_unsealed();
    let before = c.server_nanoseconds();
    assert_eq!(names(c.m("d")), ["shown"]);
    let used = Duration::from_nanos(c.server_nanoseconds() - before);
    assert!(used < Duration::from_secs(2), "{used:?} for {count} names");
}

// An operation is done on disk and then fails, at a stat of what it made: the listing never hears of
// it, so the object is not to be seen until the next mount, nor to be made.
#[test]
fn what_failed_after_it_was_done_is_seen() {
    needs_root!();
    if Command::new("strace").arg("-V").output().is_err() {
        fuse_tests::skip!("there is no strace to make system calls fail");
    }
    let mut c = Case::new(2);
    for n in 0..2 {
        put(c.l(n, &format!("d/old{n}")), "old");
    }
    put(c.u("d/file"), "file");
    c.mount();
    assert_eq!(names(c.m("d")), ["file", "old0", "old1"]);
    fs::remove_file(c.m("d/old0")).unwrap();
    let server = c.server().to_string();
    let mut strace = Command::new("strace")
        .args(["-f", "-q", "-o", "/dev/null", "-e", "trace=statx"])
        .args(["-e", "inject=statx:error=EIO:when=1+1", "-p", &server])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let is_traced = || {
        let mut tasks = fs::read_dir(format!("/proc/{server}/task")).unwrap();
        tasks.all(|task| {
            let status = fs::read_to_string(task.unwrap().path().join("status"));
            status.is_ok_and(|text| text.contains("TracerPid:") && !text.contains("TracerPid:\t0"))
        })
    };
    wait_until("strace", BOUND, is_traced);
    let failed = [
        fs::create_dir(c.m("d/dir")).is_err(),
        File::create_new(c.m("d/made")).is_err(),
        fs::hard_link(c.m("d/file"), c.m("d/link")).is_err(),
        symlink("x", c.m("d/sym")).is_err(),
        fs::create_dir(c.m("d/old0")).is_err(),
        fs::rename(c.m("d/file"), c.m("d/moved")).is_err(),
    ];
    let pid = rustix::process::Pid::from_child(&strace);
    kill_process(pid, Signal::TERM).unwrap();
    strace.wait().unwrap();
    assert!(failed.contains(&true), "nothing failed");
    let live = names(c.m("d"));
    for name in ["dir", "made", "link", "sym", "old0", "file", "moved"] {
        let is_object = fs::symlink_metadata(c.u("d").join(name))
            .is_ok_and(|_| !env::is_whiteout(&c.u("d").join(name)));
        assert_eq!(live.iter().any(|n| n == name), is_object, "{name}: {failed:?} {live:?}");
        assert_eq!(fs::symlink_metadata(c.m("d").join(name)).is_ok(), is_object, "{name}");
    }
    c.remount();
    assert_eq!(names(c.m("d")), live, "before and after a remount");
}

// A user without privilege mounted on a directory of a lower; the server entered its own mount, waited
// for itself, and could not even be killed.
#[test]
fn a_mountpoint_inside_a_lower_is_not_entered() {
    needs_root!();
    let c = Case::new(1);
    env::copy_program(env::program(), &c.sandbox.root().join("lamina"));
    let said = sh(
        c.sandbox.root(),
        &format!(
            "chmod 755 . lamina; mkdir -p in/big/m in/u in/w; echo x > in/big/f; chown -R {USER}:{USER} in; cd in
             as() {{ setpriv --reuid {USER} --regid {USER} --clear-groups -- \"$@\"; }}
             as ../lamina -o lowerdir=big,upperdir=u,workdir=w big/m
             as timeout 20 find big/m 2>&1 | sort
             as fusermount3 -u big/m"
        ),
    );
    assert!(said.contains("big/m/f\n") && said.contains("Invalid cross-device link"), "{said}");
    let merged = c.sandbox.root().join("in/big/m");
    wait_until("the end of the server", Duration::from_secs(10), || {
        !sh("/", "ps -eo args").contains(merged.to_str().unwrap())
    });
}

// A signal was swallowed when the mountpoint's path had changed since the mount.
#[test]
fn a_signal_unmounts_what_was_moved() {
    needs_root!();
    let c = Case::new(1);
    put(c.l(0, "f"), "content");
    let script = format!(
        "mkdir -p p/m u w; '{}' -f -o lowerdir='{}',upperdir=u,workdir=w p/m & server=$!
         for _ in $(seq 100); do [ -e p/m/f ] && break; sleep 0.1; done
         mv p q; kill -TERM $server; wait $server; echo ended $?; ls q/m",
        env::program().display(),
        c.l(0, "").display(),
    );
    assert_eq!(sh(c.sandbox.root(), &script), "ended 0\n");
}

// The marks of a copy-up are the kernel's; a directory is marked opaque only when it hides something.
#[test]
fn only_marks_that_mean_something_are_written() {
    needs_root!();
    let mut c = Case::new(1);
    put(c.l(0, "d/f"), "content");
    c.mount();
    fs::create_dir(c.m("d/new")).unwrap();
    fs::set_permissions(c.m("d/f"), Permissions::from_mode(0o600)).unwrap();
    c.unmount();
    let marks = sh(c.u(""), "getfattr -h -R -m overlay . | LC_ALL=C sort");
    let marks: Vec<_> = marks.lines().filter(|line| !line.is_empty()).collect();
    let origin = "trusted.overlay.origin";
    let impure = "trusted.overlay.impure";
    let files = ["# file: .", "# file: d", "# file: d/f"];
    assert_eq!(marks[..3], files);
    assert_eq!(marks[3..], [impure, impure, origin, origin]);
}

// The listing finds the mark that leaves one part of two, which was one directory of several all the same.
#[test]
fn listing_a_directory_does_not_change_its_link_count() {
    needs_root!();
    let mut c = Case::new(2);
    put(c.l(1, "d/low"), "x");
    put(c.l(0, "d/.wh..wh..opq"), "");
    put(c.l(0, "d/sub/top"), "x");
    c.mount();
    let links = || {
        let asked = StatxFlags::NLINK;
        rustix::fs::statx(CWD, c.m("d"), AtFlags::STATX_FORCE_SYNC, asked).unwrap().stx_nlink
    };
    let before = links();
    assert_eq!(listed(c.m("d")), ["sub"]);
    assert_eq!((before, links()), (1, 1));
}
