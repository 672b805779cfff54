//! Stores as their engines leave them, made by shell commands after the descriptions of the formats:
//! opened, listed, mounted and compared.

use fuse_tests::both;
use fuse_tests::case::{is_mounted, sh, text};
use fuse_tests::env;
use fuse_tests::fixture::Sandbox;
use fuse_tests::store::TestStore;

/// Fills `base`, `mid` and `top` where WHERE says; `hide NAME` and `opaque DIR` are the format's.
const FILL: &str = "
fill_base() { mkdir -p d o; echo a > a; echo b > d/b; echo c > d/c; echo x > o/x; echo n > n; ln a a2; }
fill_mid() { mkdir -p d o; hide d/b; opaque o; echo y > o/y; echo m > m; }
fill_top() { hide a; echo changed > n; mkdir e; }
";

/// What kernel overlayfs writes, as root of the machine or not.
const KERNEL: &str = "
hide() { mknod $1 c 0 0; }
opaque() { setfattr -n $SPACE.overlay.opaque -v y $1; }
";

/// What aufs writes: whiteouts are names of one file, which it keeps at the top.
const AUFS: &str = "
hide() { touch .wh..wh.aufs; chmod 0444 .wh..wh.aufs; ln .wh..wh.aufs $(dirname $1)/.wh.$(basename $1); }
opaque() { touch .wh..wh.aufs; ln .wh..wh.aufs $1/.wh..wh..opq; }
";

/// What mount programs write.
const PROGRAM: &str = "
hide() { touch $(dirname $1)/.wh.$(basename $1); }
opaque() { touch $1/.wh..wh..opq; }
";

const OVERLAY: &str = "
A=ABCDEFGHIJKLMNOPQRSTUVWXYZ B=234567ABCDEFGHIJKLMNOPQRST C=AAAAAAAAAAAAAAAAAAAAAAAAAA
mkdir -p overlay/l; cd overlay
for layer in $A:base $B:mid $C:top; do
    link=${layer%%:*}; id=${layer##*:}
    mkdir -m 700 $id; mkdir $id/diff $id/work $id/merged; ln -s ../$id/diff l/$link
    printf %s $link > $id/link; (cd $id/diff; fill_$id)
done
mkdir base/empty; printf l/$A > mid/lower; printf l/$B:l/$A > top/lower
";

const OVERLAY2: &str = "
A=ABCDEFGHIJKLMNOPQRSTUVWXYZ B=234567ABCDEFGHIJKLMNOPQRST C=AAAAAAAAAAAAAAAAAAAAAAAAAA
mkdir -p overlay2/l image/overlay2/layerdb/sha256; cd overlay2; touch backingFsBlockDev
for layer in $A:base $B:mid $C:top; do
    link=${layer%%:*}; id=${layer##*:}
    mkdir -m 710 $id; mkdir $id/diff; ln -s ../$id/diff l/$link
    printf %s $link > $id/link; (cd $id/diff; fill_$id)
done
(umask 077; touch base/committed mid/committed)
mkdir -m 700 mid/work top/work; printf l/$A > mid/lower; printf l/$B:l/$A > top/lower
";

const OVERLAY1: &str = "
mkdir overlay; cd overlay; mkdir -m 700 base mid top
mkdir base/root; (cd base/root; fill_base); cp -al base/root mid/root
(cd mid/root; rm d/b o/x; echo y > o/y; echo m > m)
mkdir top/upper top/work; (cd top/upper; fill_top); printf mid > top/lower-id
";

const AUFS_STORE: &str = "
mkdir -p aufs/layers aufs/diff aufs/mnt; cd aufs
for id in base mid top; do mkdir diff/$id mnt/$id; (cd diff/$id; fill_$id); done
mkdir diff/base/.wh..wh.plnk diff/base/.wh..wh.orph; ln diff/base/d/c diff/base/.wh..wh.plnk/9.9
touch layers/base; echo base > layers/mid; printf 'mid\\nbase\\n' > layers/top
";

fn store(driver: &'static str, marks: &str, script: &str) -> TestStore {
    let sandbox = Sandbox::new();
    let (root, run_root) = (sandbox.root().join("root"), sandbox.root().join("run"));
    std::fs::create_dir(&root).unwrap();
    let space = if env::is_machine_root() { "trusted" } else { "user" };
    sh(&root, &format!("set -e; SPACE={space}; {FILL}{marks}{script}"));
    TestStore { sandbox, root, run_root, driver, mounts_home: false, arguments: Vec::new() }
}

const TOP: &str = "./a2 ./d ./d/c ./e ./m ./n ./o ./o/y ";

#[track_caller]
fn check(store: &TestStore, backend: &str) {
    let find = "find . -mindepth 1 | sort | tr '\\n' ' '";
    assert_eq!(store.ok(&["store", "list"]), "base\nmid\ntop\n");
    let changes = |id: &str| store.ok(&["layer", "changes", "--id", id]);
    assert_eq!(changes("top"), "D /a\nA /e\nC /n\n");
    if store.driver != "overlay1" {
        assert_eq!(changes("mid"), "C /d\nD /d/b\nA /m\nD /o\nA /o/y\n");
    }
    let merged = store.mount(&["--backend", backend, "top"]);
    assert!(is_mounted(&merged));
    assert_eq!(sh(&merged, find), TOP);
    assert_eq!(sh(&merged, "cat a2 d/c m n o/y"), "a\nc\nm\nchanged\ny\n");
    sh(&merged, "rm m; rm -r o; mkdir o; echo z > o/z; echo more >> a2");
    store.unmount("top");
    assert_eq!(changes("top"), "D /a\nC /a2\nA /e\nD /m\nC /n\nD /o\nA /o/z\n");
    let merged = store.mount(&["--backend", backend, "top"]);
    assert_eq!(sh(&merged, find), "./a2 ./d ./d/c ./e ./n ./o ./o/z ");
    store.unmount("top");
    // A layer more on what is there, and that one away.
    store.ok(&["layer", "create-rw", "--parent", "mid", "new"]);
    let merged = store.mount(&["--backend", backend, "new"]);
    assert_eq!(sh(&merged, find), "./a ./a2 ./d ./d/c ./m ./n ./o ./o/y ");
    store.unmount("new");
    store.ok(&["layer", "remove", "new"]);
    store.ok(&["layer", "remove", "top"]);
    assert_eq!(store.ok(&["store", "list"]), "base\nmid\n");
}

fn kernels(test: impl Fn(&str)) {
    if env::no_kernel_overlay().is_none() {
        test("kernel");
    }
    test("fuse");
}

both!(podmans_overlay);
fn podmans_overlay() {
    kernels(|backend| {
        let store = store("overlay", KERNEL, OVERLAY);
        check(&store, backend);
        assert_eq!(store.ok(&["store", "check"]), "");
    });
    // One that a mount program wrote.
    let flag = format!("{OVERLAY}\nprintf true > .has-mount-program");
    let store = store("overlay", PROGRAM, &flag);
    check(&store, "fuse");
}

both!(dockers_overlay2);
fn dockers_overlay2() {
    kernels(|backend| {
        let store = store("overlay2", KERNEL, OVERLAY2);
        // A base needs no mount; a layer with children is only read.
        assert_eq!(store.mount(&["base"]), store.diff("base"));
        store.unmount("base");
        let merged = store.mount(&["--backend", backend, "mid"]);
        assert!(std::fs::write(merged.join("x"), "").is_err());
        store.unmount("mid");
        assert!(!merged.exists());
        check(&store, backend);
        assert_eq!(store.ok(&["store", "check"]), "");
        assert_eq!(text(store.path("mid", "lower")), "l/ABCDEFGHIJKLMNOPQRSTUVWXYZ");
    });
}

both!(dockers_overlay_of_old);
fn dockers_overlay_of_old() {
    kernels(|backend| {
        let store = store("overlay1", KERNEL, OVERLAY1);
        let over = ["layer", "changes", "--id", "mid", "--over", "base"];
        assert_eq!(store.ok(&over), "C /d\nD /d/b\nA /m\nC /o\nD /o/x\nA /o/y\n");
        check(&store, backend);
    });
}

both!(dockers_aufs);
fn dockers_aufs() {
    check(&store("aufs", AUFS, AUFS_STORE), "fuse");
}
