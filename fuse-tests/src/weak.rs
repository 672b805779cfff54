//! Directories served by other FUSE programs and by NFS, which can do less than a local filesystem.

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
    /// The NFS server of this machine, mounted from it with this version: where `FUSE_TESTS_NFS=1` says that tests may have it
    /// export their directories.
    Nfs(&'static str),
}

impl Server {
    /// Why it cannot be used here, if so.
    pub fn missing(self) -> Option<String> {
        if matches!(self, Server::Nfs(_)) && std::env::var_os("FUSE_TESTS_NFS").is_none() {
            return Some("no NFS server that tests may use (FUSE_TESTS_NFS=1)".into());
        }
        let programs: &[&str] = match self {
            Server::Bindfs(_) => &["bindfs"],
            Server::Sshfs => &["sshfs", "socat", SFTP_SERVER],
            Server::Nfs(_) => &["exportfs", "mount.nfs"],
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
    is_exported: bool,
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
            Server::Nfs(version) => {
                let options = "rw,insecure,no_subtree_check,no_root_squash";
                run(Command::new("exportfs").args(["-o", options]).arg(exported(&behind)));
                let mut mount = Command::new("mount");
                mount.args(["-t", "nfs", "-o", &format!("vers={version}")]);
                run(mount.arg(exported(&behind)).arg(&path));
                return Store { path, behind, server: None, is_exported: true };
            }
        };
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = child.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        env::wait_until("the store to be mounted", Duration::from_secs(10), || {
            env::mounts_below(&path).contains(&path)
        });
        Store { path, behind, server: Some(child), is_exported: false }
    }
}

fn exported(dir: &Path) -> String {
    format!("127.0.0.1:{}", dir.display())
}

fn run(command: &mut Command) {
    let out = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(out.status.success(), "{command:?}: {}", String::from_utf8_lossy(&out.stderr));
}

impl Drop for Store {
    fn drop(&mut self) {
        let flags = UnmountFlags::empty();
        if rustix::mount::unmount(&self.path, flags).is_err() {
            let _ = rustix::mount::unmount(&self.path, UnmountFlags::DETACH);
        }
        if self.is_exported {
            let _ = Command::new("exportfs").arg("-u").arg(exported(&self.behind)).status();
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
