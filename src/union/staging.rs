//! Copies of what a directory shows of its lower parts, made ready in a directory in work.
//!
//! Where the upper has no part of the directory yet, the one in work becomes that part: it gets the
//! attributes of the lower one, and one rename publishes it with all that is in it. Else, and where
//! somebody else was first, each copy is published by a rename of its own. Either way what is shown
//! stays as it was.
//!
//! Locks: none over copying. Over publishing `Union::rename` for reading, `Node::copy` of the
//! directory, `Dir::names` of the one above and its own; `Node::copy` of each copied file is tried,
//! not waited for.
//! Crash: leaves a directory in work, removed at the next mount, or what shows what the lowers show.

use std::sync::Arc;

use super::attr::{FileType, show};
use super::copy_up::{Extent, unnoticed};
use super::file::Data;
use super::flatten::Pin;
use super::node::Node;
use super::publish::Temp;
use super::readdir::Names;
use super::{Union, Upper, lock};
use crate::error::{Errno, Result};
use crate::layer::{self, UPPER};
use crate::sys;
use crate::sys::name::At;
use crate::sys::stat::Statx;

/// What a directory shows of a lower part.
pub(super) struct Leaf<'a> {
    pub(super) name: Box<[u8]>,
    pub(super) pin: Pin<'a>,
    pub(super) stat: Statx,
}

/// A finished copy, under its own name in the directory in work.
struct Ready<'a> {
    name: Box<[u8]>,
    pin: Pin<'a>,
    /// What statx(2) says of the copy, as users see it.
    made: Statx,
    /// Its number can be found again on the disk.
    lasts: bool,
}

impl Ready<'_> {
    fn object(&self) -> (u64, u64) {
        (sys::stat::device(&self.made), self.made.stx_ino)
    }

    /// Tells whether the node is still what was copied: in a lower, under its name in `parent`.
    fn is_wanted(&self, parent: &Arc<Node>) -> bool {
        let place = self.pin.node.place.read();
        !place.gone && place.layer != UPPER && place.is_named(parent, &self.name)
    }

    /// Opens the copy for whoever has the file open, and may not be able to open it again by its mode.
    fn data(&self, dir: &layer::Dir) -> Result<Option<Data>> {
        let node = &self.pin.node;
        if !node.is_opened() || node.kind != FileType::Regular {
            return Ok(None);
        }
        let mode = u32::from(self.made.stx_mode);
        let open = |at: At<'_>| match sys::open::writer(at.dir, at.name) {
            // Nobody sees the copy yet, so its mode may be another for a moment.
            Err(Errno::ACCESS) => {
                let handle = sys::open::handle(at.dir, at.name)?;
                sys::name::chmod_handle(&handle, mode | 0o600)?;
                let opened = sys::open::writer(at.dir, at.name);
                sys::name::chmod_handle(&handle, mode)?;
                opened
            }
            opened => opened,
        };
        dir.call("openat", &self.name, open).map(|file| Some(Data::new(file)))
    }
}

/// A directory in work with copies.
pub(super) struct Staging<'a> {
    /// Position in the order in which they are published.
    pub(super) order: usize,
    node: Arc<Node>,
    temp: Temp<'a>,
    dir: Arc<layer::Dir>,
    copies: Vec<Ready<'a>>,
    /// It can become the upper part of the directory.
    is_part: bool,
}

impl<'a> Staging<'a> {
    /// Makes an empty one for the directory `node`.
    ///
    /// # Errors
    /// Those of mkdirat(2) and statx(2).
    pub(super) fn new(upper: &'a Upper, order: usize, node: &Arc<Node>) -> Result<Self> {
        let temp = upper.work.make_directory(0o700)?;
        let made = temp.call("statx", |at| sys::stat::at(at.dir, at.name))?;
        let dir = upper.work.dir.child(&temp.name, &made);
        Ok(Self { order, node: Arc::clone(node), temp, dir, copies: Vec::new(), is_part: true })
    }
}

impl Union {
    /// Adds the copy of a file, not synced; returns how many bytes it takes.
    ///
    /// # Errors
    /// Those of the copy-up.
    pub(super) fn stage_leaf<'a>(
        &self,
        upper: &Upper,
        staging: &mut Staging<'a>,
        Leaf { name, pin, stat }: Leaf<'a>,
    ) -> Result<u64> {
        let lasts = self.stage_named(upper, &pin.node, &stat, (&staging.dir, &name))?;
        let mut made = staging.dir.call("statx", &name, |at| sys::stat::at(at.dir, at.name))?;
        show(&pin.node, &mut made);
        // A whiteout of a nested overlay is for the directory to tell of, when it has its name.
        staging.is_part &= !sys::stat::is_whiteout(&made);
        staging.copies.push(Ready { name, pin, made, lasts });
        Ok(made.stx_blocks * 512)
    }

    /// Gives the directory in work its attributes if it is to be the upper part.
    ///
    /// # Errors
    /// Those of the copy-up.
    pub(super) fn complete<'a>(
        &self,
        upper: &Upper,
        mut staging: Staging<'a>,
    ) -> Result<Staging<'a>> {
        let dir = lock::directory(&staging.node)?;
        staging.is_part &= dir.upper.get().is_none();
        if staging.is_part {
            if !staging.copies.is_empty() {
                upper.work.set_impure(&staging.dir)?;
            }
            // Last, so that files do not inherit its ACL, and its times stay.
            self.fill_directory(upper, dir, &staging.temp.name)?;
        }
        Ok(staging)
    }

    /// Publishes copies, as a whole if that can be; those that nobody wants any more are dropped.
    ///
    /// # Errors
    /// Those of the copy-up.
    pub(super) fn publish_staging(&self, upper: &Upper, staging: Staging<'_>) -> Result<()> {
        let Some(staging) = self.publish_part(upper, staging)? else { return Ok(()) };
        let node = &staging.node;
        match self.copy_up(node, Extent::All) {
            Err(_) if node.place.read().gone => return Ok(()),
            done => done?,
        }
        if staging.copies.is_empty() {
            return Ok(());
        }
        if staging.is_part {
            // Its mode may forbid its owner to take anything out.
            staging.dir.with("fchmodat", |dir| sys::name::chmod_handle(dir, 0o700))?;
        }
        let dir = lock::directory(node)?;
        let mut names = dir.names.write();
        let to = dir.upper.get().ok_or(Errno::STALE)?;
        upper.work.set_impure(to)?;
        unnoticed(to, || {
            let mut copies = staging.copies.iter();
            copies.try_for_each(|ready| {
                self.publish_ready(upper, (&staging.dir, to), (node, &mut names), ready)
            })
        })
    }

    /// Publishes the directory in work as the upper part of its directory; returns it if that has one
    /// by now, or files in it are being changed.
    fn publish_part<'a>(&self, upper: &Upper, staging: Staging<'a>) -> Result<Option<Staging<'a>>> {
        let node = Arc::clone(&staging.node);
        let parent = node.place.read().parent.clone();
        let Some(parent) = parent.filter(|_| staging.is_part) else { return Ok(Some(staging)) };
        match self.copy_up(&parent, Extent::All) {
            Err(_) if node.place.read().gone => return Ok(None),
            done => done?,
        }
        let _renames = self.rename.read();
        let _copying = node.copy.lock();
        let (above, dir) = (lock::directory(&parent)?, lock::directory(&node)?);
        let mut names_above = above.names.write();
        let mut names = dir.names.write();
        let name = {
            let place = node.place.read();
            if place.gone {
                return Ok(None);
            }
            let is_there = place.parent.as_ref().is_some_and(|at| Arc::ptr_eq(at, &parent));
            (is_there && dir.upper.get().is_none()).then(|| place.name.clone())
        };
        let Some(name) = name else { return Ok(Some(staging)) };
        let copies = &staging.copies;
        // Whoever holds one copies that file up by itself.
        let copying: Vec<_> = copies.iter().map_while(|one| one.pin.node.copy.try_lock()).collect();
        if copying.len() < copies.len() || !copies.iter().all(|ready| ready.is_wanted(&node)) {
            drop(copying);
            return Ok(Some(staging));
        }
        let data = copies.iter().map(|ready| ready.data(&staging.dir));
        let data: Vec<_> = data.collect::<Result<_>>()?;
        copies.iter().for_each(|ready| self.keep_number(ready));
        self.publish_directory(upper, &node, staging.temp, (above, &mut names_above), &name)
            .inspect_err(|_| copies.iter().for_each(|ready| self.drop_number(ready)))?;
        for (ready, data) in copies.iter().zip(data) {
            self.set_published(&mut names, ready, data);
        }
        Ok(None)
    }

    /// Publishes one copy in the upper part `to`, unless nobody wants it any more.
    fn publish_ready(
        &self,
        upper: &Upper,
        (work, to): (&layer::Dir, &layer::Dir),
        (parent, names): (&Arc<Node>, &mut Names),
        ready: &Ready<'_>,
    ) -> Result<()> {
        // Whoever holds it copies the file up by itself.
        let Some(_copying) = ready.pin.node.copy.try_lock() else { return Ok(()) };
        if !ready.is_wanted(parent) {
            return Ok(());
        }
        self.pass_on_whiteout(upper, &ready.made, to)?;
        let data = ready.data(work)?;
        self.keep_number(ready);
        upper.work.publish_child(work, to, &ready.name).inspect_err(|_| self.drop_number(ready))?;
        self.set_published(names, ready, data);
        Ok(())
    }

    /// The copy shows the number of what it was made from.
    fn keep_number(&self, ready: &Ready<'_>) {
        let (device, inode) = ready.object();
        self.numbers.keep(device, inode, ready.pin.node.ino);
    }

    fn drop_number(&self, ready: &Ready<'_>) {
        let (device, inode) = ready.object();
        self.numbers.drop_kept(device, inode);
    }

    /// Switches a file to its copy, which is published.
    fn set_published(&self, names: &mut Names, ready: &Ready<'_>, data: Option<Data>) {
        if let Some(listing) = &mut names.listing {
            listing.copied_up(&ready.name, ready.object());
        }
        let node = &ready.pin.node;
        self.set_upper(node, data, ready.object(), ready.lasts);
        node.known.set_whole(true);
    }
}
