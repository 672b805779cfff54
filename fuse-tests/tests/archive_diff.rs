//! What layers change, as archives and lists: applied again they are the same layer, walking both trees finds the same, and
//! the bytes are the same each time.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use fuse_tests::case::{nlink, put, sh, text, umount};
use fuse_tests::env;
use fuse_tests::fixture::{Kind, Mount, Sandbox};
use fuse_tests::tree::{self, snapshot};
use fuse_tests::{needs_kernel_overlay, needs_root};

fn lamina<S: AsRef<OsStr>>(arguments: &[S]) -> Output {
    Command::new(env::lamina()).args(arguments).output().unwrap()
}

#[track_caller]
fn run(words: &str, paths: &[&Path]) -> Vec<u8> {
    let mut arguments: Vec<&OsStr> = words.split(' ').map(OsStr::new).collect();
    arguments.extend(paths.iter().map(|path| path.as_os_str()));
    let out = lamina(&arguments);
    assert!(out.status.success(), "{words}: {}", String::from_utf8_lossy(&out.stderr));
    out.stdout
}

#[track_caller]
fn lines(words: &str, paths: &[&Path]) -> Vec<String> {
    String::from_utf8(run(words, paths)).unwrap().lines().map(str::to_owned).collect()
}

const BASE: &str = "
    file same
    file changed 644 old
    file gone/deep/file
    file dropped
    file moved/a 644 moved
    file moved/b
    file closed/old 644 old
    file closed/sub/old
    file becomes-dir
    file becomes-file/x
    file chmodded 644 data
    file touched
    dir empty
    file dir/a
    file dir/b
    symlink link same
    file hard1 644 hard
    link hard2 hard1
";

/// Changes of every kind, made through a mount.
const CHANGES: &str = "
    printf new >changed
    rm -r gone
    rm dropped
    rm -r closed && mkdir closed && printf new >closed/new && printf new >closed/old
    rm becomes-dir && mkdir becomes-dir && printf x >becomes-dir/in
    rm -r becomes-file && printf x >becomes-file
    chmod 600 chmodded
    touch -d @1234567890 touched
    rmdir empty
    printf x >dir/new
    rm dir/a
    ln -sfn other link
    mkdir -p added/deep/er && printf x >added/deep/er/f
    mkfifo pipe
    printf l >l1 && ln l1 l2 && ln l1 added/l3
    setfattr -n user.x -v y added
";

/// A stack with changes in its upper layer, made by kernel overlay.
fn changed(options: &[&str], script: &str) -> (Sandbox, Vec<u8>) {
    let mut s = Sandbox::new();
    s.layer(BASE);
    let mut spec = s.spec(Kind::Kernel);
    for option in options {
        spec = spec.option(option);
    }
    let mount = spec.mount();
    sh(mount.path(), &format!("set -e\n{script}"));
    mount.unmount();
    (s, Vec::new())
}

fn layers(s: &Sandbox) -> (PathBuf, PathBuf) {
    (s.lowers()[0].clone(), s.upper())
}

/// Applies an archive as a layer over the base, mounts both with the kernel, and compares with a tree.
#[track_caller]
fn shows(s: &Sandbox, archive: &Path, wanted: &tree::Snapshot) {
    let base = s.lowers()[0].clone();
    let layer = s.root().join("applied");
    run("layer apply --to", &[&layer, archive]);
    let empty = s.root().join("empty");
    std::fs::create_dir(&empty).unwrap();
    let merged = s.root().join("again");
    std::fs::create_dir(&merged).unwrap();
    let options = env::overlay_options(&[layer.clone(), base], None);
    env::mount_overlay(&options, &merged).unwrap();
    let seen = whole_seconds(snapshot(&merged));
    umount(&merged);
    tree::assert_same("the archive applied over the base", wanted, &seen);
}

/// Times as an archive has them, and no time for the root, which an archive does not have.
fn whole_seconds(mut tree: tree::Snapshot) -> tree::Snapshot {
    for (path, entry) in &mut tree.entries {
        let time = entry.get("mtime").split('.').next().unwrap_or_default().to_owned();
        entry.set("mtime", if path.as_os_str() == "." { "" } else { &time });
    }
    tree
}

fn merged_view(s: &Sandbox, mount: &Mount) -> tree::Snapshot {
    let _ = s;
    whole_seconds(snapshot(mount.path()))
}

#[test]
fn applied_over_the_base_it_is_the_changed_tree() {
    needs_root!();
    needs_kernel_overlay!();
    for options in
        [&[][..], &["redirect_dir=on"], &["redirect_dir=on", "metacopy=on"], &["index=on"]]
    {
        let script = format!("{CHANGES}\nmv moved renamed 2>/dev/null || true\nchmod 640 same\n");
        let (s, _) = changed(options, &script);
        let mut spec = s.spec(Kind::Kernel);
        for option in options {
            spec = spec.option(option);
        }
        let mount = spec.mount();
        let wanted = merged_view(&s, &mount);
        mount.unmount();
        let (base, upper) = layers(&s);
        let archive = s.root().join("layer.tar");
        run("layer diff --lower", &[&base, &upper, Path::new("-O"), &archive]);
        shows(&s, &archive, &wanted);
    }
}

#[test]
fn the_bytes_are_the_same_each_time_and_on_a_copy() {
    needs_root!();
    needs_kernel_overlay!();
    let (s, _) = changed(&[], CHANGES);
    let (base, upper) = layers(&s);
    let first = run("layer diff --lower", &[&base, &upper]);
    assert_eq!(first.len() % 512, 0);
    for _ in 0..3 {
        assert!(run("layer diff --lower", &[&base, &upper]) == first);
    }
    sh(s.root(), "cp -a upper copy 2>/dev/null || cp -a $(basename upper) copy");
    let copy = s.root().join("copy");
    assert!(run("layer diff --lower", &[&base, &copy]) == first, "listed in another order on disk");
    assert!(run("diff --tar", &[&base, &upper]) == first);
}

fn names(archive: &[u8], s: &Sandbox) -> Vec<String> {
    let path = s.root().join("listed.tar");
    std::fs::write(&path, archive).unwrap();
    sh(s.root(), "tar tf listed.tar").lines().map(str::to_owned).collect()
}

#[test]
fn whiteouts_come_before_their_siblings_and_only_where_they_hide() {
    needs_root!();
    needs_kernel_overlay!();
    let (s, _) = changed(&[], CHANGES);
    let (base, upper) = layers(&s);
    fuse_tests::case::whiteout(upper.join("hides-nothing"));
    let names = names(&run("layer diff --lower", &[&base, &upper]), &s);
    let at = |name: &str| {
        names.iter().position(|n| n == name).unwrap_or_else(|| panic!("{name}: {names:?}"))
    };
    assert!(!names.contains(&".wh.hides-nothing".to_owned()));
    assert!(at(".wh.dropped") < at("added/"));
    assert!(at("dir/") < at("dir/.wh.a") && at("dir/.wh.a") < at("dir/new"));
    assert_eq!(at("closed/") + 1, at("closed/.wh..wh..opq"));
    assert!(at("closed/.wh..wh..opq") < at("closed/new"));
    assert!(!names.iter().any(|n| n.starts_with("becomes-dir/.wh.")), "a file hides nothing in it");
    let unique: BTreeSet<_> = names.iter().collect();
    assert_eq!(unique.len(), names.len());
}

#[test]
fn hard_links_are_one_file_again() {
    needs_root!();
    needs_kernel_overlay!();
    let (s, _) = changed(&[], CHANGES);
    let (base, upper) = layers(&s);
    let archive = s.root().join("layer.tar");
    run("layer diff --lower", &[&base, &upper, Path::new("-O"), &archive]);
    let layer = s.root().join("applied");
    run("layer apply --to", &[&layer, &archive]);
    assert_eq!(nlink(layer.join("l1")), 3);
    assert_eq!(text(layer.join("added/l3")), "l");
}

#[test]
fn changes_are_what_happened() {
    needs_root!();
    needs_kernel_overlay!();
    let (s, _) = changed(&[], CHANGES);
    let (base, upper) = layers(&s);
    let found = lines("layer changes --lower", &[&base, &upper]);
    let wanted = [
        "A /added",
        "A /added/deep",
        "A /added/deep/er",
        "A /added/deep/er/f",
        "A /added/l3",
        "C /becomes-dir",
        "A /becomes-dir/in",
        "C /becomes-file",
        "C /changed",
        "C /chmodded",
        "D /closed",
        "A /closed/new",
        "C /closed/old",
        "C /dir",
        "D /dir/a",
        "A /dir/new",
        "D /dropped",
        "D /empty",
        "D /gone",
        "A /l1",
        "A /l2",
        "C /link",
        "A /pipe",
        "C /touched",
    ];
    assert_eq!(found, wanted);
    let json = String::from_utf8(run("layer changes --json --lower", &[&base, &upper])).unwrap();
    assert!(json.contains("{\"kind\":\"D\",\"path\":\"/dropped\"}"), "{json}");
    assert_eq!(lines("diff", &[&base, &upper]), wanted);
}

/// Walking both trees finds the same paths, but that what is deleted and made anew is a change to it.
#[test]
fn walking_both_trees_finds_the_same() {
    needs_root!();
    needs_kernel_overlay!();
    let (s, _) = changed(&[], CHANGES);
    let (base, upper) = layers(&s);
    let mount = s.mount(Kind::Kernel);
    let walked = lines("diff --walk", &[&base, mount.path()]);
    let archive = run("diff --walk --tar", &[&base, mount.path()]);
    let wanted = merged_view(&s, &mount);
    mount.unmount();
    let of = |lines: &[String]| -> BTreeSet<String> {
        let lines = lines.iter().filter(|line| !line.contains("/closed"));
        lines.cloned().collect()
    };
    let native = lines("layer changes --lower", &[&base, &upper]);
    assert_eq!(of(&walked), of(&native));
    assert!(walked.contains(&"D /closed/sub".to_owned()), "{walked:?}");
    let path = s.root().join("walked.tar");
    std::fs::write(&path, archive).unwrap();
    shows(&s, &path, &wanted);
}

#[test]
fn size_counts_each_file_once() {
    needs_root!();
    needs_kernel_overlay!();
    let (s, _) =
        changed(&[], "head -c 1000 /dev/zero >a; ln a b; head -c 24 /dev/zero >c; mkdir d");
    let (base, upper) = layers(&s);
    assert_eq!(lines("layer diff-size --lower", &[&base, &upper]), ["1024"]);
}

#[test]
fn ids_are_unmapped() {
    needs_root!();
    needs_kernel_overlay!();
    let (s, _) = changed(&[], "printf x >a; chown 100005:100006 a");
    let (base, upper) = layers(&s);
    let mapped = run("layer diff --uidmap 0:100000:10 --uidmap 10:0:1 --lower", &[&base, &upper]);
    std::fs::write(s.root().join("a.tar"), mapped).unwrap();
    let listed = sh(s.root(), "tar --numeric-owner -tvf a.tar");
    assert!(listed.contains(" 5/6 "), "{listed}");
    let out = lamina(&["layer", "diff", "--uidmap", "0:500000:10", upper.to_str().unwrap()]);
    assert_eq!(out.status.code(), Some(1));
}

#[test]
fn a_layer_with_forced_modes_gives_the_true_ones() {
    needs_root!();
    let s = Sandbox::new();
    let work = s.root().join("tree");
    std::fs::create_dir(&work).unwrap();
    sh(
        &work,
        "mkdir d; printf x >d/f; chown 7:8 d/f; chmod 4711 d/f; mknod c c 9 3; chmod 620 c; \
         printf x >cap; setfattr -n security.capability -v 0x0100000200200000000000000000000000000000 cap; \
         tar --xattrs --xattrs-include='*' -cf ../a.tar .",
    );
    let layer = s.root().join("layer");
    run("layer apply --force-mask shared --to", &[&layer, &s.root().join("a.tar")]);
    let archive = run("layer diff", &[&layer]);
    std::fs::write(s.root().join("b.tar"), archive).unwrap();
    let listed = sh(s.root(), "tar --numeric-owner -tvf b.tar");
    assert!(listed.contains("-rws--x--x 7/8 "), "{listed}");
    let told = sh(s.root(), "grep -a -o 'SCHILY.xattr.[a-z._]*' b.tar");
    assert_eq!(told.trim(), "SCHILY.xattr.security.capability");
    // Where the owner says nothing, so does the capability: it is kept as mounts read it.
    let kept = sh(&layer, "getfattr -d -m - -e hex cap");
    assert!(kept.contains("user.containers.override_security.capability=0x01000002"), "{kept}");
    assert!(listed.contains("crw--w---- 0/0 ") && listed.contains(" 9,3 "), "{listed}");
}

/// An upper with overrides is told of by what its xattrs say, in archives, lists and comparisons alike.
#[test]
fn an_upper_with_overrides_gives_what_the_mount_shows() {
    needs_root!();
    needs_kernel_overlay!();
    let mut s = Sandbox::new();
    s.layer(BASE);
    let mount = s.spec(Kind::Lamina).option("xattr_permissions=2").mount();
    sh(
        mount.path(),
        &format!(
            "set -e\n{CHANGES}\nchown 7:8 changed; chmod 4711 changed; mkdir owned; chown 5:6 owned; chmod 2750 owned\n\
             mknod char c 1 3; chown 3:4 char; chmod 620 char; mknod block b 8 1; ln -s moved/a sym\n\
             echo more >>moved/a"
        ),
    );
    let mut wanted = merged_view(&s, &mount);
    // No archive has it.
    wanted.entries.get_mut(Path::new(".")).unwrap().set("mode", "0755");
    mount.unmount();
    let (base, upper) = layers(&s);
    assert!(fuse_tests::case::getx(&upper, "user.containers.override_stat").is_some());
    let archive = s.root().join("a.tar");
    run("layer diff -O", &[&archive, Path::new("--lower"), &base, &upper]);
    assert!(!std::fs::read(&archive).unwrap().windows(13).any(|text| text == b"override_stat"));
    shows(&s, &archive, &wanted);
    let changes = lines("layer changes --lower", &[&base, &upper]);
    let has = |line: &str| changes.iter().any(|found| found == line);
    assert!(has("C /changed") && has("A /char") && has("C /moved/a"), "{changes:?}");
    // Copied up only to hold a change: its owner and mode are those beneath.
    assert!(!has("C /moved"), "{changes:?}");
}

#[test]
fn files_that_hide_are_written_as_such_and_marks_are_not_content() {
    needs_root!();
    let mut s = Sandbox::new();
    s.layer("file a\nfile d/old");
    let upper = s.upper();
    put(upper.join(".wh.a"), "");
    put(upper.join("d/.wh..wh..opq"), "");
    put(upper.join("d/new"), "");
    let base = s.lowers()[0].clone();
    let names = names(&run("layer diff --lower", &[&base, &upper]), &s);
    assert_eq!(names, [".wh.a", "d/", "d/.wh..wh..opq", "d/new"]);
}

fn mounts(upper: &Path, base: &Path, extra: &str) -> Vec<String> {
    let (upper, base) = (upper.display(), base.display());
    vec![
        "diff".into(),
        "--lower-mounts".into(),
        format!("[{{\"type\":\"bind\",\"source\":\"{base}\",\"options\":[\"rbind\",\"ro\"]}}]"),
        "--upper-mounts".into(),
        format!(
            "[{{\"type\":\"overlay\",\"source\":\"overlay\",\"options\":[\"index=off\"{extra},\"workdir=/w\",\
             \"upperdir={upper}\",\"lowerdir={base}\"]}}]"
        ),
    ]
}

#[test]
fn buildkit_gets_its_own_list() {
    needs_root!();
    needs_kernel_overlay!();
    let (s, _) = changed(&[], CHANGES);
    let (base, upper) = layers(&s);
    let out = lamina(&mounts(&upper, &base, ",\"userxattr\""));
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let found = String::from_utf8(out.stdout).unwrap();
    let found: Vec<&str> = found.lines().collect();
    // An opaque directory is compared with what it hides; directories that only hold changes are left out.
    let wanted = [
        "A /added",
        "A /added/deep",
        "A /added/deep/er",
        "A /added/deep/er/f",
        "A /added/l3",
        "C /becomes-dir",
        "A /becomes-dir/in",
        "C /becomes-file",
        "C /changed",
        "C /chmodded",
        "A /closed/new",
        "C /closed/old",
        "D /closed/sub",
        "D /dir/a",
        "A /dir/new",
        "D /dropped",
        "D /empty",
        "D /gone",
        "A /l1",
        "A /l2",
        "C /link",
        "A /pipe",
        "C /touched",
    ];
    assert_eq!(found, wanted);
    let mut tar = mounts(&upper, &base, "");
    tar.push("--tar".into());
    let out = lamina(&tar);
    assert!(out.status.success());
    let names = names(&out.stdout, &s);
    assert!(
        names.contains(&"closed/.wh.sub".to_owned()) && names.contains(&"dir/".to_owned()),
        "{names:?}"
    );
    assert!(!names.contains(&"closed/.wh..wh..opq".to_owned()));
}

#[test]
fn mounts_that_are_not_one_layer_apart_are_told_by_the_exit_code() {
    needs_root!();
    needs_kernel_overlay!();
    let (s, _) = changed(&["redirect_dir=on"], "mv moved elsewhere");
    let (base, upper) = layers(&s);
    let out = lamina(&mounts(&upper, &base, ""));
    assert_eq!(out.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&out.stderr).contains("redirect"));
    let out = lamina(&mounts(&upper, &base, ",\"xino=on\""));
    assert_eq!(out.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&out.stderr).contains("xino=on"));
}

/// The cost follows the layer: nothing is looked up beneath but what stands where the layer has a directory or a mark.
#[test]
fn the_layers_beneath_are_hardly_touched() {
    needs_root!();
    if Command::new("strace").arg("-V").output().is_err() {
        fuse_tests::skip!("needs strace");
    }
    let mut s = Sandbox::new();
    let lower: String = (0..2000).map(|n| format!("file d{}/f{n}\n", n % 10)).collect();
    let base = s.layer(&lower);
    let upper = s.upper();
    put(upper.join("d1/f1"), "changed");
    let log = s.root().join("calls");
    let out = Command::new("strace")
        .args(["-f", "-qq", "-o"])
        .arg(&log)
        .arg(env::lamina())
        .args(["layer", "diff", "-O", "/dev/null", "--lower"])
        .arg(&base)
        .arg(&upper)
        .output()
        .unwrap();
    assert!(out.status.success());
    let calls = text(&log);
    let stats = calls.lines().filter(|line| line.contains("statx(")).count();
    assert!(stats < 60, "{stats} statx calls");
}
