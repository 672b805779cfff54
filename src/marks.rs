//! The on-disk vocabulary of overlay layers: names and values that mean something to the union.
//!
//! Knows bytes only: it does no I/O and takes no locks. What a mark does to the merged tree is
//! decided elsewhere; here is how marks are spelled, told apart from user data, and hidden.

use std::borrow::Cow;

/// Bytes that begin every reserved name: whiteouts and opaque marks kept as files.
pub const WHITEOUT_PREFIX: &[u8] = b".wh.";

/// Name of the empty file that makes the directory it lies in opaque.
pub const OPAQUE_NAME: &[u8] = b".wh..wh..opq";

/// Longest name of a directory entry, in bytes (`NAME_MAX`).
pub const NAME_MAX: usize = 255;

/// Longest name of an extended attribute, in bytes (`XATTR_NAME_MAX`).
pub const XATTR_NAME_MAX: usize = 255;

/// Private xattrs of a mount that holds `CAP_SYS_ADMIN` over its layers.
pub const TRUSTED_PREFIX: &[u8] = b"trusted.overlay.";

/// Private xattrs of an unprivileged mount.
pub const USER_PREFIX: &[u8] = b"user.overlay.";

/// Private xattrs that older mount programs write; read, and written for such a program in the mount.
pub const MOUNT_PROGRAM_PREFIX: &[u8] = b"user.fuseoverlayfs.";

/// What one level of nesting adds between a private prefix and the rest of the name.
const NESTING: &[u8] = b"overlay.";

/// Xattrs that mark a directory opaque, in the order in which they are tried.
pub const OPAQUE_XATTRS: [&[u8]; 3] =
    [b"trusted.overlay.opaque", b"user.overlay.opaque", b"user.fuseoverlayfs.opaque"];

/// Xattrs whose presence makes an empty regular file a whiteout, whatever their value.
pub const WHITEOUT_XATTRS: [&[u8]; 2] = [b"trusted.overlay.whiteout", b"user.overlay.whiteout"];

/// Xattrs whose presence makes an empty regular file a whiteout of an overlay nested in the mount:
/// it shows as a character device 0:0 there.
pub const NESTED_WHITEOUT_XATTRS: [&[u8]; 2] =
    [b"trusted.overlay.overlay.whiteout", b"user.overlay.overlay.whiteout"];

/// Xattrs that mark a directory which may hold whiteouts of a nested overlay, whatever their value.
pub const NESTED_WHITEOUTS_XATTRS: [&[u8]; 2] =
    [b"trusted.overlay.overlay.whiteouts", b"user.overlay.overlay.whiteouts"];

/// Xattrs that mark a directory opaque for a nested overlay, or with `x` as one like the above.
pub const NESTED_OPAQUE_XATTRS: [&[u8]; 2] =
    [b"trusted.overlay.overlay.opaque", b"user.overlay.overlay.opaque"];

/// Value that is written to mark a directory as one that may hold xattr whiteouts.
pub const XATTR_WHITEOUTS_VALUE: &[u8] = b"x";

/// Xattrs by which Linux 6.7 marked a directory that may hold xattr whiteouts, whatever their
/// value; later kernels write opaque `x` instead ([`Opaque::XattrWhiteouts`]).
pub const XATTR_WHITEOUTS_XATTRS: [&[u8]; 2] =
    [b"trusted.overlay.whiteouts", b"user.overlay.whiteouts"];

/// Xattrs that tell where in lower layers a renamed directory goes on.
pub const REDIRECT_XATTRS: [&[u8]; 2] = [b"trusted.overlay.redirect", b"user.overlay.redirect"];

/// Xattrs of a file whose data lies in a lower layer.
pub const METACOPY_XATTRS: [&[u8]; 2] = [b"trusted.overlay.metacopy", b"user.overlay.metacopy"];

/// Longest redirect that is written, in bytes, as the kernel's `redirect_max` has it.
pub const REDIRECT_MAX: usize = 256;

/// Where the lower part of an object goes on in the layers beneath.
///
/// # Source
/// overlayfs.rst, "redirect_dir".
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Redirect {
    /// Under this name in the same directory.
    Sibling(Box<[u8]>),
    /// At this path from the root of a layer.
    Path(Vec<Box<[u8]>>),
}

impl Redirect {
    /// Reads a value; `None` if it leads nowhere: empty, with an empty name, `.`, `..` or a NUL.
    pub fn parse(value: &[u8]) -> Option<Self> {
        let is_name = |name: &[u8]| !matches!(name, b"" | b"." | b"..") && !name.contains(&0);
        match value.strip_prefix(b"/") {
            Some(path) => {
                let names = path.split(|byte| *byte == b'/');
                let names = names.map(|name| is_name(name).then(|| name.into()));
                names.collect::<Option<_>>().map(Self::Path)
            }
            None => (is_name(value) && !value.contains(&b'/')).then(|| Self::Sibling(value.into())),
        }
    }

    /// Returns the value that says it.
    pub fn print(&self) -> Vec<u8> {
        match self {
            Self::Sibling(name) => name.to_vec(),
            Self::Path(path) => path.iter().flat_map(|name| [b"/", &**name].concat()).collect(),
        }
    }
}

/// Xattrs that tell which lower object an upper one was copied from.
pub const ORIGIN_XATTRS: [&[u8]; 2] = [b"trusted.overlay.origin", b"user.overlay.origin"];

/// Xattrs of a directory of the upper layer that may hold objects with an origin.
pub const IMPURE_XATTRS: [&[u8]; 2] = [b"trusted.overlay.impure", b"user.overlay.impure"];

/// Xattrs of an upper object that is append-only or immutable.
pub const PROTATTR_XATTRS: [&[u8]; 2] = [b"trusted.overlay.protattr", b"user.overlay.protattr"];

/// Xattrs of an upper file that stands for several lower names: their number.
pub const NLINK_XATTRS: [&[u8]; 2] = [b"trusted.overlay.nlink", b"user.overlay.nlink"];

/// Xattrs of an index directory that name the upper layer it belongs to.
pub const UPPER_XATTRS: [&[u8]; 2] = [b"trusted.overlay.upper", b"user.overlay.upper"];

/// Xattrs of the root of an upper layer that name it, as 16 bytes.
pub const UUID_XATTRS: [&[u8]; 2] = [b"trusted.overlay.uuid", b"user.overlay.uuid"];

/// Value that is written to mark a directory impure.
pub const IMPURE_VALUE: &[u8] = b"y";

/// Where a mount keeps the marks that it writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Namespace {
    /// `trusted.overlay.`, which needs `CAP_SYS_ADMIN`.
    Trusted,
    /// `user.overlay.`
    User,
}

impl Namespace {
    /// Returns which of the names of a mark belongs to the namespace: the first, or the second.
    pub fn of(self, names: &[&'static [u8]]) -> &'static [u8] {
        let at = usize::from(self == Self::User);
        names.get(at).copied().unwrap_or_default()
    }
}

/// Digest of a file's data, as fs-verity computes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Digest {
    /// `FS_VERITY_HASH_ALG_*`.
    pub algorithm: u8,
    /// 1 to 64 bytes.
    pub bytes: Box<[u8]>,
}

/// What the metacopy xattr of a file says.
///
/// # Source
/// overlayfs.rst, "fs-verity support"; `struct ovl_metacopy`: version, length, flags, algorithm, one
/// byte each, then the digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metacopy {
    /// The digest that the data must have.
    pub digest: Option<Digest>,
}

impl Metacopy {
    /// Reads a value; `None` for one of another version, with flags, or of a wrong length.
    pub fn parse(value: &[u8]) -> Option<Self> {
        const LONGEST: usize = 64;
        if value.is_empty() {
            return Some(Self { digest: None });
        }
        let ([0, len, 0, algorithm], bytes) = value.split_first_chunk::<4>()? else { return None };
        if usize::from(*len) != value.len() || bytes.len() > LONGEST {
            return None;
        }
        match (*algorithm, bytes) {
            (0, b"") => Some(Self { digest: None }),
            (0, _) | (_, b"") => None,
            _ => Some(Self { digest: Some(Digest { algorithm: *algorithm, bytes: bytes.into() }) }),
        }
    }

    /// Returns the value that says it, empty without a digest.
    pub fn print(&self) -> Vec<u8> {
        let Some(digest) = &self.digest else { return Vec::new() };
        let len = u8::try_from(digest.bytes.len() + 4).unwrap_or(u8::MAX);
        [&[0, len, 0, digest.algorithm], &*digest.bytes].concat()
    }
}

/// Value that is written to make a directory opaque.
pub const OPAQUE_VALUE: &[u8] = b"y";

/// What the opaque xattr of a directory says.
///
/// # Source
/// overlayfs.rst, "whiteouts and opaque directories".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opaque {
    /// The directory merges with what lies beneath.
    No,
    /// It hides all that lies beneath.
    Yes,
    /// It merges, and empty files in it may be whiteouts.
    XattrWhiteouts,
}

impl Opaque {
    /// Returns the meaning of an opaque xattr's value.
    ///
    /// The value must be one byte, as in the kernel; anything else means nothing.
    pub fn from_value(value: &[u8]) -> Self {
        match value {
            b"y" => Self::Yes,
            b"x" => Self::XattrWhiteouts,
            _ => Self::No,
        }
    }
}

/// Returns whether one of `names` is in a list of xattr names, each followed by a NUL.
pub fn lists_any(list: &[u8], names: &[&[u8]]) -> bool {
    !list.is_empty() && list.split(|byte| *byte == 0).any(|listed| names.contains(&listed))
}

/// Returns whether `name` is never visible in the merged tree and cannot be created in it.
pub fn is_reserved_name(name: &[u8]) -> bool {
    name.starts_with(WHITEOUT_PREFIX)
}

/// Returns the name that a file called `name` hides, if it is a whiteout kept as a file.
///
/// The opaque mark and names that no visible entry can have are not whiteouts.
pub fn whiteout_target(name: &[u8]) -> Option<&[u8]> {
    let target = name.strip_prefix(WHITEOUT_PREFIX)?;
    let is_visible_name = !matches!(target, b"" | b"." | b"..") && !is_reserved_name(target);
    is_visible_name.then_some(target)
}

/// Returns the name of the file that hides `name`, or `None` if it would be too long to exist.
pub fn whiteout_name(name: &[u8]) -> Option<Vec<u8>> {
    let stored = [WHITEOUT_PREFIX, name].concat();
    (stored.len() <= NAME_MAX).then_some(stored)
}

/// Returns whether a stored xattr is a mark of the union's own, not shown to users.
///
/// Escaped names, which belong to an overlay mounted within the merged tree, are not private.
pub fn is_private_xattr(stored: &[u8]) -> bool {
    visible_name(stored).is_none()
}

/// Returns the name under which the xattr that users call `visible` is stored.
///
/// `None` if there can be no such xattr: its escaped name is longer than [`XATTR_NAME_MAX`]. The
/// kernel answers `EOPNOTSUPP` then, to reads as well.
///
/// # Source
/// overlayfs.rst, "Nesting overlayfs mounts". Differs: `trusted.` and `user.` names are both
/// escaped, as both are read as marks, and so are those of mount programs; the kernel escapes those
/// of the mount's namespace only. A bare prefix is a name like any other; the kernel answers `EINVAL`.
pub fn stored_name(visible: &[u8]) -> Option<Cow<'_, [u8]>> {
    match split_private(visible) {
        Some((prefix, rest)) => {
            let stored = [prefix, NESTING, rest].concat();
            (stored.len() <= XATTR_NAME_MAX).then_some(Cow::Owned(stored))
        }
        None => Some(Cow::Borrowed(visible)),
    }
}

/// Returns the name under which users see the xattr stored as `stored`; `None` if it is hidden.
///
/// # Source
/// overlayfs.rst, "Nesting overlayfs mounts".
pub fn visible_name(stored: &[u8]) -> Option<Cow<'_, [u8]>> {
    match split_private(stored) {
        Some((prefix, rest)) => {
            let inner = rest.strip_prefix(NESTING)?;
            Some(Cow::Owned([prefix, inner].concat()))
        }
        None => Some(Cow::Borrowed(stored)),
    }
}

/// Splits a name behind a prefix of private ones.
fn split_private(name: &[u8]) -> Option<(&'static [u8], &[u8])> {
    [TRUSTED_PREFIX, USER_PREFIX, MOUNT_PROGRAM_PREFIX]
        .into_iter()
        .find_map(|prefix| Some((prefix, name.strip_prefix(prefix)?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn opaque_values() {
        for (value, meaning) in [
            (&b"y"[..], Opaque::Yes),
            (b"x", Opaque::XattrWhiteouts),
            (b"", Opaque::No),
            (b"n", Opaque::No),
            (b"Y", Opaque::No),
            (b"yy", Opaque::No),
            (b"y\0", Opaque::No),
            (b"xy", Opaque::No),
        ] {
            assert_eq!(Opaque::from_value(value), meaning, "{value:?}");
        }
        assert_eq!(Opaque::from_value(OPAQUE_VALUE), Opaque::Yes);
    }

    #[test]
    fn redirects() {
        for value in ["a", "a b", "/a", "/a/b", "/.a/b..", "\n"] {
            let redirect = Redirect::parse(value.as_bytes()).unwrap();
            assert_eq!(redirect.print(), value.as_bytes());
            assert_eq!(matches!(redirect, Redirect::Path(_)), value.starts_with('/'), "{value}");
        }
        for value in ["", "/", "//", "/a/", "//a", "/a//b", ".", "..", "a/b", "/..", "/a/../b"] {
            assert_eq!(Redirect::parse(value.as_bytes()), None, "{value}");
        }
        assert_eq!(Redirect::parse(b"a\0"), None);
        assert_eq!(Redirect::parse(b"/a/b\0"), None);
    }

    #[test]
    fn metacopies() {
        let digest = |algorithm, bytes: &[u8]| Metacopy {
            digest: Some(Digest { algorithm, bytes: bytes.into() }),
        };
        let sha256 = [&[0, 36, 0, 1][..], &[7; 32]].concat();
        let sha512 = [&[0, 68, 0, 2][..], &[9; 64]].concat();
        for (value, meaning) in [
            (&b""[..], Metacopy { digest: None }),
            (&sha256, digest(1, &[7; 32])),
            (&sha512, digest(2, &[9; 64])),
        ] {
            assert_eq!(Metacopy::parse(value), Some(meaning.clone()));
            assert_eq!(meaning.print(), value);
        }
        assert_eq!(Metacopy::parse(&[0, 4, 0, 0]), Some(Metacopy { digest: None }));
        let mut long = vec![0, 69, 0, 2];
        long.resize(69, 1);
        for value in [
            &[0][..],
            &[0, 2],
            &[0, 3, 0],
            &[1, 4, 0, 0],
            &[0, 4, 1, 0],
            &[0, 5, 0, 0],
            &[0, 3, 0, 0],
            &[0, 4, 0, 1],
            &[0, 5, 0, 0, 9],
            &sha256[..35],
            &long,
        ] {
            assert_eq!(Metacopy::parse(value), None, "{value:?}");
        }
    }

    #[test]
    fn whiteout_files() {
        for (name, is_reserved, target) in [
            (&b"a"[..], false, None),
            (b"", false, None),
            (b".wh", false, None),
            (b".wha", false, None),
            (b"x.wh.a", false, None),
            (b".WH.a", false, None),
            (b".wh.", true, None),
            (b".wh.a", true, Some(&b"a"[..])),
            (b".wh.\xff", true, Some(b"\xff")),
            (b".wh..a", true, Some(b".a")),
            (b".wh...", true, None),
            (b".wh..", true, None),
            (b".wh....", true, Some(b"...")),
            (b".wh..wh.plnk", true, None),
            (OPAQUE_NAME, true, None),
        ] {
            let shown = String::from_utf8_lossy(name);
            assert_eq!(is_reserved_name(name), is_reserved, "{shown}");
            assert_eq!(whiteout_target(name), target, "{shown}");
        }
    }

    #[test]
    fn whiteout_names_end_where_names_do() {
        assert_eq!(whiteout_name(b"a"), Some(b".wh.a".to_vec()));
        assert_eq!(whiteout_name(&[b'a'; 251]).map(|name| name.len()), Some(NAME_MAX));
        assert_eq!(whiteout_name(&[b'a'; 252]), None);
    }

    #[test]
    fn stored_names() {
        for (visible, stored) in [
            (&b"user.a"[..], Some(&b"user.a"[..])),
            (b"security.capability", Some(b"security.capability")),
            (b"trusted.overlayopaque", Some(b"trusted.overlayopaque")),
            (b"trusted.overlay", Some(b"trusted.overlay")),
            (b"xtrusted.overlay.a", Some(b"xtrusted.overlay.a")),
            (b"trusted.overlay.opaque", Some(b"trusted.overlay.overlay.opaque")),
            (b"user.overlay.opaque", Some(b"user.overlay.overlay.opaque")),
            (b"trusted.overlay.overlay.a", Some(b"trusted.overlay.overlay.overlay.a")),
            (b"user.overlay.", Some(b"user.overlay.overlay.")),
            (b"user.overlay.\xff", Some(b"user.overlay.overlay.\xff")),
            (b"user.fuseoverlayfs.opaque", Some(b"user.fuseoverlayfs.overlay.opaque")),
            (b"user.fuseoverlayfs", Some(b"user.fuseoverlayfs")),
        ] {
            assert_eq!(stored_name(visible).as_deref(), stored, "{visible:?}");
        }
    }

    #[test]
    fn escaped_names_end_where_xattr_names_do() {
        let longest = [TRUSTED_PREFIX, &[b'a'; XATTR_NAME_MAX - 16 - 8]].concat();
        assert_eq!(stored_name(&longest).map(|name| name.len()), Some(XATTR_NAME_MAX));
        assert_eq!(stored_name(&[&longest[..], b"a"].concat()), None);
    }

    #[test]
    fn visible_names() {
        for (stored, visible) in [
            (&b"user.a"[..], Some(&b"user.a"[..])),
            (b"system.posix_acl_access", Some(b"system.posix_acl_access")),
            (b"trusted.overlay", Some(b"trusted.overlay")),
            (b"trusted.overlay.opaque", None),
            (b"trusted.overlay.overlay", None),
            (b"trusted.overlay.overlayx", None),
            (b"user.overlay.whiteout", None),
            (b"user.overlay.", None),
            (b"trusted.overlay.overlay.opaque", Some(b"trusted.overlay.opaque")),
            (b"user.overlay.overlay.overlay.a", Some(b"user.overlay.overlay.a")),
            (b"user.fuseoverlayfs.origin", None),
            (b"user.fuseoverlayfs.overlay.origin", Some(b"user.fuseoverlayfs.origin")),
        ] {
            assert_eq!(visible_name(stored).as_deref(), visible, "{stored:?}");
            assert_eq!(is_private_xattr(stored), visible.is_none(), "{stored:?}");
        }
    }

    #[test]
    fn marks_are_private() {
        for mark in OPAQUE_XATTRS.iter().chain(&WHITEOUT_XATTRS).chain(&XATTR_WHITEOUTS_XATTRS) {
            assert!(is_private_xattr(mark), "{mark:?}");
        }
    }

    /// Returns names that often begin with, or nearly with, what the functions look for.
    fn name() -> impl Strategy<Value = Vec<u8>> {
        let part = prop_oneof![
            Just(TRUSTED_PREFIX.to_vec()),
            Just(USER_PREFIX.to_vec()),
            Just(MOUNT_PROGRAM_PREFIX.to_vec()),
            Just(NESTING.to_vec()),
            Just(WHITEOUT_PREFIX.to_vec()),
            proptest::collection::vec(any::<u8>(), 0..4),
        ];
        proptest::collection::vec(part, 0..6).prop_map(|parts| parts.concat())
    }

    proptest! {
        #[test]
        fn what_is_stored_is_seen_again(visible in name()) {
            if let Some(stored) = stored_name(&visible) {
                prop_assert!(!is_private_xattr(&stored));
                let again = visible_name(&stored);
                prop_assert_eq!(again.as_deref(), Some(&visible[..]));
            }
        }

        #[test]
        fn what_is_seen_is_found_again(stored in name()) {
            if let Some(visible) = visible_name(&stored) {
                let again = stored_name(&visible);
                prop_assert_eq!(again.as_deref(), Some(&stored[..]));
            }
        }

        #[test]
        fn whiteout_names_are_read_back(name in name()) {
            if let Some(stored) = whiteout_name(&name) {
                prop_assert!(is_reserved_name(&stored));
                if let Some(target) = whiteout_target(&stored) {
                    prop_assert_eq!(target, &name[..]);
                } else {
                    let named = is_reserved_name(&name) || [&b""[..], b".", b".."].contains(&&name[..]);
                    prop_assert!(named);
                }
            }
        }
    }
}
