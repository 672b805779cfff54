//! Archives that mean harm, by name: whatever one says, nothing outside of the layer changes, the program does not panic,
//! and a layer appears whole or not at all.

use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use fuse_tests::case::{gone, names, text};
use fuse_tests::env::{self, Base};
use fuse_tests::skip;
use fuse_tests::tarball::{Item, Tar};
use fuse_tests::tree::{self, Options, snapshot_with};
use laminafs::archive::{ApplyOptions, Limits, Whiteouts};

/// What must come of an archive.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Outcome {
    /// The layer appears.
    Taken,
    /// It does not; the message has this text.
    Refused(&'static str),
}

use Outcome::{Refused, Taken};

/// A directory with a layer to be, something to hit beside it, and what that was before.
struct Trap {
    dir: PathBuf,
    _base: std::sync::Arc<Base>,
}

impl Trap {
    fn new() -> Trap {
        let base = Base::get();
        let dir = base.unique("hostile");
        std::fs::create_dir_all(dir.join("beside/d")).unwrap();
        std::fs::write(dir.join("beside/victim"), "untouched").unwrap();
        std::fs::write(dir.join("victim"), "untouched").unwrap();
        Trap { dir, _base: base }
    }

    fn layer(&self) -> PathBuf {
        self.dir.join("layer")
    }

    fn apply(&self, archive: &[u8], arguments: &[&str]) -> Output {
        apply(&self.layer(), archive, arguments)
    }

    /// Everything but the layer, which may be deeper than a snapshot goes.
    fn surroundings(&self) -> tree::Snapshot {
        let options = Options { identity: true, ..Options::default() };
        let mut seen = snapshot_with(self.dir.join("beside"), options);
        let mut around = tree::Entry::default();
        let beside = names(&self.dir).into_iter().filter(|name| name != "layer");
        around.set("names", beside.collect::<Vec<_>>().join(" "));
        let victim = std::fs::symlink_metadata(self.dir.join("victim")).unwrap();
        around.set("victim", format!("{} {:?}", victim.ino(), victim.modified().unwrap()));
        around.set("content", text(self.dir.join("victim")));
        seen.entries.insert("around".into(), around);
        seen
    }
}

impl Drop for Trap {
    fn drop(&mut self) {
        let _ = Command::new("rm").arg("-rf").arg(&self.dir).status();
    }
}

fn apply(layer: &Path, archive: &[u8], arguments: &[&str]) -> Output {
    let mut child = Command::new(env::lamina())
        .args(["layer", "apply", "--to"])
        .arg(layer)
        // An ordinary user gives nothing away; whose the files are is not what is tested.
        .args((!env::is_root()).then_some("--ignore-chown-errors"))
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // It may end before it has read all.
    let _ = child.stdin.take().unwrap().write_all(archive);
    child.wait_with_output().unwrap()
}

/// Applies in every form of whiteouts and looks at what is around.
#[track_caller]
fn check(archive: &[u8], outcome: Outcome) {
    check_with(archive, outcome, &[]);
}

#[track_caller]
fn check_with(archive: &[u8], outcome: Outcome, arguments: &[&str]) {
    if !env::is_root() {
        skip!(
            "needs root, also of a user namespace: files are given to the owners that the archive names"
        );
    }
    for form in ["overlay", "files", "flat"] {
        let trap = Trap::new();
        let before = trap.surroundings();
        let out = trap.apply(archive, &[&["--whiteouts", form], arguments].concat());
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(!said.contains("panicked"), "{form}: {said}");
        tree::assert_same("what lies around the layer", &before, &trap.surroundings());
        match outcome {
            Taken => {
                assert!(out.status.success(), "{form}: {said}");
                assert!(trap.layer().is_dir());
            }
            Refused(why) => {
                assert_eq!(out.status.code(), Some(1), "{form}: {said}");
                assert!(said.contains(why), "{form}: {said}");
                assert_eq!(said.lines().count(), 1, "{form}: {said}");
                gone(trap.layer());
            }
        }
        let left: Vec<_> = names(&trap.dir).into_iter().filter(|n| n.starts_with('.')).collect();
        assert!(left.is_empty(), "{form}: {left:?}");
    }
}

macro_rules! hostile {
    ($($name:ident: $outcome:expr, $items:expr;)*) => {
        $(#[test] fn $name() { check(&Tar::of($items), $outcome); })*
    };
}

const OUT: &str = "leads out of the layer";
const LINK_OUT: &str = "is a link to something outside of the layer";
const MISSING: &str = "is a link to something that the archive does not have";
const BENEATH: &str = "lies beneath what is no directory";

hostile! {
    an_absolute_name_lands_in_the_layer: Taken, [Item::file("/etc/passwd", "x")];
    dot_dot_leads_out: Refused(OUT), [Item::file("../victim", "x")];
    dot_dot_behind_a_slash_leads_out: Refused(OUT), [Item::file("/../victim", "x")];
    dot_dot_after_a_directory_leads_out: Refused(OUT), [Item::dir("a"), Item::file("a/../../victim", "x")];
    dot_dot_within_is_taken: Taken, [Item::file("a/../b", "x")];
    dot_dot_alone: Refused(OUT), [Item::dir("..")];
    a_file_for_the_layer_itself: Refused("takes the place of the layer itself"), [Item::file("./", "x")];
    a_symlink_for_the_layer_itself: Refused("takes the place of the layer itself"), [Item::symlink(".", "/")];
    a_symlink_swapped_for_a_parent: Refused(BENEATH), [Item::symlink("a", "/tmp"), Item::file("a/victim", "x")];
    a_directory_swapped_for_a_symlink: Refused(BENEATH),
        [Item::dir("a"), Item::file("a/b", "x"), Item::symlink("a", "beside"), Item::file("a/victim", "x")];
    a_symlink_out_by_dot_dot: Refused(LINK_OUT), [Item::symlink("a", "../victim")];
    a_symlink_out_from_a_directory: Refused(LINK_OUT), [Item::symlink("a/b/c", "../../../victim")];
    a_symlink_out_by_an_absolute_path: Refused(LINK_OUT), [Item::symlink("a", "/../victim")];
    an_absolute_symlink_is_only_a_text: Taken, [Item::symlink("a", "/etc/passwd")];
    a_file_over_a_symlink_replaces_it: Taken, [Item::symlink("victim", "/etc/hostname"), Item::file("victim", "x")];
    a_directory_over_a_symlink_replaces_it: Taken,
        [Item::symlink("a", "/tmp"), Item::dir("a"), Item::file("a/victim", "x")];
    a_chain_of_symlinks: Refused(BENEATH),
        [Item::symlink("a", "b"), Item::symlink("b", "/tmp"), Item::file("a/x", "x")];
    a_symlink_to_itself: Refused(BENEATH), [Item::symlink("a", "a"), Item::file("a/x", "x")];
    a_hard_link_out: Refused(LINK_OUT), [Item::hard_link("a", "../victim")];
    a_hard_link_to_an_absolute_path: Refused(MISSING), [Item::hard_link("a", "/etc/passwd")];
    a_hard_link_through_a_symlink: Refused(MISSING),
        [Item::symlink("a", "/etc"), Item::hard_link("b", "a/passwd")];
    a_hard_link_to_what_comes_later: Refused(MISSING), [Item::hard_link("a", "b"), Item::file("b", "x")];
    a_hard_link_to_a_directory: Refused("is a hard link to a directory"), [Item::dir("d"), Item::hard_link("a", "d")];
    a_hard_link_to_the_layer: Refused(MISSING), [Item::hard_link("a", "/")];
    a_hard_link_to_itself: Taken, [Item::file("a", "x"), Item::hard_link("a", "a")];
    a_hard_link_to_nothing: Refused(MISSING), [Item::hard_link("a", "")];
    a_hard_link_over_its_own_directory: Refused("is a link to something that it replaces"),
        [Item::file("d/a", "x"), Item::hard_link("d", "d/a")];
    a_hard_link_to_a_symlink_does_not_follow_it: Taken,
        [Item::symlink("a", "/etc/passwd"), Item::hard_link("b", "a"), Item::file("b", "x")];
    a_whiteout_of_the_layer: Refused("is a whiteout of no name"), [Item::file(".wh..", "")];
    a_whiteout_of_the_parent: Refused("is a whiteout of no name"), [Item::file("a/.wh...", "")];
    a_whiteout_of_no_name: Refused("is a whiteout of no name"), [Item::file("a/.wh.", "")];
    a_whiteout_through_a_symlink: Refused(BENEATH), [Item::symlink("a", "/tmp"), Item::file("a/.wh.victim", "")];
    an_opaque_mark_through_a_symlink: Refused(BENEATH),
        [Item::symlink("a", "/tmp"), Item::file("a/.wh..wh..opq", "")];
    an_entry_beneath_a_whiteout_name: Refused("lies in a whiteout"), [Item::file(".wh.a/b", "x")];
    names_that_aufs_kept_for_itself: Taken,
        [Item::dir(".wh..wh.plnk"), Item::file(".wh..wh.plnk/1.2", "x"), Item::file(".wh..wh.aufs", "")];
    a_link_into_what_aufs_kept: Refused(MISSING),
        [Item::file(".wh..wh.plnk/1.2", "x"), Item::hard_link("a", ".wh..wh.plnk/1.2")];
    a_link_to_a_whiteout: Refused(MISSING), [Item::file(".wh.a", ""), Item::hard_link("b", ".wh.a")];
    a_file_beneath_a_file: Refused(BENEATH), [Item::file("a", "x"), Item::file("a/b", "x")];
    a_file_beneath_a_device: Refused(BENEATH),
        [Item::new(b'6', "a"), Item::file("a/b", "x")];
    a_name_with_an_empty_path: Refused("has no name"), [Item::file("", "x")];
    a_name_of_255_bytes: Taken, [Item::file("n".repeat(255), "x")];
    a_name_of_256_bytes: Refused("File name too long"), [Item::file("n".repeat(256), "x")];
    a_path_longer_than_the_kernel_takes: Taken, [Item::file(format!("{}f", "dir/".repeat(2000)), "x")];
    a_path_deeper_than_the_bound: Refused("lies deeper"), [Item::file(format!("{}f", "d/".repeat(5000)), "x")];
    a_type_that_nobody_knows: Refused("has a type that is not known"), [Item::new(b'Z', "a")];
    a_device_with_a_huge_number: Refused("has a device number that is too large"),
        [Item::new(b'4', "a").patch(329, b"\x80\0\0\x01\0\0\0\0")];
    an_owner_that_is_no_number: Refused("belongs to somebody who has no id here"),
        [Item::file("a", "x").patch(108, b"\x80\0\0\0\xff\xff\xff\xff")];
    an_owner_below_zero: Refused("has a negative number"),
        [Item::file("a", "x").patch(108, b"\xff\xff\xff\xff\xff\xff\xff\xff")];
    a_size_below_zero: Refused("has a negative number"),
        [Item::file("a", "x").size(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff")];
    a_size_beyond_63_bits: Refused("has a number that is too large"),
        [Item::file("a", "x").size(b"\x80\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff")];
    a_size_of_exbibytes: Refused("larger than the bound"),
        [Item::file("a", "x").size(b"\x80\0\0\0\x10\0\0\0\0\0\0\0")];
    a_size_that_is_no_number: Refused("is not octal"), [Item::file("a", "x").size(b"999999999999")];
    a_pax_header_of_gibibytes: Refused("header larger than the bound"),
        [Item::new(b'x', "p").size(b"\x80\0\0\0\0\0\0\0\x40\0\0\0")];
    a_long_name_of_gibibytes: Refused("header larger than the bound"),
        [Item::new(b'L', "p").size(b"\x80\0\0\0\0\0\0\0\x40\0\0\0").gnu()];
    pax_headers_without_end: Refused("header larger than the bound"),
        std::iter::repeat_n(Item::pax(&[("comment", &[b'c'; 60_000])]), 20);
    a_pax_path_that_leads_out: Refused(OUT), [Item::pax(&[("path", b"../../victim")]), Item::file("a", "x")];
    a_pax_link_that_leads_out: Refused(LINK_OUT),
        [Item::pax(&[("linkpath", b"../victim")]), Item::hard_link("a", "b")];
    a_pax_path_with_a_nul: Refused("NUL"), [Item::pax(&[("path", b"a\0b")]), Item::file("a", "x")];
    a_pax_size_below_zero: Refused("pax number"), [Item::pax(&[("size", b"-1")]), Item::file("a", "x")];
    a_pax_size_that_eats_the_archive: Refused("is cut off"),
        [Item::pax(&[("size", b"1000000")]), Item::file("a", "x"), Item::file("b", "x")];
    a_pax_record_longer_than_its_header: Refused("malformed pax"),
        [Item::new(b'x', "p").data("99999 path=a\n"), Item::file("a", "x")];
    pax_records_for_nothing: Refused("that does not come"), [Item::pax(&[("path", b"a")])];
    a_time_beyond_all_clocks: Taken, [Item::pax(&[("mtime", b"1e9")]).data("20 mtime=4000000000\n"), Item::file("a", "x")];
    an_xattr_that_would_be_a_mark_is_stored_escaped: Taken,
        [Item::pax(&[("SCHILY.xattr.user.overlay.opaque", b"y")]), Item::dir("a")];
    an_override_that_is_malformed: Refused("override xattr"),
        [Item::pax(&[("SCHILY.xattr.user.containers.override_stat", b"x:y:z")]), Item::file("a", "x")];
    sparse_parts_that_overlap: Refused("overlap"),
        [Item::pax(&[("GNU.sparse.size", b"100"), ("GNU.sparse.map", b"0,5,3,5")]), Item::file("a", "0123456789")];
    sparse_parts_beyond_the_end: Refused("beyond its end"),
        [Item::pax(&[("GNU.sparse.size", b"9"), ("GNU.sparse.map", b"0,10")]), Item::file("a", "0123456789")];
    sparse_parts_without_data: Refused("than its sparse parts need"),
        [Item::pax(&[("GNU.sparse.size", b"100"), ("GNU.sparse.map", b"0,50")]), Item::file("a", "0123456789")];
    a_hole_of_exbibytes: Refused("larger than the bound"),
        [Item::pax(&[("GNU.sparse.size", b"1000000000000000000"), ("GNU.sparse.map", b"0,1")]), Item::file("a", "0")];
    a_sparse_map_that_never_ends: Refused("malformed sparse map"),
        [Item::pax(&[("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0"), ("GNU.sparse.realsize", b"9")]),
         Item::file("a", "999999999\n".repeat(100))];
    a_file_that_is_a_directory_later: Taken, [Item::file("a", "x"), Item::dir("a"), Item::file("a/b", "x")];
    a_directory_that_is_a_file_later: Taken,
        [Item::dir("a"), Item::file("a/b/c", "x"), Item::dir("a/d"), Item::file("a", "x")];
    a_file_that_comes_twice: Taken, [Item::file("a", "long content"), Item::file("a", "short")];
    a_directory_without_permissions: Taken, [Item::dir("a").mode(0), Item::file("a/b", "x")];
}

#[test]
fn a_header_that_is_damaged() {
    let mut archive = Tar::of([Item::file("a", "x")]);
    archive[0] = b'b';
    check(&archive, Refused("wrong header checksum"));
}

#[test]
fn an_archive_that_is_none() {
    check(&vec![b'x'; 4096], Refused("is no tar header"));
    check(b"", Taken);
    check(b"short", Refused("is cut off"));
}

#[test]
fn an_archive_that_is_cut_off() {
    let mut tar = Tar::new();
    tar.push(&Item::file("a", "x".repeat(2000)));
    let bytes = tar.cut();
    check(&bytes[..1000], Refused("is cut off"));
    check(&bytes[..700], Refused("is cut off"));
    check(&bytes[..100], Refused("is cut off"));
}

#[test]
fn zeros_in_the_middle() {
    let mut tar = Tar::new();
    tar.push(&Item::file("a", "x"));
    tar.raw(&[0; 512]);
    tar.push(&Item::file("b", "x"));
    check(&tar.end(), Refused("is more than padding"));
}

#[test]
fn a_bomb() {
    let base = Base::get();
    let dir = base.unique("bomb");
    std::fs::create_dir(&dir).unwrap();
    let status = Command::new("sh")
        .args(["-c", "head -c 64M /dev/zero >zeros && tar cf - zeros | gzip -1 >bomb.gz; rm zeros"])
        .current_dir(&dir)
        .status()
        .unwrap();
    assert!(status.success());
    let bomb = std::fs::read(dir.join("bomb.gz")).unwrap();
    std::fs::remove_dir_all(&dir).unwrap();
    assert!(bomb.len() < 1 << 20);
    check_with(&bomb, Refused("larger than the bound"), &["--max-size", "1000000"]);
}

#[test]
fn the_wrong_digest() {
    let archive = Tar::of([Item::file("a", "x")]);
    let zeros = "0".repeat(64);
    check_with(&archive, Refused("the digest is sha256:"), &["--digest", &zeros]);
    check_with(&archive, Refused("the digest of the unpacked"), &["--diff-id", &zeros]);
    check_with(&archive, Refused("the size is"), &["--size", "7"]);
}

#[test]
fn what_follows_the_archive_is_read_for_the_digest() {
    let mut archive = Tar::of([Item::file("a", "x")]);
    archive.extend_from_slice(&[0; 5120]);
    check(&archive, Taken);
}

/// Somebody swaps directories of the layer for symlinks while it is filled.
#[test]
fn somebody_swaps_a_directory_for_a_symlink_meanwhile() {
    let trap = Trap::new();
    let mut before = trap.surroundings();
    let items = (0..3000).map(|n| Item::file(format!("d{}/f{n}", n % 7), "x"));
    let archive = Tar::of(items);
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                let Ok(entries) = std::fs::read_dir(&trap.dir) else { continue };
                for entry in entries.flatten() {
                    if !entry.file_name().to_string_lossy().starts_with(".lamina-stage") {
                        continue;
                    }
                    for n in 0..7 {
                        let dir = entry.path().join(format!("d{n}"));
                        let aside = entry.path().join(format!("aside{n}"));
                        if std::fs::rename(&dir, &aside).is_ok() {
                            let _ = std::os::unix::fs::symlink(trap.dir.join("beside"), &dir);
                        }
                    }
                }
            }
        });
        let out = trap.apply(&archive, &["--whiteouts", "files"]);
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(!String::from_utf8_lossy(&out.stderr).contains("panicked"));
    });
    let mut after = trap.surroundings();
    // Removing what was unpacked may fail under such a hand; the names of the stage do not count.
    for seen in [&mut before, &mut after] {
        seen.entries.get_mut(Path::new("around")).unwrap().clear("names");
    }
    tree::assert_same("what lies around the layer", &before, &after);
    assert_eq!(text(trap.dir.join("beside/victim")), "untouched");
}

/// Applies by the library, with bounds that a test can reach.
fn refusal(archive: &[u8], whiteouts: Whiteouts, limits: Limits) -> String {
    let trap = Trap::new();
    std::fs::create_dir(trap.layer()).unwrap();
    let root = std::os::fd::OwnedFd::from(std::fs::File::open(trap.layer()).unwrap());
    let options =
        ApplyOptions { limits, whiteouts, ignore_chown_errors: true, ..ApplyOptions::default() };
    laminafs::archive::apply(root, trap.layer(), archive, &options).unwrap_err().to_string()
}

#[test]
fn directories_that_fill_the_memory() {
    let value = [b'v'; 1000];
    let dirs = (0..3000).flat_map(|n| {
        [Item::pax(&[("SCHILY.xattr.user.a", &value[..])]), Item::dir(format!("d{n}"))]
    });
    let limits = Limits { meta_max: 2000, ..Limits::default() };
    let error = refusal(&Tar::of(dirs), Whiteouts::Overlay, limits);
    assert!(error.contains("more memory for directories"), "{error}");
}

/// A whole tree keeps in mind what came, with all that lies above it: each of these has 500 directories.
#[test]
fn deep_paths_that_fill_the_memory() {
    let files = (0..20).map(|n| Item::file(format!("{n}/{}f", "d/".repeat(500)), "x"));
    let limits = Limits { meta_max: 2000, ..Limits::default() };
    let error = refusal(&Tar::of(files), Whiteouts::Flat, limits);
    assert!(error.contains("more memory for directories"), "{error}");
}

#[test]
fn deep_paths_that_fill_the_disk() {
    let files = (0..5).map(|n| Item::file(format!("{n}/{}f", "d/".repeat(500)), "x"));
    let archive = Tar::of(files);
    let limits = Limits { entries_max: 2000, ..Limits::default() };
    let error = refusal(&archive, Whiteouts::Files, limits);
    assert!(error.contains("needs more directories than the bound allows"), "{error}");
}
