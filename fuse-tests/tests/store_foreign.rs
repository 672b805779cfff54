//! What others bring to a store: layers of additional layer stores, and content that is staged.

use std::fs::{self, File};
use std::process::{Command, Stdio};

use fuse_tests::case::{names, put, said, sh, text};
use fuse_tests::store::{TestStore, lock_classically};
use fuse_tests::{both, needs_root};

const DIGEST: &str = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
const REFERENCE: &str = "docker.io/library/alpine:3??>";
/// Base64 has a slash, and so another directory.
const ENCODED: &str = "ZG9ja2VyLmlvL2xpYnJhcnkvYWxwaW5lOjM/Pz4=";

/// A store with an additional layer store beside it that has one layer.
fn with_additional(with_reference: bool) -> (TestStore, std::path::PathBuf) {
    let mut store = TestStore::new();
    let place = store.sandbox.root().join("additional");
    let layer = if with_reference { place.join(ENCODED).join(DIGEST) } else { place.join(DIGEST) };
    fs::create_dir_all(layer.join("diff/d")).unwrap();
    put(layer.join("diff/d/a"), "lent");
    put(layer.join("info"), "{\"compressed-size\":7}");
    put(layer.join("blob"), "archive");
    let suffix = if with_reference { ":ref" } else { "" };
    let option = format!("overlay.additionallayerstore={}{suffix}", place.display());
    store.arguments = vec!["--storage-opt".into(), option];
    (store, layer)
}

both!(layers_lie_in_additional_layer_stores);
fn layers_lie_in_additional_layer_stores() {
    for with_reference in [false, true] {
        let (store, layer) = with_additional(with_reference);
        let create = ["layer", "create", "--toc-digest", DIGEST, "--reference"];
        let said = store.ok(&[&create[..], &[REFERENCE, "--json", "lent"]].concat());
        assert!(said.contains("\"info\":{\"compressed-size\":7}"), "{said}");
        assert!(said.contains(&format!("\"blob\":\"{}", layer.join("blob").display())), "{said}");
        // It is told of the use.
        assert!(layer.join("use").exists());
        assert_eq!(fs::read_link(store.diff("lent")).unwrap(), layer.join("diff"));
        assert_eq!(text(store.path("lent", "additionallayer")), layer.to_str().unwrap());
        store.ok(&["layer", "create-rw", "--parent", "lent", "top"]);
        let merged = store.mount(&["top"]);
        assert_eq!(text(merged.join("d/a")), "lent");
        sh(&merged, "rm d/a; echo b > d/b");
        store.unmount("top");
        assert_eq!(store.ok(&["layer", "changes", "--id", "top"]), "C /d\nD /d/a\nA /d/b\n");
        assert_eq!(text(layer.join("diff/d/a")), "lent");
        store.ok(&["layer", "remove", "top"]);
        // It is told that nobody uses it any more: one that does not count keeps what it has.
        store.ok(&["layer", "remove", "lent"]);
        assert_eq!(names(&layer), ["blob", "diff", "info", "use"]);
        assert_eq!(store.ok(&["store", "list"]), "");
        store.check_no_leftovers();
        // What is not whole there is not there.
        fs::remove_file(layer.join("info")).unwrap();
        let sentence = store.fails(&[&create[..], &[REFERENCE, "lent"]].concat());
        assert!(sentence.contains("no additional layer store has it"), "{sentence}");
        store.fails(&["layer", "create", "--toc-digest", "sha256:../../x", "lent"]);
    }
}

// The calls by which such stores count: one that does answers them with ENOENT.
#[test]
fn uses_and_releases_are_told() {
    needs_root!();
    let (store, layer) = with_additional(false);
    let traced = |words: &[&str], calls: &str| {
        let file = store.sandbox.root().join("trace");
        let command = store.command(words);
        let mut strace = Command::new("strace");
        strace.args(["-f", "-qq", "-e", &format!("trace={calls}"), "-o"]).arg(&file);
        // As a store that counts.
        let path = if calls == "rmdir,unlinkat" { layer.clone() } else { layer.join("use") };
        strace.args(["-P", path.to_str().unwrap()]);
        strace.arg("-e").arg(format!("inject={calls}:error=ENOENT"));
        strace.arg(command.get_program()).args(command.get_args());
        let out = strace.stdin(Stdio::null()).output().unwrap();
        assert!(out.status.success(), "{}", said(&out));
        text(file)
    };
    let used = traced(&["layer", "create", "--toc-digest", DIGEST, "lent"], "openat");
    assert!(used.contains("O_CREAT") && used.contains("INJECTED"), "{used}");
    assert!(!layer.join("use").exists());
    let released = traced(&["layer", "remove", "lent"], "rmdir,unlinkat");
    assert!(released.contains("INJECTED"), "{released}");
    assert_eq!(store.ok(&["store", "list"]), "");
}

// What a killed process was unpacking goes with the next start; what a living one does stays.
both!(staged_content_goes_with_its_owner);
fn staged_content_goes_with_its_owner() {
    let store = TestStore::new();
    let staging = store.home().join("staging");
    for name in ["STALE", "LIVING", "YOUNG"] {
        fs::create_dir_all(staging.join(name).join("dir/d")).unwrap();
    }
    File::create(staging.join("STALE/staging.lock")).unwrap();
    let lock = File::create(staging.join("LIVING/staging.lock")).unwrap();
    lock_classically(&lock);
    assert_eq!(store.ok(&["store", "list"]), "");
    assert_eq!(names(&staging), ["LIVING", "YOUNG"]);
}
