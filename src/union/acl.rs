//! POSIX ACLs as extended attributes: what a new object takes from its parent's default ACL.
//!
//! Pure: knows the bytes of `system.posix_acl_default` and `system.posix_acl_access`, does no I/O
//! and takes no locks. Content is checked as the kernel checks it and may be hostile.

use crate::error::{Errno, Error, Result};
use crate::idmap::{IdMap, Ids, InnerId, OuterId};

/// The ACL that is checked.
pub(super) const ACCESS: &[u8] = b"system.posix_acl_access";
/// The ACL that new objects in a directory start with.
pub(super) const DEFAULT: &[u8] = b"system.posix_acl_default";

/// Version that opens every ACL xattr.
const VERSION: u32 = 2;
/// Bytes of the version.
const HEADER_BYTES: usize = 4;
/// Bytes of one entry: tag, permissions, id.
const ENTRY_BYTES: usize = 8;
/// Id of entries that name nobody.
const NO_ID: u32 = u32::MAX;

const TAG_USER_OBJ: u16 = 0x01;
const TAG_USER: u16 = 0x02;
const TAG_GROUP_OBJ: u16 = 0x04;
const TAG_GROUP: u16 = 0x08;
const TAG_MASK: u16 = 0x10;
const TAG_OTHER: u16 = 0x20;

/// What a new object gets in a directory that has a default ACL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Inherited {
    /// The mode to create it with; the umask plays no part.
    pub(crate) mode: u32,
    /// Value of `system.posix_acl_access`, unless the mode says all of it.
    pub(crate) access: Option<Vec<u8>>,
    /// Value of `system.posix_acl_default`; directories only.
    pub(crate) default: Option<Vec<u8>>,
}

/// Returns mode and ACLs of an object created with `mode` under the default ACL `default_acl`.
///
/// `mode` is the caller's before its umask; bits above 0o777 pass unchanged. Not for symlinks,
/// which have no ACL. An ACL without entries is none: the result is `mode` as it was, and the
/// caller's umask applies.
///
/// # Errors
/// `Corrupt` (`EIO`) if `default_acl` is no valid ACL.
/// # Source
/// acl(5), "OBJECT CREATION AND DEFAULT ACLs"; `posix_acl_create` in fs/posix_acl.c.
/// Differs: nowhere known.
pub(crate) fn inherit(default_acl: &[u8], mode: u32, is_dir: bool) -> Result<Inherited> {
    let inherited_by_children = parse(default_acl)?;
    if inherited_by_children.is_empty() {
        return Ok(Inherited { mode, access: None, default: None });
    }
    let has_mask = inherited_by_children.iter().any(|entry| entry.tag == TAG_MASK);
    let mut is_equivalent_to_mode = true;
    let mut permissions = 0;
    let mut access = inherited_by_children.clone();
    for entry in &mut access {
        // The class of the mode that bounds this entry, and is in turn bounded by it. With a
        // mask, the group bits of the mode are the mask's and the owning group's entry is free.
        let shift = match entry.tag {
            TAG_USER_OBJ => 6,
            TAG_OTHER => 0,
            TAG_MASK => 3,
            TAG_GROUP_OBJ if !has_mask => 3,
            _ => {
                is_equivalent_to_mode = false;
                continue;
            }
        };
        if entry.tag == TAG_MASK {
            is_equivalent_to_mode = false;
        }
        entry.permissions &= (mode >> shift) & 0o7;
        permissions |= entry.permissions << shift;
    }
    Ok(Inherited {
        mode: (mode & !0o777) | permissions,
        access: (!is_equivalent_to_mode).then(|| print(&access)),
        default: is_dir.then(|| print(&inherited_by_children)),
    })
}

/// Returns what the owning group may do under an access ACL: its entry, within the mask.
///
/// # Errors
/// `Corrupt` (`EIO`) if `bytes` is no valid ACL.
pub(super) fn group_permissions(bytes: &[u8]) -> Result<u32> {
    let bounds = [TAG_GROUP_OBJ, TAG_MASK];
    let entries = parse(bytes)?;
    let bounds = entries.iter().filter(|entry| bounds.contains(&entry.tag));
    Ok(bounds.fold(0o7, |allowed, entry| allowed & entry.permissions))
}

/// Returns a stored ACL with the ids that are shown. Entries of ids that have none are left out:
/// they match nobody, and the overflow id that stat(2) shows is somebody's.
///
/// # Errors
/// `Corrupt` (`EIO`) if `bytes` is no valid ACL.
pub(super) fn shown(bytes: &[u8], ids: &Ids) -> Result<Vec<u8>> {
    let mut entries = parse(bytes)?;
    entries.retain_mut(|entry| {
        let Some(map) = entry.map(ids) else { return true };
        let id = map.show(InnerId::stored(entry.id));
        entry.id = id.to_show();
        id != OuterId::NONE
    });
    Ok(print(&entries))
}

/// Returns an ACL that is set, with the ids to store.
///
/// # Errors
/// `EINVAL` if `bytes` is no valid ACL; `EOVERFLOW` if the layers have no such id.
pub(super) fn stored(bytes: &[u8], ids: &Ids) -> Result<Vec<u8>> {
    let mut entries = parse(bytes).map_err(|_invalid| Errno::INVAL)?;
    for entry in &mut entries {
        if let Some(map) = entry.map(ids) {
            entry.id = map.store(OuterId::asked(entry.id)).ok_or(Errno::OVERFLOW)?.to_store();
        }
    }
    Ok(print(&entries))
}

/// One entry; the id means something for [`TAG_USER`] and [`TAG_GROUP`] only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    tag: u16,
    permissions: u32,
    id: u32,
}

impl Entry {
    /// Returns the map of the entry's id, if it names somebody.
    fn map<'a>(&self, ids: &'a Ids) -> Option<&'a IdMap> {
        match self.tag {
            TAG_USER => Some(&ids.users),
            TAG_GROUP => Some(&ids.groups),
            _ => None,
        }
    }
}

/// Reads an ACL: owner, named users, owning group, named groups, mask if any is named, others.
fn parse(bytes: &[u8]) -> Result<Vec<Entry>> {
    let (header, body) = bytes
        .split_first_chunk::<HEADER_BYTES>()
        .ok_or_else(|| corrupt("shorter than its header"))?;
    if u32::from_le_bytes(*header) != VERSION {
        return Err(corrupt("of unknown version"));
    }
    if body.len() % ENTRY_BYTES != 0 {
        return Err(corrupt("cut short"));
    }
    let mut entries = Vec::with_capacity(body.len() / ENTRY_BYTES);
    let mut previous_tag = 0;
    let mut is_mask_needed = false;
    for raw in body.chunks_exact(ENTRY_BYTES) {
        let &[tag0, tag1, perm0, perm1, id0, id1, id2, id3] = raw else {
            return Err(corrupt("cut short"));
        };
        let tag = u16::from_le_bytes([tag0, tag1]);
        let permissions = u32::from(u16::from_le_bytes([perm0, perm1]));
        let id = u32::from_le_bytes([id0, id1, id2, id3]);
        if permissions & !0o7 != 0 {
            return Err(corrupt("with unknown permission bits"));
        }
        // Tags are numbered in the order in which they must appear; after each, those allowed.
        let is_in_order = match tag {
            TAG_USER_OBJ => previous_tag == 0,
            TAG_USER => matches!(previous_tag, TAG_USER_OBJ | TAG_USER),
            TAG_GROUP_OBJ => matches!(previous_tag, TAG_USER_OBJ | TAG_USER),
            TAG_GROUP => matches!(previous_tag, TAG_GROUP_OBJ | TAG_GROUP),
            TAG_MASK => matches!(previous_tag, TAG_GROUP_OBJ | TAG_GROUP),
            TAG_OTHER => {
                previous_tag == TAG_MASK
                    || (!is_mask_needed && matches!(previous_tag, TAG_GROUP_OBJ | TAG_GROUP))
            }
            _ => false,
        };
        if !is_in_order {
            return Err(corrupt("with entries missing, repeated or out of order"));
        }
        let is_named = matches!(tag, TAG_USER | TAG_GROUP);
        if is_named && id == NO_ID {
            return Err(corrupt("with an entry that names nobody"));
        }
        is_mask_needed |= is_named;
        previous_tag = tag;
        entries.push(Entry { tag, permissions, id: if is_named { id } else { NO_ID } });
    }
    if !matches!(previous_tag, 0 | TAG_OTHER) {
        return Err(corrupt("with entries missing, repeated or out of order"));
    }
    Ok(entries)
}

/// Writes an ACL as the kernel does.
fn print(entries: &[Entry]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + entries.len() * ENTRY_BYTES);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    for entry in entries {
        bytes.extend_from_slice(&entry.tag.to_le_bytes());
        let [low, high, _, _] = entry.permissions.to_le_bytes();
        bytes.extend_from_slice(&[low, high]);
        bytes.extend_from_slice(&entry.id.to_le_bytes());
    }
    bytes
}

/// Returns the error for an ACL that is `what`.
fn corrupt(what: &str) -> Error {
    Error::Corrupt { what: format!("an ACL {what}").into(), at: "system.posix_acl_default".into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rustix::fs::{self, AtFlags, CWD, Mode, OFlags, XattrFlags};
    use rustix::io::Errno;
    use std::path::Path;

    const ACCESS: &str = "system.posix_acl_access";
    const DEFAULT: &str = "system.posix_acl_default";

    #[test]
    fn ids_are_translated_and_nobody_is_somebody() {
        let users = IdMap::parse("0:100000:65536").unwrap();
        let groups = IdMap::parse("0:200000:65536").unwrap();
        let ids = Ids { users, groups };
        let with = |user: u32, group: u32, more: &[(u16, u32, u32)]| {
            let mut entries = vec![(TAG_USER_OBJ, 7, NO_ID), (TAG_USER, 6, user)];
            entries.extend(more.iter().filter(|entry| entry.0 == TAG_USER));
            entries.extend([(TAG_GROUP_OBJ, 5, NO_ID), (TAG_GROUP, 4, group)]);
            entries.extend([(TAG_MASK, 7, NO_ID), (TAG_OTHER, 0, NO_ID)]);
            acl(&entries)
        };
        let (inner, outer) = (with(7, 8, &[]), with(100_007, 200_008, &[]));
        assert_eq!(shown(&inner, &ids).unwrap(), outer);
        assert_eq!(stored(&outer, &ids).unwrap(), inner);
        let foreign = with(7, 8, &[(TAG_USER, 7, 70_000)]);
        assert_eq!(shown(&foreign, &ids).unwrap(), outer);
        assert_eq!(stored(&inner, &ids).unwrap_err().errno(), Errno::OVERFLOW);
        assert_eq!(stored(b"x", &ids).unwrap_err().errno(), Errno::INVAL);
        assert_eq!(shown(b"x", &ids).unwrap_err().errno(), Errno::IO);
    }

    /// Builds an ACL from (tag, permissions, id).
    fn acl(entries: &[(u16, u32, u32)]) -> Vec<u8> {
        let entries: Vec<_> =
            entries.iter().map(|&(tag, permissions, id)| Entry { tag, permissions, id }).collect();
        print(&entries)
    }

    /// Returns ACLs of every shape: without and with a mask, with and without names.
    fn samples() -> Vec<Vec<u8>> {
        let minimal = |user, group, other| {
            acl(&[
                (TAG_USER_OBJ, user, NO_ID),
                (TAG_GROUP_OBJ, group, NO_ID),
                (TAG_OTHER, other, NO_ID),
            ])
        };
        vec![
            minimal(7, 7, 7),
            minimal(7, 5, 0),
            minimal(6, 4, 4),
            minimal(0, 0, 0),
            acl(&[
                (TAG_USER_OBJ, 7, NO_ID),
                (TAG_GROUP_OBJ, 7, NO_ID),
                (TAG_MASK, 5, NO_ID),
                (TAG_OTHER, 5, NO_ID),
            ]),
            acl(&[
                (TAG_USER_OBJ, 7, NO_ID),
                (TAG_USER, 6, 1000),
                (TAG_USER, 7, 1001),
                (TAG_GROUP_OBJ, 5, NO_ID),
                (TAG_GROUP, 7, 100),
                (TAG_MASK, 7, NO_ID),
                (TAG_OTHER, 1, NO_ID),
            ]),
            acl(&[
                (TAG_USER_OBJ, 6, NO_ID),
                (TAG_GROUP_OBJ, 0, NO_ID),
                (TAG_GROUP, 7, 0),
                (TAG_MASK, 2, NO_ID),
                (TAG_OTHER, 0, NO_ID),
            ]),
        ]
    }

    #[test]
    fn mode_alone_says_a_minimal_acl() {
        let acl = &samples()[1]; // rwxr-x---
        for (mode, expected) in [
            (0o666, 0o640),
            (0o777, 0o750),
            (0o000, 0o000),
            (0o4777, 0o4750),
            (0o100_644, 0o100_640),
        ] {
            let file = inherit(acl, mode, false).unwrap();
            assert_eq!(file, Inherited { mode: expected, access: None, default: None }, "{mode:o}");
            let dir = inherit(acl, mode, true).unwrap();
            assert_eq!(dir.access, None, "{mode:o}");
            assert_eq!(dir.default.as_ref(), Some(acl), "{mode:o}");
        }
    }

    #[test]
    fn mask_stands_for_the_group_bits() {
        let given = &samples()[5];
        let file = inherit(given, 0o640, false).unwrap();
        assert_eq!(file.mode, 0o640);
        let expected = acl(&[
            (TAG_USER_OBJ, 6, NO_ID),
            (TAG_USER, 6, 1000),
            (TAG_USER, 7, 1001),
            (TAG_GROUP_OBJ, 5, NO_ID),
            (TAG_GROUP, 7, 100),
            (TAG_MASK, 4, NO_ID),
            (TAG_OTHER, 0, NO_ID),
        ]);
        assert_eq!(file.access, Some(expected));
    }

    #[test]
    fn no_entries_is_no_acl() {
        let none = inherit(&VERSION.to_le_bytes(), 0o755, true).unwrap();
        assert_eq!(none, Inherited { mode: 0o755, access: None, default: None });
    }

    #[test]
    fn invalid_acls_are_corrupt() {
        let (owner, group, other) =
            ((TAG_USER_OBJ, 7, NO_ID), (TAG_GROUP_OBJ, 5, NO_ID), (TAG_OTHER, 0, NO_ID));
        let (user, mask) = ((TAG_USER, 7, 1000), (TAG_MASK, 7, NO_ID));
        let valid = samples().swap_remove(0);
        let mut invalid = vec![
            vec![],
            vec![2, 0, 0],
            [&3u32.to_le_bytes()[..], &valid[4..]].concat(),
            [&1u32.to_le_bytes()[..], &valid[4..]].concat(),
            valid[..valid.len() - 1].to_vec(),
            [&valid[..], &[0; 8]].concat(),
        ];
        invalid.extend(
            [
                &[owner][..],
                &[owner, group],
                &[group, other],
                &[owner, other],
                &[owner, owner, group, other],
                &[owner, group, group, other],
                &[owner, group, other, other],
                &[group, owner, other],
                &[owner, group, other, mask],
                &[owner, group, mask],
                &[owner, user, group, other],
                &[owner, group, user, mask, other],
                &[user, owner, group, mask, other],
                &[owner, group, mask, mask, other],
                &[owner, (TAG_USER, 7, NO_ID), group, mask, other],
                &[(TAG_USER_OBJ, 8, NO_ID), group, other],
                &[owner, (0x40, 7, NO_ID), group, other],
                &[owner, (0x05, 7, NO_ID), group, other],
            ]
            .map(acl),
        );
        for bytes in invalid {
            let error = inherit(&bytes, 0o777, false).unwrap_err();
            assert_eq!(error.errno(), Errno::IO, "{bytes:?}: {error}");
        }
    }

    /// Reads an xattr whose absence is an ordinary answer.
    fn get(path: &Path, name: &str) -> Option<Vec<u8>> {
        let mut value = vec![0; 4096];
        match fs::lgetxattr(path, name, &mut value[..]) {
            Ok(len) => Some(value[..len].to_vec()),
            Err(Errno::NODATA) => None,
            Err(errno) => panic!("{name} of {path:?}: {errno}"),
        }
    }

    #[test]
    fn kernel_inherits_the_same() {
        let temp = tempfile::tempdir().unwrap();
        for (number, given) in samples().iter().enumerate() {
            let dir = temp.path().join(number.to_string());
            fs::mkdir(&dir, Mode::from(0o755)).unwrap();
            match fs::lsetxattr(&dir, DEFAULT, given, XattrFlags::empty()) {
                Ok(()) => {}
                Err(Errno::OPNOTSUPP) => {
                    eprintln!("skipped: {:?} has no POSIX ACLs", temp.path());
                    return;
                }
                Err(errno) => panic!("{DEFAULT}: {errno}"),
            }
            assert_eq!(get(&dir, DEFAULT).as_ref(), Some(given));
            for mode in 0..=0o777 {
                for is_dir in [false, true] {
                    let path = dir.join(format!("{mode:o}-{is_dir}"));
                    if is_dir {
                        fs::mkdir(&path, Mode::from(mode)).unwrap();
                    } else {
                        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY;
                        fs::open(&path, flags, Mode::from(mode)).unwrap();
                    }
                    let stat = fs::statat(CWD, &path, AtFlags::SYMLINK_NOFOLLOW).unwrap();
                    let kernel = Inherited {
                        mode: stat.st_mode & 0o777,
                        access: get(&path, ACCESS),
                        default: get(&path, DEFAULT),
                    };
                    assert_eq!(inherit(given, mode, is_dir).unwrap(), kernel, "{path:?}");
                }
            }
        }
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..64),
            is_version_right: bool,
            mode: u32,
            is_dir: bool,
        ) {
            if is_version_right {
                bytes.splice(0..bytes.len().min(4), VERSION.to_le_bytes());
            }
            drop(inherit(&bytes, mode, is_dir));
        }

        #[test]
        fn what_is_parsed_prints_the_same_and_never_widens(
            number in 0..samples().len(),
            mode in 0u32..0o1_0000,
        ) {
            let given = &samples()[number];
            prop_assert_eq!(&print(&parse(given).unwrap()), given);
            let file = inherit(given, mode, false).unwrap();
            prop_assert_eq!(file.mode & !mode, 0);
            if let Some(access) = file.access {
                prop_assert!(parse(&access).is_ok());
            }
        }
    }
}
