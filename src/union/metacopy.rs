//! Metacopies: files with attributes whose data lies in a lower layer. Reading them, making them,
//! and giving them data of their own before the first write.
//!
//! The data is that of the first file beneath, under the same name or where a redirect leads; it may
//! be a metacopy itself. The attributes, the size among them, are always those of the topmost. A
//! file gets its own data where it is: all of it, made durable, before the mark that says that it
//! has none is removed; whatever stops that leaves a metacopy, which shows the same.
//!
//! Locks: `Node::copy` over giving a file its data.
//!
//! # Source
//! overlayfs.rst, "Metadata only copy up", "Data-only lower layers" and "fs-verity support".

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{FallocateFlags, XattrFlags};

use super::attr::{FileType, times_of};
use super::copy_up::Extent;
use super::file::Data;
use super::node::Node;
use super::origin::Origin;
use super::publish::Staged;
use super::redirect::Walk;
use super::resolve::Fact;
use super::{Union, Upper, lock};
use crate::error::{Context, Errno, Error, Result};
use crate::layer::{self, UPPER};
use crate::marks::{self, Digest, Metacopy, Redirect};
use crate::sys;
use crate::sys::data::Part;
use crate::sys::stat::Statx;
use crate::sys::xattr::{self, CAPABILITY, Target};

/// What is done about digests of data, `verity=`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verity {
    /// They are neither looked at nor written.
    Off,
    /// What a metacopy says must be true of its data; written where the data has one.
    On,
    /// Every metacopy must say one.
    Require,
}

/// What the topmost file of a chain of metacopies says.
struct Stub {
    redirect: Option<Redirect>,
    digest: Option<Digest>,
    /// Data-only layers alone may lend it data.
    distrusted: bool,
}

impl Union {
    /// Tells whether a file that is open has no data of its own, and then who may lend it some.
    fn stub(&self, file: BorrowedFd<'_>, layer: layer::Index) -> Result<Option<Stub>> {
        let file = Target::Open(file);
        let list = xattr::list(file).at("listxattr", || A_FILE)?;
        if !marks::lists_any(&list, &marks::METACOPY_XATTRS) {
            return Ok(None);
        }
        let get = |names: &[&[u8]]| -> Result<Option<Vec<u8>>> {
            for name in names.iter().filter(|name| marks::lists_any(&list, &[name])) {
                if let Some(value) = xattr::get(file, name).at("getxattr", || A_FILE)? {
                    return Ok(Some(value));
                }
            }
            Ok(None)
        };
        let mut distrusted = false;
        let mut marks = (
            get(self.followed(&marks::METACOPY_XATTRS))?,
            get(self.followed(&marks::REDIRECT_XATTRS))?,
        );
        if marks.0.is_none() && layer != UPPER && !self.data_roots.is_empty() {
            // What a data-only layer holds is there to be lent.
            distrusted = true;
            marks = (get(&marks::METACOPY_XATTRS)?, get(&marks::REDIRECT_XATTRS)?);
        }
        let (Some(value), redirect) = marks else {
            tracing::warn!(
                "a file whose data lies in a lower layer is refused; mount with \
                 redirect_dir=follow if its layer is trusted"
            );
            return Err(Errno::PERM.into());
        };
        let corrupt = |what: &'static str| Error::Corrupt { what: what.into(), at: A_FILE.into() };
        let digest = Metacopy::parse(&value).ok_or_else(|| corrupt("its overlay.metacopy is odd"));
        let redirect = match redirect.map(|value| Redirect::parse(&value)) {
            Some(None) => return Err(corrupt("its overlay.redirect names no place in a layer")),
            redirect => redirect.flatten(),
        };
        Ok(Some(Stub { redirect, digest: digest?.digest, distrusted }))
    }

    /// Returns the data that the file of a node shows, which is open; `None` if it is its own.
    ///
    /// # Errors
    /// `EIO` if there is none, or not what the digest says; `EPERM` if nobody trusted says where.
    pub(super) fn lent_data(&self, node: &Node, file: BorrowedFd<'_>) -> Result<Option<OwnedFd>> {
        let (parent, name, layer) = {
            let place = node.place.read();
            (place.parent.clone(), place.name.clone(), place.layer)
        };
        let Some(stub) = self.stub(file, layer)? else { return Ok(None) };
        let parent = parent.ok_or(Errno::STALE)?;
        let dir = lock::directory(&parent)?;
        let mut layer = layer;
        let mut distrusted = stub.distrusted;
        let mut route = stub.redirect.unwrap_or(Redirect::Sibling((*name).into()));
        for root in self.roots_below(layer) {
            if distrusted {
                break;
            }
            if root.layer.index <= layer {
                continue;
            }
            let Some(start) = route.start(dir, root) else { continue };
            let Walk { end, stop, turns } = self.walk(start, route.names())?;
            for (left, turn) in turns {
                route = super::redirect::turned(&route, left, turn);
            }
            if let Some(end) = end {
                if end.fact != Fact::Leaf {
                    break;
                }
                let Some(data) = open_regular(&end.dir, &end.name)? else { break };
                match self.stub(data.as_fd(), root.layer.index)? {
                    None => return self.vouched(data, stub.digest.as_ref()).map(Some),
                    Some(next) => {
                        layer = root.layer.index;
                        distrusted = next.distrusted;
                        route = next.redirect.unwrap_or(route);
                    }
                }
            }
            if stop {
                break;
            }
        }
        if let Redirect::Path(path) = &route {
            for root in &self.data_roots {
                if let Some(end) = self.walk(root, path)?.end
                    && end.fact == Fact::Leaf
                    && let Some(data) = open_regular(&end.dir, &end.name)?
                {
                    return self.vouched(data, stub.digest.as_ref()).map(Some);
                }
            }
        }
        Err(Error::Corrupt { what: "no layer holds its data".into(), at: A_FILE.into() })
    }

    /// Checks data against the digest that its metacopy says.
    fn vouched(&self, data: OwnedFd, digest: Option<&Digest>) -> Result<OwnedFd> {
        let wrong = match (self.verity, digest) {
            (Verity::Off, _) | (Verity::On, None) => return Ok(data),
            (Verity::Require, None) => "its metacopy has no digest",
            (_, Some(digest)) => match measure(data.as_fd())? {
                Some(true_one) if true_one == *digest => return Ok(data),
                Some(_) => "its data has another digest",
                None => "its data has no digest",
            },
        };
        Err(Error::Corrupt { what: wrong.into(), at: A_FILE.into() })
    }

    /// Prepares a metacopy of a lower file, if there shall be one.
    pub(super) fn stage_metacopy<'a>(
        &self,
        upper: &'a Upper,
        node: &Arc<Node>,
        stat: &Statx,
    ) -> Result<Option<(Staged<'a>, Origin)>> {
        // A file without data is as good as a metacopy; one with several names goes its own way.
        if !self.metacopy || stat.stx_size == 0 || node.links.get().is_some() {
            return Ok(None);
        }
        if self.uid != 0 && node.is_opened() {
            // Its mode may forbid us to open it again, for those who have it open.
            return Ok(None);
        }
        let digest = match self.verity {
            Verity::Off => None,
            Verity::On | Verity::Require => measure(self.source_data(node)?.file.as_fd())?,
        };
        if digest.is_none() && self.verity == Verity::Require {
            return Ok(None);
        }
        let staged = upper.work.stage_file(&upper.work.dir, 0o600)?;
        sys::data::truncate(staged.file.as_fd(), stat.stx_size).at("ftruncate", || A_FILE)?;
        let value = Metacopy { digest }.print();
        let file = Target::Open(staged.file.as_fd());
        xattr::set(
            file,
            upper.work.namespace.of(&marks::METACOPY_XATTRS),
            &value,
            XattrFlags::empty(),
        )
        .at("setxattr", || A_FILE)?;
        let source = self.lower_handle(node)?;
        let origin = self.set_origin(upper, (source.as_fd(), stat), file)?;
        super::copy_attr::pass_on_flags(source.as_fd(), staged.file.as_fd())
            .at("ioctl", || A_FILE)?;
        let route = self.route(self.layer_of(node), upper);
        super::copy_attr::copy_attributes(
            &upper.work,
            route,
            Target::Handle(source.as_fd()),
            file,
            stat,
        )?;
        Ok(Some((staged, origin)))
    }

    /// Tells whether an upper file that is about to get another place has no data of its own: that
    /// would not be found from there.
    ///
    /// # Errors
    /// Those of listxattr(2), asked of files that are not known to be whole.
    pub(super) fn is_metacopy(
        &self,
        part: &layer::Dir,
        name: &[u8],
        stat: &Statx,
        node: Option<&Node>,
    ) -> Result<bool> {
        let is_whole = node.is_some_and(|node| node.known.is_whole());
        let is_file = FileType::of_mode(u32::from(stat.stx_mode)) == FileType::Regular;
        if is_whole || !is_file || stat.stx_size == 0 {
            return Ok(false);
        }
        let list = part.call("listxattr", name, |at| xattr::list(Target::Name(at)))?;
        let is_metacopy = marks::lists_any(&list, &marks::METACOPY_XATTRS);
        if let Some(node) = node.filter(|_| !is_metacopy) {
            node.known.set_whole(true);
        }
        Ok(is_metacopy)
    }

    /// Makes sure that an upper file has its own data, as much as its new owner needs.
    ///
    /// # Errors
    /// Those of [`Union::lent_data`], of copying, and of the calls on the upper file.
    pub(super) fn own_data(&self, node: &Arc<Node>, extent: Extent) -> Result<()> {
        if node.kind != FileType::Regular || node.known.is_whole() {
            return Ok(());
        }
        let _copying = node.copy.lock();
        if node.known.is_whole() {
            return Ok(());
        }
        let list = self.with_xattrs(node, "listxattr", xattr::list)?;
        if !marks::lists_any(&list, &marks::METACOPY_XATTRS) {
            node.known.set_whole(true);
            return Ok(());
        }
        let file = self.open_itself(node, true)?;
        let stat = sys::stat::of(&file).at("statx", || A_FILE)?;
        let Some(data) = self.lent_data(node, file.as_fd())? else { return Ok(()) };
        let capability = xattr::get(Target::Open(file.as_fd()), CAPABILITY);
        let capability = capability.at("getxattr", || A_FILE)?;
        let len = extent.of(stat.stx_size);
        // It has a size, and no blocks, already.
        let part = Part { len, whole: len == stat.stx_size, dense: false };
        let is_given_up = || self.interrupts.is_given_up();
        let filled = sys::data::copy(data.as_fd(), file.as_fd(), part, &is_given_up)
            .at("copy_file_range", || "from a lower file to its metacopy")
            // What nobody needs is cut off before the mark goes, so that no zeros ever show.
            .and_then(|()| sys::data::truncate(file.as_fd(), len).at("ftruncate", || A_FILE));
        if filled.is_err() {
            // What was copied takes room and shows nowhere; that it stays does no harm.
            let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            if let Err(error) = rustix::fs::fallocate(&file, hole, 0, stat.stx_size) {
                tracing::debug!("half a copy stays beneath a metacopy: {error}");
            }
        }
        // To write has changed what the metacopy shows.
        let restored = restore(file.as_fd(), &stat, capability.as_deref());
        filled?;
        restored?;
        if !self.volatile {
            sys::data::sync(file.as_fd(), false).at("fsync", || A_FILE)?;
        }
        // The metacopy mark goes first: a redirect alone means nothing on a file.
        for names in [marks::METACOPY_XATTRS, marks::REDIRECT_XATTRS] {
            for name in names.into_iter().filter(|name| marks::lists_any(&list, &[name])) {
                xattr::remove(Target::Open(file.as_fd()), name).at("removexattr", || A_FILE)?;
            }
        }
        let object = (sys::stat::device(&stat), stat.stx_ino);
        self.set_upper(node, Some(Data::new(file)), object, false);
        Ok(())
    }
}

/// How a message names a file that is known by its handle.
const A_FILE: &str = "a file without data of its own";

/// Gives a file back what writing to it took: capabilities, setuid and setgid, times.
fn restore(file: BorrowedFd<'_>, stat: &Statx, capability: Option<&[u8]>) -> Result<()> {
    if let Some(capability) = capability {
        xattr::set(Target::Open(file), CAPABILITY, capability, XattrFlags::empty())
            .at("setxattr", || A_FILE)?;
    }
    let mode = u32::from(stat.stx_mode);
    if mode & sys::stat::SETIDS != 0 {
        sys::name::chmod_handle(file, mode).at("chmod", || A_FILE)?;
    }
    sys::name::set_times_handle(file, &times_of(stat)).at("utimensat", || A_FILE)
}

fn measure(file: BorrowedFd<'_>) -> Result<Option<Digest>> {
    let measured = sys::verity::measure(file).at("ioctl", || A_FILE)?;
    Ok(measured.and_then(|(algorithm, bytes)| {
        let algorithm = u8::try_from(algorithm).ok()?;
        Some(Digest { algorithm, bytes: bytes.into() })
    }))
}

/// Opens a file of a lower layer; `None` if it is no regular one.
fn open_regular(dir: &layer::Dir, name: &[u8]) -> Result<Option<OwnedFd>> {
    let stat = dir.find(name)?.ok_or(Errno::STALE)?;
    if FileType::of_mode(u32::from(stat.stx_mode)) != FileType::Regular {
        return Ok(None);
    }
    dir.call("openat", name, |at| sys::open::reader(at.dir, at.name)).map(Some)
}
