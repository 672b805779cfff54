//! Owners, and the other options of mount programs: which ids of the layers are shown as which, in every reply and in
//! both directions, beside kernel overlay on idmapped mounts and beside the mount program `fuse-overlayfs`.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use fuse_tests::case::{as_user, getx, mode, python, said, sh};
use fuse_tests::env;
use fuse_tests::fixture::{Kind, Sandbox};
use fuse_tests::tree::{self, assert_same};
use fuse_tests::{needs_kernel_overlay, needs_root, skip};
use rustix::fs::XattrFlags;
use rustix::io::Errno;
use rustix::mount::UnmountFlags;

/// User and group ids are shifted differently, so that one taken for the other shows.
const MAPS: [&str; 2] = ["0 100000 65536", "0 200000 65536"];
const OPTIONS: &str = "uidmapping=:0:100000:65536,gidmapping=:0:200000:65536";

/// Functions for what no command here does: mount_setattr(2), and a user namespace with given maps.
const NAMESPACES: &str = r#"
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
def in_namespace(users, groups, run):
    "Runs a function in a new user namespace; gives its process, which waits before it runs."
    made, go = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        call(libc.unshare(0x10000000))
        os.write(made[1], b"x")
        os.read(go[0], 1)
        run()
        os._exit(0)
    os.read(made[0], 1)
    for name, text in (("uid_map", users), ("gid_map", groups)):
        with open(f"/proc/{pid}/{name}", "w") as f:
            f.write(text)
    return pid, lambda: os.write(go[1], b"x")
def idmapped(source, target, users, groups):
    pid, go = in_namespace(users, groups, lambda: None)
    namespace = os.open(f"/proc/{pid}/ns/user", os.O_RDONLY)
    tree = call(libc.syscall(428, -100, source.encode(), 1))
    attr = struct.pack("QQQQ", 0x100000, 0, 0, namespace)
    call(libc.syscall(442, tree, b"", 0x1000, attr, len(attr)))
    call(libc.syscall(429, tree, b"", -100, target.encode(), 4))
    go()
    os.waitpid(pid, 0)
def overlay(merged, options):
    "Mounts kernel overlay as a user who has an id in the map, with all capabilities."
    os.setgroups([])
    os.setresgid(200000, 200000, 200000)
    call(libc.prctl(8, 1, 0, 0, 0))
    os.setresuid(100000, 100000, 100000)
    head, sets = struct.pack("Ii", 0x20080522, 0), ctypes.create_string_buffer(24)
    call(libc.capget(head, sets))
    low, high = (struct.unpack_from("III", sets, at) for at in (0, 12))
    call(libc.capset(head, struct.pack("6I", low[1], *low[1:], high[1], *high[1:])))
    call(libc.mount(b"overlay", merged.encode(), b"overlay", 0, options.encode()))
def container(users, groups, script):
    def run():
        os.setgroups([])
        os.setgid(0)
        os.setuid(0)
        os.execvp("sh", ["sh", "-ec", script])
    pid, go = in_namespace(users, groups, run)
    go()
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"#;

/// Runs a shell script as root of a user namespace with the ids that the mount shows.
fn in_container(dir: &Path, script: &str) -> Output {
    Command::new(env::PYTHON)
        .args(["-c", &format!("{NAMESPACES}\ncontainer(*sys.argv[1:])"), MAPS[0], MAPS[1], script])
        .current_dir(dir)
        .output()
        .unwrap()
}

/// Kernel overlay with all its directories on an idmapped mount of the sandbox.
struct Idmapped {
    bind: PathBuf,
    merged: PathBuf,
}

impl Idmapped {
    fn mount(sandbox: &Sandbox, side: &str) -> Idmapped {
        let spec = sandbox.side(Kind::Kernel, side);
        let root = sandbox.root().to_path_buf();
        let bind = env::Base::get().unique("idmapped");
        fs::create_dir(&bind).unwrap();
        python(
            &format!("{NAMESPACES}\nidmapped(*sys.argv[1:])"),
            &[root.to_str().unwrap(), bind.to_str().unwrap(), MAPS[0], MAPS[1]],
        );
        let there = |path: &PathBuf| bind.join(path.strip_prefix(&root).unwrap());
        let (upper, work) = spec.upper.as_ref().unwrap();
        let lowers: Vec<PathBuf> = spec.lowers.iter().map(there).collect();
        let options = env::overlay_options(&lowers, Some((&there(upper), &there(work))));
        let this = Idmapped { bind, merged: spec.merged.clone() };
        // Whoever mounts must have ids in the map, or the work directory cannot be made.
        python(
            &format!("{NAMESPACES}\noverlay(*sys.argv[1:])"),
            &[this.merged.to_str().unwrap(), options.to_str().unwrap()],
        );
        this
    }
}

impl Drop for Idmapped {
    fn drop(&mut self) {
        for path in [&self.merged, &self.bind] {
            if rustix::mount::unmount(path, UnmountFlags::DETACH).is_ok() {
                continue;
            }
            eprintln!("not unmounted: {}", path.display());
        }
        let _ = fs::remove_dir(&self.bind);
    }
}

/// A lower layer with owners of every kind.
const LAYER: &str = "
    dir d 755
    file d/f 644 content
    owner d/f 5 6
    file root 644 content
    file mine 664 content
    owner mine 1000 1000
    file outside 666 content
    owner outside 70000 70000
    file group 666 content
    owner group 5 70000
    dir setgid 2777
    owner setgid 7 8
    dir sticky 1777
    dir shared 777
    owner shared 1000 1000
    symlink s target
    owner s 9 10
    fifo p 644
    owner p 11 12
    file suid 6755 x
    owner suid 13 14
    dir acl 755
";

fn show(dir: &Path, paths: &str) -> String {
    let script = format!("LC_ALL=C stat -c '%n %u:%g %a %F %h' {paths} 2>&1 || :");
    Command::new("sh")
        .args(["-c", &script])
        .current_dir(dir)
        .output()
        .map(|out| String::from_utf8(out.stdout).unwrap())
        .unwrap()
}

/// What is done by whom, each on its own line of the record.
fn acts() -> Vec<(Option<u32>, &'static str)> {
    vec![
        (None, "stat -c '%n %u:%g %a' d/f root mine outside group setgid s p suid"),
        // Each reply on its own, before anything asks for the attributes again.
        (None, "mkdir new && stat -c '%u:%g %a' new"),
        (None, "echo x > new/f && stat -c '%u:%g %a' new/f"),
        (None, "mkfifo new/p && stat -c '%u:%g %a' new/p"),
        (None, "ln -s x new/s && stat -c '%u:%g' new/s"),
        (None, "ln root new/hard && stat -c '%u:%g %a %h' new/hard"),
        (None, "chown 20:21 new/f && stat -c '%u:%g %a' new/f"),
        (None, "chown 20:21 new/p && chown -h 22:23 new/s && stat -c '%u:%g' new/p new/s"),
        (None, "chown 65535 new && stat -c '%u:%g' new && chown 0 new"),
        (None, "chmod 4711 d/f && stat -c '%u:%g %a' d/f root new/hard"),
        (None, "chown 30 suid && stat -c '%u:%g %a' suid"),
        (None, "echo more >> mine && stat -c '%u:%g %a %s' mine"),
        (None, "touch setgid/f && stat -c '%u:%g %a' setgid/f"),
        (None, "mkdir setgid/d && stat -c '%u:%g %a' setgid/d"),
        (None, "mv new/s moved && stat -c '%u:%g' moved"),
        (None, "rm p && mkfifo p && stat -c '%u:%g %a' p"),
        (None, "cat outside"),
        (None, "echo x >> outside"),
        (None, "rm outside"),
        (None, "chmod 600 outside"),
        (None, "chgrp 5 group"),
        (None, "setfacl -m u:5:rwx,g:6:r acl && getfacl -n acl"),
        (
            None,
            "setfacl -d -m u:5:rwx,g:6:r acl && mkdir acl/d && echo > acl/f && getfacl -n acl/d acl/f",
        ),
        (None, "setfacl -m u:1234:r mine && getfacl -n mine && chmod 600 mine && getfacl -n mine"),
        (
            None,
            "cp -p /bin/true prog && setcap cap_net_raw=ep prog && getcap prog && getcap -n prog",
        ),
        (Some(5), "stat -c '%u:%g %a' d/f && echo x > shared/by5 && stat -c '%u:%g %a' shared/by5"),
        (Some(5), "chmod 640 d/f && stat -c '%u:%g %a' d/f"),
        (Some(5), "mkdir shared/d5 && ln -s x shared/s5 && stat -c '%u:%g' shared/d5 shared/s5"),
        (Some(5), "touch setgid/by5 && mkdir setgid/d5 && stat -c '%u:%g %a' setgid/by5 setgid/d5"),
        (Some(5), "echo > acl/by5 && getfacl -n acl/by5"),
        (Some(5), "touch sticky/by5 && stat -c '%u:%g' sticky/by5"),
        (Some(6), "rm sticky/by5"),
        (Some(6), "chmod 600 d/f"),
        (Some(6), "cat d/f"),
        (Some(1000), "echo x >> mine && chgrp 1000 mine && stat -c '%u:%g %a' mine"),
        (Some(13), "echo y >> suid"),
        (None, "stat -c '%n %u:%g %a %s' suid mine d/f new new/f"),
    ]
}

/// Does it all and gives the record: exit status, output and what was said.
fn record(merged: &Path) -> Vec<String> {
    let act = |(user, script): (Option<u32>, &str)| {
        let script = match user {
            None => script.to_owned(),
            Some(id) => {
                format!("setpriv --reuid {id} --regid {id} --clear-groups sh -ec \"{script}\"")
            }
        };
        let out = in_container(merged, &format!("umask 022; {{ {script}; }} 2>&1"));
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        format!("{script}\n{}{:?}", text.replace(merged.to_str().unwrap(), ""), out.status.code())
    };
    acts().into_iter().map(act).collect()
}

// Every reply, every owner made or changed, ACLs and capabilities, done by a container's root and its users: as kernel
// overlay does on idmapped mounts. What lies in the upper layers has the container's ids in both.
#[test]
fn a_container_sees_its_ids_as_on_idmapped_kernel_overlay() {
    needs_root!();
    needs_kernel_overlay!();
    let mut sandbox = Sandbox::new();
    sandbox.layer(LAYER);
    let spec = sandbox.side(Kind::Lamina, "ours").option(OPTIONS);
    let ours = spec.mount();
    let theirs = Idmapped::mount(&sandbox, "theirs");
    let start = tree::now();
    let (one, other) = (record(ours.path()), record(&theirs.merged));
    for (one, other) in one.iter().zip(&other) {
        assert_eq!(one, other);
    }
    let seen = "d/f new new/f new/p mine setgid/f setgid/d shared/by5 outside";
    assert_eq!(show(ours.path(), seen), show(&theirs.merged, seen));
    assert!(show(ours.path(), "new/f").starts_with("new/f 100020:200021 644"));
    drop(theirs);
    let options = tree::Options { recent: Some(start), dir_times: false, ..Default::default() };
    let upper =
        |side: &str| tree::snapshot_with(sandbox.root().join(format!("upper-{side}")), options);
    let (ours_upper, theirs_upper) = (upper("ours"), upper("theirs"));
    assert_same("upper layers", &ours_upper, &theirs_upper);
    ours.unmount();
}

/// Runs a script in the mount as root of the machine; gives status and all it printed.
fn outside(dir: &Path, script: &str) -> String {
    let out = Command::new("sh")
        .args(["-c", &format!("umask 022; {{ {script}; }} 2>&1")])
        .env("LC_ALL", "C")
        .current_dir(dir)
        .output()
        .unwrap();
    String::from_utf8(out.stdout).unwrap()
}

// An engine prepares containers as root of the machine, whom the map does not have: what it makes belongs to nobody
// until it is given away, as with fuse-overlayfs. Somebody else without an id cannot make anything, as with the kernel.
#[test]
fn root_outside_of_the_map_makes_what_belongs_to_nobody() {
    needs_root!();
    let mut sandbox = Sandbox::new();
    sandbox.layer("dir tmp 1777");
    let mount = sandbox.spec(Kind::Lamina).option(OPTIONS).mount();
    let script = "mkdir tmp/d && touch tmp/d/f && stat -c '%n %u:%g' tmp/d tmp/d/f && \
                  chown 100000:200000 tmp/d && stat -c '%n %u:%g' tmp/d && chown 99999 tmp/d; \
                  chgrp 265536 tmp/d";
    let overflow = "Value too large for defined data type";
    assert_eq!(
        outside(mount.path(), script),
        format!(
            "tmp/d 165534:265534\ntmp/d/f 165534:265534\ntmp/d 100000:200000\n\
             chown: changing ownership of 'tmp/d': {overflow}\n\
             chgrp: changing group of 'tmp/d': {overflow}\n"
        )
    );
    let meta = fs::metadata(sandbox.upper().join("tmp/d/f")).unwrap();
    assert_eq!((meta.uid(), meta.gid()), (65534, 65534));
    let refused = as_user(4321, mount.path(), "touch tmp/x");
    assert!(said(&refused).contains(overflow), "{}", said(&refused));
    assert!(!sandbox.upper().join("tmp/x").exists());
}

// podman makes sure that its mountpoint is its own, also while the container runs: `podman diff` failed with what chown(2)
// said, and fuse-overlayfs gives the container's root to nobody.
#[test]
fn an_engine_may_give_the_root_the_owner_that_the_layer_says() {
    needs_root!();
    let mut sandbox = Sandbox::new();
    sandbox.layer("dir d 755");
    let mount = sandbox.spec(Kind::Lamina).option(OPTIONS).mount();
    let overflow = "Value too large for defined data type";
    assert_eq!(
        outside(
            mount.path(),
            "chown 0:0 . && stat -c %u:%g . ; chown 0:0 d; chown 1:0 .; stat -c %u:%g ."
        ),
        format!(
            "100000:200000\nchown: changing ownership of 'd': {overflow}\n\
             chown: changing ownership of '.': {overflow}\n100000:200000\n"
        )
    );
}

// A named user or group of an ACL that is nobody here matches nobody, not even the user with the overflow id.
#[test]
fn an_acl_entry_without_an_id_here_grants_nothing() {
    needs_root!();
    let mut sandbox = Sandbox::new();
    let layer = sandbox.layer("file f 600 secret\nfile g 600 open");
    sh(&layer, "setfacl -m u:70000:r f && setfacl -m u:5:r,u:70000:r g && chmod 711 .");
    sandbox.forget_seals();
    let mount = sandbox.spec(Kind::Lamina).option(OPTIONS).mount();
    assert!(!as_user(65534, mount.path(), "cat f").status.success());
    assert!(!as_user(70000, mount.path(), "cat f").status.success());
    assert!(as_user(100_005, mount.path(), "cat g").status.success());
    let listed = outside(mount.path(), "getfacl -cn f; getfacl -cn g; setfacl -m u:70000:r g");
    assert_eq!(
        listed,
        "user::rw-\ngroup::---\nmask::r--\nother::---\n\n\
         user::rw-\nuser:100005:r--\ngroup::---\nmask::r--\nother::---\n\n\
         setfacl: g: Value too large for defined data type\n"
    );
}

// Capabilities that name the root user of a namespace name the user whom the mount shows.
#[test]
fn capabilities_name_the_root_that_is_shown() {
    needs_root!();
    let mut sandbox = Sandbox::new();
    let layer = sandbox.layer("file v2 755 x\nfile v3 755 x\nfile foreign 755 x");
    sh(
        &layer,
        "setcap cap_net_raw=ep v2 && setcap -n 5 cap_net_raw=ep v3 && setcap -n 70000 cap_net_raw=ep foreign",
    );
    sandbox.forget_seals();
    let mount = sandbox.spec(Kind::Lamina).option(OPTIONS).mount();
    let script = "getcap -n v2 v3 foreign; setcap -n 100007 cap_net_raw=p v2 && getcap -n v2; \
                  setcap -n 100000 cap_net_raw=p v3 && getcap -n v3";
    assert_eq!(
        outside(mount.path(), script),
        "v2 cap_net_raw=ep\nv3 cap_net_raw=ep [rootid=100005]\nv2 cap_net_raw=p [rootid=100007]\n\
         v3 cap_net_raw=p\n"
    );
    let stored = outside(&sandbox.upper(), "getcap -n v2 v3");
    assert_eq!(stored, "v2 cap_net_raw=p [rootid=7]\nv3 cap_net_raw=p\n");
}

/// What `squash_to_*` shows and stores, for objects that are there, are made and are given away.
fn squashed(options: &str) -> (String, String) {
    let mut sandbox = Sandbox::new();
    sandbox.layer("file f 644 x\nowner f 5 6\ndir d 777\nowner d 7 8");
    let mount = sandbox.spec(Kind::Lamina).option(options).mount();
    let made = as_user(1000, mount.path(), "mkdir d/by1000 && stat -c '%u:%g' d/by1000");
    let script = "stat -c '%n %u:%g' f d; touch d/n && stat -c '%n %u:%g' d/n; chown 9:10 f; \
                  stat -c '%n %u:%g' f";
    let shown = String::from_utf8(made.stdout).unwrap() + &outside(mount.path(), script);
    let stored = outside(&sandbox.upper(), "stat -c '%n %u:%g' f d d/n d/by1000");
    (shown.replace('\n', " "), stored.replace('\n', " "))
}

#[test]
fn squashing_shows_one_owner() {
    needs_root!();
    let (shown, stored) = squashed("squash_to_root");
    assert_eq!(shown, "0:0 f 0:0 d 0:0 d/n 0:0 f 0:0 ");
    assert_eq!(stored, "f 0:0 d 7:8 d/n 0:0 d/by1000 0:0 ");
    let (shown, stored) = squashed("squash_to_uid=11,squash_to_gid=12");
    assert_eq!(shown, "11:12 f 11:12 d 11:12 d/n 11:12 f 11:12 ");
    assert_eq!(stored, "f 9:10 d 7:8 d/n 0:0 d/by1000 1000:1000 ");
    let (shown, stored) = squashed("squash_to_gid=12");
    assert_eq!(shown, "1000:12 f 5:12 d 7:12 d/n 0:12 f 9:12 ");
    assert_eq!(stored, "f 9:10 d 7:8 d/n 0:0 d/by1000 1000:1000 ");
    let (shown, stored) = squashed("squash_to_root=0");
    assert_eq!(shown, "1000:1000 f 5:6 d 7:8 d/n 0:0 f 9:10 ");
    assert_eq!(stored, "f 9:10 d 7:8 d/n 0:0 d/by1000 1000:1000 ");
}

/// The mount program of most hosts, if it is installed.
fn peer() -> Option<&'static str> {
    let path = "/usr/bin/fuse-overlayfs";
    Path::new(path).exists().then_some(path)
}

/// A mount that the peer serves.
struct Peer(PathBuf);

impl Peer {
    fn mount(program: &str, sandbox: &Sandbox, side: &str, options: &str) -> Peer {
        let mut spec = sandbox.side(Kind::Lamina, side);
        spec.options = vec![options.into()];
        let out = Command::new(program)
            .arg("-o")
            .arg(spec.option_text())
            .arg(&spec.merged)
            .output()
            .unwrap();
        assert!(out.status.success(), "{}", said(&out));
        Peer(spec.merged)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        if let Err(e) = rustix::mount::unmount(&self.0, UnmountFlags::DETACH) {
            eprintln!("{}: {e}", self.0.display());
        }
    }
}

/// Names, owners, modes and content of all that a mount shows, without times.
fn shown(dir: &Path) -> tree::Snapshot {
    let options = tree::Options {
        recent: Some(0),
        dir_times: false,
        check_ino: false,
        check_dots: false,
        ..Default::default()
    };
    let mut shown = tree::snapshot_with(dir, options);
    for entry in shown.entries.values_mut() {
        entry.clear("mtime");
        entry.clear("nlink");
    }
    shown
}

// What one program has written under a map, the other shows alike, and kernel overlay without a map the same ids unshifted.
#[test]
fn uppers_are_exchanged_with_fuse_overlayfs() {
    needs_root!();
    let Some(program) = peer() else { skip!("there is no fuse-overlayfs") };
    let mut sandbox = Sandbox::new();
    sandbox.layer(LAYER);
    let script = "rm -r d && mkdir d && echo x > d/new && chown 7:8 d/new && ln -s x d/s && \
                  chmod 4755 mine && mv root d/root && mkfifo d/p && rm s && touch by0";
    let ours = sandbox.side(Kind::Lamina, "ours").option(OPTIONS).mount();
    assert_eq!(said(&in_container(ours.path(), script)), "");
    let as_ours = shown(ours.path());
    ours.unmount();
    let theirs = Peer::mount(program, &sandbox, "theirs", OPTIONS);
    assert_eq!(said(&in_container(&theirs.0, script)), "");
    assert_same("ours and theirs", &as_ours, &shown(&theirs.0));
    drop(theirs);
    let read_back = Peer::mount(program, &sandbox, "ours", OPTIONS);
    assert_same("ours, as they read it", &as_ours, &shown(&read_back.0));
    drop(read_back);
    let read = sandbox.side(Kind::Lamina, "theirs").option(OPTIONS).mount();
    assert_same("theirs, as we read it", &as_ours, &shown(read.path()));
}

// Options of fuse-overlayfs that are neither ids nor I/O.
#[test]
fn small_options_have_their_meaning() {
    needs_root!();
    let mut sandbox = Sandbox::new();
    sandbox.layer("dir d/a\ndir d/b\nfile f 644 x\nxattr f user.x y");
    let with = |options: &str| sandbox.spec(Kind::Lamina).option(options).mount();
    let mount = with("static_nlink=0");
    assert_eq!(fs::metadata(mount.path().join("d")).unwrap().nlink(), 4);
    drop(mount);
    let mount = with("static_nlink");
    assert_eq!(fs::metadata(mount.path().join("d")).unwrap().nlink(), 1);
    drop(mount);
    let mount = with("noxattrs");
    let f = mount.path().join("f");
    let unsupported = Errno::OPNOTSUPP;
    assert_eq!(rustix::fs::lgetxattr(&f, "user.x", &mut [0; 9][..]).unwrap_err(), unsupported);
    assert_eq!(rustix::fs::llistxattr(&f, &mut [0; 99][..]).unwrap_err(), unsupported);
    let set = rustix::fs::lsetxattr(&f, "user.z", b"", XattrFlags::empty());
    assert_eq!(set.unwrap_err(), unsupported);
    assert_eq!(rustix::fs::lremovexattr(&f, "user.x").unwrap_err(), unsupported);
    // What is copied up keeps them all the same.
    sh(mount.path(), "chmod 600 f && cat f >/dev/null");
    drop(mount);
    let mount = with("noxattrs=0");
    assert_eq!(getx(mount.path().join("f"), "user.x").as_deref(), Some(&b"y"[..]));
    drop(mount);
    // Syncs succeed and are not made; there is no mark that keeps the upper from being used again.
    let mount = with("fsync=0");
    sh(mount.path(), "echo x > g && sync g .");
    assert!(!sandbox.work().join("work/incompat").exists());
    mount.remount().unmount();
}

// `timeout`: the kernel asks again once it is over; without it, never.
#[test]
fn timeout_bounds_what_the_kernel_keeps() {
    needs_root!();
    let mut sandbox = Sandbox::new();
    let layer = sandbox.layer("file f 644 x");
    for (options, expected) in
        [("timeout=0", 0o600), ("timeout=1000", 0o644), ("timeout=0.0", 0o600)]
    {
        fs::set_permissions(layer.join("f"), Permissions::from_mode(0o644)).unwrap();
        sandbox.forget_seals();
        let mount = sandbox.spec(Kind::Lamina).option(options).mount();
        let f = mount.path().join("f");
        assert_eq!(mode(&f), 0o644);
        // Behind the mount's back, which only shows whether it is asked again.
        fs::set_permissions(layer.join("f"), Permissions::from_mode(0o600)).unwrap();
        sandbox.forget_seals();
        assert_eq!(mode(&f), expected, "{options}");
        drop(mount);
    }
}
