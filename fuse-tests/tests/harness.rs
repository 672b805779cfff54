//! The harness itself: a check that cannot fail is a defect.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use fuse_tests::fixture::{Kind, Sandbox};
use fuse_tests::tree::{self, Options, Snapshot};
use fuse_tests::{env, ran_in_user_namespace, skip};

fn sandbox() -> Sandbox {
    let mut sandbox = Sandbox::new();
    sandbox.layer(
        "dir d 755\nfile d/f 644 hello\nlink d/g d/f\nfile gone 644 x\nsymlink s d/f\nfile \\xff\\s 600",
    );
    sandbox.layer(
        "whiteout gone\nfile d/h 755 size:70000\nmtime d/h -5.000000007\nxattr d/h user.a v",
    );
    sandbox
}

#[test]
fn mount_shows_the_merged_tree() {
    if !env::is_root() {
        skip!("needs root");
    }
    if let Some(reason) = env::no_fuse() {
        skip!("{reason}");
    }
    let sandbox = sandbox();
    let mount = sandbox.mount(Kind::Lamina);
    let tree = tree::snapshot(mount.path());
    assert_eq!(tree.names(), ["d", "d/f", "d/g", "d/h", "s", "\u{fffd} "]);
    assert_eq!(tree.get("d/g").unwrap().get("same file as"), "d/f");
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
    let options = Options { check_dots: !env::is_other_program(), ..Options::default() };
    let take = |path: &Path| tree::snapshot_with(path, options);
    tree::assert_same("merged", &take(ours.path()), &take(kernel.path()));
    ours.unmount();
    kernel.unmount();
}

/// The text of the panic that `f` ends with.
fn panic_of(f: impl FnOnce()) -> String {
    let panic = catch_unwind(AssertUnwindSafe(f)).expect_err("no panic");
    panic.downcast_ref::<String>().cloned().unwrap_or_default()
}

#[test]
fn a_changed_lower_layer_fails_the_test() {
    if let Some(reason) = env::no_kernel_overlay() {
        skip!("{reason}");
    }
    type Change = fn(&Path);
    let changes: &[(&str, Change)] = &[
        ("content", |lower| fs::write(lower.join("d/f"), "HELLO").unwrap()),
        ("owner", |lower| std::os::unix::fs::lchown(lower.join("s"), Some(7), None).unwrap()),
        ("only right", |lower| fs::write(lower.join("new"), "").unwrap()),
        ("only left", |lower| fs::remove_file(lower.join("d/g")).unwrap()),
        ("xattr trusted.overlay.x", |lower| {
            let name = "trusted.overlay.x".as_ref();
            fuse_tests::fixture::set_xattr(&lower.join("d"), name, b"y").unwrap();
        }),
        // The same content written again is a change as well.
        ("ctime", |lower| {
            let bytes = fs::read(lower.join("d/f")).unwrap();
            fs::write(lower.join("d/f"), bytes).unwrap();
        }),
    ];
    for (expected, change) in changes {
        let text = panic_of(|| {
            let sandbox = sandbox();
            sandbox.mount(Kind::Kernel).unmount();
            change(sandbox.lowers().last().unwrap());
        });
        assert!(text.contains("CHANGED") && text.contains(expected), "{expected}: {text}");
    }
}

#[test]
fn a_mount_left_behind_fails_the_test() {
    if let Some(reason) = env::no_kernel_overlay() {
        skip!("{reason}");
    }
    let text = panic_of(|| {
        let sandbox = sandbox();
        std::mem::forget(sandbox.mount(Kind::Kernel));
    });
    assert!(text.contains("mount left behind"), "{text}");
}

/// Each field of a snapshot shows a difference in it.
#[test]
fn a_difference_in_each_field_is_found() {
    let sandbox = Sandbox::new();
    let base = "dir d 755\nfile d/f 644 hello\nsymlink s t\nfifo p 644\nxattr d/f user.a v\nfile z 644 hello";
    let fields = [
        ("mode", "mode d/f 600"),
        ("mode", "mode d 700"),
        ("mtime", "mtime d/f 5"),
        ("mtime", "mtime d 5"),
        ("mtime", "mtime s 5.000000001"),
        ("xattr user.a", "xattr d/f user.a w"),
        ("xattr user.b", "xattr d user.b w"),
        ("nlink", "link d/g d/f"),
        ("same file as", "link y z"),
        ("only right", "file new"),
    ];
    let take = |n: usize, text: &str| {
        let dir = sandbox.root().join(format!("t{n}"));
        fs::create_dir(&dir).unwrap();
        fuse_tests::fixture::fill(&dir, text);
        tree::snapshot(&dir)
    };
    let plain = take(0, base);
    assert_eq!(tree::diff(&plain, &take(1, base)), [""; 0]);
    for (n, (field, line)) in fields.iter().enumerate() {
        let lines = tree::diff(&plain, &take(n + 2, &format!("{base}\n{line}")));
        assert!(lines.iter().any(|l| l.contains(field)), "{line}: {lines:?}");
    }
    for (n, (field, replaced, by)) in [
        ("content", "hello", "jello"),
        ("size", "hello", "hell"),
        ("target", "symlink s t", "symlink s u"),
        ("type", "fifo p", "socket p"),
    ]
    .into_iter()
    .enumerate()
    {
        let lines = tree::diff(&plain, &take(n + 20, &base.replace(replaced, by)));
        assert!(lines.iter().any(|l| l.contains(&format!(": {field}: "))), "{field}: {lines:?}");
    }
}

/// A path of more than 4096 bytes, names of 255 bytes, and names that are no UTF-8.
#[test]
fn a_snapshot_has_no_limit_of_depth_or_names() {
    use std::os::unix::fs::MetadataExt;
    let sandbox = Sandbox::new();
    let name = "n".repeat(255);
    let depth = 40;
    // Made from the inside out by moving: no call here sees a long path.
    let build = sandbox.root().join("build");
    fs::create_dir(&build).unwrap();
    fs::write(build.join("file"), "deep").unwrap();
    for _ in 0..depth {
        let outer = sandbox.root().join("outer");
        fs::create_dir(&outer).unwrap();
        fs::rename(&build, outer.join(&name)).unwrap();
        fs::rename(&outer, &build).unwrap();
    }
    let tree: Snapshot = tree::snapshot(&build);
    assert_eq!(tree.entries.len(), depth + 2);
    let (path, entry) = tree.entries.iter().next_back().unwrap();
    assert!(path.as_os_str().len() > 4096 && path.ends_with("file"));
    assert!(entry.get("content").starts_with("4 bytes"), "{entry:?}");
    assert!(fs::metadata(&build).unwrap().nlink() > 2);
}

/// The name that a test is run again by.
#[test]
fn a_test_knows_its_name() {
    assert_eq!(fuse_tests::function_name!(), "a_test_knows_its_name");
    let inner = || fuse_tests::function_name!();
    assert_eq!(inner(), "a_test_knows_its_name");
}

/// A namespace that another test makes copies the mounts of this one; they must end all the same.
#[test]
fn a_mount_ends_although_a_namespace_copied_it() {
    if !env::is_machine_root() {
        skip!("needs root");
    }
    if let Some(reason) = env::no_fuse() {
        skip!("{reason}");
    }
    let sandbox = sandbox();
    let mount = sandbox.mount(Kind::Lamina);
    let mut child = std::process::Command::new("unshare")
        .args(["--user", "--mount", "--propagation", "unchanged", "sleep", "300"])
        .spawn()
        .unwrap();
    let mounts = format!("/proc/{}/mountinfo", child.id());
    let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
    env::wait_until("the namespace", std::time::Duration::from_secs(10), || {
        namespace(&child.id().to_string()).is_some_and(|ns| Some(ns) != namespace("self"))
    });
    let copied = fs::read_to_string(mounts).unwrap();
    let ended = catch_unwind(AssertUnwindSafe(|| mount.unmount()));
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(copied.contains(sandbox.merged().to_str().unwrap()), "nothing was copied");
    ended.unwrap();
}
