//! User namespaces that exist only to hold id maps, for idmapped mounts.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::process::{WaitOptions, waitpid};

use super::process::{Fork, fork};
use crate::error::{Context, Errno, Error, Result};

/// Maps of a namespace: (id inside, id outside, count).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Maps {
    /// Of users.
    pub uids: Vec<(u32, u32, u32)>,
    /// Of groups.
    pub gids: Vec<(u32, u32, u32)>,
}

/// Makes a user namespace with these maps, and returns a descriptor of it; no process stays in it.
///
/// # Errors
/// `EPERM` without the right to write the maps; `EDEADLK` if this process has several threads.
pub fn with_maps(maps: &Maps) -> Result<OwnedFd> {
    let (mut ours, mut theirs) =
        UnixStream::pair().map_err(|error| from_io("socketpair", &error))?;
    let child = match fork()? {
        Fork::Child => {
            drop(ours);
            let entered = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUSER).is_ok();
            let mut end = [0];
            // The parent closes its end when it is done.
            drop(theirs.write_all(&[u8::from(entered)]).and_then(|()| theirs.read(&mut end)));
            std::process::exit(0);
        }
        Fork::Parent(child) => child,
    };
    drop(theirs);
    let made = (|| {
        let mut entered = [0];
        ours.read_exact(&mut entered).map_err(|error| from_io("read", &error))?;
        if entered != [1] {
            return Err(Error::sys("unshare", "user namespace", Errno::PERM));
        }
        let proc = format!("/proc/{}", child.as_raw_pid());
        for (file, map) in [("uid_map", &maps.uids), ("gid_map", &maps.gids)] {
            let text: String = map
                .iter()
                .map(|(inside, outside, count)| format!("{inside} {outside} {count}\n"))
                .collect();
            std::fs::OpenOptions::new()
                .write(true)
                .open(format!("{proc}/{file}"))
                .and_then(|mut file| file.write_all(text.as_bytes()))
                .map_err(|error| from_io("write id map", &error))?;
        }
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        openat(CWD, format!("{proc}/ns/user"), flags, Mode::empty()).at("open", || "ns/user")
    })();
    drop(ours);
    waitpid(Some(child), WaitOptions::empty()).at("waitpid", || "user namespace")?;
    made
}

fn from_io(op: &'static str, error: &std::io::Error) -> Error {
    Error::sys(op, "user namespace", Errno::from_io_error(error).unwrap_or(Errno::IO))
}
