//! Locks between processes: fcntl(2) locks on whole files, and flock(2) on directories.
//!
//! The fcntl locks belong to the open file (`F_OFD_*`), not to the process, so threads exclude each
//! other too; they conflict with the classic ones that other programs take. Both kinds end when the
//! descriptor is closed, also by the death of the process.

use std::os::fd::{AsFd, BorrowedFd};

use nix::fcntl::{FcntlArg, fcntl};
use rustix::fs::FlockOperation;
use rustix::io::{Errno, retry_on_intr};

/// Who may hold a lock at the same time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sharing {
    /// Any number of holders that only read.
    Shared,
    /// One holder.
    Exclusive,
}

/// Takes the fcntl lock on a file, waiting for it.
///
/// # Errors
/// Those of fcntl(2): `EBADF` if the file is not open for writing but the lock is exclusive,
/// `ENOLCK`.
pub fn lock_file(file: impl AsFd, sharing: Sharing) -> Result<(), Errno> {
    set(file.as_fd(), sharing, true)
}

/// Takes the fcntl lock on a file, unless somebody else holds it; says whether it was taken.
///
/// # Errors
/// As [`lock_file`].
pub fn try_lock_file(file: impl AsFd, sharing: Sharing) -> Result<bool, Errno> {
    match set(file.as_fd(), sharing, false) {
        Ok(()) => Ok(true),
        Err(Errno::AGAIN | Errno::ACCESS) => Ok(false),
        Err(errno) => Err(errno),
    }
}

fn set(file: BorrowedFd<'_>, sharing: Sharing, wait: bool) -> Result<(), Errno> {
    let kind = match sharing {
        Sharing::Shared => libc::F_RDLCK,
        Sharing::Exclusive => libc::F_WRLCK,
    };
    let lock = libc::flock {
        l_type: i16::try_from(kind).unwrap_or_default(),
        l_whence: i16::try_from(libc::SEEK_SET).unwrap_or_default(),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    loop {
        let argument =
            if wait { FcntlArg::F_OFD_SETLKW(&lock) } else { FcntlArg::F_OFD_SETLK(&lock) };
        match fcntl(file, argument) {
            Ok(_) => return Ok(()),
            Err(nix::errno::Errno::EINTR) => (),
            Err(errno) => return Err(Errno::from_raw_os_error(errno as i32)),
        }
    }
}

/// Takes the flock(2) on a directory, waiting for it.
///
/// # Errors
/// Those of flock(2).
pub fn lock_dir(dir: impl AsFd, sharing: Sharing) -> Result<(), Errno> {
    let operation = match sharing {
        Sharing::Shared => FlockOperation::LockShared,
        Sharing::Exclusive => FlockOperation::LockExclusive,
    };
    retry_on_intr(|| rustix::fs::flock(dir.as_fd(), operation))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_open_files_of_one_process_exclude_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let open = || {
            let mut options = std::fs::OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false);
            options.open(dir.path().join("lock")).unwrap()
        };
        let (first, second) = (open(), open());
        lock_file(&first, Sharing::Exclusive).unwrap();
        assert!(!try_lock_file(&second, Sharing::Exclusive).unwrap());
        assert!(!try_lock_file(&second, Sharing::Shared).unwrap());
        drop(first);
        assert!(try_lock_file(&second, Sharing::Shared).unwrap());
        assert!(try_lock_file(open(), Sharing::Shared).unwrap());
        assert!(!try_lock_file(open(), Sharing::Exclusive).unwrap());
    }
}
