//! Content before there is a layer for it: unpacked aside by a [`Differ`], and put into a layer when
//! that is made, which may be much later.
//!
//! `staging/RANDOM/dir` is the content, `staging/RANDOM/staging.lock` is locked (fcntl) by whoever
//! works on it; one whose lock can be taken has lost its owner, and goes with the next start.
//! containers/storage has the same names and rules.

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use super::driver::Filling;
use super::layout::{Home, LayerId, LinkId, STAGING};
use super::{CreateOptions, Store, Whiteouts};
use crate::archive::{self, Applied, ApplyOptions, apply};
use crate::error::{Context, Errno, Error, Result};
use crate::options::show_path;
use crate::sys;
use crate::sys::lockfile::{Sharing, try_lock_file};
use crate::sys::name::At;

/// File in a directory of `staging` that its owner has locked.
pub(super) const STAGING_LOCK: &[u8] = b"staging.lock";
/// Directory in a directory of `staging` with the content.
const CONTENT: &[u8] = b"dir";

/// What makes the content of a layer, wherever it comes from.
pub trait Differ {
    /// What is to be told of it.
    type Output;

    /// Fills an empty directory with the content.
    ///
    /// # Errors
    /// Whatever keeps it from being made.
    fn fill(&mut self, target: Filling) -> Result<Self::Output>;
}

/// The differ that unpacks an archive.
#[derive(Debug)]
pub struct Tar<R> {
    /// The archive; taken when it is unpacked.
    pub archive: Option<R>,
    /// How it is unpacked, but for what the store says.
    pub options: ApplyOptions,
    /// Names the content in messages.
    pub shown: PathBuf,
}

impl<R: Read + Send> Differ for Tar<R> {
    type Output = Applied;

    fn fill(&mut self, target: Filling) -> Result<Applied> {
        let options = ApplyOptions {
            whiteouts: match target.whiteouts {
                Whiteouts::Kernel => archive::Whiteouts::Overlay,
                Whiteouts::Files => archive::Whiteouts::Files,
                Whiteouts::None => archive::Whiteouts::Flat,
            },
            ignore_chown_errors: target.ignore_chown_errors,
            force_mask: target.force_mask,
            ..self.options.clone()
        };
        let source = self.archive.take().ok_or_else(|| {
            Error::invalid(show_path(&self.shown), "was unpacked already; open it once more")
        })?;
        apply(target.root, self.shown.clone(), source, &options)
    }
}

/// Content that is for no layer yet; removed when dropped.
#[derive(Debug)]
pub struct Staged<'a> {
    home: &'a Home,
    staging: OwnedFd,
    name: LinkId,
    /// Its directory in `staging`.
    dir: OwnedFd,
    /// Open and locked while it lives.
    _lock: OwnedFd,
}

impl<'a> Staged<'a> {
    fn new(home: &'a Home) -> Result<Self> {
        let shown = || show_path(&home.join(&[STAGING]));
        loop {
            let staging = match home.make_dir(STAGING, 0o700) {
                // Its last user removed it in between.
                Err(Error::Sys { errno: Errno::NOENT, .. }) => continue,
                made => made?,
            };
            let name = LinkId::random();
            match sys::name::mkdir(At::new(staging.as_fd(), name.bytes()), 0o700) {
                Err(Errno::NOENT) => continue,
                made => made.at("mkdirat", shown)?,
            }
            let dir = sys::open::directory(staging.as_fd(), name.bytes()).at("open", shown)?;
            let lock = sys::open::create(dir.as_fd(), STAGING_LOCK, 0o600).at("open", shown)?;
            // Whoever cleans up may have seen the file before it was locked, and removed it.
            if !try_lock_file(&lock, Sharing::Exclusive).at("fcntl", shown)?
                || sys::stat::of(&lock).at("statx", shown)?.stx_nlink == 0
            {
                continue;
            }
            sys::name::mkdir(At::new(dir.as_fd(), CONTENT), 0o755).at("mkdirat", shown)?;
            return Ok(Self { home, staging, name, dir, _lock: lock });
        }
    }

    fn content(&self) -> Result<OwnedFd> {
        sys::open::directory(self.dir.as_fd(), CONTENT).at("open", || self.show())
    }

    fn show(&self) -> String {
        show_path(&self.home.join(&[STAGING, self.name.bytes()]))
    }
}

impl Drop for Staged<'_> {
    fn drop(&mut self) {
        let removed = sys::tree::remove(self.staging.as_fd(), self.name.bytes());
        // Others may have some of theirs in it.
        if let Err(errno) = sys::name::rmdir(At::new(self.home.dir(), STAGING)) {
            tracing::debug!(%errno, "staging stays");
        }
        if let Err(errno) = removed {
            tracing::warn!(%errno, "{}: what was unpacked stays", self.show());
        }
    }
}

impl Store {
    /// Has a differ make content that is for no layer yet.
    ///
    /// # Errors
    /// Those of the differ, and of making directories.
    /// # Crash
    /// Leaves a directory in `staging`, which the next start removes.
    pub fn apply_to_staging<D: Differ>(&self, differ: &mut D) -> Result<(Staged<'_>, D::Output)> {
        // Where layers that are only read go.
        let home = self.writable_homes().last().unwrap_or_else(|| self.home());
        let staged = Staged::new(home)?;
        let output = differ.fill(self.filling(staged.content()?)?)?;
        Ok((staged, output))
    }

    /// Makes a layer of content that was made before.
    ///
    /// # Errors
    /// As [`Store::create`].
    pub fn commit_from_staging(
        &self,
        id: &LayerId,
        options: CreateOptions<'_>,
        staged: Staged<'_>,
    ) -> Result<()> {
        let mut layer = self.stage(id, options)?;
        let at = || staged.show();
        // Renaming a directory needs permission to write to it, for its `..`.
        let content = staged.content()?;
        let mode = u32::from(sys::stat::of(&content).at("statx", at)?.stx_mode) & 0o7777;
        sys::name::chmod_open(&content, mode | 0o200).at("fchmod", at)?;
        layer.replace_content(At::new(staged.dir.as_fd(), CONTENT)).at("renameat", at)?;
        sys::name::chmod_open(&content, mode).at("fchmod", at)?;
        layer.publish()
    }

    /// Returns what a differ is told of a directory that it is to fill.
    ///
    /// # Errors
    /// As [`Store::whiteouts`].
    pub(super) fn filling(&self, root: OwnedFd) -> Result<Filling> {
        Ok(Filling {
            root,
            whiteouts: self.whiteouts()?,
            ignore_chown_errors: self.options().ignore_chown_errors,
            force_mask: self.options().force_mask,
        })
    }
}
