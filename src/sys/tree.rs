//! Removing, measuring and syncing whole trees by handles.

use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, RenameFlags};
use rustix::io::Errno;

use super::name::{At, chmod_handle, list, rename, rmdir, unlink};
use super::stat::Statx;
use super::{open, stat};

/// Directories that are open at once on the way down.
const DEPTH_OPEN: usize = 64;

/// Removes `name` in `dir` and all that lies beneath, whatever the modes; absence is no error.
///
/// Deep trees are cut: what lies too deep is moved beside `name` and removed from there, so that
/// neither descriptors nor the stack bound the depth. Mounts are not entered.
///
/// # Errors
/// `EXDEV` or `EBUSY` for a mountpoint inside, and those of unlinkat(2) and getdents64(2).
pub fn remove(dir: BorrowedFd<'_>, name: &[u8]) -> Result<(), Errno> {
    match unlink(At::new(dir, name)) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        // A directory; some filesystems say EPERM.
        Err(Errno::ISDIR | Errno::PERM) => (),
        Err(errno) => return Err(errno),
    }
    match rmdir(At::new(dir, name)) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::NOTEMPTY | Errno::EXIST) => (),
        Err(errno) => return Err(errno),
    }
    empty_all(&enter(dir, name)?)?;
    rmdir(At::new(dir, name))
}

/// Removes all that lies in directory `name` of `dir`, which stays.
///
/// # Errors
/// `ENOENT` and `ENOTDIR` where there is no such directory, and as [`remove`].
pub fn clear(dir: BorrowedFd<'_>, name: &[u8]) -> Result<(), Errno> {
    empty_all(&enter(dir, name)?)
}

fn empty_all(top: &OwnedFd) -> Result<(), Errno> {
    let mut moved = 0u64;
    loop {
        let before = moved;
        empty(top, top, DEPTH_OPEN, &mut moved)?;
        if moved == before {
            return Ok(());
        }
    }
}

/// Empties `dir`; directories deeper than `depth` go to `top` under new names.
fn empty(top: &OwnedFd, dir: &OwnedFd, depth: usize, moved: &mut u64) -> Result<(), Errno> {
    let mut names = Vec::new();
    list(dir.as_fd(), |name, _, kind| {
        names.push((name.to_vec(), kind));
        Ok(())
    })?;
    for (name, kind) in names {
        let at = At::new(dir.as_fd(), &name);
        if kind != FileType::Directory {
            match unlink(at) {
                Ok(()) | Err(Errno::NOENT) => continue,
                Err(Errno::ISDIR | Errno::PERM) if kind == FileType::Unknown => (),
                Err(errno) => return Err(errno),
            }
        }
        match rmdir(at) {
            Ok(()) | Err(Errno::NOENT) => continue,
            Err(Errno::NOTEMPTY | Errno::EXIST) => (),
            Err(errno) => return Err(errno),
        }
        if depth == 0 {
            // A directory that is moved needs write permission, for its `..`.
            enter(dir.as_fd(), &name)?;
            loop {
                *moved += 1;
                let aside = format!(".deep-{moved}");
                let to = At::new(top.as_fd(), aside.as_bytes());
                match rename(at, to, RenameFlags::NOREPLACE) {
                    Err(Errno::EXIST) => (),
                    done => break done?,
                }
            }
            continue;
        }
        let below = enter(dir.as_fd(), &name)?;
        empty(top, &below, depth - 1, moved)?;
        rmdir(at)?;
    }
    Ok(())
}

/// Opens a directory that is about to be emptied, made accessible to its owner.
fn enter(dir: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
    let handle = open::handle(dir, name)?;
    let mode = u32::from(stat::of(&handle)?.stx_mode);
    if mode & 0o700 != 0o700 {
        match chmod_handle(&handle, mode | 0o700) {
            // Whoever is privileged needs no permission either.
            Ok(()) | Err(Errno::PERM) => (),
            Err(errno) => return Err(errno),
        }
    }
    open::directory(dir, name)
}

/// Calls `visit` with the attributes of everything beneath `dir`, each inode once; mounts are not
/// entered.
///
/// # Errors
/// Those of statx(2), openat2(2) and getdents64(2), and what `visit` returns.
pub fn walk(
    dir: BorrowedFd<'_>,
    visit: &mut impl FnMut(&[u8], &Statx) -> Result<(), Errno>,
) -> Result<(), Errno> {
    let mut seen = HashSet::new();
    walk_from(dir, &mut |_, name, stat| {
        let is_dir = u32::from(stat.stx_mode) & libc::S_IFMT == libc::S_IFDIR;
        if !is_dir && stat.stx_nlink > 1 && !seen.insert(stat.stx_ino) {
            return Ok(());
        }
        visit(name, stat)
    })
}

/// Like [`walk`], but with every name, also of one inode; `visit` is given the directory, too.
///
/// # Errors
/// As [`walk`].
pub fn walk_from(
    dir: BorrowedFd<'_>,
    visit: &mut impl FnMut(BorrowedFd<'_>, &[u8], &Statx) -> Result<(), Errno>,
) -> Result<(), Errno> {
    let names = |dir: BorrowedFd<'_>| {
        let mut names = Vec::new();
        list(dir, |name, _, _| {
            names.push(name.to_vec());
            Ok(())
        })?;
        Ok::<_, Errno>(names)
    };
    // The way down: an open directory and the names in it that are still to be looked at.
    let mut way = vec![(open::directory(dir, b".")?, names(dir)?)];
    while let Some((dir, left)) = way.last_mut() {
        let Some(name) = left.pop() else {
            way.pop();
            continue;
        };
        let Some(found) = stat::find(dir.as_fd(), &name)? else { continue };
        let is_dir = u32::from(found.stx_mode) & libc::S_IFMT == libc::S_IFDIR;
        visit(dir.as_fd(), &name, &found)?;
        if is_dir {
            match open::directory(dir.as_fd(), &name) {
                Ok(below) => {
                    let left = names(below.as_fd())?;
                    way.push((below, left));
                }
                Err(Errno::XDEV | Errno::NOENT) => (),
                Err(errno) => return Err(errno),
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deep_tree_without_permissions_goes() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let mut path = dir.path().join("top");
        for depth in 0..300 {
            path.push(format!("d{}", depth % 7));
        }
        std::fs::create_dir_all(&path).unwrap();
        for name in ["a", "b"] {
            std::fs::File::create(path.join(name)).unwrap();
        }
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o0)).unwrap();
        let handle = OwnedFd::from(std::fs::File::open(dir.path()).unwrap());
        remove(handle.as_fd(), b"top").unwrap();
        remove(handle.as_fd(), b"top").unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_walk_counts_each_inode_once() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("a/b")).unwrap();
        std::fs::File::create(dir.path().join("a/f")).unwrap();
        std::fs::hard_link(dir.path().join("a/f"), dir.path().join("g")).unwrap();
        let handle = OwnedFd::from(std::fs::File::open(dir.path()).unwrap());
        let mut count = 0;
        walk(handle.as_fd(), &mut |_, _| {
            count += 1;
            Ok(())
        })
        .unwrap();
        assert_eq!(count, 3);
    }
}
