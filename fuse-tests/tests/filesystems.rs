//! Layers on other filesystems than the one of the test data: lower layers on filesystems that are only read, or that have no
//! xattrs, ACLs, owners or links, beside kernel overlayfs on the same images; and what differs by the filesystem of the upper.
//!
//! `scripts/test-filesystems.sh` runs other suites with all layers on other filesystems.

use std::fs;
use std::os::unix::fs::MetadataExt;

use fuse_tests::case::{Case, OtherFs, append, getx, gone, ino, names, put, sh, text};
use fuse_tests::fixture::{Kind, set_mtime};
use fuse_tests::images::{Image, Packed};
use fuse_tests::run::{Config, Renames};
use fuse_tests::survey::run_many;
use fuse_tests::tree::{self, Options, assert_same, snapshot_with};
use fuse_tests::{needs_kernel_overlay, needs_root, skip};

/// Generated stacks in images, and generated operations on them.
fn sequences(test: u64, image: Image) {
    let number = |variable, default| {
        std::env::var(variable).map_or(default, |text| text.parse().expect(variable))
    };
    let seed = number("FUSE_TESTS_SEED", 1u64).wrapping_add(test << 32);
    let count = usize::try_from(number("FUSE_TESTS_SEQUENCES", 300).div_ceil(20)).unwrap();
    let plain = Config { image: Some(image), ..Config::default() };
    run_many(seed, count, &plain);
    let copied = Config { renames: Renames::Copied, ..plain.clone() };
    run_many(seed + 1000, count, &copied);
    if image.tells_uuid() {
        let links = Config { links: true, index: true, ..plain };
        run_many(seed + 2000, count, &links);
    }
}

/// One stack by hand, with what generated ones do not have.
fn by_hand(image: Image) {
    let mut c = Case::new(1);
    let layers = [c.l(0, "")];
    sh(
        c.l(0, ""),
        "mkdir -p d/sub; echo untouched >untouched; echo one >one; ln one two; echo setuid >s; chmod 4755 s; ln -s one link; mkfifo p
        truncate -s 20M big; printf end >>big; head -c 1000000 /dev/urandom >random; chown 3:4 d; chmod 2770 d
        for n in $(seq 700); do : >d/sub/$n; done",
    );
    if image != Image::SquashfsWithoutXattrs {
        sh(c.l(0, ""), "setcap cap_net_raw+ep s; setfattr -n user.a -v b one");
    }
    c.sandbox.layer("whiteout d/sub/7\nfile d/new 640 new");
    let packed = Packed::new(&c.sandbox, &layers, image);
    let sides = [Kind::Lamina, Kind::Kernel].map(|kind| c.sandbox.side(kind, &format!("{kind:?}")));
    let mounts = sides.clone().map(|spec| spec.mount());
    let options = Options {
        recent: Some(tree::now()),
        dir_times: false,
        check_ino: false,
        ..Options::default()
    };
    let compare = |when: &str| {
        let [ours, kernel] = mounts.each_ref().map(|mount| snapshot_with(mount.path(), options));
        assert_same(when, &ours, &kernel);
        assert!(ours.entries.len() > 6);
    };
    compare("before");
    for mount in &mounts {
        sh(
            mount.path(),
            "echo more >>two; chmod 600 s; chown 5 link; printf x >>big; truncate -s 5 random; rm p; mkfifo p; mv one d/one
            setfattr -n user.new -v 1 big; setfacl -m u:7:r d/new; setfacl -d -m u:7:rwx d; rm -r d/sub; mkdir d/sub",
        );
        // A name of a file that was copied up by another one; the kernel shows the lower one without an index.
        fs::remove_file(mount.path().join("two")).unwrap();
        assert_eq!(
            text(mount.path().join("d/one")).len(),
            if mount.path() == sides[0].merged { 9 } else { 4 }
        );
        put(mount.path().join("d/one"), "the same again");
    }
    compare("after changes");
    // The kernel asks the lower filesystem whether it takes one.
    sh(mounts[0].path(), "setfacl -m u:9:r untouched; getfacl -cn untouched | grep -q user:9:r");
    drop(mounts);
    drop(packed);
}

macro_rules! on_images {
    ($($name:ident $number:literal $image:ident;)*) => {$(
        #[test]
        fn $name() {
            needs_root!();
            needs_kernel_overlay!();
            if let Some(reason) = Image::$image.missing() {
                skip!("{reason}");
            }
            by_hand(Image::$image);
            sequences($number, Image::$image);
        }
    )*};
}

on_images! {
    lowers_on_squashfs 40 Squashfs;
    lowers_on_squashfs_without_xattrs 41 SquashfsWithoutXattrs;
    lowers_on_erofs 42 Erofs;
    lowers_on_erofs_without_acls 43 ErofsWithoutAcls;
}

// The kernel does not take it: names that differ by case are one.
#[test]
fn a_lower_on_vfat() {
    needs_root!();
    if let Some(reason) = Image::Vfat.missing() {
        skip!("{reason}");
    }
    let mut c = Case::new(2);
    let layers = [c.l(0, "")];
    put(c.l(0, "Dir/File"), "one");
    put(c.l(0, "Dir/gone"), "g");
    put(c.l(0, "Dir/sub/deep"), "deep");
    put(c.l(0, "moved"), "m");
    put(c.l(0, "mode"), "mode");
    put(c.l(1, "Dir/below"), "below");
    let sandbox = std::mem::take(&mut c.sandbox);
    let packed = Packed::new(&sandbox, &layers, Image::Vfat);
    let mut mount = sandbox.mount(Kind::Lamina);
    let m = |path: &str| sandbox.merged().join(path);
    assert_eq!(names(m("Dir")), ["File", "below", "gone", "sub"]);
    append(m("Dir/File"), "+");
    fs::remove_file(m("Dir/gone")).unwrap();
    fs::rename(m("moved"), m("Dir/sub/moved")).unwrap();
    fs::rename(m("Dir/sub"), m("whole")).unwrap();
    sh(
        m(""),
        "chmod 640 mode; chown 5:6 mode; setfattr -n user.a -v b mode; setfacl -m u:7:r mode; ln mode mode2",
    );
    for _ in 0..2 {
        assert_eq!(names(m("")), ["Dir", "mode", "mode2", "whole"]);
        assert_eq!(names(m("Dir")), ["File", "below"]);
        assert_eq!(names(m("whole")), ["deep", "moved"]);
        assert_eq!(
            text(m("Dir/File")) + &text(m("whole/moved")) + &text(m("Dir/below")),
            "one+mbelow"
        );
        let mode = fs::metadata(m("mode")).unwrap();
        assert_eq!((mode.uid(), mode.gid(), mode.mode() & 0o777, mode.nlink()), (5, 6, 0o640, 2));
        // One file, although no handle tells what it was copied from.
        assert_eq!(ino(m("mode")), ino(m("mode2")));
        assert!(getx(m("mode"), "system.posix_acl_access").is_some());
        gone(m("Dir/gone"));
        mount = mount.remount();
    }
    mount.unmount();
    drop(packed);
}

// POSIX wants it; filesystems that do not care whether the size changes are the exception, tmpfs and xfs among others.
#[test]
fn truncating_to_the_same_size_changes_the_time() {
    needs_root!();
    let c = Case::new(1);
    put(c.l(0, "file"), "12345");
    set_mtime(&c.l(0, "file"), 77, 7).unwrap();
    let other = OtherFs::tmpfs(&c, "other");
    let mut spec = c.spec();
    let dirs = ["upper", "work"].map(|name| other.path.join(name));
    dirs.iter().for_each(|dir| fs::create_dir(dir).unwrap());
    let [upper, work] = dirs;
    spec.upper = Some((upper, work));
    let mount = spec.mount();
    for _ in 0..2 {
        nix::unistd::truncate(&c.m("file"), 5).unwrap();
        assert_ne!(fs::metadata(c.m("file")).unwrap().mtime(), 77);
        set_mtime(&c.m("file"), 77, 7).unwrap();
    }
    mount.unmount();
}
