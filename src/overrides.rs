//! Owner, mode and type of an object that its inode cannot have, kept in an xattr beside it. Pure.
//!
//! Stores of container engines that may not chown use it (`force_mask`), and mounts with
//! `xattr_permissions`. A layer whose root carries such an xattr is read through them.

use std::borrow::Cow;

/// By which xattr a layer overrides what its inodes say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Form {
    /// `security.fuseoverlayfs.override_stat`, which needs privilege.
    Privileged,
    /// `user.containers.override_stat`, of container engines. `security.` xattrs stand under names
    /// of their own as well.
    Containers,
    /// `user.fuseoverlayfs.override_stat`, of older mount programs.
    User,
    /// As [`Form::Containers`], but an older mount program wrote its own into the same layer: where
    /// an object has both, that is the newer one.
    Both,
}

impl Form {
    /// Returns the form that the root of a layer with these xattrs has; privileged before others.
    pub fn of(has: impl Fn(&[u8]) -> bool) -> Option<Self> {
        match (has(PRIVILEGED), has(CONTAINERS), has(USER)) {
            (true, _, _) => Some(Self::Privileged),
            (_, true, true) => Some(Self::Both),
            (_, true, false) => Some(Self::Containers),
            (_, false, true) => Some(Self::User),
            (false, false, false) => None,
        }
    }

    /// Returns the names that an object is asked for, one after the other.
    pub const fn order(self) -> [&'static [u8]; 3] {
        match self {
            Self::Privileged => [PRIVILEGED, CONTAINERS, USER],
            Self::Containers => [CONTAINERS, PRIVILEGED, USER],
            Self::User | Self::Both => [USER, CONTAINERS, PRIVILEGED],
        }
    }

    /// Tells whether other xattrs stand under names of their own.
    const fn encodes(self) -> bool {
        matches!(self, Self::Containers | Self::Both)
    }

    /// Returns the name of the xattr that is written.
    pub const fn xattr(self) -> &'static [u8] {
        match self {
            Self::Privileged => PRIVILEGED,
            Self::Containers | Self::Both => CONTAINERS,
            Self::User => USER,
        }
    }

    /// Returns the name of an xattr that would be taken for newer than what is written.
    pub fn older(self) -> Option<&'static [u8]> {
        (self == Self::Both).then_some(USER)
    }
}

const PRIVILEGED: &[u8] = b"security.fuseoverlayfs.override_stat";
const CONTAINERS: &[u8] = b"user.containers.override_stat";
const USER: &[u8] = b"user.fuseoverlayfs.override_stat";

/// What begins the names under which other xattrs are kept in the form [`Form::Containers`].
const CONTAINERS_PREFIX: &[u8] = b"user.containers.override_";

/// Xattrs of privileged mount programs, never shown.
const PRIVILEGED_PREFIX: &[u8] = b"security.fuseoverlayfs.";

/// Longest name of an extended attribute, in bytes (`XATTR_NAME_MAX`).
const XATTR_NAME_MAX: usize = 255;

/// What an override xattr says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Override {
    /// Owner, as the layer has it.
    pub uid: u32,
    /// Group, as the layer has it.
    pub gid: u32,
    /// Permission bits, 0o7777.
    pub mode: u32,
    /// Type as `S_IFMT` has it, where it is said, with major and minor number of a device.
    pub kind: Option<(u32, (u32, u32))>,
}

/// Words for types that have no number.
const KINDS: [(&str, u32); 5] = [
    ("file", libc::S_IFREG),
    ("dir", libc::S_IFDIR),
    ("symlink", libc::S_IFLNK),
    ("pipe", libc::S_IFIFO),
    ("socket", libc::S_IFSOCK),
];

/// Words for devices, which have two.
const DEVICES: [(&str, u32); 2] = [("block", libc::S_IFBLK), ("char", libc::S_IFCHR)];

impl Override {
    /// Parses `UID:GID:MODE[:TYPE]`, mode octal and possibly with type bits, which say nothing;
    /// `None` if it is none.
    pub fn parse(value: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(value).ok()?;
        let mut fields = text.split(':');
        let uid = id(fields.next()?)?;
        let gid = id(fields.next()?)?;
        let mode = fields.next().filter(|mode| is_number(mode))?;
        let mode = u32::from_str_radix(mode, 8).ok()? & 0o7777;
        let kind = match fields.next() {
            None => None,
            Some(kind) => Some(parse_kind(kind)?),
        };
        Some(Self { uid, gid, mode, kind })
    }

    /// Prints it as engines do. A type that has no word is left out.
    pub fn print(&self) -> Vec<u8> {
        let Self { uid, gid, mode, kind } = *self;
        let mut text = format!("{uid}:{gid}:{mode:04o}");
        let Some((kind, (major, minor))) = kind else { return text.into_bytes() };
        if let Some((word, _)) = KINDS.iter().find(|(_, known)| *known == kind) {
            text = format!("{text}:{word}");
        } else if let Some((word, _)) = DEVICES.iter().find(|(_, known)| *known == kind) {
            text = format!("{text}:{word}-{major}-{minor}");
        }
        text.into_bytes()
    }
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

fn id(text: &str) -> Option<u32> {
    // The last number of all is no id.
    text.parse().ok().filter(|id| is_number(text) && *id != u32::MAX)
}

fn parse_kind(text: &str) -> Option<(u32, (u32, u32))> {
    let mut parts = text.split('-');
    let word = parts.next()?;
    if let Some((_, kind)) = KINDS.iter().find(|(known, _)| *known == word) {
        return Some((*kind, (0, 0)));
    }
    let (_, kind) = DEVICES.iter().find(|(known, _)| *known == word)?;
    let mut number = || parts.next().filter(|text| is_number(text))?.parse().ok();
    Some((*kind, (number()?, number()?)))
}

/// Tells whether an xattr overrides the attributes of what carries it, in any form.
pub fn is_stat_xattr(name: &[u8]) -> bool {
    [PRIVILEGED, CONTAINERS, USER].contains(&name)
}

/// Returns the name under which an xattr is kept in a layer of this form; `None` if it cannot be.
pub fn stored_name(form: Option<Form>, visible: &[u8]) -> Option<Cow<'_, [u8]>> {
    if visible.starts_with(PRIVILEGED_PREFIX) {
        return None;
    }
    if !form.is_some_and(Form::encodes) || !is_encoded(visible) {
        return (form.is_none() || !is_stat_xattr(visible)).then_some(Cow::Borrowed(visible));
    }
    let stored = [CONTAINERS_PREFIX, visible].concat();
    (stored.len() <= XATTR_NAME_MAX).then_some(Cow::Owned(stored))
}

/// Returns the name that an xattr in a layer of this form is seen by; `None` if it is hidden.
pub fn visible_name(form: Option<Form>, stored: &[u8]) -> Option<&[u8]> {
    if stored.starts_with(PRIVILEGED_PREFIX) || form.is_some() && is_stat_xattr(stored) {
        return None;
    }
    if !form.is_some_and(Form::encodes) || !is_encoded(stored) {
        return Some(stored);
    }
    stored.strip_prefix(CONTAINERS_PREFIX).filter(|inner| is_encoded(inner))
}

/// Tells whether xattrs of this name have another one in the form [`Form::Containers`]: those that
/// need privilege, and those that would be taken for such.
fn is_encoded(name: &[u8]) -> bool {
    name.starts_with(b"security.") || name.starts_with(CONTAINERS_PREFIX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PLAIN: Override = Override { uid: 0, gid: 0, mode: 0o755, kind: None };

    #[test]
    fn values() {
        let kind = |kind, rdev| Override { kind: Some((kind, rdev)), ..PLAIN };
        for (text, expected) in [
            ("0:0:755", Some(PLAIN)),
            ("0:0:0755", Some(PLAIN)),
            ("0:0:100755", Some(PLAIN)),
            ("7:8:6755", Some(Override { uid: 7, gid: 8, mode: 0o6755, kind: None })),
            ("0:0:0755:file", Some(kind(libc::S_IFREG, (0, 0)))),
            ("0:0:0755:dir", Some(kind(libc::S_IFDIR, (0, 0)))),
            ("0:0:0755:symlink", Some(kind(libc::S_IFLNK, (0, 0)))),
            ("0:0:0755:pipe", Some(kind(libc::S_IFIFO, (0, 0)))),
            ("0:0:0755:socket", Some(kind(libc::S_IFSOCK, (0, 0)))),
            ("0:0:0755:block-8-1", Some(kind(libc::S_IFBLK, (8, 1)))),
            ("0:0:0755:char-5-300-7:more", Some(kind(libc::S_IFCHR, (5, 300)))),
            ("0:0:0755:file:more", Some(kind(libc::S_IFREG, (0, 0)))),
            ("", None),
            ("0:0", None),
            ("0:0:", None),
            ("0:0:9", None),
            ("0:0:+7", None),
            ("-1:0:7", None),
            ("0:4294967295:7", None),
            ("0:0:755:", None),
            ("0:0:755:door", None),
            ("0:0:755:char", None),
            ("0:0:755:char-1", None),
            ("0:0:755:char-1-x", None),
            ("0:0:755\0", None),
        ] {
            assert_eq!(Override::parse(text.as_bytes()), expected, "{text}");
        }
        assert_eq!(PLAIN.print(), b"0:0:0755");
        let device = Override { uid: 1, gid: 2, mode: 0o4711, kind: Some((libc::S_IFCHR, (5, 1))) };
        assert_eq!(device.print(), b"1:2:4711:char-5-1");
    }

    #[test]
    fn names() {
        let containers = Some(Form::Containers);
        for (form, visible, stored) in [
            (None, &b"security.capability"[..], Some(&b"security.capability"[..])),
            (None, b"user.containers.override_stat", Some(b"user.containers.override_stat")),
            (None, b"security.fuseoverlayfs.x", None),
            (Some(Form::User), b"security.capability", Some(b"security.capability")),
            (Some(Form::User), b"user.containers.override_stat", None),
            (Some(Form::Privileged), b"user.x", Some(b"user.x")),
            (containers, b"user.x", Some(b"user.x")),
            (
                containers,
                b"security.capability",
                Some(b"user.containers.override_security.capability"),
            ),
            (
                containers,
                b"user.containers.override_stat",
                Some(b"user.containers.override_user.containers.override_stat"),
            ),
        ] {
            assert_eq!(stored_name(form, visible).as_deref(), stored, "{visible:?}");
            if let Some(stored) = stored {
                assert_eq!(visible_name(form, stored), Some(visible));
            }
        }
        for hidden in [
            &b"security.capability"[..],
            b"user.containers.override_stat",
            b"user.containers.override_x",
        ] {
            assert_eq!(visible_name(containers, hidden), None);
        }
        let long = [b"security.".as_slice(), &[b'x'; 240]].concat();
        assert_eq!(stored_name(containers, &long), None);
    }

    proptest! {
        #[test]
        fn what_is_printed_is_parsed(
            (uid, gid, mode) in (0..u32::MAX, 0..u32::MAX, 0..0o10000_u32),
            kind in 0..7_usize,
            rdev in any::<(u32, u32)>(),
        ) {
            let kind = match KINDS.get(kind) {
                Some((_, kind)) => (*kind, (0, 0)),
                None => (DEVICES[kind - KINDS.len()].1, rdev),
            };
            let given = Override { uid, gid, mode, kind: Some(kind) };
            prop_assert_eq!(Override::parse(&given.print()), Some(given));
        }

        #[test]
        fn nothing_panics(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            Override::parse(&bytes);
            visible_name(Some(Form::Containers), &bytes);
        }

        #[test]
        fn near_misses_do_not_panic(text in "[0-9]{0,12}:[0-9]{0,3}:[0-7]{0,14}(:(char|block|dir)?-?[0-9]{0,11}-?[0-9]{0,3})?") {
            Override::parse(text.as_bytes());
        }
    }
}
