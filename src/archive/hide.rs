//! What hides names of lower layers, put into a layer in the form that it is to have.
//!
//! Whiteouts of an archive mean lower layers alone, in whatever order they stand to the entries of
//! the same name: a directory that both is hidden and put anew becomes opaque.

use std::sync::Arc;

use rustix::fs::XattrFlags;

use super::apply::{Applying, Whiteouts};
use super::header::Kind;
use super::metadata::Place;
use super::path;
use super::read::{Entry, broken};
use super::target::{self, Found};
use crate::error::{Errno, Error, Result};
use crate::layer::Dir;
use crate::marks;
use crate::sys::stat::Statx;
use crate::sys::{self, name, open, xattr};

impl Applying<'_> {
    /// Hides `name` in the directory at clean path `dir` in all lower layers.
    pub(super) fn whiteout(&mut self, dir: &[u8], name: &[u8], entry: &Entry) -> Result<()> {
        // Beneath a whiteout there is nothing left to hide.
        if let Found::Other(_, _, stat) = self.target.find(dir)?
            && self.is_whiteout(&stat)
        {
            return Ok(());
        }
        let parent = self.directory(dir, entry)?;
        let found = parent.find(name)?;
        match self.options.whiteouts {
            Whiteouts::Flat => self.remove_hidden(&parent, &path::join(dir, name)),
            Whiteouts::Files => self.whiteout_file(&parent, name, entry),
            Whiteouts::Overlay | Whiteouts::OverlayUser => match found {
                // An object of this layer hides what lies beneath, but for a directory.
                Some(stat) if target::is_directory(&stat) => {
                    let object = parent.child(name, &stat);
                    self.mark_opaque(&object)
                }
                Some(_) => Ok(()),
                None => match parent.call("mknodat", name, name::whiteout) {
                    Err(Error::Sys { errno: Errno::PERM, .. }) => {
                        self.whiteout_file(&parent, name, entry)
                    }
                    made => {
                        made?;
                        self.chown(&Place::Name(&parent, name), entry.uid, entry.gid, &entry.path)
                    }
                },
            },
        }
    }

    /// Keeps a whiteout as a file.
    fn whiteout_file(&mut self, parent: &Arc<Dir>, name: &[u8], entry: &Entry) -> Result<()> {
        let stored = marks::whiteout_name(name)
            .ok_or_else(|| broken(&entry.path, "hides a name that is too long for a .wh. file"))?;
        self.mark_file(parent, &stored, entry)
    }

    fn mark_file(&mut self, parent: &Arc<Dir>, stored: &[u8], entry: &Entry) -> Result<()> {
        match parent.call("openat", stored, |at| open::create(at.dir, at.name, 0o600)) {
            // Said twice.
            Err(Error::Sys { errno: Errno::EXIST, .. }) => Ok(()),
            made => {
                let file = made?;
                let as_file = Entry { kind: Kind::File, xattrs: Vec::new(), ..entry.clone() };
                self.describe(&Place::Open(&file, parent, stored), &as_file, "file")
            }
        }
    }

    /// Hides all that lower layers have in the directory at clean path `dir`.
    pub(super) fn opaque(&mut self, dir: &[u8], entry: &Entry) -> Result<()> {
        let directory = self.directory(dir, entry)?;
        match self.options.whiteouts {
            Whiteouts::Flat => self.prune(&directory, dir),
            Whiteouts::Files => self.mark_file(&directory, marks::OPAQUE_NAME, entry),
            Whiteouts::Overlay | Whiteouts::OverlayUser => self.mark_opaque(&directory),
        }
    }

    pub(super) fn mark_opaque(&mut self, dir: &Arc<Dir>) -> Result<()> {
        let [trusted, user, _] = marks::OPAQUE_XATTRS;
        let set = |name: &[u8]| {
            dir.with("setxattr", |dir| {
                xattr::set(
                    xattr::Target::Handle(dir),
                    name,
                    marks::OPAQUE_VALUE,
                    XattrFlags::empty(),
                )
            })
        };
        match self.options.whiteouts {
            Whiteouts::OverlayUser => set(user),
            Whiteouts::Overlay => match set(trusted) {
                Err(Error::Sys { errno: Errno::PERM | Errno::OPNOTSUPP, .. }) => set(user),
                done => done,
            },
            // Such a tree has no marks.
            Whiteouts::Files | Whiteouts::Flat => Ok(()),
        }
    }

    pub(super) fn is_whiteout(&self, stat: &Statx) -> bool {
        matches!(self.options.whiteouts, Whiteouts::Overlay | Whiteouts::OverlayUser)
            && sys::stat::is_whiteout(stat)
    }

    /// Removes what lower layers put at a path of a flat tree.
    fn remove_hidden(&mut self, parent: &Arc<Dir>, path: &[u8]) -> Result<()> {
        let name = path::split(path).1;
        let Some(stat) = parent.find(name)? else { return Ok(()) };
        if !self.unpacked.contains(path) {
            return self.target.remove(parent, name);
        }
        if !target::is_directory(&stat) {
            return Ok(());
        }
        self.prune(&parent.child(name, &stat), path)
    }

    /// Removes what lower layers put beneath a directory of a flat tree.
    fn prune(&mut self, dir: &Arc<Dir>, path: &[u8]) -> Result<()> {
        let mut todo = vec![(Arc::clone(dir), path.to_vec())];
        while let Some((dir, path)) = todo.pop() {
            let mut names = Vec::new();
            dir.list(|name, _, _| {
                names.push(name.to_vec());
                Ok(())
            })?;
            for name in names {
                let beneath = path::join(&path, &name);
                if !self.unpacked.contains(&beneath) {
                    self.target.remove(&dir, &name)?;
                    continue;
                }
                if let Some(stat) = dir.find(&name)?.filter(target::is_directory) {
                    todo.push((dir.child(&name, &stat), beneath));
                }
            }
        }
        Ok(())
    }
}
