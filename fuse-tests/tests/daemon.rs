//! The program as a process: when it returns, what it says, what it leaves, how it ends; the
//! command lines of container engines; and bad input, each with one sentence and no mount.

use std::fs::{self, File, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use fuse_tests::case::{BOUND, is_mounted, said, the_server, umount};
use fuse_tests::env::{self, wait_until};
use fuse_tests::fixture::{Kind, Sandbox};
use fuse_tests::{both, needs_root};
use rustix::fs::{CWD, FileType, Mode};
use rustix::mount::UnmountFlags;
use rustix::process::{Pid, Signal, kill_process};

/// What statfs(2) says of a FUSE mount.
const FUSE_MAGIC: i64 = 0x6573_5546;

/// A sandbox with one small layer, and mounts made by running the program in every way there is.
struct Stage {
    sandbox: Sandbox,
}

impl Stage {
    fn new() -> Stage {
        let mut sandbox = Sandbox::new();
        sandbox.layer("file f 644 content\nfile d/inner 644 inner\n");
        Stage { sandbox }
    }

    fn merged(&self) -> PathBuf {
        self.sandbox.merged()
    }

    /// The text after `-o` for the default layers.
    fn options(&self) -> String {
        self.sandbox.spec(Kind::Lamina).option_text().into_string().unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.sandbox.root().join(name)
    }

    /// Runs the program to its return, both outputs being pipes that are read to their ends.
    fn run(&self, arguments: &[&str]) -> Output {
        run(Command::new(env::program()).args(arguments))
    }

    /// Mounts the default layers.
    #[track_caller]
    fn mount(&self) {
        let out = self.run(&["-o", &self.options(), self.merged().to_str().unwrap()]);
        assert!(out.status.success(), "{}", said(&out));
        self.check_mounted(&self.merged());
    }

    #[track_caller]
    fn check_mounted(&self, merged: &Path) {
        assert_eq!(
            rustix::fs::statfs(merged).unwrap().f_type,
            FUSE_MAGIC,
            "the program returned before the mount was there"
        );
        assert_eq!(fs::read_to_string(merged.join("f")).unwrap(), "content");
    }

    fn servers(&self) -> Vec<u32> {
        env::processes_with_argument(&self.merged())
    }

    #[track_caller]
    fn server(&self) -> Pid {
        the_server(&self.merged())
    }

    /// Unmounts by system call and waits for the server to end.
    #[track_caller]
    fn unmount(&self) {
        umount(&self.merged());
        self.check_gone();
    }

    #[track_caller]
    fn check_gone(&self) {
        wait_until("the mount to go", BOUND, || !is_mounted(&self.merged()));
        wait_until("the server to end", BOUND, || self.servers().is_empty());
        assert_eq!(fs::read_dir(self.merged()).unwrap().count(), 0, "not the bare mount point");
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        for mount in env::mounts_below(self.sandbox.root()).iter().rev() {
            let _ = rustix::mount::unmount(mount, UnmountFlags::DETACH);
        }
        for pid in self.servers() {
            if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
                let _ = kill_process(pid, Signal::TERM);
            }
        }
    }
}

/// Runs a command to its return and until its pipes are closed; a daemon that keeps one open fails the test.
#[track_caller]
fn run(command: &mut Command) -> Output {
    let start = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let (mut stdout, mut stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let status = child.wait().unwrap();
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let _ = stdout.read_to_end(&mut out);
        let _ = stderr.read_to_end(&mut err);
        let _ = sender.send((out, err));
    });
    let (stdout, stderr) = receiver.recv_timeout(BOUND).unwrap_or_else(|_| {
        panic!("a pipe of {command:?} is still open {:?} later", start.elapsed())
    });
    Output { status, stdout, stderr }
}

/// Runs a command that unmounts, again for as long as it says that the mount is busy.
fn run_unless_busy(command: &mut Command) -> Output {
    let end = Instant::now() + BOUND;
    loop {
        let out = run(command);
        let busy = said(&out).contains("busy") || said(&out).contains("in use");
        if out.status.success() || !busy || Instant::now() > end {
            return out;
        }
    }
}

/// A link to the program under the name that container engines look for.
fn link_called_fuse_overlayfs(stage: &Stage) -> PathBuf {
    let bin = stage.path("bin");
    fs::create_dir_all(&bin).unwrap();
    let link = bin.join("fuse-overlayfs");
    if fs::symlink_metadata(&link).is_err() {
        symlink(env::program(), &link).unwrap();
    }
    link
}

// BuildKit, containerd and mount.fuse3 look for another name.
both!(setup_makes_the_name_that_engines_look_for);
fn setup_makes_the_name_that_engines_look_for() {
    let stage = Stage::new();
    let (bin, home) = (stage.path("bin"), Home::new(&stage, 1));
    fs::create_dir(&bin).unwrap();
    let link = bin.join("fuse-overlayfs");
    let setup = |more: &[&str]| {
        run(Command::new(env::program()).args(["setup", "--bin"]).arg(&bin).args(more))
    };
    for _ in 0..2 {
        let out = setup(&[]);
        assert!(out.status.success(), "{}", said(&out));
    }
    let merged = PathBuf::from(home.own("merged"));
    let out = run(Command::new(&link).args(["-o", &home.writable()]).arg(&merged));
    assert!(out.status.success(), "{}", said(&out));
    stage.check_mounted(&merged);
    assert!(setup(&["--remove"]).status.success() && fs::symlink_metadata(&link).is_err());
    fs::write(&link, "of somebody else").unwrap();
    for more in [&[][..], &["--remove"]] {
        let out = setup(more);
        assert_eq!(out.status.code(), Some(1));
        assert!(said(&out).contains("is there, and is not this program"), "{}", said(&out));
        assert_eq!(fs::read_to_string(&link).unwrap(), "of somebody else");
    }
    // The program itself, installed under that name: what is removed is a link.
    env::copy_program(env::program(), &link);
    let own = |more: &[&str]| {
        run(Command::new(&link).arg0("lamina").args(["setup", "--bin"]).arg(&bin).args(more))
    };
    let out = own(&["--remove"]);
    assert_eq!(out.status.code(), Some(1));
    assert!(said(&out).contains("is no link but this program itself"), "{}", said(&out));
    // There is nothing to do for the name to be found.
    let out = own(&[]);
    assert!(out.status.success(), "{}", said(&out));
    assert!(String::from_utf8(out.stdout).unwrap().contains("fuse-overlayfs is this program"));
    assert!(fs::symlink_metadata(&link).unwrap().is_file());
    // Under both names, by a hard link.
    fs::hard_link(&link, bin.join("lamina")).unwrap();
    let out = run(Command::new(bin.join("lamina")).arg("setup"));
    assert!(out.status.success(), "{}", said(&out));
    assert!(fs::symlink_metadata(&link).unwrap().is_file());
}

// A program that returns early lets the client write into the bare mount point.
both!(it_returns_when_the_mount_answers);
fn it_returns_when_the_mount_answers() {
    let stage = Stage::new();
    for _ in 0..20 {
        stage.mount();
        fs::write(stage.merged().join("by-the-client"), "x").unwrap();
        stage.unmount();
    }
    assert!(fs::symlink_metadata(stage.sandbox.upper().join("by-the-client")).is_ok());
}

// A success says nothing: what is on standard error is shown to people.
both!(a_success_is_silent);
fn a_success_is_silent() {
    let stage = Stage::new();
    let out = stage.run(&["-o", &stage.options(), stage.merged().to_str().unwrap()]);
    assert!(out.status.success());
    assert_eq!((said(&out).as_str(), out.stdout.as_slice()), ("", &b""[..]));
    stage.unmount();
}

// A daemon that keeps standard error open hangs its client, who reads the pipe to its end.
both!(the_pipes_of_the_client_are_closed);
fn the_pipes_of_the_client_are_closed() {
    let stage = Stage::new();
    let start = Instant::now();
    stage.mount();
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    let pid = stage.server().as_raw_nonzero();
    for fd in 0..3 {
        let target = fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap();
        assert!(!target.to_string_lossy().starts_with("pipe:"), "{fd} is {}", target.display());
    }
    stage.unmount();
}

// Descriptors inherited by accident are kept for good.
both!(inherited_descriptors_are_closed);
fn inherited_descriptors_are_closed() {
    let stage = Stage::new();
    let leak = stage.path("leaked-file");
    fs::write(&leak, "").unwrap();
    let script = format!("exec 3<'{0}' 7>>'{0}' 9<'{0}'; exec \"$@\"", leak.display());
    let out = run(Command::new("sh")
        .args(["-c", &script, "sh"])
        .arg(env::program())
        .args(["-o", &stage.options()])
        .arg(stage.merged()));
    assert!(out.status.success(), "{}", said(&out));
    let pid = stage.server().as_raw_nonzero();
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
        let entry = entry.unwrap();
        if let Ok(target) = fs::read_link(entry.path()) {
            assert_ne!(target, leak, "descriptor {:?} is kept", entry.file_name());
        }
    }
    stage.unmount();
}

/// Session of the process `pid`; 0 where the session began outside of this PID namespace, for which
/// getsid(2) has no number.
fn session_of(pid: &str) -> i32 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let after_the_name = stat.rsplit(')').next().unwrap();
    after_the_name.split_whitespace().nth(3).unwrap().parse().unwrap()
}

// The daemon dies, or is hung up on, with the shell or the session that started it.
both!(it_survives_its_parent);
fn it_survives_its_parent() {
    let stage = Stage::new();
    // A shell in a session of its own that ends by a signal to its whole process group.
    let out = run(Command::new("setsid")
        .args(["sh", "-c", "\"$@\"; echo $?; kill -KILL 0", "sh"])
        .arg(env::program())
        .args(["-o", &stage.options()])
        .arg(stage.merged()));
    assert_eq!(String::from_utf8_lossy(&out.stdout), "0\n", "{}", said(&out));
    stage.check_mounted(&stage.merged());
    let pid = stage.server();
    let daemon = session_of(&pid.as_raw_nonzero().to_string());
    assert_ne!(daemon, session_of("self"), "the daemon is in the session of its caller");
    // A working directory would keep a filesystem from being unmounted.
    assert_eq!(
        fs::read_link(format!("/proc/{}/cwd", pid.as_raw_nonzero())).unwrap(),
        Path::new("/")
    );
    fs::write(stage.merged().join("after"), "x").unwrap();
    stage.unmount();
}

// SIGTERM is ignored, or leaves a mount that answers ENOTCONN.
both!(signals_unmount);
fn signals_unmount() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let stage = Stage::new();
        stage.mount();
        fs::write(stage.merged().join("new"), "new").unwrap();
        kill_process(stage.server(), signal).unwrap();
        stage.check_gone();
        assert_eq!(fs::read_to_string(stage.sandbox.upper().join("new")).unwrap(), "new");
    }
}

// A signal comes while files are open: no dead mount may stay, and none in the table.
both!(a_signal_with_open_files_leaves_no_dead_mount);
fn a_signal_with_open_files_leaves_no_dead_mount() {
    let stage = Stage::new();
    stage.mount();
    let held = File::open(stage.merged().join("f")).unwrap();
    let dir = File::open(stage.merged().join("d")).unwrap();
    kill_process(stage.server(), Signal::TERM).unwrap();
    wait_until("the mount to go", BOUND, || !is_mounted(&stage.merged()));
    assert_eq!(fs::read_dir(stage.merged()).unwrap().count(), 0);
    drop((held, dir));
    stage.check_gone();
}

// The server stays when its mount is gone.
both!(it_ends_when_the_mount_is_gone);
fn it_ends_when_the_mount_is_gone() {
    let stage = Stage::new();
    let merged = stage.merged();
    stage.mount();
    stage.unmount();

    stage.mount();
    let out = run_unless_busy(Command::new("umount").arg(&merged));
    assert!(out.status.success(), "{}", said(&out));
    stage.check_gone();

    // Detached while a file is open: it serves until the file is closed.
    stage.mount();
    let mut held = File::options().read(true).write(true).open(merged.join("f")).unwrap();
    rustix::mount::unmount(&merged, UnmountFlags::DETACH).unwrap();
    assert!(!is_mounted(&merged));
    held.write_all(b"CONTENT").unwrap();
    held.sync_all().unwrap();
    assert_eq!(stage.servers().len(), 1);
    drop(held);
    stage.check_gone();
    assert_eq!(fs::read_to_string(stage.sandbox.upper().join("f")).unwrap(), "CONTENT");
    fs::remove_file(stage.sandbox.upper().join("f")).unwrap();

    // The mount point can be replaced at once, as a client does.
    stage.mount();
    umount(&merged);
    let fresh = stage.path("merged.1");
    fs::create_dir(&fresh).unwrap();
    fs::rename(&fresh, &merged).unwrap();
    stage.check_gone();
}

// A client mounts again at once: the server that is still ending takes the new mount down with it,
// or the new one says that its directories are in use.
both!(an_ending_server_leaves_the_next_mount_alone);
fn an_ending_server_leaves_the_next_mount_alone() {
    let stage = Stage::new();
    let merged = stage.merged();
    for round in 0..60 {
        let out = stage.run(&["-o", &stage.options(), merged.to_str().unwrap()]);
        assert!(out.status.success(), "round {round}: {}", said(&out));
        stage.check_mounted(&merged);
        fs::write(merged.join("new"), "new").unwrap();
        if round % 2 == 0 {
            umount(&merged);
        } else {
            rustix::mount::unmount(&merged, UnmountFlags::DETACH).unwrap();
        }
    }
    stage.check_gone();
}

// `fusermount3 -u` is the first thing a client tries.
#[test]
fn fusermount_unmounts() {
    needs_root!();
    let stage = Stage::new();
    stage.mount();
    let out = run_unless_busy(Command::new("fusermount3").arg("-u").arg(stage.merged()));
    assert!(out.status.success(), "{}", said(&out));
    stage.check_gone();
}

// `lamina unmount` returns when all is gone, and says so when there is nothing to unmount.
both!(lamina_unmount);
fn lamina_unmount() {
    let stage = Stage::new();
    if env::is_other_program() {
        fuse_tests::skip!("another program has no `unmount`");
    }
    stage.mount();
    let merged = stage.merged();
    let out = run_unless_busy(Command::new(env::program()).arg("unmount").arg(&merged));
    assert!(out.status.success(), "{}", said(&out));
    assert!(!is_mounted(&merged));
    assert_eq!(stage.servers(), Vec::<u32>::new(), "`unmount` returned before the server ended");

    check_refusal(
        &stage,
        "not a mount",
        &stage.run(&["unmount", merged.to_str().unwrap()]),
        &["merged"],
    );
    let none = stage.path("none");
    check_refusal(&stage, "missing", &stage.run(&["unmount", none.to_str().unwrap()]), &["none"]);

    // In use: refused in one sentence, the mount still answers; then by -l.
    stage.mount();
    let held = File::open(merged.join("f")).unwrap();
    let out = stage.run(&["unmount", merged.to_str().unwrap()]);
    assert!(!out.status.success());
    assert_eq!(said(&out).trim_end().lines().count(), 1, "{}", said(&out));
    stage.check_mounted(&merged);
    let out = stage.run(&["unmount", "-l", merged.to_str().unwrap()]);
    assert!(out.status.success(), "{}", said(&out));
    assert!(!is_mounted(&merged));
    drop(held);
    stage.check_gone();
}

/// Starts the program in the foreground and waits for the mount.
fn foreground(stage: &Stage, arguments: &[&str], stderr: Stdio) -> Child {
    let child = Command::new(env::program())
        .args(arguments)
        .args(["-o", &stage.options()])
        .arg(stage.merged())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(stderr)
        .spawn()
        .unwrap();
    let merged = stage.merged();
    wait_until("the mount", BOUND, || {
        rustix::fs::statfs(&merged).is_ok_and(|s| s.f_type == FUSE_MAGIC)
    });
    child
}

both!(foreground_stays_until_the_end);
fn foreground_stays_until_the_end() {
    let stage = Stage::new();
    // By signal.
    let mut child = foreground(&stage, &["-f"], Stdio::null());
    stage.check_mounted(&stage.merged());
    assert!(child.try_wait().unwrap().is_none(), "-f did not stay");
    assert_eq!(stage.servers(), [child.id()], "-f made another process");
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let status = child.wait().unwrap();
    assert!(status.success() || status.signal() == Some(Signal::INT.as_raw()), "{status}");
    stage.check_gone();
    // By unmount.
    let mut child = foreground(&stage, &["-f"], Stdio::null());
    umount(&stage.merged());
    let status = child.wait().unwrap();
    assert!(status.success(), "{status}");
    stage.check_gone();
}

both!(debug_logs_requests);
fn debug_logs_requests() {
    let stage = Stage::new();
    let log = stage.path("log");
    let mut child = foreground(&stage, &["-f", "-d"], File::create(&log).unwrap().into());
    fs::create_dir(stage.merged().join("a-new-directory")).unwrap();
    stage.check_mounted(&stage.merged());
    umount(&stage.merged());
    assert!(child.wait().unwrap().success());
    let text = fs::read_to_string(&log).unwrap();
    let lower = text.to_lowercase();
    for word in ["lookup", "mkdir", "a-new-directory"] {
        assert!(lower.contains(word), "{word} is not in the log:\n{text}");
    }
    stage.check_gone();
}

#[test]
fn version_is_told_on_standard_output() {
    if env::is_other_program() {
        fuse_tests::skip!("another program has another version");
    }
    let stage = Stage::new();
    for (program, name) in [
        (env::program().to_path_buf(), "lamina"),
        (link_called_fuse_overlayfs(&stage), "fuse-overlayfs"),
    ] {
        let out = run(Command::new(&program).arg("--version"));
        assert!(out.status.success());
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(text.contains(name), "{}: {text}", program.display());
        assert!(text.chars().any(|c| c.is_ascii_digit()), "{text}");
        assert_eq!(said(&out), "");
    }
}

/// A graph driver's home with `layers` layers, the topmost of which is to be mounted.
struct Home {
    root: PathBuf,
    /// `l/LINK` of each layer, topmost first, without the one to be mounted.
    links: Vec<String>,
}

impl Home {
    fn new(stage: &Stage, layers: usize) -> Home {
        let root = stage.path("overlay");
        fs::create_dir_all(root.join("l")).unwrap();
        let mut links = Vec::new();
        for n in 0..=layers {
            let id = format!("{n:064x}");
            let link = format!("{n:A>26}");
            for dir in ["diff", "work", "merged"] {
                fs::create_dir_all(root.join(&id).join(dir)).unwrap();
            }
            fs::set_permissions(root.join(&id).join("merged"), Permissions::from_mode(0o700))
                .unwrap();
            symlink(format!("../{id}/diff"), root.join("l").join(&link)).unwrap();
            if n < layers {
                fs::write(root.join(&id).join(format!("diff/from-{n}")), format!("{n}")).unwrap();
                fs::write(root.join(&id).join("diff/f"), "content").unwrap();
                fs::write(root.join(&id).join("diff/top"), format!("layer {n}")).unwrap();
                links.insert(0, format!("{}/l/{link}", root.display()));
            } else {
                fs::set_permissions(root.join(&id).join("diff"), Permissions::from_mode(0o555))
                    .unwrap();
            }
        }
        Home { root, links }
    }

    fn own(&self, name: &str) -> String {
        format!("{}/{:064x}/{name}", self.root.display(), self.links.len())
    }

    /// The options of a container's own layer.
    fn writable(&self) -> String {
        format!(
            "lowerdir={},upperdir={},workdir={}",
            self.links.join(":"),
            self.own("diff"),
            self.own("work")
        )
    }

    /// The options for looking at a layer.
    fn readable(&self) -> String {
        format!("lowerdir={}:{}", self.own("diff"), self.links.join(":"))
    }
}

/// Ends a mount that a client made.
#[track_caller]
fn end(merged: &Path) {
    umount(merged);
    wait_until("the server to end", BOUND, || env::processes_with_argument(merged).is_empty());
}

// The exact command lines of container engines, with their empty options and links.
both!(the_command_lines_of_container_engines);
fn the_command_lines_of_container_engines() {
    let stage = Stage::new();
    let program = link_called_fuse_overlayfs(&stage);
    let home = Home::new(&stage, 3);
    let merged = PathBuf::from(home.own("merged"));
    let tails = [
        "",
        ",",
        ",,volatile",
        ",volatile",
        ",nodev,volatile",
        ",nodev",
        ",private",
        ",dev,suid",
        ",rw,relatime,noatime,nosuid,noexec,slave,rprivate",
        ",metacopy=off,redirect_dir=off,index=off",
    ];
    for tail in tails {
        let options = home.writable() + tail;
        let out =
            run(Command::new(&program).args(["-o", &options]).arg(&merged).current_dir(&home.root));
        assert!(out.status.success(), "{tail:?}: {}", said(&out));
        stage.check_mounted(&merged);
        assert_eq!(fs::read_to_string(merged.join("top")).unwrap(), "layer 2", "{tail:?}");
        assert_eq!(fs::metadata(&merged).unwrap().mode() & 0o7777, 0o555, "mode of the root");
        fs::write(merged.join("written"), tail).unwrap();
        end(&merged);
        assert_eq!(fs::read_to_string(home.own("diff/written")).unwrap(), tail);
        // The client does this before a mount.
        let _ = fs::remove_dir_all(home.own("work/work/incompat"));
    }
    for tail in ["", ",", ",,volatile", ",ro"] {
        let options = home.readable() + tail;
        let out =
            run(Command::new(&program).args(["-o", &options]).arg(&merged).current_dir(&home.root));
        assert!(out.status.success(), "{tail:?}: {}", said(&out));
        stage.check_mounted(&merged);
        let refused = fs::write(merged.join("written"), "again").unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem, "{tail:?}");
        end(&merged);
    }
    // A base layer has the directory `empty` below it; `..` follows the link before it is taken.
    fs::create_dir(home.root.join("empty")).unwrap();
    let diff1 = home.root.join(format!("{:064x}/diff1", 2));
    fs::create_dir(&diff1).unwrap();
    fs::write(diff1.join("rotated"), "x").unwrap();
    let options = format!(
        "lowerdir={0}:{0}/../diff1:{1}/empty,upperdir={2},workdir={3},",
        home.links[0],
        home.root.display(),
        home.own("diff"),
        home.own("work")
    );
    let out =
        run(Command::new(&program).args(["-o", &options]).arg(&merged).current_dir(&home.root));
    assert!(out.status.success(), "{}", said(&out));
    assert_eq!(fs::read_to_string(merged.join("rotated")).unwrap(), "x");
    end(&merged);
}

// Source first and options last, as mount(8)'s helper calls it.
both!(the_form_with_a_source);
fn the_form_with_a_source() {
    let stage = Stage::new();
    let program = link_called_fuse_overlayfs(&stage);
    let merged = stage.merged();
    let options = stage.options() + ",dev,suid";
    for arguments in [
        vec!["overlay", merged.to_str().unwrap(), "-o", &options],
        vec!["-o", &options, "overlay", merged.to_str().unwrap()],
        vec!["overlay", merged.to_str().unwrap(), "-o", "dev", "-o", &options],
    ] {
        let out = run(Command::new(&program).args(&arguments));
        assert!(out.status.success(), "{arguments:?}: {}", said(&out));
        stage.check_mounted(&merged);
        stage.unmount();
    }
}

// By way of mount(8)'s FUSE helper, which finds the program by name on PATH.
#[test]
fn through_the_mount_helper() {
    needs_root!();
    let stage = Stage::new();
    let helper = Path::new("/sbin/mount.fuse3");
    if fs::symlink_metadata(helper).is_err() {
        fuse_tests::skip!("no {}", helper.display());
    }
    let program = link_called_fuse_overlayfs(&stage);
    let mut path = program.parent().unwrap().as_os_str().to_owned();
    path.push(":/usr/sbin:/usr/bin:/sbin:/bin");
    let options = stage.options();
    let mut command = Command::new(helper);
    command.args(["overlay", stage.merged().to_str().unwrap()]);
    for option in options.split(',').chain(["dev", "suid"]) {
        command.args(["-o", option]);
    }
    let out = run(command.args(["-t", "fuse-overlayfs"]).env("PATH", path));
    assert!(out.status.success(), "{}", said(&out));
    stage.check_mounted(&stage.merged());
    stage.unmount();
}

both!(many_layers_and_a_long_command_line);
fn many_layers_and_a_long_command_line() {
    let stage = Stage::new();
    let program = link_called_fuse_overlayfs(&stage);
    for layers in [128, 499] {
        let home = Home::new(&stage, layers);
        let merged = PathBuf::from(home.own("merged"));
        let out = run(Command::new(&program).args(["-o", &home.writable()]).arg(&merged));
        assert!(out.status.success(), "{layers} layers: {}", said(&out));
        for n in 0..layers {
            let content = fs::read_to_string(merged.join(format!("from-{n}"))).unwrap();
            assert_eq!(content, n.to_string());
        }
        assert_eq!(fs::read_dir(&merged).unwrap().count(), layers + 2);
        end(&merged);
        fs::remove_dir_all(&home.root).unwrap();
    }
}

// A path with a colon, a comma, a blank or a backslash.
both!(escaped_paths);
fn escaped_paths() {
    let stage = Stage::new();
    let merged = stage.merged();
    let odd = stage.path("a:b c\\d");
    fs::create_dir(&odd).unwrap();
    fs::write(odd.join("odd"), "x").unwrap();
    let escaped = odd.to_str().unwrap().replace('\\', "\\\\").replace(':', "\\:");
    let plain = stage.sandbox.lowers()[0].display().to_string();
    let options = format!("lowerdir={escaped}:{plain}");
    let out = stage.run(&["-o", &options, merged.to_str().unwrap()]);
    assert!(out.status.success(), "{}", said(&out));
    assert_eq!(fs::read_to_string(merged.join("odd")).unwrap(), "x");
    stage.check_mounted(&merged);
    stage.unmount();
    if env::is_other_program() {
        return;
    }
    let comma = stage.path("a,b");
    fs::rename(&odd, &comma).unwrap();
    let escaped = comma.to_str().unwrap().replace(',', "\\,");
    let options = format!("lowerdir={escaped}:{plain}");
    let out = stage.run(&["-o", &options, merged.to_str().unwrap()]);
    assert!(out.status.success(), "{}", said(&out));
    assert_eq!(fs::read_to_string(merged.join("odd")).unwrap(), "x");
    stage.unmount();
}

// Layers are taken by relative path too, and held: the client may move on.
both!(relative_paths_and_layers_held_by_descriptor);
fn relative_paths_and_layers_held_by_descriptor() {
    let stage = Stage::new();
    let out = run(Command::new(env::program())
        .args(["-o", "lowerdir=l0,upperdir=upper,workdir=work", "merged"])
        .current_dir(stage.sandbox.root()));
    assert!(out.status.success(), "{}", said(&out));
    stage.check_mounted(&stage.merged());
    // The paths are not looked up again.
    let lower = stage.sandbox.lowers()[0].clone();
    let moved = stage.path("moved");
    fs::rename(&lower, &moved).unwrap();
    assert_eq!(fs::read_to_string(stage.merged().join("d/inner")).unwrap(), "inner");
    fs::write(stage.merged().join("d/inner"), "changed").unwrap();
    assert_eq!(fs::read_to_string(stage.merged().join("d/inner")).unwrap(), "changed");
    fs::rename(&moved, &lower).unwrap();
    umount(&stage.merged());
    wait_until("the end of the mount", BOUND, || !is_mounted(&stage.merged()));
}

// `dev` and `suid` reach the mount; without them a mount by root has neither.
#[test]
fn device_nodes_work_with_the_dev_option() {
    needs_root!();
    let stage = Stage::new();
    let null = stage.sandbox.lowers()[0].join("null");
    rustix::fs::mknodat(
        CWD,
        &null,
        FileType::CharacterDevice,
        Mode::from(0o666u32),
        rustix::fs::makedev(1, 3),
    )
    .unwrap();
    let merged = stage.merged();
    let options = stage.options() + ",dev,suid";
    let out = stage.run(&["-o", &options, merged.to_str().unwrap()]);
    assert!(out.status.success(), "{}", said(&out));
    fs::write(merged.join("null"), "into nothing").unwrap();
    stage.unmount();
    let options = stage.options() + ",nodev";
    let out = stage.run(&["-o", &options, merged.to_str().unwrap()]);
    assert!(out.status.success(), "{}", said(&out));
    assert!(File::open(merged.join("null")).is_err(), "nodev had no effect");
    stage.unmount();
}

/// Checks what every refusal owes: an exit code, one line that has the words, no mount, no process.
#[track_caller]
fn check_refusal(stage: &Stage, what: &str, out: &Output, words: &[&str]) {
    let said = said(out);
    assert!(!out.status.success(), "{what}: accepted; {said}");
    assert_eq!(out.status.signal(), None, "{what}: died");
    let text = said.trim_end();
    assert!(!text.is_empty() && text.lines().count() == 1, "{what}: not one line: {said}");
    assert!(!text.contains("panicked") && !text.contains("{:?}"), "{what}: {said}");
    for word in words {
        assert!(text.contains(word), "{what}: {word:?} is not in: {said}");
    }
    assert_eq!(out.stdout, b"", "{what}: something on standard output");
    assert!(!is_mounted(&stage.merged()), "{what}: mounted nevertheless");
    assert_eq!(stage.servers(), Vec::<u32>::new(), "{what}: a process stays");
}

// Bad input gets one sentence that names the option and the path, and no mount.
both!(bad_input_gets_one_sentence);
fn bad_input_gets_one_sentence() {
    let stage = Stage::new();
    let path = |name: &str| stage.path(name).display().to_string();
    fs::write(stage.path("file"), "").unwrap();
    fs::create_dir(stage.path("upper/inside")).unwrap();
    fs::create_dir(stage.path("merged/inside")).unwrap();
    fs::create_dir(stage.path("merged/inside-work")).unwrap();
    symlink("nowhere", stage.path("dangling")).unwrap();
    let (lower, upper, work, merged) = (path("l0"), path("upper"), path("work"), path("merged"));
    let full = stage.options();
    let cases: Vec<(&str, String, String, Vec<String>)> = vec![
        (
            "missing layer",
            format!("lowerdir={lower}:{}", path("none")),
            merged.clone(),
            vec!["lowerdir".into(), path("none")],
        ),
        (
            "dangling link",
            format!("lowerdir={}", path("dangling")),
            merged.clone(),
            vec!["lowerdir".into(), path("dangling")],
        ),
        (
            "file as layer",
            format!("lowerdir={}:{lower}", path("file")),
            merged.clone(),
            vec!["lowerdir".into(), path("file")],
        ),
        (
            "no layer",
            format!("upperdir={upper},workdir={work}"),
            merged.clone(),
            vec!["lowerdir".into()],
        ),
        ("empty layer", "lowerdir=".into(), merged.clone(), vec!["lowerdir".into()]),
        (
            "missing upper",
            format!("lowerdir={lower},upperdir={},workdir={work}", path("none")),
            merged.clone(),
            vec!["upperdir".into(), path("none")],
        ),
        (
            "file as upper",
            format!("lowerdir={lower},upperdir={},workdir={work}", path("file")),
            merged.clone(),
            vec!["upperdir".into(), path("file")],
        ),
        (
            "upper without work",
            format!("lowerdir={lower},upperdir={upper}"),
            merged.clone(),
            vec!["workdir".into()],
        ),
        (
            "missing work",
            format!("lowerdir={lower},upperdir={upper},workdir={}", path("none")),
            merged.clone(),
            vec!["workdir".into(), path("none")],
        ),
        (
            "file as work",
            format!("lowerdir={lower},upperdir={upper},workdir={}", path("file")),
            merged.clone(),
            vec!["workdir".into(), path("file")],
        ),
        (
            "work inside upper",
            format!("lowerdir={lower},upperdir={upper},workdir={upper}/inside"),
            merged.clone(),
            vec!["workdir".into(), format!("{upper}/inside")],
        ),
        (
            "work is upper",
            format!("lowerdir={lower},upperdir={upper},workdir={upper}"),
            merged.clone(),
            vec!["workdir".into(), upper.clone()],
        ),
        (
            "upper inside work",
            format!("lowerdir={lower},upperdir={upper}/inside,workdir={upper}"),
            merged.clone(),
            vec![upper.clone()],
        ),
        (
            "lower inside the mount point",
            format!("lowerdir={merged}/inside:{lower}"),
            merged.clone(),
            vec!["lowerdir".into(), format!("{merged}/inside")],
        ),
        (
            "upper inside the mount point",
            format!("lowerdir={lower},upperdir={merged}/inside,workdir={merged}/inside-work"),
            merged.clone(),
            vec![format!("{merged}/inside")],
        ),
        (
            "unknown option",
            format!("{full},no_such_option"),
            merged.clone(),
            vec!["no_such_option".into()],
        ),
        (
            "unknown option with a value",
            format!("{full},no_such_option=5"),
            merged.clone(),
            vec!["no_such_option".into()],
        ),
        (
            "option written wrongly",
            format!("lowerdirs={lower}"),
            merged.clone(),
            vec!["lowerdirs".into()],
        ),
        ("missing mount point", full.clone(), path("none"), vec![path("none")]),
        ("file as mount point", full.clone(), path("file"), vec![path("file")]),
    ];
    let mut failures = Vec::new();
    for (what, options, target, words) in &cases {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let check = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            check_refusal(&stage, what, &stage.run(&["-o", options, target]), &words);
        }));
        if let Err(panic) = check {
            failures.push(
                panic.downcast_ref::<String>().cloned().unwrap_or_else(|| (*what).to_owned()),
            );
        }
        for mount in env::mounts_below(stage.sandbox.root()) {
            let _ = rustix::mount::unmount(&mount, UnmountFlags::DETACH);
        }
    }
    // Not even a mount point, or nothing at all.
    for arguments in [vec!["-o", full.as_str()], vec!["-o"]] {
        let out = stage.run(&arguments);
        if out.status.success() || said(&out).is_empty() {
            failures.push(format!("{arguments:?}: {} {}", out.status, said(&out)));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    // None of this has done anything.
    assert_eq!(fs::read_dir(&upper).unwrap().count(), 1);
    assert_eq!(fs::read_dir(&work).unwrap().count(), 0, "work was touched");
}

// The upper and work directories must be on one filesystem: they are renamed between.
both!(a_workdir_on_another_filesystem_is_refused);
fn a_workdir_on_another_filesystem_is_refused() {
    let stage = Stage::new();
    let other = stage.path("other");
    fs::create_dir(&other).unwrap();
    let out = run(Command::new("mount").args(["-t", "tmpfs", "other"]).arg(&other));
    assert!(out.status.success(), "{}", said(&out));
    fs::create_dir(other.join("work")).unwrap();
    let options = format!(
        "lowerdir={},upperdir={},workdir={}/work",
        stage.sandbox.lowers()[0].display(),
        stage.sandbox.upper().display(),
        other.display()
    );
    let out = stage.run(&["-o", &options, stage.merged().to_str().unwrap()]);
    check_refusal(
        &stage,
        "workdir on tmpfs",
        &out,
        &["workdir", &format!("{}/work", other.display())],
    );
    umount(&other);
}

// Two live mounts on one upper or work directory destroy each other's objects.
both!(an_upper_in_use_is_refused);
fn an_upper_in_use_is_refused() {
    let stage = Stage::new();
    stage.mount();
    let second = stage.path("second");
    for dir in ["second", "upper2", "work2"] {
        fs::create_dir(stage.path(dir)).unwrap();
    }
    let lower = stage.sandbox.lowers()[0].display().to_string();
    let try_second = |upper: &str, work: &str| {
        let options = format!(
            "lowerdir={lower},upperdir={},workdir={}",
            stage.path(upper).display(),
            stage.path(work).display()
        );
        run(Command::new(env::program()).args(["-o", &options]).arg(&second))
    };
    for (upper, work, option, path) in [
        ("upper", "work2", "upperdir", "upper"),
        ("upper2", "work", "workdir", "work"),
        ("upper", "work", "dir", "upper"),
    ] {
        let out = try_second(upper, work);
        let text = said(&out);
        assert!(!out.status.success(), "{upper} and {work} were taken twice");
        assert_eq!(text.trim_end().lines().count(), 1, "{text}");
        assert!(
            text.contains(option) && text.contains(stage.path(path).to_str().unwrap()),
            "{text}"
        );
        assert!(!is_mounted(&second));
        assert!(env::processes_with_argument(&second).is_empty());
        stage.check_mounted(&stage.merged());
    }
    // Free again after the end, also after one by SIGKILL.
    stage.unmount();
    let out = try_second("upper", "work");
    assert!(out.status.success(), "{}", said(&out));
    let pid = env::processes_with_argument(&second)[0];
    kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), Signal::KILL).unwrap();
    wait_until("the killed server", BOUND, || env::processes_with_argument(&second).is_empty());
    rustix::mount::unmount(&second, UnmountFlags::DETACH).unwrap();
    stage.mount();
    stage.unmount();
}

// An ordinary user, without a user namespace: fusermount3 lends the privilege to mount.
#[test]
fn an_ordinary_user_mounts_and_unmounts() {
    needs_root!();
    if env::is_other_program() {
        fuse_tests::skip!("another program has no `unmount`");
    }
    if env::extra_options().contains("io=passthrough") {
        fuse_tests::skip!("io=passthrough is refused to an ordinary user");
    }
    let stage = Stage::new();
    let program = stage.path("lamina");
    env::copy_program(env::program(), &program);
    fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
    for dir in ["upper", "work", "merged", "l0", "l0/d", "l0/d/inner"] {
        std::os::unix::fs::chown(stage.path(dir), Some(65534), Some(65534)).unwrap();
    }
    let (program, merged) = (program.display().to_string(), stage.merged().display().to_string());
    let script = "set -e
        \"$1\" -o \"$2\" \"$3\"
        cd \"$3\"
        test \"$(cat f)\" = content
        echo new > new; ln -s f sym; rm -r d; ls
        cd /
        \"$1\" unmount \"$3\"
        \"$1\" -o \"$2\" \"$3\"
        cat \"$3\"/new
        fusermount3 -u \"$3\"";
    let out = run(Command::new("setpriv")
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "sh", "-c", script, "sh"])
        .args([&program, &stage.options(), &merged]));
    assert!(out.status.success(), "{}", said(&out));
    assert_eq!(String::from_utf8_lossy(&out.stdout), "f\nnew\nsym\nnew\n", "{}", said(&out));
    stage.check_gone();
}

// The form for people, with a log of the wanted level in the wanted file.
both!(lamina_mount);
fn lamina_mount() {
    if env::is_other_program() {
        fuse_tests::skip!("another program has no `mount`");
    }
    let stage = Stage::new();
    let log = stage.path("log");
    let merged = stage.merged().display().to_string();
    let path = |name: &str| stage.path(name).display().to_string();
    let (lower, upper, work) = (path("l0"), path("upper"), path("work"));
    let layers = ["--lower", &lower, "--upper", &upper, "--work", &work];
    let logged = ["--log-level", "debug", "--log-file", log.to_str().unwrap()];
    let out = stage.run(&[&["mount"], &layers[..], &logged[..], &[&merged]].concat());
    assert!(out.status.success(), "{}", said(&out));
    stage.check_mounted(&stage.merged());
    stage.unmount();
    let text = fs::read_to_string(&log).unwrap();
    assert!(!text.is_empty() && !text.contains(" ERROR "), "{text}");
    // Nothing is logged where nothing is wrong.
    fs::remove_file(&log).unwrap();
    let quiet = ["--log-level", "warn", "--log-file", log.to_str().unwrap()];
    let out = stage.run(&[&["mount"], &layers[..2], &quiet[..], &[&merged]].concat());
    assert!(out.status.success(), "{}", said(&out));
    stage.check_mounted(&stage.merged());
    assert!(fs::create_dir(stage.merged().join("new")).is_err(), "read-only without --upper");
    stage.unmount();
    assert_eq!(fs::read_to_string(&log).unwrap_or_default(), "");
    let out = stage.run(&["mount", "--lower", &path("none"), &merged]);
    check_refusal(&stage, "missing layer", &out, &[&path("none")]);
}

// The same lower layers may be mounted any number of times.
both!(lowers_are_shared_by_many_mounts);
fn lowers_are_shared_by_many_mounts() {
    let stage = Stage::new();
    let mounts: Vec<_> =
        (0..8).map(|n| stage.sandbox.side(Kind::Lamina, &format!("side{n}")).mount()).collect();
    for (n, mount) in mounts.iter().enumerate() {
        fs::write(mount.path().join("f"), format!("mount {n}")).unwrap();
    }
    for (n, mount) in mounts.iter().enumerate() {
        assert_eq!(fs::read_to_string(mount.path().join("f")).unwrap(), format!("mount {n}"));
    }
}

// Without privilege to mount: one sentence, as root of the machine sees it too.
#[test]
fn no_privilege_is_one_sentence() {
    needs_root!();
    let stage = Stage::new();
    // The program may lie where an ordinary user cannot go.
    let program = stage.path("lamina");
    env::copy_program(env::program(), &program);
    fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
    fs::create_dir(stage.path("closed")).unwrap();
    fs::create_dir(stage.path("closed/layer")).unwrap();
    fs::set_permissions(stage.path("closed"), Permissions::from_mode(0o700)).unwrap();
    let merged = stage.merged().display().to_string();
    let closed = stage.path("closed/layer").display().to_string();
    let as_nobody = |options: &str| {
        run(Command::new("setpriv")
            .args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--no-new-privs"])
            .arg(&program)
            .args(["-o", options, &merged]))
    };
    // No privilege to mount, and no set-user-id helper can lend it.
    let out = as_nobody(&format!("lowerdir={}", stage.sandbox.lowers()[0].display()));
    check_refusal(&stage, "no privilege", &out, &[&merged]);
    // A layer that cannot be read.
    let out = as_nobody(&format!("lowerdir={closed}"));
    check_refusal(&stage, "unreadable layer", &out, &["lowerdir", &closed]);
    // An upper directory that cannot be written.
    let out = as_nobody(&stage.options());
    check_refusal(&stage, "upper of another user", &out, &["dir"]);
}

// Without /dev/fuse, or with something else in its place.
#[test]
fn no_dev_fuse_is_one_sentence() {
    needs_root!();
    let stage = Stage::new();
    let hide = "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3";
    for (what, prepare) in [
        ("missing", hide.to_owned()),
        ("a plain file", format!("{hide} && : > /dev/fuse")),
        ("a fifo", format!("{hide} && mkfifo -m 666 /dev/fuse")),
        ("another device", format!("{hide} && mknod -m 666 /dev/fuse c 1 3")),
        ("an unknown device", format!("{hide} && mknod -m 666 /dev/fuse c 250 99")),
    ] {
        let script = format!("{prepare} && exec \"$@\"");
        let out = run(Command::new("unshare")
            .args(["--mount", "--propagation", "slave", "sh", "-c", &script, "sh"])
            .arg(env::program())
            .args(["-o", &stage.options()])
            .arg(stage.merged()));
        check_refusal(&stage, what, &out, &["/dev/fuse"]);
    }
    stage.mount();
    stage.unmount();
}
