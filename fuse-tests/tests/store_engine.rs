//! A store that engines use as well: counts of mounts, records of layers, and the home as they keep it.

use std::fs::{self, File};
use std::path::Path;
use std::process::Stdio;

use fuse_tests::case::{BOUND, is_mounted, said, text, umount};
use fuse_tests::env::{self, wait_until};
use fuse_tests::store::{TestStore, lock_classically};
use fuse_tests::{both, needs_root};
use rustix::mount::{MountPropagationFlags, mount_change};

fn two_layers() -> TestStore {
    let store = TestStore::new();
    store.layer("base", None, "file f 644 base\n");
    store.ok(&["layer", "create-rw", "--parent", "base", "top"]);
    store
}

fn write(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

/// Makes the records of an engine name layers.
fn record(store: &TestStore, ids: &[&str]) {
    let records: Vec<String> = ids.iter().map(|id| format!(r#"{{"id":"{id}"}}"#)).collect();
    write(&store.root.join("overlay-layers/layers.json"), &format!("[{}]", records.join(",")));
}

/// The file with the counts of mounts that engines read and write.
fn counts(store: &TestStore) -> String {
    text(store.run_root.join("overlay-layers/mountpoints.json"))
}

/// What an engine leaves there when it has `top` mounted so often together with others.
fn engine_says(store: &TestStore, count: u32) {
    let merged = store.path("top", "merged");
    let line = format!(r#"[{{"id":"top","path":"{}","count":{count}}}]"#, merged.display());
    let line = if count == 0 { "[]".to_owned() } else { line };
    fs::write(store.run_root.join("overlay-layers/mountpoints.json"), line).unwrap();
}

// Podman takes a mount down that it counts once: ours would be gone beneath its users, or its beneath ours.
both!(mounts_are_counted_together_with_engines);
fn mounts_are_counted_together_with_engines() {
    let store = two_layers();
    let lock = store.run_root.join("overlay-layers/mountpoints.lock");
    for backend in ["kernel", "fuse"] {
        let merged = store.mount(&["--backend", backend, "top"]);
        let line =
            |count| format!(r#"[{{"id":"top","path":"{}","count":{count}}}]"#, merged.display());
        assert_eq!(counts(&store), line(1));
        let writer = text(&lock);
        assert_eq!(writer.len(), 64);
        // An engine uses it too, and outlives us.
        engine_says(&store, 2);
        store.unmount("top");
        assert!(is_mounted(&merged), "{backend}: unmounted beneath the engine");
        assert_eq!(counts(&store), line(1));
        assert_ne!(text(&lock), writer, "engines do not learn that something changed");
        let sentence = store.fails(&["layer", "unmount", "top"]);
        assert!(sentence.contains("was mounted by an engine, 1 times; unmount it there"));
        assert!(is_mounted(&merged));
        // We use what the engine mounted, and outlive it.
        store.mount(&["top"]);
        assert_eq!(counts(&store), line(2));
        engine_says(&store, 1);
        store.unmount("top");
        assert!(!is_mounted(&merged), "{backend}");
        assert_eq!(counts(&store), "[]");
        // What an engine's records do not name it drops when it writes the file.
        store.mount(&["--backend", backend, "top"]);
        store.mount(&["top"]);
        engine_says(&store, 0);
        store.unmount("top");
        assert!(is_mounted(&merged), "{backend}: our own count was forgotten");
        store.unmount("top");
        assert!(!is_mounted(&merged), "{backend}");
        // Counts of a mount that is gone.
        store.mount(&["--backend", backend, "top"]);
        engine_says(&store, 3);
        umount(&merged);
        wait_until("the server to end", BOUND, || env::processes_with_argument(&merged).is_empty());
        store.mount(&["--backend", backend, "top"]);
        assert_eq!(counts(&store), line(1));
        store.unmount("top");
        assert!(!is_mounted(&merged), "{backend}");
    }
    // Others are left as they are, and an engine at work is waited for.
    let other = r#"[{"id":"other","path":"/x","count":2}]"#;
    fs::write(store.run_root.join("overlay-layers/mountpoints.json"), other).unwrap();
    let file = File::options().read(true).write(true).open(&lock).unwrap();
    lock_classically(&file);
    let mut command = store.command(&["layer", "mount", "top"]);
    let mut child = command.stdout(Stdio::null()).spawn().unwrap();
    let merged = store.path("top", "merged");
    wait_until("the layer to be locked", BOUND, || {
        let dir = File::open(store.path("top", "")).unwrap();
        rustix::fs::flock(&dir, rustix::fs::FlockOperation::NonBlockingLockShared).is_err()
    });
    assert!(!is_mounted(&merged), "mounted while an engine decides");
    drop(file);
    assert!(child.wait().unwrap().success());
    store.unmount("top");
    assert_eq!(counts(&store), other);
}

both!(a_damaged_file_of_counts_is_told);
fn a_damaged_file_of_counts_is_told() {
    let store = two_layers();
    store.mount(&["top"]);
    let file = store.run_root.join("overlay-layers/mountpoints.json");
    fs::write(&file, "[{").unwrap();
    let sentence = store.fails(&["layer", "unmount", "top"]);
    assert!(sentence.contains("is no list of mounts") && sentence.contains("; remove it when"));
    fs::remove_file(&file).unwrap();
    store.unmount("top");
    assert!(!is_mounted(&store.path("top", "merged")));
}

// `lamina layer remove` of a layer that an image of podman has: podman would fail from then on.
both!(a_layer_that_records_name_is_not_removed);
fn a_layer_that_records_name_is_not_removed() {
    let store = TestStore::new();
    for id in ["free", "engine", "volatile", "image"] {
        store.layer(id, None, "");
    }
    record(&store, &["engine"]);
    write(&store.run_root.join("overlay-layers/volatile-layers.json"), r#"[{"id":"volatile"}]"#);
    let image = r#"{"names":[],"layers":["image"],"config":"{}"}"#;
    write(&store.root.join("lamina-images/x.json"), image);
    for (id, whose) in
        [("engine", "an engine"), ("volatile", "an engine"), ("image", "lamina image")]
    {
        let sentence = store.fails(&["layer", "remove", id]);
        assert!(sentence.contains(&format!("records of {whose} name it; remove")), "{sentence}");
        assert!(sentence.ends_with("or say --force\n"), "{sentence}");
    }
    let done = store.ok(&["store", "gc", "--orphans"]);
    assert!(done.contains(": free: ") && done.lines().count() == 1, "{done}");
    assert_eq!(store.ok(&["store", "list"]), "engine\nimage\nvolatile\n");
    assert!(!store.ok(&["store", "df"]).contains("no image or container knows it"));
    for id in ["engine", "volatile", "image"] {
        store.ok(&["layer", "remove", "--force", id]);
    }
    assert_eq!(store.ok(&["store", "list"]), "");
    store.check_no_leftovers();
    // Nothing can be said of any layer.
    store.layer("some", None, "");
    write(&store.root.join("overlay-layers/layers.json"), "[{");
    assert!(store.fails(&["layer", "remove", "some"]).contains("is no list of layers"));
    store.ok(&["layer", "remove", "--force", "some"]);
}

/// The lines of the mount table for one mountpoint.
fn table_lines(path: &Path) -> Vec<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let here = |line: &&str| line.split(' ').nth(4) == path.to_str();
    table.lines().filter(here).map(str::to_owned).collect()
}

// Podman binds the home over itself before it mounts: a mount made before that would be hidden.
both!(the_home_is_a_private_mount_until_it_is_cleaned_up);
fn the_home_is_a_private_mount_until_it_is_cleaned_up() {
    let mut store = two_layers();
    store.layer("other", None, "");
    store.mounts_home = true;
    record(&store, &["top", "other", "base"]);
    // Only what is mounted needs it.
    store.ok(&["store", "status"]);
    assert!(table_lines(&store.home()).is_empty());
    let spawn = |id: &str| {
        let mut command = store.command(&["layer", "mount", id]);
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let children: Vec<_> = ["top", "other", "base"].into_iter().map(spawn).collect();
    for child in children {
        let out = child.wait_with_output().unwrap();
        assert!(out.status.success(), "{}", said(&out));
    }
    let lines = table_lines(&store.home());
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(!lines[0].contains("shared:") && !lines[0].contains("master:"), "{lines:?}");
    let merged = store.path("top", "merged");
    assert_eq!(text(merged.join("f")), "base");
    let sentence = store.fails(&["store", "cleanup"]);
    assert!(sentence.contains("is mounted; unmount it first"), "{sentence}");
    for id in ["top", "other", "base"] {
        store.unmount(id);
    }
    assert_eq!(table_lines(&store.home()).len(), 1);
    for dir in ["old/dir", "busy/dir"] {
        fs::create_dir_all(store.home().join("staging").join(dir)).unwrap();
    }
    fs::write(store.home().join("staging/old/staging.lock"), "").unwrap();
    let busy = store.home().join("staging/busy/staging.lock");
    fs::write(&busy, "").unwrap();
    let owner = File::options().write(true).open(&busy).unwrap();
    lock_classically(&owner);
    let sentence = store.fails(&["store", "cleanup"]);
    assert!(sentence.contains("a layer is being unpacked there"), "{sentence}");
    drop(owner);
    let storage_lock = store.root.join("storage.lock");
    let writer = fs::read_to_string(&storage_lock).unwrap();
    for _ in 0..2 {
        store.ok(&["store", "cleanup"]);
        assert!(table_lines(&store.home()).is_empty());
    }
    assert_eq!(fs::read_dir(store.home().join("staging")).unwrap().count(), 0);
    assert_ne!(fs::read_to_string(&storage_lock).unwrap(), writer, "engines do not learn of it");
    assert!(store.path("top", "diff").is_dir());
    // What is mounted in the home already would be hidden.
    store.mounts_home = false;
    store.mount(&["top"]);
    store.mounts_home = true;
    store.mount(&["other"]);
    assert!(table_lines(&store.home()).is_empty() && is_mounted(&merged));
    store.unmount("top");
    store.unmount("other");
}

// A disk of its own for the layers is made private, and stays.
#[test]
fn a_home_that_is_a_filesystem_stays_mounted() {
    needs_root!();
    let mut store = TestStore::new();
    store.mounts_home = true;
    let home = store.home();
    let mounted = |words: &[&str]| {
        let status = std::process::Command::new("mount").args(words).arg(&home).status();
        assert!(status.unwrap().success());
    };
    mounted(&["-t", "tmpfs", "tmpfs"]);
    mount_change(&home, MountPropagationFlags::SHARED).unwrap();
    store.layer("base", None, "file f 644 x\n");
    record(&store, &["base"]);
    let merged = store.mount(&["base"]);
    assert_eq!(text(merged.join("f")), "x");
    store.unmount("base");
    store.ok(&["store", "cleanup"]);
    let lines = table_lines(&home);
    assert!(lines.len() == 1, "a filesystem of the user was unmounted");
    assert!(!lines[0].contains("shared:"), "{lines:?}");
    umount(&home);
}

// An engine that ends unmounts the home with all that is in it, unless a layer is mounted that it knows.
both!(a_layer_that_no_engine_knows_is_mounted_where_none_unmounts_it);
fn a_layer_that_no_engine_knows_is_mounted_where_none_unmounts_it() {
    let mut store = two_layers();
    store.mounts_home = true;
    let apart = store.run_root.join("overlay/top/merged");
    for backend in ["kernel", "fuse"] {
        let merged = store.mount(&["--backend", backend, "top"]);
        assert_eq!(merged, apart);
        assert!(table_lines(&store.home()).is_empty(), "the home need not be a mount");
        fs::write(merged.join(backend), "x").unwrap();
        let metadata = store.ok(&["layer", "metadata", "top"]);
        assert!(metadata.contains(&format!("MergedDir: {}\n", apart.display())), "{metadata}");
        // It stays where it is, whatever is known or said later.
        record(&store, &["top"]);
        assert_eq!(store.mount(&["top"]), apart);
        store.mounts_home = false;
        assert_eq!(store.mount(&["top"]), apart);
        store.mounts_home = true;
        assert!(store.fails(&["layer", "remove", "--force", "top"]).contains("is mounted"));
        for _ in 0..3 {
            assert!(is_mounted(&apart));
            store.unmount("top");
        }
        assert!(!apart.parent().unwrap().exists());
        let merged = store.mount(&["--backend", backend, "top"]);
        assert_eq!(merged, store.path("top", "merged"));
        assert_eq!(text(merged.join(backend)), "x");
        // It stays here as well.
        fs::remove_file(store.root.join("overlay-layers/layers.json")).unwrap();
        assert_eq!(store.mount(&["top"]), merged);
        store.unmount("top");
        store.unmount("top");
        assert!(!is_mounted(&merged));
        store.ok(&["store", "cleanup"]);
    }
    // Copies are made beside the layers, wherever mounts would be.
    let merged = store.mount(&["--backend", "flat", "top"]);
    assert_eq!(merged, store.path("top", "merged"));
    assert_eq!(store.mount(&["top"]), merged);
    store.unmount("top");
    store.unmount("top");
    assert_eq!(fs::read_dir(&merged).unwrap().count(), 0);
    assert_eq!(store.ok(&["store", "check"]), "");
}
