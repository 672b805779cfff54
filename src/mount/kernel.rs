//! Kernel overlayfs mounts of any number of layers at any path length.
//!
//! Layers are given to the kernel by descriptor (fsconfig(2) `lowerdir+`), or by the short path of
//! one where it takes only text, so neither the page of mount(2) nor the 256 bytes of a string are
//! in the way and no path is escaped. Without those calls mount(2) is used: a thread of its own
//! goes to `/proc/self/fd`, from where 500 layers are 500 numbers.

use std::ffi::CString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::sched::CloneFlags;
use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, fsconfig_create,
    fsconfig_set_fd, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount,
};

use crate::error::{Errno, Error, Result};
use crate::options::show_path;

/// One layer of a mount.
#[derive(Debug)]
pub struct LayerDir {
    /// The directory.
    pub dir: OwnedFd,
    /// Its path, for what the mount table shows.
    pub path: PathBuf,
}

/// A kernel overlay that is wanted.
#[derive(Debug)]
pub struct Overlay<'a> {
    /// Layers that are only read, topmost first; two at least if there is no upper.
    pub lowers: &'a [LayerDir],
    /// Upper and work directory.
    pub upper: Option<(&'a LayerDir, &'a LayerDir)>,
    /// Mount options: flags of mount(8), and options of overlayfs as they are.
    pub options: &'a [String],
}

/// By which calls a mount is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Api {
    /// fsopen(2) and its kin.
    New,
    /// mount(2).
    Old,
}

/// Options of a mount, sorted by who takes them.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Sorted {
    attributes: MountAttrFlags,
    flags: MountFlags,
    /// Key, and value if it has one.
    own: Vec<(String, Option<String>)>,
}

/// Words that say how a mount spreads or what is the default; they change nothing here.
const WITHOUT_EFFECT: [&str; 24] = [
    "",
    "rw",
    "suid",
    "dev",
    "exec",
    "async",
    "sync",
    "dirsync",
    "atime",
    "diratime",
    "norelatime",
    "nostrictatime",
    "defaults",
    "bind",
    "rbind",
    "private",
    "rprivate",
    "shared",
    "rshared",
    "slave",
    "rslave",
    "unbindable",
    "runbindable",
    "remount",
];

fn sort(options: &[String]) -> Sorted {
    let mut sorted =
        Sorted { attributes: MountAttrFlags::empty(), flags: MountFlags::empty(), own: Vec::new() };
    for option in options {
        let (attribute, flag) = match option.as_str() {
            "ro" => (MountAttrFlags::MOUNT_ATTR_RDONLY, MountFlags::RDONLY),
            "nosuid" => (MountAttrFlags::MOUNT_ATTR_NOSUID, MountFlags::NOSUID),
            "nodev" => (MountAttrFlags::MOUNT_ATTR_NODEV, MountFlags::NODEV),
            "noexec" => (MountAttrFlags::MOUNT_ATTR_NOEXEC, MountFlags::NOEXEC),
            "noatime" => (MountAttrFlags::MOUNT_ATTR_NOATIME, MountFlags::NOATIME),
            "nodiratime" => (MountAttrFlags::MOUNT_ATTR_NODIRATIME, MountFlags::NODIRATIME),
            "relatime" => (MountAttrFlags::empty(), MountFlags::RELATIME),
            "strictatime" => (MountAttrFlags::MOUNT_ATTR_STRICTATIME, MountFlags::STRICTATIME),
            word if WITHOUT_EFFECT.contains(&word) => continue,
            word => {
                let (key, value) = match word.split_once('=') {
                    Some((key, value)) => (key, Some(value.to_owned())),
                    None => (word, None),
                };
                sorted.own.push((key.to_owned(), value));
                continue;
            }
        };
        sorted.attributes |= attribute;
        sorted.flags |= flag;
    }
    sorted
}

/// Mounts at `target`, and says by which calls.
///
/// # Errors
/// What the kernel says, with its own words where it has some.
pub fn mount(overlay: &Overlay<'_>, target: &Path) -> Result<Api> {
    match detached(overlay) {
        Ok(mount) => {
            attach(&mount, target)?;
            Ok(Api::New)
        }
        Err(Failed::NoApi) => mount_old(overlay, target).map(|()| Api::Old),
        Err(Failed::Mount(error)) => Err(error),
    }
}

/// Makes a mount that is nowhere yet; its descriptor is that of its root.
///
/// # Errors
/// As [`mount`]; `Unsupported` where only mount(2) can mount.
pub fn unattached(overlay: &Overlay<'_>) -> Result<OwnedFd> {
    detached(overlay).map_err(|failed| match failed {
        Failed::NoApi => Error::Unsupported {
            feature: "fsopen(2) for overlay: missing; Linux 6.8 has it".into(),
        },
        Failed::Mount(error) => error,
    })
}

enum Failed {
    /// The kernel, or a filter, does not know the calls or `lowerdir+`.
    NoApi,
    Mount(Error),
}

fn detached(overlay: &Overlay<'_>) -> std::result::Result<OwnedFd, Failed> {
    let context = match fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC) {
        Ok(context) => context,
        Err(Errno::NOSYS) => return Err(Failed::NoApi),
        Err(errno) => return Err(Failed::Mount(Error::sys("fsopen", "overlay", errno))),
    };
    let said = |op: &'static str, at: String, errno: Errno| {
        let words = messages(&context);
        Failed::Mount(if words.is_empty() {
            Error::sys(op, at, errno)
        } else {
            Error::invalid(at, format!("{op}: {}; the kernel says: {words}", Error::from(errno)))
        })
    };
    let sorted = sort(overlay.options);
    set_string(&context, "source", "overlay").map_err(|e| said("fsconfig", "source".into(), e))?;
    let mut as_text = false;
    for (number, lower) in overlay.lowers.iter().enumerate() {
        match set_layer(&context, "lowerdir+", lower, &mut as_text) {
            Ok(()) => (),
            // Linux 6.5 to 6.7 know the calls but not this key.
            Err(Errno::INVAL) if number == 0 => return Err(Failed::NoApi),
            Err(errno) => return Err(said("fsconfig lowerdir+", show_path(&lower.path), errno)),
        }
    }
    if let Some((upper, work)) = overlay.upper {
        for (key, layer) in [("upperdir", upper), ("workdir", work)] {
            set_layer(&context, key, layer, &mut as_text)
                .map_err(|errno| said("fsconfig", show_path(&layer.path), errno))?;
        }
    }
    for (key, value) in &sorted.own {
        let done = match value {
            Some(value) => set_string(&context, key, value.trim_matches('"')),
            None => fsconfig_set_flag(&context, key.as_str()),
        };
        done.map_err(|errno| said("fsconfig", format!("mount option {key}"), errno))?;
    }
    fsconfig_create(&context).map_err(|errno| {
        let top = overlay.upper.map_or_else(
            || overlay.lowers.first().map(|lower| show_path(&lower.path)).unwrap_or_default(),
            |(upper, _)| show_path(&upper.path),
        );
        said("fsconfig", top, errno)
    })?;
    let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, sorted.attributes)
        .map_err(|errno| said("fsmount", "overlay".into(), errno))?;
    Ok(mount)
}

fn set_string(context: &OwnedFd, key: &str, value: &str) -> std::result::Result<(), Errno> {
    fsconfig_set_string(context, key, value)
}

/// Adds a layer by descriptor (Linux 6.13), or by its path in `/proc`, which is always short.
fn set_layer(
    context: &OwnedFd,
    key: &str,
    layer: &LayerDir,
    as_text: &mut bool,
) -> std::result::Result<(), Errno> {
    if !*as_text {
        match fsconfig_set_fd(context, key, &layer.dir) {
            Err(Errno::INVAL) => *as_text = true,
            done => return done,
        }
    }
    set_string(context, key, &format!("/proc/self/fd/{}", layer.dir.as_raw_fd()))
}

/// Returns what the kernel has to say about a mount that it refused.
pub(super) fn messages(context: &OwnedFd) -> String {
    let mut all = Vec::new();
    let mut buffer = [0u8; 1024];
    while let Ok(len) = rustix::io::read(context, &mut buffer) {
        let Some(line) = buffer.get(..len).filter(|line| !line.is_empty()) else { break };
        let line = String::from_utf8_lossy(line);
        let line = line.trim().trim_start_matches("e ").to_owned();
        if !all.contains(&line) {
            all.push(line);
        }
    }
    all.join("; ")
}

/// Puts a mount into the tree.
///
/// # Errors
/// Those of move_mount(2).
pub fn attach(mount: &OwnedFd, target: &Path) -> Result<()> {
    move_mount(mount, c"", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(|errno| Error::sys("move_mount", show_path(target), errno))
}

/// Returns the text for mount(2): paths while they fit into a page, else numbers of descriptors.
fn old_data(overlay: &Overlay<'_>, own: &[(String, Option<String>)]) -> Vec<u8> {
    const PAGE: usize = 4096;
    let by_path = |layer: &LayerDir| {
        let mut text = Vec::new();
        for &byte in layer.path.as_os_str().as_bytes() {
            if matches!(byte, b'\\' | b':' | b',') {
                text.push(b'\\');
            }
            text.push(byte);
        }
        text
    };
    let by_number = |layer: &LayerDir| layer.dir.as_raw_fd().to_string().into_bytes();
    let print = |name: &dyn Fn(&LayerDir) -> Vec<u8>| {
        let mut data = b"lowerdir=".to_vec();
        data.extend(overlay.lowers.iter().map(name).collect::<Vec<_>>().join(&b':'));
        if let Some((upper, work)) = overlay.upper {
            data.extend_from_slice(b",upperdir=");
            data.extend(name(upper));
            data.extend_from_slice(b",workdir=");
            data.extend(name(work));
        }
        for (key, value) in own {
            data.push(b',');
            data.extend_from_slice(key.as_bytes());
            if let Some(value) = value {
                data.push(b'=');
                data.extend_from_slice(value.as_bytes());
            }
        }
        data
    };
    let long = print(&by_path);
    if long.len() < PAGE { long } else { print(&by_number) }
}

/// Mounts by mount(2).
fn mount_old(overlay: &Overlay<'_>, target: &Path) -> Result<()> {
    let sorted = sort(overlay.options);
    let data = CString::new(old_data(overlay, &sorted.own))
        .map_err(|_nul| Error::invalid("mount options", "hold a NUL byte; remove it"))?;
    let work = || -> std::result::Result<(), (&'static str, Errno)> {
        // The directory of this thread alone; the process keeps its own.
        nix::sched::unshare(CloneFlags::CLONE_FS)
            .map_err(|errno| ("unshare", Errno::from_raw_os_error(errno as i32)))?;
        rustix::process::chdir("/proc/self/fd").map_err(|errno| ("chdir", errno))?;
        rustix::mount::mount("overlay", target, "overlay", sorted.flags, data.as_c_str())
            .map_err(|errno| ("mount", errno))
    };
    let done = std::thread::scope(|scope| scope.spawn(work).join());
    match done {
        Ok(Ok(())) => Ok(()),
        Ok(Err((op, errno))) => Err(Error::sys(op, show_path(target), errno)),
        Err(_panic) => Err(Error::sys("mount", show_path(target), Errno::IO)),
    }
}

/// Returns whether the kernel keeps its marks in `user.` xattrs for mounts made from here.
pub fn needs_userxattr() -> bool {
    !rustix::process::geteuid().is_root() || !is_initial_namespace()
}

/// Returns whether this process is in the user namespace that the machine started with.
pub fn is_initial_namespace() -> bool {
    std::fs::read_to_string("/proc/self/uid_map")
        .is_ok_and(|map| map.split_whitespace().eq(["0", "0", "4294967295"]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn words(list: &str) -> Vec<String> {
        list.split(',').map(str::to_owned).collect()
    }

    fn dir(path: &Path) -> LayerDir {
        fs::create_dir_all(path).unwrap();
        LayerDir { dir: fs::File::open(path).unwrap().into(), path: path.to_owned() }
    }

    #[test]
    fn options_go_to_who_takes_them() {
        let sorted = sort(&words("nodev,ro,private,volatile,metacopy=on,,rw"));
        assert_eq!(
            sorted.attributes,
            MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_RDONLY
        );
        assert_eq!(sorted.flags, MountFlags::NODEV | MountFlags::RDONLY);
        assert_eq!(sorted.own, [("volatile".into(), None), ("metacopy".into(), Some("on".into()))]);
    }

    #[test]
    fn long_stacks_are_numbers() {
        let temp = tempfile::tempdir().unwrap();
        let lower = |n: usize| dir(&temp.path().join(format!("{n:0>60}a:b")));
        let few: Vec<LayerDir> = (0..3).map(lower).collect();
        let overlay = Overlay { lowers: &few, upper: None, options: &[] };
        let text = String::from_utf8(old_data(&overlay, &[])).unwrap();
        assert!(text.contains("2a\\:b") && text.starts_with("lowerdir=/"), "{text}");
        let many: Vec<LayerDir> = (0..100).map(lower).collect();
        let overlay = Overlay { lowers: &many, upper: Some((&few[0], &few[1])), options: &[] };
        let own = [("volatile".to_owned(), None)];
        let text = String::from_utf8(old_data(&overlay, &own)).unwrap();
        assert!(text.len() < 1000 && text.ends_with(",volatile"), "{text}");
        assert!(text.bytes().all(|byte| byte != b'/'), "{text}");
    }

    #[test]
    fn both_ways_to_mount_show_the_same() {
        let temp = tempfile::tempdir_in("/var/tmp").unwrap();
        let lowers: Vec<LayerDir> =
            (0..120).map(|n| dir(&temp.path().join(format!("{n:0>60}")))).collect();
        #[allow(clippy::disallowed_methods, reason = "a test by path")]
        fs::write(lowers[119].path.join("f"), "lowest").unwrap();
        let target = temp.path().join("merged");
        fs::create_dir(&target).unwrap();
        let overlay = Overlay { lowers: &lowers, upper: None, options: &words("nodev") };
        if unattached(&overlay).is_err() {
            // Neither root nor in a namespace where mounts are allowed.
            return;
        }
        for old in [false, true] {
            if old {
                mount_old(&overlay, &target).unwrap();
            } else {
                assert_eq!(mount(&overlay, &target).unwrap(), Api::New);
            }
            assert_eq!(fs::read_to_string(target.join("f")).unwrap(), "lowest");
            rustix::mount::unmount(&target, rustix::mount::UnmountFlags::empty()).unwrap();
        }
    }
}
