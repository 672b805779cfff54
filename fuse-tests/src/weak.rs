//! Directories served by other FUSE programs, which can do less than a local filesystem, as network filesystems do.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::mount::UnmountFlags;

use crate::env;

/// Who serves a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    /// bindfs with these options: as NFS v3 with `--xattr-none`, and with `--chown-deny` as that with root squashed.
    Bindfs(&'static [&'static str]),
    /// sshfs on an SFTP server without ssh: less than any NFS.
    Sshfs,
}

impl Server {
    /// Why it cannot be used here, if so.
    pub fn missing(self) -> Option<String> {
        let programs: &[&str] = match self {
            Server::Bindfs(_) => &["bindfs"],
            Server::Sshfs => &["sshfs", "socat", SFTP_SERVER],
        };
        let is_there = |program: &str| {
            let run = Command::new(program).arg("-h").stdin(Stdio::null()).output();
            run.is_ok()
        };
        let missing: Vec<&str> = programs.iter().copied().filter(|p| !is_there(p)).collect();
        (!missing.is_empty()).then(|| format!("not installed: {}", missing.join(", ")))
    }
}

const SFTP_SERVER: &str = "/usr/lib/openssh/sftp-server";

/// A mounted store; dropping it unmounts.
#[derive(Debug)]
pub struct Store {
    /// Where it is mounted.
    pub path: PathBuf,
    /// The directory that it shows.
    pub behind: PathBuf,
    server: Option<Child>,
}

impl Store {
    /// Makes `name` and `name.behind` in `dir`, and mounts the one on the other.
    ///
    /// # Panics
    /// If that fails.
    pub fn mount(server: Server, dir: &Path, name: &str) -> Store {
        let (path, behind) = (dir.join(name), dir.join(format!("{name}.behind")));
        fs::create_dir(&path).unwrap();
        fs::create_dir(&behind).unwrap();
        let mut command = match server {
            Server::Bindfs(options) => {
                let mut command = Command::new("bindfs");
                command.arg("-f").args(options).args([&behind, &path]);
                command
            }
            Server::Sshfs => {
                let mut command = Command::new("socat");
                command.arg(format!("EXEC:{SFTP_SERVER}")).arg(format!(
                    "EXEC:sshfs x\\:{} {} -o passive -f",
                    behind.display(),
                    path.display()
                ));
                command
            }
        };
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = child.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        env::wait_until("the store to be mounted", Duration::from_secs(10), || {
            env::mounts_below(&path).contains(&path)
        });
        Store { path, behind, server: Some(child) }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let flags = UnmountFlags::empty();
        if rustix::mount::unmount(&self.path, flags).is_err() {
            let _ = rustix::mount::unmount(&self.path, UnmountFlags::DETACH);
        }
        let Some(mut server) = self.server.take() else { return };
        let end = Instant::now() + Duration::from_secs(5);
        while matches!(server.try_wait(), Ok(None)) {
            if Instant::now() > end {
                // Of a test that fails: what uses it may go on doing so.
                let _ = server.kill();
                let _ = server.wait();
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}
