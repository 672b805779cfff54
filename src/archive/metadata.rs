//! Owner, mode, times and xattrs of an object that was just made, by handle where there is one.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{Timespec, Timestamps, XattrFlags};

use super::header::Kind;
use super::pax::Time;
use super::read::Entry;
use crate::error::{Context, Result};
use crate::layer::Dir;
use crate::overrides::Override;
use crate::sys::{name, xattr};

/// Keeps owner, mode and type of an object that could not be given them.
pub const OVERRIDE_XATTR: &[u8] = b"user.containers.override_stat";

/// An object of a layer.
#[derive(Debug)]
pub enum Place<'a> {
    /// A file, open for writing; directory and name are for messages.
    Open(&'a OwnedFd, &'a Arc<Dir>, &'a [u8]),
    /// A directory.
    Dir(&'a Arc<Dir>),
    /// Anything else, by its name.
    Name(&'a Arc<Dir>, &'a [u8]),
}

impl Place<'_> {
    /// Sets the owner.
    ///
    /// # Errors
    /// Those of fchownat(2).
    pub fn chown(&self, uid: u32, gid: u32) -> Result<()> {
        let (uid, gid) = (Some(uid), Some(gid));
        match self {
            Self::Open(file, dir, name) => {
                name::chown_handle(file, uid, gid).at("fchown", || dir.describe(name))
            }
            Self::Dir(dir) => dir.with("fchown", |dir| name::chown_handle(dir, uid, gid)),
            Self::Name(dir, name) => dir.call("fchownat", name, |at| name::chown(at, uid, gid)),
        }
    }

    /// Sets the mode; never of a symlink, which has none.
    ///
    /// # Errors
    /// Those of fchmod(2).
    pub fn chmod(&self, mode: u32) -> Result<()> {
        match self {
            Self::Open(file, dir, name) => {
                name::chmod_open(file, mode).at("fchmod", || dir.describe(name))
            }
            Self::Dir(dir) => dir.with("fchmod", |dir| name::chmod_handle(dir, mode)),
            Self::Name(dir, name) => dir.call("fchmod", name, |at| {
                let handle = crate::sys::open::handle(at.dir, at.name)?;
                name::chmod_handle(&handle, mode)
            }),
        }
    }

    /// Sets the times: of access no earlier than of modification, as all readers of layers do.
    ///
    /// # Errors
    /// Those of utimensat(2).
    pub fn set_times(&self, entry: &Entry) -> Result<()> {
        self.set_timestamps(&Timestamps {
            last_access: spec(entry.atime.unwrap_or(entry.mtime).max(entry.mtime)),
            last_modification: spec(entry.mtime),
        })
    }

    /// Sets both times.
    ///
    /// # Errors
    /// Those of utimensat(2).
    pub fn set_timestamps(&self, times: &Timestamps) -> Result<()> {
        match self {
            Self::Open(file, dir, name) => {
                name::set_times_open(file, times).at("utimensat", || dir.describe(name))
            }
            Self::Dir(dir) => dir.with("utimensat", |dir| name::set_times_handle(dir, times)),
            Self::Name(dir, name) => dir.call("utimensat", name, |at| name::set_times(at, times)),
        }
    }

    /// Sets an xattr, under this very name.
    ///
    /// # Errors
    /// Those of setxattr(2).
    pub fn set_xattr(&self, name: &[u8], value: &[u8]) -> Result<()> {
        let flags = XattrFlags::empty();
        match self {
            Self::Open(file, dir, at) => {
                xattr::set(xattr::Target::Open(file.as_fd()), name, value, flags)
                    .at("fsetxattr", || dir.describe(at))
            }
            Self::Dir(dir) => dir
                .with("setxattr", |dir| xattr::set(xattr::Target::Handle(dir), name, value, flags)),
            Self::Name(dir, at) => dir.call("lsetxattr", at, |at| {
                xattr::set(xattr::Target::Name(at), name, value, flags)
            }),
        }
    }

    /// Tells whether the kernel lets no object of this type have such an xattr.
    pub fn has_no_user_xattrs(&self, name: &[u8], entry: &Entry) -> bool {
        name.starts_with(b"user.") && !matches!(entry.kind, Kind::File | Kind::Directory)
    }
}

fn spec(time: Time) -> Timespec {
    Timespec { tv_sec: time.seconds, tv_nsec: time.nanoseconds.into() }
}

/// Keeps what an object should be in an xattr.
///
/// # Errors
/// Those of setxattr(2).
/// # Source
/// containers/storage, "force_mask".
pub fn set_override(place: &Place<'_>, uid: u64, gid: u64, mode: u32, kind: &str) -> Result<()> {
    place.set_xattr(OVERRIDE_XATTR, format!("{uid}:{gid}:{:04o}:{kind}", mode & 0o7777).as_bytes())
}

/// Moves what an override xattr says into the entry that carries it.
///
/// # Errors
/// A sentence if it says nothing that makes sense.
pub fn take_override(entry: &mut Entry) -> std::result::Result<(), &'static str> {
    let Some(at) = entry.xattrs.iter().position(|(name, _)| name == OVERRIDE_XATTR) else {
        return Ok(());
    };
    let (_, value) = entry.xattrs.swap_remove(at);
    let said = Override::parse(&value).ok_or("has an override xattr that is malformed")?;
    (entry.uid, entry.gid, entry.mode) = (said.uid.into(), said.gid.into(), said.mode);
    Ok(())
}
