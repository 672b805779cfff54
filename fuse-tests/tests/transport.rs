//! What the transport itself carries: requests that not every FUSE library knows, the threads behind them, and the counts
//! of them. Tests of what only our own transport serves are skipped where `FUSE_TESTS_OPTIONS` asks for another.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use fuse_tests::case::{BOUND, Case, as_user, gone, names, put, said, text, work_residue};
use fuse_tests::env::{is_other_program, wait_until};
use fuse_tests::fixture::Kind;
use fuse_tests::{both, needs_kernel_overlay, needs_root, skip};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat, open};
use rustix::io::Errno;
use rustix::process::{Signal, kill_process};

/// Ends the calling test unless the transport is ours.
macro_rules! needs_our_transport {
    () => {
        let options = std::env::var("FUSE_TESTS_OPTIONS").unwrap_or_default();
        if is_other_program() || options.contains("transport=fuser") {
            skip!("not served by this transport");
        }
    };
}

fn unnamed(dir: impl AsRef<Path>, mode: u32, more: OFlags) -> OwnedFd {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC | more;
    open(dir.as_ref(), flags, Mode::from_raw_mode(mode)).unwrap()
}

fn name_it(file: &OwnedFd, path: impl AsRef<Path>) -> Result<(), Errno> {
    let from = format!("/proc/self/fd/{}", file.as_raw_fd());
    linkat(CWD, from, CWD, path.as_ref(), AtFlags::SYMLINK_FOLLOW)
}

both!(an_unnamed_file_is_named_once_it_is_complete);
fn an_unnamed_file_is_named_once_it_is_complete() {
    needs_our_transport!();
    let mut c = Case::new(1);
    fs::create_dir_all(c.l(0, "dir/other")).unwrap();
    put(c.l(0, "dir/hidden"), "lower");
    c.mount();
    fs::remove_file(c.m("dir/hidden")).unwrap();
    let file = unnamed(c.m("dir"), 0o640, OFlags::empty());
    rustix::io::write(&file, b"all of it").unwrap();
    let stat = rustix::fs::fstat(&file).unwrap();
    assert_eq!((stat.st_nlink, stat.st_mode & 0o7777, stat.st_size), (0, 0o640, 9));
    assert_eq!(names(c.m("dir")), ["other"]);
    assert!(names(c.u("dir")).iter().all(|name| name == "hidden"), "nothing but the whiteout");

    // Over a whiteout, in another directory, and under a name that exists.
    name_it(&file, c.m("dir/hidden")).unwrap();
    name_it(&file, c.m("dir/other/second")).unwrap();
    assert_eq!(name_it(&file, c.m("dir/hidden")), Err(Errno::EXIST));
    let stat = rustix::fs::fstat(&file).unwrap();
    for path in ["dir/hidden", "dir/other/second"] {
        assert_eq!(text(c.m(path)), "all of it");
        let named = fs::metadata(c.m(path)).unwrap();
        assert_eq!((named.ino(), named.nlink()), (stat.st_ino, 2));
    }
    // What is written now is seen through every name.
    rustix::io::pwrite(&file, b"ALL", 0).unwrap();
    assert_eq!(text(c.m("dir/other/second")), "ALL of it");
    // Named once it has lost all names again, it stays without.
    fs::remove_file(c.m("dir/hidden")).unwrap();
    fs::remove_file(c.m("dir/other/second")).unwrap();
    assert_eq!(name_it(&file, c.m("dir/again")), Err(Errno::NOENT));
    assert_eq!(rustix::fs::fstat(&file).unwrap().st_nlink, 0);
    drop(file);

    let kept = unnamed(c.m("dir"), 0o600, OFlags::empty());
    name_it(&kept, c.m("dir/kept")).unwrap();
    drop(kept);
    c.remount();
    assert_eq!(names(c.m("dir")), ["kept", "other"]);
    gone(c.m("dir/hidden"));
    assert_eq!(work_residue(&c), Vec::<std::path::PathBuf>::new());
}

#[test]
fn an_unnamed_file_opened_exclusively_gets_no_name() {
    needs_root!();
    needs_our_transport!();
    let mut c = Case::new(1);
    c.mount();
    let file = unnamed(c.m(""), 0o600, OFlags::EXCL);
    assert_eq!(name_it(&file, c.m("name")), Err(Errno::NOENT));
    gone(c.m("name"));
}

/// Owner, group, mode and ACL are those that kernel overlayfs gives, beside it on the same layers.
#[test]
fn an_unnamed_file_owes_to_maker_and_directory_what_the_kernel_says() {
    needs_root!();
    needs_kernel_overlay!();
    needs_our_transport!();
    let mut c = Case::new(1);
    for (dir, mode) in [("plain", 0o777), ("setgid", 0o2777), ("acl", 0o777)] {
        fs::create_dir(c.l(0, dir)).unwrap();
        fs::set_permissions(c.l(0, dir), fs::Permissions::from_mode(mode)).unwrap();
        std::os::unix::fs::chown(c.l(0, dir), None, Some(4321)).unwrap();
    }
    // u::rwx, u:77:rw-, g::r-x, m::rwx, o::---
    let acl: Vec<u8> = [(1_u16, 7_u16, u32::MAX), (2, 6, 77), (4, 5, u32::MAX), (16, 7, u32::MAX)]
        .into_iter()
        .chain([(32, 0, u32::MAX)])
        .flat_map(|(tag, perm, id)| {
            [&tag.to_le_bytes()[..], &perm.to_le_bytes(), &id.to_le_bytes()].concat()
        })
        .collect();
    let acl = [&2_u32.to_le_bytes()[..], &acl].concat();
    fuse_tests::case::setx(c.l(0, "acl"), "system.posix_acl_default", acl);
    let kernel = c.sandbox.side(Kind::Kernel, "kernel").mount();
    c.mount();
    let script = "import os, sys\n\
        for d in ['plain', 'setgid', 'acl']:\n\
        \x20os.umask(0o027)\n\
        \x20fd = os.open(d, os.O_TMPFILE | os.O_RDWR, 0o2666)\n\
        \x20s = os.fstat(fd)\n\
        \x20print(d, oct(s.st_mode), s.st_uid, s.st_gid, s.st_nlink, sorted(os.listxattr(fd)))\n\
        \x20os.link(str(fd), d + '/n', src_dir_fd=os.open('/proc/self/fd', 0), follow_symlinks=True)\n\
        \x20s = os.stat(d + '/n')\n\
        \x20print(oct(s.st_mode), s.st_uid, s.st_gid, s.st_nlink)\n";
    let script = format!("/usr/bin/python3 -c \"{script}\"");
    let run = |root: &Path| {
        let out = as_user(1234, root, &script);
        assert!(out.status.success(), "{}", said(&out));
        String::from_utf8(out.stdout).unwrap()
    };
    assert_eq!(run(&c.m("")), run(kernel.path()));
    kernel.unmount();
}

#[test]
fn times_of_birth_are_those_of_the_layers() {
    needs_root!();
    needs_our_transport!();
    let mut c = Case::new(1);
    put(c.l(0, "lower"), "x");
    let born = |path: std::path::PathBuf| fs::symlink_metadata(path).unwrap().created().ok();
    if born(c.l(0, "lower")).is_none() {
        skip!("this filesystem has no times of birth");
    }
    c.mount();
    assert_eq!(born(c.m("lower")), born(c.l(0, "lower")));
    put(c.m("upper"), "x");
    assert_eq!(born(c.m("upper")), born(c.u("upper")));
}

/// SIGUSR1: one line in the log, with the number of requests of each kind; the server goes on.
#[test]
fn the_server_tells_what_it_was_asked() {
    needs_root!();
    needs_our_transport!();
    let mut c = Case::new(1);
    put(c.l(0, "file"), "x");
    let log = c.sandbox.root().join("log");
    c.mount_with(&format!("log_level=info,log_file={}", log.display()));
    let ask = |lines: usize| -> String {
        kill_process(c.server(), Signal::USR1).unwrap();
        let mut found = String::new();
        wait_until("the counts", BOUND, || {
            let said = fs::read_to_string(&log).unwrap_or_default();
            let counts: Vec<&str> =
                said.lines().filter(|line| line.contains("requests: ")).collect();
            found = counts.last().map(|line| (*line).to_owned()).unwrap_or_default();
            counts.len() == lines && said.ends_with('\n')
        });
        found
    };
    let count = |line: &str, name: &str| -> u64 {
        let is_it = |word: &&str| word.starts_with(&format!("{name}="));
        line.split(' ').find(is_it).map_or(0, |word| word[name.len() + 1..].parse().unwrap())
    };
    let before = ask(1);
    for n in 0..5 {
        gone(c.m(&format!("absent-{n}")));
    }
    let after = ask(2);
    assert_eq!(count(&after, "LOOKUP"), count(&before, "LOOKUP") + 5, "{before}\n{after}");
    assert_eq!(text(c.m("file")), "x");
}

/// All are accepted, by a kernel without io_uring too.
#[test]
fn every_transport_serves() {
    needs_root!();
    for name in ["dev", "uring", "fuser"] {
        if is_other_program() {
            skip!("another program has no transports to choose from");
        }
        let mut c = Case::new(1);
        put(c.l(0, "file"), "x");
        c.mount_with(&format!("transport={name}"));
        fs::rename(c.m("file"), c.m("moved")).unwrap();
        assert_eq!(text(c.m("moved")), "x");
        c.remount();
        assert_eq!(names(c.m("")), ["moved"]);
    }
}

/// Why the kernel carries no requests by io_uring, if so.
fn no_rings() -> Option<String> {
    let read = |path| fs::read_to_string(path).map(|text| text.trim().to_owned());
    let offered = read("/sys/module/fuse/parameters/enable_uring");
    let refused = read("/proc/sys/kernel/io_uring_disabled");
    match (offered.as_deref(), refused.as_deref()) {
        (Ok("Y"), Ok("0")) => None,
        found => Some(format!("the kernel offers no FUSE over io_uring: {found:?}")),
    }
}

/// Names of the server's threads that serve a queue, and the CPUs of each.
fn ring_threads(c: &Case) -> Vec<(String, String)> {
    let tasks = fs::read_dir(format!("/proc/{}/task", c.server())).unwrap();
    let status = tasks.map(|task| fs::read_to_string(task.unwrap().path().join("status")).unwrap());
    let field = |status: &str, name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        line.trim().to_owned()
    };
    let all = status.map(|s| (field(&s, "Name:"), field(&s, "Cpus_allowed_list:")));
    all.filter(|(name, _)| name.contains('/')).collect()
}

/// Each CPU has threads of its own that serve it; what is larger than one request and what has a name in it arrive whole;
/// the mount ends in the ordinary way.
#[test]
fn requests_come_by_rings_where_the_kernel_has_them() {
    needs_root!();
    needs_our_transport!();
    if let Some(reason) = no_rings() {
        skip!("{reason}");
    }
    let content = fuse_tests::fixture::pattern(5 << 20, 3);
    let mut c = Case::new(1);
    put(c.l(0, "lower"), &content);
    let log = c.sandbox.root().join("log");
    c.mount_with(&format!("transport=uring,log_level=info,log_file={}", log.display()));
    let threads = ring_threads(&c);
    assert!(!threads.is_empty(), "{}", text(&log));
    for (name, cpus) in &threads {
        let queue = name.rsplit(['-', '/']).nth(1).unwrap();
        assert_eq!(cpus, queue, "{name}");
    }
    assert!(!text(&log).contains("transport=uring:"), "{}", text(&log));

    assert!(fs::read(c.m("lower")).unwrap() == content);
    put(c.m("upper"), &content);
    for name in [c.m("lower"), c.m(&"n".repeat(255))] {
        put(&name, "short");
        let value = [7; 3_000];
        fuse_tests::case::setx(&name, "trusted.large", value);
        assert!(fuse_tests::case::getx(&name, "trusted.large").unwrap() == value);
        assert_eq!(fuse_tests::case::getx(&name, "trusted.none"), None);
    }
    for n in 0..300 {
        fs::create_dir(c.m(&format!("dir-{n}"))).unwrap();
    }
    assert_eq!(names(c.m("")).len(), 303);
    gone(c.m("absent"));
    c.remount();
    assert_eq!(names(c.m("")).len(), 303);
    assert!(fs::read(c.m("upper")).unwrap() == content);
}

/// Nobody hangs on a server that was killed: not who waits for an answer of it, nor who comes later.
#[test]
fn a_killed_server_leaves_nobody_waiting_for_rings() {
    needs_root!();
    needs_our_transport!();
    if let Some(reason) = no_rings() {
        skip!("{reason}");
    }
    let mut c = Case::new(1);
    put(c.l(0, "file"), "x");
    c.mount_unsealed_with("transport=uring");
    assert!(!ring_threads(&c).is_empty());
    std::thread::scope(|scope| {
        let merged = c.m("");
        let asks = scope.spawn(move || {
            (0_u64..)
                .find_map(|n| match fs::metadata(merged.join(format!("absent-{n}"))) {
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
                    other => Some(other.unwrap_err().raw_os_error()),
                })
                .unwrap()
        });
        kill_process(c.server(), Signal::KILL).unwrap();
        let told = asks.join().unwrap().map(Errno::from_raw_os_error);
        let gone = [Errno::NOTCONN, Errno::CONNABORTED, Errno::CANCELED];
        assert!(told.is_some_and(|errno| gone.contains(&errno)), "{told:?}");
    });
    c.unmount();
}

/// Where the system has no rings, or not for us, the device carries all, and the log tells why.
#[test]
fn without_rings_the_device_carries_requests() {
    needs_root!();
    needs_our_transport!();
    if let Some(reason) = fuse_tests::trace::no_strace() {
        skip!("{reason}");
    }
    let mut c = Case::new(1);
    put(c.l(0, "file"), "x");
    let log = c.sandbox.root().join("log");
    let options = format!("transport=uring,log_level=info,log_file={}", log.display());
    let own = c.spec().option(&options).command();
    let mut command = std::process::Command::new("strace");
    command.args(["-D", "-f", "-qq", "-o", "/dev/null"]);
    command.args(["-e", "inject=io_uring_setup:error=EPERM"]);
    command.arg(own.get_program()).args(own.get_args()).stdin(std::process::Stdio::null());
    c.mount_by_hand(command);
    assert_eq!(text(c.m("file")), "x");
    let said = text(&log);
    assert!(said.contains("transport=uring: io_uring_setup: Operation not permitted"), "{said}");
    c.unmount();
    if no_rings().is_none() {
        return;
    }
    fs::remove_file(&log).unwrap();
    c.mount_with(&options);
    assert_eq!(text(c.m("file")), "x");
    assert!(ring_threads(&c).is_empty());
    assert!(text(&log).contains("transport=uring: "), "{}", text(&log));
}

/// Bytes of a file that takes a while to copy: more than a few steps of a copy.
const LARGE: usize = 128 << 20;

/// A mount with a large lower file whose copy is slow, and what makes it slow: it traces the copying and delays each step.
struct SlowCopy {
    case: Case,
    strace: std::process::Child,
    log: std::path::PathBuf,
}

impl SlowCopy {
    fn new() -> SlowCopy {
        let mut case = Case::new(1);
        put(case.l(0, "dir/large"), fuse_tests::fixture::pattern(LARGE, 7));
        case.mount_unsealed();
        let log = case.sandbox.root().join("strace");
        let strace = std::process::Command::new("strace")
            .args(["-f", "-qq", "-e", "trace=copy_file_range,pwrite64"])
            .args(["-e", "inject=copy_file_range,pwrite64:delay_enter=300000", "-p"])
            .args([&case.server().to_string(), "-o"])
            .arg(&log)
            .spawn()
            .unwrap();
        let slow = SlowCopy { case, strace, log };
        let server = slow.case.server();
        wait_until("strace to see all threads", BOUND, || {
            let tasks = fs::read_dir(format!("/proc/{server}/task")).unwrap();
            tasks
                .filter_map(|task| fs::read_to_string(task.unwrap().path().join("status")).ok())
                .all(|status| status.contains("TracerPid:") && !status.contains("TracerPid:\t0\n"))
        });
        slow
    }

    /// How many steps of copies were done, or begun.
    fn steps(&self) -> usize {
        fs::read_to_string(&self.log).unwrap_or_default().lines().count()
    }

    fn at_speed(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.strace);
        kill_process(pid, Signal::INT).unwrap();
        self.strace.wait().unwrap();
    }
}

/// Whoever is killed while a file is copied up for them ends soon; nothing is left of the copy, and the next one is made.
#[test]
fn a_killed_writer_does_not_wait_for_a_copy() {
    needs_root!();
    needs_our_transport!();
    if let Some(reason) = fuse_tests::trace::no_strace() {
        skip!("{reason}");
    }
    let mut slow = SlowCopy::new();
    let large = slow.case.m("dir/large");
    let word = slow.case.sandbox.root().join("word");
    put(&word, "word");
    for signal in [Signal::KILL, Signal::INT] {
        let before = slow.steps();
        // Not a shell, which handles SIGINT.
        let mut writer = std::process::Command::new("tee")
            .arg("-a")
            .arg(&large)
            .stdin(fs::File::open(&word).unwrap())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        wait_until("the copy to begin", BOUND, || slow.steps() > before);
        kill_process(rustix::process::Pid::from_child(&writer), signal).unwrap();
        let status = writer.wait().unwrap();
        assert!(!status.success(), "{status}");
        let steps = slow.steps() - before;
        let log = fs::read_to_string(&slow.log).unwrap();
        assert!(
            steps < LARGE >> 24,
            "{signal:?}: {steps} steps of a copy that nobody waited for: {log}"
        );
        gone(slow.case.u("dir/large"));
    }
    // So does whoever moves a directory that is completed first; nothing was moved.
    let before = slow.steps();
    let mut mover = std::process::Command::new("mv")
        .args([slow.case.m("dir"), slow.case.m("moved")])
        .spawn()
        .unwrap();
    wait_until("the copy to begin", BOUND, || slow.steps() > before);
    kill_process(rustix::process::Pid::from_child(&mover), Signal::KILL).unwrap();
    mover.wait().unwrap();
    let steps = slow.steps() - before;
    assert!(steps < LARGE >> 24, "{steps} steps for a rename that nobody waited for");
    assert_eq!(names(slow.case.m("")), ["dir"]);
    // A signal that ends nobody does not keep a file from being copied.
    let script = "import os, signal, sys\n\
        heard = []\n\
        signal.signal(signal.SIGALRM, lambda *_: heard.append(1))\n\
        signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)\n\
        fd = os.open(sys.argv[1], os.O_WRONLY)\n\
        done = os.pwrite(fd, b'new', 5)\n\
        signal.setitimer(signal.ITIMER_REAL, 0)\n\
        assert done == 3 and heard, (done, heard)\n";
    fuse_tests::case::python(script, &[large.to_str().unwrap()]);
    slow.at_speed();
    let mut expected = fuse_tests::fixture::pattern(LARGE, 7);
    assert!(fs::read(slow.case.l(0, "dir/large")).unwrap() == expected, "the lower file");
    expected[5..8].copy_from_slice(b"new");
    assert!(fs::read(&large).unwrap() == expected);
    slow.case.unmount();
    assert_eq!(work_residue(&slow.case), Vec::<std::path::PathBuf>::new());
    assert!(fs::read(slow.case.u("dir/large")).unwrap() == expected);
}
