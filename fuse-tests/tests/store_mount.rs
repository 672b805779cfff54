//! Mounts of the layer store: by the kernel and by our server, counted over processes, of layers in
//! every form that a store has.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use fuse_tests::both;
use fuse_tests::case::{BOUND, is_mounted, put, said, sh, text, the_server, umount};
use fuse_tests::env::{self, wait_until};
use fuse_tests::fixture::fill;
use fuse_tests::store::{TestStore, stat_of};
use fuse_tests::trace::no_strace;
use fuse_tests::tree;
use rustix::process::{Signal, kill_process};

const BACKENDS: [&str; 2] = ["kernel", "fuse"];

/// The filesystem type of a mount.
fn type_of(path: &Path) -> String {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = table.lines().find(|line| line.split(' ').nth(4) == path.to_str()).unwrap();
    line.split(" - ").nth(1).unwrap().split(' ').next().unwrap().to_owned()
}

fn three_layers() -> TestStore {
    let store = TestStore::new();
    store.layer("base", None, "file f 644 base\nfile d/a 644 a\nfile d/b 644 b\nfile e/x 644 x\n");
    store.layer("middle", Some("base"), "whiteout d/a\nfile d/c 640 c\ndir e\nopaque e\n");
    store.ok(&["layer", "create-rw", "--parent", "middle", "top"]);
    store
}

// Whoever serves: the same tree, and what is written is found by the other.
both!(kernel_and_fuse_serve_the_same_layers);
fn kernel_and_fuse_serve_the_same_layers() {
    let store = three_layers();
    let mut trees = Vec::new();
    for (round, backend) in BACKENDS.iter().chain(&BACKENDS).enumerate() {
        let merged = store.mount(&["--backend", backend, "top"]);
        let kind = type_of(&merged);
        assert_eq!(kind == "overlay", *backend == "kernel", "{kind}");
        assert_eq!(sh(&merged, "ls d e f"), "f\n\nd:\nb\nc\n\ne:\n");
        for earlier in 0..round {
            assert_eq!(text(merged.join(format!("by-{earlier}"))), "x");
        }
        put(merged.join(format!("by-{round}")), "x");
        store.unmount("top");
        assert_eq!(fs::read_dir(&merged).unwrap().count(), 0);
        let read_only = store.mount(&["--backend", backend, "--read-only", "middle"]);
        assert!(fs::write(read_only.join("new"), "x").is_err());
        trees.push(tree::snapshot(&read_only));
        store.unmount("middle");
    }
    for other in &trees[1..] {
        let lines = tree::diff(&trees[0], other);
        assert!(lines.is_empty(), "{}", lines.join("\n"));
    }
    store.check_no_leftovers();
}

// 4096 bytes of mount options end at some 40 layers of long paths.
both!(five_hundred_layers_mount_at_any_path_length);
fn five_hundred_layers_mount_at_any_path_length() {
    let mut store = TestStore::new();
    store.root = store.sandbox.root().join("r".repeat(200)).join("o".repeat(200)).join("t:,\\");
    store.ok(&["store", "init"]);
    let name = "layer-with-a-long-name-".repeat(3);
    store.chain(&name, 500);
    for number in [1, 250, 500] {
        put(store.diff(&format!("{name}{number}")).join(format!("f{number}")), "x");
    }
    store.ok(&["layer", "create-rw", "--parent", &format!("{name}500"), "top"]);
    for backend in BACKENDS {
        let merged = store.mount(&["--backend", backend, "top"]);
        assert_eq!(sh(&merged, "ls"), "f1\nf250\nf500\n", "{backend}");
        put(merged.join("new"), "x");
        store.unmount("top");
        fs::remove_file(store.diff("top").join("new")).unwrap();
    }
    // The time, 200 ms at most on a machine that does nothing else, follows the calls: a few for each
    // layer, of the command and of the server that it starts.
    if no_strace().is_some() {
        return;
    }
    let log = store.sandbox.root().join("calls");
    let merged = store.path("top", "merged");
    for (backend, most) in [("kernel", 14), ("fuse", 100)] {
        let words = ["layer", "mount", "--backend", backend, "top"];
        let command = store.command(&words);
        let mut strace = Command::new("strace");
        strace.args(["-f", "-qq", "-o"]).arg(&log).arg(command.get_program());
        // It follows the server too, and so ends after it.
        let mut strace = strace.args(command.get_args()).stdout(Stdio::null()).spawn().unwrap();
        wait_until("the mount", BOUND, || is_mounted(&merged));
        store.unmount("top");
        assert!(strace.wait().unwrap().success());
        let calls = text(&log).lines().count();
        let start = Instant::now();
        store.mount(&words[2..]);
        eprintln!("500 layers by {backend}: {calls} calls, {:?}", start.elapsed());
        assert!((1000..500 * most).contains(&calls), "500 layers by {backend}: {calls} calls");
        store.unmount("top");
    }
}

// The count of a layer was written aside under a name that was too long.
both!(a_layer_may_have_the_longest_name);
fn a_layer_may_have_the_longest_name() {
    let store = TestStore::new();
    let id = "x".repeat(250);
    store.layer("base", None, "file f 644 base\n");
    store.ok(&["layer", "create-rw", "--parent", "base", &id]);
    let merged = store.mount(&[&id]);
    assert_eq!(text(merged.join("f")), "base");
    store.unmount(&id);
    assert_eq!(store.ok(&["store", "check"]), "");
}

both!(mounts_are_counted_over_processes);
fn mounts_are_counted_over_processes() {
    let store = three_layers();
    for backend in BACKENDS {
        let merged = store.mount(&["--backend", backend, "top"]);
        let id = fs::metadata(&merged).unwrap().dev();
        for _ in 0..2 {
            assert_eq!(store.mount(&["top"]), merged);
        }
        assert_eq!(fs::metadata(&merged).unwrap().dev(), id, "mounted a second time");
        for _ in 0..2 {
            store.unmount("top");
            assert!(is_mounted(&merged));
        }
        let sentence = store.fails(&["layer", "remove", "top"]);
        assert!(sentence.contains("is mounted; unmount it first"), "{sentence}");
        let inode = store.path("top", "merged");
        store.unmount("top");
        assert!(!is_mounted(&merged));
        assert_eq!(stat_of(&inode), (0o700, 0, 0));
        // Giving back what nobody has is no error.
        store.unmount("top");
    }
    // Everybody at once: one mount, and none when all are done.
    let spawn = |word| {
        let mut command = store.command(&["layer", word, "top"]);
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    };
    for word in ["mount", "unmount"] {
        let children: Vec<_> = (0..8).map(|_| spawn(word)).collect();
        for child in children {
            let out = child.wait_with_output().unwrap();
            assert!(out.status.success(), "{}", said(&out));
        }
        let merged = store.path("top", "merged");
        let mounts = env::mounts_below(&store.home()).iter().filter(|m| **m == merged).count();
        assert_eq!(mounts, usize::from(word == "mount"));
    }
    store.ok(&["layer", "remove", "top"]);
    store.check_no_leftovers();
}

// A count of a mount that is gone, and a mount that nobody counted.
both!(counts_are_believed_only_as_far_as_the_mount_table_agrees);
fn counts_are_believed_only_as_far_as_the_mount_table_agrees() {
    let store = three_layers();
    for backend in BACKENDS {
        let merged = store.mount(&["--backend", backend, "top"]);
        store.mount(&["top"]);
        umount(&merged);
        wait_until("the server to end", BOUND, || env::processes_with_argument(&merged).is_empty());
        store.mount(&["--backend", backend, "top"]);
        store.unmount("top");
        assert!(!is_mounted(&merged), "{backend}: an old count kept it");
    }
    // Another program mounted it.
    let merged = store.mount(&["--backend", "kernel", "top"]);
    for counts in ["overlay/lamina-mounts/top", "overlay-layers/mountpoints.json"] {
        fs::remove_file(store.run_root.join(counts)).unwrap();
    }
    store.mount(&["top"]);
    store.unmount("top");
    assert!(is_mounted(&merged), "the mount of somebody else was taken down");
    store.unmount("top");
    assert!(!is_mounted(&merged));
    // A server that was killed.
    let merged = store.mount(&["--backend", "fuse", "top"]);
    kill_process(the_server(&merged), Signal::KILL).unwrap();
    wait_until("the mount to die", BOUND, || rustix::fs::statfs(&merged).is_err());
    assert_eq!(store.mount(&["--backend", "fuse", "top"]), merged);
    assert_eq!(text(merged.join("f")), "base");
    store.unmount("top");
    assert!(!is_mounted(&merged));
}

// Engines rotate contents when ids change: diff1 is beneath diff, of the layer and of its parents.
both!(older_contents_lie_beneath_a_layer);
fn older_contents_lie_beneath_a_layer() {
    let store = three_layers();
    for (id, name, line) in [
        ("top", "diff1", "file own 644 1\nfile f 644 own1\n"),
        ("top", "diff2", "file own 644 2\nfile own2 644 2\n"),
        ("base", "diff1", "file f 644 hidden\nfile deep 644 deep\n"),
    ] {
        fs::create_dir(store.path(id, name)).unwrap();
        fill(&store.path(id, name), line);
    }
    for backend in BACKENDS {
        let merged = store.mount(&["--backend", backend, "top"]);
        let read = |name: &str| text(merged.join(name));
        assert_eq!((read("own"), read("own2"), read("f"), read("deep")), {
            ("1".into(), "2".into(), "own1".into(), "deep".into())
        });
        store.unmount("top");
    }
}

// Their layers are found, and mounted in the run home: a store on a CD must do.
both!(layers_of_additional_stores_are_mounted_elsewhere);
fn layers_of_additional_stores_are_mounted_elsewhere() {
    let shared = TestStore::new();
    shared.layer("shared", None, "file f 644 x\n");
    let mut store = TestStore::new();
    store.arguments = vec![
        "--storage-opt".into(),
        format!("overlay.additionalimagestore={}", shared.root.display()),
    ];
    let before = tree::snapshot(&shared.root);
    let merged = store.mount(&["shared"]);
    assert_eq!(merged, store.run_root.join("overlay/shared/merged"));
    assert_eq!(text(merged.join("f")), "x");
    assert!(fs::write(merged.join("g"), "x").is_err());
    store.unmount("shared");
    assert!(!merged.exists() && !merged.parent().unwrap().exists());
    store.layer("child", Some("shared"), "file g 644 y\n");
    let merged = store.mount(&["child"]);
    assert_eq!(text(merged.join("f")), "x");
    store.unmount("child");
    let lines = tree::diff(&before, &tree::snapshot(&shared.root));
    assert!(lines.is_empty(), "the shared store changed: {}", lines.join("\n"));
}

both!(docker_mounts_what_docker_mounts);
fn docker_mounts_what_docker_mounts() {
    let store = TestStore::with_driver("overlay2");
    store.layer("base", None, "file f 644 x\n");
    assert_eq!(store.mount(&["base"]), store.diff("base"));
    store.unmount("base");
    store.layer("middle", Some("base"), "");
    let merged = store.mount(&["middle"]);
    put(merged.join("g"), "y");
    store.unmount("middle");
    assert!(!merged.exists(), "Docker removes the mountpoint");
    store.layer("top", Some("middle"), "");
    let merged = store.mount(&["middle"]);
    assert!(fs::write(merged.join("h"), "z").is_err(), "a committed layer was changed");
    assert_eq!(text(merged.join("g")), "y");
    store.unmount("middle");
}

// What engines do before each mount: the kernel refuses an upper that was volatile.
both!(a_volatile_layer_mounts_again);
fn a_volatile_layer_mounts_again() {
    let store = three_layers();
    for backend in ["kernel", "fuse", "kernel", "fuse"] {
        let merged = store.mount(&["--volatile", "--backend", backend, "top"]);
        put(merged.join(backend), "x");
        store.unmount("top");
    }
    store.mount(&["top"]);
    store.unmount("top");
}

// The command line that engines use, and what others learn from the store afterwards.
both!(another_mount_program_is_called_as_engines_call_it);
fn another_mount_program_is_called_as_engines_call_it() {
    let mut store = three_layers();
    let program = store.sandbox.root().join("program");
    let log = store.sandbox.root().join("log");
    let script = format!(
        "#!/bin/sh\npwd > {log}\nprintf '%s\\n' \"$@\" >> {log}\nexec {lamina} \"$@\"\n",
        log = log.display(),
        lamina = env::lamina().display()
    );
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    store.arguments = vec![
        "--storage-opt".into(),
        format!("overlay.mount_program={}", program.display()),
        "--storage-opt".into(),
        "overlay.mountopt=nodev,metacopy=on".into(),
    ];
    let merged = store.mount(&["--volatile", "top"]);
    let home = store.home();
    let expected = format!(
        "{0}\n-o\nlowerdir={0}/middle/diff:{0}/base/diff,upperdir={0}/top/diff,workdir={0}/top/work,\
         volatile\n{0}/top/merged\n",
        home.display()
    );
    assert_eq!(text(&log), expected);
    store.unmount("top");
    assert!(!is_mounted(&merged));
    assert_eq!(text(home.join(".has-mount-program")), "true");
    // Without the program the kernel is not trusted with what it may have left.
    store.arguments.clear();
    let merged = store.mount(&["top"]);
    assert!(type_of(&merged).starts_with("fuse"));
    store.unmount("top");
    assert!(store.ok(&["store", "probe"]).contains("reason: .has-mount-program says"));
    // One that fails says why.
    fs::write(&program, "#!/bin/sh\necho no such luck >&2\nexit 3\n").unwrap();
    store.arguments =
        vec!["--storage-opt".into(), format!("overlay.mount_program={}", program.display())];
    let sentence = store.fails(&["layer", "mount", "top"]);
    assert!(sentence.contains("no such luck"), "{sentence}");
    fs::remove_file(&program).unwrap();
    let sentence = store.fails(&["layer", "mount", "top"]);
    assert!(sentence.contains("execve: No such file or directory; name a program"), "{sentence}");
    assert!(!is_mounted(&merged));
    store.ok(&["layer", "remove", "top"]);
}

// One argument of a program has no more than 128 KiB, and a colon parts layers.
both!(a_mount_program_is_given_500_layers_at_any_path);
fn a_mount_program_is_given_500_layers_at_any_path() {
    let mut store = TestStore::new();
    store.root = store.sandbox.root().join("long".repeat(60)).join("co:lon");
    store.ok(&["store", "init"]);
    store.chain("c", 500);
    fill(&store.diff("c1"), "file lowest 600 l\n");
    let program = store.sandbox.root().join("fuse-overlayfs");
    std::os::unix::fs::symlink(env::lamina(), &program).unwrap();
    store.arguments =
        vec!["--storage-opt".into(), format!("overlay.mount_program={}", program.display())];
    for id in ["c500", "c9"] {
        let merged = store.mount(&[id]);
        assert_eq!(text(merged.join("lowest")), "l");
        store.unmount(id);
    }
}

// A typing error is no store without layers; a directory that nothing was put into is.
both!(an_image_store_that_is_not_there_is_an_error);
fn an_image_store_that_is_not_there_is_an_error() {
    let mut store = three_layers();
    let images = store.sandbox.root().join("images");
    store.arguments =
        vec!["--storage-opt".into(), format!("overlay.imagestore={}", images.display())];
    let sentence = store.fails(&["layer", "mount", "top"]);
    assert!(sentence.contains("images: open: No such file or directory"), "{sentence}");
    fs::create_dir(&images).unwrap();
    store.mount(&["top"]);
    store.unmount("top");
}

// Trials are made once, and again when the machine is another.
both!(what_was_probed_is_kept_until_something_changes);
fn what_was_probed_is_kept_until_something_changes() {
    let store = TestStore::new();
    let cache = store.run_root.join("overlay/lamina-probe.json");
    store.ok(&["store", "status"]);
    let inode = || fs::metadata(&cache).unwrap().ino();
    let first = inode();
    store.ok(&["store", "status"]);
    assert_eq!(inode(), first);
    let known = text(&cache);
    fs::write(&cache, known.replace("\"kernel\":\"", "\"kernel\":\"another ")).unwrap();
    store.ok(&["store", "status"]);
    assert_eq!(text(&cache), known);
    fs::write(&cache, "{").unwrap();
    store.ok(&["store", "status"]);
    assert_eq!(text(&cache), known);
    let options = tree::Options { dir_times: false, ..tree::Options::default() };
    let before = tree::snapshot_with(&store.root, options);
    let report = store.ok(&["store", "probe"]);
    for fact in ["d_type", "overlay", "volatile", "idmapped-lowers", "native-diff", "fuse"] {
        assert!(report.contains(&format!("\n{fact}: ")), "{report}");
    }
    assert!(report.contains("\nbackend: ") && report.contains("\nreason: "), "{report}");
    let lines = tree::diff(&before, &tree::snapshot_with(&store.root, options));
    assert!(lines.is_empty(), "{}", lines.join("\n"));
    store.check_no_leftovers();
}

// Listing during a pull: a lock that podman holds for minutes stops nobody who reads or mounts.
both!(readers_do_not_wait_for_the_lock_of_the_store);
fn readers_do_not_wait_for_the_lock_of_the_store() {
    let store = three_layers();
    let path = store.root.join("overlay-layers/layers.lock");
    let before = text(&path);
    assert_eq!(before.len(), 64);
    let lock = File::options().read(true).write(true).open(&path).unwrap();
    fuse_tests::store::lock_classically(&lock);
    assert_eq!(store.ok(&["store", "list"]), "base\nmiddle\ntop\n");
    store.ok(&["layer", "metadata", "top"]);
    store.mount(&["top"]);
    store.unmount("top");
    let mut writer = store.command(&["layer", "create", "waits"]).spawn().unwrap();
    wait_until("the writer to stage its layer", BOUND, || {
        fs::read_dir(store.home().join("tempdirs")).is_ok_and(|dir| dir.count() == 2)
    });
    assert!(!store.path("waits", "").exists());
    assert_eq!(text(&path), before, "written without the lock");
    drop(lock);
    assert!(writer.wait().unwrap().success());
    assert_ne!(text(&path), before, "others do not learn that something changed");
    store.check_no_leftovers();
}

// The container's root shows as another user, in the layers of the image.
both!(ids_are_mapped);
fn ids_are_mapped() {
    let store = three_layers();
    let map = ["--uidmap", "0:1000:100", "--gidmap", "0:2000:100"];
    // Who does not name one gets one that can.
    let mut backends = vec![&[][..], &["--backend", "fuse"]];
    // Only root of the machine may map ids of the filesystem.
    if env::is_machine_root() {
        backends.push(&["--backend", "kernel"]);
    }
    for backend in backends {
        let merged = store.mount(&[backend, &map, &["top"]].concat());
        let stat = fs::metadata(merged.join("f")).unwrap();
        assert_eq!((stat.uid(), stat.gid()), (1000, 2000), "{backend:?}");
        store.unmount("top");
    }
}

// However many layers there are: one mount of the home is mapped, and the layers are opened in it. Layers of another store, and
// those whose content lies elsewhere, have others.
#[test]
fn one_detached_mount_maps_the_ids_of_all_layers() {
    fuse_tests::needs_root!();
    if let Some(reason) = no_strace() {
        fuse_tests::skip!("{reason}");
    }
    let images = TestStore::new();
    images.chain("i", 3);
    fill(&images.diff("i2"), "file image 644 i\n");
    let mut store = TestStore::new();
    store.chain("c", 120);
    fill(&store.diff("c1"), "file lowest 600 l\n");
    fill(&store.diff("c119"), "file highest 600 h\n");
    // As content of an additional layer store is.
    let elsewhere = store.sandbox.root().join("elsewhere");
    fs::rename(store.diff("c60"), &elsewhere).unwrap();
    fill(&elsewhere, "file elsewhere 600 e\n");
    std::os::unix::fs::symlink(&elsewhere, store.diff("c60")).unwrap();
    let option = format!("overlay.imagestore={}", images.root.display());
    store.arguments = vec!["--storage-opt".into(), option];
    store.ok(&["layer", "create-rw", "--parent", "i3", "over"]);
    let log = store.sandbox.root().join("log");
    let calls = |id: &str| {
        let words = ["layer", "mount", "--backend", "kernel", "--uidmap", "0:1000:100"];
        let lamina = store.command(&[&words[..], &["--gidmap", "0:2000:100", id]].concat());
        let done = Command::new("strace")
            .args(["-f", "-e", "trace=mount_setattr", "-o"])
            .arg(&log)
            .arg(lamina.get_program())
            .args(lamina.get_args())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(done.status.success(), "{}", said(&done));
        text(&log).lines().filter(|line| line.contains("mount_setattr(")).count()
    };
    // The first call also tries what works here.
    store.ok(&["store", "probe"]);
    assert_eq!(calls("c120"), 2, "{}", text(&log));
    let merged = store.path("c120", "merged");
    for name in ["lowest", "highest", "elsewhere"] {
        assert_eq!(stat_of(&merged.join(name)), (0o600, 1000, 2000), "{name}");
    }
    store.unmount("c120");
    assert_eq!(calls("over"), 1, "{}", text(&log));
    assert_eq!(stat_of(&store.path("over", "merged").join("image")), (0o644, 1000, 2000));
    store.unmount("over");
}

// An image for a user namespace, where ids cannot be shown otherwise: changed owners above, the image as it was beneath.
both!(owners_are_changed_for_good_above_the_content_that_was);
fn owners_are_changed_for_good_above_the_content_that_was() {
    let store = three_layers();
    fill(&store.diff("top"), "file mine 4755 x\nsymlink s /nowhere\nlink twice mine\nfifo p 600\n");
    let mut names = vec!["f", "d", "d/b", "e", "mine", "twice", "s", "p", "socket", "."];
    let diff = store.diff("top");
    fill(&diff, "socket socket 755\n");
    let is_root = env::is_machine_root();
    if is_root {
        sh(&diff, "mknod null c 1 3; mknod disk b 7 0; cp mine can; setcap cap_net_raw+ep can");
        sh(&diff, "setfattr -n trusted.x -v 1 null");
        names.extend(["null", "disk", "can"]);
    }
    let kinds = |merged: &Path| sh(merged, "stat -c '%n %F %t:%T %a %y' * 2>&1; readlink s");
    let marks = |merged: &Path| sh(merged, "getcap can; getfattr -h -d -m trusted.x null");
    let to = ["--to-uidmap", "0:1000:100", "--to-gidmap", "0:2000:100"];
    let words: Vec<&str> =
        ["layer", "update-id-map"].iter().chain(&to).chain(&["top"]).copied().collect();
    let merged = store.mount(&["top"]);
    let before = kinds(&merged);
    store.unmount("top");
    for round in 1..3 {
        store.ok(&words);
        let merged = store.mount(&["top"]);
        for name in &names {
            let stat = fs::symlink_metadata(merged.join(name)).unwrap();
            assert_eq!((stat.uid(), stat.gid()), (1000, 2000), "{name} in round {round}");
        }
        assert_eq!(kinds(&merged), before);
        if is_root {
            let marks = marks(&merged);
            assert!(marks.contains("cap_net_raw=ep"), "{marks}");
            assert!(marks.contains("trusted.x=\"1\""), "{marks}");
        }
        assert_eq!(stat_of(&merged.join("mine")).0, 0o4755);
        let ino = |name: &str| fs::metadata(merged.join(name)).unwrap().ino();
        assert_eq!(ino("mine"), ino("twice"), "a hard link was parted");
        assert_eq!(text(merged.join("f")), "base");
        store.unmount("top");
        // Once there, once back, once there again.
        assert!(store.path("top", &format!("diff{}", 2 * round - 1)).is_dir());
        assert_eq!(fs::read_dir(store.diff("top")).unwrap().count(), 0);
        assert_eq!(stat_of(&store.diff("base").join("f")), (0o644, 0, 0));
        if round == 1 {
            let from = ["--from-uidmap", "0:1000:100", "--from-gidmap", "0:2000:100"];
            let words: Vec<&str> =
                ["layer", "update-id-map"].iter().chain(&from).chain(&["top"]).copied().collect();
            store.ok(&words);
            let merged = store.mount(&["top"]);
            assert_eq!(stat_of(&merged.join("mine")), (0o4755, 0, 0));
            store.unmount("top");
        }
    }
    let narrow = ["layer", "update-id-map", "--to-uidmap", "0:1000:1", "top"];
    fs::create_dir(store.diff("top").join("other")).unwrap();
    std::os::unix::fs::chown(store.diff("top").join("other"), Some(77), Some(0)).unwrap();
    let sentence = store.fails(&narrow);
    assert!(sentence.contains("is in no map"), "{sentence}");
    assert!(!is_mounted(&store.path("top", "merged")));
    store.ok(&["layer", "remove", "top"]);
}
