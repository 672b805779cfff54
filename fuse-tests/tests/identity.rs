//! What an object is known by: its inode number, its names, its marks. Each test compares with
//! kernel overlayfs on the same layers, or with the mount before and after a remount.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirEntryExt, MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

use fuse_tests::case::{
    Case, OtherFs, append, forget_all, getx, ino, names, nlink, put, setx, text,
};
use fuse_tests::fixture::{Kind, Spec};
use fuse_tests::{both, env, function_name, needs_kernel_overlay, needs_root};
use rustix::fs::{Mode, OFlags};

/// The number of each path below `root`, which must be the same in stat, by an open file and in a listing.
fn numbers(root: &Path) -> BTreeMap<PathBuf, u64> {
    let mut found = BTreeMap::new();
    let mut todo = vec![root.to_path_buf()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let entry = entry.unwrap();
            let (path, listed) = (entry.path(), entry.ino());
            let meta = fs::symlink_metadata(&path).unwrap();
            assert_eq!(meta.ino(), listed, "{} in stat and in a listing", path.display());
            if meta.is_file() {
                let open = File::open(&path).unwrap().metadata().unwrap().ino();
                assert_eq!(open, listed, "{}", path.display());
            }
            if meta.is_dir() {
                todo.push(path.clone());
            }
            found.insert(path.strip_prefix(root).unwrap().to_path_buf(), listed);
        }
    }
    found
}

fn drop_caches() {
    if env::is_machine_root() {
        forget_all();
    }
}

/// Fills a lower layer with one object of each kind that keeps its number.
fn fill(dir: &Path) {
    for at in ["", "d", "d/deep"] {
        put(dir.join(at).join("f"), "content");
        put(dir.join(at).join("g"), "");
        fs::create_dir(dir.join(at).join("empty")).unwrap();
        if env::is_machine_root() {
            symlink("f", dir.join(at).join("s")).unwrap();
            rustix::fs::mkfifoat(rustix::fs::CWD, dir.join(at).join("p"), 0o600.into()).unwrap();
        }
    }
}

/// Changes all objects below `root`, in place; names are kept.
fn touch_all(root: &Path) {
    for path in numbers(root).keys() {
        lchown(root.join(path), Some(1), Some(1)).unwrap();
    }
}

/// Numbers hold over copy-up, dropped caches, renames and remounts, on a stack made by `spec`.
fn numbers_hold(spec: &Spec) {
    let mut mount = spec.mount();
    let root = spec.merged.clone();
    let before = numbers(&root);
    touch_all(&root);
    assert_eq!(numbers(&root), before, "after copy-up");
    drop_caches();
    assert_eq!(numbers(&root), before, "after caches were dropped");
    mount = mount.remount();
    assert_eq!(numbers(&root), before, "after a remount");
    // Into a directory that held nothing copied before, and one that is new.
    fs::create_dir(root.join("new")).unwrap();
    let number = |path: &str| ino(root.join(path));
    let new = number("new");
    fs::rename(root.join("f"), root.join("new/f")).unwrap();
    fs::hard_link(root.join("d/f"), root.join("d/empty/link")).unwrap();
    fs::rename(root.join("new"), root.join("moved")).unwrap();
    for round in 0..3 {
        assert_eq!(number("moved"), new, "round {round}");
        assert_eq!(number("moved/f"), before[Path::new("f")], "round {round}");
        assert_eq!(number("d/empty/link"), before[Path::new("d/f")], "round {round}");
        assert_eq!(number("d/f"), before[Path::new("d/f")], "round {round}");
        // Looks at stat against listing.
        numbers(&root);
        if round == 0 {
            drop_caches();
        } else {
            mount = mount.remount();
        }
    }
}

both!(inode_numbers_hold_over_remounts);
fn inode_numbers_hold_over_remounts() {
    let c = Case::new(2);
    fill(&c.l(0, ""));
    put(c.l(1, "d/below"), "");
    put(c.l(1, "d/empty/below"), "");
    numbers_hold(&c.spec());
}

// Handles of each filesystem tell numbers in their own way; two filesystems have equal numbers.
#[test]
fn inode_numbers_hold_on_every_filesystem() {
    needs_root!();
    for kind in ["ext4", "xfs", "btrfs", "tmpfs"] {
        for apart in [false, true] {
            let c = Case::new(1);
            let other = match kind {
                "tmpfs" => Ok(OtherFs::tmpfs(&c, "fs")),
                _ => OtherFs::image(&c, "fs", kind),
            };
            let other = match other {
                Ok(other) => other,
                Err(why) => {
                    env::note_skip(function_name!(), &format!("{kind}: {why}"));
                    continue;
                }
            };
            for dir in ["lower", "upper", "work"] {
                fs::create_dir(other.path.join(dir)).unwrap();
            }
            fill(&other.path.join("lower"));
            let mut spec = c.spec();
            spec.lowers = vec![other.path.join("lower")];
            if !apart {
                spec.upper = Some((other.path.join("upper"), other.path.join("work")));
            }
            numbers_hold(&spec);
            if apart {
                let mut half = c.sandbox.side(Kind::Lamina, "half").option("ino32_t");
                half.lowers = spec.lowers;
                numbers_hold(&half);
                let mount = half.mount();
                let numbers = numbers(mount.path());
                assert!(numbers.values().all(|number| number >> 32 == 0), "{kind}: {numbers:?}");
            }
            // The filesystem goes before the sandbox does.
            c.sandbox.check_lowers();
            c.sandbox.forget_seals();
        }
    }
}

// Each side mounts what the other wrote, and shows the numbers that the other showed.
#[test]
fn the_kernel_and_we_show_the_same_numbers() {
    needs_root!();
    needs_kernel_overlay!();
    for (writer, reader) in [(Kind::Kernel, Kind::Lamina), (Kind::Lamina, Kind::Kernel)] {
        let c = Case::new(2);
        fill(&c.l(0, ""));
        put(c.l(1, "d/below"), "");
        let mount = c.sandbox.spec(writer).mount();
        touch_all(&c.m(""));
        fs::create_dir(c.m("new")).unwrap();
        fs::rename(c.m("f"), c.m("new/f")).unwrap();
        fs::hard_link(c.m("d/f"), c.m("new/link")).unwrap();
        put(c.m("d/fresh"), "");
        let shown = numbers(&c.m(""));
        mount.unmount();
        let mount = c.sandbox.spec(reader).mount();
        assert_eq!(numbers(&c.m("")), shown, "{writer:?} wrote, {reader:?} reads");
        mount.unmount();
    }
}

// The marks of a copy-up are the kernel's, byte by byte.
both!(origins_are_written_as_the_kernel_does);
fn origins_are_written_as_the_kernel_does() {
    needs_kernel_overlay!();
    let c = Case::new(1);
    fill(&c.l(0, ""));
    put(c.l(0, "two"), "");
    fs::hard_link(c.l(0, "two"), c.l(0, "names")).unwrap();
    let mut found = Vec::new();
    for kind in [Kind::Lamina, Kind::Kernel] {
        let spec = c.sandbox.side(kind, &format!("{kind:?}"));
        let mount = spec.mount();
        touch_all(&spec.merged);
        fs::create_dir(spec.merged.join("new")).unwrap();
        fs::rename(spec.merged.join("f"), spec.merged.join("new/f")).unwrap();
        let paths: Vec<PathBuf> = numbers(&spec.merged).into_keys().collect();
        mount.unmount();
        let upper = spec.upper.unwrap().0;
        let mark = |path: &Path, name| {
            let name = format!("{}{name}", env::overlay_prefix());
            getx(upper.join(path), &name)
        };
        let marks: Vec<_> = paths
            .into_iter()
            .map(|path| (mark(&path, "origin"), mark(&path, "impure"), path))
            .collect();
        found.push(marks);
    }
    let kernel = found.pop().unwrap();
    for (ours, kernels) in found.pop().unwrap().into_iter().zip(kernel) {
        if env::is_machine_root() {
            assert_eq!(ours, kernels);
        } else {
            // Without privilege the kernel leaves out the handle.
            assert_eq!(ours.0.is_some(), kernels.0.is_some(), "{ours:?}");
            assert_eq!((ours.1, ours.2), (kernels.1, kernels.2));
        }
    }
}

// In a user namespace the kernel writes that a file was copied up, not where from.
both!(an_origin_without_a_handle_is_the_file_of_that_name);
fn an_origin_without_a_handle_is_the_file_of_that_name() {
    let c = Case::new(2);
    put(c.l(0, "d/f"), "lower");
    put(c.l(1, "d/below"), "");
    let prefix = env::overlay_prefix();
    for dir in ["", "d"] {
        put(c.u(dir).join("f"), "upper");
        setx(c.u(dir), &format!("{prefix}impure"), "y");
        setx(c.u(dir).join("f"), &format!("{prefix}origin"), "");
    }
    let mut c = c;
    c.mount();
    assert_eq!(text(c.m("d/f")), "upper");
    assert_eq!(ino(c.m("d/f")), ino(c.l(0, "d/f")));
    assert_eq!(ino(c.m("f")), ino(c.u("f")), "nothing of that name lies below");
    numbers(&c.m(""));
}

// Kernel overlay in a user namespace links a copy under a second name, elsewhere.
both!(names_of_one_copy_without_a_handle_are_one_file);
fn names_of_one_copy_without_a_handle_are_one_file() {
    let c = Case::new(2);
    put(c.l(0, "b/b"), "lower");
    put(c.l(1, "a/other"), "");
    put(c.u("b/b"), "upper");
    fs::create_dir(c.u("a")).unwrap();
    fs::hard_link(c.u("b/b"), c.u("a/b")).unwrap();
    let prefix = env::overlay_prefix();
    for dir in ["a", "b"] {
        setx(c.u(dir), &format!("{prefix}impure"), "y");
    }
    setx(c.u("b/b"), &format!("{prefix}origin"), "");
    let mut c = c;
    c.mount();
    assert_eq!(ino(c.m("a/b")), ino(c.m("b/b")));
    append(c.m("a/b"), "+");
    assert_eq!((text(c.m("b/b")), nlink(c.m("b/b"))), ("upper+".into(), 2));
    numbers(&c.m(""));
}

// Copied layers and hostile ones may say of two files that they come from one: they stay two.
both!(origins_that_lie_do_not_mix_files);
fn origins_that_lie_do_not_mix_files() {
    let mut c = Case::new(1);
    put(c.l(0, "f"), "lower f");
    put(c.l(0, "seen"), "lower seen");
    c.mount();
    for name in ["f", "seen"] {
        fs::set_permissions(c.m(name), PermissionsExt::from_mode(0o600)).unwrap();
    }
    c.unmount();
    let name = format!("{}origin", env::overlay_prefix());
    let origin = getx(c.u("f"), &name).unwrap();
    let seen = getx(c.u("seen"), &name).unwrap();
    put(c.u("f"), "upper f");
    fs::remove_file(c.u("seen")).unwrap();
    for n in 0..3 {
        put(c.u(&format!("copy{n}")), format!("copy {n}"));
        setx(c.u(&format!("copy{n}")), &name, &origin);
    }
    for (n, junk) in [&b"y"[..], b"\0\xfb", &[0xfb; 64], &[0; 29]].iter().enumerate() {
        put(c.u(&format!("junk{n}")), format!("junk {n}"));
        setx(c.u(&format!("junk{n}")), &name, junk);
    }
    put(c.u("blind"), "blind");
    setx(c.u("blind"), &name, &seen);
    for order in [["seen", "blind"], ["blind", "seen"]] {
        c.mount();
        for path in order {
            fs::symlink_metadata(c.m(path)).unwrap();
        }
        assert_eq!(text(c.m("f")), "upper f");
        assert_eq!(text(c.m("seen")), "lower seen");
        assert_eq!(text(c.m("blind")), "blind");
        for n in 0..3 {
            assert_eq!(text(c.m(&format!("copy{n}"))), format!("copy {n}"));
        }
        for n in 0..4 {
            assert_eq!(text(c.m(&format!("junk{n}"))), format!("junk {n}"));
        }
        // Held, because who lies may take the number of what the kernel has forgotten: other tests
        // may have it do so at any time.
        let held: Vec<_> = names(c.m("")).iter().map(|name| hold(c.m(name))).collect();
        let mut all: Vec<u64> =
            held.iter().map(|file| rustix::fs::fstat(file).unwrap().st_ino).collect();
        drop(held);
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count, "two files with one number");
        c.unmount();
    }
}

/// Has the kernel know a file as long as what this gives lives.
#[track_caller]
fn hold(path: impl AsRef<Path>) -> OwnedFd {
    rustix::fs::open(path.as_ref(), OFlags::PATH | OFlags::NOFOLLOW, Mode::empty()).unwrap()
}

// A made-up number was taken as well, and the file whose it was answered `ESTALE`.
both!(a_file_whose_numbers_a_lie_takes_is_found);
fn a_file_whose_numbers_a_lie_takes_is_found() {
    let mut c = Case::new(1);
    put(c.l(0, "seen"), "lower seen");
    c.mount();
    fs::set_permissions(c.m("seen"), PermissionsExt::from_mode(0o600)).unwrap();
    c.unmount();
    let name = format!("{}origin", env::overlay_prefix());
    let seen = getx(c.u("seen"), &name).unwrap();
    fs::remove_file(c.u("seen")).unwrap();
    put(c.u("blind"), "blind");
    setx(c.u("blind"), &name, &seen);
    c.mount();
    for _ in 0..20 {
        let held = [hold(c.m("blind")), hold(c.m("seen"))];
        let [blind, seen] = held.each_ref().map(|file| rustix::fs::fstat(file).unwrap().st_ino);
        assert_ne!(blind, seen);
        assert_eq!(text(c.m("seen")), "lower seen");
        assert_eq!(text(c.m("blind")), "blind");
        drop(held);
        // What was used a moment ago is spared twice.
        for _ in 0..3 {
            drop_caches();
        }
    }
}

/// Content, number and link count, of names that are one file.
#[track_caller]
fn one_file(c: &Case, names: &[&str], content: &str, links: u64) -> u64 {
    let number = ino(c.m(names[0]));
    for name in names {
        assert_eq!(text(c.m(name)), content, "{name}");
        assert_eq!((ino(c.m(name)), nlink(c.m(name))), (number, links), "{name}");
    }
    number
}

/// Lower files with several names.
fn linked(c: &Case) {
    put(c.l(0, "d/a"), "lower");
    for name in ["b", "d/c"] {
        fs::hard_link(c.l(0, "d/a"), c.l(0, name)).unwrap();
    }
}

// Counts that overflowed, or wrapped to nonsense.
#[test]
fn counts_of_names_that_lie_do_no_harm() {
    needs_root!();
    let mut c = Case::new(1);
    linked(&c);
    c.mount_with("index=on");
    append(c.m("b"), "+");
    c.unmount();
    let name = format!("{}nlink", env::overlay_prefix());
    for lie in [
        "U+2147483647",
        "U-2147483648",
        "U+2147483645",
        "U+9999999999",
        "L+2147483647",
        "L-2147483648",
        "L+2147483644",
        "L-3",
        "U+",
        "junk",
    ] {
        setx(c.u("b"), &name, lie);
        c.mount_with("index=on");
        // While it is open it is not forgotten, whoever has caches dropped: the next look might not believe the lie.
        let open = File::open(c.m("b")).unwrap();
        let links = nlink(c.m("b"));
        assert!((1..1 << 31).contains(&links), "{lie}: {links} links");
        for n in 0..4 {
            fs::hard_link(c.m("b"), c.m(&format!("new{n}"))).unwrap();
        }
        assert_eq!(nlink(c.m("new3")), links + 4, "{lie}");
        append(c.m("d/c"), "+");
        for n in 0..4 {
            fs::remove_file(c.m(&format!("new{n}"))).unwrap();
        }
        assert_eq!(nlink(c.m("b")), links, "{lie}");
        assert_eq!(text(c.m("b")), text(c.m("d/a")), "{lie}");
        drop(open);
        c.unmount();
    }
}

both!(names_of_a_lower_file_stay_one_file_with_an_index);
fn names_of_a_lower_file_stay_one_file_with_an_index() {
    let mut c = Case::new(1);
    linked(&c);
    c.mount_with("index=on");
    let number = one_file(&c, &["d/a", "b", "d/c"], "lower", 3);
    append(c.m("b"), "+");
    assert_eq!(one_file(&c, &["b", "d/c", "d/a"], "lower+", 3), number);
    drop_caches();
    assert_eq!(one_file(&c, &["d/c", "b"], "lower+", 3), number);
    c.remount();
    // Another name first, and only by reading.
    assert_eq!(one_file(&c, &["d/c"], "lower+", 3), number);
    fs::remove_file(c.m("d/a")).unwrap();
    fs::hard_link(c.m("d/c"), c.m("new")).unwrap();
    fs::rename(c.m("d/c"), c.m("moved")).unwrap();
    assert_eq!(one_file(&c, &["new", "moved", "b"], "lower+", 3), number);
    c.remount();
    append(c.m("moved"), "+");
    assert_eq!(one_file(&c, &["b", "new", "moved"], "lower++", 3), number);
    put(c.m("other"), "other");
    fs::rename(c.m("other"), c.m("b")).unwrap();
    fs::remove_file(c.m("new")).unwrap();
    c.remount();
    assert_eq!(one_file(&c, &["moved"], "lower++", 1), number);
    let open = File::open(c.m("moved")).unwrap();
    fs::remove_file(c.m("moved")).unwrap();
    assert_eq!(open.metadata().unwrap().nlink(), 0);
    drop(open);
    assert_eq!(fs::read_dir(c.w("index")).unwrap().count(), 0, "nothing is left of it");
    assert_eq!(text(c.m("b")), "other");
}

// The first change of a lower file is that one of its names goes: at the next mount it is gone.
both!(names_that_went_are_counted_with_an_index);
fn names_that_went_are_counted_with_an_index() {
    let mut c = Case::new(2);
    linked(&c);
    put(c.l(1, "d/below"), "");
    c.mount_with("index=on");
    fs::remove_file(c.m("b")).unwrap();
    for _ in 0..2 {
        one_file(&c, &["d/a", "d/c"], "lower", 2);
        c.remount();
    }
    fs::remove_file(c.m("d/a")).unwrap();
    fs::remove_file(c.m("d/c")).unwrap();
    c.remount();
    assert_eq!(fs::read_dir(c.w("index")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(c.m("d")).unwrap().count(), 1);
}

// Either goes on with what the other wrote, each in a different order of names.
#[test]
fn the_kernel_and_we_share_an_index() {
    needs_root!();
    needs_kernel_overlay!();
    for first in [Kind::Kernel, Kind::Lamina] {
        let c = Case::new(2);
        linked(&c);
        put(c.l(1, "below"), "");
        let second = if first == Kind::Kernel { Kind::Lamina } else { Kind::Kernel };
        let mount = |kind| c.sandbox.spec(kind).option("index=on").mount();
        let mut content = "lower".to_owned();
        let mut number = None;
        for (round, kind) in [first, second, first, second].into_iter().enumerate() {
            let mounted = mount(kind);
            let name = ["d/a", "b", "d/c", "d/a"][round];
            append(c.m(name), "+");
            content.push('+');
            let now = one_file(&c, &["b", "d/c", "d/a"], &content, 3);
            assert_eq!(*number.get_or_insert(now), now, "{kind:?} in round {round}");
            mounted.unmount();
        }
        let mounted = mount(second);
        fs::remove_file(c.m("b")).unwrap();
        mounted.unmount();
        let mounted = mount(first);
        one_file(&c, &["d/a", "d/c"], &content, 2);
        fs::hard_link(c.m("d/a"), c.m("e")).unwrap();
        fs::rename(c.m("d/c"), c.m("d/f")).unwrap();
        mounted.unmount();
        let mounted = mount(second);
        one_file(&c, &["d/f", "e", "d/a"], &content, 3);
        for name in ["d/f", "e", "d/a"] {
            fs::remove_file(c.m(name)).unwrap();
        }
        mounted.unmount();
        // The kernel works in the index, and keeps the inode of its whiteouts there.
        let left = names(c.w("index")).into_iter().filter(|name| !name.starts_with('#'));
        assert_eq!(left.count(), 0, "{first:?} first");
        // Without an index: nothing of this is in the way.
        c.sandbox.spec(Kind::Lamina).mount().unmount();
    }
}

both!(an_index_is_bound_to_its_layers);
fn an_index_is_bound_to_its_layers() {
    let mut c = Case::new(2);
    put(c.l(0, "f"), "");
    c.mount_with("index=on");
    c.unmount();
    let refused = |spec: Spec| {
        let output = spec.option("index=on").try_mount().unwrap_err();
        String::from_utf8(output.stderr).unwrap()
    };
    let mut other = c.spec();
    other.lowers.reverse();
    let said = refused(other);
    assert!(said.contains("another lowerdir") && said.contains("Stale"), "{said}");
    let mut other = c.spec();
    let upper = c.sandbox.root().join("other");
    fs::create_dir(&upper).unwrap();
    other.upper.as_mut().unwrap().0 = upper;
    let said = refused(other);
    assert!(said.contains("another upperdir") && said.contains("Stale"), "{said}");
    c.mount_with("index=on");
}

// What an interrupted mount left is removed; what is no entry stays, and is never shown.
#[test]
fn an_index_is_cleaned_up() {
    needs_root!();
    let mut c = Case::new(1);
    linked(&c);
    put(c.l(0, "x"), "x");
    fs::hard_link(c.l(0, "x"), c.l(0, "y")).unwrap();
    c.mount_with("index=on");
    append(c.m("b"), "+");
    append(c.m("x"), "+");
    c.unmount();
    let entry = |number: u64| {
        let find = |entry: &fs::DirEntry| entry.metadata().unwrap().ino() == number;
        fs::read_dir(c.w("index")).unwrap().map(Result::unwrap).find(find).unwrap().path()
    };
    // As if the server had been killed between the last unlink and the removal of the entry.
    let orphan = entry(ino(c.u("x")));
    for name in ["x", "y"] {
        fs::remove_file(c.u(name)).unwrap();
        fuse_tests::case::whiteout(c.u(name));
    }
    setx(&orphan, "trusted.overlay.nlink", "U-1");
    let kept = entry(ino(c.u("b")));
    let stale = c.w("index/00fb1d0001000000000000000000000000000000000100000001000000");
    fs::hard_link(&kept, &stale).unwrap();
    put(c.w("index/#1"), "unfinished");
    put(c.w("index/README"), "no entry");
    c.mount_with("index=on");
    for gone in [&orphan, &stale, &c.w("index/#1")] {
        fuse_tests::case::gone(gone);
    }
    assert!(kept.exists() && c.w("index/README").exists());
    one_file(&c, &["d/a", "d/c", "b"], "lower+", 3);
    fuse_tests::case::gone(c.m("x"));
}

#[test]
fn an_index_needs_file_handles() {
    needs_root!();
    let c = Case::new(1);
    let other = OtherFs::mount(&c, "fs", "ramfs", "");
    put(other.path.join("f"), "");
    let mut spec = c.spec();
    spec.lowers = vec![other.path.clone()];
    let output = spec.clone().option("index=on").try_mount().unwrap_err();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("index=on") && said.contains("no file handles"), "{said}");
    // Numbers last by the name then.
    let mount = spec.mount();
    let number = ino(c.m("f"));
    append(c.m("f"), "+");
    let mount = mount.remount();
    assert_eq!((ino(c.m("f")), text(c.m("f"))), (number, "+".to_owned()));
    mount.unmount();
    c.sandbox.forget_seals();
}

both!(a_uuid_of_its_own_is_given_once);
fn a_uuid_of_its_own_is_given_once() {
    let mut c = Case::new(1);
    let name = format!("{}uuid", env::overlay_prefix());
    c.mount();
    c.unmount();
    assert_eq!(getx(c.u(""), &name), None);
    let mut given = Vec::new();
    for _ in 0..2 {
        c.mount_with("uuid=on");
        c.unmount();
        given.push(getx(c.u(""), &name).unwrap());
    }
    assert_eq!(given[0], given[1]);
    assert_eq!(given[0].len(), 16);
}

// A directory that lower layers have parts of is brought to the upper and moved: all beneath keeps its
// number, also where the upper was made by hand and tells no origins.
both!(inode_numbers_hold_over_the_rename_of_a_directory);
fn inode_numbers_hold_over_the_rename_of_a_directory() {
    let mut c = Case::new(2);
    fill(&c.l(0, ""));
    put(c.l(1, "d/below/f"), "");
    put(c.u("d/deep/upper"), "");
    c.mount();
    let before = numbers(&c.m(""));
    fs::rename(c.m("d"), c.m("empty/moved")).unwrap();
    for round in 0..3 {
        let now = numbers(&c.m(""));
        for (path, number) in &before {
            let path = match path.strip_prefix("d") {
                Ok(beneath) => Path::new("empty/moved").join(beneath),
                Err(_) => path.clone(),
            };
            assert_eq!(now[&path], *number, "{} in round {round}", path.display());
        }
        c.remount();
    }
}
