//! The harness itself: a test that cannot fail is a defect.

use fuse_tests::fixture::{Kind, Sandbox};
use fuse_tests::{env, ran_in_user_namespace, skip, tree};

fn sandbox() -> Sandbox {
    let mut sandbox = Sandbox::new();
    sandbox.layer("dir d 755\nfile d/f 644 hello\nlink d/g d/f\nfile gone 644 x\nsymlink s d/f\nfile \\xff\\s 600");
    sandbox.layer(
        "whiteout gone\nfile d/h 755 size:70000\nmtime d/h -5.000000007\nxattr d/h user.a v",
    );
    sandbox
}

#[test]
fn mount_shows_the_merged_tree() {
    if let Some(reason) = env::no_fuse() {
        skip!("{reason}");
    }
    let sandbox = sandbox();
    let mount = sandbox.mount(Kind::Lamina);
    let names = tree::snapshot(mount.path()).names();
    assert_eq!(names, ["d", "d/f", "d/g", "d/h", "s", "\u{fffd} "]);
    mount.unmount();
}

#[test]
fn kernel_shows_the_merged_tree() {
    if let Some(reason) = env::no_kernel_overlay() {
        skip!("{reason}");
    }
    let sandbox = sandbox();
    let mount = sandbox.mount(Kind::Kernel);
    let tree = tree::snapshot(mount.path());
    assert_eq!(tree.names(), ["d", "d/f", "d/g", "d/h", "s", "\u{fffd} "]);
    assert_eq!(tree.get("d/h").unwrap().get("mtime"), "-5.000000007");
    mount.unmount();
}

#[test]
fn user_namespace_mounts() {
    if ran_in_user_namespace!() {
        return;
    }
    assert!(env::is_root() && !env::is_machine_root());
    let sandbox = sandbox();
    let ours = sandbox.side(Kind::Lamina, "ours").mount();
    let kernel = sandbox.side(Kind::Kernel, "kernel").mount();
    tree::assert_same("merged", &tree::snapshot(ours.path()), &tree::snapshot(kernel.path()));
    ours.unmount();
    kernel.unmount();
}
