//! From mount options to a mount that answers, and back to none.
//!
//! [`MountSpec`] says what is wanted, [`stack`] opens and checks the directories, [`fuse_mount`]
//! makes and removes the mount, [`server`] lives as the daemon behind it, and [`unmount`] ends a
//! mount from outside. Nothing on disk is changed before every check has passed.
//!
//! A crash leaves a mount that answers `ENOTCONN`; `lamina unmount` removes it.

mod fuse_call;
pub mod fuse_mount;
pub mod kernel;
pub mod mountinfo;
pub mod program;
pub mod server;
pub mod shifted;
pub mod stack;
pub mod unmount;

use std::path::{Path, PathBuf};

use crate::error::{Errno, Error, Result};
use crate::options::{LOWERS_MAX, MountOptions, RedirectDir, Verity, show_path};

/// A mount that is wanted, its shape checked and nothing opened yet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MountSpec {
    options: MountOptions,
    merged: PathBuf,
}

impl MountSpec {
    /// Checks that `options` describe a mount at `merged`.
    ///
    /// # Errors
    /// `Invalid` without a lower, with too many, or with only one of upper and work.
    pub fn new(options: MountOptions, merged: PathBuf) -> Result<Self> {
        if merged.as_os_str().is_empty() {
            return Err(Error::invalid("MERGED", "is empty; name the directory to mount on"));
        }
        if options.lowers.is_empty() {
            return Err(Error::invalid(
                "lowerdir",
                "names no directory; give -o lowerdir=DIR[:DIR...], topmost first",
            ));
        }
        if options.lowers.len() + options.data.len() > LOWERS_MAX {
            return Err(Error::invalid(
                "lowerdir",
                format!(
                    "names {} directories, more than {LOWERS_MAX}; merge some of them first",
                    options.lowers.len() + options.data.len()
                ),
            ));
        }
        match (&options.upper, &options.work) {
            // A read-only mount takes the upper as one more lower and needs no work directory.
            (Some(upper), None) if !options.read_only => {
                return Err(Error::invalid(
                    format!("upperdir={}", show_path(upper)),
                    "needs a work directory; add workdir=DIR, empty and on the same filesystem",
                ));
            }
            (None, Some(work)) => {
                return Err(Error::invalid(
                    format!("workdir={}", show_path(work)),
                    "is of no use without an upper; add upperdir=DIR or leave workdir out",
                ));
            }
            _ => (),
        }
        check_redirects(&options)?;
        Ok(Self { options, merged })
    }

    /// Returns what is done with redirects: written with metacopies, as in the kernel.
    pub fn redirect_dir(&self) -> RedirectDir {
        let default = if self.metacopy() { RedirectDir::On } else { RedirectDir::Off };
        self.options.redirect_dir.unwrap_or(default)
    }

    /// Returns whether a change of attributes alone copies no data: also where digests are wanted.
    pub fn metacopy(&self) -> bool {
        self.options.metacopy.unwrap_or(self.options.verity != Verity::Off)
    }

    /// Returns what was asked for.
    pub fn options(&self) -> &MountOptions {
        &self.options
    }

    /// Returns the mountpoint as the user wrote it.
    pub fn merged(&self) -> &Path {
        &self.merged
    }

    /// Returns whether nothing can be changed through the mount.
    pub fn is_read_only(&self) -> bool {
        self.options.read_only || self.options.upper.is_none()
    }
}

/// Refuses what contradicts itself, as the kernel does.
fn check_redirects(options: &MountOptions) -> Result<()> {
    let metacopy = options.metacopy.unwrap_or(options.verity != Verity::Off);
    if options.metacopy == Some(false) && options.verity != Verity::Off {
        return Err(Error::invalid("metacopy=off", "contradicts verity; leave one out"));
    }
    let redirect_dir = options.redirect_dir;
    if metacopy && redirect_dir.is_some_and(|redirect_dir| redirect_dir != RedirectDir::On) {
        return Err(Error::invalid(
            "metacopy=on",
            "needs redirect_dir=on; leave the other redirect_dir out",
        ));
    }
    if options.userxattr {
        if redirect_dir.is_some_and(|redirect_dir| redirect_dir != RedirectDir::NoFollow) {
            return Err(Error::invalid(
                "userxattr",
                "goes with redirect_dir=nofollow only; leave one out",
            ));
        }
        if metacopy {
            return Err(Error::invalid("userxattr", "does not go with metacopy; leave one out"));
        }
    }
    Ok(())
}

/// Returns the error `arg: op: errno text; cure`.
fn refuse(arg: impl Into<String>, op: &str, errno: Errno, cure: &str) -> Error {
    Error::invalid(arg.into(), format!("{op}: {}; {cure}", Error::Refused(errno)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(list: &str) -> Result<MountSpec> {
        MountSpec::new(MountOptions::parse(&[list])?.0, "/m".into())
    }

    #[test]
    fn shapes_that_cannot_be_mounted_are_refused_in_one_sentence() {
        let many = vec!["/l"; LOWERS_MAX + 1].join(":");
        for (list, start) in [
            ("", "lowerdir: names no directory"),
            ("upperdir=/u,workdir=/w", "lowerdir: names no directory"),
            ("lowerdir=/a,upperdir=/u", "upperdir=/u: needs a work directory"),
            ("lowerdir=/a,workdir=/w", "workdir=/w: is of no use without an upper"),
            ("lowerdir=/a,metacopy=on,redirect_dir=off", "metacopy=on: needs redirect_dir=on"),
            ("lowerdir=/a,metacopy=on,redirect_dir=follow", "metacopy=on: needs redirect_dir=on"),
            ("lowerdir=/a,verity=on,redirect_dir=off", "metacopy=on: needs redirect_dir=on"),
            ("lowerdir=/a,metacopy=off,verity=on", "metacopy=off: contradicts verity"),
            ("lowerdir=/a,userxattr,redirect_dir=on", "userxattr: goes with redirect_dir"),
            ("lowerdir=/a,userxattr,redirect_dir=off", "userxattr: goes with redirect_dir"),
            ("lowerdir=/a,userxattr,metacopy=on", "userxattr: does not go with metacopy"),
            (&format!("lowerdir={many}"), "lowerdir: names 501 directories, more than 500"),
        ] {
            let message = spec(list).unwrap_err().to_string();
            assert!(message.starts_with(start), "{message}");
            assert!(message.contains("; ") && message.lines().count() == 1, "{message}");
        }
        assert!(MountSpec::new(spec("lowerdir=/a").unwrap().options, "".into()).is_err());
    }

    #[test]
    fn read_only_follows_from_ro_or_from_a_missing_upper() {
        assert!(spec("lowerdir=/a").unwrap().is_read_only());
        assert!(spec("lowerdir=/a,upperdir=/u,ro").unwrap().is_read_only());
        assert!(!spec("lowerdir=/a,upperdir=/u,workdir=/w").unwrap().is_read_only());
    }
}
