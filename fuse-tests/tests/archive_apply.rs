//! Archives of other programs become layers: the same tree as GNU tar unpacks, whiteouts in the form asked for, and what
//! kernel overlay shows of them.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use fuse_tests::case::{gone, mode, nlink, put, setx, sh, text};
use fuse_tests::env::{self, Base, is_whiteout};
use fuse_tests::fixture::{Kind, Sandbox, fill};
use fuse_tests::tarball::{Item, Tar};
use fuse_tests::tree::{self, Options, snapshot, snapshot_with};
use fuse_tests::{needs_kernel_overlay, needs_root, skip};

struct Dir {
    path: PathBuf,
    _base: Arc<Base>,
}

impl Dir {
    fn new() -> Dir {
        let base = Base::get();
        let path = base.unique("apply");
        std::fs::create_dir(&path).unwrap();
        Dir { path, _base: base }
    }

    fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = Command::new("rm").arg("-rf").arg(&self.path).status();
    }
}

fn lamina<S: AsRef<OsStr>>(arguments: &[S]) -> Output {
    Command::new(env::lamina()).args(arguments).output().unwrap()
}

#[track_caller]
fn apply(layer: &Path, archive: &Path, more: &[&str]) -> String {
    let mut arguments =
        vec!["layer".as_ref(), "apply".as_ref(), "--to".as_ref(), layer.as_os_str()];
    arguments.extend(more.iter().map(OsStr::new));
    arguments.push(archive.as_os_str());
    let out = lamina(&arguments);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// A tree with everything that archives can hold.
fn make_tree(root: &Path) {
    std::fs::create_dir(root).unwrap();
    fill(
        root,
        "
        dir bin 755
        file bin/tool 4755 size:100000
        link bin/other bin/tool
        symlink bin/sh tool
        symlink etc/abs /usr/share/x
        dir tmp 1777
        dir closed 500
        file closed/in 400 secret
        fifo run/pipe 620
        char dev/null 1 3
        block dev/sda 8 0
        file holes 644 hole:9000000
        file owned 640 text
        owner owned 1234 56789
        owner tmp 70000 3000000
        file odd\\snames\\xff 644 x
        mtime owned 1000000000.123456789
        mtime bin 1100000000.5
        mtime holes -5
        ",
    );
    put(root.join("d".repeat(120)).join("e".repeat(200)), "long");
    setx(root.join("owned"), "user.a", "1\n=2");
    setx(root.join("tmp"), "user.dir", "");
    setx(
        root.join("bin/tool"),
        "security.capability",
        [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    );
    sh(
        root,
        "printf a | dd of=holes bs=1 seek=4000000 conv=notrunc status=none; touch -d @-5 holes",
    );
}

#[test]
fn the_tree_is_what_gnu_tar_unpacks_in_each_of_its_formats() {
    needs_root!();
    let dir = Dir::new();
    make_tree(&dir.join("tree"));
    for (name, options) in [
        ("gnu", "--format=gnu"),
        ("gnu-sparse", "--format=gnu --sparse"),
        ("pax", "--format=pax --xattrs --xattrs-include=*"),
        ("pax-0.0", "--format=pax --sparse --sparse-version=0.0"),
        ("pax-0.1", "--format=pax --sparse --sparse-version=0.1"),
        ("pax-1.0", "--format=pax --sparse --sparse-version=1.0 --xattrs --xattrs-include=*"),
    ] {
        let archive = dir.join(&format!("{name}.tar"));
        let (ours, theirs) = (dir.join(&format!("{name}-ours")), dir.join(&format!("{name}-tar")));
        sh(
            &dir.path,
            &format!(
                "tar {options} -C tree -cf {name}.tar . && mkdir {name}-tar && \
            tar --xattrs --xattrs-include=* --numeric-owner -C {name}-tar -xpf {name}.tar"
            ),
        );
        apply(&ours, &archive, &[]);
        tree::assert_same(name, &snapshot(&theirs), &snapshot(&ours));
        if name.contains("sparse") || name.contains('.') {
            let blocks = std::fs::metadata(ours.join("holes")).unwrap().blocks();
            assert!(blocks * 512 < 1_000_000, "{name}: {blocks} blocks");
        }
    }
}

#[test]
fn every_compression_gives_the_same_layer_and_diff_id() {
    let dir = Dir::new();
    put(dir.join("tree/a/b"), "x".repeat(100_000));
    sh(
        &dir.path,
        "tar -C tree -cf t.tar . && gzip -k t.tar && zstd -q t.tar && xz -k t.tar && bzip2 -k t.tar",
    );
    let wanted = sh(&dir.path, "sha256sum t.tar").split(' ').next().unwrap().to_owned();
    let mut seen = None;
    for (n, name) in ["t.tar", "t.tar.gz", "t.tar.zst", "t.tar.xz", "t.tar.bz2"].iter().enumerate()
    {
        let layer = dir.join(&format!("layer{n}"));
        let blob =
            sh(&dir.path, &format!("sha256sum {name}")).split(' ').next().unwrap().to_owned();
        let more = ["--json", "--digest", &blob, "--diff-id", &wanted, "--whiteouts", "files"];
        let told = apply(&layer, &dir.join(name), &more);
        assert!(told.contains(&format!("\"diff_id\":\"sha256:{wanted}\"")), "{told}");
        let tree = snapshot(&layer);
        if let Some(first) = &seen {
            tree::assert_same(name, first, &tree);
        }
        seen.get_or_insert(tree);
    }
}

fn whiteouts() -> Vec<u8> {
    Tar::of([
        Item::dir("kept"),
        Item::file("kept/new", "n"),
        Item::file("kept/.wh.old", ""),
        Item::file(".wh.gone", ""),
        Item::file("late", "l"),
        Item::file(".wh.late", ""),
        Item::file(".wh.early", ""),
        Item::dir("early"),
        Item::file("early/new", "n"),
        Item::dir("closed"),
        Item::file("closed/new", "n"),
        Item::file("closed/.wh..wh..opq", ""),
        Item::dir("later"),
        Item::file("later/new", "n"),
        Item::file(".wh.later", ""),
        Item::file(".wh.nothing", ""),
        Item::file(".wh.nothing", ""),
    ])
}

const LOWER: &str = "
    file kept/old
    file kept/stays
    dir gone/deep
    file late 644 lower
    file early/old
    file closed/old
    file later/old
    file untouched
";

const SHOWN: [&str; 12] = [
    "closed",
    "closed/new",
    "early",
    "early/new",
    "kept",
    "kept/new",
    "kept/stays",
    "late",
    "later",
    "later/new",
    "untouched",
    "x",
];

#[test]
fn whiteouts_hide_lower_layers_only_in_every_form() {
    needs_root!();
    needs_kernel_overlay!();
    for (form, kinds) in
        [("overlay", &[Kind::Kernel, Kind::Lamina][..]), ("files", &[Kind::Lamina])]
    {
        for kind in kinds {
            let mut s = Sandbox::new();
            s.layer(LOWER);
            let archive = s.root().join("layer.tar");
            std::fs::write(&archive, whiteouts()).unwrap();
            let upper = s.upper();
            sh(s.root(), &format!("rmdir {}", upper.display()));
            apply(&upper, &archive, &["--whiteouts", form]);
            let mount = s.mount(*kind);
            put(mount.path().join("x"), "x");
            let names = snapshot(mount.path()).names();
            assert_eq!(names, SHOWN, "{form} {kind:?}");
            assert_eq!(text(mount.path().join("late")), "l");
        }
    }
}

#[test]
fn a_flat_tree_is_what_the_stack_shows() {
    if !env::is_root() {
        skip!(
            "needs root, also of a user namespace: files are given to the owners that the archive names"
        );
    }
    let dir = Dir::new();
    let flat = dir.join("flat");
    std::fs::create_dir(&flat).unwrap();
    fill(&flat, LOWER);
    let archive = dir.join("layer.tar");
    std::fs::write(&archive, whiteouts()).unwrap();
    apply(&flat, &archive, &["--whiteouts", "flat"]);
    assert_eq!(snapshot(&flat).names(), SHOWN[..11]);
    assert_eq!(text(flat.join("late")), "l");
}

#[test]
fn marks_have_the_form_asked_for() {
    needs_root!();
    let dir = Dir::new();
    let archive = dir.join("layer.tar");
    std::fs::write(&archive, whiteouts()).unwrap();
    for form in ["overlay", "user", "files"] {
        apply(&dir.join(form), &archive, &["--whiteouts", form]);
    }
    assert!(is_whiteout(&dir.join("overlay/gone")));
    assert!(is_whiteout(&dir.join("user/gone")));
    assert!(dir.join("files/.wh.gone").is_file());
    gone(dir.join("files/gone"));
    for (form, xattr) in [("overlay", "trusted.overlay.opaque"), ("user", "user.overlay.opaque")] {
        for name in ["closed", "early", "later"] {
            let value = fuse_tests::case::getx(dir.join(form).join(name), xattr);
            assert_eq!(value.as_deref(), Some(&b"y"[..]), "{form} {name}");
        }
        gone(dir.join(form).join("closed/.wh..wh..opq"));
    }
    assert!(dir.join("files/closed/.wh..wh..opq").is_file());
}

#[test]
fn ids_are_mapped_and_what_has_no_id_is_refused() {
    needs_root!();
    let dir = Dir::new();
    let archive = dir.join("a.tar");
    std::fs::write(&archive, Tar::of([Item::file("d/a", "x").owner(5, 6)])).unwrap();
    apply(&dir.join("layer"), &archive, &["--uidmap", "0:100000:10", "--gidmap", "0:200000:10"]);
    let meta = std::fs::metadata(dir.join("layer/d/a")).unwrap();
    assert_eq!((meta.uid(), meta.gid()), (100_005, 200_006));
    let parent = std::fs::metadata(dir.join("layer/d")).unwrap();
    assert_eq!((parent.uid(), parent.gid()), (100_000, 200_000));
    std::fs::write(&archive, Tar::of([Item::file("a", "x").owner(10, 0)])).unwrap();
    let to = dir.join("second");
    let arguments = [
        "layer".as_ref(),
        "apply".as_ref(),
        "--to".as_ref(),
        to.as_os_str(),
        "--uidmap".as_ref(),
        "0:100000:10".as_ref(),
        archive.as_os_str(),
    ];
    let out = lamina(&arguments);
    assert_eq!(out.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&out.stderr).contains("has no id here"));
}

#[test]
fn a_forced_mask_keeps_the_truth_in_an_xattr() {
    needs_root!();
    let dir = Dir::new();
    let archive = dir.join("a.tar");
    let items = [
        Item::dir("d").mode(0o1777).owner(1, 2),
        Item::file("d/f", "x").mode(0o4755).owner(3, 4),
        Item::symlink("d/l", "f"),
        Item::new(b'3', "d/c").mode(0o600).device(5, 1),
        Item::new(b'6', "d/p").mode(0o640),
    ];
    std::fs::write(&archive, Tar::of(items)).unwrap();
    apply(&dir.join("layer"), &archive, &["--force-mask", "private"]);
    for (name, value) in [
        ("", "0:0:0755:dir"),
        ("d", "1:2:1777:dir"),
        ("d/f", "3:4:4755:file"),
        ("d/c", "0:0:0600:char-5-1"),
        ("d/p", "0:0:0640:pipe"),
    ] {
        let path = dir.join("layer").join(name);
        assert_eq!(mode(&path), 0o700, "{name}");
        let told = fuse_tests::case::getx(&path, "user.containers.override_stat").unwrap();
        assert_eq!(String::from_utf8(told).unwrap(), value, "{name}");
        let meta = std::fs::metadata(&path).unwrap();
        assert_eq!((meta.uid(), meta.gid()), (0, 0));
        assert!(meta.is_dir() || meta.is_file());
    }
    assert!(dir.join("layer/d/l").is_symlink());
}

#[test]
fn somebody_without_privilege_gets_what_he_may_have() {
    needs_root!();
    let dir = Dir::new();
    sh(&dir.path, "mkdir mine && chown 1000:1000 mine && chmod 755 .");
    let archive = dir.join("a.tar");
    let items = [
        Item::dir("d").mode(0o555).owner(1000, 1000),
        Item::file("d/f", "x").owner(1000, 1000),
        Item::file("d/.wh.g", "").owner(1000, 1000),
    ];
    std::fs::write(&archive, Tar::of(items)).unwrap();
    sh(&dir.path, &format!("chmod 644 a.tar; install -m 755 {} lamina", env::lamina().display()));
    let out = fuse_tests::case::as_user(
        1000,
        &dir.path,
        "./lamina layer apply --ignore-chown-errors --to mine/layer a.tar",
    );
    assert!(out.status.success(), "{}", fuse_tests::case::said(&out));
    assert_eq!(mode(dir.join("mine/layer/d")), 0o555);
    assert!(is_whiteout(&dir.join("mine/layer/d/g")));
}

/// Xattrs are set before the mode, which may forbid it.
#[test]
fn somebody_without_privilege_gets_xattrs_of_what_cannot_be_written() {
    needs_root!();
    let dir = Dir::new();
    sh(&dir.path, "mkdir mine && chown 1000:1000 mine && chmod 755 .");
    let archive = dir.join("a.tar");
    let pax = Item::pax(&[("SCHILY.xattr.user.x", b"kept")]);
    let items = [
        pax.clone(),
        Item::dir("d").mode(0o555).owner(1000, 1000),
        pax.clone(),
        Item::file("d/f", "x").mode(0o444).owner(1000, 1000),
        pax,
        Item::file("none", "x").mode(0).owner(1000, 1000),
    ];
    std::fs::write(&archive, Tar::of(items)).unwrap();
    sh(&dir.path, &format!("chmod 644 a.tar; install -m 755 {} lamina", env::lamina().display()));
    for (layer, more) in [("plain", "--ignore-chown-errors"), ("mask", "--force-mask 0500")] {
        let command = format!("./lamina layer apply {more} --to mine/{layer} a.tar");
        let out = fuse_tests::case::as_user(1000, &dir.path, &command);
        assert!(out.status.success(), "{}", fuse_tests::case::said(&out));
        for (name, wanted) in [("d", 0o555), ("d/f", 0o444), ("none", 0)] {
            let path = dir.join("mine").join(layer).join(name);
            assert_eq!(mode(&path), if layer == "mask" { 0o500 } else { wanted }, "{name}");
            let kept = fuse_tests::case::getx(&path, "user.x");
            assert_eq!(kept.as_deref(), Some(&b"kept"[..]), "{layer} {name}");
        }
    }
}

#[test]
fn links_and_duplicates() {
    let dir = Dir::new();
    let archive = dir.join("a.tar");
    let items = [
        Item::file("a", "one"),
        Item::hard_link("b", "./a"),
        Item::hard_link("c", "/b"),
        Item::file("b", "two"),
        Item::dir("d").mode(0o700),
        Item::file("d/x", "x"),
        Item::dir("d").mode(0o711),
        Item::hard_link("d/a", "a"),
    ];
    std::fs::write(&archive, Tar::of(items)).unwrap();
    apply(&dir.join("layer"), &archive, &["--ignore-chown-errors", "--whiteouts", "files"]);
    let layer = dir.join("layer");
    assert_eq!((text(layer.join("a")), text(layer.join("b"))), ("one".into(), "two".into()));
    assert_eq!(nlink(layer.join("a")), 3, "a, c and d/a");
    assert_eq!(mode(layer.join("d")), 0o711);
    assert_eq!(text(layer.join("d/x")), "x");
}

#[test]
fn a_taken_name_is_left_alone() {
    if !env::is_root() {
        skip!(
            "needs root, also of a user namespace: files are given to the owners that the archive names"
        );
    }
    let dir = Dir::new();
    let archive = dir.join("a.tar");
    std::fs::write(&archive, Tar::of([Item::file("a", "x")])).unwrap();
    put(dir.join("layer/mine"), "mine");
    let layer = dir.join("layer");
    let out = lamina(&[
        "layer".as_ref(),
        "apply".as_ref(),
        "--to".as_ref(),
        layer.as_os_str(),
        archive.as_os_str(),
    ]);
    assert_eq!(out.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&out.stderr).contains("File exists"));
    let options = Options { private_xattrs: true, ..Options::default() };
    assert_eq!(snapshot_with(&layer, options).names(), ["mine"]);
    assert_eq!(fuse_tests::case::names(&dir.path), ["a.tar", "layer"]);
}

/// Killed at each of the calls that it makes, it leaves no layer or a whole one.
#[test]
fn killed_at_any_call_it_leaves_no_layer() {
    if Command::new("strace").arg("-V").output().is_err() {
        skip!("needs strace");
    }
    let dir = Dir::new();
    let archive = dir.join("a.tar");
    let items = [
        Item::pax(&[("SCHILY.xattr.user.x", b"y")]),
        Item::dir("d"),
        Item::file("d/f", "x"),
        Item::file("d/.wh.gone", ""),
        Item::file("d/.wh..wh..opq", ""),
        Item::symlink("l", "d"),
        Item::hard_link("h", "d/f"),
        Item::new(b'6', "p"),
        Item::pax(&[("GNU.sparse.size", b"100"), ("GNU.sparse.map", b"0,1")]),
        Item::file("s", "x"),
        Item::file("l", "in place of the symlink"),
    ];
    std::fs::write(&archive, Tar::of(items)).unwrap();
    let layer = dir.join("layer");
    let traced = |more: &[&str]| {
        Command::new("strace")
            .args(["-f", "-qq"])
            .args(more)
            .arg(env::lamina())
            .args(["layer", "apply", "--sync", "--ignore-chown-errors", "--to"])
            .arg(&layer)
            .arg(&archive)
            .output()
            .unwrap()
    };
    let log = dir.join("calls");
    assert!(traced(&["-o", log.to_str().unwrap()]).status.success());
    // Of the layer and of whiteouts the archive gives no time.
    let seen = || {
        let mut seen = snapshot(&layer);
        for (path, entry) in &mut seen.entries {
            if [Path::new("."), Path::new("d/gone")].contains(&path.as_path()) {
                entry.clear("mtime");
            }
        }
        seen
    };
    let whole = seen();
    assert!(whole.names().len() >= 7, "{:?}", whole.names());
    std::fs::remove_dir_all(&layer).unwrap();
    // A line is a process, a call and its arguments.
    let calls: BTreeSet<String> = std::fs::read_to_string(&log)
        .unwrap()
        .lines()
        .filter_map(|line| Some(line.split_once(' ')?.1.trim_start().split_once('(')?.0.to_owned()))
        .filter(|call| call.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_'))
        .collect();
    for call in ["mkdirat", "mknodat", "setxattr", "utimensat", "renameat2", "syncfs", "unlinkat"] {
        assert!(calls.contains(call), "{call} in {calls:?}");
    }
    let mut killed = 0;
    for call in calls {
        for n in 1.. {
            let out =
                traced(&["-o", "/dev/null", "-e", &format!("inject={call}:signal=KILL:when={n}")]);
            if out.status.success() {
                break;
            }
            killed += 1;
            if layer.exists() {
                // The call came after the one that gave the layer its name.
                tree::assert_same(&format!("{call} {n}"), &whole, &seen());
                std::fs::remove_dir_all(&layer).unwrap();
            }
            sh(&dir.path, "rm -rf .lamina-stage-*");
            assert!(n < 1000, "{call} never lets it through");
        }
        std::fs::remove_dir_all(&layer).unwrap();
    }
    assert!(killed > 100, "{killed}");
}
