//! Redirects and metacopies: kernel overlay writes and ours reads, ours writes and kernel overlay reads, and
//! layers made by hand that neither would write.

use std::fs;
use std::path::{Path, PathBuf};

use fuse_tests::case::{Case, getx, gone, names, put, refused, setx, text};
use fuse_tests::cases::{Style, generate_layers};
use fuse_tests::fixture::{Kind, Sandbox};
use fuse_tests::ops::{Op, Rng, Target, Verb};
use fuse_tests::tree::{self, Options, Snapshot, assert_same, snapshot_with};
use fuse_tests::{env, needs_kernel_overlay, needs_root};
use rustix::io::Errno;

fn look(path: impl AsRef<Path>) -> Snapshot {
    let mut tree = snapshot_with(path, Options { check_ino: false, ..Options::default() });
    // What the kernel lists but does not find, whiteouts of a directory that one layer has.
    tree.entries.retain(|_, entry| !entry.get("stat").starts_with("No such file"));
    tree
}

/// Stacks that grow: what was written on one stack is the topmost layer of the next. `writer` writes them, `reader` must see what
/// `writer` shows.
fn grown_stacks(writer: Kind, options: &[&str], reader: Kind, verbs: &[Verb]) {
    const STACKS: u64 = 25;
    for seed in 0..STACKS {
        let mut rng = Rng::new(seed);
        let mut sandbox = Sandbox::new();
        for lines in generate_layers(&mut rng, 2, Style { links: false, marks: false }) {
            sandbox.layer(&lines.join("\n"));
        }
        let mut done = Vec::new();
        for level in 0..4 {
            let mut spec = sandbox.side(writer, &format!("{level}"));
            spec.options.extend(options.iter().map(|option| (*option).to_owned()));
            let mount = spec.clone().mount();
            let mut target = Target::new(mount.path(), tree::now());
            for _ in 0..12 {
                let mut op = Op::generate(&mut rng);
                // Mostly what moves directories about.
                if rng.chance(60) {
                    op.verb = *rng.pick(verbs);
                }
                // A whiteout that a user makes is shown by ours alone; suite `nesting` has those.
                let is_apart = matches!(
                    op.verb,
                    Verb::remount | Verb::drop_caches | Verb::mkwhiteout | Verb::rename_whiteout
                );
                if !is_apart {
                    done.push(format!("{op}: {}", target.apply(&op)));
                }
            }
            drop(target);
            let shown = look(mount.path());
            mount.unmount();
            let mut other = sandbox.side(reader, &format!("{level}-read"));
            other.upper.clone_from(&spec.upper);
            if reader == Kind::Kernel {
                other.options.extend(options.iter().map(|option| (*option).to_owned()));
            }
            let mount = other.mount();
            let what = format!("seed {seed} level {level}: {done:#?}");
            assert_same(&what, &shown, &look(mount.path()));
            mount.unmount();
            let (upper, _) = spec.upper.unwrap();
            sandbox.push(upper);
        }
    }
}

const MOVES: &[Verb] = &[Verb::rename, Verb::exchange, Verb::rename, Verb::mkdir, Verb::create];

#[test]
fn redirects_of_the_kernel_are_read() {
    needs_root!();
    needs_kernel_overlay!();
    grown_stacks(Kind::Kernel, &["redirect_dir=on"], Kind::Lamina, MOVES);
}

#[test]
fn redirects_of_ours_are_read_by_the_kernel() {
    needs_root!();
    needs_kernel_overlay!();
    grown_stacks(Kind::Lamina, &["redirect_dir=on"], Kind::Kernel, MOVES);
}

const CHANGES: &[Verb] = &[
    Verb::chmod,
    Verb::chown,
    Verb::utimens,
    Verb::setxattr,
    Verb::rename,
    Verb::exchange,
    Verb::append,
    Verb::truncate,
    Verb::link,
];

#[test]
fn metacopies_of_the_kernel_are_read() {
    needs_root!();
    needs_kernel_overlay!();
    grown_stacks(Kind::Kernel, &["redirect_dir=on", "metacopy=on"], Kind::Lamina, CHANGES);
}

#[test]
fn metacopies_of_ours_are_read_by_the_kernel() {
    needs_root!();
    needs_kernel_overlay!();
    grown_stacks(Kind::Lamina, &["redirect_dir=on", "metacopy=on"], Kind::Kernel, CHANGES);
}

// One step whatever the size: nothing of what the directory holds comes to the upper layer.
#[test]
fn a_redirect_moves_a_directory_without_its_files() {
    needs_root!();
    let mut c = Case::new(2);
    for n in 0..20 {
        put(c.l(n % 2, &format!("d/sub/f{n}")), "low");
    }
    put(c.l(1, "else/f"), "else");
    c.mount_with("redirect_dir=on,dir_rename_entries=0");
    fs::rename(c.m("d"), c.m("e")).unwrap();
    let redirect = |path: &str| {
        let value = getx(c.u(path), "trusted.overlay.redirect");
        value.map(|value| String::from_utf8(value).unwrap())
    };
    assert_eq!(redirect("e").unwrap(), "d");
    assert_eq!(names(c.u("e")), [""; 0]);
    fs::rename(c.m("e/sub"), c.m("else/sub")).unwrap();
    assert_eq!(redirect("else/sub").unwrap(), "/d/sub");
    assert_eq!(names(c.u("else/sub")), [""; 0]);
    // Renamed in the same directory again, the mark tells the truth already.
    fs::rename(c.m("e"), c.m("f")).unwrap();
    assert_eq!(redirect("f").unwrap(), "d");
    fs::rename(c.m("else"), c.m("f/else")).unwrap();
    assert_eq!(
        (redirect("f/else").unwrap(), redirect("f/else/sub").unwrap()),
        ("/else".into(), "/d/sub".into())
    );
    let before = look(c.m(""));
    assert_eq!(names(c.m("f/else/sub")).len(), 20);
    c.remount();
    assert_same("after a remount", &before, &look(c.m("")));
}

// A path of more than 256 bytes is none that the kernel takes: the directory is completed, or stays.
#[test]
fn past_the_longest_redirect_a_directory_is_copied() {
    needs_root!();
    let long = ["x".repeat(100), "y".repeat(100), "z".repeat(100)].join("/");
    let mut c = Case::new(1);
    put(c.l(0, &format!("{long}/d/f")), "low");
    c.mount_with("redirect_dir=on,dir_rename_entries=0");
    refused(fs::rename(c.m(&long).join("d"), c.m("d")), Errno::XDEV);
    fs::rename(c.m(&long).join("d"), c.m(&long).join("e")).unwrap();
    c.unmount();
    c.mount_with("redirect_dir=on");
    fs::rename(c.m(&long).join("e"), c.m("d")).unwrap();
    assert_eq!(text(c.m("d/f")), "low");
    assert_eq!(getx(c.u("d"), "trusted.overlay.redirect"), None);
    c.remount();
    assert_eq!(text(c.m("d/f")), "low");
}

/// A stack whose top has directories with marks by hand; `old` lies beneath.
fn by_hand(marks: &[(&str, &str, &str)]) -> Case {
    let c = Case::new(3);
    put(c.l(2, "old/inner"), "inner");
    put(c.l(2, "deep/er/old/inner"), "deeper");
    put(c.l(1, "plain"), "plain");
    for (dir, xattr, value) in marks {
        fs::create_dir_all(c.l(0, dir)).unwrap();
        setx(c.l(0, dir), xattr, value);
    }
    c
}

// `redirect_dir` says whose redirects are followed; what is not followed is refused, never shown
// without what belongs to it, and the rest of the tree stays usable.
#[test]
fn who_is_followed_is_an_option() {
    needs_root!();
    let mut c = by_hand(&[
        ("trusted", "trusted.overlay.redirect", "/old"),
        ("user", "user.overlay.redirect", "/old"),
    ]);
    for (options, trusted, user) in [
        ("rw", true, false),
        ("redirect_dir=off", true, false),
        ("redirect_dir=follow", true, true),
        ("redirect_dir=on", true, true),
        ("redirect_dir=nofollow", false, false),
    ] {
        c.mount_with(options);
        for (dir, is_followed) in [("trusted", trusted), ("user", user)] {
            if is_followed {
                assert_eq!(text(c.m(dir).join("inner")), "inner", "{options}");
            } else {
                refused(fs::metadata(c.m(dir)), Errno::PERM);
            }
        }
        assert_eq!(text(c.m("plain")), "plain");
        assert_eq!(text(c.m("old/inner")), "inner");
        c.unmount();
    }
}

// A redirect leads nowhere but down its own layers.
#[test]
fn no_redirect_leaves_the_layers() {
    needs_root!();
    let key = "trusted.overlay.redirect";
    let secret = "/var/tmp/fuse-tests-no-such-place";
    let mut c = by_hand(&[
        ("empty", key, ""),
        ("dots", key, ".."),
        ("up", key, "/../old"),
        ("slash", key, "deep/er"),
        ("double", key, "/deep//er"),
        ("nul", key, "old\0"),
        ("through", key, "/link/inner-dir"),
        ("last", key, "link"),
        ("file", key, "/plain/x"),
        ("none", key, secret),
        ("closed", key, "/old"),
        ("good", key, "/deep/er/old"),
    ]);
    let outside = c.sandbox.root().join("outside");
    put(outside.join("inner-dir/secret"), "secret");
    std::os::unix::fs::symlink(&outside, c.l(1, "link")).unwrap();
    setx(c.l(0, "closed"), "trusted.overlay.opaque", "y");
    c.mount();
    for dir in ["empty", "dots", "up", "slash", "double", "nul"] {
        refused(fs::metadata(c.m(dir)), Errno::IO);
    }
    for dir in ["through", "last", "file", "none", "closed"] {
        assert_eq!(names(c.m(dir)), [""; 0], "{dir}");
    }
    assert_eq!(text(c.m("good/inner")), "deeper");
    // Listed by names alone, too.
    assert_eq!(fs::read_dir(c.m("")).unwrap().count(), 12 + 4);
}

// Whiteouts, opaque marks and redirects on the way count for the layers beneath.
#[test]
fn what_lies_on_the_way_of_a_redirect_counts() {
    needs_root!();
    needs_kernel_overlay!();
    let key = "trusted.overlay.redirect";
    for (name, marks) in [
        ("nothing", &[][..]),
        ("whiteout on the way", &["whiteout a/b"][..]),
        ("whiteout at the end", &["whiteout a/b/c"]),
        ("file on the way", &["file a/b"]),
        ("file at the end", &["file a/b/c"]),
        ("symlink on the way", &["symlink a/b /"]),
        ("opaque on the way", &["file a/b/c/middle", "opaque a/b"]),
        ("opaque above, without the end", &["dir a", "opaque a"]),
        ("opaque at the end", &["file a/b/c/middle", "opaque a/b/c"]),
        ("merged", &["file a/b/c/middle"]),
        ("sibling on the way", &["file a/b/c/middle", "xattr a/b trusted.overlay.redirect z"]),
        ("path on the way", &["file a/b/c/middle", "xattr a trusted.overlay.redirect /y/x"]),
        (
            "two on the way",
            &[
                "file a/b/c/middle",
                "xattr a trusted.overlay.redirect q",
                "xattr a/b trusted.overlay.redirect z",
            ],
        ),
        (
            "path after path",
            &[
                "file a/b/c/middle",
                "xattr a trusted.overlay.redirect q",
                "xattr a/b trusted.overlay.redirect /y/x",
            ],
        ),
        ("at the end", &["file a/b/c/middle", "xattr a/b/c trusted.overlay.redirect d"]),
        ("path at the end", &["file a/b/c/middle", "xattr a/b/c trusted.overlay.redirect /y"]),
    ] {
        let mut c = Case::new(0);
        c.sandbox.layer(
            "file a/b/c/bottom 644 abc
             file a/z/c/bottom 644 azc
             file a/b/d/bottom 644 abd
             file q/b/c/bottom 644 qbc
             file q/z/c/bottom 644 qzc
             file y/x/c/bottom 644 yxc
             file y/x/b/c/bottom 644 yxbc
             file y/bottom 644 y",
        );
        c.sandbox.layer(&marks.join("\n"));
        c.sandbox.layer(&format!("dir m/red\nxattr m/red {key} /a/b/c\nfile m/red/top 644 top"));
        let kernel = c.sandbox.side(Kind::Kernel, "kernel").option("redirect_dir=on").mount();
        let ours = c.sandbox.side(Kind::Lamina, "ours").mount();
        assert_same(name, &look(ours.path()), &look(kernel.path()));
        assert_eq!(text(ours.path().join("m/red/top")), "top");
    }
}

// A name that is refused when it is looked up is listed all the same, to who looks at each name meanwhile too: then the kernel
// asks for attributes with the names.
#[test]
fn what_cannot_be_looked_up_is_listed() {
    needs_root!();
    let mut c = Case::new(1);
    put(c.l(0, "sub/old/inner"), "inner");
    for n in 0..20 {
        put(c.l(0, &format!("sub/{n}")), "");
    }
    for dir in ["one", "two"] {
        put(c.u(&format!("{dir}/own")), dir);
        setx(c.u(dir), "trusted.overlay.redirect", "/sub/old");
    }
    c.mount();
    assert_eq!(text(c.m("one/inner")) + &text(c.m("two/inner")), "innerinner");
    refused(fs::metadata(c.m("sub/old")), Errno::STALE);
    let refused: Vec<_> = fs::read_dir(c.m("sub"))
        .unwrap()
        .map(Result::unwrap)
        .filter(|entry| fs::metadata(entry.path()).is_err())
        .map(|entry| entry.file_name())
        .collect();
    assert_eq!(refused, ["old"]);
    assert_eq!(fs::read_dir(c.m("sub")).unwrap().count(), 21);
}

// Two directories that go on in the same one are two all the same; the kernel refuses the second.
#[test]
fn two_redirects_to_one_directory_do_not_mix() {
    needs_root!();
    let mut c = Case::new(1);
    put(c.l(0, "old/inner"), "inner");
    for dir in ["one", "two"] {
        put(c.u(&format!("{dir}/own")), dir);
        setx(c.u(dir), "trusted.overlay.redirect", "/old");
    }
    c.mount();
    assert_eq!(text(c.m("one/own")), "one");
    assert_eq!(text(c.m("two/own")), "two");
    assert_eq!((text(c.m("one/inner")), text(c.m("two/inner"))), ("inner".into(), "inner".into()));
    // The one that it came from has no number left.
    refused(fs::metadata(c.m("old")), Errno::STALE);
    gone(c.m("one/two"));
    let listed: Vec<PathBuf> = fs::read_dir(c.m("")).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(listed.len(), 3, "{listed:?}");
    assert!(!env::is_whiteout(&c.u("old")));
}
