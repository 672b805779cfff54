//! From one store to another: among all drivers, every byte, owner, mode, time, xattr and hard link.

use std::path::Path;
use std::process::{Command, Output};

use fuse_tests::case::{append, is_mounted, put, said, sh, text};
use fuse_tests::env;
use fuse_tests::fixture::{Sandbox, fill};
use fuse_tests::store::TestStore;
use fuse_tests::tree::{self, Snapshot, assert_same};
use fuse_tests::{both, kill, needs_root};

const DRIVERS: [&str; 4] = ["overlay", "overlay2", "overlay1", "aufs"];

const BASE: &str = "file f 4755 base\nfile big 640 size:300000\nfile hole 644 hole:1000000\n\
     dir d 2750\nfile d/a 644 a\nfile d/b 600 b\nmtime d/a 5.5\ndir d/sub 700\n\
     file d/sub/deep 400 deep\ndir e 755\nfile e/x 644 x\nfile h1 644 linked\nlink d/h2 h1\n\
     symlink s f\nfifo p 640\nsocket k 600\nxattr f user.note hi\nxattr d user.dir there\n\
     xattr e user.overlay.overlay.opaque nested\nfile gone 644 g\nmtime d 7.7\nmtime s 8.8\n";

const MIDDLE: &str = "
rm d/b gone; rm -r e; mkdir e; echo y > e/y; setfattr -n user.more -v 1 d
chmod 700 f; rm s; mkdir s; echo in > s/in; echo more >> h1; ln d/sub/deep again
touch -d @99.25 d/sub; mkdir -m 1777 t";

const TOP: &str = "
rm -r d; mkdir d; echo new > d/new; rm h1; echo h > h3; ln h3 h4; rm again
chown 5:6 big; touch -d @77.5 f; mv t moved";

/// A store with a chain of three, the last one a container's, and one more on the base.
fn full(driver: &'static str) -> TestStore {
    let mut store = TestStore::with_driver(driver);
    store.ok(&["layer", "create", "base"]);
    fill(&store.diff("base"), BASE);
    if env::is_machine_root() {
        sh(store.diff("base"), "mknod null c 1 3; setcap cap_net_raw+ep f; chown 0:7 null");
        sh(store.diff("base"), "setfattr -n trusted.mine -v x big; touch -d @55 .");
    }
    store.ok(&["layer", "create-rw", "--parent", "base", "work"]);
    let merged = store.mount(&["work"]);
    sh(&merged, MIDDLE);
    store.unmount("work");
    let file = store.sandbox.root().join("middle.tar");
    let file = file.to_str().unwrap();
    store.ok(&["layer", "diff", "--id", "work", "--subseconds", "-O", file]);
    store.ok(&["layer", "apply", "--id", "middle", "--parent", "base", file]);
    store.ok(&["layer", "create-rw", "--parent", "middle", "top"]);
    let kernel = env::is_machine_root() && env::no_kernel_overlay().is_none();
    if kernel && driver.starts_with("overlay") && driver != "overlay1" {
        // Redirects and files without data.
        store.arguments =
            vec!["--storage-opt".into(), "overlay.mountopt=redirect_dir=on,metacopy=on".into()];
    }
    let merged = store.mount(&["top"]);
    sh(&merged, TOP);
    store.unmount("top");
    if !store.arguments.is_empty() {
        let marks = sh(store.diff("top"), "getfattr -h -m trusted.overlay -R . 2>/dev/null");
        assert!(marks.contains("redirect") && marks.contains("metacopy"), "{marks}");
    }
    store
}

const LAYERS: [&str; 4] = ["base", "middle", "top", "work"];

fn shown(store: &TestStore, id: &str) -> Snapshot {
    let merged = store.mount(&["--backend", "fuse", "--read-only", id]);
    let mut tree = tree::snapshot(&merged);
    store.unmount(id);
    for entry in tree.entries.values_mut() {
        // Trees that share files count their names.
        entry.clear("nlink");
        entry.clear("listed inode");
    }
    tree
}

fn new_store(driver: &'static str) -> TestStore {
    let sandbox = Sandbox::new();
    let (root, run_root) = (sandbox.root().join("root"), sandbox.root().join("run"));
    TestStore { sandbox, root, run_root, driver, mounts_home: false, arguments: Vec::new() }
}

fn command(from: &TestStore, to: &TestStore, words: &[&str]) -> Command {
    let mut command = Command::new(env::lamina());
    command.args(["store", "migrate", "--to-driver", to.driver]).args(words);
    command.arg("--runroot").arg(&from.run_root).arg(&from.root).arg(&to.root);
    command
}

fn migrate(from: &TestStore, to: &TestStore, words: &[&str]) -> Output {
    command(from, to, words).output().unwrap()
}

#[track_caller]
fn done(out: &Output) -> String {
    assert!(out.status.success(), "{}", said(out));
    String::from_utf8(out.stdout.clone()).unwrap()
}

both!(every_store_becomes_every_other);
fn every_store_becomes_every_other() {
    for from in DRIVERS {
        let old = full(from);
        let trees = LAYERS.map(|id| shown(&old, id));
        let before = tree::snapshot(&old.root);
        for to in DRIVERS {
            println!("{from} to {to}");
            let new = new_store(to);
            let said = done(&migrate(&old, &new, &[]));
            assert!(said.starts_with("4 layers, "), "{said}");
            assert_eq!(new.ok(&["store", "list"]), "base\nmiddle\ntop\nwork\n");
            for (id, tree) in LAYERS.into_iter().zip(&trees) {
                assert_same(id, tree, &shown(&new, id));
            }
            new.check_no_leftovers();
            if to == "overlay" || to == "overlay2" {
                assert_eq!(new.ok(&["store", "check"]), "");
            }
            // Once more there is nothing to do.
            let first = tree::snapshot(new.home());
            done(&migrate(&old, &new, &[]));
            assert_same("a second time", &first, &tree::snapshot(new.home()));
            // What came is a store to work with.
            let merged = new.mount(&["top"]);
            put(merged.join("more"), "x");
            new.unmount("top");
            for id in ["top", "work", "middle", "base"] {
                new.ok(&["layer", "remove", id]);
            }
        }
        assert_same("the old store", &before, &tree::snapshot(&old.root));
    }
}

// What is not the same is named, and then nothing is removed.
both!(the_old_store_goes_only_when_all_was_found_the_same);
fn the_old_store_goes_only_when_all_was_found_the_same() {
    for (from, to) in [("aufs", "overlay"), ("overlay", "overlay1"), ("overlay1", "aufs")] {
        let (old, new) = (full(from), new_store(to));
        done(&migrate(&old, &new, &[]));
        let spoilt = new.diff("middle").join("e/y");
        let kept = text(&spoilt);
        let dir = new.diff("middle").join("e");
        let times = sh(&dir, "stat -c %y y .");
        let (y, e) = times.trim().split_once('\n').unwrap();
        let undo = format!("echo y > y; chmod 644 y; rm -f w; touch -d '{y}' y; touch -d '{e}' .");
        for (script, name) in [
            ("echo z > y; touch -d @1 y", "/e/y"),
            ("echo z > y; touch -d TIME y", "/e/y"),
            ("chmod 600 y", "/e/y"),
            ("touch w", "/e"),
            ("touch w; touch -d UP .", "/e/w"),
        ] {
            let script = script.replace("TIME", &format!("'{y}'")).replace("UP", &format!("'{e}'"));
            sh(&dir, &script);
            let out = migrate(&old, &new, &["--remove"]);
            assert!(!out.status.success(), "{script}");
            let sentence = said(&out);
            assert!(sentence.contains(&format!("layer middle: {name}: differs")), "{sentence}");
            sh(&dir, &undo);
        }
        assert_eq!(text(&spoilt), kept);
        // Nor while it is used.
        let merged = old.mount(&["top"]);
        assert!(is_mounted(&merged));
        let out = migrate(&old, &new, &["--remove"]);
        assert!(said(&out).contains("is mounted; unmount it first"), "{}", said(&out));
        old.unmount("top");
        assert_eq!(old.ok(&["store", "list"]), "base\nmiddle\ntop\nwork\n");
        done(&migrate(&old, &new, &["--remove"]));
        assert_eq!(old.ok(&["store", "list"]), "");
        old.check_no_leftovers();
    }
}

// Hard links between the stores, and none where a mark would go with the file.
both!(files_are_shared_when_asked_for);
fn files_are_shared_when_asked_for() {
    for (from, to) in [("aufs", "overlay2"), ("overlay2", "aufs"), ("overlay", "overlay1")] {
        let (old, new) = (full(from), new_store(to));
        let trees = LAYERS.map(|id| shown(&old, id));
        done(&migrate(&old, &new, &["--hard-links"]));
        let ino =
            |store: &TestStore, name: &str| fuse_tests::case::ino(store.diff("base").join(name));
        assert_eq!(ino(&old, "big"), ino(&new, "big"), "{from} to {to}");
        for (id, tree) in LAYERS.into_iter().zip(&trees) {
            assert_same(id, tree, &shown(&new, id));
        }
    }
}

// Docker's own records say what the trees of overlay1 were made on.
both!(trees_become_layers_where_docker_says_of_what);
fn trees_become_layers_where_docker_says_of_what() {
    let (old, new) = (full("overlay1"), new_store("overlay"));
    let records = old.root.join("image/overlay/layerdb/sha256");
    for (digest, id, parent) in [("aa", "base", ""), ("bb", "middle", "sha256:aa")] {
        sh(&old.root, &format!("mkdir -p {}", records.join(digest).display()));
        put(records.join(digest).join("cache-id"), id);
        if !parent.is_empty() {
            put(records.join(digest).join("parent"), parent);
        }
    }
    let tree = shown(&old, "top");
    done(&migrate(&old, &new, &[]));
    assert_eq!(text(new.path("middle", "lower-layers")), "base");
    assert_eq!(text(new.path("top", "lower-layers")), "middle:base");
    assert!(!new.diff("middle").join("big").exists(), "what was not changed came twice");
    assert_same("top", &tree, &shown(&new, "top"));
}

// Killed at any step, it goes on, and leaves nothing behind.
#[test]
fn a_killed_migration_goes_on() {
    needs_root!();
    for (from, to) in [("overlay2", "aufs"), ("aufs", "overlay1"), ("overlay1", "overlay")] {
        let old = full(from);
        let trees = LAYERS.map(|id| shown(&old, id));
        let new = new_store(to);
        let other = new_store(to);
        // Each goes on where the one before was killed, and so makes fewer calls.
        let all = kill::calls(&command(&old, &other, &[]), 67);
        let kills = all.iter().filter(|call| kill::at(&command(&old, &new, &[]), call)).count();
        assert!(kills > 8, "{from} to {to}: only {kills} kills");
        done(&migrate(&old, &new, &[]));
        for (id, tree) in LAYERS.into_iter().zip(&trees) {
            assert_same(id, tree, &shown(&new, id));
        }
        new.check_no_leftovers();
    }
}

// What an engine has is not taken from it, and nothing is removed before that is known; images of our own come along.
both!(what_records_name_is_kept_or_comes_along);
fn what_records_name_is_kept_or_comes_along() {
    let old = full("overlay");
    let new = new_store("aufs");
    let records = old.root.join("overlay-layers");
    std::fs::create_dir_all(&records).unwrap();
    put(records.join("layers.json"), r#"[{"id":"base"}]"#);
    let out = migrate(&old, &new, &["--remove"]);
    assert!(
        said(&out).contains("base: records of an engine name it; leave --remove out"),
        "{}",
        said(&out)
    );
    assert_eq!(old.ok(&["store", "list"]).lines().count(), LAYERS.len());
    assert_eq!(new.ok(&["store", "list"]), "");
    std::fs::remove_file(records.join("layers.json")).unwrap();
    let config = r#"{\"rootfs\":{\"type\":\"layers\",\"diff_ids\":[]}}"#;
    let images = old.root.join("lamina-images");
    std::fs::create_dir_all(&images).unwrap();
    let id = sh(
        &old.root,
        &format!("printf '%s' '{}' | sha256sum | cut -d' ' -f1", config.replace("\\\"", "\"")),
    );
    put(
        images.join(format!("{}.json", id.trim())),
        format!(r#"{{"names":["x:1"],"layers":["base","middle"],"config":"{config}"}}"#),
    );
    let listed = old.ok(&["image", "list"]);
    assert!(listed.contains(" x:1 middle"), "{listed}");
    done(&migrate(&old, &new, &["--remove"]));
    assert_eq!(new.ok(&["image", "list"]), listed);
    assert_eq!(old.ok(&["image", "list"]), "");
    assert_eq!(old.ok(&["store", "list"]), "");
}

// Docker's images and containers keep their layers, unless whoever removes one insists.
both!(layers_that_docker_has_stay);
fn layers_that_docker_has_stay() {
    for driver in ["overlay2", "overlay1", "aufs"] {
        let (old, new) = (full(driver), new_store("overlay"));
        let records = old.root.join("image").join(old.home().file_name().unwrap()).join("layerdb");
        sh(&old.root, &format!("mkdir -p {0}/sha256/aa {0}/mounts/c {0}/tmp", records.display()));
        put(records.join("sha256/aa/cache-id"), "middle");
        put(records.join("sha256/aa/diff"), "sha256:bb");
        put(records.join("mounts/c/mount-id"), "top\n");
        put(records.join("mounts/c/init-id"), "top-init");
        let out = migrate(&old, &new, &["--remove"]);
        assert!(said(&out).contains(": records of an engine name it; leave --remove"), "{out:?}");
        assert_eq!(new.ok(&["store", "list"]), "", "{driver}");
        let sentence = old.fails(&["layer", "remove", "top"]);
        assert!(sentence.contains("top: records of an engine name it; remove its"), "{sentence}");
        assert_eq!(old.ok(&["store", "list"]).lines().count(), LAYERS.len(), "{driver}");
        old.ok(&["layer", "remove", "--force", "top"]);
        std::fs::remove_dir_all(records).unwrap();
        old.ok(&["layer", "remove", "middle"]);
    }
}

// containers/storage had a driver for aufs, and kept its list of layers beside the home too.
both!(layers_of_aufs_that_podman_has_stay);
fn layers_of_aufs_that_podman_has_stay() {
    let old = full("aufs");
    let records = old.root.join("aufs-layers");
    std::fs::create_dir(&records).unwrap();
    put(records.join("layers.json"), r#"[{"id":"middle"},{"id":"top"}]"#);
    let sentence = old.fails(&["layer", "remove", "top"]);
    assert!(sentence.contains("top: records of an engine name it; remove its"), "{sentence}");
    put(records.join("layers.json"), r#"[{"id":"middle"}]"#);
    old.ok(&["layer", "remove", "top"]);
    put(records.join("layers.json"), "{");
    let sentence = old.fails(&["layer", "remove", "middle"]);
    assert!(sentence.contains("aufs-layers/layers.json: is no list of layers"), "{sentence}");
}

both!(what_cannot_be_migrated_is_refused);
fn what_cannot_be_migrated_is_refused() {
    let old = full("aufs");
    let fails = |from: &Path, to: &Path, words: &[&str]| {
        let mut command = Command::new(env::lamina());
        command.args(["store", "migrate"]).args(words).arg(from).arg(to);
        let out = command.output().unwrap();
        assert!(!out.status.success());
        said(&out)
    };
    let nowhere = old.sandbox.root().join("nowhere");
    assert!(fails(&nowhere, &old.root, &[]).contains("holds no store"));
    assert!(fails(&old.root, &old.root, &[]).contains("is the old store itself"));
    assert!(fails(&old.root, &nowhere, &["--to-driver", "vfs"]).contains("is not known"));
    assert!(!nowhere.exists());
    // A layer whose parent is gone.
    append(old.home().join("layers/top"), "lost\n");
    sh(old.home(), "sed -i s/middle/lost/ layers/top");
    assert!(fails(&old.root, &nowhere, &[]).contains("is missing"));
    // Two stores whose homes have one name.
    let (one, other) = (full("overlay1"), TestStore::new());
    assert!(fails(&one.root, &one.root, &["--to-driver", "overlay"]).contains("of old Docker"));
    assert!(
        fails(&one.root, &other.root, &["--to-driver", "overlay1"])
            .contains("of containers/storage")
    );
}
