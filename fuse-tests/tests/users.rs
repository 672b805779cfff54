//! Mounts of ordinary users, and rights that a change takes away: one test for each fault that a review found.
//!
//! A test tells its failure in its first lines.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::PathBuf;
use std::process::{Command, Output};

use fuse_tests::case::{
    Case, getx, mode, put, said, same_as_the_kernel, setx, sh, text, user_command, work_residue,
};
use fuse_tests::env;
use fuse_tests::{needs_kernel_overlay, needs_root};

/// An ordinary user.
const USER: u32 = 65534;

/// Gives all directories of a case to an ordinary user and mounts them as that user, without a user namespace.
#[track_caller]
fn mount_as_user(c: &mut Case) {
    mount_as_user_with(c, None);
}

/// The same with an `-o` option more.
#[track_caller]
fn mount_as_user_with(c: &mut Case, option: Option<&str>) {
    c.sandbox.seal();
    let root = c.sandbox.root().to_path_buf();
    let program = root.join("lamina");
    if !program.exists() {
        // The original may lie where this user cannot look.
        env::copy_program(env::program(), &program);
        fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
        sh(&root, &format!("chown -hR {USER}:{USER} ."));
        c.sandbox.forget_seals();
        c.sandbox.seal();
    }
    let spec = option.map_or_else(|| c.spec(), |option| c.spec().option(option));
    let quoted = |text: &str| format!("'{text}'");
    let line = [
        quoted(program.to_str().unwrap()),
        "-o".into(),
        quoted(spec.option_text().to_str().unwrap()),
        quoted(spec.merged.to_str().unwrap()),
    ];
    c.mount_by_hand(user_command(USER, "/", &line.join(" ")));
}

/// Runs a Python script as the ordinary user, in the mount; it must succeed. Gives what it printed.
#[track_caller]
fn user_python(c: &Case, script: &str) -> String {
    let out = try_user_python(c, script);
    assert!(out.status.success(), "{script}\n{}", said(&out));
    String::from_utf8(out.stdout).unwrap()
}

fn try_user_python(c: &Case, script: &str) -> Output {
    let mount = c.m("");
    let id = USER.to_string();
    // Root itself cannot enter the mount of a user.
    Command::new("setpriv")
        .args(["--reuid", &id, "--regid", &id, "--clear-groups", env::PYTHON, "-c"])
        .arg(format!("import os, sys\nos.chdir('{}')\nos.umask(0o022)\n{script}", mount.display()))
        .current_dir("/")
        .output()
        .unwrap()
}

// A child that the server may not look into, or whose marks it refuses, ends the listing: all names
// behind it are missing, and `rm -rf` leaves them behind.
#[test]
fn a_child_that_cannot_be_read_hides_no_siblings() {
    needs_root!();
    let mut c = Case::new(2);
    for n in 0..2 {
        fs::create_dir(c.l(n, "closed")).unwrap();
        put(c.l(n, &format!("a{n}")), "");
        put(c.l(n, &format!("z{n}")), "");
    }
    for n in 0..2 {
        sh(c.l(n, ""), &format!("chown {USER} .; chmod 0 closed"));
    }
    mount_as_user(&mut c);
    let said = user_python(
        &c,
        "print(sorted(os.listdir('.')))
print(sorted(e.name for e in os.scandir('.')))
for i in range(2): os.remove('a%d' % i)
try: print(os.listdir('closed'))
except OSError as e: print(e.errno)
print(sorted(os.listdir('.')))",
    );
    let all = "['a0', 'a1', 'closed', 'z0', 'z1']";
    assert_eq!(said, format!("{all}\n{all}\n13\n['closed', 'z0', 'z1']\n"));
}

// Without privilege, a directory without write permission is dressed before it is moved to its
// place, which its mode then forbids.
#[test]
fn a_user_copies_up_directories_that_are_not_writable() {
    needs_root!();
    let mut c = Case::new(2);
    for dir in ["ro/sub", "merged", "deep/a/b"] {
        put(c.l(1, &format!("{dir}/f")), "old");
    }
    put(c.l(0, "merged/g"), "old");
    put(c.u(".keep"), "");
    sh(c.l(1, ""), "chmod 555 ro ro/sub merged deep deep/a deep/a/b; chmod 444 deep/a/b/f");
    sh(c.l(0, ""), "chmod 555 merged");
    mount_as_user(&mut c);
    let said = user_python(
        &c,
        "def show(*paths): print(' '.join('%o' % (os.lstat(p).st_mode & 0o7777) for p in paths))
os.utime('ro', (1, 1)); show('ro', 'ro/sub')
for d in ('deep', 'deep/a', 'deep/a/b'): os.chmod(d, 0o755)
os.chmod('deep/a/b/f', 0o644); open('deep/a/b/f', 'w').write('new'); os.chmod('deep/a/b', 0o555)
show('deep', 'deep/a', 'deep/a/b', 'deep/a/b/f')
# What is merged and empty is removed.
os.chmod('merged', 0o755); os.remove('merged/f'); os.remove('merged/g')
os.chmod('merged', 0o555); os.rmdir('merged')
os.chmod('ro', 0o755); os.chmod('ro/sub', 0o755); open('ro/sub/f', 'a').write('+new')
os.chmod('ro/sub', 0o555); os.chmod('ro', 0o555); show('ro', 'ro/sub')",
    );
    assert_eq!(said, "555 555\n755 755 555 644\n555 555\n");
    c.unmount();
    mount_as_user(&mut c);
    let said = user_python(
        &c,
        "print(sorted(os.listdir('.')), open('deep/a/b/f').read(), open('ro/sub/f').read())",
    );
    assert_eq!(said, "['.keep', 'deep', 'ro'] new old+new\n");
}

// Without privilege, the mode is set before the xattrs, which it then forbids.
#[test]
fn a_user_copies_up_read_only_files_with_xattrs() {
    needs_root!();
    let mut c = Case::new(1);
    for name in ["f", "g", "h"] {
        put(c.l(0, name), "content");
        setx(c.l(0, name), "user.foo", "bar");
        let mode = if name == "g" { 0 } else { 0o444 };
        fs::set_permissions(c.l(0, name), Permissions::from_mode(mode)).unwrap();
    }
    put(c.l(0, "d/f"), "content");
    setx(c.l(0, "d"), "user.foo", "bar");
    fs::set_permissions(c.l(0, "d"), Permissions::from_mode(0o555)).unwrap();
    mount_as_user(&mut c);
    user_python(
        &c,
        "os.chmod('f', 0o644); open('f', 'a').write('+')
os.utime('h', (1, 1)); os.utime('d', (1, 1))
for name in ('f', 'h', 'd'): assert os.getxattr(name, 'user.foo') == b'bar', name",
    );
    assert_eq!(text(c.u("f")), "content+");
    for (name, want) in [("f", 0o644), ("h", 0o444), ("d", 0o555)] {
        assert_eq!(mode(c.u(name)), want, "{name}");
    }
    for name in ["f", "h", "d"] {
        assert_eq!(getx(c.u(name), "user.foo"), Some(b"bar".to_vec()), "{name}");
    }
}

// Without privilege, a file that was opened in time cannot be read or written once its mode forbids
// it, or once it has lost its name too.
#[test]
fn a_user_keeps_what_was_opened_when_the_mode_changes() {
    needs_root!();
    let mut c = Case::new(1);
    for name in ["f", "g", "w"] {
        put(c.u(name), "upper");
        put(c.l(0, &format!("l{name}")), "lower");
    }
    mount_as_user(&mut c);
    let said = user_python(
        &c,
        "for p in ('', 'l'):
    fd = os.open(p + 'f', os.O_RDONLY); os.chmod(p + 'f', 0); print(os.read(fd, 10))
    fd = os.open(p + 'g', os.O_RDONLY); os.chmod(p + 'g', 0); os.unlink(p + 'g'); print(os.read(fd, 10))
    fd = os.open(p + 'w', os.O_RDWR); os.chmod(p + 'w', 0); os.write(fd, b'W'); print(os.pread(fd, 10, 0))",
    );
    let want = |place: &str, w: &str| format!("b'{place}'\nb'{place}'\nb'{w}'\n");
    assert_eq!(said, want("upper", "Wpper") + &want("lower", "Wower"));
}

// Of a file that its group may not execute the setgid bit is taken for mandatory locking, and stays
// when somebody outside the group writes.
#[test]
fn setgid_drops_when_somebody_outside_the_group_writes() {
    needs_root!();
    needs_kernel_overlay!();
    let c = Case::new(1);
    for place in ["l", "u"] {
        for bits in [0o2644u32, 0o2666, 0o2755, 0o4755, 0o6755, 0o6644, 0o2640, 0o1644] {
            for (owner, group) in [(0, 0), (1000, 1000), (0, 1000), (1000, 5)] {
                let path = c.l(0, &format!("{place}/{bits:o}.{owner}.{group}"));
                put(&path, "content");
                chown(&path, Some(owner), Some(group)).unwrap();
                fs::set_permissions(&path, Permissions::from_mode(bits | 0o002)).unwrap();
            }
        }
    }
    same_as_the_kernel(
        &c,
        "",
        "cd $M; touch u/*
         as='setpriv --reuid 1000 --regid 1000'
         for groups in --clear-groups '--groups 7,5'; do
         for act in 'true >' 'printf x >>' 'printf y 1<>' 'truncate -s 3'; do
             $as $groups sh -c \"for f in l/* u/*; do $act \\$f; done\" 2>&1 || :
             find l u -type f -printf \"$act %p %m %U %G\\n\" | sort
             for ids in 0.0 1000.1000 0.1000 1000.5; do chown ${ids%.*}:${ids#*.} */*.$ids; done
             for bits in 2644 2666 2755 4755 6755 6644 2640 1644; do chmod $bits */$bits.*; done; chmod o+w */*
         done
         done",
    );
}

// Linux before 6.0 left it to the filesystem; any user could make an executable of the group of a
// setgid directory that runs as that group.
#[test]
fn setgid_is_not_given_away_in_a_setgid_directory() {
    needs_root!();
    needs_kernel_overlay!();
    let c = Case::new(1);
    let merged = c.l(0, "merged");
    fs::create_dir(&merged).unwrap();
    chown(&merged, Some(0), Some(77)).unwrap();
    fs::set_permissions(&merged, Permissions::from_mode(0o2777)).unwrap();
    put(
        c.l(0, "make"),
        r#"
import os, stat, sys
os.umask(int(sys.argv[2], 8))
for mode in 0o2775, 0o2755, 0o2765, 0o6711, 0o2644:
    name = "%s.%s.%o." % (sys.argv[1], sys.argv[2], mode)
    os.close(os.open(name + "open", os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
    os.mknod(name + "mknod", stat.S_IFREG | mode)
    os.mknod(name + "pipe", stat.S_IFIFO | mode)
    os.mkdir(name + "dir", mode)
"#,
    );
    same_as_the_kernel(
        &c,
        "mkdir $U/plain; chgrp 77 $U/plain; chmod 2777 $U/plain",
        "as='setpriv --reuid 1000 --regid'
         for dir in merged plain; do
             cd $M/$dir
             for umask in 0 22; do
                 $as 1000 --clear-groups /usr/bin/python3 ../make other $umask 2>&1
                 $as 1000 --groups 5,77 /usr/bin/python3 ../make member $umask 2>&1
                 $as 77 --clear-groups /usr/bin/python3 ../make group $umask 2>&1
                 $as 1000 --clear-groups --inh-caps +fsetid --ambient-caps +fsetid \
                     /usr/bin/python3 ../make capable $umask 2>&1
                 setpriv --bounding-set -fsetid /usr/bin/python3 ../make root $umask 2>&1
             done
             stat -c '%n %a %u %g' *
         done",
    );
}

// Without privilege, a file that may be written but not read is opened for both: EACCES.
#[test]
fn a_user_writes_files_that_cannot_be_read() {
    needs_root!();
    let mut c = Case::new(1);
    put(c.u("upper"), "content");
    fs::set_permissions(c.u("upper"), Permissions::from_mode(0o200)).unwrap();
    mount_as_user(&mut c);
    let act = "fd = os.open('NAME', os.O_WRONLY); os.pwrite(fd, b'NEW', 0); os.ftruncate(fd, 5); os.fsync(fd)
fd2 = os.open('NAME', os.O_WRONLY | os.O_APPEND); os.write(fd2, b'+'); os.close(fd); os.close(fd2)
try: open('NAME'); print('read')
except PermissionError: print('closed')";
    let made = user_python(&c, "open('made', 'w').write('content'); os.chmod('made', 0o200)");
    assert_eq!(made, "");
    for name in ["upper", "made"] {
        assert_eq!(user_python(&c, &act.replace("NAME", name)), "closed\n");
        assert_eq!(text(c.u(name)), "NEWte+", "{name}");
    }
    c.unmount();
    mount_as_user(&mut c);
    assert_eq!(user_python(&c, &act.replace("NAME", "made")), "closed\n");
    assert_eq!(text(c.u("made")), "NEWte+");
}

// Without privilege, a file whose mode changes while it is open must stay so, data and all: as a metacopy it could
// not be opened again.
#[test]
fn a_user_goes_on_with_an_open_file_that_loses_its_mode() {
    needs_root!();
    let mut c = Case::new(1);
    for name in ["read", "written"] {
        put(c.l(0, name), "content");
    }
    mount_as_user_with(&mut c, Some("metacopy=on"));
    let said = user_python(
        &c,
        "fd = os.open('read', os.O_RDONLY); os.fchmod(fd, 0); print(os.pread(fd, 9, 0))
fd = os.open('written', os.O_RDWR); os.fchmod(fd, 0o400); os.pwrite(fd, b'C', 0); print(os.pread(fd, 9, 0))",
    );
    assert_eq!(said, "b'content'\nb'Content'\n");
}

// Without privilege, a directory that takes the place of a whiteout gets its mode before it is moved there,
// which that mode forbids.
#[test]
fn a_user_makes_read_only_directories_over_whiteouts() {
    needs_root!();
    let mut c = Case::new(1);
    put(c.l(0, "made/f"), "old");
    mount_as_user(&mut c);
    let said = user_python(
        &c,
        "os.remove('made/f'); os.rmdir('made')
for _ in range(2):
    os.mkdir('made', 0o555); print('%o' % os.stat('made').st_mode, os.listdir('made')); os.rmdir('made')",
    );
    assert_eq!(said, "40555 []\n40555 []\n");
}

// Without privilege, nothing in a directory that its owner may not write can be copied up: its mode
// and times cannot be changed, which needs no permission on the directory.
#[test]
fn a_user_changes_what_is_in_a_read_only_directory() {
    needs_root!();
    let mut c = Case::new(1);
    put(c.l(0, "ro/sub/f"), "old");
    put(c.l(0, "ro/f"), "old");
    sh(c.l(0, ""), "chmod 555 ro/sub ro");
    mount_as_user(&mut c);
    let said = user_python(
        &c,
        "os.chmod('ro/f', 0o600); open('ro/sub/f', 'a').write('+')
print(*('%o' % os.stat(p).st_mode for p in ('ro', 'ro/sub', 'ro/f')), open('ro/sub/f').read())",
    );
    assert_eq!(said, "40555 40555 100600 old+\n");
}

// Without privilege, a directory cannot be moved that has one beneath which its owner may not write to: that
// one is marked; nor while somebody reads a file that nobody may write.
#[test]
fn a_user_moves_a_directory_with_read_only_ones_in_it() {
    needs_root!();
    let mut c = Case::new(2);
    for (n, dir) in ["d/ro/deep", "d/merged", "d/made"].iter().enumerate() {
        put(c.l(n % 2, &format!("{dir}/f")), "content");
        put(c.l(1, &format!("{dir}/g")), "content");
        put(c.l(1, &format!("{dir}/gone")), "content");
    }
    // A part by hand, which says nothing of where it comes from.
    put(c.u("d/made/up"), "content");
    sh(c.l(0, "d"), "chmod 444 ro/deep/f");
    sh(c.l(1, "d"), "chmod 400 merged/g; chmod 440 made/g");
    for top in [c.l(0, "d"), c.l(1, "d"), c.u("d")] {
        sh(top, "for d in ro/deep ro merged made; do test ! -e $d || chmod 555 $d; done");
    }
    mount_as_user(&mut c);
    let show = "def show(top):
    for dir, dirs, files in sorted(os.walk(top)):
        for path in [dir] + sorted(dir + '/' + name for name in files):
            stat = os.stat(path)
            print(path[1:], '%o' % stat.st_mode, stat.st_size, stat.st_ino)
";
    let before = user_python(
        &c,
        &format!(
            "{show}os.chmod('d/ro', 0o755); os.chmod('d/ro', 0o555)
os.chmod('d/merged', 0o755); os.remove('d/merged/gone'); os.chmod('d/merged', 0o555)
show('d')"
        ),
    );
    assert!(
        before.contains("/ro/deep/f 100444 7 ") && !before.contains("/merged/gone"),
        "{before}"
    );
    let moved = user_python(
        &c,
        &format!(
            "{show}reading = [os.open('d/' + name, os.O_RDONLY) for name in ('ro/deep/f', 'merged/g')]
os.rename('d', 'e')
for fd in reading: assert os.read(fd, 9) == b'content'
show('e')"
        ),
    );
    assert_eq!(moved, before);
    c.unmount();
    mount_as_user(&mut c);
    assert_eq!(user_python(&c, &format!("{show}show('e')")), before);
    c.unmount();
    assert_eq!(work_residue(&c), [] as [PathBuf; 0]);
}

// The setuid bit that a write by somebody else takes away stays in the kernel's cache: the changed
// program is run with the rights of its owner.
#[test]
fn a_changed_setuid_program_is_not_run_as_its_owner() {
    needs_root!();
    needs_kernel_overlay!();
    let c = Case::new(1);
    for (place, bits) in [("l", 0o4757), ("u", 0o4757), ("lg", 0o2757), ("ug", 0o2757)] {
        put(c.l(0, place), fs::read("/usr/bin/id").unwrap());
        fs::set_permissions(c.l(0, place), Permissions::from_mode(bits)).unwrap();
    }
    same_as_the_kernel(
        &c,
        "",
        "cd $M; chmod u+s u; chmod g+s ug
         for act in ': >>' 'printf x >>' 'printf y 1<>' 'truncate -s -1'; do
             for f in l u lg ug; do
                 echo \"$act $f\"
                 setpriv --reuid 1000 --regid 1000 --clear-groups \\
                     sh -ec \"$act $f; ./$f | sed s/groups=.*//; stat -c %a $f\" 2>&1 || :
                 cat /usr/bin/id > $f
                 case $f in *g) chmod 2757 $f ;; *) chmod 4757 $f ;; esac
             done
         done",
    );
}

// A change of owner or group by somebody outside the group leaves the setgid bit of a file that the
// group may not execute.
#[test]
fn setgid_drops_when_somebody_outside_the_group_changes_owners() {
    needs_root!();
    needs_kernel_overlay!();
    let c = Case::new(1);
    for place in ["l", "u"] {
        for bits in [0o2644u32, 0o2666, 0o2755, 0o6755, 0o6644, 0o2640] {
            for group in [1000, 5] {
                let path = c.l(0, &format!("{place}/{bits:o}.{group}"));
                put(&path, "content");
                chown(&path, Some(1000), Some(group)).unwrap();
                fs::set_permissions(&path, Permissions::from_mode(bits)).unwrap();
            }
        }
    }
    same_as_the_kernel(
        &c,
        "",
        "cd $M; touch u/*
         for act in 'chown :1000' 'chown 1000' 'chown :5'; do
             setpriv --reuid 1000 --regid 1000 --clear-groups $act l/* u/* 2>&1 || :
             find l u -type f -printf \"$act %p %m %U %G\\n\" | sort
             for group in 1000 5; do chown 1000:$group */*.$group; done
             for bits in 2644 2666 2755 6755 6644 2640; do chmod $bits */$bits.*; done
         done",
    );
}

// An ACL set or removed by the owner of an object of another group left setgid, which such an owner may not keep.
#[test]
fn setgid_drops_when_an_owner_of_another_group_changes_an_acl() {
    needs_root!();
    needs_kernel_overlay!();
    let c = Case::new(1);
    for (place, group) in [("own", 1000), ("other", 5)] {
        put(c.l(0, place), "content");
        chown(c.l(0, place), Some(1000), Some(group)).unwrap();
        fs::set_permissions(c.l(0, place), Permissions::from_mode(0o2755)).unwrap();
        let dir = format!("{place}.d");
        fs::create_dir(c.l(0, &dir)).unwrap();
        chown(c.l(0, &dir), Some(1000), Some(group)).unwrap();
        fs::set_permissions(c.l(0, &dir), Permissions::from_mode(0o2775)).unwrap();
    }
    same_as_the_kernel(
        &c,
        "",
        "cd $M; for f in own other own.d other.d; do
             setpriv --reuid 1000 --regid 1000 --clear-groups setfacl -m u:5:r $f 2>&1 || :
         done
         find . -printf '%p %m %U %G\\n' | sort
         chmod g+s own other own.d other.d
         for f in own other own.d other.d; do
             setpriv --reuid 1000 --regid 1000 --clear-groups /usr/bin/python3 -c \
                 'import os, sys; os.removexattr(sys.argv[1], \"system.posix_acl_access\")' $f 2>&1 || :
         done
         find . -printf '%p %m %U %G\\n' | sort",
    );
}
