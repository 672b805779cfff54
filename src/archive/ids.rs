//! Ids of a container and those on disk. Pure.

/// A run of ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First id in the container.
    pub container: u32,
    /// First id on disk.
    pub disk: u32,
    /// How many.
    pub length: u32,
}

/// Which container id is which id on disk, for users and groups.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ids {
    /// Of users.
    pub uids: Vec<Range>,
    /// Of groups.
    pub gids: Vec<Range>,
}

impl Ids {
    /// Returns the id on disk of a container's user, if it has one.
    pub fn uid_to_disk(&self, id: u64) -> Option<u32> {
        find(&self.uids, id, |range| (range.container, range.disk))
    }

    /// Returns the id on disk of a container's group, if it has one.
    pub fn gid_to_disk(&self, id: u64) -> Option<u32> {
        find(&self.gids, id, |range| (range.container, range.disk))
    }

    /// Returns the container's id of a user on disk, if it has one.
    pub fn uid_from_disk(&self, id: u32) -> Option<u32> {
        find(&self.uids, id.into(), |range| (range.disk, range.container))
    }

    /// Returns the container's id of a group on disk, if it has one.
    pub fn gid_from_disk(&self, id: u32) -> Option<u32> {
        find(&self.gids, id.into(), |range| (range.disk, range.container))
    }
}

fn find(ranges: &[Range], id: u64, ends: impl Fn(&Range) -> (u32, u32)) -> Option<u32> {
    ranges.iter().find_map(|range| {
        let (from, to) = ends(range);
        let within = id.checked_sub(from.into()).filter(|within| *within < range.length.into())?;
        let id = u32::try_from(u64::from(to) + within).ok()?;
        // The last number means "no id" to the kernel.
        (id != u32::MAX).then_some(id)
    })
}
