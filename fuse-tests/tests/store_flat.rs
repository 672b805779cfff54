//! Layers of the store where nothing can be mounted: a copy shows what a mount would show, and what
//! is changed in it is in the layer afterwards, also after a crash at any step.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use fuse_tests::case::{as_user, is_mounted, put, said, sh, text};
use fuse_tests::env;
use fuse_tests::fixture::fill;
use fuse_tests::store::TestStore;
use fuse_tests::tree::{self, Snapshot};
use fuse_tests::{both, kill};

/// What a stack can hold: hidden names, opaque directories, hard links, xattrs, and, made by the
/// kernel where it may, a redirect and a metacopy.
fn stack() -> TestStore {
    let mut store = TestStore::new();
    store.layer(
        "base",
        None,
        "file f 4755 base\nfile big 640 size:300000\nfile hole 644 hole:1000000\n\
         dir d 2750\nfile d/a 644 a\nfile d/b 600 b\nfile d/c 644 c\nmtime d/c 5.5\n\
         dir d/sub 700\nfile d/sub/deep 400 deep\nfile e/x 644 x\nfile was/in 644 in\n\
         file h1 644 linked\nlink h2 h1\nfile g1 644 both\nlink g2 g1\nsymlink s f\nfifo p 640\n\
         socket k 600\nxattr f user.note hi\nxattr d user.dir there\nmtime d 7.7\n",
    );
    store.layer(
        "middle",
        Some("base"),
        "whiteout d/a\ndir e 711\nopaque e\nfile e/y 644 y\nwhiteout was\nfile new/n 644 n\n\
         xattr new/n user.overlay.overlay.opaque nested\nfile xw/z 644 z\n",
    );
    store.ok(&["layer", "create-rw", "--parent", "middle", "moved"]);
    if env::is_machine_root() {
        store.arguments =
            vec!["--storage-opt".into(), "overlay.mountopt=redirect_dir=on,metacopy=on".into()];
        let merged = store.mount(&["--backend", "kernel", "moved"]);
        sh(&merged, "mv d/sub away; chmod 600 big; chown 5:6 hole; mknod null c 1 3");
        store.unmount("moved");
        let names = sh(store.diff("moved"), "getfattr -h -m trusted.overlay -R . 2>/dev/null");
        assert!(names.contains("redirect") && names.contains("metacopy"), "{names}");
    }
    store
}

#[track_caller]
fn assert_same(what: &str, left: &Snapshot, right: &Snapshot) {
    let lines = tree::diff(left, right);
    assert!(lines.is_empty(), "{what}:\n{}", lines.join("\n"));
}

fn snapshot(dir: &Path, since: i128) -> Snapshot {
    let options = tree::Options { recent: Some(since), ..tree::Options::default() };
    tree::snapshot_with(dir, options)
}

/// Changes of every kind, the same wherever they are made.
const CHANGES: &str = "
rm d/b
echo new > n
mkdir e/sub; echo y > e/sub/y
rm -r new; echo file > new
rm s; mkdir s; echo in > s/in
mkdir was; echo other > was/other
chmod 700 f
mv p q
ln -s nowhere l
setfattr -n user.more -v 1 d
echo more >> big
rm h1 h2; echo parted > h1
ln g1 g3
cp -p d/c keep; printf z > d/c; touch -r keep d/c; rm keep
touch -d @99 e
";

// Whatever a stack holds, the copy is what the kernel mounts; and the layer that a changed copy
// leaves is one that the kernel and our server mount to what was there.
both!(a_copy_is_what_a_mount_shows_and_takes_the_same_changes);
fn a_copy_is_what_a_mount_shows_and_takes_the_same_changes() {
    fuse_tests::needs_kernel_overlay!();
    let store = stack();
    let since = tree::now();
    for id in ["kernel", "flat"] {
        store.ok(&["layer", "create-rw", "--parent", "moved", id]);
    }
    let lowers = ["base", "middle", "moved"].map(|id| tree::snapshot(store.diff(id)));
    let trees = ["kernel", "flat"].map(|backend| {
        let merged = store.mount(&["--backend", backend, backend]);
        assert_eq!(is_mounted(&merged), backend == "kernel");
        let before = snapshot(&merged, since);
        sh(&merged, CHANGES);
        let after = snapshot(&merged, since);
        store.unmount(backend);
        assert_eq!(fs::read_dir(&merged).unwrap().count(), 0, "the mountpoint is not empty");
        (before, after)
    });
    assert_same("before", &trees[0].0, &trees[1].0);
    assert!(trees[1].1.get("was/other").is_some() && trees[1].1.get("new").is_some());
    let same_links = |tree: &Snapshot| {
        let mut tree = tree.clone();
        // Without an index the kernel parts hard links at a copy-up; a copy keeps them.
        for name in ["g1", "g2", "g3"] {
            let entry = tree.entries.get_mut(Path::new(name)).unwrap();
            entry.clear("nlink");
            entry.clear("same file as");
        }
        tree
    };
    assert_same("after", &same_links(&trees[0].1), &same_links(&trees[1].1));
    for (backend, id) in [("kernel", "flat"), ("fuse", "flat"), ("flat", "kernel")] {
        let merged = store.mount(&["--backend", backend, "--read-only", id]);
        let tree = snapshot(&merged, since);
        store.unmount(id);
        if id == "flat" {
            assert_same(backend, &trees[1].1, &tree);
        } else {
            assert_same(backend, &same_links(&trees[0].1), &same_links(&tree));
        }
    }
    // Nothing that stayed as it was is in the layer; its other names are, where a file is.
    let listed = |id: &str| sh(store.diff(id), "find . | sort");
    let (kernel, flat) = (listed("kernel"), listed("flat"));
    let of_kernel: Vec<&str> = kernel.lines().chain(["./g2"]).collect();
    for name in flat.lines() {
        assert!(of_kernel.contains(&name), "{name} was not changed:\n{kernel}");
    }
    for (id, before) in ["base", "middle", "moved"].into_iter().zip(&lowers) {
        assert_same("a lower was changed", before, &tree::snapshot(store.diff(id)));
    }
    // Once more without a change: only whiteouts are made anew.
    let content = || {
        let mut tree = tree::snapshot(store.diff("flat"));
        tree.entries.retain(|_, entry| entry.get("device") != "0:0");
        (tree, sh(store.diff("flat"), "find . -type c | sort"))
    };
    let before = content();
    store.mount(&["--backend", "flat", "flat"]);
    store.unmount("flat");
    let after = content();
    assert_same("nothing was changed", &before.0, &after.0);
    assert_eq!(before.1, after.1);
    store.check_no_leftovers();
    assert_eq!(store.ok(&["store", "check"]), "");
}

// Both names of a file change where one is written, and all three are one file afterwards.
both!(hard_links_of_a_copy_stay_whole);
fn hard_links_of_a_copy_stay_whole() {
    let store = stack();
    store.ok(&["layer", "create-rw", "--parent", "middle", "top"]);
    let merged = store.mount(&["--backend", "flat", "top"]);
    sh(&merged, "echo more >> h1; mkdir far; ln g2 far/g3");
    store.unmount("top");
    for backend in ["flat", "fuse"] {
        let merged = store.mount(&["--backend", backend, "top"]);
        let ino = |name: &str| fs::metadata(merged.join(name)).unwrap().ino();
        assert_eq!(text(merged.join("h2")), "linkedmore\n");
        assert_eq!(ino("h1"), ino("h2"), "{backend}");
        assert_eq!((ino("g1"), ino("g1")), (ino("g2"), ino("far/g3")), "{backend}");
        store.unmount("top");
    }
}

both!(copies_are_counted_and_outlive_what_is_known_of_them);
fn copies_are_counted_and_outlive_what_is_known_of_them() {
    let store = stack();
    store.ok(&["layer", "create-rw", "--parent", "middle", "top"]);
    let merged = store.mount(&["--backend", "flat", "top"]);
    let inode = fs::metadata(&merged).unwrap().ino();
    assert_eq!(store.mount(&["top"]), merged);
    assert_eq!(fs::metadata(&merged).unwrap().ino(), inode, "copied a second time");
    put(merged.join("one"), "1");
    store.unmount("top");
    assert_eq!(text(merged.join("one")), "1");
    let sentence = store.fails(&["layer", "remove", "top"]);
    assert!(sentence.contains("is mounted; unmount it first"), "{sentence}");
    assert_eq!(store.ok(&["store", "check"]), "");
    // As after a boot: the run home is empty, the copy is there.
    fs::remove_dir_all(&store.run_root).unwrap();
    store.ok(&["store", "gc"]);
    assert_eq!(text(merged.join("one")), "1");
    put(merged.join("two"), "2");
    store.mount(&["--backend", "fuse", "top"]);
    assert!(is_mounted(&merged));
    assert_eq!(text(merged.join("one")) + &text(merged.join("two")), "12");
    store.unmount("top");
    // What is read only is thrown away.
    let merged = store.mount(&["--backend", "flat", "--read-only", "top"]);
    put(merged.join("three"), "3");
    store.unmount("top");
    assert!(!store.diff("top").join("three").exists());
    // Nothing that lies beneath a mountpoint is lost.
    put(merged.join("beneath"), "x");
    let sentence = store.fails(&["layer", "mount", "--backend", "flat", "top"]);
    assert!(sentence.contains("files lie at the mountpoint"), "{sentence}");
    assert_eq!(text(merged.join("beneath")), "x");
    fs::remove_file(merged.join("beneath")).unwrap();
    store.ok(&["layer", "remove", "top"]);
    store.check_no_leftovers();
}

both!(what_needs_a_mount_is_refused_for_a_copy);
fn what_needs_a_mount_is_refused_for_a_copy() {
    let shared = stack();
    let flat = ["layer", "mount", "--backend", "flat"];
    let map = ["--uidmap", "0:1000:100", "--gidmap", "0:2000:100"];
    for (words, cure) in [(&map[..], "update-id-map"), (&["--label", "x"], "chcon -R")] {
        let words: Vec<&str> = flat.iter().chain(words).chain(&["middle"]).copied().collect();
        let sentence = shared.fails(&words);
        assert!(sentence.contains("needs a mount, and this is a copy"), "{sentence}");
        assert!(sentence.contains(cure), "{sentence}");
    }
    let images = shared.root.display();
    let mut store = TestStore::new();
    store.arguments = vec!["--storage-opt".into(), format!("overlay.imagestore={images}")];
    assert!(store.fails(&[&flat[..], &["middle"]].concat()).contains("lies in an image store"));
    store.layer("child", Some("middle"), "");
    let merged = store.mount(&["--backend", "flat", "child"]);
    assert_eq!(text(merged.join("e/y")), "y");
    store.unmount("child");
    // Docker's layout, where the mountpoint goes.
    let store = TestStore::with_driver("overlay2");
    store.layer("base", None, "file f 644 x\n");
    store.layer("top", Some("base"), "");
    let merged = store.mount(&["--backend", "flat", "top"]);
    put(merged.join("g"), "y");
    store.unmount("top");
    assert!(!merged.exists());
    assert_eq!(text(store.diff("top").join("g")), "y");
}

// What an engine does where a driver cannot show other ids: the layer is given them for good, by a copy too.
#[test]
fn owners_are_changed_where_nothing_can_be_mounted() {
    fuse_tests::needs_root!();
    let store = stack();
    store.layer("top", Some("middle"), "file mine 4755 x\nlink twice mine\nsymlink s /nowhere\n");
    let lamina = store.command(&["layer", "update-id-map", "--to-uidmap", "0:1000:100"]);
    // No device, and a kernel that mounts no overlay.
    let arguments: Vec<String> = lamina
        .get_args()
        .map(|word| format!("'{}'", word.to_str().unwrap()))
        .chain(["--to-gidmap 0:2000:100 top".to_owned()])
        .collect();
    let script = format!(
        "mount -t tmpfs none /dev; mknod -m 666 /dev/null c 1 3; mknod -m 666 /dev/urandom c 1 9
        exec strace -f -qq -o /dev/null -e trace=fsopen,mount -e inject=fsopen,mount:error=EPERM '{}' {}",
        env::lamina().display(),
        arguments.join(" ")
    );
    if let Some(reason) = fuse_tests::trace::no_strace() {
        fuse_tests::skip!("{reason}");
    }
    let words = ["-m", "--propagation", "slave", "sh", "-ec", &script];
    // What was found by trial outside does not hold in there.
    store.ok(&["store", "probe"]);
    let out = Command::new("unshare").args(words).output().unwrap();
    assert!(out.status.success(), "{}", said(&out));
    assert!(!store.path("top", "flat").exists() && store.path("top", "diff1").is_dir());
    let merged = store.mount(&["top"]);
    let mine = fs::metadata(merged.join("mine")).unwrap();
    assert_eq!((mine.mode() & 0o7777, mine.uid(), mine.gid()), (0o4755, 1000, 2000));
    assert_eq!(fs::metadata(merged.join("twice")).unwrap().ino(), mine.ino());
    for entry in fs::read_dir(&merged).unwrap().map(|entry| entry.unwrap().path()) {
        let stat = fs::symlink_metadata(&entry).unwrap();
        assert_eq!((stat.uid(), stat.gid()), (1000, 2000), "{}", entry.display());
    }
    store.unmount("top");
    assert_eq!(store.ok(&["store", "check"]), "");
}

// A user without namespaces, without the device: a copy, and the sentence why and what helps.
#[test]
fn without_privilege_and_device_a_copy_is_chosen() {
    fuse_tests::needs_root!();
    let store = TestStore::new();
    store.layer(
        "base",
        None,
        "file f 640 base\nfile d/a 444 a\nxattr d/a user.x y\nfile d/b 644 b\n",
    );
    store.ok(&["layer", "create-rw", "--parent", "base", "top"]);
    let id = 65534;
    sh(&store.root, &format!("chown -R {id}:{id} ."));
    sh(store.sandbox.root(), &format!("chmod 711 . ..; mkdir -p run; chown -R {id}:{id} run"));
    // There is no device in a mount namespace of its own.
    let run = |words: &str| {
        let place =
            format!("--root {} --runroot {}", store.root.display(), store.run_root.display());
        let words = words.replace("PLACE", &place);
        let script = format!("exec ./lamina {words}");
        let hidden = "mount -t tmpfs none /dev; mknod -m 666 /dev/null c 1 3";
        let out = Command::new("unshare")
            .args(["-m", "--propagation", "slave", "sh", "-ec"])
            .arg(format!(
                "{hidden}; cd {}; cp -n {} lamina; chmod 755 lamina; \
                 exec setpriv --reuid {id} --regid {id} --clear-groups env HOME=/nonexistent sh -ec '{}'",
                store.sandbox.root().display(),
                env::lamina().display(),
                script,
            ))
            .output()
            .unwrap();
        assert!(out.status.success(), "{words}: {}", said(&out));
        String::from_utf8(out.stdout).unwrap()
    };
    let probe = run("store probe PLACE");
    for part in
        ["\nfuse: no (", "\nbackend: flat\n", "and FUSE does not work: ", "\ncure: modprobe"]
    {
        assert!(probe.contains(part), "{part}: {probe}");
    }
    let merged = run("layer mount PLACE top");
    let merged = Path::new(merged.trim_end());
    assert_eq!(text(merged.join("d/a")), "a");
    assert!(!is_mounted(merged));
    let out = as_user(id, merged, "rm d/b; echo new > d/n; chmod 600 f");
    assert!(out.status.success(), "{}", said(&out));
    run("layer unmount PLACE top");
    sh(&store.root, "chown -R 0:0 .");
    let merged = store.mount(&["--backend", "kernel", "top"]);
    assert_eq!(sh(&merged, "cat d/n d/a; ls d"), "new\naa\nn\n");
    store.unmount("top");
}

// Killed at each step of making a copy and of taking it back: the next start undoes or goes on, and
// no change is lost.
#[test]
fn a_killed_copy_leaves_nothing_and_loses_nothing() {
    fuse_tests::needs_root!();
    killed_at_each_step();
}

fn killed_at_each_step() {
    let store = TestStore::new();
    store.layer("base", None, "file f 644 base\nfile d/a 644 a\n");
    store.ok(&["layer", "create-rw", "--parent", "base", "top"]);
    fill(&store.diff("top"), "file own 644 own\n");
    let merged = store.path("top", "merged");
    let is_copy = || merged.join("f").exists();
    let mount = store.command(&["layer", "mount", "--backend", "flat", "top"]);
    let unmount = store.command(&["layer", "unmount", "top"]);
    // The first one tries what the machine can do.
    store.mount(&["--backend", "flat", "top"]);
    store.unmount("top");
    let (to_mount, to_unmount) = (kill::calls(&mount, 5), kill::calls(&unmount, 5));
    let mut kills = [0, 0];
    for (step, call) in to_mount.iter().enumerate() {
        kills[0] += usize::from(kill::at(&mount, call));
        // The next start.
        store.ok(&["store", "list"]);
        store.check_no_leftovers();
        if is_copy() {
            assert_eq!(sh(&merged, "cat f own d/a"), "baseowna", "step {step}");
        }
        store.unmount("top");
        assert!(!is_copy());
        assert_eq!(sh(store.diff("top"), "cat own; ls"), "ownown\n", "step {step}");
    }
    for (step, call) in to_unmount.iter().enumerate() {
        store.mount(&["--backend", "flat", "top"]);
        let change = format!("change-{step}");
        sh(&merged, &format!("echo {change} > own; rm -rf d; mkdir d; echo b > d/b"));
        kills[1] += usize::from(kill::at(&unmount, call));
        store.ok(&["store", "list"]);
        store.check_no_leftovers();
        store.unmount("top");
        assert!(!is_copy());
        let merged = store.mount(&["--backend", "fuse", "top"]);
        assert_eq!(sh(&merged, "cat own; ls d"), format!("{change}\nb\n"), "step {step}");
        store.unmount("top");
    }
    // Names and numbers of calls vary a little from run to run.
    let nearly = |kills: usize, calls: usize| kills + 5 + calls / 20 > calls;
    assert!(nearly(kills[0], to_mount.len()) && nearly(kills[1], to_unmount.len()), "{kills:?}");
    assert_eq!(store.ok(&["store", "check"]), "");
}
