//! What is wrong with a store is found, told, and mended as far as it can be; what killed processes
//! leave at any step; and many processes at once.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::process::Command;

use fuse_tests::case::{BOUND, is_mounted, said, text, the_server};
use fuse_tests::env::{self, wait_until};
use fuse_tests::store::TestStore;
use fuse_tests::trace::no_strace;
use fuse_tests::{both, kill, needs_root, skip};
use rustix::process::{Signal, kill_process};

/// The kinds of what is wrong, sorted as they are told.
#[track_caller]
fn kinds(store: &TestStore) -> Vec<String> {
    let out = store.run(&["store", "check"]);
    let text = String::from_utf8(out.stdout).unwrap();
    let kinds: Vec<String> =
        text.lines().map(|line| line.split(':').next().unwrap().to_owned()).collect();
    assert_eq!(out.status.success(), kinds.is_empty(), "{text}");
    kinds
}

fn chain_of_three() -> TestStore {
    let store = TestStore::new();
    store.layer("a", None, "file f 644 a\n");
    store.layer("b", Some("a"), "file g 644 b\n");
    store.layer("c", Some("b"), "file h 644 c\n");
    store
}

both!(a_sound_store_is_told_to_be_so);
fn a_sound_store_is_told_to_be_so() {
    let store = chain_of_three();
    // What podman tries out while it starts is not ours to judge.
    fs::create_dir_all(store.home().join("compat1234/lower1")).unwrap();
    assert_eq!(store.ok(&["store", "check"]), "");
    assert_eq!(store.ok(&["store", "check", "--json"]), "[]\n");
    assert_eq!(store.ok(&["store", "check", "--repair"]), "");
    assert!(store.home().join("compat1234/lower1").is_dir());
    let docker = TestStore::with_driver("overlay2");
    docker.layer("base", None, "");
    docker.layer("top", Some("base"), "");
    assert_eq!(docker.ok(&["store", "check"]), "");
}

// One fault of each kind, each mended without touching a layer that has its content.
both!(every_fault_is_found_and_mended);
fn every_fault_is_found_and_mended() {
    let link =
        |store: &TestStore, id: &str| store.home().join("l").join(text(store.path(id, "link")));
    type Harm = Box<dyn Fn(&TestStore)>;
    let faults: Vec<(&str, Harm)> = vec![
        ("lost-link", Box::new(move |s| fs::remove_file(link(s, "b")).unwrap())),
        ("lost-link-file", Box::new(|s| fs::remove_file(s.path("b", "link")).unwrap())),
        ("lost-link-file", Box::new(|s| fs::write(s.path("c", "link"), "").unwrap())),
        (
            "dangling-link",
            Box::new(|s| symlink("../gone/diff", s.home().join("l").join("Q".repeat(26))).unwrap()),
        ),
        (
            "dangling-link",
            Box::new(|s| symlink("../a/diff", s.home().join("l").join("Q".repeat(26))).unwrap()),
        ),
        ("strange-link", Box::new(|s| fs::write(s.home().join("l/junk"), "").unwrap())),
        ("incomplete", Box::new(|s| fs::create_dir_all(s.path(&"5f".repeat(32), "work")).unwrap())),
        ("incomplete", Box::new(|s| fs::create_dir(s.path("half", "")).unwrap())),
        ("damaged-lower", Box::new(|s| fs::write(s.path("c", "lower"), "").unwrap())),
        ("damaged-lower", Box::new(|s| fs::remove_file(s.path("c", "lower")).unwrap())),
        ("damaged-lower", Box::new(|s| fs::write(s.path("c", "lower-layers"), "b:").unwrap())),
        ("lost-directory", Box::new(|s| fs::remove_dir(s.path("c", "work")).unwrap())),
        ("unfinished-rotation", Box::new(|s| fs::create_dir(s.path("c", "diff.next")).unwrap())),
        (
            "leftover",
            Box::new(|s| fs::write(s.path("c", &format!("link.{}", "Q".repeat(26))), "").unwrap()),
        ),
        (
            "stale-temp",
            Box::new(|s| fs::create_dir_all(s.home().join("tempdirs/temp-dir-X/0-x")).unwrap()),
        ),
        (
            "stale-staging",
            Box::new(|s| {
                fs::create_dir_all(s.home().join("staging/X/dir")).unwrap();
                File::create(s.home().join("staging/X/staging.lock")).unwrap();
            }),
        ),
        (
            "stale-count",
            Box::new(|s| {
                let dir = s.run_root.join("overlay/lamina-mounts");
                fs::create_dir_all(&dir).unwrap();
                let count = "{\"count\":2,\"backend\":\"kernel\",\"read_only\":false}";
                fs::write(dir.join("c"), count).unwrap();
            }),
        ),
    ];
    for (kind, harm) in faults {
        let store = chain_of_three();
        let before = store.ok(&["layer", "metadata", "c"]);
        harm(&store);
        assert_eq!(kinds(&store), [kind]);
        assert_eq!(kinds(&store), [kind], "looking changed something");
        let mended = store.ok_with_warning(&["store", "check", "--repair"]);
        assert!(mended.starts_with(kind), "{mended}");
        assert!(kinds(&store).is_empty());
        assert_eq!(store.ok(&["layer", "metadata", "c"]), before, "{kind}");
        let merged = store.ok(&["layer", "mount", "c"]);
        for (name, content) in [("f", "a"), ("g", "b"), ("h", "c")] {
            assert_eq!(text(std::path::Path::new(merged.trim_end()).join(name)), content, "{kind}");
        }
        store.ok(&["layer", "unmount", "c"]);
    }
}

// All links at once, as after a hard reset of an old store.
both!(a_store_without_any_link_is_mended);
fn a_store_without_any_link_is_mended() {
    let store = chain_of_three();
    let before = (store.links(), store.ok(&["layer", "metadata", "c"]));
    fs::remove_dir_all(store.home().join("l")).unwrap();
    for id in ["a", "b", "c"] {
        let lower_layers = store.path(id, "lower-layers");
        if lower_layers.exists() {
            fs::remove_file(lower_layers).unwrap();
        }
    }
    assert!(kinds(&store).contains(&"lost-link".to_owned()));
    store.ok_with_warning(&["store", "check", "--repair"]);
    assert_eq!((store.links(), store.ok(&["layer", "metadata", "c"])), before);
}

// What cannot be mended is told, and nothing is removed for it.
both!(a_missing_parent_is_told_and_nothing_removed);
fn a_missing_parent_is_told_and_nothing_removed() {
    let store = chain_of_three();
    fs::remove_dir_all(store.path("a", "")).unwrap();
    let out = store.run(&["store", "check", "--repair"]);
    assert!(!out.status.success());
    assert!(said(&out).contains("2 things are wrong"), "{}", said(&out));
    assert_eq!(kinds(&store), ["missing-parent", "missing-parent"]);
    assert_eq!(store.ok(&["store", "list"]), "b\nc\n");
    assert_eq!(text(store.diff("c").join("h")), "c");
    let sentence = store.fails(&["layer", "mount", "c"]);
    assert!(sentence.contains("the layer a beneath it is missing"), "{sentence}");
}

// A list that is not the parent's with the parent before it, as of two layers that name each other.
both!(lists_that_contradict_each_other_are_told);
fn lists_that_contradict_each_other_are_told() {
    let store = chain_of_three();
    for (id, name) in [("a", "c"), ("c", "a")] {
        let link = text(store.path(name, "link"));
        fs::write(store.path(id, "lower"), format!("l/{link}")).unwrap();
        fs::write(store.path(id, "lower-layers"), name).unwrap();
    }
    assert!(!store.run(&["store", "check", "--repair"]).status.success());
    assert_eq!(kinds(&store), ["wrong-lower", "wrong-lower", "wrong-lower"]);
    let told = store.run(&["store", "check"]);
    let told = String::from_utf8(told.stdout).unwrap();
    assert!(told.contains("b: names nothing beneath its parent a, which names c"), "{told}");
    for id in ["a", "b", "c"] {
        fs::remove_file(store.path(id, "lower-layers")).unwrap();
    }
    // Of `lower` alone too.
    assert_eq!(kinds(&store), ["wrong-lower", "wrong-lower", "wrong-lower"]);
}

// The content of a layer may be a symlink into an additional layer store, and nowhere else.
both!(content_that_cannot_be_opened_is_told);
fn content_that_cannot_be_opened_is_told() {
    let store = chain_of_three();
    for (target, why) in [("../../../etc", "which is no content"), ("/no/such", "mount the layer")]
    {
        fs::rename(store.diff("c"), store.root.join("kept")).unwrap();
        symlink(target, store.diff("c")).unwrap();
        assert_eq!(kinds(&store), ["lost-content"]);
        let told = store.run(&["store", "check"]);
        assert!(String::from_utf8(told.stdout).unwrap().contains(why));
        assert!(store.fails(&["layer", "mount", "c"]).contains("/"));
        fs::remove_file(store.diff("c")).unwrap();
        fs::rename(store.root.join("kept"), store.diff("c")).unwrap();
        assert!(kinds(&store).is_empty());
    }
}

both!(a_dead_mount_is_found_and_taken_away);
fn a_dead_mount_is_found_and_taken_away() {
    let store = chain_of_three();
    store.ok(&["layer", "mount", "--backend", "fuse", "c"]);
    let merged = store.path("c", "merged");
    kill_process(the_server(&merged), Signal::KILL).unwrap();
    wait_until("the mount to die", BOUND, || rustix::fs::statfs(&merged).is_err());
    assert_eq!(kinds(&store), ["dead-mount", "stale-count"]);
    store.ok(&["store", "check", "--repair"]);
    assert!(!is_mounted(&merged) && kinds(&store).is_empty());
}

// 85 GB that nobody could see: each byte has an owner, and what has none can be given back.
both!(df_tells_every_byte_and_gc_gives_back_what_nobody_needs);
fn df_tells_every_byte_and_gc_gives_back_what_nobody_needs() {
    let store = chain_of_three();
    fs::write(store.diff("b").join("big"), vec![1; 3 << 20]).unwrap();
    fs::hard_link(store.diff("b").join("big"), store.diff("b").join("again")).unwrap();
    fs::create_dir_all(store.home().join("staging/X/dir")).unwrap();
    fs::write(store.home().join("staging/X/dir/f"), vec![1; 1 << 20]).unwrap();
    let df = store.ok(&["store", "df"]);
    let all: u64 = df.lines().last().unwrap().split_whitespace().next().unwrap().parse().unwrap();
    let du = Command::new("du").args(["-s", "-B1"]).arg(store.home()).output().unwrap();
    let du = String::from_utf8(du.stdout).unwrap();
    let du: u64 = du.split_whitespace().next().unwrap().parse().unwrap();
    assert_eq!(all, du, "{df}");
    let of_b = df.lines().find(|line| line.ends_with("layer b")).unwrap();
    let content: u64 = of_b.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!((3 << 20..4 << 20).contains(&content), "{df}");
    let sentence = store.fails(&["store", "gc", "--orphans"]);
    assert!(sentence.contains("needs overlay-layers/layers.json"), "{sentence}");
    let known = r#"[{"id":"a","created":"2026-01-01T00:00:00Z"},{"id":"b","parent":"a"}]"#;
    fs::write(store.root.join("overlay-layers/layers.json"), known).unwrap();
    assert!(store.ok(&["store", "df"]).contains("layer c (no image or container knows it)"));
    assert_eq!(store.ok(&["store", "gc"]), "");
    assert!(store.ok(&["store", "gc", "--orphans"]).contains(": c: no image or container knew it"));
    assert_eq!(store.ok(&["store", "list"]), "a\nb\n");
    store.check_no_leftovers();
}

/// The words of one command and what the store looked like before, by what follows.
struct Scene {
    name: &'static str,
    words: &'static [&'static str],
    prepare: fn(&TestStore),
    /// Calls from one kill to the next; more than one where there are very many.
    stride: usize,
}

const SCENES: [Scene; 9] = [
    scene("init", &["store", "init"], |_| {}, 3),
    scene("create", &["layer", "create", "--parent", "b", "new"], |_| {}, 3),
    scene("probe", &["store", "probe"], |_| {}, 9),
    scene("mount", &["layer", "mount", "c"], |_| {}, 5),
    scene(
        "remove",
        &["layer", "remove", "gone"],
        |store| store.layer("gone", Some("b"), "file d/e/f 644 x\nfile g 644 y\n"),
        3,
    ),
    scene(
        "unmount",
        &["layer", "unmount", "c"],
        |store| drop(store.ok(&["layer", "mount", "c"])),
        3,
    ),
    scene("repair", &["store", "check", "--repair"], lose_links, 3),
    scene(
        "update-id-map",
        &["layer", "update-id-map", "--to-uidmap", "0:9:9", "--to-gidmap", "0:9:9", "gone"],
        |store| store.layer("gone", Some("b"), "file d/e/f 644 x\n"),
        9,
    ),
    scene("cleanup", &["store", "cleanup"], bind_home, 3),
];

const fn scene(
    name: &'static str,
    words: &'static [&'static str],
    prepare: fn(&TestStore),
    stride: usize,
) -> Scene {
    Scene { name, words, prepare, stride }
}

/// Leaves what mounts and killed engines leave.
fn bind_home(store: &TestStore) {
    if !is_mounted(&store.home()) {
        rustix::mount::mount_bind(store.home(), store.home()).unwrap();
    }
    fs::create_dir_all(store.home().join("staging/X/dir")).unwrap();
    fs::write(store.home().join("staging/X/staging.lock"), "").unwrap();
}

fn lose_links(store: &TestStore) {
    fs::remove_dir_all(store.home().join("l")).unwrap();
    fs::remove_file(store.path("c", "link")).unwrap();
    fs::write(store.path("c", "lower"), "").unwrap();
}

// Killed at each system call in turn: the store opens, and is sound after at most one start and one
// repair of what only a repair may touch.
#[test]
fn a_command_killed_at_any_step_leaves_a_store_that_recovers() {
    needs_root!();
    if let Some(reason) = no_strace() {
        skip!("{reason}");
    }
    for scene in SCENES {
        let store = chain_of_three();
        // What an earlier round finished is undone, so that each begins alike.
        let prepare = || {
            for id in ["c", "gone"] {
                while is_mounted(&store.path(id, "merged")) {
                    store.ok(&["layer", "unmount", id]);
                }
            }
            for id in ["new", "gone"] {
                if store.path(id, "").exists() {
                    store.ok(&["layer", "remove", id]);
                }
            }
            (scene.prepare)(&store);
        };
        let command = store.command(scene.words);
        // The first mount tries what the machine can do.
        prepare();
        store.run(scene.words);
        prepare();
        let calls = kill::calls(&command, scene.stride);
        let mut kills = 0;
        for (step, call) in calls.iter().enumerate() {
            prepare();
            kills += usize::from(kill::at(&command, call));
            let place = format!("{} killed at call {step}, {call:?}", scene.name);
            // Any command may be the next one.
            let listed = store.ok_with_warning(&["store", "list"]);
            assert!(listed.starts_with("a\nb\nc\n"), "{place}: {listed}");
            let found: Vec<String> = kinds(&store)
                .into_iter()
                .filter(|kind| match scene.name {
                    "repair" => false,
                    "update-id-map" if kind == "unfinished-rotation" => false,
                    // A count that is not believed is no harm, and nobody waits for its removal.
                    _ => kind != "stale-count",
                })
                .collect();
            assert!(found.is_empty(), "{place}: {found:?}");
            store.ok_with_warning(&["store", "check", "--repair"]);
            assert!(kinds(&store).is_empty(), "{place}");
            store.check_no_leftovers();
            let merged = store.ok_with_warning(&["layer", "mount", "c"]);
            assert_eq!(text(std::path::Path::new(merged.trim_end()).join("f")), "a", "{place}");
            store.ok(&["layer", "unmount", "c"]);
        }
        // Names and counts are not the same each time.
        assert!(kills + 8 > calls.len(), "{}: {kills} of {}", scene.name, calls.len());
        while is_mounted(&store.path("c", "merged")) {
            store.ok(&["layer", "unmount", "c"]);
        }
    }
}

fn number(variable: &str, default: usize) -> usize {
    std::env::var(variable).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

// Eight processes make, mount, use and remove their own layers, on parents that they share.
both!(eight_processes_at_once_leave_nothing);
fn eight_processes_at_once_leave_nothing() {
    let rounds = number("FUSE_TESTS_STORE_ROUNDS", 1);
    let layers = number("FUSE_TESTS_STORE_LAYERS", 8);
    let store = chain_of_three();
    for round in 0..rounds {
        std::thread::scope(|scope| {
            for worker in 0..8 {
                let store = &store;
                scope.spawn(move || {
                    for layer in 0..layers {
                        let id = format!("w{worker}-{layer}");
                        let backend = if layer % 8 == 7 { "fuse" } else { "kernel" };
                        store.ok(&["layer", "create-rw", "--parent", "c", &id]);
                        let words = ["layer", "mount", "--backend", backend, &id];
                        let merged = store.ok(&words);
                        let merged = std::path::Path::new(merged.trim_end());
                        assert_eq!(text(merged.join("h")), "c");
                        fs::write(merged.join("own"), &id).unwrap();
                        // The parent is mounted by all of them now and then.
                        if layer % 4 == 0 {
                            store.ok(&["layer", "mount", "--read-only", "b"]);
                            store.ok(&["layer", "unmount", "b"]);
                        }
                        store.ok(&["layer", "unmount", &id]);
                        assert_eq!(text(store.diff(&id).join("own")), id);
                    }
                    for layer in 0..layers {
                        store.ok(&["layer", "remove", &format!("w{worker}-{layer}")]);
                    }
                });
            }
        });
        assert_eq!(store.ok(&["store", "list"]), "a\nb\nc\n", "round {round}");
        assert_eq!(store.links().len(), 3);
        assert!(kinds(&store).is_empty());
        store.check_no_leftovers();
        assert!(env::mounts_below(&store.home()).is_empty());
        let counts = store.run_root.join("overlay/lamina-mounts");
        assert_eq!(fs::read_dir(counts).unwrap().count(), 0);
    }
}
