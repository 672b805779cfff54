//! What the filesystem of the upper can do, found by trying it in the work directory.
//!
//! Neither its type nor a version is asked. What a call is said to have done is read back, because
//! some filesystems accept what they do not store. For each ability that lacks there is another way
//! (see [`super::publish`] and [`super::cover`]); what was found is logged.

use std::os::fd::AsFd;

use rustix::fs::{RenameFlags, XattrFlags};

use super::attr::times_of;
use super::publish::{Temp, Work};
use crate::error::{Context, Errno, Result};
use crate::layer::leftover;
use crate::marks::{self, Namespace};
use crate::options::Ability;
use crate::sys;
use crate::sys::name::At;
use crate::sys::xattr::{self, Target};

/// What the upper's filesystem can do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Abilities {
    /// `O_TMPFILE`, and linkat(2) of such a file.
    pub(crate) unnamed: bool,
    /// `RENAME_EXCHANGE`.
    pub(crate) exchange: bool,
    /// `RENAME_WHITEOUT`.
    pub(crate) rename_whiteout: bool,
    /// Character devices 0:0; else whiteouts are `.wh.` files.
    pub(crate) device: bool,
    /// Xattrs for marks, and where; else `.wh..wh..opq` files mark opaque directories.
    pub(crate) marks: Option<Namespace>,
    /// link(2), by names that are one; else whiteouts are made one by one, and names of one lower
    /// file are one file after its copy-up only while mounted.
    pub(crate) link: bool,
    /// chown(2); else everything belongs to the server.
    pub(crate) chown: bool,
    /// Owner and times of symlinks; else they are what they get.
    pub(crate) symlink_attributes: bool,
    /// A file that is removed while it is open leaves no name behind.
    pub(crate) unlink_open: bool,
}

/// Tries everything in `work`; abilities in `lacks` count as missing.
///
/// # Errors
/// Those by which a call fails for another reason than that it is not supported: `ENOSPC`, `EIO`.
pub(super) fn probe(work: &Work, userxattr: bool, lacks: &[Ability]) -> Result<Abilities> {
    let has = |ability| !lacks.contains(&ability);
    let link = has(Ability::Link) && can_link(work)?;
    let device = has(Ability::Device) && has_device(work)?;
    let found = Abilities {
        unnamed: has(Ability::Unnamed) && has_unnamed(work)?,
        exchange: has(Ability::Exchange) && can_exchange(work)?,
        rename_whiteout: device && has(Ability::RenameWhiteout) && can_rename_whiteout(work)?,
        device,
        marks: if has(Ability::Xattr) { namespace(work, userxattr)? } else { None },
        link,
        chown: has(Ability::Chown) && can_chown(work)?,
        symlink_attributes: has_symlink_attributes(work)?,
        unlink_open: has(Ability::UnlinkOpen) && can_unlink_open(work)?,
    };
    let some = file(work, "openat")?;
    work.dir.probe_numbers()?;
    drop(some);
    report(&found);
    Ok(found)
}

/// Logs what was found; what costs something, or looks different, as a warning.
fn report(found: &Abilities) {
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    tracing::info!(
        "upperdir: whiteouts: {}; opaque directories: {}; unnamed files: {}; RENAME_EXCHANGE: {}; \
         RENAME_WHITEOUT: {}; hard links: {}; owners: {}; removed open files: {}",
        if found.device { "character devices 0:0" } else { ".wh. files" },
        text(found.marks.map_or(marks::OPAQUE_NAME, |space| space.of(&marks::OPAQUE_XATTRS))),
        found.unnamed,
        found.exchange,
        found.rename_whiteout,
        found.link,
        if found.chown { "kept" } else { "the server's" },
        if found.unlink_open { "gone" } else { "kept in workdir until they are closed" },
    );
    if !found.device || found.marks.is_none() {
        tracing::warn!(
            "upperdir: its filesystem holds no whiteouts or no marks of the kernel's form, so \
             kernel overlayfs will not read this layer as it is meant"
        );
    }
    if !found.chown {
        tracing::warn!(
            "upperdir: its filesystem lets nobody change owners: what is made or copied up belongs \
             to the server"
        );
    }
}

/// What a call answers that is not there: by the filesystem, or kept from this caller.
fn is_lacking(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::INVAL
            | Errno::OPNOTSUPP
            | Errno::NOSYS
            | Errno::PERM
            | Errno::ACCESS
            | Errno::NOTTY
            | Errno::NOENT
            | Errno::ISDIR
            | Errno::MLINK
    )
}

/// Turns the outcome of a trial into an ability.
fn tried<T>(trial: Result<T>) -> Result<Option<T>> {
    match trial {
        Ok(done) => Ok(Some(done)),
        Err(error) if is_lacking(error.errno()) => {
            tracing::debug!("upperdir lacks: {error}");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn file<'a>(work: &'a Work, op: &'static str) -> Result<Temp<'a>> {
    let temp = work.temp();
    temp.call(op, |at| sys::open::create(at.dir, at.name, 0o600))?;
    Ok(temp)
}

fn rename(work: &Work, from: &Temp<'_>, to: &Temp<'_>, flags: RenameFlags) -> Result<()> {
    work.dir.with("renameat2", |dir| {
        sys::name::rename(At::new(dir, &from.name), At::new(dir, &to.name), flags)
    })
}

fn has_unnamed(work: &Work) -> Result<bool> {
    let trial = work.dir.with("openat", |dir| sys::open::unnamed(dir, 0o600));
    let Some(unnamed) = tried(trial)? else { return Ok(false) };
    let temp = work.temp();
    let linked = temp.call("linkat", |at| sys::name::link_handle(&unnamed, at));
    Ok(tried(linked)?.is_some())
}

/// Tells whether there are hard links, and both names show at once what is written under one: a
/// FUSE server that goes by paths has two inodes, each with what it remembers.
fn can_link(work: &Work) -> Result<bool> {
    let (one, other) = (work.temp(), work.temp());
    let open = one.call("openat", |at| sys::open::create(at.dir, at.name, 0o600))?;
    let linked = work
        .dir
        .with("linkat", |dir| sys::name::link(At::new(dir, &one.name), At::new(dir, &other.name)));
    if tried(linked)?.is_none() {
        return Ok(false);
    }
    let stat = || other.call("statx", |at| sys::stat::at(at.dir, at.name));
    let before = stat()?;
    sys::data::write_at(open.as_fd(), b"x", 0).at("pwrite", || "a file in work")?;
    let after = stat()?;
    Ok((before.stx_nlink, before.stx_size, after.stx_size) == (2, 0, 1))
}

fn can_exchange(work: &Work) -> Result<bool> {
    let (one, other) = (file(work, "openat")?, work.make_directory(0o700)?);
    if tried(rename(work, &one, &other, RenameFlags::EXCHANGE))?.is_none() {
        return Ok(false);
    }
    let stat = one.call("statx", |at| sys::stat::find(at.dir, at.name))?;
    Ok(stat.is_some_and(|stat| u32::from(stat.stx_mode) & libc::S_IFMT == libc::S_IFDIR))
}

fn can_rename_whiteout(work: &Work) -> Result<bool> {
    let (from, to) = (file(work, "openat")?, work.temp());
    if tried(rename(work, &from, &to, RenameFlags::WHITEOUT))?.is_none() {
        return Ok(false);
    }
    let stat = from.call("statx", |at| sys::stat::find(at.dir, at.name))?;
    Ok(stat.is_some_and(|stat| sys::stat::is_whiteout(&stat)))
}

fn has_device(work: &Work) -> Result<bool> {
    let temp = work.temp();
    if tried(temp.call("mknodat", sys::name::whiteout))?.is_none() {
        return Ok(false);
    }
    let stat = temp.call("statx", |at| sys::stat::find(at.dir, at.name))?;
    Ok(stat.is_some_and(|stat| sys::stat::is_whiteout(&stat)))
}

fn namespace(work: &Work, userxattr: bool) -> Result<Option<Namespace>> {
    let dir = work.make_directory(0o700)?;
    let known = [Namespace::Trusted, Namespace::User];
    for namespace in known.into_iter().skip(usize::from(userxattr)) {
        let name = namespace.of(&marks::OPAQUE_XATTRS);
        let value = marks::OPAQUE_VALUE;
        let set = dir
            .call("setxattr", |at| xattr::set(Target::Name(at), name, value, XattrFlags::empty()));
        if tried(set)?.is_some() {
            let read = dir.call("getxattr", |at| xattr::get(Target::Name(at), name));
            if tried(read)?.flatten().as_deref() == Some(value) {
                return Ok(Some(namespace));
            }
        }
    }
    Ok(None)
}

/// Tells whether root can give files away. Nobody else can, anywhere.
fn can_chown(work: &Work) -> Result<bool> {
    const OTHER: u32 = 1;
    if !rustix::process::geteuid().is_root() {
        return Ok(true);
    }
    let temp = file(work, "openat")?;
    let chown = |at: At<'_>| sys::name::chown(at, Some(OTHER), Some(OTHER));
    match temp.call("fchownat", chown) {
        Ok(()) => {}
        // In a user namespace without that id, which tells nothing.
        Err(error) if error.errno() == Errno::INVAL => return Ok(true),
        Err(error) => return tried::<()>(Err(error)).map(|_| false),
    }
    let stat = temp.call("statx", |at| sys::stat::at(at.dir, at.name))?;
    Ok((stat.stx_uid, stat.stx_gid) == (OTHER, OTHER))
}

/// Tells whether a symlink that leads nowhere has an owner and times to set. SFTP has calls that
/// follow it only.
fn has_symlink_attributes(work: &Work) -> Result<bool> {
    let temp = work.temp();
    if tried(temp.call("symlinkat", |at| sys::name::symlink(b"tmp-none/none", at)))?.is_none() {
        return Ok(true);
    }
    let stat = temp.call("statx", |at| sys::stat::at(at.dir, at.name))?;
    let set = temp.call("utimensat", |at| {
        sys::name::set_times(at, &times_of(&stat))?;
        sys::name::chown(at, Some(stat.stx_uid), Some(stat.stx_gid))
    });
    Ok(tried(set)?.is_some())
}

/// Tells whether an open file that is removed can still be reached, and leaves no name.
fn can_unlink_open(work: &Work) -> Result<bool> {
    let temp = work.temp();
    let open = temp.call("openat", |at| sys::open::create(at.dir, at.name, 0o600))?;
    // As the union holds files that nobody reads: by a handle that cannot read either.
    let held = temp.call("openat", |at| sys::open::handle(at.dir, at.name))?;
    temp.call("unlinkat", sys::name::unlink)?;
    let mut is_left = false;
    work.dir.list(|name, _, _| {
        is_left |= leftover::is_name(name);
        Ok(())
    })?;
    drop(open);
    let reached = tried(sys::stat::of(held.as_fd()).at("statx", || "a removed file in work"));
    // ESTALE and the like are what this is about.
    let reached = reached.unwrap_or(None).is_some();
    Ok(!is_left && reached)
}
