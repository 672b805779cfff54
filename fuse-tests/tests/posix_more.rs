//! What programs rely on beyond the everyday calls: privileges that a change takes away, privileges of groups, offsets of
//! 64 bits, shifted ranges, locks of all kinds, file watchers, project ids. Answers and trees are those of a plain directory.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use fuse_tests::case::{CAP_NET_RAW, Case, names, put, python, said};
use fuse_tests::env;
use fuse_tests::fixture::Kind;
use fuse_tests::same::{PLACES, Trace, fuse_zeroes_ranges, same, sandbox};
use fuse_tests::{both, needs_root, skip};
use rustix::fs::{FallocateFlags, XattrFlags};
use rustix::io::Errno;

/// An ordinary user: in none of the groups of the files.
const USER: u32 = 1000;

/// Notes the output of a Python script run by an ordinary user who has further groups, if any.
fn user_python(t: &mut Trace, groups: &str, dir: &Path, script: &str) {
    let (id, dir) = (USER.to_string(), dir.display());
    let groups = match groups {
        "" => "--clear-groups".to_owned(),
        _ => format!("--groups={groups}"),
    };
    let out = Command::new("setpriv")
        .args(["--reuid", &id, "--regid", &id, &groups, env::PYTHON, "-c"])
        .arg(format!("import os, sys\nos.chdir('{dir}')\n{script}"))
        .current_dir("/")
        .output()
        .unwrap();
    t.say("user", (String::from_utf8_lossy(&out.stdout), said(&out)));
}

/// What a change by an ordinary user, and by root, leaves of setuid, setgid and capabilities: each way of changing, each mode.
const CHANGES: &str = "
def append(name): open(name, 'ab').write(b'x')
def overwrite(name):
    with open(name, 'r+b') as f: f.write(b'y')
def empty_write(name):
    fd = os.open(name, os.O_WRONLY); os.write(fd, b''); os.close(fd)
def cut(name): os.truncate(name, 1)
def open_trunc(name): os.close(os.open(name, os.O_WRONLY | os.O_TRUNC))
def allocate(name):
    fd = os.open(name, os.O_RDWR); os.posix_fallocate(fd, 0, 9000); os.close(fd)
def copied(name):
    with open('g', 'rb') as a, open(name, 'r+b') as b: os.copy_file_range(a.fileno(), b.fileno(), 3)
def touched(name): os.utime(name)
def nothing(name): os.close(os.open(name, os.O_RDWR))
";

both!(what_a_change_takes_away);
fn what_a_change_takes_away() {
    let ways = [
        "append",
        "overwrite",
        "empty_write",
        "cut",
        "open_trunc",
        "allocate",
        "copied",
        "touched",
        "nothing",
    ];
    same(|dir, t| {
        for by_user in [true, false] {
            for way in ways {
                for mode in ["4777", "2777", "6777", "2767", "6767"] {
                    for capable in [false, true] {
                        let name = format!("{way}-{mode}-{by_user}-{capable}");
                        fs::write(dir.join(&name), "content").unwrap();
                        let set = format!("chown 7:2000 {name}; chmod {mode} {name}");
                        t.sh(dir, &set);
                        if capable {
                            // Not every namespace may.
                            let _ = rustix::fs::setxattr(
                                dir.join(&name),
                                "security.capability",
                                CAP_NET_RAW,
                                XattrFlags::empty(),
                            );
                        }
                    }
                }
                let script = format!(
                    "{CHANGES}
for name in sorted(os.listdir('.')):
    if not name.startswith('{way}-') or ('True' in name) != {user}: continue
    try: {way}(name)
    except OSError as e: print(name, e.errno)
    print(name, oct(os.stat(name).st_mode), 'security.capability' in os.listxattr(name))",
                    user = if by_user { "True" } else { "False" }
                );
                let script = script.replace("'True' in", "'-true-' in");
                if by_user {
                    user_python(t, "", dir, &script);
                } else {
                    t.python(dir, &format!("import os\n{script}"));
                }
            }
        }
    });
}

// A store through a shared mapping reaches the file by a write of the server, which takes capabilities away; a plain
// directory keeps them on a program that was changed.
both!(a_store_through_a_mapping_takes_capabilities_away);
fn a_store_through_a_mapping_takes_capabilities_away() {
    let sandbox = sandbox();
    let mount = sandbox.mount(Kind::Lamina);
    for place in PLACES {
        let path = mount.path().join(place).join("g");
        let set =
            |value| rustix::fs::setxattr(&path, "security.capability", value, XattrFlags::empty());
        if set(CAP_NET_RAW).is_err() {
            continue;
        }
        let script = "
import mmap, os, sys
with open(sys.argv[1], 'r+b') as f, mmap.mmap(f.fileno(), 0) as m: m[0] = 65; m.flush()
assert 'security.capability' not in os.listxattr(sys.argv[1])
assert open(sys.argv[1]).read() == 'A123456789'";
        python(script, &[path.to_str().unwrap()]);
    }
    mount.unmount();
}

both!(chown_takes_away);
fn chown_takes_away() {
    same(|dir, t| {
        for mode in ["4755", "2755", "2745", "6755", "1755"] {
            for (n, owner) in ["0:0", "1000", ":2000", "1000:1000"].into_iter().enumerate() {
                let name = format!("c{mode}-{n}");
                fs::write(dir.join(&name), "").unwrap();
                t.sh(
                    dir,
                    &format!(
                        "chmod {mode} {name} && chown {owner} {name}; stat -c %a:%u:%g {name}"
                    ),
                );
            }
        }
        t.sh(dir, "chmod 6755 d e && chown 1000 d && chown :2000 e; stat -c %a:%u:%g d e");
        fs::write(dir.join("own"), "").unwrap();
        t.sh(dir, "chown 1000:1000 own && chmod 6755 own");
        user_python(
            t,
            "2000",
            dir,
            "os.chown('own', -1, 2000); print(oct(os.stat('own').st_mode))",
        );
        user_python(t, "2000", dir, "os.chmod('own', 0o6755); print(oct(os.stat('own').st_mode))");
        user_python(
            t,
            "2000",
            dir,
            "os.chown('own', 1000, -1); print(oct(os.stat('own').st_mode))",
        );
    });
}

both!(chmod_by_somebody_outside_the_group);
fn chmod_by_somebody_outside_the_group() {
    same(|dir, t| {
        for (n, group) in [7, 1000, 2000].into_iter().enumerate() {
            let name = format!("g{n}");
            fs::write(dir.join(&name), "").unwrap();
            t.sh(
                dir,
                &format!("chown 1000:{group} {name}; mkdir {name}d; chown 1000:{group} {name}d"),
            );
            let script = format!(
                "for n in '{name}', '{name}d':\n os.chmod(n, 0o2755); print(n, oct(os.stat(n).st_mode))"
            );
            user_python(t, "2000", dir, &script);
        }
    });
}

both!(groups_of_a_caller_count);
fn groups_of_a_caller_count() {
    same(|dir, t| {
        t.sh(dir, "mkdir shared; chown 0:2000 shared; chmod 2775 shared; echo in > shared/f; chmod 660 shared/f");
        user_python(
            t,
            "2000",
            dir,
            "
open('shared/new', 'w').write('x'); os.mkdir('shared/sub')
print(open('shared/f').read())
for n in 'shared/new', 'shared/sub':
    s = os.stat(n); print(n, s.st_uid, s.st_gid, oct(s.st_mode))
try: os.mkdir('no')
except OSError as e: print(e.errno)",
        );
    });
}

both!(offsets_of_64_bits);
fn offsets_of_64_bits() {
    same(|dir, t| {
        // As much as ext4 holds with blocks of 4 KiB, and more than 32 bits of anything.
        for (name, at) in [("f", (1_u64 << 31) - 3), ("big", (1 << 32) - 3), ("z", 1 << 40)] {
            let file = OpenOptions::new().read(true).write(true).open(dir.join(name)).unwrap();
            t.put("write", file.write_at(b"across", at));
            let mut read = [0; 8];
            t.put("read", file.read_at(&mut read, at - 1));
            t.say("content", read);
            t.put("grow", file.set_len(at + (1 << 33)));
            t.stat(name, dir.join(name));
            t.put("cut", file.set_len(at + 2));
            t.put("read", file.read_at(&mut read, at));
            let (mut from, mut to) = (at, at + 100);
            t.put(
                "copy",
                rustix::fs::copy_file_range(&file, Some(&mut from), &file, Some(&mut to), 2),
            );
            t.stat(name, dir.join(name));
            // Whole trees are compared by content at the end.
            t.put("short again", file.set_len(1000));
        }
        let file = OpenOptions::new().write(true).open(dir.join("g")).unwrap();
        t.put("too far", file.set_len(1 << 62));
        t.put("too far", file.write_at(b"x", (1 << 62) + 1));
        t.put("the end of all", rustix::fs::ftruncate(&file, u64::MAX >> 1));
        t.put("the end of what ext4 holds", file.set_len((1 << 44) - 4096));
        t.stat("g", dir.join("g"));
        t.put("short again", file.set_len(10));
        t.stat("g", dir.join("g"));
    });
}

both!(ranges_are_zeroed);
fn ranges_are_zeroed() {
    if !fuse_zeroes_ranges() {
        skip!("FUSE of this kernel does not carry ZERO_RANGE");
    }
    same(|dir, t| {
        let zero = FallocateFlags::ZERO_RANGE;
        for name in ["big", "h"] {
            let file = OpenOptions::new().read(true).write(true).open(dir.join(name)).unwrap();
            for flags in [zero, zero | FallocateFlags::KEEP_SIZE] {
                for (at, len) in [(4096, 8192), (1, 10), (0, 4096), (1 << 30, 4096)] {
                    t.put(&format!("{name} {at}"), rustix::fs::fallocate(&file, flags, at, len));
                }
                t.stat(name, dir.join(name));
            }
            t.put("short again", file.set_len(100_000));
        }
        t.sh(dir, "cksum big h");
    });
}

// The FUSE module of the kernel carries neither; whoever asks is told, and nothing is changed.
both!(ranges_are_not_shifted);
fn ranges_are_not_shifted() {
    let sandbox = sandbox();
    let mount = sandbox.mount(Kind::Lamina);
    for place in PLACES {
        let path = mount.path().join(place).join("big");
        let before = fs::read(&path).unwrap();
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        for flags in [FallocateFlags::COLLAPSE_RANGE, FallocateFlags::INSERT_RANGE] {
            let shifted = rustix::fs::fallocate(&file, flags, 4096, 8192);
            assert_eq!(shifted, Err(Errno::OPNOTSUPP), "{place}");
        }
        assert!(before == fs::read(&path).unwrap(), "{place}");
    }
    mount.unmount();
}

both!(locks_of_open_files);
fn locks_of_open_files() {
    same(|dir, t| {
        t.python(
            dir,
            "
import fcntl, struct, os
F_OFD_SETLK = 37
def lock(f, kind, at, n, how=F_OFD_SETLK):
    try: fcntl.fcntl(f, how, struct.pack('hhqqi4x', kind, 0, at, n, 0)); return 'got'
    except OSError as e: return e.errno
for name in ('f', 'big', 'd/inner'):
    a, b = open(name, 'r+'), open(name, 'r+')
    print(name, lock(a, fcntl.F_WRLCK, 0, 10), lock(b, fcntl.F_WRLCK, 5, 1), lock(b, fcntl.F_WRLCK, 10, 1))
    print(lock(a, fcntl.F_UNLCK, 0, 6), lock(b, fcntl.F_WRLCK, 5, 1), lock(b, fcntl.F_RDLCK, 6, 1))
    a.write('changed'); a.flush()
    c = open(name)
    print(lock(c, fcntl.F_RDLCK, 5, 1), lock(c, fcntl.F_RDLCK, 0, 5))
    a.close(); print(lock(c, fcntl.F_RDLCK, 6, 1))
    print(lock(b, fcntl.F_WRLCK, 1 << 40, 0), lock(c, fcntl.F_RDLCK, 1 << 62, 1))
",
        );
    });
}

// A watch set before a copy-up sees what happens after it.
both!(watches_survive_a_copy_up);
fn watches_survive_a_copy_up() {
    same(|dir, t| {
        t.python(
            dir,
            "
import ctypes, os, struct
libc = ctypes.CDLL(None)
fd = libc.inotify_init1(os.O_NONBLOCK)
names = {}
for path in ('f', 'd', 'big', '.'):
    names[libc.inotify_add_watch(fd, path.encode(), 0x2 | 0x4 | 0x40 | 0x80 | 0x100 | 0x200)] = path
def seen():
    try: data = os.read(fd, 65536)
    except BlockingIOError: return []
    out = []
    while data:
        wd, mask, _, n = struct.unpack('iIII', data[:16])
        out.append((names[wd], hex(mask), data[16:16 + n].rstrip(b'\\0').decode())); data = data[16 + n:]
    return out
with open('f', 'a') as f: f.write('x')
print(seen())
with open('f', 'a') as f: f.write('y')
print(seen())
os.chmod('big', 0o600); print(seen())
open('d/new', 'w').close(); os.unlink('d/inner'); print(seen())
os.rename('f', 'd/f2'); print(seen())
with open('d/f2', 'a') as f: f.write('z')
print(seen())
",
        );
    });
}

// Project ids, where the filesystem keeps them: what `chattr -p` sets, and the limit of a project.
#[test]
fn project_ids_and_limits_are_the_files() {
    needs_root!();
    let make =
        "mkfs.ext4 -q -O quota,project -E quotatype=prjquota $1 && mount -o loop,prjquota $1 $PWD";
    let Some(fs) = LoopFs::make("64M", make) else {
        skip!("ext4 with project quotas cannot be made and mounted here");
    };
    let script = "
chattr -p 77 m/f
chattr +P -p 77 m/d
echo new > m/d/new; mkdir m/d/sub
lsattr -pd m/f m/d/new m/d/sub l/f | awk '{print $1}'
setquota -P 77 0 200 0 0 ..
if head -c 1000000 /dev/zero > m/d/full; then echo no limit; fi
[ $(stat -c %s m/d/full) -lt 250000 ] && echo stopped
rm m/d/full; head -c 100000 /dev/zero > m/d/fits && echo room again";
    let (said, text) = fs.run(script);
    assert_eq!(text, "77\n77\n77\n0\nstopped\nroom again\n", "{said}");
    assert!(said.contains("No space left on device") || said.contains("quota"), "{said}");
}

// A limit that the filesystem of the upper sets is told by the call that meets it: a write, and the copy-up that a write needs.
#[test]
fn quotas_are_told() {
    needs_root!();
    let make = "mkfs.btrfs -q $1 && mount -o loop $1 $PWD && btrfs quota enable $PWD";
    let Some(fs) = LoopFs::make("256M", make) else {
        skip!("btrfs with quotas cannot be made and mounted here");
    };
    let script = "
btrfs qgroup limit 2M u >&2
head -c 20000000 /dev/zero > m/new && echo no limit
[ $(stat -c %s m/new) -lt 2100000 ] && echo stopped
rm m/new; sync -f u
echo x >> m/big && echo no limit
[ $(stat -c %s m/big) = 8000000 ] && cmp m/big l/big && echo whole
[ -e u/u/big ] || echo not copied up";
    let (said, text) = fs.run(script);
    assert_eq!(text, "stopped\nwhole\nnot copied up\n", "{said}");
    assert_eq!(said.matches("Disk quota exceeded").count(), 2, "{said}");
}

/// A filesystem in a file, mounted until dropped.
struct LoopFs {
    path: PathBuf,
    _base: Arc<env::Base>,
}

impl LoopFs {
    /// Runs `make` in the directory to mount on, `$1` being an image of `size`. None if it fails.
    fn make(size: &str, make: &str) -> Option<LoopFs> {
        let base = env::Base::get();
        let path = base.unique("filesystem");
        let image = path.with_extension("img");
        fs::create_dir(&path).unwrap();
        let script = format!("truncate -s {size} \"$1\" && {make}");
        let made = Command::new("sh")
            .args(["-c", &script, "sh"])
            .arg(&image)
            .current_dir(&path)
            .output()
            .unwrap();
        // A mount keeps it as long as it is needed.
        fs::remove_file(&image).unwrap();
        let fs = LoopFs { path, _base: base };
        made.status.success().then_some(fs)
    }

    /// Mounts a layer with a small and a large file and a directory, and runs a script beside it: what
    /// it complained of, and what it said.
    fn run(&self, script: &str) -> (String, String) {
        // The lower is another filesystem: what is cloned counts for no quota.
        let script = format!(
            "set -e
            case $(stat -f -c %T .) in
            btrfs) mkdir c; cd c; btrfs subvolume create u >&2; mkdir u/u u/w; up=u/u work=u/w ;;
            *) mkdir c; cd c; mkdir u w; up=u work=w ;;
            esac
            mkdir l m
            mount -t tmpfs lower l
            mkdir l/d
            echo content > l/f
            head -c 8000000 /dev/urandom > l/big
            sync -f l
            \"$LAMINA\" -o lowerdir=l,upperdir=$up,workdir=$work m
            trap '\"$LAMINA\" unmount m; umount l' EXIT
            set +e
            {script}"
        );
        let out = Command::new("bash")
            .args(["-c", &script])
            .env("LAMINA", env::program())
            .current_dir(&self.path)
            .output()
            .unwrap();
        (said(&out), String::from_utf8_lossy(&out.stdout).into_owned())
    }
}

impl Drop for LoopFs {
    fn drop(&mut self) {
        // It is not mounted if it could not be.
        let _ = Command::new("umount").arg(&self.path).output();
        let _ = fs::remove_dir(&self.path);
    }
}

// Kernel overlay looks whether a directory is empty before it copies the one above it up.
both!(a_refused_rmdir_copies_nothing_up);
fn a_refused_rmdir_copies_nothing_up() {
    let mut c = Case::new(1);
    put(c.l(0, "d/full/f"), "");
    c.mount();
    let errno = |path: &str| fs::remove_dir(c.m(path)).unwrap_err().raw_os_error();
    assert_eq!(errno("d/full"), Some(Errno::NOTEMPTY.raw_os_error()));
    assert_eq!(errno("d/full/f"), Some(Errno::NOTDIR.raw_os_error()));
    assert!(!c.u("d").exists());
    fs::remove_file(c.m("d/full/f")).unwrap();
    fs::remove_dir(c.m("d/full")).unwrap();
    assert!(names(c.m("d")).is_empty());
}
