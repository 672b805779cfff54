//! Images from a bundle into a store: layers are unpacked beside one another, and published from
//! the lowest up.
//!
//! Locks: none held while unpacking. A crash leaves temporary directories, which the next opening of
//! the store removes, and whole layers.

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;

use rustix::fs::RenameFlags;

use super::{Record, Records};
use crate::archive::bundle::Bundle;
use crate::archive::manifest::{self, Image, Layer};
use crate::archive::{ApplyOptions, Whiteouts, apply};
use crate::error::{Context, Error, Result};
use crate::store::stage::TempDir;
use crate::store::{self, CreateOptions, LayerId, Store};
use crate::sys::name::{self, At};
use crate::sys::{self, open, stat, xattr};

/// Layers that are unpacked at once.
const WORKERS_MAX: usize = 4;
const CONTENT: &[u8] = b"content";

/// How images are imported.
#[derive(Debug)]
pub struct ImportOptions {
    /// How layers are applied; the form of whiteouts is the store's.
    pub apply: ApplyOptions,
    /// A name in place of those in the bundle, if it has one image.
    pub name: Option<String>,
}

/// Told of the bytes that are read: wraps the file of a layer.
pub type Watch<'a> = dyn Fn(Box<dyn Read + Send>, u64) -> Box<dyn Read + Send> + Sync + 'a;

/// Imports all images of a bundle and returns their records.
///
/// # Errors
/// `EIO` for a bundle that is malformed or does not have the digests it says; those of writing.
pub fn import(
    store: &Store,
    records: &Records,
    bundle: &Bundle,
    options: &ImportOptions,
    watch: &Watch<'_>,
) -> Result<Vec<Record>> {
    let images = manifest::images(bundle)?;
    if options.name.is_some() && images.len() != 1 {
        return Err(Error::invalid("--name", "needs a bundle with one image"));
    }
    let mut imported = Vec::new();
    for image in images {
        let layers = layers(store, bundle, &image, options, watch)?;
        let config = String::from_utf8(image.config).map_err(|_bytes| Error::Corrupt {
            what: "is not UTF-8".into(),
            at: "the configuration".into(),
        })?;
        let names = options.name.clone().map_or(image.names, |name| vec![name]);
        let mut record = Record { names, layers, config };
        records.add(&mut record)?;
        imported.push(record);
    }
    Ok(imported)
}

/// Makes the layers of an image that the store does not have, and returns all their ids.
fn layers(
    store: &Store,
    bundle: &Bundle,
    image: &Image,
    options: &ImportOptions,
    watch: &Watch<'_>,
) -> Result<Vec<String>> {
    let mut ids = Vec::new();
    let mut todo = Vec::new();
    for (layer, chain) in image.layers.iter().zip(image.chain()) {
        let id = LayerId::parse(&chain.hex())?;
        if !store.exists(&id)? {
            todo.push((layer, id.clone(), ids.last().cloned()));
        }
        ids.push(id);
    }
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let (sender, receiver) = mpsc::channel();
    let workers = std::thread::available_parallelism().map_or(1, usize::from).min(WORKERS_MAX);
    std::thread::scope(|scope| {
        for _ in 0..workers.min(todo.len()) {
            let (sender, todo, next, failed) = (sender.clone(), &todo, &next, &failed);
            scope.spawn(move || {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    let Some((layer, ..)) = todo.get(number) else { return };
                    if failed.load(Ordering::Relaxed) {
                        return;
                    }
                    let unpacked = unpack(store, bundle, layer, options, watch);
                    failed.fetch_or(unpacked.is_err(), Ordering::Relaxed);
                    // The other side is gone only after an error of its own.
                    drop(sender.send((number, unpacked)));
                }
            });
        }
        drop(sender);
        let mut waiting: Vec<Option<Unpacked<'_>>> = todo.iter().map(|_| None).collect();
        let mut published = 0;
        while let Ok((number, unpacked)) = receiver.recv() {
            if let Some(place) = waiting.get_mut(number) {
                *place = Some(unpacked?);
            }
            // From the lowest up: a layer needs its parent.
            while let Some(unpacked) = waiting.get_mut(published).and_then(Option::take) {
                if let Some((_, id, parent)) = todo.get(published) {
                    let done = publish(store, id, parent.as_ref(), unpacked);
                    failed.fetch_or(done.is_err(), Ordering::Relaxed);
                    done?;
                }
                published += 1;
            }
        }
        Ok::<_, Error>(())
    })?;
    Ok(ids.into_iter().map(|id| id.to_string()).collect())
}

/// A layer's content in a temporary directory.
struct Unpacked<'a> {
    temp: TempDir<'a>,
    content: OwnedFd,
}

fn unpack<'a>(
    store: &'a Store,
    bundle: &Bundle,
    layer: &Layer,
    options: &ImportOptions,
    watch: &Watch<'_>,
) -> Result<Unpacked<'a>> {
    let home = store.writable_homes().last().unwrap_or_else(|| store.home());
    let temp = TempDir::new(home)?;
    let shown = || PathBuf::from(layer.path.clone());
    let at = || layer.path.clone();
    name::mkdir(At::new(temp.dir().as_fd(), CONTENT), 0o755).at("mkdirat", at)?;
    let content = open::directory(temp.dir().as_fd(), CONTENT).at("openat", at)?;
    let file = bundle.find(&layer.path)?.ok_or_else(|| Error::Corrupt {
        what: "is missing in the image".into(),
        at: layer.path.clone().into(),
    })?;
    let size = file.size();
    let apply_options = ApplyOptions {
        blob: layer.blob.map(|(digest, _)| digest),
        blob_size: layer.blob.map(|(_, size)| size),
        diff: Some(layer.diff),
        ..for_store(store, options.apply.clone())?
    };
    let root = content.try_clone().map_err(|error| {
        let errno = crate::error::Errno::from_io_error(&error);
        Error::sys("fcntl", layer.path.clone(), errno.unwrap_or(crate::error::Errno::IO))
    })?;
    apply(root, shown(), watch(Box::new(file), size), &apply_options)?;
    Ok(Unpacked { temp, content })
}

/// Returns how an archive is unpacked to a layer of `store`, which says how names are hidden, whose
/// errors of owners are passed over, and which mode all files get.
///
/// # Errors
/// Those of finding out how names are hidden.
pub fn for_store(store: &Store, options: ApplyOptions) -> Result<ApplyOptions> {
    Ok(ApplyOptions {
        whiteouts: form(store.whiteouts()?),
        ignore_chown_errors: store.options().ignore_chown_errors,
        force_mask: store.options().force_mask,
        ..options
    })
}

/// Returns how an archive is unpacked to a layer that keeps what it hides in this form.
pub fn form(whiteouts: store::Whiteouts) -> Whiteouts {
    match whiteouts {
        store::Whiteouts::Kernel => Whiteouts::Overlay,
        store::Whiteouts::Files => Whiteouts::Files,
        store::Whiteouts::None => Whiteouts::Flat,
    }
}

/// Moves what was unpacked into a layer of the store, and gives that its place.
fn publish(
    store: &Store,
    id: &LayerId,
    parent: Option<&LayerId>,
    unpacked: Unpacked<'_>,
) -> Result<()> {
    let options = CreateOptions { parent, read_write: false, owner: None };
    let mut staged = match store.stage(id, options) {
        // Somebody else imported it meanwhile; it has the same content.
        Err(Error::LayerExists { .. }) => return Ok(()),
        staged => staged?,
    };
    let to = staged.content();
    let from = unpacked.content.as_fd();
    let at = || id.to_string();
    let mut names = Vec::new();
    name::list(from, |name, _, _| {
        names.push(name.to_vec());
        Ok(())
    })
    .at("getdents64", at)?;
    for name in &names {
        name::rename(At::new(from, name), At::new(to, name), RenameFlags::NOREPLACE)
            .at("renameat2", at)?;
    }
    copy_root(from, to).at("setxattr", at)?;
    match staged.publish() {
        Err(Error::LayerExists { .. }) => {}
        published => published?,
    }
    unpacked.temp.remove()
}

/// Gives one directory the attributes of another.
fn copy_root(
    from: std::os::fd::BorrowedFd<'_>,
    to: std::os::fd::BorrowedFd<'_>,
) -> std::result::Result<(), crate::error::Errno> {
    use rustix::fs::{Timespec, Timestamps, XattrFlags};
    let found = stat::of(from)?;
    name::chown_handle(to, Some(found.stx_uid), Some(found.stx_gid))?;
    name::chmod_open(to, u32::from(found.stx_mode))?;
    let list = xattr::list(xattr::Target::Open(from))?;
    for name in list.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        if let Some(value) = xattr::get(xattr::Target::Open(from), name)? {
            sys::xattr::set(xattr::Target::Open(to), name, &value, XattrFlags::empty())?;
        }
    }
    let time = |time: rustix::fs::StatxTimestamp| Timespec {
        tv_sec: time.tv_sec,
        tv_nsec: time.tv_nsec.into(),
    };
    name::set_times_open(
        to,
        &Timestamps {
            last_access: time(found.stx_atime),
            last_modification: time(found.stx_mtime),
        },
    )
}
