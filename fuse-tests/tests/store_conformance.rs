//! What every driver of layer stores must do, on every backend that serves it: one suite for all.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use fuse_tests::case::{BOUND, append, getx, is_mounted, names, put, said, sh, text};
use fuse_tests::env::{processes_with_argument, wait_until};
use fuse_tests::fixture::fill;
use fuse_tests::store::TestStore;
use fuse_tests::trace::no_strace;
use fuse_tests::tree::{self, Snapshot, assert_same};
use fuse_tests::{both, kill, needs_root, skip};

/// The drivers, each with the backends that serve it.
const ALL: [(&str, &[&str]); 4] = [
    ("overlay", &["kernel", "fuse", "flat"]),
    ("overlay2", &["kernel", "fuse", "flat"]),
    ("overlay1", &["kernel", "fuse", "flat"]),
    ("aufs", &["fuse", "flat"]),
];

fn each(test: impl Fn(&'static str, &'static str)) {
    for (driver, backends) in ALL {
        for backend in backends {
            if *backend == "kernel" && fuse_tests::env::no_kernel_overlay().is_some() {
                continue;
            }
            println!("{driver} by {backend}");
            test(driver, backend);
        }
    }
}

const BASE: &str = "file f 4755 base\nfile big 640 size:300000\nfile hole 644 hole:1000000\n\
     dir d 2750\nfile d/a 644 a\nfile d/b 600 b\ndir d/sub 700\nfile d/sub/deep 400 deep\n\
     dir e 755\nfile e/x 644 x\nfile h1 644 linked\nlink h2 h1\nsymlink s f\nfifo p 640\n\
     xattr f user.note hi\nxattr d user.dir there\nfile gone 644 g\nmtime d 7.7\n";

const CHANGES: &str = "
rm d/b gone
echo new > n
rm -r e; mkdir e; echo y > e/y
chmod 700 f
rm s; mkdir s; echo in > s/in
echo more >> big
ln -s nowhere l
setfattr -n user.more -v 1 d
mkdir -m 1777 t
";

const CHANGED: &str =
    "C /big\nC /d\nD /d/b\nC /e\nD /e/x\nA /e/y\nC /f\nD /gone\nA /l\nA /n\nC /s\nA /s/in\nA /t\n";

fn snapshot(dir: &Path) -> Snapshot {
    let mut tree = tree::snapshot(dir);
    for (name, entry) in &mut tree.entries {
        // The top of a new layer is as old as the layer; trees that share files count their names.
        entry.clear(if name == Path::new(".") { "mtime" } else { "nlink" });
        // The kernel lists other numbers where an upper was not written by itself.
        entry.clear("listed inode");
    }
    tree
}

/// A store with a base that was written through its mount.
fn with_base(driver: &'static str, backend: &str) -> (TestStore, Snapshot) {
    let store = TestStore::with_driver(driver);
    store.ok(&["layer", "create", "base"]);
    let merged = store.mount(&["--backend", backend, "base"]);
    fill(&merged, BASE);
    let tree = snapshot(&merged);
    store.unmount("base");
    (store, tree)
}

fn shown(store: &TestStore, backend: &str, id: &str) -> Snapshot {
    let merged = store.mount(&["--backend", backend, id]);
    let tree = snapshot(&merged);
    store.unmount(id);
    tree
}

/// What a layer changes. A directory made anew is told as that, or by all that it has no more.
fn changes(store: &TestStore, words: &[&str]) -> String {
    let words: Vec<&str> = ["layer", "changes", "--id"].iter().chain(words).copied().collect();
    store.ok(&words).replace("D /e\n", "C /e\nD /e/x\n")
}

/// Packs what a layer changes.
fn pack(store: &TestStore, id: &str) -> String {
    let file = store.sandbox.root().join(format!("{id}.tar")).to_str().unwrap().to_owned();
    store.ok(&["layer", "diff", "--id", id, "--subseconds", "-O", &file]);
    file
}

both!(layers_are_made_shown_changed_packed_and_unpacked);
fn layers_are_made_shown_changed_packed_and_unpacked() {
    each(|driver, backend| {
        let (store, base) = with_base(driver, backend);
        assert_same("the base", &base, &shown(&store, backend, "base"));
        store.ok(&["layer", "create-rw", "--parent", "base", "child"]);
        assert_same("a fresh child", &base, &shown(&store, backend, "child"));
        assert_eq!(store.ok(&["layer", "changes", "--id", "child"]), "");
        let merged = store.mount(&["--backend", backend, "child"]);
        assert!(is_mounted(&merged) || backend == "flat");
        sh(&merged, CHANGES);
        let changed = snapshot(&merged);
        store.unmount("child");
        assert_same("the child", &changed, &shown(&store, backend, "child"));
        assert_same("the base beside it", &base, &shown(&store, backend, "base"));
        assert_eq!(changes(&store, &["child"]), CHANGED);
        let size: u64 = store.ok(&["layer", "diff-size", "--id", "child"]).trim().parse().unwrap();
        // big, f, n, s/in, e/y, and the target of l.
        assert_eq!(size, 300_005 + 4 + 4 + 3 + 2 + 7);
        let file = pack(&store, "child");
        store.ok(&["layer", "apply", "--id", "again", "--parent", "base", &file]);
        assert_same("packed and unpacked", &changed, &shown(&store, backend, "again"));
        assert_same("the base beneath", &base, &shown(&store, backend, "base"));
        assert_eq!(changes(&store, &["again", "--over", "base"]), CHANGED);
        // A child of a container, and one of the image.
        for parent in ["child", "again"] {
            store.ok(&["layer", "create-rw", "--parent", parent, "next"]);
            assert_same(parent, &changed, &shown(&store, backend, "next"));
            store.ok(&["layer", "remove", "next"]);
        }
        assert_eq!(store.ok(&["store", "list"]), "again\nbase\nchild\n");
        for id in ["again", "child", "base"] {
            store.ok(&["layer", "remove", id]);
        }
        assert_eq!(store.ok(&["store", "list"]), "");
        store.check_no_leftovers();
    });
}

/// Splits an archive into a tar-split record: what is no file's data, and the names of files.
const SPLIT: &str = r#"
import base64, json, sys, tarfile
data, at = open(sys.argv[1], "rb").read(), 0
def segment(end):
    if end > at:
        print(json.dumps({"type": 2, "payload": base64.b64encode(data[at:end]).decode()}))
for member in tarfile.open(sys.argv[1]):
    segment(member.offset_data)
    size = member.size if member.isreg() else 0
    print(json.dumps({"type": 1, "name": member.name, "size": size, "payload": "AAAAAAAAAAA="}))
    at = member.offset_data + size
segment(len(data))
"#;

// The bytes that a layer came as, made of its files through those beneath: what engines push again.
both!(the_archive_of_a_layer_is_rebuilt);
fn the_archive_of_a_layer_is_rebuilt() {
    if Command::new("/usr/bin/python3").arg("-V").output().is_err() {
        skip!("needs /usr/bin/python3");
    }
    for (driver, _) in ALL {
        let (store, _) = with_base(driver, "fuse");
        store.ok(&["layer", "create-rw", "--parent", "base", "top"]);
        let merged = store.mount(&["--backend", "fuse", "top"]);
        sh(&merged, CHANGES);
        store.unmount("top");
        let file = pack(&store, "top");
        store.ok(&["layer", "apply", "--id", "new", "--parent", "base", &file]);
        let (record, out) = (format!("{file}.split"), format!("{file}.again"));
        sh(store.sandbox.root(), &format!("/usr/bin/python3 - {file} >{record} <<'END'{SPLIT}END"));
        let words = ["layer", "rebuild", "--id", "new", "--tar-split", &record, "-O", &out];
        store.ok(&words);
        assert!(fs::read(&file).unwrap() == fs::read(&out).unwrap(), "{driver}: other bytes");
        // A file that is not what it was cannot be passed off as that.
        append(store.diff("new").join("big"), "x");
        let sentence = store.fails(&words);
        assert!(sentence.contains("big"), "{driver}: {sentence}");
    }
}

// What one layer hides, the next shows anew, and a third hides again.
both!(deletions_and_opaque_directories_hold_over_layers);
fn deletions_and_opaque_directories_hold_over_layers() {
    each(|driver, backend| {
        let (store, _) = with_base(driver, backend);
        let steps = [
            ("rm -r d; rm f", "!d !f gone"),
            ("mkdir d; echo 2 > d/two; mkdir f", "d/two !d/a f gone"),
            ("rm -r d; rmdir f; rm gone; mkdir gone; echo 3 > gone/g", "!d !f gone/g"),
            ("rm -r gone; mkdir -p d/sub; echo 4 > d/sub/four", "!gone d/sub/four !d/sub/deep"),
        ];
        let mut parent = "base".to_owned();
        for (number, (script, expected)) in steps.iter().enumerate() {
            let (work, id) = (format!("work{number}"), format!("image{number}"));
            store.ok(&["layer", "create-rw", "--parent", &parent, &work]);
            let merged = store.mount(&["--backend", backend, &work]);
            sh(&merged, script);
            let tree = snapshot(&merged);
            store.unmount(&work);
            let file = pack(&store, &work);
            store.ok(&["layer", "apply", "--id", &id, "--parent", &parent, &file]);
            let again = shown(&store, backend, &id);
            assert_same(script, &tree, &again);
            for name in expected.split(' ') {
                let (name, is_there) = name.strip_prefix('!').map_or((name, true), |n| (n, false));
                assert_eq!(again.get(name).is_some(), is_there, "{script}: {name}");
            }
            parent = id;
        }
    });
}

both!(a_large_file_is_kept_whole);
fn a_large_file_is_kept_whole() {
    for (driver, backend) in
        [("overlay", "fuse"), ("overlay2", "kernel"), ("overlay1", "fuse"), ("aufs", "fuse")]
    {
        let (store, _) = with_base(driver, backend);
        let sum = |dir: &Path| sh(dir, "sha256sum < large");
        let merged = store.mount(&["--backend", backend, "base"]);
        sh(&merged, "head -c 100M /dev/urandom > large");
        let written = sum(&merged);
        store.unmount("base");
        store.ok(&["layer", "create-rw", "--parent", "base", "top"]);
        let merged = store.mount(&["--backend", backend, "top"]);
        assert_eq!(sum(&merged), written, "{driver}");
        sh(&merged, "printf x | dd of=large bs=1 seek=50000000 conv=notrunc status=none");
        let changed = sum(&merged);
        store.unmount("top");
        let file = pack(&store, "top");
        store.ok(&["layer", "apply", "--id", "again", "--parent", "base", &file]);
        for (id, expected) in [("base", &written), ("again", &changed), ("top", &changed)] {
            let merged = store.mount(&["--backend", backend, id]);
            assert_eq!(&sum(&merged), expected, "{driver}: {id}");
            store.unmount(id);
        }
    }
}

/// Writes an image of two layers, `base` and `child`, as docker save does.
fn image(store: &TestStore) -> String {
    for id in ["base", "child"] {
        pack(store, id);
    }
    let dir = store.sandbox.root();
    let script = r#"set -e
        for id in base child; do diffs="$diffs${diffs:+,}\"sha256:$(sha256sum <$id.tar | cut -d' ' -f1)\""; done
        printf '{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[%s]}}' "$diffs" >config.json
        echo '[{"Config":"config.json","RepoTags":["localhost/image:1"],"Layers":["base.tar","child.tar"]}]' >manifest.json
        tar -cf image.tar manifest.json config.json base.tar child.tar"#;
    sh(dir, script);
    dir.join("image.tar").to_str().unwrap().to_owned()
}

both!(images_come_in_and_go_out);
fn images_come_in_and_go_out() {
    let (origin, _) = with_base("overlay", "fuse");
    origin.ok(&["layer", "create-rw", "--parent", "base", "child"]);
    let merged = origin.mount(&["--backend", "fuse", "child"]);
    sh(&merged, CHANGES);
    let mut changed = snapshot(&merged);
    origin.unmount("child");
    let file = image(&origin);
    let whole = |mut tree: Snapshot| {
        for (path, entry) in &mut tree.entries {
            let time = entry.get("mtime").split('.').next().unwrap_or_default().to_owned();
            entry.set("mtime", time);
            if path == Path::new(".") {
                entry.clear("mode");
            }
        }
        tree
    };
    changed = whole(changed);
    let top = |store: &TestStore| {
        let list = store.ok(&["image", "list"]);
        let words: Vec<&str> = list.split_whitespace().collect();
        assert_eq!(words[1], "localhost/image:1");
        words[2].to_owned()
    };
    for (driver, _) in ALL {
        let store = TestStore::with_driver(driver);
        store.ok(&["image", "import", &file]);
        let id = top(&store);
        assert_same(driver, &changed, &whole(shown(&store, "fuse", &id)));
        assert!(store.fails(&["layer", "remove", &id]).contains("remove"), "{driver}");
        store.ok(&["image", "import", &file]);
        assert_eq!(store.ok(&["store", "list"]).lines().count(), 2, "{driver}");
        let out = store.sandbox.root().join("out").to_str().unwrap().to_owned();
        store.ok(&["image", "export", "localhost/image:1", &out]);
        let again = TestStore::new();
        again.ok(&["image", "import", &out]);
        let words = ["image", "list"];
        let listed = again.ok(&words);
        assert!(listed.contains("localhost/image:1"), "{driver}: {listed}");
        assert_same(driver, &changed, &whole(shown(&again, "fuse", &top(&again))));
        store.ok(&["image", "remove", "localhost/image:1"]);
        store.ok(&["layer", "remove", &id]);
        store.check_no_leftovers();
    }
}

both!(what_takes_space_is_what_du_says);
fn what_takes_space_is_what_du_says() {
    for (driver, _) in ALL {
        let (store, _) = with_base(driver, "fuse");
        store.ok(&["layer", "create-rw", "--parent", "base", "child"]);
        let merged = store.mount(&["--backend", "fuse", "child"]);
        sh(&merged, CHANGES);
        store.unmount("child");
        // A tree that shares files with another, in overlay1.
        let file = pack(&store, "child");
        store.ok(&["layer", "apply", "--id", "again", "--parent", "base", &file]);
        let told = store.ok(&["store", "df"]);
        let sum = told.lines().last().unwrap().split_whitespace().next().unwrap().to_owned();
        let du = sh(store.home(), "du -s -B1 .");
        assert_eq!(sum, du.split_whitespace().next().unwrap(), "{driver}: {told}");
        for id in ["base", "child", "again"] {
            let line = told.lines().find(|line| line.ends_with(&format!(" layer {id}"))).unwrap();
            let content = line.split_whitespace().nth(1).unwrap();
            assert!(content.parse::<u64>().unwrap() > 4096, "{driver}: {line}");
        }
    }
}

both!(what_is_wrong_with_stores_of_old_is_found_and_mended);
fn what_is_wrong_with_stores_of_old_is_found_and_mended() {
    for driver in ["overlay1", "aufs"] {
        let (store, _) = with_base(driver, "fuse");
        for id in ["one", "two"] {
            store.ok(&["layer", "create-rw", "--parent", "base", id]);
        }
        assert_eq!(store.ok(&["store", "check"]), "", "{driver}");
        let merged = store.mount(&["--backend", "fuse", "one"]);
        assert_eq!(store.ok(&["store", "check"]), "", "{driver}");
        let server = fuse_tests::case::the_server(&merged);
        rustix::process::kill_process(server, rustix::process::Signal::KILL).unwrap();
        wait_until("the server is gone", BOUND, || rustix::fs::statfs(&merged).is_err());
        let is_aufs = driver == "aufs";
        if is_aufs {
            fs::remove_dir(store.home().join("mnt/two")).unwrap();
            fs::create_dir(store.home().join("diff/stray")).unwrap();
            fs::create_dir(store.home().join("diff/full")).unwrap();
            put(store.home().join("diff/full/f"), "kept");
        } else {
            fs::remove_dir_all(store.path("two", "work")).unwrap();
            fs::create_dir(store.path("stray", "")).unwrap();
            put(store.path("stray", "lower-id"), "base");
        }
        let kinds = |text: &str| {
            let mut kinds: Vec<String> =
                text.lines().map(|line| line.split(':').next().unwrap().to_owned()).collect();
            kinds.sort();
            kinds
        };
        let out = store.run(&["store", "check"]);
        assert_eq!(out.status.code(), Some(1), "{driver}");
        let found = kinds(&String::from_utf8(out.stdout).unwrap());
        let wanted: &[&str] = if is_aufs {
            &["dead-mount", "leftover", "leftover", "lost-directory", "stale-count"]
        } else {
            &["dead-mount", "incomplete", "lost-directory", "stale-count"]
        };
        let without_count = |kinds: &[String]| {
            kinds.iter().filter(|kind| *kind != "stale-count").cloned().collect::<Vec<_>>()
        };
        assert_eq!(without_count(&found), wanted[..wanted.len() - 1], "{driver}");
        // Those found at first.
        let mended = kinds(&store.ok(&["store", "gc"]));
        assert!(mended.contains(&"lost-directory".to_owned()), "{driver}: {mended:?}");
        assert!(!is_mounted(&merged), "{driver}");
        let left = store.run(&["store", "check"]);
        if is_aufs {
            // What holds something is left to whoever knows what it is.
            let said = String::from_utf8(left.stdout).unwrap();
            assert!(
                said.starts_with("leftover: diff/full: ") && said.lines().count() == 1,
                "{said}"
            );
            assert_eq!(text(store.home().join("diff/full/f")), "kept");
            fs::remove_dir_all(store.home().join("diff/full")).unwrap();
        }
        assert_eq!(store.ok(&["store", "check"]), "", "{driver}");
        for id in ["one", "two"] {
            shown(&store, "fuse", id);
        }
        // Damage that only its owner can mend.
        if is_aufs {
            put(store.home().join("layers/two"), "lost\nbase\n");
        } else {
            put(store.path("two", "lower-id"), "lost");
        }
        let out = store.run(&["store", "check", "--repair"]);
        assert_eq!(out.status.code(), Some(1));
        assert!(
            String::from_utf8_lossy(&out.stdout).contains("missing-parent: two: lost"),
            "{}",
            said(&out)
        );
        assert_eq!(store.ok(&["store", "list"]), "base\none\ntwo\n");
        assert!(store.fails(&["store", "gc", "--orphans"]).contains("is not known for the driver"));
    }
}

both!(who_mounts_is_told_with_a_reason);
fn who_mounts_is_told_with_a_reason() {
    for (driver, _) in ALL {
        let store = TestStore::with_driver(driver);
        let told = store.ok(&["store", "probe"]);
        assert!(told.starts_with("filesystem: ") && told.contains("\nfuse: yes\n"), "{told}");
        let reason = match driver {
            "aufs" => "backend: fuse\nreason: aufs keeps whiteouts as files",
            _ if told.contains("\noverlay: yes\n") => {
                "backend: kernel\nreason: kernel overlayfs works here"
            }
            _ => "backend: fuse\nreason: kernel overlayfs does not work here",
        };
        assert!(told.contains(reason), "{driver}: {told}");
    }
}

/// Makes a deep stack by hand, each layer with one file, as engines leave it.
fn deep(store: &TestStore, count: usize) -> String {
    match store.driver {
        "overlay" | "overlay2" => store.chain("c", count),
        "aufs" => {
            for number in 1..=count {
                let id = format!("c{number}");
                for part in ["diff", "mnt"] {
                    fs::create_dir(store.home().join(part).join(&id)).unwrap();
                }
                let beneath: String = (1..number).rev().map(|n| format!("c{n}\n")).collect();
                put(store.home().join("layers").join(&id), beneath);
            }
        }
        _ => {
            fs::create_dir_all(store.path("c1", "root")).unwrap();
            sh(
                store.home(),
                &format!(
                    "set -e; for n in $(seq 2 {count}); do below=c$((n - 1)); echo x >$below/root/f$((n - 1)); \
                     mkdir c$n; cp -al $below/root c$n/root; done"
                ),
            );
            put(store.path(&format!("c{count}"), "root").join(format!("f{count}")), "x");
            return format!("c{count}");
        }
    }
    for number in 1..=count {
        put(store.diff(&format!("c{number}")).join(format!("f{number}")), "x");
    }
    format!("c{count}")
}

both!(deep_stacks_show_every_layer);
fn deep_stacks_show_every_layer() {
    each(|driver, backend| {
        let store = TestStore::with_driver(driver);
        let count = match driver {
            "overlay2" => 127,
            _ => 400,
        };
        let parent = deep(&store, count);
        store.ok(&["layer", "create-rw", "--parent", &parent, "top"]);
        let merged = store.mount(&["--backend", backend, "top"]);
        let files = names(&merged).iter().filter(|name| name.starts_with('f')).count();
        assert_eq!(files, count, "{driver} by {backend}");
        sh(&merged, "rm f1 f2; echo y > f3");
        store.unmount("top");
        assert_eq!(store.ok(&["layer", "changes", "--id", "top"]), "D /f1\nD /f2\nC /f3\n");
    });
}

both!(mounts_are_counted_over_many_processes);
fn mounts_are_counted_over_many_processes() {
    each(|driver, backend| {
        let (store, _) = with_base(driver, backend);
        store.ok(&["layer", "create-rw", "--parent", "base", "top"]);
        let all = |word: &str, count: usize| {
            let spawn = |_| {
                let words = match word {
                    "mount" => vec!["layer", "mount", "--backend", backend, "top"],
                    word => vec!["layer", word, "top"],
                };
                let mut command = store.command(&words);
                command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
            };
            let children: Vec<_> = (0..count).map(spawn).collect();
            for child in children {
                let out = child.wait_with_output().unwrap();
                assert!(out.status.success(), "{word}: {}", said(&out));
            }
        };
        all("mount", 6);
        let merged = store.mount(&["--backend", backend, "top"]);
        all("unmount", 6);
        assert_eq!(text(merged.join("d/a")), "a", "{driver} by {backend}");
        // Neither it nor what lies beneath goes while it is mounted.
        assert!(store.fails(&["layer", "remove", "top"]).contains("is mounted; unmount it first"));
        assert!(store.fails(&["layer", "remove", "base"]).contains("the layer top was made on it"));
        put(merged.join("written"), "x");
        store.unmount("top");
        assert!(!is_mounted(&merged));
        assert_eq!(text(store.diff("top").join("written")), "x");
        store.ok(&["layer", "remove", "top"]);
        store.ok(&["layer", "remove", "base"]);
        store.check_no_leftovers();
    });
}

// After a change of owners the newest content is empty, and what was changed lies in the older one.
both!(changes_are_told_of_all_contents_of_a_layer);
fn changes_are_told_of_all_contents_of_a_layer() {
    for driver in ["overlay", "overlay2"] {
        let (store, _) = with_base(driver, "fuse");
        store.ok(&["layer", "create-rw", "--parent", "base", "top"]);
        let merged = store.mount(&["--backend", "fuse", "top"]);
        sh(&merged, "echo new > n; rm gone");
        store.unmount("top");
        let to = ["--to-uidmap", "0:1000:500", "--to-gidmap", "0:1000:500"];
        store.ok(&[&["layer", "update-id-map"], &to[..], &["top"]].concat());
        assert_eq!(names(store.diff("top")), [""; 0]);
        let told = changes(&store, &["top"]);
        for line in ["A /n\n", "D /gone\n", "C /d/a\n"] {
            assert!(told.contains(line), "{driver}: {line}: {told}");
        }
    }
}

// Docker's driver takes all mounts down when it ends.
both!(cleaning_up_takes_mounts_of_old_drivers_down);
fn cleaning_up_takes_mounts_of_old_drivers_down() {
    for (driver, backend) in
        [("overlay1", "fuse"), ("overlay1", "flat"), ("aufs", "fuse"), ("aufs", "flat")]
    {
        let (store, _) = with_base(driver, backend);
        let places = ["one", "two"].map(|id| {
            store.ok(&["layer", "create-rw", "--parent", "base", id]);
            store.mount(&["--backend", backend, id]);
            store.mount(&[id])
        });
        put(places[0].join("written"), "x");
        store.ok(&["store", "cleanup"]);
        assert!(!places.iter().any(|merged| is_mounted(merged) || merged.join("f").exists()));
        assert_eq!(text(store.diff("one").join("written")), "x");
        store.check_no_leftovers();
        store.ok(&["store", "cleanup"]);
        for id in ["one", "two", "base"] {
            store.ok(&["layer", "remove", id]);
        }
    }
}

// What the status says of ids is what a mount does.
both!(ids_are_shifted_where_the_status_says_so);
fn ids_are_shifted_where_the_status_says_so() {
    for (driver, _) in ALL {
        let (store, _) = with_base(driver, "fuse");
        store.ok(&["layer", "create-rw", "--parent", "base", "top"]);
        let status = store.ok(&["store", "status"]);
        let says = |answer: &str| status.contains(&format!("Supports shifting: {answer}\n"));
        assert!(says("true") != says("false"), "{driver}: {status}");
        let map = ["--uidmap", "0:1000:100", "--gidmap", "0:1000:100"];
        let words = [&["layer", "mount"], &map[..], &["top"]].concat();
        if says("true") {
            let merged = store.ok(&words);
            let owners = sh(merged.trim_end(), "stat -c %u:%g d/a");
            assert_eq!(owners, "1000:1000\n", "{driver}");
            store.unmount("top");
        } else {
            store.fails(&words);
        }
        // A copy cannot, and says what can.
        let words = [&["layer", "mount", "--backend", "flat"], &map[..], &["top"]].concat();
        let sentence = store.fails(&words);
        let is_old = matches!(driver, "overlay1" | "aufs");
        assert_eq!(sentence.contains("lamina store migrate"), is_old, "{sentence}");
        assert!(sentence.contains("update-id-map"), "{sentence}");
    }
}

both!(what_cannot_be_is_refused_alike);
fn what_cannot_be_is_refused_alike() {
    for (driver, _) in ALL {
        let (store, _) = with_base(driver, "fuse");
        for (words, part) in [
            (&["layer", "create", "base"][..], "base: this layer exists"),
            (&["layer", "create", "--parent", "none", "x"], "none: no such layer"),
            (&["layer", "remove", "none"], "none: no such layer"),
            (&["layer", "mount", "none"], "none: no such layer"),
            (&["layer", "unmount", "none"], "none: no such layer"),
            (&["layer", "metadata", "none"], "none: no such layer"),
            (&["layer", "changes", "--id", "none"], "none: no such layer"),
            (&["layer", "apply", "--id", "base", "/dev/null"], "base: this layer exists"),
        ] {
            let sentence = store.fails(words);
            assert!(sentence.contains(part), "{driver}: {words:?}: {sentence}");
        }
        assert_eq!(store.run(&["layer", "exists", "none"]).status.code(), Some(1));
        store.ok(&["layer", "exists", "base"]);
        let torn = store.sandbox.root().join("torn.tar");
        put(&torn, [7; 700]);
        store.fails(&["layer", "apply", "--id", "torn", torn.to_str().unwrap()]);
        assert_eq!(store.ok(&["store", "list"]), "base\n");
        store.check_no_leftovers();
        // Without --driver the store is known by what lies in it.
        let place = [("--root", &store.root), ("--runroot", &store.run_root)];
        let mut command = Command::new(fuse_tests::env::lamina());
        command.args(["store", "status"]);
        for (word, path) in place {
            command.arg(word).arg(path);
        }
        let status = String::from_utf8(command.output().unwrap().stdout).unwrap();
        assert!(status.starts_with(&format!("Driver: {driver}\n")), "{status}");
    }
}

// Whenever a process dies, the layer can be mounted and unmounted, and has what was written.
#[test]
fn killed_at_each_step_a_mount_is_undone() {
    needs_root!();
    fuse_tests::needs_kernel_overlay!();
    if let Some(why) = no_strace() {
        skip!("{why}");
    }
    for (driver, backend) in
        [("overlay1", "kernel"), ("overlay1", "flat"), ("aufs", "fuse"), ("aufs", "flat")]
    {
        let (store, _) = with_base(driver, backend);
        store.ok(&["layer", "create-rw", "--parent", "base", "top"]);
        let mount = store.command(&["layer", "mount", "--backend", backend, "top"]);
        let unmount = store.command(&["layer", "unmount", "top"]);
        // The first one tries what the machine can do.
        let merged = store.mount(&["--backend", backend, "top"]);
        store.unmount("top");
        let to_mount = kill::calls(&mount, 9);
        let to_unmount = kill::calls(&unmount, 9);
        let mut kills = [0, 0];
        for call in &to_mount {
            kills[0] += usize::from(kill::at(&mount, call));
            // A server that was started goes on, and mounts for somebody who is gone.
            wait_until("the server has mounted, or ended", BOUND, || {
                is_mounted(&merged) || processes_with_argument(&merged).is_empty()
            });
            // Who was killed may have been told of the mount before, and have counted it.
            for _ in 0..2 {
                store.ok(&["layer", "unmount", "top"]);
            }
            assert!(!is_mounted(&merged), "{driver} by {backend}: {call:?}");
            store.check_no_leftovers();
        }
        for call in &to_unmount {
            let merged = store.mount(&["--backend", backend, "top"]);
            put(merged.join("written"), format!("{call:?}"));
            kills[1] += usize::from(kill::at(&unmount, call));
            store.unmount("top");
            assert!(!is_mounted(&merged), "{driver} by {backend}: {call:?}");
            store.check_no_leftovers();
            assert_eq!(text(store.diff("top").join("written")), format!("{call:?}"));
        }
        // A count may be off by one or two, as where names are random.
        assert!(kills[0] + 5 > to_mount.len(), "{driver} by {backend}: {kills:?}");
        assert!(kills[1] + 5 > to_unmount.len(), "{driver} by {backend}: {kills:?}");
    }
}

// Whenever a process dies, the layer is there whole, or not at all; and the next start clears up.
#[test]
fn killed_at_each_step_a_layer_is_whole_or_absent() {
    needs_root!();
    if let Some(why) = no_strace() {
        skip!("{why}");
    }
    for (driver, _) in ALL {
        let (store, base) = with_base(driver, "fuse");
        store.ok(&["layer", "create-rw", "--parent", "base", "work"]);
        let merged = store.mount(&["--backend", "fuse", "work"]);
        sh(&merged, CHANGES);
        let changed = snapshot(&merged);
        store.unmount("work");
        let file = pack(&store, "work");
        let apply = store.command(&["layer", "apply", "--id", "new", "--parent", "base", &file]);
        let remove = store.command(&["layer", "remove", "new"]);
        let to_apply = kill::calls(&apply, 29);
        let to_remove = kill::calls(&remove, 11);
        let mut kills = [0, 0];
        for call in &to_apply {
            kills[0] += usize::from(kill::at(&apply, call));
            let listed = store.ok(&["store", "list"]);
            store.check_no_leftovers();
            if listed.contains("new\n") {
                assert_same("after a kill", &changed, &shown(&store, "fuse", "new"));
                store.ok(&["layer", "remove", "new"]);
            }
        }
        for call in &to_remove {
            if !store.run(&["layer", "exists", "new"]).status.success() {
                store.ok(&["layer", "apply", "--id", "new", "--parent", "base", &file]);
            }
            kills[1] += usize::from(kill::at(&remove, call));
            let listed = store.ok(&["store", "list"]);
            store.check_no_leftovers();
            if listed.contains("new\n") {
                assert_same("after a kill", &changed, &shown(&store, "fuse", "new"));
            }
        }
        assert!(
            kills[0] + 5 > to_apply.len() && kills[1] + 5 > to_remove.len(),
            "{driver}: {kills:?}"
        );
        assert_same("the base", &base, &shown(&store, "fuse", "base"));
    }
}

// The tree of an image shares its files with the parent's, and none of those is ever written to.
both!(trees_of_overlay1_share_files_that_never_change);
fn trees_of_overlay1_share_files_that_never_change() {
    let (store, base) = with_base("overlay1", "fuse");
    store.ok(&["layer", "create-rw", "--parent", "base", "work"]);
    let merged = store.mount(&["work"]);
    sh(&merged, CHANGES);
    store.unmount("work");
    let file = pack(&store, "work");
    store.ok(&["layer", "apply", "--id", "image", "--parent", "base", &file]);
    let ino = |id: &str, name: &str| fuse_tests::case::ino(store.diff(id).join(name));
    for (name, is_shared) in
        [("d/a", true), ("h1", true), ("h2", true), ("hole", true), ("big", false), ("f", false)]
    {
        assert_eq!(ino("base", name) == ino("image", name), is_shared, "{name}");
    }
    assert_eq!(text(store.path("work", "lower-id")), "base");
    assert!(!store.path("image", "lower-id").exists() && !store.path("image", "upper").exists());
    // What is unpacked over a container does not share what its users still write.
    store.ok(&["layer", "apply", "--id", "copy", "--parent", "work", &file]);
    assert_ne!(ino("work", "n"), ino("copy", "n"));
    assert_same("the base", &base, &snapshot(&store.diff("base")));
    // Only read, an image is behind a mount.
    let merged = store.mount(&["--read-only", "image"]);
    assert!(is_mounted(&merged));
    assert!(fs::write(merged.join("d/a"), "x").is_err());
    store.unmount("image");
    assert!(!merged.exists());
    // An image outlives what it was made on.
    store.ok(&["layer", "remove", "copy"]);
    store.ok(&["layer", "remove", "work"]);
    store.ok(&["layer", "remove", "base"]);
    assert_eq!(text(store.diff("image").join("d/a")), "a");
    store.check_no_leftovers();
}

// Nothing that aufs would not have written: no device, no xattr of overlays, its own names hidden.
both!(what_is_written_to_aufs_is_its_own_format);
fn what_is_written_to_aufs_is_its_own_format() {
    let (store, _) = with_base("aufs", "fuse");
    // What aufs keeps for itself at the top.
    sh(
        store.diff("base"),
        "mkdir -p .wh..wh.plnk .wh..wh.orph; touch .wh..wh.aufs; ln hole .wh..wh.plnk/1.2",
    );
    store.ok(&["layer", "create-rw", "--parent", "base", "top"]);
    let merged = store.mount(&["top"]);
    assert!(!names(&merged).iter().any(|name| name.starts_with(".wh.")));
    sh(&merged, CHANGES);
    sh(&merged, "mv d moved; ln h1 h3");
    let tree = snapshot(&merged);
    store.unmount("top");
    assert_same("again", &tree, &shown(&store, "fuse", "top"));
    let diff = store.diff("top");
    assert_eq!(sh(&diff, "find . -type c"), "");
    assert_eq!(
        sh(&diff, "find . -name '.wh.*' | sort"),
        "./.wh.d\n./.wh.gone\n./e/.wh..wh..opq\n./moved/.wh..wh..opq\n./moved/.wh.b\n\
         ./moved/sub/.wh..wh..opq\n./s/.wh..wh..opq\n"
    );
    let marks = sh(&diff, "getfattr -h -R -m 'overlay' . 2>/dev/null");
    assert_eq!(marks, "");
    assert_eq!(getx(diff.join("moved"), "user.more").as_deref(), Some(&b"1"[..]));
    let changes = store.ok(&["layer", "changes", "--id", "base"]);
    assert!(!changes.contains(".wh.") && changes.contains("A /h1\n"), "{changes}");
    let packed = pack(&store, "base");
    let listed = sh(store.sandbox.root(), &format!("tar tf {packed}"));
    assert!(!listed.contains(".wh.") && listed.contains("h2\n"), "{listed}");
    // The kernel may only read, and only what has no marks.
    let refused = |words: &[&str]| {
        let all: Vec<&str> =
            ["layer", "mount", "--backend", "kernel"].iter().chain(words).copied().collect();
        store.fails(&all)
    };
    assert!(refused(&["top"]).contains("writes whiteouts that aufs does not know"));
    assert!(refused(&["--read-only", "top"]).contains("a mark of aufs; use fuse"));
    store.ok(&["layer", "create-rw", "--parent", "base", "plain"]);
    if fuse_tests::env::no_kernel_overlay().is_none() {
        let merged = store.mount(&["--backend", "kernel", "--read-only", "plain"]);
        assert_eq!(text(merged.join("d/a")), "a");
        store.unmount("plain");
    }
    store.ok(&["layer", "remove", "plain"]);
    store.check_no_leftovers();
    // Docker was stopped while it removed one, or made one.
    sh(store.home(), "mkdir -p diff/x-removing/d mnt/x-removing diff/y mnt/y");
    store.ok(&["layer", "create", "y"]);
    assert_eq!(store.ok(&["store", "list"]), "base\ntop\ny\n");
    store.check_no_leftovers();
}
