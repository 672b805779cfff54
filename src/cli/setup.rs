//! `lamina setup`: the name under which `BuildKit`, containerd and others look for a mount program.

use std::ffi::OsStr;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};

use super::{Failure, print};
use crate::options::show_path;

/// What they look for on PATH; `mount.fuse3` too, as the first word of a source.
const LINK: &str = "fuse-overlayfs";

/// Arguments of `lamina setup`.
#[derive(clap::Args, Debug)]
pub struct SetupArgs {
    /// Where the link is made, a directory on PATH; that of this program unless given
    #[arg(long, value_name = "DIR")]
    bin: Option<PathBuf>,
    /// Take the link away
    #[arg(long)]
    remove: bool,
}

/// Makes or removes the link. What is there and is not ours stays.
pub(super) fn run(args: &SetupArgs) -> Result<(), Failure> {
    let program = std::env::current_exe().map_err(|error| {
        Failure::sentence(format!("/proc/self/exe: readlink: {error}; mount /proc"))
    })?;
    let dir = match (&args.bin, program.parent()) {
        (Some(dir), _) => dir.as_path(),
        (None, Some(dir)) => dir,
        (None, None) => {
            return Err(Failure::sentence("this program has no directory; give --bin".into()));
        }
    };
    let link = dir.join(LINK);
    let failed = |call: &str, error: &std::io::Error| {
        Failure::sentence(format!(
            "{}: {call}: {error}; give a directory that you may write with --bin",
            show_path(&link)
        ))
    };
    let is_program = |found: &fs::Metadata| {
        rustix::fs::stat(&program)
            .is_ok_and(|own| (own.st_dev, own.st_ino) == (found.dev(), found.ino()))
    };
    let there = match fs::symlink_metadata(&link) {
        Err(error) if error.kind() == ErrorKind::NotFound => There::Nothing,
        Err(error) => return Err(failed("lstat", &error)),
        Ok(found) if is_program(&found) => There::Program,
        Ok(found)
            if found.is_symlink() && fs::canonicalize(&link).is_ok_and(|at| at == program) =>
        {
            There::Link
        }
        Ok(_) => {
            let cure = "move it away, or give another directory with --bin";
            let link = show_path(&link);
            return Err(Failure::sentence(format!(
                "{link}: is there, and is not this program; {cure}"
            )));
        }
    };
    match (args.remove, there) {
        (true, There::Nothing) => Ok(()),
        (true, There::Link) => {
            rustix::fs::unlink(&link).map_err(|errno| failed("unlink", &errno.into()))
        }
        (true, There::Program) => Err(Failure::sentence(format!(
            "{}: is no link but this program itself; remove it as it was installed",
            show_path(&link)
        ))),
        (false, There::Program) => {
            print(&format!("{} is this program\n{}", link.display(), hidden(&link)))
        }
        (false, there) => {
            if there == There::Nothing {
                symlink(&program, &link).map_err(|error| failed("symlink", &error))?;
            }
            print(&format!("{} -> {}\n{}", link.display(), program.display(), hidden(&link)))
        }
    }
}

/// What has the name that others look for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum There {
    Nothing,
    /// A link to this program.
    Link,
    /// This program, installed under that name or under two.
    Program,
}

/// Tells what PATH leads to instead, if it does.
fn hidden(link: &Path) -> String {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let first = std::env::split_paths(&path)
        .map(|dir| dir.join(OsStr::new(LINK)))
        .find(|found| found.is_file());
    let is_same = |found: &PathBuf| fs::canonicalize(found).ok() == fs::canonicalize(link).ok();
    match first {
        Some(found) if is_same(&found) => String::new(),
        Some(found) => format!("but PATH leads to {} first\n", found.display()),
        None => "but its directory is not on PATH\n".to_owned(),
    }
}
