//! Races in the union that a mount shows too seldom: its calls are made straight from here, thousands in a second.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use fuse_tests::unmounted::Place;
use fuse_tests::{env, skip};
use laminafs::error::Errno;
use laminafs::union::{NodeId, SetAttr, Union};

const ROOT: NodeId = NodeId::ROOT;

fn node(union: &Union, name: &str) -> NodeId {
    union.lookup(ROOT, name.as_bytes()).unwrap().unwrap().node
}

// The list of xattrs was of the lower directory, and when it was looked through that had an upper part: what says there that it is
// immutable was not in the list.
#[test]
fn a_directory_stays_immutable_that_is_copied_up_while_its_xattrs_are_listed() {
    if !env::is_machine_root() {
        skip!("needs root of the machine");
    }
    struct Unprotect<'a>(&'a Place);
    impl Drop for Unprotect<'_> {
        fn drop(&mut self) {
            let _ = Command::new("chattr").args(["-R", "-f", "-i"]).arg(&self.0.0).status();
        }
    }
    const DIRECTORIES: usize = 200;
    let place = Place::new();
    let lower = place.0.join("lower");
    let path = |n| lower.join(format!("d{n}"));
    for n in 0..DIRECTORIES {
        fs::create_dir_all(path(n)).unwrap();
        fs::write(path(n).join("f"), "").unwrap();
        // What is to be listed.
        fuse_tests::fixture::set_xattr(&path(n), "user.a".as_ref(), b"x").unwrap();
    }
    let _unprotect = Unprotect(&place);
    let all = (0..DIRECTORIES).map(path);
    if !Command::new("chattr").arg("+i").args(all).status().is_ok_and(|status| status.success()) {
        skip!("no immutable directories here");
    }
    let union = place.union("fsync=0");
    let change = SetAttr { mode: Some(0o600), ..SetAttr::default() };
    for n in 0..DIRECTORIES {
        let dir = node(&union, &format!("d{n}"));
        let file = union.lookup(dir, b"f").unwrap().unwrap().node;
        std::thread::scope(|scope| {
            let copying = scope.spawn(|| union.setattr(file, &change).unwrap());
            while !union.is_upper(dir).unwrap() && !copying.is_finished() {
                assert_eq!(union.listxattr(dir).unwrap(), b"user.a\0");
            }
        });
        assert!(union.is_upper(dir).unwrap());
        let refused = union.unlink(dir, b"f").unwrap_err().errno();
        assert_eq!(refused, Errno::PERM, "directory {n}");
    }
}

// A node was known when a name of its file was looked up, so the index was not asked; forgotten in between, the lookup made a node
// of the lower file.
#[test]
fn a_forget_overtakes_a_lookup_of_an_indexed_file() {
    let place = Place::new();
    let lower = place.0.join("lower");
    fs::create_dir_all(&lower).unwrap();
    if !env::gives_handles(&lower) {
        skip!("no file handles here");
    }
    fs::write(lower.join("a"), "content").unwrap();
    fs::set_permissions(lower.join("a"), fs::Permissions::from_mode(0o644)).unwrap();
    for name in ["b", "c"] {
        fs::hard_link(lower.join("a"), lower.join(name)).unwrap();
    }
    let union = place.union("index=on,fsync=0");
    let first = node(&union, "a");
    union.setattr(first, &SetAttr { mode: Some(0o600), ..SetAttr::default() }).unwrap();
    union.forget(first, 1);
    std::thread::scope(|scope| {
        for names in [["a", "b"], ["b", "c"], ["c", "a"]] {
            let union = &union;
            scope.spawn(move || {
                for _ in 0..10_000 {
                    let [one, two] =
                        names.map(|name| union.lookup(ROOT, name.as_bytes()).unwrap().unwrap());
                    assert_eq!((one.node, one.attr.ino), (two.node, two.attr.ino));
                    for entry in [one, two] {
                        let attr = entry.attr;
                        assert_eq!((attr.mode & 0o7777, attr.nlink), (0o600, 3));
                        union.forget(entry.node, 1);
                    }
                }
            });
        }
    });
    // Nothing is left of it, and it is found again.
    assert!(union.getattr(first).is_err());
    assert_eq!(union.lookup(ROOT, b"b").unwrap().unwrap().attr.nlink, 3);
}
