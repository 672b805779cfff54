//! Owner, mode and type in xattrs: layers of stores with `force_mask`, and uppers with `xattr_permissions`.

use std::fs::{self, Permissions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use fuse_tests::case::{getx, mode, said, setx, sh};
use fuse_tests::fixture::{Kind, Sandbox};
use fuse_tests::{both, env, needs_root, skip};
use rustix::mount::UnmountFlags;

const ROOT: &str = "user.containers.override_stat";
const OLD: &str = "user.fuseoverlayfs.override_stat";

/// A layer as an engine unpacks it with `force_mask`: everything is a file or directory with the mask.
const STORE: &str = "
    xattr . user.containers.override_stat 0:0:0755:dir
    dir d 700
    xattr d user.containers.override_stat 5:6:02775:dir
    file d/f 700 content
    xattr d/f user.containers.override_stat 7:8:0640:file
    file suid 700 x
    xattr suid user.containers.override_stat 9:10:06755:file
    file null 700
    xattr null user.containers.override_stat 0:0:0666:char-1-3
    file disk 700
    xattr disk user.containers.override_stat 0:6:0660:block-8-300
    file pipe 700
    xattr pipe user.containers.override_stat 1:2:0600:pipe
    file sock 700
    xattr sock user.containers.override_stat 3:4:0777:socket
    file link 700 d/f
    xattr link user.containers.override_stat 11:12:0777:symlink
    file untyped 700 x
    xattr untyped user.containers.override_stat 13:14:4711
    file old 700 x
    xattr old user.fuseoverlayfs.override_stat 15:16:100640
    file plain 750 x
    symlink real target
    file odd 700 x
    xattr odd user.containers.override_stat 0:0:nonsense
    file prog 700 x
    xattr prog user.containers.override_stat 0:0:0755:file
    xattr prog user.containers.override_security.capability \\x01\\x00\\x00\\x02\\x00\\x20\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00
    xattr prog user.mine kept
";

/// What the layer is to show.
const SHOWN: &[&str] = &[
    "d 5:6 2775 directory",
    "d/f 7:8 640 regular file",
    "disk 0:6 660 block special file 8:12c",
    "link 11:12 777 symbolic link",
    "null 0:0 666 character special file 1:3",
    "old 15:16 640 regular file",
    "pipe 1:2 600 fifo",
    "prog 0:0 755 regular file",
    "sock 3:4 777 socket",
    "suid 9:10 6755 regular file",
    "untyped 13:14 4711 regular file",
];

fn show(dir: &Path, names: &[&str]) -> Vec<String> {
    let names = names.join(" ");
    let text = sh(dir, &format!("LC_ALL=C stat -c '%n %u:%g %a %F %t:%T' {names}"));
    let text = text.replace("regular empty file", "regular file");
    text.lines().map(|line| line.trim_end_matches(" 0:0").to_owned()).collect()
}

fn names(lines: &[&'static str]) -> Vec<&'static str> {
    lines.iter().map(|line| line.split(' ').next().unwrap()).collect()
}

// With or without the option: the root of the layer tells. All forms and types, in lookups and in listings; what makes no
// sense is an error and not the mask.
fn a_store_with_force_mask_shows_what_it_holds() {
    let mut sandbox = Sandbox::new();
    let layer = sandbox.layer(STORE);
    chown(layer.join("plain"), Some(17), Some(18)).unwrap();
    sandbox.forget_seals();
    for options in ["", "xattr_permissions=2"] {
        // The first listing comes with attributes, the second by names and types alone.
        let mut spec = sandbox.side(Kind::Lamina, if options.is_empty() { "a" } else { "b" });
        spec.options = vec![options.into()];
        let mount = spec.mount();
        let dir = mount.path();
        for _ in 0..2 {
            let listed = sh(
                dir,
                "/usr/bin/python3 -c 'import os\nfor e in sorted(os.scandir(\".\"), key=lambda e: e.name): print(e.name, os.stat(e, follow_symlinks=False).st_mode >> 12 if e.name != \"odd\" else \"\", e.is_file(follow_symlinks=False), e.is_dir(follow_symlinks=False), e.is_symlink())'",
            );
            for (name, kind) in [
                ("null", "2 False False False"),
                ("disk", "6 False False False"),
                ("pipe", "1 False False False"),
                ("sock", "12 False False False"),
                ("link", "10 False False True"),
                ("d", "4 False True False"),
                ("plain", "8 True False False"),
            ] {
                assert!(listed.contains(&format!("{name} {kind}\n")), "{name}: {listed}");
            }
        }
        assert_eq!(show(dir, &names(SHOWN)), SHOWN);
        assert_eq!(show(dir, &["plain"]), ["plain 17:18 750 regular file"]);
        assert_eq!(fs::read_link(dir.join("link")).unwrap(), Path::new("d/f"));
        assert_eq!(fs::read_link(dir.join("real")).unwrap(), Path::new("target"));
        let odd = fs::symlink_metadata(dir.join("odd")).unwrap_err();
        assert_eq!(odd.raw_os_error(), Some(5), "{odd}");
        // The marks are not shown; capabilities are, under their own name.
        assert_eq!(getx(dir.join("d/f"), ROOT), None);
        assert_eq!(getx(dir.join("old"), OLD), None);
        assert_eq!(
            sh(dir, "getcap prog; getfattr --absolute-names -m - prog d/f suid"),
            "prog cap_net_raw=ep\n# file: prog\nsecurity.capability\nuser.mine\n\n"
        );
    }
}
both!(a_store_with_force_mask_shows_what_it_holds);

/// Changes of every kind; the last line shows what came of them.
const CHANGES: &str = "
    umask 022
    echo x > new; mkdir new.d; mkfifo new.p; ln -s new new.s
    /usr/bin/python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"new.k\")'
    chown 20:21 new new.d new.p new.k
    chmod 4711 new; chown 22 new; chmod 2775 new.d; chmod 1777 d; chmod 600 new.k
    touch new.d/inherits; mkdir new.d/inherits.d
    echo more >> d/f; chmod 604 d/f
    chown 23:24 suid pipe null sock; chmod 6755 suid; chmod 6755 untyped; chown 25 untyped
    echo > old; touch -d 2001-01-01 disk; mv prog d/prog; ln plain hard; chmod 640 plain
";
const CHANGED: &[&str] = &[
    "d 5:6 3777 directory",
    "d/f 7:8 604 regular file",
    "d/prog 0:0 755 regular file",
    "disk 0:6 660 block special file 8:12c",
    "hard 0:0 640 regular file",
    "new 22:21 711 regular file",
    "new.d 20:21 2775 directory",
    "new.d/inherits 0:21 644 regular file",
    "new.d/inherits.d 0:21 2755 directory",
    "new.k 20:21 600 socket",
    "new.p 20:21 644 fifo",
    "null 23:24 666 character special file 1:3",
    "old 15:16 640 regular file",
    "pipe 23:24 600 fifo",
    "plain 0:0 640 regular file",
    "sock 23:24 777 socket",
    "suid 23:24 6755 regular file",
    "untyped 25:14 755 regular file",
];

/// All below a directory that is no symlink.
fn walk(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut todo = vec![dir.to_path_buf()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            let kind = fs::symlink_metadata(&path).unwrap().file_type();
            if kind.is_dir() {
                todo.push(path.clone());
            }
            if !kind.is_symlink() {
                found.push(path);
            }
        }
        found.push(dir);
    }
    found
}

// Everything that is made, changed or copied up stands in an xattr, with its type, on files of the server's own that have
// the mask of the upper's root. Live, and after a remount with and without the option.
fn an_upper_keeps_everything_in_xattrs() {
    let mut sandbox = Sandbox::new();
    sandbox.layer(STORE);
    fs::set_permissions(sandbox.upper(), Permissions::from_mode(0o700)).unwrap();
    let mount = sandbox.spec(Kind::Lamina).option("xattr_permissions=2").mount();
    assert_eq!(mode(mount.path()), 0o755, "the root is that of the first lower");
    sh(mount.path(), CHANGES);
    assert_eq!(show(mount.path(), &names(CHANGED)), CHANGED);
    let mount = mount.remount();
    assert_eq!(show(mount.path(), &names(CHANGED)), CHANGED);
    drop(mount);
    for path in walk(&sandbox.upper()) {
        let meta = fs::symlink_metadata(&path).unwrap();
        let kind = meta.file_type();
        if kind.is_char_device() && meta.rdev() == 0 {
            continue;
        }
        assert!(kind.is_file() || kind.is_dir(), "{}", path.display());
        assert_eq!((meta.mode() & 0o7777, meta.uid()), (0o700, 0), "{}", path.display());
        let value = String::from_utf8(getx(&path, ROOT).unwrap()).unwrap();
        assert_eq!(value.split(':').count(), 4, "{}: {value}", path.display());
    }
    let stored =
        |name: &str| String::from_utf8(getx(sandbox.upper().join(name), ROOT).unwrap()).unwrap();
    assert_eq!(stored("."), "0:0:0755:dir");
    assert_eq!(stored("new"), "22:21:0711:file");
    assert_eq!(stored("new.d"), "20:21:2775:dir");
    assert_eq!(stored("new.p"), "20:21:0644:pipe");
    assert_eq!(stored("null"), "23:24:0666:char-1-3");
    assert_eq!(stored("disk"), "0:6:0660:block-8-300");
    assert_eq!(stored("sock"), "23:24:0777:socket");
    let mount = sandbox.spec(Kind::Lamina).mount();
    assert_eq!(show(mount.path(), &names(CHANGED)), CHANGED);
    // The layer is one with overrides whatever the options.
    sh(mount.path(), "chown 30:31 new && mkdir more");
    drop(mount);
    assert_eq!(stored("new"), "30:31:0711:file");
    assert_eq!(stored("more"), "0:0:0755:dir");
}
both!(an_upper_keeps_everything_in_xattrs);

// Between layers with and without overrides everything is copied up as what it shows.
#[test]
fn copies_go_between_layers_with_and_without_overrides() {
    needs_root!();
    let mut sandbox = Sandbox::new();
    sandbox.layer(STORE);
    let mount = sandbox.spec(Kind::Lamina).mount();
    let all = "touch -a d d/f disk null old pipe prog sock suid untyped plain; touch -ha link";
    sh(mount.path(), all);
    assert_eq!(show(mount.path(), &names(SHOWN)), SHOWN);
    drop(mount);
    // The upper is a plain one, as if they had lain in a plain layer.
    assert_eq!(show(&sandbox.upper(), &names(SHOWN)), SHOWN);
    assert_eq!(sh(sandbox.upper(), "getcap prog"), "prog cap_net_raw=ep\n");
    assert_eq!(fs::read_link(sandbox.upper().join("link")).unwrap(), Path::new("d/f"));
    for path in walk(&sandbox.upper()) {
        assert_eq!(getx(&path, ROOT), None, "{}", path.display());
    }
    // And from there into one with overrides.
    let mut back = Sandbox::new();
    back.layer("file hidden 644 x");
    let mut spec = back.spec(Kind::Lamina).option("xattr_permissions=1");
    spec.lowers = vec![sandbox.upper()];
    let mount = spec.mount();
    sh(mount.path(), all);
    assert_eq!(show(mount.path(), &names(SHOWN)), SHOWN);
    drop(mount);
    let stored = |name: &str| {
        let value = getx(back.upper().join(name), "security.fuseoverlayfs.override_stat");
        String::from_utf8(value.unwrap()).unwrap()
    };
    assert_eq!(stored("null"), "0:0:0666:char-1-3");
    assert_eq!(stored("suid"), "9:10:6755:file");
    assert_eq!(stored("d"), "5:6:2775:dir");
}

// What is a whiteout to a nested overlay stays one when it is copied up, and does not become one of ours.
fn nested_whiteouts_are_copied_up_as_what_they_are() {
    let mut sandbox = Sandbox::new();
    let layer = sandbox.layer("file w 644\nfile d/w 644");
    let name = format!("{}overlay.whiteout", env::overlay_prefix());
    for path in ["w", "d/w"] {
        setx(layer.join(path), &name, "y");
    }
    let mount = sandbox.spec(Kind::Lamina).option("xattr_permissions=2").mount();
    let shown = |path: &Path| sh(path, "chown -h 5:6 w; mv d e; stat -c '%n %u %F %t:%T' w e/w");
    let expected = "w 5 character special file 0:0\ne/w 0 character special file 0:0\n";
    assert_eq!(shown(mount.path()), expected);
    let mount = mount.remount();
    assert_eq!(sh(mount.path(), "stat -c '%n %u %F %t:%T' w e/w"), expected);
    // As a lower layer of a plain upper.
    drop(mount);
    let mut over = sandbox.side(Kind::Lamina, "over");
    over.lowers = vec![sandbox.upper()];
    let mount = over.mount();
    let again = sh(mount.path(), "chown -h 5:6 w; touch -a e/w; stat -c '%n %u %F %t:%T' w e/w");
    assert_eq!(again, expected);
    let mount = mount.remount();
    assert_eq!(sh(mount.path(), "stat -c '%n %u %F %t:%T' w e/w"), expected);
}
both!(nested_whiteouts_are_copied_up_as_what_they_are);

// Capabilities go with the owner and with the data, and stay with the mode.
fn capabilities_stand_beside() {
    let mut sandbox = Sandbox::new();
    sandbox.layer(STORE);
    let mount = sandbox.spec(Kind::Lamina).option("xattr_permissions=2").mount();
    let script = "setcap cap_net_bind_service=ep suid; chmod 755 suid; getcap suid prog
                  cp -p suid a; cp -p suid b; cp -p suid c; for f in a b c; do setcap cap_chown=p $f; done
                  chown 5 a; echo >> b; : > c; getcap a b c suid; touch prog; getcap prog; chgrp 7 prog; getcap prog";
    assert_eq!(
        sh(mount.path(), script),
        "suid cap_net_bind_service=ep\nprog cap_net_raw=ep\nsuid cap_net_bind_service=ep\n\
         prog cap_net_raw=ep\n"
    );
    drop(mount);
    let name = "user.containers.override_security.capability";
    assert!(getx(sandbox.upper().join("suid"), name).is_some());
    for gone in ["a", "b", "c", "prog"] {
        assert_eq!(getx(sandbox.upper().join(gone), name), None, "{gone}");
    }
}
both!(capabilities_stand_beside);

// Setuid and setgid go when somebody else writes, as from an inode.
#[test]
fn setuid_in_an_xattr_goes_with_a_write() {
    needs_root!();
    let mut sandbox = Sandbox::new();
    sandbox.layer("file f 6777 x\nfile g 6777 x");
    let mount = sandbox.spec(Kind::Lamina).option("xattr_permissions=2").mount();
    sh(
        mount.path(),
        "chmod 6777 f g && setpriv --reuid 1000 --regid 1000 --clear-groups sh -c 'echo >> f; : > g'",
    );
    assert_eq!(
        show(mount.path(), &["f", "g"]),
        ["f 0:0 777 regular file", "g 0:0 777 regular file"]
    );
}

// The bit that says so is in an xattr, which the kernel does not see.
#[test]
fn a_symlink_in_a_setgid_directory_is_the_groups() {
    needs_root!();
    let mut sandbox = Sandbox::new();
    sandbox.layer("dir d 2775\nowner d 1000 2000\ndir e 755\nowner e 1000 2000");
    let mount = sandbox.spec(Kind::Lamina).option("xattr_permissions=2").mount();
    sh(mount.path(), "ln -s x d/l; ln -s x e/l; touch d/f");
    assert_eq!(
        show(mount.path(), &["d/l", "e/l", "d/f"]),
        [
            "d/l 0:2000 777 symbolic link",
            "e/l 0:0 777 symbolic link",
            "d/f 0:2000 644 regular file"
        ]
    );
}

// An engine within an engine: its own marks are data of the mount, and come back as they were.
#[test]
fn marks_of_an_engine_inside_are_its_own() {
    needs_root!();
    let mut sandbox = Sandbox::new();
    sandbox.layer("dir store/layer");
    for options in ["xattr_permissions=2", "xattr_permissions=0"] {
        let mut spec = sandbox.side(Kind::Lamina, &options[18..]);
        spec.options = vec![options.into()];
        let mount = spec.mount();
        let layer = mount.path().join("store/layer");
        sh(
            &layer,
            "setfattr -n user.containers.override_stat -v 5:6:0700:dir . && touch f && \
                    setfattr -n user.containers.override_stat -v 7:8:0600 f && chown 9:9 f",
        );
        assert_eq!(getx(&layer, ROOT).as_deref(), Some(&b"5:6:0700:dir"[..]));
        assert_eq!(show(&layer, &["f"]), ["f 9:9 644 regular file"]);
        let mut inner = Sandbox::new();
        inner.layer("file x 644 x");
        let mut spec = inner.spec(Kind::Lamina);
        spec.lowers = vec![layer.clone()];
        let nested = spec.mount();
        assert_eq!(show(nested.path(), &["f"]), ["f 7:8 600 regular file"]);
        drop(nested);
        drop(inner);
        // But nobody makes the layer itself one of that kind from inside.
        let out = Command::new("setfattr")
            .args(["-n", ROOT, "-v", "0:0:04755"])
            .arg(mount.path())
            .output()
            .unwrap();
        assert_eq!(out.status.success(), options.ends_with('2'), "{}", said(&out));
        drop(mount.remount());
    }
}

// Root of the machine does not take a user's word for who owns his files.
#[test]
fn a_users_directory_does_not_make_programs_of_root() {
    needs_root!();
    let mut sandbox = Sandbox::new();
    let layer = sandbox.layer(
        "file sh 755 x\nxattr sh user.containers.override_stat 0:0:04755:file\n\
                               xattr . user.containers.override_stat 0:0:0755:dir",
    );
    chown(&layer, Some(1000), Some(1000)).unwrap();
    sandbox.forget_seals();
    let refused = sandbox.spec(Kind::Lamina).try_mount().expect_err("mounted");
    assert!(said(&refused).contains("xattr_permissions=2"), "{}", said(&refused));
    let mount = sandbox.spec(Kind::Lamina).option("xattr_permissions=2").mount();
    assert_eq!(show(mount.path(), &["sh"]), ["sh 0:0 4755 regular file"]);
}

// fuse-overlayfs reads what we keep, and we what it keeps.
#[test]
fn uppers_with_overrides_are_exchanged_with_fuse_overlayfs() {
    needs_root!();
    let program = "/usr/bin/fuse-overlayfs";
    if !Path::new(program).exists() {
        skip!("there is no fuse-overlayfs");
    }
    let mut sandbox = Sandbox::new();
    sandbox.layer(
        "xattr . user.containers.override_stat 0:0:0755:dir\ndir d 700\n\
                   xattr d user.containers.override_stat 5:6:0755:dir\nfile d/f 700 x\n\
                   xattr d/f user.containers.override_stat 7:8:0644:file",
    );
    // What both can do: fuse-overlayfs 1.10 loses the owner on chmod, and types.
    let script = "umask 022; echo x > new; mkdir new.d; chown 20:21 new; chown 22:23 new.d; \
                  echo more >> d/f; chown 9:9 d/f; touch new.d/n";
    let paths = ["new", "new.d", "new.d/n", "d", "d/f"];
    let peer = |side: &str, options: &str| {
        let spec = sandbox.side(Kind::Lamina, side).option(options);
        let out =
            Command::new(program).arg("-o").arg(spec.option_text()).arg(&spec.merged).output();
        assert!(out.as_ref().unwrap().status.success(), "{}", said(&out.unwrap()));
        spec.merged
    };
    let end = |merged: &Path| rustix::mount::unmount(merged, UnmountFlags::DETACH).unwrap();
    // It reads the privileged form alone of those that we write.
    let ours = sandbox.side(Kind::Lamina, "ours").option("xattr_permissions=1").mount();
    sh(ours.path(), script);
    let expected = show(ours.path(), &paths);
    ours.unmount();
    let merged = peer("ours", "xattr_permissions=1");
    let seen = show(&merged, &paths);
    end(&merged);
    assert_eq!(seen, expected, "ours, as it is read");
    for options in ["xattr_permissions=1", "xattr_permissions=2"] {
        let side = &options[18..];
        let merged = peer(side, options);
        sh(&merged, script);
        end(&merged);
        let merged = peer(side, options);
        let theirs = show(&merged, &paths);
        end(&merged);
        for again in ["", options] {
            let mut spec = sandbox.side(Kind::Lamina, side);
            spec.options = vec![again.into()];
            let mount = spec.mount();
            assert_eq!(show(mount.path(), &paths), theirs, "theirs with {options}, as we read it");
            // What we change is newer than what it wrote.
            sh(mount.path(), "chown 40:41 d/f && chown 20:21 new");
            let mount = mount.remount();
            assert_eq!(show(mount.path(), &["d/f"]), ["d/f 40:41 644 regular file"]);
            sh(mount.path(), "chown 9:9 d/f");
        }
    }
}
