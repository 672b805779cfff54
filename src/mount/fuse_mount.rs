//! Makes and removes one FUSE mount: by system call where that is allowed, else by fusermount3.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{Access, CWD, FileType, Mode, OFlags, openat, statfs};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::mount::{
    FsOpenFlags, MountPropagationFlags, UnmountFlags, fsopen, mount_change, unmount,
};
use tracing::{debug, warn};

use super::fuse_call::{self, Refusal, fsname, labels, subtype};
use super::mountinfo::{self, MountEntry};
use super::{MountSpec, refuse};
use crate::error::{Context, Errno, Error, Result};
use crate::options::{Propagation, show_path};
use crate::sys::process::receive_descriptor;

pub(super) const DEVICE: &str = "/dev/fuse";
/// Names under which the set-user-id helper is looked for.
const HELPERS: [&str; 3] = ["fusermount3", "/usr/bin/fusermount3", "fusermount"];
const NO_PRIVILEGE: &str = "run as root, in a user namespace of your own (unshare -Urm, \
     podman unshare), or install fusermount3 (package fuse3)";

/// A mount of ours.
#[derive(Debug)]
pub struct Mounted {
    path: PathBuf,
    /// Its device number, by which it is told from another mount at the same place.
    device: Option<(u32, u32)>,
}

/// A fresh mount and the descriptor to serve it by.
#[derive(Debug)]
pub struct NewMount {
    /// Where requests come from.
    pub device: OwnedFd,
    /// The mount.
    pub mounted: Mounted,
    /// Whether other users may enter.
    pub allow_other: bool,
}

/// The FUSE device, or why it could not be opened: the helper may still be able to.
#[derive(Debug)]
pub struct Device(std::result::Result<OwnedFd, Errno>);

impl Device {
    /// Opens /dev/fuse.
    ///
    /// # Errors
    /// `Invalid` if there is no such device.
    pub fn open() -> Result<Self> {
        match openat(CWD, DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
            Ok(device) => {
                let stat = rustix::fs::fstat(&device).at("fstat", || DEVICE)?;
                let is_device = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice;
                if !is_device || stat.st_rdev != rustix::fs::makedev(10, 229) {
                    return Err(Error::invalid(
                        DEVICE,
                        "is not the FUSE device (character device 10:229); remove it and make \
                         another (mknod -m 666 /dev/fuse c 10 229), or pass the host's to the \
                         container (--device /dev/fuse)",
                    ));
                }
                Ok(Self(Ok(device)))
            }
            Err(errno @ (Errno::ACCESS | Errno::PERM)) => Ok(Self(Err(errno))),
            Err(errno) => Err(refuse(
                DEVICE,
                "open",
                errno,
                "load the module (modprobe fuse), or pass the device to the container \
                 (--device /dev/fuse)",
            )),
        }
    }
}

/// Finds out whether this process can mount with FUSE, by itself or through the helper, without
/// mounting anything.
///
/// # Errors
/// Why not.
pub fn try_mounting() -> Result<()> {
    let refusal = match Device::open()?.0 {
        Ok(_) => match fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC) {
            Err(errno @ Errno::PERM) => refuse("fuse", "fsopen", errno, NO_PRIVILEGE),
            Ok(_) => return Ok(()),
            // The older calls may do what this one cannot.
            Err(errno) => {
                debug!(%errno, "fsopen of fuse");
                return Ok(());
            }
        },
        Err(errno) => refuse(DEVICE, "open", errno, "allow it (chmod 0666 /dev/fuse)"),
    };
    let path = std::env::var_os("PATH").unwrap_or_default();
    let is_there = |helper: &&str| {
        let dirs = std::env::split_paths(&path).map(|dir| dir.join(helper));
        let mut places: Box<dyn Iterator<Item = PathBuf>> = match helper.contains('/') {
            true => Box::new(std::iter::once(PathBuf::from(helper))),
            false => Box::new(dirs),
        };
        places.any(|place| rustix::fs::access(place, Access::EXEC_OK).is_ok())
    };
    if HELPERS.iter().any(is_there) { Ok(()) } else { Err(refusal) }
}

/// Mounts at `path`, an absolute path without symlinks.
///
/// # Errors
/// One sentence with the path, the system call and the cure; nothing is mounted then.
pub fn mount(device: Device, path: &Path, spec: &MountSpec) -> Result<NewMount> {
    let options = spec.options();
    let by_helper = |error| {
        let is_private = matches!(options.propagation, None | Some(Propagation::Private));
        if !is_private {
            return Err(Error::invalid(
                "shared, slave, unbindable",
                format!("propagation is chosen by who may mount, and {error}"),
            ));
        }
        let device = mount_by_helper(path, spec, error)?;
        Ok(NewMount { device, mounted: Mounted::find(path), allow_other: options.allow_other })
    };
    let device = match device.0 {
        Ok(device) => device,
        Err(errno) => {
            return by_helper(refuse(
                DEVICE,
                "open",
                errno,
                "allow it (chmod 0666 /dev/fuse), or pass the device to the container \
                 (--device /dev/fuse)",
            ));
        }
    };
    match fuse_call::mount(device, path, spec) {
        Ok(device) => {
            let mounted = Mounted::find(path);
            if let Some(propagation) = options.propagation {
                let flags = match propagation {
                    Propagation::Private => MountPropagationFlags::PRIVATE,
                    Propagation::Shared => MountPropagationFlags::SHARED,
                    Propagation::Slave => MountPropagationFlags::DOWNSTREAM,
                    Propagation::Unbindable => MountPropagationFlags::UNBINDABLE,
                };
                if let Err(errno) = mount_change(path, flags) {
                    if let Err(error) = mounted.unmount(true) {
                        warn!("{error}");
                    }
                    let cure = "leave the propagation option out";
                    return Err(refuse(show_path(path), "mount (propagation)", errno, cure));
                }
            }
            Ok(NewMount { device, mounted, allow_other: true })
        }
        Err(Refusal { op, errno: errno @ (Errno::PERM | Errno::ACCESS), .. }) => {
            by_helper(refuse(show_path(path), op, errno, NO_PRIVILEGE))
        }
        Err(Refusal { op, errno, said }) => {
            let cure = match errno {
                _ if !said.is_empty() => &format!("the kernel says: {said}"),
                Errno::NODEV => "load the module (modprobe fuse)",
                Errno::BUSY => "unmount what is mounted there",
                _ => "see the kernel log (dmesg)",
            };
            Err(refuse(show_path(path), op, errno, cure))
        }
    }
}

/// Returns the options for the helper; it adds the descriptor and the ids itself.
fn helper_options(spec: &MountSpec) -> OsString {
    let options = spec.options();
    let mut list = b"default_permissions,noatime,nosuid,nodev".to_vec();
    for (wanted, name) in [
        (spec.is_read_only(), ",ro"),
        (!options.exec, ",noexec"),
        (options.allow_other, ",allow_other"),
    ] {
        if wanted {
            list.extend_from_slice(name.as_bytes());
        }
    }
    for label in labels(options) {
        list.push(b',');
        list.extend_from_slice(label);
    }
    for (name, value) in [(",fsname=", fsname(options)), (",subtype=", subtype(options))] {
        list.extend_from_slice(name.as_bytes());
        for &byte in value.as_bytes() {
            if matches!(byte, b',' | b'\\') {
                list.push(b'\\');
            }
            list.push(byte);
        }
    }
    OsString::from_vec(list)
}

/// Lets fusermount3 mount and returns the descriptor it sends.
///
/// `error` is why it could not be done without, returned if there is no helper.
fn mount_by_helper(path: &Path, spec: &MountSpec, error: Error) -> Result<OwnedFd> {
    let failed = |op, error: std::io::Error| {
        Error::sys(op, show_path(path), Errno::from_io_error(&error).unwrap_or(Errno::IO))
    };
    if spec.options().dev {
        return Err(Error::invalid(
            "dev",
            format!("device nodes need a mount by root, and {error}"),
        ));
    }
    for helper in HELPERS {
        let (ours, theirs) = UnixStream::pair().map_err(|error| failed("socketpair", error))?;
        fcntl_setfd(&theirs, FdFlags::empty())
            .map_err(|errno| Error::sys("fcntl", "socket", errno))?;
        let started = Command::new(helper)
            .arg("-o")
            .arg(helper_options(spec))
            .arg("--")
            .arg(path)
            .env("_FUSE_COMMFD", theirs.as_raw_fd().to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        let child = match started {
            Ok(child) => child,
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(failed("execve fusermount3", error)),
        };
        drop(theirs);
        let device = receive_descriptor(ours.as_fd())?;
        let output = child.wait_with_output().map_err(|error| failed("wait fusermount3", error))?;
        return match device {
            Some(device) => Ok(device),
            None => Err(add_helper(&error, helper, &output.stderr)),
        };
    }
    Err(error)
}

/// Puts what the helper said into the sentence about why it was needed.
fn add_helper(error: &Error, helper: &str, stderr: &[u8]) -> Error {
    let said = String::from_utf8_lossy(stderr);
    let said: Vec<&str> = said.split_whitespace().collect();
    let sentence = error.to_string();
    let (what, cure) = sentence.split_once("; ").unwrap_or((&sentence, NO_PRIVILEGE));
    let (arg, why) = what.split_once(": ").unwrap_or(("mount", what));
    let cure = if said.contains(&"'user_allow_other'") { "do so, or leave it out" } else { cure };
    Error::invalid(
        arg.to_owned(),
        format!("{why}, and {helper} failed too ({}); {cure}", said.join(" ")),
    )
}

impl Mounted {
    /// Notes the mount that is topmost at `path`, just made.
    fn find(path: &Path) -> Self {
        let device = match mountinfo::load() {
            Ok(entries) => mountinfo::find_top(&entries, path).map(|entry| entry.device),
            Err(error) => {
                warn!("{error}");
                None
            }
        };
        Self { path: path.to_owned(), device }
    }

    /// Returns where it is mounted.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the mount, or just its name when `lazy`; one that is gone already is no error.
    ///
    /// # Errors
    /// `EBUSY` while files in it are open or something is mounted over it.
    pub fn unmount(&self, lazy: bool) -> Result<()> {
        if let (Some(device), Ok(entries)) = (self.device, mountinfo::load()) {
            let is_ours = |entry: &MountEntry| entry.device == device;
            // It may have been moved, or a directory above it renamed.
            let Some(ours) = entries.iter().find(|entry| is_ours(entry)) else { return Ok(()) };
            let path = &ours.mount_point;
            if !mountinfo::find_top(&entries, path).is_some_and(is_ours) {
                return Err(Error::sys(
                    "umount2",
                    format!("{}: another mount lies over it", show_path(path)),
                    Errno::BUSY,
                ));
            }
            return remove(path, lazy);
        }
        remove(&self.path, lazy)
    }
}

impl Mounted {
    /// Removes the mount if it is still there although its connection has ended, as after an abort
    /// through fusectl.
    ///
    /// Its device number may have gone to a newer mount at the same place, which answers.
    ///
    /// # Errors
    /// As [`Mounted::unmount`].
    pub fn remove_if_dead(&self) -> Result<()> {
        let entries = mountinfo::load()?;
        match mountinfo::find_top(&entries, &self.path) {
            Some(top) if Some(top.device) == self.device => (),
            _ => return Ok(()),
        }
        match statfs(&self.path) {
            Err(Errno::NOTCONN | Errno::CONNABORTED) => self.unmount(true),
            _ => Ok(()),
        }
    }
}

/// Removes the topmost mount at `path`: by umount2(2) where that is allowed, else by fusermount3.
///
/// # Errors
/// Those of umount2(2), or what the helper said.
pub fn remove(path: &Path, lazy: bool) -> Result<()> {
    let mut flags = UnmountFlags::NOFOLLOW;
    flags.set(UnmountFlags::DETACH, lazy);
    match unmount(path, flags) {
        Ok(()) => Ok(()),
        Err(Errno::PERM) => remove_by_helper(path, lazy),
        Err(errno) => {
            let cure = match errno {
                Errno::BUSY => "close what uses it (shown by fuser -vm), or use --lazy",
                Errno::INVAL => "unmount it in the mount namespace that made it",
                _ => "see the kernel log (dmesg)",
            };
            Err(refuse(show_path(path), "umount2", errno, cure))
        }
    }
}

fn remove_by_helper(path: &Path, lazy: bool) -> Result<()> {
    let mode = if lazy { "-uz" } else { "-u" };
    for helper in HELPERS {
        let output = Command::new(helper)
            .arg(mode)
            .arg("--")
            .arg(path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .output();
        match output {
            Ok(output) if output.status.success() => return Ok(()),
            Ok(output) => {
                let said = String::from_utf8_lossy(&output.stderr);
                let said: Vec<&str> = said.split_whitespace().collect();
                let said = said.join(" ");
                debug!("{helper} {mode}: {said}");
                return Err(Error::Busy {
                    what: format!(
                        "{}: {helper} {mode}: {said}; close what uses it (shown by fuser -vm), \
                         or unmount it as the user who mounted it",
                        show_path(path)
                    )
                    .into(),
                });
            }
            Err(error) if error.kind() == ErrorKind::NotFound => (),
            Err(error) => {
                let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
                return Err(Error::sys("execve fusermount3", show_path(path), errno));
            }
        }
    }
    Err(refuse(
        show_path(path),
        "umount2",
        Errno::PERM,
        "unmount it as root or in the namespace that made it, or install fusermount3 \
         (package fuse3)",
    ))
}
