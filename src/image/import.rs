//! Images from a bundle into a store: layers are unpacked beside one another, and published from
//! the lowest up. Stores that cannot keep content before there is a layer get one after the other.
//!
//! Locks: none held while unpacking. A crash leaves what was staged, which the next opening of the
//! store removes, and whole layers.

use std::io::Read;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;

use super::{Record, Records};
use crate::archive::ApplyOptions;
use crate::archive::bundle::Bundle;
use crate::archive::manifest::{self, Image, Layer};
use crate::error::{Error, Result};
use crate::store::differ::{Differ, Staged, Tar};
use crate::store::driver::{Driver, Filling};
use crate::store::{CreateOptions, LayerId, Store};

/// Layers that are unpacked at once.
const WORKERS_MAX: usize = 4;

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
    store: &dyn Driver,
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
    store: &dyn Driver,
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
    let all = ids.iter().map(ToString::to_string).collect();
    let Some(store) = store.stager() else {
        for (layer, id, parent) in todo {
            let mut tar = tar(bundle, layer, options, watch)?;
            let mut fill = |target: Filling| tar.fill(target).map(drop);
            let new = CreateOptions { parent: parent.as_ref(), read_write: false, owner: None };
            settled(store.make(&id, new, Some(&mut fill)))?;
        }
        return Ok(all);
    };
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
        let mut waiting: Vec<Option<Staged<'_>>> = todo.iter().map(|_| None).collect();
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
    Ok(all)
}

/// Opens the archive of a layer.
fn tar(
    bundle: &Bundle,
    layer: &Layer,
    options: &ImportOptions,
    watch: &Watch<'_>,
) -> Result<Tar<Box<dyn Read + Send>>> {
    let file = bundle.find(&layer.path)?.ok_or_else(|| Error::Corrupt {
        what: "is missing in the image".into(),
        at: layer.path.clone().into(),
    })?;
    let size = file.size();
    Ok(Tar {
        archive: Some(watch(Box::new(file), size)),
        options: ApplyOptions {
            blob: layer.blob.map(|(digest, _)| digest),
            blob_size: layer.blob.map(|(_, size)| size),
            diff: Some(layer.diff),
            ..options.apply.clone()
        },
        shown: PathBuf::from(layer.path.clone()),
    })
}

/// Unpacks a layer aside.
fn unpack<'a>(
    store: &'a Store,
    bundle: &Bundle,
    layer: &Layer,
    options: &ImportOptions,
    watch: &Watch<'_>,
) -> Result<Staged<'a>> {
    let mut tar = tar(bundle, layer, options, watch)?;
    store.apply_to_staging(&mut tar).map(|(staged, _)| staged)
}

/// Takes a layer that is there for made: somebody else imported it meanwhile, with the same content.
fn settled(made: Result<()>) -> Result<()> {
    match made {
        Err(Error::LayerExists { .. }) => Ok(()),
        made => made,
    }
}

/// Makes a layer of the store of what was unpacked.
fn publish(
    store: &Store,
    id: &LayerId,
    parent: Option<&LayerId>,
    staged: Staged<'_>,
) -> Result<()> {
    let options = CreateOptions { parent, read_write: false, owner: None };
    settled(store.commit_from_staging(id, options, staged))
}
