//! Attributes as a layer means them, where its inodes say something else.

use std::os::fd::BorrowedFd;

use crate::error::Errno;
use crate::overrides::{Form, Override};
use crate::sys::data;
use crate::sys::stat::Statx;
use crate::sys::xattr::{self, Target};

/// Finds out by which xattr a layer overrides the attributes of its objects: the one on its root.
///
/// # Errors
/// Those of listxattr(2).
pub fn form_of(root: Target<'_>) -> Result<Option<Form>, Errno> {
    let names = xattr::list(root)?;
    Ok(Form::of(|wanted| names.split(|byte| *byte == 0).any(|name| name == wanted)))
}

/// Returns what is said of an object, in the form of its layer or else in another: a mount program
/// may have written its own.
///
/// # Errors
/// `EIO` if it makes no sense, because the truth is then unknown; those of getxattr(2).
pub fn overridden(form: Form, target: Target<'_>) -> Result<Option<Override>, Errno> {
    for name in form.order() {
        if let Some(value) = xattr::get(target, name)? {
            return match Override::parse(&value) {
                Some(said) => Ok(Some(said)),
                None => {
                    tracing::error!(value = %value.escape_ascii(), "an override xattr makes no sense");
                    Err(Errno::IO)
                }
            };
        }
    }
    Ok(None)
}

/// Puts into `stat`, of the object `target` in a layer of this form, what overrides it.
///
/// Files and directories only: others cannot carry the xattr. A file may stand for an object of
/// another type.
///
/// # Errors
/// Those of [`overridden`].
pub fn seen(form: Form, target: Target<'_>, mut stat: Statx) -> Result<Statx, Errno> {
    let real = u32::from(stat.stx_mode) & libc::S_IFMT;
    if !matches!(real, libc::S_IFREG | libc::S_IFDIR) {
        return Ok(stat);
    }
    let Some(said) = overridden(form, target)? else { return Ok(stat) };
    let kind = match said.kind {
        Some((kind, rdev)) if real == libc::S_IFREG && kind != libc::S_IFDIR => {
            (stat.stx_rdev_major, stat.stx_rdev_minor) = rdev;
            if !matches!(kind, libc::S_IFREG | libc::S_IFLNK) {
                stat.stx_size = 0;
            }
            kind
        }
        _ => real,
    };
    (stat.stx_uid, stat.stx_gid) = (said.uid, said.gid);
    stat.stx_mode = u16::try_from(kind | said.mode).unwrap_or(stat.stx_mode);
    Ok(stat)
}

/// Bytes of the target of a symlink, with a NUL (`PATH_MAX`).
const LINK_MAX: usize = 4096;

/// Returns where the symlink points that a file stands for.
///
/// # Errors
/// `EIO` for what no symlink can have; those of pread(2).
pub fn link_of_file(file: BorrowedFd<'_>) -> Result<Vec<u8>, Errno> {
    let mut content = vec![0; LINK_MAX];
    let len = data::read_at(file, &mut content, 0)?;
    content.truncate(len);
    let fits = (1..LINK_MAX).contains(&len) && !content.contains(&0);
    fits.then_some(content).ok_or(Errno::IO)
}
