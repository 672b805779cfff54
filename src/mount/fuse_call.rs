//! Mounting with the privilege that this process has: by fsopen(2) and its kin, or by mount(2) where
//! the kernel, a filter or a policy refuses those.
//!
//! Either way the mount table shows the same. The newer calls tell what they do not like, and no
//! page bounds all options together.

use std::ffi::{CString, OsStr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, openat, statfs};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount as sys_mount, move_mount,
};
use rustix::process::{getegid, geteuid};
use tracing::debug;

use super::MountSpec;
use super::fuse_mount::DEVICE;
use super::kernel::messages;
use crate::error::{Errno, Error};
use crate::options::MountOptions;

/// Longest string that fsconfig(2) takes, in bytes.
const STRING_MAX: usize = 255;

/// Flags of the filesystem that take no value.
const FLAGS: [&str; 2] = ["default_permissions", "allow_other"];

/// `statfs` type of the directory by which a kernel shows that it has SELinux.
const SELINUX_MAGIC: i64 = 0xf97c_ff8c;

/// Why the kernel did not mount.
#[derive(Debug)]
pub(super) struct Refusal {
    /// The call that failed.
    pub(super) op: &'static str,
    pub(super) errno: Errno,
    /// What the kernel has to say about it; mostly nothing.
    pub(super) said: String,
}

impl Refusal {
    fn new(op: &'static str, errno: Errno) -> Self {
        Self { op, errno, said: String::new() }
    }

    /// Whether another way may work: the calls are not there, or a filter or a policy says so.
    fn is_of_the_way(&self) -> bool {
        matches!(self.errno, Errno::NOSYS | Errno::PERM | Errno::ACCESS)
    }
}

/// Options of the filesystem that have a value, in the order of the mount table.
type Settings<'a> = Vec<(&'a str, Vec<u8>)>;

/// Mounts what `device` serves at `path`, and returns the descriptor to serve it by.
///
/// # Errors
/// Why not, from the last way that was tried; nothing is mounted then.
pub(super) fn mount(device: OwnedFd, path: &Path, spec: &MountSpec) -> Result<OwnedFd, Refusal> {
    let options = spec.options();
    let is_short = |text: &[u8]| text.len() <= STRING_MAX;
    let all_short = is_short(fsname(options).as_bytes())
        && is_short(subtype(options).as_bytes())
        && options.labels.iter().all(|label| is_short(label));
    if !all_short {
        return by_one_call(&device, path, spec).map(|()| device);
    }
    let mut used = false;
    let refusal = match by_context(&device, path, spec, &mut used) {
        Ok(()) => return Ok(device),
        Err(refusal) if refusal.is_of_the_way() => refusal,
        Err(refusal) => return Err(refusal),
    };
    debug!("{}: {}; mount(2) instead", refusal.op, Error::from(refusal.errno));
    let device = if used {
        // It belongs to a filesystem that nobody will see.
        openat(CWD, DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .map_err(|errno| Refusal::new("open", errno))?
    } else {
        device
    };
    by_one_call(&device, path, spec).map(|()| device)
}

/// Mounts by fsopen(2), fsconfig(2), fsmount(2) and move_mount(2); tells by `used` whether the device
/// has got a filesystem.
fn by_context(
    device: &OwnedFd,
    path: &Path,
    spec: &MountSpec,
    used: &mut bool,
) -> Result<(), Refusal> {
    let options = spec.options();
    let context = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)
        .map_err(|errno| Refusal::new("fsopen", errno))?;
    let told = |op| {
        let context = &context;
        move |errno| Refusal { op, errno, said: messages(context) }
    };
    fsconfig_set_string(&context, "source", fsname(options)).map_err(told("fsconfig source"))?;
    fsconfig_set_string(&context, "subtype", subtype(options)).map_err(told("fsconfig subtype"))?;
    for (key, value) in settings(device, options) {
        // Quotes, which keep commas together in a list, are no part of a label.
        let bare = value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\""));
        fsconfig_set_string(&context, key, bare.unwrap_or(&value)).map_err(told("fsconfig"))?;
    }
    for flag in FLAGS {
        fsconfig_set_flag(&context, flag).map_err(told("fsconfig"))?;
    }
    if spec.is_read_only() {
        fsconfig_set_flag(&context, "ro").map_err(told("fsconfig ro"))?;
    }
    fsconfig_create(&context).map_err(told("fsconfig"))?;
    *used = true;
    let mut attributes = MountAttrFlags::MOUNT_ATTR_NOATIME;
    for (wanted, attribute) in [
        (!options.dev, MountAttrFlags::MOUNT_ATTR_NODEV),
        (!options.suid, MountAttrFlags::MOUNT_ATTR_NOSUID),
        (!options.exec, MountAttrFlags::MOUNT_ATTR_NOEXEC),
        (spec.is_read_only(), MountAttrFlags::MOUNT_ATTR_RDONLY),
    ] {
        attributes.set(attribute, wanted);
    }
    let made =
        fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(told("fsmount"))?;
    move_mount(&made, c"", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .map_err(|errno| Refusal::new("move_mount", errno))?;
    debug!("mounted by fsopen(2)");
    Ok(())
}

/// Mounts by mount(2).
fn by_one_call(device: &OwnedFd, path: &Path, spec: &MountSpec) -> Result<(), Refusal> {
    let options = spec.options();
    let refused = |errno| Refusal::new("mount", errno);
    let mut flags = MountFlags::NOATIME;
    for (wanted, flag) in [
        (!options.dev, MountFlags::NODEV),
        (!options.suid, MountFlags::NOSUID),
        (!options.exec, MountFlags::NOEXEC),
        (spec.is_read_only(), MountFlags::RDONLY),
    ] {
        flags.set(flag, wanted);
    }
    let mut data = FLAGS.join(",").into_bytes();
    for (key, value) in settings(device, options) {
        data.extend_from_slice(format!(",{key}=").as_bytes());
        data.extend_from_slice(&value);
    }
    let data = CString::new(data).map_err(|_nul| refused(Errno::INVAL))?;
    let kind = [b"fuse.", subtype(options).as_bytes()].concat();
    sys_mount(fsname(options), path, OsStr::from_bytes(&kind), flags, data.as_c_str())
        .map_err(refused)?;
    debug!("mounted by mount(2)");
    Ok(())
}

fn settings<'a>(device: &OwnedFd, options: &'a MountOptions) -> Settings<'a> {
    let mut settings: Settings<'a> = vec![
        // As text: not every kernel takes the descriptor itself.
        ("fd", device.as_raw_fd().to_string().into()),
        ("rootmode", b"40000".into()),
        ("user_id", geteuid().as_raw().to_string().into()),
        ("group_id", getegid().as_raw().to_string().into()),
    ];
    for label in labels(options) {
        let (key, value) = label.split_at(label.iter().position(|&byte| byte == b'=').unwrap_or(0));
        // Parsed with one of four words before it.
        let Ok(key) = std::str::from_utf8(key) else { continue };
        settings.push((key, value.get(1..).unwrap_or_default().to_vec()));
    }
    settings
}

/// Returns the SELinux labels that were asked for; without SELinux there is nothing to label.
pub(super) fn labels(options: &MountOptions) -> &[Vec<u8>] {
    if options.labels.is_empty() {
        return &[];
    }
    if !statfs("/sys/fs/selinux").is_ok_and(|found| found.f_type == SELINUX_MAGIC) {
        debug!("security labels are left out: the kernel has no SELinux");
        return &[];
    }
    &options.labels
}

/// Returns the source that the mount table shows.
pub(super) fn fsname(options: &MountOptions) -> &OsStr {
    options.fsname.as_deref().unwrap_or(OsStr::new("lamina"))
}

/// Returns what follows `fuse.` in the type that the mount table shows.
pub(super) fn subtype(options: &MountOptions) -> &OsStr {
    options.subtype.as_deref().unwrap_or(OsStr::new("lamina"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The log of a context has why the kernel refused something.
    #[test]
    fn the_kernel_says_what_it_does_not_like() {
        // Without the right to mount there is nothing to ask.
        let Ok(context) = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC) else { return };
        fsconfig_set_string(&context, "fd", "none").unwrap_err();
        assert!(messages(&context).contains("fd"), "{}", messages(&context));
    }
}
