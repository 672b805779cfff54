//! Overlays inside of our mount: their lower, upper and work directories all lie on it. Ours, kernel overlayfs and
//! fuse-overlayfs, on top of each other, each with removals and renames that need whiteouts, and remounts of all.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use fuse_tests::case::{Case, getx, gone, put, setx, sh, umount, whiteout};
use fuse_tests::fixture::{Kind, Mount, Spec};
use fuse_tests::{both, env, needs_kernel_overlay, needs_root, skip};
use rustix::fs::{CWD, RenameFlags, renameat_with};

/// Who serves a level.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Server {
    Ours,
    Kernel,
    FuseOverlayfs,
}

/// One overlay on the mount of the one before.
struct Level {
    server: Server,
    spec: Spec,
    mount: Option<Mount>,
}

impl Level {
    fn mount(&mut self) {
        match self.server {
            Server::Ours | Server::Kernel => self.mount = Some(self.spec.mount()),
            Server::FuseOverlayfs => {
                let options = self.spec.option_text();
                let mut command = Command::new("fuse-overlayfs");
                let status = command.arg("-o").arg(options).arg(&self.spec.merged).status();
                assert!(status.unwrap().success());
            }
        }
    }

    fn unmount(&mut self) {
        match self.mount.take() {
            Some(mount) => mount.unmount(),
            None => umount(&self.spec.merged),
        }
    }
}

/// A level beneath whose lower, upper and work directories lie in `home`.
fn level(c: &Case, server: Server, home: &Path, number: usize) -> Level {
    let merged = c.sandbox.root().join(format!("level{number}"));
    fs::create_dir(&merged).unwrap();
    for dir in ["lower", "upper", "work"] {
        fs::create_dir(home.join(dir)).unwrap();
    }
    let kind = if server == Server::Kernel { Kind::Kernel } else { Kind::Lamina };
    let mut spec = c.sandbox.spec(kind);
    spec.lowers = vec![home.join("lower")];
    spec.upper = Some((home.join("upper"), home.join("work")));
    spec.merged = merged;
    Level { server, spec, mount: None }
}

fn fill(dir: &Path) {
    for name in ["a", "b", "d/a", "d/b", "d/c", "e/a", "e/deep/a", "f/a", "f/b", "g/a"] {
        put(dir.join(name), format!("lower {name}\n"));
    }
}

/// Needs whiteouts of files and directories, opaque directories, and marks that move.
const CHANGES: &str = "
    rm a; mv b bb; mv d/b d/bb; rm d/c; echo again > d/c
    rm -r e; mkdir e; echo new > e/new
    mv f/a g/a; ln f/b g/link; chmod 600 f/b
    rm -r g/a; mkdir h; mv d/a h/a";

/// Moves a directory, which fuse-overlayfs cannot do: it makes a `.wh.` file of the new name first, and
/// we keep such names to ourselves.
const MOVE: &str = "mv h i; rm -r i/a; echo end > i/end";

fn looks(dir: &Path) -> String {
    sh(
        dir,
        "find . -mindepth 1 -printf '%y %m %P %l\\n' | LC_ALL=C sort
         find . -type f | LC_ALL=C sort | xargs cat",
    )
}

/// Mounts all on top of each other, changes the innermost, and remounts all of them.
fn nest(servers: &[Server]) {
    let c = Case::new(1);
    let plain = c.sandbox.root().join("plain");
    fill(&plain);
    let moves = !servers.contains(&Server::FuseOverlayfs);
    let changes = if moves { format!("{CHANGES}\n{MOVE}") } else { CHANGES.to_owned() };
    sh(&plain, &changes);
    let expected = looks(&plain);
    let mut levels: Vec<Level> = Vec::new();
    let mut home = c.sandbox.root().join("home");
    fs::create_dir(&home).unwrap();
    for (number, server) in servers.iter().enumerate() {
        let mut next = level(&c, *server, &home, number);
        if number + 1 == servers.len() {
            fill(&home.join("lower"));
        }
        next.mount();
        home = next.spec.merged.join("home");
        if number + 1 < servers.len() {
            fs::create_dir(&home).unwrap();
        }
        levels.push(next);
    }
    let top = levels.last().unwrap().spec.merged.clone();
    sh(&top, &changes);
    assert_eq!(looks(&top), expected, "{servers:?}");
    for round in 0..2 {
        // A layer of an inner one is there as long as the outer one is.
        c.sandbox.check_lowers();
        c.sandbox.forget_seals();
        for level in levels.iter_mut().rev() {
            level.unmount();
        }
        for level in &mut levels {
            level.mount();
        }
        assert_eq!(looks(&top), expected, "{servers:?}, remount {round}");
        // The names that are hidden can be used again, and hidden again; with fuse-overlayfs what they hid comes back.
        if !moves {
            continue;
        }
        sh(&top, "mkdir a; echo x > a/x; rm -r a; echo back > bb.tmp; mv bb.tmp b; rm b");
        assert_eq!(looks(&top), expected, "{servers:?}, changed in round {round}");
    }
    c.sandbox.check_lowers();
    c.sandbox.forget_seals();
    for level in levels.iter_mut().rev() {
        level.unmount();
    }
}

both!(ours_in_ours_four_deep);
fn ours_in_ours_four_deep() {
    nest(&[Server::Ours; 4]);
}

both!(kernel_overlay_in_ours);
fn kernel_overlay_in_ours() {
    needs_kernel_overlay!();
    nest(&[Server::Ours, Server::Kernel]);
    nest(&[Server::Ours, Server::Ours, Server::Kernel]);
}

// As root: in a user namespace it makes `.wh.` files, whose names we keep to ourselves.
#[test]
fn fuse_overlayfs_in_ours() {
    needs_root!();
    if Command::new("fuse-overlayfs").arg("--version").output().is_err() {
        skip!("there is no fuse-overlayfs");
    }
    nest(&[Server::Ours, Server::FuseOverlayfs]);
    nest(&[Server::Ours, Server::Ours, Server::FuseOverlayfs]);
}

// What an inner overlay wrote through us is read by inner overlays through the kernel, as lower layers.
#[test]
fn the_kernel_shows_nested_layers_of_ours() {
    needs_root!();
    needs_kernel_overlay!();
    let mut c = Case::new(2);
    c.mount();
    let mut inner = level(&c, Server::Kernel, &c.m(""), 1);
    fill(&c.m("lower"));
    inner.mount();
    sh(&inner.spec.merged, CHANGES);
    let expected = looks(&inner.spec.merged);
    c.sandbox.forget_seals();
    inner.unmount();
    c.unmount();
    for kind in [Kind::Kernel, Kind::Lamina] {
        let outer = c.sandbox.spec(kind).mount();
        let mut read = inner.spec.clone().read_only();
        read.lowers = vec![c.m("upper"), c.m("lower")];
        for inner in [Kind::Kernel, Kind::Lamina] {
            read.kind = inner;
            let mounted = read.mount();
            assert_eq!(looks(&read.merged), expected, "{inner:?} in {kind:?}");
            mounted.unmount();
        }
        c.sandbox.forget_seals();
        outer.unmount();
    }
}

fn is_whiteout(path: PathBuf) -> bool {
    let meta = fs::symlink_metadata(&path).unwrap();
    let listed = fs::read_dir(path.parent().unwrap()).unwrap().map(Result::unwrap);
    let mut listed = listed.filter(|entry| entry.path() == path);
    assert!(listed.next().unwrap().file_type().unwrap().is_char_device(), "in a listing");
    env::is_whiteout(&path) && meta.file_type().is_char_device()
}

// Whiteouts that users make: shown as the device that they asked for, kept as the kernel keeps them.
both!(whiteouts_of_users);
fn whiteouts_of_users() {
    let mut c = Case::new(2);
    for layer in 0..2 {
        for name in ["a", "b", "c", "d/f", "d/g"] {
            put(c.l(layer, name), "lower");
        }
    }
    put(c.u("own"), "own");
    c.mount();
    let rename = |from: &str, to: &str, flags| renameat_with(CWD, c.m(from), CWD, c.m(to), flags);
    whiteout(c.m("made"));
    whiteout(c.m("d/made"));
    fs::remove_file(c.m("a")).unwrap();
    whiteout(c.m("a"));
    rename("b", "moved", RenameFlags::WHITEOUT).unwrap();
    rename("own", "c", RenameFlags::WHITEOUT).unwrap();
    rename("d", "e", RenameFlags::WHITEOUT).unwrap();
    let both = RenameFlags::WHITEOUT | RenameFlags::NOREPLACE;
    assert_eq!(rename("moved", "c", both), Err(rustix::io::Errno::EXIST));
    fs::hard_link(c.m("made"), c.m("e/linked")).unwrap();
    fs::create_dir(c.m("new")).unwrap();
    rename("made", "new/made", RenameFlags::empty()).unwrap();
    for round in 0..3 {
        for name in ["a", "b", "own", "d", "e/made", "e/linked", "new/made"] {
            assert!(is_whiteout(c.m(name)), "{name} in round {round}");
        }
        gone(c.m("made"));
        assert_eq!(fs::read(c.m("moved")).unwrap(), b"lower");
        assert_eq!(fs::read(c.m("c")).unwrap(), b"own");
        assert_eq!(fs::read(c.m("e/f")).unwrap(), b"lower");
        c.remount();
    }
    let prefix = env::overlay_prefix();
    let stored = fs::symlink_metadata(c.u("a")).unwrap();
    assert!(stored.is_file() && stored.len() == 0);
    assert!(getx(c.u("a"), &format!("{prefix}overlay.whiteout")).is_some());
    assert_eq!(getx(c.m("a"), &format!("{prefix}whiteout")), None, "the form is not shown");
    assert_eq!(getx(c.m(""), &format!("{prefix}opaque")), Some(b"x".into()));
    fs::remove_file(c.m("a")).unwrap();
    gone(c.m("a"));
    put(c.m("a"), "anew");
    c.remount();
    assert_eq!(fs::read(c.m("a")).unwrap(), b"anew");
}

// A lower layer that an outer mount was: its whiteouts are copied up, moved and removed as what they are.
both!(nested_whiteouts_of_lower_layers);
fn nested_whiteouts_of_lower_layers() {
    let mut c = Case::new(1);
    let prefix = env::overlay_prefix();
    for name in ["w", "d/w", "d/x"] {
        put(c.l(0, name), "");
        setx(c.l(0, name), &format!("{prefix}overlay.whiteout"), "y");
    }
    put(c.l(0, "d/empty"), "");
    put(c.l(0, "t/w"), "");
    setx(c.l(0, "t/w"), &format!("{prefix}overlay.whiteout"), "y");
    for name in ["t/linked", "linked"] {
        fs::hard_link(c.l(0, "w"), c.l(0, name)).unwrap();
    }
    for dir in ["", "d"] {
        setx(c.l(0, dir), &format!("{prefix}overlay.opaque"), "x");
    }
    c.mount();
    std::os::unix::fs::lchown(c.m("w"), Some(1), Some(1)).unwrap();
    fs::rename(c.m("d/w"), c.m("moved")).unwrap();
    fs::remove_file(c.m("d/x")).unwrap();
    fs::rename(c.m("t"), c.m("u")).unwrap();
    for round in 0..2 {
        // A lower directory without the mark lists them as files; in the upper it is marked.
        assert!(round == 0 || is_whiteout(c.m("u/w")) && is_whiteout(c.m("u/linked")));
        assert!(is_whiteout(c.m("linked")));
        assert!(is_whiteout(c.m("w")) && is_whiteout(c.m("moved")));
        gone(c.m("d/w"));
        gone(c.m("d/x"));
        assert!(fs::symlink_metadata(c.m("d/empty")).unwrap().is_file());
        c.remount();
    }
    assert!(fs::symlink_metadata(c.u("moved")).unwrap().is_file());
}
