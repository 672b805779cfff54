//! Append-only and immutable objects, as chattr(1) makes them.
//!
//! In a lower layer the inode's own flags say it. An upper object must stay changeable for us, so
//! there an xattr says it (`overlay.protattr`, letters `a` and `i`), and the inode never has the flags.
//! The kernel knows nothing of them: whatever it lets through is checked here, before anything
//! is copied up. An open that a reply cannot refuse is refused with the first write.
//!
//! Locks: a leaf.
//!
//! # Source
//! ioctl_iflags(2); overlayfs.rst; `ovl_set_protattr` for the letters.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::fs::XattrFlags;

use super::Union;
use super::attr::SetTime;
use super::node::{Dir, Node};
use super::publish::Work;
use crate::error::{Errno, Result};
use crate::marks;
use crate::sys::inode_flags::{APPEND, IMMUTABLE};
use crate::sys::stat::{self, Statx};
use crate::sys::xattr::{self, Target};

/// What is known of an object: nothing, or its flags.
#[derive(Debug, Default)]
pub(crate) struct Protection(AtomicU8);

impl Protection {
    const KNOWN: u8 = 1;

    /// Takes note of flags as `FS_IOC_GETFLAGS` has them; others than these two do not matter.
    pub(crate) fn found(&self, flags: u32) {
        let flags = u8::try_from(flags & (APPEND | IMMUTABLE)).unwrap_or_default();
        self.0.store(flags | Self::KNOWN, Ordering::Release);
    }

    /// Takes note of what statx(2) says of a lower object.
    pub(crate) fn found_lower(&self, stat: &Statx) {
        self.found(stat::protection(stat));
    }

    /// Tells that nobody has looked yet: never so of a lower object.
    pub(super) fn is_unknown(&self) -> bool {
        self.known().is_none()
    }

    fn known(&self) -> Option<u32> {
        let known = self.0.load(Ordering::Acquire);
        (known & Self::KNOWN != 0).then_some(u32::from(known & !Self::KNOWN))
    }
}

/// What somebody wants to change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Data, from this offset on.
    Data(u64),
    /// Mode, owner, times other than those of the moment, xattrs.
    Attributes,
    /// Times, to those of the moment.
    Touch,
    /// Its name: it goes, moves, or gets one more.
    Name,
    /// A name is added to the directory.
    Add,
    /// A name of the directory goes.
    Remove,
}

impl Change {
    /// Which change it is to set times.
    pub(super) fn of_times(times: [Option<SetTime>; 2]) -> Self {
        let chosen = times.iter().any(|time| matches!(time, Some(SetTime::At(_))));
        if chosen || times.iter().any(Option::is_none) { Self::Attributes } else { Self::Touch }
    }
}

impl Union {
    /// Returns the flags that protect an object: `FS_APPEND_FL` and `FS_IMMUTABLE_FL`.
    ///
    /// # Errors
    /// Those of listxattr(2) and getxattr(2).
    pub(super) fn protection(&self, node: &Arc<Node>) -> Result<u32> {
        if let Some(flags) = node.protection.known() {
            return Ok(flags);
        }
        let flags =
            self.with_xattrs(node, "getxattr", |target| read_mark(target, &xattr::list(target)?))?;
        node.protection.found(flags);
        Ok(flags)
    }

    /// Refuses a change of a protected object; no names are locked.
    ///
    /// # Errors
    /// `EPERM`; those of [`Union::protection`].
    pub(super) fn may(&self, node: &Arc<Node>, change: Change) -> Result<()> {
        let flags = self.protection(node)?;
        if flags == 0 {
            return Ok(());
        }
        let allowed = flags & IMMUTABLE == 0
            && match change {
                Change::Touch | Change::Add => true,
                Change::Data(offset) => offset >= self.stat_of(node)?.stx_size,
                Change::Attributes | Change::Name | Change::Remove => false,
            };
        if allowed { Ok(()) } else { Err(Errno::PERM.into()) }
    }

    /// Refuses that a name of a protected object goes or moves. The names of `dir` may be locked.
    ///
    /// # Errors
    /// As [`Union::may`].
    pub(super) fn may_lose(&self, dir: &Dir, name: &[u8], node: &Arc<Node>) -> Result<()> {
        // One that has several lower names is reached without them.
        if node.dir.is_none()
            && node.links.get().is_none()
            && node.protection.is_unknown()
            && let Some(part) = dir.upper.get()
        {
            let flags = part.call("getxattr", name, |at| {
                let target = Target::Name(at);
                read_mark(target, &xattr::list(target)?)
            })?;
            node.protection.found(flags);
        }
        self.may(node, Change::Name)
    }

    /// Makes an upper object have these of the flags that protect, and no others; returns the
    /// rest, which its inode can have.
    ///
    /// # Errors
    /// `EPERM` where the upper takes no xattrs, as the kernel gives; those of setxattr(2).
    pub(super) fn protect(&self, node: &Arc<Node>, flags: u32) -> Result<u32> {
        let wanted = flags & (APPEND | IMMUTABLE);
        if wanted != self.protection(node)? {
            let name = self.writable()?.work.namespace.of(&marks::PROTATTR_XATTRS);
            self.with_xattrs(node, "setxattr", |target| write_mark(target, name, wanted))?;
            node.protection.found(wanted);
        }
        Ok(flags & !(APPEND | IMMUTABLE))
    }
}

/// Makes a copy in work say what the lower object's flags say.
///
/// # Errors
/// As [`Union::protect`].
pub(super) fn pass_on(
    work: &Work,
    stat: &Statx,
    copy: Target<'_>,
) -> std::result::Result<(), Errno> {
    match stat::protection(stat) {
        0 => Ok(()),
        flags => write_mark(copy, work.namespace.of(&marks::PROTATTR_XATTRS), flags),
    }
}

/// Reads the mark of an upper object whose xattrs are listed.
pub(super) fn read_mark(target: Target<'_>, list: &[u8]) -> std::result::Result<u32, Errno> {
    let mut flags = 0;
    for name in marks::PROTATTR_XATTRS.iter().filter(|name| marks::lists_any(list, &[name])) {
        for letter in xattr::get(target, name)?.unwrap_or_default() {
            flags |= match letter {
                b'a' => APPEND,
                b'i' => IMMUTABLE,
                // Of a later version; what is known still holds.
                _ => 0,
            };
        }
    }
    Ok(flags)
}

fn write_mark(target: Target<'_>, name: &[u8], flags: u32) -> std::result::Result<(), Errno> {
    let mut letters = Vec::new();
    letters.extend((flags & APPEND != 0).then_some(b'a'));
    letters.extend((flags & IMMUTABLE != 0).then_some(b'i'));
    if letters.is_empty() {
        return match xattr::remove(target, name) {
            Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(()),
            removed => removed,
        };
    }
    match xattr::set(target, name, &letters, XattrFlags::empty()) {
        Err(Errno::OPNOTSUPP) => Err(Errno::PERM),
        set => set,
    }
}
