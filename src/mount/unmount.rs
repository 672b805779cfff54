//! Ends a mount from outside: `lamina unmount`.

use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FlockOperation, Mode, OFlags, flock, openat, statfs};

use super::mountinfo::{MountEntry, find_top, load};
use super::{fuse_mount, refuse};
use crate::error::{Errno, Error, Result};
use crate::options::show_path;

/// How long the server may take to write back and end.
const END_WAIT: Duration = Duration::from_secs(30);

/// Unmounts `merged` and waits until its server has ended; does not wait when `lazy`.
///
/// # Errors
/// If it is no FUSE mount, is in use, or its server does not end.
pub fn unmount(merged: &Path, lazy: bool) -> Result<()> {
    let entries = load()?;
    let (path, entry) = locate(merged, &entries)?;
    if !entry.is_fuse() {
        return Err(Error::invalid(
            show_path(merged),
            format!(
                "is a mount of type {}, not of lamina; use umount(8)",
                show_path(Path::new(&entry.fs_type))
            ),
        ));
    }
    fuse_mount::remove(&path, lazy)?;
    if lazy { Ok(()) } else { await_end(&path) }
}

/// Removes the mount at `merged` if its server has died.
///
/// # Errors
/// If it cannot be removed.
pub fn remove_dead(merged: &Path) -> Result<()> {
    let entries = load()?;
    match locate(merged, &entries) {
        Ok((path, entry)) if entry.is_fuse() => match statfs(&path) {
            Err(Errno::NOTCONN | Errno::CONNABORTED) => fuse_mount::remove(&path, true),
            _ => Ok(()),
        },
        // Nothing is mounted there.
        Ok(_) | Err(_) => Ok(()),
    }
}

/// Finds the mount that `merged` names, without asking the mount, which may be dead.
fn locate<'a>(merged: &Path, entries: &'a [MountEntry]) -> Result<(PathBuf, &'a MountEntry)> {
    let canonical = |path: &Path| {
        std::fs::canonicalize(path).map_err(|error| {
            let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
            refuse(show_path(path), "realpath", errno, "name the directory it is mounted on")
        })
    };
    if let (Some(Component::Normal(name)), Some(parent)) =
        (merged.components().next_back(), merged.parent())
    {
        let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
        let path = canonical(parent)?.join(name);
        if let Some(entry) = find_top(entries, &path) {
            return Ok((path, entry));
        }
    }
    let path = canonical(merged)?;
    match find_top(entries, &path) {
        Some(entry) => Ok((path, entry)),
        None => Err(Error::invalid(
            show_path(merged),
            "nothing is mounted there; findmnt -t fuse.lamina lists what is",
        )),
    }
}

/// Waits until no server holds the shared lock on the directory that is visible again.
fn await_end(path: &Path) -> Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    // Who may not read the directory cannot wait; the mount is gone all the same.
    let Ok(dir) = openat(CWD, path, flags, Mode::empty()) else { return Ok(()) };
    let end = Instant::now() + END_WAIT;
    loop {
        match flock(&dir, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) if Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(Errno::WOULDBLOCK) => {
                return Err(Error::Busy {
                    what: format!(
                        "{}: unmounted, but its server still runs after {} s; another mount \
                         namespace may hold the mount, or the disk is slow to write back",
                        show_path(path),
                        END_WAIT.as_secs()
                    )
                    .into(),
                });
            }
            Err(Errno::INTR) => (),
            // Without locks there is nothing to wait for.
            Ok(()) | Err(_) => return Ok(()),
        }
    }
}
