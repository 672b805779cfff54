//! Staged changes: what is being made or deleted lies in `tempdirs` until one rename decides.
//!
//! `tempdirs/lock-X` is locked (fcntl) by whoever works in `tempdirs/temp-dir-X`. A lock that can
//! be taken belongs to nobody any more: [`recover`] removes both, and the symlink that a layer in it
//! had. containers/storage knows the same names and rules.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::RenameFlags;

use super::layout::{
    Home, LINK, LINK_DIR, LayerId, LinkId, TEMPS, find_dir, link_target, read_small,
};
use crate::error::{Context, Errno, Error, Result};
use crate::options::show_path;
use crate::sys;
use crate::sys::lockfile::{Sharing, try_lock_file};
use crate::sys::name::At;

const LOCK_PREFIX: &str = "lock-";
const DIR_PREFIX: &str = "temp-dir-";

/// A temporary directory in a home; emptied and removed when dropped.
#[derive(Debug)]
pub struct TempDir<'a> {
    home: &'a Home,
    temps: OwnedFd,
    name: String,
    /// Its directory.
    dir: OwnedFd,
    /// Open and locked while it lives.
    _lock: OwnedFd,
}

impl<'a> TempDir<'a> {
    /// Makes one.
    ///
    /// # Errors
    /// Those of mkdirat(2), openat(2) and fcntl(2).
    pub fn new(home: &'a Home) -> Result<Self> {
        let shown = || show_path(&home.join(&[TEMPS]));
        loop {
            match sys::name::mkdir(At::new(home.dir(), TEMPS), 0o700) {
                Ok(()) | Err(Errno::EXIST) => (),
                Err(errno) => return Err(Error::sys("mkdirat", shown(), errno)),
            }
            // Whoever cleans up removes it when it is empty.
            let Some(temps) = find_dir(home.dir(), TEMPS).at("open", shown)? else { continue };
            let name = LinkId::random().to_string();
            let lock_name = format!("{LOCK_PREFIX}{name}");
            let lock = match sys::open::create(temps.as_fd(), lock_name.as_bytes(), 0o600) {
                Ok(lock) => lock,
                // Somebody removed the empty directory in between.
                Err(Errno::NOENT) => continue,
                Err(errno) => return Err(Error::sys("open", shown(), errno)),
            };
            // A recovery may have seen the file before it was locked, and removed it.
            if !try_lock_file(&lock, Sharing::Exclusive).at("fcntl", shown)?
                || sys::stat::of(&lock).at("statx", shown)?.stx_nlink == 0
            {
                continue;
            }
            let dir_name = format!("{DIR_PREFIX}{name}");
            sys::name::mkdir(At::new(temps.as_fd(), dir_name.as_bytes()), 0o700)
                .at("mkdirat", shown)?;
            let dir = sys::open::directory(temps.as_fd(), dir_name.as_bytes()).at("open", shown)?;
            return Ok(Self { home, temps, name, dir, _lock: lock });
        }
    }

    /// Returns the directory.
    pub fn dir(&self) -> &OwnedFd {
        &self.dir
    }

    /// Returns the home that it lies in.
    pub fn home(&self) -> &'a Home {
        self.home
    }

    /// Returns the name that a layer has in it.
    pub fn name_of(id: &LayerId) -> Vec<u8> {
        format!("0-{id}").into_bytes()
    }

    /// Removes it with all that is in it.
    ///
    /// # Errors
    /// Those of removing a tree; what is left goes with the next recovery.
    pub fn remove(self) -> Result<()> {
        self.clean()
    }

    fn clean(&self) -> Result<()> {
        discard(self.home, &self.temps, &self.name)
    }
}

impl Drop for TempDir<'_> {
    fn drop(&mut self) {
        // After `remove` nothing is left; otherwise another error is being reported already, and
        // the next recovery tries again.
        if let Err(error) = self.clean() {
            tracing::warn!("{error}");
        }
    }
}

/// Removes the symlinks of the layers in a temporary directory, the directory, and last its lock.
fn discard(home: &Home, temps: &OwnedFd, name: &str) -> Result<()> {
    let shown = || show_path(&home.join(&[TEMPS]));
    let dir_name = format!("{DIR_PREFIX}{name}");
    if let Some(dir) = find_dir(temps.as_fd(), dir_name.as_bytes()).at("open", shown)? {
        drop_links(home, &dir)?;
        sys::tree::remove(temps.as_fd(), dir_name.as_bytes()).at("unlinkat", shown)?;
    }
    match sys::name::unlink(At::new(temps.as_fd(), format!("{LOCK_PREFIX}{name}").as_bytes())) {
        Ok(()) | Err(Errno::NOENT) => (),
        Err(errno) => return Err(Error::sys("unlinkat", shown(), errno)),
    }
    // Others look at every directory of a home; this one goes when nobody uses it.
    match sys::name::rmdir(At::new(home.dir(), TEMPS)) {
        Ok(()) | Err(Errno::NOENT | Errno::NOTEMPTY | Errno::EXIST | Errno::BUSY) => Ok(()),
        Err(errno) => Err(Error::sys("unlinkat", shown(), errno)),
    }
}

/// Removes the symlinks of layers in `dir`, unless a layer of that name is in the home: it was
/// removed and made anew, and its symlink is another.
fn drop_links(home: &Home, dir: &OwnedFd) -> Result<()> {
    let shown = || show_path(&home.join(&[TEMPS]));
    let Some(links) = home.links()? else { return Ok(()) };
    let mut names = Vec::new();
    sys::name::list(dir.as_fd(), |name, _, _| {
        names.push(name.to_vec());
        Ok(())
    })
    .at("getdents64", shown)?;
    for name in names {
        let Some(id) = staged_id(&name) else { continue };
        let Some(layer) = find_dir(dir.as_fd(), &name).at("open", shown)? else { continue };
        let text = read_small(layer.as_fd(), LINK).at("read", shown)?;
        let Some(link) = text.as_deref().and_then(LinkId::parse) else { continue };
        let target = match sys::name::readlink(At::new(links.as_fd(), link.bytes())) {
            Ok(target) => target,
            Err(Errno::NOENT | Errno::INVAL) => continue,
            Err(errno) => return Err(Error::sys("readlinkat", shown(), errno)),
        };
        if target != link_target(&id) {
            continue;
        }
        let living = match home.layer(&id)? {
            Some(layer) => read_small(layer.as_fd(), LINK).at("read", shown)?,
            None => None,
        };
        if living.as_deref().and_then(LinkId::parse).as_ref() != Some(&link) {
            unlink_link(&links, &link)?;
        }
    }
    Ok(())
}

/// Removes a symlink in `l`; absence is no error.
///
/// # Errors
/// Those of unlinkat(2).
pub fn unlink_link(links: &OwnedFd, link: &LinkId) -> Result<()> {
    match sys::name::unlink(At::new(links.as_fd(), link.bytes())) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(Error::sys("unlinkat", format!("{LINK_DIR}/{link}"), errno)),
    }
}

/// Returns the name in `tempdirs` of a temporary directory.
pub fn dir_name(name: &str) -> Vec<u8> {
    format!("{DIR_PREFIX}{name}").into_bytes()
}

/// Returns the layer that `N-ID` stands for.
fn staged_id(name: &[u8]) -> Option<LayerId> {
    let dash = name.iter().position(|&byte| byte == b'-')?;
    let (number, id) = (name.get(..dash)?, name.get(dash + 1..)?);
    if number.is_empty() || !number.iter().all(u8::is_ascii_digit) {
        return None;
    }
    LayerId::from_bytes(id)
}

/// Finishes or undoes what killed processes left in `tempdirs`, and returns how many that were.
///
/// May be called at any time, also beside others that do the same.
///
/// # Errors
/// Those of reading and removing.
pub fn recover(home: &Home) -> Result<usize> {
    let stale = find_stale(home)?;
    let count = stale.len();
    let Some(temps) = find_dir(home.dir(), TEMPS).at("open", || show_path(&home.join(&[TEMPS])))?
    else {
        return Ok(0);
    };
    for name in stale {
        // Its lock was free a moment ago; whoever has it now recovers it.
        if let Some(_lock) = try_take(&temps, &name)? {
            discard(home, &temps, &name)?;
        }
    }
    // One that its last user had no time to remove; whoever uses it now keeps it from going.
    if let Err(errno) = sys::name::rmdir(At::new(home.dir(), TEMPS)) {
        tracing::debug!(%errno, "tempdirs stays");
    }
    Ok(count)
}

/// Returns the temporary directories that nobody works in.
///
/// # Errors
/// Those of reading `tempdirs`.
pub fn find_stale(home: &Home) -> Result<Vec<String>> {
    let shown = || show_path(&home.join(&[TEMPS]));
    let Some(temps) = find_dir(home.dir(), TEMPS).at("open", shown)? else {
        return Ok(Vec::new());
    };
    let mut names = Vec::new();
    let listed = sys::name::list(temps.as_fd(), |name, _, _| {
        if let Ok(name) = std::str::from_utf8(name)
            && let Some(name) =
                name.strip_prefix(LOCK_PREFIX).or_else(|| name.strip_prefix(DIR_PREFIX))
        {
            names.push(name.to_owned());
        }
        Ok(())
    });
    match listed {
        // Its last user has just removed it.
        Ok(()) | Err(Errno::NOENT) => (),
        Err(errno) => return Err(Error::sys("getdents64", shown(), errno)),
    }
    names.sort();
    names.dedup();
    let mut stale = Vec::new();
    for name in names {
        if try_take(&temps, &name)?.is_some() {
            stale.push(name);
        }
    }
    Ok(stale)
}

/// Takes the lock of a temporary directory; `None` if somebody has it. Makes the file if it is
/// missing: a directory without one has no owner.
fn try_take(temps: &OwnedFd, name: &str) -> Result<Option<OwnedFd>> {
    let lock_name = format!("{LOCK_PREFIX}{name}");
    let file = match sys::open::writer(temps.as_fd(), lock_name.as_bytes()) {
        Err(Errno::NOENT) => {
            let dir_name = format!("{DIR_PREFIX}{name}");
            if find_dir(temps.as_fd(), dir_name.as_bytes())
                .at("open", || dir_name.clone())?
                .is_none()
            {
                return Ok(None);
            }
            sys::open::create(temps.as_fd(), lock_name.as_bytes(), 0o600)
        }
        opened => opened,
    };
    let file = match file {
        Ok(file) => file,
        Err(Errno::NOENT | Errno::EXIST) => return Ok(None),
        Err(errno) => return Err(Error::sys("open", lock_name, errno)),
    };
    let taken = try_lock_file(&file, Sharing::Exclusive).at("fcntl", || lock_name.clone())?;
    // A lock on a file without a name protects nothing: somebody else has just cleaned up.
    let named = sys::stat::of(&file).at("statx", || lock_name.clone())?.stx_nlink > 0;
    Ok((taken && named).then_some(file))
}

/// Moves a layer out of the home into a temporary directory: from then on it is gone.
///
/// # Errors
/// Those of renameat(2) and fsync(2).
/// # Locks
/// With the lock of the store held.
pub fn retire(temp: &TempDir<'_>, id: &LayerId) -> Result<()> {
    let home = temp.home();
    let name = TempDir::name_of(id);
    sys::name::rename(
        At::new(home.dir(), id.bytes()),
        At::new(temp.dir().as_fd(), &name),
        RenameFlags::empty(),
    )
    .at("renameat", || home.show(id))?;
    drop_links(home, temp.dir())?;
    sys::data::sync(home.dir(), false).at("fsync", || show_path(home.path()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_staged_layers() {
        let id = LayerId::parse("abc-1").unwrap();
        assert_eq!(staged_id(&TempDir::name_of(&id)), Some(id));
        for name in ["", "0", "-abc", "x-abc", "0-", "0-../x"] {
            assert_eq!(staged_id(name.as_bytes()), None, "{name}");
        }
    }
}
