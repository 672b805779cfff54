//! What programs see of file data in each I/O mode (`-o io=`): one suite, run by every mode, also by a server that can
//! keep few descriptors. Nothing here knows which mode it runs in, but for what it says when it fails.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use fuse_tests::case::{
    BOUND, CAP_NET_RAW, Case, as_user, forget_all, gone, ino, mode, names, put, python,
    same_as_the_kernel_with, setx, sh, text, user_command,
};
use fuse_tests::env::wait_until;
use fuse_tests::fixture::{Sandbox, pattern};
use fuse_tests::trace::{count, no_counts};
use fuse_tests::{needs_kernel_overlay, needs_root, skip};
use rustix::io::Errno;

/// How the server runs: its options, and what a shell does before it starts.
const MODES: [(&str, &str); 7] = [
    ("io=noopen", ":"),
    ("io=open", ":"),
    ("io=passthrough", ":"),
    ("io=noopen,writeback", ":"),
    ("io=open,writeback", ":"),
    // So few that hardly any file keeps its data handle from one request to the next.
    ("io=noopen", "ulimit -n 64"),
    ("io=noopen", "ulimit -n 256"),
];

/// Runs `test` in each mode, on two lower layers that `prepare` fills.
fn each(prepare: impl Fn(&Case), test: impl Fn(&mut Case)) {
    for (options, setup) in MODES {
        println!("mode: {options}, after: {setup}");
        let mut c = Case::new(2);
        prepare(&c);
        mount(&mut c, options, setup);
        test(&mut c);
        c.unmount();
    }
}

fn mount(c: &mut Case, options: &str, setup: &str) {
    c.sandbox.seal();
    c.mount_by_hand(after(setup, &c.spec().option(options).command()));
}

/// `own`, run by a shell that does `setup` before.
fn after(setup: &str, own: &Command) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("{setup}; exec \"$@\""), "sh"]);
    command.arg(own.get_program()).args(own.get_args()).stdin(Stdio::null());
    command
}

/// Makes the kernel drop clean pages, so that what is read next is what the server has.
fn drop_pages() {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "1\n").unwrap();
}

/// Reads some other files, so that handles of earlier ones are closed where few are kept.
fn use_others(c: &Case) {
    for n in 0..40 {
        assert_eq!(text(c.m(&format!("others/{n}"))), "other", "{n}");
    }
    drop_pages();
}

fn others(c: &Case) {
    for n in 0..40 {
        put(c.l(1, &format!("others/{n}")), "other");
    }
}

fn os_error<T>(result: std::io::Result<T>) -> Option<i32> {
    result.err().and_then(|e| e.raw_os_error())
}

// Whoever creates a file may write to it through that descriptor, whatever the mode he gives it; and O_EXCL is exact.
#[test]
fn created_files_are_writable_whatever_their_mode() {
    needs_root!();
    each(others, |c| {
        let mut made = Vec::new();
        for bits in [0o644, 0o444, 0o200, 0o000] {
            let path = c.m(&format!("f{bits:o}"));
            let mut open = OpenOptions::new();
            open.read(true).write(true).create_new(true).mode(bits);
            let mut file = open.open(&path).unwrap();
            assert_eq!(os_error(open.open(&path)), Some(libc_errno(Errno::EXIST)));
            file.write_all(b"first").unwrap();
            assert_eq!(mode(&path), bits);
            made.push((path, file, bits));
        }
        use_others(c);
        for (path, file, bits) in &mut made {
            file.write_all(b" second").unwrap();
            file.set_permissions(fs::Permissions::from_mode(0o000)).unwrap();
            file.write_all(b" third").unwrap();
            let mut back = String::new();
            file.seek(SeekFrom::Start(0)).unwrap();
            file.read_to_string(&mut back).unwrap();
            assert_eq!(back, "first second third", "{bits:o}");
            file.set_permissions(fs::Permissions::from_mode(*bits)).unwrap();
            assert_eq!(mode(&path), *bits);
        }
        // By somebody who may not ignore modes.
        fs::create_dir(c.m("theirs")).unwrap();
        std::os::unix::fs::chown(c.m("theirs"), Some(1234), Some(1234)).unwrap();
        let script = "umask 0777; exec 3>theirs/new; echo one >&3; umask 0; exec 4>theirs/open; \
             chmod 0 theirs/open; echo two >&4; ls others >theirs/names; echo three >&3";
        let out = user_command(1234, c.m(""), script).output().unwrap();
        assert!(out.status.success(), "{out:?}");
        drop(made);
        drop_pages();
        assert_eq!(text(c.u("theirs/new")), "one\nthree\n");
        assert_eq!((mode(c.u("theirs/new")), mode(c.u("theirs/open"))), (0, 0));
        assert_eq!(text(c.m("f0")), "first second third");
        c.remount();
        assert_eq!(text(c.m("f444")), "first second third");
        assert_eq!(text(c.m("theirs/open")), "two\n");
    });
}

fn libc_errno(errno: Errno) -> i32 {
    errno.raw_os_error()
}

// Records of several writers that append do not overlap, also when the file is a lower one at first.
#[test]
fn appends_by_two_processes_are_all_there() {
    needs_root!();
    each(
        |c| put(c.l(1, "log"), "head\n"),
        |c| {
            let script = r#"
import os, sys
children = []
for who in "ab":
    pid = os.fork()
    if pid == 0:
        fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND)
        for n in range(1000):
            record = ("%s%04d\n" % (who, n)).encode()
            assert os.write(fd, record) == len(record)
        os._exit(0)
    children.append(pid)
for pid in children:
    assert os.waitpid(pid, 0)[1] == 0
"#;
            python(script, &[c.m("log").to_str().unwrap()]);
            for path in [c.m("log"), c.u("log")] {
                drop_pages();
                let content = text(path);
                let lines: Vec<&str> = content.lines().collect();
                assert_eq!((lines.len(), lines[0]), (2001, "head"));
                for who in ["a", "b"] {
                    let own: Vec<&&str> = lines.iter().filter(|l| l.starts_with(who)).collect();
                    assert_eq!(own.len(), 1000);
                    assert!(own.windows(2).all(|two| two[0] < two[1]), "{who} is out of order");
                }
            }
        },
    );
}

#[test]
fn truncation_leaves_zeros_behind() {
    needs_root!();
    let content = pattern(50_000, 7);
    let prepare = |c: &Case| {
        others(c);
        for name in ["down", "up", "reader", "o_trunc", "path"] {
            put(c.l(0, name), &content);
        }
    };
    each(prepare, |c| {
        put(c.m("own"), &content);
        for name in ["down", "up", "own"] {
            let file = OpenOptions::new().read(true).write(true).open(c.m(name)).unwrap();
            file.set_len(10_001).unwrap();
            if name != "down" {
                use_others(c);
                file.set_len(30_000).unwrap();
                file.write_all_at(b"end", 29_997).unwrap();
            }
            drop_pages();
            let mut expected = content[..10_001].to_vec();
            if name != "down" {
                expected.resize(29_997, 0);
                expected.extend_from_slice(b"end");
            }
            assert!(fs::read(c.m(name)).unwrap() == expected, "{name} in the mount");
            assert!(fs::read(c.u(name)).unwrap() == expected, "{name} in the upper");
        }
        // O_TRUNC, seen by who had it open before.
        let mut reader = File::open(c.m("o_trunc")).unwrap();
        let mut start = [0; 100];
        reader.read_exact(&mut start).unwrap();
        assert_eq!(start, content[..100]);
        let mut writer = File::create(c.m("o_trunc")).unwrap();
        assert_eq!(reader.metadata().unwrap().len(), 0);
        writer.write_all(b"short").unwrap();
        let mut all = String::new();
        reader.seek(SeekFrom::Start(0)).unwrap();
        reader.read_to_string(&mut all).unwrap();
        assert_eq!(all, "short");
        drop_pages();
        assert_eq!(text(c.u("o_trunc")), "short");
        // By path, and with nothing written after: the old content does not come back.
        File::create(c.m("path")).unwrap();
        drop_pages();
        assert_eq!((text(c.m("path")), text(c.u("path"))), (String::new(), String::new()));
    });
}

// Shared mappings of lower files: made before the copy-up, for reading and for writing.
#[test]
fn mappings_and_descriptors_follow_a_copy_up() {
    needs_root!();
    let content = pattern(20_000, 3);
    let prepare = |c: &Case| {
        others(c);
        for name in ["read", "write", "late", "private"] {
            put(c.l(1, name), &content);
        }
    };
    each(prepare, |c| {
        let script = r#"
import mmap, os, sys
root = sys.argv[1]
def lower(name):
    return os.path.join(root, name)
old = open(lower("read"), "rb").read()
# A reader that mapped before somebody else writes.
fd = os.open(lower("read"), os.O_RDONLY)
inode = os.fstat(fd).st_ino
m = mmap.mmap(fd, len(old), mmap.MAP_SHARED, mmap.PROT_READ)
assert m[:] == old
w = os.open(lower("read"), os.O_RDWR)
assert os.pwrite(w, b"NEW", 5000) == 3
assert os.pwrite(w, b"tail", len(old)) == 4
assert m[5000:5003] == b"NEW", m[5000:5003]
assert os.pread(fd, 100, len(old)) == b"tail"
assert os.fstat(fd).st_size == len(old) + 4 and os.fstat(fd).st_ino == inode
# A writer by mapping alone.
fd = os.open(lower("write"), os.O_RDWR)
other = os.open(lower("write"), os.O_RDONLY)
m = mmap.mmap(fd, len(old), mmap.MAP_SHARED)
m[4090:4102] = b"mapped write"
assert os.pread(other, 12, 4090) == b"mapped write"
m.flush()
assert os.pread(other, 12, 4090) == b"mapped write"
m[0:5] = b"again"
m.close()
os.close(fd)
# The descriptor is closed before the mapping is written.
fd = os.open(lower("late"), os.O_RDWR)
m = mmap.mmap(fd, len(old), mmap.MAP_SHARED)
os.close(fd)
for n in range(40):
    assert open(os.path.join(root, "others", str(n))).read() == "other"
m[-4:] = b"late"
m.flush()
m[:4] = b"more"
m.close()
# A private mapping changes nothing.
fd = os.open(lower("private"), os.O_RDONLY)
m = mmap.mmap(fd, len(old), mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
m[:4] = b"mine"
m.close()
"#;
        python(script, &[c.m("").to_str().unwrap()]);
        drop_pages();
        let mut expected = content.clone();
        expected[5000..5003].copy_from_slice(b"NEW");
        expected.extend_from_slice(b"tail");
        assert!(fs::read(c.u("read")).unwrap() == expected);
        let mut expected = content.clone();
        expected[4090..4102].copy_from_slice(b"mapped write");
        expected[..5].copy_from_slice(b"again");
        assert!(fs::read(c.u("write")).unwrap() == expected);
        let mut expected = content.clone();
        expected[19_996..].copy_from_slice(b"late");
        expected[..4].copy_from_slice(b"more");
        assert!(fs::read(c.m("late")).unwrap() == expected);
        assert!(fs::read(c.u("late")).unwrap() == expected);
        gone(c.u("private"));
    });
}

// Opening for writing, reading and fsync change nothing; the first write does.
#[test]
fn opening_for_writing_copies_nothing_up() {
    needs_root!();
    let prepare = |c: &Case| {
        put(c.l(1, "f"), "content");
        put(c.l(1, "times"), "content");
    };
    each(prepare, |c| {
        let file = OpenOptions::new().read(true).write(true).open(c.m("f")).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, 0).unwrap();
        file.sync_all().unwrap();
        file.sync_data().unwrap();
        gone(c.u("f"));
        file.write_all_at(b"C", 0).unwrap();
        file.sync_all().unwrap();
        assert_eq!(text(c.u("f")), "Content");
        assert_eq!(text(c.m("times")), "content");
        gone(c.u("times"));
    });
}

// Files that lose their names while open, lower and upper, by unlink and by rename.
#[test]
fn files_without_a_name_keep_all_their_operations() {
    needs_root!();
    let content = pattern(9000, 1);
    let prepare = |c: &Case| {
        others(c);
        for name in ["lower", "replaced", "mapped", "d/deep"] {
            put(c.l(1, name), &content);
        }
    };
    each(prepare, |c| {
        put(c.m("upper"), &content);
        put(c.m("own"), &content);
        for (name, by_rename) in [
            ("lower", false),
            ("upper", false),
            ("replaced", true),
            ("own", true),
            ("d/deep", false),
        ] {
            let path = c.m(name);
            let mut file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
            let reader = File::open(&path).unwrap();
            let number = ino(&path);
            if by_rename {
                put(c.m("new"), "new content");
                fs::rename(c.m("new"), &path).unwrap();
            } else {
                fs::remove_file(&path).unwrap();
            }
            if name == "d/deep" {
                fs::remove_dir(c.m("d")).unwrap();
            }
            use_others(c);
            let stat = file.metadata().unwrap();
            assert_eq!((stat.nlink(), stat.ino(), stat.len()), (0, number, 9000), "{name}");
            let mut back = Vec::new();
            file.read_to_end(&mut back).unwrap();
            assert!(back == content, "{name}");
            file.write_all_at(b"written", 100).unwrap();
            let mut seen = [0; 7];
            use_others(c);
            reader.read_exact_at(&mut seen, 100).unwrap();
            assert_eq!(&seen, b"written", "{name}");
            file.set_len(200).unwrap();
            assert_eq!(reader.metadata().unwrap().len(), 200);
            file.set_permissions(fs::Permissions::from_mode(0o600)).unwrap();
            use_others(c);
            let again = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
            let mut again = OpenOptions::new().append(true).read(true).open(again).unwrap();
            again.write_all(b"+").unwrap();
            assert_eq!(reader.metadata().unwrap().len(), 201, "{name}");
            file.sync_all().unwrap();
            if by_rename {
                drop_pages();
                assert_eq!(text(&path), "new content");
                assert_eq!(text(c.u(name)), "new content");
            } else {
                gone(&path);
            }
        }
        // Its pages are written back when the name has long gone.
        let script = r#"
import mmap, os, sys
path = sys.argv[1]
fd = os.open(path, os.O_RDWR)
m = mmap.mmap(fd, 9000, mmap.MAP_SHARED)
m[50:55] = b"dirty"
os.unlink(path)
m.flush()
m[60:65] = b"after"
os.fsync(fd)
open("/proc/sys/vm/drop_caches", "w").write("1\n")
assert os.pread(fd, 15, 50)[:5] == b"dirty" and os.pread(fd, 5, 60) == b"after"
assert os.fstat(fd).st_nlink == 0
"#;
        python(script, &[c.m("mapped").to_str().unwrap()]);
        gone(c.m("mapped"));
        c.remount();
        assert_eq!(names(c.m("")), ["others", "own", "replaced"]);
        assert_eq!(text(c.m("replaced")), "new content");
    });
}

#[test]
fn sqlite_keeps_its_data_in_each_journal_mode() {
    needs_root!();
    if !Path::new("/usr/bin/sqlite3").exists() {
        skip!("needs sqlite3");
    }
    let prepare = |c: &Case| {
        let script = "sqlite3 lower.db 'create table t(n integer, v text);
             with recursive c(n) as (select 1 union all select n+1 from c where n<500)
             insert into t select n, hex(randomblob(50)) from c;'";
        sh(c.l(1, ""), script);
    };
    each(prepare, |c| {
        for journal in ["wal", "delete", "truncate"] {
            let run = format!(
                "cp lower.db {journal}.db; sqlite3 {journal}.db 'pragma journal_mode={journal}' >/dev/null
                 for writer in 1 2 3; do
                     (for n in 1 2 3 4 5 6 7 8 9 10; do
                         sqlite3 -cmd '.timeout 60000' {journal}.db \"insert into t \
                             with recursive c(n) as (select 1 union all select n+1 from c where n<50) \
                             select n, hex(randomblob(100)) from c\"
                     done) &
                 done
                 wait
                 sqlite3 {journal}.db 'delete from t where n % 7 = 0; update t set v = upper(v); vacuum;'
                 sqlite3 {journal}.db 'pragma integrity_check; select count(*) from t'"
            );
            // 500 and 30 times 50 rows, without each seventh.
            assert_eq!(sh(c.m(""), &run), format!("ok\n{}\n", 500 - 71 + 30 * (50 - 7)));
        }
        // In place, on the lower file itself.
        let run = "sqlite3 lower.db 'pragma journal_mode=wal; insert into t select n, 1 from t'
             sqlite3 lower.db 'pragma integrity_check; select count(*) from t'";
        assert_eq!(sh(c.m(""), run), "wal\nok\n1000\n");
        c.remount();
        for name in ["wal.db", "delete.db", "truncate.db", "lower.db"] {
            let check = format!("sqlite3 {name} 'pragma integrity_check'");
            assert_eq!(sh(c.m(""), &check), "ok\n");
        }
    });
}

#[test]
fn running_programs_are_not_written() {
    needs_root!();
    let prepare = |c: &Case| {
        fs::copy("/bin/sleep", c.l(1, "lower")).unwrap();
    };
    // By a process of its own: whoever another thread of this one starts meanwhile would hold the programs open for
    // writing as well, and they could not be run.
    let script = r#"
import errno, os, shutil, subprocess, sys, time
os.chdir(sys.argv[1])
shutil.copy("/bin/sleep", "fresh")
def busy(act):
    try:
        act()
    except OSError as e:
        assert e.errno == errno.ETXTBSY, e
        return True
for name in "lower", "fresh":
    program = "./" + name
    running = subprocess.Popen([program, "600"])
    assert busy(lambda: os.open(name, os.O_WRONLY)), name
    assert busy(lambda: os.open(name, os.O_RDWR | os.O_TRUNC)), name
    running.kill()
    running.wait()
    # Whoever reads its arguments in /proc just now keeps what has run a moment longer.
    end = time.monotonic() + 10
    while busy(lambda: open(name, "ab").close()):
        assert time.monotonic() < end, name
    with open(name, "ab"):
        assert busy(lambda: subprocess.run([program, "0"])), name
    subprocess.run([program, "0"], check=True)
"#;
    each(prepare, |c| python(script, &[c.m("").to_str().unwrap()]));
}

/// A small filesystem in a file, mounted until dropped, with directories `upper` and `work`.
struct Image {
    path: PathBuf,
    device: String,
}

impl Image {
    /// One made by the command `mkfs`, which is given the file.
    fn new(c: &Case, megabytes: u64, mkfs: &str) -> Image {
        let path = c.sandbox.root().join("image.d");
        let file = c.sandbox.root().join("image");
        fs::create_dir(&path).unwrap();
        File::create(&file).unwrap().set_len(megabytes << 20).unwrap();
        let script = format!(
            "{mkfs} image >/dev/null; dev=$(losetup -f --show image); \
             mount $dev image.d || {{ losetup -d $dev; exit 1; }}; \
             mkdir image.d/upper image.d/work; echo $dev"
        );
        let device = sh(c.sandbox.root(), &script).trim().to_owned();
        Image { path, device }
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.path, rustix::mount::UnmountFlags::DETACH);
        let _ = Command::new("losetup").args(["-d", &self.device]).status();
    }
}

/// What tells that a filesystem is full or a quota spent: the write that meets it, or the sync after it where the
/// kernel collects writes.
fn told(options: &str, file: &File, write: std::io::Result<usize>) -> Option<i32> {
    if options.contains("writeback") {
        assert_eq!(os_error(write), None);
        return os_error(file.sync_all());
    }
    os_error(write)
}

/// Writes until it fails; gives how much went in, and the errno.
fn fill_up(file: &File, most: usize) -> (usize, Option<i32>) {
    let chunk = [7u8; 4096];
    let mut written = 0;
    while written < most {
        match (&*file).write(&chunk) {
            Ok(n) => written += n,
            Err(e) => return (written, e.raw_os_error()),
        }
    }
    (written, None)
}

// A full filesystem is reported by the write that meets it; what was accepted is there.
#[test]
fn a_full_upper_is_reported_by_the_write() {
    needs_root!();
    for (options, setup) in MODES {
        println!("mode: {options}, after: {setup}");
        let mut c = Case::new(1);
        put(c.l(0, "large"), pattern(16 << 20, 1));
        put(c.l(0, "small"), "small");
        let image = Image::new(&c, 12, "mkfs.ext4 -q -m 0");
        c.sandbox.seal();
        let mut spec = c.spec().option(options);
        spec.upper = Some((image.path.join("upper"), image.path.join("work")));
        c.mount_by_hand(after(setup, &spec.command()));
        let no_space = Some(libc_errno(Errno::NOSPC));
        // A copy-up that does not fit: at the first write, and the lower file is what it was.
        let large = OpenOptions::new().read(true).write(true).open(c.m("large")).unwrap();
        assert_eq!(told(options, &large, large.write_at(b"x", 0)), no_space);
        drop_pages();
        let mut byte = [0; 1];
        large.read_exact_at(&mut byte, 0).unwrap();
        assert_eq!(byte[0], pattern(1, 1)[0]);
        drop(large);
        let file = File::create(c.m("new")).unwrap();
        let (written, errno) = fill_up(&file, 20 << 20);
        if options.contains("writeback") {
            assert_eq!((written, errno), (20 << 20, None));
            assert_eq!(os_error(file.sync_all()), no_space);
            drop(file);
        } else {
            assert_eq!(errno, no_space);
            assert!(written > 4 << 20, "{written} bytes only");
            file.sync_all().unwrap();
            drop(file);
            drop_pages();
            assert_eq!(fs::metadata(c.m("new")).unwrap().len(), written as u64);
            assert!(fs::read(c.m("new")).unwrap().iter().all(|byte| *byte == 7));
        }
        // What little is left, by whom there is no doubt.
        fill_up(&File::create(image.path.join("rest")).unwrap(), 20 << 20);
        // By mapping: msync says it; where the kernel serves the file, the store does, as on the filesystem itself.
        let script = r#"
import errno, mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o644)
os.ftruncate(fd, 1 << 20)
m = mmap.mmap(fd, 1 << 20, mmap.MAP_SHARED)
for at in range(0, 1 << 20, 4096):
    m[at] = 1
try:
    m.flush()
    raise SystemExit("msync succeeded")
except OSError as e:
    assert e.errno == errno.ENOSPC, e
"#;
        let mut store = Command::new(fuse_tests::env::PYTHON);
        let status = store.args(["-c", script]).arg(c.m("mapped")).status().unwrap();
        let bus = options.contains("passthrough").then_some(7);
        assert_eq!(status.signal(), bus);
        assert!(bus.is_some() || status.success());
        // Room again, and all goes on.
        fs::remove_file(c.m("new")).unwrap();
        fs::remove_file(image.path.join("rest")).unwrap();
        put(c.m("small"), "larger now");
        assert_eq!(text(c.m("small")), "larger now");
        c.unmount();
        drop(image);
    }
}

#[test]
fn a_spent_quota_is_reported_by_the_write() {
    needs_root!();
    if !Path::new("/usr/bin/btrfs").exists() {
        skip!("needs btrfs-progs");
    }
    for (options, setup) in MODES {
        println!("mode: {options}, after: {setup}");
        let mut c = Case::new(1);
        put(c.l(0, "large"), pattern(6 << 20, 1));
        put(c.l(0, "small"), "small");
        let image = Image::new(&c, 120, "mkfs.btrfs -q");
        sh(&image.path, "btrfs quota enable . && btrfs qgroup limit 4M 0/5 .");
        c.sandbox.seal();
        let mut spec = c.spec().option(options);
        spec.upper = Some((image.path.join("upper"), image.path.join("work")));
        c.mount_by_hand(after(setup, &spec.command()));
        let spent = Some(libc_errno(Errno::DQUOT));
        let large = OpenOptions::new().read(true).write(true).open(c.m("large")).unwrap();
        assert_eq!(told(options, &large, large.write_at(b"x", 0)), spent);
        drop(large);
        let file = File::create(c.m("new")).unwrap();
        let (written, errno) = fill_up(&file, 8 << 20);
        assert_eq!(file.metadata().unwrap().len(), written as u64);
        if options.contains("writeback") {
            assert_eq!((written, errno), (8 << 20, None));
            assert_eq!(os_error(file.sync_all()), spent);
        } else {
            assert_eq!(errno, spent);
            assert!(written > 1 << 20, "{written} bytes only");
            let allocated =
                rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 6 << 20);
            assert_eq!(allocated, Err(Errno::DQUOT));
            assert_eq!(file.metadata().unwrap().len(), written as u64);
            file.sync_all().unwrap();
        }
        // Room again, and all goes on.
        drop(file);
        sh(&image.path, "btrfs qgroup limit none 0/5 .");
        put(c.m("small"), "larger now");
        assert_eq!(text(c.m("small")), "larger now");
        c.unmount();
        drop(image);
    }
}

// The kernel tells times of its own accord where it collects writes: after UNLINK, too, of a file that nobody changed.
#[test]
fn what_is_only_unlinked_is_not_copied() {
    needs_root!();
    const SIZE: usize = 4 << 20;
    each(
        |c| put(c.l(1, "large"), pattern(SIZE, 5)),
        |c| {
            let file = File::open(c.m("large")).unwrap();
            let before = c.server_io();
            fs::remove_file(c.m("large")).unwrap();
            rustix::fs::sync();
            drop(file);
            let moved = c.server_io() - before;
            assert!(moved < SIZE as u64 / 4, "{moved} bytes");
        },
    );
}

// Data that the server may not have seen yet is found by lseek, and its time is what the upper layer has in the end.
#[test]
fn fresh_data_is_found_and_keeps_its_time() {
    needs_root!();
    each(
        |c| put(c.l(1, "lower"), "content"),
        |c| {
            for name in ["lower", "new"] {
                let script = r#"
import os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o644)
os.ftruncate(fd, 1 << 20)
os.pwrite(fd, b"data", 700000)
at = 0
while True:
    at = os.lseek(fd, at, os.SEEK_DATA)
    hole = os.lseek(fd, at, os.SEEK_HOLE)
    if at <= 700000 < hole:
        break
    at = hole
"#;
                python(script, &[c.m(name).to_str().unwrap()]);
                let seen = fs::metadata(c.m(name)).unwrap().modified().unwrap();
                rustix::fs::sync();
                assert_eq!(fs::metadata(c.u(name)).unwrap().modified().unwrap(), seen, "{name}");
                c.remount();
                assert_eq!(fs::metadata(c.m(name)).unwrap().modified().unwrap(), seen, "{name}");
            }
        },
    );
}

// What the kernel has collected is written after it was asked for the time, and after it told one.
#[test]
fn collected_writes_keep_the_time_that_is_shown() {
    needs_root!();
    each(
        |c| (0..20).for_each(|n| put(c.l(1, &format!("lower{n}")), "content")),
        |c| {
            let names = (0..20).flat_map(|n| [format!("lower{n}"), format!("new{n}")]);
            let names: Vec<_> = names.collect();
            for name in &names {
                put(c.m(name), "written");
            }
            fuse_tests::fixture::set_mtime(&c.m("lower7"), 1_000_000_000, 5).unwrap();
            let times = |c: &Case| {
                let modified = |name: &String| fs::metadata(c.m(name)).unwrap().modified().unwrap();
                names.iter().map(modified).collect::<Vec<_>>()
            };
            let seen = times(c);
            c.remount();
            assert_eq!(times(c), seen);
        },
    );
}

// Whoever collects writes shows the old time, others the new one, and the next mount must show the same.
#[test]
fn a_file_cut_to_the_size_it_has_keeps_the_time_that_is_shown() {
    needs_root!();
    each(
        |c| put(c.l(1, "lower"), "content"),
        |c| {
            put(c.m("upper"), "content");
            rustix::fs::sync();
            for name in ["lower", "upper"] {
                fuse_tests::fixture::set_mtime(&c.m(name), 1_000_000_000, 0).unwrap();
                python(
                    "import os, sys; os.truncate(sys.argv[1], 7)",
                    &[c.m(name).to_str().unwrap()],
                );
                let seen = fs::metadata(c.m(name)).unwrap().modified().unwrap();
                c.remount();
                assert_eq!(fs::metadata(c.m(name)).unwrap().modified().unwrap(), seen, "{name}");
                assert_eq!(text(c.m(name)), "content");
            }
        },
    );
}

// More files than the server may have descriptors, each open and written in turn.
#[test]
fn more_open_files_than_descriptors() {
    needs_root!();
    let prepare = |c: &Case| {
        for n in 0..400 {
            put(c.l(n % 2, &format!("d{}/f{n}", n % 7)), format!("{n}"));
        }
    };
    for (options, setup) in MODES.into_iter().filter(|(options, _)| options.contains("noopen")) {
        println!("mode: {options}, after: {setup}");
        let mut c = Case::new(2);
        prepare(&c);
        mount(&mut c, options, setup);
        let path = |c: &Case, n: usize| c.m(&format!("d{}/f{n}", n % 7));
        let mut open: Vec<File> = (0..400)
            .map(|n| OpenOptions::new().read(true).append(true).open(path(&c, n)).unwrap())
            .collect();
        // These keep a descriptor each, having no name to be opened by.
        for n in (0..400).step_by(40) {
            fs::remove_file(path(&c, n)).unwrap();
        }
        for round in 0..2 {
            for file in &mut open {
                file.write_all(format!("+{round}").as_bytes()).unwrap();
            }
        }
        drop_pages();
        for (n, file) in open.iter_mut().enumerate() {
            let mut all = String::new();
            file.seek(SeekFrom::Start(0)).unwrap();
            file.read_to_string(&mut all).unwrap();
            assert_eq!(all, format!("{n}+0+1"));
        }
        drop(open);
        forget_all();
        assert_eq!(text(path(&c, 1)), "1+0+1");
        gone(path(&c, 40));
        c.unmount();
    }
}

// What the kernel serves by itself costs no request, and is never a lower file that may be copied up.
#[test]
fn passthrough_serves_the_upper_and_no_lower_beneath_it() {
    needs_root!();
    if let Some(reason) = no_counts() {
        skip!("{reason}");
    }
    let content = pattern(1 << 20, 9);
    let mut c = Case::new(1);
    put(c.l(0, "lower"), &content);
    put(c.u("upper"), &content);
    for options in ["io=passthrough", "io=passthrough,volatile"] {
        c.mount_with(options);
        let log = c.sandbox.root().join("strace");
        let requests = |c: &Case, name: &str| {
            drop_pages();
            let counts =
                count(c.server(), &log, || assert!(fs::read(c.m(name)).unwrap() == content));
            ["READ", "WRITE"].map(|kind| counts.requests.get(kind).copied().unwrap_or(0))
        };
        fs::metadata(c.m("upper")).unwrap();
        assert_eq!(requests(&c, "upper"), [0, 0], "{options}");
        assert!(requests(&c, "lower")[0] > 0, "{options}");
        // Written while a reader has it open and mapped: through the server, whoever opens it.
        let script = r#"
import mmap, os, sys
reader = os.open(sys.argv[1], os.O_RDONLY)
m = mmap.mmap(reader, 1 << 20, mmap.MAP_SHARED, mmap.PROT_READ)
first = m[0:4]
writer = os.open(sys.argv[1], os.O_RDWR)
assert os.pwrite(writer, b"anew", 0) == 4
assert m[0:4] == b"anew" and os.pread(reader, 4, 0) == b"anew"
late = os.open(sys.argv[1], os.O_RDWR)
assert os.pread(late, 4, 0) == b"anew"
assert os.pwrite(late, first, 0) == 4
assert m[0:4] == first
"#;
        python(script, &[c.m("lower").to_str().unwrap()]);
        assert!(fs::read(c.u("lower")).unwrap() == content);
        // Nobody has it open any more: now the kernel serves the copy.
        wait_until("the release of all opens", BOUND, || requests(&c, "lower") == [0, 0]);
        let mapped = r#"
import mmap, os, sys, time
path = sys.argv[1]
os.utime(path, (1, 1))
fd = os.open(path, os.O_RDWR)
m = mmap.mmap(fd, 1 << 20, mmap.MAP_SHARED)
first = m[0:1]
m[0:1] = b"!"
assert os.pread(os.open(path, os.O_RDONLY), 1, 0) == b"!"
m[0:1] = first
m.flush()
"#;
        python(mapped, &[c.m("upper").to_str().unwrap()]);
        wait_until("the time of a store", BOUND, || {
            fs::metadata(c.m("upper")).unwrap().mtime() > 1
        });
        if options.contains("volatile") {
            break;
        }
        // Without an upper, lower files are served too.
        c.unmount();
        c.mount = Some(c.spec().option(options).read_only().mount());
        assert_eq!(requests(&c, "lower"), [0, 0], "read-only");
        c.unmount();
        fs::remove_file(c.u("lower")).unwrap();
    }
}

// Beneath the mount the writer is the server, who may keep setuid and setgid.
#[test]
fn a_write_takes_setuid_away_in_passthrough() {
    needs_root!();
    let mut c = Case::new(1);
    for mode in [0o4777, 0o2777, 0o6777] {
        for layer in [c.u(&format!("upper{mode:o}")), c.l(0, &format!("lower{mode:o}"))] {
            put(&layer, b"content");
            fs::set_permissions(&layer, fs::Permissions::from_mode(mode)).unwrap();
        }
    }
    c.mount_with("io=passthrough,suid");
    for mode in [0o4777, 0o2777, 0o6777] {
        for layer in ["upper", "lower"] {
            let name = format!("{layer}{mode:o}");
            // Its first open, by a reader, decides for the rest.
            let reader = File::open(c.m(&name)).unwrap();
            let wrote = as_user(1234, c.m(""), &format!("printf x >> {name}"));
            assert!(wrote.status.success(), "{name}: {wrote:?}");
            drop(reader);
            for path in [c.m(&name), c.u(&name)] {
                let left = fs::metadata(&path).unwrap().mode() & 0o7777;
                assert_eq!(left, 0o777, "{}", path.display());
            }
        }
    }
    c.unmount();
}

/// Opens files of `$M`, gives them what a write takes away, has them written through the same open, and says what is left.
const WRITES_TO_OPEN_FILES: &str = r#"
exec /usr/bin/python3 - <<'END'
import os, subprocess, sys
CAPABILITY = bytes.fromhex('0100000200200000000000000000000000000000')
USER = ['setpriv', '--reuid', '1234', '--regid', '1234']
WRITERS = {
    'root': ['env'],
    'unable': ['setpriv', '--bounding-set', '-fsetid'],
    'user': [*USER, '--clear-groups'],
    'member': [*USER, '--groups', '2000'],
}
ACT = '''
import mmap, os, sys
def splice(fd):
    r, w = os.pipe()
    os.write(w, b'y')
    os.splice(r, fd, 1)
def mapped(fd):
    with mmap.mmap(fd, 1) as m:
        m[0] = 65
        m.flush()
source = os.memfd_create('source')
os.write(source, b'source')
WAYS = {
    'write': lambda fd: os.write(fd, b'y'),
    'nothing': lambda fd: os.write(fd, b''),
    'pwritev': lambda fd: os.pwritev(fd, [b'y'], 0),
    'splice': splice,
    'sendfile': lambda fd: os.sendfile(fd, source, 0, 3),
    'cut': lambda fd: os.ftruncate(fd, 1),
    'allocate': lambda fd: os.posix_fallocate(fd, 0, 9000),
    'mapped': mapped,
}
'''
exec(ACT)
os.chdir(os.environ['M'])
for who, command in WRITERS.items():
    fds = {}
    for way in WAYS:
        for mode in 0o777, 0o4777, 0o2777, 0o6767:
            for capable in False, True:
                name = f'{who}-{way}-{mode:o}-{capable}'
                fd = os.open(name, os.O_RDWR | os.O_CREAT, 0o777)
                # What the kernel notes of a file without privileges must not last.
                os.write(fd, b'content')
                os.fchown(fd, 7, 2000)
                os.fchmod(fd, mode)
                if capable:
                    os.setxattr(fd, 'security.capability', CAPABILITY)
                fds[name] = fd
    act = ACT + "for way, fd in zip(sys.argv[1::2], sys.argv[2::2]): WAYS[way](int(fd))"
    words = [word for name, fd in fds.items() for word in (name.split('-')[1], str(fd))]
    subprocess.run([*command, sys.executable, '-c', act, *words], pass_fds=fds.values(), check=True)
    for name, fd in fds.items():
        modes = [os.stat(path).st_mode for path in (name, os.environ['U'] + '/' + name)]
        print(name, *map(oct, modes), 'security.capability' in os.listxattr(name))
        os.close(fd)
END
"#;

// The kernel says only that nothing shall be changed, before it writes what is to lose setuid.
#[test]
fn what_a_file_gets_while_it_is_open_in_passthrough_goes_with_a_write() {
    needs_root!();
    needs_kernel_overlay!();
    let mut c = Case::new(1);
    let script = format!("export M U\n{WRITES_TO_OPEN_FILES}");
    same_as_the_kernel_with(&c, &["io=passthrough", "suid"], ":", &script);
    if let Some(reason) = no_counts() {
        skip!("{reason}");
    }
    c.mount_with("io=passthrough,suid");
    let script = format!("M={} U={}; {script}", c.m("").display(), c.u("").display());
    let log = c.sandbox.root().join("strace");
    let counts = count(c.server(), &log, || drop(sh("/", &script)));
    assert_eq!(counts.requests.get("WRITE"), None);
    assert!(counts.requests["SETATTR"] > 0);
}

// Nobody hears of a store through a mapping of what the kernel serves, so no file with capabilities is given to it.
#[test]
fn a_file_with_capabilities_is_not_served_in_passthrough() {
    needs_root!();
    if let Some(reason) = no_counts() {
        skip!("{reason}");
    }
    let mut c = Case::new(1);
    let capable = |path: PathBuf| setx(path, "security.capability", CAP_NET_RAW);
    for name in ["from-the-start", "closed", "open"] {
        put(c.u(name), "content");
    }
    capable(c.u("from-the-start"));
    c.mount_with("io=passthrough,suid");
    let log = c.sandbox.root().join("strace");
    let reads = |name: &str| {
        drop_pages();
        let counts = count(c.server(), &log, || assert_eq!(text(c.m(name)), "content"));
        counts.requests.get("READ").copied().unwrap_or(0)
    };
    let becomes = |name: &str, served: bool| {
        wait_until("the release of all opens", BOUND, || (reads(name) == 0) == served);
    };
    assert!(reads("from-the-start") > 0);
    assert_eq!(reads("closed"), 0);
    capable(c.m("closed"));
    becomes("closed", false);
    let open = File::open(c.m("open")).unwrap();
    capable(c.m("open"));
    assert_eq!(reads("open"), 0, "the first open decides");
    drop(open);
    becomes("open", false);
    sh(c.m(""), "setfattr -x security.capability open");
    becomes("open", true);
}

// An overlay of the kernel takes the mount for a layer.
#[test]
fn kernel_overlay_mounts_on_passthrough() {
    needs_root!();
    needs_kernel_overlay!();
    let mut c = Case::new(1);
    put(c.l(0, "f"), "lower");
    put(c.u("g"), "upper");
    c.mount_with("io=passthrough");
    assert_eq!(text(c.m("g")), "upper");
    let script = "mkdir a-upper a-work above; \
         mount -t overlay overlay -o lowerdir=merged,upperdir=a-upper,workdir=a-work above; \
         cat above/f above/g; echo changed >above/g; cat above/g merged/g; umount above";
    assert_eq!(sh(c.sandbox.root(), script), "lowerupperchanged\nupper");
}

// Of a write through an overlay above, the kernel says that of its mounter, who may keep setuid.
#[test]
fn writes_through_an_overlay_above_take_setuid_away() {
    needs_root!();
    needs_kernel_overlay!();
    let script = r#"
mkdir beneath above-upper above-work above
printf lower >beneath/lower
mount -t overlay overlay -o lowerdir=beneath,upperdir=above-upper,workdir=above-work above
trap 'umount above' EXIT
change() {
    who=$1 way=$2
    shift 2
    for name in new lower; do
        : >>above/$name
        chown 7:7 above/$name
        chmod 6777 above/$name
        setcap cap_net_raw+ep above/$name
        exec 3<>above/$name
        name=above/$name "$@"
        exec 3>&-
        echo "$who $way $name $(stat -c %a above/$name above-upper/$name | xargs) $(getcap above/$name)"
    done
}
for who in "--reuid 1234 --regid 1234 --clear-groups" "--bounding-set -fsetid" "--nnp"; do
    change "$who" write setpriv $who sh -c 'echo y >>$name'
    change "$who" held setpriv $who sh -c 'echo y >&3'
    change "$who" allocate setpriv $who sh -c 'fallocate -l 5000 $name'
    change "$who" cut setpriv $who sh -c 'truncate -s 2 $name'
    change "$who" replace setpriv $who sh -c 'echo y >$name'
    change "$who" touch setpriv $who sh -c 'touch $name'
    change "$who" nothing setpriv $who true
done
"#;
    let plain = Sandbox::new();
    let want = sh(plain.root(), script);
    assert!(want.contains(" 777 777") && want.contains("6777 6777"), "{want}");
    each(
        |_| (),
        |c| {
            assert_eq!(sh(c.m(""), script), want);
        },
    );
}

// The request of chown(2) to nobody is that of a write past the server.
#[test]
fn strangers_take_no_setuid_away() {
    needs_root!();
    let script = r#"
for name in lower new; do
    : >>$name
    chown 7:7 $name
    chmod 6755 $name
done
setpriv --reuid 1234 --regid 1234 --clear-groups /usr/bin/python3 -c '
import os
for name in ["lower", "untouched", "new", "d", "link"]:
    try:
        os.chown(name, -1, -1, follow_symlinks=False)
        print(name, "done")
    except OSError as error:
        print(name, os.strerror(error.errno))
'
# Asked for as a write of somebody who may keep them.
/usr/bin/python3 -c 'import os; os.chown("new", -1, -1)'
stat -c "%n %a" lower new
"#;
    each(
        |c| {
            put(c.l(0, "lower"), "content");
            put(c.l(0, "untouched"), "content");
            fs::set_permissions(c.l(0, "untouched"), fs::Permissions::from_mode(0o600)).unwrap();
            fs::create_dir(c.l(0, "d")).unwrap();
            symlink("d", c.l(0, "link")).unwrap();
        },
        |c| {
            let said = sh(c.m(""), script);
            for name in ["lower", "new"] {
                assert!(said.contains(&format!("\n{name} 6755")), "{said}");
            }
            for name in ["d", "link", "untouched"] {
                assert!(said.contains(&format!("{name} done\n")), "{said}");
            }
            assert!(!c.u("untouched").exists(), "{said}");
        },
    );
}

// What the server cannot keep it does not promise.
#[test]
fn without_the_right_to_open_again_opens_are_requests() {
    needs_root!();
    let mut c = Case::new(1);
    put(c.l(0, "f"), "content");
    let bare = |c: &Case, options: &str| {
        let own = c.spec().option(options).command();
        let mut command = Command::new("setpriv");
        command.args(["--bounding-set=-dac_override", "--inh-caps=-dac_override"]);
        command.arg(own.get_program()).args(own.get_args());
        command
    };
    for option in ["io=noopen", "writeback"] {
        let out = bare(&c, option).output().unwrap();
        assert_eq!(out.status.code(), Some(1));
        let said = String::from_utf8(out.stderr).unwrap();
        assert!(said.starts_with(&format!("lamina: {option}: needs CAP_DAC_OVERRIDE; ")), "{said}");
        assert!(!fuse_tests::case::is_mounted(&c.m("")));
    }
    c.sandbox.seal();
    c.mount_by_hand(bare(&c, "io=auto"));
    assert_eq!(text(c.m("f")), "content");
    c.unmount();
}
