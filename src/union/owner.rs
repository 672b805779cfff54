//! Owners: which stored ids a caller, a change or an xattr means.
//!
//! The one place where ids of requests become ids of the layers, and where those that stand in the
//! value of an xattr (ACLs, capabilities) go either way. Attributes are translated where they are
//! made, in `Attr::new`. Takes no locks.

use std::borrow::Cow;

use super::create::Caller;
use super::{Union, acl};
use crate::error::{Errno, Result};
use crate::idmap::{Ids, InnerId, OuterId};
use crate::sys::xattr::CAPABILITY;

/// An owner to store; what is `None` stays as it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Owner {
    uid: Option<InnerId>,
    gid: Option<InnerId>,
}

impl Owner {
    /// Returns the numbers to store.
    pub(super) fn to_store(self) -> (Option<u32>, Option<u32>) {
        (self.uid.map(InnerId::to_store), self.gid.map(InnerId::to_store))
    }
}

impl Union {
    /// Returns the owner of what `caller` makes.
    ///
    /// A privileged caller from outside of the map, such as an engine that prepares a container,
    /// makes objects of nobody, to be given away by chown(2).
    ///
    /// # Errors
    /// `EOVERFLOW` if the layers have no id for the caller, as on the kernel's idmapped mounts.
    pub(super) fn owner_of(&self, caller: &Caller) -> Result<Owner> {
        let mut uid = self.ids.users.store(caller.uid);
        let mut gid = self.ids.groups.store(caller.gid);
        if caller.uid.is_root() {
            uid = uid.or(Some(InnerId::OVERFLOW));
            gid = gid.or(Some(InnerId::OVERFLOW));
        }
        if uid.is_none() || gid.is_none() {
            return Err(Errno::OVERFLOW.into());
        }
        Ok(Owner { uid, gid })
    }

    /// Returns the owner that chown(2) asks for.
    ///
    /// # Errors
    /// `EOVERFLOW` if the layers have no such id, as on the kernel's idmapped mounts.
    pub(super) fn stored_owner(&self, uid: Option<OuterId>, gid: Option<OuterId>) -> Result<Owner> {
        let stored = Owner {
            uid: uid.and_then(|uid| self.ids.users.store(uid)),
            gid: gid.and_then(|gid| self.ids.groups.store(gid)),
        };
        if stored.uid.is_some() != uid.is_some() || stored.gid.is_some() != gid.is_some() {
            return Err(Errno::OVERFLOW.into());
        }
        Ok(stored)
    }

    /// Translates the ids in the value of an xattr that is read; `None` if it means nothing here.
    ///
    /// # Errors
    /// `EIO` for an ACL that is none.
    pub(super) fn shown_value(&self, name: &[u8], value: Vec<u8>) -> Result<Option<Vec<u8>>> {
        if self.ids.is_identity() {
            return Ok(Some(value));
        }
        match name {
            acl::ACCESS | acl::DEFAULT => acl::shown(&value, &self.ids).map(Some),
            CAPABILITY => Ok(shown_capability(value, &self.ids)),
            _ => Ok(Some(value)),
        }
    }

    /// Translates the ids in the value of an xattr that is set.
    ///
    /// # Errors
    /// `EINVAL` for an ACL that is none; `EOVERFLOW` if the layers have no such id.
    pub(super) fn stored_value<'a>(&self, name: &[u8], value: &'a [u8]) -> Result<Cow<'a, [u8]>> {
        if self.ids.is_identity() {
            return Ok(Cow::Borrowed(value));
        }
        match name {
            acl::ACCESS | acl::DEFAULT => acl::stored(value, &self.ids).map(Cow::Owned),
            CAPABILITY => stored_capability(value, &self.ids).map(Cow::Owned),
            _ => Ok(Cow::Borrowed(value)),
        }
    }
}

/// Revision in the topmost byte of the first word, capabilities(7) "File capability versioning".
const REVISION: u32 = 0xff00_0000;
const REVISION_2: u32 = 0x0200_0000;
const REVISION_3: u32 = 0x0300_0000;

/// Splits capabilities that name the root user they are for: first word, sets, user.
fn parse_capability(value: &[u8]) -> Option<(u32, [u8; 16], u32)> {
    let (magic, rest) = value.split_first_chunk::<4>()?;
    let (sets, root) = rest.split_first_chunk::<16>()?;
    let magic = u32::from_le_bytes(*magic);
    let root = u32::from_le_bytes(root.try_into().ok()?);
    (magic & REVISION == REVISION_3).then_some((magic, *sets, root))
}

/// Returns capabilities as they are seen: of the root user of some namespace, whom the mount may
/// show as another. What names no root user is good for whoever is root of the layers.
fn shown_capability(value: Vec<u8>, ids: &Ids) -> Option<Vec<u8>> {
    let Some((magic, sets, root)) = parse_capability(&value) else { return Some(value) };
    let root = ids.users.show(InnerId::stored(root));
    let bytes = [&magic.to_le_bytes()[..], &sets, &root.to_show().to_le_bytes()].concat();
    (root != OuterId::NONE).then_some(bytes)
}

/// Returns capabilities as they are stored. Those of the layers' own root need no user named.
fn stored_capability(value: &[u8], ids: &Ids) -> Result<Vec<u8>> {
    let Some((magic, sets, root)) = parse_capability(value) else { return Ok(value.to_vec()) };
    let root = ids.users.store(OuterId::asked(root)).ok_or(Errno::OVERFLOW)?.to_store();
    if root == 0 {
        let magic = magic & !REVISION | REVISION_2;
        return Ok([&magic.to_le_bytes()[..], &sets].concat());
    }
    Ok([&magic.to_le_bytes()[..], &sets, &root.to_le_bytes()].concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::idmap::IdMap;

    #[test]
    fn capabilities_name_the_root_that_is_shown() {
        let users = IdMap::parse("0:100000:65536").unwrap();
        let ids = Ids { users, groups: IdMap::default() };
        let with_root = |root: u32| [&[1, 0, 0, 3][..], &[7; 16], &root.to_le_bytes()].concat();
        let without = [&[1, 0, 0, 2][..], &[7; 16]].concat();
        assert_eq!(stored_capability(&with_root(100_000), &ids).unwrap(), without);
        assert_eq!(stored_capability(&with_root(100_005), &ids).unwrap(), with_root(5));
        assert_eq!(stored_capability(&without, &ids).unwrap(), without);
        let refused = stored_capability(&with_root(5), &ids).unwrap_err();
        assert_eq!(refused.errno(), Errno::OVERFLOW);
        assert_eq!(shown_capability(with_root(5), &ids), Some(with_root(100_005)));
        assert_eq!(shown_capability(without.clone(), &ids), Some(without));
        assert_eq!(shown_capability(with_root(70_000), &ids), None);
        for odd in [&b""[..], b"\0\0\0\x03", &[3; 25]] {
            assert_eq!(shown_capability(odd.to_vec(), &ids).as_deref(), Some(odd));
            assert_eq!(stored_capability(odd, &ids).unwrap(), odd);
        }
    }
}
