//! Upper and lower layers on filesystems that can do less than local ones: bindfs without xattrs and owners, nearly what an NFS v3
//! client gives, sshfs, which is worse than any, and NFS itself where there is a server. Also abilities that are only said to be missing (`upper_lacks`), so that a
//! crash can be tried.
//!
//! What the comparison with the kernel finds on such uppers is in `kernel_diff`.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use fuse_tests::case::{Case, append, forget_all, names, put, refused, sh, text};
use fuse_tests::fixture::fill;
use fuse_tests::weak::{Server, Store};
use fuse_tests::{needs_root, skip};
use rustix::io::Errno;

const BINDFS: Server = Server::Bindfs(&["--xattr-none", "--chown-deny"]);

/// A case with upper and work on a store.
struct Lesser {
    // Fields are dropped in this order, after the mount.
    store: Store,
    c: Case,
}

impl Drop for Lesser {
    fn drop(&mut self) {
        // That checks the lower layers, one of which may be gone with the store after this.
        drop(self.c.mount.take());
        self.c.unmount();
        self.c.sandbox.forget_seals();
    }
}

impl Lesser {
    fn new(server: Server, lower: &str) -> Lesser {
        let mut c = Case::new(0);
        c.sandbox.layer(lower);
        let store = Store::mount(server, c.sandbox.root(), "store");
        for dir in ["upper", "work"] {
            fs::create_dir(store.path.join(dir)).unwrap();
        }
        let mut lesser = Lesser { store, c };
        lesser.mount();
        lesser
    }

    fn mount(&mut self) {
        let mut spec = self.c.spec();
        spec.upper = Some((self.store.path.join("upper"), self.store.path.join("work")));
        self.c.mount = Some(spec.mount());
    }

    fn m(&self, path: &str) -> PathBuf {
        self.c.m(path)
    }

    /// What the upper holds, as the server of the store sees it.
    fn upper(&self, path: &str) -> Vec<String> {
        let mut found = names(self.store.behind.join("upper").join(path));
        found.sort();
        found
    }

    /// The tree is the same after a remount, and nothing is left in work.
    fn check_remount(&mut self) {
        let before = contents(&self.m(""));
        self.c.unmount();
        assert_eq!(names(self.store.behind.join("work/work")), Vec::<String>::new());
        self.mount();
        assert_eq!(contents(&self.m("")), before);
    }
}

/// Every path with what it holds.
fn contents(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut found = BTreeMap::new();
    let mut dirs = vec![root.to_path_buf()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            let meta = fs::symlink_metadata(&path).unwrap();
            let what = if meta.is_dir() {
                dirs.push(path.clone());
                "directory".to_owned()
            } else if meta.is_file() {
                fs::read_to_string(&path).unwrap()
            } else if meta.is_symlink() {
                format!("to {}", fs::read_link(&path).unwrap().display())
            } else {
                "special".to_owned()
            };
            found.insert(path.strip_prefix(root).unwrap().to_path_buf(), what);
        }
    }
    found
}

const LOWER: &str = "file file 644 lower\nfile dir/a 644 a\nfile dir/b 644 b\nfile dir/sub/c 644 c\nfile gone/1 644 1\n\
     file moved/1 644 1\nsymlink link file\nfile hard1 644 hard\nlink hard2 hard1\nfile owned 4750 o\nowner owned 12 34\nmode owned 4750\n\
     file open 644 open";

/// Everything that needs another way there.
fn main_operations(server: Server) {
    if let Some(reason) = server.missing() {
        skip!("{reason}");
    }
    let mut t = Lesser::new(server, LOWER);
    let device = server != Server::Sshfs;
    let is_whiteout = |t: &Lesser, dir: &str, name: &str| {
        let dir = t.store.behind.join("upper").join(dir);
        if device {
            let found = fs::symlink_metadata(dir.join(name));
            return found.is_ok_and(|m| m.file_type().is_char_device() && m.rdev() == 0)
                && !dir.join(format!(".wh.{name}")).exists();
        }
        dir.join(format!(".wh.{name}")).exists() && !dir.join(name).exists()
    };

    // Removal of lower objects, of copies, and of new ones.
    fs::remove_file(t.m("file")).unwrap();
    assert!(is_whiteout(&t, "", "file"));
    append(t.m("dir/a"), "+");
    fs::remove_file(t.m("dir/a")).unwrap();
    assert!(is_whiteout(&t, "dir", "a"));
    assert_eq!(names(t.m("dir")), ["b", "sub"]);
    put(t.m("dir/new"), "n");
    fs::remove_file(t.m("dir/new")).unwrap();
    fs::remove_dir_all(t.m("gone")).unwrap();
    assert!(is_whiteout(&t, "", "gone"));
    // A merged directory that has an upper part.
    append(t.m("dir/sub/c"), "+");
    fs::remove_dir_all(t.m("dir/sub")).unwrap();
    assert!(is_whiteout(&t, "dir", "sub"));
    t.check_remount();

    // Names that were removed are made again; what was there stays away.
    put(t.m("file"), "again");
    fs::create_dir(t.m("gone")).unwrap();
    fs::create_dir(t.m("dir/sub")).unwrap();
    std::os::unix::fs::symlink("x", t.m("dir/a")).unwrap();
    assert!(names(t.m("gone")).is_empty() && names(t.m("dir/sub")).is_empty());
    let opaque: &[&str] = if server == Server::Nfs("4.2") { &[] } else { &[".wh..wh..opq"] };
    assert_eq!(t.upper("gone"), opaque);
    assert_eq!(t.upper(""), ["dir", "file", "gone"]);
    t.check_remount();
    fs::remove_file(t.m("dir/a")).unwrap();
    fs::remove_dir(t.m("dir/sub")).unwrap();
    fs::remove_dir(t.m("gone")).unwrap();
    assert!(is_whiteout(&t, "", "gone") && is_whiteout(&t, "dir", "sub"));

    // Renames: away from and onto what lower layers have, by files and directories.
    fs::rename(t.m("dir/b"), t.m("b2")).unwrap();
    assert!(is_whiteout(&t, "dir", "b"));
    fs::create_dir(t.m("fresh")).unwrap();
    put(t.m("fresh/1"), "fresh");
    fs::rename(t.m("fresh"), t.m("gone")).unwrap();
    assert_eq!(names(t.m("gone")), ["1"]);
    fs::remove_file(t.m("moved/1")).unwrap();
    fs::rename(t.m("gone"), t.m("moved")).unwrap();
    assert_eq!(contents(&t.m("moved")).into_values().collect::<Vec<_>>(), ["fresh"]);
    assert!(is_whiteout(&t, "", "gone"));
    fs::rename(t.m("link"), t.m("hard1")).unwrap();
    assert!(is_whiteout(&t, "", "link"));
    let exchange = rustix::fs::renameat_with(
        rustix::fs::CWD,
        t.m("b2"),
        rustix::fs::CWD,
        t.m("hard1"),
        rustix::fs::RenameFlags::EXCHANGE,
    );
    assert_eq!(exchange, Err(rustix::io::Errno::INVAL));
    t.check_remount();

    // Hard links, owners, ACLs that are not there.
    append(t.m("hard2"), "+");
    assert_eq!(fs::read_to_string(t.m("hard2")).unwrap(), "hard+");
    append(t.m("owned"), "+");
    let owned = fs::metadata(t.m("owned")).unwrap();
    match server {
        // Nobody runs it as somebody else, and its group may do no more than others.
        Server::Bindfs(_) => {
            assert_eq!(
                (owned.uid(), owned.gid(), owned.permissions().mode() & 0o7777),
                (0, 0, 0o700)
            );
            let refused = std::os::unix::fs::chown(t.m("owned"), Some(12), None).unwrap_err();
            assert_eq!(refused.kind(), std::io::ErrorKind::PermissionDenied);
            std::os::unix::fs::chown(t.m("owned"), Some(0), Some(0)).unwrap();
        }
        Server::Sshfs | Server::Nfs(_) => assert_eq!((owned.uid(), owned.gid()), (12, 34)),
    }
    let mut buffer = [0; 64];
    let acl = rustix::fs::getxattr(t.m("file"), "system.posix_acl_access", &mut buffer);
    assert_eq!(acl, Err(rustix::io::Errno::NODATA));

    // Files that are removed or replaced while they are open, opened for reading before and after a change.
    for change in [false, true] {
        let name = if change { "open" } else { "file" };
        let mut open = fs::OpenOptions::new().read(true).write(true).open(t.m(name)).unwrap();
        if change {
            append(t.m(name), "+");
        }
        fs::remove_file(t.m(name)).unwrap();
        open.seek(std::io::SeekFrom::End(0)).unwrap();
        open.write_all(b"more").unwrap();
        open.rewind().unwrap();
        let mut text = String::new();
        open.read_to_string(&mut text).unwrap();
        assert_eq!(text, if change { "open+more" } else { "againmore" });
        assert_eq!(open.metadata().unwrap().nlink(), 0);
        assert!(!names(t.m("")).iter().any(|n| n == name || n.starts_with('.')));
        put(t.m("one"), "one");
        let mut one = fs::File::open(t.m("one")).unwrap();
        put(t.m("two"), "two");
        fs::rename(t.m("two"), t.m("one")).unwrap();
        let mut text = String::new();
        one.read_to_string(&mut text).unwrap();
        assert_eq!((&*text, &*fs::read_to_string(t.m("one")).unwrap()), ("one", "two"));
        fs::remove_file(t.m("one")).unwrap();
    }
    // A directory goes although a file that was in it is open.
    fs::create_dir(t.m("busy")).unwrap();
    put(t.m("busy/file"), "x");
    let open = fs::File::open(t.m("busy/file")).unwrap();
    fs::remove_dir_all(t.m("busy")).unwrap();
    drop(open);
    forget_all();
    t.check_remount();

    // Listings agree with stat.
    for name in names(t.m("")) {
        let listed = fs::read_dir(t.m("")).unwrap().map(Result::unwrap);
        let listed = listed
            .filter(|entry| *entry.file_name() == *name)
            .map(|entry| std::os::unix::fs::DirEntryExt::ino(&entry));
        let ino = fs::symlink_metadata(t.m(&name)).unwrap().ino();
        assert_eq!(listed.collect::<Vec<_>>(), [ino], "{name}");
    }
    t.c.unmount();
}

#[test]
fn an_upper_on_bindfs() {
    needs_root!();
    main_operations(BINDFS);
}

#[test]
fn an_upper_on_sshfs() {
    needs_root!();
    main_operations(Server::Sshfs);
}

#[test]
fn an_upper_on_nfs_v3() {
    needs_root!();
    main_operations(Server::Nfs("3"));
}

// It has xattrs of users.
#[test]
fn an_upper_on_nfs_v4_2() {
    needs_root!();
    main_operations(Server::Nfs("4.2"));
}

/// A lower layer without xattrs, ACLs or true inode numbers.
fn as_lower(server: Server) {
    if let Some(reason) = server.missing() {
        skip!("{reason}");
    }
    let mut c = Case::new(1);
    let store = Store::mount(server, c.sandbox.root(), "store");
    let lower = store.behind.join("l");
    fs::create_dir(&lower).unwrap();
    fill(&lower, LOWER);
    fill(&lower, "file dir/.wh.none\nfile shadow/.wh..wh..opq\nfile shadow/x 644 x");
    fill(&c.l(0, ""), "file shadow/below 644 b\nfile dir/none 644 n\nfile dir/below 644 below");
    let mut spec = c.spec();
    spec.lowers.insert(0, store.path.join("l"));
    // Not sealed, because inode numbers may change there.
    let sealed = contents(&lower);
    c.mount_by_hand(spec.command());
    // Ended in this order, whatever fails.
    let mut t = Lesser { store, c };
    let c = &mut t.c;
    assert_eq!(names(c.m("dir")), ["a", "b", "below", "sub"]);
    assert_eq!(names(c.m("shadow")), ["x"]);
    append(c.m("dir/a"), "+");
    append(c.m("hard1"), "+");
    fs::remove_file(c.m("dir/b")).unwrap();
    fs::rename(c.m("owned"), c.m("mine")).unwrap();
    let mine = fs::metadata(c.m("mine")).unwrap();
    assert_eq!((mine.uid(), mine.gid(), mine.permissions().mode() & 0o7777), (12, 34, 0o4750));
    let before = contents(&c.m(""));
    assert_eq!(before[Path::new("dir/a")], "a+");
    assert_eq!(before[Path::new("hard1")], "hard+");
    c.unmount();
    c.mount_by_hand(spec.command());
    assert_eq!(contents(&c.m("")), before);
    c.unmount();
    assert_eq!(contents(&lower), sealed);
}

#[test]
fn a_lower_on_bindfs() {
    needs_root!();
    as_lower(Server::Bindfs(&["--xattr-none"]));
}

#[test]
fn a_lower_on_nfs_v3() {
    needs_root!();
    as_lower(Server::Nfs("3"));
}

#[test]
fn a_lower_on_nfs_v4_2() {
    needs_root!();
    as_lower(Server::Nfs("4.2"));
}

#[test]
fn a_lower_on_sshfs() {
    needs_root!();
    as_lower(Server::Sshfs);
}

// What is chosen is said, and what is refused in the option too.
#[test]
fn what_the_upper_can_do_is_logged() {
    needs_root!();
    let mut c = Case::new(1);
    let log = c.sandbox.root().join("log");
    let options = format!("log_level=info,log_file={}", log.display());
    c.mount = Some(c.spec().option(&options).mount());
    c.unmount();
    let text = fs::read_to_string(&log).unwrap();
    assert!(
        text.contains("opaque directories: trusted.overlay.opaque; unnamed files: true"),
        "{text}"
    );
    fs::remove_file(&log).unwrap();
    c.mount = Some(c.spec().option(&options).option("upper_lacks=chardev:tmpfile").mount());
    c.unmount();
    let text = fs::read_to_string(&log).unwrap();
    assert!(
        text.contains("whiteouts: .wh. files") && text.contains("unnamed files: false"),
        "{text}"
    );
    let output = c.spec().option("upper_lacks=legs").try_mount().unwrap_err();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("upper_lacks=legs: names something that is none of tmpfile"), "{text}");
}

// A directory with names of one lower file cannot be brought there as it is: whoever moves it copies it.
#[test]
fn a_directory_with_hard_links_moves_where_there_are_none() {
    needs_root!();
    let mut c = Case::new(1);
    put(c.l(0, "d/a"), "one");
    for name in ["d/b", "d/sub", "elsewhere"] {
        fs::hard_link(c.l(0, "d/a"), c.l(0, name)).unwrap();
    }
    c.mount_with("upper_lacks=link");
    refused(fs::rename(c.m("d"), c.m("e")), Errno::XDEV);
    sh(c.m(""), "mv d e");
    for _ in 0..2 {
        for name in ["e/a", "e/b", "e/sub", "elsewhere"] {
            assert_eq!(fs::read_to_string(c.m(name)).unwrap(), "one", "{name}");
        }
        c.remount();
    }
}

// The copy got the name that its node had, though that one was removed: it came back, and what was written went.
#[test]
fn a_lower_hard_link_is_written_where_there_are_none() {
    needs_root!();
    let mut c = Case::new(1);
    for name in ["first", "later", "known"] {
        put(c.l(0, &format!("{name}/a")), "one");
        fs::create_dir(c.l(0, &format!("{name}/sub"))).unwrap();
        fs::hard_link(c.l(0, &format!("{name}/a")), c.l(0, &format!("{name}/sub/b"))).unwrap();
    }
    c.mount_with("upper_lacks=link");
    // The other name is known when the first one goes.
    assert_eq!(text(c.m("first/a")) + &text(c.m("first/sub/b")), "oneone");
    fs::remove_file(c.m("first/a")).unwrap();
    append(c.m("first/sub/b"), "+");
    // Nobody knows it yet.
    assert_eq!(text(c.m("later/a")), "one");
    fs::remove_file(c.m("later/a")).unwrap();
    append(c.m("later/sub/b"), "+");
    // The copy loses its name: whoever knows the other reads on.
    assert_eq!(text(c.m("known/sub/b")), "one");
    append(c.m("known/sub/b"), "+");
    assert_eq!(text(c.m("known/a")), "one+");
    fs::remove_file(c.m("known/sub/b")).unwrap();
    assert_eq!(text(c.m("known/a")), "one+");
    for _ in 0..2 {
        for dir in ["first", "later"] {
            assert_eq!(names(c.m(dir)), ["sub"]);
            assert_eq!(text(c.m(&format!("{dir}/sub/b"))), "one+", "{dir}");
        }
        assert_eq!(names(c.m("known")), ["a", "sub"]);
        assert!(names(c.m("known/sub")).is_empty());
        c.remount();
    }
}

// The server waited for itself: it looked at the object under the one name while it removed the other.
#[test]
fn a_name_goes_of_several_that_others_have_made() {
    needs_root!();
    let mut c = Case::new(1);
    put(c.u("a"), "content");
    fs::create_dir(c.u("d")).unwrap();
    for name in ["b", "d/c"] {
        fs::hard_link(c.u("a"), c.u(name)).unwrap();
    }
    c.mount_with("upper_lacks=link");
    for (name, left) in [("b", 2), ("d/c", 1)] {
        assert_eq!(fs::metadata(c.m("a")).unwrap().nlink(), left + 1);
        fs::remove_file(c.m(name)).unwrap();
        assert_eq!(fs::metadata(c.u("a")).unwrap().nlink(), left);
    }
    assert_eq!(text(c.m("a")), "content");
    assert_eq!(names(c.m("")), ["a", "d"]);
}

// What a server forgets at the making was made good by a mode that knew nothing of what a directory hands down.
#[test]
fn setgid_is_inherited_where_a_server_forgets_sticky() {
    needs_root!();
    let server = Server::Bindfs(&["--xattr-none"]);
    if let Some(reason) = server.missing() {
        skip!("{reason}");
    }
    let mut l = Lesser::new(server, "dir d 2777");
    sh(l.m("d"), "umask 0; mkdir -m 1755 sub; mkdir e; chmod 2700 e; mkdir -m 1711 e/sub");
    // mkdir(1) sets a mode by a call of its own; mkdir(2) does not.
    rustix::fs::mkdir(l.m("d/made"), rustix::fs::Mode::from_raw_mode(0o1750)).unwrap();
    for (path, mode) in [("sub", 0o3755), ("e", 0o2700), ("e/sub", 0o3711), ("made", 0o3750)] {
        let path = l.m(&format!("d/{path}"));
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, mode, "{}", path.display());
    }
    l.check_remount();
}
