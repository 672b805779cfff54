//! Files whose data lies in a lower layer: made by ours where only attributes change, by kernel overlay, and by hand, also with
//! data-only layers and fs-verity digests.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};

use fuse_tests::case::{
    BOUND, CAP_NET_RAW, Case, OtherFs, append, getx, gone, mode, names, put, python, refused, setx,
    sh, text, umount,
};
use fuse_tests::fixture::{Kind, pattern};
use fuse_tests::tree::{Options, Snapshot, assert_same, snapshot_with};
use fuse_tests::{env, needs_root, skip};
use rustix::io::Errno;
use rustix::process::{Signal, kill_process};

const METACOPY: &str = "trusted.overlay.metacopy";
const REDIRECT: &str = "trusted.overlay.redirect";

fn look(path: impl AsRef<Path>) -> Snapshot {
    snapshot_with(path, Options { check_ino: false, ..Options::default() })
}

/// Makes a file of `len` bytes without data of its own.
fn stub(path: &Path, len: u64, metacopy: &str, value: &[u8]) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    File::create(path).unwrap().set_len(len).unwrap();
    setx(path, metacopy, value);
}

// Attributes change without a byte of data copied, the first write brings all of it.
#[test]
fn changes_of_attributes_copy_no_data() {
    needs_root!();
    const SIZE: usize = 20 << 20;
    let mut c = Case::new(2);
    let data = pattern(SIZE, 3);
    for name in ["mode", "owner", "times", "xattr", "acl", "cap"] {
        put(c.l(1, &format!("d/{name}")), &data);
    }
    setx(c.l(1, "d/cap"), "security.capability", CAP_NET_RAW);
    c.mount_with("metacopy=on");
    names(c.m("d"));
    let before = c.server_io();
    sh(
        c.m("d"),
        "chmod 4711 mode; chown 1000:1000 owner; touch -d 2001-01-01 times; \
         setfattr -n user.a -v b xattr; setfacl -m u:1000:r acl; chmod 600 cap",
    );
    assert!(c.server_io() - before < 1 << 20, "data was read or written");
    for name in ["mode", "owner", "times", "xattr", "acl", "cap"] {
        let upper = fs::metadata(c.u(&format!("d/{name}"))).unwrap();
        assert_eq!((upper.len(), upper.blocks() < 64), (SIZE as u64, true), "{name}");
        assert_eq!(getx(c.u(&format!("d/{name}")), METACOPY), Some(Vec::new()), "{name}");
        assert!(fs::read(c.m(&format!("d/{name}"))).unwrap() == data, "{name}");
        assert_eq!(fs::metadata(c.m(&format!("d/{name}"))).unwrap().blocks(), upper.blocks());
        File::open(c.m(&format!("d/{name}"))).unwrap().sync_all().unwrap();
    }
    let shown = look(c.m(""));
    c.unmount();
    if env::no_kernel_overlay().is_none() {
        let kernel = c.sandbox.spec(Kind::Kernel).option("metacopy=on").mount();
        assert_same("by the kernel", &shown, &look(kernel.path()));
    }
    // Read without the option too; written, they are files like any other.
    c.mount();
    assert_same("after a remount", &shown, &look(c.m("")));
    let reader = File::open(c.m("d/mode")).unwrap();
    let old = fs::metadata(c.m("d/cap")).unwrap();
    for name in ["mode", "owner", "times", "xattr", "acl", "cap"] {
        let file = OpenOptions::new().write(true).open(c.m(&format!("d/{name}"))).unwrap();
        file.write_all_at(b"new", 5).unwrap();
        let upper = c.u(&format!("d/{name}"));
        assert_eq!(getx(&upper, METACOPY), None, "{name}");
        assert!(fs::metadata(&upper).unwrap().blocks() * 512 >= SIZE as u64, "{name}");
    }
    let mut new = data.clone();
    new[5..8].copy_from_slice(b"new");
    let mut seen = vec![0; SIZE];
    reader.read_exact_at(&mut seen, 0).unwrap();
    assert!(seen == new, "a descriptor from before shows other data");
    drop(reader);
    c.remount();
    for name in ["mode", "owner", "times", "xattr", "acl", "cap"] {
        assert!(fs::read(c.m(&format!("d/{name}"))).unwrap() == new, "{name}");
    }
    let times = fs::metadata(c.m("d/times")).unwrap();
    assert_eq!((times.uid(), times.mode() & 0o7777), (0, 0o644));
    assert_eq!(fs::metadata(c.m("d/cap")).unwrap().ino(), old.ino());
    assert_eq!(getx(c.m("d/xattr"), "user.a"), Some(b"b".to_vec()));
}

// Data that is copied in puts the mode back that there was before: also one that was set meanwhile. The kernel lets
// only stores into mappings go on beside a change of attributes.
#[test]
fn modes_set_while_data_is_copied_in_stay() {
    needs_root!();
    let mut c = Case::new(1);
    let files = 20;
    for n in 0..files {
        put(c.l(0, &format!("f{n}")), vec![n; 2 << 20]);
    }
    c.mount_with("metacopy=on");
    sh(c.m(""), "chmod 4600 f*");
    let script = r#"
import ctypes, mmap, os, sys, threading
libc = ctypes.CDLL(None)
for n in range(int(sys.argv[2])):
    path = f"{sys.argv[1]}/f{n}"
    fd = os.open(path, os.O_RDWR)
    mapped = mmap.mmap(fd, 0)
    mapped[0:1] = b"+"
    start = threading.Barrier(2)
    def write():
        start.wait()
        offset = ctypes.c_longlong(0)
        assert libc.sync_file_range(fd, offset, offset, 7) == 0
    writer = threading.Thread(target=write)
    writer.start()
    start.wait()
    # As many as it takes to come to the midst of the copying, for one of the files.
    for _ in range(n):
        os.chmod(path, 0o4604)
    os.chmod(path, 0o4640)
    writer.join()
"#;
    python(script, &[c.m("").to_str().unwrap(), &files.to_string()]);
    c.remount();
    for n in 0..files {
        assert_eq!(mode(c.m(&format!("f{n}"))) & 0o7777, 0o4640, "f{n}");
        let content = fs::read(c.m(&format!("f{n}"))).unwrap();
        assert!(content[0] == b'+' && content[1..] == vec![n; (2 << 20) - 1], "f{n}");
    }
}

// Whatever needs the data of a metacopy or moves it away from what lends it gives it data first.
#[test]
fn a_metacopy_that_moves_or_is_cut_has_its_data() {
    needs_root!();
    let mut c = Case::new(1);
    for name in
        ["renamed", "same", "linked", "cut", "longer", "emptied", "punched", "swap-a", "swap-b"]
    {
        put(c.l(0, &format!("d/{name}")), "0123456789");
    }
    put(c.l(0, "moved/f"), "0123456789");
    fs::create_dir(c.l(0, "e")).unwrap();
    for options in ["metacopy=on,redirect_dir=on", "metacopy=off"] {
        c.mount_with("metacopy=on");
        sh(c.m(""), "chmod 600 d/* moved/f");
        c.unmount();
        assert_eq!(getx(c.u("d/cut"), METACOPY), Some(Vec::new()));
        c.mount_with(options);
        fs::rename(c.m("d/renamed"), c.m("e/renamed")).unwrap();
        fs::rename(c.m("d/same"), c.m("d/other")).unwrap();
        fs::hard_link(c.m("d/linked"), c.m("e/linked")).unwrap();
        let open = |name: &str| OpenOptions::new().write(true).open(c.m(name)).unwrap();
        open("d/cut").set_len(4).unwrap();
        open("d/longer").set_len(12).unwrap();
        drop(File::create(c.m("d/emptied")).unwrap());
        let mode = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(open("d/punched"), mode, 0, 5).unwrap();
        sh(
            c.m("d"),
            "mv --exchange swap-a swap-b 2>/dev/null || { mv swap-a x; mv swap-b swap-a; mv x swap-b; }",
        );
        fs::rename(c.m("moved"), c.m("e/moved")).unwrap();
        for _ in 0..2 {
            for (path, content) in [
                ("e/renamed", "0123456789"),
                ("d/other", "0123456789"),
                ("e/linked", "0123456789"),
                ("d/linked", "0123456789"),
                ("d/cut", "0123"),
                ("d/longer", "0123456789\0\0"),
                ("d/emptied", ""),
                ("d/punched", "\0\0\0\0\x0056789"),
                ("d/swap-a", "0123456789"),
                ("e/moved/f", "0123456789"),
            ] {
                assert_eq!(text(c.m(path)), content, "{path} {options}");
            }
            assert_eq!(fs::metadata(c.m("d/linked")).unwrap().nlink(), 2);
            gone(c.m("d/renamed"));
            c.remount();
        }
        c.unmount();
        fs::remove_dir_all(c.u("")).unwrap();
        fs::create_dir(c.u("")).unwrap();
    }
}

// Killed while a metacopy gets its data, the server leaves the file as it was or with all of it.
#[test]
fn a_server_killed_while_a_metacopy_gets_data_leaves_no_zeros() {
    needs_root!();
    const SIZE: usize = 48 << 20;
    let mut c = Case::new(1);
    let data = pattern(SIZE, 9);
    put(c.l(0, "f"), &data);
    for round in 0..6 {
        c.mount_with("metacopy=on");
        sh(c.m(""), "chmod 600 f");
        let (server, path) = (c.server(), c.m("f"));
        let writer = std::thread::spawn(move || {
            OpenOptions::new().append(true).open(path).and_then(|mut file| file.write_all(b"end"))
        });
        let limit = round * 16_000;
        env::wait_until("some data", BOUND, || {
            writer.is_finished() || fs::metadata(c.u("f")).is_ok_and(|f| f.blocks() >= limit)
        });
        kill_process(server, Signal::KILL).unwrap();
        let _ = writer.join().unwrap();
        c.mount.as_mut().unwrap().gone();
        rustix::mount::unmount(c.m(""), rustix::mount::UnmountFlags::DETACH).unwrap();
        c.unmount();
        c.mount();
        let found = fs::read(c.m("f")).unwrap();
        let whole = found.get(..SIZE) == Some(&data[..]);
        assert!(whole && matches!(&found[SIZE..], b"" | b"end"), "round {round}: {}", found.len());
        c.unmount();
        fs::remove_file(c.u("f")).unwrap();
    }
}

// What is no value of the format, or leads to no data, reads as an error and never as zeros.
#[test]
fn odd_metacopies_are_errors() {
    needs_root!();
    let mut c = Case::new(2);
    let odd: [(&str, &[u8]); 6] = [
        ("short", &[0, 4]),
        ("version", &[1, 4, 0, 0]),
        ("flags", &[0, 4, 1, 0]),
        ("length", &[0, 9, 0, 0]),
        ("no-digest", &[0, 4, 0, 1]),
        ("long", &[0; 80]),
    ];
    for (name, value) in odd {
        stub(&c.l(0, name), 5, METACOPY, value);
        put(c.l(1, name), "below");
    }
    stub(&c.l(0, "none"), 5, METACOPY, b"");
    for (name, redirect) in [("up", "/../x"), ("gone", "/nowhere"), ("dir", "/d"), ("link", "/l")] {
        stub(&c.l(0, name), 5, METACOPY, b"");
        setx(c.l(0, name), REDIRECT, redirect);
    }
    put(c.l(1, "d/inner"), "inner");
    std::os::unix::fs::symlink("d/inner", c.l(1, "l")).unwrap();
    stub(&c.l(0, "plain"), 5, METACOPY, b"");
    stub(&c.l(0, "packed"), 5, METACOPY, &[0, 4, 0, 0]);
    put(c.l(1, "plain"), "plain");
    put(c.l(1, "packed"), "plain");
    c.mount();
    let names = ["none", "up", "gone", "dir", "link"];
    for name in odd.iter().map(|(name, _)| *name).chain(names) {
        assert_eq!(fs::metadata(c.m(name)).unwrap().len(), 5);
        refused(fs::read(c.m(name)), Errno::IO);
        // Nor may a copy of the zeros land in the upper.
        let written = OpenOptions::new()
            .append(true)
            .open(c.m(name))
            .and_then(|mut file| file.write_all(b"x"));
        written.unwrap_err();
        assert!(!c.u(name).exists(), "{name}");
    }
    assert_eq!((text(c.m("plain")), text(c.m("packed"))), ("plain".into(), "plain".into()));
}

// Whoever may write a layer's user xattrs must not reach files that their modes hide.
#[test]
fn whose_metacopies_are_followed_is_an_option() {
    needs_root!();
    let mut c = Case::new(2);
    for prefix in ["trusted", "user"] {
        stub(&c.l(0, prefix), 6, &format!("{prefix}.overlay.metacopy"), b"");
        setx(c.l(0, prefix), &format!("{prefix}.overlay.redirect"), "/secret");
    }
    put(c.l(1, "secret"), "secret");
    for (options, trusted, user) in [
        ("rw", true, false),
        ("redirect_dir=follow", true, true),
        ("metacopy=on", true, true),
        ("redirect_dir=nofollow", false, false),
    ] {
        c.mount_with(options);
        for (name, is_followed) in [("trusted", trusted), ("user", user)] {
            if is_followed {
                assert_eq!(text(c.m(name)), "secret", "{options}");
            } else {
                refused(fs::read(c.m(name)), Errno::PERM);
            }
        }
        c.unmount();
    }
}

/// A stack as composefs has it: names and attributes above, data by digest in layers that show nothing.
fn composed(prefix: &str) -> Case {
    let mut c = Case::new(0);
    c.sandbox
        .layer("file ab/cdef 444 object-one\nfile ab/only 444 object-two\nfile hidden 644 never");
    c.sandbox.layer("file ab/cdef 444 first-wins!");
    let top = c.sandbox.layer("dir etc 755");
    let (metacopy, redirect) = (format!("{prefix}metacopy"), format!("{prefix}redirect"));
    for (name, object, len) in
        [("etc/one", "/ab/cdef", 11), ("etc/two", "/ab/only", 10), ("none", "/ab/none", 3)]
    {
        stub(&top.join(name), len, &metacopy, b"");
        setx(top.join(name), &redirect, object);
        fs::set_permissions(top.join(name), fs::Permissions::from_mode(0o640)).unwrap();
    }
    c
}

// Data-only layers lend data and show no names, whoever may write the marks.
#[test]
fn data_only_layers_lend_data_and_show_nothing() {
    needs_root!();
    for (prefix, by_option) in
        [("trusted.overlay.", false), ("trusted.overlay.", true), ("user.overlay.", true)]
    {
        let c = composed(prefix);
        let [top, first, second] = <[_; 3]>::try_from(c.sandbox.lowers()).unwrap();
        let mut spec = c.spec();
        if by_option {
            spec.lowers = vec![top.clone()];
            for data in [&first, &second] {
                spec = spec.option(&format!("datadir+={}", data.display()));
            }
        } else {
            spec.lowers = vec![
                format!("{}::{}::{}", top.display(), first.display(), second.display()).into(),
            ];
        }
        // The sealed layers are three, whatever the option says.
        c.sandbox.seal();
        let output = spec.command().stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let m = |name: &str| c.m(name);
        assert_eq!(names(m("")), ["etc", "none"]);
        assert_eq!(
            (text(m("etc/one")), text(m("etc/two"))),
            ("first-wins!".into(), "object-two".into())
        );
        assert_eq!(fs::metadata(m("etc/one")).unwrap().mode() & 0o7777, 0o640);
        gone(m("ab"));
        gone(m("hidden"));
        refused(fs::read(m("none")), Errno::IO);
        let shown = look(c.m("etc"));
        if prefix == "trusted.overlay." && env::no_kernel_overlay().is_none() {
            let mut kernel =
                c.sandbox.side(Kind::Kernel, "kernel").option("metacopy=on,redirect_dir=on");
            kernel.lowers = vec![
                format!("{}::{}::{}", top.display(), first.display(), second.display()).into(),
            ];
            env::mount_overlay(&kernel.option_text(), &kernel.merged).unwrap();
            assert_same("by the kernel", &shown, &look(kernel.merged.join("etc")));
            umount(&kernel.merged);
        }
        fs::write(m("etc/one"), "changed").unwrap();
        sh(m("etc"), "chmod 600 two; echo more >>two");
        assert_eq!(
            (text(m("etc/one")), text(m("etc/two"))),
            ("changed".into(), "object-twomore\n".into())
        );
        umount(&c.m(""));
        env::wait_until("the end of the server", BOUND, || {
            env::processes_with_argument(&c.m("")).is_empty()
        });
        c.sandbox.check_lowers();
        assert_eq!(getx(c.u("etc/two"), METACOPY), None);
    }
}

// Marks that anybody may write lead into data-only layers alone, also from a metacopy of the file that has them.
#[test]
fn a_change_of_attributes_trusts_no_more_marks() {
    needs_root!();
    let c = Case::new(3);
    put(c.l(2, "secret"), "object");
    put(c.l(1, "secret"), "lower!");
    stub(&c.l(0, "f"), 6, "user.overlay.metacopy", b"");
    setx(c.l(0, "f"), "user.overlay.redirect", "/secret");
    let spec = |option: &str| {
        let mut spec = c.spec().option(option);
        let data = spec.lowers.pop().unwrap();
        spec.option(&format!("datadir+={}", data.display()))
    };
    // All marks are trusted while it is made, and those of root alone afterwards.
    let mount = spec("metacopy=on").mount();
    fs::set_permissions(mount.path().join("f"), fs::Permissions::from_mode(0o600)).unwrap();
    drop(mount);
    assert!(getx(c.u("f"), METACOPY).is_some());
    let mount = spec("redirect_dir=off").mount();
    let f = mount.path().join("f");
    assert_eq!(text(&f), "object");
    append(&f, "+");
    assert_eq!(text(&f), "object+");
}

// A metacopy that cannot get its data, because there is no room, shows what it showed and takes no room.
#[test]
fn a_full_upper_leaves_a_metacopy_as_it_was() {
    needs_root!();
    let c = Case::new(1);
    put(c.l(0, "f"), pattern(16 << 20, 7));
    sh(c.l(0, ""), "touch -d 2001-01-01 f");
    let small = OtherFs::mount(&c, "small", "tmpfs", "size=4m");
    let [upper, work] = ["upper", "work"].map(|name| small.path.join(name));
    fs::create_dir(&upper).unwrap();
    fs::create_dir(&work).unwrap();
    let mut spec = c.spec().option("metacopy=on");
    spec.upper = Some((upper.clone(), work));
    let mount = spec.mount();
    let f = mount.path().join("f");
    fs::set_permissions(&f, fs::Permissions::from_mode(0o711)).unwrap();
    let facts = || {
        let found = fs::metadata(&f).unwrap();
        (found.mtime(), found.mode() & 0o7777, found.len(), found.blocks())
    };
    let before = facts();
    let file = OpenOptions::new().write(true).open(&f);
    refused(file.and_then(|file| file.write_all_at(b"new", 5)), Errno::NOSPC);
    assert_eq!(facts(), before);
    assert!(fs::read(&f).unwrap() == pattern(16 << 20, 7));
    assert!(getx(upper.join("f"), METACOPY).is_some());
    drop(mount);
}

// `verity` says what is done about digests. A digest that nobody vouches for is as bad as a wrong one.
#[test]
fn digests_are_checked_when_asked_for() {
    needs_root!();
    let mut c = Case::new(2);
    let digest = |byte: u8| [&[0, 36, 0, 1][..], &[byte; 32]].concat();
    stub(&c.l(0, "digest"), 5, METACOPY, &digest(7));
    stub(&c.l(0, "plain"), 5, METACOPY, b"");
    for name in ["digest", "plain"] {
        put(c.l(1, name), "below");
    }
    put(c.l(1, "whole"), "whole");
    for (options, digest, plain) in [
        ("rw", true, true),
        ("verity=off", true, true),
        ("verity=on", false, true),
        ("verity=require", false, false),
    ] {
        c.mount_with(options);
        for (name, is_read) in [("digest", digest), ("plain", plain)] {
            if is_read {
                assert_eq!(text(c.m(name)), "below", "{options}");
            } else {
                refused(fs::read(c.m(name)), Errno::IO);
            }
        }
        c.unmount();
    }
    // Without a digest there is no metacopy to be made where one is required.
    c.mount_with("verity=require");
    sh(c.m(""), "chmod 600 whole");
    assert_eq!((getx(c.u("whole"), METACOPY), text(c.m("whole"))), (None, "whole".into()));
    c.unmount();
    fs::remove_file(c.u("whole")).unwrap();
    c.mount_with("verity=on");
    sh(c.m(""), "chmod 600 whole");
    assert_eq!((getx(c.u("whole"), METACOPY), text(c.m("whole"))), (Some(vec![]), "whole".into()));
}

// The same with digests of the kernel, where it has fs-verity.
#[test]
fn digests_of_the_kernel_are_read_and_written() {
    needs_root!();
    const ENABLE: &str = "import fcntl, os, struct, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
arg = struct.pack('=IIIIQIIQ88x', 1, 1, 4096, 0, 0, 0, 0, 0)
fcntl.ioctl(fd, 0x40806685, arg)
";
    let mut c = Case::new(0);
    let image = c.sandbox.root().join("verity.img");
    File::create(&image).unwrap().set_len(64 << 20).unwrap();
    let made = Command::new("mkfs.ext4").args(["-q", "-O", "verity"]).arg(&image).status();
    if !made.is_ok_and(|made| made.success()) {
        skip!("mkfs.ext4 makes no filesystem with verity");
    }
    let layer = c.sandbox.root().join("verity");
    fs::create_dir(&layer).unwrap();
    let mounted =
        Command::new("mount").args(["-o", "loop"]).args([&image, &layer]).output().unwrap();
    if !mounted.status.success() {
        skip!("the kernel has no fs-verity");
    }
    fs::remove_dir(layer.join("lost+found")).unwrap();
    let measured = (|| {
        put(layer.join("f"), "vouched for");
        let enabled = Command::new(env::PYTHON).args(["-c", ENABLE]).arg(layer.join("f")).output();
        if !enabled.is_ok_and(|enabled| enabled.status.success()) {
            return false;
        }
        c.sandbox.push(layer.clone());
        c.mount_with("verity=require");
        sh(c.m(""), "chmod 600 f");
        let value = getx(c.u("f"), METACOPY).unwrap();
        assert_eq!((value.len(), &value[..4]), (36, &[0, 36, 0, 1][..]));
        assert_eq!(text(c.m("f")), "vouched for");
        c.unmount();
        setx(c.u("f"), METACOPY, [&value[..35], &[!value[35]]].concat());
        c.mount_with("verity=on");
        refused(fs::read(c.m("f")), Errno::IO);
        c.unmount();
        true
    })();
    umount(&layer);
    if !measured {
        skip!("the kernel has no fs-verity");
    }
}
