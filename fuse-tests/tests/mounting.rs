//! The ways to make a FUSE mount: fsopen(2) and its kin, mount(2), fusermount3. Each is taken where the one before is
//! refused, and the mount table shows the same whichever it was.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use fuse_tests::case::{Case, put, said, text, user_command};
use fuse_tests::env::{self, is_other_program};
use fuse_tests::trace::no_strace;
use fuse_tests::{both, needs_root, skip};

/// What the mount table shows of a mount.
#[derive(Debug, PartialEq, Eq)]
struct Shown {
    flags: String,
    kind: String,
    source: String,
    options: Vec<String>,
}

#[track_caller]
fn shown(table: &str, merged: &Path) -> Shown {
    let merged = merged.display().to_string();
    let line = table.lines().find(|line| line.split(' ').nth(4) == Some(&merged));
    let line = line.unwrap_or_else(|| panic!("{merged} is not in {table}"));
    let (head, tail) = line.split_once(" - ").unwrap();
    let tail: Vec<&str> = tail.split(' ').collect();
    Shown {
        flags: head.split(' ').nth(5).unwrap().to_owned(),
        kind: tail[0].to_owned(),
        source: tail[1].to_owned(),
        options: tail[2].split(',').map(str::to_owned).collect(),
    }
}

fn own_table() -> String {
    fs::read_to_string("/proc/self/mountinfo").unwrap()
}

/// Why the ways cannot be forced here.
fn cannot_force() -> Option<String> {
    if is_other_program() { Some("another program".to_owned()) } else { no_strace() }
}

both!(every_way_of_mounting_shows_the_same);
fn every_way_of_mounting_shows_the_same() {
    if let Some(reason) = cannot_force() {
        skip!("{reason}");
    }
    let by_context = "mounted by fsopen(2)";
    let by_one_call = "mounted by mount(2)";
    let ways = [
        (None, by_context),
        (Some("fsopen:error=ENOSYS"), by_one_call),
        (Some("fsopen:error=EPERM"), by_one_call),
        (Some("fsconfig:error=EPERM"), by_one_call),
        // By then the device serves a filesystem that has no place.
        (Some("fsmount:error=ENOSYS"), by_one_call),
        (Some("move_mount:error=EACCES"), by_one_call),
    ];
    let long = "x".repeat(300);
    for (options, kind, source) in [
        ("exec", "fuse.lamina", "lamina"),
        ("ro,noexec,nosuid,fsname=a\\,b c,subtype=other", "fuse.other", "a,b\\040c"),
        // Too long for fsconfig(2).
        (&format!("fsname={long}"), "fuse.lamina", &*long),
    ] {
        let mut c = Case::new(1);
        put(c.l(0, "file"), "content");
        c.sandbox.seal();
        let log = c.sandbox.root().join("log");
        let mut first: Option<Shown> = None;
        for (refusal, way) in &ways {
            let log_options = format!("log_level=debug,log_file={}", log.display());
            let own = c.spec().option(options).option(&log_options).command();
            let mut command = Command::new("strace");
            // Beside the program, so that it ends when the mount is there.
            command.args(["-D", "-f", "-qq", "-o", "/dev/null"]);
            match refusal {
                Some(refusal) => command.args(["-e", &format!("inject={refusal}")]),
                None => command.args(["-e", "trace=fsopen"]),
            };
            command.arg(own.get_program()).args(own.get_args()).stdin(Stdio::null());
            c.mount_by_hand(command);
            assert_eq!(text(c.m("file")), "content", "{refusal:?}");
            let is_writable = fs::write(c.m("file"), "content").is_ok();
            assert_eq!(is_writable, !options.starts_with("ro,"), "{refusal:?}");
            let seen = shown(&own_table(), &c.m(""));
            c.unmount();
            let said = fs::read_to_string(&log).unwrap();
            fs::remove_file(&log).unwrap();
            let way = if options.len() > 255 { by_one_call } else { way };
            assert!(said.contains(way), "{refusal:?}: {said}");
            assert_eq!((&*seen.kind, &*seen.source), (kind, source), "{refusal:?}");
            match &first {
                None => first = Some(seen),
                Some(first) => assert_eq!(&seen, first, "{refusal:?}"),
            }
        }
        let first = first.unwrap();
        let flags: Vec<&str> = first.flags.split(',').collect();
        let expected: &[&str] = if options.starts_with("ro,") {
            &["ro", "nosuid", "nodev", "noexec", "noatime"]
        } else {
            &["rw", "nodev", "noatime"]
        };
        assert_eq!(flags, expected);
        for option in ["default_permissions", "allow_other", "user_id=0", "group_id=0"] {
            assert!(first.options.iter().any(|shown| shown == option), "{option}: {first:?}");
        }
    }
}

/// The third way, as somebody who may not mount: but for what a user's mount cannot have, the same.
#[test]
fn the_helper_mounts_the_same() {
    needs_root!();
    if is_other_program() {
        skip!("another program");
    }
    if env::extra_options().contains("io=passthrough") {
        skip!("io=passthrough is refused to an ordinary user");
    }
    let helper = Command::new("fusermount3").arg("-V").stdout(Stdio::null()).status();
    if !helper.is_ok_and(|status| status.success()) {
        skip!("needs fusermount3");
    }
    let options = "nosuid,noexec,fsname=a b,subtype=other";
    let mut c = Case::new(1);
    c.mount_with(options);
    let by_call = shown(&own_table(), &c.m(""));
    drop(c);

    let c = Case::new(1);
    put(c.l(0, "file"), "content");
    let root = c.sandbox.root().to_owned();
    let program = root.join("lamina");
    env::copy_program(env::program(), &program);
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    for dir in [c.u(""), c.w(""), c.m(""), c.l(0, ""), c.l(0, "file")] {
        std::os::unix::fs::chown(dir, Some(65534), Some(65534)).unwrap();
    }
    let log = root.join("log");
    fs::write(&log, "").unwrap();
    std::os::unix::fs::chown(&log, Some(65534), Some(65534)).unwrap();
    let list = c.spec().option(options).option_text();
    let list = format!("{},log_level=debug,log_file={}", list.display(), log.display());
    let mut command = user_command(
        65534,
        &root,
        "\"$1\" -o \"$2\" \"$3\"; cat /proc/self/mountinfo; cat \"$3\"/file; \"$1\" unmount \"$3\"",
    );
    command.arg("sh").arg(&program).arg(&list).arg(c.m(""));
    let out = command.output().unwrap();
    assert!(out.status.success(), "{}", said(&out));
    let table = String::from_utf8(out.stdout).unwrap();
    assert!(table.ends_with("content"), "{table}");
    let by_helper = shown(&table, &c.m(""));
    assert_eq!(
        (&by_helper.flags, &by_helper.kind, &by_helper.source),
        (&by_call.flags, &by_call.kind, &by_call.source)
    );
    assert_eq!(by_helper.options, ["rw", "user_id=65534", "group_id=65534", "default_permissions"]);
    let told = text(&log);
    assert!(
        told.contains("fsopen: Operation not permitted") && !told.contains("mounted by"),
        "{told}"
    );
}
