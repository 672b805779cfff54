//! The layer store: what its operations leave on disk, what they refuse, and what they put right.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{PermissionsExt, chown, symlink};

use fuse_tests::case::{said, text};
use fuse_tests::store::{TestStore, lock_classically, stat_of};
use fuse_tests::trace::no_strace;
use fuse_tests::{both, needs_root, skip};

// Other programs read the same directories: every name, text and mode counts.
both!(the_layout_is_that_of_containers_storage);
fn the_layout_is_that_of_containers_storage() {
    let store = TestStore::new();
    store.layer("base", None, "");
    store.layer("middle", Some("base"), "");
    store.ok(&["layer", "create-rw", "--parent", "middle", "top"]);
    let link = |id: &str| text(store.path(id, "link"));
    for id in ["base", "middle", "top"] {
        let link = link(id);
        assert_eq!(link.len(), 26);
        assert!(link.bytes().all(|b| b.is_ascii_uppercase() || (b'2'..=b'7').contains(&b)));
        assert_eq!(stat_of(&store.path(id, "")), (0o700, 0, 0));
        assert_eq!(stat_of(&store.diff(id)), (0o555, 0, 0));
        assert_eq!(stat_of(&store.path(id, "work")), (0o700, 0, 0));
        assert_eq!(stat_of(&store.path(id, "merged")), (0o700, 0, 0));
        let target = fs::read_link(store.home().join("l").join(link)).unwrap();
        assert_eq!(target.to_str().unwrap(), format!("../{id}/diff"));
    }
    assert_eq!(stat_of(&store.path("base", "empty")), (0o700, 0, 0));
    assert!(!store.path("middle", "empty").exists() && !store.path("base", "lower").exists());
    assert_eq!(text(store.path("middle", "lower")), format!("l/{}", link("base")));
    let (base, middle) = (link("base"), link("middle"));
    assert_eq!(text(store.path("top", "lower")), format!("l/{middle}:l/{base}"));
    assert_eq!(text(store.path("top", "lower-layers")), "middle:base");
    assert_eq!(store.ok(&["store", "list"]), "base\nmiddle\ntop\n");
    let expected = format!(
        "UpperDir: {0}/top/diff\nWorkDir: {0}/top/work\nMergedDir: {0}/top/merged\n\
         LowerDir: {0}/middle/diff:{0}/base/diff\n",
        store.home().display()
    );
    assert_eq!(store.ok(&["layer", "metadata", "top"]), expected);
    assert!(store.ok(&["layer", "metadata", "--json", "base"]).starts_with("{\"MergedDir\":"));
    store.check_no_leftovers();
}

// Docker keeps 128 layers, no lower-layers, nothing to mount for a base, and marks parents.
both!(the_layout_of_docker_is_kept_to);
fn the_layout_of_docker_is_kept_to() {
    let store = TestStore::with_driver("overlay2");
    store.layer("base", None, "");
    assert!(!store.path("base", "committed").exists());
    store.layer("child", Some("base"), "");
    for name in ["work", "merged", "empty", "lower"] {
        assert!(!store.path("base", name).exists(), "{name}");
    }
    assert_eq!(stat_of(&store.diff("base")).0, 0o755);
    assert_eq!(stat_of(&store.path("base", "committed")).0, 0o600);
    assert!(store.path("child", "work").is_dir() && !store.path("child", "merged").exists());
    assert!(!store.path("child", "lower-layers").exists());
    assert_eq!(store.ok(&["layer", "metadata", "child"]).lines().count(), 4);
    assert!(
        !store.root.join("overlay-layers").exists() && !store.root.join("storage.lock").exists()
    );
    store.ok(&["layer", "remove", "child"]);
    store.check_no_leftovers();
}

// A root directory of another mode or owner than the parent's shows in every container.
both!(the_mode_and_owner_of_the_parents_root_are_inherited);
fn the_mode_and_owner_of_the_parents_root_are_inherited() {
    let store = TestStore::new();
    store.layer("base", None, "");
    chown(store.diff("base"), Some(33), Some(44)).unwrap();
    fs::set_permissions(store.diff("base"), Permissions::from_mode(0o1751)).unwrap();
    store.layer("child", Some("base"), "");
    assert_eq!(stat_of(&store.diff("child")), (0o1751, 33, 44));
    assert_eq!(stat_of(&store.path("child", "work")), (0o700, 33, 44));
    let mut masked = TestStore::new();
    masked.arguments = vec!["--storage-opt".into(), "overlay.force_mask=shared".into()];
    masked.layer("base", None, "");
    masked.layer("child", Some("base"), "");
    for id in ["base", "child"] {
        assert_eq!(stat_of(&masked.diff(id)).0, 0o755);
        let value = fuse_tests::case::getx(masked.diff(id), "user.containers.override_stat");
        assert_eq!(value.as_deref(), Some(&b"0:0:0555:dir"[..]), "{id}");
    }
}

both!(what_cannot_be_is_refused_and_changes_nothing);
fn what_cannot_be_is_refused_and_changes_nothing() {
    let store = TestStore::new();
    store.layer("base", None, "");
    store.layer("child", Some("base"), "file f 644 x\n");
    let before = (store.ok(&["store", "list"]), store.links());
    for (words, part) in [
        (&["layer", "create", "base"][..], "base: this layer exists"),
        (&["layer", "create", "--parent", "none", "x"], "none: no such layer"),
        (&["layer", "create", "l"], "is no name of a layer"),
        (&["layer", "create", "../x"], "is no name of a layer"),
        (&["layer", "create", "tempdirs"], "is no name of a layer"),
        (&["layer", "remove", "none"], "none: no such layer"),
        (&["layer", "remove", "base"], "base: the layer child was made on it"),
        (&["layer", "metadata", "none"], "none: no such layer"),
        (&["store", "status", "--storage-opt", "overlay.frob=1"], "known are mountopt, size"),
        (&["store", "status", "--storage-opt", "overlay.use_composefs=true"], "not supported yet"),
        (&["store", "status", "--storage-opt", "overlay.size=1G"], "not supported yet"),
    ] {
        let sentence = store.fails(words);
        assert!(sentence.contains(part), "{words:?}: {sentence}");
    }
    let out = store.run(&["layer", "exists", "none"]);
    assert_eq!((out.status.code(), said(&out).as_str()), (Some(1), ""));
    store.ok(&["layer", "exists", "child"]);
    assert_eq!((store.ok(&["store", "list"]), store.links()), before);
    store.check_no_leftovers();
}

both!(removing_leaves_neither_directory_nor_link);
fn removing_leaves_neither_directory_nor_link() {
    let store = TestStore::new();
    store.layer("a", None, "dir d/e/f 0\nfile d/g 600 x\nsymlink s /nowhere\n");
    store.layer("b", Some("a"), "whiteout d\n");
    store.ok(&["layer", "remove", "b"]);
    assert_eq!(store.links().len(), 1);
    store.ok(&["layer", "remove", "a"]);
    assert_eq!(store.ok(&["store", "list"]), "");
    assert!(store.links().is_empty());
    store.check_no_leftovers();
    // The name is free again, and its link is another.
    store.layer("a", None, "");
}

// 500 with containers/storage, 128 with Docker: mounts of more would fail.
both!(the_depth_of_layers_is_limited);
fn the_depth_of_layers_is_limited() {
    for (driver, most) in [("overlay", 500), ("overlay2", 128)] {
        let store = TestStore::with_driver(driver);
        store.chain("c", most);
        store.layer("fits", Some(&format!("c{most}")), "");
        assert_eq!(text(store.path("fits", "lower")).split(':').count(), most);
        let sentence = store.fails(&["layer", "create", "--parent", "fits", "deep"]);
        assert!(sentence.contains(&format!("has {most} layers beneath it")), "{sentence}");
    }
}

// A hard reset loses symlinks or leaves empty files; nothing but those may have to be made again.
both!(lost_links_are_made_again);
fn lost_links_are_made_again() {
    let store = TestStore::new();
    store.layer("a", None, "");
    store.layer("b", Some("a"), "");
    store.layer("c", Some("b"), "");
    let before = (store.links(), store.ok(&["layer", "metadata", "c"]));
    // Stores of older programs have only the symlinks.
    for id in ["b", "c"] {
        fs::remove_file(store.path(id, "lower-layers")).unwrap();
    }
    for (link, _) in store.links() {
        fs::remove_file(store.home().join("l").join(link)).unwrap();
    }
    fs::write(store.path("c", "link"), "").unwrap();
    assert_eq!(store.ok_with_warning(&["layer", "metadata", "c"]), before.1);
    fs::remove_dir_all(store.home().join("l")).unwrap();
    fs::remove_file(store.path("c", "link")).unwrap();
    assert_eq!(store.ok_with_warning(&["layer", "metadata", "c"]), before.1);
    // Only the link of c, which nobody refers to, has another name.
    let old: Vec<_> = before.0.iter().filter(|(_, target)| target != "../c/diff").collect();
    let now = store.links();
    assert!(old.iter().all(|link| now.contains(link)) && now.len() == 3, "{now:?}");
    // The parent of a new layer needs its file.
    fs::remove_file(store.path("b", "link")).unwrap();
    let out = store.run(&["layer", "create", "--parent", "b", "d"]);
    assert!(out.status.success(), "{}", said(&out));
    let b = old.iter().find(|(_, target)| target == "../b/diff").unwrap();
    assert_eq!(text(store.path("b", "link")), b.0);
    store.check_no_leftovers();
}

// What a killed process left goes at the next start; what a living one works on stays.
both!(stale_temporary_directories_go_and_others_stay);
fn stale_temporary_directories_go_and_others_stay() {
    let store = TestStore::new();
    store.layer("kept", None, "");
    let temps = store.home().join("tempdirs");
    let link = "Z".repeat(26);
    let stage = |name: &str| {
        let layer = temps.join(format!("temp-dir-{name}/0-gone"));
        fs::create_dir_all(layer.join("diff/d")).unwrap();
        fs::write(layer.join("link"), &link).unwrap();
        layer
    };
    stage("NOLOCK");
    symlink("../gone/diff", store.home().join("l").join(&link)).unwrap();
    stage("STALE");
    File::create(temps.join("lock-STALE")).unwrap();
    File::create(temps.join("lock-ONLY")).unwrap();
    assert_eq!(store.ok(&["store", "list"]), "kept\n");
    store.check_no_leftovers();
    let living = stage("LIVING");
    let lock = File::create(temps.join("lock-LIVING")).unwrap();
    // The classic kind, which other programs take.
    lock_classically(&lock);
    assert_eq!(store.ok(&["store", "list"]), "kept\n");
    assert!(living.join("diff/d").is_dir());
    drop(lock);
    store.ok(&["store", "list"]);
    store.check_no_leftovers();
}

// Image layers and containers on two disks; and stores of others that are only read.
both!(image_stores_are_searched_and_additional_ones_never_written);
fn image_stores_are_searched_and_additional_ones_never_written() {
    let shared = TestStore::new();
    shared.layer("shared", None, "file f 644 x\n");
    let mut store = TestStore::new();
    let images = store.sandbox.root().join("images");
    store.arguments = vec![
        "--imagestore".into(),
        images.to_str().unwrap().into(),
        "--storage-opt".into(),
        format!("overlay.imagestore={}", shared.root.display()),
    ];
    store.ok(&["layer", "create", "--parent", "shared", "ours"]);
    assert!(images.join("overlay/ours/diff").is_dir() && !store.path("ours", "").exists());
    store.ok(&["layer", "create-rw", "--parent", "ours", "container"]);
    assert!(store.diff("container").is_dir());
    assert_eq!(text(store.path("container", "lower-layers")), "ours:shared");
    assert_eq!(store.ok(&["store", "list"]), "container\nours\n");
    let metadata = store.ok(&["layer", "metadata", "container"]);
    let lowers = format!(
        "LowerDir: {}/overlay/ours/diff:{}/shared/diff\n",
        images.display(),
        shared.home().display()
    );
    assert!(metadata.ends_with(&lowers), "{metadata}");
    let sentence = store.fails(&["layer", "remove", "shared"]);
    assert!(sentence.contains("is only read"), "{sentence}");
    store.ok(&["layer", "remove", "container"]);
    store.ok(&["layer", "remove", "ours"]);
    store.check_no_leftovers();
    shared.check_no_leftovers();
}

// One of two wins; nobody gets half a layer.
both!(of_two_who_make_the_same_layer_one_wins);
fn of_two_who_make_the_same_layer_one_wins() {
    let store = TestStore::new();
    for round in 0..10 {
        let id = format!("x{round}");
        let spawn = || {
            let mut command = store.command(&["layer", "create", &id]);
            command.stderr(std::process::Stdio::piped()).spawn().unwrap()
        };
        let outcomes = [spawn(), spawn(), spawn()].map(|child| child.wait_with_output().unwrap());
        let won = outcomes.iter().filter(|out| out.status.success()).count();
        assert_eq!(won, 1);
        for out in outcomes.iter().filter(|out| !out.status.success()) {
            assert!(said(out).contains("this layer exists"), "{}", said(out));
        }
    }
    assert_eq!(store.links().len(), 10);
    store.check_no_leftovers();
}

// Layers by the name that they have in the store: to an archive, from one, and what they change.
both!(layers_come_from_archives_and_go_to_them);
fn layers_come_from_archives_and_go_to_them() {
    let store = TestStore::new();
    store.layer("base", None, "dir d 750\nfile d/b 644 size:5000\nfile a 600 x");
    store.layer("top", Some("base"), "file new 644 y\ndir d 700\nwhiteout a");
    let archive = store.run(&["layer", "diff", "--id", "top"]).stdout;
    assert!(archive.len().is_multiple_of(512) && !archive.is_empty());
    let file = store.home().with_extension("tar");
    std::fs::write(&file, &archive).unwrap();
    let file = file.to_str().unwrap();
    let apply = ["layer", "apply", "--id", "again", "--parent", "base"];
    assert!(store.ok(&[&apply[..], &[file]].concat()).starts_with("sha256:"));
    let of = |words: [&str; 2], id: &str| store.ok(&["layer", words[0], "--id", id, words[1]]);
    assert_eq!(of(["changes", "--json"], "again"), of(["changes", "--json"], "top"));
    assert!(of(["changes", "--json"], "again").contains(r#"{"kind":"D","path":"/a"}"#));
    assert_eq!(of(["diff-size", "--json"], "again"), "{\"size\":1}\n");
    assert!(store.run(&["layer", "diff", "--id", "again"]).stdout == archive);
    assert!(store.fails(&[&apply[..], &[file]].concat()).contains("again"));
    std::fs::write(file, &archive[..700]).unwrap();
    store.fails(&["layer", "apply", "--id", "torn", "--parent", "base", file]);
    assert!(!store.run(&["layer", "exists", "torn"]).status.success());
    store.fails(&["layer", "diff", "--id", "torn"]);
    store.check_no_leftovers();
    std::fs::remove_file(file).unwrap();
}

/// How often a command calls each of these.
fn syncs(store: &TestStore, words: &[&str]) -> [usize; 2] {
    let log = store.sandbox.root().join("syncs");
    let command = store.command(words);
    let mut strace = std::process::Command::new("strace");
    strace.args(["-f", "-qq", "-e", "trace=fsync,fdatasync,syncfs", "-o"]).arg(&log);
    let status = strace.arg(command.get_program()).args(command.get_args()).status().unwrap();
    assert!(status.success(), "{words:?}");
    let log = text(&log);
    ["syncfs(", "sync("].map(|call| log.lines().filter(|line| line.contains(call)).count())
}

// `sync=filesystem`: all that was written into the parents is on disk before their child is there.
#[test]
fn the_filesystem_is_synced_when_it_is_asked_for() {
    needs_root!();
    if let Some(reason) = no_strace() {
        skip!("{reason}");
    }
    let mut store = TestStore::new();
    store.layer("base", None, "");
    let [whole, files] = syncs(&store, &["layer", "create", "--parent", "base", "a"]);
    assert!(whole == 0 && files > 2, "{whole} calls of syncfs, {files} of fsync");
    store.arguments = vec!["--storage-opt".into(), "overlay.sync=filesystem".into()];
    let [whole, files] = syncs(&store, &["layer", "create", "--parent", "base", "b"]);
    assert!(whole == 1 && files > 2, "{whole} calls of syncfs, {files} of fsync");
    store.arguments = vec!["--storage-opt".into(), "overlay.sync=none".into()];
    assert_eq!(syncs(&store, &["layer", "create-rw", "--parent", "b", "c"])[0], 0);
}
